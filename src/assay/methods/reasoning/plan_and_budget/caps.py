"""Budgets enforced inside `generate` of transformers: one pass, whose cache is kept, instead of a completion for each part."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor
from transformers import LogitsProcessor

from assay import checks


class PartCaps(LogitsProcessor):
    """Puts the opening of each part where it belongs, and lets the model write at most so many tokens behind it.

    `openings[row][part]` are token ids, `allotted[row][part]` the tokens that may follow them, for each row of the batch. A part also ends
    after one of the `ends` (tokens with an empty line, say). Before the last part the end token counts as going on to the next part:
    its probability is added to that of the next opening's first token. After the last part the end token is forced. Rows that are
    padded on the left are fine. One object serves one call of `generate`, without beams (rows must stay in their places).

    Raises ValueError for lists of different lengths, openings that are empty, and a batch of another size.

    >>> import torch
    >>> caps = PartCaps([[2]], [[[5]]], end=0)
    >>> ids = torch.tensor([[7, 7]])
    >>> for step in range(4):
    ...     ids = torch.cat([ids, caps(ids, torch.tensor([[0.0, 3.0, 1, 1, 1, 1]])).argmax(-1, keepdim=True)], 1)
    >>> ids[0].tolist(), caps.used
    ([7, 7, 5, 1, 1, 0], [[2]])
    """

    def __init__(
        self,
        allotted: Sequence[Sequence[int]],
        openings: Sequence[Sequence[Sequence[int]]],
        *,
        end: int,
        ends: Collection[int] = (),
    ) -> None:
        if len(openings) != len(allotted) or any(len(o) != len(a) for o, a in zip(openings, allotted, strict=True)):
            raise ValueError(f"openings must have a list for each of {[len(a) for a in allotted]} parts")
        if not all(part for row in openings for part in row) or not all(allotted):
            raise ValueError("openings must hold at least one token a part, and a part a row")
        self.allotted = [[checks.whole("allotted", tokens, low=0) for tokens in row] for row in allotted]
        self.end, self.ends = checks.whole("end", end, low=0), frozenset(ends)
        self.used = [[0] * len(row) for row in self.allotted]
        """Tokens that the model wrote in each part, the one that ended it included, those that were put there not."""
        self._openings = [[list(part) for part in row] for row in openings]
        self._part = [0] * len(self.allotted)
        self._queue = [list(row[0]) for row in openings]  # tokens that must come next
        self._free = [False] * len(self.allotted)  # whether the last token was the model's

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """The scores of the next token, those that must not come at -inf."""
        if len(input_ids) != len(self.allotted):
            raise ValueError(f"input_ids must have {len(self.allotted)} rows, got {len(input_ids)}")
        found = scores.clone()
        for row, last in enumerate(input_ids[:, -1].tolist()):
            self._seen(row, last)
            part, queue = self._part[row], self._queue[row]
            self._free[row] = not queue
            if queue:
                found[row] = -torch.inf
                found[row, queue.pop(0)] = 0
            elif part + 1 < len(self.allotted[row]):
                onward = self._openings[row][part + 1][0]
                found[row, onward] = torch.logaddexp(found[row, onward], found[row, self.end])
                found[row, self.end] = -torch.inf
        return found

    def _seen(self, row: int, last: int) -> None:
        """Take note of the token that was chosen, and of what follows from it."""
        part = self._part[row]
        more = part + 1 < len(self.allotted[row])
        if self._free[row]:
            if more and last == self._openings[row][part + 1][0]:  # the model went on by itself
                self._part[row], self._queue[row] = part + 1, self._openings[row][part + 1][1:]
                part, more = part + 1, part + 2 < len(self.allotted[row])
            else:
                self.used[row][part] += 1
        while not self._queue[row] and self._over(row, part, last):
            if not more:
                self._queue[row] = [self.end]
                return
            self._part[row] = part = part + 1
            self._queue[row] = list(self._openings[row][part])
            more = part + 1 < len(self.allotted[row])

    def _over(self, row: int, part: int, last: int) -> bool:
        return self.used[row][part] >= self.allotted[row][part] or (self.used[row][part] > 0 and last in self.ends)
