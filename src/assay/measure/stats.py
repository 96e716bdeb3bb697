"""Medians and ratios with their intervals.

There are two kinds of interval for two uses. `median_interval` (and `paired_ratio`, which compares times) is exact: for any
number of samples it covers the median at least as often as it says, which a bootstrapped median of ten samples does not.
`bootstrap` takes any statistic but needs tens of samples to be right; it is used for quality figures.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Interval:
    """An estimate with its 95 % interval (or another level, if asked for) and the number of samples behind it."""

    median: float
    low: float
    high: float
    n: int

    def contains(self, value: float) -> bool:
        """True if `value` lies in [low, high]: no difference from it was found."""
        return self.low <= value <= self.high


def bootstrap(
    samples: Sequence[float] | np.ndarray,
    statistic: Callable[..., np.ndarray] = np.median,
    *,
    level: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> Interval:
    """Percentile bootstrap of `statistic` over the first axis of `samples`; `statistic` must take `axis=1`.

    With a 2-D `samples` (n, k), whole rows are resampled, so that paired columns stay paired, and `statistic` gets
    (resamples, n, k). Not for medians of fewer than about thirty samples, where it covers too seldom: use `median_interval`.
    Raises ValueError for no samples, a non-finite sample, or a level outside (0, 1).
    """
    values = _finite(samples, level)
    picks = np.random.default_rng(seed).integers(0, len(values), size=(resamples, len(values)))
    draws = statistic(values[picks], axis=1)
    low, high = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2])
    estimate = float(statistic(values[None], axis=1)[0])
    return Interval(estimate, float(min(low, estimate)), float(max(high, estimate)), len(values))


def median_interval(samples: Sequence[float] | np.ndarray, *, level: float = 0.95) -> Interval:
    """Median with the sign-test interval: the tightest pair of order statistics that covers with probability >= `level`.

    It assumes nothing but independent samples, so it holds for heavy tails. With n samples sorted as x1..xn the interval is
    [x(k), x(n+1-k)] with the largest k for which 2 P(Binomial(n, 1/2) < k) <= 1 - level; at 95 % this needs n >= 6 (n = 10:
    x2..x9, covers 97.9 %). Fewer samples allow no distribution-free interval; Student's t around the mean then takes its place
    (our choice), which is wide (12.7 standard errors for two samples) and relies on symmetric noise. A single sample is unbounded:
    low and high are minus and plus infinity.

    Raises ValueError for no samples, a non-finite sample, or a level outside (0, 1).
    """
    values = np.sort(_finite(samples, level))
    n = len(values)
    median = float(np.median(values))
    k, below = 0, 0.5**n  # below = P(Binomial(n, 1/2) < k + 1)
    while 2 * below <= 1 - level:
        k += 1
        below += math.comb(n, k) * 0.5**n
    if k > 0:
        return Interval(median, float(values[k - 1]), float(values[n - k]), n)
    if n == 1:
        return Interval(median, -math.inf, math.inf, 1)
    half = student_t(level, n - 1) * float(values.std(ddof=1)) / math.sqrt(n)
    mean = float(values.mean())
    return Interval(median, min(mean - half, median), max(mean + half, median), n)


def paired_ratio(baseline: Sequence[float], candidate: Sequence[float], *, level: float = 0.95) -> Interval:
    """Median of baseline[i] / candidate[i] with its interval: above 1 the candidate is faster (for times).

    Computed over log ratios by `median_interval`, so that swapping the two gives exactly the reciprocal. If the two do not differ,
    each log ratio is as likely positive as negative, and the interval misses 1 at most `1 - level` of the time, whatever the noise
    looks like. A single pair has the interval (0, infinity).

    Raises ValueError when the two differ in length, are empty, or hold a value that is not positive and finite.

    >>> found = paired_ratio([2.0, 2.2, 1.9, 2.1, 2.0, 2.3], [1.0, 1.1, 1.0, 1.0, 0.9, 1.1])
    >>> round(found.median, 2), found.contains(1.0)
    (2.04, False)
    """
    a, b = np.asarray(baseline, dtype=np.float64), np.asarray(candidate, dtype=np.float64)
    if a.shape != b.shape:
        raise ValueError(f"baseline and candidate must pair up, got {len(a)} and {len(b)} samples")
    return _exponential(median_interval(_logs(a, "baseline") - _logs(b, "candidate"), level=level))


def positive_median(samples: Sequence[float] | np.ndarray, *, level: float = 0.95) -> Interval:
    """`median_interval` of positive values (times, bytes), computed over their logarithms, so that `low` stays positive.

    Raises ValueError for no samples or a value that is not positive and finite.
    """
    return _exponential(median_interval(_logs(np.asarray(samples, dtype=np.float64), "samples"), level=level))


def student_t(level: float, freedom: int) -> float:
    """The two-sided quantile of Student's t: P(|T| <= result) = `level` for `freedom` degrees of freedom (a whole number)."""
    if freedom < 1:
        raise ValueError(f"freedom must be at least 1, got {freedom}")
    low, high = 0.0, 1.0
    while _t_inside(high, freedom) < level:
        high *= 2
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if _t_inside(middle, freedom) < level else (low, middle)
    return high


def _t_inside(t: float, freedom: int) -> float:
    """P(|T| <= t), by the finite series in the angle atan(t / sqrt(freedom)) (Abramowitz & Stegun 26.7.3 and 26.7.4)."""
    angle = math.atan(t / math.sqrt(freedom))
    sine, square = math.sin(angle), math.cos(angle) ** 2
    if freedom % 2 == 0:
        term, total = sine, 0.0
        for i in range(1, freedom // 2 + 1):
            total += term
            term *= square * (2 * i - 1) / (2 * i)
        return total
    term, total = sine * math.cos(angle), angle
    for i in range(1, (freedom - 1) // 2 + 1):
        total += term
        term *= square * (2 * i) / (2 * i + 1)
    return total * 2 / math.pi


def _finite(samples: Sequence[float] | np.ndarray, level: float) -> np.ndarray:
    values = np.asarray(samples, dtype=np.float64)
    if values.shape[0] == 0:
        raise ValueError("samples must hold at least one value, got none")
    if not np.isfinite(values).all():
        raise ValueError("samples must be finite, got a NaN or an infinity")
    if not 0 < level < 1:
        raise ValueError(f"level must lie in (0, 1), got {level}")
    return values


def _logs(values: np.ndarray, name: str) -> np.ndarray:
    if not (np.isfinite(values) & (values > 0)).all():
        raise ValueError(f"{name} must be positive and finite, got {values[~(values > 0) | ~np.isfinite(values)][0]}")
    return np.log(values)


def _exponential(logs: Interval) -> Interval:
    return Interval(math.exp(logs.median), math.exp(logs.low), math.exp(logs.high), logs.n)
