"""From samples drawn once: coverage and accuracy at every N, without a bias and without drawing again.

`n` samples of an item stand for all sets of `N <= n` of them; where the mean over all sets has a closed form it is used, elsewhere sets are
drawn. Intervals resample items, never samples.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from scipy.special import gammaln

from assay import checks

Selector = Callable[[Sequence[int]], int]
"""Which of the samples with these numbers is chosen: a number among them."""


def coverage(correct: int, n: int, N: int) -> float:
    """The share of the sets of N out of n samples that hold a right one, when `correct` of the n are right: 1 - C(n - c, N) / C(n, N).

    Without a bias for the probability that one of N samples is right. Raises ValueError unless 0 <= correct <= n and 1 <= N <= n.

    >>> coverage(1, 4, 2), coverage(0, 4, 4), coverage(3, 4, 2)
    (0.5, 0.0, 1.0)
    """
    n = checks.whole("n", n, low=1)
    correct, N = checks.whole("correct", correct, low=0, high=n), checks.whole("N", N, low=1, high=n)
    if n - correct < N:
        return 1.0
    if not correct:
        return 0.0
    wrong = n - correct
    lost = gammaln(wrong + 1) - gammaln(wrong - N + 1) - gammaln(n + 1) + gammaln(n - N + 1)
    return round(float(-np.expm1(lost)), 15)


def subsets(n: int, N: int, draws: int, seed: int = 0) -> list[list[int]]:
    """`draws` sets of N of n numbers, each in a random order, fixed by the seed; all of them once where there are no more (N = n, N = 1).

    Raises ValueError unless 1 <= N <= n.

    >>> subsets(3, 1, 100), sorted(subsets(2, 2, 100)[0])
    ([[0], [1], [2]], [0, 1])
    """
    n = checks.whole("n", n, low=1)
    N, draws = checks.whole("N", N, low=1, high=n), checks.whole("draws", draws, low=1)
    if N == 1 and n <= draws:
        return [[i] for i in range(n)]
    random = np.random.default_rng(checks.whole("seed", seed, low=0))
    return [random.permutation(n)[:N].tolist() for _ in range(1 if n == N else draws)]


def accuracy_at(right: Sequence[bool], N: int, select: Selector, *, draws: int = 64, seed: int = 0) -> float:
    """How often `select` chooses a right sample out of N of them, on average over sets of the samples there are.

    >>> right = [True, False, False, False]
    >>> accuracy_at(right, 4, min), accuracy_at(right, 1, min)
    (1.0, 0.25)
    """
    found = []
    for members in subsets(len(right), N, draws, seed):
        chosen = select(members)
        if chosen not in members:
            raise ValueError(f"select must choose one of {members}, got {checks.shown(chosen)}")
        found.append(bool(right[chosen]))
    return float(np.mean(found))


def over_items(
    values: Sequence[float], *, draws: int = 2000, seed: int = 0, level: float = 0.95
) -> tuple[float, float, float]:
    """The mean over items with a bootstrap interval over them, (mean, low, high). Raises ValueError without a value.

    >>> over_items([1.0, 1.0, 1.0])
    (1.0, 1.0, 1.0)
    """
    if not len(values):
        raise ValueError("values must hold at least one item, got none")
    level = checks.number("level", level, above=0, below=1)
    known = np.array([checks.number("values", value) for value in values])
    random = np.random.default_rng(checks.whole("seed", seed, low=0))
    means = known[random.integers(0, len(known), (checks.whole("draws", draws, low=1), len(known)))].mean(1)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(known.mean()), float(low), float(high)
