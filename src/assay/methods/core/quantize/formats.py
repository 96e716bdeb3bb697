"""The number formats weights are kept in: one registry, from which layers take packing and the C++ its numbers.

    >>> import torch
    >>> weight = torch.randn(64, 32)
    >>> parts = FORMATS["int8"].pack(weight)
    >>> bool((FORMATS["int8"].unpack(parts, 64, 32) - weight).abs().max() < 0.03)
    True
    >>> FORMATS["int4"].bytes(64, 32) * 8 / weight.numel()  # bits a weight, scales included
    5.0

A format says how a matrix (out, in) lies in memory (`pack`, `unpack`), what that takes (`bytes`) and as which number the kernels
know it (`id`). Which values suit a given weight is the business of whoever rounds: `groups.quantize_groups`, `quantizers`, the
papers on ternary weights. So `pack` of a ternary format expects weights on their levels already and gives exactly these back.

Four layouts are in use:
- panels of 32 outputs, each one stream that a core reads once a step, scales inside ("fp32", "bf16", "int8", "int4");
  the kernels are `weight_only` and `decode`, the layout is described in csrc/panels.h;
- panels of 64 outputs, with a separate scale per output ("w8a8"; csrc/w8a8.cpp);
- rows of digits, with a separate scale per row ("ternary", "base3", "binary"; csrc/lowbit.cpp);
- one byte per value with separate scales, for which there is no kernel ("E2" .. "E5", the 8-bit floats of arXiv 2208.09225).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from assay.methods.core.quantize.groups import GROUP, dequantize_groups, quantize_groups, row_gain

PANEL = 32  # outputs that lie side by side in the panels of the decode loop
WIDE_PANEL = 64  # and in those of W8A8
Parts = Mapping[str, Tensor]


@dataclass(frozen=True)
class Format:
    """How weights of one kind lie in memory.

    `pack(weight)` takes a float matrix (out, in) to named tensors, of which "packed" is what the kernel reads; `unpack(parts, out, in)`
    gives the float32 matrix these stand for; `bytes(out, in)` is what they take. `id` is the kernels' number, None where none
    computes on it; `multiple` is what the inputs must be a multiple of.
    """

    name: str
    id: int | None
    multiple: int
    pack: Callable[[Tensor], dict[str, Tensor]]
    unpack: Callable[[Parts, int, int], Tensor]
    bytes: Callable[[int, int], int]

    def check(self, inputs: int) -> None:
        """Raises ValueError unless a row of so many inputs can be packed."""
        if inputs % self.multiple:
            raise ValueError(f"{self.name} weights need a multiple of {self.multiple} inputs, got {inputs}")


def find(name: str, allowed: tuple[str, ...]) -> Format:
    """The format of that name. Raises ValueError unless it is among `allowed`."""
    if name not in allowed:
        raise ValueError(f"kind must be one of {', '.join(allowed)}, got {name!r}")
    return FORMATS[name]


# ---- panels of 32 outputs ----------------------------------------------------------------------------------------------------


def pack_floats(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """float32 (a value at a time) or bfloat16 (pairs of inputs) in panels: uint8 (panels, bytes)."""
    weight = _padded(weight.detach()).to(dtype)
    step = 4 // weight.element_size()
    turned = weight.view(weight.shape[0] // PANEL, PANEL, -1, step).transpose(1, 2).contiguous()
    return turned.view(torch.uint8).view(len(turned), -1)


def pack_groups(codes: Tensor, scale: Tensor, minimum: Tensor, bits: int) -> Tensor:
    """The panels of what `quantize_groups` gave with group 32: asymmetric 4 bits, or symmetric 8 bits."""
    codes, scale, minimum = _padded(codes), _padded(scale), _padded(minimum)
    panels, groups = codes.shape[0] // PANEL, scale.shape[1]
    # (panel, half, output, group, quad, 4) -> (panel, group, quad, half, output, 4)
    quads = codes.view(panels, 2, 16, groups, 8, 4).permute(0, 3, 4, 1, 2, 5)
    if bits == 4:
        body = quads[:, :, :, 0] | (quads[:, :, :, 1] << 4)
        tails = [scale, minimum]
    else:
        body = quads
        tails = [scale]
    columns = [body.reshape(panels, groups, -1)]
    for tail in tails:
        columns.append(tail.view(panels, PANEL, groups).transpose(1, 2).contiguous().view(torch.uint8))
    return torch.cat(columns, 2).view(panels, -1).contiguous()


def _floats(name: str, id_: int, dtype: torch.dtype) -> Format:
    step = 4 // dtype.itemsize

    def unpack(parts: Parts, n: int, k: int) -> Tensor:
        values = parts["packed"].view(dtype).view(-1, k // step, PANEL, step).transpose(1, 2)
        return values.reshape(-1, k)[:n].float().contiguous()

    return Format(
        name,
        id_,
        step,
        lambda weight: {"packed": pack_floats(weight, dtype)},
        unpack,
        lambda n, k: _panels(n, PANEL) * PANEL * k * dtype.itemsize,
    )


def _groups(name: str, id_: int, bits: int) -> Format:
    four = bits == 4

    def pack(weight: Tensor) -> dict[str, Tensor]:
        if row_gain(weight) is not None:
            raise ValueError(
                f"weight has rows that the float16 scales of {name} do not hold: their largest weights must be 0 or lie in 2^-10 .. 60000"
            )
        return {"packed": pack_groups(*quantize_groups(weight, bits, GROUP, asymmetric=four), bits)}

    def unpack(parts: Parts, n: int, k: int) -> Tensor:
        packed, groups = parts["packed"], k // GROUP
        panels, size = len(packed), 512 if four else 1024
        blocks = packed.view(panels, groups, -1)
        body = blocks[:, :, :size]
        if four:
            body = body.view(panels, groups, 8, 1, 16, 4)
            quads = torch.cat([body & 15, body >> 4], 3)
        else:
            quads = body.view(panels, groups, 8, 2, 16, 4)
        codes = quads.permute(0, 3, 4, 1, 2, 5).reshape(panels * PANEL, k)
        tails = blocks[:, :, size:].contiguous().view(torch.float16).view(panels, groups, -1, PANEL)
        scale, *rest = (tail.transpose(1, 2).reshape(-1, groups) for tail in tails.unbind(2))
        minimum = rest[0] if rest else -128 * scale.float()
        return dequantize_groups(codes, scale, minimum)[:n].contiguous()

    block = (512 + 128) if four else (1024 + 64)
    return Format(name, id_, GROUP, pack, unpack, lambda n, k: _panels(n, PANEL) * (k // GROUP) * block)


def _padded(rows: Tensor) -> Tensor:
    return F.pad(rows, (0, 0, 0, -rows.shape[0] % PANEL)).contiguous()


def _panels(outputs: int, size: int) -> int:
    return -(-outputs // size)


# ---- panels of 64 outputs, a scale an output -------------------------------------------------------------------------------------


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Symmetric int8 codes of each row and the rows' scales: float (..., k) -> int8 (..., k), float32 (..., 1)."""
    x = x.float()
    peak = x.abs().amax(-1, keepdim=True)
    inverse = 127.0 / peak
    step = torch.where(inverse.isfinite(), inverse, torch.zeros_like(inverse))  # a row of zeros stays one
    return (x * step).round().to(torch.int8), peak / 127.0


def pack_wide(codes: Tensor) -> Tensor:
    """int8 (n, k) -> int8 (ceil(n / 64), ceil(k / 4), 64, 4), filled up with zeros: the order the W8A8 kernel reads it in."""
    n, k = codes.shape
    padded = F.pad(codes, (0, -k % 4, 0, -n % WIDE_PANEL))
    return padded.view(-1, WIDE_PANEL, -(-k // 4), 4).permute(0, 2, 1, 3).contiguous()


def unpack_wide(packed: Tensor) -> Tensor:
    """The inverse of `pack_wide`, still filled up: int8 (64 * panels, 4 * quads)."""
    panels, quads = packed.shape[:2]
    return packed.permute(0, 2, 1, 3).reshape(panels * WIDE_PANEL, quads * 4)


def _pack_w8a8(weight: Tensor) -> dict[str, Tensor]:
    codes, scale = quantize_rows(weight.detach())
    return {"packed": pack_wide(codes), "scale": scale.flatten()}


def _unpack_w8a8(parts: Parts, n: int, k: int) -> Tensor:
    return unpack_wide(parts["packed"])[:n, :k].float() * parts["scale"][:n, None]


# ---- rows of digits ------------------------------------------------------------------------------------------------------------

PER_BYTE: dict[str, int] = {"ternary": 4, "base3": 5, "binary": 8}


def pack_digits(codes: Tensor, kind: str) -> Tensor:
    """Codes (out, in), -1, 0, 1 (ternary, base3) or -1, 1 (binary), as uint8 (out, ceil(in / weights a byte)).

    Raises ValueError for another shape or other values.
    """
    if codes.dim() != 2:
        raise ValueError(f"codes must be a matrix (out, in), got {tuple(codes.shape)}")
    allowed = (codes.abs() == 1) if kind == "binary" else (codes.abs() <= 1) & (codes == codes.round())
    if not bool(allowed.all()):
        raise ValueError(f"codes must be {'-1 or 1' if kind == 'binary' else '-1, 0 or 1'} for kind {kind!r}")
    per = PER_BYTE[kind]
    digits = (codes > 0).to(torch.int16) if kind == "binary" else codes.to(torch.int16) + 1
    n, k = digits.shape
    width = -(-k // per)
    planes = F.pad(digits, (0, per * width - k)).view(n, per, width)
    if kind == "base3":
        number = sum(planes[:, j] * 3 ** (per - 1 - j) for j in range(per))
        packed = (cast(Tensor, number).int() * 256 + 242) // 243
    else:
        shift = 8 // per
        packed = cast(Tensor, sum(planes[:, j] << (shift * j) for j in range(per)))
    return packed.to(torch.uint8).contiguous()


def unpack_digits(packed: Tensor, kind: str, in_features: int) -> Tensor:
    """The codes, int8 (..., in), of what `pack_digits` gave. Also for stacks of rows (..., bytes)."""
    per = PER_BYTE[kind]
    if packed.dtype != torch.uint8 or packed.shape[-1] != -(-in_features // per):
        raise ValueError(
            f"packed must be uint8 (..., {-(-in_features // per)}), got {packed.dtype} {tuple(packed.shape)}"
        )
    planes = []
    rest = packed.to(torch.int16)
    for j in range(per):
        if kind == "base3":
            planes.append((3 * rest >> 8) - 1)
            rest = 3 * rest & 255
        elif kind == "ternary":
            planes.append((rest >> 2 * j & 3) - 1)
        else:
            planes.append(2 * (rest >> j & 1) - 1)
    return torch.cat(planes, -1)[..., :in_features].to(torch.int8)


def _digits(name: str, id_: int) -> Format:
    def pack(weight: Tensor) -> dict[str, Tensor]:
        weight = weight.detach().float()
        scale = weight.abs().amax(1)
        level = torch.where(scale > 0, scale, 1.0)[:, None]
        return {"packed": pack_digits(weight / level, name), "scale": scale}

    def unpack(parts: Parts, n: int, k: int) -> Tensor:
        return unpack_digits(parts["packed"], name, k).float() * parts["scale"][:, None]

    return Format(name, id_, 1, pack, unpack, lambda n, k: n * -(-k // PER_BYTE[name]) + 4 * n)


# ---- 8-bit floats --------------------------------------------------------------------------------------------------------------


def float_values(exponent: int, mantissa: int) -> Tensor:
    """The values >= 0 of a float of so many bits, all codes finite and bias 0, ascending in float64."""
    return torch.cat([_binade(p, mantissa) for p in range(2**exponent)])


def _binade(p: int, mantissa: int) -> Tensor:
    steps = torch.arange(2**mantissa, dtype=torch.float64) / 2**mantissa
    first = 0.0 if p == 0 else 1.0
    scaled: Tensor = (steps + first) * math.ldexp(1.0, max(p, 1))
    return scaled


def _float8(name: str) -> Format:
    exponent = int(name[1:])
    values = float_values(exponent, 7 - exponent)
    middles = (values[1:] + values[:-1]) / 2

    def pack(weight: Tensor) -> dict[str, Tensor]:
        wide = weight.detach().double()
        high = wide.abs().amax(1)
        level = torch.where(high > 0, values[-1] / torch.where(high > 0, high, 1.0), 0.0)[:, None]
        codes = torch.bucketize(wide.abs() * level, middles).to(torch.uint8)
        return {"packed": codes | (wide < 0).to(torch.uint8) << 7, "scale": high.float()}

    def unpack(parts: Parts, n: int, k: int) -> Tensor:
        packed = parts["packed"]
        size = values[(packed & 127).long()] * (parts["scale"].double() / values[-1])[:, None]
        return torch.where(packed > 127, -size, size).float()

    return Format(name, None, 1, pack, unpack, lambda n, k: n * k + 4 * n)


FORMATS: dict[str, Format] = {
    form.name: form
    for form in (
        _floats("fp32", 0, torch.float32),
        _floats("bf16", 1, torch.bfloat16),
        _groups("int8", 2, 8),
        _groups("int4", 3, 4),
        _digits("ternary", 4),
        _digits("base3", 5),
        _digits("binary", 6),
        Format(
            "w8a8",
            7,
            1,
            _pack_w8a8,
            _unpack_w8a8,
            lambda n, k: _panels(n, WIDE_PANEL) * WIDE_PANEL * (-(-k // 4)) * 4 + 4 * n,
        ),
        *(_float8(f"E{exponent}") for exponent in (2, 3, 4, 5)),
    )
}
PANEL_FORMATS = ("fp32", "bf16", "int8", "int4")
DIGIT_FORMATS = ("ternary", "base3", "binary")
FLOAT8_FORMATS = ("E2", "E3", "E4", "E5")


def header() -> str:
    """The text of csrc/formats.h; a test compares it with the file, so that the kernels' numbers come from the registry."""
    lines = [
        f"  k{form.name[0].upper()}{form.name[1:]} = {form.id}," for form in FORMATS.values() if form.id is not None
    ]
    return "\n".join(
        [
            "// The numbers of the formats: core/quantize/formats.py is where they come from, and a test compares the two.",
            "#pragma once",
            "#include <cstdint>",
            "",
            "enum Format : std::int64_t {",
            *lines,
            "};",
            "",
        ]
    )
