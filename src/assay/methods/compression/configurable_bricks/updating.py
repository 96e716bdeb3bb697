"""Bricks that change: train the neurons of one function only, and add neurons that at first do nothing."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from assay import checks
from assay.methods.compression.configurable_bricks.neurons import checked_neurons, mlps
from assay.methods.core.layers.surgery import tied_names
from assay.methods.core.sparsity.removal import NEURON_SETTINGS
from assay.methods.core.sparsity.units import Cut, Group, axis_of, places_of


@contextlib.contextmanager
def editing(model: nn.Module, neurons: Mapping[str, Tensor]) -> Iterator[list[nn.Parameter]]:
    """Within the context only the named neurons can be trained; gives the parameters to hand to an optimiser.

    `neurons` are bool masks (neurons,) by MLP, from `FunctionalityScorer.specialists_`, say. What makes such a neuron (its rows of the
    first layers, and their biases) and what takes it (its columns of the last) keeps its gradient; every other entry gets the gradient
    0 and stays as it is under SGD and Adam. Weight decay would change all entries: leave it out. Afterwards every parameter
    requires a gradient, or not, as before.

    Raises TypeError or ValueError for what `neurons.checked_neurons` refuses.
    """
    masks = checked_neurons(model, neurons)
    known = mlps(model)
    before = {parameter: parameter.requires_grad for parameter in model.parameters()}
    handles: list[Any] = []
    chosen: list[nn.Parameter] = []
    try:
        for parameter in before:
            parameter.requires_grad_(False)
        for name, mask in masks.items():
            for parameter, axis, places in _touched(model, known[name], mask):
                held: Any = parameter.requires_grad_(True)
                handles.append(held.register_hook(_only(places, axis, parameter)))
                chosen.append(parameter)
        yield chosen
    finally:
        for handle in handles:
            handle.remove()
        for parameter, trained in before.items():
            parameter.requires_grad_(trained)


def grow(model: nn.Module, extra: int, *, names: Sequence[str] | None = None, seed: int = 0) -> nn.Module:
    """Add `extra` neurons to each MLP (or those of `names`), in place; returns the model, which answers as before, up to rounding.

    What makes the new neurons is drawn with the spread of what is there, what takes them is 0: they do nothing until they are trained.
    Where all MLPs grow, the size in the model's configuration grows with them, so that the model can be saved and loaded.

    Raises ValueError, before anything is changed, for a name that is no MLP or is there twice, layers that are not plain `nn.Linear`
    with a weight of their own, gate and up in one layer, and norms between an MLP's layers.
    """
    extra = checks.whole("extra", extra, low=1)
    generator = torch.Generator().manual_seed(checks.whole("seed", seed))
    known = mlps(model)
    chosen = list(known) if names is None else list(names)
    for name in chosen:
        if name not in known:
            raise ValueError(f"names must be MLPs of the model ({', '.join(list(known)[:3])} ...), got {name!r}")
        if chosen.count(name) > 1:
            raise ValueError(f"names must hold every MLP once, got {name!r} {chosen.count(name)} times")
        _require_plain(model, known[name])
    sizes = {known[name].units for name in chosen}
    for name in chosen:
        group = known[name]
        for cut in group.producers:
            _lengthen(model.get_submodule(cut.layer), extra, generator)
        _widen(model.get_submodule(group.consumers[0].layer), extra)
    config: Any = getattr(model, "config", None)
    if set(chosen) == set(known) and len(sizes) == 1:
        (old,) = sizes
        for setting in NEURON_SETTINGS:
            if config is not None and getattr(config, setting, None) == old:
                setattr(config, setting, old + extra)
    return model


def _touched(model: nn.Module, group: Group, mask: Tensor) -> Iterator[tuple[nn.Parameter, int, Tensor]]:
    """The parameters that hold a group's neurons: each with the axis along which they lie, and which places are meant."""
    for cut in (*group.producers, *group.consumers):
        layer: Any = model.get_submodule(cut.layer)
        places = places_of(cut, mask.cpu(), group)
        yield layer.weight, axis_of(layer, cut.side), places
        if cut.side == "out" and layer.bias is not None:
            yield layer.bias, 0, places


def _only(places: Tensor, axis: int, parameter: nn.Parameter) -> Any:
    shape = [1] * parameter.dim()
    shape[axis] = -1
    others = ~places.view(shape)
    return lambda gradient: gradient.masked_fill(others.to(gradient.device), 0)  # also where it is not finite


def _require_plain(model: nn.Module, group: Group) -> None:
    if group.along:
        raise ValueError(
            f"model must have nothing between the layers of {group.name!r} that counts neurons, got {group.along[0]}"
        )
    for cut in (*group.producers, *group.consumers):
        layer: Any = model.get_submodule(cut.layer)
        if type(layer) is not nn.Linear or not _single(cut) or "weight" not in layer._parameters:
            raise ValueError(f"model must have plain linear layers of one neuron a place, got {cut.layer!r}")
        if len(tied_names(model, layer.weight)) > 1:
            raise ValueError(f"model must not share the weight of {cut.layer!r}, got {tied_names(model, layer.weight)}")


def _single(cut: Cut) -> bool:
    return cut.segments == (("unit", 1),)


def _lengthen(layer: Any, extra: int, generator: torch.Generator) -> None:
    """More outputs, drawn."""
    old = layer.weight
    drawn = torch.randn(extra, old.shape[1], generator=generator) * float(old.detach().float().std())
    layer.weight = nn.Parameter(torch.cat([old.detach(), drawn.to(old)]), requires_grad=old.requires_grad)
    if layer.bias is not None:
        more = torch.cat([layer.bias.detach(), layer.bias.new_zeros(extra)])
        layer.bias = nn.Parameter(more, requires_grad=layer.bias.requires_grad)
    layer.out_features += extra


def _widen(layer: Any, extra: int) -> None:
    """More inputs, which count nothing."""
    old = layer.weight
    more = torch.cat([old.detach(), old.detach().new_zeros(old.shape[0], extra)], 1)
    layer.weight = nn.Parameter(more, requires_grad=old.requires_grad)
    layer.in_features += extra
