"""Medians and ratios with their intervals.

Which interval for which samples:

- `median_interval`: independent samples. Exact: for any number of them it covers the median at least as often as it says, which a
  bootstrapped median of ten samples does not.
- `series_interval`, and on top of it `paired_ratio` (two things timed alternately) and `positive_median` (one): samples taken one
  after another on one machine, whose noise may last longer than one of them. Never narrower than `median_interval`.
- `across`: the ratios of several processes, which may differ from one another.
- `bootstrap`: any statistic, but it needs tens of samples to be right; it is used for quality figures.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from assay import checks

MOST_CORRELATED = 0.95
"""Serial correlation is not taken to be stronger than this."""
EXACT_UP_TO = 500
"""Samples up to which the order statistics of an interval are counted out; with more, by the normal approximation."""


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
    low and high are minus and plus infinity. Not for times taken one after another: use `series_interval`.

    Raises ValueError for no samples, a non-finite sample, or a level outside (0, 1).
    """
    return _interval(_finite(samples, level), level, 0.0)


def series_interval(samples: Sequence[float] | np.ndarray, *, level: float = 0.95) -> Interval:
    """Median of samples in the order they were taken, whose noise may last: `median_interval`, widened by `serial_correlation`.

    The sign test counts how many of n samples lie below the median. If neighbours lie on the same side with probability
    s = 1/2 + asin(r) / pi, as those of a Gaussian series with correlation r do, that number is no longer binomial: here it is that
    of a two-state Markov chain which stays with probability s, and the interval is the tightest pair of order statistics that covers
    with it. If not even the extremes do, it is Student's t around the mean, with n divided by the variance inflation of such a
    series and as many degrees of freedom (at least 2), and at least from the smallest to the largest (our choice, all of it).

    What that promises: for independent samples all that `median_interval` does, since it is never narrower. For a first-order
    autoregressive series of ten samples or more at 95 %: at least 93 % at a correlation of 0.3 and about 90 % at 0.6, where
    `median_interval` covers 90 % and 77 % (of twenty samples). Beyond that it covers less often (at 0.9 about 75 %), and so it does for
    noise of one arm that is correlated like that and hidden under the other's. With fewer than ten samples the correlation is hardly
    known, with fewer than six it is not looked at. Independent samples pay with an interval that is wider now and then, which at ten
    of them loses about one difference in twenty that `median_interval` would find.

    Errors are those of `median_interval`.
    """
    values = _finite(samples, level)
    plain = _interval(values, level, 0.0)
    correlation = serial_correlation(values) if len(values) >= 6 else 0.0
    if correlation == 0:
        return plain
    wide = _interval(values, level, correlation)
    return Interval(plain.median, min(plain.low, wide.low), max(plain.high, wide.high), plain.n)


def serial_correlation(samples: Sequence[float] | np.ndarray) -> float:
    """Correlation of each sample with the next, from 0 to 0.95: that of the ranks, which outliers cannot hide or feign.

    The estimate r is too low by (1 + 4 r) / n on average (Marriott and Pope, 1954), which is added. A negative correlation counts
    as 0, since nothing may be narrowed by it. Of n independent samples it finds about 1 / sqrt(n) by chance.

    >>> serial_correlation([1, 2, 3, 4, 5, 6, 7, 8]) > 0.9, serial_correlation([1, 8, 2, 7, 3, 6, 4, 5])
    (True, 0.0)
    """
    offsets = _ranks(np.asarray(samples, dtype=np.float64))
    offsets -= offsets.mean()
    spread = float(offsets @ offsets)
    if spread == 0:
        return 0.0
    found = float(offsets[1:] @ offsets[:-1]) / spread
    return min(max(found + (1 + 4 * max(found, 0.0)) / len(offsets), 0.0), MOST_CORRELATED)


def trending(samples: Sequence[float] | np.ndarray, *, level: float = 0.99) -> bool:
    """Whether samples rise or fall in the order they were taken by more than noise: Spearman's correlation with their number.

    Of independent samples at most about `1 - level` are called so. Fewer than eight are never called so: they are too few to tell.
    """
    ranks = _ranks(np.asarray(samples, dtype=np.float64))
    n = len(ranks)
    if n < 8 or np.ptp(ranks) == 0:
        return False
    correlation = abs(float(np.corrcoef(ranks, np.arange(n))[0, 1]))
    limit = student_t(level, n - 2)
    return correlation > limit / math.sqrt(n - 2 + limit**2)


def paired_ratio(baseline: Sequence[float], candidate: Sequence[float], *, level: float = 0.95) -> Interval:
    """Median of baseline[i] / candidate[i] with its interval: above 1 the candidate is faster (for times).

    Computed over log ratios, in the order the pairs were taken, by `series_interval`, so that swapping the two gives exactly the
    reciprocal. If the two do not differ, each log ratio is as likely positive as negative, and the interval misses 1 at most
    `1 - level` of the time, whatever the noise of independent pairs looks like; what is promised for noise that lasts from pair to
    pair is written there. A single pair has the interval (0, infinity).

    Raises ValueError when the two differ in length, are empty, or hold a value that is not positive and finite.

    >>> found = paired_ratio([2.0, 2.2, 1.9, 2.1, 2.0, 2.3], [1.0, 1.1, 1.0, 1.0, 0.9, 1.1])
    >>> round(found.median, 2), found.contains(1.0)
    (2.04, False)
    """
    return _exponential(series_interval(log_ratios(baseline, candidate), level=level))


def log_ratios(baseline: Sequence[float], candidate: Sequence[float]) -> np.ndarray:
    """log(baseline[i] / candidate[i]). Errors are those of `paired_ratio`."""
    a, b = np.asarray(baseline, dtype=np.float64), np.asarray(candidate, dtype=np.float64)
    if a.shape != b.shape:
        raise ValueError(f"baseline and candidate must pair up, got {len(a)} and {len(b)} samples")
    return _logs(a, "baseline") - _logs(b, "candidate")


def positive_median(samples: Sequence[float] | np.ndarray, *, level: float = 0.95) -> Interval:
    """`series_interval` of positive values (times, bytes), computed over their logarithms, so that `low` stays positive.

    Raises ValueError for no samples or a value that is not positive and finite.

    >>> found = positive_median([3.0, 3.1, 2.9])
    >>> round(found.median, 2), round(found.low, 2), round(found.high, 2)
    (3.0, 2.76, 3.26)
    """
    return _exponential(series_interval(_logs(np.asarray(samples, dtype=np.float64), "samples"), level=level))


def across(ratios: Sequence[Sequence[float]], *, level: float = 0.95) -> Interval:
    """The ratio that several fresh processes found, each with its own list of per-pair ratios, and an interval for what any would.

    Processes differ in where their memory lies and what they compiled, which no number of pairs in one of them shows. The estimate
    is the median of the processes' medians; the interval is `median_interval` of those medians (up to five processes Student's t: at
    three, 2 degrees of freedom, so 4.3 standard errors; from six on their order statistics), or that of all pairs taken together
    where this is wider (our choice). The first is right however much processes differ, since their medians are independent; the
    second keeps three medians that agree by chance from claiming more than the pairs can know. When processes do not differ, the
    interval of three with five pairs each is about 1.6 times as wide as that of their pairs together; of five, 1.3 times.

    A single process gets the interval of its pairs, which says nothing about others. `n` is the number of pairs in all. Raises
    ValueError for no processes, one without ratios, or a ratio that is not positive and finite.

    >>> found = across([[1.21, 1.19, 1.2, 1.18, 1.2], [1.3, 1.28, 1.27, 1.3, 1.29], [1.22, 1.24, 1.25, 1.23, 1.24]])
    >>> round(found.median, 2), round(found.low, 2), round(found.high, 2), found.n
    (1.24, 1.14, 1.36, 15)
    """
    if not len(ratios):
        raise ValueError("ratios must hold at least one process, got none")
    processes = [_logs(np.asarray(one, dtype=np.float64), f"ratios[{i}]") for i, one in enumerate(ratios)]
    for i, one in enumerate(processes):
        if not len(one):
            raise ValueError(f"ratios[{i}] must hold at least one ratio, got none")
    pairs = np.concatenate(processes)
    if len(processes) == 1:
        return _exponential(series_interval(pairs, level=level))
    between, together = (
        median_interval([float(np.median(one)) for one in processes], level=level),
        median_interval(pairs, level=level),
    )
    return _exponential(
        Interval(between.median, min(between.low, together.low), max(between.high, together.high), len(pairs))
    )


@functools.lru_cache(maxsize=1024)
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


def _interval(values: np.ndarray, level: float, correlation: float) -> Interval:
    """Order statistics of the sign test, or Student's t, for values that are correlated with the next by `correlation`."""
    values = np.sort(values)
    n, median = len(values), float(np.median(values))
    k = _rank(n, level, 0.5 + math.asin(correlation) / math.pi)
    if k > 0:
        return Interval(median, float(values[k - 1]), float(values[n - k]), n)
    if n == 1:
        return Interval(median, -math.inf, math.inf, 1)
    effective = n / (1 + 2 * sum((1 - lag / n) * correlation**lag for lag in range(1, n)))
    freedom = min(n - 1, max(2, round(effective)))
    half = student_t(level, freedom) * float(values.std(ddof=1)) / math.sqrt(effective)
    mean = float(values.mean())
    return Interval(median, mean - half, mean + half, n)


@functools.lru_cache(maxsize=1024)
def _rank(n: int, level: float, stay: float) -> int:
    """The largest k with 2 P(fewer than k of n lie below the median) <= 1 - level, if neighbours share a side with P = `stay`."""
    if n > EXACT_UP_TO:
        deviations = NormalDist().inv_cdf((1 + level) / 2) * math.sqrt(n * stay / (1 - stay)) / 2
        return max(math.floor(n / 2 - deviations), 0)
    below, above = np.zeros(n + 1), np.zeros(n + 1)  # P(so many lie below so far, and the last one does / does not)
    below[1] = above[0] = 0.5
    for _ in range(n - 1):
        below, above = np.roll(stay * below + (1 - stay) * above, 1), stay * above + (1 - stay) * below
    return int(np.count_nonzero(2 * np.cumsum(below + above) <= 1 - level))


def _ranks(values: np.ndarray) -> np.ndarray:
    """Ranks from 1; equal values share the mean of theirs."""
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    return np.asarray((np.cumsum(counts) - (counts - 1) / 2)[place], dtype=np.float64)


def _finite(samples: Sequence[float] | np.ndarray, level: float) -> np.ndarray:
    values = np.asarray(samples, dtype=np.float64)
    if values.shape[0] == 0:
        raise ValueError("samples must hold at least one value, got none")
    if not np.isfinite(values).all():
        raise ValueError("samples must be finite, got a NaN or an infinity")
    checks.number("level", level, above=0, below=1)
    return values


def _logs(values: np.ndarray, name: str) -> np.ndarray:
    if not (np.isfinite(values) & (values > 0)).all():
        raise ValueError(f"{name} must be positive and finite, got {values[~(values > 0) | ~np.isfinite(values)][0]}")
    return np.log(values)


def _exponential(logs: Interval) -> Interval:
    return Interval(math.exp(logs.median), math.exp(logs.low), math.exp(logs.high), logs.n)


def student_interval(values: Sequence[float] | np.ndarray, *, level: float = 0.95) -> Interval:
    """The mean with Student's interval: for seeds, of which there are few (three: 4.3 standard errors). A single value is unbounded.

    >>> found = student_interval([1.0, 2.0, 3.0])
    >>> round(found.median, 2), round(found.high, 2)
    (2.0, 4.48)
    """
    samples = _finite(values, level)
    mean, n = float(samples.mean()), len(samples)
    if n == 1:
        return Interval(mean, -math.inf, math.inf, 1)
    half = student_t(level, n - 1) * float(samples.std(ddof=1)) / math.sqrt(n)
    return Interval(mean, mean - half, mean + half, n)


def share_interval(hits: int, n: int, *, level: float = 0.95) -> Interval:
    """A share with its exact (Clopper-Pearson) interval: sixteen of sixteen are at least 79 %. Raises ValueError unless 0 <= hits <= n > 0.

    >>> found = share_interval(16, 16)
    >>> round(found.low, 3), found.high
    (0.794, 1.0)
    """
    if not 0 <= hits <= n or n < 1:
        raise ValueError(f"hits must lie in 0..n with n of at least 1, got {hits} of {n}")

    def tail(p: float, k: int) -> float:  # P(Binomial(n, p) >= k)
        if not 0 < p < 1:
            return float(p >= 1)
        logs = [_log_choose(n, i) + i * math.log(p) + (n - i) * math.log1p(-p) for i in range(k, n + 1)]
        return math.fsum(math.exp(value) for value in logs)

    def solve(too_large: Callable[[float], bool]) -> float:
        low, high = 0.0, 1.0
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (low, middle) if too_large(middle) else (middle, high)
        return low

    miss = (1 - level) / 2
    lower = solve(lambda p: tail(p, hits) > miss) if hits else 0.0
    upper = solve(lambda p: 1 - tail(p, hits + 1) < miss) if hits < n else 1.0
    return Interval(hits / n, lower, upper, n)


def _log_choose(n: int, k: int) -> float:
    return math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)
