"""A text that can be guessed in part, as what programs are asked to write can: lines of JSON, a record for each character of Unicode.

Keys and punctuation follow from the form, names and categories are real and partly new in every line. The data is Python's `unicodedata`
without the characters whose names are only their numbers. A document is a run of neighbouring characters; of ten, one is held out
and by one learning rates are chosen.
"""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Iterator
from functools import cache

import torch
from torch import Tensor

from assay.experiments.inference.language import BYTES, bigram_table

VERSION = unicodedata.unidata_version
LAST = 0x20000  # of the characters, above which there are hardly any but ideographs
DOCUMENT = 128  # characters
PARTS = ("heldout", "calibration", "prompts")


def record(character: str) -> str:
    """A line about a character; empty for one without a name of its own.

    >>> record("a")
    '{"code": "U+0061", "name": "LATIN SMALL LETTER A", "category": "Ll", "direction": "L"}'
    """
    name, number = unicodedata.name(character, ""), f"{ord(character):04X}"
    if not name or name.endswith(number) or name.startswith("HANGUL SYLLABLE"):
        return ""
    return json.dumps(
        {
            "code": f"U+{number}",
            "name": name,
            "category": unicodedata.category(character),
            "direction": unicodedata.bidirectional(character),
        }
    )


@cache
def text_of(part: str) -> Tensor:
    """The bytes of a part, int64: "prompts" is what is trained on."""
    lines = []
    for first in range(0, LAST, DOCUMENT):
        if PARTS[min(first // DOCUMENT % 10, 2)] == part:
            lines += [line for line in map(record, map(chr, range(first, first + DOCUMENT))) if line]
    return torch.tensor(list("\n".join(lines).encode()), dtype=torch.int64)


def batches(length: int, batch: int, *, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless (inputs, targets) of random windows of `length` bytes of the text for training; the targets are the next bytes."""
    text, draw = text_of("prompts"), torch.Generator().manual_seed(seed)
    while True:
        starts = torch.randint(len(text) - length, (batch, 1), generator=draw)
        found = text[starts + torch.arange(length + 1)]
        yield found[:, :-1], found[:, 1:]


def rows_of(length: int, n: int, part: str) -> Tensor:
    """`n` rows of `length` + 1 bytes, evenly spread over a part."""
    text = text_of(part)
    starts = torch.linspace(0, len(text) - length - 1, n).long()
    return text[starts[:, None] + torch.arange(length + 1)]


def bigram_floor(ids: Tensor, prompt: int) -> float:
    """Nats a byte behind the prompt of a table of pairs counted on the text for training: what is trivial here."""
    return float(-_bigrams()[ids[:, prompt - 1 : -1], ids[:, prompt:]].mean())


@cache
def _bigrams() -> Tensor:
    return bigram_table(text_of("prompts"), BYTES)
