"""The written rule that compares measurements with a paper's claim. Verdicts are computed when records are read, never stored.

For one point (`judge`) the first rule that fits decides:

 1. The machine lacks what the experiment needs: `needs other hardware`.
 2. The figure is arithmetic on sizes chosen beforehand (declared): `computed`.
 3. A trained arm does not beat its trivial floor, has fewer than three seeds, or its learning rate was not searched: the
    comparison is void, `undecided`.
 4. Times were taken on a busy machine, or the candidate differed from itself: `undecided`. Noise decides nothing about times.
 5. The outcome that was said beforehand to refute the claim came about: `refuted here`.
 6. The 95 % interval of the gain lies wholly below no gain: against the paper's baseline `refuted here`, against `free` or `exact`
    `does not pay here`. A certain loss to one of them decides, however uncertain the others are.
 7. Against the paper's baseline, then `free`, then `exact`, the interval lies around no gain: wholly below 5 %, `does not pay here`;
    reaching further, `undecided`.
 8. Quality (next paragraph) is not shown, lost, or undecided: `quality not shown`, `does not pay here`, `undecided`.
 9. The median reaches 80 % of the paper's gain: `reproduced`. Otherwise, or where the paper gives no number: `direction holds`.

*The form of a claim* is declared in the catalogue, and so is its direction; no word of its text is interpreted.
`ratio`: value over the baseline's, no gain is 1. `saved`: per cent less of something, 60 % saved is 2.5x. `added`: per cent more, 60 %
added is 1.6x. `points`: a difference, no gain is 0. `level`: an absolute figure, judged as its gain over the measured baseline, never
by its own size. 80 % is taken in log terms for the first three (13.5x is reached at 13.5 ** 0.8 = 8.0x), directly for the others.
For `bound` and `about` rules 6, 7 and 9 do not apply:
`bound`: a cost or a loss kept within the paper's number, or a share kept above it (both with 25 %, in log terms for "x", and with the
declared tolerance in its place where there is one): the whole interval within is `reproduced`, wholly outside `refuted here`, else
`undecided`. `about`: two-sided, "comparable" too: wholly within the declared tolerance `reproduced`, wholly beyond it on the worse side
`refuted here`, on the better side `direction holds`, else `undecided`.

*Quality* is non-inferiority. The guard's margin was fixed beforehand; the bad end of the interval must lie within it. Beyond it with
both ends: the quality is lost, `does not pay here`; with one end: `undecided`. Missing, or without the controls that the guard does not
excuse, or not sensitive (with the method deleted, or a random choice in its place, no more than the margin is lost): `quality not
shown`. Where the claim's own metric is a quality, its controls must be worse than the whole interval, else `quality not shown`.

For a claim (`summaries`) the point decides that was named beforehand as the paper's own settings, at the largest scale measured. Stale
records (their code has changed) decide nothing. All fresh runs of one machine on that point count: where some say it pays and others
that it does not, the claim is `contested`; undecided runs yield to decided ones. Machines stand side by side. The 80 %, the 25 %, the
5 % and "a tie with something free does not pay" are our choice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from assay.evidence import hashes
from assay.evidence.record import Evidence, QualityRecord
from assay.evidence.types import Estimate, Verdict, point_key
from assay.experiments.core import CONTROLS, FLOOR_MARGIN, LEAST_SEEDS

REACH = 0.8
BOUND = 1.25
MATERIAL = 0.05
SCALES = ("smoke", "small", "full")
PAYS = (Verdict.REPRODUCED, Verdict.DIRECTION_HOLDS)
CONTROL_NAMES = {"deleted": "the method deleted", "random": "a random choice", "rival": "the cheapest rival"}


@dataclass(frozen=True)
class Judgement:
    """A verdict, and which rule led to it."""

    verdict: Verdict
    reason: str  # one line


_UNITS = {"×": "x", "times": "x", "fold": "x", "percent": "%", "seconds": "s", "sec": "s"}


def unit_name(unit: str) -> str:
    """One spelling a unit: "×" and "times" are "x", "percent" and "% of tokens" are "%", "seconds" is "s".

    >>> unit_name("times"), unit_name("percent"), unit_name("seconds")
    ('x', '%', 's')
    """
    first = (unit.split() or [""])[0]
    name = _UNITS.get(first.lower(), first.lower())
    return name if name in ("x", "%") or unit.strip() == first and first.lower() in _UNITS else unit.strip()


def judge(record: Evidence) -> Judgement:
    """The verdict on one record by the rule above, whatever its age. Raises ValueError for a record that failed: it has none.

    >>> from datetime import UTC, datetime
    >>> from assay.evidence.types import Estimate
    >>> record = Evidence(
    ...     claim="toy/size", slug="toy", point={"n": 1}, scale="small", status="ok", kind="figure", form="about", paper_value=2.0,
    ...     tolerance=0.5, paper_unit="x", unit="x", measured=Estimate(median=2.0, low=1.9, high=2.1), fingerprint="",
    ...     assay_version="", seed=0, command="", seconds=1.0, created=datetime(2026, 1, 1, tzinfo=UTC))
    >>> print(judge(record).verdict)
    reproduced
    """
    if record.status != "ok":
        raise ValueError(f"a record with status {record.status!r} has no verdict")
    if record.needs:
        return Judgement(Verdict.NEEDS_HARDWARE, f"needs {', '.join(record.needs)}, which this machine does not have")
    assert record.measured is not None  # the record checks it
    seen = say(record.measured, record.unit)
    if record.computed:
        return Judgement(Verdict.COMPUTED, f"{seen}: {record.computed}")
    if void := void_training(record):
        return Judgement(Verdict.UNDECIDED, f"{seen}, but the comparison is void: {void}")
    if record.spoilt:
        return Judgement(Verdict.UNDECIDED, f"{seen}, but {record.noise or 'the machine was busy with other things'}")
    if record.refuted:
        return Judgement(Verdict.REFUTED, f"{seen}: what was to refute the claim happened: {record.refuted_if}")
    if record.form == "bound":
        return _bound(record, seen)
    if record.form == "about":
        return _about(record, seen)

    gain = gained(record)
    if gain is None:
        return Judgement(Verdict.UNDECIDED, f"{seen}: an absolute figure without a measured baseline shows no gain")
    rivals = _rivals(record, gain)
    for label, (_, high), none in rivals:
        if high < none:
            worse = f"{seen}: worse than the paper's baseline" if label == "" else f"{seen}, but {label} is better"
            return Judgement(Verdict.REFUTED if label == "" else Verdict.DOES_NOT_PAY, worse)
    for label, (low, high), none in rivals:
        if low > none:
            continue
        text = "no difference from the paper's baseline" if label == "" else f"no gain against {label}"
        if high < none + _material(record):
            return Judgement(Verdict.DOES_NOT_PAY, f"{seen}: {text}")
        return Judgement(Verdict.UNDECIDED, f"{seen}: {text} was shown, and none was ruled out")
    if (broken := judge_quality(record)) is not None:
        return Judgement(broken.verdict, f"{seen}, but {broken.reason}")
    if gain.paper is None:
        return Judgement(Verdict.DIRECTION_HOLDS, f"{seen}: a gain; the paper gives no number to compare it with")
    paper = figure(record.paper_value, record.paper_unit)
    if record.form == "level":  # its gain is judged, not its size
        seen = f"{seen} over {figure(record.baseline, record.unit)}"
        paper = f"{paper} over {figure(record.paper_baseline, record.paper_unit)}"
    if gain.median >= gain.reach:
        return Judgement(Verdict.REPRODUCED, f"{seen}, at least {REACH:.0%} of the paper's {paper}")
    return Judgement(Verdict.DIRECTION_HOLDS, f"{seen}: a gain, short of the paper's {paper}")


@dataclass(frozen=True)
class Gain:
    """A claim's figure as a gain, the more the better: its interval, what no gain is, and the paper's number on the same scale."""

    low: float
    median: float
    high: float
    none: float
    paper: float | None
    log: bool

    @property
    def reach(self) -> float:
        """What counts as reproduced."""
        assert self.paper is not None
        return self.paper**REACH if self.log else REACH * self.paper


def gained(record: Evidence) -> Gain | None:
    """What was measured as a gain; None for an absolute level without a measured baseline, and for the forms that promise no gain."""
    assert record.measured is not None
    if record.form in ("bound", "about") or record.form == "level" and record.baseline is None:
        return None
    ends = [as_gain(record, end) for end in (record.measured.low, record.measured.median, record.measured.high)]
    low, median, high = sorted(ends)
    paper = None
    if record.paper_value is not None and (record.form != "level" or record.paper_baseline is not None):
        reference = record.paper_baseline if record.form == "level" else None
        paper = as_gain(record, record.paper_value, reference)
    return Gain(low, median, high, 1.0 if is_log(record) else 0.0, paper, is_log(record))


def is_log(record: Evidence) -> bool:
    """Whether gains of this claim multiply (ratios) rather than add."""
    return record.form in ("ratio", "saved", "added")


def as_gain(record: Evidence, value: float, reference: float | None = None) -> float:
    """A value in the claim's unit as a gain: a ratio above 1 or a difference above 0 where it is better than the baseline."""
    if record.form == "ratio":
        better = value if record.higher_is_better else (1 / value if value > 0 else float("inf"))
    elif record.form == "saved":
        better = 100 / (100 - value) if value < 100 else float("inf")
    elif record.form == "added":
        better = 1 + value / 100
    else:
        base = 0.0 if record.form == "points" else record.baseline if reference is None else reference
        assert base is not None
        better = value - base if record.higher_is_better else base - value
    return better


def _material(record: Evidence) -> float:
    """A gain that is worth having: 5 %; of differences, 5 % of the paper's gain."""
    if is_log(record):
        return MATERIAL
    gain = gained(record)
    return MATERIAL * abs(gain.paper) if gain is not None and gain.paper is not None else 0.0


def _rivals(record: Evidence, gain: Gain) -> list[tuple[str, tuple[float, float], float]]:
    """The paper's baseline (named "") and the operator's two: the interval of the gain over each, and what no gain is there."""
    found = [("", (gain.low, gain.high), gain.none)]
    for arm, label in (("free", record.free_label), ("exact", record.exact_label)):
        if record.kind == "trial" and arm in record.ratios:
            ratio = record.ratios[arm]
            found.append((f"{label or arm} ({say(ratio, 'x')})", (ratio.low, ratio.high), 1.0))
        value = getattr(record, arm)
        if record.kind == "figure" and value is not None:
            text = f"{label or arm} ({figure(value, record.unit)})"
            found.append((text, (gain.low, gain.high), as_gain(record, value)))
    return found


def _bound(record: Evidence, seen: str) -> Judgement:
    value = record.paper_value
    if value is None and record.tolerance is None:
        return Judgement(Verdict.UNDECIDED, f"{seen}: neither the paper nor the experiment says within what")
    up = -1 if record.higher_is_better else 1
    if record.tolerance is not None:
        limit = (value or 0.0) + up * record.tolerance
    elif unit_name(record.paper_unit) == "x" and value:
        limit = (min if record.higher_is_better else max)(value**BOUND, value ** (1 / BOUND))
    else:
        limit = (value or 0.0) + up * (BOUND - 1) * abs(value or 0.0)
    assert record.measured is not None
    good, bad = (record.measured.low, record.measured.high)[::up]
    promise = (
        f"the paper's {figure(value, record.paper_unit)}"
        if value is not None
        else f"{record.tolerance:.4g}{record.unit}"
    )
    if up * good > up * limit:
        return Judgement(Verdict.REFUTED, f"{seen}: not within {promise}")
    if up * bad > up * limit:
        return Judgement(Verdict.UNDECIDED, f"{seen}: agrees with {promise}, but too wide to show it")
    if (broken := judge_quality(record, needed=record.quantity in ("time", "memory"))) is not None:
        return Judgement(broken.verdict, f"{seen}, but {broken.reason}")
    return Judgement(Verdict.REPRODUCED, f"{seen}, within {promise}")


def _about(record: Evidence, seen: str) -> Judgement:
    if record.tolerance is None or record.paper_value is None:
        return Judgement(Verdict.UNDECIDED, f"{seen}: how far 'about' reaches was not said beforehand")
    assert record.measured is not None
    low, high = record.paper_value - record.tolerance, record.paper_value + record.tolerance
    promise = f"the paper's {figure(record.paper_value, record.paper_unit)} within {record.tolerance:.4g}"
    above, below = record.measured.low > high, record.measured.high < low
    if above or below:
        if above == record.higher_is_better:
            if (broken := judge_quality(record, needed=record.quantity in ("time", "memory"))) is not None:
                return Judgement(broken.verdict, f"{seen}, but {broken.reason}")
            return Judgement(Verdict.DIRECTION_HOLDS, f"{seen}: better than {promise}")
        return Judgement(Verdict.REFUTED, f"{seen}: worse than {promise}")
    if not (low <= record.measured.low and record.measured.high <= high):
        return Judgement(Verdict.UNDECIDED, f"{seen}: too wide to show {promise}")
    if (broken := judge_quality(record, needed=record.quantity in ("time", "memory"))) is not None:
        return Judgement(broken.verdict, f"{seen}, but {broken.reason}")
    return Judgement(Verdict.REPRODUCED, f"{seen}: {promise}")


def judge_quality(record: Evidence, *, needed: bool = True) -> Judgement | None:
    """What stands in the way of the claim on the side of quality; None when nothing does.

    With `needed` false (claims that promise no gain, and are not about time or memory) a record without a guard passes.
    """
    if record.controls:
        return _judge_controls(record)
    quality = record.quality
    if quality is None:
        return Judgement(Verdict.QUALITY_NOT_SHOWN, "no quality was measured") if needed else None
    if quality.margin is None or quality.baseline is None:
        return Judgement(Verdict.QUALITY_NOT_SHOWN, f"no margin was fixed for the {quality.metric}")
    if missing := [name for name in CONTROLS if name not in quality.controls and name not in quality.without]:
        return Judgement(Verdict.QUALITY_NOT_SHOWN, f"the {quality.metric} has no control: {', '.join(missing)}")
    margin = allowed_loss(quality)
    for name in ("deleted", "random"):
        if name in quality.controls and loss(quality, quality.controls[name]) <= margin:
            shown = f"{quality.controls[name]:.4g} against {quality.baseline:.4g}"
            text = f"the {quality.metric} is not sensitive: with {CONTROL_NAMES[name]} it is {shown}"
            return Judgement(Verdict.QUALITY_NOT_SHOWN, text)
    ends = [end if end is not None else quality.candidate for end in (quality.low, quality.high)]
    losses = sorted(loss(quality, end) for end in ends)
    against = f"{quality.candidate:.4g} against {quality.baseline:.4g}, where {margin:.2g} may be lost"
    if losses[0] > margin:
        return Judgement(Verdict.DOES_NOT_PAY, f"{quality.metric} is worse: {against}")
    if not losses[1] <= margin:
        return Judgement(Verdict.UNDECIDED, f"the {quality.metric} is too uncertain: {against}")
    return None


def _judge_controls(record: Evidence) -> Judgement | None:
    """The controls of a figure that is itself a quality: the whole interval must be better than the method deleted and random."""
    assert record.measured is not None
    for name in ("deleted", "random"):
        if name in record.controls:
            better = record.measured.low > record.controls[name]
            if not record.higher_is_better:
                better = record.measured.high < record.controls[name]
            if not better:
                seen = figure(record.controls[name], record.unit)
                text = f"{CONTROL_NAMES[name]} does as well ({seen}): the figure is not the method's"
                return Judgement(Verdict.QUALITY_NOT_SHOWN, text)
    return None


def loss(quality: QualityRecord, value: float) -> float:
    """How much worse than the baseline a value is, in the metric's unit."""
    assert quality.baseline is not None
    return quality.baseline - value if quality.higher_is_better else value - quality.baseline


def allowed_loss(quality: QualityRecord) -> float:
    """The guard's margin in the metric's unit."""
    assert quality.margin is not None
    assert quality.baseline is not None
    return quality.margin * (abs(quality.baseline) if quality.relative else 1.0)


def void_training(record: Evidence) -> str:
    """Why a comparison of trained arms is void; empty when it is not."""
    for name, arm in record.trained.items():
        if len(arm.scores) < LEAST_SEEDS:
            return f"{name} was trained with {len(arm.scores)} seed{'s' * (len(arm.scores) > 1)}, not {LEAST_SEEDS}"
        if len(set(arm.rates)) < 2:
            return f"the learning rate of {name} was not searched"
        worst = min(arm.scores) if arm.higher_is_better else max(arm.scores)
        way = arm.floor - arm.best
        if not way or not (arm.floor - worst) / way >= FLOOR_MARGIN:
            return f"{name} ({worst:.4g}) hardly beats {arm.floor_name} ({arm.floor:.4g}): it was not trained"
    return ""


def remarks(record: Evidence) -> list[str]:
    """What a reader must not miss: the recorded arms that do better than the paper's method, and the controls that do as well."""
    found = []
    usual = {"baseline", "free", "exact", "candidate again"}
    for arm, ratio in record.ratios.items():
        if arm not in usual and ratio.high < 1:
            found.append(f"{arm} is faster ({1 / ratio.median:.3g}x)")
    if record.measured is not None and record.kind == "figure":
        for name, value in record.arms.items():
            if value > record.measured.high if record.higher_is_better else value < record.measured.low:
                found.append(f"{name} does better ({figure(value, record.unit)})")
        for name, value in record.controls.items():
            if value >= record.measured.low if record.higher_is_better else value <= record.measured.high:
                found.append(f"{CONTROL_NAMES.get(name, name)} does as well ({figure(value, record.unit)})")
    quality = record.quality
    if quality is not None and quality.baseline is not None:
        for name, value in quality.controls.items():
            if loss(quality, value) <= loss(quality, quality.candidate):
                who = quality.rival if name == "rival" and quality.rival else CONTROL_NAMES.get(name, name)
                found.append(f"{who} keeps as much quality at this budget ({quality.metric} {value:.4g})")
    return found


def say(seen: Estimate, unit: str) -> str:
    """A figure with its interval."""
    ends = f" [{seen.low:.4g}, {seen.high:.4g}]" if seen.low != seen.high else ""
    return figure(seen.median, unit) + ends


def figure(value: float | None, unit: str) -> str:
    """A number with its unit, four digits; "-" for None.

    >>> figure(2.04567, "x"), figure(None, "x")
    ('2.046x', '-')
    """
    if value is None:
        return "-"
    name = unit_name(unit)
    return f"{value:.4g}{name}" if name in ("x", "%") else f"{value:.4g} {unit}".rstrip()


@dataclass(frozen=True)
class Summary:
    """A claim on one machine: its verdict, the record it comes from, all points, and all fresh runs of the deciding one.

    `verdict` is None when nothing decides: every run failed, or is stale.
    """

    claim: str
    fingerprint: str
    verdict: Verdict | None
    reason: str
    deciding: Evidence
    points: tuple[Evidence, ...]
    runs: tuple[Evidence, ...] = ()
    stale: bool = False

    @property
    def word(self) -> str:
        """The verdict in a word: also "stale", or how the deciding run failed."""
        if self.verdict is not None:
            return self.verdict.value
        return "stale" if self.stale else str(self.deciding.status)

    @property
    def failed(self) -> tuple[Evidence, ...]:
        return tuple(point for point in self.points if point.status != "ok")

    @property
    def met(self) -> bool:
        """No point failed and the verdict is not against the claim (`needs other hardware` and `computed` are not)."""
        fine = (*PAYS, Verdict.NEEDS_HARDWARE, Verdict.COMPUTED)
        return not self.failed and self.verdict in fine


def summaries(records: Iterable[Evidence], *, is_stale: Callable[[Evidence], bool] = hashes.is_stale) -> list[Summary]:
    """Each claim's verdict on each machine, by the rule above; of a point measured twice the newest record is listed."""
    groups: dict[tuple[str, str], list[Evidence]] = {}
    for record in records:
        groups.setdefault((record.claim, record.fingerprint), []).append(record)
    return [_summary(claim, machine, group, is_stale) for (claim, machine), group in groups.items()]


def _summary(claim: str, fingerprint: str, records: list[Evidence], is_stale: Callable[[Evidence], bool]) -> Summary:
    records = sorted(records, key=lambda record: record.created)
    fresh = [record for record in records if record.status == "ok" and not is_stale(record)]
    known = [r for r in fresh if r.decides] or fresh or [r for r in records if r.status == "ok"] or records
    scale = max((record.scale for record in known), key=SCALES.index)
    newest = {point_key(record.point): record for record in records if record.scale == scale}
    points = tuple(sorted(newest.values(), key=lambda record: record.index))
    runs = tuple(record for record in fresh if record.scale == scale and record.decides)
    if not runs:
        deciding = next((point for point in points if point.decides), points[-1])
        if deciding.status != "ok":
            return Summary(claim, fingerprint, None, deciding.error, deciding, points)
        if is_stale(deciding):
            why = f"what ran has changed since: {', '.join(hashes.changes(deciding)[:3])}"
            return Summary(claim, fingerprint, None, why, deciding, points, stale=True)
        return Summary(
            claim, fingerprint, Verdict.UNDECIDED, "the point that decides was not measured", deciding, points
        )
    verdict, reason, deciding = _of_runs(runs)
    return Summary(claim, fingerprint, verdict, reason, deciding, points, runs)


def _of_runs(runs: tuple[Evidence, ...]) -> tuple[Verdict, str, Evidence]:
    """One verdict of several runs of a point on one machine: the newest decided one, unless they disagree about whether it pays."""
    judged = [(judge(run), run) for run in runs]
    decided = [(found, run) for found, run in judged if found.verdict is not Verdict.UNDECIDED] or judged[-1:]
    camps = {Verdict.DIRECTION_HOLDS if f.verdict in PAYS else f.verdict for f, _ in decided}
    newest, run = decided[-1]
    if len(camps) > 1:
        listed = "; ".join(
            f"{r.created:%Y-%m-%d}: {f.verdict.value}, {say(r.measured, r.unit)}" for f, r in decided if r.measured
        )
        return Verdict.CONTESTED, f"runs on this machine disagree: {listed}", run
    weaker = [(f, r) for f, r in decided if f.verdict is Verdict.DIRECTION_HOLDS]
    if weaker and newest.verdict is Verdict.REPRODUCED:
        newest, run = weaker[-1]
    return newest.verdict, newest.reason, run
