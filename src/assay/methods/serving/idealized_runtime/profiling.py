"""Measuring a grid on a system of one's own."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import nn

from assay import checks
from assay.methods.serving.idealized_runtime.model import MethodName, Run, RuntimeModel, Slope, fit, positive, require

# fmt: off
PAPER_PROMPT_TOKENS = (1, 16, 32, 64, 128, 192, 256, 320, 384, 428, 472, 512, 576, 640, 704, 768, 832, 896, 960, 1024,
                       1152, 1280, 1408, 1536, 1664, 1792, 1920)
PAPER_OUTPUT_TOKENS = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64)
# fmt: on


def profile(
    run: Callable[[int, int], Any],
    *,
    prompt_tokens: Sequence[int] = PAPER_PROMPT_TOKENS,
    output_tokens: Sequence[int] = PAPER_OUTPUT_TOKENS,
    repeats: int = 3,
    warmup: int = 1,
    held_out: Sequence[tuple[int, int]] | None = None,
    method: MethodName = "idealized",
    slope: Slope = "constant",
    isotonic: bool = False,
    seed: int = 0,
) -> RuntimeModel:
    """Measure every cell of the grid `repeats` times, in an order shuffled anew each time, and `fit` the runtime model.

    `run(p, o)` makes one request. If it returns a float, that is the time in seconds; otherwise its wall time is taken (a run on
    an accelerator must wait for the device). `warmup` runs of each prompt length are thrown away first. The weights may be
    random, since only the architecture counts; the prompt should differ from run to run, or a prompt cache would make it free.
    `held_out` are pairs of lengths inside the grid that are measured too, but not fitted, for `RuntimeModel.held_out`; by default
    up to three pairs halfway between grid points (our choice), () for none.

    Raises ValueError for lengths below 1, `repeats` below 1, a held-out pair outside the grid, an unknown method or slope, or a grid
    that determines no model, and TypeError for what is no number or flag; all before the first run.
    """
    require(method, ("idealized", "denoised"), "method")
    require(slope, ("constant", "context"), "slope")
    checks.flag("isotonic", isotonic)
    prompts, outputs = lengths_of("prompt_tokens", prompt_tokens), lengths_of("output_tokens", output_tokens)
    repeats, warmup = checks.whole("repeats", repeats, low=1), checks.whole("warmup", warmup, low=0)
    apart = middle_cells(prompts, outputs) if held_out is None else list(dict.fromkeys(held_out))
    fit([(p, o, 1.0) for p in prompts for o in outputs], method=method, slope=slope)  # or there would be nothing to fit
    for p, o in apart:
        checks.whole("held_out", p), checks.whole("held_out", o)
        if not (prompts[0] <= p <= prompts[-1] and 1 <= o <= outputs[-1]):
            raise ValueError(f"held_out must lie inside the grid, got {(p, o)}")
        if p in prompts and o in outputs:
            raise ValueError(f"held_out must not be a cell of the grid, got {(p, o)}")
    start = time.perf_counter()
    for p in prompts:
        for _ in range(warmup):
            _timed(run, p, outputs[0])
    grid = [(p, o) for p in prompts for o in outputs]
    order = [*grid, *apart]
    shuffle = random.Random(seed)
    runs: list[Run] = []
    for _ in range(repeats):
        shuffle.shuffle(order)
        runs += [(p, o, _timed(run, p, o)) for p, o in order]
    inside = set(grid)
    fitted = fit([entry for entry in runs if entry[:2] in inside], method=method, slope=slope, isotonic=isotonic)
    errors = fitted.errors(entry for entry in runs if entry[:2] not in inside) if apart else None
    return replace(fitted, held_out=errors, profiling_seconds=time.perf_counter() - start)


def middle_cells(prompts: Sequence[int], outputs: Sequence[int]) -> list[tuple[int, int]]:
    """Up to three cells halfway between grid points, spread over the grid; none where a grid has no room between its points."""
    gaps_p = [(a + b) // 2 for a, b in zip(prompts, prompts[1:], strict=False) if b - a > 1]
    gaps_o = [(a + b) // 2 for a, b in zip(outputs, outputs[1:], strict=False) if b - a > 1]
    if not gaps_p or not gaps_o:
        return []
    picks = [
        (gaps_p[round(share * (len(gaps_p) - 1))], gaps_o[round(share * (len(gaps_o) - 1))]) for share in (0, 0.5, 1)
    ]
    return list(dict.fromkeys(picks))


def _timed(run: Callable[[int, int], Any], p: int, o: int) -> float:
    start = time.perf_counter()
    result = run(p, o)
    if isinstance(result, float | np.floating):
        return positive(float(result), p, o)  # now, not after the whole grid was paid for
    return time.perf_counter() - start


def lengths_of(name: str, lengths: Sequence[int]) -> list[int]:
    """Different lengths in ascending order."""
    found = sorted({checks.whole(name, length, low=1) for length in lengths})
    if not found:
        raise ValueError(f"{name} must hold at least one length, got none")
    return found


def transformers_runner(
    model: nn.Module,
    *,
    make_prompt: Callable[[int], torch.Tensor] | None = None,
    static_cache: bool = False,
    seed: int = 0,
) -> Callable[[int, int], float]:
    """A `run(p, o)` for a transformers causal language model: `p` tokens in, exactly `o` out, batch 1, greedy; seconds.

    `make_prompt(p)` gives int64 ids of shape (1, p); by default random ones, anew for every run. The end token is suppressed.
    Raises RuntimeError if generation stops short all the same.
    """
    generator = torch.Generator().manual_seed(seed)
    config = model.config.get_text_config()  # type: ignore[operator,union-attr]
    options: dict[str, Any] = {"cache_implementation": "static"} if static_cache else {}
    device = next(model.parameters()).device

    def run(p: int, o: int) -> float:
        ids = make_prompt(p) if make_prompt else torch.randint(config.vocab_size, (1, p), generator=generator)
        ids = ids.to(device)
        _synchronise(device)
        start = time.perf_counter()
        with torch.inference_mode():
            out = model.generate(  # type: ignore[operator]
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                min_new_tokens=o,
                max_new_tokens=o,
                do_sample=False,
                pad_token_id=0,
                **options,
            )
        _synchronise(device)
        seconds = time.perf_counter() - start
        if out.shape[1] != p + o:
            raise RuntimeError(f"asked for {o} tokens, got {out.shape[1] - p}")
        return seconds

    return run


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
