"""Real images that come with packages: handwritten digits, photographs, a stained tissue. Needs the extra `assay[vision]`.

All are float32 in [0, 1]. Nothing is downloaded: only what the installed packages bring is used.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from assay.errors import MissingError

PHOTOGRAPHS = ("china", "flower", "astronaut", "chelsea", "coffee", "rocket")


def _package(name: str, install: str) -> Any:
    import importlib

    try:
        return importlib.import_module(name)
    except ImportError:
        raise MissingError(f"these images come with {install}: pip install 'assay[vision]'") from None


@cache
def digits() -> tuple[Tensor, Tensor]:
    """1,797 handwritten digits: images (1797, 1, 8, 8), labels int64 (1797,), in the order they come in."""
    found = _package("sklearn.datasets", "scikit-learn").load_digits()
    return torch.from_numpy(found.images).float()[:, None] / 16, torch.from_numpy(found.target).long()


def digits_split(seed: int = 0, test: float = 0.25) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Train images, train labels, test images, test labels, in a random order that `seed` repeats."""
    if not 0 < test < 1:
        raise ValueError(f"test must lie in (0, 1), got {test}")
    images, labels = digits()
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    cut = int(len(images) * (1 - test))
    return images[order[:cut]], labels[order[:cut]], images[order[cut:]], labels[order[cut:]]


@cache
def photograph(name: str) -> Tensor:
    """One photograph (3, height, width); names in `PHOTOGRAPHS`. Raises ValueError for another name."""
    if name not in PHOTOGRAPHS:
        raise ValueError(f"name must be one of {', '.join(PHOTOGRAPHS)}, got {name!r}")
    if name in ("china", "flower"):
        pixels = _package("sklearn.datasets", "scikit-learn").load_sample_image(f"{name}.jpg")
    else:
        pixels = getattr(_package("skimage.data", "scikit-image"), name)()
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1).float() / 255


@cache
def stained_tissue() -> tuple[Tensor, Tensor]:
    """An immunohistochemistry image as grey (1, 512, 512), and where the brown stain is, bool (512, 512), by colour separation.

    The threshold is Otsu's on the DAB channel; the model sees only the grey image.
    """
    import numpy as np

    pixels = _package("skimage.data", "scikit-image").immunohistochemistry()
    dab = _package("skimage.color", "scikit-image").rgb2hed(pixels)[..., 2]
    level = _package("skimage.filters", "scikit-image").threshold_otsu(dab)
    grey = torch.from_numpy(pixels.copy()).float().mean(-1)[None] / 255
    return grey, torch.from_numpy(np.asarray(dab > level))


def crops(image: Tensor, size: int, n: int, *, seed: int = 0) -> Tensor:
    """`n` random square crops (n, channels, size, size). Raises ValueError when the image is smaller."""
    height, width = image.shape[-2:]
    if not 0 < size <= min(height, width):
        raise ValueError(f"size must be from 1 to {min(height, width)}, got {size}")
    generator = torch.Generator().manual_seed(seed)
    tops = torch.randint(height - size + 1, (n,), generator=generator).tolist()
    lefts = torch.randint(width - size + 1, (n,), generator=generator).tolist()
    return torch.stack([image[..., t : t + size, x : x + size] for t, x in zip(tops, lefts, strict=True)])


def clip(image: Tensor, frames: int, size: int, *, seed: int = 0) -> Tensor:
    """A moving crop of a photograph: (frames, channels, size, size), panning and zooming smoothly. The stand-in for a video."""
    from torch.nn.functional import affine_grid, grid_sample

    if frames < 1 or size < 1:
        raise ValueError(f"frames and size must be at least 1, got {frames} and {size}")
    generator = torch.Generator().manual_seed(seed)
    start, stop = (torch.rand(2, 3, generator=generator) * torch.tensor([0.8, 0.8, 0.25])).unbind(0)
    share = torch.linspace(0, 1, frames)[:, None]
    x, y, zoom = (start * (1 - share) + stop * share).unbind(-1)
    scale = 0.3 + zoom  # of the image's width and height; the crop stays inside
    centre_x, centre_y = ((2 * x / 0.8 - 1) * (1 - scale), (2 * y / 0.8 - 1) * (1 - scale))
    theta = torch.zeros(frames, 2, 3)
    theta[:, 0, 0] = theta[:, 1, 1] = scale
    theta[:, 0, 2], theta[:, 1, 2] = centre_x, centre_y
    grid = affine_grid(theta, [frames, image.shape[0], size, size], align_corners=False)
    return grid_sample(image.expand(frames, -1, -1, -1), grid, align_corners=False)
