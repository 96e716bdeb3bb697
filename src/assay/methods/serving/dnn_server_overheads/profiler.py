"""Where a request's time goes: borders between stages, noted as they are passed, that divide its whole life.

A `Lifetime` has a beginning and borders; the time between two of them belongs to the stage that the later one names. Nothing can
be left out and nothing counted twice: what nobody named is `between`. A stage that ran for a whole batch counts in full for each of its
requests where latency is asked for, and divided by the batch where cost is.
"""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from assay import checks
from assay.errors import InputError
from assay.paths import atomic_file

BETWEEN = "between"
"""The stage of what nobody named."""
LARGEST = 1 << 28  # bytes of a trace that is read

clock = time.monotonic
"""On Linux one clock for all processes, so that borders may be noted in another one."""


@dataclass(frozen=True)
class Span:
    """A stage of one request: from when to when, by `clock`, and the seconds it cost (less than it took where a batch shared it)."""

    stage: str
    start: float
    end: float
    cost: float

    @property
    def seconds(self) -> float:
        return self.end - self.start


class Lifetime:
    """A request from its beginning, by default now, over its borders to the last of them.

    One thread at a time notes borders; a request may go from thread to thread.

    >>> life = Lifetime("one", at=10.0)
    >>> life.mark("decode", at=12.0); life.mark("inference", at=15.0, batch=3)
    >>> life.seconds, [(span.stage, span.seconds, span.cost) for span in life.spans]
    (5.0, [('decode', 2.0, 2.0), ('inference', 3.0, 1.0)])
    """

    def __init__(self, name: str = "", *, at: float | None = None) -> None:
        self.name = name
        self.start = self.last = clock() if at is None else checks.number("at", at)
        self.spans: list[Span] = []

    def mark(self, stage: str, *, at: float | None = None, batch: int = 1) -> None:
        """All since the last border was `stage`, shared by `batch` requests. Raises ValueError for a border before the last one."""
        end = clock() if at is None else checks.number("at", at)
        if end < self.last:
            raise ValueError(f"at must not be before the last border ({self.last!r}), got {end!r}")
        seconds = end - self.last
        self.spans.append(Span(stage, self.last, end, seconds / checks.whole("batch", batch, low=1)))
        self.last = end

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """What runs inside is `name`; what went before it, since the last border, is `between`. Also when it raises."""
        now = clock()
        if now > self.last:
            self.mark(BETWEEN, at=now)
        try:
            yield
        finally:
            self.mark(name)

    @property
    def seconds(self) -> float:
        """From its beginning to its last border: the sum of its stages."""
        return self.last - self.start

    def of(self, *stages: str) -> float:
        """Seconds of these stages."""
        return sum(span.seconds for span in self.spans if span.stage in stages)


class _Unseen(Lifetime):
    """A request that was not sampled: its borders are not noted."""

    def __init__(self) -> None:
        super().__init__(at=0.0)

    def mark(self, stage: str, *, at: float | None = None, batch: int = 1) -> None:
        pass

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        yield


UNSEEN = _Unseen()
"""A lifetime that forgets everything: for callers who trace nothing."""


class StageProfiler:
    """Begins and keeps lifetimes: one in `every` requests, the newest `most` of them. Threads may share it.

    >>> profiler = StageProfiler(every=2)
    >>> lives = [profiler.begin(str(i)) for i in range(4)]
    >>> for life in lives: profiler.end(life)
    >>> [life.name for life in profiler.lifetimes()], profiler.begun
    (['0', '2'], 4)
    """

    def __init__(self, *, every: int = 1, most: int = 10_000) -> None:
        self.every = checks.whole("every", every, low=1)
        self._ended: deque[Lifetime] = deque(maxlen=checks.whole("most", most, low=1))
        self._lock = threading.Lock()
        self.begun = self.ended = 0

    def begin(self, name: str = "", *, at: float | None = None) -> Lifetime:
        """A lifetime that begins now, or at `at`; one that forgets everything for a request that is not sampled."""
        with self._lock:
            number, self.begun = self.begun, self.begun + 1
        return Lifetime(name or str(number), at=at) if number % self.every == 0 else UNSEEN

    def end(self, life: Lifetime) -> None:
        """Keep a lifetime: it has passed its last border."""
        if life is UNSEEN:
            return
        with self._lock:
            self.ended += 1
            self._ended.append(life)

    @property
    def dropped(self) -> int:
        """Lifetimes that ended and were not kept, because there were more than `most`."""
        return self.ended - len(self._ended)

    def lifetimes(self) -> list[Lifetime]:
        """Those kept, in the order they ended."""
        with self._lock:
            return list(self._ended)

    def clear(self) -> None:
        """Forget what ended so far."""
        with self._lock:
            self._ended.clear()
            self.ended = 0


@dataclass(frozen=True)
class StageTime:
    """A stage over many requests: mean seconds a request waited in it, their share of all latency, and mean seconds it cost."""

    seconds: float
    share: float
    cost: float


def breakdown(lifetimes: Sequence[Lifetime]) -> dict[str, StageTime]:
    """Each stage's time, in the order in which stages first occur. Shares add up to 1. Raises ValueError for no lifetimes."""
    if not lifetimes:
        raise ValueError("lifetimes must hold at least one")
    total = sum(life.seconds for life in lifetimes)
    seconds: dict[str, float] = {}
    cost: dict[str, float] = {}
    for life in lifetimes:
        for span in life.spans:
            seconds[span.stage] = seconds.get(span.stage, 0.0) + span.seconds
            cost[span.stage] = cost.get(span.stage, 0.0) + span.cost
    n = len(lifetimes)
    return {
        name: StageTime(seconds[name] / n, seconds[name] / total if total else 0.0, cost[name] / n) for name in seconds
    }


def share_outside(lifetimes: Sequence[Lifetime], *inside: str) -> float:
    """The share of all latency that lies in other stages than these. Raises ValueError for no lifetimes."""
    return 1.0 - sum(one.share for name, one in breakdown(lifetimes).items() if name in inside)


@dataclass(frozen=True)
class Flow:
    """Of a window of time: requests in it on average, those that ended a second, and how long they had taken on average.

    In a steady state the first is the product of the others (Little's law).
    """

    in_flight: float
    throughput: float
    latency: float

    @property
    def error(self) -> float:
        """How far Little's law is missed, as a share of what is in flight; 0 where nothing took any time."""
        return abs(self.throughput * self.latency / self.in_flight - 1) if self.in_flight else 0.0


def flow(lifetimes: Sequence[Lifetime], start: float, end: float) -> Flow:
    """What was in flight between two times, and what ended then. Raises ValueError where nothing ended."""
    if not end > start:
        raise ValueError(f"end must be after start ({start!r}), got {end!r}")
    ended = [life for life in lifetimes if start < life.last <= end]
    if not ended:
        raise ValueError("no lifetime ended between start and end")
    inside = sum(max(0.0, min(life.last, end) - max(life.start, start)) for life in lifetimes)
    return Flow(
        inside / (end - start), len(ended) / (end - start), sum(life.seconds for life in ended) / len(ended)
    )  # fmt: skip


def chrome_trace(lifetimes: Iterable[Lifetime]) -> dict[str, Any]:
    """The lifetimes as a trace that chrome://tracing and Perfetto open: requests that overlap lie in lanes of their own."""
    return {"traceEvents": list(_events(lifetimes)), "displayTimeUnit": "ms"}


def _events(lifetimes: Iterable[Lifetime]) -> Iterator[dict[str, Any]]:
    free: list[float] = []  # when each lane is free again
    lives = sorted(lifetimes, key=lambda life: life.start)
    origin = lives[0].start if lives else 0.0
    for number, life in enumerate(lives):
        lane = next((lane for lane, until in enumerate(free) if until <= life.start), len(free))
        free[lane : lane + 1] = [life.last]
        for span in life.spans:
            yield {
                "name": span.stage,
                "cat": "stage",
                "ph": "X",
                "pid": 1,
                "tid": lane,
                "ts": 1e6 * (span.start - origin),
                "dur": 1e6 * span.seconds,
                "args": {
                    "life": number,
                    "request": life.name,
                    "start": span.start,
                    "end": span.end,
                    "cost": span.cost,
                },
            }


def write_spans(lifetimes: Iterable[Lifetime], path: Path | str) -> None:
    """Write the lifetimes as a Chrome trace, a stage a line, the file whole or not at all. Those without a border are left out."""
    with atomic_file(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        file.write('{"displayTimeUnit": "ms", "traceEvents": [')
        for number, event in enumerate(_events(lifetimes)):
            file.write((",\n" if number else "\n") + json.dumps(event))
        file.write("]}\n")


def read_spans(path: Path | str) -> list[Lifetime]:
    """The lifetimes in a trace that `write_spans` wrote, by their beginnings. Raises InputError, naming the file, for anything else, and
    for more than `LARGEST` bytes.

    Other traces have readers of their own: `methods.core.fleet.traces` (arrivals and lengths) and `assay.loadtest` (its own requests).
    """
    file = Path(path)
    lives: dict[int, Lifetime] = {}
    try:
        if (size := file.stat().st_size) > LARGEST:
            raise ValueError(f"it has {size} bytes, of at most {LARGEST}")
        for event in json.loads(file.read_text(encoding="utf-8"))["traceEvents"]:
            given = event["args"]
            number = checks.whole("life", given["life"], low=0)
            if number not in lives:
                lives[number] = Lifetime(str(given["request"]), at=given["start"])
            life = lives[number]
            if given["start"] != life.last:
                raise ValueError("the stages of a life must follow each other")
            life.mark(str(event["name"]), at=given["end"])
            spent = life.spans[-1]
            cost = checks.number("cost", given["cost"], low=0)
            life.spans[-1] = Span(spent.stage, spent.start, spent.end, cost)
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read {file}: {getattr(error, 'strerror', None) or error}") from None
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise InputError(f"{file} is no trace of lifetimes: {str(error)[:200]}") from None
    return list(lives.values())
