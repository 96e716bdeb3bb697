"""`assay tune MODEL`: find, prove and save a cheaper model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer


def tune(
    model: Annotated[str, typer.Argument(help="A folder, a .gguf file, a hub id in the local cache, or smollm2-135m.")],
    goal: Annotated[str, typer.Option(help="ttft | decode | throughput | memory | energy")],
    prompt_tokens: Annotated[int, typer.Option(help="Length of the prompt the goal is measured with.")] = 512,
    new_tokens: Annotated[int, typer.Option(help="Tokens to generate.")] = 32,
    max_drop: Annotated[float, typer.Option(help="Relative perplexity increase allowed, in [0, 1).")] = 0.01,
    minutes: Annotated[float, typer.Option(help="Time for everything.")] = 10.0,
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder of the artefact.")] = Path("assay-out"),
    workload: Annotated[Path | None, typer.Option(help='Your own prompts: JSON lines of {"prompt": ...}.')] = None,
    resume: Annotated[bool, typer.Option(help="Go on where an interrupted run stopped.")] = False,
    memory_gib: Annotated[float | None, typer.Option(help="Memory limit of one trial.")] = None,
    allow_download: Annotated[bool, typer.Option(help="Allow a hub id to be downloaded.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Find, prove and save a cheaper version of MODEL."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    from assay.cli.output import print_json
    from assay.tuner.tune import tune as run
    from assay.tuner.work import Settings

    wanted: Any = goal  # checked by Settings
    settings = Settings(
        model,
        wanted,
        prompt_tokens,
        new_tokens,
        workload=str(workload) if workload else None,
        allow_download=allow_download,
    )
    console = Console(stderr=True)
    columns = (SpinnerColumn(), BarColumn(20), TimeElapsedColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=console, transient=True) as progress:
        bar = progress.add_task("starting", total=minutes * 60)

        def say(text: str) -> None:
            progress.update(bar, description=text, completed=progress.tasks[0].elapsed or 0.0)
            if not console.is_terminal:
                console.print(text, highlight=False, markup=False, soft_wrap=True)

        outcome = run(
            settings, output, max_drop=max_drop, minutes=minutes, resume=resume, memory_gib=memory_gib, say=say
        )
    document = outcome.document()
    if json:
        print_json(document)
    else:
        print_summary(document, str(output))


def print_summary(document: dict[str, Any], folder: str) -> None:
    """The answer in a few lines, ending with the commands to go on with."""
    from rich.console import Console
    from rich.table import Table

    out = Console()
    unit = document["best"]["unit"]
    table = Table(title=f"{document['model']}, goal {document['goal']}")
    for heading in ("", unit, "95 % interval"):
        table.add_column(heading, justify="right" if heading else "left", no_wrap=True)
    for name, key in (("as loaded", "baseline"), ("free baseline", "free_baseline"), ("best", "best")):
        row = document[key]
        table.add_row(name, f"{row['value']:,.1f}", f"{row['low']:,.1f} to {row['high']:,.1f}")
    out.print(table)
    out.print(f"free     {document['free_baseline']['label']}", highlight=False, markup=False, soft_wrap=True)
    out.print(f"best     {document['best']['label']}\n", highlight=False, markup=False, soft_wrap=True)
    speed, free, quality = document["speedup"], document["speedup_vs_free"], document["quality"]
    out.print(
        f"{speed['median']:.2f}x as loaded ({speed['low']:.2f} to {speed['high']:.2f}), "
        f"{free['median']:.2f}x the free baseline ({free['low']:.2f} to {free['high']:.2f}); "
        f"{quality['metric']} {quality['baseline']:.3f} -> {quality['candidate']:.3f} "
        f"({100 * quality['drop']:+.2f} %, {100 * quality['low']:+.2f} to {100 * quality['high']:+.2f})",
        highlight=False,
    )
    if not document["helped"]:
        why = "No method beat the free baseline within the allowed loss"
        if not document["candidates"]:
            why = "The time was spent on the baselines before any method was tried (see --minutes)"
        out.print(f"{why}: the free baseline was saved.", highlight=False)
    if document["noisy"]:
        out.print("The machine was busy during the final run: treat these figures as noisy.", highlight=False)
    out.print(f"\nreport   {document['report']}", highlight=False, soft_wrap=True)
    out.print(f'load     python -c "import assay; model = assay.load({folder!r})"', highlight=False, soft_wrap=True)
    out.print(f"serve    assay serve {folder}", highlight=False, soft_wrap=True)
    out.print(f"replay   assay apply MODEL --recipe {folder}/recipe.toml -o DIR", highlight=False, soft_wrap=True)
