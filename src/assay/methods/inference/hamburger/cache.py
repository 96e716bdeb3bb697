"""What a row has been told so far: one key-value entry a macro step, and the group that is still open."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

ROOM = 64  # columns that are allocated beyond those needed


class Store:
    """Keys and values of some layers, (rows, heads, columns, head dim) each, of rows that fill their columns at different times."""

    def __init__(self, rows: int, layers: int, room: int = ROOM) -> None:
        self.rows, self.room = rows, room
        self.keys: list[Tensor | None] = [None] * layers
        self.values: list[Tensor | None] = [None] * layers

    def write(self, layer: int, writer: Writer, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Put (some rows, heads, tokens, head dim) where `writer` says, and give back all that those rows hold up to there."""
        if writer.everything:  # the beginning of all rows: what was computed is what is held
            self._put(self.keys, layer, writer, keys)
            self._put(self.values, layer, writer, values)
            return keys, values
        return self._put(self.keys, layer, writer, keys), self._put(self.values, layer, writer, values)

    def _put(self, held: list[Tensor | None], layer: int, writer: Writer, new: Tensor) -> Tensor:
        old = held[layer]
        if old is None or old.shape[2] < writer.width:
            columns = (writer.width // self.room + 1) * self.room
            with torch.inference_mode(False), torch.no_grad():
                grown = new.new_zeros(self.rows, new.shape[1], columns, new.shape[3])
            if old is not None:
                grown[:, :, : old.shape[2]] = old
            held[layer] = old = grown
        if writer.start is not None:
            old[:, :, writer.start : writer.width] = new.detach()
        else:
            old.transpose(1, 2)[writer.index[:, None], writer.places] = new.detach().transpose(1, 2)
        seen = old[:, :, : writer.width]
        return seen if writer.whole else seen[writer.index]

    def select(self, rows: Tensor) -> None:
        """Keep these rows, in this order; a row may be named several times."""
        for held in (self.keys, self.values):
            for layer, tensor in enumerate(held):
                if tensor is not None:
                    held[layer] = tensor.index_select(0, rows.to(tensor.device))
        self.rows = len(rows)


class Writer(Cache):
    """What the layers see of a store while they run over some of its rows: a cache that writes at the rows' own columns."""

    def __init__(self, store: Store, rows: Sequence[int], places: Sequence[Sequence[int]], device: Any) -> None:
        super().__init__(layers=[])
        self.store = store
        self.index = torch.tensor(rows, device=device)
        self.places = torch.tensor(places, device=device)  # (rows, tokens)
        self.width = 1 + max(place[-1] for place in places)
        self.tokens = len(places[0])
        self.whole = len(rows) == store.rows
        same = self.whole and all(place[0] == self.width - self.tokens for place in places)
        self.start = self.width - self.tokens if same else None  # all rows at the same columns
        self.everything = self.start == 0

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        return self.store.write(layer_idx, self, key_states, value_states)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.width - self.tokens

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return self.width, 0


class HamburgerCache(Cache):
    """The state of generation, one entry of keys and values for each prompt token and for each group that was closed.

    - `kv_entries`: entries that each row holds, padding not counted. `groups(row)`: the sizes of a row's groups, the open one last.
    - `bytes()`: bytes of keys and values in those entries.
    - `seen`: columns of token ids so far, padding included, which is what transformers calls its length.

    Rows close their groups at different times, and each fills its own next column. Beams may be reordered, rows repeated and selected.
    Tokens cannot be taken back: a group that was merged has no parts. It is for inference: no gradient goes through it.
    """

    def __init__(
        self, rows: int, *, layers: int, micro_layers: int, max_steps: int, features: int, device: Any
    ) -> None:
        super().__init__(layers=[])
        self.layer_count, self.max_steps, self.feature_count = layers, max_steps, features
        self.micro_layers, self.device = micro_layers, device
        self._begin(rows)

    def _begin(self, rows: int) -> None:
        self.seen = 0
        self.entries = Store(rows, self.layer_count)
        self.micro = Store(rows, self.micro_layers, room=self.feature_count + self.max_steps)
        self.used = [0] * rows  # columns of `entries`
        self.position = [0] * rows  # of the next token
        self.open = [0] * rows  # tokens of the group that is not closed
        self.closes = [True] * rows  # whether the next token is the last of its group
        with torch.inference_mode(False):
            self.sizes = torch.zeros(rows, 0, dtype=torch.int64, device=self.device)  # tokens in each column's entry
            self.positions = torch.zeros(rows, 0, dtype=torch.int64, device=self.device)
            self.pending = torch.zeros(rows, self.max_steps, dtype=torch.int64, device=self.device)
        self.features: Tensor | None = None  # (rows, features, width) of the last macro step

    def admit(self, rows: Sequence[int], sizes: Tensor, positions: Tensor) -> Writer:
        """Take the next columns of some rows for entries of `sizes` tokens at `positions`, (rows, entries) each; 0 is padding."""
        count = sizes.shape[1]
        places = [list(range(self.used[row], self.used[row] + count)) for row in rows]
        writer = Writer(self.entries, rows, places, self.device)
        if (missing := writer.width - self.sizes.shape[1]) > 0:
            with torch.inference_mode(False):
                more = self.sizes.new_zeros(len(self.used), (missing // ROOM + 1) * ROOM)
                self.sizes, self.positions = torch.cat([self.sizes, more], 1), torch.cat([self.positions, more], 1)
        self.sizes[writer.index[:, None], writer.places] = sizes
        self.positions[writer.index[:, None], writer.places] = positions
        for row in rows:
            self.used[row] += count
        return writer

    def allowed(self, writer: Writer, window: int | None = None) -> Tensor | None:
        """Which entries the new ones may look at: (rows, 1, new, columns) bool, None where a single new one may look at all.

        `window` is in tokens, as rotary distances are: entries that end `window` tokens ago or earlier are out of sight.
        """
        there = self.sizes[writer.index, : writer.width] > 0
        columns = torch.arange(writer.width, device=there.device)
        seen = there[:, None] & (columns <= writer.places[..., None])
        if window is not None:
            at = self.positions[writer.index, : writer.width]
            own = at.gather(1, writer.places)
            seen &= own[..., None] - at[:, None] < window
        if writer.tokens == 1 and bool(seen.all()):
            return None
        return seen[:, None]

    @property
    def kv_entries(self) -> list[int]:
        found: list[int] = (self.sizes > 0).sum(1).tolist()
        return found

    def groups(self, row: int) -> list[int]:
        """The sizes of a row's groups in order, those of the prompt's tokens (1 each) first and the open one, if any, last."""
        closed = [size for size in self.sizes[row].tolist() if size]
        return [*closed, self.open[row]] if self.open[row] else closed

    def bytes(self) -> int:
        """Bytes of keys and values in the entries that are held; what is allocated beyond them is not counted."""
        each = sum(t[0, :, 0].nbytes for t in (*self.entries.keys, *self.entries.values) if t is not None)
        return each * sum(self.kv_entries)

    # ---- what transformers asks of a cache

    @property
    def batch_size(self) -> int:
        return len(self.used)

    @property
    def is_croppable(self) -> bool:
        return False

    @property
    def is_linear(self) -> list[bool]:
        return [False] * self.layer_count

    @property
    def is_sliding(self) -> list[bool]:
        return [False] * self.layer_count

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.seen

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return -1

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows, in this order; a row may be named several times."""
        rows = torch.as_tensor(indices, device=self.device)
        if rows.dtype == torch.bool:
            rows = rows.nonzero()[:, 0]
        rows = rows.long()
        self.entries.select(rows)
        self.micro.select(rows)
        listed: list[int] = rows.tolist()
        self.used, self.position, self.open = (
            [had[row] for row in listed] for had in (self.used, self.position, self.open)
        )
        self.closes = [self.closes[row] for row in listed]
        self.sizes, self.positions, self.pending = self.sizes[rows], self.positions[rows], self.pending[rows]
        if self.features is not None:
            self.features = self.features[rows]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.batch_select_indices(torch.arange(len(self.used)).repeat_interleave(repeats))

    def crop(self, tokens_to_remove: int) -> None:
        """Raises ValueError: the tokens of a merged entry cannot be told apart again."""
        raise ValueError("a group that was merged cannot be cut back to an earlier token; keep a copy from then")

    def reset(self) -> None:
        """Start again with nothing, for the current number of rows."""
        self._begin(len(self.used))
