"""Shift: neighbours are mixed by moving channels, with no parameters and no arithmetic; 1x1 convolutions do the rest.

Wu et al., "Shift: A Zero FLOP, Zero Parameter Alternative to Spatial Convolutions" (arXiv 1711.08141), a chapter of the thesis.
A map of C channels is dealt evenly over the K x K displacements (what is left over stays with the centre) and each group moves by
its displacement, zeros coming in from outside. No arithmetic is not no time: a shift reads and writes the whole map, and where a
depthwise convolution is well made it may be as fast.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, cast, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from assay import checks
from assay.methods.compression.efficient_dnns.nets import Net, conv_bn
from assay.methods.core import kernels

Variant = Literal["paper", "as_released"]
Group = tuple[int, int, int, int]
"""First channel, one past the last, and by how many rows down and columns to the right the channels move."""


def deal(channels: int, kernel: int = 3) -> tuple[Group, ...]:
    """The groups of `channels` channels over the displacements of a `kernel` x `kernel` window, row by row.

    Every displacement gets channels // kernel^2 channels, the centre what is left over as well: with fewer channels than displacements
    nothing moves. Raises ValueError for an even kernel.

    >>> deal(10)[3:5]
    ((3, 4, 0, -1), (4, 6, 0, 0))
    """
    channels, kernel = checks.whole("channels", channels, low=1), checks.whole("kernel", kernel, low=1)
    if kernel % 2 == 0:
        raise ValueError(f"kernel must be odd, got {kernel}")
    reach, each = kernel // 2, channels // kernel**2
    groups: list[Group] = []
    first = 0
    for down in range(-reach, reach + 1):
        for right in range(-reach, reach + 1):
            size = each if (down, right) != (0, 0) else channels - each * (kernel**2 - 1)
            if size:
                groups.append((first, first + size, down, right))
                first += size
    return tuple(groups)


def shift(x: Tensor, groups: Sequence[Group]) -> Tensor:
    """Each group of channels of x (B, C, H, W) moved by its displacement, zero filled: same shape, dtype and memory format.

    `groups` as `deal` gives them: they share out the channels in order. One pass over the map; the gradient moves back. Under
    torch.compile the same is written with padding, which Inductor fuses into its neighbours. Raises ValueError for groups that leave
    a channel out or name it twice, and TypeError for a map that is not floating-point.
    """
    if torch.compiler.is_compiling():
        return _padded(x, groups)
    ends = [0, *(last for _, last, *_ in groups)]
    if [first for first, *_ in groups] != ends[:-1]:
        raise ValueError(f"groups must share out the channels in order, got {checks.shown(tuple(groups))}")
    checks.tensor("x", x, shape=("batch", ends[-1], "height", "width"), empty=True)
    kernels.ran("shift", "slices")
    return cast(Tensor, _Shift.apply(x, tuple(groups)))


class _Shift(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, groups: tuple[Group, ...]) -> Tensor:
        return _moved(x, groups, 1)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, tuple[Group, ...]], output: Tensor) -> None:
        ctx.groups = inputs[1]

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, _: None) -> Tensor:
        return _moved(tangent, ctx.groups, 1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _moved(grad, ctx.groups, -1), None


def _moved(x: Tensor, groups: Sequence[Group], sign: int) -> Tensor:
    out = torch.empty_like(x)
    height, width = x.shape[-2:]
    for first, last, down, right in groups:
        rows, rows_from = _spans(sign * down, height)
        columns, columns_from = _spans(sign * right, width)
        part = out[:, first:last]
        part[:, :, rows, columns] = x[:, first:last, rows_from, columns_from]
        for filled, axis, size in ((rows, 2, height), (columns, 3, width)):  # the rest comes in from outside
            for start, stop in ((0, filled.start), (filled.stop, size)):
                if start < stop:
                    part.narrow(axis, start, stop - start).zero_()
    return out


def _spans(offset: int, size: int) -> tuple[slice, slice]:
    """Where `size` places moved by `offset` go, and where they come from; nothing where they all leave."""
    length = max(0, size - abs(offset))
    if not length:
        return slice(0, 0), slice(0, 0)
    to, come = max(offset, 0), max(-offset, 0)
    return slice(to, to + length), slice(come, come + length)


def _padded(x: Tensor, groups: Sequence[Group]) -> Tensor:
    parts = []
    for first, last, down, right in groups:
        part = x[:, first:last]
        if abs(down) >= x.shape[-2] or abs(right) >= x.shape[-1]:
            part = torch.zeros_like(part)
        elif down or right:
            part = F.pad(part, (right, -right, down, -down))  # a negative padding cuts off
        parts.append(part)
    return torch.cat(parts, 1)


def shift_reference(x: Tensor, groups: Sequence[Group], kernel: int = 3) -> Tensor:
    """The same by its definition, a depthwise convolution with one-hot kernels: kernel^2 multiplications a number instead of none."""
    reach = kernel // 2
    weight = x.new_zeros(x.shape[1], 1, kernel, kernel)
    for first, last, down, right in groups:
        weight[first:last, 0, reach - down, reach - right] = 1  # where the value comes from: torch correlates
    return F.conv2d(x, weight, padding=reach, groups=x.shape[1])


class Shift2d(nn.Module):
    """`shift` with the displacements of a `kernel` x `kernel` window: (B, channels, H, W) to the same. No parameters.

    Raises ValueError for an even kernel, and in forward for another number of channels.
    """

    def __init__(self, channels: int, kernel: int = 3) -> None:
        super().__init__()
        self.groups = deal(channels, kernel)
        self.channels, self.kernel = channels, kernel

    def forward(self, x: Tensor) -> Tensor:
        return shift(x, self.groups)

    def extra_repr(self) -> str:
        return f"{self.channels}, kernel={self.kernel}"


class CSC(nn.Module):
    """The conv-shift-conv block: 1x1 to expansion x outputs, BN, ReLU, shift, 1x1 to outputs with the stride, BN, ReLU, + shortcut.

    The shortcut is the input, or a 1x1 convolution and its BN where width or stride change. The two convolutions have
    expansion * outputs * (inputs + outputs) parameters. `variant="as_released"` adds the shortcut before the last ReLU, as in ResNet.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        stride: int = 1,
        *,
        expansion: int = 9,
        kernel: int = 3,
        variant: Variant = "paper",
    ) -> None:
        super().__init__()
        self.variant = checks.choice("variant", variant, get_args(Variant))
        middle = checks.whole("expansion", expansion, low=1) * outputs
        self.expand = conv_bn(inputs, middle)
        self.shift = Shift2d(middle, kernel)
        self.project = conv_bn(middle, outputs, stride=stride, relu=False)
        self.shortcut = _shortcut(inputs, outputs, stride)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.project(self.shift(self.expand(x)))
        kept: Tensor = self.shortcut(x)
        return F.relu(out) + kept if self.variant == "paper" else F.relu(out + kept)


class Basic(nn.Module):
    """ResNet's basic block of two 3x3 convolutions, which CSC replaces: 9 outputs (inputs + outputs) parameters."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.first = conv_bn(inputs, outputs, 3, stride=stride, padding=1)
        self.second = conv_bn(outputs, outputs, 3, padding=1, relu=False)
        self.shortcut = _shortcut(inputs, outputs, stride)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.second(self.first(x)) + self.shortcut(x)
        return F.relu(out)


def _shortcut(inputs: int, outputs: int, stride: int) -> nn.Module:
    same = stride == 1 and inputs == outputs
    return nn.Identity() if same else conv_bn(inputs, outputs, stride=stride, relu=False)


Block = Callable[[int, int, int], nn.Module]


def resnet(
    block: Block = Basic,
    depths: Sequence[int] = (3, 3, 3),
    widths: Sequence[int] = (16, 32, 64),
    *,
    num_classes: int = 10,
    in_chans: int = 3,
) -> Net:
    """A residual network for small images: a 3x3 convolution, stages of blocks of which all but the first halve the map, a classifier.

    `block(inputs, outputs, stride)` makes a block. Raises ValueError unless depths and widths pair up, all at least 1.
    """
    if len(depths) != len(widths) or not widths:
        raise ValueError(f"depths and widths must pair up, got {list(depths)} and {list(widths)}")
    width = checks.whole("widths", widths[0], low=1)
    layers: list[nn.Module] = [conv_bn(checks.whole("in_chans", in_chans, low=1), width, 3, padding=1)]
    for stage, (depth, outputs) in enumerate(zip(depths, widths, strict=True)):
        for i in range(checks.whole("depths", depth, low=1)):
            layers.append(block(width, outputs, 2 if stage and not i else 1))
            width = outputs
    return Net(layers, width, num_classes)


def shiftresnet(
    depths: Sequence[int] = (3, 3, 3),
    widths: Sequence[int] = (16, 32, 64),
    *,
    expansion: int = 9,
    variant: Variant = "paper",
    num_classes: int = 10,
    in_chans: int = 3,
) -> Net:
    """`resnet` with CSC blocks; at expansion 9 its blocks have as many parameters as those of two 3x3 convolutions."""

    def block(inputs: int, outputs: int, stride: int) -> nn.Module:
        return CSC(inputs, outputs, stride, expansion=expansion, variant=variant)

    return resnet(block, depths, widths, num_classes=num_classes, in_chans=in_chans)


def resnet20(*, num_classes: int = 10, in_chans: int = 3) -> Net:
    """ResNet-20 for 32-pixel images, the baseline of the shift paper."""
    return resnet(num_classes=num_classes, in_chans=in_chans)


def shiftresnet20(*, expansion: int = 9, variant: Variant = "paper", num_classes: int = 10, in_chans: int = 3) -> Net:
    """ShiftResNet-20 for 32-pixel images; the paper has expansions 1, 3, 6 and 9."""
    return shiftresnet(expansion=expansion, variant=variant, num_classes=num_classes, in_chans=in_chans)
