"""Weights in groups of 32 inputs, each group with a scale (and a minimum): the search for the codes, and the rounding of inputs.

The grids are those of llama.cpp's Q4_1 (4 bits, scale and minimum) and Q8_0 (8 bits, scale); the search is our choice.

    >>> weight = torch.randn(4, 64)
    >>> codes, scale, minimum = quantize_groups(weight, 4, 32)
    >>> bool((dequantize_groups(codes, scale, minimum) - weight).abs().max() < 0.5)
    True
"""

from __future__ import annotations

import torch
from torch import Tensor

from assay import checks
from assay.methods.core import kernels

GROUP = 32
# relative squared error below which no better grid is looked for: of bfloat16 values, and of others
ROUNDED, EXACT = 1e-5, 1e-12
HIGHEST = 60000.0  # of a weight: its scale must fit float16
LOWEST = 2.0**-10  # of a row's largest weight: below, its float16 scales lose more than rounding to 8 bits does


def quantize_groups(
    weight: Tensor, bits: int, group: int = GROUP, *, asymmetric: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, scale and minimum of each group of `group` consecutive inputs: weight ~ code * scale + minimum.

    `weight` is (out, in), finite, `in` a multiple of `group`; `bits` 2 to 8. Returns codes uint8 (out, in) in 0..2^bits - 1, and
    scale and minimum float16 (out, in / group). With `asymmetric=False` the minimum is -2^(bits-1) * scale, so that a code stands
    for (code - 2^(bits-1)) * scale.

    Our choice of search: the range of the group cut into 2^bits - 1 steps, and (below 8 bits) ranges narrowed by up to a quarter,
    each refitted by least squares to the codes it gives; the one with the smallest squared error wins. Weights that lie on such a
    grid already (float16 scale and minimum) come back exactly, also when a group does not use all codes; after rounding to
    bfloat16 they come back to within that rounding.

    Raises ValueError for a shape or bit width that does not fit, for weights that are not finite or beyond float16.
    """
    checks.tensor("weight", weight, ndim=2, empty=True)
    bits = checks.whole("bits", bits, low=2, high=8)
    group = checks.whole("group", group, low=1)
    checks.flag("asymmetric", asymmetric)
    if weight.shape[1] % group:
        raise ValueError(f"group must divide the {weight.shape[1]} inputs of the weight, got {group}")
    weight = weight.detach()
    if not bool(torch.isfinite(weight).all()):
        raise ValueError("weight must be finite, got inf or NaN")
    if weight.numel() and not float(weight.abs().max()) <= HIGHEST:
        raise ValueError(f"weight must fit float16 scales (at most 60000), got {float(weight.abs().max()):g}")
    rows, width = weight.shape
    if weight.device.type == "cpu" and group % 16 == 0 and kernels.load("weight_only"):
        found: tuple[Tensor, Tensor, Tensor] = torch.ops.assay.quantize_groups(
            weight.float().contiguous(), bits, group, asymmetric
        )
        return found
    values = weight.float().reshape(-1, group)
    parts = [_quantize(chunk, bits, asymmetric) for chunk in torch.split(values, max(1, 2**21 // group))]
    codes, scale, minimum = (torch.cat(column) for column in zip(*parts, strict=True))
    return codes.view(rows, width), scale.view(rows, -1), minimum.view(rows, -1)


def _quantize(w: Tensor, bits: int, asymmetric: bool) -> tuple[Tensor, Tensor, Tensor]:
    levels, half = 2**bits - 1, 2 ** (bits - 1)
    low, high = w.amin(1, keepdim=True), w.amax(1, keepdim=True)
    if asymmetric:
        first = [((high - low) / levels, low)]
        narrow = [((high - low) * f / levels, low + (high - low) * (1 - f) / 2) for f in (0.95, 0.9, 0.85, 0.8, 0.75)]
    else:
        extreme = torch.where(high > -low, high, low)
        scales = [extreme.abs() / (half - 1), -extreme / half]
        first = [(s, -half * s) for s in scales]
        narrow = [
            (extreme.abs() * f / (half - 1), -half * extreme.abs() * f / (half - 1)) for f in (0.95, 0.9, 0.85, 0.8)
        ]
    best = _fit(w, first, levels, half, asymmetric)
    if bits < 8:
        enough = torch.where((w.bfloat16().float() == w).all(1), ROUNDED, EXACT)
        lossy = (best[3] > enough * w.square().sum(1)).nonzero().squeeze(1)
        if len(lossy):
            rest = w[lossy]
            found = _fit(rest, [(s[lossy], m[lossy]) for s, m in first + narrow], levels, half, asymmetric)
            _take(best, lossy, found)
            # few distinct values: perhaps a grid of which not all codes are used
            few = lossy[(rest.sort(1).values.diff(dim=1) != 0).sum(1) < levels]
            if asymmetric and len(few):
                span, least = high[few] - low[few], low[few]
                grids = [
                    (span / n, least - span / n * first) for n in range(1, levels) for first in range(levels - n + 1)
                ]
                _take(best, few, _fit(w[few], grids, levels, half, asymmetric))
    return best[0], best[1], best[2]


def _take(best: list[Tensor], rows: Tensor, found: list[Tensor]) -> None:
    """Write `found` into rows `rows` of `best` where its error is smaller."""
    better = found[3] < best[3][rows]
    for whole, part in zip(best, found, strict=True):
        whole[rows[better]] = part[better]


def _fit(w: Tensor, candidates: list[tuple[Tensor, Tensor]], levels: int, half: int, asymmetric: bool) -> list[Tensor]:
    """[codes, scale, minimum, squared error] of the best candidate per row, each also tried after a least-squares refit."""
    best: list[Tensor] = []

    def consider(scale: Tensor, minimum: Tensor) -> Tensor:
        nonlocal best
        scale = scale.half().float()
        minimum = minimum.half().float() if asymmetric else -half * scale
        steps = torch.where(scale == 0, torch.zeros_like(w), (w - minimum) / torch.where(scale == 0, 1.0, scale))
        codes = steps.round_().clamp_(0, levels)
        error = (codes * scale + minimum - w).square().sum(1)
        new = [codes.to(torch.uint8), scale.squeeze(1).half(), minimum.squeeze(1).half(), error]
        if not best:
            best = new
        else:
            _take(best, torch.arange(len(w)), new)
        return codes

    for scale, minimum in candidates:
        codes = consider(scale, minimum)
        if asymmetric:
            mean_code, mean = codes.mean(1, keepdim=True), w.mean(1, keepdim=True)
            spread = (codes - mean_code).square().sum(1, keepdim=True)
            slope = ((codes - mean_code) * (w - mean)).sum(1, keepdim=True) / spread.clamp_min(1e-30)
            consider(torch.where(spread > 0, slope, 0.0), torch.where(spread > 0, mean - slope * mean_code, mean))
        else:
            signed = codes - half
            power = signed.square().sum(1, keepdim=True)
            consider(torch.where(power > 0, (signed * w).sum(1, keepdim=True) / power.clamp_min(1e-30), 0.0), minimum)
    return best


def dequantize_groups(codes: Tensor, scale: Tensor, minimum: Tensor) -> Tensor:
    """The float32 weights (out, in) that codes (out, in), scale and minimum (out, in / group) stand for."""
    rows, width = codes.shape
    grouped = codes.view(rows, scale.shape[1], -1).float()
    return (grouped * scale.float()[..., None] + minimum.float()[..., None]).view(rows, width)


def quantize_inputs(x: Tensor) -> Tensor:
    """The inputs (..., in) as the integer kernels round them, int8 with one scale per 32 values, returned as float32."""
    grouped = x.float().reshape(*x.shape[:-1], x.shape[-1] // GROUP, GROUP)
    largest = grouped.abs().amax(-1, keepdim=True)
    inverse = torch.where(largest > 0, 127.0 / torch.where(largest > 0, largest, 1.0), 0.0)
    return ((grouped * inverse).round() * (largest / 127.0)).reshape(x.shape)


def row_gain(weight: Tensor) -> Tensor | None:
    """Powers of two, float32 (out,), that bring every row's largest weight into 0.5 .. 1 where float16 scales would not hold it.

    None where no row needs one, which is the rule: the largest weights are 0 or lie in 2^-10 .. 60000. Dividing by a power of
    two loses nothing.
    """
    if weight.numel() == 0:
        return None
    largest = weight.detach().float().abs().amax(1)
    odd = (largest > 0) & ((largest < LOWEST) | (largest > HIGHEST))
    if not bool(odd.any()):
        return None
    exponent = torch.frexp(largest)[1].clamp(-148, 126).double()
    return torch.where(odd, torch.exp2(exponent), 1.0).float()
