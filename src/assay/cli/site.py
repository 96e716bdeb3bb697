"""`assay site`: the web pages, served on loopback or written as files."""

from __future__ import annotations

import secrets
import threading
from pathlib import Path
from typing import Annotated, Any

import typer

GRACE = 5  # seconds that answers have to end in


def site(
    context: typer.Context,
    host: Annotated[
        str, typer.Option(help="Address to bind; the pages can be read by whoever reaches it.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to bind; 0 takes a free one.")] = 8080,
    read_only: Annotated[bool, typer.Option("--read-only", help="Start no work from the pages, whoever asks.")] = False,
    root_path: Annotated[str, typer.Option(help="What a proxy puts before the paths, such as /assay.")] = "",
    export: Annotated[
        Path | None,
        typer.Option("--export", metavar="DIR", help="Write the pages as files into DIR instead of serving them."),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="With --export: print one JSON document.")] = False,
) -> None:
    """Show the catalogue and what was measured as web pages."""
    from assay.cli.output import print_json, saying
    from assay.errors import InputError, MissingError
    from assay.paths import output_folder

    if json and export is None:
        raise InputError("--json needs --export: the pages have an API of their own, /api/openapi.json")
    try:
        import fastapi  # noqa: F401
        import markdown_it  # noqa: F401
        import uvicorn
    except ModuleNotFoundError as error:
        raise MissingError(f"the pages need {error.name}: pip install 'assay[site]'") from None
    from assay.cli.serve import bound, checked_root
    from assay.site.guide import Page
    from assay.site.library import Shelf

    pages = tuple(
        Page(f"command-{name}", f"assay {name}", text) for name, text in commands(context.find_root().command).items()
    )
    if export is not None:
        from assay.site.export import export as written

        with saying("reading the records") as say:
            target = output_folder(export, "--export")
            shelf = Shelf()
            library = shelf.library()
            shelf.close()
            say("writing the pages")
            count = written(library, target, pages)
        if json:
            print_json({"folder": str(target), "files": count, "records": len(library.records)})
        else:
            typer.echo(f"{count} files in {target}; open {target / 'index.html'}")
        return
    root = checked_root(root_path)
    with bound(host, port, ["anyone may read"]) as listener:
        from assay.site.app import create_app
        from assay.site.jobs import Jobs

        with saying("reading the records"):
            shelf = Shelf()
            shelf.library()
        address, number = listener.getsockname()[:2]
        at = f"http://{f'[{address}]' if ':' in address else address}:{number}{root}/"
        token = "" if read_only else secrets.token_urlsafe(24)
        jobs = None if read_only else Jobs()
        typer.echo(f"assay is shown at {at} (Ctrl-C ends it)", err=True)
        if not read_only:
            typer.echo(f"to start work from the pages, open {at}enter?token={token}", err=True)
        ending = threading.Event()
        app = create_app(
            shelf,
            hosts=(host.lower(), str(address)),
            root_path=root,
            commands=pages,
            jobs=jobs,
            token=token,
            ending=ending,
        )

        class Server(uvicorn.Server):
            def handle_exit(self, sig: int, frame: Any) -> None:
                ending.set()  # pages that watch a command would keep the server for as long as it runs
                super().handle_exit(sig, frame)

        config = uvicorn.Config(
            app, log_level="warning", server_header=False, proxy_headers=False, timeout_graceful_shutdown=GRACE
        )
        try:
            Server(config).run(sockets=[listener])
        finally:
            shelf.close()


def commands(group: Any) -> dict[str, str]:
    """A page of Markdown for each command of a group (assay's): what its help says. Nothing runs."""
    found = {}
    for name, command in group.commands.items():
        lines = [f"# assay {name}", "", command.help or "", ""]
        for sub, inner in getattr(command, "commands", {}).items():
            lines += [f"## assay {name} {sub}", "", inner.help or "", "", *_options(inner)]
        if not hasattr(command, "commands"):
            lines += _options(command)
        found[name] = "\n".join(lines)
    return found


def _options(command: Any) -> list[str]:
    lines = []
    for parameter in command.params:
        if parameter.name == "help" or getattr(parameter, "hidden", False):
            continue
        names = ", ".join(parameter.opts) if parameter.opts[0].startswith("-") else parameter.name.upper()
        said = (getattr(parameter, "help", "") or "").replace("|", "\\|")
        lines.append(f"| `{names}` | {said} |")
    return ["| option | what it does |", "| --- | --- |", *lines, ""] if lines else []
