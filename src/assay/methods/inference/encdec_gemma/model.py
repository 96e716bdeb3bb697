"""An encoder-decoder made of two decoder-only models: `EncDecForSeq2SeqLM`, and `EncDecForCausalLM`, which continues prompts with it.

The encoder is a decoder-only stack that reads both ways: its causal masks give way to full ones, its sliding windows to windows of the
same width on either side. The decoder is a decoder-only stack with a sublayer more in every layer, between self-attention and MLP:

    x += self(x);  x += cross(x, encoder states);  x += mlp(x)              # each with its own norms, where the model has its norms

Cross-attention has the heads of the layer's self-attention (biases, norms of queries and keys, and soft-cap too), no rotary positions,
and never a window. Positions of the decoder count from 0. The classes are for every model whose parts
`assay.methods.core.models.decoder` understands; with Gemma 2's parts they compute what transformers' T5Gemma computes.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from functools import cached_property
from types import SimpleNamespace
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    MODEL_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    GenerationMixin,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.cache_utils import Cache, DynamicCache, EncoderDecoderCache, StaticCache
from transformers.masking_utils import create_bidirectional_mask, create_bidirectional_sliding_window_mask
from transformers.modeling_outputs import BaseModelOutput, CausalLMOutputWithPast, Seq2SeqLMOutput
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from assay import checks
from assay.methods.core.generation.cache import position_ids
from assay.methods.core.generation.crop import croppable
from assay.methods.core.models.decoder import Parts, Pass

MASKS = {
    "full_attention": create_bidirectional_mask,
    "sliding_attention": create_bidirectional_sliding_window_mask,
}
TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
READS = ("bidirectional", "causal")
ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj", "qkv_proj", "q_norm", "k_norm"}  # what an attention may be made of


# ------------------------------------------------------------------------------------------------------------------ configuration


class EncDecConfig(PretrainedConfig):
    """`encoder` and `decoder` are configurations of decoder-only models (objects, or the dicts they are stored as; None: a Llama's).

    `encoder_attention` is "bidirectional", or "causal" for the ablation. `decoder_start_token_id`, with which every answer begins, is the
    decoder's BOS unless given. Vocabulary, sizes and special tokens are the decoder's.
    Raises TypeError or ValueError for anything else, also for two vocabularies of different sizes.
    """

    model_type = "assay_encdec_gemma"
    sub_configs = {"encoder": AutoConfig, "decoder": AutoConfig}

    def __init__(
        self,
        encoder: PretrainedConfig | Mapping[str, Any] | None = None,
        decoder: PretrainedConfig | Mapping[str, Any] | None = None,
        encoder_attention: str = "bidirectional",
        decoder_start_token_id: int | None = None,
        **kwargs: Any,
    ):
        self.encoder, self.decoder = _config("encoder", encoder), _config("decoder", decoder)
        self.encoder_attention = checks.choice("encoder_attention", encoder_attention, READS)
        if self.encoder.vocab_size != self.decoder.vocab_size:
            raise ValueError(
                f"encoder and decoder must have one vocabulary, got {self.encoder.vocab_size} and {self.decoder.vocab_size} tokens"
            )
        if decoder_start_token_id is None:
            decoder_start_token_id = getattr(self.decoder, "bos_token_id", None)
        if decoder_start_token_id is not None:
            checks.whole("decoder_start_token_id", decoder_start_token_id, low=0, high=self.decoder.vocab_size - 1)
        self.decoder_start_token_id = decoder_start_token_id
        for name in TOKENS:
            kwargs.setdefault(name, getattr(self.decoder, name, None))
        # the head is the decoder's: only its own flag decides whether it is tied
        kwargs["tie_word_embeddings"] = bool(getattr(self.decoder, "tie_word_embeddings", False))
        # a False is not stored, since it is every configuration's default
        kwargs.setdefault("is_encoder_decoder", "EncDecForCausalLM" not in (kwargs.get("architectures") or ()))
        super().__init__(**kwargs)

    def get_text_config(self, decoder: bool | None = None, encoder: bool | None = None) -> Any:
        """The decoder's configuration, from which transformers makes caches and reads sizes; the encoder's where that alone is wanted."""
        return self.encoder if encoder and not decoder else self.decoder

    @property
    def vocab_size(self) -> int:
        return int(self.decoder.vocab_size)

    @property
    def hidden_size(self) -> int:
        return int(self.decoder.hidden_size)

    @property
    def num_hidden_layers(self) -> int:
        return int(self.decoder.num_hidden_layers)

    @property
    def num_attention_heads(self) -> int:
        return int(self.decoder.num_attention_heads)


def _config(name: str, value: Any) -> Any:
    """A configuration of its own, so that two stacks never share one."""
    if value is None:
        return LlamaConfig()
    if isinstance(value, PretrainedConfig):
        return copy.deepcopy(value)
    if not isinstance(value, Mapping):
        raise TypeError(f"{name} must be a model's configuration, got {checks.shown(value)}")
    known = dict(value)
    kind = known.pop("model_type", None)
    try:
        return AutoConfig.for_model(kind, **known)
    except ValueError:
        raise ValueError(f"{name} must name a model_type that transformers knows, got {kind!r}") from None


# --------------------------------------------------------------------------------------------------------------- cross-attention


def why_not_cross(body: Any) -> str:
    """Why no cross-attention can be made after the self-attention of a model's layers; empty when it can."""
    for layer in body.layers:
        found = layer.self_attn
        own = {name for name, _ in found.named_children()} | {name for name, _ in found.named_parameters(recurse=False)}
        if strange := sorted(own - ATTENTION):
            return f"the attention of {type(body).__name__} has {strange[0]}, which cross-attention would not have"
        if not {"q_proj", "k_proj", "v_proj"} <= own and "qkv_proj" not in own or "o_proj" not in own:
            return f"the attention of {type(body).__name__} has no q_proj, k_proj, v_proj and o_proj"
    return ""


class CrossAttention(nn.Module):
    """Attention of a decoder's stream (B, n, width) over an encoder's states (B, m, encoder width), shaped as the layer's own `like`."""

    def __init__(self, like: Any, config: Any, encoder_width: int, index: int):
        super().__init__()
        self.config, self.layer_idx, self.is_causal = config, index, False
        self.head_dim, self.scaling = like.head_dim, like.scaling
        self.attention_dropout = float(getattr(like, "attention_dropout", 0.0) or 0.0)
        self.softcap = getattr(like, "attn_logit_softcapping", None)
        inner, width = like.o_proj.in_features, like.o_proj.out_features
        fused = getattr(like, "qkv_proj", None)
        q, k, v = (fused,) * 3 if fused is not None else (like.q_proj, like.k_proj, like.v_proj)
        narrow = (fused.out_features - inner) // 2 if fused is not None else k.out_features
        self.num_key_value_groups = inner // narrow
        self.q_proj = nn.Linear(width, inner, bias=q.bias is not None)
        self.k_proj = nn.Linear(encoder_width, narrow, bias=k.bias is not None)
        self.v_proj = nn.Linear(encoder_width, narrow, bias=v.bias is not None)
        self.o_proj = nn.Linear(inner, width, bias=like.o_proj.bias is not None)
        for name in ("q_norm", "k_norm"):
            if hasattr(like, name):
                setattr(self, name, _fresh(getattr(like, name)))

    def forward(self, x: Tensor, states: Tensor | None, mask: Any, cache: Any = None) -> Tensor:
        """What is read, (B, n, width). Keys and values are computed where `cache` does not hold them yet, and are kept there."""
        query = self._heads(self.q_proj(x), "q_norm")
        if cache is not None and cache.is_updated.get(self.layer_idx):
            held = cache.cross_attention_cache.layers[self.layer_idx]
            keys, values = held.keys, held.values
        else:
            keys, values = self._heads(self.k_proj(states), "k_norm"), self._heads(self.v_proj(states), "")
            if cache is not None:
                keys, values = cache.cross_attention_cache.update(keys, values, self.layer_idx)
                cache.is_updated[self.layer_idx] = True
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, _eager)
        read, _ = attend(
            self,
            query,
            keys,
            values,
            mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            sliding_window=None,
            softcap=self.softcap,
        )
        out: Tensor = self.o_proj(read.reshape(*x.shape[:-1], -1))
        return out

    def _heads(self, x: Tensor, norm: str) -> Tensor:
        """(B, tokens, heads * dim) to (B, heads, tokens, dim), normed over the width of the norm: a head's, or that of all."""
        found: Any = getattr(self, norm, None) if norm else None
        by_head = found is not None and found.weight.shape[-1] == self.head_dim
        if found is not None and not by_head:
            x = found(x)
        x = x.view(*x.shape[:-1], -1, self.head_dim)
        return (found(x) if by_head else x).transpose(1, 2)


def _eager(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    softcap: float | None = None,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    """Attention written out, for models with a soft-cap, which SDPA does not know."""
    key, value = (x.repeat_interleave(module.num_key_value_groups, 1) for x in (key, value))
    scores = query @ key.transpose(2, 3) * scaling
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = scores.softmax(-1, dtype=torch.float32).to(query.dtype)
    weights = F.dropout(weights, dropout, module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights


def _fresh(module: nn.Module) -> nn.Module:
    """A copy that `post_init` draws anew."""
    made = copy.deepcopy(module)
    for found in made.modules():
        found._is_hf_initialized = False  # type: ignore[assignment]
    return made


class CrossSublayer(nn.Module):
    """Cross-attention with norms of its own, before it, after it, or both, as `layer` has them around its self-attention."""

    def __init__(self, layer: Any, config: Any, encoder_width: int, index: int):
        super().__init__()
        before, after = norms_of(layer)
        if before:
            self.pre_cross_attn_layernorm = _fresh(getattr(layer, before))
        self.cross_attn = CrossAttention(layer.self_attn, config, encoder_width, index)
        if after:
            self.post_cross_attn_layernorm = _fresh(getattr(layer, after))

    def forward(self, x: Tensor, states: Tensor | None, mask: Any, cache: Any = None) -> Tensor:
        y = self.pre_cross_attn_layernorm(x) if hasattr(self, "pre_cross_attn_layernorm") else x
        y = self.cross_attn(y, states, mask, cache)
        added: Tensor = self.post_cross_attn_layernorm(y) if hasattr(self, "post_cross_attn_layernorm") else y
        return added


def norms_of(layer: nn.Module) -> tuple[str, str]:
    """The names of the norms before and after a layer's self-attention; "" where there is none."""
    before = "input_layernorm" if hasattr(layer, "input_layernorm") else ""
    # with a norm of its own before the MLP, or with none before the attention, this name means what it says
    after = "post_attention_layernorm" if hasattr(layer, "pre_feedforward_layernorm") or not before else ""
    return before, after


# ------------------------------------------------------------------------------------------------------------------- the stacks


class Encoder(nn.Module):
    """A decoder-only model's body that reads both ways ("bidirectional"), or still from left to right ("causal")."""

    main_input_name = "input_ids"  # `generate` asks

    def __init__(self, body: Any, attention: str):
        super().__init__()
        self.body, self.attention = body, attention
        for layer in body.layers:  # without a mask the fused kernels ask this flag
            layer.self_attn.is_causal = attention == "causal"

    @cached_property
    def parts(self) -> Parts:
        return Parts(_headless(self.body))

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Any = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutput:
        """States (B, m, width) after the last norm. `attention_mask` (B, m) is 0 on padding, on either side: positions count tokens.

        Raises ValueError for a mask with other numbers, and unless one of `input_ids` and `inputs_embeds` is given.
        """
        _refuse(kwargs)
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("input_ids or inputs_embeds must be given, and not both")
        parts = self.parts
        hidden = parts.embed(input_ids) if inputs_embeds is None else inputs_embeds
        positions, masks = None, attention_mask
        if isinstance(attention_mask, Tensor) and attention_mask.ndim == 2:
            positions = position_ids(attention_mask)
        if self.attention == "bidirectional":
            masks = {
                kind: MASKS[kind](config=parts.config, inputs_embeds=hidden, attention_mask=attention_mask)
                for kind in dict.fromkeys(parts.kinds)
            }
        run = parts.begin(inputs_embeds=hidden, attention_mask=masks, position_ids=positions)
        x = run.hidden
        for index in range(len(parts.layers)):
            x = parts.layer(index, x, run)
        return BaseModelOutput(last_hidden_state=parts.norm(x))


class Decoder(nn.Module):
    """A decoder-only model's body with a `CrossSublayer` in each layer."""

    def __init__(self, body: Any, encoder_width: int):
        super().__init__()
        self.body, self.gradient_checkpointing = body, False
        self.cross = nn.ModuleList(
            CrossSublayer(layer, body.config, encoder_width, index) for index, layer in enumerate(body.layers)
        )

    @cached_property
    def parts(self) -> Parts:
        return Parts(_headless(self.body))

    def forward(
        self,
        input_ids: Tensor | None,
        states: Tensor | None,
        encoder_mask: Tensor | None,
        *,
        attention_mask: Any = None,
        position_ids: Tensor | None = None,
        cache: EncoderDecoderCache | None = None,
        inputs_embeds: Tensor | None = None,
    ) -> Tensor:
        """Hidden states (B, n, width) after the last norm. `states` (B, m, encoder width) may be None once `cache` holds what is read.

        Raises ValueError for a cache under gradient checkpointing.
        """
        replayed = self.gradient_checkpointing and self.training and torch.is_grad_enabled()
        if replayed and cache is not None:
            raise ValueError(
                "cache must be left out under gradient checkpointing: layers that run twice would fill it twice"
            )
        own = None if cache is None else cache.self_attention_cache
        run = self.parts.begin(input_ids, attention_mask, position_ids, own, inputs_embeds)
        x = run.hidden
        if states is None:
            assert cache is not None
            seen = x.new_empty(len(x), int(cache.cross_attention_cache.get_seq_length()), 0)
        else:
            seen = states
        mask = create_bidirectional_mask(
            config=self.parts.config, inputs_embeds=x, attention_mask=encoder_mask, encoder_hidden_states=seen
        )
        for index in range(len(self.parts.layers)):
            if replayed:
                x = self._gradient_checkpointing_func(self._layer, index, x, run, states, mask, cache)  # type: ignore[operator]
            else:
                x = self._layer(index, x, run, states, mask, cache)
        out: Tensor = self.parts.norm(x)
        return out

    def _layer(self, index: int, x: Tensor, run: Pass, states: Tensor | None, mask: Any, cache: Any) -> Tensor:
        x = x + self.parts.attention(index, x, run)
        x = x + self.cross[index](x, states, mask, cache)
        return x + self.parts.feed_forward(index, x)


def _headless(body: Any) -> Any:
    """What `Parts` reads of a model, for a body without a head."""
    return SimpleNamespace(config=body.config, model=body, lm_head=None)


def _body(config: Any) -> Any:
    """A new body of that configuration, with the attention it was given as far as its class has it."""
    kind: Any = MODEL_MAPPING[type(config)]
    if config._attn_implementation == "sdpa" and not kind._supports_sdpa:
        config._attn_implementation = "eager"
    return AutoModel.from_config(config)


# -------------------------------------------------------------------------------------------------------------------- the model


class EncDecForSeq2SeqLM(PreTrainedModel, GenerationMixin):
    """The encoder-decoder; see the module. `generate`, `save_pretrained`, `AutoModelForSeq2SeqLM` and `Trainer` work as ever.

    When NOT to use it: where one stack and one cache must serve a growing conversation; each new turn is encoded from its beginning.
    """

    config_class = EncDecConfig
    base_model_prefix = "encdec"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _tied_weights_keys = {"lm_head.weight": "decoder.body.embed_tokens.weight"}
    _encoder_decoder = True

    def __init__(self, config: EncDecConfig, encoder: Any = None, decoder: Any = None, lm_head: Any = None):
        config.is_encoder_decoder = self._encoder_decoder
        super().__init__(config)
        self.encoder = Encoder(_body(config.encoder) if encoder is None else encoder, config.encoder_attention)
        self.decoder = Decoder(_body(config.decoder) if decoder is None else decoder, config.encoder.hidden_size)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False) if lm_head is None else lm_head
        # what the stacks were built with, their kind of attention included
        config.encoder, config.decoder = self.encoder.body.config, self.decoder.body.config
        self.post_init()
        self.generation_config.decoder_start_token_id = config.decoder_start_token_id

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """As the decoder's own class does it: its width, its kind of norm."""
        self.decoder.body._init_weights(module)

    def get_input_embeddings(self) -> nn.Module:
        found: nn.Module = self.encoder.body.embed_tokens
        return found

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.encoder.body.embed_tokens = value

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def set_output_embeddings(self, value: nn.Module) -> None:
        self.lm_head = value

    def resize_token_embeddings(self, *_: Any, **__: Any) -> Any:
        """Raises NotImplementedError: two tables and a head would have to change together; resize the models before they are converted."""
        raise NotImplementedError("resize the embeddings of the decoder-only models before they are converted")

    def prepare_decoder_input_ids_from_labels(self, labels: Tensor) -> Tensor:
        """`labels` (B, n) one place to the right, behind the start token; what is -100 becomes padding.

        Raises ValueError where the configuration names no start token.
        """
        start, pad = self.config.decoder_start_token_id, self.config.pad_token_id
        if start is None:
            raise ValueError("decoder_start_token_id must be set in the configuration: the decoder has no BOS")
        shifted = torch.cat([torch.full_like(labels[:, :1], start), labels[:, :-1]], 1)
        return shifted.masked_fill(shifted == -100, start if pad is None else pad)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        decoder_attention_mask: Any = None,
        encoder_outputs: Any = None,
        cache: EncoderDecoderCache | None = None,
        inputs_embeds: Tensor | None = None,
        decoder_inputs_embeds: Tensor | None = None,
        decoder_position_ids: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        num_items_in_batch: Any = None,
        **kwargs: Any,
    ) -> Seq2SeqLMOutput:
        """Logits (B, n, vocabulary) of the answer `decoder_input_ids` (B, n) to `input_ids` (B, m).

        `labels` (B, n) stand at the place that predicts them, -100 where nothing is asked, and are the answer where none is given (shifted
        right). The loss is their mean, or the sum over `num_items_in_batch` where the Trainer gives one. `attention_mask` (B, m) is 0 on
        padding. Raises ValueError for what is missing, for a cache under gradient checkpointing, and for what the model does not have
        (hidden states, attention weights), TypeError for a cache of another kind.
        """
        _refuse(kwargs)
        if cache is not None and not isinstance(cache, EncoderDecoderCache):
            raise TypeError(f"cache must be an EncoderDecoderCache, got {type(cache).__name__}")
        if labels is not None:
            checks.tensor("labels", labels, shape=("batch", "tokens"), dtype=torch.int64)
            if not (isinstance(logits_to_keep, int) and logits_to_keep == 0):
                raise ValueError("logits_to_keep must be 0 where labels are given: the loss needs all logits")
            if decoder_input_ids is None and decoder_inputs_embeds is None:
                decoder_input_ids = self.prepare_decoder_input_ids_from_labels(labels)
        if (decoder_input_ids is None) == (decoder_inputs_embeds is None):
            raise ValueError("decoder_input_ids, decoder_inputs_embeds or labels must be given, not two of them")
        if encoder_outputs is None:
            encoder_outputs = self.encoder(input_ids, attention_mask, inputs_embeds)
        states: Tensor = encoder_outputs[0]
        if use_cache and cache is None and not self.training:
            cache = self.new_cache()
        hidden = self.decoder(
            decoder_input_ids,
            states,
            attention_mask,
            attention_mask=decoder_attention_mask,
            position_ids=decoder_position_ids,
            cache=cache,
            inputs_embeds=decoder_inputs_embeds,
        )
        logits = self._logits(hidden, logits_to_keep)
        loss = None
        if labels is not None:
            how = "mean" if num_items_in_batch is None else "sum"
            loss = F.cross_entropy(
                logits.flatten(0, 1).float(), labels.flatten().to(logits.device), ignore_index=-100, reduction=how
            )
            loss = loss if num_items_in_batch is None else loss / num_items_in_batch
        return Seq2SeqLMOutput(loss=loss, logits=logits, cache=cache, encoder_last_hidden_state=states)

    def _logits(self, hidden: Tensor, keep: int | Tensor = 0) -> Tensor:
        if isinstance(keep, Tensor):
            hidden = hidden[:, keep]
        elif keep:
            hidden = hidden[:, -keep:]
        logits: Tensor = self.lm_head(hidden)
        cap = getattr(self.config.decoder, "final_logit_softcapping", None)
        return logits if cap is None else torch.tanh(logits / cap) * cap

    def new_cache(self) -> EncoderDecoderCache:
        """An empty cache: the decoder's windows for its own tokens, all of the encoder's states for what it reads."""
        return EncoderDecoderCache(DynamicCache(config=self.decoder.body.config), DynamicCache())

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: Any, *args: Any, **kwargs: Any
    ) -> Any:
        """As transformers does it, but what is read from the encoder never lies in a cache with windows."""
        usual: Any = super()
        usual._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)
        cache = model_kwargs.get("cache")
        if not isinstance(cache, EncoderDecoderCache) or any(cache.is_updated.values()):
            return
        whole: Any
        read: Cache = DynamicCache()
        if isinstance(cache.cross_attention_cache, StaticCache):
            whole = copy.deepcopy(self.config.decoder)
            whole.sliding_window = None
            if getattr(whole, "layer_types", None):
                whole.layer_types = ["full_attention"] * whole.num_hidden_layers
            tokens = model_kwargs["encoder_outputs"][0].shape[1]
            read = StaticCache(config=whole, max_cache_len=tokens)
        cache.cross_attention_cache = read


def _refuse(kwargs: dict[str, Any]) -> None:
    """Raise for what the models do not have; what says "no" to it may be given."""
    if kwargs.get("past_key_values") is not None:
        raise TypeError("past_key_values is called cache since transformers 5.24")
    for name in ("output_hidden_states", "output_attentions", "output_router_logits"):
        if kwargs.get(name):
            raise ValueError(f"{name} must be left out: the model does not have it")
    if kwargs.get("return_dict") is False:
        raise ValueError("return_dict must be left out or True: the output has names")


# ---------------------------------------------------------------------------------------------------- as a causal language model


class AnswerCache(Cache):
    """What `EncDecForCausalLM` keeps of a batch: the decoder's keys and values, and where the prompts (B, m) had tokens (`mask`)."""

    def __init__(self, inner: EncoderDecoderCache, mask: Tensor):
        super().__init__(layers=[])
        self.inner, self.mask = inner, mask

    @property
    def is_croppable(self) -> bool:
        return False

    @property
    def is_linear(self) -> list[bool]:  # transformers means: states that do not know how many tokens they have seen
        return [False]

    @property
    def answered(self) -> int:
        """Tokens of the answer that were read, after the start token."""
        return int(self.inner.get_seq_length()) - 1

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens seen, as a causal model counts them: prompt (padding included) and answer."""
        return self.mask.shape[1] + self.answered

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.inner.reorder_cache(beam_idx)
        self.mask = self.mask[beam_idx.to(self.mask.device)]

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.inner.batch_repeat_interleave(repeats)
        self.mask = self.mask.repeat_interleave(repeats, 0)

    def batch_select_indices(self, indices: Tensor) -> None:
        self.inner.batch_select_indices(indices)
        self.mask = self.mask[indices]

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last tokens of the answer, their number below zero as transformers gives it.

        Raises ValueError, before any layer changes, for more of them than were read (the prompt was read as a whole), and where a window of
        the decoder has left behind what would come into it again; transformers' `activate_past_recording` keeps that.
        """
        self.inner.crop(croppable(self.inner.self_attention_cache, tokens_to_remove, self.answered))

    def reset(self) -> None:
        """Raises ValueError: without its prompt nothing is left; take a new cache."""
        raise ValueError("a cache of answers cannot be emptied: its prompts were read; take a new one")


class EncDecForCausalLM(EncDecForSeq2SeqLM):
    """The encoder-decoder as a causal language model, for whoever continues prompts: the encoder reads the prompt, the decoder answers.

    The first call, without a cache, reads whole prompts (B, m), left-padded where they differ, and gives the logits (B, 1, vocabulary)
    of the answer's first token, and an `AnswerCache`. Every later call takes that cache and one token a row. A prompt in pieces
    cannot be: a second piece of several tokens is refused, and a single token is one of the answer. There are no logits of prompt
    tokens, so `logits_to_keep` is 1, and nothing to train with: labels are refused. `position_ids` are those of a causal model and are not
    used; the encoder's count the tokens of `attention_mask`, the decoder's those of the answer. Beams are encoded once each.
    """

    _encoder_decoder = False
    _is_stateful = True  # assisted decoding would feed several tokens and take some back

    @classmethod
    def of(cls, model: EncDecForSeq2SeqLM) -> Self:
        """The same model, its weights shared, as a causal language model. Raises TypeError for a model of another class."""
        if not isinstance(model, EncDecForSeq2SeqLM):
            raise TypeError(f"model must be an EncDecForSeq2SeqLM, got {type(model).__name__}")
        config: Any = copy.deepcopy(model.config)
        with torch.device("meta"):
            made = cls(config)
        made.encoder, made.decoder, made.lm_head = model.encoder, model.decoder, model.lm_head
        made.generation_config = copy.deepcopy(model.generation_config)
        return made.train(model.training)

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False

    def forward(  # type: ignore[override]
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        cache: AnswerCache | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 1,
        position_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """The logits of the next token; see the class. Raises ValueError and TypeError for what it says is refused."""
        _refuse(kwargs)
        if kwargs.get("labels") is not None:
            raise ValueError("labels must be left out: train the model as an EncDecForSeq2SeqLM")
        checks.tensor("input_ids", input_ids, shape=("batch", "tokens"), dtype="integer")
        assert input_ids is not None
        if checks.whole("logits_to_keep", logits_to_keep) != 1:
            raise ValueError(
                f"logits_to_keep must be 1, got {logits_to_keep}: the tokens of a prompt are read together and have no logits"
            )
        if use_cache is False:
            raise ValueError("use_cache must not be False: without a cache an answer cannot be told from its prompt")
        states = None
        if cache is None:
            if self.config.decoder_start_token_id is None:
                raise ValueError("decoder_start_token_id must be set in the configuration: the decoder has no BOS")
            mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
            checks.tensor("attention_mask", mask, shape=tuple(input_ids.shape), dtype="any")
            states = self.encoder(input_ids, mask)[0]
            cache = AnswerCache(self.new_cache(), mask)
            tokens = torch.full_like(input_ids[:, :1], self.config.decoder_start_token_id)
        elif not isinstance(cache, AnswerCache):
            raise TypeError(f"cache must be an AnswerCache, got {type(cache).__name__}")
        elif input_ids.shape != (len(cache.mask), 1):
            raise ValueError(
                f"input_ids must be one token for each of {len(cache.mask)} rows, got shape {tuple(input_ids.shape)}: the encoder "
                "has read the prompt and cannot take more of it"
            )
        else:
            tokens = input_ids
        hidden = self.decoder(tokens, states, cache.mask, cache=cache.inner)
        return CausalLMOutputWithPast(logits=self._logits(hidden, 1), cache=cache)


AutoConfig.register("assay_encdec_gemma", EncDecConfig, exist_ok=True)
AutoModelForSeq2SeqLM.register(EncDecConfig, EncDecForSeq2SeqLM, exist_ok=True)
AutoModelForCausalLM.register(EncDecConfig, EncDecForCausalLM, exist_ok=True)
