"""MemoryFormer: linear layers replaced by hashed look-ups in learned tables (arXiv 2411.12992).

A Memory Layer cuts its input into K sub-vectors of `bits` numbers. The signs of a sub-vector select one of the 2^bits learned rows of
its table, and the output is the sum of the K rows, each weighted by how safely its sub-vector lies in that bucket. That is 2 K h
operations per token instead of 2 d h, `bits` times fewer, for 2^bits / bits times the parameters (32 times at 8 bits).

The weight of a bucket is the softmax over all sign vectors s of <z, s>, which has the closed form 1 / prod (1 + exp(-2 |z_i|)):
`weight="softmax"` (default; `our choice` among the forms). "cosine" is the paper's tempered form, "magnitude" the released code's,
with an unbounded factor sum |z_i|. Tables get gradients where they were read; the input gets them only through the weights, since
codes are piecewise constant. A number is "set" when it is >= 0, zero included, as in the official torch path.

When NOT to use it: to save time on a processor with a fast matrix product. Rows are read at random, K * h numbers per token and
layer, with no reuse between tokens, and the tables with their optimizer state are huge.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from assay import checks
from assay.measure.cost import register_macs
from assay.methods.core import kernels
from assay.methods.core.mixers.attention import SoftmaxAttention, rotate
from assay.methods.core.mixers.protocol import channel_mixer, mixer

Weight = Literal["softmax", "cosine", "magnitude"]
COLDEST = 1e-30  # the lowest temperature that can be divided by in float32


def bucket_codes(z: Tensor) -> Tensor:
    """Buckets of sub-vectors z (..., bits): int64 (...), the signs as a binary number, the first the most significant."""
    bits = z.shape[-1]
    powers = 2 ** torch.arange(bits - 1, -1, -1, device=z.device)
    return ((z >= 0) * powers).sum(-1)


def bucket_weights(z: Tensor, weight: Weight = "softmax", temperature: float = 1.0) -> Tensor:
    """How safely z (..., bits) lies in its bucket: (...), float32 at least; see the module docstring."""
    wide = z.double() if z.dtype == torch.float64 else z.float()
    size = wide.abs()
    if (
        weight == "cosine"
    ):  # the direction alone counts: its squares neither overflow nor vanish once its largest number is 1
        largest = size.detach().amax(-1, keepdim=True)
        size = size / torch.where(largest > 0, largest, 1.0)
        norm = size.norm(dim=-1, keepdim=True).clamp(
            min=1.0
        )  # 1 but for zeros, which stay in the middle between all buckets
        return torch.exp(-F.softplus(-2 * (size / norm) / (temperature * z.shape[-1] ** 0.5)).sum(-1))
    p = torch.exp(-F.softplus(-2 * size).sum(-1))
    return p * size.sum(-1) if weight == "magnitude" else p


@dataclass(frozen=True)
class MemoryCost:
    """A layer's parameters, and per token its multiply-accumulates (1 MAC = 2 FLOPs) and the bytes of table rows it reads."""

    params: int
    macs: int
    bytes_read: int


class MemoryLinear(nn.Module):
    """The layer M: (..., in_features) to (..., out_features). `bits` numbers make a code; in_features must be a multiple.

    Layers of one input can share the hash, as Q, K and V do: see `look_up_together`. Without gradients, in float32 or bfloat16 on
    a CPU, a compiled kernel does it all in one pass.
    Raises TypeError or ValueError for sizes that do not divide, an unknown weight, or a temperature that its weight would ignore.

    >>> layer = MemoryLinear(64, 32, bits=8)
    >>> layer(torch.randn(2, 5, 64)).shape, layer.cost().macs  # 8 rows of 32 numbers in place of 64 x 32 products
    (torch.Size([2, 5, 32]), 256)
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bits: int = 8,
        weight: Weight = "softmax",
        temperature: float = 1.0,
        bias: bool = True,
    ):
        super().__init__()
        in_features = checks.whole("in_features", in_features, low=1)
        out_features = checks.whole("out_features", out_features, low=1)
        bits = checks.whole("bits", bits, low=1, high=16)
        if in_features % bits:
            raise ValueError(f"bits must be from 1 to 16 and divide in_features ({in_features}), got {bits}")
        checks.choice("weight", weight, get_args(Weight))
        checks.flag("bias", bias)
        temperature = checks.number("temperature", temperature, low=COLDEST)
        if temperature != 1 and weight != "cosine":
            raise ValueError(f"temperature is of weight 'cosine' only, got {temperature} with {weight!r}")
        self.in_features, self.out_features, self.bits = in_features, out_features, bits
        self.weight: Weight = weight
        self.temperature = temperature
        self.tables = nn.Parameter(torch.empty(in_features // bits * 2**bits, out_features))
        self.bias = nn.Parameter(torch.empty(out_features)) if bias else None
        self.reset_parameters()

    @property
    def count(self) -> int:
        """K, the number of tables."""
        return self.in_features // self.bits

    def reset_parameters(self) -> None:
        """Tables 0.02 N(0, 1), bias 0.001 N(0, 1), as the paper."""
        nn.init.normal_(self.tables, std=0.02)
        if self.bias is not None:
            nn.init.normal_(self.bias, std=0.001)

    def hash(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Rows (..., K) int64 of `tables`, and their weights (..., K), for inputs (..., in_features)."""
        checks.tensor("x", x, empty=True)
        if not x.ndim or x.shape[-1] != self.in_features:
            raise ValueError(f"x must have {self.in_features} features, got shape {tuple(x.shape)}")
        z = x.unflatten(-1, (self.count, self.bits))
        rows = bucket_codes(z) + torch.arange(self.count, device=x.device) * 2**self.bits
        return rows, bucket_weights(z, self.weight, self.temperature)

    def look_up(self, rows: Tensor, weights: Tensor) -> Tensor:
        """The weighted sum of table rows: (..., K) to (..., out_features). A gather-add, no matrix product."""
        flat = rows.reshape(-1, self.count)
        scales = weights.reshape(-1, self.count).to(self.tables.dtype)
        y = F.embedding_bag(flat, self.tables, mode="sum", per_sample_weights=scales)
        return (y if self.bias is None else y + self.bias).view(*rows.shape[:-1], self.out_features)

    def forward(self, x: Tensor) -> Tensor:
        return look_up_together([self], x)[0]

    def reference(self, x: Tensor) -> Tensor:
        """The same by a dense product with a mostly zero (K 2^bits)-wide code: the oracle."""
        rows, weights = self.hash(x)
        code = torch.zeros(*x.shape[:-1], len(self.tables), dtype=self.tables.dtype, device=x.device)
        code = code.scatter(-1, rows, weights.to(code.dtype))
        y = code @ self.tables
        return y if self.bias is None else y + self.bias

    def cost(self) -> MemoryCost:
        """Exact parameters; per token K h MACs and K h numbers read (hashing, O(in_features), left out)."""
        products = self.count * self.out_features
        params = sum(p.numel() for p in self.parameters())
        return MemoryCost(params, products, products * self.tables.element_size())

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bits={self.bits}, weight={self.weight!r}"


def look_up_together(layers: Sequence[MemoryLinear], x: Tensor) -> list[Tensor]:
    """The outputs of layers with the same inputs, bits and weight for x (..., in_features), which is hashed once for all.

    Raises ValueError for no layers, layers that differ in those, or an x of another width.
    """
    if len({(m.in_features, m.bits, m.weight, m.temperature) for m in layers}) != 1:
        raise ValueError("layers must be at least one, all with the same in_features, bits, weight and temperature")
    first = layers[0]
    checks.tensor("x", x, empty=True)
    if not _use_kernel(layers, x):
        kernels.ran("memory look-up", "torch")
        rows, weights = first.hash(x)
        return [layer.look_up(rows, weights) for layer in layers]
    if not x.ndim or x.shape[-1] != first.in_features:
        raise ValueError(f"x must have {first.in_features} features, got shape {tuple(x.shape)}")
    kernels.ran("memory look-up", "kernel")
    flat = x.reshape(-1, first.in_features).contiguous()
    tables, biases = [m.tables for m in layers], [m.bias for m in layers]
    kind = get_args(Weight).index(first.weight)
    found = torch.ops.assay.memory_look_up(flat, tables, biases, first.bits, kind, first.temperature)
    return [y.view(*x.shape[:-1], y.shape[-1]) for y in found]


def _look_up_macs(x: Tensor, tables: list[Tensor], biases: Any, bits: int, *_: Any, out: list[Tensor]) -> int:
    return x.shape[-1] // bits * sum(part.numel() for part in out)


register_macs("assay::memory_look_up", _look_up_macs, "linear")


def _use_kernel(layers: Sequence[MemoryLinear], x: Tensor) -> bool:
    """No gradients: those of the tables are as large as the tables, and what writes them takes the time."""
    tensors = [x, *(p for layer in layers for p in layer.parameters())]
    return (
        not (torch.is_grad_enabled() and any(t.requires_grad for t in tensors))
        and x.dtype in (torch.float32, torch.bfloat16)
        and all(t.dtype == x.dtype and t.device.type == "cpu" for t in tensors)
        and not torch.compiler.is_compiling()
        and kernels.load("memory")
    )


@torch.no_grad()
def distil_(layer: MemoryLinear, x: Tensor, y: Tensor, *, sweeps: int = 10, ridge: float = 10.0) -> list[float]:
    """Fit the tables to outputs y (n, out_features) of another layer on its real inputs x (n, in_features), by least squares.

    Each table in turn is set to the best rows given the others (backfitting), `sweeps` times; rows never read become zero.
    `ridge` draws rows towards zero, as strongly as so many average look-ups with a result of zero: weights differ by orders of
    magnitude between layers, and a fixed number would swamp small ones. At 10, the best of the powers of ten on held-out inputs of
    a language model's layer (`our choice`), a row that was read ten times is halved; at 0 the tables fit the inputs they were
    given, and others badly.
    Returns the relative error ||y - f(x)|| / ||y|| after each sweep, on the same x: how good the layer is must be seen on others.
    Raises ValueError for shapes that do not fit.
    """
    if x.ndim != 2 or y.shape != (len(x), layer.out_features):
        raise ValueError(
            f"x and y must be (n, in_features) and (n, out_features), got {tuple(x.shape)} and {tuple(y.shape)}"
        )
    sweeps, ridge = checks.whole("sweeps", sweeps, low=1), checks.number("ridge", ridge, low=0)
    checks.tensor("x", x, finite=True)
    checks.tensor("y", y, finite=True)
    rows, weights = layer.hash(x)
    weights = weights.to(torch.float32)
    layer.tables.zero_()
    target = y.float()
    if layer.bias is not None:
        layer.bias.copy_(target.mean(0))
        target = target - target.mean(0)
    residual, errors, buckets = target.clone(), [], 2**layer.bits
    for _ in range(sweeps):
        for k in range(layer.count):
            row, p = rows[:, k] - k * buckets, weights[:, k, None]
            table = layer.tables[k * buckets : (k + 1) * buckets]
            residual += p * table[row].float()
            mass = residual.new_zeros(buckets, 1).index_add(0, row, p.square()) + ridge * p.square().mean()
            best = residual.new_zeros(buckets, layer.out_features).index_add(0, row, p * residual) / mass
            table.copy_(torch.where(mass > 0, best, 0.0))
            residual -= p * table[row].float()
        errors.append(float(residual.norm() / y.float().norm().clamp_min(torch.finfo(torch.float32).tiny)))
    return errors


def bucket_entropy(layer: MemoryLinear, x: Tensor) -> tuple[float, float]:
    """How evenly real inputs x (n, in_features) use the rows: entropy over `bits` (1 is uniform), and the largest share times 2^bits.

    Both are averages over the tables.
    """
    checks.tensor("x", x)
    rows, _ = layer.hash(x)
    counts = torch.bincount(rows.flatten(), minlength=len(layer.tables)).view(layer.count, -1).double()
    share = counts / counts.sum(-1, keepdim=True)
    entropy = -(share * share.clamp(min=1e-300).log2()).sum(-1) / layer.bits
    return float(entropy.mean()), float((share.amax(-1) * 2**layer.bits).mean())


# -------------------------------------------------------------------------------------------------------- the architecture


@mixer("memory_attention")
class MemoryAttention(SoftmaxAttention):
    """Softmax attention whose queries, keys and values are look-ups with one shared hash; no output projection.

    Rotary positions on `rotary_share` of each head, as in Pythia; a share above 0 turns at least one pair of numbers (`our choice`:
    rounded down, small heads would have no positions at all). Raises ValueError for sizes that do not divide, heads of one number
    that are to turn, and options as `MemoryLinear`.
    """

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 4,
        bits: int = 8,
        weight: Weight = "softmax",
        temperature: float = 1.0,
        rotary_share: float = 0.25,
        layer: int = 0,
        layers: int = 1,
    ):
        super().__init__(dim, heads=heads, rotary=False)
        rotary_share = checks.number("rotary_share", rotary_share, low=0, high=1)
        if rotary_share and self.head_dim < 2:
            raise ValueError(f"rotary_share must be 0 for heads of one number, which cannot turn, got {rotary_share}")
        self.rotary_dim = max(2 if rotary_share else 0, int(self.head_dim * rotary_share) // 2 * 2)
        for name in ("q_proj", "k_proj", "v_proj"):
            setattr(self, name, MemoryLinear(dim, dim, bits=bits, weight=weight, temperature=temperature))
        self.o_proj = nn.Identity()  # type: ignore[assignment]

    def _qkv(self, x: Tensor, start: Tensor | int = 0) -> tuple[Tensor, Tensor, Tensor]:
        layers = [cast(MemoryLinear, p) for p in (self.q_proj, self.k_proj, self.v_proj)]
        shape = (*x.shape[:2], self.heads, self.head_dim)
        q, k, v = (y.view(shape).transpose(1, 2) for y in look_up_together(layers, x))
        if self.rotary_dim:
            position = torch.arange(x.shape[1], device=x.device)[None] + start
            q, k = (
                torch.cat([rotate(y[..., : self.rotary_dim], position), y[..., self.rotary_dim :]], -1) for y in (q, k)
            )
        return q, k, v


@channel_mixer("memory")
class MemoryBlock(nn.Module):
    """Memory Layer (dim -> K (bits + extra)), LayerNorm, Memory Layer with tables of bits + extra bits (-> dim); no activation.

    `hidden` is not used: the inner width follows from the bits.
    """

    def __init__(
        self,
        dim: int,
        hidden: int = 0,
        *,
        bits: int = 8,
        extra: int = 2,
        weight: Weight = "softmax",
        temperature: float = 1.0,
    ):
        super().__init__()
        bits, extra = checks.whole("bits", bits, low=1, high=16), checks.whole("extra", extra, low=0)
        inner = dim // bits * (bits + extra)
        self.first = MemoryLinear(dim, inner, bits=bits, weight=weight, temperature=temperature)
        self.norm = nn.LayerNorm(inner)
        self.second = MemoryLinear(inner, dim, bits=bits + extra, weight=weight, temperature=temperature)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.second(self.norm(self.first(x)))
        return y


SIZES: dict[str, dict[str, int]] = {
    "tiny": {"hidden_size": 512, "layers": 6, "heads": 8},
    "small": {"hidden_size": 768, "layers": 6, "heads": 12},
}


def memoryformer_config(
    *,
    vocab_size: int,
    hidden_size: int,
    layers: int,
    heads: int,
    bits: int = 8,
    extra: int = 2,
    weight: Weight = "softmax",
    temperature: float = 1.0,
) -> Any:
    """A `MixerConfig` of the paper's model; `SIZES` has the paper's. Embedding and head stay ordinary and separate."""
    from assay.methods.core.mixers.model import MixerConfig

    hashing = {"bits": bits, "weight": weight, "temperature": temperature}
    return MixerConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        layers=[["memory_attention", {"heads": heads, **hashing}]] * layers,
        channel_mixer=["memory", {"extra": extra, **hashing}],
        tie_word_embeddings=False,
    )
