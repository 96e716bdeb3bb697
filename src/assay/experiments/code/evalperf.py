"""EvalPerf: how many tasks can tell fast programs from slow ones, with inputs that were sampled for it and with those that tests have?

The tasks are those of the bank, with its generators as synthesisers and its right programs in place of the ones that the paper collected
from models. Each task is put through the paper's pipeline: scales doubled until the canonical program gives up, the dearest input on which
all programs finish, four filters. The same programs and filters on other inputs are what that is held against. One program in place of
all of a task's shows whether the meter's noise alone makes clusters: it should pass nowhere.

"no-scaling-law", that larger models do not write more efficient programs, has no experiment. It takes right programs of several models of
one family and several sizes; no such family comes with a package, the one language model that does is small and seldom right, and no
stand-in of ours (a program is no model) would say anything about it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
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
from assay.methods.core.programs.hypotheses import wilson
from assay.methods.core.programs.judging import observed_cases
from assay.methods.core.programs.workers import Workers
from assay.methods.core.sandbox import Limits
from assay.workloads.programs.task import Task, bank

NOISE = {"instructions": 10_000.0, "cpu_seconds": 1e-4}
"""Costs below which a difference is noise: the paper's for instructions; for processor time ours, about what a call that does nothing takes
(60 to 160 microseconds on a busy machine)."""
LEAST_COST = {"instructions": 500_000.0, "cpu_seconds": 1e-4}
"""What the cheapest program must cost: of instructions ten times what callgrind differs by from run to run."""
LEAST = {"instructions": 1.0, "cpu_seconds": 1e-6}
"""A step of the meter, which a cost is taken to be where the empty run that is subtracted cost as much."""
ANSWER_BYTES = 256 * 2**20
SAMPLED, LAST, TESTS, SAME = (
    "sampled", "only the last input, as released", "tests of the package", "one program in place of all",
)  # fmt: skip

POINTS: dict[str, list[dict[str, Any]]] = {
    "smoke": [{"meter": "cpu_seconds", "seconds": 0.05, "runs": 1, "most": 2}],
    "small": [{"meter": "cpu_seconds", "seconds": 0.25, "runs": 3, "most": 12}],
    "full": [{"meter": "instructions", "seconds": 1.0, "runs": 1, "most": 1000}],
}


@dataclass(frozen=True)
class OnInput:
    """A task with one input: what the filters say, and the clusters of its right programs."""

    suitability: Suitability
    levels: tuple[Reference, ...] = ()

    @property
    def passes(self) -> bool:
        return self.suitability.passes


@dataclass(frozen=True)
class Seen:
    """A task on every input it was asked on: by name, and by every scale with which the canonical program finished.

    `note` says how the sampling went, `variation` is the most that a cost varied on the input that was chosen, in per cent.
    """

    named: dict[str, OnInput]
    at: dict[int, OnInput]
    note: str
    variation: float | None


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


def of_task(task: Task, workers: Workers, seconds: float, runs: int, filters: Filters) -> Seen:
    """A task through the pipeline, and the same programs on the inputs it is held against."""
    run, made = Bench(task, workers, runs), cache(task.sized)  # each input is asked for several times
    synthesise = timed(lambda scale: made(scale), seconds + 1)
    found = curate(
        task.programs, [synthesise], run, valid=lambda args: valid(task, args), filters=filters, stops=Stops()
    )
    (sampled,) = found.sampled
    chosen = None if found.chosen is None else found.chosen.scale
    variation = run.most_varied()
    named = {SAMPLED: OnInput(found.suitability, found.references)}
    if found.profiles is not None:  # the slowest first: where one does not finish, the others need not be run
        cost = dict(zip(found.programs, map(fmean, found.profiles), strict=True))
        task = replace(task, programs=dict(sorted(task.programs.items(), key=lambda one: -cost[one[0]])))
    scales = [] if sampled.scale is None else [sampled.scale, *sampled.smaller()]
    at = {scale: named[SAMPLED] if scale == chosen else on_input(task, made(scale), run, filters) for scale in scales}
    named[LAST] = at[scales[0]] if scales else named[SAMPLED]
    named[TESTS] = on_input(task, dearest_test(task, workers, run), run, filters)
    same = replace(task, programs=dict.fromkeys(task.programs, task.programs["canonical"]))
    named[SAME] = on_input(same, None if found.chosen is None else found.chosen.args, run, filters)
    return Seen(named, at, f"scale {chosen} of {sampled.scale}, {sampled.stop}", variation)


def at_random(one: Seen) -> float:
    """The chance that a task passes with any of its scales, of equal chance."""
    return fmean([found.passes for found in one.at.values()] or [0.0])


def one_scale(seen: Sequence[Seen]) -> list[float]:
    """Whether each task passes with one scale for all: that with which most of the others do; of equals, the mean."""
    found = []
    for n, one in enumerate(seen):
        others = Counter(scale for m, other in enumerate(seen) if m != n for scale, at in other.at.items() if at.passes)
        best = [scale for scale, many in others.items() if many == max(others.values())]
        found.append(fmean([scale in one.at and one.at[scale].passes for scale in best] or [0.0]))
    return found


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
    operator=Operator("inputs that show what programs cost", free="one scale for all tasks, that with which most pass"),
    paper={
        "meter": "instructions",
        "seconds": 20.0,
        "runs": 1,
        "least_programs": 10,
        "least_cost": 10_000,
        "candidates": "the last input of each of up to 16 generators",
        "tests": "HumanEval+ and MBPP+",
    },
    departures={
        "meter": "processor seconds at smoke and small scale: callgrind takes seconds a run, and few machines lend a counter",
        "seconds": "shorter limits for programs and generators, so that all tasks are done in minutes",
        "runs": "the median of three runs, as processor seconds vary where instructions do not; the filters see one cost a program, "
        "so that none is held back for variation",
        "least_programs": "tasks of the bank have fewer right programs than models write: six are enough",
        "least_cost": "500,000 instructions, for those that callgrind counts differ by some 50,000 from run to run",
        "candidates": "every scale with which the canonical program finished, for the bank has one generator a task; "
        "the last alone is an arm",
        "tests": "those of HumanEval, which are fewer and smaller than HumanEval+'s: that baseline is easier to beat",
    },
    refuted_if="no more tasks pass the filters with sampled inputs than with the dearest input of the tests that they came with",
    refutes=lambda record: record["measured"]["median"] <= record["baseline"],
    measured_here="tasks of our own bank, which were chosen because their costs can grow, with our generators and our right programs",
    minutes=1440,
)
def tasks(meter: str, seconds: float, runs: int, most: int) -> Figure:
    """The tasks that pass the paper's filters with the input that exponential sampling brings.

    The interval is Wilson's over tasks. Baseline, and control for the method deleted: the dearest input of each task's own test. Random:
    any of the scales that the sampling went through, of equal chance. `free`: one scale for all, chosen on the other tasks. Arms: the
    released procedure, which has no smaller input to fall back on where a right program does not finish with the last one; and one
    program in place of all, of which each task that passes is one that noise let through.
    """
    filters = Filters(least_programs=6, least_cost=LEAST_COST[meter], noise=NOISE[meter])
    chosen = spread([task for task in bank().values() if "canonical" in task.programs], most)
    limits = Limits(cpu_seconds=seconds, wall_seconds=10 * seconds + 5, memory_mib=1024, output_bytes=ANSWER_BYTES)
    with Workers(meter, limits=limits) as workers:
        seen = {task.id: of_task(task, workers, seconds, runs, filters) for task in chosen}
    passed = {
        name: [float(one.named[name].passes) for one in seen.values()] for name in next(iter(seen.values())).named
    }
    by_chance, fixed = [at_random(one) for one in seen.values()], one_scale(list(seen.values()))
    counts = {name: sum(fine) for name, fine in passed.items()}
    share = wilson(int(counts[SAMPLED]), len(chosen))
    return Figure(
        counts[SAMPLED],
        "tasks",
        low=len(chosen) * share.low,
        high=len(chosen) * share.high,
        baseline=counts[TESTS],
        free=sum(fixed),
        controls={"deleted": counts[TESTS], "random": sum(by_chance), "rival": sum(fixed)},
        arms={name: counts[name] for name in (LAST, SAME)},
        details={
            "tasks": len(chosen),
            "more_than": {
                name: more_than(passed[SAMPLED], other)
                for name, other in (("tests", passed[TESTS]), ("random scale", by_chance), ("one scale", fixed))
            },
            "passed_at_scale": {
                str(2**power): sum(2**power in one.at and one.at[2**power].passes for one in seen.values())
                for power in range(1, 27)
            },
            "why_not": {name: reasons(seen, name) for name in counts},
            "clusters": {name: {id_: len(one.named[name].levels) for id_, one in seen.items()} for name in counts},
            "sampled": {id_: one.note for id_, one in seen.items()},
            "variation_percent": {id_: one.variation for id_, one in seen.items()},
            "dps": scores(chosen, seen),
        },
    )


def more_than(first: Sequence[float], second: Sequence[float]) -> tuple[float, float, float]:
    """How many more tasks pass, and the ends of a bootstrap over tasks, which are drawn in pairs."""
    pairs = [one - other for one, other in zip(first, second, strict=True)]
    low, high = interval(pairs, lambda drawn: float(sum(drawn)))
    return sum(pairs), low, high


def reasons(seen: dict[str, Seen], name: str) -> dict[str, int]:
    """How many tasks each filter holds back."""
    return dict(Counter(one.named[name].suitability.reason for one in seen.values() if not one.named[name].passes))


def scores(chosen: Sequence[Task], seen: dict[str, Seen]) -> dict[str, float]:
    """The mean DPS of the canonical program and of the expert over the tasks that pass."""
    found: dict[str, list[float]] = {}
    for task in chosen:
        one = seen[task.id].named[SAMPLED]
        for name in ("canonical", "expert") if one.passes else ():
            at = list(task.programs).index(name)
            found.setdefault(name, []).append(next(level.score for level in one.levels if at in level.members))
    return {name: fmean(values) for name, values in found.items()}
