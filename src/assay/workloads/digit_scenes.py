"""DigitScenes: handwritten digits on photographs of textures, with exact boxes and masks. Real images from packages (`assay[vision]`).

One to eight of scikit-learn's digits (8 x 8 pixels), two to six times as large, stand on grass, gravel or brick. Parts share neither a
digit nor a pixel of the textures: scenes to train on, scenes for choices (learning rates, thresholds), scenes to judge on. Scenes are
what an interval is over.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from assay import checks
from assay.workloads.images import digits
from assay.workloads.pictures import PARTS, Part, picture

TEXTURES = ("grass", "gravel", "brick")
CLASSES = 10
SCALES = (2.0, 6.0)  # a digit's side over the 8 pixels that it was written in
MOST = 8  # digits of a scene
TOUCHING = 0.1  # of the smaller digit's box that may be covered by another
INK = 0.5  # of full ink: where a pixel belongs to the digit


@dataclass(frozen=True)
class Scene:
    """An image (3, size, size) in [0, 1] and its n digits: boxes (n, 4) left, top, right, bottom in pixels, right and bottom behind
    the last one; labels int64 (n,); masks bool (n, size, size), of pixels that are seen. No two masks share a pixel."""

    image: Tensor
    boxes: Tensor
    labels: Tensor
    masks: Tensor

    @property
    def semantic(self) -> Tensor:
        """The class of each pixel, int64 (size, size): 0 the texture, 1 to 10 the digits 0 to 9."""
        return (self.masks.long() * (self.labels + 1)[:, None, None]).sum(0)

    @property
    def panoptic(self) -> Tensor:
        """Class as in `semantic`, and instance (1 to n; 0 for the texture), int64 (size, size, 2)."""
        instance = (self.masks.long() * torch.arange(1, len(self.labels) + 1)[:, None, None]).sum(0)
        return torch.stack([self.semantic, instance], -1)


def digit_scenes(part: Part, n: int, *, size: int = 128, most: int = MOST, seed: int = 0) -> list[Scene]:
    """`n` scenes of a part ("train", "choose", "heldout"), always the same ones for a seed.

    Raises ValueError for another part, fewer than one scene, sizes below 64 or above 256 pixels, and `most` outside 1 to 8.

    >>> scene = digit_scenes("heldout", 1, size=64)[0]
    >>> scene.image.shape, scene.boxes.shape[0] == len(scene.labels)
    (torch.Size([3, 64, 64]), True)
    """
    checks.choice("part", part, PARTS)
    checks.whole("n", n, low=1)
    checks.whole("size", size, low=64, high=256)
    checks.whole("most", most, low=1, high=MOST)
    generator = torch.Generator().manual_seed(seed)
    return [_scene(part, size, most, generator) for _ in range(n)]


@cache
def _digits_of(part: str) -> tuple[Tensor, Tensor]:
    """Digits in an order that does not depend on who asks, cut as the textures are."""
    images, labels = digits()
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    low, high = (int(share * len(images)) for share in PARTS[part])
    return images[order[low:high]], labels[order[low:high]]


def _scene(part: str, size: int, most: int, generator: torch.Generator) -> Scene:
    def draw(high: int, low: int = 0) -> int:
        return int(torch.randint(low, high, (), generator=generator))

    def between(low: float, high: float) -> float:
        return low + (high - low) * float(torch.rand((), generator=generator))

    image = _ground(part, TEXTURES[draw(len(TEXTURES))], size, generator)
    pictures, names = _digits_of(part)
    boxes: list[Tensor] = []
    labels: list[int] = []
    masks: list[Tensor] = []
    for _ in range(draw(most + 1, 1)):
        which, side = draw(len(names)), round(8 * between(*SCALES))
        ink = F.interpolate(pictures[which][None], size=(side, side), mode="bilinear", align_corners=False)[0, 0]
        shape = ink > INK
        if not shape.any():
            continue
        rows, columns = shape.any(1).nonzero()[:, 0], shape.any(0).nonzero()[:, 0]
        for _ in range(20):  # places to try
            y, x = draw(size - side + 1), draw(size - side + 1)
            box = torch.tensor([x + columns[0], y + rows[0], x + columns[-1] + 1, y + rows[-1] + 1]).float()
            if all(_covered(box, other) <= TOUCHING for other in boxes):
                break
        else:
            continue
        colour = torch.rand(3, 1, 1, generator=generator)
        bright = image[:, y : y + side, x : x + side].mean()
        colour = 0.3 * colour + (0.7 if bright < 0.5 else 0.0)  # light on dark, dark on light
        there = image[:, y : y + side, x : x + side]
        image[:, y : y + side, x : x + side] = there + ink * (colour - there)
        mask = torch.zeros(size, size, dtype=torch.bool)
        mask[y : y + side, x : x + side] = shape
        for other in masks:
            other &= ~mask
        boxes.append(box)
        labels.append(int(names[which]))
        masks.append(mask)
    return Scene(image, _tight(masks, boxes), torch.tensor(labels), torch.stack(masks))


def _ground(part: str, texture: str, size: int, generator: torch.Generator) -> Tensor:
    """A piece of a texture's part; where the part is narrower than the scene it goes on mirrored."""
    whole = picture(texture)
    left, right = (int(share * whole.shape[2]) for share in PARTS[part])
    strip = whole[:, :, left:right]
    if strip.shape[2] < size:
        strip = torch.cat([strip, strip.flip(2)] * (-(-size // (2 * strip.shape[2]))), 2)
    y = int(torch.randint(strip.shape[1] - size + 1, (), generator=generator))
    x = int(torch.randint(strip.shape[2] - size + 1, (), generator=generator))
    return strip[:, y : y + size, x : x + size].clone()


def _covered(box: Tensor, other: Tensor) -> float:
    """The share of the smaller box that both have."""
    shared = (torch.minimum(box[2:], other[2:]) - torch.maximum(box[:2], other[:2])).clamp(min=0).prod()
    return float(shared / torch.minimum((box[2:] - box[:2]).prod(), (other[2:] - other[:2]).prod()))


def _tight(masks: list[Tensor], boxes: list[Tensor]) -> Tensor:
    """Boxes around what is seen of each digit, for a later one may have covered an edge."""
    found = []
    for mask, box in zip(masks, boxes, strict=True):
        rows, columns = mask.any(1).nonzero()[:, 0], mask.any(0).nonzero()[:, 0]
        seen = len(rows) > 0
        found.append(torch.tensor([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]).float() if seen else box)
    return torch.stack(found)
