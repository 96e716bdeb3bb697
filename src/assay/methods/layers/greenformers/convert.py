"""Converting a trained model: ranks by number, energy or budget, tied weights, and a report of costs and savings."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from assay import checks
from assay.methods.core.layers.surgery import CONVOLUTIONS, LayerCost, cost, find, linear_kinds, swap, tied_names, untie
from assay.methods.layers.greenformers.solvers import SOLVERS, Solver, factor, input_moments, output_basis, truncate
from assay.methods.layers.greenformers.units import (
    UNITS,
    break_even_rank,
    check_rank,
    matrices_of,
    matrix_shape,
    unit_around,
    weight_of,
)


@dataclass(frozen=True)
class LayerReport:
    """One layer: its rank (None where it stayed dense, with the reason), its relative error, its cost before and after.

    `error` is |W - D E| / |W| in the Frobenius norm, or of the outputs on the calibration inputs with "data_svd".
    """

    name: str
    rank: int | None
    break_even: float
    error: float
    before: LayerCost
    after: LayerCost
    reason: str = ""


@dataclass(frozen=True)
class LowRankReport:
    """What `apply_low_rank` did. `before` and `after` are the whole model's cost, tied tensors counted once."""

    layers: tuple[LayerReport, ...]
    before: LayerCost
    after: LayerCost

    def __str__(self) -> str:
        lines = [f"{'layer':50} {'rank':>5} {'limit':>6} {'error':>7} {'MACs/token':>22}"]
        for layer in self.layers:
            name, rank = layer.name[-50:], "dense" if layer.rank is None else str(layer.rank)
            macs = f"{layer.before.macs:,} -> {layer.after.macs:,}"
            lines.append(f"{name:50} {rank:>5} {layer.break_even:6.0f} {layer.error:7.4f} {macs:>22} {layer.reason}")
        lines.append(f"parameters {self.before.params:,} -> {self.after.params:,}")
        lines.append(
            f"MACs per token {self.before.macs:,} -> {self.after.macs:,} (1 MAC = 2 FLOPs; linear layers and convolutions)"
        )
        return "\n".join(lines)


def apply_low_rank(
    model: nn.Module,
    rank: float | None = None,
    *,
    energy: float | None = None,
    budget: float | None = None,
    solver: Solver = "svd",
    calibration: Iterable[Any] | None = None,
    include: Sequence[str] = ("*",),
    exclude: Sequence[str] = (),
    embeddings: bool = False,
    untie_head: bool = False,
    num_iter: int = 10,
    seed: int = 0,
) -> LowRankReport:
    """Factor the linear layers and convolutions of `model` in place, and report what that cost and saved.

    Ranks, exactly one of: `rank`, a whole number for all layers or a fraction in (0, 1) of each layer's break-even rank (the
    fraction is safer: one number fits no two shapes); `energy` in (0, 1), the fewest directions that keep this share of each
    layer's energy; `budget` in (0, 1), the share of the layers' parameters to keep, spent where it keeps the most energy
    (our choices). Layers at or above their break-even rank stay dense. `energy` and `budget` need "svd" or "data_svd".
    "data_svd" needs `calibration`, see `input_moments`; convolutions and embeddings take plain SVD then. Units from an earlier
    call are left alone, so that calling twice does nothing twice.

    A head whose weight is also the embedding is left dense unless told otherwise: `untie_head` factors the head alone (the
    embedding keeps the full table: more parameters, fewer MACs), `embeddings` factors embeddings as well, a tied pair together
    with the large factor shared.
    Raises ValueError for bad arguments, before anything is changed, naming them.

    >>> model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
    >>> report = apply_low_rank(model, 8)
    >>> report.before.params, report.after.params
    (8320, 2176)
    """
    _check(rank, energy, budget, solver, calibration)
    for name, value in (("embeddings", embeddings), ("untie_head", untie_head)):
        checks.flag(name, value)
    num_iter, seed = checks.whole("num_iter", num_iter, low=1), checks.whole("seed", seed)
    kinds = (*linear_kinds(), *CONVOLUTIONS, *((nn.Embedding,) if embeddings else ()))
    layers = find(model, kinds, include=include, exclude=exclude, closed=UNITS)
    before = cost(model)
    heads, reasons = _ties(model, layers, untie_head)
    free = {name: layer for name, layer in layers.items() if name not in reasons and name not in heads}

    for name in (*free, *heads):
        if not bool(torch.isfinite(weight_of(layers[name])).all()):
            raise ValueError(f"the weight of {name} must be finite, got inf or NaN")
    moments: dict[str, Tensor] = {}
    if solver == "data_svd":
        seen = {name: layers[name] for name in (*free, *heads) if type(layers[name]) in linear_kinds()}
        moments = input_moments(model, seen, calibration or ())
        if odd := [name for name, moment in moments.items() if not bool(torch.isfinite(moment).all())]:
            raise ValueError(f"calibration must give {odd[0]} finite inputs, got inf or NaN")
        moments |= {table: moments[head] for head, table in heads.items()}  # one matrix, judged by the head's outputs
    bases: dict[str, list[tuple[Tensor, Tensor]]] = {}
    if solver in ("svd", "data_svd"):
        bases = {name: [output_basis(m, moments.get(name)) for m in matrices_of(layer)] for name, layer in free.items()}
    if budget is not None:
        ranks = _spend(budget, free, bases)
    else:
        ranks = {name: _rank_of(layer, rank, energy, bases.get(name)) for name, layer in free.items()}

    reports = []
    breaks_tie = False
    for name in sorted(layers, key=lambda name: name in heads):  # a factored embedding before the head that shares it
        layer, table = layers[name], heads.get(name)
        limit, own = break_even_rank(layer), cost(layer)
        chosen = ranks.get(table or name, 0)
        if chosen >= int(limit):
            reasons[name] = f"rank {chosen} is not below the limit {int(limit)}"
        if name in reasons or chosen == 0:
            reports.append(LayerReport(name, None, limit, 0.0, own, own, reasons.get(name, "rank 0")))
            continue
        matrices = matrices_of(layer)
        if table is not None:
            embedding: Any = model.get_submodule(table)
            pairs = [(embedding.codes.weight, embedding.decoder.weight.T)]
        elif name in bases:
            pairs = [
                truncate(m, basis, chosen // len(matrices)) for m, (basis, _) in zip(matrices, bases[name], strict=True)
            ]
        else:
            pairs = [factor(m, chosen // len(matrices), solver, num_iter=num_iter, seed=seed) for m in matrices]
        unit: Any = unit_around(layer, pairs)
        if table is not None:
            unit.decoder.weight = embedding.codes.weight
        breaks_tie = breaks_tie or (table is None and len(tied_names(model, weight_of(layer))) > 1)
        error = _error(matrices, pairs, moments.get(table or name))
        swap(model, {name: unit})
        reports.append(LayerReport(name, chosen, limit, error, own, cost(unit)))
    if breaks_tie or heads:
        untie(model)
    return LowRankReport(tuple(reports), before, cost(model))


def check_size(rank: float | None = None, energy: float | None = None, budget: float | None = None) -> None:
    """Raises TypeError or ValueError unless exactly one of them is given and in its range (see `apply_low_rank`)."""
    if sum(given is not None for given in (rank, energy, budget)) != 1:
        raise ValueError(f"exactly one of rank, energy and budget must be given, got {rank}, {energy} and {budget}")
    for name, share in (("energy", energy), ("budget", budget)):
        if share is not None:
            checks.number(name, share, above=0, below=1)
    if rank is not None:
        check_rank(rank)


def _check(rank: float | None, energy: float | None, budget: float | None, solver: str, calibration: Any) -> None:
    check_size(rank, energy, budget)
    checks.choice("solver", solver, SOLVERS)
    if rank is None and solver not in ("svd", "data_svd"):
        raise ValueError(f"energy and budget need solver 'svd' or 'data_svd', got {solver!r}")
    if solver == "data_svd" and calibration is None:
        raise ValueError("calibration must be given with solver 'data_svd'")


def _ties(model: nn.Module, layers: Mapping[str, nn.Module], untie_head: bool) -> tuple[dict[str, str], dict[str, str]]:
    """Layers that share their weight: {head: the embedding it is factored together with}, {layer: why it stays dense}."""
    tables = {id(weight_of(layer)): name for name, layer in layers.items() if type(layer) is nn.Embedding}
    heads: dict[str, str] = {}
    reasons: dict[str, str] = {}
    for name, layer in layers.items():
        others = [other for other in tied_names(model, weight_of(layer)) if other != f"{name}.weight"]
        if not others:
            continue
        if type(layer) is not nn.Embedding and id(weight_of(layer)) in tables:
            heads[name] = tables[id(weight_of(layer))]
        elif type(layer) is nn.Embedding or not untie_head:
            reasons[name] = f"tied to {others[0]}"
    for table in heads.values():
        reasons.pop(table, None)
    return heads, reasons


def _rank_of(layer: nn.Module, rank: float | None, energy: float | None, bases: Any) -> int:
    rows, columns, groups = matrix_shape(layer)
    if rank is not None:
        whole = int(rank) if rank >= 1 else int(rank * int(break_even_rank(layer)))
        return min(-(-whole // groups), min(rows, columns)) * groups  # rounded up to a multiple of the groups
    if energy is None:
        return 0
    kept = [int((values.cumsum(0) < energy * values.sum()).sum()) + 1 for _, values in bases]
    return min(max(kept), rows, columns) * groups


def _spend(budget: float, layers: Mapping[str, nn.Module], bases: Mapping[str, Any]) -> dict[str, int]:
    """Ranks under a global budget: directions bought by the share of their layer's energy they keep per parameter.

    Shares fall within a layer, so greedy is optimal up to the last direction. A layer bought up to its break-even rank is
    cheaper dense: it is taken out at its dense price and the rest is bought again.
    """
    sizes = {name: math.prod(matrix_shape(layer)) for name, layer in layers.items()}
    total = budget * sum(sizes.values())
    dense: set[str] = set()
    while True:
        open_layers = [name for name in layers if name not in dense]
        left = total - sum(sizes[name] for name in dense)
        offers = []
        for name in open_layers:
            rows, columns, groups = matrix_shape(layers[name])
            values = torch.stack([values for _, values in bases[name]]).sum(0)
            price = groups * (rows + columns)
            for place, share in enumerate((values / values.sum().clamp(min=1e-300)).tolist()):
                offers.append((place > 0, -share / price, name, price))  # one direction for everybody first
        ranks = dict.fromkeys(open_layers, 0)
        for _, _, name, price in sorted(offers):
            if price > left:
                break
            ranks[name] += matrix_shape(layers[name])[2]
            left -= price
        full = {name for name, r in ranks.items() if r >= int(break_even_rank(layers[name]))}
        if not full:
            break
        dense |= full
    if empty := [name for name, r in ranks.items() if r == 0]:
        raise ValueError(f"budget must leave every layer at least rank 1, got {budget}, which leaves {empty[0]!r} none")
    return ranks | {name: int(break_even_rank(layers[name])) for name in dense}


def _error(matrices: Sequence[Tensor], pairs: Sequence[tuple[Tensor, Tensor]], moment: Tensor | None) -> float:
    lost = whole = 0.0
    for matrix, (d, e) in zip(matrices, pairs, strict=True):
        w = matrix.detach().double()
        rest = w - d.detach().double() @ e.detach().double()
        for value, sign in ((rest, "lost"), (w, "whole")):
            square = float((value * value if moment is None else (value @ moment.to(value)) * value).sum())
            lost, whole = (lost + square, whole) if sign == "lost" else (lost, whole + square)
    return math.sqrt(max(lost, 0.0) / whole) if whole > 0 else 0.0
