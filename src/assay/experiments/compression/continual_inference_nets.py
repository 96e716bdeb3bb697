"""The networks and the moving picture of continual_inference's experiments. Their weights are random or none: nothing here is trained."""

from __future__ import annotations

import copy
import math
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from assay.methods.compression.continual_inference import Branches, PerFrame, Settings, Streaming, Tokens, register

STAGES = ((24, 1), (48, 2), (96, 5), (192, 3))  # X3D's channels, and blocks before they are multiplied
EXPAND = 2.25
BESIDE_THE_BLOCKS = 4  # frames that the stem's temporal convolution looks at beyond its own


@cache
def moving_picture(size: int) -> Tensor:
    """The animation that comes with scikit-image, 24 frames of 25 x 14 pixels, scaled: (1, 3, 24, size, size), normalised.

    It is made to be played in a loop.
    """
    import skimage
    from PIL import Image, ImageSequence

    with Image.open(Path(skimage.__file__).parent / "data" / "no_time_for_that_tiny.gif") as picture:
        frames = [frame.convert("RGB") for frame in ImageSequence.Iterator(picture)]
    width, height = frames[0].size
    pixels = torch.stack([torch.frombuffer(bytearray(f.tobytes()), dtype=torch.uint8) for f in frames])
    clip = pixels.view(len(frames), height, width, 3).permute(0, 3, 1, 2).float() / 255
    scaled = F.interpolate(clip, size=(size, size), mode="bilinear", antialias=True)
    return ((scaled - 0.45) / 0.225).transpose(0, 1)[None]


def played(clip: Tensor, frames: int) -> Tensor:
    """The first `frames` frames of a clip (1, channels, time, ...) that is played in a loop."""
    return clip[:, :, torch.arange(frames) % clip.shape[2]].contiguous()


def x3d(stages: tuple[tuple[int, int], ...], *, pad_time: bool, head: int = 2048, classes: int = 400) -> nn.Sequential:
    """X3D (arXiv 2004.04730): `stages` of (channels, blocks), random weights, evaluation mode.

    Without `pad_time` no convolution pads time, and skip connections join the middle frames: the same weights, fewer outputs.
    Squeeze and excitation looks at one frame (`our choice`; the clip network looks at all): the multiplications are nearly the same.
    """
    first, last = stages[0][0], stages[-1][0]
    wide = int(EXPAND * last)
    layers: list[nn.Module] = [
        nn.Conv3d(3, first, (1, 3, 3), stride=(1, 2, 2), padding=(0, 1, 1), bias=False),
        nn.Conv3d(first, first, (5, 1, 1), padding=(2 * pad_time, 0, 0), groups=first, bias=False),
        nn.BatchNorm3d(first),
        nn.ReLU(),
    ]
    channels = first
    for width, blocks in stages:
        for i in range(blocks):
            layers.append(_block(channels, width, 2 if i == 0 else 1, pad_time, gated=i % 2 == 0))
            channels = width
    layers += [
        nn.Conv3d(last, wide, 1, bias=False),
        nn.BatchNorm3d(wide),
        nn.ReLU(),
        nn.AdaptiveAvgPool3d((1, 1, 1)),
        nn.Conv3d(wide, head, 1, bias=False),
        nn.ReLU(),
        nn.Conv3d(head, classes, 1),
    ]
    return nn.Sequential(*layers).eval()


def _block(channels: int, width: int, stride: int, pad_time: bool, gated: bool) -> nn.Module:
    inner = int(EXPAND * width)
    gate = [_gate(inner)] if gated else []
    main = nn.Sequential(
        nn.Conv3d(channels, inner, 1, bias=False),
        nn.BatchNorm3d(inner),
        nn.ReLU(),
        nn.Conv3d(inner, inner, 3, stride=(1, stride, stride), padding=(int(pad_time), 1, 1), groups=inner, bias=False),
        nn.BatchNorm3d(inner),
        *gate,
        nn.SiLU(),
        nn.Conv3d(inner, width, 1, bias=False),
        nn.BatchNorm3d(width),
    )
    skip: nn.Module = nn.Identity()
    if stride > 1 or channels != width:
        skip = nn.Sequential(
            nn.Conv3d(channels, width, 1, stride=(1, stride, stride), bias=False), nn.BatchNorm3d(width)
        )
    return nn.Sequential(Branches(skip, main, align="centre"), nn.ReLU())


def _gate(channels: int) -> nn.Module:
    """Squeeze and excitation of one frame; a sixteenth of the channels, in eights."""
    thin = max(8, 8 * round(channels / 16 / 8))
    pool = nn.AdaptiveAvgPool3d((None, 1, 1))
    squeeze = nn.Sequential(pool, nn.Conv3d(channels, thin, 1), nn.ReLU(), nn.Conv3d(thin, channels, 1), nn.Sigmoid())
    return Branches(nn.Identity(), squeeze, reduce="mul")


def picture_net(window: int, blocks: int, width: int) -> tuple[nn.Sequential, int]:
    """X3D's blocks in two stages, without padding in time, whose answer looks at exactly `window` frames; and the pool's steps.

    Raises ValueError where the blocks look at more frames than the window has.
    """
    steps = window - BESIDE_THE_BLOCKS - 2 * blocks
    if steps < 1:
        raise ValueError(
            f"window must be more than {BESIDE_THE_BLOCKS + 2 * blocks} frames for {blocks} blocks, got {window}"
        )
    half = blocks // 2
    torch.manual_seed(0)
    stages = ((width, blocks - half), (2 * width, half)) if half else ((width, blocks),)
    return x3d(stages, pad_time=False, head=8 * width, classes=64), steps


def byte_net(window: int, width: int) -> nn.Sequential:
    """A causal convolutional network on bytes with kernels of two taps, dilated 1, 2, 4 ...: its answer looks at `window` bytes.

    (1, bytes) to the logits of the next byte (1, 256, 1) for each window. Raises ValueError unless the window is a power of two.
    """
    layers = round(math.log2(window))
    if window < 2 or 2**layers != window:
        raise ValueError(f"window must be a power of two, got {window}")
    torch.manual_seed(0)
    parts: list[nn.Module] = [Tokens(256, width)]
    for i in range(layers):
        inner = nn.Sequential(nn.Conv1d(width, width, 2, dilation=2**i), nn.ReLU(), nn.Conv1d(width, width, 1))
        parts.append(Branches(nn.Identity(), inner, align="newest"))
    return nn.Sequential(*parts, nn.Conv1d(width, 256, 1)).eval()


class GraphConvolution(nn.Module):
    """A 1 x 1 convolution for each part of a skeleton's graph, summed over neighbours: (batch, channels, time, joints)."""

    adjacency: Tensor

    def __init__(self, channels: int, width: int, joints: int, parts: int = 3) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, parts * width, 1)
        self.register_buffer("adjacency", torch.rand(parts, joints, joints))

    def forward(self, x: Tensor) -> Tensor:
        parts = self.conv(x).unflatten(1, (self.adjacency.shape[0], -1))
        return torch.einsum("bpctv,pvw->bctw", parts, self.adjacency)


@register(GraphConvolution)
def _graph_convolution(module: GraphConvolution, settings: Settings) -> Streaming:
    return PerFrame(copy.deepcopy(module))


GRAPH_LAYERS = ((64, 1), (64, 1), (64, 1), (64, 1), (128, 2), (128, 1), (128, 1), (256, 2), (256, 1), (256, 1))


def st_gcn(joints: int, *, strided: bool, classes: int = 60) -> nn.Sequential:
    """ST-GCN (arXiv 1801.07455) on (batch, 3, time, joints): ten layers of a graph convolution and one over nine frames.

    Padded in time, random weights, evaluation mode. Without `strided` no layer leaves frames out, as in the continual networks of
    arXiv 2203.11009 that answer for every frame.
    """
    layers: list[nn.Module] = [nn.BatchNorm2d(3)]
    channels = 3
    for i, (width, every) in enumerate(GRAPH_LAYERS):
        stride = (every if strided else 1, 1)
        main = nn.Sequential(
            GraphConvolution(channels, width, joints),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, width, (9, 1), stride=stride, padding=(4, 0)),
            nn.BatchNorm2d(width),
        )
        skip: nn.Module = nn.Identity()
        if channels != width:
            skip = nn.Sequential(nn.Conv2d(channels, width, 1, stride=stride), nn.BatchNorm2d(width))
        layers += [Branches(skip, main, align="centre") if i else main, nn.ReLU()]
        channels = width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d((1, 1)), nn.Conv2d(channels, classes, 1)).eval()


def resnet50_layers(classes: int) -> list[tuple[int, int, int]]:
    """(inputs, outputs, kernel) of the convolutions of ResNet-50 (arXiv 1512.03385) and of its classifier, in order."""
    layers, channels = [(3, 64, 7)], 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for i in range(blocks):
            layers += [(channels, width, 1), (width, width, 3), (width, 4 * width, 1)]
            if i == 0:
                layers.append((channels, 4 * width, 1))  # of the skip connection
            channels = 4 * width
    return [*layers, (channels, classes, 1)]
