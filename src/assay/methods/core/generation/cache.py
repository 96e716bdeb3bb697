"""Keys and values in transformers' own Cache: read them, cut prompts out of them, stack prompts into a left-padded batch.

A layer's keys and values have shape (rows, key-value heads, tokens, head dim). A `Span` says where a prompt is in them.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from assay import checks


class Span(NamedTuple):
    """The tokens start..stop of a row."""

    row: int
    start: int
    stop: int

    @property
    def length(self) -> int:
        return self.stop - self.start


@dataclass
class Prefilled:
    """What a prefill produces, in the order of the prompts and in the form from which `generate` continues.

    `cache` is left-padded: (B, heads, S, head dim) per layer. If `logits` (B, vocab), those of each prompt's last token, are given,
    `input_ids` and `attention_mask` are (B, S). Without them, the last token of every prompt has not been run yet: `input_ids`
    and `attention_mask` are (B, S + 1), and the cache lacks the last column. `lengths` are the prompts' lengths in tokens.
    """

    cache: Cache
    input_ids: Tensor
    attention_mask: Tensor
    lengths: list[int]
    logits: Tensor | None = None

    def generate_inputs(self, next_tokens: Tensor | None = None) -> dict[str, Any]:
        """Keyword arguments for `model.generate`, which then runs the last column of `input_ids` and continues from there.

        With `logits`, the caller chooses the first new token: `next_tokens` (B,) int64 (greedy: `logits.argmax(-1)`). It becomes the
        last column, so `generate` returns it before its own tokens. Without `logits`, `next_tokens` must be None.
        Raises ValueError when the two do not go together.
        """
        if (next_tokens is None) != (self.logits is None):
            raise ValueError(
                "next_tokens must be given exactly when logits are there: "
                f"got next_tokens={'None' if next_tokens is None else 'a tensor'}, logits={'None' if self.logits is None else 'a tensor'}"
            )
        ids, mask = self.input_ids, self.attention_mask
        if next_tokens is not None:
            ids = torch.cat([ids, next_tokens[:, None].to(ids)], dim=1)
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
        return {"input_ids": ids, "attention_mask": mask, "cache": self.cache}


def left_pad(prompts: Sequence[Sequence[int]], pad_token_id: int, device: Any = None) -> tuple[Tensor, Tensor]:
    """Prompts of any lengths as (B, S) int64 token ids, padded on the left, and the (B, S) int64 mask that is 1 on tokens.

    Raises ValueError for no prompts, TypeError for tokens that are no whole numbers.

    >>> ids, mask = left_pad([[5, 6, 7], [8]], pad_token_id=0)
    >>> ids.tolist(), mask.tolist()
    ([[5, 6, 7], [0, 0, 8]], [[1, 1, 1], [0, 0, 1]])
    """
    if not len(prompts):
        raise ValueError("prompts must hold at least one prompt, got none")
    pad_token_id = checks.whole("pad_token_id", pad_token_id)
    try:
        prompts = [[operator.index(token) for token in prompt] for prompt in prompts]
    except TypeError as error:
        raise TypeError(f"prompts must be lists of token ids, which are whole numbers: {error}") from None
    width = max(len(prompt) for prompt in prompts)
    rows = [[pad_token_id] * (width - len(prompt)) + list(prompt) for prompt in prompts]
    ids = torch.tensor(rows, dtype=torch.int64, device=device)
    return ids, left_padded_mask([len(prompt) for prompt in prompts], device)


def left_padded_mask(lengths: Sequence[int], device: Any = None) -> Tensor:
    """(B, max(lengths)) int64 mask: row i is 1 in its last lengths[i] places. Raises ValueError for no lengths or one below 0."""
    lengths = [checks.whole("lengths", length, low=0) for length in lengths]
    if not lengths:
        raise ValueError("lengths must hold at least one length, got none")
    sizes = torch.tensor(lengths, device=device)
    return (torch.arange(max(lengths) - 1, -1, -1, device=device) < sizes[:, None]).long()


def position_ids(attention_mask: Tensor) -> Tensor:
    """(B, S) positions for a left-padded batch: each prompt counts from 0 at its first token (0 on padding).

    Raises ValueError for another shape, and for anything but 0 and 1.
    """
    checks.tensor("attention_mask", attention_mask, ndim=2, dtype="any", empty=True)
    if ((attention_mask != 0) & (attention_mask != 1)).any():
        raise ValueError("attention_mask must hold 0 and 1 only")
    return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)


def keys_and_values(cache: Cache) -> list[tuple[Tensor, Tensor]]:
    """The (keys, values) of every layer. Raises TypeError for a layer that keeps something else (a state-space layer, say)."""
    found = []
    for index, layer in enumerate(cache.layers):
        keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
        if not (isinstance(keys, Tensor) and isinstance(values, Tensor) and keys.ndim == values.ndim == 4):
            raise TypeError(f"layer {index} of the cache ({type(layer).__name__}) holds no keys and values")
        found.append((keys, values))
    return found


def cut(cache: Cache, span: Span) -> list[tuple[Tensor, Tensor]]:
    """One prompt's keys and values, each (1, heads, span.length, head dim): views, no copy. Raises as `unpack`."""
    return [
        (
            keys[span.row : span.row + 1, :, span.start : span.stop],
            values[span.row : span.row + 1, :, span.start : span.stop],
        )
        for keys, values in _holding(cache, [span])
    ]


def _holding(cache: Cache, spans: Sequence[Span]) -> list[tuple[Tensor, Tensor]]:
    """The keys and values of every layer, after checking that the spans lie in each (a sliding layer may hold less than others)."""
    layers = keys_and_values(cache)
    for index, (keys, _) in enumerate(layers):
        rows, _, tokens, _ = keys.shape
        for span in spans:
            if not (0 <= span.row < rows and 0 <= span.start <= span.stop <= tokens):
                raise ValueError(
                    f"spans must lie within {rows} rows of {tokens} tokens, which layer {index} holds, got {tuple(span)}"
                )
    return layers


def unpack(cache: Cache, spans: Sequence[Span], *, config: Any = None) -> DynamicCache:
    """Stack the prompts at `spans` into a new left-padded cache (len(spans), heads, max length, head dim), in that order.

    Padding is zero. With `config` (the model's), sliding-window layers get their own short cache; without it all layers keep
    everything. `cache` is consumed: its layers are emptied one by one, so that both are never in memory together.
    Raises ValueError for no spans or one that is not in the cache, TypeError as `keys_and_values`.
    """
    if not spans:
        raise ValueError("spans must hold at least one span, got none")
    layers = _holding(cache, spans)
    width = max(span.length for span in spans)
    unpacked = DynamicCache(config=config)
    targets: list[Any] = list(unpacked.layers)
    for index in range(len(layers)):
        keys, values = (_stack(packed, spans, width) for packed in layers.pop(0))
        cache.layers[index].reset()
        if index < len(targets) and type(targets[index]) is DynamicLayer:
            targets[index].lazy_initialization(keys, values)
            targets[index].keys, targets[index].values = keys, values  # `update` would copy them
        else:
            unpacked.update(keys, values, index)
    return unpacked


def _stack(packed: Tensor, spans: Sequence[Span], width: int) -> Tensor:
    """(rows, heads, tokens, d) -> (len(spans), heads, width, d), each span at the right end, zeros before it."""
    stacked = packed.new_zeros(len(spans), packed.shape[1], width, packed.shape[3])
    for target, span in zip(stacked, spans, strict=True):
        target[:, width - span.length :] = packed[span.row, :, span.start : span.stop]
    return stacked
