"""Passages of one function each (code, languages, arithmetic), all from what a machine has offline.

"python": modules of the standard library. "c++": torch's headers. "english": Python's language reference. "other languages": the
translated messages of the system's programs (German, French, Spanish, Italian, Portuguese, Dutch, Polish, Swedish). "arithmetic":
drawn sums and products with their results.

All passages are equally long in tokens, since the mean activation of a neuron depends on the length. The even documents are for
fitting, the odd ones are held out.
"""

from __future__ import annotations

import random
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from assay import checks
from assay.errors import MissingError
from assay.workloads.text import _documents, start_tokens

FUNCTIONS = ("python", "c++", "english", "other languages", "arithmetic")
LANGUAGES = ("de", "fr", "es", "it", "pt_BR", "nl", "pl", "sv")
LOCALES = Path("/usr/share/locale")
SHORTEST = 700  # characters of a document
HEADERS = ("c10", "torch/csrc")  # of torch's headers, those that people wrote
MAGIC = 0x950412DE  # of a catalogue of messages

Half = Literal["fit", "held out"]


@dataclass(frozen=True, eq=False)
class Passage:
    """Token ids (1, length), the function they need, and the number of the document they come from."""

    function: str
    document: int
    ids: Tensor


def passages(tokenizer: Any, function: str, n: int, length: int, half: Half) -> list[Passage]:
    """`n` passages of `length` tokens: one a document while there are documents, then further ones of each.

    Raises ValueError for an unknown function or half and where the documents are too short, MissingError where translated messages
    are not installed.
    """
    checks.choice("function", function, FUNCTIONS)
    checks.choice("half", half, ("fit", "held out"))
    n, length = checks.whole("n", n, low=1), checks.whole("length", length, low=8)
    start = start_tokens(tokenizer)
    fresh = length - len(start)
    numbered = list(enumerate(documents(function)))[int(half == "held out") :: 2]
    random.Random(function).shuffle(numbered)
    deep = -(-n // len(numbered)) + 1
    ids: dict[int, list[int]] = {}
    found: list[Passage] = []
    for depth in range(4 * deep):
        for number, text in numbered:
            if len(found) == n:
                return found
            if number not in ids:
                begin = text.find("\n", len(text) // 4) + 1  # past the head of a file
                some = text[begin : begin + 16 * length * deep]
                ids[number] = tokenizer(some, add_special_tokens=False, verbose=False)["input_ids"]
            piece = ids[number][depth * fresh : (depth + 1) * fresh]
            if len(piece) == fresh:
                found.append(Passage(function, number, torch.tensor([start + piece])))
    if len(found) < n:
        raise ValueError(f"n must be at most {len(found)} passages of {length} tokens of {function}, got {n}")
    return found


@cache
def documents(function: str) -> tuple[str, ...]:
    """The documents of a function, in a fixed order."""
    makers: dict[str, Callable[[], Iterator[str]]] = {
        "python": lambda: (text for _, text in _documents("code")),
        "c++": _headers,
        "english": lambda: (text for _, text in _documents("english")),
        "other languages": _messages,
        "arithmetic": _sums,
    }
    return tuple(text for text in makers[function]() if len(text) >= SHORTEST)


def _headers() -> Iterator[str]:
    root = Path(torch.__file__).parent / "include"
    files = sorted(file for folder in HEADERS for file in (root / folder).rglob("*.h"))
    for file in files[:: max(1, len(files) // 800)]:
        yield file.read_text(encoding="utf-8", errors="replace")


def _messages() -> Iterator[str]:
    files = [file for language in LANGUAGES for file in sorted((LOCALES / language / "LC_MESSAGES").glob("*.mo"))]
    files = [file for file in files if not file.is_symlink() and not file.name.startswith("iso_")]  # those are names
    if len(files) < 40:
        raise MissingError(
            f"there are {len(files)} translated catalogues in {LOCALES}, and 40 are needed: install programs with their translations "
            "(images for containers often leave them out)"
        )
    for file in files:
        yield "\n".join(text for text in translations(file.read_bytes()) if text.count(" ") >= 4)


def translations(data: bytes) -> Iterator[str]:
    """The translated messages of a compiled catalogue, the header and what is not UTF-8 left out."""
    order = next((o for o in "<>" if len(data) >= 20 and struct.unpack(f"{o}I", data[:4])[0] == MAGIC), None)
    if order is None:
        return
    count, _, table = struct.unpack(f"{order}3I", data[8:20])
    for place in range(1, count):  # the first is the header
        entry = data[table + 8 * place : table + 8 * place + 8]
        if len(entry) < 8:
            return
        size, begin = struct.unpack(f"{order}2I", entry)
        try:
            text = data[begin : begin + size].decode()
        except UnicodeDecodeError:
            continue
        yield text.split("\0")[0]  # the first of several plurals


def _sums() -> Iterator[str]:
    for number in range(400):
        draw = random.Random(f"arithmetic {number}")
        lines = []
        for _ in range(160):
            a, b, c = (draw.randrange(2, 100) for _ in range(3))
            kind = draw.randrange(4)
            if kind == 0:
                lines.append(f"{a} + {b} = {a + b}")
            elif kind == 1:
                lines.append(f"{a} * {b} = {a * b}")
            elif kind == 2:
                lines.append(f"({a} + {b}) * {c} = {(a + b) * c}")
            else:
                lines.append(f"{a * b} / {a} = {b}")
        yield "\n".join(lines)
