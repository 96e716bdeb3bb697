"""Training data for a model that revises: right answers behind wrong ones that are close to them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from assay import checks
from assay.methods.reasoning.compute_optimal_ttc.strategies import ATTEMPTS


@dataclass(frozen=True)
class Revision:
    """A row to train on: wrong attempts, oldest first, the last of them the closest to the right one that follows."""

    attempts: tuple[str, ...]
    right: str


def revision_rows(
    texts: Sequence[str], right: Sequence[bool], *, most: int = ATTEMPTS, seed: int = 0
) -> list[Revision]:
    """A row for each right sample of a question: up to `most` wrong ones of the same question in front of it (appendix on revisions).

    How many is drawn uniformly from 0 to `most`; the last is the wrong one with the least edit distance in characters, the others are drawn
    at random. The paper draws 64 samples a question. Without a wrong one there are rows without attempts.

    >>> rows = revision_rows(["x = 7", "x = 9", "y is 123"], [True, False, False], seed=3)
    >>> rows[0].right, rows[0].attempts[-1]
    ('x = 7', 'x = 9')
    """
    most = checks.whole("most", most, low=0)
    if len(texts) != len(right):
        raise ValueError(f"right must be one a text, {len(texts)}, got {len(right)}")
    random = np.random.default_rng(checks.whole("seed", seed, low=0))
    wrong = [text for text, ok in zip(texts, right, strict=True) if not ok]
    rows = []
    for text, ok in zip(texts, right, strict=True):
        if not ok:
            continue
        many = min(int(random.integers(0, most + 1)), len(wrong))
        if not many:
            rows.append(Revision((), text))
            continue
        near = min(range(len(wrong)), key=lambda i: (edit_distance(wrong[i], text), i))
        others = [i for i in range(len(wrong)) if i != near]
        drawn = [others[i] for i in random.permutation(len(others))[: many - 1]]
        rows.append(Revision((*(wrong[i] for i in drawn), wrong[near]), text))
    return rows


def edit_distance(a: str, b: str) -> int:
    """The least number of characters to put in, take out or replace to make one text of the other.

    >>> edit_distance("kitten", "sitting"), edit_distance("", "abc")
    (3, 3)
    """
    above = list(range(len(b) + 1))
    for i, left in enumerate(a, 1):
        row = [i]
        for j, top in enumerate(b, 1):
            row.append(min(row[-1] + 1, above[j] + 1, above[j - 1] + (left != top)))
        above = row
    return above[-1]
