"""What any causal language model of transformers would hold, counted on one that takes no memory: for those whose blocks `decoder_of` does
not know (mixtures of experts, state-space models, latent attention) and for what stands beside a decoder (an encoder of images)."""

from __future__ import annotations

import copy
from typing import Any

import torch

SHORT, LONG = 8, 16
"""Tokens of the two prompts from which the growth of a cache is taken; our choice."""


@torch.no_grad()
def counted(config: Any, dtype: torch.dtype) -> tuple[int, int, int]:
    """Parameters of the model that a configuration asks for; those that are in no table of tokens; and the bytes that all of them take in
    `dtype` (some classes keep a few in float32).

    A parameter that is used twice is counted once. Raises what transformers raises for a configuration of which it makes no model.

    >>> from transformers import LlamaConfig
    >>> sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 100}
    >>> counted(LlamaConfig(**sizes, tie_word_embeddings=True), torch.bfloat16)
    (76352, 69952, 152704)
    """
    model = _empty(config, dtype)
    parameters = list(model.parameters())
    tables = {id(table.weight) for table in (model.get_input_embeddings(), model.get_output_embeddings()) if table}
    rest = sum(one.numel() for one in parameters if id(one) not in tables)
    return sum(one.numel() for one in parameters), rest, sum(one.numel() * one.element_size() for one in parameters)


@torch.no_grad()
def cache_growth(config: Any, dtype: torch.dtype) -> tuple[float, float]:
    """Bytes of the cache behind any prompt, and for each of its tokens, of one row.

    What the model keeps behind two short prompts, none of it computed: layers with windows count as if they had none, since they keep all
    of a prompt until the next token. Raises ValueError for a model that hands over no cache, or cannot be run without numbers.
    """
    model = _empty(
        config.get_text_config(decoder=True), torch.bfloat16
    )  # grouped products exist in no other type without numbers
    sizes = []
    for tokens in (SHORT, LONG):
        ids = torch.zeros((1, tokens), dtype=torch.long, device="meta")
        try:
            out = model(input_ids=ids, use_cache=True)
            layers = (getattr(out, "cache", None) or out.cache_params).layers
        except Exception as error:
            raise ValueError(f"config must be of a model whose cache can be counted: {error}") from None
        found = {id(tensor): tensor for layer in layers for held in vars(layer).values() for tensor in _tensors(held)}
        sizes.append(
            sum(one.numel() * (dtype if one.dtype == torch.bfloat16 else one.dtype).itemsize for one in found.values())
        )
    each = (sizes[1] - sizes[0]) / (LONG - SHORT)
    return sizes[0] - SHORT * each, each


def _empty(config: Any, dtype: torch.dtype) -> Any:
    from transformers import AutoModelForCausalLM

    auto: Any = AutoModelForCausalLM
    part = copy.deepcopy(config)
    part._attn_implementation = None
    with torch.device("meta"):
        return auto.from_config(part, dtype=dtype, trust_remote_code=False).eval()


def _tensors(held: Any) -> list[torch.Tensor]:
    """A tensor itself, or those in a list, tuple or dictionary; not counters."""
    if isinstance(held, dict):
        held = list(held.values())
    members = held if isinstance(held, list | tuple) else [held]
    return [one for one in members if isinstance(one, torch.Tensor) and one.ndim > 1]
