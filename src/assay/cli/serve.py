"""`assay serve MODEL_OR_DIR...`: an OpenAI-compatible server on loopback."""

from __future__ import annotations

import contextlib
import ipaddress
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from assay.server.names import served_name

SAY_EVERY = 5.0  # seconds between two lines while a model loads
GRACE = 2  # seconds that answers have to tell their clients in when they are ended


def serve(
    models: Annotated[
        list[str] | None,
        typer.Argument(help="Artefacts of `assay tune`, or any MODEL; served by their folders' names."),
    ] = None,
    model: Annotated[
        list[str] | None, typer.Option(help="NAME=MODEL_OR_DIR: one more, under a name of its own; may be repeated.")
    ] = None,
    adapter: Annotated[
        list[str] | None,
        typer.Option(
            help="NAME=DIR: the first model with a LoRA adapter, under a name of its own; NAME@MODEL=DIR: another model with it. "
            "May be repeated."
        ),
    ] = None,
    share_blocks: Annotated[
        bool,
        typer.Option(
            help="Serve all these models and adapters, fine-tuned variants of one, from one zoo of blocks: what they have in common is in "
            "memory once, and their requests share batches."
        ),
    ] = False,
    router: Annotated[
        Path | None,
        typer.Option(help="Router that chooses where clients ask for the model auto, as `ModelRouter.save` writes it."),
    ] = None,
    host: Annotated[str, typer.Option(help="Address to bind; anything but loopback needs an API key.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to bind; 0 takes a free one.")] = 8000,
    api_key: Annotated[
        list[str] | None,
        typer.Option(
            help="Key clients must send, or several, each by an option; better in ASSAY_API_KEY (several with spaces between) or a "
            "file, which other users of the machine do not see."
        ),
    ] = None,
    api_key_file: Annotated[Path | None, typer.Option(help="File with a key a line; # begins a remark.")] = None,
    allow_download: Annotated[bool, typer.Option(help="Allow a hub id to be downloaded.")] = False,
    allow_load: Annotated[
        bool,
        typer.Option(help="Let those who have a key load and unload models; they may read any model on this machine."),
    ] = False,
    max_running: Annotated[int, typer.Option(help="Answers that are made at a time, of each model.")] = 64,
    prefill_chunk: Annotated[
        int, typer.Option(help="Tokens of a prompt that run between two tokens of the others; a multiple of 16.")
    ] = 256,
    kv_gib: Annotated[
        float | None,
        typer.Option(help="GiB for the keys and values of each model; by default what its backend chooses."),
    ] = None,
    max_requests: Annotated[int, typer.Option(help="Requests that run or wait; further ones are sent away.")] = 256,
    max_body: Annotated[
        int | None, typer.Option(help="Bytes of a request; by default as many as the longest context needs.")
    ] = None,
    max_prompt_tokens: Annotated[
        int | None, typer.Option(help="Tokens of a prompt; by default the model's context.")
    ] = None,
    request_timeout: Annotated[float, typer.Option(help="Seconds from a request to the end of its answer.")] = 600.0,
    drain_seconds: Annotated[
        float,
        typer.Option(help="Seconds that answers have to end in after SIGTERM or Ctrl-C; a second signal ends them."),
    ] = 30.0,
    cors_origin: Annotated[
        list[str] | None, typer.Option(help="Website whose pages may call the server (* for any); may be repeated.")
    ] = None,
    root_path: Annotated[str, typer.Option(help="What a proxy puts before the paths, such as /llm.")] = "",
    log_requests: Annotated[
        bool, typer.Option(help="Log a line of JSON a request on stderr; never what is in it.")
    ] = True,
    spans: Annotated[
        Path | None,
        typer.Option(
            help="File for a Chrome trace of where each token's time went (the newest 50,000), written when the server ends."
        ),
    ] = None,
) -> None:
    """Serve models under /v1 of the OpenAI API."""
    from assay import checks
    from assay.errors import InputError
    from assay.paths import output_file

    keys = checked_keys(api_key, api_key_file)
    spans = None if spans is None else output_file(spans, "--spans")
    if allow_load and not keys:
        raise InputError("--allow-load needs a key: set ASSAY_API_KEY, --api-key or --api-key-file")
    try:
        limits: dict[str, Any] = {
            "requests": checks.whole("--max-requests", max_requests, low=1, high=100_000),
            "body": None if max_body is None else checks.whole("--max-body", max_body, low=1),
            "prompt_tokens": (
                None if max_prompt_tokens is None else checks.whole("--max-prompt-tokens", max_prompt_tokens, low=1)
            ),
            "seconds": checks.number("--request-timeout", request_timeout, above=0),
        }
        checks.whole("--max-running", max_running, low=1, high=1024)
        if checks.whole("--prefill-chunk", prefill_chunk, low=16) % 16:
            raise ValueError(f"--prefill-chunk must be a multiple of 16, got {prefill_chunk}")
        drain = checks.number("--drain-seconds", drain_seconds, low=0)
        if kv_gib is not None:
            checks.number("--kv-gib", kv_gib, above=0)
    except ValueError as error:
        raise InputError(str(error)) from None
    wanted = named_models(models or [], model or [])
    adapted = named_adapters(adapter or [], [name for name, _ in wanted])
    if spans is not None and share_blocks:
        raise InputError("--spans watches the steps of one model: leave --share-blocks out")
    chooser = None if router is None else read_router(router, [name for name, *_ in (*wanted, *adapted)])
    with bound(host, port, keys) as listener:
        _require_server()
        running = _Running(
            listener=listener,
            keys=keys,
            limits=limits,
            options={"allow_load": allow_load, "cors_origins": cors_origin or [], "root_path": checked_root(root_path)},
            held={
                "max_running": max_running,
                "prefill_chunk": prefill_chunk,
                "kv_gib": kv_gib,
                "allow_download": allow_download,
                "router": chooser,
            },
            drain_seconds=drain,
            log_requests=log_requests,
            spans=spans,
        )
        with contextlib.suppress(KeyboardInterrupt):  # a second Ctrl-C
            running.run(lambda: _load(running.models, wanted, adapted, running.watch, share_blocks))


def checked_keys(given: list[str] | None, file: Path | None) -> list[str]:
    """The keys from the options, the file and ASSAY_API_KEY; an empty list for none. Raises InputError for one no header can carry.

    ASSAY_API_KEY counts only where no option names a key.
    """
    from assay.errors import InputError

    keys = list(given or [])
    if file is not None:
        try:
            lines = file.expanduser().read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"--api-key-file {file}: cannot be read ({error})") from None
        found = [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
        if not found:
            raise InputError(f"--api-key-file {file}: holds no key")
        keys += found
    if given is None and file is None:
        keys = (os.environ.get("ASSAY_API_KEY") or "").split(" ")
        keys = [key for key in keys if key]
    if any(not key or not key.isascii() or not key.isprintable() or " " in key for key in keys):
        raise InputError("--api-key (or ASSAY_API_KEY) must be one word of printable ASCII characters")
    return keys


def named_models(plain: list[str], named: list[str]) -> list[tuple[str, str]]:
    """Names and sources of the models to serve, in order. Raises InputError for none, a name twice, or one that is no name."""
    from assay.errors import InputError

    found = [(served_name(source), source) for source in plain]
    found += [_pair("--model", "NAME=MODEL_OR_DIR", text) for text in named]
    if not found:
        raise InputError("name a model to serve: `assay serve MODEL_OR_DIR` or --model NAME=MODEL_OR_DIR")
    names = [name for name, _ in found]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise InputError(f"two models would be served as {twice!r}; give one another name: --model NAME=MODEL_OR_DIR")
    return found


def named_adapters(given: list[str], models: list[str]) -> list[tuple[str, str, str]]:
    """Names, folders and base models of adapters. Raises InputError for one that is not so given, a name twice, or an unknown base."""
    from assay.errors import InputError

    found: list[tuple[str, str, str]] = []
    for text in given:
        name, folder = _pair("--adapter", "NAME=DIR or NAME@MODEL=DIR", text)
        name, _, base = name.partition("@")
        base = base or models[0]
        if base not in models:
            raise InputError(f"--adapter {text}: no model {base!r} is served here")
        if not name or name in models or name in [other for other, _, _ in found]:
            raise InputError(f"--adapter {text}: give it a name of its own")
        found.append((name, folder, base))
    return found


def read_router(file: Path, served: list[str]) -> Any:
    """The router in a file. Raises InputError for a file that holds none, or one that chooses models that are not served."""
    from assay.errors import InputError
    from assay.methods.serving.ellie_sql.served import ModelRouter

    found = ModelRouter.load(file)
    if absent := [name for name in found.names if name not in served]:
        raise InputError(f"--router {file}: chooses {', '.join(map(repr, absent))}, which would not be served here")
    return found


def _pair(option: str, form: str, text: str) -> tuple[str, str]:
    from assay.errors import InputError

    name, equals, value = text.partition("=")
    if not name or not equals or not value:
        raise InputError(f"{option} must be {form}, got {text!r}")
    return name, value


def checked_root(root_path: str) -> str:
    """A prefix of paths: empty, or one that begins with a slash and does not end with one. Raises InputError for anything else."""
    from assay.errors import InputError

    root = root_path.rstrip("/")
    if root and (
        not root.startswith("/") or not root.isascii() or not root.isprintable() or " " in root or "?" in root
    ):
        raise InputError(f"--root-path must be a path such as /llm, got {root_path!r}")
    return root


def bound(host: str, port: int, keys: list[str]) -> socket.socket:
    """A listening socket, opened before loading, so that nothing is loaded for a port that is taken.

    Raises InputError when the address is not one, is taken, must not be bound, or is open to others without a key.
    """
    from assay.errors import InputError

    if not 0 <= port < 65536:
        raise InputError(f"--port must lie in 0..65535, got {port}")
    try:
        family, *_, address = socket.getaddrinfo(host or "0.0.0.0", port, type=socket.SOCK_STREAM)[0]
    except (OSError, UnicodeError) as error:
        raise InputError(f"--host {host!r} is no address of this machine: {error}") from None
    if not ipaddress.ip_address(str(address[0]).partition("%")[0]).is_loopback and not keys:
        raise InputError(f"--host {host} is open to others: set --api-key or ASSAY_API_KEY, or stay on 127.0.0.1")
    try:
        return socket.create_server(address[:2], family=family, backlog=1024)
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


def _require_server() -> None:
    from assay.errors import MissingError

    try:
        import fastapi  # noqa: F401
        import uvicorn  # noqa: F401
    except ModuleNotFoundError as error:
        raise MissingError(f"serving needs {error.name}: pip install 'assay[serve]'") from None


def _load(
    models: Any,
    wanted: list[tuple[str, str]],
    adapted: list[tuple[str, str, str]],
    watch: Callable[[Any], None] = lambda engine: None,
    share_blocks: bool = False,
) -> None:
    if share_blocks:
        with saying(f"loading {len(wanted)} models and {len(adapted)} adapters into one zoo of blocks"):
            engines = models.load_shared(wanted, adapted)
        typer.echo(f"all: {engines[0].backend} ({engines[0].backend_reason})", err=True)
        return
    for name, source in wanted:
        with saying(f"loading {source}"):
            engine = models.load(name, source)
        watch(engine)
        if engine.backend_reason:
            typer.echo(f"{name}: {engine.backend} ({engine.backend_reason})", err=True)
    for name, folder, base in adapted:
        with saying(f"loading the adapter {folder}"):
            watch(models.load_adapter(name, folder, base))


class _Running:
    """A server from its first connection, which comes before its models do, to its end.

    The first SIGTERM or Ctrl-C lets what runs end within `drain_seconds`, while /ready and new requests are answered with 503; the
    second ends everything at once. A model that cannot be loaded ends it too.
    """

    def __init__(
        self,
        *,
        listener: socket.socket,
        keys: list[str],
        limits: dict[str, Any],
        options: dict[str, Any],
        held: dict[str, Any],
        drain_seconds: float,
        log_requests: bool,
        spans: Path | None = None,
    ) -> None:
        from assay.server import logs
        from assay.server.app import Limits, create_app
        from assay.server.models import Models

        logs.configure(requests=log_requests)
        self.listener, self.drain_seconds = listener, drain_seconds
        self.models = Models(**held)
        self.models.loading = True
        self.app = create_app(self.models, api_keys=keys, limits=Limits(**limits), **options)
        self.failed: BaseException | None = None
        self.spans: Path | None = spans
        self.dissection: Any = None
        if spans is not None:
            from assay.server.dissection import Dissection

            self.dissection = Dissection()

    def watch(self, engine: Any) -> None:
        """Note where an engine's time goes, if that was asked for."""
        if self.dissection is not None:
            self.dissection.watch(engine)

    def run(self, load: Callable[[], None]) -> None:
        """Serve until a signal ends it. Raises what `load`, in a thread, raised."""
        import uvicorn

        running, state = self, self.app.state.server

        class Server(uvicorn.Server):
            deadline: float | None = None  # when what runs is ended

            def handle_exit(self, sig: int, frame: object) -> None:
                if self.deadline is None and not running.models.loading:
                    state.drain()
                    self.deadline = time.monotonic() + running.drain_seconds
                    return
                state.stop()
                self.should_exit = True
                self._captured_signals.append(sig)  # raised again in the end, so that its parent sees what it died of

            async def on_tick(self, counter: int) -> bool:
                if running.failed is not None:
                    self.should_exit = True
                if self.deadline is not None and (not state.asking or time.monotonic() > self.deadline):
                    state.stop()
                    self.should_exit = True
                return await super().on_tick(counter)

        def load_all() -> None:
            try:
                load()
                self.models.loading = False
                self._say()
            except BaseException as error:
                self.failed = error

        threading.Thread(target=load_all, name="assay-loader", daemon=True).start()
        config = uvicorn.Config(
            self.app if self.dissection is None else self.dissection.around(self.app),
            http="h11",
            ws="none",
            log_config=None,
            log_level="warning",
            server_header=False,
            timeout_graceful_shutdown=GRACE,
        )
        try:
            Server(config).run(sockets=[self.listener])
        finally:
            state.close()
            if self.dissection is not None:
                self.dissection.write(self.spans)
        if self.failed is not None:
            raise self.failed

    def _say(self) -> None:
        address, number = self.listener.getsockname()[:2]
        shown = f"[{address}]" if self.listener.family is socket.AF_INET6 else address
        names = ", ".join(repr(name) for name in self.models.names())
        typer.echo(f"serving {names} on http://{shown}:{number}/v1 (Ctrl-C ends it)", err=True)
