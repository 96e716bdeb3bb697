"""SageAttention2: how much faster is prefill attention with integer scores on real queries and keys, and what does it lose?

Smoothing and quantising count in the candidate's time. The paper's factor of 3 is that of a GPU whose INT4 and FP8 tensor cores do 4
and 2 times the work of its 16-bit ones. Here, INT8 does twice the work of bfloat16, and in only one of the two products: the paper's
8-bit form decides, INT4 (the same kernel with codes in [-7, 7]) stands beside it, and what FP8 loses is emulated in the details.

Against xformers the paper claims a factor of 5; where xformers cannot run, an operator-level form of its algorithm stands in. End
to end it claims 0.474 of the time of CogVideoX1.5-5B: a small model of that form is trained and sampled here (`cogvideox.py`), also
with integers of 4 and 8 bits mixed by a table of layers and denoising steps.
"""

from __future__ import annotations

import functools
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from assay.experiments.attention import cogvideox
from assay.experiments.attention.memory_efficient import find_xformers, memory_efficient
from assay.experiments.attention.prefill import (
    ATTENTION,
    LAYERS,
    MODEL,
    captured_layers,
    causal_dense,
    causal_sdpa,
    mean_of_values,
    over_layers,
    perplexity_quality,
    perplexity_rises,
)
from assay.experiments.attention.video import PATCH, clip_quality, shares
from assay.experiments.attention.video import mean_of_values as attend_to_nothing
from assay.experiments.core import Guard, Quality, Trial, experiment
from assay.measure.cost import count_cost
from assay.methods.attention.sageattention2 import (
    QK,
    VARIANTS,
    Granularity,
    SageSettings,
    accuracy,
    calibrate_model,
    calibrate_steps,
    install_steps,
    kernel_refuses,
    sage_attention,
)
from assay.methods.core.attention.diffusers_processor import Attend, set_attention
from assay.methods.core.attention.plan import AttentionPlan, execute, has_vnni
from assay.workloads import attention as workload
from assay.workloads.attention import QKV
from assay.workloads.models import load_model
from assay.workloads.text import calibration_windows

PAPER = {"qk": "int4", "granularity": "per_thread", "smooth_k": True, "smooth_q": True, "pv": "fp8"}
DEPARTURES = {
    "qk": "INT8, the paper's own 8-bit form: no CPU multiplies 4-bit integers, so INT4 would cost as much and lose more (it stands beside)",
    "pv": "bfloat16 with float32 sums: no CPU multiplies FP8 (its loss is emulated in the details)",
}
OWN = SageSettings("int8", "per_thread", pv="bf16")  # what decides: the paper's settings but for these departures
NAIVE = SageSettings("int8", "per_block", smooth_k=False, smooth_q=False, pv="bf16")
RIVAL = "INT8 with one scale a block and nothing smoothed"
CHOICELESS = {"random": "quantising chooses nothing: every score is computed"}
MIXED = "INT4 and INT8 by step and layer"
TOLERANCE = 1.0  # per cent of perplexity, as for XAttention: what `tune` lets a recipe lose by default
BESIDE: dict[str, SageSettings] = {
    "rival": NAIVE,
    "INT4": SageSettings("int4", pv="bf16"),
    "INT4, nothing smoothed": SageSettings("int4", smooth_k=False, smooth_q=False, pv="bf16"),
}

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


def by_settings(settings: SageSettings) -> workload.Attend:
    """Attention of a layer by `sage_attention`, as a function of (layer, q, k, v)."""

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out: Tensor = sage_attention(q, k, v, is_causal=True, variant=settings)
        return out

    return attend


def by_table(table: Sequence[QK], settings: SageSettings = OWN) -> workload.Attend:
    """The same with integers by layer, "exact" ones by the dense kernel."""
    each = [None if qk == "exact" else by_settings(replace(settings, qk=qk)) for qk in table]

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        chosen = each[layer]
        return causal_dense(q, k, v) if chosen is None else chosen(layer, q, k, v)

    return attend


def model_quality(tokens: int, documents: int, settings: SageSettings, others: dict[str, workload.Attend]) -> Quality:
    """Perplexity with all layers quantised, against exact attention; controls and `others` are judged on two documents."""
    arms: dict[str, tuple[workload.Attend, int]] = {
        "sage": (by_settings(settings), documents),
        "deleted": (lambda layer, q, k, v: mean_of_values(q, k, v), 2),
        **{name: (attend, 2) for name, attend in others.items()},
    }
    return perplexity_quality(perplexity_rises(tokens, documents, arms), "sage", rival=RIVAL)


def _accuracies(found: list[Tensor], expected: list[Tensor]) -> dict[str, list[float]]:
    """`accuracy` of each layer's output, by measure."""
    each = [accuracy(a, b) for a, b in zip(found, expected, strict=True)]
    return {name: [measures[name] for measures in each] for name in each[0]}


@functools.cache
def adaptive_table(tokens: int) -> list[QK]:
    """Integers for each layer by calibration on other text, at most 1024 tokens of it."""
    loaded = load_model(MODEL, dtype=torch.bfloat16)
    return calibrate_model(loaded.model, calibration_windows(loaded.tokenizer, window=min(tokens, 1024), n=1))


@experiment(
    "sageattention2/kernel-speedup",
    points={
        "smoke": [{"tokens": 512, "documents": 2}],
        "small": [{"tokens": 4096, "documents": 4}],
        "full": [
            {"tokens": tokens, "documents": 8, "granularity": granularity, "smooth_q": smooth_q}
            for tokens in (8000, 4096, 2048)
            for granularity, smooth_q in (("per_thread", True), ("per_block", False))
        ],
    },
    operator=ATTENTION,
    paper=PAPER,
    departures=DEPARTURES,
    decides={"full": {"tokens": 8000, "documents": 8, "granularity": "per_thread", "smooth_q": True}},
    guard=Guard("perplexity", TOLERANCE / 100, without=CHOICELESS),
    refuted_if="smoothing, quantising and attending takes longer than torch's SDPA",
    minutes=15,
)
def kernel_speedup(
    tokens: int, documents: int, granularity: Granularity = "per_thread", smooth_q: bool = True
) -> Trial:
    """Attention of four layers in bfloat16: SDPA, the exact kernel, and INT8 scores with smoothing and quantising.

    The quality is the perplexity of SmolLM2 with INT8 scores in all layers, over documents of the same length, of which the first is
    timed. Beside it stand INT4, INT4 without smoothing, and 4 and 8 bits mixed by layer; the timed ablation leaves out smoothing and
    fine scales. The second model has noise on its weights (`prefill.NOISE`).
    """
    layers = captured_layers(tokens, documents)  # on the CPU: the fast kernel runs there
    settings = replace(OWN, granularity=granularity, smooth_q=smooth_q)

    def attention(each: SageSettings) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        return functools.partial(sage_attention, is_causal=True, variant=each)

    def quality() -> Quality:
        beside = {name: by_settings(each) for name, each in BESIDE.items()}
        table = {"INT4 and INT8 by layer": by_table(adaptive_table(tokens))}
        return model_quality(tokens, documents, settings, beside | table)

    def details() -> dict[str, Any]:
        exact = over_layers(layers, causal_dense)
        macs = sum(AttentionPlan(tokens, tokens).macs(head_dim=q.shape[3], heads=q.shape[1]) for q, _, _ in layers)
        second = perplexity_rises(tokens, documents, {"sage": (by_settings(settings), 2)}, perturbed=True)["sage"]
        return {
            "layers": list(LAYERS),
            "vnni": has_vnni(),
            "integer_macs": macs // 2,
            "bfloat16_macs": macs // 2,
            "kernel": _accuracies(over_layers(layers, attention(settings)), exact),
            "bfloat16_rounding": _accuracies(over_layers(layers, causal_sdpa), exact),
            "emulated": error_table(layers[1:2], queries=min(256, tokens)),
            "adaptive_table": adaptive_table(tokens),
            "rise_in_percent_off_the_grid": {"value": second.value, "of_each": list(second.each)},
        }

    return Trial(
        baseline=lambda: over_layers(layers, causal_sdpa),
        candidate=lambda: over_layers(layers, attention(settings)),
        exact=lambda: over_layers(layers, causal_dense),
        arms={RIVAL: lambda: over_layers(layers, attention(NAIVE))},
        quality=quality,
        details=details,
    )


@experiment(
    "sageattention2/xformers-speedup",
    points={
        "smoke": [{"tokens": 512, "documents": 2}],
        "small": [{"tokens": 2048, "documents": 4}],
        "full": [{"tokens": tokens, "documents": 8} for tokens in (8000, 4096, 2048)],
    },
    operator=ATTENTION,
    paper=PAPER,
    departures=DEPARTURES,
    decides={"full": {"tokens": 8000, "documents": 8}},
    guard=Guard("perplexity", TOLERANCE / 100, without=CHOICELESS),
    refuted_if="smoothing, quantising and attending takes longer than memory-efficient attention by chunks",
    measured_here=""
    if find_xformers() is not None
    else "memory-efficient attention by torch operators, in place of xformers",
    minutes=15,
)
def xformers_speedup(tokens: int, documents: int) -> Trial:
    """Attention of four layers in bfloat16: xformers' memory-efficient attention, SDPA, the exact kernel, and INT8 as above.

    xformers itself is the baseline where it can be imported and there is a GPU. There the candidate is emulated, for its kernel
    runs on CPUs, and can only lose (`emulated` in the details). Elsewhere `chunked_attention` stands in, at its fastest sizes of
    chunks; the details hold these, and how exact the stand-in and the INT8 scores are. The quality is the model's.
    """
    layers, baseline, about = memory_efficient(captured_layers(tokens, documents))
    int8 = functools.partial(sage_attention, is_causal=True, variant=OWN)

    def details() -> dict[str, Any]:
        exact = [causal_sdpa(q.float(), k.float(), v.float()) for q, k, v in layers]
        return {
            **about,
            "layers": list(LAYERS),
            "vnni": has_vnni(),
            "emulated": bool(kernel_refuses(*layers[0], OWN)),
            "baseline_accuracy": _accuracies(over_layers(layers, baseline), exact),
            "free_accuracy": _accuracies(over_layers(layers, causal_sdpa), exact),
            "candidate_accuracy": _accuracies(over_layers(layers, int8), exact),
        }

    return Trial(
        baseline=lambda: over_layers(layers, baseline),
        candidate=lambda: over_layers(layers, int8),
        free=lambda: over_layers(layers, causal_sdpa),
        exact=lambda: over_layers(layers, causal_dense),
        quality=functools.partial(model_quality, tokens, documents, OWN, {"rival": by_settings(NAIVE)}),
        details=details,
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
        out: Tensor = sage_attention(q, k, v, is_causal=causal, scale=scale, mask=mask, variant=settings)
        return out

    return attend


@experiment(
    "sageattention2/cogvideo-time",
    points={
        "smoke": [{"frames": 8, "side": 8, "width": 64, "steps": 4, "updates": 10, "clips": 2}],
        "small": [{"frames": 16, "side": 16, "width": 128, "steps": 10, "updates": 150, "clips": 4}],
        "full": [
            {"frames": frames, "side": 16, "width": width, "steps": 50, "updates": 2000, "clips": 6}
            for frames, width in ((64, 512), (32, 256), (16, 128))
        ],
    },
    operator=ATTENTION,
    paper={**PAPER, "tokens": 45_000, "width": 3072, "steps": 50},
    departures={
        **DEPARTURES,
        "width": "a model that is trained here in a minute; attention's share of its MACs is that of the paper's model, 71 %",
        "steps": "fewer of the same kind: every step costs the same, so their number cancels in the ratio",
    },
    decides={"full": {"frames": 64, "side": 16, "width": 512, "steps": 50, "updates": 2000, "clips": 6}},
    guard=Guard(
        "squared distance to the dense sample, as a share of that with attention deleted",
        0.01,
        relative=False,
        without=CHOICELESS,
    ),
    refuted_if="sampling with integer scores takes longer than with torch's SDPA",
    measured_here="a CogVideoX of four layers, trained here on moving crops of photographs",
    minutes=120,
)
def cogvideo_time(frames: int, side: int, width: int, steps: int, updates: int, clips: int) -> Trial:
    """A small CogVideoX, sampled in bfloat16 as diffusers made it, by the exact kernel, and with INT8 scores, same noise.

    Clips are `frames` of side x side patches, a token for two frames of a patch: from 2,048 tokens to 8,192. What can be saved is
    bounded by attention's share of the work. CogVideoX1.5-5B with its 45,000 tokens of 3,072 channels spends 71 % of a block's
    MACs on QK^T and PV (our reckoning); so do 2,048 tokens of 128 channels, 4,096 of 256 and 8,192 of 512. The details hold
    the shares, of MACs and of time, and the table of integers by step and layer.

    "Negligible loss" is taken as a hundredth of what deleting attention does to the sample (20 dB nearer to it), over `clips` noises and
    prompts. INT4, INT4 without smoothing and the mixture stand beside.
    """
    trained, fit = cogvideox.train(width, updates)
    model = trained.bfloat16()
    own = dict(model.model.attn_processors)

    def sample(attend: Attend | None = None, number: int = 0, steps: int = steps) -> Tensor:
        model.model.set_attn_processor(dict(own))
        if attend is not None:
            set_attention(model.model, [attend] * cogvideox.LAYERS)
        return run(number, steps)

    def run(number: int, steps: int = steps) -> Tensor:
        noise = torch.randn(
            1, 3, frames, side * PATCH, side * PATCH, generator=torch.Generator().manual_seed(number + 1)
        )
        return cogvideox.sample(model, noise, steps, label=number % 6)

    @functools.cache
    def table() -> list[list[QK]]:
        model.model.set_attn_processor(dict(own))
        return calibrate_steps(model.model, functools.partial(run, clips))  # a noise that is not judged

    def mixed(number: int) -> Tensor:
        chosen = table()
        model.model.set_attn_processor(dict(own))
        install_steps(model.model, chosen)
        return run(number)

    def arm(attend: Attend) -> Callable[[int], Tensor]:
        return lambda number: sample(attend, number)

    @functools.cache
    def judged() -> tuple[dict[str, list[float]], dict[str, list[float]]]:
        arms = {
            "sage": arm(attend_quantised(OWN)),
            "deleted": arm(attend_to_nothing),
            "dense by our kernel": arm(attend_exact),
            **{name: arm(attend_quantised(each)) for name, each in BESIDE.items()},
            MIXED: mixed,
        }
        return shares(arms, lambda number: sample(None, number), clips)

    def seconds(attend: Attend) -> dict[str, float]:
        clocked, begin = Clocked(attend), time.perf_counter()
        sample(clocked)
        return {"all": time.perf_counter() - begin, "attention": clocked.seconds}

    def details() -> dict[str, Any]:
        cost = count_cost(functools.partial(sample, None, 0, 1))
        found, decibels = judged()
        return {
            "tokens": frames // cogvideox.FRAMES * side**2 + cogvideox.WORDS,
            "training_loss": fit.loss,
            "loss_of_the_best_multiple_of_the_noised_clip": fit.floor,
            "vnni": has_vnni(),
            "attention_share_of_the_macs": cost.total("attention").macs / cost.macs,
            "seconds": {
                "SDPA": seconds(attend_sdpa),
                "exact kernel": seconds(attend_exact),
                "INT8": seconds(attend_quantised(OWN)),
            },
            "share_of_the_deletion_by_clip": found,
            "PSNR_dB_by_clip": decibels,
            "integers_by_step": [dict(Counter(row)) for row in table()],
        }

    return Trial(
        baseline=sample,
        candidate=functools.partial(sample, attend_quantised(OWN)),
        exact=functools.partial(sample, attend_exact),
        quality=lambda: clip_quality(judged()[0], "sage", ("deleted", *BESIDE, MIXED), rival=RIVAL),
        details=details,
    )
