"""Drawings as SVG text: the bar of a claim, and speed against quality. Plain shapes, coloured by classes of the style sheet.

Every text in them is escaped, and each has a title that says in words what it shows.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Literal

from assay.evidence.record import Evidence
from assay.evidence.types import Estimate
from assay.evidence.verdict import as_gain, figure, gained, is_log, say

Against = Literal["paper", "free", "exact"]
AGAINST: dict[Against, str] = {
    "paper": "the paper's baseline",
    "free": "what is free",
    "exact": "our own exact code",
}
WIDTH, HEIGHT = 168.0, 22.0  # of a bar
LARGEST = 1e300  # beyond it distances overflow, and nothing is drawn
HIDDEN = re.compile(
    "[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufffe\uffff]"
)
"""Characters that XML forbids, and those that are not seen and turn the text around them about."""
STANDALONE = """<style>
svg{font:12px system-ui,sans-serif;color:#1c2430;background:#fff}
.axis{stroke:#8a94a3;fill:none}.none{stroke:#6b7482}.range{stroke:#1f5fa8}.dot{fill:#1f5fa8}.paper{stroke:#a8370f}
.whisker{stroke:#1f5fa8;fill:none;opacity:.6}.dominated{opacity:.35}.front{stroke:#1f5fa8;fill:none}text{fill:currentColor}.label{paint-order:stroke;stroke:#fff;stroke-width:3px}
@media (prefers-color-scheme:dark){svg{color:#e6eaf0;background:#12161c}.range,.front,.whisker{stroke:#7db4f0}.dot{fill:#7db4f0}
.paper{stroke:#ff9a6b}.label{stroke:#12161c}}
</style>"""


@dataclass(frozen=True)
class Gains:
    """A figure as the gain over one baseline: its interval, where no gain lies, and the paper's gain where it can be compared."""

    low: float
    median: float
    high: float
    none: float
    paper: float | None
    log: bool


def clean(text: str) -> str:
    """`text` with a visible sign in the place of every control character and every mark that reverses the order of letters.

    >>> clean("a" + chr(0) + "b") == "a" + chr(0xFFFD) + "b"
    True
    """
    return HIDDEN.sub("\ufffd", text)


def _escaped(text: str) -> str:
    return escape(clean(text))


def gains(record: Evidence, against: Against = "paper") -> Gains | None:
    """The record's figure as a gain over a baseline; None where the claim promises no gain or that baseline was not measured."""
    own = None if record.measured is None else gained(record)
    if own is None:
        return None
    if against == "paper":
        return Gains(own.low, own.median, own.high, own.none, own.paper, own.log)
    if record.kind == "trial":
        ratio = record.ratios.get(against)
        return None if ratio is None else Gains(ratio.low, ratio.median, ratio.high, 1.0, None, True)
    value = record.free if against == "free" else record.exact
    if value is None:
        return None
    theirs = as_gain(record, value)
    if is_log(record):
        if not 0 < theirs < math.inf:
            return None
        return Gains(own.low / theirs, own.median / theirs, own.high / theirs, 1.0, None, True)
    return Gains(own.low - theirs, own.median - theirs, own.high - theirs, 0.0, None, False)


def bar(record: Evidence, against: Against = "paper") -> str:
    """A small picture of a figure with its interval, the line of no gain, and the paper's number; "" where there is nothing to draw."""
    found = gains(record, against)
    if found is not None:
        values = [found.low, found.median, found.high]
        marks = [found.none] + ([found.paper] if found.paper is not None else [])
        log = found.log
        none: float | None = found.none
        paper = found.paper
    elif record.measured is not None and against == "paper":
        values = [record.measured.low, record.measured.median, record.measured.high]
        paper, none, log = record.paper_value, None, False
        marks = [paper] if paper is not None else []
    else:
        return ""
    if not all(abs(value) < LARGEST for value in [*values, *marks]) or log and min(*values, *marks) <= 0:
        return ""
    assert record.measured is not None
    words = (
        _in_words(found, against)
        if found
        else f"{say(record.measured, record.unit)}; the paper: {figure(record.paper_value, record.paper_unit)}"
    )
    x = _scale([*values, *marks], log)
    low, median, high = (x(value) for value in values)
    middle = HEIGHT / 2
    parts = [f'<line class="axis" x1="0" x2="{WIDTH:g}" y1="{middle:g}" y2="{middle:g}"/>']
    if none is not None:
        parts.append(f'<line class="none" x1="{x(none):.1f}" x2="{x(none):.1f}" y1="2" y2="{HEIGHT - 2:g}"/>')
    parts.append(f'<line class="range" x1="{low:.1f}" x2="{max(high, low + 1):.1f}" y1="{middle:g}" y2="{middle:g}"/>')
    parts.append(f'<circle class="dot" cx="{median:.1f}" cy="{middle:g}" r="4"/>')
    if paper is not None:
        at = x(paper)
        parts.append(f'<path class="paper" d="M{at:.1f} 3v{HEIGHT - 6:g}"/>')
    return (
        f'<svg class="bar" role="img" width="{WIDTH:g}" height="{HEIGHT:g}" viewBox="0 0 {WIDTH:g} {HEIGHT:g}">'
        f"<title>{_escaped(words)}</title>{''.join(parts)}</svg>"
    )


def _in_words(found: Gains, against: Against) -> str:
    unit = "x" if found.log else ""
    seen = say(Estimate(median=found.median, low=found.low, high=found.high), unit)
    paper = "" if found.paper is None else f", the paper {found.paper:.4g}{unit}"
    return f"gain over {AGAINST[against]}: {seen}, no gain is {found.none:g}{unit}{paper}"


def _scale(values: Sequence[float], log: bool, *, start: float = 6.0, end: float = WIDTH - 6.0) -> _Scale:
    place = [math.log(value) for value in values] if log else list(values)
    low, high = min(place), max(place)
    if not high - low > 1e-12 * max(1.0, abs(low), abs(high)):  # all alike: of large numbers, 1 more is the same number
        room = max(1.0, abs(low))
        low, high = low - room, high + room
    return _Scale(low, high, log, start, end)


@dataclass(frozen=True)
class _Scale:
    low: float
    high: float
    log: bool
    start: float
    end: float

    def __call__(self, value: float) -> float:
        place = math.log(value) if self.log else value
        return self.start + (place - self.low) / (self.high - self.low) * (self.end - self.start)


@dataclass(frozen=True)
class Point:
    """One thing in the picture of speed against quality."""

    label: str
    gain: float
    loss: float  # of quality, in per cent; negative is better
    word: str
    link: str = ""
    gains: tuple[float, float] | None = None  # the interval
    losses: tuple[float, float] | None = None
    recipe: bool = False  # a recipe is drawn as a square, a claim as a circle


def front(points: Sequence[Point]) -> list[Point]:
    """The points that no other beats in gain and in quality at once, by falling gain; equal ones do not beat each other.

    >>> [point.label for point in front([Point("a", 2, 0, ""), Point("b", 1.5, 1, ""), Point("c", 3, 2, "")])]
    ['c', 'a']
    """
    best: list[Point] = []
    for point in sorted(points, key=lambda p: (-p.gain, p.loss)):
        if not best or point.loss < best[-1].loss or (point.gain, point.loss) == (best[-1].gain, best[-1].loss):
            best.append(point)
    return best


def pareto(points: Sequence[Point], title: str, *, standalone: bool = False) -> str:
    """Gain to the right (ratio, logarithmic), loss of quality upwards; dominated points fade, and a line joins the others.

    Intervals are thin lines through the points, where there are any.
    """
    width, height, left, bottom, top, right = 720.0, 420.0, 64.0, 48.0, 16.0, 16.0
    best = front(points)
    chosen = set(map(id, best))
    body = []
    if points:
        ratios = [1.0, *(p.gain for p in points)]
        losses = [0.0, *(_bent(p.loss) for p in points)]
        across = {id(p): _within(p.gains, p.gain, min(ratios) / FAR, max(ratios) * FAR) for p in points}
        along = {id(p): _bent_ends(p, min(losses) - 1, max(losses) + 1) for p in points}
        ends = [end for both in across.values() for end in both]
        bent = [*losses, *(end for both in along.values() for end in both)]
        x = _scale([*ratios, *ends], True, start=left + 8, end=width - right - 8)
        y = _scale(bent, False, start=height - bottom - 8, end=top + 8)
        for tick in _ticks([*ratios, *ends]):
            body.append(
                f'<line class="axis" x1="{x(tick):.1f}" x2="{x(tick):.1f}" y1="{top:g}" y2="{height - bottom:g}" opacity=".3"/>'
                f'<text x="{x(tick):.1f}" y="{height - bottom + 18:g}" text-anchor="middle">{tick:g}x</text>'
            )
        for tick in _loss_ticks(min(bent), max(bent)):
            at = y(_bent(tick))
            body.append(
                f'<line class="axis" x1="{left:g}" x2="{width - right:g}" y1="{at:.1f}" y2="{at:.1f}" opacity=".3"/>'
                f'<text x="{left - 6:g}" y="{at + 4:.1f}" text-anchor="end">{tick:g} %</text>'
            )
        path = " ".join(f"{x(p.gain):.1f},{y(_bent(p.loss)):.1f}" for p in best)
        body.append(f'<polyline class="front" points="{path}"/>')
        for point in sorted(points, key=lambda p: id(p) in chosen):  # those that nothing beats lie on top
            classes = "point" if id(point) in chosen else "point dominated"
            words = f"{point.label}: {point.gain:.3g}x, quality {point.loss:+.3g} % worse; {point.word}"
            at, up = x(point.gain), y(_bent(point.loss))
            lines = "".join(f"M{x(a):.1f} {up:.1f}H{x(b):.1f}" for a, b in [across[id(point)]] if a < b)
            lines += "".join(f"M{at:.1f} {y(a):.1f}V{y(b):.1f}" for a, b in [along[id(point)]] if a < b)
            whisker = f'<path class="whisker" d="{lines}"/>' if lines else ""
            place = f'x="{at - 4.5:.1f}" y="{up - 4.5:.1f}" width="9" height="9"'
            shape, place = ("rect", place) if point.recipe else ("circle", f'cx="{at:.1f}" cy="{up:.1f}" r="5"')
            dot = f'<{shape} class="dot" {place}><title>{_escaped(words)}</title></{shape}>'
            linked = f'<a href="{_escaped(point.link)}" aria-label="{_escaped(words)}">{dot}</a>' if point.link else dot
            body.append(f'<g class="{classes}">{whisker}{linked}</g>')
        body += _named(best, [(x(p.gain), y(_bent(p.loss))) for p in best], width)
    else:
        body.append(
            f'<text x="{width / 2:g}" y="{height / 2:g}" text-anchor="middle">nothing here has both a gain and a quality</text>'
        )
    labels = (
        f'<text x="{(left + width) / 2:g}" y="{height - 8:g}" text-anchor="middle">times faster, or less of it (right is better)</text>'
        f'<text transform="translate(14 {height / 2:g}) rotate(-90)" text-anchor="middle">quality lost (down is better)</text>'
    )
    frame = f'<path class="axis" d="M{left:g} {top:g}V{height - bottom:g}H{width - right:g}"/>'
    style = STANDALONE if standalone else ""
    role = "group" if any(point.link for point in points) else "img"  # a picture may hold no links
    return (
        f'<svg class="pareto" xmlns="http://www.w3.org/2000/svg" role="{role}" aria-label="{_escaped(title)}" '
        f'viewBox="0 0 {width:g} {height:g}" width="{width:g}" height="{height:g}">{style}{frame}{labels}{"".join(body)}</svg>'
    )


FAR = (
    3.0  # times beyond the outermost points an interval is drawn: one without end would leave no room for anything else
)
LETTER = 6.6  # wide is a letter of a label, about
LONGEST_LABEL = 34  # letters of it


def _named(best: Sequence[Point], places: Sequence[tuple[float, float]], width: float) -> list[str]:
    """The names beside the points that nothing beats, as far as they do not lie on each other: every point has its title anyway."""
    found: list[str] = []
    taken: list[tuple[float, float, float]] = []
    for point, (at, up) in zip(best, places, strict=True):
        name = point.label if len(point.label) <= LONGEST_LABEL else f"{point.label[: LONGEST_LABEL - 3]}..."
        long = len(name) * LETTER
        side, shift = ("end", 5.0) if at > width / 2 else ("start", -5.0)
        begin = at + shift - long if side == "end" else at + shift
        up = up - 9 if up > 40 else up + 18  # above its point, where it hides none of its height
        if any(abs(up - other) < 13 and begin < end and start < begin + long for other, start, end in taken):
            continue
        taken.append((up, begin, begin + long))
        found.append(
            f'<text class="label" x="{at + shift:.1f}" y="{up:.1f}" text-anchor="{side}">{_escaped(name)}</text>'
        )
    return found


def _within(ends: tuple[float, float] | None, middle: float, least: float, most: float) -> tuple[float, float]:
    """The ends of an interval as far as they are drawn; of a point without one, the point itself."""
    low, high = ends or (middle, middle)
    return (max(low, least), min(high, most)) if low <= middle <= high else (middle, middle)


def _bent_ends(point: Point, least: float, most: float) -> tuple[float, float]:
    """The same of the loss, on its axis."""
    low, high = point.losses or (point.loss, point.loss)
    return _within((_bent(low), _bent(high)), _bent(point.loss), least, most)


def _bent(loss: float) -> float:
    """Per cent on an axis that is linear to 1 and logarithmic beyond, on both sides of 0.

    >>> _bent(1.0), _bent(-10.0)
    (1.0, -2.0)
    """
    return loss if abs(loss) <= 1 else math.copysign(1 + math.log10(abs(loss)), loss)


def _loss_ticks(low: float, high: float) -> list[float]:
    """Losses to name between two places of the axis: powers of ten, and finer steps where there is room for hardly one.

    >>> _loss_ticks(-0.1, 0.45), _loss_ticks(0.0, 2.5)
    ([0.0, 0.2, 0.4], [0.0, 1.0, 10.0])
    """
    for steps in ((-1000.0, -100.0, -10.0, -1.0, 0.0, 1.0, 10.0, 100.0, 1000.0), range(-5, 6), range(-10, 11)):
        part = {9: 1.0, 11: 5.0, 21: 10.0}[len(steps)]
        inside = [step / part for step in steps if low <= _bent(step / part) <= high]
        if len(inside) > 2:
            return inside
    return [0.0]


def _ticks(values: Sequence[float]) -> list[float]:
    low, high = min(1.0, *values), max(1.0, *values)
    steps = [base * 10.0**power for power in range(-4, 7) for base in (1.0, 2.0, 5.0)]
    inside = [tick for tick in steps if low <= tick <= high]
    return (
        inside if len(inside) <= 9 else [tick for tick in inside if math.isclose(math.log10(tick) % 1, 0, abs_tol=1e-9)]
    )


def roofline(peaks: dict[str, float], bandwidth: float) -> str:
    """Attainable operations a second over operations a byte, a roof for each dtype; both axes are logarithmic."""
    width, height, left, bottom, top, right = 720.0, 340.0, 72.0, 48.0, 16.0, 96.0
    low, high = 0.25, max(16.0, *(4 * peak / bandwidth for peak in peaks.values()))
    x = _scale([low, high], True, start=left, end=width - right)
    y = _scale([low * bandwidth, max(peaks.values()) * 1.5], True, start=height - bottom, end=top)
    body = []
    for name, peak in sorted(peaks.items(), key=lambda item: -item[1]):
        ridge = min(max(peak / bandwidth, low), high)
        words = f"{name}: {peak / 1e9:,.0f} GFLOP/s from {ridge:.3g} operations a byte on"
        roof = f"{x(low):.1f},{y(low * bandwidth):.1f} {x(ridge):.1f},{y(peak):.1f} {x(high):.1f},{y(peak):.1f}"
        body.append(
            f'<polyline class="front" points="{roof}">'
            f"<title>{_escaped(words)}</title></polyline>"
            f'<text x="{x(high) + 6:.1f}" y="{y(peak) + 4:.1f}">{_escaped(name)}</text>'
        )
    power = math.floor(math.log10(low * bandwidth)) + 1
    while 10.0**power <= max(peaks.values()) * 1.5:
        at = y(10.0**power)
        body.append(
            f'<line class="axis" x1="{left:g}" x2="{width - right:g}" y1="{at:.1f}" y2="{at:.1f}" opacity=".3"/>'
            f'<text x="{left - 6:g}" y="{at + 4:.1f}" text-anchor="end">{10.0 ** (power - 9):g}</text>'
        )
        power += 1
    tick = 0.25
    while tick <= high:
        body.append(f'<text x="{x(tick):.1f}" y="{height - bottom + 18:g}" text-anchor="middle">{tick:g}</text>')
        tick *= 4
    frame = f'<path class="axis" d="M{left:g} {top:g}V{height - bottom:g}H{width - right:g}"/>'
    labels = (
        f'<text x="{(left + width - right) / 2:g}" y="{height - 8:g}" text-anchor="middle">operations a byte of main memory</text>'
        f'<text transform="translate(14 {height / 2:g}) rotate(-90)" text-anchor="middle">GFLOP/s</text>'
    )
    return (
        f'<svg class="roofline" xmlns="http://www.w3.org/2000/svg" role="img" viewBox="0 0 {width:g} {height:g}" width="{width:g}" '
        f'height="{height:g}"><title>rooflines of this machine</title>{frame}{labels}{"".join(body)}</svg>'
    )


def embedded(drawing: str) -> str:
    """A bar as a file of its own, with its colours."""
    return drawing.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1).replace(
        "<title>", f"{STANDALONE}<title>", 1
    )
