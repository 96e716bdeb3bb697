"""A model of few layers made from a deep one, to compare speeds in a fraction of the time. It is no measurement of the deep model.

In most models all layers are alike, so a transform saves the same proportion on the first few as on all of them. The quality of
such a model means nothing.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

from torch import nn

LAYERS = 4  # kept at least, so that what surrounds the layers does not weigh too much


@dataclass(frozen=True)
class Shallow:
    """`model` has the first `kept` of `layers` layers, which are under the name `stack`; all of them if it cannot be cut."""

    model: nn.Module
    stack: str
    kept: int
    layers: int

    @property
    def factor(self) -> float:
        """How many times as many layers the whole model has."""
        return self.layers / self.kept


def shallow(model: nn.Module, keep: int = LAYERS) -> Shallow:
    """A copy of a transformers model with only its first layers; `model` is not changed.

    If layers of different kinds alternate (windowed and full attention, dense and experts), whole periods are kept, so that the
    mixture stays the same. A model is not cut if it has no list of as many layers as its configuration says, or if its layers show
    no such pattern: then `kept` equals `layers` and `model` is the one given.
    """
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if config is not None else None
    depth = getattr(text, "num_hidden_layers", None)
    stacks = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) == depth]
    if depth is None or len(stacks) != 1:
        return Shallow(model, "", 1, 1)
    name, layers = stacks[0]
    kinds = list(getattr(text, "layer_types", None) or [""] * depth)
    period = _period([(_shape(layer), kind) for layer, kind in zip(layers, kinds, strict=False)])
    kept = -(-keep // period) * period
    if 2 * kept > depth:
        return Shallow(model, name, depth, depth)
    parent = model.get_submodule(name.rpartition(".")[0])
    attribute = name.rpartition(".")[2]
    setattr(parent, attribute, layers[:kept])
    try:
        few = copy.deepcopy(model)
    finally:
        setattr(parent, attribute, layers)
    own: Any = few.config
    short = own.get_text_config()
    short.num_hidden_layers = kept
    if "layer_types" in vars(short):  # not where it follows from the number of layers
        short.layer_types = kinds[:kept]
    return Shallow(few, name, kept, depth)


def _period(kinds: list[Any]) -> int:
    """The smallest p for which the list repeats every p entries; its length if it never does."""
    return next(p for p in range(1, len(kinds) + 1) if all(kinds[i] == kinds[i % p] for i in range(len(kinds))))


def _shape(layer: nn.Module) -> tuple[Any, ...]:
    parts = [type(module).__name__ for module in layer.modules()]
    return (*parts, *((name, tuple(p.shape)) for name, p in layer.named_parameters()))
