"""`assay search QUESTION`: meaning-based search over the catalogue."""

from __future__ import annotations

from typing import Annotated

import typer


def search(
    question: Annotated[str, typer.Argument(help='What is slow or dear, e.g. "long prompts slow on CPU".')],
    limit: Annotated[int, typer.Option(help="How many papers to show.")] = 10,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Find the papers that fit a question."""
    from assay.cli.output import print_json, saying, width, wrapped

    with saying("searching the catalogue") as say:
        from assay.catalogue.search import search as find

        hits = find(question, limit=limit, say=say)
    if json:
        keys = ("slug", "title", "family", "status")
        print_json([{**{k: getattr(h.paper, k) for k in keys}, "score": h.score, "method": h.method} for h in hits])
        return
    for hit in hits:
        if width() is None:
            typer.echo(f"{hit.score:6.2f}  {hit.paper.slug:30} {hit.paper.status:8} {hit.paper.summary}")
        else:
            typer.echo(f"{hit.score:6.2f}  {hit.paper.slug:30} {hit.paper.status}")
            typer.echo(wrapped(f"        {hit.paper.summary}", hang=8))
