"""Runs the experiments of papers point by point, and stores each point's evidence as soon as it is measured."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Protocol

from pydantic import ValidationError

from assay.errors import InputError, MissingError
from assay.evidence import hashes
from assay.evidence.jobs import Job, Outcome, measure
from assay.evidence.place import Place, here
from assay.evidence.reading import misfit
from assay.evidence.record import Evidence, changed
from assay.evidence.store import Store, StoreError
from assay.evidence.types import Estimate, Scale, plain, point_key
from assay.evidence.verdict import SCALES, unit_name
from assay.experiments.core import Experiment


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
    @property
    def form(self) -> str: ...
    @property
    def quantity(self) -> str: ...
    @property
    def baseline_value(self) -> float | None: ...


@dataclass(frozen=True)
class Plan:
    """What would be run, and why the rest would not: `unavailable` maps a slug or a claim id to the reason."""

    jobs: tuple[Job, ...]
    claims: dict[str, ClaimFacts]
    experiments: dict[str, Experiment] = field(default_factory=dict)
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
    run: dict[str, Experiment] = {}
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
            claims[found.claim], run[found.claim] = known[found.claim], found
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
                        decides=point == found.decides[scale],
                    )
                )
    return Plan(tuple(jobs), claims, run, unavailable)


def verify(
    names: Sequence[str],
    *,
    scale: Scale = "small",
    resume: bool = False,
    ray_address: str | None = None,
    progress: Callable[[Progress], None] | None = None,
    store: Store | None = None,
    seed: int = 0,
    command: str = "",
) -> list[Evidence]:
    """Measure some papers or single claims, named as in `plan`, and judge them; returns the evidence in the order of the plan.

    Each point runs in a process of its own under its experiment's time and memory limits, and its record is in the store
    (default: `Store()`) before the next begins: an interruption loses only the point it hits. With `resume` a point is not
    measured again if the store has a record of it from the same machine, scale and seed that did not fail, is no noisy timing,
    and whose code has not changed since; that record is returned instead. What failed is tried again: its limits may be others
    today. With `ray_address`
    the points go to a Ray cluster, one at a time to each of its machines ("local" starts one here, "auto" finds the running
    one); assay must be installed on all of them. `command` is kept in the records as the way to measure them again.

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
            return _verify(todo, own, resume, ray_address, progress or _quiet, command)
    return _verify(todo, store, resume, ray_address, progress or _quiet, command)


def _quiet(_: Progress) -> None:
    pass


def _verify(
    todo: Plan,
    store: Store,
    resume: bool,
    ray_address: str | None,
    progress: Callable[[Progress], None],
    command: str,
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
            record = _evidence(job, todo.claims[job.claim], todo.experiments[job.claim], outcome, command)
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
    """The store's own records of the plan's claims that count today; the newest if a point was measured twice."""
    return {
        (r.claim, point_key(r.point), r.scale, r.seed, r.fingerprint): r
        for claim in dict.fromkeys(job.claim for job in todo.jobs)
        for r in store.records(claim=claim, status="ok", imported=False)
        if not hashes.is_stale(r) and not r.spoilt
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


def _evidence(job: Job, claim: ClaimFacts, experiment: Experiment, outcome: Outcome, command: str) -> Evidence:
    """The record of an outcome: what was seen, in the claim's unit, beside what the claim says and the experiment declared."""
    seen = dict(outcome.seen)
    threads = seen.pop("threads", None)
    details = {**seen.pop("details", {}), **({"process": outcome.process} if outcome.process else {})}
    common: dict[str, Any] = {
        "claim": job.claim,
        "slug": job.claim.split("/", 1)[0],
        "point": job.point,
        "index": job.index,
        "decides": job.decides,
        "scale": job.scale,
        "metric": claim.metric,
        "paper_value": claim.value,
        "paper_unit": claim.unit,
        "paper_baseline": claim.baseline_value,
        "higher_is_better": claim.higher_is_better,
        "form": claim.form,
        "quantity": claim.quantity,
        "tolerance": experiment.tolerance,
        "operator": experiment.operator.name,
        "free_label": experiment.operator.free,
        "exact_label": experiment.operator.exact,
        "measured_here": experiment.measured_here,
        "computed": experiment.computed,
        "departures": dict(experiment.departures),
        "refuted_if": experiment.refuted_if,
        "needs": outcome.needs,
        "details": details,
        "fingerprint": outcome.place.fingerprint,
        "machine": outcome.place.machine | ({"threads": threads} if threads else {}),
        "assay_version": outcome.place.assay_version,
        "commit": outcome.place.commit,
        "seed": job.seed,
        "command": command or f"assay verify {job.claim.split('/', 1)[0]} --scale {job.scale}",
        "seconds": outcome.seconds,
        "created": datetime.now(UTC),
    }
    problem = outcome.error if outcome.status != "ok" else _problem(seen, claim)
    if problem:
        return Evidence(**common, status=outcome.status if outcome.status != "ok" else "failed", error=plain(problem))
    if seen.get("kind") == "trial":
        seen |= {"measured": in_claims_unit(Estimate(**seen["ratios"]["baseline"]), claim), "unit": claim.unit}
        if experiment.operator.free and "free" not in seen["ratios"]:  # the paper's baseline is the free one
            seen["ratios"] = {**seen["ratios"], "free": seen["ratios"]["baseline"]}
    try:
        record = Evidence(**common, **seen, status="ok")
        if experiment.refutes is not None and not record.needs:
            record = changed(record, refuted=bool(experiment.refutes(record.model_dump(mode="json"))))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        return Evidence(
            **common, status="failed", error=f"the experiment's result is not valid: {where}: {first['msg']}"
        )
    if why := misfit(record):
        return Evidence(**common, status="failed", error=f"the experiment's result is not valid: {why}")
    return record


def in_claims_unit(speedup: Estimate, claim: ClaimFacts) -> Estimate:
    """A ratio of times (baseline's over the candidate's) in the claim's own form, unit and direction.

    >>> from assay.catalogue import get_claim
    >>> ratio = Estimate(median=2.0, low=1.6, high=2.5)
    >>> in_claims_unit(ratio, get_claim("pie_positional_integrity/kv-update-overhead")).median  # per cent of time saved
    50.0
    """

    def turned(ratio: float) -> float:
        if claim.form == "saved":
            return 100 * (1 - 1 / ratio)
        if claim.form == "added":
            return 100 * (ratio - 1)
        return ratio if claim.higher_is_better else 1 / ratio

    low, median, high = sorted(turned(ratio) for ratio in (speedup.low, speedup.median, speedup.high))
    return Estimate(median=median, low=low, high=high)


def _problem(seen: dict[str, Any], claim: ClaimFacts) -> str:
    """What is wrong with what an experiment returned: it measures another thing than the claim, or in another unit."""
    if seen.get("kind") == "trial":
        if claim.quantity != "time":
            return f"the experiment times something, but the claim is about {claim.quantity or 'something else'}"
        if claim.form not in ("ratio", "saved", "added", "bound"):
            return f"the experiment times something, but the claim has the form {claim.form!r}"
    if seen.get("kind") == "figure":
        if claim.quantity == "time":
            return "the claim is about time, but the experiment times nothing in pairs: it must return a Trial"
        if claim.unit and unit_name(seen["unit"]) != unit_name(claim.unit):
            return f"the experiment reports a figure in {seen['unit']!r}, but the claim is in {claim.unit!r}"
        controls = {"deleted", "random"} & set(seen["controls"]) or seen["quality"] or seen.get("computed")
        if claim.quantity == "quality" and not controls:
            return (
                "the claim is about a quality, but the experiment has no controls: the method deleted, a random choice"
            )
    return ""
