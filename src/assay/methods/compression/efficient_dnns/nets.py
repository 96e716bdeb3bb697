"""What the networks of this room share: a convolution with its batch norm, and features with a linear classifier on top."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from assay import checks


def conv_bn(
    inputs: int,
    outputs: int,
    kernel: int | tuple[int, int] = 1,
    *,
    stride: int = 1,
    padding: int | tuple[int, int] = 0,
    groups: int = 1,
    relu: bool = True,
) -> nn.Sequential:
    """A convolution without a bias, its batch norm, and (unless `relu` is False) a ReLU."""
    conv = nn.Conv2d(inputs, outputs, kernel, stride=stride, padding=padding, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), *([nn.ReLU()] if relu else []))


class Net(nn.Module):
    """Features, the mean over all places, and a linear classifier: (B, in_chans, H, W) to (B, num_classes)."""

    def __init__(self, layers: Sequence[nn.Module], width: int, num_classes: int) -> None:
        super().__init__()
        self.features = nn.Sequential(*layers)
        self.num_features = checks.whole("width", width, low=1)
        self.head = nn.Linear(self.num_features, checks.whole("num_classes", num_classes, low=1))

    def forward_features(self, x: Tensor) -> Tensor:
        """The last maps of features, (B, num_features, h, w)."""
        out: Tensor = self.features(x)
        return out

    def forward_head(self, x: Tensor) -> Tensor:
        """Maps of features to logits."""
        out: Tensor = self.head(x.mean((2, 3)))
        return out

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))
