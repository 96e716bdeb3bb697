"""The blocks: ConvFirst and those it is compared with, and a plain pyramid of one kind of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from assay import checks
from assay.methods.vision.convfirst.planner import at_least_one


def _grouped(channels: int, group_width: int) -> int:
    if channels % group_width:
        raise ValueError(f"channels must be a multiple of group_width {group_width}, got {channels}")
    return channels // group_width


def _kernel(kernel: int) -> int:
    if checks.whole("kernel", kernel, low=1) % 2 == 0:
        raise ValueError(f"kernel must be odd and positive, got {kernel}")
    return kernel


class ConvFirst(nn.Module):
    """The paper's block: grouped conv, BN, expand 1x1, BN, SiLU, project 1x1, BN, plus the input. (B, C, H, W) to the same.

    No convolution has a bias. Parameters: k^2 g C + 2C + 2 e C^2 + 2 e C + 2C. Raises ValueError when `channels` is not a multiple of
    `group_width` (8: the accumulation depth of half-precision tensor-core instructions) or `kernel` is even.
    """

    def __init__(self, channels: int, expand: int = 6, kernel: int = 3, group_width: int = 8) -> None:
        super().__init__()
        at_least_one(channels=channels, expand=expand, group_width=group_width)
        groups, hidden = _grouped(channels, group_width), expand * channels
        self.conv = nn.Conv2d(channels, channels, _kernel(kernel), padding=kernel // 2, groups=groups, bias=False)
        self.norm1 = nn.BatchNorm2d(channels)
        self.expand = nn.Conv2d(channels, hidden, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(hidden)
        self.act = nn.SiLU()
        self.project = nn.Conv2d(hidden, channels, 1, bias=False)
        self.norm3 = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.act(self.norm2(self.expand(self.norm1(self.conv(x)))))
        out: Tensor = x + self.norm3(self.project(hidden))
        return out


class MBConv(nn.Module):
    """The inverted bottleneck: expand 1x1, BN, SiLU, grouped conv, BN, SiLU, project 1x1, BN, plus the input. For comparison.

    `group_width` 1 is the usual depthwise form. No squeeze-and-excitation: its global mean would forbid fusing the block.
    """

    def __init__(self, channels: int, expand: int = 4, kernel: int = 3, group_width: int = 1) -> None:
        super().__init__()
        at_least_one(channels=channels, expand=expand, group_width=group_width)
        hidden = expand * channels
        self.expand = nn.Conv2d(channels, hidden, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(hidden)
        self.conv = nn.Conv2d(
            hidden, hidden, _kernel(kernel), padding=kernel // 2, groups=_grouped(hidden, group_width), bias=False
        )
        self.norm2 = nn.BatchNorm2d(hidden)
        self.act = nn.SiLU()
        self.project = nn.Conv2d(hidden, channels, 1, bias=False)
        self.norm3 = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.act(self.norm2(self.conv(self.act(self.norm1(self.expand(x))))))
        out: Tensor = x + self.norm3(self.project(hidden))
        return out


class FusedMBConv(nn.Module):
    """Full k x k conv to the hidden channels, BN, SiLU, project 1x1, BN, plus the input."""

    def __init__(self, channels: int, expand: int = 4, kernel: int = 3) -> None:
        super().__init__()
        at_least_one(channels=channels, expand=expand)
        self.conv = nn.Conv2d(channels, expand * channels, _kernel(kernel), padding=kernel // 2, bias=False)
        self.norm1 = nn.BatchNorm2d(expand * channels)
        self.act = nn.SiLU()
        self.project = nn.Conv2d(expand * channels, channels, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.norm2(self.project(self.act(self.norm1(self.conv(x)))))
        return out


class ConvNeXt(nn.Module):
    """The baseline: depthwise k x k conv, LayerNorm over channels, expand, GELU, project, layer scale, plus the input."""

    def __init__(self, channels: int, expand: int = 4, kernel: int = 7, layer_scale: float = 1e-6) -> None:
        super().__init__()
        at_least_one(channels=channels, expand=expand)
        self.conv = nn.Conv2d(channels, channels, _kernel(kernel), padding=kernel // 2, groups=channels)
        self.norm = nn.LayerNorm(channels, eps=1e-6)
        self.expand = nn.Linear(channels, expand * channels)
        self.act = nn.GELU()
        self.project = nn.Linear(expand * channels, channels)
        self.scale = nn.Parameter(torch.full((channels,), checks.number("layer_scale", layer_scale)))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.conv(x).permute(0, 2, 3, 1))
        y = self.scale * self.project(self.act(self.expand(y)))
        out: Tensor = x + y.permute(0, 3, 1, 2)
        return out


class ConvNet(nn.Sequential):
    """A plain pyramid of one kind of block: 4 x 4 patch stem, stages joined by 2 x 2 strided convolutions, mean, linear head.

    `block(channels)` makes a block. The paper's own network is not published; this layout is ours, for comparing blocks.
    Raises ValueError unless `channels`, of at least 1, and `depths`, of at least 0, pair up.
    """

    def __init__(
        self, block: Callable[[int], nn.Module], channels: Sequence[int], depths: Sequence[int], classes: int = 1000
    ) -> None:
        if not channels or len(channels) != len(depths):
            raise ValueError(f"channels and depths must pair up, got {list(channels)} and {list(depths)}")
        channels = [checks.whole("channels", width, low=1) for width in channels]
        depths = [checks.whole("depths", depth, low=0) for depth in depths]
        layers: list[nn.Module] = [nn.Conv2d(3, channels[0], 4, stride=4)]
        for stage, (width, depth) in enumerate(zip(channels, depths, strict=True)):
            if stage:
                layers += [nn.BatchNorm2d(channels[stage - 1]), nn.Conv2d(channels[stage - 1], width, 2, stride=2)]
            layers += [block(width) for _ in range(depth)]
        super().__init__(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels[-1], classes))
