"""Plan and Budget: the split among parts, the budget model, plans, the controller over any generator, caps inside `generate`."""

import itertools
import math
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.tiny import write_tiny_llama
from transformers import AutoTokenizer, LlamaForCausalLM, LogitsProcessorList

from assay.methods.core.reasoning.budget import Budget, Spent
from assay.methods.core.reasoning.generator import Sample, Sampling, TransformersGenerator
from assay.methods.reasoning.plan_and_budget import (
    LEVEL_TOKENS,
    SCHEDULES,
    ModelPlanner,
    PartCaps,
    Plan,
    PlanAndBudget,
    RulePlanner,
    Uncertainty,
    allocate,
    bam_allocate,
    decay,
    e3,
    fit_uncertainty,
    parse_assessment,
    parse_plan,
    part_sampling,
    prompt_tokens,
    request,
)

WEIGHTS = st.lists(st.floats(0, 1e6), min_size=1, max_size=12).filter(any)

# -------------------------------------------------------------------------------------------------------------------- split


@given(WEIGHTS, st.integers(0, 10**20), st.sampled_from(SCHEDULES))
def test_a_split_sums_to_the_total_and_owes_nobody(weights, total, schedule):
    found = allocate(weights, total, schedule)
    assert sum(found) == total
    assert min(found) >= 0
    assert len(found) == len(weights)
    if len(weights) == 1:
        assert found == [total]


@given(
    st.lists(st.integers(0, 100), min_size=1, max_size=8).filter(any), st.integers(0, 4000), st.sampled_from(SCHEDULES)
)
def test_scaling_the_weights_changes_nothing(weights, total, schedule):
    assert allocate([12 * weight for weight in weights], total, schedule) == allocate(weights, total, schedule)


@given(st.integers(1, 12), st.integers(0, 10**6))
def test_equal_weights_and_no_decay_are_the_uniform_split(n, total):
    found = allocate([20] * n, total)
    assert max(found) - min(found) <= 1
    assert found == sorted(found, reverse=True)  # what is left over goes to the earlier ones


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_schedules_never_grow_with_the_place(schedule):
    for n in range(1, 15):
        weights = decay(schedule, n)
        assert all(a >= b > 0 for a, b in itertools.pairwise(weights)) or n == 1
        assert allocate([1] * n, 997, schedule) == sorted(allocate([1] * n, 997, schedule), reverse=True)
    falls = decay(schedule, 6)[0] > decay(schedule, 6)[5]
    assert falls == (schedule != "constant")


def test_schedules_are_the_papers():
    assert decay("constant", 3) == [1, 1, 1]
    assert decay("linear", 4) == [4, 3, 2, 1]
    assert decay("polynomial", 4) == [16, 9, 4, 1]
    assert decay("exponential", 3) == pytest.approx([1, 0.9, 0.81])
    assert decay("cosine", 5) == pytest.approx([1.1, 0.6 + math.sqrt(0.125), 0.6, 0.6 - math.sqrt(0.125), 0.1])
    assert decay("cosine", 1) == [1]
    assert LEVEL_TOKENS == {1: 200, 2: 250, 3: 350, 4: 450, 5: 600}


def test_what_is_left_goes_to_the_largest_shares_not_the_largest_remainders():
    assert allocate([50, 26, 24], 10) == [6, 2, 2]  # remainders would give 5, 3, 2
    assert allocate([0.3, 0.3, 0.4], 10) == [3, 3, 4]
    assert allocate([30, 70], 100, "linear") == [46, 54]  # 60 to 70


def test_every_part_may_have_a_least_budget():
    assert allocate([1] * 5, 20, "polynomial")[4] == 0
    found = allocate([1] * 5, 20, "polynomial", least=3)
    assert (min(found), sum(found)) == (3, 20)
    assert allocate([1, 1], 6, least=3) == [3, 3]
    with pytest.raises(ValueError, match="total must be at least 3 for each of 2 parts, got 5"):
        allocate([1, 1], 5, least=3)


@pytest.mark.parametrize(
    ("weights", "total", "schedule", "names"),
    [
        ([], 5, "linear", "weights"),
        ([0, 0], 5, "linear", "weights"),
        ([1, -1], 5, "linear", "weights"),
        ([math.nan], 5, "linear", "weights"),
        ([1], -1, "linear", "total"),
        ([1], 5, "steep", "schedule"),
    ],
)
def test_a_split_of_what_cannot_be_split_is_refused(weights, total, schedule, names):
    with pytest.raises(ValueError, match=names):
        allocate(weights, total, schedule)
    with pytest.raises(TypeError, match="total"):
        allocate([1], 5.5)


# -------------------------------------------------------------------------------------------------------------- budget model

PARTS = st.lists(
    st.builds(Uncertainty, st.floats(0.01, 100), st.floats(0.05, 4), st.floats(0, 5)), min_size=1, max_size=6
)


def left(parts, split):
    return sum(part(tokens) for part, tokens in zip(parts, split, strict=True))


@given(PARTS, st.floats(1, 1e4))
def test_the_best_split_meets_the_lagrange_condition_and_beats_the_uniform_one(parts, total):
    split = bam_allocate(parts, total)
    assert split.sum() == pytest.approx(total)
    gains = [part.c * part.beta * b ** -(part.beta + 1) for part, b in zip(parts, split, strict=True)]
    assert max(gains) == pytest.approx(min(gains), rel=1e-6)
    assert left(parts, split) <= left(parts, [total / len(parts)] * len(parts)) * (1 + 1e-12)


@pytest.mark.parametrize("seed", range(4))
def test_no_split_of_whole_tokens_leaves_less(seed):
    """All of them, tried."""
    chance = np.random.default_rng(seed)
    parts = [Uncertainty(*chance.uniform(0.2, 3, 2), chance.uniform()) for _ in range(3)]
    split, total = bam_allocate(parts, 40), 40
    tried = {(i, j): left(parts, (i, j, total - i - j)) for i in range(1, total - 1) for j in range(1, total - i)}
    best = min(tried, key=tried.get)
    assert left(parts, split) <= tried[best]
    assert left(parts, split) == pytest.approx(tried[best], rel=0.01)
    assert np.abs(split[:2] - best).max() <= 1.5


def test_the_best_split_has_a_closed_form_where_beta_is_common():
    beta, total = 0.7, 90.0
    parts = [Uncertainty(c, beta) for c in (1.0, 2.0, 5.0)]
    split = bam_allocate(parts, total)
    wanted = np.array([1.0, 2.0, 5.0]) ** (1 / (beta + 1))
    assert split == pytest.approx(total * wanted / wanted.sum())
    almost = [Uncertainty(part.c, beta + 1e-9 * i) for i, part in enumerate(parts)]  # the same by bisection
    assert bam_allocate(almost, total) == pytest.approx(split, rel=1e-6)
    assert split[1] / split[0] == pytest.approx(2 ** (1 / (beta + 1)))
    assert bam_allocate([Uncertainty(3, 2)] * 4, 8.0) == pytest.approx([2, 2, 2, 2])
    moved = [Uncertainty(part.c, part.beta, a) for part, a in zip(parts, (0, 5, 9), strict=True)]
    assert (bam_allocate(moved, total) == split).all()


def test_extremes_of_the_budget_model_are_finite():
    for parts in ([Uncertainty(1e-200, 3), Uncertainty(1e200, 0.01)], [Uncertainty(1, 50), Uncertainty(1, 0.001)]):
        split = bam_allocate(parts, 100)
        assert np.isfinite(split).all()
        assert split.sum() == pytest.approx(100)


def test_measured_uncertainty_is_fitted_and_split_better_than_evenly():
    """A real anytime estimator: the error of Monte Carlo means of different spread. Fitted on one half, judged on the other."""
    chance = np.random.default_rng(0)
    sizes = np.array([2, 4, 8, 16, 32, 64, 128])

    def error(spread, n, seeds):
        return np.abs(chance.normal(0, spread, (seeds, int(n))).mean(1)).mean()

    spreads = (0.2, 1.0, 6.0)
    fitted = [fit_uncertainty(sizes, [error(s, n, 1000) for n in sizes]) for s in spreads]
    assert [part.beta for part in fitted] == pytest.approx([0.5] * 3, abs=0.12)
    whole = [max(n, 1) for n in allocate(bam_allocate(fitted, 120), 120)]
    uneven = sum(error(s, n, 4000) for s, n in zip(spreads, whole, strict=True))
    even = sum(error(s, 40, 4000) for s in spreads)
    assert uneven < 0.93 * even
    assert whole[2] > 2 * whole[0]


def test_what_is_no_uncertainty_is_refused():
    with pytest.raises(ValueError, match="values must fall"):
        fit_uncertainty([1, 2, 4], [1, 2, 3])
    with pytest.raises(ValueError, match="values must be as many as tokens and at least 3, got 2"):
        fit_uncertainty([1, 2], [2, 1])
    with pytest.raises(ValueError, match="tokens must differ"):
        fit_uncertainty([2, 2, 2], [2, 1, 1])
    for wrong in ({"c": 0, "beta": 1}, {"c": 1, "beta": 0}, {"c": 1, "beta": 1, "a": -1}, {"c": math.nan, "beta": 1}):
        with pytest.raises(ValueError, match="must be"):
            Uncertainty(**wrong)
    with pytest.raises(ValueError, match="parts"):
        bam_allocate([], 5)
    with pytest.raises(ValueError, match="total"):
        bam_allocate([Uncertainty(1, 1)], 0)


def test_e3_counts_accuracy_twice():
    assert e3(50, 400) == 6.25
    assert e3(50, 800) == e3(50, 400) / 2
    assert e3(100, 400) == 4 * e3(50, 400)
    for wrong in ((101, 5), (-1, 5), (50, 0)):
        with pytest.raises(ValueError, match="must be"):
            e3(*wrong)


# ------------------------------------------------------------------------------------------------------------------- plans


def test_plans_are_read_as_they_are_written():
    text = (
        "Sure.\n\n1. What do they cost,\nall of them?\nHint: multiply\n\n2. And the cup?\n  Hint: add\n3. No hint here"
    )
    plan = parse_plan(text)
    assert plan.parts == ("What do they cost,\nall of them?", "And the cup?")
    assert plan.hints == ("multiply", "add")
    assert plan.credits == (1, 1)
    assert parse_plan(text, hints=False).parts == ("What do they cost,", "And the cup?", "No hint here")
    assert parse_plan("It costs 3.50 in all").parts == ("Directly solve the problem.",)
    assert parse_plan("").level == 5
    assert plan.text.splitlines()[-1] == "2. And the cup? Hint: add"


@pytest.mark.parametrize("text", ["", "1.", "1. \n2. \nHint:", "Hint: x\nHint: y", "\n" * 50, "1. " * 400])
def test_no_text_of_a_model_breaks_the_plan(text):
    for hints in (True, False):
        assert len(parse_plan(text, hints=hints).parts) >= 1


def test_assessments_are_read_with_prose_around_them_and_fall_back():
    good = 'Here: {"problem": {"level": 3}, "1": {"level": 1, "credit": 20}, "2": {"credit": 90.5}} Hope it helps {'
    assert parse_assessment(good, 2) == (3, (20, 90.5))
    assert parse_assessment(good, 3) == (3, (1, 1, 1))  # one has no credit: all are equal
    for said in ("{]", "[]", "{" * 5000, '{"problem": 3}', '{"problem": {"level": 9}}', '{"problem": {"level": true}}'):
        assert parse_assessment(said, 2) == (5, (1, 1))
    assert parse_assessment('{"1": {"credit": 0}, "2": {"credit": 0}}', 2)[1] == (1, 1)
    assert parse_assessment('{"1": {"credit": NaN}, "2": {"credit": 5}}', 2)[1] == (1, 1)
    assert parse_assessment('{"1": {"credit": -4}, "2": {"credit": 5}}', 2)[1] == (1, 1)


def test_what_is_no_plan_is_refused():
    for wrong in (
        {"parts": ()},
        {"parts": (" ",)},
        {"parts": ("a", "b"), "credits": (1,)},
        {"parts": ("a",), "level": 6},
    ):
        with pytest.raises(ValueError, match="must be"):
            Plan(**wrong)
    with pytest.raises(ValueError, match="credits must not all be 0"):
        Plan(("a", "b"), (0, 0))
    with pytest.raises(ValueError, match="hints must be as many as parts, 1, got 2"):
        Plan(("a",), hints=("b", "c"))
    with pytest.raises(TypeError, match="text must be text"):
        parse_plan(None)


# -------------------------------------------------------------------------------------------------------------- controller


class Writer:
    """Writes what `says` gives of a prompt, a word a token, and keeps to limits and stop texts."""

    name = "writer"

    def __init__(self, says):
        self.says, self.asked = says, []

    def __call__(self, prompts, sampling, *, n=1, first=0, seed=0):
        return [[self.one(prompt, sampling)] for prompt in prompts]

    def one(self, prompt, sampling):
        self.asked.append((prompt, sampling))
        text = self.says(prompt)
        met = [(text.index(stop), stop) for stop in sampling.stop if stop in text]
        text = text[: min(met)[0]] if met else text
        words = text.split(" ")
        kept = words[: sampling.max_new_tokens]
        ended = "stop" if len(kept) == len(words) else "length"
        spent = Spent(len(prompt.split()), len(kept), calls=1)
        return Sample(" ".join(kept), (0,) * len(kept), (), ended, spent)


def words(texts):
    return [len(text.split()) for text in texts]


PLAN = Plan(("Price?", "In all?"), (50, 50), 1)
RULE = RulePlanner(lambda question: PLAN, words)


def test_budgets_are_enforced_part_by_part():
    writer = Writer(lambda prompt: "so it is and goes on and on for long")
    solver = PlanAndBudget(writer, RULE, lambda text: f"[{text}]", totals={1: 10}, schedule="constant")
    (solved,) = solver.solve(["What?"])
    assert solved.allotted == (5, 5)
    assert solved.used == (5, 5)
    assert solved.said == ("so it is and goes",) * 2
    assert solved.text == "1. Price?\nAnswer:so it is and goes\n\n2. In all?\nAnswer:so it is and goes"
    first, second = writer.asked
    assert first[0] == f"[{request('What?')}]1. Price?\nAnswer:"
    assert second[0] == f"[{request('What?')}]{solved.text[: solved.text.rindex('so it')]}"
    assert [sampling.max_new_tokens for _, sampling in writer.asked] == [5, 5]
    assert "Price?" not in request("What?")


def test_what_a_part_leaves_is_not_given_to_the_next_and_an_end_ends_only_its_part():
    said = iter(["short<end> more", "one two three four five six seven eight nine"])
    solver = PlanAndBudget(
        Writer(lambda prompt: next(said)), RULE, str, totals={1: 10}, sampling=Sampling(0.1, 0.9, 99, ("<end>",))
    )
    (solved,) = solver.solve(["What?"])
    assert solved.allotted == (8, 2)
    assert solved.used == (1, 2)
    assert solved.said == ("short", "one two")


def test_a_part_without_a_token_is_not_written():
    writer = Writer(lambda prompt: "a b c")
    (solved,) = PlanAndBudget(writer, RULE, str, totals={1: 1}).solve(["What?"])
    assert solved.allotted == (1, 0)
    assert solved.used == (1, 0)
    assert len(writer.asked) == 1
    assert solved.text.endswith("2. In all?\nAnswer:")


def test_told_budgets_stand_in_the_prompt_and_hold_nobody():
    writer = Writer(lambda prompt: "w " * 500 + "end")
    (solved,) = PlanAndBudget(writer, RULE, str, totals={1: 100}, mode="told").solve(["What?"])
    ((prompt, sampling),) = writer.asked
    assert "1. Price? Think only a little about it, and use up to 80 words." in prompt
    assert "2. In all? Think only a little about it, and use up to 20 words." in prompt
    assert sampling == Sampling(0.1, 0.9, 8192)
    assert (solved.used, len(solved.said)) == ((), 1)
    assert solved.budget.spent("solve").completion == 501
    both = Writer(lambda prompt: "w " * 500 + "end")
    (solved,) = PlanAndBudget(both, RULE, str, totals={1: 100}, mode="both").solve(["What?"])
    assert "use up to 80 words" in both.asked[0][0]
    assert solved.used == (80, 20)


def test_every_token_is_booked_the_plan_of_a_rule_too():
    (solved,) = PlanAndBudget(Writer(lambda prompt: "a b c"), RULE, str, totals={1: 100}).solve(["What?"])
    assert PLAN.text.split() == ["1.", "Price?", "2.", "In", "all?"]
    assert solved.budget.spent("plan") == Spent(completion=5)
    assert solved.budget.spent("solve").completion == 6
    assert solved.budget.spent("solve").calls == 2


def test_one_part_with_the_whole_total_is_one_cap_for_all():
    """The degenerate setting: no plan, so that what is written is a capped answer behind the opening."""
    one = RulePlanner(lambda question: Plan(("Solve it.",), level=1), words)
    for schedule in SCHEDULES:
        writer = Writer(lambda prompt: "w " * 50)
        (solved,) = PlanAndBudget(writer, one, str, totals={1: 30}, schedule=schedule).solve(["What?"])
        assert solved.used == (30,)
        assert writer.asked[0][1].max_new_tokens == 30


def test_a_uniform_split_is_constant_and_unweighted():
    plan = Plan(("a", "b"), (90, 10), 1)
    solver = PlanAndBudget(Writer(str), RULE, str, totals={1: 40}, schedule="constant", weighted=False)
    assert solver.allot(plan) == [20, 20]
    assert PlanAndBudget(Writer(str), RULE, str, schedule="constant").allot(plan) == [180, 20]
    with pytest.raises(ValueError, match=r"totals must know level 1, got \[2\]"):
        PlanAndBudget(Writer(str), RULE, str, totals={2: 40}).allot(plan)
    with pytest.raises(ValueError, match="mode"):
        PlanAndBudget(Writer(str), RULE, str, mode="asked")
    with pytest.raises(ValueError, match="budgets must be as many as questions, 1, got 2"):
        solver.solve(["What?"], budgets=[Budget(), Budget()])
    assert solver.solve([]) == []


def test_a_model_plans_and_assesses_and_both_are_booked():
    def says(prompt):
        if "JSON" in prompt:
            assert "Level 1: easy one" in prompt
            assert "1. Price? Hint: multiply" in prompt
            return '{"problem": {"level": 2}, "1": {"credit": 30}, "2": {"credit": 10}}'
        if "Split" in prompt:
            return "1. Price?\nHint: multiply\n2. In all?\nHint: add"
        return "a b c"

    writer = Writer(says)
    planner = ModelPlanner(writer, lambda text: f"<{text}>", known=((1, "easy one"),))
    (solved,) = PlanAndBudget(writer, planner, str, schedule="constant").solve(["What?"])
    assert solved.plan == Plan(("Price?", "In all?"), (30, 10), 2, ("multiply", "add"))
    assert sum(solved.allotted) == LEVEL_TOKENS[2]
    assert solved.allotted[0] == pytest.approx(3 * solved.allotted[1], abs=2)
    booked = Counter(entry.purpose for entry in solved.budget.entries)
    assert booked == {"plan": 2, "solve": 2}
    assert solved.budget.spent("plan").completion > 8
    unjudged = ModelPlanner(writer, str, assess=False, level=3)(["What?"], [Budget()])
    assert unjudged == [Plan(("Price?", "In all?"), level=3, hints=("multiply", "add"))]
    assert planner([], []) == []


def test_questions_of_different_plans_are_answered_as_if_alone():
    plans = {"a": Plan(("x",), level=1), "b": Plan(("x", "y", "z"), level=1), "c": Plan(("x", "y"), (1, 9), 1)}
    rule = RulePlanner(plans.__getitem__, words)

    def solver():
        return PlanAndBudget(Writer(lambda prompt: f"{len(prompt)} " * 30), rule, str, totals={1: 12})

    together = solver().solve(["a", "b", "c"])
    for solved in together:
        (alone,) = solver().solve([solved.question])
        assert (alone.text, alone.used, alone.said) == (solved.text, solved.used, solved.said)
        assert alone.budget.entries == solved.budget.entries


# ------------------------------------------------------------------------------------------------------------- a real model


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = write_tiny_llama(tmp_path_factory.mktemp("plans") / "tiny", context=256)
    model, tokenizer = LlamaForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    model.generation_config.eos_token_id = 2
    return model, tokenizer


def test_a_model_of_transformers_keeps_to_its_budgets(tiny):
    model, tokenizer = tiny
    generator = TransformersGenerator(model, tokenizer, name="tiny")
    assert prompt_tokens(generator)(["one two", "three"]) == [
        len(tokenizer(text)["input_ids"]) for text in ("one two", "three")
    ]
    rule = RulePlanner(lambda question: PLAN, prompt_tokens(generator))
    for schedule in ("constant", "polynomial"):
        solver = PlanAndBudget(generator, rule, str, totals={1: 10}, schedule=schedule)
        for solved in solver.solve(["one two", "three"]):
            assert all(took <= given for took, given in zip(solved.used, solved.allotted, strict=True))
            assert sum(solved.used) == solved.budget.spent("solve").completion
            assert solved.budget.spent("plan").completion == len(tokenizer(PLAN.text)["input_ids"])


def test_caps_inside_generate_do_what_completions_of_each_part_do(tiny):
    """Greedy, in one batch padded on the left: the same tokens as when every part is a completion of its own."""
    model, _ = tiny
    prompts, allotted = [[5, 6, 7, 8], [9]], [[4, 3], [2, 6]]
    openings = [[[11, 12], [13]], [[11], [13, 14, 15]]]
    wanted, used = [], []
    for prompt, limits, opens in zip(prompts, allotted, openings, strict=True):
        ids, took = list(prompt), []
        for part, (limit, opening) in enumerate(zip(limits, opens, strict=True)):
            ids += opening
            took.append(0)
            while took[-1] < limit:
                with torch.no_grad():
                    logits = model(torch.tensor([ids])).logits[0, -1]
                if part + 1 < len(limits):
                    onward = opens[part + 1][0]
                    logits[onward] = torch.logaddexp(logits[onward], logits[2])
                    logits[2] = -torch.inf
                    if int(logits.argmax()) == onward:
                        break
                ids.append(int(logits.argmax()))
                took[-1] += 1
                if ids[-1] == 2:
                    break
        wanted.append(ids[len(prompt) :] + [2] * (ids[-1] != 2))
        used.append(took)
    batch = torch.tensor([[5, 6, 7, 8], [0, 0, 0, 9]])
    mask = torch.tensor([[1, 1, 1, 1], [0, 0, 0, 1]])
    caps = PartCaps(allotted, openings, end=2)
    out = model.generate(
        batch, attention_mask=mask, max_new_tokens=40, do_sample=False, pad_token_id=0, eos_token_id=2,
        logits_processor=LogitsProcessorList([caps]),
    )  # fmt: skip
    found = [row[: row.index(2) + 1] for row in out[:, 4:].tolist()]
    assert found == wanted
    assert caps.used == used
    assert max(map(sum, used)) > 3


def run(caps, logits, steps):
    ids = torch.zeros(len(logits), 1, dtype=torch.long)
    for _ in range(steps):
        ids = torch.cat([ids, caps(ids, torch.tensor(logits)).argmax(-1, keepdim=True)], 1)
    return ids[:, 1:].tolist()


def test_caps_end_a_part_at_its_tokens_at_an_end_and_never_before_the_last_part():
    assert run(PartCaps([[2, 1]], [[[4], [5]]], end=0), [[0.0, 9, 0, 0, 0, 0]], 6) == [[4, 1, 1, 5, 1, 0]]
    assert run(PartCaps([[3, 0]], [[[4], [5]]], end=0, ends=[1]), [[0.0, 9, 0, 0, 0, 0]], 4) == [[4, 1, 5, 0]]
    early = PartCaps(
        [[3, 3]], [[[4], [5, 3]]], end=0
    )  # the model would end at once: it goes on, and ends in the last part
    assert run(early, [[9.0, 0, 0, 0, 0, 0]], 4) == [[4, 5, 3, 0]]
    assert early.used == [[0, 0]]
    assert run(PartCaps([[0, 0, 2]], [[[4], [5], [3]]], end=0), [[0.0, 9, 0, 0, 0, 0]], 6) == [[4, 5, 3, 1, 1, 0]]


def test_an_end_before_the_last_part_lends_its_share_to_going_on():
    caps = PartCaps([[3, 3]], [[[4], [5]]], end=0)
    ids = torch.tensor([[7]])
    caps(ids, torch.zeros(1, 8))
    shares = caps(torch.tensor([[7, 4]]), torch.zeros(1, 8)).softmax(-1)[0]
    assert shares.tolist() == pytest.approx([0, *[1 / 8] * 4, 2 / 8, *[1 / 8] * 2])


def test_caps_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="openings"):
        PartCaps([[1, 2]], [[[4]]], end=0)
    with pytest.raises(ValueError, match="at least one token a part"):
        PartCaps([[1]], [[[]]], end=0)
    with pytest.raises(ValueError, match="allotted"):
        PartCaps([[-1]], [[[4]]], end=0)
    with pytest.raises(ValueError, match="input_ids must have 1 rows, got 2"):
        PartCaps([[1]], [[[4]]], end=0)(torch.zeros(2, 1, dtype=torch.long), torch.zeros(2, 5))


def test_stop_texts_of_a_part():
    sampling = part_sampling(Sampling(0.1, 0.9, 99, ("<end>", "\n\n")), 0, 7)
    assert sampling == Sampling(0.1, 0.9, 7, ("\n\n", "\n2.", "<end>"))
