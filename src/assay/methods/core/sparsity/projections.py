"""From scores to masks: which weights stay, with exact counts. True stays.

Every projection keeps exactly as many as it says, ties included: among equal scores the first ones stay (in memory order, and in the
order of the layers), so that the same scores give the same mask everywhere. NaN is refused; infinite scores protect (or give
up) a weight.

    >>> global_({"a": torch.tensor([3.0, 1.0]), "b": torch.tensor([2.0, 0.0])}, density=0.5)
    {'a': tensor([ True, False]), 'b': tensor([ True, False])}
    >>> n_m(torch.tensor([[1.0, 4.0, 3.0, 2.0]]), 2, 4)
    tensor([[False,  True,  True, False]])

Kept are what `kept_count` says of a density: all but int((1 - density) * total), computed in decimal. Binary floating point makes
int((1 - 0.9) * 10) 0, not 1; `torch.nn.utils.prune` rounds instead, and can differ by one: give both the whole number.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from fractions import Fraction
from functools import cache
from typing import Literal, get_args

import torch
from torch import Tensor

from assay import checks
from assay.methods.core.sparsity.scores import NORMS, Norm, grouped

Search = Literal["exact", "greedy"]
SEARCHES: tuple[Search, ...] = get_args(Search)
ENUMERATED = 4  # of the size of a transposable block: up to it all patterns are tried
CHUNK = 2**14  # blocks at a time
STEPS = 2.0**40  # to which the scores of a block are rounded in the exact search for larger blocks


def kept_count(total: int, density: float) -> int:
    """How many of `total` stay: total - floor((1 - density) total), density read as the decimal it is written as.

    >>> kept_count(10, 0.9), kept_count(3, 0.5)
    (9, 2)
    """
    total = checks.whole("total", total, low=0)
    share = Fraction(repr(checks.number("density", density, low=0, high=1)))
    return total - int((1 - share) * total)


def global_(
    scores: Mapping[str, Tensor], density: float | None = None, *, keep: int | None = None
) -> dict[str, Tensor]:
    """One threshold over all layers: the `keep` (or `density` of all) largest scores anywhere stay.

    A layer may end up without any weight at small densities: `emptied` tells. Raises ValueError for no layers.
    """
    shapes = check_all(scores)
    dtype = torch.float64 if any(x.dtype == torch.float64 for x in scores.values()) else torch.float32
    device = next(iter(scores.values())).device
    whole = torch.cat([scores[name].detach().to(device, dtype).flatten() for name in shapes])
    mask = top(whole, _keep(len(whole), density, keep))
    parts = mask.split([shape.numel() for shape in shapes.values()])
    return {
        name: part.view(shape).to(scores[name].device)
        for (name, shape), part in zip(shapes.items(), parts, strict=True)
    }


def per_layer(scores: Mapping[str, Tensor], density: float | Mapping[str, float]) -> dict[str, Tensor]:
    """The largest scores of each layer: the same `density` for all, or one a layer (from `allocate`, say)."""
    shapes = check_all(scores)
    if isinstance(density, Mapping) and set(density) != set(shapes):
        odd = sorted(set(density) ^ set(shapes))[0]
        raise ValueError(f"density must have the layers of scores, got them apart by {odd!r}")
    found = {}
    for name, shape in shapes.items():
        share = density[name] if isinstance(density, Mapping) else density
        found[name] = top(scores[name].detach().flatten(), kept_count(shape.numel(), share)).view(shape)
    return found


def per_row(scores: Tensor, density: float | None = None, *, keep: int | None = None) -> Tensor:
    """The largest scores of every output (dimension 0) by itself, as Wanda wants it: the mask, in the shape of `scores`."""
    rows = _scores("scores", scores).flatten(1) if scores.dim() > 1 else _scores("scores", scores)[:, None]
    return top(rows, _keep(rows.shape[1], density, keep)).view(scores.shape)


def structured(
    scores: Tensor,
    density: float | None = None,
    *,
    keep: int | None = None,
    axis: int = 0,
    size: int = 1,
    norm: Norm = "l2",
) -> Tensor:
    """Whole groups of `size` places along `axis`, ranked by the `norm` of their scores: the mask, in the shape of `scores`.

    Filters are axis 0, input channels axis 1, the heads of a projection axis 0 with `size` the head's width. `keep` and `density`
    count groups.
    """
    ranks = grouped(_scores("scores", scores), axis, size, norm)
    return expand(top(ranks, _keep(len(ranks), density, keep)), scores.shape, axis, size)


def expand(groups: Tensor, shape: torch.Size, axis: int = 0, size: int = 1) -> Tensor:
    """A mask of groups (groups,), as a mask of that shape: each group covers `size` places along `axis`.

    >>> expand(torch.tensor([True, False]), torch.Size((4, 1)), size=2).flatten()
    tensor([ True,  True, False, False])
    """
    checks.tensor("groups", groups, ndim=1, dtype="bool")
    if len(groups) * size != shape[axis]:
        raise ValueError(
            f"groups of {size} must fill the {shape[axis]} places of axis {axis}, got {len(groups)} groups"
        )
    view = [1] * len(shape)
    view[axis] = -1
    return groups.repeat_interleave(size).view(view).expand(shape).contiguous()


def blocks(
    scores: Tensor,
    block: tuple[int, int],
    density: float | None = None,
    *,
    keep: int | None = None,
    norm: Norm = "l2",
) -> Tensor:
    """Blocks of (outputs, inputs), all of a block or nothing: the mask, in the shape of `scores`.

    Inputs are everything behind dimension 0, so a block of (4, 1) is the same input of four neighbouring outputs. `keep` and
    `density` count blocks. Raises ValueError where blocks do not tile the weight.
    """
    checks.choice("norm", norm, NORMS)
    matrix = _scores("scores", scores).flatten(1)
    high, wide = (checks.whole(f"block[{i}]", size, low=1) for i, size in enumerate(block))
    rows, columns = matrix.shape
    if rows % high or columns % wide:
        raise ValueError(f"block must tile the weight ({rows}, {columns}), got ({high}, {wide})")
    tiles = matrix.view(rows // high, high, columns // wide, wide).transpose(1, 2).flatten(0, 1)
    ranks = grouped(tiles, 0, 1, norm)
    mask = top(ranks, _keep(len(ranks), density, keep)).view(rows // high, 1, columns // wide, 1)
    return mask.expand(-1, high, -1, wide).reshape(scores.shape)


def n_m(scores: Tensor, n: int, m: int, *, axis: int = 1) -> Tensor:
    """The `n` largest of every `m` consecutive scores along `axis`: the mask, in the shape of `scores`.

    Axis 1 are the inputs, for products with the weight; axis 0 the outputs, for products with its transpose. Of a convolution
    the groups are channels at one place of the kernel. Raises ValueError unless m divides the axis.
    """
    n, m = check_n_m(n, m)
    x = _scores("scores", scores)
    axis = checks.whole("axis", axis, low=-x.dim(), high=x.dim() - 1)
    if x.shape[axis] % m:
        raise ValueError(f"m must divide the {x.shape[axis]} places of axis {axis}, got {m}")
    last = x.movedim(axis, -1)
    return top(last.reshape(-1, m), n).view(last.shape).movedim(-1, axis).contiguous()


def follows(weight: Tensor, n: int, m: int, *, axis: int = 1) -> bool:
    """Whether no group of `m` along `axis` has more than `n` weights other than 0. False where m does not divide the axis."""
    n, m = check_n_m(n, m)
    x = checks.tensor("weight", weight, dtype="any").detach()
    if x.shape[axis] % m:
        return False
    return bool(((x.movedim(axis, -1).reshape(-1, m) != 0).sum(1) <= n).all())


def transposable(scores: Tensor, n: int, m: int, *, search: Search = "exact") -> Tensor:
    """A mask that is N:M along axis 1 and along axis 0 at once: of every m x m block, n a row and n a column (arXiv 2102.08124).

    "exact" keeps the largest sum: by trying all patterns up to m = 4 (90 for 2:4), by a flow of least cost above, with the
    scores of a block rounded to 40 bits of its largest. "greedy" takes scores from the largest down while row and column have
    room: at least half the best sum of scores that are not negative, and at most n a row and a column, perhaps fewer.
    Scores must be finite. Raises ValueError unless m divides both axes.
    """
    n, m = check_n_m(n, m)
    checks.choice("search", search, SEARCHES)
    x = checks.tensor("scores", scores, finite=True).detach()
    if x.dim() < 2 or x.shape[0] % m or x.shape[1] % m:
        raise ValueError(f"m must divide axes 0 and 1 of the scores {tuple(x.shape)}, got {m}")
    planes = x.flatten(2).permute(2, 0, 1) if x.dim() > 2 else x[None]
    count, rows, columns = planes.shape
    tiles = planes.reshape(count, rows // m, m, columns // m, m).transpose(2, 3).reshape(-1, m, m).double()
    solve = _greedy if search == "greedy" else _enumerate if m <= ENUMERATED else _flow
    found = torch.cat([solve(chunk, n) for chunk in tiles.split(CHUNK)])
    flat = found.view(count, rows // m, columns // m, m, m).transpose(2, 3).reshape(count, rows, columns)
    return flat.permute(1, 2, 0).reshape(x.shape).contiguous()


def top(scores: Tensor, keep: int) -> Tensor:
    """True for the `keep` largest of the last dimension, the first of equal ones: bool, the shape of `scores`.

    >>> top(torch.tensor([1.0, 2.0, 2.0, 2.0]), 2)
    tensor([False,  True,  True, False])
    """
    x = _scores("scores", scores)
    length = x.shape[-1]
    keep = checks.whole("keep", keep, low=0, high=length)
    if keep == 0 or keep == length:
        return torch.full(x.shape, keep > 0, dtype=torch.bool, device=x.device)
    least = x.kthvalue(length - keep + 1, dim=-1, keepdim=True).values
    above, equal = x > least, x == least
    room = keep - above.sum(-1, keepdim=True)
    return above | (equal & (equal.cumsum(-1) <= room))


def density(masks: Mapping[str, Tensor]) -> float:
    """The share of all weights that stays.

    >>> density({"a": torch.tensor([True, False]), "b": torch.tensor([False, False])})
    0.25
    """
    check_all(masks, "bool")
    return sum(int(mask.sum()) for mask in masks.values()) / sum(mask.numel() for mask in masks.values())


def emptied(masks: Mapping[str, Tensor]) -> list[str]:
    """The layers of which nothing stays: a model cut in two, whatever its score says."""
    check_all(masks, "bool")
    return [name for name, mask in masks.items() if not bool(mask.any())]


# ---- transposable blocks ---------------------------------------------------------------------------------------------------------


@cache
def _patterns(n: int, m: int) -> Tensor:
    """All m x m masks with n a row and n a column, float64 (patterns, m * m)."""
    rows = [tuple(1.0 if i in chosen else 0.0 for i in range(m)) for chosen in itertools.combinations(range(m), n)]
    grids = [g for g in itertools.product(rows, repeat=m) if all(sum(column) == n for column in zip(*g, strict=True))]
    return torch.tensor(grids, dtype=torch.float64).flatten(1)


def _enumerate(tiles: Tensor, n: int) -> Tensor:
    m = tiles.shape[-1]
    patterns = _patterns(n, m).to(tiles.device)
    best = (tiles.flatten(1) @ patterns.T).argmax(1)  # the first of equal ones
    return patterns[best].view(-1, m, m).bool()


def _greedy(tiles: Tensor, n: int) -> Tensor:
    count, m, _ = tiles.shape
    order = tiles.flatten(1).sort(dim=1, descending=True, stable=True).indices
    batch = torch.arange(count, device=tiles.device)
    mask = torch.zeros(count, m, m, dtype=torch.bool, device=tiles.device)
    for place in order.unbind(1):
        row, column = place // m, place % m
        mask[batch, row, column] = (mask[batch, row].sum(1) < n) & (mask[batch, :, column].sum(1) < n)
    return mask


def _flow(tiles: Tensor, n: int) -> Tensor:
    """The best masks by successive best augmenting paths: rows give n units, columns take n, each cell carries one.

    In whole numbers, so that going back over a cell gives exactly what it cost and no path can run in circles.
    """
    count, m, _ = tiles.shape
    peak = tiles.abs().amax((1, 2), keepdim=True)
    gain = (tiles / torch.where(peak > 0, peak, 1.0) * STEPS).round().long()
    used = torch.zeros(count, m, m, dtype=torch.bool, device=tiles.device)
    batch, never = torch.arange(count, device=tiles.device), -(2**60)
    for _ in range(n * m):
        open_row, open_column = used.sum(2) < n, used.sum(1) < n
        at_row = torch.where(open_row, 0, never)
        at_column = torch.full((count, m), never, device=tiles.device)
        from_row = torch.zeros(count, m, dtype=torch.long, device=tiles.device)  # the row a column is reached from
        from_column = torch.full((count, m), -1, device=tiles.device)  # the column a row is reached from; -1: a start
        for _ in range(m):
            forward = torch.where(used, never, at_row[:, :, None] + gain)  # (count, row, column)
            best, row = forward.max(1)
            better = (best > at_column) & (best > never // 2)
            at_column, from_row = torch.where(better, best, at_column), torch.where(better, row, from_row)
            back = torch.where(used & (at_column > never // 2)[:, None], at_column[:, None] - gain, never)
            best, column = back.max(2)
            better = (best > at_row) & (best > never // 2)
            at_row, from_column = torch.where(better, best, at_row), torch.where(better, column, from_column)
        column = torch.where(open_column, at_column, never).argmax(1)
        going = torch.ones(count, dtype=torch.bool, device=tiles.device)
        for _ in range(m):
            row = from_row[batch, column]
            used[batch, row, column] |= going
            earlier = from_column[batch, row]
            going &= earlier >= 0
            used[batch, row, earlier.clamp(min=0)] &= ~going
            column = torch.where(going, earlier, column)
    return used


# ---- arguments -------------------------------------------------------------------------------------------------------------------


def _scores(name: str, x: Tensor) -> Tensor:
    kept = checks.tensor(name, x).detach()
    if bool(torch.isnan(kept).any()):
        raise ValueError(f"{name} must be numbers, got NaN in it")
    return kept if kept.dtype == torch.float64 else kept.float()


def check_all(tensors: Mapping[str, Tensor], dtype: Literal["floating", "bool"] = "floating") -> dict[str, torch.Size]:
    """The shape of each layer's scores, or masks ("bool"). Raises TypeError or ValueError for what is none, and for no layers."""
    name = "scores" if dtype == "floating" else "masks"
    if not isinstance(tensors, Mapping):
        raise TypeError(f"{name} must be a mapping of names to tensors, got {type(tensors).__name__}")
    if not tensors:
        raise ValueError(f"{name} must hold at least one layer, got none")
    return {layer: checks.tensor(f"{name}[{layer!r}]", x, dtype=dtype).shape for layer, x in tensors.items()}


def _keep(total: int, density: float | None, keep: int | None) -> int:
    if (density is None) == (keep is None):
        raise ValueError("density or keep must be given, and not both")
    if keep is not None:
        return checks.whole("keep", keep, low=0, high=total)
    assert density is not None
    return kept_count(total, density)


def check_n_m(n: int, m: int) -> tuple[int, int]:
    """`n` and `m` as whole numbers. Raises TypeError or ValueError unless 1 <= n <= m."""
    m = checks.whole("m", m, low=1)
    return checks.whole("n", n, low=1, high=m), m
