"""Embeddings of texts by a model that was made to continue them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from assay.methods.builtin.decode_loop import length_groups
from assay.server.backends import why_changing, why_whole_attention

POOLING = "the mean over the tokens of the model's last hidden states, float32, not normalised"
MOST_TOKENS = 4096  # of a pass, padding included, unless one text alone has more; our choice


def why_no_embeddings(model: Any) -> str:
    """Why a model has no embeddings to give; empty if it has."""
    body = getattr(model, "base_model", model)
    if body is model or body.get_output_embeddings() is not None:  # a model around a model has a pass of its own
        return f"{type(model).__name__} does not show what lies below its head"
    return ""


def passes(lengths: Sequence[int], *, alike: bool = False) -> list[list[int]]:
    """Which texts go through the model together, by their lengths: similar ones, or with `alike` only those that are equally long.

    >>> passes([5, 900, 6, 900]), passes([5, 900, 6, 900], alike=True)
    ([[0, 2], [1, 3]], [[0], [2], [1, 3]])
    """
    if alike:
        groups = [[i for i, length in enumerate(lengths) if length == one] for one in sorted(set(lengths))]
    else:
        groups = length_groups(list(lengths))
    found = []
    for group in groups:
        size = max(1, MOST_TOKENS // max(lengths[i] for i in group))
        found += [group[first : first + size] for first in range(0, len(group), size)]
    return found


@torch.inference_mode()
def why_alike(model: Any) -> str:
    """Why texts of different lengths may not share a pass; empty where padding behind the shorter changes nothing.

    Besides what is known to look at the longest text, that is tried on a few tokens.
    """
    if why := why_whole_attention(model) or why_changing(model):
        return why
    try:
        alone, padded = (torch.tensor(embed(model, texts)[0]) for texts in ([[1, 2, 3]], [[1, 2, 3], [3, 1, 2, 3, 1]]))
        rounding = 1e-3 if next(model.parameters()).dtype.itemsize >= 4 else 5e-2
        same = float((padded - alone).norm()) <= rounding * float(alone.norm())
    except Exception:  # whatever a model makes of padding on that side
        same = False
    return "" if same else f"{type(model).__name__} computes otherwise where a text is padded"


@torch.inference_mode()
def embed(model: Any, texts: Sequence[Sequence[int]]) -> list[list[float]]:
    """For each text the mean over its tokens of the last hidden states, (hidden,) in float32 and not normalised; one pass for all.

    Shorter texts are padded behind their end, which a model that looks back only never sees: a text's embedding is that of the text
    alone but for rounding (`why_alike` says of which models that is not so). The hidden states are those the model's head reads,
    after the last norm. A decoder sees to the left only, so the mean weighs all of a text but its first tokens know little of it:
    for search, a model that was trained for embeddings does better.
    """
    lengths = torch.tensor([len(ids) for ids in texts], device=model.device)
    width = int(lengths.max())
    inputs = torch.tensor([[*ids, *[0] * (width - len(ids))] for ids in texts], device=model.device)
    mask = (torch.arange(width, device=model.device) < lengths[:, None]).long()
    hidden: Tensor = model.base_model(input_ids=inputs, attention_mask=mask, use_cache=False).last_hidden_state
    return [row[: len(ids)].float().mean(0).tolist() for row, ids in zip(hidden, texts, strict=True)]
