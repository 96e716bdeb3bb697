"""MLPs in groups of neurons, of which each token computes only those that a router picks.

The paper names such groups as the bricks that save work and leaves the making to others; the recipe here (balanced clusters of input
weights, a linear router trained to predict how much each group will do) is our choice, after the work on turning dense MLPs into
mixtures that it cites.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from assay import checks
from assay.methods.compression.configurable_bricks.neurons import mlps
from assay.methods.core import kernels
from assay.methods.core.layers.inputs import watch
from assay.methods.core.layers.surgery import refuse_saving, swap

TOLERANCE = {
    torch.float64: 1e-9,
    torch.float32: 1e-4,
    torch.float16: 1e-2,
    torch.bfloat16: 3e-2,
}  # of the output's norm
PARTS = ("gate_proj", "up_proj", "down_proj")

Chooser = Callable[["BrickMlp", Tensor], Tensor]  # rows (n, inputs) to the groups of each, int64 (n, k), no group twice


def partition(features: Tensor, groups: int, *, steps: int = 8, seed: int = 0) -> Tensor:
    """Neurons in `groups` of equal size, alike ones together: int64 (neurons,), the number of each one's group.

    `features` is (neurons, anything): input weights, or what each neuron did on many tokens. Balanced k-means on the directions of the
    rows: in each of at most `steps` rounds the neurons with most to lose choose first, each the nearest centre that has room.

    Raises ValueError unless `groups` divides the neurons.

    >>> partition(torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.9, 0.1], [0.1, 0.9]]), 2).bincount()
    tensor([2, 2])
    """
    checks.tensor("features", features, ndim=2, finite=True)
    groups, steps = checks.whole("groups", groups, low=1), checks.whole("steps", steps, low=1)
    neurons = len(features)
    if neurons % groups:
        raise ValueError(f"groups must divide the {neurons} neurons, got {groups}")
    rows = F.normalize(features.detach().cpu().float(), dim=1)
    generator = torch.Generator().manual_seed(checks.whole("seed", seed))
    centres = rows[torch.randperm(neurons, generator=generator)[:groups]]
    found = _balanced(rows @ centres.T)
    for _ in range(steps - 1):
        centres = F.normalize(torch.stack([rows[found == group].mean(0) for group in range(groups)]), dim=1)
        better = _balanced(rows @ centres.T)
        if torch.equal(better, found):
            break
        found = better
    return found


def by_router(layer: BrickMlp, rows: Tensor) -> Tensor:
    """The groups that the layer's router expects to do most: what is fast."""
    expected: Tensor = layer.router(rows)
    return expected.topk(layer.active, dim=-1).indices


def by_oracle(layer: BrickMlp, rows: Tensor) -> Tensor:
    """The groups that do most, found by computing all of them: what a perfect router would pick. Saves nothing."""
    return layer.mass(rows).topk(layer.active, dim=-1).indices


def by_task(layer: BrickMlp, rows: Tensor) -> Tensor:
    """The same groups for every token: those that `for_task` chose."""
    return layer.task.expand(len(rows), -1)


class BrickMlp(nn.Module):
    """A gated MLP, down(act(gate x) * up x), whose neurons lie in groups; every token computes `active` of them: (..., d) to (..., d).

    `labels` (neurons,) is each neuron's group, all of one size (`partition`). A single row computes its groups one after the other as
    slices of the weights; several rows are dispatched, each group computing those that chose it. `reference` is the same by
    computing everything and masking. Who chooses is `chooser`: `by_router` unless set otherwise; the router is not trained yet.

    It does not pay for many rows at once: together they choose every group, and small products are slower than large ones.
    """

    def __init__(self, mlp: nn.Module, labels: Tensor, active: int) -> None:
        super().__init__()
        gate, up, down = (_linear(mlp, name) for name in PARTS)
        if (gate.bias is None) != (up.bias is None):
            raise ValueError("mlp must have a bias in both of gate_proj and up_proj or in neither, got it in one")
        if not callable(getattr(mlp, "act_fn", None)):
            raise ValueError(f"mlp must have an activation act_fn, got {type(mlp).__name__} without one")
        neurons, width = gate.weight.shape
        checks.tensor("labels", labels, dtype=torch.int64, shape=(neurons,))
        if int(labels.min()) < 0:
            raise ValueError(f"labels must be numbers of groups, got {int(labels.min())}")
        sizes = labels.bincount()
        if bool((sizes != sizes[0]).any()):
            raise ValueError(f"labels must make groups of one size, got {sizes.tolist()}")
        groups = len(sizes)
        self.active = checks.whole("active", active, low=1, high=groups)
        order = labels.argsort(stable=True).to(gate.weight.device)
        halves = [layer.weight.detach().index_select(0, order).view(groups, -1, width) for layer in (gate, up)]
        self.inner = nn.Parameter(torch.cat(halves, 1))  # (groups, gate and up of its neurons, inputs)
        outer = down.weight.detach().index_select(1, order).view(-1, groups, neurons // groups)
        self.outer = nn.Parameter(outer.transpose(0, 1).contiguous())  # (groups, outputs, neurons of a group)
        self.inner_bias: nn.Parameter | None = None
        self.outer_bias: nn.Parameter | None = None
        if gate.bias is not None:
            biases = [layer.bias.detach().index_select(0, order).view(groups, -1) for layer in (gate, up)]
            self.inner_bias = nn.Parameter(torch.cat(biases, 1))
        if down.bias is not None:
            self.outer_bias = nn.Parameter(down.bias.detach().clone())
        self.act: Any = mlp.act_fn
        self.router = nn.Linear(width, groups, dtype=gate.weight.dtype, device=gate.weight.device)
        self.task: Tensor
        self.register_buffer("task", torch.arange(self.active, device=gate.weight.device))
        self.chooser: Chooser = by_router

    @property
    def groups(self) -> int:
        """How many groups there are."""
        return self.inner.shape[0]

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        chosen = self.chooser(self, rows)
        if len(rows) == 1:
            kernels.ran("brick MLP", "sliced")
            y = self._group(int(chosen[0, 0]), rows)
            for group in chosen[0, 1:].tolist():
                y = y + self._group(group, rows)
        else:
            kernels.ran("brick MLP", "dispatched")
            y = rows.new_zeros(len(rows), self.outer.shape[1])
            for group in range(self.groups):
                token = (chosen == group).any(1).nonzero().squeeze(1)
                if len(token):
                    y.index_add_(0, token, self._group(group, rows[token]).to(y.dtype))  # autocast computes in another
        if self.outer_bias is not None:
            y = y + self.outer_bias
        return y.reshape(*x.shape[:-1], y.shape[-1])

    def reference(self, x: Tensor, chosen: Tensor) -> Tensor:
        """All groups computed, those not `chosen` (n, k) by the rows of `x` (n, inputs) masked: what `forward` must give."""
        kept = torch.zeros(len(x), self.groups, dtype=torch.bool, device=x.device).scatter(1, chosen, True)
        h = self._neurons(x) * kept[..., None]
        y = torch.einsum("ngi,goi->no", h, self.outer)
        return y if self.outer_bias is None else y + self.outer_bias

    def mass(self, rows: Tensor) -> Tensor:
        """How much each group really does for each row: the sum of its neurons' output magnitudes, float32 (n, groups)."""
        return (self._neurons(rows).abs().float() * self.outer.detach().float().norm(dim=1)).sum(-1)

    def _neurons(self, rows: Tensor) -> Tensor:
        """(n, groups, neurons of a group)"""
        both = torch.einsum("ni,gki->ngk", rows, self.inner)
        if self.inner_bias is not None:
            both = both + self.inner_bias
        gate, up = both.chunk(2, -1)
        h: Tensor = self.act(gate) * up
        return h

    def _group(self, group: int, rows: Tensor) -> Tensor:
        """What one group adds, (n, outputs)."""
        bias = None if self.inner_bias is None else self.inner_bias[group]
        gate, up = F.linear(rows, self.inner[group], bias).chunk(2, -1)
        y: Tensor = F.linear(self.act(gate) * up, self.outer[group])
        return y


def to_bricks(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    groups: int = 16,
    active: int = 8,
    ridge: float = 1e-2,
    seed: int = 0,
) -> nn.Module:
    """Put a `BrickMlp` in the place of every gated MLP, in place, with routers fitted on `batches`; returns the model.

    Groups are clusters of the gate's weights (`partition`). Each router is a linear layer that predicts a group's share of the token's
    output magnitude, fitted by least squares over all tokens of `batches` (token ids, or what else the model takes), with
    `ridge` on its weights for inputs of unit size. `save_pretrained` is refused afterwards.

    Raises ValueError for a model without gated MLPs of the names gate_proj, up_proj, down_proj and act_fn, one whose MLPs do something
    besides, sizes that do not fit, and batches that do not reach them, before anything is changed.
    """
    number = checks.number("ridge", ridge, above=0)
    names = _gated(model)
    layers: dict[str, BrickMlp] = {}
    for name in names:
        mlp = model.get_submodule(name)
        gate = _linear(mlp, PARTS[0])
        layer = BrickMlp(mlp, partition(gate.weight, groups, seed=seed), active).eval()
        _require_same(name, mlp, layer)
        layers[name] = layer
    _fit(model, layers, batches, number)
    swap(model, layers)
    return refuse_saving(model)


def for_task(model: nn.Module, batches: Iterable[Any]) -> nn.Module:
    """Choose every `BrickMlp`'s groups once, those that do most over all tokens of `batches`, in place; returns the model.

    From then on no router runs; set `chooser` back to `by_router` to have it again. Raises ValueError for a model without bricks.
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, BrickMlp)}
    if not layers:
        raise ValueError("model must have bricks (see to_bricks), got none")
    sums: dict[str, Tensor] = {}

    def see(name: str, _: nn.Module, x: Tensor) -> None:
        total = layers[name].mass(x.reshape(-1, x.shape[-1])).double().sum(0)
        sums[name] = sums[name] + total if name in sums else total

    watch(model, layers, batches, see)
    for name, layer in layers.items():
        layer.task = sums[name].topk(layer.active).indices
        layer.chooser = by_task
    return model


def _gated(model: nn.Module) -> list[str]:
    """The MLPs that can become bricks: all of the model's, or ValueError."""
    names = list(mlps(model))
    for name in names:
        mlp = model.get_submodule(name)
        if not all(type(mlp._modules.get(part)) is nn.Linear for part in PARTS) or not hasattr(mlp, "act_fn"):
            raise ValueError(
                f"model must have gated MLPs of {', '.join(PARTS)} and act_fn, got {type(mlp).__name__} {name!r}"
            )
    return names


def _linear(mlp: nn.Module, name: str) -> nn.Linear:
    layer = mlp._modules.get(name)
    if not isinstance(layer, nn.Linear):
        raise ValueError(f"mlp must have a linear layer {name!r}, got {type(layer).__name__}")
    return layer


@torch.no_grad()
def _require_same(name: str, mlp: nn.Module, layer: BrickMlp) -> None:
    """The MLP must be what its layers say: nothing is believed."""
    weight = layer.inner
    x = torch.randn(4, weight.shape[2], generator=torch.Generator().manual_seed(0)).to(weight)
    training = mlp.training
    wanted: Tensor = mlp.eval()(x)
    mlp.train(training)
    everything = torch.arange(layer.groups, device=x.device).expand(len(x), -1)
    distance = float((layer.reference(x, everything) - wanted).double().norm())
    if not distance <= TOLERANCE.get(weight.dtype, 1e-4) * float(wanted.double().norm()) + 1e-30:
        raise ValueError(f"model must have plain gated MLPs, but {name!r} answers otherwise than its layers say")


def _fit(model: nn.Module, layers: Mapping[str, BrickMlp], batches: Iterable[Any], ridge: float) -> None:
    """Least squares for every router, from sums over all tokens: memory does not grow with the data."""
    owner = {f"{name}.{PARTS[0]}": layer for name, layer in layers.items()}
    sums: dict[str, tuple[Tensor, Tensor]] = {}

    def see(path: str, _: nn.Module, x: Tensor) -> None:
        rows = x.reshape(-1, x.shape[-1])
        mass = owner[path].mass(rows).double()
        shares = mass / mass.sum(1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
        wide = F.pad(rows.double(), (0, 1), value=1.0)  # a constant, for the bias
        gram, product = wide.T @ wide, wide.T @ shares
        if path in sums:
            gram, product = gram + sums[path][0], product + sums[path][1]
        sums[path] = gram, product

    watch(model, owner, batches, see)
    for path, (gram, product) in sums.items():
        tokens = gram[-1, -1]
        size = (gram.diagonal() / tokens).sqrt().clamp_min(1e-12)
        moments = gram / tokens / size / size[:, None]
        penalty = torch.full_like(size, ridge)
        penalty[-1] = 0
        found = torch.linalg.solve(moments + penalty.diag(), product / tokens / size[:, None]) / size[:, None]
        router = owner[path].router
        with torch.no_grad():
            router.weight.copy_(found[:-1].T)
            router.bias.copy_(found[-1])


def _balanced(likeness: Tensor) -> Tensor:
    """(neurons, groups) to the group of each neuron, equally many a group."""
    neurons, groups = likeness.shape
    best = likeness.topk(min(2, groups), dim=1).values
    urgent = (best[:, 0] - best[:, -1]).argsort(descending=True, stable=True)
    wishes = likeness.argsort(dim=1, descending=True, stable=True).tolist()
    room = [neurons // groups] * groups
    found = [0] * neurons
    for neuron in urgent.tolist():
        group = next(group for group in wishes[neuron] if room[group])
        room[group] -= 1
        found[neuron] = group
    return torch.tensor(found)
