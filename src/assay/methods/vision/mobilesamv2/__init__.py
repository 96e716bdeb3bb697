"""MobileSAMv2: SAM segments everything by prompting where a detector found a box, not at a dense grid of points.

Zhang et al., "MobileSAMv2: Faster Segment Anything to Everything" (2023). SAM's mask generator decodes three masks for each point of a
grid (32 x 32, or 64 x 64) and then throws most of them away by predicted IoU, stability and suppression. Here an object detector finds
boxes first; each box is one prompt, gives one mask, and nothing is filtered. The image is encoded once, by whatever encoder.

    from assay.methods.vision.mobilesamv2 import DetectorBoxes, SegmentEverything

    masks = SegmentEverything(sam, DetectorBoxes(detector))(image)      # sam: transformers' SamModel; a list like SAM's generator's

and in the pipeline of transformers:

    from assay.methods.vision.mobilesamv2.pipeline import MaskGeneration
    pipe = pipeline("mask-generation", model=sam, image_processor=processor, pipeline_class=MaskGeneration, proposer=proposer)

- `proposers`: who says where to look: a detector, the connected components of a gradient map, or the grid of points (the baseline).
- `decoder`: SAM's decoder for many prompts of one image, with the products of the image alone computed once.
- `everything`: from an image to masks.  `pipeline`: the same in transformers' "mask-generation".

The detector of the paper (YOLOv8, class-agnostic) was released as weights only; any detector serves. What it misses is not found.
"""

from assay.methods.vision.mobilesamv2.decoder import ImageProducts, box_tokens, decode, image_products, point_tokens
from assay.methods.vision.mobilesamv2.everything import Found, SegmentEverything
from assay.methods.vision.mobilesamv2.proposers import DetectorBoxes, GradientBoxes, PointGrid, components, snap_boxes

__all__ = [
    "DetectorBoxes", "Found", "GradientBoxes", "ImageProducts", "PointGrid", "SegmentEverything", "box_tokens", "components", "decode",
    "image_products", "point_tokens", "snap_boxes",
]  # fmt: skip
