"""One rank's share of a model for tensor parallelism: heads of attention, units of the MLP, and all the rest.

q, k, v, gate and up projections are cut by rows, o and down projections by columns, so that what the ranks compute adds up to the whole
module's output. Embeddings, norms and the head are the same on every rank. With fewer key/value heads than ranks, each rank has the one
head that its queries read.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from assay import checks
from assay.methods.core.models.decoder import Parts, parts_of

Range = tuple[int, int]
ENDS = {"attention": "o_proj", "mlp": "down_proj"}


class Slice(nn.Module):
    """Some rows (`dim` 0) or columns (1) of another linear layer, read when it runs: training it trains that layer."""

    def __init__(self, linear: nn.Linear, dim: int, ranges: list[Range], bias: bool) -> None:
        super().__init__()
        self._of = (linear,)  # in a tuple: its parameters are not ours
        self.dim, self.ranges, self.has_bias = dim, ranges, bias

    @property
    def weight(self) -> Tensor:
        return _cut(self._of[0].weight, self.dim, self.ranges)

    @property
    def bias(self) -> Tensor | None:
        bias = self._of[0].bias if self.has_bias else None
        return bias if bias is None or self.dim == 1 else _cut(bias, 0, self.ranges)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


def _cut(tensor: Tensor, dim: int, ranges: list[Range]) -> Tensor:
    pieces = [tensor.narrow(dim, start, end - start) for start, end in ranges]
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim)


def shard(model: nn.Module, rank: int, world: int, *, views: bool = False) -> Any:
    """The share of rank `rank` of `world`: a model of the same class with fewer heads and a narrower MLP, its weights copied.

    Summed over the ranks, what its layers add to the stream is what the whole model's layers add. With `views` nothing is copied: its
    weights are read from `model` whenever it runs, gradients included, and its other modules are those of `model`.

    Raises ValueError for a model whose parts are not understood (`decoder.why_not`), heads or MLP units that cannot be divided among
    `world`, key/value heads that neither divide `world` nor are divided by it, weights that are not plain linear layers or of another
    form, and architectures that do something with an output before it reaches the stream (Gemma 2's and OLMo 2's norms): it would have
    to wait for the sum. `model` is not changed.
    """
    world = checks.whole("world", world, low=1)
    rank = checks.whole("rank", rank, low=0, high=world - 1)
    whole = parts_of(model)
    sizes = sizes_of(whole.config, world)
    if why := _why_not_summable(whole):
        raise ValueError(f"model must add the outputs of attention and MLP to the stream as they are: {why}")
    made: Any = _empty(model, sizes)
    known: dict[int, Any] = {}  # what deepcopy has copied: tied weights stay tied
    for name, module in list(made.named_modules()):
        if any(True for _ in module.children()):
            continue
        original = model.get_submodule(name)
        if _shapes(original) == _shapes(module):
            found = original if views else copy.deepcopy(original, known)
        else:
            found = _share(name, original, _shapes(module), sizes, rank, world)
            found = found if views else _own(found)
        made.set_submodule(name, found)
    for name, tensor in [*made.named_parameters(), *made.named_buffers()]:
        if tensor.is_meta:
            raise ValueError(f"model must hold its weights in plain modules, {type(model).__name__} has {name}")
    made.generation_config = copy.deepcopy(getattr(model, "generation_config", None))
    return made.train(model.training)


def sizes_of(config: Any, world: int, *, called: str = "world") -> dict[str, int]:
    """Heads, key/value heads, their width and MLP units of the whole model.

    Raises ValueError where they cannot be divided among `world` ranks, a number that the message calls `called`.
    """
    heads, units = config.num_attention_heads, config.intermediate_size
    kv = getattr(config, "num_key_value_heads", None) or heads
    if heads % world:
        raise ValueError(f"{called} must divide the {heads} attention heads of the model, got {world}")
    if kv % world and world % kv:
        raise ValueError(
            f"{called} must divide the {kv} key/value heads of the model or be divided by them, got {world}"
        )
    if not isinstance(units, int) or units % world:
        raise ValueError(f"{called} must divide the {units} units of the model's MLPs, got {world}")
    dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    return {"heads": heads, "kv": kv, "dim": dim, "units": units, "world": world}


def _empty(model: nn.Module, sizes: dict[str, int]) -> nn.Module:
    """A model of the same class with a share's sizes and no weights."""
    config: Any = copy.deepcopy(model.config)
    config.num_attention_heads = sizes["heads"] // sizes["world"]
    config.num_key_value_heads = max(1, sizes["kv"] // sizes["world"])
    config.intermediate_size = sizes["units"] // sizes["world"]
    config.head_dim = sizes["dim"]
    with torch.device("meta"):
        made: nn.Module = type(model)(config)
    return made


def _ranges(name: str, sizes: dict[str, int], rank: int, world: int) -> tuple[int, list[Range]] | None:
    """Which part of a projection's weight a rank has: (dimension, ranges); None for a name that is none."""
    heads, kv, dim, units = (sizes[size] for size in ("heads", "kv", "dim", "units"))
    per_kv = max(1, kv // world)
    first_kv = rank * kv // world

    def run(first: int, count: int, offset: int = 0) -> Range:
        return offset + first, offset + first + count

    query = run(rank * heads // world * dim, heads // world * dim)
    key = run(first_kv * dim, per_kv * dim)
    unit = run(rank * units // world, units // world)
    return {
        "q_proj": (0, [query]),
        "k_proj": (0, [key]),
        "v_proj": (0, [key]),
        "o_proj": (1, [query]),
        "qkv_proj": (0, [query, run(*_of(key), heads * dim), run(*_of(key), (heads + kv) * dim)]),
        "gate_proj": (0, [unit]),
        "up_proj": (0, [unit]),
        "gate_up_proj": (0, [unit, run(*_of(unit), units)]),
        "down_proj": (1, [unit]),
    }.get(name)


def _of(part: Range) -> tuple[int, int]:
    """(first, count) of a range."""
    return part[0], part[1] - part[0]


def _share(
    name: str, original: nn.Module, wanted: list[torch.Size], sizes: dict[str, int], rank: int, world: int
) -> Slice:
    """A rank's part of a projection, checked to have the shape that the share needs."""
    found = _ranges(name.rpartition(".")[2], sizes, rank, world)
    if found is None or type(original) is not nn.Linear:
        raise ValueError(f"model must be made of plain linear projections, got {name}: {type(original).__name__}")
    dim, ranges = found
    weight = original.weight
    share = list(weight.shape)
    share[dim] = sum(end - start for start, end in ranges)
    if max(end for _, end in ranges) > weight.shape[dim] or torch.Size(share) != wanted[0]:
        raise ValueError(
            f"model must have {name} of one row or column a head or unit, got a weight of {tuple(weight.shape)}"
        )
    return Slice(original, dim, ranges, bias=original.bias is not None and (dim == 0 or rank == 0))


def _own(part: Slice) -> nn.Linear:
    """A linear layer with a copy of a slice's weights."""
    weight, bias = part.weight.detach().clone(), part.bias
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    linear.weight = nn.Parameter(weight)
    if bias is not None:
        linear.bias = nn.Parameter(bias.detach().clone())
    return linear


def _shapes(module: nn.Module) -> list[torch.Size]:
    return [parameter.shape for parameter in module.parameters(recurse=False)]


@torch.no_grad()
def _why_not_summable(parts: Parts) -> str:
    """Why what a module adds to the stream is not the very output of its last projection; empty if it is. Tried on random streams."""
    weight = parts.embed.weight
    run = parts.begin(torch.zeros(1, 3, dtype=torch.int64, device=weight.device))
    x = torch.randn(run.hidden.shape, generator=torch.Generator().manual_seed(0)).to(weight)
    seen: list[Tensor] = []

    def note(_module: nn.Module, _inputs: Any, output: Tensor) -> None:
        seen.append(output)

    for index, layer in enumerate(parts.layers):
        for module, end in ENDS.items():
            last = getattr(layer.self_attn if module == "attention" else layer.mlp, end, None)
            if last is None:
                return f"layer {index} has no {end}"
            seen.clear()
            hook = last.register_forward_hook(note)
            try:
                added = parts.attention(index, x, run) if module == "attention" else parts.feed_forward(index, x)
            finally:
                hook.remove()
            if len(seen) != 1 or not torch.equal(added, seen[0].view_as(added)):
                return f"layer {index} does more to the output of its {module} than {end}"
    return ""
