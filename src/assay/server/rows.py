"""What the scheduler runs: rows. How their tokens are chosen (`Settings`), what they tell (`Event`), and what is kept of each (`Row`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from torch import Tensor

from assay import checks
from assay.methods.builtin.decode_loop import Sampling
from assay.methods.builtin.decode_loop.choosing import MOST_K
from assay.methods.core.generation.paged import Sequence, pages_for

COLDEST = 1e-5  # a temperature above 0 and under this is refused: dividing by it may overflow


@dataclass(frozen=True)
class Settings:
    """How one answer's tokens are chosen. Greedy at temperature 0; the seed is any whole number of 64 bits.

    `ends` are the tokens that end an answer, from its `min_tokens`-th token on. `logprobs` asks for the log-probability of each token
    and the n best beside it, in the model's own distribution (temperature 1, no penalties or bias), `prompt_logprobs` for the same of
    the prompt's tokens. `choose` replaces the choice: (logits (vocab,) float32 after bias and penalties, tokens made so far) -> token.
    `tenant` names the model where the backend has several.
    Raises ValueError or TypeError naming the setting that is wrong.
    """

    max_tokens: int
    min_tokens: int = 0
    ends: frozenset[int] = frozenset()
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logprobs: int | None = None
    prompt_logprobs: bool = False
    choose: Callable[[Tensor, list[int]], int] | None = None
    tenant: str = ""

    def __post_init__(self) -> None:
        checks.whole("max_tokens", self.max_tokens, low=0)
        checks.whole("min_tokens", self.min_tokens, low=0, high=self.max_tokens)
        for token in self.ends:
            checks.whole("ends", token, low=0)
        if 0 < checks.number("temperature", self.temperature, low=0) < COLDEST:
            raise ValueError(f"temperature must be 0 (greedy) or at least {COLDEST}, got {self.temperature}")
        checks.number("top_p", self.top_p, above=0, high=1)
        checks.whole("top_k", self.top_k, low=0, high=MOST_K)
        checks.whole("seed", self.seed, low=-(1 << 63), high=(1 << 64) - 1)
        for token, bias in self.logit_bias.items():
            checks.whole("logit_bias", token, low=0)
            checks.number("logit_bias", bias)
        checks.number("presence_penalty", self.presence_penalty)
        checks.number("frequency_penalty", self.frequency_penalty)
        if self.logprobs is not None:
            checks.whole("logprobs", self.logprobs, low=0)
        checks.flag("prompt_logprobs", self.prompt_logprobs)
        if self.choose is not None and not callable(self.choose):
            raise TypeError(f"choose must be a function or None, got {checks.shown(self.choose)}")

    @property
    def adjusts(self) -> bool:
        """Whether something is added to the model's logits before a token is chosen."""
        return bool(self.logit_bias or self.presence_penalty or self.frequency_penalty)


@dataclass(frozen=True)
class TokenInfo:
    """A token, its log-probability, and the most probable tokens with theirs, best first."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class Event:
    """What a row has to say: new tokens (an end token included), and with the last of them why it ended; or an error.

    `infos` has one entry a token where log-probabilities were asked for. `prompt_infos` comes with the first event where asked for, one
    entry a token of the prompt, None for the first. `cached_tokens` are those of the prompt that were not computed anew.
    """

    tokens: tuple[int, ...] = ()
    infos: tuple[TokenInfo, ...] = ()
    prompt_infos: tuple[TokenInfo | None, ...] | None = None
    finish: Literal["stop", "length"] | None = None
    error: Exception | None = None
    cached_tokens: int = 0


@dataclass(eq=False)
class Row:
    """An answer on its way: what was asked, the tokens made so far, and its place in memory while it has one."""

    ids: list[int]
    settings: Settings
    on_event: Callable[[Event], None]
    sampling: Sampling | None
    uniforms: Any  # (max_tokens,) float64 in [0, 1) where it samples
    special: bool  # its tokens are chosen from logits here, not by the backend
    made: list[int] = field(default_factory=list)
    sequence: Sequence | None = None
    first: Tensor | None = None  # logits (1, vocab) after the prompt, for rows with the same one
    adjust: Tensor | None = None  # (vocab,) what bias and penalties add
    seen: set[int] = field(default_factory=set)  # tokens that a presence penalty has met
    prompt_infos: list[TokenInfo | None] | None = None  # until they are told
    guesses: Any = None  # its drafts, where the recipe speculates
    cached: int = 0
    known: bool = False  # its prompt has been counted
    left: bool = False

    @classmethod
    def of(cls, ids: list[int], settings: Settings, on_event: Callable[[Event], None]) -> Row:
        """The row of a prompt. The i-th token it draws is drawn by the i-th number of its own stream (Philox, keyed by its seed)."""
        samples = settings.temperature > 0 and settings.choose is None
        sampling = Sampling(settings.temperature, settings.top_k, settings.top_p) if samples else None
        stream = np.random.Generator(np.random.Philox(key=settings.seed % (1 << 64))) if samples else None
        uniforms = None if stream is None else stream.random(settings.max_tokens)
        special = settings.logprobs is not None or settings.choose is not None or settings.adjusts
        return cls(ids, settings, on_event, sampling, uniforms, special)

    def tokens(self) -> int:
        """Tokens in memory before the next step: the prompt and all that was made but the last."""
        return len(self.ids) + max(0, len(self.made) - 1)

    def pages(self) -> int:
        """The most pages it can come to use."""
        return pages_for(len(self.ids) + max(0, self.settings.max_tokens - 1))

    def lacks(self, steps: int) -> int:
        """Pages it needs for so many steps and has not."""
        return (
            0 if self.sequence is None else max(0, pages_for(self.sequence.length + steps) - len(self.sequence.pages))
        )

    def held_back(self) -> bool:
        """Whether it may not end yet."""
        return len(self.made) < self.settings.min_tokens and bool(self.settings.ends)

    def wants_prompt(self) -> bool:
        """Whether all of its prompt's logits are needed."""
        return self.settings.prompt_logprobs and not self.made
