"""The terms of the training loss (section 4.3): cross-entropies with their z-loss, and how far predicted caches are from true ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from assay.methods.inference.kv_prediction.sites import Pair, Site, normed

IGNORED = -100


def cross_entropy(logits: Tensor, labels: Tensor, items: Any) -> Pair:
    """Cross-entropy and squared log-partition where something is asked, the mean or the sum over `items`."""
    wanted = labels[:, 1:].to(logits.device)
    asked = wanted != IGNORED
    kept = logits[:, :-1][asked].float()
    count = asked.sum() if items is None else items
    return F.cross_entropy(kept, wanted[asked], reduction="sum") / count, kept.logsumexp(-1).square().sum() / count


def consistency(
    sites: Sequence[Site],
    predicted: Sequence[Pair],
    true: Sequence[Sequence[Tensor]],
    mask: Tensor | None,
    variant: str,
) -> Tensor:
    """The mean absolute difference of normed keys and of values, each over its width, added: the mean over tokens that `mask`
    (batch, tokens) does not leave out, and over layers ("as_released": their sum)."""
    there = torch.ones_like(predicted[0][0][..., 0]) if mask is None else mask
    there = there.to(torch.float32)
    total = torch.zeros((), device=there.device)
    for site, (keys, values), (true_keys, true_values) in zip(sites, predicted, true, strict=True):
        off = (normed(site, keys).float() - normed(site, true_keys).float()).abs().mean(-1)
        off = off + (values.float() - true_values.float()).abs().mean(-1)
        total = total + (off * there).sum()
    total = total / there.sum()
    return total if variant == "as_released" else total / len(sites)


def whole(terms: Mapping[str, Tensor], *, auxiliary_weight: float, consistency: float, z_loss: float) -> Tensor:
    """The loss of its terms: "base", "auxiliary", their "..._z", and "consistency" unless it weighs nothing."""
    loss = terms["base"] + z_loss * terms["base_z"]
    loss = loss + auxiliary_weight * (terms["auxiliary"] + z_loss * terms["auxiliary_z"])
    return loss + consistency * terms["consistency"] if consistency else loss
