"""Runs a function in a child process with a time limit and a memory limit, so that no failure takes the caller down.

    result = run_isolated("package.module:function", {"n": 3}, timeout_s=60, memory_bytes=2 * 2**30)

Arguments and result are JSON and travel in files. What the function prints is captured and shown only if it fails.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

import psutil

from assay.paths import scratch_dir
from assay.search_path import environment as safe_environment
from assay.search_path import without_current_folder

CHILD = str(Path(__file__).with_name("child.py"))
POLL_SECONDS = 0.05
FAMILY_SECONDS = 0.5  # how often new grandchildren are looked for: that scans every process of the machine

Status = Literal["ok", "failed", "timeout", "out of memory"]


@dataclass(frozen=True)
class ChildResult:
    """How a child ended. `value` is the function's result (status "ok"); `error` is one line that says why there is none.

    `peak_rss_bytes` is the peak resident memory of the child and its own children; `start_rss_bytes` is what the child held when
    the function was called (interpreter and imports of its module). `seconds` is wall time including start-up, `work_seconds`
    that of the function alone (0 unless it returned).
    """

    status: Status
    value: Any
    error: str
    seconds: float
    peak_rss_bytes: int
    cpu_seconds: float
    traceback: str = ""
    output: str = ""  # the end of what it printed
    start_rss_bytes: int = 0
    work_seconds: float = 0.0

    @property
    def ok(self) -> bool:
        """True if there is a value."""
        return self.status == "ok"


def run_isolated(
    target: str,
    kwargs: Mapping[str, Any] | None = None,
    *,
    timeout_s: float | None = None,
    memory_bytes: int | None = None,
    environment: Mapping[str, str] | None = None,
) -> ChildResult:
    """Call `target` ("module:function", keyword arguments `kwargs`) in a fresh interpreter and wait for it.

    The child sees this process's module search path without the current folder (nothing next to the user's files is ever
    imported; see `assay.search_path`), its working directory, and its environment extended by `environment`. The child and
    everything it started are killed when `timeout_s` has passed, when the resident memory of the whole family exceeds
    `memory_bytes` (polled every 50 ms; pages shared within the family count more than once), when this process is interrupted,
    and (on Linux) when this process dies. A crash, an exception, a result that is not JSON and an early exit are "failed";
    MemoryError, a failed allocation of torch and a kill by the kernel for lack of memory are "out of memory".

    Raises ValueError for a target without a colon or a limit that is not positive, TypeError for kwargs that are not JSON.

    >>> run_isolated("json:dumps", {"obj": [1, 2]}).value
    '[1, 2]'
    """
    if target.count(":") != 1 or not all(target.split(":")):
        raise ValueError(f"target must look like 'module:function', got {target!r}")
    for name, limit in (("timeout_s", timeout_s), ("memory_bytes", memory_bytes)):
        if limit is not None and not limit > 0:
            raise ValueError(f"{name} must be positive, got {limit}")
    try:
        arguments = json.dumps(dict(kwargs or {}))
    except (TypeError, ValueError) as error:
        raise TypeError(f"kwargs must be JSON: {error}") from None

    with scratch_dir(tempfile.gettempdir(), "assay-child-") as folder:
        call = {
            "target": target,
            "kwargs": json.loads(arguments),
            "path": without_current_folder(sys.path),
            "folder": _current_folder(),
            "parent": os.getpid(),
        }
        (folder / "call.json").write_text(json.dumps(call))
        with (folder / "output").open("wb") as output:
            start = time.perf_counter()
            kills = _kernel_kills()
            child = _start(folder, output, environment)
            family = _Family(child.pid)
            with _killed_on_error(child, family):
                ended = _watch(child, family, start, timeout_s, memory_bytes)
            seconds = time.perf_counter() - start
        return _result(folder, child, family, ended, seconds, _kernel_kills() > kills)


def _current_folder() -> str | None:
    with contextlib.suppress(FileNotFoundError):  # deleted meanwhile
        return os.getcwd()
    return None


def _start(folder: Path, output: IO[bytes], extra: Mapping[str, str] | None) -> subprocess.Popen[bytes]:
    """Start the child as a file, in a folder of ours and with -P, so that not even its first imports can come from the user's folder."""
    return subprocess.Popen(
        [sys.executable, "-P", CHILD, str(folder)],
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.STDOUT,
        cwd=folder,
        env=safe_environment({**os.environ, **(extra or {})}),
        start_new_session=True,  # its own process group: it can be killed as a whole, and Ctrl-C reaches only us
    )


@contextlib.contextmanager
def _killed_on_error(child: subprocess.Popen[bytes], family: _Family) -> Iterator[None]:
    """Kill the child if this process is interrupted in any way (Ctrl-C included)."""
    try:
        yield
    except BaseException:
        _kill(child, family)
        raise


def _watch(
    child: subprocess.Popen[bytes], family: _Family, start: float, timeout_s: float | None, memory_bytes: int | None
) -> Status | None:
    """Wait for the end; returns the status if we ended the child, None if it ended by itself."""
    while True:
        try:
            child.wait(POLL_SECONDS)
            family.end()
            return None
        except subprocess.TimeoutExpired:
            pass
        rss = family.look()
        if memory_bytes is not None and rss > memory_bytes:
            _kill(child, family)
            return "out of memory"
        if timeout_s is not None and time.perf_counter() - start > timeout_s:
            _kill(child, family)
            return "timeout"


class _Family:
    """The child and all its descendants: their memory and processor time at the last poll."""

    def __init__(self, pid: int) -> None:
        self.peak = 0
        self.cpu = 0.0
        self._members: dict[int, psutil.Process] = {}
        self._counted = 0.0
        self._used: dict[int, float] = {}
        with contextlib.suppress(psutil.NoSuchProcess):
            self._members[pid] = psutil.Process(pid)
        self._root = pid

    def look(self) -> int:
        """Resident bytes of all members now."""
        if time.monotonic() - self._counted > FAMILY_SECONDS:
            self.gather()
        rss = 0
        for pid, member in list(self._members.items()):
            try:
                rss += member.memory_info().rss
                times = member.cpu_times()
                self._used[pid] = times.user + times.system
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                del self._members[pid]
        self.cpu = sum(self._used.values())
        self.peak = max(self.peak, rss)
        return rss

    def gather(self) -> None:
        """Look for new members; those once seen are kept, even after their own parent is gone."""
        self._counted = time.monotonic()
        for member in list(self._members.values()):
            with contextlib.suppress(psutil.NoSuchProcess):
                for found in member.children(recursive=True):
                    self._members.setdefault(found.pid, found)

    def end(self) -> None:
        """Kill what the child left behind: its process group, and members that left the group but were seen."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._root, signal.SIGKILL)
        for pid, member in self._members.items():
            if pid != self._root:
                with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
                    member.kill()  # psutil checks that the number still belongs to the same process


def _kill(child: subprocess.Popen[bytes], family: _Family) -> None:
    family.gather()
    family.end()
    child.kill()
    child.wait()


def _result(
    folder: Path, child: subprocess.Popen[bytes], family: _Family, ended: Status | None, seconds: float, starved: bool
) -> ChildResult:
    output = (folder / "output").read_bytes()[-20_000:].decode(errors="replace")
    reply: dict[str, Any] = {}
    with contextlib.suppress(OSError, ValueError):
        reply = json.loads((folder / "reply.json").read_text())
    status: Status
    value, trace = None, ""
    if ended == "timeout":
        status, error = "timeout", f"killed after {seconds:.1f} s, its time limit"
    elif ended == "out of memory":
        status, error = "out of memory", f"killed at {family.peak / 2**20:.0f} MiB, above its memory limit"
    elif reply:
        status, error, trace, value = reply["status"], reply["error"], reply["traceback"], reply["value"]
    elif child.returncode == -signal.SIGKILL and starved:
        status, error = "out of memory", "killed by the kernel because the machine ran out of memory"
    elif child.returncode < 0:
        status, error, trace = "failed", f"crashed: {_signal_name(-child.returncode)}", output
    else:
        status, error, trace = "failed", f"exited with code {child.returncode} and no result", output
    return ChildResult(
        status=status,
        value=value,
        error=error,
        seconds=seconds,
        peak_rss_bytes=max(family.peak, reply.get("peak_rss_bytes", 0)),
        cpu_seconds=max(family.cpu, reply.get("cpu_seconds", 0.0)),
        traceback=trace,
        output=output,
        start_rss_bytes=reply.get("start_rss_bytes", 0),
        work_seconds=reply.get("work_seconds", 0.0),
    )


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _kernel_kills() -> int:
    """How often the kernel has killed a process for lack of memory, in the whole machine and in our control group."""
    count = 0
    for file in ("/proc/vmstat", "/sys/fs/cgroup/memory.events"):
        with contextlib.suppress(OSError):
            for line in Path(file).read_text().splitlines():
                if line.startswith("oom_kill "):
                    count += int(line.split()[1])
    return count
