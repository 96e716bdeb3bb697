"""Claimed against measured: a table for the terminal, and a self-contained HTML page."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from assay.evidence import hashes
from assay.evidence.record import Evidence
from assay.evidence.types import Estimate, Verdict
from assay.evidence.verdict import Summary, figure, gained, judge, remarks, say, summaries, unit_name
from assay.paths import atomic_file

if TYPE_CHECKING:
    from rich.console import Group

PAGE = Path(__file__).parent / "page.html"
LARGEST = 1e100  # beyond it the axis of a plot overflows, and nothing is drawn
STYLES = {
    Verdict.REPRODUCED: "bold green",
    Verdict.DIRECTION_HOLDS: "green",
    Verdict.DOES_NOT_PAY: "yellow",
    Verdict.REFUTED: "bold red",
    Verdict.UNDECIDED: "yellow",
    Verdict.QUALITY_NOT_SHOWN: "yellow",
    Verdict.CONTESTED: "magenta",
    Verdict.COMPUTED: "cyan",
    Verdict.NEEDS_HARDWARE: "cyan",
}


def estimate_text(estimate: Estimate | None, unit: str) -> str:
    """The figure with its interval, which is left out when it is exact; "-" for None."""
    return "-" if estimate is None else say(estimate, unit)


def point_text(point: dict[str, Any]) -> str:
    """A point of the grid in a few words."""
    return ", ".join(f"{name}={value}" for name, value in point.items()) or "-"


def quality_text(record: Evidence) -> str:
    """The candidate's quality next to the baseline's."""
    quality = record.quality
    if quality is None:
        return "-"
    interval = (
        f" [{quality.low:.4g}, {quality.high:.4g}]" if quality.low is not None and quality.high is not None else ""
    )
    against = f" against {quality.baseline:.4g}" if quality.baseline is not None else ""
    return f"{quality.metric} {quality.candidate:.4g}{interval}{against}"


def over_text(record: Evidence, arm: str) -> str:
    """The ratio over "free" or "exact", the operator's two baselines (of a figure: that baseline's own figure)."""
    label = (record.free_label if arm == "free" else record.exact_label) or arm
    if arm in record.ratios:
        return f"{say(record.ratios[arm], 'x')} vs {label}"
    value = record.free if arm == "free" else record.exact
    if record.kind == "figure" and value is not None:
        return f"{label}: {figure(value, record.unit)}"
    return "-"


def verdict_text(record: Evidence) -> str:
    """The verdict on this record alone, or the status of a point that failed; "stale" when its code has changed since.

    A star marks a noisy record.
    """
    if record.status != "ok":
        text: str = record.status
    elif hashes.is_stale(record):
        text = "stale"
    else:
        text = judge(record).verdict.value
    return text + (" *" if record.noisy else "")


def reason_text(record: Evidence) -> str:
    """Why the record has that verdict, or why it has none."""
    if record.status != "ok":
        return record.error
    changes = hashes.changes(record)
    return f"changed since: {', '.join(changes)}" if changes else judge(record).reason


def documented(record: Evidence) -> dict[str, Any]:
    """The record for `--json`, with the verdict and the reason as of now."""
    verdict = verdict_text(record).removesuffix(" *") if record.status == "ok" else None
    return {**record.model_dump(mode="json"), "verdict": verdict, "reason": reason_text(record)}


def overview(records: Sequence[Evidence]) -> Group:
    """Claimed against measured, for rich to print: each claim's verdict with its reason, and a few words on each point.

    Text alone, no columns: it breaks between words however narrow the terminal is.
    """
    from rich.console import Group
    from rich.padding import Padding
    from rich.text import Text

    parts: list[Text | Padding] = []
    for summary in summaries(records):
        deciding = summary.deciding
        paper = "no number" if deciding.paper_value is None else figure(deciding.paper_value, deciding.paper_unit)
        style = STYLES[summary.verdict] if summary.verdict is not None else "dim" if summary.stale else "bold red"
        parts.append(Text.assemble((summary.claim, "bold"), f"  the paper: {paper}, {deciding.metric}"))
        parts.append(Text.assemble((summary.word, style), f": {summary.reason}"))
        if deciding.measured_here:
            parts.append(Text(f"measured in its place: {deciding.measured_here}"))
        parts += [Text(f"note: {remark}") for remark in remarks(deciding)]
        for point in summary.points:
            seen = f"{point_text(point.point)}: {estimate_text(point.measured, point.unit)}; {verdict_text(point)}"
            texts = (over_text(point, "free"), over_text(point, "exact"), quality_text(point))
            more = [text for text in texts if text != "-"]
            style = "" if point is deciding else "dim"
            parts += [Padding(Text("; ".join([seen, *more]), style=style), (0, 0, 0, 4), expand=False)]
        parts.append(Text())
    if any(record.noisy for record in records):
        parts.append(Text("* measured while the machine was busy with other things"))
    return Group(*parts)


def plot_svg(summary: Summary) -> str:
    """The claim as an SVG plot: each point's measured interval, with lines at the paper's number and at "no gain"."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib.figure import Figure as Canvas

    deciding = summary.deciding
    paper = deciding.paper_value if deciding.paper_value is not None and abs(deciding.paper_value) < LARGEST else None
    drawn = [p for p in summary.points if p.measured and max(abs(p.measured.low), abs(p.measured.high)) < LARGEST]
    with matplotlib.rc_context(
        {"svg.fonttype": "none", "svg.hashsalt": "assay", "font.size": 9, "text.parse_math": False}
    ):
        canvas = Canvas(figsize=(7.0, 0.9 + 0.34 * len(drawn)), layout="constrained")
        axes = canvas.add_subplot()
        for row, point in enumerate(drawn):
            assert point.measured is not None
            low, median, high = point.measured.low, point.measured.median, point.measured.high
            axes.plot([low, high], [row, row], color="#1f5fa8", linewidth=3, solid_capstyle="round")
            axes.plot([median], [row], "o", color="#1f5fa8")
        if paper is not None:
            axes.axvline(paper, color="#b3401f", linestyle="--", label="the paper")
        if (neutral := no_gain(deciding)) is not None and abs(neutral) < LARGEST:
            axes.axvline(neutral, color="#777777", linewidth=1, label="no gain")
        if unit_name(deciding.unit) == "x":
            _ratio_axis(axes)
        axes.set_yticks(range(len(drawn)), [_printable(point_text(point.point)) for point in drawn])
        axes.set_ylim(max(len(drawn), 1) - 0.5, -0.5)
        label = f"{deciding.metric or 'measured'} ({deciding.unit})" if deciding.unit else deciding.metric
        axes.set_xlabel(_printable(label))
        if axes.get_legend_handles_labels()[0]:
            canvas.legend(loc="outside upper right", ncols=2, frameon=False)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
        text = io.StringIO()
        canvas.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    return text.getvalue()


def _printable(text: str) -> str:
    """A label of a length that fits, without the characters that XML cannot hold."""
    return "".join(letter if letter.isprintable() else "?" for letter in text[:100])


def _ratio_axis(axes: Any) -> None:
    """Put ratios on a logarithmic axis, so that 2x and 0.5x are equally far from 1x; unchanged if a value is not above 0."""
    from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

    low, high = axes.dataLim.intervalx
    if low <= 0:
        return
    axes.set_xscale("log")
    narrow = high / low < 20
    steps = (1.0, 2.0, 5.0) if high / low < 1000 else (1.0,)
    axes.xaxis.set_major_locator(MaxNLocator(6) if narrow else LogLocator(subs=steps))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(lambda x, _: f"{x:.3g}")


def no_gain(record: Evidence) -> float | None:
    """Where "no gain" lies on the axis of the claim's own unit; None for forms that promise none."""
    if record.measured is None or gained(record) is None:
        return None
    return {"ratio": 1.0, "level": record.baseline}.get(record.form, 0.0)


def html(records: Sequence[Evidence], title: str = "assay: claims and what was measured here") -> str:
    """A self-contained page: per claim the verdict, the plot and every point with its conditions."""
    from jinja2 import Environment

    claims = [_claim_view(summary) for summary in summaries(records)]
    counts: dict[str, int] = {}
    for claim in claims:
        counts[claim["verdict"]] = counts.get(claim["verdict"], 0) + 1
    page = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(
        PAGE.read_text(encoding="utf-8")
    )
    made = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    return page.render(title=title, claims=claims, counts=counts, made=made)


def write_html(records: Sequence[Evidence], path: Path | str) -> None:
    """Write the page, whole or not at all."""
    text = html(records)
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _claim_view(summary: Summary) -> dict[str, Any]:
    deciding = summary.deciding
    machine = deciding.machine
    has_plot = any(point.measured is not None for point in summary.points)
    picture = base64.b64encode(plot_svg(summary).encode()).decode() if has_plot else ""
    return {
        "id": summary.claim,
        "metric": deciding.metric,
        "paper": figure(deciding.paper_value, deciding.paper_unit),
        "verdict": summary.word,
        "reason": summary.reason,
        "refuted_if": deciding.refuted_if,
        "measured_here": deciding.measured_here,
        "departures": deciding.departures,
        "remarks": remarks(deciding),
        "picture": picture,
        "machine": f"{machine.get('cpu', 'unknown processor')}, {machine.get('threads', '?')} threads",
        "scale": deciding.scale,
        "commit": deciding.commit or f"version {deciding.assay_version}",
        "command": deciding.command,
        "points": [
            {
                "deciding": point.id == deciding.id,
                "id": point.id,
                "point": point_text(point.point),
                "measured": estimate_text(point.measured, point.unit) if point.measured else point.error or "-",
                "free": over_text(point, "free"),
                "exact": over_text(point, "exact"),
                "quality": quality_text(point),
                "verdict": verdict_text(point),
                "seconds": f"{point.seconds:.1f} s",
                "created": point.created.strftime("%Y-%m-%d %H:%M"),
            }
            for point in summary.points
        ],
    }
