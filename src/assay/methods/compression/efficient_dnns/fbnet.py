"""The space in which FBNet searches: layers of inverted bottlenecks that differ in kernel, expansion and groups, and a skip."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from torch import Tensor, nn

from assay import checks
from assay.methods.compression.efficient_dnns.nets import conv_bn
from assay.methods.compression.efficient_dnns.tables import Space

OPERATORS = {
    "k3_e1": (3, 1, 1),
    "k3_e1_g2": (3, 1, 2),
    "k3_e3": (3, 3, 1),
    "k3_e6": (3, 6, 1),
    "k5_e1": (5, 1, 1),
    "k5_e1_g2": (5, 1, 2),
    "k5_e3": (5, 3, 1),
    "k5_e6": (5, 6, 1),
}
"""Kernel, expansion and groups of the paper's blocks; "skip" is its ninth operator."""


class FBNetBlock(nn.Module):
    """1x1 to expansion x inputs, BN, ReLU, depthwise kernel x kernel with the stride, BN, ReLU, 1x1 to outputs, BN, + input if it fits.

    With two groups both 1x1 convolutions are grouped, and channels are shuffled behind the first. With m = expansion * inputs the
    convolutions have inputs m / groups + kernel^2 m + m outputs / groups parameters.
    """

    def __init__(
        self, inputs: int, outputs: int, stride: int = 1, *, kernel: int = 3, expansion: int = 6, groups: int = 1
    ) -> None:
        super().__init__()
        if checks.whole("kernel", kernel, low=1) % 2 == 0:
            raise ValueError(f"kernel must be odd, got {kernel}")
        middle = checks.whole("expansion", expansion, low=1) * inputs
        self.layers = nn.Sequential(
            conv_bn(inputs, middle, groups=groups),
            *([nn.ChannelShuffle(groups)] if groups > 1 else []),
            conv_bn(middle, middle, kernel, stride=stride, padding=kernel // 2, groups=middle),
            conv_bn(middle, outputs, groups=groups, relu=False),
        )
        self.adds = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layers(x)
        return out + x if self.adds else out


def fbnet_space(
    stages: Sequence[tuple[int, int, int]],
    *,
    stem: int = 16,
    stem_stride: int = 2,
    operators: Sequence[str] = (*OPERATORS, "skip"),
    num_classes: int = 1000,
    in_chans: int = 3,
) -> Space:
    """A space of FBNet's operators. `stages` has the width, the number of layers and the stride of the first layer of each stage.

    A layer that changes width or size has no skip. The stem is a 3x3 convolution to `stem` channels, the head a mean and a linear
    classifier. The paper's space for ImageNet has 22 layers of nine operators. Raises ValueError for no stages, an unknown operator,
    and where a layer would be left without one.
    """
    for i, name in enumerate(operators):
        checks.choice(f"operators[{i}]", name, (*OPERATORS, "skip"))
    width = checks.whole("stem", stem, low=1)
    layers: list[dict[str, Callable[[], nn.Module]]] = []
    for outputs, depth, first in stages:
        for i in range(checks.whole("stages", depth, low=1)):
            stride = first if i == 0 else 1
            layer: dict[str, Callable[[], nn.Module]] = {}
            for name in operators:
                if name == "skip":
                    if stride == 1 and width == outputs:
                        layer[name] = nn.Identity
                    continue
                kernel, expansion, groups = OPERATORS[name]
                layer[name] = partial(
                    FBNetBlock, width, outputs, stride, kernel=kernel, expansion=expansion, groups=groups
                )
            layers.append(layer)
            width = outputs
    return Space(
        partial(conv_bn, in_chans, stem, 3, stride=stem_stride, padding=1),
        tuple(layers),
        partial(_head, width, num_classes),
    )


def _head(width: int, num_classes: int) -> nn.Sequential:
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, num_classes))
