"""`assay serve MODEL_OR_DIR`: an OpenAI-compatible server on loopback."""

from __future__ import annotations

import contextlib
import ipaddress
import os
import socket
import threading
import time
from collections.abc import Iterator
from typing import Annotated, Any

import typer

SAY_EVERY = 5.0  # seconds between two lines while a model loads
GRACE = 2  # seconds that answers have to end in when the server stops


def serve(
    model: Annotated[str, typer.Argument(help="An artefact of `assay tune`, or any MODEL.")],
    host: Annotated[str, typer.Option(help="Address to bind; anything but loopback needs an API key.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to bind; 0 takes a free one.")] = 8000,
    api_key: Annotated[
        str | None,
        typer.Option(
            help="Key clients must send; better in ASSAY_API_KEY, which other users of the machine do not see."
        ),
    ] = None,
    allow_download: Annotated[bool, typer.Option(help="Allow a hub id to be downloaded.")] = False,
) -> None:
    """Serve MODEL_OR_DIR under /v1 of the OpenAI API."""
    key = checked_key(api_key)
    with bound(host, port, key) as listener:
        address, number = listener.getsockname()[:2]
        with saying(f"loading {model}"):
            app = _load(model, key, allow_download)
        shown = f"[{address}]" if listener.family is socket.AF_INET6 else address
        with contextlib.suppress(KeyboardInterrupt):  # that is how it ends
            typer.echo(f"serving {app.state.engine.name!r} on http://{shown}:{number}/v1 (Ctrl-C ends it)", err=True)
            _run(app, listener)


def checked_key(api_key: str | None) -> str | None:
    """The key from the option or ASSAY_API_KEY, None for none. Raises InputError for one that no header can carry."""
    from assay.errors import InputError

    key = os.environ.get("ASSAY_API_KEY") or None if api_key is None else api_key
    if key is not None and (not key or not key.isascii() or not key.isprintable() or " " in key):
        raise InputError("--api-key (or ASSAY_API_KEY) must be one word of printable ASCII characters")
    return key


def bound(host: str, port: int, api_key: str | None) -> socket.socket:
    """A listening socket, opened before loading, so that nothing is loaded for a port that is taken; early clients wait.

    Raises InputError when the address is not one, is taken, must not be bound, or is open to others without a key.
    """
    from assay.errors import InputError

    if not 0 <= port < 65536:
        raise InputError(f"--port must lie in 0..65535, got {port}")
    try:
        family, *_, address = socket.getaddrinfo(host or "0.0.0.0", port, type=socket.SOCK_STREAM)[0]
    except (OSError, UnicodeError) as error:
        raise InputError(f"--host {host!r} is no address of this machine: {error}") from None
    if not ipaddress.ip_address(str(address[0]).partition("%")[0]).is_loopback and api_key is None:
        raise InputError(f"--host {host} is open to others: set --api-key or ASSAY_API_KEY, or stay on 127.0.0.1")
    try:
        return socket.create_server(address[:2], family=family, backlog=128)
    except OSError as error:
        reason = error.strerror or str(error)
        raise InputError(f"cannot serve on {host}:{port}: {reason}; --port 0 takes a free one") from None


@contextlib.contextmanager
def saying(what: str) -> Iterator[None]:
    """Say what is being done, at once and then every few seconds, on stderr."""
    typer.echo(f"{what} ...", err=True)
    start, done = time.monotonic(), threading.Event()

    def go_on() -> None:
        while not done.wait(SAY_EVERY):
            typer.echo(f"{what} ... {time.monotonic() - start:.0f} s", err=True)

    threading.Thread(target=go_on, daemon=True).start()
    try:
        yield
    finally:
        done.set()


def served_name(model: str) -> str:
    """The model's name for clients: the name of its folder or file, with `.` and `..` resolved, or the last part of its id."""
    path = os.path.abspath(os.path.expanduser(model))
    name = os.path.basename(path) if os.path.exists(path) else model.rstrip("/").rpartition("/")[2]
    return name.encode("utf-8", "replace").decode() or "model"


def _load(model: str, api_key: str | None, allow_download: bool) -> Any:
    from assay.errors import MissingError

    try:
        import uvicorn  # noqa: F401

        from assay.server.app import create_app
    except ModuleNotFoundError as error:
        raise MissingError(f"serving needs {error.name}: pip install 'assay[serve]'") from None
    from assay.tuner.artefact import load_tuned

    loaded = load_tuned(model, allow_download=allow_download)
    return create_app(loaded.model, loaded.tokenizer, name=served_name(model), api_key=api_key)


def _run(app: Any, listener: socket.socket) -> None:
    import uvicorn

    class Server(uvicorn.Server):
        def handle_exit(self, sig: int, frame: object) -> None:
            app.state.engine.stop()  # what runs ends now, and its clients are told
            super().handle_exit(sig, frame)  # type: ignore[arg-type]

    config = uvicorn.Config(
        app, http="h11", ws="none", log_level="warning", server_header=False, timeout_graceful_shutdown=GRACE
    )
    Server(config).run(sockets=[listener])
