"""The artefact of an image model: a folder that transformers can read as it is, with the recipe that makes its model cheaper.

    model.safetensors, config.json, preprocessor_config.json    the model as it was (or assay_backbone.json, of this package's registry)
    recipe.toml                                                  what is done to it when it is loaded
    calibration.safetensors                                      the inputs that ranges are taken from
    report.html, evidence.jsonl                                  the proof

Weights are stored as they were: 8-bit convolutions are made again when the model is loaded, from the same pictures.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from torch import Tensor

from assay.errors import InputError
from assay.paths import atomic_dir
from assay.tuner.images.kind import BACKBONE
from assay.tuner.images.models import WEIGHTS, ImageModel, load_image_model
from assay.tuner.images.recipe import ImageRecipe, apply, is_image_recipe
from assay.tuner.images.work import Settings, build
from assay.tuner.names import CALIBRATION, EVIDENCE, RECIPE, REPORT

MOST_CALIBRATION = 1 << 28  # numbers read from an artefact


def save(folder: Path, settings: Settings, recipe: ImageRecipe, document: dict[str, Any]) -> None:
    """Write what tuning found, with its report and its evidence, completely or not at all."""
    from assay.tuner.images.report import render

    work = build(settings)
    texts = {REPORT: render(document), EVIDENCE: json.dumps(document, allow_nan=False) + "\n"}
    write(folder, work.loaded, recipe, work.calibration() if recipe.steps else [], texts)


def write(
    folder: Path, loaded: ImageModel, recipe: ImageRecipe, calibration: list[Tensor], texts: dict[str, str]
) -> None:
    """Write an artefact, completely or not at all: the model as it was, the recipe, what its ranges are taken from, and files of text."""
    from safetensors.torch import save_file

    with atomic_dir(folder) as temporary:
        _model(loaded, temporary)
        recipe.save(temporary / RECIPE)
        if recipe.steps:
            batches = {f"batch{number:03}": batch.contiguous() for number, batch in enumerate(calibration)}
            save_file(batches, temporary / CALIBRATION)
        for name, text in texts.items():
            (temporary / name).write_text(text, encoding="utf-8")


def load(folder: Path | str) -> ImageModel:
    """The model of an artefact, its recipe applied. Raises InputError for a folder that is none, or has been damaged."""
    folder = Path(folder)
    recipe = ImageRecipe.read(folder / RECIPE)
    loaded = load_image_model(folder)
    loaded.model = apply(loaded.model, recipe, read_calibration(folder / CALIBRATION) if recipe.steps else [])
    return loaded


def is_image_artefact(folder: Path | str) -> bool:
    """Whether a folder holds an artefact of an image model."""
    return is_image_recipe(Path(folder) / RECIPE)


def read_calibration(path: Path) -> list[Tensor]:
    """The batches of inputs of an artefact. Raises InputError for anything else than finite pictures in float32."""
    from safetensors.torch import load_file

    from assay.workloads.files import safetensors_shapes

    if not path.is_file():
        raise InputError(f"{path}: missing; the recipe takes its ranges from it")
    shapes = safetensors_shapes(path)
    sizes = [shape for shape in shapes.values() if len(shape) == 4 and 0 not in shape]
    numbers = sum(int(a) * int(b) * int(c) * int(d) for a, b, c, d in sizes)
    if not sizes or len(sizes) < len(shapes) or numbers > MOST_CALIBRATION:
        raise InputError(
            f"{path}: must hold batches of pictures of four dimensions, at most {MOST_CALIBRATION:,} numbers"
        )
    found = load_file(path)
    batches = [found[name] for name in sorted(found)]
    if any(not batch.is_floating_point() or not bool(batch.isfinite().all()) for batch in batches):
        raise InputError(f"{path}: pictures must be finite floating-point numbers")
    return [batch.float() for batch in batches]


def _model(loaded: ImageModel, folder: Path) -> None:
    """The model as it was, in the layout it came in."""
    if (loaded.folder / BACKBONE).is_file():
        for name in (BACKBONE, WEIGHTS):
            shutil.copyfile(loaded.folder / name, folder / name)
        return
    model: Any = loaded.model
    model.save_pretrained(folder)
    if loaded.processor is not None:
        loaded.processor.save_pretrained(folder)
