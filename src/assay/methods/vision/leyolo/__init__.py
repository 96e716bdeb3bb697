"""LeYOLO: an object detector of under 5 GFLOP, of inverted bottlenecks all through, with a lean neck and a head without dense convolutions.

Hollard et al., "LeYOLO, New Scalable and Efficient CNN Architecture for Object Detection" (2024). Four ideas:

- Backbone: depthwise convolutions of 3x3 down to a stride of 8, of 5x5 below; channels grow slowly, and what a stage needs of width it
  gets inside its blocks (3 times in the stages of 32 and 64 channels, 6 times in that of 96, from its first block on).
- A pointwise convolution that widens nothing is left out: in the first block, and where the neck's finest level joins two maps.
- FPAN, the neck: the usual way down and up again, of the same blocks, narrow where maps are large.
- DNiN, the head: boxes and classes apart, each by a 1x1, two depthwise 3x3 and a 1x1.

    model = leyolo("nano", num_classes=10)
    loss = losses(model, model(images), boxes, labels).total
    found = model.eval().detect(images)                                   # boxes, scores, labels of each image
    model = LeYOLO(read_graph("mine.yaml"))                               # rows of [from, repeats, module, args]
    export_onnx(model.eval(), "leyolo.onnx", images)

Files: `blocks` (layers), `graph` (which layers, from which), `model` (the detector), `loss` (what it learns by). The paper counts 2 FLOP
for a multiply-accumulate, and 8 for an element that leaves a batch norm of a block. Settings and layouts are those of the released code.
"""

from __future__ import annotations

from assay.methods.vision.leyolo.blocks import BINS, ConvNorm, Head, InvertedBottleneck, PooledPyramid
from assay.methods.vision.leyolo.graph import (
    MODULES,
    SIZES,
    WIRINGS,
    Graph,
    Made,
    Node,
    Place,
    graph_of,
    head_of,
    in_a_row,
    published,
    read_graph,
)
from assay.methods.vision.leyolo.loss import Assigned, Losses, assign, distribution_loss, losses
from assay.methods.vision.leyolo.model import (
    Deployed,
    Found,
    LeYOLO,
    deployed,
    export_onnx,
    from_official,
    leyolo,
    select,
)

__all__ = [
    "Assigned",
    "BINS",
    "ConvNorm",
    "Deployed",
    "Found",
    "Graph",
    "Head",
    "InvertedBottleneck",
    "LeYOLO",
    "Losses",
    "MODULES",
    "Made",
    "Node",
    "Place",
    "PooledPyramid",
    "SIZES",
    "WIRINGS",
    "assign",
    "deployed",
    "distribution_loss",
    "export_onnx",
    "from_official",
    "graph_of",
    "head_of",
    "in_a_row",
    "leyolo",
    "losses",
    "published",
    "read_graph",
    "select",
]
