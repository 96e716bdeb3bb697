"""Is one thing faster than another: runs in pairs and in turns, an exact interval, and a verdict that does not know names."""

from __future__ import annotations

import contextlib
import gc
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from assay import checks
from assay.measure.energy import EnergyMeter
from assay.measure.stats import Interval, paired_ratio

Found = Literal["faster", "slower", "no change"]
Run = Callable[[int], float]
"""Does so many calls, and says how many seconds they took by whatever clock it has."""


@dataclass(frozen=True)
class Rules:
    """How a comparison is taken and when a candidate is accepted; all of it is fixed before the first run.

    A comparison has `pairs` pairs, each run made of as many calls as take about `run_seconds`. A candidate is accepted when the lower
    end of the interval (of `level`) lies above `least_gain`. `watts` is the nominal power that an estimate of energy is made with
    where the machine has no counter. 30 pairs, 95 % and 1.05 are the protocol's; 2 ms and 10 W (about a server's core) our choice.
    """

    pairs: int = 30
    run_seconds: float = 0.002
    least_gain: float = 1.05
    level: float = 0.95
    watts: float = 10.0

    def __post_init__(self) -> None:
        checks.whole("pairs", self.pairs, low=6)  # fewer have no distribution-free interval
        checks.number("run_seconds", self.run_seconds, above=0)
        checks.number("least_gain", self.least_gain, low=1)
        checks.number("level", self.level, above=0, below=1)
        checks.number("watts", self.watts, above=0)


PROTOCOL = Rules()


@dataclass(frozen=True)
class Measurement:
    """Reference and candidate on one input: seconds a call, pair by pair."""

    input: str
    kind: str
    calls: int
    reference: tuple[float, ...]
    candidate: tuple[float, ...]

    @property
    def speedup(self) -> Interval:
        """Reference over candidate: above 1 the candidate is faster."""
        return paired_ratio(self.reference, self.candidate)


@dataclass(frozen=True)
class Compared:
    """What the measurements on all inputs say, by kind of input, and about the kind that decides."""

    measurements: tuple[Measurement, ...]
    decides: str
    rules: Rules = PROTOCOL
    by_kind: Mapping[str, Interval] = field(init=False)

    def __post_init__(self) -> None:
        kinds = dict.fromkeys(one.kind for one in self.measurements)
        checks.choice("decides", self.decides, list(kinds))
        found = {kind: of_kind([one for one in self.measurements if one.kind == kind], self.rules) for kind in kinds}
        object.__setattr__(self, "by_kind", found)

    @property
    def speedup(self) -> Interval:
        """That of the kind that decides."""
        return self.by_kind[self.decides]

    @property
    def found(self) -> Found:
        """Faster or slower by more than `least_gain`, of the kind that decides, or neither is shown."""
        return judged(self.speedup, self.rules.least_gain)

    @property
    def slower_on(self) -> tuple[str, ...]:
        """Kinds of inputs for which the candidate is shown to be slower: what a maintainer has to weigh against the gain."""
        return tuple(kind for kind, seen in self.by_kind.items() if judged(seen, self.rules.least_gain) == "slower")

    @property
    def sign_test(self) -> float:
        """The p-value of as uneven a count of pairs won, were both equally fast (kind that decides)."""
        mine = [one for one in self.measurements if one.kind == self.decides]
        reference, candidate = _geometric([one.reference for one in mine]), _geometric([one.candidate for one in mine])
        return sign_test(reference, candidate)


def judged(speedup: Interval, least_gain: float = PROTOCOL.least_gain) -> Found:
    """The word for an interval. With the two exchanged the interval is its reciprocal, and "faster" and "slower" change places.

    >>> judged(Interval(1.4, 1.2, 1.5, 30)), judged(Interval(1 / 1.4, 1 / 1.5, 1 / 1.2, 30)), judged(Interval(1.4, 1.01, 2.0, 30))
    ('faster', 'slower', 'no change')
    """
    if speedup.low > least_gain:
        return "faster"
    return "slower" if speedup.high < 1 / least_gain else "no change"


def of_kind(measurements: Sequence[Measurement], rules: Rules = PROTOCOL) -> Interval:
    """The speed-up over several inputs: in every pair the geometric mean over the inputs, so that a large one counts as a small one."""
    reference = _geometric([one.reference for one in measurements])
    candidate = _geometric([one.candidate for one in measurements])
    return paired_ratio(reference, candidate, level=rules.level)


def _geometric(seconds: Sequence[Sequence[float]]) -> list[float]:
    return [float(value) for value in np.exp(np.log(np.asarray(seconds, dtype=np.float64)).mean(axis=0))]


def sign_test(reference: Sequence[float], candidate: Sequence[float]) -> float:
    """Two-sided and exact; pairs that tie are left out, and where all do p is 1.

    >>> sign_test([2.0] * 6, [1.0] * 6), sign_test([1.0], [1.0])
    (0.03125, 1.0)
    """
    won = sum(a > b for a, b in zip(reference, candidate, strict=True))
    n = won + sum(a < b for a, b in zip(reference, candidate, strict=True))
    tail = sum(math.comb(n, k) for k in range(min(won, n - won) + 1))
    return min(1.0, 2 * tail / 2**n)


def in_turns(reference: Run, candidate: Run, rules: Rules = PROTOCOL) -> tuple[int, list[float], list[float]]:
    """Calls a run, and the seconds a call of both, pair by pair: A B, B A, A B, ...

    A machine that becomes slower meanwhile does so for both, and who goes first changes from pair to pair. Both make the same number of
    calls: as many as the slower one makes in `run_seconds`, so that neither the count nor the verdict depends on who is called the
    reference. One run of each comes before the first that counts.
    """
    once = max(reference(1), candidate(1))
    calls = max(1, math.ceil(rules.run_seconds / max(once, 1e-9)))
    if calls > 1:
        once = max(reference(calls), candidate(calls)) / calls  # the first call of all is a slow one
        calls = max(1, math.ceil(rules.run_seconds / max(once, 1e-9)))
    seen: tuple[list[float], list[float]] = ([], [])
    for pair in range(rules.pairs):
        for which in (0, 1) if pair % 2 == 0 else (1, 0):
            seen[which].append(max((reference, candidate)[which](calls), 1e-9) / calls)
    return calls, *seen


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """This thread on one processor of those it may use, where the system lets it, and no collection of garbage."""
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None
    collecting = gc.isenabled()
    gc.disable()
    try:
        if allowed is not None:
            os.sched_setaffinity(0, {max(allowed)})
        yield
    finally:
        if allowed is not None:
            os.sched_setaffinity(0, allowed)
        if collecting:
            gc.enable()


def timed(function: Callable[[], object], calls: int, clock: Callable[[], float] = time.thread_time) -> float:
    """Seconds that so many calls take, of this thread on the processor unless another clock is given.

    The last result is kept until the clock has stopped.
    """
    result = None
    start = clock()
    for _ in range(calls):
        result = function()
    seconds = clock() - start
    del result
    return seconds


@dataclass(frozen=True)
class Energy:
    """Joules a call, and how they were found: by a counter, or an estimate that says no more than the time it is made of."""

    joules: float
    how: str


def energy(run: Run, calls: int, rules: Rules = PROTOCOL) -> Energy:
    """The energy of a call. A counter is of the whole processor, with whatever else runs; without one it is time x nominal power."""
    with EnergyMeter() as meter:
        seconds = run(calls)
    if meter.joules:
        return Energy(meter.joules / calls, f"counters: {', '.join(meter.by_counter)}")
    return Energy(
        rules.watts * seconds / calls, f"proxy: seconds x {rules.watts:g} W, so that its ratio is that of the times"
    )
