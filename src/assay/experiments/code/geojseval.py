"""GeoJSEval: do the cases notice faults in programs for maps, what do warm processes save, and where is a model weak?

The paper compares language models and claims no speed-up. What can be checked without one is its instrument: whether right programs pass
and wrong ones do not. Both are assay's own: 60 tasks with Turf, JSTS, Leaflet and Geolib, whose expected answers come from formulas and
plane geometry, and mutants, programs with one small fault each. Half of the mutants were held out by a digest while the cases were
written; that half decides. Mutants that are as right as their program are listed with the reason (`equals.toml` of the bank).

The published runner starts a Node for each case; ours keeps one warm and gives each case a realm of its own.
"""

from __future__ import annotations

import difflib
import math
import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from assay.experiments.core import Figure, Guard, Operator, Quality, Trial, experiment
from assay.methods.code.geojseval import (
    NS,
    Answer,
    Attempt,
    Case,
    Judged,
    Mutant,
    OneProcess,
    Result,
    Runner,
    Warm,
    judged,
    mutants,
    reported,
)  # fmt: skip
from assay.methods.core.programs.estimates import interval
from assay.methods.core.programs.node import NodeWorkers
from assay.methods.core.programs.workers import Outcome, State
from assay.workloads.programs.geospatial import LIBRARIES, Library, Task, equals, plain_tasks, tasks
from assay.workloads.programs.geospatial.libraries import module_of, node_modules

# ------------------------------------------------------------------------------------------------------------- are faults noticed?


@dataclass(frozen=True)
class Tried:
    """A program that was judged on all cases of its task: a mutant, or a right one (`mutant` None)."""

    task: Task
    program: str
    mutant: Mutant | None
    found: Judged

    @property
    def equal(self) -> bool:
        """A mutant that is as right as its program."""
        return self.mutant is not None and self.mutant.why in equals().get(self.task.id, {})


def try_all(chosen: Sequence[Task], runner_of: Callable[[Library], Runner], *, all_mutants: bool) -> list[Tried]:
    """All right programs of tasks and the mutants of each, the held-out half of them or all, on all cases."""
    found = []
    for task in chosen:
        runner = runner_of(task.library)
        programs: list[tuple[str, Mutant | None]] = [(text, None) for text in task.programs.values()]
        made = {mutant.program: mutant for text in task.programs.values() for mutant in mutants(text)}
        programs += [(text, mutant) for text, mutant in made.items() if all_mutants or mutant.held_out]
        for program, mutant in programs:
            seen = judged(runner, program, task.entry_point, task.parameters, task.cases)
            found.append(Tried(task, program, mutant, seen))
    return found


def noticed_less_refused(tried: Sequence[Tried], fails: Callable[[Tried], bool]) -> float:
    """The share of mutants that fail less that of right programs that fail: 1 for a perfect judge, 0 for one that does not look."""
    wrong = [fails(one) for one in tried if one.mutant is not None]
    right = [fails(one) for one in tried if one.mutant is None]
    return sum(wrong) / len(wrong) - sum(right) / len(right)


def by_tasks(tried: Sequence[Tried], fails: Callable[[Tried], bool]) -> tuple[float, float]:
    """Its 95 % interval, tasks resampled with all their programs."""
    counts: dict[str, list[int]] = {}
    for one in tried:
        of_task = counts.setdefault(one.task.id, [0, 0, 0, 0])
        of_task[2 * (one.mutant is None)] += fails(one)
        of_task[2 * (one.mutant is None) + 1] += 1

    def over(drawn: Sequence[Sequence[int]]) -> float:
        missed, wrong, refused, right = map(sum, zip(*drawn, strict=True))
        return missed / wrong - refused / right if wrong else math.nan

    return interval(list(counts.values()), over)


def failed_where(counts: Callable[[Case, Result], bool]) -> Callable[[Tried], bool]:
    """A judge that hears of those failures only."""

    def fails(one: Tried) -> bool:
        both = zip(one.task.cases, one.found.results, strict=True)
        return any(not result.passed and counts(case, result) for case, result in both)

    return fails


def did_not_return(case: Case, result: Result) -> bool:
    """Failures that are seen without comparing anything."""
    return result.error not in ("wrong answer", "output type")


def by_similarity(tried: Sequence[Tried]) -> Callable[[Tried], bool]:
    """What the paper's kind of benchmark replaces: a program passes that looks like the reference.

    As alike as serves it best on these very programs, which is more than anybody could know: the references are as alike as can be.
    """

    def alike(one: Tried) -> float:
        return difflib.SequenceMatcher(None, one.task.programs["reference"], one.program, autojunk=False).ratio()

    seen = {id(one): alike(one) for one in tried}

    def below(least: float) -> Callable[[Tried], bool]:
        return lambda one: seen[id(one)] < least

    levels = sorted({seen[id(one)] for one in tried if one.mutant is None})
    return max(map(below, levels), key=lambda fails: noticed_less_refused(tried, fails))


def at_random(tried: Sequence[Tried], seed: int = 0) -> Callable[[Tried], bool]:
    """The same verdicts, dealt out to all programs in a random order."""
    verdicts = [not one.found.passed for one in tried]
    random.Random(seed).shuffle(verdicts)
    dealt = {id(one): verdict for one, verdict in zip(tried, verdicts, strict=True)}
    return lambda one: dealt[id(one)]


def runners(apart: bool) -> tuple[Callable[[Library], Runner], Callable[[], None]]:
    """A warm runner for each library, made when it is asked for, and what ends them all."""
    made: dict[Library, Warm] = {}

    def runner_of(library: Library) -> Warm:
        if library not in made:
            made[library] = (
                Warm(apart=apart) if library == "none" else Warm([module_of(library)], node_modules(), apart=apart)
            )
        return made[library]

    def close() -> None:
        for warm in made.values():
            warm.close()

    return runner_of, close


@experiment(
    "geojseval/faults-noticed",
    points={
        "smoke": [{"each": 2, "faults": "held out", "apart": False}],
        "small": [{"each": "all", "faults": "held out", "apart": False}],
        "full": [{"each": "all", "faults": "all", "apart": True}],
    },
    operator=Operator("telling right programs from wrong ones", free="likeness to the reference's text"),
    paper={"tasks": 432, "cases": 2071, "page": "a headless browser", "faults": "held out"},
    departures={
        "tasks": "assay's own sixty, for the published set lies on a hub that cannot be reached from everywhere; without OpenLayers",
        "cases": "about 200, with expected answers that no library gave",
        "page": "jsdom: the state of maps is seen, what is drawn is not",
        "faults": "at full scale all of them, in processes apart; the held-out half is told beside",
    },
    refuted_if="the whole interval lies below 0.95: right programs are refused, or faults pass",
    tolerance=0.0,
    measured_here="share of generated faults (held-out half) noticed, less that of right programs refused; the paper has no such figure",
    minutes=60,
    memory_gib=4,
)
def faults_noticed(each: int | str, faults: str, apart: bool) -> Figure:
    """Mutants noticed less right programs refused, tasks resampled.

    `each` is how many tasks of each library are taken. The controls: no comparison, so that only what does not return is noticed; the same
    verdicts dealt out at random; and likeness to the reference's text, at the level that serves it best.
    """
    chosen = [
        task
        for library in LIBRARIES
        for task in [one for one in tasks().values() if one.library == library][: None if each == "all" else int(each)]
    ]
    runner_of, close = runners(apart)
    try:
        every = try_all(chosen, runner_of, all_mutants=faults == "all")
    finally:
        close()
    tried = [one for one in every if not one.equal]
    fails = failed_where(lambda case, result: True)
    low, high = by_tasks(tried, fails)
    missed = [one for one in tried if one.mutant is not None and not fails(one)]
    held = [one for one in tried if one.mutant is None or one.mutant.held_out]
    return Figure(
        noticed_less_refused(tried, fails),
        "share",
        low,
        high,
        controls={
            "deleted": noticed_less_refused(tried, failed_where(did_not_return)),
            "random": noticed_less_refused(tried, at_random(tried)),
            "rival": noticed_less_refused(tried, by_similarity(tried)),
        },
        arms={
            "mutants that are as right counted as faults": noticed_less_refused(every, fails),
            "the held-out half": noticed_less_refused(held, fails),
            "the first case of each task alone": noticed_less_refused(
                tried, lambda one: not one.found.results[0].passed
            ),
            "without edge cases": noticed_less_refused(tried, failed_where(lambda case, result: not case.edge)),
            "texts and booleans compared with themselves": noticed_less_refused(
                tried,
                failed_where(lambda case, r: did_not_return(case, r) or case.out_type not in ("string", "boolean")),
            ),
        },
        details={
            "tasks": len(chosen),
            "cases": sum(len(task.cases) for task in chosen),
            "right programs": sum(one.mutant is None for one in tried),
            "refused": [f"{one.task.id}: {_first(one.found)}" for one in tried if one.mutant is None and fails(one)],
            "mutants": sum(one.mutant is not None for one in tried),
            "as right as their program": len(every) - len(tried),
            "missed": {f"{one.task.id}: {one.mutant.why}": one.mutant.rule for one in missed if one.mutant},
            "by rule": _by(tried, fails, lambda one: one.mutant.rule if one.mutant else ""),
            "by library": _by(tried, fails, lambda one: one.task.library),
            "how they fail": dict(
                Counter(next((r.error for r in one.found.results if not r.passed), "") for one in tried if one.mutant)
            ),
        },
    )


def _first(found: Judged) -> str:
    return next((result.why for result in found.results if not result.passed), "")


def _by(tried: Sequence[Tried], fails: Callable[[Tried], bool], name: Callable[[Tried], str]) -> dict[str, str]:
    """How many mutants of each kind were noticed."""
    wrong = [one for one in tried if one.mutant is not None]
    total, seen = Counter(map(name, wrong)), Counter(name(one) for one in wrong if fails(one))
    return {kind: f"{seen[kind]} of {many}" for kind, many in sorted(total.items())}


# ------------------------------------------------------------------------------------------------------ what models are weak in


def attempted(chosen: Sequence[Task], answers: Mapping[str, Sequence[Answer]]) -> dict[str, list[Attempt]]:
    """The answers of a model, judged on all cases."""
    runner_of, close = runners(False)
    try:
        return {
            task.id: [
                Attempt(
                    answer, judged(runner_of(task.library), answer.code, task.entry_point, task.parameters, task.cases)
                )
                for answer in answers[task.id]
            ]
            for task in chosen
        }
    finally:
        close()


def solved(attempts: Mapping[str, Sequence[Attempt]]) -> list[bool]:
    """Which tasks were solved in one round or more."""
    return [any(attempt.judged.passed for attempt in of_task) for of_task in attempts.values()]


def difference(plain: Sequence[bool], spatial: Sequence[bool], draws: int = 4000) -> tuple[float, float]:
    """The 95 % interval of the share of plain tasks solved less that of spatial ones, tasks of each kind resampled."""
    import numpy as np

    rng = np.random.default_rng(0)

    def means(values: Sequence[bool]) -> Any:
        return np.asarray(values, dtype=float)[rng.integers(0, len(values), (draws, len(values)))].mean(axis=1)

    low, high = np.quantile(means(plain) - means(spatial), [0.025, 0.975])
    return float(low), float(high)


@experiment(
    "geojseval/model-weaknesses",
    points={
        "smoke": [{"models": ["smollm2-135m"], "every": 30, "plain": 3, "rounds": 2, "tokens": 24}],
        "small": [{"models": ["smollm2-135m"], "every": 6, "plain": 10, "rounds": 5, "tokens": 96}],
        "full": [{"models": ["smollm2-135m"], "every": 1, "plain": 20, "rounds": 5, "tokens": 1024}],
    },
    operator=Operator("finding what models cannot do with maps", free="the same model's share of plain tasks"),
    paper={"models": "18, of billions of parameters", "tasks": 432, "rounds": 5, "temperature": 0.2, "tokens": 4096},
    departures={
        "models": "the one of 135 million parameters that comes with assay: it says nothing about large ones",
        "tokens": "answers are short functions; at small scale they end after 96, which a few references would not fit into",
    },
    refuted_if="a model that solves plain tasks is surely no weaker with maps: the interval of the difference has nothing above 0",
    refutes=lambda record: any(
        one["solved"]["plain"] > 0 and one["plain less maps"][1] <= 0 for one in record["details"]["models"].values()
    ),
    measured_here="of one small model, whether it solves fewer tasks on maps than plain ones; the paper's 18 models are not here",
    minutes=120,
    memory_gib=6,
)
def model_weaknesses(models: Sequence[str], every: int, plain: int, rounds: int, tokens: int) -> Figure:
    """How many of the models are clearly weaker with maps than in plain JavaScript, and their whole table.

    A model counts where the interval of the difference in pass@`rounds` (the share of tasks solved in one round or more) lies above 0.
    Plain tasks are easier in more than one way: shorter, and better known. That a small model does worse with a library that it hardly saw
    is to be expected; that it does not would speak against the claim. The figure has no baseline, so that no verdict in favour follows.
    """
    from assay.experiments.code.geojseval_model import draw
    from assay.workloads.models import load_model

    spatial, simple = list(tasks().values())[::every], list(plain_tasks().values())[:plain]
    details: dict[str, Any] = {}
    weak = 0
    for name in models:
        loaded = load_model(name)
        answers = draw(
            loaded.model, loaded.tokenizer, [*spatial, *simple], rounds=rounds, tokens=tokens, batch=50, seed=0
        )
        attempts = attempted([*spatial, *simple], answers)
        reports, ends = {}, {}
        for kind, chosen in (("maps", spatial), ("plain", simple)):
            own = {task.id: attempts[task.id] for task in chosen}
            reports[kind] = asdict(reported(own, ns=[n for n in NS if n <= rounds]))
            ends[kind] = solved(own)
        low, high = difference(ends["plain"], ends["maps"])
        weak += low > 0
        shares = {kind: sum(values) / len(values) for kind, values in ends.items()}
        details[name] = {"solved": shares, "plain less maps": [low, high], **reports}
    return Figure(float(weak), "models", float(weak), float(weak), details={"models": details})


# -------------------------------------------------------------------------------------------------------- what warm processes save


Job = tuple[str, str, list[Any]]
"""A program, its function, and the arguments of one case."""
ONE_REALM = """
async function all(jobs, anew) {
  const told = [], known = new Map();
  for (const [program, entry, given] of jobs) {
    try {
      let found = anew ? undefined : known.get(program);
      if (found === undefined) found = (0, eval)(`${program}\\n;${entry}`);
      known.set(program, found);
      told.push(["returned", await found(...given)]);
    } catch (error) {
      told.push(["raised", `${error.name}: ${error.message}`]);
    }
  }
  return told;
}
"""
LEAKS: tuple[tuple[str, str, list[list[Any]]], ...] = (
    ("let calls = 0;\nfunction count(n) { calls += 1; return n + calls; }", "count", [[1], [1], [5]]),
    ("function remember(n) { globalThis.kept = (globalThis.kept ?? 0) + n; return kept; }", "remember", [[2], [2]]),
    ("function sorted(list) { return sorted.cache ??= list.slice().sort(); }", "sorted", [[[2, 1]], [[4, 3]]]),
    ("function metres(a, b) { turf.distance = () => 1; return turf.distance(a, b); }", "metres", [[[0, 0], [1, 1]]]),
    ("function away(a, b) { return Math.round(turf.distance(a, b)); }", "away", [[[0, 0], [1, 1]], [[0, 0], [0, 2]]]),
    ("function first(list) { Array.prototype.at = () => 'mine'; return list.at(0); }", "first", [[[1, 2]]]),
    ("function last(list) { return list.at(-1); }", "last", [[[1, 2]], [[3]]]),
    ("function whole(x) { Math.floor = (y) => y; return Math.floor(x); }", "whole", [[1.5]]),
    ("function below(x) { return Math.floor(x); }", "below", [[2.5], [-0.5]]),
    ("function named(o) { Object.prototype.name = 'nobody'; return o.name; }", "named", [[{}]]),
    ("function nameOf(o) { return o.name === undefined ? 'none' : o.name; }", "nameOf", [[{}], [{"name": "x"}]]),
    ("function safe(o) { Object.freeze(Object.prototype); return Object.isFrozen({}); }", "safe", [[{}]]),
)
"""Programs that leave something behind, each before one that meets it where nothing keeps them apart; with Turf."""


def jobs_of(chosen: Sequence[Task]) -> list[Job]:
    """The references of tasks on their cases, those that ask for the state of an object left out."""
    return [
        (task.programs["reference"], task.entry_point, [case.params[name] for name in task.parameters])
        for task in chosen
        for case in task.cases
        if not case.looks
    ]


def told(runner: Runner, jobs: Sequence[Job]) -> list[tuple[State, Any]]:
    """How each job ended: its state, and its value or error."""
    ends = []
    for program, entry, given in jobs:
        [[outcome]] = runner.run(program, entry, [given])
        ends.append(_end(outcome))
    return ends


def _end(outcome: Outcome) -> tuple[State, Any]:
    return outcome.state, outcome.value if outcome.state == "returned" else outcome.error


def in_one_realm(library: Library, jobs: Sequence[Job], *, anew: bool) -> list[tuple[State, Any]]:
    """All jobs in one process and one realm; `anew` evaluates the program again for each of its cases."""
    with NodeWorkers(modules=[module_of(library)], node_modules=node_modules(), keep=1) as workers:
        [[outcome]] = workers.run(ONE_REALM, "all", [[[list(job) for job in jobs], anew]])
    if outcome.state != "returned":
        return [("crashed", outcome.error)] * len(jobs)
    return [(state, value) for state, value in outcome.value]


def same_ends(ends: Sequence[tuple[State, Any]], right: Sequence[tuple[State, Any]]) -> float:
    """The share of jobs that ended as they should."""
    return sum(_plain(one) == _plain(other) for one, other in zip(ends, right, strict=True)) / len(right)


def _plain(end: tuple[State, Any]) -> tuple[State, Any]:
    """Numbers to twelve digits, for JSON may write the last one otherwise."""
    return end[0], _rounded(end[1])


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.12g}") if math.isfinite(value) else repr(value)
    if isinstance(value, list):
        return [_rounded(item) for item in value]
    if isinstance(value, Mapping):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, bool):
        return repr(value)  # which is no number
    return float(value) if isinstance(value, int) else value


@experiment(
    "geojseval/warm-speedup",
    points={
        "smoke": [{"library": "turf", "programs": 1}],
        "small": [{"library": "turf", "programs": 3}],
        "full": [{"library": library, "programs": 100} for library in LIBRARIES],
    },
    decides={"small": {"library": "turf", "programs": 3}, "full": {"library": "turf", "programs": 100}},
    operator=Operator("judging JavaScript case by case, none seeing another", free="a Node started for each case"),
    paper={"runner": "node, started for each case", "library": "turf"},
    guard=Guard(
        "share of runs that end as in a process of their own",
        0.01,
        higher_is_better=True,
        relative=False,
    ),
    refuted_if="warm processes take as long as a process a case, or cases see what others left",
    minutes=30,
    memory_gib=4,
)
def warm_speedup(library: Library, programs: int) -> Trial:
    """Cases of references in warm processes against a Node for each case, both in the sandbox, starting included.

    The arms show what isolation costs: a warm process for each program, and one realm for all. The guard runs programs that leave things
    behind among others, and compares how all end with how they end in processes of their own. Deleted: one realm in which each program is
    evaluated once. Rival: one realm, each program evaluated anew for each case. Random: the right ends in a random order.
    """
    chosen = [task for task in tasks().values() if task.library == library][:programs]
    jobs = jobs_of(chosen)
    folder = node_modules()
    alone = OneProcess(modules=[module_of(library)], node_modules=folder)

    def warm(given: Sequence[Job], *, apart: bool = False, of: Library = library) -> list[tuple[State, Any]]:
        with Warm([module_of(of)], folder, apart=apart) as runner:
            return told(runner, given)

    leaks: list[Job] = [(program, entry, given) for program, entry, cases in LEAKS for given in cases]

    def isolation() -> Quality:
        right = told(OneProcess(modules=[module_of("turf")], node_modules=folder), leaks)
        shuffled = random.Random(0).sample(right, len(right))
        return Quality(
            same_ends(warm(leaks, of="turf"), right),
            1.0,
            controls={
                "deleted": same_ends(in_one_realm("turf", leaks, anew=False), right),
                "random": same_ends(shuffled, right),
                "rival": same_ends(in_one_realm("turf", leaks, anew=True), right),
            },
            rival="one realm for all, each program evaluated anew for each case",
        )

    def details() -> dict[str, Any]:
        right = told(alone, jobs)
        return {
            "programs": len(chosen),
            "cases": len(jobs),
            "cases that end alike": same_ends(warm(jobs), right),
            "programs that leave something": len(LEAKS),
        }

    return Trial(
        baseline=lambda: told(alone, jobs),
        candidate=lambda: warm(jobs),
        arms={
            "a warm process for each program": lambda: warm(jobs, apart=True),
            "one realm for all, nothing kept apart": lambda: in_one_realm(library, jobs, anew=False),
        },
        quality=isolation,
        details=details,
        pairs=12,
    )
