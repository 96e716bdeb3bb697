"""What a state recalls, and how fast one generates from it: sequence mixers side by side in the same language model.

    python benchmarks/mixers.py [--panel recall|generation] [--arms ARM ...] [--out FILE] [--chart FILE.html] [--steps N] [--quick]

Every arm is a `MixerForCausalLM` of the same width, depth and channel mixer: a gated short convolution (as BASED's models begin)
and then two layers of the arm's mixer; BASED's own two mixing layers are Taylor linear attention and a small window.

Recall: associative recall, one training for each arm and size of its state, on the same batches from the same seed and with the
same learning rate, side by side with one thread each. The interval is a bootstrap over the test sequences: it does not tell how
much another seed or learning rate would change, and an arm that has not learned the task in these steps may learn it in more.
Where an arm has no knob (the long convolutions keep their inputs) there is one point. Accuracy is the share of asked values that
are right; guessing among the values of the sequence gives 1 / pairs.

Generation: greedy, token by token, behind contexts of growing length. The weights are untrained, which the time does not depend on.
The context goes in by each arm's own parallel form in chunks of 1,024 tokens (masked attention, chunked sums, parallel scan,
overlap-save convolution); only the tokens after it are timed, in interleaved rounds over the arms (A B C, C B A, B C A, ...). Tokens
a second are of the whole batch; median over the rounds with its interval. Long convolutions have no recurrence: a step is
one product of the cached inputs with the kernel, and that is what is timed. No arm is compiled or quantized.

FIT is no mixer: its decoder alternates between tokens and latents over the depth of the model, with layers of its own. Its arm is
that model whole, of the same width and depth (a local, a global and a local layer, with a read and a write between them; MLPs as
wide inside, no short convolution); rows say its parameters. It computes latents once a group, so that what a token costs depends on
where in its group it stands: timed are tokens in the middle of a group, and the last of one with the latents' work behind them, and
the row is the mean over a whole group.

`state_bytes` is of one sequence, all layers, short convolutions included; FIT's is that of its fullest moment in the last group.

One JSON line a point, with machine, commit and command. With `--out` a point takes the place of the same point in that file, and
the chart shows all of them. `--chart` writes a page and, beside it, the same picture as .png.
"""

from __future__ import annotations

import argparse
import base64
import functools
import io
import itertools
import json
import multiprocessing
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jinja2 import Environment
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator
from rich.console import Console
from rich.progress import track
from torch import Tensor
from transformers.modeling_outputs import CausalLMOutput

from assay.evidence.place import here
from assay.experiments.mixers.based import generate_from, prefilled
from assay.experiments.mixers.training import evaluate, train
from assay.measure.clock import compare_many
from assay.measure.stats import bootstrap, positive_median
from assay.methods.attention.fit import FITConfig, FITDecoder
from assay.methods.core.mixers.model import MixerConfig, MixerForCausalLM, StateCache
from assay.methods.mixers import based, long_convs, ssm_survey  # noqa: F401 (they register their mixers)
from assay.paths import atomic_file
from assay.workloads.sequences import associative_recall, batches_of, byte_windows

HEADS = 2
LR = 3e-3
END = "fit, the end of a group"
Row = dict[str, Any]


@dataclass(frozen=True)
class Arm:
    """A mixer by its registered name ("fit": `FITLanguageModel`), the option that sizes its state, the settings to train (smallest
    state first), and the setting that generates. `color` and `marker` are those of the chart."""

    mixer: str
    knob: str | None
    settings: tuple[int | None, ...]
    generating: int | None
    color: str
    marker: str


ARMS = {
    "attention": Arm("attention", "kv_heads", (1, 2), 2, "#000000", "o"),
    "sliding window": Arm("based_window", "window", (8, 16, 32), 128, "#8c8c8c", "s"),
    "based": Arm("based", "feature_dim", (2, 4, 16), 16, "#0072b2", "D"),
    "mamba": Arm("mamba", "states", (4, 16, 64), 16, "#d55e00", "^"),
    "mamba2": Arm("mamba2", "states", (4, 16, 64), 64, "#e69f00", "v"),
    "s4d": Arm("s4d", "states", (16, 64), 64, "#cc79a7", "P"),
    "long convolution": Arm("long_conv", None, (None,), None, "#009e73", "X"),
    "long convolution, H3": Arm("long_conv_h3", None, (None,), None, "#56b4e9", "*"),
    "fit": Arm("fit", "latents", (1, 4, 8), 4, "#6a3d9a", "p"),
}


@dataclass(frozen=True)
class Recall:
    """Sizes of the first panel. `window` is that of BASED's second mixing layer, `group` FIT's tokens a group."""

    width: int = 64
    length: int = 32
    pairs: int = 8
    vocab: int = 32
    batch: int = 64
    steps: int = 4000
    tests: int = 512
    window: int = 16
    group: int = 8

    def task(self) -> dict[str, int]:
        """The options of `associative_recall`."""
        return {"length": self.length, "pairs": self.pairs, "vocab": self.vocab}


@dataclass(frozen=True)
class Generation:
    """Sizes of the second panel: `rounds` runs of `tokens` tokens for each arm and context, no new round after `seconds`."""

    width: int = 256
    contexts: tuple[int, ...] = (1024, 2048, 4096, 8192, 16384)
    batch: int = 4
    tokens: int = 4
    rounds: int = 30
    seconds: float = 60.0
    window: int = 128
    group: int = 64


QUICK = (
    Recall(width=16, length=32, pairs=4, vocab=32, batch=4, steps=2, tests=32, window=8, group=4),
    Generation(width=16, contexts=(32, 64), batch=2, tokens=2, rounds=3, seconds=5.0, window=16, group=8),
)


class FITLanguageModel(FITDecoder):
    """FIT's decoder, called as the other arms are: its state lies in a `StateCache`."""

    def new_cache(self, batch: int) -> StateCache:
        return StateCache([self.init_state(batch)])

    def forward(
        self, input_ids: Tensor, *, cache: StateCache | None = None, logits_to_keep: int = 0, **kwargs: Any
    ) -> CausalLMOutput:
        if cache is None:
            return super().forward(input_ids, **kwargs)
        logits, cache.states[0] = self.advance(input_ids, cache.states[0])
        return CausalLMOutput(logits=logits[:, -logits_to_keep:])

    def state_bytes(self, tokens: int, batch: int = 1) -> int:
        """At the fullest moment of the last group: it is emptier at its end."""
        last = range(max(0, tokens + 1 - self.group_size), tokens + 1)
        return max(FITDecoder.state_bytes(self, n, batch) for n in last)


Model = MixerForCausalLM | FITLanguageModel


def language_model(
    arm: str, setting: int | None, *, width: int, vocab: int, length: int, window: int, group: int
) -> Model:
    """The model of an arm: a short convolution and two mixers, or FIT, for up to `length` tokens; weights of seed 0."""
    chosen = ARMS[arm]
    if arm == "fit":
        assert setting is not None
        torch.manual_seed(0)
        sizes = {"vocab_size": vocab, "groups": -(-length // group), "group_size": group, "latents": setting}
        widths = {"dim": width, "latent_dim": width, "heads": HEADS, "latent_heads": HEADS, "ratio": 2}
        return FITLanguageModel(FITConfig("(1)1(1)", **sizes, **widths))
    options: dict[str, Any] = {} if chosen.knob is None else {chosen.knob: setting}
    if chosen.mixer in ("attention", "based", "based_window"):
        options["heads"] = HEADS
    if chosen.mixer == "mamba2":
        options["head_dim"] = min(64, width)
    if chosen.knob is None:  # a start that learns in a few hundred steps; kernels have a learning rate of their own
        options |= {"length": length, "init": "double_exponential", "lr": 1e-2}
    first: list[Any] = [chosen.mixer, options]
    second = ["based_window", {"heads": HEADS, "window": window}] if arm == "based" else first
    stack = [["baseconv", {}], first, second]
    torch.manual_seed(0)
    return MixerForCausalLM(MixerConfig(vocab_size=vocab, hidden_size=width, layers=stack, intermediate_size=2 * width))


# ------------------------------------------------------------------------------------------------------------------- recall


def trainings(arms: Sequence[str] = tuple(ARMS)) -> list[tuple[str, int | None]]:
    """The points of the first panel."""
    return [(name, setting) for name in arms for setting in ARMS[name].settings]


def recall_row(arm: str, setting: int | None, sizes: Recall) -> Row:
    """Trains one point on one thread: accuracy with its interval over the test sequences, and the state's bytes."""
    torch.set_num_threads(1)
    inputs, targets = associative_recall(sizes.tests, seed=0, **sizes.task())
    room = {"length": sizes.length, "window": sizes.window, "group": sizes.group}
    model = language_model(arm, setting, width=sizes.width, vocab=sizes.vocab, **room)
    begin = time.perf_counter()
    batches = batches_of(associative_recall, sizes.batch, **sizes.task())
    losses = train(model, batches, steps=sizes.steps, lr=LR, weight_decay=0.0)
    seconds = time.perf_counter() - begin
    found = bootstrap(evaluate(model, inputs, targets)["accuracy"].numpy(), np.mean)
    return {
        "panel": "recall",
        "arm": arm,
        "knob": ARMS[arm].knob,
        "setting": setting,
        "accuracy": {"mean": found.median, "low": found.low, "high": found.high, "n": found.n},
        "chance": 1 / sizes.pairs,
        "losses": losses[:: max(1, sizes.steps // 20)],
        "state_bytes": model.state_bytes(sizes.length),
        "parameters": sum(p.numel() for p in model.parameters()),
        "training_seconds": seconds,
        "sizes": vars(sizes),
    }


def recall_rows(sizes: Recall, arms: Sequence[str] = tuple(ARMS)) -> Iterator[Row]:
    """The rows of the first panel, as many trainings at a time as torch has threads here."""
    points = trainings(arms)
    workers = min(torch.get_num_threads(), len(points))
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        rows = pool.map(recall_row, *zip(*points, strict=True), itertools.repeat(sizes))
        yield from track(rows, "trainings", total=len(points), console=Console(stderr=True))


# --------------------------------------------------------------------------------------------------------------- generation


def generation_models(sizes: Generation) -> dict[str, Model]:
    """The model of each arm, untrained, with room for the longest context, a token of warm-up and those generated."""
    length = max(sizes.contexts) + 1 + sizes.tokens
    return {
        name: language_model(
            name,
            arm.generating,
            width=sizes.width,
            vocab=256,
            length=length,
            window=sizes.window,
            group=sizes.group,
        ).eval()
        for name, arm in ARMS.items()
    }


def generation_rows(sizes: Generation) -> Iterator[Row]:
    """Times all arms behind each context and yields a row an arm: tokens a second with their interval, and the state's bytes."""
    models = generation_models(sizes)
    for context in sizes.contexts:
        ids = byte_windows(context, sizes.batch)[0]
        caches = {arm: prefilled(model, ids) for arm, model in models.items() if arm != "fit"}
        caches["fit"] = prefilled(models["fit"], ids[:, : context - sizes.group // 2])
        caches[END] = prefilled(models["fit"], ids[:, : context - 1 - sizes.tokens])
        runs = {
            arm: functools.partial(
                generate_behind, models["fit" if arm == END else arm], cache, ids[:, -1:], sizes.tokens
            )
            for arm, cache in caches.items()
        }
        timings = compare_many(runs, rounds=sizes.rounds, max_seconds=sizes.seconds)
        share = sizes.tokens / sizes.group  # of the runs over a whole group, those that end it
        middle, end = timings.seconds["fit"], timings.seconds[END]
        seconds_of = timings.seconds | {"fit": [(1 - share) * a + share * b for a, b in zip(middle, end, strict=True)]}
        for arm, model in models.items():
            found = positive_median([sizes.batch * sizes.tokens / seconds for seconds in seconds_of[arm]])
            yield {
                "panel": "generation",
                "arm": arm,
                "knob": ARMS[arm].knob,
                "setting": ARMS[arm].generating,
                "context": context,
                "tokens_per_second": {"median": found.median, "low": found.low, "high": found.high, "n": found.n},
                "state_bytes": model.state_bytes(context),
                "parameters": sum(p.numel() for p in model.parameters()),
                "weights": "untrained",
                "noisy": timings.noisy,
                "sizes": vars(sizes),
            }


def generate_behind(model: Model, cache: StateCache, token: Tensor, tokens: int) -> None:
    """Generates behind `cache`, which stays as long as it is; states of fixed size go on from run to run (the time is the same)."""
    generate_from(model, StateCache([dict(state) for state in cache.states]), token, tokens)


# -------------------------------------------------------------------------------------------------------------------- chart

PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }}</title>
<style>
body { font: 15px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; color: #1c1c1c; background: #fff }
.scroll { overflow-x: auto } img { max-width: 100%; height: auto } code { overflow-wrap: anywhere }
table { border-collapse: collapse; font-size: .9rem }
td, th { text-align: left; padding: .3rem .8rem .3rem 0; border-bottom: 1px solid #ddd }
</style>
</head>
<body>
<h1>{{ title }}</h1>
<img alt="recall against the bytes of the state, and tokens a second against the context" src="data:image/svg+xml;base64,{{ picture }}">
<p>Left: accuracy of associative recall, mean and 95 % interval over test sequences of one training. Right: tokens a second of the
whole batch, token by token, median and 95 % interval over interleaved rounds; untrained weights.
{% if noisy %}Some of the times were taken while the machine was busy with other things.{% endif %}</p>
<div class="scroll"><table>
<tr>{% for name in header %}<th>{{ name }}</th>{% endfor %}</tr>
{% for cells in table %}
<tr>{% for cell in cells %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}
</table></div>
{% for origin in origins %}
<p>{{ origin }}</p>
{% endfor %}
</body>
</html>
"""


def chart(rows: Sequence[Row]) -> Figure:
    """Recall against state bytes (logarithmic), and tokens a second against the context (both logarithmic), a colour an arm."""
    figure = Figure(figsize=(11.0, 4.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    recall = [row for row in rows if row["panel"] == "recall"]
    generation = [row for row in rows if row["panel"] == "generation"]
    _lines(left, recall, "state_bytes", "accuracy", "mean")
    _lines(right, generation, "context", "tokens_per_second", "median")
    for chance in {row["chance"] for row in recall}:
        left.axhline(chance, color="#777777", linewidth=1, linestyle=":", zorder=0)
        left.annotate("guessing among the values", (0, chance), (4, -10), ("axes fraction", "data"), "offset points")
    left.set(xscale="log", ylim=(-0.02, 1.02), xlabel="state of one sequence (bytes)", ylabel="recall accuracy")
    contexts = sorted({row["context"] for row in generation})
    left.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    left.xaxis.set_major_formatter(lambda x, _: f"{x:,.0f}")
    left.minorticks_off()
    right.set(xscale="log", yscale="log", xlabel="context (tokens)", ylabel="tokens a second")
    right.set_xticks(contexts, [f"{n:,}" for n in contexts])
    right.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5, 7)))
    right.minorticks_off()
    right.yaxis.set_major_formatter(lambda y, _: f"{y:,.4g}")
    for axes in (left, right):
        axes.grid(color="#e6e6e6", linewidth=0.7)
        axes.set_axisbelow(True)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    figure.legend(*right.get_legend_handles_labels(), loc="outside upper center", ncols=5, frameon=False)
    return figure


def _lines(axes: Axes, rows: Sequence[Row], x: str, y: str, middle: str) -> None:
    for name, arm in ARMS.items():
        points = sorted((row for row in rows if row["arm"] == name), key=lambda row: float(row[x]))
        at, ends = [row[x] for row in points], [row[y] for row in points]
        spread = [[end[middle] - end["low"] for end in ends], [end["high"] - end[middle] for end in ends]]
        axes.errorbar(
            at,
            [end[middle] for end in ends],
            spread,
            color=arm.color,
            marker=arm.marker,
            markersize=5,
            linewidth=1.3,
            capsize=2,
            label=name,
        )


def origin_of(row: Row) -> str:
    """Where a row's figures are from, in a line."""
    machine = row["machine"]
    place = f"{machine['cpu']} ({machine['fingerprint']}), {machine['threads']} threads"
    panel = {"recall": "Recall", "generation": "Generation"}[row["panel"]]
    return f"{panel}: {place}, commit {row['commit'][:12]}: {row['command']}"


def write_chart(rows: Sequence[Row], path: Path) -> None:
    """Writes the page `path` with ending .html, which needs nothing beside itself, and the picture with ending .png."""
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "assay", "font.size": 9}):
        figure, drawn = chart(rows), io.StringIO()
        figure.savefig(drawn, format="svg", metadata={"Date": None, "Creator": None})
        with atomic_file(path.with_suffix(".png")) as temporary:
            figure.savefig(temporary, format="png", dpi=160)
    page = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(PAGE)
    text = page.render(
        title="Sequence mixers: what a state recalls, and how fast one generates from it",
        picture=base64.b64encode(drawn.getvalue().encode()).decode(),
        noisy=any(row.get("noisy", False) for row in rows),
        header=("arm", "state set by", "state, bytes", "context", "recall accuracy", "tokens a second"),
        table=[_cells(row) for row in rows],
        origins=list(dict.fromkeys(origin_of(row) for row in rows)),
    )
    with atomic_file(path.with_suffix(".html")) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _cells(row: Row) -> tuple[str, ...]:
    recall = row["panel"] == "recall"
    found = row["accuracy"] if recall else row["tokens_per_second"]
    text = f"{found['mean' if recall else 'median']:.4g} [{found['low']:.4g}, {found['high']:.4g}]"
    context = row["sizes"]["length"] if recall else row["context"]
    knob = "-" if row["knob"] is None else f"{row['knob']} {row['setting']}"
    return (row["arm"], knob, f"{row['state_bytes']:,}", f"{context:,}", *((text, "") if recall else ("", text)))


# --------------------------------------------------------------------------------------------------------------------- main


def merged(rows: Sequence[Row]) -> list[Row]:
    """The last row of each point, in the order of the panels, contexts, arms and settings."""
    newest = {(row["panel"], row["arm"], row["setting"], row.get("context")): row for row in rows}
    order = [*ARMS]
    return sorted(newest.values(), key=lambda r: (r["panel"] != "recall", r.get("context", 0), order.index(r["arm"])))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--panel", choices=("recall", "generation"), default=None, help="this panel alone")
    parser.add_argument(
        "--arms", nargs="+", choices=ARMS, default=list(ARMS), help="train these alone (generation interleaves all)"
    )
    parser.add_argument("--out", type=Path, default=None, help="put the lines into this file too")
    parser.add_argument(
        "--chart", type=Path, default=None, help="write this page (.html) and the picture (.png) beside it"
    )
    parser.add_argument("--steps", type=int, default=None, help=f"training steps a model (default {Recall.steps})")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that everything runs")
    options = parser.parse_args()
    if options.chart is not None and options.chart.suffix not in (".html", ".png"):
        parser.error(f"argument --chart must end in .html or .png, got {options.chart}")
    if options.steps is not None and options.steps < 1:
        parser.error(f"argument --steps must be at least 1, got {options.steps}")
    recall, generation = QUICK if options.quick else (Recall(), Generation())
    if options.steps is not None:
        recall = replace(recall, steps=options.steps)
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
    place = here()
    origin: Row = {"machine": place.machine, "commit": place.commit, "command": " ".join(["python", *sys.argv])}

    rows = []
    if options.out is not None and options.out.exists():
        rows = [json.loads(line) for line in options.out.read_text(encoding="utf-8").splitlines()]
    panels: dict[str, Iterator[Row]] = {
        "recall": recall_rows(recall, options.arms),
        "generation": generation_rows(generation),
    }
    for row in itertools.chain(*(found for name, found in panels.items() if options.panel in (None, name))):
        rows.append(row | origin | {"created": datetime.now(UTC).isoformat(timespec="seconds")})
        print(json.dumps(rows[-1]), flush=True)
        if options.out is not None:  # as soon as it is there
            with options.out.open("a", encoding="utf-8") as file:
                file.write(json.dumps(rows[-1]) + "\n")
    rows = merged(rows)
    if options.out is not None:
        with atomic_file(options.out) as temporary:
            temporary.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    if options.chart is not None:
        write_chart(rows, options.chart)


if __name__ == "__main__":
    main()
