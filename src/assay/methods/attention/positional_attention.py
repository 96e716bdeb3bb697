"""Positional attention: weights from positions alone, so that routing does not change with the values (earlier title: "Positional
Attention: Out-of-Distribution Generalization and Expressivity for Neural Algorithmic Reasoning").

A = softmax((P W_Q)(P W_K)^T / sqrt(d_p)) with the same positional encodings P in every layer, whatever the input. An algorithm that
moves data by position (prefix sums, sorting networks) is then learnt with fixed routes, and scales to values it never saw. After
training, the weights are constants: `fold` turns a network into mixing matrices, with no QK^T and no softmax left.

After the official code: one-hot encodings with one scratch position more, queries and keys of width d_p a head with bias, layers
y = MLP([x ; attention(x)]) without residual or norm, depth log2(n) + 1. `routing="content"` is its baseline: queries and keys from
the values (width of the model a head), encodings appended to the input.

When NOT to use it: when what to read depends on the values (look-ups, recall): at fixed depth it cannot; and for lengths beyond
those it was trained with, to which one-hot encodings do not extend.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from assay.methods.core.mixers.protocol import Mixer, State, mixer

Routing = Literal["position", "content"]


class PositionalAttention(nn.Module):
    """Multi-head attention with weights from positions: (batch, n, dim) to the same, not causal.

    `positions` is the largest n, scratch position included: sequences of n tokens use the first n - 1 encodings and the last one,
    the scratch row's, so that shorter inputs keep it. Raises ValueError for sizes that do not fit.
    """

    def __init__(self, dim: int, positions: int, *, heads: int = 2):
        super().__init__()
        if heads < 1 or dim % heads:
            raise ValueError(f"heads must divide dim ({dim}), got {heads}")
        if positions < 1:
            raise ValueError(f"positions must be at least 1, got {positions}")
        self.dim, self.positions, self.heads = dim, positions, heads
        self.q_proj = nn.Linear(positions, heads * positions)
        self.k_proj = nn.Linear(positions, heads * positions)
        self.v_proj, self.o_proj = nn.Linear(dim, dim), nn.Linear(dim, dim)

    def weights(self, n: int | None = None) -> Tensor:
        """A: (heads, n, n), rows sum to 1; no batch dimension. Raises ValueError for n above `positions`."""
        n = self.positions if n is None else n
        if not 1 <= n <= self.positions:
            raise ValueError(f"n must be from 1 to {self.positions}, got {n}")
        encodings = torch.eye(self.positions, device=self.q_proj.weight.device, dtype=self.q_proj.weight.dtype)
        encodings = torch.cat([encodings[: n - 1], encodings[-1:]])
        q, k = (p(encodings).view(n, self.heads, -1).transpose(0, 1) for p in (self.q_proj, self.k_proj))
        return torch.softmax(q @ k.transpose(-1, -2) / math.sqrt(self.positions), -1)

    def forward(self, x: Tensor) -> Tensor:
        return mix(x, self.weights(x.shape[1]), self.v_proj, self.o_proj)


def mix(x: Tensor, a: Tensor, v_proj: nn.Linear, o_proj: nn.Linear) -> Tensor:
    """concat_h(A_h (X W_V,h)) W_O for x (batch, n, dim) and A (heads, n, n)."""
    v = v_proj(x).unflatten(2, (len(a), -1)).permute(2, 1, 0, 3)  # (heads, n, batch, width)
    mixed = (a @ v.flatten(2)).view(v.shape)  # one product a head for the whole batch, not one a sample
    y: Tensor = o_proj(mixed.permute(2, 1, 0, 3).flatten(2))
    return y


class ContentAttention(nn.Module):
    """The baseline: the same, with queries and keys (width dim a head) from the values, as in the official code."""

    def __init__(self, dim: int, *, heads: int = 2):
        super().__init__()
        if heads < 1 or dim % heads:
            raise ValueError(f"heads must divide dim ({dim}), got {heads}")
        self.dim, self.heads = dim, heads
        self.q_proj, self.k_proj = nn.Linear(dim, heads * dim), nn.Linear(dim, heads * dim)
        self.v_proj, self.o_proj = nn.Linear(dim, dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        q, k = (p(x).unflatten(2, (self.heads, -1)).transpose(1, 2) for p in (self.q_proj, self.k_proj))
        v = self.v_proj(x).unflatten(2, (self.heads, -1)).transpose(1, 2)
        # the fused kernels want values as wide as the keys; what is padded is cut off again
        found = F.scaled_dot_product_attention(q, k, F.pad(v, (0, q.shape[-1] - v.shape[-1])))[..., : v.shape[-1]]
        y: Tensor = self.o_proj(found.transpose(1, 2).flatten(2))
        return y


class Layer(nn.Module):
    """y = MLP([x ; attention(x)]): no residual, no norm."""

    def __init__(self, dim: int, hidden: int, attention: nn.Module):
        super().__init__()
        self.attention = attention
        self.mlp = nn.Sequential(nn.Linear(2 * dim, hidden), nn.ReLU(), nn.Linear(hidden, dim))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.mlp(torch.cat([x, self.attention(x)], -1))
        return y


class AlgorithmicTransformer(nn.Module):
    """Values (batch, n) to values (batch, n), one scratch position with value 0 behind them.

    `n` is the largest length, `routing` "position" or "content", `depth` log2(n) + 1 unless given. Raises ValueError for an unknown
    routing, sizes below 1 and values that are more or none.
    """

    def __init__(
        self,
        n: int,
        *,
        routing: Routing = "position",
        dim: int = 64,
        heads: int = 2,
        hidden: int = 64,
        depth: int | None = None,
    ):
        super().__init__()
        if routing not in ("position", "content"):
            raise ValueError(f"routing must be 'position' or 'content', got {routing!r}")
        depth = int(math.log2(max(n, 1))) + 1 if depth is None else depth
        if min(n, hidden, depth) < 1:
            raise ValueError(f"n, hidden and depth must be at least 1, got {n}, {hidden} and {depth}")
        self.n, self.routing = n, routing
        self.encoder = nn.Linear(1 if routing == "position" else n + 2, dim)
        self.layers = nn.ModuleList()
        for _ in range(depth):
            attention: nn.Module = ContentAttention(dim, heads=heads)
            if routing == "position":
                attention = PositionalAttention(dim, n + 1, heads=heads)
            self.layers.append(Layer(dim, hidden, attention))
        self.decoder = nn.Linear(dim, 1)

    def forward(self, values: Tensor) -> Tensor:
        if values.ndim != 2 or not 1 <= values.shape[1] <= self.n:
            raise ValueError(f"values must be (batch, 1 to at most {self.n} positions), got {tuple(values.shape)}")
        batch, n = values.shape
        x = F.pad(values, (0, 1))[..., None]
        if self.routing == "content":
            encodings = torch.eye(self.n + 1, dtype=values.dtype, device=values.device)
            rows = torch.cat([encodings[:n], encodings[-1:]]).expand(batch, -1, -1)
            x = torch.cat([x, rows], -1)
        x = self.encoder(x)
        for layer in self.layers:
            x = layer(x)
        y: Tensor = self.decoder(x)[:, :-1, 0]
        return y


class _Folded(nn.Module):
    def __init__(self, attention: PositionalAttention, n: int):
        super().__init__()
        self.register_buffer("a", attention.weights(n).detach())
        self.v_proj, self.o_proj = attention.v_proj, attention.o_proj

    def forward(self, x: Tensor) -> Tensor:
        return mix(x, self.a, self.v_proj, self.o_proj)  # type: ignore[arg-type]


def fold(model: nn.Module, n: int) -> nn.Module:
    """Replace every `PositionalAttention` by its constant weights for inputs of n positions (scratch included), in place.

    n^2 dim MACs a layer and sample remain for the mixing (1 MAC = 2 FLOPs). Raises ValueError when there is none to fold.
    """
    folded = 0
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, PositionalAttention):
                setattr(parent, name, _Folded(child, n))
                folded += 1
    if not folded:
        raise ValueError(f"{type(model).__name__} has no PositionalAttention")
    return model


# --------------------------------------------------------------------------------------------------------- as a sequence mixer


@mixer("positional")
class PositionalMixer(Mixer):
    """Causal positional attention for sequence models up to `positions` tokens; the state keeps the values.

    Raises ValueError for longer sequences.
    """

    def __init__(self, dim: int, *, heads: int = 2, positions: int = 512, layer: int = 0, layers: int = 1):
        super().__init__()
        self.dim, self.heads, self.positions = dim, heads, positions
        self.attention = PositionalAttention(dim, positions, heads=heads)

    def _logits(self, low: int, high: int) -> Tensor:
        """(heads, high - low, high) of queries from position low on: with one-hot encodings a product of rows of two tables."""
        a = self.attention
        q = (a.q_proj.weight.T[low:high] + a.q_proj.bias).unflatten(1, (self.heads, -1)).transpose(0, 1)
        k = (a.k_proj.weight.T[:high] + a.k_proj.bias).unflatten(1, (self.heads, -1)).transpose(0, 1)
        return q @ k.transpose(-1, -2) / math.sqrt(self.positions)

    def _run(self, v: Tensor, first: Tensor, queries: int) -> Tensor:
        """The last `queries` of the tokens of v (batch, tokens, dim), whose row r begins at token first[r]."""
        tokens = v.shape[1]
        position = torch.arange(tokens, device=v.device) - first[:, None]  # (batch, tokens), negative on padding
        high = max(1, int(position.max()) + 1)
        if high > self.positions:
            raise ValueError(f"positional attention was built for {self.positions} positions, got {high}")
        at = position.clamp(min=0)
        rows = at[:, tokens - queries :]
        low = int(rows.min())
        logits = self._logits(low, high)
        chosen = logits[:, rows[:, :, None] - low, at[:, None, :]].transpose(0, 1)  # (batch, heads, queries, tokens)
        seen = (position[:, None] <= position[:, tokens - queries :, None]) & (position[:, None] >= 0)
        seen = seen | ~seen.any(-1, keepdim=True)
        a = chosen.masked_fill(~seen[:, None], -torch.inf).softmax(-1)
        y: Tensor = self.attention.o_proj(
            (a @ v.unflatten(2, (self.heads, -1)).transpose(1, 2)).transpose(1, 2).flatten(2)
        )
        return y

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        first = x.new_zeros(len(x), dtype=torch.int64) if mask is None else (~mask).sum(1)
        return self._run(self.attention.v_proj(x), first, x.shape[1])

    def init_state(self, batch: int, *, device: Any = None, dtype: torch.dtype | None = None) -> State:
        weight = self.attention.v_proj.weight
        dtype, device = weight.dtype if dtype is None else dtype, weight.device if device is None else device
        return {
            "v": torch.zeros(batch, 0, self.dim, device=device, dtype=dtype),
            "first": torch.zeros(batch, dtype=torch.int64, device=device),
        }

    def advance(self, x: Tensor, state: State, mask: Tensor | None = None) -> tuple[Tensor, State]:
        first = state["first"] if mask is None else state["first"] + (~mask).sum(1)
        v = torch.cat([state["v"], self.attention.v_proj(x)], 1)
        return self._run(v, first, x.shape[1]), {"v": v, "first": first}

    def state_bytes(self, tokens: int, batch: int = 1, dtype: torch.dtype | None = None) -> int:
        """The values of all tokens."""
        dtype = self.attention.v_proj.weight.dtype if dtype is None else dtype
        return batch * tokens * self.dim * dtype.itemsize


# -------------------------------------------------------------------------------------------------------------------- tasks


def _prefix_median(x: Tensor) -> Tensor:
    return torch.stack([x[:, : i + 1].quantile(0.5, dim=1, interpolation="midpoint") for i in range(x.shape[1])], 1)


def _prefix_maxsub(x: Tensor) -> Tensor:
    """Largest sum of a run of neighbours within each prefix."""
    ending, best, found = x[:, 0], x[:, 0], [x[:, 0]]
    for i in range(1, x.shape[1]):
        ending = x[:, i] + ending.clamp(min=0)
        best = torch.maximum(best, ending)
        found.append(best)
    return torch.stack(found, 1)


TASKS: dict[str, Callable[[Tensor], Tensor]] = {
    "sum": lambda x: x.cumsum(1),
    "min": lambda x: x.cummin(1).values,
    "median": _prefix_median,
    "maxsub": _prefix_maxsub,
    "sort": lambda x: x.sort(1).values,
}


def task_data(task: str, samples: int, n: int = 8, *, scale: float = 1.0, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Values and targets (samples, n) of an algorithmic task.

    Each sample's values are uniform in a random sub-interval of [-2, 2]; with scale c above 1, of [-2 c, 2 c], and intervals
    that lie inside [-2, 2] are drawn again: out of the training distribution. Raises ValueError for an unknown task.
    """
    if task not in TASKS:
        raise ValueError(f"task must be one of {', '.join(TASKS)}, got {task!r}")
    if samples < 1 or n < 1 or scale < 1:
        raise ValueError(f"samples, n and scale must be at least 1, got {samples}, {n} and {scale}")
    generator = torch.Generator().manual_seed(seed)
    ends = torch.zeros(0, 2)
    while len(ends) < samples:
        drawn = ((torch.rand(2 * samples, 2, generator=generator) * 4 - 2) * scale).sort(1).values
        outside = torch.ones(len(drawn), dtype=torch.bool) if scale == 1 else drawn.abs().amax(1) > 2
        ends = torch.cat([ends, drawn[outside]])
    low, high = ends[:samples, :1], ends[:samples, 1:]
    x = low + (high - low) * torch.rand(samples, n, generator=generator)
    return x, TASKS[task](x)
