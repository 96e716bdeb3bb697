"""One run of a whole program in the sandbox and what it costs, less the cost of starting an empty program that was made in the same way."""

from __future__ import annotations

import statistics
from dataclasses import replace

from assay import checks
from assay.methods.core.programs.processes import NULLS, Program, run_once
from assay.methods.core.programs.workers import Outcome
from assay.methods.core.sandbox import Limits, Sandbox

METERS = ("instructions", "cpu_seconds", "peak_bytes")


def run(
    sandbox: Sandbox,
    program: Program,
    stdin: bytes,
    meter: str,
    *,
    empty: Program | None = None,
    limits: Limits | None = None,
) -> Outcome:
    """How it ended, what it wrote to stdout, and its cost by one of `METERS`, less that of `empty`, a program that only starts.

    All processes that it waits for count, the start of the sandbox does not; what nobody waits for is not seen. Limits of time hold for
    the program as it is without being counted. Instructions repeat on one machine, but for what depends on addresses. Raises
    ValueError for another meter, OSError where the empty program does not run.
    """
    checks.choice("meter", meter, METERS)
    outcome = run_once(sandbox, program, stdin, meter, limits or sandbox.limits)
    if outcome.cost is None or empty is None:
        return outcome
    return replace(outcome, cost=max(outcome.cost - _start(sandbox, empty, meter), 0.0))


_STARTS: dict[object, float] = {}


def _start(sandbox: Sandbox, empty: Program, meter: str) -> float:
    """What an empty program costs here: taken once a process."""
    key = (meter, empty.command, tuple(sorted(empty.files.items())))
    if key not in _STARTS:
        runs = range(1 if meter == "instructions" else NULLS)
        costs = [run_once(sandbox, empty, b"", meter, sandbox.limits).cost for _ in runs]
        known = [cost for cost in costs if cost is not None]
        if not known:
            raise OSError(f"the empty {empty.language} program does not run in the sandbox")
        _STARTS[key] = statistics.median(known)
    return _STARTS[key]
