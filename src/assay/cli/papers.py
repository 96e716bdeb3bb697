"""`assay papers`: the catalogue, one line per paper."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from assay.catalogue import Paper

HEAD = """# The papers with code

<!-- written by `assay papers --markdown > docs/papers.md` -->
"""


def papers(
    family: Annotated[str | None, typer.Option(help="Only this family.")] = None,
    status: Annotated[str | None, typer.Option(help="Only `measured`, `code` or `planned`.")] = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print a page of Markdown, by family.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """List the catalogue."""
    from assay.catalogue import FAMILIES
    from assay.catalogue import papers as all_papers
    from assay.cli.output import print_json, shortened
    from assay.errors import InputError
    from assay.evidence import shipped

    if family is not None and family not in FAMILIES:
        raise InputError(f"--family must be one of {', '.join(FAMILIES)}; got {family!r}")
    if status not in (None, "measured", "code", "planned"):
        raise InputError(f"--status must be measured, code or planned; got {status!r}")
    if markdown and json:
        raise InputError("--markdown and --json are two forms of one answer: give one of them")
    known = {p.slug: shipped.status(p.slug, p.status) for p in all_papers()}
    rows = [p for p in all_papers() if family in (None, p.family) and status in (None, known[p.slug])]
    if json:
        print_json([{"slug": p.slug, "title": p.title, "family": p.family, "status": known[p.slug]} for p in rows])
        return
    if markdown:
        typer.echo(page(p for p in rows if p.status == "code"), nl=False)
        return
    slug = max((len(p.slug) for p in rows), default=0)
    for p in rows:
        start = f"{p.number:>3}  {p.slug:{slug}} {p.family:12} {known[p.slug]:8} "
        typer.echo(start + shortened(p.title, len(start)))
    code, measured = (sum(known[p.slug] in names for p in rows) for names in (("code", "measured"), ("measured",)))
    typer.echo(f"{len(rows)} papers, {code} of them with code, {measured} measured", err=True)


def page(rows: Iterable[Paper]) -> str:
    """The papers as Markdown: a heading for each family, a line for each paper."""
    from assay.catalogue import FAMILIES

    known = list(rows)
    parts = [HEAD]
    for family in FAMILIES:
        if mine := [paper for paper in known if paper.family == family]:
            parts.append(f"\n## {family}\n\n")
            parts += [f"- `{paper.slug}`: {paper.title}. {paper.summary}\n" for paper in mine]
    return "".join(parts)
