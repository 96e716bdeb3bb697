"""The report of a tuning run: one HTML file, plots included, that is readable offline and on a phone."""

from __future__ import annotations

from importlib import resources
from typing import Any

import numpy as np

from assay.measure.plots import bare_axes, svg, waterline_bars
from assay.tuner.outcome import Outcome, Row, base_row, front
from assay.tuner.words import close_words, eval_words, papers_words, quality_words, saved_words, tried_words
from assay.tuner.work import UNITS

INK, BAD, GOOD, FREE = "#1f2937", "#b45309", "#047857", "#6b7280"
WIDE = 4.6  # inches of a plot: text of 9 points in it stays readable when the page is 390 pixels wide


def render(outcome: Outcome, document: dict[str, Any], after: dict[str, Any], limits: Any) -> str:
    """The whole page. `after` is the profile of the best recipe, empty where there is none; `limits` are the machine's rates."""
    from jinja2 import Environment

    template = (resources.files("assay.tuner") / "templates" / "report.html").read_text(encoding="utf-8")
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    rates = {name: f"{value / 1e9:,.0f} GOP/s" for name, value in limits.peak_flops.items()}
    return environment.from_string(template).render(
        d=document,
        rows=[_row(outcome, row) for row in outcome.rows],
        words={
            "baseline": outcome.baseline.recipe.words(),
            "free": outcome.free.recipe.words(),
            "best": outcome.best.recipe.words(),
        },
        quality=quality_words(document["quality"], outcome.max_drop),
        close=close_words(document["quality"]),
        scores=eval_words(document["quality"]["eval"], outcome.max_drop),
        papers=papers_words(document["papers"]),
        saved=saved_words(document),
        tried=[tried_words(one, outcome.max_drop) for one in document["tried"] if one["verdict"] != "holds"],
        unfit=unfit(outcome),
        apart=outcome.final.get("apart", []),
        kinds=kinds(outcome, after["kinds"]),
        pareto=pareto_plot(outcome),
        before=waterline_plot(outcome.survey["waterline"], "as loaded", limits),
        after=waterline_plot(after["waterline"], "best", limits),
        predicted=predicted_plot(outcome),
        rates=rates,
        read=f"{limits.read_bandwidth / 1e9:.1f} GB/s",
        folder=str(outcome.artefact),
    )


def unfit(outcome: Outcome) -> dict[str, str]:
    """Why transforms do not fit, except those that ran anyway: the survey asks in the faster dtype, in which `dtype` has nothing to do."""
    ran = {step.transform for row in outcome.rows if row.status in ("ok", "equivalent") for step in row.recipe.steps}
    return {name: reason for name, reason in outcome.survey["unfit"].items() if name not in ran}


def kinds(outcome: Outcome, after: dict[str, Any]) -> list[dict[str, Any]]:
    """Cost by kind of work, as loaded and for the best recipe, with a total: milliseconds that add up to the page's figures.

    For goals that are not times, the profiles' shares in per cent. `after` is None if the best recipe could not be profiled.
    """
    found = {name: {when: 1e3 * cost for when, cost in kind.items()} for name, kind in outcome.kinds().items()}
    if not found:
        for when, profile in (("before", outcome.survey["kinds"]), ("after", after)):
            whole = sum(kind["seconds"] for kind in profile.values())
            for name, kind in profile.items():
                found.setdefault(name, {})[when] = 100 * kind["seconds"] / whole if whole > 0 else 0.0
    shown = {name: kind for name, kind in found.items() if any(cost > 0 for cost in kind.values())}
    shown["total"] = {when: sum(kind.get(when, 0.0) for kind in shown.values()) for when in ("before", "after")}
    return [
        {"name": name, "before": kind.get("before", 0.0), "after": kind.get("after", 0.0) if after else None}
        for name, kind in shown.items()
    ]


def pareto_plot(outcome: Outcome) -> str:
    """Every candidate: the goal's figure against the loss of quality, with the Pareto front; empty for a single point."""
    unit = UNITS[outcome.settings.goal]
    done = [row for row in outcome.rows if row.cost is not None and row.drop is not None and np.isfinite(row.drop)]
    if len(done) < 2:
        return ""
    figure, axes = bare_axes(WIDE, 3.6)
    for kind, colour in {"baseline": INK, "free": FREE, "candidate": GOOD}.items():
        rows = [row for row in done if row.kind == kind]
        if not rows:
            continue
        values = [100 * (row.drop or 0) for row in rows]
        lows = [row.drop if row.drop_low is None else row.drop_low for row in rows]  # a single window has no interval
        highs = [row.drop if row.drop_high is None else row.drop_high for row in rows]
        spread = [[max(value - 100 * (low or 0), 0) for value, low in zip(values, lows, strict=True)]]
        spread.append([max(100 * (high or 0) - value, 0) for value, high in zip(values, highs, strict=True)])
        costs = [unit.show(row.cost or 0) for row in rows]
        axes.errorbar(costs, values, yerr=spread, fmt="o", color=colour, label=kind, capsize=2)
    line = front(done)
    axes.plot([unit.show(r.cost or 0) for r in line], [100 * (r.drop or 0) for r in line], color=INK, lw=0.8, ls=":")
    axes.axhline(100 * outcome.max_drop, color=BAD, lw=1, label=f"allowed loss {100 * outcome.max_drop:g} %")
    if max(abs(row.drop or 0) for row in done) > 5 * max(outcome.max_drop, 0.002):
        from matplotlib.ticker import NullLocator, SymmetricalLogLocator

        near = max(100 * outcome.max_drop, 0.2)
        axes.set_yscale("symlog", linthresh=near)
        axes.yaxis.set_major_locator(SymmetricalLogLocator(base=10, linthresh=near))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:.3g}")
        highest = max(max(row.drop or 0, row.drop_high or 0) for row in done)
        axes.set_ylim(axes.get_ylim()[0], 100 * max(highest, outcome.max_drop) * 2)
    _few_ticks(axes.xaxis, "linear")
    axes.set_xlabel(unit.name + (" (more is better)" if unit.higher_is_better else " (less is better)"))
    axes.set_ylabel("perplexity increase, %")
    figure.legend(frameon=False, loc="outside upper left", ncols=4, fontsize=8, columnspacing=1, handletextpad=0.3)
    return svg(figure)


def predicted_plot(outcome: Outcome) -> str:
    """Predicted against measured time, both over the base's: on the diagonal, the roofline was right; empty for a single point."""
    base = base_row(outcome.rows)
    rows = [r for r in outcome.rows if r.predicted is not None and r.cost is not None]
    if len(rows) < 2 or base is None or not base.cost:
        return ""
    figure, axes = bare_axes(3.8, 3.8)
    x, y = [r.predicted or 0 for r in rows], [(r.cost or 0) / base.cost for r in rows]
    low, high = 0.8 * min([*x, *y]), 1.2 * max([*x, *y])
    axes.plot([low, high], [low, high], color=FREE, lw=0.8)
    axes.scatter(x, y, color=GOOD)
    axes.set(xscale="log", yscale="log", xlim=(low, high), ylim=(low, high))
    for axis in (axes.xaxis, axes.yaxis):
        _few_ticks(axis, "log")
    axes.set_xlabel("predicted time / base (roofline)")
    axes.set_ylabel("measured time / base")
    return svg(figure)


def waterline_plot(bars: list[dict[str, Any]], title: str, limits: Any) -> str:
    """The waterline of a profile; empty without bars."""
    if not bars:
        return ""

    def ridge(dtype: str) -> float:
        return float(limits.peak_flops.get(dtype, limits.peak_flops["float32"]) / limits.read_bandwidth)

    return svg(waterline_bars(bars, ridge, label=f"share of time, {title[:50]}", size=(WIDE, 3.2)))


def _row(outcome: Outcome, row: Row) -> dict[str, Any]:
    unit = UNITS[outcome.settings.goal]
    shown: dict[str, Any] = {"kind": row.kind, "words": row.recipe.words(), "label": row.label(), "status": row.status}
    shown |= {"error": row.error, "seconds": row.seconds, "best": row is outcome.best}
    shown["value"] = "" if row.cost is None else f"{unit.show(row.cost):,.1f}"
    shown["drop"] = "" if row.drop is None else f"{100 * row.drop:+.2f} %"
    known = row.drop_low is not None and row.drop_high is not None
    shown["interval"] = f"{100 * (row.drop_low or 0):+.2f} to {100 * (row.drop_high or 0):+.2f}" if known else ""
    shown["predicted"] = "" if not row.predicted else f"{1 / row.predicted:.2f}x"
    shown["reached"] = told({name: fit["reached"] for name, fit in row.reached.items()})
    shown["paths"] = told(row.paths)
    return shown


def told(found: Any) -> str:
    """What a row has of a name and a value, or of lines, as one line; empty where it has nothing.

    >>> told({"block attention: kernel": 30}), told(["the experts stay as they are"]), told(None)
    ('block attention: kernel (30)', 'the experts stay as they are', '')
    """
    if not found:
        return ""
    if isinstance(found, dict):
        return "; ".join(
            f"{name} ({value})" if isinstance(value, int) else f"{name}: {value}"
            for name, value in found.items()
            if value
        )
    return found if isinstance(found, str) else "; ".join(map(str, found))


def _few_ticks(axis: Any, scale: str) -> None:
    """Ticks as plain numbers, few enough that they do not touch."""
    from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

    if scale == "log":
        axis.set_major_locator(LogLocator(base=10, subs=(1, 2, 5), numticks=6))
        axis.set_minor_formatter(NullFormatter())
    else:
        axis.set_major_locator(MaxNLocator(6))
    axis.set_major_formatter(lambda value, _: f"{value:,.4g}")
