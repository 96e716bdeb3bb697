"""The foreground score: coarse to fine over the levels of a feature pyramid, and what it is trained to say.

With m_l the embedded tokens of level l, MP one small network for all levels and a_l a learned number, from the coarsest level to the
finest:

    s_L = MP(m_L),    s_l = MP(m_l + a_l * m_l * up(s_{l+1}))

so that a coarse level, which knows more of what things are, lifts or dims the tokens below it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from assay import checks

Variant = Literal["paper", "as_released"]
VARIANTS: tuple[Variant, ...] = get_args(Variant)
Shapes = Sequence[tuple[int, int]]
"""Height and width of each level, the finest first. Tokens (B, S, ...) are those of all levels, row by row."""

REACH = 8  # a level ends at this many of its strides: 64, 128, 256 pixels for strides 8, 16, 32
MODULATION = 0.3  # alpha starts between this and its negative
ALPHA, GAMMA, WEIGHT = 0.25, 2.0, 1.5  # of the focal loss


class ForegroundPredictor(nn.Module):
    """MP: tokens (B, n, width) of one level to logits (B, n). Half of the hidden channels is replaced by its mean over the level.

    `valid` bool (B, n): the tokens that the mean is over; all of them without it. Raises ValueError for a width that 4 does not divide.

    >>> ForegroundPredictor(8)(torch.zeros(2, 6, 8)).shape
    torch.Size([2, 6])
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        if checks.whole("width", width, low=4) % 4:
            raise ValueError(f"width must be divisible by 4, got {width}")
        self.layer1 = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.GELU())
        self.layer2 = nn.Sequential(
            nn.Linear(width, width // 2),
            nn.GELU(),
            nn.Linear(width // 2, width // 4),
            nn.GELU(),
            nn.Linear(width // 4, 1),
        )

    def forward(self, tokens: Tensor, valid: Tensor | None = None) -> Tensor:
        own, shared = self.layer1(tokens).chunk(2, -1)
        if valid is None:
            mean = shared.mean(1, keepdim=True)
        else:
            count = valid.sum(1).clamp(min=1)[:, None, None]
            mean = (shared.masked_fill(~valid[..., None], 0).sum(1, keepdim=True, dtype=torch.float32) / count).to(
                shared
            )
        scores: Tensor = self.layer2(torch.cat([own, mean.expand_as(shared)], -1))
        return scores[..., 0]


class ForegroundScorer(nn.Module):
    """Embedded tokens (B, S, width) of all levels to logits (B, S), coarse to fine. See the module.

    The scores of a level are interpolated bilinearly for the next finer one, corners on corners, as released.

    >>> ForegroundScorer(8, levels=2)(torch.zeros(1, 5, 8), [(2, 2), (1, 1)]).shape
    torch.Size([1, 5])
    """

    def __init__(self, width: int, levels: int) -> None:
        super().__init__()
        checks.whole("levels", levels, low=1)
        self.predictor = ForegroundPredictor(width)
        self.alpha = nn.Parameter(torch.empty(levels - 1).uniform_(-MODULATION, MODULATION))  # the coarser level first

    def forward(self, tokens: Tensor, shapes: Shapes, valid: Tensor | None = None) -> Tensor:
        sizes = [height * width for height, width in shapes]
        if sum(sizes) != tokens.shape[1] or len(sizes) != len(self.alpha) + 1:
            raise ValueError(
                f"shapes must be {len(self.alpha) + 1} levels of {tokens.shape[1]} tokens in all, got {list(shapes)}"
            )
        levels = tokens.split(sizes, 1)
        masks: Sequence[Tensor | None] = [None] * len(sizes) if valid is None else valid.split(sizes, 1)
        scores = [self.predictor(levels[-1], masks[-1])]
        for level in range(len(sizes) - 2, -1, -1):
            coarse = scores[-1].unflatten(1, shapes[level + 1])[:, None]
            above = F.interpolate(coarse, shapes[level], mode="bilinear", align_corners=True).flatten(1)[..., None]
            here = levels[level]
            lifted = here + self.alpha[len(sizes) - 2 - level] * here * above
            scores.append(self.predictor(lifted, masks[level]))
        return torch.cat(scores[::-1], 1)


def level_ranges(strides: Sequence[int], variant: Variant = "paper") -> list[tuple[float, float]]:
    """Which distances each level is for, in pixels: above the first number, up to the second.

    "as_released": one begins where the one before ends, at 8 strides; the coarsest level's has no end. "paper": neighbours overlap by half
    of a range, as the paper says without numbers; that each begins in the middle of the one before, and ends as released, is our reading.

    >>> level_ranges([8, 16, 32])
    [(-1.0, 64.0), (32.0, 128.0), (80.0, inf)]
    """
    checks.choice("variant", variant, VARIANTS)
    ends = [float(REACH * stride) for stride in strides[:-1]] + [float("inf")]
    found = [(-1.0, ends[0])]
    for end in ends[1:]:
        begin, before = found[-1]
        found.append(((max(begin, 0.0) + before) / 2 if variant == "paper" else before, end))
    return found


def foreground_targets(
    boxes: Tensor, shapes: Shapes, strides: Sequence[int], *, variant: Variant = "paper"
) -> Tensor:  # fmt: skip
    """Which box each token is foreground of, int64 (S,): the smallest that it is in and whose size is its level's; -1 for none.

    `boxes` (n, 4): left, top, right, bottom in pixels. A token stands for the pixel (column * stride + stride // 2, row * stride +
    stride // 2); it has to lie strictly inside, and its distance to the farthest of the box's four sides in its level's range
    (`level_ranges`). The distance is that of the released code. Raises ValueError for shapes and strides of different lengths.

    >>> foreground_targets(torch.tensor([[0.0, 0, 12, 12]]), [(2, 2)], [8]).view(2, 2).tolist()
    [[0, -1], [-1, -1]]
    """
    checks.tensor("boxes", boxes, shape=("boxes", 4), empty=True)
    if len(shapes) != len(strides):
        raise ValueError(f"strides must have one entry a level ({len(shapes)}), got {list(strides)}")
    found = []
    area = (boxes[:, 2:] - boxes[:, :2]).prod(1)
    for (height, width), stride, (low, high) in zip(shapes, strides, level_ranges(strides, variant), strict=True):
        y = torch.arange(height, device=boxes.device) * stride + stride // 2
        x = torch.arange(width, device=boxes.device) * stride + stride // 2
        points = torch.stack([x.repeat(height), y.repeat_interleave(width)], 1)[:, None]  # (tokens, 1, 2)
        sides = torch.cat([points - boxes[:, :2], boxes[:, 2:] - points], 2)
        farthest = sides.amax(2)
        inside = (sides.amin(2) > 0) & (farthest > low) & (farthest <= high)
        if not len(boxes):
            found.append(torch.full((height * width,), -1, device=boxes.device))
            continue
        smallest = torch.where(inside, area, float("inf")).argmin(1)
        found.append(torch.where(inside.any(1), smallest, -1))
    return torch.cat(found)


def foreground_loss(scores: Tensor, targets: Tensor, *, valid: Tensor | None = None) -> Tensor:
    """Focal loss of logits (B, S) against foreground (bool (B, S)), over each image's foreground tokens, the mean over images.

    A sum over tokens divided by the number of foreground ones, 1 at least; tokens that are not `valid` (bool (B, S)) are left out.
    In float32. Its weight beside a detector's losses is `WEIGHT`, 1.5.

    >>> round(foreground_loss(torch.zeros(1, 2), torch.tensor([[True, False]])).item(), 4)  # (0.25 + 0.75) / 4 * ln 2
    0.1733
    """
    scores, wanted = scores.float(), targets.float()
    right = torch.where(targets, scores, -scores)
    each = (1 - right.sigmoid()) ** GAMMA * -F.logsigmoid(right) * torch.where(targets, ALPHA, 1 - ALPHA)
    if valid is not None:
        each, wanted = each * valid, wanted * valid
    return (each.sum(1) / wanted.sum(1).clamp(min=1)).mean()
