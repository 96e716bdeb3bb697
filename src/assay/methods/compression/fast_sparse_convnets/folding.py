"""What stands behind a convolution and can be taken into it: a norm, a clamp."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Mapping
from typing import Any, cast

from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from assay.methods.core.sparsity.masks import matrix_of

CLAMPS: dict[type[nn.Module], tuple[float, float]] = {nn.ReLU: (0.0, math.inf), nn.ReLU6: (0.0, 6.0)}

TakenIn = tuple[Tensor, Tensor | None, float, float, dict[str, nn.Module]]


def module_places(model: nn.Module) -> Counter[int]:
    """In how many places of the model each module stands, by its id."""
    return Counter(id(child) for module in model.modules() for child in module._modules.values())


def taken_in(model: nn.Module, name: str, places: Mapping[int, int]) -> TakenIn:
    """Weight, bias and clamp of a convolution with what follows it in its `nn.Sequential`, and what is to stand there instead, by name.

    Taken in are a BatchNorm2d in evaluation mode with statistics right behind it, and a ReLU or ReLU6 right behind that; outside of
    an `nn.Sequential` nothing, nor in one of a subclass that calls its children in a way of its own. A module that stands in
    several places is neither taken in nor takes anything in: it would change in the others too. Masks count.
    """
    parent_name, _, leaf = name.rpartition(".")
    parent, conv = model.get_submodule(parent_name), cast(Any, model.get_submodule(name))
    weight: Tensor = matrix_of(model, name).detach()
    bias: Tensor | None = None if conv.bias is None else conv.bias.detach()
    low, high = -math.inf, math.inf
    if not _in_turn(parent) or places[id(conv)] != 1:
        return weight, bias, low, high, {}
    keys = list(parent._modules)
    behind: list[tuple[str, Any]] = [(key, parent._modules[key]) for key in keys[keys.index(leaf) + 1 :]]
    behind = [*itertools.takewhile(lambda entry: places[id(entry[1])] == 1, behind)]
    taken: list[str] = []
    if behind and _foldable(behind[0][1]):
        key, norm = behind.pop(0)
        folded = fuse_conv_bn_weights(
            weight, bias, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
        )
        weight, bias = (part.detach() for part in folded)
        taken.append(key)
    if behind and type(behind[0][1]) in CLAMPS:
        key, clamp = behind.pop(0)
        low, high = CLAMPS[type(clamp)]
        taken.append(key)
    prefix = f"{parent_name}." if parent_name else ""
    return weight, bias, low, high, {f"{prefix}{key}": nn.Identity() for key in taken}


def _in_turn(parent: nn.Module) -> bool:
    return isinstance(parent, nn.Sequential) and type(parent).forward is nn.Sequential.forward


def _foldable(module: Any) -> bool:
    return type(module) is nn.BatchNorm2d and module.running_mean is not None and not module.training
