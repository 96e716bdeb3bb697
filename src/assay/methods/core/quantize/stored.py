"""Weights as files hold them: codes in rows and words full of codes, turned into the panels that kernels read, and back.

Files that others read (compressed-tensors, GGUF) keep the codes of an output side by side; the kernels read panels of 32 or 64
outputs (`formats`). Both hold the same numbers. Everything here goes by some outputs at a time, so that what is needed beside the
packed weights stays below a few MiB whatever the size of the matrix.

    >>> codes = torch.arange(16, dtype=torch.uint8)[None]
    >>> words = pack_words(codes, 4)
    >>> words.dtype, tuple(words.shape), bool((unpack_words(words, 4, 16) == codes).all())
    (torch.int32, (1, 2), True)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from assay import checks
from assay.methods.core.quantize.formats import PANEL, WIDE_PANEL
from assay.methods.core.quantize.groups import GROUP

AT_ONCE = 1 << 18  # codes that are turned at a time
WIDTHS = (4, 8)


class Groups(NamedTuple):
    """Some rows of a matrix in groups of 32 inputs: codes uint8 (rows, in) from 0 on, scale and minimum float16 (rows, in / 32).

    A weight is code * scale + minimum; where the minimum is None, as with 8 bits, it is (code - 2^(bits - 1)) * scale.
    """

    codes: Tensor
    scale: Tensor
    minimum: Tensor | None


def pack_words(codes: Tensor, bits: int) -> Tensor:
    """Codes uint8 (rows, n) from 0 on as int32 (rows, ceil(n * bits / 32)): the first code in the lowest bits; filled up with zeros.

    `bits` is 4 or 8. This is the order of compressed-tensors' "pack-quantized". Raises TypeError or ValueError for anything else.
    """
    checks.tensor("codes", codes, ndim=2, dtype=torch.uint8, empty=True)
    bits = checks.choice("bits", bits, WIDTHS)
    codes = F.pad(codes, (0, -codes.shape[1] % (32 // bits)))
    if bits == 4:
        codes = codes[:, ::2] | codes[:, 1::2] << 4
    return codes.contiguous().view(torch.int32)


def unpack_words(words: Tensor, bits: int, count: int) -> Tensor:
    """The first `count` codes of each row, uint8 (rows, count), of what `pack_words` gave."""
    if words.dtype != torch.int32 or words.dim() != 2 or words.shape[1] != -(-count * bits // 32):
        raise ValueError(
            f"words must be int32 (rows, {-(-count * bits // 32)}), got {words.dtype} {tuple(words.shape)}"
        )
    codes = words.contiguous().view(torch.uint8)
    if bits == 4:
        codes = torch.stack([codes & 15, codes >> 4], -1).flatten(1)
    return codes[:, :count]


def row_steps(rows: int, features: int, panel: int) -> Iterator[tuple[int, int]]:
    """Ranges of rows, whole panels but the last, of about `AT_ONCE` codes each."""
    step = panel * max(1, AT_ONCE // max(1, panel * features))
    return ((first, min(first + step, rows)) for first in range(0, rows, step))


def wide_panels(read: Callable[[int, int], Tensor], rows: int, features: int) -> tuple[Tensor, Tensor]:
    """The `packed` and `offset` of an `Int8Linear` from codes that `read(first, last)` gives as int8 (last - first, features)."""
    panels, quads = -(-rows // WIDE_PANEL), -(-features // 4)
    packed = torch.empty(panels, quads, WIDE_PANEL, 4, dtype=torch.int8)
    words = packed.view(torch.int32).view(panels, quads, WIDE_PANEL)  # four codes move together
    offset = torch.zeros(panels * WIDE_PANEL, dtype=torch.int32)
    for first, last in row_steps(rows, features, WIDE_PANEL):
        codes = read(first, last)
        offset[first:last] = codes.sum(1, dtype=torch.int32) * -128
        codes = F.pad(codes, (0, -features % 4, 0, -codes.shape[0] % WIDE_PANEL)).contiguous()
        turned = codes.view(torch.int32).view(-1, WIDE_PANEL, quads).transpose(1, 2)
        words[first // WIDE_PANEL : -(-last // WIDE_PANEL)].copy_(turned)
    return packed, offset


def group_panels(read: Callable[[int, int], Groups], rows: int, features: int, bits: int) -> Tensor:
    """The panels ("int4", "int8" of `formats`) of a matrix whose rows `read(first, last)` gives as `Groups`."""
    panels, groups, size = -(-rows // PANEL), features // GROUP, 512 if bits == 4 else 1024
    tails = 2 if bits == 4 else 1
    packed = torch.empty(panels, groups, size + 2 * PANEL * tails, dtype=torch.uint8)
    words = packed.view(torch.int32)
    for first, last in row_steps(rows, features, PANEL):
        codes, scale, minimum = read(first, last)
        if minimum is None:
            minimum = -(2.0 ** (bits - 1)) * scale
        some, fill = slice(first // PANEL, -(-last // PANEL)), (0, 0, 0, (first - last) % PANEL)
        quads = F.pad(codes, fill).contiguous().view(torch.int32).view(-1, 2, 16, groups, 8)  # four codes move together
        if bits == 4:
            body = (quads[:, 0] | quads[:, 1] << 4).permute(0, 2, 3, 1)
            words[some, :, :128].unflatten(2, (8, 16)).copy_(body)
        else:
            words[some, :, :256].unflatten(2, (8, 2, 16)).copy_(quads.permute(0, 3, 4, 1, 2))
        for number, tail in enumerate((scale, minimum)[:tails]):
            place = packed[some, :, size + 2 * PANEL * number : size + 2 * PANEL * (number + 1)]
            turned = F.pad(tail, fill).view(-1, PANEL, groups).transpose(1, 2).contiguous()
            place.copy_(turned.view(torch.uint8))
    return packed.view(panels, -1)


def read_panels(packed: Tensor, rows: int, features: int, bits: int) -> Groups:
    """The codes, scales and minima that `formats.pack_groups` laid into panels: its inverse."""
    panels, groups, size = len(packed), features // GROUP, 512 if bits == 4 else 1024
    blocks = packed.view(panels, groups, -1)
    body = blocks[:, :, :size]
    if bits == 4:
        body = body.view(panels, groups, 8, 1, 16, 4)
        quads = torch.cat([body & 15, body >> 4], 3)
    else:
        quads = body.view(panels, groups, 8, 2, 16, 4)
    codes = quads.permute(0, 3, 4, 1, 2, 5).reshape(panels * PANEL, features)[:rows]
    tails = blocks[:, :, size:].contiguous().view(torch.float16).view(panels, groups, -1, PANEL)
    scale, *rest = (tail.transpose(1, 2).reshape(-1, groups)[:rows].contiguous() for tail in tails.unbind(2))
    return Groups(codes.contiguous(), scale, rest[0] if rest else None)


def zero_points(scale: Tensor, minimum: Tensor, bits: int = 4) -> Tensor | None:
    """The codes that stand for zero, uint8 like `scale`, where minimum = -code * scale to the last bit everywhere; else None."""
    wide, low = scale.double(), minimum.double()
    zero = torch.where(wide == 0, 2.0 ** (bits - 1), (-low / torch.where(wide == 0, 1.0, wide)).round())
    fits = (zero >= 0) & (zero < 2**bits) & (-zero * wide == low)
    return zero.to(torch.uint8) if bool(fits.all()) else None
