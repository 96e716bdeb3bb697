"""From sequences and images to groups of tokens, and back."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from assay import checks


def group_sequence(x: Tensor, size: int, mask: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """(batch, L, dim) to groups (batch, t, size, dim), zeros after the end, and where tokens are: (batch, t, size) bool, None: all.

    `mask` (batch, L) bool, False where x itself is padding. Raises ValueError for other shapes, TypeError for other types.

    >>> groups, mask = group_sequence(torch.randn(2, 10, 4), 4)  # the last group is padded
    >>> groups.shape
    torch.Size([2, 3, 4, 4])
    """
    checks.tensor("x", x, shape=("batch", "tokens", "dim"), dtype="any", empty=True)
    size = checks.whole("size", size, low=1)
    if mask is not None:
        checks.tensor("mask", mask, shape=tuple(x.shape[:2]), dtype="bool", device=x.device, empty=True)
    length, tail = x.shape[1], -x.shape[1] % size
    if mask is None and tail:
        mask = x.new_ones(len(x), length, dtype=torch.bool)
    there = None if mask is None else F.pad(mask, (0, tail)).unflatten(1, (-1, size))
    return F.pad(x, (0, 0, 0, tail)).unflatten(1, (-1, size)), there


def ungroup_sequence(x: Tensor, length: int) -> Tensor:
    """Groups (batch, t, n, dim) back to (batch, length, dim). Raises ValueError where there are fewer tokens."""
    checks.tensor("x", x, shape=("batch", "t", "n", "dim"), dtype="any", empty=True)
    length = checks.whole("length", length, low=0, high=x.shape[1] * x.shape[2])
    return x.flatten(1, 2)[:, :length]


def group_image(images: Tensor, patch: int, tile: int) -> tuple[Tensor, Tensor | None]:
    """Images (batch, channels, height, width) to (batch, t, tile^2, channels patch^2), row-major tiles of row-major patches.

    Sides are padded with zeros to whole tiles; the mask (batch, t, tile^2), None where nothing was, is False on patches of padding.
    Raises ValueError for other shapes and sizes below 1, TypeError for other types.
    """
    checks.tensor("images", images, shape=("batch", "channels", "height", "width"), dtype="any", empty=True)
    patch, tile = checks.whole("patch", patch, low=1), checks.whole("tile", tile, low=1)
    side, (height, width) = patch * tile, images.shape[2:]
    down, right = -height % side, -width % side
    x = F.pad(images, (0, right, 0, down))
    x = x.unflatten(3, (-1, tile, patch)).unflatten(2, (-1, tile, patch))  # b c (Y y p) (X x q)
    x = x.permute(0, 2, 5, 3, 6, 1, 4, 7).flatten(5).flatten(3, 4).flatten(1, 2)
    rows, columns = -(-height // patch), -(-width // patch)
    if (rows, columns) == ((height + down) // patch, (width + right) // patch):
        return x, None
    there = torch.zeros(len(images), 1, (height + down) // patch, (width + right) // patch, device=images.device)
    there[:, :, :rows, :columns] = 1
    return x, group_image(there, 1, tile)[0][..., 0].bool()


def ungroup_image(x: Tensor, height: int, width: int, patch: int, tile: int) -> Tensor:
    """Groups as of `group_image` back to images (batch, channels, height, width). Raises ValueError for other groups."""
    checks.tensor("x", x, shape=("batch", "t", "patches", "values"), dtype="any", empty=True)
    height, width = checks.whole("height", height, low=0), checks.whole("width", width, low=0)
    patch, tile = checks.whole("patch", patch, low=1), checks.whole("tile", tile, low=1)
    across, down = -(-width // (patch * tile)), -(-height // (patch * tile))
    if x.shape[1:3] != (across * down, tile**2) or x.shape[3] % patch**2:
        raise ValueError(
            f"x must be (batch, {across * down}, {tile**2}, a multiple of {patch**2}) for {height} x {width} pixels, "
            f"got {tuple(x.shape)}"
        )
    x = x.unflatten(3, (-1, patch, patch)).unflatten(2, (tile, tile)).unflatten(1, (-1, across))  # b Y X y x c p q
    x = x.permute(0, 5, 1, 3, 6, 2, 4, 7).flatten(5).flatten(2, 4)
    return x[:, :, :height, :width]
