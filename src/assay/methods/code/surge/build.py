"""Items by real execution: every program is run twice in the sandbox, and what differs, fails or cannot be answered is left out."""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Protocol

from assay.methods.code.surge import checker
from assay.methods.code.surge.extract import bare, extract
from assay.methods.code.surge.items import Item, continued
from assay.methods.core.programs.processes import (
    COMPILERS,
    CompileError,
    Program,
    compiled,
    node_program,
    python_program,
)
from assay.methods.core.programs.sql import run_sql
from assay.methods.core.programs.workers import Workers
from assay.methods.core.sandbox import Limits, Sandbox

LIMITS = Limits(wall_seconds=60, cpu_seconds=30, memory_mib=1024)
FLAGS = ("-O2",)
"""What a program is compiled with that says nothing about it."""
LONGEST = 2000
"""Characters of a truth: longer ones are left out."""


class Source(Protocol):
    """A program before it is run, as `assay.workloads.programs.surge` has them.

    `language` is "python", "c", "cpp", "node", "sql" (files "schema.sql" and "query.sql") or "formal" (one file, a proof). The first file
    is started. `wants` is "output", "error" or "either"; `flags` are a compiler's.
    """

    @property
    def id(self) -> str: ...
    @property
    def component(self) -> str: ...
    @property
    def family(self) -> str: ...
    @property
    def group(self) -> str: ...
    @property
    def language(self) -> Any: ...
    @property
    def files(self) -> Mapping[str, str]: ...
    @property
    def stdin(self) -> str: ...
    @property
    def given(self) -> str: ...
    @property
    def flags(self) -> tuple[str, ...]: ...
    @property
    def wants(self) -> Any: ...


@dataclass(frozen=True)
class Built:
    """The items, and why the other programs are none, by id."""

    items: tuple[Item, ...]
    refused: Mapping[str, str]


@dataclass(frozen=True)
class _Seen:
    output: str
    error: str
    failed: bool
    seconds: float


def build(sources: Iterable[Source], *, sandbox: Sandbox | None = None) -> Built:
    """Run every program twice, and make items of those whose truth is the same both times and can be answered.

    Left out, with the reason: programs that print differently each time, print nothing, fail where output is wanted or do not fail where an
    error is, print more than `LONGEST` characters or what `extract` does not give back, take longer than `LIMITS`, and languages whose tool
    is not installed. `seconds` of an item is the wall time of its second run with the start of the sandbox, but without compiling (the
    binary is kept), except for several files of C++, which are compiled each time. Error texts are those of this machine's interpreters and
    compilers: a truth that was made elsewhere may differ. Raises SandboxMissing where there are no namespaces.

    When NOT to use it: to judge programs; nothing says that they are right.
    """
    items, refused = [], {}
    with ExitStack() as stack:
        box = sandbox or stack.enter_context(Sandbox(LIMITS))
        held: list[Workers] = []

        def workers() -> Workers:
            if not held:
                held.append(stack.enter_context(Workers("cpu_seconds", limits=LIMITS, sandbox=box)))
            return held[0]

        for source in sources:
            try:
                first, second = (_run(source, box, workers) for _ in range(2))
            except FileNotFoundError as missing:
                refused[source.id] = str(missing)
                continue
            reason, truth = _truth(source, first, second)
            if reason:
                refused[source.id] = reason
                continue
            items.append(
                Item(
                    source.id, source.component, source.family, source.group, source.language, dict(source.files),
                    command_of(source), truth, source.stdin, source.given, second.seconds,
                )
            )  # fmt: skip
    return Built(tuple(items), refused)


def _truth(source: Source, first: _Seen, second: _Seen) -> tuple[str, str]:
    """Why a program is no item, "" where it is one; and its truth."""
    if source.wants == "output" and first.failed:
        return f"it fails: {first.error[-200:]}", ""
    if source.wants == "error" and not first.failed:
        return "it does not fail", ""
    truth, again = (bare(seen.error if seen.failed else seen.output) for seen in (first, second))
    if truth != again or first.failed != second.failed:
        return "it differs from run to run", ""
    if not truth:
        return "it prints nothing", ""
    if len(truth) > LONGEST:
        return f"it prints {len(truth)} characters, more than {LONGEST}", ""
    if extract(continued(truth)) != truth or extract(truth) != truth:
        return "what it prints cannot be told from a reply", ""
    return "", truth


def command_of(source: Source) -> str:
    """How a program is started, as a prompt shows it.

    >>> from types import SimpleNamespace
    >>> command_of(SimpleNamespace(language="c", files={"main.c": ""}, flags=("-O2",)))
    'gcc -std=c17 -O2 main.c -o main && ./main'
    """
    name = next(iter(source.files))
    if source.language in COMPILERS:
        compiler, _, standard = COMPILERS[source.language]
        texts = [path for path in source.files if not path.endswith(".h")]
        flags = source.flags or FLAGS
        if any(flag.startswith("-std=") for flag in flags):
            standard = ""
        words = [compiler, *([standard] if standard else []), *flags, *texts]
        return f"{shlex.join(words)} -o main && ./main"
    return {"python": f"python {name}", "node": f"node {name}", "sql": f"sqlite3 < {name}", "formal": f"check {name}"}[
        source.language
    ]


def _run(source: Source, sandbox: Sandbox, workers: Callable[[], Workers]) -> _Seen:
    start = time.perf_counter()
    if source.language == "formal":
        (proof,) = source.files.values()
        return _Seen(checker.check(proof), "", False, time.perf_counter() - start)
    if source.language == "sql":
        [outcome] = run_sql(workers(), source.files["schema.sql"], source.files["query.sql"])
        if outcome.state != "returned":
            return _Seen("", outcome.error, True, time.perf_counter() - start)
        rows = "\n".join("|".join("" if cell is None else str(cell) for cell in row) for row in outcome.value)
        return _Seen(rows, "", False, time.perf_counter() - start)
    try:
        program = _program(source)
    except CompileError as error:
        return _Seen("", str(error), True, time.perf_counter() - start)
    start = time.perf_counter()
    ran = sandbox.run(program.command, files=dict(program.files), stdin=source.stdin.encode(), limits=LIMITS)
    said = ran.stderr.decode("utf-8", "replace") or f"ended by {ran.ended} with {ran.returncode}"
    return _Seen(ran.text, said, not ran.ok, time.perf_counter() - start)


def _program(source: Source) -> Program:
    texts = list(source.files.values())
    if source.language == "node":
        return node_program(texts[0])
    if source.language in COMPILERS and len(texts) == 1:
        return compiled(texts[0], source.language, flags=source.flags or FLAGS)
    files = {name: text.encode() for name, text in source.files.items()}
    if source.language in COMPILERS:
        return Program(("/bin/sh", "-c", command_of(source)), source.language, files)
    if len(texts) == 1:
        return python_program(texts[0])
    # -P keeps the program's own folder off the path, where its other files lie
    command = [part for part in python_program("").command if part != "-P"]
    return Program(tuple(command), "python", files)
