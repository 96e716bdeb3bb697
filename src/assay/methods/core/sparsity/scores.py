"""How much a weight matters: the scores that masks are made from. The larger, the more it is worth keeping.

All functions are element-wise over tensors of one shape, (out, in, ...) for weights, and return float32 or wider, without gradient;
`projections` turns scores into masks. A learned score is a parameter: `straight_through.ScoredMask`.

    >>> weight, gradient = torch.tensor([[1.0, -2.0]]), torch.tensor([[3.0, 1.0]])
    >>> magnitude(weight), snip(weight, gradient), movement(weight, gradient)
    (tensor([[1., 2.]]), tensor([[3., 2.]]), tensor([[-3.,  2.]]))
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from assay import checks

Norm = Literal["l1", "l2", "max", "sum"]
NORMS: tuple[Norm, ...] = get_args(Norm)


def magnitude(weight: Tensor) -> Tensor:
    """|w|."""
    return _wide("weight", weight).abs()


def snip(weight: Tensor, gradient: Tensor) -> Tensor:
    """|w g|, g the gradient of the loss: the change of the loss to first order when w becomes 0 (SNIP, arXiv 1810.02340).

    SNIP divides by the sum over the model, which changes no order and is left out.
    """
    w, g = _pair(weight, gradient)
    return (w * g).abs()


def taylor(weight: Tensor, gradients: Iterable[Tensor], over: Sequence[int] = ()) -> Tensor:
    """The mean over `gradients` (one a batch, taken as they come) of (sum of w g)^2, the sum running over the dimensions `over`.

    Arguments like those of arXiv 1906.10771: with `over=(1, 2, 3)` the importance of a whole filter, without `over` that of each
    weight. Summed dimensions stay, with length 1. Raises ValueError without a gradient.
    """
    total, count = None, 0
    for gradient in gradients:
        w, g = _pair(weight, gradient)
        change = w * g
        change = (change.sum(tuple(over), keepdim=True) if len(over) else change).square()
        total, count = change if total is None else total + change, count + 1
    if total is None:
        raise ValueError("gradients must hold at least one tensor, got none")
    return total / count


def wanda(weight: Tensor, norms: Tensor) -> Tensor:
    """|w| times the norm of its input (arXiv 2306.11695), to be compared within a row: `projections.per_row`.

    `norms` comes from `core.layers.inputs.input_norms` and broadcasts over the weight.
    """
    checks.tensor("norms", norms, finite=True)
    if not bool((norms >= 0).all()):
        raise ValueError(f"norms must be at least 0, got {float(norms.min()):g}")
    w = _wide("weight", weight)
    try:
        shape = torch.broadcast_shapes(w.shape, norms.shape)
    except RuntimeError:
        shape = torch.Size()
    if shape != w.shape:
        raise ValueError(f"norms must broadcast over the weight {tuple(w.shape)}, got {tuple(norms.shape)}")
    return (w.abs() * norms.to(w.device)).to(w.dtype)


def movement(weight: Tensor, gradient: Tensor) -> Tensor:
    """-w g of one step; the sum over the steps of a fine-tuning is the score of movement pruning (arXiv 2005.07683).

    Positive for weights that gradient descent moves away from 0, whatever their size.
    """
    w, g = _pair(weight, gradient)
    return -(w * g)


def grouped(scores: Tensor, axis: int, size: int = 1, norm: Norm = "l2") -> Tensor:
    """One score for every `size` consecutive places along `axis` (filters, channels, heads): (places / size,).

    "l2" and "l1" are norms over everything in the group, "max" its largest magnitude, "sum" the plain sum.
    Raises ValueError where `size` does not divide the axis.

    >>> grouped(torch.tensor([[3.0, 4.0], [0.0, 1.0]]), axis=0)
    tensor([5., 1.])
    """
    checks.choice("norm", norm, NORMS)
    rows = rows_along(_wide("scores", scores), axis, size)
    if norm == "sum":
        return rows.sum(1)
    if norm == "max":
        return rows.abs().amax(1)
    return rows.norm(dim=1, p=1 if norm == "l1" else 2)


def rows_along(x: Tensor, axis: int, size: int) -> Tensor:
    """`x` with every `size` consecutive places of `axis` as a row: (places / size, the rest)."""
    axis = checks.whole("axis", axis, low=-x.dim(), high=x.dim() - 1)
    size = checks.whole("size", size, low=1)
    if x.shape[axis] % size:
        raise ValueError(f"size must divide the {x.shape[axis]} places of axis {axis}, got {size}")
    return x.movedim(axis, 0).reshape(x.shape[axis] // size, -1)


def gradients(
    model: nn.Module, weights: Mapping[str, Tensor], batches: Iterable[Any], loss: Callable[[nn.Module, Any], Tensor]
) -> Iterator[dict[str, Tensor]]:
    """The gradients of `loss(model, batch)` with respect to the named `weights`, one dictionary a batch; `.grad` is left alone.

    A weight that a batch does not use has the gradient 0. Raises ValueError for a loss that is not finite.

    >>> layer = nn.Linear(2, 1, bias=False)
    >>> found = gradients(layer, {"weight": layer.weight}, [torch.ones(1, 2)], lambda model, x: model(x).sum())
    >>> next(found)["weight"]
    tensor([[1., 1.]])
    """
    names = list(weights)
    for batch in batches:
        value = loss(model, batch)
        if not bool(torch.isfinite(value)):
            raise ValueError(f"loss must be finite, got {float(value.detach())}")
        found = torch.autograd.grad(value, [weights[name] for name in names], allow_unused=True)
        yield {
            name: torch.zeros_like(weights[name]) if gradient is None else gradient.detach()
            for name, gradient in zip(names, found, strict=True)
        }


def _wide(name: str, x: Tensor) -> Tensor:
    """`x` without its gradient, in float32 where it was narrower: scores of bfloat16 weights would tie all the time."""
    kept = checks.tensor(name, x).detach()
    return kept if kept.dtype == torch.float64 else kept.float()


def _pair(weight: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
    w, g = _wide("weight", weight), _wide("gradient", gradient)
    if w.shape != g.shape:
        raise ValueError(f"gradient must have the shape of the weight, {tuple(w.shape)}, got {tuple(g.shape)}")
    return w, g.to(w)
