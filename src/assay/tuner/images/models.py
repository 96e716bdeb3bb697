"""Loads an image classifier, and what turns a picture into its input.

A source is a folder: either transformers' (config.json of an `...ForImageClassification`, *.safetensors, preprocessor_config.json), or one
that `save_backbone` wrote of a model of `assay.methods.vision`. Files are untrusted: checked first, no pickles, no remote code.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from assay.errors import InputError
from assay.paths import atomic_dir
from assay.tuner.images.kind import BACKBONE, SUFFIX, is_image_model
from assay.workloads.files import check_folder, check_safetensors

WEIGHTS = "model.safetensors"
LARGEST_SIDE = 4096


@dataclass
class ImageModel:
    """A classifier in eval mode. `inputs` makes (B, C, H, W) of pictures (`PIL.Image`), `labels` names its classes by number."""

    model: nn.Module
    inputs: Callable[[Sequence[Any]], Tensor]
    labels: dict[int, str]
    folder: Path
    architecture: str
    processor: Any = None


def load_image_model(source: str | Path) -> ImageModel:
    """Load a classifier on the CPU in eval mode. Raises InputError, naming the file, for anything that is none."""
    folder = Path(source)
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; an image model is a folder with its configuration and safetensors")
    if (folder / BACKBONE).is_file():
        return _backbone(folder)
    if not is_image_model(folder):
        raise InputError(f"{folder}: not an image classifier: config.json must name an architecture ...{SUFFIX}")
    check_folder(folder)
    from assay.workloads.models import _library_errors, _quiet_transformers

    with _library_errors(f"{folder}: cannot be loaded"), _quiet_transformers():
        from transformers import AutoConfig, AutoModelForImageClassification

        config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        model, info = AutoModelForImageClassification.from_pretrained(
            folder, config=config, use_safetensors=True, trust_remote_code=False, local_files_only=True,
            output_loading_info=True, dtype=torch.float32,
        )  # fmt: skip
        if absent := sorted(info["missing_keys"]):
            raise InputError(f"{folder}: the weights lack {len(absent)} tensors the model needs, e.g. {absent[0]}")
        processor = _processor(folder, config)
    labels = {int(number): str(name) for number, name in config.id2label.items()}

    def inputs(pictures: Sequence[Any]) -> Tensor:
        pixels: Tensor = processor(images=list(pictures), return_tensors="pt")["pixel_values"]
        return pixels

    return ImageModel(model.eval(), inputs, labels, folder, str(config.model_type), processor)


def save_backbone(
    model: nn.Module, folder: Path | str, *, name: str, labels: Sequence[str], mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None, size: int | None = None, **overrides: Any,
) -> None:  # fmt: skip
    """Write a model that `assay.methods.vision.build(name, num_classes=len(labels), **overrides)` made, for `assay tune` to read.

    `size` is the side that pictures are resized to (the model's `input_size`), `mean` and `std` what its inputs are normalised by
    (ImageNet's). The folder is written completely or not at all.
    """
    from safetensors.torch import save_file

    from assay.methods.core.vision.backbone import IMAGENET_MEAN, IMAGENET_STD

    own: Any = model
    document = {
        "name": name,
        "labels": list(labels),
        "in_chans": int(getattr(own, "in_chans", 3)),
        "overrides": overrides,
        "size": getattr(own, "input_size", 224) if size is None else size,
        "mean": list(mean or IMAGENET_MEAN),
        "std": list(std or IMAGENET_STD),
    }
    with atomic_dir(Path(folder)) as temporary:
        save_file({key: value.contiguous() for key, value in model.state_dict().items()}, temporary / WEIGHTS)
        (temporary / BACKBONE).write_text(json.dumps(document, indent=1), encoding="utf-8")


def _backbone(folder: Path) -> ImageModel:
    from safetensors.torch import load_file

    from assay.methods.core.vision.weights import misfit
    from assay.methods.vision import build

    file = folder / BACKBONE
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
        size, channels = document["size"], document["in_chans"]
        labels = {number: str(label) for number, label in enumerate(document["labels"])}
        mean, std = ([float(value) for value in document[key]] for key in ("mean", "std"))
        overrides = {str(key): _listed(value) for key, value in document["overrides"].items()}
        if not (
            type(size) is int and 1 <= size <= LARGEST_SIDE and labels and len(mean) == len(std) == 3 and min(std) > 0
        ):
            raise ValueError("size, labels, mean or std are out of range")
        model = build(str(document["name"]), num_classes=len(labels), in_chans=channels, **overrides)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(f"{file}: not a model of assay ({type(error).__name__}: {error})") from None
    check_safetensors(folder / WEIGHTS)
    state = load_file(folder / WEIGHTS)
    if wrong := misfit(model, state):
        raise InputError(f"{folder / WEIGHTS}: these are not the weights of {document['name']}: {wrong}")
    model.load_state_dict(state)
    processor = _plain_processor(size, mean, std)

    def inputs(pictures: Sequence[Any]) -> Tensor:
        pixels: Tensor = processor(images=list(pictures), return_tensors="pt")["pixel_values"]
        return pixels.mean(1, keepdim=True) if channels == 1 else pixels

    return ImageModel(model.eval(), inputs, labels, folder, str(document["name"]), None)


def _listed(value: Any) -> Any:
    """JSON's lists as the tuples that tables of configurations have."""
    return tuple(_listed(one) for one in value) if isinstance(value, list) else value


def _processor(folder: Path, config: Any) -> Any:
    """The folder's own processor, computed by PIL; where there is none, a resize to the model's size and ImageNet's normalisation."""
    from transformers import AutoImageProcessor

    if (folder / "preprocessor_config.json").is_file():
        return AutoImageProcessor.from_pretrained(folder, backend="pil", trust_remote_code=False, local_files_only=True)
    size = getattr(config, "image_size", 224)
    from assay.methods.core.vision.backbone import IMAGENET_MEAN, IMAGENET_STD

    return _plain_processor(size if isinstance(size, int) else 224, IMAGENET_MEAN, IMAGENET_STD)


def _plain_processor(size: int, mean: Sequence[float], std: Sequence[float]) -> Any:
    from transformers import ViTImageProcessorPil

    return ViTImageProcessorPil(
        size={"height": size, "width": size}, image_mean=list(mean), image_std=list(std), do_resize=True,
        do_rescale=True, do_normalize=True,
    )  # fmt: skip


def logits(model: nn.Module, pixels: Tensor) -> Tensor:
    """The model's logits (B, classes) of its inputs, cast to its dtype first."""
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), pixels.dtype)
    out = model(pixels.to(dtype))
    found: Tensor = out if isinstance(out, Tensor) else out.logits
    return found
