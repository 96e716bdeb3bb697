"""One run of a model's samples, from which pass@k, eff@k, DPS and efficient@k all follow.

A task is run whole: its references and all samples, judged first, then measured in turns on the same inputs, so that a machine which
becomes slower does so for all of them. What was run is kept in a journal, and is not run again for the same programs, settings and machine.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Protocol

from assay import checks
from assay.methods.core.programs.judging import judge, measure_all, observed_cases
from assay.methods.core.programs.workers import Outcome, Workers
from assay.methods.core.sandbox import Limits

Say = Callable[[str], None]
CASES = 4
"""Inputs of each level of size."""
ALIKE = (1, 1.0, True, 1 + 1e-7, [1], (1,), [1, 2], [2, 1], [(0, 0), (0, 1), (1, 1)], [(0, 1), (1, 1), (0, 0)])
"""Values by which comparators are told apart."""
CHECKS = 8
"""Inputs of level 0 that a program is judged on, beside those of the task's own test."""
REACH = 2.5
"""By seconds, no program is ended before so many times the reference's dearest cost: scores have their own time-outs, ENAMEL's at twice it,
and a run that ended earlier would be called too dear for nothing."""
RULES = 3
"""Counted up when what a run does changes: older journals are then not read."""


class Task(Protocol):
    """What is asked of a task; `assay.workloads.programs.task.Task` is one.

    `programs` are right ones by name, "canonical" that of the right answers and "expert" that of the costs where they are there. `test`
    defines `check(candidate)`, `inputs` are further arguments to judge by; `arguments` are inputs of the levels of `sizes`, level 0 for
    correctness, the same for the same seed.
    """

    @property
    def id(self) -> str: ...
    @property
    def entry_point(self) -> str: ...
    @property
    def programs(self) -> Mapping[str, str]: ...
    @property
    def sizes(self) -> tuple[int, ...]: ...
    @property
    def generator(self) -> str: ...
    @property
    def test(self) -> str: ...
    @property
    def inputs(self) -> Sequence[tuple[Any, ...]]: ...
    @property
    def compare(self) -> Callable[[Any, Any], bool]: ...
    def arguments(self, level: int, number: int = 0, seed: int = 0) -> tuple[Any, ...]: ...


@dataclass(frozen=True)
class Settings:
    """How samples are run. `seconds` is the most that one call may take; `seed` is that of the inputs."""

    meter: str = "cpu_seconds"
    repeats: int = 6
    cases: int = CASES
    seconds: float = 5.0
    memory_mib: int = 4096
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("repeats", "cases", "memory_mib"):
            checks.whole(name, getattr(self, name), low=1)
        checks.number("seconds", self.seconds, above=0)

    @property
    def limits(self) -> Limits:
        """Of one call."""
        return Limits(
            wall_seconds=4 * self.seconds + 10,
            cpu_seconds=self.seconds,
            memory_mib=self.memory_mib,
            output_bytes=64 * 2**20,
        )


Ended = Literal["time", "memory", "overflow", "raised", "crashed", "void", "wrong"]
"""How a run on a case ended that has no cost; "overflow" is an OverflowError, "wrong" another answer than the reference's."""
CUT: tuple[Ended, ...] = ("time", "memory", "overflow")
"""The ends of programs that are too dear; all others are those of wrong ones."""
Case = list[float] | Ended
"""What a program did on a case: the costs of its repeats, or how the first that failed ended."""


class NoReference(ValueError):
    """A reference that does not return on a case, so that nothing can be held against it."""


@dataclass(frozen=True)
class Costs:
    """What a program did by level and case (`measured`). It was not run beyond the first level on which a case has no costs."""

    levels: list[list[Case]]

    @property
    def failed(self) -> str:
        """How its first case without a cost ended, "" where every one has costs."""
        return next((case for level in self.levels for case in level if isinstance(case, str)), "")

    @property
    def finished(self) -> list[list[list[float]]]:
        """The costs of a program that returned everywhere. Raises NoReference for another."""
        found = [[case for case in level if not isinstance(case, str)] for level in self.levels]
        if self.failed:
            raise NoReference(f"costs must be those of a program that returned on every case, ended by {self.failed}")
        return found


@dataclass(frozen=True)
class Run:
    """What happened to the samples of one task, in their order. `why` is "" for a right one; wrong ones have no costs.

    `references` are the costs of the task's own right programs by name; none for a task without inputs of its own. `unjudged` says why
    nothing is known: the task's own programs do not answer.
    """

    task: str
    why: list[str]
    references: dict[str, Costs] = field(default_factory=dict)
    samples: list[Costs | None] = field(default_factory=list)
    unjudged: str = ""

    @property
    def right(self) -> list[bool]:
        """Which samples are right."""
        return [not why for why in self.why]

    @property
    def measured(self) -> bool:
        """Whether the task has references, and thus costs to be held against."""
        return bool(self.references)


def run_task(task: Task, programs: Sequence[str], workers: Workers, settings: Settings) -> Run:
    """Judge and measure the samples of one task. Samples with the same text are run once.

    A right answer is that of the canonical program, on the inputs of the task's own test, on further ones, and on `CHECKS` of level 0.
    Raises ValueError for a task without a right program or any inputs, and where its own programs do not answer.
    """
    _check(task)
    distinct = {f"sample {programs.index(program)}": program for program in dict.fromkeys(programs)}
    truth = task.programs.get("canonical", next(iter(task.programs.values())))
    try:
        cases = list(observed_cases(workers, truth, task.entry_point, task.test)) if task.test else []
    except ValueError as error:
        raise ValueError(f"{task.id}: {error}") from None
    cases += task.inputs
    if task.sizes:
        cases += [task.arguments(0, number, settings.seed) for number in range(CHECKS)]
    if not cases:
        raise ValueError(f"{task.id}: its test calls nothing, so that nothing can be judged")
    answers = workers.run(truth, task.entry_point, cases)
    if bad := [found[0] for found in answers if found[0].state != "returned"]:
        raise ValueError(f"{task.id}: the canonical program does not answer its own inputs: {bad[0].error}")
    expected = [found[0].value for found in answers]
    why = {name: _why(task, program, cases, expected, workers) for name, program in distinct.items()}
    named = [f"sample {programs.index(program)}" for program in programs]
    told = [why[name] for name in named]
    if len(task.sizes) < 2:
        return Run(task.id, told)
    references = {
        name: program for name, program in task.programs.items() if name != "canonical" or len(task.programs) == 1
    }
    right = {name: program for name, program in distinct.items() if not why[name]}
    costs = _costs(task, {**references, **right}, workers, settings)
    return Run(task.id, told, {name: costs[name] for name in references}, [costs.get(name) for name in named])


def _check(task: Task) -> None:
    if not task.programs:
        raise ValueError(f"{task.id} has no canonical program to take right answers from")
    if not task.test and not task.sizes and not task.inputs:
        raise ValueError(f"{task.id} has neither a test nor inputs: nothing can be judged")


def _why(task: Task, program: str, cases: Sequence[Any], expected: Sequence[Any], workers: Workers) -> str:
    outcomes: list[Outcome] = []
    for case in cases:
        outcomes += workers.run(program, task.entry_point, [case])[0]
        found = judge(expected[: len(outcomes)], outcomes, task.compare)
        if not found.right:  # the rest need not be run
            return found.why
    return ""


def _costs(task: Task, programs: Mapping[str, str], workers: Workers, settings: Settings) -> dict[str, Costs]:
    """On all levels from 1 up. Answers are compared with the expert's, which is run alone before, so that it is known how long to wait."""
    levels = range(1, len(task.sizes))
    cases = [[task.arguments(level, number, settings.seed) for number in range(settings.cases)] for level in levels]
    trusted = next(name for name in ("expert", *programs) if name in programs)
    exact = workers.meter.name in ("operations", "instructions")
    try:
        alone = measured(
            workers, task.entry_point, {trusted: programs[trusted]}, cases, task.compare, trusted=trusted, repeats=[1] * len(cases)
        )  # fmt: skip
        limits = settings.limits
        if workers.meter.unit == "s":
            enough = REACH * max(cost for level in alone[trusted].finished for case in level for cost in case)
            if enough > settings.seconds:
                limits = replace(settings, seconds=enough).limits
        return measured(
            workers, task.entry_point, programs, cases, task.compare, trusted=trusted,
            repeats=[1 if exact else settings.repeats] * len(cases), limits={name: limits for name in programs if name != trusted},
        )  # fmt: skip
    except NoReference as error:
        raise NoReference(
            f"{task.id}: its own reference does not finish within {settings.seconds:g} s: {error}"
        ) from None


def measured(
    workers: Workers,
    entry_point: str,
    programs: Mapping[str, str],
    cases: Sequence[Sequence[Sequence[Any]]],
    compare: Callable[[Any, Any], bool],
    *,
    trusted: str,
    repeats: Sequence[int],
    limits: Mapping[str, Limits] | None = None,
) -> dict[str, Costs]:
    """Programs by name on cases[level][case] of arguments: level by level, all that are left in turns, `repeats` by level.

    Answers are compared with those of `trusted`, one of the programs. One that has no costs on a case is not run on later levels. `limits`
    are by name; the others have the workers' own. Raises NoReference where the trusted program has no costs on a case.
    """
    found = {name: Costs([]) for name in programs}
    running = dict(programs)
    for of_level, many in zip(cases, repeats, strict=True):
        seen = measure_all(workers, entry_point, running, of_level, repeats=many, limits=limits)
        wanted = [outcomes[0].value for outcomes in seen[trusted]]
        for name, of_cases in seen.items():
            did = [case_of(outcomes, want, compare) for outcomes, want in zip(of_cases, wanted, strict=True)]
            found[name].levels.append(did)
            if failed := [number for number, case in enumerate(did) if isinstance(case, str)]:
                if name == trusted:
                    last = of_cases[failed[0]][-1]
                    end = last.state if last.state != "returned" else "another answer at every run"
                    raise NoReference(f"reference must return on every case, ended by {end}: {last.error}")
                del running[name]
    return found


def case_of(outcomes: Sequence[Outcome], wanted: Any, compare: Callable[[Any, Any], bool]) -> Case:
    """What a program did on a case, from its repeats in order.

    >>> case_of([Outcome("returned", 4, cost=0.2), Outcome("time")], 4, lambda expected, got: expected == got)
    'time'
    """
    costs: list[float] = []
    for outcome in outcomes:
        if outcome.state != "returned":
            return "overflow" if outcome.error.startswith("OverflowError") else outcome.state
        if not judge([wanted], [outcome], compare).right:
            return "wrong"
        costs.append(float(outcome.cost or 0.0))
    return costs


def run_all(
    samples: Mapping[str, Sequence[str]],
    tasks: Mapping[str, Task],
    settings: Settings | None = None,
    *,
    journal: Path | None = None,
    machine: str = "",
    say: Say = lambda _: None,
) -> list[Run]:
    """Run the samples of every task that has some, in the tasks' order; tasks in the journal are read from it.

    A line is written to the journal when a task is done, so that a run which was killed goes on where it was. A task whose own programs do
    not answer is in no journal: it is tried again, and what is known of it is `unjudged`. Raises ValueError, before anything is run, for
    a task that cannot be judged, and for a journal that cannot be written.
    """
    settings = settings or Settings()
    found = []
    wanted = [task for task in tasks.values() if samples.get(task.id)]
    for task in wanted:
        _check(task)
    kept: dict[str, Run] = {}
    if journal is not None:
        kept = _read(journal)
        _append(journal, b"")
    with Workers(settings.meter, limits=settings.limits) as workers:
        for number, task in enumerate(wanted, 1):
            programs = list(samples[task.id])
            key = _key(task, programs, settings, machine)
            if key not in kept:
                say(f"{task.id}, {number} of {len(wanted)}: {len(set(programs))} programs")
                try:
                    kept[key] = run_task(task, programs, workers, settings)
                except ValueError as error:
                    found.append(Run(task.id, [], unjudged=str(error)))
                    continue
                if journal is not None:
                    _append(journal, (json.dumps({"key": key, **asdict(kept[key])}) + "\n").encode())
            found.append(kept[key])
    return found


def _key(task: Task, programs: Sequence[str], settings: Settings, machine: str) -> str:
    made_of = [
        RULES,
        task.id,
        task.entry_point,
        dict(task.programs),
        task.generator,
        task.test,
        list(task.sizes),
        list(task.inputs),
        [[task.compare(one, other) for other in ALIKE] for one in ALIKE],
        list(programs),
    ]
    return hashlib.sha256(json.dumps([*made_of, asdict(settings), machine]).encode()).hexdigest()


def _append(journal: Path, line: bytes) -> None:
    """One line, in one write: two writers' lines do not mix, and a torn last one is not read. Nothing says whether it can be written."""
    try:
        journal.parent.mkdir(parents=True, exist_ok=True)
        opened = os.open(journal, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
    except OSError as error:
        raise ValueError(f"--journal: {journal} cannot be written: {error.strerror}") from None
    try:
        size = os.fstat(opened).st_size
        if line and size and os.pread(opened, 1, size - 1) != b"\n":
            line = b"\n" + line
        os.write(opened, line)
        os.fsync(opened)
    finally:
        os.close(opened)


def _read(journal: Path) -> dict[str, Run]:
    """What a journal holds; lines that are none are passed over: they were cut short."""
    found: dict[str, Run] = {}
    try:
        lines = journal.read_text(encoding="utf-8", errors="replace").splitlines()
    except FileNotFoundError:
        return found
    except OSError as error:
        raise ValueError(f"--journal: {journal} cannot be read: {error.strerror}") from None
    for text in lines:
        try:
            line = json.loads(text)
            key = line.pop("key")
            line["references"] = {name: Costs(**costs) for name, costs in line["references"].items()}
            line["samples"] = [None if costs is None else Costs(**costs) for costs in line["samples"]]
            found[key] = Run(**line)
        except (ValueError, KeyError, TypeError, AttributeError):
            continue
    return found
