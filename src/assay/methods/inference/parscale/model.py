"""ParScale as a model of transformers: one base model run as several streams, whose last hidden states are mixed before one head.

    model = ParScaleForCausalLM.from_base(base, parscale_n=4)
    prepare_training(model, "frozen")               # or "two_stage", "scratch"
    ...                                             # train as any model of transformers
    save_adapter(model, "streams-4")                # the new parameters only
    model = load_adapter(base, "streams-4")

`streams` has the cache and the attention, `released` the checkpoints of the paper.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Self, TypeVar

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig
from transformers.modeling_outputs import CausalLMOutputWithPast

from assay import checks
from assay.errors import InputError
from assay.methods.core import kernels
from assay.methods.core.models.wrapped import WrappedConfig, WrappedForCausalLM
from assay.methods.inference.parscale.streams import (
    Prefix,
    Reader,
    StreamCache,
    attending,
    repeated,
    visible_prefix,
    why_no_attention,
)
from assay.paths import atomic_dir

Recipe = Literal["scratch", "two_stage", "frozen"]
RECIPES = ("scratch", "two_stage", "frozen")
Model = TypeVar("Model", bound="ParScaleForCausalLM")
WEIGHTS, SETTINGS = "adapter_model.safetensors", "adapter_config.json"
FORMAT = "assay_parscale_adapter"
SAMPLE = "base_sample"  # the name of what tells a base from others
ROUNDING = 2.0**-8  # of a weight: the most that bfloat16 rounds


class ParScaleConfig(WrappedConfig):
    """The base's configuration and the names that released checkpoints use.

    `parscale_n` streams (1 is the base model itself), `parscale_n_tokens` prefix tokens in every layer, `parscale_attn_smooth` the share
    of the weights that is spread evenly over the streams (0.1 is the paper's recipe; the released configurations default to 0.01).
    With `parscale_prefix_hidden` above 0 the prefixes are the outputs of an MLP of that width, which makes them easier to train;
    `fold_prefixes` stores its outputs in its place. Raises TypeError and ValueError for values out of range, and ValueError for several
    streams around a base whose configuration asks for what they do not return (`output_router_logits`, for one).

    >>> config = ParScaleConfig(parscale_n=4)
    >>> config.parscale_n_tokens, config.parscale_attn_smooth
    (48, 0.1)
    """

    model_type = "assay_parscale"

    def __init__(
        self,
        base: PretrainedConfig | Mapping[str, Any] | None = None,
        parscale_n: int = 1,
        parscale_n_tokens: int = 48,
        parscale_attn_smooth: float = 0.1,
        parscale_prefix_hidden: int = 0,
        **kwargs: Any,
    ):
        self.parscale_n = checks.whole("parscale_n", parscale_n, low=1)
        self.parscale_n_tokens = checks.whole("parscale_n_tokens", parscale_n_tokens, low=1)
        self.parscale_attn_smooth = checks.number("parscale_attn_smooth", parscale_attn_smooth, low=0, high=1)
        self.parscale_prefix_hidden = checks.whole("parscale_prefix_hidden", parscale_prefix_hidden, low=0)
        super().__init__(base, **kwargs)
        if self.parscale_n > 1:
            _check_flags(self.base)


def head_sizes(config: Any) -> tuple[int, int]:
    """Key-value heads and head dim of a decoder's configuration."""
    heads = int(config.num_attention_heads)
    kv_heads = int(getattr(config, "num_key_value_heads", None) or heads)
    return kv_heads, int(getattr(config, "head_dim", None) or config.hidden_size // heads)


def prefix_width(config: Any) -> float:
    """How wide new prefixes are drawn: as wide as the keys and values of an untrained layer, so that streams differ from the start.

    Our choice. Narrow prefixes give all streams nearly the same answers, and what they share cannot be told apart by training.
    """
    return float(getattr(config, "initializer_range", 0.02) * config.hidden_size**0.5)


class LayerPrefix(nn.Module):
    """The prefixes of one layer: `keys` and `values` (streams, key-value heads, tokens, head dim), drawn and never left empty."""

    def __init__(self, streams: int, heads: int, tokens: int, dim: int, std: float) -> None:
        super().__init__()
        self.std = std
        self.keys = nn.Parameter(torch.empty(streams, heads, tokens, dim))
        self.values = nn.Parameter(torch.empty(streams, heads, tokens, dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.keys, std=self.std)
        nn.init.normal_(self.values, std=self.std)


class Prefixes(nn.Module):
    """The prefixes of all layers as they are used: parameters of their own."""

    def __init__(self, config: ParScaleConfig) -> None:
        super().__init__()
        heads, dim = head_sizes(config.base)
        std = prefix_width(config.base)
        self.layers = nn.ModuleList(
            LayerPrefix(config.parscale_n, heads, config.parscale_n_tokens, dim, std)
            for _ in range(config.num_hidden_layers)
        )

    def forward(self) -> list[Prefix]:
        return [(layer.keys, layer.values) for layer in self.layers]  # type: ignore[misc]


class ProjectedPrefixes(nn.Module):
    """The prefixes of all layers as outputs of one MLP (a tanh between two linear layers) over an embedding a stream and token.

    All layers' keys and values come from the same embedding, and all streams share the MLP. The paper says that prefixes are
    reparameterised in training, after prefix tuning (arXiv 2101.00190); the sizes and the start are our choice.
    """

    def __init__(self, config: ParScaleConfig) -> None:
        super().__init__()
        heads, dim = head_sizes(config.base)
        self.shape = (config.num_hidden_layers, 2, heads, dim)
        self.std = prefix_width(config.base)
        width = config.parscale_prefix_hidden
        self.embedding = nn.Parameter(torch.empty(config.parscale_n, config.parscale_n_tokens, width))
        self.inner = nn.Parameter(torch.empty(width, width))
        self.inner_bias = nn.Parameter(torch.empty(width))
        self.outer = nn.Parameter(torch.empty(config.num_hidden_layers * 2 * heads * dim, width))
        self.outer_bias = nn.Parameter(torch.empty(len(self.outer)))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        width = len(self.inner)
        nn.init.normal_(self.embedding)
        nn.init.normal_(self.inner, std=width**-0.5)
        nn.init.normal_(self.outer, std=self.std * width**-0.5)
        nn.init.zeros_(self.inner_bias)
        nn.init.zeros_(self.outer_bias)

    def forward(self) -> list[Prefix]:
        hidden = torch.tanh(F.linear(self.embedding, self.inner, self.inner_bias))
        found = F.linear(hidden, self.outer, self.outer_bias).unflatten(-1, self.shape)  # (P, n, layers, 2, heads, dim)
        pairs = found.permute(2, 3, 0, 4, 1, 5)
        return [(pair[0], pair[1]) for pair in pairs]


class Zeros(nn.Linear):
    """A linear layer that starts with zeros."""

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)


class Aggregator(nn.Module):
    """A weighted mean of the streams' hidden states; an MLP over all of them gives each token its weights.

    The concatenation is by feature, then by stream (h1[0], h2[0], ..., h1[1], h2[1], ...), as released checkpoints have it. A new one
    gives equal weights (our choice: drawn at random they soon rest on one stream).
    """

    def __init__(self, streams: int, width: int, smoothing: float) -> None:
        super().__init__()
        self.smoothing = smoothing
        self.first = nn.Linear(streams * width, width)
        self.second = Zeros(width, streams)

    def weights(self, streams: Tensor) -> Tensor:
        """(streams, batch, tokens, width) -> (batch, tokens, streams), each at least smoothing / streams, together 1."""
        joined = streams.permute(1, 2, 3, 0).flatten(2)
        scores = self.second(F.silu(self.first(joined)))
        weights = scores.to(torch.promote_types(scores.dtype, torch.float32)).softmax(-1)
        return weights * (1 - self.smoothing) + self.smoothing / len(streams)

    def forward(self, streams: Tensor) -> Tensor:
        """(streams, batch, tokens, width) -> (batch, tokens, width)."""
        weights = self.weights(streams).permute(2, 0, 1)[..., None]
        return (weights * streams).sum(0).to(streams.dtype)


def own_modules(config: ParScaleConfig) -> dict[str, nn.Module]:
    """New modules that several streams add to a base, by their names in the model; none for one stream."""
    if config.parscale_n == 1:
        return {}
    return {
        "prefixes": ProjectedPrefixes(config) if config.parscale_prefix_hidden else Prefixes(config),
        "aggregator": Aggregator(config.parscale_n, config.hidden_size, config.parscale_attn_smooth),
    }


NOT_RETURNED = {
    "output_hidden_states": "several streams have no such thing in common",
    "output_attentions": "several streams have no such thing in common",
    "output_router_logits": "the loss that balances experts is not defined over several streams",
}


class ParScaleForCausalLM(WrappedForCausalLM):
    """A decoder run as `parscale_n` streams (arXiv 2505.10475): each has its own learned prefix in every layer, a small MLP mixes the
    streams' last hidden states (after the final norm), and one head follows.

    `forward(input_ids, attention_mask, position_ids, cache, inputs_embeds, labels, use_cache, logits_to_keep)` as any causal model's; it
    returns logits (batch, tokens, vocabulary), the loss when given labels, and a `StreamCache`. One stream is the base model's
    own forward pass, bit for bit, with its own cache. `from_base` wraps a model: any decoder that `core.models.decoder` understands, with
    SDPA or eager attention. The prefixes are new parameters, so a wrapped model says something else until it is trained.

    Raises ValueError for another attention, a mask of more than one kind, a cache of another number of streams or sequences, any cache
    under gradient checkpointing, and what it does not return (hidden states, attention weights, router logits and the loss made of
    them), asked for as an argument or in a configuration; TypeError for a cache that holds no streams.

    When NOT to use it: where compute is scarce. Each token costs all streams' operations, in training too, and the cache grows with
    their number; at large batches or on processors without idle arithmetic a larger model is cheaper.
    """

    config_class = ParScaleConfig
    not_given = NOT_RETURNED
    prefixes: Any
    aggregator: Any

    def __init__(self, config: ParScaleConfig, base: nn.Module | None = None):
        super().__init__(config, base)
        for name, module in own_modules(config).items():
            self.add_module(name, module)
        self.post_init()

    @classmethod
    def from_base(cls, model: nn.Module, **settings: Any) -> Self:
        """Wrap `model`, as every wrapped model does; what the configuration refuses is refused before anything changes."""
        if isinstance(base := getattr(model, "config", None), PretrainedConfig):
            cls.config_class(base=base, **settings)
        return super().from_base(model, **settings)

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False  # `forward` makes the cache: a plain one has no place for prefixes

    def new_cache(self) -> StreamCache:
        """An empty cache for any number of sequences, with copies of the prefixes as they are now. Raises ValueError for one stream."""
        if self.config.parscale_n == 1:
            raise ValueError("parscale_n must be above 1: one stream keeps the base model's own cache")
        prefixes = [(keys.clone(), values.clone()) for keys, values in self.prefixes()]
        return StreamCache(prefixes, self.parts.kinds, getattr(self.parts.config, "sliding_window", None))

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        if self.config.parscale_n == 1:
            return self.base(
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                cache=cache,
                inputs_embeds=inputs_embeds,
                labels=labels,
                use_cache=use_cache,
                logits_to_keep=logits_to_keep,
                **kwargs,
            )
        self.refuse(kwargs)
        _check_flags(self.config)
        _check_flags(self.config.base)
        streams = self.stream_states(
            input_ids,
            attention_mask,
            position_ids,
            cache,
            inputs_embeds,
            use_cache=use_cache,
            keep=logits_to_keep if labels is None else 0,
        )
        return self.output(
            self.aggregator(streams.states),
            cache=streams.cache,
            labels=labels,
            logits_to_keep=0 if labels is None else logits_to_keep,
            num_items_in_batch=kwargs.get("num_items_in_batch"),
        )

    def stream_states(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Any = None,
        inputs_embeds: Tensor | None = None,
        *,
        use_cache: bool | None = None,
        keep: int | Tensor = 0,
    ) -> Streams:
        """The last hidden states of all streams, after the final norm, and the cache; arguments and errors as `forward`'s.

        `keep` is `logits_to_keep`: of these tokens alone.
        """
        parts, count = self.parts, self.config.parscale_n
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("input_ids or inputs_embeds must be given, and not both")
        if inputs_embeds is None:
            checks.tensor("input_ids", input_ids, shape=("batch", "tokens"), dtype="integer")
            inputs_embeds = parts.embed(input_ids)
        batch, tokens = inputs_embeds.shape[:2]
        if attention_mask is not None and (not isinstance(attention_mask, Tensor) or attention_mask.ndim not in (2, 4)):
            raise ValueError(
                "attention_mask must be one tensor of (batch, tokens) or of (batch or 1, 1, queries, keys)"
            )
        implementation = parts.layers[0].self_attn.config._attn_implementation
        if why := why_no_attention(implementation):
            raise ValueError(why)
        replayed = self.training and torch.is_grad_enabled() and _checkpoints(parts.layers)
        if replayed and cache is not None:
            raise ValueError(
                "cache must be left out under gradient checkpointing: layers that run twice would fill it twice"
            )
        if use_cache is None:
            use_cache = bool(getattr(parts.config, "use_cache", True)) and not self.training
        cache = self._cache(cache, batch, bool(use_cache) and not replayed)
        reader = Reader(self.prefixes()) if cache is None else cache

        rows = attention_mask
        if rows is not None and not (rows.ndim == 4 and len(rows) == 1):  # one for all rows serves all streams too
            rows = repeated(rows, count)
        places = position_ids if position_ids is None or len(position_ids) == 1 else repeated(position_ids, count)
        run = parts.begin(None, rows, places, cache, repeated(inputs_embeds, count))
        masks = {
            kind: visible_prefix(mask, tokens, self.config.parscale_n_tokens, run.hidden, explicit=replayed)
            for kind, mask in run.masks.items()
        }
        run = dataclasses.replace(run, masks=masks, cache=reader)
        fused = implementation == "sdpa" and tokens > 1 and None in masks.values()
        path = "causal kernel" if fused else "keys as they are" if tokens == 1 else "mask"
        kernels.ran("attention behind prefixes", path)
        x = run.hidden
        with attending(parts, fused=fused, replayed=replayed):
            for index in range(len(parts.layers)):
                x = parts.layer(index, x, run)
        if isinstance(keep, Tensor):
            x = x[:, keep]
        elif keep:
            x = x[:, -keep:]
        return Streams(parts.norm(x).unflatten(0, (count, batch)), cache)

    def _cache(self, cache: Any, batch: int, wanted: bool) -> StreamCache | None:
        """The cache of this pass: the given one, checked, or a new one if it is wanted."""
        if cache is None:
            return self.new_cache() if wanted else None
        if not isinstance(cache, StreamCache):
            raise TypeError(f"cache must be a StreamCache, as new_cache() makes it, got {type(cache).__name__}")
        if cache.streams != self.config.parscale_n:
            raise ValueError(f"cache must hold {self.config.parscale_n} streams, got {cache.streams}")
        if cache.batch_size not in (-1, batch):
            raise ValueError(f"cache must hold {batch} sequences, as input_ids, got {cache.batch_size}")
        return cache


@dataclasses.dataclass
class Streams:
    """`states` (streams, batch, tokens, width) after the final norm, and the cache, None where none is kept."""

    states: Tensor
    cache: StreamCache | None


def _checkpoints(layers: list[Any]) -> bool:
    return any(getattr(layer, "gradient_checkpointing", False) for layer in layers)


def _check_flags(config: Any) -> None:
    """What would be asked for as an argument may stand in the configuration too."""
    for name, why in NOT_RETURNED.items():
        if getattr(config, name, False):
            raise ValueError(f"{name} must be off in the configuration of {config.model_type}: {why}")


# ------------------------------------------------------------------------------------------------------------------ training


def prepare_training(model: Model, recipe: Recipe) -> Model:
    """Say which parameters train, by the paper's recipes; the model itself.

    - "scratch": all of them, from the first token on; every token costs all streams' operations.
    - "two_stage": all of them too, but the base was trained as an ordinary model before, and the streams see only the last part of the
      tokens (2 % in the paper). The loss jumps when the new parameters come in.
    - "frozen": the prefixes and the aggregator alone. One base then serves any number of streams, each with its own adapter.

    Raises ValueError for another recipe, and for "frozen" with one stream, which has nothing of its own.
    """
    checks.choice("recipe", recipe, RECIPES)
    if recipe == "frozen" and model.config.parscale_n == 1:
        raise ValueError("parscale_n must be above 1 where the base is frozen: one stream has no parameters of its own")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(recipe != "frozen" or not name.startswith("base."))
    return model


@torch.no_grad()
def fold_prefixes(model: Model) -> Model:
    """Store the outputs of the prefixes' MLP in its place; the model computes the same and loses the MLP. The model itself.

    Raises ValueError for a model whose prefixes have none.
    """
    config: Any = model.config
    if not config.parscale_prefix_hidden or config.parscale_n == 1:
        raise ValueError("parscale_prefix_hidden must be above 0: the prefixes come from no MLP")
    found = model.prefixes()
    config.parscale_prefix_hidden = 0
    plain = Prefixes(config).to(found[0][0])
    for layer, (keys, values) in zip(plain.layers, found, strict=True):
        layer.keys.copy_(keys)  # type: ignore[operator]
        layer.values.copy_(values)  # type: ignore[operator]
    model.prefixes = plain.train(model.training)
    return model


# ------------------------------------------------------------------------------------------------------------------ adapters


def save_adapter(model: ParScaleForCausalLM, folder: Path | str) -> None:
    """Write what the streams add to the base, and of it only what tells it from others: two files, whole or not at all.

    `load_adapter` reads them. A base that was trained with the streams ("scratch", "two_stage") must be stored too. Raises ValueError for
    one stream, which adds nothing.
    """
    config: Any = model.config
    if config.parscale_n == 1:
        raise ValueError("parscale_n must be above 1: one stream adds nothing to its base")
    own = {name: value.detach().contiguous() for name, value in _own(model).items()}
    with atomic_dir(folder) as temporary:
        save_file({**own, SAMPLE: sample_of(model.base)}, temporary / WEIGHTS)
        text = json.dumps({"format": FORMAT, **_settings(config), "base": _described(config.base)}, indent=1)
        (temporary / SETTINGS).write_text(text, encoding="utf-8")


def load_adapter(base: nn.Module, folder: Path | str) -> ParScaleForCausalLM:
    """The streams of `save_adapter` around `base`, whose weights are used and not copied; several adapters may share one base.

    The base must be the one that the adapter was stored with, in any floating-point dtype: its sizes, what else of its configuration
    changes what it computes, and a few weights of each matrix are compared. Quantise it, or give it other adapters, afterwards.
    Raises TypeError for a base that is no model of transformers, InputError for a folder that holds no such adapter, or one of another
    base, before anything changes; ValueError as `from_base`.
    """
    if not isinstance(settings := getattr(base, "config", None), PretrainedConfig):
        raise TypeError(f"base must be a model of transformers, got {type(base).__name__}")
    folder = Path(folder)
    try:
        known = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
        kept = load_file(folder / WEIGHTS)
    except (OSError, ValueError, SafetensorError) as error:
        raise InputError(f"{folder} must hold an adapter of ParScale: {error}") from None
    if not isinstance(known, dict) or known.get("format") != FORMAT or not isinstance(known.get("base"), dict):
        raise InputError(f"{folder / SETTINGS} must describe an adapter of ParScale")
    asked = {name: known[name] for name in _settings(ParScaleConfig()) if name in known}
    try:
        config = ParScaleConfig(base=settings, **asked)
    except (TypeError, ValueError) as error:
        raise InputError(f"{folder / SETTINGS}: {error}") from None
    kind = known["base"].get("model_type")
    if settings.model_type != kind:  # another kind of model need not have the other fields
        raise InputError(f"base must have model_type {kind}, as the adapter's, got {settings.model_type}")
    for name, value in _described(settings).items():
        if known["base"].get(name) != value:
            raise InputError(f"base must have {name} {known['base'].get(name)}, as the adapter's, got {value}")
    stored, found = kept.pop(SAMPLE, None), sample_of(base)
    if stored is None or stored.shape != found.shape or not torch.allclose(found, stored, rtol=ROUNDING, atol=1e-6):
        raise InputError(f"base must be the {kind} model that the adapter in {folder} was made for: its weights differ")
    with torch.device("meta"):
        wanted = {
            f"{part}.{name}": value.shape
            for part, module in own_modules(config).items()
            for name, value in module.state_dict().items()
        }
    if {name: value.shape for name, value in kept.items()} != wanted:
        raise InputError(f"{folder / WEIGHTS} does not hold the tensors that its settings ask for")
    model = ParScaleForCausalLM.from_base(base, **asked)
    model.load_state_dict(kept, strict=False)
    return model


@torch.no_grad()
def sample_of(base: nn.Module) -> Tensor:
    """Four weights of every matrix of a model, evenly spaced, float32 on the CPU: a model is known by them in whatever dtype."""
    found = []
    for _, weight in sorted(base.named_parameters()):
        if weight.ndim > 1:
            flat = weight.flatten()
            places = [i * (len(flat) - 1) // 3 for i in range(4)]
            found.append(flat[places].float().cpu())
    return torch.cat(found)


def _own(model: nn.Module) -> dict[str, Tensor]:
    """What the streams add to the base."""
    return {name: value for name, value in model.state_dict().items() if not name.startswith("base.")}


def _settings(config: ParScaleConfig) -> dict[str, Any]:
    names = ("parscale_n", "parscale_n_tokens", "parscale_attn_smooth", "parscale_prefix_hidden")
    return {name: getattr(config, name) for name in names}


def _described(base: Any) -> dict[str, Any]:
    """Of a base's configuration what decides about its sizes and about what it computes, as JSON keeps it."""
    kv_heads, head_dim = head_sizes(base)
    names = (
        "model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "hidden_act",
        "hidden_activation", "rms_norm_eps", "rope_parameters", "sliding_window", "layer_types", "no_rope_layers", "attention_bias",
        "mlp_bias", "query_pre_attn_scalar", "attn_logit_softcapping", "final_logit_softcapping", "use_bidirectional_attention",
        "num_experts_per_tok", "norm_topk_prob", "tie_word_embeddings",
    )  # fmt: skip
    found = {name: getattr(base, name, None) for name in names}
    described: dict[str, Any] = json.loads(json.dumps({**found, "kv_heads": kv_heads, "head_dim": head_dim}))
    return described


AutoConfig.register("assay_parscale", ParScaleConfig, exist_ok=True)
AutoModelForCausalLM.register(ParScaleConfig, ParScaleForCausalLM, exist_ok=True)
