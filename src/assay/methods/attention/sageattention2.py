"""SageAttention2: attention with integer scores and FP8 values (arXiv 2411.10958).

Q K^T is multiplied in INT4 or INT8. Smoothing keeps it accurate: the mean key is subtracted from all keys (every logit of a row
shifts alike, so softmax does not change), the mean query of each 128 rows is subtracted from those rows, and the logits of what was
removed, dS = qm k'^T, are added back in float. Scales are shared by a block, a warp, or the rows that one GPU thread holds. P V is
multiplied in FP8 E4M3: P in [0, 1] with the fixed scale 448, V with a scale per channel, each key block's partial sums flushed into
float32 because FP8 tensor cores sum in about 22 bits.

`sage_attention` emulates all of that in torch, rounding as the kernels round (half away from zero). What a CPU does fast runs in
C++: INT8 or INT4 codes multiplied by VNNI, and, as no CPU multiplies FP8, P V in bfloat16 with float32 sums. There the finest
granularity costs nothing extra, and INT4 costs as much as INT8, because it has no instruction of its own.

`variant="as_released"` is what the released package runs on FP8 GPUs: INT8, queries not smoothed, FP8 summed in fp16 with V scaled
to 2.25 ("fp8++"). `our choice`: 22-bit sums are cut to 13 bits of mantissa after every 32 keys; means, maxima and values exclude
padding; the mixture of precisions is a table by layer (and denoising step) with thresholds on cosine and relative L1; head
dimensions are not padded; a query that sees nothing gives zeros and a log-sum-exp of -inf.

When NOT to use it: decoding (one query: memory bound, kept exact here), prompts of a few hundred tokens, training (no gradient),
processors without AVX512-VNNI (the exact kernel is as fast) or with AMX (the exact kernel is faster: softmax takes the time, not the
products), INT4 in layers that calibration has not seen, position biases, soft caps.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, cast, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from assay import checks
from assay.methods.core import kernels
from assay.methods.core.attention import integration
from assay.methods.core.attention import plan as plans
from assay.methods.core.attention.diffusers_processor import self_attentions, set_attention
from assay.methods.core.attention.integration import (
    can_register,
    each_layer,
    layer_of,
    parse_settings,
    register_attention,
    settings_of,
    share_reached,
    store_settings,
)
from assay.methods.core.attention.plan import (
    AttentionPlan,
    execute,
    has_bf16,
    has_tiles,
    has_vnni,
    kernel_time,
    needs_grad,
    scale_of,
    unit_stride,
    with_sinks,
)
from assay.methods.core.layers.surgery import takes_token_ids
from assay.methods.transform import Effect, Fit, TuneContext

QK = Literal["int4", "int8", "exact"]
Granularity = Literal["per_tensor", "per_block", "per_warp", "per_thread"]
PV = Literal["fp8", "fp8++", "fp8_single", "bf16", "exact"]
Layout = Literal["HND", "NHD"]
Backend = Literal["auto", "kernel", "torch"]

NAME = "assay_sageattention2"  # as attn_implementation
LEVELS = {"int4": 7, "int8": 127}
FP8_MAX = 448.0
QUERY_BLOCK, KEY_BLOCK = 128, 64
INT8_TIME = 0.85  # of the exact bfloat16 kernel's time for prefill, measured on Zen 5; a guess elsewhere


@dataclass(frozen=True)
class SageSettings:
    """How attention is computed; the defaults are the paper's 4-bit form. Raises ValueError for a value not listed.

    `qk`: integers of Q K^T, or "exact" (not quantised). `granularity` of their scales: "per_tensor" (a head), "per_block" (128
    queries, 64 keys), "per_warp" (`warp_rows` = 32 or 16 queries, 64 keys), "per_thread" (rows of equal index mod 8 of a warp's
    queries; row pairs 2t, 2t + 1 mod 8 of 64 keys). `pv`: "fp8" (two-level sums), "fp8++" (V scaled to 2.25, sums of a key block
    in fp16), "fp8_single" (22-bit sums throughout: what the two levels repair), "bf16", or "exact".
    """

    qk: QK = "int4"
    granularity: Granularity = "per_thread"
    smooth_k: bool = True
    smooth_q: bool = True
    smooth_v: bool = False
    pv: PV = "fp8"
    warp_rows: int = 32

    def __post_init__(self) -> None:
        checks.choice("qk", self.qk, get_args(QK))
        checks.choice("granularity", self.granularity, get_args(Granularity))
        checks.choice("pv", self.pv, get_args(PV))
        checks.choice("warp_rows", self.warp_rows, (16, 32))
        for name in ("smooth_k", "smooth_q", "smooth_v"):
            checks.flag(name, getattr(self, name))


VARIANTS = {
    "paper": SageSettings(),
    "paper_8bit": SageSettings(qk="int8"),
    "as_released": SageSettings(qk="int8", smooth_q=False, pv="fp8++"),
    "cpu": SageSettings(qk="int8", pv="bf16"),
}

# ------------------------------------------------------------------------------------------------- smoothing, quantising


def masked_mean(x: Tensor, there: Tensor, size: int | None = None) -> Tensor:
    """Means of the rows of x (..., rows, dim) that are `there`, bool (..., rows, 1): (..., 1, dim), or one a block of `size` rows.

    A block without a row has mean 0.
    """
    size = x.shape[-2] if size is None else size
    fill = -x.shape[-2] % size
    x, there = F.pad(x.masked_fill(~there, 0), (0, 0, 0, fill)), F.pad(there, (0, 0, 0, fill))
    total = x.unflatten(-2, (-1, size)).sum(-2)
    return total / there.unflatten(-2, (-1, size)).sum(-2).clamp(min=1)


def quantise(x: Tensor, levels: int, size: int, classes: int = 1) -> tuple[Tensor, Tensor]:
    """Integers in [-levels, levels] and their scales: int8 (..., rows, dim) and (..., rows, 1), x ~ integers * scales. Scales are
    float32, or float64 for float64.

    Inside each `size` rows (the last such group may be shorter) rows share a scale if they are of one class: row r of every 8
    is of class r // (8 / classes). scale = max|x| / levels + 1e-7, rounding half away from zero. A group with NaN or infinity
    gets zeros and a scale that is not finite. Raises ValueError for a size that is not a multiple of 8, or classes not of 8.
    """
    checks.whole("levels", levels, low=1, high=127)
    if checks.whole("size", size) < 8 or size % 8 or classes not in (1, 2, 4, 8):
        raise ValueError(f"size must be a multiple of 8 and classes 1, 2, 4 or 8, got {size} and {classes}")
    x = checks.tensor("x", x, shape=("...", "rows", "dim"), empty=True)
    if x.dtype.itemsize < 4:  # scales of small rows would be no numbers of 16 bits
        x = x.float()
    rows = x.shape[-2]
    padded = F.pad(x.abs(), (0, 0, 0, -rows % size))
    # (..., groups, eights, classes, rows of a class, dim)
    grouped = padded.unflatten(-2, (-1, size // 8, classes, 8 // classes))
    most = grouped.amax((-4, -2, -1), keepdim=True).expand(*grouped.shape[:-1], 1)
    scale = most.flatten(-5, -2)[..., :rows, :] / levels + 1e-7
    level = (x / scale).nan_to_num(0.0, 0.0, 0.0)
    return (level.abs() + 0.5).floor().copysign(level).to(torch.int8), scale


def _groups(settings: SageSettings, queries: int, keys: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """(size, classes) of the queries' scales and of the keys'."""
    if settings.granularity == "per_tensor":
        return (queries + -queries % 8, 1), (keys + -keys % 8, 1)
    if settings.granularity == "per_block":
        return (QUERY_BLOCK, 1), (KEY_BLOCK, 1)
    if settings.granularity == "per_warp":
        return (settings.warp_rows, 1), (KEY_BLOCK, 1)
    return (settings.warp_rows, 8), (KEY_BLOCK, 4)


def round_fp8(x: Tensor) -> Tensor:
    """To the nearest E4M3 number, in the dtype of x; |x| must be at most 448."""
    return x.to(torch.float8_e4m3fn).to(x.dtype)


def round_fp22(x: Tensor) -> Tensor:
    """Cut to 13 bits of mantissa, as FP8 tensor cores keep their sums; in the dtype of x."""
    return (x.float().contiguous().view(torch.int32) & ~0x3FF).view(torch.float32).to(x.dtype)


def quantise_values(v: Tensor, most: float = FP8_MAX) -> tuple[Tensor, Tensor]:
    """E4M3 numbers of v (..., keys, dim), as floats up to `most`, and their scales a channel (..., 1, dim)."""
    scale = v.abs().amax(-2, keepdim=True) / most
    scale = torch.where(scale == 0, 1.0, scale)
    return round_fp8((v / scale).clamp(-most, most)), scale


# ------------------------------------------------------------------------------------------------------------- emulation


def _matmul(x: Tensor, y: Tensor) -> Tensor:
    """(batch, heads, n, a) by (batch, key heads, a, m), heads in groups."""
    return (x.reshape(x.shape[0], y.shape[1], -1, x.shape[3]) @ y).view(*x.shape[:3], -1)


def _present(
    q: Tensor, k: Tensor, key_start: Tensor | None, mask: Tensor | None, causal: bool
) -> tuple[Tensor, Tensor]:
    """Which queries see anything, and which keys are seen by any head: bool (batch, 1, tokens, 1) each."""
    batch, queries, keys = q.shape[0], q.shape[2], k.shape[2]
    positions = torch.arange(keys, device=q.device)
    there_k = torch.ones(batch, keys, dtype=torch.bool, device=q.device)
    there_q = torch.ones(batch, queries, dtype=torch.bool, device=q.device)
    if key_start is not None:
        there_k = positions >= key_start.to(q.device)[:, None]
        there_q = there_k[:, keys - queries :]
    if mask is not None:
        seen = mask.any(1)
        if causal:
            seen = seen & (positions <= positions[keys - queries :, None])
        seen = seen & there_k[:, None, :] & there_q[:, :, None]
        there_k, there_q = there_k & seen.any(1), there_q & seen.any(2)
    return there_q[:, None, :, None], there_k[:, None, :, None]


def _accumulate(pv: PV, sums: Tensor, p: Tensor, v: Tensor) -> Tensor:
    """`sums` + P V over one key block; P in [0, 1] is rounded here, V was before."""
    if pv == "exact":
        return sums + _matmul(p, v)
    if pv == "bf16":
        return sums + _matmul(p.bfloat16().to(p.dtype), v)
    codes = round_fp8(p * FP8_MAX)
    total = sums if pv == "fp8_single" else torch.zeros_like(sums)
    for i in range(0, p.shape[-1], 32):  # the keys of one tensor core instruction
        total = total + _matmul(codes[..., i : i + 32], v[:, :, i : i + 32])
        total = total.half().to(p.dtype) if pv == "fp8++" else round_fp22(total)
    return total if pv == "fp8_single" else sums + total


def _emulate(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    settings: SageSettings,
    causal: bool,
    scale: float,
    key_start: Tensor | None,
    mask: Tensor | None,
    window: int | None,
) -> tuple[Tensor, Tensor]:
    """The output and the log-sum-exp, by the kernels' own loop over key blocks of 64 with online softmax."""
    dtype, wide = q.dtype, torch.float64 if q.dtype == torch.float64 else torch.float32
    batch, heads, queries, dim = q.shape
    keys, per_group, offset = k.shape[2], heads // k.shape[1], k.shape[2] - q.shape[2]
    there_q, there_k = _present(q, k, key_start, mask, causal)
    q = q.to(wide).masked_fill(~there_q, 0)
    k, v = (x.to(wide).masked_fill(~there_k, 0) for x in (k, v))

    correction: Tensor | float = 0.0  # of the log-sum-exp
    if settings.smooth_k:
        key_mean = masked_mean(k, there_k)
        correction = scale * _matmul(q, key_mean.mT)
        k = (k - key_mean).masked_fill(~there_k, 0)
    ds: Tensor | None = None
    if settings.smooth_q:
        query_mean = masked_mean(q, there_q, QUERY_BLOCK)  # (batch, heads, blocks, dim)
        ds = _matmul(query_mean, k.mT)
        q = (q - query_mean.repeat_interleave(QUERY_BLOCK, 2)[:, :, :queries]).masked_fill(~there_q, 0)
    value_mean: Tensor | float = 0.0
    if settings.smooth_v:
        value_mean = masked_mean(v, there_k)
        v = (v - value_mean).masked_fill(~there_k, 0)
        value_mean = value_mean.repeat_interleave(per_group, 1)

    q_scale, k_scale = q.new_ones(1, 1, queries, 1), q.new_ones(1, 1, keys, 1)
    if settings.qk != "exact":
        levels = LEVELS[settings.qk]
        exact = torch.float64 if levels**2 * dim >= 1 << 24 else wide  # integers of such a matmul fit the mantissa
        by_query, by_key = _groups(settings, queries, keys)
        q, q_scale = quantise(q, levels, *by_query)
        k, k_scale = quantise(k, levels, *by_key)
        q, k, k_scale = q.to(exact), k.to(exact), k_scale.repeat_interleave(per_group, 1)
    v_scale: Tensor | float = 1.0
    if settings.pv == "bf16":
        v = v.bfloat16().to(wide)
    elif settings.pv != "exact":
        v, per_channel = quantise_values(v, 2.25 if settings.pv == "fp8++" else FP8_MAX)
        v_scale = per_channel.repeat_interleave(per_group, 1) / FP8_MAX

    top = torch.full((batch, heads, queries, 1), -math.inf, dtype=wide, device=q.device)
    weight, sums = torch.zeros_like(top), top.new_zeros(batch, heads, queries, v.shape[3])
    positions = torch.arange(keys, device=q.device)
    for j in range(0, keys, KEY_BLOCK):
        first = max(0, j - offset) if causal else 0  # the queries before it see nothing of this block
        at = slice(j, min(j + KEY_BLOCK, keys))
        scores = _matmul(q[:, :, first:], k[:, :, at].mT).to(wide) * (q_scale[:, :, first:] * k_scale[:, :, at].mT)
        if ds is not None:
            scores = scores + ds[:, :, torch.arange(first, queries, device=q.device) // QUERY_BLOCK, at]
        seen = (there_k[:, :, at].mT & there_q[:, :, first:]) if mask is None else mask[:, :, first:, at]
        if mask is not None and key_start is not None:
            seen = seen & there_k[:, :, at].mT & there_q[:, :, first:]
        if causal:
            seen = seen & (positions[at] <= positions[offset + first :, None])
        if window is not None:
            seen = seen & (positions[at] > positions[offset + first :, None] - window)
        scores = (scores * scale).masked_fill(~seen, -math.inf)
        before = top[:, :, first:]
        now = torch.maximum(before, scores.amax(-1, keepdim=True))
        shift = now.masked_fill(now == -math.inf, 0)
        fade, p = (before - shift).exp(), (scores - shift).exp()
        weight[:, :, first:] = weight[:, :, first:] * fade + p.sum(-1, keepdim=True)
        sums[:, :, first:] = _accumulate(settings.pv, sums[:, :, first:] * fade, p, v[:, :, at])
        top[:, :, first:] = now
    empty = weight == 0
    out = (sums * v_scale / weight.masked_fill(empty, 1) + value_mean).masked_fill(empty, 0)
    lse = (top + weight.log() + correction).masked_fill(empty, -math.inf)
    return out.to(dtype), lse[..., 0]


# ---------------------------------------------------------------------------------------------------------------- kernel


def kernel_refuses(q: Tensor, k: Tensor, v: Tensor, settings: SageSettings, mask: Tensor | None = None) -> str:
    """Why the C++ kernel cannot run this; empty when it can. Tensors are (batch, heads, tokens, dim)."""
    if mask is not None:
        return "takes key_start, not a mask"
    if settings.qk == "exact":
        return "quantises Q K^T; use `execute` of an AttentionPlan for exact attention"
    if settings.granularity == "per_tensor":
        return "has no per_tensor scales"
    if settings.pv not in ("bf16", "exact") or settings.smooth_v:
        return (
            f"multiplies values in bf16 or exactly, not smoothed, got pv {settings.pv!r}, smooth_v {settings.smooth_v}"
        )
    return plans.kernel_refuses(q, k, v, precision="int8")


# -------------------------------------------------------------------------------------------------------------- operator


def sage_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    layout: Layout = "HND",
    is_causal: bool = False,
    scale: float | None = None,
    return_lse: bool = False,
    key_start: Tensor | None = None,
    mask: Tensor | None = None,
    window: int | None = None,
    sinks: Tensor | None = None,
    variant: str | SageSettings = "paper",
    backend: Backend = "auto",
) -> Any:
    """Quantised attention in the shape, layout and dtype of q; with `return_lse` also the log-sum-exp, (batch, heads, queries).

    `layout` "HND": q (batch, heads, queries, dim), k and v (batch, key heads, keys, dim); "NHD": tokens before heads. Heads are
    a multiple of key heads. Causal queries are the last of the keys. `scale` multiplies Q K^T (default dim ** -0.5). Keys before
    `key_start`, int64 (batch,), are padding, and so are the queries there; `mask`, bool, broadcasts to (batch, heads, queries,
    keys), True where a query sees a key. With a `window`, which is for causal attention, a query sees itself and the window - 1
    keys before it; `sinks` as in `execute`. The log-sum-exp is that of the scaled scores, natural, in float32 (float64 of float64).

    `variant` is "paper", "paper_8bit", "as_released", "cpu" (INT8, values in bfloat16: what the kernel is for) or your own
    `SageSettings`. `backend="torch"` emulates, "kernel" is C++, "auto" takes the kernel where it can do exactly what the
    settings say; on a processor without bfloat16 products it multiplies "bf16" values in float32.
    queries * keys * (dim + value dim) MACs a head (1 MAC = 2 FLOPs), half of it causal. Forward only.
    Raises TypeError for arguments of another kind, ValueError for tensors that do not fit together or need gradients, and for
    unknown options. `kernels.paths()` counts which backend ran.

    >>> q, k, v = torch.randn(3, 1, 2, 64, 16).unbind()
    >>> exact = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    >>> accuracy(sage_attention(q, k, v, is_causal=True, variant="cpu"), exact)["cosine"] > 0.999
    True
    """
    settings = _settings(variant)
    checks.choice("layout", layout, get_args(Layout))
    checks.choice("backend", backend, get_args(Backend))
    checks.flag("is_causal", is_causal)
    for name, x in (("q", q), ("k", k), ("v", v)):
        checks.tensor(name, x, ndim=4)
    if layout == "NHD":
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    _check(q, k, v, is_causal, key_start)
    if window is not None and checks.whole("window", window, low=1) and not is_causal:
        raise ValueError(f"window must be None unless causal, got {window}")
    if sinks is not None:
        checks.tensor("sinks", sinks, shape=(q.shape[1],), device=q.device)
    if mask is not None:
        shape = (*q.shape[:3], k.shape[2])
        checks.tensor("mask", mask, dtype="bool", empty=True)
        try:
            mask = mask.to(q.device).expand(shape)
        except RuntimeError as error:
            raise ValueError(f"mask must broadcast to {shape}, got {tuple(mask.shape)}") from error
    scale = scale_of(scale, q)
    refused = kernel_refuses(q, k, v, settings, mask) if backend != "torch" else "is not asked for"
    if backend == "kernel" and refused:
        raise ValueError(f"backend 'kernel' {refused}")
    kernels.ran("sageattention2", "torch" if refused else "kernel")
    if refused:
        with torch.no_grad():
            out, lse = _emulate(q, k, v, settings, is_causal, scale, key_start, mask, window)
    else:
        start = None if key_start is None else key_start.cpu().contiguous()
        by_query, by_key = _groups(settings, q.shape[2], k.shape[2])
        levels, half = LEVELS[settings.qk], settings.pv == "bf16" and has_bf16()
        where = (None, start, QUERY_BLOCK, is_causal, scale)
        options = (*where, levels, [*by_query, *by_key], settings.smooth_q, settings.smooth_k, half)
        out, lse = torch.ops.assay.int8_attention(
            unit_stride(q), unit_stride(k), unit_stride(v), *options, window=window or 0
        )
    if sinks is not None:
        out, lse = with_sinks(out, lse, sinks.detach())
    out = out.transpose(1, 2) if layout == "NHD" else out
    return (out, lse) if return_lse else out


def _settings(variant: str | SageSettings) -> SageSettings:
    if isinstance(variant, SageSettings):
        return variant
    checks.choice("variant", variant, VARIANTS)
    return VARIANTS[variant]


def _check(q: Tensor, k: Tensor, v: Tensor, causal: bool, key_start: Tensor | None) -> None:
    if k.shape[0] != q.shape[0] or k.shape[3] != q.shape[3] or v.shape[:3] != k.shape[:3]:
        raise ValueError(f"q {tuple(q.shape)}, k {tuple(k.shape)} and v {tuple(v.shape)} do not fit together")
    if q.shape[1] % k.shape[1]:
        raise ValueError(f"heads of q ({q.shape[1]}) must be a multiple of the heads of k ({k.shape[1]})")
    checks.together(q=q, k=k, v=v)
    if (causal or key_start is not None) and q.shape[2] > k.shape[2]:
        raise ValueError(f"queries must be the last of the keys, got {q.shape[2]} queries and {k.shape[2]} keys")
    if key_start is not None:
        checks.tensor("key_start", key_start, shape=(q.shape[0],), dtype=torch.int64)
        if not ((key_start >= 0) & (key_start <= k.shape[2])).all():
            raise ValueError(f"key_start must lie in [0, {k.shape[2]}], got {key_start.tolist()}")
    if needs_grad(q, k, v):
        raise ValueError("sage_attention has no gradient: detach q, k and v, or use exact attention for training")


# ----------------------------------------------------------------------------------------------------------- calibration


def accuracy(found: Tensor, expected: Tensor) -> dict[str, float]:
    """The paper's three measures over all numbers of two outputs: cosine, relative_l1 (sum|a - b| / sum|b|), rmse."""
    a, b = found.detach().double().flatten(), expected.detach().double().flatten()
    cosine = float(a @ b / (a.norm() * b.norm()).clamp(min=1e-300))
    l1 = float((a - b).abs().sum() / b.abs().sum().clamp(min=1e-300))
    return {"cosine": cosine, "relative_l1": l1, "rmse": float((a - b).square().mean().sqrt())}


def calibrate(
    layers: Iterable[Sequence[Tensor]],
    *,
    candidates: Sequence[QK] = ("int4", "int8"),
    min_cosine: float = 0.99,
    max_l1: float = 0.12,
    settings: SageSettings = VARIANTS["paper"],
    is_causal: bool = True,
    scale: float | None = None,
) -> list[QK]:
    """Which integers each layer tolerates: the first of `candidates` whose output keeps both thresholds, else "exact".

    `layers` holds (q, k, v) of each layer on one calibration batch, (batch, heads, tokens, dim); `settings` says the rest. The
    paper mixes 4 and 8 bit by the cosine to full precision, measured once a layer (and, in diffusion, a denoising step: see
    `calibrate_steps`); the thresholds are our choice.
    Raises ValueError for thresholds that make no sense or unknown candidates.
    """
    checks.number("min_cosine", min_cosine, low=-1, high=1)
    checks.number("max_l1", max_l1, low=0)
    tried = [replace(settings, qk=name) for name in candidates]
    table: list[QK] = []
    for q, k, v in layers:
        plan = AttentionPlan(q.shape[2], k.shape[2], causal=is_causal)
        expected = execute(plan, q.float(), k.float(), v.float(), scale=scale)
        chosen: QK = "exact"
        for candidate in tried:
            found = accuracy(sage_attention(q, k, v, is_causal=is_causal, scale=scale, variant=candidate), expected)
            if found["cosine"] >= min_cosine and found["relative_l1"] <= max_l1:
                chosen = candidate.qk
                break
        table.append(chosen)
    return table


def calibrate_model(model: nn.Module, input_ids: Tensor, **options: Any) -> list[QK]:
    """`calibrate` for every layer of a transformers model on `input_ids`, int64 (1, tokens), each seeing exact inputs.

    `options` as there. The model is left as it was. Raises ValueError for a model whose attention cannot be replaced.
    """
    if reason := can_register(model):
        raise ValueError(f"sageattention2 does not fit this model: {reason}")
    table: list[QK] = []

    def choose(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> None:
        table.append(calibrate([(q, k, v)], scale=scale, **options)[0])

    each_layer(model, input_ids, choose)
    return table


def calibrate_steps(model: nn.Module, sample: Callable[[], Any], **options: Any) -> list[list[QK]]:
    """`calibrate` for every denoising step and layer of a diffusers model: (steps, layers), by one run of `sample()`.

    The run computes attention exactly and calls each self-attention once a step; other processors are put back afterwards.
    `options` as in `calibrate` (attention is taken as not causal). Raises ValueError for a model without self-attentions whose
    processors can be replaced, and for a mask, which integers by the kernel do not take.
    """
    layers = len(self_attentions(model))
    found: list[list[QK]] = [[] for _ in range(layers)]

    def choose(
        layer: int, module: Any, q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None, scale: float | None, **_: Any
    ) -> Tensor:
        if mask is not None:
            raise ValueError(f"calibrate_steps takes self-attention without a mask, got one of {tuple(mask.shape)}")
        found[layer] += calibrate([(q, k, v)], **{"is_causal": False, "scale": scale, **options})
        return execute(AttentionPlan(q.shape[2], k.shape[2], causal=False), q, k, v, scale=scale)

    processors = dict(cast(Any, model).attn_processors)
    try:
        set_attention(model, [functools.partial(choose, layer) for layer in range(layers)])
        sample()
    finally:
        cast(Any, model).set_attn_processor(processors)
    if len({len(column) for column in found}) != 1:
        raise ValueError(f"sample must call each self-attention equally often, got {[len(column) for column in found]}")
    return [list(row) for row in zip(*found, strict=True)]


def install_steps(model: nn.Module, table: Sequence[Sequence[QK]], settings: SageSettings = VARIANTS["cpu"]) -> None:
    """Quantise the self-attentions of a diffusers model by a table of (steps, layers), one call of each layer a step.

    After the last step comes the first again, so that one generation may follow another. `settings` says the rest. Raises ValueError
    for a table that does not fit the model.
    """
    layers = len(self_attentions(model))
    if not table or any(len(row) != layers for row in table):
        raise ValueError(f"table must have a row of {layers} for each step, got {[len(row) for row in table]}")
    chosen = [[replace(settings, qk=qk) for qk in row] for row in table]
    calls = [0] * layers

    def attend(
        layer: int,
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
        now = chosen[calls[layer] % len(chosen)][layer]
        calls[layer] += 1
        if now.qk == "exact" and mask is None:
            return execute(AttentionPlan(q.shape[2], k.shape[2], causal=causal), q, k, v, scale=scale)
        return cast(Tensor, sage_attention(q, k, v, is_causal=causal, scale=scale, mask=mask, variant=now))

    set_attention(model, [functools.partial(attend, layer) for layer in range(layers)])


# ---------------------------------------------------------------------------------------------------------- transformers


@dataclass(frozen=True)
class SageAttentionConfig:
    """Settings of `attn_implementation="assay_sageattention2"`, kept in the model's config as `sageattention2`, a dictionary.

    `qk` is one of "int4", "int8", "exact", or one a layer (see `calibrate_model`); the others as in `SageSettings`, the
    defaults those of "cpu". Prompts shorter than `min_tokens` and single tokens are attended exactly.
    """

    qk: QK | Sequence[QK] = "int8"
    granularity: Granularity = "per_thread"
    smooth_q: bool = True
    smooth_v: bool = False
    pv: PV = "bf16"
    min_tokens: int = 512
    backend: Backend = "auto"

    def __post_init__(self) -> None:
        checks.choice("backend", self.backend, get_args(Backend))
        checks.whole("min_tokens", self.min_tokens, low=0)
        if not isinstance(self.qk, list | tuple | str):
            raise TypeError(f"qk must be one of {', '.join(get_args(QK))}, or a list of them, got {self.qk!r}")
        for qk in [self.qk] if isinstance(self.qk, str) else self.qk:
            self._with(qk)

    def _with(self, qk: QK) -> SageSettings:
        return SageSettings(qk, self.granularity, True, self.smooth_q, self.smooth_v, self.pv)

    def of(self, module: nn.Module | None = None) -> SageSettings:
        """The settings of one attention module, or, where there is one `qk` for all, of any."""
        if isinstance(self.qk, str):
            return self._with(self.qk)
        if module is None:
            raise ValueError(f"qk must be one value for all layers, got {len(self.qk)}")
        return self._with(self.qk[layer_of(module)])

    def check(self, layers: int) -> None:
        """Raise ValueError where the settings do not fit a model of so many layers."""
        if not isinstance(self.qk, str) and len(self.qk) != layers:
            raise ValueError(f"qk must be one value or one for each of {layers} layers, got {len(self.qk)}")


def _plan_of_module(
    module: nn.Module,
    q: Tensor,
    k: Tensor,
    *,
    causal: bool,
    scale: float | None,
    key_start: Tensor | None,
    window: int | None,
) -> tuple[AttentionPlan, Mapping[str, Any]]:
    """The dense plan, and how it is quantised, if at all."""
    config = settings_of(module, "sageattention2", SageAttentionConfig)
    settings = config.of(module)
    plan = AttentionPlan(q.shape[2], k.shape[2], causal=causal, key_start=key_start, window=window)
    exact = settings.qk == "exact" or min(k.shape[2], window or k.shape[2]) < config.min_tokens
    return plan, {} if exact else {"variant": settings, "backend": config.backend}


def _execute(
    plan: AttentionPlan,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None,
    sinks: Tensor | None = None,
    **options: Any,
) -> Tensor:
    if not options or needs_grad(q, k, v):
        return execute(plan, q, k, v, scale=scale, sinks=sinks)
    where: dict[str, Any] = {"is_causal": plan.causal, "key_start": plan.key_start, "window": plan.window}
    return cast(Tensor, sage_attention(q, k, v, scale=scale, sinks=sinks, **where, **options))


def register() -> None:
    """Register `attn_implementation="assay_sageattention2"` with transformers (which this imports); may be called repeatedly.

    Prompts are quantised. Computed exactly, as `register_attention` does, are single tokens, short prompts, layers set to
    "exact", windows shorter than `min_tokens`, masks that are neither causal nor windows, and whatever needs a
    gradient. Settings: `model.config.sageattention2`.
    """
    register_attention(NAME, _plan_of_module, _execute)


# ------------------------------------------------------------------------------------------------------------- transform


class SageAttention:
    """INT8 prefill attention for the tuner. Configuration: the settings of `SageAttentionConfig`; `qk` may also be "calibrated",
    then `calibrate_model` says on the longest calibration text which layers take INT8 and which stay exact."""

    name = "sageattention2"
    slot = "attention"
    goals: frozenset[str] = frozenset({"ttft"})
    exact = False

    def applies_to(self, model: nn.Module, context: TuneContext) -> Fit:
        if reason := can_register(model):
            return Fit(False, reason)
        if any(parameter.device.type != "cpu" for parameter in model.parameters()):
            return Fit(False, "its fast kernel runs on the CPU")
        config = cast(Any, model).config.get_text_config()
        dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        if dim % 16 or dim > 1024:
            return Fit(False, f"its kernel takes head dimensions that are multiples of 16, the model's is {dim}")
        if context.prompt_tokens < 1024:
            return Fit(False, f"prompts of {context.prompt_tokens} tokens are too short to gain (1024 needed)")
        if not has_vnni():
            return Fit(False, "needs a C++ compiler and a processor with AVX512-VNNI")
        if has_tiles():
            return Fit(False, "on a processor with AMX the exact kernel is faster than integer scores")
        share, reached, reason = share_reached(model, context.prompt_tokens, 512, "stay exact")
        if reason:
            return Fit(False, reason, share=share)
        gain = kernel_time() * (INT8_TIME * share + 1 - share)
        return Fit(True, "", (Effect("attention", macs=gain),), share, reached)

    def configs(self, model: nn.Module, context: TuneContext) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = [{"qk": "int8"}, {"qk": "int8", "smooth_q": False}]
        return [*found, {"qk": "calibrated"}] if context.calibration and takes_token_ids(model) else found

    def check(self, config: Mapping[str, Any]) -> None:
        """Raises ValueError or TypeError naming the setting that is wrong."""
        calibrated = isinstance(config, Mapping) and config.get("qk") == "calibrated"
        parse_settings(SageAttentionConfig, {**config, "qk": "int8"} if calibrated else config)

    def apply(self, model: nn.Module, config: Mapping[str, Any], context: TuneContext) -> nn.Module:
        """Raises TypeError or ValueError, before anything is changed, for a configuration or a model it does not fit."""
        self.check(config)
        if reason := can_register(model):
            raise ValueError(f"sageattention2 does not fit this model: {reason}")
        text = cast(Any, model).config.get_text_config()
        values = dict(config)
        if values.get("qk") == "calibrated":
            if not context.calibration:
                raise ValueError("qk 'calibrated' needs calibration texts, got none")
            if not takes_token_ids(model):
                raise ValueError(f"qk 'calibrated' needs a model of texts, got {type(model).__name__}")
            settings = parse_settings(SageAttentionConfig, {**values, "qk": "int8"}).of()
            longest = max(context.calibration, key=lambda ids: ids.shape[-1])
            strict = {
                "min_cosine": 0.9999,
                "max_l1": 0.012,
            }  # INT8 seldom fails, and the exact kernel costs little more
            values["qk"] = calibrate_model(model, longest, candidates=["int8"], settings=settings, **strict)
        chosen = parse_settings(SageAttentionConfig, values)
        chosen.check(text.num_hidden_layers)
        store_settings(model, "sageattention2", chosen)
        register()
        return integration.set_attention(model, NAME)

    def describe(self, config: Mapping[str, Any]) -> str:
        qk = config.get("qk", "int8")
        how = {"int8": "INT8", "int4": "INT4", "exact": "exact", "calibrated": "INT8, where calibration allows it,"}
        words = f"{how.get(qk, 'INT8 and exact') if isinstance(qk, str) else 'INT8 and exact'} attention of prompts"
        return words if config.get("smooth_q", True) else f"{words} without smoothing of queries"


transform = SageAttention()
