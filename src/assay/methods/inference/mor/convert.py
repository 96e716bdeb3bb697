"""Mixture-of-Recursions from a checkpoint: fewer stored layers, made from the model's, that run as deep as it did."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from assay import checks
from assay.methods.core.models.decoder import kinds_of, parts_of
from assay.methods.inference.mor.model import MoRConfig, MoRForCausalLM
from assay.methods.inference.mor.plan import SHARINGS

INITS = ("stepwise", "average", "lower", "upper", "random")


def sources(layers: int, recursions: int, sharing: str, init: str) -> tuple[list[list[int]], int]:
    """From which of `layers` layers each stored one is made (several: their mean; none: anew), and how many layers are left over.

    "stepwise" spreads the stored layers evenly over the shared part, its first and last layer included; "average" takes the mean of the
    layers that a stored one stands for; "lower" and "upper" take the first or the last of the shared part; "random" none. The layers that
    stand alone ("middle_...") keep theirs. Left over are the last of the shared part where it is not a multiple of `recursions` long.
    Raises ValueError for too few layers.

    >>> sources(8, 2, "middle_cycle", "stepwise"), sources(5, 2, "middle_cycle", "average")
    (([[0], [1], [4], [6], [7]], 0), ([[0], [1, 2], [4]], 1))
    """
    layers, recursions = checks.whole("layers", layers, low=1), checks.whole("recursions", recursions, low=1)
    checks.choice("sharing", sharing, SHARINGS)
    checks.choice("init", init, INITS)
    ends = 1 if sharing.startswith("middle") else 0
    middle = list(range(ends, layers - ends))
    size = len(middle) // recursions
    if not size:
        raise ValueError(
            f"model must have at least {recursions + 2 * ends} layers for {recursions} recursions, got {layers}"
        )
    if init == "stepwise":
        step = (len(middle) - 1) / (size - 1) if size > 1 else 0.0
        block = [[middle[int(j * step + 0.5)]] for j in range(size)]
    elif init == "average" and sharing.endswith("cycle"):
        block = [[middle[j + r * size] for r in range(recursions)] for j in range(size)]
    elif init == "average":
        block = [[middle[j * recursions + r] for r in range(recursions)] for j in range(size)]
    elif init == "random":
        block = [[] for _ in range(size)]
    else:
        block = [[index] for index in (middle[:size] if init == "lower" else middle[-size:])]
    alone = [[0]] * ends, [[layers - 1]] * ends
    return [*alone[0], *block, *alone[1]], len(middle) - size * recursions


def convert(
    model: nn.Module,
    *,
    recursions: int = 2,
    sharing: str = "middle_cycle",
    init: str = "stepwise",
    seed: int = 0,
    **settings: Any,
) -> MoRForCausalLM:
    """A new model whose stored layers are made from those of `model` and run `recursions` times; for the paper's continued training, in
    which all parameters take part.

    `init` is "stepwise", "average", "lower", "upper" or "random" (see `sources`; `seed` draws new layers and routers), `settings` are the
    other fields of `MoRConfig`. Embeddings, last norm and head are copied; `model` stays as it is. Layers that are left over are dropped
    with a UserWarning that says how many. What comes out has lost much of what the model knew: train it.
    Raises ValueError for a model whose parts are not understood, too few layers, and layers of different attention that would be one.
    """
    source: Any = model
    parts = parts_of(model)
    chosen, dropped = sources(len(parts.layers), recursions, sharing, init)
    config = _shortened(source.config, parts.kinds, chosen)
    MoRConfig(config, recursions=recursions, sharing=sharing, **settings)  # refuses before anything is made
    reference = parts.embed.weight
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(checks.whole("seed", seed, low=0))
        made = type(source)(config).to(reference.device)
        for parameter in made.parameters():
            parameter.data = parameter.data.to(reference.dtype)
        for name, buffer in made.named_buffers():  # rotary tables, in the precision that the model's have
            if not name.startswith("model.layers."):
                buffer.data = source.get_buffer(name).clone()
        own = parts_of(made)
        others = {name: value for name, value in source.state_dict().items() if not name.startswith("model.layers.")}
        made.load_state_dict(others, strict=False)
        for layer, indices in zip(own.layers, chosen, strict=True):
            if indices:
                layer.load_state_dict(_mean([parts.layers[index].state_dict() for index in indices]))
        if dropped:
            warnings.warn(
                f"{dropped} of {len(parts.layers)} layers were dropped: the shared part is no multiple of {recursions} recursions",
                stacklevel=2,
            )
        made.train(source.training)
        if getattr(source, "generation_config", None) is not None:
            made.generation_config = copy.deepcopy(source.generation_config)
        return MoRForCausalLM.from_base(made, recursions=recursions, sharing=sharing, **settings)


def _mean(states: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    if len(states) == 1:
        return states[0]
    return {
        name: torch.stack([state[name].float() for state in states]).mean(0).to(value.dtype)
        for name, value in states[0].items()
    }


def _shortened(config: Any, kinds: list[str], chosen: list[list[int]]) -> Any:
    """The configuration of the stored layers: their number, and what it says of single ones."""
    for indices in chosen:
        if len({kinds[index] for index in indices}) > 1:
            raise ValueError(
                f"layers {indices} must have the same attention to be one, got {', '.join(kinds[index] for index in indices)}"
            )
    places = [indices[0] if indices else number for number, indices in enumerate(chosen)]
    short = copy.deepcopy(config)
    for name, value in vars(config).items():
        if isinstance(value, list) and len(value) == config.num_hidden_layers and name.endswith(("_types", "_layers")):
            setattr(short, name, [value[place] for place in places])
    short.num_hidden_layers = len(chosen)
    if kinds_of(short) != [kinds[place] for place in places]:
        raise ValueError("model must name the attention of its layers one by one (layer_types) to lose some of them")
    return short
