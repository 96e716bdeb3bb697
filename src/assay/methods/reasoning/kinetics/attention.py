"""Block top-k attention inside transformers models: `attn_implementation="assay_block_topk"`.

    use_block_topk(model, BlockTopK(budget=512))
    model.generate(ids, attention_mask=mask, cache=BlockCache(model.config))

Prompts, and steps of several tokens, are attended to exactly. A single token reads the chosen blocks in layers of full
attention, once the context is longer than the budget. Layers with sliding windows, and those in `dense_layers`, stay
exact.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from assay import checks
from assay.methods.core.attention.integration import (
    Limits,
    can_register,
    is_causal,
    layer_of,
    register_function,
    set_attention,
    settings_of,
    store_settings,
    windows,
)
from assay.methods.core.attention.plan import AttentionPlan, execute
from assay.methods.reasoning.kinetics.selection import BlockTopK, sparse_attention

NAME = "assay_block_topk"  # as attn_implementation
SETTINGS = "block_topk"  # in the model's configuration


def attend(
    module: nn.Module,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool,
    scale: float | None,
    limits: Limits,
    sinks: Tensor | None,
) -> Tensor:
    """One layer's attention, as `core.attention.integration.register_function` calls it."""
    settings = settings_of(module, SETTINGS, BlockTopK)
    chooses = q.shape[2] == 1 and causal and limits.window is None and k.shape[2] > settings.budget
    if chooses and (not settings.dense_layers or layer_of(module) not in settings.dense_layers):
        layer = getattr(k, "blocks", None)
        known = {"sums": layer.sums, "room": layer.room} if layer and layer.block == settings.block else {}
        return sparse_attention(q, k, v, settings, starts=limits.start, scale=scale, sinks=sinks, **known)
    plan = AttentionPlan(q.shape[2], k.shape[2], causal=causal, key_start=limits.start, window=limits.window)
    return execute(plan, q, k, v, scale=scale, sinks=sinks)


def register() -> None:
    """Register `attn_implementation="assay_block_topk"` with transformers (which this imports); may be called
    repeatedly."""
    register_function(NAME, attend)


def why_not(model: nn.Module) -> str:
    """Why a model cannot decode with block top-k; empty if it can. Changes nothing."""
    if reason := can_register(model):
        return reason
    if not is_causal(model):
        return f"{type(model).__name__} does not decode token by token"
    if all(window is not None for window in windows(model)):
        return "all its layers have windows, which bound what a token reads already"
    return ""


def use_block_topk(model: nn.Module, settings: BlockTopK | None = None) -> nn.Module:
    """Make a transformers decoder attend by block top-k when it decodes; returns the model, whose weights are not
    touched.

    Settings go into its configuration, and are saved with it; what is read there counts at every token, so that they
    may be replaced. Give `generate` a `BlockCache`: with another cache the answers are the same, but all keys are read
    to choose, and the cache itself is copied. Raises TypeError for other settings, ValueError for a model that cannot,
    before anything is changed.

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=99, hidden_size=32, intermediate_size=32, num_hidden_layers=2,
    ...     num_attention_heads=2))
    >>> use_block_topk(model, BlockTopK(budget=256)).config.block_topk["budget"]
    256
    """
    settings = BlockTopK() if settings is None else settings
    if not isinstance(settings, BlockTopK):
        raise TypeError(f"settings must be BlockTopK, got {checks.shown(settings)}")
    if reason := why_not(model):
        raise ValueError(f"block top-k does not fit this model: {reason}")
    if settings.dense_layers:
        found: Any = model
        count = found.config.get_text_config().num_hidden_layers
        if wrong := [layer for layer in settings.dense_layers if layer >= count]:
            raise ValueError(f"dense_layers must be from 0 to {count - 1}, got {wrong}")
        if not any(isinstance(getattr(module, "layer_idx", None), int) for module in model.modules()):
            raise ValueError(f"dense_layers must be empty: {type(model).__name__} does not say which layer is which")
    store_settings(model, SETTINGS, settings)
    register()
    return set_attention(model, NAME)
