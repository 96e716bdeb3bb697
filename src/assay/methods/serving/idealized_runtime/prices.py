"""What a runtime model is for: dollars, joules, log rows, fronts and savings."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from assay import checks
from assay.methods.serving.idealized_runtime.model import Run, RuntimeModel, positive


def dollars(seconds: Any, *, accelerators: int, dollars_per_hour: float) -> Any:
    """Idealized cost: time x number of accelerators x price of one for an hour.

    >>> dollars(1800, accelerators=2, dollars_per_hour=3.0)
    3.0
    """
    accelerators = checks.whole("accelerators", accelerators, low=1)
    dollars_per_hour = checks.number("dollars_per_hour", dollars_per_hour, low=0)
    return seconds * accelerators * dollars_per_hour / 3600


def joules(seconds: Any, *, accelerators: int, watts: float) -> Any:
    """Idealized energy: time x number of accelerators x power of one."""
    accelerators, watts = checks.whole("accelerators", accelerators, low=1), checks.number("watts", watts, low=0)
    return seconds * accelerators * watts


def flops_proxy(parameters: int, prompt_tokens: Any, output_tokens: Any) -> Any:
    """The usual proxy 2 N (p + o) FLOPs (1 MAC = 2 FLOPs), blind to what a system does: the baseline runtime models beat."""
    return 2 * checks.whole("parameters", parameters, low=1) * (np.asarray(prompt_tokens) + np.asarray(output_tokens))


def share_below(model: RuntimeModel, runs: Iterable[Run]) -> float:
    """Share of raw runs that were faster than their denoised runtime: should be small, since denoising takes away."""
    runs = list(runs)
    if not runs:
        raise ValueError("runs must hold at least one measurement, got none")
    runs = [(p, o, positive(seconds, p, o)) for p, o, seconds in runs]
    return float(np.mean([seconds < model.predict(p, o) for p, o, seconds in runs]))


def add_runtimes(
    rows: Iterable[Mapping[str, Any]],
    models: Mapping[str, RuntimeModel],
    *,
    prompt: str = "prompt_tokens",
    output: str = "output_tokens",
    extrapolate: bool = False,
) -> list[dict[str, Any]]:
    """Per-instance log rows of a benchmark harness, each with a column of predicted seconds per model.

    >>> from assay.methods.serving.idealized_runtime import Errors, RuntimeModel
    >>> line = RuntimeModel((1, 101), (0.1, 0.2), 0.05, largest_output=64, fit=Errors(0.0, 0.0, 0), r2=1.0)
    >>> add_runtimes([{"id": 7, "prompt_tokens": 1, "output_tokens": 1}], {"idealized_seconds": line})
    [{'id': 7, 'prompt_tokens': 1, 'output_tokens': 1, 'idealized_seconds': 0.1}]
    """
    return [
        {
            **row,
            **{
                name: model.predict(row[prompt], row[output], extrapolate=extrapolate) for name, model in models.items()
            },
        }
        for row in rows
    ]


def pareto_front(costs: Sequence[float], capabilities: Sequence[float]) -> list[int]:
    """Indices of the systems that no other beats: none is at most as costly and at least as capable, and better in one.

    Raises ValueError for sequences of other lengths, and for NaN or infinity, which no comparison could place.

    >>> pareto_front([1.0, 2.0, 3.0], [0.5, 0.9, 0.8])
    [0, 1]
    """
    systems = [
        (checks.number("costs", cost), checks.number("capabilities", skill))
        for cost, skill in zip(costs, capabilities, strict=True)
    ]
    return [
        i
        for i, (cost, skill) in enumerate(systems)
        if not any(c <= cost and s >= skill and (c < cost or s > skill) for c, s in systems)
    ]


def idealized_saving(
    model: RuntimeModel,
    requests: Sequence[tuple[int, int]],
    grid: Sequence[tuple[int, int]],
    *,
    trials: int = 50,
    dollars_per_hour: float = 0.0,
    api_dollars_in: float = 0.0,
    api_dollars_out: float = 0.0,
) -> float:
    """How many times cheaper profiling `grid` is than running every request `trials` times on one's own hardware.

    As in the released analysis: both sides run each cell or request `trials` times and, if API prices are given (dollars per
    1000 prompt and output tokens), ask the API once for every request. Without prices the ratio is one of seconds.
    The paper's 57.42x: $40.96 an hour, $0.0015 and $0.002 per 1000 tokens, 50 trials.
    Raises ValueError for no requests, no grid, or lengths below 1.
    """
    trials = checks.whole("trials", trials, low=1)
    hourly = checks.number("dollars_per_hour", dollars_per_hour, low=0) or 3600.0
    api = _api_dollars("requests", requests, api_dollars_in, api_dollars_out)
    _api_dollars("grid", grid, api_dollars_in, api_dollars_out)
    brute_force = trials * model.total(requests) * hourly / 3600 + api
    return brute_force / (trials * model.total(grid) * hourly / 3600 + api)


def denoised_saving(
    requests: Sequence[tuple[int, int]],
    grid: Sequence[tuple[int, int]],
    *,
    trials: int = 10,
    api_dollars_in: float = 0.0015,
    api_dollars_out: float = 0.002,
) -> float:
    """How many times cheaper denoising is than asking an API every request `trials` times: the grid `trials` times, each request once.

    Prices are dollars per 1000 tokens; the defaults are those of the released analysis, which finds 9.93x. Never above `trials`.
    Raises ValueError for no requests, no grid, lengths below 1, or prices that are all 0.
    """
    trials = checks.whole("trials", trials, low=1)
    once = _api_dollars("requests", requests, api_dollars_in, api_dollars_out)
    profiling = trials * _api_dollars("grid", grid, api_dollars_in, api_dollars_out)
    if not once:
        raise ValueError("api_dollars_in and api_dollars_out must not both be 0: there would be nothing to save")
    return trials * once / (profiling + once)


def _api_dollars(name: str, requests: Sequence[tuple[int, int]], dollars_in: float, dollars_out: float) -> float:
    if not len(requests):
        raise ValueError(f"{name} must hold at least one pair of lengths, got none")
    requests = [(checks.number(name, p, low=1), checks.number(name, o, low=1)) for p, o in requests]  # type: ignore[misc]
    dollars_in = checks.number("api_dollars_in", dollars_in, low=0)
    dollars_out = checks.number("api_dollars_out", dollars_out, low=0)
    return sum(p * dollars_in + o * dollars_out for p, o in requests) / 1000
