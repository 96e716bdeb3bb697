"""Runs the experiments of papers point by point, and stores each point's evidence as soon as it is measured."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Protocol

from pydantic import ValidationError

from assay.errors import InputError, MissingError
from assay.evidence.jobs import Job, Outcome, measure
from assay.evidence.place import Place, here
from assay.evidence.record import Evidence, changed
from assay.evidence.store import Store, StoreError
from assay.evidence.types import Scale, plain, point_key
from assay.evidence.verdict import SCALES, judge, unit_name


class ClaimFacts(Protocol):
    """The parts of the catalogue's Claim that are used."""

    @property
    def id(self) -> str: ...
    @property
    def metric(self) -> str: ...
    @property
    def value(self) -> float | None: ...
    @property
    def unit(self) -> str: ...
    @property
    def higher_is_better(self) -> bool: ...


@dataclass(frozen=True)
class Plan:
    """What would be run, and why the rest would not: `unavailable` maps a slug or a claim id to the reason."""

    jobs: tuple[Job, ...]
    claims: dict[str, ClaimFacts]
    unavailable: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Progress:
    """`done` of `total` points are measured; `record` is the newest (None when a measurement is about to start)."""

    done: int
    total: int
    job: Job
    record: Evidence | None = None
    resumed: bool = False


def plan(names: Iterable[str], scale: Scale = "small", seed: int = 0) -> Plan:
    """Every point at `scale` of the experiments of some papers ("slug") or claims ("slug/what"), in order.

    Raises InputError for a name the catalogue does not know, an unknown scale, and an experiment whose claim the catalogue does
    not list.
    """
    from assay import catalogue
    from assay.experiments import experiments_of

    if scale not in SCALES:
        raise InputError(f"scale must be one of {', '.join(SCALES)}, got {scale!r}")
    jobs: list[Job] = []
    claims: dict[str, ClaimFacts] = {}
    unavailable: dict[str, str] = {}
    names = list(names)
    for slug in dict.fromkeys(name.split("/", 1)[0] for name in names):
        known = {claim.id: claim for claim in catalogue.get(slug).claims}
        asked = set(known) if slug in names else {name for name in names if name.startswith(f"{slug}/")}
        if strange := sorted(asked - set(known)):
            raise InputError(f"no claim is called {strange[0]!r}; {slug} has: {', '.join(known)}")
        try:
            experiments = experiments_of(slug)
        except Exception as error:  # an experiment that cannot be imported must not end the sweep
            unavailable[slug] = f"its experiments cannot be loaded: {type(error).__name__}: {error}".splitlines()[0]
            continue
        if not experiments:
            unavailable[slug] = "planned: it has no experiment yet"
        elif untried := asked - {found.claim for found in experiments}:
            unavailable |= {claim: "no experiment tries it yet" for claim in sorted(untried) if claim in names}
        for found in experiments:
            if found.claim not in known:
                where = found.run.__module__
                raise InputError(f"the catalogue has no claim {found.claim!r}, for which {where} has an experiment")
            if found.claim not in asked:
                continue
            claims[found.claim] = known[found.claim]
            if scale not in found.points:
                has = ", ".join(name for name in SCALES if name in found.points)
                unavailable[found.claim] = f"no points at scale {scale}; it has {has}"
            for index, point in enumerate(found.points.get(scale, ())):
                jobs.append(
                    Job(
                        claim=found.claim,
                        module=found.run.__module__,
                        point=plain(dict(point)),
                        index=index,
                        scale=scale,
                        seed=seed,
                        needs=tuple(found.needs),
                        seconds=found.minutes * 60,
                        memory_bytes=int(found.memory_gib * 2**30),
                    )
                )
    return Plan(tuple(jobs), claims, unavailable)


def verify(
    names: Sequence[str],
    *,
    scale: Scale = "small",
    resume: bool = False,
    ray_address: str | None = None,
    progress: Callable[[Progress], None] | None = None,
    store: Store | None = None,
    seed: int = 0,
) -> list[Evidence]:
    """Measure some papers or single claims, named as in `plan`, and judge them; returns the evidence in the order of the plan.

    Each point runs in a process of its own under its experiment's time and memory limits, and its record is in the store
    (default: `Store()`) before the next begins: an interruption loses only the point it hits. With `resume` a point is not
    measured again if the store has a record of it that did not fail, from the same machine, version and commit of assay, scale
    and seed; that record is returned instead. What failed is tried again: its limits may be others today. With `ray_address`
    the points go to a Ray cluster, one at a time to each of its machines ("local" starts one here, "auto" finds the running
    one); assay must be installed on all of them.

    Raises InputError and MissingError as `plan` does and when nothing that was named can be measured; MissingError when Ray is
    wanted and missing; StoreError before the first point when the store cannot be written, and after the last one when it
    could not take some record (which is then in the file that the message names).
    """
    todo = plan(names, scale, seed)
    if not todo.jobs:
        why = "; ".join(f"{name}: {reason}" for name, reason in todo.unavailable.items())
        raise MissingError(f"nothing to verify: {why}" if why else "nothing to verify: no paper was named")
    if store is None:
        with Store() as own:
            return _verify(todo, own, resume, ray_address, progress or _quiet)
    return _verify(todo, store, resume, ray_address, progress or _quiet)


def _quiet(_: Progress) -> None:
    pass


def _verify(
    todo: Plan, store: Store, resume: bool, ray_address: str | None, progress: Callable[[Progress], None]
) -> list[Evidence]:
    store.check_writable()
    cluster: Cluster = Here()
    if ray_address is not None:
        from assay.evidence.cluster import RayCluster

        cluster = RayCluster(ray_address)
    records: dict[int, Evidence] = {}
    unsaved: StoreError | None = None

    with cluster:
        waiting = []
        old = _recorded(todo, store) if resume else {}
        for number, job in enumerate(todo.jobs):
            record = next((old[job.key(place)] for place in cluster.places if job.key(place) in old), None)
            if record is None:
                waiting.append((number, job))
                continue
            records[number] = record
            progress(Progress(len(records), len(todo.jobs), job, record, resumed=True))

        def started(job: Job) -> None:
            progress(Progress(len(records), len(todo.jobs), job))

        for number, job, outcome in cluster.run(waiting, started):
            record = _evidence(job, todo.claims[job.claim], outcome)
            try:
                store.append(record)
            except StoreError as error:  # the record is safe in the fallback file; the sweep continues
                unsaved = error
            records[number] = record
            progress(Progress(len(records), len(todo.jobs), job, record))
    if unsaved is not None:
        raise unsaved
    return [records[number] for number in sorted(records)]


def _recorded(todo: Plan, store: Store) -> dict[tuple[Any, ...], Evidence]:
    """The store's records of the plan's claims that did not fail; the newest if a point was measured twice."""
    return {
        (r.claim, point_key(r.point), r.scale, r.seed, r.fingerprint, r.assay_version, r.commit): r
        for claim in dict.fromkeys(job.claim for job in todo.jobs)
        for r in store.records(claim=claim, status="ok")
    }


class Cluster(Protocol):
    """Where points are measured: `places` are its machines, `run` yields each job's outcome as it comes."""

    places: list[Place]

    def __enter__(self) -> Any: ...
    def __exit__(self, *_: object) -> None: ...
    def run(
        self, jobs: list[tuple[int, Job]], started: Callable[[Job], None]
    ) -> Iterator[tuple[int, Job, Outcome]]: ...


class Here:
    """This machine: one point after the other."""

    def __init__(self) -> None:
        self.places = [here()]

    def __enter__(self) -> Here:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def run(self, jobs: list[tuple[int, Job]], started: Callable[[Job], None]) -> Iterator[tuple[int, Job, Outcome]]:
        for number, job in jobs:
            started(job)
            yield number, job, measure(job)


def _evidence(job: Job, claim: ClaimFacts, outcome: Outcome) -> Evidence:
    """The record of an outcome, with its verdict."""
    seen = dict(outcome.seen)
    threads = seen.pop("threads", None)
    details = {**seen.pop("details", {}), **({"process": outcome.process} if outcome.process else {})}
    common: dict[str, Any] = {
        "claim": job.claim,
        "slug": job.claim.split("/", 1)[0],
        "point": job.point,
        "index": job.index,
        "scale": job.scale,
        "metric": claim.metric,
        "paper_value": claim.value,
        "paper_unit": claim.unit,
        "higher_is_better": claim.higher_is_better,
        "needs": outcome.needs,
        "details": details,
        "fingerprint": outcome.place.fingerprint,
        "machine": outcome.place.machine | ({"threads": threads} if threads else {}),
        "assay_version": outcome.place.assay_version,
        "commit": outcome.place.commit,
        "seed": job.seed,
        "command": f"assay verify {job.claim.split('/', 1)[0]} --scale {job.scale}",
        "seconds": outcome.seconds,
        "created": datetime.now(UTC),
    }
    problem = outcome.error if outcome.status != "ok" else _unit_problem(seen, claim)
    if problem:
        return Evidence(**common, status=outcome.status if outcome.status != "ok" else "failed", error=plain(problem))
    try:
        record = Evidence(**common, **seen, status="ok")
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        return Evidence(
            **common, status="failed", error=f"the experiment's result is not valid: {where}: {first['msg']}"
        )
    judgement = judge(record)
    return changed(record, verdict=judgement.verdict, reason=judgement.reason)


def _unit_problem(seen: dict[str, Any], claim: ClaimFacts) -> str:
    """What is wrong with the unit: a figure in another unit than the claim's cannot be compared with it, a fault of the experiment."""
    if seen.get("kind") != "figure" or claim.value is None or unit_name(seen["unit"]) == unit_name(claim.unit):
        return ""
    return f"the experiment reports a figure in {seen['unit']!r}, but the claim is in {claim.unit!r}"
