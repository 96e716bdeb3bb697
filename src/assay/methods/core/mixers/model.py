"""A language model assembled from any mixers: `MixerConfig` names the mixer of each layer, `MixerForCausalLM` is the model.

Pre-norm residual blocks, mixer then channel mixer (SwiGLU), as in the Llama family, so that two models differ in their mixers
alone. It is a transformers model: `generate`, `save_pretrained`, `from_pretrained` and `Trainer` work, and the state of generation
is a `Cache` of theirs that holds one state a layer.

    config = MixerConfig(vocab_size=256, hidden_size=128, layers=[["attention", {"heads": 4, "reach": 64}], ["based", {}]])
    model = MixerForCausalLM(config)

When NOT to use it: to load somebody's checkpoint; the layout of the weights is our own.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_outputs import CausalLMOutputWithPast

from assay import checks
from assay.methods.core.mixers.protocol import CHANNEL_MIXERS, MIXERS, Mixer, State, channel_mixer


def make_mixer(name: str, dim: int, **options: Any) -> Mixer:
    """A mixer by its registered name; `options` as its class takes them.

    Raises ValueError for a name no module of the families mixers, attention and layers registers.
    """
    mixer: Mixer = _registered(MIXERS, name)(dim, **options)
    return mixer


def make_channel_mixer(name: str, dim: int, hidden: int, **options: Any) -> nn.Module:
    """A channel mixer by its registered name; errors as `make_mixer`."""
    module: nn.Module = _registered(CHANNEL_MIXERS, name)(dim, hidden, **options)
    return module


def _registered(registry: dict[str, Any], name: str) -> Any:
    if name not in registry:
        for family in ("mixers", "attention", "layers"):
            package = importlib.import_module(f"assay.methods.{family}")
            for module in pkgutil.iter_modules(package.__path__):
                try:
                    importlib.import_module(f"{package.__name__}.{module.name}")
                except ModuleNotFoundError as error:  # a room whose own library is not installed
                    if (error.name or "assay").startswith("assay"):
                        raise
    if name not in registry:
        raise ValueError(f"mixer must be one of {', '.join(sorted(registry))}, got {name!r}")
    return registry[name]


class MixerConfig(PretrainedConfig):
    """`layers` is a list of [mixer name, options], `channel_mixer` one such pair for all layers.

    `intermediate_size` is the channel mixer's inner width (default 8 / 3 of the model's), 0 leaves it out.
    `tie_word_embeddings` shares the embedding with the head. What transformers' configs know besides (token ids and the like) is
    passed on. Raises ValueError or TypeError for values out of range, and ValueError for a `num_hidden_layers` that is not the
    number of layers, and for a channel mixer with an `intermediate_size` of 0.

    >>> config = MixerConfig(hidden_size=64, layers=[["attention", {"heads": 4}], ["attention", {"reach": 32}]])
    >>> config.num_hidden_layers, config.intermediate_size
    (2, 170)
    """

    model_type = "assay_mixer"

    def __init__(
        self,
        vocab_size: int = 256,
        hidden_size: int = 128,
        layers: Sequence[Any] = (("attention", {}),),
        intermediate_size: int | None = None,
        channel_mixer: Sequence[Any] = ("swiglu", {}),
        norm_eps: float = 1e-6,
        tie_word_embeddings: bool = True,
        initializer_range: float = 0.02,
        **kwargs: Any,
    ):
        self.vocab_size = checks.whole("vocab_size", vocab_size, low=1)
        self.hidden_size = checks.whole("hidden_size", hidden_size, low=1)
        self.layers = [_pair("layers", layer) for layer in _listed("layers", layers)]
        self.num_hidden_layers = len(self.layers)
        if kwargs.pop("num_hidden_layers", self.num_hidden_layers) != self.num_hidden_layers:
            raise ValueError(
                f"num_hidden_layers must be the number of layers, {self.num_hidden_layers}, or be left out"
            )
        if intermediate_size is None:
            intermediate_size = 4 * self.hidden_size * 2 // 3
        self.intermediate_size = checks.whole("intermediate_size", intermediate_size, low=0)
        self.channel_mixer = _pair("channel_mixer", channel_mixer)
        if not self.intermediate_size and self.channel_mixer != ["swiglu", {}]:
            raise ValueError("channel_mixer must be left out where intermediate_size is 0: there is none then")
        self.norm_eps = checks.number("norm_eps", norm_eps, low=0)
        self.initializer_range = checks.number("initializer_range", initializer_range, low=0)
        self.tie_word_embeddings = checks.flag("tie_word_embeddings", tie_word_embeddings)
        super().__init__(**kwargs)


def _listed(name: str, value: Any) -> list[Any]:
    if not isinstance(value, list | tuple):
        raise TypeError(f"{name} must be a list of [mixer name, options], got {checks.shown(value)}")
    return list(value)


def _pair(name: str, value: Any) -> list[Any]:
    """[mixer name, options], its own copy."""
    if not (isinstance(value, list | tuple) and len(value) == 2 and isinstance(value[0], str)):
        raise TypeError(f"{name} must hold [mixer name, options], got {checks.shown(value)}")
    if not isinstance(value[1], dict):
        raise TypeError(f"{name} must hold options that are a dict, got {checks.shown(value[1])}")
    return [value[0], dict(value[1])]


class StateCache(Cache):
    """The states of all layers, in the form that transformers' generation passes around. `states` are those before any token."""

    def __init__(self, states: list[State]):
        super().__init__(layers=[])
        self.states, self.seen = states, 0
        # one row of each, to start again from: before the first token all rows are equal
        self._empty = [{name: x[:1].clone() for name, x in state.items()} for state in states]

    @property
    def is_croppable(self) -> bool:
        return False

    @property
    def is_linear(self) -> list[bool]:  # transformers means: states that do not know how many tokens they have seen
        return [False for _ in self.states]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.seen

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.states = [{name: x[beam_idx] for name, x in state.items()} for state in self.states]

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.states = [{name: x.repeat_interleave(repeats, 0) for name, x in state.items()} for state in self.states]

    def batch_select_indices(self, indices: Tensor) -> None:
        self.reorder_cache(indices)

    def crop(self, tokens_to_remove: int) -> None:
        """Raises ValueError: a state cannot be cut back to an earlier token."""
        raise ValueError("the state of a mixer cannot be cut back to an earlier token; keep a copy from then")

    def reset(self) -> None:
        """Start again with empty states, for the current number of sequences."""
        self.states = [
            {name: row.expand(len(state[name]), *row.shape[1:]).clone() for name, row in empty.items()}
            for empty, state in zip(self._empty, self.states, strict=True)
        ]
        self.seen = 0

    @property
    def batch_size(self) -> int:
        """How many sequences the states are of."""
        return max((len(x) for state in self.states for x in state.values()), default=0)

    def bytes(self) -> int:
        """Bytes all states hold now."""
        return sum(x.numel() * x.element_size() for state in self.states for x in state.values())


@channel_mixer("swiglu")
class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)), bias-free."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.gate_proj = nn.Linear(dim, hidden, bias=False)
        self.up_proj = nn.Linear(dim, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return y


class Block(nn.Module):
    """A pre-norm mixer and, with an `intermediate_size`, a pre-norm channel mixer, each with a residual: (batch, tokens, dim)."""

    def __init__(self, config: MixerConfig, index: int):
        super().__init__()
        name, options = config.layers[index]
        self.mixer_norm = nn.RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.mixer = make_mixer(name, config.hidden_size, layer=index, layers=len(config.layers), **options)
        if config.intermediate_size:
            self.mlp_norm = nn.RMSNorm(config.hidden_size, eps=config.norm_eps)
            kind, choices = config.channel_mixer
            self.mlp = make_channel_mixer(kind, config.hidden_size, config.intermediate_size, **choices)

    def forward(self, x: Tensor, state: State | None, mask: Tensor | None) -> tuple[Tensor, State | None]:
        normed = self.mixer_norm(x)
        if mask is not None:
            normed = normed * mask[..., None]
        if state is None:
            mixed = self.mixer(normed, mask)
        else:
            mixed, state = self.mixer.advance(normed, state, mask)
        x = x + mixed
        return (x + self.mlp(self.mlp_norm(x)) if hasattr(self, "mlp") else x), state


class MixerForCausalLM(PreTrainedModel, GenerationMixin):
    """The model; see the module docstring. `forward` returns logits (batch, tokens, vocab), and the loss when given labels."""

    config_class = MixerConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    _no_split_modules = ["Block"]
    _tied_weights_keys = {"lm_head.weight": "embed_tokens.weight"}
    _is_stateful = True  # no rolling back: assisted decoding is refused

    def __init__(self, config: MixerConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.blocks = nn.ModuleList(Block(config, index) for index in range(len(config.layers)))
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Normal weights for linear layers and embeddings; assay's modules with a `reset_parameters` set their own."""
        if type(module).__module__.startswith("assay.") and hasattr(module, "reset_parameters"):
            module.reset_parameters()  # type: ignore[operator]
        elif isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=self.config.initializer_range)
            if isinstance(bias := getattr(module, "bias", None), Tensor):
                nn.init.zeros_(bias)
        elif isinstance(module, nn.RMSNorm):
            nn.init.ones_(module.weight)

    def get_input_embeddings(self) -> nn.Module:
        return self.embed_tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.embed_tokens = value  # type: ignore[assignment]

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """As transformers' models. Raises ValueError where layers were exchanged (packed, folded), of which the configuration knows
        nothing: `from_pretrained` would fill their places with random weights.
        """
        with torch.device("meta"):
            wanted = type(self)(cast(Any, self.config)).state_dict().keys()
        if odd := sorted(wanted ^ self.state_dict().keys()):
            raise ValueError(
                f"layers must be those the configuration makes, which from_pretrained builds: {odd[0]} differs; "
                "store the model before its layers are exchanged"
            )
        super().save_pretrained(*args, **kwargs)

    def new_cache(self, batch: int) -> StateCache:
        """Empty states for `batch` sequences."""
        batch = checks.whole("batch", batch, low=0)
        states = [block.mixer.init_state(batch, device=self.device, dtype=self.dtype) for block in self.blocks]  # type: ignore[union-attr,operator]
        return StateCache(states)

    def state_bytes(self, tokens: int, batch: int = 1) -> int:
        """Bytes of all states after `tokens` tokens."""
        return sum(block.mixer.state_bytes(tokens, batch, self.dtype) for block in self.blocks)  # type: ignore[union-attr,operator]

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        cache: StateCache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """`input_ids` (batch, tokens); `attention_mask` 1 on tokens and 0 on left padding; `labels` as in transformers, summed and
        divided by `num_items_in_batch` where the Trainer gives one, else the mean.

        With `use_cache` or `cache` the states advance, else all tokens are computed in parallel. No tokens give no logits.
        Raises ValueError for padding that does not stand on the left or is told by other numbers than 0 and 1, a cache of another
        batch, and what the model does not have (hidden states, attention weights, input embeddings), TypeError for
        `past_key_values`, the cache's former name.
        """
        if kwargs.get("past_key_values") is not None:
            raise TypeError("past_key_values is called cache since transformers 5.24")
        for name in ("output_hidden_states", "output_attentions", "inputs_embeds"):
            if (given := kwargs.get(name)) is not None and given is not False:
                raise ValueError(f"{name} must be left out: the model does not have it")
        if kwargs.get("return_dict") is False:
            raise ValueError("return_dict must be left out or True: the output has names")
        input_ids = checks.tensor("input_ids", input_ids, shape=("batch", "tokens"), dtype="integer", empty=True)
        logits_to_keep = checks.whole("logits_to_keep", logits_to_keep, low=0)
        if cache is not None and len(input_ids) != cache.batch_size:
            raise ValueError(f"cache must hold {len(input_ids)} sequences, as input_ids, got {cache.batch_size}")
        mask = self._mask(attention_mask, input_ids)
        if cache is None and use_cache and not self.training:
            cache = self.new_cache(len(input_ids))
        x = self.embed_tokens(input_ids)
        for index, block in enumerate(self.blocks):
            x, state = block(x, None if cache is None else cache.states[index], mask)
            if cache is not None:
                cache.states[index] = state
        if cache is not None:
            cache.seen += input_ids.shape[1]
        x = self.norm(x)
        logits = self.lm_head(x[:, -logits_to_keep:] if logits_to_keep else x)
        loss = None
        if labels is not None:
            if logits_to_keep:
                raise ValueError("logits_to_keep must be 0 where labels are given: the loss needs all logits")
            checks.tensor("labels", labels, shape=tuple(input_ids.shape), dtype=torch.int64, empty=True)
            items = kwargs.get("num_items_in_batch")
            wanted, found = labels[:, 1:].flatten(), logits[:, :-1].flatten(0, 1)
            loss = F.cross_entropy(
                found.float(), wanted, ignore_index=-100, reduction="mean" if items is None else "sum"
            )
            loss = loss if items is None else loss / items
        return CausalLMOutputWithPast(loss=loss, logits=logits, cache=cache)

    @staticmethod
    def _mask(attention_mask: Tensor | None, input_ids: Tensor) -> Tensor | None:
        if attention_mask is None:
            return None
        tokens = input_ids.shape[1]
        checks.tensor("attention_mask", attention_mask, shape=(len(input_ids), "tokens"), dtype="any", empty=True)
        if attention_mask.shape[1] < tokens:
            raise ValueError(f"attention_mask must cover {tokens} tokens, got {attention_mask.shape[1]}")
        if ((attention_mask != 0) & (attention_mask != 1)).any():
            raise ValueError("attention_mask must hold 0 and 1 only")
        mask = attention_mask[:, attention_mask.shape[1] - tokens :].bool()
        if mask.all():
            return None
        if (mask[:, :-1] & ~mask[:, 1:]).any():
            raise ValueError("attention_mask must be 0 on the left only: pad on the left")
        return mask


AutoConfig.register("assay_mixer", MixerConfig, exist_ok=True)
AutoModelForCausalLM.register(MixerConfig, MixerForCausalLM, exist_ok=True)
