"""The released checkpoints' layout: Qwen2 with `prefix_k` and `prefix_v` in each attention and an `aggregate_layer` beside the layers.

The official code is for inference and an older transformers (`trust_remote_code`); here its weights are read into
`ParScaleForCausalLM` and written back, from safetensors only. `published.WIDTHS` and `published.COMMON` have the sizes of the paper's
models, which give the parameter counts of its table (`published.PARAMETERS`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import Qwen2Config

from assay.errors import InputError
from assay.methods.inference.parscale.model import ParScaleConfig, ParScaleForCausalLM
from assay.paths import atomic_dir

KIND = "qwen2_parscale"
FIELDS = {"parscale_n": 1, "parscale_n_tokens": 48, "parscale_attn_smooth": 0.01}  # the released defaults
AGGREGATE = {
    "aggregator.first.weight": "model.aggregate_layer.0.weight",
    "aggregator.first.bias": "model.aggregate_layer.0.bias",
    "aggregator.second.weight": "model.aggregate_layer.2.weight",
    "aggregator.second.bias": "model.aggregate_layer.2.bias",
}
IGNORED = ("model_type", "architectures", "auto_map", "transformers_version", "torch_dtype", "dtype")


def released_config(fields: Mapping[str, Any]) -> ParScaleConfig:
    """The configuration that a released `config.json` describes. Raises InputError for another model type or bad fields."""
    if fields.get("model_type") != KIND:
        raise InputError(f"model_type must be {KIND!r}, got {fields.get('model_type')!r}")
    own = {name: fields.get(name, default) for name, default in FIELDS.items()}
    base = {name: value for name, value in fields.items() if name not in IGNORED and name not in FIELDS}
    try:
        return ParScaleConfig(base=Qwen2Config(**base), **own)
    except (TypeError, ValueError) as error:
        raise InputError(f"config.json: {error}") from None


def released_name(name: str) -> str:
    """The released name of one of our tensors.

    >>> released_name("prefixes.layers.3.keys"), released_name("base.model.norm.weight")
    ('model.layers.3.self_attn.prefix_k', 'model.norm.weight')
    """
    if name.startswith("prefixes.layers."):
        _, _, layer, part = name.split(".")
        return f"model.layers.{layer}.self_attn.prefix_{part[0]}"
    return AGGREGATE.get(name) or name.removeprefix("base.")


def from_released(
    fields: Mapping[str, Any], tensors: Mapping[str, Tensor], *, dtype: torch.dtype | None = None
) -> ParScaleForCausalLM:
    """A model of a released `config.json` and its tensors, in eval mode, in `dtype` (None: the tensors' own).

    Raises InputError for a configuration that `released_config` refuses, and for tensors that are missing, of another shape, or unknown.
    """
    config = released_config(fields)
    if not tensors:
        raise InputError("the checkpoint must hold tensors, got none")
    dtype = dtype or next(iter(tensors.values())).dtype
    model = ParScaleForCausalLM(config)
    cast(Any, model).to(dtype)
    own = model.state_dict()
    tied = {"base.lm_head.weight"} if config.base.tie_word_embeddings else set()
    names = {released_name(name): name for name in own if name not in tied}
    given = {name: value for name, value in tensors.items() if name != "lm_head.weight" or not tied}
    if missing := sorted(names.keys() - given.keys()):
        raise InputError(f"the checkpoint must hold {missing[0]} (and {len(missing) - 1} more that are missing)")
    if strange := sorted(given.keys() - names.keys()):
        raise InputError(f"the checkpoint holds {strange[0]}, which its configuration has no place for")
    for name, value in given.items():
        if own[names[name]].shape != value.shape:
            raise InputError(f"{name} must have shape {tuple(own[names[name]].shape)}, got {tuple(value.shape)}")
    model.load_state_dict({names[name]: value for name, value in given.items()}, strict=False)
    return model.eval()


def load_released(folder: Path | str, *, dtype: torch.dtype | None = None) -> ParScaleForCausalLM:
    """A released checkpoint in a folder: `config.json` and its `*.safetensors`. Raises InputError for what cannot be read."""
    folder = Path(folder)
    try:
        fields = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        tensors: dict[str, Tensor] = {}
        for file in sorted(folder.glob("*.safetensors")):
            tensors |= load_file(file)
    except (OSError, ValueError, SafetensorError) as error:
        raise InputError(f"{folder} must hold a released checkpoint of ParScale: {error}") from None
    if not isinstance(fields, dict) or not tensors:
        raise InputError(f"{folder} must hold config.json and *.safetensors")
    return from_released(fields, tensors, dtype=dtype)


def save_released(model: ParScaleForCausalLM, folder: Path | str) -> None:
    """Write a model in the released layout, which the official code loads: two files, whole or not at all.

    Raises ValueError for a base other than Qwen2 and for prefixes that come from an MLP (`fold_prefixes` first).
    """
    config: Any = model.config
    if config.base.model_type != "qwen2":
        raise ValueError(f"base must be a Qwen2 model, as the released layout is, got {config.base.model_type}")
    if config.parscale_prefix_hidden:
        raise ValueError("parscale_prefix_hidden must be 0: the released layout has plain prefixes (fold_prefixes)")
    tied = config.base.tie_word_embeddings
    tensors = {
        released_name(name): value.detach().contiguous()
        for name, value in model.state_dict().items()
        if not (tied and name == "base.lm_head.weight")
    }
    fields = config.base.to_dict() | {name: getattr(config, name) for name in FIELDS}
    rope = fields.pop("rope_parameters", None) or {}
    fields |= {"model_type": KIND, "rope_theta": rope.get("rope_theta", 10000.0), "rope_scaling": None}
    if rope.get("rope_type", "default") != "default":
        fields["rope_scaling"] = rope
    with atomic_dir(folder) as temporary:
        save_file(tensors, temporary / "model.safetensors", metadata={"format": "pt"})
        (temporary / "config.json").write_text(json.dumps(fields, indent=1, default=str), encoding="utf-8")
