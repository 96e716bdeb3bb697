"""What image models are held against: networks of transformers as plain modules, a network that is left out, and one that stays random."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from assay.experiments.core import Quality, Trained
from assay.experiments.vision.training import Judged, guarded
from assay.measure.cost import count_cost
from assay.workloads.pictures import PICTURES

CLASSES = len(PICTURES)
METRIC = "accuracy on crops of twelve photographs, in per cent"
MARGIN = 3.0  # points that may be lost: about what an interval over twelve photographs can tell
UNTRAINED = ("random features", "pixels")  # the controls that every room has


class Logits(nn.Module):
    """A classifier of transformers as a module of images to logits."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.model(pixel_values=images).logits
        return logits


def resnet(
    widths: Sequence[int] = (64, 128, 256, 512), depths: Sequence[int] = (2, 2, 2, 2), *, classes: int = 1000, channels: int = 3
) -> nn.Module:  # fmt: skip
    """A ResNet of basic blocks; ResNet-18 unless told otherwise."""
    from transformers import ResNetConfig, ResNetForImageClassification

    shape: dict[str, Any] = {"embedding_size": widths[0], "hidden_sizes": list(widths), "depths": list(depths)}
    config = ResNetConfig(num_channels=channels, layer_type="basic", **shape, **_labels(classes))
    return Logits(ResNetForImageClassification(config))


def mobilenet(share: float = 1.0, *, classes: int = 1000, channels: int = 3) -> nn.Module:
    """MobileNetV2 with widths times `share`; padded inside its convolutions, as in PyTorch's weights, not by an operator of its own."""
    from transformers import MobileNetV2Config, MobileNetV2ForImageClassification

    config = MobileNetV2Config(
        num_channels=channels, depth_multiplier=share, min_depth=4, tf_padding=False, **_labels(classes)
    )
    return Logits(MobileNetV2ForImageClassification(config))


def _labels(classes: int) -> dict[str, Any]:
    """An argument that transformers takes and does not declare."""
    return {"num_labels": classes}


class Pixels(nn.Module):
    """The network left out: a linear layer on the picture at 12 x 12 pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(144, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.linear(F.adaptive_avg_pool2d(x, 12).flatten(1))
        return out


def frozen(model: nn.Module) -> nn.Module:
    """The model with convolutions that stay as they were drawn; the rest learns."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
            module.requires_grad_(False)
    return model


def parameters(model: nn.Module) -> int:
    """How many."""
    return sum(parameter.numel() for parameter in model.parameters())


def macs(model: nn.Module, size: int) -> int:
    """Multiply-accumulates of an image of `size` pixels a side, for a model that lies on the meta device."""
    channels = next(module.in_channels for module in model.modules() if isinstance(module, nn.Conv2d))
    return count_cost(model.eval(), torch.zeros(1, channels, size, size, device="meta")).macs


def widest(make: Callable[[int], nn.Module], wanted: int, size: Callable[[nn.Module], int] = parameters) -> int:
    """The largest width at which `make(width)` has at most `wanted` parameters (or whatever `size` counts), at least 1."""

    @cache
    def of(width: int) -> int:
        with torch.device("meta"):
            return size(make(width))

    width = max(int(8 * math.sqrt(wanted / of(8))), 1)  # nearly: most of them grow with the square
    while width > 1 and of(width) > wanted:
        width -= 1
    while of(width + 1) <= wanted:
        width += 1
    return width


def quality(arms: Mapping[str, Judged], candidate: str, baseline: str, rival: str, said: str) -> Quality:
    """The candidate's accuracy against the baseline's, paired over photographs and seeds; `UNTRAINED` and the rival beside it."""
    controls = {"deleted": arms["pixels"], "random": arms["random features"], "rival": arms[rival]}
    return guarded(arms[candidate], arms[baseline], controls, said)


def trained(arms: Mapping[str, Judged]) -> dict[str, Trained]:
    """For the record; the two controls that cannot learn much are held to no floor."""
    return {name: arm.trained for name, arm in arms.items() if name not in UNTRAINED}
