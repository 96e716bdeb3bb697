"""Boxes: formats, overlaps, and non-maximum suppression. Boxes are (left, top, right, bottom) in pixels unless a name says otherwise.

All of it is plain torch, for torchvision is not needed elsewhere.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from assay import checks


def to_corners(boxes: Tensor) -> Tensor:
    """(..., 4) of centre x, centre y, width, height to left, top, right, bottom."""
    x, y, width, height = boxes.unbind(-1)
    return torch.stack([x - width / 2, y - height / 2, x + width / 2, y + height / 2], -1)


def to_centres(boxes: Tensor) -> Tensor:
    """The inverse of `to_corners`."""
    left, top, right, bottom = boxes.unbind(-1)
    return torch.stack([(left + right) / 2, (top + bottom) / 2, right - left, bottom - top], -1)


def area(boxes: Tensor) -> Tensor:
    """(...,) for boxes (..., 4); 0 where right lies left of left, or bottom above top."""
    return (boxes[..., 2:] - boxes[..., :2]).clamp(min=0).prod(-1)


def iou(boxes: Tensor, others: Tensor) -> Tensor:
    """Intersection over union of boxes that stand beside each other, shapes (..., 4) that broadcast; 0 for two empty boxes.

    All pairs of two lists: `iou(boxes[:, None], others)`.
    """
    shared, union = _shared(boxes, others)
    return shared / union.clamp(min=torch.finfo(union.dtype).tiny)


def generalized_iou(boxes: Tensor, others: Tensor) -> Tensor:
    """GIoU (Rezatofighi et al. 2019), from -1 to 1: the IoU less the share of the hull that neither box fills. As `iou` otherwise."""
    shared, union = _shared(boxes, others)
    tiny = torch.finfo(union.dtype).tiny
    hull = (
        (torch.maximum(boxes[..., 2:], others[..., 2:]) - torch.minimum(boxes[..., :2], others[..., :2]))
        .clamp(min=0)
        .prod(-1)
    )
    return shared / union.clamp(min=tiny) - (hull - union) / hull.clamp(min=tiny)


def complete_iou(boxes: Tensor, others: Tensor, *, eps: float = 1e-7) -> Tensor:
    """CIoU (Zheng et al. 2020): the IoU less the squared distance of the centres over that of the hull's corners, less a term of shape.

    The weight of the term of shape passes no gradient on, as in the paper.
    """
    overlap = iou(boxes, others)
    hull = torch.maximum(boxes[..., 2:], others[..., 2:]) - torch.minimum(boxes[..., :2], others[..., :2])
    between = (boxes[..., :2] + boxes[..., 2:] - others[..., :2] - others[..., 2:]) / 2
    (width, height), (w, h) = ((each[..., 2:] - each[..., :2]).clamp(min=eps).unbind(-1) for each in (boxes, others))
    shape = 4 / math.pi**2 * (torch.atan(w / h) - torch.atan(width / height)) ** 2
    with torch.no_grad():
        weight = shape / (1 - overlap + shape).clamp(min=eps)
    return overlap - between.square().sum(-1) / hull.square().sum(-1).clamp(min=eps) - weight * shape


def _shared(boxes: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
    shared = (
        (torch.minimum(boxes[..., 2:], others[..., 2:]) - torch.maximum(boxes[..., :2], others[..., :2]))
        .clamp(min=0)
        .prod(-1)
    )
    return shared, area(boxes) + area(others) - shared


def nms(boxes: Tensor, scores: Tensor, threshold: float) -> Tensor:
    """Greedy non-maximum suppression: indices (kept,) of boxes (n, 4), the highest score first; of equal scores the earlier box.

    A box goes when its IoU with one that is kept is above `threshold`. Raises ValueError for other shapes or a threshold outside [0, 1].

    >>> nms(torch.tensor([[0.0, 0, 10, 10], [1, 0, 11, 10], [20, 0, 30, 10]]), torch.tensor([0.5, 0.9, 0.1]), 0.5)
    tensor([1, 2])
    """
    threshold = checks.number("threshold", threshold, low=0, high=1)
    if boxes.ndim != 2 or boxes.shape[1] != 4 or scores.shape != boxes.shape[:1]:
        raise ValueError(f"boxes must be (n, 4) and scores (n,), got {tuple(boxes.shape)} and {tuple(scores.shape)}")
    order = scores.argsort(descending=True, stable=True)
    kept = []
    while len(order):  # a pass for each box that is kept: few, where suppression is of use
        best, order = order[0], order[1:]
        kept.append(best)
        order = order[iou(boxes[best], boxes[order]) <= threshold]
    return torch.stack(kept) if kept else order


def batched_nms(boxes: Tensor, scores: Tensor, groups: Tensor, threshold: float) -> Tensor:
    """`nms` inside each group (n,) by itself (classes, crops): indices over all of them, the highest score first."""
    if not len(boxes):
        return nms(boxes, scores, threshold)
    found = []
    for group in groups.unique():
        of = (groups == group).nonzero()[:, 0]
        found.append(of[nms(boxes[of], scores[of], threshold)])
    kept = torch.cat(found).sort().values
    return kept[scores[kept].argsort(descending=True, stable=True)]


def masks_to_boxes(masks: Tensor) -> Tensor:
    """Tight boxes (n, 4) float32 around masks (n, height, width), right and bottom behind the last pixel; zeros for an empty mask."""
    rows, columns = masks.bool().any(2), masks.bool().any(1)
    found = torch.stack([_first(columns), _first(rows), _behind(columns), _behind(rows)], 1).float()
    return found * rows.any(1)[:, None]


def _first(hits: Tensor) -> Tensor:
    return hits.int().argmax(1)


def _behind(hits: Tensor) -> Tensor:
    return hits.shape[1] - hits.flip(1).int().argmax(1)
