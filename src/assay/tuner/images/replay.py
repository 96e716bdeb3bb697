"""A recipe replayed on another image classifier, for `assay apply`."""

from __future__ import annotations

import copy
from pathlib import Path

import torch

from assay.errors import InputError
from assay.measure.cost import uncompiled
from assay.tuner.artefact import check_output
from assay.tuner.images.artefact import write
from assay.tuner.images.models import logits
from assay.tuner.images.recipe import ImageRecipe, apply
from assay.tuner.images.work import Settings, build


def apply_to(source: str, recipe_path: Path, folder: Path, pictures: Path) -> ImageRecipe:
    """Replay a recipe on another image classifier and save the result as an artefact; the recipe is applied once as a check.

    Ranges are taken from a folder of pictures as this model sees them. Raises InputError when the recipe does not fit the model, when the
    pictures cannot be read, or when the folder holds something else.
    """
    check_output(folder)
    recipe = ImageRecipe.read(recipe_path)
    work = build(Settings(source, recipe.goal, str(pictures)))
    calibration = work.calibration()
    changed = apply(copy.deepcopy(work.loaded.model), recipe, calibration)
    left = f"the recipe ({recipe.words()}) leaves a {work.loaded.architecture}"
    try:
        with torch.inference_mode(), uncompiled():
            said = logits(changed, calibration[0][:1])
    except (AttributeError, TypeError, ValueError, RuntimeError, IndexError) as error:
        raise InputError(f"{left} that does not run: {' '.join(str(error).split())[:200]}") from error
    if not bool(said.isfinite().all()):
        raise InputError(f"{left} whose logits are not finite")
    write(folder, work.loaded, recipe, calibration, {})
    return recipe
