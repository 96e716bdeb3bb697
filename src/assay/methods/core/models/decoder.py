"""A decoder-only model of transformers as parts, so that a method can run its layers in another order, again, or on some tokens only.

`parts_of(model)` gives views: nothing is copied and nothing is changed. Understood are models built as Llama's is: embedding,
layers of self-attention and MLP with their norms (before, after, or both), a last norm and a head; Llama, Mistral, Qwen2, Qwen3,
Phi-3, SmolLM3, Gemma 1 to 3 and OLMo 2 are, among others. A model that looks like that and computes otherwise (Granite's multipliers) is
found out by running a few tokens both ways.

    parts = parts_of(model)
    run = parts.begin(input_ids, cache=cache)
    x = run.hidden
    for index in range(len(parts.layers)):
        x = parts.layer(index, x, run)
    logits = parts.logits(parts.norm(x))            # the model's own

When NOT to use it: where the model's own `forward` does; hooks, `output_hidden_states` and compiled graphs of the model are not seen.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask

MASKS = {"full_attention": create_causal_mask, "sliding_attention": create_sliding_window_causal_mask}
NORMS = {  # what a layer may have beside its attention and its MLP
    "before": {"input_layernorm", "post_attention_layernorm"},
    "around": {
        "input_layernorm",
        "post_attention_layernorm",
        "pre_feedforward_layernorm",
        "post_feedforward_layernorm",
    },
    "after": {"post_attention_layernorm", "post_feedforward_layernorm"},
}
DROPOUTS = {"resid_attn_dropout", "resid_mlp_dropout"}
PROBE = 5  # tokens


@dataclass
class Pass:
    """One pass over some tokens: the embeddings `hidden` (batch, tokens, width), and what the layers need beside the stream.

    `masks` and `rotary` are by kind of layer. For a subset of the tokens use `dataclasses.replace(run, masks=..., rotary=...)`.
    """

    hidden: Tensor
    position_ids: Tensor  # (batch or 1, tokens)
    masks: dict[str, Any]  # as the model's attention takes them; None where its kernel is causal by itself
    rotary: dict[str, tuple[Tensor, Tensor]]  # cosines and sines, each (batch or 1, tokens, head dim)
    cache: Any = None


class Parts:
    """The parts of `model`; see the module. Made by `parts_of`, which checks that they are understood."""

    def __init__(self, model: Any) -> None:
        self.model, self.config, self.body = model, model.config, model.model
        self.kinds: list[str] = kinds_of(self.config)
        self._norms = _norms(self.layers[0]) if self.layers else "before"
        self._by_kind = "layer_type" in inspect.signature(self.body.rotary_emb.forward).parameters

    # looked up at every use: adapters and quantisers exchange modules

    @property
    def embed(self) -> Any:
        """The embedding of tokens."""
        return self.body.embed_tokens

    @property
    def norm(self) -> Any:
        """The last norm."""
        return self.body.norm

    @property
    def head(self) -> Any:
        """The output layer."""
        return self.model.lm_head

    @property
    def layers(self) -> list[Any]:
        """The layers that run."""
        return list(self.body.layers[: self.config.num_hidden_layers])

    def begin(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Any = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: Tensor | None = None,
    ) -> Pass:
        """Embeddings, positions, masks and rotary tables, as the model itself makes them; arguments as its `forward` takes them.

        `attention_mask` may be a dict of ready masks by kind. Where it is None, transformers reads positions that do not go up by one as
        several packed sequences: give a mask of ones with positions that have gaps. Raises ValueError unless exactly one of `input_ids`
        (batch, tokens) and `inputs_embeds` (batch, tokens, width) is given.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("input_ids or inputs_embeds must be given, and not both")
        hidden: Tensor = self.embed(input_ids) if inputs_embeds is None else inputs_embeds
        if position_ids is None:
            seen = 0 if cache is None else cache.get_seq_length()
            position_ids = torch.arange(seen, seen + hidden.shape[1], device=hidden.device)[None]
        kinds = dict.fromkeys(self.kinds)
        if isinstance(attention_mask, dict):
            masks = {kind: attention_mask[kind] for kind in kinds}
        else:
            masks = {
                kind: MASKS[kind](
                    config=self.config,
                    inputs_embeds=hidden,
                    attention_mask=attention_mask,
                    cache=cache,
                    position_ids=position_ids,
                )
                for kind in kinds
            }
        rotary = {kind: self.rotary(kind, hidden, position_ids) for kind in kinds}
        return Pass(hidden, position_ids, masks, rotary, cache)

    def rotary(self, kind: str, hidden: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines (batch, tokens, head dim) of layers of this kind at `position_ids`, in the dtype of `hidden`."""
        more = (kind,) if self._by_kind else ()
        found: tuple[Tensor, Tensor] = self.body.rotary_emb(hidden, position_ids, *more)
        return found

    def attention(self, index: int, x: Tensor, run: Pass, *, slot: int | None = None) -> Tensor:
        """What layer `index`'s attention adds to a stream `x` (batch, tokens, width), its norms included.

        Keys and values go to place `slot` of `run.cache` (None: `index`).
        """
        layer, kind = self.layers[index], self.kinds[index]
        y = x if self._norms == "after" else layer.input_layernorm(x)
        y = layer.self_attn(hidden_states=y, **self._arguments(kind, run, slot))[0]
        if self._norms != "before":
            y = layer.post_attention_layernorm(y)
        dropout = getattr(layer, "resid_attn_dropout", None)
        added: Tensor = y if dropout is None else dropout(y)
        return added

    def feed_forward(self, index: int, x: Tensor) -> Tensor:
        """What layer `index`'s MLP adds to a stream `x`, its norms included."""
        layer = self.layers[index]
        if self._norms == "before":
            y = layer.mlp(layer.post_attention_layernorm(x))
        else:
            y = layer.mlp(x if self._norms == "after" else layer.pre_feedforward_layernorm(x))
            y = layer.post_feedforward_layernorm(y)
        dropout = getattr(layer, "resid_mlp_dropout", None)
        added: Tensor = y if dropout is None else dropout(y)
        return added

    def layer(self, index: int, x: Tensor, run: Pass, *, slot: int | None = None) -> Tensor:
        """The whole layer, called as the model calls it, so that gradient checkpointing works: the stream after it."""
        out: Tensor = self.layers[index](x, **self._arguments(self.kinds[index], run, slot))
        return out

    def logits(self, hidden: Tensor) -> Tensor:
        """The head, and Gemma's cap, over hidden states that went through `norm`: (batch, tokens, vocabulary)."""
        found: Tensor = self.head(hidden)
        cap = getattr(self.config, "final_logit_softcapping", None)
        return found if cap is None else torch.tanh(found / cap) * cap

    def _arguments(self, kind: str, run: Pass, slot: int | None) -> dict[str, Any]:
        cache = run.cache if run.cache is None or slot is None else _Slot(run.cache, slot)
        return {
            "attention_mask": run.masks[kind],
            "position_embeddings": run.rotary[kind],
            "position_ids": run.position_ids,
            "cache": cache,
        }


class _Slot:
    """A cache of which a layer sees another place than that of its own number."""

    def __init__(self, cache: Any, slot: int) -> None:
        self._cache, self._slot = cache, slot

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        return self._cache.update(keys, values, self._slot, *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cache, name)


def kinds_of(config: Any) -> list[str]:
    """The kind of each layer's attention: "full_attention", "sliding_attention", or another that the configuration names."""
    named = getattr(config, "layer_types", None)
    if named:
        return list(named[: config.num_hidden_layers])
    kind = "full_attention" if getattr(config, "sliding_window", None) is None else "sliding_attention"
    return [kind] * config.num_hidden_layers


def parts_of(model: nn.Module) -> Parts:
    """The parts of a decoder-only model of transformers. Raises ValueError, saying why, for one that is not understood."""
    if why := why_not(model):
        raise ValueError(f"model must be a decoder whose parts are understood: {why}")
    return Parts(model)


def why_not(model: nn.Module) -> str:
    """Why the parts of a model are not understood; empty if they are. The model is run on a few tokens, unless it is on "meta"."""
    if why := _why_not_built(model):
        return why
    if any(tensor.device.type == "meta" for tensor in model.parameters()):
        return ""
    name = type(model).__name__
    try:
        same = _same(model)
    except Exception as error:  # whatever a layer that only looks familiar makes of it
        return f"{name}'s layers do not run as Llama's do ({type(error).__name__}: {str(error)[:100]})"
    return "" if same else f"{name} computes something else than its parts in Llama's order"


def _why_not_built(model: Any) -> str:
    name = type(model).__name__
    body: Any = getattr(model, "model", None)
    for part in ("embed_tokens", "layers", "norm", "rotary_emb"):
        if not hasattr(body, part):
            return f"{name} has no model.{part}"
    if not hasattr(model, "lm_head"):
        return f"{name} has no lm_head"
    layers = list(body.layers[: model.config.num_hidden_layers])
    if not layers or len(layers) != model.config.num_hidden_layers:
        return f"{name} has {len(layers)} layers, its configuration {model.config.num_hidden_layers}"
    for layer in layers:
        if not _norms(layer):
            children = ", ".join(child for child, _ in layer.named_children())
            return f"{name}'s layers are of {children}, not of self_attn, mlp and their norms"
    if odd := sorted(set(kinds_of(model.config)) - set(MASKS)):
        return f"{name} has layers of {odd[0]}"
    return ""


def _norms(layer: nn.Module) -> str:
    """Where a layer's norms stand: "before" its two blocks, "around" or "after" them; empty for a layer of other parts."""
    children = {name for name, _ in layer.named_children()} - DROPOUTS
    if not {"self_attn", "mlp"} <= children or not hasattr(layer.self_attn, "layer_idx"):
        return ""
    return next((where for where, names in NORMS.items() if children - {"self_attn", "mlp"} == names), "")


@torch.no_grad()
def _same(model: Any) -> bool:
    """Whether the model's own logits are those of its parts, over a short prompt and one token more."""
    parts, training = Parts(model), model.training
    ids = torch.arange(PROBE, device=parts.embed.weight.device)[None] % parts.embed.num_embeddings
    model.eval()
    try:
        caches = [DynamicCache(config=parts.config) for _ in range(2)]
        for tokens in (ids[:, :-1], ids[:, -1:]):
            own = model(input_ids=tokens, cache=caches[0], use_cache=True).logits
            run = parts.begin(tokens, cache=caches[1])
            x = run.hidden
            for index in range(len(parts.layers)):
                x = x + parts.attention(index, x, run)
                x = x + parts.feed_forward(index, x)
            found = parts.logits(parts.norm(x))
            if not torch.allclose(own, found, rtol=1e-3, atol=1e-3 * float(own.abs().max())):
                return False
    finally:
        model.train(training)
    return True
