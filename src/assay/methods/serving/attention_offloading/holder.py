"""What a memory device does: it holds keys and values, looks with a query at the earlier ones, and adds the newest when it is there.

A `Holder` has its share of a batch's heads or rows and knows nothing of the model. `ask` attends to all earlier tokens as soon as the
query is there, `give` takes the new key and value, merges the two parts exactly and keeps the new token; `whole` is the usual way, all
three at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from assay.methods.core import kernels
from assay.methods.core.generation.merging import Partial, merged, partial_attention

FLASH_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
GROWTH = 256  # tokens of room made at least

Merge = Callable[[Sequence[Partial]], Partial]


@dataclass(frozen=True)
class Spec:
    """What a holder is told of a batch: the first token of each row (left padding before it) and the windows of the layers, 0 for none.

    `tokens` is how many the batch's longest row will have at most as far as is known; more are taken.
    """

    starts: tuple[int, ...]
    windows: tuple[int, ...]
    tokens: int = 0


class _Layer:
    """Keys and values of a layer, (rows, heads, room, dim), of which `length` tokens are taken; `dropped` left the window before them."""

    def __init__(self, window: int, tokens: int) -> None:
        self.window, self.room = window, max(1, min(tokens, 2 * window) if window else tokens)
        self.keys: Tensor | None = None
        self.values: Tensor | None = None
        self.length = self.dropped = 0

    @property
    def seen(self) -> int:
        """Tokens so far, those that left the window included."""
        return self.dropped + self.length

    def add(self, keys: Tensor, values: Tensor) -> None:
        new = keys.shape[2]
        if self.keys is None or self.values is None:
            room = max(self.room, new)
            self.keys = keys.new_empty(*keys.shape[:2], room, keys.shape[3])
            self.values = values.new_empty(*values.shape[:2], room, values.shape[3])
        if self.length + new > self.keys.shape[2]:
            self._make_room(new)
        self.keys[:, :, self.length : self.length + new] = keys
        self.values[:, :, self.length : self.length + new] = values
        self.length += new

    def _make_room(self, new: int) -> None:
        assert self.keys is not None
        assert self.values is not None
        kept = min(self.length, self.window - 1) if self.window else self.length
        gone = self.length - kept
        room = self.keys.shape[2]
        if kept + new > room:
            room = max(kept + new, min(2 * room, room + 16 * GROWTH), room + GROWTH)
        for name in ("keys", "values"):
            old = getattr(self, name)
            made = old.new_empty(*old.shape[:2], room, old.shape[3])
            made[:, :, :kept] = old[:, :, gone : self.length]
            setattr(self, name, made)
        self.length, self.dropped = kept, self.dropped + gone

    def earlier(self) -> tuple[Tensor, Tensor, int]:
        """Keys and values that a token behind them all sees, and the number of the first of them."""
        assert self.keys is not None
        assert self.values is not None
        first = max(0, self.length - (self.window - 1)) if self.window else 0
        cut = slice(first, self.length)
        return self.keys[:, :, cut], self.values[:, :, cut], self.dropped + first


class Holder:
    """The share of one memory device, by batch (`slot`). `merge` puts parts of an attention together: core's exact one."""

    def __init__(self, merge: Merge = merged) -> None:
        self.merge = merge
        self._specs: dict[int, Spec] = {}
        self._layers: dict[int, list[_Layer]] = {}
        self._asked: dict[tuple[int, int], tuple[Tensor, float, Partial | None]] = {}

    def open(self, slot: int, spec: Spec) -> None:
        """Begin a batch; what the slot held before is gone."""
        self.close(slot)
        self._specs[slot] = spec
        self._layers[slot] = [_Layer(window, spec.tokens) for window in spec.windows]

    def close(self, slot: int) -> None:
        """Forget a batch; one that is not there is no error."""
        self._specs.pop(slot, None)
        self._layers.pop(slot, None)
        for key in [key for key in self._asked if key[0] == slot]:
            del self._asked[key]

    def fill(self, slot: int, layer: int, keys: Tensor, values: Tensor, dropped: int = 0) -> None:
        """Take a prompt's keys and values (rows, heads, tokens, dim), in one piece or several; `dropped` tokens left the window before."""
        held = self._layers[slot][layer]
        if held.keys is None:
            held.dropped = dropped
        held.add(keys, values)

    def ask(self, slot: int, layer: int, query: Tensor, scale: float) -> None:
        """Attend with a query (rows, heads, 1, dim) to the tokens that are there, and keep the part until `give`."""
        held = self._layers[slot][layer]
        part = None
        if held.length and held.window != 1:
            keys, values, first = held.earlier()
            part = _attended(query, keys, values, scale, self._hidden(slot, first, keys.shape[2]))
        self._asked[slot, layer] = (query, scale, part)

    def give(self, slot: int, layer: int, key: Tensor, value: Tensor) -> Tensor:
        """Take the new token's key and value (rows, heads, 1, dim): the whole attention, as large as the query and in its dtype."""
        query, scale, part = self._asked.pop((slot, layer))
        self._layers[slot][layer].add(key, value)
        new = newest(query, key, value, scale)
        return (new if part is None else self.merge([part, new])).output.to(query.dtype)

    def whole(self, slot: int, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """`ask` and `give` at once, in one attention over all tokens: what is done where nothing overlaps."""
        held = self._layers[slot][layer]
        held.add(key, value)
        first = max(0, held.length - held.window) if held.window else 0
        assert held.keys is not None
        assert held.values is not None
        keys, values = (x[:, :, first : held.length] for x in (held.keys, held.values))
        hidden = self._hidden(slot, held.dropped + first, keys.shape[2])
        return _attended(query, keys, values, scale, hidden).output.to(query.dtype)

    def rewind(self, slot: int, tokens: int) -> None:
        """Forget the last `tokens` tokens. Raises ValueError for more than there are, and in layers whose window has let tokens go."""
        for number, held in enumerate(self._layers[slot]):
            if tokens > held.length or held.dropped:
                raise ValueError(
                    f"tokens must be at most the {held.length} that layer {number} holds and it must have let none go, "
                    f"got {tokens}"
                )
        for held in self._layers[slot]:
            held.length -= tokens

    def bytes(self) -> int:
        """Of all keys and values, room for more included."""
        tensors = (x for layers in self._layers.values() for held in layers for x in (held.keys, held.values))
        return sum(x.nbytes for x in tensors if x is not None)

    def _hidden(self, slot: int, first: int, tokens: int) -> Tensor | None:
        """Bool (rows, 1, 1, tokens): what each row does not see of the tokens from `first` on; None if it sees all."""
        starts = self._specs[slot].starts
        if max(starts, default=0) <= first:
            return None
        places = torch.arange(first, first + tokens)
        return (places < torch.tensor(starts)[:, None])[:, None, None]


def newest(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Partial:
    """The part of one token, which every row sees: its value, and the query's score as the logarithm of the sum."""
    shared = key.shape[1]
    wide = torch.promote_types(query.dtype, torch.float32)
    grouped = query.unflatten(1, (shared, -1)).to(wide)
    score = (grouped * key.unsqueeze(2).to(wide)).sum(-1) * scale
    output = value.to(wide).unsqueeze(2).expand(-1, -1, grouped.shape[2], -1, -1)
    return Partial(output.flatten(1, 2), score.flatten(1, 2))


def _attended(query: Tensor, keys: Tensor, values: Tensor, scale: float, hidden: Tensor | None) -> Partial:
    """Attention of one query a row over all tokens but the hidden ones. torch's flash kernel says the logarithm of its sum too; the heads
    that share a key become its queries, so that nothing is copied."""
    blind = hidden is not None and bool(hidden.all(-1).any())
    if query.dtype in FLASH_DTYPES and query.is_cpu and keys.shape[3] == values.shape[3] and not blind:
        kernels.ran("offloaded attention", "flash of torch")
        mask = None
        if hidden is not None:
            mask = torch.zeros(hidden.shape, dtype=query.dtype).masked_fill(hidden, float("-inf"))
        shared = keys.shape[1]
        grouped = query.unflatten(1, (shared, -1)).squeeze(3)  # (rows, key-value heads, heads that share one, dim)
        operators: Any = torch.ops.aten
        output, lse = operators._scaled_dot_product_flash_attention_for_cpu(
            grouped, keys, values, 0.0, False, attn_mask=mask, scale=scale
        )
        wide = torch.promote_types(query.dtype, torch.float32)
        return Partial(output.flatten(1, 2).unsqueeze(2).to(wide), lse.flatten(1, 2).unsqueeze(2).to(wide))
    kernels.ran("offloaded attention", "torch")
    return partial_attention(query, keys, values, visible=None if hidden is None else ~hidden, scale=scale)
