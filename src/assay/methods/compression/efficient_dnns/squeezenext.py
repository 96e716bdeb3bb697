"""SqueezeNext: two bottlenecks and a 3x3 convolution split into 3x1 and 1x3 (Gholami et al., arXiv 1803.10615; part of the thesis).

No depthwise convolutions, which many accelerators run badly; where the blocks stand was chosen after simulating one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from assay import checks
from assay.methods.compression.efficient_dnns.nets import Net, conv_bn

DEPTHS = {"v1": (6, 6, 8, 1), "v5": (2, 4, 14, 1)}
"""Blocks a stage. "v5" has as many, moved to later stages; its numbers are those generally known, not taken from a source at hand."""
WIDTHS = (32, 64, 128, 256)
STEM, LAST = 64, 128  # channels of the first convolution and of the last one


class SqueezeNextBlock(nn.Module):
    """1x1 to C/2 (with the stride), 1x1 to C/4, then 3x1 and 1x3 at C/2, 1x1 to C, where C = outputs; plus the shortcut.

    Batch norm and ReLU follow each convolution. `flip` puts 1x3 before 3x1, `groups` groups these two (our choice of which are
    grouped in the "G" networks). The shortcut is the input, or a 1x1 convolution where width or stride change. Parameters of the
    convolutions with one group: in C/2 + C^2/8 + 3 C^2/8 + 3 C^2/4 + C^2/2, and in C of the shortcut's.
    Raises ValueError unless 4 divides outputs.
    """

    def __init__(self, inputs: int, outputs: int, stride: int = 1, *, flip: bool = False, groups: int = 1) -> None:
        super().__init__()
        if checks.whole("outputs", outputs, low=4) % 4:
            raise ValueError(f"outputs must be a multiple of 4, got {outputs}")
        half, quarter = outputs // 2, outputs // 4
        tall: dict[str, Any] = {"kernel": (3, 1), "padding": (1, 0), "groups": groups}
        wide: dict[str, Any] = {"kernel": (1, 3), "padding": (0, 1), "groups": groups}
        first, second = (wide, tall) if flip else (tall, wide)
        self.layers = nn.Sequential(
            conv_bn(inputs, half, stride=stride),
            conv_bn(half, quarter),
            conv_bn(quarter, half, **first),
            conv_bn(half, half, **second),
            conv_bn(half, outputs),
        )
        same = stride == 1 and inputs == outputs
        self.shortcut = nn.Identity() if same else conv_bn(inputs, outputs, stride=stride)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layers(x) + self.shortcut(x)
        return F.relu(out)


def squeezenext(
    depths: Sequence[int] = DEPTHS["v1"],
    *,
    width: float = 1.0,
    groups: int = 1,
    num_classes: int = 1000,
    in_chans: int = 3,
) -> Net:
    """A SqueezeNext network for images of 227 pixels: 7x7/2 convolution without padding, 3x3/2 max pool, four stages, 1x1, classifier.

    `width` multiplies all widths (the paper has 1, 1.5 and 2). Pooling rounds sizes up, as Caffe does. Raises ValueError unless there
    are four depths of at least 1, and for a width at which a block's channels are no multiple of 4.
    """
    if len(depths) != len(WIDTHS):
        raise ValueError(f"depths must be {len(WIDTHS)} numbers, got {list(depths)}")
    width = checks.number("width", width, above=0)
    channels = scaled(STEM, width)
    layers: list[nn.Module] = [
        conv_bn(checks.whole("in_chans", in_chans, low=1), channels, 7, stride=2),
        nn.MaxPool2d(3, 2, ceil_mode=True),
    ]
    for stage, (depth, base) in enumerate(zip(depths, WIDTHS, strict=True)):
        outputs = scaled(base, width)
        for i in range(checks.whole("depths", depth, low=1)):
            stride = 2 if stage and not i else 1
            layers.append(SqueezeNextBlock(channels, outputs, stride, flip=i % 2 == 1, groups=groups))
            channels = outputs
    last = scaled(LAST, width)
    return Net([*layers, conv_bn(channels, last)], last, num_classes)


def scaled(channels: int, width: float) -> int:
    """`channels` times the width multiplier, rounded to the nearest whole number, halves up."""
    return math.floor(channels * width + 0.5)


def squeezenext_23(*, width: float = 1.0, num_classes: int = 1000, in_chans: int = 3) -> Net:
    """1.0-SqNxt-23 of the paper, or 1.5 or 2.0 times as wide."""
    return squeezenext(width=width, num_classes=num_classes, in_chans=in_chans)
