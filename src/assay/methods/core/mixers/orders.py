"""Scan orders: the sequences in which the cells of an image or a volume are visited, and the way back.

    order = scan_order("cross", 14, 14)  # (4 directions, 196 cells)
    sequences = scan(cells, order)  # (batch, directions, cells, channels)
    merged = unscan(mixed, order).sum(1)  # back in row-major order

`our choice`: sub-grids of the atrous order follow each other in one sequence.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from assay import checks

ORDERS: dict[str, Callable[..., Tensor]] = {}


def _order(name: str) -> Callable[[Callable[..., Tensor]], Callable[..., Tensor]]:
    def register(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        ORDERS[name] = function
        return function

    return register


def scan_order(name: str, *size: int, **options: int) -> Tensor:
    """The directions of a scan order over a grid, int64 (directions, cells): entry i of a row is the cell visited as i-th.

    Cells are numbered in row-major order. `size` is (height, width), for "raster" and "bidirectional" any number of dimensions,
    for "volume" (depth, height, width). Names in `ORDERS`; "window" takes `window` (default 8) and "atrous" `step` (default 2).
    The tensor is shared: do not write to it. Raises ValueError for an unknown name or option, a size that does not fit or is
    below 1; TypeError for sizes that are not whole numbers.

    >>> scan_order("bidirectional", 2, 2).tolist()
    [[0, 1, 2, 3], [3, 2, 1, 0]]
    """
    checks.choice("order", name, ORDERS)
    size = tuple(checks.whole("size", n, low=1) for n in size)
    wanted = {"raster": None, "bidirectional": None, "volume": 3}.get(name, 2)
    if not size or (wanted is not None and len(size) != wanted):
        raise ValueError(f"size of order {name!r} must be {wanted or 'some'} numbers of at least 1, got {size}")
    allowed = {"window": {"window"}, "atrous": {"step"}}.get(name, set())
    if unknown := set(options) - allowed:
        raise ValueError(f"options of order {name!r} must be {sorted(allowed) or 'none'}, got {sorted(unknown)}")
    options = {key: checks.whole(f"{key} of order {name!r}", value, low=1) for key, value in options.items()}
    return _made(name, size, tuple(sorted(options.items())))


@functools.lru_cache(maxsize=256)
def _made(name: str, size: tuple[int, ...], options: tuple[tuple[str, int], ...]) -> Tensor:
    with torch.inference_mode(False), torch.device("cpu"):  # the tensor outlives the modes of its first use
        return ORDERS[name](*size, **dict(options))


def _check_order(order: Tensor) -> None:
    checks.tensor("order", order, shape=("directions", "cells"), dtype=torch.int64)


def inverse(order: Tensor) -> Tensor:
    """Where each cell stands in each direction: inverse[k, order[k, i]] = i."""
    _check_order(order)
    return order.argsort(1)


def scan(x: Tensor, order: Tensor) -> Tensor:
    """(batch, cells, channels) to (batch, directions, cells, channels), each direction in its own order.

    Raises ValueError unless the order, int64 (directions, cells), has as many cells; TypeError for other types.
    """
    _check_order(order)
    checks.tensor("x", x, shape=("batch", order.shape[1], "channels"), dtype="any", empty=True)
    return x.index_select(1, order.flatten().to(x.device)).unflatten(1, order.shape)


def unscan(y: Tensor, order: Tensor) -> Tensor:
    """The inverse of `scan` in each direction: (batch, directions, cells, channels), all in row-major order again."""
    _check_order(order)
    directions, cells = order.shape
    checks.tensor("y", y, shape=("batch", directions, cells, "channels"), dtype="any", empty=True)
    back = (
        inverse(order) + cells * torch.arange(directions, device=order.device)[:, None]
    )  # whole rows, far faster than gather
    return y.flatten(1, 2).index_select(1, back.flatten().to(y.device)).view(y.shape)


def both_ways(order: Tensor) -> Tensor:
    """Each direction followed by its reverse."""
    return torch.stack([order, order.flip(1)], 1).flatten(0, 1)


def _sorted_by(*keys: Tensor) -> Tensor:
    """The cells sorted by the first key, equal ones by the second, and so on; keys are whole numbers from 0, one a cell."""
    code = torch.zeros_like(keys[0])
    for key in keys:
        code = code * (int(key.max()) + 1) + key
    return code.flatten().argsort(stable=True)


def _grid(*size: int) -> tuple[Tensor, ...]:
    return torch.meshgrid(*(torch.arange(n) for n in size), indexing="ij")


@_order("raster")
def _raster(*size: int) -> Tensor:
    """Row by row."""
    return torch.arange(int(torch.tensor(size).prod()))[None]


@_order("bidirectional")
def _bidirectional(*size: int) -> Tensor:
    """Row by row and back (Vim)."""
    return both_ways(_raster(*size))


@_order("cross")
def _cross(height: int, width: int) -> Tensor:
    """Rows forwards and backwards, columns forwards and backwards (VMamba)."""
    row, column = _grid(height, width)
    return both_ways(torch.stack([_sorted_by(row, column), _sorted_by(column, row)]))


@_order("serpentine")
def _serpentine(height: int, width: int) -> Tensor:
    """Row by row, every other row backwards: all steps go to a neighbour."""
    row, column = _grid(height, width)
    return _sorted_by(row, torch.where(row % 2 == 0, column, width - 1 - column))[None]


@_order("serpentine4")
def _serpentine4(height: int, width: int) -> Tensor:
    """Serpentines along rows and along columns, forwards and backwards (PlainMamba)."""
    row, column = _grid(height, width)
    down = _sorted_by(column, torch.where(column % 2 == 0, row, height - 1 - row))
    return both_ways(torch.stack([_serpentine(height, width)[0], down]))


@_order("window")
def _window(height: int, width: int, window: int = 8) -> Tensor:
    """Row by row within windows, windows row by row (LocalMamba)."""
    row, column = _grid(height, width)
    return _sorted_by(row // window, column // window, row, column)[None]


@_order("atrous")
def _atrous(height: int, width: int, step: int = 2) -> Tensor:
    """Every `step`-th cell of every `step`-th row, then the next such sub-grid (EfficientVMamba)."""
    row, column = _grid(height, width)
    return _sorted_by(row % step, column % step, row, column)[None]


@_order("volume")
def _volume(depth: int, height: int, width: int) -> Tensor:
    """Three directions: the width, the height or the depth runs fastest."""
    d, h, w = _grid(depth, height, width)
    return torch.stack([_sorted_by(d, h, w), _sorted_by(w, d, h), _sorted_by(h, w, d)])
