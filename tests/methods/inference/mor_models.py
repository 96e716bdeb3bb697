"""Tiny recursive models for the tests of Mixture-of-Recursions."""

from __future__ import annotations

import torch
from tests.tiny import tiny_model, token_ids

from assay.methods.core.generation.cache import left_padded_mask, position_ids
from assay.methods.inference.mor import MoRForCausalLM

LAYERS = 4
KINDS = [
    {"router": "none"},
    {"router": "none", "kv": "share"},
    {"router": "expert", "recursions": 3},
    {"router": "expert", "recursions": 3, "kv": "share"},
    {"router": "expert", "recursions": 3, "kv": "update"},
    {"router": "expert", "causality": "aux_router", "gating": "additive"},
    {"router": "expert", "sharing": "sequence"},
    {"router": "token", "recursions": 3},
    {"router": "token", "recursions": 3, "kv": "share"},
    {"router": "token", "recursions": 3, "kv": "update", "sharing": "cycle"},
]


def tiny_mor(*, layers=LAYERS, dtype=torch.float32, training=False, **settings):
    """A tiny Llama of `layers` stored layers in recursions, always with the same weights."""
    torch.manual_seed(1)
    base = tiny_model(num_hidden_layers=layers).to(dtype)
    return MoRForCausalLM.from_base(base, **settings).train(training)


def padded(lengths):
    """Prompts of these lengths, padded on the left: ids, mask, positions."""
    mask = left_padded_mask(lengths)
    return token_ids(len(lengths), max(lengths)) * mask, mask, position_ids(mask)
