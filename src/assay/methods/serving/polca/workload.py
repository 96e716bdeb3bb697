"""Requests of a row of servers, made up: classes of requests, a day, bursts, and how far the bursts of servers coincide."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from assay import checks
from assay.methods.core.fleet.traces import Request, Streams, Trace, merged
from assay.methods.serving.polca.policy import HIGH, LOW
from assay.methods.serving.polca.row import RowSpec


@dataclass(frozen=True)
class RequestClass:
    """Requests alike: tokens of prompt and answer (least, most), their share of all, and how many of them have high priority (a share)."""

    name: str
    prompt: tuple[int, int]
    new: tuple[int, int]
    share: float
    high: float

    def __post_init__(self) -> None:
        for name in ("prompt", "new"):
            low, high = getattr(self, name)
            checks.whole(name, high, low=checks.whole(name, low, low=1))
        checks.number("share", self.share, above=0, high=1)
        checks.number("high", self.high, low=0, high=1)


CLASSES = (
    RequestClass("summarise", (2048, 8192), (256, 512), share=0.25, high=0.0),
    RequestClass("search", (512, 2048), (1024, 2048), share=0.25, high=1.0),
    RequestClass("chat", (2048, 4096), (128, 2048), share=0.5, high=0.5),
)
"""Recalled."""


@dataclass(frozen=True)
class Workload:
    """What `synthetic` makes, for one server; every server gets as much, however many there are.

    `rows`: answers in the making at the peak of the day, if none waited. The rate follows a cosine from `trough` (a share of the peak) at
    the start to the peak after half a `day` of so many seconds. On top, in `burst_share` of the time, it is `burst` times as high, in
    blocks of `burst_seconds`, and lower in the others, so that the mean is the same. `correlation` is that of two servers' bursts: 0,
    each has its own; 1, all have them together. It changes neither the requests a server gets on average nor their lengths.
    """

    classes: Sequence[RequestClass] = CLASSES
    rows: float = 2.5
    seconds: float = 3600.0
    day: float = 3600.0
    trough: float = 0.5
    burst: float = 2.0
    burst_share: float = 0.2
    burst_seconds: float = 120.0
    correlation: float = 0.0

    def __post_init__(self) -> None:
        for name in ("rows", "seconds", "day", "burst_seconds"):
            checks.number(name, getattr(self, name), above=0)
        for name in ("trough", "correlation"):
            checks.number(name, getattr(self, name), low=0, high=1)
        checks.number("burst_share", self.burst_share, low=0, below=1)
        checks.number("burst", self.burst, low=1)
        if self.burst * self.burst_share > 1:
            raise ValueError(f"burst * burst_share must be at most 1, got {self.burst * self.burst_share:g}")
        for group, name in ((LOW, "low"), (HIGH, "high")):
            if not sum(_weight(one, group) for one in self.classes):
                raise ValueError(f"classes must have requests of {name} priority")

    def at(self, seconds: np.ndarray) -> np.ndarray:
        """The rate of the day as a share of its peak."""
        return self.trough + (1 - self.trough) * (1 - np.cos(2 * math.pi * seconds / self.day)) / 2


Lengths = Mapping[str, Sequence[tuple[int, int]]]


def synthetic(workload: Workload, row: RowSpec, *, seed: int = 0, lengths: Lengths | None = None) -> Trace:
    """Requests for every server of a row, each with the server's number as its tenant; `Trace.source` says that they are made up.

    A server's requests depend on its number and the seed only: a row with more servers has the same ones and more, so that two rows or
    two policies are compared on the same requests. `lengths` has pairs of prompt and new tokens by class to draw from, of real
    documents, say; without it they are uniform between the class's bounds.
    Not for what a given data centre would see: record its own requests (`core.fleet.traces.read_trace`) and deal them out (`dealt`).
    """
    streams = Streams(seed)
    blocks = math.ceil(workload.seconds / workload.burst_seconds)
    together = streams.of("bursts").random(blocks) < workload.burst_share
    calm = (1 - workload.burst * workload.burst_share) / (1 - workload.burst_share)
    found = []
    for number in range(row.servers):
        chance = streams.of(f"server {number}")
        group = row.group(number)
        own = chance.random(blocks) < workload.burst_share
        shares = chance.random(blocks) < math.sqrt(workload.correlation)
        rate = np.where(np.where(shares, together, own), workload.burst, calm)
        peak = workload.rows / _seconds(workload, row, group, lengths)
        highest = peak * max(workload.burst, calm)
        times = np.sort(chance.random(chance.poisson(highest * workload.seconds)) * workload.seconds)
        wanted = peak * workload.at(times) * rate[(times / workload.burst_seconds).astype(int)]
        times = times[chance.random(len(times)) * highest < wanted]
        found.append(_requests(times, workload, group, number, chance, lengths))
    source = f"synthetic: {len(workload.classes)} classes, {workload.seconds:g} s, correlation {workload.correlation:g}, seed {seed}"
    return Trace(tuple(merged(found)), source=source)


def _requests(
    times: np.ndarray,
    workload: Workload,
    group: int,
    number: int,
    chance: np.random.Generator,
    lengths: Lengths | None,
) -> list[Request]:
    weights = np.array([_weight(one, group) for one in workload.classes])
    kinds = chance.choice(len(weights), size=len(times), p=weights / weights.sum())
    drawn = chance.random((len(times), 2))
    found = []
    for at, kind, (a, b) in zip(times, kinds, drawn, strict=True):
        one = workload.classes[kind]
        if lengths is None:
            pair = (_between(one.prompt, a), _between(one.new, b))
        else:
            pair = lengths[one.name][int(a * len(lengths[one.name]))]
        found.append(Request(float(at), int(pair[0]), int(pair[1]), str(number), group))
    return found


def _between(bounds: tuple[int, int], share: float) -> int:
    return bounds[0] + int(share * (bounds[1] - bounds[0] + 1))


def _weight(one: RequestClass, group: int) -> float:
    return one.share * (one.high if group == HIGH else 1 - one.high)


def _seconds(workload: Workload, row: RowSpec, group: int, lengths: Lengths | None) -> float:
    """Seconds of a mean request of a group among as many others as run at the peak."""
    times, rows = row.spec.times, max(workload.rows, 1.0)
    total = weights = 0.0
    for one in workload.classes:
        pairs = np.array(
            [[sum(one.prompt) / 2, sum(one.new) / 2]] if lengths is None else lengths[one.name], dtype=float
        )
        prompt, new = pairs.T
        step = times.step + rows * (times.row + times.context * (prompt + new / 2))
        total += _weight(one, group) * float((times.prefill * prompt + new * step).mean())
        weights += _weight(one, group)
    return total / weights


def dealt(requests: Sequence[Request], row: RowSpec, *, seed: int = 0) -> list[Request]:
    """A recorded trace on a row: each request goes to one of the servers of its priority, drawn at random.

    Requests with a priority above 0 are high. Raises ValueError where a priority has no server.
    """
    chance = Streams(seed).of("dealt")
    servers = {group: [n for n in range(row.servers) if row.group(n) == group] for group in (LOW, HIGH)}
    found = []
    for request in requests:
        group = HIGH if request.priority > 0 else LOW
        if not servers[group]:
            raise ValueError(f"row must have servers of {'high' if group == HIGH else 'low'} priority")
        number = servers[group][int(chance.integers(len(servers[group])))]
        found.append(replace(request, tenant=str(number), priority=group))
    return found
