"""Text of tokens that come one by one, and the strings that end it.

Both keep what they are given piece by piece apart from what is certain: pieces already returned never change.
"""

from __future__ import annotations

from collections.abc import Set
from typing import Any

UNFINISHED = "\ufffd"  # what a decoder puts for bytes that are no character (yet)


class Stops:
    """Finds the string that is whole first in a text that comes in pieces, holding back what may be the beginning of one.

    Of two that are whole at once, it is the longer; so the answer does not depend on how the text is cut into pieces.
    """

    def __init__(self, stops: tuple[str, ...]) -> None:
        self.stops, self.held, self.met = stops, "", False

    def add(self, text: str) -> str:
        """What is certain to be part of the answer; after `met`, nothing."""
        if self.met:
            return ""
        self.held += text
        found = [(at + len(stop), at) for stop in self.stops if (at := self.held.find(stop)) >= 0]
        if found:
            self.met, keep = True, len(self.held) - min(found)[1]
        else:
            beginnings = (n for stop in self.stops for n in range(1, len(stop)) if self.held.endswith(stop[:n]))
            keep = max(beginnings, default=0)
        sure, self.held = self.held[: len(self.held) - keep], self.held[len(self.held) - keep :]
        return sure

    def rest(self) -> str:
        """What was held back, when no more text comes."""
        return "" if self.met else self.held


class Text:
    """Text of tokens that arrive one by one after a prompt. Pieces already returned never change; joined, they are the whole text.

    Some tokens before the new ones are decoded with them, since decoders treat the beginning of a text in their own ways (a
    leading space), and bytes that do not make a character yet wait for the next token. Tokens without text, special ones, are
    passed over, so that it is never they alone that are decoded before the next.
    """

    def __init__(self, tokenizer: Any, prompt: list[int], silent: Set[int] | None = None) -> None:
        self.tokenizer = tokenizer
        self.silent = silent_tokens(tokenizer) if silent is None else silent
        self.window = prompt[-4:]
        self.clean = 0  # a place in the window where a character begins
        self.given = len(self.window)  # tokens whose text was given
        self.shown = len(self._decode())  # characters of the window's text that were given

    def add(self, token: int) -> str:
        """The text that this token makes certain."""
        if token in self.silent:
            return ""
        self.window.append(token)
        text = self._decode()
        # a character has four bytes, so what stays broken for long is no character and is given as it is
        if text.endswith(UNFINISHED) and len(self.window) < self.given + 16:
            return ""
        new, self.shown = text[self.shown :], max(self.shown, len(text))
        if len(self.window) >= self.clean + 8:
            self.window = self.window[self.clean :]
            self.clean, self.shown = len(self.window), len(self._decode())
        self.given = len(self.window)
        return new

    def rest(self) -> str:
        """What waited, when no more tokens come."""
        return self._decode()[self.shown :]

    def _decode(self) -> str:
        options = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
        return str(self.tokenizer.decode(self.window, **options))


def silent_tokens(tokenizer: Any) -> frozenset[int]:
    """The special tokens of a tokenizer, which have no text."""
    return frozenset(token for token, added in tokenizer.added_tokens_decoder.items() if added.special)
