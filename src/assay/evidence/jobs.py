"""One point of an experiment as a job, and the function that measures it on this machine."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

from assay.evidence.place import Place, here, lacking
from assay.evidence.types import AGAIN, PROCESSES, Scale, Status, plain, point_key
from assay.measure.isolate import run_isolated
from assay.measure.stats import Interval, across, positive_median


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
    decides: bool = False

    def key(self, place: Place) -> tuple[Any, ...]:
        return (self.claim, point_key(self.point), self.scale, self.seed, place.fingerprint)


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
    """Measure one point on this machine, in child processes; failures of a child are reported, not raised.

    A figure takes one process. A trial takes `PROCESSES`, its rounds divided among them; the interval is over processes.
    """
    if lacks := lacking(job.needs):
        return Outcome(here(), "ok", needs=tuple(lacks))
    begin = time.monotonic()
    runs: list[dict[str, Any]] = []
    process: dict[str, Any] = {"peak_rss_bytes": 0, "cpu_seconds": 0.0}
    while True:
        left = job.seconds - (time.monotonic() - begin)
        share = left / (1 if runs else 2)  # the first may take half of the time, so that there are others
        result = run_isolated(
            "assay.evidence.point:run_point",
            {
                "module": job.module,
                "claim": job.claim,
                "point": job.point,
                "seed": job.seed,
                "seconds": max(share / (1 if not runs else PROCESSES - len(runs)), 1.0),
                "rounds": len(_rounds(runs)) if runs else 0,
                "first": not runs,
                "scale": job.scale,
            },
            timeout_s=max(left, 1.0),
            memory_bytes=job.memory_bytes,
        )
        process["peak_rss_bytes"] = max(process["peak_rss_bytes"], result.peak_rss_bytes or 0)
        process["cpu_seconds"] += result.cpu_seconds or 0.0
        if result.status != "ok" or result.value is None:
            if result.traceback:
                process["traceback"] = result.traceback[-4000:]
            return Outcome(
                here(), result.status, result.error, seconds=time.monotonic() - begin, process=plain(process)
            )
        runs.append(result.value)
        if result.value["kind"] == "figure" or len(runs) == PROCESSES:
            break
    seen = runs[0] if runs[0]["kind"] == "figure" else combined(runs)
    return Outcome(here(), "ok", "", seen, seconds=time.monotonic() - begin, process=plain(process))


def _rounds(runs: list[dict[str, Any]]) -> list[float]:
    return runs[0]["samples"]["candidate"]


def combined(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """One trial of its processes: the time of each arm over the candidate's, with intervals over processes, and medians of seconds.

    The trial is noisy when one of its processes was, or when the candidate differs from itself.
    """
    first = dict(runs[0])
    samples = [run["samples"] for run in runs]
    ratios = {
        arm: across([_divided(one[arm], one["candidate"]) for one in samples])
        for arm in samples[0]
        if arm != "candidate"
    }
    medians = {arm: positive_median([s for one in samples for s in one[arm]]).median for arm in samples[0]}
    busy = any(run["noisy"] for run in runs)
    apart = not ratios[AGAIN].contains(1.0)
    trends = sum(run["trend"] for run in runs)
    noise = ""
    if busy:
        noise = "the machine was busy with other things"
    elif apart:
        noise = "the candidate differed from itself"
    elif trends > 1:  # of three: one may be chance
        noise = "times drifted beyond the noise while they were taken"
    first["details"] = {
        **first["details"],
        "timing": {
            "rounds": [len(one["candidate"]) for one in samples],
            "warmup": [run["warmup"] for run in runs],
            "trend": [run["trend"] for run in runs],
            "cpu_seconds": first.pop("cpu"),
            "medians_by_process": {
                arm: [float(f"{across([_divided(one[arm], one['candidate'])]).median:.5g}") for one in samples]
                for arm in ratios
            },
        },
    }
    for name in ("samples", "warmup", "trend"):
        del first[name]
    return first | {
        "ratios": {arm: _estimate(ratio) for arm, ratio in ratios.items()},
        "seconds_of": medians,
        "noisy": bool(noise),
        "noise": noise,
        "processes": len(runs),
        "load_after": runs[-1]["load_after"],
    }


def _divided(times: list[float], candidate: list[float]) -> list[float]:
    return [a / b for a, b in zip(times, candidate, strict=True)]


def _estimate(interval: Interval) -> dict[str, float]:
    return {"median": interval.median, "low": interval.low, "high": interval.high}
