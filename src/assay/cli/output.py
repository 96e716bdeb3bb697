"""How commands talk: one JSON document, or lines that break between words; signs of life on stderr."""

from __future__ import annotations

import contextlib
import json
import shutil
import sys
import textwrap
from collections.abc import Callable, Iterator
from typing import Any

Say = Callable[[str], None]


def print_json(document: Any) -> None:
    """One JSON document on stdout, the answer of every command with `--json`."""
    print(json.dumps(document, indent=2, default=str, allow_nan=False))


def width() -> int | None:
    """Columns of the terminal; None if stdout is not one (a file, a pipe): lines are not broken there, so that grep finds them."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


def wrapped(text: str, hang: int = 0) -> str:
    """`text` broken between words at the terminal's width, later lines indented by `hang`; overlong words are not broken.

    Unprintable characters become "?": a record may come from anywhere, and an escape sequence would control the terminal.
    """
    text = "".join(letter if letter.isprintable() else "?" for letter in text)
    columns = width()
    if columns is None:
        return text
    return textwrap.fill(
        text,
        max(columns, hang + 20),
        subsequent_indent=" " * hang,
        break_long_words=False,
        break_on_hyphens=False,
    )


def shortened(text: str, start: int) -> str:
    """As much of `text` as fits on a terminal line after `start` columns, cut between words."""
    columns = width()
    if columns is None or start + len(text) <= columns:
        return text
    words, kept = text.split(), ""
    for word in words:
        if start + len(f"{kept} {word} ...") - (not kept) > columns:
            break
        kept = f"{kept} {word}".lstrip()
    return f"{kept} ...".lstrip()


@contextlib.contextmanager
def saying(first: str) -> Iterator[Say]:
    """Say on stderr what is being done: a line that changes on a terminal, a line each time elsewhere (a log, a pipe)."""
    from rich.console import Console

    console = Console(stderr=True)
    if not console.is_terminal:
        print(f"assay: {first}", file=sys.stderr, flush=True)
        yield lambda text: print(f"assay: {text}", file=sys.stderr, flush=True)
        return
    with console.status(first) as status:
        yield status.update
