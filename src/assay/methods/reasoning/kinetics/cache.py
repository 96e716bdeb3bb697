"""A cache that is written in place and knows the sum of the keys of every block, so that choosing blocks reads no keys.

transformers' growing cache copies itself at every token, which reads and writes all that a sparse step would leave
alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache, DynamicLayer

from assay import checks
from assay.methods.reasoning.kinetics.selection import block_sums


class BlockLayer(CacheLayerMixin):
    """One layer of a `BlockCache`: keys and values (batch, key heads, tokens, dim) as views of memory that has room for
    more."""

    is_sliding = False
    is_croppable = True
    supports_early_init = False
    ROOM = ("keys_room", "values_room", "sums_room")
    keys_room: Tensor
    values_room: Tensor
    sums_room: Tensor

    def __init__(self, block: int = 16) -> None:
        super().__init__()
        self.block = block
        self.length = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys_room, self.values_room = key_states[:, :, :0], value_states[:, :, :0]
        self.sums_room = key_states[:, :, :0].float()
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Take in new tokens; returns all keys and values. The keys carry this layer as `blocks`, by which attention
        finds the sums."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start, stop = self.length, self.length + key_states.shape[2]
        self._make_room(stop)
        self.keys_room[:, :, start:stop] = key_states
        self.values_room[:, :, start:stop] = value_states
        self._hold(stop)
        if self.block > 1:
            place = start // self.block
            if stop == start + 1 and start % self.block:
                self.sums_room[:, :, place] += key_states[:, :, 0].float()
            else:
                self._sum_up(place)
        keys: Any = self.keys_room[:, :, :stop]
        keys.blocks = self
        return keys, self.values_room[:, :, :stop]

    @property
    def sums(self) -> Tensor:
        """The sum of the keys of each block, (batch, key heads, blocks, dim) in float32; the keys themselves for blocks
        of one token."""
        keys: Any = self.keys
        return keys if self.block == 1 else self.sums_room[:, :, : -(-self.length // self.block)]

    @property
    def room(self) -> tuple[Tensor, Tensor]:
        """The memory of keys and of values: whole blocks, contiguous."""
        return self.keys_room, self.values_room

    def _make_room(self, tokens: int) -> None:
        room = self.keys_room.shape[2]
        if tokens <= room:
            return
        if self.length:  # in larger steps, as a list grows
            tokens += max(tokens // 4, 64)
        tokens = -(-tokens // self.block) * self.block
        held = -(-self.length // self.block)
        for name, length, count in (
            ("keys_room", tokens, self.length),
            ("values_room", tokens, self.length),
            ("sums_room", tokens // self.block if self.block > 1 else 0, held if self.block > 1 else 0),
        ):
            old = getattr(self, name)
            grown = old.new_empty(*old.shape[:2], length, old.shape[3])
            grown[:, :, :count] = old[:, :, :count]
            setattr(self, name, grown)

    def _hold(self, count: int) -> None:
        self.length = count
        self.keys, self.values = self.keys_room[:, :, :count], self.values_room[:, :, :count]

    def _sum_up(self, place: int) -> None:
        """Sum the blocks from `place` on anew."""
        sums = block_sums(self.keys_room[:, :, place * self.block : self.length], self.block)
        self.sums_room[:, :, place : place + sums.shape[2]] = sums

    def get_seq_length(self) -> int:
        return self.length

    def get_max_length(self) -> int:
        return -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length + query_length, 0

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove > 0:
            raise ValueError(
                f"tokens_to_remove must be at most 0: minus the tokens to take off, got {tokens_to_remove}"
            )
        if not self.is_initialized:
            return
        self._hold(max(0, self.length + tokens_to_remove))
        if self.block > 1 and self.length % self.block:
            self._sum_up(self.length // self.block)

    def reset(self) -> None:
        self.__init__(self.block)  # type: ignore[misc]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        self._each(lambda x: x[indices.to(x.device)])

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._each(lambda x: x.repeat_interleave(repeats, 0))

    def offload(self) -> None:
        self._each(lambda x: x.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        self._each(lambda x: x.to(self.device, non_blocking=True))

    def _each(self, function: Callable[[Tensor], Tensor]) -> None:
        if self.is_initialized:
            for name in self.ROOM:
                setattr(self, name, function(getattr(self, name)).contiguous())
            self._hold(self.length)


class BlockCache(Cache):
    """A cache whose full-attention layers are kept in place, with the sums of their blocks: `generate(...,
    cache=BlockCache(config))`.

    `block` is that of the attention's settings; with another one, and with any other cache, attention reads all keys to
    choose. Left padding, beams and going back (assisted decoding) work. Layers of other kinds (sliding windows) are
    what they are in a `DynamicCache`. It takes a float32 vector a block more than the keys and values, and room for up
    to a quarter more tokens. Raises TypeError for what is no transformers config, ValueError for a model without a
    layer of full attention.

    >>> from transformers import LlamaConfig
    >>> BlockCache(LlamaConfig(num_hidden_layers=2)).layers
    [BlockLayer, BlockLayer]
    """

    def __init__(self, config: Any, *, block: int = 16) -> None:
        block = checks.whole("block", block, low=1)
        if not hasattr(config, "get_text_config"):
            raise TypeError(f"config must be a transformers config, got {type(config).__name__} {checks.shown(config)}")
        layers: list[Any] = list(DynamicCache(config=config).layers)
        if not any(type(layer) is DynamicLayer for layer in layers):
            kinds = ", ".join(sorted({type(layer).__name__ for layer in layers}))
            raise ValueError(f"config must have a layer of full attention, got {kinds}")
        super().__init__(layers=[BlockLayer(block) if type(layer) is DynamicLayer else layer for layer in layers])
