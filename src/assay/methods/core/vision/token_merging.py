"""Merging alike tokens between the blocks of a vision transformer, so that later blocks have fewer to read.

Bolya et al., "Token Merging: Your ViT But Faster" (2023): tokens are split into two sets in turns, each of the first set is tied to
the most similar one of the second, and the `tokens` strongest ties become averages, weighted by how many patches each token stands
for. The work is really left out: every block is given a shorter sequence. Departures: similarity is that of the hidden states between
blocks (the paper's is of the keys within one), and attention does not weigh a merged token by its size.

When not to use it: models that need the map of tokens afterwards (segmentation, detection).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from assay import checks

SPECIAL = {"vit": 1, "deit": 2, "vit_msn": 1}
"""Models of transformers whose blocks take and give (batch, tokens, channels), and the tokens in front that stay: class, distillation."""


def merge(x: Tensor, size: Tensor, tokens: int, special: int) -> tuple[Tensor, Tensor]:
    """`tokens` fewer: x (B, N, C) and the patches each stands for, size (B, N, 1), to (B, N - tokens, C) and (B, N - tokens, 1).

    The first `special` tokens are left alone and stay in front. At most half of the others go.
    """
    batch, count, channels = x.shape
    tokens = min(tokens, (count - special) // 2)
    if tokens <= 0:
        return x, size
    rest, weight = x[:, special:], size[:, special:]
    alike = F.normalize(rest.float(), dim=-1)
    scores = alike[:, ::2] @ alike[:, 1::2].transpose(1, 2)
    strength, partner = scores.max(-1)
    order = strength.argsort(dim=-1, descending=True)
    gone, kept = order[:, :tokens], order[:, tokens:].sort(dim=-1).values
    wide = (batch, -1, channels)

    def picked(values: Tensor, places: Tensor) -> Tensor:
        return values.gather(1, places[..., None].expand(*places.shape, values.shape[-1]))

    first, second = rest[:, ::2] * weight[:, ::2], rest[:, 1::2] * weight[:, 1::2]
    sizes = weight[:, 1::2]
    target = partner.gather(1, gone)
    second = second.scatter_add(1, target[..., None].expand(wide), picked(first, gone))
    sizes = sizes.scatter_add(1, target[..., None], picked(weight[:, ::2], gone))
    merged = torch.cat([x[:, :special], picked(rest[:, ::2], kept), second / sizes], 1)
    return merged.to(x.dtype), torch.cat([size[:, :special], picked(weight[:, ::2], kept), sizes], 1)


class MergedBlocks(nn.Module):
    """A model's blocks as one: after each but the last, `tokens` tokens are merged.

    The blocks are given no attention mask: pictures have no padding, and the model's own mask is as wide as the patches were many.
    """

    def __init__(self, blocks: Iterable[nn.Module], tokens: int, special: int) -> None:
        super().__init__()
        self.blocks, self.tokens, self.special = nn.ModuleList(blocks), tokens, special

    def forward(self, x: Tensor, attention_mask: Tensor | None = None, **named: Any) -> Tensor:
        size = torch.ones_like(x[..., :1])
        last = len(self.blocks) - 1
        for place, block in enumerate(self.blocks):
            x = block(x, None, **named)
            if place < last:
                x, size = merge(x, size, self.tokens, self.special)
        return x


def why_not(model: nn.Module) -> str:
    """Why tokens of this model cannot be merged; "" where they can."""
    kind = getattr(getattr(model, "config", None), "model_type", "")
    if kind not in SPECIAL:
        return f"tokens can be merged in {', '.join(SPECIAL)}, this is {kind or type(model).__name__}"
    if any(isinstance(module, MergedBlocks) for module in model.modules()):
        return "its tokens are merged already"
    blocks = _blocks(model)
    return "" if blocks is not None and len(blocks) > 1 else "it has no list of blocks"


def merge_tokens(model: nn.Module, tokens: int) -> nn.Module:
    """Merge `tokens` tokens after every block but the last, in place: the model's list of blocks then holds one `MergedBlocks`.

    Raises ValueError for a model it does not fit, or `tokens` < 1.
    """
    checks.whole("tokens", tokens, low=1)
    if reason := why_not(model):
        raise ValueError(reason)
    blocks = _blocks(model)
    assert blocks is not None
    special = SPECIAL[model.config.model_type]  # type: ignore[union-attr, index]
    merged = MergedBlocks(list(blocks), tokens, special)
    del blocks[:]
    blocks.append(merged)
    return model


def _blocks(model: nn.Module) -> nn.ModuleList | None:
    """The longest list of blocks of one class."""
    lists = [
        module
        for module in model.modules()
        if isinstance(module, nn.ModuleList) and len(module) and len({type(block) for block in module}) == 1
    ]
    return max(lists, key=len, default=None)
