"""LoRA adapters as PEFT saves them, merged into a model's weights: those of one folder (`methods/serving/blockllm/adapters.py` reads it).

Every tensor in the file must find its layer; anything else is refused by name.
"""

from __future__ import annotations

import copy
import hashlib
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from assay.errors import InputError
from assay.workloads.files import check_safetensors


def shared_copy(model: nn.Module) -> Any:
    """A copy of a model that shares all its tensors, so that layers of it can be given others at the cost of these alone."""
    tensors = chain(model.parameters(), model.buffers())
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})


def read(folder: Path) -> Any:
    """The factors in a folder, by the layer they change. Raises InputError, naming the file, for anything damaged or not understood."""
    from assay.methods.serving.blockllm.adapters import WEIGHTS, read_adapter

    if (folder / WEIGHTS).is_file():
        check_safetensors(folder / WEIGHTS)
    return read_adapter(folder)


def identity(folder: Path) -> str:
    """What an adapter is known by in the fingerprint: a hash of its files."""
    from assay.methods.serving.blockllm.adapters import CONFIG, WEIGHTS

    found = hashlib.sha256()
    for name in (CONFIG, WEIGHTS):
        file = folder / name
        if file.is_file():
            with open(file, "rb") as opened:
                found.update(hashlib.file_digest(opened, "sha256").digest())
    return found.hexdigest()


@torch.no_grad()
def merge(model: nn.Module, folder: Path) -> int:
    """Add the adapter in `folder` to the weights of `model`, in new tensors; the number of layers changed.

    W + scale * B A, computed in float32 and stored in the weight's own type. Only linear layers (`nn.Linear`, and GPT-2's Conv1D, whose
    weights lie the other way round) are known. Raises InputError, naming the file, for anything damaged, not understood, or not fitting
    the model. The model is unchanged then.
    """
    from transformers.pytorch_utils import Conv1D

    factors, known = read(folder), dict(model.named_modules())
    changed: dict[str, Tensor] = {}
    for name, one in factors.items():
        layer: Any = known.get(name)
        if not isinstance(layer, nn.Linear | Conv1D):
            what = (
                "has no such layer"
                if layer is None
                else f"has a {type(layer).__name__} there, which is no linear layer"
            )
            raise InputError(f"{folder}: changes {name[:120]!r}, but the model {what}")
        turned = not isinstance(layer, nn.Linear)
        shape, given = tuple(layer.weight.shape), (one.up.shape[0], one.down.shape[1])
        if given != (shape[::-1] if turned else shape):
            raise InputError(
                f"{folder}: the factors of {name[:120]!r} are for {given[1]} to {given[0]} numbers, the layer's weight is {shape}"
            )
        delta = one.delta().T if turned else one.delta()
        merged = (layer.weight.detach().float() + delta).to(layer.weight.dtype)
        if not bool(torch.isfinite(merged).all()):
            raise InputError(f"{folder}: merging into {name} gives NaN or infinity")
        changed[name] = merged
    for name, merged in changed.items():
        model.get_submodule(name).weight = nn.Parameter(merged, requires_grad=False)
    return len(changed)
