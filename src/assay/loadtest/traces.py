"""What is asked and when: prompts of real text that never repeat, arrivals at random, and trace files.

A server that has seen a prompt, or its beginning, may keep what it computed and answer a hundred times faster than it would answer
its users. Every prompt therefore begins with a word that no other one has, and the seed of a run is a fresh one unless it is given.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from assay import checks
from assay.errors import InputError

CHARACTERS = 4.0  # to a token, where the server does not count
LETTERS = "abcdefghijklmnopqrstuvwxyz"
WORD = 8  # letters of the word each prompt begins with
STEP = 165_580_141  # coprime to the number of such words, so that none occurs twice
MOST_TOKENS = 1 << 20
FIELDS = ("at", "prompt", "prompt_tokens", "new_tokens")


@dataclass(frozen=True)
class Request:
    """A prompt and how many tokens to generate after it; `at` is when it is to be sent, in seconds after the start of its run."""

    prompt: str
    new_tokens: int
    at: float = 0.0


@dataclass(frozen=True)
class Line:
    """A line of a trace: its own prompt, or how long one is to be made up."""

    new_tokens: int
    prompt: str | None = None
    prompt_tokens: int | None = None
    at: float | None = None


@dataclass(frozen=True)
class Lengths:
    """Whole numbers from `low` to `high`, each as likely."""

    low: int
    high: int

    def draw(self, chance: random.Random) -> int:
        return chance.randint(self.low, self.high)


def lengths_of(text: str, name: str) -> Lengths:
    """The lengths in "128..256" or "128". Raises InputError, naming the option, for anything else.

    >>> lengths_of("128..256", "--new-tokens")
    Lengths(low=128, high=256)
    """
    low, found, high = text.partition("..")
    if not low.isdecimal() or not (high if found else low).isdecimal() or len(text) > 20:
        raise InputError(f"{name} must be a whole number, or two as in 128..256, got {text[:100]!r}")
    lengths = Lengths(int(low), int(high) if found else int(low))
    if not 1 <= lengths.low <= lengths.high <= MOST_TOKENS:
        raise InputError(f"{name} must be at least 1, at most {MOST_TOKENS}, and in order, got {text!r}")
    return lengths


class Prompts:
    """Prompts of about as many tokens as asked for: Python's sources and documentation, from lines chosen at random.

    Each begins with a word of its own. `characters` are those of a token, as far as is known of the server's tokenizer.

    >>> prompts = Prompts(seed=1)
    >>> (one,), (two, three) = prompts.alike(20, 1), prompts.alike(20, 2)
    >>> len({one, two, three}), [len(text) for text in (one, two, three)], two[WORD + 3 :] == three[WORD + 3 :]
    (3, [80, 80, 80], True)
    """

    def __init__(self, seed: int, characters: float = CHARACTERS) -> None:
        from assay.workloads.text import code_text, english_text

        self.texts = (code_text(), english_text())
        self.chance = random.Random(f"prompts {seed}")
        self.characters = characters
        self._words = self.chance.randrange(len(LETTERS) ** WORD)

    def alike(self, tokens: int, count: int) -> tuple[str, ...]:
        """Prompts that differ in the word they begin with, and in nothing else."""
        text = self._text(tokens)
        return tuple(self._begun(text) for _ in range(count))

    def _text(self, tokens: int) -> str:
        """Text of `tokens` tokens, less the beginning; it starts with a line, and wraps around at the end."""
        size = max(round(tokens * self.characters) - WORD - 3, 1)
        text = self.chance.choice(self.texts)
        start = text.find("\n", self.chance.randrange(len(text))) + 1
        parts = [text[start : start + size]]
        while sum(map(len, parts)) < size:
            parts.append(text[: size - sum(map(len, parts))])
        return "".join(parts)

    def _begun(self, text: str) -> str:
        """`text` behind the next word, whose first letter is not that of the last word."""
        self._words = (self._words + STEP) % len(LETTERS) ** WORD
        rest, letters = self._words, ""
        for _ in range(WORD):
            rest, letter = divmod(rest, len(LETTERS))
            letters += LETTERS[letter]
        return f"({letters}) {text}"


def arrivals(rate: float, chance: random.Random) -> Iterator[float]:
    """Times of arrival, `rate` of them a second, independent of each other (a Poisson process)."""
    at = 0.0
    while True:
        yield at
        at += chance.expovariate(rate)


def read_trace(path: Path | str) -> list[Line]:
    """The lines of a trace file: JSON objects with `new_tokens`, either `prompt` or `prompt_tokens`, and `at` if they have times.

    Times are seconds after the start, and in order. Raises InputError, naming the file and the line, for anything else.
    """
    try:
        text = Path(path).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError, RuntimeError) as error:
        raise InputError(f"--trace: cannot read {path}: {getattr(error, 'strerror', None) or error}") from None
    found: list[Line] = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            found.append(_line(line))
            if len(found) > 1:
                _in_order(*found[-2:])
        except (ValueError, TypeError, RecursionError) as error:
            raise InputError(f"--trace: {path}, line {number}: {error}") from None
    if not found:
        raise InputError(f"--trace: {path} has no lines")
    return found


def _line(text: str) -> Line:
    try:
        fields = json.loads(text)
    except ValueError:
        raise ValueError("is no JSON") from None
    if not isinstance(fields, dict):
        raise TypeError(f"must be a JSON object, got {checks.shown(fields)}")
    if unknown := sorted(set(fields) - set(FIELDS)):
        raise ValueError(f"may have {', '.join(FIELDS)}; got {', '.join(unknown)[:100]}")
    if ("prompt" in fields) == ("prompt_tokens" in fields):
        raise ValueError("must have either prompt or prompt_tokens")
    if "new_tokens" not in fields:
        raise ValueError("must have new_tokens")
    prompt = fields.get("prompt")
    if "prompt" in fields and (not isinstance(prompt, str) or not prompt):
        raise TypeError(f"prompt must be a text, got {checks.shown(prompt)}")
    tokens: Any = fields.get("prompt_tokens")
    return Line(
        new_tokens=checks.whole("new_tokens", fields["new_tokens"], low=1, high=MOST_TOKENS),
        prompt=prompt,
        prompt_tokens=checks.whole("prompt_tokens", tokens, low=1, high=MOST_TOKENS) if prompt is None else None,
        at=checks.number("at", fields["at"], low=0) if "at" in fields else None,
    )


def _in_order(before: Line, line: Line) -> None:
    if (before.at is None) != (line.at is None):
        raise ValueError("either all lines have a time (at) or none")
    if before.at is not None and line.at is not None and line.at < before.at:
        raise ValueError(f"at must not go back, got {line.at:g} after {before.at:g}")


def repeats(lines: list[Line]) -> int:
    """How many prompts of a trace an earlier line has too.

    >>> repeats([Line(1, "a"), Line(1, "a"), Line(1, "b"), Line(1, prompt_tokens=3), Line(1, prompt_tokens=3)])
    1
    """
    own = [line.prompt for line in lines if line.prompt is not None]
    return len(own) - len(set(own))


def alike(lines: Iterator[Line], prompts: Prompts, servers: int) -> Iterator[tuple[Request, ...]]:
    """The same requests for each server, whose made-up prompts differ in the word they begin with.

    Two addresses may lead to one server, which would otherwise have seen every prompt before.
    """
    for line in lines:
        texts = (line.prompt,) * servers if line.prompt is not None else prompts.alike(line.prompt_tokens or 1, servers)
        yield tuple(Request(text, line.new_tokens, line.at or 0.0) for text in texts)


def made_up(prompt_tokens: Lengths, new_tokens: Lengths, seed: int) -> Iterator[Line]:
    """Lines without end, of lengths chosen at random."""
    chance = random.Random(f"lengths {seed}")
    while True:
        yield Line(new_tokens=new_tokens.draw(chance), prompt_tokens=prompt_tokens.draw(chance))
