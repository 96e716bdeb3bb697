"""`assay apply MODEL --recipe FILE -o DIR`: replay a recipe on another model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def apply(
    model: Annotated[str, typer.Argument(help="A folder, a .gguf file, a hub id in the local cache, or smollm2-135m.")],
    recipe: Annotated[Path, typer.Option(help="The recipe.toml to replay.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder of the new artefact.")],
    allow_download: Annotated[bool, typer.Option(help="Allow a hub id to be downloaded.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Replay a recipe on MODEL and save the result. Nothing is measured: `assay tune` does that."""
    from assay.cli.output import print_json
    from assay.tuner.artefact import apply_to

    done = apply_to(model, recipe, output, allow_download=allow_download)
    if json:
        print_json({"artefact": str(output), "recipe": [step.model_dump() for step in done.steps]})
    else:
        typer.echo(f"{output}: {done.words()}\nrecipe   {done.label()}")
