"""ConvFirst blocks, their operational intensity, and block fusion: computing a residual block one tile at a time.

Lavin, "On the Efficiency of Convolutional Neural Networks" (2024). Degenerate convolutions (depthwise, grouped, bottleneck)
move many bytes for few operations, so when run layer by layer they wait for memory. ConvFirst puts the spatial convolution (group
width 8) first, like ConvNeXt, so that a whole block can be computed tile by tile without redoing work: the wide hidden tensor then
lives in a cache and never reaches memory.

    model = fuse_blocks(model.eval())          # ConvFirst, FusedMBConv, MBConv, ConvNeXt blocks (also transformers' ConvNext)
    report = efficiency_report(model, image, device)

The general efficiency arithmetic (efficiency, gap, roofline, waterline) is in `assay.measure.roofline`. 1 MAC = 2 operations.
"""

from __future__ import annotations

from assay.methods.vision.convfirst.blocks import ConvFirst, ConvNet, ConvNeXt, FusedMBConv, MBConv
from assay.methods.vision.convfirst.fusing import DepthFirst, PackedLinear, fold, fuse_blocks, this_machine
from assay.methods.vision.convfirst.planner import (
    TILES,
    BlockKind,
    TilePlan,
    block_intensity,
    block_macs_per_pixel,
    block_traffic_per_pixel,
    conv_intensity,
    grouped_conv_intensity,
    plan_tile,
    tile_plan,
)
from assay.methods.vision.convfirst.report import EfficiencyReport, efficiency_report

__all__ = [
    "BlockKind",
    "ConvFirst",
    "ConvNeXt",
    "ConvNet",
    "DepthFirst",
    "EfficiencyReport",
    "FusedMBConv",
    "MBConv",
    "PackedLinear",
    "TILES",
    "TilePlan",
    "block_intensity",
    "block_macs_per_pixel",
    "block_traffic_per_pixel",
    "conv_intensity",
    "efficiency_report",
    "fold",
    "fuse_blocks",
    "grouped_conv_intensity",
    "plan_tile",
    "this_machine",
    "tile_plan",
]
