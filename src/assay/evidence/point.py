"""One point of an experiment, run in its own process: build it, time it in pairs, return what was seen as JSON."""

from __future__ import annotations

import importlib
import math
import random
import time
from typing import Any

from assay.evidence.types import plain
from assay.experiments import Figure, Quality, Trial, experiments_of
from assay.measure.clock import OthersWatch, compare_many, load_average
from assay.measure.stats import Interval, positive_median
from assay.methods.core import kernels

TIMING_SHARE = 0.6  # share of the time left after the trial is built; the rest is for its quality and its details


def run_point(module: str, claim: str, point: dict[str, Any], seed: int, seconds: float) -> dict[str, Any]:
    """Run the experiment of `claim`, found in `module`, at one point; `seconds` is the time limit of the whole.

    Returns the fields of an Evidence record that the run decides; `details["paths"]` tells which path each operator of ours took,
    compiled kernel or fallback, and how often. Raises whatever the experiment raises, ValueError for a
    figure or a quality that is not finite, and TypeError for something that is neither a Trial nor a Figure.
    """
    start = time.monotonic()
    importlib.import_module(module)
    run = next(found.run for found in experiments_of(claim.split("/", 1)[0]) if found.claim == claim)
    _seed(seed)
    load, watch = load_average(), OthersWatch()
    made = run(**point)
    if isinstance(made, Trial):
        seen = _timed(made, TIMING_SHARE * (seconds - (time.monotonic() - start)))
    elif isinstance(made, Figure):
        seen = _figure(made) | {"load_before": load, "load_after": load_average(), "noisy": watch.stop()[1]}
    else:
        raise TypeError(f"an experiment must return a Trial or a Figure, {claim} returned {type(made).__name__}")
    seen |= {"threads": _threads()}
    if ran := kernels.paths():
        seen["details"] = {**seen["details"], "paths": ran}
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


def _timed(trial: Trial, seconds: float) -> dict[str, Any]:
    arms = {"baseline": trial.baseline, "candidate": trial.candidate}
    if trial.free is not None:
        arms["free"] = trial.free
    timings = compare_many(arms, rounds=trial.pairs, warmup=trial.warmup, max_seconds=max(seconds, 1.0))
    quality = trial.quality() if trial.quality is not None else None
    details = trial.details() if callable(trial.details) else trial.details
    medians = {arm: positive_median(timings.seconds[arm]).median for arm in arms}
    cpu = {arm: positive_median(timings.cpu[arm]).median for arm in arms}
    return {
        "kind": "trial",
        "measured": _estimate(timings.speedup("baseline", "candidate")),
        "unit": "x",
        "vs_free": _estimate(timings.speedup("free", "candidate")) if trial.free is not None else None,
        "free_label": trial.free_label,
        **medians,
        "quality": _quality(quality),
        "details": {**plain(dict(details)), "timing": {"rounds": len(timings.orders), "cpu_seconds": cpu}},
        "load_before": timings.load_before,
        "load_after": timings.load_after,
        "noisy": timings.noisy,
    }


def _figure(figure: Figure) -> dict[str, Any]:
    if figure.baseline is not None:
        _finite("the figure's baseline", figure.baseline)
    if figure.free is not None:
        _finite("the figure's free baseline", figure.free)
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
        "baseline": figure.baseline,
        "free": figure.free,
        "free_label": figure.free_label,
        "quality": _quality(figure.quality),
        "details": plain(dict(figure.details)),
    }


def _quality(quality: Quality | None) -> dict[str, Any] | None:
    if quality is None:
        return None
    values = {"baseline": quality.baseline, "candidate": quality.candidate, "low": quality.low, "high": quality.high}
    checked = {k: None if v is None else _finite(f"the quality's {k}", v) for k, v in values.items()}
    return {"metric": quality.metric, "higher_is_better": bool(quality.higher_is_better), **checked}


def _estimate(interval: Interval) -> dict[str, float]:
    return {"median": interval.median, "low": interval.low, "high": interval.high}


def _finite(name: str, value: Any) -> float:
    number = float(value)
    if not math.isfinite(number):
        raise ValueError(f"{name} must be finite, got {number}")
    return number
