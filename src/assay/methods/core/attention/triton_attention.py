"""An `AttentionPlan` on a GPU: one Triton kernel that walks the kept key blocks of each query block.

Every program takes one tile of queries of one head and one batch row, and runs the online softmax (FlashAttention, arXiv
2205.14135 and 2307.08691) over a *list*: how many key blocks its query block keeps, and which, in order. Blocks that are not
listed are neither read nor multiplied. Query heads of a group read the same keys and values. Blocks larger than a tile are
walked in several steps. Head dimensions that are not powers of two are padded with zeros, on the chip only.

Sums and softmax are float32. bfloat16 and float16 are multiplied as they are, with softmax weights rounded to the same type;
float32 is multiplied as torch's `float32_matmul_precision` says: exactly at "highest", else in TF32.

`our choice`: tile sizes, warps and stages (`constants`); every tile is masked, even those entirely below the diagonal; long rows
start first; queries are not packed by group, so a single query fills only a sixteenth of its tile.

State: compiled for compute capabilities 8.0 and 9.0, but run only by Triton's interpreter (TRITON_INTERPRET=1, CPU tensors).
That shows that the numbers are right and says nothing about speed.

When NOT to use it: dense plans (SDPA has hand-tuned kernels), training (no gradient), decoding.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from assay.methods.core.attention.plan import AttentionPlan, needs_grad

MAX_DIM = 256  # head and value dimension: wider tiles do not fit into shared memory
SMALLEST = 16  # rows or columns of a tile, the least that tl.dot takes
DENSE_BLOCK = 128  # of dense plans, whose own block size means nothing
LOG2_E = 1 / math.log(2)


@triton.jit
def _attend(  # type: ignore[no-untyped-def]  # Triton reads annotations as its own
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    counts_ptr,
    lists_ptr,
    starts_ptr,
    sinks_ptr,
    q_strides,
    k_strides,
    v_strides,
    out_strides,
    counts_strides,
    lists_strides,
    queries,
    keys,
    scale,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    SINKS: tl.constexpr,
    DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    TILE_M: tl.constexpr,
    TILE_N: tl.constexpr,
    TILE_D: tl.constexpr,
    TILE_E: tl.constexpr,
    PRODUCT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One tile of TILE_M queries: (tiles of all query blocks, heads, batch) programs. `scale` includes log2(e).

    WINDOW is the number of keys a query sees, its own included, 0 for all; SINKS says whether there are sinks.
    PRODUCT is the type that is multiplied: that of q.
    """
    QUERY_TILES: tl.constexpr = (BLOCK + TILE_M - 1) // TILE_M  # of a query block
    KEY_TILES: tl.constexpr = (BLOCK + TILE_N - 1) // TILE_N  # of a key block
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    batch = tl.program_id(2).to(tl.int64)
    start = tl.load(starts_ptr + batch).to(tl.int32)
    offset = keys - queries

    query_block = tile // QUERY_TILES
    diagonal = query_block + offset // BLOCK
    first_row = (tile % QUERY_TILES) * TILE_M  # within the block
    last_row = tl.minimum(first_row + TILE_M, BLOCK) - 1
    within = first_row + tl.arange(0, TILE_M)
    position = diagonal * BLOCK + within
    row = (position - offset).to(tl.int64)
    live = (within < BLOCK) & (position >= offset) & (position < keys)

    d = tl.arange(0, TILE_D)
    e = tl.arange(0, TILE_E)
    q_ptr += batch * q_strides[0] + head * q_strides[1]
    k_ptr += batch * k_strides[0] + head // GROUP * k_strides[1]
    v_ptr += batch * v_strides[0] + head // GROUP * v_strides[1]
    out_ptr += batch * out_strides[0] + head * out_strides[1]
    counts_ptr += batch * counts_strides[0] + head * counts_strides[1] + query_block * counts_strides[2]
    lists_ptr += batch * lists_strides[0] + head * lists_strides[1] + query_block.to(tl.int64) * lists_strides[2]
    q = tl.load(
        q_ptr + row[:, None] * q_strides[2] + d[None, :] * q_strides[3],
        mask=live[:, None] & (d < DIM)[None, :],
        other=0.0,
    ).to(PRODUCT)

    count = tl.load(counts_ptr)
    steps = count * KEY_TILES
    if CAUSAL:  # the list ends at the diagonal, if at all: leave out the tiles above the last query
        last_listed = tl.load(lists_ptr + tl.maximum(count - 1, 0))
        steps -= tl.where(last_listed == diagonal, KEY_TILES - 1 - last_row // TILE_N, 0)
    nobody = (diagonal * BLOCK + last_row < tl.maximum(offset, start)) | (diagonal * BLOCK + first_row >= keys)
    steps = tl.where(nobody, 0, steps)

    top = tl.full([TILE_M], float("-inf"), tl.float32)
    weight = tl.zeros([TILE_M], tl.float32)
    sums = tl.zeros([TILE_M, TILE_E], tl.float32)
    for step in range(steps):
        key_block = tl.load(lists_ptr + step // KEY_TILES)
        inside = (step % KEY_TILES) * TILE_N + tl.arange(0, TILE_N)
        column = key_block * BLOCK + inside
        there = (column >= start) & (column < keys)
        if BLOCK % TILE_N != 0:
            there = there & (inside < BLOCK)
        at = column.to(tl.int64)
        k = tl.load(
            k_ptr + at[None, :] * k_strides[2] + d[:, None] * k_strides[3],
            mask=there[None, :] & (d < DIM)[:, None],
            other=0.0,
        ).to(PRODUCT)
        scores = tl.dot(q, k, input_precision=PRECISION) * scale
        seen = there[None, :]
        if CAUSAL:
            seen = seen & (column[None, :] <= position[:, None])
        if WINDOW > 0:
            seen = seen & (column[None, :] > position[:, None] - WINDOW)
        scores = tl.where(seen, scores, float("-inf"))
        now = tl.maximum(top, tl.max(scores, 1))
        shift = tl.where(now == float("-inf"), 0.0, now)
        fade = tl.exp2(top - shift)
        p = tl.exp2(scores - shift[:, None])
        v = tl.load(
            v_ptr + at[:, None] * v_strides[2] + e[None, :] * v_strides[3],
            mask=there[:, None] & (e < VALUE_DIM)[None, :],
            other=0.0,
        )
        weight = weight * fade + tl.sum(p, 1)
        sums = tl.dot(p.to(v.dtype).to(PRODUCT), v.to(PRODUCT), sums * fade[:, None], input_precision=PRECISION)
        top = now

    empty = (weight == 0.0) | (position < start)
    if SINKS:
        sink = tl.load(sinks_ptr + head).to(tl.float32) * 1.4426950408889634  # log2(e)
        weight += tl.exp2(sink - tl.where(top == float("-inf"), 0.0, top))
    out = tl.where(empty[:, None], 0.0, sums / tl.where(weight == 0.0, 1.0, weight)[:, None])
    tl.store(
        out_ptr + row[:, None] * out_strides[2] + e[None, :] * out_strides[3],
        out.to(out_ptr.dtype.element_ty),
        mask=live[:, None] & (e < VALUE_DIM)[None, :],
    )


PRODUCTS = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}
INTERPRETED = not isinstance(_attend, triton.JITFunction)  # TRITON_INTERPRET=1 was set when this module was imported
if INTERPRETED:  # it multiplies the bits of bfloat16 as if they were integers; float32 holds the same numbers
    PRODUCTS[torch.bfloat16] = tl.float32


def triton_refuses(plan: AttentionPlan, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None = None) -> str:
    """Why the Triton kernel cannot run these tensors; empty when it can."""
    if not q.device == k.device == v.device or not (q.is_cuda or INTERPRETED):
        return (
            f"runs on one GPU (on the CPU with TRITON_INTERPRET=1, for tests), got {q.device}, {k.device}, {v.device}"
        )
    if q.dtype not in PRODUCTS:
        return f"takes float32, float16 or bfloat16, got {q.dtype}"
    for name, dim in (("head dimension", q.shape[-1]), ("value dimension", v.shape[-1])):
        if not 0 < dim <= MAX_DIM:
            return f"takes a {name} up to {MAX_DIM}, got {dim}"
    if plan.mask is not None and plan.block < SMALLEST:
        return f"takes blocks of at least {SMALLEST}, got {plan.block}"
    if needs_grad(q, k, v) or (sinks is not None and needs_grad(sinks)):
        return "has no gradient"
    return ""


def kept_lists(plan: AttentionPlan, device: torch.device) -> tuple[Tensor, Tensor]:
    """The lists the kernel walks: how many key blocks each query block keeps, and which, in order.

    int32 (batch or 1, heads or 1, query_blocks) and (..., key_blocks); entries beyond the count mean nothing. Keeps the blocks of
    `plan.mask & plan.allowed()`, computed on `device` without waiting for it.
    """
    kept = torch.ones(1, 1, plan.query_blocks, plan.key_blocks, dtype=torch.bool, device=device)
    if plan.mask is not None:
        kept = plan.mask.to(device)
    if plan.causal:
        kept = kept.tril(plan.first_block)
    if plan.key_start is not None:  # blocks that end before a row of the batch begins hold padding only
        ends = torch.arange(1, plan.key_blocks + 1, device=device).mul(plan.block).clamp(max=plan.keys)
        there = (ends > plan.key_start.to(device)[:, None])[:, None]
        kept = kept & there[:, :, None, :] & there[:, :, plan.first_block :, None]
    if plan.window is not None:  # blocks that even the first query's window no longer reaches
        ends = torch.arange(1, plan.key_blocks + 1, device=device).mul(plan.block)
        first = plan.diagonal().to(device).mul(plan.block).clamp(min=plan.offset)
        kept = kept & (ends > (first - plan.window + 1)[:, None])
    order = kept.to(torch.uint8).argsort(dim=-1, descending=True, stable=True)
    return kept.sum(-1, dtype=torch.int32), order.int().contiguous()


def constants(
    plan: AttentionPlan, dim: int, value_dim: int, group: int, dtype: torch.dtype, sinks: bool = False
) -> tuple[dict[str, Any], dict[str, int]]:
    """The constants the kernel is compiled for, and its launch parameters; `group` query heads share a key head.

    Tiles are what registers and 99 KiB of shared memory hold; without tensor cores, operands pass through registers.
    """
    tile_d, tile_e = (max(SMALLEST, triton.next_power_of_2(x)) for x in (dim, value_dim))
    width = max(tile_d, tile_e)
    if dtype.itemsize == 2:
        tile_m, tile_n, warps = (128, 64, 8 if width > 64 else 4) if width <= 128 else (64, 32, 8)
    else:
        tile_m, tile_n, warps = (64, 32, 8) if width <= 128 else (32, 16, 4)
    block = triton.next_power_of_2(plan.block)
    tile_m = min(tile_m, block, max(SMALLEST, triton.next_power_of_2(plan.queries)))
    return {
        "GROUP": group,
        "BLOCK": plan.block,
        "CAUSAL": plan.causal,
        "WINDOW": plan.window if plan.window is not None and plan.windowed else 0,
        "SINKS": sinks,
        "DIM": dim,
        "VALUE_DIM": value_dim,
        "TILE_M": tile_m,
        "TILE_N": min(tile_n, block),
        "TILE_D": tile_d,
        "TILE_E": tile_e,
        "PRODUCT": PRODUCTS[dtype],
        "PRECISION": "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32",
    }, {"num_warps": warps if tile_m >= 64 else 4, "num_stages": 2}


def triton_attention(
    plan: AttentionPlan, q: Tensor, k: Tensor, v: Tensor, scale: float, sinks: Tensor | None = None
) -> Tensor:
    """Attention by a plan, (batch, heads, queries, value dim) in the dtype of q; `plan.execute` checks and documents it.

    Raises ValueError for what `triton_refuses`.
    """
    if reason := triton_refuses(plan, q, k, v, sinks):
        raise ValueError(f"backend 'triton' {reason}; use 'gather' or 'auto'")
    batch, heads, queries, dim = q.shape
    value_dim = v.shape[-1]
    out = q.new_empty(batch, queries, heads, value_dim).transpose(1, 2)
    if not out.numel():
        return out
    if plan.mask is None:
        plan = AttentionPlan(plan.queries, plan.keys, DENSE_BLOCK, plan.causal, None, plan.key_start, plan.window)
    counts, lists = kept_lists(plan, q.device)
    counts, lists = counts.expand(batch, heads, -1), lists.expand(batch, heads, -1, -1)
    start = torch.zeros(batch, dtype=torch.int64) if plan.key_start is None else plan.key_start
    start = start.to(q.device).contiguous()
    constexpr, launch = constants(plan, dim, value_dim, heads // k.shape[1], q.dtype, sinks is not None)
    grid = (-(-plan.block // constexpr["TILE_M"]) * plan.query_blocks, heads, batch)
    _attend[grid](
        q,
        k,
        v,
        out,
        counts,
        lists,
        start,
        start if sinks is None else sinks.to(q.device).contiguous(),
        *(x.stride() for x in (q, k, v, out, counts, lists)),
        queries,
        plan.keys,
        scale * LOG2_E,
        **constexpr,
        **launch,
    )
    return out
