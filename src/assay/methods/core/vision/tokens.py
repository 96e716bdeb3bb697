"""Work on some tokens only: pick the best by a score, gather them, and put what was made of them back.

    picked = best_tokens(scores, k, valid=valid)            # (B, K), best first
    some = gather_tokens(tokens, picked)                    # (B, K, C)
    tokens = scatter_tokens(tokens, picked, layer(some))    # the others stay bit for bit

Images of a batch may keep different numbers: `k` may be a tensor, then rows are as long as the longest and `kept_of` says which of
their places count.
"""

from __future__ import annotations

import torch
from torch import Tensor

from assay import checks


def best_tokens(scores: Tensor, k: int, *, valid: Tensor | None = None) -> Tensor:
    """Indices (B, k) of the `k` highest scores (B, N) of each row, the highest first; of equal scores the earlier token.

    Tokens that are not `valid` (bool (B, N)) come behind all others, whatever their score. NaN raises ValueError, as do `k` outside
    1 to N and other shapes.

    >>> best_tokens(torch.tensor([[0.1, 0.9, 0.5]]), 2)
    tensor([[1, 2]])
    """
    if scores.ndim != 2:
        raise ValueError(f"scores must be (batch, tokens), got {tuple(scores.shape)}")
    k = checks.whole("k", k, low=1, high=scores.shape[1])
    if scores.isnan().any():
        raise ValueError("scores must be numbers, got a NaN")
    order = scores.argsort(dim=1, descending=True, stable=True)
    if valid is not None:
        if valid.shape != scores.shape or valid.dtype != torch.bool:
            raise ValueError(f"valid must be bool {tuple(scores.shape)}, got {valid.dtype} {tuple(valid.shape)}")
        invalid = ~valid.gather(1, order)
        order = order.gather(1, invalid.int().argsort(dim=1, stable=True))
    return order[:, :k]


def kept_of(counts: Tensor, length: int) -> Tensor:
    """bool (B, length): the first `counts` (B,) places of each row."""
    return torch.arange(length, device=counts.device) < counts[:, None]


def gather_tokens(tokens: Tensor, picked: Tensor) -> Tensor:
    """(B, K, ...) of tokens (B, N, ...) at indices (B, K)."""
    return tokens.gather(1, _over(picked, tokens))


def scatter_tokens(tokens: Tensor, picked: Tensor, values: Tensor, *, kept: Tensor | None = None) -> Tensor:
    """A copy of tokens (B, N, ...) with `values` (B, K, ...) at indices (B, K), where `kept` (bool (B, K)) allows it.

    An index must not come twice in a row. Values are taken in the dtype of the tokens.
    """
    values = values.to(tokens.dtype)
    if kept is not None:
        kept = kept.view(*kept.shape, *(1,) * (tokens.ndim - 2))
        values = torch.where(kept, values, gather_tokens(tokens, picked))
    return tokens.scatter(1, _over(picked, tokens), values)


def _over(picked: Tensor, tokens: Tensor) -> Tensor:
    return picked.view(*picked.shape, *(1,) * (tokens.ndim - 2)).expand(*picked.shape, *tokens.shape[2:])
