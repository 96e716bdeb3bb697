"""What experiments about a language model's attention share: weights off the 4-bit grid."""

from __future__ import annotations

import copy

import torch
from torch import nn


def off_grid(model: nn.Module, *, share: float = 0.02, seed: int = 0) -> nn.Module:
    """A copy whose weights are each moved by about `share` of themselves: SmolLM2's lie on the grid of the 4-bit file they come from."""
    generator = torch.Generator().manual_seed(seed)
    moved = copy.deepcopy(model)
    with torch.no_grad():
        for weight in moved.parameters():
            noise = torch.randn(weight.shape, generator=generator).to(weight.device)
            weight.mul_((1 + share * noise).to(weight.dtype))
    return moved
