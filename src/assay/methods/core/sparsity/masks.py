"""Masks on a model, in the form of `torch.nn.utils.prune`: `weight_orig` and `weight_mask` in the state dict, `weight` their product.

    found = prunable(model)                                   which layers
    scores = {name: matrix(layer).abs() for name, layer in found.items()}
    masks = global_(scores, density=0.2)                      (out, in, ...), True stays
    put_masks(model, masks)                                   the same as prune.custom_from_mask; `masks_of` reads either
    bake(model)                                               zeros in plain weights, and the model can be saved as usual

Linear layers, convolutions and transformers' `Conv1D` are reached; a mixture's fused experts are not, unless
`core.layers.linears.open_` has made layers of them. A mask alone saves nothing: `removal` and `formats` do.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from assay import checks
from assay.methods.core.layers.linears import fused_experts
from assay.methods.core.layers.surgery import CONVOLUTIONS, bypassed, find, linear_kinds, output_layer


def prunable(
    model: nn.Module, *, include: Sequence[str] = ("*",), exclude: Sequence[str] = (), head: bool = False
) -> dict[str, nn.Module]:
    """The layers that can be masked, by name: linear layers, convolutions, Conv1D; the output layer with `head` only.

    Left out are layers whose weight a model reads instead of calling them, where a mask would not follow training: Mamba's `dt_proj`,
    and the short depthwise convolutions of transformers' models. `include` and `exclude` are patterns over the full name
    (`surgery.find`). Masked layers are among the results.
    """
    last = None if checks.flag("head", head) else output_layer(model)
    kinds = (*linear_kinds(), *CONVOLUTIONS)
    found = find(model, kinds, include=include, exclude=exclude)
    if type(model) in kinds and any(fnmatchcase("", pattern) for pattern in include):
        raise ValueError(f"model must hold its layers, got a single {type(model).__name__}: put it into nn.Sequential")
    read = _read(model)
    return {name: layer for name, layer in found.items() if layer is not last and layer not in read}


def matrix(layer: nn.Module) -> Tensor:
    """The layer's weight as (out, in, ...): what Conv1D keeps is turned around. A view."""
    weight: Tensor = layer.weight  # type: ignore[assignment]
    return weight.T if isinstance(layer, linear_kinds()[1]) else weight


def matrix_of(model: nn.Module, name: str) -> Tensor:
    """`matrix` of the layer of that name, masked where it is."""
    layer: Any = model.get_submodule(name)
    if not _is_masked(layer):
        return matrix(layer)
    whole: Tensor = layer.weight_orig * layer.weight_mask  # `weight` is as old as the last forward pass
    return whole.T if isinstance(layer, linear_kinds()[1]) else whole


def reach(model: nn.Module, names: Iterable[str]) -> tuple[float, str]:
    """The share of the multiplying weights, the output layer's left out, that is in these layers; and what is not, for `Fit`.

    Fused experts count, and are not reached.

    >>> share, rest = reach(nn.Sequential(nn.Conv2d(1, 1, 2), nn.Linear(2, 6)), ["1"])
    >>> share, rest
    (0.75, '1 layer (0 ...) stays as it is')
    """
    chosen, last = set(names), output_layer(model)
    whole: dict[int, int] = {}
    reached: dict[int, int] = {}
    others: dict[str, None] = {}
    for name, module in model.named_modules():
        held = module._parameters
        if module is last or not isinstance(module, (*linear_kinds(), *CONVOLUTIONS, nn.MultiheadAttention)):
            continue
        weight: Any = held.get("weight_orig", held.get("weight", held.get("in_proj_weight")))
        if weight is None:
            continue
        whole[id(weight)] = weight.numel()
        if name in chosen:
            reached[id(weight)] = weight.numel()
        else:
            others[name] = None
    experts = fused_experts(model)
    for module in experts.values():
        whole |= {id(p): p.numel() for p in module.parameters() if p.dim() == 3}
    parts = [
        f"{what} ({next(iter(found))} ...)"
        for what, found in ((f"the fused experts of {_layers(experts)}", experts), (_layers(others), others))
        if found
    ]
    share = sum(reached.values()) / sum(whole.values()) if whole else 1.0
    single = len(others) + len(experts) == 1
    return share, f"{' and '.join(parts)} {'stays as it is' if single else 'stay as they are'}" if parts else ""


def put_masks(model: nn.Module, masks: Mapping[str, Tensor]) -> nn.Module:
    """Mask the weights of the named layers, in place; returns the model. A layer that has a mask keeps what both keep.

    Masks are bool, (out, in, ...), True stays. Layers that share one weight must all be named, with the same mask; a weight that an
    embedding shares cannot be masked. `save_pretrained` is refused until `bake` or `take_masks`: `from_pretrained` would not
    find `weight_orig` and draw new weights.

    Raises TypeError or ValueError, before anything is changed, for a name, a type, a shape or a tie that does not fit.

    >>> model = nn.Sequential(nn.Linear(2, 1, bias=False))
    >>> _ = put_masks(model, {"0": torch.tensor([[True, False]])})
    >>> sorted(model.state_dict()), (model[0].weight != 0).tolist()
    (['0.weight_mask', '0.weight_orig'], [[True, False]])
    """
    layers = _checked(model, masks)
    for name, layer in layers.items():
        mask = masks[name].T if isinstance(layer, linear_kinds()[1]) else masks[name]
        with torch.no_grad():  # or the product would have a history, and the model could not be copied
            prune.custom_from_mask(layer, "weight", mask.to(matrix(layer).device))
    if hasattr(model, "save_pretrained"):
        object.__setattr__(model, "save_pretrained", _refuse_saving)
    return model


def masks_of(model: nn.Module) -> dict[str, Tensor]:
    """The masks that are on a model, whoever put them there (`torch.nn.utils.prune` too): bool, (out, in, ...), by layer."""
    found: dict[str, Tensor] = {}
    for name, layer in model.named_modules():
        if _is_masked(layer):
            mask: Tensor = layer.weight_mask != 0
            found[name] = (mask.T if isinstance(layer, linear_kinds()[1]) else mask).contiguous()
    return found


def bake(model: nn.Module) -> nn.Module:
    """Make masked weights plain weights with zeros (`prune.remove`), in place; returns the model, which can be saved again."""
    with torch.no_grad():
        for layer in model.modules():
            if _is_masked(layer):
                prune.remove(layer, "weight")
    vars(model).pop("save_pretrained", None)
    return model


def take_masks(model: nn.Module) -> nn.Module:
    """Take the masks off, the weights whole again as they are behind them, in place; returns the model."""
    for layer in model.modules():
        if _is_masked(layer):
            layer.weight_mask.fill_(1)  # type: ignore[operator]
    return bake(model)


def hold(optimizer: torch.optim.Optimizer, masks: Iterable[tuple[Tensor, Tensor]]) -> Any:
    """After every step of `optimizer`, zero the masked entries of weights and of all state of their shape. Returns a handle to `remove`.

    `masks` pairs a parameter with a bool mask in its own layout. Masked by `put_masks` a model needs none of this; it is for plain
    weights with zeros, which momentum and weight decay would bring back to life. Raises ValueError for a parameter that is
    not the optimiser's, or a mask of another shape.
    """
    known = {id(p) for group in optimizer.param_groups for p in group["params"]}
    pairs = [(weight, checks.tensor("mask", mask, dtype="bool").to(weight.device)) for weight, mask in masks]
    for weight, mask in pairs:
        if id(weight) not in known:
            raise ValueError(f"masks must be of the optimiser's parameters, got another of shape {tuple(weight.shape)}")
        if weight.shape != mask.shape:
            raise ValueError(
                f"masks must have the shape of the parameter, {tuple(weight.shape)}, got {tuple(mask.shape)}"
            )

    def zero(*_: Any) -> None:
        with torch.no_grad():
            for weight, mask in pairs:
                weight.masked_fill_(~mask, 0)
                for value in optimizer.state.get(weight, {}).values():
                    if isinstance(value, Tensor) and value.shape == mask.shape:
                        value.masked_fill_(~mask, 0)

    zero()
    return optimizer.register_step_post_hook(zero)


def _read(model: nn.Module) -> set[nn.Module]:
    """Layers whose weight is read and whose `forward`, with the hook that masks, is not called."""
    short: set[nn.Module] = set()
    if hasattr(model, "config"):
        short = {m for m in model.modules() if isinstance(m, nn.Conv1d) and m.groups == m.in_channels > 1}
    return bypassed(model) | short


def _layers(found: Mapping[str, Any]) -> str:
    return f"{len(found)} layer{'' if len(found) == 1 else 's'}"


def _is_masked(layer: nn.Module) -> bool:
    return "weight_mask" in layer._buffers and "weight_orig" in layer._parameters


def _checked(model: nn.Module, masks: Mapping[str, Tensor]) -> dict[str, nn.Module]:
    """The layers to mask, by name: those of `masks`."""
    if not isinstance(masks, Mapping):
        raise TypeError(f"masks must be a mapping of layers to tensors, got {type(masks).__name__}")
    known = dict(model.named_modules(remove_duplicate=False))
    kinds, experts, read = (*linear_kinds(), *CONVOLUTIONS), fused_experts(model), _read(model)
    layers: dict[str, nn.Module] = {}
    for name, mask in masks.items():
        layer = known.get(name)
        if name in experts:
            raise ValueError(f"masks must name layers, got the fused experts {name!r}: open them first (linears.open_)")
        if layer is None or type(layer) not in kinds or layer in read:  # others are read, not called: no hook would run
            raise ValueError(f"masks must name linear layers or convolutions that the model calls, got {name!r}")
        weight = matrix(layer)
        checks.tensor(f"masks[{name!r}]", mask, dtype="bool")
        if mask.shape != weight.shape:
            raise ValueError(f"masks[{name!r}] must have shape {tuple(weight.shape)}, got {tuple(mask.shape)}")
        if any(layer is other for other in layers.values()):
            raise ValueError(f"masks must name every layer once, got {name!r} under two names")
        layers[name] = layer
    _check_ties(model, layers, masks)
    return layers


def _check_ties(model: nn.Module, layers: Mapping[str, nn.Module], masks: Mapping[str, Tensor]) -> None:
    """Layers that share a weight must all be masked, alike."""
    mask_of = {id(layer): (name, masks[name]) for name, layer in layers.items()}
    holders: dict[int, list[tuple[str, nn.Module]]] = {}
    for name, module in model.named_modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                holders.setdefault(id(parameter), []).append((name, module))
    for name, layer in layers.items():
        weight = layer._parameters.get("weight_orig", layer._parameters.get("weight"))
        for other_name, other in holders.get(id(weight), []):
            if other is layer:
                continue
            if id(other) not in mask_of:
                raise ValueError(
                    f"masks must reach all that share a weight: {name!r} has that of {other_name!r}, which has no mask"
                )
            turned = isinstance(layer, linear_kinds()[1]) != isinstance(other, linear_kinds()[1])
            theirs = mask_of[id(other)][1]
            if not torch.equal(masks[name].to(theirs.device), theirs.T if turned else theirs):
                raise ValueError(
                    f"masks must be the same where a weight is shared, got two for {name!r} and {other_name!r}"
                )


def _refuse_saving(*_: Any, **__: Any) -> None:
    raise ValueError(
        "model must not be saved with masks on it, for from_pretrained would draw new weights: bake the masks first, or save its state dict"
    )
