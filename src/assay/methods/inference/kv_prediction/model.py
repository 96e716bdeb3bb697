"""KV Prediction as a model of transformers: a frozen base, an auxiliary that reads the prompt, and the maps between their caches.

Training (section 4.3): the base runs over predicted keys and values at every position, its own left out. The loss is its cross-entropy,
that of the auxiliary, a z-loss for each, and the mean absolute difference between predicted and true keys (after the key norm) and
values, averaged over layers; `variant="as_released"` sums it, as the released configurations do. At inference the last token of a
prompt and all that are generated have their true keys and values, which training never showed.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig
from transformers.cache_utils import DynamicCache
from transformers.modeling_outputs import CausalLMOutputWithPast

from assay import checks
from assay.methods.core.models.decoder import Parts
from assay.methods.core.models.wrapped import WrappedConfig, WrappedForCausalLM
from assay.methods.inference.kv_prediction import objectives
from assay.methods.inference.kv_prediction.layers import kept_layers, layer_map, pruned, pruned_map
from assay.methods.inference.kv_prediction.predictor import Predictor
from assay.methods.inference.kv_prediction.sites import (
    Pair,
    Site,
    given,
    normed,
    placed,
    read,
    recorded,
    site_of,
    why_not,
)

VARIANTS = ("paper", "as_released")


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
    not_given = dict.fromkeys(
        ("inputs_embeds", "output_hidden_states", "output_attentions"),
        "the auxiliary reads token ids, and what two models do in turn has none",
    )
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

    def resize_token_embeddings(self, *_: Any, **__: Any) -> Any:
        """Raises NotImplementedError: two tables would have to change together; resize both models before they are wrapped."""
        raise NotImplementedError("resize the embeddings of the base and of the auxiliary before they are wrapped")

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

        Raises ValueError for labels behind a cache or with `logits_to_keep`, for what the model does not have (input embeddings, hidden
        states, attention weights) and for outputs as tuples, TypeError for `past_key_values`, the cache's former name.
        """
        self.refuse(kwargs)
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
        """The base's logits over predicted keys and values, and the terms of the loss."""
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
            terms[name], terms[f"{name}_z"] = objectives.cross_entropy(found, labels, items)
        if self.config.consistency:
            with torch.no_grad():
                true = read(self.parts, self.sites, ids, mask, places)
            off = objectives.consistency(self.sites, predicted, true, mask, self.config.variant)
            if items is not None:  # this batch's share of all that is asked, as the cross-entropies have it
                off = off * (labels[:, 1:] != objectives.IGNORED).sum() / items
            terms["consistency"] = off
        return logits, terms

    def _loss(self, terms: Mapping[str, Tensor]) -> Tensor:
        config = self.config
        return objectives.whole(
            terms, auxiliary_weight=config.auxiliary_weight, consistency=config.consistency, z_loss=config.z_loss
        )

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
        return super()._prefill(input_ids, generation_config, *args, **kwargs)


def _padding(mask: Any) -> Tensor | None:
    return None if mask is None else checks.tensor("attention_mask", mask, shape=("batch", "tokens"), dtype="any")


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
