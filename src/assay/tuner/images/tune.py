"""`tune_images` finds, proves and saves a cheaper version of an image classifier.

1. Survey: what the model is, what a run costs, which options fit.
2. Search: each option is timed in turns with what has been kept so far, in a process of its own. Free ones are kept where they are
   faster for certain; what they make together is the free baseline. Then come those that may lose something: kept where they are
   faster for certain and lose no more on the search's pictures than is allowed.
3. Proof: the best recipe is judged on pictures that the search did not see, then timed with both baselines, in turns, in one process.
4. Artefact: the model with its recipe and report, completely or not at all.

Quality is accuracy where the folder's classes are the model's, else how often a model says the same as the one as loaded. The bad end of
the interval must lie within `max_drop`. A time covers decoding and preprocessing too: that is what a user waits for.
"""

from __future__ import annotations

import contextlib
import math
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import filelock
import numpy as np

from assay import checks
from assay.errors import AssayError, InputError, MissingError
from assay.measure.isolate import ChildResult, run_isolated
from assay.measure.stats import Interval, paired_ratio, positive_median
from assay.tuner.budget import LEAST_PAIRS, Budget
from assay.tuner.images.options import OPTIONS
from assay.tuner.images.recipe import ImageRecipe, ImageStep
from assay.tuner.images.work import TOGETHER, UNITS, Settings, scores
from assay.tuner.journal import Journal, model_hash
from assay.tuner.noninferiority import score_interval
from assay.tuner.outcome import finite

Say = Callable[[str], None]

ALPHA = 0.025  # of accepting a candidate whose true loss is at the limit
PAIRS = 15  # rounds of the proof, if there is time
ASSESSING = 0.06  # share of the time that one candidate may be timed for
LEAST_TIMING = 2.0  # seconds of the proof's rounds, also when the time is over
SLOWER = 5.0  # times as long as expected: what the two steps that cannot be left out may take
LESS = 0.98  # of the peak memory: what counts as less, between processes that differ by about a hundredth
CONFLICTS = {"int8_convolutions": ("compile",)}  # a step, and what leaves the recipe for it
PEAKS = 3  # processes a peak is taken from


@dataclass
class Row:
    """A recipe that was tried: its cost (less is better), the loss on the search's pictures, and whether it was kept."""

    kind: str  # "baseline" | "free" | "candidate"
    recipe: ImageRecipe
    status: str = "ok"
    samples: list[float] = field(default_factory=list)
    ratio: dict[str, float] | None = None  # over what it was built on
    lost: float | None = None  # of the search's pictures, as a share
    kept: bool = False
    error: str = ""

    @property
    def cost(self) -> float | None:
        return float(np.median(self.samples)) if self.samples else None

    def document(self) -> dict[str, Any]:
        return {
            "kind": self.kind, "label": self.recipe.label(), "words": self.recipe.words(), "status": self.status, "cost": self.cost,
            "samples": self.samples, "ratio": self.ratio, "lost": self.lost, "kept": self.kept, "error": self.error,
            "recipe": [step.model_dump() for step in self.recipe.steps],
        }  # fmt: skip


@dataclass
class Run:
    """What the steps share."""

    settings: Settings
    output: Path
    max_drop: float
    budget: Budget
    journal: Journal
    memory: int | None
    say: Say
    survey: dict[str, Any] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def tell(self, text: str) -> None:
        self.say(f"[{self.budget.text()}] {text}")

    def note(self, text: str) -> None:
        self.notes.append(text)
        self.tell(text)

    def child(self, function: str, limit: float, **arguments: Any) -> ChildResult:
        """Call a function of `assay.tuner.images.child` in a process of its own."""
        return run_isolated(
            f"assay.tuner.images.child:{function}", {"settings": self.settings.document(), **arguments},
            timeout_s=max(limit, 1.0), memory_bytes=self.memory,
        )  # fmt: skip

    def judging(self) -> float:
        """Seconds that judging is expected to take, by what the survey took: three models on the proof's pictures."""
        return float(self.survey["took"] + 3 * self.survey["proof"] * self.survey["seconds"])

    def reserve(self) -> float:
        """Seconds to keep for the proof: judging, and the least rounds of timing."""
        return self.judging() + float(self.survey["took"] + 3 * (3 + LEAST_PAIRS) * TOGETHER * self.survey["seconds"])

    def kept(self, key: str, function: str, limit: float, **arguments: Any) -> dict[str, Any]:
        """The same, from the journal if it is there; a failure is a value with its status and error."""

        def make() -> dict[str, Any]:
            found = self.child(function, limit, **arguments)
            if found.ok:
                return {**found.value, "status": "ok", "peak": found.peak_rss_bytes, "took": found.seconds}
            return {"status": found.status, "error": found.error}

        return self.journal.get(key, make)


def tune_images(
    settings: Settings,
    output: Path,
    *,
    max_drop: float = 0.01,
    minutes: float = 10.0,
    resume: bool = False,
    memory_gib: float | None = None,
    say: Say = lambda text: None,
) -> dict[str, Any]:
    """Find, prove and save a cheaper version of an image classifier; returns the JSON answer, which the report shows too.

    `max_drop` is the share of pictures that may be lost (0.01: one in a hundred), the bad end of its interval decides. The artefact is
    written to `output`, completely or not at all; until then the journal beside it keeps what was measured, from which `resume` goes on.
    Raises InputError for settings that make no sense, a model or pictures that cannot be read, or an output that holds something else.
    """
    from assay.evidence.place import here
    from assay.tuner.artefact import check_output
    from assay.workloads.picture_folder import picture_folder

    _check(max_drop, minutes, memory_gib)
    check_output(output)
    say(f"looking at {settings.model} and {settings.workload}")
    budget, place = Budget(minutes), here()
    head = {
        "settings": settings.document(),
        "model": model_hash(Path(settings.model)),
        "workload": picture_folder(settings.workload).digest,
        "eval": "",
        "machine": f"{place.fingerprint} with {place.machine['threads']} threads",
        "assay": f"{place.assay_version} {place.commit}".strip(),
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    with _only_writer(output):
        journal = Journal(output.parent / f".{output.name}.journal.jsonl", head, resume, max_drop, say)
        memory = None if memory_gib is None else int(memory_gib * 2**30)
        run = Run(settings, output, max_drop, budget, journal, memory, say)
        if journal.taken:
            run.tell(f"going on with {journal.taken} measurements from {journal.path}")
        try:
            return _tune(run, place.machine)
        except KeyboardInterrupt:
            raise KeyboardInterrupt(f"{journal.count()} measurements are kept in {journal.path}") from None


def _tune(run: Run, machine: dict[str, Any]) -> dict[str, Any]:
    _survey(run)
    baseline = run.rows[0]
    free = _free(run, baseline)
    best = _lossy(run, free)
    document = _proof(run, baseline, free, best)
    return _save(run, document, machine)


def _check(max_drop: float, minutes: float, memory_gib: float | None) -> None:
    try:
        checks.number("--max-drop", max_drop, low=0, below=1)
        checks.number("--minutes", minutes, above=0, high=1e5)
        if memory_gib is not None:
            checks.number("--memory-gib", memory_gib, above=0, high=2**20)
    except (TypeError, ValueError) as error:
        raise InputError(str(error)) from None


@contextlib.contextmanager
def _only_writer(output: Path) -> Iterator[None]:
    """Hold the output's lock; raises InputError when another run has it."""
    lock = filelock.FileLock(output.parent / f".{output.name}.lock", timeout=0)
    try:
        lock.acquire()
    except filelock.Timeout:
        raise InputError(f"another run is writing {output}; wait for it, or choose another -o") from None
    try:
        yield
    finally:
        Path(lock.lock_file).unlink(missing_ok=True)
        lock.release()


# Survey --------------------------------------------------------------------------------------------------------------------


def _survey(run: Run) -> None:
    run.tell("looking at the model")
    found = run.kept("survey", "survey", run.budget.left(), seconds=ASSESSING * run.budget.total)
    if found["status"] != "ok":
        raise _failure(found, f"measuring {run.settings.model} as loaded")
    run.survey = found
    recipe = ImageRecipe(goal=run.settings.goal, architecture=found["architecture"])
    row = Row("baseline", recipe, samples=[found["seconds"]], lost=0.0, kept=True)
    if run.settings.goal == "memory":
        row.samples = _peaks(run, recipe)
    run.rows.append(row)
    kind = "accuracy" if found["labelled"] else "agreement with the model as loaded"
    run.tell(
        f"{found['architecture']}, {found['parameters']:,} parameters, {found['pictures']} pictures; quality is {kind}"
    )
    if not found["labelled"]:
        run.note(
            "the pictures' classes are not known, or not the model's: quality is how often a recipe says the same as the model as loaded"
        )


def _failure(found: dict[str, Any], what: str) -> AssayError:
    """A child's failure as the user's error where it is one."""
    error = found["error"] or found["status"]
    for kind in (InputError, MissingError):
        if error.startswith(f"{kind.__name__}: "):
            return kind(error.removeprefix(f"{kind.__name__}: "))
    return AssayError(f"{what} ended with {found['status']}: {error}")


# Search --------------------------------------------------------------------------------------------------------------------


def _free(run: Run, baseline: Row) -> Row:
    """What is free, put together step by step, each kept where it pays for certain."""
    current = baseline
    for option in OPTIONS.values():
        if option.free and option.name not in run.survey["unfit"]:
            current = _step(run, "free", current, [ImageStep(option=option.name)]) or current
    return current


def _lossy(run: Run, free: Row) -> Row:
    """What may lose something on top of that, kept where it pays for certain and loses no more than is allowed on the search's pictures."""
    count = run.survey["proof"]
    if (least := score_interval([1.0] * count, [1.0] * count, ALPHA).high) > run.max_drop:
        run.note(
            f"{count} pictures of the proof cannot show a loss of at most {100 * run.max_drop:g} % even where none is lost (at most "
            f"{100 * least:.1f} %): options that may lose something were not tried; give more pictures, or a larger --max-drop"
        )
        return free
    current = free
    for option in OPTIONS.values():
        if not option.free and option.name not in run.survey["unfit"]:
            steps = [ImageStep(option=option.name, config=config) for config in option.configs()]
            current = _step(run, "candidate", current, steps) or current
    return current


def _step(run: Run, kind: str, current: Row, steps: list[ImageStep]) -> Row | None:
    """The best of some steps on top of `current`; None where none pays."""
    good: list[tuple[float, Row]] = []
    for step in steps:
        if run.budget.left() < run.reserve() + run.survey["took"] + ASSESSING * run.budget.total:
            run.note(f"no time was left to try {step.label()}")
            break
        row = _tried(run, kind, current, step)
        run.rows.append(row)
        if row.status != "ok" or row.ratio is None or row.lost is None:
            run.tell(f"{row.recipe.label()}: {row.status} {row.error}")
            continue
        run.tell(
            f"{row.recipe.label()}: {row.ratio['median']:.2f}x of {current.recipe.label()}, {100 * row.lost:.1f} % lost"
        )
        if row.ratio["low"] > 1 and row.lost <= (run.max_drop if kind == "candidate" else max(run.max_drop, 0.0)):
            good.append((row.ratio["median"], row))
    if not good:
        return None
    best = max(good, key=lambda one: one[0])[1]
    best.kept = True
    return best


def _tried(run: Run, kind: str, current: Row, step: ImageStep) -> Row:
    """A row of one more step."""
    gone = CONFLICTS.get(step.option, ())
    base = current.recipe.model_copy(update={"steps": tuple(s for s in current.recipe.steps if s.option not in gone)})
    recipe = base.with_step(step)
    row = Row(kind, recipe)
    if any(step.option in CONFLICTS.get(other.option, ()) for other in current.recipe.steps):
        row.status, row.error = "unfit", f"it does not go together with {current.recipe.label()}"
        return row
    limit = run.budget.left() - run.reserve()
    if run.settings.goal == "memory":
        found = run.kept(f"said:{recipe.key()}", "said", limit, recipe=recipe.model_dump(mode="json"))
        if found["status"] == "ok":
            row.samples = _peaks(run, recipe)
            before, after = current.samples, row.samples
            found["ratio"] = {
                "median": float(np.median(before) / np.median(after)), "low": LESS * min(before) / max(after),
                "high": max(before) / min(after),
            }  # fmt: skip
    else:
        found = run.kept(
            f"assess:{current.recipe.key()}:{recipe.key()}", "assess", limit, base=current.recipe.model_dump(mode="json"),
            recipe=recipe.model_dump(mode="json"), seconds=ASSESSING * run.budget.total,
        )  # fmt: skip
        row.samples = found.get("samples", [])
    if found["status"] != "ok":
        row.status, row.error = found["status"], found["error"]
        return row
    before_scores, after_scores = scores(run.survey["told"], found["told"], run.survey["right"])
    row.ratio, row.lost = found["ratio"], float(np.mean(before_scores) - np.mean(after_scores))
    return row


def _peaks(run: Run, recipe: ImageRecipe) -> list[float]:
    """Peaks of fresh processes in bytes. Raises AssayError where one dies."""
    found = []
    for number in range(PEAKS):
        one = run.kept(
            f"peak:{number}:{recipe.key()}", "once", run.budget.left(), recipe=recipe.model_dump(mode="json")
        )
        if one["status"] != "ok":
            raise _failure(one, f"measuring the memory of {recipe.label()}")
        found.append(float(one["peak"]))
    return found


# Proof ---------------------------------------------------------------------------------------------------------------------


def _proof(run: Run, baseline: Row, free: Row, best: Row) -> dict[str, Any]:
    """Judge and time what was found; the document of the answer, without where it was written."""
    rows = {"baseline": baseline, "free": free, "best": best}
    recipes = {name: row.recipe.model_dump(mode="json") for name, row in rows.items()}
    distinct = {name: recipes[name] for name in rows if _first(rows, name) == name}
    run.tell(f"judging {best.recipe.label()} on pictures that the search did not see")
    limit = max(
        run.budget.left(), SLOWER * run.judging()
    )  # it cannot be left out, and a busy machine is no reason to lose all
    key = ":".join(row.recipe.key() for row in rows.values())
    judged = run.kept(f"judge:{key}", "judge", limit, recipes=distinct)
    if judged["status"] != "ok":
        raise _failure(judged, "judging what was found")
    told = {name: judged["told"][_first(rows, name)] for name in rows}
    quality = {name: _quality(told["baseline"], told[name], judged["right"], run.max_drop) for name in rows}
    run.tell("timing it with both baselines, in turns")
    if run.settings.goal == "memory":
        timed: dict[str, Any] = {"samples": {name: rows[name].samples for name in rows}, "noisy": False, "trend": False}
    else:
        seconds = max(0.6 * run.budget.left(), LEAST_TIMING)
        limit = SLOWER * (run.reserve() + seconds)
        timed = run.kept(f"prove:{key}", "prove", limit, recipes=distinct, pairs=PAIRS, seconds=seconds)
        if timed["status"] != "ok":
            raise _failure(timed, "timing what was found")
        timed["samples"] = {name: timed["samples"][_first(rows, name)] for name in rows}
    if len(timed["samples"]["best"]) < LEAST_PAIRS and run.settings.goal != "memory":
        run.note(f"the proof has {len(timed['samples']['best'])} of at least {LEAST_PAIRS} rounds: the time was over")
    faster = _ratio(run, timed["samples"], "free", "best").low > 1
    helped = best is not free and quality["best"]["verdict"] == "holds" and faster
    saved = "best" if helped else "free" if quality["free"]["verdict"] != "lost" else "baseline"
    if not helped and best is not free:
        why = (
            "its loss was not shown to be small enough"
            if quality["best"]["verdict"] != "holds"
            else "it is not faster for certain"
        )
        run.note(f"{best.recipe.label()} is not saved: {why}")
    if saved == "baseline" and free is not baseline:
        run.note(f"what is free ({free.recipe.label()}) loses more than is allowed: the model as loaded is saved")
    samples = {**timed["samples"], "best": timed["samples"][saved]}
    return {
        "goal": run.settings.goal, "model": run.settings.model, "workload": run.settings.workload,
        "max_drop": run.max_drop, "helped": helped, "recipe": rows[saved].recipe.model_dump(mode="json"),
        "baseline": _level(run, baseline, samples["baseline"]), "free_baseline": _level(run, free, samples["free"]),
        "best": _level(run, rows[saved], samples["best"]),
        "speedup": _span(_ratio(run, samples, "baseline", "best")), "speedup_vs_free": _span(_ratio(run, samples, "free", "best")),
        "quality": quality[saved], "judged": {"label": best.recipe.label(), **quality["best"]}, "pairs": len(samples["best"]),
        "noisy": bool(timed["noisy"]), "trend": bool(timed["trend"]), "pictures": run.survey["pictures"], "unfit": run.survey["unfit"],
        "rows": [row.document() for row in run.rows],
    }  # fmt: skip


def _first(rows: dict[str, Row], name: str) -> str:
    return next(other for other in rows if rows[other] is rows[name])


def _quality(before: list[int], after: list[int], right: list[int] | None, limit: float) -> dict[str, Any]:
    """What is lost on the proof's pictures, with the interval whose bad end decides."""
    first, second = scores(before, after, right)
    found = score_interval(first, second, ALPHA)
    same = before == after
    verdict = "holds" if found.high <= limit or same else "lost" if found.low > limit else "undecided"
    return {
        "metric": "agreement with the model as loaded" if right is None else "accuracy", "pictures": len(after),
        "baseline": float(np.mean(first)), "candidate": float(np.mean(second)), "lost": found.median, "low": found.low, "high": found.high,
        "level": 1 - 2 * ALPHA, "verdict": verdict, "same": float(np.mean([a == b for a, b in zip(before, after, strict=True)])),
    }  # fmt: skip


def _ratio(run: Run, samples: dict[str, list[float]], over: str, label: str) -> Interval:
    """How many times less `label` costs than `over`."""
    before, after = samples[over], samples[label]
    if run.settings.goal != "memory":
        return paired_ratio(before, after)
    if before is after or before == after:
        return Interval(1.0, 1.0, 1.0, len(after))
    return Interval(
        float(np.median(before) / np.median(after)), min(before) / max(after), max(before) / min(after), len(after)
    )


def _level(run: Run, row: Row, samples: list[float]) -> dict[str, Any]:
    unit, cost = UNITS[run.settings.goal], positive_median(samples)
    low, high = sorted((unit.show(cost.low), unit.show(cost.high)))
    named = {"label": row.recipe.label(), "words": row.recipe.words(), "unit": unit.name}
    return {**named, "value": unit.show(cost.median), "low": low, "high": high}


def _span(found: Interval) -> dict[str, float]:
    return {"median": found.median, "low": found.low, "high": found.high}


# Artefact ------------------------------------------------------------------------------------------------------------------


def _save(run: Run, document: dict[str, Any], machine: dict[str, Any]) -> dict[str, Any]:
    """Write the artefact and add the run to the evidence store; the whole document."""
    from assay.evidence import tuned
    from assay.evidence.place import here
    from assay.tuner.artefact import remember
    from assay.tuner.images.artefact import save

    document |= {
        "notes": run.notes, "seconds": run.budget.spent(), "minutes": run.budget.minutes, "machine": machine,
        "artefact": str(run.output), "report": str(run.output / "report.html"), "command": " ".join(["assay", *sys.argv[1:]]),
        "commit": here().commit, "created": datetime.now(UTC).isoformat(timespec="seconds"), "load": os.getloadavg()[0],
        **tuned.code_of({step.option: step.of.module for row in run.rows for step in row.recipe.steps}),
    }  # fmt: skip
    document = {"kind": tuned.IMAGES, **{key: finite(value) for key, value in document.items()}}
    run.tell("writing the artefact")
    save(run.output, run.settings, ImageRecipe.model_validate(document["recipe"]), document)
    remember([document], run.output, run.note)
    run.journal.path.unlink(missing_ok=True)
    assert math.isfinite(document["best"]["value"])
    return document | {"notes": run.notes}
