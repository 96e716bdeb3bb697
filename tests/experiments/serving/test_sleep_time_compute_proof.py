"""What the experiments on sleep-time compute say if sleeping is broken, the model another one, or a rival as good.

The model is a program that knows the task (`Knowing`), so that the accounting has no noise; the trained ones are tried in a slow test.
"""

from __future__ import annotations

import copy
import random
import re
from dataclasses import replace

import numpy as np
import pytest
from scipy.optimize import linprog
from tests.properties.sabotage import PAYS, record_of

from assay.evidence.record import changed
from assay.evidence.types import Verdict
from assay.evidence.verdict import judge
from assay.experiments import experiments_of
from assay.experiments.rates import Rate
from assay.experiments.serving import sleep_time_compute as room
from assay.experiments.serving import sleep_time_compute_models as models
from assay.methods.serving.sleep_time_compute import Ledger, SleepTimeAgent

RECIPE = {**models.RECIPE, "seeds": 3, "contexts": 5}
POINT = {"recipe": RECIPE}
TOKENS, COST = "sleep_time_compute/test-time-tokens", "sleep_time_compute/amortised-cost"
CLAIMS = [TOKENS, COST]
LEAST = 3  # the least budget at which thinking is right


class Knowing(models.WordModel):
    """Says what is right where it may know it, and a digit by chance elsewhere.

    It knows from `least` budgets of thinking on, and what a memory of this table says; `adds`: also the sum of two sums, at once.
    """

    least, adds, right_in_sleep, direct = LEAST, True, 1.0, 0.0

    def __init__(self, recipe, seed):
        super().__init__(None, recipe)
        self.chance = random.Random(seed)

    def guess(self, share, right):
        """The right digit for that share, and another elsewhere."""
        base = self.recipe["base"]
        return right if self.chance.random() < share else str((int(right) + self.chance.randrange(1, base)) % base)

    def table(self, words):
        digits = iter(words)
        return [[int(next(digits)[-1]) for _ in range(many)] for many in self.recipe["values"]]

    def complete(self, ids, most, cache=None):
        return [self.say([self.words[n] for n in row]) for row in ids.tolist()]

    def say(self, words):
        base = self.recipe["base"]
        if words[-1] == "sleep":
            said = models.slept(self.table(words[1:]), self.recipe)
            for n, word in enumerate(said):
                if word.partition("=")[0].isalpha() and "=" in word:
                    said[n] = word[:-1] + self.guess(self.right_in_sleep, word[-1])
            return " ".join(said)
        level, question = int(words[-2][1]), words[-1]
        blind = self.direct or 1 / base
        if "memory" in words:
            known = dict(word.split("=") for word in words[words.index("memory") + 1 : -2])
            lists = [int(known.get(name, 0)) for name in question]
            if level == 0:
                sure = len(lists) == 1 or self.adds
                return f"{self.guess(1.0 if sure else blind, str(sum(lists) % base))} ."
            both = [f"{question}={sum(lists) % base}"] * (len(lists) > 1)
            return " ".join([*(f"{name}={digit}" for name, digit in zip(question, lists, strict=True)), *both, "."])
        said = models.thought(self.table(words[1:]), question, level, base)
        said[-2] = said[-2][:-1] + self.guess(1.0 if level >= self.least else blind, said[-2][-1])
        return " ".join(said)

    def likelihoods(self, prompts, answers, *, batch=500):
        return [self.direct or 1 / self.recipe["base"]] * len(prompts)

    def read(self, prefix):
        return None

    def once(self, prompt, kept="", cache=None):
        return self.say(prompt.split())


@pytest.fixture(autouse=True)
def knowing(monkeypatch):
    monkeypatch.setattr(models, "word_model", Knowing)
    monkeypatch.setattr(room, "in_parallel", lambda function, runs: [function(*run) for run in runs])
    monkeypatch.setattr(room, "chosen", lambda *_: Rate(1e-2, (3e-3, 1e-2, 3e-2)))


SCORES = room.scores


def records(monkeypatch):
    """The records of both claims, of the same answers."""
    found = SCORES(RECIPE)
    monkeypatch.setattr(room, "scores", lambda recipe: found)
    return [record_of(claim, POINT) for claim in CLAIMS]


def judged(record):
    """The judgement as if the level did not follow from what we chose: so that the rest of the rule can be tried."""
    return judge(changed(record, computed=""))


def test_levels_are_said_to_follow_from_what_was_chosen(monkeypatch):
    for record in records(monkeypatch):
        assert judge(record).verdict is Verdict.COMPUTED
        assert judged(record).verdict in PAYS


def verdicts(monkeypatch):
    return [judged(record).verdict for record in records(monkeypatch)]


def pays(monkeypatch):
    """Of both claims, whether they pay."""
    return [verdict in PAYS for verdict in verdicts(monkeypatch)]


def words_of(level):
    """Words of right answers at a budget, on average over the questions."""
    table = [[0] * many for many in RECIPE["values"]]
    return np.mean([len(models.thought(table, question, level, 6)) for question in models.questions(RECIPE)])


def test_a_model_that_knows_is_charged_what_its_budgets_take(monkeypatch):
    """The whole pipeline without noise: figures follow from what the model can do, which shows the accounting and proves nothing else."""
    record, paid = records(monkeypatch)
    assert [words_of(level) for level in range(4)] == pytest.approx([2, 3.2, 5.6, 11.2])
    sleep = record.details["sleep_tokens"][0]
    assert sleep == 2 * 14 - 4 + 1
    shares = record.details["budgets_that_are_enough"]
    think = [sum(share * words_of(int(n)) for n, share in one.items()) for one in shares["thinking"]]
    assert all(0.95 < one["3"] < 0.98 for one in shares["thinking"])  # three points less than always right
    assert all(set(one) == {"0"} for one in shares["sleeping"])
    assert record.measured.median == pytest.approx(np.exp(np.mean(np.log(np.array(think) / 2))))
    assert record.measured.median == pytest.approx(11.2 / 2, rel=0.05)
    keeping = 2 + (np.array(think) - 3.2) / 4 + 0.4
    assert record.free == pytest.approx(np.exp(np.mean(np.log(np.array(think) / keeping))))
    assert record.arms[room.AT_ONCE] == pytest.approx(record.measured.median * 2 / ((sleep + 6) / 10))
    assert paid.measured.median == pytest.approx(record.measured.median * 20 / (sleep / 10 + 20))
    assert paid.free == pytest.approx(record.free)
    assert paid.details["pays_from_questions"]["t = 10"][0] == pytest.approx(sleep / (10 * (think[0] - 2)))
    curve = [paid.details["cost_a_question"]["t = 10"][q]["sleeping"] for q in ("1", "2", "5", "10")]
    assert curve == pytest.approx([sleep / q + 20 for q in (1, 2, 5, 10)])
    assert {judged(record).verdict, judged(paid).verdict} <= set(PAYS)
    assert record.quality.candidate == pytest.approx(1)
    for name in ("deleted", "random", "rival", room.TWICE, room.TRUSTED):
        assert record.quality.controls[name] < 0.8, name
    assert record.quality.controls[room.ONLY] == 1
    by_additions = record.details["tokens_at_these_by_additions"]
    assert list(by_additions["thinking"]) == ["2", "3", "5", "6", "7"]
    assert by_additions["thinking"]["7"] > 2 * by_additions["thinking"]["2"]
    assert set(by_additions["sleeping"].values()) == {2}


def test_other_models_give_other_figures_on_the_same_tables(monkeypatch):
    """No figure follows from the sizes: what must be written decides, on both sides."""
    seen = {}
    for least, adds in ((3, False), (2, True), (2, False), (1, False)):
        monkeypatch.setattr(Knowing, "least", least)
        monkeypatch.setattr(Knowing, "adds", adds)
        found, paid = records(monkeypatch)
        behind = found.details["budgets_that_are_enough"]["sleeping"]
        assert all(one.get("1", 0) > 0.9 for one in behind) == (not adds)
        assert found.measured.median == pytest.approx(words_of(least) / (2 if adds else 3.2), rel=0.05)
        seen[least, adds] = found.measured.median
    assert len({round(value, 2) for value in seen.values()}) == 4
    assert seen[1, False] == pytest.approx(1, abs=0.05)  # the sums are written anyway: sleeping saves nothing
    assert not {judged(found).verdict, judged(paid).verdict} & set(PAYS)


def test_a_memory_of_another_table_pays_no_more(monkeypatch):
    real = SleepTimeAgent._sleep
    kept = []

    def mixed(self, context, key, seed):
        """As long a sleep, over the context that came before."""
        kept.append(context)
        return real(self, kept[-2] if len(kept) > 1 else context, key, seed)

    monkeypatch.setattr(SleepTimeAgent, "_sleep", mixed)
    assert pays(monkeypatch) == [False, False]


def test_a_memory_that_is_not_shown_pays_no_more(monkeypatch):
    real = models.Said.test
    monkeypatch.setattr(models.Said, "test", lambda self, context, blocks, *rest: real(self, context, (), *rest))
    assert pays(monkeypatch) == [False, False]


def test_a_sleep_that_writes_digits_by_chance_pays_no_more(monkeypatch):
    monkeypatch.setattr(Knowing, "right_in_sleep", 1 / RECIPE["base"])
    assert pays(monkeypatch) == [False, False]


def test_a_sleep_that_is_often_wrong_pays_no_more(monkeypatch):
    monkeypatch.setattr(Knowing, "right_in_sleep", 0.8)
    for record in records(monkeypatch):
        assert judged(record).verdict not in PAYS
        assert record.quality.candidate < 0.9
        assert np.mean(record.details["memory_right"]) == pytest.approx(0.4 * 0.8 + 0.6 * 0.64, abs=0.15)
        believed = [
            one for one in sum(record.details["right_where_the_memory_is_wrong_by_budget"], []) if one is not None
        ]
        assert max(believed) < 0.4  # it is believed; two that are wrong may add up to what is right


def test_where_answers_need_no_thinking_it_is_refuted(monkeypatch):
    monkeypatch.setattr(Knowing, "least", 0)
    for found in records(monkeypatch):
        assert found.details["budgets_that_are_enough"]["thinking"] == [{"0": 1}] * 3
        assert judged(found).verdict is Verdict.REFUTED


def test_where_guessing_at_equal_tokens_is_as_good_it_is_refuted(monkeypatch):
    monkeypatch.setattr(Knowing, "direct", 0.9)
    for found in records(monkeypatch):
        assert found.quality.controls["rival"] > 0.98
        assert judged(found).verdict is Verdict.REFUTED
        assert "pass@k" in found.refuted_if


def test_a_conversation_that_keeps_what_was_worked_out_can_be_cheaper(monkeypatch):
    """The rival that needs no idle time decides: where waiting costs only twice as much as idle time, it wins."""
    monkeypatch.setattr(Knowing, "least", 2)
    monkeypatch.setattr(Knowing, "adds", False)
    _, found = records(monkeypatch)
    assert 1 < found.free < found.measured.low
    assert judged(found).verdict in PAYS
    for function in (room.costs, room.rivals):
        monkeypatch.setattr(function, "__kwdefaults__", {**function.__kwdefaults__, "t": 2.0})
    _, cheap = records(monkeypatch)
    assert 1 < cheap.measured.high < cheap.free
    assert judged(cheap).verdict is Verdict.DOES_NOT_PAY


def test_every_token_charged_can_refute_the_cost(monkeypatch):
    """Where reading is dear, thinking over the bare table is cheaper: the predicate looks at it."""
    monkeypatch.setattr(room, "KEPT", 4.0)
    _, found = records(monkeypatch)
    assert max(found.details["ratio_with_every_token_charged"]) < 1 < found.measured.low
    assert judged(found).verdict is Verdict.REFUTED


def test_a_token_that_is_not_booked_changes_the_cost(monkeypatch):
    honest = records(monkeypatch)[1].measured.median
    real = Ledger.book

    def book(self, phase, reply, **rest):
        real(self, phase, replace(reply, completion_tokens=1) if phase == "sleep" else reply, **rest)

    monkeypatch.setattr(Ledger, "book", book)
    assert records(monkeypatch)[1].measured.median > 1.08 * honest


# ------------------------------------------------------------------------------------------------------ budgets that are enough


def test_the_budgets_are_the_cheapest_mixture_that_is_right_so_often():
    """Against a linear programme over all mixtures."""
    chance = np.random.default_rng(0)
    for _ in range(60):
        many = int(chance.integers(1, 6))
        accuracy, tokens = chance.random(many), chance.random(many) * 10
        target = float(chance.random())
        mix = room.fewest(list(accuracy), list(tokens), target)
        assert sum(mix.values()) == pytest.approx(1)
        assert len(mix) <= 2
        if accuracy.max() < target:
            assert mix == {int(accuracy.argmax()): 1.0}
            continue
        best = linprog(tokens, A_ub=[-accuracy], b_ub=[-target], A_eq=[np.ones(many)], b_eq=[1])
        assert room.mixed(list(tokens), mix) == pytest.approx(best.fun, abs=1e-7)
        assert room.mixed(list(accuracy), mix) >= target - 1e-9


def test_budgets_are_chosen_on_other_tables_than_those_that_are_judged():
    seen = room.seed_scores(RECIPE, 0)
    mixes = room.matched(seen)
    worse = copy.deepcopy(seen)
    worse["heldout"]["accuracy"]["thinking"] = [1.0, 1.0, 1.0, 0.5]
    assert room.matched(worse) == mixes
    assert room.of_best_thinking(worse) == 0.5
    worse["choice"]["accuracy"]["thinking"] = [1.0] * 4
    assert room.matched(worse)["thinking"] == {0: 1.0}


def test_sleeping_that_is_right_less_often_is_compared_with_thinking_as_bad():
    seen = {"choice": {"accuracy": {"thinking": [0.2, 0.6, 1.0], "sleeping": [0.5, 0.6]}}}
    seen["choice"]["tokens"] = {"thinking": [2, 3, 9], "sleeping": [2, 3]}
    assert room.matched(seen) == {"thinking": {1: 1.0}, "sleeping": {1: 1.0}}
    seen["choice"]["accuracy"]["sleeping"] = [0.995, 1.0]
    mixes = room.matched(seen)
    assert mixes["sleeping"] == {0: 1.0}
    assert mixes["thinking"] == pytest.approx(
        {1: 0.075, 2: 0.925}
    )  # three points less than at best, in favour of thinking


# ---------------------------------------------------------------------------------------------------------- the task itself


def test_what_is_right_to_write_adds_up():
    chance = random.Random(0)
    for _ in range(20):
        table = models.new_table(RECIPE, chance)
        assert [len(values) for values in table] == RECIPE["values"]
        for question in models.questions(RECIPE):
            lists = [table["ABCD".index(name)] for name in question]
            wanted = sum(map(sum, lists)) % 6
            for level in range(models.LEVELS):
                said = models.thought(table, question, level, 6)
                assert (said[-2][-1], said[-1]) == (str(wanted), ".")
            answer, sums, chains, read = (models.thought(table, question, level, 6)[:-1] for level in range(4))
            both = int(len(lists) > 1)
            assert len(answer) == 1
            assert len(sums) == len(lists) + both
            assert len(chains) == models.additions(question, RECIPE) == sum(map(len, lists)) - 1
            assert len(read) == len(chains) + sum(map(len, lists))
            for name, values in zip(question, lists, strict=True):
                running = [str(sum(values[: n + 1]) % 6) for n in range(1, len(values))]
                assert [word[-1] for word in chains if re.match(rf"{name}\d*[:=]", word)] == running
                assert [word for word in read if word[0] == name and word[1:2].isdigit() and "=" in word] == [
                    f"{name}{n}={value}" for n, value in enumerate(values, 1)
                ]
            assert not set(chains) - set(read)
        sleep = models.slept(table, RECIPE)
        assert " ".join(word for word in sleep if word[1:2] == "=") == models.memory_text(table, RECIPE)
        assert all(room.memory_right(models.memory_text(table, RECIPE), table, RECIPE))
        assert not any(room.memory_right(None, table, RECIPE))
    assert models.added([[4]], "A", 6, read=False) == ["A=4"]
    assert models.added([[4]], "A", 6, read=True) == ["A1=4", "A=4"]
    assert sorted({models.additions(q, RECIPE) for q in models.questions(RECIPE)}) == [2, 3, 5, 6, 7]


@pytest.mark.parametrize("kind", models.KINDS)
def test_prompts_and_answers_are_words_of_the_vocabulary(kind):
    words = set(models.vocabulary(RECIPE))
    chance = random.Random(1)
    for _ in range(5):
        prompt, answer = models.example(kind, RECIPE, chance)
        assert {*prompt, *answer} <= words
        assert answer[-1] == "."
        assert "." not in prompt + answer[:-1]
    assert len(words) == len(models.vocabulary(RECIPE))


@pytest.mark.parametrize("kind", models.KINDS)
def test_the_example_of_a_kind_is_what_that_way_is_asked(kind):
    """Each way is trained on the prompts that it is judged with."""
    chance = random.Random(2)
    for _ in range(10):
        prompt, _ = models.example(kind, RECIPE, chance)
        text = " ".join(prompt)
        assert (text.count("table") == 2) == (kind == "table twice")
        assert ("table" not in prompt) == (kind == "memory only")
        assert ("other" in prompt) == (kind == "memory of another table")
        assert ("memory" in prompt) == (kind == "memory only" or kind.startswith("memory, "))
        if kind != "sleep":
            budget = int(prompt[-2][1])
            assert budget == int(kind[-1]) if kind[-1].isdigit() else budget in models.SHORT


def test_kinds_have_as_many_rows():
    assert sorted(kind for kinds in models.TOGETHER for kind in kinds) == sorted(models.KINDS)
    inputs, targets = next(models.batches(RECIPE, 0))
    assert sum(len(ids) for ids in inputs) == RECIPE["rows"] * len(models.KINDS)
    for ids, wanted in zip(inputs, targets, strict=True):
        asked = wanted != models.ASKED_NOTHING
        assert asked.any(1).all()
        inside = asked[:, :-1] & asked[:, 1:]
        assert (ids[:, 1:][inside] == wanted[:, :-1][inside]).all()  # the next word


def test_tables_of_two_purposes_differ():
    one, two = (models.tables(RECIPE, 20, part=part) for part in ("heldout", "choice"))
    assert not [table for table in one if table in two]
    assert models.tables(RECIPE, 5, part="heldout") == one[:5]


def test_a_kept_prefix_says_the_same_and_many_at_once_as_one():
    recipe = {**RECIPE, "width": 32, "layers": 2, "heads": 2}
    model = models.language.small_llama(width=32, layers=2, heads=2, vocab=len(models.vocabulary(recipe))).eval()
    chat = models.WordModel(model, recipe)
    (table,) = models.tables(recipe, 1, part="heldout")
    context = models.table_text(table)
    prompts = [models.Said().test(context, (), q, 3)[0]["content"] for q in models.questions(recipe)]
    prefix = prompts[0].rpartition(" w3 ")[0]
    cache = chat.read(prefix)
    assert [chat.once(p, prefix, cache) for p in prompts] == [chat.once(p) for p in prompts]
    assert cache.get_seq_length() == len(prefix.split())
    chat.fill(prompts)
    assert [chat([{"role": "user", "content": p}]).text for p in prompts] == [chat.once(p) for p in prompts]
    assert len({chat.once(p) for p in prompts}) > 1


@pytest.mark.slow
def test_a_model_trained_a_little_is_void_and_a_figure_still_comes(monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(room, "in_parallel", lambda function, runs: [function(*run) for run in runs])
    monkeypatch.setattr(models, "chosen", lambda *_: Rate(1e-2, (3e-3, 1e-2, 3e-2)))
    monkeypatch.setattr(room, "chosen", lambda *_: Rate(1e-2, (3e-3, 1e-2, 3e-2)))
    record = record_of(TOKENS, {"recipe": models.SMOKE})
    assert judged(record).verdict is Verdict.UNDECIDED
    assert "void" in judged(record).reason


def test_the_deciding_points_are_named():
    found = experiments_of("sleep_time_compute")
    assert {one.claim for one in found} == set(CLAIMS)
    for one in found:
        assert {scale: point["recipe"] for scale, point in one.decides.items()} == {
            "smoke": models.SMOKE, "small": models.RECIPE, "full": models.FULL,
        }  # fmt: skip
        assert len(models.questions(models.RECIPE)) == one.paper["questions"]
