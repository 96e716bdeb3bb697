"""From queries to maps, as MaskFormer does it: a class for each pixel, or segments that do not overlap."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

from assay import checks
from assay.methods.vision.pem.network import Predictions, resized

VOID = -1


def semantic(found: Predictions, size: tuple[int, int] | None = None) -> Tensor:
    """Scores of each class in each pixel, (B, classes, height, width): probability of the class times that of the mask, over queries.

    `size` (height, width) of the result; None: that of the masks, a quarter of the image. The class of a pixel is the argmax over dim 1.

    >>> one = Predictions(torch.tensor([[[4.0, 0.0, 0.0]]]), torch.ones(1, 1, 2, 2))
    >>> semantic(one, (4, 4)).argmax(1).unique().tolist()
    [0]
    """
    _check(found)
    classes = found.class_logits.softmax(-1)[..., :-1]
    masks = found.mask_logits if size is None else resized(found.mask_logits, size)
    return torch.einsum("bqc,bqhw->bchw", classes, masks.sigmoid())


def panoptic(
    found: Predictions,
    things: Collection[int],
    size: tuple[int, int] | None = None,
    *,
    threshold: float = 0.8,
    overlap: float = 0.8,
) -> Tensor:
    """Class and instance of each pixel, int64 (B, height, width, 2): -1 and 0 where there is no segment; instances count from 1.

    Queries whose best class is an object with a probability above `threshold` compete for pixels by that probability times the mask's. A
    query becomes a segment, of the pixels it won where its mask is at least 1/2, unless it won less than `overlap` of the pixels of
    its mask. Segments of a class that is not one of `things` are one. The published settings are 0.8 and 0.8.

    >>> one = Predictions(torch.tensor([[[9.0, 0.0, 0.0]]]), torch.tensor([[[[9.0, -9.0]]]]))
    >>> panoptic(one, things=[0])[0, 0].tolist()
    [[0, 1], [-1, 0]]
    """
    _check(found)
    checks.number("threshold", threshold, low=0, high=1)
    checks.number("overlap", overlap, low=0, high=1)
    masks = (found.mask_logits if size is None else resized(found.mask_logits, size)).sigmoid()
    scores, labels = found.class_logits.softmax(-1).max(-1)
    keep = (labels < found.class_logits.shape[-1] - 1) & (scores > threshold)
    return torch.stack(
        [
            _segments(masks[image][kept], scores[image][kept], labels[image][kept], set(things), overlap)
            for image, kept in enumerate(keep)
        ]
    )


def _segments(masks: Tensor, scores: Tensor, labels: Tensor, things: set[int], overlap: float) -> Tensor:
    out = torch.zeros(*masks.shape[1:], 2, dtype=torch.int64, device=masks.device)
    out[..., 0] = VOID
    if not len(masks):
        return out
    winner = (scores[:, None, None] * masks).argmax(0)
    numbers: dict[int, int] = {}  # of stuff, by class
    instances = 0
    for place, label in enumerate(labels.tolist()):
        won, own = winner == place, masks[place] >= 0.5
        both = won & own
        if not both.any() or won.sum() / own.sum() < overlap:
            continue
        if label in things or label not in numbers:
            instances += 1
            numbers[label] = instances
        out[both] = torch.tensor([label, numbers[label]], device=out.device)
    return out


def _check(found: Predictions) -> None:
    checks.tensor("class_logits", found.class_logits, ndim=3)
    checks.tensor("mask_logits", found.mask_logits, shape=(*found.class_logits.shape[:2], "height", "width"))
