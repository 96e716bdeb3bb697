"""The ratio of two unpaired series: exact by ranks, blind to order and scale, and rarely wrong about two equal things."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from assay.measure.clock import binomial_bound
from assay.measure.unpaired import EXACT_UP_TO, critical, unpaired_ratio


@pytest.mark.parametrize(("n", "m"), [(3, 3), (4, 4), (2, 8), (5, 6)])
@pytest.mark.parametrize("level", [0.8, 0.95])
def test_the_critical_count_is_that_of_all_arrangements(n, m, level):
    """Against every arrangement of the ranks, counted one by one."""
    found = []
    for chosen in itertools.combinations(range(n + m), n):
        others = [i for i in range(n + m) if i not in chosen]
        found.append(sum(a > b for a in chosen for b in others))
    expected = max(k for k in range(n * m + 2) if k == 0 or 2 * sum(u < k for u in found) <= (1 - level) * len(found))
    assert critical(n, m, level) == expected


def test_the_approximation_is_no_narrower_where_it_begins():
    for n, m in ((50, 51), (2, 1300), (9, 300)):
        assert n * m > EXACT_UP_TO
        near = m
        while n * near > EXACT_UP_TO:
            near -= 1
        share = critical(n, near) / (n * near)
        assert critical(n, m) / (n * m) <= share + 0.01


def test_it_is_the_median_of_all_ratios_between_two_of_them():
    rng = np.random.default_rng(0)
    a, b = rng.lognormal(0.2, 0.3, 9), rng.lognormal(0, 0.3, 12)
    found = unpaired_ratio(a, b)
    ratios = np.sort((a[:, None] / b[None]).ravel())
    k = critical(9, 12)
    assert found.median == pytest.approx(math.exp(np.median(np.log(ratios))), rel=1e-9)
    assert found.low == pytest.approx(ratios[k - 1], rel=1e-9)
    assert found.high == pytest.approx(ratios[-k], rel=1e-9)


def test_swapping_inverts_and_scale_and_order_change_nothing():
    rng = np.random.default_rng(1)
    a, b = rng.lognormal(0, 0.2, 15), rng.lognormal(0.1, 0.2, 11)
    found, swapped = unpaired_ratio(a, b), unpaired_ratio(b, a)
    assert (swapped.median, swapped.low, swapped.high) == pytest.approx(
        (1 / found.median, 1 / found.high, 1 / found.low), rel=1e-9
    )
    scaled = unpaired_ratio(a * 1e-7, b * 1e-7)
    assert (scaled.median, scaled.low, scaled.high) == pytest.approx((found.median, found.low, found.high), rel=1e-9)
    assert unpaired_ratio(rng.permutation(a), rng.permutation(b)) == found


@pytest.mark.parametrize("n", [4, 10, 20, 60])
@pytest.mark.parametrize("noise", ["normal", "cauchy", "rounded"])
def test_two_equal_things_differ_in_one_of_twenty_at_most(n, noise):
    rng = np.random.default_rng(n)
    sets, wrong = 300, 0
    for _ in range(sets):
        drawn = {
            "normal": lambda: np.exp(rng.normal(0, 0.05, n)),
            "cauchy": lambda: np.exp(np.clip(rng.standard_cauchy(n) / 20, -5, 5)),
            "rounded": lambda: np.round(10 + rng.normal(0, 1, n)),
        }[noise]
        wrong += not unpaired_ratio(drawn(), drawn()).contains(1.0)
    assert wrong <= binomial_bound(sets, 0.05, 0.999)


def test_equal_values_and_many_values():
    found = unpaired_ratio([3.0] * 8, [3.0] * 8)
    assert found.contains(1.0)
    assert found.median == pytest.approx(1.0, abs=1e-9)
    rng = np.random.default_rng(2)
    many = unpaired_ratio(rng.lognormal(0, 0.1, 50_000), rng.lognormal(-0.1, 0.1, 40_000))
    assert many.low < math.exp(0.1) < many.high < many.low * 1.01


def test_too_few_bound_nothing():
    found = unpaired_ratio([1.0, 1.1, 0.9], [2.0, 2.1, 1.9])
    assert (found.low, found.high, found.n) == (0.0, math.inf, 3)


@pytest.mark.parametrize(
    ("a", "b", "says"),
    [
        ([], [1.0], "baseline must hold at least one"),
        ([1.0], [0.0], "candidate must be positive"),
        ([math.nan], [1.0], "baseline must be positive"),
        ([1.0], [math.inf], "candidate must be positive"),
    ],
)
def test_what_is_no_time_is_refused(a, b, says):
    with pytest.raises(ValueError, match=says):
        unpaired_ratio(a, b)
    with pytest.raises(ValueError, match="level"):
        unpaired_ratio([1.0], [1.0], level=1.0)
