"""One budget for a whole model: which density, rank or bit width each layer gets, so that the sum of losses is least.

    >>> layers = {"a": [Choice(4, 0.0, "dense"), Choice(1, 3.0, "sparse")], "b": [Choice(4, 0.0, "dense"), Choice(1, 1.0, "sparse")]}
    >>> found = allocate(layers, budget=5)
    >>> {name: choice.label for name, choice in found.chosen.items()}, found.loss, found.gap
    ({'a': 'dense', 'b': 'sparse'}, 1.0, 0.0)

A choice has one cost in whole numbers (bytes, or MACs) and one loss; losses of different layers are added, so that they should be
of one kind, such as the squared output errors that `options` gives, perhaps weighted. This is the multiple-choice knapsack problem.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from assay import checks
from assay.methods.core.quantize.groups import GROUP, dequantize_groups, quantize_groups
from assay.methods.core.sparsity.projections import kept_count, top

Solver = Literal["auto", "exact", "hull"]
SOLVERS: tuple[Solver, ...] = get_args(Solver)
MOST_WORK = 5e7  # cells of the exact table, all choices together, up to which "auto" is exact
MOST_EXACT = 2e9  # and beyond which it is refused
HIGHEST = 2**62  # of a sum of costs


@dataclass(frozen=True)
class Choice:
    """What a layer may become: its cost (whole, at least 0), what is lost by it (finite), and what it is ("rank", 32, say)."""

    cost: int
    loss: float
    label: Any = None


@dataclass(frozen=True)
class Allocation:
    """The choice of every layer, the sums of their costs and losses, and a lower bound on the loss of any allocation.

    `gap` = loss - bound; 0 for the exact solver.
    """

    chosen: dict[str, Choice]
    cost: int
    loss: float
    bound: float

    @property
    def gap(self) -> float:
        """By how much this can be worse than the best, at most."""
        return self.loss - self.bound


def allocate(layers: Mapping[str, Sequence[Choice]], budget: int, *, solver: Solver = "auto") -> Allocation:
    """One choice a layer, of least total loss, whose costs sum to at most `budget`.

    "exact" fills a table over all budgets (dynamic programming, after division by the greatest common divisor of the costs):
    time and memory grow with layers x budget. "hull" takes from each layer the choices on the lower convex hull and spends where
    a unit of cost saves most loss (the Lagrangian of the problem), then tries each layer's other choices with what is left; the
    loss is at most `gap` above the best. "auto" is exact up to 5e7 cells.

    Raises ValueError for a layer without a choice, costs or losses out of range, and a budget below the cheapest choices.
    """
    checks.choice("solver", solver, SOLVERS)
    budget = checks.whole("budget", budget, low=0, high=HIGHEST)
    if not layers:
        raise ValueError("layers must hold at least one layer, got none")
    cheapest = 0
    for name, choices in layers.items():
        if not choices:
            raise ValueError(f"layers[{name!r}] must have at least one choice, got none")
        for i, choice in enumerate(choices):
            checks.whole(f"layers[{name!r}][{i}].cost", choice.cost, low=0, high=HIGHEST)
            checks.number(f"layers[{name!r}][{i}].loss", choice.loss)
        cheapest += min(choice.cost for choice in choices)
    if cheapest > budget:
        raise ValueError(f"budget must be at least {cheapest}, the sum of the cheapest choices, got {budget}")
    useful = {name: _undominated(choices) for name, choices in layers.items()}
    base = {name: choices[0].cost for name, choices in useful.items()}  # everybody pays at least this
    extra = [choice.cost - base[name] for name, choices in useful.items() for choice in choices]
    unit = math.gcd(*extra) or 1
    highest = sum(choices[-1].cost - base[name] for name, choices in useful.items())
    width = min(budget - cheapest, highest) // unit
    work = (width + 1) * sum(map(len, useful.values()))
    if solver == "exact" and not work <= MOST_EXACT:
        raise ValueError(
            f"solver must be 'hull' for a table of {work:.1e} cells, got 'exact': coarser costs make it smaller"
        )
    if solver == "exact" or (solver == "auto" and work <= MOST_WORK):
        chosen = _table(useful, base, unit, width)
        loss = sum(choice.loss for choice in chosen.values())
        bound = loss
    else:
        chosen, bound = _hull(useful, budget)
        loss = sum(choice.loss for choice in chosen.values())
    return Allocation(chosen, sum(choice.cost for choice in chosen.values()), loss, min(bound, loss))


def _undominated(choices: Sequence[Choice]) -> list[Choice]:
    """Costs going up, losses going down: what costs more without losing less is out."""
    kept: list[Choice] = []
    for choice in sorted(choices, key=lambda c: (c.cost, c.loss)):
        if not kept or choice.loss < kept[-1].loss:
            kept.append(choice)
    return kept


def _table(layers: Mapping[str, list[Choice]], base: Mapping[str, int], unit: int, width: int) -> dict[str, Choice]:
    """Best losses for every budget of 0..width units, layer by layer, and the way back."""
    best = np.zeros(width + 1)
    taken = []
    for name, choices in layers.items():
        now = np.full(width + 1, np.inf)
        which = np.zeros(width + 1, dtype=np.int32)
        for i, choice in enumerate(choices):
            step = (choice.cost - base[name]) // unit
            if step > width:
                break
            candidate = best[: width + 1 - step] + choice.loss
            better = candidate < now[step:]
            now[step:][better] = candidate[better]
            which[step:][better] = i
        best = now
        taken.append(which)
    left, chosen = width, {}
    for (name, choices), which in zip(reversed(list(layers.items())), reversed(taken), strict=True):
        choice = choices[int(which[left])]
        chosen[name] = choice
        left -= (choice.cost - base[name]) // unit
    return {name: chosen[name] for name in layers}


def _hull(layers: Mapping[str, list[Choice]], budget: int) -> tuple[dict[str, Choice], float]:
    """The greedy way along the convex hulls, and the loss of the relaxed problem, which no allocation can beat."""
    chosen = {name: choices[0] for name, choices in layers.items()}
    left = budget - sum(choice.cost for choice in chosen.values())
    relaxed = sum(choice.loss for choice in chosen.values())
    steps = []
    for name, choices in layers.items():
        hull = _lower_hull(choices)
        for before, after in zip(hull, hull[1:], strict=False):
            price = (before.loss - after.loss) / (after.cost - before.cost)
            steps.append((price, name, before, after))
    steps.sort(key=lambda s: -s[0])  # stable: the order of the layers decides between equal prices
    room: float = left
    for price, name, before, after in steps:
        size = after.cost - before.cost
        relaxed -= price * min(size, room)  # the last one in part
        room -= min(size, room)
        if size <= left and chosen[name] is before:
            chosen[name] = after
            left -= size
    while True:  # what is left may still pay for a choice off the hull
        best = max(
            (
                (chosen[name].loss - choice.loss, -i, name, choice)
                for i, (name, choices) in enumerate(layers.items())
                for choice in choices
                if choice.cost - chosen[name].cost <= left
            ),
            key=lambda found: found[:2],
        )
        if not best[0] > 0:
            return chosen, relaxed
        left -= best[3].cost - chosen[best[2]].cost
        chosen[best[2]] = best[3]


def _lower_hull(choices: Sequence[Choice]) -> list[Choice]:
    """Those between which no straight line passes below: prices fall along it. `choices` as `_undominated` gives them."""
    hull: list[Choice] = []
    for choice in choices:
        while len(hull) > 1:
            a, b = hull[-2:]
            if (a.loss - b.loss) * (choice.cost - a.cost) > (a.loss - choice.loss) * (b.cost - a.cost):
                break
            hull.pop()
        hull.append(choice)
    return hull


# ---- what a layer may become -------------------------------------------------------------------------------------------------------


def options(
    weight: Tensor,
    *,
    cost: Literal["bytes", "macs"] = "bytes",
    moment: Tensor | None = None,
    densities: Sequence[float] = (),
    ranks: Sequence[int] = (),
    bits: Sequence[int] = (),
) -> list[Choice]:
    """The dense layer and its cheaper forms, each with its cost and its squared output error, for `allocate`.

    `weight` is (out, in), and `moment` the second moment of the layer's inputs (`core.layers.inputs.input_moments`); the loss is
    tr(D M D^T) for an error D of the weight, |D|^2 without `moment`. Labels are ("dense", None), ("density", d), ("rank", r) and
    ("bits", b). Density: the largest |w| sqrt(M_jj) of each row (Wanda). Rank: the truncated SVD in the norm of the loss. Bits:
    groups of 32 inputs, rounded to nearest; left out where 32 does not divide the inputs.
    Bytes: of a sparse layer a bit a weight and the values left, of a low-rank one both factors, of a quantised one codes, scales
    and (below 8 bits) minima. MACs are those of a token; bits do not change them.
    """
    w = checks.tensor("weight", weight, ndim=2, finite=True).detach().double()
    checks.choice("cost", cost, ("bytes", "macs"))
    rows, columns = w.shape
    m = torch.eye(columns, dtype=torch.float64, device=w.device) if moment is None else moment.to(w)
    if m.shape != (columns, columns):
        raise ValueError(f"moment must have shape ({columns}, {columns}), got {tuple(m.shape)}")
    size, numel, in_bytes = weight.element_size(), weight.numel(), cost == "bytes"

    def loss(error: Tensor) -> float:
        return max(0.0, float(((error @ m) * error).sum()))

    found = [Choice(numel * size if in_bytes else numel, 0.0, ("dense", None))]
    importance = w.abs() * m.diagonal().clamp(min=0).sqrt()
    for share in densities:
        kept = kept_count(columns, share)
        mask = top(importance, kept)
        price = -(-numel // 8) + rows * kept * size if in_bytes else rows * kept
        found.append(Choice(price, loss(w * ~mask), ("density", share)))
    if len(ranks):
        values, vectors = torch.linalg.eigh((m + m.T) / 2)
        spread = w @ (vectors * values.clamp(min=0).sqrt())  # |spread| is the norm of the loss
        energy = torch.linalg.svdvals(spread).square()
        for given in ranks:
            rank = checks.whole("ranks", given, low=1, high=min(rows, columns))
            numbers = rank * (rows + columns)
            price = numbers * size if in_bytes else numbers
            found.append(Choice(price, float(energy[rank:].sum()), ("rank", rank)))
    for given in bits if columns % GROUP == 0 else ():
        width = checks.whole("bits", given, low=2, high=8)
        minima = width < 8
        parts = quantize_groups(w.float(), width, GROUP, asymmetric=minima)
        error = dequantize_groups(*parts).to(w) - w
        packed = -(-numel * width // 8) + numel // GROUP * (4 if minima else 2)
        found.append(Choice(packed if in_bytes else numel, loss(error), ("bits", width)))
    return found
