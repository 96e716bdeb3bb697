"""Small random models and prompts shared by the tests of this folder."""

from __future__ import annotations

import random

import torch
from tests.tiny import LLAMA, tiny_model
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
)
from transformers.cache_utils import DynamicCache

from assay.methods.core.generation.cache import keys_and_values

SMALL = {"hidden_size": 32, "intermediate_size": 48}


def tiny(kind: str = "llama", attention: str = "sdpa"):
    """A small random model; the sliding ones have a window of 8, shorter than the longest prompts."""
    common = {
        "attn_implementation": attention,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "bos_token_id": 2,
        "initializer_range": 0.02,
    }
    if kind == "gpt2":  # learned positions, Conv1D
        torch.manual_seed(0)
        return GPT2LMHeadModel(
            GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=97, n_positions=128, **common)
        ).eval()
    if kind == "gemma3":  # sliding and full layers mixed
        layers = ["sliding_attention", "full_attention"]
        torch.manual_seed(0)
        config = Gemma3TextConfig(**LLAMA | SMALL | common, head_dim=8, sliding_window=8, layer_types=layers)
        return Gemma3ForCausalLM(config).eval()
    if kind == "mistral":  # every layer slides
        common["sliding_window"] = 8
    return tiny_model({"llama": "Llama", "mistral": "Mistral"}[kind], **SMALL, **common)


def prompts_of(*lengths: int, seed: int = 0) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(3, 97) for _ in range(length)] for length in lengths]


PROMPTS = prompts_of(5, 23, 1, 12, 12, 2, 17)


def alone(model, prompt):
    """The oracle: keys, values and last logits of a prompt run on its own, every layer kept whole."""
    with torch.no_grad():
        out = model(torch.tensor([prompt]), cache=DynamicCache(), use_cache=True)
    return keys_and_values(out.cache), out.logits[0, -1]
