"""Real queries, keys and values: what a model's attention layers see on real text; and a model whose attention is another's."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from assay import checks

QKV = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
Attend = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]

_names = (f"assay_capture_{i}" for i in itertools.count())


class _AllCaptured(Exception):
    """Ends a forward pass early: the later layers are not needed."""


def captured_qkv(model: Any, input_ids: torch.Tensor, *, layers: Sequence[int] | None = None) -> list[QKV]:
    """Run `model` on `input_ids` and return the inputs of its attention layers: (q, k, v) of each layer in `layers`, in that order.

    q is (B, Hq, N, d), k and v (B, Hkv, N, d): after rotary embedding, key and value heads not expanded, not yet scaled, in
    the model's dtype, as copies. `input_ids` is int64 (B, N); `layers` are indices from 0 (default: all); layers after the last
    one requested are not run. The model is a transformers model whose attention goes through `AttentionInterface`; while
    capturing it uses SDPA, whatever it is set to, and is restored afterwards.

    Raises ValueError for input ids of another shape, a layer the model does not have, or a model whose attention cannot be
    captured; TypeError for input ids of another dtype and layers that are not whole numbers. Not for models with several attentions
    per layer (encoder-decoders).
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    checks.tensor("input_ids", input_ids, shape=("batch", "tokens"), dtype=torch.int64)
    total = model.config.get_text_config().num_hidden_layers
    wanted = [
        checks.whole("layers", layer, low=0, high=total - 1) for layer in (range(total) if layers is None else layers)
    ]
    if not wanted:
        raise ValueError("layers must name at least one layer")

    captured: dict[int, QKV] = {}

    def capture(
        module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        layer = module.layer_idx
        if layer in wanted:
            captured[layer] = (_copy(query), _copy(key), _copy(value))
        if len(captured) == len(set(wanted)):
            raise _AllCaptured
        return sdpa_attention_forward(module, query, key, value, *args, **kwargs)

    training = model.training
    try:
        model.eval()
        with _attention_function(model, capture), torch.no_grad():
            model.base_model(input_ids=input_ids.to(model.device), use_cache=False)
    except _AllCaptured:
        pass
    finally:
        model.train(training)
    if missing := sorted(set(wanted) - captured.keys()):
        raise ValueError(f"layer {missing[0]} of {type(model).__name__} has no attention that can be captured")
    return [captured[layer] for layer in wanted]


@contextlib.contextmanager
def attended_by(model: Any, attend: Attend) -> Iterator[None]:
    """While active, each attention layer of `model` computes `attend(layer, q, k, v)`, causal attention of a whole prompt.

    q is (B, Hq, N, d), k and v (B, Hkv, N, d), after rotary embedding, not yet scaled (by d ** -0.5); the output is shaped like q.
    The model is a transformers model whose attention goes through `AttentionInterface`, called without padding and without a
    cache; what it was set to before is restored. Raises ValueError in its forward pass for a mask or another scale, TypeError for an
    `attend` that cannot be called.
    """
    if not callable(attend):
        raise TypeError(f"attend must be a function of (layer, q, k, v), got {checks.shown(attend)}")

    def call(
        module: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
        **kwargs: Any,
    ) -> Any:
        scale = kwargs.get("scaling")
        if mask is not None or scale is not None and abs(scale * query.shape[-1] ** 0.5 - 1) > 1e-6:
            raise ValueError(
                f"attended_by takes causal attention scaled by dim ** -0.5, got scale {scale} and mask {mask}"
            )
        return attend(module.layer_idx, query, key, value).transpose(1, 2).contiguous(), None

    with _attention_function(model, call):
        yield


@contextlib.contextmanager
def _attention_function(model: Any, function: Callable[..., Any]) -> Iterator[None]:
    """Register `function` with transformers, let the model use it, and undo both."""
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
    from transformers.modeling_utils import AttentionInterface

    name = next(_names)
    before = _attention_of(model.config)
    AttentionInterface.register(name, function)
    AttentionMaskInterface.register(name, sdpa_mask)
    try:
        model.set_attn_implementation(name)
        yield
    finally:
        model.set_attn_implementation(before)
        AttentionInterface._global_mapping.pop(name)
        AttentionMaskInterface._global_mapping.pop(name)


def _copy(x: torch.Tensor) -> torch.Tensor:
    return x.detach().clone(memory_format=torch.contiguous_format)


def _attention_of(config: Any) -> str | dict[str, str]:
    """The attention set in a configuration (for each part, if it has parts), in the form that `set_attn_implementation` takes."""
    parts = {
        name: getattr(config, name)._attn_implementation for name in config.sub_configs if getattr(config, name, None)
    }
    return {"": config._attn_implementation, **parts} if parts else config._attn_implementation
