"""Scaling over Scaling (TTSPM): when does one more sample, or one more round of rethinking, stop paying?

N independent samples, each right with probability p, hold a right one with probability 1 - (1 - p)^N; a chain that rethinks until it is
right gives the same. With a ceiling F_max the curve and the gain of one more are

    F(N) = F_max (1 - (1 - p)^N),    dF(N) = F(N + 1) - F(N) = F_max p (1 - p)^N,

and the saturation point for a threshold eps is the first N with dF(N) <= eps: ceil(ln(eps / (F_max p)) / ln(1 - p)), and 0 where
F_max p <= eps.

That is one item's curve, and the paper fits it to the mean over items too, which has another form: items differ, and a mean of
exponentials falls more slowly than one exponential. `BetaTTSPM` (our extension) lets p follow a Beta distribution over items:
E[(1 - p)^N] = B(a, b + N) / B(a, b). `Chain` lets rounds of rethinking spoil a right answer, which the paper's absorbing chain does not.

    counts = [sum(one.right) for one in samples]          # right ones of n samples, an item each
    model = BetaTTSPM.fit(counts, n=8)
    model.predict(64), model.saturation(0.01)
    plan([c for c in counts], n=8, total=600)             # samples for each item, 600 in all

Source: arXiv 2505.20522, sections on the parallel and the sequential model; closed forms derived again. The paper names no code.

When NOT to use it: coverage ("one of them is right") is not accuracy. Without a verifier the curve of a majority vote saturates lower, and
can fall; F_max then has to be fitted to that curve (`TTSPM.fit`). With N p far below 1 everywhere, F_max and p are nearly unidentifiable:
look at the interval (`TTSPM.fit(...).interval`).
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.optimize import least_squares, minimize
from scipy.special import betaln

from assay import checks

LEAST = 1e-9  # of a probability that is fitted
MOST_N = 10**9  # a saturation point beyond it is none


@dataclass(frozen=True)
class TTSPM:
    """F(N) = F_max (1 - (1 - p)^N): the paper's model of one item, or of a set of equal ones. Raises ValueError outside [0, 1].

    >>> model = TTSPM(F_max=0.8, p=0.25)
    >>> [round(float(model.predict(N)), 4) for N in (0, 1, 2)], round(float(model.marginal(1)), 4)
    ([0.0, 0.2, 0.35], 0.15)
    >>> model.saturation(0.01)
    11
    """

    F_max: float
    p: float
    interval: tuple[tuple[float, float], tuple[float, float]] | None = (
        None  # 95 % of F_max and of p, where they were fitted
    )

    def __post_init__(self) -> None:
        checks.number("F_max", self.F_max, low=0, high=1)
        checks.number("p", self.p, low=0, high=1)

    @classmethod
    def fit(cls, N: Sequence[float], accuracy: Sequence[float], *, trials: Sequence[float] | float = 1.0) -> TTSPM:
        """Least squares on a curve, weighted by the binomial variance of each point; both parameters in (0, 1].

        `N` are numbers of samples, `accuracy` what was reached with them, `trials` how many items each point is a mean over. The interval
        is the linearised one, cut at 0 and 1; it treats the points as independent, which points of one set of samples are not. Raises
        ValueError for fewer than two points, or lists of different lengths.

        >>> exact = TTSPM(0.7, 0.2)
        >>> found = TTSPM.fit([1, 2, 4, 8], [exact.predict(N) for N in (1, 2, 4, 8)])
        >>> round(found.F_max, 6), round(found.p, 6)
        (0.7, 0.2)
        """
        x = np.array([checks.number("N", value, low=0) for value in N])
        y = np.array([checks.number("accuracy", value, low=0, high=1) for value in accuracy])
        if len(x) != len(y) or len(x) < 2:
            raise ValueError(
                f"N and accuracy must be two equally long lists of at least two, got {len(x)} and {len(y)}"
            )
        many = np.array(
            [
                checks.number("trials", t, above=0)
                for t in (trials if isinstance(trials, Sequence) else [trials] * len(x))
            ]
        )
        if len(many) != len(x):
            raise ValueError(f"trials must be one number or as many as N, {len(x)}, got {len(many)}")
        # A share near 0 or 1 would have next to no variance: half an observation is added.
        smoothed = (y * many + 0.5) / (many + 1)
        weights = np.sqrt(many / (smoothed * (1 - smoothed)))

        def residuals(theta: np.ndarray) -> np.ndarray:
            return np.asarray(weights * (theta[0] * -np.expm1(x * np.log1p(-theta[1])) - y))

        ends = ([LEAST, LEAST], [1.0, 1.0 - 1e-12])
        starts = [(top, p) for top in (max(y.max(), 0.05), 1.0) for p in (0.02, 0.2, 0.7)]
        fits = [
            least_squares(residuals, np.clip(s, *ends), bounds=ends, xtol=1e-15, ftol=1e-15, gtol=1e-15) for s in starts
        ]
        best = min(fits, key=lambda found: float(found.cost))
        F_max, p = (float(value) for value in best.x)
        return cls(F_max, p, _interval(best.jac, (F_max, p)))

    def predict(self, N: Any) -> Any:
        """F(N), for a number or an array of them. Raises ValueError for one below 0."""
        x = _numbers(N)
        if self.p == 1:
            return np.where(x == 0, 0.0, self.F_max)[()]
        return self.F_max * -np.expm1(x * math.log1p(-self.p))

    def marginal(self, N: Any) -> Any:
        """dF(N), what the (N + 1)-th adds."""
        x = _numbers(N)
        if self.p == 1:
            return np.where(x == 0, self.F_max, 0.0)[()]
        return self.F_max * self.p * np.exp(x * math.log1p(-self.p))

    def saturation(self, eps: float) -> int:
        """The first N whose next sample adds at most `eps` (above 0); with `eps = kappa / value` the cost-aware stop: a unit costs kappa, a
        solved item is worth `value`."""
        eps = checks.number("eps", eps, above=0)
        first = self.F_max * self.p
        if first <= eps:
            return 0
        if self.p == 1:
            return 1
        guess = max(int(math.ceil(math.log(eps / first) / math.log1p(-self.p))), 0)
        # The closed form rounds: step to the exact first crossing.
        while guess > 0 and self.marginal(guess - 1) <= eps:
            guess -= 1
        while self.marginal(guess) > eps:
            guess += 1
        return guess


@dataclass(frozen=True)
class BetaTTSPM:
    """The mean over items whose p follows Beta(a, b): F(N) = F_max (1 - B(a, b + N) / B(a, b)). Raises ValueError unless a, b > 0.

    `F_max` below 1 stands for a share of items that no number of samples solves.

    >>> model = BetaTTSPM(1.0, 1.0)
    >>> [round(float(model.predict(N)), 4) for N in (1, 2, 3)]
    [0.5, 0.6667, 0.75]
    """

    a: float
    b: float
    F_max: float = 1.0

    def __post_init__(self) -> None:
        checks.number("a", self.a, above=0)
        checks.number("b", self.b, above=0)
        checks.number("F_max", self.F_max, low=0, high=1)

    @classmethod
    def fit(cls, correct: Sequence[int], n: int) -> BetaTTSPM:
        """Maximum likelihood of the beta-binomial: `correct[i]` of `n` samples of item i were right. F_max is 1.

        Where all items are equally hard the likelihood has its maximum at infinity: a + b is then large (a and b at most 1e6), which is the
        paper's single p. Raises ValueError without an item, or counts outside [0, n].
        """
        n = checks.whole("n", n, low=1)
        counts = np.array([checks.whole("correct", c, low=0, high=n) for c in correct], dtype=float)
        if not len(counts):
            raise ValueError("correct must hold at least one item, got none")

        def loss(theta: np.ndarray) -> float:
            a, b = np.exp(theta)
            return -float((betaln(a + counts, b + n - counts) - betaln(a, b)).sum())

        mean = float(np.clip(counts.mean() / n, 0.5 / n / len(counts), 1 - 0.5 / n / len(counts)))
        bounds = [(math.log(1e-4), math.log(1e6))] * 2
        starts = [np.log([mean * size, (1 - mean) * size]) for size in (0.3, 2.0, 20.0, 1000.0)]
        fits = [minimize(loss, np.clip(s, *bounds[0]), bounds=bounds, method="L-BFGS-B") for s in starts]
        best = min(fits, key=lambda found: float(found.fun))
        a, b = np.exp(best.x)
        return cls(float(a), float(b))

    def predict(self, N: Any) -> Any:
        """F(N), for a number or an array of them."""
        x = _numbers(N)
        return self.F_max * -np.expm1(betaln(self.a, self.b + x) - betaln(self.a, self.b))

    def marginal(self, N: Any) -> Any:
        """dF(N) = F_max B(a + 1, b + N) / B(a, b)."""
        return self.F_max * np.exp(betaln(self.a + 1, self.b + _numbers(N)) - betaln(self.a, self.b))

    def saturation(self, eps: float) -> int:
        """The first N whose next sample adds at most `eps`, above 0; the tail is a power law, so that it can be far out."""
        eps = checks.number("eps", eps, above=0)
        if self.marginal(0) <= eps:
            return 0
        high = 1
        while self.marginal(high) > eps:
            high *= 2
            if high > MOST_N:
                raise ValueError(f"eps must be reached before N = {MOST_N:,}, got {eps}")
        low = high // 2  # marginal(low) > eps, unless low is 0
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.marginal(middle) > eps else (low, middle)
        return high

    def posterior(self, correct: int, n: int) -> BetaTTSPM:
        """What is known of one item of which `correct` of `n` samples were right: the curve of its next samples."""
        n = checks.whole("n", n, low=0)
        correct = checks.whole("correct", correct, low=0, high=n)
        return BetaTTSPM(self.a + correct, self.b + n - correct, self.F_max)


@dataclass(frozen=True)
class Chain:
    """Rounds of rethinking: a wrong answer becomes right with `p_rethink` a round, a right one is forgotten with `p_forget`.

    The paper's chain is `p_forget = 0`: right is absorbing, and `predict(N)` is 1 - (1 - p)^N. Otherwise the share that is right settles at
    p_rethink / (p_rethink + p_forget). Raises ValueError outside [0, 1].

    >>> round(Chain(0.3, 0.1).predict(50), 4), Chain(0.5, 0.0).predict(2)
    (0.75, 0.75)
    """

    p_rethink: float
    p_forget: float = 0.0

    def __post_init__(self) -> None:
        checks.number("p_rethink", self.p_rethink, low=0, high=1)
        checks.number("p_forget", self.p_forget, low=0, high=1)

    @classmethod
    def fit(cls, rounds: Sequence[Sequence[bool]], *, absorbing: bool = False) -> Chain:
        """Maximum likelihood from logged rounds: `rounds[i][t]` is whether item i was right after round t + 1; it begins wrong.

        p_rethink is the successes over the rounds at risk (those that began wrong), p_forget the right answers that were lost over the
        rounds that began right; with `absorbing`, rounds behind the first success are not looked at, as the paper has it. Raises
        ValueError without a round.
        """
        gained = at_risk = lost = held = 0
        for item in rounds:
            right = False
            for now in item:
                now = checks.flag("rounds", now)
                if right and absorbing:
                    break
                if right:
                    held, lost = held + 1, lost + (not now)
                else:
                    at_risk, gained = at_risk + 1, gained + now
                right = now
        if not at_risk:
            raise ValueError("rounds must hold at least one round, got none")
        return cls(gained / at_risk, lost / held if held else 0.0)

    def predict(self, N: int) -> float:
        """The share that is right after N rounds."""
        N = checks.whole("N", N, low=0)
        both = self.p_rethink + self.p_forget
        if not both:
            return 0.0
        return self.p_rethink / both * (1 - (1 - both) ** N)


def plan(
    correct: Sequence[int], n: int, total: int, *, prior: BetaTTSPM | None = None, most: int | None = None
) -> list[int]:
    """How many further samples each item gets, `total` in all, after a pilot in which `correct[i]` of `n` samples were right.

    Each next sample goes to the item whose expected gain is the largest, by the posterior of its p; an item that the pilot solved gets
    none, for a right answer is known there (a verifier that tells is presumed). Greedy is optimal, since gains fall. `prior` is fitted to
    the pilot unless given; at most `most` an item. Less than `total` is given only where all open items have `most`, or none is open.

    >>> plan([4, 0, 0], n=4, total=6, prior=BetaTTSPM(1, 1))
    [0, 3, 3]
    """
    n, total = checks.whole("n", n, low=0), checks.whole("total", total, low=0)
    most = total if most is None else checks.whole("most", most, low=0)
    counts = [checks.whole("correct", c, low=0, high=n) for c in correct]
    prior = BetaTTSPM.fit(counts, n) if prior is None else prior
    found = [0] * len(counts)
    items = [(i, prior.posterior(c, n)) for i, c in enumerate(counts) if not c]
    queue = [(-float(model.marginal(0)), i) for i, model in items]
    models = dict(items)
    heapq.heapify(queue)
    for _ in range(total):
        while queue and found[queue[0][1]] >= most:
            heapq.heappop(queue)
        if not queue:
            break
        _, i = heapq.heappop(queue)
        found[i] += 1
        heapq.heappush(queue, (-float(models[i].marginal(found[i])), i))
    return found


class Stopper:
    """Says while sampling whether one more sample of this item pays: while it is unsolved and its posterior gain is above kappa / value.

        stop = Stopper(model, kappa=tokens_a_sample * price, value=worth_of_a_solved_item)
        while stop.go_on():
            stop.saw(check(draw()))

    >>> stop = Stopper(BetaTTSPM(1, 9), kappa=0.08)
    >>> while stop.go_on():
    ...     stop.saw(False)
    >>> stop.drawn
    3
    """

    def __init__(self, prior: BetaTTSPM, kappa: float, *, value: float = 1.0) -> None:
        self.prior = prior
        self.eps = checks.number("kappa", kappa, low=0) / checks.number("value", value, above=0)
        self.drawn = 0
        self.solved = False

    def saw(self, right: bool) -> None:
        """What the last sample was."""
        self.drawn += 1
        self.solved = self.solved or checks.flag("right", right)

    def go_on(self) -> bool:
        """Whether to draw another. With kappa = 0 it goes on until the item is solved."""
        known = self.prior.posterior(0, self.drawn)
        return not self.solved and known.F_max * known.a / (known.a + known.b) > self.eps


def _numbers(N: Any) -> Any:
    x = np.asarray(N, dtype=float)
    if not np.isfinite(x).all() or (x < 0).any():
        raise ValueError(f"N must be numbers from 0 on, got {checks.shown(N)}")
    return x[()]


def _interval(jacobian: np.ndarray, found: tuple[float, float]) -> tuple[tuple[float, float], tuple[float, float]]:
    """95 % by the curvature at the fit; the whole range where the curvature says nothing."""
    try:
        spread = 1.96 * np.sqrt(np.diag(np.linalg.inv(jacobian.T @ jacobian)))
    except np.linalg.LinAlgError:
        spread = np.array([1.0, 1.0])
    spread = np.where(np.isfinite(spread), spread, 1.0)
    low = [max(value - width, 0.0) for value, width in zip(found, spread, strict=True)]
    high = [min(value + width, 1.0) for value, width in zip(found, spread, strict=True)]
    return (float(low[0]), float(high[0])), (float(low[1]), float(high[1]))
