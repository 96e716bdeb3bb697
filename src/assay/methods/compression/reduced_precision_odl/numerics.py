"""Sixteen-bit arithmetic as a microcontroller does it: every product and every sum rounded, in the order of its kernels.

torch's own products of 16-bit matrices sum in float32, so that casting the inputs does not show what a library without float32
accumulators computes. `matmul` does: it rounds after each operation.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import zip_longest
from typing import Literal

import torch
from torch import Tensor

from assay import checks

Format = Literal["float32", "float16", "bfloat16"]
Order = Literal["sequence", "pairs"]
Accumulate = Literal["format", "float32"]
Update = Literal["nearest", "stochastic", "kahan", "master"]

DTYPES: dict[str, torch.dtype] = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
ORDERS: tuple[Order, ...] = ("sequence", "pairs")
ACCUMULATE: tuple[Accumulate, ...] = ("format", "float32")
UPDATES: tuple[Update, ...] = ("nearest", "stochastic", "kahan", "master")
_AT_ONCE = 1 << 22  # products that are held at once


@dataclass(frozen=True)
class _Grid:
    """The values of a format: bits of the significand (the hidden one too), smallest and largest exponent of a normal number."""

    bits: int
    least: int
    most: int

    @property
    def largest(self) -> float:
        return math.ldexp(2 - math.ldexp(1.0, 1 - self.bits), self.most)


_GRIDS = {"float32": _Grid(24, -126, 127), "float16": _Grid(11, -14, 15), "bfloat16": _Grid(8, -126, 127)}


@dataclass(frozen=True)
class NumericsPolicy:
    """How numbers are held, summed and updated. The default is the paper's: all in IEEE half, nothing in float32.

    - `format`: of weights, activations, gradients and, unless said otherwise, of sums. "bfloat16" is the released code's default today.
    - `accumulate`: "format", each sum rounded to the format (the paper's); "float32", products summed in float32 and rounded once.
    - `order` of a sum, with `accumulate="format"`. "sequence": one term after another (the kernel whose second operand is not
      transposed, a vector of outputs). "pairs": even and odd terms apart, the two added, then the last term of an odd number (the
      kernel with the second operand transposed, a vector of partial sums).
    - `fused`: whether a product is added without being rounded first. The results differ; which one a chip gives, its compiler decides.
    - `update` of a weight. "nearest": w - lr g in the format, both operations rounded (the paper's). "stochastic": rounded up or
      down by chance, so that its mean is right. "kahan": what was rounded away is kept in the format beside the weight. "master":
      a float32 copy of the weights is updated and rounded for use.
    - `loss_scale` multiplies the loss, for gradients that would be too small for float16; the update divides by it.

    Raises TypeError or ValueError for a value that is not allowed.
    """

    format: Format = "float16"
    accumulate: Accumulate = "format"
    order: Order = "pairs"
    fused: bool = False
    update: Update = "nearest"
    loss_scale: float = 1.0

    def __post_init__(self) -> None:
        checks.choice("format", self.format, DTYPES)
        checks.choice("accumulate", self.accumulate, ACCUMULATE)
        checks.choice("order", self.order, ORDERS)
        checks.flag("fused", self.fused)
        checks.choice("update", self.update, UPDATES)
        checks.number("loss_scale", self.loss_scale, above=0)

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.format]

    @property
    def weight_bytes(self) -> int:
        """Bytes that a weight takes, with what its update keeps beside it."""
        beside = {"nearest": 0, "stochastic": 0, "kahan": self.dtype.itemsize, "master": 4}
        return self.dtype.itemsize + beside[self.update]


def round_number(x: float, format: Format) -> float:
    """One number rounded to the nearest value of a format, half-way to the even one; infinite beyond the largest.

    >>> round_number(2049.0, "float16"), round_number(257.0, "bfloat16"), round_number(65520.0, "float16")
    (2048.0, 256.0, inf)
    """
    checks.choice("format", format, DTYPES)
    grid = _GRIDS[format]
    if x == 0 or not math.isfinite(x):
        return x
    step = math.ldexp(1.0, max(math.frexp(x)[1] - 1, grid.least) - (grid.bits - 1))
    found = round(x / step) * step
    return math.copysign(math.inf, x) if abs(found) > grid.largest else found


def _steps(x: Tensor, grid: _Grid) -> Tensor:
    """The distance of a format's values at each float64 number, made from bits: it is a power of two, and exact."""
    exponent = (torch.frexp(x).exponent.long() - 1).clamp(grid.least, grid.most) - (grid.bits - 1)
    return ((exponent + 1023) << 52).view(torch.float64)


def _within(x: Tensor, grid: _Grid) -> Tensor:
    return torch.where(x.abs() > grid.largest, x.sign() * math.inf, x)


def round_nearest(x: Tensor, format: Format) -> Tensor:
    """Float64 numbers rounded to the nearest values of a format, kept in float64: rounded once, which a cast by way of float32 is not.

    >>> round_nearest(torch.tensor([2049.0, 0.1], dtype=torch.float64), "bfloat16").tolist()
    [2048.0, 0.10009765625]
    """
    checks.tensor("x", x, dtype=torch.float64, empty=True)
    checks.choice("format", format, DTYPES)
    step = _steps(x, _GRIDS[format])
    return _within(torch.round(x / step) * step, _GRIDS[format])


def round_stochastic(x: Tensor, format: Format, generator: torch.Generator | None = None) -> Tensor:
    """Numbers (float32 or float64) rounded up or down by chance, in the format's dtype; the mean over draws is `x`.

    Up with the probability that is the way from the value below, as a share of their distance. Values of the format stay what they are.

    >>> round_stochastic(torch.tensor([1.0, 1.5]), "bfloat16")
    tensor([1.0000, 1.5000], dtype=torch.bfloat16)
    """
    checks.tensor("x", x, dtype=(torch.float32, torch.float64), empty=True)
    checks.choice("format", format, DTYPES)
    wide = x.double()
    step = _steps(wide, _GRIDS[format])
    chance = torch.rand(wide.shape, generator=generator, dtype=torch.float64, device=wide.device)
    found = torch.floor(wide / step + chance) * step
    return _within(found, _GRIDS[format]).to(DTYPES[format])


def matmul(a: Tensor, b: Tensor, policy: NumericsPolicy) -> Tensor:
    """The product of `a` (..., n, k) and `b` (..., k, m), both in the policy's format, rounded after every operation: (..., n, m).

    Bit for bit what the scalar loop `matmul_reference` gives, for many outputs at a time. Each output is summed by itself, so that
    the result does not depend on how cores share the outputs (our choice for "pairs": the released kernel sums the last of an odd
    number of columns in sequence, which depends on it). With `accumulate="float32"` it is torch's float32 product, rounded.
    Nothing is recorded for gradients. Not for speed: it is there to tell what a microcontroller would compute.

    With `fused`, a sum of two terms of which one is 2^53 times the other may be rounded the other way when it lies half-way.

    Raises TypeError for another dtype than the policy's, ValueError for shapes that do not fit or are empty.

    >>> ones = torch.ones(1, 4096, dtype=torch.float16)
    >>> one_by_one, wide = NumericsPolicy(order="sequence"), NumericsPolicy(accumulate="float32")
    >>> matmul(ones, ones.T, one_by_one).item(), matmul(ones, ones.T, wide).item()
    (2048.0, 4096.0)
    """
    checks.tensor("a", a, shape=("...", "n", "k"), dtype=policy.dtype)
    checks.tensor("b", b, shape=("...", a.shape[-1], "m"), dtype=policy.dtype)
    checks.together(a=a, b=b)
    a, b = a.detach(), b.detach()
    if policy.accumulate == "float32":
        return (a.float() @ b.float()).to(policy.dtype)
    settle: Callable[[Tensor], Tensor] = _as_it_is  # 16-bit operators of torch round each result once
    if policy.fused:
        a, b = a.double(), b.double()  # in which every product is exact
        settle = partial(round_nearest, format=policy.format)
    total = _in_sequence(a, b, settle) if policy.order == "sequence" else _in_pairs(a, b, settle)
    return total.to(policy.dtype)


def _as_it_is(x: Tensor) -> Tensor:
    return x


def _in_pairs(a: Tensor, b: Tensor, settle: Callable[[Tensor], Tensor]) -> Tensor:
    even = a.shape[-1] // 2 * 2
    total: Tensor | None = None
    if even:
        rows = a[..., :even].unflatten(-1, (-1, 2)).movedim(-1, -3)
        columns = b[..., :even, :].unflatten(-2, (-1, 2)).movedim(-2, -3)
        halves = _in_sequence(rows, columns, settle)  # (..., 2, n, m): the sums of the even and of the odd terms
        total = settle(halves[..., 0, :, :] + halves[..., 1, :, :])
    if even == a.shape[-1]:
        assert total is not None
        return total
    last = _in_sequence(a[..., even:], b[..., even:, :], settle)
    return last if total is None else settle(last + total)


def _in_sequence(a: Tensor, b: Tensor, settle: Callable[[Tensor], Tensor]) -> Tensor:
    total: Tensor | None = None
    for product in _products(a, b):
        total = settle(product if total is None else total + product)
    assert total is not None
    return total


def _products(a: Tensor, b: Tensor) -> Iterator[Tensor]:
    """The terms of the sums, (..., n, m) each, in the dtype of `a` and `b`."""
    leading = zip_longest(reversed(a.shape[:-2]), reversed(b.shape[:-2]), fillvalue=1)
    outputs = math.prod(max(pair) for pair in leading) * a.shape[-2] * b.shape[-1]
    at_once = max(1, _AT_ONCE // outputs)
    for start in range(0, a.shape[-1], at_once):
        rows = a[..., start : start + at_once].transpose(-1, -2).unsqueeze(-1)
        columns = b[..., start : start + at_once, :].unsqueeze(-2)
        yield from (rows * columns).unbind(-3)


def matmul_reference(a: Tensor, b: Tensor, policy: NumericsPolicy) -> Tensor:
    """`matmul` of two matrices as a scalar loop that rounds each number by itself: the oracle of the tests, for small sizes.

    Raises what `matmul` raises, and ValueError for more than two dimensions or sums in float32, whose order is torch's own.
    """
    checks.tensor("a", a, shape=("n", "k"), dtype=policy.dtype)
    checks.tensor("b", b, shape=(a.shape[-1], "m"), dtype=policy.dtype)
    if policy.accumulate != "format":
        raise ValueError(f"policy must accumulate in its format, got {policy.accumulate!r}")

    def rounded(x: float) -> float:
        return round_number(x, policy.format)

    def summed(terms: list[tuple[float, float]]) -> float:
        total = 0.0
        for x, y in terms:
            total = rounded(total + (x * y if policy.fused else rounded(x * y)))
        return total

    def output(row: list[float], column: list[float]) -> float:
        terms = list(zip(row, column, strict=True))
        if policy.order == "sequence":
            return summed(terms)
        even = len(terms) // 2 * 2
        halves = rounded(summed(terms[0:even:2]) + summed(terms[1:even:2]))
        return rounded(summed(terms[even:]) + halves)

    columns = b.T.tolist()
    return torch.tensor([[output(row, column) for column in columns] for row in a.tolist()], dtype=policy.dtype)
