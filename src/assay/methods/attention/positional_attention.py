"""Positional attention: weights depend on positions alone, so that routing does not change with the values (earlier title: "Positional
Attention: Out-of-Distribution Generalization and Expressivity for Neural Algorithmic Reasoning").

A = softmax((P W_Q)(P W_K)^T / sqrt(d_p)) with the same positional encodings P in every layer, whatever the input. An algorithm that
moves data by position (prefix sums, sorting networks) is then learnt with fixed routes, and scales to values it never saw. After
training, the weights are constants: `fold` turns a network into mixing matrices, with no QK^T and no softmax left.

After the official code: one-hot encodings with one extra scratch position, queries and keys of width d_p per head with bias, layers
y = MLP([x ; attention(x)]) without residual or norm, depth log2(n) + 1. `routing="content"` is its baseline: queries and keys come
from the values (each head as wide as the model), with encodings appended to the input.

When NOT to use it: when what to read depends on the values (look-ups, recall), which it cannot do at fixed depth; and for lengths
beyond those it was trained with, to which one-hot encodings do not extend.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from assay import checks
from assay.methods.core.mixers.protocol import Mixer, State, mixer

Routing = Literal["position", "content"]


def _check_heads(dim: int, heads: int) -> None:
    if checks.whole("dim", dim, low=1) % checks.whole("heads", heads, low=1):
        raise ValueError(f"heads must divide dim ({dim}), got {heads}")


class PositionalAttention(nn.Module):
    """Multi-head attention with weights from positions: (batch, n, dim) to the same, not causal.

    `positions` is the largest n, scratch position included: sequences of n tokens use the first n - 1 encodings and the last one,
    the scratch row's, so that shorter inputs keep it. Raises ValueError for sizes that do not fit.
    """

    def __init__(self, dim: int, positions: int, *, heads: int = 2):
        super().__init__()
        _check_heads(dim, heads)
        checks.whole("positions", positions, low=1)
        self.dim, self.positions, self.heads = dim, positions, heads
        self.q_proj = nn.Linear(positions, heads * positions)
        self.k_proj = nn.Linear(positions, heads * positions)
        self.v_proj, self.o_proj = nn.Linear(dim, dim), nn.Linear(dim, dim)

    def weights(self, n: int | None = None) -> Tensor:
        """A: (heads, n, n), rows sum to 1; no batch dimension. Raises ValueError for n above `positions`."""
        n = self.positions if n is None else checks.whole("n", n, low=1, high=self.positions)
        encodings = torch.eye(self.positions, device=self.q_proj.weight.device, dtype=self.q_proj.weight.dtype)
        encodings = torch.cat([encodings[: n - 1], encodings[-1:]])
        q, k = (p(encodings).view(n, self.heads, -1).transpose(0, 1) for p in (self.q_proj, self.k_proj))
        return torch.softmax(q @ k.transpose(-1, -2) / math.sqrt(self.positions), -1)

    def forward(self, x: Tensor) -> Tensor:
        checks.tensor("x", x, shape=("batch", "n", self.dim), empty=True)
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
        _check_heads(dim, heads)
        self.dim, self.heads = dim, heads
        self.q_proj, self.k_proj = nn.Linear(dim, heads * dim), nn.Linear(dim, heads * dim)
        self.v_proj, self.o_proj = nn.Linear(dim, dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        q, k = (p(x).unflatten(2, (self.heads, -1)).transpose(1, 2) for p in (self.q_proj, self.k_proj))
        v = self.v_proj(x).unflatten(2, (self.heads, -1)).transpose(1, 2)
        # the fused kernels need values as wide as the keys; the padding is cut off again
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
    """Values (batch, length) to values (batch, length), computed with one scratch position of value 0 after them.

    `n` is the largest length, `routing` "position" or "content", `depth` log2(n) + 1 unless given. Raises ValueError for an unknown
    routing, for sizes below 1, and for no values or more than `n`.

    >>> model = AlgorithmicTransformer(8)
    >>> model(torch.randn(2, 8)).shape
    torch.Size([2, 8])
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
        checks.choice("routing", routing, get_args(Routing))
        checks.whole("n", n, low=1)
        checks.whole("hidden", hidden, low=1)
        depth = n.bit_length() if depth is None else checks.whole("depth", depth, low=1)
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
        if checks.tensor("values", values).ndim != 2 or values.shape[1] > self.n:
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
    """A `PositionalAttention` whose weights are the constants a (heads, n, n)."""

    a: Tensor

    def __init__(self, attention: PositionalAttention, a: Tensor):
        super().__init__()
        self.dim = attention.dim
        self.register_buffer("a", a)
        self.v_proj, self.o_proj = attention.v_proj, attention.o_proj

    def forward(self, x: Tensor) -> Tensor:
        checks.tensor("x", x, shape=("batch", self.a.shape[1], self.dim), empty=True)
        return mix(x, self.a, self.v_proj, self.o_proj)


@torch.no_grad()
def fold(model: nn.Module, n: int) -> nn.Module:
    """Replace every `PositionalAttention` by its constant weights, in place, for inference.

    A network then takes inputs of exactly n positions (scratch included), a `PositionalMixer` sequences of up to n tokens.
    n^2 dim MACs a layer and sample remain for the mixing (1 MAC = 2 FLOPs). Store a model before it is folded: its checkpoints
    have no place for the constants. Raises ValueError, before anything is replaced, when there is none to fold, when `model`
    itself is what would be replaced, and for more positions than one was made for.
    """
    checks.whole("n", n, low=1)
    if isinstance(model, PositionalAttention):
        raise ValueError("model must hold its PositionalAttention inside: one by itself cannot be replaced in place")
    made = [
        (parent, name, _Folded(child, parent.folded(n) if isinstance(parent, PositionalMixer) else child.weights(n)))
        for parent in model.modules()
        for name, child in parent._modules.items()  # an attention of two names is replaced at both
        if isinstance(child, PositionalAttention)
    ]
    if not made:
        raise ValueError(f"{type(model).__name__} has no PositionalAttention")
    for parent, name, constant in made:
        setattr(parent, name, constant)
        if isinstance(parent, PositionalMixer):
            parent.positions, parent._made_of, parent._known = n, [], None
    return model


# --------------------------------------------------------------------------------------------------------- as a sequence mixer


@mixer("positional")
class PositionalMixer(Mixer):
    """Causal positional attention for sequence models up to `positions` tokens; the state keeps the values.

    If no gradient is needed, the weights of all positions so far are computed once and kept: heads * n^2 numbers, shared by all
    rows, whatever their padding. Each sequence (a forward pass, or an empty state) begins by comparing the parameters with those the
    weights were made of, so that they follow every change; what changes in the middle of a sequence counts from the next one on at
    the latest. Raises TypeError and ValueError for sizes that are none, and ValueError for longer sequences.
    """

    attention: PositionalAttention | _Folded

    def __init__(self, dim: int, *, heads: int = 2, positions: int = 512, layer: int = 0, layers: int = 1):
        super().__init__()
        self.attention = PositionalAttention(dim, positions, heads=heads)
        self.dim, self.heads, self.positions = dim, heads, positions
        self._made_of: list[Tensor] = []
        self._known: Tensor | None = None  # (heads, n, n)

    def folded(self, n: int) -> Tensor:
        """The weights of all pairs of n tokens, (heads, n, n), as `fold` keeps them. Raises ValueError for n above `positions`."""
        return self._weights(0, checks.whole("n", n, low=1, high=self.positions))

    def _weights(self, low: int, high: int) -> Tensor:
        """(heads, high - low, high) of queries from position low on: with one-hot encodings a product of rows of two tables."""
        a = self.attention
        if isinstance(a, _Folded):
            return a.a[:, low:high, :high]
        q = (a.q_proj.weight.T[low:high] + a.q_proj.bias).unflatten(1, (self.heads, -1)).transpose(0, 1)
        k = (a.k_proj.weight.T[:high] + a.k_proj.bias).unflatten(1, (self.heads, -1)).transpose(0, 1)
        later = torch.ones(high - low, high, dtype=torch.bool, device=q.device).triu(low + 1)
        return (q @ k.transpose(-1, -2) / math.sqrt(self.positions)).masked_fill(later, -torch.inf).softmax(-1)

    def _rows(self, low: int, high: int, begins: bool) -> Tensor:
        """`_weights`, kept from one call to the next where that is right."""
        if isinstance(self.attention, _Folded) or torch.is_grad_enabled() or torch.compiler.is_compiling():
            return self._weights(low, high)
        parameters = [x for part in (self.attention.q_proj, self.attention.k_proj) for x in (part.weight, part.bias)]
        if begins and not (
            len(self._made_of) == len(parameters)
            and all(
                kept.device == x.device and kept.dtype == x.dtype and torch.equal(kept, x)
                for kept, x in zip(self._made_of, parameters, strict=True)
            )
        ):
            self._known = None
        known = 0 if self._known is None else self._known.shape[1]
        if self._known is None or high > known:
            self._made_of = [x.detach().clone() for x in parameters]
            self._known = self._weights(0, min(self.positions, max(high, 2 * known)))
        return self._known[:, low:high, :high]

    def _run(self, v: Tensor, first: Tensor, queries: int, begins: bool) -> Tensor:
        """The last `queries` of the tokens of v (batch, tokens, dim), whose row r begins at token first[r]."""
        tokens = v.shape[1]
        starts = sorted(set(first.tolist()))
        longest = tokens - starts[0] if starts else 0
        if longest > self.positions:
            raise ValueError(
                f"tokens must be at most {self.positions}, which positional attention was made for, got {longest}"
            )
        low = max(0, tokens - queries - starts[-1]) if starts else 0
        a = self._rows(low, longest, begins) if longest else v.new_zeros(self.heads, 0, 0)
        y = v.new_zeros(len(v), queries, self.dim)
        for start in starts:  # rows of one length share the weights
            rows, there = (first == start).nonzero()[:, 0], tokens - start
            count = min(queries, there)
            if count == 0:
                continue
            values = v[rows, start:].unflatten(2, (self.heads, -1)).permute(2, 1, 0, 3)  # (heads, there, rows, width)
            mixed = a[:, there - count - low : there - low, :there] @ values.flatten(2)
            mixed = mixed.unflatten(2, (len(rows), -1)).permute(2, 1, 0, 3).flatten(2)
            y = y.index_put((rows[:, None], torch.arange(queries - count, queries, device=v.device)), mixed)
        out: Tensor = self.attention.o_proj(y)
        return out

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        first = x.new_zeros(len(x), dtype=torch.int64) if mask is None else (~mask).sum(1)
        return self._run(self.attention.v_proj(x), first, x.shape[1], True)

    def init_state(self, batch: int, *, device: Any = None, dtype: torch.dtype | None = None) -> State:
        weight = self.attention.v_proj.weight
        dtype, device = weight.dtype if dtype is None else dtype, weight.device if device is None else device
        return {
            "v": torch.zeros(batch, 0, self.dim, device=device, dtype=dtype),
            "seen": torch.zeros(batch, dtype=torch.int64, device=device),  # tokens of each row, the last of v
        }

    def advance(self, x: Tensor, state: State, mask: Tensor | None = None) -> tuple[Tensor, State]:
        before = int(state["seen"].max()) if len(x) else 0
        old = state["v"][:, state["v"].shape[1] - before :]  # tokens that are padding in all rows are dropped
        seen = state["seen"] + (x.shape[1] if mask is None else mask.sum(1))
        v = torch.cat([old, self.attention.v_proj(x)], 1)
        return self._run(v, v.shape[1] - seen, x.shape[1], before == 0), {"v": v, "seen": seen}

    def state_bytes(self, tokens: int, batch: int = 1, dtype: torch.dtype | None = None) -> int:
        """The values of all tokens."""
        dtype = self.attention.v_proj.weight.dtype if dtype is None else dtype
        return batch * tokens * self.dim * dtype.itemsize


# -------------------------------------------------------------------------------------------------------------------- tasks


def _prefix_median(x: Tensor) -> Tensor:
    return torch.stack([x[:, : i + 1].quantile(0.5, dim=1, interpolation="midpoint") for i in range(x.shape[1])], 1)


def _prefix_maxsub(x: Tensor) -> Tensor:
    """Largest sum of any run of neighbours within each prefix."""
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
    """Values and targets, (samples, n) each, of an algorithmic task.

    Each sample's values are uniform in a random sub-interval of [-2, 2]; with scale c above 1, of [-2 c, 2 c], and intervals
    that lie inside [-2, 2] are drawn again: out of the training distribution. Raises ValueError for an unknown task.
    """
    checks.choice("task", task, TASKS)
    checks.whole("samples", samples, low=1)
    checks.whole("n", n, low=1)
    checks.number("scale", scale, low=1)
    generator = torch.Generator().manual_seed(seed)
    ends = torch.zeros(0, 2)
    while len(ends) < samples:
        drawn = ((torch.rand(2 * samples, 2, generator=generator) * 4 - 2) * scale).sort(1).values
        outside = torch.ones(len(drawn), dtype=torch.bool) if scale == 1 else drawn.abs().amax(1) > 2
        ends = torch.cat([ends, drawn[outside]])
    low, high = ends[:samples, :1], ends[:samples, 1:]
    x = low + (high - low) * torch.rand(samples, n, generator=generator)
    return x, TASKS[task](x)
