"""Keys and values where recursions see different tokens: one store a recursion, in which every row has a length of its own.

`MoRCache` has a `Stage` for the layers before the recursions ("first"), one for each recursion that keeps its own entries, and one for the
layers behind them ("last"). A stage knows the column (place in the padded batch) of each entry, and holds keys and values for each
of its layers, its slots. A layer gets a `Place`: room for some tokens of some rows, in the form of a cache of transformers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from assay import checks

LEAST_ROOM = 32  # entries by which storage grows at least
Rows = (
    Tensor | slice
)  # of a batch: their numbers (A,), or as many as follow one another, of which views are taken and no copies
ALL = slice(None)


class Stage:
    """The entries of one stage: in row b the first `lengths[b]` places of its slots, of the tokens at `columns[b]`, which ascend."""

    def __init__(self, batch: int, device: Any = None) -> None:
        self.lengths = torch.zeros(batch, dtype=torch.int64, device=device)
        self.columns = torch.zeros(batch, 0, dtype=torch.int64, device=device)
        self.keys: dict[int, Tensor] = {}  # (batch, heads, room, head dim)
        self.values: dict[int, Tensor] = {}

    def reserve(self, columns: Tensor, rows: Rows = ALL, counts: Tensor | None = None) -> Place:
        """Room for tokens at `columns` (A, K) behind what `rows` hold, of which the first `counts` (A,) count."""
        start = self.lengths[rows]
        places = start[:, None] + torch.arange(columns.shape[1], device=columns.device)
        need = int(places.max()) + 1 if places.numel() else 0
        even = isinstance(rows, slice) and (not len(start) or need == int(start.min()) + columns.shape[1])
        self.columns = _with_room(self.columns, need, 1)
        at = self.numbers(rows)
        self.columns[at[:, None], places] = columns
        added = columns.shape[1] if counts is None else counts
        self.lengths = self.lengths.index_put((at,), start + added)
        return Place(self, rows, at, places, need, even)

    def look(self, rows: Rows = ALL) -> Place:
        """What these rows hold, without room for more."""
        at = self.numbers(rows)
        return Place(self, rows, at, at[:, None], 0, False)

    def numbers(self, rows: Rows) -> Tensor:
        """The numbers of these rows."""
        return rows if isinstance(rows, Tensor) else torch.arange(len(self.lengths), device=self.lengths.device)[rows]

    def write(self, kept: Tensor | None, new: Tensor, place: Place) -> Tensor:
        """A slot's tensor with `new` (A, heads, K, head dim) at its place."""
        if kept is None:
            if place.even and place.need == new.shape[2] and len(new) == len(self.lengths):
                return new  # the first entries of all rows: nothing to copy
            kept = new.new_zeros(len(self.lengths), new.shape[1], place.need + LEAST_ROOM, new.shape[3])
        kept = _with_room(kept, place.need, 2)
        if place.even:
            kept[place.rows, :, place.need - new.shape[2] : place.need] = new
        else:
            kept[place.at[:, None], :, place.places] = new.transpose(1, 2)
        return kept

    def select(self, index: Tensor | Callable[[Tensor], Tensor]) -> None:
        """Other rows in place of these."""
        take = index if callable(index) else lambda x: x[index.to(x.device)]
        self.lengths, self.columns = take(self.lengths), take(self.columns)
        for held in (self.keys, self.values):
            for slot, kept in held.items():
                held[slot] = take(kept)

    def cut(self, columns: int) -> None:
        """Forget entries of tokens that stand at `columns` or behind."""
        there = torch.arange(self.columns.shape[1], device=self.columns.device) < self.lengths[:, None]
        self.lengths = (there & (self.columns < columns)).sum(1)

    def put(self, rows: Tensor, other: Stage) -> None:
        """What `other` holds, row by row, in place of what these `rows` (A,) hold."""
        self.lengths[rows] = 0
        longest = int(other.lengths.max())
        place = self.reserve(other.columns[:, :longest], rows, other.lengths)
        for mine, theirs in ((self.keys, other.keys), (self.values, other.values)):
            for slot, kept in theirs.items():
                mine[slot] = self.write(mine.get(slot), kept[:, :, :longest], place)


def _with_room(kept: Tensor, need: int, dim: int) -> Tensor:
    """`kept`, or a longer copy where it is shorter than `need` or may not be written to; zeros behind what was there."""
    room = kept.shape[dim]
    if room >= need and not (kept.is_inference() and not torch.is_inference_mode_enabled()):
        return kept
    shape = list(kept.shape)
    shape[dim] = room if room >= need else need + max(LEAST_ROOM, need // 4)
    longer = kept.new_zeros(shape)
    longer.narrow(dim, 0, room).copy_(kept)
    return longer


def taken(kept: Tensor, rows: Rows) -> Tensor:
    """These rows of a slot; whole rows at a time, which is quicker than their entries alone."""
    return kept[rows] if isinstance(rows, slice) else kept.index_select(0, rows)


class Place:
    """Where a stage's layers put the keys and values of some tokens, and what they then see: all entries of these rows."""

    def __init__(self, stage: Stage, rows: Rows, at: Tensor, places: Tensor, need: int, even: bool) -> None:
        self.stage, self.rows, self.at, self.places, self.need, self.even = stage, rows, at, places, need, even
        held = stage.lengths[rows]
        self.seen = int(held.max()) if len(held) else 0  # entries of the longest of these rows
        self._held = held

    @property
    def columns(self) -> Tensor:
        """(A, entries)"""
        return self.stage.columns[self.rows, : self.seen]

    @property
    def valid(self) -> Tensor | None:
        """(A, entries), None where all rows are equally long."""
        if not len(self._held) or int(self._held.min()) == self.seen:
            return None
        return torch.arange(self.seen, device=self._held.device) < self._held[:, None]

    def update(self, keys: Tensor, values: Tensor, slot: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        stage = self.stage
        stage.keys[slot] = stage.write(stage.keys.get(slot), keys, self)
        stage.values[slot] = stage.write(stage.values.get(slot), values, self)
        return self.read(slot)

    def read(self, slot: int) -> tuple[Tensor, Tensor]:
        """The (keys, values) of these rows, (A, heads, entries, head dim) each."""
        held = self.stage.keys[slot], self.stage.values[slot]
        keys, values = (taken(kept, self.rows)[:, :, : self.seen] for kept in held)
        return keys, values


class Shared:
    """What a later recursion sees in place of its own keys and values: those of the first recursion, of all tokens.

    With `places` (of the later recursions up to this one, which is the last of them), what those recursions have computed stands in its
    place: the newest of every token.
    """

    def __init__(self, stage: Stage, rows: Rows, entries: int, places: list[Place] | None = None) -> None:
        self.stage, self.rows, self.entries, self.places = stage, rows, entries, places

    def update(self, keys: Tensor, values: Tensor, slot: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        found = [taken(held[slot], self.rows)[:, :, : self.entries] for held in (self.stage.keys, self.stage.values)]
        if self.places is not None:
            self.places[-1].update(keys, values, slot)
            for place in self.places:
                if slot in place.stage.keys:
                    found = [_over(kept, new, place) for kept, new in zip(found, place.read(slot), strict=True)]
        return found[0], found[1]


def _over(kept: Tensor, new: Tensor, place: Place) -> Tensor:
    """`kept` (A, heads, entries, d) with `new` (A, heads, K, d) at the place's columns."""
    columns, valid = place.columns, place.valid
    if valid is not None:  # what does not count goes to one entry more, which is dropped
        columns = columns.masked_fill(~valid, kept.shape[2])
        kept = torch.cat([kept, kept[:, :, :1]], 2)
    found = kept.scatter(2, columns[:, None, :, None].expand(-1, kept.shape[1], -1, kept.shape[3]), new)
    return found if valid is None else found[:, :, :-1]


class MoRCache(Cache):
    """The cache of `MoRForCausalLM`: a stage for what stands before and behind the recursions, and one a recursion.

    It has `batch` rows (None: as many as the first call has) on `device` (None: where the tokens of the first call are). `seen` columns
    have been run, padding included; each recursion has kept the tokens that took part in it. Beam search, selection of rows and `crop`
    work as with transformers' caches.
    """

    def __init__(self, batch: int | None = None, device: Any = None) -> None:
        super().__init__(layers=[])
        self.rows = None if batch is None else checks.whole("batch", batch, low=0)
        self.device, self.seen = device, 0
        self.stages: dict[str | int, Stage] = {}

    def __repr__(self) -> str:
        return f"MoRCache({self.rows} rows, {self.seen} columns, entries {self.entries()})"

    def __len__(self) -> int:
        return len(self.stages)

    def stage(self, name: str | int) -> Stage:
        """The stage "first", "last", or of a recursion (from 0)."""
        if name not in self.stages:
            self.stages[name] = Stage(self.rows or 0, self.device)
        return self.stages[name]

    def entries(self) -> dict[str | int, int]:
        """How many tokens of all rows together each stage holds."""
        return {name: int(stage.lengths.sum()) for name, stage in self.stages.items()}

    def bytes(self) -> int:
        """Bytes of the entries of all slots, keys and values; the room that storage has beside them is not counted."""
        return sum(
            int(stage.lengths.sum()) * kept.shape[1] * kept.shape[3] * kept.element_size()
            for stage in self.stages.values()
            for kept in (*stage.keys.values(), *stage.values.values())
        )

    # ---- what transformers asks of a cache

    @property
    def batch_size(self) -> int:
        return -1 if self.rows is None else self.rows

    @property
    def is_compileable(self) -> bool:
        return False

    @property
    def is_initialized(self) -> bool:
        return self.seen > 0

    @property
    def is_croppable(self) -> bool:
        return True

    @property
    def is_sliding(self) -> list[bool]:
        return [False]

    @property
    def is_linear(self) -> list[bool]:
        return [False]

    @property
    def is_dummy(self) -> list[bool]:
        return [False]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.seen

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return -1

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return self.seen + query_length, 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._select(beam_idx)
        self.rows = len(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        self.reorder_cache(torch.arange(self.batch_size, device=indices.device)[indices])

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._select(lambda x: x.repeat_interleave(repeats, 0))
        self.rows = self.batch_size * repeats

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens of all rows; the number is negative, as transformers wants it. Raises ValueError for another."""
        if not -self.seen <= tokens_to_remove <= 0:
            raise ValueError(f"tokens_to_remove must lie in {-self.seen}..0, got {tokens_to_remove}")
        self.seen += tokens_to_remove
        for stage in self.stages.values():
            stage.cut(self.seen)

    def activate_past_recording(self) -> None:
        """Nothing to do: all entries are kept."""

    def reset(self) -> None:
        self.stages, self.seen = {}, 0

    def update(self, *_: Any, **__: Any) -> Any:
        """Raises TypeError: which rows of a layer are written is known to the model only."""
        raise TypeError("a MoRCache is filled by the forward pass of its model only")

    def _select(self, index: Tensor | Callable[[Tensor], Tensor]) -> None:
        for stage in self.stages.values():
            stage.select(index)
