"""A pool of memory devices, as the side with the model sees it: batches are opened, queries asked, keys and values given, outputs taken.

A batch lies in a `slot` and is shared among the devices by key-value heads, evenly, or by rows. `LocalPool` keeps its devices in this
process, for tests and for looking at a split without one; real ones are in `workers.AttentionWorkers`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, get_args

import torch
from torch import Tensor

from assay import checks
from assay.methods.core.generation.merging import merged
from assay.methods.serving.attention_offloading.costs import Partition
from assay.methods.serving.attention_offloading.holder import Holder, Merge, Spec
from assay.methods.serving.attention_offloading.timeline import Timeline
from assay.methods.serving.attention_offloading.traffic import Meter


class Share(NamedTuple):
    """What a device has of a batch: rows, query heads, and the key-value heads that they share."""

    device: int
    rows: slice
    heads: slice
    kv_heads: slice


def shares(count: int, partition: Partition, rows: int, heads: int, kv_heads: int) -> list[Share]:
    """The shares of `count` devices; one that would get no row gets no share.

    Raises ValueError where key-value heads cannot be shared evenly.

    >>> [(share.heads, share.kv_heads) for share in shares(2, "heads", rows=3, heads=8, kv_heads=2)]
    [(slice(0, 4, None), slice(0, 1, None)), (slice(4, 8, None), slice(1, 2, None))]
    """
    if partition == "heads":
        if kv_heads % count:
            raise ValueError(
                f"the number of devices must divide the {kv_heads} key-value heads, got {count}; partition 'rows' "
                "shares requests"
            )
        a, b = heads // count, kv_heads // count
        return [Share(i, slice(0, rows), slice(i * a, (i + 1) * a), slice(i * b, (i + 1) * b)) for i in range(count)]
    cuts = [rows * i // count for i in range(count + 1)]
    return [
        Share(i, slice(cuts[i], cuts[i + 1]), slice(0, heads), slice(0, kv_heads))
        for i in range(count)
        if cuts[i] < cuts[i + 1]
    ]


@dataclass
class _Batch:
    shares: list[Share]
    rows: int
    heads: int
    kv_heads: int
    layers: int


class Pool(ABC):
    """What pools have in common: who has which share, and the meter of payload bytes.

    `timeline`, when set, takes what devices and links do (lanes "memory 0", "link 0" ...), in the clock of `time.perf_counter`.
    """

    def __init__(self, count: int, partition: Partition, slots: int) -> None:
        self.count = checks.whole("count", count, low=1)
        self.partition: Partition = checks.choice("partition", partition, get_args(Partition))
        self.slots = checks.whole("slots", slots, low=1)
        self.meter = Meter()
        self.timeline: Timeline | None = None
        self._batches: dict[int, _Batch] = {}

    # ------------------------------------------------------------------------------------ what the side with the model calls

    def free_slot(self) -> int:
        """A slot without a batch. Raises ValueError when there is none."""
        for slot in range(self.slots):
            if slot not in self._batches:
                return slot
        raise ValueError(f"at most {self.slots} batches can be open at once: close one, or make a pool with more slots")

    def open(
        self, slot: int, *, heads: int, kv_heads: int, starts: Sequence[int], windows: Sequence[int], tokens: int = 0
    ) -> None:
        """Begin a batch of len(starts) rows: the first token of each row, the window of each layer (0: none). One that lay there is closed.

        Raises ValueError for a slot that there is not, no rows, and heads that cannot be shared.
        """
        slot = checks.whole("slot", slot, low=0, high=self.slots - 1)
        rows = len(starts)
        if not rows:
            raise ValueError("starts must hold at least one row")
        parts = shares(self.count, self.partition, rows, heads, kv_heads)
        self.close_batch(slot)
        for share in parts:
            self._open(share.device, slot, Spec(tuple(starts[share.rows]), tuple(windows), tokens))
        self._batches[slot] = _Batch(parts, rows, heads, kv_heads, len(windows))

    def fill(self, slot: int, layer: int, keys: Tensor, values: Tensor, *, dropped: int = 0) -> None:
        """Hand over a prompt's keys and values of a layer, (rows, key-value heads, tokens, dim); `dropped` left the window before."""
        batch = self._batch(slot)
        for share in batch.shares:
            mine = (keys[share.rows, share.kv_heads], values[share.rows, share.kv_heads])
            self._fill(share.device, slot, layer, *mine, dropped)
        self.meter.count("prompt", keys.nbytes + values.nbytes)

    def ask(self, slot: int, layer: int, query: Tensor, scale: float) -> None:
        """Send the queries (rows, heads, 1, dim): the devices begin to look at the earlier tokens."""
        for share in self._batch(slot).shares:
            self._ask(share.device, slot, layer, query[share.rows, share.heads], scale)
        self.meter.count("query", query.nbytes)

    def give(self, slot: int, layer: int, key: Tensor, value: Tensor) -> None:
        """Send the newest keys and values (rows, key-value heads, 1, dim); the devices merge them in and keep them."""
        for share in self._batch(slot).shares:
            self._give(share.device, slot, layer, key[share.rows, share.kv_heads], value[share.rows, share.kv_heads])
        self.meter.count("keys and values", key.nbytes + value.nbytes)

    def whole(self, slot: int, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> None:
        """Send all three at once: attention in one piece, nothing overlaps."""
        for share in self._batch(slot).shares:
            mine = (query[share.rows, share.heads], key[share.rows, share.kv_heads], value[share.rows, share.kv_heads])
            self._whole(share.device, slot, layer, *mine, scale)
        self.meter.count("query", query.nbytes)
        self.meter.count("keys and values", key.nbytes + value.nbytes)

    def take(self, slot: int, layer: int) -> Tensor:
        """The attention (rows, heads, 1, dim), as soon as all devices have sent theirs."""
        batch = self._batch(slot)
        parts = [(share, self._take(share.device, slot, layer)) for share in batch.shares]
        first = parts[0][1]
        found = first if len(parts) == 1 else first.new_empty(batch.rows, batch.heads, 1, first.shape[3])
        if len(parts) > 1:
            for share, part in parts:
                found[share.rows, share.heads] = part
        self.meter.count("output", found.nbytes)
        return found

    def rewind(self, slot: int, tokens: int) -> None:
        """Forget the last tokens of a batch. Raises ValueError where a window has let tokens go."""
        for share in self._batch(slot).shares:
            self._rewind(share.device, slot, checks.whole("tokens", tokens, low=0))

    def close_batch(self, slot: int) -> None:
        """Forget a batch and free its slot; one that is not open is no error."""
        batch = self._batches.pop(slot, None)
        for share in batch.shares if batch is not None else ():
            self._close(share.device, slot)

    def is_open(self, slot: int) -> bool:
        """Whether a batch lies in a slot."""
        return slot in self._batches

    def _batch(self, slot: int) -> _Batch:
        if slot not in self._batches:
            raise ValueError(f"slot {slot} has no batch: open one first")
        return self._batches[slot]

    # ------------------------------------------------------------------------------------------------ what pools differ in

    @abstractmethod
    def _open(self, device: int, slot: int, spec: Spec) -> None: ...

    @abstractmethod
    def _fill(self, device: int, slot: int, layer: int, keys: Tensor, values: Tensor, dropped: int) -> None: ...

    @abstractmethod
    def _ask(self, device: int, slot: int, layer: int, query: Tensor, scale: float) -> None: ...

    @abstractmethod
    def _give(self, device: int, slot: int, layer: int, key: Tensor, value: Tensor) -> None: ...

    @abstractmethod
    def _whole(
        self, device: int, slot: int, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float
    ) -> None: ...

    @abstractmethod
    def _take(self, device: int, slot: int, layer: int) -> Tensor: ...

    @abstractmethod
    def _rewind(self, device: int, slot: int, tokens: int) -> None: ...

    @abstractmethod
    def _close(self, device: int, slot: int) -> None: ...


class LocalPool(Pool):
    """`count` memory devices in this process. `merge` puts the parts of an attention together; exchange it to see what that is worth."""

    def __init__(
        self, count: int = 1, *, partition: Partition = "heads", slots: int = 4, merge: Merge = merged
    ) -> None:
        super().__init__(count, partition, slots)
        self.holders = [Holder(merge) for _ in range(self.count)]
        self._out: dict[tuple[int, int, int], Tensor] = {}

    def _open(self, device: int, slot: int, spec: Spec) -> None:
        self.holders[device].open(slot, spec)

    def _fill(self, device: int, slot: int, layer: int, keys: Tensor, values: Tensor, dropped: int) -> None:
        self.holders[device].fill(slot, layer, keys, values, dropped)

    def _ask(self, device: int, slot: int, layer: int, query: Tensor, scale: float) -> None:
        self.holders[device].ask(slot, layer, query, scale)

    def _give(self, device: int, slot: int, layer: int, key: Tensor, value: Tensor) -> None:
        self._out[device, slot, layer] = self.holders[device].give(slot, layer, key, value)

    def _whole(
        self, device: int, slot: int, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float
    ) -> None:
        self._out[device, slot, layer] = self.holders[device].whole(slot, layer, query, key, value, scale)

    def _take(self, device: int, slot: int, layer: int) -> Tensor:
        if (device, slot, layer) not in self._out:
            raise ValueError(f"nothing was asked of layer {layer} in slot {slot}")
        return self._out.pop((device, slot, layer))

    def _rewind(self, device: int, slot: int, tokens: int) -> None:
        self.holders[device].rewind(slot, tokens)

    def _close(self, device: int, slot: int) -> None:
        self.holders[device].close(slot)
        for key in [key for key in self._out if key[:2] == (device, slot)]:
            del self._out[key]


def gathered(pool: Pool, slot: int) -> list[tuple[Tensor, Tensor]]:
    """The keys and values that a `LocalPool` holds of a batch, put together again, layer by layer: for looking at it."""
    if not isinstance(pool, LocalPool):
        raise TypeError(f"pool must be a LocalPool, got {type(pool).__name__}")
    batch, found = pool._batch(slot), []
    for layer in range(batch.layers):
        pair = []
        for name in ("keys", "values"):
            parts = []
            for share in batch.shares:
                held = pool.holders[share.device]._layers[slot][layer]
                parts.append(getattr(held, name)[:, :, : held.length])
            pair.append(torch.cat(parts, 1 if pool.partition == "heads" else 0))
        found.append((pair[0], pair[1]))
    return found
