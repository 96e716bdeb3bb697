"""Where a program spends its time and memory, line by line, and its memory over time: both seen in the sandbox, by runs of their own.

Nothing here is part of a measured run: a profile is taken in one run for time and another for memory, and costs are measured by
`Bench` in runs without either. A program shares its interpreter with the tracing, so that one which wants to can tell it what it likes: a
profile decides what is tried next, never whether it is kept.
"""

from __future__ import annotations

import marshal
import os
import select
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from assay import checks
from assay.methods.code.effi_code import holding, tracing  # noqa: F401  sent as texts; records hash what is imported
from assay.methods.code.effi_code.metrics import Overhead, Variant, et_mu_tmu
from assay.methods.core.programs.workers import Workers
from assay.methods.core.sandbox import Limits, Sandbox
from assay.methods.core.sandbox.watch import Watcher

SLOWER = 30
"""How much longer a run may take while its lines are seen; our choice."""
MIB = 2**20
INTERVAL = 0.1
"""Seconds between two samples of memory, as the released code has it."""


@dataclass(frozen=True)
class LineCost:
    """A line of a program: how often it was reached, seconds in it (not in the program's own functions that it calls), bytes that it
    left behind, and the most that was held while it ran, beyond what was held before the call."""

    line: int
    hits: int
    seconds: float
    kept_bytes: int = 0
    peak_bytes: int = 0


@dataclass(frozen=True)
class Profile:
    """The lines of a program that were reached, in their order."""

    lines: tuple[LineCost, ...]

    @property
    def seconds(self) -> float:
        """Of all lines together."""
        return sum(line.seconds for line in self.lines)

    def seconds_of(self, first: int, last: int) -> float:
        """Of the lines from `first` to `last`, both counted."""
        return sum(line.seconds for line in self.lines if first <= line.line <= last)

    def report(self, program: str) -> str:
        """The profile beside the program's own text, as a language model reads it.

        >>> print(Profile((LineCost(2, 3, 0.25), LineCost(3, 1, 0.75))).report("def f():\\n    x = 1\\n    return x"))
          times   seconds   share     MiB  line
                                           def f():
              3   0.25000   25.0%     0.0      x = 1
              1   0.75000   75.0%     0.0      return x
        """
        by_line = {line.line: line for line in self.lines}
        whole = self.seconds or 1.0
        rows = ["  times   seconds   share     MiB  line"]
        for number, text in enumerate(program.splitlines(), 1):
            seen = by_line.get(number)
            if seen is None:
                rows.append(f"{'':35}{text}".rstrip())
                continue
            share = f"{seen.seconds / whole:.1%}"
            rows.append(f"{seen.hits:7d} {seen.seconds:9.5f} {share:>7} {seen.peak_bytes / MIB:7.1f}  {text}")
        return "\n".join(rows)


class ProfileError(ValueError):
    """The program did not return while its lines were seen."""


Profiler = Callable[[str], Profile | None]
"""From a program's text to its profile; None where it has none to give."""


@dataclass(frozen=True)
class LineProfiler:
    """Profiles programs on some calls of their entry point, in warm sandboxed processes.

    `calls` are rows of positional arguments; an entry point that is a coroutine function is awaited. `memory` takes a second run of every
    call for what lines hold. Raises ValueError for workers that count operations or instructions, whose meters the tracing would spoil or
    which would take minutes, and for no calls. Calling it raises ProfileError for a program that does not return.

    >>> with Workers() as workers:  # doctest: +SKIP
    ...     LineProfiler(workers, "f", [(1000,)])("def f(n):\\n    return sum(range(n))").lines[0].hits
    1
    """

    workers: Workers
    entry_point: str
    calls: Sequence[Sequence[Any]]
    memory: bool = False
    limits: Limits | None = None

    def __post_init__(self) -> None:
        if self.workers.meter.name not in ("cpu_seconds", "peak_bytes"):
            raise ValueError(
                f"workers must measure cpu_seconds or peak_bytes to profile, got {self.workers.meter.name}"
            )
        if not self.calls:
            raise ValueError("calls must be one or more, got none")
        checks.flag("memory", self.memory)

    def __call__(self, program: str) -> Profile:
        """The profile of one program."""
        rows = {line: [hits, seconds, 0, 0] for line, hits, seconds, _, _ in self._rows(program, memory=False)}
        if self.memory:
            for line, hits, _, kept, peak in self._rows(program, memory=True):
                row = rows.setdefault(line, [hits, 0.0, 0, 0])
                row[2:] = [kept, peak]
        return Profile(tuple(LineCost(line, *row) for line, row in sorted(rows.items())))

    def _rows(self, program: str, *, memory: bool) -> list[list[Any]]:
        limits = self.limits or self.workers.limits
        slower = replace(limits, cpu_seconds=SLOWER * limits.cpu_seconds, wall_seconds=SLOWER * limits.wall_seconds)
        given = (program, self.entry_point, [list(call) for call in self.calls], memory)
        [[outcome]] = self.workers.run(_own("tracing.py"), "lines_of", [given], limits=slower)
        if outcome.state != "returned":
            raise ProfileError(f"the program ended by {outcome.state} while its lines were seen: {outcome.error}")
        return _checked(outcome.value)


def _checked(rows: Any) -> list[list[Any]]:
    """What came out of the sandbox, if it is what was asked for."""
    try:
        found = [[int(n), int(hits), float(s), int(kept), int(peak)] for n, hits, s, kept, peak in rows]
    except (TypeError, ValueError, OverflowError):
        raise ProfileError(f"the program changed what its lines were seen by: {checks.shown(rows)}") from None
    if not all(seconds - seconds == 0 for _, _, seconds, _, _ in found):
        raise ProfileError("the program changed what its lines were seen by: seconds that are not finite")
    return found


def _own(name: str) -> str:
    return Path(__file__).with_name(name).read_text(encoding="utf-8")


# ------------------------------------------------------------------------------------------------------------- memory over time


@dataclass(frozen=True)
class Curve:
    """How a run ended, and its memory over time: seconds since the call began, MiB of all its processes, the first sample before the call.

    The curve reaches to the end of the call also where that is between two samples.
    """

    state: Literal["returned", "raised", "time", "memory", "crashed"]
    times: tuple[float, ...]
    memory: tuple[float, ...]
    error: str = ""

    def overhead(self, *, own: bool = True, variant: Variant = "paper") -> Overhead:
        """ET, MU and TMU. `own` takes off what was held before the call, which is the interpreter's and no program's doing (our choice;
        the paper's figures have it in them: `own=False`)."""
        start = self.memory[0] if checks.flag("own", own) else 0.0
        return et_mu_tmu(self.times, [max(held - start, 0.0) for held in self.memory], variant=variant)


def memory_curve(
    sandbox: Sandbox,
    program: str,
    entry_point: str,
    arguments: Sequence[Any],
    *,
    interval: float = INTERVAL,
    limits: Limits | None = None,
) -> Curve:
    """Run one call in a fresh sandbox and look at its memory from outside every `interval` seconds.

    Nothing runs beside the program in its process, and loading it is not part of the curve. The answer is not looked at: judge it
    elsewhere. Raises ValueError for arguments that are not plain values. NOT for calls that are shorter than a few intervals, and no meter
    for comparisons: take `Workers` for those.
    """
    checks.number("interval", interval, above=0)
    limits = limits or sandbox.limits
    try:
        given = marshal.dumps(tuple(arguments))
    except ValueError:
        raise ValueError(f"arguments must be plain values, got {checks.shown(arguments)}") from None
    files: dict[str, bytes | str] = {"holding.py": _own("holding.py"), "program.txt": program, "arguments.bin": given}
    with sandbox.start(
        [sys.executable, "-P", "-s", "-B", "holding.py", entry_point], files=files, limits=limits
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        watcher = Watcher(process.pid, Path(os.devnull))  # it writes no files
        sampled = _Sampled(process.stdout.fileno(), watcher, limits, interval)
        first = sampled.line()
        if first != "loaded":
            return sampled.curve("raised" if first else sampled.ended, first)
        word = os.urandom(16).hex()
        sampled.begin()
        try:
            os.write(process.stdin.fileno(), f"{word}\n".encode())
        except OSError:
            return sampled.curve("crashed", "it ended before the call")
        last = sampled.line()
        return sampled.curve(
            "returned" if last == word else "raised" if last else sampled.ended, "" if last == word else last
        )


class _Sampled:
    """Memory by time while one line is waited for."""

    def __init__(self, pipe: int, watcher: Watcher, limits: Limits, interval: float) -> None:
        self.pipe, self.watcher, self.limits, self.interval = pipe, watcher, limits, interval
        self.times: list[float] = []
        self.memory: list[float] = []
        self.ended: Literal["time", "memory", "crashed"] = "crashed"
        self.started = time.monotonic()

    def begin(self) -> None:
        """The call begins: the curve starts anew."""
        self.times.clear()
        self.memory.clear()
        self.watcher.look()
        self.started = time.monotonic()
        self._keep(0.0)

    def line(self) -> str:
        """What is said next; "" where a limit or its end comes first (`ended`)."""
        said = b""
        while not said.endswith(b"\n") and len(said) < 1024:
            since = time.monotonic() - self.started
            ready = select.select([self.pipe], [], [], self.interval - since % self.interval)[0]
            now = time.monotonic() - self.started
            self.watcher.look()
            self._keep(now)
            if ready:
                part = os.read(self.pipe, 1024)
                if not part:
                    return ""
                said += part
            elif now > self.limits.wall_seconds or self.watcher.cpu_seconds > self.limits.cpu_seconds + 1:
                self.ended = "time"
                return ""
            elif self.memory[-1] > self.limits.memory_mib:
                self.ended = "memory"
                return ""
        return said.decode("utf-8", "replace").strip()

    def _keep(self, now: float) -> None:
        self.times.append(now)
        self.memory.append(self.watcher.held_bytes / MIB)

    def curve(self, state: Literal["returned", "raised", "time", "memory", "crashed"], error: str) -> Curve:
        if not self.times:
            self._keep(0.0)
        return Curve(state, tuple(self.times), tuple(self.memory), error)
