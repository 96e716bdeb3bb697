"""What a pipeline can do, from its stages' times: the bottleneck, what faster inference can gain at most, and waiting by simulation."""

from __future__ import annotations

import heapq
import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from assay import checks


@dataclass(frozen=True)
class Stage:
    """A stage with `workers`, each of which takes up to `batch` items at a time, in `fixed + each * items` seconds.

    `visits` is how many items of a request come here on average. `tau` is how long the oldest waits for a batch to fill.

    >>> Stage("classify", fixed=0.002, each=0.001, batch=8, visits=2).capacity
    400.0
    """

    name: str
    each: float
    fixed: float = 0.0
    workers: int = 1
    batch: int = 1
    visits: float = 1.0
    tau: float = 0.0

    def __post_init__(self) -> None:
        for name in ("each", "fixed", "tau", "visits"):
            checks.number(name, getattr(self, name), low=0)
        for name in ("workers", "batch"):
            checks.whole(name, getattr(self, name), low=1)
        if not self.each + self.fixed > 0:
            raise ValueError("each and fixed must not both be 0: nothing would take any time")

    def seconds(self, items: int) -> float:
        """Of a batch of so many."""
        return self.fixed + self.each * items

    @property
    def capacity(self) -> float:
        """Requests a second at most, in full batches."""
        full = self.workers * self.batch / self.seconds(self.batch)
        return full / self.visits if self.visits else float("inf")

    @property
    def work(self) -> float:
        """Seconds of a worker that a request takes, in full batches."""
        return self.visits * self.seconds(self.batch) / self.batch


def throughput(stages: Sequence[Stage], *, cores: int | None = None) -> float:
    """Requests a second at most: the least capacity of a stage; with `cores`, no more than so many processors do of all stages' work."""
    if not stages:
        raise ValueError("stages must hold at least one")
    found = min(stage.capacity for stage in stages)
    if cores is not None:
        work = sum(stage.work for stage in stages)
        found = min(found, checks.whole("cores", cores, low=1) / work if work else math.inf)
    return found


def bottleneck(stages: Sequence[Stage]) -> Stage:
    """The stage of the least capacity, the first of several."""
    if not stages:
        raise ValueError("stages must hold at least one")
    return min(stages, key=lambda stage: stage.capacity)


def amdahl(share: float, factor: float) -> float:
    """How many times faster all becomes where a `share` of it becomes `factor` times faster; infinity is a factor too.

    >>> round(amdahl(0.44, float("inf")), 3)
    1.786
    """
    checks.number("share", share, low=0, high=1)
    rest = 0.0
    if factor != float("inf"):
        rest = share / checks.number("factor", factor, above=0)
    left = 1 - share + rest
    return 1 / left if left else float("inf")


def impact(with_stage: float, without: float) -> float:
    """The share of throughput that a stage takes: 1 - throughput with it / throughput without."""
    return 1 - checks.number("with_stage", with_stage, above=0) / checks.number("without", without, above=0)


def advice(stages: Sequence[Stage], *, inference: str = "inference", cores: int | None = None) -> str:
    """A sentence about what holds the pipeline up, and what to do first. Raises ValueError where no request comes to any stage."""
    worst, most = bottleneck(stages), throughput(stages, cores=cores)
    if most == math.inf:
        raise ValueError("stages must hold one with visits above 0")
    if cores is not None and most < 0.999 * worst.capacity:
        dearest = max(stages, key=lambda stage: stage.work)
        return (
            f"all {cores} processors are busy at {most:.4g} requests a second: {dearest.name} takes most of their time"
        )
    alone = [(stage.name, stage.visits * stage.seconds(1)) for stage in stages]
    share = sum(seconds for name, seconds in alone if name == inference) / sum(seconds for _, seconds in alone)
    gain = amdahl(share, float("inf"))
    bound = (
        f"{inference} is {100 * share:.0f} % of a request's time alone: were it free, that would be {gain:.3g}x faster"
    )
    how = "a larger batch or another worker" if worst.batch > 1 else "another worker"
    return f"{worst.name} holds the pipeline at {worst.capacity:.4g} requests a second: {how} there; {bound}"


@dataclass(frozen=True)
class Simulated:
    """What a simulation did: when each request left, in the order they came, and the batches of each stage."""

    arrivals: tuple[float, ...]
    ends: tuple[float, ...]
    batches: dict[str, tuple[int, ...]]

    @property
    def throughput(self) -> float:
        """Requests a second, from the first arrival to the last answer."""
        return len(self.ends) / max(max(self.ends) - self.arrivals[0], 1e-12)

    def latency(self, share: float) -> float:
        """That within which this share of requests were answered."""
        return float(np.quantile(np.subtract(self.ends, self.arrivals), checks.number("share", share, low=0, high=1)))


def simulate(stages: Sequence[Stage], arrivals: Sequence[float]) -> Simulated:
    """Requests through the stages, one after the other, event by event; times of stages do not vary, and stages share no processors.

    Of a stage with `visits` other than 1, request i has the whole number of items that keeps the mean: floor((i + 1) v) - floor(i v);
    it goes on when its last item is done, at once if it has none. Raises ValueError for no stages, no arrivals, and times that go back or
    are not finite, and two stages of one name.
    """
    if not stages or not arrivals:
        raise ValueError("stages and arrivals must hold at least one")
    if len({stage.name for stage in stages}) < len(stages):
        raise ValueError("stages must have different names")
    times = [checks.number("arrivals", at) for at in arrivals]
    if any(later < earlier for earlier, later in zip(times, times[1:], strict=False)):
        raise ValueError("arrivals must be in order")
    batches: dict[str, tuple[int, ...]] = {}
    for stage in stages:
        counts = [int((i + 1) * stage.visits + 1e-9) - int(i * stage.visits + 1e-9) for i in range(len(times))]
        times, batches[stage.name] = _through(stage, times, counts)
    return Simulated(tuple(float(at) for at in arrivals), tuple(times), batches)


def _through(stage: Stage, times: list[float], counts: list[int]) -> tuple[list[float], tuple[int, ...]]:
    """When each request's last item leaves a stage that it reaches at these times, and the sizes of the batches."""
    coming = deque((times[i], i) for i in sorted(range(len(times)), key=lambda i: times[i]) for _ in range(counts[i]))
    free = [-math.inf] * stage.workers
    heapq.heapify(free)
    ends, sizes = list(times), []
    while coming:
        ready = max(coming[0][0], heapq.heappop(free))
        full = coming[stage.batch - 1][0] if len(coming) >= stage.batch else float("inf")
        start = max(ready, min(full, coming[0][0] + stage.tau))
        taken: list[int] = []
        while coming and len(taken) < stage.batch and coming[0][0] <= start:
            taken.append(coming.popleft()[1])
        end = start + stage.seconds(len(taken))
        heapq.heappush(free, end)
        sizes.append(len(taken))
        for request in taken:
            ends[request] = max(ends[request], end)
    return ends, tuple(sizes)
