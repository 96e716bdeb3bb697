"""`auto_fact`, the conversion of the official package."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import nn

from assay.methods.core.layers.surgery import CONVOLUTIONS, find, linear_kinds, swap, tied_names
from assay.methods.layers.greenformers.solvers import factor
from assay.methods.layers.greenformers.units import (
    CED,
    LED,
    UNITS,
    check_rank,
    matrices_of,
    matrix_shape,
    unit_around,
    weight_of,
)


def auto_fact(
    module: nn.Module,
    rank: float,
    solver: Literal["random", "svd", "nmf", "snmf"] = "random",
    num_iter: int = 10,
    submodules: Sequence[nn.Module] | None = None,
    deepcopy: bool = False,
    fact_led_unit: bool = False,
) -> nn.Module:
    """The conversion as the official package does it, argument for argument: the `as_released` variant of `apply_low_rank`.

    It differs from the paper's form here in three ways: SVD is randomised with `num_iter` power iterations and leaves all of
    the scale in the encoder; a convolution's limit ignores its kernel, c (o/g) / (c + o/g); a single layer may be given, and
    the factored one is returned. Two faults are not kept: grouped convolutions are factored group by group, and tied weights
    are skipped with a warning (the package breaks the tie without a word).
    Raises ValueError for a bad rank or an unknown solver.
    """
    check_rank(rank)
    if solver not in ("random", "svd", "nmf", "snmf"):
        raise ValueError(f"solver must be one of random, svd, nmf, snmf, got {solver!r}")
    root = nn.Sequential()
    root.add_module("module", module)
    kinds = (*linear_kinds(), *CONVOLUTIONS)
    layers = find(root, kinds, closed=() if fact_led_unit else UNITS)
    if submodules is not None:
        inside = {id(child) for module_ in submodules for child in module_.modules()}
        layers = {name: layer for name, layer in layers.items() if id(layer) in inside}
    if deepcopy:
        root = copy.deepcopy(root)
        layers = {name: root.get_submodule(name) for name in layers}
    for name, layer in layers.items():
        unit = _released_unit(root, name, layer, rank, solver, num_iter)
        if unit is not None:
            swap(root, {name: unit})
    return root.get_submodule("module")


def _released_unit(root: nn.Module, name: str, layer: Any, rank: float, solver: str, num_iter: int) -> nn.Module | None:
    convolution = type(layer) in CONVOLUTIONS
    rows, columns, groups = matrix_shape(layer)
    if convolution:
        columns = layer.in_channels
    limit = int(rows * columns / (rows + columns))
    whole = int(limit * rank) if rank < 1 else int(rank)
    if rank < 1 and whole == 0:
        return None
    whole = -(-whole // groups) * groups
    if whole >= limit:
        warnings.warn(f"skipping {name}: rank {whole} is not below its limit {limit}", stacklevel=3)
        return None
    if len(tied_names(root, weight_of(layer))) > 1:
        warnings.warn(f"skipping {name}: its weight is tied to another layer's", stacklevel=3)
        return None
    if solver == "random":
        if convolution:
            return CED.like(layer, whole)
        options = {"device": layer.weight.device, "dtype": layer.weight.dtype}
        return LED(columns, rows, whole, bias=layer.bias is not None, **options)
    pairs = []
    for matrix in matrices_of(layer):
        share = min(whole // groups, *matrix.shape)
        if solver == "svd":
            u, s, v = torch.svd_lowrank(matrix.detach().T, q=share, niter=num_iter)
            pairs.append((v, (u * s).T))
        else:
            pairs.append(factor(matrix, share, solver, num_iter=num_iter))  # type: ignore[arg-type]
    return unit_around(layer, pairs)
