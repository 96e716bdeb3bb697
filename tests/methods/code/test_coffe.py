"""COFFE's figures: efficient@k, speed-up, the cost of runs, the deviation of a meter."""

from __future__ import annotations

import math
from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from assay.methods.code.coffe import (
    Problem,
    best_solution,
    cost_of_runs,
    efficient_at_k,
    is_efficient,
    passed_at_k,
    relative_deviation,
    score,
    speedup,
)

COST = st.one_of(st.floats(0.001, 1e12), st.just(math.inf))
FINITE = st.floats(0.001, 1e9)
CUT = math.inf


@st.composite
def problems(draw, cost=COST, samples=4):
    found = []
    for _ in range(draw(st.integers(1, 4))):
        tests = draw(st.integers(1, 3))
        row = st.lists(cost, min_size=tests, max_size=tests)
        best = draw(st.lists(FINITE, min_size=tests, max_size=tests))
        found.append(Problem(best, draw(st.lists(st.none() | row, min_size=samples, max_size=samples))))
    return found


# ------------------------------------------------------------------------------------------------------------------- efficient@k


@settings(max_examples=30, deadline=None)
@given(problems(), st.integers(1, 4))
def test_efficient_is_never_above_passed(found, k):
    strict = efficient_at_k(found, k)
    assert 0 <= strict <= efficient_at_k(found, k, tolerance=1.01) <= passed_at_k(found, k) + 1e-12 <= 1 + 2e-12


@settings(max_examples=30, deadline=None)
@given(problems(), st.integers(1, 4))
def test_the_estimate_is_the_average_over_all_choices_of_k_samples(found, k):
    def of(problem):
        fine = [row is not None and sum(row) < sum(problem.best) for row in problem.samples]
        chosen = list(combinations(fine, k))
        return sum(map(any, chosen)) / len(chosen)

    assert efficient_at_k(found, k) == pytest.approx(sum(map(of, found)) / len(found))


def test_it_grows_with_k():
    found = [Problem([10.0], [[9.0], [11.0], None, [CUT]])]
    values = [efficient_at_k(found, k) for k in (1, 2, 3, 4)]
    assert values == pytest.approx([0.25, 0.5, 0.75, 1.0])


def test_the_best_solution_itself_scores_nothing_but_within_the_tolerance():
    itself = [Problem([3.0, 7.0], [[3.0, 7.0]]), Problem([5.0], [[5.0]])]
    assert efficient_at_k(itself) == 0
    assert efficient_at_k(itself, tolerance=1.0) == 1


def test_a_strictly_cheaper_program_scores_one_and_a_wrong_one_nothing():
    assert efficient_at_k([Problem([3.0, 7.0], [[7.5, 2.4]])]) == 1  # the sum decides, not each test
    assert efficient_at_k([Problem([3.0, 7.0], [None])]) == 0


def test_the_tolerance_is_one_per_cent():
    found = score([Problem([100.0], [[101.0], [101.2]])])
    assert (found.efficient[1], found.within_tolerance[1], found.passed[1]) == (0.0, 0.5, 1.0)


def test_who_was_cut_is_inefficient_and_stays_in_the_denominator():
    found = [Problem([10.0, 10.0], [[1.0, CUT], [1.0, 1.0]])]
    assert efficient_at_k(found) == 0.5
    assert efficient_at_k(found, tolerance=1e6) == 0.5
    assert passed_at_k(found) == 1


def test_a_problem_whose_best_solution_was_cut_is_counted_and_left_out():
    found = score([Problem([1.0, CUT], [[1.0, 1.0]]), Problem([1.0], [[2.0]])])
    assert (found.problems, found.inconsistent) == (1, 1)
    assert (found.efficient[1], found.passed[1], found.speedup.problems) == (0, 1, 1)
    with pytest.raises(ValueError, match="got none"):
        efficient_at_k([Problem([CUT], [[1.0]])])


@settings(max_examples=30, deadline=None)
@given(problems(), st.sampled_from([1e-6, 0.25, 3.0, 1e6]))
def test_the_unit_of_costs_changes_nothing(found, factor):
    # powers of two and coarse costs would hide rounding; costs that differ by rounding only are no difference
    scaled = [
        Problem(
            [cost * factor for cost in problem.best],
            [None if row is None else [cost * factor for cost in row] for row in problem.samples],
        )
        for problem in found
    ]
    tied = any(math.isclose(sum(row), sum(p.best), rel_tol=1e-9) for p in found for row in p.right)
    if not tied:
        assert efficient_at_k(scaled) == efficient_at_k(found)
    before, after = speedup(found), speedup(scaled)
    assert after.samples == before.samples
    if before.samples:
        assert after.ratio_of_sums == pytest.approx(before.ratio_of_sums)
        assert after.geometric_mean == pytest.approx(before.geometric_mean)


# --------------------------------------------------------------------------------------------------------------------- speed-up


def test_the_speed_up_of_the_best_solution_is_one():
    found = speedup([Problem([3.0, 7.0], [[3.0, 7.0]]), Problem([50.0], [[50.0]])])
    assert (found.ratio_of_sums, found.geometric_mean) == (1, 1)


def test_one_heavy_problem_decides_the_ratio_of_sums_but_not_the_geometric_mean():
    found = speedup([Problem([1.0], [[0.5]])] * 9 + [Problem([1e6], [[4e6]])])
    assert found.ratio_of_sums == pytest.approx(0.25, rel=1e-4)
    assert found.geometric_mean == pytest.approx((2**9 / 4) ** 0.1)


def test_it_names_whom_it_is_silent_about():
    found = speedup([Problem([10.0], [[5.0], [CUT], None]), Problem([10.0], [None, None, [CUT]])])
    assert (found.problems, found.samples, found.wrong, found.cut) == (1, 1, 3, 2)
    assert found.ratio_of_sums == 2
    free = speedup([Problem([10.0], [[0.0], [20.0]])])
    assert (free.ratio_of_sums, free.unseen) == (0.5, 1)
    nobody = speedup([Problem([10.0], [None])])
    assert nobody.ratio_of_sums is None
    assert nobody.geometric_mean is None


def test_a_problem_counts_once_however_many_samples_it_has():
    found = speedup([Problem([10.0], [[5.0]] * 8), Problem([10.0], [[20.0]] + [None] * 7)])
    assert found.ratio_of_sums == pytest.approx(20 / 25)
    assert found.geometric_mean == pytest.approx(1)


# ------------------------------------------------------------------------------------------------------------------ runs and meters


@settings(max_examples=50)
@given(st.permutations([5.0, 6.0, 7.0, 8.0, 9.0, 10.0, 11.0, 12.0, 13.0, 14.0, 15.0, 16.0]))
def test_the_order_of_runs_does_not_matter(runs):
    assert cost_of_runs(runs) == pytest.approx(10.5)


def test_one_outlier_on_each_side_does_not_matter():
    middle = [10.0] * 10
    assert cost_of_runs([*middle, 10.0, 10.0]) == 10
    assert cost_of_runs([0.0, *middle, 1e12]) == 10
    assert cost_of_runs([0.0, *middle, CUT]) == CUT  # a run that was cut is no outlier
    assert cost_of_runs([CUT]) == CUT  # and is the last one that is made


def test_the_deviation_is_that_of_a_sample_averaged_over_tests():
    assert relative_deviation([[1.0, 1.0, 1.0]]) == 0
    assert relative_deviation([[1.0, 2.0, 3.0], [10.0, 20.0, 30.0]]) == pytest.approx(0.5)


def test_the_best_solution_is_that_of_the_least_sum():
    assert best_solution({"a": [1.0, 9.0], "b": [2.0, 7.0], "c": [0.0, CUT]}) == "b"
    with pytest.raises(ValueError, match="got none"):
        best_solution({"a": [CUT]})


# ------------------------------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Problem([], []), "best must hold"),
        (lambda: Problem([1.0], [[1.0, 2.0]]), r"samples\[0\] must have 1 costs"),
        (lambda: Problem([math.nan], []), "best must be"),
        (lambda: Problem([1.0], [[-1.0]]), r"samples\[0\] must be"),
        (lambda: efficient_at_k([Problem([1.0], [[1.0]])], 2), "k must be at most the 1 samples"),
        (lambda: efficient_at_k([Problem([1.0], [[1.0]])], 0), "k must be"),
        (lambda: passed_at_k([]), "got none"),
        (lambda: is_efficient([1.0], [1.0], tolerance=0.9), "tolerance must be"),
        (lambda: is_efficient([1.0], [1.0, 1.0]), "costs must have 2 entries"),
        (lambda: cost_of_runs([1.0, 2.0]), "runs must be 3"),
        (lambda: cost_of_runs([1.0, 2.0, math.nan]), "runs must be"),
        (lambda: relative_deviation([[1.0]]), "two or more"),
        (lambda: relative_deviation([]), "got none"),
        (lambda: relative_deviation([[0.0, 0.0]]), "mean above 0"),
        (lambda: score([Problem([1.0], [[1.0]])], ks=()), "ks must not be empty"),
        (lambda: best_solution({}), "one solution"),
    ],
)
def test_what_is_wrong_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_text_is_no_cost():
    with pytest.raises(TypeError, match="best must be"):
        Problem(["1"], [])
