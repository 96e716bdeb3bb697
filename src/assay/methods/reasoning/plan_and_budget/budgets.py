"""How many tokens each part may take: by its weight and its place, and by the budget model; and the score E3.

`allocate` is what the paper runs: weights times a schedule that decays with the place of a part. `bam_allocate` is what its theory says:
the split that leaves the least uncertainty, where `c`, `beta` and `a` of each part are known (`fit_uncertainty` finds them from
measurements). The released code never estimates them; credits and decay stand in for them there.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal, get_args

import numpy as np

from assay import checks

Schedule = Literal["constant", "linear", "polynomial", "exponential", "cosine"]
SCHEDULES: tuple[Schedule, ...] = get_args(Schedule)
POWER, BASE, OFFSET = 2, 0.9, 0.1
HAIR = Fraction(1, 10**9)
LEVEL_TOKENS = {1: 200, 2: 250, 3: 350, 4: 450, 5: 600}
"""The paper's total budget of a question by its level."""


def decay(schedule: Schedule, n: int) -> list[float]:
    """What the parts at places 0 to n - 1 weigh: by a schedule that never grows with the place.

    constant: 1; linear: n - i; polynomial: (n - i)^2; exponential: 0.9^i; cosine: (1 + cos(pi i / (n - 1))) / 2 + 0.1, and 1 for n = 1.
    Raises ValueError for an unknown schedule and for n below 1.

    >>> decay("linear", 3), decay("polynomial", 3), [round(x, 2) for x in decay("cosine", 3)]
    ([3.0, 2.0, 1.0], [9.0, 4.0, 1.0], [1.1, 0.6, 0.1])
    """
    schedule, n = checks.choice("schedule", schedule, SCHEDULES), checks.whole("n", n, low=1)
    places = range(n)
    if schedule == "constant":
        return [1.0] * n
    if schedule == "linear":
        return [float(n - i) for i in places]
    if schedule == "polynomial":
        return [float((n - i) ** POWER) for i in places]
    if schedule == "exponential":
        return [BASE**i for i in places]
    return [1.0] if n == 1 else [(1 + math.cos(math.pi * i / (n - 1))) / 2 + OFFSET for i in places]


def allocate(weights: Sequence[float], total: int, schedule: Schedule = "constant", *, least: int = 0) -> list[int]:
    """`total` tokens among parts, by weight times `decay`: whole numbers that sum to `total` exactly.

    Shares are rounded down; what is left goes one by one to the largest shares (the earlier of equal ones first), not to the largest
    remainders. `least` tokens are given to every part beforehand (our choice; 0 in the paper, where late parts may get nothing). Equal
    weights and a constant schedule are the uniform split. Scaling all weights changes nothing.

    Raises ValueError for weights that are negative or all 0, and where `least` for each is more than the total.

    When NOT to use it: where the parts' difficulty was measured, `bam_allocate` is the better split.

    >>> allocate([1, 1, 1], 100, "polynomial"), allocate([20, 80], 11), allocate([1, 1], 5, least=2)
    ([65, 28, 7], [2, 9], [3, 2])
    """
    known = [checks.number("weights", weight, low=0) for weight in weights]
    if not known or not any(known):
        raise ValueError(f"weights must hold at least one above 0, got {checks.shown(list(weights))}")
    total, least = checks.whole("total", total, low=0), checks.whole("least", least, low=0)
    rest = total - least * len(known)
    if rest < 0:
        raise ValueError(f"total must be at least {least} for each of {len(known)} parts, got {total}")
    # in fractions, so that no sum comes out above the total; what lies a hair below a whole number (0.3 of 10) counts as it
    shares = [Fraction(weight) * Fraction(at) for weight, at in zip(known, decay(schedule, len(known)), strict=True)]
    whole = sum(shares)
    given = [int(share * rest / whole + HAIR) for share in shares]
    order = sorted(range(len(shares)), key=lambda i: (-shares[i], i))
    for i in order[: rest - sum(given)]:
        given[i] += 1
    return [least + tokens for tokens in given]


# ------------------------------------------------------------------------------------------------------------ the budget model


@dataclass(frozen=True)
class Uncertainty:
    """What is uncertain about a part after b tokens: c / b^beta + a. c falls with thinking, a does not.

    >>> Uncertainty(c=2.0, beta=1.0, a=0.1)(4.0)
    0.6
    """

    c: float
    beta: float
    a: float = 0.0

    def __post_init__(self) -> None:
        checks.number("c", self.c, above=0)
        checks.number("beta", self.beta, above=0)
        checks.number("a", self.a, low=0)

    def __call__(self, tokens: float) -> float:
        """At `tokens` above 0."""
        return self.c / checks.number("tokens", tokens, above=0) ** self.beta + self.a


def bam_allocate(parts: Sequence[Uncertainty], total: float) -> np.ndarray:
    """The split of `total` among parts that leaves the least uncertainty in all: (parts,), float64, of sum `total`.

    There c beta / b^(beta + 1) is the same for all parts, lambda (the Lagrange condition), so that b = (c beta / lambda)^(1 / (beta + 1)).
    lambda is found by bisection of its logarithm; with one beta for all, b is proportional to c^(1 / (beta + 1)). `a` plays no part.

    Raises ValueError without parts, and for a total that is not above 0.

    When NOT to use it: with c and beta guessed. They come from measurements (`fit_uncertainty`), which cost tokens themselves.

    >>> bam_allocate([Uncertainty(1, 1), Uncertainty(4, 1)], 30).tolist()
    [10.0, 20.0]
    """
    total = checks.number("total", total, above=0)
    if not parts:
        raise ValueError("parts must hold at least one, got none")
    c, beta = np.array([part.c for part in parts]), np.array([part.beta for part in parts])
    root = 1 / (beta + 1)
    if (beta == beta[0]).all():
        share = (c / c.max()) ** root
        return total * share / share.sum()
    slope = np.log(c * beta)  # log of the gain of the first token, at b = 1

    def logs(price: float) -> np.ndarray:
        return (slope - price) * root

    # at `low` one part alone takes the whole total or more, at `high` each takes at most its n-th of it
    low = float((slope - (beta + 1) * math.log(total)).max())
    high = float((slope - (beta + 1) * math.log(total / len(parts))).max())
    for _ in range(200):
        middle = (low + high) / 2
        if np.logaddexp.reduce(logs(middle)) > math.log(total):
            low = middle
        else:
            high = middle
    found = np.exp(logs(high))
    return found * (total / found.sum())  # what is left of rounding


def fit_uncertainty(tokens: Sequence[float], values: Sequence[float]) -> Uncertainty:
    """The c, beta and a (at least 0) that come closest to measured `values` after `tokens`, by least squares.

    beta is looked for in [0.05, 5] (our choice), and c and a follow from it. Raises ValueError for fewer than three points, for lists of
    different lengths, tokens that are not above 0 or all equal, and for values that do not fall with tokens (c would be 0).

    >>> found = fit_uncertainty([1, 2, 4, 8], [1 / b + 0.25 for b in (1, 2, 4, 8)])
    >>> round(found.c, 3), round(found.beta, 3), round(found.a, 3)
    (1.0, 1.0, 0.25)
    """
    from scipy.optimize import minimize_scalar, nnls

    at = np.array([checks.number("tokens", each, above=0) for each in tokens])
    seen = np.array([checks.number("values", each, low=0) for each in values])
    if len(at) != len(seen) or len(at) < 3:
        raise ValueError(f"values must be as many as tokens and at least 3, got {len(seen)} for {len(at)}")
    if (at == at[0]).all():
        raise ValueError(f"tokens must differ, got {checks.shown(list(tokens))}")

    def solved(beta: float) -> tuple[np.ndarray, float]:
        found, error = nnls(np.stack([at**-beta, np.ones(len(at))], 1), seen)
        return found, float(error)

    grid = np.geomspace(0.05, 5, 60)
    best = int(np.argmin([solved(beta)[1] for beta in grid]))
    ends = grid[max(best - 1, 0)], grid[min(best + 1, len(grid) - 1)]
    beta = float(minimize_scalar(lambda x: solved(x)[1], bounds=ends, method="bounded", options={"xatol": 1e-9}).x)
    (c, a), _ = solved(beta)
    if not c > 0:
        raise ValueError(f"values must fall with tokens, got {checks.shown(list(values))}")
    return Uncertainty(float(c), beta, float(a))


def e3(accuracy: float, tokens: float) -> float:
    """The paper's score of efficiency: A (A / T) = A^2 / T, A in per cent and T the mean completion tokens of an answer.

    Rewards accuracy twice: to halve the tokens at the price of a third of the accuracy loses. Raises ValueError for an accuracy outside
    [0, 100] and tokens that are not above 0.

    >>> e3(50, 1000), e3(50, 500), e3(100, 1000)
    (2.5, 5.0, 10.0)
    """
    return checks.number("accuracy", accuracy, low=0, high=100) ** 2 / checks.number("tokens", tokens, above=0)
