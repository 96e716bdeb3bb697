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

OUTPUT = {"timeout", "mask_threshold", "output_rle_mask", "output_bboxes_mask"}
"""The settings of a call that have nothing to do with the grid of points."""


class MaskGeneration(MaskGenerationPipeline):
    """transformers' pipeline with the boxes of a proposer in place of its grid of points: a mask for each box, none of them filtered.

    `proposer`, `batch`, `snap` and `share` are those of `SegmentEverything`; the image is prepared by the pipeline's image processor.
    A call takes images and the pipeline's own settings of the output. The settings of the grid and of its filters raise ValueError, and so
    does a `batch_size` above 1, since images are taken one by one: before the first image is opened.
    Without a proposer it is the pipeline as it was, grid and all. In both cases suppression is ours, so that torchvision need not be
    there; nothing outside of a call is changed. No boxes give no masks.
    """

    model: Any
    image_processor: Any

    def __init__(
        self, *, proposer: Proposer | None = None, batch: int = 320, snap: float = SNAP, share: bool = True, **kwargs: Any
    ) -> None:  # fmt: skip
        self.everything: SegmentEverything | None = None
        if proposer is not None:  # told before the model is moved to the pipeline's device
            if not callable(proposer):
                raise TypeError(f"proposer must be callable with an image, or None, got {checks.shown(proposer)}")
            self.everything = SegmentEverything(kwargs.get("model"), proposer, batch=batch, snap=snap, share=share)
        super().__init__(**kwargs)

    def get_iterator(
        self,
        inputs: Any,
        num_workers: int,
        batch_size: int,
        preprocess_params: dict[str, Any],
        forward_params: dict[str, Any],
        postprocess_params: dict[str, Any],
    ) -> Any:
        if self.everything is not None:
            grid = {*preprocess_params, *forward_params, *postprocess_params} - OUTPUT
            if grid:
                raise ValueError(
                    f"{', '.join(sorted(grid))} must not be given: a setting of the grid of points, and this pipeline has boxes"
                )
            if batch_size != 1:
                raise ValueError(
                    f"batch_size must be 1, got {batch_size}: images come one by one; `batch` boxes of each are decoded together"
                )
        return super().get_iterator(
            inputs, num_workers, batch_size, preprocess_params, forward_params, postprocess_params
        )

    def preprocess(self, image: Any, timeout: float | None = None, **grid: Any) -> Iterator[dict[str, Any]]:
        if self.everything is None:
            yield from super().preprocess(image, timeout=timeout, **grid)
            return
        picture = load_image(image, timeout=timeout)
        inputs = self.image_processor(images=picture, return_tensors="pt").to(self.dtype)
        pixels = torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1) / 255
        boxes = self.everything.boxes(pixels)
        height, width = inputs["reshaped_input_sizes"][0].tolist()  # the processor's own, whose settings may be any
        factors = boxes.new_tensor([width / picture.width, height / picture.height] * 2)
        yield {"boxes": boxes * factors, "is_last": True, **inputs}

    def _forward(self, model_inputs: dict[str, Any], **filters: Any) -> Any:
        if self.everything is None:
            return super()._forward(model_inputs, **filters)
        threshold = filters.get("mask_threshold", 0.0)
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
        view = copy.copy(self)  # what is put in place there is seen by this call alone
        view.image_processor = copy.copy(self.image_processor)
        view.image_processor.post_process_for_mask_generation = _suppressed if self.everything is None else _all
        return super(MaskGeneration, view).postprocess(model_outputs, **output)


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
