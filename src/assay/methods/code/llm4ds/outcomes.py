"""What came of one attempt of one model at one task."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from assay import checks


@dataclass(frozen=True)
class Outcome:
    """One attempt of a model at a task: whether it passed, its seconds, and for plots how similar the picture was to the right one
    (-1 to 1, as structural similarity is).

    Raises TypeError and ValueError for values that are none; seconds are above 0.
    """

    task: str
    model: str
    passed: bool
    attempt: int = 1
    seconds: float | None = None
    similarity: float | None = None
    factors: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("task", "model"):
            if not isinstance(getattr(self, name), str) or not getattr(self, name):
                raise TypeError(f"{name} must be a text that is not empty, got {checks.shown(getattr(self, name))}")
        checks.flag("passed", self.passed)
        checks.whole("attempt", self.attempt, low=1)
        if self.seconds is not None:
            checks.number("seconds", self.seconds, above=0)
        if self.similarity is not None:
            checks.number("similarity", self.similarity, low=-1, high=1)
