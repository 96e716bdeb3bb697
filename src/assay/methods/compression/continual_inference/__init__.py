"""Continual inference networks: a clip network that takes one frame a step and repeats nothing, and adapters for pruned networks.

L. Hedegaard, "Efficient Online Processing with Deep Neural Networks" (thesis, 2023), with arXiv 2106.00050 (3D convolutions), 2201.06268
(transformers) and 2211.10155 (structured pruning adapters).

    net = to_continual(model, window=16)       nn.Conv1d to Conv3d, pools, norms, skip connections (`Branches`)
    stream = Stream(net)
    y = stream.forward_step(frame)             None for the first `stream.delay` frames

A step does a clip's work divided by its length. That pays for answers that are wanted for every frame; where one a clip is
enough, run the clip. On small frames the calls of the layers cost more than their products, and less is gained than is counted.
The adapters (`adapters`) are the thesis's other part and know nothing of streams.
"""

from __future__ import annotations

from assay.methods.compression.continual_inference.adapters import (
    Prototypes,
    SPLoPA,
    SPLoRA,
    adapt,
    prune_chain,
    pruned,
)
from assay.methods.compression.continual_inference.attention import (
    ContinualEncoder,
    RecycledPositions,
    attention_over,
    retroactive_step,
    single_output_step,
)
from assay.methods.compression.continual_inference.convert import Settings, Stream, register, to_continual
from assay.methods.compression.continual_inference.modules import (
    Branches,
    Chain,
    Conv,
    Parallel,
    PerFrame,
    Streaming,
    Tokens,
    WindowPool,
)
from assay.methods.compression.continual_inference.state import EMPTY, StreamState, join

__all__ = [
    "EMPTY",
    "Branches",
    "Chain",
    "ContinualEncoder",
    "Conv",
    "Parallel",
    "PerFrame",
    "Prototypes",
    "RecycledPositions",
    "SPLoPA",
    "SPLoRA",
    "Settings",
    "Stream",
    "StreamState",
    "Streaming",
    "Tokens",
    "WindowPool",
    "adapt",
    "attention_over",
    "join",
    "prune_chain",
    "pruned",
    "register",
    "retroactive_step",
    "single_output_step",
    "to_continual",
]
