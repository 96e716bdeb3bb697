"""EvalPerf: how many tasks can tell fast programs from slow ones, with inputs that were sampled for it and with those that tests have?

The tasks are those of the bank, with its generators as synthesisers and its right programs in place of the ones that the paper collected
from models. Each task is put through the paper's pipeline: scales doubled until the canonical program gives up, the dearest input on which
all programs finish, four filters. The same programs and filters on other inputs are what that is held against.

"no-scaling-law", that larger models do not write more efficient programs, has no experiment: it takes right programs of several models of
one family and several sizes, and those that come offline are of two families, one small size each.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, pstdev
from typing import Any

from assay.experiments.core import Figure, Operator, experiment
from assay.methods.code.evalperf import (
    Args,
    Filters,
    Reference,
    Stops,
    Suitability,
    curate,
    percentile,
    profiles_on,
    references,
    suitability,
    timed,
)
from assay.methods.core.programs.estimates import interval
from assay.methods.core.programs.judging import observed_cases
from assay.methods.core.programs.workers import Workers
from assay.methods.core.sandbox import Limits
from assay.workloads.programs.task import Task, bank

FIXED = 1_000
"""The one scale that a hasty person would take for every task."""
NOISE = {"instructions": 10_000.0, "cpu_seconds": 1e-4}
"""Costs below which a difference is noise: the paper's for instructions; for processor time ours, about what a call that does nothing takes
(60 to 160 microseconds on a busy machine)."""
LEAST = {"instructions": 1.0, "cpu_seconds": 1e-6}
"""A step of the meter, which a cost is taken to be where the empty run that is subtracted cost as much."""
ANSWER_BYTES = 256 * 2**20
SAMPLED, LAST, TESTS, RANDOM, ONE_SCALE = (
    "sampled", "only the last input, as released", "tests of the package", "a random scale", f"scale {FIXED:,} for all",
)  # fmt: skip

POINTS: dict[str, list[dict[str, Any]]] = {
    "smoke": [{"meter": "cpu_seconds", "seconds": 0.05, "runs": 1, "most": 2}],
    "small": [{"meter": "cpu_seconds", "seconds": 0.25, "runs": 3, "most": 12}],
    "full": [{"meter": "instructions", "seconds": 1.0, "runs": 1, "most": 1000}],
}


@dataclass(frozen=True)
class OnInput:
    """A task with one input: what the filters say, the clusters of its right programs, and the most that a cost varied, in per cent."""

    suitability: Suitability
    levels: tuple[Reference, ...]
    note: str = ""
    variation: float | None = None


@dataclass(frozen=True)
class Median:
    """Some runs of one program as one outcome: how they ended, and the median of their costs."""

    state: str
    cost: float | None = None


class Bench:
    """Runs the programs of one task, and remembers how much the costs of each varied when it last finished: 100 * deviation / mean."""

    def __init__(self, task: Task, workers: Workers, runs: int) -> None:
        self.task, self.workers, self.runs = task, workers, runs
        self.varied: dict[str, float] = {}

    def __call__(self, text: str, args: Args) -> Sequence[Median]:
        (outcomes,) = self.workers.run(text, self.task.entry_point, [args], repeats=self.runs)
        if outcomes[-1].state != "returned":
            return [Median(outcomes[-1].state)]
        costs = [max(one.cost or 0.0, LEAST[self.workers.meter.name]) for one in outcomes]
        self.varied[text] = 100 * pstdev(costs) / fmean(costs)
        return [Median("returned", percentile(costs, 50))]

    def most_varied(self) -> float | None:
        """The largest of these variations."""
        return max(self.varied.values(), default=None)


def valid(task: Task, args: Args) -> bool:
    """Whether the contract of the task allows the arguments."""
    try:
        task.check(*args)
    except (AssertionError, ValueError):
        return False
    return True


def on_input(task: Task, args: Args | None, run: Bench, filters: Filters) -> OnInput:
    """Measure all right programs on the arguments; without any, or where a program does not finish, the task has no input."""
    found = "no input" if args is None else profiles_on(task.programs, args, run)
    profiles = None if isinstance(found, str) else list(found.values())
    levels = () if profiles is None else references([fmean(one) for one in profiles], noise=filters.noise)
    return OnInput(suitability(profiles, filters), levels)


def of_task(task: Task, workers: Workers, seconds: float, runs: int, filters: Filters) -> dict[str, OnInput]:
    """A task through the pipeline, and the same programs on the inputs it is held against."""
    run = Bench(task, workers, runs)
    synthesise = timed(lambda scale: task.sized(scale), seconds + 1)
    found = curate(
        task.programs, [synthesise], run, valid=lambda args: valid(task, args), filters=filters, stops=Stops()
    )
    (sampled,) = found.sampled
    last = None if found.chosen is None else found.chosen.scale
    note = f"scale {last} of {sampled.scale}, {sampled.stop}"
    seen = {SAMPLED: OnInput(found.suitability, found.references, note, run.most_varied())}
    seen[LAST] = seen[SAMPLED] if last == sampled.scale else on_input(task, sampled.args, run, filters)
    scales = [*sampled.smaller(), *([] if sampled.scale is None else [sampled.scale])]
    scale = random.Random(f"scale of {task.id}").choice(scales) if scales else None
    seen[RANDOM] = on_input(task, None if scale is None else task.sized(scale), run, filters)
    seen[ONE_SCALE] = on_input(task, task.sized(FIXED), run, filters)
    seen[TESTS] = on_input(task, dearest_test(task, workers, run), run, filters)
    return seen


def dearest_test(task: Task, workers: Workers, run: Bench) -> Args:
    """The input of the package's own test that costs the canonical program most."""
    program = task.programs["canonical"]
    calls = observed_cases(workers, program, task.entry_point, task.test)
    costs = [max(one.cost or 0.0 for one in run(program, args)) for args in calls]
    return calls[costs.index(max(costs))]


def spread(tasks: Sequence[Task], most: int) -> list[Task]:
    """So many of the tasks, at even distances; all if there are fewer."""
    many = min(most, len(tasks))
    return [tasks[n * len(tasks) // many] for n in range(many)]


@experiment(
    "evalperf/tasks",
    points=POINTS,
    operator=Operator("inputs that show what programs cost", free=f"scale {FIXED:,} for every task"),
    paper={"meter": "instructions", "seconds": 20.0, "runs": 1, "least_programs": 10},
    departures={
        "meter": "processor seconds at smoke and small scale: callgrind takes seconds a run, and few machines lend a counter",
        "seconds": "shorter limits for programs and generators, so that all tasks are done in minutes",
        "runs": "the median of three runs, as processor seconds vary where instructions do not; the filters see one cost a program",
        "least_programs": "tasks of the bank have fewer right programs than models write: six are enough",
    },
    refuted_if="no more tasks pass the filters with sampled inputs than with the dearest input of the tests that they came with",
    refutes=lambda record: record["measured"]["median"] <= record["baseline"],
    measured_here="tasks of our own bank, which were chosen because their costs can grow, with our generators and our right programs",
    minutes=900,
)
def tasks(meter: str, seconds: float, runs: int, most: int) -> Figure:
    """The tasks that pass the paper's filters with the input that exponential sampling brings.

    The interval is a bootstrap over tasks. Baseline, and control for the method deleted: the dearest input of each task's own test. Random:
    any of the scales that the sampling went through, of equal chance. `free`: one fixed scale for all. The arm is the released procedure,
    which has no smaller input to fall back on where a right program does not finish with the last one.
    """
    filters = Filters(least_programs=6, least_cost=NOISE[meter], noise=NOISE[meter])
    chosen = spread([task for task in bank().values() if "canonical" in task.programs], most)
    limits = Limits(cpu_seconds=seconds, wall_seconds=10 * seconds + 5, memory_mib=1024, output_bytes=ANSWER_BYTES)
    with Workers(meter, limits=limits) as workers:
        seen = {task.id: of_task(task, workers, seconds, runs, filters) for task in chosen}
    passed = {name: [one[name].suitability.passes for one in seen.values()] for name in next(iter(seen.values()))}
    counts = {name: float(sum(fine)) for name, fine in passed.items()}
    low, high = interval(passed[SAMPLED], lambda drawn: float(sum(drawn)))
    return Figure(
        counts[SAMPLED],
        "tasks",
        low=low,
        high=high,
        baseline=counts[TESTS],
        free=counts[ONE_SCALE],
        controls={"deleted": counts[TESTS], "random": counts[RANDOM], "rival": counts[ONE_SCALE]},
        arms={LAST: counts[LAST]},
        details={
            "tasks": len(chosen),
            "why_not": {name: reasons(seen, name) for name in counts},
            "clusters": {name: {id_: len(one[name].levels) for id_, one in seen.items()} for name in counts},
            "sampled": {id_: one[SAMPLED].note for id_, one in seen.items()},
            "variation_percent": {id_: one[SAMPLED].variation for id_, one in seen.items()},
            "dps": scores(chosen, seen),
        },
    )


def reasons(seen: dict[str, dict[str, OnInput]], name: str) -> dict[str, int]:
    """How many tasks each filter holds back."""
    return dict(Counter(one[name].suitability.reason for one in seen.values() if not one[name].suitability.passes))


def scores(chosen: Sequence[Task], seen: dict[str, dict[str, OnInput]]) -> dict[str, float]:
    """The mean DPS of the canonical program and of the expert over the tasks that pass."""
    found: dict[str, list[float]] = {}
    for task in chosen:
        one = seen[task.id][SAMPLED]
        for name in ("canonical", "expert") if one.suitability.passes else ():
            at = list(task.programs).index(name)
            found.setdefault(name, []).append(next(level.score for level in one.levels if at in level.members))
    return {name: fmean(values) for name, values in found.items()}
