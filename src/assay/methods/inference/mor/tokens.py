"""Some tokens of a batch: taken out of it as a smaller one, and put back; and the mask under which they attend."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor


@dataclass
class Tokens:
    """Entry (a, i) is the token in row `rows[a]` and column `columns[a, i]`; `valid` (A, K) says which entries count (None: all).

    Rows without a token are left out, and the others are as long as the longest of them. Columns ascend within a row, which keeps the
    order of the tokens.
    """

    rows: Tensor  # (A,)
    columns: Tensor  # (A, K)
    valid: Tensor | None = None
    counts: Tensor | None = None  # (A,) valid entries of a row; None where all are

    @classmethod
    def of(cls, active: Tensor) -> Self | None:
        """The tokens where `active` (B, S) is true; None if there are none."""
        counts = active.sum(1)
        longest = int(counts.max()) if len(active) else 0
        if not longest:
            return None
        rows = counts.nonzero()[:, 0]
        columns = (~active[rows]).to(torch.uint8).argsort(dim=1, stable=True)[:, :longest]
        counts = counts[rows]
        if int(counts.min()) == longest:
            return cls(rows, columns)
        valid = torch.arange(longest, device=active.device) < counts[:, None]
        return cls(rows, columns, valid, counts)

    def is_all(self, x: Tensor) -> bool:
        """Whether these are all tokens of `x` (B, S, ...)."""
        return self.valid is None and (len(self.rows), self.columns.shape[1]) == tuple(x.shape[:2])

    def take(self, x: Tensor) -> Tensor:
        """(B or 1, S, ...) -> (A, K, ...)."""
        if self.is_all(x):
            return x
        return x[0][self.columns] if len(x) == 1 else x[self.rows[:, None], self.columns]

    def put(self, x: Tensor, new: Tensor) -> Tensor:
        """A copy of `x` (B, S, D) with these tokens replaced by `new` (A, K, D); all others are as they were, bit for bit."""
        if self.is_all(x):
            return new
        rows, columns = self.rows[:, None].expand_as(self.columns), self.columns
        if self.valid is not None:
            rows, columns, new = rows[self.valid], columns[self.valid], new[self.valid]
        return x.index_put((rows, columns), new)


def mask_for(
    mask: Tensor | None, tokens: Tokens, seen: int, key_columns: Tensor, key_valid: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """What `tokens` may attend to among keys that stand at `key_columns` (A, L) of the whole sequence: (A, 1, K, L).

    `mask` is that of the whole batch, (B or 1, 1, S, columns), bool or added to the scores, None for plain causality; `seen` columns lie
    before the batch. Entries that do not count may attend to all keys of their row: nothing comes of it, and no row is empty.
    """
    if mask is None:
        allowed = key_columns[:, None, :] <= (tokens.columns + seen)[:, :, None]
    else:
        rows = tokens.rows if len(mask) > 1 else torch.zeros_like(tokens.rows)
        key_columns = key_columns.clamp(max=mask.shape[-1] - 1)  # what does not count may hold anything
        allowed = mask[rows[:, None, None], 0, tokens.columns[:, :, None], key_columns[:, None, :]]
        if allowed.dtype != torch.bool:
            allowed = allowed >= 0
    if key_valid is not None:
        allowed = allowed & key_valid[:, None, :]
    if tokens.valid is not None:
        rest = ~tokens.valid[:, :, None]
        allowed = allowed | (rest if key_valid is None else rest & key_valid[:, None, :])
    allowed = allowed[:, None]
    if mask is None or mask.dtype == torch.bool:
        return allowed
    return torch.zeros_like(allowed, dtype=dtype).masked_fill(~allowed, torch.finfo(dtype).min)
