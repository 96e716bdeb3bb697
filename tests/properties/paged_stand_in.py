"""Plain torch in place of the compiled decoder, and a toy model in whole numbers, for tests of what schedules rows on them.

`Decoder` computes a step by the model's own forward pass over what it reads from the pages, row by row, so that a wrong page, a wrong
length or a page somebody else wrote to changes the answer. `Toy` is a language model whose best token depends on every token and
position before it, in exact arithmetic: `toy_answer` says what it answers, in plain Python.
"""

from __future__ import annotations

import contextlib
import types
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache

from assay.methods.builtin.decode_loop import Sampling, draw_in_torch
from assay.methods.core.generation import paged


@contextlib.contextmanager
def _lengths_kept(sequences):
    """Within this context, what raises leaves all lengths as they were."""
    before = [sequence.length for sequence in sequences]
    try:
        yield
    except Exception:
        for sequence, length in zip(sequences, before, strict=True):
            sequence.length = length
        raise


def _check(scores):
    if not bool(scores.max().isfinite()):
        raise ValueError("the logits are not finite: the weights or the keys and values hold NaN or infinity")


class Decoder:
    """The decoder's interface over a model with `layers`, `kv_heads` and `head_size`; a row is computed alone, token by token."""

    def __init__(
        self,
        model: nn.Module,
        *,
        layers: int,
        kv_heads: int,
        head_size: int,
        vocab: int,
        positions: int,
        dtype: torch.dtype,
    ):
        self.model: Any = model
        self.shape = {"layers": layers, "kv_heads": kv_heads, "head_size": head_size}
        self.dtype, self.vocab, self.max_positions = dtype, vocab, positions
        self.page_bytes = 2 * layers * kv_heads * head_size * 16 * torch.finfo(dtype).bits // 8
        self.calls: list[tuple[str, Any]] = []  # ("run", rows) and ("extend", tokens)

    def new_pool(self, pages: int):
        return paged.PagePool(**self.shape, pages=pages, dtype=self.dtype)

    def run(self, pool, sequences, tokens, steps, *, eos=(), no_end=0, sampling=None, uniforms=None, want_logits=False):
        self.calls.append(("run", len(sequences)))
        for sequence in sequences:
            if len(sequence.pages) * 16 < sequence.length + steps:
                raise ValueError(f"{len(sequence.pages)} pages have no room for {sequence.length} + {steps} positions")
        answers = torch.full((len(sequences), steps), -1)
        logits = torch.empty(len(sequences) if want_logits else 0, self.vocab)
        with _lengths_kept(sequences):
            for row, (sequence, token) in enumerate(zip(sequences, tokens, strict=True)):
                how = sampling[row] if isinstance(sampling, list) else sampling
                for step in range(steps):
                    scores = self._step(pool, sequence, token)
                    _check(scores)
                    if want_logits:
                        logits[row] = scores
                    if step < no_end:
                        scores[list(eos)] = -torch.inf
                    if how is None:
                        token = int(scores.argmax())
                    else:
                        token = int(draw_in_torch(scores[None], how, uniforms[row, step : step + 1]))
                    answers[row, step] = token
                    if token in eos:
                        break
        return answers, logits

    def extend(self, pool, feeds, *, logits):
        assert logits in ("none", "all")
        self.calls.append(("extend", sum(len(tokens) for _, tokens in feeds)))
        made = []
        with _lengths_kept([sequence for sequence, _ in feeds]):
            for sequence, tokens in feeds:
                for token in tokens:
                    made.append(self._step(pool, sequence, token))
                    if logits == "all":
                        _check(made[-1])
        return torch.stack(made) if logits == "all" else torch.empty(0, self.vocab)

    def _step(self, pool, sequence, token) -> Tensor:
        cache, at = DynamicCache(), sequence.length
        for layer, (keys, values) in enumerate(zip(*pool.read(sequence.pages, 0, at), strict=True)):
            cache.update(keys[None].float(), values[None].float(), layer)
        position = torch.tensor([[at]])
        out = self.model(
            input_ids=torch.tensor([[token]]), position_ids=position, cache=cache, use_cache=True, logits_to_keep=1
        )
        keys, values = (
            torch.stack([getattr(layer, name)[0, :, at:] for layer in cache.layers]) for name in ("keys", "values")
        )
        pool.write(sequence.pages, at, keys, values)
        sequence.length += 1
        return out.logits[0, -1].float()


class Toy(nn.Module):
    """See `toy_logits`. Keys hold positions and values tokens, small whole numbers that bfloat16 keeps as they are."""

    VOCAB, POSITIONS = 97, 512

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(self.VOCAB, 16)
        self.broken: Exception | None = None  # raised by the next pass
        self.strange = False  # the next logits are NaN
        self.poison: int | None = None  # a token after which all logits are

    def get_input_embeddings(self) -> nn.Module:
        return self.embedding

    def forward(self, input_ids, position_ids, cache, use_cache, logits_to_keep=0):
        if self.broken is not None:
            broken, self.broken = self.broken, None
            raise broken
        new = input_ids.shape[1]
        keys, values = (
            torch.zeros(1, 1, new, 16).index_fill_(3, torch.tensor([1]), 1.0) * numbers.float()[:, None, :, None]
            for numbers in (position_ids % 251, input_ids)
        )
        keys, values = cache.update(keys, values, 0)
        places, tokens = keys[0, 0, :, 1].double(), values[0, 0, :, 1].double()
        terms = (tokens + 1) * (places * places + 3 * places + 7) % 1009
        state = terms.cumsum(0)[-new:] % 100 + 1
        logits = (state[:, None] * torch.arange(1, self.VOCAB + 1) % 101).float() / 8
        if self.strange:
            logits, self.strange = logits * torch.nan, False
        if self.poison is not None:
            logits[((tokens == self.poison).cumsum(0) > 0)[-new:]] = torch.nan
        return types.SimpleNamespace(
            logits=logits[None, -logits_to_keep:] if logits_to_keep else logits[None], cache=cache
        )

    def decoder(self, dtype: torch.dtype = torch.bfloat16) -> Decoder:
        shape = {"layers": 1, "kv_heads": 1, "head_size": 16}
        return Decoder(self, **shape, vocab=self.VOCAB, positions=self.POSITIONS, dtype=dtype)


def toy_logits(tokens: list[int]) -> list[float]:
    """What `Toy` says after these tokens: no two values are equal."""
    places = (at % 251 for at in range(len(tokens)))
    total = sum((token + 1) * (at * at + 3 * at + 7) % 1009 for token, at in zip(tokens, places, strict=True))
    return [(total % 100 + 1) * (token + 1) % 101 / 8 for token in range(Toy.VOCAB)]


def toy_answer(ids: list[int], settings: Any) -> list[int]:
    """The answer of `Toy` to a prompt alone, by the rules of `assay.server.rows.Settings`, written down once more."""
    made: list[int] = []
    numbers = np.random.Generator(np.random.Philox(key=settings.seed % 2**64)).random(settings.max_tokens)
    while len(made) < settings.max_tokens:
        scores = torch.tensor(toy_logits(ids + made))
        for token, bias in settings.logit_bias.items():
            scores[token] += bias
        for token in set(made):
            scores[token] -= settings.presence_penalty + made.count(token) * settings.frequency_penalty
        if len(made) < settings.min_tokens:
            scores[list(settings.ends)] = -torch.inf
        if settings.choose is not None:
            token = settings.choose(scores, list(made))
        elif settings.temperature:
            how = Sampling(settings.temperature, settings.top_k, settings.top_p)
            token = int(draw_in_torch(scores[None], how, torch.tensor([numbers[len(made)]])))
        else:
            token = int(scores.argmax())
        made.append(token)
        if token in settings.ends:
            break
    return made
