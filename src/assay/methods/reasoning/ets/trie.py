"""Keys and values of a tree of tokens, each held once, and attention that reads what rows share once.

A tree search continues many texts that begin alike. `KeyValueTrie` holds the keys and values of each token of the tree in one place,
however many texts go through it; what a new branch adds is its own tokens, and what is pruned is really given up. `Reading` says which rows
of a batch read which tokens, and `attend` computes their attention: a stretch of tokens that several rows share is read once for all of
them, and no row looks at tokens of another.

Tokens are the unit (pages of one token, as in SGLang's radix cache): steps of reasoning are a few tokens long, and pages of sixteen would
be copied for every branch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from assay import checks
from assay.methods.core.generation.cache import keys_and_values

WORTH = 64
"""Reads that sharing a stretch must save, in tokens, to be done apart: a product of its own costs time too; our choice."""


@dataclass(eq=False)
class _Node:
    slot: int
    children: dict[int, _Node] = field(default_factory=dict)


class KeyValueTrie:
    """Keys and values by the token ids that lead to them. Not safe for several threads.

    `keys[layer]` and `values[layer]` are (key-value heads, tokens held, head dim), a slot a token. They hold exactly the tokens of
    the tree: they grow when texts are added, and `keep` copies what stays, layer by layer, so that the rest is given back.

    >>> from assay.methods.core.generation.slices import cache_of
    >>> own = cache_of([(torch.ones(2, 1, 3, 4), torch.ones(2, 1, 3, 4))])
    >>> trie = KeyValueTrie()
    >>> trie.add([[5, 6, 7], [5, 6, 8]], own)
    >>> trie.tokens, trie.match([5, 6, 8, 9]), trie.nbytes
    (4, [0, 1, 3], 128)
    >>> trie.keep([[5, 6, 8]])
    >>> trie.tokens, trie.match([5, 6, 7])
    (3, [0, 1])
    """

    def __init__(self) -> None:
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        self._root = _Node(-1)
        self._tokens = 0

    @property
    def tokens(self) -> int:
        """Tokens of the tree, each once."""
        return self._tokens

    @property
    def nbytes(self) -> int:
        """Bytes of memory that the keys and values keep alive: whole storages."""
        return sum(x.untyped_storage().nbytes() for x in (*self.keys, *self.values))

    def match(self, ids: Sequence[int]) -> list[int]:
        """The slots of the longest beginning of `ids` that is held."""
        return [node.slot for node in self._path(ids)]

    def add(self, texts: Sequence[Sequence[int]], own: Cache, rows: Sequence[int] | None = None) -> None:
        """Hold more texts, as token ids: the last tokens of text i lie in row i of `own`, or in `rows[i]`.

        What is held already is not held twice, and what `own` holds is copied. Raises ValueError where what comes before `own` in a text is
        not held, and for other numbers of rows or tokens.
        """
        layers = keys_and_values(own)
        rows = range(len(texts)) if rows is None else rows
        checks.tensor("own", layers[0][0], ndim=4, empty=True)
        if len(rows) != len(texts) or any(not 0 <= row < len(layers[0][0]) for row in rows):
            raise ValueError(f"rows must be {len(texts)} of {len(layers[0][0])}, one a text, got {list(rows)}")
        length = layers[0][0].shape[2]
        for ids in texts:
            if not len(self._path(ids)) >= len(ids) - length >= 0:
                raise ValueError(
                    f"texts must be held but for their last {length} tokens, got {checks.shown(list(ids))}"
                )
        found: list[tuple[int, int]] = []  # row and token of what is new
        for ids, row in zip(texts, rows, strict=True):
            path = self._path(ids)
            node = path[-1] if path else self._root
            for at in range(len(path), len(ids)):
                node.children[ids[at]] = node = _Node(self._tokens)
                self._tokens += 1
                found.append((row, at - len(ids) + length))
        if not found:
            return
        where = torch.tensor(found, device=layers[0][0].device)
        for index, (keys, values) in enumerate(layers):
            new = [x.transpose(0, 1)[:, where[:, 0], where[:, 1]] for x in (keys, values)]
            if index == len(self.keys):
                self.keys.append(new[0])
                self.values.append(new[1])
            else:
                self.keys[index] = torch.cat([self.keys[index], new[0]], 1)
                self.values[index] = torch.cat([self.values[index], new[1]], 1)

    def keep(self, texts: Sequence[Sequence[int]]) -> None:
        """Give up every token that no text goes through, the tokens behind the texts too."""
        kept = {node.slot for ids in texts for node in self._path(ids)}
        if len(kept) == self._tokens:
            return
        order = sorted(kept)
        new = {slot: place for place, slot in enumerate(order)}
        todo = [self._root]
        while todo:
            node = todo.pop()
            node.children = {token: child for token, child in node.children.items() if child.slot in new}
            for child in node.children.values():
                child.slot = new[child.slot]
            todo.extend(node.children.values())
        self._tokens = len(order)
        chosen = torch.tensor(order, dtype=torch.int64)
        for held in (self.keys, self.values):
            for index, x in enumerate(held):
                held[index] = x.index_select(1, chosen.to(x.device))

    def _path(self, ids: Sequence[int]) -> list[_Node]:
        node, path = self._root, []
        for token in ids:
            child = node.children.get(token)
            if child is None:
                break
            path.append(child)
            node = child
        return path


class Reading:
    """Who reads what: the slots of the tokens before each row of a batch, in parts that are read together.

    `shared` are stretches (first row, end row, first column, slots) that all rows of a range read; a stretch is one where that saves at
    least `WORTH` reads. `private` are the other slots of each row, (rows, most of them), filled up with slot 0 where `mask` is False; both
    are None where there are none. Rows must be in an order in which those with a common beginning are neighbours: that of sorted paths.

    >>> reading = Reading(KeyValueTrie(), [[*range(70), 70], [*range(70), 71, 72]])
    >>> [(first, end, column, len(slots)) for first, end, column, slots in reading.shared], reading.private.tolist()
    ([(0, 2, 0, 70)], [[70, 0], [71, 72]])
    """

    def __init__(self, trie: KeyValueTrie, paths: Sequence[Sequence[int]]) -> None:
        self.trie = trie
        self.rows = len(paths)
        self.shared: list[tuple[int, int, int, Tensor]] = []
        self.columns = 0
        alone: list[list[int]] = [[] for _ in paths]
        todo = [(0, len(paths), 0)]
        while todo:
            first, end, start = todo.pop()
            if end - first == 1:
                alone[first] += paths[first][start:]
                continue
            stop = _common(paths[first], paths[end - 1], start)
            if (end - first - 1) * (stop - start) >= WORTH:
                self.shared.append((first, end, start, torch.tensor(paths[first][start:stop])))
                self.columns = max(self.columns, stop)
            else:
                for row in range(first, end):
                    alone[row] += paths[row][start:stop]
            at = first
            while at < end:
                if len(paths[at]) == stop:
                    at += 1
                    continue
                below = at
                while below < end and len(paths[below]) > stop and paths[below][stop] == paths[at][stop]:
                    below += 1
                todo.append((at, below, stop))
                at = below
        most = max(map(len, alone), default=0)
        self.private = torch.tensor([own + [0] * (most - len(own)) for own in alone]) if most else None
        self.mask = torch.tensor([[k < len(own) for k in range(most)] for own in alone]) if most else None
        if self.mask is not None and bool(self.mask.all()):
            self.mask = None


def _common(one: Sequence[int], other: Sequence[int], start: int) -> int:
    """How far two paths agree that agree up to `start`."""
    stop = min(len(one), len(other))
    while start < stop and one[start] == other[start]:
        start += 1
    return start


def attend(query: Tensor, keys: Tensor, values: Tensor, reading: Reading, layer: int, scale: float) -> Tensor:
    """Attention of rows over the tokens before them in the tree and their own: (rows, heads, new tokens, head dim).

    `query` is (rows, heads, new tokens, head dim), `keys` and `values` are (rows, key-value heads, own tokens, head dim), the new
    tokens last among them. Exact: only the order of sums differs from attention over each row's whole text.
    """
    rows, heads, new, dim = query.shape
    own, groups = keys.shape[2], heads // keys.shape[1]
    q = (query * scale).reshape(rows, keys.shape[1], groups * new, dim)
    parts: list[Tensor] = []
    if reading.shared:
        scores = q.new_full((*q.shape[:3], reading.columns), float("-inf"))
        for first, end, column, slots in reading.shared:
            k = reading.trie.keys[layer].index_select(1, slots.to(q.device))
            asked = q[first:end].transpose(0, 1).flatten(1, 2)  # (key-value heads, all queries of these rows, head dim)
            found = (asked @ k.transpose(1, 2)).unflatten(1, (end - first, -1)).transpose(0, 1)
            scores[first:end, :, :, column : column + len(slots)] = found
        parts.append(scores)
    apart = _gathered(reading, layer, q.device)
    if apart is not None:
        scores = q @ apart[0].transpose(2, 3)
        if reading.mask is not None:
            scores = scores.masked_fill(~reading.mask.to(q.device)[:, None, None], float("-inf"))
        parts.append(scores)
    scores = q @ keys.transpose(2, 3)
    if new > 1:
        later = torch.ones(new, own, dtype=torch.bool, device=q.device).triu(own - new + 1)
        scores = scores.unflatten(2, (groups, new)).masked_fill(later, float("-inf")).flatten(2, 3)
    parts.append(scores)
    shares = list(
        torch.cat(parts, -1).softmax(-1, dtype=torch.float32).to(q.dtype).split([x.shape[-1] for x in parts], -1)
    )
    out = shares.pop() @ values
    if apart is not None:
        out = out + shares.pop() @ apart[1]
    for first, end, column, slots in reading.shared:
        v = reading.trie.values[layer].index_select(1, slots.to(q.device))
        mine = shares[0][first:end, :, :, column : column + len(slots)].transpose(0, 1).flatten(1, 2)
        out[first:end] += (mine @ v).unflatten(1, (end - first, -1)).transpose(0, 1)
    return out.view(rows, heads, new, dim)


def _gathered(reading: Reading, layer: int, device: Any) -> tuple[Tensor, Tensor] | None:
    """Keys and values of one layer that rows read alone, side by side: held while that layer runs."""
    if reading.private is None:
        return None
    index = reading.private.to(device)
    found = [
        x[layer].index_select(1, index.flatten()).unflatten(1, index.shape)
        for x in (reading.trie.keys, reading.trie.values)
    ]
    return found[0].transpose(0, 1), found[1].transpose(0, 1)
