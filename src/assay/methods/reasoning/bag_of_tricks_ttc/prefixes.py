"""Samples at many temperatures for little more than one: no prefix of a prompt's answers is read twice.

A grid over temperatures asks a model for the same prompt again and again, and short answers share their beginnings. `SharedPrefixes` keeps
what the model said behind each beginning, so that a setting pays only for beginnings that no setting before it met.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from assay import checks
from assay.methods.core.generation.cache import left_pad
from assay.methods.core.generation.loop import padding_token, prefill
from assay.methods.core.generation.slices import cache_of, layers_of, selected, tensors_of
from assay.methods.core.reasoning.generator import (
    Growing,
    Sample,
    Sampling,
    TransformersGenerator,
    end_tokens,
    seed_of,
)

_LIKELIEST = 128  # tokens that are looked at first for a nucleus: it seldom holds more

Place = tuple[int, tuple[int, ...]]
"""A prompt's number, and a beginning of its answers."""


@dataclass
class _Known:
    """What is known behind some prompts: their caches, and of every beginning that was met its logits, keys and values."""

    encoded: list[list[int]]
    cache: Any
    mask: Tensor
    logits: dict[Place, Tensor]
    behind: dict[Place, Tensor] = field(default_factory=dict)  # (layers, 2, heads, tokens, dim)
    draws: dict[tuple[Place, float, float], tuple[Tensor, Tensor]] = field(default_factory=dict)


class SharedPrefixes:
    """The samples of a `TransformersGenerator`; each beginning of an answer is run through the model once for all samples and settings.

    Samples have the same random streams as the generator's own, so they are the same up to rounding, and they are charged for what they
    would have cost alone; `seconds` are those of the call, shared equally. The prompts of the last call are remembered, with the logits
    of every beginning (a vocabulary's worth each), until weights change: ask for all settings of some prompts, then for the next. Examples
    that all prompts begin with are read once. Our own addition.

    Raises ValueError as the generator does, and TypeError for a model whose cache is not keys and values token by token.

    When NOT to use it: for answers of more than some twenty tokens, which share little, and for many prompts a call: what is kept grows
    with both.
    """

    def __init__(self, generator: TransformersGenerator) -> None:
        self.generator = generator
        self.rows = 0
        """Beginnings that the model was asked about."""
        self._asked: Any = None  # the prompts, and the weights' places and versions
        self._known: _Known | None = None

    @property
    def name(self) -> str:
        """The generator's: its samples are meant."""
        return self.generator.name

    @torch.no_grad()
    def __call__(
        self, prompts: Sequence[str], sampling: Sampling, *, n: int = 1, first: int = 0, seed: int = 0
    ) -> list[list[Sample]]:
        """As `Generator` has it."""
        n, first = checks.whole("n", n, low=1), checks.whole("first", first, low=0)
        seed = checks.whole("seed", seed)
        if not prompts:
            return []
        began = time.perf_counter()
        known = self._of(prompts, sampling)
        ends = end_tokens(self.generator.model)
        streams = [
            torch.Generator().manual_seed(seed_of(seed, prompt, number))
            for prompt in prompts
            for number in range(first, first + n)
        ]
        texts = [Growing(self.generator.tokenizer, sampling.stop) for _ in streams]
        alive = list(range(len(texts)))
        while alive:
            at = [(i // n, tuple(texts[i].tokens)) for i in alive]
            self._ask(known, [place for place in dict.fromkeys(at) if place not in known.logits])
            for i, place in zip(alive, at, strict=True):
                token = _drawn(known, place, sampling, streams[i])
                logprob = float(known.logits[place][token])
                texts[i].add(token, logprob, ends, sampling.max_new_tokens)
            alive = [i for i in alive if not texts[i].ended]
        seconds = (time.perf_counter() - began) / len(texts)
        return [
            [text.sample(len(own) if not k else 0, seconds) for k, text in enumerate(texts[i * n : (i + 1) * n])]
            for i, own in enumerate(known.encoded)
        ]

    def _of(self, prompts: Sequence[str], sampling: Sampling) -> _Known:
        encoded = [self.generator._encode(prompt, sampling) for prompt in prompts]  # also looks whether they fit
        asked = tuple(prompts), tuple((each.data_ptr(), each._version) for each in self.generator.model.parameters())
        if self._known is None or self._asked != asked:
            self._asked, self._known = asked, self._read(encoded)
        return self._known

    def _read(self, encoded: list[list[int]]) -> _Known:
        """Read prompts; what all of them begin with is read once."""
        model = self.generator.model
        shared = min(_common(encoded[0], own[:-1]) for own in encoded)
        if not shared:
            ids, mask = left_pad(encoded, padding_token(model), model.device)
            read = prefill(model, ids, mask)
            assert read.logits is not None
            cache, mask, logits = read.cache, read.attention_mask, read.logits
        else:
            once = prefill(model, *left_pad([encoded[0][:shared]], padding_token(model), model.device))
            ids, own = left_pad([each[shared:] for each in encoded], padding_token(model), model.device)
            mask = torch.cat([own.new_ones(len(encoded), shared), own], 1)
            out = model(
                input_ids=ids,
                attention_mask=mask,
                position_ids=(mask.cumsum(-1) - 1).clamp(min=0)[:, shared:],
                cache=selected(once.cache, [0] * len(encoded)),
                use_cache=True,
            )
            cache, logits = out.cache, out.logits[:, -1]
        said = logits.float().log_softmax(-1)
        return _Known(encoded, cache, mask, {(i, ()): row for i, row in enumerate(said)})

    def _ask(self, known: _Known, places: Sequence[Place]) -> None:
        """The logits behind beginnings of one length, of which all but the last token was asked about before."""
        for start in range(0, len(places), self.generator.batch):
            rows = places[start : start + self.generator.batch]
            of = [i for i, _ in rows]
            length = len(rows[0][1])
            cache = selected(known.cache, of)
            if length > 1:
                behind = torch.stack([known.behind[i, prefix[:-1]] for i, prefix in rows], 2)
                cache = cache_of(
                    [
                        (torch.cat([keys, more[0]], 2), torch.cat([values, more[1]], 2))
                        for (keys, values), more in zip(_pairs(cache), behind, strict=True)
                    ]
                )
            mask = torch.cat([known.mask[of], known.mask.new_ones(len(rows), length)], 1)
            out = self.generator.model(
                input_ids=torch.tensor([[prefix[-1]] for _, prefix in rows], device=mask.device),
                attention_mask=mask,
                position_ids=mask.sum(-1, keepdim=True) - 1,
                cache=cache,
                use_cache=True,
            )
            known.logits.update(zip(rows, out.logits[:, -1].float().log_softmax(-1), strict=True))
            grown = [torch.stack(pair)[:, :, :, -length:] for pair in _pairs(out.cache)]
            known.behind.update(zip(rows, torch.stack(grown).unbind(2), strict=True))
            self.rows += len(rows)


def _pairs(cache: Any) -> list[tuple[Tensor, Tensor]]:
    found = [tensors_of(layer, i) for i, layer in enumerate(layers_of(cache))]
    return [(each["keys"], each["values"]) for each in found]


def _common(first: Sequence[int], second: Sequence[int]) -> int:
    """How many tokens two texts begin with alike."""
    return next(
        (i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), min(len(first), len(second))
    )


def _drawn(known: _Known, place: Place, sampling: Sampling, stream: torch.Generator) -> int:
    """A token as `generator.choose` draws it, with the nucleus and its sums worked out once."""
    logits = known.logits[place]
    if not sampling.temperature:
        return int(logits.argmax())
    key = place, sampling.temperature, sampling.top_p
    if key not in known.draws:
        known.draws[key] = _sums(logits, sampling)
    tokens, mass = known.draws[key]
    where = torch.rand(1, generator=stream, dtype=torch.float64).to(mass.device)
    return int(tokens[torch.searchsorted(mass, where * mass[-1:], right=True).clamp(max=len(mass) - 1)])


def _sums(logits: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """The tokens that may be drawn, in the order of the vocabulary, and the running sums of their probabilities."""
    shares = (logits / sampling.temperature).softmax(-1)
    if sampling.top_p == 1:
        return torch.arange(len(shares), device=shares.device), shares.double().cumsum(-1)
    ordered, places = shares.topk(min(_LIKELIEST, len(shares)))
    if float(ordered.sum()) < sampling.top_p:
        ordered, places = shares.sort(-1, descending=True)
    tokens = places[ordered.cumsum(-1) - ordered < sampling.top_p].sort().values
    return tokens, shares[tokens].double().cumsum(-1)
