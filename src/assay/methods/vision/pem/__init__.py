"""PEM: segments with mask queries that each take one pixel a head, its prototype, in place of attending to all pixels.

    model = build_pem("pem_resnet50", num_classes=19)                # or Pem(any backbone, num_classes=...)
    found = model(images)                                             # Predictions: class_logits, mask_logits
    semantic(found, images.shape[2:]).argmax(1)                       # a class for each pixel
    panoptic(found, things={11, 12}, size=images.shape[2:])           # segments that do not overlap
    set_loss(model(images, auxiliary=True), labels, masks).backward()

    apply_pem(mask2former)                                            # only its cross-attention, in transformers

Cavagnero et al., "PEM: Prototype-based Efficient MaskFormer for Image Segmentation" (CVPR 2024). It is Mask2Former with two parts made
cheap:

- `attention.py`: `PrototypeCrossAttention` compares queries with pixels, keeps the most similar one, and goes on with as many vectors as
  there are queries: one projection of the pixels and one product, where masked attention has two and two.
- `pixel_decoder.py`: `PixelDecoder`, a pyramid of 1 x 1, deformable 3 x 3 and transposed convolutions, modulated by what the whole map
  holds.

`network.py` puts them together, `backbones.py` has the published backbones, `segments.py` makes maps, `loss.py` trains, and
`mask2former.py` changes a model of transformers. Where the paper's text was not at hand, this follows the released code.

When not to use it: for the last point of quality. The published networks lie a point of panoptic quality below Mask2Former on Cityscapes,
and half a point of mean IoU above.
"""

from __future__ import annotations

from assay.methods.vision.pem.attention import (
    MaskedCrossAttention,
    PrototypeCrossAttention,
    nearest_pixels,
    nearest_pixels_reference,
)
from assay.methods.vision.pem.backbones import ResNet, Stdc
from assay.methods.vision.pem.loss import LossSettings, match_queries, set_loss
from assay.methods.vision.pem.mask2former import apply_pem, remove_pem
from assay.methods.vision.pem.network import CONFIGS, Decoder, Pem, Predictions, build_pem, from_official
from assay.methods.vision.pem.pixel_decoder import (
    ContextModulation,
    DeformableConv,
    PixelDecoder,
    deformable_conv2d,
)
from assay.methods.vision.pem.segments import panoptic, semantic

__all__ = [
    "CONFIGS",
    "ContextModulation",
    "Decoder",
    "DeformableConv",
    "LossSettings",
    "MaskedCrossAttention",
    "Pem",
    "PixelDecoder",
    "Predictions",
    "PrototypeCrossAttention",
    "ResNet",
    "Stdc",
    "apply_pem",
    "build_pem",
    "deformable_conv2d",
    "from_official",
    "match_queries",
    "nearest_pixels",
    "nearest_pixels_reference",
    "panoptic",
    "remove_pem",
    "semantic",
    "set_loss",
]
