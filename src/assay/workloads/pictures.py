"""PhotoCrops: which of twelve photographs is this crop from? Real images with a label, from installed packages (extra `assay[vision]`).

Every photograph is cut into three upright parts that share no pixel: crops to train on come from the left half, crops for choices
(learning rates) from the next fifth, and crops to judge on from the rest. The twelve photographs are what is sampled: an interval is over
them (and over seeds), never over crops.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from assay import checks
from assay.paths import atomic_dir, cache_dir
from assay.workloads.images import PHOTOGRAPHS, photograph

Part = Literal["train", "choose", "heldout"]
PARTS: dict[str, tuple[float, float]] = {"train": (0.0, 0.5), "choose": (0.5, 0.7), "heldout": (0.7, 1.0)}
GREY = ("brick", "camera", "coins", "grass", "gravel")
COLOUR = ("hubble_deep_field",)
PICTURES = (*PHOTOGRAPHS, *GREY, *COLOUR)
CHANCE = 1 / len(PICTURES)
LARGEST = 60  # pixels a side: the part of the narrowest photograph (300 pixels) for choices is as wide as that


@cache
def picture(name: str) -> Tensor:
    """One photograph (3, height, width) in [0, 1]; a grey one has three equal channels. Names in `PICTURES`."""
    checks.choice("name", name, PICTURES)
    if name in PHOTOGRAPHS:
        return photograph(name)
    photograph(PHOTOGRAPHS[2])  # says how to get scikit-image where it is missing
    from skimage import data

    pixels = torch.from_numpy(getattr(data, name)().copy()).float() / 255
    return pixels.expand(3, -1, -1) if pixels.ndim == 2 else pixels.permute(2, 0, 1)


def photo_crops(part: Part, n: int, *, size: int = 48, seed: int = 0, colour: bool = False) -> tuple[Tensor, Tensor]:
    """`n` crops of each photograph, float32 (12 n, 1 or 3, size, size), and the photograph each is from, int64 (12 n,), in order.

    Each crop has mean 0 and deviation 1 over its pixels, so that brightness and contrast give nothing away; grey unless `colour`.
    Raises ValueError for another part, fewer than one crop, and crops of more than 60 pixels.

    >>> images, labels = photo_crops("heldout", 2, size=32)
    >>> images.shape, labels.unique().numel()
    (torch.Size([24, 1, 32, 32]), 12)
    """
    checks.choice("part", part, PARTS)
    checks.whole("n", n, low=1)
    checks.whole("size", size, low=4, high=LARGEST)
    generator = torch.Generator().manual_seed(seed)
    found = []
    for name in PICTURES:
        whole = picture(name) if colour else picture(name).mean(0, keepdim=True)
        left, right = (int(share * whole.shape[2]) for share in PARTS[part])
        tops = torch.randint(whole.shape[1] - size + 1, (n,), generator=generator).tolist()
        lefts = torch.randint(left, right - size + 1, (n,), generator=generator).tolist()
        found += [whole[:, y : y + size, x : x + size] for y, x in zip(tops, lefts, strict=True)]
    images = torch.stack(found)
    mean = images.mean((1, 2, 3), keepdim=True)
    deviation = images.std((1, 2, 3), keepdim=True).clamp(min=1e-3)  # a patch of empty sky
    return (images - mean) / deviation, torch.arange(len(PICTURES)).repeat_interleave(n)


BUNDLED = 60  # crops of each photograph in the folder of `bundled_pictures`


def bundled_pictures() -> Path:
    """A folder of the crops to judge on, in colour, as PNG files in subfolders by photograph; written into the cache the first time.

    It is what `assay tune` takes for an image model where the user names no pictures of his own.
    """
    from PIL import Image

    folder = cache_dir() / "pictures" / f"photo-crops-{BUNDLED}"
    if not folder.is_dir():
        generator = torch.Generator().manual_seed(0)
        with atomic_dir(folder) as temporary:
            for name in PICTURES:
                (temporary / name).mkdir()
                whole = (255 * picture(name)).round().to(torch.uint8)
                left, right = (int(share * whole.shape[2]) for share in PARTS["heldout"])
                for number in range(BUNDLED):
                    y = int(torch.randint(whole.shape[1] - LARGEST + 1, (), generator=generator))
                    x = int(torch.randint(left, right - LARGEST + 1, (), generator=generator))
                    crop = whole[:, y : y + LARGEST, x : x + LARGEST].permute(1, 2, 0).contiguous()
                    Image.fromarray(crop.numpy()).save(temporary / name / f"{number:03}.png")
    return folder
