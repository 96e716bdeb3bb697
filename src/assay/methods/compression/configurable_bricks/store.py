"""Bricks that are added to a model: kept by name, found by key, merged, or run one after the other.

The four operations of the paper's section on customised bricks are retrieving, combining, updating and growing; the last two are in
`updating`. A brick's tensors may be anything: the factors of a LoRA adapter, a prefix, the weights of a layer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from assay import checks

Kind = Literal["neurons", "lora", "prefix", "text"]
KINDS: tuple[Kind, ...] = get_args(Kind)
Granularity = Literal["token", "sentence", "task"]
GRANULARITIES: tuple[Granularity, ...] = get_args(Granularity)


@dataclass(frozen=True, eq=False)
class Brick:
    """One module that can be added: `tensors` by name, or a `text`; `key` (d,) is what a query is compared with, None if never.

    `granularity` says for what it is looked up: every token, a sentence (by its mean hidden state, say), or a whole task.
    """

    name: str
    kind: Kind
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    key: Tensor | None = None
    granularity: Granularity = "sentence"
    text: str = ""

    def __post_init__(self) -> None:
        checks.choice("kind", self.kind, KINDS)
        checks.choice("granularity", self.granularity, GRANULARITIES)
        for name, tensor in self.tensors.items():
            checks.tensor(f"tensors[{name!r}]", tensor, dtype="any")
        if self.key is not None:
            checks.tensor("key", self.key, ndim=1, finite=True)


class BrickStore:
    """Bricks by name.

    >>> store = BrickStore()
    >>> store.add(Brick("french", "lora", key=torch.tensor([1.0, 0.0])))
    >>> store.add(Brick("python", "lora", key=torch.tensor([0.0, 1.0])))
    >>> [(brick.name, round(likeness, 2)) for brick, likeness in store.retrieve(torch.tensor([0.1, 2.0]))]
    [('python', 1.0)]
    """

    def __init__(self) -> None:
        self._bricks: dict[str, Brick] = {}

    def add(self, brick: Brick) -> None:
        """Keep a brick. Raises ValueError for a name that is taken: take the old one out first."""
        if brick.name in self._bricks:
            raise ValueError(f"name must be new, got {brick.name!r}")
        self._bricks[brick.name] = brick

    def take(self, name: str) -> Brick:
        """Take a brick out and return it. Raises KeyError for an unknown name."""
        return self._bricks.pop(name)

    def __getitem__(self, name: str) -> Brick:
        return self._bricks[name]

    def __contains__(self, name: object) -> bool:
        return name in self._bricks

    def __len__(self) -> int:
        return len(self._bricks)

    def retrieve(
        self, query: Tensor, k: int = 1, *, kind: Kind | None = None, granularity: Granularity | None = None
    ) -> list[tuple[Brick, float]]:
        """The `k` bricks whose keys are most like `query` (d,), by cosine, best first; of equals the one added first.

        Only bricks with a key, of that kind and granularity where they are given. Raises ValueError for a query that is not finite
        or as long as the keys, and when there are fewer than `k` such bricks.
        """
        checks.tensor("query", query, ndim=1, finite=True)
        found = [
            brick
            for brick in self._bricks.values()
            if brick.key is not None
            and (kind is None or brick.kind == kind)
            and (granularity is None or brick.granularity == granularity)
        ]
        if not found:
            raise ValueError("the store must have bricks with such a key, got none")
        k = checks.whole("k", k, low=1, high=len(found))
        keys = [brick.key for brick in found if brick.key is not None]
        for brick, key in zip(found, keys, strict=True):
            if key.shape != query.shape:
                raise ValueError(f"query must be as long as the key of {brick.name!r}, {len(key)}, got {len(query)}")
        likeness = F.cosine_similarity(torch.stack(keys).double(), query.double()[None], dim=1)
        order = likeness.argsort(descending=True, stable=True)[:k].tolist()
        return [(found[place], float(likeness[place])) for place in order]


def lora_brick(model: Any, name: str, *, adapter: str = "default", key: Tensor | None = None) -> Brick:
    """A copy of an adapter of a PEFT model, as a brick."""
    import peft

    tools: Any = peft
    state: dict[str, Tensor] = tools.get_peft_model_state_dict(model, adapter_name=adapter)
    return Brick(name, "lora", {path: tensor.detach().clone() for path, tensor in state.items()}, key)


def put_lora(model: Any, brick: Brick, *, adapter: str = "default") -> None:
    """Write a brick's tensors into an adapter that a PEFT model already has.

    Raises ValueError unless the brick has exactly the adapter's tensors, before anything is changed.
    """
    import peft

    tools: Any = peft
    state: dict[str, Tensor] = tools.get_peft_model_state_dict(model, adapter_name=adapter)
    _require_alike("adapter", state, brick.tensors)
    tools.set_peft_model_state_dict(model, dict(brick.tensors), adapter_name=adapter)


# ---- merging -------------------------------------------------------------------------------------------------------------------------


def average(
    bricks: Sequence[Mapping[str, Tensor]],
    *,
    weights: Sequence[float] | None = None,
    fisher: Sequence[Mapping[str, Tensor]] | None = None,
) -> dict[str, Tensor]:
    """The average of bricks of one shape, tensor by tensor, computed in float64 and returned in the first one's dtype.

    Uniform; with `weights`, one a brick, divided by their sum; with `fisher`, each entry weighted by the diagonal of the brick's Fisher
    information (not negative; where all are 0, uniformly). The average of LoRA factors is not the factors of the average: that of A
    and that of B are taken by themselves.

    Raises ValueError for no bricks, names or shapes that differ, weights that are negative or sum to 0, and both kinds at once.

    >>> average([{"w": torch.tensor([1.0])}, {"w": torch.tensor([4.0])}], weights=[2, 1])
    {'w': tensor([2.])}
    """
    if len(bricks) == 0:
        raise ValueError("bricks must hold at least one, got none")
    for other in bricks[1:]:
        _require_alike("bricks", bricks[0], other)
    if weights is not None and fisher is not None:
        raise ValueError("weights and fisher cannot be given together")
    shares = [1.0] * len(bricks) if weights is None else [checks.number("weights", w, low=0) for w in weights]
    if len(shares) != len(bricks) or not sum(shares) > 0:
        raise ValueError(f"weights must be one a brick and not all 0, got {shares}")
    if fisher is not None:
        if len(fisher) != len(bricks):
            raise ValueError(f"fisher must be one a brick ({len(bricks)}), got {len(fisher)}")
        for information in fisher:
            _require_alike("fisher", bricks[0], information)
            if any(bool((tensor < 0).any()) for tensor in information.values()):
                raise ValueError("fisher must not be negative")
    merged = {}
    for name, first in bricks[0].items():
        stacked = torch.stack([brick[name].double() for brick in bricks])
        uniform = torch.tensor(shares, dtype=torch.float64, device=stacked.device).view(-1, *[1] * first.dim())
        amounts = uniform.expand_as(stacked)
        if fisher is not None:
            known = torch.stack([information[name].double() for information in fisher])
            amounts = torch.where(known.sum(0) > 0, known, amounts)
        merged[name] = ((stacked * amounts).sum(0) / amounts.sum(0)).to(first.dtype)
    return merged


def arithmetic(base: Mapping[str, Tensor], *terms: tuple[float, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Task arithmetic: base + sum of c (brick - base) over the `terms` (c, brick), c of either sign, in float64 and base's dtype.

    +1 adds what a brick has learnt, -1 takes it away: with both of one brick the base comes back, bit for bit.

    Raises ValueError for names or shapes that differ.

    >>> arithmetic({"w": torch.tensor([1.0])}, (0.5, {"w": torch.tensor([3.0])}))
    {'w': tensor([2.])}
    """
    numbers = [checks.number("coefficient", coefficient) for coefficient, _ in terms]
    for _, brick in terms:
        _require_alike("brick", base, brick)
    merged = {}
    for name, first in base.items():
        change = torch.zeros_like(first, dtype=torch.float64)
        for number, (_, brick) in zip(numbers, terms, strict=True):
            change = change + number * (brick[name].double() - first.double())
        merged[name] = (first.double() + change).to(first.dtype)
    return merged


def regression_mean(weights: Sequence[Tensor], moments: Sequence[Tensor], *, ridge: float = 0.0) -> Tensor:
    """The one weight (out, in) whose outputs are nearest, in squares, to those of each of `weights` on that one's own inputs.

    Minimises the sum of tr (W - W_i) M_i (W - W_i)^T: W = (sum W_i M_i) (sum M_i)^-1. With the moments X_i^T X_i (in, in) that is the
    sum of ||X_i W^T - X_i W_i^T||^2; with those of `core.layers.inputs.input_moments`, X_i^T X_i / rows, it is the sum of the means
    over rows, and every weight counts alike however many inputs it has seen. `ridge`, as a share of the mean of the diagonal, makes
    moments of few inputs invertible.

    Raises ValueError for counts and shapes that do not fit, and for moments that cannot be inverted.
    """
    ridge = checks.number("ridge", ridge, low=0)
    if len(weights) == 0 or len(weights) != len(moments):
        raise ValueError(f"moments must be one a weight, got {len(weights)} weights and {len(moments)} moments")
    for place, (weight, moment) in enumerate(zip(weights, moments, strict=True)):
        wide = checks.tensor(f"weights[{place}]", weight, shape=tuple(weights[0].shape), ndim=2, finite=True).shape[1]
        checks.tensor(f"moments[{place}]", moment, shape=(wide, wide), finite=True)
    eye = torch.eye(weights[0].shape[1], dtype=torch.float64, device=weights[0].device)
    own = [moment.double() + ridge * moment.double().diagonal().mean() * eye for moment in moments]
    wanted = torch.stack([weight.double() @ moment for weight, moment in zip(weights, own, strict=True)]).sum(0)
    try:
        found = torch.linalg.solve(torch.stack(own).sum(0), wanted.T).T
    except RuntimeError as error:
        raise ValueError("moments must be invertible together: give more inputs, or a ridge") from error
    return found.to(weights[0].dtype)


# ---- stitching -----------------------------------------------------------------------------------------------------------------------


class Stitched(nn.Module):
    """Two bricks one after the other, with a linear interface between them: second(interface(first(x)))."""

    def __init__(self, first: nn.Module, interface: nn.Linear, second: nn.Module) -> None:
        super().__init__()
        self.first, self.interface, self.second = first, interface, second

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.second(self.interface(self.first(x)))
        return y


def fit_interface(given: Tensor, wanted: Tensor, *, ridge: float = 1e-6) -> nn.Linear:
    """The linear layer that takes `given` (n, a), what a brick puts out, to `wanted` (n, b), what the next one is used to.

    Least squares with a bias, `ridge` on the weights as a share of the inputs' mean variance. Raises ValueError for lengths that
    differ, numbers that are not finite, and fewer than two rows.
    """
    checks.tensor("given", given, ndim=2, finite=True)
    checks.tensor("wanted", wanted, shape=(len(given), "outputs"), finite=True)
    ridge = checks.number("ridge", ridge, above=0)
    if len(given) < 2:
        raise ValueError(f"given must have at least two rows, got {len(given)}")
    x, y = given.detach().double(), wanted.detach().double()
    apart = x - x.mean(0)
    gram = apart.T @ apart
    eye = torch.eye(len(gram), dtype=torch.float64, device=x.device)
    weight = torch.linalg.solve(
        gram + ridge * gram.diagonal().mean().clamp_min(1e-30) * eye, apart.T @ (y - y.mean(0))
    ).T
    layer = nn.Linear(x.shape[1], y.shape[1], dtype=given.dtype, device=given.device)
    with torch.no_grad():
        layer.weight.copy_(weight)
        layer.bias.copy_(y.mean(0) - weight @ x.mean(0))
    return layer


def _require_alike(name: str, one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> None:
    if set(one) != set(other):
        raise ValueError(f"{name} must have the same tensors, got them apart by {sorted(set(one) ^ set(other))[0]!r}")
    for path, tensor in one.items():
        if checks.tensor(f"{name}[{path!r}]", other[path]).shape != tensor.shape:
            raise ValueError(f"{name}[{path!r}] must have shape {tuple(tensor.shape)}, got {tuple(other[path].shape)}")
