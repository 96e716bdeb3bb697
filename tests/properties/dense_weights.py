"""The oracle of whatever stands in the place of linear layers: the same model in float, with the weights the layers stand for."""

from __future__ import annotations

import copy
from typing import Any

from torch import nn

from assay.methods.core.layers.linears import linears, open_
from assay.methods.core.layers.surgery import CONVOLUTIONS, linear_kinds


def reference(model: nn.Module, changed: nn.Module) -> nn.Module:
    """A copy of `model` whose layers have the weights that the layers of `changed` stand for."""
    plain = open_(copy.deepcopy(model))
    units = dict(changed.named_modules())
    convolutions = {name: layer for name, layer in plain.named_modules() if type(layer) in CONVOLUTIONS}
    layers: dict[str, Any] = {**linears(plain), **convolutions}
    for name, layer in layers.items():
        unit: Any = units.get(name)
        if unit is not None and type(unit) not in (*linear_kinds(), *CONVOLUTIONS):
            weight = unit.weight * 1
            transposed = type(getattr(unit, "layer", None)) is linear_kinds()[1]
            layer.weight = nn.Parameter((weight.T if transposed else weight).to(layer.weight.dtype))
    return plain
