"""Fake quantisers with learnable ranges: uniform (integer) and floating point, per tensor or per channel.

A quantiser is a grid of values and a range that scales it. It rounds to the nearest grid point and lets gradients through
(straight-through estimator), to the input inside the range and to the range itself, so that it serves post-training
quantisation, quantisation-aware training and error analysis alike. Everything is computed in float32: this tells what a format
does to a model, not how fast it runs.

Source: the quantiser of "FP8 Quantization: The Power of the Exponent" (arXiv 2208.09225), section 4, as used by "FP8 versus INT8
for efficient deep learning inference" (arXiv 2303.17951).
"""

from __future__ import annotations

import math
from typing import Any, Literal, Self, cast, get_args

import torch
from torch import Tensor, nn

from assay import checks
from assay.methods.core.quantize.formats import FLOAT8_FORMATS, float_values

Variant = Literal["all-finite", "ocp", "ieee"]
Estimator = Literal["minmax", "percentile", "mse"]
ESTIMATORS: tuple[Estimator, ...] = get_args(Estimator)
OCTAVES = 40  # that the search for a range of least squared error may go down to
LOWEST, HIGHEST = 1e-30, 2.0**60  # of a range and of a grid's top: beyond, float32 does not hold the steps
OCP_FORMATS = {(4, 3): "one NaN code", (5, 2): "ieee", (3, 2): "all-finite", (2, 3): "all-finite", (2, 1): "all-finite"}


class _RoundSTE(torch.autograd.Function):
    """Round half to even; the gradient passes as if nothing had been rounded."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.round()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


def round_ste(x: Tensor) -> Tensor:
    """Round half to even with the straight-through gradient: any shape, same shape."""
    return cast(Tensor, _RoundSTE.apply(x))


class Quantizer(nn.Module):
    """What both quantisers share: the range, how it is found, and where it is kept.

    The range is `high` (and `low` if zero need not be in the middle): a scalar, or one value per index of `axis`, shaped to
    broadcast. Before `calibrate` or `set_range` there is none and the quantiser refuses to run.
    """

    low: Tensor | None
    high: Tensor | None

    def __init__(self, axis: int | None):
        super().__init__()
        self.axis = axis
        self.register_buffer("low", None)
        self.register_buffer("high", None)

    @property
    def two_sided(self) -> bool:
        """Whether the range has a lower end of its own."""
        return False

    def quantize(self, x: Tensor, high: Tensor, low: Tensor | None = None) -> Tensor:
        """Round x (float32) to the grid of this range."""
        raise NotImplementedError

    def grid(self) -> Tensor:
        """The distinct values in ascending order: (values,) or, per channel, (channels, values)."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """The nearest grid points, in the shape and dtype of x; values beyond the range become its end.

        Raises ValueError before a range is set.
        """
        return self.quantize(x.float(), *self._range()).to(x.dtype)

    def set_range(self, high: Tensor | float, low: Tensor | float | None = None) -> Self:
        """Set the range: `high` is the largest value, positive; `low` < `high` only for quantisers with two ends. Returns self."""
        ends = [torch.as_tensor(end, dtype=torch.float32).detach().clone() for end in (high, low) if end is not None]
        if self.two_sided != (len(ends) == 2):
            raise ValueError(f"low must {'be given' if self.two_sided else 'not be given'} for {self}")
        if not all(bool(end.isfinite().all()) for end in ends):
            raise ValueError("the range must be finite")
        if not bool((ends[0] > (ends[1] if self.two_sided else 0)).all()):
            raise ValueError(f"high must be above {'low' if self.two_sided else '0'}, got {high}")
        for name, end in zip(("high", "low"), ends, strict=False):
            if name in self._parameters:
                getattr(self, name).data = end
            else:
                self._buffers[name] = end
        return self

    def calibrate(
        self,
        x: Tensor,
        estimator: Estimator = "minmax",
        *,
        percentile: float = 99.99,
        octaves: int = 4,
        steps: int = 32,
    ) -> Quantizer:
        """Find the range from sample values, whose channels are along `axis`. Returns self.

        "minmax": the largest magnitude (or both ends). "percentile": the given percentile of the magnitudes (or of both tails).
        "mse": of `steps` ranges an octave over `octaves` octaves below the largest magnitude, the one of least squared error; the
        error of a floating-point grid is nearly periodic in the logarithm of its range, so that a coarse search misses its minimum.
        Where the best lies in the last octave, as with outliers far out, the search goes on downwards until it does not.
        The range of least squared error is not always that of best accuracy. A channel of zeros gets the range 1.

        Raises TypeError or ValueError for an unknown estimator, an empty sample, or one that is not finite.

        >>> quantizer = UniformQuantizer(8).calibrate(torch.tensor([-0.5, 0.25, 1.27]))
        >>> quantizer(torch.tensor([0.123, 9.0]))
        tensor([0.1200, 1.2700])
        """
        checks.choice("estimator", estimator, ESTIMATORS)
        percentile = checks.number("percentile", percentile, above=50, high=100)
        octaves, steps = checks.whole("octaves", octaves, low=1, high=OCTAVES), checks.whole("steps", steps, low=1)
        checks.tensor("x", x, finite=True)
        with torch.no_grad():
            x = x.detach().float()
            rows = x.reshape(1, -1) if self.axis is None else x.movedim(self.axis, 0).flatten(1)
            share = percentile / 100 if estimator == "percentile" else 1.0
            if self.two_sided:  # zero stays representable: a padded or rectified zero must be exact
                high = _quantile(rows, share).clamp_min(0)
                low = -_quantile(-rows, share).clamp_min(0)
                high = torch.where(high > low, high, low + 1)
            else:
                high = _quantile(rows.abs(), share)
                high, low = torch.where(high > 0, high, torch.ones_like(high)), None
            if estimator == "mse":
                high, low = self._least_squares(rows, high, low, octaves, steps)
            if self.axis is not None:
                shape = [1] * x.dim()
                shape[self.axis] = -1
                return self.set_range(high.reshape(shape), None if low is None else low.reshape(shape))
            return self.set_range(high.reshape(()), None if low is None else low.reshape(()))

    def learn_range(self) -> Self:
        """Make the range a parameter, for quantisation-aware training. Raises ValueError before a range is set."""
        high, low = self._range()
        for name, value in (("high", high), ("low", low)):
            if value is not None and name in self._buffers:
                del self._buffers[name]
                self.register_parameter(name, nn.Parameter(value))
        return self

    def _least_squares(
        self, rows: Tensor, high: Tensor, low: Tensor | None, octaves: int, steps: int
    ) -> tuple[Tensor, Tensor | None]:
        best, factor = torch.full_like(high, math.inf), torch.ones_like(high)
        for i in range(OCTAVES * steps):
            if i >= octaves * steps and not bool((factor < 2.0 ** (1 - i / steps)).any()):
                break
            f = 2.0 ** (-i / steps)
            error = (
                (self.quantize(rows, high * f, None if low is None else low * f) - rows).square().mean(1, keepdim=True)
            )
            factor = torch.where(error < best, f, factor)
            best = torch.minimum(best, error)
        return high * factor, None if low is None else low * factor

    def _range(self) -> tuple[Tensor, Tensor | None]:
        if self.high is None:
            raise ValueError("the quantiser has no range yet: call calibrate(sample) or set_range(high)")
        return self.high, self.low

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for name in ("low", "high"):  # a fresh quantiser takes the shape of the saved range
            if prefix + name in state_dict and getattr(self, name) is None:
                self._buffers[name] = torch.empty_like(state_dict[prefix + name])
        super()._load_from_state_dict(state_dict, prefix, *args)


class UniformQuantizer(Quantizer):
    """Evenly spaced values: integers times a step.

    Symmetric: codes -(2^(bits-1) - 1) .. 2^(bits-1) - 1 and step high / (2^(bits-1) - 1), so 255 values for 8 bits. Asymmetric:
    2^bits codes over [low, high], shifted so that zero is one of them. `signed=False` (symmetric only): codes 0 .. 2^bits - 1.

    Raises ValueError for bits outside 2..16.
    """

    def __init__(self, bits: int = 8, *, symmetric: bool = True, signed: bool = True, axis: int | None = None):
        super().__init__(axis)
        bits = checks.whole("bits", bits, low=2, high=16)
        checks.flag("symmetric", symmetric)
        checks.flag("signed", signed)
        if not symmetric and not signed:
            raise ValueError("signed=False is for symmetric=True; an asymmetric range tells its own sign")
        self.bits, self.symmetric, self.signed = bits, symmetric, signed

    @property
    def two_sided(self) -> bool:
        return not self.symmetric

    @property
    def codes(self) -> int:
        """The largest code of a symmetric grid, the number of steps of an asymmetric one."""
        magnitude_bits = self.bits - 1 if self.symmetric and self.signed else self.bits
        return (1 << magnitude_bits) - 1

    def quantize(self, x: Tensor, high: Tensor, low: Tensor | None = None) -> Tensor:
        x, high, low = _wide(x, high, low)
        if low is None:
            step = high / self.codes
            bottom = -high if self.signed else torch.zeros_like(high)
            return step * round_ste(torch.minimum(torch.maximum(x, bottom), high) / step)
        step = (high - low) / self.codes
        zero = round_ste(low / step)
        code = round_ste(x / step) - zero
        code = torch.minimum(code.clamp_min(0), torch.full_like(code, self.codes))
        return step * (code + zero)

    def grid(self) -> Tensor:
        high, low = self._range()
        high = high.detach().reshape(-1, 1)
        first = -self.codes if self.symmetric and self.signed else 0
        steps = torch.arange(first, self.codes + 1, device=high.device)
        if low is None:
            values = high / self.codes * steps
        else:
            step = (high - low.detach().reshape(-1, 1)) / self.codes
            values = step * (steps + (low.detach().reshape(-1, 1) / step).round())
        return values[0] if self.axis is None else values

    def extra_repr(self) -> str:
        return f"bits={self.bits}, symmetric={self.symmetric}, signed={self.signed}, axis={self.axis}"


class FloatQuantizer(Quantizer):
    """Floating point: sign, `exponent` bits, `mantissa` bits, and a real-valued exponent bias that follows from the range.

    Exponent code 0 is subnormal: 2^(1-b) * m / 2^M; code e: 2^(e-b) * (1 + m / 2^M). With p = max(floor(log2|x| + b), 1) the
    quantiser is an integer one whose step depends on the value: s = 2^(p-M-b), Q(x) = s * round(x / s) on clip(x, -high, high). A
    real-valued bias is a full-precision scale; hardware formats fix b and store that scale with the tensor, which gives the same grid.

    `variant` says which codes are numbers, and thereby how far up the grid goes:
    - "all-finite" (the paper): all of them; b = 2^E - log2(high) + log2(2 - 2^-M) - 1. E4M3 at b = 8 ends at 240.
    - "ocp": as the OCP 8-bit specification, so E4M3 gives one code to NaN (torch.float8_e4m3fn at high = 448), E5M2 is
      IEEE-like (torch.float8_e5m2 at high = 57344); E3M2, E2M3, E2M1 are all finite.
    - "ieee": the highest exponent code is kept for infinity and NaN.
    The variants are different grids even at the same range: do not mix them. E = 0 is the uniform grid with 2^(M+1) - 1 values.
    `signed=False` means values from 0 up; the sign bit is then free for the mantissa, which the caller counts.

    Raises ValueError for exponent outside 0..7, mantissa outside 0..10, or a variant that does not define the format.
    """

    def __init__(
        self,
        exponent: int,
        mantissa: int,
        *,
        variant: Variant = "all-finite",
        signed: bool = True,
        axis: int | None = None,
    ):
        super().__init__(axis)
        exponent, mantissa = checks.whole("exponent", exponent), checks.whole("mantissa", mantissa)
        checks.choice("variant", variant, get_args(Variant))
        checks.flag("signed", signed)
        if not 0 <= exponent <= 7 or not 0 <= mantissa <= 10 or exponent + mantissa < 1:
            raise ValueError(
                f"exponent must lie in 0..7 and mantissa in 0..10, not both 0; got {exponent} and {mantissa}"
            )
        if variant == "ocp" and (exponent, mantissa) not in OCP_FORMATS:
            known = ", ".join(f"E{e}M{m}" for e, m in OCP_FORMATS)
            raise ValueError(f"variant 'ocp' defines {known}, not E{exponent}M{mantissa}")
        if variant == "ieee" and exponent < 2:
            raise ValueError(f"variant 'ieee' needs at least 2 exponent bits, got {exponent}")
        self.exponent, self.mantissa, self.variant, self.signed = exponent, mantissa, variant, signed

    @property
    def top(self) -> tuple[int, float]:
        """(p, f): the largest value is 2^(p - b) * f."""
        largest, fraction = 2**self.exponent - 1, 2 - 2.0**-self.mantissa
        special = OCP_FORMATS[self.exponent, self.mantissa] if self.variant == "ocp" else self.variant
        if self.exponent == 0:  # subnormal codes only
            return 1, 1 - 2.0**-self.mantissa
        if special == "ieee":
            return largest - 1, fraction
        if special == "one NaN code":
            return largest, 2 - 2 * 2.0**-self.mantissa
        return largest, fraction

    @property
    def bias(self) -> Tensor:
        """The exponent bias b that puts the largest value at `high`, float64."""
        p, fraction = self.top
        return p + torch.log2(fraction / self._range()[0].detach().double())

    def quantize(self, x: Tensor, high: Tensor, low: Tensor | None = None) -> Tensor:
        p, fraction = self.top
        return _float_quantize(x, high, self.signed, 2.0**p * fraction, self.mantissa)

    def grid(self) -> Tensor:
        p_top, fraction = self.top
        values = float_values(self.exponent, self.mantissa)
        values = values[values <= 2.0**p_top * fraction]
        if self.signed:
            values = torch.cat([-values.flip(0)[:-1], values])
        top, high = 2.0**p_top * fraction, self._range()[0].detach()
        wide = _wide(high, high, None, top)[1]  # as `quantize` computes, to the bit
        values = (values.to(wide) * (wide.reshape(-1, 1) / top)).float()
        return values[0] if self.axis is None else values

    def extra_repr(self) -> str:
        format_ = f"E{self.exponent}M{self.mantissa}"
        return f"{format_}, variant={self.variant!r}, signed={self.signed}, axis={self.axis}"


class LearnedFloatQuantizer(Quantizer):
    """An 8-bit float whose split between exponent and mantissa is learned together with its range.

    M = clip(round(mantissa), 1, 7) with straight-through rounding and E = 7 - M; all codes are numbers. Both parameters get
    gradients from the task's loss (arXiv 2208.09225, section 4). `mantissa` is the starting point.

    The gradient for M counts that one more bit halves the steps of normal values, and that the exponent bit it takes away makes the
    subnormal steps coarser. Letting it through the bias for all values alike always drives M down; our choice.
    """

    mantissa: nn.Parameter

    def __init__(self, mantissa: float = 4.0, *, axis: int | None = None):
        super().__init__(axis)
        mantissa = checks.number("mantissa", mantissa, low=1, high=7)
        self.mantissa = nn.Parameter(torch.tensor(float(mantissa)))

    def settled(self) -> FloatQuantizer:
        """The fixed format it has arrived at, with the same range."""
        m = int(self.mantissa.detach().clamp(1, 7).round())
        fixed = FloatQuantizer(7 - m, m, axis=self.axis)
        return fixed.set_range(self._range()[0])

    def quantize(self, x: Tensor, high: Tensor, low: Tensor | None = None) -> Tensor:
        m = round_ste(self.mantissa.clamp(1, 7))
        e = 7 - m
        top = torch.where(e > 0.5, torch.exp2(torch.exp2(e) - 1) * (2 - torch.exp2(-m)), 2 * (1 - torch.exp2(-m)))
        normal = torch.exp2(m.detach() - m)  # 1, with the gradient of the step of normal values
        subnormal = normal * top.detach() / top
        return _float_quantize(x, high, True, float(top.detach()), int(m.detach()), (normal, subnormal))

    def grid(self) -> Tensor:
        return self.settled().grid()

    def extra_repr(self) -> str:
        return f"mantissa={float(self.mantissa):.2f}, axis={self.axis}"


def _float_quantize(
    x: Tensor, high: Tensor, signed: bool, top: float, mantissa: int, growth: tuple[Tensor, Tensor] | None = None
) -> Tensor:
    """The grid of bias 0, whose largest value is `top`, scaled to `high`.

    `growth`: factors of the steps of normal and of subnormal values, for their gradient.
    """
    x, high, _ = _wide(x, high, None, top)
    scale = high / top
    bottom = -high if signed else torch.zeros_like(high)
    y = torch.minimum(torch.maximum(x, bottom), high) / scale
    # frexp: y = f * 2^e with 0.5 <= f < 1, exact where a logarithm is not, and 0 for zero, which is subnormal like it
    p = (torch.frexp(y.detach())[1] - 1).clamp_min(1)
    step = _power_of_two(p - mantissa)
    if growth is not None:
        step = step * torch.where(y.detach().abs() < 2, growth[1], growth[0])
    rounded: Tensor = step * round_ste(y / step) * scale
    return rounded


def _wide(x: Tensor, high: Tensor, low: Tensor | None, top: float = 1.0) -> tuple[Tensor, Tensor, Tensor | None]:
    """The same in float64 where steps would fall below what float32 holds: a channel of 1e-37 would come out as NaN."""
    narrow = high.detach() if low is None else torch.minimum(high.detach().abs(), (high - low).detach())
    if high.numel() and top <= HIGHEST and bool((narrow >= LOWEST * max(top, 1.0)).all()):
        return x, high, low
    return x.double(), high.double(), None if low is None else low.double()


def _power_of_two(exponent: Tensor) -> Tensor:
    """2^exponent for int32 exponents in -126..127, exactly."""
    bits: Tensor = (exponent.int() + 127) << 23
    return bits.view(torch.float32)


def _quantile(rows: Tensor, share: float) -> Tensor:
    """The value below which `share` of each row lies: (n, m) -> (n, 1)."""
    if share >= 1:
        return rows.amax(1, keepdim=True)
    return rows.kthvalue(max(1, math.ceil(share * rows.shape[1])), dim=1, keepdim=True).values


def kurtosis(x: Tensor) -> float:
    """Fourth moment over the squared variance: 3 for a Gaussian, 1.8 for a uniform distribution, large where there are outliers."""
    centred = x.detach().double() - x.detach().double().mean()
    return float(centred.pow(4).mean() / centred.square().mean().clamp_min(1e-300).square())


def sqnr(x: Tensor, quantized: Tensor) -> float:
    """Signal to quantisation noise, 10 log10(sum x^2 / sum (x - q)^2), in dB; inf without any error."""
    noise = (x.double() - quantized.double()).square().sum()
    return float(10 * torch.log10(x.double().square().sum() / noise)) if noise > 0 else math.inf


EIGHT_BIT = ("INT8", *FLOAT8_FORMATS)


def make_quantizer(name: str, *, axis: int | None = None, symmetric: bool = True) -> Quantizer:
    """An 8-bit quantiser of the paper by its name: "INT8" or "E2" .. "E5" (all codes finite, 7 - E mantissa bits).

    `symmetric` is about INT8; floating point is always symmetric. Raises ValueError for an unknown name.
    """
    if name == "INT8":
        return UniformQuantizer(8, symmetric=symmetric, axis=axis)
    if name in EIGHT_BIT:
        exponent = int(name[1:])
        return FloatQuantizer(exponent, 7 - exponent, axis=axis)
    raise ValueError(f"name must be one of {', '.join(EIGHT_BIT)}, got {name!r}")
