"""A transformers model of ours around a transformers model: `WrappedConfig` holds the base's configuration, `WrappedForCausalLM` the base.

A room derives both, names its `model_type` "assay_<slug>", adds its own modules, writes `forward`, and registers them:

    class MyConfig(WrappedConfig):
        model_type = "assay_my"

    class MyForCausalLM(WrappedForCausalLM):
        config_class = MyConfig

        def __init__(self, config, base=None):
            super().__init__(config, base)
            self.extra = nn.Linear(...)
            self.post_init()

    AutoConfig.register("assay_my", MyConfig, exist_ok=True)
    AutoModelForCausalLM.register(MyConfig, MyForCausalLM, exist_ok=True)

Then `MyForCausalLM.from_base(model)` wraps a model, and `generate`, `save_pretrained`, `from_pretrained`, `Trainer` work as ever. What
`forward` takes in `**kwargs` it hands to `refuse` first.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from functools import cached_property
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationMixin,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_outputs import CausalLMOutputWithPast

from assay import checks
from assay.methods.core.models.decoder import Parts, parts_of

TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")


class WrappedConfig(PretrainedConfig):
    """The configuration of a base model in the field `base`, as an object or as the dict it is stored as; None is a Llama's defaults.

    Sizes, layers and the vocabulary are the base's, and are found there by whoever asks transformers' `get_text_config`; of them this one
    has `vocab_size`, `hidden_size`, `num_hidden_layers` and `num_attention_heads` to read. Raises TypeError for a base that is neither,
    ValueError for a dict whose `model_type` transformers does not know.
    """

    model_type = "assay_wrapped"
    sub_configs = {"base": AutoConfig}

    def __init__(self, base: PretrainedConfig | Mapping[str, Any] | None = None, **kwargs: Any):
        if base is None:
            base = LlamaConfig()
        elif isinstance(base, Mapping):
            known = dict(base)
            kind = known.pop("model_type", None)
            try:
                base = AutoConfig.for_model(kind, **known)
            except ValueError:
                raise ValueError(f"base must name a model_type that transformers knows, got {kind!r}") from None
        elif not isinstance(base, PretrainedConfig):
            raise TypeError(f"base must be a model's configuration, got {checks.shown(base)}")
        self.base = base
        # transformers hands its choices down to `base`: unless somebody chose, they are what the base has
        kwargs.setdefault("attn_implementation", base._attn_implementation)
        kwargs.setdefault("experts_implementation", base._experts_implementation)
        for name in TOKENS:
            kwargs.setdefault(name, getattr(base, name, None))
        # the head is the base's: only its own flag decides whether it is tied
        kwargs["tie_word_embeddings"] = bool(getattr(base, "tie_word_embeddings", False))
        super().__init__(**kwargs)

    def get_text_config(self, *args: Any, **kwargs: Any) -> Any:
        """The base's configuration, from which transformers makes caches and reads sizes."""
        return self.base.get_text_config(*args, **kwargs)

    @property
    def vocab_size(self) -> int:
        return int(self.base.vocab_size)

    @property
    def hidden_size(self) -> int:
        return int(self.base.hidden_size)

    @property
    def num_hidden_layers(self) -> int:
        return int(self.base.num_hidden_layers)

    @property
    def num_attention_heads(self) -> int:
        return int(self.base.num_attention_heads)


class WrappedForCausalLM(PreTrainedModel, GenerationMixin):
    """A causal language model around `base`; see the module. `forward` is the room's.

    `not_given` names what cannot be asked of `forward`, and why; a room may name more, or give reasons of its own.
    """

    not_given: ClassVar[Mapping[str, str]] = dict.fromkeys(
        ("output_hidden_states", "output_attentions"), "the model does not have it"
    )

    config_class = WrappedConfig
    base_model_prefix = "base"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        return True  # a mixture of experts in the base runs its own way; transformers looks for it in this module

    def __init__(self, config: WrappedConfig, base: nn.Module | None = None):
        super().__init__(config)
        self.base: Any = AutoModelForCausalLM.from_config(config.base) if base is None else base

    @classmethod
    def from_base(cls, model: nn.Module, **settings: Any) -> Self:
        """Wrap `model`, a decoder-only model of transformers, with the configuration's other fields as `settings`.

        Its weights are used, not copied, and not changed by wrapping; training the one trains the other. New modules are made in its
        dtype, on its device, and the mode (`eval` or `train`) is its own. Raises ValueError for a model whose parts are not understood
        (`decoder.why_not`), and what the configuration raises.
        """
        parts_of(model)
        base: Any = model
        for module in base.modules():
            module._is_hf_initialized = True  # else `post_init` would draw anew what was exchanged in it
        wrapped = cls(cls.config_class(base=base.config, **settings), base)
        reference = base.get_input_embeddings().weight
        for name, child in wrapped.named_children():
            if name != "base":
                child.to(device=reference.device, dtype=reference.dtype)
        if getattr(base, "generation_config", None) is not None:
            wrapped.generation_config = copy.deepcopy(base.generation_config)
        return wrapped.train(base.training)

    @cached_property
    def parts(self) -> Parts:
        """The base's parts."""
        return Parts(self.base)

    def get_input_embeddings(self) -> nn.Module:
        found: nn.Module = self.base.get_input_embeddings()
        return found

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.base.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        found: nn.Module = self.base.get_output_embeddings()
        return found

    def set_output_embeddings(self, value: nn.Module) -> None:
        self.base.set_output_embeddings(value)

    def refuse(self, options: Mapping[str, Any]) -> None:
        """Nothing, or an error for what cannot be had: `options` are the arguments that the room's `forward` does not name.

        Raises TypeError for `past_key_values`, the cache's former name; ValueError for what `not_given` names, unless it is False or
        None, and for outputs as tuples (`return_dict=False`), which the configuration may ask for too.
        """
        if options.get("past_key_values") is not None:
            raise TypeError("past_key_values is called cache since transformers 5.24")
        for name, why in self.not_given.items():
            if (given := options.get(name)) is not None and given is not False:
                raise ValueError(f"{name} must be left out: {why}")
        asked = options.get("return_dict")
        if (self.config.return_dict if asked is None else asked) is False:
            raise ValueError("return_dict must be left out or True: the output has names")

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """New linear layers and embeddings as narrow as the base's, zero biases; assay's modules by their own `reset_parameters`."""
        if type(module).__module__.startswith("assay.") and hasattr(module, "reset_parameters"):
            module.reset_parameters()  # type: ignore[operator]
        elif isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=getattr(self.config.base, "initializer_range", 0.02))
            if isinstance(bias := getattr(module, "bias", None), Tensor):
                nn.init.zeros_(bias)

    def output(
        self,
        hidden: Tensor,
        *,
        cache: Any = None,
        labels: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        num_items_in_batch: Any = None,
    ) -> CausalLMOutputWithPast:
        """Logits of `hidden` (batch, tokens, width), which went through the last norm, and the loss if there are labels.

        `labels` (batch, tokens) stand at their own tokens and are shifted here; -100 asks nothing. The loss is the mean, or the sum over
        `num_items_in_batch` where the Trainer gives one. `logits_to_keep`: the last so many tokens (0: all), or the places of a tensor.
        Raises ValueError for labels together with `logits_to_keep`.
        """
        if labels is not None and not (isinstance(logits_to_keep, int) and logits_to_keep == 0):
            raise ValueError("logits_to_keep must be 0 where labels are given: the loss needs all logits")
        if isinstance(logits_to_keep, Tensor):
            hidden = hidden[:, logits_to_keep]
        elif logits_to_keep:
            hidden = hidden[:, -logits_to_keep:]
        logits = self.parts.logits(hidden)
        loss = None
        if labels is not None:
            how = "mean" if num_items_in_batch is None else "sum"
            wanted = labels[:, 1:].flatten().to(logits.device)
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), wanted, ignore_index=-100, reduction=how)
            loss = loss if num_items_in_batch is None else loss / num_items_in_batch
        return CausalLMOutputWithPast(loss=loss, logits=logits, cache=cache)
