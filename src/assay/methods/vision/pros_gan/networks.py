"""The three networks: labels to prototype codes, image and label to an attacked image, and the judge of whether an image is real.

Sizes are those of the released code at 224 pixels; `width`, `image_size` and `in_chans` scale them down. All are plain modules.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from assay import checks

FEATURES = 512  # of a label
GRID = 16  # pixels of the image a side for one position of the label's first map
BLOCKS = 3  # residual blocks before, and as many after, the bottleneck


class Prototypes(NamedTuple):
    """What `PrototypeNet` says of labels: `feature` (B, 512), `code` (B, bits) in (-1, 1), `label` (B, classes) in (0, 1)."""

    feature: Tensor
    code: Tensor
    label: Tensor


class PrototypeNet(nn.Module):
    """Label vectors (B, classes) of 0 and 1 to their `Prototypes`. The prototype of a label is the sign of its `code`.

    Raises ValueError for other shapes and counts below 1.

    >>> PrototypeNet(10, 32, hidden=64)(torch.eye(10)).code.shape
    torch.Size([10, 32])
    """

    def __init__(self, num_classes: int, bits: int, *, hidden: int = 4096) -> None:
        super().__init__()
        self.num_classes = checks.whole("num_classes", num_classes, low=1)
        self.bits, hidden = checks.whole("bits", bits, low=1), checks.whole("hidden", hidden, low=1)
        self.feature = nn.Sequential(nn.Linear(num_classes, hidden), nn.ReLU(), nn.Linear(hidden, FEATURES))
        self.code = nn.Linear(FEATURES, bits)
        self.classifier = nn.Linear(FEATURES, num_classes)

    def forward(self, labels: Tensor) -> Prototypes:
        checks.tensor("labels", labels, shape=("batch", self.num_classes))
        feature = self.feature(labels)
        return Prototypes(feature, self.code(feature).tanh(), self.classifier(feature).sigmoid())


def _normed(layer: nn.Module, channels: int) -> list[nn.Module]:
    return [layer, nn.InstanceNorm2d(channels), nn.ReLU(inplace=True)]


def _doubled(channels_in: int, channels_out: int) -> nn.ConvTranspose2d:
    """A map of twice the side."""
    return nn.ConvTranspose2d(channels_in, channels_out, 4, 2, 1, bias=False)


class ResidualBlock(nn.Module):
    """x + norm(conv(relu(norm(conv(x))))), both convolutions 3x3."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        first, second = (nn.Conv2d(channels, channels, 3, padding=1, bias=False) for _ in range(2))
        self.body = nn.Sequential(*_normed(first, channels), second, nn.InstanceNorm2d(channels))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.body(x)
        return out


class LabelEncoder(nn.Module):
    """Features of labels (B, 512) to maps as large as the image (B, in_chans, image_size, image_size)."""

    def __init__(self, width: int, image_size: int, in_chans: int) -> None:
        super().__init__()
        self.width, self.side = width, image_size // GRID
        self.fc = nn.Linear(FEATURES, width * self.side**2)
        widths = [width >> halved for halved in range(5)]
        steps = [layer for a, b in zip(widths, widths[1:], strict=False) for layer in _normed(_doubled(a, b), b)]
        self.maps = nn.Sequential(*steps, nn.Conv2d(widths[-1], in_chans, 3, padding=1, bias=False))

    def forward(self, feature: Tensor) -> Tensor:
        first = F.relu(self.fc(feature)).unflatten(1, (self.width, self.side, self.side))
        out: Tensor = self.maps(first)
        return out


class Generator(nn.Module):
    """Images (B, in_chans, size, size) in [-1, 1] and features of labels (B, 512) to attacked images in [-1, 1].

    The output is the image itself and no bounded change of it. `image_size` is a multiple of 16, since the label's maps grow from a grid
    16 times coarser, `label_width` a multiple of 16 (its channels are halved four times). `ProSGAN` converts from and to [0, 1].
    Raises ValueError for other sizes.

    >>> made = Generator(width=4, label_width=16, image_size=32)
    >>> made(torch.zeros(2, 3, 32, 32), torch.zeros(2, 512)).shape
    torch.Size([2, 3, 32, 32])
    """

    def __init__(self, *, width: int = 64, label_width: int = 128, image_size: int = 224, in_chans: int = 3) -> None:
        super().__init__()
        width, in_chans = checks.whole("width", width, low=1), checks.whole("in_chans", in_chans, low=1)
        self.image_size, self.in_chans = checks.whole("image_size", image_size, low=GRID), in_chans
        label_width = checks.whole("label_width", label_width, low=16)
        for name, value in (("image_size", image_size), ("label_width", label_width)):
            if value % 16:
                raise ValueError(f"{name} must be a multiple of 16, got {value}")
        self.label_encoder = LabelEncoder(label_width, image_size, in_chans)
        encoder = _normed(nn.Conv2d(2 * in_chans, width, 7, padding=3), width)
        for wide in (width, 2 * width):
            encoder += _normed(nn.Conv2d(wide, 2 * wide, 4, 2, 1), 2 * wide)
        self.encoder = nn.Sequential(*encoder, *(ResidualBlock(4 * width) for _ in range(BLOCKS)))
        decoder: list[nn.Module] = [ResidualBlock(4 * width) for _ in range(BLOCKS)]
        for wide in (4 * width, 2 * width):
            decoder += _normed(_doubled(wide, wide // 2), wide // 2)
        self.decoder = nn.Sequential(*decoder)
        self.out = nn.Conv2d(width + in_chans, in_chans, 3, padding=1, bias=False)

    def forward(self, images: Tensor, feature: Tensor) -> Tensor:
        checks.tensor("images", images, shape=("batch", self.in_chans, self.image_size, self.image_size))
        checks.tensor("feature", feature, shape=(len(images), FEATURES))
        mixed = torch.cat([self.label_encoder(feature), images], 1)
        out: Tensor = self.out(torch.cat([self.decoder(self.encoder(mixed)), images], 1)).tanh()
        return out


class Discriminator(nn.Module):
    """Images (B, in_chans, size, size) in [-1, 1] to (B, classes + 1): the label, and 0 for a real image or 1 for a made one.

    `depth` convolutions halve the map, each divided by its largest singular value; a last one spans what is left. The released code
    squeezes its output, which loses the batch where it is one image; here it never does.
    Raises ValueError where `image_size` is too small to be halved so often.

    >>> Discriminator(10, width=4, image_size=32)(torch.zeros(1, 3, 32, 32)).shape
    torch.Size([1, 11])
    """

    def __init__(
        self, num_classes: int, *, width: int = 64, depth: int = 5, image_size: int = 224, in_chans: int = 3
    ) -> None:
        super().__init__()
        num_classes, width = checks.whole("num_classes", num_classes, low=1), checks.whole("width", width, low=1)
        depth = checks.whole("depth", depth, low=1)
        self.image_size, self.in_chans = checks.whole("image_size", image_size, low=2**depth), in_chans
        widths = [in_chans, *(width << doubled for doubled in range(depth))]
        layers: list[nn.Module] = []
        for a, b in zip(widths, widths[1:], strict=False):
            layers += [spectral_norm(nn.Conv2d(a, b, 4, 2, 1)), nn.LeakyReLU(0.01)]
        self.body = nn.Sequential(*layers)
        self.out = nn.Conv2d(widths[-1], num_classes + 1, image_size // 2**depth, bias=False)

    def forward(self, images: Tensor) -> Tensor:
        checks.tensor("images", images, shape=("batch", self.in_chans, self.image_size, self.image_size))
        out: Tensor = self.out(self.body(images)).flatten(1)
        return out


def prototypes_from_official(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A `PrototypeNet`'s state dict out of the released code's `prototypenet_*.pth`."""
    return _renamed(state, {"feature.": "feature.", "hashing.0.": "code.", "classifier.0.": "classifier."})


def generator_from_official(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A `Generator`'s state dict out of the released code's `generator_*.pth`. Raises ValueError for a key that is not one of its."""
    names = {
        "label_encoder.fc.0.": "label_encoder.fc.",
        "label_encoder.transform.": "label_encoder.maps.",
        "image_encoder.": "encoder.",
        "decoder.": "decoder.",
        "residual.0.": "out.",
    }
    return {key.replace(".main.", ".body."): value for key, value in _renamed(state, names).items()}


def _renamed(state: Mapping[str, Tensor], names: Mapping[str, str]) -> dict[str, Tensor]:
    found: dict[str, Any] = {}
    for key, value in state.items():
        old = next((old for old in names if key.startswith(old)), None)
        if old is None:
            raise ValueError(f"state must have the released code's keys ({', '.join(names)}...), got {key!r}")
        found[names[old] + key[len(old) :]] = value
    return found
