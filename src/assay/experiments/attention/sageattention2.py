"""SageAttention2: how much faster is prefill attention with INT8 scores on real queries and keys, and what does it lose?

Queries, keys and values are those of layers of SmolLM2-135M on real text. The candidate pays for its smoothing and quantising.
The paper's factor of 3 is that of a GPU whose INT4 and FP8 tensor cores do 4 and 2 times the work of its 16-bit ones; here INT8
does twice the work of bfloat16 in one of the two products. What FP8 and INT4 cost in accuracy is emulated and stands in the
details, beside the perplexity of the model with INT4 scores (the same kernel with codes in [-7, 7]) and with the adaptive table.
"""

from __future__ import annotations

import functools
from typing import Any

import torch

from assay.experiments.attention.xattention import (
    LAYERS,
    MODEL,
    Kind,
    causal_dense,
    causal_sdpa,
    model_and_prompt,
    over_layers,
    perplexity_rise,
)
from assay.experiments.core import Quality, Trial, experiment
from assay.measure.stats import Interval
from assay.methods.attention.plan import AttentionPlan, execute, has_vnni
from assay.methods.attention.sageattention2 import (
    VARIANTS,
    SageSettings,
    accuracy,
    calibrate_model,
    sage_attention,
    transform,
)
from assay.methods.transform import TuneContext
from assay.workloads.attention import QKV, captured_qkv
from assay.workloads.models import load_model
from assay.workloads.text import calibration_windows

EMULATED: dict[str, SageSettings] = {
    "INT4, not smoothed": SageSettings("int4", smooth_k=False, smooth_q=False, pv="exact"),
    "INT4, K smoothed": SageSettings("int4", smooth_q=False, pv="exact"),
    "INT4, K and Q smoothed": SageSettings("int4", pv="exact"),
    "INT4, per tensor": SageSettings("int4", "per_tensor", pv="exact"),
    "INT4, per block": SageSettings("int4", "per_block", pv="exact"),
    "INT4, per warp": SageSettings("int4", "per_warp", pv="exact"),
    "INT8, not smoothed": SageSettings("int8", smooth_k=False, smooth_q=False, pv="exact"),
    "INT8, K smoothed": SageSettings("int8", smooth_q=False, pv="exact"),
    "INT8, K and Q smoothed": SageSettings("int8", pv="exact"),
    "INT8, per block": SageSettings("int8", "per_block", pv="exact"),
    "FP8 values": SageSettings("exact", smooth_k=False, smooth_q=False),
    "FP8 values, smoothed": SageSettings("exact", smooth_k=False, smooth_q=False, smooth_v=True),
    "FP8 values, one level of 22 bits": SageSettings("exact", smooth_k=False, smooth_q=False, pv="fp8_single"),
    **VARIANTS,
}


def error_table(layers: list[QKV], *, queries: int) -> dict[str, dict[str, list[float]]]:
    """Cosine, relative L1 and RMSE of the output of each setting and layer, for the last `queries` queries, by emulation."""
    table: dict[str, dict[str, list[float]]] = {}
    for q, k, v in layers:
        last = q[:, :, -queries:].float(), k.float(), v.float()
        expected = execute(AttentionPlan(last[0].shape[2], k.shape[2]), *last)
        for name, settings in EMULATED.items():
            found = accuracy(sage_attention(*last, is_causal=True, variant=settings, backend="torch"), expected)
            for measure, value in found.items():
                table.setdefault(name, {}).setdefault(measure, []).append(float(f"{value:.6g}"))
    return table


def quantised_perplexity(tokens: int, kind: Kind, config: dict[str, Any]) -> tuple[float, Interval]:
    """`perplexity_rise` with all layers quantised."""
    settings = {"min_tokens": 0, **config}
    return perplexity_rise(tokens, kind, lambda model: transform.apply(model, settings, TuneContext("ttft", tokens, 1)))


def _adaptive(tokens: int) -> list[str]:
    """Integers for each layer by calibration on other text, at most 2048 tokens of it."""
    loaded = load_model(MODEL, dtype=torch.bfloat16)
    return list(calibrate_model(loaded.model, calibration_windows(loaded.tokenizer, window=min(tokens, 2048), n=1)))


@experiment(
    "sageattention2/kernel-speedup",
    points={
        "smoke": [{"tokens": 1024}],
        "small": [
            {"tokens": 4096},
            {"tokens": 8000},
            {"tokens": 8000, "smooth_q": False},
            {"tokens": 8000, "granularity": "per_block", "smooth_q": False},
        ],
        "full": [
            {"tokens": tokens, "granularity": granularity, "smooth_q": smooth_q, "kind": kind}
            for kind in ("code", "english")
            for tokens in (2048, 4096, 8000)
            for granularity in ("per_block", "per_warp", "per_thread")
            for smooth_q in (False, True)
        ],
    },
    minutes=15,
)
def kernel_speedup(tokens: int, granularity: str = "per_thread", smooth_q: bool = True, kind: Kind = "code") -> Trial:
    """Attention of four layers in bfloat16: SDPA, the exact kernel (free), and INT8 scores with smoothing and quantising.

    The quality is the model's: perplexity of the text's last quarter with INT8 scores in all layers, against exact attention.
    """
    layers = captured_qkv(*model_and_prompt(tokens, kind), layers=LAYERS)  # on the CPU: its fast kernel runs there
    config: dict[str, Any] = {"qk": "int8", "granularity": granularity, "smooth_q": smooth_q, "pv": "bf16"}
    int8 = functools.partial(sage_attention, is_causal=True, variant=SageSettings(**config))

    def quality() -> Quality:
        dense, rise = quantised_perplexity(tokens, kind, config)
        low, median, high = (dense * (1 + x / 100) for x in (rise.low, rise.median, rise.high))
        return Quality("perplexity", median, dense, low, high, higher_is_better=False)

    def details() -> dict[str, Any]:
        exact = over_layers(layers, causal_dense)
        macs = sum(AttentionPlan(tokens, tokens).macs(head_dim=q.shape[3], heads=q.shape[1]) for q, _, _ in layers)
        table = _adaptive(tokens)
        rises = {}
        for name, changes in (
            ("INT4", {"qk": "int4"}),
            ("INT4, not smoothed Q", {"qk": "int4", "smooth_q": False}),
            ("adaptive", {"qk": table}),
        ):
            rise = quantised_perplexity(tokens, kind, {**config, "smooth_q": True, **changes})[1]
            rises[name] = {"low": rise.low, "median": rise.median, "high": rise.high}
        found = [accuracy(a, b) for a, b in zip(over_layers(layers, int8), exact, strict=True)]
        rounding = [accuracy(a, b) for a, b in zip(over_layers(layers, causal_sdpa), exact, strict=True)]
        return {
            "layers": list(LAYERS),
            "vnni": has_vnni(),
            "integer_macs": macs // 2,
            "bfloat16_macs": macs // 2,
            "kernel": {name: [each[name] for each in found] for name in found[0]},
            "bfloat16_rounding": {name: [each[name] for each in rounding] for name in rounding[0]},
            "emulated": error_table(layers, queries=min(512, tokens)),
            "adaptive_table": table,
            "perplexity_rise_in_percent": rises,
        }

    return Trial(
        baseline=lambda: over_layers(layers, causal_sdpa),
        candidate=lambda: over_layers(layers, int8),
        free=lambda: over_layers(layers, causal_dense),
        free_label="exact attention by assay's own kernel",
        quality=quality,
        details=details,
        pairs=6,
    )
