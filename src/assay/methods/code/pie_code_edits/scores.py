"""What k rewritten programs are worth: the best of them that is right, and never worse than the program that was there."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from assay import checks
from assay.methods.core.programs.estimates import pass_at_k

FASTER = 1.1
"""A program counts as optimised from this speed-up on."""
THRESHOLDS = (1.1, 1.25, 1.5, 2.0, 3.0, 5.0, 10.0)


@dataclass(frozen=True)
class Edits:
    """The cost of a program, and those of its samples in the order in which they were drawn; None for one that is wrong.

    One meter, the same inputs. Raises ValueError for a cost that is not above 0.
    """

    source: float
    costs: tuple[float | None, ...]

    def __post_init__(self) -> None:
        checks.number("source", self.source, above=0)
        for cost in self.costs:
            if cost is not None:
                checks.number("costs", cost, above=0)

    def first(self, k: int) -> tuple[float | None, ...]:
        """The first k samples. Raises ValueError where there are fewer: a k that is larger has no figure."""
        return self.costs[: checks.whole("k", k, low=1, high=len(self.costs))]


def correct_at_k(edits: Edits, k: int, *, expected: bool = False) -> float:
    """1 where one of the first k samples is right, else 0; `expected` is the chance of it for k samples in any order (pass@k).

    >>> correct_at_k(Edits(2.0, (None, 1.0)), 1), correct_at_k(Edits(2.0, (None, 1.0)), 1, expected=True)
    (0.0, 0.5)
    """
    return _reached(edits, k, 0.0, expected)


def runtime_best_at_k(edits: Edits, k: int) -> float:
    """The least cost of the right ones among the first k samples; infinite where none is right."""
    return min((cost for cost in edits.first(k) if cost is not None), default=math.inf)


def speedup_best_at_k(edits: Edits, k: int, *, expected: bool = False) -> float:
    """max(1, source / runtime_best@k): who gets nothing better keeps what there was, so that a failure costs nothing.

    Of the first k samples, as the paper counts; `expected` is the mean over all choices of k samples, which does not depend on their
    order: unbiased for k fresh samples of the same model. At least 1, and it does not fall as k grows. Not for samples that were sorted
    or filtered by their cost. Raises ValueError for k above the number of samples.

    >>> speedup_best_at_k(Edits(6.0, (None, 3.0, 2.0)), 2), speedup_best_at_k(Edits(6.0, (None, 3.0, 2.0)), 2, expected=True)
    (2.0, 2.6666666666666665)
    """
    seen = edits.first(k)
    if not expected:
        return max(1.0, edits.source / runtime_best_at_k(edits, k))
    n = len(edits.costs)
    worth = sorted(1.0 if cost is None else max(1.0, edits.source / cost) for cost in edits.costs)
    choices = math.comb(n, len(seen))
    # the r-th smallest is the best of k in C(r-1, k-1) of all choices
    return math.fsum(value * (math.comb(at, k - 1) / choices) for at, value in enumerate(worth) if at >= k - 1)


def best_at_k(edits: Sequence[Edits], k: int, *, expected: bool = False) -> float:
    """The mean of `speedup_best_at_k` over programs: a few very large ones decide about it (`Scores.geometric_mean`)."""
    return _mean(edits, [speedup_best_at_k(one, k, expected=expected) for one in edits])


def opt_rate(edits: Sequence[Edits], k: int, *, threshold: float = FASTER, expected: bool = False) -> float:
    """%Opt as a share: programs for which one of k samples is right and at least `threshold` times as fast.

    Falls with the threshold, rises with k, and is at most correct@k. Raises ValueError for a threshold below 1.
    """
    checks.number("threshold", threshold, low=1)
    return _mean(edits, [_reached(one, k, threshold, expected) for one in edits])


@dataclass(frozen=True)
class Scores:
    """All figures at one k, each a mean over `programs`. `slower` is the share of the right ones among the samples that cost more
    than the program that was there, which max(1, ...) hides; None where none is right. `optimised` is %Opt by threshold, as shares."""

    k: int
    programs: int
    correct: float
    speedup: float
    geometric_mean: float
    optimised: dict[float, float]
    slower: float | None


def scores(edits: Sequence[Edits], k: int, *, expected: bool = False) -> Scores:
    """The figures over programs of the first k samples of each, or (`expected`) of k in any order.

    The geometric mean is of each program's speed-up. Raises ValueError for no programs, and for one with fewer than k samples.

    >>> scores([Edits(8.0, (2.0,)), Edits(8.0, (16.0,))], 1)  # doctest: +ELLIPSIS
    Scores(k=1, programs=2, correct=1.0, speedup=2.5, geometric_mean=2.0, optimised={1.1: 0.5, ...}, slower=0.5)
    """
    each = [speedup_best_at_k(one, k, expected=expected) for one in edits]
    looked_at = [(one.source, cost) for one in edits for cost in (one.costs if expected else one.first(k))]
    right = [(source, cost) for source, cost in looked_at if cost is not None]
    return Scores(
        k,
        len(edits),
        _mean(edits, [correct_at_k(one, k, expected=expected) for one in edits]),
        _mean(edits, each),
        math.exp(_mean(edits, [math.log(value) for value in each])),
        {limit: opt_rate(edits, k, threshold=limit, expected=expected) for limit in THRESHOLDS},
        sum(cost > source for source, cost in right) / len(right) if right else None,
    )


def _reached(edits: Edits, k: int, threshold: float, expected: bool) -> float:
    seen = edits.costs if expected else edits.first(k)
    good = [cost is not None and edits.source / cost >= threshold for cost in seen]
    return pass_at_k(len(good), sum(good), k) if expected else float(any(good))


def _mean(edits: Sequence[Edits], values: Sequence[float]) -> float:
    if not edits:
        raise ValueError("edits must be of one program or more, got none")
    return math.fsum(values) / len(values)
