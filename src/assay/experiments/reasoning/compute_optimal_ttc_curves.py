"""Curves of accuracy over what was spent, and how many times less one takes than another where both are right as often."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from assay.experiments.reasoning.compute_optimal_ttc_units import Counted, Unit
from assay.methods.reasoning.compute_optimal_ttc import Outcome

DRAWS = 2000  # resamplings of the questions
REACHED = 0.9
"""So much of the way from one sample to the best accuracy is where costs are compared: near the best itself curves are flat, and whose
accuracy is a hair higher there would decide about many generations."""


@dataclass(frozen=True)
class Curve:
    """Points of a way to spend, (points, units) each: generations, tokens of all kinds, and how often it is right."""

    generations: np.ndarray
    tokens: np.ndarray
    right: np.ndarray


def curve(units: Sequence[Unit], found: Sequence[Outcome]) -> Curve:
    """The points of one outcome a unit and budget."""
    by = {(one.item, one.n): one for one in found}
    grid = [[by[u.name, n] for u in units] for n in sorted({one.n for one in found})]
    return Curve(
        np.array([[one.used if isinstance(one, Counted) else float(one.n) for one in row] for row in grid]),
        np.array([[one.tokens for one in row] for row in grid]),
        np.array([[one.accuracy for one in row] for row in grid]),
    )


def fewest(costs: np.ndarray, right: np.ndarray, target: float) -> float:
    """The least cost at which the accuracy reaches `target`: between two points on the line through them, infinite where it never does.

    >>> fewest(np.array([1.0, 2.0, 4.0]), np.array([0.2, 0.4, 0.4]), 0.3)
    1.5
    """
    best, before = -np.inf, 0.0
    order = np.argsort(costs)
    for cost, value in zip(costs[order], right[order], strict=True):
        if value >= target:
            return float(cost if best == -np.inf else before + (cost - before) * (target - best) / (value - best))
        if value > best:
            best = value
        before = cost
    return float("inf")


def saving(
    base: Curve, other: Curve, weights: np.ndarray, what: str = "generations", reached: float = REACHED
) -> float:
    """The cost of `base` over that of `other` where they are right as often: `reached` of the way from the first point of `base` to where
    it is at its best, or `other` where that is less.

    `weights` are the units', with sum 1. Below 1 `other` needs more. Where one of them is never right nothing is compared: 1.
    """
    right = [each.right @ weights for each in (base, other)]
    best, first = min(float(values.max()) for values in right), float(right[0][0])
    target = first + reached * (best - first) if best > first else best
    if target <= 0:
        return 1.0
    costs = [getattr(each, what) @ weights for each in (base, other)]
    ratio = fewest(costs[0], right[0], target) / fewest(costs[1], right[1], target)
    return round(ratio, 12)  # rounding of sums makes no difference between equal curves


def resampled(units: Sequence[Unit], draws: int = DRAWS, seed: int = 0) -> list[np.ndarray]:
    """Weights of the units with questions drawn again; all wordings of a question go together."""
    questions = sorted({u.question for u in units})
    place = np.array([questions.index(u.question) for u in units])
    chance = np.random.default_rng(seed)
    found = []
    for _ in range(draws):
        counts = np.bincount(chance.integers(0, len(questions), len(questions)), minlength=len(questions))[place]
        found.append(counts / counts.sum())
    return found


def interval(base: Curve, other: Curve, draws: Sequence[np.ndarray], what: str = "generations") -> dict[str, float]:
    """The saving on all units, and the middle 95 % of it over the draws."""
    n = base.right.shape[1]
    low, high = np.quantile([saving(base, other, weights, what) for weights in draws], [0.025, 0.975])
    return {"median": saving(base, other, np.full(n, 1 / n), what), "low": float(low), "high": float(high)}


def averaged(curves: Sequence[Curve]) -> Curve:
    """The mean of curves with the same budgets."""
    stacked = [np.mean([getattr(c, name) for c in curves], axis=0) for name in ("generations", "tokens", "right")]
    return Curve(*stacked)
