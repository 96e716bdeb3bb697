"""Which units of a model can go one by one: the channels of chains, the neurons of MLPs, the heads of attention.

`groups(model)` finds them; what makes, passes on and takes a unit is said as `Cut`s, and `removal.remove` makes them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from assay.methods.core.layers.surgery import CONVOLUTIONS, linear_kinds

# (what makes the units, what takes them), by the names of transformers; a single producer twice as wide holds gate and up
NEURONS = (
    (("gate_proj", "up_proj"), "down_proj"),
    (("gate_up_proj",), "down_proj"),
    (("wi_0", "wi_1"), "wo"),
    (("wi",), "wo"),
    (("fc1",), "fc2"),
    (("c_fc",), "c_proj"),
    (("intermediate.dense",), "output.dense"),
)
HEADS = (
    (("q_proj", "k_proj", "v_proj"), "o_proj"),
    (("q_proj", "k_proj", "v_proj"), "out_proj"),
    (("qkv_proj",), "o_proj"),
    (("c_attn",), "c_proj"),
    (("self.query", "self.key", "self.value"), "output.dense"),
)
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
POINTWISE: tuple[type[nn.Module], ...] = (
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish, nn.Softplus, nn.Tanh, nn.Sigmoid, nn.Hardswish,
    nn.Hardsigmoid, nn.Hardtanh, nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d,
)  # fmt: skip
POOLING: tuple[type[nn.Module], ...] = (
    nn.MaxPool1d, nn.MaxPool2d, nn.AvgPool1d, nn.AvgPool2d, nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d,
)  # fmt: skip
FUNCTIONS: set[Any] = {
    F.relu, F.relu6, F.leaky_relu, F.elu, F.selu, F.gelu, F.silu, F.mish, F.softplus, F.hardswish, F.hardsigmoid, F.hardtanh,
    F.tanh, F.sigmoid, F.dropout, F.max_pool2d, F.avg_pool2d, F.adaptive_avg_pool2d, F.max_pool1d, F.avg_pool1d,
    torch.relu, torch.tanh, torch.sigmoid,
}  # fmt: skip
METHODS = {"relu", "tanh", "sigmoid", "contiguous"}


@dataclass(frozen=True)
class Cut:
    """One dimension of a layer, "out" or "in", made of segments in a row: (kind of unit, places a unit)."""

    layer: str
    side: Literal["out", "in"]
    segments: tuple[tuple[Literal["unit", "shared"], int], ...]


@dataclass(frozen=True)
class Group:
    """Units that can go one by one: `units` of them, of `kind`; `shared` of key-value heads, 0 without any.

    `producers` make them, `along` acts on each by itself, `consumers` take them; `holder` is the module that counts heads.
    """

    name: str
    kind: Literal["neurons", "heads", "channels"]
    units: int
    producers: tuple[Cut, ...]
    consumers: tuple[Cut, ...]
    along: tuple[str, ...] = ()
    shared: int = 0
    holder: str = ""


def groups(model: nn.Module) -> dict[str, Group]:
    """What can be taken out of a model, by the name of the MLP, the attention, or (in plain chains) the layer that makes the units.

    >>> found = groups(nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2)))
    >>> {name: (group.kind, group.units) for name, group in found.items()}
    {'0': ('channels', 8)}
    """
    if hasattr(model, "config"):
        return _blocks(model)
    try:
        graph = fx.symbolic_trace(model).graph
    except Exception:  # whatever a model's control flow does to a tracer
        return _blocks(model)
    return _chains(model, graph)


def kept_of(kind: str, mask: Tensor, group: Group) -> Tensor:
    """The mask of units as one of what they share: a shared head of keys and values stays while any unit of its own does."""
    return mask if kind == "unit" else mask.view(group.shared, -1).any(1)


def places_of(cut: Cut, mask: Tensor, group: Group) -> Tensor:
    """The mask of units as one of places along the cut's dimension."""
    return torch.cat([kept_of(kind, mask, group).repeat_interleave(width) for kind, width in cut.segments])


def per_unit(rows: Tensor, cut: Cut, group: Group) -> Tensor:
    """For each unit whether any of its places is set."""
    found = torch.zeros(group.units, dtype=torch.bool)
    sizes = [(group.units if kind == "unit" else group.shared) * width for kind, width in cut.segments]
    for part, (kind, width) in zip(rows.split(sizes), cut.segments, strict=True):
        if kind == "unit":
            found |= part.view(-1, width).any(1)
    return found


def _blocks(model: nn.Module) -> dict[str, Group]:
    found: dict[str, Group] = {}
    for name, module in model.named_modules():
        for make, patterns in ((_neurons, NEURONS), (_heads, HEADS)):
            for producers, consumer in patterns:
                layers = [_child(module, part) for part in (*producers, consumer)]
                if any(type(layer) not in linear_kinds() for layer in layers):
                    continue
                paths = [f"{name}.{part}" if name else part for part in (*producers, consumer)]
                group = make(name, module, cast("list[nn.Module]", layers), paths)
                if group is not None:
                    found.setdefault(group.name, group)
    return found


def _neurons(name: str, module: nn.Module, layers: Sequence[nn.Module], paths: Sequence[str]) -> Group | None:
    units = _sides(layers[-1])[1]
    segments: tuple[Any, ...] = (("unit", 1),)
    if len(layers) == 2 and _sides(layers[0])[0] == 2 * units and paths[0].endswith("gate_up_proj"):
        segments = (("unit", 1), ("unit", 1))
    if any(_sides(layer)[0] != units * len(segments) for layer in layers[:-1]):
        return None
    producers = tuple(Cut(path, "out", segments) for path in paths[:-1])
    return Group(name, "neurons", units, producers, (Cut(paths[-1], "in", (("unit", 1),)),))


def _heads(name: str, module: nn.Module, layers: Sequence[nn.Module], paths: Sequence[str]) -> Group | None:
    inner = _child(module, "self") if paths[0].endswith("self.query") else module
    width = getattr(inner, "head_dim", getattr(inner, "attention_head_size", None))
    wide = _sides(layers[-1])[1]
    if not isinstance(width, int) or width < 1 or wide % width:
        return None
    units = wide // width
    if len(layers) == 2:
        left = _sides(layers[0])[0] - wide
        if left <= 0 or left % (2 * width):
            return None
        shared = left // (2 * width)
        cuts: tuple[Cut, ...] = (Cut(paths[0], "out", (("unit", width), ("shared", width), ("shared", width))),)
    else:
        sizes = [_sides(layer)[0] for layer in layers[:-1]]
        shared = sizes[1] // width
        if sizes != [wide, shared * width, shared * width]:
            return None
        kinds: tuple[Any, ...] = ("unit", "shared", "shared")
        cuts = tuple(Cut(path, "out", ((kind, width),)) for path, kind in zip(paths[:-1], kinds, strict=True))
    if shared == 0 or units % shared:
        return None
    holder = f"{name}.self" if inner is not module else name
    return Group(name, "heads", units, cuts, (Cut(paths[-1], "in", (("unit", width),)),), shared=shared, holder=holder)


def _chains(model: nn.Module, graph: fx.Graph) -> dict[str, Group]:
    calls: dict[Any, int] = {}
    for node in graph.nodes:
        if node.op == "call_module":
            calls[node.target] = calls.get(node.target, 0) + 1
    found: dict[str, Group] = {}
    for node in graph.nodes:
        if node.op == "call_module" and calls[node.target] == 1:
            group = _follow(model, node, calls)
            if group is not None:
                found[group.name] = group
    return found


def _follow(model: nn.Module, node: fx.Node, calls: Mapping[Any, int]) -> Group | None:
    """The chain from a layer to the one that takes its channels, if every step between acts on each channel by itself."""
    start = str(node.target)
    first = model.get_submodule(start)
    if not _plain(first):
        return None
    units, spatial = _sides(first)[0], isinstance(first, CONVOLUTIONS)
    along: list[str] = []
    while len(node.users) == 1:
        (user,) = node.users
        if not user.args or user.args[0] is not node or node in user.args[1:] or node in user.kwargs.values():
            return None
        if user.op == "call_module":
            layer, path = model.get_submodule(str(user.target)), str(user.target)
            if isinstance(layer, BATCH_NORMS) and layer.num_features == units or _depthwise(layer, units):
                along.append(path)
            elif isinstance(layer, nn.Flatten):
                if layer.start_dim != 1 or layer.end_dim != -1:
                    return None
                spatial = False
            elif _plain(layer):
                wide = _sides(layer)[1]
                fits = wide == units or (isinstance(first, CONVOLUTIONS) and wide % units == 0 and not spatial)
                if not fits or spatial != isinstance(layer, CONVOLUTIONS) or calls[user.target] != 1:
                    return None
                taken = Cut(path, "in", (("unit", wide // units),))
                made = Cut(start, "out", (("unit", 1),))
                return Group(start, "channels", units, (made,), (taken,), tuple(along))
            elif not isinstance(layer, POINTWISE + (POOLING if spatial else ())):
                return None
            if path in along and calls[user.target] != 1:
                return None
        elif (
            user.op == "call_function"
            and user.target is torch.flatten
            or user.op == "call_method"
            and user.target == "flatten"
        ):
            if user.args[1:] != (1,) or user.kwargs:
                return None
            spatial = False
        elif user.op == "call_method" and user.target == "mean":
            if not spatial or user.kwargs or not _over_places(user.args[1:]):
                return None
            spatial = False
        elif not (
            user.op == "call_function"
            and user.target in FUNCTIONS
            or user.op == "call_method"
            and user.target in METHODS
        ):
            return None
        node = user
    return None


def _over_places(args: tuple[Any, ...]) -> bool:
    dims = args[0] if len(args) == 1 and isinstance(args[0], (tuple, list)) else args
    return sorted(dims) in ([2, 3], [-2, -1])


def _plain(layer: nn.Module) -> bool:
    return type(layer) in linear_kinds() or (type(layer) in CONVOLUTIONS and cast(Any, layer).groups == 1)


def _depthwise(layer: nn.Module, units: int) -> bool:
    conv: Any = layer
    return type(layer) in CONVOLUTIONS and conv.groups == conv.in_channels == conv.out_channels == units > 1


def _child(module: nn.Module, path: str) -> nn.Module | None:
    for part in path.split("."):
        found = module._modules.get(part)
        if found is None:
            return None
        module = found
    return module


def _sides(layer: nn.Module) -> tuple[int, int]:
    """(outputs, inputs)."""
    weight = effective(layer)
    return weight.shape[axis_of(layer, "out")], weight.shape[axis_of(layer, "in")]


def axis_of(layer: nn.Module, side: Literal["out", "in"]) -> int:
    """The axis of a layer's own weight on which its outputs or its inputs lie: transformers' `Conv1D` has them turned around."""
    turned = isinstance(layer, linear_kinds()[1])
    return int((side == "in") != turned)


def effective(layer: nn.Module) -> Tensor:
    """The weight in its own layout, masked where it is."""
    held: Any = layer
    if "weight_orig" in layer._parameters:
        return cast(Tensor, held.weight_orig.detach() * held.weight_mask)
    return cast(Tensor, held.weight.detach())
