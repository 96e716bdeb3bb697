"""The report of a tuning run: one HTML file with its plots inside, readable without a network."""

from __future__ import annotations

import io
from importlib import resources
from typing import Any

from assay.tuner.outcome import Outcome, base_row, front
from assay.tuner.work import UNITS

INK, BAD, GOOD, FREE, WATER = "#1f2937", "#b45309", "#047857", "#6b7280", "#bfdbfe"


def render(outcome: Outcome, document: dict[str, Any], after: dict[str, Any], limits: Any) -> str:
    """The whole page. `after` is the profile of the best recipe, `limits` the machine's calibration."""
    from jinja2 import Environment

    template = (resources.files("assay.tuner") / "templates" / "report.html").read_text(encoding="utf-8")
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    rates = {name: f"{value / 1e9:,.0f} GOP/s" for name, value in limits.peak_flops.items()}
    return environment.from_string(template).render(
        d=document,
        rows=[_row(outcome, row) for row in outcome.rows],
        unfit=outcome.survey["unfit"],
        kinds=_kinds(outcome.survey["kinds"], after["kinds"]),
        pareto=pareto_plot(outcome),
        before=waterline_plot(outcome.survey["waterline"], "before", limits),
        after=waterline_plot(after["waterline"], "after", limits),
        predicted=predicted_plot(outcome),
        rates=rates,
        read=f"{limits.read_bandwidth / 1e9:.1f} GB/s",
        folder=str(outcome.artefact),
    )


def pareto_plot(outcome: Outcome) -> str:
    """Every trial: the goal's figure against the loss of quality, the front drawn through."""
    unit = UNITS[outcome.settings.goal]
    figure, axes = _figure(7.5, 4.2)
    done = [row for row in outcome.rows if row.cost is not None and row.drop is not None]
    colours = {"baseline": INK, "free": FREE, "candidate": GOOD}
    for kind, colour in colours.items():
        rows = [row for row in done if row.kind == kind]
        values = [100 * (row.drop or 0) for row in rows]
        spread = [[100 * max((r.drop or 0) - (r.drop_low or 0), 0) for r in rows]]
        spread.append([100 * max((r.drop_high or 0) - (r.drop or 0), 0) for r in rows])
        costs = [unit.show(row.cost or 0) for row in rows]
        axes.errorbar(costs, values, yerr=spread, fmt="o", color=colour, label=kind, capsize=2)
    line = front(outcome.rows)
    axes.plot([unit.show(r.cost or 0) for r in line], [100 * (r.drop or 0) for r in line], color=INK, lw=0.8, ls=":")
    axes.axhline(100 * outcome.max_drop, color=BAD, lw=1, label=f"allowed loss {100 * outcome.max_drop:g} %")
    if max((abs(row.drop or 0) for row in done), default=0) > 5 * max(outcome.max_drop, 0.002):
        axes.set_yscale("symlog", linthresh=max(100 * outcome.max_drop, 0.2))
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set_xlabel(unit.name + (" (more is better)" if unit.higher_is_better else " (less is better)"))
    axes.set_ylabel("perplexity increase, %")
    axes.legend(frameon=False)
    return _svg(figure)


def predicted_plot(outcome: Outcome) -> str:
    """Predicted against measured time, both over the base's: on the diagonal the roofline told the truth."""
    base = base_row(outcome.rows)
    figure, axes = _figure(4.2, 4.2)
    rows = [r for r in outcome.rows if r.predicted is not None and r.cost is not None]
    if rows and base is not None and base.cost:
        x, y = [r.predicted or 0 for r in rows], [(r.cost or 0) / base.cost for r in rows]
        low, high = 0.8 * min([*x, *y]), 1.2 * max([*x, *y])
        axes.plot([low, high], [low, high], color=FREE, lw=0.8)
        axes.scatter(x, y, color=GOOD)
        axes.set(xscale="log", yscale="log", xlim=(low, high), ylim=(low, high))
    axes.set_xlabel("predicted time / base (roofline)")
    axes.set_ylabel("measured time / base")
    return _svg(figure)


def waterline_plot(bars: list[dict[str, Any]], title: str, limits: Any) -> str:
    """Bars of operational intensity, as wide as their share of time; those under the ridge (the water) wait for memory."""
    figure, axes = _figure(7.5, 2.9)
    left = 0.0
    for bar in bars:
        width, height = bar["share"], max(bar["intensity"], 1e-2)
        ridge = limits.peak_flops.get(bar["dtype"], limits.peak_flops["float32"]) / limits.read_bandwidth
        colour = GOOD if height >= ridge else BAD
        axes.bar(left, height, width=width, align="edge", color=colour, edgecolor="white", lw=0.3)
        axes.plot([left, left + width], [ridge, ridge], color="#2563eb", lw=1.5)
        if width > 0.06:
            label = bar["name"].split(".")[-1]
            axes.text(left + width / 2, height, label, ha="center", va="bottom", fontsize=7, rotation=30)
        left += width
    axes.set_yscale("log")
    axes.set(xlim=(0, max(left, 1e-9)), xlabel=f"share of time, {title}", ylabel="operations per byte")
    return _svg(figure)


def _row(outcome: Outcome, row: Any) -> dict[str, Any]:
    unit = UNITS[outcome.settings.goal]
    shown = {"kind": row.kind, "label": row.label(), "status": row.status, "error": row.error, "seconds": row.seconds}
    shown["value"] = "" if row.cost is None else f"{unit.show(row.cost):,.1f}"
    shown["drop"] = "" if row.drop is None else f"{100 * row.drop:+.2f} %"
    shown["interval"] = "" if row.drop is None else f"{100 * row.drop_low:+.2f} to {100 * row.drop_high:+.2f}"
    shown["predicted"] = "" if row.predicted is None else f"{1 / row.predicted:.2f}x"
    shown["best"] = row is outcome.best
    return shown


def _kinds(before: dict[str, Any], after: dict[str, Any]) -> list[dict[str, Any]]:
    names = [name for name in before if before[name]["seconds"] > 0 or after.get(name, {}).get("seconds", 0) > 0]
    return [
        {"name": n, "before": 1e3 * before[n]["seconds"], "after": 1e3 * after.get(n, {}).get("seconds", 0)}
        for n in names
    ]


def _figure(width: float, height: float) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _svg(figure: Any) -> str:
    out = io.StringIO()
    figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
    text = out.getvalue()
    return text[text.index("<svg") :]
