"""A decoder in parts: run in the model's own order they are the model, bit for bit, and what is not understood is refused by name."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tests.properties.architectures import CAUSAL, build, inputs
from transformers.cache_utils import DynamicCache

from assay.methods.core.models.decoder import kinds_of, parts_of, why_not

KNOWN = ("llama", "llama-tied", "qwen2", "phi3", "mistral", "gemma3", "gemma2", "mixtral")


def by_parts(parts, ids, whole=False, **given):
    run = parts.begin(ids, **given)
    x = run.hidden
    for index in range(len(parts.layers)):
        if whole:
            x = parts.layer(index, x, run)
        else:
            x = x + parts.attention(index, x, run)
            x = x + parts.feed_forward(index, x)
    return parts.logits(parts.norm(x))


@pytest.mark.parametrize("name", KNOWN)
@pytest.mark.parametrize("whole", [False, True])
@torch.no_grad()
def test_the_parts_are_the_model(name, whole):
    model = build(name)
    parts, ids = parts_of(model), inputs(name)["input_ids"]
    padded = torch.ones_like(ids)
    padded[1, :7] = 0
    positions = (padded.cumsum(1) - 1).clamp(min=0)
    given = {"attention_mask": padded, "position_ids": positions}
    torch.testing.assert_close(by_parts(parts, ids, whole, **given), model(ids, **given).logits, rtol=0, atol=0)
    caches = [DynamicCache(config=model.config) for _ in range(2)]
    for tokens in (ids[:, :20], ids[:, 20:21], ids[:, 21:30]):  # past every window
        found = by_parts(parts, tokens, whole, cache=caches[0])
        wanted = model(tokens, cache=caches[1], use_cache=True).logits
        torch.testing.assert_close(found, wanted, rtol=0, atol=0)


@pytest.mark.parametrize("name", sorted(set(CAUSAL) - set(KNOWN)))
def test_others_are_refused_by_name(name):
    model = build(name)
    assert type(model).__name__ in why_not(model)
    with pytest.raises(ValueError, match="decoder whose parts are understood"):
        parts_of(model)


def test_a_model_that_only_looks_like_a_llama_is_found_out():
    from transformers import GraniteConfig, GraniteForCausalLM

    sizes = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "vocab_size": 64,
    }
    model = GraniteForCausalLM(GraniteConfig(**sizes, residual_multiplier=0.5, num_key_value_heads=2)).eval()
    assert "computes something else" in why_not(model)


def test_the_probe_leaves_the_mode_alone():
    model = build("llama").train()
    assert not why_not(model)
    assert model.training


@torch.no_grad()
def test_a_slot_is_another_place_of_the_cache():
    model = build("mistral")
    parts, ids = parts_of(model), inputs("mistral")["input_ids"]
    cache = DynamicCache(config=model.config)
    run = parts.begin(ids, cache=cache)
    parts.attention(0, run.hidden, run, slot=1)
    assert not cache.layers[0].is_initialized
    assert cache.layers[1].is_initialized


@torch.no_grad()
def test_a_subset_of_the_tokens():
    """Tokens 0, 2 and 5 alone see each other at their own positions."""
    model = build("llama")
    parts, ids = parts_of(model), inputs("llama")["input_ids"][:, :6]
    chosen = torch.tensor([0, 2, 5])
    run = parts.begin(ids)
    rotary = {kind: (cos[:, chosen], sin[:, chosen]) for kind, (cos, sin) in run.rotary.items()}
    some = parts.layer(0, run.hidden[:, chosen], replace(run, rotary=rotary))
    there = torch.ones(2, 3, dtype=torch.int64)  # without a mask, positions with gaps mean several sequences
    alone = parts.begin(ids[:, chosen], there, chosen[None])
    torch.testing.assert_close(some, parts.layer(0, alone.hidden, alone))


def test_kinds():
    assert kinds_of(build("mistral").config) == ["sliding_attention"] * 2
    assert kinds_of(build("llama").config) == ["full_attention"] * 2
    assert kinds_of(build("gemma3").config) == ["sliding_attention", "full_attention"]


def test_what_begin_refuses():
    parts = parts_of(build("llama"))
    with pytest.raises(ValueError, match="input_ids or inputs_embeds"):
        parts.begin()
    with pytest.raises(ValueError, match="not both"):
        parts.begin(torch.zeros(1, 2, dtype=torch.int64), inputs_embeds=torch.zeros(1, 2, 128))
