"""ENAMEL: the estimator against all subsets, the scores at their borders, and a measurement with workers whose clock is ours."""

import itertools
import math
from fractions import Fraction
from types import SimpleNamespace

import numpy as np
import pytest

from assay.methods.code import enamel
from assay.methods.code.enamel import (
    PAPER,
    References,
    Settings,
    eff_at_k,
    evaluate,
    level_score,
    over_tasks,
    rank_weights,
    references,
    sample_score,
)
from assay.methods.core.programs.estimates import hodges_lehmann, pass_at_k
from assay.methods.core.programs.runs import CUT
from assay.methods.core.programs.workers import Outcome

ONE_EACH = Settings(cases=(1, 1, 1, 1), repeats=1)
FOUND = References((None, 1.0, 2.0, 4.0), 8.0)

# ------------------------------------------------------------------------------------------------------------------ the estimator


@pytest.mark.parametrize("n", range(1, 8))
def test_the_estimate_is_the_mean_of_all_subsets_maxima(n):
    scores = np.random.default_rng(n).random(n) * 1.3
    for k in range(1, n + 1):
        maxima = [max(subset) for subset in itertools.combinations(scores, k)]
        assert eff_at_k(scores, k) == pytest.approx(sum(maxima) / len(maxima))


def test_one_sample_is_the_mean_all_samples_the_maximum_and_more_are_never_worse():
    scores = np.random.default_rng(0).random(30)
    by_k = [eff_at_k(scores, k) for k in range(1, 31)]
    assert by_k[0] == pytest.approx(scores.mean())
    assert by_k[-1] == scores.max()
    assert all(a < b for a, b in itertools.pairwise(by_k))
    assert eff_at_k([0.4] * 5, 3) == pytest.approx(0.4)


@pytest.mark.parametrize(("n", "k"), [(1, 1), (5, 1), (5, 2), (5, 5), (200, 100), (1000, 1), (1000, 500), (1000, 999)])
def test_weights_are_positive_rise_and_sum_to_one(n, k):
    weights = rank_weights(n, k)
    assert weights.shape == (n - k + 1,)
    assert (weights > 0).all()
    assert (np.diff(weights) >= 0).all()
    assert math.fsum(weights) == pytest.approx(1, rel=1e-12)
    assert weights[-1] == pytest.approx(k / n)


@pytest.mark.parametrize(("n", "k"), [(1000, 500), (2000, 1000)])  # of the latter, the binomials are beyond every float
def test_large_numbers_of_samples_neither_overflow_nor_lose_digits(n, k):
    scores = np.sort(np.random.default_rng(1).random(n))
    exact = sum(Fraction(math.comb(r - 1, k - 1), math.comb(n, k)) * Fraction(scores[r - 1]) for r in range(k, n + 1))
    assert eff_at_k(scores, k) == pytest.approx(float(exact), rel=1e-12)


def test_order_does_not_matter_and_leading_axes_stay():
    scores = np.random.default_rng(2).random((3, 4, 9))
    turned = np.random.default_rng(3).permuted(scores, axis=-1)
    assert eff_at_k(turned, 4) == pytest.approx(eff_at_k(scores, 4))
    assert eff_at_k(scores, 4).shape == (3, 4)
    assert eff_at_k(scores, 4)[2, 1] == pytest.approx(eff_at_k(scores[2, 1], 4))


@pytest.mark.parametrize(("n", "c"), [(10, 0), (10, 1), (10, 4), (10, 10), (37, 5)])
def test_scores_of_nothing_or_one_give_pass_at_k(n, c):
    for k in range(1, n + 1):
        assert eff_at_k([1.0] * c + [0.0] * (n - c), k) == pytest.approx(pass_at_k(n, c, k), abs=1e-12)


@pytest.mark.parametrize("law", ["uniform", "beta", "mostly nothing"])
@pytest.mark.parametrize(("n", "k"), [(5, 2), (8, 1), (8, 6), (20, 10)])
def test_the_variance_is_within_the_bound(law, n, k):
    chance = np.random.default_rng(4)
    drawn = {
        "uniform": lambda: chance.random((20000, n)),
        "beta": lambda: chance.beta(0.5, 2, (20000, n)),
        "mostly nothing": lambda: chance.random((20000, n)) * (chance.random((20000, n)) < 0.2),
    }[law]()
    single = drawn[:, :k].max(axis=1)
    estimates = eff_at_k(drawn, k)
    assert estimates.mean() == pytest.approx(single.mean(), abs=0.01)
    ratio = estimates.var() / single.var()
    assert ratio <= k / n * 1.04
    if law == "uniform" and (n, k) == (5, 2):
        assert ratio == pytest.approx(0.34, abs=0.02)


@pytest.mark.parametrize("k", [0, -1, 4, 1.0, True])
def test_a_k_that_does_not_fit_is_refused(k):
    with pytest.raises((ValueError, TypeError), match="k must be"):
        eff_at_k([0.1, 0.2, 0.3], k)


@pytest.mark.parametrize("scores", [[], 0.5, [0.1, -0.1], [0.1, float("nan")], [float("inf")]])
def test_scores_that_are_none_are_refused(scores):
    with pytest.raises(ValueError, match="scores must"):
        eff_at_k(scores, 1)


def test_tasks_count_once_however_many_samples_they_have():
    found = over_tasks({"a": [1.0, 1.0, 1.0, 1.0], "b": [0.0, 0.5]}, 2)
    assert found.value == pytest.approx((1 + 0.5) / 2)
    assert (found.tasks, found.samples, found.k) == (2, 2, 2)
    assert found.low <= found.value <= found.high
    alone = over_tasks({"a": [0.5]}, 1)
    assert (alone.value, alone.low, alone.high) == (0.5, -math.inf, math.inf)


def test_a_task_with_too_few_samples_is_named_not_left_out():
    with pytest.raises(ValueError, match="k must be at most the number of samples, 2 for b, got 3"):
        over_tasks({"a": [1.0] * 3, "b": [1.0] * 2}, 3)
    with pytest.raises(ValueError, match="one task or more"):
        over_tasks({}, 1)


# --------------------------------------------------------------------------------------------------------------------- the scores


def test_a_level_scores_one_at_the_reference_and_nothing_from_the_time_out_on():
    assert level_score(3.0, 3.0, 8.0) == 1
    assert level_score(8.0, 3.0, 8.0) == 0
    assert level_score(1e9, 3.0, 8.0) == 0
    assert level_score(7.999999, 3.0, 8.0) == pytest.approx(0, abs=1e-6)
    costs = np.linspace(0, 8, 100)
    scores = [level_score(cost, 3.0, 8.0) for cost in costs]
    assert np.diff(scores) == pytest.approx(-8 / 99 / 5)  # it falls evenly, without a step
    assert scores[0] == pytest.approx(1.6)
    assert level_score(0.0, 3.0, 8.0, clip=True) == 1
    assert level_score(5.0, 3.0, 8.0, clip=True) == level_score(5.0, 3.0, 8.0)


@pytest.mark.parametrize(("cost", "reference", "time_out"), [(-1, 1, 2), (1, 2, 2), (1, 0, 2), (float("nan"), 1, 2)])
def test_costs_that_are_none_are_refused(cost, reference, time_out):
    with pytest.raises(ValueError, match="must be"):
        level_score(cost, reference, time_out)


def test_scores_do_not_know_the_unit():
    run = [[[0.5]], [[1.5]], [[2.5]], [[6.0]]]
    scaled = [[[1e6 * t for t in case] for case in level] for level in run]
    million = References((None, 1e6, 2e6, 4e6), 8e6)
    assert sample_score(scaled, million, ONE_EACH).value == pytest.approx(sample_score(run, FOUND, ONE_EACH).value)


def test_references_are_the_dearest_case_of_each_level_and_the_time_out_follows():
    steady = [[[0.1]], [[1.0] * 6, [1.5] * 6], [[2.0, 2.0, 2.2, 2.2, 2.1, 99.0]], [[3.0], [4.0], [1.0]]]
    found = references(steady)
    assert found.levels[0] is None
    assert found.levels[1:] == pytest.approx((1.5, hodges_lehmann(steady[2][0]), 4.0))
    assert found.time_out == 8.0
    assert references(steady, Settings(alpha=3.5)).time_out == 14.0
    falling = references([[], [[5.0]], [[1.0]], [[1.0]]])
    assert falling.time_out == 10.0  # of the dearest level, whichever it is


@pytest.mark.parametrize(
    ("costs", "what"),
    [
        ([[], [[1.0]], [[1.0]]], "costs must have 4 levels"),
        ([[], [], [[1.0]], [[1.0]]], "one case or more on level 1"),
        ([[], [[0.0]], [[1.0]], [[1.0]]], "above 0 on level 1"),
        ([[], [[1.0]], [[]], [[1.0]]], "finite numbers"),
    ],
)
def test_a_calibration_that_lacks_something_is_refused(costs, what):
    with pytest.raises(ValueError, match=what):
        references(costs)


def test_the_reference_itself_scores_one():
    run = [[[0.1]], [[1.0]], [[2.0]], [[4.0]]]
    found = references(run, ONE_EACH)
    score = sample_score(run, found, ONE_EACH)
    assert (score.value, score.levels, score.right, score.ended) == (1.0, (0.0, 1.0, 1.0, 1.0), True, "")


def test_levels_count_by_their_hardness_and_cases_by_the_dearest():
    run = [[[0.1]], [[1.0]], [[5.0]], [[8.0]]]
    assert sample_score(run, FOUND, ONE_EACH).value == pytest.approx((3 * 1 + 3 * 0.5 + 4 * 0) / 10)
    two = Settings(cases=(1, 2, 1, 1), repeats=1)
    dearer = [[[0.1]], [[1.0], [4.5]], [[5.0]], [[8.0]]]
    assert sample_score(dearer, FOUND, two).levels[1] == pytest.approx(0.5)
    other = Settings(cases=(1, 1, 1, 1), hardness=(0, 1, 1, 0), repeats=1)
    assert sample_score(run, FOUND, other).value == pytest.approx((1 + 0.5) / 2)


def test_faster_than_the_reference_is_above_one_unless_clipped():
    run = [[[0.1]], [[0.5]], [[1.0]], [[2.0]]]
    assert sample_score(run, FOUND, ONE_EACH).value > 1
    clipped = Settings(cases=(1, 1, 1, 1), repeats=1, clip=True)
    assert sample_score(run, FOUND, clipped).value == 1


@pytest.mark.parametrize("level", [1, 2, 3])
def test_a_cut_ends_its_level_and_the_later_ones_but_keeps_the_earlier(level):
    run = [[[0.1]], [[1.0]], [[2.0]], [[4.0]]]
    cut = [*run[:level], ["time"]]
    score = sample_score(cut, FOUND, ONE_EACH)
    assert score.levels[:level] == sample_score(run, FOUND, ONE_EACH).levels[:level]
    assert score.levels[level:] == (0.0,) * (4 - level)
    assert score.right
    assert score.ended == f"cut on level {level}"
    assert all(sample_score([*run[:level], [end]], FOUND, ONE_EACH) == score for end in CUT)
    later = [*cut, *run[level + 1 :]]  # what somebody ran all the same is not looked at
    assert sample_score(later, FOUND, ONE_EACH) == score
    dear = [*run[:level], [[8.02]], *run[level + 1 :]]
    assert sample_score(dear, FOUND, ONE_EACH) == score


def test_beyond_the_time_out_but_within_the_tolerance_only_that_level_is_lost():
    run = [[[0.1]], [[8.005]], [[2.0]], [[4.0]]]
    assert sample_score(run, FOUND, ONE_EACH).levels == (0.0, 0.0, 1.0, 1.0)


@pytest.mark.parametrize("level", range(4))
def test_a_wrong_answer_anywhere_takes_everything(level):
    run = [[[0.1]], [[1.0]], [[2.0]], [[4.0]]]
    for end in ("wrong", "raised", "crashed", "void"):
        run[level] = [end]
        score = sample_score(run, FOUND, ONE_EACH)
        assert (score.value, score.right, score.ended) == (0.0, False, f"wrong on level {level}")


def test_a_cut_on_the_first_level_is_wrong_and_what_comes_first_counts():
    assert not sample_score([["time"]], FOUND, ONE_EACH).right
    two = Settings(cases=(1, 2, 1, 1), repeats=1)
    assert sample_score([[[0.1]], ["time", "wrong"]], FOUND, two).right
    assert not sample_score([[[0.1]], ["wrong", "time"]], FOUND, two).right


def test_a_level_or_case_that_is_missing_is_told():
    with pytest.raises(ValueError, match="1 cases on level 1, got 0"):
        sample_score([[[0.1]]], FOUND, ONE_EACH)
    with pytest.raises(ValueError, match="4 cases on level 1, got 1"):
        sample_score([[[0.1]] * 8, [[1.0]]], FOUND)
    with pytest.raises(ValueError, match="levels must be one of"):
        sample_score([["lost"]], FOUND, ONE_EACH)


def test_hodges_lehmann_moves_with_its_values_and_no_outlier_moves_it():
    values = np.random.default_rng(5).random(6)
    assert hodges_lehmann(values + 3) == pytest.approx(hodges_lehmann(values) + 3)
    assert hodges_lehmann(values * 7) == pytest.approx(hodges_lehmann(values) * 7)
    steady = [1.0, 1.01, 1.02, 1.03, 1.04]
    outliers = [hodges_lehmann([*steady, far]) for far in (5.0, 1e3, 1e9)]
    assert outliers == [outliers[0]] * 3
    assert 1.0 <= outliers[0] <= 1.04
    gross = [[[0.1]], [[1.0] * 5 + [7.5]], [[2.0]], [[4.0]]]
    assert sample_score(gross, FOUND, ONE_EACH).value == 1


def test_the_papers_settings():
    assert (PAPER.cases, PAPER.hardness, PAPER.repeats, PAPER.alpha) == ((8, 4, 4, 4), (0, 3, 3, 4), 6, 2.0)
    assert (PAPER.tolerance, PAPER.memory_mib, PAPER.clip) == (0.01, 4096, False)
    assert [PAPER.repeats_of(level) for level in range(4)] == [1, 6, 6, 6]


@pytest.mark.parametrize(
    "wrong",
    [
        {"cases": (1, 1)}, {"cases": (0, 1, 1, 1)}, {"hardness": (0, -1, 1, 1)}, {"hardness": (0, 0, 0, 0)},
        {"repeats": 0}, {"alpha": 1.0}, {"tolerance": -0.1}, {"memory_mib": 0}, {"clip": 1},
    ],
)  # fmt: skip
def test_settings_that_are_none_are_refused(wrong):
    with pytest.raises((ValueError, TypeError), match=f"{next(iter(wrong))}|hardness"):
        Settings(**wrong)


# ------------------------------------------------------------------------------------------------------------------ the measurement


class Machine:
    """Stands for workers: programs are names, their costs are told, and so is what the machine does to them in time."""

    def __init__(self, costs, unit="s"):
        self.meter = SimpleNamespace(name="cpu_seconds", unit=unit)
        self.costs, self.slowness, self.ran = costs, lambda count: 1.0, []

    def run(self, program, entry_point, cases, *, repeats=1, limits=None, keywords=None):
        return [[self.once(program, case, limits) for _ in range(repeats)] for case in cases]

    def once(self, program, case, limits):
        self.ran.append((program, *case, limits))
        did = self.costs[program](*case)
        if isinstance(did, Outcome):
            return did
        cost = did * self.slowness(len(self.ran))
        if limits is not None and cost > limits.cpu_seconds:
            return Outcome("time", error="too long")
        return Outcome("returned", "wrong" if program == "liar" and case == (4,) else 42, cost=cost)


CASES = [[(1,)], [(1,)], [(2,)], [(4,)]]
COSTS = {
    "expert": lambda n: float(n),
    "same": lambda n: float(n),
    "half": lambda n: 1.5 * n,
    "square": lambda n: 1.2 * n * n,
    "liar": lambda n: 0.1,
    "overflows": lambda n: Outcome("raised", error="OverflowError: too large") if n == 4 else float(n),
    "full": lambda n: Outcome("memory", error="too much") if n == 2 else float(n),
    "raises": lambda n: Outcome("raised", error="KeyError: 3") if n == 2 else float(n),
    "cheats": lambda n: Outcome("void", error="it left processes running"),
}


def evaluated(machine, names, settings=ONE_EACH):
    return evaluate(machine, "f", "expert", {n: n for n in names}, CASES, lambda a, b: a == b, settings=settings)


def test_a_measurement_scores_what_programs_do():
    found = evaluated(Machine(COSTS), [name for name in COSTS if name != "expert"])
    scores = {name: score.value for name, score in found.scores.items()}
    assert found.references == References((None, 1.0, 2.0, 4.0), 8.0)
    assert scores["same"] == 1
    assert scores["half"] == pytest.approx((3 * 6.5 / 7 + 3 * 5 / 6 + 4 * 2 / 4) / 10)
    assert scores["square"] == pytest.approx((3 * 6.8 / 7 + 3 * 3.2 / 6) / 10)
    assert found.scores["square"].ended == "cut on level 3"
    assert (scores["overflows"], scores["full"]) == pytest.approx((0.6, 0.3))
    for name in ("liar", "raises", "cheats"):
        assert (scores[name], found.scores[name].right) == (0.0, False)


def test_what_was_cut_or_wrong_is_run_no_more():
    machine = Machine(COSTS)
    evaluated(machine, ["full", "raises", "same"])
    sizes = {name: [n for program, n, _ in machine.ran if program == name] for name in COSTS}
    assert sizes["full"] == sizes["raises"] == [1, 1, 2]
    assert sizes["same"] == [1, 1, 2, 4]


def test_a_run_is_ended_at_the_time_out_the_tolerance_and_the_start():
    machine = Machine(COSTS)
    evaluated(machine, ["square"])
    limits = {limits for program, _, limits in machine.ran if program == "square"}
    assert [one.cpu_seconds for one in limits] == [pytest.approx(1.25 * 8.0 + 0.01 + enamel.ALLOWANCE)]
    assert [one.memory_mib for one in limits] == [4096]
    assert {limits for program, _, limits in machine.ran if program == "expert"} == {None}


def test_other_meters_cut_afterwards():
    machine = Machine(COSTS, unit="operations")
    found = evaluated(machine, ["square"])
    assert found.scores["square"].ended == "cut on level 3"
    assert found.scores == evaluated(Machine(COSTS), ["square"]).scores


def test_a_machine_that_becomes_slower_does_so_for_both():
    settings = Settings(cases=(1, 1, 1, 1), repeats=4)
    machine = Machine(COSTS)
    machine.slowness = lambda count: 1.0 if count <= 1 + 3 * 4 else 1.3  # from where the samples begin
    found = evaluated(machine, ["same", "half"], settings)
    assert found.scores["same"].value == pytest.approx(1)
    assert found.scores["half"].value == pytest.approx(
        evaluated(Machine(COSTS), ["half"], settings).scores["half"].value
    )
    assert found.drift == pytest.approx(1.3)
    assert found.again.value > 1.1
    still = evaluated(Machine(COSTS), ["same"], settings)
    assert (still.drift, still.again.value) == (1, 1)


def test_the_reference_is_run_between_the_samples():
    machine = Machine(COSTS)
    evaluated(machine, ["same", "half"], Settings(cases=(1, 1, 1, 1), repeats=3))
    last = [program for program, n, _ in machine.ran if n == 4][-9:]
    assert sorted(last[:3]) == sorted(last[3:6]) == sorted(last[6:]) == ["expert", "half", "same"]


def test_a_measurement_that_cannot_be_is_refused():
    with pytest.raises(ValueError, match="samples must be one or more"):
        evaluated(Machine(COSTS), [])
    with pytest.raises(ValueError, match="cases must be"):
        evaluated(Machine(COSTS), ["same"], PAPER)
    with pytest.raises(ValueError, match="reference must return on every case, ended by raised: KeyError"):
        evaluate(Machine(COSTS), "f", "raises", {"same": "same"}, CASES, lambda a, b: a == b, settings=ONE_EACH)


def test_runs_and_scores_of_samples_see_the_same_cuts():
    """`assay code score` waits longer than a measurement of ours does, and yet the same programs score the same."""
    from assay.codebench.scores import eff_scores
    from assay.methods.core.programs import runs

    names = ["same", "half", "square", "overflows", "full", "raises"]
    task = SimpleNamespace(
        id="T/1", entry_point="f", programs={"expert": "expert"}, sizes=(1, 1, 2, 4), test="", inputs=(),
        compare=lambda a, b: a == b, arguments=lambda level, number, seed=0: CASES[level][0],
    )  # fmt: skip
    ours = evaluated(Machine(COSTS), names)
    for seconds in (1e3, 4.5):  # of which the reference takes 4
        settings = runs.Settings(cases=1, repeats=1, seconds=seconds)
        found = runs.run_task(task, names, Machine(COSTS), settings)
        assert found.right == [True] * 6
        assert eff_scores(found, settings) == pytest.approx([ours.scores[name].value for name in names])


def test_a_run_that_a_slower_machine_makes_long_is_no_cut():
    machine = Machine({"expert": float, "near": lambda n: 1.9 * n})
    machine.slowness = lambda count: 1.0 if count <= 4 else 1.2
    found = evaluated(machine, ["near"])
    assert found.references.time_out == pytest.approx(9.6)
    assert found.scores["near"].levels[3] == pytest.approx(0.1)
