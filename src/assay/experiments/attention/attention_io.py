"""The I/O complexity of attention: how the words moved fall as the cache grows, counted while real attention is computed.

The count follows from N, d, M and the algorithm alone, so the exponent is arithmetic, and its verdict says so. What is measured is
that the formula counts attention: queries, keys and values of a head of SmolLM2-135M (d = 64) on real text go through the simulated
fast and slow memory, every word that moves is counted, and the run fails where that differs from the formula or where what comes out
is not attention. The paper proves bounds for N without limit; the exponent is taken where the words that must move in any case
(each input read and each output written once) hardly count.
"""

from __future__ import annotations

import functools
import math
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from assay.experiments.core import Figure, Operator, experiment
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
ERROR = 1e-4  # of float32 attention that was computed in another order; outputs are of the order of 1

# FlashAttention is what everybody has, and it is the candidate: the free alternative is to keep the whole matrix of scores
TRAFFIC = Operator("words moved by exact attention", free="attention with its scores in slow memory (materialised)")


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
    """Words an algorithm moves at the tile sizes that are best for it."""
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
        error = float((out - F.scaled_dot_product_attention(q[None], k[None], v[None])[0]).abs().max())
        if not error <= ERROR:
            raise RuntimeError(f"{algorithm} does not compute attention: it is off by {error:.2g}")
        found |= {"simulated": True, "error": error, "peak": traffic.peak}
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


def tile_that_fits(d: int, capacity: int, generator: random.Random) -> Tile:
    """A tile of flash attention that fits into `capacity`, drawn at random instead of chosen."""
    rows = generator.randint(1, capacity // (2 * d + 2) - 1)
    most = (capacity - rows * (2 * d + 2)) // (2 * d + rows)
    return Tile(rows, generator.randint(1, max(1, most)))


def local_exponents(capacities: list[int], words: list[int]) -> list[float]:
    """The exponent between each capacity and the next."""
    return [exponent(capacities[i : i + 2], words[i : i + 2]) for i in range(len(words) - 1)]


@experiment(
    "attention_io/flash-optimal",
    points={
        "smoke": [{"tokens": 1 << 14, "simulated": 256, "rounds": 2, "steps": 4000}],
        "small": [{"tokens": 1 << 16, "simulated": 512, "rounds": 6, "steps": 60_000}],
        "full": [{"tokens": 1 << 18, "simulated": n, "rounds": 10, "steps": 300_000} for n in (1024, 4096)],
    },
    operator=TRAFFIC,
    paper={"capacity": "every M from d^2 up", "tokens": "without limit", "d": "any"},
    departures={
        "tokens": "a proof has no limit, a count needs one: 65,536, where inputs and outputs are 2 % of the words at most"
    },
    decides={"full": {"tokens": 1 << 18, "simulated": 4096, "rounds": 10, "steps": 300_000}},
    refuted_if="the words that flash attention moves fall with the cache by another power than -1, or what is counted is not attention",
    tolerance=0.1,
    computed="the words follow from N, d, M and the algorithm; simulated attention moved exactly as many",
)
def flash_optimal(tokens: int, simulated: int, rounds: int, steps: int) -> Figure:
    """Exponent of M in all words that flash attention moves, fitted from M = d^2 to 16 d^2; the baseline is materialised attention's.

    Counted by formula at `tokens`; the formula is checked word for word by attention simulated on `simulated` real tokens. The
    tolerance of 0.1 (our choice): whole tiles and inputs move the slope by some hundredths, every other law (-1/2 of the small
    cache, 0) is further away. Raises RuntimeError where a simulation moves other words than counted, or computes no attention.
    """
    q, k, v = (x[0, HEAD] for x in _captured(simulated))
    d = q.shape[-1]
    above = [int(d * d * 2 ** (i / 2)) for i in range(9)]
    below = [d * d // 2**i for i in range(4, 0, -1)]
    inside = [m for m in above if m <= simulated * d / 2]
    sweeps = {name: {m: _simulated(q, k, v, name, m, steps) for m in inside} for name in (*FLASH, "materialised")}
    sweeps["small_cache"] = {m: _simulated(q, k, v, "small_cache", m, steps) for m in [*below, *inside]}
    runs = [run for sweep in sweeps.values() for run in sweep.values() if run["simulated"]]
    if not runs:
        raise RuntimeError(f"steps ({steps}) is too low: no algorithm was simulated, so no formula was checked")

    words = {name: [best_words(name, tokens, d, m) for m in above] for name in (*FLASH, "materialised", "small_cache")}
    flash = [min(each) for each in zip(*(words[name] for name in FLASH), strict=True)]
    small = [best_words("small_cache", tokens, d, m) for m in below]
    generator = random.Random(0)
    drawn = [count("flash_queries", tokens, d, tile_that_fits(d, m, generator)).words for m in above]
    fixed = [count("flash_queries", tokens, d, best_tile("flash_queries", tokens, d, d * d)).words for _ in above]
    inputs = attention_io_bound(tokens, d, d * d).inputs
    return Figure(
        exponent(above, flash),
        "",
        baseline=exponent(above, words["materialised"]),
        arms={
            "the small-cache algorithm": exponent(above, words["small_cache"]),
            "a random tile that fits": exponent(above, drawn),
            "the tile of the smallest cache": exponent(above, fixed),
        },
        details={
            "d": d,
            "capacities": above,
            "words": words,
            "local exponents": local_exponents(above, flash),
            "words at the smallest cache over the best tile's": {"a random tile that fits": drawn[0] / flash[0]},
            "exponent beyond inputs": exponent(above, [moved - inputs for moved in flash]),
            "below d^2": {
                "small cache": exponent(below, small),
                "small cache, local": local_exponents(below, small),
                "flash": exponent(below[2:], [best_words("flash_queries", tokens, d, m) for m in below[2:]]),
            },
            "crossing_in_d_squared": crossing(simulated, d),
            "words_over_shape": {str(m): choose(tokens, d, m).over_shape for m in [*below, *above]},
            "simulated": {name: {str(m): run for m, run in sweep.items()} for name, sweep in sweeps.items()},
            "simulations": len(runs),
            "largest error": max(run["error"] for run in runs),
            "measured": _timings(simulated, rounds),
        },
    )
