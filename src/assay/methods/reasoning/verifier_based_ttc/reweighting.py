"""The best distribution over sampled traces that stays near the base policy."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np

from assay import checks


def reweighted(rewards: Sequence[float], radius: float, *, divergence: Literal["chi2", "kl"] = "chi2") -> np.ndarray:
    """Weights of traces, adding up to 1, with the largest mean reward within a ball around the base, of which the
    traces are samples.

    "chi2": sum over traces of (n w - 1)^2 / n at most `radius`; the solution is linear in the reward, cut at 0. "kl":
    KL(w || base) at most `radius`, in nats; the solution is exponential in the reward. Radius 0 gives the base, all
    traces alike; where the ball holds it, all weight lies on the best traces. The limit is part of the method: a
    learned reward is exploited where nothing holds it.

    >>> reweighted([0.0, 0.0, 1.0, 1.0], 0.0).tolist(), reweighted([0.0, 0.0, 1.0, 1.0], 1.0).tolist()
    ([0.25, 0.25, 0.25, 0.25], [0.0, 0.0, 0.5, 0.5])
    """
    known = np.array([checks.number("rewards", one) for one in rewards])
    radius = checks.number("radius", radius, low=0)
    checks.choice("divergence", divergence, ("chi2", "kl"))
    if not len(known):
        raise ValueError("rewards must hold at least one trace, got none")
    known = known / (float(np.abs(known).max()) or 1.0)  # so that no difference overflows
    n, spread = len(known), float(np.ptp(known))
    if spread == 0 or radius == 0:
        return np.full(n, 1 / n)
    unit = (known - known.max()) / spread  # in [-1, 0]
    best = (unit == 0) / (unit == 0).sum()
    share = float((unit == 0).mean())
    if radius >= (1 / share - 1 if divergence == "chi2" else -math.log(share)):
        return np.asarray(best)
    at = _linear if divergence == "chi2" else _exponential
    low, high = 0.0, 1.0
    while _distance(at(unit, high), divergence) < radius:
        low, high = high, 2 * high
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if _distance(at(unit, middle), divergence) <= radius else (low, middle)
    return at(unit, low)


def _distance(weights: np.ndarray, divergence: str) -> float:
    ratio = weights * len(weights)
    if divergence == "chi2":
        return float(((ratio - 1) ** 2).mean())
    return float((weights[weights > 0] * np.log(ratio[weights > 0])).sum())


def _exponential(unit: np.ndarray, slope: float) -> np.ndarray:
    raw = np.exp(slope * unit)
    return np.asarray(raw / raw.sum())


def _linear(unit: np.ndarray, slope: float) -> np.ndarray:
    """The cut line of this slope whose mean is 1: its height is found among the numbers of traces that it leaves."""
    ordered = np.sort(unit)[::-1]
    kept = np.arange(1, len(unit) + 1)
    heights = (len(unit) - slope * np.cumsum(ordered)) / kept  # of the line through the kept best ones
    fine = np.flatnonzero(heights + slope * ordered >= 0)[-1]
    raw = np.maximum(heights[fine] + slope * unit, 0.0)
    return np.asarray(raw / raw.sum())


def best_of_n_weights(scores: Sequence[float], N: int) -> np.ndarray:
    """How often each of these traces is the one chosen when N of them, drawn with replacement, are scored and the best
    is taken.

    Equal ones share. With scores that are 1 for right traces and 0 for wrong ones the right ones together have 1 - (1
    - p)^N.

    >>> best_of_n_weights([1.0, 0.0, 0.0, 0.0], 2).tolist()
    [0.4375, 0.1875, 0.1875, 0.1875]
    """
    known = np.array([checks.number("scores", one) for one in scores])
    N = checks.whole("N", N, low=1)
    if not len(known):
        raise ValueError("scores must hold at least one trace, got none")
    below = (known[None, :] < known[:, None]).mean(1)
    same = (known[None, :] == known[:, None]).mean(1)
    return np.asarray(((below + same) ** N - below**N) / (same * len(known)))
