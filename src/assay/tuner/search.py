"""Which candidate to try next: predict from the roofline, screen on few layers, assess on the whole model, correct, repeat.

An option is a transform with its configuration; a candidate holds at most one option per slot. Its predicted time is the measured
time of each kind of work (linear, attention, other) multiplied by what the roofline says the options change, and corrected by what
screening and assessing taught about each option. For a candidate that was itself screened, the prediction is its screened time.
If two times lie closer together than screening can resolve, they count as equal, and the candidate that changes less goes first.
The expected loss of quality is the sum of the losses seen for its options. A candidate that contains a whole recipe already known
to lose too much is not tried.
"""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import dataclass, field
from typing import Any

from assay.methods.transform import SLOTS, Effect
from assay.tuner.recipe import Step

SIBLING = (
    0.25  # an unseen configuration is suspected of losing at least this share of what its mildest seen sibling lost
)
SAME = 0.03  # predicted times that differ by less count as the same: a screening of a run or two tells no more
SLOWER = 1.05  # a candidate expected to take that many times the base's time is not worth judging
LIMIT = 4000  # candidates kept at most; the configurations of a slot are cut from the end when there are more


@dataclass(frozen=True)
class Option:
    """One step that could be part of a recipe."""

    step: Step
    slot: str
    exact: bool
    effects: tuple[Effect, ...] = ()
    share: float = 1.0  # of its targets that it reaches in this model: the effects are on that share of the work only

    @property
    def key(self) -> str:
        return json.dumps([self.step.transform, self.step.config], sort_keys=True)


@dataclass(frozen=True)
class Kind:
    """One kind of work in the profile of the base model and what it costs; only ratios of costs matter."""

    cost: float  # seconds; bytes of the peak where the goal is memory
    macs: float
    bytes: float
    dtype: str


@dataclass
class Search:
    """The state of the search: `to_screen()` and `next()` name candidates, `screened()` and `learn()` take in the results."""

    options: list[Option]
    kinds: dict[str, Kind]
    peak: dict[str, float]  # operations per second by dtype
    bandwidth: float  # bytes per second
    max_drop: float
    correction: dict[str, float] = field(default_factory=dict)  # log of measured / predicted, by option
    single_drop: dict[str, float] = field(default_factory=dict)
    measured: dict[frozenset[str], tuple[float, float]] = field(default_factory=dict)  # keys -> (time ratio, drop)
    failed: list[frozenset[str]] = field(default_factory=list)
    misfits: dict[frozenset[str], str] = field(default_factory=dict)  # of those failed, the option known to be to blame
    tried: set[frozenset[str]] = field(default_factory=set)
    ratios: dict[frozenset[str], float] = field(default_factory=dict)  # keys -> time over the base's on few layers

    def candidates(self) -> list[tuple[Option, ...]]:
        """Every non-empty combination of at most one option per slot, in slot order."""
        slots = [[o for o in self.options if o.slot == slot] for slot in SLOTS]
        slots = [found for found in slots if found]
        while math.prod(len(found) + 1 for found in slots) > LIMIT:
            max(slots, key=len).pop()
        picks = itertools.product(*([None, *found] for found in slots))
        return [tuple(o for o in pick if o is not None) for pick in picks if any(o is not None for o in pick)]

    def roofline(self, options: tuple[Option, ...]) -> float:
        """Predicted time (or peak, if costs are bytes) over the base's, from the roofline alone.

        An option that reaches a share of its targets changes that share of the work and leaves the rest as it was.
        """
        total = 0.0
        for name, kind in self.kinds.items():
            macs, moved, dtype, cost = kind.macs, kind.bytes, kind.dtype, kind.cost
            for option, effect in ((o, e) for o in options for e in o.effects if e.kind == name):
                before = self._floor(macs, moved, dtype)
                macs, moved, dtype = macs * effect.macs, moved * effect.bytes, effect.dtype or dtype
                changed = self._floor(macs, moved, dtype) / before if before > 0 else 1.0
                cost *= 1 - option.share + option.share * changed
            total += cost
        base = sum(kind.cost for kind in self.kinds.values())
        return total / base if base > 0 else 1.0

    def predict(self, options: tuple[Option, ...]) -> float:
        """Predicted time over the base's, including what was learnt; for a screened candidate, its screened ratio."""
        if (seen := self.ratios.get(frozenset(o.key for o in options))) is not None:
            return seen
        return self.roofline(options) * math.exp(sum(self._correction(o) for o in options))

    def known_drop(self, options: tuple[Option, ...]) -> float:
        """Sum of the losses seen for single options; an option never assessed alone counts as harmless."""
        return sum(self.single_drop.get(o.key, 0.0) for o in options)

    def expected_drop(self, options: tuple[Option, ...]) -> float:
        """The same, but an option never assessed alone is charged a share of what its mildest sibling lost."""
        return sum(self._drop(o) for o in options if not o.exact)

    def next(self) -> tuple[Option, ...] | None:
        """The candidate predicted fastest among those that may keep the quality; None when nothing is left to try.

        When a recipe lost too much, each of its options is assessed next without the others, so that the blame falls on the right one;
        exact options of other slots, which cannot be to blame, stay beside it: there may be no time for a further candidate.
        Candidates suspected of losing too much or of failing come last, as do changes of structure not yet assessed. A candidate
        expected to be slower than the base is left out, unless the roofline is all that is known about it.
        """
        clashes = self._clashes()
        for option in self._suspects():
            return self._beside_exact(option, clashes)
        return min(self._open(), key=lambda options: self._rank(options, clashes), default=None)

    def to_screen(self, most: int, *, combined: bool) -> list[tuple[Option, ...]]:
        """Up to `most` candidates to time on few layers next; empty when none is worth it any more.

        Single options come first, one of each transform before the second of any, because the times of all combinations follow from
        theirs. With `combined`, the combinations then predicted fastest.
        """
        clashes = self._clashes()
        waiting = [options for options in self._open() if frozenset(o.key for o in options) not in self.ratios]
        waiting = sorted((o for o in waiting if (len(o) > 1) == combined), key=lambda o: self._rank(o, clashes))
        if not combined:
            waiting.sort(key=lambda options: self._siblings_before(options[0]))
        return waiting[:most]

    def _open(self) -> list[tuple[Option, ...]]:
        """The candidates that nothing rules out."""
        found = []
        for options in self.candidates():
            keys = frozenset(o.key for o in options)
            if keys in self.tried or any(dead <= keys for dead in self.failed) or self._contains_violator(keys):
                continue
            if self.known_drop(options) > self.max_drop:
                continue
            known = keys in self.ratios or (len(options) > 1 and all(o.key in self.correction for o in options))
            if known and self.predict(options) > SLOWER:
                continue
            found.append(options)
        return found

    def _rank(self, options: tuple[Option, ...], clashes: set[frozenset[str]]) -> tuple[Any, ...]:
        """The sort key of what to try first: no doubts, then short time, then few changes."""
        keys = frozenset(o.key for o in options)
        doubtful = self.expected_drop(options) > self.max_drop or any(self._unproven(o) for o in options)
        doubtful = doubtful or any(pair <= keys for pair in clashes)
        time = self.predict(options)
        step = round(math.log(max(time, 1e-9)) / math.log1p(SAME))
        return doubtful, step, sum(not o.exact for o in options), len(options), time

    def _siblings_before(self, option: Option) -> int:
        """How many configurations of the same transform are more promising."""
        same = [o.key for o in self.options if o.step.transform == option.step.transform]
        return same.index(option.key)

    def screened(self, options: tuple[Option, ...], ratio: float) -> None:
        """Take in a time over the base's, measured on few layers."""
        surprise = math.log(max(ratio, 1e-9) / max(self.predict(options), 1e-9))
        for option in options:
            self.correction[option.key] = self.correction.get(option.key, 0.0) + surprise / len(options)
        self.ratios[frozenset(o.key for o in options)] = ratio

    def learn(self, options: tuple[Option, ...], ratio: float, drop: float) -> None:
        """Take in a measured time (over the base's) and loss; the error of the prediction is shared among the candidate's options."""
        keys = frozenset(o.key for o in options)
        self.tried.add(keys)
        self.measured[keys] = (ratio, drop)
        surprise = math.log(max(ratio, 1e-9) / max(self.predict(options), 1e-9))
        for option in options:
            self.correction[option.key] = self.correction.get(option.key, 0.0) + surprise / len(options)
        lossy = [o for o in options if not o.exact]
        if len(lossy) == 1:
            self.single_drop[lossy[0].key] = drop

    def fail(self, options: tuple[Option, ...], misfit: str = "") -> None:
        """Take in a failure: no candidate that contains all these options is tried again.

        `misfit` names the transform that could not be applied, if that was the reason; then the steps after it are not to blame.
        """
        self.tried.add(frozenset(o.key for o in options))
        names = [o.step.transform for o in options]
        if misfit in names:
            options = options[: names.index(misfit) + 1]
            self.misfits[frozenset(o.key for o in options)] = options[-1].key
        self.failed.append(frozenset(o.key for o in options))

    def skip(self, options: tuple[Option, ...]) -> None:
        """Take in that the candidate is equivalent to one already measured."""
        self.tried.add(frozenset(o.key for o in options))

    def _correction(self, option: Option) -> float:
        """What was learnt about the option, or else about its siblings: a surprise mostly concerns a mechanism with all its settings."""
        if option.key in self.correction:
            return self.correction[option.key]
        siblings = [self.correction[o.key] for o in self._siblings(option) if o.key in self.correction]
        return sum(siblings) / len(siblings) if siblings else 0.0

    def _drop(self, option: Option) -> float:
        if option.key in self.single_drop:
            return self.single_drop[option.key]
        siblings = [self.single_drop[o.key] for o in self._siblings(option) if o.key in self.single_drop]
        return SIBLING * min(siblings) if siblings else 0.0

    def _unproven(self, option: Option) -> bool:
        """Whether a change of structure is not yet assessed. Such changes lose most and cost most to apply, so others go first."""
        return option.slot == "structure" and option.key not in self.single_drop

    def _clashes(self) -> set[frozenset[str]]:
        """Pairs of transforms whose options were together in a failed recipe and in none that worked: one of the pairs is to blame.

        A configuration shares the suspicion with its siblings, because it is mostly mechanisms that clash, not settings.
        """
        family = {o.key: frozenset(s.key for s in [o, *self._siblings(o)]) for o in self.options}
        worked = {pair for keys in self.measured for pair in itertools.combinations(sorted(keys), 2)}
        found = set()
        for keys in self.failed:
            blamed = self.misfits.get(keys)
            for a, b in itertools.combinations(sorted(keys & family.keys()), 2):
                if blamed is not None and blamed not in (a, b):
                    continue
                pairs = {frozenset(pair) for pair in itertools.product(family[a], family[b])}
                if not any(frozenset(pair) in pairs for pair in worked):
                    found |= pairs
        return found

    def _siblings(self, option: Option) -> list[Option]:
        return [o for o in self.options if o.step.transform == option.step.transform and o.key != option.key]

    def _suspects(self) -> list[Option]:
        """Options of recipes that lost too much and have not been assessed alone: one of them is to blame."""
        found = []
        for keys, (_, drop) in self.measured.items():
            if drop > self.max_drop:
                found += [o for o in self.options if o.key in keys and not o.exact and o.key not in self.single_drop]
        return [o for o in found if frozenset([o.key]) not in self.tried]

    def _beside_exact(self, option: Option, clashes: set[frozenset[str]]) -> tuple[Option, ...]:
        """The most promising candidate of this option and exact ones; the option alone where there is none."""
        found = [c for c in self._open() if option in c and all(o.exact or o is option for o in c)]
        return min(found, key=lambda options: self._rank(options, clashes), default=(option,))

    def _contains_violator(self, keys: frozenset[str]) -> bool:
        return any(drop > self.max_drop and seen <= keys for seen, (_, drop) in self.measured.items())

    def _floor(self, macs: float, moved: float, dtype: str) -> float:
        peak = self.peak.get(dtype) or self.peak.get("float32") or 1.0
        return max(2 * macs / peak, moved / self.bandwidth)


def option_from(document: dict[str, Any]) -> Option:
    """An option, from the survey's description of it."""
    effects = tuple(Effect(**effect) for effect in document["effects"])
    step = Step(transform=document["transform"], config=document["config"])
    return Option(step, document["slot"], document["exact"], effects, document.get("share", 1.0))


def pareto(points: list[tuple[float, float]]) -> list[int]:
    """Indices of the points that no other point beats in both coordinates (lower is better), ordered by the first coordinate.

    >>> pareto([(1.0, 3.0), (2.0, 2.0), (3.0, 2.5)])
    [0, 1]
    """
    order = sorted(range(len(points)), key=lambda i: points[i])
    front: list[int] = []
    for i in order:
        if not front or points[i][1] < points[front[-1]][1]:
            front.append(i)
    return front
