"""Plots of a profile: the waterline and the efficiency gap, as matplotlib figures, SVG text and PNG files."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from assay import checks
from assay.measure.profile import Phase, Profile, Row
from assay.measure.roofline import GapPoint
from assay.paths import atomic_file

if TYPE_CHECKING:
    from matplotlib.figure import Figure

INK, WATER, DRY, WET = "#1f2937", "#2563eb", "#047857", "#b45309"
COLOURS = {"linear": "#1d4ed8", "attention": "#b45309", "other": "#6b7280"}
NAMED = 8  # bars of a waterline that are named
LOWEST = 1e-2  # operations per byte drawn for work without MACs, on the log axis


def waterline_figure(profile: Profile, phase: Phase) -> Figure:
    """Bars of operational intensity, as wide as their share of the phase's time; bars that end under water wait for memory.

    Raises ValueError for a phase that was not profiled.
    """
    _check(profile, phase)
    figure = waterline_bars(
        profile.waterline(phase), profile.calibration.ridge, label=f"share of the time, {phase}", size=(9.0, 3.8)
    )
    figure.axes[0].set_title(f"Waterline, {phase}: under the blue line memory is the limit", fontsize=10, loc="left")
    return figure


def waterline_bars(
    bars: Sequence[Mapping[str, Any]], ridge: Callable[[str], float], *, label: str, size: tuple[float, float]
) -> Figure:
    """The waterline of `bars`, as `Profile.waterline` returns them, with the ridge of each dtype; `size` in inches.

    The widest bars are numbered and listed by number below the plot, so that no name covers another.
    """
    figure, axes = bare_axes(*size)
    named = [bar for bar in sorted(bars, key=lambda bar: -bar["share"])[:NAMED] if bar["share"] > 0.04]
    named.sort(key=bars.index)
    left, top = 0.0, 1.0
    for bar in bars:
        share, height, water = bar["share"], max(bar["intensity"], LOWEST), ridge(bar["dtype"])
        colour = DRY if height >= water else WET
        axes.bar(left, height, share, align="edge", color=colour, edgecolor="white", linewidth=0.4)
        axes.plot([left, left + share], [water, water], color=WATER, linewidth=1.5)
        if bar in named:
            number = str(named.index(bar) + 1)
            axes.text(left + share / 2, height * 1.1, number, ha="center", va="bottom", fontsize=8)
        left, top = left + share, max(top, height, water)
    axes.set(yscale="log", xlim=(0, max(left, 1e-9)), xlabel=label, ylabel="operations per byte")
    axes.set_ylim(LOWEST / 1.5, 6 * top)
    if named:
        figure.legend(
            [axes.plot([], [], " ")[0]] * len(named),
            [f"{i} {_short(bar['name'])} ({100 * bar['share']:.0f} %)" for i, bar in enumerate(named, 1)],
            loc="outside lower center",
            ncols=2,
            fontsize=8,
            frameon=False,
            handlelength=0,
            handletextpad=0,
        )
    return figure


def gap_figure(profile: Profile, phase: Phase, *, most: int = 14) -> Figure:
    """The groups that take longest: measured time, and the part of it that this machine would need at best.

    Raises ValueError for a phase that was not profiled or most < 1, TypeError if `most` is not a whole number.
    """
    _check(profile, phase)
    most = checks.whole("most", most, low=1)
    rows = sorted(profile.grouped(phase), key=lambda row: row.seconds, reverse=True)[:most][::-1]
    figure, axes = bare_axes(9.0, 0.9 + 0.28 * len(rows))
    names = [_label(row) for row in rows]
    axes.barh(names, [1e3 * row.seconds for row in rows], color=[COLOURS[row.kind] for row in rows], alpha=0.45)
    axes.barh(
        names,
        [1e3 * min(row.attainable_seconds, row.seconds) for row in rows],
        color=[COLOURS[row.kind] for row in rows],
    )
    for place, row in enumerate(rows):
        share = None if profile.void else row.roofline_share
        axes.text(
            1e3 * row.seconds, place, " void" if share is None else f" {100 * share:.0f} %", va="center", fontsize=7
        )
    axes.set_xlabel("milliseconds; dark: attainable, light: the gap, number: attainable over measured")
    axes.set_title(f"Efficiency gap, {phase}", fontsize=10, loc="left")
    axes.tick_params(axis="y", labelsize=7)
    return figure


def gap_points_figure(points: Sequence[GapPoint]) -> Figure:
    """Efficiency-gap plot of whole models: accuracy over latency, ideal and measured latency joined by a line.

    Raises ValueError for no points.
    """
    if not points:
        raise ValueError("points must hold at least one model, got none")
    figure, axes = bare_axes(6.5, 4.2)
    for point in points:
        axes.plot([point.ideal_seconds, point.seconds], [point.accuracy] * 2, color=INK, linewidth=0.8)
        axes.plot(point.ideal_seconds, point.accuracy, "o", color="white", markeredgecolor=INK)
        axes.plot(point.seconds, point.accuracy, "o", color=INK)
        axes.annotate(
            f"{point.name} ({point.gap:.1f}x)",
            (point.seconds, point.accuracy),
            fontsize=8,
            xytext=(5, 4),
            textcoords="offset points",
        )
    axes.set(xscale="log", xlabel="seconds: ideal (hollow) to measured (filled)", ylabel="accuracy")
    return figure


def svg(figure: Figure) -> str:
    """The figure as one <svg> element, to be embedded in an HTML page."""
    out = io.StringIO()
    figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
    text = out.getvalue()
    return text[text.index("<svg") :]


def save_png(figures: Sequence[Figure], path: Path | str) -> None:
    """All figures below one another in one PNG file, written completely or not at all. Raises ValueError for no figures."""
    import numpy as np
    from matplotlib import image
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    if not figures:
        raise ValueError("figures must hold at least one, got none")
    pictures = []
    for figure in figures:
        figure.set_dpi(130)
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        pictures.append(np.asarray(canvas.buffer_rgba()))
    width = max(picture.shape[1] for picture in pictures)
    padded = [np.pad(p, ((0, 0), (0, width - p.shape[1]), (0, 0)), constant_values=255) for p in pictures]
    with atomic_file(path) as temporary:
        image.imsave(temporary, np.concatenate(padded), format="png")


def bare_axes(width: float, height: float) -> tuple[Figure, Any]:
    """An empty figure of that size in inches, without a frame."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _check(profile: Profile, phase: str) -> None:
    checks.choice("phase", phase, list(profile.seconds))


def _short(name: str) -> str:
    """The end of a module's path that tells it from others, without layer numbers."""
    parts = [part for part in name.split(".") if part not in ("*", "model", "")]
    return ".".join(parts[-2:]) or name or "(model)"


def _label(row: Row) -> str:
    name = row.name or "(model)"
    return f"{name} x{row.modules}" if row.modules > 1 else name
