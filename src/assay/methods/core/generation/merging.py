"""Attention over a cache in pieces: each piece gives its output and the logarithm of its softmax sum, from which the whole follows exactly.

With A the softmax-weighted values over a set of keys and l = log sum exp(q k * scale) over them, the union of sets has
l = log sum_i exp(l_i) and A = sum_i exp(l_i - l) A_i, whatever the pieces are and in whatever order they are merged. So the old tokens
can be attended to while the new one is still on its way (arXiv 2405.01814), keys can lie on several machines, and a prefix that
many rows share is read once for all of them (`cascade_attention`).

When NOT to use it: where keys lie in one piece already; torch's SDPA is faster there, and never holds the scores of a whole
prompt. Soft caps are not covered; a learnt sink is a piece of its own, with output zero and the sink as `lse`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from assay import checks

CHUNK = 1 << 24  # scores held at a time


class Partial(NamedTuple):
    """Attention over some keys: `output` (rows, heads, queries, dim) and `lse` (rows, heads, queries), float32 or float64.

    A query that sees none of the keys has output 0 and lse -inf.
    """

    output: Tensor
    lse: Tensor


class Piece(NamedTuple):
    """Keys and values (rows or 1, key-value heads, tokens, dim), of all rows or of one that all of them share.

    `visible` says which keys each query sees, bool, broadcastable to (rows, heads, queries, tokens); None: all of them.
    """

    keys: Tensor
    values: Tensor
    visible: Tensor | None = None


def partial_attention(
    q: Tensor, keys: Tensor, values: Tensor, *, visible: Tensor | None = None, scale: float | None = None
) -> Partial:
    """Attention of q (rows, heads, queries, dim) over a piece as in `Piece`, of any number of keys, even none.

    A multiple of the piece's heads share each of them. `scale` None is dim ** -0.5. Causal masks, left padding and windows are
    `core.attention.plan.AttentionPlan(...).visible(...)`, of which a piece takes its columns. Computed in float32, float64 for float64
    inputs, whatever comes in; results are that wide. Keys of one row are read once for all rows.
    Raises TypeError for inputs of several or no floating-point dtypes and masks that are not bool, ValueError for shapes that do
    not fit and other devices.

    >>> q, k, v = torch.randn(1, 4, 1, 8), torch.randn(1, 2, 6, 8), torch.randn(1, 2, 6, 8)
    >>> whole = partial_attention(q, k, v)
    >>> pieces = [partial_attention(q, k[:, :, :4], v[:, :, :4]), partial_attention(q, k[:, :, 4:], v[:, :, 4:])]
    >>> bool((merged(pieces).output - whole.output).abs().max() < 1e-6)
    True
    """
    _check(q, keys, values, visible)
    rows, heads, queries, dim = q.shape
    scale = dim**-0.5 if scale is None else checks.number("scale", scale)
    if keys.shape[0] == 1 < rows:  # one row's keys: the rows' queries become queries of one row
        folded = q.transpose(0, 1).reshape(1, heads, rows * queries, dim)
        if visible is not None:
            spread = visible.expand(rows, visible.shape[1], queries, -1)
            visible = spread.transpose(0, 1).reshape(1, spread.shape[1], rows * queries, -1)
        part = partial_attention(folded, keys, values, visible=visible, scale=scale)
        output = part.output.view(heads, rows, queries, values.shape[3]).transpose(0, 1)
        return Partial(output, part.lse.view(heads, rows, queries).transpose(0, 1))
    wide = torch.promote_types(q.dtype, torch.float32)
    if not keys.shape[2] or not q.numel():
        lse = torch.full((rows, heads, queries), -math.inf, dtype=wide, device=q.device)
        return Partial(lse.new_zeros(rows, heads, queries, values.shape[3]), lse)
    keys, values, shared = keys.to(wide), values.to(wide), keys.shape[1]
    outputs, sums = [], []
    step = max(1, CHUNK // (rows * heads * keys.shape[2]))
    for start in range(0, queries, step):
        some = (q[:, :, start : start + step].to(wide) * scale).reshape(rows, shared, -1, dim)
        scores = (some @ keys.transpose(-1, -2)).view(rows, shared, heads // shared, -1, keys.shape[2])
        if visible is not None:
            seen = visible if visible.shape[2] == 1 else visible[:, :, start : start + step]
            groups = (1, 1) if seen.shape[1] == 1 else (shared, heads // shared)
            scores = scores.masked_fill(~seen.unflatten(1, groups), -math.inf)
        top = scores.amax(-1, keepdim=True)
        top = top.masked_fill(top == -math.inf, 0.0)
        weights = (scores - top).exp()
        total = weights.sum(-1, keepdim=True)
        sums.append((total.log() + top).reshape(rows, heads, -1))
        weights = weights / total.masked_fill(total == 0, 1.0)
        outputs.append((weights.flatten(2, 3) @ values).view(rows, heads, -1, values.shape[3]))
    return Partial(torch.cat(outputs, 2), torch.cat(sums, 2))


def merged(parts: Sequence[Partial]) -> Partial:
    """Attention over all keys of the parts together, exactly: any parts, in any order.

    Raises ValueError for no parts and for parts of other shapes, TypeError for those of other dtypes.
    """
    if not parts:
        raise ValueError("parts must hold at least one part, got none")
    shape = (*parts[0].lse.shape, "dim")
    for part in parts:
        checks.tensor("output", part.output, shape=shape, empty=True)
        checks.tensor("lse", part.lse, shape=shape[:-1], dtype=part.output.dtype, empty=True)
        checks.together(first=parts[0].output, output=part.output, lse=part.lse)
    lse = torch.logsumexp(torch.stack([part.lse for part in parts]), 0)
    ground = lse.masked_fill(lse == -math.inf, 0.0)
    output = torch.zeros_like(parts[0].output)
    for part in parts:
        output = output + (part.lse - ground).exp()[..., None] * part.output
    return Partial(output, lse)


def cascade_attention(q: Tensor, pieces: Sequence[Piece], *, scale: float | None = None) -> Tensor:
    """Attention of q (rows, heads, queries, dim) over several pieces as over their keys in one: a shared prefix, then each row's own.

    Returns (rows, heads, queries, dim) in the dtype of q; a query that sees nothing gets 0. A piece of one row is read once, however
    many rows there are; what many rows do not share is not saved. Raises as `partial_attention`, and ValueError for no pieces.

    >>> q, own, prefix = torch.randn(3, 2, 1, 8), torch.randn(3, 2, 4, 8), torch.randn(1, 2, 9, 8)
    >>> cascade_attention(q, [Piece(prefix, prefix), Piece(own, own)]).shape
    torch.Size([3, 2, 1, 8])
    """
    if not pieces:
        raise ValueError("pieces must hold at least one piece, got none")
    parts = [partial_attention(q, keys, values, visible=seen, scale=scale) for keys, values, seen in pieces]
    return merged(parts).output.to(q.dtype)


def _check(q: Tensor, keys: Tensor, values: Tensor, visible: Tensor | None) -> None:
    checks.tensor("q", q, ndim=4, empty=True)
    rows, heads, queries, dim = q.shape
    checks.tensor("keys", keys, shape=("rows", "heads", "tokens", dim), empty=True)
    checks.tensor("values", values, shape=(*keys.shape[:3], "dim"), empty=True)
    checks.together(q=q, keys=keys, values=values)
    if keys.shape[0] not in (1, rows):
        raise ValueError(f"keys must have {rows} rows, as q, or one, got {keys.shape[0]}")
    if not keys.shape[1] or heads % keys.shape[1]:
        raise ValueError(f"keys must have a number of heads that divides the {heads} of q, got {keys.shape[1]}")
    if visible is not None:
        checks.tensor("visible", visible, ndim=4, dtype="bool", device=q.device, empty=True)
        wanted = (rows, heads, queries, keys.shape[2])
        if any(have not in (1, want) for have, want in zip(visible.shape, wanted, strict=True)):
            raise ValueError(f"visible must be broadcastable to {wanted}, got {tuple(visible.shape)}")
