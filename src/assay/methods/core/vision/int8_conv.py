"""Convolutions in 8 bits: weights of every output channel and inputs of every layer as whole numbers, products by oneDNN.

    model = quantize_convolutions(model.eval(), batches)      # in place; inputs' ranges are taken from real pictures

    y = s_x s_w[n] sum (x_q - z) w_q[n] + bias[n],   x_q = round(x / s_x) + z

Weights are symmetric (-127 to 127), inputs asymmetric with one scale for a layer, found by running the model on pictures. On a
processor without VNNI the products of two neighbours are added in 16 bits, which full ranges overflow: inputs then have 7 bits.

When not to use it: networks of depthwise convolutions whose ranges differ by hundreds from channel to channel (MobileNets that were
not trained for it), and processors without 8-bit products, where it is hardly faster. What it costs in accuracy has to be measured.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WEIGHT_MOST = 127
CLIPPED = 1e-4  # share of a layer's inputs that may lie outside of its range, half at each end; our choice
OF_A_CONVOLUTION = (
    "in_channels",
    "out_channels",
    "kernel_size",
    "stride",
    "padding",
    "dilation",
    "groups",
    "padding_mode",
)
SAMPLED = 1 << 16  # values of a batch that a layer's range is estimated from


class Int8Conv2d(nn.Module):
    """A convolution whose products are of whole numbers: (B, C, H, W) to (B, N, H', W') in the dtype of its input. For inference.

    Made by `from_float`. `forward` refuses gradients. Weights are packed once for oneDNN; `reference` computes the same from the codes
    in float64, which is what a test holds `forward` against.
    """

    codes: Tensor
    scales: Tensor
    bias: Tensor | None

    def __init__(self, conv: nn.Conv2d, low: float, high: float) -> None:
        super().__init__()
        weight = conv.weight.detach().float()
        largest = weight.abs().amax((1, 2, 3))
        scales = torch.where(largest > 0, largest, 1.0) / WEIGHT_MOST
        self.register_buffer("scales", scales)
        self.register_buffer(
            "codes", (weight / scales[:, None, None, None]).round().clamp(-WEIGHT_MOST, WEIGHT_MOST).to(torch.int8)
        )
        self.register_buffer("bias", None if conv.bias is None else conv.bias.detach().float().clone())
        low, high = min(low, 0.0), max(high, 0.0)  # padding is an exact zero
        levels = input_levels()
        self.input_scale = max(high - low, 1e-8) / levels
        self.input_zero = min(max(round(-low / self.input_scale), 0), levels)
        self.levels = levels
        for name in OF_A_CONVOLUTION:  # models read them: MobileNetV2 pads by them
            setattr(self, name, getattr(conv, name))
        self._packed: Tensor | None = None

    @property
    def geometry(self) -> tuple[Any, ...]:
        """Stride, padding, dilation and groups, as oneDNN takes them."""
        own: Any = self
        return list(own.stride), list(own.padding), list(own.dilation), own.groups

    def rounded(self, x: Tensor) -> Tensor:
        """The codes of an input, uint8 in channels-last memory."""
        codes = torch.clamp(torch.round(x.float() / self.input_scale) + self.input_zero, 0, self.levels)
        return codes.to(torch.uint8).contiguous(memory_format=torch.channels_last)

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled() and x.requires_grad:
            raise RuntimeError(
                "an int8 convolution is for inference: run it under torch.no_grad() or torch.inference_mode()"
            )
        ops: Any = torch.ops.onednn
        zeros = torch.zeros(len(self.scales), dtype=torch.int32)
        if self._packed is None:
            self._packed = ops.qconv_prepack(
                self.codes, self.scales, self.input_scale, self.input_zero, *self.geometry, list(x.shape)
            )
        y: Tensor = ops.qconv_pointwise(
            self.rounded(x), self.input_scale, self.input_zero, self._packed, self.scales, zeros, self.bias, *self.geometry,
            1.0, 0, torch.float32, "none", [], "",
        )  # fmt: skip
        return y.to(x.dtype)

    def reference(self, x: Tensor) -> Tensor:
        """The same in float64."""
        codes = self.rounded(x).double() - self.input_zero
        weight = self.codes.double() * self.scales.double()[:, None, None, None]
        bias = None if self.bias is None else self.bias.double()
        stride, padding, dilation, groups = self.geometry
        return F.conv2d(codes * self.input_scale, weight, bias, stride, padding, dilation, groups)

    def __deepcopy__(self, memo: dict[int, Any]) -> Int8Conv2d:
        """A packed weight cannot be copied: the copy packs its own."""
        twin = self.__class__.__new__(self.__class__)
        memo[id(self)] = twin
        nn.Module.__init__(twin)
        for name, buffer in self._buffers.items():
            twin.register_buffer(name, None if buffer is None else buffer.clone())
        own = ("input_scale", "input_zero", "levels", *OF_A_CONVOLUTION)
        twin.__dict__.update({name: self.__dict__[name] for name in own}, _packed=None)
        return twin.train(self.training)

    def extra_repr(self) -> str:
        own: Any = self
        return (
            f"{own.in_channels}, {own.out_channels}, kernel_size={own.kernel_size}, input_scale={self.input_scale:.3g}"
        )


def why_not() -> str:
    """Why convolutions in 8 bits cannot be computed here; "" where they can."""
    if not hasattr(torch.ops.onednn, "qconv_pointwise"):
        return "this build of torch has no 8-bit convolutions (oneDNN)"
    return ""


@functools.cache
def input_levels() -> int:
    """The largest code of an input: 255, or 127 on processors that add products in 16 bits."""
    capable: Any = torch.cpu
    return 255 if capable._is_vnni_supported() else 127


def convolutions(model: nn.Module) -> dict[str, nn.Conv2d]:
    """The convolutions that can be replaced: plain `nn.Conv2d` with zero padding given in numbers, in float32 or bfloat16."""
    return {
        name: module
        for name, module in model.named_modules()
        if type(module) is nn.Conv2d
        and module.padding_mode == "zeros"
        and not isinstance(module.padding, str)
        and not module._forward_hooks
        and not module._forward_pre_hooks
    }


@torch.no_grad()
def quantize_convolutions(model: nn.Module, batches: Sequence[Tensor]) -> nn.Module:
    """Replace a model's convolutions by `Int8Conv2d`, in place; their inputs' ranges are those seen on `batches` of real pictures.

    A layer that never ran keeps its float weights, and so does one whose inputs were not finite. Raises ValueError for a model in
    training mode, no batches, or where nothing can be replaced; RuntimeError where this build of torch cannot compute it.
    """
    if reason := why_not():
        raise RuntimeError(reason)
    if model.training:
        raise ValueError("model must be in eval mode")
    if not batches:
        raise ValueError("batches must hold at least one batch of pictures, got none")
    found = convolutions(model)
    if not found:
        raise ValueError("model has no plain nn.Conv2d to replace")
    ranges = input_ranges(model, found, batches)
    for name, (low, high) in ranges.items():
        model.set_submodule(name, Int8Conv2d(found[name], low, high))
    return model


def input_ranges(
    model: nn.Module, layers: dict[str, nn.Conv2d], batches: Sequence[Tensor]
) -> dict[str, tuple[float, float]]:
    """The range of each layer's inputs over the batches: the mean of the batches' quantiles, a ten-thousandth left out."""
    seen: dict[str, list[tuple[float, float]]] = {}
    hooks = []

    def watch(name: str) -> Any:
        def hook(module: nn.Module, given: tuple[Any, ...]) -> None:
            flat = given[0].detach().float().flatten()
            flat = flat[:: max(len(flat) // SAMPLED, 1)]
            if bool(torch.isfinite(flat).all()) and len(flat):
                low, high = torch.quantile(flat, torch.tensor([CLIPPED / 2, 1 - CLIPPED / 2])).tolist()
                seen.setdefault(name, []).append((low, high))

        return hook

    for name, layer in layers.items():
        hooks.append(layer.register_forward_pre_hook(watch(name)))
    try:
        for batch in batches:
            model(batch)
    finally:
        for handle in hooks:
            handle.remove()
    return {
        name: (sum(low for low, _ in found) / len(found), sum(high for _, high in found) / len(found))
        for name, found in seen.items()
    }
