"""What the neurons of a model's MLPs do, token by token, and the model without some of them.

A neuron is one input h_i of the layer that ends an MLP: act(gate) * up in a gated one, act(x) in a plain one. Its activation value is
|h_i|, its output magnitude |h_i| times the norm of the weights that take it (section on emergent bricks of arXiv 2409.02877).
Everything is done by hooks on that layer, so that no architecture has to be known.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from fractions import Fraction
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from assay import checks
from assay.methods.core.layers.inputs import watch
from assay.methods.core.layers.surgery import linear_kinds
from assay.methods.core.sparsity.masks import matrix_of
from assay.methods.core.sparsity.projections import top
from assay.methods.core.sparsity.units import Group, groups

Indicator = Literal["activation", "output"]
INDICATORS: tuple[Indicator, ...] = get_args(Indicator)
Scores = Callable[
    [str, Tensor], Tensor
]  # the name of an MLP and its h (..., neurons) to what its neurons are worth, as large


def mlps(model: nn.Module) -> dict[str, Group]:
    """The MLPs whose neurons can be followed, by name: those of transformers' models, and pairs of linear layers in plain chains.

    Fused experts are not among them. Raises ValueError for a model that has none.

    >>> found = mlps(nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2)))
    >>> {name: group.units for name, group in found.items()}
    {'0': 8}
    """
    found = {name: group for name, group in groups(model).items() if _of_neurons(model, group)}
    if not found:
        raise ValueError(f"model must have MLPs of linear layers that can be followed, got {type(model).__name__}")
    return found


def part(share: float, total: int) -> int:
    """How many of `total` neurons a share is, rounded down; the share is read as the decimal it is written as.

    >>> part(0.7, 10), part(0.05, 1536)
    (7, 76)
    """
    return int(Fraction(repr(checks.number("share", share, low=0, high=1))) * checks.whole("total", total, low=0))


@contextlib.contextmanager
def masking(model: nn.Module, share: float, indicator: Indicator | Scores = "activation") -> Iterator[None]:
    """Within the context, the neurons of each token that are worth least are zero: exactly `part(share, neurons)` in every MLP.

    `indicator` is "activation" (|h|), "output" (|h| times the norm of the outgoing weights), or a function of the MLP's name and h
    (..., neurons) that gives scores of h's shape, the larger the more worth keeping. A share of 0 changes nothing, not even a
    bit; with 1 only the last layer's bias is left of an MLP. This is an analysis: the masked neurons have been computed.

    Raises ValueError for a share outside [0, 1] and an unknown indicator, before any hook is set.

    >>> model = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 1))
    >>> with masking(model, 1.0):
    ...     print(bool(torch.equal(model(torch.randn(1, 2))[0], model[2].bias)))
    True
    """
    part(share, 0)  # checked before anything is changed
    scores = _scorer(model, indicator)

    def change(name: str, h: Tensor) -> Tensor:
        masked = part(share, h.shape[-1])
        if masked == 0:
            return h
        return h.masked_fill(~top(scores(name, h.detach()), h.shape[-1] - masked), 0)

    with _changing(model, mlps(model), change):
        yield


@contextlib.contextmanager
def mask_neurons(model: nn.Module, neurons: Mapping[str, Tensor]) -> Iterator[None]:
    """Within the context, the named neurons are zero on every token: bool masks (neurons,) by MLP, True is silenced.

    To take neurons out for good, and save their work, give the opposite masks to `core.sparsity.removal.remove`.
    Raises TypeError or ValueError for what `checked_neurons` refuses.
    """
    masks = checked_neurons(model, neurons)
    known = mlps(model)

    def change(name: str, h: Tensor) -> Tensor:
        return h.masked_fill(masks[name].to(h.device), 0)

    with _changing(model, {name: known[name] for name in masks}, change):
        yield


def checked_neurons(model: nn.Module, neurons: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`neurons` as a dictionary, if its names are MLPs of the model and its values bool masks of their neurons."""
    if not isinstance(neurons, Mapping):
        raise TypeError(f"neurons must be a mapping of MLPs to masks, got {type(neurons).__name__}")
    known = mlps(model)
    for name, mask in neurons.items():
        if name not in known:
            listed = ", ".join(list(known)[:3])
            raise ValueError(f"neurons must name MLPs of the model ({listed} ...), got {name!r}")
        checks.tensor(f"neurons[{name!r}]", mask, dtype="bool", shape=(known[name].units,))
    return dict(neurons)


def mean_activations(
    model: nn.Module, passages: Sequence[Any], indicator: Indicator | Scores = "activation"
) -> dict[str, Tensor]:
    """The mean of each neuron's indicator over the tokens of each passage: by MLP, (passages, neurons) in float32.

    A passage is what the model takes for one sequence: ids (1, n), or a mapping of keyword arguments. Passages of equal length and one
    style each are asked for: the mean depends on the kinds of token in a passage, whatever its function.

    Raises ValueError for no passages, several sequences in one, and a model that runs an MLP more than once a passage.
    """
    if len(passages) == 0:
        raise ValueError("passages must hold at least one sequence, got none")
    scores, of = _scorer(model, indicator), _names(mlps(model))
    rows: dict[str, list[Tensor]] = {name: [] for name in of.values()}

    def see(layer: str, _: nn.Module, h: Tensor) -> None:
        if h.dim() > 2 and h.shape[0] != 1:
            raise ValueError(f"passages must hold one sequence each, got a batch of {h.shape[0]}")
        rows[of[layer]].append(scores(of[layer], h).float().flatten(0, -2).mean(0))

    watch(model, of, passages, see)
    for name, found in rows.items():
        if len(found) != len(passages):
            raise ValueError(f"model must run every MLP once a passage, got {len(found)} runs of {name}")
    return {name: torch.stack(found) for name, found in rows.items()}


def below(
    model: nn.Module, batches: Iterable[Any], thresholds: Sequence[float], indicator: Indicator | Scores = "activation"
) -> dict[str, Tensor]:
    """The share of neurons whose indicator is at most each of `thresholds` times the largest of its token: by MLP, float64.

    The cumulative distribution of the paper's figure on sparsity (about 80 % below 0.2). Thresholds lie in [0, 1].
    """
    edges = torch.tensor([checks.number(f"thresholds[{i}]", x, low=0, high=1) for i, x in enumerate(thresholds)])
    if len(edges) == 0:
        raise ValueError("thresholds must hold at least one number, got none")
    scores, of = _scorer(model, indicator), _names(mlps(model))
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = dict.fromkeys(of.values(), 0)

    def see(layer: str, _: nn.Module, h: Tensor) -> None:
        found = scores(of[layer], h).float().flatten(0, -2)
        scaled = found / found.amax(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
        hits = torch.stack([(scaled <= edge).sum() for edge in edges.to(scaled.device)])
        name = of[layer]
        sums[name] = sums[name] + hits if name in sums else hits
        counts[name] += scaled.numel()

    watch(model, of, batches, see)
    return {name: total.double().cpu() / counts[name] for name, total in sums.items()}


def _of_neurons(model: nn.Module, group: Group) -> bool:
    """Whether each input of one linear layer is one unit of the group."""
    if group.kind == "heads" or len(group.consumers) != 1:
        return False
    cut = group.consumers[0]
    return cut.segments == (("unit", 1),) and type(model.get_submodule(cut.layer)) in linear_kinds()


def _names(found: Mapping[str, Group]) -> dict[str, str]:
    """The MLP's name by that of its last layer."""
    return {group.consumers[0].layer: name for name, group in found.items()}


def _scorer(model: nn.Module, indicator: Indicator | Scores) -> Scores:
    if callable(indicator):
        return indicator
    checks.choice("indicator", indicator, INDICATORS)
    if indicator == "activation":
        return lambda _, h: h.abs()
    found = mlps(model)
    norms = {
        name: matrix_of(model, group.consumers[0].layer).detach().float().norm(dim=0) for name, group in found.items()
    }
    return lambda name, h: h.abs().float() * norms[name].to(h.device)


@contextlib.contextmanager
def _changing(model: nn.Module, found: Mapping[str, Group], change: Callable[[str, Tensor], Tensor]) -> Iterator[None]:
    """Within the context, `change(name, h)` stands in the place of what an MLP's last layer is given."""

    def hook(name: str) -> Callable[[nn.Module, tuple[Any, ...]], tuple[Any, ...]]:
        return lambda _, args: (change(name, args[0]), *args[1:])

    handles = []
    try:
        for name, group in found.items():
            layer = model.get_submodule(group.consumers[0].layer)
            handles.append(layer.register_forward_pre_hook(hook(name)))
        yield
    finally:
        for handle in handles:
            handle.remove()
