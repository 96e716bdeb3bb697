"""`assay code`: what a program costs, whether a change made it cheaper, how efficient a model's programs are, and a cheaper one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(
    help="What programs cost: measure one, compare two, score a model's, make one cheaper.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

CASES = "JSON lines: args (and kwargs), python (an expression for the tuple of arguments) or stdin, and expected where it is known."
METER = (
    "cpu_seconds, operations (CPython's), peak_bytes, instructions (valgrind; some fifty times slower) or hardware_instructions "
    "(the processor's own counter, where the system lends it)."
)


@app.command()
def measure(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A program: .py, .js, .c, .cpp, or a package's folder.")],
    cases: Annotated[Path, typer.Option(help=CASES)],
    entry: Annotated[str | None, typer.Option(help="The function to call, where the file defines several.")] = None,
    meter: Annotated[list[str] | None, typer.Option(help=f"{METER} May be given several times.")] = None,
    repeats: Annotated[int, typer.Option(help="Runs of each case.")] = 5,
    seconds: Annotated[float, typer.Option(help="Processor time that one run may take.")] = 10.0,
    memory: Annotated[int, typer.Option(help="MiB that it may hold.")] = 1024,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Run a program on its cases in a sandbox and say what it costs, by meter, with the spread from run to run."""
    from assay.cli.output import print_json, saying
    from assay.codebench import measure as run
    from assay.codebench import read_cases
    from assay.codebench.costs import usual_meters
    from assay.methods.core.programs.workers import METERS

    limits = _limits(seconds, memory)
    repeats = _whole("--repeats", repeats)
    with saying("starting the sandbox") as say:
        inputs = read_cases(cases)
        meters = list(dict.fromkeys(meter or usual_meters(file, inputs)))
        found = run(file, inputs, entry=entry, meters=meters, repeats=repeats, limits=limits, say=say)
    if json:
        costs = [
            {
                "meter": cost.meter,
                "unit": METERS[cost.meter].unit,
                "case": cost.case + 1,
                "median": cost.median,
                "variation": cost.variation,
            }
            | {"charged": cost.charged, "repeats": list(cost.repeats)}
            for cost in found.costs
        ]
        meant = {name: {"how": METERS[name].how, "blind": METERS[name].blind} for name in meters}
        told = {"program": found.program, "cases": found.cases, "checked": found.checked}
        print_json({**told, "right": not found.wrong, "wrong": found.wrong, "meters": meant, "costs": costs})
    else:
        _print_measured(found, meters)
    if found.wrong:
        raise typer.Exit(1)


@app.command()
def compare(
    before: Annotated[Path, typer.Argument(metavar="BEFORE", help="The program as it was: a file, or a folder.")],
    after: Annotated[Path, typer.Argument(metavar="AFTER", help="The program as it is.")],
    cases: Annotated[Path | None, typer.Option(help=CASES)] = None,
    pytest: Annotated[
        bool, typer.Option("--pytest", help="Compare by the tests in the two folders, or by --tests.")
    ] = False,
    tests: Annotated[
        Path | None, typer.Option(help="With --pytest and two files: tests that import BEFORE by its name.")
    ] = None,
    entry: Annotated[str | None, typer.Option(help="The function to call, where the file defines several.")] = None,
    meter: Annotated[str, typer.Option(help=METER)] = "cpu_seconds",
    pairs: Annotated[
        int, typer.Option(help="Runs of each, in turns; six are the fewest that can show a difference.")
    ] = 10,
    seconds: Annotated[float, typer.Option(help="Processor time that one run may take.")] = 10.0,
    memory: Annotated[int, typer.Option(help="MiB that it may hold.")] = 1024,
    check: Annotated[
        bool, typer.Option("--check", help="Exit with 1 if AFTER is wrong, or dearer beyond noise.")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Run two versions in turns and say whether the new one is cheaper, dearer, or not to be told from the old one."""
    from assay.cli.output import print_json, saying, wrapped
    from assay.codebench import compare as run
    from assay.codebench import compare_suites, read_cases
    from assay.codebench.costs import EXACT, LEAST_PAIRS
    from assay.errors import InputError

    if pytest == (cases is not None):
        raise InputError("give either --cases FILE or --pytest")
    if cases is not None and tests is not None:
        raise InputError("--tests goes with --pytest: --cases has inputs, and needs no tests")
    if pytest and entry is not None:
        raise InputError("--entry goes with --cases: tests call what they import")
    pairs = _whole("--pairs", pairs)
    if check and pairs < (least := 2 if meter in EXACT else LEAST_PAIRS):
        raise InputError(
            f"--pairs must be at least {least} with --check by {meter}, got {pairs}: fewer can show no difference"
        )
    limits = _limits(seconds, memory)
    with saying("starting the sandbox") as say:
        if cases is not None:
            found = run(before, after, read_cases(cases), entry=entry, meter=meter, pairs=pairs, limits=limits, say=say)
        elif meter != "cpu_seconds":
            raise InputError(f"--meter: suites of tests are compared by cpu_seconds, got {meter!r}")
        else:
            found = compare_suites(
                before, after, tests, pairs=pairs, limits=_limits(max(seconds, 600), max(memory, 4096)), say=say
            )
    if json:
        bounds = None if found.ratio is None else (found.ratio.median, found.ratio.low, found.ratio.high)
        ratio = None  # a bound that is not known is null: JSON has no infinity
        if bounds is not None:
            known = (value if value < float("inf") else None for value in bounds)
            ratio = dict(zip(("median", "low", "high"), known, strict=True))
        print_json({"before": found.before, "after": found.after, "meter": found.meter, "verdict": found.verdict, "wrong": found.wrong,
                    "ratio": ratio, "pairs": [list(pair) for pair in found.totals], "by_case": list(found.by_case)})  # fmt: skip
    elif found.ratio is None:
        print(wrapped(f"wrong      {found.wrong}", 11))
    else:
        print(wrapped(f"before     {_shown(_median(found.totals, 0), found.meter)}  {found.before}", 11))
        print(wrapped(f"after      {_shown(_median(found.totals, 1), found.meter)}  {found.after}", 11))
        words = (
            "" if found.ratio.high == found.ratio.low else f" ({found.ratio.low:.4g} to {found.ratio.high:.4g}, 95 %)"
        )
        print(
            wrapped(
                f"ratio      {found.ratio.median:.4g}x{words} of {found.ratio.n} pairs by {found.meter}; above 1 AFTER is cheaper",
                11,
            )
        )
        print(f"verdict    {found.verdict}")
    if check and found.verdict in ("wrong", "dearer"):
        raise typer.Exit(1)


@app.command()
def score(
    samples: Annotated[
        Path,
        typer.Argument(
            metavar="SAMPLES",
            help="JSON lines of task_id and solution (a whole program) or completion (what follows the prompt).",
        ),
    ],
    tasks: Annotated[
        str, typer.Option(help="humaneval, or a file of tasks as HumanEval, MBPP or EvalPlus have them (pass@k only).")
    ],
    k: Annotated[str, typer.Option("--k", help="For which k, with commas: 1,10.")] = "1",
    meter: Annotated[str, typer.Option(help=METER)] = "cpu_seconds",
    repeats: Annotated[int, typer.Option(help="Runs of each input; meters that repeat exactly take one.")] = 6,
    seconds: Annotated[
        float, typer.Option(help="Processor time that one call may take; more where the reference's takes half of it.")
    ] = 5.0,
    memory: Annotated[int, typer.Option(help="MiB that it may hold.")] = 4096,
    journal: Annotated[
        Path | None,
        typer.Option(
            help="Where finished tasks are kept, so that a killed run goes on; in the cache folder by default."
        ),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Run a model's programs once and say how often they are right, and how efficient: pass@k, eff@k, DPS, efficient@k."""
    import hashlib
    import zlib
    from dataclasses import replace

    from assay.cli.output import print_json, saying, wrapped
    from assay.codebench import scores
    from assay.codebench.costs import check_meter, without_sandbox
    from assay.errors import InputError, MissingError
    from assay.measure.machine import machine as here
    from assay.methods.core.programs.runs import Settings, run_all
    from assay.methods.core.sandbox import SandboxMissing
    from assay.paths import cache_dir
    from assay.workloads.programs.task import bank, humaneval, read_samples, read_tasks

    check_meter(meter)
    try:
        ks = sorted({_whole("--k", int(one)) for one in k.split(",")})
    except ValueError as error:
        raise InputError(f"--k must be whole numbers with commas between them, got {k!r} ({error})") from None
    _limits(seconds, memory)
    settings = Settings(meter, _whole("--repeats", repeats), seconds=seconds, memory_mib=memory)
    reading = Path(tasks)
    try:
        if tasks == "humaneval":
            known = {task.id: task for task in humaneval()} | bank()
        else:
            known = {task.id: task for task in read_tasks(reading)}
        reading = samples
        given = read_samples(samples, known)
    except (RecursionError, zlib.error) as error:  # too many brackets, or a .gz that is broken in its middle
        raise InputError(f"{reading} cannot be read: {error}") from None
    if not given:
        raise InputError(f"{samples} must hold at least one sample")
    named = f"{Path(samples).resolve()}".encode()
    journal = journal or cache_dir() / "code" / f"{hashlib.sha256(named).hexdigest()[:16]}.jsonl"
    try:
        with saying("starting the sandbox") as say:
            runs = run_all(given, known, settings, journal=journal, machine=here().fingerprint, say=say)
    except SandboxMissing as error:
        raise MissingError(without_sandbox(error)) from None
    except ValueError as error:
        raise InputError(str(error)) from None
    try:
        found = scores.score(runs, settings, ks)
    except ValueError as error:
        raise InputError(str(error)) from None
    if untried := len(known) - len(runs):
        note = f"{untried} of {len(known)} tasks have no samples: they are in no figure"
        found = replace(found, left_out=(*found.left_out, note))
    if json:
        print_json(scores.document(runs, found, settings) | {"journal": str(journal)})
        return
    for figure in found.figures:
        shown = f"{figure.value:.1f}" if figure.name.startswith("DPS") else f"{figure.value:.3f}"
        spread = "" if figure.low is None else f"  ({figure.low:.3g} to {figure.high:.3g}, 95 %)"
        print(wrapped(f"{figure.name:<22}{shown:>8}{spread}  over {figure.tasks} tasks", 32))
    for why in found.left_out:
        print(wrapped(f"left out: {why}", 10))
    measured = any(run.measured for run in runs)
    how = (
        f"On assay's own references and inputs, by {meter}" if measured else "By the answers of the canonical programs"
    )
    print(wrapped(f"{how}; these are no leaderboard's figures. Kept in {journal}"))


@app.command()
def optimise(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A Python file with functions.")],
    tests: Annotated[Path, typer.Option(help="Tests for pytest that import FILE by its name.")],
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write the new program here.")] = None,
    write: Annotated[bool, typer.Option("--write", help="Write the new program over FILE.")] = False,
    meter: Annotated[str, typer.Option(help="cpu_seconds, operations (CPython's) or peak_bytes.")] = "cpu_seconds",
    minutes: Annotated[float, typer.Option(help="For how long to search; deciding comes on top.")] = 5.0,
    model: Annotated[
        str | None,
        typer.Option(
            metavar="FOLDER|URL",
            help="A language model that is asked where rules find nothing more: a folder of safetensors, or the address of a server "
            "that ends with /v1 (ASSAY_API_KEY is its key).",
        ),
    ] = None,
    samples: Annotated[int, typer.Option(help="Answers that the model is asked for, a round.")] = 4,
    seconds: Annotated[float, typer.Option(help="Processor time that one run may take.")] = 10.0,
    memory: Annotated[int, typer.Option(help="MiB that it may hold.")] = 1024,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Search for a cheaper program that does the same on the tests and on inputs made of theirs; print what to change as a diff."""
    import os
    import shutil

    from assay.cli.output import print_json, saying
    from assay.codebench.by_model import model_of
    from assay.codebench.optimise import optimise as search
    from assay.codebench.optimised import document
    from assay.errors import InputError
    from assay.paths import atomic_file

    limits = _limits(seconds, memory)
    if not 0 < minutes <= 24 * 60:
        raise InputError(f"--minutes must be a number above 0 and at most 1440, got {minutes}")
    if output is not None and output.exists() and file.exists() and output.samefile(file):
        raise InputError("--output must not be FILE itself: say --write to write over it")
    for target in [one for one in (output, file if write else None) if one is not None]:
        folder = next(one for one in (target.absolute().parent, *target.absolute().parents) if one.exists())
        if target.is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK):
            raise InputError(f"{target} cannot be written: name a file in a folder that you may write to")
    samples = _whole("--samples", samples)
    asked = None
    if model is not None:
        from assay.cli.serve import checked_keys

        asked = model_of(model, next(iter(checked_keys(None, None)), ""))
    with saying("starting the sandbox") as say:
        found = search(file, tests, meter=meter, minutes=minutes, limits=limits, model=asked, samples=samples, say=say)
    for target in [one for one in (output, file if write else None) if one is not None]:
        if target is file and found.found and file.read_bytes() != found.original.encode():
            raise InputError(f"{file} was changed during the search, and is left as it is: give the command again")
        if target is output or found.found:
            with atomic_file(target) as path:
                path.write_bytes(found.program.encode())
                if target.exists():
                    shutil.copymode(target, path)
    if json:
        print_json(document(found))
        return
    _print_optimised(found)
    print(found.diff, end="")


def _print_optimised(found: Any) -> None:
    """What is told goes to stderr, so that stdout is the diff and nothing else."""
    import sys

    from assay.cli.output import wrapped
    from assay.methods.core.programs.workers import METERS

    def tell(text: str, hang: int = 11) -> None:
        print(wrapped(text, hang), file=sys.stderr)

    for step in found.steps:
        tell(f"line {step.line:<5} {step.rule}: {step.why}")
    for one in found.classes:
        spread = f"{one.ratio.low:.3g} to {one.ratio.high:.3g}"
        costs = f"{_shown(one.before, found.meter)} -> {_shown(one.after, found.meter)}"
        tell(f"inputs     {one.name}: {costs}, {one.ratio.median:.3g}x ({spread}): {one.verdict}")
    tried = f"{found.candidates} candidates tried" + "".join(f", {count} {why}" for why, count in found.refused.items())
    tell(f"search     {tried}")
    if found.model is not None:
        tell(f"model      {_asked(found.model)}")
    if not found.found:
        tell(f"result     {found.why}")
        return
    tested = ", ".join(f"{count} {what}" for what, count in found.tested.items())
    known = "; ".join(f"{name}({kinds})" for name, kinds in found.functions.items())
    tell(f"the same   on {tested}; arguments as the tests have them: {known}")
    if found.left_out:
        calls = ", ".join(f"{count} of {name}" for name, count in found.left_out.items())
        tell(
            f"unknown    calls of the tests with values that are not plain, or that answer differently each time: {calls}"
        )
    words = "" if found.ratio.low == found.ratio.high else f" ({found.ratio.low:.3g} to {found.ratio.high:.3g}, 95 %)"
    how = METERS[found.meter].how
    tell(
        f"result     {found.ratio.median:.3g}x cheaper{words} on all inputs kept back together, by {found.meter}: {how}"
    )
    if dearer := [one.name for one in found.classes if one.verdict == "dearer"]:
        tell(f"but        dearer on {'; '.join(dearer)}")


def _asked(model: Any) -> str:
    named = f"{model.name} ({model.fingerprint})" if model.fingerprint else model.name
    tokens = "tokens that nobody counted" if model.tokens is None else f"{model.tokens:,} tokens"
    trouble = f"; {model.trouble}" if model.trouble else ""
    return f"{named}: {model.questions} questions, {tokens}, {model.seconds:.3g} s{trouble}"


def _print_measured(found: Any, meters: list[str]) -> None:
    from assay.cli.output import wrapped
    from assay.methods.core.programs.workers import METERS

    if found.wrong:
        print(wrapped(f"wrong      {found.wrong}: a program that is wrong has no cost", 11))
        return
    told = (
        f"right on {found.checked} of {found.cases} cases"
        if found.checked
        else f"{found.cases} cases, none with an expected answer"
    )
    print(wrapped(f"{found.program}: {told}"))
    for name in meters:
        costs = [cost for cost in found.costs if cost.meter == name]
        spread = max(cost.variation for cost in costs)
        if len(costs[0].repeats) == 1:
            known = "one run: its spread is not known"
        else:
            known = f"differs by up to {100 * spread:.2g} % from run to run" if spread else "the same at every run"
        print(wrapped(f"{name:<13}{_shown(found.total(name), name):>12}  {known}", 27))
        if any(cost.charged for cost in costs):
            print(wrapped("             work outside of the call (while loading or answering) was counted in", 13))
    print()
    for name in meters:
        print(wrapped(f"{name}: {METERS[name].how}. Not seen: {METERS[name].blind}.", 2))


def _median(totals: Any, which: int) -> float:
    import statistics

    return statistics.median(pair[which] for pair in totals)


def _shown(value: float, meter: str) -> str:
    if meter == "cpu_seconds":
        return f"{value:.3g} s" if value >= 1 else f"{1000 * value:.3g} ms"
    return f"{value / 2**20:.3g} MiB" if meter == "peak_bytes" else f"{value:,.0f}"


def _limits(seconds: float, memory: int) -> Any:
    from assay import checks
    from assay.errors import InputError
    from assay.methods.core.sandbox import Limits

    try:
        checks.number("--seconds", seconds, above=0, high=86_400)
        checks.whole("--memory", memory, low=16)
    except (ValueError, TypeError) as error:
        raise InputError(str(error)) from None
    return Limits(wall_seconds=seconds * 4 + 10, cpu_seconds=seconds, memory_mib=memory, output_bytes=64 * 2**20)


def _whole(name: str, value: int) -> int:
    from assay import checks
    from assay.errors import InputError

    try:
        return checks.whole(name, value, low=1, high=100_000)
    except ValueError as error:
        raise InputError(str(error)) from None
