"""Channels, neurons and heads really taken out of a model: smaller weights, fewer MACs, the outputs of the masked model.

    found = units.groups(model)                    what can be taken out, by name
    keep = {"model.layers.0.mlp": mask}            bool, one a neuron, head or channel; True stays
    cost = remove(model, keep)                     in place; cost.before, cost.after

Followed are:
- chains of linear layers and convolutions with what acts on each channel by itself between them (batch norms, depthwise
  convolutions, activations, dropout, pooling, flattening), found by `torch.fx` in models without a `config`;
- of transformers' models the neurons of MLPs, gated or not, fused or not, and the heads of attention, whole groups of them where
  keys and values are shared. Fused experts are not reached, nor T5's heads, whose position bias all layers share.

What cannot be followed is not among `groups`. And nothing is believed: the model runs on a probe before and after, and where the
answers differ all is put back and ValueError says so.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_iter

from assay import checks
from assay.methods.core.layers.inputs import run
from assay.methods.core.layers.surgery import CONVOLUTIONS, LayerCost, cost, takes_token_ids, tied_names
from assay.methods.core.sparsity.units import (
    BATCH_NORMS,
    Group,
    axis_of,
    effective,
    groups,
    kept_of,
    per_unit,
    places_of,
)

Masked = Literal["outputs", "weights"]
MASKED: tuple[Masked, ...] = get_args(Masked)
PROBE = 7  # tokens
TOLERANCE = {
    torch.float64: 1e-9,
    torch.float32: 1e-4,
    torch.float16: 1e-2,
    torch.bfloat16: 2e-2,
}  # relative to the answer

HEAD_COUNTS = ("num_heads", "num_attention_heads")  # attributes of attention modules that say how many there are
HEAD_WIDTHS = ("all_head_size", "split_size")  # and how wide they are together
NEURON_SETTINGS = (
    "intermediate_size",
    "ffn_dim",
    "d_ff",
    "encoder_ffn_dim",
    "decoder_ffn_dim",
    "n_inner",
)  # of a configuration


@dataclass(frozen=True)
class Removed:
    """Parameters and MACs (see `surgery.cost`) before and after; `loadable`: whether `from_pretrained` finds the new shapes.

    If not, `save_pretrained` is refused: keep the state dict and `keep`, and call `remove` on a fresh model before loading it.
    """

    before: LayerCost
    after: LayerCost
    loadable: bool


def dead(model: nn.Module, *, masked: Masked = "outputs") -> dict[str, Tensor]:
    """What `remove` can take for nothing: for each group with units that are zero, which of them are not.

    "outputs": units of which all weights that take them are zero. "weights": units whose own weights, biases apart, are all zero, as
    filter pruning leaves them; heads are not looked at then. Masked layers count as their products.
    """
    checks.choice("masked", masked, MASKED)
    found = {}
    for name, group in groups(model).items():
        if masked == "weights" and group.kind == "heads":
            continue
        alive = torch.zeros(group.units, dtype=torch.bool)
        for cut in group.consumers if masked == "outputs" else group.producers:
            layer = model.get_submodule(cut.layer)
            weight = effective(layer)
            rows = weight.movedim(axis_of(layer, cut.side), 0).flatten(1).any(1).cpu()
            alive |= per_unit(rows, cut, group)
        if not bool(alive.all()):
            found[name] = alive
    return found


def remove(model: nn.Module, keep: Mapping[str, Tensor], *, masked: Masked = "outputs", probe: Any = None) -> Removed:
    """Take out every unit whose entry in `keep` is False, in place: names as `groups` gives them, bool masks of its `units`.

    The new model gives what the old one does when the units that go are masked:
    - "outputs": they add nothing to what takes them (its weights for them are zero);
    - "weights": their own weights are zero but their biases and norms are not, as pruned filters are. What then still comes
      out of them is a constant, which goes into the biases of what takes it; this needs an evaluation-mode norm, and is refused where
      padding makes it differ at the borders, and for heads.

    `probe` is a batch of inputs (a tensor, a tuple, or a mapping of keyword arguments) to compare answers on; models that take token
    ids need none. Attention keeps whole groups: each key-value head either goes or keeps as many query heads as the others.

    Raises TypeError or ValueError for what does not fit, before anything is changed, and when the answers differ, after all is
    put back.

    >>> model = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> cost = remove(model, {"0": torch.arange(8) < 4}, probe=torch.randn(5, 3))
    >>> model[0], model[2].weight.shape, (cost.before.macs, cost.after.macs)
    (Linear(in_features=3, out_features=4, bias=True), torch.Size([2, 4]), (40, 20))
    """
    checks.choice("masked", masked, MASKED)
    chosen = _chosen(model, keep, masked)
    inputs = _probe(model) if probe is None else probe
    before = cost(model)
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        wanted, taken = _masked_answer(model, chosen, masked, inputs)
        constants = _constants(model, chosen, taken) if masked == "weights" else {}
        undo = _Undo()
        try:
            for group, mask in chosen:
                _cut(model, group, mask, constants, undo)
            loadable = _settings(model, chosen, undo)
            found = _answer(model, inputs)
        except Exception as error:
            undo()
            raise ValueError(
                f"model must be one whose units can be followed: without some, {type(model).__name__} fails "
                f"({type(error).__name__}: {str(error)[:120]})"
            ) from error
        if not _same(found, wanted):
            undo()
            names = ", ".join(group.name for group, _ in chosen[:3])
            raise ValueError(
                f"model must be one whose units can be followed: {type(model).__name__} without some of {names} "
                "answers otherwise than masked"
            )
    finally:
        for module, mode in training.items():
            module.training = mode
    if not loadable and hasattr(model, "save_pretrained"):
        object.__setattr__(model, "save_pretrained", _refuse_saving)
    return Removed(before, cost(model), loadable)


# ---- checking ------------------------------------------------------------------------------------------------------------------------


def _chosen(model: nn.Module, keep: Mapping[str, Tensor], masked: Masked) -> list[tuple[Group, Tensor]]:
    if not isinstance(keep, Mapping):
        raise TypeError(f"keep must be a mapping of groups to masks, got {type(keep).__name__}")
    known = groups(model)
    chosen = []
    for name, given in keep.items():
        if name not in known:
            listed = ", ".join(list(known)[:4]) or "none"
            raise ValueError(
                f"keep must name groups of units that can be followed in {type(model).__name__} ({listed} ...), got {name!r}"
            )
        group = known[name]
        mask = checks.tensor(f"keep[{name!r}]", given, dtype="bool", shape=(group.units,)).cpu()
        if not bool(mask.any()):
            raise ValueError(f"keep[{name!r}] must keep at least one of {group.units} {group.kind}, got none")
        if group.kind == "heads":
            if masked == "weights":
                raise ValueError(f"keep must not name heads with masked='weights', got {name!r}")
            left = mask.view(group.shared, -1).sum(1)
            if len(set(left[left > 0].tolist())) > 1:
                raise ValueError(
                    f"keep[{name!r}] must keep as many query heads of each key-value head that stays, got {left.tolist()}"
                )
        for path in (*(cut.layer for cut in (*group.producers, *group.consumers)), *group.along):
            for own, parameter in model.get_submodule(path).named_parameters(recurse=False):
                if own == "weight_orig":
                    raise ValueError(f"keep[{name!r}] must be about plain weights: bake the mask of {path} first")
                if len(tied_names(model, parameter)) > 1:
                    raise ValueError(
                        f"keep[{name!r}] must be about weights that are not shared, got {tied_names(model, parameter)}"
                    )
        if not bool(mask.all()):
            chosen.append((group, mask))
    return chosen


def _probe(model: nn.Module) -> dict[str, Tensor]:
    config: Any = getattr(model, "config", None)
    vocabulary = getattr(config, "vocab_size", None)
    if config is None or vocabulary is None or not takes_token_ids(model):
        raise ValueError(
            f"probe must be given, a batch of inputs, for {type(model).__name__} takes something else than token ids"
        )
    device = next(model.parameters()).device
    return {"input_ids": torch.arange(2 * PROBE, device=device).view(2, PROBE) * 5 % vocabulary}


@torch.no_grad()
def _answer(model: nn.Module, inputs: Any) -> Tensor:
    out = run(model, inputs)
    for name in ("logits", "last_hidden_state"):
        if isinstance(found := getattr(out, name, None), Tensor):
            return found.detach()
    for leaf in tree_iter(out):
        if isinstance(leaf, Tensor) and leaf.is_floating_point():
            return leaf.detach()
    raise ValueError(f"model must answer with a floating-point tensor, got {type(out).__name__}")


def _same(found: Tensor, wanted: Tensor) -> bool:
    if found.shape != wanted.shape:
        return False
    distance, size = float((found.double() - wanted.double()).norm()), float(wanted.double().norm())
    return distance <= TOLERANCE.get(wanted.dtype, 1e-4) * size + 1e-30


# ---- what masked means ---------------------------------------------------------------------------------------------------------------


def _masked_answer(
    model: nn.Module, chosen: Sequence[tuple[Group, Tensor]], masked: Masked, inputs: Any
) -> tuple[Tensor, dict[str, Tensor]]:
    """The answer with the units that go masked, by hooks, no weight being touched; and what each consumer took, by its name."""
    taken: dict[str, Tensor] = {}
    handles = []
    for group, mask in chosen:
        for cut in group.consumers:
            layer = model.get_submodule(cut.layer)
            kept = places_of(cut, mask, group) if masked == "outputs" else None
            handles.append(layer.register_forward_pre_hook(_take(cut.layer, taken, kept)))
        for cut in group.producers if masked == "weights" else ():
            layer = model.get_submodule(cut.layer)
            handles.append(layer.register_forward_hook(_only_bias(places_of(cut, mask, group))))
    try:
        answer = _answer(model, inputs)
    except Exception as error:
        raise ValueError(
            f"probe must be inputs of {type(model).__name__}, got {type(error).__name__}: {str(error)[:120]}"
        ) from error
    finally:
        for handle in handles:
            handle.remove()
    if missed := [cut.layer for group, _ in chosen for cut in group.consumers if cut.layer not in taken]:
        raise ValueError(f"probe must reach every layer that is cut, got one that does not reach {missed[0]}")
    return answer, taken


def _spread(layer: nn.Module, vector: Tensor) -> Tensor:
    places = len(cast(Any, layer).kernel_size) if isinstance(layer, CONVOLUTIONS) else 0
    return vector.view(-1, *[1] * places)


def _take(name: str, taken: dict[str, Tensor], kept: Tensor | None) -> Callable[..., Any]:
    def hook(layer: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        taken[name] = args[0].detach()
        if kept is None:
            return None
        return (args[0] * _spread(layer, kept.to(args[0])), *args[1:])

    return hook


def _only_bias(kept: Tensor) -> Callable[..., Any]:
    def hook(layer: Any, args: Any, out: Tensor) -> Tensor:
        value = torch.zeros(len(kept)).to(out) if layer.bias is None else layer.bias.detach()
        return torch.where(_spread(layer, kept.to(out.device)), out, _spread(layer, value))

    return hook


def _constants(
    model: nn.Module, chosen: Sequence[tuple[Group, Tensor]], taken: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """By consumer, the constant that each of its inputs is when its unit's weights are zero; 0 for units that stay."""
    found = {}
    for group, mask in chosen:
        for cut in group.consumers:
            layer, x = model.get_submodule(cut.layer), taken[cut.layer]
            convolution = isinstance(layer, CONVOLUTIONS)
            rows = (x.movedim(1, -1) if convolution else x).flatten(0, -2)
            gone, value = ~places_of(cut, mask, group).to(x.device), rows[0]
            apart = (rows - value).abs().amax(0) > 1e-5 * value.abs()
            value = torch.where(gone, value, 0.0)
            padded = convolution and bool(value.any()) and any(_padding(layer))
            if padded or bool((apart & gone).any()):
                raise ValueError(
                    f"keep[{group.name!r}] must drop units that give {cut.layer} the same everywhere with masked='weights': "
                    "here padding makes borders differ"
                )
            found[cut.layer] = value
    return found


def _padding(conv: Any) -> tuple[int, ...]:
    if isinstance(conv.padding, str):
        return (0,) if conv.padding == "valid" else (1,)
    return tuple(conv.padding)


# ---- cutting -------------------------------------------------------------------------------------------------------------------------


@dataclass
class _Undo:
    """What was there, to be put back from the last change to the first."""

    steps: list[Callable[[], None]] = field(default_factory=list)

    def set(self, owner: Any, name: str, value: Any) -> None:
        """Set an attribute, a parameter or a buffer, and remember the one before."""
        store = next((d for d in (getattr(owner, k, {}) for k in ("_parameters", "_buffers")) if name in d), None)
        if store is not None:
            old = store[name]
            self.steps.append(lambda: store.__setitem__(name, old))
            store[name] = value
            return
        had, before = hasattr(owner, name), getattr(owner, name, None)
        self.steps.append(lambda: setattr(owner, name, before) if had else delattr(owner, name))
        setattr(owner, name, value)

    def __call__(self) -> None:
        while self.steps:
            self.steps.pop()()


def _select(tensor: Tensor, places: Tensor, axis: int) -> Tensor:
    kept = tensor.detach().index_select(axis, places.nonzero().squeeze(1).to(tensor.device)).clone()
    return nn.Parameter(kept, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else kept


def _cut(model: nn.Module, group: Group, mask: Tensor, constants: Mapping[str, Tensor], undo: _Undo) -> None:
    for cut in group.producers:
        layer: Any = model.get_submodule(cut.layer)
        places = places_of(cut, mask, group)
        undo.set(layer, "weight", _select(layer.weight, places, axis_of(layer, "out")))
        if layer.bias is not None:
            undo.set(layer, "bias", _select(layer.bias, places, 0))
        _resize(layer, "out", int(places.sum()), undo)
    for path in group.along:
        _cut_along(model.get_submodule(path), mask, undo)
    for cut in group.consumers:
        layer = model.get_submodule(cut.layer)
        places = places_of(cut, mask, group)
        value = constants.get(cut.layer)
        if value is not None and bool(value.any()):
            _fold(layer, value, undo)
        undo.set(layer, "weight", _select(layer.weight, places, axis_of(layer, "in")))
        _resize(layer, "in", int(places.sum()), undo)
    if group.kind == "heads":
        _recount(model.get_submodule(group.holder), group, mask, undo)


def _cut_along(layer: Any, mask: Tensor, undo: _Undo) -> None:
    for store in (layer._parameters, layer._buffers):
        for name, tensor in list(store.items()):
            if tensor is not None and tensor.dim():
                undo.set(layer, name, _select(tensor, mask, 0))
    units = int(mask.sum())
    for name in ("num_features",) if isinstance(layer, BATCH_NORMS) else ("groups", "in_channels", "out_channels"):
        undo.set(layer, name, units)


def _fold(layer: Any, value: Tensor, undo: _Undo) -> None:
    """Put what constant inputs give into the bias."""
    weight = layer.weight.detach()
    turned = weight.movedim(axis_of(layer, "in"), 1) if weight.dim() == 2 else weight
    kernel = turned.flatten(2).sum(2) if turned.dim() > 2 else turned
    more = (kernel.double() @ value.double()).to(weight.dtype)
    old = layer.bias
    new = more if old is None else old.detach() + more
    undo.set(
        layer, "bias", nn.Parameter(new, requires_grad=layer.weight.requires_grad if old is None else old.requires_grad)
    )


def _resize(layer: Any, side: Literal["out", "in"], size: int, undo: _Undo) -> None:
    names = {"out": ("out_features", "out_channels", "nf"), "in": ("in_features", "in_channels", "nx")}[side]
    for name in names:
        if hasattr(layer, name):
            undo.set(layer, name, size)


def _recount(holder: nn.Module, group: Group, mask: Tensor, undo: _Undo) -> None:
    """What an attention module remembers of its heads, and the parameters it has one of a head (attention sinks)."""
    heads, shared = int(mask.sum()), int(kept_of("shared", mask, group).sum())
    width = group.consumers[0].segments[0][1]
    numbers = dict.fromkeys(HEAD_COUNTS, heads) | dict.fromkeys(HEAD_WIDTHS, heads * width)
    numbers |= {"num_key_value_heads": shared, "num_key_value_groups": heads // shared}
    for name, value in numbers.items():
        if isinstance(getattr(holder, name, None), int):
            undo.set(holder, name, value)
    for name, parameter in list(holder._parameters.items()):
        if parameter is not None and parameter.shape == (group.units,):
            undo.set(holder, name, _select(parameter, mask, 0))


def _settings(model: Any, chosen: Sequence[tuple[Group, Tensor]], undo: _Undo) -> bool:
    """Write the new sizes into the configuration if it can hold them; whether a model made from it has the new shapes."""
    config = getattr(model, "config", None)
    if config is None:
        return False
    after = groups(model)
    trial = _Undo()
    try:
        _set_sizes(config, after, chosen, trial)
        holds = _has_shapes_of(config, model)
    except Exception:  # a configuration that checks its own numbers, or a model that is made otherwise
        holds = False
    if holds:
        undo.steps.extend(trial.steps)
    else:
        trial()
    return holds


def _set_sizes(config: Any, after: Mapping[str, Group], chosen: Sequence[tuple[Group, Tensor]], trial: _Undo) -> None:
    neurons = {group.units for group in after.values() if group.kind == "neurons"}
    if any(group.kind == "neurons" for group, _ in chosen) and len(neurons) == 1:
        old = next(group.units for group, _ in chosen if group.kind == "neurons")
        for name in NEURON_SETTINGS:
            now = getattr(config, name, None)
            if now == old or (name == "n_inner" and hasattr(config, name) and now is None):
                trial.set(config, name, min(neurons))
    heads = {
        (group.units, group.shared, group.consumers[0].segments[0][1])
        for group in after.values()
        if group.kind == "heads"
    }
    if any(group.kind == "heads" for group, _ in chosen) and len(heads) == 1:
        ((units, shared, width),) = heads
        trial.set(config, "head_dim", width)
        trial.set(config, "num_attention_heads", units)
        if hasattr(config, "num_key_value_heads"):
            trial.set(config, "num_key_value_heads", shared)


def _has_shapes_of(config: Any, model: Any) -> bool:
    again = type(config).from_dict(copy.deepcopy(config.to_dict()))
    with torch.device("meta"):
        fresh = type(model)(again)
    shapes = {name: tensor.shape for name, tensor in fresh.state_dict().items()}
    return shapes == {name: tensor.shape for name, tensor in model.state_dict().items()}


def _refuse_saving(*_: Any, **__: Any) -> None:
    raise ValueError(
        "model must not be saved by save_pretrained, for its configuration has no place for layers of different sizes: save its state "
        "dict and what was kept, and remove the same from a fresh model before loading it"
    )
