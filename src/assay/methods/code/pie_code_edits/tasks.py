"""A program to be made faster, with tests: samples are compiled and run in the sandbox, judged outside, and have costs where right."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from assay import checks
from assay.methods.code.pie_code_edits.counting import METERS, run
from assay.methods.code.pie_code_edits.scores import Edits
from assay.methods.core.programs.processes import EMPTY, CompileError, Language, Program, compiled, program_of
from assay.methods.core.sandbox import Limits, Sandbox

FLAGS = ("-O3",)
"""The paper's; the standard is C++17."""
TOLERANCE = 1e-3
WHOLE = re.compile(r"[+-]?[0-9]+")


class TooCheap(ValueError):
    """A right program whose cost is below what the meter can tell from starting it."""


@dataclass(frozen=True)
class Test:
    """An input and the output that is right. `timed` ones count towards the cost, the others are for correctness only."""

    __test__ = False  # none of pytest's

    stdin: str
    expected: str
    timed: bool = True


def accuracy(expected: str, got: str, *, variant: Literal["paper", "as_released"] = "paper") -> float:
    """The share of lines of the output that are right: word by word equal, or numbers within 1e-3.

    All lines count: one that is missing or too many is wrong, and two empty outputs are equal. "as_released" pairs lines while both
    have some and divides by the expected ones: what comes after the last expected line is not looked at. Raises ValueError for an empty
    expected output there, which has no share.

    >>> accuracy("1\\n2\\n", "1\\n2.0001\\n"), accuracy("1\\n2\\n", "1\\n"), accuracy("1", "1\\n2")
    (1.0, 0.5, 0.5)
    >>> accuracy("1", "1\\n2", variant="as_released")
    1.0
    """
    checks.choice("variant", variant, ("paper", "as_released"))
    wanted, given = expected.rstrip().splitlines(), got.rstrip().splitlines()
    total = len(wanted) if variant == "as_released" else max(len(wanted), len(given))
    if not total:
        if variant == "as_released":
            raise ValueError("expected must have one line or more, got none")
        return 1.0
    return sum(map(_alike, wanted, given)) / total


def _alike(wanted: str, given: str) -> bool:
    words, found = wanted.split(), given.split()
    return len(words) == len(found) and all(map(_same, words, found))


def _same(word: str, found: str) -> bool:
    if word == found:
        return True
    if WHOLE.fullmatch(word) and WHOLE.fullmatch(found):  # they have no tolerance, and may have any length
        return _bare(word) == _bare(found)
    try:
        one, other = float(word), float(found)
    except ValueError:
        return False
    return math.isfinite(one) and math.isfinite(other) and abs(one - other) <= TOLERANCE


def _bare(word: str) -> str:
    """A whole number without what says nothing: a plus, zeros before it, the sign of 0."""
    digits = word.lstrip("+-").lstrip("0")
    return f"-{digits}" if digits and word[0] == "-" else digits


@dataclass(frozen=True)
class Found:
    """A program on the tests: its cost over the timed ones (None unless it is right on all), and what is wrong with it ("" if nothing)."""

    cost: float | None
    why: str = ""


@dataclass(frozen=True)
class EditTask:
    """A program and its tests. `flags` are the compiler's, the same for all samples.

    Raises ValueError without a timed test. Not for tests that a wrong program passes: "faster" is then what they do not see.
    """

    source: str
    tests: tuple[Test, ...]
    language: Language = "cpp"
    flags: tuple[str, ...] = FLAGS

    def __post_init__(self) -> None:
        if not any(test.timed for test in self.tests):
            raise ValueError(f"tests must hold one that is timed, got {len(self.tests)} that are not")

    def measure(
        self,
        program: str,
        sandbox: Sandbox,
        *,
        meter: str = "instructions",
        repeats: int = 1,
        limits: Limits | None = None,
        flags: Sequence[str] | None = None,
    ) -> Found:
        """Compile and run one program: tests that are not timed first, and no further than the first that it does not pass.

        The cost is the sum over timed tests of the median of their repeats. A program that does not compile, or is ended by a limit, is
        wrong. Meters are instructions (callgrind), cpu_seconds and peak_bytes. Raises ValueError for another one, and TooCheap
        where a right program costs less than the meter can tell: take larger inputs.
        """
        checks.choice("meter", meter, METERS)
        checks.whole("repeats", repeats, low=1)
        given = tuple(self.flags if flags is None else flags)
        try:
            made = self._made(program, given)
        except CompileError as error:
            return Found(None, f"it does not compile: {str(error)[:200]}")
        total = 0.0
        for number, test in sorted(enumerate(self.tests), key=lambda item: item[1].timed):
            stdin = test.stdin.encode()
            if test.timed:
                empty = self._made(EMPTY[self.language], given)
                times = 1 if meter == "instructions" else repeats  # they repeat: once is enough
                outcomes = [run(sandbox, made, stdin, meter, empty=empty, limits=limits) for _ in range(times)]
            else:
                outcomes = [run(sandbox, made, stdin, "peak_bytes", limits=limits)]  # which takes least
            for outcome in outcomes:
                if outcome.state != "returned":
                    return Found(None, f"test {number}: {outcome.error[:200]}")
                if (share := accuracy(test.expected, outcome.value)) < 1:
                    return Found(None, f"test {number}: {share:.0%} of its output is right")
            if test.timed:
                total += statistics.median(outcome.cost or 0.0 for outcome in outcomes)
        if total <= 0:
            raise TooCheap(f"tests must be larger for the meter {meter}: a right program costs nothing on them")
        return Found(total)

    def edits(
        self,
        samples: Sequence[str],
        sandbox: Sandbox,
        *,
        meter: str = "instructions",
        repeats: int = 1,
        limits: Limits | None = None,
    ) -> Edits:
        """The costs of the source and of its samples. Equal texts are run once and cost the same; the source's own text costs what it does.

        Raises ValueError for a source that is not right on its tests.
        """
        known: dict[str, Found] = {}
        for program in (self.source, *samples):
            if program not in known:
                known[program] = self.measure(program, sandbox, meter=meter, repeats=repeats, limits=limits)
                if not known[self.source].cost:
                    raise ValueError(f"source must be right on its tests, got {known[self.source].why}")
        cost = known[self.source].cost
        assert cost is not None
        return Edits(cost, tuple(known[sample].cost for sample in samples))

    def _made(self, program: str, flags: tuple[str, ...]) -> Program:
        if self.language == "cpp" or self.language == "c":
            return compiled(program, self.language, flags=flags)
        return program_of(program, self.language)
