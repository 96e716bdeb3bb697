"""Embeddings of texts by a model that was made to continue them."""

from __future__ import annotations

from typing import Any

import torch

POOLING = "the mean over the tokens of the model's last hidden states, float32, not normalised"


def why_no_embeddings(model: Any) -> str:
    """Why a model has no embeddings to give; empty if it has."""
    body = getattr(model, "base_model", model)
    if body is model:
        return f"{type(model).__name__} does not show what lies below its head"
    return ""


@torch.inference_mode()
def embed(model: Any, ids: list[int]) -> list[float]:
    """The mean over the tokens of the last hidden states, (hidden,) in float32 and not normalised.

    The hidden states are those the model's head reads, after the last norm. A decoder sees to the left only, so the mean weighs
    all of a text but its first tokens know little of it: for search, a model that was trained for embeddings does better.
    """
    inputs = torch.tensor([ids], device=model.device)
    out = model.base_model(input_ids=inputs, attention_mask=torch.ones_like(inputs), use_cache=False)
    pooled: list[float] = out.last_hidden_state[0].float().mean(0).tolist()
    return pooled
