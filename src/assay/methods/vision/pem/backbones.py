"""The backbones that PEM was published with: ResNet-50, and STDC1 and STDC2. Maps of strides 4, 8, 16 and 32, no classifier.

He et al., "Deep Residual Learning for Image Recognition" (2016), with the stride in the 3 x 3 convolution; Fan et al., "Rethinking
BiSeNet for Real-time Semantic Segmentation" (2021).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from assay import checks
from assay.methods.core.vision.blocks import ConvNormAct


class Pyramid(nn.Module):
    """What `Pem` needs of a backbone: `channels`, `strides`, and `feature_maps(x)`, maps by stride. The registered ones have it too."""

    strides: tuple[int, ...] = (4, 8, 16, 32)
    channels: tuple[int, ...]
    stages: nn.ModuleList

    def stem(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def feature_maps(self, x: Tensor) -> dict[int, Tensor]:
        """(B, channels, H / stride, W / stride) by stride, sides rounded up, of images (B, 3, H, W)."""
        x = self.stem(x)
        found = {}
        for stride, stage in zip(self.strides, self.stages, strict=True):
            x = stage(x)
            found[stride] = x
        return found

    def forward(self, x: Tensor) -> list[Tensor]:
        """The maps, fine to coarse."""
        return list(self.feature_maps(x).values())


class ResNet(Pyramid):
    """ResNet of bottleneck blocks; depths (3, 4, 6, 3) are ResNet-50.

    >>> [found.shape[1] for found in ResNet((1, 1, 1, 1), width=8)(torch.zeros(1, 3, 64, 64))]
    [32, 64, 128, 256]
    """

    def __init__(self, depths: Sequence[int] = (3, 4, 6, 3), *, width: int = 64) -> None:
        super().__init__()
        if len(depths) != 4:
            raise ValueError(f"depths must have one entry for each of four stages, got {tuple(depths)}")
        checks.whole("width", width, low=1)
        self.first = ConvNormAct(3, width, 7, stride=2)
        self.channels = tuple(4 * width << stage for stage in range(4))
        self.stages = nn.ModuleList()
        channels = width
        for stage, depth in enumerate(depths):
            checks.whole("depths", depth, low=1)
            blocks = []
            for place in range(depth):
                stride = 2 if stage and not place else 1
                blocks.append(Bottleneck(channels, width << stage, stride))
                channels = 4 * width << stage
            self.stages.append(nn.Sequential(*blocks))

    def stem(self, x: Tensor) -> Tensor:
        return F.max_pool2d(self.first(x), 3, 2, 1)


class Bottleneck(nn.Module):
    """relu(x + BN 1x1(relu BN 3x3(relu BN 1x1(x)))), four times `width` channels out; a projection where the shape changes."""

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = ConvNormAct(channels, width, 1)
        self.conv2 = ConvNormAct(width, width, 3, stride=stride)
        self.conv3 = ConvNormAct(width, 4 * width, 1, act=None)
        same = stride == 1 and channels == 4 * width
        self.shortcut = nn.Identity() if same else ConvNormAct(channels, 4 * width, 1, stride=stride, act=None)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv3(self.conv2(self.conv1(x))) + self.shortcut(x)
        return out.relu()


class Stdc(Pyramid):
    """STDC networks of concatenating blocks: depths (2, 2, 2) are STDC1, (4, 5, 3) STDC2.

    >>> [found.shape[1] for found in Stdc((1, 1, 1), width=8)(torch.zeros(1, 3, 64, 64))]
    [8, 32, 64, 128]
    """

    def __init__(self, depths: Sequence[int] = (2, 2, 2), *, width: int = 64) -> None:
        super().__init__()
        if len(depths) != 3:
            raise ValueError(f"depths must have one entry for each of three stages, got {tuple(depths)}")
        checks.whole("width", width, low=8)
        self.first = ConvNormAct(3, width // 2, 3, stride=2)
        self.channels = (width, 4 * width, 8 * width, 16 * width)
        self.stages = nn.ModuleList([ConvNormAct(width // 2, width, 3, stride=2)])
        channels = width
        for depth, out in zip(depths, self.channels[1:], strict=True):
            checks.whole("depths", depth, low=1)
            blocks = [ConcatBlock(channels if not place else out, out, 1 if place else 2) for place in range(depth)]
            self.stages.append(nn.Sequential(*blocks))
            channels = out

    def stem(self, x: Tensor) -> Tensor:
        out: Tensor = self.first(x)
        return out


class ConcatBlock(nn.Module):
    """Four convolutions in a row, of 1/2, 1/4, 1/8 and 1/8 of the channels, whose outputs are joined: short-term dense concatenation.

    At stride 2 a depthwise convolution makes the second one's input smaller, and pooling the first one's output.
    """

    def __init__(self, channels: int, out: int, stride: int) -> None:
        super().__init__()
        widths = (out // 2, out // 4, out // 8, out // 8)
        before = (channels, *widths[:-1])
        self.convs = nn.ModuleList(
            ConvNormAct(a, b, 3 if place else 1) for place, (a, b) in enumerate(zip(before, widths, strict=True))
        )
        self.down = ConvNormAct(widths[0], widths[0], 3, stride=2, groups=widths[0], act=None) if stride == 2 else None

    def forward(self, x: Tensor) -> Tensor:
        first = self.convs[0](x)
        last = first if self.down is None else self.down(first)
        found = [first if self.down is None else F.avg_pool2d(first, 3, 2, 1)]
        for conv in list(self.convs)[1:]:
            last = conv(last)
            found.append(last)
        return torch.cat(found, 1)
