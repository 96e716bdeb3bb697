"""KV Prediction: a small model reads the prompt, and linear maps make the large model's cache of what the small one keeps.

The base model is frozen. The auxiliary model reads all tokens of a prompt but the last; its raw keys and values (before key norms,
before the rotary embedding) go through one linear map with bias for each layer of the base, heads merged; the base's own key norm and
rotary embedding follow. Then the base takes one step, on the last token, and goes on alone. The cache is transformers' own.

    model = KVPredictor.from_base(base, auxiliary=0.5)        # KVP-LP: every second layer of the base, a copy to be trained
    model = KVPredictor.from_base(base, auxiliary=sibling)    # KVP-C: a smaller model with the same tokenizer
    Trainer(model, ...).train()                               # the auxiliary and the maps; the base stays as it is
    model.generate(**tokenizer(prompt, return_tensors="pt"))

Training (section 4.3): the base runs over predicted keys and values at every position, its own left out. The loss is its cross-entropy,
that of the auxiliary, a z-loss for each, and the mean absolute difference between predicted and true keys (after the key norm) and
values, averaged over layers; `variant="as_released"` sums it, as the released configurations do. At inference the last token of a
prompt and all that are generated have their true keys and values, which training never showed.

What is read behind a cache (a later turn of a conversation, tokens put back after a pause) goes through the base alone. That is our
choice: its entries are exact then, and the auxiliary's cache need not be kept. So prompts must come whole: prefill in chunks is
refused, and `whole_prompts` tells assay's server. Assisted decoding is refused because it verifies its first draft in the pass that
reads the prompt.

Source: "KV Prediction for Improved Time to First Token" (arXiv 2410.08391).

When NOT to use it: untrained, since the maps begin at random; where no quality may be lost; where a prompt is longer than the
auxiliary's context; for long answers, since decoding costs what it did and the auxiliary's weights come on top.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from typing import Any, Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig
from transformers.cache_utils import DynamicCache
from transformers.modeling_outputs import CausalLMOutputWithPast

from assay import checks
from assay.methods.core.generation.cache import keys_and_values
from assay.methods.core.models import decoder
from assay.methods.core.models.decoder import Parts
from assay.methods.core.models.wrapped import WrappedConfig, WrappedForCausalLM

Pair = tuple[Tensor, Tensor]  # keys and values
VARIANTS = ("paper", "as_released")
PER_LAYER = ("layer_types", "no_rope_layers")  # fields of configurations with an entry a layer
IGNORED = -100
PROBE = 3  # tokens


# ------------------------------------------------------------------------------------------------ which layer serves which


def layer_map(base_layers: int, auxiliary_layers: int) -> list[int]:
    """The auxiliary layer that each base layer's cache is predicted from, in order: early ones serve one base layer more (Table 1, KVP-C).

    Raises ValueError for more auxiliary layers than base layers.

    >>> layer_map(7, 3)
    [0, 0, 0, 1, 1, 2, 2]
    """
    base_layers = checks.whole("base_layers", base_layers, low=1)
    auxiliary_layers = checks.whole("auxiliary_layers", auxiliary_layers, low=1, high=base_layers)
    each, more = divmod(base_layers, auxiliary_layers)
    return [layer for layer in range(auxiliary_layers) for _ in range(each + (layer < more))]


def kept_layers(layers: int, share: float) -> list[int]:
    """The layers that stay when a share of them is kept at regular intervals, the first always (Table 4, KVP-LP).

    >>> kept_layers(8, 0.75)
    [0, 1, 2, 4, 5, 6]
    """
    layers = checks.whole("layers", layers, low=1)
    step = Fraction(checks.number("share", share, above=0, high=1)).limit_denominator(1000)
    return [layer for layer in range(layers) if math.ceil((layer + 1) * step) > math.ceil(layer * step)]


def pruned_map(kept: Sequence[int], layers: int) -> list[int]:
    """For each base layer, the place in `kept` of itself or else of the last kept layer before it (Table 1, KVP-LP).

    >>> pruned_map([0, 1, 2, 4, 5, 6], 8)
    [0, 1, 2, 2, 3, 4, 5, 5]
    """
    if not kept or kept[0] != 0 or sorted(set(kept)) != list(kept) or kept[-1] >= layers:
        raise ValueError(f"kept must be rising layers below {layers} that begin with 0, got {checks.shown(list(kept))}")
    return [sum(layer <= index for layer in kept) - 1 for index in range(layers)]


def pruned(model: nn.Module, share: float) -> Any:
    """A copy of a decoder-only model without some of its layers (`kept_layers`), to be trained.

    Its configuration makes the same model again. Raises ValueError for a model that `why_not` does not understand.
    """
    if why := decoder.why_not(model):
        raise ValueError(f"model must be a decoder whose parts are understood: {why}")
    source: Any = model
    layers = source.config.num_hidden_layers
    kept = kept_layers(layers, share)
    # layers that go need not be copied: a stand-in takes their place while the rest is
    gone = {id(layer): nn.Identity() for index, layer in enumerate(source.model.layers) if index not in kept}
    small = copy.deepcopy(source, dict(gone))
    small.model.layers = nn.ModuleList(small.model.layers[index] for index in kept)
    for place, layer in enumerate(small.model.layers):
        for module in layer.modules():
            if hasattr(module, "layer_idx"):
                module.layer_idx = place
    for name in PER_LAYER:
        if getattr(small.config, name, None):
            setattr(small.config, name, [getattr(small.config, name)[index] for index in kept])
    small.config.num_hidden_layers = len(kept)
    return small.requires_grad_(True)


# ---------------------------------------------------------------------------------------------------- raw keys and values


@dataclass(frozen=True, eq=False)
class Site:
    """Where a layer makes its keys and values: in `k_proj` and `v_proj`, or behind the queries in a fused `qkv_proj`.

    `queries`, `keys` and `values` are widths, heads merged; `dim` is that of a head.
    """

    attention: Any
    dim: int
    queries: int
    keys: int
    values: int

    @property
    def fused(self) -> bool:
        return hasattr(self.attention, "qkv_proj")

    def make(self, x: Tensor) -> list[Tensor]:
        """Raw keys and values of normed hidden states (batch, tokens, hidden)."""
        if self.fused:
            return list(self.attention.qkv_proj(x)[..., self.queries :].split([self.keys, self.values], -1))
        return [self.attention.k_proj(x), self.attention.v_proj(x)]


def site_of(attention: Any) -> Site:
    """The site of a layer's attention. Raises ValueError for one without such projections."""
    name = type(attention).__name__
    dim = getattr(attention, "head_dim", None)
    if not isinstance(dim, int) or not (hasattr(attention, "qkv_proj") or hasattr(attention, "k_proj")):
        raise ValueError(f"{name} has no k_proj and v_proj, nor a qkv_proj, of heads of one size")
    if hasattr(attention, "qkv_proj"):
        width = attention.config.num_key_value_heads * dim
        return Site(attention, dim, attention.config.num_attention_heads * dim, width, width)
    widths = [getattr(attention, part).out_features for part in ("q_proj", "k_proj", "v_proj")]
    return Site(attention, dim, *widths)


@contextlib.contextmanager
def recorded(sites: Sequence[Site]) -> Iterator[list[list[Tensor]]]:
    """The raw keys and values (batch, tokens, width) of every layer that runs in the block, a list [keys, values] a layer."""
    found: list[list[Any]] = [[None, None] for _ in sites]

    def keep(index: int, part: int, _module: nn.Module, _inputs: Any, out: Tensor) -> None:
        found[index][part] = out

    def keep_both(index: int, start: int, width: int, _module: nn.Module, _inputs: Any, out: Tensor) -> None:
        found[index][:] = out[..., start : start + width], out[..., start + width :]

    with contextlib.ExitStack() as stack:
        for index, site in enumerate(sites):
            if site.fused:
                hooks = [(site.attention.qkv_proj, functools.partial(keep_both, index, site.queries, site.keys))]
            else:
                ways = (site.attention.k_proj, site.attention.v_proj)
                hooks = [(way, functools.partial(keep, index, part)) for part, way in enumerate(ways)]
            for module, hook in hooks:
                stack.callback(module.register_forward_hook(hook).remove)
        yield found


@contextlib.contextmanager
def given(sites: Sequence[Site], pairs: Sequence[Pair]) -> Iterator[None]:
    """In the block the layers take these raw keys and values for their own, which are not computed (unless fused with the queries)."""
    with contextlib.ExitStack() as stack:
        for site, (keys, values) in zip(sites, pairs, strict=True):
            if site.fused:
                way = site.attention.qkv_proj
                stack.enter_context(_instead(way, functools.partial(_behind, way.forward, site.queries, keys, values)))
            else:
                stack.enter_context(_instead(site.attention.k_proj, functools.partial(_constant, keys)))
                stack.enter_context(_instead(site.attention.v_proj, functools.partial(_constant, values)))
        yield


@contextlib.contextmanager
def _instead(module: Any, forward: Any) -> Iterator[None]:
    own = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own


def _constant(value: Tensor, *_inputs: Any) -> Tensor:
    return value


def _behind(own: Any, queries: int, keys: Tensor, values: Tensor, x: Tensor) -> Tensor:
    return torch.cat([own(x)[..., :queries], keys, values], -1)


def read(
    parts: Parts,
    sites: Sequence[Site],
    input_ids: Tensor,
    attention_mask: Any = None,
    position_ids: Tensor | None = None,
) -> list[list[Tensor]]:
    """The raw keys and values of the layers of `sites`, the model's first ones; of the last one nothing else is computed."""
    run = parts.begin(input_ids, attention_mask, position_ids)
    x, last = run.hidden, len(sites) - 1
    with recorded(sites[:last]) as found:
        for index in range(last):
            x = parts.layer(index, x, run)
    norm = getattr(parts.layers[last], "input_layernorm", None)  # OLMo 2 has none before its attention
    return [*found, sites[last].make(x if norm is None else norm(x))]


def normed(site: Site, keys: Tensor) -> Tensor:
    """Raw keys (batch, tokens, width) after the layer's own key norm, of each head or of all together; as they are without one."""
    norm = getattr(site.attention, "k_norm", None)
    if norm is None:
        return keys
    if norm.weight.numel() == site.keys:
        whole: Tensor = norm(keys)
        return whole
    each: Tensor = norm(keys.unflatten(-1, (-1, site.dim)))
    return each.flatten(-2)


def placed(site: Site, keys: Tensor, values: Tensor, rotary: Pair) -> Pair:
    """Normed keys and values (batch, tokens, width) as the layer's cache has them: heads apart, keys turned to their places."""
    keys, values = (x.unflatten(-1, (-1, site.dim)).transpose(1, 2) for x in (keys, values))
    if getattr(site.attention, "use_rope", True):  # SmolLM3 has layers that do not turn
        turn = vars(sys.modules[type(site.attention).__module__])["apply_rotary_pos_emb"]
        keys = turn(keys[:, :0], keys, *rotary)[1]
    return keys, values


def why_not(model: nn.Module) -> str:
    """Why a model's cache cannot be predicted, or be predicted from; empty if it can.

    Its parts must be understood (`core.models.decoder`), and what its cache holds must be its raw keys and values after its own key
    norm and rotary embedding, which a few tokens show.
    """
    if why := decoder.why_not(model):
        return why
    name, parts = type(model).__name__, Parts(model)
    try:
        sites = [site_of(layer.self_attn) for layer in parts.layers]
        same = any(p.device.type == "meta" for p in model.parameters()) or _same_cache(model, parts, sites)
    except Exception as error:  # whatever attention that only looks familiar makes of it
        return f"{name} makes its keys in a way of its own ({type(error).__name__}: {str(error)[:100]})"
    return "" if same else f"{name}'s cache holds something else than its keys and values, normed and turned"


@torch.no_grad()
def _same_cache(model: Any, parts: Parts, sites: Sequence[Site]) -> bool:
    ids = torch.arange(PROBE, device=parts.embed.weight.device)[None] % parts.embed.num_embeddings
    cache, training = DynamicCache(config=parts.config), model.training
    model.eval()
    try:
        with recorded(sites) as raw:
            model(input_ids=ids, cache=cache, use_cache=True)
        run, kept = parts.begin(ids), keys_and_values(cache)
        for index, (site, (keys, values)) in enumerate(zip(sites, raw, strict=True)):
            made = placed(site, normed(site, keys), values, run.rotary[parts.kinds[index]])
            for ours, own in zip(made, kept[index], strict=True):
                wanted = ours[:, :, ours.shape[2] - own.shape[2] :]  # a window may be shorter than the probe
                if own.shape != wanted.shape or not torch.allclose(own, wanted, rtol=1e-3, atol=1e-5):
                    return False
    finally:
        model.train(training)
    return True


# ------------------------------------------------------------------------------------------------------------ the model


class Predictor(nn.Module):
    """For each base layer one linear map with bias from the raw keys of its auxiliary layer to its own, and one for values.

    `sources` and `targets` are the (keys, values) widths of the auxiliary's layers and the base's, which may differ from layer to layer.
    The maps begin as torch's linear layers do.
    """

    def __init__(
        self, layers: Sequence[int], sources: Sequence[tuple[int, int]], targets: Sequence[tuple[int, int]]
    ) -> None:
        super().__init__()
        self.layers = list(layers)
        pairs = [(sources[layer], target) for layer, target in zip(self.layers, targets, strict=True)]
        self.keys = nn.ModuleList(nn.Linear(source[0], target[0]) for source, target in pairs)
        self.values = nn.ModuleList(nn.Linear(source[1], target[1]) for source, target in pairs)

    def reset_parameters(self) -> None:
        """Random maps, from torch's global generator."""
        for linear in (*self.keys, *self.values):
            linear.reset_parameters()

    @torch.no_grad()
    def identity_(self) -> Self:
        """Maps that change nothing: a start for an auxiliary that is the base without some layers (our choice; the paper starts at random).

        Raises ValueError for layers of other widths.
        """
        linears: list[Any] = [*self.keys, *self.values]
        if odd := next((linear for linear in linears if linear.in_features != linear.out_features), None):
            raise ValueError(
                f"identity_ needs layers of equal widths, got a map from {odd.in_features} to {odd.out_features}"
            )
        for linear in linears:
            nn.init.eye_(linear.weight)
            nn.init.zeros_(linear.bias)
        return self

    def forward(self, raw: Sequence[Sequence[Tensor]]) -> list[Pair]:
        """Raw keys and values of the auxiliary's layers, each (batch, tokens, width), to those of the base's layers."""
        return [
            (keys(raw[layer][0]), values(raw[layer][1]))
            for layer, keys, values in zip(self.layers, self.keys, self.values, strict=True)
        ]


class KVPredictionConfig(WrappedConfig):
    """The configurations of `base` and `auxiliary` (None: the base's), which layer serves which, and the weights of the loss.

    - `layer_map`: the auxiliary layer of each base layer, never falling; None is `layer_map(...)`.
    - `auxiliary_weight`, `consistency` (lambda_C) and `z_loss`: what the auxiliary's cross-entropy, the difference of the caches and
      the squared log-partition count beside the base's cross-entropy.
    - `variant`: "paper" averages the difference over the layers, "as_released" sums it.

    Raises TypeError or ValueError for values out of range, and ValueError for maps that do not fit the layers.
    """

    model_type = "assay_kv_prediction"
    sub_configs = {"base": AutoConfig, "auxiliary": AutoConfig}

    def __init__(
        self,
        base: PretrainedConfig | Mapping[str, Any] | None = None,
        auxiliary: PretrainedConfig | Mapping[str, Any] | None = None,
        layer_map: Sequence[int] | None = None,
        auxiliary_weight: float = 1.0,
        consistency: float = 1.0,
        z_loss: float = 1e-4,
        variant: Literal["paper", "as_released"] = "paper",
        **kwargs: Any,
    ):
        self.auxiliary = _configuration(auxiliary if auxiliary is not None else copy.deepcopy(base))
        super().__init__(base, **kwargs)
        self.layer_map = _checked_map(layer_map, self.base.num_hidden_layers, self.auxiliary.num_hidden_layers)
        self.auxiliary_weight = checks.number("auxiliary_weight", auxiliary_weight, low=0)
        self.consistency = checks.number("consistency", consistency, low=0)
        self.z_loss = checks.number("z_loss", z_loss, low=0)
        self.variant = checks.choice("variant", variant, VARIANTS)


def _configuration(given: Any) -> Any:
    """A configuration, as `WrappedConfig` takes its base."""
    try:
        return WrappedConfig(base=given).base
    except (TypeError, ValueError) as error:
        raise type(error)(str(error).replace("base", "auxiliary", 1)) from None


def _checked_map(given: Any, base_layers: int, auxiliary_layers: int) -> list[int]:
    if given is None:
        if auxiliary_layers > base_layers:
            raise ValueError(
                f"layer_map must be given where the auxiliary has more layers ({auxiliary_layers}) than the base ({base_layers})"
            )
        return layer_map(base_layers, auxiliary_layers)
    if not isinstance(given, list | tuple):
        raise TypeError(f"layer_map must be a list of layers, got {checks.shown(given)}")
    layers = [checks.whole("layer_map", layer, low=0, high=auxiliary_layers - 1) for layer in given]
    if len(layers) != base_layers or layers != sorted(layers):
        raise ValueError(
            f"layer_map must have {base_layers} layers, one for each of the base's, that never fall, got {checks.shown(layers)}"
        )
    return layers


class KVPredictor(WrappedForCausalLM):
    """A causal language model whose cache of a prompt is predicted; see the module.

    Parameters: `base` (frozen, always in eval mode), `auxiliary` and `predictor`. Make one with `from_base`; `generate`, `save_pretrained`,
    `from_pretrained` and `Trainer` work as with any other, `last_hidden_state` and attention weights are not there.
    """

    config_class = KVPredictionConfig
    config: Any
    _is_stateful = True  # refuses assisted decoding, which mixes the prompt with a draft; nothing else
    _supports_attention_backend = (
        False  # refuses prompts packed into a row: the last token of each needs a step of its own
    )
    whole_prompts = "the cache of a prompt is predicted at once"

    def __init__(
        self, config: KVPredictionConfig, base: nn.Module | None = None, auxiliary: nn.Module | None = None
    ) -> None:
        super().__init__(config, base)
        self.auxiliary: Any = (
            AutoModelForCausalLM.from_config(config.auxiliary) if auxiliary is None else auxiliary
        )  # fmt: skip
        widths = [[(site.keys, site.values) for site in sites] for sites in (self.auxiliary_sites, self.sites)]
        self.predictor = Predictor(config.layer_map, *widths)
        self.loss_type = "ForCausalLM"  # by which the Trainer counts what is asked: labels are shifted
        self.post_init()
        self.train(self.training)

    @classmethod
    def from_base(cls, model: nn.Module, *, auxiliary: nn.Module | float = 0.5, **settings: Any) -> Self:
        """Wrap `model`, with a smaller model that has the same vocabulary and dtype, or the share of the base's layers to keep as one.

        The weights of both models are used, not copied, and not changed by wrapping (those of kept layers are copied). The base is
        frozen and put into eval mode. The maps begin at random: train before use. `settings` are fields of `KVPredictionConfig`. Raises
        ValueError for models that `why_not` does not understand or that do not go together, TypeError for another kind of auxiliary.
        """
        if isinstance(auxiliary, bool) or not isinstance(auxiliary, nn.Module | float | int):
            raise TypeError(f"auxiliary must be a model or the share of layers to keep, got {checks.shown(auxiliary)}")
        if why := why_not(model):
            raise ValueError(f"model must have a cache that can be predicted: {why}")
        base: Any = model
        if isinstance(auxiliary, nn.Module):
            small: Any = auxiliary
            if {id(p) for p in small.parameters()} & {id(p) for p in base.parameters()}:
                raise ValueError("auxiliary must share no weights with the base: they are trained, the base is frozen")
            if why := why_not(small):
                raise ValueError(f"auxiliary must have a cache to predict from: {why}")
            _require_alike(base, small)
        else:
            kept = kept_layers(base.config.num_hidden_layers, auxiliary)
            settings.setdefault("layer_map", pruned_map(kept, base.config.num_hidden_layers))
            small = pruned(base, auxiliary)
        config = cls.config_class(base=base.config, auxiliary=small.config, **settings)
        for module in (*base.modules(), *small.modules()):
            module._is_hf_initialized = True  # else `post_init` would draw them anew
        training = base.training
        wrapped = cls(config, base, small)
        reference = base.get_input_embeddings().weight
        wrapped.predictor.to(device=reference.device, dtype=reference.dtype)
        if getattr(base, "generation_config", None) is not None:
            wrapped.generation_config = copy.deepcopy(base.generation_config)
        return wrapped.train(training)

    def train(self, mode: bool = True) -> Self:
        """As torch's; the base stays frozen and in eval mode, without dropout: its true keys are the target."""
        super().train(mode)
        self.base.requires_grad_(False).eval()  # here, because loading makes new parameters and then sets the mode
        return self

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """The maps as torch draws linear layers: as narrow as the base's own weights they would predict next to nothing."""
        if isinstance(module, nn.Linear):
            module.reset_parameters()

    @cached_property
    def auxiliary_parts(self) -> Parts:
        """The auxiliary's parts."""
        return Parts(self.auxiliary)

    @cached_property
    def sites(self) -> list[Site]:
        """Where the base's layers make keys and values."""
        return [site_of(layer.self_attn) for layer in self.parts.layers]

    @cached_property
    def auxiliary_sites(self) -> list[Site]:
        """Where the auxiliary's layers make keys and values."""
        return [site_of(layer.self_attn) for layer in self.auxiliary_parts.layers]

    def predict(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, position_ids: Tensor | None = None
    ) -> list[Pair]:
        """The base's raw keys and values, each (batch, tokens, width), predicted from what the auxiliary makes of these tokens.

        The auxiliary's layers behind the last one that serves are not run, nor is what that one does beside its keys and values.
        """
        wanted = self.auxiliary_sites[: self.config.layer_map[-1] + 1]
        found: list[Pair] = self.predictor(read(self.auxiliary_parts, wanted, input_ids, attention_mask, position_ids))
        return found

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Any = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        num_items_in_batch: Any = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits (batch, tokens, vocabulary) of `input_ids` (batch, tokens); `attention_mask` (batch, tokens) is 0 on left padding.

        - With `labels` (shifted here, -100 asks nothing), or with neither cache nor `use_cache` (which is True in eval mode): the training
          form, predicted keys and values at all positions; with labels the loss (see `losses`), too.
        - With an empty cache, or `use_cache`: the cache of all tokens but the last is predicted, and the base takes a step on the last.
          `logits_to_keep=1` costs no more; otherwise the earlier logits are those of the training form, a pass of the base.
        - Behind a cache, and for a single token: the base.

        Raises ValueError for labels behind a cache or with `logits_to_keep`, and for what the model does not have (input embeddings,
        hidden states, attention weights), TypeError for `past_key_values`, the cache's former name.
        """
        if kwargs.get("past_key_values") is not None:
            raise TypeError("past_key_values is called cache since transformers 5.24")
        for name in ("inputs_embeds", "output_hidden_states", "output_attentions"):
            if (value := kwargs.get(name)) is not None and value is not False:
                raise ValueError(
                    f"{name} must be left out: the auxiliary reads token ids, and what two models do in turn has none"
                )
        ids = checks.tensor("input_ids", input_ids, shape=("batch", "tokens"), dtype="integer")
        seen = 0 if cache is None else cache.get_seq_length()
        if labels is not None:
            if seen or not (isinstance(logits_to_keep, int) and logits_to_keep == 0):
                raise ValueError(
                    "labels must come without a cache and with logits_to_keep 0: the loss is of whole sequences"
                )
            logits, terms = self._supervised(ids, attention_mask, position_ids, labels, num_items_in_batch)
            return CausalLMOutputWithPast(loss=self._loss(terms), logits=logits)
        if cache is None and use_cache is None:
            use_cache = not self.training
        if cache is None and not use_cache:
            predicted = self.predict(ids, _padding(attention_mask), position_ids)
            return CausalLMOutputWithPast(
                logits=self._over(predicted, ids, attention_mask, position_ids, logits_to_keep)
            )
        if cache is None:
            cache = DynamicCache(config=self.config.get_text_config())
        if seen or ids.shape[1] == 1:
            out = self.base(
                input_ids=ids, attention_mask=attention_mask, position_ids=position_ids, cache=cache, use_cache=True,
                logits_to_keep=logits_to_keep,
            )  # fmt: skip
            return CausalLMOutputWithPast(logits=out.logits, cache=out.cache)
        return self._prompt(ids, _padding(attention_mask), position_ids, cache, logits_to_keep)

    def _prompt(
        self, ids: Tensor, mask: Tensor | None, places: Tensor | None, cache: Any, logits_to_keep: int | Tensor
    ) -> CausalLMOutputWithPast:
        """A whole prompt, of two tokens or more: the cache of all but the last predicted, then a step of the base."""
        head, head_mask, head_places = (None if x is None else x[:, :-1] for x in (ids, mask, places))
        assert head is not None
        predicted = self.predict(head, head_mask, head_places)
        turned = torch.arange(head.shape[1], device=head.device)[None] if head_places is None else head_places
        rotary = {kind: self.parts.rotary(kind, predicted[0][0], turned) for kind in set(self.parts.kinds)}
        for index, (site, (keys, values)) in enumerate(zip(self.sites, predicted, strict=True)):
            cache.update(*placed(site, normed(site, keys), values, rotary[self.parts.kinds[index]]), index)
        out = self.base(
            input_ids=ids[:, -1:], attention_mask=mask, position_ids=None if places is None else places[:, -1:], cache=cache,
            use_cache=True, logits_to_keep=1,
        )  # fmt: skip
        logits: Tensor = out.logits
        if not (isinstance(logits_to_keep, int) and logits_to_keep == 1):
            logits = torch.cat([self._over(predicted, head, head_mask, head_places), logits], 1)
            logits = logits[:, -logits_to_keep:] if isinstance(logits_to_keep, int) else logits[:, logits_to_keep]
        return CausalLMOutputWithPast(logits=logits, cache=out.cache)

    def _over(
        self, predicted: list[Pair], ids: Tensor, mask: Tensor | None, places: Tensor | None, keep: int | Tensor = 0
    ) -> Tensor:
        """The training form: logits of the base over predicted keys and values at all positions."""
        with given(self.sites, predicted):
            logits: Tensor = self.base(
                input_ids=ids, attention_mask=mask, position_ids=places, use_cache=False, logits_to_keep=keep
            ).logits
        return logits

    def losses(
        self,
        input_ids: Tensor,
        labels: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        num_items_in_batch: Any = None,
    ) -> dict[str, Tensor]:
        """The terms of the loss, not yet weighted: "base" and "auxiliary" (cross-entropy, nats), "base_z" and "auxiliary_z" (squared
        log-partition), "consistency".

        Means over the positions that are asked; consistency over all positions but padding, of the absolute differences of normed keys
        and of values, each averaged over its width, added, and averaged over layers ("as_released": summed). With `num_items_in_batch`
        each is this batch's share of it.
        """
        return self._supervised(input_ids, attention_mask, position_ids, labels, num_items_in_batch)[1]

    def _supervised(
        self, ids: Tensor, mask: Any, places: Tensor | None, labels: Tensor, items: Any
    ) -> tuple[Tensor, dict[str, Tensor]]:
        mask = _padding(mask)
        checks.tensor("labels", labels, shape=tuple(ids.shape), dtype="integer")
        with recorded(self.auxiliary_sites) as raw:
            small = self.auxiliary(input_ids=ids, attention_mask=mask, position_ids=places, use_cache=False)
        trains = torch.is_grad_enabled() and any(p.requires_grad for p in self.auxiliary.parameters())
        if trains and not any(part.requires_grad for pair in raw for part in pair):
            raise ValueError("gradient checkpointing must be that with use_reentrant=False: the other loses the keys")
        predicted = self.predictor(raw)
        logits = self._over(predicted, ids, mask, places)
        terms: dict[str, Tensor] = {}
        for name, found in (("base", logits), ("auxiliary", small.logits)):
            terms[name], terms[f"{name}_z"] = _cross_entropy(found, labels, items)
        if self.config.consistency:
            terms["consistency"] = self._consistency(predicted, ids, mask, places)
            if items is not None:  # this batch's share of all that is asked, as the cross-entropies have it
                terms["consistency"] = terms["consistency"] * (labels[:, 1:] != IGNORED).sum() / items
        return logits, terms

    def _consistency(self, predicted: list[Pair], ids: Tensor, mask: Tensor | None, places: Tensor | None) -> Tensor:
        with torch.no_grad():
            true = read(self.parts, self.sites, ids, mask, places)
        there = torch.ones_like(ids) if mask is None else mask
        there = there.to(torch.float32)
        total = torch.zeros((), device=ids.device)
        for site, (keys, values), (true_keys, true_values) in zip(self.sites, predicted, true, strict=True):
            off = (normed(site, keys).float() - normed(site, true_keys).float()).abs().mean(-1)
            off = off + (values.float() - true_values.float()).abs().mean(-1)
            total = total + (off * there).sum()
        total = total / there.sum()
        return total if self.config.variant == "as_released" else total / len(self.sites)

    def _loss(self, terms: Mapping[str, Tensor]) -> Tensor:
        config = self.config
        loss = terms["base"] + config.z_loss * terms["base_z"]
        loss = loss + config.auxiliary_weight * (terms["auxiliary"] + config.z_loss * terms["auxiliary_z"])
        return loss + config.consistency * terms["consistency"] if config.consistency else loss

    def prepare_inputs_for_generation(self, *args: Any, use_cache: bool | None = True, **kwargs: Any) -> dict[str, Any]:
        """As transformers'. Raises ValueError for `use_cache=False`: the keys of answers would be predicted too."""
        if use_cache is False:
            raise ValueError("use_cache must be True: without a cache every pass would predict the answer's keys too")
        prepared: dict[str, Any] = super().prepare_inputs_for_generation(*args, use_cache=use_cache, **kwargs)
        return prepared

    def _prefill(self, input_ids: Any, generation_config: Any, *args: Any, **kwargs: Any) -> Any:
        """transformers' prefill of a prompt. Raises ValueError for one in chunks: only the first would be predicted."""
        if getattr(generation_config, "prefill_chunk_size", None) is not None:
            raise ValueError(f"prefill_chunk_size must be None: {self.whole_prompts}")
        return super()._prefill(input_ids, generation_config, *args, **kwargs)  # type: ignore[misc]


def _padding(mask: Any) -> Tensor | None:
    return None if mask is None else checks.tensor("attention_mask", mask, shape=("batch", "tokens"), dtype="any")


def _cross_entropy(logits: Tensor, labels: Tensor, items: Any) -> Pair:
    """Cross-entropy and squared log-partition where something is asked, the mean or the sum over `items`."""
    wanted = labels[:, 1:].to(logits.device)
    asked = wanted != IGNORED
    kept = logits[:, :-1][asked].float()
    count = asked.sum() if items is None else items
    return F.cross_entropy(kept, wanted[asked], reduction="sum") / count, kept.logsumexp(-1).square().sum() / count


def _require_alike(base: Any, small: Any) -> None:
    """Raises ValueError for models that do not read the same tokens or lie apart, TypeError for other dtypes."""
    embeddings = [model.get_input_embeddings().weight for model in (base, small)]
    if embeddings[0].shape[0] != embeddings[1].shape[0]:
        raise ValueError(
            f"auxiliary must have the vocabulary of the base, {embeddings[0].shape[0]} tokens, got {embeddings[1].shape[0]}"
        )
    checks.together(base=embeddings[0], auxiliary=embeddings[1])


AutoConfig.register(KVPredictionConfig.model_type, KVPredictionConfig, exist_ok=True)
AutoModelForCausalLM.register(KVPredictionConfig, KVPredictor, exist_ok=True)


# -------------------------------------------------------------------------------------------------------------- what it costs


@dataclass(frozen=True)
class PromptCost:
    """MACs from a prompt to the logits of its last token (1 MAC = 2 FLOPs): by the base alone, and in the three parts of a prediction."""

    base: int
    auxiliary: int
    predictor: int
    step: int  # of the base, on the last token

    @property
    def reduction(self) -> float:
        """How many times fewer MACs the prediction takes."""
        return self.base / (self.auxiliary + self.predictor + self.step)


def prompt_cost(model: KVPredictor, tokens: int, batch: int = 1) -> PromptCost:
    """What prompts of `tokens` tokens cost, counted from the shapes of the layers, attention and head included.

    The paper's estimate (section 4.4, `parameter_ratio`) leaves attention and the step out. Attention over a whole prompt counts as half of
    all pairs, windows as all of them. Raises ValueError for fewer than two tokens, and for layers with weights outside linear layers
    (mixtures of experts).
    """
    tokens, batch = checks.whole("tokens", tokens, low=2), checks.whole("batch", batch, low=1)
    read_by, sites = tokens - 1, model.auxiliary_sites
    last = model.config.layer_map[-1]
    layers = model.auxiliary_parts.layers
    auxiliary = sum(
        _layer_macs(layer, site, read_by, read_by) for layer, site in zip(layers[:last], sites, strict=False)
    )
    attention = sites[last].attention
    ways = [attention.qkv_proj] if sites[last].fused else [attention.k_proj, attention.v_proj]
    auxiliary += read_by * sum(map(_linear_macs, ways))
    head = _linear_macs(model.parts.head)
    whole, step = (
        sum(
            _layer_macs(layer, site, queries, tokens)
            for layer, site in zip(model.parts.layers, model.sites, strict=True)
        )
        + head
        for queries in (tokens, 1)
    )
    return PromptCost(batch * whole, batch * auxiliary, batch * read_by * _linear_macs(model.predictor), batch * step)


def parameter_ratio(model: KVPredictor) -> float:
    """The paper's estimate of the reduction: parameters of the base over those of the auxiliary, embeddings included."""
    base, small = (sum(p.numel() for p in part.parameters()) for part in (model.base, model.auxiliary))
    return base / small


def _linear_macs(module: nn.Module) -> int:
    """MACs a token of all linear layers in there."""
    linears = [part for part in module.modules() if isinstance(part, nn.Linear)]
    held = sum(p.numel() for p in module.parameters() if p.ndim > 1)
    found = sum(linear.in_features * linear.out_features for linear in linears)
    if held != found:
        raise ValueError(f"model must have its weights in linear layers, {type(module).__name__} has others")
    return found


def _layer_macs(layer: nn.Module, site: Site, queries: int, keys: int) -> int:
    pairs = queries * keys * site.queries * 2
    return queries * _linear_macs(layer) + (pairs // 2 if queries > 1 else pairs)
