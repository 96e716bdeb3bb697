"""FIT: transformers with local attention inside groups of tokens and global attention over a few latents per group (arXiv 2305.12689).

Tokens are (batch, t groups, n tokens, dim), with m << n latents per group. A layer string like "(2)4(2)4(2)" says how the layers
alternate: local layers (in parentheses) attend inside each group; the group's latents read its tokens; global layers attend over
all latents; the tokens of each group read back what its latents learnt ("write"). Groups exchange information only through latents.
Attention looks at L n pairs in a local layer and (L m / n)^2 in a global one; if n grows as the cube root of L, both are L^(4/3).

After the paper and the official code: pre-norm layers, epsilon 1e-6, MLP of ratio 4, cross-attention as wide as the narrower side
with a norm for each side, positions shared by all groups, no write after the last stage (so "(2)4" never writes: its tokens stay
local). In the decoder, tokens are causal inside a group, latents are causal over groups, and a group reads the latents of the group
before. `our choice`: padding masks apply to local layers, reads and global layers (groups of only padding are ignored); generation
keeps the current group's keys, and the latents' keys of earlier groups. Chunk-causal attention over the latents is a mask.

When NOT to use it: for sequences of up to about a thousand tokens, where full attention is as cheap; where single tokens far apart
must see each other exactly (everything between groups passes through m vectors); with m growing as n, which is quadratic again.

The image denoiser, `fit.denoiser.FITDenoiser`, needs diffusers and is imported from there.
"""

from __future__ import annotations

from assay.methods.attention.fit.counts import FITSize
from assay.methods.attention.fit.decoder import FITConfig, FITDecoder, State
from assay.methods.attention.fit.grouping import group_image, group_sequence, ungroup_image, ungroup_sequence
from assay.methods.attention.fit.layers import EPS, Attention, Block, Cross, attend, mlp
from assay.methods.attention.fit.model import (
    FIT,
    Causal,
    Interleaved,
    Positions,
    Stage,
    Stages,
    format_layers,
    parse_layers,
    sincos,
)

__all__ = [
    "EPS",
    "Attention",
    "Block",
    "Causal",
    "Cross",
    "FIT",
    "FITConfig",
    "FITDecoder",
    "FITSize",
    "Interleaved",
    "Positions",
    "Stage",
    "Stages",
    "State",
    "attend",
    "format_layers",
    "group_image",
    "group_sequence",
    "mlp",
    "parse_layers",
    "sincos",
    "ungroup_image",
    "ungroup_sequence",
]
