"""Linear layers and convolutions whose forward and backward pass are the emulated products, put in the place of torch's."""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from assay import checks
from assay.methods.compression.reduced_precision_odl.numerics import NumericsPolicy, matmul
from assay.methods.core.layers.surgery import find, swap

Pair = tuple[int, int]


def im2col(x: Tensor, kernel: Pair, stride: Pair, padding: tuple[int, int, int, int]) -> Tensor:
    """The patches of `x` (batch, channels, height, width): (batch, channels, kernel values, places), zeros outside.

    `padding` is left, right, top, bottom; a negative one cuts off. A copy and no arithmetic, so that it is exact in every dtype.
    """
    padded = F.pad(x, padding)
    patches = padded.unfold(2, kernel[0], stride[0]).unfold(3, kernel[1], stride[1])
    return patches.permute(0, 1, 4, 5, 2, 3).flatten(4).flatten(2, 3)


def _grouped(x: Tensor, groups: int) -> Tensor:
    """(batch, channels, kernel values, places) as (batch, groups, a group's channels times kernel values, places)."""
    return x.unflatten(1, (groups, -1)).flatten(2, 3)


def weight_gradient(given: Tensor, columns: Tensor, policy: NumericsPolicy) -> Tensor:
    """gW = gy x^T of each group, the pictures of a batch one after another in the sum.

    `given` (batch, groups, outputs, places) and `columns` (batch, groups, inputs, places) give (groups, outputs, inputs).
    """
    rows = given.permute(1, 2, 0, 3).flatten(2)
    return matmul(rows, columns.permute(1, 0, 3, 2).flatten(1, 2), policy)


def _bias_gradient(rows: Tensor, policy: NumericsPolicy) -> Tensor:
    """The sum of each of `rows` (outputs, terms), rounded as the products are."""
    return matmul(rows, rows.new_ones(rows.shape[-1], 1), policy)[:, 0]


class _Linear(torch.autograd.Function):
    """Gradients of gradients are refused."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, policy: NumericsPolicy) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.policy, ctx.has_bias = policy, bias is not None
        out = matmul(x.reshape(-1, x.shape[-1]), weight.T, policy)
        return (out if bias is None else out + bias).reshape(*x.shape[:-1], len(weight))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        given, rows = gradients[0].reshape(-1, len(weight)), x.reshape(-1, x.shape[-1])
        wanted = ctx.needs_input_grad
        to_x = matmul(given, weight, ctx.policy).reshape(x.shape) if wanted[0] else None
        to_weight = matmul(given.T, rows, ctx.policy) if wanted[1] else None
        to_bias = _bias_gradient(given.T, ctx.policy) if ctx.has_bias and wanted[2] else None
        return to_x, to_weight, to_bias, None


class _Convolution(torch.autograd.Function):
    """Gradients of gradients are refused."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        stride: Pair,
        padding: Pair,
        groups: int,
        policy: NumericsPolicy,
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.settings, ctx.has_bias = (stride, padding, groups, policy), bias is not None
        kernel = (weight.shape[2], weight.shape[3])
        height, width = _out_sizes(x, kernel, stride, padding)
        columns = _grouped(im2col(x, kernel, stride, _around(padding)), groups)
        out = matmul(weight.flatten(1).unflatten(0, (groups, -1)), columns, policy).flatten(1, 2)
        return (out if bias is None else out + bias[:, None]).unflatten(-1, (height, width))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        stride, padding, groups, policy = ctx.settings
        kernel = (weight.shape[2], weight.shape[3])
        given = gradients[0]
        flat = given.flatten(2).unflatten(1, (groups, -1))  # (batch, groups, outputs, places)
        wanted = ctx.needs_input_grad
        to_x = _input_gradient(given, x, weight, stride, padding, groups, policy) if wanted[0] else None
        to_weight: Tensor | None = None
        if wanted[1]:
            columns = _grouped(im2col(x, kernel, stride, _around(padding)), groups)
            to_weight = weight_gradient(flat, columns, policy).flatten(0, 1).reshape(weight.shape)
        to_bias = _bias_gradient(given.transpose(0, 1).flatten(1), policy) if ctx.has_bias and wanted[2] else None
        return to_x, to_weight, to_bias, None, None, None, None


def _around(padding: Pair) -> tuple[int, int, int, int]:
    return padding[1], padding[1], padding[0], padding[0]


def _out_sizes(x: Tensor, kernel: Pair, stride: Pair, padding: Pair) -> Pair:
    height, width = ((x.shape[2 + i] + 2 * padding[i] - kernel[i]) // stride[i] + 1 for i in (0, 1))
    return height, width


def _input_gradient(
    given: Tensor, x: Tensor, weight: Tensor, stride: Pair, padding: Pair, groups: int, policy: NumericsPolicy
) -> Tensor:
    """im2col of the output's gradient, spread out with zeros between by the stride, times the weights turned round.

    Inputs and outputs of a group change places and the kernel is flipped both ways (the library's block transpose).
    """
    kernel = (weight.shape[2], weight.shape[3])
    spread_sizes = [(given.shape[2 + i] - 1) * stride[i] + 1 for i in (0, 1)]
    spread = given.new_zeros(*given.shape[:2], *spread_sizes)
    spread[:, :, :: stride[0], :: stride[1]] = given
    before = [kernel[i] - 1 - padding[i] for i in (0, 1)]
    after = [x.shape[2 + i] + padding[i] - spread_sizes[i] for i in (0, 1)]
    columns = _grouped(im2col(spread, kernel, (1, 1), (before[1], after[1], before[0], after[0])), groups)
    # (groups, inputs, outputs times kernel values)
    turned = weight.flip(2, 3).unflatten(0, (groups, -1)).transpose(1, 2).flatten(2)
    return matmul(turned, columns, policy).flatten(1, 2).reshape(x.shape)


class ReducedLinear(nn.Module):
    """`nn.Linear` under a policy: inputs are rounded to its format on entry, and all that follows is done in it."""

    def __init__(self, layer: nn.Linear, policy: NumericsPolicy):
        super().__init__()
        self.policy = policy
        self.weight = _held(layer.weight, policy)
        self.bias = None if layer.bias is None else _held(layer.bias, policy)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) to (..., out), in the policy's format."""
        return cast(Tensor, _Linear.apply(x.to(self.policy.dtype), self.weight, self.bias, self.policy))


class ReducedConv2d(nn.Module):
    """`nn.Conv2d` (grouped and depthwise too) under a policy, by im2col; inputs are rounded to its format on entry."""

    def __init__(self, layer: nn.Conv2d, policy: NumericsPolicy):
        super().__init__()
        _check_convolution("layer", layer)
        self.policy, self.groups = policy, layer.groups
        self.stride, self.padding = cast(Pair, layer.stride), cast(Pair, layer.padding)
        self.weight = _held(layer.weight, policy)
        self.bias = None if layer.bias is None else _held(layer.bias, policy)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, channels, height, width) to the same, in the policy's format."""
        checks.tensor("x", x, shape=("batch", self.weight.shape[1] * self.groups, "height", "width"))
        given = x.to(self.policy.dtype)
        return cast(
            Tensor,
            _Convolution.apply(given, self.weight, self.bias, self.stride, self.padding, self.groups, self.policy),
        )


def _held(parameter: Tensor, policy: NumericsPolicy) -> nn.Parameter:
    return nn.Parameter(parameter.detach().to(policy.dtype, copy=True), requires_grad=parameter.requires_grad)


def _check_convolution(name: str, layer: nn.Conv2d) -> None:
    if layer.padding_mode != "zeros" or isinstance(layer.padding, str) or tuple(layer.dilation) != (1, 1):
        raise ValueError(f"{name} must pad with a number of zeros and have no dilation, got {layer}")


def emulate(model: nn.Module, policy: NumericsPolicy) -> nn.Module:
    """Put every linear layer and convolution of `model` under `policy`, in place; returns the model, to be trained with `ReducedSGD`.

    The layers' results are in the policy's format, and so is what torch computes between them (activations, pooling): one rounding
    an operation. A loss is the caller's; take it of `logits.float()`, as a device that computes it in float32 once a step would.
    Weights are rounded to the nearest value, `requires_grad` is kept, optimisers made before know nothing of the new parameters.

    Raises ValueError, before anything is changed, for a model without such layers, for convolutions with dilation or padding
    that is no number of zeros, for a layer that shares its weight with another, and for parameters outside those layers: a batch
    norm means nothing for a single sample (fold it, `torch.nn.utils.fusion`).

    >>> model = emulate(nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)), NumericsPolicy("bfloat16"))
    >>> model(torch.ones(1, 4)).dtype
    torch.bfloat16
    """
    if not isinstance(policy, NumericsPolicy):
        raise TypeError(f"policy must be a NumericsPolicy, got {checks.shown(policy)}")
    layers = find(model, (nn.Linear, nn.Conv2d))
    if not layers:
        raise ValueError(f"model must hold linear layers or convolutions, got {type(model).__name__} with none")
    for name, layer in layers.items():
        if isinstance(layer, nn.Conv2d):
            _check_convolution(name, layer)
    owned = [parameter for layer in layers.values() for parameter in layer.parameters()]
    if len({id(parameter) for parameter in owned}) < len(owned):
        raise ValueError("model must have layers with weights of their own, got two that share one")
    known = {id(parameter) for parameter in owned}
    if strange := [name for name, parameter in model.named_parameters() if id(parameter) not in known]:
        raise ValueError(f"model must have parameters in linear layers and convolutions only, got {strange[0]!r}")
    swap(model, {name: _under(layer, policy) for name, layer in layers.items()})
    return model


def _under(layer: nn.Module, policy: NumericsPolicy) -> nn.Module:
    if isinstance(layer, nn.Conv2d):
        return ReducedConv2d(layer, policy)
    return ReducedLinear(cast(nn.Linear, layer), policy)
