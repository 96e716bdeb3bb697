"""Caches taken apart and put together: some of their tokens, some of their rows, one behind the other, side by side.

Every function takes transformers' Cache and returns a new one whose layers are of the same kinds; what it was given stays as it is,
and tensors are shared where nothing had to be copied. A layer's tensors are (rows, key-value heads, tokens, head dim), and layers
may differ in their tokens, heads and head dims. A sliding layer holds the last window - 1 tokens it has seen: what has left it
cannot come back, and what would need it is refused.

Understood are transformers' DynamicLayer, DynamicSlidingWindowLayer and DummyLayer (a layer that shares another's keys), and
layers of ours that name what they hold in `TENSORS` (`kv8.Int8Layer`). Recurrent, static and other layers are refused by name.

When NOT to use it: step by step in a decoding loop, where transformers' own `crop`, `reorder_cache` and `batch_select_indices`
change a cache in place; and to share prompts among many sequences without a copy, which is what paged memory is for.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from transformers.cache_utils import (
    Cache,
    DummyLayer,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    EncoderDecoderCache,
    LinearAttentionCacheLayerMixin,
)

from assay import checks

PLAIN = (DynamicLayer, DynamicSlidingWindowLayer)
AnyCache = TypeVar("AnyCache", bound=Cache)


class Stacked(NamedTuple):
    """Prompts side by side, left-padded with zeros: `cache`, and how many tokens each has seen, `lengths[layer][row]`.

    Where all layers agree, `cache.left_padded_mask(lengths[0])` is the attention mask.
    """

    cache: Cache
    lengths: list[list[int]]


# --------------------------------------------------------------------------------------------------------------- layers


def layers_of(cache: Cache) -> list[Any]:
    """The layers of a cache. Raises TypeError for what is no cache, and for an EncoderDecoderCache, which is two of them."""
    if isinstance(cache, EncoderDecoderCache):
        raise TypeError("cache must be one cache, got an EncoderDecoderCache: take its self_attention_cache")
    if not isinstance(cache, Cache):
        raise TypeError(f"cache must be a Cache of transformers, got {type(cache).__name__} {checks.shown(cache)}")
    return list(cache.layers)


def tensors_of(layer: Any, index: int = 0) -> dict[str, Tensor]:
    """What layer number `index` holds, by attribute: tensors (rows, heads, tokens, ...); nothing where there is nothing yet.

    Raises TypeError, naming the layer, for one that keeps something else than entries of single tokens.
    """
    kind = type(layer)
    names = () if kind is DummyLayer else ("keys", "values") if kind in PLAIN else getattr(kind, "TENSORS", None)
    if names is None:
        recurrent = isinstance(layer, LinearAttentionCacheLayerMixin)
        what = "keeps a recurrent state" if recurrent else "does not keep keys and values as they came"
        raise TypeError(
            f"cache must hold keys and values token by token, layer {index} is a {kind.__name__}, which {what}"
        )
    found = {name: getattr(layer, name) for name in names if layer.is_initialized}
    return found if all(isinstance(x, Tensor) and x.ndim == 4 for x in found.values()) else {}


def rebuilt(layer: Any, tensors: Mapping[str, Tensor], seen: int) -> Any:
    """A layer like `layer` that holds the last of `tensors` (as many as it keeps) and has seen `seen` tokens."""
    new = copy.copy(layer)
    sliding = type(layer) is DynamicSlidingWindowLayer
    for name, x in tensors.items():
        keep = min(x.shape[2], layer.sliding_window - 1) if sliding else x.shape[2]
        setattr(new, name, x[:, :, x.shape[2] - keep :])
    if sliding:
        new.cumulative_length, new.record_past = seen, False
    return new


def with_layers(cache: AnyCache, layers: Sequence[Any]) -> AnyCache:
    """A cache of the same kind with other layers."""
    new = copy.copy(cache)
    new.layers = list(layers)
    return new


def cache_of(layers: Sequence[tuple[Tensor, Tensor]], *, config: Any = None) -> DynamicCache:
    """A cache that holds these (keys, values), one pair a layer, each (rows, heads, tokens, head dim), without a copy.

    Layers may have tokens, heads and head dims of their own; rows are the same. With `config` (the model's), layers with a window
    become sliding ones and hold the end. Raises ValueError for shapes that do not go together or another number of layers than
    the config has, TypeError for what is no floating-point tensor and for layers of the config that hold something else.

    >>> pair = torch.zeros(1, 2, 5, 8), torch.zeros(1, 2, 5, 8)
    >>> cache_of([pair, (torch.zeros(1, 4, 3, 6), torch.zeros(1, 4, 3, 6))]).get_seq_length(1)
    3
    """
    if not layers:
        raise ValueError("layers must hold at least one pair of keys and values, got none")
    cache = DynamicCache(config=config)
    own: list[Any] = list(cache.layers) if config is not None else [DynamicLayer() for _ in layers]
    if len(own) != len(layers):
        raise ValueError(f"layers must be as many as the config has, {len(own)}, got {len(layers)}")
    rows = None
    for index, (keys, values) in enumerate(layers):
        checks.tensor("keys", keys, ndim=4, empty=True)
        rows = keys.shape[0] if rows is None else rows
        checks.tensor("keys", keys, shape=(rows, "heads", "tokens", "dim"), empty=True)
        checks.tensor("values", values, shape=(*keys.shape[:3], "dim"), dtype=keys.dtype, empty=True)
        if type(own[index]) not in PLAIN:
            raise TypeError(f"config must have attention layers only, layer {index} is a {type(own[index]).__name__}")
        own[index].lazy_initialization(keys, values)
        own[index] = rebuilt(own[index], {"keys": keys, "values": values}, keys.shape[2])
    return with_layers(cache, own)


def held_bytes(cache: Cache) -> int:
    """Bytes of memory that a cache keeps alive: whole storages, each once, also where a layer looks at a part of one only.

    Raises TypeError as `tensors_of`.

    >>> held_bytes(cache_of([(torch.zeros(1, 2, 5, 8), torch.zeros(1, 2, 5, 8))]))
    640
    """
    tensors = [x for index, layer in enumerate(layers_of(cache)) for x in tensors_of(layer, index).values()]
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}
    return sum(storages.values())


# ------------------------------------------------------------------------------------------------------- tokens and rows


def sliced(cache: AnyCache, start: int = 0, stop: int | None = None) -> AnyCache:
    """The tokens start..stop of every row; `stop` None is the end, of each layer its own. Views: nothing is copied.

    Keys keep their positions: run what follows at the positions that come after them, or move them (`rotary.moved`).
    `sliced(cache, 0, n)` goes back to the first n tokens. Raises ValueError for tokens outside a layer, and for those that a sliding
    layer would need and has let go; TypeError as `tensors_of`.
    """
    start = checks.whole("start", start, low=0)
    stop = None if stop is None else checks.whole("stop", stop, low=start)
    layers = []
    for index, layer in enumerate(layers_of(cache)):
        tensors = tensors_of(layer, index)
        if not tensors:
            layers.append(copy.copy(layer))
            continue
        seen = layer.get_seq_length()
        held = next(iter(tensors.values())).shape[2]
        end = seen if stop is None else stop
        if not start <= end <= seen:
            raise ValueError(
                f"start and stop must lie within the {seen} tokens of layer {index}, got {start} and {stop}"
            )
        first = max(start, end - layer.sliding_window + 1) if type(layer) is DynamicSlidingWindowLayer else start
        if first < seen - held:
            raise ValueError(
                f"start and stop must leave what layer {index} still holds, the tokens from {seen - held} on: "
                f"{start} and {end} need those from {first} on"
            )
        lead = seen - held
        parts = {name: x[:, :, first - lead : end - lead] for name, x in tensors.items()}
        layers.append(rebuilt(layer, parts, end - start))
    return with_layers(cache, layers)


def selected(cache: AnyCache, rows: Tensor | Sequence[int]) -> AnyCache:
    """The rows asked for, in that order, any of them any number of times: beams, particles, the streams of one prompt.

    `torch.arange(n).repeat_interleave(k)` repeats each of n rows k times. Raises ValueError for rows that are not there or none,
    TypeError for what is no whole number.

    >>> cache = cache_of([(torch.arange(2.0).view(2, 1, 1, 1), torch.zeros(2, 1, 1, 1))])
    >>> selected(cache, [1, 1, 0]).layers[0].keys.flatten().tolist()
    [1.0, 1.0, 0.0]
    """
    chosen = _rows(rows)
    layers = []
    for index, layer in enumerate(layers_of(cache)):
        tensors = tensors_of(layer, index)
        for x in tensors.values():
            if not 0 <= int(chosen.min()) <= int(chosen.max()) < x.shape[0]:
                raise ValueError(f"rows must lie in [0, {x.shape[0]}), got {checks.shown(chosen.tolist())}")
        picked = {name: x.index_select(0, chosen.to(x.device)) for name, x in tensors.items()}
        layers.append(rebuilt(layer, picked, layer.get_seq_length()) if tensors else copy.copy(layer))
    return with_layers(cache, layers)


def _rows(rows: Tensor | Sequence[int]) -> Tensor:
    if isinstance(rows, Tensor):
        return checks.tensor("rows", rows, ndim=1, dtype="integer").long()
    listed = [checks.whole("rows", row) for row in rows]
    if not listed:
        raise ValueError("rows must hold at least one row, got none")
    return torch.tensor(listed)


def concatenated(caches: Sequence[AnyCache]) -> AnyCache:
    """The tokens of several caches behind each other, in each layer. A cache of one row goes with every row of the others.

    Keys keep their positions, so a cache that was run by itself is first moved to its new place (`rotary.moved`), and padding stays
    where it is, which the attention mask must say. A sliding layer keeps the end. Raises ValueError for caches whose layers, heads,
    head dims, windows or rows do not fit, TypeError for other dtypes or kinds of layers and as `tensors_of`.
    """
    whole, columns = _columns(caches)
    layers = []
    for index, column in enumerate(columns):
        parts = [(layer, tensors) for layer in column if (tensors := tensors_of(layer, index))]
        if not parts:
            layers.append(copy.copy(column[0]))
            continue
        rows = max(x.shape[0] for _, tensors in parts for x in tensors.values())
        joined = {}
        for name in parts[0][1]:
            pieces = [tensors[name] for _, tensors in parts]
            if wrong := [x.shape[0] for x in pieces if x.shape[0] not in (1, rows)]:
                raise ValueError(f"caches must have {rows} rows or one, got {wrong[0]}")
            _fit(pieces, index)
            joined[name] = torch.cat([x.expand(rows, -1, -1, -1) for x in pieces], 2)
        layers.append(rebuilt(parts[0][0], joined, sum(layer.get_seq_length() for layer, _ in parts)))
    return with_layers(whole, layers)


def stacked(caches: Sequence[AnyCache]) -> Stacked:
    """Prompts of any lengths, a cache of one row each, as the rows of one left-padded cache: they continue together.

    `split` takes them apart again. Lengths may differ from layer to layer. Raises ValueError for caches of several rows or whose
    layers do not fit, TypeError as `concatenated`.
    """
    whole, columns = _columns(caches)
    layers, lengths = [], []
    for index, column in enumerate(columns):
        parts = [tensors_of(layer, index) for layer in column]
        seen = [layer.get_seq_length() if part else 0 for layer, part in zip(column, parts, strict=True)]
        lengths.append(seen)
        filled = [(layer, part) for layer, part in zip(column, parts, strict=True) if part]
        if not filled:
            layers.append(copy.copy(column[0]))
            continue
        together = {}
        for name, like in filled[0][1].items():
            pieces = [part[name] for _, part in filled]
            if wrong := [len(x) for x in pieces if len(x) != 1]:
                raise ValueError(f"caches must have one row each, got one of {wrong[0]}: split it first")
            _fit(pieces, index)
            width = max(x.shape[2] for x in pieces)
            target = like.new_zeros(len(parts), like.shape[1], width, like.shape[3])
            for row, part in enumerate(parts):
                if part:
                    target[row, :, width - part[name].shape[2] :] = part[name][0]
            together[name] = target
        layers.append(rebuilt(filled[0][0], together, max(seen)))
    return Stacked(with_layers(whole, layers), lengths)


def split(cache: AnyCache, lengths: Sequence[int] | Sequence[Sequence[int]] | Tensor) -> list[AnyCache]:
    """The rows of a left-padded cache as caches of their own, without their padding: what `stacked` joins. Views, no copies.

    `lengths` are how many tokens each row has seen: one list for all layers, as `Prefilled.lengths` and sums over attention masks
    are, or `Stacked.lengths`, one list a layer. Raises ValueError for lengths that do not fit the cache, TypeError as `tensors_of`.
    """
    layers = layers_of(cache)
    listed: list[Any] = lengths.tolist() if isinstance(lengths, Tensor) else list(lengths)
    each: list[Any] = listed if listed and isinstance(listed[0], Sequence) else [listed] * len(layers)
    if len(each) != len(layers):
        raise ValueError(f"lengths must be one list, or one for each of {len(layers)} layers, got {len(each)}")
    counts = [[checks.whole("lengths", length, low=0) for length in one] for one in each]
    if len({len(one) for one in counts}) > 1:
        raise ValueError(f"lengths must have as many rows in each layer, got {[len(one) for one in counts]}")
    parts: list[list[Any]] = [[] for _ in (counts[0] if counts else ())]
    for index, (layer, one) in enumerate(zip(layers, counts, strict=True)):
        tensors = tensors_of(layer, index)
        for name, x in tensors.items():
            if x.shape[0] != len(one) or max(one) > layer.get_seq_length():
                raise ValueError(
                    f"lengths must be {x.shape[0]} of at most {layer.get_seq_length()}, as layer {index} has in {name}, "
                    f"got {checks.shown(one)}"
                )
        for row, length in enumerate(one):
            own = {name: x[row : row + 1, :, max(0, x.shape[2] - length) :] for name, x in tensors.items()}
            parts[row].append(rebuilt(layer, own, length) if own else copy.copy(layer))
    return [with_layers(cache, part) for part in parts]


def _columns(caches: Sequence[AnyCache]) -> tuple[AnyCache, list[tuple[Any, ...]]]:
    """The first cache, and the layers of all caches that lie at the same depth, after checking that they are of one kind."""
    if isinstance(caches, Cache):
        raise TypeError(f"caches must be a list of caches, got one {type(caches).__name__}")
    if not len(caches):
        raise ValueError("caches must hold at least one cache, got none")
    depths = [len(layers_of(cache)) for cache in caches]
    if len(set(depths)) > 1:
        raise ValueError(f"caches must have as many layers each, got {depths}")
    columns = list(zip(*(layers_of(cache) for cache in caches), strict=True))
    for index, column in enumerate(columns):
        if len({(type(layer), getattr(layer, "sliding_window", None)) for layer in column}) > 1:
            kinds = [f"{type(layer).__name__} {getattr(layer, 'sliding_window', '')}".rstrip() for layer in column]
            wrong = ValueError if len({type(layer) for layer in column}) == 1 else TypeError
            raise wrong(f"caches must have layers of one kind, layer {index} is {' and '.join(kinds)}")
    return caches[0], columns


def _fit(pieces: Sequence[Tensor], index: int) -> None:
    """Raise unless the pieces of a layer differ in rows and tokens only."""
    first = pieces[0]
    for x in pieces[1:]:
        checks.together(first_cache=first, other_cache=x)
        if (x.shape[1], x.shape[3]) != (first.shape[1], first.shape[3]):
            raise ValueError(
                f"caches must have the same heads and head dims, layer {index} has {tuple(first.shape)} and {tuple(x.shape)}"
            )
