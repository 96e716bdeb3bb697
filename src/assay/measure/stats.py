"""Medians and ratios with bootstrap intervals."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Interval:
    """An estimate with its 95 % interval (unless another level was asked for) and the number of samples behind it."""

    median: float
    low: float
    high: float
    n: int


def bootstrap(
    samples: Sequence[float] | np.ndarray,
    statistic: Callable[..., np.ndarray] = np.median,
    *,
    level: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> Interval:
    """Percentile bootstrap of `statistic` over the first axis of `samples`; `statistic` must take `axis=1`.

    With a 2-D `samples` (n, k) whole rows are resampled, so that paired columns stay paired, and `statistic` gets
    (resamples, n, k). Raises ValueError for no samples, a non-finite sample, or a level outside (0, 1).
    """
    values = np.asarray(samples, dtype=np.float64)
    if values.shape[0] == 0:
        raise ValueError("samples must hold at least one value, got none")
    if not np.isfinite(values).all():
        raise ValueError("samples must be finite, got a NaN or an infinity")
    if not 0 < level < 1:
        raise ValueError(f"level must lie in (0, 1), got {level}")
    picks = np.random.default_rng(seed).integers(0, len(values), size=(resamples, len(values)))
    draws = statistic(values[picks], axis=1)
    low, high = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2])
    estimate = float(statistic(values[None], axis=1)[0])
    return Interval(estimate, float(min(low, estimate)), float(max(high, estimate)), len(values))


def paired_ratio(
    baseline: Sequence[float], candidate: Sequence[float], *, level: float = 0.95, seed: int = 0
) -> Interval:
    """Median of baseline[i] / candidate[i] with its interval: above 1 the candidate is faster (for times).

    Raises ValueError when the two differ in length or hold a value that is not positive.
    """
    a, b = np.asarray(baseline, dtype=np.float64), np.asarray(candidate, dtype=np.float64)
    if a.shape != b.shape:
        raise ValueError(f"baseline and candidate must pair up, got {len(a)} and {len(b)} samples")
    if (a <= 0).any() or (b <= 0).any():
        raise ValueError("times must be positive")
    return bootstrap(a / b, level=level, seed=seed)
