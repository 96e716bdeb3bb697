"""What the GGUF files of each architecture state, translated into transformers' terms.

An architecture is a function that takes metadata from a file, field by field, and says which configuration and which tensor names
they stand for. Fields and tensors that no function takes are refused by name: they may change what the model computes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from assay.errors import InputError
from assay.workloads.files import GgufHeader

SHARED = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
DECODER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
HEAD_NORMS = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
EXPERTS = {
    "ffn_gate_inp": "mlp.gate",
    "ffn_gate_exps": "mlp.experts.gate_up_proj",
    "ffn_up_exps": "mlp.experts.gate_up_proj",
    "ffn_down_exps": "mlp.experts.down_proj",
}


@dataclass
class Plan:
    """The model that a file describes: a configuration for transformers, and where each tensor goes."""

    config: dict[str, Any]
    layer: Mapping[str, str]  # "blk.<n>.<this>" is "<layers>.<n>.<that>"
    shared: Mapping[str, str] = field(default_factory=lambda: SHARED)
    layers: str = "model.layers"
    change: Callable[[str, Tensor], Tensor] = lambda name, values: values  # undoes what llama.cpp's converter did
    absent_biases: bool = False  # biases that are not in the file are zero
    interleaved: bool = False  # experts lie (expert, in, out), their gates and ups by turns


class GgufFile:
    """A checked GGUF file. Code that understands a field or tensor takes it; `finish` refuses whatever was not taken."""

    def __init__(self, path: Path, header: GgufHeader) -> None:
        self.path = path
        self.metadata = header.metadata
        self.architecture = str(header.metadata["general.architecture"])
        self.tensors = header.tensors
        self.taken: set[str] = set()

    def refuse(self, what: str) -> InputError:
        return InputError(
            f"{self.path}: {what}; assay does not convert this file, because its model would compute something else"
        )

    def get(self, key: str, default: Any = None) -> Any:
        """Take a field of the architecture and return its value."""
        name = f"{self.architecture}.{key}"
        self.taken.add(name)
        return self.metadata.get(name, default)

    def whole(self, key: str, default: int | None = None, low: int = 1) -> int:
        value = self.get(key, default)
        if type(value) is not int or not low <= value < 1 << 31:
            shown = "nothing" if value is None else repr(value)[:80]
            raise InputError(f"{self.path}: {self.architecture}.{key} must be a whole number from {low}, got {shown}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self.get(key, default)
        if type(value) not in (int, float) or not (math.isfinite(value) and value >= 0):
            shown = "nothing" if value is None else repr(value)[:80]
            raise InputError(f"{self.path}: {self.architecture}.{key} must be a finite number from 0, got {shown}")
        return float(value)

    def must(self, key: str, *allowed: Any) -> None:
        """Refuse the file unless the field is absent or has one of the values that change nothing."""
        value = self.get(key)
        if value is not None and not any(
            value == allow if type(value) is not float else math.isclose(value, allow, rel_tol=1e-5)
            for allow in allowed
        ):
            raise self.refuse(
                f"{self.architecture}.{key} is {str(value)[:80]!r}, where only {allowed[0]!r} is understood"
            )

    def has(self, tensor: str) -> bool:
        return tensor in self.tensors

    def values(self, tensor: str) -> Tensor:
        """Take a tensor and return it in float32, in torch's order of dimensions."""
        import gguf
        import numpy

        self.taken.add(tensor)
        found = self.tensors[tensor]
        kind = gguf.GGMLQuantizationType(found.kind)
        raw = numpy.memmap(self.path, mode="r", dtype=numpy.uint8)[found.begin : found.end]
        if kind in (kind.F32, kind.F16):
            stored = raw.view("<f4" if kind == kind.F32 else "<f2").reshape(found.shape)
        else:
            stored = raw.reshape(gguf.quant_shape_to_byte_shape(found.shape, kind))
        return torch.from_numpy(numpy.array(gguf.dequantize(stored, kind), dtype=numpy.float32))

    def finish(self) -> None:
        """Refuse metadata of the architecture that was not taken; other namespaces are notes that llama.cpp does not read."""
        left = {key for key in self.metadata if key.startswith(f"{self.architecture}.")} - self.taken
        if left:
            raise self.refuse(f"nothing here understands {', '.join(sorted(left)[:3])}")


# What the architectures share ------------------------------------------------------------------------------------------


def _decoder(f: GgufFile, model_type: str, norm: str = "layer_norm_rms_epsilon") -> dict[str, Any]:
    """Sizes, norm, token ids: what every architecture states in the same way."""
    heads = f.whole("attention.head_count")
    f.must("attention.causal", True)
    f.must("pooling_type", 0)
    f.must("nextn_predict_layers", 0)
    f.get("vocab_size")  # the embedding's rows decide
    return {
        "model_type": model_type,
        "hidden_size": f.whole("embedding_length"),
        "num_hidden_layers": f.whole("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": f.whole("attention.head_count_kv", heads),
        "max_position_embeddings": f.whole("context_length"),
        "norm": f.number(f"attention.{norm}"),
        **_vocabulary(f),
    }


def _vocabulary(f: GgufFile) -> dict[str, Any]:
    """The number of tokens, which of them frame text, and whether the output layer is the embedding."""
    if not f.has("token_embd.weight"):
        raise InputError(f"{f.path}: lacks the tensor token_embd.weight")
    rows = f.tensors["token_embd.weight"].shape[0]
    found: dict[str, Any] = {"vocab_size": rows, "tie_word_embeddings": not f.has("output.weight")}
    for ours, theirs in (("bos", "bos"), ("eos", "eos"), ("pad", "padding")):
        value = f.metadata.get(f"tokenizer.ggml.{theirs}_token_id")
        if value is not None and not (type(value) is int and 0 <= value < rows):
            raise InputError(
                f"{f.path}: tokenizer.ggml.{theirs}_token_id {str(value)[:40]} is not one of the {rows} tokens"
            )
        found[f"{ours}_token_id"] = value
    return found


def _llama_like(f: GgufFile, model_type: str, *, head_dim: bool = True, partial: bool = False) -> dict[str, Any]:
    """A decoder with RMS norms, gated feed-forward and rotary positions."""
    config = _decoder(f, model_type)
    config["rms_norm_eps"] = config.pop("norm")
    config["intermediate_size"] = f.whole("feed_forward_length")
    dim = _head_dim(f, config, head_dim)
    if head_dim:
        config["head_dim"] = dim
    config["rope_parameters"] = _rope(f, dim, config["max_position_embeddings"], partial=partial)
    return config


def _head_dim(f: GgufFile, config: Mapping[str, Any], free: bool = True) -> int:
    usual = config["hidden_size"] // config["num_attention_heads"]
    if not free:
        f.must("attention.key_length", usual)
    dim = f.whole("attention.key_length", usual)
    f.must("attention.value_length", dim)
    return dim


def _rope(f: GgufFile, dim: int, context: int, *, partial: bool = False) -> dict[str, Any]:
    """Rotary positions as transformers states them: the kind, its factors, the share of the head that is rotated."""
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": f.number("rope.freq_base", 10000.0)}
    turned = f.whole("rope.dimension_count", dim)
    if turned != dim and not (partial and turned < dim):
        raise f.refuse(f"{f.architecture}.rope.dimension_count is {turned} for heads of {dim}")
    if partial:
        rope["partial_rotary_factor"] = turned / dim
    kind = f.get("rope.scaling.type", "linear")
    factor = f.number("rope.scaling.factor", f.number("rope.scale_linear", 0.0)) or 1.0
    original = f.whole("rope.scaling.original_context_length", context)
    attention = f.number("rope.scaling.attn_factor", 1.0)
    f.get("rope.scaling.finetuned")  # a note
    if kind == "none":
        factor = 1.0
    long = f.has("rope_factors_long.weight") and f.has("rope_factors_short.weight")
    if kind == "longrope" or (f.architecture == "phi3" and long):
        if factor != 1.0:
            raise f.refuse(f"{f.architecture}.rope.scaling.factor is {factor:g} beside longrope's own factors")
        if not long:
            raise f.refuse(f"{f.architecture}.rope.scaling.type is 'longrope' without rope_factors_long and _short")
        return {
            **rope,
            "rope_type": "longrope",
            "long_factor": f.values("rope_factors_long.weight").tolist(),
            "short_factor": f.values("rope_factors_short.weight").tolist(),
            "original_max_position_embeddings": original,
            "attention_factor": attention,
        }
    if kind == "yarn" and factor != 1.0:
        usual = 1.0 + 0.1 * math.log(factor) if factor > 1 else 1.0
        f.must("rope.scaling.yarn_ext_factor", 1.0)
        f.must("rope.scaling.yarn_attn_factor", usual)
        return {
            **rope,
            "rope_type": "yarn",
            "factor": factor,
            "original_max_position_embeddings": original,
            "attention_factor": attention * usual,
            "beta_fast": f.number("rope.scaling.yarn_beta_fast", 32.0),
            "beta_slow": f.number("rope.scaling.yarn_beta_slow", 1.0),
        }
    if kind not in ("none", "linear", "yarn"):
        raise f.refuse(
            f"{f.architecture}.rope.scaling.type is {str(kind)[:40]!r}; understood: none, linear, yarn, longrope"
        )
    if attention != 1.0:
        raise f.refuse(f"{f.architecture}.rope.scaling.attn_factor is {attention:g} without yarn or longrope")
    if f.has("rope_freqs.weight") and f.architecture in ("llama", "granite"):
        if factor != 1.0:
            raise f.refuse(f"{f.architecture}.rope.scaling.factor is {factor:g} beside rope_freqs.weight")
        return {**rope, **_own_frequencies(f.values("rope_freqs.weight"), rope["rope_theta"], dim, context)}
    return {**rope, "rope_type": "linear", "factor": factor} if factor != 1.0 else rope


def _own_frequencies(factors: Tensor, theta: float, dim: int, context: int) -> dict[str, Any]:
    """Rotary frequencies, each divided by its own factor: Llama 3's rule if it yields these factors, else the plain list."""
    if bool((factors == 1).all()):
        return {}
    if factors.shape == (dim // 2,) and float(factors.max()) > 1:
        factor = round(float(factors.max()), 3)
        wavelengths = 2 * math.pi * theta ** (torch.arange(0, dim, 2) / dim)
        smooth = ((8192 / wavelengths - 1) / 3).clamp(0, 1)
        if torch.allclose(factors, 1 / ((1 - smooth) / factor + smooth), rtol=1e-4):
            return {
                "rope_type": "llama3",
                "factor": factor,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
            }
    listed = factors.tolist()
    return {
        "rope_type": "longrope",
        "long_factor": listed,
        "short_factor": listed,
        "original_max_position_embeddings": context,
        "attention_factor": 1.0,
    }


def _experts(f: GgufFile, *, normalised: bool) -> None:
    """Refuse routers other than softmax followed by the best k, their weights normalised if the architecture does so."""
    f.must("expert_gating_func", 1)
    f.must("expert_weights_norm", normalised)
    f.must("expert_weights_scale", 1.0, 0.0)
    for key in ("expert_group_count", "expert_group_used_count"):
        f.must(key, 0, 1)
    for key in ("expert_shared_count", "leading_dense_block_count"):
        f.must(key, 0)


def _window_layers(f: GgufFile, layers: int, period: int) -> list[str]:
    """Which layers see a window: `period - 1` of each `period`, or as the file lists them."""
    listed = f.get("attention.sliding_window_pattern", period)
    if type(listed) is int and listed >= 0:
        listed = [listed == 0 or (listed > 1 and layer % listed < listed - 1) for layer in range(layers)]
    if not isinstance(listed, list | tuple) or len(listed) < layers:
        raise f.refuse(f"{f.architecture}.attention.sliding_window_pattern is {str(listed)[:80]!r}")
    return ["sliding_attention" if windowed else "full_attention" for windowed in listed[:layers]]


# The architectures -----------------------------------------------------------------------------------------------------


def _llama(f: GgufFile) -> Plan:
    """Llama, Mistral, SmolLM, Mixtral, which share one name in llama.cpp."""
    window = f.get("attention.sliding_window")
    experts = f.whole("expert_count", 0, low=0)
    f.must("tensor_data_layout", "Meta AI original pth")
    config = _llama_like(f, "mixtral" if experts else "mistral" if window else "llama")
    if window:
        config["sliding_window"] = f.whole("attention.sliding_window")
    if experts:
        config |= {
            "num_local_experts": experts,
            "num_experts_per_tok": f.whole("expert_used_count"),
            "sliding_window": window,
        }
        _experts(f, normalised=True)
        names = (
            {k: v for k, v in DECODER.items() if not k.startswith("ffn_")} | EXPERTS | {"ffn_norm": DECODER["ffn_norm"]}
        )
        return Plan(config, names, change=_unpermuted(config))
    f.must("expert_used_count", 0)
    if not window:
        config |= _biases(f)
    return Plan(config, DECODER, change=_unpermuted(config), absent_biases=not window)


def _biases(f: GgufFile) -> dict[str, Any]:
    def any_of(*kinds: str) -> bool:
        return any(f.has(f"blk.0.{kind}.bias") for kind in kinds)

    return {
        "attention_bias": any_of("attn_q", "attn_k", "attn_v", "attn_output"),
        "mlp_bias": any_of("ffn_gate", "ffn_up", "ffn_down"),
    }


def _unpermuted(config: Mapping[str, Any]) -> Callable[[str, Tensor], Tensor]:
    """Put rows of queries and keys back in order: llama.cpp rotates neighbours, transformers rotates halves."""

    def change(name: str, values: Tensor) -> Tensor:
        for kind, heads in (("q", config["num_attention_heads"]), ("k", config["num_key_value_heads"])):
            if f".attn_{kind}." in name:
                return values.reshape(heads, -1, 2, *values.shape[1:]).transpose(1, 2).reshape(values.shape)
        return values

    return change


def _granite(f: GgufFile) -> Plan:
    config = _llama_like(f, "granite")
    f.must("expert_count", 0)
    f.must("rope.scaling.finetuned", True)
    config |= {
        "logits_scaling": f.number("logit_scale"),
        "residual_multiplier": f.number("residual_scale", 0.0) or 1.0,
        "embedding_multiplier": f.number("embedding_scale", 0.0) or 1.0,
        "attention_multiplier": f.number("attention.scale", 0.0) or config["head_dim"] ** -0.5,
        **_biases(f),
    }
    return Plan(config, DECODER, change=_unpermuted(config), absent_biases=True)


def _qwen2(f: GgufFile) -> Plan:
    return Plan(_llama_like(f, "qwen2", head_dim=False), DECODER)


def _qwen3(f: GgufFile) -> Plan:
    config = _llama_like(f, "qwen3")
    config["attention_bias"] = _biases(f)["attention_bias"]
    return Plan(config, DECODER | HEAD_NORMS)


def _qwen_moe(f: GgufFile) -> Plan:
    third = f.architecture == "qwen3moe"
    config = _llama_like(f, "qwen3_moe" if third else "qwen2_moe", head_dim=third)
    config |= {
        "num_experts": f.whole("expert_count"),
        "num_experts_per_tok": f.whole("expert_used_count"),
        "moe_intermediate_size": f.whole("expert_feed_forward_length"),
        "norm_topk_prob": third,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    }
    _experts(f, normalised=third)
    names = {k: v for k, v in DECODER.items() if not k.startswith("ffn_")} | EXPERTS | {"ffn_norm": DECODER["ffn_norm"]}
    if third:
        return Plan(config, names | HEAD_NORMS)
    config["shared_expert_intermediate_size"] = f.whole("expert_shared_feed_forward_length")
    names |= {
        "ffn_gate_inp_shexp": "mlp.shared_expert_gate",
        "ffn_gate_shexp": "mlp.shared_expert.gate_proj",
        "ffn_up_shexp": "mlp.shared_expert.up_proj",
        "ffn_down_shexp": "mlp.shared_expert.down_proj",
    }
    return Plan(config, names, change=lambda name, values: values[None] if "ffn_gate_inp_shexp" in name else values)


def _phi3(f: GgufFile) -> Plan:
    config = _llama_like(f, "phi3", head_dim=False, partial=True)
    config["original_max_position_embeddings"] = f.whole(
        "rope.scaling.original_context_length", config["max_position_embeddings"]
    )
    config["sliding_window"] = f.whole("attention.sliding_window", 0, low=0) or None
    names = {k: v for k, v in DECODER.items() if k not in ("attn_q", "attn_k", "attn_v", "ffn_gate", "ffn_up")}
    return Plan(config, names | {"attn_qkv": "self_attn.qkv_proj", "ffn_up": "mlp.gate_up_proj"})


GEMMA = {
    **DECODER,
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}


def _minus_one(name: str, values: Tensor) -> Tensor:
    """Gemma's norms scale by 1 + weight; llama.cpp stores the sum."""
    return values - 1 if name.endswith("norm.weight") else values


def _gemma(f: GgufFile) -> Plan:
    return Plan(_llama_like(f, "gemma"), DECODER, change=_minus_one)


def _gemma2(f: GgufFile) -> Plan:
    config = _llama_like(f, "gemma2")
    layers, dim = config["num_hidden_layers"], config["head_dim"]
    config |= {
        "attn_logit_softcapping": f.number("attn_logit_softcapping", 50.0) or None,
        "final_logit_softcapping": f.number("final_logit_softcapping", 30.0) or None,
        "sliding_window": f.whole("attention.sliding_window", 4096),
        "layer_types": _window_layers(f, layers, 2),
        # the file does not say it: Gemma 2 27B (46 layers) divides by the root of hidden / heads, the others of the head
        "query_pre_attn_scalar": config["hidden_size"] // config["num_attention_heads"] if layers == 46 else dim,
    }
    f.must("rope.freq_base_swa", config["rope_parameters"]["rope_theta"])
    return Plan(config, GEMMA, change=_minus_one)


def _gemma3(f: GgufFile) -> Plan:
    config = _llama_like(f, "gemma3_text")
    layers, dim = config["num_hidden_layers"], config["head_dim"]
    window = f.whole("attention.sliding_window", 0, low=0)
    local = {"rope_type": "default", "rope_theta": f.number("rope.freq_base_swa", 10000.0)}
    config |= {
        "final_logit_softcapping": f.number("final_logit_softcapping", 0.0) or None,
        "sliding_window": window or config["max_position_embeddings"],
        "layer_types": _window_layers(f, layers, 6) if window else ["full_attention"] * layers,
        "rope_parameters": {"full_attention": config["rope_parameters"], "sliding_attention": local},
        # as in Gemma 2; 27B has 62 layers
        "query_pre_attn_scalar": config["hidden_size"] // config["num_attention_heads"] if layers == 62 else dim,
    }
    return Plan(config, GEMMA | HEAD_NORMS, change=_minus_one)


def _gpt2(f: GgufFile) -> Plan:
    config = _decoder(f, "gpt2", "layer_norm_epsilon")
    config["layer_norm_epsilon"] = config.pop("norm")
    f.must("attention.head_count_kv", config["num_attention_heads"])
    _head_dim(f, config, free=False)
    if config.pop("num_key_value_heads") != config["num_attention_heads"]:
        raise f.refuse("gpt2.attention.head_count_kv differs from gpt2.attention.head_count")
    config["n_inner"] = f.whole("feed_forward_length")
    names = {
        "attn_norm": "ln_1",
        "attn_qkv": "attn.c_attn",
        "attn_output": "attn.c_proj",
        "ffn_norm": "ln_2",
        "ffn_up": "mlp.c_fc",
        "ffn_down": "mlp.c_proj",
    }
    shared = {
        "token_embd": "transformer.wte",
        "position_embd": "transformer.wpe",
        "output_norm": "transformer.ln_f",
        "output": "lm_head",
    }

    def change(name: str, values: Tensor) -> Tensor:
        return values.T.contiguous() if name.startswith("blk.") and values.ndim == 2 else values

    return Plan(config, names, shared, "transformer.h", change)


def _starcoder2(f: GgufFile) -> Plan:
    config = _decoder(f, "starcoder2", "layer_norm_epsilon")
    config["norm_epsilon"] = config.pop("norm")
    config["intermediate_size"] = f.whole("feed_forward_length")
    config["rope_parameters"] = _rope(f, _head_dim(f, config, free=False), config["max_position_embeddings"])
    config["sliding_window"] = f.whole("attention.sliding_window", 0, low=0) or None
    names = {k: v for k, v in DECODER.items() if not k.startswith("ffn_")}
    return Plan(
        config, names | {"ffn_norm": "post_attention_layernorm", "ffn_up": "mlp.c_fc", "ffn_down": "mlp.c_proj"}
    )


def _gpt_oss(f: GgufFile) -> Plan:
    """The file does not say that YaRN's ramp is not rounded to whole dimensions; llama.cpp rounds it, the original model does not."""
    config = _llama_like(f, "gpt_oss")
    layers = config["num_hidden_layers"]
    config |= {
        "num_local_experts": f.whole("expert_count"),
        "num_experts_per_tok": f.whole("expert_used_count"),
        "intermediate_size": f.whole("expert_feed_forward_length"),
        "sliding_window": f.whole("attention.sliding_window"),
        "layer_types": _window_layers(f, layers, 2),
        "attention_bias": True,
    }
    if config["rope_parameters"]["rope_type"] == "yarn":
        config["rope_parameters"]["truncate"] = False
    f.must("rope.freq_base_swa", config["rope_parameters"]["rope_theta"])
    _experts(f, normalised=True)
    names = {k: v for k, v in DECODER.items() if not k.startswith("ffn_")} | EXPERTS
    names |= {
        "post_attention_norm": "post_attention_layernorm",
        "attn_sinks": "self_attn.sinks",
        "ffn_gate_inp": "mlp.router",
    }
    return Plan(config, names, interleaved=True)


def _olmo2(f: GgufFile) -> Plan:
    config = _llama_like(f, "olmo2", head_dim=False)
    f.must("attention.sliding_window", 0)  # OLMo 3's
    names = {k: v for k, v in DECODER.items() if k not in ("attn_norm", "ffn_norm")} | HEAD_NORMS
    return Plan(
        config,
        names | {"post_attention_norm": "post_attention_layernorm", "post_ffw_norm": "post_feedforward_layernorm"},
    )


def _stablelm(f: GgufFile) -> Plan:
    config = _decoder(f, "stablelm", "layer_norm_epsilon")
    config["layer_norm_eps"] = config.pop("norm")
    config["intermediate_size"] = f.whole("feed_forward_length")
    dim = _head_dim(f, config, free=False)
    config["rope_parameters"] = _rope(f, dim, config["max_position_embeddings"], partial=True)
    config["use_parallel_residual"] = not f.has("blk.0.ffn_norm.weight")
    f.must("use_parallel_residual", config["use_parallel_residual"])
    config["use_qkv_bias"] = f.has("blk.0.attn_q.bias")
    return Plan(config, DECODER)


def _nemotron(f: GgufFile) -> Plan:
    config = _decoder(f, "nemotron", "layer_norm_epsilon")
    config["norm_eps"] = config.pop("norm")
    config["intermediate_size"] = f.whole("feed_forward_length")
    dim = _head_dim(f, config, free=False)
    config["rope_parameters"] = _rope(f, dim, config["max_position_embeddings"], partial=True)
    config |= _biases(f)
    return Plan(config, DECODER, change=_minus_one, absent_biases=True)


def _mamba(f: GgufFile) -> Plan:
    hidden, inner = f.whole("embedding_length"), f.whole("ssm.inner_size")
    if inner % hidden:
        raise f.refuse(f"mamba.ssm.inner_size is {inner}, no multiple of the embedding's {hidden}")
    f.must("ssm.dt_b_c_rms", False)  # Falcon Mamba's
    for unused in ("attention.head_count", "feed_forward_length", "context_length", "vocab_size"):
        f.get(unused)
    config = {
        "model_type": "mamba",
        "hidden_size": hidden,
        "expand": inner // hidden,
        "num_hidden_layers": f.whole("block_count"),
        "state_size": f.whole("ssm.state_size"),
        "conv_kernel": f.whole("ssm.conv_kernel"),
        "time_step_rank": f.whole("ssm.time_step_rank"),
        "layer_norm_epsilon": f.number("attention.layer_norm_rms_epsilon"),
        "use_bias": f.has("blk.0.ssm_in.bias"),
        "use_conv_bias": f.has("blk.0.ssm_conv1d.bias"),
        **_vocabulary(f),
    }
    parts = (
        ("ssm_in", "in_proj"),
        ("ssm_conv1d", "conv1d"),
        ("ssm_x", "x_proj"),
        ("ssm_dt", "dt_proj"),
        ("ssm_out", "out_proj"),
    )
    names = {"attn_norm": "norm", "ssm_a": "mixer.A_log", "ssm_d": "mixer.D"} | {k: f"mixer.{v}" for k, v in parts}
    shared = {"token_embd": "backbone.embeddings", "output_norm": "backbone.norm_f", "output": "lm_head"}

    def change(name: str, values: Tensor) -> Tensor:
        if name.endswith("ssm_conv1d.weight"):
            return values[:, None]
        return torch.log(-values) if name.endswith("ssm_a") else values

    return Plan(config, names, shared, "backbone.layers", change)


ARCHITECTURES: dict[str, Callable[[GgufFile], Plan]] = {
    "gemma": _gemma,
    "gemma2": _gemma2,
    "gemma3": _gemma3,
    "gpt-oss": _gpt_oss,
    "gpt2": _gpt2,
    "granite": _granite,
    "llama": _llama,
    "mamba": _mamba,
    "nemotron": _nemotron,
    "olmo2": _olmo2,
    "phi3": _phi3,
    "qwen2": _qwen2,
    "qwen2moe": _qwen_moe,
    "qwen3": _qwen3,
    "qwen3moe": _qwen_moe,
    "stablelm": _stablelm,
    "starcoder2": _starcoder2,
}
