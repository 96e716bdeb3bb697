"""The figures of a run of samples: pass@k over all tasks; eff@k, DPS and efficient@k over those that have references and inputs.

All of them are of the same costs. Scores are on the references and inputs that come with assay, over as many tasks as stand beside them:
they are no leaderboard's.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import assay.methods.code.coffe as coffe
import assay.methods.code.enamel as enamel
import assay.methods.code.evalperf as evalperf
from assay import checks
from assay.methods.core.programs.estimates import hodges_lehmann, interval, pass_at_k
from assay.methods.core.programs.runs import Costs, Run, Settings

NOISES = {
    "instructions": evalperf.NOISE,
    "hardware_instructions": evalperf.NOISE,
    "operations": 1_000.0,
    "cpu_seconds": 1e-4,
    "peak_bytes": 300_000.0,
}
"""Below what a cost is noise, in each meter's unit: the paper's for instructions, our choice for the others."""
TOLERANCES = {"cpu_seconds": 0.01}
"""How far beyond the time-out a cost may lie, as the paper allows seconds; none for meters that repeat exactly."""
UNSEEN = 1e-12
"""What a program that costs less than the meter sees is taken to cost: the least there is, and above 0."""


@dataclass(frozen=True)
class Figure:
    """A mean over tasks with its 95 % interval (tasks resampled; None for one task) and the number of tasks, the denominator."""

    name: str
    value: float
    low: float | None
    high: float | None
    tasks: int


@dataclass(frozen=True)
class Scored:
    """All figures, in the order to be read in; `left_out` says which k or task is in none of them, and why."""

    figures: tuple[Figure, ...]
    left_out: tuple[str, ...]


def score(runs: Sequence[Run], settings: Settings, ks: Sequence[int] = (1,)) -> Scored:
    """pass@k, eff@k, DPS and efficient@k of one run of samples.

    - eff@k (ENAMEL): levels 1 to 3 with hardness 3, 3, 4, held against the task's expert; a sample that fails on a level scores 0 from
      there on, one that is wrong anywhere 0 everywhere.
    - DPS (EvalPerf, the paper's protocol): the dearest input of the last level; the references are the task's right programs in clusters.
    - efficient@k (COFFE): the inputs of the last level together, held against the cheapest right program; beside it the same within 1 %.
      By a meter that varies by more than that, chance decides between programs that cost the same.

    A k above the samples of a task that counts is left out and told, never lowered; so is a task whose own programs do not answer, or of
    which the meter sees no cost.
    """
    left_out = [
        f"{run.task} in all figures: {run.unjudged.removeprefix(f'{run.task}: ').rstrip(': ')}"
        for run in runs
        if run.unjudged
    ]
    runs = [run for run in runs if not run.unjudged]
    if not runs:
        raise ValueError("; ".join(left_out) or "runs must be one or more, got none")
    measured = [run for run in runs if run.measured]
    fewest = min(len(run.why) for run in runs)
    few = next(run.task for run in runs if len(run.why) == fewest)
    left_out += [f"k = {k}: {few} has {fewest} samples" for k in ks if checks.whole("k", k, low=1) > fewest]
    kept = [k for k in ks if k <= fewest]
    figures = [_mean(f"pass@{k}", [pass_at_k(len(run.why), sum(run.right), k) for run in runs]) for k in kept]
    if not measured:
        return Scored(tuple(figures), (*left_out, "no task has references: only whether samples are right is known"))
    if len(measured) < len(runs):
        left_out.append(f"{len(runs) - len(measured)} tasks have no references: they are in pass@k only")
        figures += [
            _mean(f"pass@{k} of these", [pass_at_k(len(run.why), sum(run.right), k) for run in measured]) for k in kept
        ]
    effs = [values for run in measured if (values := eff_scores(run, settings)) is not None]
    if len(effs) < len(measured):
        left_out.append(
            f"{len(measured) - len(effs)} tasks have an expert who costs too little to be seen: not in eff@k"
        )
    if effs:
        figures += [_mean(f"eff@{k}", [float(enamel.eff_at_k(values, k)) for values in effs]) for k in kept]
    places = [(run, found) for run in measured if (found := dps_of(run, settings)) is not None]
    if len(places) < len(measured):
        left_out.append(f"{len(measured) - len(places)} tasks have no right sample: they are not scored by DPS")
    if places:
        figures.append(_mean("DPS", [found.dps for _, found in places]))
        figures.append(_mean("DPS_norm", [found.dps_norm for _, found in places]))
    problems = [problem for run in measured if (problem := problem_of(run)).usable]
    if len(problems) < len(measured):
        unseen = len(measured) - len(problems)
        left_out.append(f"{unseen} tasks have a cheapest program that costs too little to be seen: not in efficient@k")
    for k in kept if problems else ():
        figures.append(_mean(f"efficient@{k}", [coffe.efficient_at_k([one], k) for one in problems]))
        near = [coffe.efficient_at_k([one], k, tolerance=coffe.TOLERANCE) for one in problems]
        figures.append(_mean(f"efficient@{k} within 1 %", near))
    return Scored(tuple(figures), tuple(left_out))


def eff_scores(run: Run, settings: Settings) -> list[float] | None:
    """ENAMEL's score of every sample of a task, 0 for a wrong one; None where the meter sees nothing of the expert's on a level."""
    rules = enamel.Settings(
        cases=(1, *(settings.cases for _ in range(3))),
        repeats=settings.repeats,
        tolerance=TOLERANCES.get(settings.meter, 0.0),
    )
    expert = run.references.get("expert") or _cheapest(run)
    if any(max(map(hodges_lehmann, level)) == 0 for level in expert.finished):
        return None
    found = enamel.references([[], *expert.finished], rules)
    return [
        0.0 if costs is None else enamel.sample_score([[[0.0]], *costs.levels], found, rules).value
        for costs in run.samples
    ]


def dps_of(run: Run, settings: Settings) -> Any:
    """EvalPerf's scores of a task on its dearest input of the last level; None where no sample is right."""
    noise = NOISES[settings.meter]
    last = [costs.levels[-1] for costs in run.references.values() if not costs.failed]
    many = len(last[0])
    dearest = max(range(many), key=lambda n: sum(_one(level[n]) for level in last))
    known = [_one(level[dearest]) for level in last]
    levels = evalperf.references([max(cost, UNSEEN) for cost in known], noise=noise)
    right = [costs is not None for costs in run.samples]
    names = [f"sample {n}" for n in range(len(right))]
    by_name = {name: _dearest(costs, dearest) for name, costs in zip(names, run.samples, strict=True)}
    found = evalperf.score_task(names, right, by_name.__getitem__, levels)
    return None if found.dps is None else found


def problem_of(run: Run) -> coffe.Problem:
    """COFFE's problem of a task: the inputs of the last level, the cheapest right program, and the samples.

    A cost is the paper's, the mean of the repeats but for one smallest and one largest; of fewer than three repeats all count.
    """
    sums = {
        name: [_trimmed(case) for case in costs.levels[-1]]
        for name, costs in run.references.items()
        if not costs.failed
    }
    best = sums[coffe.best_solution(sums)]
    cut = [math.inf] * len(best)
    samples = [
        None if costs is None else cut if costs.failed else [_trimmed(case) for case in costs.levels[-1]]
        for costs in run.samples
    ]
    return coffe.Problem(best, samples)


def _dearest(costs: Costs | None, case: int) -> float | None:
    if costs is None or costs.failed:
        return None
    return max(_one(costs.levels[-1][case]), UNSEEN)


def _one(case: list[float] | str) -> float:
    """One cost of a case: the median of its repeats."""
    return math.inf if isinstance(case, str) else statistics.median(case)


def _trimmed(case: list[float] | str) -> float:
    """One cost of a case as COFFE has it."""
    if isinstance(case, str):
        return math.inf
    return coffe.cost_of_runs(case) if len(case) > 2 else statistics.fmean(case)


def _cheapest(run: Run) -> Costs:
    ended = [costs for costs in run.references.values() if not costs.failed]
    return min(ended, key=lambda costs: sum(_one(case) for case in costs.levels[-1]))


def _mean(name: str, values: Sequence[float]) -> Figure:
    mean: Callable[[Sequence[float]], float] = lambda drawn: math.fsum(drawn) / len(drawn)  # noqa: E731
    low, high = interval(values, mean) if len(values) > 1 else (None, None)
    return Figure(name, mean(values), low, high, len(values))


def document(runs: Sequence[Run], scored: Scored, settings: Settings) -> dict[str, Any]:
    """All of it as one JSON document: figures with their denominators, and every sample's state and scores."""
    tasks: list[Mapping[str, Any]] = []
    for run in runs:
        line: dict[str, Any] = {"task": run.task, "right": run.right, "why": run.why}
        if run.unjudged:
            line["unjudged"] = run.unjudged
        if run.measured:
            line |= {"score": eff_scores(run, settings), "costs": [costs and costs.levels for costs in run.samples]}
            line["references"] = {name: costs.levels for name, costs in run.references.items()}
        tasks.append(line)
    return {
        "meter": settings.meter,
        "figures": [vars(figure) for figure in scored.figures],
        "left_out": list(scored.left_out),
        "tasks": tasks,
    }
