"""The command line: one file per command, registered here. Errors that users can act on take one line; `--debug` shows tracebacks."""

from __future__ import annotations

import errno
import functools
import json
import os
import shlex
import sys
from typing import Any

INTERRUPTED = 130  # as shells have it for SIGINT


def build() -> Any:
    """The typer application with every command."""
    import typer

    from assay.cli import (
        apply,
        audit,
        code,
        digest,
        doctor,
        evidence,
        export,
        loadtest,
        paper,
        papers,
        profile,
        search,
        serve,
        simulate,
        site,
        tune,
        verify,
    )

    app = typer.Typer(
        name="assay",
        help="Make machine-learning workloads cheaper, with proof measured on your own machine.",
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
    )
    for module in (
        papers,
        paper,
        search,
        verify,
        profile,
        tune,
        apply,
        export,
        serve,
        loadtest,
        simulate,
        audit,
        site,
        digest,
        doctor,
    ):
        name = module.__name__.rsplit(".", 1)[1]
        app.command(name=name)(getattr(module, name))
    app.add_typer(evidence.app, name="evidence")
    app.add_typer(code.app, name="code")

    @app.callback(invoke_without_command=True)
    def options(
        version: bool = typer.Option(False, "--version", help="Print the version and leave."),
        debug: bool = typer.Option(False, "--debug", help="Show tracebacks; may stand behind any command too."),
    ) -> None:
        if version:
            from assay import __version__

            typer.echo(__version__)
            raise typer.Exit

    return app


@functools.cache
def _command() -> Any:
    """What `build` gives, made ready to run: reading all the options takes longer than many a command."""
    import typer

    return typer.main.get_command(build())


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return its exit code: 0 done, 1 not met, 2 bad input, 3 something missing, 130 interrupted.

    An unforeseen error gives 70. `--debug` may appear anywhere and shows tracebacks. As a program's entry (`arguments` None),
    nothing is imported from the current folder from then on; Python's own path is changed for that.
    """
    if arguments is None:
        from assay.search_path import leave_current_folder

        leave_current_folder()
        arguments = sys.argv[1:]
    words = [word for word in arguments if word != "--debug"]
    debug = len(words) < len(arguments) or os.environ.get("ASSAY_DEBUG") == "1"
    as_json = "--json" in words
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if "--allow-download" not in words:  # the bars of loading would lie over our own, and fill a log with lines
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    try:
        code = _run(words)
        sys.stdout.flush()  # here, so that a full disk is reported like any other error
    except BrokenPipeError:
        _give_stdout_up()
        code = 0
    except Exception as error:
        if debug and not _is_usage(error):
            raise
        text, code = _explained(error)
        code = _report(text, code, as_json)
    except KeyboardInterrupt:
        code = INTERRUPTED
        _report(_interrupted(words, ""), code, as_json)
    else:
        if code == INTERRUPTED:  # typer makes this of Ctrl-C, and says nothing
            _report(_interrupted(words, ""), code, as_json)
    return code


def _run(words: list[str]) -> int:
    from assay.errors import InterruptedRun

    try:
        result = _command()(args=words, prog_name="assay", standalone_mode=False)
    except InterruptedRun as stop:
        raise InterruptedRun(_interrupted(words, str(stop))) from stop
    except Exception as error:
        if type(error).__name__ == "NoArgsIsHelpError":  # plain `assay` or `assay evidence`: show the help
            error.show()  # type: ignore[attr-defined]
            return 2
        raise
    return result if isinstance(result, int) else 0


def _is_usage(error: BaseException) -> bool:
    """An unknown option or the like. typer carries its own copy of click or uses the installed one, by version."""
    return any(kind.__name__ == "ClickException" for kind in type(error).__mro__)


def _explained(error: Exception) -> tuple[str, int]:
    """One line for the user, and the exit code."""
    from assay.errors import AssayError

    text = " ".join(str(error).split())
    if _is_usage(error):
        return f"{error.format_message()} (`--help` lists what there is)", 2  # type: ignore[attr-defined]
    if isinstance(error, AssayError):
        return str(error), error.exit_code
    if isinstance(error, ModuleNotFoundError):
        return f"the package {error.name!r} is needed here: pip install {error.name}", 3
    # torch, safetensors, SQLite and g++ report a full disk by errors of their own
    if getattr(error, "errno", None) == errno.ENOSPC or "No space left on device" in text:
        where = f" ({error.filename})" if isinstance(error, OSError) and error.filename else ""
        hint = "make room there, or choose another place (-o, TMPDIR, ASSAY_CACHE_DIR, ASSAY_DATA_DIR)"
        return f"the disk is full{where}: {hint}; nothing was left half written", 2
    if isinstance(error, OSError):
        return f"{error.strerror or error}: {error.filename or ''}".rstrip(": "), 2
    if isinstance(error, RuntimeError) and "home directory" in text:  # Path.expanduser
        return f"{text}: no home folder is known for the user after `~` in a path", 2
    return f"{type(error).__name__}: {text[:500]} (this is a bug in assay; --debug shows where)", 70


def _interrupted(words: list[str], kept: str) -> str:
    """The message after Ctrl-C: what is kept, and the command that continues."""
    if not words or words[0] not in ("verify", "tune"):
        return "interrupted; nothing was left half written"
    again = words if "--resume" in words else [*words, "--resume"]
    return f"interrupted; {kept or 'what was measured so far is kept'}; go on with: assay {shlex.join(again)}"


def _report(text: str, code: int, as_json: bool) -> int:
    print(f"assay: {text}", file=sys.stderr)
    try:
        if as_json:
            print(json.dumps({"error": text, "exit_code": code}))
        sys.stdout.flush()
    except OSError:  # nobody reads it, or its disk is the full one
        _give_stdout_up()
    return code


def _give_stdout_up() -> None:
    """Discard pending output, so that Python does not complain about it on exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
