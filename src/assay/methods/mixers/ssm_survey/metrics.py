"""Loss and metrics of segmentation, called as MONAI's are."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from assay import checks
from assay.methods.core.mixers.protocol import wide_dtype


def dice_loss(logits: Tensor, target: Tensor, *, smooth: float = 1e-5) -> Tensor:
    """1 - soft Dice of sigmoid(logits) against target, both (batch, channels, ...), mean over batch and channels.

    Computed in float32 at least: half precision cannot count the cells of an image. Raises ValueError for shapes that differ or are
    empty, and targets outside [0, 1]; TypeError for logits of whole numbers.
    """
    checks.tensor("logits", logits)
    if logits.ndim < 3:
        raise ValueError(f"logits must be (batch, channels, ...), got {tuple(logits.shape)}")
    checks.tensor("target", target, shape=tuple(logits.shape), dtype="any")
    smooth = checks.number("smooth", smooth, above=0)
    wide = wide_dtype(logits.dtype)
    target = target.to(wide).flatten(2)
    if not ((target >= 0) & (target <= 1)).all():
        raise ValueError("target must hold numbers in [0, 1]: one-hot it first")
    probability = torch.sigmoid(logits.to(wide)).flatten(2)
    overlap = (probability * target).sum(-1)
    return 1 - ((2 * overlap + smooth) / (probability.sum(-1) + target.sum(-1) + smooth)).mean()


def dice(y_pred: Tensor, y: Tensor) -> Tensor:
    """2 |P & T| / (|P| + |T|) for each image and channel of binary masks (batch, channels, ...); NaN where the target is empty.

    Raises ValueError for shapes that differ and for values other than 0 and 1.

    >>> dice(torch.tensor([[[1, 1, 0, 0]]]), torch.tensor([[[1, 0, 0, 0]]])).item()
    0.6666666865348816
    """
    y_pred, y = _masks(y_pred, y)
    sizes = y_pred.flatten(2).sum(-1) + y.flatten(2).sum(-1)
    overlap = 2 * (y_pred & y).flatten(2).sum(-1)
    return torch.where(y.flatten(2).any(-1), overlap / sizes, torch.nan)


def hausdorff_distance(
    y_pred: Tensor, y: Tensor, *, percentile: float = 95.0, spacing: Sequence[float] | None = None
) -> Tensor:
    """The percentile (100: Hausdorff) of the distances between the borders, the larger of both directions: (batch, channels).

    Masks (batch, channels, ...) of any number of dimensions; `spacing` is the size of a cell in each (default 1, cells).
    NaN where both masks are empty, infinity where one is. Raises ValueError for arguments that do not fit.
    """
    y_pred, y = _masks(y_pred, y)
    percentile = checks.number("percentile", percentile, above=0, high=100)
    spacing = [1.0] * (y.ndim - 2) if spacing is None else [checks.number("spacing", s, above=0) for s in spacing]
    if len(spacing) != y.ndim - 2:
        raise ValueError(f"spacing must be {y.ndim - 2} positive numbers, got {spacing}")
    unit = torch.tensor(spacing, dtype=torch.float64, device=y.device)
    found = torch.full(y.shape[:2], torch.nan, dtype=torch.float64, device=y.device)
    for image in range(len(y)):
        for channel in range(y.shape[1]):
            a, b = (_border(mask[image, channel]).nonzero() * unit for mask in (y_pred, y))
            if len(a) and len(b):
                distance = torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")
                ways = [torch.quantile(distance.amin(side), percentile / 100) for side in (0, 1)]
                found[image, channel] = torch.stack(ways).max()
            elif len(a) or len(b):
                found[image, channel] = torch.inf
    return found


def _masks(y_pred: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    for name, mask in (("y_pred", y_pred), ("y", y)):
        checks.tensor(name, mask, dtype="any", empty=True)
    if y_pred.shape != y.shape or y.ndim < 3:
        raise ValueError(
            f"y_pred and y must be of one shape (batch, channels, ...), got {tuple(y_pred.shape)}, {tuple(y.shape)}"
        )
    for name, mask in (("y_pred", y_pred), ("y", y)):
        if mask.dtype != torch.bool and ((mask != 0) & (mask != 1)).any():
            raise ValueError(f"{name} must hold 0 and 1 only: threshold or one-hot it first")
    return y_pred.bool(), y.bool()


def _border(mask: Tensor) -> Tensor:
    """Cells with a neighbour (along an axis) outside the mask or outside the image."""
    inner = mask.clone()
    for axis in range(mask.ndim):
        padded = F.pad(mask, (0, 0) * (mask.ndim - 1 - axis) + (1, 1))
        inner &= padded.narrow(axis, 0, mask.shape[axis]) & padded.narrow(axis, 2, mask.shape[axis])
    return mask & ~inner
