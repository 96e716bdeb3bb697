"""The whole estimate from samples that were logged: accuracy at every size, the fit on small sizes, and predictions
with intervals."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Literal

import numpy as np

from assay import checks
from assay.methods.core.reasoning.estimates import coverage, subsets
from assay.methods.core.reasoning.logs import Logged, read_log
from assay.methods.reasoning.ttspm.beta import BetaTTSPM
from assay.methods.reasoning.ttspm.curve import TTSPM, fit_many

Selector = Literal["coverage", "majority"]
"""Who chooses among N answers: an oracle (right if any is), or the vote."""
SETS = 64
"""Sets of N samples that a vote is averaged over."""
RESAMPLES = 500


def accuracies(
    logged: Sequence[Logged], sizes: Sequence[int], *, selector: Selector = "coverage", seed: int = 0
) -> np.ndarray:
    """The accuracy of each item at each size, (items, sizes): over all sets of so many of its samples, of a vote over
    `SETS` of them.

    Raises ValueError for a size above an item's number of samples.
    """
    checks.choice("selector", selector, ("coverage", "majority"))
    if not logged:
        raise ValueError("logged must hold at least one item, got none")
    least = min(len(item.right) for item in logged)
    wanted = [checks.whole("sizes", size, low=1, high=least) for size in sizes]
    found = np.empty((len(logged), len(wanted)))
    for i, item in enumerate(logged):
        n = len(item.right)
        if selector == "coverage":
            found[i] = [coverage(sum(item.right), n, size) for size in wanted]
        else:
            found[i] = [_voted(item, _sets(n, size, seed)).mean() for size in wanted]
    return found


@lru_cache(maxsize=256)
def _sets(n: int, size: int, seed: int) -> np.ndarray:
    """Sets of `size` of n samples, (sets, size)."""
    return np.array(subsets(n, size, SETS, seed))


def _voted(item: Logged, members: np.ndarray) -> np.ndarray:
    """Whether the vote of each set of samples, (sets, size), is right: as `selectors.majority` has it, the first of
    equals wins."""
    names = {answer: k for k, answer in enumerate(dict.fromkeys(item.answers))}
    codes = np.array([names[answer] for answer in item.answers])[members]
    votes = (codes[:, :, None] == codes[:, None, :]).sum(-1)
    votes[codes == names.get("", -1)] = 0  # no answer is never voted for where there is another
    chosen = np.take_along_axis(members, votes.argmax(1)[:, None], 1)[:, 0]
    return np.array(item.right)[chosen]


@dataclass(frozen=True)
class Fit:
    """What samples of `items` items show: `curve` on sizes up to `upto`, fitted to the mean accuracy `observed` at
    each of `sizes`.

    `spread` is the Beta model of unequal items, from the first `upto` samples of each; None for a vote, and where none
    or all were right. `table` has the accuracy of each item at each size of the fit, which intervals resample.
    """

    curve: TTSPM
    spread: BetaTTSPM | None
    sizes: tuple[int, ...]
    table: np.ndarray
    selector: Selector

    @property
    def observed(self) -> tuple[float, ...]:
        """Mean accuracy at `sizes`."""
        return tuple(self.table.mean(0).tolist())

    @property
    def model(self) -> TTSPM | BetaTTSPM:
        """The model to predict with: the Beta model where there is one."""
        return self.curve if self.spread is None else self.spread

    def predict(self, N: int) -> tuple[float, float, float]:
        """Accuracy at N by `curve`, and a 95 % interval over resampled items: (value, low, high)."""
        N = checks.whole("N", N, low=0)
        low, high = np.quantile(self._over_items(lambda one: one.predict(N)), [0.025, 0.975])
        return self.curve.predict(N), float(low), float(high)

    def saturation(self, eps: float) -> tuple[int, float, float]:
        """The saturation point of `curve`, and a 95 % interval over resampled items: (value, low, high)."""
        value = self.curve.saturation(eps)
        low, high = np.quantile(self._over_items(lambda one: float(one.saturation(eps))), [0.025, 0.975])
        return value, float(low), float(high)

    def _over_items(self, of: Callable[[TTSPM], float]) -> list[float]:
        return [of(TTSPM(float(p), float(ceiling))) for p, ceiling in zip(*self._resampled, strict=True)]

    @cached_property
    def _resampled(self) -> tuple[np.ndarray, np.ndarray]:
        picks = np.random.default_rng(0).integers(0, len(self.table), (RESAMPLES, len(self.table)))
        return fit_many(np.array(self.sizes), self.table[picks].mean(1), len(self.table))


def fit(
    log: str | os.PathLike[str] | Sequence[Logged], *, upto: int = 8, selector: Selector = "coverage", seed: int = 0
) -> Fit:
    """Fit the paper's curve (and the Beta model) to the first `upto` samples of each item of a log, at the sizes 1 to
    `upto`.

    `log` is a `samples_*.jsonl` of the LM Evaluation Harness, or items that `read_log` gave. Samples beyond `upto` are
    not looked at: they can tell how good the predictions are. Raises ValueError where an item has fewer samples than
    `upto`, and for `upto` below 2.

    >>> items = [Logged(str(i), "", "1", ("1",) * 4, ("1",) * 4, (i > 0, False, i > 1, False)) for i in range(4)]
    >>> found = fit(items, upto=4)
    >>> [round(one, 3) for one in found.observed], found.curve.saturation(0.1)
    ([0.312, 0.542, 0.688, 0.75], 3)
    """
    logged = read_log(log) if isinstance(log, str | os.PathLike) else list(log)
    upto = checks.whole("upto", upto, low=2)
    if few := [item for item in logged if len(item.right) < upto]:
        raise ValueError(
            f"upto must be at most the samples of each item, {len(few[0].right)} of {few[0].item!r}, got {upto}"
        )
    first = [Logged(o.item, o.prompt, o.target, o.texts[:upto], o.answers[:upto], o.right[:upto]) for o in logged]
    sizes = tuple(range(1, upto + 1))
    table = accuracies(first, sizes, selector=selector, seed=seed)
    curve = TTSPM.fit(sizes, table.mean(0).tolist(), items=len(first))
    correct = [sum(item.right) for item in first]
    known = selector == "coverage" and len(first) > 1 and 0 < sum(correct) < upto * len(first)
    return Fit(curve, BetaTTSPM.fit(correct, upto) if known else None, sizes, table, selector)
