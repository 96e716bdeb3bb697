"""`assay digest`: what is new, as a page or an e-mail."""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated

import typer


def digest(
    since: Annotated[str, typer.Option(help="A date (2026-11-01), or so many days or weeks: 7d, 2w.")] = "7d",
    out: Annotated[Path | None, typer.Option("--out", "-o", metavar="FILE", help="Write an HTML page.")] = None,
    to: Annotated[str | None, typer.Option(help="Send it to this address, through ASSAY_SMTP_URL.")] = None,
    sender: Annotated[str, typer.Option("--from", help="The address it comes from.")] = "assay@localhost.localdomain",
    base: Annotated[str, typer.Option("--site", help="Where your pages are served, for the links.")] = "",
    json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Say what was measured lately: on the terminal, as an HTML page, or by e-mail."""
    from assay.cli.output import print_json, saying, wrapped
    from assay.errors import InputError
    from assay.paths import atomic_file, output_file
    from assay.site import feed
    from assay.site.library import Shelf

    begin = beginning(since)
    if base and not re.match(r"https?://[^\s\"<>]+$", base):
        raise InputError(f"--site must be an address such as https://assay.example, got {base!r}")
    target = None if out is None else output_file(out, "--out")
    with saying("reading the records"):
        shelf = Shelf()
        entries = feed.news(shelf.library(), begin, limit=None)
        shelf.close()
    html = feed.digest(entries, base.rstrip("/"), begin)
    if to is not None:
        feed.send(feed.as_mail(html, entries, sender, to))
    if target is not None:
        with atomic_file(target) as temporary:
            temporary.write_text(html, encoding="utf-8")
    if json:
        print_json([{"record": e.id, "claim": e.claim, "title": e.title, "text": e.text, "at": e.at} for e in entries])
        return
    for entry in entries if to is None and target is None else ():
        typer.echo(f"{wrapped(entry.title)}\n{wrapped(f'    {entry.text}', hang=4)}")
    done = [f"sent to {to}"] * (to is not None) + [f"written to {target}"] * (target is not None)
    typer.echo(f"{len(entries)} new since {begin:%Y-%m-%d}{''.join(f', {what}' for what in done)}", err=True)


def beginning(since: str) -> datetime:
    """The moment that a `--since` means. Raises InputError for one that is no date and no span.

    >>> beginning("2026-11-01").isoformat()
    '2026-11-01T00:00:00+00:00'
    """
    from assay.errors import InputError

    span = re.fullmatch(r"(\d{1,4})([dw])", since)
    if span:
        return datetime.now(UTC) - timedelta(days=int(span[1]) * (7 if span[2] == "w" else 1))
    try:
        found = datetime.fromisoformat(since)
    except ValueError:
        raise InputError(f"--since must be a date (2026-11-01) or a span (7d, 2w), got {since!r}") from None
    return found if found.tzinfo else found.replace(tzinfo=UTC)
