"""Attention plans inside diffusers' transformers, by attention processors.

`use_plans(model, producer)` lets any producer of plans serve as the self-attention of a diffusers transformer; `set_attention`
does the same for any function. A `Processor` runs the module's previous processor, with its projections, norms and rotary
embeddings, and replaces only the call of torch's `scaled_dot_product_attention` in it. It therefore fits every model whose
processors call that function, including future ones, and it neither imports diffusers nor needs anything private of it.

When NOT to use it: with another attention backend of diffusers than "native" (refused when the model is called), with context
parallelism, or under `torch.compile` (the replacement is a Python mode around the processor).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from assay.methods.core.attention.integration import Producer
from assay.methods.core.attention.plan import execute

# attend(module, q, k, v, mask=, causal=, scale=, text=) -> (batch, heads, tokens, value dim); q, k, v (batch, heads, tokens, dim)
Attend = Callable[..., Tensor]

_SELF_ATTENTION = re.compile(r"(transformer_blocks|single_transformer_blocks|blocks)\.\d+\.(attn|attn1)\.processor")


def use_plans(model: nn.Module, producer: Producer) -> None:
    """Attend by the plans of `producer(module, q, k, causal=, scale=, key_start=None, window=None)` in every self-attention of a model.

    q and k are what the model's own processors pass to attention, (batch, heads, tokens, dim) after norms and rotary embedding;
    text that takes part is among the tokens. The producer returns an `AttentionPlan` and keyword arguments for `execute`, as for
    `integration.register_attention`. Tokens that a mask hides from every query (padding of the prompt) are left out before planning
    if all batch rows hide the same ones; their own outputs, which nobody reads, are zeros. With other masks, or dropout, torch's
    own dense attention runs. Undo with diffusers' API: `before = model.attn_processors`, then `model.set_attn_processor(before)`.
    Raises ValueError for a model without such self-attentions.
    """

    def attend(
        module: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        mask: Tensor | None,
        causal: bool,
        scale: float | None,
        text: int,
    ) -> Tensor:
        real = real_tokens(mask, q)
        if real is None or not (real == real[:1]).all() or not real[0].any():
            return F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, scale=scale, enable_gqa=True)
        kept = None if real.all() else real[0].nonzero()[:, 0]
        if kept is not None:
            whole = q.new_zeros(*q.shape[:3], v.shape[3])
            q, k, v = (x[:, :, kept] for x in (q, k, v))
        plan, options = producer(module, q, k, causal=causal, scale=scale, key_start=None, window=None)
        out = execute(plan, q, k, v, scale=scale, **options)
        return out if kept is None else whole.index_copy_(2, kept, out)

    set_attention(model, [attend] * len(self_attentions(model)))


def self_attentions(model: nn.Module) -> list[str]:
    """Names in `model.attn_processors` of the self-attentions of a diffusers transformer's blocks, in order.

    "blocks.N.attn1", "transformer_blocks.N.attn" or ".attn1", "single_transformer_blocks.N.attn", each with ".processor";
    cross-attentions and text refiners are not among them. Raises ValueError when there is none.
    """
    names = [name for name in getattr(model, "attn_processors", {}) if _SELF_ATTENTION.fullmatch(name)]
    if not names:
        raise ValueError(
            f"model must have attn_processors like 'blocks.N.attn1.processor' or '(single_)transformer_blocks.N.attn.processor', "
            f"as diffusers' transformers do, got {type(model).__name__} without"
        )
    return names


def set_attention(model: nn.Module, attends: Sequence[Attend]) -> None:
    """Compute the model's self-attentions by `attends`, one for each of `self_attentions(model)`; replaces what was set before.

    attend(module, q, k, v, mask=, causal=, scale=, text=) gets what the module's processor passes to torch's
    `scaled_dot_product_attention`, and `text`, the number of tokens that are not in the processor's `hidden_states`: those of a
    prompt that is attended to jointly. Raises ValueError for the wrong number of functions.
    """
    names = self_attentions(model)
    if len(attends) != len(names):
        raise ValueError(f"attends must be {len(names)} functions, one for each self-attention, got {len(attends)}")
    found: Any = model
    processors = dict(found.attn_processors)
    for name, attend in zip(names, attends, strict=True):
        inner = processors[name]
        processors[name] = Processor(inner.inner if isinstance(inner, Processor) else inner, attend)
    found.set_attn_processor(processors)


class Processor:
    """An attention processor that runs `inner`, another one, with attention computed by `attend` (see `set_attention`).

    Raises ValueError when `inner` does not compute self-attention by torch's `scaled_dot_product_attention`.
    """

    def __init__(self, inner: Any, attend: Attend) -> None:
        self.inner = inner
        self.attend = attend
        # diffusers' `Attention` passes on only the arguments that it sees in the signature of `processor.__call__`
        self.__dict__["__call__"] = inner.__call__

    def __call__(self, attn: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        replace = _Replace(attn, hidden_states.shape[1], self.attend)
        with replace:
            out = self.inner(attn, hidden_states, *args, **kwargs)
        if not replace.done:
            raise ValueError(
                f"{type(self.inner).__name__} computed no self-attention by torch's scaled_dot_product_attention: "
                "diffusers' attention backend must be 'native' (set it before the processors are replaced)"
            )
        return out


class _Replace(TorchFunctionMode):
    """While active, replaces `scaled_dot_product_attention` of at least `tokens` tokens with themselves by `attend`."""

    def __init__(self, module: Any, tokens: int, attend: Attend) -> None:
        super().__init__()
        self.module, self.tokens, self.attend = module, tokens, attend
        self.done = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        return self._attention(*args, **kwargs) if func is F.scaled_dot_product_attention else func(*args, **kwargs)

    def _attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        text = query.shape[2] - self.tokens
        with_themselves = query.shape[2] == key.shape[2] and text >= 0
        self.done |= with_themselves
        if not with_themselves or dropout_p > 0:
            options: dict[str, Any] = {"scale": scale, "enable_gqa": enable_gqa}
            return F.scaled_dot_product_attention(query, key, value, attn_mask, dropout_p, is_causal, **options)
        return self.attend(self.module, query, key, value, mask=attn_mask, causal=is_causal, scale=scale, text=text)


def real_tokens(mask: Tensor | None, q: Tensor) -> Tensor | None:
    """bool (batch, tokens): the keys that an attention mask leaves visible to every query; all without a mask, None for other masks.

    q is (batch, heads, tokens, dim). Masks it can read are bool (batch or 1, 1, 1, tokens).
    """
    batch, tokens = q.shape[0], q.shape[2]
    if mask is None:
        return torch.ones(batch, tokens, dtype=torch.bool, device=q.device)
    if mask.dtype != torch.bool or mask.shape not in ((batch, 1, 1, tokens), (1, 1, 1, tokens)):
        return None
    return mask.view(-1, tokens).expand(batch, -1)
