"""Where programs run: Python and C in this process, if they are our own, and both in the sandbox, if they are anybody's."""

from __future__ import annotations

import ctypes
import hashlib
import math
import pickle
import platform
import shutil
import subprocess
import time
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import filelock

from assay.methods.code.llm_library_optimization.case import Args, Candidate, same
from assay.methods.code.llm_library_optimization.timing import timed
from assay.methods.core.programs import processes
from assay.methods.core.programs.processes import CompileError, compiled, run_program
from assay.methods.core.programs.workers import Outcome, Workers
from assay.methods.core.sandbox import Limits, Sandbox
from assay.paths import atomic_file, cache_dir

SANITIZED = ("-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
"""Flags that a C program is checked with. Its timing has flags of its own."""
NO_LEAKS = 'const char *__asan_default_options(void) { return "detect_leaks=0"; }\n'
"""Looking for leaks needs rights that the sandbox does not give."""
FAULTS = ("ERROR: AddressSanitizer", "runtime error")
"""What the line of a report holds that says what is wrong."""
LEAVING = """

def _assay_leaving(*args):
    try:
        value, error = {entry}(*args), ""
    except MemoryError:
        raise
    except Exception as raised:
        value, error = None, f"{{type(raised).__name__}}: {{raised}}"
    return value, error, args
"""
"""A call that tells its exception and the arguments afterwards as values, so that no other end of it is an answer."""
WIDE = Limits(wall_seconds=120, cpu_seconds=60, memory_mib=2048, output_bytes=64 * 2**20)


class BuildError(ValueError):
    """A candidate that does not compile, or does not define what it should; the text says why."""


class RunError(ValueError):
    """A program that was right before ended otherwise while it was timed; the text says how."""


@dataclass(frozen=True)
class Answer:
    """What a call did: it returned `value`, or raised or broke as `error` says. `left` are its arguments afterwards, if it changed them.

    `broke` tells that it has no answer, which another program could give too: it met a limit, crashed, or returned no plain value.
    """

    value: Any = None
    error: str = ""
    left: bytes | None = None
    broke: bool = False


class Program(Protocol):
    """A candidate that was built."""

    def answers(self, cases: Sequence[Args]) -> list[Answer]:
        """What it does on each of the arguments."""
        ...

    def seconds(self, args: Args, calls: int) -> float:
        """Seconds that so many calls take. Raises RunError where one of them ends otherwise than it did before."""
        ...

    def faults(self, cases: Sequence[Args]) -> str:
        """What sanitizers say of the calls; "" where they say nothing, or there are none."""
        ...


class Backend(Protocol):
    """Builds candidates."""

    @property
    def protected(self) -> bool:
        """Whether programs that nobody trusts may be given to it."""
        ...

    @property
    def sanitizers(self) -> str:
        """Which sanitizers `faults` asks; "" for none."""
        ...

    def facts(self) -> dict[str, str]:
        """What a figure depends on beside the program: language, version, flags, instruction set."""
        ...

    def build(self, candidate: Candidate) -> Program:
        """Raises BuildError for a candidate that cannot be built."""
        ...


# ------------------------------------------------------------------------------------------------------------------- Python


@dataclass(frozen=True)
class PythonHere:
    """Python in this process, with its own objects as arguments: for code that you trust, for it can do whatever you can.

    `entry` names the function that a candidate's text defines, or picks it from the module that the text makes. `package` is the package
    that the text believes to be in, where it imports relative to it. `clock` is what
    calls are timed by: by default the processor's time of this thread, which others that wait for the processor do not add to.
    """

    entry: str | Callable[[types.ModuleType], Callable[..., Any]]
    package: str = ""
    clock: Callable[[], float] = time.thread_time
    protected: bool = field(default=False, init=False)
    sanitizers: str = field(default="", init=False)

    def facts(self) -> dict[str, str]:
        return {"language": f"Python {platform.python_version()}", "where": "in this process, processor seconds"}

    def build(self, candidate: Candidate) -> _Here:
        module = types.ModuleType(f"candidate_{candidate.digest}")
        if self.package:
            module.__package__ = self.package
        try:
            exec(compile(candidate.source, f"<{candidate.name}>", "exec", dont_inherit=True), module.__dict__)
            function = getattr(module, self.entry) if isinstance(self.entry, str) else self.entry(module)
        except Exception as error:  # whatever its text raises while it is loaded
            raise BuildError(f"{candidate.name}: {type(error).__name__}: {error}") from None
        return _Here(function, self.clock)


@dataclass(frozen=True)
class _Here:
    function: Callable[..., Any]
    clock: Callable[[], float]

    def answers(self, cases: Sequence[Args]) -> list[Answer]:
        return [_answer(self.function, args) for args in cases]

    def seconds(self, args: Args, calls: int) -> float:
        function = self.function
        return timed(lambda: function(*args), calls, self.clock)

    def faults(self, cases: Sequence[Args]) -> str:
        return ""


def _answer(function: Callable[..., Any], args: Args) -> Answer:
    before = _picture(args)
    try:
        value, error = function(*args), ""
    except Exception as raised:  # whatever it raises is compared with what the reference raises
        value, error = None, f"{type(raised).__name__}: {raised}"
    after = _picture(args)
    return Answer(value, error, None if after == before else after)


def _picture(args: Args) -> bytes:
    """Arguments as bytes, to see whether a call changes them; nothing for objects that cannot be pickled, which nobody watches."""
    try:
        return pickle.dumps(args)
    except (pickle.PicklingError, TypeError, AttributeError, RecursionError):
        return b""


@dataclass
class PythonSandboxed:
    """Python in the sandbox, one fresh process a call: for programs of a model, or of anybody. Arguments are plain values.

    Their processor seconds are read from outside and their answers compared outside. What is left of the arguments is told from within,
    where they return. Close it, or use it in a `with`.
    """

    entry: str
    limits: Limits = field(default_factory=Limits)
    protected: bool = field(default=True, init=False)
    sanitizers: str = field(default="", init=False)

    def __post_init__(self) -> None:
        self.workers = Workers("cpu_seconds", limits=self.limits)

    def __enter__(self) -> PythonSandboxed:
        return self

    def __exit__(self, *_: object) -> None:
        self.workers.close()

    def facts(self) -> dict[str, str]:
        return {"language": f"Python {platform.python_version()}", "where": "in the sandbox, processor seconds"}

    def build(self, candidate: Candidate) -> _Sandboxed:
        try:
            compile(candidate.source, f"<{candidate.name}>", "exec", dont_inherit=True)
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            raise BuildError(f"{candidate.name}: {type(error).__name__}: {error}") from None
        return _Sandboxed(candidate.source, self.entry, self.workers)


@dataclass(frozen=True)
class _Sandboxed:
    source: str
    entry: str
    workers: Workers

    def answers(self, cases: Sequence[Args]) -> list[Answer]:
        rows = self.workers.run(self.source + LEAVING.format(entry=self.entry), "_assay_leaving", cases)
        return [self._answer(outcome, args) for (outcome,), args in zip(rows, cases, strict=True)]

    def _answer(self, outcome: Outcome, args: Args) -> Answer:
        if outcome.state != "returned":
            return Answer(error=outcome.error or outcome.state, broke=True)
        value, error, left = outcome.value
        return Answer(value, error, None if same(tuple(args), left) else pickle.dumps(left))

    def seconds(self, args: Args, calls: int) -> float:
        (outcomes,) = self.workers.run(self.source, self.entry, [args], repeats=calls)
        if outcomes[-1].state != "returned":
            raise RunError(f"it ended otherwise when it was timed: {outcomes[-1].error}")
        return math.fsum(outcome.cost or 0.0 for outcome in outcomes)

    def faults(self, cases: Sequence[Args]) -> str:
        return ""


# ------------------------------------------------------------------------------------------------------------------------ C


@dataclass(frozen=True)
class Binding:
    """How a C function of a loaded library is called: for an answer, and so many times for the seconds that takes."""

    answer: Callable[..., Any]
    repeat: Callable[[Args, int], float]


@dataclass(frozen=True)
class CInterface:
    """What candidates in C have in common.

    `bind` makes the calls from a loaded library. `driver` is C text that follows a candidate's and makes a program of it: it reads
    from stdin how often it calls and on what, which `encode` writes, and prints a line for each case, which `decode` reads. The
    driver must give every array its own block of memory of exactly its size, so that reading beyond it is seen.
    """

    bind: Callable[[ctypes.CDLL], Binding]
    driver: str
    encode: Callable[[Sequence[Args], int], bytes]
    decode: Callable[[str], Any]


@dataclass(frozen=True)
class CHere:
    """C in this process, for code that you trust, each candidate a library of its own, so that nothing can be inlined into who calls it.

    Under the sanitizers it runs as a program in the sandbox, which raises SandboxMissing where there is none. `build` raises
    FileNotFoundError without gcc.
    """

    interface: CInterface
    flags: tuple[str, ...] = ("-O3",)
    protected: bool = field(default=False, init=False)
    sanitizers: str = field(default="address, undefined", init=False)

    def facts(self) -> dict[str, str]:
        return _facts_of_c(self.flags, "in this process, processor seconds")

    def build(self, candidate: Candidate) -> _CProgram:
        library = shared_library(candidate.source, self.flags)
        try:
            binding = self.interface.bind(ctypes.CDLL(str(library)))
        except AttributeError as error:
            raise BuildError(f"{candidate.name}: {error}") from None
        return _CProgram(candidate, self.interface, binding)


@dataclass(frozen=True)
class CSandboxed:
    """C in the sandbox, as a whole program: for anybody's. Its time holds that of reading its input, so that gains look smaller.

    It shares a process with what reads its input, so that only its answers are certain: look at its text before you believe its time.
    """

    interface: CInterface
    flags: tuple[str, ...] = ("-O3",)
    protected: bool = field(default=True, init=False)
    sanitizers: str = field(default="address, undefined", init=False)

    def facts(self) -> dict[str, str]:
        return _facts_of_c(self.flags, "in the sandbox, processor seconds")

    def build(self, candidate: Candidate) -> _CProgram:
        program = _CProgram(candidate, self.interface, None, self.flags)
        program.compiled(self.flags)
        return program


@dataclass(frozen=True)
class _CProgram:
    candidate: Candidate
    interface: CInterface
    binding: Binding | None  # None: as a program in the sandbox only
    flags: tuple[str, ...] = ()

    def answers(self, cases: Sequence[Args]) -> list[Answer]:
        if self.binding is not None:
            return [_answer(self.binding.answer, args) for args in cases]
        outcome = self._run(cases, 1, self.flags)
        lines = outcome.value.splitlines() if outcome.state == "returned" else []
        if len(lines) != len(cases):
            return [Answer(error=outcome.error or "it did not answer every case", broke=True)] * len(cases)
        return [Answer(self.interface.decode(line)) for line in lines]

    def seconds(self, args: Args, calls: int) -> float:
        if self.binding is not None:
            return self.binding.repeat(args, calls)
        outcome = self._run([args], calls, self.flags)
        if outcome.state != "returned":
            raise RunError(f"it ended otherwise when it was timed: {outcome.error}")
        return float(outcome.cost or 0.0)

    def faults(self, cases: Sequence[Args]) -> str:
        program = self.compiled(SANITIZED)
        ran = Sandbox(WIDE).run(program.command, files=program.files, stdin=self.interface.encode(cases, 1))
        if ran.ok:
            return ""
        said = ran.stderr.decode("utf-8", "replace")
        told = next((line for line in said.splitlines() if any(word in line for word in FAULTS)), said[-200:])
        return f"sanitizers: {told.strip() or f'ended by {ran.ended}'}"

    def compiled(self, flags: tuple[str, ...]) -> processes.Program:
        extra = NO_LEAKS if flags == SANITIZED else ""
        try:
            return compiled(f"{self.candidate.source}\n{extra}{self.interface.driver}", "c", flags=flags)
        except CompileError as error:
            raise BuildError(f"{self.candidate.name}: {error}") from None

    def _run(self, cases: Sequence[Args], calls: int, flags: tuple[str, ...]) -> Outcome:
        stdin = self.interface.encode(cases, calls)
        [[outcome]] = run_program(Sandbox(WIDE), self.compiled(flags), [stdin])
        return outcome


def shared_library(source: str, flags: Sequence[str] = ("-O3",)) -> Path:
    """Compile C text to a library, unless that was done before with the same compiler and flags for the same processor.

    Raises BuildError with the compiler's words, FileNotFoundError without gcc.
    """
    made_of = repr((source, tuple(flags), _version(_gcc()), processor()))
    library = cache_dir() / "loci" / f"{hashlib.sha256(made_of.encode()).hexdigest()[:32]}.so"
    library.parent.mkdir(exist_ok=True)
    with filelock.FileLock(f"{library}.lock"):
        if not library.exists():
            with atomic_file(library) as temporary:
                command = [_gcc(), "-std=c17", "-shared", "-fPIC", *flags, "-x", "c", "-", "-o", str(temporary)]
                done = subprocess.run(command, input=source, capture_output=True, text=True, check=False)
                if done.returncode:
                    raise BuildError(done.stderr[-2000:])
    return library


def _facts_of_c(flags: Sequence[str], where: str) -> dict[str, str]:
    return {"language": f"C17, {_version(_gcc())}", "flags": " ".join(flags), "isa": isa(flags), "where": where}


def _gcc() -> str:
    if (found := shutil.which("gcc")) is None:
        raise FileNotFoundError("gcc is not installed (Debian: apt install gcc)")
    return found


@lru_cache(maxsize=8)
def _version(compiler: str) -> str:
    return subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True).stdout.splitlines()[0]


def isa(flags: Sequence[str]) -> str:
    """The instruction set that code is made for: what `-march` says, else the oldest processor of this kind."""
    named = [flag.removeprefix("-march=") for flag in flags if flag.startswith("-march=")]
    return f"{named[-1]} ({processor()})" if named else f"{platform.machine()}, its oldest processors included"


@lru_cache(maxsize=1)
def processor() -> str:
    """The processor's name and the widest vectors that it has, as far as Linux says."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    facts = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    wide = [name for name in ("sse2", "avx2", "avx512bw", "asimd", "sve") if name in facts.get("flags", "").split()]
    return f"{facts.get('model name', platform.machine())}, {wide[-1] if wide else 'no vectors known'}"
