"""What config.json of a compressed-tensors checkpoint says: written for models of ours, and checked in those of others.

The format's reference is the package of that name, which transformers and vLLM read such folders with.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from assay.errors import InputError

METHOD = "compressed-tensors"
INT, PACK = "int-quantized", "pack-quantized"
BY_TOKEN = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}


def quantization_config(tensors: Mapping[str, Tensor], model: nn.Module) -> dict[str, Any]:
    """The `quantization_config` of an ordinary `model` whose weights are stored as `tensors`.

    The kind that most layers have is for all layers of the class Linear, the others are named, and so are those left as they are.
    """
    known = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    kinds: dict[str, list[str]] = {}
    for name, linear in known.items():
        if f"{name}.weight_scale" in tensors:
            kinds.setdefault(json.dumps(_scheme(name, linear, tensors)), []).append(name)
    ordered = sorted(kinds.items(), key=lambda item: -len(item[1]))
    groups: dict[str, Any] = {}
    for number, (text, names) in enumerate(ordered):
        groups[f"group_{number}"] = {"targets": names if number else ["Linear"], **json.loads(text)}
    formats = {INT if group["input_activations"] else PACK for group in groups.values()}
    if len(formats) > 1:
        for group in groups.values():
            group["format"] = INT if group["input_activations"] else PACK
    return {
        "quant_method": METHOD,
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": [name for name in known if f"{name}.weight_scale" not in tensors],
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }


def _scheme(name: str, linear: nn.Linear, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    if f"{name}.weight_packed" not in tensors:
        weights = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", "dynamic": False}
        return {"weights": weights, "input_activations": BY_TOKEN, "output_activations": None}
    words, groups = tensors[f"{name}.weight_packed"].shape[1], tensors[f"{name}.weight_scale"].shape[1]
    weights = {
        "num_bits": 32 * words // linear.in_features,
        "type": "int",
        "symmetric": f"{name}.weight_zero_point" not in tensors,
        "strategy": "group",
        "group_size": linear.in_features // groups,
        "dynamic": False,
    }
    return {"weights": weights, "input_activations": None, "output_activations": None}


@dataclass(frozen=True)
class Schemes:
    """What a checkpoint says of its layers: whether W8A8 ones may occur, and the widths of those in groups."""

    folder: Path
    wide: bool
    bits: frozenset[int]

    def require(self, stored: Mapping[str, Any], packed: Iterable[str]) -> None:
        """Raise InputError for a packed layer of a kind that no group of the configuration describes."""
        for name in packed:
            if f"{name}.weight_packed" not in stored and not self.wide:
                raise InputError(
                    f"{self.folder}: {name[:120]} is stored as int8, which no group of quantization_config describes"
                )


def read_schemes(folder: Path, settings: Any) -> Schemes:
    """Check the `quantization_config` of a checkpoint. Raises InputError naming the first thing in it that is not read here."""
    where = f"{folder}: quantization_config"

    def refuse(what: str, allowed: str) -> InputError:
        return InputError(f"{where}: {what[:200]} is not read here; {allowed}")

    if not isinstance(settings, dict) or settings.get("quant_method") != METHOD:
        raise InputError(f"{where} must be a table with the quant_method {METHOD!r}")
    if settings.get("format") not in (INT, PACK, "mixed-precision"):
        raise refuse(f"format {settings.get('format')!r}", f"read are {INT} and {PACK}")
    if settings.get("quantization_status", "compressed") not in ("compressed", "frozen"):
        raise refuse(f"quantization_status {settings['quantization_status']!r}", "it must be compressed")
    for name in ("kv_cache_scheme", "sparsity_config", "transform_config", "moe_sparsity_config"):
        value = settings.get(name)
        if value not in (None, {}) and not (isinstance(value, dict) and value.get("format") == "dense"):
            raise refuse(name, "leave it out when the model is compressed")
    groups = settings.get("config_groups")
    if not isinstance(groups, dict) or not groups:
        raise InputError(f"{where}.config_groups must be a table of groups")
    wide, bits = False, set()
    for label, group in groups.items():
        if not isinstance(group, dict) or not isinstance(weights := group.get("weights"), dict):
            raise InputError(f"{where}.config_groups.{str(label)[:40]} must be a table with weights")
        inputs, form = group.get("input_activations"), group.get("format") or settings["format"]
        if group.get("output_activations") is not None:
            raise refuse("output_activations", "outputs must not be quantised")
        if weights.get("type", "int") != "int" or weights.get("dynamic", False) is not False:
            raise refuse(f"weights of type {weights.get('type')!r}", "they must be integers, and static")
        if weights.get("actorder") not in (None, False, "weight", "static"):
            raise refuse(f"actorder {weights['actorder']!r}", "inputs must be in their order")
        if form == INT:
            if (
                weights.get("num_bits") != 8
                or weights.get("strategy") != "channel"
                or weights.get("symmetric") is not True
            ):
                raise refuse(
                    f"{INT} with weights {json.dumps(weights)}", "they must be symmetric, of 8 bits, by channel"
                )
            if not isinstance(inputs, dict) or any(inputs.get(name) != value for name, value in BY_TOKEN.items()):
                raise refuse(f"input_activations {json.dumps(inputs)}", f"they must be {json.dumps(BY_TOKEN)}")
            wide = True
        elif form == PACK:
            if weights.get("num_bits") not in (4, 8) or weights.get("strategy") not in ("group", "channel"):
                raise refuse(
                    f"{PACK} with weights {json.dumps(weights)}", "they must be of 4 or 8 bits, by group or channel"
                )
            if inputs is not None:
                raise refuse(f"{PACK} with input_activations", "inputs must not be quantised")
            bits.add(weights["num_bits"])
        else:
            raise refuse(f"format {form!r}", f"read are {INT} and {PACK}")
    return Schemes(folder, wide, frozenset(bits))
