"""Which documents belong to a question: by words (BM25) or by vectors, and several rankings made one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np

from assay import checks


class Retriever(Protocol):
    """The numbers of the `k` documents that fit each query best, the best first; fewer where there are not so many.

    A retriever of LangChain or Haystack becomes one by a function that returns its documents' numbers.
    """

    def __call__(self, queries: Sequence[str], k: int) -> list[list[int]]: ...


class Bm25:
    """BM25 over texts, by the package `bm25s`; the common words of English questions do not count.

    Raises ValueError without a text, ImportError without the package (extra `reasoning`).
    """

    def __init__(self, texts: Sequence[str]) -> None:
        import bm25s

        if not texts:
            raise ValueError("texts must hold at least one document, got none")
        self._many = len(texts)
        self._index = bm25s.BM25()
        self._index.index(self._tokens(texts), show_progress=False)

    @staticmethod
    def _tokens(texts: Sequence[str]) -> list[list[str]]:
        import bm25s

        found: list[list[str]] = bm25s.tokenize(
            list(texts), stopwords="english_plus", return_ids=False, show_progress=False
        )
        return found

    def __call__(self, queries: Sequence[str], k: int) -> list[list[int]]:
        """As `Retriever` has it. Of documents that score equally the first comes first."""
        k = min(checks.whole("k", k, low=0), self._many)
        if not k or not queries:
            return [[] for _ in queries]
        scores = [self._index.get_scores(words) if words else np.zeros(self._many) for words in self._tokens(queries)]
        return [np.argsort(-own, kind="stable")[:k].tolist() for own in scores]


class Vectors:
    """The nearest vectors by inner product, exactly, by `faiss`. `embed` makes vectors of texts, (n, d), of unit length
    for cosines.

    Raises ValueError for vectors that are no matrix of finite numbers, ImportError without the package (extra
    `reasoning`).
    """

    def __init__(self, vectors: np.ndarray, embed: Callable[[Sequence[str]], np.ndarray]) -> None:
        import faiss

        known = np.ascontiguousarray(vectors, dtype=np.float32)
        if known.ndim != 2 or not len(known) or not np.isfinite(known).all():
            raise ValueError(f"vectors must be a matrix of finite numbers with a row a document, got {known.shape}")
        self._embed, self._many, self._wide = embed, len(known), known.shape[1]
        self._index = faiss.IndexFlatIP(known.shape[1])
        self._index.add(known)

    def __call__(self, queries: Sequence[str], k: int) -> list[list[int]]:
        """As `Retriever` has it. Raises ValueError where `embed` gives no such vectors for the queries."""
        k = min(checks.whole("k", k, low=0), self._many)
        if not k or not queries:
            return [[] for _ in queries]
        asked = np.ascontiguousarray(self._embed(queries), dtype=np.float32)
        if asked.shape != (len(queries), self._wide) or not np.isfinite(asked).all():
            wanted = f"{len(queries)} vectors of {self._wide} finite numbers"
            raise ValueError(f"embed must give {wanted} for as many queries, got shape {asked.shape}")
        found: list[list[int]] = self._index.search(asked, k)[1].tolist()
        return found


def merged(rankings: Sequence[Sequence[int]]) -> list[int]:
    """Several rankings as one, each document once, at its best rank; of equal ranks the later ranking's comes first.

    >>> merged([[4, 2, 7], [2, 9]])
    [2, 4, 9, 7]
    """
    best: dict[int, tuple[int, int]] = {}
    for number, ranking in enumerate(rankings):
        for rank, document in enumerate(ranking):
            best[document] = min(best.get(document, (rank, -number)), (rank, -number))
    return sorted(best, key=lambda document: best[document])
