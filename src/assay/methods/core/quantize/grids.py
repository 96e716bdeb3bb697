"""The values a row of weights may take in a number format, apart from who chooses among them.

`FORMATS[name].pack` rounds every weight to the nearest value by itself. Methods that round better (GPTQ, AWQ) need the steps
between: scales found on one set of numbers, codes for another, a column at a time.

    >>> grid = grid_of("int4")
    >>> weight = torch.randn(8, 64)
    >>> rounded = grid.round(weight)
    >>> bool((rounded.dense() - weight).abs().max() < 0.5), sorted(rounded.parts())
    (True, ['packed'])
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from assay import checks
from assay.methods.core.quantize.formats import FLOAT8_FORMATS, float_values, pack_groups, pack_wide
from assay.methods.core.quantize.groups import GROUP, dequantize_groups, quantize_groups, row_gain

ROUNDABLE = ("int4", "int8", "w8a8", *FLOAT8_FORMATS)


@dataclass(frozen=True)
class Grid:
    """Scales and codes of one number format, or of `group` inputs in `bits` that no format packs.

    `group` inputs share a scale (None: a whole row); `levels` are the magnitudes of an 8-bit float. Made by `grid_of`
    and `group_grid`. All methods take weights (out, in).
    """

    format: str
    bits: int
    group: int | None
    asymmetric: bool = False
    levels: Tensor | None = None

    def check(self, inputs: int) -> None:
        """Raises ValueError unless a row of so many inputs fits."""
        if self.group is not None and inputs % self.group:
            raise ValueError(
                f"weight must have a multiple of {self.group} inputs for {self.format or 'this grid'}, got {inputs}"
            )

    def fit(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and minimum, (out, groups) in float64, that suit these weights, as the format would choose them."""
        self.check(weight.shape[1])
        if self.group is not None:
            _, scale, minimum = quantize_groups(weight.float(), self.bits, self.group, asymmetric=self.asymmetric)
            return scale.double(), minimum.double() if self.asymmetric else -(2 ** (self.bits - 1)) * scale.double()
        peak = weight.detach().abs().amax(1, keepdim=True).float()
        if self.levels is not None:
            return peak.double() / float(self.levels[-1]), torch.zeros_like(peak).double()
        return (peak / 127.0).double(), torch.zeros_like(peak).double()

    def codes(self, weight: Tensor, scale: Tensor, minimum: Tensor) -> Tensor:
        """The nearest code of each weight, int16; scale and minimum broadcast over it. Half-way goes to the even code (floats: down)."""
        empty = (
            scale == 0
        )  # symmetric scales may be negative, as llama.cpp's are: there is one code more below zero than above
        steps = torch.where(empty, 0.0, (weight.double() - minimum) / torch.where(empty, 1.0, scale))
        if self.levels is not None:
            levels = self.levels.to(weight.device)
            size = torch.bucketize(steps.abs(), (levels[1:] + levels[:-1]) / 2)
            return torch.where((steps < 0) & (size > 0), size | 128, size).to(torch.int16)  # one zero is enough
        low, high = (0, 2**self.bits - 1) if self.group is not None else (-127, 127)
        return steps.round().clamp(low, high).to(torch.int16)

    def values(self, codes: Tensor, scale: Tensor, minimum: Tensor) -> Tensor:
        """What codes stand for, in float64."""
        if self.levels is None:
            return codes * scale + minimum
        size = self.levels.to(codes.device)[(codes & 127).long()] * scale
        return torch.where(codes > 127, -size, size)

    def round(self, weight: Tensor) -> Rounded:
        """To nearest: what `FORMATS[format].pack` does, rows of odd sizes included."""
        w, gain = scaled_rows(self, weight)
        scale, minimum = self.fit(w)
        codes = self.codes(w, self.spread(scale, w.shape[1]), self.spread(minimum, w.shape[1]))
        return Rounded(self, codes, scale, minimum, gain)

    def spread(self, x: Tensor, inputs: int) -> Tensor:
        """A value of each group, (out, groups), as one of each input, (out, in)."""
        return x.expand(-1, inputs) if self.group is None else x.repeat_interleave(self.group, 1)


@dataclass(frozen=True)
class Rounded:
    """A weight on a grid: codes (out, in), scale and minimum (out, groups), and powers of two a row where scales needed them."""

    grid: Grid
    codes: Tensor
    scale: Tensor
    minimum: Tensor
    gain: Tensor | None = None

    def dense(self) -> Tensor:
        """The weight (out, in) in float32, to the bit what the format unpacks."""
        if self.grid.group is not None:
            found = dequantize_groups(self.codes, self.scale, self.minimum)
        elif self.grid.levels is None:
            found = self.codes.float() * self.scale.float()
        else:
            found = self.grid.values(self.codes, self.scale, self.minimum).float()
        return found if self.gain is None else found * self.gain[:, None]

    def parts(self) -> dict[str, Tensor]:
        """What `FORMATS[format].pack` gives for these codes, rounding nothing again; rows still to be multiplied by `gain`.

        Raises ValueError for a grid that no format packs.
        """
        name = self.grid.format
        if not name:
            given = f"groups of {self.grid.group} in {self.grid.bits} bits"
            raise ValueError(f"grid must be one of {', '.join(ROUNDABLE)} to be packed, got {given}")
        if name == "w8a8":
            return {"packed": pack_wide(self.codes.to(torch.int8)), "scale": self.scale.float().flatten()}
        if self.grid.levels is not None:
            top = float(self.grid.levels[-1])
            return {"packed": self.codes.to(torch.uint8), "scale": (self.scale * top).float().flatten()}
        codes = self.codes.to(torch.uint8)
        return {"packed": pack_groups(codes, self.scale.half(), self.minimum.half(), self.grid.bits)}


def grid_of(name: str) -> Grid:
    """The grid of a number format: "int4" and "int8" (groups of 32), "w8a8" (a scale a row), "E2" .. "E5" (8-bit floats)."""
    checks.choice("format", name, ROUNDABLE)
    if name in ("int4", "int8"):
        return Grid(name, int(name[3:]), GROUP, asymmetric=name == "int4")
    if name == "w8a8":
        return Grid(name, 8, None)
    exponent = int(name[1:])
    return Grid(name, 8, None, levels=float_values(exponent, 7 - exponent))


def group_grid(bits: int, group: int, *, asymmetric: bool = True) -> Grid:
    """Codes of 2 to 8 bits with a scale (and a minimum) for every `group` inputs, of which `parts` cannot be packed."""
    bits, group = checks.whole("bits", bits, low=2, high=8), checks.whole("group", group, low=1)
    return Grid("", bits, group, asymmetric=checks.flag("asymmetric", asymmetric))


def scaled_rows(grid: Grid, weight: Tensor) -> tuple[Tensor, Tensor | None]:
    """The weight in float64, and the powers of two its rows were divided by where float16 scales would not hold them."""
    w = checks.tensor("weight", weight, ndim=2, finite=True).detach().double()
    grid.check(w.shape[1])
    gain = row_gain(weight) if grid.group is not None else None
    return (w, None) if gain is None else (w / gain[:, None].double(), gain)


def output_error(weight: Tensor, rounded: Tensor, moment: Tensor) -> float:
    """The mean squared error of a layer's outputs, summed over them: tr(D M D^T), D = rounded - weight, M the inputs' second moment."""
    error = rounded.double() - weight.detach().double()
    return max(0.0, float(((error @ moment.to(error)) * error).sum()))
