"""When the pools worked and the link was in use: events of several lanes, how much of two lanes lies beside each other, and a drawing.

Times of two processes of one machine can stand on one timeline: `time.perf_counter` is the same clock for both on Linux.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field

from assay import checks


@dataclass(frozen=True)
class Event:
    """What a lane did from `start` to `end`, in seconds: "model" and "memory 0" compute, "link" carries, "wait" is the model waiting.

    `batch` and `layer` say for whom; the last slice of a step belongs to the layer behind the last.
    """

    lane: str
    start: float
    end: float
    batch: int = 0
    layer: int = 0

    @property
    def seconds(self) -> float:
        return self.end - self.start


@dataclass
class Timeline:
    """Events in the order in which they were noted.

    >>> line = Timeline()
    >>> line.add("model", 0.0, 2.0)
    >>> line.add("memory 0", 1.0, 4.0, batch=1)
    >>> line.busy("model"), line.together("model", "memory 0"), line.seconds
    (2.0, 1.0, 4.0)
    >>> print(line.text(8))
    model    |0000    |
    memory 0 |  111111|
              0 to 4000 ms
    """

    events: list[Event] = field(default_factory=list)

    def add(self, lane: str, start: float, end: float, batch: int = 0, layer: int = 0) -> None:
        """Note an event. Raises ValueError for one that ends before it starts."""
        if not end >= start:
            raise ValueError(f"end must not lie before start ({start}), got {end}")
        self.events.append(Event(lane, start, end, batch, layer))

    @property
    def lanes(self) -> list[str]:
        """In the order in which they first came."""
        return list(dict.fromkeys(event.lane for event in self.events))

    @property
    def start(self) -> float:
        return min((event.start for event in self.events), default=0.0)

    @property
    def end(self) -> float:
        return max((event.end for event in self.events), default=0.0)

    @property
    def seconds(self) -> float:
        """From the first start to the last end."""
        return self.end - self.start

    def within(self, start: float, end: float) -> Timeline:
        """What lies between two moments; events that reach over one are cut there."""
        kept = (
            Event(event.lane, max(event.start, start), min(event.end, end), event.batch, event.layer)
            for event in self.events
        )
        return Timeline([event for event in kept if event.end > event.start])

    def busy(self, *lanes: str) -> float:
        """Seconds in which at least one of the lanes did something."""
        return _length(self._spans(lanes))

    def together(self, first: str, *others: str) -> float:
        """Seconds in which `first` did something and so did at least one of the others: the overlap."""
        return self.busy(first) + self.busy(*others) - self.busy(first, *others)

    def _spans(self, lanes: Iterable[str]) -> list[tuple[float, float]]:
        wanted = set(lanes)
        return sorted((event.start, event.end) for event in self.events if event.lane in wanted)

    def text(self, width: int = 100) -> str:
        """A drawing, one line a lane; a digit is the batch (its last digit). Raises ValueError for a width below 1."""
        width = checks.whole("width", width, low=1)
        scale = width / self.seconds if self.seconds else 0.0
        longest = max((len(lane) for lane in self.lanes), default=0)
        rows = []
        for lane in self.lanes:
            row = [" "] * width
            for event in self.events:
                if event.lane == lane:
                    first, last = (round((moment - self.start) * scale) for moment in (event.start, event.end))
                    row[first:last] = str(event.batch % 10) * (last - first)
            rows.append(f"{lane:<{longest}} |{''.join(row)}|")
        rows.append(f"{' ' * longest}  0 to {1e3 * self.seconds:.4g} ms")
        return "\n".join(rows)

    def to_json(self) -> str:
        """A list of events, seconds from the first start."""
        first = self.start
        return json.dumps(
            [{**asdict(event), "start": event.start - first, "end": event.end - first} for event in self.events]
        )


def _length(spans: list[tuple[float, float]]) -> float:
    """Seconds that sorted spans cover together."""
    covered, reached = 0.0, float("-inf")
    for start, end in spans:
        if end > reached:
            covered += end - max(start, reached)
            reached = end
    return covered
