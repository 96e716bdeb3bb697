"""ENAMEL: how near programs come to an expert's, with programs that are cut off counted as what they are, and eff@k over samples.

After "How Efficient is LLM-Generated Code? A Rigorous & High-Standard Benchmark" (ICLR 2025, arXiv 2406.06647). A task has levels of
growing inputs. A level's cost is that of its dearest case, and it scores 1 at the expert's cost and 0 at the time-out, which is twice the
expert's cost on its dearest level. A program that is cut off on a level scores 0 there and on all later ones; one that answers wrong
anywhere scores 0 everywhere. The score is the mean of the levels by their hardness, and eff@k is the expected best score of k samples.

    cases = [[task.arguments(level, number) for number in range(many)] for level, many in enumerate(PAPER.cases)]
    with Workers("cpu_seconds") as workers:
        found = evaluate(workers, task.entry_point, task.programs["expert"], samples, cases, task.compare)
    eff_at_k([score.value for score in found.scores.values()], 1)

`level_score`, `sample_score`, `references` and `eff_at_k` are plain functions of costs, in whatever unit a meter has; `evaluate` measures,
and `over_tasks` is the mean over tasks with its interval. `PAPER` holds the settings of the released code.

When NOT to use it: with references that no expert wrote (a slow reference makes everybody fast), on inputs so small that the expert's cost
is no larger than the meter's noise, and to compare figures of different machines, meters or references.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray

from assay import checks
from assay.methods.core.programs.estimates import hodges_lehmann, interval
from assay.methods.core.programs.runs import CUT, Case, Costs, Ended, measured
from assay.methods.core.programs.workers import Workers
from assay.methods.core.sandbox import Limits

ALLOWANCE = 0.05
"""Seconds of processor time that starting a program and reading its arguments may take beside the call; our choice."""
SLACK = 1.25
"""A run goes on for so many time-outs, for the machine may become slower meanwhile: the score says afterwards what was too dear."""


@dataclass(frozen=True)
class Settings:
    """How a task is measured and scored.

    `cases` and `hardness` have one entry a level; a level of hardness 0 is for correctness only, and run once. `repeats` are those of the
    other levels. `alpha` times the reference's cost on its dearest level is the time-out; a run is cut off `tolerance` (in the meter's
    unit) beyond it. `clip` counts a level that is faster than the reference as 1, not more (not the paper's; say which one is reported).
    Raises ValueError and TypeError for settings that are none.
    """

    cases: tuple[int, ...] = (8, 4, 4, 4)
    hardness: tuple[float, ...] = (0, 3, 3, 4)
    repeats: int = 6
    alpha: float = 2.0
    tolerance: float = 0.01
    memory_mib: int = 4096
    clip: bool = False

    def __post_init__(self) -> None:
        if len(self.cases) != len(self.hardness):
            raise ValueError(f"hardness must have one entry for each of {len(self.cases)} levels, got {self.hardness}")
        for many in self.cases:
            checks.whole("cases", many, low=1)
        for weight in self.hardness:
            checks.number("hardness", weight, low=0)
        if not any(self.hardness):
            raise ValueError(f"hardness must be above 0 on one level at least, got {self.hardness}")
        checks.whole("repeats", self.repeats, low=1)
        checks.number("alpha", self.alpha, above=1)
        checks.number("tolerance", self.tolerance, low=0)
        checks.whole("memory_mib", self.memory_mib, low=1)
        checks.flag("clip", self.clip)

    def repeats_of(self, level: int) -> int:
        """How often each case of a level is run."""
        return self.repeats if self.hardness[level] else 1


PAPER = Settings()
"""The settings of the released code: 8 cases for correctness, 3 levels of 4 cases run 6 times, weights 3, 3, 4, time-out 2, 4 GB."""


# ------------------------------------------------------------------------------------------------------------------ the estimator


def rank_weights(n: int, k: int) -> NDArray[np.float64]:
    """How often the k-th smallest, ..., the largest of n values is the largest of k drawn ones: C(r-1, k-1) / C(n, k) for r = k..n.

    Shape (n - k + 1,), in this order; they sum to 1. From the largest downwards by products of numbers below 1, so that nothing overflows
    where the binomials would; the smallest may round to 0 from n of about 1,030 on. Raises ValueError unless 1 <= k <= n.

    >>> rank_weights(4, 2)  # of 6 pairs 1, 2 and 3 have the second, third and fourth as their larger
    array([0.16666667, 0.33333333, 0.5       ])
    """
    checks.whole("n", n, low=1)
    checks.whole("k", k, low=1, high=n)
    above = np.arange(n, k, -1, dtype=np.float64)
    return np.cumprod(np.concatenate(([k / n], 1 - (k - 1) / (above - 1))), dtype=np.float64)[::-1]


def eff_at_k(scores: ArrayLike, k: int) -> float | NDArray[np.float64]:
    """The expected best score of k samples, from n >= k samples of one task (section 3 of the paper).

    `scores` has the samples along its last axis; leading axes are tasks or draws, and stay. It is the mean of the maximum over all subsets
    of k samples (the Rao-Blackwell form of one subset's maximum): unbiased, with a variance of at most k/n of that of one subset. For
    scores of 0 and 1 it is pass@k. Raises ValueError for k above n: it is not lowered silently. Raises ValueError too for a negative score
    or one that is no number. Not for samples that were chosen already (a beam, the best of several): they are no independent draws.

    >>> round(eff_at_k([0.0, 0.5, 1.0], 2), 3)  # (0.5 + 1 + 1) / 3
    0.833
    """
    found = np.asarray(scores, dtype=np.float64)
    if found.ndim < 1 or found.shape[-1] < 1:
        raise ValueError(f"scores must hold one sample or more, got {checks.shown(scores)}")
    if not (np.isfinite(found).all() and (found >= 0).all()):
        raise ValueError(f"scores must be finite numbers of at least 0, got {checks.shown(scores)}")
    n = found.shape[-1]
    if checks.whole("k", k, low=1) > n:
        raise ValueError(f"k must be at most the number of samples, {n}, got {k}")
    best = np.sort(found, axis=-1)[..., k - 1 :] @ rank_weights(n, k)
    return float(best) if found.ndim == 1 else best


@dataclass(frozen=True)
class Eff:
    """eff@k over tasks, its 95 % interval (tasks resampled), and what it is a mean of."""

    k: int
    value: float
    low: float
    high: float
    tasks: int  # the denominator
    samples: int  # of the task that has the fewest


def over_tasks(scores: Mapping[str, Sequence[float]], k: int, *, seed: int = 0) -> Eff:
    """The mean of `eff_at_k` over tasks, each counting once however many samples it has.

    A single task has no interval: it reaches from minus to plus infinity. Raises ValueError for no tasks, and for a task with fewer
    than k samples: leave the k out, or the task and say so, for the denominator changes with it.

    >>> found = over_tasks({"one": [1.0, 0.0], "two": [0.5]}, 1)
    >>> found.value, found.tasks, found.samples
    (0.5, 2, 1)
    """
    if not scores:
        raise ValueError("scores must hold one task or more, got none")
    for task, of_task in scores.items():
        if len(of_task) < k:
            raise ValueError(f"k must be at most the number of samples, {len(of_task)} for {task}, got {k}")
    values = [float(eff_at_k(of_task, k)) for of_task in scores.values()]
    mean = math.fsum(values) / len(values)
    low, high = -math.inf, math.inf
    if len(values) > 1:
        low, high = interval(values, lambda drawn: math.fsum(drawn) / len(drawn), seed=seed)
    return Eff(k, mean, low, high, len(values), min(map(len, scores.values())))


# --------------------------------------------------------------------------------------------------------------------- the scores


@dataclass(frozen=True)
class References:
    """The reference's cost on every level (None where nothing is scored), and the time-out, in the meter's unit."""

    levels: tuple[float | None, ...]
    time_out: float


def references(costs: Sequence[Sequence[Sequence[float]]], settings: Settings = PAPER) -> References:
    """Calibration: what the reference costs on every level, from costs[level][case][repeat].

    A case's cost is the Hodges-Lehmann estimate of its repeats, a level's is that of its dearest case. Take the costs on the same machine
    and as near to the samples' as can be: whatever slows the machine down in between is held against the samples (the paper measures once
    before each task; `evaluate` between the samples' runs). Raises ValueError for levels or cases that are missing, and for a cost that is
    not above 0. Not for a meter whose noise is as large as the reference's cost.

    >>> references([[], [[1.0, 1.0, 1.0, 1.0, 1.0, 9.0]], [[2.0]], [[4.0], [3.0]]])
    References(levels=(None, 1.0, 2.0, 4.0), time_out=8.0)
    """
    if len(costs) != len(settings.hardness):
        raise ValueError(f"costs must have {len(settings.hardness)} levels, got {len(costs)}")
    levels: list[float | None] = []
    for level, weight in enumerate(settings.hardness):
        if not weight:
            levels.append(None)
            continue
        if not costs[level]:
            raise ValueError(f"costs must have one case or more on level {level}, got none")
        cost = max(map(hodges_lehmann, costs[level]))
        if not cost > 0:
            raise ValueError(f"costs must be above 0 on level {level}, got {cost:g}")
        levels.append(cost)
    return References(tuple(levels), settings.alpha * max(cost for cost in levels if cost is not None))


def level_score(cost: float, reference: float, time_out: float, *, clip: bool = False) -> float:
    """max(0, T - t) / (T - r): 1 at the reference's cost r, 0 from the time-out T on, straight between them and beyond, above 1.

    `clip` gives at most 1. Raises ValueError unless 0 < reference < time_out and cost >= 0.

    >>> level_score(1.5, 1.0, 2.0), level_score(7.0, 1.0, 2.0), level_score(0.5, 1.0, 2.0)
    (0.5, 0.0, 1.5)
    """
    cost = checks.number("cost", cost, low=0)
    time_out = checks.number("time_out", time_out, above=0)
    reference = checks.number("reference", reference, above=0, below=time_out)
    score = max(0.0, time_out - cost) / (time_out - reference)
    return min(score, 1.0) if clip else score


@dataclass(frozen=True)
class Score:
    """A sample's score, 1 for the reference itself up to noise, its score on every level, and why it ended before the last, if it did."""

    value: float
    levels: tuple[float, ...]
    right: bool
    ended: str = ""


def sample_score(levels: Sequence[Sequence[Case]], found: References, settings: Settings = PAPER) -> Score:
    """The score of a sample from what it did, levels[level][case] (`runs.measured`), by the mean of its level scores weighted by hardness.

    Levels and cases are gone through in order. The first that ended by one of `runs.CUT`, or whose cost is beyond the time-out and its
    tolerance, ends it: its level and all later ones are 0, and what comes after is not looked at; on the first level it makes the sample
    wrong. The first that ended otherwise makes it wrong too: everything is 0. A level's cost is that of its dearest case, each by the
    Hodges-Lehmann estimate of its repeats. Raises ValueError where a level or case that is needed is missing.

    >>> found = References((None, 1.0, 2.0, 4.0), 8.0)
    >>> sample_score([[[1.0]], [[1.0]], [[5.0]], ["time"]], found, Settings(cases=(1, 1, 1, 1)))
    Score(value=0.45, levels=(0.0, 1.0, 0.5, 0.0), right=True, ended='cut on level 3')
    """
    if len(found.levels) != len(settings.hardness):
        raise ValueError(f"found must have {len(settings.hardness)} levels, got {len(found.levels)}")
    scores = [0.0] * len(settings.hardness)
    ended = ""
    for level, weight in enumerate(settings.hardness):
        costs, state = _walked(levels, level, found, settings)
        if state == "wrong" or state == "cut" and level == 0:
            return Score(0.0, (0.0,) * len(scores), False, f"{state} on level {level}")
        if state == "cut":
            ended = f"cut on level {level}"
            break
        reference = found.levels[level]
        if weight and reference is not None:
            scores[level] = level_score(max(costs), reference, found.time_out, clip=settings.clip)
    value = math.fsum(h * f for h, f in zip(settings.hardness, scores, strict=True)) / math.fsum(settings.hardness)
    return Score(value, tuple(scores), True, ended)


def _walked(
    levels: Sequence[Sequence[Case]], level: int, found: References, settings: Settings
) -> tuple[list[float], str]:
    """The costs of a level's cases, and "wrong" or "cut" if the walk ends there."""
    many = settings.cases[level]
    costs: list[float] = []
    for number in range(many):
        if level >= len(levels) or number >= len(levels[level]):
            raise ValueError(f"levels must have {many} cases on level {level}, got {len(costs)}")
        case = levels[level][number]
        if isinstance(case, str):
            return costs, "cut" if checks.choice("levels", case, get_args(Ended)) in CUT else "wrong"
        if max(case, default=0.0) > found.time_out + settings.tolerance:
            return costs, "cut"
        costs.append(hodges_lehmann(case))
    return costs, ""


# ------------------------------------------------------------------------------------------------------------------ the measurement


@dataclass(frozen=True)
class Evaluated:
    """The scores of a task's samples by name, the references that they are held against, and what the samples did (`sample_score`).

    `again` is the score of the reference's own earlier runs against the later ones: 1, but for the meter's noise and a machine that changed
    its speed. `drift` is the largest ratio between the two on a level.
    """

    scores: dict[str, Score]
    references: References
    runs: dict[str, list[list[Case]]]
    again: Score
    drift: float


def evaluate(
    workers: Workers,
    entry_point: str,
    reference: str,
    samples: Mapping[str, str],
    cases: Sequence[Sequence[Sequence[Any]]],
    compare: Callable[[Any, Any], bool],
    *,
    settings: Settings = PAPER,
) -> Evaluated:
    """Measure the samples of a task (texts of programs by name) against the text of its reference, on cases[level][case] of arguments.

    The reference is measured on all levels first, which says when to end a run; its answers are the expected ones, by `compare(expected,
    got)`. Then level by level all samples that are left are run in turns, the reference between them: from those runs of it the scores
    follow, so that a machine which becomes slower does so for both (our choice; the paper keeps the first). A sample that was wrong or cut
    is run no more. Costs are in the unit of the workers' meter. By seconds a run is ended after `SLACK` time-outs, by other meters the
    workers' own limits end it; what returned too dear counts as cut afterwards.

    Raises ValueError for no samples and for other numbers of cases than the settings say, NoReference for a reference that does not return.
    """
    if not samples:
        raise ValueError("samples must be one or more, got none")
    if (given := tuple(map(len, cases))) != settings.cases:
        raise ValueError(f"cases must be {settings.cases} by level, got {given}")
    repeats = [settings.repeats_of(level) for level in range(len(cases))]

    def run(programs: Mapping[str, str], limits: Mapping[str, Limits] | None = None) -> dict[str, Costs]:
        return measured(workers, entry_point, programs, cases, compare, trusted="", repeats=repeats, limits=limits)

    before = run({"": reference})[""].finished
    first = references(before, settings)
    named = {f"sample {name}": name for name in samples}  # the reference's label, "", is none of these
    programs = {"": reference, **{label: samples[name] for label, name in named.items()}}
    seen = run(programs, dict.fromkeys(named, _limits(workers, first.time_out, settings)))
    found = references(seen[""].finished, settings)
    pairs = [(one, other) for one, other in zip(first.levels, found.levels, strict=True) if one and other]
    drift = max(max(pair) / min(pair) for pair in pairs)
    runs = {name: seen[label].levels for label, name in named.items()}
    scores = {name: sample_score(levels, found, settings) for name, levels in runs.items()}
    return Evaluated(scores, found, runs, sample_score(before, found, settings), drift)


def _limits(workers: Workers, time_out: float, settings: Settings) -> Limits:
    if workers.meter.unit != "s":
        return Limits(memory_mib=settings.memory_mib)
    seconds = SLACK * time_out + settings.tolerance + ALLOWANCE
    return Limits(wall_seconds=10 * seconds + 10, cpu_seconds=seconds, memory_mib=settings.memory_mib)
