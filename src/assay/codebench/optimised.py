"""What an optimisation found: the steps, what they save on which inputs, and the difference as a diff."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from assay.measure.stats import Interval


@dataclass(frozen=True)
class Step:
    """An accepted edit: its rule, its line in the program before it, why, and the ratio of costs on the inputs that were searched with."""

    rule: str
    line: int
    why: str
    ratio: Interval
    by_model: bool = False


@dataclass
class Asked:
    """A model, and what asking it took so far: questions, tokens of questions and answers (None where nobody counted them), seconds.

    `fingerprint` is a hash of its files, known once it was asked; `trouble` says why it was not asked, or not any more, or why
    nothing of it was taken in the end.
    """

    name: str
    fingerprint: str = ""
    questions: int = 0
    tokens: int | None = 0
    seconds: float = 0.0
    trouble: str = ""


@dataclass(frozen=True)
class Class:
    """Inputs of one kind that were kept back: how many calls, what they cost before and after, and the ratio (above 1: cheaper)."""

    name: str
    calls: int
    before: float
    after: float
    ratio: Interval

    @property
    def verdict(self) -> str:
        """cheaper, dearer, or no difference seen."""
        return "cheaper" if self.ratio.low > 1 else "dearer" if self.ratio.high < 1 else "no difference seen"


@dataclass(frozen=True)
class Optimised:
    """What was found. `program` is the one given where nothing was (`why` says so), `ratio` that of all kept back inputs together.

    `refused` counts candidates by what they failed; `tested` the inputs on which the result did what the program did: calls of the tests,
    made inputs that the search used, and those that were kept back; `left_out` counts the calls of the tests that could not be compared, by
    function. `model` is the one that was given.
    """

    file: str
    meter: str
    original: str
    program: str
    why: str = ""
    steps: tuple[Step, ...] = ()
    ratio: Interval | None = None
    classes: tuple[Class, ...] = ()
    tested: Mapping[str, int] = field(default_factory=dict)
    functions: Mapping[str, str] = field(default_factory=dict)
    left_out: Mapping[str, int] = field(default_factory=dict)
    candidates: int = 0
    refused: Mapping[str, int] = field(default_factory=dict)
    model: Asked | None = None

    @property
    def found(self) -> bool:
        """Whether there is something to hand over."""
        return self.program != self.original

    @property
    def diff(self) -> str:
        """The result as a unified diff; empty where nothing was found. What a model wrote is said above it, where `patch` reads nothing."""
        old, new = map(lines_of, (self.original, self.program))
        lines = difflib.unified_diff(old, new, f"a/{Path(self.file).name}", f"b/{Path(self.file).name}")
        marks = [f"# line {step.line}: {step.why}\n" for step in self.steps if step.by_model]
        return "".join(
            line if line.endswith("\n") else f"{line}\n\\ No newline at end of file\n" for line in (*marks, *lines)
        )


def lines_of(text: str) -> list[str]:
    """Lines as Python and `patch` count them: a form feed ends none."""
    return re.findall(r"[^\n]*\n|[^\n]+", text)


def document(found: Optimised) -> dict[str, Any]:
    """What was found, for JSON."""

    def of(ratio: Interval | None) -> dict[str, float | None] | None:
        if ratio is None:
            return None
        bounds = {"median": ratio.median, "low": ratio.low, "high": ratio.high}
        return {name: value if value < float("inf") else None for name, value in bounds.items()}

    return {
        "file": found.file,
        "found": found.found,
        "why": found.why,
        "meter": found.meter,
        "ratio": of(found.ratio),
        "steps": [
            {"rule": one.rule, "line": one.line, "why": one.why, "ratio": of(one.ratio), "by_model": one.by_model}
            for one in found.steps
        ],
        "classes": [
            {
                "inputs": one.name,
                "calls": one.calls,
                "before": one.before,
                "after": one.after,
                "ratio": of(one.ratio),
                "verdict": one.verdict,
            }
            for one in found.classes
        ],
        "tested": dict(found.tested),
        "functions": dict(found.functions),
        "left_out": dict(found.left_out),
        "candidates": found.candidates,
        "refused": dict(found.refused),
        "model": None if found.model is None else asdict(found.model),
        "diff": found.diff,
        "program": found.program,
    }
