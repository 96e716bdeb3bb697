"""An idea, and the bank of all that were taken up: what is too near to one of them is not tried again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from assay import checks

Embedder = Callable[[Sequence[str]], np.ndarray]
"""Texts to vectors, (n, width), of any length above 0. The same text must give the same vector."""
THRESHOLD = 0.8
"""Cosine above which two ideas count as one: the paper's, for its encoder."""


@dataclass(frozen=True)
class Idea:
    """What to try: a title, a plan of how, a summary of what it is. Raises ValueError without a title."""

    title: str
    plan: str = ""
    summary: str = ""

    def __post_init__(self) -> None:
        for name in ("title", "plan", "summary"):
            if not isinstance(getattr(self, name), str):
                raise TypeError(f"{name} must be text, got {checks.shown(getattr(self, name))}")
        if not self.title.strip():
            raise ValueError(f"title must be text that is not empty, got {checks.shown(self.title)}")

    @property
    def text(self) -> str:
        """What is embedded: titles alone collide."""
        return f"{self.title}. {self.summary}" if self.summary else self.title


@dataclass(frozen=True)
class Seen:
    """What the bank says of an idea: whether it is new, and the entry nearest to it (-1 and similarity -1 in an empty
    bank)."""

    new: bool
    nearest: int
    similarity: float


class Bank:
    """Ideas of which no two are more similar than `threshold` (cosine). Equal texts are always found again.

    With another encoder than the paper's look at a few pairs before you keep its threshold: encoders differ in what
    0.8 means. Raises ValueError for vectors that are not finite, have no length, or change their width.

    >>> bank = Bank(lambda texts: np.array([[len(t), t.count("e")] for t in texts], dtype=float))
    >>> bank.add(Idea("wider")).new, bank.add(Idea("wider")).new, len(bank)
    (True, False, 1)
    """

    def __init__(self, embed: Embedder, *, threshold: float = THRESHOLD) -> None:
        self.embed = embed
        self.threshold = checks.number("threshold", threshold, low=-1, high=1)
        self.ideas: list[Idea] = []
        self._vectors: list[np.ndarray] = []
        self._texts: dict[str, int] = {}
        self._latest: tuple[str, np.ndarray] | None = None

    def __len__(self) -> int:
        return len(self.ideas)

    def look(self, idea: Idea) -> Seen:
        """Whether the idea is new, without keeping it."""
        return self._look(idea)[0]

    def add(self, idea: Idea) -> Seen:
        """Keep the idea if it is new."""
        seen, vector = self._look(idea)
        if seen.new:
            self._texts[idea.text] = len(self.ideas)
            self.ideas.append(idea)
            self._vectors.append(vector)
        return seen

    def _look(self, idea: Idea) -> tuple[Seen, np.ndarray]:
        if not isinstance(idea, Idea):
            raise TypeError(f"idea must be an Idea, got {checks.shown(idea)}")
        if idea.text in self._texts:  # rounding must not let a copy through at a threshold of 1
            at = self._texts[idea.text]
            return Seen(False, at, 1.0), self._vectors[at]
        if self._latest is None or self._latest[0] != idea.text:  # it is asked for, told of and kept: embedded once
            self._latest = idea.text, embedded(self.embed, [idea.text])[0]
        vector = self._latest[1]
        if not self._vectors:
            return Seen(True, -1, -1.0), vector
        if len(vector) != len(self._vectors[0]):
            raise ValueError(f"embed must give vectors of width {len(self._vectors[0])} as before, got {len(vector)}")
        near = np.stack(self._vectors) @ vector
        at = int(near.argmax())
        return Seen(not float(near[at]) > self.threshold, at, float(near[at])), vector


def embedded(embed: Embedder, texts: Sequence[str]) -> np.ndarray:
    """A row of length 1 for each text. Raises ValueError for another number of rows, and for rows that are not finite or
    have no length."""
    found = np.asarray(embed(texts), dtype=np.float64)
    if found.ndim != 2 or len(found) != len(texts) or not np.isfinite(found).all():
        raise ValueError(f"embed must give one finite row a text, got shape {found.shape} of {len(texts)} texts")
    lengths = np.linalg.norm(found, axis=1, keepdims=True)
    if not (lengths > 0).all():
        raise ValueError("embed must give vectors of a length above 0, got one of 0")
    return found / lengths
