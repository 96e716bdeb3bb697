"""What the experiments on Plan and Budget say if the split is broken, the plan is free, or the model another one.

The model is a program whose answers are known (`Knowing`), a word a token, so that no verdict rests on noise.
"""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest
from tests.properties.sabotage import PAYS, record_of

from assay.evidence.types import Verdict
from assay.evidence.verdict import judge
from assay.experiments import experiments_of
from assay.experiments.reasoning import plan_and_budget as room
from assay.experiments.reasoning import plan_and_budget_arms as arms
from assay.methods.core.reasoning.budget import Budget, Spent
from assay.methods.core.reasoning.generator import Sample, Sampling, seed_of
from assay.methods.reasoning.plan_and_budget import Plan, controller
from assay.methods.reasoning.plan_and_budget import plans as plans_module
from assay.workloads.reasoning import items

POINT = {"plan": "model", "schedule": "polynomial", "each": 8, "learn": 6, "every": False}
TOKENS, GAIN = "plan_and_budget/token-reduction", "plan_and_budget/e3-gain"
CLAIMS = [TOKENS, GAIN]
PLANNED = "1. What do they cost?\nHint: multiply.\n2. What is paid?\nHint: add."


class Knowing:
    """Thinks for `long` words and says the answer at their end; answers a part at its end, `needs` words long.

    It is right about `knows` of the questions, the same ones in any way of asking but when it answers at once (`direct`).
    """

    name = "knowing"
    long, needs, knows, direct, plan = 100, (16, 4), 0.6, 0.05, PLANNED

    def __call__(self, prompts, sampling, *, n=1, first=0, seed=0):
        return [[self.sample(prompt, sampling, number) for number in range(first, first + n)] for prompt in prompts]

    def sample(self, prompt, sampling, number):
        words = self.said(prompt, number).replace("\n", " \n ").split(" ")
        kept = words[: sampling.max_new_tokens]
        text = " ".join(kept).replace(" \n ", "\n")
        met = [text.index(stop) for stop in sampling.stop if stop in text]
        ended = "stop" if len(kept) == len(words) or met else "length"
        spent = Spent(len(prompt.split()), len(kept), calls=1)
        return Sample(text[: min(met)] if met else text, (0,) * len(kept), (), ended, spent)

    def said(self, prompt, number):
        found = re.search(r"(\w+ buys .*pay\?)", prompt.rpartition("Problem:")[2])
        if found is None:  # a text whose tokens are counted
            return "x"
        if "Split the problem" in prompt:
            return self.plan
        question = found[1]
        if prompt.endswith("The answer is"):
            return ANSWERS[question] if chance(question, number) < self.direct else str(900 + number)
        answer = ANSWERS[question] if chance(question) < self.knows else "999"
        if prompt.endswith("Answer:"):
            part = prompt.count("Answer:")
            done = part == 1 or self.first_done(prompt)
            return " ".join(["so"] * (self.needs[part - 1] - 1) + [answer if done else "999"])
        return " ".join(["well"] * (self.long - 1) + [answer])

    def first_done(self, prompt):
        """Whether the first part came to its end: a number stands there."""
        return re.search(r"\d", prompt.split("Answer:")[1].partition("\n")[0]) is not None


def chance(question, number=-1):
    return seed_of(question, number) / 2**63


ANSWERS = {
    item.question: item.answer for part in ("judged", "learn")
    for item in items("story", level=arms.LEVEL, n=30, part=part)
}  # fmt: skip


@pytest.fixture(autouse=True)
def knowing(monkeypatch):
    model = Knowing()
    monkeypatch.setattr(room, "generator", lambda: model)
    monkeypatch.setattr(room, "DRAWS", 200)
    room.measured.cache_clear()
    yield
    room.measured.cache_clear()


def records(**changes):
    room.measured.cache_clear()
    return [record_of(claim, POINT | changes) for claim in CLAIMS]


def verdicts(**changes):
    return [judge(record).verdict for record in records(**changes)]


def test_where_parts_need_what_the_schedule_gives_the_method_pays():
    tokens, gain = records()
    assert [judge(record).verdict for record in (tokens, gain)] == [Verdict.REPRODUCED] * 2
    assert tokens.details["chosen on other questions"]["total"] == 24
    plan, parts, thinking = len(PLANNED.replace("\n", " \n ").split(" ")), 20, 100
    assert tokens.measured.median == pytest.approx(100 * (1 - (plan + parts) / thinking))
    assert gain.measured.median == pytest.approx(100 * (thinking / (plan + parts) - 1))
    assert tokens.quality.candidate == tokens.quality.baseline > 0.4
    assert tokens.details["saved as the paper counts, without the plan (%)"][0] == pytest.approx(80)
    assert gain.details["E3 gained as the paper counts, without the plan (%)"][0] == pytest.approx(400)
    assert tokens.details["saved over the plan without budgets (%)"][0] == 0  # which these parts do not need


def test_a_split_that_is_broken_loses(monkeypatch):
    """As many tokens, the wrong way round, and by chance."""
    real = controller.allocate
    monkeypatch.setattr(controller, "allocate", lambda *a, **k: real(*a, **k)[::-1])
    monkeypatch.setattr(room, "TOTALS", (24,))
    assert not set(verdicts()) & set(PAYS)

    splits = np.random.default_rng(0)

    def by_chance(weights, total, schedule, *, least=0):
        return splits.multinomial(total, [1 / len(weights)] * len(weights)).tolist()

    monkeypatch.setattr(controller, "allocate", by_chance)
    assert not set(verdicts()) & set(PAYS)


def test_a_random_split_in_its_place_does_not_pay(monkeypatch):
    real = arms.planner
    monkeypatch.setattr(arms, "planner", lambda kind, generator: arms.Random(real(kind, generator)))
    monkeypatch.setattr(room, "TOTALS", (24,))
    assert not set(verdicts(schedule="constant")) & set(PAYS)


def test_where_any_split_does_the_quality_is_not_shown(monkeypatch):
    """Parts that end by themselves after a few words: their budgets hold nothing back, and the row says so."""
    monkeypatch.setattr(Knowing, "needs", (2, 1))
    monkeypatch.setattr(room, "TOTALS", (10**6,))
    assert verdicts() == [Verdict.QUALITY_NOT_SHOWN] * 2


def test_where_one_cap_does_as_well_it_does_not_pay(monkeypatch):
    """An answer that stands at the beginning: a cap costs no plan."""
    monkeypatch.setattr(Knowing, "said", early(Knowing.said))
    tokens, gain = records()
    assert tokens.details["chosen on other questions"]["cap"] == 16
    assert tokens.free > tokens.measured.high
    assert judge(tokens).verdict not in PAYS
    assert judge(gain).verdict not in PAYS


def early(real):
    def said(self, prompt, number):
        found = real(self, prompt, number)
        if not found.startswith("well"):
            return found
        answer = found.rpartition(" ")[2]
        return f"{answer} dollars " + " ".join(["well"] * 98)

    return said


def test_a_model_that_does_not_overthink_refutes_both(monkeypatch):
    monkeypatch.setattr(Knowing, "long", 20)
    tokens, gain = records()
    assert tokens.measured.high < 0
    assert [judge(record).verdict for record in (tokens, gain)] == [Verdict.REFUTED] * 2


def test_a_long_plan_refutes_and_is_seen_only_where_it_is_charged(monkeypatch):
    monkeypatch.setattr(Knowing, "plan", PLANNED + " so" * 90)
    assert verdicts() == [Verdict.REFUTED] * 2
    monkeypatch.setattr(plans_module.ModelPlanner, "_said", lambda self, requests, *_: [PLANNED] * len(requests))
    assert verdicts() == [Verdict.REPRODUCED] * 2


def test_at_the_floor_nothing_is_shown(monkeypatch):
    monkeypatch.setattr(Knowing, "knows", 0.0)
    monkeypatch.setattr(Knowing, "direct", 0.0)
    tokens, gain = records()
    assert judge(tokens).verdict is Verdict.QUALITY_NOT_SHOWN
    assert gain.measured.median == 0
    assert judge(gain).verdict not in PAYS


def test_answers_at_once_that_are_as_good_are_named(monkeypatch):
    from assay.evidence.verdict import remarks

    assert not any("answers given at once" in each for each in remarks(records()[0]))
    monkeypatch.setattr(Knowing, "direct", 0.95)
    tokens, gain = records()
    assert any("answers given at once" in each for each in remarks(tokens))
    assert any("cheapest rival" in each for each in remarks(gain))


def test_accuracy_that_is_lost_does_not_pay(monkeypatch):
    """Fewer tokens alone prove nothing: parts whose answers are wrong."""
    real = Knowing.said

    def said(self, prompt, number):
        found = real(self, prompt, number)
        return re.sub(r"\d+$", "998", found) if prompt.endswith("Answer:") and chance(prompt) < 0.5 else found

    monkeypatch.setattr(Knowing, "said", said)
    assert not set(verdicts()) & set(PAYS)


def test_totals_and_caps_are_chosen_on_other_questions(monkeypatch):
    """What happens on the judged questions moves no choice."""
    before = records()[0].details["chosen on other questions"]
    real = arms.seen

    def worse(rows, said, ledgers, **details):
        found = real(rows, said, ledgers, **details)
        return replace(found, right=[0.0] * len(rows)) if rows[0].item.part == "judged" else found

    monkeypatch.setattr(arms, "seen", worse)
    after = records()[0]
    assert after.details["chosen on other questions"] == before
    assert after.quality.baseline == 0


def test_the_rules_plan_is_charged_as_if_it_had_been_written():
    tokens, _ = records(plan="rule")
    texts = [arms.rule_plan(row.text).text for row in arms.asked("judged", 8)]
    mean = np.mean([len(text.split()) for text in texts])
    method = tokens.details["arms"]["the method"]
    assert method["tokens"] - method["tokens of the answer"] == pytest.approx(mean)


def test_every_arm_is_measured_where_it_is_asked_for():
    found = records(every=True)[0].details["arms"]
    assert {"uniform split", "linear split", "cosine split", "budgets told, not enforced", "adaptive stop"} <= set(
        found
    )
    assert found["budgets told, not enforced"]["tokens of the answer"] == pytest.approx(100)
    assert found["uniform split"]["accuracy"] < found["the method"]["accuracy"]
    rule = records(plan="rule", every=True)[0].details["arms"]
    assert found["a rule's plan"] == rule["the method"]
    assert "a rule's plan" not in rule


# ------------------------------------------------------------------------------------------------------------------ the parts


def test_a_limit_is_cut_out_of_the_longest_sample():
    whole = Sample("abcdef", (1, 2, 3, 4, 5, 6), (), "stop", Spent(4, 6, calls=1, seconds=3.0))

    def decode(tokens):
        return "".join(" abcdef"[token] for token in tokens)

    cut = arms.cut(whole, Sampling(0.1, 0.9, 4), decode)
    assert cut == Sample("abcd", (1, 2, 3, 4), (), "length", Spent(4, 4, calls=1, seconds=2.0))
    assert arms.cut(whole, Sampling(0.1, 0.9, 6), decode) is whole


def test_the_choice_of_a_cap_or_a_total():
    def took(tokens, *right):
        return arms.Seen(list(right), [tokens] * 2, [tokens] * 2, [tokens] * 2, {})

    caps = {16: took(16.0, 0, 0), 48: took(48.0, 1, 0), 64: took(64.0, 1, 1), 256: took(99.0, 1, 0)}
    assert room.chosen(caps, 0.5) == 48
    assert room.chosen(caps, 0.9) == 64
    assert room.chosen({**caps, 64: caps[16]}, 0.9) == 48  # none: the most accurate one
    lost = {**caps, 256: took(99.0, 0, 0)}  # thinking to the end loses the answer that a cap keeps
    assert room.chosen(lost, lost[256].accuracy - room.MARGIN) == 64
    assert room.chosen(dict.fromkeys(caps, caps[16]), -0.05) == 256


def test_one_cap_takes_exactly_as_many_tokens():
    def cap(tokens, right):
        return arms.Seen(right, [tokens] * 2, [tokens] * 2, [tokens + 5.0] * 2, {})

    caps = {16: cap(16.0, [0.0, 0.0]), 48: cap(48.0, [1.0, 0.0]), 64: cap(60.0, [1.0, 1.0])}
    mixed = room.at_equal(caps, 24)
    assert (mixed.mean, mixed.right, mixed.every) == (24, [0.25, 0.0], [29.0, 29.0])
    assert room.at_equal(caps, 48).right == [1.0, 0.0]
    assert room.at_equal(caps, 4) is caps[16]
    assert room.at_equal(caps, 99) is caps[64]
    deleted = records()[0].details["arms"]
    assert deleted["one cap for all at as many tokens"]["tokens"] == pytest.approx(deleted["the method"]["tokens"])


def test_questions_stand_under_one_wording_each():
    for part in ("judged", "learn"):
        rows = arms.asked(part, 10)
        assert len({row.item.question for row in rows}) == len(rows) == 30
        assert {row.wording for row in rows} == {"plain", "question", "task"}
        assert {row.item.part for row in rows} == {part}
        assert arms.asked(part, 12)[:30] == rows  # whoever asks for more keeps those


@pytest.mark.parametrize(
    ("said", "answer"),
    [
        (("7 * 6 = 42 dollars", "so 44"), "44"),
        (("7 * 6 = 42 dollars", "no idea"), "42"),
        (("The answer is 42.\n\nIt is 7 times 6",), "42"),
        (("1. First 7 * 6 is 42\n2. ",), "42"),
        (("",), ""),
    ],
)
def test_the_last_part_that_gives_an_answer_counts(said, answer):
    (item,) = items("story", level=1, n=1, part="pilot")
    assert arms.answered(item, said) == answer


def test_the_rules_plan_follows_the_words_of_a_question():
    plan = arms.rule_plan("Question: Ann buys 3 pens for 2 dollars each. How many dollars does Ann pay?")
    assert plan == Plan(("What do the 3 pens cost?", "How many dollars does Ann pay?"), (80, 20), 1)
    assert arms.rule_plan("What is 2 + 3?").parts == ("What is 2 + 3?",)


def test_stopping_looks_for_an_answer_or_for_a_number_that_stays():
    row = arms.asked("judged", 1)[0]

    def says(text):
        class Says(Knowing):
            def said(self, prompt, number):
                return text

        return Says()

    stated = arms.stopping(says("The answer is 5 dollars " + "well " * 90), [row])
    assert stated.tokens == [16]
    stays = arms.stopping(says("5 " + "well " * 90), [row])
    assert stays.tokens == [24]
    never = arms.stopping(says("well " * 400), [row])
    assert never.tokens == [arms.LIMIT]


def test_random_credits_are_random_and_the_plan_stays():
    questions = ["a", "b", "c"]
    made = arms.Random(plans_module.RulePlanner(lambda question: Plan(("x", "y")), lambda texts: [1] * len(texts)))
    found = made(questions, [Budget() for _ in questions])
    assert len({plan.credits for plan in found}) == 3
    assert all(plan.parts == ("x", "y") and sum(plan.credits) == pytest.approx(1) for plan in found)


def test_the_deciding_points_are_named():
    found = experiments_of("plan_and_budget")
    assert {one.claim for one in found} == set(CLAIMS)
    for one in found:
        assert {point["plan"] for point in one.points["small"]} == {"model", "rule"}
        assert one.decides["small"]["plan"] == one.paper["plan"] == "model"
        assert one.decides["small"]["schedule"] == "polynomial"
