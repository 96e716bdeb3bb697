"""Attention, and the layers built from it: a transformer layer, and one that reads a context."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from assay import checks

EPS = 1e-6


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, causal: bool = False) -> Tensor:
    """SDPA of (batch, heads, tokens, dim); `mask` bool over keys, (batch, 1, 1 or queries, keys). A query without keys gets zeros.

    >>> q, k, v = torch.randn(3, 1, 2, 5, 8)
    >>> attend(q, k, v, torch.zeros(1, 1, 1, 5, dtype=torch.bool)).abs().max().item()  # no keys
    0.0
    """
    if mask is None:
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal)
    if causal:
        mask = mask & torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril()
    some = mask.any(-1, keepdim=True)
    return F.scaled_dot_product_attention(q, k, v, mask | ~some) * some


class Attention(nn.Module):
    """Multi-head attention of x (batch, tokens, dim) over a context (batch, keys, context_dim), min(dim, context_dim) wide."""

    def __init__(self, dim: int, heads: int, context_dim: int | None = None):
        super().__init__()
        context_dim = dim if context_dim is None else context_dim
        inner = min(dim, context_dim)
        if inner % checks.whole("heads", heads, low=1):
            raise ValueError(f"heads must divide the attention's width ({inner}), got {heads}")
        self.heads = heads
        self.q_proj = nn.Linear(dim, inner)
        self.k_proj, self.v_proj = nn.Linear(context_dim, inner), nn.Linear(context_dim, inner)
        self.o_proj = nn.Linear(inner, dim)

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(2, (self.heads, -1)).transpose(1, 2)

    def keys(self, context: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values, (batch, heads, keys, dim) each."""
        return self._heads(self.k_proj(context)), self._heads(self.v_proj(context))

    def over(self, x: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, causal: bool = False) -> Tensor:
        """Attention of x over keys and values."""
        y = attend(self._heads(self.q_proj(x)), k, v, mask, causal)
        out: Tensor = self.o_proj(y.transpose(1, 2).flatten(2))
        return out

    def forward(self, x: Tensor, context: Tensor, mask: Tensor | None = None, causal: bool = False) -> Tensor:
        return self.over(x, *self.keys(context), mask, causal)


def mlp(dim: int, ratio: int) -> nn.Sequential:
    """Two linear layers with GELU between them, `ratio` * dim wide: (..., dim) -> (..., dim)."""
    return nn.Sequential(nn.Linear(dim, ratio * dim), nn.GELU(), nn.Linear(ratio * dim, dim))


class Block(nn.Module):
    """A pre-norm transformer layer on (batch, tokens, dim)."""

    def __init__(self, dim: int, heads: int, ratio: int):
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(dim, eps=EPS), Attention(dim, heads)
        self.mlp_norm, self.mlp = nn.LayerNorm(dim, eps=EPS), mlp(dim, ratio)

    def forward(self, x: Tensor, mask: Tensor | None = None, causal: bool = False) -> Tensor:
        y = self.norm(x)
        x = x + self.attention(y, y, mask, causal)
        out: Tensor = x + self.mlp(self.mlp_norm(x))
        return out

    def behind(self, x: Tensor, k: Tensor, v: Tensor, causal: bool) -> tuple[Tensor, Tensor, Tensor]:
        """x after tokens whose keys and values are k and v: the outputs for x, and all keys and values."""
        y = self.norm(x)
        new_k, new_v = self.attention.keys(y)
        before, tokens = k.shape[2], x.shape[1]
        k, v = torch.cat([k, new_k], 2), torch.cat([v, new_v], 2)
        mask = None
        if causal and tokens > 1:
            mask = torch.ones(tokens, before + tokens, dtype=torch.bool, device=x.device).tril(before)
        x = x + self.attention.over(y, k, v, mask)
        return x + self.mlp(self.mlp_norm(x)), k, v


class Cross(nn.Module):
    """x + attention of x over a context, a norm for each; `ratio` > 0 adds an MLP."""

    def __init__(self, dim: int, context_dim: int, heads: int, ratio: int = 0):
        super().__init__()
        self.norm, self.context_norm = nn.LayerNorm(dim, eps=EPS), nn.LayerNorm(context_dim, eps=EPS)
        self.attention = Attention(dim, heads, context_dim)
        if ratio:
            self.mlp_norm, self.mlp = nn.LayerNorm(dim, eps=EPS), mlp(dim, ratio)

    def keys(self, context: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of the context, (batch, heads, keys, dim) each."""
        return self.attention.keys(self.context_norm(context))

    def over(self, x: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        """x over a context whose keys and values are k and v."""
        x = x + self.attention.over(self.norm(x), k, v, mask)
        return x + self.mlp(self.mlp_norm(x)) if hasattr(self, "mlp") else x

    def forward(self, x: Tensor, context: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.over(x, *self.keys(context), mask)
