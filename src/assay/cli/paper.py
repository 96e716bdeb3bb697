"""`assay paper SLUG`: everything the catalogue says about one paper."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any

import typer


def paper(
    slug: Annotated[str, typer.Argument(help="A slug of `assay papers`.")],
    json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Show a paper: its claims, what was measured for them, and how to import it."""
    from assay.catalogue import get
    from assay.cli.output import print_json, wrapped

    found = get(slug)
    seen = latest_verdicts(slug)
    if json:
        print_json({**dataclasses.asdict(found), "status": found.status, "module": found.module, "evidence": seen})
        return
    where = f"arXiv {found.arxiv}" if found.arxiv else "no arXiv id"
    facts = f"{found.slug}, no. {found.number}, {found.family}, {found.year or 'year unknown'}, {where}"
    typer.echo(f"{wrapped(found.title)}\n{wrapped(facts)}")
    typer.echo(
        f"code     {found.code or 'none known'}\nsaves    {', '.join(found.saves)}\n\n{wrapped(found.summary)}\n\nclaims"
    )
    for claim in found.claims:
        value = "direction only" if claim.value is None else f"{claim.value:g} {claim.unit}".strip()
        against = claim.baseline or "nothing stated"
        typer.echo(wrapped(f"  {claim.id}: {claim.metric}: {value}, against {against}", hang=4))
        if claim.conditions:
            typer.echo(wrapped(f"    {claim.conditions}", hang=4))
        for row in (row for row in seen if row["claim"] == claim.id):
            typer.echo(wrapped(f"    seen: {row['verdict']} ({row['scale']}): {row['reason']}", hang=6))
    if found.status == "works":
        typer.echo(f"\nimport   from {found.module.rsplit('.', 1)[0]} import {found.slug}")
        typer.echo(f"verify   assay verify {found.slug}")
    else:
        typer.echo("\nplanned: there is no code for this paper yet")


def latest_verdicts(slug: str) -> list[dict[str, Any]]:
    """The newest verdict of each of the paper's claims on each machine; empty when nothing was measured yet."""
    from assay.evidence.store import Store
    from assay.evidence.verdict import summaries

    with Store() as store:
        rows = summaries(store.records(slug=slug))
    return [
        {"claim": r.claim, "verdict": str(r.verdict or "failed"), "scale": r.deciding.scale, "reason": r.reason}
        for r in rows
    ]
