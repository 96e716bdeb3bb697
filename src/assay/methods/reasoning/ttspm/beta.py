"""Items of unequal chances: p follows a Beta distribution, and the curve over all of them has a heavier tail than any
one item's."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from assay import checks
from assay.methods.reasoning.ttspm.curve import first_crossing

LARGEST = 1e4
"""a + b of a fit at most: beyond it items of a few dozen samples cannot be told from equal ones (our choice)."""


@dataclass(frozen=True)
class BetaTTSPM:
    """Coverage where the chance of an item is drawn from Beta(`a`, `b`): 1 - E[(1 - p)^N]. Our extension of the
    paper's model.

    It is also what is known of one item after samples (`posterior`). With a, b to infinity at the same mean it is
    `TTSPM` with that mean.

    When NOT to use it: for a vote, which is not a matter of one right sample; fit `TTSPM` with a ceiling there. Items
    that can never be solved beside items that can are no Beta distribution, and its tail is too low then.

    Raises ValueError and TypeError unless a and b are above 0.

    >>> model = BetaTTSPM(1.0, 1.0)
    >>> round(model.predict(1), 6), round(model.predict(3), 6), model.saturation(0.1)
    (0.5, 0.75, 2)
    """

    a: float
    b: float

    def __post_init__(self) -> None:
        checks.number("a", self.a, above=0)
        checks.number("b", self.b, above=0)

    @property
    def mean(self) -> float:
        """The mean chance."""
        return self.a / (self.a + self.b)

    def predict(self, N: int) -> float:
        """The share of items of which at least one of N samples is right."""
        N = checks.whole("N", N, low=0)
        return float(-np.expm1(_log_beta(self.a, self.b + N) - _log_beta(self.a, self.b)))

    def marginal(self, N: int) -> float:
        """What sample N + 1 adds: E[p (1 - p)^N]."""
        N = checks.whole("N", N, low=0)
        return float(np.exp(_log_beta(self.a + 1, self.b + N) - _log_beta(self.a, self.b)))

    def saturation(self, eps: float) -> int:
        """The least N at which another sample adds `eps` at most. Raises ValueError unless eps > 0."""
        return first_crossing(self.marginal, eps)

    def posterior(self, correct: int, n: int) -> BetaTTSPM:
        """What is known of an item of which `correct` of `n` samples were right."""
        n = checks.whole("n", n, low=0)
        correct = checks.whole("correct", correct, low=0, high=n)
        return BetaTTSPM(self.a + correct, self.b + n - correct)

    @classmethod
    def fit(cls, correct: Sequence[int], n: int | Sequence[int]) -> BetaTTSPM:
        """By maximum likelihood of the beta-binomial distribution, from how many of each item's `n` samples were right.

        Raises ValueError for fewer than two items, and where none or all samples of all items were right: every such a
        and b is as good as another. Where items are no more unequal than chance makes them, a + b ends at `LARGEST`.

        >>> model = BetaTTSPM.fit([0, 0, 1, 7, 8, 8], 8)
        >>> round(model.mean, 2), model.a < 1 and model.b < 1
        (0.5, True)
        """
        from scipy.optimize import minimize

        many = [n] * len(correct) if isinstance(n, int) else list(n)
        if len(many) != len(correct) or len(correct) < 2:
            raise ValueError(
                f"correct and n must be of as many items, two at least, got {len(correct)} and {len(many)}"
            )
        of = np.array([checks.whole("n", one, low=1) for one in many], dtype=float)
        right = np.array(
            [checks.whole("correct", one, low=0, high=int(most)) for one, most in zip(correct, of, strict=True)],
            dtype=float,
        )
        if not right.any() or (right == of).all():
            raise ValueError("correct must hold right and wrong samples, got one kind only")

        def loss(at: np.ndarray) -> float:
            """Negative log-likelihood of the mean's logit and the logarithm of a + b."""
            mean, size = 1 / (1 + math.exp(-at[0])), math.exp(at[1])
            a, b = mean * size, (1 - mean) * size
            return -float((_log_beta(a + right, b + of - right) - _log_beta(a, b)).sum())

        share = (right.sum() + 0.5) / (of.sum() + 1)
        bounds = [(-12.0, 12.0), (math.log(1e-3), math.log(LARGEST))]
        starts = [[math.log(share / (1 - share)), math.log(size)] for size in (0.3, 3.0, 100.0)]
        found = min((minimize(loss, start, method="L-BFGS-B", bounds=bounds) for start in starts), key=lambda r: r.fun)
        mean, size = 1 / (1 + math.exp(-found.x[0])), math.exp(found.x[1])
        return cls(mean * size, (1 - mean) * size)


def _log_beta(a: np.ndarray | float, b: np.ndarray | float) -> np.ndarray:
    from scipy.special import betaln

    return np.asarray(betaln(a, b))
