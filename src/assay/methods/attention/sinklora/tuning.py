"""Fine-tuning for a longer context: the attention of training mode, LoRA's configuration, interpolated positions."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from assay import checks
from assay.methods.attention.sinklora.groups import Variant, sf_attention, shifted_heads
from assay.methods.core.attention.integration import (
    by_sdpa,
    can_register,
    causal_mask,
    has_sinks,
    is_causal,
    limits_of,
    set_attention,
    windows,
)

NAME = "assay_sf_attn"  # as attn_implementation


SETTINGS: dict[str, Any] = {"group_ratio": 0.25, "shift_fraction": 0.5, "sinks": 4, "variant": "paper"}


def use_sf_attention(model: nn.Module, **settings: Any) -> nn.Module:
    """Let a transformers model attend by `sf_attention` while it trains (`model.train()`), and in full otherwise; in place.

    `settings`: `group_ratio` (0.25: the group is that share of the batch's length, which is padded to whole groups),
    `shift_fraction`, `sinks` and `variant` of `sf_attention`. They live in `model.config.sinklora`; weights and their format do not
    change, and `set_attn_implementation("sdpa")` takes everything back. Training needs plain or padded batches: raises ValueError
    for packed sequences, other masks or attention dropout when they come, and for models or settings that do not fit here.
    Left padding is excluded everywhere; right padding, which no causal token sees, is not detected, so "as_released" leaks it.
    """
    if unknown := set(settings) - set(SETTINGS):
        raise ValueError(f"settings must be among {', '.join(SETTINGS)}, got {sorted(unknown)}")
    chosen = SETTINGS | settings
    checks.number("group_ratio", chosen["group_ratio"], above=0, high=1)
    checks.whole("sinks", chosen["sinks"], low=0)
    checks.choice("variant", chosen["variant"], get_args(Variant))
    shifted_heads(2, chosen["shift_fraction"])
    if reason := refuses(model):
        raise ValueError(f"the model's attention cannot be replaced: {reason}")
    _register()
    config: Any = model.config
    config.get_text_config().sinklora = chosen
    return set_attention(model, NAME)


def refuses(model: nn.Module) -> str:
    """Why this paper's attention cannot be used in a model; empty if it can."""
    if reason := can_register(model):
        return reason
    if not is_causal(model):
        return "it is not causal"
    if has_sinks(model):
        return "it has sinks of its own"
    if short := [size for size in windows(model) if size is not None]:
        return f"it sees {min(short)} tokens at most already, by a sliding window in {len(short)} layers"
    return ""


def _register() -> None:
    from transformers.masking_utils import AttentionMaskInterface
    from transformers.modeling_utils import AttentionInterface

    AttentionInterface.register(NAME, _train_attention)
    AttentionMaskInterface.register(NAME, causal_mask)


def _train_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    if not module.training:
        return by_sdpa(module, query, key, value, attention_mask, dropout, scaling, is_causal, kwargs)
    limits = limits_of(attention_mask)
    if dropout > 0:
        raise ValueError(f"attention dropout must be 0 with {NAME}, got {dropout}")
    if limits is None or query.shape[2] != key.shape[2]:
        raise ValueError(f"{NAME} trains on plain or left- or right-padded batches, not on other masks or with a cache")
    config: Any = module.config
    settings: Mapping[str, Any] = getattr(config.get_text_config(), "sinklora", SETTINGS)
    length = query.shape[2]
    group = math.ceil(length * settings["group_ratio"])
    if settings["variant"] == "as_released":
        group += group % 2
    extra = -length % group
    tokens = None
    if (starts := limits.start) is not None:
        tokens = torch.arange(length + extra, device=query.device) >= starts[:, None]
    if extra:  # after the text, where no token looks; as released, tokens do look there, so it is padding then
        query, key, value = (F.pad(x, (0, 0, 0, extra)) for x in (query, key, value))
        if settings["variant"] == "as_released":
            inside = torch.arange(length + extra, device=query.device) < length
            tokens = (inside if tokens is None else tokens & inside).expand(len(query), -1)
    out = sf_attention(
        query,
        key,
        value,
        group=group,
        shift_fraction=settings["shift_fraction"],
        sinks=min(settings["sinks"], length),
        tokens=tokens,
        scale=scaling,
        variant=settings["variant"],
    )
    return out[:, :, :length].transpose(1, 2).contiguous(), None


def lora_config(model: nn.Module, *, rank: int = 8, alpha: int = 16, **options: Any) -> Any:
    """`peft.LoraConfig` of the paper for a transformers model: LoRA on q, k, v and o, embeddings and norms trained in full.

    A tied head stays tied. `options` go to LoraConfig. Raises ValueError for a model without such projections, ImportError
    without peft.
    """
    from peft import LoraConfig

    names = {name.rpartition(".")[2]: module for name, module in model.named_modules()}
    targets = [name for name in ("q_proj", "k_proj", "v_proj", "o_proj") if name in names]
    if not targets:
        raise ValueError(
            f"model must have layers named q_proj, k_proj, v_proj or o_proj, {type(model).__name__} has none"
        )
    whole = sorted(n for n, m in names.items() if isinstance(m, nn.Embedding) or type(m).__name__.endswith("Norm"))
    config: Any = model.config
    tied = bool(getattr(config, "tie_word_embeddings", False))
    fixed: dict[str, Any] = {
        "r": rank,
        "lora_alpha": alpha,
        "target_modules": targets,
        "modules_to_save": whole,
        "task_type": "CAUSAL_LM",
    }
    return LoraConfig(**(fixed | {"ensure_weight_tying": tied} | options))


def interpolate_positions(model: nn.Module, length: int) -> int:
    """Squeeze rotary positions, in place, so that `length` tokens fit into the trained range; returns the factor, ceil(length / trained).

    The configuration records it, so a saved model loads the same way. The factor is 1 if `length` fits already (nothing changes). It costs
    quality at short lengths until the model is tuned. Raises ValueError for a model whose positions are scaled already or that has
    no rotary embedding of the common form.
    """
    found: Any = model
    config = found.config.get_text_config()
    checks.whole("length", length, low=1)
    factor = -(-length // config.max_position_embeddings)
    if factor == 1:
        return 1
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") != "default":
        raise ValueError(f"model must have unscaled rotary positions, got {rope or 'none'}")
    config.rope_parameters = dict(rope) | {"rope_type": "linear", "factor": float(factor)}
    config.max_position_embeddings = length
    for module in list(found.modules()):
        for name, child in list(module.named_children()):
            if type(child).__name__.endswith("RotaryEmbedding"):
                setattr(module, name, type(child)(config).to(child.inv_freq.device))
    return factor
