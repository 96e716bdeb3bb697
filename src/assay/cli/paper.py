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
    from assay.evidence import shipped

    found = get(slug)
    seen = latest_verdicts(slug)
    if json:
        print_json(
            {
                **dataclasses.asdict(found),
                "status": shipped.status(slug, found.status),
                "module": found.module,
                "evidence": seen,
            }
        )
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
            by = "" if row["by"] == "you" else f" by {row['by']} on {row['machine']}"
            text = f"    seen{by}: {row['verdict']} ({row['scale']}): {row['reason']}"
            typer.echo(wrapped("; ".join([text, *row["remarks"]]), hang=6))
    if found.status == "code":
        typer.echo(f"\nimport   from {found.module.rsplit('.', 1)[0]} import {found.slug}")
        typer.echo(f"verify   assay verify {found.slug}")
    else:
        typer.echo("\nplanned: there is no code for this paper yet")


def latest_verdicts(slug: str) -> list[dict[str, Any]]:
    """The verdict on each of the paper's claims on each machine: yours, and those of assay's authors and of others, marked as theirs."""
    from assay.evidence import shipped
    from assay.evidence.store import Store
    from assay.evidence.verdict import remarks, summaries

    with Store() as store:
        kept = store.read(slug=slug)
    mine = [record for record in kept.records if record.id not in kept.imported]
    known = {record.id for record in mine}
    theirs = [record for record in shipped.records(slug) if record.id not in known]
    known |= {record.id for record in theirs}
    others = [record for record in kept.records if record.id not in known]
    return [
        {
            "claim": found.claim,
            "verdict": found.word,
            "scale": found.deciding.scale,
            "reason": found.reason,
            "remarks": remarks(found.deciding),
            "by": by,
            "machine": f"{found.deciding.machine.get('cpu', 'unknown processor')} ({found.fingerprint})",
        }
        for by, records in (("you", mine), ("assay's authors", theirs), ("others", others))
        for found in summaries(records)
    ]
