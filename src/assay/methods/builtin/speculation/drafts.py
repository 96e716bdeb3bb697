"""Drafts: guesses of the next tokens, from the text so far (prompt look-up) or from a small model."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from assay import checks
from assay.methods.builtin.decode_loop import Sampling
from assay.methods.builtin.speculation.engines import ModelEngine
from assay.methods.builtin.speculation.verification import pick, probabilities

NGRAM = 3  # tokens that must match, at most; our choice
MOST_NGRAM = 16


class Drafter(Protocol):
    """Makes drafts of one sequence. `cost` is that of drafting a token, as a share of a pass of the model it drafts for."""

    cost: float

    def add(self, tokens: Iterable[int]) -> None:
        """Take in the next tokens of the sequence."""
        ...

    def draft(self, count: int, sampling: Sampling | None) -> tuple[list[int], Tensor | None]:
        """Up to `count` next tokens, and the probabilities they were drawn from, (tokens, vocabulary), or None if they were not."""
        ...


def propose(tokens: Sequence[int], count: int, *, ngram: int = NGRAM) -> list[int]:
    """Up to `count` tokens that may follow `tokens`: those that followed the last `ngram` tokens when they stood there before.

    Where they did not, the last `ngram` - 1 are looked for, and so on down to two (one, if `ngram` is 1; our choice: what follows a
    single token says little); of several places the latest counts. A match that reaches the end of the text goes on in the draft
    itself, as text that repeats itself does. Empty when nothing matches. Pure, but it reads all tokens: for a sequence
    that grows, keep a `Lookup`, which takes the same time for every token.
    Raises TypeError for what is no whole number, ValueError for count < 0 or an `ngram` outside 1 to 16.

    >>> propose([7, 1, 2, 3, 4, 9, 1, 2], 3), propose([1, 2, 1, 2], 5), propose([1, 2, 3], 4)
    ([3, 4, 9], [1, 2, 1, 2, 1], [])
    """
    return Lookup(tokens, ngram=ngram).propose(count)


class Lookup:
    """The index behind `propose`: it remembers where each run of two to `ngram` tokens stood last, and grows with the sequence."""

    cost = 0.0

    def __init__(self, tokens: Iterable[int] = (), *, ngram: int = NGRAM) -> None:
        self.ngram = checks.whole("ngram", ngram, low=1, high=MOST_NGRAM)
        self.shortest = min(2, self.ngram)
        self.tokens: list[int] = []
        self._follows: dict[tuple[int, ...], int] = {}  # where the token after a run stands
        self.add(tokens)

    def add(self, tokens: Iterable[int]) -> None:
        """Take in the next tokens of the sequence. Raises TypeError for one that is no whole number."""
        seen = self.tokens
        for token in tokens:
            try:
                new = operator.index(token)
            except TypeError:
                raise TypeError(f"tokens must be whole numbers, got {checks.shown(token)}") from None
            end = len(seen)
            # a run is entered once its next token is there, so that the end of the text does not find itself
            for length in range(self.shortest, min(self.ngram, end) + 1):
                self._follows[tuple(seen[end - length :])] = end
            seen.append(new)

    def propose(self, count: int) -> list[int]:
        """See the function `propose`."""
        count, seen = checks.whole("count", count, low=0), self.tokens
        for length in range(min(self.ngram, len(seen)), self.shortest - 1, -1):
            if (start := self._follows.get(tuple(seen[-length:]))) is not None:
                draft = seen[start : start + count]
                while len(draft) < count:
                    draft.append(draft[start + len(draft) - len(seen)])
                return draft
        return []

    def draft(self, count: int, sampling: Sampling | None) -> tuple[list[int], Tensor | None]:
        return self.propose(count), None


class DraftModel:
    """A small causal model of transformers with the vocabulary of the one it drafts for (`same_vocabulary`).

    It draws with the sampling it is asked for, and greedily where that is None. It keeps a cache of its own, in which those tokens of
    the last draft stay that came true. When the sequence is as long as its positions go, it has nothing to say.
    Raises ValueError for a model whose cache cannot be cropped.
    """

    def __init__(self, model: nn.Module, tokens: Iterable[int] = (), *, cost: float = 0.0) -> None:
        self.cost = checks.number("cost", cost, low=0)
        self.tokens: list[int] = list(tokens)
        self._engine = ModelEngine(model)
        self._told = 0  # tokens of the sequence that the engine holds
        self._guessed: list[int] = []  # and those of the last draft that it holds after them

    def add(self, tokens: Iterable[int]) -> None:
        self.tokens.extend(tokens)

    def draft(self, count: int, sampling: Sampling | None) -> tuple[list[int], Tensor | None]:
        limit = self._engine.limit
        if limit is not None:
            count = min(count, limit - len(self.tokens) + 1)
        if count < 1 or not self.tokens:
            return [], None
        came_true = 0
        for guessed, token in zip(self._guessed, self.tokens[self._told :], strict=False):
            if guessed != token:
                break
            came_true += 1
        stands = min(self._told + came_true, len(self.tokens) - 1)
        self._engine.crop(stands)
        scores = self._engine.extend(self.tokens[stands:], last=True)[0]
        draft: list[int] = []
        drawn_from: list[Tensor] = []
        while True:
            if sampling is None:
                draft.append(int(scores.argmax()))
            else:
                drawn_from.append(probabilities(scores, sampling))
                draft.append(pick(drawn_from[-1], float(torch.rand((), dtype=torch.float64))))
            if len(draft) == count:
                break
            scores = self._engine.extend(draft[-1:])[0]
        self._told, self._guessed = len(self.tokens), draft[:-1]
        return draft, torch.stack(drawn_from) if drawn_from else None


def same_vocabulary(
    model: nn.Module, draft_model: nn.Module, tokenizer: Any = None, draft_tokenizer: Any = None
) -> None:
    """Raise ValueError unless the two models know the same tokens: as many of them, and those of the tokenizers, if both are given.

    Without tokenizers only the sizes can be compared. A draft model with other tokens costs time and no correctness: the model
    rejects what it does not mean.
    """
    sizes = [_vocabulary(each) for each in (model, draft_model)]
    if sizes[0] != sizes[1]:
        raise ValueError(f"draft_model must have the model's vocabulary of {sizes[0]} tokens, got one of {sizes[1]}")
    if tokenizer is None or draft_tokenizer is None:
        return
    own, other = tokenizer.get_vocab(), draft_tokenizer.get_vocab()
    if own != other:
        text, place = min(set(own.items()) ^ set(other.items()), key=lambda item: (item[1], item[0]))
        raise ValueError(f"draft_tokenizer must know the same tokens as tokenizer; they differ in {text!r} ({place})")


def _vocabulary(model: Any) -> int:
    return int(model.config.get_text_config(decoder=True).vocab_size)
