"""Who says where to look. A proposer is any callable of an image (3, H, W) in [0, 1] that returns boxes (n, 4) in its pixels.

`DetectorBoxes` is the paper's, around any detector. `GradientBoxes` needs no training and finds what stands out from a calm ground.
`PointGrid` is the baseline: no proposer, but the grid of points of SAM's own mask generator with its three filters.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from assay import checks
from assay.methods.core.vision.boxes import nms

Proposer = Callable[[Tensor], Tensor]
FLAT = 1e-3  # a slope that rounding may make


@dataclass(frozen=True)
class PointGrid:
    """SAM's grid: `side` x `side` points, three masks each, of which those are kept that pass all of

    - a predicted IoU above `iou`,
    - a stability above `stability`: the IoU of the mask with a threshold raised and lowered by `offset`,
    - suppression among the boxes of the masks at an IoU of `overlap`, the best predicted IoU first.

    The defaults are SAM's. Raises TypeError or ValueError for settings out of range.
    """

    side: int = 32
    iou: float = 0.88
    stability: float = 0.95
    offset: float = 1.0
    overlap: float = 0.7

    def __post_init__(self) -> None:
        checks.whole("side", self.side, low=1)
        checks.number("iou", self.iou)
        checks.number("stability", self.stability, low=0, high=1)
        checks.number("offset", self.offset, above=0)
        checks.number("overlap", self.overlap, low=0, high=1)

    def points(self, height: int, width: int) -> Tensor:
        """The middles of the grid's cells, (side^2, 2) x and y, row by row."""
        at = (torch.arange(self.side) + 0.5) / self.side
        y, x = torch.meshgrid(at * height, at * width, indexing="ij")
        return torch.stack([x, y], -1).flatten(0, 1)


class DetectorBoxes:
    """The boxes of an object detector whatever the class, as the paper takes them: of a score above 0.4, suppressed at an IoU of 0.9.

    `detector(image)` returns boxes (n, 4) in pixels of the image and scores (n,): as a pair, or as a mapping of "boxes" and "scores"
    (which is what torchvision's detectors, and transformers' post-processing, give for an image). It is called without gradients.
    Returns boxes (kept, 4), the highest score first. Suppression at 0.9 removes near-copies only.

    Raises TypeError for a detector that is not callable or returns anything else, ValueError for other shapes or numbers.

    >>> boxes = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 10.5], [20, 0, 30, 10], [0, 20, 5, 25]])
    >>> DetectorBoxes(lambda image: (boxes, torch.tensor([0.8, 0.9, 0.5, 0.3])))(torch.zeros(3, 40, 40)).tolist()
    [[0.0, 0.0, 10.0, 10.5], [20.0, 0.0, 30.0, 10.0]]
    """

    def __init__(self, detector: Callable[[Tensor], Any], *, confidence: float = 0.4, overlap: float = 0.9) -> None:
        if not callable(detector):
            raise TypeError(f"detector must be callable with an image, got {checks.shown(detector)}")
        self.detector = detector
        self.confidence = checks.number("confidence", confidence)
        self.overlap = checks.number("overlap", overlap, low=0, high=1)

    @torch.no_grad()
    def __call__(self, image: Tensor) -> Tensor:
        found = self.detector(image)
        if isinstance(found, Mapping) and {"boxes", "scores"} <= found.keys():
            boxes, scores = found["boxes"], found["scores"]
        elif isinstance(found, tuple | list) and len(found) == 2:
            boxes, scores = found
        else:
            raise TypeError(f"detector must return boxes and scores, got {checks.shown(found)}")
        checks.tensor("boxes of the detector", boxes, shape=("boxes", 4), finite=True, empty=True)
        checks.tensor("scores of the detector", scores, shape=(len(boxes),), finite=True, empty=True)
        sure = scores > self.confidence
        boxes, scores = boxes[sure], scores[sure]
        return boxes[nms(boxes, scores, self.overlap)]


class GradientBoxes:
    """Boxes around the connected components of a gradient map: no training, for objects on a calm ground (the thresholds are our choice).

    The image is scaled down to at most `side` pixels, blurred by `blur` x `blur`, and differentiated (Sobel; of the colours the largest).
    A pixel counts where its gradient lies more than `deviations` standard deviations above the mean; pixels that touch, also by a
    corner, are one component. Components of fewer than `least` pixels are left out. Boxes come largest component first.

    When not to use it: on textured ground, whose own gradients join everything. The image must not be smaller than `blur`.
    """

    def __init__(self, *, side: int = 256, blur: int = 5, deviations: float = 1.0, least: int = 12) -> None:
        self.side = checks.whole("side", side, low=8, high=4096)
        self.blur = checks.whole("blur", blur, low=1)
        if self.blur % 2 == 0:
            raise ValueError(f"blur must be odd, got {blur}")
        self.deviations = checks.number("deviations", deviations)
        self.least = checks.whole("least", least, low=1)

    @torch.no_grad()
    def __call__(self, image: Tensor) -> Tensor:
        checks.tensor("image", image, shape=("channels", "height", "width"))
        small = image.float()[:, None]
        share = min(1.0, self.side / max(image.shape[1:]))
        if share < 1:
            size = [max(round(share * edge), 1) for edge in image.shape[1:]]
            small = F.interpolate(small, size, mode="bilinear", antialias=True)
        if min(small.shape[2:]) < self.blur:
            raise ValueError(f"image must be at least blur={self.blur} pixels a side, got {tuple(small.shape[2:])}")
        half = self.blur // 2
        calm = F.avg_pool2d(F.pad(small, [half] * 4, mode="replicate"), self.blur, 1)
        sobel = torch.tensor([[-1.0, 0, 1], [-2, 0, 2], [-1, 0, 1]], device=image.device)
        slopes = F.conv2d(F.pad(calm, [1] * 4, mode="replicate"), torch.stack([sobel, sobel.T])[:, None])
        steep = slopes.square().sum(1).sqrt().amax(0)
        labels = components(steep > (steep.mean() + self.deviations * steep.std()).clamp(min=FLAT))
        boxes = _boxes_of(labels, self.least)
        factors = torch.tensor(
            [image.shape[2] / small.shape[3], image.shape[1] / small.shape[2]] * 2, device=image.device
        )
        return boxes * factors


def components(mask: Tensor) -> Tensor:
    """Connected components of a mask bool (H, W), pixels that touch by an edge or a corner: int64 (H, W), 0 outside, else 1 to n.

    Labels spread from pixel to pixel, so its time grows with the longest path inside a component. At most 2^24 pixels.

    >>> components(torch.tensor([[True, False, False], [False, True, False], [False, False, False], [True, True, False]]))
    tensor([[1, 0, 0],
            [0, 1, 0],
            [0, 0, 0],
            [2, 2, 0]])
    """
    checks.tensor("mask", mask, ndim=2, dtype="bool")
    if mask.numel() > 1 << 24:  # float32 counts no further
        raise ValueError(f"mask must have at most {1 << 24} pixels, got {mask.numel()}")
    inside = mask.float()[None, None]
    labels = torch.arange(mask.numel(), 0, -1, device=mask.device).view(1, 1, *mask.shape) * inside
    while True:
        wider = F.max_pool2d(labels, 3, 1, 1) * inside
        if torch.equal(wider, labels):
            break
        labels = wider
    names, which = labels[0, 0].unique(
        return_inverse=True
    )  # rising; the first component in reading order has the highest
    return torch.where(mask, len(names) - which, 0)


def _boxes_of(labels: Tensor, least: int) -> Tensor:
    """Boxes (n, 4) of components of at least `least` pixels, the largest first."""
    rows, columns = labels.nonzero().unbind(1)
    which = labels[rows, columns] - 1
    sizes = which.bincount()
    ends = []
    for at, how in ((columns, "amin"), (rows, "amin"), (columns + 1, "amax"), (rows + 1, "amax")):
        empty = torch.zeros(len(sizes), dtype=at.dtype, device=at.device)
        ends.append(empty.scatter_reduce(0, which, at, how, include_self=False))
    order = sizes.argsort(descending=True, stable=True)
    return torch.stack(ends, 1).float()[order[sizes[order] >= least]]


def snap_boxes(boxes: Tensor, size: tuple[int, int], within: float) -> Tensor:
    """Boxes (..., 4) whose edges nearer than `within` pixels to the image's border, or beyond it, are moved onto it.

    `size` is (height, width). Left and top below `within` become 0; right above width - `within` becomes the width, bottom likewise.

    >>> snap_boxes(torch.tensor([[19.0, 20, 81, 80]]), (100, 100), 20)
    tensor([[  0.,  20., 100.,  80.]])
    """
    checks.tensor("boxes", boxes, shape=("...", 4), empty=True)
    within = checks.number("within", within, low=0)
    height, width = (checks.whole("size", side, low=1) for side in size)
    left, top, right, bottom = boxes.unbind(-1)
    return torch.stack(
        [
            left.masked_fill(left < within, 0),
            top.masked_fill(top < within, 0),
            right.masked_fill(right > width - within, width),
            bottom.masked_fill(bottom > height - within, height),
        ],
        -1,
    )
