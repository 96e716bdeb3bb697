"""From an archive of submissions to pairs of a slow program and a faster one: built, split by problem, chosen, tagged."""

from __future__ import annotations

import math
import random
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from assay import checks

THRESHOLD = 0.1
"""A target takes more than this share less than its source."""
MOST_PAIRS = 4
"""Pairs of a problem that count as of high quality."""
TAGS = 10


@dataclass(frozen=True)
class Submission:
    """A program that somebody handed in for a problem. `order` grows with time; `cost` is None where it is wrong on a test.

    Costs are of all programs by one meter, on the same inputs. Raises ValueError for a cost that is not above 0.
    """

    program: str
    problem: str
    author: str
    order: float
    cost: float | None

    def __post_init__(self) -> None:
        checks.number("order", self.order)
        if self.cost is not None:
            checks.number("cost", self.cost, above=0)


@dataclass(frozen=True)
class Pair:
    """A program and a faster one that its author handed in later, with their costs and the target's tag (`tagged`)."""

    source: str
    target: str
    problem: str
    author: str
    source_cost: float
    target_cost: float
    tag: int | None = None

    @property
    def speedup(self) -> float:
        """The source's cost over the target's."""
        return self.source_cost / self.target_cost


def build_pairs(submissions: Iterable[Submission], *, threshold: float = THRESHOLD) -> list[Pair]:
    """All pairs of one author and problem whose target is right, later, and faster by more than `threshold` (a share of the source's cost).

    Wrong programs are in no pair, neither as a source. Programs of equal order are not later than one another. In order of problem,
    author, source and target. Raises ValueError for a threshold outside of 0 to 1. Not for costs that differ from run to run by as
    much as the threshold: noise then makes pairs of equal programs.

    >>> handed = [Submission("a", "p", "u", 1, 10.0), Submission("b", "p", "u", 2, 9.5), Submission("c", "p", "u", 3, 5.0)]
    >>> [(pair.source, pair.target) for pair in build_pairs(handed)]
    [('a', 'c'), ('b', 'c')]
    """
    checks.number("threshold", threshold, low=0, below=1)
    grouped: dict[tuple[str, str], list[Submission]] = defaultdict(list)
    for submission in submissions:
        if submission.cost is not None:
            grouped[submission.problem, submission.author].append(submission)
    found = []
    for (problem, author), theirs in sorted(grouped.items()):
        theirs.sort(key=lambda one: one.order)
        for at, early in enumerate(theirs):
            for late in theirs[at + 1 :]:
                assert early.cost is not None
                assert late.cost is not None
                if late.order > early.order and late.cost < (1 - threshold) * early.cost:
                    found.append(Pair(early.program, late.program, problem, author, early.cost, late.cost))
    return found


def split_by_problem(
    problems: Iterable[str], shares: Mapping[str, float], *, seed: int = 0
) -> dict[str, frozenset[str]]:
    """Which problems belong to which split: each to one, drawn by chance, as many as `shares` says up to rounding.

    Split problems, never pairs: programs of one problem resemble each other, and a model that saw one has seen the answer. Raises
    ValueError unless the shares are above 0 and sum up to 1.

    >>> found = split_by_problem("abcdefghij", {"train": 0.8, "test": 0.2})
    >>> len(found["train"]), len(found["test"]), found["train"] & found["test"]
    (8, 2, frozenset())
    """
    for name, share in shares.items():
        checks.number(f"shares[{name!r}]", share, above=0, high=1)
    if not math.isclose(sum(shares.values()), 1.0):
        raise ValueError(f"shares must sum up to 1, got {checks.shown(dict(shares))}")
    drawn = sorted(set(problems))
    random.Random(seed).shuffle(drawn)
    found, start, total = {}, 0, 0.0
    for name, share in shares.items():
        total += share
        end = round(total * len(drawn))
        found[name] = frozenset(drawn[start:end])
        start = end
    return found


def high_quality(pairs: Sequence[Pair], *, most: int = MOST_PAIRS) -> list[Pair]:
    """The `most` pairs with the largest speed-up of each problem, in the order given; the first given among equals.

    Raises ValueError for `most` below 1.
    """
    checks.whole("most", most, low=1)
    ranked = sorted(range(len(pairs)), key=lambda at: -pairs[at].speedup)
    taken: dict[str, int] = defaultdict(int)
    kept = set()
    for at in ranked:
        taken[pairs[at].problem] += 1
        if taken[pairs[at].problem] <= most:
            kept.add(at)
    return [pair for at, pair in enumerate(pairs) if at in kept]


def performance_tags(costs: Sequence[float]) -> list[int]:
    """The decile of each solution of one problem among all of them: 10 for the fastest, 1 for the slowest tenth.

    10 less a tenth of the share of solutions that are strictly faster, rounded down: equal costs have equal tags, the best has 10 and so
    has a single one. Raises ValueError for no costs, or one that is not above 0.

    >>> performance_tags([5.0, 1.0, 3.0, 1.0])
    [3, 10, 5, 10]
    """
    if not costs:
        raise ValueError("costs must be one or more, got none")
    for cost in costs:
        checks.number("costs", cost, above=0)
    return [TAGS - TAGS * sum(other < cost for other in costs) // len(costs) for cost in costs]


def tagged(pairs: Iterable[Pair], submissions: Iterable[Submission]) -> list[Pair]:
    """The pairs with their targets' tags among all right programs of the problem, whoever wrote them; equal texts count once.

    Raises ValueError for a pair whose target is not among the submissions.
    """
    costs: dict[str, dict[str, float]] = defaultdict(dict)
    for one in submissions:
        if one.cost is not None:
            costs[one.problem].setdefault(one.program, one.cost)
    tags = {
        problem: dict(zip(known, performance_tags(list(known.values())), strict=True))
        for problem, known in costs.items()
    }
    found = []
    for pair in pairs:
        if pair.target not in tags.get(pair.problem, {}):
            raise ValueError(f"submissions must hold the target of every pair, got none such of {pair.problem!r}")
        found.append(replace(pair, tag=tags[pair.problem][pair.target]))
    return found
