"""Figures from counts and costs that several papers share: pass@k, robust means, spread, and intervals over tasks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from assay import checks


def pass_at_k(n: int, c: int, k: int) -> float:
    """The chance that at least one of k samples, drawn from n of which c are right, is right: 1 - C(n-c, k)/C(n, k).

    Unbiased for k samples of the model; Chen et al. 2021 (arXiv 2107.03374). As a product, so that it does not overflow. Raises ValueError
    unless 0 <= c <= n and 1 <= k <= n: a k that is larger than n has no estimate.

    >>> round(pass_at_k(5, 2, 1), 3), pass_at_k(5, 5, 3), round(pass_at_k(4, 1, 2), 3)
    (0.4, 1.0, 0.5)
    """
    checks.whole("n", n, low=1)
    checks.whole("c", c, low=0, high=n)
    checks.whole("k", k, low=1, high=n)
    if n - c < k:
        return 1.0
    return float(1.0 - np.prod(1.0 - k / np.arange(n - c + 1, n + 1)))


def hodges_lehmann(values: ArrayLike) -> float:
    """The median of the means of all pairs, each value with itself too: as robust as a median, nearly as precise as a mean.

    Raises ValueError for no values or ones that are not finite.

    >>> hodges_lehmann([1.0, 2.0, 3.0, 2.0, 2.0, 30.0])
    2.0
    """
    found = _finite("values", values)
    first, second = np.triu_indices(len(found))
    return float(np.median((found[first] + found[second]) / 2))


def trimmed_mean(values: ArrayLike, drop: int = 1) -> float:
    """The mean without the `drop` smallest and the `drop` largest. Raises ValueError where nothing would be left.

    >>> trimmed_mean([5, 1, 3, 100])
    4.0
    """
    found = np.sort(_finite("values", values))
    checks.whole("drop", drop, low=0, high=(len(found) - 1) // 2)
    return float(found[drop : len(found) - drop].mean())


def coefficient_of_variation(values: ArrayLike) -> float:
    """Standard deviation (of a sample, n - 1) over mean; 0 for equal values. Needs two values, and a mean above 0.

    >>> round(coefficient_of_variation([9, 10, 11]), 3)
    0.1
    """
    found = _finite("values", values)
    if len(found) < 2:
        raise ValueError(f"values must be two or more, got {len(found)}")
    mean = float(found.mean())
    if mean <= 0:
        raise ValueError(f"values must have a mean above 0, got {mean:g}")
    return float(found.std(ddof=1)) / mean


def interval(
    tasks: Sequence[Any],
    statistic: Callable[[Sequence[Any]], float],
    *,
    draws: int = 2000,
    level: float = 0.95,
    seed: int = 0,
) -> tuple[float, float]:
    """A percentile bootstrap of `statistic` over tasks: a task with all its samples is drawn or not, never a sample alone.

    One task says nothing about others: its interval is that of the statistic's range, which is not known, so that two are needed.
    Draws for which the statistic is not finite are left out; raises ValueError where all are.

    >>> low, high = interval([0.0, 1.0] * 50, lambda drawn: sum(drawn) / len(drawn))
    >>> 0.3 < low < 0.5 < high < 0.7
    True
    """
    checks.whole("draws", draws, low=1)
    checks.number("level", level, above=0, below=1)
    if len(tasks) < 2:
        raise ValueError(f"tasks must be two or more, got {len(tasks)}")
    rng = np.random.default_rng(seed)
    found = np.array(
        [statistic([tasks[n] for n in rng.integers(0, len(tasks), len(tasks))]) for _ in range(draws)], dtype=float
    )
    found = found[np.isfinite(found)]
    if not len(found):
        raise ValueError("the statistic is finite for no draw of tasks")
    low, high = np.quantile(found, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _finite(name: str, values: ArrayLike) -> np.ndarray[Any, np.dtype[np.float64]]:
    found = np.asarray(values, dtype=np.float64)
    if found.ndim != 1 or not len(found) or not np.isfinite(found).all():
        raise ValueError(f"{name} must be one or more finite numbers, got {checks.shown(values)}")
    return found
