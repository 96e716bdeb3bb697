"""BatchNorm folded into the convolution before it: in inference it is a scale and a shift, which the weights can hold.

folded = fold_batch_norm(model.eval(), images)      # a copy; logits as before up to rounding
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
TOLERANCE = 1e-4  # largest difference after folding, as a share of the largest output


def fold_batch_norm(model: nn.Module, example: Tensor) -> nn.Module:
    """A copy of `model` (in eval mode) whose batch norms are in the weights of the layers before them, where that is the same.

    Pairs are found by running the model on `example`: a norm whose input is the very tensor that a convolution or a linear layer gave,
    both called once. The copy's outputs on `example` are then compared, since a model may use what the convolution gave elsewhere too:
    pairs that change the outputs are left as they were. A shared layer or norm is left alone. `model.folded` of the copy says how many
    of how many norms went. Raises ValueError for a model in training mode: its norms depend on the batch.

    >>> net = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU()).eval()
    >>> fold_batch_norm(net, torch.zeros(1, 3, 8, 8)).folded
    (1, 1)
    """
    norms = [module for module in model.modules() if isinstance(module, NORMS)]
    if model.training or any(norm.training for norm in norms):
        raise ValueError("model must be in eval mode: a BatchNorm that is training depends on the batch")
    with torch.no_grad():
        expected = _flat(model(example))
        folded = copy.deepcopy(model)
        pairs = _pairs(folded, example)
        done = _fold(folded, pairs)
        if done and not _alike(expected, _flat(folded(example))):
            # one pair or more is not what it seems: each is tried by itself
            folded, done = copy.deepcopy(model), 0
            for place in range(len(pairs)):
                tried = copy.deepcopy(folded)
                one = [pair for pair in _pairs(tried, example) if pair in pairs[place : place + 1]]
                if _fold(tried, one) and _alike(expected, _flat(tried(example))):
                    folded, done = tried, done + 1
    folded.__dict__["folded"] = (done, len(norms))
    return folded


def _pairs(model: nn.Module, example: Tensor) -> list[tuple[str, str]]:
    """Names of (layer, norm) where the norm was given the very tensor that the layer gave, each of them called once."""
    gave: dict[int, tuple[str, Tensor]] = {}  # the tensors are kept, so that no other can take their address
    calls: dict[str, int] = {}
    found: list[tuple[str, str]] = []
    hooks = []

    def after(name: str) -> Any:
        def hook(module: nn.Module, given: tuple[Any, ...], out: Tensor) -> None:
            calls[name] = calls.get(name, 0) + 1
            if out.ndim == 2 or not isinstance(
                module, nn.Linear
            ):  # of tokens, a norm's channels are not the last dimension
                gave[id(out)] = (name, out)

        return hook

    def before(name: str) -> Any:
        def hook(module: nn.Module, given: tuple[Any, ...]) -> None:
            calls[name] = calls.get(name, 0) + 1
            layer, _ = gave.get(id(given[0]), ("", None))
            if layer:
                found.append((layer, name))

        return hook

    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) or (isinstance(module, nn.modules.conv._ConvNd) and not module.transposed):
            hooks.append(module.register_forward_hook(after(name)))
        elif isinstance(module, NORMS) and module.track_running_stats:
            hooks.append(module.register_forward_pre_hook(before(name)))
    try:
        model(example)
    finally:
        for hook in hooks:
            hook.remove()
    layers = [layer for layer, _ in found]
    return [(layer, norm) for layer, norm in found if calls[layer] == calls[norm] == 1 and layers.count(layer) == 1]


def _fold(model: nn.Module, pairs: list[tuple[str, str]]) -> int:
    for layer, norm in pairs:
        before: Any = model.get_submodule(layer)
        after: Any = model.get_submodule(norm)
        fuse: Any = fuse_linear_bn_eval if isinstance(before, nn.Linear) else fuse_conv_bn_eval
        model.set_submodule(layer, fuse(before, after))
        model.set_submodule(norm, nn.Identity())
    return len(pairs)


def _alike(expected: list[Tensor], found: list[Tensor]) -> bool:
    return all(
        bool((a - b).abs().max() <= TOLERANCE * a.abs().max().clamp(min=1e-12)) if a.numel() else True
        for a, b in zip(expected, found, strict=True)
    )


def _flat(out: Any) -> list[Tensor]:
    """The floating-point tensors of an output of whatever shape."""
    from torch.utils._pytree import tree_leaves

    return [leaf.float() for leaf in tree_leaves(out) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
