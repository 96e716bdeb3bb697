"""`assay evidence list|show|export|import`: the store of measurements."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, get_args

import typer

if TYPE_CHECKING:
    from assay.evidence.record import Evidence
    from assay.evidence.tuned import TuneRun

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
    """List records, oldest first, then runs of `assay tune`, which are left out where a paper, a claim, a scale, a verdict or a status is
    asked for."""
    from assay.cli.output import print_json, wrapped
    from assay.errors import InputError
    from assay.evidence import tuned
    from assay.evidence.reading import Reading
    from assay.evidence.report import documented, estimate_text, point_text, verdict_text
    from assay.evidence.store import Store
    from assay.evidence.types import Scale, Status, Verdict

    allowed = {"scale": get_args(Scale), "verdict": [*(str(v) for v in Verdict), "stale"], "status": get_args(Status)}
    for name, given in (("scale", scale), ("verdict", verdict), ("status", status)):
        if given is not None and given not in allowed[name]:
            raise InputError(f"--{name} must be one of {', '.join(allowed[name])}; got {given!r}")
    alone = (slug, claim, scale, verdict, status) != (None,) * 5  # what runs do not have
    with Store() as store:
        read = store.read(slug=slug, claim=claim, scale=scale, status=status, last=None if verdict else last)
        theirs = Reading() if alone else store.read_runs(last=last)
    found, damaged, runs = list(read.records), (*read.damaged, *theirs.damaged), theirs.runs
    if verdict is not None:
        found = [record for record in found if verdict_text(record).removesuffix(" *") == verdict][-(last or 0) :]
        damaged = ()  # they have none
    if last is not None and runs:
        both: list[Evidence | TuneRun] = [*found, *runs]
        newest = {one.id for one in sorted(both, key=lambda one: one.created)[-last:]}
        found, runs = [one for one in found if one.id in newest], tuple(one for one in runs if one.id in newest)
    if json:
        shown = [{"where": one.where, "why": one.why} for one in damaged]
        told = [tuned.documented(run) for run in runs]
        print_json({"evidence": [documented(record) for record in found], "runs": told, "damaged": shown})
        return
    for one in damaged:
        typer.echo(wrapped(f"damaged: {one}", hang=4), err=True)
    if not found and not runs:
        typer.echo("no evidence; `assay verify SLUG` measures some", err=True)
        return
    for record in found:
        head = f"{record.id[:8]}  {record.claim}, {record.scale}: {verdict_text(record)}"
        seen = f"{point_text(record.point)}: {estimate_text(record.measured, record.unit)}"
        taken = f"{record.created:%Y-%m-%d %H:%M} UTC"
        typer.echo(wrapped(head, hang=10))
        typer.echo(wrapped(f"          {seen}; {taken}", hang=12))
    for run in runs:
        head = f"{run.id[:8]}  assay tune, {run.model}, {run.goal}: {tuned.word_of(run, tuned.changes(run))}"
        seen = f"{tuned.label(run.steps)}: {tuned.ratio_text(run.over_free)} what is free; {tuned.lost_text(run)}"
        typer.echo(wrapped(head, hang=10))
        typer.echo(wrapped(f"          {seen}; {run.created:%Y-%m-%d %H:%M} UTC", hang=12))


@app.command()
def show(
    id: Annotated[str, typer.Argument(metavar="ID", help="The id of a record or of a run, or how it begins.")],
    json: Json = False,
) -> None:
    """Show one record, or one run of `assay tune`, with everything that was kept of it; of a damaged one, why it is none and what stands
    there."""
    from assay.cli.output import print_json, wrapped
    from assay.evidence import tuned
    from assay.evidence.reading import Damaged
    from assay.evidence.report import (
        documented,
        estimate_text,
        over_text,
        point_text,
        quality_text,
        reason_text,
        verdict_text,
    )
    from assay.evidence.store import Store
    from assay.evidence.verdict import figure

    with Store() as store:
        record = store.find(id)
    if isinstance(record, tuned.TuneRun):
        if json:
            print_json(tuned.documented(record))
        else:
            _show_run(record)
        return
    if isinstance(record, Damaged):
        if json:
            print_json({"damaged": record.why, "where": record.where, "text": record.text})
            return
        typer.echo(wrapped(f"damaged: {record}", hang=4))
        typer.echo(wrapped(record.text))
        return
    if json:
        print_json(documented(record))
        return
    machine = record.machine
    lines = {
        "id": record.id,
        "claim": f"{record.claim} ({record.metric})",
        "point": f"{point_text(record.point)}, scale {record.scale}, seed {record.seed}",
        "paper": figure(record.paper_value, record.paper_unit),
        "measured": estimate_text(record.measured, record.unit),
        "in its place": record.measured_here or "-",
        "baseline": figure(record.seconds_of["baseline"], "s")
        if "baseline" in record.seconds_of
        else figure(record.baseline, record.unit),
        "over free": over_text(record, "free"),
        "over exact": over_text(record, "exact"),
        "quality": quality_text(record),
        "verdict": verdict_text(record),
        "reason": reason_text(record),
        "refuted if": record.refuted_if or "-",
        "machine": f"{machine.get('cpu', '?')}, {machine.get('threads', '?')} threads ({record.fingerprint})",
        "load": f"{figure(record.load_before, '')} before, {figure(record.load_after, '')} after",
        "assay": f"{record.assay_version} {record.commit}".strip(),
        "taken": f"{record.created:%Y-%m-%d %H:%M:%S} UTC in {record.seconds:.1f} s",
        "again": record.command,
    }
    for name, value in lines.items():
        typer.echo(wrapped(f"{name:<14} {value}", hang=15))
    for name, detail in record.details.items():
        typer.echo(wrapped(f"{name:<14} {detail}", hang=15))


def _show_run(run: TuneRun) -> None:
    """A run of `assay tune` in lines; `--json` has every recipe that was measured too."""
    from assay.cli.output import wrapped
    from assay.evidence.tuned import allowed_text, changes, label, level_text, lost_text, ratio_text, word_of

    changed = sorted(changes(run))
    if run.pictures is not None:
        asked = (
            f"{run.pictures.total:,} pictures of {run.pictures.folder}, {run.pictures.proof:,} of them for the proof"
        )
    else:
        asked = f"prompts of {run.prompt_tokens:,} tokens, {run.new_tokens:,} generated"
    lines = {
        "id": run.id,
        "model": f"{run.model} ({run.architecture or 'unknown architecture'})",
        "goal": f"{run.goal}; {asked}",
        "recipe": label(run.steps),
        "as loaded": level_text(run.baseline),
        "free": f"{level_text(run.free)}, {run.free.label}",
        "found": level_text(run.best),
        "over free": ratio_text(run.over_free),
        "over loaded": ratio_text(run.over_baseline),
        **({} if run.pictures else {"over exact": ratio_text(run.over_exact)}),
        "quality": f"{lost_text(run)}, {allowed_text(run)}: {run.verdict or 'not judged'}",
        "proof": word_of(run, changed) + (f" (changed since: {', '.join(changed)})" if changed else ""),
        "tried": f"{len(run.rows)} recipe{'s' * (len(run.rows) != 1)} in {run.seconds:.0f} s"
        + (", on a busy machine" if run.noisy else ""),
        "machine": f"{run.machine.get('cpu', '?')}, {run.machine.get('threads', '?')} threads ({run.fingerprint})",
        "assay": run.commit or "-",
        "taken": f"{run.created:%Y-%m-%d %H:%M:%S} UTC",
        "again": run.command,
    }
    for name, value in lines.items():
        typer.echo(wrapped(f"{name:<14} {value}", hang=15))
    for note in run.notes:
        typer.echo(wrapped(f"{'note':<14} {note}", hang=15))


@app.command()
def export(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Where to write; `-` is standard output.")],
    to: Annotated[
        str,
        typer.Option(
            help="jsonl, one file; or mlflow or trackio, a folder that MLflow or Trackio shows, written anew each time."
        ),
    ] = "jsonl",
    json: Json = False,
) -> None:
    """Write every record, oldest first, and every run of `assay tune`: one line of JSON each. Or the records alone, as a folder for an
    experiment tracker."""
    from assay.checks import choice
    from assay.cli.output import print_json, wrapped
    from assay.errors import InputError
    from assay.evidence import trackers
    from assay.evidence.reading import Reading, run_line
    from assay.evidence.store import Store, write_jsonl
    from assay.paths import expanded, output_file

    try:
        choice("--to", to, ("jsonl", *trackers.WRITERS))
    except ValueError as error:
        raise InputError(str(error)) from None
    standard = str(file) == "-"
    if standard and (json or to != "jsonl"):
        raise InputError("--json and --to mlflow or trackio need a name: FILE - is standard output")
    if to != "jsonl":
        file = expanded(file, "FILE")
        trackers.check(file)
    elif not standard:
        file = output_file(file, "FILE")
    with Store() as store:
        found = store.read()
        theirs = store.read_runs() if to == "jsonl" else Reading()
    for one in (*found.damaged, *theirs.damaged):
        typer.echo(wrapped(f"assay: damaged, and left out: {one}", hang=4), err=True)
    if standard:
        for record in found.records:
            typer.echo(record.to_json())
        for run in theirs.runs:
            typer.echo(run_line(run))
        return
    if to == "jsonl":
        write_jsonl(found.records, file, theirs.runs)
    else:
        trackers.export(found, file, to)
    if json:
        document = {"exported": len(found.records), "file": str(file)}
        more = {"runs": len(theirs.runs), "damaged": len(found.damaged) + len(theirs.damaged)}
        print_json(document | {name: count for name, count in more.items() if count})
        return
    also = f" and {len(theirs.runs)} run{'s' * (len(theirs.runs) != 1)} of assay tune" if theirs.runs else ""
    typer.echo(f"{len(found.records)} record{'s' * (len(found.records) != 1)}{also} written to {file}")
    if to != "jsonl":
        typer.echo(f"show them: {trackers.command(file, to)}")


@app.command("import")
def import_evidence(
    file: Annotated[
        Path,
        typer.Argument(
            metavar="FILE",
            help="JSON lines, as `export` writes them, or the evidence.jsonl of an artefact of `assay tune`.",
        ),
    ],
    mine: Annotated[
        bool, typer.Option("--mine", help="They are your own: a backup, or the file of what the store could not take.")
    ] = False,
    json: Json = False,
) -> None:
    """Import records and runs of `assay tune`, all or none of them; known ones are left alone. Unless they are --mine, they count as
    others'."""
    from assay.cli.output import print_json
    from assay.evidence.store import Store
    from assay.paths import expanded

    with Store() as store:
        done = store.import_jsonl(expanded(file, "FILE"), mine=mine)
    if json:
        print_json({"added": done.added, "known": done.known, "file": str(file)})
    else:
        typer.echo(f"{done.added} record{'s' * (done.added != 1)} added, {done.known} known already")


@app.command()
def stale(
    json: Json = False,
) -> None:
    """List the shipped claims of which every record is older than its code, what has changed, and the command that measures again."""
    from assay.cli.output import print_json, wrapped
    from assay.evidence import hashes, shipped
    from assay.evidence.verdict import summaries

    read = shipped.read()
    for one in read.damaged:
        typer.echo(wrapped(f"assay: damaged: {one}", hang=4), err=True)
    found = summaries(read.records)
    fresh = {summary.claim for summary in found if not summary.stale}  # on some machine: an older one's is history
    old = [summary for summary in found if summary.stale and summary.claim not in fresh]
    rows = [
        {
            "claim": summary.claim,
            "fingerprint": summary.fingerprint,
            "changed": hashes.changes(summary.deciding),
            "command": f"assay verify {summary.claim.split('/')[0]} --scale {summary.deciding.scale} --into evidence",
        }
        for summary in old
    ]
    if json:
        print_json({"stale": rows})
        return
    for row in rows:
        changed = ", ".join(row["changed"][:4]) + (" ..." if len(row["changed"]) > 4 else "")
        typer.echo(wrapped(f"{row['claim']} ({row['fingerprint']}): {changed}", hang=4))
    for command in dict.fromkeys(row["command"] for row in rows):
        typer.echo(f"  {command}")
    typer.echo(f"{len({row['claim'] for row in rows})} of the shipped claims are stale", err=True)
