"""Several streams through the same layers: keys and values that begin with a learned prefix, and attention that sees all of it.

Rows are stream-major: row i * batch + j is stream i of sequence j. The prefix of a stream stands before the keys and values of every
layer. It is not rotated, takes no position, is visible to every token, and is not counted in the length of a cache.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from assay.methods.core.generation.crop import croppable
from assay.methods.core.models.decoder import Parts

Prefix = tuple[Tensor, Tensor]  # keys and values of one layer, (streams, key-value heads, prefix tokens, head dim)
ATTENTION = "assay_parscale_sdpa"


def repeated(tensor: Tensor, streams: int) -> Tensor:
    """(batch, ...) -> (streams * batch, ...), stream-major."""
    return tensor.repeat(streams, *[1] * (tensor.ndim - 1))


def _for_rows(prefix: Prefix, like: Tensor) -> Prefix:
    """The prefix for each row of `like`, whose rows are streams * batch, in its dtype."""
    rows = len(like) // len(prefix[0])
    keys, values = (tensor.to(like).repeat_interleave(rows, 0) for tensor in prefix)
    return keys, values


class PrefixLayer(DynamicLayer):
    """A growing layer whose keys and values begin with the prefix."""

    def __init__(self, prefix: Prefix) -> None:
        super().__init__()
        self.prefix = prefix

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        super().lazy_initialization(key_states, value_states)
        self.keys, self.values = _for_rows(self.prefix, key_states)

    def get_seq_length(self) -> int:
        return 0 if self.keys is None else self.keys.shape[-2] - self.prefix[0].shape[-2]


class SlidingPrefixLayer(DynamicSlidingWindowLayer):
    """A layer that keeps the last tokens of a window; the prefix does not leave it."""

    def __init__(self, sliding_window: int, prefix: Prefix) -> None:
        super().__init__(sliding_window=sliding_window)
        self.prefix = prefix

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        keys, values = super().update(key_states, value_states, *args, **kwargs)
        before = _for_rows(self.prefix, keys)
        return torch.cat([before[0], keys], -2), torch.cat([before[1], values], -2)


class StreamCache(Cache):
    """The cache of several streams: lengths and orders are those of the sequences, rows those of all their streams.

    `reorder_cache` and `batch_select_indices` take indices of sequences and move all streams of each; `batch_repeat_interleave` is
    transformers'. Made by `ParScaleForCausalLM.new_cache`.
    """

    def __init__(self, prefixes: Sequence[Prefix], kinds: Sequence[str], sliding_window: int | None) -> None:
        layers: list[Any] = [
            SlidingPrefixLayer(sliding_window, prefix) if kind == "sliding_attention" and sliding_window else PrefixLayer(prefix)
            for prefix, kind in zip(prefixes, kinds, strict=True)
        ]  # fmt: skip
        super().__init__(layers=layers)
        self.streams = len(prefixes[0][0])

    @property
    def batch_size(self) -> int:
        """How many sequences it holds; -1 before the first token."""
        keys = cast(Any, self.layers[0]).keys
        return -1 if keys is None else len(keys) // self.streams

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(cast(Any, self._rows(beam_idx)))

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(self._rows(indices))

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last tokens, their number below zero as transformers gives it, in all layers.

        Raises ValueError, before any layer changes, for more tokens than there are (prefixes stay), and where a window has left behind
        what would come into it again; transformers' `activate_past_recording` keeps that.
        """
        super().crop(croppable(self, tokens_to_remove, self.get_seq_length()))

    def _rows(self, indices: Tensor) -> Tensor:
        """The rows of all streams of the sequences `indices`: numbers, or a bool for each."""
        batch = max(self.batch_size, 0)
        rows = torch.arange(batch, device=indices.device)[indices]
        return torch.cat([rows + stream * batch for stream in range(self.streams)])

    def bytes(self) -> int:
        """Bytes of all keys and values held now, those of the prefixes included."""
        held = 0
        for layer in cast(list[Any], self.layers):
            tensors = [layer.keys, layer.values, *(layer.prefix if isinstance(layer, SlidingPrefixLayer) else ())]
            held += sum(tensor.nbytes for tensor in tensors if tensor is not None)
        return held


class Reader:
    """In the place of a cache where none is kept: prefixes come first, and nothing is stored, so that a layer may run twice."""

    def __init__(self, prefixes: Sequence[Prefix]) -> None:
        self.prefixes = prefixes

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        before = _for_rows(self.prefixes[layer_idx], keys)
        return torch.cat([before[0], keys], -2), torch.cat([before[1], values], -2)


# ----------------------------------------------------------------------------------------------------------------- attention


def behind_prefix(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """SDPA as an attention function of transformers, over keys that begin with a prefix; without a mask it is causal and fused.

    query (rows, heads, tokens, d); key and value (rows, key-value heads, n + tokens, d). The causal kernel lines queries and keys up at
    their first, so n queries of zeros stand in front and their outputs are dropped: token t sees the prefix and tokens 0..t. One token,
    and whatever has a mask, needs none. Returns (rows, tokens, heads, d).
    """
    tokens, extra = query.shape[2], key.shape[2] - query.shape[2]
    if attention_mask is None and tokens > 1:
        query = F.pad(query, (0, 0, extra, 0))
    out = sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)[0]
    return out[:, out.shape[1] - tokens :], None


ALL_ATTENTION_FUNCTIONS.register(ATTENTION, behind_prefix)


def why_no_attention(implementation: str | None) -> str:
    """Why prefixes cannot stand before an attention function's keys; empty if they can."""
    if implementation in ("sdpa", "eager", ATTENTION):
        return ""
    return f"attn_implementation must be 'sdpa' or 'eager' where streams have prefixes, got {implementation!r}"


def visible_prefix(mask: Tensor | None, tokens: int, prefix: int, like: Tensor, *, explicit: bool) -> Tensor | None:
    """A mask (rows or 1, 1, queries, keys), bool or additive, with `prefix` visible keys in front.

    None stays None where attention is causal by itself; with `explicit` it becomes the causal mask it stands for.
    """
    if mask is None:
        if not explicit or tokens == 1:
            return None
        mask = torch.ones(tokens, tokens, dtype=torch.bool, device=like.device).tril()[None, None]
    seen = True if mask.dtype == torch.bool else 0.0
    return torch.cat([mask.new_full((*mask.shape[:-1], prefix), seen), mask], -1)


@contextlib.contextmanager
def attending(parts: Parts, *, fused: bool, replayed: bool) -> Iterator[None]:
    """While layers run: `fused` calls `behind_prefix` in SDPA's place; `replayed` lets gradient checkpointing keep the reader.

    Both are put back afterwards. A configuration is shared with whoever else runs the base: one thread at a time.
    """
    configs: dict[int, Any] = {}
    if fused:
        configs = {id(layer.self_attn.config): layer.self_attn.config for layer in parts.layers}
    before = [(config, config._attn_implementation) for config in configs.values()]
    layers = parts.layers if replayed else []
    try:
        for config, _ in before:
            config._attn_implementation = ATTENTION
        for layer in layers:
            layer._can_checkpoint_with_cache = True  # a reader stores nothing: running the layer again changes nothing
        yield
    finally:
        for config, name in before:
            config._attn_implementation = name
        for layer in layers:
            del layer._can_checkpoint_with_cache
