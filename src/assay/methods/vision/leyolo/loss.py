"""What the detector learns by: cells are assigned to objects by how well they do already; CIoU, a loss over bins, and cross-entropy.

The recipe of YOLOv8, which LeYOLO was trained with as it is: task-aligned assignment (Feng et al. 2021), distribution focal loss (Li et
al. 2020). Everything is float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from assay import checks
from assay.methods.core.vision.boxes import complete_iou
from assay.methods.vision.leyolo.blocks import BINS
from assay.methods.vision.leyolo.model import LeYOLO, corners

TOP, ALPHA, BETA = 10, 0.5, 6.0
BOX, LABEL, DISTRIBUTION = 7.5, 0.5, 1.5  # what the three losses are multiplied by
EPS = 1e-9


@dataclass(frozen=True)
class Assigned:
    """For each cell, (B, N): `to`, the object it is to find, -1 for none; `target` in [0, 1], the score it should give the class."""

    to: Tensor
    target: Tensor


@torch.no_grad()
def assign(
    scores: Tensor, boxes: Tensor, points: Tensor, truths: Tensor, labels: Tensor, real: Tensor,
    *, top: int = TOP, alpha: float = ALPHA, beta: float = BETA,
) -> Assigned:  # fmt: skip
    """Task-aligned assignment of N cells to M objects in each of B images.

    `scores` (B, N, classes) in [0, 1] and `boxes` (B, N, 4) are what the cells say, `points` (N, 2) their centres; `truths` (B, M, 4) and
    `labels` (B, M) the objects, of which those that are `real` (B, M) count. For an object, a cell whose centre lies inside it is
    worth score ** alpha * CIoU ** beta, the score being that of the object's class, a CIoU below 0 counting as 0. Each object takes
    the `top` cells that are worth most; a cell that several take goes to the object it overlaps most of all that it lies in. Its target
    is its worth, scaled so that the object's best cell gets the largest CIoU among the object's cells. A cell worth nothing is
    not assigned (our choice; in the released code it is, with a target of 0).
    """
    at = ((points - truths[..., None, :2]).amin(-1) > EPS) & (
        (truths[..., None, 2:] - points).amin(-1) > EPS
    )  # B, M, N
    image, thing, cell = (at & real[..., None]).nonzero(as_tuple=True)
    overlaps = boxes.new_zeros(at.shape)
    overlaps[image, thing, cell] = complete_iou(boxes[image, cell], truths[image, thing]).clamp(min=0)
    worth = boxes.new_zeros(at.shape)
    said = scores[image, cell, labels[image, thing]]
    worth[image, thing, cell] = said**alpha * overlaps[image, thing, cell] ** beta
    if not worth.shape[1]:
        none = torch.full(scores.shape[:2], -1, device=scores.device)
        return Assigned(none, scores.new_zeros(none.shape))
    best = worth.topk(min(top, worth.shape[2]), -1)
    taken = torch.zeros_like(worth, dtype=torch.bool).scatter_(-1, best.indices, best.values > 0)
    fought = taken.sum(1, keepdim=True) > 1
    nearest = torch.zeros_like(taken).scatter_(1, overlaps.argmax(1, keepdim=True), True)
    taken = torch.where(fought, nearest, taken)
    worth, overlaps = worth * taken, overlaps * taken
    target = (worth * overlaps.amax(-1, keepdim=True) / (worth.amax(-1, keepdim=True) + EPS)).amax(1)
    return Assigned(torch.where(taken.any(1), taken.int().argmax(1), -1), target)


def distribution_loss(logits: Tensor, wanted: Tensor) -> Tensor:
    """Cross-entropy of bins (..., 16) with the two bins around `wanted` (...), from 0 up to and without 15, weighted by nearness."""
    left = wanted.long()
    share = wanted - left
    logs = logits.log_softmax(-1)
    one, other = (logs.gather(-1, each[..., None])[..., 0] for each in (left, left + 1))
    return -(one * (1 - share) + other * share)


@dataclass(frozen=True)
class Losses:
    """The three losses of a batch, weighted; `total` is their sum."""

    box: Tensor
    label: Tensor
    distribution: Tensor

    @property
    def total(self) -> Tensor:
        return self.box + self.label + self.distribution


def losses(model: LeYOLO, maps: Sequence[Tensor], boxes: Sequence[Tensor], labels: Sequence[Tensor]) -> Losses:
    """Losses of the maps that `model` gave of a batch, for the true boxes (n, 4) in pixels and labels (n,) of each image; n may be 0.

    Each is a sum over cells and over images, divided by the sum of all targets (1 at least); the released trainer multiplies the total by
    the number of images. Distances beyond 14.99 strides are learnt as 14.99. Raises ValueError or TypeError for boxes without
    area, labels outside of the classes, and other shapes.

    >>> from assay.methods.vision.leyolo import leyolo
    >>> model = leyolo("nano", num_classes=10, width=0.25)
    >>> found = losses(model, model(torch.zeros(1, 3, 64, 64)), [torch.tensor([[8.0, 8, 40, 40]])], [torch.tensor([3])])
    >>> bool(found.total > 0)
    True
    """
    distances, logits = model.raw(maps)
    points, strides = model.cells(maps)
    truths, classes, real = _padded(boxes, labels, len(logits), model.num_classes, logits)
    reach = distances.softmax(-1) @ model.head.bins.float()
    guesses = corners(reach, points, strides)
    assigned = assign(logits.detach().sigmoid(), guesses.detach(), points, truths, classes, real)
    image, cell = (assigned.to >= 0).nonzero(as_tuple=True)
    thing = assigned.to[image, cell]
    targets, weight = torch.zeros_like(logits), assigned.target[image, cell]
    targets[image, cell, classes[image, thing]] = weight
    whole = targets.sum().clamp(min=1)
    label = F.binary_cross_entropy_with_logits(logits, targets, reduction="sum") / whole
    wanted, here, step = truths[image, thing], points[cell], strides[cell]
    box = ((1 - complete_iou(guesses[image, cell] / step, wanted / step)) * weight).sum() / whole
    away = torch.cat([here - wanted[:, :2], wanted[:, 2:] - here], -1) / step
    bins = distribution_loss(distances[image, cell], away.clamp(0, BINS - 1 - 0.01)).mean(-1)
    return Losses(BOX * box, LABEL * label, DISTRIBUTION * (bins * weight).sum() / whole)


def _padded(
    boxes: Sequence[Tensor], labels: Sequence[Tensor], images: int, classes: int, like: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Objects of all images, (B, M, ...), and which of them are real."""
    if not len(boxes) == len(labels) == images:
        raise ValueError(
            f"boxes and labels must have one entry for each of {images} images, got {len(boxes)}, {len(labels)}"
        )
    most = max((len(each) for each in boxes), default=0)
    truths = torch.zeros(images, most, 4, device=like.device)
    names = torch.zeros(images, most, dtype=torch.long, device=like.device)
    real = torch.zeros(images, most, dtype=torch.bool, device=like.device)
    for at, (box, label) in enumerate(zip(boxes, labels, strict=True)):
        checks.tensor("boxes", box, shape=("n", 4), finite=True, empty=True)
        checks.tensor("labels", label, shape=(len(box),), dtype="integer", empty=True)
        if not bool((box[:, 2:] > box[:, :2]).all()):
            raise ValueError("boxes must be left, top, right, bottom with an area")
        if len(label) and not 0 <= int(label.min()) <= int(label.max()) < classes:
            raise ValueError(f"labels must be 0 to {classes - 1}, got {int(label.min())} to {int(label.max())}")
        truths[at, : len(box)], names[at, : len(box)], real[at, : len(box)] = box, label, True
    return truths, names, real
