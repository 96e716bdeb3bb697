"""`assay profile MODEL`: will it fit and how fast, said before it is loaded; then where time and bytes go, and how far that is from what
the machine could do."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from assay.measure.profile import Profile, Row
    from assay.methods.compression.resource_efficient_llm_survey import Forecast

PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Profile of {{ model }}</title>
<style>
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #1f2937; background: #fff; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; margin: 0.5rem 0 1.5rem; }
th, td { padding: 0.2rem 0.6rem; text-align: right; border-bottom: 1px solid #e5e7eb; }
th:first-child, td:first-child { text-align: left; overflow-wrap: anywhere; }
figure { margin: 1rem 0; overflow-x: auto; }
svg { max-width: 100%; height: auto; }
.note { color: #92400e; }
</style>
</head>
<body>
<h1>Profile of {{ model }}</h1>
<p>{{ subject }} {{ limits }} Times are measured; MACs (1 MAC = 2 FLOPs), bytes
and attainable times are modelled.</p>
{% for line in foretold %}<p>{{ line }}</p>
{% endfor %}
{% for note in notes %}<p class="note">{{ note }}</p>
{% endfor %}
{% for phase, kinds in p.phases.items() %}
<h2>{{ phase }}: {{ "%.1f"|format(1e3 * p.seconds[phase]) }} ms</h2>
<table>
<tr><th>kind of work</th><th>ms</th><th>share</th><th>GMACs</th><th>MB</th><th>attainable ms</th></tr>
{% for name, kind in kinds.items() %}
<tr><td>{{ name }}</td><td>{{ "%.1f"|format(1e3 * kind.seconds) }}</td><td>{{ "%.0f"|format(100 * kind.share) }} %</td>
<td>{{ "%.2f"|format(kind.macs / 1e9) }}</td><td>{{ "%.1f"|format(kind.bytes / 1e6) }}</td>
<td>{{ "%.1f"|format(1e3 * kind.attainable_seconds) }}</td></tr>
{% endfor %}
</table>
{% for drawing in drawings[phase] %}
<figure role="img" aria-label="{{ drawing.label }}, {{ phase }}">{{ drawing.svg | safe }}</figure>
{% endfor %}
{% endfor %}
{% if runtime %}
<h2>Runtime model</h2>
<p>T(p, o) = T_prompt(p) + (o - 1) x {{ "%.2f"|format(1e3 * runtime.seconds_per_token) }} ms; r² = {{ "%.3f"|format(runtime.r2) }}</p>
<table>
<tr><th>prompt tokens p</th>{% for p in runtime.prompt_tokens %}<td>{{ p }}</td>{% endfor %}</tr>
<tr><th>T_prompt(p), ms</th>{% for s in runtime.prompt_seconds %}<td>{{ "%.1f"|format(1e3 * s) }}</td>{% endfor %}</tr>
</table>
<h2>Words moved by attention</h2>
<p>{{ words_heading }}</p>
<ul>
{% for line in words_lines %}<li>{{ line }}</li>
{% endfor %}
</ul>
{% endif %}
<h2>Machine</h2>
<table>
{% for name, value in machine.items() %}<tr><th>{{ name }}</th><td>{{ value }}</td></tr>
{% endfor %}
</table>
</body>
</html>
"""


def profile(
    model: Annotated[
        str,
        typer.Argument(
            help="A folder, a .gguf file, a hub id in the local cache, or smollm2-135m; or the folder of an image classifier."
        ),
    ],
    prompt_tokens: Annotated[int | None, typer.Option(help="Length of the prompt, real text; 512 by default.")] = None,
    new_tokens: Annotated[int | None, typer.Option(help="Tokens to generate after it; 16 by default.")] = None,
    batch: Annotated[int | None, typer.Option(help="Of an image model: pictures at a time; 1 by default.")] = None,
    estimate: Annotated[
        bool, typer.Option("--estimate", help="Say what it would need and how fast it would be, and load nothing.")
    ] = False,
    anyway: Annotated[bool, typer.Option("--anyway", help="Load it even where it does not fit.")] = False,
    html: Annotated[Path | None, typer.Option(help="Write a page with tables and plots to this file.")] = None,
    png: Annotated[Path | None, typer.Option(help="Write the plots to this file.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Say whether MODEL fits and how fast it will be; then show where its time and its bytes go, against what this machine could do, and
    fit its runtime model T(p, o). Of an image classifier: where the time and the bytes of a picture go."""
    from assay.cli.output import print_json, saying
    from assay.errors import InputError
    from assay.paths import output_file
    from assay.tuner.images.kind import is_image_model

    if is_image_model(model):
        language = {"--prompt-tokens": prompt_tokens, "--new-tokens": new_tokens}
        language |= {"--estimate": estimate or None, "--anyway": anyway or None}
        for name, given in language.items():
            if given is not None:
                raise InputError(f"{name} is for language models; {model} is an image classifier")
        _profile_images(model, 1 if batch is None else batch, html, png, json)
        return
    if batch is not None:
        raise InputError(f"--batch is for image classifiers, which {model} is not")
    prompt_tokens, new_tokens = (
        512 if prompt_tokens is None else prompt_tokens,
        16 if new_tokens is None else new_tokens,
    )
    for name, value in (("--prompt-tokens", prompt_tokens), ("--new-tokens", new_tokens)):
        if value < 1:
            raise InputError(f"{name} must be at least 1, got {value}")
    if estimate and (html is not None or png is not None):
        raise InputError("--estimate loads nothing: there is nothing to draw with --html or --png")
    html = None if html is None else output_file(html, "--html")
    png = None if png is None else output_file(png, "--png")

    with saying("counting what the model needs") as say:
        found = foresee(model, prompt_tokens, new_tokens, say, refuse=not (estimate or anyway))
        told = forecast_facts(found)
        if not estimate:
            say("loading the model")
            measured, runtime, moved = examine(model, prompt_tokens, new_tokens, say)
            told |= {"measured": held_against(found, measured)}
        if html is not None:
            say("drawing")
            subject = f"{prompt_tokens} prompt tokens, {new_tokens} new ones."
            write_page(model, measured, html, forecast_lines(told), notes(measured), subject, runtime, moved)
        if png is not None:
            write_png(measured, png)
    if json:
        document = {} if estimate else {**measured.as_dict(), "runtime_model": runtime, "words_moved": moved}
        print_json({"model": model, "forecast": told, **document})
        return
    for line in forecast_lines(told):
        typer.echo(line)
    if estimate:
        return
    print_tables(model, measured, runtime, moved)
    for path in (html, png):
        if path is not None:
            typer.echo(f"wrote {path}")


def _profile_images(model: str, batch: int, html: Path | None, png: Path | None, json: bool) -> None:
    """`assay profile` of an image classifier, whose pictures are crops of bundled photographs."""
    from assay import checks
    from assay.cli.output import print_json, saying
    from assay.errors import InputError
    from assay.paths import output_file

    try:
        checks.whole("--batch", batch, low=1, high=1024)
    except (TypeError, ValueError) as error:
        raise InputError(str(error)) from None
    html = None if html is None else output_file(html, "--html")
    png = None if png is None else output_file(png, "--png")
    with saying("loading the model") as say:
        from assay.tuner.images.profile import grouped, profile_images

        found = profile_images(model, batch, say)
        subject = f"{found.architecture}, {batch} picture{'s' * (batch > 1)} at a time, from pixel values to logits."
        told = [
            f"Decoding and preparing a picture takes {1e3 * found.prepare_seconds:,.1f} ms more, before the model runs."
        ]
        remarks = [*notes(found.measured), *found.notes]
        if html is not None:
            say("drawing")
            write_page(model, found.measured, html, told, remarks, subject)
        if png is not None:
            write_png(found.measured, png)
    if json:
        print_json({"model": model, **found.as_dict()})
        return
    out = _console()
    out.print(subject, markup=False)
    for phase in found.measured.seconds:
        out.print(phase_table(model, found.measured, phase, grouped(found.measured.rows)))
    out.print(f"{limits(found.measured)} 1 MAC = 2 FLOPs.")
    for line in (*told, *remarks):
        out.print(line, markup=False)
    for path in (html, png):
        if path is not None:
            typer.echo(f"wrote {path}")


CGROUPS = Path("/sys/fs/cgroup")
"""Where Linux keeps what groups of processes, such as a container's, may take."""


def available_bytes() -> float:
    """Memory that this process can have now: what is free on the machine, or can be freed, and what its container still allows."""
    import contextlib

    import psutil

    found = float(psutil.virtual_memory().available)
    folder = CGROUPS / own_cgroup()
    while folder.is_relative_to(CGROUPS):
        with contextlib.suppress(OSError, ValueError):  # no such file, or "max"
            limit, used = (int((folder / name).read_text()) for name in ("memory.max", "memory.current"))
            kept = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            found = min(
                found, max(limit - used + int(kept.get("inactive_file", 0)), 0)
            )  # pages of files can be dropped
        folder = folder.parent
    return found


def own_cgroup() -> str:
    """The control group of this process, below `CGROUPS`; "" where there is none or it is the root."""
    import contextlib

    with contextlib.suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            if line.startswith("0::"):
                return line[3:].strip("/")
    return ""


def stored(source: str) -> tuple[Any, str]:
    """The configuration of a model that is not loaded, and the floats in which loading it holds its weights.

    Raises ValueError where that cannot be said (a recipe, weights that are no plain floats), InputError for damaged files, and whatever a
    library makes of a configuration that it does not know.
    """
    import torch
    from transformers import AutoConfig

    from assay.workloads.files import check_folder, check_gguf
    from assay.workloads.gguf_models import read_plan
    from assay.workloads.models import find_model

    found = find_model(source)
    if found.is_file():
        plan = read_plan(found, check_gguf(found))[1]
        return AutoConfig.for_model(**plan.config), "fp32"  # what conversion makes of it
    if (found / "recipe.toml").is_file():
        raise ValueError("a recipe belongs to the model, which changes what it takes")
    weights = check_folder(found)
    types = weights.types
    config = AutoConfig.from_pretrained(found, trust_remote_code=False, local_files_only=True)
    layers = getattr(config.get_text_config(decoder=True), "num_hidden_layers", None)
    if isinstance(layers, int) and layers > weights.tensors:  # or counting them would not end
        raise ValueError(f"it asks for {layers} layers, but the weights hold only {weights.tensors} tensors")
    if getattr(config, "quantization_config", None):
        raise ValueError("its weights are quantised")
    names: dict[Any, str] = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
    said = names.get(getattr(config, "dtype", None))
    most = max(types, key=lambda name: types[name])
    format = said or {"F32": "fp32", "BF16": "bf16", "F16": "fp16"}.get(most)
    if format is None:
        raise ValueError(f"its weights are stored as {most}")
    return config, format


def foresee(
    source: str, prompt_tokens: int, new_tokens: int, say: Callable[[str], None], *, refuse: bool = True
) -> Forecast | str:
    """What the model will need and take, or why that cannot be said. Nothing of it is loaded; a few blocks of its sizes are run.

    Of a model whose blocks are not known, memory alone is said; of one that does not fit, no times. Raises InputError for lengths that the
    model has no positions for, and with `refuse` MissingError where its weights and its cache alone are more than the memory that is
    available.
    """
    from assay.errors import AssayError, MissingError
    from assay.measure.machine import calibrate
    from assay.methods.compression import resource_efficient_llm_survey as survey
    from assay.workloads.context import stored_context

    require_positions(prompt_tokens, new_tokens, stored_context(source))
    decoder = None
    try:
        config, format = stored(source)
        kind = config.get_text_config(decoder=True).model_type
        if kind in survey.KINDS:
            decoder = survey.decoder_of(config)
            found = survey.memory_forecast(decoder, format, prompt_tokens, new_tokens, available_bytes())
            found = survey.with_other_parts(found, config)
        else:
            found = survey.other_forecast(config, format, prompt_tokens, new_tokens, available_bytes())
    except AssayError:
        raise
    except Exception as error:  # loading will say what is wrong, if anything is
        return " ".join(str(error).split()) or type(error).__name__
    least = found.weight_bytes + found.cache_bytes
    if refuse and least > found.available_bytes:
        raise MissingError(
            f"{source} does not fit: weights and cache take {least / 1e9:.2f} GB, {found.available_bytes / 1e9:.2f} GB are "
            "available; --estimate says more, --anyway loads it all the same"
        )
    if decoder is None or not found.fits:
        return found
    limits = calibrate(device="cpu", say=say)
    say("timing a few blocks of the model's sizes")
    return survey.with_times(found, config, decoder, limits)


def require_positions(prompt_tokens: int, new_tokens: int, longest: int | None) -> None:
    """Raise InputError where the model has too few positions (None: no bound is known)."""
    from assay.errors import InputError

    if longest is not None and prompt_tokens + new_tokens > longest:
        raise InputError(
            f"--prompt-tokens {prompt_tokens} and --new-tokens {new_tokens} need {prompt_tokens + new_tokens} positions, "
            f"the model has {longest}"
        )


def forecast_facts(found: Forecast | str) -> dict[str, Any]:
    """A forecast as JSON: all of it modelled, but for `available_bytes`; or the `reason` why there is none."""
    from dataclasses import asdict

    if isinstance(found, str):
        return {"reason": found}
    return {"reason": "", **asdict(found), "needed_bytes": found.needed_bytes, "fits": found.fits}


def held_against(found: Forecast | str, measured: Profile) -> dict[str, float]:
    """The measured seconds of the prompt and of a token, and the relative error of what was foretold of each; {} without a forecast."""
    if isinstance(found, str) or not found.prefill_seconds:
        return {}
    seen = {"prefill": measured.seconds["prefill"]}
    if found.new_tokens > 1 and "decode" in measured.seconds:
        seen["token"] = measured.seconds["decode"] / (found.new_tokens - 1)
    told = {"prefill": found.prefill_seconds, "token": found.token_seconds}
    facts: dict[str, float] = {}
    for name, seconds in seen.items():
        if seconds > 0:
            facts |= {f"{name}_seconds": seconds, f"{name}_error": told[name] / seconds - 1}
    return facts


def forecast_lines(told: dict[str, Any]) -> list[str]:
    """`forecast_facts` as text, and how far off it was once the model has run (GB are 1e9 bytes)."""
    if told["reason"]:
        return [f"Nothing foretold: {told['reason']}"]
    fullest = max(told["cache_bytes"], told["prompt_cache_bytes"])
    parts = {name: told[f"{name}_bytes"] / 1e9 for name in ("weight", "activation", "needed", "available")}
    lines = [
        f"Modelled before loading, in {told['format']}: {told['parameters'] / 1e6:,.1f} M parameters "
        f"({told['parameters_without_tables'] / 1e6:,.1f} M without embedding and projection)",
        f"  memory: weights {parts['weight']:.3f} GB, cache {fullest / 1e9:.3f} GB, activations {parts['activation']:.3f} GB, at most "
        f"{parts['needed']:.3f} GB at once, of {parts['available']:.3f} GB available: {'it fits' if told['fits'] else 'it does not fit'}",
    ]
    if told["uncounted"]:
        lines.append(f"  not foretold: {told['uncounted']}")
    if told["noisy"]:
        lines.append("  other processes kept the machine busy: the times foretold are too long")
    seen = told.get("measured", {})
    for name, what in (("prefill", f"a prompt of {told['prompt_tokens']} tokens"), ("token", "a token after it")):
        if not told[f"{name}_seconds"]:
            continue
        least, expected = 1e3 * told[f"least_{name}_seconds"], 1e3 * told[f"{name}_seconds"]
        line = f"  {what}: {expected:,.1f} ms ({least:,.1f} ms at least)"
        if f"{name}_seconds" in seen:
            error = 100 * seen[f"{name}_error"]
            line += f"; measured: {1e3 * seen[f'{name}_seconds']:,.1f} ms, the forecast was {error:+.0f} % off"
        lines.append(line)
    return lines


def examine(
    source: str, prompt_tokens: int, new_tokens: int, say: Callable[[str], None]
) -> tuple[Profile, dict[str, Any], dict[str, Any]]:
    """Load, profile and fit: the profile, the runtime model with predictions for its grid, and `words_moved`, both as JSON."""
    import json

    from assay.measure.machine import calibrate
    from assay.measure.profile import profile_model
    from assay.methods.serving import idealized_runtime
    from assay.tuner.artefact import load_tuned
    from assay.workloads.context import context_length
    from assay.workloads.text import long_prompt

    loaded = load_tuned(source)
    model: Any = loaded.model
    require_positions(prompt_tokens, new_tokens, context_length(model))
    limits = calibrate(device="cpu", say=say)
    say("timing the modules")
    measured = profile_model(model, long_prompt(loaded.tokenizer, prompt_tokens), new_tokens, calibration=limits)

    say("fitting the runtime model")
    seeds = itertools.count(1)  # another place in the text each time, so that nothing is served from a prompt cache
    run = idealized_runtime.transformers_runner(
        model, make_prompt=lambda p: long_prompt(loaded.tokenizer, p, seed=next(seeds))
    )
    prompts, outputs = grid(prompt_tokens, new_tokens)

    def told(prompt: int, output: int) -> Any:
        say(f"fitting the runtime model: {prompt} prompt tokens, {output} new ones")
        return run(prompt, output)

    fitted = idealized_runtime.profile(told, prompt_tokens=prompts, output_tokens=outputs, repeats=2)
    runtime: dict[str, Any] = json.loads(fitted.to_json())
    runtime["predicted"] = [
        {"prompt_tokens": p, "output_tokens": o, "seconds": fitted.predict(p, o)} for p in prompts for o in outputs
    ]
    return measured, runtime, words_moved(model, prompt_tokens)


def words_moved(model: Any, prompt_tokens: int) -> dict[str, Any]:
    """The words that exact attention over one prompt moves between slow memory and a core's cache, with the best tiling (modelled).

    One entry per layer, None for layers that the paper's bounds do not cover (sliding windows). If they cover no layer of this model,
    or the system does not say how large its caches are, `layers` is empty and `reason` says why.
    """
    from assay.methods.attention import attention_io

    found: dict[str, Any] = {"prompt_tokens": prompt_tokens, "device": "", "layers": [], "reason": ""}
    try:
        device = attention_io.this_machine()
        layers = attention_io.advise_model(model, prompt_tokens, device, batch=1)
    except (ValueError, OSError) as error:
        return found | {"reason": str(error)}
    fields = ("words", "bytes", "regime", "limited_by")
    rows = [None if layer is None else {name: getattr(layer, name) for name in fields} for layer in layers]
    return found | {"device": device.name, "layers": rows}


def words_heading(moved: dict[str, Any]) -> str:
    """The heading over `words_lines`."""
    where = f" on {moved['device']}" if moved["device"] else ""
    return f"Words exact attention moves at {moved['prompt_tokens']} prompt tokens, best tiling{where} (modelled):"


def words_lines(moved: dict[str, Any]) -> list[str]:
    """`words_moved` as text, one line for each run of equal layers."""
    if moved["reason"]:
        return [f"no figures: {moved['reason']}"]
    lines = []
    for layer, group in itertools.groupby(enumerate(moved["layers"]), key=lambda pair: pair[1]):
        numbers = [number for number, _ in group]
        name = f"layer {numbers[0]}" if len(numbers) == 1 else f"layers {numbers[0]} to {numbers[-1]}"
        if layer is None:
            lines.append(f"{name}: sliding window, not covered")
            continue
        size = f"{layer['words']:,} words ({layer['bytes'] / 1e6:,.2f} MB)" + (" each" if len(numbers) > 1 else "")
        lines.append(f"{name}: {size}, {layer['regime']}, limited by {layer['limited_by']}")
    return lines


def grid(prompt_tokens: int, new_tokens: int) -> tuple[list[int], list[int]]:
    """Prompt and output lengths of the runtime model: few, so that it takes seconds; `idealized_runtime.profile` has the full grid."""
    most = max(new_tokens, 2)  # the time per token needs two output lengths
    return sorted({max(prompt_tokens // 4, 1), prompt_tokens}), sorted({1, (most + 1) // 2, most})


def notes(measured: Profile) -> list[str]:
    """What a reader must know to trust the figures."""
    found = []
    if measured.noisy:
        found.append("Other processes kept the machine busy: the times are noisy.")
    if measured.calibration.noisy:
        found.append("The machine was busy when it was calibrated: the attainable times are estimates.")
    if measured.uncounted:
        names = ", ".join(f"{name} ({calls} calls)" for name, calls in measured.uncounted.items())
        found.append(f"MACs unknown of: {names}. Those of the modules that call them are too low.")
    return found


def limits(measured: Profile) -> str:
    """How far the run is from the machine's limits, or why that cannot be told."""
    share = measured.roofline_share
    if share is None:
        return f"Void: {measured.void}"
    return (
        f"The machine's calibrated limits would allow {100 * share:.0f} % of the measured time, each module by itself."
    )


LONGEST_NAME = (
    44  # characters of a module's name in the table of an image model: the end of it, which tells modules apart
)
SHOWN = 0.005  # share of the time below which a module gets no line of its own; --json has them all


def phase_table(name: str, measured: Profile, phase: Any, rows: list[Row] | None = None) -> Any:
    """Modules in the order they run, the small ones together, then the kinds of work.

    With `rows` these, their parameters in place of operations a byte, and all of it.
    """
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    title = f"{escape(name)}, {phase}: {1e3 * measured.seconds[phase]:,.1f} ms"
    table = Table(title=title, title_justify="left", box=box.SIMPLE, padding=(0, 1, 0, 0))
    table.add_column("module", overflow="ellipsis", no_wrap=True)
    table.add_column("kind", no_wrap=True)
    own = rows is not None
    for heading in ("ms", "time", "MMACs", "MB", "parameters" if own else "op/byte", "attainable", "of it"):
        table.add_column(heading, justify="right", no_wrap=True)
    rows = measured.grouped(phase) if rows is None else rows
    whole = sum(row.seconds for row in rows)

    def add(label: str, kind: str, together: list[Any]) -> None:
        fields = ("params", "seconds", "attainable_seconds", "macs", "bytes")
        held, spent, attainable, macs, moved = (sum(getattr(row, field) for row in together) for field in fields)
        table.add_row(
            f"...{label[3 - LONGEST_NAME :]}" if own and len(label) > LONGEST_NAME else label,
            kind,
            f"{1e3 * spent:,.2f}",
            f"{100 * spent / whole:.1f} %" if whole else "",
            f"{macs / 1e6:,.1f}",
            f"{moved / 1e6:,.1f}",
            f"{held:,}" if own else f"{2 * macs / moved:,.1f}" if moved else "",
            f"{1e3 * attainable:,.2f}",
            "" if not spent else "void" if measured.void else f"{100 * attainable / spent:.0f} %",
        )

    small = [row for row in rows if row.seconds < SHOWN * whole]
    for row in rows:
        if row.seconds >= SHOWN * whole:
            add(row.name or "(model)", row.kind, [row])
    if small:
        add(f"{len(small)} smaller", "", small)
    table.add_section()
    for kind in ("linear", "attention", "other"):
        add(f"all {kind}", kind, [row for row in rows if row.kind == kind])
    if own:
        add("all", "", rows)
    return table


def _console() -> Any:
    """Standard output; where it is no terminal, with room for the tables."""
    from rich.console import Console

    out = Console(highlight=False)
    return out if out.is_terminal else Console(highlight=False, width=120)


def print_tables(name: str, measured: Profile, runtime: dict[str, Any], moved: dict[str, Any]) -> None:
    """Modules by phase, kinds of work, the runtime model, the words that attention moves."""
    out = _console()
    for phase in measured.seconds:
        out.print(phase_table(name, measured, phase))
    out.print(f"{limits(measured)} 1 MAC = 2 FLOPs.")
    per_token = 1e3 * runtime["seconds_per_token"]
    out.print(f"Runtime model: T(p, o) = T_prompt(p) + (o - 1) x {per_token:.2f} ms, r2 = {runtime['r2']:.3f}")
    for p, seconds in zip(runtime["prompt_tokens"], runtime["prompt_seconds"], strict=True):
        out.print(f"  T_prompt({p}) = {1e3 * seconds:,.1f} ms")
    out.print(words_heading(moved))
    for line in words_lines(moved):
        out.print(f"  {line}")
    for note in notes(measured):
        out.print(note)


def write_page(
    name: str,
    measured: Profile,
    path: Path,
    foretold: list[str],
    remarks: list[str],
    subject: str,
    runtime: dict[str, Any] | None = None,
    moved: dict[str, Any] | None = None,
) -> None:
    """One HTML file with its plots inside, readable without a network; whole or not at all. `subject` says what was run."""
    from jinja2 import Environment

    from assay.measure import plots
    from assay.paths import atomic_file

    drawings = {
        phase: [
            {"label": "Waterline", "svg": plots.svg(plots.waterline_figure(measured, phase))},
            {"label": "Efficiency gap", "svg": plots.svg(plots.gap_figure(measured, phase))},
        ]
        for phase in measured.seconds
    }
    text = (
        Environment(autoescape=True, trim_blocks=True)
        .from_string(PAGE)
        .render(
            model=name,
            foretold=foretold,
            p=measured.as_dict(),
            runtime=runtime,
            words_heading="" if moved is None else words_heading(moved),
            words_lines=[] if moved is None else words_lines(moved),
            subject=subject,
            drawings=drawings,
            notes=remarks,
            limits=limits(measured),
            machine=measured.machine.describe(),
        )
    )
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_png(measured: Profile, path: Path) -> None:
    """Waterline and gap of each phase, below one another."""
    from assay.measure import plots

    figures = [
        draw(measured, phase) for phase in measured.seconds for draw in (plots.waterline_figure, plots.gap_figure)
    ]
    plots.save_png(figures, path)
