"""State space models for (medical) images, after the survey arXiv 2406.03430: one block, exchangeable mixers, equal accounting.

The survey orders Mamba-style models for segmentation, classification, registration and reconstruction. This room has what they share:
the sequence mixers "mamba" (S6), "mamba2" (SSD) and "s4d"; a vision block whose mixer is a convolution, window attention, full
attention or a selective scan in any scan order; a U-shaped segmentation model and a classifier built from that block; Dice and HD95;
and the survey's table as data (`taxonomy`). All of it takes images and, with `dims=3`, volumes. The scans themselves are in
`assay.methods.core.mixers.scan`, the orders in which grids are scanned in `assay.methods.core.mixers.orders`.

    model = UNet(1, 1, mixer="s6", order="cross", dim=96)                        # the form of VM-UNet
    rival = UNet(1, 1, mixer="window", dim=match_width(300_000, in_chans=1, mixer="window"))  # 0.3 M
    volume = UNet(1, 4, mixer="s6", dims=3, dim=48)                              # scans along all three axes

Papers differ in the discretisation of B, in whether directions share parameters, and in how directions are merged: here
`discretisation` ("euler" as Mamba), `tied` (False as VMamba), always a sum. `our choice`: attention mixers get positions from a
depthwise convolution 3 cells wide; light models (UltraLight VM-UNet) share one mixer among `groups` of channels. 1 MAC = 2 FLOPs.

When NOT to use it: small images and short sequences, where convolution or attention is as good and faster. The survey itself
gives no common numbers, and those of its papers cannot be compared (other splits, other preprocessing).
"""

from __future__ import annotations

from assay.methods.mixers.ssm_survey.entries import Entry, taxonomy
from assay.methods.mixers.ssm_survey.grids import (
    GRID_MIXERS,
    ConvMixer,
    FullAttention,
    ScanMixer,
    WindowAttention,
    grid_mixer,
)
from assay.methods.mixers.ssm_survey.metrics import dice, dice_loss, hausdorff_distance
from assay.methods.mixers.ssm_survey.models import Block, Classifier, Encoder, UNet, match_width
from assay.methods.mixers.ssm_survey.sequence import S4D, Mamba, Mamba2, attention_flops, mamba_parameters

__all__ = [
    "Block",
    "Classifier",
    "ConvMixer",
    "Encoder",
    "Entry",
    "FullAttention",
    "GRID_MIXERS",
    "Mamba",
    "Mamba2",
    "S4D",
    "ScanMixer",
    "UNet",
    "WindowAttention",
    "attention_flops",
    "dice",
    "dice_loss",
    "grid_mixer",
    "hausdorff_distance",
    "mamba_parameters",
    "match_width",
    "taxonomy",
]
