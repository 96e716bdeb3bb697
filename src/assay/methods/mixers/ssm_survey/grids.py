"""What mixes the cells of a grid: convolution, full attention, attention in windows, selective scans. Images and volumes alike.

A grid is (batch, height, width, dim), or (batch, depth, height, width, dim) for `dims` 3. `GRID_MIXERS` holds the classes by name.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from assay import checks
from assay.methods.core.mixers.orders import scan, scan_order, unscan
from assay.methods.core.mixers.protocol import check_positive
from assay.methods.core.mixers.scan import Backend, Discretisation
from assay.methods.core.mixers.ssm import SelectiveSSM

GRID_MIXERS: dict[str, Any] = {}
CONVOLUTIONS: dict[int, Any] = {2: nn.Conv2d, 3: nn.Conv3d}


def grid_mixer(name: str, mlp_ratio: float) -> Callable[[Any], Any]:
    """Class decorator: what mixes a grid, built as `cls(dim, dims=..., layer=index in its stage, **options)`.

    `mlp_ratio` is the relative width of the MLP that a block puts after it by default, 0 for none.
    """

    def register(cls: Any) -> Any:
        cls.mlp_ratio = mlp_ratio
        GRID_MIXERS[name] = cls
        return cls

    return register


def convolution(dims: int, *args: Any, **kwargs: Any) -> nn.Module:
    """torch's convolution of images (`dims` 2) or volumes (3). Raises ValueError for other numbers of dimensions."""
    layer: nn.Module = CONVOLUTIONS[checks.choice("dims", dims, list(CONVOLUTIONS))](*args, **kwargs)
    return layer


def channels_first(layer: nn.Module, x: Tensor) -> Tensor:
    """`layer`, a convolution, on a grid with channels last."""
    y: Tensor = layer(x.movedim(-1, 1))
    return y.movedim(1, -1)


def blocks(x: Tensor, size: Sequence[int]) -> Tensor:
    """A grid cut into blocks of `size` cells: (batch, number of blocks along each axis, cells along each axis, dim)."""
    n = len(size)
    cut = [part for cells, block in zip(x.shape[1:-1], size, strict=True) for part in (cells // block, block)]
    outer, inner = range(1, 2 * n, 2), range(2, 2 * n + 1, 2)
    return x.reshape(len(x), *cut, x.shape[-1]).permute(0, *outer, *inner, 2 * n + 1)


def joined(x: Tensor) -> Tensor:
    """The inverse of `blocks`."""
    n = (x.ndim - 2) // 2
    size = [x.shape[1 + i] * x.shape[1 + n + i] for i in range(n)]
    order = [axis for i in range(n) for axis in (1 + i, 1 + n + i)]
    return x.permute(0, *order, 2 * n + 1).reshape(len(x), *size, x.shape[-1])


@grid_mixer("conv", 0.0)
class ConvMixer(nn.Module):
    """Two convolutions 3 cells wide with a GELU between them: the U-Net's."""

    def __init__(self, dim: int, *, dims: int = 2, layer: int = 0):
        super().__init__()
        check_positive(dim=dim)
        self.conv1, self.conv2 = (convolution(dims, dim, dim, 3, padding=1) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return channels_first(self.conv2, F.gelu(channels_first(self.conv1, x)))


@grid_mixer("attention", 4.0)
class FullAttention(nn.Module):
    """Softmax attention among all cells; heads of about `head_dim` channels, positions from a depthwise convolution.

    >>> FullAttention(32)(torch.randn(2, 4, 4, 32)).shape
    torch.Size([2, 4, 4, 32])
    """

    def __init__(self, dim: int, *, head_dim: int = 32, dims: int = 2, layer: int = 0):
        super().__init__()
        check_positive(dim=dim, head_dim=head_dim)
        self.heads = next(n for n in range(max(1, dim // head_dim), 0, -1) if dim % n == 0)
        self.position = convolution(dims, dim, dim, 3, padding=1, groups=dim)
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        placed = x + channels_first(self.position, x)
        y: Tensor = self.proj(self._attend(placed.flatten(1, -2), None))
        return y.view(x.shape)

    def _attend(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """(batch, tokens, dim); `mask` (batch, 1, tokens, tokens) or None."""
        q, k, v = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)


@grid_mixer("window", 4.0)
class WindowAttention(FullAttention):
    """Attention within windows of `window` cells along each axis, shifted by half a window in every other layer of a stage.

    Cells that the shift brings together from opposite edges do not see each other. A grid that windows do not fill is padded,
    and padding is not seen; a grid smaller than a window is one window.
    """

    def __init__(self, dim: int, *, window: int = 8, head_dim: int = 32, dims: int = 2, layer: int = 0):
        super().__init__(dim, head_dim=head_dim, dims=dims)
        check_positive(window=window)
        self.window, self.shift = window, window // 2 if layer % 2 else 0

    def forward(self, x: Tensor) -> Tensor:
        batch, *size, dim = x.shape
        axes = list(range(1, x.ndim - 1))
        cells = [min(self.window, n) for n in size]
        shift = [self.shift if n > m else 0 for n, m in zip(size, cells, strict=True)]
        beyond = [-n % m for n, m in zip(size, cells, strict=True)]
        padding = [side for extra in reversed(beyond) for side in (0, extra)]
        back = [-s for s in shift]
        placed = F.pad(x + channels_first(self.position, x), [0, 0, *padding]).roll(back, axes)
        windows = blocks(placed, cells)
        mask = None
        if any(shift) or any(beyond):  # -1 for padding, else a number for each side of the seams
            part = torch.zeros(size, dtype=torch.int64, device=x.device)
            for axis, s in enumerate(shift):
                part.narrow(axis, 0, s).add_(2**axis)
            part = F.pad(part, padding, value=-1).roll(back, [axis - 1 for axis in axes])
            labels = blocks(part[None, ..., None], cells).reshape(-1, math.prod(cells))
            same = labels[:, :, None] == labels[:, None, :]  # padding sees padding, so that no row is empty
            mask = same.repeat(batch, 1, 1)[:, None]
        y: Tensor = self.proj(self._attend(windows.reshape(-1, math.prod(cells), dim), mask))
        y = joined(y.view(windows.shape)).roll(shift, axes)
        for axis, n in zip(axes, size, strict=True):
            y = y.narrow(axis, 0, n)
        return y


@grid_mixer("s6", 0.0)
class ScanMixer(nn.Module):
    """Selective scans along the directions of a scan order, summed: the mixer of a visual state space block.

    Project to x and z, depthwise convolution 3 cells wide and SiLU on x, S6 along each direction of `order` (see `orders.ORDERS`;
    `order_options` such as {"window": 4}), sum, layer norm, times SiLU(z), project back. `tied` directions share their S6.
    `order` None is "cross" for images and "volume" for volumes. Raises ValueError for an order of another number of dimensions.
    """

    def __init__(
        self,
        dim: int,
        *,
        order: str | None = None,
        order_options: Mapping[str, int] | None = None,
        states: int = 16,
        expand: int = 2,
        tied: bool = False,
        backend: Backend = "auto",
        discretisation: Discretisation = "euler",
        dims: int = 2,
        layer: int = 0,
    ):
        super().__init__()
        check_positive(dim=dim, expand=expand)
        checks.flag("tied", tied)
        width = expand * dim
        self.in_proj, self.out_proj = nn.Linear(dim, 2 * width, bias=False), nn.Linear(width, dim, bias=False)
        self.conv = convolution(dims, width, width, 3, padding=1, groups=width)
        self.order = {2: "cross", 3: "volume"}[dims] if order is None else order
        self.order_options = dict(order_options or {})
        directions = len(scan_order(self.order, *[2] * dims, **self.order_options))
        options: dict[str, Any] = {"states": states, "dt_rank": -(-dim // 16), "backend": backend}
        self.ssm = nn.ModuleList(
            SelectiveSSM(width, discretisation=discretisation, **options) for _ in range(1 if tied else directions)
        )
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        u, z = self.in_proj(x).chunk(2, -1)
        u = F.silu(channels_first(self.conv, u))
        y = self.scanned(u.flatten(1, -2), *x.shape[1:-1]).view(u.shape)
        out: Tensor = self.out_proj(self.norm(y) * F.silu(z))
        return out

    def scanned(self, u: Tensor, *size: int) -> Tensor:
        """The scans alone: (batch, cells, width) to the sum over the directions, back in row-major order."""
        order = scan_order(self.order, *size, **self.order_options)
        sequences = scan(u, order)
        if len(self.ssm) == 1:
            y = self.ssm[0](sequences.flatten(0, 1))[0].view(sequences.shape)
        else:
            y = torch.stack([ssm(sequences[:, k])[0] for k, ssm in enumerate(self.ssm)], 1)
        return unscan(y, order).sum(1)
