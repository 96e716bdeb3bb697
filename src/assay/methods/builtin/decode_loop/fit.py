"""Which models the compiled loop can run, and how their weights and numbers are taken out."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from assay.methods.builtin.weight_only import WeightOnlyLinear
from assay.methods.core import kernels
from assay.methods.core.quantize.formats import FORMATS, PANEL
from assay.methods.core.quantize.int8_linear import Int8GatedMLP, Int8Linear, rotate

# The projections of a layer: where they are, and how many of its seven matrices (q k v o gate up down) each holds.
Projections = tuple[tuple[str, str, int], ...]
SEPARATE: Projections = (
    *(("self_attn", f"{name}_proj", 1) for name in "qkvo"),
    *(("mlp", f"{name}_proj", 1) for name in ("gate", "up", "down")),
)
FUSED: Projections = (
    ("self_attn", "qkv_proj", 3),
    ("self_attn", "o_proj", 1),
    ("mlp", "gate_up_proj", 2),
    ("mlp", "down_proj", 1),
)


@dataclass(frozen=True)
class Family:
    """What sets a family's layers apart.

    `windows` says which layers see a window only: none, all of them (`sliding_window`), or those that `layer_types` names.
    `gemma` stands for norms after attention and MLP too, gains of 1 + weight, a scaled embedding, `query_pre_attn_scalar`, and
    rotary embeddings of their own for each type of layer.
    """

    prefix: str  # what its classes' names begin with
    windows: Literal["none", "all", "layers"] = "none"
    projections: Projections = SEPARATE
    head_norms: bool = False
    partly_rotated: bool = False
    gemma: bool = False


FAMILIES = {
    "llama": Family("Llama"),
    "mistral": Family("Mistral", "all"),
    "qwen2": Family("Qwen2", "layers"),
    "qwen3": Family("Qwen3", "layers", head_norms=True),
    "phi3": Family("Phi3", "all", FUSED, partly_rotated=True),
    "gemma3_text": Family("Gemma3", "layers", head_norms=True, gemma=True),
}
# Every field of these families' configurations: those that decide what the loop computes are taken or checked, in `why_not` or on
# the modules themselves; the others change no forward pass in evaluation mode without a loss. A field that is not here is refused.
TAKEN = """hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim vocab_size rms_norm_eps
max_position_embeddings hidden_act hidden_activation rope_parameters sliding_window use_sliding_window layer_types attention_bias mlp_bias
query_pre_attn_scalar final_logit_softcapping attn_logit_softcapping use_bidirectional_attention"""
HARMLESS = """tie_word_embeddings initializer_range attention_dropout resid_pdrop embd_pdrop use_cache pretraining_tp max_window_layers
_sliding_window_pattern original_max_position_embeddings architectures dtype bos_token_id eos_token_id pad_token_id
chunk_size_feed_forward id2label label2id is_encoder_decoder output_hidden_states problem_type return_dict transformers_version
_attn_implementation_internal _experts_implementation_internal _name_or_path _output_attentions _post_init_done"""
FIELDS = frozenset((TAKEN + " " + HARMLESS).split())
STEADY = ("default", "linear", "llama3", "yarn", "proportional")  # rotary embeddings that do not change with the length
SILU, GELU = ("silu", "swish"), ("gelu_pytorch_tanh",)
SOFT_CAPS = ("final_logit_softcapping", "attn_logit_softcapping")
EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")


def why_not(model: nn.Module, weights: str = "int4") -> str:
    """Why the decode loop cannot run this model, or an empty string."""
    config: Any = getattr(model, "config", None)
    name = getattr(config, "model_type", None)
    family = FAMILIES.get(name) if isinstance(name, str) else None
    if family is None or not hasattr(model, "lm_head"):
        mixture = ", a mixture of experts" if any(getattr(config, field, None) for field in EXPERTS) else ""
        known = ", ".join(sorted(FAMILIES))
        return f"the loop knows causal language models of the families {known}, not {name or type(model).__name__}{mixture}"
    prefix = family.prefix
    origin = next(kind for kind in type(model).__mro__ if not kind.__module__.startswith("assay."))
    if origin.__name__ != f"{prefix}ForCausalLM" or not origin.__module__.startswith("transformers."):
        return f"the loop knows transformers' own {prefix}ForCausalLM, not {origin.__module__}.{origin.__name__}"
    if new := set(vars(type(config)())) - set(FIELDS):
        return f"the configuration has fields the loop does not know: {', '.join(sorted(new))}"
    if reason := _why_not_configuration(config):
        return reason
    inner: Any = model.model
    if any(tensor.device.type != "cpu" for tensor in model.parameters()):
        return "the loop runs on the CPU only"
    embedding = inner.embed_tokens
    if embedding.weight.dtype not in (torch.float32, torch.bfloat16):
        return f"the embedding must be float32 or bfloat16, not {embedding.weight.dtype}"
    if type(embedding).__name__ != ("Gemma3TextScaledWordEmbedding" if family.gemma else "Embedding"):
        return f"the embedding must be transformers' own, not {type(embedding).__name__}"
    layers = layers_of(model)
    if reason := _why_not_windows(config, family, layers):
        return reason
    biased = None
    for number, layer in enumerate(layers):
        try:
            block = block_of(layer, family, config)
        except (AttributeError, TypeError) as error:
            return f"layers.{number} is not a plain {name} layer: {error}"
        if number and (block.bias is not None) != biased:
            return f"layers.{number}: the layers must agree on having biases"
        biased = block.bias is not None
    head_size = layers[0].self_attn.head_dim
    if head_size % 16 or not 16 <= head_size <= 256:
        return f"the head size must be a multiple of 16 up to 256; it is {head_size}"
    if reason := _why_not_rope(inner.rotary_emb, family, config, head_size):
        return reason
    try:
        gain_of(inner.norm, family, config.rms_norm_eps)
    except (AttributeError, TypeError):
        return f"the last norm must be a {prefix}RMSNorm with the epsilon of the configuration"
    multiple = FORMATS[weights].multiple
    widths = (config.hidden_size, config.intermediate_size, config.num_attention_heads * head_size)
    if any(width % multiple for width in widths):
        return f"{weights} needs a hidden size, an inner size and heads that are multiples of {multiple}, got {widths}"
    try:
        head = matrix_of(model.lm_head)
    except TypeError as error:
        return f"lm_head: {error}"
    if not head.out_features == config.vocab_size <= len(embedding.weight):
        return f"lm_head and the embedding must have the {config.vocab_size} rows of the configuration"
    return ""


def _why_not_configuration(config: Any) -> str:
    if activation_of(config) not in (*SILU, *GELU):
        return f"the activation must be silu or gelu_pytorch_tanh, not {activation_of(config)}"
    for name in SOFT_CAPS:
        if getattr(config, name, None) is not None:
            return f"soft caps are not supported: {name} is {getattr(config, name)}"
    if getattr(config, "use_bidirectional_attention", None):
        return "attention that looks ahead is not supported: use_bidirectional_attention is set"
    return ""


def _why_not_windows(config: Any, family: Family, layers: list[Any]) -> str:
    kinds = getattr(config, "layer_types", None) if family.windows == "layers" else None
    if kinds is not None and (other := set(kinds) - {"full_attention", "sliding_attention"}):
        return f"layers of type {', '.join(sorted(other))} are not supported"
    for number, layer in enumerate(layers):
        window = window_of(config, family, number)
        if window is not None and not window >= 1:
            return f"sliding-window attention needs a window of at least 1 position, got {window}"
        own = getattr(getattr(layer, "self_attn", None), "sliding_window", window)
        if own != window:
            return f"layers.{number}: its sliding-window attention over {own} positions is not the configuration's ({window})"
    return ""


def _why_not_rope(rotary: Any, family: Family, config: Any, head_size: int) -> str:
    if type(rotary).__name__ != f"{family.prefix}RotaryEmbedding" or "forward" in vars(rotary):
        return f"the rotary embedding must be transformers' own {family.prefix}RotaryEmbedding"
    sizes = set()
    for rope in ropes_of(rotary, family, config):
        if rope.type not in STEADY:
            return f"rope of type {rope.type!r} changes with the length"
        sizes.add(2 * rope.frequencies.numel())
    rotated = max(sizes)
    if len(sizes) > 1 or rotated > head_size or (rotated != head_size and not family.partly_rotated):
        return (
            f"the rotary embedding must turn the {head_size} values of a head, not {', '.join(map(str, sorted(sizes)))}"
        )
    return ""


def why_not_shared(model: Any) -> str:
    """Why the prefill cannot use the loop's packed weights, or an empty string; for models that fit."""
    config: Any = getattr(model, "config", None)
    family = FAMILIES.get(getattr(config, "model_type", ""))
    if family is None or family.projections is SEPARATE:
        return ""
    head_size = layers_of(model)[0].self_attn.head_dim
    sizes = (config.num_attention_heads * head_size, config.num_key_value_heads * head_size, config.intermediate_size)
    if uneven := [size for size in sizes if size % PANEL]:
        return f"the parts of its fused projections must be multiples of {PANEL} wide, not {uneven[0]}"
    return ""


def layers_of(model: Any) -> list[Any]:
    """The decoder layers that the forward pass runs."""
    return list(model.model.layers[: model.config.num_hidden_layers])


def activation_of(config: Any) -> str:
    """The name of the MLP's activation: Gemma's configuration calls it otherwise."""
    return str(getattr(config, "hidden_activation", None) or getattr(config, "hidden_act", ""))


def window_of(config: Any, family: Family, number: int) -> int | None:
    """How many positions a layer sees, the own one among them; None if all."""
    if family.windows == "none" or (family.windows == "layers" and config.layer_types[number] != "sliding_attention"):
        return None
    window: int | None = config.sliding_window
    return 0 if window is None and family.windows == "layers" else window


@dataclass(frozen=True)
class Rope:
    """A kind of rotary embedding: the frequencies of half of what is turned, and what cosines and sines are scaled by."""

    type: str
    frequencies: Tensor
    scale: float


def ropes_of(rotary: Any, family: Family, config: Any) -> list[Rope]:
    """One, or with Gemma one a type of layer, in the order of the types' names."""
    if not family.gemma:
        return [Rope(rotary.rope_type, rotary.inv_freq, float(rotary.attention_scaling))]
    return [
        Rope(
            rotary.rope_type[kind],
            getattr(rotary, f"{kind}_inv_freq"),
            float(getattr(rotary, f"{kind}_attention_scaling")),
        )
        for kind in sorted(set(config.layer_types))
    ]


# ---- layers ------------------------------------------------------------------------------------------------------------------


@dataclass
class Matrix:
    """A weight matrix: how to get it dense, and the layer that holds it packed, if any, from which panel on."""

    out_features: int
    in_features: int
    dense: Callable[[], Tensor]
    packed: WeightOnlyLinear | None = None
    panel: int = 0


@dataclass
class Block:
    """What the loop needs from a decoder layer.

    The gains of its norms (two, or with norms after attention and MLP four, in the order in which they are applied), those of
    queries and keys if there are any, its seven matrices, and the bias of q, k and v.
    """

    gains: list[Tensor]
    matrices: list[Matrix]
    bias: Tensor | None
    head_gains: list[Tensor] = field(default_factory=list)


def block_of(layer: Any, family: Family, config: Any) -> Block:
    """Raises AttributeError or TypeError, saying why, for a layer that is not one of the family's plain layers."""
    attention, mlp, prefix, eps = layer.self_attn, layer.mlp, family.prefix, config.rms_norm_eps
    if hasattr(attention, "q_norm") and not family.head_norms:
        raise TypeError("its queries are normalised")
    scalar, called = (
        (config.query_pre_attn_scalar, "query_pre_attn_scalar") if family.gemma else (attention.head_dim, "head_dim")
    )
    if type(attention).__name__ != f"{prefix}Attention" or attention.scaling != scalar**-0.5:
        raise TypeError(f"its attention must be a {prefix}Attention that scales by {called}^-0.5")
    if type(layer).__name__ != f"{prefix}DecoderLayer" or "forward" in vars(layer):
        raise TypeError("its forward pass was replaced")
    if family.projections is SEPARATE and hasattr(attention, "qkv_proj"):
        return _fused_int8_block(attention, mlp, eps)
    if type(mlp).__name__ != f"{prefix}MLP" or "forward" in vars(attention) or "forward" in vars(mlp):
        raise TypeError("its forward pass was replaced")
    names = ["input_layernorm", "post_attention_layernorm"]
    if family.gemma:
        names += ["pre_feedforward_layernorm", "post_feedforward_layernorm"]
    gains = [gain_of(getattr(layer, name), family, eps) for name in names]
    head_gains = (
        [gain_of(norm, family, eps) for norm in (attention.q_norm, attention.k_norm)] if family.head_norms else []
    )
    head, hidden, inner = attention.head_dim, config.hidden_size, config.intermediate_size
    q, kv = config.num_attention_heads * head, config.num_key_value_heads * head
    shapes = [(q, hidden), (kv, hidden), (kv, hidden), (hidden, q), (inner, hidden), (inner, hidden), (hidden, inner)]
    matrices: list[Matrix] = []
    biases: list[Tensor | None] = []
    for parent, name, count in family.projections:
        module, wanted = getattr(layer.get_submodule(parent), name), shapes[len(matrices) : len(matrices) + count]
        rows = sum(n for n, _ in wanted)
        if (module.out_features, module.in_features) != (rows, wanted[0][1]):
            raise TypeError(f"{name} must be {rows} x {wanted[0][1]}, got {module.out_features} x {module.in_features}")
        first = 0
        for n, _ in wanted:
            if len(matrices) < 3:
                biases.append(None if module.bias is None else module.bias[first : first + n])
            matrices.append(matrix_of(module, len(matrices) < 3, first, n))
            first += n
    bias = [part for part in biases if part is not None]
    if bias and len(bias) < 3:
        raise TypeError("q, k and v must all have a bias or none")
    return Block(gains, matrices, torch.cat(bias) if bias else None, head_gains)


def gain_of(norm: Any, family: Family, eps: float) -> Tensor:
    """What a norm multiplies by, float32. Raises TypeError for another class or epsilon."""
    own = norm.eps if family.gemma else norm.variance_epsilon
    if type(norm).__name__ != f"{family.prefix}RMSNorm" or own != eps:
        raise TypeError(f"its norms must be {family.prefix}RMSNorm with the epsilon of the configuration")
    gain: Tensor = norm.weight.detach().float()
    return 1.0 + gain if family.gemma else gain


def matrix_of(module: Any, may_have_bias: bool = False, first: int = 0, count: int | None = None) -> Matrix:
    """The matrix of a linear layer, or `count` of its rows from `first` on. Raises TypeError for a layer the loop does not know."""
    if module.bias is not None and not may_have_bias:
        raise TypeError("the loop knows biases of q, k and v only")
    rows = module.out_features if count is None else count
    if type(module) is nn.Linear:
        return Matrix(rows, module.in_features, lambda: module.weight[first : first + rows])
    if isinstance(module, WeightOnlyLinear) and module.gain is None:
        aligned = first % PANEL == 0 and (rows % PANEL == 0 or first + rows == module.out_features)
        owner = module if aligned else None
        return Matrix(
            rows, module.in_features, lambda: module.dequantize()[first : first + rows], owner, first // PANEL
        )
    if isinstance(module, Int8Linear) and module.norm_eps is None:
        return Matrix(rows, module.in_features, lambda: _rows(module, first, rows, True))
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
    return Block([qkv.multiplier, mlp.gate_up.multiplier], matrices, bias)


def _rows(module: Int8Linear, first: int, count: int, scale_inputs: bool) -> Tensor:
    """Some rows of the weight an Int8Linear stands for, float32; with the multiplier of its inputs if wanted."""
    rows = module.codes()[first : first + count].float() * module.scale[first : first + count, None]
    rows = rotate(rows, module.rotation)
    return rows * module.multiplier if scale_inputs else rows


# ---- packed weights ----------------------------------------------------------------------------------------------------------


def packed_together(matrices: list[tuple[Matrix, str]]) -> list[Tensor]:
    """The packed matrices in one block of memory; layers that already hold them in that form are moved onto it."""
    sizes = [FORMATS[kind].bytes(matrix.out_features, matrix.in_features) for matrix, kind in matrices]
    if kernels.load("decode"):
        whole = torch.ops.assay.weight_memory(sum(sizes))
    else:
        whole = torch.empty(sum(sizes), dtype=torch.uint8)
    views: list[Tensor] = []
    moved: dict[WeightOnlyLinear, list[Tensor]] = {}
    for (matrix, kind), view in zip(matrices, whole.split(sizes), strict=True):
        panels = -(-matrix.out_features // PANEL)
        owner = matrix.packed if matrix.packed is not None and matrix.packed.kind == kind else None
        packed = (
            FORMATS[kind].pack(matrix.dense())["packed"]
            if owner is None
            else owner.packed[matrix.panel : matrix.panel + panels]
        )
        view = view.view(packed.shape).copy_(packed)
        if owner is not None:
            moved.setdefault(owner, []).append(view)
        views.append(view)
    for owner, parts in moved.items():
        if sum(len(part) for part in parts) == len(owner.packed):
            owner.packed = joined(parts)
    return views


def joined(views: list[Tensor]) -> Tensor:
    """Packed matrices that lie one after the other, as the one matrix they are. Raises ValueError if they do not."""
    rows, width = 0, views[0].shape[1]
    for view in views:
        if view.shape[1] != width or view.data_ptr() != views[0].data_ptr() + rows * width:
            raise ValueError("views must be packed matrices of one width, one after the other in memory")
        rows += len(view)
    return views[0].as_strided((rows, width), (width, 1))
