"""Teacher forcing: rows of tokens whose groups are known, as the tensors that one pass over all groups needs, and its loss."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from assay import checks

UNASKED = -100


class Rows:
    """Where the groups of (batch, tokens) group numbers lie; -1 is padding, and in each row the numbers count up from 0.

    Entries are groups in order, (batch, entries); rows with fewer have unused ones at the end, which no other entry sees. "Several" are the
    groups of more than one token, in a list. Raises ValueError for numbers that are no groups: gaps, padding inside, groups of more than
    `max_steps` tokens or across documents, and a first group of several tokens, which nothing stands before.
    """

    def __init__(self, groups: Tensor, max_steps: int, shape: tuple[int, ...], documents: Tensor | None = None) -> None:
        checks.tensor("groups", groups, shape=shape, dtype="integer")
        batch, tokens = shape
        device = groups.device
        there = groups >= 0
        if bool((groups < -1).any()) or not bool(there.any(1).all()):
            raise ValueError(
                "groups must be -1 on padding and count from 0 elsewhere, with a token at least in each row"
            )
        if bool(((there[:, 1:] != there[:, :-1]).sum(1) > 1).any()):
            raise ValueError("groups must have their padding (-1) on one side only")
        step = groups[:, 1:] - groups[:, :-1]
        both = there[:, 1:] & there[:, :-1]
        if bool((both & (step != 0) & (step != 1)).any()) or bool(groups.masked_fill(~there, tokens).amin(1).any()):
            raise ValueError("groups must count up from 0 in each row, by 0 or 1 from token to token")

        self.batch, self.tokens = batch, tokens
        self.groups = groups.clamp_min(0)
        self.entries = int(groups.max()) + 1
        column = torch.arange(tokens, device=device).expand(batch, tokens)
        entry = self.groups + self.entries * torch.arange(batch, device=device)[:, None]
        sizes = torch.zeros(batch * self.entries, dtype=torch.int64, device=device)
        sizes.index_add_(0, entry[there], torch.ones_like(entry[there]))
        if int(sizes.max()) > max_steps:
            raise ValueError(f"groups must have at most max_steps={max_steps} tokens, got one of {int(sizes.max())}")
        start = torch.full_like(sizes, tokens).scatter_reduce(0, entry[there], column[there], "amin")
        start = start.masked_fill(sizes == 0, 0)

        begins = there.clone()
        begins[:, 1:] &= ~there[:, :-1]
        if documents is not None:
            checks.tensor("documents", documents, shape=shape, dtype="integer")
            changes = both & (documents[:, 1:] != documents[:, :-1])
            if bool((changes & (step == 0)).any()):
                raise ValueError("groups must end where a document ends")
            begins[:, 1:] |= changes
        if bool((sizes[entry[begins]] != 1).any()):
            raise ValueError(
                "groups must begin with one of a single token: nothing stands before it to emit others from"
            )
        place = column - torch.where(begins, column, 0).cummax(1).values  # of each token in its document
        self._sizes, self._start = sizes.view(batch, -1), start.view(batch, -1)
        self._row = torch.arange(batch, device=device)[:, None]
        self.positions = place[self._row, (self._start + self._sizes - 1).clamp_min(0)]
        self._documents = None if documents is None else documents[self._row, self._start]

        self.several = (sizes > 1).nonzero()[:, 0]
        self.several_sizes = sizes[self.several]
        row, number = self.several // self.entries, self.several % self.entries
        self.several_places = (row, number)
        if len(self.several):
            most = int(self.several_sizes.max())
            offsets = torch.arange(most, device=device)
            self._columns = (start[self.several][:, None] + offsets).clamp_max(tokens - 1)
            self.inner = (
                offsets[:-1] < self.several_sizes[:, None] - 1
            )  # members behind which another of the group follows
            self.inner_places = (row[:, None].expand(-1, most - 1)[self.inner], self._columns[:, :-1][self.inner])

    def first_of(self, x: Tensor) -> Tensor:
        """What stands at the first token of each entry: (batch, entries, ...)."""
        return x[self._row, self._start]

    def members_of(self, x: Tensor) -> Tensor:
        """What stands at the tokens of each group of several: (groups, most, ...), of which the first `several_sizes` count."""
        return x[self.several_places[0][:, None], self._columns]

    def before(self, x: Tensor) -> Tensor:
        """What (batch, entries, ...) has for the entry before each group of several: (groups, ...)."""
        row, number = self.several_places
        return x[row, number - 1]

    def spread(self, x: Tensor) -> Tensor:
        """What (batch, entries, ...) has, at each token of the entry: (batch, tokens, ...)."""
        return x[self._row, self.groups]

    def padding(self) -> Tensor:
        """A mask (batch, entries) of ones: unused entries come last, where no other looks."""
        return torch.ones_like(self._sizes)

    def allowed(self, window: int | None = None) -> Tensor:
        """Which entries each may look at, by document and by a window in tokens: (batch, 1, entries, entries) bool."""
        order = torch.arange(self.entries, device=self.positions.device)
        seen = (order[None, :] <= order[:, None])[None] & (self._sizes > 0)[:, None]
        if window is not None:
            seen = seen & (self.positions[..., None] - self.positions[:, None] < window)
        if self._documents is not None:
            seen = seen & (self._documents[..., None] == self._documents[:, None])
        return (seen | torch.eye(self.entries, dtype=torch.bool, device=seen.device))[:, None]


def last_of_group(groups: Tensor) -> Tensor:
    """Whether a token is the last of its group, by group numbers (batch, tokens): the same shape, bool."""
    ends = torch.ones_like(groups, dtype=torch.bool)
    ends[:, :-1] = groups[:, 1:] != groups[:, :-1]
    return ends


def grouping_loss(
    logits: Tensor,
    stop_logits: Tensor,
    labels: Tensor,
    groups: Tensor,
    stop_weight: float,
    num_items_in_batch: Any = None,
) -> Tensor:
    """Cross-entropy of all tokens that are asked for, plus `stop_weight` times the binary one of which of them end their group.

    `labels` (batch, tokens) stand at their own tokens, -100 asks nothing; the mean over those asked, or the sum over
    `num_items_in_batch`.
    """
    checks.tensor("labels", labels, shape=tuple(groups.shape), dtype=torch.int64)
    wanted = labels[:, 1:].to(logits.device)
    asked = wanted != UNASKED
    tokens = F.cross_entropy(
        logits[:, :-1].flatten(0, 1).float(), wanted.flatten(), ignore_index=UNASKED, reduction="sum"
    )
    ends = last_of_group(groups)[:, 1:].to(logits.device)
    stops = F.binary_cross_entropy_with_logits(stop_logits[:, :-1][asked].float(), ends[asked].float(), reduction="sum")
    count = asked.sum() if num_items_in_batch is None else num_items_in_batch
    loss: Tensor = (tokens + stop_weight * stops) / count
    return loss
