"""Assessing a recipe: what the goal's work costs with it on the whole model, and what quality it keeps, each in a child process."""

from __future__ import annotations

import contextlib
import dataclasses
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from assay.errors import AssayError
from assay.measure.isolate import ChildResult
from assay.measure.stats import paired_ratio
from assay.tuner import budget
from assay.tuner.artefact import held_steps
from assay.tuner.budget import LEAST_PAIRS
from assay.tuner.nodes import Call
from assay.tuner.outcome import Row, drop_of
from assay.tuner.recipe import Recipe, Step
from assay.tuner.run import Run
from assay.tuner.search import Option
from assay.tuner.work import UNITS


def expected(run: Run, ratio: float = 1.0) -> float:
    """Seconds that assessing a candidate will take which takes `ratio` of the base's time.

    That is as long as the others took (their median), and longer by what its slower runs add; the first one, what the costs tell.
    """
    one = None if run.settings.goal == "memory" else ratio * run.base.run_seconds  # a run there is a whole process
    alone = run.budget.assessing(one)
    others = [row.seconds + max(alone - run.budget.assessing(row.run_seconds), 0.0) for row in run.candidates]
    return float(np.median(others)) if others else alone


def within(run: Run) -> list[Row]:
    """The candidates that keep the quality."""
    return [row for row in run.candidates if row.drop is not None and row.drop <= run.max_drop and row.cost is not None]


def promised(run: Run) -> float:
    """The best candidate's time over the base's, as far as screening tells."""
    return min([1.0, *(found.ratio for found in run.screened)])


def reserve(run: Run, pairs: int) -> float:
    """Seconds to keep for a proof of `pairs` rounds and the artefact."""
    costs = run.budget.costs
    if run.settings.goal == "memory":
        return run.budget.tail() + 3 * 3 * (costs.start + costs.load + costs.run)
    best = min((row.run_seconds for row in within(run)), default=promised(run) * costs.run)
    free = run.free.run_seconds if run.free is not run.baseline else 0.0
    return run.budget.tail() + run.budget.proof(pairs, (0.0 if costs.slow else costs.loaded_run) + free + best)


@dataclass(frozen=True)
class Asked:
    """A recipe to assess."""

    kind: str  # of its row
    steps: tuple[Step, ...]
    options: tuple[Option, ...] = ()
    predicted: float | None = None
    screened: float | None = None
    ratio: float = 1.0  # its time over the base's, as far as is known before


def assess_one(run: Run, asked: Asked) -> Row:
    """The row of one recipe (see `assess`)."""
    return next(iter(assess(run, [asked])))[1]


def assess(run: Run, asked: list[Asked]) -> Iterator[tuple[int, Row]]:
    """Cost and quality of recipes, on as many machines as there are; yields (number of the recipe, row) as results arrive."""
    keys = [f"{one.kind}:{run.recipe(one.steps).key()}" for one in asked]
    waiting = [number for number, key in enumerate(keys) if key not in run.journal.old]
    for number, key in enumerate(keys):
        if number not in waiting:
            yield number, _row(run, asked[number], run.journal.old[key])
    if not waiting:
        return
    labels = ", ".join(run.recipe(asked[number].steps).label() for number in waiting)
    with run.telling(f"assessing {labels}"):
        for which, result in run.nodes.run([_assess_call(run, asked[number]) for number in waiting]):
            number = waiting[which]
            found = _assessed(run, asked[number], result)
            run.journal.add(keys[number], found)
            yield number, _row(run, asked[number], found)


def _assess_call(run: Run, asked: Asked) -> Call:
    """The child call that assesses a recipe. Time that the proof needs is not given to it, or little while nothing can be proven."""
    left, sizes = run.budget.left(), run.budget.sizes()
    if asked.kind != "baseline":
        longest = 0.0 if within(run) else min(2 * expected(run, asked.ratio), left - run.budget.tail())
        left = max(left - reserve(run, LEAST_PAIRS), longest)
    arguments: dict[str, Any] = {"known": run.known, "seconds": sizes.sampling, "text": sizes.text}
    if asked.kind == "candidate":
        arguments |= {"reference": run.baseline.quality, "max_drop": run.max_drop}
    if asked.kind != "baseline":
        arguments |= {"text": run.baseline.text, "least": 2}
    else:
        arguments["least"] = 1  # it is not chosen by its figure, and measured again in the proof
    if run.nodes.count > 1 and run.rows and run.settings.goal != "memory":
        arguments["base"] = run.base.recipe.model_dump(mode="json")
    return run.call("assess", left, recipe=run.recipe(asked.steps).model_dump(mode="json"), **arguments)


def _assessed(run: Run, asked: Asked, result: ChildResult) -> dict[str, Any]:
    """The journal's value: what a child found, with its status. For the goal memory, the peaks are measured here."""
    found = dict(result.value) if result.status == "ok" else {}
    status, error, seconds = str(result.status), result.error, result.seconds
    if "misfit" in found:
        status, error = "failed", found["error"]
    if status == "ok" and run.settings.goal == "memory" and not found["equivalent"]:
        begin = budget.now()
        try:
            found["samples"] = peaks(run, run.recipe(asked.steps), 2)
            found["run_seconds"] = (budget.now() - begin) / 2
        except AssayError as failure:  # a row like that of any other that dies, not the end
            status, error = "failed", str(failure)
        seconds += budget.now() - begin
    return found | {"status": status, "error": error, "seconds": seconds}


def _row(run: Run, asked: Asked, found: dict[str, Any]) -> Row:
    """The row of an assessed recipe: reported and kept."""
    row = Row(asked.kind, run.recipe(asked.steps), found["status"], predicted=asked.predicted, screened=asked.screened)
    row.seconds, row.error, row.misfit = found["seconds"], found["error"], found.get("misfit", "")
    row.options = [option.key for option in asked.options]
    reaching(run, row)
    if row.status == "ok":
        row.function, row.structure = found["function"], found["structure"]
        if found["equivalent"]:
            row.status = "equivalent"
        else:
            _fill(run, row, found)
    run.rows.append(row)
    run.tell(_line(run, row))
    return row


def _fill(run: Run, row: Row, found: dict[str, Any]) -> None:
    row.samples, row.quality, row.run_seconds = found["samples"], found["quality"], found["run_seconds"]
    row.paths, row.hopeless, row.text = found.get("paths", {}), "hopeless_at" in found, found.get("text", 1.0)
    row.cost = float(np.median(row.samples))
    if (
        found.get("paired") and run.base.cost is not None
    ):  # on another machine of the cluster, where the base was measured too
        row.cost = run.base.cost / paired_ratio(found["paired"], row.samples).median
    entry = run.known.setdefault(row.function, {"quality": row.quality, "structures": []})
    entry |= {"hopeless_at": found["hopeless_at"]} if row.hopeless else {}
    entry["structures"].append(row.structure)
    if row.kind != "candidate" and all(step.transform == "dtype" for step in row.recipe.steps):
        _correct(run, row, found)
    drop = drop_of(run.rows[0].quality if run.rows else row.quality, row.quality)
    row.drop, row.drop_low, row.drop_high = drop.median, None, None
    if drop.n > 1:  # a single window has no interval
        row.drop_low, row.drop_high = drop.low, drop.high


def _correct(run: Run, row: Row, found: dict[str, Any]) -> None:
    """Replace the survey's estimated costs by the measured ones: the machine may have become busier since."""
    costs = run.budget.costs
    if run.settings.goal == "memory":  # there, a run is its own process
        run.budget.costs = dataclasses.replace(costs, start=0.0, load=row.run_seconds, run=0.0, loaded_run=0.0)
        return
    quality = found.get("quality_seconds", 0.0) / max(row.text, 1e-9)
    load = row.seconds - found.get("quality_seconds", 0.0) - (len(row.samples) + 1) * row.run_seconds
    slower = max(load / max(costs.start + costs.load, 1e-9), 1.0)
    costs = dataclasses.replace(
        costs, start=slower * costs.start, load=slower * costs.load, quality=max(costs.quality, quality)
    )
    if row.run_seconds > 0 and not row.recipe.steps:
        costs = dataclasses.replace(costs, loaded_run=row.run_seconds)
    if row.run_seconds > 0 and row.recipe.steps == base_steps(run.survey):
        costs = dataclasses.replace(costs, run=row.run_seconds)
    run.budget.costs = costs


def dtypes(survey: dict[str, Any]) -> list[tuple[Step, ...]]:
    """The dtypes worth trying, as recipes: the machine's fastest, and both alternatives for float16, which is slow on CPUs."""
    wanted = [survey["dtype"]]
    if survey["stored"] == "float16":
        wanted += [name for name in ("float32", "bfloat16") if name not in wanted]
    return [() if n == survey["stored"] else (Step(transform="dtype", config={"dtype": n}),) for n in wanted]


def base_steps(survey: dict[str, Any]) -> tuple[Step, ...]:
    """The recipe that all candidates build on."""
    return dtypes(survey)[0]


def reaching(run: Run, row: Row) -> Row:
    """Record how much of their targets the row's transforms reach in this model, as their `Fit` says."""
    for option in run.survey["options"]:
        if any(step.transform == option["transform"] for step in row.recipe.steps):
            row.reached[option["transform"]] = {"share": option.get("share", 1.0), "reached": option.get("reached", "")}
    return row


def _line(run: Run, row: Row) -> str:
    """A row in words: its figure, its ratio to the base, and what it loses."""
    label = f"{row.label()} ({row.kind})" if row.kind != "candidate" else row.label()
    if row.status == "equivalent":
        return f"{label}: computes the same as one before, in the same way"
    if row.status != "ok" or row.cost is None:
        return f"{label}: {row.status}: {row.error}"
    unit = UNITS[run.settings.goal]
    text = f"{label}: {unit.show(row.cost):,.1f} {unit.name}"
    if row is not run.baseline and run.baseline.cost:
        text += f", {run.baseline.cost / row.cost:.2f}x as loaded"
        if row.kind == "candidate" and run.base.cost:
            text += f", {run.base.cost / row.cost:.2f}x the base"
        text += f", perplexity {100 * (row.drop or 0.0):+.2f} %"
        text += " on a part of the text, which is too much" if row.hopeless else ""
    partly = [f"{name} reaches {100 * fit['share']:.0f} %" for name, fit in row.reached.items() if fit["share"] < 1]
    return ", ".join([text, *partly])


def peaks(run: Run, recipe: Recipe, times: int) -> list[float]:
    """Peak bytes of processes that load what the recipe's artefact stores, apply the remaining steps and do the work."""
    with contextlib.ExitStack() as stack:
        own = dataclasses.asdict(run.settings)
        if steps := held_steps(recipe):
            parent, prefix = run.output.parent, f".{run.output.name}."
            folder = stack.enter_context(tempfile.TemporaryDirectory(dir=parent, prefix=prefix))
            own |= {"model": str(Path(folder) / "model")}
            run.must("store", "storing", recipe=recipe.before(steps).model_dump(mode="json"), folder=own["model"])
        document = recipe.after(steps).model_dump(mode="json")
        found = [run.child("once", run.budget.left(), settings=own, recipe=document) for _ in range(times)]
    for result in found:
        if result.status != "ok":
            reason = f"{result.status} {result.error}".strip()
            raise AssayError(f"measuring the memory of {recipe.label()} did not work: {reason}")
    return [float(result.peak_rss_bytes) for result in found]
