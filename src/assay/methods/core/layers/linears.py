"""All parts of a model that multiply by a matrix: linear layers, GPT-2's transposed `Conv1D`, and fused experts.

transformers keeps the experts of a mixture in two three-dimensional tensors, where code that looks for layers does not find them,
although they are nine tenths of such a model's weights. `linears` shows all of them alike, as `nn.Linear` layers over the same
memory, and `open_` puts these into the model, so that whatever replaces linear layers replaces the experts as well. `share` says
how much of a model a method reaches.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from assay.methods.core.layers.surgery import bypassed, linear_kinds, output_layer

EXPERT_WEIGHTS = {"gate_up_proj", "down_proj", "gate_up_proj_bias", "down_proj_bias"}


class OpenExperts(nn.Module):
    """Fused experts as linear layers, `gate_up.0` .. and `down.0` .., over the same memory: (tokens, d) to (tokens, d).

    Takes what transformers passes to its experts: hidden states (tokens, d), the chosen experts (tokens, k) and their weights
    (tokens, k). Each expert computes only the tokens that chose it.
    """

    def __init__(self, experts: Any):
        super().__init__()
        self.num_experts = experts.num_experts
        self.gate_up, self.down = (
            nn.ModuleList(_slices(experts, "gate_up_proj")),
            nn.ModuleList(_slices(experts, "down_proj")),
        )
        shell = copy.copy(experts)
        shell._parameters = {}
        self._gate = (shell,)  # knows the activation; in a tuple, so that it is no part of the model

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        result = torch.zeros_like(hidden_states)
        for number in range(self.num_experts):
            token, place = (top_k_index == number).nonzero(as_tuple=True)
            if len(token) == 0:
                continue
            inner = self._gate[0]._apply_gate(self.gate_up[number](hidden_states[token]))
            y = self.down[number](inner) * top_k_weights[token, place, None]
            result.index_add_(0, token, y.to(result.dtype))
        return result


def fused_experts(model: nn.Module) -> dict[str, nn.Module]:
    """The modules of fused experts that `open_` knows how to take apart, by name."""
    return {name: module for name, module in model.named_modules() if _known_experts(module)}


def linears(model: nn.Module) -> dict[str, nn.Linear]:
    """Every linear layer by name, Conv1D and fused experts as `nn.Linear` over the same memory; nothing is changed.

    Subclasses of `nn.Linear` are left out: they often bypass their own forward; and so is what the model never calls
    (`surgery.bypassed`). The model itself is never among the results.
    """
    transposed, read = linear_kinds()[1], bypassed(model)
    found: dict[str, nn.Linear] = {}
    for name, module in model.named_modules():
        if module in read:
            continue
        if type(module) is nn.Linear and name:
            found[name] = module
        elif type(module) is transposed and name:
            weight: Any = module.weight
            found[name] = _linear(weight.T, module.bias)  # type: ignore[arg-type]
        elif _known_experts(module):
            for own, tensor in (("gate_up", "gate_up_proj"), ("down", "down_proj")):
                found |= {f"{name}.{own}.{i}": layer for i, layer in enumerate(_slices(module, tensor))}
    return found


def open_(model: nn.Module) -> nn.Module:
    """Put the layers that `linears` shows into the model, in place of Conv1D and fused experts: the same function, same memory."""
    transposed = linear_kinds()[1]
    for parent in list(model.modules()):
        for key, child in parent._modules.items():
            if type(child) is transposed:
                whole: Any = child
                parent._modules[key] = _linear(whole.weight.T, whole.bias).train(child.training)
            elif child is not None and _known_experts(child):
                parent._modules[key] = OpenExperts(child).train(child.training)
    return model


def settle(model: nn.Module) -> nn.Module:
    """After `open_` and `put`: give layers that are still views of a larger or transposed tensor their own memory.

    Otherwise they would keep the whole tensor alive and could not be saved.
    """
    for module in model.modules():
        if type(module) is nn.Linear and getattr(module, "opened", False):
            weight = module.weight
            own = weight.detach().clone(memory_format=torch.contiguous_format)
            module.weight = nn.Parameter(own, requires_grad=weight.requires_grad)
            del vars(module)["opened"]
    return model


def put(model: nn.Module, name: str, layer: nn.Module) -> None:
    """Put `layer` in the place of that name, and everywhere else the same module is registered."""
    parent, _, leaf = name.rpartition(".")
    old = model.get_submodule(parent)._modules[leaf]
    for other in list(model.modules()):
        for key, child in other._modules.items():
            if child is old:
                other._modules[key] = layer


def share(model: nn.Module, names: Iterable[str]) -> float:
    """The share of the multiplying weights, output layer excluded, that is in the layers of these names (names as `linears` gives them).

    Linear layers with their subclasses, Conv1D, experts, routers and the joint projection of `nn.MultiheadAttention` count, each
    tensor once. 1.0 for a model without any.

    >>> model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 24))
    >>> share(model, ["1"])
    0.75
    """
    whole = {id(weight): weight.numel() for _, weight in _multiplied(model)}
    shown, head = linears(model), output_layer(model)
    chosen = (shown[name] for name in names if shown[name] is not head)
    reached = {id(layer.weight): layer.weight.numel() for layer in chosen}
    return sum(reached.values()) / sum(whole.values()) if whole else 1.0


def left_alone(model: nn.Module, names: Iterable[str]) -> str:
    """What `share` counts but the layers of these names do not hold, in words for `Fit.reached`; "" if nothing."""
    chosen, shown = set(names), linears(model)
    experts: dict[str, None] = {}
    rest: dict[str, None] = {}
    for name, weight in _multiplied(model):
        if weight.dim() == 3 and not {f"{name}.gate_up.0", f"{name}.down.0"} <= chosen:
            experts[name] = None
        elif weight.dim() == 2 and not (name in chosen and name in shown):
            rest[name] = None
    parts = [
        f"{what} ({next(iter(found))} ...)"
        for what, found in ((f"the experts of {len(experts)} layers", experts), (f"{len(rest)} linear layers", rest))
        if found
    ]
    return f"{' and '.join(parts)} stay as they are" if parts else ""


def _multiplied(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Each weight that multiplies, with its module's name, except the output layer's."""
    head, transposed = output_layer(model), linear_kinds()[1]
    for name, module in model.named_modules():
        if module is head:
            continue
        plain = isinstance(module, nn.Linear | nn.MultiheadAttention) or type(module) is transposed
        matrix = plain or type(module).__name__.endswith("Router")
        for weight in module._parameters.values():
            if weight is not None and (weight.dim() == 2 and matrix or weight.dim() == 3 and _has_experts(module)):
                yield name, weight


def _has_experts(module: Any) -> bool:
    """Whether one tensor of this module holds the weights of several experts."""
    count = getattr(module, "num_experts", None)
    return any(
        weight is not None and weight.dim() == 3 and len(weight) == count for weight in module._parameters.values()
    )


def _known_experts(module: Any) -> bool:
    parameters = module._parameters
    if not {"gate_up_proj", "down_proj"} <= set(parameters) <= EXPERT_WEIGHTS or not hasattr(module, "_apply_gate"):
        return False
    plain = getattr(module, "has_gate", False) and not getattr(module, "has_post_expert_norm", False)
    stacked = all(parameters[name].dim() == 3 for name in ("gate_up_proj", "down_proj"))
    return bool(
        plain and stacked and hasattr(module, "is_transposed") and not getattr(module, "_is_expert_parallel", False)
    )


def _slices(experts: Any, name: str) -> list[nn.Linear]:
    weights, biases = getattr(experts, name), experts._parameters.get(f"{name}_bias")
    turned = weights.transpose(1, 2) if experts.is_transposed else weights
    return [_linear(turned[i], None if biases is None else biases[i]) for i in range(len(weights))]


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """An `nn.Linear` over existing memory."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    trained = bool(weight.requires_grad)
    layer.weight = nn.Parameter(weight.detach(), requires_grad=trained)
    vars(layer)["opened"] = True  # see `settle`
    if bias is not None:
        layer.bias = (
            bias if isinstance(bias, nn.Parameter) else nn.Parameter(bias.detach().clone(), requires_grad=trained)
        )
    return layer
