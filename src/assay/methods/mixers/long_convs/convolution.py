"""The causal convolution by several back ends that agree, FlashButterfly's three passes among them, and what each costs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from assay import checks
from assay.methods.core.mixers.protocol import check_positive, fast_length, wide_dtype
from assay.methods.mixers.long_convs.butterfly import MAX_FACTOR, butterfly_dft, butterfly_idft, factors_of, phases

Backend = Literal["rfft", "complex", "butterfly", "three_pass", "direct"]
Form = Literal["direct", "rfft", "unfused", "fused", "three_pass"]
FUSED_BYTES = 1 << 20  # working set of one block of channels; `our choice`, about half a core's second cache


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
    that fit the cache, where no gradients are kept. The result has the dtype of u; no samples or no length give an empty one.
    Raises ValueError for shapes that do not fit or an unknown backend, TypeError for tensors of whole or complex numbers.

    >>> u, k = torch.tensor([[[1.0, 2.0, 3.0]]]), torch.tensor([[1.0, 0.5]])
    >>> fft_conv(u, k, backend="direct")[0, 0].tolist()
    [1.0, 2.5, 4.0]
    """
    checks.choice("backend", backend, get_args(Backend))
    checks.flag("fuse", fuse)
    for name, value in (("u", u), ("k", k), ("D", D), ("k_back", k_back)):
        if value is not None:
            checks.tensor(name, value, empty=True)
    single = k.ndim == 2
    if single:
        k, k_back = k[None], None if k_back is None else k_back[None]
        D = None if D is None else D[None]
    if u.ndim != 3 or k.ndim != 3 or k.shape[1] != u.shape[1] or not k.numel():
        raise ValueError(
            f"u must be (batch, dim, length) and k ([channels,] dim, taps), got {tuple(u.shape)} and {tuple(k.shape)}"
        )
    if k_back is not None and k_back.shape[:2] != k.shape[:2]:
        raise ValueError(f"k_back must be shaped as k, got {tuple(k_back.shape)} and {tuple(k.shape)}")
    if D is not None and D.shape != k.shape[:2]:
        raise ValueError(f"D must be ([channels,] dim) as k is, got {tuple(D.shape)}")
    if not u.numel():
        return u if single else u[:, None].expand(-1, len(k), -1, -1)
    y = _convolve(u, k, k_back, backend, fuse)
    if D is not None:
        y = y + u[:, None] * D[..., None]
    return y[:, 0] if single else y


def _convolve(u: Tensor, k: Tensor, k_back: Tensor | None, backend: Backend, fuse: bool) -> Tensor:
    batch, dim, length = u.shape
    wide = wide_dtype(torch.promote_types(u.dtype, k.dtype))
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
    Raises ValueError for an odd outer, TypeError for tensors of whole or complex numbers.
    """
    for name, value in (("u", u), ("k", k), ("k_back", k_back)):
        if value is not None:
            checks.tensor(name, value, ndim=3, empty=True)
    if checks.whole("outer", outer, low=2) % 2:
        raise ValueError(f"outer must be even and at least 2, got {outer}")
    length = u.shape[-1]
    m = fast_length(-(-2 * length // outer))
    n, rows, half = outer * m, -(-length // m), outer // 2 + 1
    kind = torch.complex128 if u.dtype == torch.float64 else torch.complex64
    twiddle = phases(half, m, n, kind, u.device)
    to_rows = phases(half, outer, outer, kind, u.device)

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
    twice the length is written and read. Raises ValueError for another form or a length that is not a power of two.
    """
    checks.choice("form", form, get_args(Form))
    check_positive(length=length, sequences=sequences, element_bytes=element_bytes)
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
