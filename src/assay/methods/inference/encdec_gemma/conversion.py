"""Two decoder-only models, or one twice, as an encoder-decoder that starts from their weights."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    PreTrainedModel,
    T5GemmaConfig,
    T5GemmaForConditionalGeneration,
    T5GemmaModuleConfig,
)

from assay import checks
from assay.methods.core.models.decoder import parts_of
from assay.methods.inference.encdec_gemma.model import (
    READS,
    TOKENS,
    EncDecConfig,
    EncDecForSeq2SeqLM,
    norms_of,
    why_not_cross,
)

INITS = ("self", "random")
# of a Gemma 2 configuration, in each of T5Gemma's two
SHARED = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
    "hidden_activation", "max_position_embeddings", "initializer_range", "rms_norm_eps", "use_cache", "pad_token_id", "eos_token_id",
    "bos_token_id", "tie_word_embeddings", "rope_parameters", "attention_bias", "attention_dropout", "query_pre_attn_scalar",
    "sliding_window", "layer_types", "final_logit_softcapping", "attn_logit_softcapping",
)  # fmt: skip
RENAMED = (  # Gemma 2's names, T5Gemma's; both have pre_feedforward_layernorm and post_feedforward_layernorm
    (".input_layernorm.", ".pre_self_attn_layernorm."),
    (".post_attention_layernorm.", ".post_self_attn_layernorm."),
)


def decoder_to_encdec(
    model: nn.Module,
    decoder: nn.Module | None = None,
    cross_init: str = "self",
    *,
    encoder_attention: str = "bidirectional",
    decoder_start_token_id: int | None = None,
) -> Any:
    """An encoder-decoder whose encoder has the weights of `model` and whose decoder has those of `decoder` (None: of `model` too).

    Both are decoder-only models of transformers with one vocabulary; they are copied, not changed. With `cross_init` "self" each
    cross-attention starts as a copy of its layer's self-attention, norms included (`our choice`; the paper names the projections),
    which needs an encoder as wide as the decoder. "random" draws it anew, as the paper does where the sizes differ: then train it
    alone first (`CrossAttentionWarmup`). The result has the models' dtype and device, and is in eval mode.

    Answers begin with `decoder_start_token_id` (None: with the decoder's BOS). Two Gemma 2 models give transformers' own
    `T5GemmaForConditionalGeneration`, unless they ask for what it does not have: `encoder_attention` "causal", the paper's ablation, or
    another start than BOS. All else is an `EncDecForSeq2SeqLM`. For a decoder of fewer layers see `fewer_layers`.

    What is gained needs training (`PrefixLMCollator`, `UL2Collator`, `distilled_loss`): without it the answers are worse than the
    model's own. The follow-up's merged attention and shared embeddings are transformers' T5Gemma 2, and not here.
    Raises ValueError for models whose parts are not understood, vocabularies, widths, dtypes or devices that do not fit, and arguments out
    of range; TypeError for what is no model.
    """
    checks.choice("cross_init", cross_init, INITS)
    checks.choice("encoder_attention", encoder_attention, READS)
    decoder = model if decoder is None else decoder
    for name, given in {"model": model, "decoder": decoder}.items():
        if not isinstance(given, PreTrainedModel):
            raise TypeError(f"{name} must be a model of transformers, got {type(given).__name__}")
        if name == "model" or decoder is not model:
            parts_of(given)
    source, target = _checked(model, decoder, cross_init)
    gemma = isinstance(model, Gemma2ForCausalLM) and isinstance(decoder, Gemma2ForCausalLM)
    if gemma and encoder_attention == "bidirectional" and decoder_start_token_id in (None, target.bos_token_id):
        return _t5gemma(model, decoder, cross_init)
    config = EncDecConfig(source, target, encoder_attention, decoder_start_token_id)
    made = _built(config, model, decoder)
    if cross_init == "self":
        for layer, sublayer in zip(made.decoder.body.layers, made.decoder.cross, strict=True):
            _copy_attention(layer, sublayer)
    return made


def _checked(model: Any, decoder: Any, cross_init: str) -> tuple[Any, Any]:
    """The two configurations. Raises ValueError for what does not fit together."""
    source, target = model.config, decoder.config
    if source.vocab_size != target.vocab_size:
        raise ValueError(
            f"decoder must have the vocabulary of model, {source.vocab_size} tokens, got {target.vocab_size}"
        )
    if cross_init == "self" and source.hidden_size != target.hidden_size:
        raise ValueError(
            f"cross_init must be 'random' where the encoder ({source.hidden_size}) is not as wide as the decoder ({target.hidden_size}): "
            "self-attention has no keys and values of that width to copy"
        )
    ours, theirs = (found.get_input_embeddings().weight for found in (model, decoder))
    if (ours.dtype, ours.device) != (theirs.dtype, theirs.device):
        raise ValueError(
            f"decoder must have the dtype and the device of model, {ours.dtype} on {ours.device}, got {theirs.dtype} on {theirs.device}"
        )
    if why := why_not_cross(decoder.model):
        raise ValueError(f"decoder must have an attention that can be had twice: {why}")
    if getattr(decoder.lm_head, "bias", None) is not None:
        raise ValueError("decoder must have a head without a bias")
    return source, target


def _copied(module: nn.Module) -> nn.Module:
    """A copy that `post_init` does not draw anew."""
    made = copy.deepcopy(module)
    for found in made.modules():
        found._is_hf_initialized = True  # type: ignore[assignment]
    return made


def _built(config: EncDecConfig, model: Any, decoder: Any) -> EncDecForSeq2SeqLM:
    """The model of copies of the two, its cross-attention drawn."""
    made = EncDecForSeq2SeqLM(config, _copied(model.model), _copied(decoder.model), _copied(decoder.lm_head))
    reference = decoder.get_input_embeddings().weight
    made.decoder.cross.to(device=reference.device, dtype=reference.dtype)
    own = getattr(decoder, "generation_config", None)
    if own is not None:
        made.generation_config = copy.deepcopy(own)
        made.generation_config.decoder_start_token_id = config.decoder_start_token_id
    for name in TOKENS:
        if getattr(made.generation_config, name, None) is None:
            setattr(made.generation_config, name, getattr(config, name, None))
    return made.eval()


@torch.no_grad()
def _copy_attention(layer: Any, sublayer: Any) -> None:
    """A layer's self-attention and its norms, into the cross-attention after it."""
    own, cross = layer.self_attn, sublayer.cross_attn
    weights = dict(own.state_dict())
    for name in [name for name in weights if name.startswith("qkv_proj.")]:
        sizes = [getattr(cross, part).out_features for part in ("q_proj", "k_proj", "v_proj")]
        for part, piece in zip("qkv", weights.pop(name).split(sizes), strict=True):
            weights[name.replace("qkv_proj", f"{part}_proj")] = piece
    cross.load_state_dict(weights)
    for name, found in zip(("pre_cross_attn_layernorm", "post_cross_attn_layernorm"), norms_of(layer), strict=True):
        if found:
            getattr(sublayer, name).load_state_dict(getattr(layer, found).state_dict())


def fewer_layers(model: nn.Module, every: int = 2) -> Any:
    """A copy of a decoder-only model that has the first of every `every` layers: a decoder for fast answers, to be trained further.

    Raises ValueError for a model whose parts are not understood and for `every` below 1, TypeError for one that is not whole.
    """
    every = checks.whole("every", every, low=1)
    parts = parts_of(model)
    kept = list(range(0, len(parts.layers), every))
    config = copy.deepcopy(parts.config)
    for name, value in list(vars(config).items()):  # layer_types and the like
        if isinstance(value, list) and "layer" in name and len(value) == len(parts.layers):
            setattr(config, name, [value[index] for index in kept])
    config.num_hidden_layers = len(kept)
    reference = parts.embed.weight
    made: Any = type(parts.model)(config).to(device=reference.device, dtype=reference.dtype)
    places = {f"model.layers.{old}.": f"model.layers.{new}." for new, old in enumerate(kept)}
    weights = {}
    for name, value in parts.model.state_dict().items():
        start = ".".join(name.split(".")[:3]) + "."
        if not name.startswith("model.layers."):
            weights[name] = value
        elif start in places:
            weights[places[start] + name[len(start) :]] = value
    made.load_state_dict(weights)
    made.generation_config = copy.deepcopy(parts.model.generation_config)
    return made.train(parts.model.training)


# ------------------------------------------------------------------------------------------------------------------------ T5Gemma


def t5gemma_config(encoder: Gemma2Config, decoder: Gemma2Config) -> T5GemmaConfig:
    """T5Gemma's configuration for an encoder and a decoder of these two Gemma 2 shapes.

    >>> made, released = t5gemma_config(Gemma2Config(), Gemma2Config()), T5GemmaConfig()
    >>> made.encoder.to_dict() == released.encoder.to_dict(), made.decoder.to_dict() == released.decoder.to_dict()
    (True, True)
    """
    first, second = (
        T5GemmaModuleConfig(**{name: copy.deepcopy(getattr(config, name)) for name in SHARED})
        for config in (encoder, decoder)
    )
    return T5GemmaConfig(
        encoder=first,
        decoder=second,
        attention_dropout=decoder.attention_dropout or 0.0,
        tie_word_embeddings=decoder.tie_word_embeddings,
        vocab_size=decoder.vocab_size,
    )


def _t5gemma(model: Any, decoder: Any, cross_init: str) -> T5GemmaForConditionalGeneration:
    config: Any = t5gemma_config(model.config, decoder.config)
    config._attn_implementation = decoder.config._attn_implementation
    reference = decoder.get_input_embeddings().weight
    made: Any = T5GemmaForConditionalGeneration(config)
    made.to(device=reference.device, dtype=reference.dtype)
    weights = {f"model.encoder.{name}": value for name, value in _as_t5gemma(model.model.state_dict()).items()}
    for name, value in _as_t5gemma(decoder.model.state_dict()).items():
        weights[f"model.decoder.{name}"] = value
        if cross_init == "self" and "self_attn" in name:
            weights[f"model.decoder.{name.replace('self_attn', 'cross_attn')}"] = value
    weights["lm_head.out_proj.weight"] = decoder.lm_head.weight
    missing, unexpected = made.load_state_dict(weights, strict=False)
    drawn = [name for name in missing if "cross_attn" not in name or cross_init == "self"]
    if drawn or unexpected:
        raise ValueError(f"model must have Gemma 2's weights, {(drawn + unexpected)[0]} is not T5Gemma's")
    made.generation_config = copy.deepcopy(decoder.generation_config)
    made.generation_config.decoder_start_token_id = config.decoder.bos_token_id
    return made.eval()


def _as_t5gemma(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """A Gemma 2 body's weights under T5Gemma's names; in this order both kinds of norms meet "self_attn" in their names."""
    found = {}
    for name, value in weights.items():
        for old, new in RENAMED:
            name = name.replace(old, new)
        found[name] = value
    return found


def from_t5gemma(model: nn.Module) -> EncDecForSeq2SeqLM:
    """The same model as an `EncDecForSeq2SeqLM`, its weights copied: so a released T5Gemma is served (`EncDecForCausalLM.of`).

    Without a mask T5Gemma's encoder does not look at pad tokens; here padding is what `attention_mask` says, and without one there is none.
    Raises TypeError for another model, ValueError for one with dropout, which the parts of Gemma 2 do not have.
    """
    if not isinstance(model, T5GemmaForConditionalGeneration):
        raise TypeError(f"model must be a T5GemmaForConditionalGeneration, got {type(model).__name__}")
    config: Any = model.config
    if rate := max(part.dropout_rate for part in (config, config.encoder, config.decoder)):
        raise ValueError(f"model must have a dropout_rate of 0, got {rate}")
    shapes = {}
    for name in ("encoder", "decoder"):
        found = getattr(config, name)
        shapes[name] = Gemma2Config(**{field: copy.deepcopy(getattr(found, field)) for field in SHARED})
    shapes["decoder"].tie_word_embeddings = bool(config.tie_word_embeddings)
    made: Any = EncDecForSeq2SeqLM(EncDecConfig(shapes["encoder"], shapes["decoder"]))
    reference: Any = model.get_input_embeddings().weight
    made.to(device=reference.device, dtype=reference.dtype)
    weights = {}
    for name, value in model.state_dict().items():
        for new, old in RENAMED:
            name = name.replace(old, new)
        if "cross_attn" in name:  # model.decoder.layers.3.cross_attn.q_proj.weight
            _, _, _, index, rest = name.split(".", 4)
            weights[f"decoder.cross.{index}.{rest}"] = value
        elif name == "lm_head.out_proj.weight":
            weights["lm_head.weight"] = value
        else:  # model.encoder.layers.3.mlp.up_proj.weight
            _, stack, rest = name.split(".", 2)
            weights[f"{stack}.body.{rest}"] = value
    made.load_state_dict(weights)
    made.generation_config = copy.deepcopy(model.generation_config)
    made.generation_config.decoder_start_token_id = made.config.decoder_start_token_id
    return made.train(model.training)
