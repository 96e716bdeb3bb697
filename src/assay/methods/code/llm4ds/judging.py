"""Programs for data-science tasks, run in the sandbox and judged outside of it.

All programs of one contestant go into one sandbox, where a process that has loaded numpy, pandas and matplotlib makes a fresh copy
of itself for each: what they import costs nothing then, and none sees another's names. Answers come back as plain data and are
compared here, with expected values that no program is shown. Seconds are processor time of a program's copy, as the system counts
it for the process that started it: the call, the making of its arguments, and for plots the drawing.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from assay import checks
from assay.methods.core.sandbox import Limits, Sandbox

SECONDS = 5.0  # of processor time, for all calls of one program
START = 30.0  # until the libraries are loaded
TOGETHER = 200  # programs a sandbox


class Question(Protocol):
    """A task as this room needs it: `assay.workloads.programs.datascience.Task` is one."""

    @property
    def id(self) -> str: ...
    @property
    def kind(self) -> str: ...
    @property
    def level(self) -> str: ...
    @property
    def entry_point(self) -> str: ...
    @property
    def prompt(self) -> str: ...
    @property
    def solution(self) -> str: ...

    def cases(self, seed: int = 0) -> list[list[Any]]:
        """The arguments of every call, as plain data."""
        ...

    def fault(self, arguments: Sequence[Any], got: Any) -> str:
        """What is wrong with an answer, "" for nothing."""
        ...


@dataclass(frozen=True)
class Ran:
    """How a program ended: what its calls gave, in order (None where it gave no answer), why not, and its processor time in seconds."""

    values: tuple[Any, ...] | None
    error: str
    seconds: float | None


@dataclass(frozen=True)
class Verdict:
    """`fault` says why a program did not pass ("" where it did); `picture` is the small grey picture of the first figure it drew."""

    passed: bool
    fault: str
    seconds: float | None
    picture: Sequence[Sequence[int]] | None = None


class Runner(Protocol):
    """Runs programs: for each a task, its text, and the arguments of its calls."""

    def __call__(self, jobs: Sequence[tuple[Question, str, Sequence[Sequence[Any]]]]) -> list[Ran]: ...


class Sandboxed:
    """Runs programs in a sandbox, with `harness`, a file that serves jobs (`datascience.HARNESS`), `seconds` of processor time each.

    The programs of one call share a folder and memory limits, so that a program may leave files to those behind it: give those of
    different contestants apart, as `tried` does. Raises SandboxMissing where there are no namespaces. When NOT to use it: to tell programs
    apart by small differences of time; each call is made once.
    """

    def __init__(self, harness: str, *, seconds: float = SECONDS, sandbox: Sandbox | None = None) -> None:
        self.harness = harness
        self.seconds = checks.number("seconds", seconds, above=0)
        self.sandbox = sandbox or Sandbox()

    def __call__(self, jobs: Sequence[tuple[Question, str, Sequence[Sequence[Any]]]]) -> list[Ran]:
        found: list[Ran] = []
        while len(found) < len(jobs):
            part = jobs[len(found) : len(found) + TOGETHER]
            answers = self._serve(part)
            # whoever ends the sandbox has not passed, and those behind it are tried in another one
            found += answers[: len(part)] or [Ran(None, "the sandbox ended without an answer", None)]
        return found

    def _serve(self, jobs: Sequence[tuple[Question, str, Sequence[Sequence[Any]]]]) -> list[Ran]:
        lines = [
            json.dumps({"program": program, "entry_point": task.entry_point, "kind": task.kind, "cases": cases})
            for task, program, cases in jobs
        ]
        longest = START + (10 * self.seconds + 10) * len(jobs)
        limits = Limits(
            wall_seconds=longest,
            cpu_seconds=longest,
            memory_mib=2048,
            output_bytes=64 * 2**20,
            files_mib=64,
            tmp_mib=64,
        )
        ran = self.sandbox.run(
            [sys.executable, "-I", "-B", "harness.py", str(self.seconds)],
            files={"harness.py": self.harness, **_fonts()},
            stdin="".join(f"{line}\n" for line in lines).encode(),
            limits=limits,
        )
        return [_read(line) for line in ran.text.splitlines() if line.endswith("}")]


def _read(line: str) -> Ran:
    try:
        found = json.loads(line)
        values = found.get("values")
        return Ran(None if values is None else tuple(values), str(found.get("error", "")), float(found["seconds"]))
    except (AttributeError, KeyError, TypeError, ValueError):  # not what the harness sends
        return Ran(None, "the sandbox sent what is no answer", None)


def _fonts() -> dict[str, bytes]:
    """Matplotlib's list of fonts, which it would make anew in every sandbox."""
    try:
        import matplotlib as mpl
        from matplotlib import font_manager
    except ImportError:
        return {}
    name = f"fontlist-v{font_manager.FontManager.__version__}.json"
    kept = Path(mpl.get_cachedir()) / name
    return {f".cache/matplotlib/{name}": kept.read_bytes()} if kept.is_file() else {}


def judge(tasks: Sequence[Question], programs: Mapping[str, str], run: Runner, *, seed: int = 0) -> dict[str, Verdict]:
    """Whether each task's program passes: every call gives what is expected. A task without a program has not passed.

    `programs` are by task id. Raises ValueError for a program of a task that is not among `tasks`.
    """
    known = {task.id: task for task in tasks}
    if strange := set(programs) - set(known):
        raise ValueError(f"programs must be of the tasks given, got {checks.shown(sorted(strange))} too")
    asked = [task for task in tasks if programs.get(task.id, "").strip()]
    cases = {task.id: task.cases(seed) for task in asked}
    ran = run([(task, programs[task.id], cases[task.id]) for task in asked])
    found = dict.fromkeys(known, Verdict(False, "no program", None))
    for task, one in zip(asked, ran, strict=True):
        found[task.id] = _verdict(task, cases[task.id], one)
    return found


def _verdict(task: Question, cases: Sequence[Sequence[Any]], ran: Ran) -> Verdict:
    if ran.values is None or len(ran.values) != len(cases):
        return Verdict(False, ran.error or "it ended without an answer", ran.seconds)
    first = ran.values[0]
    picture = first.get("picture") if isinstance(first, Mapping) else None
    for arguments, got in zip(cases, ran.values, strict=True):
        try:
            fault = task.fault(arguments, got)
        except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:  # not what the harness sends
            fault = f"an answer that is no plain data: {error}"
        if fault:
            return Verdict(False, fault, ran.seconds, picture)
    return Verdict(True, "", ran.seconds, picture)
