"""Which models the compiled loop can run, and how their weights are taken out."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from assay.methods.builtin.weight_only import WeightOnlyLinear
from assay.methods.core import kernels
from assay.methods.core.quantize.formats import FORMATS
from assay.methods.core.quantize.int8_linear import Int8GatedMLP, Int8Linear, rotate

FAMILIES = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2"}  # and what their classes' names begin with
MATRICES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
# Every field of the three configurations: those that decide what the loop computes are taken or checked, in `why_not` or on the
# modules themselves; the others change no forward pass without a loss. A field that is not here is refused.
TAKEN = """hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim vocab_size rms_norm_eps
max_position_embeddings hidden_act rope_parameters sliding_window use_sliding_window layer_types attention_bias mlp_bias"""
HARMLESS = """tie_word_embeddings initializer_range attention_dropout use_cache pretraining_tp max_window_layers architectures dtype
bos_token_id eos_token_id pad_token_id chunk_size_feed_forward id2label label2id is_encoder_decoder output_hidden_states problem_type
return_dict transformers_version _attn_implementation_internal _experts_implementation_internal _name_or_path _output_attentions
_post_init_done"""
FIELDS = frozenset((TAKEN + " " + HARMLESS).split())


def why_not(model: nn.Module, weights: str = "int4") -> str:
    """Why the decode loop cannot run this model, or an empty string."""
    config: Any = getattr(model, "config", None)
    family = getattr(config, "model_type", None)
    if family not in FAMILIES or not hasattr(model, "lm_head"):
        return f"the loop knows causal language models of the families {', '.join(sorted(FAMILIES))}, not {family or type(model).__name__}"
    prefix = FAMILIES[family]
    origin = next(kind for kind in type(model).__mro__ if not kind.__module__.startswith("assay."))
    if origin.__name__ != f"{prefix}ForCausalLM" or not origin.__module__.startswith("transformers."):
        return f"the loop knows transformers' own {prefix}ForCausalLM, not {origin.__module__}.{origin.__name__}"
    if new := set(vars(type(config)())) - set(FIELDS):
        return f"the configuration has fields the loop does not know: {', '.join(sorted(new))}"
    inner: Any = model.model
    if any(tensor.device.type != "cpu" for tensor in model.parameters()):
        return "the loop runs on the CPU only"
    if inner.embed_tokens.weight.dtype not in (torch.float32, torch.bfloat16):
        return f"the embedding must be float32 or bfloat16, not {inner.embed_tokens.weight.dtype}"
    if config.hidden_act not in ("silu", "swish"):
        return f"the activation must be silu, not {config.hidden_act}"
    rope = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if rope not in ("default", "linear", "llama3", "yarn"):
        return f"rope of type {rope!r} changes with the length"
    layer_types = getattr(config, "layer_types", None) or ["full_attention"]
    windows = [getattr(layer.self_attn, "sliding_window", None) for layer in inner.layers]
    mistral = family == "mistral" and config.sliding_window is not None
    if set(layer_types) != {"full_attention"} or mistral or any(window is not None for window in windows):
        return "sliding-window attention is not supported"
    for number, layer in enumerate(inner.layers):
        try:
            block = block_of(layer, prefix, config.rms_norm_eps)
        except (AttributeError, TypeError) as error:
            return f"layers.{number} is not a plain llama layer: {error}"
        if (block.bias is None) != (block_of(inner.layers[0], prefix, config.rms_norm_eps).bias is None):
            return f"layers.{number}: the layers must agree on having biases"
    head_size = inner.layers[0].self_attn.head_dim
    if head_size % 16 or 2 * inner.rotary_emb.inv_freq.numel() != head_size:
        return f"the head size must be a multiple of 16, all of it rotated; it is {head_size}"
    if type(inner.norm).__name__ != f"{prefix}RMSNorm" or inner.norm.variance_epsilon != config.rms_norm_eps:
        return f"the last norm must be a {prefix}RMSNorm with the epsilon of the configuration"
    multiple = FORMATS[weights].multiple
    widths = (config.hidden_size, config.intermediate_size, config.num_attention_heads * head_size)
    if any(width % multiple for width in widths):
        return f"{weights} needs a hidden size, an inner size and heads that are multiples of {multiple}, got {widths}"
    try:
        head = matrix_of(model.lm_head)
    except TypeError as error:
        return f"lm_head: {error}"
    if not head.out_features == config.vocab_size <= len(inner.embed_tokens.weight):
        return f"lm_head and the embedding must have the {config.vocab_size} rows of the configuration"
    return ""


@dataclass
class Matrix:
    """A weight matrix: how to get it dense, and the layer that holds it packed, if any."""

    out_features: int
    in_features: int
    dense: Callable[[], Tensor]
    packed: WeightOnlyLinear | None = None


@dataclass
class Block:
    """What the loop needs from a decoder layer: the gains of its two norms, its seven matrices, the bias of q, k and v."""

    gains: tuple[Tensor, Tensor]
    matrices: list[Matrix]
    bias: Tensor | None


def block_of(layer: Any, prefix: str, eps: float) -> Block:
    """Raises AttributeError or TypeError, saying why, for a layer that is not a plain llama layer."""
    attention, mlp = layer.self_attn, layer.mlp
    if hasattr(attention, "q_norm"):
        raise TypeError("its queries are normalised")
    if type(attention).__name__ != f"{prefix}Attention" or attention.scaling != attention.head_dim**-0.5:
        raise TypeError(f"its attention must be a {prefix}Attention that scales by head_dim^-0.5")
    if hasattr(attention, "qkv_proj"):
        return _fused_int8_block(attention, mlp, eps)
    if type(mlp).__name__ != f"{prefix}MLP" or "forward" in vars(attention) or "forward" in vars(mlp):
        raise TypeError("its forward pass was replaced")
    for norm in (layer.input_layernorm, layer.post_attention_layernorm):
        if type(norm).__name__ != f"{prefix}RMSNorm" or norm.variance_epsilon != eps:
            raise TypeError(f"its norms must be {prefix}RMSNorm with the epsilon of the configuration")
    projections = [getattr(attention, name) for name in MATRICES[:3]]
    biases = [projection.bias for projection in projections]
    if len({bias is None for bias in biases}) > 1:
        raise TypeError("q, k and v must all have a bias or none")
    matrices = [matrix_of(projection, may_have_bias=True) for projection in projections]
    matrices += [matrix_of(module) for module in (attention.o_proj, mlp.gate_proj, mlp.up_proj, mlp.down_proj)]
    gains = (layer.input_layernorm.weight, layer.post_attention_layernorm.weight)
    return Block(gains, matrices, None if biases[0] is None else torch.cat(biases))


def matrix_of(module: Any, may_have_bias: bool = False) -> Matrix:
    if module.bias is not None and not may_have_bias:
        raise TypeError("the loop knows biases of q, k and v only")
    if type(module) is nn.Linear:
        return Matrix(module.out_features, module.in_features, lambda: module.weight)
    if isinstance(module, WeightOnlyLinear) and module.gain is None:
        return Matrix(module.out_features, module.in_features, module.dequantize, module)
    if isinstance(module, Int8Linear) and module.norm_eps is None:
        return Matrix(module.out_features, module.in_features, lambda: _rows(module, 0, module.out_features, True))
    if isinstance(module, WeightOnlyLinear | Int8Linear):
        raise TypeError(f"the loop knows no {type(module).__name__} that scales its outputs or normalises its inputs")
    raise TypeError(f"the loop knows nn.Linear, WeightOnlyLinear and Int8Linear, not {type(module).__name__}")


def _fused_int8_block(attention: Any, mlp: Any, eps: float) -> Block:
    """A block that `int8_linear.fuse_block` made: q/k/v and gate/up in one weight each, the norm's gain in its multiplier."""
    qkv, head, inner = attention.qkv_proj, attention.head_dim, mlp.down.in_features
    if not isinstance(qkv, Int8Linear) or not isinstance(mlp, Int8GatedMLP):
        raise TypeError("its q, k and v are one layer")
    if qkv.norm_eps != eps or mlp.gate_up.norm_eps != eps:
        raise TypeError("its norms must have the epsilon of the configuration")
    kv = attention.num_kv_heads * head
    q, second = qkv.out_features - 2 * kv, mlp.gate_up.out_features // 2
    parts = [(qkv, 0, q), (qkv, q, kv), (qkv, q + kv, kv), (mlp.gate_up, 0, inner), (mlp.gate_up, second, inner)]
    if mlp.gate_up.bias is not None or mlp.down.bias is not None or attention.o_proj.bias is not None:
        raise TypeError("the loop knows biases of q, k and v only")
    matrices = [
        Matrix(n, module.in_features, functools.partial(_rows, module, first, n, False)) for module, first, n in parts
    ]
    matrices.insert(3, matrix_of(attention.o_proj))
    matrices.append(matrix_of(mlp.down))
    bias = None if qkv.bias is None else qkv.bias[: qkv.out_features]
    return Block((qkv.multiplier, mlp.gate_up.multiplier), matrices, bias)


def _rows(module: Int8Linear, first: int, count: int, scale_inputs: bool) -> Tensor:
    """Some rows of the weight an Int8Linear stands for, float32; with the multiplier of its inputs if wanted."""
    rows = module.codes()[first : first + count].float() * module.scale[first : first + count, None]
    rows = rotate(rows, module.rotation)
    return rows * module.multiplier if scale_inputs else rows


def packed_together(matrices: list[tuple[Matrix, str]]) -> list[Tensor]:
    """The packed matrices in one block of memory; layers that already hold them in that form are moved onto it."""
    sizes = [FORMATS[kind].bytes(matrix.out_features, matrix.in_features) for matrix, kind in matrices]
    if kernels.load("llama_decode"):
        whole = torch.ops.assay.weight_memory(sum(sizes))
    else:
        whole = torch.empty(sum(sizes), dtype=torch.uint8)
    views = []
    for (matrix, kind), view in zip(matrices, whole.split(sizes), strict=True):
        owner = matrix.packed if matrix.packed is not None and matrix.packed.kind == kind else None
        packed = FORMATS[kind].pack(matrix.dense())["packed"] if owner is None else owner.packed
        view = view.view(packed.shape).copy_(packed)
        if owner is not None:
            owner.packed = view
        views.append(view)
    return views
