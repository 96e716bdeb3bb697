"""Softmax attention as a mixer: the baseline of every other mixer, and the sliding window that hybrids use.

Rotary positions, grouped keys and values, and a `reach`: how many preceding tokens each token sees (None: all of them). With a
reach, the parallel form computes only local blocks, and the state keeps the last `reach` tokens.

    >>> x = torch.randn(2, 10, 32)
    >>> SoftmaxAttention(32, heads=4, reach=4)(x).shape
    torch.Size([2, 10, 32])
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from assay import checks
from assay.methods.core.mixers.protocol import Mixer, State, check_positive, mixer


def rotate(x: Tensor, position: Tensor, base: float = 10000.0) -> Tensor:
    """Rotary embedding, half-split layout, of x (batch, heads, tokens, dim) at `position`, (batch or 1, tokens) int64.

    Raises ValueError for an odd dim, TypeError for whole or complex numbers.
    """
    checks.tensor("x", x, ndim=4, empty=True)
    if x.shape[-1] % 2:
        raise ValueError(f"x must have an even last dimension to be rotated, got {tuple(x.shape)}")
    half = x.shape[-1] // 2
    frequency = base ** (-torch.arange(half, device=x.device, dtype=torch.float64) / half)
    angle = (position[..., None].double() * frequency)[:, None]
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    first, second = x[..., :half], x[..., half:]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


@mixer("attention")
class SoftmaxAttention(Mixer):
    """Causal multi-head attention with a key-value cache.

    `dim` model width, `heads` query heads, `kv_heads` heads of keys and values (default: as many), `reach` as in the module
    docstring, `rotary` False leaves positions out. Raises ValueError for sizes that do not divide.
    """

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 4,
        kv_heads: int | None = None,
        reach: int | None = None,
        rotary: bool = True,
        layer: int = 0,
        layers: int = 1,
    ):
        super().__init__()
        kv_heads = heads if kv_heads is None else kv_heads
        check_positive(dim=dim, heads=heads, kv_heads=kv_heads)
        if dim % heads or heads % kv_heads:
            raise ValueError(f"heads must divide dim ({dim}) and kv_heads heads, got {heads} and {kv_heads}")
        if checks.flag("rotary", rotary) and (dim // heads) % 2:
            raise ValueError(f"rotary positions need an even head dimension, got {dim // heads}")
        if reach is not None:
            checks.whole("reach", reach, low=0)
        self.dim, self.heads, self.kv_heads, self.reach, self.rotary = dim, heads, kv_heads, reach, rotary
        self.head_dim = dim // heads
        self.q_proj = nn.Linear(dim, dim, bias=False)
        self.k_proj = nn.Linear(dim, kv_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(dim, kv_heads * self.head_dim, bias=False)
        self.o_proj = nn.Linear(dim, dim, bias=False)

    def _qkv(self, x: Tensor, start: Tensor | int = 0) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v (batch, heads, tokens, head dim) of tokens whose first has position `start`."""
        batch, tokens, _ = x.shape
        q, k, v = (
            p(x).view(batch, tokens, -1, self.head_dim).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj)
        )
        if self.rotary:  # scores depend on differences only, so left padding may count as positions
            position = torch.arange(tokens, device=x.device)[None] + start
            q, k = rotate(q, position), rotate(k, position)
        return q, k, v

    def _out(self, y: Tensor) -> Tensor:
        out: Tensor = self.o_proj(y.transpose(1, 2).flatten(2))
        return out

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        q, k, v = self._qkv(x)
        if self.reach is not None and self.reach + 1 < x.shape[1]:
            return self._out(local_attention(q, k, v, self.reach, mask))
        if mask is None:
            return self._out(F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True))
        return self._out(_masked(q, k, v, _allowed(x.shape[1], x.shape[1], None, x.device), mask))

    def init_state(self, batch: int, *, device: Any = None, dtype: torch.dtype | None = None) -> State:
        parameter = next(self.parameters())
        dtype, device = parameter.dtype if dtype is None else dtype, parameter.device if device is None else device
        empty = torch.zeros(batch, self.kv_heads, 0, self.head_dim, device=device, dtype=dtype)
        there = torch.zeros(batch, 0, dtype=torch.bool, device=device)
        return {
            "k": empty,
            "v": empty.clone(),
            "there": there,
            "seen": torch.zeros(batch, dtype=torch.int64, device=device),
        }

    def advance(self, x: Tensor, state: State, mask: Tensor | None = None) -> tuple[Tensor, State]:
        tokens = x.shape[1]
        q, k, v = self._qkv(x, state["seen"][:, None])
        there = x.new_ones(len(x), tokens, dtype=torch.bool) if mask is None else mask
        there = torch.cat([state["there"], there], 1)
        before = there.shape[1] - tokens
        buffers = {"k": appended(state["k"], k, before), "v": appended(state["v"], v, before)}
        k, v = buffers["k"][:, :, : before + tokens], buffers["v"][:, :, : before + tokens]
        whole = tokens == 1 and (self.reach is None or k.shape[2] <= self.reach + 1)
        if whole and mask is None and bool(there.all()):
            y = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        else:
            y = _masked(q, k, v, _allowed(tokens, k.shape[2], self.reach, x.device), there)
        seen = state["seen"] + tokens
        if self.reach is None:
            return self._out(y), {**buffers, "there": there, "seen": seen}
        first = max(0, k.shape[2] - self.reach)
        return self._out(y), {"k": k[:, :, first:], "v": v[:, :, first:], "there": there[:, first:], "seen": seen}

    def state_bytes(self, tokens: int, batch: int = 1, dtype: torch.dtype | None = None) -> int:
        """Keys and values of the tokens kept."""
        dtype = next(self.parameters()).dtype if dtype is None else dtype
        kept = tokens if self.reach is None else min(tokens, self.reach)
        return 2 * batch * self.kv_heads * kept * self.head_dim * dtype.itemsize


def appended(buffer: Tensor, new: Tensor, length: int) -> Tensor:
    """`buffer` (batch, heads, room, dim), of which `length` tokens are used, with `new` behind them; room doubles when it ends."""
    if torch.is_grad_enabled():  # the backward pass may need the buffer as it is, for weights even if not for inputs
        return torch.cat([buffer[:, :, :length], new], 2)
    needed = length + new.shape[2]
    if needed > buffer.shape[2]:
        grown = buffer.new_empty(*buffer.shape[:2], max(needed, 2 * length), buffer.shape[3])
        grown[:, :, :length] = buffer[:, :, :length]
        buffer = grown
    buffer[:, :, length:needed] = new
    return buffer


def _allowed(queries: int, keys: int, reach: int | None, device: Any) -> Tensor:
    """(queries, keys) bool: causal within the reach, the queries being the last of the keys."""
    distance = torch.arange(keys - queries, keys, device=device)[:, None] - torch.arange(keys, device=device)
    seen = distance >= 0
    return seen if reach is None else seen & (distance <= reach)


def _masked(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor, there: Tensor) -> Tensor:
    """Attention under `allowed` (queries, keys) and `there` (batch, keys); a query that sees nothing sees itself alone."""
    seen = (allowed & there[:, None, :])[:, None]
    queries, keys = allowed.shape
    itself = torch.arange(queries, device=q.device)[:, None] + (keys - queries) == torch.arange(keys, device=q.device)
    out: Tensor = F.scaled_dot_product_attention(q, k, v, seen | itself, enable_gqa=True)
    return out


def local_attention(q: Tensor, k: Tensor, v: Tensor, reach: int, mask: Tensor | None = None) -> Tensor:
    """Causal attention to the last `reach` tokens and the token itself, in local blocks: O(tokens * reach).

    q (batch, heads, tokens, dim), k, v (batch, key heads, tokens, dim); mask (batch, tokens) bool, False on left padding.
    No tokens give no outputs. Raises TypeError for whole or complex numbers, ValueError for shapes that do not fit.
    """
    checks.tensor("q", q, ndim=4, empty=True)
    for name, x in (("k", k), ("v", v)):
        checks.tensor(name, x, shape=(len(q), "key heads", *q.shape[2:]), empty=True)
    reach = checks.whole("reach", reach, low=0)
    if not q.numel():
        return q
    batch, heads, tokens, dim = q.shape
    block = max(16, reach)
    blocks = -(-tokens // block)
    tail = blocks * block - tokens
    there = q.new_ones(batch, tokens, dtype=torch.bool) if mask is None else mask
    there = F.pad(there, (block, tail))
    rows = F.pad(q, (0, 0, 0, tail)).view(batch, heads, blocks, block, dim)
    # each block of queries sees its own block of keys and the one before it
    keys, values = (F.pad(x, (0, 0, block, tail)).unfold(2, 2 * block, block).transpose(-1, -2) for x in (k, v))
    allowed = _allowed(block, 2 * block, reach, q.device)
    seen = allowed & there.unfold(1, 2 * block, block)[:, :, None]  # (batch, blocks, block, 2 * block)
    itself = torch.eye(block, dtype=torch.bool, device=q.device)
    seen = seen | F.pad(itself, (block, 0))
    group = heads // k.shape[1]
    keys, values = (x.repeat_interleave(group, 1).flatten(1, 2) for x in (keys, values))
    y = F.scaled_dot_product_attention(rows.flatten(1, 2), keys, values, seen.repeat(1, heads, 1, 1))
    return y.view(batch, heads, blocks * block, dim)[:, :, :tokens]
