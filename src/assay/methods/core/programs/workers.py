"""Warm, sandboxed Pythons that run a function of a program on given arguments and say what it cost.

    with Workers("cpu_seconds") as workers:
        [[first, second]] = workers.run("def f(n): return sum(range(n))", "f", [(1000,)], repeats=2)

Every run is a fresh copy (fork) of a warm process: nothing is left of the one before. What a program costs is seen from outside of it where
the meter allows (`METERS`), and its answer is compared outside of it, so that neither its clock nor its `==` is believed.
"""

from __future__ import annotations

import contextlib
import hashlib
import marshal
import os
import queue
import re
import select
import signal
import statistics
import struct
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fcntl import ioctl
from pathlib import Path
from termios import FIONREAD
from typing import Any, Literal

from assay import checks
from assay.errors import MissingError
from assay.methods.core.programs import counter
from assay.methods.core.programs import worker as inside
from assay.methods.core.programs.values import decode
from assay.methods.core.sandbox import Limits, Sandbox

State = Literal["returned", "raised", "time", "memory", "crashed", "void"]
"""How a run ended. Only one that returned has a cost; "void" is one that could have changed its own cost."""
MIB = 2**20
DAY = 86_400.0
FREE_SECONDS = 0.002
FREE_SHARE = 0.25
"""Processor time outside of the call (loading, reading arguments, sending the answer), beyond that of a program that only returns the
answer, is forgiven up to the larger of these: 2 ms, or a quarter of the call. More was work that belongs to the call, and all counts."""
FREE_OPERATIONS = 10_000
"""The same for operations while loading, but for those of what is imported."""


@dataclass(frozen=True)
class Meter:
    """What a cost is: its name, its unit, how it is taken, and what it does not see."""

    name: str
    unit: str
    how: str
    blind: str


METERS = {
    meter.name: meter
    for meter in (
        Meter(
            "cpu_seconds",
            "s",
            "processor time of the call, read from the system's clock of that process by another process",
            "it differs from run to run, more on a busy machine: take repeats",
        ),
        Meter(
            "instructions",
            "instructions",
            "instructions of the whole process as callgrind counts them, less those of one that only returns the answer",
            "waiting for memory; start-up differs by about 50,000 instructions from run to run",
        ),
        Meter(
            "hardware_instructions",
            "instructions",
            "instructions of the call in user mode, by the processor's own counter, read by another process",
            "waiting for memory; it differs a little from run to run, and most virtual machines lend no counter",
        ),
        Meter(
            "operations",
            "operations",
            "operations of CPython's interpreter during the call, the same at every run",
            "everything inside of built-in functions written in C: sorted() is one operation; a program that was written to deceive it",
        ),
        Meter(
            "peak_bytes",
            "bytes",
            "most memory that the process held, less what it held before the call",
            "what fits into memory that the interpreter holds anyway, about 0.3 MB; what it holds since it was loaded",
        ),
    )
}


@dataclass(frozen=True)
class Outcome:
    """One run: how it ended, what it returned, what it raised or broke, and its cost in the meter's unit (None unless it returned; 0 with
    a word in `error` where it costs less than the meter can tell).

    `outside` is processor time in seconds beside the call; `charged` says that work beside the call was counted into the cost (see
    `FREE_SECONDS` and `FREE_OPERATIONS`).
    """

    state: State
    value: Any = None
    error: str = ""
    cost: float | None = None
    outside: float = 0.0
    charged: bool = False


def available_meters() -> list[str]:
    """The meters that work on this machine; callgrind and the processor's counter are tried, not just looked for."""
    from assay.measure.instructions import available_tools

    missing = set() if "callgrind" in available_tools() else {"instructions"}
    missing |= set() if counter.available() else {"hardware_instructions"}
    return [name for name in METERS if name not in missing]


class Workers:
    """Runs functions of programs. Several threads may call `run`, each of which takes one of `count` processes.

    `limits` hold for one run: `cpu_seconds`, `wall_seconds`, `memory_mib` (address space beyond the warm interpreter's). With
    `packages=False` only the standard library can be imported. `sandbox` None makes one, which raises SandboxMissing where there are
    no namespaces. Times want one run at a time on an otherwise idle core; the other meters do not mind.

    >>> METERS["operations"].unit
    'operations'
    >>> with Workers("operations") as workers:  # doctest: +SKIP
    ...     workers.run("def f(n): return n + 1", "f", [(1,)])[0][0].value
    2
    """

    def __init__(
        self,
        meter: str = "cpu_seconds",
        *,
        limits: Limits | None = None,
        count: int = 1,
        packages: bool = True,
        sandbox: Sandbox | None = None,
    ) -> None:
        self.meter = METERS[checks.choice("meter", meter, list(METERS))]
        if meter == "hardware_instructions" and not counter.available():
            raise MissingError(
                "this machine lends no counter of instructions: take the meter instructions, by valgrind"
            )
        self.limits = limits or Limits()
        checks.whole("count", count, low=1)
        self.packages = checks.flag("packages", packages)
        self.sandbox = sandbox or Sandbox(self.limits)
        self._idle: queue.SimpleQueue[_Process | None] = queue.SimpleQueue()
        for _ in range(count):
            self._idle.put(None)
        self._nulls: dict[bytes, int] = {}
        self._open = True

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the processes that wait; a run that is going on ends its own, and one that waits for a process is refused."""
        self._open = False
        waiting = []
        with contextlib.suppress(queue.Empty):
            while True:
                waiting.append(self._idle.get_nowait())
        for process in waiting:
            self._idle.put(None)
            if process is not None:
                process.close()

    def run(
        self,
        program: str,
        entry_point: str,
        cases: Sequence[Sequence[Any]],
        *,
        keywords: Sequence[Mapping[str, Any]] | None = None,
        repeats: int = 1,
        limits: Limits | None = None,
    ) -> list[list[Outcome]]:
        """The outcomes by case and repeat. A case that did not return is not repeated.

        `cases` are positional arguments, plain values (see `values`); `keywords` go with them. Raises ValueError for other arguments.
        """
        checks.whole("repeats", repeats, low=1)
        if keywords is not None and len(keywords) != len(cases):
            raise ValueError(f"keywords must be one for each of the {len(cases)} cases, got {len(keywords)}")
        found = []
        for number, case in enumerate(cases):
            try:
                given = marshal.dumps((tuple(case), dict(keywords[number]) if keywords else {}))
            except ValueError:
                raise ValueError(f"cases must hold plain values, got {checks.shown(case)}") from None
            outcomes = []
            for _ in range(repeats):
                outcomes.append(self._run(program, entry_point, given, limits or self.limits))
                if outcomes[-1].state != "returned":
                    break
            found.append(outcomes)
        return found

    def _run(self, program: str, entry: str, given: bytes, limits: Limits) -> Outcome:
        if not self._open:
            raise ValueError("the workers are closed")
        if self.meter.name == "instructions":
            return self._count(program, entry, given, limits)
        with self._process() as process:
            outcome = process.run(program, entry, given, limits, self.meter.name)
            if self.meter.name != "cpu_seconds" or outcome.cost is None:
                return outcome
            free = max(FREE_SECONDS, FREE_SHARE * outcome.cost)
            if outcome.outside - process.empty <= free:
                return outcome
            if not process.alive:
                return Outcome("void", error="it ended the process that started it")
            echo = process.run(_echo(program), "echo", _with_answer(given, outcome.value), limits, self.meter.name)
            if echo.state != "returned" or outcome.outside - echo.outside <= free:
                return outcome
            return replace(outcome, cost=outcome.cost + outcome.outside - echo.outside, charged=True)

    @contextlib.contextmanager
    def _process(self) -> Iterator[_Process]:
        process = self._idle.get()
        try:
            if not self._open:
                raise ValueError("the workers are closed")
            if process is None or not process.alive:
                process = _Process(self.sandbox, self.limits, self.packages)
            yield process
        except BaseException:
            if process is not None:
                process.close()
            process = None
            raise
        finally:
            if process is not None and not self._open:
                process.close()
                process = None
            self._idle.put(process)

    def _count(self, program: str, entry: str, given: bytes, limits: Limits) -> Outcome:
        """Under callgrind, which is some fifty times slower: so are the limits of time."""
        try:
            program.encode()
        except UnicodeEncodeError as error:
            return Outcome("raised", error=f"UnicodeEncodeError: {error}")
        slower = replace(limits, cpu_seconds=limits.cpu_seconds * 60 + 20, wall_seconds=limits.wall_seconds * 60 + 30)
        slower = replace(slower, memory_mib=limits.memory_mib + 512)
        outcome, count = self._callgrind(program, entry, given, slower)
        if outcome.state != "returned":
            return outcome
        echo, given = _echo(program), _with_answer(given, outcome.value)
        key = hashlib.sha256(echo.encode() + given).digest()
        if key not in self._nulls:
            null, self._nulls[key] = self._callgrind(echo, "echo", given, slower)
            if null.state != "returned":
                return Outcome("void", error=f"the empty run could not be counted: {null.error}")
        if count < self._nulls[key]:
            return replace(
                outcome, cost=0.0, error="it costs less than can be told from starting Python and sending the answer"
            )
        return replace(outcome, cost=float(count - self._nulls[key]))

    def _callgrind(self, program: str, entry: str, given: bytes, limits: Limits) -> tuple[Outcome, int]:
        files: dict[str, bytes | str] = {**_own_files(), "program.txt": program, "arguments.bin": given}
        read, write = os.pipe()
        try:
            command = [*callgrind(write), *_python(self.packages), "worker.py", "once"]
            ran = self.sandbox.run(
                [*command, "program.txt", "arguments.bin", entry, str(write)],
                files=files,
                limits=limits,
                pass_fds=(write,),
            )
        finally:
            os.close(write)
            with open(read, "rb") as file:
                count = counted(file.read())
        if not ran.ok or count is None:
            state: State = {"memory": "memory", "wall time": "time", "cpu time": "time"}.get(ran.ended, "crashed")  # type: ignore[assignment]
            return Outcome(state, error=f"ended by {ran.ended}, {ran.stderr.decode('utf-8', 'replace')[-300:]}"), 0
        if len(ran.stdout) < inside.HEAD.size:
            return Outcome("crashed", error="it ended without an answer"), 0
        length, _, kind = inside.HEAD.unpack(ran.stdout[: inside.HEAD.size])
        return _outcome(kind, ran.stdout[inside.HEAD.size : inside.HEAD.size + length]), count


def callgrind(log: int) -> list[str]:
    """What a command is started by to be counted. The count goes to an open file that valgrind has of its own: the command must close
    the one that it gets."""
    valgrind = ["valgrind", "--tool=callgrind", f"--log-fd={log}", "--callgrind-out-file=/dev/null"]
    return [*valgrind, "--trace-children=yes"]


def counted(log: bytes) -> int | None:
    """The instructions of all processes that a log tells of; None if it tells of none."""
    counts = re.findall(rb"^==\d+== Collected : (\d+)$", log, flags=re.MULTILINE)
    return sum(map(int, counts)) if counts else None


def _python(packages: bool) -> list[str]:
    # not -I, which would leave the fixed seed of hashes unread: counts would differ from run to run
    return [sys.executable, "-P", "-s", "-B", *([] if packages else ["-S"])]


def _own_files() -> dict[str, bytes | str]:
    folder = Path(__file__).parent
    return {name: (folder / name).read_bytes() for name in ("values.py", "worker.py")}


def _echo(program: str) -> str:
    """A program that is as long to compile, and returns the answer that it is given."""
    return f"compile({program!r}, '<program>', 'exec')\ndef echo(value, *_, **__): return value\n"


def _with_answer(given: bytes, value: Any) -> bytes:
    """The arguments with the answer before them: as part of the program it would cost more to read than many a call."""
    arguments, keywords = marshal.loads(given)
    return marshal.dumps(((value, *arguments), keywords))


def _outcome(kind: bytes, said: bytes) -> Outcome:
    """What a program's last message means. A message that is none is the program's doing."""
    if kind == b"E":
        error = said.decode("utf-8", "replace")
        return Outcome("memory" if error.startswith("MemoryError:") else "raised", error=error)
    if kind == b"F":
        return Outcome("void", error=said.decode("utf-8", "replace"))
    try:
        size = inside.COUNTS.size
        operations, loading = inside.COUNTS.unpack(said[:size])
        charged = loading > max(FREE_OPERATIONS, FREE_SHARE * operations)
        cost = float(operations + loading if charged else operations)
        return Outcome("returned", decode(said[size:]), cost=cost, charged=charged)
    except (ValueError, struct.error) as error:
        return Outcome("void", error=str(error))


class _Ended(Exception):
    """The process for a run is no more, or its limit is passed."""

    def __init__(self, state: State, error: str) -> None:
        super().__init__(error)
        self.outcome = Outcome(state, error=error)


class _Process:
    """A warm process in the sandbox, seen from outside."""

    def __init__(self, sandbox: Sandbox, limits: Limits, packages: bool) -> None:
        self._stack = contextlib.ExitStack()
        alone = "alone" if sandbox.protected else "shared"
        self.process: subprocess.Popen[bytes] = self._stack.enter_context(
            # the limit of processor time is a run's: the warm process lives for thousands of them
            sandbox.start(
                [*_python(packages), "worker.py", alone],
                files=_own_files(),
                limits=replace(limits, cpu_seconds=DAY),
            )
        )
        assert self.process.stdout is not None
        assert self.process.stdin is not None
        self._pipe, self._to = self.process.stdout.fileno(), self.process.stdin.fileno()
        for pipe in (self._pipe, self._to):
            os.set_blocking(pipe, False)
        self._poll = select.poll()
        self._poll.register(self._pipe, select.POLLIN)
        self._buffer = bytearray()
        self._child: int | None = None
        self._most = limits.output_bytes
        self._zygote = self.process.pid
        self.alive = True
        self.empty = 0.0
        """Processor seconds beside the call of a program that does nothing: to start a copy, load it, and send an answer."""
        try:
            self._message(bytes(16), Limits(wall_seconds=60), time.monotonic(), ending=True)
            while below := _children(self._zygote):
                self._zygote = below[0]
            given = _with_answer(marshal.dumps(((), {})), None)
            seen = [self.run(_echo(""), "echo", given, Limits(), "cpu_seconds").outside for _ in range(3)]
            self.empty = statistics.median(seen)
        except _Ended as ended:
            self.close()
            raise OSError(f"the sandbox's Python did not start: {ended}") from None
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """End it and all below it."""
        self.alive = False
        self._stack.close()

    def run(self, program: str, entry: str, given: bytes, limits: Limits, meter: str) -> Outcome:
        """One run in a fresh copy."""
        mark, began = os.urandom(16), time.monotonic()
        self._child = None
        job = {
            "program": program,
            "entry": entry,
            "memory": limits.memory_mib * MIB,
            "seconds": int(limits.cpu_seconds) + 1,
            "operations": meter == "operations",
        }
        try:
            self._send(mark, marshal.dumps(job), limits, began)
            outcome = self._steps(mark, given, limits, began, meter)
        except _Ended as early:
            outcome = early.outcome
        if outcome.state == "crashed" or self._unread():  # what one run left unread the next one would read
            self.close()
        else:
            self._finish(mark)
        return outcome

    def _steps(self, mark: bytes, given: bytes, limits: Limits, began: float, meter: str) -> Outcome:
        kind, said = self._message(mark, limits, began)
        if kind != b"L":
            return _outcome(kind, said)
        self._send(mark, given, limits, began)
        kind, said = self._message(mark, limits, began)
        if kind != b"A":
            return _outcome(kind, said)
        held = self._forget_peak() if meter == "peak_bytes" else 0
        before = self._still_clock()
        with self._counter(meter) as instructions:
            self._send(mark, b"", limits, began)
            kind, said = self._message(mark, limits, began)
            if kind != b"D":
                return _outcome(kind, said)
            call = self._still_clock() - before
            executed = instructions.read() if instructions is not None else 0.0
        if executed is None:
            return Outcome("void", error="the processor's counter was lent to somebody else meanwhile")
        peak = self._memory("VmHWM") - held if meter == "peak_bytes" else 0
        self._send(mark, b"", limits, began)
        kind, said = self._message(mark, limits, began)
        outcome = _outcome(kind, said)
        if outcome.state != "returned":
            return outcome
        outside = self._still_clock() - call
        cost = {
            "cpu_seconds": call,
            "hardware_instructions": executed,
            "operations": outcome.cost,
            "peak_bytes": float(max(peak, 0)),
        }[meter]
        return replace(outcome, cost=cost, outside=outside)

    def _counter(self, meter: str) -> contextlib.AbstractContextManager[counter.Counter | None]:
        if meter != "hardware_instructions":
            return contextlib.nullcontext()
        if not self._seek():
            raise _Ended("crashed", "the process is no more")
        assert self._child is not None
        return counter.Counter(self._child)

    def _finish(self, mark: bytes) -> None:
        """Let the copy end, or end it, and wait until the warm one says so."""
        try:
            if self._child is not None:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(self._child, signal.SIGKILL)
            while (
                self._message(mark, Limits(wall_seconds=10, cpu_seconds=10), time.monotonic(), ending=True)[0] != b"X"
            ):
                pass
        except _Ended:
            self.close()  # the next run starts another
        if self.alive and _children(self._zygote):  # somebody else said so
            self.close()

    def _unread(self) -> bool:
        return not self.alive or ioctl(self._to, FIONREAD, bytes(4)) != bytes(4)

    def _send(self, mark: bytes, data: bytes, limits: Limits, began: float) -> None:
        """What is not read in time is not waited for: who should read may have been stopped."""
        rest = memoryview(inside.HEAD.pack(len(data), mark, b"J") + data)
        room = select.poll()
        room.register(self._to, select.POLLOUT)
        try:
            while rest:
                if room.poll(20):
                    rest = rest[os.write(self._to, rest) :]
                elif time.monotonic() - began > limits.wall_seconds:
                    self.close()
                    raise _Ended("time", f"more than {limits.wall_seconds:g} s")
        except OSError:
            self.close()
            raise _Ended("crashed", "the sandbox's Python ended") from None

    def _message(self, mark: bytes, limits: Limits, began: float, *, ending: bool = False) -> tuple[bytes, bytes]:
        """The next message of this run; what other runs left behind is dropped. Time passes also for one who sends without an end."""
        pause, looked = 1, time.monotonic()
        while True:
            while (found := self._parsed()) is not None:
                theirs, kind, said = found
                if theirs != mark:
                    continue
                if kind == b"X" and not ending:
                    raise _Ended(*_why_it_ended(said))
                return kind, said
            if self._poll.poll(pause):
                try:
                    data = os.read(self._pipe, 1 << 20)
                except BlockingIOError:
                    continue
                if not data:
                    self.close()
                    raise _Ended("crashed", "the sandbox's Python ended")
                self._buffer += data
                if time.monotonic() - looked < 0.02:
                    continue
            pause, looked = min(pause * 2, 20), time.monotonic()
            if looked - began > limits.wall_seconds:
                self._seek()
                raise _Ended("time", f"more than {limits.wall_seconds:g} s")
            if not ending and self._seek() and self._clock() > limits.cpu_seconds:
                raise _Ended("time", f"more than {limits.cpu_seconds:g} s of processor time")

    def _parsed(self) -> tuple[bytes, bytes, bytes] | None:
        size = inside.HEAD.size
        if len(self._buffer) < size:
            return None
        length, mark, kind = inside.HEAD.unpack(self._buffer[:size])
        if length > self._most:
            self._seek()
            self._buffer.clear()
            self.close()
            raise _Ended("crashed", f"an answer of more than {self._most} bytes")
        if len(self._buffer) < size + length:
            return None
        said = bytes(self._buffer[size : size + length])
        del self._buffer[: size + length]
        return mark, kind, said

    def _seek(self) -> bool:
        """Find the copy that runs; whether there is one."""
        if self._child is None:
            below = _children(self._zygote)
            self._child = below[0] if below else None
        return self._child is not None

    def _clock(self) -> float:
        """Processor seconds of the copy, all its threads, those that ended too."""
        if not self._seek():
            raise _Ended("crashed", "the process is no more")
        assert self._child is not None
        try:
            return time.clock_gettime((~self._child << 3) | 2)  # the system's name for the clock of another process
        except OSError:
            raise _Ended("crashed", "the process is no more") from None

    def _still_clock(self) -> float:
        """Its clock once it waits for us: of a process that runs, others see the time of its last tick, up to 4 ms ago."""
        last = self._clock()
        for _ in range(50):
            time.sleep(0.00005)
            state = self._told("stat").rpartition(")")[2].split()[0]
            now = self._clock()
            if state == "S" and now == last:
                break
            last = now
        return last

    def _told(self, file: str) -> str:
        try:
            return Path(f"/proc/{self._child}/{file}").read_text()
        except OSError:
            raise _Ended("crashed", "the process is no more") from None

    def _memory(self, name: str) -> int:
        for line in self._told("status").splitlines():
            if line.startswith(f"{name}:"):
                return int(line.split()[1]) * 1024
        raise _Ended("crashed", "the process is no more")

    def _forget_peak(self) -> int:
        """What it holds now; its peak is counted from here where the system lets us, from its peak so far otherwise."""
        self._seek()
        try:
            Path(f"/proc/{self._child}/clear_refs").write_text("5")
        except OSError:
            return self._memory("VmHWM")
        return self._memory("VmRSS")


def _why_it_ended(said: bytes) -> tuple[State, str]:
    try:
        code = int(said)
    except ValueError:
        code = 0
    if code == -signal.SIGXCPU:
        return "time", "more processor time than allowed"
    return "crashed", f"its process ended with {code}"


def _children(pid: int) -> list[int]:
    found: list[int] = []
    with contextlib.suppress(OSError, ValueError):
        for task in os.listdir(f"/proc/{pid}/task"):
            found += map(int, Path(f"/proc/{pid}/task/{task}/children").read_text().split())
    return found
