"""Runtime models: is T(p, o) as linear as the paper says, and how much measuring does a profile save?"""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch

from assay.experiments.core import Figure, Operator, experiment
from assay.measure.stats import Interval, student_interval
from assay.methods.serving.idealized_runtime import (
    PAPER_OUTPUT_TOKENS,
    PAPER_PROMPT_TOKENS,
    MethodName,
    Run,
    denoised_saving,
    fit,
    flops_proxy,
    idealized_saving,
    profile,
    share_below,
    transformers_runner,
)
from assay.workloads.models import load_model
from assay.workloads.text import docstrings, encode

MODEL = "smollm2-135m"
GRIDS: dict[str, dict[str, Any]] = {
    "smoke": {"prompts": [1, 32, 64], "outputs": [1, 6, 16], "repeats": 2},
    "small": {"prompts": [1, 32, 128, 512, 1024], "outputs": [1, 4, 16, 64], "repeats": 3},
    "full": {"prompts": list(PAPER_PROMPT_TOKENS), "outputs": list(PAPER_OUTPUT_TOKENS), "repeats": 3},
}


REQUESTS = Operator(
    "the running time of requests",
    free="the operations proxy 2 N (p + o), scaled to the measured times",
)
PAPER = {"prompts": list(PAPER_PROMPT_TOKENS), "outputs": list(PAPER_OUTPUT_TOKENS), "batch": 1}
SMALLER = "fewer and shorter lengths: the paper's 27 x 10 grid up to 1,920 tokens takes hours on two cores"


@experiment(
    "idealized_runtime/linear-fit",
    points={scale: [grid] for scale, grid in GRIDS.items()},
    operator=REQUESTS,
    paper=PAPER,
    departures={"prompts": SMALLER, "outputs": SMALLER},
    tolerance=0.02,
    refuted_if="the model of prompt time and time per token fits worse than 0.9, or no better than counting operations",
    refutes=lambda record: record["measured"]["high"] < 0.9 or record["measured"]["high"] < record["free"],
    minutes=60,
)
def linear_fit(prompts: list[int], outputs: list[int], repeats: int) -> Figure:
    """R2 of the pooled regression on the bundled model, with the errors on lengths that were not fitted.

    R2 is near 1 for anything that tells long requests from short ones, so that "about 1" is within 0.02 (our choice), and two
    trivial models stand beside it: the operations proxy, and the prompt's time alone. The interval is Student's over the repeats, each
    fitted by itself.
    """
    loaded = load_model(MODEL)
    runs: list[Run] = []
    measure = transformers_runner(loaded.model)

    def recorded(p: int, o: int) -> float:
        seconds = measure(p, o)
        runs.append((p, o, seconds))
        return seconds

    model = profile(recorded, prompt_tokens=prompts, output_tokens=outputs, repeats=repeats)
    grid = [run for run in runs[len(prompts) :] if run[0] in prompts and run[1] in outputs]  # without the warm-up
    context = fit(grid, slope="context") if len(outputs) > 2 else model
    parameters = sum(parameter.numel() for parameter in loaded.model.parameters())
    p, o, seconds = np.array(grid).T
    scores = [fit(one).r2 for one in _repeats(grid)]
    found = student_interval(scores) if len(scores) > 1 else Interval(model.r2, model.r2, model.r2, 1)
    proxy = flops_proxy(parameters, p, o)
    scaled = proxy * (proxy @ seconds) / (proxy @ proxy)
    return Figure(
        model.r2,
        "",  # the coefficient of determination has no unit
        low=min(found.low, model.r2),
        high=max(min(found.high, 1.0), model.r2),
        free=_r2(scaled, seconds),
        arms={
            "the operations proxy": _r2(scaled, seconds),
            "the prompt's time alone": _r2(np.asarray(model.predict(p, np.ones_like(o))), seconds),
        },
        details={
            "r2_of_each_repeat": scores,
            "mean_relative_error_not_fitted": model.held_out and model.held_out.mean,
            "milliseconds_per_token": 1e3 * model.seconds_per_token,
            "milliseconds_of_prompt": dict(
                zip(map(str, prompts), (1e3 * t for t in model.prompt_seconds), strict=True)
            ),
            "mean_relative_error": model.fit.mean,
            "max_relative_error": model.fit.maximum,
            "max_relative_error_not_fitted": model.held_out and model.held_out.maximum,
            "max_relative_error_with_context_slope": context.fit.maximum,
            "rank_correlation_of_model": _rank_correlation(model.predict(p, o), seconds),
            "rank_correlation_of_flops": _rank_correlation(proxy, seconds),
            "profiling_seconds": model.profiling_seconds,
        },
    )


def _repeats(grid: list[Run]) -> list[list[Run]]:
    """The runs of a grid, each cell once in every part."""
    by_cell: dict[tuple[int, int], list[Run]] = {}
    for run in grid:
        by_cell.setdefault(run[:2], []).append(run)
    return [list(part) for part in zip(*by_cell.values(), strict=False)]


def _r2(predicted: Any, seconds: Any) -> float:
    return float(1 - np.square(seconds - predicted).sum() / np.square(seconds - seconds.mean()).sum())


SAVING = {scale: [{"sample": n, **GRIDS[scale]}] for scale, n in (("smoke", 3), ("small", 12), ("full", 64))}


SAVED: dict[str, Any] = {
    "points": SAVING,
    "operator": REQUESTS,
    "paper": PAPER,
    "departures": {"prompts": SMALLER, "outputs": SMALLER},
    "computed": "it follows from the number of requests, the trials of each and the size of the grid",
    "refuted_if": "profiling the grid costs more than running the requests",
    "refutes": lambda record: record["measured"]["high"] < 1,
    "minutes": 90,
}


@experiment("idealized_runtime/profiling-saving", **SAVED)
def profiling_saving(**point: Any) -> Figure:
    """Seconds of running every request over seconds of running the grid, with equally many trials on both sides."""
    return _saving(method="idealized", **point)


@experiment("idealized_runtime/denoised-saving", **SAVED)
def denoised_saving_of_requests(**point: Any) -> Figure:
    """Cost of asking for every request ten times over that of the grid ten times and every request once, at the released prices."""
    return _saving(method="denoised", **point)


def _saving(method: MethodName, sample: int, prompts: list[int], outputs: list[int], repeats: int) -> Figure:
    """Over the completion of every docstring of the standard library whose half fits the grid.

    What the saving is worth depends on the error of the predicted times: of real requests, measured for a sample of them, it stands in
    the details.
    """
    loaded = load_model(MODEL)
    requests = docstring_requests(loaded.tokenizer, (prompts[0], prompts[-1]), outputs[-1])
    prompt: list[torch.Tensor] = []
    model = profile(
        transformers_runner(loaded.model),
        prompt_tokens=prompts,
        output_tokens=outputs,
        repeats=repeats,
        held_out=(),
        method=method,
    )
    run = transformers_runner(loaded.model, make_prompt=lambda p: prompt[0])
    raw: list[Run] = []
    for ids, o in random.Random(0).sample(requests, sample):
        prompt[:] = [torch.tensor([ids])]
        raw += [(len(ids), o, run(len(ids), o)) for _ in range(repeats)]
    relative = [abs(model.predict(p, o) - t) / t for p, o, t in _fastest_of(raw, repeats)]

    lengths = [(len(ids), o) for ids, o in requests]
    grid = [(p, o) for p in prompts for o in outputs]
    value = denoised_saving(lengths, grid) if method == "denoised" else idealized_saving(model, lengths, grid)
    return Figure(
        value,
        "x",
        baseline=1.0,
        details={
            "mean_relative_error_of_predicted_requests": float(np.mean(relative)),
            "requests": len(requests),
            "sampled_requests": sample,
            "error_of_their_total": abs(sum(model.predict(p, o) for p, o, _ in raw) / sum(t for *_, t in raw) - 1),
            "raw_runs_below_the_model": share_below(model, raw),
            "profiling_seconds": model.profiling_seconds,
            "seconds_of_50_trials_of_all_requests": 50 * model.total(lengths),
            "r2": model.r2,
        },
    )


def docstring_requests(tokenizer: Any, prompt_range: tuple[int, int], longest: int) -> list[tuple[list[int], int]]:
    """(first half of a docstring as ids, number of tokens of the rest, at most `longest`) for all whose half fits the range."""
    ids = [encode(tokenizer, text) for text in docstrings()]
    halves = [(tokens[: len(tokens) // 2], min(len(tokens) - len(tokens) // 2, longest)) for tokens in ids]
    return [(start, rest) for start, rest in halves if prompt_range[0] <= len(start) <= prompt_range[1]]


def _fastest_of(raw: list[Run], repeats: int) -> list[Run]:
    """One run per request: of its repeats, which stand side by side, the fastest."""
    return [min(raw[i : i + repeats], key=lambda run: run[2]) for i in range(0, len(raw), repeats)]


def _rank_correlation(a: Any, b: Any) -> float:
    """Spearman's, for values that are all different."""
    ranks: Any = np.stack([np.argsort(np.argsort(values)) for values in (a, b)])
    return float(np.corrcoef(ranks)[0, 1])
