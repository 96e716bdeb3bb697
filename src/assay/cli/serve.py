"""`assay serve MODEL_OR_DIR`: an OpenAI-compatible server on loopback."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer


def serve(
    model: Annotated[str, typer.Argument(help="An artefact of `assay tune`, or any MODEL.")],
    host: Annotated[str, typer.Option(help="Address to bind; anything but loopback needs an API key.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to bind.")] = 8000,
    api_key: Annotated[str | None, typer.Option(help="Key clients must send; ASSAY_API_KEY does the same.")] = None,
    allow_download: Annotated[bool, typer.Option(help="Allow a hub id to be downloaded.")] = False,
) -> None:
    """Serve MODEL_OR_DIR under /v1 of the OpenAI API."""
    from assay.errors import InputError, MissingError

    api_key = api_key or os.environ.get("ASSAY_API_KEY") or None
    if not 0 < port < 65536:
        raise InputError(f"--port must lie in 1..65535, got {port}")
    try:
        import uvicorn

        from assay.server.app import LOOPBACK, create_app
    except ModuleNotFoundError as error:
        raise MissingError(f"serving needs {error.name}: pip install 'assay[serve]'") from None
    if host not in LOOPBACK and api_key is None:
        raise InputError(f"--host {host} is open to others: set --api-key or ASSAY_API_KEY, or stay on 127.0.0.1")
    from assay.tuner.artefact import load_tuned

    loaded = load_tuned(model, allow_download=allow_download)
    app = create_app(loaded.model, loaded.tokenizer, name=Path(model).name, api_key=api_key)
    typer.echo(f"serving {model} on http://{host}:{port}/v1", err=True)
    uvicorn.run(app, host=host, port=port, log_level="warning")
