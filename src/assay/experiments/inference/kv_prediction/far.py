"""Real code whose beginning comes again: what follows a prompt depends on its far past.

A window is `apart` words of code, the first `again` of them once more, and then the code as it goes on, `fresh` words. A prompt ends
`cue` words into the repetition; the words behind it are judged. Words are runs of letters, digits and underscores, runs of other
signs, and ends of lines with the indentation that follows. The most frequent ones of the training text have numbers of their own, all
others share buckets. Training text is the part "prompts" of the bundled code, rates are chosen on "calibration", figures are of
"heldout": three parts of different documents.
"""

from __future__ import annotations

import re
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Literal

import torch
from torch import Tensor

from assay.experiments.inference.language import bigram_table
from assay.workloads.sequences import text_bytes

Part = Literal["prompts", "calibration", "heldout"]
Task = Mapping[str, int]
WORD = re.compile(r"\w+|\n\s*|[^\w\s]+")
COMMON, BUCKETS = 256, 512
VOCABULARY = COMMON + BUCKETS


@dataclass(frozen=True, eq=False)
class Windows:
    """Prompts (n, P), and the words (n, C) behind them, which are judged; the first `copied` of these stood in the prompt."""

    prompts: Tensor
    texts: Tensor
    copied: int

    def __len__(self) -> int:
        return len(self.prompts)

    def rows(self, which: slice) -> Windows:
        return Windows(self.prompts[which], self.texts[which], self.copied)


@cache
def ids_of(part: Part) -> Tensor:
    """All of a part, int64 below VOCABULARY."""
    known = {word: number for number, (word, _) in enumerate(Counter(_words("prompts")).most_common(COMMON))}
    return torch.tensor([known.get(word, COMMON + zlib.crc32(word.encode()) % BUCKETS) for word in _words(part)])


@cache
def _words(part: Part) -> list[str]:
    return WORD.findall(text_bytes("code", part).to(torch.uint8).numpy().tobytes().decode())


def rows_at(part: Part, starts: Tensor, task: Task) -> Tensor:
    """Whole windows of the code from `starts` (n,) on: (n, apart + again + fresh)."""
    apart, again, fresh = task["apart"], task["again"], task["fresh"]
    places = torch.cat([torch.arange(apart), torch.arange(again), torch.arange(apart, apart + fresh)])
    return ids_of(part)[starts[:, None] + places]


def windows(part: Part, task: Task, n: int) -> Windows:
    """`n` windows, spread over the part, which have no word of the code in common. Raises ValueError for more than there are."""
    used = task["apart"] + task["fresh"]
    most = len(ids_of(part)) // used
    if n > most:
        raise ValueError(f"n must be at most {most}, the windows of {part}, got {n}")
    rows = rows_at(part, torch.linspace(0, most - 1, n).long() * used, task)
    end = task["apart"] + task["cue"]
    return Windows(rows[:, :end], rows[:, end:], task["again"] - task["cue"])


def batches(task: Task, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless windows of training text from random places, and their next words."""
    generator = torch.Generator().manual_seed(seed)
    places = len(ids_of("prompts")) - task["apart"] - task["fresh"] + 1
    while True:
        rows = rows_at("prompts", torch.randint(places, (task["batch"],), generator=generator), task)
        yield rows[:, :-1], rows[:, 1:]


def bigram_floor(judged: Windows) -> float:
    """Nats a judged word of a table of pairs counted on the training text, which is shown the word before."""
    before = torch.cat([judged.prompts[:, -1:], judged.texts[:, :-1]], 1)
    return float(-_bigrams()[before, judged.texts].mean())


@cache
def _bigrams() -> Tensor:
    return bigram_table(ids_of("prompts"), VOCABULARY)
