"""Long convolutions: sequence-long kernels learned tap by tap, and the FlashButterfly way of running them (arXiv 2302.06646).

Every channel of a sequence is convolved with a kernel as long as the sequence, held as plain weights. What makes that learn is a
regulariser on the kernel at every forward pass: `squash`, a soft threshold that puts small taps to exactly zero, after an optional
`smooth`. The convolution is a product of spectra. FlashButterfly computes those by 16-point DFT matrix products with twiddles
between them, fused in fast memory; long sequences take three passes over slow memory; the small matrices may be learned.

After the paper and the official code, whose fused kernels were announced and never released: the three-pass form is rebuilt from the
description. `our choice`: spectra stay in digit-reversed order between transform and inverse, which saves the transposes; the
three-pass form uses that the input is real and half zeros; on the CPU "fused" means a block of channels at a time, small enough
for the cache; half precision is computed in float32, where it overflows otherwise; smoothing in frequency is done as the window
in time that it equals; `long_conv_h3` puts long convolutions in both places of the H3 block.

When NOT to use it: for token-by-token generation (the state is every input so far, a step costs as much as attention's); for
lengths that are not known in advance (a kernel has so many taps and no more); and the matrix form on processors without matrix
units, where it does several times the arithmetic of an FFT for nothing. With the "random" start most taps lie inside the dead zone
of `squash`, where they get no gradient and never leave: a `lam` far above the start's 0.002 kills the layer.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from assay.methods.core.mixers.protocol import Mixer, State, fast_length, mixer

Backend = Literal["rfft", "complex", "butterfly", "three_pass", "direct"]
Domain = Literal["time", "frequency"]
Init = Literal["random", "double_exponential"]
Form = Literal["direct", "rfft", "unfused", "fused", "three_pass"]
MAX_FACTOR = 16  # the matrix unit's side
FUSED_BYTES = 1 << 20  # working set of one block of channels; `our choice`, about half a core's second cache


# ------------------------------------------------------------------------------------------------------ regularised kernels


def squash(k: Tensor, lam: float) -> Tensor:
    """sign(k) * max(|k| - lam, 0): exactly 0, and without gradient, where |k| <= lam; moved towards 0 by lam elsewhere.

    Raises ValueError for a negative lam; lam = 0 changes nothing.
    """
    if not lam >= 0:
        raise ValueError(f"lam must be at least 0, got {lam}")
    return F.softshrink(k, lam) if lam else k


def smooth(k: Tensor, width: int, domain: Domain = "time") -> Tensor:
    """Kernels (channels, dim, taps) smoothed over `width` taps, or over `width` frequencies.

    "time" is the moving average, zeros beyond the ends. "frequency" filters the kernel's spectrum of length 2 * taps with weights
    exp(-(j - c)^2 / 2) around the centre c, of sum 1. That is the same as a window that falls with the lag, and done so.
    Raises ValueError for an even width or an unknown domain.
    """
    if width < 1 or width % 2 == 0:
        raise ValueError(f"width must be odd and at least 1, got {width}")
    if domain not in get_args(Domain):
        raise ValueError(f"domain must be one of {', '.join(get_args(Domain))}, got {domain!r}")
    if width == 1:
        return k
    if domain == "time":
        return F.avg_pool1d(k, width, stride=1, padding=width // 2)
    return k * frequency_window(k.shape[-1], width).to(k)


def frequency_window(taps: int, width: int) -> Tensor:
    """What filtering the spectrum of length 2 * taps does to tap t: sum over j of weight_j cos(pi t (j - c) / taps), float64."""
    offset = torch.arange(width, dtype=torch.float64) - width // 2
    weight = torch.exp(-0.5 * offset.square())
    angle = math.pi * torch.arange(taps, dtype=torch.float64)[:, None] * offset / taps
    return angle.cos() @ (weight / weight.sum())


class LongKernel(nn.Module):
    """`channels` kernels for each of `dim` inputs, `length` taps each, as they are used: smoothed, squashed, with dropout.

    `lam` the threshold (0.001 to 0.005 by task), `smooth_width` 1 for none, `dropout` of taps (0.2 to 0.3), `init` "random",
    0.002 N(0, 1), or "double_exponential", 0.02 N(0, 1) falling with the lag at a rate that rises with the input's index. `D`
    (channels, dim) is the weight of the input itself. The kernel has a learning rate of its own and no weight decay:
    `assay.experiments.mixers.training.parameter_groups` asks `optimizer_options`. Raises ValueError for impossible sizes.
    """

    def __init__(
        self,
        channels: int,
        dim: int,
        length: int,
        *,
        lam: float = 0.003,
        smooth_width: int = 1,
        smooth_domain: Domain = "time",
        dropout: float = 0.0,
        init: Init = "random",
        lr: float = 1e-3,
        skips: int | None = None,
    ):
        super().__init__()
        if min(channels, dim, length) < 1:
            raise ValueError(f"channels, dim and length must be at least 1, got {channels}, {dim} and {length}")
        if init not in get_args(Init):
            raise ValueError(f"init must be one of {', '.join(get_args(Init))}, got {init!r}")
        if not lr > 0:
            raise ValueError(f"lr must be positive, got {lr}")
        self.kernel = nn.Parameter(torch.empty(channels, dim, length))
        self.D = nn.Parameter(torch.empty(channels if skips is None else skips, dim))
        self.lam, self.smooth_width, self.init, self.lr = lam, smooth_width, init, lr
        self.smooth_domain: Domain = smooth_domain
        self.dropout = nn.Dropout(dropout)
        self._kept: tuple[Any, Tensor] | None = None
        squash(smooth(self.kernel[:1, :1].detach(), smooth_width, smooth_domain), lam)  # bad settings fail here
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """The start named by `init`; D is N(0, 1)."""
        nn.init.normal_(self.D)
        nn.init.normal_(self.kernel, std=0.002 if self.init == "random" else 0.02)
        if self.init == "double_exponential":
            _, dim, length = self.kernel.shape
            lag = torch.arange(length, device=self.kernel.device) / length
            rate = (dim / 2) ** (torch.arange(dim, device=self.kernel.device) / dim)
            self.kernel.mul_(torch.exp(-lag * rate[:, None]))

    def forward(self, taps: int | None = None) -> Tensor:
        """(channels, dim, taps): the first `taps` of the kernels, all when None."""
        k = smooth(self.kernel, self.smooth_width, self.smooth_domain)
        out: Tensor = self.dropout(squash(k[..., :taps], self.lam))
        return out

    def continued(self, u: Tensor, tokens: int) -> Tensor:
        """The last `tokens` outputs of the causal `fft_conv` over u (batch, dim, seen): (batch, channels, dim, tokens).

        One token is a product with the reversed kernel, seen MACs a channel (1 MAC = 2 FLOPs); more are one overlap-save block
        of seen + tokens - 1 places.
        """
        seen, wide = u.shape[-1], _wide(u.dtype)
        if seen == tokens:  # a sequence begins, maybe with other weights
            self._kept = None
        if tokens == 1:
            k = self._reversed()[..., -seen:]
            y = (u.to(wide).transpose(0, 1) @ k.to(wide).transpose(1, 2)).permute(1, 2, 0)[..., None]
        else:
            n, k = fast_length(seen + tokens - 1), self(seen).to(wide)
            y = torch.fft.irfft(torch.fft.rfft(u.to(wide), n)[:, None] * torch.fft.rfft(k, n), n)[
                ..., seen - tokens : seen
            ]
        return y.to(u.dtype) + u[:, None, :, seen - tokens :] * self.D[..., None]

    def _reversed(self) -> Tensor:
        """The kernels last tap first, (dim, channels, length), kept from step to step: to make them costs more than a step."""
        weight = self.kernel
        if self.training or (torch.is_grad_enabled() and weight.requires_grad):
            return self().flip(-1).transpose(0, 1)
        source = (weight, weight.data_ptr(), 0 if weight.is_inference() else weight._version)
        if self._kept is None or self._kept[0][0] is not weight or self._kept[0][1:] != source[1:]:
            self._kept = source, self().to(_wide(weight.dtype)).transpose(0, 1).flip(-1)
        return self._kept[1]

    def optimizer_options(self) -> dict[str, dict[str, float]]:
        """The kernel's own learning rate, and no weight decay; by parameter name, see `training.parameter_groups`."""
        return {"kernel": {"lr": self.lr, "weight_decay": 0.0}}


# ------------------------------------------------------------------------------------------------------------ butterfly DFT


def factors_of(n: int, max_factor: int = MAX_FACTOR) -> list[int]:
    """n as factors of `max_factor` and one smaller: 2048 = 16 * 16 * 8. Raises ValueError unless both are powers of two."""
    for name, value, least in (("n", n, 1), ("max_factor", max_factor, 2)):
        if value < least or value & (value - 1):
            raise ValueError(f"{name} must be a power of two, at least {least}, got {value}")
    found = []
    while n > 1:
        found.append(min(n, max_factor))
        n //= found[-1]
    return found


@functools.lru_cache(maxsize=128)
def _phases(rows: int, columns: int, n: int, dtype: torch.dtype, device: torch.device) -> Tensor:
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
    matrices = {f: _phases(f, f, f, x.dtype, x.device)[None] for f in factors}
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
            x = x * _phases(f, rest, f * rest, x.dtype, x.device).conj()
            x = _phases(f, f, f, x.dtype, x.device).conj() @ x
        else:
            x = (x[..., 0] @ _phases(f, f, f, x.dtype, x.device).conj())[..., None]
        rest *= f
    return x.reshape(*lead, n) / n


def _factors_for(x: Tensor, max_factor: int) -> list[int]:
    if not x.is_complex():
        raise TypeError(f"x must be complex, got {x.dtype}")
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
            x = (matrix @ x) * _phases(f, rest, f * rest, x.dtype, x.device)
        else:
            x = (x[..., 0] @ matrix.transpose(-1, -2))[..., None]
    if natural:
        x = x.reshape(*lead, *factors)
        x = x.permute(*range(len(lead)), *reversed(range(len(lead), x.ndim)))
    return x.reshape(*lead, math.prod(factors))


class ButterflyDFT(nn.Module):
    """A DFT whose small matrices (2, 4, 8, 16) are learned: (batch, heads or any, n) real or complex to complex, n-point.

    `heads` sets of matrices (1: all inputs share one), starting as the true DFT; `additive` starts instead from the DFT plus a
    learned term of size 0.01. `dropout` falls on what is learned. Raises ValueError for sizes that are no powers of two.
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
        if heads < 1:
            raise ValueError(f"heads must be at least 1, got {heads}")
        factors_of(1, max_factor)
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
                matrix.copy_(torch.view_as_real(_phases(f, f, f, torch.complex128, matrix.device)))

    def optimizer_options(self) -> dict[str, dict[str, float]]:
        """The matrices' own learning rate, and no weight decay; by parameter name, see `training.parameter_groups`."""
        return {f"matrices.{i}": {"lr": self.lr, "weight_decay": 0.0} for i in range(len(self.sizes))}

    def forward(self, x: Tensor, n: int) -> Tensor:
        """The learned n-point transform of x (..., inputs, up to n), zeros behind it."""
        wide = _wide(x.dtype)
        kind = torch.complex128 if wide == torch.float64 else torch.complex64
        x = F.pad(x.to(kind), (0, n - x.shape[-1]))
        factors, found = factors_of(n, self.max_factor), {}
        for f in set(factors):
            learned = self.dropout(self.matrices[self.sizes.index(f)].to(wide))
            found[f] = torch.view_as_complex(learned.contiguous())
            if self.additive:
                found[f] = found[f] + _phases(f, f, f, kind, x.device)
        return _butterfly(x, factors, found, True)


# -------------------------------------------------------------------------------------------------------------- convolution


def fft_conv(
    u: Tensor,
    k: Tensor,
    D: Tensor | None = None,
    *,
    k_back: Tensor | None = None,
    backend: Backend = "rfft",
    fuse: bool = True,
) -> Tensor:
    """y_t = sum over s <= t of k_(t-s) u_s, plus D u_t: u (batch, dim, length), k (channels, dim, taps) to (batch, channels, dim, length).

    k may be (dim, taps) and D (dim,): then the result is (batch, dim, length). Taps beyond the length are not used. `k_back`,
    shaped as k, adds the sum over s > t of k_back_(s-t-1) u_s: with it the convolution looks both ways. Half precision is
    computed in float32. Backends: "rfft" (real FFTs), "complex" (FFTs of complex length 2 L, as before FlashButterfly),
    "butterfly" (`butterfly_dft`), "three_pass", "direct" (length^2 work, the reference). `fuse` works through blocks of channels
    that fit the cache, where no gradients are kept. Raises ValueError for shapes that do not fit or an unknown backend.
    """
    if backend not in get_args(Backend):
        raise ValueError(f"backend must be one of {', '.join(get_args(Backend))}, got {backend!r}")
    single = k.ndim == 2
    if single:
        k, k_back = k[None], None if k_back is None else k_back[None]
        D = None if D is None else D[None]
    if u.ndim != 3 or k.ndim != 3 or k.shape[1] != u.shape[1]:
        raise ValueError(
            f"u must be (batch, dim, length) and k ([channels,] dim, taps), got {tuple(u.shape)} and {tuple(k.shape)}"
        )
    if k_back is not None and k_back.shape[:2] != k.shape[:2]:
        raise ValueError(f"k_back must be shaped as k, got {tuple(k_back.shape)} and {tuple(k.shape)}")
    if D is not None and D.shape != k.shape[:2]:
        raise ValueError(f"D must be ([channels,] dim) as k is, got {tuple(D.shape)}")
    y = _convolve(u, k, k_back, backend, fuse)
    if D is not None:
        y = y + u[:, None] * D[..., None]
    return y[:, 0] if single else y


def _convolve(u: Tensor, k: Tensor, k_back: Tensor | None, backend: Backend, fuse: bool) -> Tensor:
    batch, dim, length = u.shape
    wide = _wide(torch.promote_types(u.dtype, k.dtype))
    k = k[..., :length]
    k_back = None if k_back is None else k_back[..., :length].to(wide)
    run = _BACKENDS[backend]
    kept = torch.is_grad_enabled() and (
        u.requires_grad or k.requires_grad or (k_back is not None and k_back.requires_grad)
    )
    each = (
        (batch + len(k) + batch * len(k)) * 2 * length * 2 * wide.itemsize
    )  # bytes of the spectra of one input, about
    step = max(1, FUSED_BYTES // max(1, each))
    if not fuse or kept or step >= dim or backend == "direct":
        return run(u.to(wide), k.to(wide), k_back).to(u.dtype)
    y = u.new_empty(batch, len(k), dim, length)
    for h in range(0, dim, step):
        here = slice(h, h + step)
        back = None if k_back is None else k_back[:, here]
        y[:, :, here] = run(u[:, here].to(wide), k[:, here].to(wide), back)
    return y


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype in (torch.float64, torch.complex128) else torch.float32


def around(k: Tensor, k_back: Tensor | None, n: int) -> Tensor:
    """The two kernels on a circle of n places: lag t at place t, lag -t at place n - t."""
    if k_back is None:
        return F.pad(k, (0, n - k.shape[-1]))
    return F.pad(k, (0, n - k.shape[-1])) + F.pad(k_back.flip(-1), (n - k_back.shape[-1], 0))


def split_around(k: Tensor) -> tuple[Tensor, Tensor]:
    """(k, k_back) of a kernel of 2 * length taps that the released standalone example calls causal.

    It multiplies spectra of length 2 * length, so that the taps of the second half wrap around and look into the future.
    """
    if k.shape[-1] % 2:
        raise ValueError(f"k must have an even number of taps, got {k.shape[-1]}")
    front, back = k.chunk(2, -1)
    return front, back.flip(-1)


def _by_rfft(u: Tensor, k: Tensor, k_back: Tensor | None) -> Tensor:
    length = u.shape[-1]
    n = fast_length(2 * length)
    spectrum = torch.fft.rfft(u, n)[:, None] * torch.fft.rfft(around(k, k_back, n), n)
    return torch.fft.irfft(spectrum, n)[..., :length]


def _by_complex(u: Tensor, k: Tensor, k_back: Tensor | None) -> Tensor:
    length, n = u.shape[-1], 2 * u.shape[-1]
    kind = torch.complex128 if u.dtype == torch.float64 else torch.complex64
    spectrum = torch.fft.fft(u.to(kind), n)[:, None] * torch.fft.fft(around(k, k_back, n).to(kind), n)
    return torch.fft.ifft(spectrum, n).real[..., :length]


def _by_butterfly(u: Tensor, k: Tensor, k_back: Tensor | None) -> Tensor:
    length = u.shape[-1]
    n = 1 << (2 * length - 1).bit_length()
    kind = torch.complex128 if u.dtype == torch.float64 else torch.complex64
    spectrum = butterfly_dft(around(k, k_back, n).to(kind), natural=False)
    spectrum = butterfly_dft(F.pad(u, (0, n - length)).to(kind), natural=False)[:, None] * spectrum
    return butterfly_idft(spectrum, natural=False).real[..., :length]


def three_pass_conv(u: Tensor, k: Tensor, k_back: Tensor | None = None, *, outer: int = MAX_FACTOR) -> Tensor:
    """The convolution in three passes over the sequence; u, k, k_back and the result as in `fft_conv`, k with three axes.

    The circle of n = outer * m >= 2 * length places is seen as (outer, m). Pass one: outer DFTs over the columns, and twiddles.
    Pass two: convolutions of length m, row by row, which are short enough to be fused. Pass three: the way back. Rows
    j and outer - j of a real sequence are conjugates, so outer / 2 + 1 are computed; rows of zeros are not multiplied.
    Raises ValueError for an odd outer.
    """
    if outer < 2 or outer % 2:
        raise ValueError(f"outer must be even and at least 2, got {outer}")
    length = u.shape[-1]
    m = fast_length(-(-2 * length // outer))
    n, rows, half = outer * m, -(-length // m), outer // 2 + 1
    kind = torch.complex128 if u.dtype == torch.float64 else torch.complex64
    twiddle = _phases(half, m, n, kind, u.device)
    to_rows = _phases(half, outer, outer, kind, u.device)

    def first_pass(x: Tensor) -> Tensor:
        x = x.unflatten(-1, (-1, m))
        matrix = to_rows[:, : x.shape[-2]]
        z = torch.cat([matrix.real, matrix.imag]) @ x  # one real product
        return torch.complex(z[..., :half, :], z[..., half:, :]) * twiddle

    held = rows * m if k_back is None else n
    kernels = torch.fft.fft(first_pass(around(k, k_back, held)))
    z = first_pass(F.pad(u, (0, rows * m - length)))
    z = torch.fft.ifft(torch.fft.fft(z)[:, None] * kernels)  # second pass
    z = z * twiddle.conj()
    weight = z.real.new_full((half, 1), 2 / outer)
    weight[0] = weight[-1] = 1 / outer  # the rows that are their own conjugates
    back = to_rows[:, :rows] * weight
    y = torch.cat([back.real, back.imag]).T @ torch.cat([z.real, z.imag], -2)
    return y.flatten(-2)[..., :length]


def _direct(u: Tensor, k: Tensor, k_back: Tensor | None) -> Tensor:
    channels, dim, taps = k.shape
    weight, right = k.flip(-1), 0
    if k_back is not None:
        weight, right = torch.cat([weight, k_back], -1), k_back.shape[-1]
    weight = weight.transpose(0, 1).reshape(dim * channels, 1, -1)
    y = F.conv1d(F.pad(u, (taps - 1, right)), weight, groups=dim)
    return y.unflatten(1, (dim, channels)).transpose(1, 2)


_BACKENDS: dict[str, Callable[[Tensor, Tensor, Tensor | None], Tensor]] = {
    "rfft": _by_rfft,
    "complex": _by_complex,
    "butterfly": _by_butterfly,
    "three_pass": three_pass_conv,
    "direct": _direct,
}


# ------------------------------------------------------------------------------------------------------------------- counts


@dataclass(frozen=True)
class ConvCost:
    """Of one convolution: FLOPs (1 MAC = 2, 1 complex MAC = 8), reading-and-writing passes over slow memory, and their bytes."""

    flops: int
    passes: int
    bytes: int


def dft_flops(n: int, *, matrices: bool = False, max_factor: int = MAX_FACTOR) -> int:
    """FLOPs of one complex n-point DFT, n a power of two: 5 n log2 n for the FFT by the usual count, or 8 f n for every level
    of f-point matrix products and 6 n for the twiddles between two levels."""
    factors = factors_of(n, max_factor)
    if not matrices:
        return 5 * n * (n.bit_length() - 1)
    return 8 * n * sum(factors) + 6 * n * max(0, len(factors) - 1)


def conv_cost(length: int, *, form: Form, sequences: int = 1, element_bytes: int = 4) -> ConvCost:
    """Causal convolution of `sequences` sequences, the kernel's spectrum being known, without D u. Modelled, not measured.

    "direct" multiplies all pairs. "rfft" is an FFT library called three times (transform, product, inverse). "unfused" stores
    every level of the matrix form; "fused" reads and writes once; "three_pass" three times. Between passes a complex sequence of
    twice the length is written and read. Raises ValueError for another form or a length that is no power of two.
    """
    if form not in get_args(Form):
        raise ValueError(f"form must be one of {', '.join(get_args(Form))}, got {form!r}")
    n = 2 * length
    levels = len(factors_of(n))
    if form == "direct":
        return ConvCost(sequences * length * (length + 1), 1, sequences * 2 * length * element_bytes)
    if form == "rfft":
        flops, passes, between = 2 * dft_flops(n) // 2 + 6 * (n // 2 + 1), 3, n // 2 + 1
    else:
        flops = 2 * dft_flops(n, matrices=True) + 6 * n
        passes, between = {"unfused": 2 * levels + 1, "fused": 1, "three_pass": 3}[form], n
    moved = 2 * length * element_bytes + (passes - 1) * 2 * between * 2 * element_bytes
    return ConvCost(sequences * flops, passes, sequences * moved)


# ------------------------------------------------------------------------------------------------------------------- layers


class LongConv(nn.Module):
    """The paper's layer on (batch, tokens, dim): convolution, GELU, dropout, Linear to 2 dim, GLU.

    `length`: the most tokens it takes; fewer use the first taps. `channels` kernels an input (they multiply the output
    projection), `bidirectional` a second set of kernels that looks ahead. `learned_dft`, options of `ButterflyDFT` (may be
    empty): learned transforms of input and kernels, the inverse stays exact; such a layer is not causal once trained.
    `kernel` options as `LongKernel` takes them. Raises ValueError for more than `length` tokens.
    """

    def __init__(
        self,
        dim: int,
        length: int,
        *,
        channels: int = 2,
        bidirectional: bool = False,
        dropout: float = 0.0,
        learned_dft: dict[str, Any] | None = None,
        **kernel: Any,
    ):
        super().__init__()
        self.dim, self.length, self.channels, self.bidirectional = dim, length, channels, bidirectional
        self.kernel = LongKernel(channels * (1 + bidirectional), dim, length, skips=channels, **kernel)
        self.dropout = nn.Dropout(dropout)
        self.out_proj = nn.Linear(channels * dim, 2 * dim)
        if learned_dft is not None:
            self.dft_u, self.dft_k = ButterflyDFT(**learned_dft), ButterflyDFT(**learned_dft)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """`mask` (batch, tokens) bool, False on padding, which is taken as zeros."""
        tokens = x.shape[1]
        check_tokens(tokens, self.length)
        u = (x if mask is None else x * mask[..., None]).transpose(1, 2)
        kernels = self.kernel(tokens).split(self.channels)
        back = kernels[1] if self.bidirectional else None
        if hasattr(self, "dft_u"):
            n = 1 << (2 * tokens - 1).bit_length()
            spectrum = self.dft_u(u, n)[:, None] * self.dft_k(around(kernels[0], back, n), n)
            y = torch.fft.ifft(spectrum).real[..., :tokens].to(u.dtype) + u[:, None] * self.kernel.D[..., None]
        else:
            y = fft_conv(u, kernels[0], self.kernel.D, k_back=back)
        return self.mixed(y)

    def mixed(self, y: Tensor) -> Tensor:
        """What follows the convolution: (batch, channels, dim, tokens) to (batch, tokens, dim)."""
        y = self.dropout(F.gelu(y.flatten(1, 2).transpose(1, 2)))
        return F.glu(self.out_proj(y), -1)


def check_tokens(tokens: int, length: int) -> None:
    """Raises ValueError for more tokens than a kernel has taps."""
    if tokens > length:
        raise ValueError(f"tokens must be at most the kernel's length ({length}), got {tokens}")


class LongConvClassifier(nn.Module):
    """Sequences (batch, length, inputs) to class logits: Linear, `depth` residual blocks, mean over the tokens, Linear.

    A block is x + dropout(layer(x)) with BatchNorm ("batch") or LayerNorm ("layer") before the layer (`prenorm`) or after the sum;
    dropout takes whole channels. `layer` builds the sequence layer, by default `LongConv` with the remaining options.
    """

    def __init__(
        self,
        inputs: int,
        classes: int,
        length: int,
        *,
        dim: int = 128,
        depth: int = 6,
        norm: Literal["batch", "layer"] = "batch",
        prenorm: bool = False,
        dropout: float = 0.0,
        layer: Callable[[], nn.Module] | None = None,
        **options: Any,
    ):
        super().__init__()
        if norm not in ("batch", "layer"):
            raise ValueError(f"norm must be 'batch' or 'layer', got {norm!r}")
        options = {"dropout": dropout, **options}
        make = layer or (lambda: LongConv(dim, length, **options))
        self.prenorm, self.norm = prenorm, norm
        self.encoder, self.head = nn.Linear(inputs, dim), nn.Linear(dim, classes)
        self.layers = nn.ModuleList(make() for _ in range(depth))
        self.norms = nn.ModuleList(nn.BatchNorm1d(dim) if norm == "batch" else nn.LayerNorm(dim) for _ in range(depth))
        self.dropout = nn.Dropout1d(dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = self.encoder(x)
        for layer, norm in zip(self.layers, self.norms, strict=True):
            y = layer(self._normed(norm, x) if self.prenorm else x)
            x = x + self.dropout(y.transpose(1, 2)).transpose(1, 2)
            x = x if self.prenorm else self._normed(norm, x)
        out: Tensor = self.head(x.mean(1))
        return out

    def _normed(self, norm: nn.Module, x: Tensor) -> Tensor:
        out: Tensor = norm(x.transpose(1, 2)).transpose(1, 2) if self.norm == "batch" else norm(x)
        return out


@mixer("long_conv")
class CausalLongConv(Mixer):
    """`LongConv`, causal, as a mixer of language models. `length` is the most tokens a sequence may have, padding included.

    The state is the inputs so far. Options as `LongConv` takes them, but for those that look ahead.
    Raises ValueError beyond `length` tokens.
    """

    def __init__(self, dim: int, *, length: int, layer: int = 0, layers: int = 1, **options: Any):
        super().__init__()
        if refused := {"bidirectional", "learned_dft"} & set(options):
            raise ValueError(f"a causal mixer cannot take {', '.join(sorted(refused))}: it would look ahead")
        self.dim, self.length = dim, length
        self.conv = LongConv(dim, length, **options)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        out: Tensor = self.conv(x, mask)
        return out

    def init_state(self, batch: int, *, device: Any = None, dtype: torch.dtype | None = None) -> State:
        return _no_inputs(self.conv.kernel, ("u",), batch, device, dtype)

    def advance(self, x: Tensor, state: State, mask: Tensor | None = None) -> tuple[Tensor, State]:
        u = (x if mask is None else x * mask[..., None]).transpose(1, 2)
        before = int(state["seen"][0])
        check_tokens(before + x.shape[1], self.length)
        inputs = {"u": appended(state["u"], u, before, self.length)}
        seen = before + x.shape[1]
        y = self.conv.kernel.continued(inputs["u"][..., :seen], x.shape[1])
        return self.conv.mixed(y), {**inputs, "seen": state["seen"] + x.shape[1]}

    def state_bytes(self, tokens: int, batch: int = 1, dtype: torch.dtype | None = None) -> int:
        """The inputs of the tokens seen."""
        return batch * self.dim * tokens * (self.conv.kernel.D.dtype if dtype is None else dtype).itemsize


@mixer("long_conv_h3")
class H3LongConv(Mixer):
    """The H3 block with long convolutions for both of its state spaces: out(q * conv(conv'(k) * v)).

    `length` as in `CausalLongConv`; `kernel` options as `LongKernel` takes them. The state is all k and conv'(k) * v so far.
    """

    def __init__(self, dim: int, *, length: int, layer: int = 0, layers: int = 1, **kernel: Any):
        super().__init__()
        self.dim, self.length = dim, length
        self.qkv_proj = nn.Linear(dim, 3 * dim, bias=False)
        self.out_proj = nn.Linear(dim, dim, bias=False)
        self.shift, self.long = LongKernel(1, dim, length, **kernel), LongKernel(1, dim, length, **kernel)

    def _qkv(self, x: Tensor, mask: Tensor | None) -> tuple[Tensor, ...]:
        x = x if mask is None else x * mask[..., None]
        return self.qkv_proj(x).transpose(1, 2).chunk(3, 1)

    def _out(self, y: Tensor) -> Tensor:
        out: Tensor = self.out_proj(y.transpose(1, 2))
        return out

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        tokens = x.shape[1]
        check_tokens(tokens, self.length)
        q, k, v = self._qkv(x, mask)
        kv = fft_conv(k, self.shift(tokens)[0], self.shift.D[0]) * v
        return self._out(q * fft_conv(kv, self.long(tokens)[0], self.long.D[0]))

    def init_state(self, batch: int, *, device: Any = None, dtype: torch.dtype | None = None) -> State:
        return _no_inputs(self.long, ("k", "kv"), batch, device, dtype)

    def advance(self, x: Tensor, state: State, mask: Tensor | None = None) -> tuple[Tensor, State]:
        before, tokens = int(state["seen"][0]), x.shape[1]
        seen = before + tokens
        check_tokens(seen, self.length)
        q, k, v = self._qkv(x, mask)
        ks = appended(state["k"], k, before, self.length)
        kv = self.shift.continued(ks[..., :seen], tokens)[:, 0] * v
        kvs = appended(state["kv"], kv, before, self.length)
        y = self.long.continued(kvs[..., :seen], tokens)[:, 0]
        return self._out(q * y), {"k": ks, "kv": kvs, "seen": state["seen"] + tokens}

    def state_bytes(self, tokens: int, batch: int = 1, dtype: torch.dtype | None = None) -> int:
        """Both inputs of the tokens seen."""
        return 2 * batch * self.dim * tokens * (self.long.D.dtype if dtype is None else dtype).itemsize


def _no_inputs(like: LongKernel, names: Sequence[str], batch: int, device: Any, dtype: torch.dtype | None) -> State:
    """Empty (batch, dim, 0) buffers, and how many tokens are in them."""
    weight = like.D
    dtype, device = weight.dtype if dtype is None else dtype, weight.device if device is None else device
    state = {name: torch.zeros(batch, weight.shape[1], 0, device=device, dtype=dtype) for name in names}
    return {**state, "seen": torch.zeros(batch, dtype=torch.int64, device=device)}


def appended(buffer: Tensor, new: Tensor, used: int, most: int) -> Tensor:
    """`buffer` (batch, dim, room), of which `used` tokens count, with `new` behind them; room doubles when it ends, up to `most`."""
    if torch.is_grad_enabled():  # the backward pass may need the buffer as it is, for weights even if not for inputs
        return torch.cat([buffer[..., :used], new], -1)
    needed = used + new.shape[-1]
    if needed > buffer.shape[-1]:
        grown = buffer.new_empty(*buffer.shape[:2], min(most, max(needed, 2 * used)))
        grown[..., :used] = buffer[..., :used]
        buffer = grown
    buffer[..., used:needed] = new
    return buffer
