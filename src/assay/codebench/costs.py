"""Measure one program, or two in turns: every cost with its meter and its spread, and none for a program that is wrong."""

from __future__ import annotations

import shutil
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from assay import checks
from assay.codebench.behaviour import END, tests_alone, told_end, unfinished
from assay.codebench.cases import Input, entry_point_of
from assay.errors import InputError, MissingError
from assay.measure.stats import Interval, paired_ratio
from assay.methods.core.programs.judging import judge
from assay.methods.core.programs.node import NODE_METERS, NodeWorkers, functions_of
from assay.methods.core.programs.processes import (
    CompileError,
    Language,
    Program,
    program_of,
    pytest_suite,
    python_package,
    run_program,
)
from assay.methods.core.programs.workers import METERS, Outcome, Workers
from assay.methods.core.sandbox import Limits, Sandbox, SandboxMissing
from assay.workloads.programs.task import UNKNOWN

SUFFIXES: dict[str, Language] = {
    ".py": "python",
    ".js": "node",
    ".cjs": "node",
    ".c": "c",
    ".cpp": "cpp",
    ".cc": "cpp",
    ".cxx": "cpp",
}
PAIRS = 10
LEAST_PAIRS = 6
"""Below this many the sign test excludes nothing."""
EXACT = ("operations",)
"""Meters by which equal programs cost the same. Of the others equal figures are chance: memory is counted in pages, and what callgrind
counts depends a little on where things lie, so that two pairs of equal programs can differ alike."""
Say = Callable[[str], None]


@dataclass(frozen=True)
class Cost:
    """What a program cost on one case by one meter: the repeats, their median, and their coefficient of variation (0: all equal)."""

    meter: str
    case: int
    repeats: tuple[float, ...]
    charged: bool = False

    @property
    def median(self) -> float:
        return statistics.median(self.repeats)

    @property
    def variation(self) -> float:
        mean = statistics.fmean(self.repeats)
        return statistics.stdev(self.repeats) / mean if len(self.repeats) > 1 and mean > 0 else 0.0


@dataclass(frozen=True)
class Measured:
    """A program's report. `wrong` says why it has no costs; `checked` how many cases had an expected answer."""

    program: str
    checked: int
    cases: int
    wrong: str = ""
    costs: tuple[Cost, ...] = ()

    def total(self, meter: str) -> float:
        """The medians of all cases together."""
        return sum(cost.median for cost in self.costs if cost.meter == meter)


@dataclass(frozen=True)
class Comparison:
    """Before against after. `ratio` is before / after: above 1 the new one is cheaper; None where one of them is wrong."""

    before: str
    after: str
    meter: str
    wrong: str = ""
    ratio: Interval | None = None
    totals: tuple[tuple[float, float], ...] = ()
    by_case: tuple[float, ...] = field(default_factory=tuple)

    @property
    def verdict(self) -> str:
        """cheaper, dearer, no difference seen, or wrong."""
        if self.wrong or self.ratio is None:
            return "wrong"
        if self.ratio.low > 1:
            return "cheaper"
        return "dearer" if self.ratio.high < 1 else "no difference seen"


def usual_meters(path: Path, cases: Sequence[Input]) -> tuple[str, ...]:
    """What a program is measured by where nothing is asked for: operations are counted of Python functions alone."""
    counted = _calls(cases) and path.suffix not in (".js", ".cjs")
    return ("cpu_seconds", "operations", "peak_bytes") if counted else ("cpu_seconds", "peak_bytes")


def measure(
    path: Path,
    cases: Sequence[Input],
    *,
    entry: str | None = None,
    meters: Sequence[str] | None = None,
    repeats: int = 5,
    limits: Limits | None = None,
    say: Say = lambda _: None,
) -> Measured:
    """Run a program on all cases, judge it where the answer is known, and say what it costs by each meter (None: `usual_meters`).

    Raises InputError for a file of no known kind, a meter that cannot measure it, or a program that defines no such function; MissingError
    where the sandbox, a compiler or valgrind is missing.
    """
    checks.whole("repeats", repeats, low=1)
    calls = _calls(cases)
    meters = usual_meters(path, cases) if meters is None else meters
    with _Bench(path, calls=calls, entry=entry, limits=limits) as bench:
        for meter in meters:
            bench.allows(meter)
        checked = sum(case.expected is not UNKNOWN for case in cases)
        costs: list[Cost] = []
        for meter in meters:
            for number, case in enumerate(cases):
                say(f"{path.name}: {meter}, case {number + 1} of {len(cases)}")
                outcomes = bench.run(meter, case, repeats)
                if wrong := _wrong(number, case, outcomes):  # the rest need not be run, and may never end
                    return Measured(str(path), checked, len(cases), wrong)
                found = tuple(float(outcome.cost or 0.0) for outcome in outcomes)
                costs.append(Cost(meter, number, found, any(outcome.charged for outcome in outcomes)))
    return Measured(str(path), checked, len(cases), "", tuple(costs))


def compare(
    before: Path,
    after: Path,
    cases: Sequence[Input],
    *,
    entry: str | None = None,
    meter: str = "cpu_seconds",
    pairs: int = PAIRS,
    limits: Limits | None = None,
    say: Say = lambda _: None,
) -> Comparison:
    """Run two programs in turns (A B, B A, ...) on all cases; a pair is the whole list of cases by each.

    Both are judged: by the expected answers, and where a case has none the new one by the answer of the old one. Operations, the same at
    every run, need two pairs only. Errors are those of `measure`.
    """
    checks.whole("pairs", pairs, low=1)
    calls = _calls(cases)
    names = (str(before), str(after))
    with (
        _Bench(before, calls=calls, entry=entry, limits=limits) as old,
        _Bench(after, calls=calls, entry=entry or old.entry or None, limits=limits) as new,
    ):
        old.allows(meter)
        new.allows(meter)
        known = list(cases)
        for number, case in enumerate(cases):
            say(f"judging case {number + 1} of {len(cases)}")
            first = old.run(meter, case, 1)
            if wrong := _wrong(number, case, first):
                return Comparison(*names, meter, f"{before.name}: {wrong}")
            if case.expected is UNKNOWN:
                known[number] = Input(case.args, case.kwargs, case.stdin, first[0].value, case.compare)
            if wrong := _wrong(number, known[number], new.run(meter, case, 1)):
                return Comparison(*names, meter, f"{after.name}: {wrong}")
        totals, each = [], [([], []) for _ in cases]  # type: ignore[var-annotated]
        for pair in range(pairs):
            say(f"pair {pair + 1} of {pairs}")
            sums = [0.0, 0.0]
            for number, case in enumerate(known):
                for which in (0, 1) if pair % 2 == 0 else (1, 0):
                    [outcome] = (old, new)[which].run(meter, case, 1)
                    if wrong := _wrong(number, case, [outcome]):
                        return Comparison(*names, meter, f"{(before, after)[which].name}: {wrong}")
                    sums[which] += float(outcome.cost or 0.0)
                    each[number][which].append(float(outcome.cost or 0.0))
            totals.append((sums[0], sums[1]))
    if any(min(pair) <= 0 for pair in totals):
        raise InputError(f"--meter: the cost by {meter} is below what it can tell: take larger cases or another meter")
    by_case = tuple(
        statistics.median(a) / statistics.median(b) if statistics.median(b) else float("nan") for a, b in each
    )
    return Comparison(*names, meter, "", _ratio(totals, exact=meter in EXACT), tuple(totals), by_case)


def compare_suites(
    before: Path,
    after: Path,
    tests: Path | None = None,
    *,
    pairs: int = PAIRS,
    limits: Limits | None = None,
    say: Say = lambda _: None,
) -> Comparison:
    """Run a suite of pytest on two versions in turns and compare the processor time of the whole runs.

    Two folders with their own tests, or two files and `tests`, a file beside which each is put under the name of `before`, by which the
    tests import it. A version whose tests fail is wrong. Tests see a copy in the sandbox: no network, nothing else of the disk.
    """
    checks.whole("pairs", pairs, low=1)
    limits = limits or Limits(wall_seconds=600, cpu_seconds=600, memory_mib=4096)
    programs = [told_end(_suite(path, tests, before.name)) for path in (before, after)]
    names = (str(before), str(after))
    sandbox = _sandbox(limits)
    totals = []
    for pair in range(pairs + 1):  # the first warms up and judges
        say("the tests pass before and after?" if not pair else f"pair {pair} of {pairs}")
        costs = [0.0, 0.0]
        for which in (0, 1) if pair % 2 == 0 else (1, 0):
            [[outcome]] = run_program(sandbox, programs[which], [b""], limits=limits)
            passed = outcome.state == "returned"
            why = unfinished(str(outcome.value)) if passed else " ".join(outcome.error.replace(END, "").split())[-300:]
            if why:
                return Comparison(*names, "cpu_seconds", f"{(before, after)[which].name}: its tests do not pass: {why}")
            costs[which] = float(outcome.cost or 0.0)
        if pair:
            totals.append((costs[0], costs[1]))
    if any(min(pair) <= 0 for pair in totals):
        raise InputError("the tests cost less than starting Python: nothing can be compared by them")
    return Comparison(*names, "cpu_seconds", "", _ratio(totals), tuple(totals))


def _suite(path: Path, tests: Path | None, name: str) -> Program:
    if path.is_dir() and tests is None:
        try:
            return pytest_suite(path)
        except (OSError, ValueError) as error:
            raise InputError(f"--pytest: {path} cannot be used: {error}") from None
    if path.is_file() and tests is not None and tests.is_file():
        return tests_alone(tests, {name: path.read_bytes()})
    raise InputError(f"--pytest wants two folders with tests, or two files and a file of tests, got {path} and {tests}")


def _ratio(totals: Sequence[tuple[float, float]], *, exact: bool = False) -> Interval:
    """By a meter that is `exact`, costs that are the same in two pairs have no noise: neither has their ratio."""
    if exact and len(set(totals)) == 1 and len(totals) > 1:
        known = totals[0][0] / totals[0][1]
        return Interval(known, known, known, len(totals))
    found = paired_ratio([a for a, _ in totals], [b for _, b in totals])
    if found.low == found.high and len(totals) < LEAST_PAIRS:  # equal by chance: so few say nothing about the rest
        return Interval(found.median, 0.0, float("inf"), len(totals))
    return found


def check_meter(meter: str) -> None:
    """Raises InputError for a meter that is none, MissingError where its tool is missing."""
    if meter not in METERS:
        raise InputError(f"--meter must be one of {', '.join(METERS)}, got {meter!r}")
    if meter == "instructions" and shutil.which("valgrind") is None:
        raise MissingError(
            "instructions are counted by valgrind, which is not installed (Debian: apt install valgrind)"
        )


def _calls(cases: Sequence[Input]) -> bool:
    if not cases:
        raise InputError("cases must be one or more, got none")
    return cases[0].stdin is None


def _wrong(number: int, case: Input, outcomes: Sequence[Outcome]) -> str:
    for outcome in outcomes:
        expected = outcome.value if case.expected is UNKNOWN else case.expected
        found = judge([expected], [outcome], _lines if case.stdin is not None else case.same)
        if not found.right:
            return _brief(found.why.replace("case 0", f"case {number + 1}", 1))
    return ""


def _brief(why: str) -> str:
    """In one line: of what a program printed before it ended, a traceback mostly, the last one."""
    first, *rest = [line.strip() for line in why.splitlines() if line.strip()]
    whole = f"{first.removesuffix('Traceback (most recent call last):').rstrip()} {rest[-1]}" if rest else first
    return whole.rstrip(": ")  # an exception may say nothing


def _lines(expected: Any, got: Any) -> bool:
    """Output of a program, without blanks at the ends of lines and empty lines at the end."""
    return bool(
        [line.rstrip() for line in str(expected).rstrip().splitlines()]
        == [line.rstrip() for line in str(got).rstrip().splitlines()]
    )


def _only_function(program: str, where: str) -> str:
    found = functions_of(program)
    if len(found) != 1:
        raise InputError(f"--entry must name the function of {where} to call: {', '.join(found) or 'none was found'}")
    return found[0]


def _sandbox(limits: Limits | None) -> Sandbox:
    try:
        return Sandbox(limits)
    except SandboxMissing as error:
        raise MissingError(without_sandbox(error)) from None


def without_sandbox(error: SandboxMissing) -> str:
    """What a command says where there is no sandbox: that programs can be run without one is for those who write Python."""
    why = str(error).partition(" Install it, or ")[0].rstrip(".")
    return f"{why}; assay code runs no program without it"


class _Bench:
    """One program, ready to be run by any meter; its processes live until the `with` ends."""

    def __init__(self, path: Path, *, calls: bool, entry: str | None, limits: Limits | None) -> None:
        self.path, self.calls, self.limits = path, calls, limits
        self.sandbox = _sandbox(limits)
        self.language = SUFFIXES.get(path.suffix)
        self._workers: dict[str, Workers | NodeWorkers] = {}
        self.entry = ""
        if path.is_dir() and not calls:
            if not (path / "__main__.py").is_file():
                raise InputError(f"FILE must be a package's folder with a __main__.py, got {path}")
            self.language, self.source = "python", ""
            self.program = python_package(path.parent, path.name)
            return
        if self.language is None or not path.is_file():
            raise InputError(
                f"FILE must be a program ({', '.join(SUFFIXES)}), or a package's folder for cases with stdin, got {path}"
            )
        try:
            self.source = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{path} cannot be read: {error}") from None
        if not calls:
            try:
                self.program = program_of(self.source, self.language)
            except CompileError as error:
                raise InputError(f"{path} does not compile: {error}") from None
            except FileNotFoundError as error:
                raise MissingError(str(error)) from None
        elif self.language == "python":
            self.entry = entry_point_of(self.source, entry, str(path))
        elif self.language == "node":
            self.entry = entry or _only_function(self.source, str(path))
        else:
            raise InputError(
                f"cases with args call a Python or JavaScript function: {path} is {self.language}, write cases with stdin"
            )

    def __enter__(self) -> _Bench:
        return self

    def __exit__(self, *_: object) -> None:
        for workers in self._workers.values():
            workers.close()

    def allows(self, meter: str) -> None:
        """Raises InputError for a meter that cannot measure this program, MissingError where its tool is missing."""
        check_meter(meter)
        if meter == "operations" and not self.calls:
            raise InputError("--meter operations counts calls of Python functions: whole programs have no such count")
        if meter == "hardware_instructions" and not self.calls:
            raise InputError(
                "--meter hardware_instructions counts calls of Python functions, not whole programs: take instructions"
            )
        if self.calls and self.language == "node" and meter not in NODE_METERS:
            raise InputError(f"--meter must be {' or '.join(NODE_METERS)} for a JavaScript function, got {meter!r}")

    def run(self, meter: str, case: Input, repeats: int) -> list[Outcome]:
        """The outcomes of one case."""
        if not self.calls:
            assert case.stdin is not None
            return run_program(
                self.sandbox, self.program, [case.stdin.encode()], meter=meter, repeats=repeats, limits=self.limits
            )[0]
        if self.language == "node":
            return self._node(meter, case, repeats)
        if meter not in self._workers:
            self._workers[meter] = Workers(meter, limits=self.limits, sandbox=self.sandbox)
        workers = self._workers[meter]
        assert isinstance(workers, Workers)
        return workers.run(self.source, self.entry, [case.args], keywords=[case.kwargs], repeats=repeats)[0]

    def _node(self, meter: str, case: Input, repeats: int) -> list[Outcome]:
        if case.kwargs:
            raise InputError("kwargs are for Python functions: give a JavaScript function an object among its args")
        try:
            if meter not in self._workers:
                self._workers[meter] = NodeWorkers(meter, limits=self.limits, fresh=True, sandbox=self.sandbox)
            workers = self._workers[meter]
            assert isinstance(workers, NodeWorkers)
            return workers.run(self.source, self.entry, [case.args], repeats=repeats)[0]
        except FileNotFoundError as error:
            raise MissingError(str(error)) from None
        except (ValueError, TypeError) as error:
            raise InputError(f"{self.path}: {error}") from None
