"""`assay tune MODEL`: find, prove and save a cheaper model."""

from __future__ import annotations

import shlex
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

SOON = 1.0  # seconds after which something is said, if nothing was yet


def tune(
    model: Annotated[str, typer.Argument(help="A folder, a .gguf file, a hub id in the local cache, or smollm2-135m.")],
    goal: Annotated[
        str,
        typer.Option(
            help="ttft | decode | throughput | memory | energy | goodput; of an image model latency | throughput | memory"
        ),
    ],
    prompt_tokens: Annotated[
        int | None, typer.Option(help="Length of the prompt; 512, or what the context has room for.")
    ] = None,
    new_tokens: Annotated[
        int | None, typer.Option(help="Tokens to generate; 32, or what the context has room for.")
    ] = None,
    max_drop: Annotated[
        float,
        typer.Option(
            help="Relative perplexity increase allowed, in [0, 1), and points of the --eval score that may be lost (0.01: one "
            "prompt in a hundred). The bad end of the interval must lie within it."
        ),
    ] = 0.01,
    minutes: Annotated[float, typer.Option(help="Time for everything.")] = 10.0,
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder of the artefact.")] = Path("assay-out"),
    workload: Annotated[
        Path | None,
        typer.Option(
            help='Your own prompts to run and to measure perplexity on: JSON lines of {"prompt": ...}. Of an image model: a folder of '
            "pictures, in subfolders by class where these are known."
        ),
    ] = None,
    eval_: Annotated[
        str | None,
        typer.Option(
            "--eval",
            metavar="FILE",
            help='What must still be answered as well: JSON lines of {"prompt": ..., "answers": [...]}, of which the first line '
            "that is generated greedily must match one but for case and white space; or lm_eval:TASK.",
        ),
    ] = None,
    slo: Annotated[
        str | None, typer.Option(help="Of the goal goodput: limits in ms, as in ttft=500,itl=50 (and e2e=9000).")
    ] = None,
    clients: Annotated[
        int, typer.Option(help="Of the goal goodput: how many clients ask at a time, each waiting for its answer.")
    ] = 8,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on where an interrupted run stopped; what failed is tried again.")
    ] = False,
    memory_gib: Annotated[float | None, typer.Option(help="Memory limit of one child process.")] = None,
    ray: Annotated[
        str | None, typer.Option(metavar="ADDRESS", help="Judge candidates on a Ray cluster; `local` starts one.")
    ] = None,
    allow_download: Annotated[bool, typer.Option(help="Allow a hub id to be downloaded.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Find, prove and save a cheaper version of MODEL, a language model or an image classifier.

    For goodput, the requests a second that are answered within the limits of --slo, half the time goes into tuning for throughput, and
    the other half into loading `assay serve` with what was found, as loaded, and with other settings.
    """
    from rich.console import Console

    console = Console(stderr=True)
    early = threading.Timer(SOON, _print, (console, f"tuning {model} for {goal} in {minutes:g} minutes"))
    early.daemon = True
    early.start()  # torch's import takes seconds; an earlier error is shown on its own

    from assay.cli.output import print_json
    from assay.errors import InterruptedRun
    from assay.tuner.images.kind import is_image_model

    if is_image_model(model):
        for option, given in {
            "--prompt-tokens": prompt_tokens, "--new-tokens": new_tokens, "--eval": eval_, "--slo": slo, "--ray": ray,
        }.items():  # fmt: skip
            _refuse_for_images(option, given)
        early.cancel()
        _tune_images(model, goal, max_drop, minutes, output, workload, resume, memory_gib, json, console)
        return
    from assay.tuner.tune import tune as run
    from assay.tuner.work import settings_for

    early.cancel()
    limits = _limits(goal, slo, clients)
    wanted: Any = goal if limits is None else "throughput"  # checked by Settings
    part = minutes if limits is None else minutes / 2
    settings = settings_for(
        model,
        wanted,
        prompt_tokens,
        new_tokens,
        workload=str(workload) if workload else None,
        allow_download=allow_download,
        eval=eval_,
    )
    with _progress(console, minutes) as say:

        def found() -> dict[str, Any]:
            outcome = run(
                settings,
                output,
                max_drop=max_drop,
                minutes=part,
                resume=resume,
                memory_gib=memory_gib,
                ray=ray,
                say=say,
            )
            return outcome.document()

        try:
            if limits is None:
                document = found()
            else:
                document = _for_goodput(found, model, output, settings, limits, clients, resume, minutes - part, say)
        except KeyboardInterrupt as stop:  # typer would make an exit code of it and lose what it says
            raise InterruptedRun(str(stop)) from None
    if json:
        print_json(document)
        return
    print_summary(document, str(output))
    if limits is not None:
        print_goodput(document["goodput"], slo or "")


@contextmanager
def _progress(console: Any, minutes: float) -> Iterator[Callable[[str], None]]:
    """A bar on the terminal that shows the last message, or a line a message in a log."""
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (SpinnerColumn(), BarColumn(20), TimeElapsedColumn(), TextColumn("{task.description}", markup=False))
    with Progress(*columns, console=console, transient=True) as progress:
        bar = progress.add_task("starting", total=max(minutes, 0.0) * 60)

        def say(text: str) -> None:
            progress.update(bar, description=text, completed=progress.tasks[0].elapsed or 0.0)
            if not console.is_terminal:
                _print(console, text)

        yield say


def _refuse_for_images(option: str, given: Any) -> None:
    """Raise InputError for an option that an image model has no use for."""
    from assay.errors import InputError

    if given is not None:
        raise InputError(f"{option} is for language models; this is an image classifier")


def _tune_images(
    model: str, goal: str, max_drop: float, minutes: float, output: Path, workload: Path | None, resume: bool,
    memory_gib: float | None, json: bool, console: Any,
) -> None:  # fmt: skip
    """`assay tune` of an image classifier, on the user's pictures, or on crops of bundled photographs where none are named."""
    from assay.cli.output import print_json
    from assay.errors import InterruptedRun
    from assay.tuner.images.tune import tune_images
    from assay.tuner.images.work import Settings
    from assay.workloads.pictures import bundled_pictures

    wanted: Any = goal  # checked by Settings
    settings = Settings(model, wanted, str(workload if workload is not None else bundled_pictures()))
    try:
        with _progress(console, minutes) as say:
            document = tune_images(
                settings, output, max_drop=max_drop, minutes=minutes, resume=resume, memory_gib=memory_gib, say=say
            )
    except KeyboardInterrupt as stop:
        raise InterruptedRun(str(stop)) from None
    if json:
        print_json(document)
    else:
        print_images(document)


def print_images(document: dict[str, Any]) -> None:
    """The answer about an image model in a few lines."""
    from rich.console import Console
    from rich.table import Table

    from assay.tuner.images.report import quality_words

    out = Console()
    table = Table(title=f"{document['model']}, goal {document['goal']}")
    for heading in ("", document["best"]["unit"], "95 % interval"):
        table.add_column(heading, justify="right" if heading else "left", no_wrap=True)
    for name, key in (("as loaded", "baseline"), ("free", "free_baseline"), ("best", "best")):
        row = document[key]
        table.add_row(name, f"{row['value']:,.2f}", f"{row['low']:,.2f} to {row['high']:,.2f}")
    out.print(table)
    _print(out, f"free     {document['free_baseline']['label']}")
    _print(out, f"best     {document['best']['label']}")
    speed, free = document["speedup"], document["speedup_vs_free"]
    _print(
        out,
        f"{free['median']:.2f}x what is free ({free['low']:.2f} to {free['high']:.2f}), "
        f"{speed['median']:.2f}x as loaded ({speed['low']:.2f} to {speed['high']:.2f})",
    )
    _print(out, quality_words(document["quality"], document["max_drop"]))
    for note in document["notes"]:
        _print(out, f"Note: {note}.")
    if document["noisy"]:
        _print(out, "The machine was busy during the final run: treat these figures as noisy.")
    _print(out, f"\nreport   {document['report']}")
    _print(out, f'load     python -c "import assay; model = assay.load({document["artefact"]!r})"')
    _print(out, f"replay   assay apply MODEL --recipe {shlex.quote(document['artefact'] + '/recipe.toml')} -o DIR")


def _limits(goal: str, slo: str | None, clients: int) -> Any:
    """The limits of the goal goodput, None for other goals. Raises InputError where they are missing, or of no use."""
    from assay import checks
    from assay.errors import InputError
    from assay.loadtest.report import slo_of
    from assay.methods.transform import GOALS

    if goal not in (*GOALS, "goodput"):
        raise InputError(f"--goal must be one of {', '.join(GOALS)}, goodput; got {goal!r}")
    if (goal == "goodput") != (slo is not None):
        raise InputError("--goal goodput needs --slo, as in ttft=500,itl=50, and no other goal has one")
    try:
        checks.whole("--clients", clients, low=1, high=1024)
    except ValueError as error:
        raise InputError(str(error)) from None
    return None if slo is None else slo_of(slo)


def _for_goodput(
    tune: Callable[[], dict[str, Any]],
    model: str,
    output: Path,
    settings: Any,
    limits: Any,
    clients: int,
    resume: bool,
    minutes: float,
    say: Any,
) -> dict[str, Any]:
    """The document of tuning, and in `goodput` what serves best; a journal beside `output` keeps what an interruption would lose."""
    from assay.tuner.goodput import journal_of, tuned

    journal = journal_of(output, settings, limits, clients, resume, say)
    document = tuned(journal, output, tune)
    try:
        document["goodput"] = _served(model, output, settings, limits, clients, minutes, say, journal)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"{journal.count()} measurements are kept in {journal.path}") from None
    journal.path.unlink(missing_ok=True)
    return document


def _served(
    model: str, output: Path, settings: Any, limits: Any, clients: int, minutes: float, say: Any, journal: Any
) -> dict[str, Any]:
    """What serves best: the model as loaded or what was found, and with which of the settings that `assay serve` has."""
    import inspect
    import os
    import tempfile

    from assay.cli.serve import serve
    from assay.tuner.goodput import SETTINGS, Clients, best_served, starter

    known = {name: values for name, values in SETTINGS.items() if name in inspect.signature(serve).parameters}
    asked = Clients(clients, settings.prompt_tokens, settings.new_tokens, int.from_bytes(os.urandom(3)))
    models = {"as loaded": os.path.abspath(model) if os.path.exists(model) else model, "tuned": os.path.abspath(output)}
    with tempfile.TemporaryDirectory(prefix="assay-goodput-") as folder:
        return best_served(
            models,
            limits,
            asked,
            start=starter(Path(folder)),
            settings=known,
            minutes=minutes,
            say=say,
            journal=journal,
        )


def print_goodput(found: dict[str, Any], slo: str) -> None:
    """How to serve, and what that was measured to gain."""
    from rich.console import Console

    out = Console()

    def rate(server: dict[str, Any]) -> str:
        value, share = server["goodput_per_second"], server["within_slo"]
        return "none" if value is None else f"{value['value']:.2f} requests/s ({100 * share['value']:.0f} %)"

    best, ratio = found["best"], found["ratio"]
    _print(
        out,
        f"\ngoodput  {rate(found['proven'])} within {slo} for {found['clients']['count']} clients; as loaded, with default settings, "
        f"{rate(found['baseline'])}",
    )
    if ratio is not None:
        low, high = ("?" if ratio[bound] is None else f"{ratio[bound]:.2f}" for bound in ("low", "high"))
        _print(out, f"         {ratio['value']:.2f}x ({low} to {high}), in {found['ratios']['pairs']} pairs of blocks")
    if not found["helped"] and (best["name"] != "as loaded" or best["settings"]):
        _print(out, "         That is not better for certain.")
    _print(out, f"serve    {shlex.join(['assay', 'serve', best['model'], *best['options']])}")


def print_summary(document: dict[str, Any], folder: str) -> None:
    """The answer in a few lines, ending with the commands to continue with."""
    from rich.console import Console
    from rich.table import Table

    from assay.tuner.words import close_words, eval_words, papers_words, quality_words, saved_words

    out = Console()
    unit = document["best"]["unit"]
    table = Table(title=f"{document['model']}, goal {document['goal']}")
    for heading in ("", unit, "95 % interval"):
        table.add_column(heading, justify="right" if heading else "left", no_wrap=True)
    for name, key in (("as loaded", "baseline"), ("free", "free_baseline"), ("best", "best")):
        row = document[key]
        interval = "one run" if row["low"] is None else f"{row['low']:,.1f} to {row['high']:,.1f}"
        table.add_row(name, f"{row['value']:,.1f}", interval)
    out.print(table)
    _print(out, f"free     {document['free_baseline']['label']}")
    _print(out, f"best     {document['best']['label']}")
    for line in _reached(document):
        _print(out, f"         {line}")
    if document["kinds"]:
        _print(out, f"time     {_kinds(document)}")
    _print(
        out,
        f"tried    {document['screened']} candidates screened, {document['judged']} judged, {document['proven']} proven "
        f"in {document['pairs']} pairs\n",
    )
    speed, free, limit = document["speedup"], document["speedup_vs_free"], document["max_drop"]
    _print(
        out,
        f"{free['median']:.2f}x what is free ({free['low']:.2f} to {free['high']:.2f}), "
        f"{speed['median']:.2f}x as loaded ({speed['low']:.2f} to {speed['high']:.2f})",
    )
    quality = document["quality"]
    words = [papers_words(document["papers"]), quality_words(quality, limit), close_words(quality)]
    for line in [*words, eval_words(quality["eval"], limit), saved_words(document)]:
        if line:
            _print(out, line)
    if not document["measured_again"]["cost"]:
        _print(
            out, "The figures of time or memory are those by which it was chosen: there was no time to measure again."
        )
    for note in document["notes"]:
        _print(out, f"Note: {note}.")
    if document["noisy"]:
        _print(out, "The machine was busy during the final run: treat these figures as noisy.")
    _print(out, f"\nreport   {document['report']}")
    _print(out, f'load     python -c "import assay; model = assay.load({folder!r})"')
    _print(out, f"serve    assay serve {shlex.quote(folder)}")
    _print(out, f"replay   assay apply MODEL --recipe {shlex.quote(folder + '/recipe.toml')} -o DIR")


def _kinds(document: dict[str, Any]) -> str:
    """Where the time went, before and after: milliseconds by kind of work, which add up to the figures of the table."""
    kinds = document["kinds"]
    parts = []
    for when, name in (("before", "as loaded"), ("after", "best")):
        whole = sum(kind.get(when, 0.0) for kind in kinds.values())
        shares = " + ".join(f"{1e3 * kind.get(when, 0.0):,.1f} {kind_name}" for kind_name, kind in kinds.items())
        parts.append(f"{name} {1e3 * whole:,.1f} ms = {shares}")
    return "; ".join(parts)


def _reached(document: dict[str, Any]) -> list[str]:
    """What the recipe's transforms leave alone, and which paths their operators took."""
    lines = [
        f"{name} reaches {100 * fit['share']:.0f} %: {fit['reached']}"
        for name, fit in document["reached"].items()
        if fit["share"] < 1 or fit["reached"]
    ]
    if document["paths"]:
        lines.append("ran " + ", ".join(document["paths"]))
    return lines


def _print(console: Any, text: str) -> None:
    console.print(text, highlight=False, markup=False, soft_wrap=True)
