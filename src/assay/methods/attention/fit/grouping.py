"""From sequences and images to groups of tokens, and back."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def group_sequence(x: Tensor, size: int, mask: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """(batch, L, dim) to groups (batch, t, size, dim), zeros after the end, and where tokens are: (batch, t, size) bool, None: all.

    `mask` (batch, L) bool, False where x itself is padding. Raises ValueError for other shapes.

    >>> groups, mask = group_sequence(torch.randn(2, 10, 4), 4)  # the last group is padded
    >>> groups.shape
    torch.Size([2, 3, 4, 4])
    """
    if x.ndim != 3 or size < 1:
        raise ValueError(f"x must be (batch, tokens, dim) and size at least 1, got {tuple(x.shape)} and {size}")
    if mask is not None and mask.shape != x.shape[:2]:
        raise ValueError(f"mask must be {tuple(x.shape[:2])}, got {tuple(mask.shape)}")
    length, tail = x.shape[1], -x.shape[1] % size
    if mask is None and tail:
        mask = x.new_ones(len(x), length, dtype=torch.bool)
    there = None if mask is None else F.pad(mask, (0, tail)).unflatten(1, (-1, size))
    return F.pad(x, (0, 0, 0, tail)).unflatten(1, (-1, size)), there


def ungroup_sequence(x: Tensor, length: int) -> Tensor:
    """Groups (batch, t, n, dim) back to (batch, length, dim). Raises ValueError where there are fewer tokens."""
    if x.ndim != 4 or not 0 <= length <= x.shape[1] * x.shape[2]:
        raise ValueError(f"x must be (batch, t, n, dim) with at least {length} tokens, got {tuple(x.shape)}")
    return x.flatten(1, 2)[:, :length]


def group_image(images: Tensor, patch: int, tile: int) -> tuple[Tensor, Tensor | None]:
    """Images (batch, channels, height, width) to (batch, t, tile^2, channels patch^2), row-major tiles of row-major patches.

    Sides are padded with zeros to whole tiles; the mask (batch, t, tile^2), None where nothing was, is False on patches of padding.
    """
    if images.ndim != 4 or patch < 1 or tile < 1:
        raise ValueError(
            f"images must have 4 axes, patch and tile be at least 1, got {tuple(images.shape)}, {patch} and {tile}"
        )
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
    across, down = -(-width // (patch * tile)), -(-height // (patch * tile))
    if x.ndim != 4 or x.shape[1:3] != (across * down, tile**2) or x.shape[3] % patch**2:
        raise ValueError(
            f"x must be (batch, {across * down}, {tile**2}, a multiple of {patch**2}) for {height} x {width} pixels, "
            f"got {tuple(x.shape)}"
        )
    x = x.unflatten(3, (-1, patch, patch)).unflatten(2, (tile, tile)).unflatten(1, (-1, across))  # b Y X y x c p q
    x = x.permute(0, 5, 1, 3, 6, 2, 4, 7).flatten(5).flatten(2, 4)
    return x[:, :, :height, :width]
