"""The intervals: exact coverage on small samples, whatever the noise."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from assay.measure.stats import bootstrap, median_interval, paired_ratio, positive_median, student_t


@pytest.mark.parametrize(("n", "low", "high"), [(6, 1, 6), (8, 1, 8), (9, 2, 8), (10, 2, 9), (15, 4, 12), (20, 6, 15)])
def test_order_statistics_of_the_sign_test(n, low, high):
    """The ranks of the standard table for a 95 % interval of a median."""
    found = median_interval(np.random.default_rng(n).permutation(np.arange(1, n + 1)))
    assert (found.low, found.high, found.n) == (low, high, n)
    assert found.median == (n + 1) / 2


def test_coverage_is_at_least_what_is_said():
    random = np.random.default_rng(1)
    for n in (6, 10, 17):
        for draw in (random.standard_cauchy, random.standard_exponential, random.standard_normal):
            true = {random.standard_exponential: math.log(2)}.get(draw, 0.0)
            hits = [median_interval(draw(n)).contains(true) for _ in range(1000)]
            assert np.mean(hits) >= 0.935  # 0.95 less three standard errors


def test_bootstrap_of_a_small_median_covers_too_seldom():
    """Why times are not judged by it."""
    random = np.random.default_rng(2)
    sets = random.standard_cauchy((400, 6))
    assert np.mean([bootstrap(s, resamples=500).contains(0.0) for s in sets]) < np.mean(
        [median_interval(s).contains(0.0) for s in sets]
    )


def test_few_samples_fall_back_to_students_t():
    found = median_interval([1.0, 2.0, 4.0])
    mean, deviation = 7 / 3, np.std([1, 2, 4], ddof=1)
    assert found.high == pytest.approx(mean + 4.30265273 * deviation / math.sqrt(3))
    assert found.low == pytest.approx(mean - 4.30265273 * deviation / math.sqrt(3))


def test_one_sample_says_nothing():
    assert (median_interval([3.0]).low, median_interval([3.0]).high) == (-math.inf, math.inf)
    assert (paired_ratio([3.0], [1.0]).low, paired_ratio([3.0], [1.0]).high) == (0.0, math.inf)


@pytest.mark.parametrize("freedom", [1, 2, 3, 4, 5, 10, 31])
def test_student_quantiles_are_scipys(freedom):
    from scipy.stats import t

    for level in (0.5, 0.95, 0.99):
        assert student_t(level, freedom) == pytest.approx(t.ppf((1 + level) / 2, freedom), rel=1e-9)


@given(st.lists(st.tuples(st.floats(0.01, 100), st.floats(0.01, 100)), min_size=2, max_size=20))
def test_swapping_gives_the_reciprocal(pairs):
    a, b = zip(*pairs, strict=True)
    one, other = paired_ratio(a, b), paired_ratio(b, a)
    assert one.median == pytest.approx(1 / other.median)
    assert one.low == pytest.approx(1 / other.high)
    assert one.low <= one.median <= one.high


def test_ratio_of_a_known_speedup():
    times = np.random.default_rng(0).lognormal(0, 0.01, (2, 12))
    found = paired_ratio(3 * times[0], times[1])
    assert found.low < 3 < found.high
    assert found.low > 2.9


def test_positive_median_stays_positive():
    found = positive_median([0.001, 1.0])
    assert 0 < found.low < found.median < found.high


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: median_interval([]), "samples"),
        (lambda: median_interval([math.nan]), "finite"),
        (lambda: median_interval([1.0], level=1.0), "level"),
        (lambda: bootstrap([]), "samples"),
        (lambda: paired_ratio([1.0, 2.0], [1.0]), "pair up"),
        (lambda: paired_ratio([0.0, 2.0], [1.0, 1.0]), "baseline must be positive"),
        (lambda: paired_ratio([1.0], [math.inf]), "candidate must be positive"),
        (lambda: student_t(0.95, 0), "freedom"),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
