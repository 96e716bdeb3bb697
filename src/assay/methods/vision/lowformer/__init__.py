"""LowFormer: multiply-accumulates are spent where hardware is fast; and a study of where that is.

Nottebaum et al., "LowFormer: Hardware Efficient Design for Convolutional Transformer Backbones" (2024), and its journal extension "Beyond
MACs" (2026). Depthwise convolutions and layers at high resolution take long for the MACs they do. LowFormer has dense fused
convolutions, few layers at high resolution, and an attention that runs on half the resolution and half the channels.

    model = build("lowformer_b1", num_classes=10)
    layer = Lowtention(128, stride=2)                                    # (B, 128, H, W) to the same
    print(bench_modules(equal_macs(28, 16), batch=8).table())            # milliseconds and GMAC/s of modules that do equal work

`model.py` is the network, `study.py` the measurement.
"""

from __future__ import annotations

from assay.methods.vision.lowformer.model import (
    CONFIGS,
    FusedMBConv,
    LowFormer,
    LowFormerBlock,
    Lowtention,
    MBConv,
    from_official,
    lowtention_heads,
)
from assay.methods.vision.lowformer.study import (
    Case,
    Row,
    Study,
    bench_modules,
    equal_macs,
    fused_and_not,
    rank_correlation,
)

__all__ = [
    "CONFIGS",
    "Case",
    "FusedMBConv",
    "LowFormer",
    "LowFormerBlock",
    "Lowtention",
    "MBConv",
    "Row",
    "Study",
    "bench_modules",
    "equal_macs",
    "from_official",
    "fused_and_not",
    "lowtention_heads",
    "rank_correlation",
]
