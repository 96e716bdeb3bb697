"""Which documents ideas start from, and whether an idea is in one of them already."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from assay import checks
from assay.methods.reasoning.dolphin.ideas import Embedder, Idea, embedded

Scorer = Callable[[Sequence["Document"]], Sequence[float]]
"""1 to 10 for each document: a model that was asked, or `similarity_scorer`."""


@dataclass(frozen=True)
class Document:
    """A paper, or whatever tells of known methods: title and abstract."""

    title: str
    abstract: str = ""

    @property
    def text(self) -> str:
        """Both, as they are embedded."""
        return f"{self.title}. {self.abstract}" if self.abstract else self.title


def ranked(
    documents: Sequence[Document], relevance: Scorer, attributes: Scorer, *, least: float = 8.0, most: int = 50
) -> list[Document]:
    """The documents whose scores for the topic and for the task's attributes are both at least `least`, best sum
    first, `most` at most.

    The paper retrieves 50, asks a model for both scores from 1 to 10, and drops what is below 8. Of equal sums the
    first given wins. Raises ValueError for scores outside 1 to 10 or of another number than documents.
    """
    least, most = checks.number("least", least, low=1, high=10), checks.whole("most", most, low=1)
    if not documents:
        return []
    topic, match = _scored("relevance", relevance, documents), _scored("attributes", attributes, documents)
    kept = [i for i in range(len(documents)) if topic[i] >= least and match[i] >= least]
    return [documents[i] for i in sorted(kept, key=lambda i: -(topic[i] + match[i]))[:most]]


def similarity_scorer(embed: Embedder, text: str) -> Scorer:
    """Scores by cosine to a text, without a model to ask: 10 for the nearest of the documents, 1 for the farthest,
    straight between.

    Our choice. It ranks among what it is given: the nearest gets 10 also where none is near.
    """

    def score(documents: Sequence[Document]) -> list[float]:
        if not documents:
            return []
        near = embedded(embed, [one.text for one in documents]) @ embedded(embed, [text])[0]
        spread = float(near.max() - near.min())
        return (1 + 9 * ((near - near.min()) / spread) if spread else np.full(len(near), 10.0)).tolist()

    return score


def known_from(idea: Idea, documents: Sequence[Document], embed: Embedder, *, threshold: float) -> Document | None:
    """The document that has the idea already: the nearest, if its cosine is above `threshold`; else None.

    In place of asking a model (our choice): the threshold depends on the encoder, so choose it on ideas of which you
    know.
    """
    checks.number("threshold", threshold, low=-1, high=1)
    if not documents:
        return None
    near = embedded(embed, [one.text for one in documents]) @ embedded(embed, [idea.text])[0]
    at = int(near.argmax())
    return documents[at] if float(near[at]) > threshold else None


def _scored(name: str, scorer: Scorer, documents: Sequence[Document]) -> list[float]:
    found = [checks.number(name, score, low=1, high=10) for score in scorer(documents)]
    if len(found) != len(documents):
        raise ValueError(f"{name} must give as many scores as documents, {len(documents)}, got {len(found)}")
    return found
