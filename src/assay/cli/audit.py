"""`assay audit`: is somebody's before/after figure noise, and which rule of the measuring guide does it break?"""

from __future__ import annotations

from typing import Annotated, Any

import typer


def audit(
    file: Annotated[
        str,
        typer.Argument(
            metavar="FILE",
            help="Samples: CSV, JSON, or what hyperfine, pytest-benchmark or optimum-benchmark wrote; - reads stdin "
            "(two files of one tool: cat a.json b.json | assay audit -).",
        ),
    ],
    paired: Annotated[
        bool, typer.Option("--paired", help="The i-th sample of one was taken beside the i-th of the other.")
    ] = False,
    before: Annotated[
        str | None, typer.Option(help="Name of the baseline, where there are more than two series.")
    ] = None,
    after: Annotated[str | None, typer.Option(help="Name of the candidate.")] = None,
    check: Annotated[
        bool, typer.Option("--check", help="Exit with 1 if it is noise, or too few samples to say.")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Say whether two series of samples differ, and what is wrong with how they were taken."""
    import sys

    from assay.cli.output import print_json
    from assay.evidence import audit as judging
    from assay.evidence import samples

    if file == "-":
        content = sys.stdin.buffer.read(samples.MOST_BYTES + 1)
        found = samples.read(samples.decoded(content, "stdin"), before=before, after=after)
    else:
        found = samples.read_file(file, before=before, after=after)
    seen = judging.audit(found, paired=paired)
    if json:
        print_json(seen.document())
    else:
        _print(seen)
    if check and seen.verdict != "a difference":
        raise typer.Exit(1)


def _print(seen: Any) -> None:
    from assay.cli.output import wrapped

    print(wrapped(f"read as    {seen.format}, {'paired' if seen.paired else 'unpaired'}", 11))
    for title, arm in (("baseline", seen.before), ("candidate", seen.after)):
        print(wrapped(f"{title:<11}{arm.name}: median {arm.median:.4g} of {arm.n}", 11))
    ratio = seen.ratio
    interval = f" ({ratio.low:.4g} to {ratio.high:.4g}, 95 %)" if ratio.high < float("inf") else ""
    print(wrapped(f"ratio      {ratio.median:.4g}x{interval}; of times, above 1 is faster", 11))
    print(wrapped(f"verdict    {seen.words}", 11))
    if seen.broken:
        print("\nrules broken, as far as the samples show")
    for one in seen.broken:
        grave = " (the interval is not to be believed)" if one.grave else ""
        print(wrapped(f"- {one.rule}{grave}: {one.seen}. To do: {one.do}.", 2))
    print(wrapped(f"not visible here: {', '.join(seen.unseen)}", 2))
