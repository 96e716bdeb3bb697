"""Advancing model pruning via bi-level optimisation (BiP, arXiv 2210.04092): masks and weights learned in turn, in one run.

    pruner = BilevelPruner(model, loss, density=0.05)        a score for every weight; the first mask is magnitude's
    for upper, lower in pairs_of_batches:
        pruner.step(upper, lower)                            weights on one batch, scores and masks on the other
    masks = pruner.finish()                                  masks in the form of torch.nn.utils.prune, on the model
    compact(model, probe, granularity="filters")             pruned filters taken out for real

The upper problem chooses the mask m, the lower one the weights under it: min over m of l(m * theta*(m)), where theta*(m) minimises
l(m * theta) + gamma / 2 |theta|^2. Without the Hessian of l the derivative of theta*(m) is diagonal, and what is left of the upper
gradient needs first derivatives only (`upper_gradient`). Each step costs two forward and backward passes, whatever the density.

When not to use it: single weights that are zero save no time in dense kernels; for speed prune filters or channels. Weights should be
float32: the steps of the scores are too small for bfloat16, which has their dtype. It needs labelled data and a loss; where one-shot
magnitude pruning and as much training are as accurate, they are simpler (evidence: `bip/pruning-speedup`).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from assay import checks
from assay.methods.core.sparsity.masks import bake, prunable, put_masks
from assay.methods.core.sparsity.projections import emptied, global_, structured
from assay.methods.core.sparsity.removal import Masked, Removed, dead, remove
from assay.methods.core.sparsity.straight_through import learn_scores, reproject, settle_scores
from assay.methods.core.sparsity.units import groups

Granularity = Literal["weights", "filters", "channels"]
GRANULARITIES: tuple[Granularity, ...] = get_args(Granularity)
Variant = Literal["paper", "as_released"]
VARIANTS: tuple[Variant, ...] = get_args(Variant)


def upper_gradient(weight: Tensor, mask: Tensor, gradient: Tensor, *, inverse_gamma: float = 1e-4) -> Tensor:
    """The gradient of the upper problem by the mask, (theta - m g / gamma) g, element by element; all of one shape.

    `gradient` is g, that of the loss by the masked weight m * theta, and `inverse_gamma` is 1 / gamma. With 0 it is theta g, the plain
    straight-through gradient of HYDRA; where m is 0 it is theta g too, so that what is pruned can come back. At an optimum of the
    lower problem theta = -m g / gamma, and kept weights have 2 theta g.

    >>> ones, zero_one = torch.ones(2), torch.tensor([0.0, 1.0])
    >>> upper_gradient(2 * ones, zero_one, 3 * ones, inverse_gamma=0.5)
    tensor([6.0000, 1.5000])
    """
    inverse_gamma = checks.number("inverse_gamma", inverse_gamma, low=0)
    checks.tensor("weight", weight)
    checks.tensor("mask", mask, dtype="any")
    checks.tensor("gradient", gradient)
    for name, other in (("mask", mask), ("gradient", gradient)):
        if other.shape != weight.shape:
            raise ValueError(
                f"{name} must have the shape of the weight, {tuple(weight.shape)}, got {tuple(other.shape)}"
            )
    return (weight - inverse_gamma * mask * gradient) * gradient


def masks_for(
    scores: Mapping[str, Tensor],
    density: float,
    granularity: Granularity = "weights",
    sizes: Mapping[str, int] | None = None,
) -> dict[str, Tensor]:
    """The masks of all layers from |scores|, (out, in, ...): True stays.

    "weights": one threshold over all layers; int((1 - density) n) of all n weights go. "filters": of each layer by itself
    int((1 - density) outputs), those with the least L2 norm; "channels": the same of its inputs, in units of `sizes[layer]`
    neighbouring ones (1 unless given). Ties and the decimal reading of `density` are those of `core.sparsity.projections`.

    >>> masks_for({"a": torch.tensor([[3.0, 1.0]]), "b": torch.tensor([[2.0, 0.0]])}, 0.5)
    {'a': tensor([[ True, False]]), 'b': tensor([[ True, False]])}
    """
    checks.choice("granularity", granularity, GRANULARITIES)
    if granularity == "weights":
        return global_(scores, density)
    axis, units = (0 if granularity == "filters" else 1), sizes or {}
    return {name: structured(x, density, axis=axis, size=units.get(name, 1)) for name, x in scores.items()}


class BilevelPruner:
    """Learned masks on a trained dense `model`, and the two kinds of steps that train them and the weights under them.

    `loss(model, batch)` returns a scalar; the model's mode (`train()`) is the caller's business. Scores begin as copies of the weights.
    A step of `lower` is SGD on all weights of the model with the masks fixed; pruned ones have gradient 0 and only weight decay, and what
    momentum is left, moves them. A step of `upper` is SGD on the scores along `upper_gradient` times the sign of each score, then the
    masks are made anew. Running statistics of norms move in both. The optimisers, `lower_optimizer` and `upper_optimizer`, are plain
    `torch.optim.SGD`, to put a schedule on (the paper: a cosine and a step schedule). `scored` has the parametrisations by layer, with
    `scores` and `mask`.

    `names` are the layers to mask: with granularity "weights" all of `core.sparsity.masks.prunable` (of transformers' models not the
    output layer); with "filters" those whose outputs, with "channels" those whose inputs can be taken out of the model
    (`core.sparsity.units.groups`, plain chains of layers). Biases and norms stay dense. `density` is the share that stays, of all
    weights together or of each layer's units.

    `rate` to `weight_decay` are the paper's for CIFAR: 0.1, 0.1, 0.9, 1e-4, and `inverse_gamma` 1e-4. `variant="as_released"` is the
    released trainer, where the score's own gradient h stands for the weight's: h - h^2 / gamma; its scores can decay
    (`mask_weight_decay`).

    The weights are changed in place and parametrised (`torch.nn.utils.parametrize`) until `finish`. Warns when a layer has no weight
    left. Raises TypeError or ValueError, before anything is changed, for what does not fit: tied, masked or unknown layers, frozen models.

    >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> pruner = BilevelPruner(model, lambda model, x: model(x).square().mean(), density=0.5)
    >>> losses = [pruner.step(upper, lower) for upper, lower in zip(torch.randn(3, 5, 4), torch.randn(3, 5, 4))]
    >>> masks = pruner.finish()
    >>> sum(int(mask.sum()) for mask in masks.values()), sorted(model.state_dict())[:3]
    (24, ['0.bias', '0.weight_mask', '0.weight_orig'])
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Callable[[nn.Module, Any], Tensor],
        *,
        density: float,
        names: Sequence[str] | None = None,
        granularity: Granularity = "weights",
        inverse_gamma: float = 1e-4,
        variant: Variant = "paper",
        rate: float = 0.1,
        mask_rate: float = 0.1,
        momentum: float = 0.9,
        weight_decay: float = 1e-4,
        mask_weight_decay: float = 0.0,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
        if not callable(loss):
            raise TypeError(f"loss must be a function of the model and a batch, got {checks.shown(loss)}")
        if names is not None and (isinstance(names, str) or not isinstance(names, Sequence)):
            raise TypeError(f"names must be a sequence of layers, got {checks.shown(names)}")
        self.density = checks.number("density", density, above=0, high=1)
        checks.choice("granularity", granularity, GRANULARITIES)
        checks.choice("variant", variant, VARIANTS)
        self._inverse_gamma = checks.number("inverse_gamma", inverse_gamma, low=0)
        rate, mask_rate = checks.number("rate", rate, above=0), checks.number("mask_rate", mask_rate, above=0)
        momentum = checks.number("momentum", momentum, low=0, below=1)
        weight_decay = checks.number("weight_decay", weight_decay, low=0)
        mask_weight_decay = checks.number("mask_weight_decay", mask_weight_decay, low=0)
        if not any(parameter.requires_grad for parameter in model.parameters()):
            raise ValueError("model must have weights that are trained, got a frozen one")
        sizes = _units(model, granularity)
        wanted = list(sizes) if names is None else list(dict.fromkeys(names))
        if names is not None and not wanted:
            raise ValueError("names must be at least one layer, got none")
        if not wanted:
            raise ValueError(f"model must have {granularity} that can be pruned, got none in {type(model).__name__}")
        known = prunable(model, head=True)
        if odd := [name for name in wanted if name not in known]:  # the masks could not be put on in the end
            raise ValueError(f"names must be linear layers or convolutions that the model calls, got {odd[0]!r}")
        self.model, self.loss, self.variant = model, loss, variant
        self._project = partial(masks_for, density=self.density, granularity=granularity, sizes=sizes)
        rule = partial(upper_gradient, inverse_gamma=self._inverse_gamma if variant == "paper" else 0.0)
        self.scored = learn_scores(model, wanted, self._project, rule=rule)
        self._scores = [unit.scores for unit in self.scored.values()]
        own = {id(scores) for scores in self._scores}
        self._weights = [p for p in model.parameters() if p.requires_grad and id(p) not in own]
        self.lower_optimizer = torch.optim.SGD(self._weights, rate, momentum=momentum, weight_decay=weight_decay)
        self.upper_optimizer = torch.optim.SGD(
            self._scores, mask_rate, momentum=momentum, weight_decay=mask_weight_decay
        )
        self._finished, self._emptied = False, set[str]()
        self._warn_of_empty_layers()

    def step(self, batch_upper: Any, batch_lower: Any) -> tuple[float, float]:
        """A step of the lower problem, then one of the upper; their losses, the upper first.

        Raises ValueError for one batch in both places: the weights have just been fitted to it, which biases the upper gradient.
        """
        if batch_upper is batch_lower:
            raise ValueError("batch_upper must be another batch than batch_lower, got the same one")
        below = self.lower(batch_lower)
        return self.upper(batch_upper), below

    def lower(self, batch: Any) -> float:
        """One step of SGD on the weights, the masks fixed; the loss before it.

        Raises ValueError, before anything is changed but running statistics, for a loss or gradients that are not finite.
        """
        for scores in self._scores:
            scores.requires_grad_(False)  # their gradient is not needed here
        try:
            value = self._loss(batch)
            found = torch.autograd.grad(value, self._weights, allow_unused=True)
        finally:
            for scores in self._scores:
                scores.requires_grad_(True)
        _descend(self.lower_optimizer, self._weights, found)
        return float(value.detach())

    def upper(self, batch: Any) -> float:
        """One projected step on the scores, the weights fixed; the loss before it. Raises as `lower` does."""
        value = self._loss(batch)
        found: Sequence[Tensor | None] = torch.autograd.grad(value, self._scores, allow_unused=True)
        if self.variant == "as_released":
            found = [None if g is None else g - self._inverse_gamma * g.square() for g in found]
        _descend(self.upper_optimizer, self._scores, found)
        reproject(self.model, self.scored, self._project)
        self._warn_of_empty_layers()
        return float(value.detach())

    def finish(self) -> dict[str, Tensor]:
        """Take scores and parametrisations off and put the last masks on (`core.sparsity.masks.put_masks`); returns them, (out, in, ...).

        The weights behind the masks are whole. The pruner cannot be used any more.
        """
        self._open()
        masks = settle_scores(self.model, self.scored)
        put_masks(self.model, masks)
        self._finished = True
        return masks

    def _open(self) -> None:
        if self._finished:
            raise ValueError("pruner must not be used after finish: its scores are off the model")

    def _loss(self, batch: Any) -> Tensor:
        self._open()
        value = self.loss(self.model, batch)
        if not isinstance(value, Tensor) or value.numel() != 1:
            raise TypeError(f"loss must return a tensor of one number, got {checks.shown(value)}")
        if not value.requires_grad:
            raise ValueError("loss must come from the model with gradients, got a tensor without any")
        if not bool(torch.isfinite(value)):
            raise ValueError(f"loss must be finite, got {float(value.detach())}")
        return value

    def _warn_of_empty_layers(self) -> None:
        for name in emptied({name: unit.mask for name, unit in self.scored.items()}):
            if name not in self._emptied:
                self._emptied.add(name)
                warnings.warn(
                    f"no weight of {name!r} is left at density {self.density:g}: nothing passes through it",
                    stacklevel=3,
                )


def compact(model: nn.Module, probe: Any, *, granularity: Literal["filters", "channels"] = "filters") -> Removed:
    """Take pruned filters or channels out of a model that `BilevelPruner.finish` left, in place; parameters and MACs before and after.

    Masks become zeros first (`masks.bake`). Pruned filters still give what their biases and norms say, a constant, which goes into the
    next layer's bias; where padding makes it differ at the borders, removal is refused. `probe` is a batch of inputs: the model must
    answer it as before. Raises what `core.sparsity.removal.remove` raises.
    """
    checks.choice("granularity", granularity, ("filters", "channels"))
    masked: Masked = "weights" if granularity == "filters" else "outputs"
    bake(model)
    return remove(model, dead(model, masked=masked), masked=masked, probe=probe)


def _units(model: nn.Module, granularity: Granularity) -> dict[str, int]:
    """The layers that are masked unless others are named, and how many neighbouring places of each are a unit."""
    if granularity == "weights":
        return dict.fromkeys(prunable(model), 1)
    found = {}
    for group in groups(model).values():
        if group.kind == "channels":
            for cut in group.producers if granularity == "filters" else group.consumers:
                found[cut.layer] = cut.segments[0][1]
    return found


def _descend(optimizer: torch.optim.Optimizer, parameters: Sequence[Tensor], found: Sequence[Tensor | None]) -> None:
    """One step along the gradients `found`. Raises ValueError, before it, for some that are not finite."""
    size = torch.nn.utils.get_total_norm([gradient for gradient in found if gradient is not None])
    if not bool(torch.isfinite(size)):  # a loss can be finite and its gradient not
        raise ValueError(f"gradients of the loss must be finite, got some of norm {float(size)}")
    for parameter, gradient in zip(parameters, found, strict=True):
        parameter.grad = gradient
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
