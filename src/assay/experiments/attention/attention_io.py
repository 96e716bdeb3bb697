"""The I/O complexity of attention: how the words moved fall as the cache grows, counted while real attention is computed.

Queries, keys and values are those of a head of SmolLM2-135M (d = 64) on real text. Every word that moves between the simulated
fast and slow memory is counted. The values do not affect the counts; they show that attention is what is being counted.
"""

from __future__ import annotations

import functools
import math
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from assay.experiments.core import Figure, Quality, experiment
from assay.measure.clock import compare_many
from assay.methods.attention.attention_io import (
    Algorithm,
    Tile,
    attention_io_bound,
    best_tile,
    choose,
    count,
    simulate,
    this_machine,
    tiled_attention,
)
from assay.methods.core.attention.plan import AttentionPlan, execute
from assay.workloads.attention import captured_qkv
from assay.workloads.models import load_model
from assay.workloads.text import long_prompt

LAYER, HEAD = 9, 4  # our choice
FLASH: tuple[Algorithm, ...] = ("flash_queries", "flash_keys")
LINE_WORDS = 16  # float32 in a cache line of 64 bytes


@functools.cache
def _captured(tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v (1, heads, tokens, 64) of one layer, key heads repeated."""
    loaded = load_model("smollm2-135m")
    q, k, v = captured_qkv(loaded.model, long_prompt(loaded.tokenizer, tokens), layers=[LAYER])[0]
    shared = q.shape[1] // k.shape[1]
    return q, k.repeat_interleave(shared, 1), v.repeat_interleave(shared, 1)


def exponent(capacities: list[int], words: list[int]) -> float:
    """Least-squares slope of log(words) over log(capacity)."""
    x, y = (torch.tensor(values, dtype=torch.float64).log() for values in (capacities, words))
    return float(((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum())


def best_words(algorithm: Algorithm, n: int, d: int, capacity: int) -> int:
    return count(algorithm, n, d, best_tile(algorithm, n, d, capacity)).words


def crossing(n: int, d: int) -> float:
    """The largest cache, in d^2, for which the small-cache algorithm moves fewer words than both flash orders."""
    shares = [i / 50 for i in range(5, 100)]
    better = [s for s in shares if choose(n, d, int(s * d * d), rule="exact").algorithm == "small_cache"]
    return max(better, default=0.0)


def _simulated(q: Tensor, k: Tensor, v: Tensor, algorithm: Algorithm, capacity: int, most: int) -> dict[str, Any]:
    """Words of one algorithm with its best tile; run and checked where that takes at most so many steps, else by formula alone."""
    n, d = q.shape
    tile = best_tile(algorithm, n, d, capacity)
    counted = count(algorithm, n, d, tile)
    found: dict[str, Any] = {"words": counted.words, "tile": [tile.rows, tile.columns], "simulated": False}
    steps = (n / tile.rows) * (n / tile.columns)
    if algorithm in ("small_cache", "materialised"):
        steps = steps * math.ceil(d / tile.depth) + n / tile.rows * n / tile.depth
    if steps <= most:
        out, traffic = simulate(q, k, v, algorithm, tile, capacity=capacity)
        if traffic.words != counted.words or traffic.peak > capacity:
            raise RuntimeError(f"{algorithm} moved {traffic.words} words in {traffic.peak}, counted {counted.words}")
        exact = F.scaled_dot_product_attention(q[None], k[None], v[None])[0]
        found |= {"simulated": True, "error": float((out - exact).abs().max()), "peak": traffic.peak}
    return found


def _fused_and_not(q: Tensor, k: Tensor, v: Tensor) -> dict[str, Callable[[], Tensor]]:
    """Attention of all heads: materialised, and by fused kernels."""
    tokens, scale = q.shape[-2], q.shape[-1] ** -0.5
    return {
        "materialised": lambda: torch.softmax(q * scale @ k.transpose(-1, -2), -1) @ v,
        "torch SDPA": lambda: F.scaled_dot_product_attention(q, k, v),
        "assay's kernel": lambda: execute(AttentionPlan(tokens, tokens, causal=False), q, k, v),
    }


def repeat_run(arm: str, shape: tuple[int, ...], repeats: int) -> None:
    """What `words_missed` counts in a process of its own; what exact attention moves does not depend on the values."""
    run = _fused_and_not(*torch.randn(3, *shape))[arm]
    for _ in range(repeats):
        run()


def _misses(command: list[str]) -> int | None:
    """Last-level cache misses of a command by the processor's counter; None where it shows none."""
    with tempfile.NamedTemporaryFile("r", prefix="assay-perf-") as report:
        perf = ["perf", "stat", "-x", ",", "-e", "cache-misses:u", "-o", report.name]
        subprocess.run([*perf, *command], check=False, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, timeout=120)
        found = [line.split(",")[0] for line in report if "cache-misses" in line and "," in line]
    return int(found[0]) if found and found[0].isdigit() else None


def words_missed(arm: str, shape: tuple[int, ...], repeats: int = 20) -> float | str:
    """Words a run fetches from main memory, by counted cache misses: what `repeats` runs more add. "not available: why" without."""
    if shutil.which("perf") is None:
        return "not available: perf is not installed"
    if _misses(["true"]) is None:
        return "not available: this processor shows no counter of cache misses"
    counted = []
    for times in (1, 1 + repeats):
        program = f"from {__name__} import repeat_run; repeat_run({arm!r}, {shape!r}, {times})"
        missed = _misses([sys.executable, "-c", program])
        if missed is None:
            return "not available: perf counted nothing"
        counted.append(missed)
    return (counted[1] - counted[0]) / repeats * LINE_WORDS


def _timings(tokens: int, rounds: int) -> dict[str, Any]:
    """Seconds of all heads on this machine: materialised, tiled in torch with several tiles, and fused kernels."""
    q, k, v = _captured(tokens)
    sheet = this_machine()
    predicted = best_tile("flash_queries", tokens, q.shape[-1], sheet.capacity)
    runs = _fused_and_not(q, k, v)
    fused = list(runs)
    for size in (32, 128, 512):
        runs[f"tiles of {size}"] = functools.partial(tiled_attention, q, k, v, Tile(size, size))
    runs["tile for the level 2 cache"] = functools.partial(tiled_attention, q, k, v, predicted)
    timed = compare_many(runs, rounds=rounds, max_seconds=30)
    return {
        "device": sheet.name,
        "cache_words": sheet.capacity,
        "tile for the level 2 cache": [predicted.rows, predicted.columns],
        "seconds": {label: sorted(times)[len(times) // 2] for label, times in timed.seconds.items()},
        "noisy": timed.noisy,
        "words_missed": {arm: words_missed(arm, tuple(q.shape)) for arm in fused},
        "words_counted": q.shape[1] * count("flash_queries", tokens, q.shape[-1], predicted).words,
    }


@experiment(
    "attention_io/flash-optimal",
    points={
        "smoke": [{"tokens": 256, "rounds": 2, "steps": 4000}],
        "small": [{"tokens": n, "rounds": 6, "steps": 60_000} for n in (512, 1024)],
        "full": [{"tokens": n, "rounds": 10, "steps": 300_000} for n in (1024, 2048, 4096)],
    },
)
def flash_optimal(tokens: int, rounds: int, steps: int) -> Figure:
    """Exponent of M in all words that flash attention moves, fitted from M = d^2 to N d / 2; the baseline is materialised attention's.

    Exact: counts have no noise. The 4 N d words that must always move flatten it at short lengths; `beyond inputs` is without them,
    `at 65536 tokens` by the counter where they hardly matter.
    """
    q, k, v = (x[0, HEAD] for x in _captured(tokens))
    d = q.shape[-1]
    above = [int(d * d * 2 ** (i / 2)) for i in range(40) if d * d * 2 ** (i / 2) <= tokens * d / 2]
    below = [d * d // 2**i for i in range(4, 0, -1)]
    sweeps = {name: {m: _simulated(q, k, v, name, m, steps) for m in above} for name in (*FLASH, "materialised")}
    sweeps["small_cache"] = {m: _simulated(q, k, v, "small_cache", m, steps) for m in [*below, *above]}
    flash = [min(sweeps[name][m]["words"] for name in FLASH) for m in above]
    small = [sweeps["small_cache"][m]["words"] for m in below]
    plain = [sweeps["materialised"][m]["words"] for m in above]
    inputs = attention_io_bound(tokens, d, d * d).inputs
    errors = [run["error"] for sweep in sweeps.values() for run in sweep.values() if run["simulated"]]
    far = [d * d * 2**i for i in range(5)]
    ratios = {m: choose(tokens, d, m).over_shape for m in [*below, *above]}
    details = {
        "d": d,
        "capacities": above,
        "sweeps": {name: {str(m): run for m, run in sweep.items()} for name, sweep in sweeps.items()},
        "exponent": {
            "flash beyond inputs": exponent(above, [words - inputs for words in flash]),
            "flash at 65536 tokens": exponent(far, [best_words("flash_queries", 1 << 16, d, m) for m in far]),
            "small cache below d^2": exponent(below, small),
            "small cache below d^2 at 65536 tokens": exponent(
                below, [best_words("small_cache", 1 << 16, d, m) for m in below]
            ),
            "flash below d^2": exponent(below[2:], [best_words("flash_queries", tokens, d, m) for m in below[2:]]),
        },
        "crossing_in_d_squared": crossing(tokens, d),
        "words_over_shape": {str(m): ratio for m, ratio in ratios.items()},  # the bound carries no constant
        "simulations": len(errors),
        "measured": _timings(tokens, rounds),
    }
    return Figure(
        exponent(above, flash),
        "",
        baseline=exponent(above, plain),
        quality=Quality("largest error of the simulated output", max(errors), higher_is_better=False),
        details=details,
    )
