"""GPTQ (arXiv 2210.17323): weights rounded one input after the other, each error made good by those not yet rounded.

    rounded = gptq(model, batches, format="int4")     in place: weights on the grid; codes and scales by layer
    rounded = gptq_weight(weight, moment, grid)       one matrix

Rounding to nearest minimises the error of each weight; GPTQ (approximately) that of the layer's outputs, |X (W - Q)^T|^2, and for that
needs the second moment of the inputs. With M the moment, damped, and U the upper Cholesky factor of its inverse, column j is rounded,
and its error over U_jj times U_j,> is taken from the columns behind.

Whoever packs takes `Rounded.parts` (`WeightOnlyLinear.from_packed`, say). Of int4 the weights do as well: `weight_only` finds values
that are on its grid; of int8 it does so only where a group uses its largest code.
When NOT to use it: with calibration data unlike the model's work, or hardly any (fewer tokens than inputs): it then fits noise.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from assay import checks
from assay.methods.core.layers.inputs import input_moments
from assay.methods.core.layers.surgery import find, linear_kinds, output_layer, tied_names
from assay.methods.core.quantize.grids import Grid, Rounded, grid_of, scaled_rows

BLOCK = 128  # columns between two updates of all that follow


def gptq_weight(
    weight: Tensor, moment: Tensor, grid: Grid, *, damping: float = 0.01, act_order: bool = False
) -> Rounded:
    """The weight (out, in) on `grid`, by GPTQ; `moment` (in, in) is the second moment of the inputs (`inputs.input_moments`).

    `damping` times the mean of its diagonal is added to that. With `act_order` inputs are rounded from the largest second moment down,
    and the scales of all groups are found beforehand, so that groups keep their places (our choice); otherwise each group's scale is
    found when its turn comes, on the weights as corrected by then. Inputs that never occur are rounded to nearest. In float64.
    Raises ValueError for shapes that do not fit and a moment that is not positive definite with this damping.

    >>> from assay.methods.core.quantize.grids import group_grid, output_error
    >>> x = torch.randn(256, 32) @ torch.randn(32, 32)
    >>> weight, moment, grid = torch.randn(16, 32), x.T @ x / 256, group_grid(3, 32)
    >>> found = output_error(weight, gptq_weight(weight, moment, grid).dense(), moment)
    >>> found < output_error(weight, grid.round(weight).dense(), moment)
    True
    """
    damping = checks.number("damping", damping, low=0)
    checks.flag("act_order", act_order)
    w, gain = scaled_rows(grid, weight)
    w = w.clone()
    rows, width = w.shape
    h = checks.tensor("moment", moment, shape=(width, width), finite=True).detach().to(w)
    h = (h + h.T) / 2
    level = damping * h.diagonal().mean()
    h = h + torch.diag(torch.where(h.diagonal() > 0, 0.0, 1.0) + level)
    order = h.diagonal().argsort(descending=True, stable=True) if act_order else torch.arange(width, device=w.device)
    fixed = act_order or grid.group is None
    size = width if grid.group is None else grid.group
    scale, minimum = grid.fit(w) if fixed else (w.new_zeros(rows, width // size), w.new_zeros(rows, width // size))
    w, h = w[:, order], h[order][:, order]
    factor, failed = torch.linalg.cholesky_ex(h)
    if not int(failed):
        upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(factor), upper=True)
    if int(failed):
        raise ValueError(f"damping must make the moment positive definite, got {damping}")
    codes = torch.zeros(rows, width, dtype=torch.int16, device=w.device)
    step = max(1, BLOCK // size) * size
    for start in range(0, width, step):
        end = min(start + step, width)
        errors = w.new_zeros(rows, end - start)
        for j in range(start, end):
            place = int(order[j])
            group = place // size
            if not fixed and j % size == 0:
                scale[:, group : group + 1], minimum[:, group : group + 1] = grid.fit(w[:, j : j + size])
            column = grid.codes(w[:, j], scale[:, group], minimum[:, group])
            codes[:, place] = column
            error = (w[:, j] - grid.values(column, scale[:, group], minimum[:, group])) / upper[j, j]
            w[:, j:end] -= error[:, None] * upper[j, j:end]
            errors[:, j - start] = error
        w[:, end:] -= errors @ upper[start:end, end:]
    return Rounded(grid, codes, scale, minimum, gain)


@torch.no_grad()
def gptq(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    format: str | Grid = "int4",
    names: Sequence[str] | None = None,
    damping: float = 0.01,
    act_order: bool = False,
    sequential: bool = True,
) -> dict[str, Rounded]:
    """Put the weights of linear layers on the grid of a number format, in place; returns codes and scales by layer.

    `batches` are the model's inputs (tensors, tuples, or mappings of keyword arguments). `format` is a name (`grids.grid_of`) or a grid;
    `names` are `nn.Linear` and Conv1D layers, all that fit but the output layer by default. With `sequential` each block of the
    model sees what the rounded blocks before it give, one pass over the data a block; otherwise all is measured in one pass.
    In a model of half precision the weights are rounded once more, to its dtype: pack `Rounded.parts` then.

    Raises TypeError or ValueError, before anything is changed, for layers that do not fit.
    """
    grid, found = targets(model, format, names)
    damping = checks.number("damping", damping, low=0)
    checks.flag("act_order", act_order)
    kept = list(batches)
    rounded: dict[str, Rounded] = {}
    for stage in stages(model, list(found)) if checks.flag("sequential", sequential) else [list(found)]:
        moments = input_moments(model, stage, kept)
        for name in stage:
            result = gptq_weight(matrix(found[name]), moments[name], grid, damping=damping, act_order=act_order)
            rounded[name] = result
            matrix(found[name]).copy_(result.dense())
    return rounded


def targets(model: nn.Module, format: str | Grid, names: Sequence[str] | None) -> tuple[Grid, dict[str, nn.Module]]:
    """The grid, and the linear layers to be put on it. Raises TypeError or ValueError for one that does not fit."""
    grid = format if isinstance(format, Grid) else grid_of(format)
    known, last = find(model, linear_kinds()), output_layer(model)
    if names is None:
        found = {
            name: layer
            for name, layer in known.items()
            if layer is not last
            and matrix(layer).shape[1] % (grid.group or 1) == 0
            and len(tied_names(model, cast(Tensor, layer._parameters.get("weight")))) == 1
        }
        if not found:
            raise ValueError(f"model must have a linear layer that fits {grid.format or 'the grid'}, got none")
    else:
        if odd := [name for name in names if name not in known]:
            raise ValueError(f"names must be linear layers of the model, got {odd[0]!r}")
        found = {name: known[name] for name in names}
    for name, layer in found.items():
        parameter = layer._parameters.get("weight")
        if parameter is None:
            raise ValueError(f"names must be layers with a plain weight, got {name!r}, which is masked or parametrised")
        if len(tied := tied_names(model, parameter)) > 1:
            raise ValueError(f"names must be layers with a weight of their own, got {name!r}, which shares {tied}")
        grid.check(matrix(layer).shape[1])
        checks.tensor(f"the weight of {name}", parameter, finite=True)
    return grid, found


def matrix(layer: nn.Module) -> Tensor:
    """The weight of a linear layer as (out, in), a view."""
    weight: Tensor = layer.weight  # type: ignore[assignment]
    return weight.T if isinstance(layer, linear_kinds()[1]) else weight


def stages(model: nn.Module, names: Sequence[str]) -> list[list[str]]:
    """The names in their order, those in the same element of an outermost `nn.ModuleList` together."""
    found: dict[str, list[str]] = {}
    for name in names:
        block, parts = "", name.split(".")
        for i in range(1, len(parts)):
            if isinstance(model.get_submodule(".".join(parts[:i])), nn.ModuleList):
                block = ".".join(parts[: i + 1])
                break
        found.setdefault(block or name, []).append(name)
    return list(found.values())
