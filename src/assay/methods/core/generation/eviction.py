"""Making a cache smaller for good: scores of its entries, the choice of those that stay, and the cache of these.

A policy is a score per entry, (rows, key-value heads, tokens), higher stays longer: `attention_mass` (heavy hitters, H2O, arXiv
2306.14048), `key_norms` (arXiv 2406.11430), `random_scores` (the control), `recency`. `kept` chooses the best `budget` of them, with the
first tokens (sinks) and the last ones protected; `recency` with sinks is the window of StreamingLLM (arXiv 2309.17453). `evicted`
takes them out of a cache, and says where the ones that stay have stood.

Keys stay turned for the positions at which they were computed, so what follows must be run at its own: pass `position_ids` to the
model or to `generate`, and a mask of what is left (`left_padded_mask` of each row's `min(length, budget)`). To close the gaps instead, give
the entries new positions with `rotary.repositioned`.

When NOT to use it: where an answer may depend on a token that nothing attended to before (pass keys), with models whose layers have
windows of their own, and to evict at every step, which copies the cache each time: `sinklora.EvictionCache` overwrites slots.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicSlidingWindowLayer

from assay import checks
from assay.methods.core.generation.slices import layers_of, rebuilt, tensors_of, with_layers


class Evicted(NamedTuple):
    """What is left: `cache`, and in `positions` where its entries stood, int64 (rows, heads, kept) for each layer."""

    cache: Cache
    positions: list[Tensor]


# -------------------------------------------------------------------------------------------------------------- policies


def attention_mass(weights: Tensor, heads: int) -> Tensor:
    """The attention each entry got, (rows, heads, tokens) in float32 at least, summed over queries and over the query heads that share it.

    `weights` are softmax weights (rows, query heads, queries, tokens), as models return with `output_attentions` (eager attention);
    `heads` are the key-value heads. Raises ValueError for heads that do not divide the query heads.

    >>> attention_mass(torch.tensor([[[[1.0, 0.0], [0.5, 0.5]]]]), heads=1)
    tensor([[[1.5000, 0.5000]]])
    """
    checks.tensor("weights", weights, ndim=4, empty=True)
    heads = checks.whole("heads", heads, low=1)
    if weights.shape[1] % heads:
        raise ValueError(f"heads must divide the {weights.shape[1]} query heads of weights, got {heads}")
    wide = torch.promote_types(weights.dtype, torch.float32)
    return weights.unflatten(1, (heads, weights.shape[1] // heads)).sum((2, 3), dtype=wide)


def key_norms(keys: Tensor) -> Tensor:
    """Minus the length of each of keys (rows, heads, tokens, dim): small keys tend to get much attention."""
    checks.tensor("keys", keys, ndim=4, empty=True)
    return -keys.to(torch.promote_types(keys.dtype, torch.float32)).norm(dim=-1)


def random_scores(shape: Sequence[int], seed: int) -> Tensor:
    """Scores without meaning, float32 of that shape, the same for the same seed: what every policy has to beat."""
    sizes = [checks.whole("shape", size, low=0) for size in shape]
    return torch.rand(sizes, generator=torch.Generator().manual_seed(checks.whole("seed", seed)))


def recency(shape: Sequence[int]) -> Tensor:
    """Scores, float32 (rows, heads, tokens), by which the last tokens stay."""
    rows, heads, tokens = (checks.whole("shape", size, low=0) for size in shape)
    return torch.arange(tokens, dtype=torch.float32).expand(rows, heads, -1)


def kept(scores: Tensor, budget: int, *, sinks: int = 0, recent: int = 0, starts: Tensor | None = None) -> Tensor:
    """Which entries stay: int64 (rows, heads, min(budget, tokens)) ascending indices, the best by `scores` (rows, heads, tokens).

    The first `sinks` and the last `recent` tokens stay whatever they score; among equals the earlier stays. `starts`, int64 (rows,),
    says where each row's text begins: padding before it goes first, and a row with less text than the budget keeps its padding on
    the left. The same budget holds for every row and head.
    Raises ValueError for a budget below 1 or below sinks + recent, for scores that are not finite and starts outside the row, TypeError
    for what is no whole number.

    >>> kept(torch.tensor([[[0.1, 0.9, 0.2, 0.8, 0.3]]]), 3, sinks=1, recent=1).tolist()
    [[[0, 1, 4]]]
    """
    checks.tensor("scores", scores, ndim=3, finite=True, empty=True)
    sinks, recent = checks.whole("sinks", sinks, low=0), checks.whole("recent", recent, low=0)
    budget = checks.whole("budget", budget, low=max(1, sinks + recent))
    rows, _, tokens = scores.shape
    places = torch.arange(tokens, device=scores.device)
    first = torch.zeros(rows, dtype=torch.int64, device=scores.device)
    if starts is not None:
        first = checks.tensor("starts", starts, shape=(rows,), dtype="integer", empty=True).to(scores.device)
        if not bool(((first >= 0) & (first <= tokens)).all()):
            raise ValueError(f"starts must lie in [0, {tokens}], got {checks.shown(first.tolist())}")
    begin = first[:, None, None]
    sure = (places < begin + sinks) | (places >= tokens - recent)
    ranked = scores.masked_fill(sure, math.inf).masked_fill(places < begin, -math.inf)
    best = ranked.sort(dim=-1, descending=True, stable=True).indices[..., :budget]
    return best.sort(-1).values


# ----------------------------------------------------------------------------------------------------------- application


def evicted(
    cache: Cache, keep: Tensor | Sequence[Tensor], positions: Sequence[Tensor] | Tensor | None = None
) -> Evicted:
    """The cache of the entries `keep`, as `kept` gives them: one tensor for all layers, or one for each (budgets may differ).

    `positions` are where the entries of `cache` stand, int64 (tokens,), (rows, tokens) or (rows, heads, tokens), for all layers or one
    for each (`Evicted.positions`, to evict once more); None counts from 0. Works on all layers of `slices` that keep every token.
    Raises ValueError for shapes and indices that do not fit, TypeError for sliding layers and as `slices.tensors_of`.

    >>> from assay.methods.core.generation.slices import cache_of
    >>> cache = cache_of([(torch.randn(1, 2, 6, 8), torch.randn(1, 2, 6, 8))])
    >>> small = evicted(cache, kept(recency((1, 2, 6)), 4, sinks=2))
    >>> small.cache.get_seq_length(), small.positions[0][0, 0].tolist()
    (4, [0, 1, 4, 5])
    """
    layers = layers_of(cache)
    chosen = [keep] * len(layers) if isinstance(keep, Tensor) else list(keep)
    if len(chosen) != len(layers):
        raise ValueError(f"keep must be one tensor or one for each of {len(layers)} layers, got {len(chosen)}")
    alike = positions is None or isinstance(positions, Tensor)
    known: list[Any] = [positions] * len(layers) if alike else list(positions or ())
    if len(known) != len(layers):
        raise ValueError(f"positions must be one tensor or one for each of {len(layers)} layers, got {len(known)}")
    smaller, places = [], []
    for index, (layer, one, stood) in enumerate(zip(layers, chosen, known, strict=True)):
        tensors = tensors_of(layer, index)
        if type(layer) is DynamicSlidingWindowLayer:
            raise TypeError(f"cache must keep every token, layer {index} has a window of {layer.sliding_window}")
        if not tensors:
            smaller.append(copy.copy(layer))
            places.append(torch.empty(0, 0, 0, dtype=torch.int64))
            continue
        rows, heads, tokens, _ = next(iter(tensors.values())).shape
        checks.tensor("keep", one, shape=(rows, heads, "kept"), dtype=torch.int64, empty=True)
        if one.numel() and not 0 <= int(one.min()) <= int(one.max()) < tokens:
            raise ValueError(
                f"keep must lie within the {tokens} tokens of layer {index}, got {int(one.min())} to {int(one.max())}"
            )
        left = {
            name: x.gather(2, one.to(x.device)[..., None].expand(-1, -1, -1, x.shape[3])) for name, x in tensors.items()
        }
        smaller.append(rebuilt(layer, left, one.shape[2]))
        places.append(_places(stood, (rows, heads, tokens)).to(one.device).gather(2, one))
    return Evicted(with_layers(cache, smaller), places)


def _places(positions: Tensor | None, shape: tuple[int, int, int]) -> Tensor:
    """Positions as int64 (rows, heads, tokens)."""
    rows, heads, tokens = shape
    if positions is None:
        return torch.arange(tokens).expand(shape)
    checks.tensor("positions", positions, dtype=torch.int64, empty=True)
    if tuple(positions.shape) not in ((tokens,), (rows, tokens), shape):
        raise ValueError(
            f"positions must have shape ({tokens},), ({rows}, {tokens}) or {shape}, got {tuple(positions.shape)}"
        )
    return (positions[:, None] if positions.ndim == 2 else positions).expand(shape)
