"""What the steps of a tuning run share: the run's state, its messages, and the calls of its children."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from assay.errors import AssayError, InputError, MissingError
from assay.measure.isolate import ChildResult
from assay.methods.transform import SLOTS
from assay.tuner.budget import Budget
from assay.tuner.journal import Journal
from assay.tuner.nodes import Call, Nodes
from assay.tuner.outcome import Row, Screened, base_row
from assay.tuner.recipe import Recipe, Step
from assay.tuner.search import Option
from assay.tuner.transforms import get_transform
from assay.tuner.work import Settings

Say = Callable[[str], None]

QUIET = 15.0  # seconds after which a step that still runs says so


@dataclass
class Run:
    """What the steps of a run share."""

    settings: Settings
    output: Path
    max_drop: float
    budget: Budget
    journal: Journal
    nodes: Nodes
    memory_bytes: int
    say: Say
    survey: dict[str, Any] = field(default_factory=dict)
    limits: Any = None  # the machine's calibration
    machine: dict[str, Any] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)
    known: dict[str, dict[str, Any]] = field(default_factory=dict)  # by function: its quality and the structures seen
    screened: list[Screened] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def baseline(self) -> Row:
        """The model as loaded."""
        return self.rows[0]

    @property
    def base(self) -> Row:
        """The row that candidates build on."""
        return base_row(self.rows) or self.baseline

    @property
    def free(self) -> Row:
        """The cheapest of the free baselines."""
        done = [row for row in self.rows if row.status == "ok" and row.kind != "candidate"]
        return min(done, key=lambda row: row.cost or math.inf)

    @property
    def candidates(self) -> list[Row]:
        """The candidates that were assessed."""
        return [row for row in self.rows if row.kind == "candidate" and row.drop is not None]

    def recipe(self, steps: tuple[Step, ...]) -> Recipe:
        own = self.settings
        return Recipe(
            architecture=self.survey["architecture"],
            goal=own.goal,
            prompt_tokens=own.prompt_tokens,
            new_tokens=own.new_tokens,
            steps=steps,
        )

    def tell(self, text: str) -> None:
        self.say(f"[{self.budget.text()}] {text}")

    def note(self, text: str) -> None:
        """Say that something was left out or made smaller, now and in the outcome."""
        if text not in self.notes:
            self.notes.append(text)
            self.tell(text)

    def call(self, function: str, limit: float, /, **arguments: Any) -> Call:
        """A call of a function of `assay.tuner.child` for this run, with its time limit in seconds."""
        settings = dataclasses.asdict(self.settings)
        return Call(function, {"settings": settings, **arguments}, limit, self.memory_bytes)

    def child(self, function: str, limit: float, /, **arguments: Any) -> ChildResult:
        """Make such a call on one machine and wait for it."""
        return next(iter(self.nodes.run([self.call(function, limit, **arguments)])))[1]

    def must(self, function: str, what: str, /, **arguments: Any) -> dict[str, Any]:
        """Run a step that nothing can continue without: it gets all the remaining time, and its failure ends the run."""
        result = self.child(function, self.budget.left(), **arguments)
        if result.status != "ok":
            raise self.failure(result.status, result.error, what)
        return dict(result.value)

    def failure(self, status: str, error: str, what: str) -> AssayError:
        """The failure of an indispensable step, as a user error."""
        error = error or status
        for kind in (InputError, MissingError):
            if error.startswith(f"{kind.__name__}: "):
                return kind(error.removeprefix(f"{kind.__name__}: "))
        model, minutes = self.settings.model, self.budget.minutes
        if status == "out of memory":
            return InputError(f"{model} does not fit into the memory of one child: {error}; see --memory-gib")
        if status == "timeout":
            return self.too_short(what)
        return AssayError(f"{what} of {model} ended with {status}: {error} (--minutes {minutes:g})")

    def too_short(self, what: str) -> AssayError:
        return InputError(
            f"--minutes {self.budget.minutes:g} is too short for {self.settings.model} here: {what} alone takes longer; "
            "what was measured is kept, --resume with more --minutes goes on from there"
        )

    @contextlib.contextmanager
    def telling(self, text: str, news: Callable[[], list[str]] = list) -> Iterator[None]:
        """Announce what starts, repeat now and then that it is still running, and pass on `news` (polled twice a second)."""
        ended = threading.Event()

        def watch() -> None:
            begin = last = time.monotonic()
            while not ended.wait(0.5):
                for line in news():
                    self.tell(line)
                    last = time.monotonic()
                if time.monotonic() - last > QUIET:
                    last = time.monotonic()
                    self.tell(f"{text}: {last - begin:.0f} s so far")

        self.tell(text)
        thread = threading.Thread(target=watch, daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()


def over(base: Row, options: tuple[Option, ...]) -> tuple[Step, ...]:
    """The steps of a candidate: the base's and its own, in slot order."""
    return tuple(sorted([*base.recipe.steps, *(option.step for option in options)], key=slot_order))


def slot_order(step: Step) -> int:
    """The place of a step in a recipe."""
    return SLOTS.index(get_transform(step.transform).slot)
