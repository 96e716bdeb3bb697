"""What a run costs by its memory-time curve, figures held against a reference, and two models compared where both are right."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike

from assay import checks

Variant = Literal["paper", "as_released"]
VARIANTS: tuple[Variant, ...] = ("paper", "as_released")


@dataclass(frozen=True)
class Overhead:
    """ET, MU and TMU of one run: seconds, the most memory held (MiB), and memory summed over time (MiB * s)."""

    et: float
    mu: float
    tmu: float


def et_mu_tmu(times: ArrayLike, memory: ArrayLike, *, variant: Variant = "paper") -> Overhead:
    """The three overheads of a sampled curve: `times` in seconds, `memory` in MiB, one sample or more, in the order of time.

    ET is the last time stamp less the first, MU the largest sample, TMU the area under straight lines between the samples. The released
    script leaves an interval out of the area where the stamp before it is not above 0 (`variant="as_released"`). With seconds since 1970
    that never happens; with times counted from the start the first interval is lost. Raises ValueError for lengths that differ, for
    samples that are not finite, times that run backwards and memory below 0. NOT for runs that are shorter than the sampling interval:
    two samples or three say nothing about what was held in between.

    >>> et_mu_tmu([0, 1, 3], [10, 20, 20])
    Overhead(et=3.0, mu=20.0, tmu=55.0)
    >>> et_mu_tmu([0, 1, 3], [10, 20, 20], variant="as_released").tmu
    40.0
    """
    checks.choice("variant", variant, VARIANTS)
    stamps, held = _samples("times", times), _samples("memory", memory)
    if len(stamps) != len(held):
        raise ValueError(f"memory must have one sample for each of the {len(stamps)} times, got {len(held)}")
    widths = np.diff(stamps)
    if (widths < 0).any():
        raise ValueError(f"times must not run backwards, got {checks.shown(times)}")
    if (held < 0).any():
        raise ValueError(f"memory must be at least 0, got {checks.shown(memory)}")
    if variant == "as_released":
        widths = np.where(stamps[:-1] > 0, widths, 0.0)
    area = float(((held[1:] + held[:-1]) / 2 * widths).sum())
    return Overhead(float(stamps[-1] - stamps[0]), float(held.max()), area)


def _samples(name: str, values: ArrayLike) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
    found = np.asarray(values, dtype=np.float64)
    if found.ndim != 1 or not len(found) or not np.isfinite(found).all():
        raise ValueError(f"{name} must hold one finite number or more, got {checks.shown(values)}")
    return found


# ---------------------------------------------------------------------------------------------------------- against a reference


@dataclass(frozen=True)
class Normalised:
    """Ratios to a reference over tasks: the paper's mean, and two figures that no single tiny reference can carry away."""

    mean: float
    geometric_mean: float
    median: float
    tasks: int


def normalised(values: Mapping[str, float], references: Mapping[str, float]) -> Normalised:
    """NET, NMU or NTMU: each task's value over that of its reference (the canonical solution, or the base model's).

    1 for the reference itself, and the same in any unit. The mean of ratios is the paper's figure; one reference near 0 makes it as large
    as one likes, so read the other two beside it. Raises ValueError for no tasks, for a task without a reference, and for a value or a
    reference that is not above 0: the meter has not seen it. NOT for comparing two models that solve different tasks (`compared`).

    >>> normalised({"a": 2.0, "b": 1.0}, {"a": 1.0, "b": 2.0, "c": 5.0})
    Normalised(mean=1.25, geometric_mean=1.0, median=1.25, tasks=2)
    """
    if not values:
        raise ValueError("values must hold one task or more, got none")
    ratios = []
    for task, value in values.items():
        if task not in references:
            raise ValueError(f"references must hold every task of values, got none for {task!r}")
        value = checks.number(f"values[{task!r}]", value, above=0)
        ratios.append(value / checks.number(f"references[{task!r}]", references[task], above=0))
    return Normalised(statistics.fmean(ratios), geometric(ratios), statistics.median(ratios), len(ratios))


def geometric(ratios: Iterable[float]) -> float:
    """The geometric mean of numbers above 0. Raises ValueError for none.

    >>> round(geometric([0.5, 2.0, 8.0]), 6)
    2.0
    """
    logs = [math.log(ratio) for ratio in ratios]
    if not logs:
        raise ValueError("ratios must be one or more, got none")
    return math.exp(math.fsum(logs) / len(logs))


# ------------------------------------------------------------------------------------------------------------------ two models


@dataclass(frozen=True)
class Compared:
    """The costs after over those before, on the tasks that both solve, which are listed.

    `ratio_of_means` (the paper's) and `geometric_mean` are inverted when before and after change places; `mean_of_ratios` is not.
    `saved` is 100 * (1 - ratio_of_means), in per cent; `solved` is how many of all tasks each solves.
    """

    tasks: tuple[str, ...]
    ratio_of_means: float
    mean_of_ratios: float
    geometric_mean: float
    median: float
    saved: float
    solved: tuple[int, int]
    attempted: int


def compared(before: Mapping[str, float | None], after: Mapping[str, float | None]) -> Compared:
    """Compare two models' costs by task, None where a task was not solved, only on tasks that both solve (the paper's rule).

    The rule leaves out what one of them cannot do, so that the figure says nothing about the rest: read `solved` beside it. Both must have
    been asked the same tasks. Raises ValueError for a task of one only, for no task that both solve, and for a cost not above 0.

    >>> found = compared({"a": 4.0, "b": 1.0, "c": None}, {"a": 2.0, "b": None, "c": 1.0})
    >>> found.tasks, found.saved, found.solved, found.attempted
    (('a',), 50.0, (2, 2), 3)
    """
    if lone := sorted(before.keys() ^ after.keys()):
        raise ValueError(
            f"before and after must hold the same tasks (None where one is not solved), got only one of {lone[0]!r}"
        )
    pairs: dict[str, tuple[float, float]] = {}
    for task, first in before.items():
        second = after[task]
        if first is not None and second is not None:
            first = checks.number(f"before[{task!r}]", first, above=0)
            pairs[task] = first, checks.number(f"after[{task!r}]", second, above=0)
    if not pairs:
        raise ValueError("before and after must both solve one task at least, got none")
    ratios = [second / first for first, second in pairs.values()]
    of_means = math.fsum(second for _, second in pairs.values()) / math.fsum(first for first, _ in pairs.values())
    return Compared(
        tuple(pairs),
        of_means,
        statistics.fmean(ratios),
        geometric(ratios),
        statistics.median(ratios),
        100 * (1 - of_means),
        (_count(before), _count(after)),
        len(before),
    )


def _count(costs: Mapping[str, float | None]) -> int:
    return sum(cost is not None for cost in costs.values())
