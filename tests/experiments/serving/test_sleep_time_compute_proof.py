"""What the experiments on sleep-time compute say if sleeping is broken, the model another one, or a rival as good.

The model is a program that knows the task (`Knowing`), so that the accounting has no noise; the trained ones are tried in a slow test.
"""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from tests.properties.sabotage import PAYS, record_of, verdict_of

from assay.evidence.types import Verdict
from assay.evidence.verdict import judge
from assay.experiments import experiments_of
from assay.experiments.rates import Rate
from assay.experiments.serving import sleep_time_compute as room
from assay.experiments.serving import sleep_time_compute_models as models
from assay.methods.serving.sleep_time_compute import Ledger, SleepTimeAgent

RECIPE = {**models.RECIPE, "seeds": 3, "contexts": 12}
POINT = {"recipe": RECIPE}
TOKENS, COST = "sleep_time_compute/test-time-tokens", "sleep_time_compute/amortised-cost"
CLAIMS = [TOKENS, COST]
LEAST = 3  # the least budget at which thinking is right


class Knowing(models.WordModel):
    """Says what is right where it may know it (from enough thinking, or a memory of this table), and a digit by chance elsewhere."""

    least, right_in_sleep, direct = LEAST, 1.0, 0.0

    def __init__(self, recipe, seed):
        super().__init__(None, recipe)
        self.chance = random.Random(seed)

    def guess(self, share, right):
        """The right digit for that share, and another elsewhere."""
        base = self.recipe["base"]
        return right if self.chance.random() < share else str((int(right) + self.chance.randrange(1, base)) % base)

    def table(self, words):
        values = self.recipe["values"]
        digits = [int(word[-1]) for word in words[: self.recipe["lists"] * values]]
        return [digits[n : n + values] for n in range(0, len(digits), values)]

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
        if "memory" in words:
            known = dict(word.split("=") for word in words[words.index("memory") + 1 : -2])
            return f"{known.get(question, '0')} ."
        said = models.thought(self.table(words[1:]), question, level, base)
        said[-2] = said[-2][:-1] + self.guess(1.0 if level >= self.least else self.direct or 1 / base, said[-2][-1])
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
    monkeypatch.setattr(Knowing, "least", LEAST)


def test_a_model_that_knows_is_charged_what_the_sizes_say():
    """The whole pipeline without noise: figures follow from the sizes, which shows the accounting and proves nothing else."""
    record = record_of(TOKENS, POINT)
    values = RECIPE["values"]
    think = (
        0.4 * (2 * values + 1) + 0.6 * (4 * values + 3) + 1
    )  # budget 3: four questions are about one list, six about two
    assert record.measured.median == pytest.approx(think / 2)
    assert record.measured.low == record.measured.high
    assert record.details["budget_that_is_enough"] == [LEAST] * 3
    sleep = record.details["sleep_tokens"][0]
    assert sleep == 2 * 4 * values + 3 * 6 + 1
    assert record.free == pytest.approx(think / min(sleep / 10, sleep / 10 + 2))
    paid = record_of(COST, POINT)
    assert paid.measured.median == pytest.approx(10 * think / (sleep / 10 + 10 * 2))
    assert paid.details["pays_from_questions"]["t = 10"][0] == pytest.approx(sleep / (10 * (think - 2)))
    curve = [paid.details["cost_a_question"]["t = 10"][q]["sleeping"] for q in ("1", "2", "5", "10")]
    assert curve == pytest.approx([sleep / q + 20 for q in (1, 2, 5, 10)])
    assert {judge(record).verdict, judge(paid).verdict} <= set(PAYS)
    assert record.quality.candidate == 1
    for name in ("deleted", "random", "rival", room.TWICE, room.TRUSTED):
        assert record.quality.controls[name] < 0.8, name
    assert record.quality.controls[room.ONLY] == 1


@pytest.mark.parametrize("claim", CLAIMS)
def test_a_memory_of_another_table_pays_no_more(claim, monkeypatch):
    real = SleepTimeAgent._sleep
    kept = []

    def mixed(self, context, key, seed):
        """As long a sleep, over the context that came before."""
        kept.append(context)
        return real(self, kept[-2] if len(kept) > 1 else context, key, seed)

    monkeypatch.setattr(SleepTimeAgent, "_sleep", mixed)
    assert verdict_of(claim, POINT) not in PAYS


@pytest.mark.parametrize("claim", CLAIMS)
def test_a_memory_that_is_not_shown_pays_no_more(claim, monkeypatch):
    real = models.Said.test
    monkeypatch.setattr(models.Said, "test", lambda self, context, blocks, *rest: real(self, context, (), *rest))
    assert verdict_of(claim, POINT) not in PAYS


@pytest.mark.parametrize("claim", CLAIMS)
def test_a_sleep_that_is_often_wrong_pays_no_more(claim, monkeypatch):
    monkeypatch.setattr(Knowing, "right_in_sleep", 0.85)
    record = record_of(claim, POINT)
    assert judge(record).verdict not in PAYS
    assert record.details["memory_right"][0] == pytest.approx(0.85, abs=0.1)
    assert record.details["right_where_the_memory_is_wrong"][0] == 0  # it is believed


@pytest.mark.parametrize("claim", CLAIMS)
def test_where_answers_need_no_thinking_it_is_refuted(claim, monkeypatch):
    monkeypatch.setattr(Knowing, "least", 0)
    found = record_of(claim, POINT)
    assert found.details["budget_that_is_enough"] == [0] * 3
    assert judge(found).verdict is Verdict.REFUTED


@pytest.mark.parametrize("claim", CLAIMS)
def test_where_guessing_at_equal_tokens_is_as_good_it_is_refuted(claim, monkeypatch):
    monkeypatch.setattr(Knowing, "direct", 0.8)
    found = record_of(claim, POINT)
    assert found.quality.controls["rival"] > 0.99
    assert judge(found).verdict is Verdict.REFUTED
    assert "pass@k" in found.refuted_if


def test_short_thinking_makes_the_gain_small(monkeypatch):
    """A sum for each list is enough."""
    monkeypatch.setattr(Knowing, "least", 1)
    found = record_of(TOKENS, POINT)
    assert found.measured.median == pytest.approx((0.4 * 1 + 0.6 * 3 + 1) / 2)
    assert judge(found).verdict is Verdict.DIRECTION_HOLDS


def test_every_token_charged_can_refute_the_cost(monkeypatch):
    """Where reading is dear, thinking over the bare table is cheaper: the predicate looks at it."""
    monkeypatch.setattr(room, "KEPT", 2.0)
    found = record_of(COST, POINT)
    assert max(found.details["ratio_with_every_token_charged"]) < 1 < found.measured.low
    assert judge(found).verdict is Verdict.REFUTED


def test_a_token_that_is_not_booked_changes_the_cost(monkeypatch):
    honest = record_of(COST, POINT).measured.median
    real = Ledger.book

    def book(self, phase, reply, **rest):
        real(self, phase, replace(reply, completion_tokens=1) if phase == "sleep" else reply, **rest)

    monkeypatch.setattr(Ledger, "book", book)
    assert record_of(COST, POINT).measured.median > 1.15 * honest


# ---------------------------------------------------------------------------------------------------------- the task itself


def test_what_is_right_to_write_adds_up():
    chance = random.Random(0)
    for _ in range(20):
        table = models.new_table(RECIPE, chance)
        for question in models.questions(RECIPE):
            wanted = sum(sum(table["ABCD".index(name)]) for name in question) % 6
            for level in range(models.LEVELS):
                said = models.thought(table, question, level, 6)
                assert (said[-2][-1], said[-1]) == (str(wanted), ".")
            lengths = [len(models.thought(table, question, level, 6)) for level in range(models.LEVELS)]
            assert lengths == sorted(lengths)
            assert lengths[0] == 2
        assert all(room.memory_right(models.memory_text(table, RECIPE), table, RECIPE))
        assert not any(room.memory_right(None, table, RECIPE))


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


def test_kinds_have_as_many_rows_and_as_much_weight():
    assert sorted(kind for kinds in models.TOGETHER for kind in kinds) == sorted(models.KINDS)
    inputs, targets = next(models.batches(RECIPE, 0))
    assert sum(len(ids) for ids in inputs) == RECIPE["rows"] * len(models.KINDS)
    for ids, wanted in zip(inputs, targets, strict=True):
        asked = wanted != models.ASKED_NOTHING
        assert asked.any(1).all()
        inside = asked[:, :-1] & asked[:, 1:]
        assert (ids[:, 1:][inside] == wanted[:, :-1][inside]).all()  # the next word


def test_tables_of_two_purposes_differ():
    one, two = (models.tables(RECIPE, 20, part=part) for part in ("heldout", "validation"))
    assert not [table for table in one if table in two]
    assert models.tables(RECIPE, 5, part="heldout") == one[:5]


def test_a_kept_prefix_says_the_same_and_many_at_once_as_one():
    recipe = {**RECIPE, "width": 32, "layers": 2, "heads": 2}
    model = models.language.small_llama(width=32, layers=2, heads=2, vocab=len(models.vocabulary(recipe))).eval()
    chat = models.WordModel(model, recipe)
    table, *others = models.tables(recipe, 4, part="heldout")
    context = models.table_text(table)
    prompts = [models.Said().test(context, (), q, 3)[0]["content"] for q in models.questions(recipe)]
    prefix = prompts[0].rpartition(" w3 ")[0]
    cache = chat.read(prefix)
    assert [chat.once(p, prefix, cache) for p in prompts] == [chat.once(p) for p in prompts]
    assert cache.get_seq_length() == len(prefix.split())
    chat.fill(prompts)
    assert [chat([{"role": "user", "content": p}]).text for p in prompts] == [chat.once(p) for p in prompts]
    assert len({chat.once(p) for p in prompts}) > 1
    assert others


@pytest.mark.slow
def test_a_model_trained_a_little_is_void_and_a_figure_still_comes(monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(room, "in_parallel", lambda function, runs: [function(*run) for run in runs])
    monkeypatch.setattr(models, "chosen", lambda *_: Rate(1e-2, (3e-3, 1e-2, 3e-2)))
    monkeypatch.setattr(room, "chosen", lambda *_: Rate(1e-2, (3e-3, 1e-2, 3e-2)))
    record = record_of(TOKENS, {"recipe": models.SMOKE})
    assert judge(record).verdict is Verdict.UNDECIDED
    assert "void" in judge(record).reason


def test_the_deciding_points_are_named():
    found = experiments_of("sleep_time_compute")
    assert {one.claim for one in found} == set(CLAIMS)
    for one in found:
        assert {scale: point["recipe"] for scale, point in one.decides.items()} == {
            "smoke": models.SMOKE, "small": models.RECIPE, "full": models.FULL,
        }  # fmt: skip
        assert len(models.questions(models.RECIPE)) == one.paper["questions"]
