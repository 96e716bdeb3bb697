"""Writes a model with packed weights as torchao's safetensors layout, which transformers loads where torchao is installed.

The layout (`torchao.prototype.safetensors`, torchao 0.18) takes each quantised weight apart: `layer._weight_qdata`, `_weight_scale` and
`_weight_zero_point` are tensors of the file, and the file's metadata says by name of which class they are. W8A8 and 8-bit groups are
its Int8Tensor. 4 bits are refused: its Int4Tensor is laid out for GPU kernels, and what runs on CPUs keeps a byte a weight. It is a
prototype, so other versions may read it otherwise; torchao itself is not needed to write it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from assay.errors import InputError
from assay.methods.core.quantize.groups import GROUP
from assay.methods.core.quantize.stored import unpack_words
from assay.tuner.packed import stored, write_config

BY_ROW = {"_type": "PerRow", "_data": {"dim": -1}}
SYMMETRIC = {"_type": "MappingType", "_data": "SYMMETRIC"}
INPUTS = {
    "_type": "QuantizeTensorToInt8Kwargs",
    "_data": {"granularity": BY_ROW, "mapping_type": SYMMETRIC, "reduce_range": False},
}


def write(folder: Path, loaded: Any) -> None:
    """Write config.json and model.safetensors. Raises InputError for what the layout cannot hold."""
    from safetensors.torch import save_file

    model = loaded.model
    tensors, contents, shell = stored(model)
    if contents.why:
        raise InputError(f"{loaded.source}: torchao cannot hold this model: {contents.why}")
    found: dict[str, torch.Tensor] = {}
    described: dict[str, dict[str, Any]] = {}
    wide = grouped = False
    for name in [name for name in tensors if name.endswith(".weight_scale")]:
        layer = name.removesuffix(".weight_scale")
        scale, words = tensors.pop(name), tensors.pop(f"{layer}.weight_packed", None)
        if words is None:
            codes, wide = tensors.pop(f"{layer}.weight"), True
        else:
            rows, width = tensors.pop(f"{layer}.weight_shape").tolist()
            if (
                words.shape[1] * 4 != width
                or scale.shape[1] * GROUP != width
                or f"{layer}.weight_zero_point" in tensors
            ):
                raise InputError(
                    f"{loaded.source}: {layer} is in 4 bits or in groups that are not written for torchao here; its 4-bit layouts "
                    "are made for its GPU kernels: export with --weights w8a8 or w8a16, or to compressed-tensors"
                )
            codes, grouped = (unpack_words(words, 8, width).to(torch.int16) - 128).to(torch.int8), True
        found[f"{layer}._weight_qdata"], found[f"{layer}._weight_scale"] = codes, scale.to(torch.float32)
        found[f"{layer}._weight_zero_point"] = torch.zeros(scale.shape, dtype=torch.int8)
        described[f"{layer}.weight"] = {
            "_type": "Int8Tensor",
            "_data": {
                "act_quant_kwargs": INPUTS if words is None else None,
                "reduce_range": False,
                "block_size": [1, codes.shape[1] // scale.shape[1]],
                "dtype": {"_type": "torch.dtype", "_data": str(model.dtype).removeprefix("torch.")},
            },
            "_tensor_data_names": ["zero_point", "qdata", "scale"],
        }
    if wide and grouped:
        raise InputError(
            f"{loaded.source}: holds W8A8 and groups beside each other, which one torchao configuration does not say"
        )
    described |= {name: {"_type": "Tensor"} for name in tensors}
    metadata = {name: json.dumps(entry) for name, entry in described.items()}
    save_file(
        found | tensors,
        folder / "model.safetensors",
        metadata={"format": "pt", "tensor_names": json.dumps(list(described)), **metadata},
    )
    left = [
        name
        for name, module in shell.named_modules()
        if isinstance(module, torch.nn.Linear)
        and f"{name}.weight" in described
        and described[f"{name}.weight"]["_type"] == "Tensor"
    ]
    write_config(folder, model, _settings(wide, left))


def _settings(wide: bool, left: list[str]) -> dict[str, Any]:
    granularity = {"_type": "PerRow", "_version": 1, "_data": {"dim": -1}}
    if wide:
        data: dict[str, Any] = {
            "act_mapping_type": SYMMETRIC,
            "granularity": granularity,
            "reduce_range": False,
            "set_inductor_config": True,
            "weight_only_decode": False,
        }
        kind = {"_type": "Int8DynamicActivationInt8WeightConfig", "_version": 2, "_data": data}
    else:
        data = {"group_size": None, "granularity": {"_type": "PerGroup", "_version": 1, "_data": {"group_size": GROUP}}}
        kind = {"_type": "Int8WeightOnlyConfig", "_version": 2, "_data": data | {"set_inductor_config": True}}
    return {
        "quant_method": "torchao",
        "quant_type": {"default": kind},
        "modules_to_not_convert": left or None,
        "include_input_output_embeddings": False,
        "untie_embedding_weights": False,
    }
