"""Whole programs in the sandbox: stdin in, stdout out, in Python, Node, C and C++; and suites of pytest.

    with_c = compiled("#include <stdio.h>\\nint main(void) { puts(\\"4\\"); }", "c")
    run_program(sandbox, with_c, [b""])

What a program costs is that of all its processes, seen from outside, less what an empty program of the same language costs. Processes that
nobody waited for are seen a hundred times a second only: where those took more than can be overlooked, their time counts too.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import statistics
import struct
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Literal

from assay import checks
from assay.methods.core.programs.workers import Outcome, State, callgrind, counted
from assay.methods.core.sandbox import Limits, Ran, Sandbox
from assay.paths import atomic_file, cache_dir

Language = Literal["python", "node", "c", "cpp"]
LANGUAGES: tuple[Language, ...] = ("python", "node", "c", "cpp")
COMPILERS = {"c": ("gcc", "main.c", "-std=c17"), "cpp": ("g++", "main.cpp", "-std=c++17")}
EMPTY = {"python": "", "node": "", "c": "int main(void) { return 0; }\n", "cpp": "int main() { return 0; }\n"}
TIMER = ".assay-timer.py"
NULLS = 5
"""Runs of the empty program, of which the median is subtracted."""
SLOWER = 60
"""How many times slower, about, a program runs while its instructions are counted: limits of time grow by as much."""
FILES = 64
LOG = 200
"""Files that a counted program may have open, and the number of the log, which lies above."""
UNSEEN_SECONDS = 0.05
UNSEEN_SHARE = 0.25
"""Processor time of the whole sandbox, beyond that of the program and of starting it, is forgiven up to the larger of these: what is seen
from outside comes in hundredths of a second for each process. More was work of processes that nobody waited for, and all counts."""


class CompileError(ValueError):
    """A program that does not compile; the text is the compiler's."""


@dataclass(frozen=True)
class Program:
    """A command and the files it runs with. `language` says which empty program stands for its start."""

    command: tuple[str, ...]
    language: Language
    files: Mapping[str, bytes] = field(default_factory=dict)


def python_program(source: str) -> Program:
    """A single file."""
    return Program((sys.executable, "-P", "-s", "-B", "main.py"), "python", {"main.py": source.encode()})


def python_package(folder: Path, module: str) -> Program:
    """A package of several files: `python -m module` with the folder as the only one beside the standard library and site-packages.

    Every file under the folder goes into the sandbox, but for those in hidden folders and caches. Raises ValueError without files.
    """
    files = _files_under(folder)
    start = (
        f"import sys, runpy; sys.path.insert(0, '.'); runpy.run_module({module!r}, run_name='__main__', alter_sys=True)"
    )
    return Program((sys.executable, "-P", "-s", "-B", "-c", start), "python", files)


def pytest_suite(folder: Path, arguments: Sequence[str] = ()) -> Program:
    """The tests of a folder, run by pytest in the sandbox, in their own order and without its cache."""
    start = (
        "import sys; sys.path.insert(0, '.'); import pytest; "
        f"sys.exit(pytest.main(['-q', '-x', '-p', 'no:cacheprovider', '-p', 'no:randomly', *{list(arguments)!r}]))"
    )
    return Program((sys.executable, "-P", "-s", "-B", "-c", start), "python", _files_under(folder))


def node_program(source: str) -> Program:
    """A single script. Raises FileNotFoundError where Node is not installed."""
    if (node := shutil.which("node")) is None:
        raise FileNotFoundError("node is not installed (Debian: apt install nodejs)")
    return Program((node, "--disable-proto=throw", "main.js"), "node", {"main.js": source.encode()})


def compiled(source: str, language: Literal["c", "cpp"], *, flags: Sequence[str] = ("-O2",)) -> Program:
    """A C or C++ program, compiled in the sandbox once: the binary is kept by what it was made of.

    Raises CompileError with the compiler's words, FileNotFoundError where there is no compiler, ValueError for a flag that is none.
    """
    checks.choice("language", language, list(COMPILERS))
    compiler, name, standard = COMPILERS[language]
    if (found := shutil.which(compiler)) is None:
        raise FileNotFoundError(f"{compiler} is not installed (Debian: apt install {compiler})")
    for flag in flags:
        if not flag.startswith("-"):
            raise ValueError(f"flags must begin with '-', got {flag!r}")
    made_of = repr((source, language, standard, tuple(flags), _version(found)))
    kept = cache_dir() / "programs" / f"{hashlib.sha256(made_of.encode()).hexdigest()}.bin"
    if not kept.is_file():
        command = [found, standard, *flags, "-o", "main", name, "-lm"]
        limits = Limits(wall_seconds=120, cpu_seconds=100, memory_mib=2048, files_mib=256)
        ran = Sandbox(limits).run(command, files={name: source}, collect=("main",))
        if not ran.ok or "main" not in ran.files:
            raise CompileError(ran.stderr.decode("utf-8", "replace")[:2000] or f"the compiler ended by {ran.ended}")
        with atomic_file(kept) as target:
            target.write_bytes(ran.files["main"])
    # files in the scratch folder cannot be executed by a name of their own unless they may be: the loader is asked to
    start = "chmod +x main && exec ./main"
    return Program(("/bin/sh", "-c", start), language, {"main": kept.read_bytes()})


def program_of(source: str, language: Language) -> Program:
    """A program from its text."""
    checks.choice("language", language, list(LANGUAGES))
    if language == "python":
        return python_program(source)
    return node_program(source) if language == "node" else compiled(source, language)


@lru_cache(maxsize=8)
def _version(compiler: str) -> str:
    ran = Sandbox(Limits(wall_seconds=30)).run([compiler, "--version"])
    return ran.text


def run_program(
    sandbox: Sandbox,
    program: Program,
    stdins: Sequence[bytes],
    *,
    meter: str = "cpu_seconds",
    repeats: int = 1,
    limits: Limits | None = None,
) -> list[list[Outcome]]:
    """Outcomes by input and repeat; `value` is stdout as text, and a program that ends with another code than 0 has raised.

    Meters are cpu_seconds, peak_bytes and instructions (callgrind, which follows the processes that it starts).
    """
    checks.choice("meter", meter, ["cpu_seconds", "peak_bytes", "instructions"])
    checks.whole("repeats", repeats, low=1)
    null = _null(sandbox, program.language, meter)
    found = []
    for stdin in stdins:
        outcomes: list[Outcome] = []
        free = max(_OUTSIDE.get(program.language, [0.0]))
        while len(outcomes) < repeats and (not outcomes or outcomes[-1].state == "returned"):
            outcome = run_once(sandbox, program, stdin, meter, limits or sandbox.limits)
            if outcome.cost is not None:
                unseen = outcome.outside - free
                charged = unseen > max(UNSEEN_SECONDS, UNSEEN_SHARE * outcome.cost)
                cost = outcome.cost + unseen if charged else outcome.cost
                outcome = replace(outcome, cost=max(cost - null, 0.0), charged=charged)
            outcomes.append(outcome)
        found.append(outcomes)
    return found


_NULLS: dict[tuple[Language, str], float] = {}
_OUTSIDE: dict[Language, list[float]] = {}
"""Processor seconds of starting the sandbox and the timer around an empty program."""


def _null(sandbox: Sandbox, language: Language, meter: str) -> float:
    """What the empty program of a language costs here: taken once a process."""
    if (language, meter) not in _NULLS:
        empty = program_of(EMPTY[language], language)
        runs = range(1 if meter == "instructions" else NULLS)
        seen = [run_once(sandbox, empty, b"", meter, sandbox.limits) for _ in runs]
        costs = [outcome.cost for outcome in seen if outcome.cost is not None]
        if not costs:
            raise OSError(f"the empty {language} program does not run in the sandbox")
        if meter == "cpu_seconds":
            _OUTSIDE[language] = [outcome.outside for outcome in seen]
        _NULLS[language, meter] = statistics.median(costs)
    return _NULLS[language, meter]


def run_once(sandbox: Sandbox, program: Program, stdin: bytes, meter: str, limits: Limits) -> Outcome:
    """One run, with all that it costs to start a program: see `run_program`, which takes that away."""
    files: dict[str, bytes | str] = dict(program.files)
    if meter == "peak_bytes":
        ran = sandbox.run(program.command, files=files, stdin=stdin, limits=limits)
        return _outcome(ran, float(ran.peak_bytes))
    if meter == "cpu_seconds":
        # who starts the program waits for it, and so knows its time to the microsecond; looking from outside sees hundredths of a second
        files[TIMER] = (Path(__file__).parent / "worker.py").read_bytes()
        start = [sys.executable, "-P", "-s", "-B", "-S", TIMER, "timed"]
        ran, said = _reported(sandbox, lambda pipe: [*start, str(pipe), *program.command], files, stdin, limits)
        if len(said) < 8:
            return _outcome(ran, ran.cpu_seconds)
        used = float(struct.unpack("<d", said[:8])[0])
        return replace(_outcome(ran, used), outside=ran.cpu_seconds - used)
    slower = replace(
        limits,
        cpu_seconds=limits.cpu_seconds * SLOWER + 20,
        wall_seconds=limits.wall_seconds * SLOWER + 30,
        memory_mib=limits.memory_mib + 512,
    )
    ran, said = _reported(sandbox, lambda pipe: _counting(program, pipe), files, stdin, slower)
    count = counted(said)
    if ran.ok and count is None:
        return Outcome("crashed", ran.text, f"callgrind counted nothing: {said.decode('utf-8', 'replace')[-300:]}")
    return _outcome(ran, float(count or 0))


def _counting(program: Program, pipe: int) -> list[str]:
    """What starts a program under callgrind, which writes to a pipe that the program cannot reach.

    The pipe gets a number above all that the program may have open; valgrind gives out none of those. Nothing but the program is counted
    where it is a binary: no shell.
    """
    binary = "main" in program.files
    command = ["./main"] if binary else list(program.command)
    ready = "chmod +x main; " if binary else ""
    aside = (
        f'{ready}exec {LOG}>&{pipe} {pipe}>&-; ulimit -S -n {FILES}; exec "$@"'  # Debian's sh knows no numbers above 9
    )
    return ["/bin/bash", "-c", aside, "bash", *callgrind(LOG), *command]


def _reported(
    sandbox: Sandbox,
    command: Callable[[int], list[str]],
    files: Mapping[str, bytes | str],
    stdin: bytes,
    limits: Limits,
) -> tuple[Ran, bytes]:
    """Run a command that is given a pipe, and what it wrote there."""
    read, write = os.pipe()
    with open(read, "rb") as report:
        try:
            ran = sandbox.run(command(write), files=files, stdin=stdin, limits=limits, pass_fds=(write,))
        finally:
            os.close(write)
        return ran, report.read()


def _outcome(ran: Ran, cost: float) -> Outcome:
    if ran.ok:
        return Outcome("returned", ran.text, cost=cost)
    states: dict[str, State] = {"wall time": "time", "cpu time": "time", "memory": "memory", "exit": "raised"}
    error = ran.stderr.decode("utf-8", "replace").strip()[-500:]
    if ran.ended == "exit" and not error:
        error = ran.text.strip()[-500:]
    return Outcome(states.get(ran.ended, "crashed"), ran.text, f"ended by {ran.ended} with {ran.returncode}: {error}")


def _files_under(folder: Path) -> dict[str, bytes]:
    found = {}
    for root, folders, names in os.walk(folder):
        folders[:] = sorted(
            name for name in folders if not name.startswith(".") and name not in ("__pycache__", "node_modules")
        )
        for name in sorted(names):
            path = Path(root, name)
            if path.is_file() and not path.is_symlink() and not name.endswith(".pyc"):
                found[str(path.relative_to(folder))] = path.read_bytes()
    if not found:
        raise ValueError(f"folder must hold files, got {folder}")
    return found
