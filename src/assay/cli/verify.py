"""`assay verify SLUG...`: measure on this machine what papers claim.

Exit codes:

- 0: everything was measured, whatever the verdicts.
- 1: with `--check`, a claim's verdict does not support it (anything but `reproduced`, `direction holds`, `computed` and
  `needs other hardware`), or one of its points failed.
- 2: bad input, or evidence that the store could not take.
- 3: a paper named on the command line has nothing that can be measured here (the others are still measured), or no paper has.
"""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from assay.evidence.record import Evidence
    from assay.evidence.runner import Plan
    from assay.evidence.runner import Progress as Step


def verify(
    slugs: Annotated[
        list[str] | None, typer.Argument(metavar="SLUG...", help="Papers by their slug, or single claims: slug/claim.")
    ] = None,
    family: Annotated[str | None, typer.Option(help="Every paper of this family.")] = None,
    all: Annotated[bool, typer.Option("--all", help="Every paper of the catalogue.")] = False,
    scale: Annotated[
        str, typer.Option(help="smoke (seconds a point), small (minutes) or full (hours, or a GPU).")
    ] = "small",
    resume: Annotated[
        bool, typer.Option("--resume", help="Measure only points that failed or are not recorded yet.")
    ] = False,
    ray: Annotated[
        str | None, typer.Option(metavar="ADDRESS", help="Measure on a Ray cluster; `local` starts one.")
    ] = None,
    check: Annotated[
        bool, typer.Option("--check", help="Exit with 1 when a claim does not hold or a point fails.")
    ] = False,
    html: Annotated[Path | None, typer.Option(help="Write a page with plots to this file.")] = None,
    jsonl: Annotated[
        Path | None, typer.Option(help="Write the evidence as JSON lines into this file; other points in it stay.")
    ] = None,
    into: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Add the evidence to this folder: a file for each paper, machines.json."),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Measure the claims of papers and judge them."""
    from assay.cli.output import print_json, saying, width
    from assay.errors import InputError, MissingError
    from assay.evidence import shipped
    from assay.evidence.report import overview, write_html
    from assay.evidence.runner import plan
    from assay.evidence.store import StoreError, merge_jsonl, read_jsonl
    from assay.evidence.verdict import summaries
    from assay.paths import output_file, output_folder

    if bool(slugs) + (family is not None) + all != 1:
        raise InputError("name one or more papers, or give --family FAMILY, or --all: one of the three")
    html = None if html is None else output_file(html, "--html")
    if jsonl is not None and (jsonl := output_file(jsonl, "--jsonl")).exists():
        read_jsonl(jsonl)  # a file without evidence cannot be extended: say so now, not after measuring
    if into is not None:
        into = output_folder(into, "--into")
        shipped.read(where=into).whole()  # a folder of other things cannot be extended: say so now, not after measuring
    chosen = list(slugs or _slugs_of(family))
    named = chosen if slugs else ["--all"] if all else ["--family", str(family)]
    command = shlex.join(["assay", "verify", *named, "--scale", scale])
    with saying("loading the experiments"):
        todo = plan(chosen, scale)  # type: ignore[arg-type]
    if not todo.jobs:
        raise MissingError(f"nothing to measure: {_reasons(todo, 5)}")
    if todo.unavailable:
        _say(f"not measured: {_reasons(todo, 5)}")

    records: list[Evidence] = []
    unsaved = None
    try:
        _run(chosen, scale, resume, ray, records, command, into)
    except StoreError as error:
        if not records:
            raise
        unsaved = error
    claims = summaries(records)
    if html is not None:
        write_html(records, html)
    if jsonl is not None:
        merge_jsonl(records, jsonl)
    if json:
        print_json(_document(records, todo, scale))
    else:
        from rich.console import Console

        Console(highlight=False, width=width() or 100_000).print(overview(records))  # lines of a pipe are not broken

    unmet = [
        claim.claim for claim in claims if not claim.met and claim.verdict not in ("needs other hardware", "computed")
    ]
    if unsaved is not None:
        _leave(str(unsaved), 2)
    if check and unmet:
        _leave(f"not met: {', '.join(dict.fromkeys(unmet))}", 1)
    if slugs and (nothing := [slug for slug in slugs if slug in todo.unavailable]):
        _leave(f"nothing was measured for {', '.join(nothing)}", 3)


def _slugs_of(family: str | None) -> list[str]:
    from assay.catalogue import FAMILIES, papers
    from assay.errors import InputError

    if family is not None and family not in FAMILIES:
        raise InputError(f"--family must be one of {', '.join(FAMILIES)}; got {family!r}")
    return [paper.slug for paper in papers() if family in (None, paper.family)]


def _reasons(todo: Plan, most: int) -> str:
    """The first few things that cannot be measured, and how many more there are."""
    parts = [f"{name} ({reason})" for name, reason in todo.unavailable.items()]
    return ", ".join(parts[:most]) + (f" and {len(parts) - most} more" if len(parts) > most else "")


def _run(
    slugs: list[str],
    scale: str,
    resume: bool,
    ray: str | None,
    records: list[Evidence],
    command: str,
    into: Path | None,
) -> None:
    """Measure, filling `records` in the order of the plan, and say on stderr each point's result and how long the rest will take.

    Raises InterruptedRun, saying how many points are recorded, when Ctrl-C ends it.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from assay.errors import InterruptedRun
    from assay.evidence import shipped
    from assay.evidence.report import point_text
    from assay.evidence.runner import verify as measure

    console = Console(stderr=True)
    columns = (BarColumn(20), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}", markup=False))
    total = 0
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=None)

        def show(step: Step) -> None:
            nonlocal total
            total = step.total
            where = f"{step.job.claim} {point_text(step.job.point)}"
            bar.update(task, description=where, completed=step.done, total=step.total)
            if step.record is None:
                line = f"[{step.done + 1}/{step.total}] {where}: measuring, at most {duration(step.job.seconds)}"
                if console.is_terminal:
                    return  # the bar shows it
            else:
                records.append(step.record)
                if into is not None:
                    shipped.add([step.record], into)
                line = f"[{step.done}/{step.total}] {where}: {_result(step)}{_left(records, step.total - step.done)}"
            console.print(line, highlight=False, markup=False, soft_wrap=True)

        try:
            records[:] = measure(slugs, scale=scale, resume=resume, ray_address=ray, progress=show, command=command)  # type: ignore[arg-type]
        except KeyboardInterrupt:
            raise InterruptedRun(f"{len(records)} of {total or 'the'} points are recorded") from None


def _result(step: Step) -> str:
    """A point's result, in one line."""
    from assay.evidence.report import estimate_text, verdict_text

    record = step.record
    assert record is not None
    figure = estimate_text(record.measured, record.unit) if record.measured is not None else record.error
    seen = f"{verdict_text(record)}{f', {figure}' if figure else ''}"
    return f"{seen} (recorded before)" if step.resumed else f"{seen}, took {duration(record.seconds)}"


def _left(records: list[Evidence], points: int) -> str:
    """How long the rest will take if its points are like those measured; empty if nothing is left."""
    taken = [record.seconds for record in records if record.seconds > 0]
    if not points or not taken:
        return ""
    return f"; about {duration(points * sum(taken) / len(taken))} left"


def duration(seconds: float) -> str:
    """`45 s`, `12 min`, `1 h 5 min`."""
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"


def _document(records: list[Evidence], todo: Plan, scale: str) -> dict[str, Any]:
    from assay.evidence.report import documented
    from assay.evidence.verdict import remarks, summaries

    return {
        "scale": scale,
        "evidence": [documented(record) for record in records],
        "claims": [
            {
                "claim": claim.claim,
                "fingerprint": claim.fingerprint,
                "verdict": claim.word,
                "reason": claim.reason,
                "remarks": remarks(claim.deciding),
                "decided_by": claim.deciding.id,
                "points": len(claim.points),
                "failed": len(claim.failed),
            }
            for claim in summaries(records)
        ],
        "unavailable": todo.unavailable,
    }


def _say(text: str) -> None:
    typer.echo(f"assay: {text}", err=True)


def _leave(text: str, code: int) -> None:
    """End with an exit code after the results are printed; raising an error would print a second JSON document."""
    _say(text)
    raise typer.Exit(code)
