"""Swin's skeleton with any mixer of positions in it: patches, four stages of residual blocks, merging in between.

Liu et al., "Swin Transformer" (2021), figure 3. Maps are (B, H, W, C). Parameters are named as in the published code.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from assay import checks
from assay.methods.core.vision.backbone import Backbone, classifier
from assay.methods.core.vision.blocks import DropPath, Mlp, PatchMerging, drop_path_rates, init_transformer

Mixer = Callable[[int, int, int], nn.Module]
"""(stage, place of the block in it, width) to a module from maps (B, H, W, width) to the same shape."""


class PatchEmbed(nn.Module):
    """A picture (B, in_chans, H, W) to a map (B, ceil(H/P), ceil(W/P), C): a linear layer on each patch of P x P pixels, then a norm.

    Other sizes are padded with zeros at the bottom and right.
    """

    def __init__(self, in_chans: int, width: int, patch: int, *, eps: float = 1e-5) -> None:
        super().__init__()
        self.patch = patch
        self.proj = nn.Conv2d(in_chans, width, patch, patch)
        self.norm = nn.LayerNorm(width, eps=eps)

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[2:]
        if height % self.patch or width % self.patch:
            x = F.pad(x, (0, -width % self.patch, 0, -height % self.patch))
        y: Tensor = self.norm(self.proj(x).permute(0, 2, 3, 1))
        return y


class PyramidBlock(nn.Module):
    """x + attn(norm1(x)), then x + mlp(norm2(x)); `attn` is whatever mixes positions."""

    def __init__(self, width: int, mixer: nn.Module, *, mlp_ratio: float = 4.0, drop_path: float = 0.0) -> None:
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(width), mixer
        self.norm2, self.mlp = nn.LayerNorm(width), Mlp(width, int(mlp_ratio * width))
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.attn(self.norm1(x)))
        y: Tensor = x + self.drop_path(self.mlp(self.norm2(x)))
        return y


class PyramidStage(nn.Module):
    """`blocks` at one resolution, then `downsample` to half of it (None after the last stage)."""

    def __init__(self, blocks: Sequence[nn.Module], downsample: nn.Module | None) -> None:
        super().__init__()
        self.blocks, self.downsample = nn.Sequential(*blocks), downsample

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(x)
        return x if self.downsample is None else self.downsample(x)


class Pyramid(Backbone):
    """Maps of strides P, 2P, 4P, 8P and widths C, 2C, 4C, 8C; `forward_features` gives the last, normed: (B, H, W, C), as timm's Swin.

    `mixer` makes what mixes positions in each block. Raises ValueError for sizes that are none.
    """

    def __init__(
        self,
        mixer: Mixer,
        *,
        num_classes: int,
        in_chans: int,
        embed_dim: int,
        depths: Sequence[int],
        patch_size: int = 4,
        mlp_ratio: float = 4.0,
        drop_path_rate: float = 0.0,
        input_size: int = 224,
    ) -> None:
        super().__init__(num_classes=num_classes, in_chans=in_chans, input_size=input_size)
        checks.whole("embed_dim", embed_dim, low=1)
        checks.whole("patch_size", patch_size, low=1)
        checks.number("mlp_ratio", mlp_ratio, above=0)
        depths = tuple(checks.whole("depths", depth, low=1) for depth in depths)
        if not depths:
            raise ValueError("depths must have at least one stage, got ()")
        self.channels = tuple(embed_dim * 2**stage for stage in range(len(depths)))
        self.strides = tuple(patch_size * 2**stage for stage in range(len(depths)))
        self.num_features = self.channels[-1]
        self.patch_embed = PatchEmbed(in_chans, embed_dim, patch_size)
        rates = drop_path_rates(checks.number("drop_path_rate", drop_path_rate, low=0, below=1), depths)
        self.layers = nn.ModuleList(
            PyramidStage(
                [
                    PyramidBlock(width, mixer(stage, place, width), mlp_ratio=mlp_ratio, drop_path=rate)
                    for place, rate in enumerate(rates[stage])
                ],
                PatchMerging(width) if stage + 1 < len(depths) else None,
            )
            for stage, width in enumerate(self.channels)
        )
        self.norm = nn.LayerNorm(self.num_features)
        self.head = classifier(self.num_features, num_classes)
        self.apply(init_transformer)

    def stages(self, x: Tensor) -> Iterator[tuple[int, Tensor]]:
        x = self.patch_embed(x)
        for stride, stage in zip(self.strides, self.layers, strict=True):
            x = stage.blocks(x)  # type: ignore[operator]
            yield stride, x.permute(0, 3, 1, 2)
            x = x if stage.downsample is None else stage.downsample(x)  # type: ignore[operator]

    def forward_features(self, x: Tensor) -> Tensor:
        x = self.patch_embed(x)
        for stage in self.layers:
            x = stage(x)
        y: Tensor = self.norm(x)
        return y

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        x = x.mean((1, 2))
        return x if pre_logits else self.head(x)
