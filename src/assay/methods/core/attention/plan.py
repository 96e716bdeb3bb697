"""Which parts of attention are computed, separate from what computes them: `AttentionPlan`, and `execute`, which runs one.

A plan says which blocks of keys each block of queries sees, head by head, or that all are seen (dense). Blocks lie on a grid of
positions: key block j is positions [j * block, (j + 1) * block). Queries are the last `queries` of `keys` positions (all of them,
or the newest chunk of a longer prompt). Query block i lies on the same grid, at key block `first_block + i`; the first one starts
inside a block if the chunk does. The plan of a chunk is therefore the last rows of the plan of the whole prompt.

Within a kept block attention is exact: causal token by token, with sliding window and padding applied, and softmax over everything
the query sees. A query that sees nothing gives zeros. Groups of query heads share keys and values (GQA), which are never expanded.

When NOT to use it: attention with position biases, soft capping or dropout. No backend has them.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import math
from dataclasses import dataclass
from typing import Any, Literal, cast, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from assay import checks
from assay.measure.cost import register_macs
from assay.methods.core import kernels

Backend = Literal["auto", "kernel", "triton", "flex", "gather", "sdpa", "reference"]
Precision = Literal["input", "bf16"]  # of both products
PlanPrecision = Literal[Precision, "int8"]  # int8: of QK^T, PV as "bf16"

CHUNK = 1 << 24  # numbers that a chunk of scores or gathered keys may hold (64 MiB in float32)


@dataclass(frozen=True)
class AttentionPlan:
    """Which key blocks each query block sees; see the module docstring for the grid.

    `mask` is bool (batch, heads, query_blocks, key_blocks), True where a block is computed, or None for all blocks (dense).
    Blocks above the causal diagonal are never computed, whatever the mask says. `key_start` is int64 (batch,): keys before it
    are left padding, and so are the queries there. With a `window`, which is for causal attention, a query sees itself and the
    window - 1 keys before it: a band of blocks, exact at its edges. Raises TypeError for arguments of another kind, ValueError
    for sizes that do not fit together.

    >>> plan = AttentionPlan(queries=256, keys=256, block=64, window=64)
    >>> plan.query_blocks, plan.pairs(), round(plan.pairs() / AttentionPlan(256, 256).pairs(), 2)
    (4, 14368, 0.44)
    """

    queries: int
    keys: int
    block: int = 128
    causal: bool = True
    mask: Tensor | None = None
    key_start: Tensor | None = None
    window: int | None = None

    def __post_init__(self) -> None:
        if torch.compiler.is_compiling():  # sizes may be symbols there, which a look at them would fix
            return
        checks.whole("keys", self.keys, low=1)
        checks.whole("queries", self.queries, low=1, high=self.keys)
        checks.whole("block", self.block, low=1)
        checks.flag("causal", self.causal)
        if self.mask is not None:
            grid = ("batch", "heads", self.query_blocks, self.key_blocks)
            checks.tensor("mask", self.mask, shape=grid, dtype="bool", empty=True)
        if self.key_start is not None:
            checks.tensor("key_start", self.key_start, shape=("batch",), dtype=torch.int64, empty=True)
            if self.key_start.is_cpu and not ((self.key_start >= 0) & (self.key_start <= self.keys)).all():
                raise ValueError(f"key_start must lie in [0, {self.keys}], got {self.key_start.tolist()}")
        if self.window is not None:
            checks.whole("window", self.window, low=1)
            if not self.causal:
                raise ValueError(f"window must be None unless causal, got {self.window}")

    def dense(self) -> AttentionPlan:
        """The plan of the same attention without a block mask."""
        return AttentionPlan(self.queries, self.keys, self.block, self.causal, None, self.key_start, self.window)

    @property
    def windowed(self) -> bool:
        """Whether the window excludes any key."""
        return self.window is not None and self.window < self.keys

    @property
    def offset(self) -> int:
        """Position of query 0."""
        return self.keys - self.queries

    @property
    def first_block(self) -> int:
        """The key block at which query block 0 lies."""
        return self.offset // self.block

    @property
    def key_blocks(self) -> int:
        return -(-self.keys // self.block)

    @property
    def query_blocks(self) -> int:
        return self.key_blocks - self.first_block

    def diagonal(self) -> Tensor:
        """(query_blocks,): the key block at which each query block lies."""
        return torch.arange(self.query_blocks) + self.first_block

    def _pairs(self, device: torch.device | str = "cpu") -> Tensor:
        """(batch or 1, 1, query_blocks, key_blocks) int64: pairs of each block that causality, window and padding allow."""
        start = torch.zeros(1, dtype=torch.int64) if self.key_start is None else self.key_start.cpu()
        edges = torch.arange(self.key_blocks + 1) * self.block
        first = torch.maximum(edges[:-1], start[:, None])  # (batch, key_blocks), keys [first, first + width)
        width = (edges[1:].clamp(max=self.keys) - first).clamp(min=0)[:, None]
        top = torch.maximum(
            edges[self.first_block : -1].clamp(min=self.offset), start[:, None]
        )  # queries [top, bottom)
        bottom = torch.maximum(edges[self.first_block + 1 :].clamp(max=self.keys), top)
        if not self.causal:
            return ((bottom - top)[:, :, None] * width)[:, None].to(device)

        def before(position: Tensor) -> Tensor:
            """Pairs of each key block with the positions before `position`, each of which sees the keys up to its own."""
            count = (position[:, :, None] - first[:, None]).clamp(min=0)
            growing = torch.minimum(count, width)  # an arithmetic series, until the whole block is seen
            return growing * (growing + 1) // 2 + width * (count - growing)

        pairs = before(bottom) - before(top)
        if self.window is not None:  # less the keys that have left the window
            pairs = pairs - before(bottom - self.window) + before(top - self.window)
        return pairs[:, None].to(device)

    def allowed(self) -> Tensor:
        """(batch or 1, 1, query_blocks, key_blocks) bool: blocks with a pair that causality, window and padding allow."""
        return self._pairs() > 0

    def density(self) -> float:
        """Share of the allowed blocks that are computed, 0 to 1, over all batch rows and heads."""
        if self.mask is None:
            return 1.0
        allowed = self.allowed().expand(self.mask.shape)
        return (self.mask.cpu() & allowed).sum().item() / max(allowed.sum().item(), 1)

    def pairs(self, batch: int = 1, heads: int = 1) -> int:
        """Query-key pairs that are computed, over all batch rows and heads (of the mask, if there is one)."""
        counts = self._pairs()
        if self.mask is not None:
            return int((counts * self.mask.cpu()).sum())
        return int(counts.expand(batch, 1, -1, -1).sum()) * heads

    def macs(self, *, head_dim: int, value_dim: int | None = None, batch: int = 1, heads: int = 1) -> int:
        """Multiply-accumulates of QK^T and PV (1 MAC = 2 FLOPs), counting the pairs that are needed, not whole tiles."""
        return self.pairs(batch, heads) * (head_dim + (head_dim if value_dim is None else value_dim))

    def bytes_moved(self, *, head_dim: int, itemsize: int, batch: int = 1, heads: int = 1) -> int:
        """Bytes moved when each query block reads its kept keys and values once: Q, O, and those keys and values."""
        if self.mask is not None:
            batch, heads = self.mask.shape[:2]
        kept = self.allowed().expand(batch, heads, -1, -1)
        if self.mask is not None:
            kept = kept & self.mask.cpu()
        widths = torch.full((self.key_blocks,), self.block)
        widths[-1] = self.keys - (self.key_blocks - 1) * self.block
        keys = int((kept.sum((0, 1, 2)) * widths).sum())
        return (2 * keys + 2 * batch * heads * self.queries) * head_dim * itemsize

    def visible(self, start: int, stop: int, device: torch.device | str = "cpu") -> Tensor:
        """Token by token: (batch or 1, heads or 1, stop - start, keys) bool, for queries [start, stop)."""
        rows = torch.arange(start, stop, device=device) + self.offset
        columns = torch.arange(self.keys, device=device)
        seen = torch.ones(1, 1, len(rows), self.keys, dtype=torch.bool, device=device)
        if self.causal:
            seen = seen & (columns <= rows[:, None])
        if self.window is not None:
            seen = seen & (columns > rows[:, None] - self.window)
        if self.key_start is not None:
            first = self.key_start.to(device)[:, None, None, None]
            seen = seen & (columns >= first) & (rows[:, None] >= first)
        if self.mask is not None:
            mask = self.mask.to(device)
            seen = seen & mask[:, :, rows // self.block - self.first_block][..., columns // self.block]
        return seen

    def recall(self, q: Tensor, k: Tensor, *, scale: float | None = None) -> Tensor:
        """(batch, heads) float32: share of the exact softmax mass that lies in the computed blocks, averaged over queries.

        q (batch, heads, queries, dim), k (batch, key heads, keys, dim). Costs as much as dense QK^T, in float32.
        """
        _check(self, q, k, k)
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        dense = self.dense()
        total = torch.zeros(q.shape[:2], dtype=torch.float64, device=q.device)
        count = torch.zeros(q.shape[:2], dtype=torch.float64, device=q.device)
        for start, stop in _row_chunks(self, q):
            scores = grouped_scores(q[:, :, start:stop].float(), k.float(), scale)
            seen = dense.visible(start, stop, q.device)
            share = scores.masked_fill(~seen, -math.inf).softmax(-1).nan_to_num(0.0)
            kept = share.masked_fill(~self.visible(start, stop, q.device), 0.0).sum(-1)
            total += kept.sum(-1, dtype=torch.float64)
            count += seen.any(-1).sum(-1).expand(count.shape)
        return (total / count.clamp(min=1)).float()


def execute(
    plan: AttentionPlan,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    backend: Backend = "auto",
    scale: float | None = None,
    precision: PlanPrecision = "input",
    sinks: Tensor | None = None,
) -> Tensor:
    """Attention by a plan: (batch, heads, queries, value dim), in the dtype of q.

    q is (batch, heads, queries, dim), k and v (batch, key heads, keys, dim), heads a multiple of key heads; any strides.
    `scale` multiplies QK^T (default dim ** -0.5). `sinks` (heads,) are logits that take part in the softmax of every query of
    their head and have no value (gpt_oss). Backends:

    - "kernel": C++ on the CPU, float32 or bfloat16, dims and blocks multiples of 16, no gradients. bfloat16 inputs are
      multiplied in bfloat16 where the processor can, with float32 sums and softmax. A single query takes a decoding kernel.
    - "triton": `triton_attention`, for GPUs; walks lists of the kept blocks. Needs triton, has no gradients. Not chosen by
      "auto": it has been compiled for GPUs and run by Triton's interpreter, and never measured on one.
    - "flex": `torch.nn.attention.flex_attention`, compiled (needs a GPU, or a C++ compiler for the CPU).
    - "gather": torch; gathers the kept key blocks of each query block. Any device and dtype, with gradients.
    - "sdpa": torch's `scaled_dot_product_attention`; dense plans only.
    - "reference": every score, masked. For tests.
    - "auto": the kernel where it can, else SDPA for dense plans without a window, flex on a GPU, gather elsewhere.

    `precision` says how exactly the kernel has to multiply; the other backends, and a single query, ignore it. "input": in the
    dtype of q. "bf16": float32 inputs too may be multiplied in bfloat16 (about 8 significant bits). "int8": QK^T in 8-bit
    integers, PV in bfloat16, as `sageattention2` does: the mean key, and the mean query of each query block, are subtracted
    before rounding, scales are those of its "per_thread". Not for keys that are not finite: the mean spreads them.
    Raises TypeError for arguments of another kind, ValueError when tensors and plan do not fit together or the backend cannot
    run them. `kernels.paths()` counts which backend ran.

    >>> q, k, v = torch.randn(3, 1, 2, 64, 16).unbind()
    >>> execute(AttentionPlan(64, 64), q, k, v).shape
    torch.Size([1, 2, 64, 16])
    """
    _check(plan, q, k, v, sinks)
    checks.choice("backend", backend, get_args(Backend))
    checks.choice("precision", precision, get_args(PlanPrecision))
    scale = scale_of(scale, q)
    if backend == "auto":
        backend = _choose(plan, q, k, v, precision, sinks)
    if backend == "kernel":
        if reason := kernel_refuses(q, k, v, block=_kernel_block(plan), precision=precision, sinks=sinks):
            raise ValueError(f"backend 'kernel' {reason}; use 'gather' or 'auto'")
    elif backend == "sdpa" and plan.mask is not None:
        raise ValueError("backend 'sdpa' takes dense plans only; use 'gather' or 'auto'")
    elif backend == "triton" and not _has_triton():
        raise ValueError("backend 'triton' needs the package triton (pip install triton); use 'gather' or 'auto'")
    kernels.ran("attention", backend)
    if backend == "kernel":
        return _kernel(plan, q, k, v, scale, precision, sinks)
    if backend == "triton":
        return cast(Tensor, _triton().triton_attention(plan, q, k, v, scale, sinks))
    run = {"sdpa": _sdpa, "flex": _flex, "gather": _gather, "reference": _reference}[backend]
    return run(plan, q, k, v, scale, sinks)


def scale_of(scale: float | None, q: Tensor) -> float:
    """The factor that multiplies QK^T: `scale`, or dim ** -0.5. Raises TypeError or ValueError unless it is a finite number."""
    if torch.compiler.is_compiling():
        return q.shape[-1] ** -0.5 if scale is None else scale
    return float(q.shape[-1] ** -0.5) if scale is None else checks.number("scale", scale)


def _choose(
    plan: AttentionPlan,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    precision: PlanPrecision = "input",
    sinks: Tensor | None = None,
) -> Backend:
    if not kernel_refuses(q, k, v, block=_kernel_block(plan), precision=precision, sinks=sinks):
        return "kernel"
    if plan.mask is None and not plan.windowed:
        return "sdpa"
    return "flex" if q.is_cuda and not needs_grad(q, k, v) else "gather"


def _check(plan: AttentionPlan, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None = None) -> None:
    if not torch.compiler.is_compiling():
        if not isinstance(plan, AttentionPlan):
            raise TypeError(f"plan must be an AttentionPlan, got {type(plan).__name__}")
        for name, x in (("q", q), ("k", k), ("v", v)):
            checks.tensor(name, x, shape=("batch", "heads", "tokens", "dim"), empty=True)
        if sinks is not None:
            checks.tensor("sinks", sinks, shape=(q.shape[1],), device=q.device)
    if q.shape[2] != plan.queries or k.shape[2] != plan.keys:
        raise ValueError(
            f"the plan is for {plan.queries} queries and {plan.keys} keys, got {q.shape[2]} and {k.shape[2]}"
        )
    if k.shape[0] != q.shape[0] or k.shape[3] != q.shape[3] or v.shape[:3] != k.shape[:3]:
        raise ValueError(f"q {tuple(q.shape)}, k {tuple(k.shape)} and v {tuple(v.shape)} do not fit together")
    if not k.shape[1] or q.shape[1] % k.shape[1]:
        raise ValueError(f"heads of q ({q.shape[1]}) must be a multiple of the heads of k ({k.shape[1]})")
    checks.together(q=q, k=k, v=v)
    if plan.mask is not None and plan.mask.shape[:2] != q.shape[:2]:
        raise ValueError(f"the plan's mask is for {tuple(plan.mask.shape[:2])} (batch, heads), q has {q.shape[:2]}")
    if plan.key_start is not None and len(plan.key_start) != q.shape[0]:
        raise ValueError(f"the plan's key_start is for a batch of {len(plan.key_start)}, q has {q.shape[0]}")


def needs_grad(*tensors: Tensor) -> bool:
    """Whether a gradient through any of the tensors is needed."""
    return torch.is_grad_enabled() and any(x.requires_grad for x in tensors)


def grouped_scores(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """(batch, heads, queries, keys) for grouped heads, without expanding k."""
    batch, heads, queries, dim = q.shape
    grouped = q.reshape(batch, k.shape[1], -1, dim)
    return (grouped @ k.transpose(-1, -2) * scale).view(batch, heads, queries, -1)


def _row_chunks(plan: AttentionPlan, q: Tensor) -> list[tuple[int, int]]:
    step = max(1, CHUNK // (q.shape[0] * q.shape[1] * plan.keys))
    return [(start, min(start + step, plan.queries)) for start in range(0, plan.queries, step)]


# ------------------------------------------------------------------------------------------------------------ reference


def masked_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    seen: Tensor,
    scale: float | None = None,
    sinks: Tensor | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """torch's attention under a bool mask (..., queries, keys) that broadcasts, with sinks if there are any.

    q (batch, heads, queries, dim), k and v (batch, key heads, keys, dim); `sinks` broadcasts to (batch, heads, 1, 1). Queries that
    see nothing give zeros.
    """
    seen_any = seen.any(-1, keepdim=True)
    mask, grouped = seen | ~seen_any, q.shape[1] != k.shape[1]
    if sinks is not None:  # a key that scores the sink's logit and has no value
        shape = torch.broadcast_shapes(mask.shape[:-1], sinks.shape[:-1])
        bias = torch.zeros(mask.shape, dtype=q.dtype, device=q.device).masked_fill(~mask, -math.inf)
        mask = torch.cat([bias.expand(*shape, -1), sinks.to(q.dtype).expand(*shape, 1)], -1)
        k, v = F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1))
    out = F.scaled_dot_product_attention(q, k, v, mask, dropout, scale=scale, enable_gqa=grouped)
    return out.masked_fill(~seen_any, 0.0)


def with_sinks(out: Tensor, lse: Tensor, sinks: Tensor) -> tuple[Tensor, Tensor]:
    """An output (batch, heads, queries, dim) and its natural log-sum-exp (batch, heads, queries) after adding sinks (heads,)."""
    sink = sinks.to(lse.dtype).view(-1, 1)
    return (out * (lse - sink).sigmoid()[..., None]).to(out.dtype), torch.logaddexp(lse, sink)


def _reference(
    plan: AttentionPlan, q: Tensor, k: Tensor, v: Tensor, scale: float, sinks: Tensor | None = None
) -> Tensor:
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    outputs = []
    for start, stop in _row_chunks(plan, q):
        scores = grouped_scores(q[:, :, start:stop].to(wide), k.to(wide), scale)
        seen = plan.visible(start, stop, q.device)
        seen_any = seen.any(-1, keepdim=True)
        scores = scores.masked_fill(~(seen | ~seen_any), -math.inf)
        if sinks is not None:
            sink = sinks.to(wide).view(-1, 1, 1).expand(len(q), -1, stop - start, -1)
            shares = torch.cat([scores, sink], -1).softmax(-1)[..., :-1]
        else:
            shares = scores.softmax(-1)
        shares = shares.masked_fill(~seen_any, 0.0)
        grouped = shares.reshape(shares.shape[0], k.shape[1], -1, plan.keys) @ v.to(wide)
        outputs.append(grouped.view(*shares.shape[:3], -1))
    return torch.cat(outputs, dim=2).to(q.dtype)


# ----------------------------------------------------------------------------------------------------------------- SDPA


def _sdpa(plan: AttentionPlan, q: Tensor, k: Tensor, v: Tensor, scale: float, sinks: Tensor | None = None) -> Tensor:
    grouped = q.shape[1] != k.shape[1]
    if plan.key_start is None and sinks is None and not plan.windowed:
        if grouped and plan.queries == 1:  # the heads of a group as queries: torch would expand the cache
            packed = q.reshape(q.shape[0], k.shape[1], -1, q.shape[3])
            return F.scaled_dot_product_attention(packed, k, v, scale=scale).reshape(*q.shape[:3], -1)
        if not plan.causal or plan.queries == 1:
            return F.scaled_dot_product_attention(q, k, v, scale=scale, enable_gqa=grouped)
        if plan.queries == plan.keys:
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=grouped)
    if sinks is not None:
        sinks = sinks.view(-1, 1, 1)
    return masked_attention(q, k, v, plan.visible(0, plan.queries, q.device), scale, sinks)


# --------------------------------------------------------------------------------------------------------------- gather


def _on_grid(plan: AttentionPlan, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor, int]:
    """q, k, v padded with zeros to whole blocks, and the number of rows before query 0."""
    lead = plan.offset - plan.first_block * plan.block
    tail = plan.key_blocks * plan.block - plan.keys
    return F.pad(q, (0, 0, lead, tail)), F.pad(k, (0, 0, 0, tail)), F.pad(v, (0, 0, 0, tail)), lead


def _gather(plan: AttentionPlan, q: Tensor, k: Tensor, v: Tensor, scale: float, sinks: Tensor | None = None) -> Tensor:
    batch, heads, block = q.shape[0], q.shape[1], plan.block
    padded_q, padded_k, padded_v, lead = _on_grid(plan, q, k, v)
    query_rows = padded_q.view(batch, heads, plan.query_blocks, block, -1)
    key_rows = padded_k.view(batch, k.shape[1], plan.key_blocks, block, -1)
    value_rows = padded_v.view(batch, k.shape[1], plan.key_blocks, block, -1)
    kept = plan.allowed().to(q.device).expand(batch, heads, -1, -1)
    if plan.mask is not None:
        kept = kept & plan.mask.to(q.device)
    counts = kept.sum(-1)
    first = torch.zeros(batch, dtype=torch.int64) if plan.key_start is None else plan.key_start
    first, within = first.to(q.device), torch.arange(block, device=q.device)
    out = query_rows.new_zeros(*query_rows.shape[:4], v.shape[-1])
    for count in sorted(set(counts.flatten().tolist())):  # rows with equally many blocks go together
        if count == 0:
            continue
        rows = (counts == count).nonzero()
        for b, h, i in (part.T for part in rows.split(max(1, CHUNK // (count * block * (block + q.shape[-1]))))):
            chosen = kept[b, h, i].nonzero()[:, 1].view(-1, count)
            group = (h // (heads // k.shape[1]))[:, None]
            keys = key_rows[b[:, None], group, chosen].flatten(1, 2)
            values = value_rows[b[:, None], group, chosen].flatten(1, 2)
            key_position = (chosen[:, :, None] * block + within).flatten(1)[:, None, :]
            query_position = ((i + plan.first_block)[:, None] * block + within)[:, :, None]
            seen = (key_position < plan.keys) & (key_position >= first[b][:, None, None])
            seen = seen & (query_position >= first[b][:, None, None])
            if plan.causal:
                seen = seen & (key_position <= query_position)
            if plan.window is not None:
                seen = seen & (key_position > query_position - plan.window)
            sink = None if sinks is None else sinks[h].view(-1, 1, 1, 1)
            rows_of_q, keys, values = query_rows[b, h, i][:, None], keys[:, None], values[:, None]
            found = masked_attention(rows_of_q, keys, values, seen[:, None], scale, sink)
            out = out.index_put((b, h, i), found[:, 0])
    return out.flatten(2, 3)[:, :, lead : lead + plan.queries]


# ----------------------------------------------------------------------------------------------------------------- flex


@functools.cache
def _compiled_flex() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention)


def block_mask(plan: AttentionPlan, batch: int, heads: int, device: torch.device | str = "cpu") -> Any:
    """The plan as a `BlockMask` of flex_attention, for queries and keys padded to whole blocks (`_on_grid`)."""
    from torch.nn.attention.flex_attention import BlockMask

    pairs = plan._pairs(device).expand(batch, heads, -1, -1)
    kept = pairs > 0
    if plan.mask is not None:
        kept = kept & plan.mask.to(device)
    whole = kept & (pairs == plan.block**2)
    part = kept & ~whole
    first_row, keys, causal, window = plan.first_block * plan.block, plan.keys, plan.causal, plan.window
    first = torch.zeros(batch, dtype=torch.int64) if plan.key_start is None else plan.key_start
    first = first.to(device)

    def visible(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        seen = (key < keys) & (key >= first[b])
        if causal:
            seen = seen & (key <= query + first_row)
        return seen if window is None else seen & (key > query + first_row - window)

    def listed(blocks: Tensor) -> tuple[Tensor, Tensor]:
        order = blocks.int().argsort(dim=-1, descending=True, stable=True)
        return blocks.sum(-1, dtype=torch.int32), order.int()

    return BlockMask.from_kv_blocks(
        *listed(part),
        *listed(whole),
        BLOCK_SIZE=plan.block,
        mask_mod=visible,
        seq_lengths=(plan.query_blocks * plan.block, plan.key_blocks * plan.block),
    )


def _flex(plan: AttentionPlan, q: Tensor, k: Tensor, v: Tensor, scale: float, sinks: Tensor | None = None) -> Tensor:
    if needs_grad(q, k, v):
        raise ValueError("backend 'flex' is for inference; use 'gather' where gradients are needed")
    padded_q, padded_k, padded_v, lead = _on_grid(plan, q, k, v)
    mask = block_mask(plan, q.shape[0], q.shape[1], q.device)
    grouped = q.shape[1] != k.shape[1]
    options: dict[str, Any] = {"block_mask": mask, "scale": scale, "enable_gqa": grouped}
    if sinks is None:
        out: Tensor = _compiled_flex()(padded_q, padded_k, padded_v, **options)
    else:
        out, lse = _compiled_flex()(padded_q, padded_k, padded_v, return_lse=True, **options)
        out, _ = with_sinks(out, lse, sinks)
    out = out[:, :, lead : lead + plan.queries]
    if plan.mask is not None or plan.key_start is not None:  # rows that see nothing
        for start, stop in _row_chunks(plan, q):
            empty = ~plan.visible(start, stop, q.device).any(-1, keepdim=True)
            out[:, :, start:stop].masked_fill_(empty, 0.0)
    return out


# --------------------------------------------------------------------------------------------------------------- triton


def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def _triton() -> Any:
    """The module with the Triton kernel, which cannot be imported without triton."""
    return importlib.import_module("assay.methods.core.attention.triton_attention")


# --------------------------------------------------------------------------------------------------------------- kernel


def kernel_refuses(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    block: int = 128,
    precision: PlanPrecision = "input",
    sinks: Tensor | None = None,
) -> str:
    """Why the C++ kernel (with "int8", the one for integers) cannot run these tensors; empty when it can."""
    if not q.device == k.device == v.device == torch.device("cpu"):
        return "runs on the CPU"
    if q.dtype not in (torch.float32, torch.bfloat16):
        return f"takes float32 or bfloat16, got {q.dtype}"
    for name, dim in (("head dimension", q.shape[-1]), ("value dimension", v.shape[-1])):
        if dim % 16 or not 0 < dim <= 1024:
            return f"takes a {name} that is a multiple of 16 up to 1024, got {dim}"
    if block % 16:
        return f"takes blocks that are multiples of 16, got {block}"
    if needs_grad(q, k, v) or (sinks is not None and needs_grad(sinks)):
        return "has no gradient"
    if not (load_kernel() and (precision != "int8" or load_int8_kernel())):
        return "needs a C++ compiler (see `assay doctor`)"
    return ""


@functools.cache
def _load_kernel() -> bool:
    if not kernels.load("block_attention"):
        return False
    operators: tuple[tuple[str, Any, Any], ...] = (
        ("block_attention", like_queries, _attention_macs),
        ("decode_attention", like_queries, _decode_macs),
        ("antidiagonal_scores", _like_blocks, _score_macs),
    )
    for name, shape, macs in operators:
        torch.library.register_fake(f"assay::{name}", shape)
        register_macs(f"assay::{name}", macs, "attention")
    return True


@functools.cache
def _load_int8_kernel() -> bool:
    if not kernels.load("int8_attention"):
        return False
    torch.library.register_fake("assay::int8_attention", _like_int8)
    register_macs("assay::int8_attention", _attention_macs, "attention")
    return True


def load_kernel() -> bool:
    """Whether the kernel is available; compiles it on first use and tells torch.compile the shapes of its operators."""
    return _load_kernel()


def load_int8_kernel() -> bool:
    """The same for the kernel that multiplies QK^T in integers."""
    return _load_int8_kernel()


def has_bf16() -> bool:
    """Whether the kernels multiply in bfloat16 on this processor."""
    return bool(torch.ops.assay.attention_has_bf16())


def has_tiles() -> bool:
    """Whether they multiply in AMX tiles. Softmax is then most of the work, and integer scores gain nothing."""
    return load_kernel() and bool(torch.ops.assay.attention_has_tiles())


def kernel_time() -> float:
    """The kernel's share of SDPA's time for dense prefill in bfloat16, as measured on Zen 5 and on a Xeon with AMX; else 1."""
    if not (load_kernel() and has_bf16()):
        return 1.0
    return 0.5 if has_tiles() else 0.3


def has_vnni() -> bool:
    """Whether this processor multiplies integers four at a time, without which "int8" is not fast, and the kernel for it exists."""
    return load_int8_kernel() and bool(torch.ops.assay.int8_attention_has_vnni())


_constant: Any = torch.compiler.assume_constant_result  # torch.compile is not to trace into them
for _fixed in (load_kernel, load_int8_kernel, has_bf16):
    _constant(_fixed)


def like_queries(q: Tensor, k: Tensor, v: Tensor, *_: Any, **__: Any) -> Tensor:
    """An empty output tensor for the kernels: (batch, heads, queries, value dim), laid out as (batch, queries, heads, value dim)."""
    return q.new_empty(q.shape[0], q.shape[2], q.shape[1], v.shape[3]).transpose(1, 2)


def _like_int8(q: Tensor, k: Tensor, v: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
    return like_queries(q, k, v), q.new_empty(q.shape[:3], dtype=torch.float32)


def _attention_macs(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    key_start: Tensor | None,
    block: int,
    causal: bool,
    *_: Any,
    window: int = 0,
    out: Any,
    **__: Any,
) -> int:
    queries, keys = q.shape[2], k.shape[2]
    if queries > keys:
        return q.shape[0] * q.shape[1] * queries * keys * (q.shape[3] + v.shape[3])
    plan = AttentionPlan(queries, keys, block, causal, mask, key_start, window or None)
    return plan.macs(head_dim=q.shape[3], value_dim=v.shape[3], batch=q.shape[0], heads=q.shape[1])


def _decode_macs(q: Tensor, k: Tensor, v: Tensor, *_: Any, out: Any, **__: Any) -> int:
    return q.shape[0] * q.shape[1] * q.shape[2] * k.shape[2] * (q.shape[3] + v.shape[3])


def _score_macs(
    q: Tensor, k: Tensor, key_start: Any, stride: int, block: int, causal: bool, *_: Any, window: int = 0, out: Any
) -> int:
    keys = k.shape[-2] if not causal else k.shape[-2] // 2
    return int(q.numel() * (min(keys, window) if window else keys) // stride)


def _like_blocks(q: Tensor, k: Tensor, key_start: Any, stride: int, block: int, *_: Any, **__: Any) -> Tensor:
    blocks = -(-k.shape[2] // block)
    first = (k.shape[2] - q.shape[2]) // block
    return q.new_empty(*q.shape[:2], blocks - first, blocks, dtype=torch.float32)


def in_bf16(dtype: torch.dtype, precision: PlanPrecision) -> bool:
    """Whether the kernel multiplies tensors of `dtype` in bfloat16 (with "int8", their values)."""
    return (dtype == torch.bfloat16 or precision != "input") and has_bf16()


def unit_stride(x: Tensor) -> Tensor:
    """`x` itself if its last dimension is contiguous, as the kernels need it, else a contiguous copy."""
    return x if x.stride(-1) == 1 else x.contiguous()


INT8_GROUPS = [
    32,
    8,
    64,
    4,
]  # rows and classes of queries, and of keys, that share a scale: sageattention2's "per_thread"


def _kernel_block(plan: AttentionPlan) -> int:
    return 128 if plan.mask is None else plan.block


def _kernel(
    plan: AttentionPlan,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    precision: PlanPrecision,
    sinks: Tensor | None = None,
) -> Tensor:
    start = plan.key_start
    if (
        plan.queries == 1 and plan.mask is None and plan.windowed
    ):  # what has left the window of the only query is not read
        left = plan.keys - cast(int, plan.window)
        k, v, start = k[:, :, left:], v[:, :, left:], None if start is None else (start - left).clamp(min=0)
    q, k, v = unit_stride(q), unit_stride(k), unit_stride(v)
    start = None if start is None else start.cpu().contiguous()
    sink = None if sinks is None else sinks.detach().float().contiguous()
    if plan.queries == 1 and plan.mask is None:
        return cast(Tensor, torch.ops.assay.decode_attention(q, k, v, start, scale, sinks=sink))
    mask, half = None if plan.mask is None else plan.mask.contiguous(), in_bf16(q.dtype, precision)
    where = (mask, start, _kernel_block(plan), plan.causal, scale)
    window = cast(int, plan.window) if plan.windowed else 0
    if precision == "int8" and plan.queries > 1:
        out, lse = torch.ops.assay.int8_attention(q, k, v, *where, 127, INT8_GROUPS, True, True, half, window=window)
        return cast(Tensor, out) if sinks is None else with_sinks(out, lse, sinks)[0]
    return cast(Tensor, torch.ops.assay.block_attention(q, k, v, *where, half, window=window, sinks=sink))
