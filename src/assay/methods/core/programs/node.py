"""Warm, sandboxed Nodes that run a function of a JavaScript program on given arguments and say what it cost.

    with NodeWorkers() as workers:
        [[first, second]] = workers.run("const f = (n) => n + 1", "f", [(1,)], repeats=2)

A process belongs to one program and is never given another's. In it every run has a realm of its own (fresh globals,
the program and its libraries evaluated anew), so that one case leaves nothing to the next unless it reaches for what
all of Node shares; after a run that changed that, left a timer or a socket, met a limit or ended its process, the next
run gets a new process.

What that does not do: a realm is no border. A program that wants to gets at the process around it, and could remember
there what it computed, or bend what looks for changes, for later runs of the same program. Where programs were written
to deceive, say `fresh=True`: a process for each run. The sandbox around the process holds in both cases.

How values cross the border, undefined, BigInt, Map and the like among them: `node_values`.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import select
import shutil
import struct
import threading
import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from assay import checks
from assay.methods.core.programs.node_values import decode, encode
from assay.methods.core.programs.workers import DAY, FREE_SECONDS, FREE_SHARE, MIB, Outcome, State
from assay.methods.core.sandbox import Limits, Sandbox

HEAD = struct.Struct("<I16sc")
NODE_METERS = ("cpu_seconds", "peak_bytes")
"""Of the meters in `workers.METERS` those that measure a call in Node. Garbage is memory until it is collected."""
LEAST_HEAP_MIB = 4096
STARTING = Limits(wall_seconds=60, cpu_seconds=60, memory_mib=2048)
"""For what is no program's: starting Node, and loading libraries into a realm."""
ECHO = "void {program}; function echo(value) {{ return value; }}"
"""A program that is as long to read, and returns the answer that it is given."""
ECHOES = 3
"""How often it runs before work beside a call counts: one that is slow by chance is no proof."""
_STARTED = re.compile(
    r"^(?:export\s+)?(?:(?:async\s+)?function\s*\*?\s*(?P<function>[\w$]+)"
    r"|(?:const|let|var)\s+(?P<bound>[\w$]+)\s*=\s*(?:async\b\s*)?(?:function\b|\([^()]*\)\s*=>|[\w$]+\s*=>))",
    flags=re.MULTILINE,
)


class NodeWorkers:
    """Runs functions of JavaScript programs, scripts or CommonJS modules, one at a time, whichever thread asks.

    `modules` are libraries that are read and compiled once a process, and evaluated in every realm before a run's cost
    begins; they, and whatever else a program asks for with `require`, are looked up in the folder `node_modules`, which
    programs may read. `limits` hold for one run: `cpu_seconds`, `wall_seconds`, `memory_mib` (resident, beyond what the
    warm process holds) and `output_bytes` of its answer. `keep` is how many programs keep a warm process (50 MB each)
    at once. `fresh=True` gives every run a process of its own, some forty times slower (see above: for programs that
    were written to deceive); the meter peak_bytes always does.

    cpu_seconds is the processor time of the process, all its threads, between the beginning and the end of the call,
    read from outside while it waits. Neither starting Node nor loading libraries is in it. The realm is new, so that
    every repeat begins with code that is compiled to bytecode but not optimised: the compiler that optimises while it
    runs (JIT) and the collector of garbage both fall into the call, on its own thread. Node's own functions do warm up
    over the runs of a process, and the first run reads the program's functions: leave the first repeat out where that
    matters. Processor time beside the call, as of work done while loading, counts where it is more than 2 ms and a
    quarter of the call (`Outcome.charged`), as it does in `workers.Workers`; so does that of arguments that are
    expressions with the program's own names in them. A program can start no process and no thread.

    Not for: ECMAScript modules (`import` and `export` are a SyntaxError), TypeScript, libraries with ECMAScript modules
    only, whole programs that read stdin (`processes.node_program`). Raises FileNotFoundError where Node is not
    installed, SandboxMissing where there are no namespaces, TypeError or ValueError for other wrong arguments; a module
    that cannot be loaded is one, at the first run.

    >>> functions_of("function helper() {}\\nconst area = (w, h) => w * h")
    ['helper', 'area']
    >>> with NodeWorkers() as workers:  # doctest: +SKIP
    ...     workers.run("const area = (w, h) => w * h", "area", [(2, 3)])[0][0].value
    6
    """

    def __init__(
        self,
        meter: str = "cpu_seconds",
        *,
        modules: Sequence[str] = (),
        node_modules: Path | str | None = None,
        limits: Limits | None = None,
        fresh: bool = False,
        keep: int = 4,
        sandbox: Sandbox | None = None,
    ) -> None:
        self.meter = checks.choice("meter", meter, list(NODE_METERS))
        self.limits = limits or Limits()
        self.fresh = checks.flag("fresh", fresh) or meter == "peak_bytes"
        self.keep = checks.whole("keep", keep, low=1)
        if isinstance(modules, str) or not all(isinstance(name, str) and name for name in modules):
            raise TypeError(f"modules must be names of libraries, got {checks.shown(modules)}")
        self.modules = tuple(modules)
        self.node_modules = None if node_modules is None else Path(node_modules).resolve()
        if self.node_modules is None and self.modules:
            raise ValueError("modules need node_modules, the folder that they are looked up in")
        if self.node_modules is not None and (
            self.node_modules.name != "node_modules" or not self.node_modules.is_dir()
        ):
            raise ValueError(f"node_modules must be a folder of that name, got {node_modules}")
        if (node := shutil.which("node")) is None:
            raise FileNotFoundError("node is not installed (Debian: apt install nodejs)")
        self._node = Path(node).resolve()
        needed = [self._node.parent, *([] if self.node_modules is None else [self.node_modules])]
        needed = [folder for folder in needed if not folder.is_relative_to("/usr")]
        self.sandbox = sandbox or Sandbox(self.limits, readable=needed)
        for folder in needed if self.sandbox.protected else []:
            if not any(folder.is_relative_to(shown) for shown in self.sandbox.readable):
                raise ValueError(f"sandbox must have {folder} among what is readable, got {self.sandbox.readable}")
        self._processes: OrderedDict[str, _Process] = OrderedDict()
        self._echoes: _Process | None = None
        self._lock = threading.Lock()
        self._open = True

    def __enter__(self) -> NodeWorkers:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End all processes, after the run that is going on."""
        self._open = False
        with self._lock:
            for process in (*self._processes.values(), *([self._echoes] if self._echoes else [])):
                process.close()
            self._processes.clear()
            self._echoes = None

    def run(
        self,
        program: str,
        entry_point: str,
        cases: Sequence[Sequence[Any]],
        *,
        repeats: int = 1,
        limits: Limits | None = None,
    ) -> list[list[Outcome]]:
        """The outcomes by case and repeat. A case that did not return is not repeated.

        `entry_point` is a name that the program gives to a function (a declaration, a const, a property of
        `module.exports`), or "Class.method" for a static one; a promise that it returns is awaited. `cases` are
        positional arguments: plain values, those of `node_values`, and `{"__js__": source}`, an expression that is
        evaluated there, once the program is loaded. An Outcome's `error` is the type's name and the message of what
        was thrown. Raises TypeError and ValueError for other arguments.
        """
        checks.whole("repeats", repeats, low=1)
        if not isinstance(program, str):
            raise TypeError(f"program must be text, got {checks.shown(program)}")
        _check_entry(entry_point)
        written = []
        for case in cases:
            if isinstance(case, (str, bytes, dict)):
                raise TypeError(f"cases must be sequences of arguments, got {checks.shown(case)}")
            written.append(encode(list(case)))
        found = []
        for given in written:
            outcomes: list[Outcome] = []
            while len(outcomes) < repeats and (not outcomes or outcomes[-1].state == "returned"):
                with self._lock:
                    outcomes.append(self._run(program, entry_point, given, limits or self.limits))
            found.append(outcomes)
        return found

    def _run(self, program: str, entry: str, given: str, limits: Limits) -> Outcome:
        outcome, answer = self._once(program, entry, given, limits)
        if self.meter != "cpu_seconds" or outcome.cost is None:
            return outcome
        free = max(FREE_SECONDS, FREE_SHARE * outcome.cost)
        if outcome.outside <= free:
            return outcome
        # what it costs to evaluate these arguments and write this answer, in a process where no program ever was
        if self._echoes is None or not self._echoes.alive or self._echoes.heap_mib < _heap(limits):
            self._echoes = self._replaced(self._echoes, limits)
        rest = given[1:] if given == "[]" else f",{given[1:]}"
        source, beside = ECHO.format(program=json.dumps(program)), 0.0
        for _ in range(ECHOES):
            try:
                echo, _answer = self._echoes.run(source, "echo", f"[{answer}{rest}", limits, self.meter)
            except BaseException:
                self._echoes.close()
                raise
            if echo.state != "returned":  # as where an argument uses what the program defines, whose work it then is
                break
            beside = max(beside, echo.outside)
            if outcome.outside - beside <= free:
                return outcome
        return replace(outcome, cost=outcome.cost + outcome.outside - beside, charged=True)

    def _once(self, program: str, entry: str, given: str, limits: Limits) -> tuple[Outcome, str]:
        """A run in a process of that program; the answer as it was written."""
        for _ in range(2):
            if not self._open:
                raise ValueError("the workers are closed")
            process = self._processes.pop(program, None)
            if process is None or not process.alive or process.heap_mib < _heap(limits):
                process = self._replaced(process, limits)
            try:
                outcome, answer = process.run(program, entry, given, limits, self.meter)
            except _Spoilt:
                process.close()
                continue
            except BaseException:
                process.close()
                raise
            if self.fresh:
                process.close()
            if process.alive:
                self._processes[program] = process
            while len(self._processes) > self.keep:
                self._processes.popitem(last=False)[1].close()
            return outcome, answer
        raise OSError("the sandbox's Node is not as it was before any program ran")

    def _replaced(self, process: _Process | None, limits: Limits) -> _Process:
        if process is not None:
            process.close()
        return _Process(self.sandbox, self._node, _heap(limits), self.node_modules, self.modules)


def functions_of(program: str) -> list[str]:
    """The functions that a program defines at the beginning of a line, for messages and for programs with a single one.

    It looks at lines and does not parse: not for deciding what a program means. No error for any text.

    >>> functions_of("const one = async (x) => x;\\nclass A {}\\n  function inner() {}")
    ['one']
    """
    return list(dict.fromkeys(found["function"] or found["bound"] for found in _STARTED.finditer(program)))


def _check_entry(entry: Any) -> None:
    if not isinstance(entry, str) or not all(part.replace("$", "_").isidentifier() for part in entry.split(".")):
        kind = ValueError if isinstance(entry, str) else TypeError
        raise kind(f"entry_point must be the name of a function, or Class.method, got {checks.shown(entry)}")


def _heap(limits: Limits) -> int:
    """What Node's own limit is, well above ours: reaching it ends the process without a word."""
    return max(LEAST_HEAP_MIB, 2 * limits.memory_mib)


class _Ended(Exception):
    """The process is no more, or a limit is passed."""

    def __init__(self, state: State, error: str) -> None:
        super().__init__(error)
        self.outcome = Outcome(state, error=error)


class _Spoilt(OSError):
    """The run before left something behind."""


class _Process:
    """A warm Node in the sandbox, seen from outside. It runs one program only."""

    def __init__(
        self, sandbox: Sandbox, node: Path, heap_mib: int, node_modules: Path | None, modules: Sequence[str]
    ) -> None:
        self.heap_mib = heap_mib
        self.alive = True
        folder = None if node_modules is None else str(node_modules)
        # on one thread: what V8 does beside the program is done, and counted, within the call
        flags = ["--single-threaded", "--v8-pool-size=0", "--no-flush-bytecode", "--no-warnings"]
        command = [
            str(node),
            *flags,
            f"--max-old-space-size={heap_mib}",
            "node_worker.js",
            json.dumps([folder, modules]),
        ]
        # the pipes become files 3 and 4, so that what a program prints or reads goes nowhere
        around = ["/bin/sh", "-c", 'exec "$@" 3<&0 4>&1 </dev/null >/dev/null 2>&1', "sh"]
        own: dict[str, bytes | str] = {"node_worker.js": (Path(__file__).parent / "node_worker.js").read_bytes()}
        limits = replace(sandbox.limits, cpu_seconds=DAY, processes=max(sandbox.limits.processes, 32))
        self._stack = contextlib.ExitStack()
        process = self._stack.enter_context(sandbox.start([*around, *command], files=own, limits=limits))
        assert process.stdin is not None
        assert process.stdout is not None
        self._pipe, self._to = process.stdout.fileno(), process.stdin.fileno()
        for pipe in (self._pipe, self._to):
            os.set_blocking(pipe, False)
        self._poll = select.poll()
        self._poll.register(self._pipe, select.POLLIN)
        self._buffer = bytearray()
        self._pid: int | None = None
        self._held_before = self._clock_before = 0
        self._began, self._limits = time.monotonic(), STARTING
        try:
            kind, said = self._message(bytes(16))
            if kind == b"M":
                raise ValueError(f"modules must be libraries that can be loaded: {said.decode('utf-8', 'replace')}")
            if kind != b"H":
                raise OSError(f"the sandbox's Node did not start: {said.decode('utf-8', 'replace')}")
            self._pid = process.pid
            while below := _children(self._pid):
                self._pid = below[0]
            # neither processes, whose time would not be counted, nor threads
            if re.search(r"^Max processes +0 +0 ", self._told("limits"), flags=re.MULTILINE) is None:
                raise OSError("the sandbox's Node could start processes: prlimit is missing (Debian: util-linux)")
        except _Ended as ended:
            self.close()
            raise OSError(f"the sandbox's Node did not start: {ended}") from None
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """End it and all below it."""
        self.alive = False
        self._stack.close()

    def run(self, program: str, entry: str, given: str, limits: Limits, meter: str) -> tuple[Outcome, str]:
        """One run in a fresh realm, and its answer as it was written. After a limit or a crash the process is ended."""
        mark = os.urandom(16)
        try:
            self._within(STARTING)
            self._send(mark, json.dumps([program, entry, limits.output_bytes]))
            self._send(mark, given)
            if self._message(mark) != (b"R", b"0"):
                raise _Spoilt
        except _Ended:  # by what the run before left behind: nothing of this one was begun
            raise _Spoilt from None
        try:
            self._within(limits)
            return self._steps(mark, meter)
        except _Ended as ended:
            self.close()
            return ended.outcome, ""

    def _within(self, limits: Limits) -> None:
        """From here on these limits hold."""
        self._limits, self._began = limits, time.monotonic()
        self._clock_before, self._held_before = self._clock(), self._held()

    def _steps(self, mark: bytes, meter: str) -> tuple[Outcome, str]:
        ready = self._still_clock()
        self._send(mark, "")
        kind, said = self._message(mark)
        if kind != b"A":
            return _outcome(kind, said), ""
        held = self._forget_peak() if meter == "peak_bytes" else 0
        before = self._still_clock()
        self._send(mark, "")
        kind, said = self._message(mark)
        if kind != b"D":
            return _outcome(kind, said), ""
        call = self._still_clock() - before
        peak = self._memory("VmHWM") - held if meter == "peak_bytes" else 0
        self._send(mark, "")
        kind, said = self._message(mark)
        outcome = _outcome(kind, said)
        if outcome.state != "returned":
            return outcome, ""
        outside = self._still_clock() - ready - call
        cost = call if meter == "cpu_seconds" else max(peak, 0)
        return replace(
            outcome, cost=float(cost) / (1e9 if meter == "cpu_seconds" else 1), outside=outside / 1e9
        ), said.decode()

    def _send(self, mark: bytes, text: str) -> None:
        data = text.encode()
        rest = memoryview(HEAD.pack(len(data), mark, b"J") + data)
        room = select.poll()
        room.register(self._to, select.POLLOUT)
        try:
            while rest:
                if room.poll(20):
                    rest = rest[os.write(self._to, rest) :]
                else:
                    self._within_limits()
        except OSError:
            raise _Ended("crashed", "its process ended") from None

    def _message(self, mark: bytes) -> tuple[bytes, bytes]:
        """The next message of this run; others are dropped. Time passes also for one who sends without an end."""
        pause, looked = 1, time.monotonic()
        while True:
            while (found := self._parsed()) is not None:
                if found[0] == mark:
                    return found[1:]
            if self._poll.poll(pause):
                try:
                    data = os.read(self._pipe, 1 << 20)
                except BlockingIOError:
                    continue
                if not data:
                    raise _Ended("crashed", "its process ended")
                self._buffer += data
                if time.monotonic() - looked < 0.02:
                    continue
            pause, looked = min(pause * 2, 10), time.monotonic()
            self._within_limits()

    def _within_limits(self) -> None:
        limits = self._limits
        if time.monotonic() - self._began > limits.wall_seconds:
            raise _Ended("time", f"more than {limits.wall_seconds:g} s")
        if self._pid is None:
            return
        if self._clock() - self._clock_before > limits.cpu_seconds * 1e9:
            raise _Ended("time", f"more than {limits.cpu_seconds:g} s of processor time")
        if self._held() - self._held_before > limits.memory_mib * MIB:
            raise _Ended("memory", f"more than {limits.memory_mib} MiB")

    def _parsed(self) -> tuple[bytes, bytes, bytes] | None:
        if len(self._buffer) < HEAD.size:
            return None
        length, mark, kind = HEAD.unpack(self._buffer[: HEAD.size])
        if length > 4 * self._limits.output_bytes + 4096:  # characters may be bytes, or four
            raise _Ended("crashed", f"an answer of more than {self._limits.output_bytes} bytes")
        if len(self._buffer) < HEAD.size + length:
            return None
        said = bytes(self._buffer[HEAD.size : HEAD.size + length])
        del self._buffer[: HEAD.size + length]
        return mark, kind, said

    def _clock(self) -> int:
        """Processor time in nanoseconds, of all its threads."""
        assert self._pid is not None
        try:
            return time.clock_gettime_ns((~self._pid << 3) | 2)  # the system's name for the clock of another process
        except OSError:
            raise _Ended("crashed", "its process ended") from None

    def _still_clock(self) -> int:
        """Its clock once it waits for us: of one that runs, others see the time of its last tick, up to 4 ms ago."""
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
            return Path(f"/proc/{self._pid}/{file}").read_text()
        except OSError:
            raise _Ended("crashed", "its process ended") from None

    def _memory(self, *names: str) -> int:
        found = dict(line.split(":", 1) for line in self._told("status").splitlines())
        try:
            return sum(int(found[name].split()[0]) for name in names) * 1024
        except KeyError:
            raise _Ended("crashed", "its process ended") from None

    def _held(self) -> int:
        return self._memory("RssAnon", "RssShmem")

    def _forget_peak(self) -> int:
        """What it holds now; its peak is counted from here where the system lets us, from its peak so far otherwise."""
        try:
            Path(f"/proc/{self._pid}/clear_refs").write_text("5")
        except OSError:
            return self._memory("VmHWM")
        return self._memory("VmRSS")


def _outcome(kind: bytes, said: bytes) -> Outcome:
    """What a program's last message means. A message that is none is the program's doing."""
    if kind == b"E":
        return Outcome("raised", error=said.decode("utf-8", "replace"))
    if kind == b"F":
        return Outcome("crashed", error=said.decode("utf-8", "replace"))
    if kind != b"V":
        return Outcome("void", error="its messages came in another order")
    try:
        return Outcome("returned", decode(said))
    except ValueError as error:
        return Outcome("void", error=str(error))


def _children(pid: int) -> list[int]:
    found: list[int] = []
    with contextlib.suppress(OSError, ValueError):
        for task in os.listdir(f"/proc/{pid}/task"):
            found += map(int, Path(f"/proc/{pid}/task/{task}/children").read_text().split())
    return found
