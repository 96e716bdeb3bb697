"""What COFFE's contracts do to stress inputs, of one task of the bank after another: how many are valid, and what they tell apart.

Contracts are mined from the inputs of HumanEval's own tests, so that those tests pass with them by construction: the paper's rule of
acceptance says nothing here. The bank's hand-written contract, which nothing here sees, says which stress inputs are valid.
The same generator and budget serve every arm. What each program costs on an arm's inputs is measured in turns.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from assay.methods.code.coffe import (
    MANNERS,
    Doubling,
    ObservedContracts,
    Problem,
    accepting,
    cost_of_runs,
    evaluated,
    holds,
    mine,
    observed,
    parameters,
    passing,
    relative_deviation,
    stress,
    through,
    value_here,
)
from assay.methods.core.programs.judging import judge, measure_all, observed_cases
from assay.methods.core.programs.workers import Outcome, Workers
from assay.methods.core.sandbox import Limits
from assay.workloads.programs.task import Task

CONTRACTS, DELETED, RANDOM, DOUBLED, DEAREST, TESTS, WORST = (
    "contracts", "no contracts", "random", "doubled", "contracts, dearest of all", "original tests", "hand-made worst cases",
)  # fmt: skip
ARMS: dict[str, tuple[Sequence[str], bool]] = {
    CONTRACTS: (MANNERS, True),
    DELETED: (MANNERS, False),
    RANDOM: (("random",), False),
    DOUBLED: (("repeated",), False),
}
"""The manners of the generator, and whether contracts filter. Without them an input is accepted when the right program ends on it."""
CANONICAL, AGAIN = "canonical", "canonical, run again"
"""HumanEval's own solution, and the same text measured as if it were another program: what that differs by is chance."""
RATED = 20
"""Inputs of an arm that are rated valid or not, but for smoke; programs are measured on the first ones."""
OTHERS = 3
"""Inputs of the arms beside the paper's that programs are measured on."""
CUT = ("time", "memory")
PROPOSALS = 60
"""Inputs of up to a hundred elements on which mined contracts are compared with the hand-written one."""
APART = 1.5
"""Two programs differ when their costs on the hand-made worst cases do, by this factor."""


@dataclass(frozen=True)
class Seen:
    """What was seen of one task.

    `valid` says of each arm's inputs whether the hand-written contract allows them; `agree` which share of the right programs returned on
    each what the canonical one did. `costs` are by arm and program (`AGAIN` among them), a number each input: infinite where the program
    did not return.
    `strict` are counts of proposals: (valid, valid and refused by the mined contracts, invalid, invalid and let through). `deviation` is
    by how much the meter differed from run to run, by arm; `at_stake` is that of `at_stake`.
    """

    task: str
    contracts: tuple[str, ...]
    valid: Mapping[str, Sequence[bool]]
    agree: Mapping[str, Sequence[float]]
    proposed: Mapping[str, int]
    costs: Mapping[str, Mapping[str, Sequence[float]]]
    right: frozenset[str]
    programs: tuple[str, ...]
    strict: tuple[int, int, int, int]
    deviation: Mapping[str, float]
    at_stake: bool

    def problem(self, arm: str, reference: str = CANONICAL) -> Problem | None:
        """The task's programs, but for the reference, as samples on an arm's inputs; None where the arm has none."""
        costs = self.costs[arm]
        if not costs or not costs[reference]:
            return None
        names = [name for name in self.programs if name != reference]
        return Problem(costs[reference], [costs[name] if name in self.right else None for name in names])


def is_valid(task: Task, args: Sequence[Any]) -> bool:
    """Whether the hand-written contract allows the arguments."""
    try:
        task.check(*args)
    except (AssertionError, ValueError, TypeError, IndexError, AttributeError):
        return False
    return True


def seen_of(
    task: Task,
    *,
    scale: int,
    seconds: float,
    repeats: int,
    wanted: int,
    level: int,
    meter: str = "cpu_seconds",
    rated: int = RATED,
) -> Seen:
    """Mine contracts, make every arm's inputs, and measure all programs of the task on them.

    `scale` is that of the generator, `seconds` the limit of one run, `level` that of the hand-made worst cases. So many inputs of an arm
    are `rated`, and programs are measured on the first `wanted`.
    """
    limits = Limits(wall_seconds=4 * seconds + 2, cpu_seconds=seconds, memory_mib=1024)
    programs = {**task.programs, **{f"wrong: {name}": text for name, text in task.wrong.items()}}
    with Workers(meter, limits=limits, packages=False) as workers:
        tests = observed_cases(workers, task.programs[CANONICAL], task.entry_point, task.test)
        made = inputs_of(task, workers, tests, scale=scale, wanted=max(wanted, rated))
        few = min(OTHERS, wanted)
        right = right_of(workers, task, programs, [*tests, *(task.arguments(0, number) for number in range(10))])
        inputs = {
            **{arm: found[: wanted if arm == CONTRACTS else few] for arm, found in made.inputs.items()},
            DEAREST: dearest(workers, task, made.inputs[CONTRACTS])[:few],
            TESTS: tests[:wanted],
            WORST: [task.arguments(level, number) for number in range(few)],
        }
        kept = {name: programs[name] for name in sorted(right)} | {AGAIN: programs[CANONICAL]}
        ran = {
            arm: measure_all(workers, task.entry_point, kept, cases, repeats=repeats) for arm, cases in inputs.items()
        }
    return Seen(
        task.id,
        made.contracts,
        {arm: [is_valid(task, args) for args in found] for arm, found in made.inputs.items()},
        {arm: _agreeing(task, found, len(inputs[arm])) for arm, found in ran.items()},
        made.proposed,
        {arm: _costs(found) for arm, found in ran.items()},
        right,
        tuple(programs),
        strictness(task, tests, made.contracts),
        {arm: _deviation(found) for arm, found in ran.items() if inputs[arm]},
        at_stake(task, tests),
    )


def at_stake(task: Task, tests: Sequence[tuple[Any, ...]]) -> bool:
    """Whether contracts can matter: the hand-written one refuses some proposal that nobody filtered, and no input of the tests.

    Where HumanEval's own tests break what its text promises, an assert of that is no contract by the paper's rule, and nobody is judged.
    """
    return all(is_valid(task, args) for args in tests) and strictness(task, tests, ())[2] > 0


@dataclass(frozen=True)
class Made:
    """The contracts that were mined, and of each arm the accepted inputs and how many different ones were proposed."""

    contracts: tuple[str, ...]
    inputs: Mapping[str, list[tuple[Any, ...]]]
    proposed: Mapping[str, int]


def inputs_of(task: Task, workers: Workers, tests: Sequence[tuple[Any, ...]], *, scale: int, wanted: int) -> Made:
    """Contracts mined from the inputs of a task's tests, and every arm's stress inputs."""
    canonical, run = task.programs[CANONICAL], through(workers)
    miner = ObservedContracts(canonical, task.entry_point, tests)
    contracts = mine(miner, canonical, passing(run, task.test, task.entry_point), examples=tests)
    inputs, proposed = {}, {}
    for arm, (manners, filtered) in ARMS.items():
        code = contracts.code if filtered else canonical
        found = stress(
            Doubling(tests, scale=scale, manners=manners),
            code,
            [observed(args) for args in tests],
            accepting(run, code, task.entry_point),
            wanted=wanted,
        )
        inputs[arm] = [args for args in evaluated(run, found.inputs) if args is not None]
        proposed[arm] = found.proposed
    return Made(contracts.accepted, inputs, proposed)


def dearest(workers: Workers, task: Task, cases: Sequence[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
    """Of the inputs those that the canonical program spends most on, in one run each: what more selection than the paper's would give."""
    costs = [row[0].cost or 0.0 for row in workers.run(task.programs[CANONICAL], task.entry_point, cases)]
    best = sorted(range(len(cases)), key=lambda n: -costs[n])[:OTHERS]
    return [cases[n] for n in best]


def right_of(
    workers: Workers, task: Task, programs: Mapping[str, str], cases: Sequence[Sequence[Any]]
) -> frozenset[str]:
    """The programs that return what the canonical one returns on every case."""
    runs = {name: [row[0] for row in workers.run(text, task.entry_point, cases)] for name, text in programs.items()}
    expected = [one.value for one in runs[CANONICAL]]
    return frozenset(name for name in programs if judge(expected, runs[name], task.compare).right)


def _costs(ran: Mapping[str, list[list[Outcome]]]) -> dict[str, list[float]]:
    """Costs by program, one an input; infinite where it did not return."""
    return {
        name: [cost_of_runs([math.inf if one.cost is None else one.cost for one in runs]) for runs in of_cases]
        for name, of_cases in ran.items()
    }


def _deviation(ran: Mapping[str, list[list[Outcome]]]) -> float:
    """`relative_deviation` of all runs that returned every time and cost something."""
    costs = [[one.cost for one in runs if one.cost] for of_cases in ran.values() for runs in of_cases]
    kept = [row for row in costs if len(row) > 1]
    return relative_deviation(kept) if kept else 0.0


def _agreeing(task: Task, ran: Mapping[str, list[list[Outcome]]], cases: int) -> list[float]:
    """Of the right programs that were not cut on an input, the share that ended as the canonical one did, input by input."""
    found = []
    for number in range(cases):
        expected = ran[CANONICAL][number][0]
        others = [of_cases[number][0] for name, of_cases in ran.items() if name not in (CANONICAL, AGAIN)]
        ended = [one for one in others if one.state not in CUT]
        if expected.state == "returned" and ended:
            found.append(mean([judge([expected.value], [one], task.compare).right for one in ended]))
    return found


def strictness(task: Task, tests: Sequence[tuple[Any, ...]], contracts: Sequence[str]) -> tuple[int, int, int, int]:
    """Mined contracts against the hand-written one on proposals that nothing filtered (`Seen.strict`)."""
    names = parameters(task.programs[CANONICAL], task.entry_point)
    valid = refused = invalid = passed = 0
    for one in Doubling(tests, scale=100, seed=1).proposals(PROPOSALS):  # the miner's probes have another seed
        args = value_here(one)
        kept = all(holds(text, names, args) for text in contracts)
        if is_valid(task, args):
            valid, refused = valid + 1, refused + (not kept)
        else:
            invalid, passed = invalid + 1, passed + kept
    return valid, refused, invalid, passed


# -------------------------------------------------------------------------------------------------------------------- of all tasks


def valid_share(found: Sequence[Seen], arm: str) -> float:
    """The mean over tasks of the share of an arm's accepted inputs that are valid; where none was accepted, none is."""
    return mean([sum(one.valid[arm]) / len(one.valid[arm]) if one.valid[arm] else 0.0 for one in found])


def agreement(found: Sequence[Seen], arm: str) -> float:
    """The mean over tasks of the share of right programs that agree with the canonical one on an arm's inputs (`Seen.agree`)."""
    return mean([mean(one.agree[arm]) for one in found if one.agree[arm]])


@dataclass(frozen=True)
class Separation:
    """Pairs of right programs that differ on the hand-made worst cases: the geometric mean of the slower one's cost over the faster one's,
    the share of pairs in the wrong order, and how many pairs there are."""

    ratio: float
    wrong_order: float
    pairs: int


def separation(found: Sequence[Seen], arm: str) -> Separation:
    """How far an arm's inputs tell apart what the hand-made worst cases do.

    A run that was cut counts as the dearest one that ended on an input of that arm: a lower bound, in any unit.

    The mean over tasks of the mean over pairs, so that tasks with many programs do not decide.
    """
    logs, wrong, pairs = [], [], 0
    for one in found:
        if not one.costs[arm] or not one.costs[arm][CANONICAL]:
            continue
        spent = {name: _spent(one.costs[name]) for name in {arm, WORST}}
        ratios = []
        for a, b in combinations(sorted(one.right), 2):
            truth = spent[WORST][a] / spent[WORST][b]
            if max(truth, 1 / truth) < APART:
                continue
            ratio = spent[arm][a] / spent[arm][b]
            ratios.append(math.log(ratio if truth > 1 else 1 / ratio))
        if ratios:
            logs.append(mean(ratios))
            wrong.append(mean([log < 0 for log in ratios]))
            pairs += len(ratios)
    return Separation(math.exp(mean(logs)), mean(wrong), pairs) if logs else Separation(1.0, 0.0, 0)


def _spent(costs: Mapping[str, Sequence[float]]) -> dict[str, float]:
    most = max((cost for row in costs.values() for cost in row if math.isfinite(cost)), default=1.0)
    return {name: max(sum(min(cost, most) for cost in row), 1e-9) for name, row in costs.items()}


def not_strict(found: Sequence[Seen]) -> dict[str, float]:
    """Of proposals that nobody filtered: how many are valid, and how mined contracts err on either kind."""
    valid, refused, invalid, passed = (sum(one.strict[n] for one in found) for n in range(4))
    return {
        "valid share of unfiltered proposals": valid / (valid + invalid),
        "valid ones that mined contracts refuse": refused / max(valid, 1),
        "invalid ones that they let through": passed / max(invalid, 1),
    }


def mean(values: Sequence[float]) -> float:
    """The mean; 0 of nothing."""
    return sum(values) / len(values) if values else 0.0
