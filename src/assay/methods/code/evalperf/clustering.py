"""Right programs in clusters of nearly equal cost, and the filters that a task must pass for its clusters to mean something."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, pstdev
from typing import Any

from assay import checks

NOISE = 10_000.0
"""w: below so many instructions a cost is noise."""
FILTER_SPLIT, REFERENCE_SPLIT = 0.2, 0.1
"""h, the least relative gap between clusters, where tasks are filtered and where references are made."""


@dataclass(frozen=True)
class Reference:
    """A cluster of right programs: its slowest member stands for it.

    `program` and `members` are indices into the costs that were clustered, members slowest first; `score` is the percentage of all programs
    in this cluster and the slower ones, 100 in the fastest.
    """

    program: int
    cost: float
    members: tuple[int, ...]
    score: float


def clusters(costs: Sequence[float], *, split: float = FILTER_SPLIT, noise: float = NOISE) -> list[tuple[int, ...]]:
    """Indices of `costs` in clusters, slowest first, and so within each.

    Sorted downwards, x_i and x_(i+1) part where (x_i - x_(i+1)) / x_i > split + sqrt(noise / x_i): the smaller the cost, the larger the gap
    must be. `noise` has the unit of the costs and is 10,000 instructions in the paper. Equal costs never part.
    Raises ValueError for no costs and for one that is not above 0.

    >>> clusters([1e6, 4e6, 1.05e6, 9e5])
    [(1,), (2, 0, 3)]
    """
    split, noise = checks.number("split", split, low=0), checks.number("noise", noise, low=0)
    values = [valid_cost(cost) for cost in costs]
    if not values:
        raise ValueError("costs must have at least one value, got none")
    order = sorted(range(len(values)), key=lambda i: -values[i])
    found = [[order[0]]]
    for slower, faster in zip(order, order[1:], strict=False):
        x = values[slower]
        if (x - values[faster]) / x > split + math.sqrt(noise / x):
            found.append([])
        found[-1].append(faster)
    return [tuple(members) for members in found]


def references(
    costs: Sequence[float], *, split: float = REFERENCE_SPLIT, noise: float = NOISE
) -> tuple[Reference, ...]:
    """The clusters of right programs (see `clusters`) with their scores, slowest first.

    >>> [(reference.program, reference.score) for reference in references([1e6, 4e6, 1.05e6, 7e5])]
    [(1, 25.0), (2, 75.0), (3, 100.0)]
    """
    found, counted = [], 0
    for members in clusters(costs, split=split, noise=noise):
        counted += len(members)
        found.append(Reference(members[0], valid_cost(costs[members[0]]), members, 100 * counted / len(costs)))
    return tuple(found)


def measured_anew(found: Sequence[Reference], costs: Sequence[float]) -> tuple[Reference, ...]:
    """References with their costs on another machine, slowest first; their clusters and scores stay.

    Raises ValueError where they do not become strictly cheaper: then the clusters do not hold there, and a score would depend on the order
    in which they are walked through. The released code checks that only where it is not lazy.
    """
    values = [valid_cost(cost) for cost in costs]
    if len(values) != len(found):
        raise ValueError(f"costs must be as many as the references, {len(found)}, got {len(values)}")
    for at, (slower, faster) in enumerate(zip(values, values[1:], strict=False)):
        if not slower > faster:
            raise ValueError(
                f"costs must fall from reference to reference, got {slower:g} and {faster:g} at {at} and {at + 1}"
            )
    return tuple(Reference(one.program, cost, one.members, one.score) for one, cost in zip(found, values, strict=True))


@dataclass(frozen=True)
class Filters:
    """What makes a task worth keeping. The released code's `least_clusters` is 4; its profiles have one repeat, which varies by nothing."""

    least_programs: int = 10
    least_cost: float = NOISE  # of the cheapest program, mean over its repeats
    most_variation: float = 5.0  # per cent
    percentile: float = 99.0  # of the programs' variations, the one that is held against `most_variation`
    least_clusters: int = 4
    split: float = FILTER_SPLIT
    noise: float = NOISE

    def __post_init__(self) -> None:
        for name in ("least_programs", "least_clusters"):
            checks.whole(name, getattr(self, name), low=1)
        for name in ("least_cost", "most_variation", "split", "noise"):
            checks.number(name, getattr(self, name), low=0)
        checks.number("percentile", self.percentile, low=0, high=100)


@dataclass(frozen=True)
class Suitability:
    """Whether a task passes, the first filter that it does not pass ("" if all), and what they saw."""

    reason: str
    programs: int
    cheapest: float | None = None
    variation: float | None = None
    clusters: int | None = None

    @property
    def passes(self) -> bool:
        return not self.reason


def suitability(profiles: Sequence[Sequence[float]] | None, filters: Filters = Filters()) -> Suitability:
    """Put a task through the filters: `profiles` are the costs of each right program, one a repeat; None where no input was found.

    In the paper's order: programs enough, the cheapest not too cheap, variation over the repeats (100 * standard deviation / mean, of the
    population) at the percentile not too large, clusters enough.

    >>> suitability([[float(2**k) * 1e5] for k in range(10)])
    Suitability(reason='', programs=10, cheapest=100000.0, variation=0.0, clusters=10)
    >>> suitability([[1e6]] * 10).reason
    'clusters'
    """
    if profiles is None:
        return Suitability("input", 0)
    if len(profiles) < filters.least_programs:
        return Suitability("programs", len(profiles))
    if not all(map(len, profiles)):
        raise ValueError("profiles must hold a cost for each program at least, got one without any")
    costs = [[valid_cost(cost) for cost in profile] for profile in profiles]
    means = [fmean(profile) for profile in costs]
    variation = percentile(
        [100 * pstdev(profile) / mean for profile, mean in zip(costs, means, strict=True)], filters.percentile
    )
    parts = len(clusters(means, split=filters.split, noise=filters.noise))
    reason = ""
    if min(means) < filters.least_cost:
        reason = "cost"
    elif variation > filters.most_variation:
        reason = "variation"
    elif parts < filters.least_clusters:
        reason = "clusters"
    return Suitability(reason, len(costs), min(means), variation, parts)


def percentile(values: Sequence[float], percent: float) -> float:
    """The value that so many per cent lie below, with straight lines between the sorted values (NumPy's default).

    >>> percentile([1.0, 2.0, 4.0], 75)
    3.0
    """
    percent = checks.number("percent", percent, low=0, high=100)
    ordered = sorted(values)
    if not ordered:
        raise ValueError("values must have at least one, got none")
    where = (len(ordered) - 1) * percent / 100
    low = math.floor(where)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (where - low) * (ordered[high] - ordered[low])


def valid_cost(value: Any) -> float:
    """A cost as a float; raises for one that is not a finite number above 0."""
    return checks.number("cost", value, above=0)
