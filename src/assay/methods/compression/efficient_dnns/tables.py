"""The cost model of the thesis: what every candidate operator costs at every layer, in one unit; a network costs their sum.

    space = Space(stem, layers, head)              layers[i] maps a name to what builds that operator
    table = measured_table(space, x)               microseconds on this very machine
    table = counted_table(space, x, "macs")        or MACs, parameters, bytes moved
    table.cost(("k3", "skip", "k5"))               of one network
    table.expected(weights)                        of a mixture, with gradients

A sum of layers leaves out what they do to each other (caches that are still warm, work that overlaps on a GPU), so hold it against
a measured run of whole networks before relying on it. Search, bit allocation and rank choice all take the same table.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from assay import checks
from assay.errors import InputError
from assay.measure.clock import compare_many
from assay.measure.cost import count_cost
from assay.paths import atomic_file

Counted = Literal["macs", "params", "bytes"]
Architecture = tuple[str, ...]
"""The name of the operator of every layer."""


@dataclass(frozen=True)
class Space:
    """The networks among which a search chooses: a stem, one of several operators at every layer, a head.

    All operators of a layer take and give maps of the same shape. Raises ValueError for no layers, and for a layer without operators.
    """

    stem: Callable[[], nn.Module]
    layers: Sequence[Mapping[str, Callable[[], nn.Module]]]
    head: Callable[[], nn.Module]

    def __post_init__(self) -> None:
        if not self.layers or not all(self.layers):
            raise ValueError("layers must hold at least one layer, and every layer at least one operator")

    def network(self, architecture: Sequence[str]) -> nn.Sequential:
        """The network of that architecture, with new weights: stem, layers, head. Raises ValueError for an unknown operator."""
        names = checked([list(layer) for layer in self.layers], architecture)
        chosen = [layer[name]() for layer, name in zip(self.layers, names, strict=True)]
        return nn.Sequential(self.stem(), *chosen, self.head())

    def random(self, generator: torch.Generator | None = None) -> Architecture:
        """An architecture, every operator of a layer being equally likely."""
        picks = [int(torch.randint(len(layer), (), generator=generator)) for layer in self.layers]
        return tuple(list(layer)[pick] for layer, pick in zip(self.layers, picks, strict=True))


@dataclass(frozen=True)
class CostTable:
    """Costs in `unit`, at least 0: of every operator at every layer, and of what all networks share (`fixed`: stem and head).

    >>> table = CostTable("us", ({"small": 1.0, "large": 3.0}, {"small": 2.0, "large": 5.0}), fixed=10.0)
    >>> table.cost(("small", "large")), table.cheapest()
    (16.0, ('small', 'small'))
    """

    unit: str
    layers: tuple[Mapping[str, float], ...]
    fixed: float = 0.0

    def __post_init__(self) -> None:
        if not self.layers or not all(self.layers):
            raise ValueError("layers must hold at least one layer, and every layer at least one operator")
        checks.number("fixed", self.fixed, low=0)
        for i, layer in enumerate(self.layers):
            for name, value in layer.items():
                checks.number(f"layers[{i}][{name!r}]", value, low=0)

    def cost(self, architecture: Sequence[str]) -> float:
        """The cost of one network. Raises ValueError for an operator that is not in the table."""
        names = checked([list(layer) for layer in self.layers], architecture)
        return self.fixed + sum(layer[name] for layer, name in zip(self.layers, names, strict=True))

    def cheapest(self) -> Architecture:
        """The network of least cost; the first of equal operators."""
        return tuple(min(layer, key=lambda name: layer[name]) for layer in self.layers)

    def expected(self, weights: Sequence[Tensor]) -> Tensor:
        """The cost of a mixture: one tensor of weights a layer, in the order of the layer's operators. One-hot weights give `cost`.

        Raises ValueError for weights of another number.
        """
        if [len(weight) for weight in weights] != [len(layer) for layer in self.layers]:
            sizes = [len(layer) for layer in self.layers]
            raise ValueError(f"weights must have {sizes} numbers, got {[len(weight) for weight in weights]}")
        total = weights[0].new_tensor(self.fixed)
        for weight, layer in zip(weights, self.layers, strict=True):
            total = total + (weight * weight.new_tensor(list(layer.values()))).sum()
        return total

    def write(self, path: str | Path) -> None:
        """As JSON: {"unit": ..., "fixed": ..., "layers": [{operator: cost}]}."""
        text = json.dumps({"unit": self.unit, "fixed": self.fixed, "layers": [dict(layer) for layer in self.layers]})
        with atomic_file(Path(path)) as temporary:
            temporary.write_text(text + "\n", encoding="utf-8")

    @classmethod
    def read(cls, path: str | Path) -> CostTable:
        """What `write` wrote. Raises InputError for a file that holds no such table."""
        try:
            found: Any = json.loads(Path(path).read_text(encoding="utf-8"))
            if not isinstance(found["unit"], str):
                raise TypeError(f"unit must be text, got {checks.shown(found['unit'])}")
            return cls(found["unit"], tuple(dict(layer) for layer in found["layers"]), float(found["fixed"]))
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise InputError(f"{path} holds no table of costs: {error}") from None


def checked(layers: Sequence[Sequence[str]], architecture: Sequence[str]) -> Architecture:
    """`architecture` itself, as a tuple, if it names an operator of every layer; raises ValueError that says which does not fit."""
    if isinstance(architecture, str) or len(architecture) != len(layers):
        raise ValueError(f"architecture must name {len(layers)} operators, got {checks.shown(architecture)}")
    for i, (names, name) in enumerate(zip(layers, architecture, strict=True)):
        checks.choice(f"architecture[{i}]", name, names)
    return tuple(architecture)


Costs = Callable[[Mapping[str, nn.Module], Tensor], dict[str, float]]


def _table(space: Space, x: Tensor, unit: str, costs: Costs) -> CostTable:
    """Walk through the layers with the shapes that `x` gives them; `costs` of operators (by name) on their input."""
    stem, head = (make().to(x).eval() for make in (space.stem, space.head))
    layers = []
    with torch.no_grad():
        fixed = costs({"stem": stem}, x)["stem"]
        x = stem(x)
        for i, layer in enumerate(space.layers):
            modules = {name: make().to(x).eval() for name, make in layer.items()}
            outputs = {name: module(x) for name, module in modules.items()}
            shapes = {name: tuple(out.shape) for name, out in outputs.items()}
            if len(set(shapes.values())) > 1:
                raise ValueError(f"layers[{i}] must give maps of one shape, got {shapes}")
            layers.append(costs(modules, x))
            x = next(iter(outputs.values()))
        fixed += costs({"head": head}, x)["head"]
    return CostTable(unit, tuple(layers), fixed)


def measured_table(space: Space, x: Tensor, *, rounds: int = 10) -> CostTable:
    """Microseconds of every operator on this machine, on the device and in the dtype of `x` (B, C, H, W), in inference.

    The operators of a layer are timed in turn, `rounds` times after a warm-up, and the median counts. Weights are random: time depends
    on shapes only. Raises ValueError where the operators of a layer give different shapes, and for fewer than two rounds.
    """
    checks.tensor("x", x, ndim=4)

    def costs(modules: Mapping[str, nn.Module], given: Tensor) -> dict[str, float]:
        timings = compare_many({name: partial(_run, m, given) for name, m in modules.items()}, rounds=rounds)
        return {name: 1e6 * statistics.median(timings.seconds[name]) for name in modules}

    return _table(space, x, "us", costs)


def _run(module: nn.Module, x: Tensor) -> None:
    with torch.inference_mode():
        module(x)


def counted_table(space: Space, x: Tensor, what: Counted = "macs") -> CostTable:
    """MACs, parameters or bytes moved of every operator, as `assay.measure.cost` counts them for the whole batch `x` (B, C, H, W)."""
    checks.tensor("x", x, ndim=4)
    checks.choice("what", what, get_args(Counted))

    def costs(modules: Mapping[str, nn.Module], given: Tensor) -> dict[str, float]:
        return {name: float(getattr(count_cost(module, given), what)) for name, module in modules.items()}

    return _table(space, x, what, costs)
