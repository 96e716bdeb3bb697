"""The papers' image backbones side by side: what is counted, what it takes, and what small ones of them learn.

    python benchmarks/backbones.py [--panel published|trained|scaling] [--out FILE] [--chart FILE.png] [--table] [--quick]

Published: a network or two of every paper in its published size, beside ResNet-18, ResNet-50, MobileNetV2 and ViT-S/16 of
transformers, all as they are built (random weights, float32, BatchNorm not folded, nothing compiled): parameters, MACs, bytes that
operators read and write, and milliseconds at one image and at sixteen, timed in turns. Behind them the rank correlation (Spearman) of each
count with the time of an image; its interval is a bootstrap over the networks, which are not drawn at random from anything: it says
how much the figure hangs on single ones of them. Networks of other sizes of image than 224 are timed at their own.

Trained: the small networks that the papers' experiments train, here all at 48 pixels and for as many steps, each at the best of the
same rates by crops that are kept for the choice. Accuracy is on crops of twelve photographs (chance: 8.3 %), three seeds, its
interval over photographs and seeds. They are not equal in MACs, which is why those and the time stand beside them: a more accurate
network that takes longer is not the better one. MPCViT's has scaling attention in all heads.

Scaling: what mixes the positions of a map with 96 channels, projections included: attention over the whole map (torch's fused
kernel), Swin's attention in windows of 7 x 7, Vim's scan in both directions. For each the exponent in the number of positions from
one size to the next, and where two of them cross, both with an interval over rounds.

One JSON line a row, with machine, commit and command. With `--out` a row takes the place of the same row in that file, and a network that
was trained already by the same commit is not trained again; `--table` prints the file's rows as Markdown; `--chart` draws them.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn

from assay.evidence.place import here
from assay.experiments.rates import Rate
from assay.experiments.vision import lowformer, mpcvit, ms_mlp, res_vmamba, simplenet, sret, swin, t2t_vit, vim, vovnet
from assay.experiments.vision.rivals import Logits, mobilenet, resnet
from assay.experiments.vision.training import SIZE, error_for_choice, judged, level
from assay.measure.clock import compare_many
from assay.measure.cost import count_cost
from assay.measure.stats import Interval, bootstrap, median_interval, positive_median
from assay.methods.core.vision.windows import ShiftedWindowAttention
from assay.methods.vision import build
from assay.methods.vision.sret import SReT
from assay.methods.vision.t2t_vit import T2TViT
from assay.methods.vision.vim import BiMamba
from assay.paths import atomic_file

Row = dict[str, Any]
Make = Callable[[], nn.Module]
COUNTS = ("macs", "bytes", "parameters")
WIDTH, HEADS, WINDOW = 96, 3, 7  # of the third panel: Swin-T's first stage


# ------------------------------------------------------------------------------------------------------------------ the networks


def vit_small() -> nn.Module:
    """ViT-S/16 of transformers, with torch's fused attention."""
    from transformers import ViTConfig, ViTForImageClassification

    shape: dict[str, Any] = {
        "hidden_size": 384,
        "num_attention_heads": 6,
        "intermediate_size": 1536,
        "num_labels": 1000,
        "attn_implementation": "sdpa",
    }
    return Logits(ViTForImageClassification(ViTConfig(**shape)))


NAMES = {
    "swin": ("swin_tiny_patch4_window7_224", "swin_mlp_tiny_c24_patch4_window8_256"),
    "t2t_vit": ("t2t_vit_7", "t2t_vit_14"),
    "vim": ("vim_tiny_patch16_224", "vim_small_patch16_224"),
    "res_vmamba": ("vssm_tiny", "res_vmamba_tiny"),
    "ms_mlp": ("ms_mlp_tiny",),
    "sret": ("sret_t", "sret_s"),
    "simplenet": ("simplenetv1_small_m1_05", "simplenetv1_5m_m1", "simplenetv1_9m_m2"),
    "vovnet": ("ese_vovnet19b_slim_dw", "vovnet27_slim", "vovnet39"),
    "lowformer": ("lowformer_b0", "lowformer_b1", "lowformer_b3"),
    "mpcvit": ("mpcvit_9_12_64",),
}
RIVALS: dict[str, Make] = {
    "resnet18": resnet,
    "resnet50": vovnet.resnet50,
    "mobilenet_v2": mobilenet,
    "vit_small_16": vit_small,
}
SIDES = {"swin_mlp_tiny_c24_patch4_window8_256": 256, "mpcvit_9_12_64": 64}  # of the images, where it is not 224


def published() -> dict[str, tuple[str, Make]]:
    """The networks of the first panel: paper ("" for what the papers are held against) and how to make it, by name."""
    ours = {name: (paper, partial(build, name)) for paper, names in NAMES.items() for name in names}
    return ours | {name: ("", make) for name, make in RIVALS.items()}


def small() -> dict[str, Make]:
    """The networks of the second panel, for grey images of 48 pixels and twelve classes."""
    t2t = {**t2t_vit.SMALL, "tokens_type": "performer", "input_size": SIZE}
    return {
        "swin": partial(swin.network, "shift"),
        "t2t_vit": partial(T2TViT, **t2t),
        "vim": partial(vim.network, "both ways"),
        "res_vmamba": partial(res_vmamba.network, "learned"),
        "ms_mlp": partial(ms_mlp.network, "ms"),
        "sret": partial(SReT, **{**sret.SETTINGS["sliced"], "input_size": SIZE}),
        "simplenet": simplenet.ARMS["simplenet"],
        "vovnet": vovnet.ARMS["osa"],
        "lowformer": lowformer.ARMS["lowformer"],
        "mpcvit": partial(mpcvit.network, "scaling"),
        "resnet": simplenet.ARMS["resnet"],
        "mobilenet_v2": simplenet.ARMS["mobilenet"],
        "vision transformer": partial(vim.network, "attention"),
    }


@dataclass(frozen=True)
class Sizes:
    """What a run does. No new round begins after `seconds`; `sides` are those of the third panel's maps."""

    models: tuple[str, ...] | None = None  # of the first panel; None: all
    batches: tuple[int, ...] = (1, 16)
    rounds: int = 12
    seconds: float = 150.0
    steps: int = 100
    rates: tuple[float, ...] = (1e-3, 3e-3, 1e-2, 3e-2)
    seeds: tuple[int, ...] = (1, 2, 3)
    sides: tuple[int, ...] = (14, 28, 56, 112)


QUICK = Sizes(
    ("simplenetv1_small_m1_05", "mpcvit_9_12_64", "mobilenet_v2"), (1,), 3, 5.0, 2, (1e-3, 3e-3, 1e-2), (1, 2), (7, 14)
)


# -------------------------------------------------------------------------------------------------------------------- published


def counts(make: Make, side: int, channels: int) -> Row:
    """Parameters, bytes of weights, MACs and bytes that operators move for one image; nothing is computed."""
    with torch.device("meta"):
        cost = count_cost(make().eval(), torch.zeros(1, channels, side, side))
    return {"parameters": cost.params, "weight_bytes": cost.weight_bytes, "macs": cost.macs, "bytes": cost.bytes}


def timed(models: dict[str, nn.Module], images: Callable[[str], Tensor], sizes: Sizes, batch: int) -> dict[str, Row]:
    """Milliseconds an image of every network, timed in turns."""
    runs = {name: partial(_run, model, images(name)) for name, model in models.items()}
    timings = compare_many(runs, rounds=sizes.rounds, max_seconds=sizes.seconds)
    found = {}
    for name, seconds in timings.seconds.items():
        each = positive_median([1000 * s / batch for s in seconds])
        found[name] = {"batch": batch, "milliseconds": _told(each), "noisy": timings.noisy}
    return found


@torch.inference_mode()
def _run(model: nn.Module, images: Tensor) -> Tensor:
    out: Tensor = model(images)
    return out


def _told(found: Interval) -> Row:
    return {"median": found.median, "low": found.low, "high": found.high, "n": found.n}


def published_rows(sizes: Sizes) -> Iterator[Row]:
    """A row for each network and batch, and behind those of a batch a row for each count's rank correlation with the time."""
    made = {name: each for name, each in published().items() if sizes.models is None or name in sizes.models}
    side = {name: SIDES.get(name, 224) for name in made}
    torch.manual_seed(0)
    models = {name: make().eval() for name, (_, make) in made.items()}
    costs = {name: counts(make, side[name], 3) for name, (_, make) in made.items()}
    for batch in sizes.batches:
        times = timed(models, lambda name, batch=batch: vim.picture(side[name], batch), sizes, batch)  # type: ignore[misc]
        for name, (paper, _) in made.items():
            yield {"panel": "published", "model": name, "paper": paper, "side": side[name]} | costs[name] | times[name]
        milliseconds = [times[name]["milliseconds"]["median"] for name in made]
        for count in COUNTS:
            pairs = np.array([[costs[name][count] for name in made], milliseconds]).T
            found = _told(bootstrap(pairs, rank_correlation))
            yield {"panel": "published", "model": "", "count": count, "batch": batch, "rank_correlation": found}


def rank_correlation(pairs: np.ndarray, axis: int = 1) -> np.ndarray:
    """Spearman's, of each table of pairs (tables, n, 2); equal values share their rank; 0 where all are equal."""
    assert axis == 1
    above = pairs[:, :, None] > pairs[:, None]
    same = pairs[:, :, None] == pairs[:, None]
    ranks = (above + 0.5 * same).sum(2)
    ranks = ranks - ranks.mean(1, keepdims=True)
    scale = np.sqrt((ranks**2).sum(1).prod(1))
    product: np.ndarray = ranks.prod(2).sum(1)
    return np.divide(product, scale, out=np.zeros_like(product), where=scale > 0)


# ---------------------------------------------------------------------------------------------------------------------- trained


def trained_row(name: str, sizes: Sizes) -> Row:
    """One small network, trained on one thread: the rate by crops for choices, then the accuracy of each seed."""
    torch.set_num_threads(1)
    make = small()[name]
    errors = {rate: error_for_choice(make, rate, sizes.steps) for rate in sizes.rates}
    best = min(errors, key=lambda rate: errors[rate])
    shown = judged(make, Rate(best, sizes.rates), sizes.steps, seeds=sizes.seeds)
    mean, low, high = level(shown)
    return {
        "panel": "trained",
        "model": name,
        "accuracy": {"mean": mean, "low": low, "high": high, "n": shown.right.size},
        "rate": best,
        "edge": best in (sizes.rates[0], sizes.rates[-1]),
        "errors": {f"{rate:g}": error for rate, error in errors.items()},
        "steps": sizes.steps,
    } | counts(make, SIZE, 1)


def trained_rows(sizes: Sizes, known: dict[str, Row]) -> Iterator[Row]:
    """Trains those that are not known, as many at a time as torch has threads here, and then times all of them."""
    rows = dict(known)
    names = [name for name in small() if name not in known]
    if names:
        with ProcessPoolExecutor(
            min(torch.get_num_threads(), len(names)), mp_context=multiprocessing.get_context("spawn")
        ) as pool:
            found = pool.map(trained_row, names, [sizes] * len(names))
            for row in track(found, "trainings", total=len(names), console=Console(stderr=True)):
                rows[row["model"]] = row
                yield row
    models = {name: make().eval() for name, make in small().items()}
    for batch in sizes.batches:
        times = timed(models, lambda _, batch=batch: torch.rand(batch, 1, SIZE, SIZE), sizes, batch)  # type: ignore[misc]
        for name in models:
            rows[name] = rows[name] | {
                f"milliseconds_{batch}": times[name]["milliseconds"],
                "noisy": times[name]["noisy"],
            }
    yield from rows.values()


# ---------------------------------------------------------------------------------------------------------------------- scaling


class Whole(nn.Module):
    """Attention over all positions of a map (B, H, W, C), by torch's fused kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(1, 2)
        out: Tensor = self.attention(tokens, tokens, tokens, need_weights=False)[0]
        return out


class Scan(nn.Module):
    """Vim's mixer over the positions of a map, row by row."""

    def __init__(self) -> None:
        super().__init__()
        self.mixer = BiMamba(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.mixer(x.flatten(1, 2))
        return out


MIXERS: dict[str, Make] = {
    "whole map": Whole,
    "windows": partial(ShiftedWindowAttention, WIDTH, WINDOW, HEADS, shift=WINDOW // 2),
    "scan": Scan,
}


def scaling_rows(sizes: Sizes) -> Iterator[Row]:
    """Times of every mixer and size in the same rounds, then exponents and crossings."""
    torch.manual_seed(0)
    mixers = {name: make().eval() for name, make in MIXERS.items()}
    runs = {
        (name, side): partial(_run, mixer, torch.randn(1, side, side, WIDTH))
        for name, mixer in mixers.items()
        for side in sizes.sides
    }
    labelled = {f"{name} {side}": run for (name, side), run in runs.items()}
    timings = compare_many(labelled, rounds=sizes.rounds, max_seconds=sizes.seconds)
    seconds = {(name, side): np.array(timings.seconds[f"{name} {side}"]) for name, side in runs}
    place = {"panel": "scaling", "noisy": timings.noisy}
    for (name, side), found in seconds.items():
        yield place | {
            "model": name,
            "tokens": side**2,
            "milliseconds": _told(positive_median((1000 * found).tolist())),
        }
    for name in mixers:
        for a, b in zip(sizes.sides, sizes.sides[1:], strict=False):
            slope = median_interval(np.log(seconds[name, b] / seconds[name, a]) / np.log((b / a) ** 2))
            yield place | {"model": name, "tokens": a**2, "to": b**2, "exponent": _told(slope)}
    for name in ("windows", "scan"):
        tables = (
            [[seconds[arm, side][i] for side in sizes.sides] for arm in ("whole map", name)] for i in range(len(found))
        )
        at = [crossing([side**2 for side in sizes.sides], *table) for table in tables]
        crossed = [each for each in at if each is not None]
        row = place | {"model": name, "crosses": "whole map", "rounds": len(at), "rounds_that_cross": len(crossed)}
        yield row | ({"at": _told(positive_median(crossed))} if len(crossed) > max(1, len(at) // 2) else {})


def crossing(tokens: Sequence[int], one: Sequence[float], other: Sequence[float]) -> float | None:
    """Where `other` becomes the faster, for good: interpolated between two sizes, on logarithms. None where it does not."""
    gap = np.log(np.asarray(one) / np.asarray(other))
    slower = np.flatnonzero(gap <= 0)
    if not len(slower) or slower[-1] == len(gap) - 1:
        return None
    i = slower[-1]
    share = -gap[i] / (gap[i + 1] - gap[i])
    return float(np.exp(np.log(tokens[i]) + share * np.log(tokens[i + 1] / tokens[i])))


# --------------------------------------------------------------------------------------------------------------- table and chart


def table(rows: Sequence[Row]) -> str:
    """The rows as Markdown."""
    lines = [
        "| network | paper | parameters | MACs | bytes moved | ms, one image | ms an image, of sixteen |",
        "| --- " * 7 + "|",
    ]
    published = [row for row in rows if row["panel"] == "published"]
    for name in dict.fromkeys(row["model"] for row in published if row["model"]):
        of = {row["batch"]: row for row in published if row["model"] == name}
        row = next(iter(of.values()))
        cells = (
            name,
            row["paper"] or "-",
            f"{row['parameters'] / 1e6:.1f} M",
            f"{row['macs'] / 1e9:.2f} G",
            f"{row['bytes'] / 1e6:,.0f} MB",
        )
        lines.append(_line(*cells, *(_ms(of[batch]["milliseconds"]) if batch in of else "-" for batch in (1, 16))))
    lines += [
        "",
        "| count | rank correlation with the time of one image | of an image of sixteen |",
        "| --- | --- | --- |",
    ]
    for count in COUNTS:
        of = {row["batch"]: row["rank_correlation"] for row in published if row.get("count") == count}
        spans = (
            f"{of[batch]['median']:.2f} ({of[batch]['low']:.2f} to {of[batch]['high']:.2f})" if batch in of else "-"
            for batch in (1, 16)
        )
        lines.append(f"| {count} | {' | '.join(spans)} |")
    lines += [
        "",
        "| small network | accuracy | MACs | bytes moved | ms, one image | ms an image, of sixteen |",
        "| --- " * 6 + "|",
    ]
    for row in (row for row in rows if row["panel"] == "trained"):
        found, ms = (
            row["accuracy"],
            [_ms(row[key]) if (key := f"milliseconds_{batch}") in row else "-" for batch in (1, 16)],
        )
        accuracy = f"{found['mean']:.0f} % ({found['low']:.0f} to {found['high']:.0f})"
        lines.append(_line(row["model"], accuracy, f"{row['macs'] / 1e6:.2f} M", f"{row['bytes'] / 1e6:.1f} MB", *ms))
    lines += ["", "| mixer | positions | ms | exponent to the next size |", "| --- | --- | --- | --- |"]
    scaling = [row for row in rows if row["panel"] == "scaling"]
    slopes = {(row["model"], row["tokens"]): row["exponent"] for row in scaling if "exponent" in row}
    for row in (row for row in scaling if "milliseconds" in row):
        slope = slopes.get((row["model"], row["tokens"]))
        told = "-" if slope is None else f"{slope['median']:.2f} ({slope['low']:.2f} to {slope['high']:.2f})"
        lines.append(f"| {row['model']} | {row['tokens']:,} | {_ms(row['milliseconds'])} | {told} |")
    for row in (row for row in scaling if "crosses" in row):
        where = (
            f"at {row['at']['median']:,.0f} positions ({row['at']['low']:,.0f} to {row['at']['high']:,.0f})"
            if "at" in row
            else "nowhere here"
        )
        lines.append(
            f"\n{row['model']} become faster than the {row['crosses']} {where}, in {row['rounds_that_cross']} of {row['rounds']} rounds."
        )
    return "\n".join(lines)


def _line(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def _ms(found: Row) -> str:
    return f"{found['median']:.3g} ({found['low']:.3g} to {found['high']:.3g})"


def chart(rows: Sequence[Row]) -> Figure:
    """MACs against milliseconds of the published networks, accuracy against milliseconds of the small ones, times over positions."""
    figure = Figure(figsize=(13.5, 4.6), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    for row in rows:
        if row["panel"] == "published" and row["model"] and row["batch"] == 16:
            _point(
                left,
                row["macs"] / 1e9,
                row["milliseconds"]["median"],
                row["model"],
                "#0072b2" if row["paper"] else "#000000",
            )
        if row["panel"] == "trained" and "milliseconds_16" in row:
            ours = row["model"] in NAMES
            _point(
                middle,
                row["milliseconds_16"]["median"],
                row["accuracy"]["mean"],
                row["model"],
                "#0072b2" if ours else "#000000",
            )
    left.set(
        xscale="log", yscale="log", xlabel="MACs of an image (billions)", ylabel="milliseconds an image, of sixteen"
    )
    middle.set(xscale="log", xlabel="milliseconds an image, of sixteen", ylabel="accuracy of small networks (%)")
    for name in MIXERS:
        points = [row for row in rows if row["panel"] == "scaling" and row["model"] == name and "milliseconds" in row]
        right.plot(
            [row["tokens"] for row in points], [row["milliseconds"]["median"] for row in points], marker="o", label=name
        )
    right.set(xscale="log", yscale="log", xlabel="positions of a map", ylabel="milliseconds")
    right.legend(frameon=False)
    for axes in (left, middle, right):
        axes.grid(color="#e6e6e6", linewidth=0.7)
        axes.set_axisbelow(True)
    return figure


def _point(axes: Any, x: float, y: float, name: str, color: str) -> None:
    axes.plot(x, y, "o", color=color, markersize=4)
    axes.annotate(name, (x, y), (3, 2), textcoords="offset points", fontsize=6)


# ------------------------------------------------------------------------------------------------------------------------- main


def key_of(row: Row) -> tuple[Any, ...]:
    """What a later row takes the place of."""
    return tuple(row.get(name) for name in ("panel", "model", "batch", "count", "tokens", "to", "crosses"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--panel", choices=("published", "trained", "scaling"), default=None, help="this panel alone")
    parser.add_argument("--out", type=Path, default=None, help="keep the lines in this file")
    parser.add_argument("--chart", type=Path, default=None, help="draw the rows into this .png")
    parser.add_argument("--table", action="store_true", help="print the rows of --out as Markdown, and measure nothing")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that everything runs")
    options = parser.parse_args()
    if options.chart is not None and options.chart.suffix != ".png":
        parser.error(f"argument --chart must end in .png, got {options.chart}")
    rows: dict[tuple[Any, ...], Row] = {}
    if options.out is not None and options.out.exists():
        rows = {key_of(row): row for row in map(json.loads, options.out.read_text(encoding="utf-8").splitlines())}
    if options.table:
        print(table(list(rows.values())))
    else:
        measure(QUICK if options.quick else Sizes(), options, rows)
    if options.chart is not None:
        with atomic_file(options.chart) as temporary:
            chart(list(rows.values())).savefig(temporary, format="png", dpi=160)


def measure(sizes: Sizes, options: argparse.Namespace, rows: dict[tuple[Any, ...], Row]) -> None:
    """Measures the panels that are asked for, into `rows` and the file."""
    place = here()
    origin: Row = {"machine": place.machine, "commit": place.commit, "command": " ".join(["python", *sys.argv])}
    known = {
        row["model"]: row for row in rows.values()
        if row["panel"] == "trained" and row["commit"] == place.commit and row["steps"] == sizes.steps
    }  # fmt: skip
    panels = {
        "published": partial(published_rows, sizes),
        "trained": partial(trained_rows, sizes, known),
        "scaling": partial(scaling_rows, sizes),
    }
    for name, found in panels.items():
        if options.panel not in (None, name):
            continue
        for row in found():
            row = row | origin | {"created": datetime.now(UTC).isoformat(timespec="seconds")}
            rows[key_of(row)] = row
            print(json.dumps(row), flush=True)
            if options.out is not None:  # as soon as it is there
                options.out.parent.mkdir(parents=True, exist_ok=True)
                with atomic_file(options.out) as temporary:
                    temporary.write_text("".join(json.dumps(each) + "\n" for each in rows.values()), encoding="utf-8")


if __name__ == "__main__":
    main()
