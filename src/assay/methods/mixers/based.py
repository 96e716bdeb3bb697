"""BASED: linear attention with a Taylor feature map next to small sliding windows (arXiv 2402.18668).

What a fixed-state model can recall is bounded by its state. BASED makes that adjustable with two parts: linear attention whose kernel
is 1 + s + s^2 / 2, the second-order Taylor polynomial of exp(s), which is global and coarse; and exact softmax attention over the
last few dozen tokens, which is local and sharp. Gated short convolutions (BaseConv) make up the other layers.

After the paper and the official code: feature dimension 16 per head, normalised, no positions in the linear layers, rotary in the
windows, a `window` of W tokens reaching W // 2 tokens back; BaseConv's projections have biases, its convolution has none, and the
attention layers have none at all. `based_config` gives the released models. `our choice`: equal products x_i x_j are kept once with
weight sqrt(2) (153 features instead of 273: the same kernel, a smaller state), and the state's sums stay in float32 whatever the
model's dtype.

When NOT to use it: contexts of a few hundred tokens (the state is larger than a cache would be, and softmax attention faster),
and tasks that need exact copies from far away: the kernel grows only quadratically, and rises again for opposed keys.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from assay import checks
from assay.methods.core.mixers.attention import SoftmaxAttention
from assay.methods.core.mixers.protocol import Mixer, State, check_positive, left_conv, mixer, wide_dtype

if TYPE_CHECKING:
    from assay.methods.core.mixers.model import MixerConfig

Feature = Literal["taylor", "taylor_full", "elu"]
EPS = 1e-12  # of the normaliser
QUADRATIC = 512  # tokens up to which the parallel form is the quadratic one; beyond it chunks cost less (`our choice`)


def taylor_features(x: Tensor, *, merged: bool = True) -> Tensor:
    """phi(x) with phi(q) . phi(k) = 1 + s + s^2 / 2 for s = q . k / sqrt(d): (..., d) to (..., 1 + d + d (d + 1) / 2).

    `merged=False` keeps both x_i x_j and x_j x_i, as the paper writes it: (..., 1 + d + d^2).
    Raises TypeError for whole or complex numbers.

    >>> q, k = torch.tensor([2.0]), torch.tensor([3.0])
    >>> round((taylor_features(q) * taylor_features(k)).sum().item(), 3)  # 1 + 6 + 6^2 / 2
    25.0
    """
    checks.tensor("x", x, shape=("...", "dim"), empty=True)
    d = x.shape[-1]
    one = torch.ones_like(x[..., :1])
    if merged:
        i, j, weight = _products(d, x.dtype, x.device)
        squares = x[..., i] * x[..., j] * weight
    else:
        squares = (x[..., :, None] * x[..., None, :]).flatten(-2) * (2 * d) ** -0.5
    return torch.cat([one, x * d**-0.25, squares], -1)


@functools.lru_cache(maxsize=32)
def _products(d: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Which products x_i x_j are kept, i <= j, and their weights."""
    with torch.inference_mode(False):  # the tensors outlive the mode of their first use
        i, j = torch.triu_indices(d, d, device=device)
        weight = torch.full(i.shape, d**-0.5, dtype=dtype, device=device)
        weight[i == j] *= 0.5**0.5
    return i, j, weight


def features_of(x: Tensor, feature: Feature) -> Tensor:
    """The feature map by name: "taylor" (merged), "taylor_full", or "elu", elu(x) + 1 of earlier linear attention.

    Raises ValueError for another name, TypeError for whole or complex numbers.
    """
    checks.choice("feature", feature, get_args(Feature))
    checks.tensor("x", x, empty=True)
    if feature == "elu":
        return F.elu(x) + 1
    return taylor_features(x, merged=feature == "taylor")


def feature_size(d: int, feature: Feature) -> int:
    """Features of a head whose queries and keys have d numbers. Raises ValueError for another feature or d below 1."""
    check_positive(d=d)
    checks.choice("feature", feature, get_args(Feature))
    return {"taylor": 1 + d + d * (d + 1) // 2, "taylor_full": 1 + d + d * d, "elu": d}[feature]


def kernel(q: Tensor, k: Tensor, feature: Feature = "taylor") -> Tensor:
    """phi(q) . phi(k) for all pairs, without the features where the kernel has a closed form: (..., queries, keys).

    Raises ValueError for another feature or widths that differ, TypeError for whole or complex numbers or dtypes that differ.
    """
    checks.choice("feature", feature, get_args(Feature))
    checks.tensor("q", q, shape=("...", "queries", "dim"), empty=True)
    checks.tensor("k", k, shape=("...", "keys", q.shape[-1]), empty=True)
    checks.together(q=q, k=k)
    if feature == "elu":
        return features_of(q, feature) @ features_of(k, feature).transpose(-1, -2)
    s = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    return 1 + s + 0.5 * s.square()


def quadratic(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, feature: Feature = "taylor") -> Tensor:
    """Causal normalised linear attention over all pairs: q, k (batch, heads, tokens, d), v (batch, heads, tokens, d_v).

    `mask` (batch, tokens) bool leaves keys out. O(tokens^2) time; the reference of the other forms. Errors as `kernel`.
    """
    checks.tensor("v", v, shape=(*k.shape[:3], "values"), empty=True)
    weights = kernel(q, k, feature).tril()
    if mask is not None:
        weights = weights * mask[:, None, None, :]
    return (weights @ v) / (weights.sum(-1, keepdim=True) + EPS)


def advance_state(
    q: Tensor, k: Tensor, v: Tensor, s: Tensor, z: Tensor, mask: Tensor | None = None, feature: Feature = "taylor"
) -> tuple[Tensor, Tensor, Tensor]:
    """The next tokens after the sums s = sum phi(k) v^T (batch, heads, F, d_v) and z = sum phi(k) (batch, heads, F).

    Returns outputs (batch, heads, tokens, d_v) and the new sums. Without gradients s and z are updated in place. No tokens leave
    the sums as they are. Raises ValueError for shapes that do not fit, TypeError for whole or complex numbers.
    """
    checks.tensor("q", q, ndim=4, empty=True)
    checks.tensor("k", k, shape=tuple(q.shape), empty=True)
    checks.tensor("v", v, shape=(*q.shape[:3], "values"), empty=True)
    size = feature_size(q.shape[-1], feature)
    checks.tensor("s", s, shape=(*q.shape[:2], size, v.shape[-1]), empty=True)
    checks.tensor("z", z, shape=(*q.shape[:2], size), empty=True)
    wide = s.dtype
    phi_q, phi_k = features_of(q.to(wide), feature), features_of(k.to(wide), feature)
    values = v.to(wide)
    if mask is not None:
        phi_k = phi_k * mask[:, None, :, None]
    if q.shape[2] == 1:  # one step of the recurrence
        if torch.is_grad_enabled():
            s, z = s + phi_k.transpose(-1, -2) * values, z + phi_k[:, :, 0]
        else:
            s.addcmul_(phi_k.transpose(-1, -2), values)
            z += phi_k[:, :, 0]
        y = phi_q @ s
        norm = (phi_q * z[:, :, None]).sum(-1, keepdim=True)
        return (y / (norm + EPS)).to(v.dtype), s, z
    weights = kernel(q.to(wide), k.to(wide), feature).tril()
    if mask is not None:
        weights = weights * mask[:, None, None, :]
    y = weights @ values + phi_q @ s
    norm = weights.sum(-1, keepdim=True) + phi_q @ z[..., None]
    added, counted = phi_k.transpose(-1, -2) @ values, phi_k.sum(2)
    if torch.is_grad_enabled():
        s, z = s + added, z + counted
    else:
        s += added
        z += counted
    return (y / (norm + EPS)).to(v.dtype), s, z


@mixer("based")
class TaylorAttention(Mixer):
    """Linear attention with the Taylor feature map.

    `heads` heads, `feature_dim` numbers of q and k a head (d', 16 in the paper; the state grows with its square), values of
    dim / heads. `feature` "elu" gives the earlier linear attention for comparison. Raises ValueError for sizes that do not fit.
    """

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 4,
        feature_dim: int = 16,
        feature: Feature = "taylor",
        chunk: int = 128,
        layer: int = 0,
        layers: int = 1,
    ):
        super().__init__()
        check_positive(dim=dim, heads=heads, feature_dim=feature_dim, chunk=chunk)
        if dim % heads:
            raise ValueError(f"heads must divide dim ({dim}), got {heads}")
        checks.choice("feature", feature, get_args(Feature))
        self.dim, self.heads, self.feature_dim, self.chunk = dim, heads, feature_dim, chunk
        self.feature: Feature = feature
        self.q_proj = nn.Linear(dim, heads * feature_dim, bias=False)
        self.k_proj = nn.Linear(dim, heads * feature_dim, bias=False)
        self.v_proj = nn.Linear(dim, dim, bias=False)
        self.o_proj = nn.Linear(dim, dim, bias=False)

    def _qkv(self, x: Tensor) -> list[Tensor]:
        shape = (*x.shape[:2], self.heads, -1)
        return [p(x).view(shape).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj)]

    def _out(self, y: Tensor) -> Tensor:
        out: Tensor = self.o_proj(y.transpose(1, 2).flatten(2))
        return out

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        if x.shape[1] > QUADRATIC:
            return self.chunked(x, chunk=self.chunk, mask=mask)[0]
        q, k, v = self._qkv(x)
        wide = wide_dtype(x.dtype)
        return self._out(quadratic(q.to(wide), k.to(wide), v.to(wide), mask, self.feature).to(x.dtype))

    def init_state(self, batch: int, *, device: Any = None, dtype: torch.dtype | None = None) -> State:
        weight = self.q_proj.weight
        wide, device = wide_dtype(weight.dtype if dtype is None else dtype), weight.device if device is None else device
        size = feature_size(self.feature_dim, self.feature)
        return {
            "s": torch.zeros(batch, self.heads, size, self.dim // self.heads, device=device, dtype=wide),
            "z": torch.zeros(batch, self.heads, size, device=device, dtype=wide),
        }

    def advance(self, x: Tensor, state: State, mask: Tensor | None = None) -> tuple[Tensor, State]:
        q, k, v = self._qkv(x)
        y, s, z = advance_state(q, k, v, state["s"], state["z"], mask, self.feature)
        return self._out(y), {"s": s, "z": z}


@mixer("based_window")
class SlidingWindow(SoftmaxAttention):
    """Exact softmax attention with rotary positions to the last `window` // 2 tokens and the token itself."""

    def __init__(self, dim: int, *, heads: int = 4, window: int = 64, layer: int = 0, layers: int = 1):
        checks.whole("window", window, low=2)
        super().__init__(dim, heads=heads, reach=window // 2)


@mixer("baseconv")
class BaseConv(Mixer):
    """Gated short convolution: project to twice 2 d, convolve one half (depthwise, causal, `width` taps), multiply, project back.

    The projections have biases, the convolution has none, as released. Raises ValueError for a width below 1.
    """

    def __init__(self, dim: int, *, width: int = 3, layer: int = 0, layers: int = 1):
        super().__init__()
        check_positive(dim=dim, width=width)
        self.dim, self.width = dim, width
        self.in_proj, self.out_proj = nn.Linear(dim, 4 * dim), nn.Linear(2 * dim, dim)
        self.conv_weight = nn.Parameter(torch.empty(2 * dim, width))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Uniform taps within 1 / sqrt(width), as torch's convolutions."""
        nn.init.uniform_(self.conv_weight, -(self.width**-0.5), self.width**-0.5)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return self._run(x, None, mask)[0]

    def init_state(self, batch: int, *, device: Any = None, dtype: torch.dtype | None = None) -> State:
        weight = self.conv_weight
        dtype, device = weight.dtype if dtype is None else dtype, weight.device if device is None else device
        return {"conv": torch.zeros(batch, self.width - 1, 2 * self.dim, device=device, dtype=dtype)}

    def advance(self, x: Tensor, state: State, mask: Tensor | None = None) -> tuple[Tensor, State]:
        y, conv = self._run(x, state["conv"], mask)
        return y, {"conv": conv}

    def _run(self, x: Tensor, before: Tensor | None, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        u, gate = self.in_proj(x).chunk(2, -1)
        if mask is not None:  # after the bias, so that the convolution sees zeros before a sequence
            u = u * mask[..., None]
        if before is None:
            before = u.new_zeros(len(x), self.width - 1, u.shape[2])
        y = F.silu(left_conv(u, self.conv_weight, None, before))
        last = torch.cat([before, u], 1)[:, u.shape[1] :]
        out: Tensor = self.out_proj(gate * y)
        return out, last


SIZES: dict[str, dict[str, Any]] = {
    "360m": {"dim": 1024, "layers": 27, "linear": (1, 6, 11, 16, 21), "window": (2, 7, 12, 17, 22)},
    "1.4b": {"dim": 1792, "layers": 36, "linear": (1, 6, 11, 16, 21, 27, 33), "window": (2, 7, 12, 17, 22, 28, 34)},
}


def based_layers(size: str, *, heads: int = 16, feature_dim: int = 16, window: int = 256) -> list[list[Any]]:
    """The layers of the released models ("360m", "1.4b") for `MixerConfig.layers`: BaseConv except for the listed ones.

    Raises ValueError for another size.

    >>> [name for name, _ in based_layers("360m")[:4]]
    ['baseconv', 'based', 'based_window', 'baseconv']
    """
    found = SIZES[checks.choice("size", size, SIZES)]
    chosen: list[list[Any]] = [["baseconv", {}] for _ in range(found["layers"])]
    for index in found["linear"]:
        chosen[index] = ["based", {"heads": heads, "feature_dim": feature_dim}]
    for index in found["window"]:
        chosen[index] = ["based_window", {"heads": heads, "window": window}]
    return chosen


def based_config(size: str, **changes: Any) -> MixerConfig:
    """The released models ("360m", "1.4b") as a `MixerConfig`; `changes` replace its arguments. Raises ValueError for another size.

    SwiGLU of twice the width, RMS norms with epsilon 1e-5, embedding and head shared, GPT-2's vocabulary padded to 50264.
    """
    from assay.methods.core.mixers.model import MixerConfig  # imports transformers, which the layers do not need

    layers, width = based_layers(size), SIZES[size]["dim"]
    settings = {"vocab_size": 50264, "hidden_size": width, "layers": layers, "intermediate_size": 2 * width}
    return MixerConfig(**{**settings, "norm_eps": 1e-5, **changes})
