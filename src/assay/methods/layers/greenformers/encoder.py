"""Encoders built from low-rank layers or with Linformer's attention, and the cost of a block of each."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from assay.methods.layers.greenformers.units import LED


def linformer(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    e_k: Tensor,
    e_v: Tensor,
    *,
    key_mask: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """softmax(q (E_k^T k)^T / sqrt d) (E_v^T v): attention over k_len mixtures of the n tokens, O(n k_len) instead of O(n^2).

    q, k, v (B, heads, n, d); e_k, e_v (n_max, k_len) with n <= n_max, of which the first n rows are used. `key_mask` (B, n) bool
    is True on tokens: padding enters no mixture. Not causal, and made for lengths close to n_max. Linformer, as compared in
    the thesis. Raises ValueError for more tokens than n_max.
    """
    n = k.shape[-2]
    if n > len(e_k) or n > len(e_v):
        raise ValueError(f"k must have at most {len(e_k)} tokens, the rows of e_k and e_v, got {n}")
    if key_mask is not None:
        k, v = (t * key_mask[:, None, :, None].to(t.dtype) for t in (k, v))
    return F.scaled_dot_product_attention(q, e_k[:n].T.to(k) @ k, e_v[:n].T.to(v) @ v, scale=scale)


def linformer_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Linformer as an attention function of transformers' encoders; see `use_linformer`."""
    mask = None
    if attention_mask is not None:  # (B, 1, n, n), the same keys for every query of an encoder
        mask = attention_mask[:, 0, 0]
        mask = mask if mask.dtype == torch.bool else mask >= 0
    e_k, e_v = module.linformer_e_k, module.linformer_e_v
    return linformer(query, key, value, e_k, e_v, key_mask=mask, scale=scaling).transpose(1, 2), None  # type: ignore[arg-type]


def use_linformer(model: nn.Module, *, tokens: int, length: int, seed: int = 0) -> int:
    """Give every self-attention of a transformers encoder Linformer projections (tokens, length), new parameters to be trained.

    Projections start as random with variance 1 / length (identity when length = tokens: nothing changes then). Returns how many
    attention modules were changed. Raises ValueError for length outside 1..tokens, a causal model, or a model without any.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import eager_mask

    if not 1 <= length <= tokens:
        raise ValueError(f"length must lie in 1..tokens ({tokens}), got {length}")
    modules: list[Any] = [m for m in model.modules() if hasattr(m, "is_causal") and hasattr(m, "config")]
    if not modules or any(m.is_causal for m in modules):
        raise ValueError("model must be a transformers encoder whose attention goes through the attention interface")
    AttentionInterface.register("assay_linformer", linformer_attention_forward)
    AttentionMaskInterface.register("assay_linformer", eager_mask)
    generator = torch.Generator().manual_seed(seed)
    for module in modules:
        like = next(module.parameters())
        for name in ("linformer_e_k", "linformer_e_v"):
            start = (
                torch.eye(tokens)
                if length == tokens
                else torch.randn(tokens, length, generator=generator) / math.sqrt(length)
            )
            module.register_parameter(name, nn.Parameter(start.to(like)))
        module.config._attn_implementation = "assay_linformer"
    return len(modules)


class EncoderBlock(nn.Module):
    """A transformer encoder layer (residual, then norm), dense, low-rank or with Linformer attention. (B, n, d) -> (B, n, d).

    `rank` makes every projection, of attention and feed-forward alike, an LED unit: the LRT block. `linformer_length` with
    `tokens` makes the attention Linformer's, for inputs of up to `tokens` tokens.
    Raises ValueError when d_model is not a multiple of heads, or only one of the Linformer arguments is given.

    >>> EncoderBlock(32, heads=4, ffn=64, rank=8)(torch.randn(2, 10, 32)).shape
    torch.Size([2, 10, 32])
    """

    def __init__(
        self,
        d_model: int,
        heads: int,
        ffn: int,
        *,
        rank: int | None = None,
        linformer_length: int | None = None,
        tokens: int | None = None,
    ) -> None:
        super().__init__()
        if d_model % heads:
            raise ValueError(f"d_model must be a multiple of heads, got {d_model} and {heads}")
        if (linformer_length is None) != (tokens is None):
            raise ValueError(f"linformer_length and tokens go together, got {linformer_length} and {tokens}")
        self.heads = heads

        def linear(inputs: int, outputs: int) -> nn.Module:
            return nn.Linear(inputs, outputs) if rank is None else LED(inputs, outputs, rank)

        self.query, self.key, self.value = (linear(d_model, d_model) for _ in range(3))
        self.output = linear(d_model, d_model)
        self.up, self.down = linear(d_model, ffn), linear(ffn, d_model)
        self.norm_attention, self.norm_ffn = nn.LayerNorm(d_model), nn.LayerNorm(d_model)
        self.e_k: Tensor | None = None
        self.e_v: Tensor | None = None
        if tokens is not None and linformer_length is not None:
            self.e_k = nn.Parameter(torch.randn(tokens, linformer_length) / math.sqrt(linformer_length))
            self.e_v = nn.Parameter(torch.randn(tokens, linformer_length) / math.sqrt(linformer_length))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for f in (self.query, self.key, self.value))
        if self.e_k is None or self.e_v is None:
            mixed = F.scaled_dot_product_attention(q, k, v)
        else:
            mixed = linformer(q, k, v, self.e_k, self.e_v)
        x = self.norm_attention(x + self.output(mixed.transpose(1, 2).flatten(2)))
        out: Tensor = self.norm_ffn(x + self.down(F.gelu(self.up(x))))
        return out


def block_macs(
    tokens: int, d_model: int, ffn: int, *, rank: int | None = None, linformer_length: int | None = None
) -> int:
    """MACs (1 MAC = 2 FLOPs) of one encoder block for a sequence of `tokens`: projections, scores and mixing."""
    square, wide = (d_model**2, d_model * ffn) if rank is None else (2 * rank * d_model, rank * (d_model + ffn))
    attended = tokens if linformer_length is None else linformer_length
    projected = 0 if linformer_length is None else 2 * tokens * linformer_length * d_model
    return tokens * (4 * square + 2 * wide) + projected + 2 * tokens * attended * d_model


def crossover_tokens(d_model: int, ffn: int, *, rank: int, linformer_length: int) -> float:
    """The sequence length from which a Linformer block needs fewer MACs than an LRT block."""
    saved_by_rank = 4 * d_model**2 + 2 * d_model * ffn - rank * (8 * d_model + 2 * (d_model + ffn))
    return (saved_by_rank + 4 * linformer_length * d_model) / (2 * d_model)
