"""Which answer to give, of several: by count, by score, by the sum of scores.

Answers are compared as they are: make them canonical first (`answers.canonical`). "" stands for no answer and is never voted for where
another is there. Of equal ones the first wins, everywhere.
"""

from __future__ import annotations

from collections.abc import Sequence

from assay import checks


def best_of_n(scores: Sequence[float]) -> int:
    """The place of the largest score, the first of equal ones. Raises ValueError without any or for NaN.

    >>> best_of_n([0.1, 0.7, 0.7])
    1
    """
    known = [checks.number("scores", score) for score in scores]
    if not known:
        raise ValueError("scores must hold at least one, got none")
    return max(range(len(known)), key=lambda i: (known[i], -i))


def votes(answers: Sequence[str], weights: Sequence[float] | None = None) -> dict[str, float]:
    """The weight of each answer, in the order of their first; every sample weighs 1 without `weights`.

    "" is left out unless there is nothing else. Raises ValueError without an answer, for another number of weights, and for one below 0.

    >>> votes(["7", "8", "7", ""])
    {'7': 2.0, '8': 1.0}
    """
    if not answers:
        raise ValueError("answers must hold at least one, got none")
    weights = [1.0] * len(answers) if weights is None else [checks.number("weights", w, low=0) for w in weights]
    if len(weights) != len(answers):
        raise ValueError(f"weights must be as many as answers, {len(answers)}, got {len(weights)}")
    sums: dict[str, float] = {}
    for answer, weight in zip(answers, weights, strict=True):
        sums[answer] = sums.get(answer, 0.0) + weight
    if len(sums) > 1:
        sums.pop("", None)
    return sums


def majority(answers: Sequence[str]) -> str:
    """The most frequent answer, the first of equal ones.

    >>> majority(["8", "7", "7", ""]), majority(["8", "7"]), majority(["", ""])
    ('7', '8', '')
    """
    return weighted(answers, None)


def weighted(answers: Sequence[str], weights: Sequence[float] | None) -> str:
    """The answer whose samples weigh most together (best-of-N weighted): the sum of their scores, which must not be below 0.

    >>> weighted(["7", "8", "8"], [0.9, 0.4, 0.4]), weighted(["7", "8", "8"], [0.9, 0.5, 0.5])
    ('7', '8')
    """
    sums = votes(answers, weights)
    most = max(sums.values())
    return next(answer for answer, weight in sums.items() if weight == most)


def min_max(scores: Sequence[float]) -> list[float]:
    """Scores stretched to [0, 1] among themselves; all 1 where they are equal.

    >>> min_max([2.0, 3.0, 4.0]), min_max([5.0, 5.0])
    ([0.0, 0.5, 1.0], [1.0, 1.0])
    """
    known = [checks.number("scores", score) for score in scores]
    if not known:
        return []
    low, high = min(known), max(known)
    return [1.0 if high == low else (score - low) / (high - low) for score in known]
