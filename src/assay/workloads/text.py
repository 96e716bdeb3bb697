"""Real text that every Python installation has: the standard library's sources, and its language reference as English.

The text is cut, document by document, into three parts that share nothing: held-out (quality), calibration, and prompts (speed
and docstrings). Its words change a little with the Python version; `text_hash` tells which text a figure was measured on.

Windows and prompts begin with what the tokenizer itself puts before a text (usually its beginning-of-sequence token, or nothing),
once; no other special token is added, not even an end of sequence.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import random
import re
import sys
import sysconfig
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch

from assay import checks
from assay.errors import MissingError

Kind = Literal["code", "english"]
Part = Literal["heldout", "calibration", "prompts"]
KINDS: tuple[Kind, ...] = ("code", "english")
PARTS: tuple[Part, ...] = ("heldout", "calibration", "prompts")

Half = Literal["search", "proof"]
HALVES: tuple[Half, ...] = (
    "search",
    "proof",
)  # of the held-out documents: what is chosen on one is judged on the other

SHORTEST_PROMPT, LONGEST_PROMPT = 6, 470  # tokens of a docstring among `mixed_prompts`

_SHARES: dict[Part, float] = {"prompts": 0.5, "heldout": 0.25, "calibration": 0.25}  # of the characters; our choice


def code_text() -> str:
    """Sources of the standard library's public top-level modules, in order of their names."""
    return "\n\n".join(text for _, text in _documents("code"))


def english_text() -> str:
    """Python's language reference (`pydoc_data.topics`), without the paragraphs that its topics repeat."""
    return "\n\n".join(text for _, text in _documents("english"))


def docstrings() -> list[str]:
    """Distinct docstrings of public modules, classes and functions of the standard library (the prompts part), in order.

    They are read from the sources by `ast`; nothing is imported or run.
    """
    return list(_docstrings())


def text_hash() -> str:
    """SHA-256 (hex) of all the text above."""
    return _text_hash()


def long_prompt(tokenizer: Any, tokens: int, *, kind: Kind = "code", seed: int = 0) -> torch.Tensor:
    """A prompt of exactly `tokens` tokens of real text: int64, shape (1, tokens).

    `seed` picks the line where it starts (the text wraps around at its end); the same arguments give the same prompt.
    Raises ValueError for `tokens` < 1, an unknown kind, or more tokens than the text has; TypeError for a length or seed that is
    not a whole number.

    >>> class Words:  # any tokenizer that is called as transformers' are
    ...     def __call__(self, texts, **options):
    ...         return {"input_ids": [[len(word) for word in text.split()] for text in texts] if isinstance(texts, list) else [1]}
    >>> long_prompt(Words(), 100).shape
    torch.Size([1, 100])
    """
    tokens, seed = checks.whole("tokens", tokens, low=1), checks.whole("seed", seed)
    checks.choice("kind", kind, KINDS)
    text = _joined(kind, "prompts")
    start = text.find("\n", random.Random(f"{kind} {seed}").randrange(len(text))) + 1
    return torch.tensor([_first_tokens(tokenizer, text[start:] + "\n\n" + text[:start], tokens, kind)])


def mixed_prompts(tokenizer: Any, n: int = 32, *, longest: int = LONGEST_PROMPT, seed: int = 0) -> list[list[int]]:
    """`n` whole docstrings as token lists, of 6 to `longest` tokens, in a random (arrival) order.

    Lengths are spread evenly over their logarithm, so that every batch mixes short and long ones; no docstring occurs twice.
    Raises ValueError for `n` < 1, `longest` < 6, or more prompts than there are docstrings of such lengths; TypeError for anything
    but a whole number.
    """
    n, seed = checks.whole("n", n, low=1), checks.whole("seed", seed)
    longest = checks.whole("longest", longest, low=SHORTEST_PROMPT)
    chosen, start = random.Random(f"mixed {seed}"), start_tokens(tokenizer)
    whole = (start + ids for ids in _ids_of(tokenizer, docstrings()))
    pool = [ids for ids in whole if SHORTEST_PROMPT <= len(ids) <= longest]
    if n > len(pool):
        raise ValueError(f"n must be at most {len(pool)}, the number of docstrings of fitting length, got {n}")
    chosen.shuffle(pool)
    pool.sort(key=len)  # stable: docstrings of one length stay shuffled
    prompts = []
    for i in range(n):
        share = (i + chosen.random()) / n if 0 < i < n - 1 else float(i > 0)
        target = SHORTEST_PROMPT * (longest / SHORTEST_PROMPT) ** share
        nearest = min(range(len(pool)), key=lambda place: abs(len(pool[place]) - target))
        prompts.append(pool.pop(nearest))
    chosen.shuffle(prompts)
    return prompts


def heldout_windows(tokenizer: Any, *, window: int = 1024, n: int = 8) -> torch.Tensor:
    """Text to measure quality on: int64, shape (n, window); even rows are code, odd rows English.

    Shares no document with `calibration_windows`, `long_prompt` or `docstrings`; rows do not overlap and are spread evenly
    over the text.
    Raises ValueError for `window` < 2, `n` < 1, or more than the held-out text has; TypeError for anything but a whole number.
    """
    return _windows(tokenizer, "heldout", window, n)


def document_windows(tokenizer: Any, half: Half, *, window: int = 1024, n: int = 8) -> torch.Tensor:
    """Held-out text of independent windows: int64, shape (at most n, window), code and English in turn while there is English.

    No two windows share a document, so that they can be resampled as independent draws; "search" and "proof" share none either.
    A window lies within one document, or joins several short ones. There are fewer than `n` where the documents are used
    up: about 15 for the search and 30 for the proof at 512 tokens. Their order is shuffled, so that the first ones are like the rest.
    Raises ValueError for `window` < 2, `n` < 1, another half, or a window longer than all the documents; TypeError for anything
    but a whole number.
    """
    window, n = checks.whole("window", window, low=2), checks.whole("n", n, low=1)
    checks.choice("half", half, HALVES)
    code, english = (_own_documents(tokenizer, kind, half, window, n) for kind in KINDS)
    paired = [row for pair in zip(code, english, strict=False) for row in pair]
    rows = [*paired, *code[len(english) :], *english[len(code) :]][:n]
    if not rows:
        raise ValueError(
            f"a window of {window} tokens is longer than the held-out text of the {half}; ask for a shorter one"
        )
    random.Random(half).shuffle(rows)
    return torch.tensor(rows)


def calibration_windows(tokenizer: Any, *, window: int = 512, n: int = 16) -> torch.Tensor:
    """Text to calibrate on: int64, shape (n, window); even rows are code, odd rows English. See `heldout_windows`."""
    return _windows(tokenizer, "calibration", window, n)


# Documents -------------------------------------------------------------------------------------------------------------


@cache
def _documents(kind: Kind) -> tuple[tuple[str, str], ...]:
    """(name, text) of every document, ordered by name."""
    return tuple(_code_documents() if kind == "code" else _english_documents())


def _code_documents() -> Iterator[tuple[str, str]]:
    folder = Path(sysconfig.get_paths()["stdlib"])
    files = [file for file in sorted(folder.glob("*.py")) if _is_public_module(file.stem)]
    if len(files) < 50:
        raise MissingError(f"the standard library's sources are not in {folder}; use a Python that comes with them")
    for file in files:
        yield file.stem, file.read_text(encoding="utf-8")


def _is_public_module(name: str) -> bool:
    return name in sys.stdlib_module_names and not name.startswith("_")


def _english_documents() -> Iterator[tuple[str, str]]:
    """Topics quote each other at length, so every paragraph is kept only in the longest topic that has it."""
    from pydoc_data.topics import topics

    seen: set[str] = set()
    documents = {}
    for name in sorted(topics, key=lambda name: (-len(topics[name]), name)):
        fresh = []
        for paragraph in re.split(r"\n\s*\n", topics[name].strip("\n")):
            words = " ".join(paragraph.split())
            if words not in seen:
                seen.add(words)
                fresh.append(paragraph)
        if sum(map(len, fresh)) > 200:
            documents[name] = "\n\n".join(fresh)
    yield from sorted(documents.items())


@cache
def _parts(kind: Kind) -> dict[Part, tuple[str, ...]]:
    """Put every document into exactly one part: the longest first, each into the part that is furthest below its share."""
    filled: dict[Part, float] = dict.fromkeys(_SHARES, 0.0)
    part_of: dict[str, Part] = {}
    for name, text in sorted(_documents(kind), key=lambda document: (-len(document[1]), document[0])):
        part = min(_SHARES, key=lambda part: filled[part] / _SHARES[part])
        filled[part] += len(text)
        part_of[name] = part
    return {part: tuple(text for name, text in _documents(kind) if part_of[name] == part) for part in _SHARES}


@cache
def _half(kind: Kind, half: Half) -> tuple[str, ...]:
    """The held-out documents of one half: from the longest to the shortest, every third is the search's, the others the proof's."""
    documents = sorted(_parts(kind)["heldout"], key=lambda text: (-len(text), text))
    return tuple(text for place, text in enumerate(documents) if (place % 3 == 0) == (half == "search"))


@cache
def _joined(kind: Kind, part: Part) -> str:
    return "\n\n".join(_parts(kind)[part])


@cache
def _docstrings() -> tuple[str, ...]:
    return tuple(
        dict.fromkeys(text for source in _parts("code")["prompts"] for text in _docstrings_of(ast.parse(source)))
    )


def _docstrings_of(node: ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) -> Iterator[str]:
    text = ast.get_docstring(node, clean=False)
    if text and text.strip():
        yield inspect.cleandoc(text)
    if isinstance(node, ast.Module | ast.ClassDef):
        for child in node.body:
            if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and child.name[0] != "_":
                yield from _docstrings_of(child)


@cache
def _text_hash() -> str:
    return hashlib.sha256(f"{code_text()}\0{english_text()}".encode()).hexdigest()


# Tokens ----------------------------------------------------------------------------------------------------------------


def _ids_of(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    ids: list[list[int]] = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    return ids


def start_tokens(tokenizer: Any) -> list[int]:
    """The tokens this tokenizer puts before every text: usually a list of its beginning-of-sequence token, or an empty one."""
    whole, bare = tokenizer("a")["input_ids"], tokenizer("a", add_special_tokens=False)["input_ids"]
    for place in range(len(whole) - len(bare) + 1) if bare else ():
        if whole[place : place + len(bare)] == bare:
            return list(whole[:place])
    bos = getattr(tokenizer, "bos_token_id", None)  # a tokenizer that knows no "a"
    return [bos] if bos is not None and whole[:1] == [bos] else []


def encode(tokenizer: Any, text: str) -> list[int]:
    """The token ids a model reads for `text`: the tokens the tokenizer puts before a text, once, then the text, and nothing after it.

    A text that already has a start (from a chat template) does not get a second one, and a text that will be continued
    does not get the end-of-sequence token that some tokenizers add.
    """
    return with_start(start_tokens(tokenizer), _ids_of(tokenizer, [text])[0])


def with_start(start: list[int], ids: list[int]) -> list[int]:
    """`start` followed by `ids`, which may already begin with it.

    >>> with_start([1], [7, 8]), with_start([1], [1, 7, 8]), with_start([], [7, 8])
    ([1, 7, 8], [1, 7, 8], [7, 8])
    """
    return ids if start and ids[: len(start)] == start else start + ids


def _first_tokens(tokenizer: Any, text: str, count: int, kind: Kind) -> list[int]:
    """Exactly the first `count` tokens of `text`, tokenising only as much of it as that takes."""
    start = start_tokens(tokenizer)
    characters = 4 * count + 64
    while True:
        ids = start + _ids_of(tokenizer, [text[:characters]])[0]
        # the last token may depend on what follows the cut
        if len(ids) > count + 8 or (characters >= len(text) and len(ids) >= count):
            return ids[:count]
        if characters >= len(text):
            raise ValueError(f"tokens must be at most {len(ids)}, the length of the {kind} text, got {count}")
        characters *= 2


def _windows(tokenizer: Any, part: Part, window: int, n: int) -> torch.Tensor:
    window, n = checks.whole("window", window, low=2), checks.whole("n", n, low=1)
    counts: dict[Kind, int] = {"code": (n + 1) // 2, "english": n // 2}
    rows = {kind: _spread(tokenizer, kind, part, window, count) for kind, count in counts.items() if count}
    return torch.tensor([rows[KINDS[i % 2]][i // 2] for i in range(n)])


def _own_documents(tokenizer: Any, kind: Kind, half: Half, window: int, count: int) -> list[list[int]]:
    """At most `count` windows of which no two share a document: long documents give one each, short ones are joined."""
    start = start_tokens(tokenizer)
    fresh = checks.whole("window", window, low=len(start) + 1) - len(start)
    rows: list[list[int]] = []
    short: list[int] = []
    for text in _half(kind, half):
        if len(rows) == count:
            break
        ids: list[int] = []
        for begin in (
            text.find("\n", len(text) // 3) + 1,
            0,
        ):  # past the head of the file, where there is enough after it
            if len(ids) < fresh:
                ids = _ids_of(tokenizer, [text[begin : begin + 16 * window]])[0]
        if len(ids) < fresh:
            short += _ids_of(tokenizer, ["\n\n" + text if short else text])[0]
            ids, short = (short, []) if len(short) >= fresh else ([], short)
        if ids:
            rows.append(start + ids[:fresh])
    return rows


def _spread(tokenizer: Any, kind: Kind, part: Part, window: int, count: int) -> list[list[int]]:
    """`count` windows from evenly spread lines of a text, none overlapping another."""
    start = start_tokens(tokenizer)
    fresh = checks.whole("window", window, low=len(start) + 1) - len(start)
    text = _joined(kind, part)
    begins = [text.find("\n", i * len(text) // count) + 1 for i in range(count)]
    pieces = [text[a : min(b, a + 16 * window)] for a, b in zip(begins, [*begins[1:], len(text)], strict=True)]
    rows = _ids_of(tokenizer, pieces)
    if min(map(len, rows)) < fresh:  # the text is nearly used up: spread by tokens, which waste none
        ids = _ids_of(tokenizer, [text])[0]
        if len(ids) < count * fresh:
            raise ValueError(
                f"{count} windows of {window} tokens are more than the {part} {kind} text has ({len(ids)} tokens); "
                "ask for fewer or shorter ones"
            )
        rows = [ids[i * len(ids) // count :] for i in range(count)]
    return [start + row[:fresh] for row in rows]
