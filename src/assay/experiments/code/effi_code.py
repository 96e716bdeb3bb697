"""Effi-Code: how much time does the loop save that makes the paper's training data?

No language model is tuned or asked: the loop revises every right program of the bank but the experts' (HumanEval's canonical solutions
among them) by rules on the syntax tree, and what it saves is measured on other inputs than those it chose by, in turns with the program
it began with. Programs that no rule applies to count as what they are, a saving of 0, so that the figure does not follow from
choosing slow ones. What it depends on are the rules and the programs, both the project's own: it is no model's.

What the profile is worth is told by the same loop with the line drawn at random, and with the edits in the order of the program, at
the same number of candidates run; by all edits at once, which needs no loop and no measurement; and by the program itself, run again.
Most of these programs have one place that a rule applies to, so that there is nothing to choose. A second point, which does not decide,
puts several of them into one file that calls each: there are then more places than rounds, and the first ones count.
"""

from __future__ import annotations

import ast
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from assay.experiments.core import Figure, Operator, experiment
from assay.methods.code.effi_code import (
    Bench,
    LineProfiler,
    Optimised,
    Rules,
    SelfOptimize,
    compared,
    memory_curve,
    normalised,
)
from assay.methods.core.programs import rewriting
from assay.methods.core.programs.estimates import interval
from assay.methods.core.programs.workers import Workers
from assay.methods.core.sandbox import Limits
from assay.workloads.programs.task import Task, bank

LEAST_GAIN = 0.05
"""What a revision must save by the loop's own measurement to be kept: the meter differs by a few per cent from run to run. Our choice."""
CHECKS = 8
"""Inputs of the level of correctness."""
LOOPED = 3
"""Repeats of the loop's own measurements, of which it takes the median."""
LOOP, FRESH = 0, 1
"""Seeds of the inputs that the loop sees, and of those that the result is measured on."""
SIZE = 6
"""Programs in a file."""
SETTINGS: dict[str, Any] = {
    "of": "programs", "tasks": 0, "rounds": 5, "order": "profile", "level": 2, "cases": 1, "repeats": 5, "seeds": 3,
}  # fmt: skip
AGAIN = "the program itself, run again"
AT_ONCE = "all edits at once"


@dataclass
class Seen:
    """What became of one program: the cost after over the cost before, by arm and rounds; empty where it was not solved before and after.

    `edits` is how many edits apply to it at first. With none of them nothing is run, and every ratio is 1.
    """

    task: str
    name: str
    edits: int
    ratios: dict[str, list[float]] = field(default_factory=dict)
    why: str = ""
    costs: tuple[float, float] | None = None
    curves: dict[str, tuple[float, float]] = field(default_factory=dict)
    candidates: int = 0
    profiles: int = 0

    def log_ratio(self, arm: str, rounds: int) -> float:
        """The logarithm of the ratio after so many rounds (the last there are)."""
        return math.log(self.ratios[arm][min(rounds, len(self.ratios[arm]) - 1)]) if self.edits else 0.0


@dataclass(frozen=True)
class File:
    """Programs of several tasks in one file, and a function that calls each of them."""

    id: str
    tasks: tuple[Task, ...]
    programs: Mapping[str, str]
    entry_point: str = "joined"

    def arguments(self, level: int, number: int = 0, seed: int = 0) -> tuple[Any, ...]:
        """A tuple of arguments for each task."""
        return tuple(task.arguments(level, number, seed) for task in self.tasks)

    def compare(self, expected: Any, got: Any) -> bool:
        """Whether every task's answer is right."""
        if not isinstance(got, tuple) or len(got) != len(self.tasks):
            return False
        return all(task.compare(*pair) for task, *pair in zip(self.tasks, expected, got, strict=True))


def observed_of(of: Task | File) -> rewriting.Observed:
    """What the loop's own inputs of level 0 say about the parameters."""
    tasks = of.tasks if isinstance(of, File) else (of,)
    return {task.entry_point: [task.arguments(0, number, LOOP) for number in range(CHECKS)] for task in tasks}


def answers_of(workers: Workers, of: Task | File, calls: Sequence[Any], limits: Limits) -> list[Any]:
    """The right answers, which are the experts'."""
    if isinstance(of, File):
        by_task = [answers_of(workers, task, [call[n] for call in calls], limits) for n, task in enumerate(of.tasks)]
        return list(zip(*by_task, strict=True))
    found = workers.run(of.programs["expert"], of.entry_point, calls, limits=limits)
    return [outcome.value for [outcome] in found]


def files_of(tasks: Sequence[Task], size: int) -> list[File]:
    """Files of so many programs each, of different tasks, all with a place that a rule applies to; programs that fill no file are left out.

    In the order of the bank: each goes into the first file that has room, not its task, and no other thing of one of its names.
    """
    made: list[tuple[dict[str, str], dict[str, Task], list[str]]] = []
    for task in tasks:
        for name, text in task.programs.items():
            if name == "expert" or not rewriting.edits(text, observed=observed_of(task)):
                continue
            bound = names_of(text)
            for names, known, texts in made:
                if len(texts) < size and task.id not in known and not any(_clash(names, bound, name) for name in bound):
                    break
            else:
                names, known, texts = {}, {}, []
                made.append((names, known, texts))
            names.update(bound)
            known[task.id] = task
            texts.append(text)
    files: list[File] = []
    for _, known, texts in made:
        if len(texts) == size:
            calls = ", ".join(f"{task.entry_point}(*call_{n})" for n, task in enumerate(known.values()))
            head = ", ".join(f"call_{n}" for n in range(size))
            whole = "\n\n".join([*texts, f"def joined({head}):\n    return {calls}\n"])
            files.append(File(f"file {len(files)}", tuple(known.values()), {"all": whole}))
    return files


def names_of(program: str) -> dict[str, str]:
    """What a program binds at its top: for an import what is imported, for anything else nothing."""
    found: dict[str, str] = {}
    for node in ast.parse(program).body:
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            module = f"{node.module}." if isinstance(node, ast.ImportFrom) else ""
            found.update({alias.asname or alias.name: module + alias.name for alias in node.names})
        elif isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found[node.name] = ""
        else:
            found.update(
                {one.id: "" for one in ast.walk(node) if isinstance(one, ast.Name) and isinstance(one.ctx, ast.Store)}
            )
    return found


def _clash(one: Mapping[str, str], other: Mapping[str, str], name: str) -> bool:
    return name in one and (not one[name] or one[name] != other[name])


def bests(found: Optimised, rounds: int) -> list[str]:
    """The best program after 0, 1, ..., `rounds` rounds: a loop that ended early keeps what it has."""
    kept = [found.initial]
    for step in found.steps:
        kept.append(step.program if step.kept else kept[-1])
    return [*kept, *[kept[-1]] * (rounds + 1 - len(kept))][: rounds + 1]


def bench_of(
    workers: Workers, of: Task | File, level: int, cases: int, repeats: int, seed: int, limits: Limits
) -> Bench:
    """Inputs of a seed with the expert's answers: some of level 0 to be right on, some of `level` to be measured on."""
    calls = [of.arguments(0, number, seed) for number in range(CHECKS)]
    calls += [of.arguments(level, number, seed) for number in range(cases)]
    pairs = list(zip(calls, answers_of(workers, of, calls, limits), strict=True))
    return Bench(workers, of.entry_point, pairs[:CHECKS], pairs[CHECKS:], of.compare, repeats=repeats, limits=limits)


def arms_of(
    start: str, bench: Bench, profiler: LineProfiler, seen: rewriting.Observed, rounds: int, seeds: int
) -> tuple[dict[str, list[str]], Optimised]:
    """The best program after each round, by arm."""

    def loop(rules: Rules, many: int) -> Optimised:
        asked = profiler if rules.order == "profile" else None
        return SelfOptimize(rules, asked, many, least_gain=LEAST_GAIN)(start, bench)

    by_profile = loop(Rules("profile", observed=seen), rounds)
    in_order = loop(Rules("in order", observed=seen), rounds)
    arms = {"profile": bests(by_profile, rounds), "in order": bests(in_order, rounds)}
    for seed in range(seeds):  # as many rounds more as profiles were taken: a profile is a run too
        many = rounds + by_profile.profiles
        arms[f"random {seed}"] = bests(loop(Rules("random", seed, observed=seen), many), many)
    whole = rewriting.rewrite(start, observed=seen)
    arms[AT_ONCE] = [start, whole if bench.why_wrong(whole) == "" else start]
    return arms, by_profile


def seen_of(
    workers: Workers, of: Task | File, name: str, settings: Mapping[str, Any], benches: tuple[Bench, Bench]
) -> Seen:
    """One program through all arms."""
    start, (bench, fresh) = of.programs[name], benches
    observed = observed_of(of)
    seen = Seen(of.id, name, len(rewriting.edits(start, observed=observed)))
    if not seen.edits:
        return seen
    if not bench(start).right:
        seen.why = f"before: {bench(start).why}"
        return seen
    profiled = of.arguments(
        max(settings["level"] - 1, 1), 0, LOOP
    )  # smaller: a line that is traced takes many times as long
    profiler = LineProfiler(workers, of.entry_point, [profiled], limits=bench.limits)
    evaluated = bench.evaluations
    arms, by_profile = arms_of(start, bench, profiler, observed, settings["rounds"], settings["seeds"])
    seen.candidates, seen.profiles = bench.evaluations - evaluated, by_profile.profiles
    texts = list(dict.fromkeys([start, *(text for of_arm in arms.values() for text in of_arm)]))
    if why := fresh.why_wrong(arms["profile"][-1]):
        seen.why = f"after: {why}"
        return seen
    measured = fresh.measured({**{text: text for text in texts}, AGAIN: start}, settings["repeats"])
    before, after = measured[start], measured[arms["profile"][-1]]
    if not (before.right and after.right):
        seen.why = f"on the inputs measured on: {before.why or after.why}"
        return seen
    # an arm whose program fails on the new inputs has kept nothing of use there
    ratio = {text: found.cost / before.cost if found.right else 1.0 for text, found in measured.items()} | {start: 1.0}
    seen.ratios = {arm: [ratio[text] for text in of_arm] for arm, of_arm in arms.items()} | {AGAIN: [ratio[AGAIN]]}
    seen.costs = before.cost, after.cost
    if arms["profile"][-1] != start:
        seen.curves = curves_of(workers, of, (start, arms["profile"][-1]), fresh)
    return seen


def log_saved(found: Sequence[Seen], arm: str, rounds: int) -> float:
    """The mean over tasks of the mean over each task's programs of the logarithm of the ratio; of "random" over its seeds too."""
    by_task: dict[str, list[float]] = {}
    for one in found:
        names = [name for name in one.ratios if name == arm or name.startswith(f"{arm} ")] or [arm]
        by_task.setdefault(one.task, []).append(math.fsum(one.log_ratio(name, rounds) for name in names) / len(names))
    return math.fsum(math.fsum(logs) / len(logs) for logs in by_task.values()) / len(by_task)


def saved(found: Sequence[Seen], arm: str, rounds: int) -> float:
    """Per cent of time saved: 1 less the geometric mean over tasks of the geometric mean over each task's programs."""
    return per_cent([log_saved(found, arm, rounds)])


def with_interval(found: Sequence[Seen], arm: str, rounds: int, *, against: str = "") -> tuple[float, float, float]:
    """The figure and its interval, tasks drawn anew, each with all its programs. `against` another arm: what is saved of its time."""
    groups = [[one for one in found if one.task == task] for task in dict.fromkeys(one.task for one in found)]
    logs = [log_saved(group, arm, rounds) - (log_saved(group, against, rounds) if against else 0.0) for group in groups]
    value = per_cent(logs)
    low, high = interval(logs, per_cent) if len(groups) > 1 else (value, value)
    return value, min(low, value), max(high, value)


def per_cent(logs: Sequence[float]) -> float:
    """What a mean logarithm of ratios saves."""
    return 100 * (1 - math.exp(math.fsum(logs) / len(logs)))


def curves_of(
    workers: Workers, of: Task | File, texts: tuple[str, str], fresh: Bench
) -> dict[str, tuple[float, float]]:
    """ET, MU and TMU before and after, on the first input measured on, as the paper has them: with what the interpreter holds."""
    runs = [
        memory_curve(workers.sandbox, text, of.entry_point, fresh.costly[0][0], interval=0.005, limits=fresh.limits)
        for text in texts
    ]
    if any(run.state != "returned" for run in runs):
        return {}
    before, after = (run.overhead(own=False) for run in runs)
    return {"ET": (before.et, after.et), "MU": (before.mu, after.mu), "TMU": (before.tmu, after.tmu)}


def details_of(found: Sequence[Seen], all_of: int, rounds: int) -> dict[str, Any]:
    """What stands beside the figure."""
    run = [one for one in found if one.costs is not None]
    costs = {f"{one.task}, {one.name}": one.costs for one in run if one.costs is not None}
    details: dict[str, Any] = {
        "tasks (or files)": len({one.task for one in found}),
        "programs": all_of,
        "of them, no rule applies to": sum(not one.edits for one in found),
        "of them, not right or cut before or after, in no figure": all_of - len(found),
        "of those that a rule applies to, a revision was kept": sum(one.ratios["profile"][-1] != 1.0 for one in run),
        "edits that apply at first, mean": sum(one.edits for one in run) / max(len(run), 1),
        "different programs run by all loops": sum(one.candidates for one in run),
        "profiles taken": sum(one.profiles for one in run),
        "saved after so many candidates, %": {
            arm: [round(saved(found, arm, many), 2) for many in range(1, rounds + 1)]
            for arm in ("profile", "random", "in order")
        },
        "of the other's time saved by the profile, paired by task, %": {
            f"{arm}, {many} candidates": with_interval(found, "profile", many, against=arm)
            for arm, many in (
                ("random", 1),
                ("random", rounds),
                ("in order", 1),
                ("in order", rounds),
                (AT_ONCE, rounds),
            )
        },
        "saved of every program that a rule applies to, %": {
            f"{one.task}, {one.name}": round(100 * (1 - one.ratios["profile"][-1]), 1) for one in run
        },
    }
    if costs:
        both = compared({k: before for k, (before, _) in costs.items()}, {k: after for k, (_, after) in costs.items()})
        details["where a rule applies"] = {
            "ratio of mean times": both.ratio_of_means, "mean of ratios": both.mean_of_ratios,
            "geometric mean": both.geometric_mean, "median": both.median,
        }  # fmt: skip
    if curves := {f"{one.task}, {one.name}": one.curves for one in run if one.curves}:
        for name in ("ET", "MU", "TMU"):
            pairs = {key: curve[name] for key, curve in curves.items() if min(curve[name]) > 0}
            if pairs:
                held = normalised(
                    {k: after for k, (_, after) in pairs.items()}, {k: first for k, (first, _) in pairs.items()}
                )
                details[f"N{name} of those changed"] = vars(held)
    return details


# ---------------------------------------------------------------------------------------------------------------- experiment


@experiment(
    "effi_code/execution-time",
    points={
        "smoke": [{**SETTINGS, "tasks": 3, "level": 1, "cases": 1, "repeats": 3, "seeds": 1}],
        "small": [SETTINGS, {**SETTINGS, "of": "files", "level": 1, "seeds": 2}],
        "full": [
            {**SETTINGS, "level": 3, "cases": 4, "repeats": 9, "seeds": 10},
            {**SETTINGS, "of": "files", "cases": 4, "repeats": 9, "seeds": 10},
        ],
    },
    decides={"small": SETTINGS, "full": {**SETTINGS, "level": 3, "cases": 4, "repeats": 9, "seeds": 10}},
    operator=Operator(
        "programs that are right and slower than they need be",
        free="all of the same rules' edits at once, without profile, rounds or measurement",
    ),
    paper={
        "generator": "DeepSeek-Coder-6.7B-Instruct, tuned on what the loop made",
        "programs": "that model's, before and after it was tuned",
        "statistic": "the ratio of mean times on the tasks solved by both",
        "of": "programs",
        "rounds": 5,
        "order": "profile",
    },
    departures={
        "generator": "rules on the syntax tree inside of the loop itself: no model is tuned, and the loop is the part that makes the data",
        "programs": "all right ones of the bank but the experts', before and after the loop",
        "statistic": "the geometric mean over tasks: a ratio of means would be that of the inputs which assay made largest",
    },
    refuted_if="the whole interval of the time saved, over all programs with those that no rule applies to, lies at or below 0",
    refutes=lambda record: record["measured"]["high"] <= 0,
    measured_here="time saved by the paper's loop itself, with rules in the place of a language model, on right programs of the project's "
    "bank and HumanEval's canonical ones; no model is tuned",
    minutes=240,
    memory_gib=6,
)
def execution_time(
    of: str, tasks: int, rounds: int, order: str, level: int, cases: int, repeats: int, seeds: int
) -> Figure:
    """Per cent of time saved by the loop guided by the profile, the geometric mean over tasks with tasks resampled.

    The controls are the same program measured again (the loop deleted), the line drawn at random (the mean over `seeds`), and the edits
    in the order of the program, each with as many candidates run. `tasks` 0 is all of the bank; loops see `cases` inputs of `level`,
    profiles one of the level below, and the figure is of others, each measured `repeats` times. `of` "files" takes files of several
    programs in the tasks' place.
    """
    listed: Sequence[Task | File] = list(bank().values())[: tasks or None]
    if of == "files":
        listed = files_of(list(bank().values()), SIZE)
    settings = {"rounds": rounds, "level": level, "repeats": repeats, "seeds": seeds}
    limits = Limits(wall_seconds=20, cpu_seconds=2 if level < 3 else 10, memory_mib=1024, output_bytes=64 * 2**20)
    everything: list[Seen] = []
    with Workers("cpu_seconds", limits=limits) as workers:
        for one in listed:
            bench = bench_of(workers, one, level, cases, LOOPED, LOOP, limits)
            fresh = bench_of(workers, one, level, cases, repeats, FRESH, limits)
            names = [name for name in one.programs if name != "expert"]
            everything += [seen_of(workers, one, name, settings, (bench, fresh)) for name in names]
    found = [one for one in everything if not one.why]
    if not found:
        raise ValueError(
            f"no program was right before and after: {everything[0].why if everything else 'there are none'}"
        )
    value, low, high = with_interval(found, order, rounds)
    left_out = {f"{one.task}, {one.name}": one.why for one in everything if one.why}
    random_with_profiles = saved(found, "random", 2 * rounds)
    return Figure(
        value, "%", low, high,
        baseline=0.0,
        free=saved(found, AT_ONCE, 1),
        controls={"deleted": saved(found, AGAIN, 0), "random": saved(found, "random", rounds), "rival": saved(found, "in order", rounds)},
        arms={"random, as many more candidates as profiles were taken": random_with_profiles},
        details=details_of(found, len(everything), rounds) | {"left out": left_out},
    )  # fmt: skip
