"""S2-Attn and SF-Attn: causal attention in groups, shifted for some heads, with sinks; masks use original positions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from assay import checks

Variant = Literal["paper", "as_released"]


def shifted_heads(heads: int, shift_fraction: float = 0.5) -> int:
    """How many heads, the last ones, attend in shifted groups: that fraction of the second half, rounded.

    Raises ValueError for no heads, or a fraction outside [0, 1].
    """
    checks.whole("heads", heads, low=1)
    checks.number("shift_fraction", shift_fraction, low=0, high=1)
    return math.floor(shift_fraction * (heads - heads // 2) + 0.5)


def scores_computed(length: int, group: int, sinks: int = 4) -> int:
    """Scores a head needs before causal halving, length * (group + sinks), in place of length^2."""
    _check_group(length, group, sinks)
    return length * min(group + sinks, length)


def _check_group(length: int, group: int, sinks: int) -> None:
    checks.whole("length", length, low=1)
    if length % checks.whole("group", group, low=1, high=length):
        raise ValueError(f"group must divide the length ({length}), got {group}")
    checks.whole("sinks", sinks, low=0, high=length)


def group_of(length: int, group: int, *, shifted: bool) -> Tensor:
    """The group of each position, int64 (length,); shifted groups begin half a group later, and the last one wraps around."""
    _check_group(length, group, 0)
    return (torch.arange(length) - (group // 2 if shifted else 0)) % length // group


def allowed_pairs(
    length: int,
    heads: int,
    *,
    group: int,
    shift_fraction: float = 0.5,
    sinks: int = 4,
    tokens: Tensor | None = None,
    variant: Variant = "paper",
) -> Tensor:
    """What each query sees, in original positions: bool (batch or 1, heads, length, length). The definition; `sf_attention` is fast.

    j is seen by i where j <= i and both lie in one group, or j is a sink. `tokens` is bool (batch, length), False on padding.
    """
    _check_group(length, group, sinks)
    shifted = _released_heads(heads, group) if variant == "as_released" else shifted_heads(heads, shift_fraction)
    position = torch.arange(length)
    causal = position <= position[:, None]
    real = torch.ones(1, length, dtype=torch.bool) if tokens is None else tokens.cpu()
    start = real.int().argmax(-1)[:, None]
    seen = []
    for moved in (False, True):
        groups = group_of(length, group, shifted=moved)
        same = groups == groups[:, None]
        if variant == "as_released":  # causal among the places after the roll, whatever they hold
            place = (position - (group // 2 if moved else 0)) % length
            seen.append((same & (place <= place[:, None])).expand(len(real), -1, -1))
        else:
            sink = (position >= start) & (position < start + sinks)
            seen.append((same | sink[:, None]) & causal)
    mask = torch.stack([seen[h >= heads - shifted] for h in range(heads)], 1)
    return mask & real[:, None, None] & real[:, None, :, None]


def _released_heads(heads: int, group: int) -> int:
    if group % 2:
        raise ValueError(
            f"group must be even for variant 'as_released' (its two rolls do not undo each other), got {group}"
        )
    return heads - heads // 2


def sf_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    group: int,
    shift_fraction: float = 0.5,
    sinks: int = 4,
    tokens: Tensor | None = None,
    scale: float | None = None,
    variant: Variant = "paper",
) -> Tensor:
    """Sink fixed attention of q (batch, heads, S, d) over k, v (batch, key heads, S, d): (batch, heads, S, d). Differentiable.

    Causal; each head computes S (group + sinks) scores, half of them masked as in any causal attention. Without padding and with at
    most half a group of sinks there is no mask at all: every piece is plain causal attention. `tokens` bool (batch, S) is False on
    padding, whose rows give zeros; sinks are the first `sinks` positions from each row's first token. `shift_fraction` and `sinks`
    do not apply to `variant="as_released"`, see the module. Raises ValueError for a group that does not divide S, and other misfits.

    >>> q, k, v = torch.randn(3, 1, 4, 32, 8)
    >>> sf_attention(q, k, v, group=8).shape
    torch.Size([1, 4, 32, 8])
    """
    _check_inputs(q, k, v, tokens)
    checks.choice("variant", variant, get_args(Variant))
    heads, length = q.shape[1:3]
    _check_group(length, group, sinks)
    released = variant == "as_released"
    shifted = _released_heads(heads, group) if released else shifted_heads(heads, shift_fraction)
    kinds = [(0, heads - shifted, 0), (heads - shifted, heads, group // 2)]
    outputs = []
    for first, last, shift in kinds:
        if first == last:
            continue
        chosen: Any = slice(first, last)
        if k.shape[1] != heads:
            chosen = torch.arange(first, last, device=q.device) // (heads // k.shape[1])
        part = q[:, first:last], k[:, chosen], v[:, chosen]
        if released:
            outputs.append(_rolled(*part, group, shift, tokens, scale))
        elif tokens is None and sinks <= (shift or group):
            outputs.append(_pieces(*part, group, shift, sinks, scale))
        else:
            outputs.append(_masked(*part, group, shift, sinks, tokens, scale))
    return torch.cat(outputs, 1)


def s2_attention(q: Tensor, k: Tensor, v: Tensor, *, group: int, **options: Any) -> Tensor:
    """LongLoRA's shifted sparse attention: half of the heads shifted, no sinks; without its leak unless `variant="as_released"`."""
    return sf_attention(q, k, v, group=group, shift_fraction=1.0, sinks=0, **options)


def _check_inputs(q: Tensor, k: Tensor, v: Tensor, tokens: Tensor | None) -> None:
    for name, x in (("q", q), ("k", k), ("v", v)):
        checks.tensor(name, x)
    checks.together(q=q, k=k, v=v)
    if q.ndim != 4 or k.ndim != 4 or q.shape[2] != k.shape[2] or k.shape != v.shape or q.shape[0] != k.shape[0]:
        shapes = [tuple(x.shape) for x in (q, k, v)]
        raise ValueError(f"q, k and v must be (batch, heads, S, d) of one length, got {shapes}")
    if not k.shape[1] or q.shape[1] % k.shape[1]:
        raise ValueError(f"heads of q ({q.shape[1]}) must be a multiple of the heads of k ({k.shape[1]})")
    if tokens is not None:
        checks.tensor("tokens", tokens, shape=(q.shape[0], q.shape[2]), dtype="bool")


def _causal(qkv: Sequence[Tensor], scale: float | None) -> Tensor:
    q, k, v = qkv
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)


def _pieces(q: Tensor, k: Tensor, v: Tensor, group: int, shift: int, sinks: int, scale: float | None) -> Tensor:
    """No padding, sinks within `shift` (unshifted: the group): plain causal attention, group by group.

    The group that wraps around is causal in the order of positions: its beginning of the text comes first. It, or the first group
    of unshifted heads, holds the sinks already; all other groups come after them, so sinks before the group's own keys are causal
    too, once queries whose results are discarded are added for them.
    """
    length = q.shape[2]
    stop = length - group + shift if shift else length
    edges = shift or group
    ends = [torch.cat([x[:, :, :edges], x[:, :, stop:]], 2) for x in (q, k, v)]
    alone = _causal(ends, scale)
    if edges == stop:
        return alone
    batch, heads = q.shape[:2]
    blocks = [x[:, :, edges:stop].reshape(batch * heads, -1, group, x.shape[3]) for x in (q, k, v)]
    if sinks:
        query, key, value = blocks
        first = [x[:, :, None, :sinks].expand(-1, -1, key.shape[1], -1, -1).flatten(0, 1) for x in (k, v)]
        blocks = [F.pad(query, (0, 0, sinks, 0)), torch.cat([first[0], key], 2), torch.cat([first[1], value], 2)]
    middle = _causal(blocks, scale)[:, :, sinks:].reshape(batch, heads, stop - edges, v.shape[3])
    return torch.cat([alone[:, :, :edges], middle, alone[:, :, edges:]], 2)


def _masked(
    q: Tensor, k: Tensor, v: Tensor, group: int, shift: int, sinks: int, tokens: Tensor | None, scale: float | None
) -> Tensor:
    """Any padding, any number of sinks: G + g keys a group under a mask."""
    batch, heads, length, _ = q.shape
    device = q.device
    position = torch.arange(length, device=device).roll(-shift).view(-1, group)
    real = torch.ones(1, length, dtype=torch.bool, device=device) if tokens is None else tokens
    start = real.int().argmax(-1)[:, None]
    query = real[:, position][..., None]  # (batch, groups, G, 1)
    own = real[:, position][:, :, None] & (position[:, None] <= position[..., None])
    sink = start + torch.arange(sinks, device=device)  # (batch, g)
    there, sink = sink < length, sink.clamp(max=length - 1)
    there = there & real.gather(1, sink)
    elsewhere = group_of(length, group, shifted=shift > 0).to(device)[sink][:, None] != torch.arange(
        length // group, device=device
    ).view(-1, 1)
    earlier = sink[:, None, None] <= position[..., None]
    mask = torch.cat([earlier & (there[:, None] & elsewhere)[:, :, None], own], -1) & query
    chosen = sink.expand(batch, -1)[:, None, :, None]
    rows = []
    for x in (k, v):
        first = x.gather(2, chosen.expand(-1, heads, -1, x.shape[3]))[:, None].expand(-1, length // group, -1, -1, -1)
        rows.append(torch.cat([first, _groups(x, group, shift)], 3).flatten(0, 1))
    mask = mask.expand(batch, -1, -1, -1).flatten(0, 1)[:, None]
    out = _visible([_groups(q, group, shift).flatten(0, 1), *rows], mask, scale)
    return _ungroup(out, batch, shift)


def _rolled(
    q: Tensor, k: Tensor, v: Tensor, group: int, shift: int, tokens: Tensor | None, scale: float | None
) -> Tensor:
    """As released: causal in the order after the roll."""
    folded = [_groups(x, group, shift).flatten(0, 1) for x in (q, k, v)]
    if tokens is None:
        out = _causal(folded, scale)
    else:
        real = tokens.roll(-shift, 1).reshape(-1, 1, 1, group)
        mask = torch.ones(group, group, dtype=torch.bool, device=q.device).tril() & real & real.transpose(-1, -2)
        out = _visible(folded, mask, scale)
    return _ungroup(out, q.shape[0], shift)


def _visible(qkv: Sequence[Tensor], mask: Tensor, scale: float | None) -> Tensor:
    """SDPA under a mask; rows that see nothing give zeros."""
    q, k, v = qkv
    some = mask.any(-1, keepdim=True)
    return F.scaled_dot_product_attention(q, k, v, mask | ~some, scale=scale).masked_fill(~some, 0.0)


def _groups(x: Tensor, group: int, shift: int) -> Tensor:
    """(batch, heads, S, d) -> (batch, groups, heads, G, d) after a roll to the left."""
    return x.roll(-shift, 2).unflatten(2, (-1, group)).transpose(1, 2)


def _ungroup(x: Tensor, batch: int, shift: int) -> Tensor:
    """(batch * groups, heads, G, d) -> (batch, heads, S, d), the roll undone."""
    return x.unflatten(0, (batch, -1)).transpose(1, 2).flatten(2, 3).roll(shift, 2)
