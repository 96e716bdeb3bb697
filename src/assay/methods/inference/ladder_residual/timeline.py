"""When a rank computed, when its messages were under way, and when it waited for them: recorded, or computed from a schedule."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Literal, get_args

from assay import checks

Lane = Literal["compute", "link", "wait"]
LANES: tuple[Lane, ...] = get_args(Lane)
MARKS = {"attention": "a", "mlp": "m", "attention+mlp": "b"}


@dataclass(frozen=True)
class Event:
    """What happened from `start` to `end`, in seconds. `name` is a module and its layer: "attention 3".

    Lane "compute" is the processor at work, "link" a message under way, "wait" the processor waiting for that message or handing it over.
    Raises ValueError for an event that ends before it starts.
    """

    lane: Lane
    name: str
    start: float
    end: float

    def __post_init__(self) -> None:
        if not self.end >= self.start:
            raise ValueError(f"end must not lie before start ({self.start}), got {self.end}")

    @property
    def seconds(self) -> float:
        return self.end - self.start


@dataclass
class Timeline:
    """The events of one rank, in the order in which they were noted.

    >>> line = Timeline([Event("compute", "attention 0", 0.0, 2.0), Event("link", "attention 0", 2.0, 5.0),
    ...                  Event("compute", "mlp 0", 2.0, 4.0), Event("wait", "attention 0", 4.0, 5.0)])
    >>> line.seconds, line.total("link"), round(line.hidden, 2)
    (5.0, 3.0, 0.67)
    >>> print(line.text(10))
    compute |aaaammmm  |
    link    |    ------|
    wait    |        ..|
             0 to 5000 ms, 67 % of the communication hidden
    """

    events: list[Event] = field(default_factory=list)

    def add(self, lane: Lane, name: str, start: float, end: float) -> None:
        """Note an event. Raises what `Event` raises."""
        self.events.append(Event(lane, name, start, end))

    @contextmanager
    def noting(self, lane: Lane, name: str) -> Iterator[None]:
        """Note what happens inside, by `time.perf_counter`."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.add(lane, name, start, time.perf_counter())

    @property
    def seconds(self) -> float:
        """From the first start to the last end; 0 without events."""
        if not self.events:
            return 0.0
        return max(event.end for event in self.events) - min(event.start for event in self.events)

    def total(self, lane: Lane) -> float:
        """Seconds of all events of a lane; messages under way at the same time count each."""
        return sum(event.seconds for event in self.events if event.lane == lane)

    @property
    def hidden(self) -> float:
        """The share of the communication during which nobody waited for it: 0 for blocking messages, 1 for a hidden link or none."""
        link = self.total("link")
        return 1 - min(self.total("wait") / link, 1.0) if link else 1.0

    def text(self, width: int = 100) -> str:
        """A drawing, one line a lane, `width` characters for the whole: a attention, m MLP, b both, - a message, . waiting.

        Raises ValueError for a width below 1.
        """
        width = checks.whole("width", width, low=1)
        first = min((event.start for event in self.events), default=0.0)
        scale = width / self.seconds if self.seconds else 0.0
        rows = []
        for lane in LANES:
            row = [" "] * width
            for event in self.events:
                if event.lane == lane:
                    mark = {"link": "-", "wait": "."}.get(lane) or MARKS.get(event.name.split()[0], "x")
                    start, end = (round((moment - first) * scale) for moment in (event.start, event.end))
                    row[start:end] = mark * (end - start)
            rows.append(f"{lane:<7} |{''.join(row)}|")
        rows.append(f"         0 to {1e3 * self.seconds:.4g} ms, {100 * self.hidden:.0f} % of the communication hidden")
        return "\n".join(rows)

    def to_json(self) -> str:
        """A list of {"lane", "name", "start", "end"}, seconds from the first start."""
        first = min((event.start for event in self.events), default=0.0)
        rows = [{**asdict(event), "start": event.start - first, "end": event.end - first} for event in self.events]
        return json.dumps(rows)

    @classmethod
    def from_json(cls, text: str) -> Timeline:
        """What `to_json` wrote. Raises ValueError for anything else."""
        try:
            rows: Sequence[dict[str, object]] = json.loads(text)
            events = [
                Event(
                    checks.choice("lane", row["lane"], LANES),  # type: ignore[arg-type]
                    str(row["name"]),
                    checks.number("start", row["start"]),
                    checks.number("end", row["end"]),
                )
                for row in rows
            ]
        except (TypeError, KeyError) as error:
            raise ValueError(f"text must be a list of events with lane, name, start and end: {error}") from None
        return cls(events)
