"""One point of an experiment as a job, and the function that measures it on this machine."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from assay.evidence.place import Place, here, lacking
from assay.evidence.types import Scale, Status, plain, point_key
from assay.measure.isolate import run_isolated


@dataclass(frozen=True)
class Job:
    """One point to measure, of an experiment that can be imported anywhere."""

    claim: str
    module: str
    point: dict[str, Any]
    index: int
    scale: Scale
    seed: int
    needs: tuple[str, ...]
    seconds: float
    memory_bytes: int

    def key(self, place: Place) -> tuple[Any, ...]:
        return (self.claim, point_key(self.point), self.scale, self.seed, *place.key)


@dataclass
class Outcome:
    """The result of a job, wherever it was measured."""

    place: Place
    status: Status
    error: str = ""
    seen: dict[str, Any] = field(default_factory=dict)
    needs: tuple[str, ...] = ()
    seconds: float = 0.0
    process: dict[str, Any] = field(default_factory=dict)


def measure(job: Job) -> Outcome:
    """Measure one point on this machine, in a child process; failures of the child are reported, not raised."""
    if lacks := lacking(job.needs):
        return Outcome(here(), "ok", needs=tuple(lacks))
    result = run_isolated(
        "assay.evidence.point:run_point",
        {"module": job.module, "claim": job.claim, "point": job.point, "seed": job.seed, "seconds": job.seconds},
        timeout_s=job.seconds,
        memory_bytes=job.memory_bytes,
    )
    process: dict[str, Any] = {"peak_rss_bytes": result.peak_rss_bytes, "cpu_seconds": result.cpu_seconds}
    if result.traceback:
        process["traceback"] = result.traceback[-4000:]
    return Outcome(
        here(), result.status, result.error, result.value or {}, seconds=result.seconds, process=plain(process)
    )
