"""The intervals: exact coverage on small samples, whatever the noise."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from assay.measure.clock import binomial_bound
from assay.measure.stats import (
    across,
    bootstrap,
    median_interval,
    paired_ratio,
    positive_median,
    serial_correlation,
    series_interval,
    share_interval,
    student_interval,
    student_t,
    trending,
)


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


def autoregressive(sets: int, n: int, rho: float, random: np.random.Generator) -> np.ndarray:
    """(sets, n) standard normal values, each correlated with the next by `rho`."""
    series = random.standard_normal((sets, n))
    for i in range(1, n):
        series[:, i] = rho * series[:, i - 1] + math.sqrt(1 - rho**2) * series[:, i]
    return series


def coverage(logs: np.ndarray) -> float:
    """Share of the sets of log ratios whose interval holds the true ratio, 1."""
    return float(np.mean([paired_ratio(np.exp(0.03 * one), np.ones(len(one))).contains(1.0) for one in logs]))


SETS = 600


def least(share: float) -> float:
    """What a coverage of `share` may look like in SETS sets: less three standard errors."""
    return share - 3 * math.sqrt(share * (1 - share) / SETS)


@pytest.mark.parametrize("n", [10, 20, 40])
@pytest.mark.parametrize(("rho", "share"), [(0.0, 0.95), (0.3, 0.93), (0.6, 0.895)])
def test_coverage_when_noise_lasts_from_pair_to_pair(n, rho, share):
    """As promised in `series_interval`; independent order statistics alone would cover 77 % at 0.6."""
    logs = autoregressive(SETS, n, rho, np.random.default_rng([n, int(10 * rho)]))
    assert coverage(logs) >= least(share)
    if rho == 0.6:
        assert np.mean([median_interval(one).contains(0.0) for one in logs]) < least(share)


@pytest.mark.parametrize("n", [10, 20, 40])
def test_coverage_when_the_noise_of_one_arm_lasts(n):
    random = np.random.default_rng(n)
    logs = autoregressive(SETS, n, 0.6, random) + random.standard_normal((SETS, n))
    assert coverage(logs) >= least(0.915)


@pytest.mark.parametrize("n", [6, 10, 20])
def test_independent_samples_are_widened_little_and_never_narrowed(n):
    logs = np.random.default_rng(n).standard_normal((200, n))
    series, plain = [series_interval(one) for one in logs], [median_interval(one) for one in logs]
    for wide, narrow in zip(series, plain, strict=True):
        assert wide.median == narrow.median
        assert wide.low <= narrow.low <= narrow.high <= wide.high
    widths = [np.median([one.high - one.low for one in found]) for found in (series, plain)]
    assert widths[0] < 1.25 * widths[1]


def test_alternating_noise_changes_nothing():
    values = [1.0, 9.0, 2.0, 8.0, 3.0, 7.0, 4.0, 6.0, 5.0, 5.5]
    assert serial_correlation(values) == 0
    assert series_interval(values) == median_interval(values)


def test_serial_correlation_is_that_of_the_ranks():
    values = [
        3.0,
        1.0,
        2.0,
        5.0,
        4.0,
        6.0,
    ]  # offsets of ranks: -.5 -2.5 -1.5 1.5 .5 2.5; products 1.25 3.75 -2.25 .75 1.25
    found = 4.75 / 17.5
    assert serial_correlation(values) == pytest.approx(found + (1 + 4 * found) / 6)
    assert serial_correlation(np.exp(values)) == serial_correlation(values)
    assert serial_correlation(-np.array(values)) == serial_correlation(values)
    assert serial_correlation([2.0] * 9) == 0
    assert serial_correlation(range(100)) == 0.95
    assert serial_correlation([1.0, 1.0, 2.0, 2.0]) == pytest.approx(0.25 + 2 / 4)  # ties share their rank


def test_serial_correlation_is_right_on_average():
    for rho in (0.3, 0.6):
        found = [serial_correlation(one) for one in autoregressive(400, 40, rho, np.random.default_rng(3))]
        assert np.mean(found) == pytest.approx(rho, abs=0.05)


def test_order_statistics_of_correlated_sides():
    """By simulating the chain of sides: how often fewer than k lie below."""
    from assay.measure.stats import _rank

    random = np.random.default_rng(0)
    for n, stay in ((10, 0.7), (20, 0.6), (40, 0.7)):
        flips = random.random((20_000, n)) >= np.where(np.arange(n) == 0, 0.5, stay)
        below = (flips.cumsum(1) % 2).sum(1)
        k = _rank(n, 0.95, stay)
        assert 2 * np.mean(below < k) <= 0.05 + 0.006
        assert 2 * np.mean(below < k + 1) > 0.05 - 0.006
        assert _rank(n, 0.95, 0.5) > k


def test_many_samples_take_the_normal_approximation():
    from assay.measure.stats import EXACT_UP_TO, _rank

    for stay in (0.5, 0.7):
        exact, near = _rank(EXACT_UP_TO, 0.95, stay), _rank(EXACT_UP_TO + 1, 0.95, stay)
        assert abs(exact - near) <= 1
    found = median_interval(np.arange(5001))
    assert found.low == pytest.approx(2500 - 1.96 * math.sqrt(5001) / 2, abs=2)
    assert found.low + found.high == 5000


def test_a_trend_is_told_from_noise():
    random = np.random.default_rng(5)
    for n in (8, 10, 40):
        calls = sum(trending(one) for one in random.standard_cauchy((1000, n)))
        assert calls <= binomial_bound(1000, 0.013, 0.999)  # Student's t is an approximation for so few ranks
        assert trending(np.arange(n) + 0.5 * random.random(n))
        assert trending(-np.arange(n))
    assert not trending(range(7))
    assert not trending([1.0] * 20)


def simulated_processes(sets: int, between: float, random: np.random.Generator, heavy: bool = False) -> np.ndarray:
    """(sets, 3 processes, 5 pairs) of ratios around 1, with 3 % noise inside a process and `between` from process to process."""
    inside = random.standard_t(2, (sets, 3, 5)) if heavy else random.standard_normal((sets, 3, 5))
    return np.exp(between * random.standard_normal((sets, 3, 1)) + 0.03 * inside)


@pytest.mark.parametrize("between", [0.0, 0.01, 0.03])
@pytest.mark.parametrize("heavy", [False, True])
def test_three_processes_of_five_pairs_cover(between, heavy):
    """At least 94 % whatever processes do to the ratio; their pairs taken together cover 80 % once processes differ as pairs do."""
    sets = simulated_processes(1000, between, np.random.default_rng(7), heavy)
    assert np.mean([across(one).contains(1.0) for one in sets]) >= 0.94
    if between == 0.03 and not heavy:
        assert np.mean([median_interval(np.log(one).ravel()).contains(0.0) for one in sets]) < 0.85


def test_processes_that_do_not_differ_cost_less_than_twice_the_width():
    sets = simulated_processes(300, 0.0, np.random.default_rng(8))
    found = [across(one) for one in sets]
    together = [median_interval(np.log(one).ravel()) for one in sets]
    ratio = np.median([math.log(a.high / a.low) for a in found]) / np.median([b.high - b.low for b in together])
    assert 1.2 < ratio < 2


def test_across_is_students_t_of_the_medians_or_the_pairs_together():
    medians = np.array([1.1, 1.2, 1.3])
    logs = np.log(medians)
    half = 4.30265273 * logs.std(ddof=1) / math.sqrt(3)
    found = across([[m] * 5 for m in medians])
    assert (found.median, found.n) == (pytest.approx(1.2), 15)
    assert (found.low, found.high) == pytest.approx(tuple(np.exp(logs.mean() + np.array([-half, half]))))
    alike = [[0.9, 0.95, 1.0, 1.05, 1.1]] * 3  # three medians that agree by chance
    pairs = median_interval(np.log(alike).ravel())
    assert across(alike).low == pytest.approx(math.exp(pairs.low))
    assert across(alike).high == pytest.approx(math.exp(pairs.high))


def test_across_swaps_and_takes_one_process_or_uneven_ones():
    some = [[1.2, 1.3], [1.25], [1.1, 1.15, 1.2]]
    found, swapped = across(some), across([[1 / r for r in one] for one in some])
    assert found.n == 6
    assert (found.low, found.median, found.high) == pytest.approx(
        (1 / swapped.high, 1 / swapped.median, 1 / swapped.low)
    )
    one = [1.1, 1.2, 1.15, 1.18, 1.12, 1.16, 1.21, 1.14]
    assert across([one]) == paired_ratio(one, [1.0] * 8)
    assert across(some, level=0.5).high < found.high


def test_low_and_high_hold_the_estimate_of_a_biased_statistic():
    """The squared mean of values around 0 is larger in most resamples; the deviation of two values is never larger."""
    square = lambda x, axis: x.mean(axis=axis) ** 2  # noqa: E731
    found = bootstrap([-1.0, 0.3, 0.7], square, resamples=200, level=0.2)
    assert (found.median, found.low) == (pytest.approx(0, abs=1e-30), found.median)
    assert found.high > 0.01
    found = bootstrap([-1.0, -1.0, 3.0, 3.0], np.std, resamples=50, level=0.01)
    assert found.high == found.median == 2


def test_bootstrap_takes_both_ends_at_the_level():
    values = np.random.default_rng(4).standard_normal(40)
    picks = np.random.default_rng(9).integers(0, 40, size=(300, 40))
    for level in (0.5, 0.95):
        found = bootstrap(values, np.mean, resamples=300, seed=9, level=level)
        ends = np.quantile(values[picks].mean(axis=1), [(1 - level) / 2, 1 - (1 - level) / 2])
        assert (found.low, found.high) == pytest.approx(tuple(ends))
        assert found.low < found.median < found.high


@given(st.lists(st.floats(-100, 100), min_size=2, max_size=9), st.floats(0.05, 0.99))
def test_low_and_high_hold_the_median(samples, level):
    """Also where Student's t, which is centred on the mean, takes the place of order statistics."""
    for found in (median_interval(samples, level=level), series_interval(samples, level=level)):
        assert found.low <= found.median + 1e-9
        assert found.high >= found.median - 1e-9


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: across([]), "at least one process"),
        (lambda: across([[1.0], []]), r"ratios\[1\] must hold at least one ratio"),
        (lambda: across([[1.0], [1.0, -1.0]]), r"ratios\[1\] must be positive"),
        (lambda: across([[1.0], [math.nan]]), r"ratios\[1\] must be positive"),
        (lambda: across([[1.0]], level=0.0), "level"),
        (lambda: series_interval([]), "samples"),
        (lambda: series_interval([1.0] * 9, level=math.nan), "level"),
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


def test_the_exact_interval_of_a_share():
    from scipy.stats import beta

    for hits, n in ((0, 16), (16, 16), (8, 16), (1, 3), (149, 150), (2990, 3000)):
        found = share_interval(hits, n)
        low = beta.ppf(0.025, hits, n - hits + 1) if hits else 0.0
        high = beta.ppf(0.975, hits + 1, n - hits) if hits < n else 1.0
        assert (found.low, found.high) == pytest.approx((low, high), abs=1e-9)
    for hits, n in ((-1, 3), (4, 3), (0, 0)):
        with pytest.raises(ValueError, match="hits must lie in 0..n"):
            share_interval(hits, n)


def test_students_interval_of_seeds():
    found = student_interval([1.0, 2.0, 3.0])
    assert found.high - found.median == pytest.approx(4.302653 / 3**0.5, rel=1e-5)
    assert student_interval([1.0]).low == -math.inf
