"""Programs with MPI, compiled and run on several ranks inside of the sandbox, which has a loopback of its own."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from assay import checks
from assay.methods.core.sandbox import Limits, Ran, Sandbox

How = Literal["ran", "does not compile", "failed", "hangs"]
LIMITS = Limits(wall_seconds=20, cpu_seconds=20, memory_mib=2048, processes=256, files_mib=64)
_START = "chmod +x main && export UCX_LOG_LEVEL=fatal && exec mpiexec {options} -n {ranks} ./main"
"""UCX, which Debian's mpich stands on, complains on stdout that a sandbox has no list of network cards."""


class MpiMissing(RuntimeError):
    """There is no MPI here; the text says how to get it."""


@dataclass(frozen=True)
class MpiRun:
    """How a program ended on `ranks` ranks, and what it printed, as lines: ranks print in any order."""

    how: How
    ranks: int
    printed: Counter[str]
    said: str = ""  # by the compiler, or on stderr

    def same(self, other: MpiRun) -> bool:
        """Whether both ran and printed the same lines, in whatever order."""
        return self.how == other.how == "ran" and self.printed == other.printed


@lru_cache(maxsize=1)
def _options() -> str:
    """What this mpiexec needs to start ranks beside each other in a sandbox."""
    said = Sandbox(LIMITS).run(["mpiexec", "--version"]).text
    if "HYDRA" in said:
        return "-launcher fork -host localhost"
    return "--allow-run-as-root --oversubscribe --mca btl self,vader --mca plm isolated"


def have_mpi() -> bool:
    """Whether a compiler and a starter of MPI programs are installed (Debian: mpich)."""
    return shutil.which("mpicc") is not None and shutil.which("mpiexec") is not None


def run(program: str, ranks: Sequence[int] = (2,), *, limits: Limits = LIMITS) -> list[MpiRun]:
    """Compile C source with mpicc and run it once for each number of ranks, in the sandbox; a deadlock is ended by the limits.

    Warnings are no errors, implicit functions are: a call that was forgotten in a header would otherwise link. Raises MpiMissing without
    mpicc and mpiexec, ValueError for no ranks.
    """
    if not ranks:
        raise ValueError("ranks must be one number or more, got none")
    for each in ranks:
        checks.whole("ranks", each, low=1, high=16)
    if not have_mpi():
        raise MpiMissing("mpicc and mpiexec are not installed (Debian: apt install mpich)")
    sandbox = Sandbox(limits)
    command = ["mpicc", "-O1", "-w", "-Werror=implicit-function-declaration", "-o", "main", "main.c", "-lm"]
    made = sandbox.run(command, files={"main.c": program}, collect=("main",))
    if "main" not in made.files:
        said = made.stderr.decode("utf-8", "replace")[-2000:]
        return [MpiRun("does not compile", each, Counter(), said) for each in ranks]
    found = []
    for each in ranks:
        start = _START.format(options=_options(), ranks=each)
        found.append(_seen(sandbox.run(["/bin/sh", "-c", start], files={"main": made.files["main"]}), each))
    return found


def _seen(ran: Ran, ranks: int) -> MpiRun:
    how: How = "ran" if ran.ok else "hangs" if ran.ended in ("wall time", "cpu time") else "failed"
    return MpiRun(how, ranks, Counter(ran.text.splitlines()), ran.stderr.decode("utf-8", "replace")[-2000:])
