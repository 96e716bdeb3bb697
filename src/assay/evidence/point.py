"""One point of an experiment, run in its own process: build it, time it in pairs, return what was seen as JSON.

A trial is run in several processes (`assay.evidence.jobs`); the first of them also measures its quality and its details.
"""

from __future__ import annotations

import importlib
import math
import random
import time
from collections.abc import Callable, Mapping
from typing import Any

from assay.evidence import hashes
from assay.evidence.types import AGAIN, LEAST_ROUNDS, PROCESSES, plain
from assay.experiments import Experiment, Figure, Quality, Trained, Trial, experiments_of
from assay.experiments.core import CONTROLS
from assay.measure.clock import OthersWatch, compare_many, load_average
from assay.methods.core import kernels

LONGEST = {"smoke": 10.0, "small": 35.0}
"""Seconds that one of a trial's processes times at most, warming up included, by scale: all of a paper has five minutes at `small`."""


def run_point(
    module: str,
    claim: str,
    point: dict[str, Any],
    seed: int,
    seconds: float,
    rounds: int = 0,
    first: bool = True,
    scale: str = "full",
) -> dict[str, Any]:
    """Run the experiment of `claim`, found in `module`, at one point.

    `seconds` is the time limit of the whole; `scale` bounds the timing of a trial besides (`LONGEST`).
    Returns the fields of an Evidence record that the run decides; for a trial also "samples", the seconds of every arm, round by
    round. A trial runs `rounds` rounds (0: its own share); only the `first` process measures its quality and details.
    `details["paths"]` tells which path each operator of ours took, compiled kernel or fallback, and how often. Raises whatever the
    experiment raises, ValueError for a figure or a quality that is not finite or lacks what was declared, and TypeError for something
    that is neither a Trial nor a Figure.
    """
    start = time.monotonic()
    importlib.import_module(module)
    found = next(found for found in experiments_of(claim.split("/", 1)[0]) if found.claim == claim)
    _seed(seed)
    load, watch = load_average(), OthersWatch()
    made = found.run(**point)
    built = time.monotonic() - start
    if isinstance(made, Trial):
        seen = _timed(made, found, min(LONGEST.get(scale, math.inf), 0.6 * (seconds - built)), rounds)
        if first:
            seen |= _judged(made, found)
    elif isinstance(made, Figure):
        seen = _figure(made, found) | {
            "load_before": load, "load_after": load_average(), "noisy": watch.stop()[1],
        }  # fmt: skip
    else:
        raise TypeError(f"an experiment must return a Trial or a Figure, {claim} returned {type(made).__name__}")
    seen |= {"threads": _threads(), "hashes": hashes.of_this_process(claim)}
    if ran := kernels.paths():
        seen["details"] = {**seen.get("details", {}), "paths": ran}
    seen.setdefault("details", {})["built_seconds"] = built
    return {key: None if isinstance(value, float) and math.isnan(value) else value for key, value in seen.items()}


def _seed(seed: int) -> None:
    import numpy as np
    import torch

    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def _threads() -> int:
    import torch

    return torch.get_num_threads()


def _timed(trial: Trial, found: Experiment, seconds: float, rounds: int) -> dict[str, Any]:
    if found.operator.exact and trial.exact is None:
        raise ValueError(f"{found.claim} does not run the exact baseline that its operator declares")
    arms: dict[str, Callable[[], Any]] = {"baseline": trial.baseline, "candidate": trial.candidate}
    if trial.free is not None:
        arms["free"] = trial.free
    if trial.exact is not None:
        arms["exact"] = trial.exact
    arms |= {AGAIN: trial.candidate, **trial.arms}
    rounds = rounds or max(LEAST_ROUNDS, -(-trial.pairs // PROCESSES))
    timings = compare_many(arms, rounds=rounds, max_seconds=max(seconds, 1.0))
    return {
        "kind": "trial",
        "samples": timings.seconds,
        "cpu": {arm: sorted(values)[len(values) // 2] for arm, values in timings.cpu.items()},
        "load_before": timings.load_before,
        "load_after": timings.load_after,
        "noisy": timings.noisy,
        "warmup": timings.warmup,
        "trend": timings.trend,
    }


def _judged(trial: Trial, found: Experiment) -> dict[str, Any]:
    """What a trial shows besides times."""
    quality = trial.quality() if trial.quality is not None else None
    details = trial.details() if callable(trial.details) else trial.details
    trained = trial.trained() if callable(trial.trained) else trial.trained
    return {
        "quality": _quality(quality, found),
        "trained": _trained(trained),
        "details": plain(dict(details)),
    }


def _figure(figure: Figure, found: Experiment) -> dict[str, Any]:
    values = {"baseline": figure.baseline, "free": figure.free, "exact": figure.exact}
    low = figure.value if figure.low is None else figure.low
    high = figure.value if figure.high is None else figure.high
    return {
        "kind": "figure",
        "measured": {
            "median": _finite("the figure", figure.value),
            "low": _finite("the figure's low", low),
            "high": _finite("the figure's high", high),
        },
        "unit": figure.unit,
        **{name: None if v is None else _finite(f"the figure's {name} baseline", v) for name, v in values.items()},
        "controls": _numbers("control", figure.controls),
        "arms": _numbers("arm", figure.arms),
        "quality": _quality(figure.quality, found),
        "trained": _trained(figure.trained),
        "details": plain(dict(figure.details)),
    }


def _quality(quality: Quality | None, found: Experiment) -> dict[str, Any] | None:
    """The quality with its guard. Raises ValueError when only one of the two is there, and when a control is missing."""
    guard = found.guard
    if quality is None:
        if guard is not None:
            raise ValueError(f"{found.claim} declares a guard for {guard.metric} and measures no quality")
        return None
    if guard is None:
        raise ValueError(f"{found.claim} measures a quality without having declared a guard")
    if missing := [name for name in CONTROLS if name not in quality.controls and name not in guard.without]:
        raise ValueError(f"the quality of {found.claim} has no control {missing[0]!r}, and its guard does not say why")
    values = {"baseline": quality.baseline, "candidate": quality.candidate, "low": quality.low, "high": quality.high}
    checked = {k: None if v is None else _finite(f"the quality's {k}", v) for k, v in values.items()}
    return {
        "metric": guard.metric,
        "higher_is_better": guard.higher_is_better,
        "margin": guard.margin,
        "relative": guard.relative,
        "without": dict(guard.without),
        "controls": _numbers("control", quality.controls),
        "rival": quality.rival,
        **checked,
    }


def _trained(arms: Mapping[str, Trained]) -> dict[str, Any]:
    return {
        name: {
            "scores": [_finite(f"a score of {name}", score) for score in arm.scores],
            "floor": _finite(f"the floor of {name}", arm.floor),
            "floor_name": arm.floor_name,
            "rate": arm.rate,
            "rates": list(arm.rates),
            "higher_is_better": arm.higher_is_better,
            "best": float(arm.higher_is_better) if arm.best is None else arm.best,
        }
        for name, arm in arms.items()
    }


def _numbers(what: str, values: Mapping[str, float]) -> dict[str, float]:
    return {name: _finite(f"the {what} {name!r}", value) for name, value in values.items()}


def _finite(name: str, value: Any) -> float:
    number = float(value)
    if not math.isfinite(number):
        raise ValueError(f"{name} must be finite, got {number}")
    return number
