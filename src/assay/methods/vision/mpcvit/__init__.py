"""MPCViT: which heads of a vision transformer need a softmax when it is evaluated by secure two-party computation.

Zeng et al., "MPCViT: Searching for Accurate and Efficient MPC-Friendly Vision Transformer with Heterogeneous Attention" (ICCV 2023).
On secret shares linear algebra is cheap, and every comparison, exponential and reciprocal costs messages to and fro. So most heads get
scaling attention A / n, which needs none of them; the heads that a search finds to matter keep ReLU softmax. The network is then trained
from the start with the softmax network as its teacher. MPCViT+ does the same for the GELU of each token.

    model = build("mpcvit_7_4_32", num_classes=10)                     # every head a mixture; train with penalty(model), clamp(model)
    chosen = select([mix.alpha for mix in mixtures(model)], 0.3)        # the heads that stay ReLU softmax
    harden(again, chosen)                                              # another model; train it with distillation_loss
    WAN.latency(again)                                                 # seconds of counted rounds and bytes
    private_forward(again, images, TwoParties())                       # the same, evaluated on shares
    register(); AutoModel.from_pretrained(path, attn_implementation="relu_softmax")

Files: `attention` (the kinds, and in transformers), `search` (mixture, choice, distillation), `mlp` (MPCViT+), `model` (the two networks),
`mpc` (two parties on shares), `private` (a network on shares), `cost` (what that costs).
"""

from __future__ import annotations

from assay.methods.vision.mpcvit.attention import EPS, KINDS, Kind, attend, register, weights
from assay.methods.vision.mpcvit.cost import LAN, WAN, MPCCostModel
from assay.methods.vision.mpcvit.mlp import FusedMlp, TokenMlp, fuse, harden_tokens, token_mlps
from assay.methods.vision.mpcvit.model import CONFIGS, MPCViT, from_official
from assay.methods.vision.mpcvit.mpc import Protocol, Shared, Traffic, Transcript, TwoParties
from assay.methods.vision.mpcvit.private import private_attention, private_forward
from assay.methods.vision.mpcvit.search import (
    LAMBDA,
    HeadMixture,
    clamp,
    distillation_loss,
    harden,
    kept_count,
    mixtures,
    penalty,
    select,
)

__all__ = [
    "CONFIGS",
    "EPS",
    "FusedMlp",
    "HeadMixture",
    "KINDS",
    "Kind",
    "LAMBDA",
    "LAN",
    "MPCCostModel",
    "MPCViT",
    "Protocol",
    "Shared",
    "TokenMlp",
    "Traffic",
    "Transcript",
    "TwoParties",
    "WAN",
    "attend",
    "clamp",
    "distillation_loss",
    "from_official",
    "fuse",
    "harden",
    "harden_tokens",
    "kept_count",
    "mixtures",
    "penalty",
    "private_attention",
    "private_forward",
    "register",
    "select",
    "token_mlps",
    "weights",
]
