"""The written rule that compares a measurement with a paper's claim.

For one point (`judge`), the first rule that fits decides:

1. The machine lacks what the experiment needs: `needs other hardware`.
2. The whole 95 % interval lies on the wrong side of "no gain" against the paper's baseline: `refuted here`.
3. The interval touches "no gain": `does not pay here`.
4. The interval against the strongest free baseline is not entirely on the right side: `does not pay here`.
5. The quality guard is broken: `does not pay here`.
6. The paper gives a number, and the median reaches 80 % of it: `reproduced`.
7. Otherwise: `direction holds`. There is a gain, but it falls short of the paper's number, or the paper gives none.

*No gain* is a ratio of 1 for a trial and for a figure in "x". For any other figure it is the measured baseline. Without a
baseline it is 0 for per cent or points where more is better (something saved or gained), and 1 % for a loss in per cent for
which the paper gives no number. A figure with none of these (decibels, or seconds on their own) has no direction, and rule 6
alone decides: short of it, the verdict is `does not pay here`. For such a figure the whole interval must reach the 80 %, because
nothing else bounds its other end; if only part of it does, the verdict is `direction holds`.

*80 %* is taken in log terms for ratios (a claimed 13.5x is reached at 13.5 ** 0.8 = 8.0x, a claimed 1.1x at 1.08x) and directly
for other figures (at least 0.8 of the number, or at most 1.25 of it where less is better). A trial compared with a percentage:
"60 % less time" is a ratio of 2.5, "60 % more throughput" one of 1.6; the claim's metric tells which.

*A claim that promises no gain* (a cost kept within a bound: a ratio of 1 or below) is `reproduced` if the whole interval lies
within value ** 1.25, `direction holds` if part of it does, else `refuted here`. Rules 2 to 4 do not apply to it.

*The quality guard* is broken if the candidate's quality is worse than the baseline's by more than 1 % (by more than 0.01 if the
baseline's is 0) and, where the candidate's quality has an interval, the baseline's lies outside it. Without a baseline, quality
is shown but not judged. The 80 %, the 1 % and "a tie with something free does not pay" are our choice.

A claim (`summaries`) takes the verdict of its largest measured point (the last of the grid, closest to the paper's conditions)
at the largest scale that was measured; every point is listed with it. A failed point has no verdict.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from assay.evidence.record import Evidence
from assay.evidence.types import Estimate, Verdict, point_key

REACH = 0.8
QUALITY_MARGIN = 0.01
SCALES = ("smoke", "small", "full")


@dataclass(frozen=True)
class Judgement:
    verdict: Verdict
    reason: str  # one line


_UNITS = {"×": "x", "times": "x", "fold": "x", "percent": "%", "seconds": "s", "sec": "s"}
_MORE = ("throughput", "speed", "faster", "increase", "more", "higher", "gain", "improve")


def unit_name(unit: str) -> str:
    """One spelling a unit: "×" and "times" are "x", "percent" and "% of tokens" are "%", "seconds" is "s".

    >>> unit_name("times"), unit_name("percent"), unit_name("seconds")
    ('x', '%', 's')
    """
    first = (unit.split() or [""])[0]
    name = _UNITS.get(first.lower(), first.lower())
    return name if name in ("x", "%") or unit.strip() == first and first.lower() in _UNITS else unit.strip()


def judge(record: Evidence) -> Judgement:
    """The verdict on one record by the rule above. Raises ValueError for a record that failed: it has none.

    >>> from datetime import UTC, datetime
    >>> from assay.evidence.types import Estimate
    >>> record = Evidence(
    ...     claim="toy/speed-up", slug="toy", point={"n": 1}, scale="small", status="ok", paper_value=2.0, paper_unit="x", unit="x",
    ...     measured=Estimate(median=2.0, low=1.9, high=2.1), fingerprint="", machine={}, assay_version="", seed=0, command="",
    ...     seconds=1.0, created=datetime(2026, 1, 1, tzinfo=UTC))
    >>> print(judge(record).verdict)
    reproduced
    """
    if record.status != "ok":
        raise ValueError(f"a record with status {record.status!r} has no verdict")
    if record.needs:
        return Judgement(Verdict.NEEDS_HARDWARE, f"needs {', '.join(record.needs)}, which this machine does not have")
    assert record.measured is not None  # the record checks it
    seen = _say(record.measured, record.unit)
    claimed = claimed_ratio(record)
    if claimed is not None and claimed <= 1:
        return _judge_bound(record, claimed, seen)

    more_is_better = record.higher_is_better or record.kind == "trial"  # a speed-up, whatever the claim counts in
    gain = _gain(record.measured, no_gain(record), more_is_better)
    if gain is not None and gain[1] < 0:
        return Judgement(Verdict.REFUTED, f"{seen}: worse than the paper's baseline")
    if gain is not None and gain[0] <= 0:
        return Judgement(Verdict.DOES_NOT_PAY, f"{seen}: no difference from the paper's baseline that is not noise")
    free = _gain_over_free(record)
    if free is not None and free[0] <= 0:
        how = "is better" if free[1] < 0 else "is as good"
        against = f" ({_say(record.vs_free, 'x')} against it)" if record.vs_free else ""
        label = record.free_label or "the free baseline"
        return Judgement(
            Verdict.DOES_NOT_PAY, f"{seen} over the paper's baseline, but {label} {how} at no loss{against}"
        )
    if broken := _broken_quality(record):
        return Judgement(Verdict.DOES_NOT_PAY, f"{seen}, but {broken}")

    reached, paper = _reached(record, claimed)
    if reached is not None and reached[0 if gain is None else 1]:
        return Judgement(Verdict.REPRODUCED, f"{seen}, at least {REACH:.0%} of the paper's {paper}")
    if reached is not None and reached[2] and gain is None:
        return Judgement(Verdict.DIRECTION_HOLDS, f"{seen}: agrees with the paper's {paper}, but too wide to show it")
    if gain is None:
        short = f"short of the paper's {paper}" if paper else "the paper gives no number"
        return Judgement(Verdict.DOES_NOT_PAY, f"{seen}: {short}, and there is no baseline to show a gain")
    if reached is None:
        why = "no number" if record.paper_value is None else f"{record.paper_value:.4g} {record.paper_unit}, no ratio"
        return Judgement(Verdict.DIRECTION_HOLDS, f"{seen}: a gain; to compare it with, the paper gives {why}")
    return Judgement(Verdict.DIRECTION_HOLDS, f"{seen}: a gain, short of the paper's {paper}")


def claimed_ratio(record: Evidence) -> float | None:
    """The paper's number as a ratio, above 1 for a gain; None when it is not one or cannot be turned into one."""
    value, unit = record.paper_value, unit_name(record.paper_unit)
    if value is None or value <= 0:
        return None
    if unit == "x":
        return value if record.higher_is_better else 1 / value
    if unit == "%" and record.kind == "trial":
        if not record.higher_is_better:
            return 100 / value  # the share of the time that is left
        if value >= 100 or any(word in record.metric.lower() for word in _MORE):
            return 1 + value / 100
        return 1 / (1 - value / 100)
    return None


def no_gain(record: Evidence) -> float | None:
    """The value of `measured` that means "no gain"; None if it is unknown."""
    if record.kind == "trial" or unit_name(record.unit) == "x":
        return 1.0
    if record.baseline is not None:
        return record.baseline
    unit = unit_name(record.unit)
    if record.higher_is_better:
        return 0.0 if unit in ("%", "points") else None
    return 100 * QUALITY_MARGIN if unit == "%" and record.paper_value is None else None


def _gain(measured: Estimate, reference: float | None, higher_is_better: bool) -> tuple[float, float] | None:
    """How far the interval lies on the right side of `reference`, as (low, high); None without a reference."""
    if reference is None:
        return None
    if higher_is_better:
        return measured.low - reference, measured.high - reference
    return reference - measured.high, reference - measured.low


def _gain_over_free(record: Evidence) -> tuple[float, float] | None:
    if record.kind == "trial":
        return _gain(record.vs_free, 1.0, True) if record.vs_free else None
    assert record.measured is not None
    return _gain(record.measured, record.free, record.higher_is_better)


def _as_ratio(record: Evidence) -> tuple[float, float, float]:
    """(low, median, high) of a measured ratio, turned so that above 1 is a gain."""
    assert record.measured is not None
    ends = record.measured.low, record.measured.median, record.measured.high
    if record.kind == "trial" or record.higher_is_better:
        return ends
    low, median, high = (1 / end if end > 0 else float("inf") for end in reversed(ends))
    return low, median, high


def _judge_bound(record: Evidence, claimed: float, seen: str) -> Judgement:
    paper = f"{record.paper_value:.4g}{record.paper_unit}"
    if _as_ratio(record)[2] < claimed ** (1 / REACH):
        return Judgement(Verdict.REFUTED, f"{seen}: costs more than the paper's {paper}")
    if broken := _broken_quality(record):
        return Judgement(Verdict.DOES_NOT_PAY, f"{seen}, but {broken}")
    if _as_ratio(record)[0] < claimed ** (1 / REACH):
        return Judgement(Verdict.DIRECTION_HOLDS, f"{seen}: agrees with the paper's {paper}, but too wide to show it")
    return Judgement(Verdict.REPRODUCED, f"{seen}, within the paper's {paper}")


def _reached(record: Evidence, claimed: float | None) -> tuple[tuple[bool, bool, bool] | None, str]:
    """Whether the worse end of the interval, its median and its better end reach the paper's number, and that number in words.

    None where there is no number to compare with.
    """
    value = record.paper_value
    assert record.measured is not None
    if value is None:
        return None, ""
    paper = f"{value:.4g} {record.paper_unit}".strip() if unit_name(record.paper_unit) not in ("x", "%") else ""
    paper = paper or f"{value:.4g}{record.paper_unit}"
    low, median, high = record.measured.low, record.measured.median, record.measured.high
    if claimed is not None:
        low, median, high = (end - claimed**REACH for end in _as_ratio(record))
    elif record.kind == "trial":
        return None, ""
    elif record.higher_is_better:
        low, median, high = (end - value + (1 - REACH) * abs(value) for end in (low, median, high))
    else:
        low, median, high = (value + (1 / REACH - 1) * abs(value) - end for end in (high, median, low))
    return (low >= 0, median >= 0, high >= 0), paper


def _broken_quality(record: Evidence) -> str:
    """What is wrong with the quality, in words; empty when nothing is."""
    quality = record.quality
    if quality is None or quality.baseline is None:
        return ""
    loss = quality.baseline - quality.candidate
    loss = loss if quality.higher_is_better else -loss
    margin = QUALITY_MARGIN * (abs(quality.baseline) or 1.0)
    noise = quality.low is not None and quality.high is not None and quality.low <= quality.baseline <= quality.high
    if loss <= margin or noise:
        return ""
    return f"{quality.metric} is worse: {quality.candidate:.4g} against {quality.baseline:.4g}"


def _say(figure: Estimate, unit: str) -> str:
    ends = f" [{figure.low:.4g}, {figure.high:.4g}]" if figure.low != figure.high else ""
    name = unit_name(unit)
    return f"{figure.median:.4g}{name if name in ('x', '%') else f' {unit}'.rstrip()}{ends}"


@dataclass(frozen=True)
class Summary:
    """A claim on one machine: its verdict (None when every point failed), the point it comes from, and all points."""

    claim: str
    fingerprint: str
    verdict: Verdict | None
    reason: str
    deciding: Evidence
    points: tuple[Evidence, ...]

    @property
    def failed(self) -> tuple[Evidence, ...]:
        return tuple(point for point in self.points if point.status != "ok")

    @property
    def met(self) -> bool:
        """No point failed and the verdict is not against the claim (`needs other hardware` is not)."""
        return not self.failed and self.verdict not in (None, Verdict.DOES_NOT_PAY, Verdict.REFUTED)


def summaries(records: Iterable[Evidence]) -> list[Summary]:
    """Each claim's verdict on each machine, by the rule above; of a point measured twice the newest record counts."""
    groups: dict[tuple[str, str], list[Evidence]] = {}
    for record in records:
        groups.setdefault((record.claim, record.fingerprint), []).append(record)
    return [_summary(claim, fingerprint, group) for (claim, fingerprint), group in groups.items()]


def _summary(claim: str, fingerprint: str, records: list[Evidence]) -> Summary:
    judged = [record for record in records if record.verdict is not None]
    scale = max((record.scale for record in judged or records), key=SCALES.index)
    newest: dict[str, Evidence] = {}
    for record in sorted(records, key=lambda record: record.created):
        if record.scale == scale:
            newest[point_key(record.point)] = record
    points = tuple(sorted(newest.values(), key=lambda record: record.index))
    deciding = next((point for point in reversed(points) if point.verdict is not None), points[-1])
    reason = deciding.reason if deciding.verdict is not None else deciding.error
    larger = sum(point.index > deciding.index for point in points if point.status != "ok")
    if larger:
        reason += f"; {larger} larger point{'s' * (larger > 1)} failed"
    return Summary(claim, fingerprint, deciding.verdict, reason, deciding, points)
