"""COFFE: how far efficient@1 lies below pass@1, on stress inputs that keep contracts.

Judged are HumanEval's own solutions, written for being right, in place of a language model's samples: all of them pass. The reference is
the cheapest right program of the bank, as the paper takes the cheapest of all it collected; but which one that is other inputs say (the
bank's hand-made worst cases), for of several that cost the same the cheapest by the same runs is the luckiest one. What the figure owes to
the reference stands beside it: one at random, none of those that were written to be fast, and the solution itself, run again: by the strict
rule chance makes it inefficient half of the time. Contracts are mined from HumanEval's tests
and inputs made by doubling those, both without a model. What guards the figure is that the inputs are valid: on invalid ones right
programs fail, and are called inefficient for nothing. What contracts do to inputs, and what these tell apart, is in the details, from
`coffe_inputs`; so are the bank's programs as samples against HumanEval's solutions, the reference of the paper's function level.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from assay.experiments.code.coffe_inputs import (
    AGAIN,
    ARMS,
    CANONICAL,
    CONTRACTS,
    DEAREST,
    DELETED,
    DOUBLED,
    RANDOM,
    TESTS,
    WORST,
    Seen,
    agreement,
    at_stake,
    mean,
    not_strict,
    seen_of,
    separation,
    valid_share,
)
from assay.experiments.core import Figure, Guard, Operator, Quality, experiment
from assay.methods.code.coffe import (
    RUNS,
    SCALE,
    TOLERANCE,
    Problem,
    Scores,
    best_solution,
    efficient_at_k,
    passed_at_k,
    score,
)
from assay.methods.core.programs.estimates import interval
from assay.methods.core.programs.hypotheses import wilson
from assay.methods.core.programs.judging import observed_cases
from assay.methods.core.programs.workers import Workers
from assay.workloads.programs.task import Task, bank

FAR = 0.25
"""Our reading of "far below": a quarter of what passes is not efficient."""
MARGIN = 0.1
"""Of the inputs, how many may be invalid."""
CLEARLY = 1.25
"""Solutions that cost so many times as much as the best known one are slower by more than a meter's chance."""
WANTED = 5
KS = (1, 3)


def seen(tasks: int, **settings: Any) -> list[Seen]:
    """`seen_of` so many of the bank's tasks (0: all). Half of them are those where contracts can matter (`at_stake`), as far as there are
    any; either half is spread evenly over the bank."""
    known = [task for task in bank().values() if CANONICAL in task.programs and task.test]
    with Workers(packages=False) as workers:
        tests = [observed_cases(workers, task.programs[CANONICAL], task.entry_point, task.test) for task in known]
    matter = [at_stake(task, inputs) for task, inputs in zip(known, tests, strict=True)]
    first = _spread([task for task, it in zip(known, matter, strict=True) if it], -(-tasks // 2))
    rest = _spread([task for task, it in zip(known, matter, strict=True) if not it], tasks - len(first))
    return [seen_of(task, **settings) for task in (known if not tasks else [*first, *rest])]


def _spread(tasks: list[Task], number: int) -> list[Task]:
    number = min(number, len(tasks))
    return [tasks[n * len(tasks) // number] for n in range(number)]


def problems(
    found: Sequence[Seen], arm: str = CONTRACTS, *, chosen_on: str = "", without: Sequence[str] = ()
) -> list[Problem]:
    """HumanEval's own solution as the one sample of each task, against the best known right program of the bank, on an arm's inputs.

    That is the one which costs least on the inputs of another arm, `chosen_on` (the hand-made worst cases; for these the paper's inputs),
    `without` the programs named. Tasks where no other program ended on all inputs of both, or that have no inputs, are left out.
    """
    chosen_on = chosen_on or (CONTRACTS if arm == WORST else WORST)
    listed = []
    for one in found:
        costs = {name: one.costs[chosen_on][name] for name in others(one, arm) if name not in without}
        ended = {name: row for name, row in costs.items() if len(row) and sum(row) < math.inf}
        if ended:
            listed.append(Problem(one.costs[arm][best_solution(ended)], [one.costs[arm][CANONICAL]]))
    return listed


def others(one: Seen, arm: str) -> list[str]:
    """The right programs of the bank that ended on all of an arm's inputs."""
    rows = {name: row for name, row in one.costs[arm].items() if name not in (CANONICAL, AGAIN)}
    return [name for name, row in rows.items() if len(row) and 0 < sum(row) < math.inf]


def against_all(found: Sequence[Seen]) -> float:
    """The share of inefficient solutions with a right program at random as the reference, every one of equal chance."""
    shares = []
    for one in found:
        known = [
            Problem(one.costs[CONTRACTS][name], [one.costs[CONTRACTS][CANONICAL]]) for name in others(one, CONTRACTS)
        ]
        if known:
            shares.append(below(known))
    return mean(shares)


def against_itself(found: Sequence[Seen], arm: str = CONTRACTS) -> list[Problem]:
    """HumanEval's own solution against the same text, measured as if it were another program."""
    rows = [(one.costs[arm][AGAIN], one.costs[arm][CANONICAL]) for one in found if AGAIN in one.costs[arm]]
    return [its for again, row in rows if len(again) and (its := Problem(again, [row])).usable]


def bank_problems(found: Sequence[Seen]) -> list[Problem]:
    """The bank's right and wrong programs as samples, against HumanEval's own solution."""
    return [its for one in found if (its := one.problem(CONTRACTS)) is not None and its.usable]


def below(listed: Sequence[Problem], *, tolerance: float | None = None) -> float:
    """The share of what passes that is not efficient: 1 - efficient@1 / pass@1."""
    return 1 - efficient_at_k(listed, tolerance=tolerance) / passed_at_k(listed)


def quality_of(found: Sequence[Seen]) -> Quality:
    """The share of valid inputs among the accepted ones, of the tasks where contracts can matter; tasks are drawn anew."""
    found = [one for one in found if one.at_stake]
    low, high = interval(found, lambda drawn: valid_share(drawn, CONTRACTS))
    return Quality(
        valid_share(found, CONTRACTS),
        1.0,
        low,
        high,
        controls={"deleted": valid_share(found, DELETED), "random": valid_share(found, RANDOM), "rival": valid_share(found, DOUBLED)},
        rival="the inputs of the tests repeated to the same size, without contracts",
    )  # fmt: skip


def shown(found: Sequence[Seen]) -> dict[str, Any]:
    """What contracts do, arm by arm, and every other reading of the figure."""
    arms = [*ARMS, DEAREST, TESTS, WORST]
    apart = {arm: separation(found, arm) for arm in arms}
    matter = [one for one in found if one.at_stake]
    own, others = score(problems(found)), score(bank_problems(found), ks=KS)
    return {
        "tasks": len(found),
        "tasks_where_contracts_can_matter": [one.task for one in matter],
        "valid_share_of_accepted_inputs_there": {arm: valid_share(matter, arm) for arm in ARMS},
        "right_programs_that_agree_on_them_there": {arm: agreement(matter, arm) for arm in arms},
        "valid_share_of_accepted_inputs": {arm: valid_share(found, arm) for arm in ARMS},
        "right_programs_that_agree_on_them": {arm: agreement(found, arm) for arm in arms},
        "accepted_inputs_a_task": {arm: mean([len(one.valid[arm]) for one in found]) for arm in ARMS},
        "proposed_inputs_a_task": {arm: mean([one.proposed[arm] for one in found]) for arm in ARMS},
        "mined_against_hand_written": not_strict(found),
        "contracts": {one.task: list(one.contracts) for one in found},
        "cost_of_the_slower_over_the_faster": {arm: one.ratio for arm, one in apart.items()},
        "pairs_in_the_wrong_order": {arm: one.wrong_order for arm, one in apart.items()},
        "pairs": apart[CONTRACTS].pairs,
        "meter_differs_from_run_to_run": {
            arm: mean([one.deviation[arm] for one in found if arm in one.deviation]) for arm in (TESTS, CONTRACTS)
        },
        "solutions_called_inefficient_against_themselves": {
            arm: {f"beyond {limit:g} times": below(its, tolerance=limit) for limit in (1.0, TOLERANCE, CLEARLY)}
            for arm in (TESTS, CONTRACTS)
            if (its := against_itself(found, arm))
        },
        "tasks_with_a_reference": {arm: len(problems(found, arm)) for arm in arms},
        "humaneval_solutions": of_scores(own),
        "programs_of_the_bank_against_humaneval_solutions": of_scores(others),
    }


def of_scores(scores: Scores) -> dict[str, Any]:
    """A row of scores, by k, with whom speed-up is silent about."""
    return {
        "pass_at_k": dict(scores.passed),
        "efficient_at_k": dict(scores.efficient),
        "efficient_at_k_within_one_per_cent": dict(scores.within_tolerance),
        "speedup_ratio_of_sums": scores.speedup.ratio_of_sums,
        "speedup_geometric_mean": scores.speedup.geometric_mean,
        "samples_in_no_speedup": {
            "wrong": scores.speedup.wrong,
            "cut": scores.speedup.cut,
            "unseen": scores.speedup.unseen,
        },
        "tasks": scores.problems,
    }


# ---------------------------------------------------------------------------------------------------------------- experiments

PROGRAMS = Operator(
    "the judgement whether a generated program is efficient",
    free="the same judgement on the tests that HumanEval has, without stress inputs",
)
PAPER: dict[str, Any] = {
    "samples": "14 language models", "reference": "cheapest collected, by the same runs", "problems": 756, "scale": SCALE,
    "wanted": WANTED, "repeats": RUNS, "seconds": 50.0, "meter": "hardware instructions", "writer": "a language model",
}  # fmt: skip
DEPARTURES = {
    "samples": "HumanEval's own solutions, one a task: no model that runs here solves enough of these tasks",
    "reference": "which of the bank's programs is the cheapest the hand-made worst cases say, so that chance does not choose the luckiest; "
    "each task has one that was written to be fast",
    "problems": "the tasks of the bank, which have hand-written contracts to judge mined ones by, half of them such that inputs can break; "
    "function level only",
    "scale": "smaller at small, so that all arms fit into five minutes",
    "repeats": "fewer at small; one dropped on each side as in the paper",
    "seconds": "a run is cut much earlier; the generator halves sizes for it",
    "meter": "processor seconds: virtual machines have no counters, and to count instructions by simulation would take days",
    "writer": "contracts mined from observed inputs, inputs by doubling: no model takes part. What the miner looks for we chose, knowing "
    "such tasks",
}
POINTS: dict[str, list[dict[str, Any]]] = {
    "smoke": [
        {
            "tasks": 3,
            "scale": 100,
            "seconds": 0.1,
            "repeats": 3,
            "level": 1,
            "meter": "cpu_seconds",
            "wanted": 2,
            "rated": 5,
        }
    ],
    "small": [
        {"tasks": 12, "scale": 1000, "seconds": 0.5, "repeats": 3, "level": 2, "meter": "cpu_seconds", "wanted": WANTED}
    ],
    "full": [
        {
            "tasks": 0,
            "scale": SCALE,
            "seconds": 2.0,
            "repeats": RUNS,
            "level": 3,
            "meter": "cpu_seconds",
            "wanted": WANTED,
        }
    ],
}


@experiment(
    "coffe/efficient-at-1",
    points=POINTS,
    operator=PROGRAMS,
    guard=Guard(
        "share of stress inputs that are valid, of tasks where contracts can matter",
        MARGIN,
        higher_is_better=True,
        relative=False,
    ),
    paper=PAPER,
    departures=DEPARTURES,
    refuted_if="fewer than a quarter of the solutions that pass cost as much as the best known one, or more",
    measured_here="the share of passing solutions that are not efficient, of HumanEval's own, written by people for being right, in place "
    "of a language model's; the best known ones are the project's own",
    minutes=600,
)
def efficient_at_1(tasks: int, **settings: Any) -> Figure:
    """1 - efficient@1 / pass@1 of HumanEval's own solutions against the best known ones, on stress inputs that keep mined contracts.

    No gain is a quarter, our reading of "far below". The interval is Wilson's over tasks. `free` is the same judgement on the inputs of
    HumanEval's tests. Arms: other inputs, other references, and tolerances by which a tie is efficient.
    """
    found = seen(tasks, **settings)
    listed, on_tests = problems(found), problems(found, TESTS)
    slower = wilson(sum(not efficient_at_k([one]) for one in listed), len(listed))
    arms = {
        **{arm: problems(found, arm) for arm in (DELETED, RANDOM, DOUBLED, DEAREST, WORST)},
        "the reference the cheapest by the same runs": problems(found, chosen_on=CONTRACTS),
        "the reference none that was written to be fast": problems(found, without=("expert",)),
        "the reference the solution itself": against_itself(found),
        "programs of the bank against HumanEval's solutions": bank_problems(found),
    }
    tolerant = {f"beyond {limit:g} times the best": below(listed, tolerance=limit) for limit in (TOLERANCE, CLEARLY)}
    return Figure(
        slower.median,
        "share",
        low=slower.low,
        high=slower.high,
        baseline=FAR,
        free=below(on_tests) if on_tests else None,
        arms={name: below(its) for name, its in arms.items() if its}
        | tolerant
        | {"the reference a right program at random": against_all(found)},
        quality=quality_of(found),
        details=shown(found),
    )
