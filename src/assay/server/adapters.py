"""LoRA adapters as PEFT saves them: read as untrusted files, and merged into a model's weights.

An adapter is a folder with `adapter_config.json` and `adapter_model.safetensors`. Every setting that changes the function must be
one that is understood here, and every tensor in the file must find its layer; anything else is refused by name. Pickled
adapters are refused.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Mapping
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from assay import checks
from assay.errors import InputError
from assay.workloads.files import check_safetensors, read_json, safetensors_shapes

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
MOST_RANK = 4096
_PREFIX = "base_model.model."
_FACTOR = re.compile(r"^(?P<layer>.+)\.lora_(?P<factor>[AB])\.weight$")

# settings that say how an adapter was trained or where it came from, or that the file's own tensors tell
_TOLD_ELSEWHERE = {
    "arrow_config", "auto_mapping", "base_model_name_or_path", "corda_config", "ensure_weight_tying", "eva_config",
    "exclude_modules", "inference_mode", "init_lora_weights", "layers_pattern", "layers_to_transform", "loftq_config",
    "lora_dropout", "lora_ga_config", "megatron_config", "megatron_core", "peft_type", "peft_version", "qalora_group_size", "r",
    "rank_pattern", "revision", "runtime_config", "target_modules", "task_type",
}  # fmt: skip
_UNDERSTOOD = {"alpha_pattern", "bias", "fan_in_fan_out", "lora_alpha", "use_rslora"}
# ways to begin training that change the base model's own weights too, which the file does not hold
_CHANGES_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


def shared_copy(model: nn.Module) -> Any:
    """A copy of a model that shares all its tensors, so that layers of it can be given others at the cost of these alone."""
    tensors = chain(model.parameters(), model.buffers())
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})


@torch.no_grad()
def merge(model: nn.Module, folder: Path) -> int:
    """Add the adapter in `folder` to the weights of `model`, in new tensors; the number of layers changed.

    W + scale * B A, computed in float32 and stored in the weight's own type, with scale = alpha / r (alpha / sqrt(r) with
    `use_rslora`). Only linear layers (`nn.Linear`, and GPT-2's Conv1D, whose weights lie the other way round) are known.
    Raises InputError, naming the file, for anything damaged, not understood, or not fitting the model. The model is unchanged then.
    """
    from safetensors import safe_open

    config = _config(folder)
    path = folder / WEIGHTS
    shapes = safetensors_shapes(path)
    layers = _layers(path, shapes, dict(model.named_modules()))
    changed: dict[str, Tensor] = {}
    with safe_open(path, framework="pt") as file:
        for name, (down, up) in layers.items():
            layer = model.get_submodule(name)
            a, b = file.get_tensor(down).float(), file.get_tensor(up).float()
            delta = b @ a * _scale(folder, config, name, a.shape[0])
            weight: Any = layer.weight
            if not isinstance(layer, nn.Linear):
                delta = delta.T
            merged = (weight.detach().float() + delta).to(weight.dtype)
            if not bool(torch.isfinite(merged).all()):
                raise InputError(f"{path}: merging into {name} gives NaN or infinity")
            changed[name] = merged
    for name, merged in changed.items():
        model.get_submodule(name).weight = nn.Parameter(merged, requires_grad=False)
    return len(changed)


def _config(folder: Path) -> dict[str, Any]:
    """The adapter's settings. Raises InputError unless all that change the function are understood."""
    path = folder / CONFIG
    if not path.is_file():
        raise InputError(f"{folder}: no {CONFIG}, so this is no adapter")
    if not (folder / WEIGHTS).is_file():
        pickled = (folder / "adapter_model.bin").exists()
        why = (
            "its weights are pickled, which can run code when read; save it with safetensors"
            if pickled
            else f"no {WEIGHTS}"
        )
        raise InputError(f"{folder}: {why}")
    config = read_json(path)
    if config.get("peft_type") != "LORA":
        raise InputError(f"{path}: peft_type must be 'LORA', got {checks.shown(config.get('peft_type'))}")
    beginning = config.get("init_lora_weights")
    if isinstance(beginning, str) and beginning.lower().startswith(_CHANGES_THE_BASE):
        raise InputError(
            f"{path}: init_lora_weights {beginning!r} changed the base model too; convert it to plain LoRA"
        )
    for name, value in config.items():
        if name not in _TOLD_ELSEWHERE | _UNDERSTOOD and value not in (None, False, [], {}, "none"):
            raise InputError(f"{path}: {checks.shown(name)} is not supported here, got {checks.shown(value)}")
    try:
        checks.choice("bias", config.get("bias", "none"), ("none",))
        checks.flag("use_rslora", config.get("use_rslora") or False)
        checks.number("lora_alpha", config.get("lora_alpha"), low=-1e6, high=1e6)
        patterns = config.get("alpha_pattern") or {}
        if not isinstance(patterns, dict):
            raise TypeError(f"alpha_pattern must be an object, got {checks.shown(patterns)}")
        for pattern, alpha in patterns.items():
            checks.number(f"alpha_pattern[{pattern[:80]!r}]", alpha, low=-1e6, high=1e6)
    except (TypeError, ValueError) as error:
        raise InputError(f"{path}: {error}") from None
    return config


def _layers(
    path: Path, shapes: Mapping[str, tuple[int, ...]], known: Mapping[str, nn.Module]
) -> dict[str, tuple[str, str]]:
    """The names of both factors by the layer they change."""
    from transformers.pytorch_utils import Conv1D

    check_safetensors(path)
    pairs: dict[str, dict[str, str]] = {}
    for tensor in shapes:
        found = _FACTOR.match(tensor)
        if found is None:
            raise InputError(f"{path}: tensor {tensor[:120]!r} is no factor of a linear layer (lora_A, lora_B)")
        pairs.setdefault(found["layer"].removeprefix(_PREFIX), {})[found["factor"]] = tensor
    for name, pair in pairs.items():
        layer = known.get(name)
        if not isinstance(layer, nn.Linear | Conv1D):
            what = (
                "has no such layer"
                if layer is None
                else f"has a {type(layer).__name__} there, which is no linear layer"
            )
            raise InputError(f"{path}: changes {name[:120]!r}, but the model {what}")
        if len(pair) < 2:
            raise InputError(f"{path}: of {name[:120]!r} only lora_{next(iter(pair))} is there")
        down, up = shapes[pair["A"]], shapes[pair["B"]]
        weight = tuple(layer.weight.shape)
        width_out, width_in = weight if isinstance(layer, nn.Linear) else weight[::-1]
        rank = down[0] if down else 0
        if not 1 <= rank <= MOST_RANK or down != (rank, width_in) or up != (width_out, rank):
            raise InputError(
                f"{path}: the factors of {name[:120]!r} have shapes {down} and {up}; the layer of {width_in} to {width_out} "
                f"takes (r, {width_in}) and ({width_out}, r) with r up to {MOST_RANK}"
            )
    return {name: (pair["A"], pair["B"]) for name, pair in pairs.items()}


def _scale(folder: Path, config: Mapping[str, Any], name: str, rank: int) -> float:
    alpha = config["lora_alpha"]
    for pattern, own in (config.get("alpha_pattern") or {}).items():
        if _matches(folder, pattern, name):
            alpha = own
            break
    return float(alpha) / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _matches(folder: Path, pattern: str, name: str) -> bool:
    """Whether a pattern means a layer: its name, or the end of it after a dot. PEFT takes regular expressions, which are refused."""
    if not re.fullmatch(r"[\w.]+", pattern):
        raise InputError(f"{folder / CONFIG}: alpha_pattern {pattern[:80]!r} is no plain name of a layer")
    return name == pattern or name.endswith("." + pattern)
