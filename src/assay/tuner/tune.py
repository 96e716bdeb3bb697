"""`tune` finds, proves and saves a cheaper version of a model, in five steps.

1. Survey: what the machine can do, where the model's time goes, what things cost here, which transforms fit.
2. Baselines: the model as loaded, and what costs no quality: another dtype, sorted batches, compilation.
3. Search: candidates are *screened* (timed against the base on few layers, many of them in one process); the most promising are
   *assessed* (cost and quality of the whole model, one process each). Screened times only rank candidates; they are not results.
4. Proof: the best candidate is judged on text that the search did not see (`assay.tuner.noninferiority`), then timed
   against both baselines in one process, interleaved.
5. Artefact: the model with its recipe and report, completely or not at all.

The terms: an *option* is a transform with its configuration, a *recipe* an ordered list of them, a *candidate* a recipe that the
search considers, and a `Row` the line about a recipe that was assessed or failed. Everything is measured in child processes and
recorded in the journal as soon as it ends. The time limit is kept: the survey tells what things cost, and steps that cannot be
left out are made smaller (`assay.tuner.budget`).
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import filelock
import torch

from assay import checks
from assay.errors import InputError, MissingError
from assay.tuner.assessing import Asked, assess, assess_one, base_steps, dtypes, expected, promised, reserve, within
from assay.tuner.budget import LEAST_PAIRS, SURVEY, Budget, Costs
from assay.tuner.evaluation import check_eval
from assay.tuner.journal import Journal, identity
from assay.tuner.nodes import Here, Nodes, RayNodes
from assay.tuner.outcome import Outcome, Row
from assay.tuner.proof import judging, prove
from assay.tuner.recipe import Step
from assay.tuner.run import Run, over
from assay.tuner.screening import screen
from assay.tuner.search import Kind, Option, Search, option_from
from assay.tuner.work import Settings

Say = Callable[[str], None]

PAYS = 0.97  # compilation is measured on the whole model when screening sees it take less than that share of the time
JUDGED = 2  # candidates at least that its measurement must leave time for
PROFILE = 0.5  # share of the survey's time that its profiles may take


def tune(
    settings: Settings,
    output: Path,
    *,
    max_drop: float = 0.01,
    minutes: float = 10.0,
    resume: bool = False,
    memory_gib: float | None = None,
    ray: str | None = None,
    say: Say = lambda text: None,
) -> Outcome:
    """Find, prove and save a cheaper version of a model.

    `max_drop` is the relative perplexity increase allowed (0.01 = 1 %): the bad end of its interval must lie within it, on text
    that the search did not see. Where the settings have an `eval`, the loss of its score must lie within it too. `minutes` is the
    time for everything, `memory_gib` the limit of one child process (None: 80 % of the machine's memory), `ray` the address of a
    Ray cluster whose machines assess candidates side by side ("local" starts one). `say` is told what happens. The artefact is
    written to `output`, completely or not at all. Until then, the journal next to it holds every finished measurement; `resume`
    continues from it and measures again what failed.

    Raises InputError for settings that make no sense, a model that cannot be read, an output folder that holds something
    else, or a time too short to measure the model at all; MissingError when the goal needs a counter the machine lacks;
    KeyboardInterrupt on Ctrl-C, whose text says what is kept.
    """
    from assay.tuner.artefact import check_output

    _check(settings, max_drop, minutes, memory_gib)
    check_output(output)
    if settings.eval is not None:
        check_eval(settings.eval)
    if settings.goal == "energy" and ray is None:
        _check_energy()
    say(f"looking at {settings.model}")
    budget = Budget(minutes)
    head = identity(settings)  # before the machine is calibrated: raises when there is no such model
    output.parent.mkdir(parents=True, exist_ok=True)
    place: Nodes = RayNodes(ray, settings) if ray is not None else Here()
    with _only_writer(output), place as nodes:
        here = nodes.place
        head["machine"] = f"{here.fingerprint} with {here.machine['threads']} threads"
        journal = Journal(output.parent / f".{output.name}.journal.jsonl", head, resume, max_drop, say)
        memory = memory_gib * 2**30 if memory_gib is not None else 0.8 * here.machine["ram_bytes"]
        run = Run(settings, output, max_drop, budget, journal, nodes, int(memory), say)
        if journal.taken:
            run.tell(f"going on with {journal.taken} measurements from {journal.path}")
        for other in nodes.left_out:
            run.note(f"a machine of the cluster is left out: {other['reason']}")
        try:
            return _tune(run)
        except KeyboardInterrupt:
            journal.read_again()
            raise KeyboardInterrupt(f"{journal.count()} measurements are kept in {journal.path}") from None


def _tune(run: Run) -> Outcome:
    _survey(run)
    _baselines(run)
    best, final, helped = prove(run, _search(run))
    return _save(run, best, final, helped)


def _check(settings: Settings, max_drop: float, minutes: float, memory_gib: float | None) -> None:
    """Raise InputError naming the option, what is allowed and what was given."""
    try:
        for name in ("prompt_tokens", "new_tokens", "prompts"):
            checks.whole(f"--{name.replace('_', '-')}", getattr(settings, name), low=1, high=2**24)
        if memory_gib is not None:
            checks.number("--memory-gib", memory_gib, above=0, high=2**20)
    except (TypeError, ValueError) as error:
        raise InputError(str(error)) from None
    if isinstance(max_drop, bool) or not 0 <= max_drop < 1:
        raise InputError(f"--max-drop must lie in [0, 1), got {max_drop}")
    if isinstance(minutes, bool) or not 0 < minutes <= 1e5:
        raise InputError(f"--minutes must be positive and at most 100000, got {minutes}")


def _check_energy() -> None:
    from assay.measure.energy import why_not

    if reason := why_not():
        raise MissingError(f"{reason}; choose another --goal")


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


# Step 1: survey ------------------------------------------------------------------------------------------------------------


def _survey(run: Run) -> None:
    """What the machine can do and where the model's time goes; after this the run knows what things cost."""
    from assay.measure.machine import Calibration, calibrate, machine

    with run.telling("looking at the machine"):
        quick = run.budget.minutes < 5
        if run.nodes.local:
            run.limits, run.machine = calibrate(quick=quick, say=run.tell), machine().describe()
        else:
            found = run.must("calibration", "calibrating the machine", quick=quick)
            sizes = {int(size): rate for size, rate in found["limits"].pop("cache_bandwidth").items()}
            run.limits, run.machine = Calibration(**found["limits"], cache_bandwidth=sizes), found["machine"]
    products = run.limits.matmul_flops
    fast = "bfloat16" if products.get("bfloat16", 0) > 1.1 * products["float32"] else None
    with run.telling("looking where the time goes"):
        seconds = PROFILE * SURVEY * run.budget.total
        what = "looking where the time goes"
        run.survey = run.journal.get("survey", lambda: run.must("survey", what, dtype=fast, seconds=seconds))
    run.budget.costs = costs = Costs(**run.survey["costs"])
    run.tell(f"one run takes about {_seconds(costs.run)}, loading {_seconds(costs.start + costs.load)}")


# Step 2: baselines ---------------------------------------------------------------------------------------------------------


def _baselines(run: Run) -> None:
    """The model as loaded, which must work, and the free baselines that need no screening."""
    baseline = assess_one(run, Asked("baseline", ()))
    if baseline.status != "ok":
        raise run.failure(baseline.status, baseline.error, "measuring the model as loaded")
    if baseline.text < 1:
        run.note(f"quality is judged on {100 * baseline.text:.0f} % of the text, or the least, to keep the time")
    for steps in free_recipes(run.survey, run.settings):
        _assess_free(run, steps, reserve(run, 2))


def free_recipes(survey: dict[str, Any], settings: Settings) -> Iterator[tuple[Step, ...]]:
    """What a user gets from torch and transformers alone without losing quality, apart from compilation: another dtype, sorted batches."""
    yield from (steps for steps in dtypes(survey) if steps)
    if settings.goal == "throughput" and any(option["transform"] == "sorted_batches" for option in survey["options"]):
        yield (*base_steps(survey), *steps_of(survey, "sorted_batches"))


def steps_of(survey: dict[str, Any], name: str) -> tuple[Step, ...]:
    """A transform's first configuration in the survey, as a recipe of one step."""
    found = next(option for option in survey["options"] if option["transform"] == name)
    return (Step(transform=name, config=found["config"]),)


def _assess_free(run: Run, steps: tuple[Step, ...], keep: float) -> None:
    """Assess a free baseline, if that leaves the `keep` seconds that it takes to make use of it."""
    if run.budget.left() < expected(run) + keep:
        run.note(f"no time to measure {run.recipe(steps).label()} as a free baseline")
        return
    assess_one(run, Asked("free", steps))


# Step 3: search ------------------------------------------------------------------------------------------------------------


def _search(run: Run) -> list[Row]:
    """Screen many candidates, then assess the most promising while time remains for one more and the proof.

    Returns the rows that beat the free baseline, best first, whose loss on the search's text is within the limit by its median:
    the proof decides on text of its own.
    """
    search = make_search(run.survey, run.limits, run.max_drop, run.base.cost if run.settings.goal == "memory" else None)
    if run.settings.goal != "memory":
        screen(run, search)
        _compiled(run, search)
    for row in run.rows:
        if options := _options_over(run.base, row, search.options):
            teach(search, row, options, run.base)
    while asked := _next(run, search):
        if not _time_for_more(run, max(one.ratio for one in asked)):
            break
        for which, row in assess(run, asked):
            teach(search, row, asked[which].options, run.base)
    allowed = within(run)
    run.tell(
        f"{len(run.screened)} candidates screened, {len(run.candidates)} judged, {len(allowed)} within the allowed loss"
    )
    best_first = sorted(allowed, key=lambda row: row.cost or math.inf)
    return [row for row in best_first if (row.cost or math.inf) < (run.free.cost or math.inf)]


def make_search(survey: dict[str, Any], limits: Any, max_drop: float, peak_bytes: float | None = None) -> Search:
    """The search over everything the survey found to fit, on top of the dtype that candidates build on.

    For the goal memory, `peak_bytes` is the base's peak: what counts is how much smaller the weights get; the rest stays.
    """
    options = [option_from(document) for document in survey["options"] if document["transform"] != "dtype"]
    dtype, found = survey["dtype"], survey["base"]["kinds"]
    kinds = {name: Kind(kind["seconds"], kind["macs"], kind["bytes"], dtype) for name, kind in found.items()}
    if peak_bytes is not None:
        weights = min(float(survey["parameters"] * getattr(torch, dtype).itemsize), peak_bytes)
        kinds = {"linear": Kind(weights, 0.0, weights, dtype), "rest": Kind(peak_bytes - weights, 0.0, 0.0, dtype)}
    return Search(options, kinds, dict(limits.matmul_flops), limits.read_bandwidth, max_drop)


def teach(search: Search, row: Row, options: tuple[Option, ...], base: Row) -> None:
    """Tell the search what assessing a candidate found."""
    if row.status == "equivalent":
        search.skip(options)
    elif row.status != "ok" or row.cost is None or base.cost is None:
        search.fail(options, row.misfit)
    else:
        search.learn(options, row.cost / base.cost, row.drop if row.drop is not None else math.inf)


def _options_over(base: Row, row: Row, options: list[Option]) -> tuple[Option, ...]:
    """What a row added to the base's recipe; empty when it is not the base plus options."""
    if any(step not in row.recipe.steps for step in base.recipe.steps):
        return ()
    added = [step for step in row.recipe.steps if step not in base.recipe.steps]
    found = tuple(option for option in options if option.step in added)
    return found if len(found) == len(added) else ()


def _compiled(run: Run, search: Search) -> None:
    """Assess compilation, which is free too, on the whole model if screening says that it pays and candidates can still be judged."""
    option = next((o for o in search.options if o.step.transform == "compile"), None)
    if option is None:
        return
    steps = (*run.base.recipe.steps, option.step)
    ratio = search.ratios.get(frozenset([option.key]))
    if ratio is None or ratio <= PAYS:
        _assess_free(run, steps, JUDGED * expected(run, promised(run)) + reserve(run, LEAST_PAIRS))
    else:
        run.note(
            f"{option.step.label()} takes {ratio:.2f} of the base's time on few layers: not measured as a free baseline"
        )


def _next(run: Run, search: Search) -> list[Asked]:
    """The candidates to assess next, one per machine."""
    found: list[Asked] = []
    pending: list[frozenset[str]] = []
    while len(found) < run.nodes.count and (options := search.next()) is not None:
        keys = frozenset(option.key for option in options)
        pending.append(keys)
        search.tried.add(keys)  # it is on its way
        screened, steps = search.ratios.get(keys), over(run.base, options)
        found.append(Asked("candidate", steps, options, search.roofline(options), screened, search.predict(options)))
    search.tried -= set(pending)
    return found


def _time_for_more(run: Run, ratio: float) -> bool:
    """Whether there is time to assess one more candidate, which takes `ratio` of the base's time, and to prove the best.

    Before there is one that keeps the quality, the proof may become shorter.
    """
    left = run.budget.left() - expected(run, ratio) - judging(run)
    if left >= reserve(run, LEAST_PAIRS if within(run) else 2):
        return True
    if not run.candidates:
        run.note("no time is left to judge a candidate")
    return False


# Step 5: artefact ----------------------------------------------------------------------------------------------------------


def _save(run: Run, best: Row, final: dict[str, Any], helped: bool) -> Outcome:
    """Profile the result for the report and write the artefact; after that the journal is no longer needed."""
    from assay.tuner.artefact import save

    tokens = run.survey["profiled_tokens"]

    def profile() -> dict[str, Any]:
        grace = max(run.budget.left(), run.budget.tail(), 20.0)
        call = run.call("waterline", grace, recipe=best.recipe.model_dump(mode="json"), tokens=tokens)
        result = next(iter(run.nodes.run([call])))[1]
        if result.status != "ok":
            run.note(f"what was found could not be profiled: {result.status}: {result.error}")
            return {"kinds": {}, "waterline": [], "complete": False}
        return dict(result.value)

    with run.telling("profiling what was found"):
        after = run.journal.get(f"waterline:{best.recipe.key()}", profile)
    outcome = Outcome(
        run.settings,
        run.max_drop,
        run.rows,
        run.survey,
        best,
        run.free,
        run.baseline,
        final,
        helped,
        run.output,
        run.budget.spent(),
        run.machine,
        screened=run.screened,
        after=after,
        notes=run.notes,
        minutes=run.budget.minutes,
        nodes=[dict(run.nodes.place.machine, count=run.nodes.count), *run.nodes.left_out]
        if run.nodes.count > 1
        else [],
    )
    with run.telling("writing the artefact"), _no_bars():
        lines = save(outcome, after, run.limits)
    _remember(run, lines)
    run.journal.path.unlink(missing_ok=True)
    return outcome


def _remember(run: Run, lines: list[dict[str, Any]]) -> None:
    """Add the run to the evidence store."""
    from assay.tuner.artefact import remember

    remember(lines, run.output, run.note)


@contextlib.contextmanager
def _no_bars() -> Iterator[None]:
    """Without the progress bars that transformers shows while saving."""
    from transformers.utils import logging

    before = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if before:
            logging.enable_progress_bar()


def _seconds(value: float) -> str:
    return f"{value:.0f} s" if value >= 10 else f"{value:.1f} s" if value >= 0.1 else f"{1e3 * value:.1f} ms"
