"""MobileNetV1 in the form that pruned pointwise convolutions want, and its multiply-accumulates in closed form."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor, nn

from assay import checks

V1: tuple[tuple[int, int], ...] = (
    *((64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2)),
    *(((512, 1),) * 5),
    *((1024, 2), (1024, 1)),
)
"""Channels and stride of MobileNetV1's thirteen blocks."""
STEM = 32


def scaled(channels: int, width: float) -> int:
    """Channels of a network of that width: a multiple of 8, at least 8, never a tenth below what was asked for.

    >>> scaled(64, 0.5), scaled(32, 0.35)
    (32, 16)
    """
    wanted = channels * width
    found = max(8, int(wanted + 4) // 8 * 8)
    return found + 8 if found < 0.9 * wanted else found


class MobileNet(nn.Module):
    """MobileNetV1 (arXiv 1704.04861): a full convolution, blocks of a depthwise and a pointwise one, mean, classifier.

    (batch, inputs, height, width), channels first, to (batch, classes). Every block is an `nn.Sequential` of depthwise convolution,
    norm, ReLU6, pointwise convolution, norm, ReLU6, so that `channels_first_` folds the first three into one layer and `sparsify_` the
    last three. `blocks` has channels and stride of each, `stem` the channels and stride of the first convolution; `width` multiplies all
    channels. Only the pointwise convolutions, `pointwise()`, are to be pruned: the rest is a twentieth of the work.

    >>> import torch
    >>> MobileNet(10, width=0.25, blocks=((32, 1), (64, 2)))(torch.zeros(2, 3, 16, 16)).shape
    torch.Size([2, 10])
    """

    def __init__(
        self,
        classes: int,
        *,
        width: float = 1.0,
        blocks: Sequence[tuple[int, int]] = V1,
        stem: tuple[int, int] = (STEM, 2),
        inputs: int = 3,
    ):
        super().__init__()
        classes, inputs = checks.whole("classes", classes, low=1), checks.whole("inputs", inputs, low=1)
        width = checks.number("width", width, above=0)
        sizes = [scaled(channels, width) for channels, _ in (stem, *blocks)]
        self.stem = nn.Sequential(
            nn.Conv2d(inputs, sizes[0], 3, stem[1], 1, bias=False), nn.BatchNorm2d(sizes[0]), nn.ReLU6()
        )
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(before, before, 3, stride, 1, groups=before, bias=False),
                nn.BatchNorm2d(before),
                nn.ReLU6(),
                nn.Conv2d(before, after, 1, bias=False),
                nn.BatchNorm2d(after),
                nn.ReLU6(),
            )
            for (before, after), (_, stride) in zip(pairwise(sizes), blocks, strict=True)
        )
        self.classifier = nn.Linear(sizes[-1], classes)

    def pointwise(self) -> list[str]:
        """The names of the pointwise convolutions."""
        return [f"blocks.{i}.3" for i in range(len(self.blocks))]

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        y: Tensor = self.classifier(x.mean((2, 3)))
        return y


def mobilenet_macs(
    resolution: int,
    *,
    density: float = 1.0,
    classes: int = 1000,
    width: float = 1.0,
    blocks: Sequence[tuple[int, int]] = V1,
    stem: tuple[int, int] = (STEM, 2),
    inputs: int = 3,
) -> float:
    """Multiply-accumulates of one picture (1 MAC = 2 operations) whose pointwise convolutions keep `density` of their weights.

    In closed form: 27 c s^2 for the first convolution, then 9 a s^2 + density a b s^2 for each block from a to b channels.

    >>> mobilenet_macs(224), round(mobilenet_macs(224) / mobilenet_macs(224, density=0.1), 2)
    (568740352.0, 6.84)
    """
    resolution = checks.whole("resolution", resolution, low=1)
    density = checks.number("density", density, low=0, high=1)
    sizes = [scaled(channels, width) for channels, _ in (stem, *blocks)]
    side = -(-resolution // stem[1])
    total = float(9 * inputs * sizes[0] * side**2)
    for (before, after), (_, stride) in zip(pairwise(sizes), blocks, strict=True):
        side = -(-side // stride)
        total += (9 * before + density * before * after) * side**2
    return total + sizes[-1] * classes
