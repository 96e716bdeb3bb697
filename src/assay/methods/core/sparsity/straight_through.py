"""Gradients past a mask: the one straight-through core, and scores that are learned with it.

    weight * straight_through(scores.abs(), mask)     HYDRA and edge-popup: the mask's gradient goes to the scores
    straight_through(weight, weight * mask)           SR-STE: the weight gets the whole gradient, as if nothing were masked
    masked(weight, scores, mask, rule)                the first of these, with another rule for the scores' gradient (BiP's, say)

    >>> weight, scores = torch.tensor([2.0, 3.0]), torch.tensor([0.5, -1.0], requires_grad=True)
    >>> mask = torch.tensor([False, True])
    >>> (weight * straight_through(scores.abs(), mask)).sum().backward()
    >>> scores.grad  # w, and the sign of the score
    tensor([ 2., -3.])

A masked weight gets no gradient from the product, and only weight decay moves it; its score does, so that it can come back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from assay import checks
from assay.methods.core.layers.surgery import linear_kinds, tied_names
from assay.methods.core.sparsity.projections import check_all

Rule = Callable[
    [Tensor, Tensor, Tensor], Tensor
]  # (weight, mask, gradient of the masked weight) -> gradient of the mask
Project = Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]]  # scores of all layers -> their masks


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, value: Tensor) -> Tensor:
        return value.to(x.dtype, copy=True)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def straight_through(x: Tensor, value: Tensor) -> Tensor:
    """`value`, in the dtype of `x`, whose gradient goes to `x` unchanged. Raises ValueError for different shapes."""
    if x.shape != value.shape:
        raise ValueError(f"value must have the shape of x, {tuple(x.shape)}, got {tuple(value.shape)}")
    return cast(Tensor, _StraightThrough.apply(x, value.detach()))


class _Masked(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, scores: Tensor, mask: Tensor, rule: Rule | None) -> Tensor:
        ctx.save_for_backward(weight, scores, mask)
        ctx.rule = rule
        return weight * mask

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        weight, scores, mask = ctx.saved_tensors
        to_weight = grad * mask if ctx.needs_input_grad[0] else None
        to_scores = None
        if ctx.needs_input_grad[1]:
            found = weight * grad if ctx.rule is None else ctx.rule(weight, mask.to(weight.dtype), grad)
            to_scores = found.to(scores.dtype) * torch.where(scores < 0, -1.0, 1.0).to(scores.dtype)
        return to_weight, to_scores, None, None


def masked(weight: Tensor, scores: Tensor, mask: Tensor, rule: Rule | None = None) -> Tensor:
    """`weight` times `mask`, in the dtype of `weight`, with gradients to both `weight` (mask * g) and `scores`.

    g is the gradient of the result. The mask's own gradient is `rule(weight, mask, g)`, weight * g by default (the exact derivative
    of weight * mask by the mask), and reaches the scores times the sign of each (1 for 0), since masks rank |scores|. Higher
    derivatives are not defined.
    """
    checks.tensor("weight", weight)
    checks.tensor("scores", scores)
    checks.tensor("mask", mask, dtype="bool")
    for name, other in (("scores", scores), ("mask", mask)):
        if other.shape != weight.shape:
            raise ValueError(
                f"{name} must have the shape of the weight, {tuple(weight.shape)}, got {tuple(other.shape)}"
            )
    return cast(Tensor, _Masked.apply(weight, scores, mask, rule))


class ScoredMask(nn.Module):
    """A parametrisation of a weight by its own values and a learned score: weight * mask, the mask made of the scores.

    Put on by `learn_scores`. `mask` (bool) changes only in `reproject`: ranking in every forward pass would cost a sort each time.
    """

    mask: Tensor

    def __init__(self, scores: Tensor, rule: Rule | None = None) -> None:
        super().__init__()
        self.scores = nn.Parameter(scores)
        self.rule = rule
        self.register_buffer("mask", torch.ones_like(scores, dtype=torch.bool))

    def forward(self, weight: Tensor) -> Tensor:
        return masked(weight, self.scores, self.mask, self.rule)


def learn_scores(
    model: nn.Module,
    names: Iterable[str],
    project: Project,
    *,
    scores: Mapping[str, Tensor] | None = None,
    rule: Rule | None = None,
) -> dict[str, ScoredMask]:
    """Put a learned score on the weights of the named layers (`torch.nn.utils.parametrize`), and make the first masks.

    `scores` start as a copy of the weights, so that the first mask is magnitude's; they have the layout of the layer's own
    weight, which of `Conv1D` is (in, out). `project` takes |scores| of all layers, (out, in, ...), to their masks: `projections.global_`
    at a density, say. Train as usual, with an optimiser of its own for the scores if need be, and call `reproject` after its steps;
    `settle_scores` gives masks for `masks.put_masks` and takes the parametrisation off.

    Raises ValueError, before anything is changed, for a layer without a weight of its own: tied, masked or parametrised already.

    >>> from functools import partial
    >>> from assay.methods.core.sparsity.projections import global_
    >>> model = nn.Sequential(nn.Linear(4, 4, bias=False))
    >>> scored = learn_scores(model, ["0"], partial(global_, density=0.25))
    >>> int((model[0].weight != 0).sum())
    4
    >>> masks = settle_scores(model, scored)
    >>> int(masks["0"].sum()), int((model[0].weight != 0).sum())
    (4, 16)
    """
    wanted, start = list(names), scores or {}
    layers = dict(model.named_modules())
    for name in wanted:
        weight = getattr(layers.get(name), "_parameters", {}).get("weight")
        if weight is None or parametrize.is_parametrized(layers[name]):
            raise ValueError(f"names must be layers with a weight of their own, got {name!r}")
        if len(tied := tied_names(model, weight)) > 1:
            raise ValueError(f"names must be layers whose weight is not tied, got {name!r}, which shares {tied}")
        if name in start and start[name].shape != weight.shape:
            raise ValueError(
                f"scores[{name!r}] must have the shape of the weight, {tuple(weight.shape)}, got {tuple(start[name].shape)}"
            )
    if odd := [name for name in start if name not in wanted]:
        raise ValueError(f"scores must be of the named layers, got some of {odd[0]!r}")
    scored = {}
    for name in wanted:
        weight = cast(Any, layers[name]).weight.detach()
        scored[name] = ScoredMask(start.get(name, weight).detach().to(weight).clone(), rule)
    first = _projected(model, scored, project)
    for name, unit in scored.items():
        unit.mask = first[name]
        parametrize.register_parametrization(layers[name], "weight", unit)
    return scored


def reproject(model: nn.Module, scored: Mapping[str, ScoredMask], project: Project) -> None:
    """New masks for all layers from their scores of now."""
    for name, mask in _projected(model, scored, project).items():
        scored[name].mask.copy_(mask)


def settle_scores(model: nn.Module, scored: Mapping[str, ScoredMask]) -> dict[str, Tensor]:
    """Take the parametrisation off again, the weights whole, and return the last masks, (out, in, ...)."""
    masks = {}
    for name, unit in scored.items():
        layer: Any = model.get_submodule(name)
        turned = isinstance(layer, linear_kinds()[1])
        masks[name] = unit.mask.T.contiguous() if turned else unit.mask.clone()
        parametrize.remove_parametrizations(layer, "weight", leave_parametrized=False)
    return masks


def _projected(model: nn.Module, scored: Mapping[str, ScoredMask], project: Project) -> dict[str, Tensor]:
    """The masks of `project`, in the layout of each layer's weight."""
    turned = {name: isinstance(model.get_submodule(name), linear_kinds()[1]) for name in scored}
    magnitudes = {name: unit.scores.detach().abs() for name, unit in scored.items()}
    given = {name: x.T.contiguous() if turned[name] else x for name, x in magnitudes.items()}
    masks = project(given)
    check_all(masks, "bool")
    for name, x in given.items():
        if name not in masks or masks[name].shape != x.shape:
            raise ValueError(f"project must give a mask of shape {tuple(x.shape)} for {name!r}")
    return {name: masks[name].T.contiguous() if turned[name] else masks[name].clone() for name in scored}
