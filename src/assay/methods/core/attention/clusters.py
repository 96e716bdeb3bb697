"""Attention over clusters of tokens: `ClusterPlan`, a block mask over permuted blocks of any size, and what executes it.

Queries and keys are divided into clusters, separately for each head, and the plan says which key clusters each query cluster
sees. Within a kept pair of clusters, attention is exact and not causal. `query_order` lists the tokens cluster by cluster, so
that a block is contiguous once the tokens are permuted. Clusters may be empty: empty blocks are skipped. A query that sees
nothing gives zeros. Groups of query heads share keys, values and key clusters (GQA), which are never expanded.

When NOT to use it: causal attention, or blocks that are regular anyway (`plan.AttentionPlan` neither pads nor permutes).
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any, Literal, cast, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from assay import checks
from assay.methods.core import kernels
from assay.methods.core.attention import plan as blocks
from assay.methods.core.attention.plan import CHUNK, Precision, in_bf16, kernel_refuses, scale_of, unit_stride

ClusterBackend = Literal["auto", "kernel", "gather", "reference"]


@dataclass(frozen=True)
class ClusterPlan:
    """Which key clusters each query cluster sees, for each batch row and head.

    `query_order` int64 (batch, heads, queries) and `key_order` (batch, key heads, keys) are permutations: position r of the
    permuted tensor holds token order[r]. `query_sizes` int64 (batch, heads, query clusters) and `key_sizes` (batch, key heads,
    key clusters) cut the permuted tokens into clusters, in order; sizes may be 0. `mask` is bool (batch, heads, query clusters,
    key clusters), True where a block is computed. Raises ValueError for parts that do not fit together.
    """

    query_order: Tensor
    key_order: Tensor
    query_sizes: Tensor
    key_sizes: Tensor
    mask: Tensor

    def __post_init__(self) -> None:
        for side, order, sizes in (
            ("query", self.query_order, self.query_sizes),
            ("key", self.key_order, self.key_sizes),
        ):
            for name, x in (("order", order), ("sizes", sizes)):
                if x.dtype != torch.int64 or x.ndim != 3 or x.shape[:2] != order.shape[:2]:
                    raise ValueError(f"{side}_{name} must be int64 (batch, heads, ...), got {x.dtype} {tuple(x.shape)}")
            tokens = order.shape[2]
            if order.numel() and not (int(order.min()) >= 0 and int(order.max()) < tokens):
                raise ValueError(f"{side}_order must hold tokens from 0 to {tokens - 1}")
            if not torch.zeros_like(order, dtype=torch.bool).scatter_(-1, order, True).all():
                raise ValueError(f"{side}_order must be a permutation of the tokens of each head")
            if not ((sizes >= 0).all() and (sizes.sum(-1) == tokens).all()):
                raise ValueError(f"{side}_sizes must not be negative and sum to the {tokens} tokens of each head")
        if self.query_order.shape[0] != self.key_order.shape[0] or self.heads % max(self.key_heads, 1):
            raise ValueError(
                f"heads of queries must be a multiple of the heads of keys, and batches alike: got (batch, heads) "
                f"{tuple(self.query_order.shape[:2])} and {tuple(self.key_order.shape[:2])}"
            )
        grid = (*self.query_sizes.shape, self.key_sizes.shape[2])
        if self.mask.dtype != torch.bool or tuple(self.mask.shape) != grid:
            raise ValueError(f"mask must be bool {grid}, got {self.mask.dtype} {tuple(self.mask.shape)}")

    @classmethod
    def from_labels(cls, query_labels: Tensor, key_labels: Tensor, mask: Tensor) -> ClusterPlan:
        """The plan of tokens labelled with their clusters: int64 (batch, heads, queries) and (batch, key heads, keys).

        Labels count from 0 and stay below the mask's sizes; the tokens of a cluster keep their order (the sort is stable).
        """
        found = []
        for name, labels, count in (("query", query_labels, mask.shape[-2]), ("key", key_labels, mask.shape[-1])):
            if labels.dtype != torch.int64 or labels.ndim != 3:
                raise ValueError(
                    f"{name}_labels must be int64 (batch, heads, tokens), got {labels.dtype} {tuple(labels.shape)}"
                )
            if labels.numel() and not (int(labels.min()) >= 0 and int(labels.max()) < count):
                raise ValueError(f"{name}_labels must lie in [0, {count}), the clusters of the mask")
            found.append(_sorted(labels, count))
            sizes = torch.zeros(*labels.shape[:2], count, dtype=torch.int64, device=labels.device)
            found.append(sizes.scatter_add_(-1, labels, torch.ones_like(labels)))
        return cls(found[0], found[2], found[1], found[3], mask)

    @property
    def heads(self) -> int:
        """Query heads."""
        return self.query_order.shape[1]

    @property
    def key_heads(self) -> int:
        """Key heads; each serves heads / key_heads query heads."""
        return self.key_order.shape[1]

    def _blocks(self, chosen: Tensor) -> int:
        """Query-key pairs in the chosen blocks, over all batch rows and heads."""
        grouped = chosen.unflatten(1, (self.key_heads, self.heads // self.key_heads)).long()
        keys = (grouped * self.key_sizes[:, :, None, None]).sum(-1)  # seen by each query cluster
        return int((keys.flatten(1, 2) * self.query_sizes).sum())

    def pairs(self) -> int:
        """Query-key pairs that are computed, over all batch rows and heads."""
        return self._blocks(self.mask)

    def density(self, allowed: Tensor | None = None) -> float:
        """Pairs computed as a share of all pairs, or of those in the blocks of `allowed` (bool, like `mask`), 0 to 1."""
        every = torch.ones_like(self.mask) if allowed is None else allowed
        return self._blocks(self.mask & every) / max(self._blocks(every), 1)

    def macs(self, *, head_dim: int, value_dim: int | None = None) -> int:
        """Multiply-accumulates of QK^T and PV over all batch rows and heads (1 MAC = 2 FLOPs)."""
        return self.pairs() * (head_dim + (head_dim if value_dim is None else value_dim))

    def labels(self) -> tuple[Tensor, Tensor]:
        """The cluster of each token: int64 (batch, heads, queries) and (batch, key heads, keys), in the original order."""
        return (
            torch.empty_like(self.query_order).scatter_(-1, self.query_order, _places(self.query_sizes)),
            torch.empty_like(self.key_order).scatter_(-1, self.key_order, _places(self.key_sizes)),
        )

    def visible(self, start: int, stop: int) -> Tensor:
        """Token by token, in the original order: (batch, heads, stop - start, keys) bool, for queries [start, stop)."""
        return _visible(self.mask, *self.labels(), start, stop)

    def recall(self, q: Tensor, k: Tensor, *, scale: float | None = None, allowed: Tensor | None = None) -> Tensor:
        """(batch, heads) float32: share of the exact softmax mass that lies in the computed blocks, averaged over queries.

        q (batch, heads, queries, dim), k (batch, key heads, keys, dim). With `allowed` (bool, like `mask`), the exact softmax is
        over the keys in those blocks only. Costs as much as dense QK^T, in float32.
        """
        _check(self, q, k, k)
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        labels = self.labels()
        total = torch.zeros(q.shape[:2], dtype=torch.float64, device=q.device)
        for start, stop in _row_chunks(q, k):
            scores = blocks.grouped_scores(q[:, :, start:stop].float(), k.float(), scale)
            if allowed is not None:
                scores = scores.masked_fill(~_visible(allowed, *labels, start, stop), -math.inf)
            share = scores.softmax(-1).nan_to_num(0.0)
            kept = share.masked_fill(~_visible(self.mask, *labels, start, stop), 0.0)
            total += kept.sum((-2, -1), dtype=torch.float64)
        return (total / q.shape[2]).float()


def _sorted(labels: Tensor, count: int) -> Tensor:
    """Tokens of each head in the order of their labels (stable): (batch, heads, tokens), labels below `count`.

    One sort over all heads: torch sorts a single row of integers by radix, the shorter the faster, and a matrix by comparing.
    """
    rows, tokens = labels.flatten(0, 1), labels.shape[2]
    head = torch.arange(len(rows), device=labels.device)[:, None]
    keys = rows + head * count
    order = (keys.int() if len(rows) * count < 1 << 31 else keys).flatten().argsort(dim=0, stable=True)
    return (order.view_as(rows) - head * tokens).view_as(labels)


def _places(sizes: Tensor) -> Tensor:
    """Cluster of each position of the permuted tokens: (batch, heads, tokens); empty clusters hold none."""
    ends = sizes.cumsum(-1)
    tokens = int(ends[0, 0, -1]) if ends.numel() else 0
    positions = torch.arange(tokens, device=sizes.device).expand(*sizes.shape[:2], -1)
    return torch.searchsorted(ends, positions.contiguous(), right=True)


def _visible(mask: Tensor, query_labels: Tensor, key_labels: Tensor, start: int, stop: int) -> Tensor:
    heads, clusters = mask.shape[1], mask.shape[3]
    rows = query_labels[:, :, start:stop, None]
    columns = key_labels.repeat_interleave(heads // key_labels.shape[1], 1)[:, :, None]
    seen = mask.gather(2, rows.expand(-1, -1, -1, clusters))
    return seen.gather(3, columns.expand(-1, -1, rows.shape[2], -1))


def _row_chunks(q: Tensor, k: Tensor) -> list[tuple[int, int]]:
    queries, step = q.shape[2], max(1, CHUNK // max(q.shape[0] * q.shape[1] * k.shape[2], 1))
    return [(start, min(start + step, queries)) for start in range(0, queries, step)]


def execute_clusters(
    plan: ClusterPlan,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    backend: ClusterBackend = "auto",
    scale: float | None = None,
    precision: Precision = "input",
) -> Tensor:
    """Attention by a plan: (batch, heads, queries, value dim), in the dtype of q and the original order of the queries.

    q is (batch, heads, queries, dim), k and v (batch, key heads, keys, dim), in the original order, with any strides. `scale`
    multiplies QK^T (default dim ** -0.5). Backends:

    - "kernel": C++ on the CPU, float32 or bfloat16, dims multiples of 16, no gradients, no more queries than keys. Multiplies
      bfloat16 inputs in bfloat16 if the processor can. Permutes while it packs, so no tensor is permuted in memory.
    - "gather": torch; permutes, lets each cluster of queries attend to its gathered keys, permutes back. Any device and dtype,
      with gradients. It calls torch's attention once per query cluster, so on a GPU it is right but not fast.
    - "reference": every score, masked. For tests.
    - "auto": the kernel if it can run, else gather.

    `precision="bf16"` lets the kernel multiply float32 inputs in bfloat16; the other backends ignore it.
    Raises TypeError for arguments of the wrong kind, ValueError when tensors and plan do not fit together or the backend cannot
    run them. `kernels.paths()` counts which backend ran.

    >>> labels = torch.tensor([[[0, 1, 0, 1]]])  # two clusters, each of which sees itself
    >>> plan = ClusterPlan.from_labels(labels, labels, torch.eye(2, dtype=torch.bool)[None, None])
    >>> execute_clusters(plan, *torch.randn(3, 1, 1, 4, 16).unbind()).shape, plan.density()
    (torch.Size([1, 1, 4, 16]), 0.5)
    """
    _check(plan, q, k, v)
    checks.choice("backend", backend, get_args(ClusterBackend))
    checks.choice("precision", precision, get_args(Precision))
    scale = scale_of(scale, q)
    refused = _kernel_refuses(q, k, v) if backend in ("auto", "kernel") else ""
    if backend == "kernel" and refused:
        raise ValueError(f"backend 'kernel' {refused}; use 'gather' or 'auto'")
    if backend == "auto":
        backend = "gather" if refused else "kernel"
    kernels.ran("cluster attention", backend)
    if backend == "reference":
        return _reference(plan, q, k, v, scale)
    if backend == "gather":
        return _gather(plan, q, k, v, scale)
    order = (plan.query_order.contiguous(), plan.key_order.contiguous())
    sizes = (plan.query_sizes.contiguous(), plan.key_sizes.contiguous())
    options = (plan.mask.contiguous(), scale, in_bf16(q.dtype, precision))
    q, k, v = unit_stride(q), unit_stride(k), unit_stride(v)
    return cast(Tensor, torch.ops.assay.cluster_attention(q, k, v, *order, *sizes, *options))


def _check(plan: ClusterPlan, q: Tensor, k: Tensor, v: Tensor) -> None:
    for name, x in (("q", q), ("k", k), ("v", v)):
        checks.tensor(name, x, shape=("batch", "heads", "tokens", "dim"), empty=True)
    checks.together(q=q, k=k, v=v)
    if k.shape[3] != q.shape[3] or v.shape[:3] != k.shape[:3]:
        raise ValueError(f"q {tuple(q.shape)}, k {tuple(k.shape)} and v {tuple(v.shape)} do not fit together")
    for name, x, order in (("q", q, plan.query_order), ("k", k, plan.key_order)):
        if x.shape[:3] != order.shape:
            raise ValueError(
                f"the plan is for {name} of (batch, heads, tokens) {tuple(order.shape)}, got {tuple(x.shape[:3])}"
            )


# ------------------------------------------------------------------------------------------------------------- backends


def _reference(plan: ClusterPlan, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    outputs = []
    for start, stop in _row_chunks(q, k):
        scores = blocks.grouped_scores(q[:, :, start:stop].to(wide), k.to(wide), scale)
        seen = plan.visible(start, stop)
        seen_any = seen.any(-1, keepdim=True)
        shares = scores.masked_fill(~(seen | ~seen_any), -math.inf).softmax(-1).masked_fill(~seen_any, 0.0)
        grouped = shares.reshape(shares.shape[0], k.shape[1], -1, k.shape[2]) @ v.to(wide)
        outputs.append(grouped.view(*shares.shape[:3], -1))
    return torch.cat(outputs, dim=2).to(q.dtype) if outputs else q.new_zeros(*q.shape[:3], v.shape[3])


def _gather(plan: ClusterPlan, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    if not q.shape[0] or not q.shape[2]:
        return q.new_zeros(*q.shape[:3], v.shape[3])
    per = plan.heads // plan.key_heads
    places, inverse = _places(plan.key_sizes), plan.query_order.argsort(-1)
    outputs = []
    for b in range(q.shape[0]):
        for h in range(plan.heads):
            key_head = h // per
            order, keys = plan.query_order[b, h], plan.key_order[b, key_head]
            found = []
            for i, rows in enumerate(order.split(plan.query_sizes[b, h].tolist())):
                seen = keys[plan.mask[b, h, i][places[b, key_head]]]
                if len(rows) and len(seen):
                    one = (q[b, h, rows][None], k[b, key_head, seen][None], v[b, key_head, seen][None])
                    found.append(F.scaled_dot_product_attention(*one, scale=scale)[0])
                elif len(rows):
                    found.append(q.new_zeros(len(rows), v.shape[3]))
            outputs.append(torch.cat(found)[inverse[b, h]])
    return torch.stack(outputs).view(*q.shape[:3], -1)


def _kernel_refuses(q: Tensor, k: Tensor, v: Tensor) -> str:
    """Why the C++ kernel cannot run these tensors; empty when it can."""
    if q.shape[2] > k.shape[2]:
        return f"takes no more queries than keys, got {q.shape[2]} and {k.shape[2]}"
    return kernel_refuses(q, k, v) or ("" if _load() else "needs a C++ compiler (see `assay doctor`)")


@functools.cache
def _load() -> bool:
    """Make the kernel known to torch.compile (shapes) and to the cost counter (MACs)."""
    if not blocks.load_kernel():
        return False
    from assay.measure.cost import register_macs

    torch.library.register_fake("assay::cluster_attention", blocks.like_queries)
    register_macs("assay::cluster_attention", _macs, "attention")
    return True


def _macs(q: Tensor, k: Tensor, v: Tensor, *rest: Any, out: Tensor) -> int:
    return ClusterPlan(*rest[:5]).macs(head_dim=q.shape[3], value_dim=v.shape[3])


_constant: Any = torch.compiler.assume_constant_result  # torch.compile is not to trace into it
_constant(_load)
