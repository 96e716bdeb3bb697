"""Boxes in the "mask-generation" pipeline of transformers, and that pipeline without torchvision.

from transformers import pipeline

pipe = pipeline("mask-generation", model=sam, image_processor=processor, pipeline_class=MaskGeneration, proposer=proposer)
pipe("street.jpg", output_bboxes_mask=True)      # {"masks": [...], "scores": ..., "bounding_boxes": ...}
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import MaskGenerationPipeline
from transformers.image_utils import load_image

from assay import checks
from assay.methods.core.vision.boxes import nms
from assay.methods.vision.mobilesamv2.everything import SNAP, SegmentEverything
from assay.methods.vision.mobilesamv2.proposers import Proposer


class MaskGeneration(MaskGenerationPipeline):
    """transformers' pipeline with the boxes of a proposer in place of its grid of points: a mask for each box, none of them filtered.

    `proposer`, `batch`, `snap` and `share` are those of `SegmentEverything`; the image is prepared by the pipeline's image processor.
    A call takes images and the pipeline's own settings of the output; the settings of the grid and of its filters raise ValueError.
    Without a proposer it is the pipeline as it was, grid and all. In both cases suppression is ours, so that torchvision need not be
    there; nothing outside of a call is changed. No boxes give no masks.
    """

    model: Any
    image_processor: Any

    def __init__(
        self, *, proposer: Proposer | None = None, batch: int = 320, snap: float = SNAP, share: bool = True, **kwargs: Any
    ) -> None:  # fmt: skip
        super().__init__(**kwargs)
        self.everything: SegmentEverything | None = None
        if proposer is not None:
            if not callable(proposer):
                raise TypeError(f"proposer must be callable with an image, or None, got {checks.shown(proposer)}")
            self.everything = SegmentEverything(self.model, proposer, batch=batch, snap=snap, share=share)

    def preprocess(self, image: Any, timeout: float | None = None, **grid: Any) -> Iterator[dict[str, Any]]:
        if self.everything is None:
            yield from super().preprocess(image, timeout=timeout, **grid)
            return
        _refuse(grid)
        picture = load_image(image, timeout=timeout)
        inputs = self.image_processor(images=picture, return_tensors="pt").to(self.dtype)
        pixels = torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1) / 255
        boxes = self.everything.boxes(pixels)
        size = picture.height, picture.width
        yield {"boxes": self.everything.scaled(boxes, size), "is_last": True, **inputs}

    def _forward(self, model_inputs: dict[str, Any], **filters: Any) -> Any:
        if self.everything is None:
            return super()._forward(model_inputs, **filters)
        threshold = filters.pop("mask_threshold", 0.0)
        _refuse(filters)
        boxes, original = model_inputs["boxes"], model_inputs["original_sizes"].tolist()
        masks: list[Any] = []
        scores, around = [boxes.new_zeros(0)], [boxes.new_zeros(0, 4)]
        if len(boxes):
            embedding = self.model.get_image_embeddings(model_inputs["pixel_values"])
            for logits, iou in self.everything.decoded(embedding, boxes, several=False):
                whole = self.image_processor.post_process_masks(
                    logits.float()[None],
                    original,
                    reshaped_input_sizes=model_inputs["reshaped_input_sizes"].tolist(),
                    binarize=False,
                )
                encoded, score, tight = self.image_processor.filter_masks(
                    whole[0], iou, original[0], [0, 0, original[0][1], original[0][0]], 0.0, 0.0, threshold
                )
                masks.extend(encoded)
                scores.append(score)
                around.append(tight)
        return {
            "masks": masks,
            "is_last": model_inputs["is_last"],
            "boxes": torch.cat(around),
            "iou_scores": torch.cat(scores),
        }

    def postprocess(self, model_outputs: list[dict[str, Any]], **output: Any) -> Any:
        if self.everything is not None:
            _refuse({name: output.pop(name) for name in list(output) if name == "crops_nms_thresh"})
        view = copy.copy(self)  # what is put in place there is seen by this call alone
        view.image_processor = copy.copy(self.image_processor)
        view.image_processor.post_process_for_mask_generation = _suppressed if self.everything is None else _all
        return super(MaskGeneration, view).postprocess(model_outputs, **output)


def _refuse(settings: dict[str, Any]) -> None:
    if settings:
        raise ValueError(
            f"{', '.join(sorted(settings))} must not be given: a setting of the grid of points, and this pipeline has boxes"
        )


def _suppressed(masks: list[Any], scores: Tensor, boxes: Tensor, overlap: float) -> tuple[Any, ...]:
    """What the processor does with torchvision."""
    kept = nms(boxes.float(), scores, overlap)
    return _all([masks[i] for i in kept.tolist()], scores[kept], boxes[kept], overlap)


def _all(masks: list[Any], scores: Tensor, boxes: Tensor, overlap: float) -> tuple[Any, ...]:
    return [_drawn(mask) for mask in masks], scores, masks, boxes


def _drawn(mask: dict[str, Any]) -> np.ndarray:
    """A mask bool (H, W) of run lengths down the columns, beginning with what is outside."""
    height, width = mask["size"]
    runs = mask["counts"]
    return np.repeat(np.arange(len(runs)) % 2 == 1, runs).reshape(width, height).T
