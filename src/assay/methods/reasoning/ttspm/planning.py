"""How many samples for each item, and when to stop: from models of the items or of groups of them."""

from __future__ import annotations

import heapq
from collections.abc import Sequence

from assay import checks
from assay.methods.reasoning.ttspm.beta import BetaTTSPM
from assay.methods.reasoning.ttspm.curve import TTSPM, first_crossing

Model = TTSPM | BetaTTSPM


def plan(models: Sequence[Model], eps: float) -> list[int]:
    """The saturation point of each: so many samples that the next would add `eps` at most.

    >>> plan([TTSPM(0.0), TTSPM(0.1), TTSPM(0.9)], eps=0.05)
    [0, 7, 2]
    """
    return [model.saturation(eps) for model in models]


def allocate(
    models: Sequence[Model], total: int, *, sizes: Sequence[int] | None = None, most: int = 2**20
) -> list[int]:
    """`total` samples spread so that the expected number of solved items is largest: each to where it adds most, the
    first of equals.

    `sizes` is how many items each model stands for (1): a sample for a group is one for each of its items, and is
    given only while that many are left. No item gets more than `most`. Gains fall with N, so that taking the largest
    each time is the best there is (but for a remainder smaller than a group). What is left when no sample adds
    anything stays unspent.

    >>> allocate([TTSPM(0.0), TTSPM(0.2), TTSPM(0.9)], total=4)
    [0, 3, 1]
    """
    left, most = checks.whole("total", total, low=0), checks.whole("most", most, low=0)
    each = [1] * len(models) if sizes is None else [checks.whole("sizes", size, low=1) for size in sizes]
    if len(each) != len(models):
        raise ValueError(f"sizes must be as many as models, {len(models)}, got {len(each)}")
    counts = [0] * len(models)
    waiting = [(-model.marginal(0), i) for i, model in enumerate(models) if most]
    heapq.heapify(waiting)
    while waiting:
        gain, i = heapq.heappop(waiting)
        if gain >= 0 or each[i] > left:
            continue
        left -= each[i]
        counts[i] += 1
        if counts[i] < most:
            heapq.heappush(waiting, (-models[i].marginal(counts[i]), i))
    return counts


class Stopper:
    """Says while an item is sampled whether the next sample is worth its price, where each answer can be checked at
    once.

    `prior` is what is known of items beforehand (`BetaTTSPM.fit` on other ones); an item that was solved needs no
    more, one that was not gets another while the posterior chance is above `eps` (the price of a sample over the worth
    of a solved item).

    As long as nothing was right, the posterior of all items of one prior is the same: so for one prior this is a limit
    on the number of samples, `limit`, and what it saves over that number everywhere comes from stopping at the first
    success.

    >>> stopper = Stopper(BetaTTSPM(0.5, 0.5), eps=0.1)
    >>> stopper.limit, stopper([False, False]), stopper([False] * 4), stopper([False, True])
    (4, True, False, False)
    """

    def __init__(self, prior: BetaTTSPM, eps: float) -> None:
        if not isinstance(prior, BetaTTSPM):
            raise TypeError(f"prior must be a BetaTTSPM, got {checks.shown(prior)}")
        self.prior, self.eps = prior, checks.number("eps", eps, above=0, below=1)

    @property
    def limit(self) -> int:
        """Samples of an item that stays unsolved: the least n with a / (a + b + n) <= eps."""
        return first_crossing(lambda n: self.prior.posterior(0, n).mean, self.eps)

    def __call__(self, right: Sequence[bool]) -> bool:
        """Whether to go on after samples of which these were right."""
        seen = [checks.flag("right", one) for one in right]
        return not any(seen) and self.prior.posterior(0, len(seen)).mean > self.eps
