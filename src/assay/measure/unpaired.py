"""The ratio of two series of which nobody knows which sample belongs to which: its interval by ranks, exact for few samples.

For pairs taken alternately use `assay.measure.stats.paired_ratio`, whose interval is narrower wherever a disturbance hits both of a pair.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from statistics import NormalDist

import numpy as np

from assay import checks
from assay.measure.stats import Interval

EXACT_UP_TO = 2500
"""Products of the two counts up to which the Mann-Whitney distribution is counted out; above, by the normal approximation."""

ROUNDING = 1e-12
"""By how much the ends lie outside, so that a ratio of equal values is never beyond them because a logarithm was rounded."""


def unpaired_ratio(baseline: Sequence[float], candidate: Sequence[float], *, level: float = 0.95) -> Interval:
    """Median of all baseline[i] / candidate[j] with its interval: above 1 the candidate is faster (for times).

    This is the Hodges-Lehmann estimate over logarithms, and the interval is that of the Mann-Whitney test turned around (Hodges and
    Lehmann, 1963; Bauer, 1972): the k-th smallest and the k-th largest of all ratios, with the largest k for which
    2 P(U < k) <= 1 - level. Our choice among intervals of a ratio of medians, because it is exact: two series of one distribution,
    whatever it looks like, are called different at most `1 - level` of the time, ties included. It takes the two to differ in scale alone
    (one is so many times the other) and all samples to be independent: samples taken one after another often are not, and the order is
    not looked at here. With too few samples (three and three, say) the interval is (0, infinity). `n` is the smaller count.

    Raises ValueError when one is empty or holds a value that is not positive and finite, or for a level outside (0, 1).

    >>> found = unpaired_ratio([2.0, 2.2, 1.9, 2.1], [1.0, 1.1, 0.9, 1.05, 0.95])
    >>> round(found.median, 2), round(found.low, 2), round(found.high, 2)
    (2.05, 1.81, 2.33)
    """
    checks.number("level", level, above=0, below=1)
    a, b = _sorted_logs("baseline", baseline), _sorted_logs("candidate", candidate)
    n, m = len(a), len(b)
    middle = (_below(a, b, (n * m + 1) // 2)[1] + _below(a, b, n * m // 2 + 1)[1]) / 2
    k = critical(min(n, m), max(n, m), level)
    if k == 0:
        return Interval(_exp(middle), 0.0, math.inf, min(n, m))
    low, high = _below(a, b, k)[0] - ROUNDING, _below(a, b, n * m + 1 - k)[1] + ROUNDING
    return Interval(_exp(middle), _exp(low), _exp(high), min(n, m))


@functools.lru_cache(maxsize=1024)
def critical(n: int, m: int, level: float = 0.95) -> int:
    """The largest k with 2 P(U < k) <= 1 - level for Mann-Whitney's U of n and m samples of one distribution; 0 if there is none.

    Beyond `EXACT_UP_TO` by the normal approximation, whose tails are the heavier ones here (at 95 %: even for n = 2).

    >>> critical(3, 3), critical(4, 4), critical(10, 10)
    (0, 1, 24)
    """
    if n * m > EXACT_UP_TO:
        deviation = math.sqrt(n * m * (n + m + 1) / 12)
        return max(math.floor(n * m / 2 - NormalDist().inv_cdf((1 + level) / 2) * deviation), 0)
    row = [np.ones(1) for _ in range(m + 1)]  # row[j]: P(U = 0, 1, ...) of i and j samples; with none of either U is 0
    for i in range(1, n + 1):
        for j in range(1, m + 1):
            made = np.zeros(i * j + 1)
            above, left = row[j], row[j - 1]  # the largest of all is one of the i: it lies above all j; or one of the j
            made[j : j + len(above)] += i / (i + j) * above
            made[: len(left)] += j / (i + j) * left
            row[j] = made
    return int(np.count_nonzero(2 * np.cumsum(row[m]) <= 1 - level))


def _below(a: np.ndarray, b: np.ndarray, k: int) -> tuple[float, float]:
    """Two neighbouring numbers, give or take a rounding, between which the k-th smallest of all a[i] - b[j] lies.

    By bisection, since a hundred thousand samples have more differences than fit in memory.
    """
    low = float(np.nextafter(a[0] - b[-1], -math.inf)) - 1e-9
    high = float(a[-1] - b[0]) + 1e-9
    while low < (middle := (low + high) / 2) < high and high - low > 1e-15:
        fewer = int(np.sum(len(b) - np.searchsorted(b, a - middle, side="left"))) < k
        low, high = (middle, high) if fewer else (low, middle)
    return low, high


def _sorted_logs(name: str, samples: Sequence[float]) -> np.ndarray:
    values = np.asarray(samples, dtype=np.float64)
    if values.ndim != 1 or not len(values):
        raise ValueError(f"{name} must hold at least one value, got {checks.shown(samples)}")
    bad = ~(np.isfinite(values) & (values > 0))
    if bad.any():
        raise ValueError(f"{name} must be positive and finite, got {values[bad][0]}")
    return np.sort(np.log(values))


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf
