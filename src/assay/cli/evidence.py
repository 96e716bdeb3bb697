"""`assay evidence list|show|export|import`: the store of measurements."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, get_args

import typer

app = typer.Typer(help="The store of what was measured.", no_args_is_help=True)

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]


@app.command("list")
def list_evidence(
    slug: Annotated[str | None, typer.Option(help="Only this paper.")] = None,
    claim: Annotated[str | None, typer.Option(help="Only this claim (slug/what).")] = None,
    scale: Annotated[str | None, typer.Option(help="Only smoke, small or full.")] = None,
    verdict: Annotated[str | None, typer.Option(help='Only this verdict, for example "does not pay here".')] = None,
    status: Annotated[str | None, typer.Option(help='Only ok, failed, timeout or "out of memory".')] = None,
    last: Annotated[int | None, typer.Option(min=1, help="Only so many of the newest.")] = None,
    json: Json = False,
) -> None:
    """List records, oldest first."""
    from assay.cli.output import print_json, wrapped
    from assay.errors import InputError
    from assay.evidence.report import estimate_text, point_text, verdict_text
    from assay.evidence.store import Store
    from assay.evidence.types import Scale, Status, Verdict

    allowed = {"scale": get_args(Scale), "verdict": [str(v) for v in Verdict], "status": get_args(Status)}
    for name, given in (("scale", scale), ("verdict", verdict), ("status", status)):
        if given is not None and given not in allowed[name]:
            raise InputError(f"--{name} must be one of {', '.join(allowed[name])}; got {given!r}")
    with Store() as store:
        found = store.records(slug=slug, claim=claim, scale=scale, verdict=verdict, status=status, last=last)
    if json:
        print_json({"evidence": [record.model_dump(mode="json") for record in found]})
        return
    if not found:
        typer.echo("no evidence; `assay verify SLUG` measures some", err=True)
        return
    for record in found:
        head = f"{record.id[:8]}  {record.claim}, {record.scale}: {verdict_text(record)}"
        seen = f"{point_text(record.point)}: {estimate_text(record.measured, record.unit)}"
        taken = f"{record.created:%Y-%m-%d %H:%M} UTC"
        typer.echo(wrapped(head, hang=10))
        typer.echo(wrapped(f"          {seen}; {taken}", hang=12))


@app.command()
def show(
    id: Annotated[str, typer.Argument(metavar="ID", help="The record's id, or how it begins.")],
    json: Json = False,
) -> None:
    """Show one record with everything that was kept of it."""
    from assay.cli.output import print_json, wrapped
    from assay.evidence.report import estimate_text, figure_text, free_text, point_text, quality_text, verdict_text
    from assay.evidence.store import Store

    with Store() as store:
        record = store.get(id)
    if json:
        print_json(record.model_dump(mode="json"))
        return
    machine = record.machine
    lines = {
        "id": record.id,
        "claim": f"{record.claim} ({record.metric})",
        "point": f"{point_text(record.point)}, scale {record.scale}, seed {record.seed}",
        "paper": figure_text(record.paper_value, record.paper_unit),
        "measured": estimate_text(record.measured, record.unit),
        "baseline": figure_text(record.baseline, "s" if record.kind == "trial" else record.unit),
        "free baseline": free_text(record),
        "quality": quality_text(record),
        "verdict": verdict_text(record),
        "reason": record.reason or record.error,
        "machine": f"{machine.get('cpu', '?')}, {machine.get('threads', '?')} threads ({record.fingerprint})",
        "load": f"{figure_text(record.load_before, '')} before, {figure_text(record.load_after, '')} after",
        "assay": f"{record.assay_version} {record.commit}".strip(),
        "taken": f"{record.created:%Y-%m-%d %H:%M:%S} UTC in {record.seconds:.1f} s",
        "again": record.command,
    }
    for name, value in lines.items():
        typer.echo(wrapped(f"{name:<14} {value}", hang=15))
    for name, detail in record.details.items():
        typer.echo(wrapped(f"{name:<14} {detail}", hang=15))


@app.command()
def export(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Where to write; `-` is standard output.")],
    json: Json = False,
) -> None:
    """Write every record as one line of JSON each, oldest first."""
    from assay.cli.output import print_json
    from assay.errors import InputError
    from assay.evidence.store import Store
    from assay.paths import output_file

    if str(file) != "-":
        file = output_file(file, "FILE")
    with Store() as store:
        if str(file) == "-":
            if json:
                raise InputError("--json and FILE - both want standard output: give a file name")
            for record in store.records():
                typer.echo(record.to_json())
            return
        count = store.export_jsonl(file)
    if json:
        print_json({"exported": count, "file": str(file)})
    else:
        typer.echo(f"{count} record{'s' * (count != 1)} written to {file}")


@app.command("import")
def import_evidence(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="JSON lines, as `export` writes them.")],
    json: Json = False,
) -> None:
    """Import records, all or none of them; known ones are left alone."""
    from assay.cli.output import print_json
    from assay.evidence.store import Store
    from assay.paths import expanded

    with Store() as store:
        done = store.import_jsonl(expanded(file, "FILE"))
    if json:
        print_json({"added": done.added, "known": done.known, "file": str(file)})
    else:
        typer.echo(f"{done.added} record{'s' * (done.added != 1)} added, {done.known} known already")
