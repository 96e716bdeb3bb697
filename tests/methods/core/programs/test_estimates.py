import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from assay.methods.core.programs.estimates import (
    coefficient_of_variation,
    hodges_lehmann,
    interval,
    pass_at_k,
    trimmed_mean,
)


@pytest.mark.parametrize(
    ("n", "c", "k"), [(n, c, k) for n in range(1, 7) for c in range(n + 1) for k in range(1, n + 1)]
)
def test_pass_at_k_is_the_share_of_subsets_with_a_right_one(n, c, k):
    subsets = list(itertools.combinations([1] * c + [0] * (n - c), k))
    assert pass_at_k(n, c, k) == pytest.approx(sum(map(any, subsets)) / len(subsets), abs=1e-12)


def test_pass_at_k_does_not_overflow_and_refuses_a_k_that_is_too_large():
    assert pass_at_k(10_000, 1, 5_000) == pytest.approx(0.5)
    for n, c, k in [(5, 2, 6), (5, 6, 1), (5, 2, 0), (0, 0, 1)]:
        with pytest.raises(ValueError, match="must be"):
            pass_at_k(n, c, k)


VALUES = st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=8)


@given(VALUES, st.floats(-100, 100), st.floats(0.01, 100))
def test_hodges_lehmann_is_the_median_of_all_means_of_pairs(values, shift, scale):
    pairs = [(a + b) / 2 for n, a in enumerate(values) for b in values[n:]]
    assert hodges_lehmann(values) == pytest.approx(np.median(pairs), rel=1e-12, abs=1e-9)
    moved = [scale * value + shift for value in values]
    assert hodges_lehmann(moved) == pytest.approx(scale * hodges_lehmann(values) + shift, rel=1e-9, abs=1e-6)


def test_one_gross_outlier_among_six_does_nothing_much():
    quiet = [1.0, 1.01, 0.99, 1.02, 0.98, 1.0]
    assert hodges_lehmann([*quiet[:5], 1e9]) == pytest.approx(hodges_lehmann(quiet), abs=0.02)
    assert trimmed_mean([*quiet[:5], 1e9]) == pytest.approx(1.0, abs=0.02)
    assert trimmed_mean([3.0] * 12) == 3.0
    assert trimmed_mean([4, 1, 2, 3], 0) == 2.5


def test_spread():
    assert coefficient_of_variation([5, 5, 5]) == 0
    assert coefficient_of_variation([1, 3]) == pytest.approx(math.sqrt(2) / 2)
    with pytest.raises(ValueError, match="above 0"):
        coefficient_of_variation([-1, 1])
    with pytest.raises(ValueError, match="two or more"):
        coefficient_of_variation([1])


def test_an_interval_over_tasks_covers_what_it_should():
    rng = np.random.default_rng(0)
    covers = 0
    for trial in range(200):
        drawn = rng.random(60) < 0.3
        low, high = interval(list(drawn), lambda tasks: float(np.mean(tasks)), draws=300, seed=trial)
        covers += low <= 0.3 <= high
    assert 180 <= covers <= 198
    low, high = interval([1.0] * 5, lambda tasks: float(np.mean(tasks)))
    assert low == high == 1.0


@pytest.mark.parametrize("call", [hodges_lehmann, trimmed_mean])
@pytest.mark.parametrize("values", [[], [math.nan], [[1.0]]])
def test_bad_values_are_named(call, values):
    with pytest.raises(ValueError, match="values must be"):
        call(values)


def test_other_bad_input_is_named():
    with pytest.raises(ValueError, match="drop"):
        trimmed_mean([1, 2], 1)
    with pytest.raises(ValueError, match="two or more"):
        interval([1], lambda tasks: 1.0)
    with pytest.raises(ValueError, match="no draw"):
        interval([1, 2], lambda tasks: math.nan)
