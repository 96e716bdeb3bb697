"""`tune`: survey, baselines, search, proof, artefact. Every trial runs in a child process and is journalled as it ends."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import filelock
import numpy as np
import torch

from assay.errors import AssayError, InputError, MissingError
from assay.measure.isolate import ChildResult, run_isolated
from assay.measure.stats import paired_ratio
from assay.tuner.outcome import Outcome, Row, base_row, drop_of
from assay.tuner.recipe import Recipe, Step
from assay.tuner.search import Kind, Option, Search, option_from
from assay.tuner.work import Settings

Say = Callable[[str], None]


class Journal:
    """One JSON line a finished trial, synced to disk before the next begins; `--resume` reads it back."""

    def __init__(self, path: Path, settings: Settings, resume: bool):
        self.path, self.old = path, {}  # type: Path, dict[str, dict[str, Any]]
        head = {"settings": dataclasses.asdict(settings)}
        if resume and path.exists():
            lines = [line for line in (_line(text) for text in path.read_text(encoding="utf-8").splitlines()) if line]
            if lines and lines[0] != head:
                raise InputError(f"{path} was begun with other settings; leave out --resume to start anew")
            self.old = {line["key"]: line["value"] for line in lines[1:] if "key" in line}
            whole = "".join(json.dumps(line) + "\n" for line in ([head, *lines[1:]]))
            path.write_text(whole, encoding="utf-8")  # a line cut short by a crash is dropped
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(head) + "\n", encoding="utf-8")

    def get(self, key: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The journalled value of `key`, or `make()`, journalled."""
        if key in self.old:
            return self.old[key]
        value = make()
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"key": key, "value": value}) + "\n")
            file.flush()
            os.fsync(file.fileno())
        return value


def _line(text: str) -> dict[str, Any] | None:
    try:
        found = json.loads(text)
    except json.JSONDecodeError:
        return None
    return found if isinstance(found, dict) else None


def tune(
    settings: Settings,
    output: Path,
    *,
    max_drop: float = 0.01,
    minutes: float = 10.0,
    resume: bool = False,
    memory_gib: float | None = None,
    say: Say = lambda text: None,
) -> Outcome:
    """Find, prove and save a cheaper version of a model.

    `max_drop` is the relative perplexity increase allowed (0.01 = 1 %), `minutes` the time for everything, `memory_gib` the
    limit of one trial (default: 80 % of the machine's memory). The artefact is written to `output`, whole or not at all; until
    then the journal beside it holds every finished trial.

    Raises InputError for settings that make no sense, a model that cannot be read, or an output folder that holds something
    else; MissingError when the goal needs a counter the machine lacks.
    """
    from assay.tuner.artefact import check_output
    from assay.workloads.models import find_model

    if not 0 <= max_drop < 1:
        raise InputError(f"--max-drop must lie in [0, 1), got {max_drop}")
    if not minutes > 0:
        raise InputError(f"--minutes must be positive, got {minutes}")
    check_output(output)
    find_model(settings.model, settings.allow_download)  # before the machine is calibrated
    output.parent.mkdir(parents=True, exist_ok=True)
    with _only_writer(output):
        return _tune(settings, output, max_drop, minutes, resume, memory_gib, say)


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


def _tune(
    settings: Settings,
    output: Path,
    max_drop: float,
    minutes: float,
    resume: bool,
    memory_gib: float | None,
    say: Say,
) -> Outcome:
    from assay.measure.machine import calibrate, machine
    from assay.tuner.artefact import save

    began = time.monotonic()
    deadline = began + minutes * 60
    here = machine()
    limit = int((memory_gib * 2**30) if memory_gib else 0.8 * here.ram_bytes)
    journal = Journal(output.parent / f".{output.name}.journal.jsonl", settings, resume)
    plain = dataclasses.asdict(settings)

    def child(function: str, timeout: float, **arguments: Any) -> ChildResult:
        return run_isolated(
            f"assay.tuner.trial:{function}",
            {"settings": plain, **arguments},
            timeout_s=max(timeout, 20.0),
            memory_bytes=limit,
        )

    def must(function: str, **arguments: Any) -> dict[str, Any]:
        """A step nothing can go on without: the deadline does not cut it, its failure ends the run."""
        result = child(function, max(600.0, minutes * 60), **arguments)
        if result.status != "ok":
            raise _failure(result, function, settings)
        return dict(result.value)

    say("calibrating the machine")
    limits = calibrate()
    products = limits.matmul_flops
    fast = "bfloat16" if products.get("bfloat16", 0) > 1.1 * products["float32"] else None
    say("looking where the time goes")
    survey = journal.get("survey", lambda: must("survey", dtype=fast))

    def peaks(recipe: Recipe, times: int, until: float) -> list[float]:
        """Peak bytes of processes that load what the recipe's artefact would store, apply the rest and do the work."""
        with contextlib.ExitStack() as stack:
            own = plain
            if recipe.steps and recipe.steps[0].transform == "dtype":
                folder = stack.enter_context(tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}."))
                own = plain | {"model": str(Path(folder) / "model")}
                must("cast", dtype=recipe.steps[0].config["dtype"], folder=own["model"])
            document = recipe.model_dump(mode="json")
            found = [child("once", until - time.monotonic(), settings=own, recipe=document) for _ in range(times)]
        for result in found:
            if result.status != "ok":
                reason = f"{result.status} {result.error}".strip()
                raise AssayError(f"measuring the memory of {recipe.label()} did not work: {reason}")
        return [float(result.peak_rss_bytes) for result in found]

    rows: list[Row] = []
    known: dict[str, dict[str, Any]] = {}

    def trial(
        kind: str, steps: tuple[Step, ...], options: list[str] | None = None, predicted: float | None = None
    ) -> Row:
        recipe = Recipe(
            architecture=survey["architecture"],
            goal=settings.goal,
            prompt_tokens=settings.prompt_tokens,
            new_tokens=settings.new_tokens,
            steps=steps,
        )
        say(f"trial {len(rows) + 1}: {recipe.label()}")

        def run() -> dict[str, Any]:
            begin = time.monotonic()
            left = max(deadline - begin, rows[0].seconds) if kind == "candidate" else 600.0
            result = child(
                "measure", left, recipe=recipe.model_dump(mode="json"), known=known, seconds=minutes * 60 * 0.03
            )
            found = dict(result.value) if result.status == "ok" else {}
            status, error = result.status, result.error
            if "misfit" in found:
                status, error = "failed", found["error"]
            if status == "ok" and settings.goal == "memory" and not found["equivalent"]:
                try:
                    found["samples"] = peaks(recipe, 2, begin + left)
                    found["run_seconds"] = (time.monotonic() - begin - result.seconds) / 2
                except AssayError as failure:  # a row like that of any other trial that dies, not the end
                    status, error = "failed", str(failure)
            found |= {"status": status, "error": error, "seconds": time.monotonic() - begin}
            return found

        found = journal.get(f"{kind}:{recipe.key()}", run)
        row = Row(kind, recipe, found["status"], predicted=predicted, seconds=found["seconds"], error=found["error"])
        row.options, row.misfit = options or [], found.get("misfit", "")
        if row.status == "ok":
            row.function, row.structure = found["function"], found["structure"]
            if found["equivalent"]:
                row.status = "equivalent"
            else:
                row.samples, row.quality, row.run_seconds = found["samples"], found["quality"], found["run_seconds"]
                row.cost = float(np.median(row.samples))
                entry = known.setdefault(row.function, {"quality": row.quality, "structures": []})
                entry["structures"].append(row.structure)
                first = rows[0] if rows else row
                drop = drop_of(first.quality, row.quality)
                row.drop, row.drop_low, row.drop_high = drop.median, drop.low, drop.high
        rows.append(row)
        return row

    baseline = trial("baseline", ())
    if baseline.status != "ok":
        raise _failure(ChildResult(**_child_fields(baseline)), "measure", settings)
    for steps in free_recipes(survey, settings, fast):
        if time.monotonic() < deadline - 0.35 * minutes * 60 or len(rows) < 2:
            trial("free", steps)
    free = min((r for r in rows if r.status == "ok"), key=lambda r: r.cost or float("inf"))
    base = base_row(rows) or baseline

    search = make_search(survey, limits, max_drop, peak_bytes=base.cost if settings.goal == "memory" else None)
    for row in rows:
        if options := _options_over(base, row, search.options):
            judge(search, row, options, base)
    for row, options in _search(search, base, trial, deadline, lambda: _final_seconds(rows, free, settings.goal)):
        judge(search, row, options, base)
    good = [
        r for r in rows if r.status == "ok" and r.drop is not None and (r.drop <= max_drop or r.kind != "candidate")
    ]
    best = min(good, key=lambda r: r.cost or float("inf"))

    def prove(chosen: Row) -> dict[str, Any]:
        recipes = {"baseline": baseline.recipe, "free": free.recipe, "best": chosen.recipe}
        documents = {name: recipe.model_dump(mode="json") for name, recipe in recipes.items()}
        if settings.goal == "memory":
            load = os.getloadavg()[0]
            samples = {name: peaks(recipe, 3, deadline + 600) for name, recipe in recipes.items()}
            quality = {"baseline": baseline.quality, "free": free.quality, "best": chosen.quality}
            return {"samples": samples, "quality": quality, "load_before": load, "load_after": os.getloadavg()[0]}
        left = max(deadline - time.monotonic() - 30, 30.0)
        found = must("final", recipes=documents, judge=["best"], pairs=11, seconds=left)
        found["quality"] |= {
            "baseline": baseline.quality,
            "free": free.quality,
        }  # the same text, judged in their own trials
        return found

    say(f"proving: {best.label()} against both baselines, interleaved in one process")
    final = journal.get(f"final:{best.recipe.key()}", lambda: prove(best))
    helped = best.kind == "candidate" and paired_ratio(final["samples"]["free"], final["samples"]["best"]).low > 1
    if best.kind == "candidate" and drop_of(final["quality"]["baseline"], final["quality"]["best"]).median > max_drop:
        helped = False
    if not helped and best is not free:
        say("nothing beats the free baseline for certain; it is what will be saved")
        best = free
        final = {**final, "samples": {**final["samples"], "best": final["samples"]["free"]}}
        final["quality"] = {**final["quality"], "best": final["quality"]["free"]}
    after = journal.get(
        f"waterline:{best.recipe.key()}", lambda: must("waterline", recipe=best.recipe.model_dump(mode="json"))
    )
    outcome = Outcome(
        settings,
        max_drop,
        rows,
        survey,
        best,
        free,
        baseline,
        final,
        helped,
        output,
        time.monotonic() - began,
        here.describe(),
    )
    say("writing the artefact")
    save(outcome, after, limits)
    journal.path.unlink(missing_ok=True)
    return outcome


def free_recipes(survey: dict[str, Any], settings: Settings, fast: str | None) -> Iterator[tuple[Step, ...]]:
    """What a user gets at no loss from torch and transformers alone: the faster dtype, compilation, sorted batches."""
    there = {option["transform"] for option in survey["options"]} | {"dtype"}
    dtype = dtype_steps(fast)
    if dtype:
        yield dtype
    if settings.goal == "throughput" and "sorted_batches" in there:
        yield (*dtype, *steps_of(survey, "sorted_batches"))
    if "compile" in there and settings.goal != "memory":
        yield (*dtype, *steps_of(survey, "compile"))


def dtype_steps(fast: str | None) -> tuple[Step, ...]:
    """The recipe of the faster dtype; empty when the machine has none."""
    return (Step(transform="dtype", config={"dtype": fast}),) if fast else ()


def steps_of(survey: dict[str, Any], name: str) -> tuple[Step, ...]:
    """The first configuration of a transform in the survey, as a recipe of one step."""
    found = next(option for option in survey["options"] if option["transform"] == name)
    return (Step(transform=name, config=found["config"]),)


def make_search(survey: dict[str, Any], limits: Any, max_drop: float, peak_bytes: float | None = None) -> Search:
    """The search over everything the survey found to fit, on top of the faster dtype.

    For the goal memory `peak_bytes` is the base's peak: what counts is then how small the weights get, the rest stays.
    """
    options = [option_from(document) for document in survey["options"] if document["transform"] != "dtype"]
    dtype = survey["dtype"]
    kinds = {name: Kind(kind["seconds"], kind["macs"], kind["bytes"], dtype) for name, kind in survey["kinds"].items()}
    if peak_bytes is not None:
        weights = min(float(survey["parameters"] * getattr(torch, dtype).itemsize), peak_bytes)
        kinds = {"linear": Kind(weights, 0.0, weights, dtype), "rest": Kind(peak_bytes - weights, 0.0, 0.0, dtype)}
    return Search(options, kinds, dict(limits.matmul_flops), limits.read_bandwidth, max_drop)


def judge(search: Search, row: Row, options: tuple[Option, ...], base: Row) -> None:
    """Tell the search what came out of a trial."""
    if row.status == "equivalent":
        search.skip(options)
    elif row.status != "ok" or row.cost is None or base.cost is None:
        search.fail(options, row.misfit)
    else:
        search.learn(options, row.cost / base.cost, row.drop if row.drop is not None else float("inf"))


def _search(
    search: Search,
    base: Row,
    trial: Callable[..., Row],
    deadline: float,
    reserve: Callable[[], float],
) -> Iterator[tuple[Row, tuple[Option, ...]]]:
    """Candidates while there is time for one more and the proof; one is tried in any case, for a run without says nothing."""
    longest: float | None = None
    while (options := search.next()) is not None:
        if longest is not None and time.monotonic() + longest > deadline - reserve():
            return
        predicted = search.roofline(options)
        steps = sorted([*base.recipe.steps, *(o.step for o in options)], key=_slot_order)
        row = trial("candidate", tuple(steps), [o.key for o in options], predicted)
        longest = max((longest or 0.0) * 0.7, row.seconds)
        yield row, options


def _options_over(base: Row, row: Row, options: list[Option]) -> tuple[Option, ...]:
    """What a row added to the base's recipe; empty when it is not the base and options on top of it."""
    if any(step not in row.recipe.steps for step in base.recipe.steps):
        return ()
    added = [step for step in row.recipe.steps if step not in base.recipe.steps]
    found = tuple(option for option in options if option.step in added)
    return found if len(found) == len(added) else ()


def _slot_order(step: Step) -> int:
    from assay.methods.transform import SLOTS
    from assay.tuner.transforms import get_transform

    return SLOTS.index(get_transform(step.transform).slot)


def _final_seconds(rows: list[Row], free: Row, goal: str) -> float:
    """Time to keep for the proof: loading three models again, a warm-up and six rounds (memory: three) of each, the report."""
    first = rows[0]
    overhead = 0.5 * sum(row.seconds - row.run_seconds * len(row.samples) for row in (first, free))
    return 20.0 + overhead + (3 if goal == "memory" else 7) * (first.run_seconds + 1.2 * free.run_seconds)


def _failure(result: ChildResult, function: str, settings: Settings) -> AssayError:
    """The error of a child that nothing can go on without, as the user's."""
    error = result.error or result.status
    if error.startswith("InputError: "):
        return InputError(error.removeprefix("InputError: "))
    if error.startswith("MissingError: "):
        return MissingError(error.removeprefix("MissingError: "))
    if result.status == "out of memory":
        return InputError(f"{settings.model} does not fit into the memory of one trial: {error}; see --memory-gib")
    return AssayError(f"{function} of {settings.model} ended with {result.status}: {error}")


def _child_fields(row: Row) -> dict[str, Any]:
    return {
        "status": row.status,
        "value": None,
        "error": row.error,
        "seconds": row.seconds,
        "peak_rss_bytes": 0,
        "cpu_seconds": 0.0,
    }
