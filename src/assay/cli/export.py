"""`assay export DIR --to FORMAT`: the packed weights of an artefact, or of a model, in a format that others read."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def export(
    model: Annotated[
        str, typer.Argument(metavar="DIR", help="An artefact of `assay tune`, or any model with --weights.")
    ],
    to: Annotated[
        str,
        typer.Option(
            help="compressed-tensors (a folder for transformers and vLLM), gguf (a file for llama.cpp), or torchao (a folder for "
            "transformers with torchao 0.18, 8 bits alone: the layout is a prototype of torchao's, and its 4 bits are made for its GPU "
            "kernels), or onnx (a file, of image classifiers alone)."
        ),
    ],
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", help="Where to write; without it, DIR-FORMAT or DIR.gguf beside DIR."),
    ] = None,
    weights: Annotated[
        str | None,
        typer.Option(
            help="How to round a model that is not packed: w8a8, w8a16, w4a16, or w4a16-asymmetric (gguf alone). Nothing is measured."
        ),
    ] = None,
    allow_download: Annotated[bool, typer.Option(help="Allow a hub id to be downloaded.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Write the weights of an artefact in a format that others read; what the format cannot hold to the last bit is refused by name."""
    from assay.cli.output import print_json
    from assay.tuner.export import export as write

    name = Path(model).name or "model"
    file = f"{name}.{to}" if to in ("gguf", "onnx") else f"{name}-{to}"
    place = output if output is not None else Path(model).with_name(file)
    done = write(model, to, place, weights=weights, allow_download=allow_download)
    if json:
        print_json({"format": done.format, "path": str(done.path), "bytes": done.bytes, "left": list(done.left)})
        return
    typer.echo(f"{done.path}: {done.format}, {done.bytes / 2**20:,.1f} MiB")
    if done.left:
        typer.echo(f"not in it, because only assay does it: {', '.join(done.left)}")
