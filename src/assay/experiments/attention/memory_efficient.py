"""Memory-efficient attention as it was before FlashAttention: that of xformers, with a stand-in where xformers cannot run.

xformers' kernel computes exact attention by chunks of keys with an online softmax (Rabe and Staats, arXiv 2112.05682). It runs only
on NVIDIA GPUs, so `chunked_attention` stands in for it elsewhere (our choice): the same algorithm, built from torch operators.
The stand-in lacks a fused kernel's locality: each operator writes out its chunk of scores, which stays in the cache if it is small.
"""

from __future__ import annotations

import functools
import importlib
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from assay.workloads.attention import QKV

Chunks = tuple[int, int]  # queries, keys

CANDIDATES: tuple[Chunks, ...] = ((64, 512), (128, 256), (256, 256), (256, 512), (512, 512), (1024, 256), (1024, 1024))


def chunked_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    chunks: Chunks = (256, 256),
    causal: bool = True,
    scale: float | None = None,
) -> Tensor:
    """Exact attention, one chunk of queries against one of keys at a time: (batch, heads, queries, value dim), in the dtype of q.

    q is (batch, heads, queries, dim), k and v (batch, key heads, keys, dim), heads a multiple of key heads; causal queries are
    the last of the keys. Queries are scaled (default dim ** -0.5) beforehand. Both products are rounded to the dtype of q, as
    torch's are; softmax and sums are float32 (float64 for float64). Chunks above the diagonal are not computed. No gradients.
    Raises ValueError for chunks below 1, heads that are not a multiple, and more causal queries than keys.
    """
    batch, heads, queries, dim = q.shape
    key_heads, keys, offset = k.shape[1], k.shape[2], k.shape[2] - queries
    if min(chunks) < 1:
        raise ValueError(f"chunks must be at least 1, got {chunks}")
    if heads % key_heads:
        raise ValueError(f"heads of q ({heads}) must be a multiple of the heads of k ({key_heads})")
    if causal and offset < 0:
        raise ValueError(f"causal queries must be the last of the keys, got {queries} queries and {keys} keys")
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    grouped = (q * (dim**-0.5 if scale is None else scale)).unflatten(1, (key_heads, -1))
    out = q.new_empty(*grouped.shape[:-1], v.shape[3])
    for first in range(0, queries, chunks[0]):
        last = min(first + chunks[0], queries)
        rows = grouped[:, :, :, first:last].flatten(2, 3)  # the queries of all heads that share a key head
        top = torch.full((*rows.shape[:3], 1), -math.inf, dtype=wide, device=q.device)
        weight, sums = torch.zeros_like(top), top.new_zeros(*rows.shape[:3], v.shape[3])
        for start in range(0, offset + last if causal else keys, chunks[1]):
            stop = min(start + chunks[1], keys)
            scores = (rows @ k[:, :, start:stop].mT).to(wide)
            if causal and stop - 1 > offset + first:
                positions = torch.arange(offset + first, offset + last, device=q.device)[:, None]
                hidden = torch.arange(start, stop, device=q.device) > positions
                scores = scores.masked_fill_(hidden.repeat(heads // key_heads, 1), -math.inf)
            now = torch.maximum(top, scores.amax(-1, keepdim=True))
            fade, shares = (top - now).exp_(), scores.sub_(now).exp_()
            weight = weight.mul_(fade).add_(shares.sum(-1, keepdim=True))
            sums = sums.mul_(fade).add_(shares.to(v.dtype) @ v[:, :, start:stop])
            top = now
        out[:, :, :, first:last] = (sums / weight).unflatten(2, (-1, last - first))
    return out.flatten(1, 2)


def fastest_chunks(layer: QKV, candidates: Sequence[Chunks] = CANDIDATES) -> Chunks:
    """The sizes of `candidates` with which causal `chunked_attention` of (q, k, v) took the least time here, in two runs each."""

    def seconds(chunks: Chunks) -> float:
        found = []
        for _ in range(2):
            begin = time.perf_counter()
            chunked_attention(*layer, chunks=chunks)
            found.append(time.perf_counter() - begin)
        return min(found)

    return min(candidates, key=seconds)


def find_xformers() -> Any:
    """The module xformers.ops where it can be imported and there is a GPU for it, else None."""
    if not torch.cuda.is_available():
        return None
    try:
        return importlib.import_module("xformers.ops")
    except ImportError:
        return None


def xformers_attention(ops: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention of a whole prompt by `ops.memory_efficient_attention`, grouped heads allowed: shapes as in `chunked_attention`.

    It takes (batch, tokens, key heads, heads of a group, dim), keys and values expanded over the group without a copy.
    """
    per_group = q.shape[1] // k.shape[1]
    query = q.transpose(1, 2).unflatten(2, (k.shape[1], per_group))
    key, value = (x.transpose(1, 2).unsqueeze(3).expand(-1, -1, -1, per_group, -1) for x in (k, v))
    out: Tensor = ops.memory_efficient_attention(query, key, value, attn_bias=ops.LowerTriangularMask())
    return out.flatten(2, 3).transpose(1, 2)


def memory_efficient(layers: list[QKV]) -> tuple[list[QKV], Callable[[Tensor, Tensor, Tensor], Tensor], dict[str, Any]]:
    """The layers where the baseline runs, the baseline, causal, and what it is: xformers where it can run, else the stand-in.

    The stand-in takes the chunk sizes that are fastest on the first layer, so that it is no weaker than it must be.
    """
    ops = find_xformers()
    if ops is not None:
        moved = [(q.cuda(), k.cuda(), v.cuda()) for q, k, v in layers]
        return moved, functools.partial(xformers_attention, ops), {"baseline": "xformers"}
    chunks = fastest_chunks(layers[0])
    return layers, functools.partial(chunked_attention, chunks=chunks), {"baseline": "stand-in", "chunks": list(chunks)}
