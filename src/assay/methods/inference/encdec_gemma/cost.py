"""How many FLOPs a request takes: a prompt of m tokens and an answer of n, by an encoder-decoder and by a decoder-only model.

Counted are matrix products, 2 FLOPs a MAC: linear layers, attention's two products, and the head, which is run on answers alone. A prompt's
attention is counted as it is computed, over all pairs of tokens, masked or not. With a cache, a step attends to what the cache
holds: a window at most, where a layer has one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import T5GemmaForConditionalGeneration

from assay import checks
from assay.methods.core.models.decoder import kinds_of, parts_of
from assay.methods.inference.encdec_gemma.model import EncDecForSeq2SeqLM


@dataclass(frozen=True)
class Flops:
    """FLOPs of one request: reading the prompt, the keys and values the decoder reads (once), the decoder's layers, the head."""

    prompt: int
    cross: int
    answer: int
    head: int

    @property
    def total(self) -> int:
        return self.prompt + self.cross + self.answer + self.head


def flops(model: nn.Module, prompt: int, answer: int, *, cached: bool = True) -> Flops:
    """FLOPs of `model` for a prompt of `prompt` tokens and an answer of `answer`; for several rows times their number.

    `cached`: the answer is generated token by token; else all of it goes through at once, as in training (forward alone: training takes
    three times as many). A decoder-only model reads prompt and answer as one sequence; generating, it needs no pass over the last token.
    Raises ValueError for a model whose parts are not understood, for layers that are not linear (experts), and for lengths below 1.
    """
    m, n = checks.whole("prompt", prompt, low=1), checks.whole("answer", answer, low=1)
    cross: list[Any]
    if isinstance(model, EncDecForSeq2SeqLM):
        encoder, decoder, head = model.encoder.body, model.decoder.body, model.lm_head
        cross = [sublayer.cross_attn for sublayer in model.decoder.cross]
    elif isinstance(model, T5GemmaForConditionalGeneration):
        encoder, decoder, head = model.model.encoder, model.model.decoder, model.lm_head.out_proj
        cross = [layer.cross_attn for layer in decoder.layers]
    else:
        parts = parts_of(model)
        first = _stack(parts.body, m)
        if cached:
            steps = sum(_step(parts.body, length) for length in range(m + 1, m + n))
            return Flops(first, 0, steps, n * _weights(parts.head))
        whole = _stack(parts.body, m + n)
        return Flops(first, 0, whole - first, n * _weights(parts.head))
    keys = sum(m * (_weights(found.k_proj) + _weights(found.v_proj)) for found in cross)
    reading = sum(n * (_weights(found.q_proj) + _weights(found.o_proj)) + _pairs(found, n * m) for found in cross)
    own = sum(_step(decoder, length) for length in range(1, n + 1)) if cached else _stack(decoder, n)
    return Flops(_stack(encoder, m), keys, own + reading, n * _weights(head))


def _stack(body: Any, tokens: int) -> int:
    """All layers over `tokens` tokens at once."""
    return sum(tokens * _layer(layer) + _pairs(layer.self_attn, tokens * tokens) for layer in body.layers)


def _step(body: Any, length: int) -> int:
    """All layers over one token, the `length`-th of its sequence."""
    window = getattr(body.config, "sliding_window", None) or length
    kinds = kinds_of(body.config)
    return sum(
        _layer(layer) + _pairs(layer.self_attn, min(length, window) if kind == "sliding_attention" else length)
        for layer, kind in zip(body.layers, kinds, strict=True)
    )


def _layer(layer: Any) -> int:
    """A token's FLOPs in a layer's own linear layers. Raises ValueError for an MLP with other weights: which ones run is not fixed."""
    found = 0
    for part in (layer.self_attn, layer.mlp):
        for name, module in part.named_modules():
            if isinstance(module, nn.Linear):
                found += _weights(module)
            elif any(weight.ndim > 1 for weight in module.parameters(recurse=False)):
                raise ValueError(
                    f"model must have linear layers alone, {type(module).__name__} ({name}) has other weights"
                )
    return found


def _weights(linear: Any) -> int:
    return 2 * int(linear.weight.numel())


def _pairs(attention: Any, pairs: int) -> int:
    """The two products of all heads, for so many pairs of query and key."""
    return 4 * int(attention.o_proj.in_features) * pairs
