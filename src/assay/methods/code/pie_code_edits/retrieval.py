"""The pairs whose slow programs are nearest to a new one: a flat index by Euclidean distance over embeddings."""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from assay import checks
from assay.methods.code.pie_code_edits.pairs import Pair

Embed = Callable[[Sequence[str]], Any]
"""Programs to an array of shape (programs, dimensions): a model's, or `token_vectors`."""
NEAREST = 4
_TOKENS = re.compile(r"[A-Za-z_]\w*|\d+|[^\w\s]")


def token_vectors(programs: Sequence[str], *, size: int = 1024) -> NDArray[np.float32]:
    """Programs as counts of their tokens and of neighbouring two, hashed to `size` places, damped (log) and of length 1. Ours, plain.

    Shape (programs, size). It knows words, not meaning: the paper embeds with CodeBERT trained on C++. The same on every machine.

    >>> same, other = token_vectors(["for (int i = 0; ;)", "for (int j = 0; ;)"])
    >>> 0 < float(((same - other) ** 2).sum()) < 2
    True
    """
    checks.whole("size", size, low=1)
    found = np.zeros((len(programs), size), dtype=np.float32)
    for row, program in enumerate(programs):
        tokens = _TOKENS.findall(program)
        for token in [*tokens, *map(" ".join, zip(tokens, tokens[1:], strict=False))]:
            found[row, zlib.crc32(token.encode()) % size] += 1
    found = np.log1p(found)
    lengths = np.linalg.norm(found, axis=1, keepdims=True)
    return np.divide(found, lengths, out=np.zeros_like(found), where=lengths > 0)


class Index:
    """The slow programs of pairs by their embeddings; each stands for the fastest target known for it.

    Raises ValueError for no pairs, and for an embedding of another shape than (programs, dimensions) or with numbers that are not finite.
    Index pairs of training problems only, for a pair of the query's own problem hands out the answer.

    >>> pairs = [Pair(f"x = {n}", f"y = {n}", "p", "u", 2.0, 1.0) for n in range(3)]
    >>> [pair.target for pair in Index(pairs).nearest("x = 2", k=1)]  # never the query itself
    ['y = 0']
    """

    def __init__(self, pairs: Sequence[Pair], embed: Embed = token_vectors) -> None:
        if not pairs:
            raise ValueError("pairs must be one or more, got none")
        best: dict[str, Pair] = {}
        for pair in pairs:
            key = _bare(pair.source)
            if key not in best or pair.target_cost < best[key].target_cost:
                best[key] = pair
        self._keys = list(best)
        self.pairs = list(best.values())
        self._embed = embed
        self._vectors = self._embedded([pair.source for pair in self.pairs])

    def nearest(self, program: str, k: int = NEAREST) -> list[Pair]:
        """The pairs of the `k` nearest slow programs, nearest first, by exact distance; fewer where there are no more.

        A slow program with the query's own text (but for white space) is left out. Raises ValueError for k below 1.
        """
        checks.whole("k", k, low=1)
        [vector] = self._embedded([program])
        if vector.shape[0] != self._vectors.shape[1]:
            raise ValueError(f"embed must give {self._vectors.shape[1]} dimensions as before, got {vector.shape[0]}")
        distances = ((self._vectors - vector) ** 2).sum(axis=1)
        own = _bare(program)
        order = [int(at) for at in np.argsort(distances, kind="stable") if self._keys[at] != own]
        return [self.pairs[at] for at in order[:k]]

    def _embedded(self, programs: Sequence[str]) -> NDArray[np.float64]:
        found = np.asarray(self._embed(programs), dtype=np.float64)
        if found.ndim != 2 or len(found) != len(programs) or not np.isfinite(found).all():
            raise ValueError(f"embed must give finite numbers of shape ({len(programs)}, any), got shape {found.shape}")
        return found


def _bare(program: str) -> str:
    return " ".join(program.split())
