"""Attention without exponentials: ReLU softmax, scaling attention, 2Quad; as functions, and in transformers by name.

With A = scale Q K^T, P = the weights of the values:

    softmax         exp(A) / sum exp(A)             a maximum, n^2 exponentials, n reciprocals
    relu_softmax    relu(A) / (sum relu(A) + eps)   n^2 comparisons, n reciprocals
    two_quad        A^2 / (sum A^2 + eps)           n^2 squares, n reciprocals (MPCFormer; its paper squares A + 5, see `shift`)
    scaling         A / n                           nothing: out = Q (K^T V) scale / n, n d^2 products in place of n^2 d
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from assay import checks
from assay.methods.core import kernels

Kind = Literal["softmax", "relu_softmax", "scaling", "two_quad"]
KINDS: tuple[Kind, ...] = get_args(Kind)
REGISTERED: tuple[Kind, ...] = ("relu_softmax", "scaling", "two_quad")
EPS = 1e-5
CHUNK = 64  # queries of causal scaling attention that go together; our choice


def attend(
    kind: Kind,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    mask: Tensor | None = None,
    causal: bool = False,
    dropout: float = 0.0,
    shift: float = 0.0,
) -> Tensor:
    """Attention of one kind: (batch, heads, queries, value dim), in the dtype of q.

    q is (batch, heads, queries, dim), k and v (batch, key heads, keys, dim), heads a multiple of key heads. `scale` multiplies QK^T
    (default dim ** -0.5). `mask` is bool and broadcasts to (batch, heads, queries, keys), True where a key is seen; `causal`: query i
    sees the keys up to i + keys - queries. What is not seen has weight 0, and "scaling" divides by the number of keys that are seen.
    A query that sees none gets zeros. `dropout` is applied to P. `shift` is added to A before "two_quad" squares it.
    Sums are taken in float32 where the inputs have fewer bits; all of "scaling" is, of float16, whose range K^T V and shares of many keys
    leave.

    "scaling" is computed as Q (K^T V) where it may be and where that is less work: without dropout, and with no mask or one that is the
    same for all queries (a dimension of 1); causal without a mask, by chunks of queries. Raises TypeError and ValueError for tensors that
    do not fit together, and for another kind.

    When not to use it: with weights that were trained with softmax. The network has to be trained with the kind it uses.

    >>> q, k, v = torch.randn(3, 1, 2, 65, 16).unbind()
    >>> explicit = (q @ k.mT) * 16**-0.5 / 65 @ v
    >>> torch.allclose(attend("scaling", q, k, v), explicit, atol=1e-5)
    True
    """
    checks.choice("kind", kind, KINDS)
    _check(q, k, v, mask)
    dropout = checks.number("dropout", dropout, low=0, below=1)
    scale = q.shape[-1] ** -0.5 if scale is None else checks.number("scale", scale)
    groups, dtype = q.shape[1] // k.shape[1], q.dtype
    if kind == "scaling" and dtype == torch.float16:
        q, k, v = q.float(), k.float(), v.float()
    if mask is not None:
        mask = mask[(None,) * (4 - mask.ndim)].expand(-1, -1, -1, k.shape[2])
    if groups > 1:  # queries of a group share their keys: (batch, key heads, group, queries, dim)
        q, k, v = q.unflatten(1, (-1, groups)), k.unsqueeze(2), v.unsqueeze(2)
        if mask is not None:
            mask = mask.unflatten(1, (-1, groups)) if mask.shape[1] > 1 else mask.unsqueeze(2)
    if kind == "scaling" and not causal and not dropout and (mask is None or mask.shape[-2] == 1):
        out = _scaling(q, k, v, scale, mask)
    elif kind == "scaling" and causal and mask is None and not dropout and _by_chunks(q, k):
        out = _causal_scaling(q, k, v, scale)
    else:
        kernels.ran(f"{kind} attention", "all weights")
        p = weights(kind, q, k, scale=scale, mask=mask, causal=causal, shift=shift)
        out = F.dropout(p, dropout) @ v if dropout else p @ v
    return (out.flatten(1, 2) if groups > 1 else out).to(dtype)


def weights(
    kind: Kind,
    q: Tensor,
    k: Tensor,
    *,
    scale: float,
    mask: Tensor | None = None,
    causal: bool = False,
    shift: float = 0.0,
) -> Tensor:
    """P itself, (..., queries, keys), in the dtype of q. Everything as in `attend`, of which it is a part; nothing is checked."""
    scores = (q @ k.mT) * scale
    seen = visible(mask, causal, q, k)
    if kind == "softmax":
        if seen is None:
            return scores.softmax(-1)
        blind = ~seen.any(-1, keepdim=True)
        return scores.masked_fill(~seen & ~blind, float("-inf")).softmax(-1).masked_fill(blind, 0.0)
    if kind == "scaling":
        if seen is None:
            return scores / k.shape[-2]
        count = seen.sum(-1, keepdim=True).clamp(min=1).to(scores.dtype)
        return (scores / count).masked_fill(~seen, 0.0)
    raw = scores.relu() if kind == "relu_softmax" else (scores + shift).square()
    if seen is not None:
        raw = raw.masked_fill(~seen, 0.0)
    wide = torch.float32 if raw.dtype in (torch.float16, torch.bfloat16) else raw.dtype
    return (raw / (raw.sum(-1, keepdim=True, dtype=wide) + EPS)).to(raw.dtype)


def visible(mask: Tensor | None, causal: bool, q: Tensor, k: Tensor) -> Tensor | None:
    """Which keys each query sees, bool, to be broadcast to the scores; None where all see all."""
    if not causal:
        return mask
    rows = torch.arange(q.shape[-2], device=q.device)[:, None] + (k.shape[-2] - q.shape[-2])
    band = torch.arange(k.shape[-2], device=q.device) <= rows
    return band if mask is None else band & mask


def _scaling(q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None) -> Tensor:
    """Scaling attention of keys that all queries see, in the order that takes fewer products."""
    queries, keys, dim, wide = q.shape[-2], k.shape[-2], q.shape[-1], v.shape[-1]
    factor: float | Tensor = scale / keys
    if mask is not None:
        columns = mask.mT  # (..., keys, 1)
        k, v = k.masked_fill(~columns, 0.0), v.masked_fill(~columns, 0.0)
        factor = scale / columns.sum(-2, keepdim=True).clamp(min=1).to(q.dtype)
    if (keys + queries) * dim * wide <= queries * keys * (dim + wide):
        kernels.ran("scaling attention", "Q (K^T V)")
        return q @ ((k * factor).mT @ v)
    kernels.ran("scaling attention", "(Q K^T) V")
    return (q @ (k * factor).mT) @ v


def _by_chunks(q: Tensor, k: Tensor) -> bool:
    """Whether 2 (dim + CHUNK) dim products a query are fewer than 2 keys dim."""
    return CHUNK < q.shape[-2] <= k.shape[-2] and q.shape[-1] + CHUNK < k.shape[-2]


def _causal_scaling(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Causal scaling attention, chunk by chunk: the keys before a chunk are in one matrix K^T V, kept in float32 at least."""
    kernels.ran("scaling attention", "Q (K^T V) by chunks")
    before = k.shape[-2] - q.shape[-2]  # keys from earlier calls, which all queries see
    wide = torch.promote_types(q.dtype, torch.float32)
    state = (k[..., :before, :].mT @ v[..., :before, :]).to(wide)
    parts = []
    for some_q, some_k, some_v in zip(
        q.split(CHUNK, -2), k[..., before:, :].split(CHUNK, -2), v[..., before:, :].split(CHUNK, -2), strict=True
    ):
        parts.append(some_q.to(wide) @ state + (some_q @ some_k.mT).tril() @ some_v)
        state = state + some_k.mT @ some_v
    seen = torch.arange(before + 1, k.shape[-2] + 1, device=q.device, dtype=wide)[:, None]
    return (torch.cat(parts, -2) * (scale / seen)).to(q.dtype)


def _check(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> None:
    checks.tensor("q", q, ndim=4)
    batch, heads, _, dim = q.shape
    checks.tensor("k", k, shape=(batch, "key heads", "keys", dim))
    checks.tensor("v", v, shape=(batch, k.shape[1], k.shape[2], "value dim"))
    checks.together(q=q, k=k, v=v)
    if heads % k.shape[1]:
        raise ValueError(f"heads of q must be a multiple of those of k ({k.shape[1]}), got {heads}")
    if mask is not None:
        checks.tensor("mask", mask, dtype="bool", empty=True)
        full = (batch, heads, q.shape[2], k.shape[2])
        if mask.ndim > 4 or any(a not in (1, b) for a, b in zip(mask.shape[::-1], full[::-1], strict=False)):
            raise ValueError(f"mask must broadcast to {full}, got {tuple(mask.shape)}")


# ----------------------------------------------------------------------------------------------------------- in transformers


def register() -> tuple[Kind, ...]:
    """Make `attn_implementation="relu_softmax"`, "scaling" and "two_quad" known to transformers (which this imports); the names.

    Masks are transformers' own, causal or padded; whatever a mask hides has weight 0. May be called repeatedly. A model that adds something
    to the scores (a soft cap, sinks, a position bias, a mask that is no mask) is refused with ValueError when it runs.

    When not to use it: on a model trained with softmax, unless it is trained on; perplexity is lost otherwise.
    """
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
    from transformers.modeling_utils import AttentionInterface

    for kind in REGISTERED:
        AttentionInterface.register(kind, _entry(kind))
        AttentionMaskInterface.register(kind, sdpa_mask)
    return REGISTERED


def _entry(kind: Kind) -> Callable[..., tuple[Tensor, None]]:
    """The attention function that transformers calls."""

    def forward(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        dropout: float = 0.0,
        scaling: float | None = None,
        is_causal: bool | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        for name in ("softcap", "s_aux", "position_bias"):
            if kwargs.get(name) is not None:
                raise ValueError(f"{name} must be None: {kind} attention has no place for it")
        causal = attention_mask is None and query.shape[2] > 1
        causal = causal and bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
        mask = None if attention_mask is None else _seen(attention_mask, key.shape[2])
        out = attend(kind, query, key, value, scale=scaling, mask=mask, causal=causal, dropout=dropout)
        return out.transpose(1, 2).contiguous(), None

    return forward


def _seen(mask: Tensor, keys: int) -> Tensor:
    """A mask of transformers as bool: one that is added to scores must be 0 where a key is seen and very negative elsewhere."""
    mask = mask[..., :keys]
    if mask.dtype == torch.bool:
        return mask
    seen = mask == 0
    if not bool((seen | (mask <= -1e4)).all()):
        raise ValueError(
            "attention_mask must be bool, or 0 where a key is seen and -1e4 or less elsewhere: it adds something else"
        )
    return seen
