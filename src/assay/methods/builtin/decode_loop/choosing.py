"""Choosing tokens from logits: greedy, or drawn with temperature, top-k and top-p, each row in its own way."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from assay import checks
from assay.methods.core import kernels

COLDEST = 1e-30
MOST_K = (1 << 31) - 1  # which no vocabulary reaches


@dataclass(frozen=True)
class Sampling:
    """How a token is drawn: temperature first, then top-k (0: off), then top-p (1: off).

    Raises TypeError or ValueError for a temperature below 1e-30, by which float32 cannot divide (near 0, greedy is what is meant), a
    top-k outside 0..2^31 - 1 and a top-p outside 0..1.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        checks.number("temperature", self.temperature, low=COLDEST)
        checks.whole("top_k", self.top_k, low=0, high=MOST_K)
        checks.number("top_p", self.top_p, low=0, high=1)


Choices = Sampling | Sequence[Sampling | None] | None  # for all rows, or for each; None is greedy


def per_row(sampling: Choices, rows: int) -> list[Sampling | None]:
    """One entry a row. Raises ValueError for another number of them, TypeError for something else in them."""
    listed = [sampling] * rows if sampling is None or isinstance(sampling, Sampling) else list(sampling)
    if len(listed) != rows:
        raise ValueError(f"sampling must have one entry per row, got {len(listed)} for {rows}")
    for entry in listed:
        if entry is not None and not isinstance(entry, Sampling):
            raise TypeError(f"sampling must hold Sampling or None (greedy), got {checks.shown(entry)}")
    return listed


def table(choices: Sequence[Sampling | None]) -> Tensor:
    """Temperature (0: greedy), top-k and top-p of each row, as the kernel wants them: float64 (rows, 3)."""
    rows = [(0.0, 0.0, 1.0) if row is None else (row.temperature, row.top_k, row.top_p) for row in choices]
    return torch.tensor(rows, dtype=torch.float64).view(len(rows), 3)


def checked_uniforms(uniforms: Tensor, shape: tuple[int, ...]) -> Tensor:
    """`uniforms` itself. Raises TypeError unless they are float64, ValueError unless they have that shape and lie in [0, 1)."""
    checks.tensor("uniforms", uniforms, shape=shape, dtype=torch.float64)
    if not bool(((uniforms >= 0) & (uniforms < 1)).all()):
        raise ValueError("uniforms must lie in [0, 1)")
    return uniforms.contiguous()


def draw(logits: Tensor, sampling: Choices, uniforms: Tensor | None = None) -> Tensor:
    """One token (rows,) int64 per row of float32 logits (rows, vocabulary); greedy where a row's sampling is None.

    `uniforms` (rows,) float64 in [0, 1) are the random numbers; without them torch's generator gives them.
    Raises TypeError or ValueError for other shapes, dtypes and numbers.
    """
    checks.tensor("logits", logits, ndim=2, dtype=torch.float32)
    choices = per_row(sampling, len(logits))
    if uniforms is None:
        uniforms = torch.rand(len(logits), dtype=torch.float64)
    uniforms = checked_uniforms(uniforms, (len(logits),))
    if not kernels.load("decode"):
        return torch.stack([choose(row, one, u) for row, one, u in zip(logits, choices, uniforms, strict=True)])
    drawn: Tensor = torch.ops.assay.draw_tokens(logits.contiguous(), table(choices), uniforms)
    return drawn


def choose(logits: Tensor, sampling: Sampling | None, uniform: Tensor) -> Tensor:
    """The token () of one row of logits (vocabulary,), in torch."""
    return logits.argmax() if sampling is None else draw_in_torch(logits[None], sampling, uniform[None])[0]


def draw_in_torch(logits: Tensor, sampling: Sampling, uniforms: Tensor) -> Tensor:
    """`draw` in torch, from given `uniforms` (rows,) in [0, 1): where the cumulative probability passes them."""
    scores = logits.double() / sampling.temperature
    if 0 < sampling.top_k < scores.shape[1]:
        scores = scores.masked_fill(scores < scores.topk(sampling.top_k).values[:, -1:], -torch.inf)
    probability = scores.softmax(1)
    if sampling.top_p < 1:
        ordered = probability.sort(1, descending=True).values
        kept = ((ordered.cumsum(1) - ordered) < sampling.top_p).sum(1, keepdim=True).clamp_min(1)
        probability = probability.masked_fill(probability < ordered.gather(1, kept - 1), 0)
    cumulative = probability.cumsum(1)
    chosen = torch.searchsorted(cumulative, uniforms[:, None] * cumulative[:, -1:], right=True)[:, 0]
    return chosen.clamp_max(logits.shape[1] - 1)
