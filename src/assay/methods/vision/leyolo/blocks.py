"""The layers of LeYOLO. Norms have the eps of 1e-3 and the momentum of 0.03 that the published weights were trained with."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from assay import checks

EPS, MOMENTUM = 1e-3, 0.03
ACTIVATIONS: dict[str, type[nn.Module]] = {
    "SI": nn.SiLU,
    "RE": nn.ReLU6,
    "GE": nn.GELU,
    "EL": nn.ELU,
    "HS": nn.Hardswish,
}
BINS = 16  # of the distribution over a distance


class ConvNorm(nn.Sequential):
    """`conv`, `norm` and, unless `act` is None, `act`. Padding keeps the size at stride 1; there is none where kernel and stride are equal.

    `bias`: whether the convolution has one, which the norm makes superfluous; LeYOLO's blocks do, its head does not.
    """

    def __init__(
        self, channels_in: int, channels_out: int, kernel: int = 1, stride: int = 1, *, groups: int = 1, bias: bool = True,
        act: type[nn.Module] | None = nn.SiLU,
    ) -> None:  # fmt: skip
        super().__init__()
        padding = 0 if kernel == stride else kernel // 2
        self.conv = nn.Conv2d(channels_in, channels_out, kernel, stride, padding, groups=groups, bias=bias)
        self.norm = nn.BatchNorm2d(channels_out, EPS, MOMENTUM)
        if act is not None:
            self.act = act()


class InvertedBottleneck(nn.Module):
    """1x1 to `expansion` channels, depthwise `kernel` x `kernel`, 1x1 to `channels_out` without activation; x is added where it fits.

    x (B, channels_in, H, W). `expansion` None is `channels_in`. Without `pointwise` there is no first convolution, which is why the
    expansion must be `channels_in` then: a block on joined maps, that are wide already, saves its dearest layer.
    Raises ValueError for another expansion without `pointwise`, and for an even kernel.

    >>> block = InvertedBottleneck(8, 8, 5, 24)
    >>> block(torch.zeros(1, 8, 6, 6)).shape, sum(p.numel() for p in block.parameters())
    (torch.Size([1, 8, 6, 6]), 1152)
    """

    def __init__(
        self, channels_in: int, channels_out: int, kernel: int = 3, expansion: int | None = None, stride: int = 1,
        pointwise: bool = True, act: type[nn.Module] = nn.SiLU,
    ) -> None:  # fmt: skip
        super().__init__()
        inner = channels_in if expansion is None else checks.whole("expansion", expansion, low=1)
        if checks.whole("kernel", kernel, low=1) % 2 == 0:
            raise ValueError(f"kernel must be odd, got {kernel}")
        if not pointwise and inner != channels_in:
            raise ValueError(
                f"expansion must be the {channels_in} channels that come in without a pointwise layer, got {inner}"
            )
        self.expand = ConvNorm(channels_in, inner, act=act) if pointwise else nn.Identity()
        self.depthwise = ConvNorm(inner, inner, kernel, stride, groups=inner, act=act)
        self.project = ConvNorm(inner, channels_out, act=None)
        self.residual = channels_in == channels_out and stride == 1

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.project(self.depthwise(self.expand(x)))
        return x + y if self.residual else y


class PooledPyramid(nn.Module):
    """1x1 to half the channels, three chained max pools, 1x1 over all four: pools of 5, 9 and 13 (SPPF of the YOLO family)."""

    def __init__(self, channels_in: int, channels_out: int, kernel: int = 5) -> None:
        super().__init__()
        half = channels_in // 2
        self.reduce = ConvNorm(channels_in, half, bias=False)
        self.pool = nn.MaxPool2d(kernel, 1, kernel // 2)
        self.project = ConvNorm(4 * half, channels_out, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        maps = [self.reduce(x)]
        for _ in range(3):
            maps.append(self.pool(maps[-1]))
        y: Tensor = self.project(torch.cat(maps, 1))
        return y


class Concat(nn.Module):
    """Maps of one size joined along their channels."""

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        return torch.cat(list(maps), 1)


class Head(nn.Module):
    """DNiN, the decoupled network-in-network head: from each level's map (B, C, H, W) one of 4 * 16 bins and `num_classes` logits.

    Two branches a level, for the box and for the class: a 1x1 convolution, two depthwise 3x3, and a 1x1 that predicts. Where other heads
    spend dense 3x3 convolutions, space is looked at by depthwise ones alone. The class branch is as wide as the finest level, and at least
    as wide as min(num_classes, 100). `bins` are the distances that the 16 bins stand for, in strides; they do not learn.
    Raises ValueError for no class.

    >>> head = Head(10, (32, 64), (8, 16))
    >>> [tuple(each.shape) for each in head([torch.zeros(1, 32, 4, 4), torch.zeros(1, 64, 2, 2)])]
    [(1, 74, 4, 4), (1, 74, 2, 2)]
    """

    def __init__(self, num_classes: int, channels: Sequence[int], strides: Sequence[int]) -> None:
        super().__init__()
        self.num_classes = checks.whole("num_classes", num_classes, low=1)
        box, label = max(16, channels[0] // 4, 4 * BINS), max(channels[0], min(num_classes, 100))
        self.box = nn.ModuleList(self.branch(each, box, 4 * BINS) for each in channels)
        self.label = nn.ModuleList(self.branch(each, label, num_classes) for each in channels)
        self.bins = nn.Parameter(torch.arange(BINS, dtype=torch.float), requires_grad=False)
        self.strides = tuple(strides)
        for one in self.box:
            nn.init.ones_(one[-1].bias)  # type: ignore[index]
        self.set_prior(640)

    def set_prior(self, size: int, objects: float = 5.0) -> None:
        """Biases by which, before anything is learnt, each level expects `objects` in an image of `size` pixels a side, of any class.

        The released code has 5 objects in 640 pixels, whatever the images; in much smaller ones training begins with climbing
        out of that. Raises ValueError for no object or no size.
        """
        for stride, branch in zip(self.strides, self.label, strict=True):
            share = checks.number("objects", objects, above=0) / (checks.whole("size", size, low=1) / stride) ** 2
            nn.init.constant_(branch[-1].bias, math.log(share / self.num_classes))  # type: ignore[index]

    def branch(self, channels_in: int, width: int, out: int) -> nn.Sequential:
        """The layers of one branch."""
        return nn.Sequential(
            ConvNorm(channels_in, width, bias=False),
            ConvNorm(width, width, 3, groups=width, bias=False),
            ConvNorm(width, width, 3, groups=width, bias=False),
            nn.Conv2d(width, out, 1),
        )

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        return [torch.cat([box(x), label(x)], 1) for box, label, x in zip(self.box, self.label, maps, strict=True)]
