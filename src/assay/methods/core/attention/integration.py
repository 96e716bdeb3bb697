"""Attention plans inside transformers models, through its `AttentionInterface`.

`register_attention(name, producer)` makes `attn_implementation=name`: prompts are attended to by the plan that the producer makes
for each layer, single tokens densely over the cache. A plain causal prompt needs no mask. Left padding and sliding windows are
passed on as two numbers per row, and sinks as they are. Any other mask (packed sequences, chunked attention, prefix masks,
static caches, masks the caller made) is applied by dense attention, and so is dropout in training.

What no plan can compute is refused: `can_register` says so before anything is changed, and a model that is called anyway raises
an error instead of giving a wrong answer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, fields
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch import Tensor, nn

from assay.methods.core import kernels
from assay.methods.core.attention.plan import AttentionPlan, execute, masked_attention
from assay.methods.transform import LEAST_SHARE, only

# (module, q, k, causal=, scale=, key_start=, window=) -> the plan and further arguments of the executor
Producer = Callable[..., tuple[AttentionPlan, Mapping[str, Any]]]
Executor = Callable[..., Tensor]  # (plan, q, k, v, scale=, sinks=, further arguments), like `execute`
Settings = TypeVar("Settings")  # a dataclass of settings


class Limits(NamedTuple):
    """What a plain causal pass leaves out: keys before `start`, int64 (batch,), and keys that have left the `window`."""

    start: Tensor | None = None
    window: int | None = None


def register_attention(name: str, producer: Producer, executor: Executor = execute) -> None:
    """Make `attn_implementation=name`, whose plans come from `producer(module, q, k, causal=, scale=, key_start=, window=)`.

    The producer is called for each layer of each prompt (more than one query) and returns a plan and keyword arguments for
    `executor`, which computes it; a single token goes to `execute`. Raises ValueError for a name that transformers would mistake
    for a repository or uses itself.
    """

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
        if q.shape[2] == 1:
            plan = AttentionPlan(1, k.shape[2], causal=causal, key_start=limits.start, window=limits.window)
            return execute(plan, q, k, v, scale=scale, sinks=sinks)
        where = {"key_start": limits.start, "window": limits.window}
        plan, options = producer(module, q, k, causal=causal, scale=scale, **where)
        return executor(plan, q, k, v, scale=scale, sinks=sinks, **options)

    register_function(name, attend)


def register_function(name: str, attend: Callable[..., Tensor]) -> None:
    """Make `attn_implementation=name`, whose plain passes are `attend(module, q, k, v, causal=, scale=, limits=, sinks=)`.

    Masks, and everything else that `register_attention` describes, are handled here; `attend` returns (batch, heads, queries, dim).
    """
    from transformers.masking_utils import AttentionMaskInterface
    from transformers.modeling_utils import AttentionInterface

    if not name.startswith("assay_") or "/" in name or "|" in name:
        raise ValueError(f"name must begin with 'assay_' and have no '/' or '|', got {name!r}")

    def entry(
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
        limits = limits_of(attention_mask)
        odd = dropout > 0 or kwargs.get("position_bias") is not None or query.shape[2] > key.shape[2]
        if limits is None or odd or kwargs.get("softcap") is not None:
            return by_sdpa(module, query, key, value, attention_mask, dropout, scaling, is_causal, kwargs)
        causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
        options = {"causal": causal, "scale": scaling, "limits": limits, "sinks": kwargs.get("s_aux")}
        return attend(module, query, key, value, **options).transpose(1, 2).contiguous(), None

    AttentionInterface.register(name, entry)
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
    """The mask of a forward pass, with the signature of transformers' mask functions.

    None for plain causal attention whose queries are the last keys. int64 (batch, 1, 1, 1 + window), the first key of each row, if
    rows begin with padding or a window leaves keys out (the last dimension encodes the window, 0 without one). For anything else,
    SDPA's bool (batch, 1, queries, keys). `limits_of` reads the result.
    """
    from transformers.masking_utils import sdpa_mask
    from transformers.utils.import_utils import is_tracing

    plain = allow_is_causal_skip and not isinstance(q_offset, Tensor)
    plain = plain and q_offset + q_length == kv_offset + kv_length
    window = 0 if local_size is None or kv_length <= local_size else local_size
    if plain and window:
        plain = not torch.compiler.is_compiling() and _slides(
            kwargs.get("mask_function"), window, q_length, kv_length, q_offset, kv_offset, kwargs.get("device", "cpu")
        )
    if plain:
        if attention_mask is None:
            starts = torch.zeros(batch_size, dtype=torch.int64, device=kwargs.get("device", "cpu"))
            return None if not window else _numbers(starts, window)
        if not is_tracing(attention_mask):
            tokens = attention_mask[:, kv_offset : kv_offset + kv_length].bool()
            starts = tokens.int().argmax(-1)
            counts = tokens.sum(-1)
            # one run of tokens a row, reaching the queries' end: what follows it is unseen by them, whatever it is
            positions = torch.arange(tokens.shape[1], device=tokens.device)
            if (tokens == ((positions >= starts[:, None]) & (positions < (starts + counts)[:, None]))).all():
                full = tokens.shape[1] == kv_length and bool((starts + counts == kv_length).all())
                if full or (q_length > 1 and not starts.any()):  # or right padding: no token sees it
                    return _numbers(starts, window) if window or starts.any() else None
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


def _numbers(starts: Tensor, window: int) -> Tensor:
    return starts[:, None, None, None].expand(
        -1, 1, 1, 1 + window
    )  # the window is told by the shape: reading it waits for nothing


def _slides(
    mask_function: Any, window: int, q_length: int, kv_length: int, q_offset: int, kv_offset: int, device: Any
) -> bool:
    """Whether a mask function is a causal sliding window rather than chunks of that size; its last rows show which."""
    if mask_function is None:
        return False
    rows = torch.arange(max(0, q_length - 2), q_length, device=device)[:, None] + q_offset
    keys = torch.arange(kv_length, device=device) + kv_offset
    zero = torch.zeros(1, 1, 1, 1, dtype=torch.int64, device=device)
    found = mask_function(zero, zero, rows[None, None], keys[None, None, None])
    return bool((found == ((keys <= rows) & (keys > rows - window))).all())


def limits_of(mask: Tensor | None) -> Limits | None:
    """The limits that `causal_mask` passes on; None for a real mask."""
    if mask is None:
        return Limits()
    if mask.dtype != torch.int64 or mask.ndim != 4 or mask.shape[1:3] != (1, 1):
        return None
    return Limits(mask[:, 0, 0, 0], mask.shape[3] - 1 or None)


def by_sdpa(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    dropout: float,
    scaling: float | None,
    is_causal: bool | None,
    kwargs: Mapping[str, Any],
) -> tuple[Tensor, None]:
    """Dense attention by torch's SDPA, for what no plan can express; `mask` as `causal_mask` returns it, `kwargs` as models pass them.

    Raises ValueError for soft caps, which SDPA does not have.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if kwargs.get("softcap") is not None:
        raise ValueError("softcap must be None: soft-capped attention runs with attn_implementation='eager' only")
    kernels.ran("attention", "sdpa of transformers")
    limits, queries, keys = limits_of(mask), query.shape[2], key.shape[2]
    if mask is not None and limits is not None:
        plan = AttentionPlan(queries, keys, key_start=limits.start, window=limits.window)
        mask = plan.visible(0, queries, query.device)
    sinks = kwargs.get("s_aux")
    if sinks is None:
        return sdpa_attention_forward(
            module, query, key, value, mask, dropout=dropout, scaling=scaling, is_causal=is_causal, **kwargs
        )
    if mask is None:
        causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
        mask = AttentionPlan(queries, keys, causal=causal).visible(0, queries, query.device)
    if mask.dtype != torch.bool:
        raise ValueError(f"attention_mask must be bool beside sinks, got {mask.dtype}")
    out = masked_attention(query, key, value, mask, scaling, sinks.view(-1, 1, 1), dropout)
    return out.transpose(1, 2).contiguous(), None


# ------------------------------------------------------------------------------------------------------- what a model has


def can_register(model: nn.Module) -> str:
    """Why a model's attention cannot be replaced by name; empty if it can. Changes nothing and runs nothing."""
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        return f"needs a transformers model, got {type(model).__name__}"
    name, config = type(model).__name__, model.config.get_text_config()
    if not _attentions(model):
        return f"{name} has no attention"
    if not type(model)._can_set_attn_implementation():
        return f"{name} does not use transformers' AttentionInterface"
    if getattr(config, "is_encoder_decoder", False):
        return "encoder-decoder models have several attentions a layer"
    if getattr(config, "attn_logit_softcapping", None) is not None:
        return "its attention is soft-capped"
    if not model._supports_sdpa and not has_sinks(model):
        return f"the attention of {name} is not one that torch's SDPA computes"
    return ""


def _attentions(model: nn.Module) -> list[nn.Module]:
    """The innermost modules named attention, which are those that call an attention function."""
    named = [m for m in model.modules() if "Attention" in type(m).__name__]
    return [m for m in named if not any("Attention" in type(c).__name__ for c in m.modules() if c is not m)]


def has_sinks(model: nn.Module) -> bool:
    """Whether the model's attention has sinks: a learnt logit a head in the softmax (gpt_oss)."""
    return any(isinstance(getattr(module, "sinks", None), Tensor) for module in _attentions(model))


def is_causal(model: nn.Module) -> bool:
    """Whether every attention of a model is causal: false for encoders."""
    return all(getattr(module, "is_causal", True) is not False for module in _attentions(model))


def windows(model: nn.Module) -> list[int | None]:
    """How many tokens each attention layer sees, in order; None means all before it. Chunked attention counts as its chunk size."""
    config = cast(Any, model).config.get_text_config()
    window = getattr(config, "sliding_window", None)
    if getattr(config, "use_sliding_window", True) is False:
        window = None
    kinds: Any = getattr(config, "layer_types", None)
    if kinds is None:
        return [window] * config.num_hidden_layers
    sizes = {"sliding_attention": window, "chunked_attention": getattr(config, "attention_chunk_size", None)}
    return [sizes.get(kind) for kind in kinds if "attention" in kind and "linear" not in kind]


def share_reached(model: nn.Module, tokens: int, least: int, what: str) -> tuple[float, str, str]:
    """The share of the attention layers that see at least `least` tokens of a prompt of this length.

    Returns (share, a sentence on what is left alone, the reason if that is too little); `what` says what happens in layers that see
    less.
    """
    layers = windows(model)
    short = [size for size in layers if size is not None and min(size, tokens) < least]
    share = 1 - len(short) / max(len(layers), 1)
    if not short:
        return 1.0, "", ""
    found = f"{len(short)} of {len(layers)} attention layers see {max(short)} tokens at most and {what}"
    return share, found, f"{found} ({least} needed)" if share < LEAST_SHARE else ""


def layer_of(module: nn.Module) -> int:
    """The index of an attention module's layer. Raises ValueError for modules that do not say it (encoders of images)."""
    found = getattr(module, "layer_idx", None)
    if not isinstance(found, int):
        raise ValueError(f"settings must be one for all layers: {type(module).__name__} does not say which layer it is")
    return found


def set_attention(model: nn.Module, name: str) -> nn.Module:
    """Set `attn_implementation`. Raises ValueError if transformers refuses it, and leaves the model unchanged then."""
    found: Any = model
    before = found.config.get_text_config()._attn_implementation
    found.set_attn_implementation(name)
    if found.config.get_text_config()._attn_implementation != name:
        found.set_attn_implementation(before)
        raise ValueError(f"{type(model).__name__} did not take attn_implementation {name!r}")
    return model


def parse_settings(kind: type[Settings], values: Mapping[str, Any]) -> Settings:
    """`kind(**values)` for a dataclass `kind`; raises TypeError or ValueError for a name that is not a setting."""
    return kind(**only(values, [field.name for field in fields(cast(Any, kind))]))


def store_settings(model: nn.Module, name: str, settings: Any) -> None:
    """Keep a dataclass of settings in a transformers model's config as the dictionary `name`, which is saved with the model."""
    setattr(cast(Any, model).config.get_text_config(), name, asdict(settings))


def settings_of(module: nn.Module, name: str, kind: type[Settings]) -> Settings:
    """The settings under `name` in the config of an attention module (`kind()` if there are none); parsed again only when replaced."""
    values: Any = getattr(module.config, name, None)
    known: Any = getattr(module, f"_{name}", None)
    if known is None or known[0] is not values:
        known = (values, parse_settings(kind, values or {}))
        setattr(module, f"_{name}", known)
    return cast(Settings, known[1])


def each_layer(model: nn.Module, input_ids: Tensor, use: Callable[..., None]) -> None:
    """Run a model on `input_ids`, int64 (1, tokens), exactly, and call use(module, q, k, v, scale) in each attention layer.

    q, k, v are (1, heads, tokens, dim), after rotary embedding. The model is restored afterwards, even if `use` raises.
    """
    found: Any = model

    def attend(
        module: nn.Module,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        causal: bool,
        scale: float | None,
        limits: Limits,
        sinks: Any,
    ) -> Tensor:
        use(module, q, k, v, scale)
        plan = AttentionPlan(q.shape[2], k.shape[2], causal=causal, key_start=limits.start, window=limits.window)
        return execute(plan, q, k, v, scale=scale, sinks=sinks)

    before = found.config.get_text_config()._attn_implementation
    register_function("assay_each_layer", attend)
    try:
        set_attention(model, "assay_each_layer")
        with torch.no_grad():
            found.base_model(input_ids=input_ids.to(found.device), use_cache=False)
    finally:
        set_attention(model, before)


def capture_qk(model: nn.Module, input_ids: Tensor) -> list[tuple[Tensor, Tensor]]:
    """(q, k) of every layer on `input_ids`, int64 (1, tokens), after rotary embedding. The model is restored afterwards."""
    captured: list[tuple[Tensor, Tensor]] = []

    def keep(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> None:
        captured.append((q.detach().clone(), k.detach().clone()))

    each_layer(model, input_ids, keep)
    return captured
