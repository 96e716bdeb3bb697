"""Attention inside of windows of a map: partition, relative position bias, and what a cyclic shift must not join.

Liu et al., "Swin Transformer" (2021), sections 3.2 and 3.3. Maps are (B, H, W, C), a window has N = M * M positions.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from assay import checks

MASKED = (
    -100.0
)  # added to scores of pairs that the shift has brought together: what the published weights were trained with
CACHED = 64  # masks and index tables that are kept, by size and device
_CACHE: dict[tuple[object, ...], Tensor] = {}


def window_partition(x: Tensor, window: int | tuple[int, int]) -> Tensor:
    """(B, H, W, C) to (B * windows, N, C), windows row by row. Raises ValueError unless the window divides the map."""
    rows, columns = _pair(window)
    batch, height, width, channels = x.shape
    if height % rows or width % columns:
        raise ValueError(f"window must divide the map of {height} x {width}, got {rows} x {columns}")
    parts = x.view(batch, height // rows, rows, width // columns, columns, channels)
    return parts.transpose(2, 3).reshape(-1, rows * columns, channels)


def window_reverse(windows: Tensor, window: int | tuple[int, int], height: int, width: int) -> Tensor:
    """The inverse of `window_partition`: (B * windows, N, C) to (B, height, width, C)."""
    rows, columns = _pair(window)
    parts = windows.view(-1, height // rows, width // columns, rows, columns, windows.shape[-1])
    return parts.transpose(2, 3).reshape(-1, height, width, windows.shape[-1])


def shift_regions(
    height: int, width: int, window: tuple[int, int], shift: tuple[int, int], padding: tuple[int, int] = (0, 0)
) -> Tensor:
    """Which part of the unshifted map each position of a cyclically shifted one (by -shift) belongs to: int64 (height, width).

    Cuts lie at H - M and H - s, of columns too: nine regions where both shifts are above 0. Positions of one window that have
    different regions are no neighbours in the picture. The last rows and columns of the unshifted map that are `padding` are a
    region of their own.
    """
    rows, columns = _cuts(height, window[0], shift[0]), _cuts(width, window[1], shift[1])
    regions = 3 * rows[:, None] + columns[None]
    real = torch.zeros(height, width, dtype=torch.bool)
    real[: height - padding[0], : width - padding[1]] = True
    return torch.where(real.roll((-shift[0], -shift[1]), (0, 1)), regions, 9)


def _cuts(size: int, window: int, shift: int) -> Tensor:
    place = torch.arange(size)
    return (place >= size - window).long() + (place >= size - shift).long() if shift else torch.zeros_like(place)


def shift_mask(
    height: int, width: int, window: tuple[int, int], shift: tuple[int, int], padding: tuple[int, int] = (0, 0)
) -> Tensor:
    """What is added to the scores of each window of the shifted map, by `shift_regions`: float32 (windows, N, N), 0 or -100."""
    regions = window_partition(shift_regions(height, width, window, shift, padding)[None, :, :, None], window)[..., 0]
    return (regions[:, :, None] != regions[:, None, :]).float() * MASKED


def relative_position_index(rows: int, columns: int, window: int | None = None) -> Tensor:
    """Rows of the bias table for each pair of positions of a window of `rows` x `columns`: int64 (N, N).

    (dy + M - 1) * (2M - 1) + (dx + M - 1), d = query - key, in the table of a window of M = `window` a side, which may be larger.
    """
    down, across = (window, window) if window else (rows, columns)
    y, x = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    y, x = y.flatten(), x.flatten()
    return (y[:, None] - y[None] + down - 1) * (2 * across - 1) + (x[:, None] - x[None] + across - 1)


def cached(make: Callable[..., Tensor], *sizes: object, like: Tensor) -> Tensor:
    """`make(*sizes)` on the device of `like`, made once for these sizes: do not write to it.

    Nothing is kept while a model is compiled or exported, on the meta device or with stand-ins for tensors: what is made then is
    of no use outside. Nor is it an inference tensor, which training could not save.
    """
    if torch.compiler.is_compiling() or like.is_meta or type(like) not in (Tensor, nn.Parameter):
        return make(*sizes).to(like.device)
    key = (make, *sizes, like.device)
    if (kept := _CACHE.get(key)) is not None:
        return kept
    with torch.inference_mode(False), torch.device("cpu"):
        made = make(*sizes).to(like.device)
    if type(made) is Tensor:
        if len(_CACHE) >= CACHED:
            _CACHE.pop(next(iter(list(_CACHE))), None)  # another thread may have been quicker
        _CACHE[key] = made
    return made


def resized_bias_table(table: Tensor, old: int, new: int) -> Tensor:
    """A bias table ((2 old - 1)^2, heads) for windows of `new` positions a side, by bicubic interpolation of each head's grid."""
    heads = table.shape[1]
    grid = table.T.reshape(1, heads, 2 * old - 1, 2 * old - 1).float()
    grid = F.interpolate(grid, size=(2 * new - 1, 2 * new - 1), mode="bicubic", align_corners=False)
    return grid.reshape(heads, -1).T.contiguous().to(table.dtype)


class WindowAttention(nn.Module):
    """softmax(q k^T / sqrt(d) + B + mask) v in every window by itself, with a learned relative position bias B of each head.

    `forward(windows, mask, size)`: windows (B * count, N, C), mask (count, N, N) added to the scores, or None; `size` (rows, columns)
    of windows smaller than M x M, which take the middle of the bias table. Parameters: `qkv` (C to 3C), `proj`,
    `relative_position_bias_table` ((2M - 1)^2, heads). Work: 4 N C^2 + 2 N^2 C multiply-accumulates a window.
    """

    def __init__(self, width: int, window: int, heads: int, *, qkv_bias: bool = True) -> None:
        super().__init__()
        checks.whole("window", window, low=1)
        checks.whole("heads", heads, low=1)
        if width % heads:
            raise ValueError(f"width must be divisible by heads={heads}, got {width}")
        self.heads, self.window = heads, window
        self.qkv = nn.Linear(width, 3 * width, bias=qkv_bias)
        self.proj = nn.Linear(width, width)
        self.relative_position_bias_table = nn.Parameter(torch.empty((2 * window - 1) ** 2, heads))
        nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)

    def bias(self, size: tuple[int, int] | None = None) -> Tensor:
        """B: (heads, N, N)."""
        table = self.relative_position_bias_table
        rows, columns = size or (self.window, self.window)
        index = cached(relative_position_index, rows, columns, self.window, like=table)
        return table[index].permute(2, 0, 1)

    def forward(self, windows: Tensor, mask: Tensor | None = None, size: tuple[int, int] | None = None) -> Tensor:
        count, positions, width = windows.shape
        q, k, v = self.qkv(windows).view(count, positions, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        added = self.bias(size).to(q.dtype)
        if mask is None:
            added = added.expand(count, -1, -1, -1)
        else:  # (windows of a picture, heads, N, N), for every picture
            added = (added + mask.to(q)[:, None]).repeat(count // len(mask), 1, 1, 1)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=added)
        out: Tensor = self.proj(mixed.transpose(1, 2).reshape(count, positions, width))
        return out

    def extra_repr(self) -> str:
        return f"window={self.window}, heads={self.heads}"


class ShiftedWindowAttention(WindowAttention):
    """Window attention over a map, (B, H, W, C) to the same shape, its windows moved by `shift` to the bottom right (0: not moved).

    The map is rolled by -shift, cut into windows, and rolled back: as many windows as without a shift. Positions that only the roll
    has made neighbours do not see each other. Along a side no longer than M there is one window, of that size, and no shift. A
    longer side is padded at its end, after the norm, with zeros to a multiple of M. The padding is attended to like anything else,
    as in the published code for detection, unless `mask_padding`. Raises ValueError for a shift that is not below M.
    """

    def __init__(
        self, width: int, window: int, heads: int, *, shift: int = 0, qkv_bias: bool = True, mask_padding: bool = False
    ) -> None:
        super().__init__(width, window, heads, qkv_bias=qkv_bias)
        self.shift = checks.whole("shift", shift, low=0, high=window - 1)
        self.mask_padding = checks.flag("mask_padding", mask_padding)

    def along(self, side: int) -> tuple[int, int, int]:
        """Window, shift and padding along a side of the map of that length."""
        return (side, 0, 0) if side <= self.window else (self.window, self.shift, -side % self.window)

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]  # a map, where the parent has windows
        height, width = x.shape[1:3]
        (rows, down, below), (columns, right, beside) = self.along(height), self.along(width)
        window, shift, padding = (rows, columns), (down, right), (below, beside)
        padded = (height + below, width + beside)
        if any(padding):
            x = F.pad(x, (0, 0, 0, beside, 0, below))
        if any(shift):
            x = x.roll((-down, -right), (1, 2))
        mask = None
        if any(shift) or (self.mask_padding and any(padding)):
            mask = cached(shift_mask, *padded, window, shift, padding if self.mask_padding else (0, 0), like=x)
        x = window_reverse(super().forward(window_partition(x, window), mask, window), window, *padded)
        if any(shift):
            x = x.roll((down, right), (1, 2))
        return x[:, :height, :width]

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, shift={self.shift}"


def _pair(value: int | tuple[int, int]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else value
