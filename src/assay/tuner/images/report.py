"""The report of tuning an image model: one HTML file, its plot included, that is readable offline and on a phone."""

from __future__ import annotations

from importlib import resources
from typing import Any

from assay.measure.plots import bare_axes, svg
from assay.tuner.images.work import UNITS
from assay.tuner.report import BAD, FREE, GOOD, INK, WIDE


def render(document: dict[str, Any]) -> str:
    """The whole page."""
    from jinja2 import Environment

    template = (resources.files("assay.tuner") / "templates" / "images.html").read_text(encoding="utf-8")
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(template).render(
        d=document,
        quality=quality_words(document["quality"], document["max_drop"]),
        rows=_rows(document),
        plot=plot(document),
    )


def quality_words(quality: dict[str, Any], limit: float) -> str:
    """What was lost on the proof's pictures, against what is allowed, as a sentence.

    >>> found = {"metric": "accuracy", "pictures": 400, "baseline": 0.9, "candidate": 0.895, "lost": 0.005, "low": -0.004, "high": 0.014}
    >>> quality_words({**found, "verdict": "undecided"}, 0.01)
    'Accuracy 89.5 % of 400 pictures, 90.0 % as loaded: 0.5 points lost (-0.4 to 1.4), where 1 are allowed: undecided.'
    """
    metric = quality["metric"][0].upper() + quality["metric"][1:]
    return (
        f"{metric} {100 * quality['candidate']:.1f} % of {quality['pictures']} pictures, {100 * quality['baseline']:.1f} % as loaded: "
        f"{100 * quality['lost']:.1f} points lost ({100 * quality['low']:.1f} to {100 * quality['high']:.1f}), where {100 * limit:g} are "
        f"allowed: {quality['verdict']}."
    )


def plot(document: dict[str, Any]) -> str:
    """Every recipe that was tried: the goal's figure against the loss on the search's pictures; empty for a single point."""
    rows = [row for row in document["rows"] if row["cost"] is not None and row["lost"] is not None]
    if len(rows) < 2:
        return ""
    unit = UNITS[document["goal"]]
    figure, axes = bare_axes(WIDE, 3.4)
    for kind, colour in {"baseline": INK, "free": FREE, "candidate": GOOD}.items():
        of_kind = [row for row in rows if row["kind"] == kind]
        if of_kind:
            x, y = [unit.show(row["cost"]) for row in of_kind], [100 * row["lost"] for row in of_kind]
            axes.scatter(x, y, color=colour, label=kind)
    axes.axhline(100 * document["max_drop"], color=BAD, lw=1, label=f"allowed loss {100 * document['max_drop']:g} %")
    axes.set_xlabel(unit.name + (" (more is better)" if unit.higher_is_better else " (less is better)"))
    axes.set_ylabel("pictures lost, %")
    figure.legend(frameon=False, loc="outside upper left", ncols=4, fontsize=8, columnspacing=1, handletextpad=0.3)
    return svg(figure)


def _rows(document: dict[str, Any]) -> list[dict[str, Any]]:
    unit = UNITS[document["goal"]]
    return [
        {
            **row,
            "value": "" if row["cost"] is None else f"{unit.show(row['cost']):,.2f}",
            "over": "" if row["ratio"] is None else "{median:.2f}x ({low:.2f} to {high:.2f})".format(**row["ratio"]),
            "loss": "" if row["lost"] is None else f"{100 * row['lost']:+.1f} %",
        }
        for row in document["rows"]
    ]
