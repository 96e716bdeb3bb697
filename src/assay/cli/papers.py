"""`assay papers`: the catalogue, one line a paper."""

from __future__ import annotations

from typing import Annotated

import typer


def papers(
    family: Annotated[str | None, typer.Option(help="Only this family.")] = None,
    status: Annotated[str | None, typer.Option(help="Only `works` or `planned`.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """List the catalogue."""
    from assay.catalogue import FAMILIES
    from assay.catalogue import papers as all_papers
    from assay.cli.output import print_json
    from assay.errors import InputError

    if family is not None and family not in FAMILIES:
        raise InputError(f"--family must be one of {', '.join(FAMILIES)}; got {family!r}")
    if status not in (None, "works", "planned"):
        raise InputError(f"--status must be works or planned; got {status!r}")
    rows = [p for p in all_papers() if family in (None, p.family) and status in (None, p.status)]
    if json:
        print_json([{"slug": p.slug, "title": p.title, "family": p.family, "status": p.status} for p in rows])
        return
    for p in rows:
        typer.echo(f"{p.number:>3}  {p.slug:30} {p.family:12} {p.status:8} {p.title}")
    typer.echo(f"{len(rows)} papers, {sum(p.status == 'works' for p in rows)} of them work", err=True)
