"""Reading the trials: the landscape, transfer between environments, and whether the workload is large enough."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from assay import checks
from assay.methods.serving.inference_hyperparameters.space import Categorical, Params, Space, key_of
from assay.methods.serving.inference_hyperparameters.trials import Mean, Objective, Trial, mean_of


@dataclass(frozen=True)
class Axis:
    """Local maxima along one numeric parameter, all others held: over `lines` lines of three settings or more."""

    lines: int
    mean_maxima: float
    most_maxima: int


@dataclass(frozen=True)
class Landscape:
    """How much settings matter. `noise` is the relative standard deviation of one measurement, 0 if nothing was repeated.

    `gap_percent` is what the optimum gains over the default (None if that failed), `best_to_median` the sensitivity.
    A single measurement is no landscape: without repeats every wiggle counts as a maximum.
    """

    settings: int
    optimum: Params
    optimum_value: float
    default_value: float | None
    gap_percent: float | None
    best_to_median: float
    noise: float
    axes: Mapping[str, Axis]


def landscape(space: Space, trials: Iterable[Trial], *, noise: float | None = None) -> Landscape:
    """The report over the full-workload trials that ran (also rejected ones: they have a speed). Best made of a grid search.

    Raises ValueError when none ran.
    """
    points = _values(trials)
    if not points:
        raise ValueError("trials must hold at least one that ran on the whole workload")
    level = relative_noise([values for _, values in points.values()]) if noise is None else noise
    means = {key: float(np.mean(values)) for key, (_, values) in points.items()}
    best = max(means, key=lambda key: means[key])
    default = means.get(key_of(space.default()))
    return Landscape(
        settings=len(points),
        optimum=points[best][0],
        optimum_value=means[best],
        default_value=default,
        gap_percent=None if default is None else 100 * (means[best] / default - 1),
        best_to_median=means[best] / float(np.median(list(means.values()))),
        noise=level,
        axes={
            parameter.name: _axis(parameter.name, [(points[key][0], means[key]) for key in points], level)
            for parameter in space.parameters
            if not isinstance(parameter, Categorical)
        },
    )


def relative_noise(groups: Iterable[Sequence[float]]) -> float:
    """Pooled relative standard deviation of one measurement, from the settings that were measured repeatedly; 0 if none was."""
    squares, freedom = 0.0, 0
    for values in groups:
        if len(values) > 1:
            scaled = np.asarray(values) / np.mean(values)
            squares += float(((scaled - 1) ** 2).sum())
            freedom += len(values) - 1
    return (squares / freedom) ** 0.5 if freedom else 0.0


def local_maxima(values: Sequence[float], tolerance: float = 0.0) -> int:
    """Maxima of a line of values whose rise before and fall after exceed `tolerance`; an end may be one. At least one.

    >>> local_maxima([1.0, 3.0, 2.0, 4.0])
    2
    """
    count, looking_up = 0, True
    high, low = -math.inf, math.inf
    for value in values:
        high, low = max(high, value), min(low, value)
        if looking_up and value < high - tolerance:
            count, looking_up, low = count + 1, False, value
        elif not looking_up and value > low + tolerance:
            looking_up, high = True, value
    return count + looking_up


def _axis(name: str, points: Sequence[tuple[Params, float]], noise: float) -> Axis:
    lines: dict[str, list[tuple[float, float]]] = {}
    for params, value in points:
        if name in params:
            rest = key_of({other: v for other, v in params.items() if other != name})
            lines.setdefault(rest, []).append((params[name], value))
    counts = []
    for line in lines.values():
        if len(line) >= 3:
            values = [value for _, value in sorted(line)]
            counts.append(local_maxima(values, 1.96 * 2**0.5 * noise * float(np.mean(values))))
    return Axis(len(counts), float(np.mean(counts)) if counts else 0.0, max(counts, default=0))


def _values(trials: Iterable[Trial]) -> dict[str, tuple[Params, list[float]]]:
    found: dict[str, tuple[Params, list[float]]] = {}
    for trial in trials:
        if trial.value is not None and trial.fidelity == 1.0:
            found.setdefault(key_of(trial.params), (trial.params, []))[1].append(trial.value)
    return found


def transfer_matrix(environments: Mapping[str, Iterable[Trial]]) -> dict[str, dict[str, float]]:
    """T[a][b]: throughput in environment b of the setting tuned for a, over that of b's own best. 1 on the diagonal, never above.

    0 where the setting failed in b, NaN where it was not tried there. 100 (1 / T - 1) is what retuning gains in per cent.
    Raises ValueError for an environment without a trial that ran.
    """
    trials = {name: list(found) for name, found in environments.items()}
    means = {
        name: {key: float(np.mean(values)) for key, (_, values) in _values(found).items()}
        for name, found in trials.items()
    }
    for name, found in means.items():
        if not found:
            raise ValueError(f"environment {name!r} has no trial that ran")
    failed = {
        name: {key_of(t.params) for t in found if t.status in ("failed", "out of memory", "skipped")}
        for name, found in trials.items()
    }
    best = {name: max(found, key=lambda key, found=found: found[key]) for name, found in means.items()}  # type: ignore[misc]

    def carried(a: str, b: str) -> float:
        if best[a] in means[b]:
            return means[b][best[a]] / means[b][best[b]]
        return 0.0 if best[a] in failed[b] else math.nan

    return {a: {b: carried(a, b) for b in means} for a in means}


@dataclass(frozen=True)
class Invariance:
    """Throughput on half and on the whole workload. `holds`: they differ by less than their intervals allow."""

    half: Mean
    whole: Mean
    holds: bool


def workload_invariance(objective: Objective, params: Params, *, repeats: int = 4, seed: int = 0) -> Invariance:
    """Whether doubling the workload leaves tokens/s unchanged; if not, the warm-up is too short or the workload too small."""
    checks.whole("repeats", repeats, low=2)
    means = []
    for fidelity in (0.5, 1.0):
        outcomes = [objective(dict(params), fidelity=fidelity, seed=seed + i) for i in range(repeats)]
        means.append(mean_of([float(o) if isinstance(o, int | float) else o.value for o in outcomes]))
    half, whole = means
    return Invariance(half, whole, half.interval[0] <= whole.interval[1] and whole.interval[0] <= half.interval[1])
