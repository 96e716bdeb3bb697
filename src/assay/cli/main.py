"""The command line: one file per command, registered here. Errors a user can act on are one line; `--debug` shows tracebacks."""

from __future__ import annotations

import json
import os
import sys
from typing import Any


def build() -> Any:
    """The typer application with every command."""
    import typer

    from assay.cli import apply, doctor, evidence, paper, papers, profile, search, serve, tune, verify

    app = typer.Typer(
        name="assay",
        help="Make machine-learning workloads cheaper, with proof measured on your own machine.",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
    )
    for module in (papers, paper, search, verify, profile, tune, apply, serve, doctor):
        name = module.__name__.rsplit(".", 1)[1]
        app.command(name=name)(getattr(module, name))
    app.add_typer(evidence.app, name="evidence")

    @app.callback(invoke_without_command=True)
    def options(version: bool = typer.Option(False, "--version", help="Print the version and leave.")) -> None:
        if version:
            from assay import __version__

            typer.echo(__version__)
            raise typer.Exit

    return app


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return its exit code: 0 done, 1 not met, 2 bad input, 3 something missing, 130 interrupted.

    An error nobody foresaw gives 70. `--debug` may stand anywhere and shows tracebacks.
    """
    import typer

    from assay.errors import AssayError, MissingError

    # typer carries its own copy of click or uses the installed one, by version: ask it for the class
    usage_error: Any = next(kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException")
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in arguments or os.environ.get("ASSAY_DEBUG") == "1"
    arguments = [word for word in arguments if word != "--debug"]
    as_json = "--json" in arguments
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        result = build()(args=arguments, prog_name="assay", standalone_mode=False)
        code = result if isinstance(result, int) else 0
    except typer.Exit as stop:
        code = stop.exit_code
    except usage_error as error:
        error.show()
        code = 2
    except (KeyboardInterrupt, typer.Abort):
        code = _report("interrupted; what was measured so far is kept, `--resume` goes on from there", 130, as_json)
    except AssayError as error:
        if debug:
            raise
        code = _report(str(error), error.exit_code, as_json)
    except ModuleNotFoundError as error:
        if debug:
            raise
        missing = MissingError(f"the package {error.name!r} is needed here: pip install {error.name}")
        code = _report(str(missing), missing.exit_code, as_json)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    except OSError as error:
        if debug:
            raise
        code = _report(f"{error.strerror or error}: {error.filename or ''}".rstrip(": "), 2, as_json)
    except Exception as error:
        if debug:
            raise
        text = " ".join(str(error).split())[:500]
        code = _report(f"{type(error).__name__}: {text} (this is a bug in assay; --debug shows where)", 70, as_json)
    return code


def _report(text: str, code: int, as_json: bool) -> int:
    print(f"assay: {text}", file=sys.stderr)
    if as_json:
        print(json.dumps({"error": text, "exit_code": code}))
    return code
