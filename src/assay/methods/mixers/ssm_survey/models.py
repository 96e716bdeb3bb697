"""The block with an exchangeable mixer, and the U-shaped segmentation model and the classifier built of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from assay import checks
from assay.methods.core.mixers.protocol import check_positive
from assay.methods.mixers.ssm_survey.grids import GRID_MIXERS, blocks, convolution, joined


class Block(nn.Module):
    """Pre-norm residual block on a grid: x + mixer(norm(x)), then an MLP of `mlp_ratio` (None: the mixer's own) if not 0.

    With `groups` the channels are cut into that many, and one mixer of dim / groups channels serves all. `dims` is 2 for images
    (batch, height, width, dim), 3 for volumes. Further options are the mixer's.
    Raises ValueError for an unknown mixer, for sizes that do not divide, and for a grid of another shape.
    """

    def __init__(
        self,
        dim: int,
        *,
        mixer: str = "s6",
        mlp_ratio: float | None = None,
        groups: int = 1,
        dims: int = 2,
        layer: int = 0,
        **options: Any,
    ):
        super().__init__()
        checks.choice("mixer", mixer, GRID_MIXERS)
        check_positive(dim=dim, groups=groups)
        if dim % groups:
            raise ValueError(f"groups must divide dim ({dim}), got {groups}")
        self.dim, self.groups, self.dims = dim, groups, dims
        self.norm = nn.LayerNorm(dim)
        self.mixer = GRID_MIXERS[mixer](dim // groups, dims=dims, layer=layer, **options)
        ratio = self.mixer.mlp_ratio if mlp_ratio is None else checks.number("mlp_ratio", mlp_ratio, low=0)
        hidden = int(dim * ratio)
        self.mlp = None
        if hidden:
            self.mlp = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim))

    def forward(self, x: Tensor) -> Tensor:
        checks.tensor("x", x, shape=("batch", *["cells"] * self.dims, self.dim), empty=True)
        if not x.numel():
            return x
        folded = self.norm(x).unflatten(-1, (self.groups, -1)).movedim(-2, 1).flatten(0, 1)
        mixed = self.mixer(folded).unflatten(0, (-1, self.groups)).movedim(1, -2).flatten(-2)
        x = x + mixed
        return x if self.mlp is None else x + cast(Tensor, self.mlp(x))


class Encoder(nn.Module):
    """Patches, then stages of blocks; between stages 2 cells along each axis merge into one of twice the channels.

    `channels` and `reduction` say what the features are: forward gives one (batch, height / reduction, width / reduction,
    channels) a stage, with the depth in front for volumes (`dims` 3). Raises ValueError for images of another shape and for sides
    the last reduction does not divide; an empty batch gives empty features.
    """

    def __init__(self, in_chans: int, dim: int, depths: Sequence[int], patch: int, *, dims: int = 2, **options: Any):
        super().__init__()
        check_positive(in_chans=in_chans, dim=dim, patch=patch, stages=len(depths))
        self.in_chans, self.dims = in_chans, dims
        self.channels = [dim * 2**i for i in range(len(depths))]
        self.reduction = [patch * 2**i for i in range(len(depths))]
        self.embed, self.norm = convolution(dims, in_chans, dim, patch, patch), nn.LayerNorm(dim)
        self.stages = nn.ModuleList(
            _stage(c, n, dims=dims, **options) for c, n in zip(self.channels, depths, strict=True)
        )
        self.merges = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(2**dims * c), nn.Linear(2**dims * c, 2 * c, bias=False))
            for c in self.channels[:-1]
        )

    def forward(self, image: Tensor) -> list[Tensor]:
        sides = ("depth", "height", "width")[-self.dims :]
        checks.tensor("image", image, shape=("batch", self.in_chans, *sides), empty=True)
        if any(not side or side % self.reduction[-1] for side in image.shape[2:]):
            raise ValueError(
                f"image must be (batch, channels, {', '.join(sides)}) with sides divisible by {self.reduction[-1]}, "
                f"got {tuple(image.shape)}"
            )
        x, features = self.norm(self.embed(image).movedim(1, -1)), []
        for i, stage in enumerate(self.stages):
            x = stage(x)
            features.append(x)
            if i < len(self.merges):
                x = self.merges[i](blocks(x, [2] * self.dims).flatten(1 + self.dims))
        return features


class UNet(nn.Module):
    """U-shaped segmentation of images (batch, in_chans, height, width) to logits (batch, num_classes, height, width).

    The `Encoder`, a mirrored decoder that expands cells (half the channels) and adds the encoder's features, a last expansion
    by `patch` and a head one cell wide. `depths` blocks a stage; the decoder mirrors all but the last. `dims` 3 is for volumes
    (batch, in_chans, depth, height, width). Further options go to `Block` and its mixer. Defaults are VM-UNet's, whose last
    decoder stage is shallower. Raises ValueError for sizes that do not divide.

    >>> model = UNet(1, 2, dim=8, depths=(1, 1), patch=2, mixer="conv", dims=3)
    >>> model(torch.zeros(1, 1, 8, 8, 12)).shape
    torch.Size([1, 2, 8, 8, 12])
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1,
        *,
        dim: int = 96,
        depths: Sequence[int] = (2, 2, 2, 2),
        patch: int = 4,
        dims: int = 2,
        **options: Any,
    ):
        super().__init__()
        check_positive(num_classes=num_classes, dim=dim, patch=patch)
        if dim % patch:
            raise ValueError(f"patch must divide dim, got {patch} and {dim}")
        self.encoder = Encoder(in_chans, dim, depths, patch, dims=dims, **options)
        self.patch, self.dims = patch, dims
        channels, wider = self.encoder.channels, 2 ** (dims - 1)
        self.expand = nn.ModuleList(nn.Linear(c, wider * c, bias=False) for c in reversed(channels[1:]))
        self.norms = nn.ModuleList(nn.LayerNorm(c // 2) for c in reversed(channels[1:]))
        mirrored = zip(reversed(channels[:-1]), reversed(list(depths)[:-1]), strict=True)
        self.stages = nn.ModuleList(_stage(c, n, dims=dims, **options) for c, n in mirrored)
        self.final = nn.Linear(dim, patch ** (dims - 1) * dim, bias=False)
        self.final_norm, self.head = nn.LayerNorm(dim // patch), convolution(dims, dim // patch, num_classes, 1)

    def forward(self, image: Tensor) -> Tensor:
        *skips, x = self.encoder(image)
        for expand, norm, stage, skip in zip(self.expand, self.norms, self.stages, reversed(skips), strict=True):
            x = stage(norm(_spread(expand(x), 2, self.dims)) + skip)
        x = self.final_norm(_spread(self.final(x), self.patch, self.dims))
        logits: Tensor = self.head(x.movedim(-1, 1))
        return logits


class Classifier(nn.Module):
    """The `Encoder`, the mean over the cells of its last stage, and a linear head: images to logits (batch, num_classes).

    Without classes (0) the mean itself is returned. Errors as `Encoder`.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        *,
        dim: int = 96,
        depths: Sequence[int] = (2, 2, 2, 2),
        patch: int = 4,
        **options: Any,
    ):
        super().__init__()
        checks.whole("num_classes", num_classes, low=0)
        self.encoder = Encoder(in_chans, dim, depths, patch, **options)
        self.norm = nn.LayerNorm(self.encoder.channels[-1])
        self.head = nn.Linear(self.encoder.channels[-1], num_classes) if num_classes else nn.Identity()

    def forward(self, image: Tensor) -> Tensor:
        y: Tensor = self.head(self.norm(self.encoder(image)[-1].flatten(1, -2).mean(1)))
        return y


def _stage(dim: int, depth: int, **options: Any) -> nn.Sequential:
    return nn.Sequential(*(Block(dim, layer=i, **options) for i in range(checks.whole("depths", depth, low=0))))


def _spread(x: Tensor, factor: int, dims: int) -> Tensor:
    """Each cell to `factor` cells along each axis, of that many times fewer channels."""
    parts = x.reshape(*x.shape[:-1], x.shape[-1] // factor**dims, *[factor] * dims)
    return joined(parts.movedim(1 + dims, -1))


def match_width(parameters: int, *, step: int = 4, most: int = 1024, **options: Any) -> int:
    """The `dim` (a multiple of `step`) whose `UNet` has the number of parameters nearest to `parameters`; options as there.

    Raises ValueError when `most` is too narrow for that many.
    """
    check_positive(parameters=parameters, step=step, most=most)
    best, least = step, math.inf
    for dim in range(step, most + 1, step):
        with torch.device("meta"):
            count = sum(p.numel() for p in UNet(dim=dim, **options).parameters())
        if abs(count - parameters) < least:
            best, least = dim, abs(count - parameters)
        if count >= parameters:
            return best
    raise ValueError(f"parameters must be reachable with dim up to {most}, got {parameters}")
