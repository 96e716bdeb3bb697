"""The number of instructions a command executes: a cost that does not depend on how busy the machine is.

Two tools count: `perf stat` reads the processor's own counter (fast, repeats to about 0.1 %; most virtual machines have none),
and valgrind's callgrind simulates the processor (about fifty times slower, repeats almost exactly).
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from assay.errors import MissingError

Tool = Literal["perf", "callgrind"]


@dataclass(frozen=True)
class Instructions:
    """Instructions executed in user mode, the tool that counted them, and what the command itself returned."""

    count: int
    tool: Tool
    returncode: int
    stdout: str


def available_tools() -> list[Tool]:
    """Which of perf and callgrind count on this machine; each is tried, not just looked for."""
    found: list[Tool] = []
    for tool in ("perf", "callgrind"):
        try:
            if count_instructions(["true"], tool=tool, timeout_s=30).count > 0:
                found.append(tool)
        except (MissingError, subprocess.TimeoutExpired):
            continue
    return found


def count_instructions(
    command: Sequence[str],
    *,
    tool: Tool | None = None,
    timeout_s: float | None = None,
    stdin: str | None = None,
    environment: Mapping[str, str] | None = None,
    folder: Path | None = None,
) -> Instructions:
    """Run `command` under a counter. `tool` None takes perf if the processor has a counter, callgrind otherwise.

    Callgrind counts only the command's own process, perf its children too. For a count that repeats, fix the hash seed of Python
    programs (PYTHONHASHSEED=0). `environment` replaces the whole environment; `folder` is the working directory.

    Raises ValueError for an empty command or unknown tool, MissingError when no tool can count here (it says which to install) or
    the command is not found, subprocess.TimeoutExpired after `timeout_s` (the command is killed).
    """
    if not command:
        raise ValueError("command must hold at least the program, got nothing")
    if tool not in (None, "perf", "callgrind"):
        raise ValueError(f"tool must be 'perf', 'callgrind' or None, got {tool!r}")
    if shutil.which(command[0]) is None:
        raise MissingError(f"the command {command[0]!r} was not found")
    run = {"timeout": timeout_s, "input": stdin, "env": environment, "cwd": folder}
    if tool in (None, "perf"):
        found = _perf(command, run)
        if found is not None:
            return found
        if tool == "perf":
            raise MissingError("perf cannot count instructions here (not installed, not allowed, or no such counter)")
    found = _callgrind(command, run)
    if found is None:
        raise MissingError("nothing here counts instructions: install valgrind (e.g. apt-get install valgrind)")
    return found


def _perf(command: Sequence[str], run: Mapping[str, Any]) -> Instructions | None:
    """None if perf is missing or this processor has no counter."""
    if shutil.which("perf") is None:
        return None
    with tempfile.NamedTemporaryFile("r", prefix="assay-perf-") as report:
        done = _run(["perf", "stat", "-x", ",", "-e", "instructions:u", "-o", report.name, *command], run)
        for line in report.read().splitlines():
            fields = line.split(",")
            if len(fields) > 2 and fields[2].startswith("instructions") and fields[0].isdigit():
                return Instructions(int(fields[0]), "perf", done.returncode, done.stdout)
    return None


def _callgrind(command: Sequence[str], run: Mapping[str, Any]) -> Instructions | None:
    """None if valgrind is missing or wrote no count."""
    if shutil.which("valgrind") is None:
        return None
    with tempfile.TemporaryDirectory(prefix="assay-callgrind-") as name:
        out, log = Path(name) / "out", Path(name) / "log"
        options = ["--tool=callgrind", f"--callgrind-out-file={out}", f"--log-file={log}"]
        done = _run(["valgrind", *options, *command], run)
        text = out.read_text() if out.exists() else ""
    for line in text.splitlines():
        if line.startswith(("summary:", "totals:")):
            return Instructions(int(line.split()[1]), "callgrind", done.returncode, done.stdout)
    return None


def _run(command: list[str], run: Mapping[str, Any]) -> subprocess.CompletedProcess[str]:
    """Like subprocess.run, but anything that ends the wait also ends the tool and the command it runs."""
    options: dict[str, Any] = {
        "stdout": subprocess.PIPE,
        "stderr": subprocess.DEVNULL,
        "text": True,
        "start_new_session": True,
    }
    stdin = subprocess.DEVNULL if run["input"] is None else subprocess.PIPE
    with subprocess.Popen(command, stdin=stdin, env=run["env"], cwd=run["cwd"], **options) as process:
        try:
            stdout, _ = process.communicate(run["input"], timeout=run["timeout"])
        except BaseException:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            raise
    return subprocess.CompletedProcess(command, process.returncode, stdout, "")
