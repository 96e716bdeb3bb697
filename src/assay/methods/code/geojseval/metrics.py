"""Figures over rounds of a model's answers: pass@n as the paper counts it and without bias, stability, kinds of errors, resources."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from assay import checks
from assay.methods.code.geojseval.answers import Answer
from assay.methods.code.geojseval.running import ERRORS, Judged
from assay.methods.core.programs.estimates import pass_at_k

NS = (1, 3, 5)
"""The rounds of the paper's pass@n."""


@dataclass(frozen=True)
class Attempt:
    """A model's answer to a task in one round, and what became of it."""

    answer: Answer
    judged: Judged


@dataclass(frozen=True)
class Report:
    """What a model did. Shares are of tasks unless they say of cases.

    `first` is the paper's pass@n: a task counts where one of its first n rounds solved it. `unbiased` is pass@n as a model's own figure,
    over all choices of n rounds: say which one a table uses. `cases` is `first` over single cases, edge cases left out, and `edges` the
    share of edge cases passed, over all rounds; None where there are none. `cv` and `stable` are of `first` (`variation`,
    `stability_adjusted`). `errors` are shares of the failed cases that are no edge cases, and add to 1, or are all 0. `tokens`, `seconds`
    and `lines` are means of an answer, None where they are not known, and `per` is the first pass@n over each of them (our reading of
    "efficiency").
    """

    tasks: int
    rounds: int
    first: dict[int, float]
    unbiased: dict[int, float]
    cases: dict[int, float]
    edges: float | None
    cv: float
    stable: float
    errors: dict[str, float]
    tokens: float | None
    seconds: float | None
    lines: float
    per: dict[str, float]


def first_n(solved: Sequence[Sequence[bool]], n: int) -> float:
    """The share of tasks that one of the first n rounds solved; solved[task][round].

    It depends on the order of the rounds. Raises ValueError for no tasks, and for a task with fewer rounds.

    >>> first_n([[False, True, False], [False, False, False]], 1), first_n([[False, True, False], [False, False, False]], 3)
    (0.0, 0.5)
    """
    _check(solved, n)
    return sum(any(rounds[:n]) for rounds in solved) / len(solved)


def unbiased(solved: Sequence[Sequence[bool]], n: int) -> float:
    """The mean over tasks of the chance that one of n rounds, drawn from all, solved it (`estimates.pass_at_k`).

    >>> round(unbiased([[False, True, False]], 1), 3), unbiased([[False, True, False]], 3)
    (0.333, 1.0)
    """
    _check(solved, n)
    return math.fsum(pass_at_k(len(rounds), sum(rounds), n) for rounds in solved) / len(solved)


def _check(solved: Sequence[Sequence[bool]], n: int) -> None:
    if not solved:
        raise ValueError("solved must hold one task or more, got none")
    fewest = min(map(len, solved))
    if checks.whole("n", n, low=1) > fewest:
        raise ValueError(f"n must be at most the number of rounds, {fewest}, got {n}")


def variation(rates: Sequence[float]) -> float:
    """CV, the standard deviation of rates (of all of them, not of a sample) over their mean; 0 where all are 0.

    >>> variation([0.5, 0.5, 0.5]), variation([0.0, 0.0]), round(variation([0.2, 0.4, 0.6]), 3)
    (0.0, 0.0, 0.408)
    """
    if not rates:
        raise ValueError("rates must be one or more, got none")
    values = [checks.number("rates", rate, low=0) for rate in rates]
    mean = math.fsum(values) / len(values)
    if mean == 0:
        return 0.0
    return math.sqrt(math.fsum((value - mean) ** 2 for value in values) / len(values)) / mean


def stability_adjusted(last: float, cv: float) -> float:
    """SA, the last pass@n over 1 + CV: what is left of it where the rounds agree little.

    >>> stability_adjusted(0.6, 0.0), stability_adjusted(0.6, 0.5)
    (0.6, 0.39999999999999997)
    """
    return checks.number("last", last, low=0, high=1) / (1 + checks.number("cv", cv, low=0))


def error_shares(judged: Sequence[Judged]) -> dict[str, float]:
    """The share of each kind among failed cases that are no edge cases. All are 0 where none failed."""
    found = Counter(result.error for one in judged for result in one.results if not result.passed and not result.edge)
    total = sum(found.values())
    return {kind: found[kind] / total if total else 0.0 for kind in ERRORS}


def reported(attempts: Mapping[str, Sequence[Attempt]], *, ns: Sequence[int] = NS) -> Report:
    """The figures of one model, from its attempts by task, round by round.

    Raises ValueError for no tasks, for tasks with other numbers of rounds, for rounds of a task that were judged on other numbers of cases
    (as `judged` with `stop` does), and for an n above the rounds: it is not lowered silently.
    """
    if not attempts or not ns:
        raise ValueError("attempts and ns must hold one or more, got none")
    rounds = {len(of_task) for of_task in attempts.values()}
    if len(rounds) > 1:
        raise ValueError(f"attempts must have the same number of rounds for every task, got {sorted(rounds)}")
    for name, of_task in attempts.items():
        if len(sizes := {len(attempt.judged.results) for attempt in of_task}) > 1:
            raise ValueError(f"attempts at {name} must be judged on the same cases, got {sorted(sizes)} of them")
    tasks = [[attempt.judged for attempt in of_task] for of_task in attempts.values()]
    every = [judged for of_task in tasks for judged in of_task]
    answers = [attempt.answer for of_task in attempts.values() for attempt in of_task]
    solved = [[judged.passed for judged in of_task] for of_task in tasks]
    cases = [
        [judged.results[n].passed for judged in of_task]
        for of_task in tasks
        for n, result in enumerate(of_task[0].results)
        if not result.edge
    ]
    edges = [result.passed for judged in every for result in judged.results if result.edge]
    first = {n: first_n(solved, n) for n in ns}
    cv = variation(list(first.values()))
    means: dict[str, float | None] = {
        "tokens": _mean([answer.tokens for answer in answers]),
        "seconds": _mean([answer.seconds for answer in answers]),
        "lines": _mean([float(answer.lines) for answer in answers]),
    }
    return Report(
        tasks=len(tasks),
        rounds=rounds.pop(),
        first=first,
        unbiased={n: unbiased(solved, n) for n in ns},
        cases={n: first_n(cases, n) for n in ns} if cases else {},
        edges=sum(edges) / len(edges) if edges else None,
        cv=cv,
        stable=stability_adjusted(first[ns[-1]], cv),
        errors=error_shares(every),
        tokens=means["tokens"],
        seconds=means["seconds"],
        lines=means["lines"] or 0.0,
        per={name: first[ns[0]] / value for name, value in means.items() if value},
    )


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return math.fsum(known) / len(known) if len(known) == len(values) and known else None


def ranked(reports: Mapping[str, Report]) -> dict[str, dict[str, float]]:
    """The place of each model by each metric, 1 the best, equals sharing the mean of their places, and the sum over metrics.

    Ranked are the last of `first`, `stable`, `cv`, `tokens`, `seconds` and `lines`, each only where it is known of all models. The sum is
    our choice, and says little: the metrics are no independent virtues.

    >>> ranked({})
    {}
    """
    ways: dict[str, tuple[Any, bool]] = {
        "pass": (lambda report: list(report.first.values())[-1], True),
        "stable": (lambda report: report.stable, True),
        "cv": (lambda report: report.cv, False),
        "tokens": (lambda report: report.tokens, False),
        "seconds": (lambda report: report.seconds, False),
        "lines": (lambda report: report.lines, False),
    }
    found: dict[str, dict[str, float]] = {name: {} for name in reports}
    for metric, (value_of, higher) in ways.items():
        values = {name: value_of(report) for name, report in reports.items()}
        if any(value is None for value in values.values()):
            continue
        for name, value in values.items():
            better = sum(other > value if higher else other < value for other in values.values())
            equal = sum(other == value for other in values.values())
            found[name][metric] = better + (equal + 1) / 2
    for places in found.values():
        places["sum"] = math.fsum(places.values())
    return found
