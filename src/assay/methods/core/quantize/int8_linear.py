"""W8A8 linear layers that are fast on a CPU: int8 weights per output channel, int8 activations per token.

    y[t, n] = (x_scale[t] * w_scale[n]) * sum_k codes_x[t, k] * codes_w[n, k] + bias[n]

Both are symmetric: codes in -127..127, a token's scale is the largest magnitude of its row over 127 and is found anew for every
row. Linear layers of a model are replaced by `quantize_linears`; in blocks of the llama family (llama, mistral, qwen2) the
preceding RMSNorm, the rotary embedding and the gated activation are fused into the same pass, because next to an int8 product they
take as long as the product itself.

When not to use it: for training (gradients pass the rounding and reach the inputs, never the weights), and where a layer's
inputs have channels hundreds of times larger than the rest in *every* token (give `smooth`, or skip that layer). A single outlier
token costs the others nothing.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from types import MethodType
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from assay import checks
from assay.measure.cost import register_macs
from assay.methods.core import kernels
from assay.methods.core.layers.linears import linears as all_linears
from assay.methods.core.layers.linears import open_, put, settle
from assay.methods.core.layers.stand_in import Casting, stand_in
from assay.methods.core.layers.surgery import output_layer, page_out, refuse_saving, untie
from assay.methods.core.quantize.formats import WIDE_PANEL, pack_wide, quantize_rows, unpack_wide

# model types whose blocks are computed exactly as `fuse_block` computes them
LLAMA_FAMILY = ("llama", "mistral", "qwen2")
PLAIN = ("Attention", "MLP", "RMSNorm")  # the classes in them, after the family's own prefix

_ready: bool | None = None  # whether the compiled operators serve; None until first asked
_least_amx: int = -1  # rows from which AMX computes; -1: never
_below = "portable"  # what computes fewer rows


def rotate(x: Tensor, size: int) -> Tensor:
    """The unnormalised Hadamard transform of channels k / size apart: (..., k) seen as (..., size, k / size). Twice is size times x."""
    *rows, k = x.shape
    half = k // 2
    for _ in range(size.bit_length() - 1):
        left, right = x.reshape(*rows, -1, 2, half).unbind(-2)
        x = torch.stack([left + right, left - right], -2).reshape(*rows, k)
        half //= 2
    return x


class Int8Linear(Casting, nn.Module):
    """A linear layer in W8A8: (..., in_features) -> (..., out_features) in the dtype of its input (float32, bfloat16, float16).

    Inputs are first multiplied by `multiplier` (in_features; the inverse of a smoothing folded into the weight, or the
    weight of an RMSNorm where `norm_eps` is given), then rotated by a Hadamard transform over `rotation` channels, whose inverse is
    folded into the weight here; that spreads outliers over the channels. `weight` (out, in) already holds the smoothing, not the
    rotation. Buffers: `packed` (see `pack`), `scale`
    float32 and `offset` int32, one per output channel up to a full panel (offset = -128 * sum of the channel's codes),
    `multiplier` float32, `bias` float32 or None. All of them travel in the state dict, which does not depend on how the layer
    was calibrated.

    Raises TypeError for inputs of another dtype, ValueError for another number of features, and for weights, biases or
    multipliers that are not finite.

    >>> layer = Int8Linear(torch.randn(48, 64), rotation=16)
    >>> layer(torch.randn(2, 5, 64)).shape
    torch.Size([2, 5, 48])
    """

    packed: Tensor
    scale: Tensor
    offset: Tensor
    multiplier: Tensor
    bias: Tensor | None

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None = None,
        *,
        multiplier: Tensor | None = None,
        norm_eps: float | None = None,
        rotation: int = 1,
    ):
        super().__init__()
        checks.tensor("weight", weight, ndim=2)
        self.out_features, self.in_features = weight.shape
        self.norm_eps = None if norm_eps is None else checks.number("norm_eps", norm_eps, low=0)
        self.rotation = power_of_two(rotation)
        if self.in_features % self.rotation:
            raise ValueError(
                f"rotation must be a power of two that divides {self.in_features} features, got {rotation}"
            )
        self.dtype = weight.dtype
        for name, values in (("weight", weight), ("bias", bias), ("multiplier", multiplier)):
            if values is None or type(values) not in (Tensor, nn.Parameter) or values.is_meta:
                continue  # not given, or without numbers
            if not bool(torch.isfinite(values).all()):
                raise ValueError(f"{name} must be finite, got inf or NaN")
        codes, scale = quantize_rows(rotate(weight.detach().float(), rotation) / rotation)
        filler = (0, -self.out_features % WIDE_PANEL)
        self.register_buffer("packed", pack_wide(codes))
        self.register_buffer("scale", F.pad(scale.flatten(), filler))
        self.register_buffer("offset", F.pad(codes.sum(1, dtype=torch.int32) * -128, filler))
        if multiplier is None:
            multiplier = torch.ones(self.in_features, device=weight.device)
        self.register_buffer("multiplier", multiplier.detach().float().clone())
        self.register_buffer("bias", None if bias is None else F.pad(bias.detach().float(), filler))

    def _apply(self, fn: Any, recurse: bool = True) -> Int8Linear:
        """Moves between devices like any module, but `model.to(bfloat16)` leaves the scales in float32."""
        kept = {name: buffer for name, buffer in self._buffers.items() if buffer is not None}
        super()._apply(fn, recurse)
        for name, buffer in kept.items():
            self._buffers[name] = buffer.to(self.packed.device)
        self.follow(fn)
        return self

    @property
    def weight(self) -> Tensor:
        """The dense weight (out, in) behind the norm, made when its numbers are wanted; nothing learns by changing it."""
        return stand_in((self.out_features, self.in_features), self.dtype, self.packed.device, self.dequantize)

    def dequantize(self) -> Tensor:
        """The float32 weight (out, in) this layer stands for, smoothing and the gain of a norm taken in."""
        rows = rotate(self.codes().float() * self.scale[: self.out_features, None], self.rotation)
        return rows * self.multiplier

    def codes(self) -> Tensor:
        """The integer weight, int8 (out_features, in_features)."""
        return unpack_wide(self.packed)[: self.out_features, : self.in_features]

    def arguments(self) -> tuple[Any, ...]:
        """The arguments of the compiled operators for this layer, in their order."""
        eps = -1.0 if self.norm_eps is None else self.norm_eps
        return self.packed, self.scale, self.offset, self.bias, self.multiplier, eps, self.rotation

    def forward(self, x: Tensor) -> Tensor:
        _check(x, self.in_features)
        if _learns(x):
            return cast(Tensor, _Through.apply(x, self, self.unrounded))
        if _compiled(x):
            _note(x)
            return cast(Tensor, torch.ops.assay.w8a8_linear(x, *self.arguments(), self.out_features))
        return self.reference(x)

    def unrounded(self, x: Tensor) -> Tensor:
        """The same without rounding the inputs, on the dense weight: what gradients are taken of."""
        rows = x.float()
        if self.norm_eps is not None:
            rows = rows * torch.rsqrt(rows.square().mean(-1, keepdim=True) + self.norm_eps)
        bias = None if self.bias is None else self.bias[: self.out_features]
        return F.linear(rows, self.dequantize(), bias).to(x.dtype)

    def reference(self, x: Tensor) -> Tensor:
        """The same in plain torch: the oracle of the tests, and what runs without a compiler."""
        kernels.ran("int8 linear", "torch")
        if x.numel() == 0:
            return x.new_empty(*x.shape[:-1], self.out_features)
        rows = x.reshape(-1, self.in_features).float()
        if self.norm_eps is not None:
            rows = rows * torch.rsqrt(rows.square().mean(-1, keepdim=True) + self.norm_eps)
        codes, row_scale = quantize_rows(rotate(rows * self.multiplier, self.rotation))
        weight = unpack_wide(self.packed)
        codes = F.pad(codes, (0, weight.shape[1] - self.in_features))
        if x.device.type == "cpu":
            product = torch._int_mm(codes, weight.T).float()
        else:
            product = codes.float() @ weight.T.float()
        y = product * (row_scale * self.scale)
        if self.bias is not None:
            y = y + self.bias
        return y[:, : self.out_features].to(x.dtype).view(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        norm = "" if self.norm_eps is None else f", norm_eps={self.norm_eps}"
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}{norm}"


class Int8GatedMLP(nn.Module):
    """RMSNorm, gate, up, SiLU, product and down projection in one pass: (..., k) -> (..., n).

    `gate_up` holds both weights, each filled up to a full panel; the hidden activations of a block of rows are quantised for
    `down` while they are in the cache.
    """

    def __init__(self, gate_up: Int8Linear, down: Int8Linear):
        super().__init__()
        self.gate_up, self.down = gate_up, down

    def forward(self, x: Tensor) -> Tensor:
        _check(x, self.gate_up.in_features)
        if _learns(x):
            return cast(Tensor, _Through.apply(x, self, self.unrounded))
        if not _compiled(x):
            return self._parts(x, self.gate_up.reference, self.down.reference)
        _note(x)
        sizes = self.down.in_features, self.down.out_features
        return cast(Tensor, torch.ops.assay.w8a8_mlp(x, *self.gate_up.arguments(), *self.down.arguments(), *sizes))

    def unrounded(self, x: Tensor) -> Tensor:
        """The same without rounding the inputs: what gradients are taken of."""
        return self._parts(x, self.gate_up.unrounded, self.down.unrounded)

    def _parts(self, x: Tensor, first: Callable[[Tensor], Tensor], second: Callable[[Tensor], Tensor]) -> Tensor:
        gate, up = first(x.float()).chunk(2, -1)
        return second((F.silu(gate) * up)[..., : self.down.in_features]).to(x.dtype)


def attention_forward(
    self: Any,
    hidden_states: Tensor,
    position_embeddings: tuple[Tensor, Tensor],
    attention_mask: Tensor | None = None,
    cache: Any = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """`forward` of an attention module after `fuse_block`: norm, q/k/v and rotary embedding in one pass, then as before.

    The cache is updated and the attention function looked up as transformers does it, so that any registered
    `attn_implementation` serves. hidden_states is (batch, tokens, features) *before* the block's RMSNorm.
    """
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    query, key, value = qkv_rope(self.qkv_proj, hidden_states, *position_embeddings, self.num_kv_heads)
    if cache is not None:
        key, value = cache.update(key, value, self.layer_idx)
    attention = ALL_ATTENTION_FUNCTIONS.get_interface(
        self.config._attn_implementation, sys.modules[type(self).__module__].eager_attention_forward
    )
    output, weights = attention(
        self,
        query,
        key,
        value,
        attention_mask,
        dropout=0.0 if not self.training else self.attention_dropout,
        scaling=self.scaling,
        **self.window,
        **kwargs,
    )
    return self.o_proj(output.reshape(*hidden_states.shape[:-1], -1)), weights


def qkv_rope(layer: Int8Linear, x: Tensor, cos: Tensor, sin: Tensor, kv_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """x (batch, tokens, features) -> q (batch, heads, tokens, d), k, v (batch, kv_heads, tokens, d); q and k are rotated.

    `layer` holds the weights of q, k and v one after the other; cos and sin are (1 or batch, tokens, d).
    """
    _check(x, layer.in_features)
    if _learns(x):
        both = (
            (lambda y: qkv_rope(layer, y, cos, sin, kv_heads)),
            (lambda y: _qkv(layer.unrounded(y), cos, sin, kv_heads)),
        )
        return cast(tuple[Tensor, Tensor, Tensor], _Through.apply(x, *both))
    d = cos.shape[-1]
    heads = layer.out_features // d - 2 * kv_heads
    if _compiled(x):
        _note(x)
        turn = cos.to(x.dtype), sin.to(x.dtype)
        fused = torch.ops.assay.w8a8_qkv_rope(x, *layer.arguments(), *turn, heads, kv_heads)
        return cast(tuple[Tensor, Tensor, Tensor], fused)
    return cast(
        tuple[Tensor, Tensor, Tensor],
        tuple(part.to(x.dtype) for part in _qkv(layer.reference(x.float()), cos, sin, kv_heads)),
    )


def _qkv(y: Tensor, cos: Tensor, sin: Tensor, kv_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v of a joint projection y (batch, tokens, features), q and k rotated, in torch."""
    split = y.view(*y.shape[:-1], -1, cos.shape[-1]).transpose(1, 2)
    rotated, value = split[:, :-kv_heads].float(), split[:, -kv_heads:]
    left, right = rotated.chunk(2, -1)
    rotated = rotated * cos.unsqueeze(1).float() + torch.cat([-right, left], -1) * sin.unsqueeze(1).float()
    return rotated[:, :-kv_heads].to(y.dtype), rotated[:, -kv_heads:].to(y.dtype), value


def input_rms(model: nn.Module, calibration: Iterable[Any], names: Iterable[str]) -> dict[str, Tensor]:
    """Root mean square of every input channel of the named layers: name -> float32 (in_features).

    `calibration` holds token ids, each (1, n), or mappings of keyword arguments. The model runs in evaluation mode.
    """
    squares: dict[str, Tensor] = {}
    counts: dict[str, int] = {}

    def watch(name: str) -> Any:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            rows = inputs[0].detach().float().flatten(0, -2)
            squares[name] = squares.get(name, 0) + rows.square().sum(0)
            counts[name] = counts.get(name, 0) + rows.shape[0]

        return hook

    handles = [model.get_submodule(name).register_forward_pre_hook(watch(name)) for name in names]
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            for item in calibration:
                model(**item) if isinstance(item, Mapping) else model(item)
    finally:
        model.train(training)
        for handle in handles:
            handle.remove()
    return {name: (total / counts[name]).sqrt() for name, total in squares.items()}


def smoothing(rms: Tensor, weight: Tensor, alpha: float) -> Tensor:
    """SmoothQuant's factor per input channel, with root mean squares in place of peaks: rms(x)^alpha / rms(w)^(1 - alpha).

    Inputs are divided and the weight's columns multiplied by it. Peaks (the published form) made the error three times as large on
    the q/k/v inputs of the bundled model; our choice.
    """
    weight_rms = weight.detach().float().square().mean(0).sqrt()
    floor = 1e-3  # of the mean: a channel that calibration never saw must stay finite
    rms, weight_rms = (x.clamp_min((x.mean() * floor).clamp_min(1e-12)) for x in (rms, weight_rms))
    return rms**alpha / weight_rms ** (1 - alpha)


def select(
    model: nn.Module, include: Sequence[str] = ("*",), exclude: Sequence[str] = (), *, head: bool = False
) -> dict[str, nn.Linear]:
    """The linear layers of a model by name (see `linears`). A pattern matches a whole name (with `*`) or one of its dotted parts.

    The output layer, known by `get_output_embeddings`, is among them with `head` only.
    """

    def matches(name: str, patterns: Sequence[str]) -> bool:
        return any(fnmatchcase(name, pattern) or pattern in name.split(".") for pattern in patterns)

    last = None if checks.flag("head", head) else output_layer(model)
    return {
        name: layer
        for name, layer in all_linears(model).items()
        if layer is not last and matches(name, include) and not matches(name, exclude)
    }


def quantize_linears(
    model: nn.Module,
    *,
    include: Sequence[str] = ("*",),
    exclude: Sequence[str] = (),
    head: bool = False,
    smooth: float | None = None,
    rotation: int = 16,
    calibration: Iterable[Any] = (),
    fuse: bool = True,
) -> nn.Module:
    """Replace linear layers by `Int8Linear`, in place, and return the model.

    `include` and `exclude` are patterns over names; the output layer is left alone unless `head`. GPT-2's Conv1D and the fused
    experts of a mixture are linear layers like any other. `smooth` is SmoothQuant's alpha in 0..1 and needs `calibration` (token
    ids, each (1, n), or mappings of keyword arguments; not the text that quality is measured on); experts, which no text
    reaches completely, are not smoothed. `rotation` is the size of the Hadamard transform of the inputs (1 for none), halved until it
    divides a layer's inputs. With `fuse`, blocks of the llama family whose layers were all selected become fused ones. The model
    is then for inference only; it still generates and copies like before, and a state dict loads into any model quantised
    with the same `include`, `exclude`, `head`, `rotation` and `fuse`, calibrated or not. Its
    `save_pretrained` is refused, since `from_pretrained` knows no packed weights and would draw new ones: save before, and quantise
    again after loading.

    Raises TypeError or ValueError, before anything is changed, when nothing is selected, `smooth` or `rotation` is out of range,
    calibration is missing, or a weight is not finite.

    >>> model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    >>> quantize_linears(model)[0]
    Int8Linear(in_features=64, out_features=64, bias=True)
    """
    for name, patterns in (("include", include), ("exclude", exclude)):
        if isinstance(patterns, str) or not all(isinstance(pattern, str) for pattern in patterns):
            raise TypeError(f"{name} must be a sequence of patterns, got {patterns!r}")
    checks.flag("fuse", fuse)
    rotation = power_of_two(rotation)
    linears = select(model, include, exclude, head=head)
    if not linears:
        raise ValueError(
            f"include={list(include)} and exclude={list(exclude)} select no linear layer of {type(model).__name__}"
        )
    for name, linear in linears.items():
        if not all(bool(torch.isfinite(p).all()) for p in (linear.weight, linear.bias) if p is not None):
            raise ValueError(f"the weight and bias of {name} must be finite, got inf or NaN")
        page_out(linear.weight)
    factors: dict[str, Tensor] = {}
    if smooth is not None:
        smooth = checks.number("smooth", smooth, low=0, high=1)
        present = {name for name, _ in model.named_modules()}
        ordinary = {name: linear for name, linear in linears.items() if name in present}
        rms = input_rms(model, calibration, ordinary)
        if missing := set(ordinary) - set(rms):
            raise ValueError(
                f"smooth needs calibration token ids that reach every layer; none reached {sorted(missing)[:3]}"
            )
        factors = _factors(ordinary, rms, smooth)
        for name, factor in factors.items():
            if not bool((torch.isfinite(factor) & torch.isfinite(1 / factor)).all()):
                raise ValueError(f"calibration must give {name} finite inputs, got inf or NaN")
    fused = fusable_blocks(model, linears) if fuse else {}
    for name, block in fused.items():
        for norm in ("input_layernorm", "post_attention_layernorm"):
            if not bool(torch.isfinite(cast(Any, block.get_submodule(norm)).weight).all()):
                raise ValueError(f"the weight of {name}.{norm} must be finite, got inf or NaN")
    open_(model)
    with torch.no_grad():
        for name, block in fused.items():
            own = {k.removeprefix(f"{name}."): f for k, f in factors.items() if k.startswith(f"{name}.")}
            fuse_block(block, own, rotation)
        for name in linears:
            if not any(name.startswith(f"{block}.") for block in fused):
                linear = cast(nn.Linear, model.get_submodule(name))
                put(model, name, _quantized([linear], factors.get(name), rotation))
    untie(settle(model))
    return refuse_saving(model)


def fuse_block(block: Any, factors: Mapping[str, Tensor] | None = None, rotation: int = 16) -> None:
    """Make one decoder block of the llama family run fused, in place.

    The two norms move into the projections after them and leave `nn.Identity` in their place; q/k/v and gate/up become one weight
    each. `factors` are smoothing factors by layer ("self_attn.q_proj" ...), equal for layers that share their input.
    """
    factors = factors or {}
    attention, mlp = block.self_attn, block.mlp
    attention.num_kv_heads = attention.k_proj.out_features // attention.head_dim
    attention.window = {}
    if attention.config.model_type != "llama":  # the others pass one more argument to the attention function
        attention.window["sliding_window"] = getattr(attention, "sliding_window", attention.config.sliding_window)
    attention.qkv_proj = _quantized(
        [attention.q_proj, attention.k_proj, attention.v_proj],
        factors.get("self_attn.q_proj"),
        rotation,
        block.input_layernorm,
    )
    attention.o_proj = _quantized([attention.o_proj], factors.get("self_attn.o_proj"), rotation)
    del attention.q_proj, attention.k_proj, attention.v_proj
    attention.forward = MethodType(attention_forward, attention)
    gate_up = [mlp.gate_proj, mlp.up_proj]
    block.mlp = Int8GatedMLP(
        _quantized(gate_up, factors.get("mlp.gate_proj"), rotation, block.post_attention_layernorm, filled=True),
        _quantized([mlp.down_proj], factors.get("mlp.down_proj"), rotation),
    )
    block.input_layernorm = nn.Identity()
    block.post_attention_layernorm = nn.Identity()


def _quantized(
    linears: list[nn.Linear], factor: Tensor | None, rotation: int, norm: Any = None, filled: bool = False
) -> Int8Linear:
    """Layers with the same input as one Int8Linear, each padded to a full panel if wanted; their own weights are released."""
    size = WIDE_PANEL if filled else 1
    weight = torch.cat([F.pad(linear.weight, (0, 0, 0, -linear.out_features % size)) for linear in linears]).float()
    bias = None
    if any(linear.bias is not None for linear in linears):
        biases = [weight.new_zeros(x.out_features) if x.bias is None else x.bias for x in linears]
        bias = torch.cat([F.pad(b.float(), (0, -b.numel() % size)) for b in biases])
    multiplier = torch.ones(weight.shape[1], device=weight.device) if norm is None else norm.weight.float()
    if factor is not None:
        weight, multiplier = weight * factor, multiplier / factor
    while weight.shape[1] % rotation:
        rotation //= 2
    eps = None if norm is None else norm.variance_epsilon
    layer = Int8Linear(weight, bias, multiplier=multiplier, norm_eps=eps, rotation=rotation)
    layer.dtype = linears[0].weight.dtype
    for linear in linears:
        page_out(linear.weight)
    return layer


def _factors(linears: Mapping[str, nn.Linear], rms: Mapping[str, Tensor], alpha: float) -> dict[str, Tensor]:
    """Smoothing factors; the layers of a block that share their input share one, so that they can be fused."""
    groups: dict[tuple[str, str], list[str]] = {}
    for name in linears:
        parent, _, leaf = name.rpartition(".")
        shared = {"q_proj": "qkv", "k_proj": "qkv", "v_proj": "qkv", "gate_proj": "gate_up", "up_proj": "gate_up"}
        groups.setdefault((parent, shared.get(leaf, leaf)), []).append(name)
    factors: dict[str, Tensor] = {}
    for names in groups.values():
        factor = smoothing(rms[names[0]], torch.cat([linears[name].weight for name in names]), alpha)
        factors.update(dict.fromkeys(names, factor))
    return factors


def fusable_blocks(model: nn.Module, linears: Mapping[str, nn.Linear]) -> dict[str, nn.Module]:
    """The decoder blocks of the llama family of which every linear layer was selected, by name."""
    config: Any = getattr(model, "config", None)
    family = getattr(config, "model_type", None)
    if family not in LLAMA_FAMILY or config.hidden_act != "silu":
        return {}

    def plain(block: Any) -> bool:
        parts = (block.self_attn, block.mlp, block.input_layernorm)
        return all(
            type(part).__name__.lower() == f"{family}{kind}".lower() for part, kind in zip(parts, PLAIN, strict=True)
        )

    wanted = [f"self_attn.{x}_proj" for x in "qkvo"] + [f"mlp.{x}_proj" for x in ("gate", "up", "down")]
    return {
        name: module
        for name, module in model.named_modules()
        if type(module).__name__.endswith("DecoderLayer")
        and plain(module)
        and all(f"{name}.{leaf}" in linears for leaf in wanted)
    }


def power_of_two(rotation: int) -> int:
    """`rotation` itself if it is 1, 2, 4 ...; raises TypeError or ValueError."""
    rotation = checks.whole("rotation", rotation, low=1)
    if rotation & (rotation - 1):
        raise ValueError(f"rotation must be a power of two (1 for none), got {rotation}")
    return rotation


def _note(x: Tensor) -> None:
    """Note which instructions the compiled operators use for these rows."""
    if not torch.compiler.is_compiling():
        rows = x.numel() // x.shape[-1]
        kernels.ran("int8 linear", "amx" if 0 <= _least_amx <= rows else _below)


def _check(x: Tensor, features: int) -> None:
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise TypeError(f"x must be float32, bfloat16 or float16, got {x.dtype}")
    if x.shape[-1] != features:
        raise ValueError(f"x must have {features} features in its last dimension, got shape {tuple(x.shape)}")


def _learns(x: Tensor) -> bool:
    return torch.is_grad_enabled() and x.requires_grad and not torch.compiler.is_compiling()


class _Through(torch.autograd.Function):
    """`fast(x)`, with the gradient of `smooth(x)`: rounding is passed through. `smooth` runs in the backward pass only."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, fast: Callable[[Tensor], Any], smooth: Callable[[Tensor], Any]) -> Any:
        ctx.save_for_backward(x)
        ctx.smooth = smooth
        return fast(x)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        (x,) = ctx.saved_tensors
        with torch.enable_grad():
            again = x.detach().requires_grad_()
            (found,) = torch.autograd.grad(ctx.smooth(again), again, gradients)
        return found, None, None


def _compiled(x: Tensor) -> bool:
    """Whether the compiled operators serve this input."""
    if _ready is None:
        _prepare()
    return bool(_ready) and x.device.type == "cpu"


def _prepare() -> None:
    global _ready, _least_amx, _below
    _ready = kernels.load("w8a8")
    if not _ready:
        return
    _least_amx, vnni = torch.ops.assay.w8a8_paths()
    _below = "vnni" if vnni else "portable"

    def linear(x: Tensor, *arguments: Any) -> Tensor:  # only shapes, for torch.compile
        return x.new_empty(*x.shape[:-1], arguments[-1])

    def qkv(x: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
        (batch, tokens), (cos, _, heads, kv_heads) = x.shape[:2], arguments[-4:]
        query = x.new_empty(batch, tokens, heads, cos.shape[-1]).transpose(1, 2)
        key = x.new_empty(batch, kv_heads, tokens, cos.shape[-1])
        return query, key, torch.empty_like(key)

    operators: tuple[tuple[str, Any, Any], ...] = (
        ("w8a8_linear", linear, _linear_macs),
        ("w8a8_mlp", linear, _mlp_macs),
        ("w8a8_qkv_rope", qkv, _qkv_macs),
    )
    for name, shape, macs in operators:
        torch.library.register_fake(f"assay::{name}", shape)
        register_macs(f"assay::{name}", macs, "linear", "int8")


def _linear_macs(x: Tensor, *_: Any, out: Tensor) -> int:
    return x.numel() * out.shape[-1]


def _mlp_macs(x: Tensor, *rest: Any, out: Tensor) -> int:
    hidden: int = rest[-2]
    return x.numel() * 2 * hidden + out.numel() * hidden


def _qkv_macs(x: Tensor, *_: Any, out: tuple[Tensor, Tensor, Tensor]) -> int:
    return x.shape[-1] * sum(part.numel() for part in out)
