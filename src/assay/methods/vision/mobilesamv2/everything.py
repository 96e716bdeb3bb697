"""From an image to masks: the image is embedded once, boxes (or the points of a grid) are decoded in batches, masks come in its size."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from assay import checks
from assay.methods.core import kernels
from assay.methods.core.vision.boxes import masks_to_boxes, nms
from assay.methods.vision.mobilesamv2.decoder import box_tokens, check_sam, decode, image_products, point_tokens
from assay.methods.vision.mobilesamv2.proposers import PointGrid, Proposer, snap_boxes

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SNAP = 20 / 1024  # of the longer side
THRESHOLD = 0.0  # of a mask's logits


@dataclass(frozen=True)
class Found:
    """n masks bool (n, H, W), their predicted IoUs (n,), and what each was prompted with: boxes (n, 4), or points (n, 2) and then the
    masks' stabilities (n,), in pixels of the image."""

    masks: Tensor
    scores: Tensor
    prompts: Tensor
    stabilities: Tensor | None = None

    def records(self) -> list[dict[str, Any]]:
        """As SAM's mask generator gives them, the largest first: `segmentation` (a NumPy array), `area`, `bbox` (left, top, width,
        height), `predicted_iou`, `crop_box`, and `box_coords` or else `point_coords` and `stability_score`."""
        boxes = masks_to_boxes(self.masks)
        boxes[:, 2:] -= boxes[:, :2]
        areas = self.masks.sum((1, 2))
        height, width = self.masks.shape[1:]
        found = []
        for i in areas.argsort(descending=True, stable=True).tolist():
            record = {
                "segmentation": self.masks[i].cpu().numpy(),
                "area": int(areas[i]),
                "bbox": boxes[i].tolist(),
                "predicted_iou": float(self.scores[i]),
                "crop_box": [0, 0, width, height],
            }
            if self.stabilities is None:
                record["box_coords"] = self.prompts[i].tolist()
            else:
                record["point_coords"] = [self.prompts[i].tolist()]
                record["stability_score"] = float(self.stabilities[i])
            found.append(record)
        return found


class SegmentEverything:
    """All masks of an image, as `sam` (transformers' `SamModel`) draws them where `proposer` says.

    `proposer` is any callable of an image (3, H, W) in [0, 1] that returns boxes (n, 4) in its pixels; each gives one mask and nothing is
    filtered. A `PointGrid` instead is SAM's own way, the baseline. `batch` prompts are decoded together (the paper's 320; SAM
    takes 64 points); the result does not depend on it, the memory does. Edges of boxes nearer to the border than `snap`, a share of the
    longer side, are moved onto it (20 of 1024 pixels). `share` computes the products of the image alone once (see `decoder`); without it
    transformers' own decoder runs, which gives the same.
    `mean` and `std` are what the image is normalised with.

    `everything(image)` returns a list like that of SAM's mask generator, the largest mask first (see `Found.records`); `find` returns
    tensors in the order of the boxes. No boxes give an empty list. Images are scaled to the model's size by their longer side.

    Raises TypeError for another model or proposer, ValueError for an image or boxes of another shape, boxes without width or
    height, and numbers that are not finite.
    When not to use it: to find parts of objects, or regions that no detector knows (sky, a wall): the grid finds those.
    """

    def __init__(
        self, sam: Any, proposer: Proposer | PointGrid, *, batch: int = 320, snap: float = SNAP, share: bool = True,
        mean: Sequence[float] = MEAN, std: Sequence[float] = STD,
    ) -> None:  # fmt: skip
        check_sam(sam)
        if not callable(proposer) and not isinstance(proposer, PointGrid):
            raise TypeError(f"proposer must be callable with an image or a PointGrid, got {checks.shown(proposer)}")
        self.sam, self.proposer = sam, proposer
        self.batch = checks.whole("batch", batch, low=1)
        self.snap = checks.number("snap", snap, low=0, below=0.5)
        self.share = checks.flag("share", share)
        self.mean, self.std = (tuple(checks.number(n, x) for x in xs) for n, xs in (("mean", mean), ("std", std)))

    def __call__(self, image: Tensor) -> list[dict[str, Any]]:
        return self.find(image).records()

    @torch.no_grad()
    def find(self, image: Tensor, embedding: Tensor | None = None) -> Found:
        """The masks of an image (3, H, W) in [0, 1]; `embedding` is what `embed` gave for it, where it is there already."""
        checks.tensor("image", image, shape=(3, "height", "width"), finite=True)
        size = image.shape[1], image.shape[2]
        if isinstance(self.proposer, PointGrid):
            return self._from_points(self.proposer, self.embed(image) if embedding is None else embedding, size)
        boxes = self.boxes(image)
        if not len(boxes):
            return Found(
                torch.zeros(0, *size, dtype=torch.bool, device=boxes.device), boxes.new_zeros(0), boxes
            )  # the image need not be encoded
        if embedding is None:
            embedding = self.embed(image)
        masks, scores = [], []
        for logits, iou in self.decoded(embedding, self.scaled(boxes, size), several=False):
            masks.append(self.full_size(logits, size)[:, 0] > THRESHOLD)
            scores.append(iou[:, 0])
        return Found(torch.cat(masks), torch.cat(scores), boxes)

    @torch.no_grad()
    def embed(self, image: Tensor) -> Tensor:
        """What the encoder makes of an image: scaled, normalised, filled up with zeros to a square; (1, C, rows, columns)."""
        weight = self.sam.mask_decoder.iou_token.weight
        x = image.to(weight.device, torch.float32)[None]
        size = self._input_size((image.shape[1], image.shape[2]))
        if size != tuple(x.shape[2:]):
            x = F.interpolate(x, size, mode="bilinear", antialias=True)
        mean, std = (torch.tensor(each, device=x.device)[:, None, None] for each in (self.mean, self.std))
        side = self._side
        x = F.pad((x - mean) / std, (0, side - size[1], 0, side - size[0]))
        embedding: Tensor = self.sam.get_image_embeddings(x.to(weight.dtype))
        return embedding

    def boxes(self, image: Tensor) -> Tensor:
        """What the proposer finds in an image, snapped to its border: (n, 4) float32 in its pixels, on the model's device."""
        if isinstance(self.proposer, PointGrid):
            raise TypeError("proposer must be callable with an image to give boxes, got a PointGrid")
        found = self.proposer(image)
        checks.tensor("boxes of the proposer", found, shape=("boxes", 4), finite=True, empty=True)
        if not (found[:, 2:] > found[:, :2]).all():
            bad = int((found[:, 2:] <= found[:, :2]).any(1).nonzero()[0])
            raise ValueError(f"boxes of the proposer must have a width and a height, got {found[bad].tolist()}")
        found = found.to(self.sam.mask_decoder.iou_token.weight.device, torch.float32)
        return snap_boxes(found, (image.shape[1], image.shape[2]), self.snap * max(image.shape[1:]))

    def scaled(self, places: Tensor, size: tuple[int, int]) -> Tensor:
        """Boxes (n, 4) or points (n, 2) of an image of that size, in pixels of the model's input."""
        height, width = self._input_size(size)
        factors = torch.tensor([width / size[1], height / size[0]], device=places.device)
        return places * factors.repeat(places.shape[1] // 2)

    def decoded(self, embedding: Tensor, prompts: Tensor, *, several: bool) -> Iterator[tuple[Tensor, Tensor]]:
        """Logits (P, M, h, w) and predicted IoUs (P, M) of each batch of boxes (n, 4) or points (n, 2) in input pixels."""
        boxes = prompts.shape[1] == 4
        if self.share:
            kernels.ran("SAM's decoder", "products of the image shared")
            products = image_products(self.sam, embedding)
            for some in prompts.split(self.batch):
                tokens = box_tokens(self.sam, some) if boxes else point_tokens(self.sam, some)
                yield decode(self.sam, products, tokens, several=several)
            return
        kernels.ran("SAM's decoder", "image repeated")
        for some in prompts.split(self.batch):
            given = {"input_boxes": some[None]} if boxes else {"input_points": some[None, :, None]}
            out = self.sam(image_embeddings=embedding, multimask_output=several, **given)
            yield out.pred_masks[0], out.iou_scores[0]

    def full_size(self, logits: Tensor, size: tuple[int, int]) -> Tensor:
        """Logits (P, M, h, w) in the size of the image, float32: enlarged to the model's input, without its filling, and then scaled."""
        height, width = self._input_size(size)
        whole = F.interpolate(logits.float(), (self._side, self._side), mode="bilinear", align_corners=False)
        whole = whole[..., :height, :width]
        return F.interpolate(whole, size, mode="bilinear", align_corners=False)

    def _from_points(self, grid: PointGrid, embedding: Tensor, size: tuple[int, int]) -> Found:
        points = grid.points(*size).to(embedding.device)
        masks, scores, stabilities, origins = [], [], [], []
        batches = self.decoded(embedding, self.scaled(points, size), several=True)
        for (logits, iou), origin in zip(batches, points.split(self.batch), strict=True):
            sure = iou > grid.iou  # before the masks are enlarged: those that go need not be
            whole = self.full_size(logits[sure][:, None], size)[:, 0]
            stability = (whole > THRESHOLD + grid.offset).sum((1, 2)) / (whole > THRESHOLD - grid.offset).sum((1, 2))
            stable = stability > grid.stability
            masks.append(whole[stable] > THRESHOLD)
            scores.append(iou[sure][stable])
            stabilities.append(stability[stable])
            origins.append(origin[:, None].expand(-1, iou.shape[1], -1)[sure][stable])
        mask, score = torch.cat(masks), torch.cat(scores)
        boxes = masks_to_boxes(mask)
        boxes[:, 2:] -= 1  # SAM suppresses boxes that end on their last pixel
        kept = nms(boxes, score, grid.overlap)
        return Found(mask[kept], score[kept], torch.cat(origins)[kept], torch.cat(stabilities)[kept])

    @property
    def _side(self) -> int:
        return int(self.sam.prompt_encoder.input_image_size)

    def _input_size(self, size: tuple[int, int]) -> tuple[int, int]:
        share = self._side / max(size)
        return int(share * size[0] + 0.5), int(share * size[1] + 0.5)
