"""The reward: one number of how a program ended, how many tests it passed, and how fast it was beside a reference."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Literal

from assay import checks

Ended = Literal["no program", "failed", "wrong", "right"]
"""In the order of rewards. "failed" is an error of run time or a time-out: nobody knows whether the program would have been right."""
ENDS: tuple[Ended, ...] = ("no program", "failed", "wrong", "right")


@dataclass(frozen=True)
class Executed:
    """What came of running a program.

    `passed` is the share of tests with the right answer, `ratio` the reference's cost over the program's on the timed inputs (2 is twice
    as fast), None where it did not return on all of them. Raises ValueError for values that contradict each other.
    """

    ended: Ended
    passed: float = 0.0
    ratio: float | None = None
    why: str = ""

    def __post_init__(self) -> None:
        checks.choice("ended", self.ended, ENDS)
        checks.number("passed", self.passed, low=0, high=1)
        if self.ratio is not None and not self.ratio > 0:
            raise ValueError(f"ratio must be above 0, got {self.ratio}")
        if self.ended == "right" and (self.ratio is None or self.passed < 1):
            raise ValueError("a right program must have passed everything and must have a ratio")
        if self.ended == "wrong" and self.passed >= 1:
            raise ValueError("a wrong program must have passed less than everything")


@dataclass(frozen=True)
class Reward:
    """The step reward of an `Executed`, in [-1, 1]. All constants are our choice: the paper's are not public.

    No program at all: `no_program`. An error or a time-out: `failed`. A wrong answer: `wrong` + `passing` * share of tests passed, always
    below 0. All right: `right` + `speed` * g(rho), rho the reference's cost over the program's. g is `steps[i]` from `edges[i - 1]` on,
    and the step around 1 is a dead zone that noise does not leave; with `smooth` it is log2(rho) / 2 + 1/2, between 0 and 1.
    `of` is for ablations: "correctness" takes every right program as fast as the reference, "speed" every program that returned as right.
    A program slower than the reference by more than `time_out` is one that was stopped (see `Executor`).
    Raises ValueError for constants that break the order of outcomes or leave [-1, 1].

    >>> reward = Reward()
    >>> reward(Executed("wrong", 0.0)), reward(Executed("right", 1.0, 1.0)), reward(Executed("right", 1.0, 3.0))
    (-0.3, 0.75, 1.0)
    """

    no_program: float = -1.0
    failed: float = -0.6
    wrong: float = -0.3
    passing: float = 0.2
    right: float = 0.5
    speed: float = 0.5
    edges: tuple[float, ...] = (0.5, 0.9, 1.1, 2.0)
    steps: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    smooth: bool = False
    of: Literal["both", "correctness", "speed"] = "both"

    def __post_init__(self) -> None:
        for name in ("no_program", "failed", "wrong", "passing", "right", "speed"):
            checks.number(name, getattr(self, name), low=-1, high=1)
        checks.flag("smooth", self.smooth)
        checks.choice("of", self.of, ("both", "correctness", "speed"))
        ordered = self.no_program < self.failed < self.wrong <= self.wrong + self.passing < 0 < self.right
        if not ordered or self.passing < 0 or self.speed < 0 or self.right + self.speed > 1:
            raise ValueError(
                "constants must be no_program < failed < wrong <= wrong + passing < 0 < right <= right + speed <= 1, got "
                f"{self.no_program}, {self.failed}, {self.wrong}, {self.passing}, {self.right}, {self.speed}"
            )
        if len(self.steps) != len(self.edges) + 1:
            raise ValueError(f"steps must be one more than the {len(self.edges)} edges, got {len(self.steps)}")
        for name, values, low in (("edges", self.edges, 0.0), ("steps", self.steps, -1.0)):
            rising = all(a < b if name == "edges" else a <= b for a, b in itertools.pairwise(values))
            if not rising or not all(math.isfinite(value) and value > low for value in values):
                raise ValueError(f"{name} must be finite and rise, got {values}")
        if self.steps[0] != 0 or self.steps[-1] != 1:
            raise ValueError(f"steps must go from 0 to 1, got {self.steps}")

    def speed_step(self, ratio: float) -> float:
        """g: 0 for slow to 1 for fast, never falling as the ratio grows.

        >>> Reward().speed_step(1.0), Reward().speed_step(1.05), Reward(smooth=True).speed_step(2.0)
        (0.5, 0.5, 1.0)
        """
        if not ratio > 0:
            raise ValueError(f"ratio must be above 0, got {ratio}")
        if self.smooth:
            return min(1.0, max(0.0, math.log2(ratio) / 2 + 0.5))
        return self.steps[sum(ratio >= edge for edge in self.edges)]

    def __call__(self, executed: Executed) -> float:
        if executed.ended == "no program":
            return self.no_program
        if executed.ended == "right" or self.of == "speed" and executed.ratio is not None:
            assert executed.ratio is not None
            return self.right + self.speed * self.speed_step(1.0 if self.of == "correctness" else executed.ratio)
        if executed.ended == "failed":
            return self.failed
        return self.wrong + self.passing * executed.passed
