"""Rotational staggered pipelining, event by event: n batches, n - 1 replicas of the model, one pool of memory devices, and nobody idle.

Slice k of batch j runs on replica (j + k) mod (n - 1), and batches begin t_m / (n - 1) apart. Where attention takes that long too,
a replica takes up the next batch when one leaves, and so does the memory pool. With two batches there is one replica and nothing moves.
The last slice of a token and the first of the next have no attention between them and count as one, so that a token is `layers` slices.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass

from assay import checks
from assay.methods.serving.attention_offloading.timeline import Timeline

MOST = 5_000_000  # events


@dataclass(frozen=True)
class Staggered:
    """What came out: the timeline (lanes "replica 0" ... and "memory"), and when each batch had finished each of its tokens."""

    timeline: Timeline
    finished: tuple[tuple[float, ...], ...]  # of each batch, each token

    @property
    def warm(self) -> tuple[float, float]:
        """From when every batch has finished its first token until the first batch has finished its last."""
        return max(ends[0] for ends in self.finished), min(ends[-1] for ends in self.finished)

    def utilisation(self, lane: str) -> float:
        """The share of that time in which a lane worked."""
        start, end = self.warm
        return self.timeline.within(start, end).busy(lane) / (end - start)

    @property
    def token_seconds(self) -> float:
        """Seconds a batch takes for a token after its first, the mean over batches."""
        each = [(ends[-1] - ends[0]) / (len(ends) - 1) for ends in self.finished]
        return sum(each) / len(each)

    @property
    def throughput(self) -> float:
        """Batches that are a token further, a second, of all batches together."""
        return sum((len(ends) - 1) / (ends[-1] - ends[0]) for ends in self.finished)


def replica_of(batch: int, piece: int, batches: int) -> int:
    """The replica that runs a batch's slice: (j + k) mod (n - 1), of which there is one for one batch and for two.

    >>> [replica_of(0, k, 3) for k in range(4)], [replica_of(1, k, 3) for k in range(4)]
    ([0, 1, 0, 1], [1, 0, 1, 0])
    """
    return (batch + piece) % max(1, batches - 1)


def staggered(
    slice_seconds: float,
    attention_seconds: float,
    *,
    batches: int = 2,
    layers: int = 8,
    tokens: int = 4,
    network_seconds: float = 0.0,
    migration_seconds: float = 0.0,
) -> Staggered:
    """`tokens` tokens of each batch. All times are a layer's: of a slice, of its attention, of the way there and back together, and of
    moving the context to another replica, which costs nothing where there is one.

    A pool takes up what is ready in the order in which it became ready. Raises ValueError for times below 0, no time at all, counts below
    1 and fewer than two tokens: the first one warms up.

    >>> run = staggered(2.0, 2.0)
    >>> run.utilisation("replica 0"), run.utilisation("memory"), run.throughput * 8 * (2.0 + 2.0)
    (1.0, 1.0, 2.0)
    """
    work = checks.number("slice_seconds", slice_seconds, low=0)
    attention = checks.number("attention_seconds", attention_seconds, low=0)
    if not work + attention > 0:
        raise ValueError("slice_seconds and attention_seconds must not both be 0: nothing would take any time")
    n, layers = checks.whole("batches", batches, low=1), checks.whole("layers", layers, low=1)
    tokens = checks.whole("tokens", tokens, low=2)
    way = checks.number("network_seconds", network_seconds, low=0) / 2
    move = checks.number("migration_seconds", migration_seconds, low=0) if n > 2 else 0.0
    if n * layers * tokens > MOST:
        raise ValueError(f"batches, layers and tokens must make at most {MOST} events, got {n * layers * tokens}")
    line, free = Timeline(), dict[str, float]()
    finished: list[list[float]] = [[] for _ in range(n)]
    # (when it is ready, in which order it became so, batch, slices done, whether attention is next)
    ready = [(batch * work / max(1, n - 1), batch, batch, 0, False) for batch in range(n)]
    heapq.heapify(ready)
    count = n
    while ready:
        now, _, batch, piece, attends = heapq.heappop(ready)
        lane = "memory" if attends else f"replica {replica_of(batch, piece, n)}"
        start = max(now, free.get(lane, 0.0))
        end = start + (attention if attends else work)
        free[lane] = end
        line.add(lane, start, end, batch, piece % layers)
        count += 1
        if not attends:
            heapq.heappush(ready, (end + way, count, batch, piece, True))
            continue
        piece += 1
        if piece % layers == 0:
            finished[batch].append(end + way)
        if piece < layers * tokens:
            heapq.heappush(ready, (end + way + move, count, batch, piece, False))
    return Staggered(line, tuple(map(tuple, finished)))
