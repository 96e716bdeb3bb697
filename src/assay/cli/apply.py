"""`assay apply MODEL --recipe FILE -o DIR`: replay a recipe on another model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer


def apply(
    model: Annotated[
        str,
        typer.Argument(
            help="A folder, a .gguf file, a hub id in the local cache, or smollm2-135m; for a recipe of images the folder of a classifier."
        ),
    ],
    recipe: Annotated[Path, typer.Option(help="The recipe.toml to replay.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder of the new artefact.")],
    workload: Annotated[
        Path | None,
        typer.Option(
            help="Of an image model: a folder of pictures from which ranges are taken; crops of bundled photographs by default."
        ),
    ] = None,
    allow_download: Annotated[bool, typer.Option(help="Allow a hub id to be downloaded.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Replay a recipe on MODEL and save the result. Nothing is measured: `assay tune` does that."""
    from assay.cli.output import print_json
    from assay.errors import InputError
    from assay.tuner.images.kind import is_image_model
    from assay.tuner.images.recipe import is_image_recipe

    if is_image_model(model):
        words, label, steps = _to_images(model, recipe, output, workload)
    elif is_image_recipe(recipe):
        raise InputError(
            f"--recipe {recipe} is for image classifiers, and MODEL must be a folder with one; {model} is not such a folder"
        )
    elif workload is not None:
        raise InputError("--workload is for image models: what a language model is calibrated on comes with assay")
    else:
        from assay.tuner.artefact import apply_to

        done = apply_to(model, recipe, output, allow_download=allow_download)
        words, label, steps = done.words(), done.label(), [step.model_dump() for step in done.steps]
    if json:
        print_json({"artefact": str(output), "recipe": steps})
    else:
        typer.echo(f"{output}: {words}\nrecipe   {label}")


def _to_images(model: str, recipe: Path, output: Path, workload: Path | None) -> tuple[str, str, list[dict[str, Any]]]:
    """Replay a recipe on an image classifier: what it does in words, its label, its steps."""
    from assay.errors import InputError
    from assay.tuner.images.recipe import is_image_recipe
    from assay.tuner.images.replay import apply_to
    from assay.tuner.recipe import Recipe
    from assay.workloads.pictures import bundled_pictures

    if not is_image_recipe(recipe):
        Recipe.read(recipe)  # says what is wrong with a file that is no recipe at all
        raise InputError(f"--recipe {recipe} is for language models, and {model} is an image classifier")
    done = apply_to(model, recipe, output, workload if workload is not None else bundled_pictures())
    return done.words(), done.label(), [step.model_dump() for step in done.steps]
