"""The time of a tuning run: how much is left, and how large each step may be so that all of them fit.

The first step measures what things currently cost on this machine. From that follow the sizes of the steps that cannot be left
out: how much text quality is measured on, how often a cost is sampled, how many pairs the proof takes. Each has a minimum; a run
without time for the minimum says so and ends with what it has.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

now = time.monotonic

SURVEY, SCREENING, ASSESSING = 0.1, 0.15, 0.05  # shares of the whole time: looking, screening, one judgement of quality
SAMPLING = 0.01  # and one candidate's samples of its cost
LEAST_PAIRS = 6  # of the proof: fewer carry no exact interval
LEAST_TOKENS = 1024  # of held-out text: 16 blocks, below which the interval of the quality says little
WRITING = 5.0  # seconds to write the report, apart from loading the model


@dataclass(frozen=True)
class Costs:
    """What a run of the work costs here, in seconds, as the survey saw it: estimates for planning, never results."""

    start: float  # a child process until it has imported what it needs
    load: float  # loading the model and its work
    run: float  # one run of the goal's work, in the dtype candidates are built on
    loaded_run: float  # the same in the dtype the model is stored in
    quality: float  # judging the quality on all of the held-out text

    @property
    def slow(self) -> bool:
        """Whether the model as loaded is so slow (float16 on a CPU) that its runs would use up the whole proof."""
        return self.loaded_run > 5 * self.run


@dataclass(frozen=True)
class Sizes:
    """The sizes of the steps that cannot be left out."""

    text: float  # share of the held-out text that quality is judged on
    sampling: float  # seconds of one candidate's samples


class Budget:
    """The clock of one run: `minutes`, starting now."""

    def __init__(self, minutes: float) -> None:
        self.minutes = minutes
        self.total = 60 * minutes
        self.began = now()
        self.end = self.began + self.total
        self.costs = Costs(0.0, 0.0, 0.0, 0.0, 0.0)  # until the survey knows

    def left(self) -> float:
        """Seconds left; negative once the time is up."""
        return self.end - now()

    def spent(self) -> float:
        return now() - self.began

    def text(self) -> str:
        """`left` for people: "4:05 left"."""
        seconds = max(int(self.left()), 0)
        return f"{seconds // 60}:{seconds % 60:02d} left"

    def sizes(self) -> Sizes:
        """Sizes planned from the survey's costs: full ones if there is time, smaller ones if not."""
        whole = self.costs.quality
        return Sizes(min(ASSESSING * self.total / whole, 1.0) if whole > 0 else 1.0, SAMPLING * self.total)

    def tail(self) -> float:
        """Seconds reserved for profiling and writing the result."""
        return min(WRITING + self.costs.start + 2 * self.costs.load, 0.25 * self.total)

    def assessing(self, run: float | None = None) -> float:
        """Expected seconds to assess a recipe of which one run takes `run` seconds (None: as long as what candidates are built on).

        They go to its process, a warm-up, the samples, and its quality.
        """
        run, sizes = self.costs.run if run is None else run, self.sizes()
        samples = min(max(sizes.sampling, 2 * run), 5 * run)
        return self.costs.start + self.costs.load + run + samples + sizes.text * self.costs.quality

    def proof(self, pairs: int, one_round: float) -> float:
        """Expected seconds of a proof with a warm-up and `pairs` rounds of `one_round` seconds each, including loading its models."""
        return self.costs.start + 3 * self.costs.load + (1 + pairs) * one_round


def rows_of(share: float, rows: int, width: int) -> int:
    """How many of `rows` windows of `width` tokens to use: the given share, but at least `LEAST_TOKENS` tokens and one window.

    >>> rows_of(0.5, 40, 1024)
    20
    """
    least = math.ceil(LEAST_TOKENS / width)
    return max(min(rows, max(round(share * rows), least)), 1)
