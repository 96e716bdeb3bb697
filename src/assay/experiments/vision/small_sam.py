"""A small SAM and a small detector for scenes of digits, for experiments about where to prompt: SAM's weights come with no package.

The SAM is transformers' own prompt encoder and mask decoder, narrower, behind a convolutional encoder; it is taught with points and boxes
alike. The detector is class-agnostic. Both see scenes of `SIDE` pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from assay.experiments.vision.scenes import MEAN, STD, pixels
from assay.methods.core.vision.boxes import generalized_iou
from assay.workloads.digit_scenes import Scene

SIDE, WIDTH, STRIDE = 96, 64, 8  # pixels of a scene, channels of an embedding, pixels a position
HALF = 2  # the decoder draws masks with a pixel for every 2 x 2 of a scene, and is taught on those
PROMPTS, GROUND = 2, 1  # of a scene in a step: objects, by a point and by a box; points on no object
JITTER = 0.1  # of a box's side that its edges may be off in training, as SAM's were
PRIOR = 3.0  # of the detector's scores: one position in twenty
REACH = 0.5  # of the detector's boxes, in logarithms of a position's side


# ------------------------------------------------------------------------------------------------------------------- the SAM


class Encoder(nn.Module):
    """Images (B, 3, H, W) to embeddings (B, WIDTH, H / 8, W / 8)."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.blocks = _down(24, 48, WIDTH), _blocks(WIDTH)
        self.out = nn.Conv2d(WIDTH, WIDTH, 1)

    def forward(self, pixel_values: Tensor, **_: Any) -> tuple[Tensor]:
        x = self.down(pixel_values)
        for block in self.blocks:
            x = x + block(x)
        return (self.out(x),)


def _down(*widths: int) -> nn.Sequential:
    """Three halvings."""
    return nn.Sequential(*(_layer(a, b, stride=2) for a, b in zip((3, *widths), widths, strict=False)))


def _blocks(width: int) -> nn.ModuleList:
    return nn.ModuleList(_layer(width, width, dilation=step) for step in (1, 2, 1))


def _layer(width: int, out: int, *, stride: int = 1, dilation: int = 1) -> nn.Sequential:
    convolution = nn.Conv2d(width, out, 3, stride, dilation, dilation, bias=False)
    return nn.Sequential(convolution, nn.GroupNorm(8, out), nn.GELU())


def small_sam() -> nn.Module:
    """transformers' SamModel, untrained, whose encoder is `Encoder`."""
    from transformers import SamConfig, SamMaskDecoderConfig, SamModel, SamPromptEncoderConfig, SamVisionConfig

    place: dict[str, Any] = {"image_size": SIDE, "patch_size": STRIDE}
    least: dict[str, Any] = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}  # it is replaced
    vision = SamVisionConfig(
        output_channels=WIDTH, num_pos_feats=WIDTH // 2, global_attn_indexes=[0], **place, **least
    )  # fmt: skip
    decoder = SamMaskDecoderConfig(
        hidden_size=WIDTH, mlp_dim=2 * WIDTH, num_attention_heads=2, iou_head_hidden_dim=WIDTH
    )  # fmt: skip
    prompts = SamPromptEncoderConfig(hidden_size=WIDTH, **place)
    sam: Any = SamModel(SamConfig(vision_config=vision, prompt_encoder_config=prompts, mask_decoder_config=decoder))
    sam.vision_encoder = Encoder()
    for module in sam.modules():
        if isinstance(module, nn.Linear | nn.ConvTranspose2d | nn.Embedding):
            module.reset_parameters()  # transformers' deviation of 0.02 is for weights that are loaded
    directions = sam.shared_image_embedding.positional_embedding
    nn.init.normal_(directions)  # SAM's deviation of 1; and they stay as they were drawn
    sam.prompt_encoder.shared_embedding.positional_embedding = directions
    directions.requires_grad_(False)
    made: nn.Module = sam
    return made


def sam_loss(sam: nn.Module, some: Sequence[Scene]) -> Tensor:
    """SAM's: 20 focal loss + dice of a mask, of a point's three masks the best one; and the squared error of the predicted IoUs.

    Points on no object have no mask to be right about: their IoU is 0. SAM's data has an object everywhere, scenes do not.
    """
    model: Any = sam
    truth, points, boxes = prompts_of(some)
    embeddings = model.vision_encoder(pixels(some))[0]
    several = model(image_embeddings=embeddings, input_points=points[:, :, None], multimask_output=True)
    single = model(image_embeddings=embeddings, input_boxes=boxes, multimask_output=False)
    loss = mask_loss(several.pred_masks[:, :PROMPTS], truth).amin(2).mean() + mask_loss(single.pred_masks, truth).mean()
    nothing = truth.new_zeros(len(some), GROUND, *truth.shape[2:])
    right = mask_iou(several.pred_masks, torch.cat([truth, nothing], 1)), mask_iou(single.pred_masks, truth)
    errors = (several.iou_scores - right[0]).square().mean() + (single.iou_scores - right[1]).square().mean()
    total: Tensor = loss + errors
    return total


def prompts_of(some: Sequence[Scene]) -> tuple[Tensor, Tensor, Tensor]:
    """For each scene: masks of objects as the decoder draws them, (B, PROMPTS, H / 2, W / 2), shares of 2 x 2 pixels; a point on each and
    then points on the ground, (B, PROMPTS + GROUND, 2); boxes around the objects, jittered, (B, PROMPTS, 4)."""
    masks, points, boxes = [], [], []
    for scene in some:
        seen = scene.masks.flatten(1).any(1).nonzero()[:, 0]
        picks = seen[torch.randint(len(seen), (PROMPTS,))]
        masks.append(F.avg_pool2d(scene.masks[picks].float(), HALF))
        ground = ~scene.masks.any(0)
        places = [mask.nonzero() for mask in (*scene.masks[picks], *[ground] * GROUND)]
        points.append(torch.stack([place[torch.randint(len(place), ())].flip(0) for place in places]).float())
        box = scene.boxes[picks]
        sides = (box[:, 2:] - box[:, :2]).repeat(1, 2)
        boxes.append(box + JITTER * sides * torch.randn(PROMPTS, 4).clamp(-3, 3))
    return torch.stack(masks), torch.stack(points), torch.stack(boxes)


def mask_loss(logits: Tensor, truth: Tensor) -> Tensor:
    """(B, P, M) for logits (B, P, M, h, w) and masks (B, P, h, w) of shares."""
    wanted = truth[:, :, None].expand_as(logits)
    share = logits.sigmoid()
    weight = 0.75 - 0.5 * wanted
    each = F.binary_cross_entropy_with_logits(logits, wanted, reduction="none")
    focal = (weight * (share - wanted).square() * each).mean((3, 4))
    dice = 1 - (2 * (share * wanted).sum((3, 4)) + 1) / (share.sum((3, 4)) + wanted.sum((3, 4)) + 1)
    return 20 * focal + dice


@torch.no_grad()
def mask_iou(logits: Tensor, truth: Tensor) -> Tensor:
    """Of masks (B, P, M, h, w) with the true ones (B, P, h, w): (B, P, M); 0 where both are empty."""
    found, wanted = logits > 0, truth[:, :, None] >= 0.5
    return (found & wanted).sum((3, 4)) / (found | wanted).sum((3, 4)).clamp(min=1)


# -------------------------------------------------------------------------------------------------------------- the detector


class Detector(nn.Module):
    """One score and one box for each position of a scene, whatever the digit."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.blocks = _down(16, 32, 48), _blocks(48)
        self.out = nn.Conv2d(48, 5, 1)
        self.out.bias = nn.Parameter(torch.tensor([-PRIOR, *[REACH] * 4]))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Scores as logits (B, N) and boxes (B, N, 4) in pixels, of normalised images."""
        x = self.down(images)
        for block in self.blocks:
            x = x + block(x)
        found = self.out(x).flatten(2).transpose(1, 2)
        reach = STRIDE * found[..., 1:].clamp(max=4).exp()  # from the position's middle to the edges
        return found[..., 0], middles(images.shape[2]).repeat(1, 2) + reach * torch.tensor([-1.0, -1, 1, 1])

    def detect(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Boxes (N, 4) and scores (N,) of an image (3, H, W) in [0, 1]."""
        logits, boxes = self((image[None] - MEAN) / STD)
        return boxes[0], logits[0].sigmoid()


def middles(side: int) -> Tensor:
    """x and y of all positions' middles, (N, 2)."""
    at = (torch.arange(side // STRIDE) + 0.5) * STRIDE
    y, x = torch.meshgrid(at, at, indexing="ij")
    return torch.stack([x, y], -1).flatten(0, 1)


def responsible(scene: Scene) -> tuple[Tensor, Tensor]:
    """Which positions find an object: bool (N,), those inside half of its box and the nearest one; and which object each of them finds."""
    centres, sides = (scene.boxes[:, :2] + scene.boxes[:, 2:]) / 2, scene.boxes[:, 2:] - scene.boxes[:, :2]
    apart = (middles(scene.image.shape[1])[:, None] - centres).abs() / sides
    near = apart.amax(2) < 0.25
    near[apart.square().sum(2).argmin(0), torch.arange(len(centres))] = True
    whose = (apart.amax(2) + (~near) * 1e3).argmin(1)  # of two objects the nearer
    return near.any(1), whose


def detector_loss(detector: nn.Module, some: Sequence[Scene]) -> Tensor:
    """Cross entropy of the scores and 1 - GIoU of the boxes of the responsible positions, for each of these."""
    logits, boxes = detector(pixels(some))
    wanted, overlaps = torch.zeros_like(logits), logits.new_zeros(())
    for i, scene in enumerate(some):
        at, whose = responsible(scene)
        wanted[i, at] = 1
        overlaps = overlaps + (1 - generalized_iou(boxes[i, at], scene.boxes[whose[at]])).sum()
    scores = F.binary_cross_entropy_with_logits(logits, wanted, reduction="sum")
    total: Tensor = (scores + overlaps) / wanted.sum()
    return total
