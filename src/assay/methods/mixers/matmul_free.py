"""A language model without matrix products of weights: ternary linear layers and an element-wise recurrence (arXiv 2406.02528).

BitLinear normalises its input (with its own RMSNorm), rounds it to 8 bits per token, and multiplies by weights of -g, 0 and g; the
float weights it is trained with get the gradient as if nothing had been rounded. The MLGRU mixes tokens with a gated recurrence of
one number per channel, a GLU mixes channels. After training, the weights take 2 bits (or 1.6), and products become additions: `pack_`.

    f = beta + (1 - beta) sigmoid(W_f x),  c = SiLU(W_i x),  h_t = f_t h_{t-1} + (1 - f_t) c_t,  y = W_o (sigmoid(W_g x) h)

`variant="as_released"` ends as the official code does: RMSNorm(W_g x) * SiLU(h), where the norm is on the gate. There are no
biases, as released. The lower bounds beta come from one matrix (layers, d) of the model, `MatmulFreeForCausalLM`; a mixer outside
that model has its own row, beta = sigmoid(bound), starting at layer / layers as the matrix does (`our choice`). The released
short convolution, which its models do not use, is left out. `our choice`: products are taken of the integer codes and scaled
afterwards, so that trained and packed model agree to the last bit of the product; norm, codes, products, gates and state are in
float32 at least, even for half-precision models, where sums of codes would overflow (float16) and gates round to 1 (bfloat16).
torch rounds half to even and so do the kernels: a weight of exactly g / 2 becomes 0.

When NOT to use it: to make training cheaper (it uses ordinary matrix products), in half precision without `pack_` (no smaller and
slower than ordinary layers), or by sharding a weight without an all-reduce: g is the mean over the whole matrix.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.modeling_outputs import CausalLMOutputWithPast

from assay import checks
from assay.methods.core import kernels
from assay.methods.core.layers.packed import SMALLEST, Kind, PackedLinear, compiled
from assay.methods.core.layers.surgery import find, swap, tied_names
from assay.methods.core.mixers.model import MixerConfig, MixerForCausalLM, StateCache
from assay.methods.core.mixers.protocol import Mixer, State, channel_mixer, check_positive, mixer, wide_dtype
from assay.paths import atomic_file

Variant = Literal["paper", "as_released"]
NORM_EPS = 1e-8  # of the norm inside each BitLinear
STD = 0.02  # of initial weights


# ---- the layer -------------------------------------------------------------------------------------------------------------------


def ternary_codes(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Codes -1, 0, 1 (out, in), in the weight's dtype, and the scale g = mean|W| (at least 1e-5, a scalar): W ~ g * codes.

    Raises TypeError for whole or complex numbers, ValueError for an empty weight.

    >>> codes, scale = ternary_codes(torch.tensor([[0.9, -0.1, -1.1, 0.1]]))
    >>> codes.tolist(), round(scale.item(), 3)
    ([[1.0, -0.0, -1.0, 0.0]], 0.55)
    """
    checks.tensor("weight", weight)
    scale = weight.abs().mean(dtype=wide_dtype(weight.dtype)).clamp_min(SMALLEST)
    return (weight.to(scale.dtype) / scale).round().clamp(-1, 1).to(weight.dtype), scale


def token_codes(x: Tensor) -> tuple[Tensor, Tensor]:
    """8 bits a token: integer codes -128..127 (..., k) and steps (..., 1), float32 at least: x ~ codes * step.

    Raises TypeError for whole or complex numbers.
    """
    x = checks.tensor("x", x, shape=("...", "values"), empty=True)
    x = x.to(wide_dtype(x.dtype))  # 127 / peak overflows in float16
    peak = x.abs().amax(-1, keepdim=True).clamp_min(SMALLEST)
    return (x * (127.0 / peak)).round().clamp(-128, 127), peak / 127.0


def bit_linear_reference(x: Tensor, norm: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """BitLinear as a chain of ordinary operators on fake-quantised floats: the baseline for the fused form's memory.

    x (..., in), norm (in), weight (out, in). Rounding is x + (rounded x - x) with the bracket detached.
    """
    wide = wide_dtype(x.dtype)
    normed = F.rms_norm(x.to(wide), (x.shape[-1],), norm.to(wide), NORM_EPS)
    codes, step = token_codes(normed)
    rounded = normed + (codes * step - normed).detach()
    ternary, scale = ternary_codes(weight)
    weight = weight.to(wide)
    return F.linear(rounded, weight + (ternary * scale - weight).detach(), None if bias is None else bias.to(wide)).to(
        x.dtype
    )


class _BitProduct(torch.autograd.Function):
    """RMSNorm, rounding and product; keeps x alone for the backward pass, which computes the codes anew."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, norm: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, norm, weight)
        codes, step = token_codes(_normed(x, norm)[0])
        ternary, scale = ternary_codes(weight)
        return (F.linear(codes, ternary.to(codes.dtype)) * (step * scale)).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        (grad,) = grads
        x, norm, weight = ctx.saved_tensors
        y, inverse = _normed(x, norm)
        wide = y.dtype
        dx = dnorm = dweight = None
        if ctx.needs_input_grad[2]:
            codes, step = token_codes(y)
            rounded = codes * step
            dweight = (grad.to(wide).flatten(0, -2).T @ rounded.flatten(0, -2)).to(weight.dtype)
        if ctx.needs_input_grad[0] or ctx.needs_input_grad[1]:
            ternary, scale = ternary_codes(weight)
            dy = (grad.to(wide) @ ternary.to(wide)) * scale
            unit = x.to(wide) * inverse
            dnorm = (dy * unit).flatten(0, -2).sum(0).to(norm.dtype)
            dunit = dy * norm.to(wide)
            dx = ((dunit - unit * (dunit * unit).mean(-1, keepdim=True)) * inverse).to(x.dtype)
        return dx, dnorm, dweight


def _normed(x: Tensor, norm: Tensor) -> tuple[Tensor, Tensor]:
    """RMSNorm in float32 at least, and the inverse of each token's root mean square."""
    wide = x.to(wide_dtype(x.dtype))
    inverse = (wide.square().mean(-1, keepdim=True) + NORM_EPS).rsqrt()
    return wide * inverse * norm.to(wide.dtype), inverse


class BitLinear(nn.Linear):
    """RMSNorm, 8-bit inputs, ternary weights: (..., in) to (..., out). Trains the float `weight` behind them.

    `fused=False` is the chain of ordinary operators, `quantized=False` rounds nothing (norm and an ordinary product: the model of
    floats to compare with). `std` is that of the initial weights. Computed in float32 at least, returned in the dtype of the input.
    Raises ValueError for inputs of another width, TypeError for whole or complex numbers.

    >>> BitLinear(16, 4)(torch.ones(2, 16)).shape
    torch.Size([2, 4])
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = False,
        *,
        quantized: bool = True,
        fused: bool = True,
        std: float = STD,
    ):
        check_positive(in_features=in_features, out_features=out_features)
        for name, value in (("bias", bias), ("quantized", quantized), ("fused", fused)):
            checks.flag(name, value)
        self.std = checks.number("std", std, low=0)
        super().__init__(in_features, out_features, bias)
        self.norm = nn.RMSNorm(in_features, eps=NORM_EPS)
        self.quantized, self.fused = quantized, fused

    def reset_parameters(self) -> None:
        """Normal weights of standard deviation `std`, no bias."""
        nn.init.normal_(self.weight, std=self.std)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    @classmethod
    def from_linear(cls, linear: nn.Linear) -> BitLinear:
        """A BitLinear that trains on from the weights of an ordinary layer, which it shares."""
        layer = cls(linear.in_features, linear.out_features, linear.bias is not None).to(linear.weight)
        layer.weight, layer.bias = linear.weight, linear.bias
        return layer.train(linear.training)

    def forward(self, x: Tensor) -> Tensor:
        checks.tensor("x", x, shape=("...", self.in_features), empty=True)
        if not self.quantized:
            normed = _normed(x, self.norm.weight)[0].to(self.weight.dtype)
            return F.linear(normed, self.weight, self.bias).to(x.dtype)
        if not self.fused:
            return bit_linear_reference(x, self.norm.weight, self.weight, self.bias)
        y = cast(Tensor, _BitProduct.apply(x, self.norm.weight, self.weight))
        return y if self.bias is None else y + self.bias

    def share_of_zeros(self) -> float:
        """The share of weights that round to 0; if it grows towards 1, the layer is dying."""
        return float((ternary_codes(self.weight.detach())[0] == 0).double().mean())

    def packed(self, kind: Kind = "ternary") -> PackedLinear:
        """The layer for inference on packed weights. Raises ValueError for one that is not quantised, or for kind "binary"."""
        if not self.quantized:
            raise ValueError("packing needs a layer with quantized=True, got a layer of floats")
        checks.choice("kind", kind, ("ternary", "base3"))
        codes, scale = ternary_codes(self.weight.detach().float())
        return PackedLinear.from_codes(
            codes, scale, kind, bias=self.bias, norm_weight=self.norm.weight, norm_eps=NORM_EPS
        )


# ---- the recurrence ----------------------------------------------------------------------------------------------------------------


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, f: Tensor, c: Tensor, h0: Tensor) -> Tensor:
        h: Tensor = torch.ops.assay.gated_scan(f, c, h0)
        ctx.save_for_backward(f, h, h0)
        return h

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        found: tuple[Tensor, Tensor, Tensor] = torch.ops.assay.gated_scan_backward(
            grad.contiguous(), *ctx.saved_tensors
        )
        return found


def gated_scan(f: Tensor, c: Tensor, h0: Tensor) -> Tensor:
    """h_t = f_t h_{t-1} + c_t, element by element: f, c (batch, tokens, dim), h0 (batch, dim), all h (batch, tokens, dim).

    On the CPU one pass over memory (compiled, the same sum whatever the chunks); else `parallel_scan`. Computed in float32 at
    least. Which one ran is noted (`kernels.paths`) as "gated scan". No tokens give no states.
    Raises ValueError for shapes that do not fit, TypeError for tensors of whole or complex numbers.

    >>> half, one = torch.full((1, 3, 1), 0.5), torch.ones(1, 3, 1)
    >>> gated_scan(half, one, torch.zeros(1, 1)).flatten().tolist()
    [1.0, 1.5, 1.75]
    """
    checks.tensor("f", f, shape=("batch", "tokens", "dim"), empty=True)
    checks.tensor("c", c, shape=tuple(f.shape), empty=True)
    checks.tensor("h0", h0, shape=(f.shape[0], f.shape[2]), empty=True)
    wide = wide_dtype(f.dtype)
    f, c, h0 = f.to(wide).contiguous(), c.to(wide).contiguous(), h0.to(wide).contiguous()
    if not f.numel():
        return c
    if compiled(f):
        kernels.ran("gated scan", "kernel")
        return cast(Tensor, _Scan.apply(f, c, h0))
    kernels.ran("gated scan", "torch")
    return parallel_scan(f, c, h0)


def parallel_scan(f: Tensor, c: Tensor, h0: Tensor) -> Tensor:
    """The same in about log2(tokens) passes of ordinary operators: pairs (f, c) compose, so distances double."""
    h, decay, distance = c, f, 1
    while distance < f.shape[1]:
        h = torch.cat([h[:, :distance], h[:, distance:] + decay[:, distance:] * h[:, :-distance]], 1)
        decay = torch.cat([decay[:, :distance], decay[:, distance:] * decay[:, :-distance]], 1)
        distance *= 2
    return h + decay * h0[:, None]


def lower_bounds(matrix: Tensor) -> Tensor:
    """beta of all layers from the learnt matrix (layers, d): softmax over the layers, summed up, minus the first row.

    In float32 at least.

    >>> lower_bounds(torch.zeros(4, 1)).flatten().tolist()
    [0.0, 0.25, 0.5, 0.75]
    """
    checks.tensor("matrix", matrix, shape=("layers", "dim"))
    shares = matrix.to(wide_dtype(matrix.dtype)).softmax(0)
    return shares.cumsum(0) - shares[:1]


def rooms(matrix: Tensor) -> Tensor:
    """1 - beta of all layers, without the cancellation that would make it 0 where beta is near 1."""
    shares = matrix.to(wide_dtype(matrix.dtype)).softmax(0)
    above = torch.cat([shares[1:], torch.zeros_like(shares[:1])])
    return shares[:1] + above.flip(0).cumsum(0).flip(0)


@mixer("mlgru")
class MLGRU(Mixer):
    """The MatMul-free gated recurrent unit; see the module docstring.

    `bound` says where beta comes from: "own" (a row of this layer; 0 in layer 0), "model" (handed in by `MatmulFreeForCausalLM`),
    "none" (0). `quantized=False` makes all projections of floats. The state is `dim` float32 numbers a sequence.
    Raises ValueError for an unknown variant or bound.
    """

    def __init__(
        self,
        dim: int,
        *,
        variant: Variant = "paper",
        bound: Literal["own", "model", "none"] = "own",
        quantized: bool = True,
        fused: bool = True,
        layer: int = 0,
        layers: int = 1,
    ):
        super().__init__()
        check_positive(dim=dim, layers=layers)
        checks.choice("variant", variant, get_args(Variant))
        checks.choice("bound", bound, ("own", "model", "none"))
        checks.whole("layer", layer, low=0, high=layers - 1)
        self.dim, self.variant, self.bound_from, self.start = dim, variant, bound, layer / layers
        options: dict[str, Any] = {"quantized": quantized, "fused": fused}
        self.i_proj, self.f_proj, self.g_proj = (BitLinear(dim, dim, **options) for _ in range(3))
        self.o_proj = BitLinear(dim, dim, std=STD * (2 * layers) ** -0.5, **options)
        if variant == "as_released":
            self.g_norm = nn.RMSNorm(dim, eps=1e-6)
        if bound == "own" and layer > 0:
            self.bound = nn.Parameter(torch.empty(dim))
        self.given: Tensor | None = None  # 1 - beta, while the model runs
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """beta starts at layer / layers."""
        if hasattr(self, "bound"):
            nn.init.constant_(self.bound, math.log(self.start / (1 - self.start)))

    def room(self) -> Tensor | None:
        """1 - beta (dim,), None for 1. Raises ValueError where the model should give it and did not."""
        if self.bound_from == "model" and self.given is None:
            raise ValueError("bound 'model' needs a MatmulFreeForCausalLM around the layer; take 'own' elsewhere")
        return (-self.bound.to(wide_dtype(self.bound.dtype))).sigmoid() if hasattr(self, "bound") else self.given

    def beta(self) -> Tensor | None:
        """The lower bound of the forget gate (dim,), None for 0; errors as `room`."""
        room = self.room()
        return None if room is None else 1 - room

    def gates(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """f and (1 - f) * SiLU(W_i x), each (batch, tokens, dim), float32 at least.

        1 - f is computed directly, so that a gate so close to 1 that it rounds to 1 still lets something in.
        """
        raw = self.f_proj(x)
        raw = raw.to(wide_dtype(raw.dtype))
        f, closed, room = raw.sigmoid(), (-raw).sigmoid(), self.room()
        if room is not None:
            room = room.to(raw.dtype)
            f, closed = (1 - room) + room * f, room * closed
        return f, F.silu(self.i_proj(x).to(raw.dtype)) * closed

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.advance(x, self.init_state(len(x), device=x.device, dtype=x.dtype), mask)[0]

    def init_state(self, batch: int, *, device: Any = None, dtype: torch.dtype | None = None) -> State:
        found = next(self.parameters(), None)  # packed layers have none
        if dtype is None:
            dtype = torch.float32 if found is None else found.dtype
        if device is None:
            device = "cpu" if found is None else found.device
        return {"h": torch.zeros(batch, self.dim, device=device, dtype=wide_dtype(dtype))}

    def advance(self, x: Tensor, state: State, mask: Tensor | None = None) -> tuple[Tensor, State]:
        if mask is not None:  # zeros give c = 0, which leaves an empty state empty
            x = x * mask[..., None]
        f, c = self.gates(x)
        h = gated_scan(f, c, state["h"])
        gate = self.g_proj(x)
        mixed = self.g_norm(gate) * F.silu(h) if self.variant == "as_released" else gate.to(h.dtype).sigmoid() * h
        y: Tensor = self.o_proj(mixed.to(x.dtype))
        return y, {"h": h[:, -1]}


@channel_mixer("bit_glu")
class BitGLU(nn.Module):
    """down(SiLU(gate) * up), gate and up being the halves of one BitLinear, which share its scale."""

    def __init__(self, dim: int, hidden: int, *, quantized: bool = True, fused: bool = True, layers: int = 1):
        super().__init__()
        self.gate_up_proj = BitLinear(dim, 2 * hidden, quantized=quantized, fused=fused)
        self.down_proj = BitLinear(hidden, dim, quantized=quantized, fused=fused, std=STD * (2 * layers) ** -0.5)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up_proj(x).chunk(2, -1)
        wide = wide_dtype(
            x.dtype
        )  # the product of two float16 numbers may be beyond float16; the next norm brings it back
        y: Tensor = self.down_proj(F.silu(gate.to(wide)) * up.to(wide))
        return y.to(x.dtype)


# ---- the model ---------------------------------------------------------------------------------------------------------------------

SIZES: dict[str, tuple[int, int]] = {"370m": (24, 1024), "1.3b": (24, 2048), "2.7b": (32, 2560)}  # layers, width


class MatmulFreeConfig(MixerConfig):
    """`num_layers` MLGRU layers of width `hidden_size`, vocabulary `vocab_size`; `variant`, `quantized`, `fused` as in `MLGRU`.

    The GLU's width defaults to 256 * ceil(int(8 d / 3) / 256). Embedding and head are not shared.
    """

    model_type = "assay_matmul_free"

    def __init__(
        self,
        vocab_size: int = 256,
        hidden_size: int = 256,
        num_layers: int = 6,
        intermediate_size: int | None = None,
        variant: Variant = "paper",
        quantized: bool = True,
        fused: bool = True,
        **kwargs: Any,
    ):
        self.num_layers = checks.whole("num_layers", num_layers, low=1)
        self.variant, self.quantized, self.fused = variant, quantized, fused
        if intermediate_size is None:
            intermediate_size = 256 * -(-(8 * hidden_size // 3) // 256)
        options = {"quantized": quantized, "fused": fused}
        layer: list[Any] = ["mlgru", {"variant": variant, "bound": "model", **options}]
        made: dict[str, Any] = {
            "layers": [layer] * self.num_layers,
            "channel_mixer": ["bit_glu", {"layers": self.num_layers, **options}],
        }
        for name, value in made.items():  # a stored config holds them
            if kwargs.pop(name, value) != value:
                raise ValueError(f"{name} must be left out: num_layers, variant, quantized and fused say what it is")
        super().__init__(
            vocab_size=vocab_size,
            hidden_size=hidden_size,
            intermediate_size=intermediate_size,
            **made,
            tie_word_embeddings=kwargs.pop("tie_word_embeddings", False),
            **kwargs,
        )

    @classmethod
    def of_size(cls, size: str, **kwargs: Any) -> MatmulFreeConfig:
        """The paper's sizes: "370m", "1.3b" or "2.7b", vocabulary 32000. Raises ValueError for another."""
        layers, width = SIZES[checks.choice("size", size, SIZES)]
        return cls(**{"vocab_size": 32000, "hidden_size": width, "num_layers": layers, **kwargs})


class MatmulFreeForCausalLM(MixerForCausalLM):
    """The whole model. It owns the matrix of lower bounds, and its head is a BitLinear. Arguments and errors are its base class's."""

    config_class: Any = MatmulFreeConfig
    _tied_weights_keys = {}

    def __init__(self, config: MatmulFreeConfig):
        if config.tie_word_embeddings:
            raise ValueError("tie_word_embeddings must be False: the head is ternary, the embedding is not")
        super().__init__(config)
        self.lm_head = BitLinear(config.hidden_size, config.vocab_size, quantized=config.quantized, fused=config.fused)
        for layer in self.modules():
            if isinstance(layer, BitLinear):
                layer.std *= config.initializer_range / STD
                layer.reset_parameters()
        self.lower_bounds = nn.Parameter(torch.zeros(config.num_layers, config.hidden_size))

    def optimizer_options(self) -> dict[str, dict[str, float]]:
        """No weight decay on the lower bounds."""
        return {"lower_bounds": {"weight_decay": 0.0}}

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
        mixers: list[Any] = [block.mixer for block in self.blocks]
        for each, room in zip(mixers, rooms(self.lower_bounds), strict=True):
            each.given = room
        try:
            return super().forward(input_ids, attention_mask, cache, labels, use_cache, logits_to_keep, **kwargs)
        finally:  # not a leaf: must not be copied or stored with the model
            for each in mixers:
                each.given = None


AutoConfig.register("assay_matmul_free", MatmulFreeConfig, exist_ok=True)
AutoModelForCausalLM.register(MatmulFreeConfig, MatmulFreeForCausalLM, exist_ok=True)


# ---- applying and packing ------------------------------------------------------------------------------------------------------------


def quantize_(model: nn.Module, *, include: tuple[str, ...] = ("*",), exclude: tuple[str, ...] = ()) -> nn.Module:
    """Replace the `nn.Linear` layers of any model by BitLinears that train on from their weights, in place.

    Patterns as in `surgery.find`. Layers whose weight is tied to another's (a head that is the embedding) stay as they are.
    Train afterwards: rounding alone breaks a model. Raises ValueError where nothing is left to replace.
    """
    layers = find(model, [nn.Linear], include=include, exclude=exclude)
    free = {name: layer for name, layer in layers.items() if len(tied_names(model, cast(Any, layer).weight)) == 1}
    if not free:
        raise ValueError(f"model has no nn.Linear with a weight of its own among include={include}, exclude={exclude}")
    swap(model, {name: BitLinear.from_linear(cast(nn.Linear, layer)) for name, layer in free.items()})
    return model


def pack_(model: nn.Module, kind: Kind = "ternary") -> nn.Module:
    """Replace every BitLinear by its packed form, in place, for inference: "ternary" (2 bits) or "base3" (1.6 bits, more work).

    Raises ValueError for a model without any, or for layers of floats.
    """
    layers = find(model, [BitLinear])
    if not layers:
        raise ValueError("model has no BitLinear to pack")
    swap(model, {name: cast(BitLinear, layer).packed(kind) for name, layer in layers.items()})
    return model.eval()


def save_packed(model: MatmulFreeForCausalLM, path: Path | str) -> None:
    """Write a packed model as one safetensors file, its configuration in the header. Raises ValueError for one not packed."""
    from safetensors.torch import save_file

    if not isinstance(model.lm_head, PackedLinear):
        raise ValueError("model must be packed (pack_) before it is saved packed")
    header = {"kind": model.lm_head.kind, "config": json.dumps(model.config.to_diff_dict())}
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    with atomic_file(path) as temporary:
        save_file(tensors, temporary, metadata=header)


def load_packed(path: Path | str) -> MatmulFreeForCausalLM:
    """The model that `save_packed` wrote, ready to generate; float weights are never made."""
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        header = file.metadata() or {}
        if not {"kind", "config"} <= set(header):
            raise ValueError(f"path must be a file written by save_packed, got {path}")
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (no mapping)
    if header["kind"] not in ("ternary", "base3"):
        raise ValueError(f"path holds the unknown kind {header['kind']!r}")
    kind = cast(Kind, header["kind"])
    config = MatmulFreeConfig.from_dict(json.loads(header["config"]))
    with torch.device("meta"):
        model = MatmulFreeForCausalLM(config)
        empty = {
            name: PackedLinear(layer.in_features, layer.out_features, kind, scales="tensor", norm_eps=NORM_EPS)
            for name, layer in cast(dict[str, Any], find(model, [BitLinear])).items()
        }
        swap(model, empty)
    model.load_state_dict(tensors, assign=True)
    return model.eval()


# ---- what it would cost in hardware ----------------------------------------------------------------------------------------------------

ENERGY_PJ = {  # picojoules an operation at 45 nm, Horowitz, ISSCC 2014
    "int8 add": 0.03,
    "int32 add": 0.1,
    "int8 multiply": 0.2,
    "fp16 add": 0.4,
    "fp16 multiply": 1.1,
    "fp32 add": 0.9,
    "fp32 multiply": 3.7,
}


@dataclass(frozen=True)
class Operations:
    """Operations of a model's BitLinear layers for one token, modelled: a sum of 8-bit inputs runs in int32."""

    int32_additions: int  # one a weight that is not 0
    fp32_multiplications: int  # norm and rounding of inputs, scaling of outputs
    float_macs: int  # what float layers of the same shapes take: one multiplication and one addition each

    @property
    def energy_pj(self) -> float:
        """Of the BitLinear layers' arithmetic, picojoules by `ENERGY_PJ`."""
        return self.int32_additions * ENERGY_PJ["int32 add"] + self.fp32_multiplications * ENERGY_PJ["fp32 multiply"]

    @property
    def float_energy_pj(self) -> float:
        """Of the float layers in fp16."""
        return self.float_macs * (ENERGY_PJ["fp16 add"] + ENERGY_PJ["fp16 multiply"])


def operations(model: nn.Module) -> Operations:
    """What the BitLinear layers (packed or not) of a model do for one token. Arithmetic only: moving data costs more."""
    additions = multiplications = macs = 0
    for layer in model.modules():
        if isinstance(layer, PackedLinear):
            codes = layer.codes()
        elif isinstance(layer, BitLinear):
            codes = ternary_codes(layer.weight.detach())[0]
        else:
            continue
        additions += int(codes.count_nonzero())
        multiplications += 3 * layer.in_features + layer.out_features
        macs += codes.numel()
    return Operations(additions, multiplications, macs)
