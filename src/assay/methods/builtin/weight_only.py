"""Weight-only quantisation: linear layers whose weights are kept as 4- or 8-bit codes with a scale per 32 inputs.

Decoding one token reads every weight once and does next to nothing with it, so its time is the bytes of the weights: int4 with a
scale and a minimum per 32 weights takes 5 bits a weight, int8 8.5, bfloat16 16. The products run on the codes themselves: inputs
are quantised on the fly to int8 with one scale per 32 values, so that the processor's byte dot product serves.

When NOT to use it: where the processor lacks a byte dot product (VNNI) prompts get slower, not faster; and 4 bits cost quality on
most models. The bundled SmolLM2 is an exception worth knowing: its file stores 4-bit codes with a scale and a minimum per 32
inputs, the very grid used here, so its weights come through int4 unchanged and only the rounding of the inputs is lost. Its good
figures at 4 bits say nothing about a model whose weights were never on such a grid: measure that one. The projection onto the
vocabulary is best kept at 8 bits; at 4 it costs this model several per cent of perplexity.

The kernels are our choice; the grid (`core/quantize/groups.py`) is the one of llama.cpp's Q4_1 and Q8_0. GPT-2's transposed
`Conv1D` and the fused experts of a mixture are linear layers like any other here.

    >>> import torch
    >>> layer = WeightOnlyLinear.from_linear(torch.nn.Linear(64, 48), bits=4)
    >>> layer(torch.randn(2, 5, 64)).shape
    torch.Size([2, 5, 48])
    >>> layer.packed.numel()  # bytes; the float32 weight took 12288
    2560
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from assay import checks
from assay.measure.cost import register_macs
from assay.methods.core import kernels
from assay.methods.core.layers.linears import left_alone, linears, open_, put, settle, share
from assay.methods.core.layers.stand_in import Casting, stand_in
from assay.methods.core.layers.surgery import output_layer, page_out, refuse_saving, untie
from assay.methods.core.quantize.formats import FORMATS, PANEL, Format
from assay.methods.core.quantize.groups import GROUP, quantize_inputs, row_gain
from assay.methods.transform import LEAST_SHARE, Effect, Fit, TuneContext, only

WIDTHS = (4, 8)


class WeightOnlyLinear(Casting, nn.Module):
    """A linear layer (in -> out) on packed codes: y = quantised(x) @ dequantised(W)^T + bias, in the dtype of x.

    `bits` is 4 (asymmetric) or 8 (symmetric), both with groups of 32 inputs. Takes any leading shape. Where x needs a gradient
    the inputs are not rounded and the weights are expanded, so that gradients reach x (never the weights). Without the compiled
    kernel the same arithmetic runs in torch on expanded weights: right, but slower than an ordinary layer.

    `gain` holds a power of two for each output where the weights of some are too small or too large for float16 scales, else it
    is None. `weight` has the shape and dtype of the dense weight, and builds it when its numbers are needed.
    """

    packed: Tensor
    gain: Tensor | None

    def __init__(self, in_features: int, out_features: int, bits: int, *, bias: bool = False) -> None:
        super().__init__()
        self.in_features = checks.whole("in_features", in_features, low=1)
        self.out_features = checks.whole("out_features", out_features, low=1)
        self.bits = checks.choice("bits", bits, WIDTHS)
        self.dtype = torch.get_default_dtype()
        self.format.check(in_features)
        panels = -(-out_features // PANEL)
        size = self.format.bytes(out_features, in_features)
        self.register_buffer("packed", torch.zeros(panels, size // panels, dtype=torch.uint8))
        self.register_buffer("gain", None)
        self.bias = nn.Parameter(torch.zeros(out_features)) if bias else None

    @property
    def kind(self) -> str:
        """The name of its format."""
        return f"int{self.bits}"

    @property
    def format(self) -> Format:
        return FORMATS[self.kind]

    @classmethod
    def from_linear(cls, linear: nn.Linear, bits: int) -> WeightOnlyLinear:
        """The quantised form of an `nn.Linear`; its bias is shared, its weight is not kept. Raises ValueError for NaN or infinity."""
        bits = checks.choice("bits", bits, WIDTHS)
        FORMATS[f"int{bits}"].check(linear.in_features)
        weight = linear.weight.detach()
        gain = row_gain(weight)
        scaled = weight if gain is None else (weight.double() / gain[:, None]).float()
        packed = FORMATS[f"int{bits}"].pack(scaled)["packed"]
        layer = cls.from_packed(packed, linear.in_features, linear.out_features, bits, gain=gain)
        layer.bias, layer.dtype = linear.bias, linear.weight.dtype
        return layer.train(linear.training)

    @classmethod
    def from_packed(
        cls, packed: Tensor, in_features: int, out_features: int, bits: int, *, gain: Tensor | None = None
    ) -> WeightOnlyLinear:
        """A layer on codes that are packed already (`formats`); the storage is shared. It has no bias."""
        with torch.device("meta"):
            layer = cls(in_features, out_features, bits)
        if packed.dtype != torch.uint8 or packed.shape != layer.packed.shape:
            raise ValueError(
                f"packed must be uint8 {tuple(layer.packed.shape)}, got {packed.dtype} {tuple(packed.shape)}"
            )
        layer.packed, layer.gain = packed, gain
        return layer

    @property
    def weight(self) -> Tensor:
        """The dense weight (out, in), made when its numbers are wanted; nothing learns by changing it."""
        return stand_in((self.out_features, self.in_features), self.dtype, self.packed.device, self.dequantize)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> WeightOnlyLinear:
        """`model.to(bfloat16)` casts the bias and leaves codes and gain as they are."""
        gain = self.gain
        super()._apply(fn, recurse)
        self.follow(fn)
        if gain is not None and not gain.is_meta:
            self.gain = gain.to(self.packed.device)
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        saved = state_dict.get(f"{prefix}gain")
        self.gain = None if saved is None else torch.empty_like(saved, device=self.packed.device)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def dequantize(self) -> Tensor:
        """The float32 weights (out, in) this layer stands for."""
        dense = self.format.unpack({"packed": self.packed}, self.out_features, self.in_features)
        return dense if self.gain is None else dense * self.gain[:, None]

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-1] != self.in_features:
            raise ValueError(f"x must have {self.in_features} values in its last dimension, got {tuple(x.shape)}")
        if torch.is_grad_enabled() and x.requires_grad:
            return F.linear(x, self.dequantize().to(x.dtype), self.bias)
        if x.device.type == "cpu" and kernels.load("weight_only"):
            kernels.ran("weight-only linear", "kernel")
            rows = x.reshape(-1, self.in_features)
            if self.gain is not None or rows.dtype not in (torch.float32, torch.bfloat16):
                rows = rows.float()
            y: Tensor = torch.ops.assay.weight_only_linear(rows, self.packed, self.format.id, self.out_features)
            y = y if self.gain is None else y * self.gain
            y = y.view(*x.shape[:-1], self.out_features).to(x.dtype)
        else:
            kernels.ran("weight-only linear", "torch")
            y = F.linear(quantize_inputs(x), self.dequantize()).to(x.dtype)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bits={self.bits}, group={GROUP}"


# ---- the transform ---------------------------------------------------------------------------------------------------------------


class WeightOnly:
    """Replaces every linear layer with a multiple of 32 inputs by a `WeightOnlyLinear`: `nn.Linear`, Conv1D, fused experts.

    Configuration: `bits` 4 or 8; `head_bits` 4, 8 or None for the output projection onto the vocabulary. Where that one shares
    its weights with the input embedding the embedding stays as it is, so quantising the head reads fewer bytes per token but adds
    to the memory: None suits the goal `memory`.

    `from_pretrained` knows no packed weights and draws new ones in their place: save a model before this is applied, and apply it
    again after loading. A state dict loads into a model of the same configuration.
    """

    name = "weight_only"
    slot = "linear"
    goals = frozenset({"decode", "memory"})
    exact = False

    def applies_to(self, model: nn.Module, context: TuneContext) -> Fit:
        found = _eligible(model)
        if not found:
            return Fit(False, "no linear layer with a multiple of 32 inputs")
        if any(parameter.device.type != "cpu" for parameter in model.parameters()):
            return Fit(False, "the packed kernels run on the CPU only")
        if not kernels.load("weight_only"):
            return Fit(False, "the packed kernels need a C++ compiler (g++) on x86-64")
        part, rest = share(model, found), left_alone(model, found)
        if not part >= LEAST_SHARE:
            return Fit(False, f"it reaches {part:.0%} of the weights only: {rest}", share=part, reached=rest)
        size = next(model.parameters()).element_size()
        bytes_ = part * 0.625 / size + 1 - part
        return Fit(True, effects=(Effect("linear", bytes=bytes_, dtype="int8"),), share=part, reached=rest)

    def configs(self, model: nn.Module, context: TuneContext) -> list[dict[str, Any]]:
        head = None if context.goal == "memory" and _tied(model) else 8
        return [{"bits": 4, "head_bits": head}, {"bits": 8, "head_bits": head}]

    def check(self, config: Mapping[str, Any]) -> None:
        """Raises ValueError or TypeError naming the setting that is wrong."""
        only(config, ("bits", "head_bits"))
        checks.choice("bits", config.get("bits", 4), WIDTHS)
        checks.choice("head_bits", config.get("head_bits", 8), (*WIDTHS, None))

    def apply(self, model: nn.Module, config: Mapping[str, Any], context: TuneContext) -> nn.Module:
        """Raises TypeError or ValueError, before anything is changed, for a configuration or a model it does not fit."""
        self.check(config)
        bits, head_bits = config.get("bits", 4), config.get("head_bits", 8)
        found = _eligible(model)
        if not found:
            raise ValueError("model has no linear layer with a multiple of 32 inputs")
        if not (part := share(model, found)) >= LEAST_SHARE:
            raise ValueError(
                f"model must let half of its weights be reached, got {part:.0%}: {left_alone(model, found)}"
            )
        head = output_layer(model)
        widths = {name: head_bits if linear is head else bits for name, linear in found.items()}
        for name, linear in found.items():
            if widths[name] is not None and not bool(torch.isfinite(linear.weight).all()):
                raise ValueError(f"the weight of {name} must be finite, got inf or NaN")
            page_out(linear.weight)
        open_(model)
        for name in found:
            if (width := widths[name]) is not None:
                layer = cast(nn.Linear, model.get_submodule(name))
                put(model, name, WeightOnlyLinear.from_linear(layer, width))
                page_out(layer.weight)
        untie(settle(model))
        return refuse_saving(model)

    def describe(self, config: Mapping[str, Any]) -> str:
        bits, head = config.get("bits", 4), config.get("head_bits", 8)
        output = "the output layer as it is" if head is None else f"{head}-bit in the output layer"
        return f"{bits}-bit weights" if head == bits else f"{bits}-bit weights, {output}"


def _eligible(model: nn.Module) -> dict[str, nn.Linear]:
    return {name: linear for name, linear in linears(model).items() if linear.in_features % GROUP == 0}


def _tied(model: nn.Module) -> bool:
    head, getter = output_layer(model), getattr(model, "get_input_embeddings", None)
    return head is not None and getter is not None and getattr(head, "weight", None) is getter().weight


def _macs(x: Tensor, *_: Any, out: Tensor) -> int:
    return x.numel() * out.shape[-1]


register_macs("assay::weight_only_linear", _macs, "linear")
transform = WeightOnly()
