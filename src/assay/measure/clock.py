"""Comparing how long things take: paired, interleaved, in one process.

First everything runs until it no longer gets faster (`warm_up`). Then runs are taken in rounds. Each round runs every callable once,
and the order changes from round to round (A B, B A, B A, A B, ...), so that drift, the state of the caches and the advantage of going
first affect all alike. The result is the median over rounds of the ratio within a round. Its interval takes two equal things for
different in at most 5 % of cases (`assay.measure.stats.paired_ratio`; `self_test` checks this on the machine itself). Whether the
rounds still had a trend, and whether they were too noisy to trust, is said with it.
"""

from __future__ import annotations

import gc
import itertools
import math
import os
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import psutil

from assay import checks
from assay.measure.stats import Interval, log_ratios, paired_ratio, positive_median, serial_correlation, trending

NOISY_SHARE = 0.10
"""A measurement is `noisy` when other processes used more than this share of the machine's processor time meanwhile."""
NOISY_CORRELATION = 0.7
"""It is also `noisy` when neighbouring rounds are correlated by this much over 20 rounds or more, which its intervals cannot allow for."""
WARMUP = 3
"""Runs of each callable before its times count, at least."""
MOST_WARMUP = 20
"""Runs of each callable after which no more are added to let it settle."""
WARMUP_SHARE = 0.25
"""Share of `max_seconds` after which no more are added either."""


@dataclass
class Paired:
    """Two callables timed side by side. Times are in seconds; `speedup` is baseline time / candidate time, so above 1 is faster."""

    baseline: list[float]
    candidate: list[float]
    baseline_time: Interval
    candidate_time: Interval
    speedup: Interval
    cpu_baseline: float  # median processor seconds of one run, over all threads
    cpu_candidate: float
    load_before: float  # one-minute load average, of everything on the machine
    load_after: float
    others: float  # share of the machine's processor time that other processes used meanwhile
    noisy: bool  # see `Timings.noisy`
    warmup: dict[str, int] = field(default_factory=dict)  # runs of "baseline" and "candidate" before those that count
    trend: bool = False  # whether the ratio rose or fell over the rounds

    @property
    def differs(self) -> bool:
        """True if the interval of the speed-up excludes 1."""
        return not self.speedup.contains(1.0)


@dataclass
class Timings:
    """Several callables timed side by side: the seconds of every run by label, one per round."""

    seconds: dict[str, list[float]]
    cpu: dict[str, list[float]]
    load_before: float
    load_after: float
    others: float
    noisy: bool  # others used more than NOISY_SHARE, or the noise of a ratio lasts over rounds (NOISY_CORRELATION)
    orders: list[tuple[str, ...]] = field(default_factory=list)  # the order of each round
    warmup: dict[str, int] = field(default_factory=dict)  # runs of each label before those that count

    @property
    def trend(self) -> bool:
        """Whether the ratio of any two labels rose or fell over the rounds by more than noise (`trending`, at 1 % for all together).

        An arm that was still warming up looks like this, and so does one that heats the machine: the ratio is then not one number.
        """
        pairs = list(itertools.combinations(self.seconds, 2))
        level = 1 - 0.01 / max(len(pairs), 1)
        return any(trending(log_ratios(self.seconds[a], self.seconds[b]), level=level) for a, b in pairs)

    def speedup(self, baseline: str, candidate: str) -> Interval:
        """Median over the rounds of baseline time / candidate time."""
        return paired_ratio(self.seconds[baseline], self.seconds[candidate])

    def paired(self, baseline: str, candidate: str) -> Paired:
        """Two of the labels as a `Paired`."""
        a, b = self.seconds[baseline], self.seconds[candidate]
        return Paired(
            baseline=a,
            candidate=b,
            baseline_time=positive_median(a),
            candidate_time=positive_median(b),
            speedup=paired_ratio(a, b),
            cpu_baseline=_median(self.cpu[baseline]),
            cpu_candidate=_median(self.cpu[candidate]),
            load_before=self.load_before,
            load_after=self.load_after,
            others=self.others,
            noisy=self.noisy,
            warmup={"baseline": self.warmup.get(baseline, 0), "candidate": self.warmup.get(candidate, 0)},
            trend=trending(log_ratios(a, b)),
        )


def compare(
    baseline: Callable[[], Any],
    candidate: Callable[[], Any],
    *,
    pairs: int = 10,
    warmup: int = WARMUP,
    max_seconds: float | None = None,
) -> Paired:
    """Time two callables in `pairs` rounds (A B, B A, B A, A B, ...) after at least `warmup` runs of each (see `warm_up`).

    With `max_seconds`, no new round starts after that many seconds (warm-up included), but at least two are run. Fewer than six
    rounds give a wide interval, see `assay.measure.stats.median_interval`. Raises ValueError for pairs < 2, warmup < 0 or
    max_seconds <= 0, TypeError for something that is no number; exceptions of the callables pass through.

    >>> result = compare(lambda: sum(range(2000)), lambda: sum(range(200)), pairs=6)
    >>> result.speedup.n, result.speedup.low <= result.speedup.median <= result.speedup.high
    (6, True)
    """
    functions = {"baseline": baseline, "candidate": candidate}
    return compare_many(functions, rounds=pairs, warmup=warmup, max_seconds=max_seconds).paired("baseline", "candidate")


def compare_many(
    functions: Mapping[str, Callable[[], Any]],
    *,
    rounds: int = 10,
    warmup: int = WARMUP,
    max_seconds: float | None = None,
) -> Timings:
    """Time any number of callables in rounds; over 2k rounds, each of k callables takes each place equally often.

    Wall time is `time.perf_counter_ns`; processor time is that of this process with all its threads. If this process uses CUDA,
    the device is synchronised before and after each run. The garbage collector is suspended during a run, and results are
    dropped outside the timed part. Arguments and errors are those of `compare`.
    """
    if not functions:
        raise ValueError("functions must hold at least one callable, got none")
    rounds = checks.whole("pairs (rounds)", rounds, low=2)
    warmup = checks.whole("warmup", warmup, low=0)
    if max_seconds is not None:
        max_seconds = checks.number("max_seconds", max_seconds, above=0)
    labels = list(functions)
    timings = Timings({label: [] for label in labels}, {label: [] for label in labels}, load_average(), 0.0, 0.0, False)
    begin = time.perf_counter()
    timings.warmup = warm_up(functions, warmup, None if max_seconds is None else WARMUP_SHARE * max_seconds)
    watch = OthersWatch()
    for round_number in range(rounds):
        if round_number >= 2 and max_seconds is not None and time.perf_counter() - begin > max_seconds:
            break
        order = round_order(labels, round_number)
        for label in order:
            seconds, cpu = time_once(functions[label])
            timings.seconds[label].append(seconds)
            timings.cpu[label].append(cpu)
        timings.orders.append(order)
    timings.others, busy = watch.stop()
    timings.noisy = busy or _wandering(timings.seconds)
    timings.load_after = load_average()
    return timings


def warm_up(
    functions: Mapping[str, Callable[[], Any]], least: int = WARMUP, seconds: float | None = None
) -> dict[str, int]:
    """Run all callables in turn until none gets faster, at least `least` times; returns how often each ran.

    The rule (our choice): the last two turns brought no callable a run faster than all before it. Equal runs settle so after about five
    turns, one whose first runs are slow soon after the last of those. It ends after MOST_WARMUP turns or, beyond `least`, after
    `seconds`. `least` = 0 runs nothing, for what must not run more often than it is timed.

    A callable that speeds up by less than its noise over many runs is not seen through; the rounds then show a `trend`.
    """
    begin = time.perf_counter()
    times: dict[str, list[float]] = {label: [] for label in functions}
    turns = 0
    while turns < least or (least and turns < MOST_WARMUP and not all(map(_settled, times.values()))):
        if turns >= least and seconds is not None and time.perf_counter() - begin > seconds:
            break
        for label, function in functions.items():
            times[label].append(time_once(function)[0])
        turns += 1
    return dict.fromkeys(functions, turns)


def _settled(seconds: list[float]) -> bool:
    """Whether neither of the last two runs was faster than all before it."""
    return len(seconds) >= 3 and min(seconds[-2:]) >= min(seconds[:-2])


def _wandering(seconds: Mapping[str, list[float]]) -> bool:
    """Whether the noise of any ratio lasts from round to round by more than its interval can allow for."""
    return any(
        len(seconds[a]) >= 20 and serial_correlation(log_ratios(seconds[a], seconds[b])) >= NOISY_CORRELATION
        for a, b in itertools.combinations(seconds, 2)
    )


def round_order(labels: list[str], round_number: int) -> tuple[str, ...]:
    """Rotations of the labels, each followed by its mirror image: places are balanced, and no period is left for a disturbance to hit."""
    turn = (round_number // 2) % len(labels)
    order = tuple(labels[turn:] + labels[:turn])
    return order[::-1] if round_number % 2 else order


def time_once(function: Callable[[], Any]) -> tuple[float, float]:
    """Wall and processor seconds of one run, each at least a nanosecond."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        synchronize()
        cpu = time.process_time_ns()
        start = time.perf_counter_ns()
        result = function()
        synchronize()
        wall = time.perf_counter_ns() - start
        cpu = time.process_time_ns() - cpu
        del result
    finally:
        if collecting:
            gc.enable()
    return max(wall, 1) / 1e9, max(cpu, 1) / 1e9


def synchronize() -> None:
    """Wait for the GPU if this process uses one; never starts CUDA by itself."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()


def load_average() -> float:
    """One-minute load average; NaN if the system keeps none."""
    try:
        return os.getloadavg()[0]
    except (AttributeError, OSError):
        return math.nan


class OthersWatch:
    """How much processor time other processes use during a measurement.

    Rule (our choice): the machine's busy time (everything but idle and waiting for disks; stolen time of a virtual machine counts
    as busy), minus what this process and its finished children used, as a share of all cores over the elapsed time. Above
    `NOISY_SHARE` the measurement is noisy. The kernel counts in ticks of 10 ms, so two ticks per core are allowed for.
    """

    def __init__(self) -> None:
        self._start = self._now()

    @staticmethod
    def _now() -> tuple[float, float, float]:
        times = psutil.cpu_times()
        idle = times.idle + getattr(times, "iowait", 0.0)
        # guest time is already part of user time on Linux
        busy = sum(times) - idle - getattr(times, "guest", 0.0) - getattr(times, "guest_nice", 0.0)
        own = os.times()
        return time.perf_counter(), busy, own.user + own.system + own.children_user + own.children_system

    def stop(self) -> tuple[float, bool]:
        """(share of the machine that others used since the start, whether that is too much)."""
        (t0, busy0, own0), (t1, busy1, own1) = self._start, self._now()
        cores = psutil.cpu_count() or 1
        others = max((busy1 - busy0) - (own1 - own0), 0.0)
        elapsed = max(t1 - t0, 1e-9)
        return min(others / (elapsed * cores), 1.0), others > NOISY_SHARE * elapsed * cores + 0.02 * cores


def self_test(*, sets: int = 40, pairs: int = 10, work: Callable[[], Any] | None = None) -> dict[str, Any]:
    """Compare a callable with itself, `sets` times: does this machine's clock see differences where there are none?

    `work` defaults to about a millisecond of arithmetic; the whole test then takes a second or two. Returns `sets`,
    `differences` (comparisons that claimed one), `allowed` (the most that 5 % errors explain, 99 % of the time), `passed`,
    and `noisy`.
    """
    sets = checks.whole("sets", sets, low=1)
    run = work or _millisecond
    watch = OthersWatch()
    differences = sum(compare(run, run, pairs=pairs).differs for _ in range(sets))
    allowed = binomial_bound(sets, 0.05, 0.99)
    return {
        "sets": sets,
        "differences": differences,
        "allowed": allowed,
        "passed": differences <= allowed,
        "noisy": watch.stop()[1],
    }


def binomial_bound(n: int, p: float, level: float) -> int:
    """The smallest k with P(Binomial(n, p) <= k) >= level."""
    total = 0.0
    for k in range(n + 1):
        total += math.comb(n, k) * p**k * (1 - p) ** (n - k)
        if total >= level:
            return k
    return n


def _millisecond() -> int:
    return sum(i * i for i in range(15_000))


def _median(values: list[float]) -> float:
    ordered = sorted(values)
    middle = len(ordered) // 2
    return ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2
