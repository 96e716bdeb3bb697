"""The discrete Fourier transform by small matrix products, as matrix units do it, and the one whose matrices are learned."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from assay import checks
from assay.methods.core.mixers.protocol import check_positive, wide_dtype

MAX_FACTOR = 16  # the matrix unit's side


def factors_of(n: int, max_factor: int = MAX_FACTOR) -> list[int]:
    """n as factors of `max_factor` and one smaller: 2048 = 16 * 16 * 8. Raises ValueError unless both are powers of two.

    >>> factors_of(2048)
    [16, 16, 8]
    """
    for name, value, least in (("n", n, 1), ("max_factor", max_factor, 2)):
        value = checks.whole(name, value)
        if value < least or value & (value - 1):
            raise ValueError(f"{name} must be a power of two, at least {least}, got {value}")
    found = []
    while n > 1:
        found.append(min(n, max_factor))
        n //= found[-1]
    return found


@functools.lru_cache(maxsize=128)
def phases(rows: int, columns: int, n: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """exp(-2 pi i j k / n) for j < rows, k < columns: the DFT matrix when all three are equal, twiddles when n = rows * columns."""
    with torch.inference_mode(False):
        product = torch.arange(rows)[:, None] * torch.arange(columns)
        angle = -2 * math.pi * (product % n).double() / n
        return torch.polar(torch.ones_like(angle), angle).to(dtype).to(device)


def butterfly_dft(x: Tensor, *, max_factor: int = MAX_FACTOR, natural: bool = True) -> Tensor:
    """The DFT of complex x (..., n) along the last axis by small matrix products, n a power of two: equals `torch.fft.fft`.

    n = f m: f-point DFTs over the columns of x seen as (f, m), twiddles, and the same again for every row of m. A level costs
    f complex MACs a point (1 complex MAC = 8 FLOPs). `natural=False` leaves out the final transposition: entry
    (k_1, k_2, ...) of the result seen as (f_1, f_2, ...) is frequency k_1 + f_1 (k_2 + f_2 (...)), what `butterfly_idft` takes.
    Raises TypeError for real x, ValueError for another length.
    """
    factors = _factors_for(x, max_factor)
    matrices = {f: phases(f, f, f, x.dtype, x.device)[None] for f in factors}
    return _butterfly(x, factors, matrices, natural)


def butterfly_idft(x: Tensor, *, max_factor: int = MAX_FACTOR, natural: bool = True) -> Tensor:
    """The inverse of `butterfly_dft` with the same arguments."""
    factors = _factors_for(x, max_factor)
    lead, n = x.shape[:-1], x.shape[-1]
    if natural:  # digits reversed, then as left by the forward transform
        digits = x.reshape(*lead, *reversed(factors))
        x = digits.permute(*range(len(lead)), *reversed(range(len(lead), digits.ndim))).reshape(*lead, n)
    rest = 1
    for f in reversed(factors):
        x = x.reshape(*lead, -1, f, rest)
        if rest > 1:
            x = x * phases(f, rest, f * rest, x.dtype, x.device).conj()
            x = phases(f, f, f, x.dtype, x.device).conj() @ x
        else:
            x = (x[..., 0] @ phases(f, f, f, x.dtype, x.device).conj())[..., None]
        rest *= f
    return x.reshape(*lead, n) / n


def _factors_for(x: Tensor, max_factor: int) -> list[int]:
    checks.tensor("x", x, dtype="complex", empty=True)
    if not x.ndim:
        raise ValueError("x must have at least one dimension, got none")
    return factors_of(x.shape[-1], max_factor)


def _butterfly(x: Tensor, factors: Sequence[int], matrices: dict[int, Tensor], natural: bool) -> Tensor:
    """x (..., heads, n) with `matrices` by size, each (heads or 1, f, f)."""
    lead, rest = x.shape[:-1], x.shape[-1]
    for f in factors:
        rest //= f
        x = x.reshape(*lead, -1, f, rest)
        matrix = matrices[f] if len(matrices[f]) > 1 else matrices[f][0]
        if rest > 1:
            matrix = matrix[:, None] if matrix.ndim == 3 else matrix
            x = (matrix @ x) * phases(f, rest, f * rest, x.dtype, x.device)
        else:
            x = (x[..., 0] @ matrix.transpose(-1, -2))[..., None]
    if natural:
        x = x.reshape(*lead, *factors)
        x = x.permute(*range(len(lead)), *reversed(range(len(lead), x.ndim)))
    return x.reshape(*lead, math.prod(factors))


class ButterflyDFT(nn.Module):
    """A DFT whose small matrices (2, 4, 8, 16) are learned: (batch, heads or any, n) real or complex to complex, n-point.

    `heads` sets of matrices (1: all inputs share one), starting as the true DFT; `additive` starts instead from the DFT plus a
    learned term of size 0.01. `dropout` falls on what is learned. Raises ValueError for sizes that are not powers of two.
    """

    def __init__(
        self,
        *,
        heads: int = 1,
        max_factor: int = MAX_FACTOR,
        additive: bool = False,
        dropout: float = 0.0,
        lr: float = 1e-3,
    ):
        super().__init__()
        check_positive(heads=heads)
        factors_of(1, max_factor)
        checks.flag("additive", additive)
        dropout, lr = checks.number("dropout", dropout, low=0, below=1), checks.number("lr", lr, above=0)
        self.heads, self.max_factor, self.additive, self.lr = heads, max_factor, additive, lr
        self.sizes = [2**i for i in range(1, max_factor.bit_length())]
        self.dropout = nn.Dropout(dropout)
        self.matrices = nn.ParameterList(torch.empty(heads, f, f, 2) for f in self.sizes)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """The true DFT, or small additions to it."""
        for f, matrix in zip(self.sizes, self.matrices, strict=True):
            if self.additive:
                nn.init.normal_(matrix, std=0.01)
            else:
                matrix.copy_(torch.view_as_real(phases(f, f, f, torch.complex128, matrix.device)))

    def optimizer_options(self) -> dict[str, dict[str, float]]:
        """The matrices' own learning rate, and no weight decay; by parameter name, see `training.parameter_groups`."""
        return {f"matrices.{i}": {"lr": self.lr, "weight_decay": 0.0} for i in range(len(self.sizes))}

    def forward(self, x: Tensor, n: int) -> Tensor:
        """The learned n-point transform of x (..., inputs, up to n), padded with zeros.

        Raises ValueError for another number of inputs than heads (unless all share one set), or more than n values.
        """
        kind_of: checks.Kind = "complex" if isinstance(x, Tensor) and x.is_complex() else "floating"
        checks.tensor("x", x, shape=("...", "inputs", "values"), dtype=kind_of, empty=True)
        if self.heads not in (1, x.shape[-2]) or x.shape[-1] > checks.whole("n", n, low=1):
            raise ValueError(f"x must be (..., {self.heads} inputs, at most {n} values), got {tuple(x.shape)}")
        wide = wide_dtype(x.dtype)
        kind = torch.complex128 if wide == torch.float64 else torch.complex64
        x = F.pad(x.to(kind), (0, n - x.shape[-1]))
        factors, found = factors_of(n, self.max_factor), {}
        for f in set(factors):
            learned = self.dropout(self.matrices[self.sizes.index(f)].to(wide))
            found[f] = torch.view_as_complex(learned.contiguous())
            if self.additive:
                found[f] = found[f] + phases(f, f, f, kind, x.device)
        return _butterfly(x, factors, found, True)
