"""A model in a format that others read: the packed weights of an artefact, or those of a plain model rounded on the way.

Nothing is approximated: what a format cannot say to the last bit is refused by name. A recipe's other steps (attention, decoding
loop ...) are what assay does with the weights; no format holds them, and `Exported.left` names those that stay behind.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from assay.errors import InputError
from assay.methods.builtin.weight_only import WeightOnlyLinear
from assay.methods.core.layers.linears import linears, open_, put, settle
from assay.methods.core.layers.surgery import output_layer, page_out, refuse_saving, untie
from assay.methods.core.quantize.formats import pack_groups
from assay.methods.core.quantize.groups import GROUP, quantize_groups
from assay.methods.core.quantize.int8_linear import quantize_linears
from assay.paths import atomic_dir
from assay.tuner import gguf_file, packed, torchao_folder
from assay.tuner.artefact import _disk_errors, held_steps
from assay.tuner.images.kind import is_image_model
from assay.tuner.names import RECIPE
from assay.tuner.recipe import Recipe

FORMATS = ("compressed-tensors", "gguf", "torchao", "onnx")
WEIGHTS = ("w8a8", "w8a16", "w4a16", "w4a16-asymmetric")


@dataclass(frozen=True)
class Exported:
    """What was written: the format, the place, its bytes, and the steps of the recipe that stay behind."""

    format: str
    path: Path
    bytes: int
    left: tuple[str, ...] = ()


def export(
    source: str | Path, to: str, output: Path, *, weights: str | None = None, allow_download: bool = False
) -> Exported:
    """Write an artefact, or a model with its weights rounded to `weights` (one of `WEIGHTS`), in another format, completely or not at all.

    "compressed-tensors" gives a folder that transformers and vLLM load; "gguf" a file for llama.cpp (Q8_0, Q4_0 or Q4_1); "torchao" a
    folder that transformers loads through torchao 0.18 (8 bits alone: see `torchao_folder`).
    "onnx" gives a file of an image classifier, and of nothing else (`images.onnx_file`).
    "w8a8": int8 weights by output, inputs rounded by token. "w8a16", "w4a16": 8 or 4 bits with a scale per 32 inputs;
    "w4a16-asymmetric" with a minimum too, which GGUF knows and compressed-tensors does not. The output layer stays as it is.
    Raises InputError, naming the reason, for what the format cannot hold, and for a place that holds something else; OSError when
    the disk is full.
    """
    if to not in FORMATS:
        raise InputError(f"--to must be one of {', '.join(FORMATS)}, got {str(to)[:40]!r}")
    if weights is not None and weights not in WEIGHTS:
        raise InputError(f"--weights must be one of {', '.join(WEIGHTS)}, got {str(weights)[:40]!r}")
    if output.exists() and (output.is_file() or any(output.iterdir())):
        raise InputError(f"--output {output} is there already; name another place")
    if (to == "onnx") != is_image_model(source):
        raise InputError(
            f"{source}: image classifiers are written as onnx, and language models in the other formats, got --to {to}"
        )
    if to == "onnx":
        from assay.tuner.images import onnx_file

        if weights is not None:
            raise InputError("--weights is for language models: an image classifier is written as its recipe has it")
        with _disk_errors(output):
            behind = onnx_file.write(source, output)
        return Exported(to, output, output.stat().st_size, behind)
    loaded = packed.load_source(source, allow_download=allow_download)
    left = _left(loaded)
    if packed.has_packed_layers(loaded.model):
        if weights is not None:
            raise InputError(
                f"{source}: its weights are packed already; leave --weights out, or export the model it was made from"
            )
    elif weights is None:
        raise InputError(
            f"{source}: its weights are not packed; say with --weights how they are to be: {', '.join(WEIGHTS)}"
        )
    else:
        round_to(loaded.model, weights)
    with _disk_errors(output):
        if to == "gguf":
            gguf_file.write(output, loaded)
        else:
            _write_folder(output, loaded, to)
    size = sum(file.stat().st_size for file in ([output] if output.is_file() else output.iterdir()))
    return Exported(to, output, size, left)


def _left(loaded: Any) -> tuple[str, ...]:
    """The steps of a folder's recipe that its weights do not hold. Raises InputError for one that changes the model's structure."""
    if not (loaded.folder / RECIPE).is_file():
        return ()
    recipe = Recipe.read(loaded.folder / RECIPE)
    if (loaded.folder / packed.PACKED).is_file():
        return tuple(step.words() for step in recipe.after(packed.contents_of(loaded.folder).steps).steps)
    from assay.tuner.transforms import get_transform

    changing = [step.words() for step in recipe.steps if get_transform(step.transform).slot in ("structure", "linear")]
    if changing:
        raise InputError(
            f"{loaded.folder}: its recipe changes the model's layers ({changing[0]}), which no other format holds"
        )
    return tuple(step.words() for step in recipe.after(held_steps(recipe)).steps)


def _write_folder(output: Path, loaded: Any, to: str) -> None:
    """A folder that transformers loads."""
    with atomic_dir(output) as temporary:
        if to == "torchao":
            torchao_folder.write(temporary, loaded)
        else:
            contents = packed.save(temporary, loaded.model, 0)
            if contents.why:
                raise InputError(f"{loaded.source}: compressed-tensors cannot hold this model: {contents.why}")
            (temporary / packed.PACKED).unlink()
        wishes = getattr(loaded.model, "generation_config", None)
        if wishes is not None:
            (temporary / "generation_config.json").write_text(wishes.to_json_string(), encoding="utf-8")
        loaded.tokenizer.save_pretrained(temporary)


def round_to(model: nn.Module, weights: str) -> nn.Module:
    """Round the linear layers of a model, the output layer excepted, in place: see `export`. Raises InputError where that cannot be."""
    try:
        if weights == "w8a8":
            return quantize_linears(model, rotation=1)
        return _grouped(model, *{"w8a16": (8, False), "w4a16": (4, False), "w4a16-asymmetric": (4, True)}[weights])
    except ValueError as error:
        raise InputError(f"--weights {weights} does not fit this model: {error}") from None


def _grouped(model: nn.Module, bits: int, asymmetric: bool) -> nn.Module:
    head = output_layer(model)
    found = {
        name: layer for name, layer in linears(model).items() if layer is not head and layer.in_features % GROUP == 0
    }
    if not found:
        raise ValueError(f"it has no linear layer with a multiple of {GROUP} inputs")
    make: Callable[[nn.Linear], WeightOnlyLinear] = (
        (lambda layer: WeightOnlyLinear.from_linear(layer, bits)) if asymmetric or bits == 8 else _symmetric
    )
    open_(model)
    with torch.no_grad():
        for name in found:
            layer: Any = model.get_submodule(name)
            put(model, name, make(layer))
            page_out(layer.weight)
    untie(settle(model))
    return refuse_saving(model)


def _symmetric(linear: nn.Linear) -> WeightOnlyLinear:
    """4 bits with a scale per 32 inputs and no minimum of its own: a code stands for (code - 8) * scale."""
    codes, scale, minimum = quantize_groups(linear.weight.detach(), 4, GROUP, asymmetric=False)
    if not bool(torch.isfinite(minimum).all()):
        raise ValueError("it has weights that are too large for float16 scales")
    packed_ = pack_groups(codes, scale, minimum, 4)
    layer = WeightOnlyLinear.from_packed(packed_, linear.in_features, linear.out_features, 4)
    layer.bias, layer.dtype = linear.bias, linear.weight.dtype
    return layer.train(linear.training)
