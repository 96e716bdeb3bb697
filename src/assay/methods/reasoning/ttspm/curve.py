"""One chance for all items: F(N) = F_max (1 - (1 - p)^N), of N samples or N rounds of rethinking."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from assay import checks

_GRID = 1 / (1 + np.exp(-np.linspace(-14, 14, 561)))
"""Chances among which a fit looks first: from about a millionth to as near to 1, evenly in the logit."""


_TINY = 1e-3
"""Below it 1 - p loses digits that its powers would need."""


def first_crossing(marginal: Callable[[int], float], eps: float) -> int:
    """The least N at which `marginal(N)`, which never rises and comes as near to 0 as one likes, is `eps` at most.

    Raises ValueError unless eps > 0.
    """
    eps = checks.number("eps", eps, above=0)
    if marginal(0) <= eps:
        return 0
    low, high = 0, 1  # marginal(low) > eps
    while marginal(high) > eps:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if marginal(middle) > eps else (low, middle)
    return high


@dataclass(frozen=True)
class TTSPM:
    """The accuracy that `N` units of compute reach: `ceiling` (1 - (1 - `p`)^N).

    A unit is a sample (parallel scaling, `p` the chance that a sample is right) or a round of rethinking (sequential
    scaling, `p` the chance that a round turns a wrong answer into a right one, where right answers stay). `ceiling` is
    what the way of choosing reaches with any number of units: 1 for an oracle on items that can all be solved, less
    for a vote. Source: arXiv 2505.20522, sections on the two models; the closed forms are derived anew.

    When NOT to use it: for a mean over unequal items, `p` has no meaning for any one of them, and predictions beyond
    the sizes of the fit are too high; use `BetaTTSPM`. A vote may fall with N, which this curve cannot.

    Raises ValueError and TypeError for numbers outside [0, 1].

    >>> model = TTSPM(p=0.5, ceiling=0.8)
    >>> model.predict(1), round(model.predict(3), 6), round(model.marginal(2), 6), model.saturation(0.1)
    (0.4, 0.7, 0.1, 2)
    """

    p: float
    ceiling: float = 1.0

    def __post_init__(self) -> None:
        checks.number("p", self.p, low=0, high=1)
        checks.number("ceiling", self.ceiling, low=0, high=1)

    def predict(self, N: int) -> float:
        """Accuracy with N units; 0 with none."""
        N = checks.whole("N", N, low=0)
        if self.p == 1:
            return self.ceiling if N else 0.0
        return self.ceiling * -math.expm1(N * math.log1p(-self.p))

    def marginal(self, N: int) -> float:
        """What unit N + 1 adds: predict(N + 1) - predict(N)."""
        N = checks.whole("N", N, low=0)
        fails = (1 - self.p) ** N if self.p > _TINY else math.exp(N * math.log1p(-self.p))
        return self.ceiling * self.p * fails

    def saturation(self, eps: float) -> int:
        """The least N at which another unit adds `eps` at most; 0 where the first adds no more.

        It is ceil(ln(eps / (ceiling p)) / ln(1 - p)), looked for by halving, since that quotient may round to the wrong
        side. With a price for a unit and a worth for a solved item, `eps` is the price over the worth. Raises ValueError
        unless eps > 0.
        """
        return first_crossing(self.marginal, eps)

    @classmethod
    def fit(cls, N: Sequence[int], accuracy: Sequence[float], *, items: int | None = None) -> TTSPM:
        """The curve nearest to accuracies at sizes `N`, by least squares over p and the ceiling, both within [0, 1].

        With `items`, the number of items that each accuracy is a mean over, squares are weighted by the inverse of the
        binomial variance (of a share with half a right and half a wrong item added, so that 0 and 1 have one too: our
        choice); else all alike. One size alone cannot tell p from the ceiling: at least two are needed. Where all N p
        are far below 1 they are hardly told apart by any; `logs.fit` gives intervals.

        >>> TTSPM.fit([1, 2, 4], [0.2, 0.32, 0.4352]).saturation(0.05)
        3
        """
        sizes = [checks.whole("N", one, low=1) for one in N]
        shares = [checks.number("accuracy", one, low=0, high=1) for one in accuracy]
        if len(shares) != len(sizes):
            raise ValueError(f"accuracy must have as many values as N, {len(sizes)}, got {len(shares)}")
        if len(set(sizes)) < 2:
            raise ValueError(f"N must hold at least two different sizes, got {checks.shown(list(N))}")
        if items is not None:
            items = checks.whole("items", items, low=1)
        p, ceiling = fit_many(np.array(sizes), np.array([shares]), items)
        return cls(float(p[0]), float(ceiling[0]))


def fit_many(sizes: np.ndarray, accuracy: np.ndarray, items: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """`TTSPM.fit` of every row of `accuracy` (curves, sizes): the chances and the ceilings, each (curves,).

    For one p the best ceiling has a closed form, so that what is left is a search over p: a grid, then golden sections.
    """
    weights = np.ones_like(accuracy)
    if items is not None:
        share = (accuracy * items + 0.5) / (items + 1)
        weights = items / (share * (1 - share))

    def at(p: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The best ceilings for chances (curves, chances), and the errors they leave."""
        shape = -np.expm1(sizes * np.log1p(-p[..., None]))
        w, y = weights[:, None], accuracy[:, None]
        free = (w * y * shape).sum(-1) / (w * shape**2).sum(-1)
        ceiling = np.minimum(free, 1.0)  # the error is a parabola in it: at the bound, the bound is best
        return ceiling, (w * (y - ceiling[..., None] * shape) ** 2).sum(-1)

    rows = np.arange(len(accuracy))
    best = at(np.broadcast_to(_GRID, (len(accuracy), len(_GRID))))[1].argmin(1)
    logits = np.log(_GRID / (1 - _GRID))
    low, high = logits[np.maximum(best - 1, 0)], logits[np.minimum(best + 1, len(_GRID) - 1)]
    golden = (math.sqrt(5) - 1) / 2
    for _ in range(50):
        inner = np.stack([high - golden * (high - low), low + golden * (high - low)], 1)
        errors = at(1 / (1 + np.exp(-inner)))[1]
        left = errors[:, 0] <= errors[:, 1]
        low, high = np.where(left, low, inner[:, 0]), np.where(left, inner[:, 1], high)
    p = 1 / (1 + np.exp(-(low + high) / 2))
    ceiling = at(p[:, None])[0][rows, 0]
    return np.where(ceiling == 0, 0.0, p), ceiling
