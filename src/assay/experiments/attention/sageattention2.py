"""SageAttention2: how much faster is prefill attention with INT8 scores on real queries and keys, and what does it lose?

Queries, keys and values are those of layers of SmolLM2-135M on real text. Smoothing and quantising count in the candidate's time.
The paper's factor of 3 is that of a GPU whose INT4 and FP8 tensor cores do 4 and 2 times the work of its 16-bit ones. Here, INT8
does twice the work of bfloat16, and in only one of the two products. The loss of accuracy by FP8 and INT4 is emulated and reported
in the details, along with the perplexity of the model with INT4 scores (the same kernel with codes in [-7, 7]) and with the
adaptive table.

Against xformers the paper claims a factor of 5; where xformers cannot run, an operator-level form of its algorithm stands in. End
to end it claims 0.474 of the time of CogVideoX1.5-5B: a small model of that form is trained and sampled here (`cogvideox.py`).
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from assay.experiments.attention import cogvideox
from assay.experiments.attention.memory_efficient import memory_efficient
from assay.experiments.attention.video import PATCH, psnr
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
from assay.measure.cost import count_cost
from assay.measure.stats import Interval
from assay.methods.attention.sageattention2 import (
    VARIANTS,
    SageSettings,
    accuracy,
    calibrate_model,
    kernel_refuses,
    sage_attention,
    transform,
)
from assay.methods.core.attention.diffusers_processor import Attend, set_attention
from assay.methods.core.attention.plan import AttentionPlan, execute, has_vnni
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


def model_quality(tokens: int, kind: Kind, config: dict[str, Any]) -> Quality:
    """Perplexity of the text's last quarter with all layers quantised, against exact attention."""
    dense, rise = quantised_perplexity(tokens, kind, config)
    low, median, high = (dense * (1 + x / 100) for x in (rise.low, rise.median, rise.high))
    return Quality("perplexity", median, dense, low, high, higher_is_better=False)


def _accuracies(found: list[Tensor], expected: list[Tensor]) -> dict[str, list[float]]:
    """`accuracy` of each layer's output, by measure."""
    each = [accuracy(a, b) for a, b in zip(found, expected, strict=True)]
    return {name: [measures[name] for measures in each] for name in each[0]}


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
        return {
            "layers": list(LAYERS),
            "vnni": has_vnni(),
            "integer_macs": macs // 2,
            "bfloat16_macs": macs // 2,
            "kernel": _accuracies(over_layers(layers, int8), exact),
            "bfloat16_rounding": _accuracies(over_layers(layers, causal_sdpa), exact),
            "emulated": error_table(layers, queries=min(512, tokens)),
            "adaptive_table": table,
            "perplexity_rise_in_percent": rises,
        }

    return Trial(
        baseline=lambda: over_layers(layers, causal_sdpa),
        candidate=lambda: over_layers(layers, int8),
        free=lambda: over_layers(layers, causal_dense),
        free_label="exact attention by assay's own kernel",
        quality=functools.partial(model_quality, tokens, kind, config),
        details=details,
        pairs=6,
    )


@experiment(
    "sageattention2/xformers-speedup",
    points={
        "smoke": [{"tokens": 1024}],
        "small": [{"tokens": 2048}, {"tokens": 4096}, {"tokens": 8000}],
        "full": [{"tokens": tokens, "kind": kind} for kind in ("code", "english") for tokens in (2048, 4096, 8000)],
    },
    minutes=15,
)
def xformers_speedup(tokens: int, kind: Kind = "code") -> Trial:
    """Attention of four layers in bfloat16: xformers' memory-efficient attention, torch's SDPA (free), and INT8 as above.

    xformers itself is the baseline where it can be imported and there is a GPU. There the candidate is emulated, for its kernel
    runs on CPUs, and can only lose (`emulated` in the details). Elsewhere `chunked_attention` stands in, at its fastest sizes of
    chunks; the details hold these, how exact the stand-in and the INT8 scores are, and the time of assay's own exact kernel.
    The quality is the model's.
    """
    captured = captured_qkv(*model_and_prompt(tokens, kind), layers=LAYERS)
    layers, baseline, about = memory_efficient(captured)
    config: dict[str, Any] = {"qk": "int8", "granularity": "per_thread", "smooth_q": True, "pv": "bf16"}
    settings = SageSettings(**config)
    int8 = functools.partial(sage_attention, is_causal=True, variant=settings)

    def details() -> dict[str, Any]:
        exact = [causal_sdpa(q.float(), k.float(), v.float()) for q, k, v in layers]
        begin = time.perf_counter()
        over_layers(captured, causal_dense)
        return {
            **about,
            "exact_kernel_seconds": time.perf_counter() - begin,  # on the CPU, once: lossless too
            "layers": list(LAYERS),
            "vnni": has_vnni(),
            "emulated": bool(kernel_refuses(*layers[0], settings)),
            "baseline_accuracy": _accuracies(over_layers(layers, baseline), exact),
            "free_accuracy": _accuracies(over_layers(layers, causal_sdpa), exact),
            "candidate_accuracy": _accuracies(over_layers(layers, int8), exact),
        }

    return Trial(
        baseline=lambda: over_layers(layers, baseline),
        candidate=lambda: over_layers(layers, int8),
        free=lambda: over_layers(layers, causal_sdpa),
        free_label="torch's SDPA",
        quality=functools.partial(model_quality, tokens, kind, config),
        details=details,
        pairs=6,
    )


@dataclass
class Clocked:
    """An attention function of diffusers' processors that sums up the seconds it takes."""

    attend: Attend
    seconds: float = 0.0

    def __call__(self, *args: Any, **options: Any) -> Tensor:
        begin = time.perf_counter()
        out = self.attend(*args, **options)
        self.seconds += time.perf_counter() - begin
        return out


def attend_sdpa(
    module: Any, q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None, causal: bool, scale: float | None, text: int
) -> Tensor:
    """What diffusers' own processor does."""
    out: Tensor = F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, scale=scale)
    return out


def attend_exact(
    module: Any, q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None, causal: bool, scale: float | None, text: int
) -> Tensor:
    """The same by assay's own exact kernel. Raises ValueError for a mask: CogVideoX has none."""
    if mask is not None:
        raise ValueError(f"mask must be None, got {tuple(mask.shape)}")
    return execute(AttentionPlan(q.shape[2], k.shape[2], causal=causal), q, k, v, scale=scale)


def attend_quantised(settings: SageSettings) -> Attend:
    """The same by `sage_attention`."""

    def attend(
        module: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        mask: Tensor | None,
        causal: bool,
        scale: float | None,
        text: int,
    ) -> Tensor:
        out: Any = sage_attention(q, k, v, is_causal=causal, scale=scale, mask=mask, variant=settings)
        return out

    return attend


@experiment(
    "sageattention2/cogvideo-time",
    points={
        "smoke": [{"frames": 8, "side": 16, "width": 64, "steps": 4, "updates": 10}],
        "small": [
            {"frames": 16, "side": 16, "width": 128, "others": True},
            {"frames": 32, "side": 16, "width": 128},
            {"frames": 32, "side": 16, "width": 256},
        ],
        "full": [
            {"frames": frames, "side": 16, "width": width, "steps": 50, "updates": 2000, "others": True}
            for frames, width in ((16, 128), (32, 256), (64, 512))
        ],
    },
    minutes=120,
)
def cogvideo_time(
    frames: int, side: int, width: int, steps: int = 20, updates: int = 300, others: bool = False
) -> Trial:
    """A small CogVideoX, sampled in bfloat16 as diffusers made it, by the exact kernel (free), and with INT8 scores, same noise.

    Clips are `frames` of side x side patches, a token for two frames of a patch: from 2,048 tokens to 8,192. What can be saved is
    bounded by attention's share of the work. CogVideoX1.5-5B with its 45,000 tokens of 3,072 channels spends 71 % of a block's
    MACs on QK^T and PV (our reckoning); so do 2,048 tokens of 128 channels, 4,096 of 256 and 8,192 of 512. The
    details hold the shares, of MACs and of time; with `others` also the PSNR of samples with INT4. Quality is the distance to the
    baseline's sample. A model of a few minutes' training: its samples have a photograph's colours, hardly its shapes.
    """
    trained, loss = cogvideox.train(width, updates)
    model = trained.bfloat16()
    own = dict(model.model.attn_processors)
    noise = torch.randn(1, 3, frames, side * PATCH, side * PATCH, generator=torch.Generator().manual_seed(1))
    int8 = attend_quantised(VARIANTS["cpu"])

    def sample(attend: Attend | None = None, steps: int = steps) -> Tensor:
        model.model.set_attn_processor(dict(own))
        if attend is not None:
            set_attention(model.model, [attend] * cogvideox.LAYERS)
        return cogvideox.sample(model, noise, steps)

    reference: Callable[[], Tensor] = functools.cache(sample)

    def quality() -> Quality:
        return Quality("PSNR against the dense sample, dB", psnr(sample(int8), reference()))

    def seconds(attend: Attend) -> dict[str, float]:
        clocked, begin = Clocked(attend), time.perf_counter()
        sample(clocked)
        return {"all": time.perf_counter() - begin, "attention": clocked.seconds}

    def details() -> dict[str, Any]:
        cost = count_cost(functools.partial(sample, None, 1))
        int4 = {
            "INT4": SageSettings("int4", pv="bf16"),
            "INT4, not smoothed": SageSettings("int4", smooth_k=False, smooth_q=False, pv="bf16"),
        }
        return {
            "tokens": frames // cogvideox.FRAMES * side**2 + cogvideox.WORDS,
            "training_loss": loss,
            "vnni": has_vnni(),
            "attention_share_of_the_macs": cost.total("attention").macs / cost.macs,
            "seconds": {
                "SDPA": seconds(attend_sdpa),
                "exact kernel": seconds(attend_exact),
                "INT8": seconds(int8),
            },
            "PSNR_of_dense_by_our_kernel_dB": psnr(sample(attend_exact), reference()),
            "PSNR_of_others_dB": {
                name: psnr(sample(attend_quantised(each)), reference()) for name, each in int4.items() if others
            },
        }

    return Trial(
        baseline=sample,
        candidate=functools.partial(sample, int8),
        free=functools.partial(sample, attend_exact),
        free_label="dense attention by assay's own exact kernel",
        quality=quality,
        details=details,
        pairs=3,
    )
