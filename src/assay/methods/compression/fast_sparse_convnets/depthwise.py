"""Depthwise convolutions that keep activations channels first, as the sparse product wants them."""

from __future__ import annotations

import math
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from assay import checks
from assay.measure.cost import register_macs
from assay.methods.compression.fast_sparse_convnets.folding import module_places, taken_in
from assay.methods.core import kernels
from assay.methods.core.layers.surgery import find, refuse_saving, swap

STRIDES = (1, 2)
FLOATS = (torch.float32, torch.bfloat16, torch.float16)

_ready: bool | None = None  # whether the compiled kernel serves; None until first asked


class DepthwiseConv3x3(nn.Module):
    """A 3 x 3 depthwise convolution with padding 1, bias and clamp: (batch, c, height, width) to (batch, c, ...), channels first.

    `weight` is (c, 1, 3, 3), `stride` 1 or 2; both tensors are kept as buffers. On a CPU with a compiler our kernel runs, in
    float32 whatever the dtype of the input; elsewhere, and where gradients are wanted, torch's convolution. Not for channels-last models:
    there torch's own needs no change of layout. Raises TypeError or ValueError for weights, strides and inputs of another form.

    >>> DepthwiseConv3x3(torch.zeros(4, 1, 3, 3), torch.ones(4), stride=2)(torch.zeros(1, 4, 5, 7)).shape
    torch.Size([1, 4, 3, 4])
    """

    weight: Tensor
    bias: Tensor | None

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None = None,
        *,
        stride: int = 1,
        low: float = -math.inf,
        high: float = math.inf,
    ):
        super().__init__()
        checks.tensor("weight", weight, shape=("channels", 1, 3, 3), finite=True)
        if bias is not None:
            checks.tensor("bias", bias, shape=(len(weight),), finite=True)
        if not low <= high:
            raise ValueError(f"low must be at most high, got {low} and {high}")
        self.stride = checks.choice("stride", stride, STRIDES)
        self.low, self.high = float(low), float(high)
        self.register_buffer("weight", weight.detach().clone().contiguous())
        self.register_buffer("bias", None if bias is None else bias.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        channels = len(self.weight)
        if x.dtype not in FLOATS:
            raise TypeError(f"x must be float32, bfloat16 or float16, got {x.dtype}")
        if x.ndim != 4 or x.shape[1] != channels:
            raise ValueError(f"x must be (batch, {channels}, height, width), got shape {tuple(x.shape)}")
        if not x.numel() or not _serves(x):
            kernels.ran("depthwise convolution", "torch")
            shift = None if self.bias is None else self.bias.to(x.dtype)
            y = F.conv2d(x, self.weight.to(x.dtype), shift, self.stride, 1, 1, channels)
            return y if self.low == -math.inf and self.high == math.inf else y.clamp(self.low, self.high)
        kernels.ran("depthwise convolution", "kernel")
        bias = None if self.bias is None else self.bias.float()
        taps = self.weight.float().flatten(1)
        y = cast(
            Tensor, torch.ops.assay.depthwise(x.float().contiguous(), taps, bias, self.stride, self.low, self.high)
        )
        return y.to(x.dtype)

    def extra_repr(self) -> str:
        return f"{len(self.weight)}, stride={self.stride}, bias={self.bias is not None}, clamp=({self.low:g}, {self.high:g})"


def channels_first_(model: nn.Module) -> list[str]:
    """Replace 3 x 3 depthwise convolutions (padding 1, stride 1 or 2) by `DepthwiseConv3x3`, in place; returns their names.

    In an `nn.Sequential` a BatchNorm2d and a ReLU or ReLU6 that follow are taken in, as `sparsify_` does it. The model must be in
    evaluation mode (ValueError); its `save_pretrained` is refused afterwards. Masks of `torch.nn.utils.prune` go with the layer.
    """
    if model.training:
        raise ValueError("model must be in evaluation mode, or its batch norms cannot be folded: call eval() first")
    places, modules = module_places(model), dict[str, nn.Module]()
    names = [name for name, layer in find(model, (nn.Conv2d,)).items() if _depthwise(layer)]
    for name in names:
        layer = cast(Any, model.get_submodule(name))
        weight, bias, low, high, others = taken_in(model, name, places)
        modules[name] = DepthwiseConv3x3(weight, bias, stride=layer.stride[0], low=low, high=high)
        modules |= others
    swap(model, modules)
    if names:
        refuse_saving(model)
    return names


def _depthwise(layer: nn.Module) -> bool:
    conv = cast(Any, layer)
    return (
        conv.groups == conv.in_channels == conv.out_channels
        and conv.kernel_size == (3, 3)
        and conv.padding == (1, 1)
        and conv.padding_mode == "zeros"
        and conv.dilation == (1, 1)
        and conv.stride in ((1, 1), (2, 2))
    )


def _serves(x: Tensor) -> bool:
    if _ready is None:
        _prepare()
    return bool(_ready) and x.device.type == "cpu" and not (torch.is_grad_enabled() and x.requires_grad)


def _prepare() -> None:
    global _ready
    _ready = kernels.load("depthwise")
    if _ready:
        torch.library.register_fake("assay::depthwise", _shape)


def _shape(x: Tensor, weight: Tensor, bias: Any, stride: int, *_: Any) -> Tensor:
    """Only the shape of the result, for torch.compile."""
    return x.new_empty(x.shape[0], x.shape[1], (x.shape[2] - 1) // stride + 1, (x.shape[3] - 1) // stride + 1)


def _macs(x: Tensor, *_: Any, out: Tensor) -> int:
    return 9 * out.numel()


register_macs("assay::depthwise", _macs, "linear")
