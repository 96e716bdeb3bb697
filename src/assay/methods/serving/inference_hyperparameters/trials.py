"""What was measured: trials, means of them, and the result of a search."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np

from assay import checks
from assay.measure.stats import Interval, paired_ratio, student_t
from assay.methods.serving.inference_hyperparameters.space import Params
from assay.paths import atomic_file

Status = Literal["ok", "rejected", "failed", "out of memory", "skipped"]


@dataclass(frozen=True)
class Outcome:
    """What an objective reports: `value` (tokens/s, or anything where more is better) and other `metrics` by name."""

    value: float
    metrics: Mapping[str, Any] = field(default_factory=dict)


class Objective(Protocol):
    """Measures a setting on a share `fidelity` of the workload. Raises to fail; MemoryError means that it did not fit."""

    def __call__(self, params: Params, *, fidelity: float, seed: int) -> Outcome | float: ...


@dataclass(frozen=True)
class Trial:
    """One measurement. "rejected" broke a limit or the quality guard; "skipped" was never run. Seconds are what it cost."""

    number: int
    params: Params
    status: Status
    value: float | None = None
    metrics: Mapping[str, Any] = field(default_factory=dict)
    error: str = ""
    seconds: float = 0.0
    fidelity: float = 1.0
    final: bool = False  # measured after the choice, and taking no part in it


@dataclass(frozen=True)
class Mean:
    """Mean of `n` measurements with its 95 % interval (Student's t); None for a single one."""

    mean: float
    low: float | None
    high: float | None
    n: int

    @property
    def interval(self) -> tuple[float, float]:
        """Low and high; all numbers for a single measurement."""
        return -math.inf if self.low is None else self.low, math.inf if self.high is None else self.high


def mean_of(values: Sequence[float]) -> Mean:
    """Raises ValueError for no values, or one that is not finite.

    >>> mean_of([1.0, 2.0, 3.0]).mean
    2.0
    """
    for value in values:
        checks.number("values", value)
    if not len(values):
        raise ValueError("values must hold at least one measurement, got none")
    mean, n = float(np.mean(values)), len(values)
    if n == 1:
        return Mean(mean, None, None, 1)
    half = student_t(0.95, n - 1) * float(np.std(values, ddof=1)) / n**0.5
    return Mean(mean, mean - half, mean + half, n)


@dataclass(frozen=True)
class SearchResult:
    """What a search found. `best` and `default` are means of fresh measurements, made in turns after the best setting was chosen.

    The measurements that a choice was made by flatter what was chosen: among thirty equal settings, the luckiest one wins.
    """

    trials: tuple[Trial, ...]
    best_params: Params
    best: Mean
    default_params: Params
    default: Mean | None  # None if the default setting failed

    @property
    def gain(self) -> Interval | None:
        """The best setting's value over the default's with its 95 % interval, over the pairs measured after the choice.

        Exactly 1 if the default is the best; None if the default failed or a value is not positive.
        """
        best, default = self._final(self.best_params), self._final(self.default_params)
        if self.default is None or not all(value > 0 for value in [*best, *default]):
            return None
        if self.best_params == self.default_params:
            return Interval(1.0, 1.0, 1.0, len(best))
        return paired_ratio(best, default)

    @property
    def gain_percent(self) -> float:
        """What the best setting gains over the default; infinite if the default failed, NaN where a value is not positive."""
        if self.default is None:
            return math.inf
        return math.nan if self.gain is None else 100 * (self.gain.median - 1)

    def _final(self, params: Params) -> list[float]:
        return [
            t.value for t in self.trials if t.final and t.params == params and t.status == "ok" and t.value is not None
        ]

    @property
    def search_seconds(self) -> float:
        """What all trials cost together."""
        return sum(trial.seconds for trial in self.trials)

    @property
    def break_even_tokens(self) -> float:
        """Tokens to generate until the best setting has saved as much time as the search took."""
        if self.default is None:
            return 0.0
        saved = 1 / self.default.mean - 1 / self.best.mean
        return self.search_seconds / saved if saved > 0 else math.inf

    def save(self, path: str | Path) -> None:
        """Write the result as JSON, whole or not at all; numbers that JSON does not have become null."""
        more = {
            "gain": None if self.gain is None else asdict(self.gain),
            "gain_percent": self.gain_percent,
            "break_even_tokens": self.break_even_tokens,
        }
        with atomic_file(path) as temporary:
            temporary.write_text(json.dumps(finite({**asdict(self), **more}), indent=1, allow_nan=False))


def finite(value: Any) -> Any:
    """`value` without numbers that JSON does not have: None stands for them.

    >>> finite({"a": (1.0, math.inf)})
    {'a': [1.0, None]}
    """
    if isinstance(value, Mapping):
        return {key: finite(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def engine_settings(params: Params) -> Params:
    """The part of a setting that a loaded model carries in `assay_settings`."""
    return {name: params[name] for name in ("batch_size", "sort_by_length", "threads") if name in params}
