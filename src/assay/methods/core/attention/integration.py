"""Attention plans inside transformers models, through its `AttentionInterface`.

`register_attention(name, producer)` makes `attn_implementation=name`: prompts are attended by the plan the producer makes for
each layer, single tokens densely over the cache. A plain causal prompt costs no mask; left padding is passed on as one number a
row. Whatever has another mask (packed sequences, sliding windows shorter than the prompt, prefix masks, static caches, masks the
caller made) is attended densely under that mask by SDPA, and so is training with dropout.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, fields
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from assay.methods.core.attention.plan import AttentionPlan, execute

# (module, q, k, causal=, scale=, key_start=) -> the plan and further arguments of the executor
Producer = Callable[..., tuple[AttentionPlan, Mapping[str, Any]]]
Executor = Callable[..., Tensor]  # (plan, q, k, v, scale=, further arguments), like `execute`
Settings = TypeVar("Settings")  # a dataclass of settings


def register_attention(name: str, producer: Producer, executor: Executor = execute) -> None:
    """Make `attn_implementation=name`, whose plans come from `producer(module, q, k, causal=, scale=, key_start=)`.

    The producer is called for each layer of each prompt (more than one query) and returns a plan and keyword arguments for
    `executor`, which computes it; a single token goes to `execute`. Raises ValueError for a name that transformers would take
    for a repository or has itself.
    """
    from transformers.masking_utils import AttentionMaskInterface
    from transformers.modeling_utils import AttentionInterface

    if not name.startswith("assay_") or "/" in name or "|" in name:
        raise ValueError(f"name must begin with 'assay_' and have no '/' or '|', got {name!r}")

    def attend(
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
        causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
        starts = key_start_of(attention_mask)
        plain = attention_mask is None or starts is not None
        unusual = dropout > 0 or any(kwargs.get(key) is not None for key in ("position_bias", "softcap", "s_aux"))
        if not plain or unusual or query.shape[2] > key.shape[2]:
            return by_sdpa(module, query, key, value, attention_mask, starts, dropout, scaling, is_causal, kwargs)
        if query.shape[2] == 1:
            plan = AttentionPlan(1, key.shape[2], causal=causal, key_start=starts)
            out = execute(plan, query, key, value, scale=scaling)
        else:
            plan, options = producer(module, query, key, causal=causal, scale=scaling, key_start=starts)
            out = executor(plan, query, key, value, scale=scaling, **options)
        return out.transpose(1, 2).contiguous(), None

    AttentionInterface.register(name, attend)
    AttentionMaskInterface.register(name, causal_mask)


def causal_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: Any = 0,  # a tensor in static caches
    kv_offset: int = 0,
    *,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    **kwargs: Any,
) -> Tensor | None:
    """The mask of a forward pass, in the signature of transformers' mask functions.

    None for plain causal attention whose queries are the last keys; int64 (batch, 1, 1, 1), the first key of each row, where
    rows begin with padding; SDPA's bool (batch, 1, queries, keys) for anything else.
    """
    from transformers.masking_utils import sdpa_mask
    from transformers.utils.import_utils import is_tracing

    plain = allow_is_causal_skip and (local_size is None or kv_length < local_size)
    if plain and not isinstance(q_offset, Tensor) and q_offset + q_length == kv_offset + kv_length:
        if attention_mask is None:
            return None
        if not is_tracing(attention_mask):
            tokens = attention_mask[:, kv_offset : kv_offset + kv_length].bool()
            starts = tokens.int().argmax(-1)
            counts = tokens.sum(-1)
            # one run of tokens a row, reaching the queries' end: what follows it is unseen by them, whatever it is
            positions = torch.arange(tokens.shape[1], device=tokens.device)
            if (tokens == ((positions >= starts[:, None]) & (positions < (starts + counts)[:, None]))).all():
                if tokens.shape[1] == kv_length and (starts + counts == kv_length).all():
                    return None if not starts.any() else starts[:, None, None, None]
                if q_length > 1 and not starts.any():  # right padding: no token sees it
                    return None
    return sdpa_mask(
        batch_size,
        q_length,
        kv_length,
        q_offset,
        kv_offset,
        attention_mask=attention_mask,
        local_size=local_size,
        allow_is_causal_skip=False,
        **kwargs,
    )


def key_start_of(mask: Tensor | None) -> Tensor | None:
    """The (batch,) starts that `causal_mask` hands over; None for a real mask."""
    if mask is None or mask.dtype != torch.int64 or mask.shape[1:] != (1, 1, 1):
        return None
    return mask.flatten()


def by_sdpa(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    starts: Tensor | None,
    dropout: float,
    scaling: float | None,
    is_causal: bool | None,
    kwargs: Mapping[str, Any],
) -> tuple[Tensor, None]:
    """Dense attention by transformers' own SDPA function, for what a plan cannot say; `starts` as `key_start_of` gives them."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if starts is not None:
        mask = AttentionPlan(query.shape[2], key.shape[2], key_start=starts).visible(0, query.shape[2], query.device)
    return sdpa_attention_forward(
        module, query, key, value, mask, dropout=dropout, scaling=scaling, is_causal=is_causal, **kwargs
    )


def can_register(model: nn.Module) -> str:
    """Why a model's attention cannot be replaced by name; empty when it can."""
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        return f"needs a transformers model, got {type(model).__name__}"
    config = model.config.get_text_config()
    if not type(model)._can_set_attn_implementation():
        return f"{type(model).__name__} does not use transformers' AttentionInterface"
    if getattr(config, "is_encoder_decoder", False):
        return "encoder-decoder models have several attentions a layer"
    if getattr(config, "attn_logit_softcapping", None) is not None:
        return "its attention is soft-capped"
    return ""


def set_attention(model: nn.Module, name: str) -> nn.Module:
    """Set `attn_implementation`; raises ValueError where transformers refuses it."""
    found: Any = model
    found.set_attn_implementation(name)
    if found.config.get_text_config()._attn_implementation != name:
        raise ValueError(f"{type(model).__name__} did not take attn_implementation {name!r}")
    return model


def parse_settings(kind: type[Settings], values: Mapping[str, Any]) -> Settings:
    """`kind(**values)` for a dataclass `kind`; raises ValueError for a name that is not a setting."""
    names = [field.name for field in fields(cast(Any, kind))]
    if unknown := sorted(set(values) - set(names)):
        raise ValueError(f"unknown configuration {unknown}; allowed: {', '.join(names)}")
    return kind(**values)


def store_settings(model: nn.Module, name: str, settings: Any) -> None:
    """Keep a dataclass of settings in a transformers model's config as the dictionary `name`, saved with the model."""
    setattr(cast(Any, model).config.get_text_config(), name, asdict(settings))


def settings_of(module: nn.Module, name: str, kind: type[Settings]) -> Settings:
    """The settings under `name` in the config of an attention module (`kind()` if none), parsed anew only when replaced."""
    values: Any = getattr(module.config, name, None)
    known: Any = getattr(module, f"_{name}", None)
    if known is None or known[0] is not values:
        known = (values, parse_settings(kind, values or {}))
        setattr(module, f"_{name}", known)
    return cast(Settings, known[1])


class _Captured(Exception):
    """Ends a forward pass when the last layer's queries and keys are there."""


def capture_qk(model: nn.Module, input_ids: Tensor) -> list[tuple[Tensor, Tensor]]:
    """(q, k) of every layer on `input_ids`, int64 (1, tokens), after rotary embedding; the model is left as it was."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
    from transformers.modeling_utils import AttentionInterface

    found: Any = model
    captured: dict[int, tuple[Tensor, Tensor]] = {}
    layers = found.config.get_text_config().num_hidden_layers

    def capture(module: Any, query: Tensor, key: Tensor, *args: Any, **kwargs: Any) -> Any:
        captured[module.layer_idx] = (query.detach().clone(), key.detach().clone())
        if len(captured) == layers:
            raise _Captured
        return sdpa_attention_forward(module, query, key, *args, **kwargs)

    before = found.config.get_text_config()._attn_implementation
    AttentionInterface.register("assay_capture", capture)
    AttentionMaskInterface.register("assay_capture", sdpa_mask)
    try:
        set_attention(model, "assay_capture")
        with torch.no_grad():
            found.base_model(input_ids=input_ids.to(found.device), use_cache=False)
    except _Captured:
        pass
    finally:
        set_attention(model, before)
    return [captured[layer] for layer in sorted(captured)]
