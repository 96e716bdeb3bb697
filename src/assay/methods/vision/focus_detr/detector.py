"""The sparse encoder in a detector of transformers: put in, taken out, and the terms of the loss that it needs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from assay import checks
from assay.methods.core.vision.boxes import to_corners
from assay.methods.vision.focus_detr.encoder import BETAS, Focused, FocusEncoder
from assay.methods.vision.focus_detr.foreground import WEIGHT, Variant, foreground_loss, foreground_targets


@dataclass
class FocusLoss:
    """The loss of a detector of transformers with that of the foreground score added, `WEIGHT` times; in its parts "loss_foreground".

    Sizes of images in pixels are the labels' "size" (height, width), or else those of the real tokens of the finest level. Once the encoder
    has been taken out of the model, it is the loss before.
    """

    encoder: FocusEncoder
    detector: Callable[..., Any]  # the loss before
    strides: tuple[int, ...]
    replaced: Any  # what the model held in its place; None for nothing

    def __call__(self, logits: Tensor, labels: Sequence[Mapping[str, Any]], *rest: Any, **kwargs: Any) -> Any:
        loss, parts, auxiliary = self.detector(logits, labels, *rest, **kwargs)
        seen = self.encoder.focused
        if seen is None:
            return loss, parts, auxiliary
        targets = []
        for image, label in enumerate(labels):
            height, width = label["size"].tolist() if "size" in label else self._pixels(seen, image)
            boxes = to_corners(label["boxes"].float())
            boxes = boxes * boxes.new_tensor([width, height, width, height])
            targets.append(foreground_targets(boxes, seen.shapes, self.strides, variant=self.encoder.variant) >= 0)
        valid = seen.valid if self.encoder.variant == "paper" else None
        foreground = foreground_loss(seen.scores, torch.stack(targets).to(seen.scores.device), valid=valid)
        return loss + WEIGHT * foreground, {**parts, "loss_foreground": foreground}, auxiliary

    def _pixels(self, seen: Focused, image: int) -> tuple[int, int]:
        height, width = seen.shapes[0]
        if seen.valid is not None:
            real = seen.valid[image, : height * width].view(height, width)
            height, width = int(real[:, 0].sum()), int(real[0].sum())
        return height * self.strides[0], width * self.strides[0]


def proposal_loss(output: Any, labels: Sequence[Mapping[str, Any]], config: Any) -> Tensor:
    """The loss of a two-stage model's head on the encoder's tokens, which transformers leaves out: add it to `output.loss`.

    Matching and losses are transformers', of what the head says of every token (`output.enc_outputs_class`, `.enc_outputs_coord_logits`).
    transformers takes the proposals with the highest logit of the first class, so every object counts as one of that class, as in
    Deformable DETR; the released code has all classes there. Without this term neither the proposals nor the head that ranks tokens for
    the attention among objects learn anything. Raises ValueError for the output of a model with one stage.
    """
    from transformers.loss.loss_deformable_detr import DeformableDetrHungarianMatcher, DeformableDetrImageLoss

    if output.enc_outputs_class is None:
        raise ValueError("output must be that of a two-stage model, got one without enc_outputs_class")
    matcher = DeformableDetrHungarianMatcher(config.class_cost, config.bbox_cost, config.giou_cost)
    judge = DeformableDetrImageLoss(matcher, config.num_labels, config.focal_alpha, ["labels", "boxes"])
    logits, boxes = output.enc_outputs_class.float(), output.enc_outputs_coord_logits.float()
    found = {"logits": logits, "pred_boxes": boxes.sigmoid()}
    objects = [{"boxes": each["boxes"], "class_labels": torch.zeros_like(each["class_labels"])} for each in labels]
    parts = judge(found, objects)
    total: Tensor = (
        parts["loss_ce"]
        + config.bbox_loss_coefficient * parts["loss_bbox"]
        + config.giou_loss_coefficient * parts["loss_giou"]
    )
    return total


def apply_focus(
    model: nn.Module,
    rho: float = 0.5,
    betas: Sequence[float] = BETAS,
    topk: int = 300,
    *,
    variant: Variant = "paper",
    strides: Sequence[int] | None = None,
) -> nn.Module:
    """Give transformers' DeformableDetrForObjectDetection (or DeformableDetrModel) a `FocusEncoder`; in place, the model comes back.

    A two-stage model's class head and embedding are shared, as released. `strides` of the feature levels in pixels, the finest first:
    unless given, 32 for the backbone's last map, half of it for each one before and twice for each level after: 8, 16, 32, 64 for three
    maps and four levels. Give those of a backbone whose last map has another. Called with labels, the model's loss has the term of the
    score. The new weights are drawn anew: load their checkpoints after this call, with `strict=False` those of `save_pretrained`, which
    writes some of the old weights by other names (`from_pretrained` before this call reads them). Names of weights that were there stay.

    Then the model has to be trained. Raises ValueError for other models, for one that has been given it, and as `FocusEncoder`.

    >>> apply_focus(nn.Linear(2, 2))
    Traceback (most recent call last):
    ...
    ValueError: model must be a Deformable DETR of transformers, got Linear
    """
    body: Any = getattr(model, "model", model)
    if not hasattr(body, "encoder") or not hasattr(body, "input_proj"):
        raise ValueError(f"model must be a Deformable DETR of transformers, got {type(model).__name__}")
    if isinstance(body.encoder, FocusEncoder):
        raise ValueError("model must have its own encoder, got one with a FocusEncoder: call remove_focus first")
    embed = nn.Sequential(body.enc_output, body.enc_output_norm) if hasattr(body, "enc_output") else None
    heads = getattr(body.decoder, "class_embed", None)
    head = heads[-1] if embed is not None and heads is not None else None
    encoder = FocusEncoder(body.encoder, rho, betas, topk, variant=variant, embed=embed, class_head=head)
    levels = encoder.layers[0].self_attn.n_levels
    if strides is None:
        maps = len(body.backbone.intermediate_channel_sizes)
        strides = [2 ** max(0, 6 - maps + level) for level in range(levels)]
    if len(strides) != levels:
        raise ValueError(f"strides must have one entry a level ({levels}), got {tuple(strides)}")
    sizes = tuple(checks.whole("strides", stride, low=1) for stride in strides)
    body.encoder = encoder.train(model.training)
    if body is not model:
        wrapped: Any = model
        _remove_loss(wrapped)  # of an encoder that was taken out of the model inside
        wrapped.loss_function = FocusLoss(encoder, wrapped.loss_function, sizes, wrapped.__dict__.get("_loss_function"))
    return model


def remove_focus(model: nn.Module) -> nn.Module:
    """Undo `apply_focus`; in place, the model comes back with its dense encoder, its layers as they are now, and its loss.

    Raises ValueError for a model that has no `FocusEncoder`.
    """
    body: Any = getattr(model, "model", model)
    encoder = getattr(body, "encoder", None)
    if not isinstance(encoder, FocusEncoder):
        raise ValueError(f"model must have a FocusEncoder, got {type(encoder).__name__}")
    body.encoder = encoder._model_owns[0].train(model.training)
    encoder.focused = None
    _remove_loss(model)
    return model


def _remove_loss(model: Any) -> None:
    loss = getattr(model, "_loss_function", None)
    if isinstance(loss, FocusLoss):
        if loss.replaced is None:
            del model._loss_function
        else:
            model.loss_function = loss.replaced
