"""AWQ (arXiv 2306.00978): inputs that matter get a finer grid, by scales that are folded into what comes before.

    rounded = awq(model, batches, format="int4")      in place: scales folded, weights clipped and on the grid
    folded = fold_scales(model, batches)              the scales alone: the float model computes what it did before

The weights of an input are multiplied by s and the input divided by it: rounding W s on a grid leaves the error of that input smaller
by s. The division costs nothing where a norm, or a linear layer, makes the inputs: its own weights take it. s = (mean |x|)^alpha,
with the alpha of least output error on the calibration data; then every group's range is narrowed where that helps.

When NOT to use it: where the layers are not behind norms or linear layers that can take the scales (`folds` says which are), only
the clipping is left.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_iter, tree_map

from assay import checks
from assay.methods.core.layers.inputs import input_moments, run, watch
from assay.methods.core.layers.surgery import linear_kinds, tied_names
from assay.methods.core.quantize.gptq import matrix, targets
from assay.methods.core.quantize.grids import Grid, Rounded, output_error

PAIRS = (  # a linear layer whose outputs, each by itself, become the inputs of another; proven by trying, since activations decide
    ("up_proj", "down_proj"),
    ("v_proj", "o_proj"),
    ("v_proj", "out_proj"),
    ("fc1", "fc2"),
    ("c_fc", "c_proj"),
    ("wi_1", "wo"),
    ("wi", "wo"),
)
CLIPS = tuple(1 - i / 20 for i in range(11))  # of a group's largest weight
LEAST = 1e-4  # of mean |x|: an input that hardly occurs keeps a finite scale
TOLERANCE = {
    torch.float64: 2e-5,
    torch.float32: 2e-5,
    torch.float16: 1e-2,
    torch.bfloat16: 5e-2,
}  # norms compute in float32 whatever they are given


@dataclass(frozen=True)
class Fold:
    """Layers that take the same inputs, and the norm or linear layer before them that can divide these."""

    before: str
    layers: tuple[str, ...]


@dataclass(frozen=True)
class Folded:
    """A fold that was done: the scale of each input, and the alpha it came from (0: left as it was)."""

    fold: Fold
    scale: Tensor
    alpha: float


@torch.no_grad()
def folds(model: nn.Module, batch: Any) -> list[Fold]:
    """Which layers can be scaled without the float model noticing: tried out on a float32 copy and `batch`, a batch of its inputs.

    Candidates are norms whose very output a linear layer takes, and pairs of linear layers by the names of transformers' models. Where
    something else takes the output too (the residual stream of BERT, the router of a mixture), or the activation between does not
    pass a factor on, the answers change and the fold is left out.
    """
    proof = copy.deepcopy(model).float().eval()  # in half precision too little would be noticed
    given = tree_map(lambda x: x.float() if isinstance(x, Tensor) and x.is_floating_point() else x, batch)
    candidates = _candidates(proof, given)
    modules = dict(proof.named_modules())
    wanted = _answers(proof, given)

    def harmless(some: Sequence[Fold]) -> bool:
        parts = {name for fold in some for name in (fold.before, *fold.layers)}
        saved = [(p, p.detach().clone()) for name in parts for p in modules[name].parameters(recurse=False)]
        random = torch.Generator().manual_seed(0)
        try:
            for fold in some:
                width = matrix(modules[fold.layers[0]]).shape[1]
                if not _fold(
                    modules, fold, torch.exp2(torch.rand(width, generator=random, dtype=torch.float64) * 2 - 1)
                ):
                    return False
            return _close(_answers(proof, given), wanted)
        finally:
            for parameter, value in saved:
                parameter.copy_(value)

    return candidates if harmless(candidates) else [fold for fold in candidates if harmless([fold])]


@torch.no_grad()
def search_scale(
    weights: Sequence[Tensor], moment: Tensor, mean: Tensor, grid: Grid, *, steps: int = 20
) -> tuple[Tensor, float]:
    """The scale (in,), float64, and alpha, of least summed output error of these weights (out, in), all with the same inputs.

    `mean` (in,) is mean |x|. alpha is tried at 0, 1 / steps, .. below 1; s is divided by the geometric mean of its ends. alpha 0 is
    rounding to nearest, so that the error is never above that.
    """
    steps = checks.whole("steps", steps, low=1)
    base = mean.double().clamp(min=max(LEAST * float(mean.double().mean()), 1e-30))
    best = (float("inf"), torch.ones_like(base), 0.0)
    for i in range(steps):
        scale = base ** (i / steps)
        scale = scale / (scale.max() * scale.min()).sqrt() if i else torch.ones_like(base)
        error = sum(output_error(w, grid.round(w.double() * scale).dense().double() / scale, moment) for w in weights)
        if error < best[0]:
            best = (error, scale, i / steps)
    return best[1], best[2]


@torch.no_grad()
def clip(weight: Tensor, moment: Tensor, grid: Grid) -> Rounded:
    """The weight on the grid with the range of each group narrowed to the share of its largest weight (1 to 0.5) that errs least.

    The error of a group is that of its own part of the outputs, so that groups are chosen apart; a row whose whole output got
    worse by it stays as rounding to nearest has it.
    """
    w = checks.tensor("weight", weight, ndim=2, finite=True).detach().double()
    rows, width = w.shape
    size = grid.group or width
    grid.check(width)
    m = moment.to(w)
    own = torch.stack([m[i : i + size, i : i + size] for i in range(0, width, size)])
    peak = w.view(rows, -1, size).abs().amax(2, keepdim=True)
    plain = grid.round(w)
    least = torch.full((rows, width // size), float("inf"), dtype=torch.float64, device=w.device)
    share = torch.ones_like(least)
    for ratio in CLIPS:
        narrowed = torch.maximum(torch.minimum(w.view(rows, -1, size), peak * ratio), -peak * ratio).view(rows, width)
        error = (grid.round(narrowed).dense().double() - w).view(rows, -1, size)
        loss = torch.einsum("rgi,gij,rgj->rg", error, own, error)
        better = loss < least
        least, share = torch.where(better, loss, least), torch.where(better, ratio, share)
    limit = peak * share[..., None]
    narrowed = torch.maximum(torch.minimum(w.view(rows, -1, size), limit), -limit).view(rows, width)

    def row_errors(rounded: Rounded) -> Tensor:
        error = rounded.dense().double() - w
        return ((error @ m) * error).sum(1)

    worse = row_errors(grid.round(narrowed)) > row_errors(plain)
    return grid.round(torch.where(worse[:, None], w, narrowed))


@torch.no_grad()
def fold_scales(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    format: str | Grid = "int4",
    names: Sequence[str] | None = None,
    steps: int = 20,
) -> list[Folded]:
    """Search the scales of all layers that can be scaled and fold them, in place: the model in float computes the same as before.

    Arguments are those of `awq`. Returns what was folded; a fold whose best alpha is 0 changes nothing.
    """
    grid, found = targets(model, format, names)
    kept = list(batches)
    return _scaled(model, kept, grid, found, checks.whole("steps", steps, low=1))[0]


@torch.no_grad()
def awq(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    format: str | Grid = "int4",
    names: Sequence[str] | None = None,
    steps: int = 20,
    clipping: bool = True,
) -> dict[str, Rounded]:
    """Put the weights of linear layers on the grid of a number format, in place; returns codes and scales by layer.

    `batches` are the model's inputs (tensors, tuples, or mappings of keyword arguments), the first of which also proves the folds.
    `format` is a name (`grids.grid_of`) or a grid; `names` are `nn.Linear` and Conv1D layers, all that fit but the output layer by
    default. Inputs are those of the float model, measured in one pass (the released code goes block by block; our choice). The
    squared error of the outputs on the calibration data, summed over layers of the same inputs, is at most that of rounding to nearest.

    Raises TypeError or ValueError, before anything is changed, for layers that do not fit.
    """
    grid, found = targets(model, format, names)
    checks.flag("clipping", clipping)
    kept = list(batches)
    _, moments = _scaled(model, kept, grid, found, checks.whole("steps", steps, low=1))
    rounded = {}
    for name, layer in found.items():
        weight = matrix(layer)
        rounded[name] = clip(weight, moments[name], grid) if clipping else grid.round(weight)
        weight.copy_(rounded[name].dense())
    return rounded


def _scaled(
    model: nn.Module, batches: Sequence[Any], grid: Grid, found: Mapping[str, nn.Module], steps: int
) -> tuple[list[Folded], dict[str, Tensor]]:
    """Folds done, and the second moments of the inputs as they are now."""
    if not batches:
        raise ValueError("batches must hold at least one batch, got none")
    moments = input_moments(model, found, batches)
    totals: dict[str, Tensor] = {}
    counts: dict[str, int] = {}

    def see(name: str, layer: nn.Module, x: Tensor) -> None:
        rows = x.reshape(-1, x.shape[-1]).abs().double()
        totals[name] = totals[name] + rows.sum(0) if name in totals else rows.sum(0)
        counts[name] = counts.get(name, 0) + len(rows)

    watch(model, found, batches, see)
    modules = dict(model.named_modules())
    done = []
    for fold in folds(model, batches[0]):
        if not set(fold.layers) <= set(found):
            continue
        first = fold.layers[0]
        weights = [matrix(modules[name]) for name in fold.layers]
        scale, alpha = search_scale(weights, moments[first], totals[first] / counts[first], grid, steps=steps)
        if alpha and not _fold(modules, fold, scale):
            scale, alpha = torch.ones_like(scale), 0.0
        done.append(Folded(fold, scale, alpha))
        for name in fold.layers:
            moments[name] = moments[name] / (scale[:, None] * scale)
    return done, moments


def _candidates(model: nn.Module, batch: Any) -> list[Fold]:
    names = {module: name for name, module in model.named_modules()}
    norms = [
        module
        for module in names
        if "Norm" in type(module).__name__ and (w := module._parameters.get("weight")) is not None and w.dim() == 1
    ]
    layers = [module for module in names if type(module) in linear_kinds() and names[module]]
    made: list[tuple[Any, nn.Module]] = []  # kept alive, so that identities stay unique
    taken: dict[nn.Module, dict[nn.Module, None]] = {}

    def note(norm: nn.Module, args: Any, out: Any) -> None:
        made.append((out, norm))

    def look(layer: nn.Module, args: tuple[Any, ...]) -> None:
        for out, norm in made:
            if out is args[0]:
                taken.setdefault(norm, {})[layer] = None

    handles = [norm.register_forward_hook(note) for norm in norms]
    handles += [layer.register_forward_pre_hook(look) for layer in layers]
    try:
        run(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    found = [Fold(names[norm], tuple(names[layer] for layer in some)) for norm, some in taken.items()]
    for module, name in names.items():
        for first, second in PAIRS:
            before, after = module._modules.get(first), module._modules.get(second)
            if (
                before is None
                or after is None
                or type(before) not in linear_kinds()
                or type(after) not in linear_kinds()
            ):
                continue
            if matrix(before).shape[0] == matrix(after).shape[1]:
                prefix = f"{name}." if name else ""
                found.append(Fold(f"{prefix}{first}", (f"{prefix}{second}",)))
    modules = dict(model.named_modules())
    return [
        fold
        for fold in found
        if all(
            len(tied_names(model, parameter)) == 1
            for name in (fold.before, *fold.layers)
            for parameter in modules[name].parameters(recurse=False)
        )
    ]


def _fold(modules: Mapping[str, nn.Module], fold: Fold, scale: Tensor) -> bool:
    """Divide what comes before by `scale`, multiply the layers' weights; False, and nothing done, for a norm that does not obey."""
    before: Any = modules[fold.before]
    if type(before) in linear_kinds():
        rows = matrix(before)
        rows.copy_((rows.double() / scale[:, None].to(rows.device)).to(rows.dtype))
        if before.bias is not None:
            before.bias.copy_((before.bias.double() / scale.to(rows.device)).to(rows.dtype))
    elif not _divide_norm(before, scale):
        return False
    for name in fold.layers:
        weight = matrix(modules[name])
        weight.copy_((weight.double() * scale.to(weight.device)).to(weight.dtype))
    return True


def _divide_norm(norm: Any, scale: Tensor) -> bool:
    """Divide the outputs of a norm by `scale`, its gain being w, or 1 + w as Gemma's; False, and nothing done, if neither does it."""
    weight: Tensor = norm.weight
    bias: Tensor | None = norm._parameters.get("bias")
    kept = weight.detach().clone(), None if bias is None else bias.detach().clone()
    scale = scale.to(weight.device)
    random = torch.Generator().manual_seed(0)
    x = torch.randn(4, len(weight), generator=random, dtype=torch.float64).to(weight)
    wanted = norm(x).double() / scale
    gains: tuple[Callable[[Tensor], Tensor], ...] = (lambda w: w / scale, lambda w: (1 + w) / scale - 1)
    for gain in gains:
        weight.copy_(gain(kept[0].double()).to(weight.dtype))
        if bias is not None and kept[1] is not None:
            bias.copy_((kept[1].double() / scale).to(bias.dtype))
        if _close([norm(x).double()], [wanted], weight.dtype):
            return True
        weight.copy_(kept[0])
        if bias is not None and kept[1] is not None:
            bias.copy_(kept[1])
    return False


def _answers(model: nn.Module, batch: Any) -> list[Tensor]:
    out = run(model, batch)
    for name in ("logits", "last_hidden_state"):
        if isinstance(found := getattr(out, name, None), Tensor):
            return [found]
    return [leaf for leaf in tree_iter(out) if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def _close(found: Sequence[Tensor], wanted: Sequence[Tensor], dtype: torch.dtype | None = None) -> bool:
    for one, other in zip(found, wanted, strict=True):
        if one.shape != other.shape:
            return False
        distance, size = float((one.double() - other.double()).norm()), float(other.double().norm())
        if not distance <= TOLERANCE[dtype or other.dtype] * size + 1e-30:
            return False
    return True
