"""Mask2Former's loss, with which PEM is trained: queries are matched with objects, and masks compared at sampled points."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from assay import checks
from assay.methods.vision.pem.attention import without_autocast
from assay.methods.vision.pem.network import Predictions


@dataclass(frozen=True)
class LossSettings:
    """The published weights and numbers of points: `oversample` times as many are drawn, of which those where the mask is least certain
    make up the share `importance`, and others, drawn anew, the rest."""

    class_weight: float = 2.0
    mask_weight: float = 5.0
    dice_weight: float = 5.0
    no_object: float = 0.1
    points: int = 12544
    oversample: float = 3.0
    importance: float = 0.75


PUBLISHED = LossSettings()


def set_loss(
    found: Predictions, labels: Sequence[Tensor], masks: Sequence[Tensor], *, settings: LossSettings = PUBLISHED
) -> Tensor:
    """The loss of a batch, summed over the last and all auxiliary predictions: a scalar.

    labels: for each image int64 (n,), masks: bool or 0 and 1, (n, height, width). Each object gets the query of its own that makes
    the sum of costs least (class, mask and dice, at random points; scipy, `assay[vision]`). Then: cross-entropy of the classes, where
    queries without an object have the class "none" at the weight `no_object`, binary cross-entropy and dice of the masks at sampled
    points, each over the number of objects. Points are drawn from torch's generator.

    Raises ValueError for labels and masks that do not fit each other or the batch.
    """
    batch = len(found.class_logits)
    if len(labels) != batch or len(masks) != batch:
        raise ValueError(
            f"labels and masks must have one entry for each of {batch} images, got {len(labels)} and {len(masks)}"
        )
    for one, mask in zip(labels, masks, strict=True):
        checks.tensor("labels", one, ndim=1, dtype="integer", empty=True)
        checks.tensor("masks", mask, shape=(len(one), "height", "width"), dtype="any", empty=True)
    truth = [mask.to(found.mask_logits.dtype) for mask in masks]
    return torch.stack([_loss(each, labels, truth, settings) for each in [found, *found.auxiliary]]).sum()


def match_queries(
    found: Predictions, labels: Sequence[Tensor], masks: Sequence[Tensor], *, settings: LossSettings = PUBLISHED
) -> list[tuple[Tensor, Tensor]]:
    """For each image the queries and the objects that go together: two int64 tensors of equal length."""
    from scipy.optimize import linear_sum_assignment

    pairs = []
    with torch.no_grad(), without_autocast(found.mask_logits.device.type):
        points = torch.rand(len(labels), settings.points, 2, device=found.mask_logits.device)
        guesses = at_points(found.mask_logits, points).float()
        chances = found.class_logits.float().softmax(-1)
        for image, (label, mask) in enumerate(zip(labels, masks, strict=True)):
            there = at_points(mask[None], points[image : image + 1])[0].float()
            guess = guesses[image]
            entropy = (F.softplus(guess).sum(1, keepdim=True) - guess @ there.T) / settings.points
            share = guess.sigmoid()
            dice = 1 - (2 * share @ there.T + 1) / (share.sum(1, keepdim=True) + there.sum(1) + 1)
            cost = settings.mask_weight * entropy + settings.dice_weight * dice
            cost = cost - settings.class_weight * chances[image][:, label]
            queries, objects = linear_sum_assignment(cost.cpu().numpy())
            device = guess.device
            pairs.append((torch.as_tensor(queries, device=device), torch.as_tensor(objects, device=device)))
    return pairs


def at_points(masks: Tensor, points: Tensor) -> Tensor:
    """Masks (B, n, H, W) at points (B, P, 2) of column and row in 0 to 1, between pixels bilinearly: (B, n, P)."""
    return F.grid_sample(masks, 2 * points[:, :, None].to(masks.dtype) - 1, align_corners=False)[..., 0]


def _loss(found: Predictions, labels: Sequence[Tensor], masks: Sequence[Tensor], settings: LossSettings) -> Tensor:
    pairs = match_queries(found, labels, masks, settings=settings)
    classes = found.class_logits.shape[-1] - 1
    wanted = torch.full(found.class_logits.shape[:2], classes, device=found.class_logits.device)
    for image, (queries, objects) in enumerate(pairs):
        wanted[image, queries] = labels[image][objects]
    weight = torch.ones(classes + 1, device=wanted.device)
    weight[-1] = settings.no_object
    total = settings.class_weight * F.cross_entropy(found.class_logits.float().transpose(1, 2), wanted, weight)
    guesses = torch.cat([found.mask_logits[image, queries] for image, (queries, _) in enumerate(pairs)])[:, None]
    if not len(guesses):
        return total + 0 * found.mask_logits.sum()
    with torch.no_grad():
        points = uncertain_points(guesses, settings)
        truth = torch.cat(
            [
                at_points(masks[image][objects][:, None], some)[:, 0]
                for (image, (_, objects)), some in zip(
                    enumerate(pairs), points.split([len(objects) for _, objects in pairs]), strict=True
                )
                if len(objects)
            ]
        ).float()
    seen, objects_there = at_points(guesses, points)[:, 0].float(), sum(len(label) for label in labels)
    entropy = F.binary_cross_entropy_with_logits(seen, truth, reduction="none").mean(1).sum() / objects_there
    share = seen.sigmoid()
    dice = 1 - (2 * (share * truth).sum(1) + 1) / (share.sum(1) + truth.sum(1) + 1)
    return total + settings.mask_weight * entropy + settings.dice_weight * dice.sum() / objects_there


def uncertain_points(logits: Tensor, settings: LossSettings) -> Tensor:
    """Points for masks (n, 1, H, W), (n, P, 2): those of many random ones where the logit is nearest 0, and random ones."""
    count = len(logits)
    drawn = torch.rand(count, int(settings.points * settings.oversample), 2, device=logits.device)
    certain = at_points(logits, drawn)[:, 0].abs()
    kept = int(settings.importance * settings.points)
    nearest = certain.topk(kept, largest=False).indices
    chosen = drawn.gather(1, nearest[..., None].expand(-1, -1, 2))
    return torch.cat([chosen, torch.rand(count, settings.points - kept, 2, device=logits.device)], 1)
