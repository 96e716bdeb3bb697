"""Real images that come with packages: handwritten digits, photographs, a stained tissue. Needs the extra `assay[vision]`.

All are float32 in [0, 1]. Nothing is downloaded: only data from the installed packages is used.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from assay import checks
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
    """1,797 handwritten digits: images (1797, 1, 8, 8), labels int64 (1797,), in their original order."""
    found = _package("sklearn.datasets", "scikit-learn").load_digits()
    return torch.from_numpy(found.images).float()[:, None] / 16, torch.from_numpy(found.target).long()


def digits_split(seed: int = 0, test: float = 0.25) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Train images, train labels, test images, test labels, in a random order fixed by `seed`.

    `test` is the share kept for testing. Raises ValueError unless it is in (0, 1), TypeError unless it is a number.
    """
    test, seed = checks.number("test", test, above=0, below=1), checks.whole("seed", seed)
    images, labels = digits()
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    cut = int(len(images) * (1 - test))
    return images[order[:cut]], labels[order[:cut]], images[order[cut:]], labels[order[cut:]]


@cache
def photograph(name: str) -> Tensor:
    """One photograph (3, height, width); names in `PHOTOGRAPHS`. Raises ValueError for another name."""
    checks.choice("name", name, PHOTOGRAPHS)
    if name in ("china", "flower"):
        pixels = _package("sklearn.datasets", "scikit-learn").load_sample_image(f"{name}.jpg")
    else:
        pixels = getattr(_package("skimage.data", "scikit-image"), name)()
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1).float() / 255


@cache
def stained_tissue() -> tuple[Tensor, Tensor]:
    """An immunohistochemistry image in grey (1, 512, 512), and a mask of its brown stain, bool (512, 512), by colour separation.

    The threshold is Otsu's on the DAB channel; the model sees only the grey image.
    """
    import numpy as np

    pixels = _package("skimage.data", "scikit-image").immunohistochemistry()
    dab = _package("skimage.color", "scikit-image").rgb2hed(pixels)[..., 2]
    level = _package("skimage.filters", "scikit-image").threshold_otsu(dab)
    grey = torch.from_numpy(pixels.copy()).float().mean(-1)[None] / 255
    return grey, torch.from_numpy(np.asarray(dab > level))


def crops(image: Tensor, size: int, n: int, *, seed: int = 0) -> Tensor:
    """`n` random square crops (n, channels, size, size) of an image (channels, height, width).

    Raises ValueError when the image is smaller or `n` below 1, TypeError for anything but an image or a whole number.

    >>> crops(torch.zeros(3, 40, 60), 16, 2).shape
    torch.Size([2, 3, 16, 16])
    """
    checks.tensor("image", image, shape=("channels", "height", "width"), dtype="any")
    height, width = image.shape[-2:]
    size, n = checks.whole("size", size, low=1, high=min(height, width)), checks.whole("n", n, low=1)
    generator = torch.Generator().manual_seed(checks.whole("seed", seed))
    tops = torch.randint(height - size + 1, (n,), generator=generator).tolist()
    lefts = torch.randint(width - size + 1, (n,), generator=generator).tolist()
    return torch.stack([image[..., t : t + size, x : x + size] for t, x in zip(tops, lefts, strict=True)])


def clip(image: Tensor, frames: int, size: int, *, seed: int = 0) -> Tensor:
    """A moving crop of a photograph: (frames, channels, size, size), panning and zooming smoothly. The stand-in for a video.

    `image` is floating-point (channels, height, width). Raises ValueError for counts below 1, TypeError for anything but an image or
    a whole number.

    >>> clip(torch.zeros(3, 40, 60), 4, 16).shape
    torch.Size([4, 3, 16, 16])
    """
    from torch.nn.functional import affine_grid, grid_sample

    checks.tensor("image", image, shape=("channels", "height", "width"))
    frames, size = checks.whole("frames", frames, low=1), checks.whole("size", size, low=1)
    generator = torch.Generator().manual_seed(checks.whole("seed", seed))
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
