"""The light pixel decoder: a pyramid of convolutions, where Mask2Former has six layers of deformable attention over three maps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from assay import checks
from assay.methods.core.vision.blocks import ConvNormAct


class PixelDecoder(nn.Module):
    """Maps of four strides, fine to coarse, to mask features (B, mask_dim, H, W) of the finest and three maps of `width`, coarse to fine.

        y = relu(BN(1x1(map)))                                                each level
        x = CSM(y) + relu(BN(1x1(mean of the coarsest map)))                  coarsest level
        out, up = relu(BN(deformable 3x3(x))), relu(BN(transposed 4x4/2(out)))
        x = CSM(y) + up                                                       next finer level, and so on

    `channels` are those of the four maps. A level that is not twice as large as the next coarser one (odd sizes) takes `up` cut at the
    bottom and right, so maps have to be as a backbone pads them: each side half the finer one's, rounded up. In training a batch
    needs two images: batch norm stands behind a mean over the whole map.

    Raises ValueError for another number of maps, or maps that are too small for the next finer one.

    >>> decoder = PixelDecoder((4, 8, 16, 32), width=16, mask_dim=24).eval()
    >>> features, maps = decoder([torch.randn(1, 4 * 2**i, 32 >> i, 48 >> i) for i in range(4)])
    >>> features.shape, [found.shape[-1] for found in maps]
    (torch.Size([1, 24, 32, 48]), [6, 12, 24])
    """

    def __init__(
        self, channels: Sequence[int], *, width: int = 128, mask_dim: int = 256, sigmoids: Literal[1, 2] = 2
    ) -> None:
        super().__init__()
        if len(channels) != 4:
            raise ValueError(f"channels must be those of four maps, got {tuple(channels)}")
        self.projections = nn.ModuleList(ConvNormAct(count, width, 1) for count in channels)
        self.context = ConvNormAct(channels[-1], width, 1)
        self.modulations = nn.ModuleList(ContextModulation(width, sigmoids=sigmoids) for _ in channels)
        self.steps = nn.ModuleList(DeformableStep(width) for _ in channels[1:])
        self.out = ConvNormAct(width, mask_dim, 1)
        for layer in self.modules():
            if isinstance(layer, ConvNormAct):
                nn.init.kaiming_normal_(layer.conv.weight, a=1)

    def forward(self, maps: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        if len(maps) != 4:
            raise ValueError(f"maps must be four, fine to coarse, got {len(maps)}")
        above: Tensor = self.context(maps[-1].mean((2, 3), keepdim=True))
        found = []
        for level, step in zip((3, 2, 1), self.steps, strict=True):
            out, above = step(self.joined(level, maps, above))
            found.append(out)
        features: Tensor = self.out(self.joined(0, maps, above))
        return features, found

    def joined(self, level: int, maps: Sequence[Tensor], above: Tensor) -> Tensor:
        """A level modulated by its context, and what comes from the coarser one."""
        own: Tensor = self.modulations[level](self.projections[level](maps[level]))
        if level == len(maps) - 1:
            return own + above
        height, width = own.shape[2:]
        if above.shape[2] < height or above.shape[3] < width:
            raise ValueError(
                f"maps must each be at least half as large as the next finer one, got {[tuple(m.shape[2:]) for m in maps]}"
            )
        return own + above[:, :, :height, :width]


class ContextModulation(nn.Module):
    """Context-based self-modulation: x + x * gate(mean of x), x (B, C, H, W), gate an MLP with a bottleneck of C / 2 and batch norm.

    As released the gate ends in two sigmoids, so that it lies between 0.5 and 0.7311; `sigmoids=1`: between 0 and 1.

    >>> ContextModulation(8).eval()(torch.ones(1, 8, 3, 3)).shape
    torch.Size([1, 8, 3, 3])
    """

    def __init__(self, width: int, *, sigmoids: Literal[1, 2] = 2) -> None:
        super().__init__()
        checks.whole("width", width, low=2)
        self.sigmoids = checks.choice("sigmoids", sigmoids, (1, 2))
        self.reduce = ConvNormAct(width, width // 2, 1)
        self.expand = nn.Conv2d(width // 2, width, 1, bias=False)

    def gate(self, x: Tensor) -> Tensor:
        """(B, C, 1, 1)."""
        found: Tensor = self.expand(self.reduce(x.mean((2, 3), keepdim=True))).sigmoid()
        return found.sigmoid() if self.sigmoids == 2 else found

    def forward(self, x: Tensor) -> Tensor:
        return x + x * self.gate(x)


class DeformableStep(nn.Module):
    """A level of the pyramid, (B, C, H, W), to itself after a deformable convolution and to what it gives the next, (B, C, 2H, 2W)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = DeformableConv(width, width)
        self.norm = nn.BatchNorm2d(width)
        self.up = nn.ConvTranspose2d(width, width, 4, stride=2, padding=1, bias=False)
        self.up_norm = nn.BatchNorm2d(width)
        # as released, what makes the first of the output channels starts bilinear, and the others as torch draws them
        kernel = 1 - (torch.arange(4) - 1.5).abs() / 2
        with torch.no_grad():
            self.up.weight[:, 0] = kernel[:, None] * kernel

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.norm(self.conv(x)).relu()
        return x, self.up_norm(self.up(x)).relu()


class DeformableConv(nn.Module):
    """Modulated deformable 3 x 3 convolution (DCNv2), (B, C, H, W) to (B, out, H, W), in plain torch.

    `offset`, a 3 x 3 convolution that starts at zero, says for each pixel where its nine taps look (18 channels, row and column of
    each tap in turn, in pixels) and how much they count (9 channels, through a sigmoid): Zhu et al., "Deformable ConvNets v2" (2019).
    Between pixels values are interpolated bilinearly, outside of the map they are 0. As drawn, it is half of an ordinary convolution.
    Places are kept in float32 where the input has fewer bits.

    >>> DeformableConv(4, 6)(torch.randn(1, 4, 5, 7)).shape
    torch.Size([1, 6, 5, 7])
    """

    def __init__(self, channels: int, out_channels: int) -> None:
        super().__init__()
        self.offset = nn.Conv2d(channels, 27, 3, padding=1)
        self.weight = nn.Parameter(torch.empty(out_channels, channels, 3, 3))
        nn.init.kaiming_normal_(self.weight, mode="fan_out", nonlinearity="relu")
        nn.init.zeros_(self.offset.weight)
        assert self.offset.bias is not None
        nn.init.zeros_(self.offset.bias)

    def forward(self, x: Tensor) -> Tensor:
        moved = self.offset(x)
        return deformable_conv2d(x, moved[:, :18], moved[:, 18:].sigmoid(), self.weight)


def deformable_conv2d(x: Tensor, offsets: Tensor, modulation: Tensor, weight: Tensor) -> Tensor:
    """The convolution itself: x (B, C, H, W), offsets (B, 18, H, W) in pixels, modulation (B, 9, H, W), weight (out, C, 3, 3).

    Equals torchvision's `deform_conv2d` with padding 1. Raises TypeError and ValueError for tensors that do not fit together.
    """
    checks.tensor("x", x, ndim=4)
    batch, channels, height, width = x.shape
    checks.tensor("offsets", offsets, shape=(batch, 18, height, width))
    checks.tensor("modulation", modulation, shape=(batch, 9, height, width))
    checks.tensor("weight", weight, shape=("out", channels, 3, 3))
    wide = torch.promote_types(x.dtype, torch.float32)
    taps = torch.arange(-1, 2, device=x.device, dtype=wide)
    rows = torch.arange(height, device=x.device, dtype=wide)[:, None] + taps.repeat_interleave(3)[:, None, None]
    columns = torch.arange(width, device=x.device, dtype=wide) + taps.repeat(3)[:, None, None]
    moved = offsets.to(wide).unflatten(1, (9, 2))
    # from pixels to grid_sample's -1 to 1, which are the outer edges
    places = torch.stack(
        [(2 * (columns + moved[:, :, 1]) + 1) / width - 1, (2 * (rows + moved[:, :, 0]) + 1) / height - 1], -1
    )
    seen = F.grid_sample(x.to(wide), places.flatten(1, 2), align_corners=False).to(x.dtype)  # (B, C, 9 H, W)
    seen = seen.unflatten(2, (9, height)) * modulation[:, None]
    flat = weight.flatten(2).flatten(1)  # (out, C 9)
    return (flat @ seen.reshape(batch, channels * 9, height * width)).unflatten(2, (height, width))
