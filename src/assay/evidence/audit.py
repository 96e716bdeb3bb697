"""Is somebody's before/after figure noise, and which rule of the measuring guide does it break?

`audit` judges what `assay.evidence.samples.read` found: the ratio with its 95 % interval, a verdict by a fixed rule, and the rules that
the samples themselves show to be broken. The verdict is

- "too few to say" while no such interval could exclude 1, whatever the samples were: fewer than six pairs (the sign test's), or fewer
  than about four and four unpaired samples (2 / C(n + m, n) > 5 %);
- "a difference" when the interval excludes 1;
- "noise" otherwise: the samples do not tell the two apart, which is not to say that they are equal.

Pairs are judged by `measure.stats.paired_ratio`, which widens for noise that lasts; unpaired samples by `measure.unpaired.unpaired_ratio`,
which takes them as independent. A broken rule is `grave` where the interval itself is then not to be believed. The thresholds are our
choice: two equal things, measured well, break a rule by chance in one of ten comparisons at most (a test).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

from assay.errors import InputError
from assay.evidence.samples import Samples, Series
from assay.measure.clock import NOISY_CORRELATION
from assay.measure.stats import Interval, log_ratios, paired_ratio, serial_correlation, trending
from assay.measure.unpaired import critical, unpaired_ratio

Verdict = Literal["a difference", "noise", "too few to say"]
LEAST_PAIRS = 6
LEAST_EACH = 4
LEVEL = 0.95
UNSEEN = (
    "threads",
    "power and clock rate",
    "other programs",
    "quality",
    "free baselines",
    "versions",
    "other processes",
)
MOST_BLOCKS = 1000
"""Longer series are looked at for trends and lasting noise by the medians of so many blocks."""


@dataclass(frozen=True)
class Broken:
    """A rule that the samples show to be broken: what was seen, and what to do about it."""

    rule: str
    seen: str
    do: str
    grave: bool = False


@dataclass(frozen=True)
class Arm:
    """One of the two in a line."""

    name: str
    n: int
    median: float


@dataclass(frozen=True)
class Audit:
    """What can be said of two series. `ratio` is before / after: for times, above 1 the candidate is faster."""

    format: str
    paired: bool
    before: Arm
    after: Arm
    ratio: Interval
    verdict: Verdict
    words: str
    broken: tuple[Broken, ...]
    unseen: tuple[str, ...] = UNSEEN

    @property
    def believable(self) -> bool:
        """Whether nothing was seen that makes the interval itself untrustworthy."""
        return not any(one.grave for one in self.broken)

    def document(self) -> dict[str, Any]:
        """As JSON: a bound that is not there is null."""
        found = asdict(self)
        found["ratio"] = {name: value if math.isfinite(value) else None for name, value in asdict(self.ratio).items()}
        return {**found, "believable": self.believable}


def audit(samples: Samples, *, paired: bool = False) -> Audit:
    """Judge two series. With `paired`, the i-th of one was taken beside the i-th of the other; an alternating order says so itself.

    Raises InputError when `paired` series differ in length.

    >>> from assay.evidence.samples import read
    >>> found = audit(read('{"before": [2.0, 2.1, 1.9, 2.2, 2.0, 2.1], "after": [1.0, 1.1, 1.0, 0.9, 1.05, 1.0]}'))
    >>> found.verdict, round(found.ratio.median, 2), found.paired
    ('a difference', 2.0, False)
    """
    before, after = samples.before, samples.after
    a, b = before.values, after.values
    if paired and len(a) != len(b):
        raise InputError(
            f"paired samples must be as many of each, got {len(a)} of {before.name!r} and {len(b)} of {after.name!r}"
        )
    paired = paired or samples.alternating
    try:
        ratio = paired_ratio(a, b) if paired else unpaired_ratio(a, b)
    except OverflowError:
        ratio = Interval(math.inf, 0.0, math.inf, 0)
    if not 0 < ratio.median < math.inf:
        raise InputError("the two series are too far apart for their ratio to be a number: are they in one unit?")
    enough = len(a) >= LEAST_PAIRS if paired else critical(*sorted((len(a), len(b))), LEVEL) > 0
    if not enough:
        verdict: Verdict = "too few to say"
    else:
        verdict = "noise" if ratio.contains(1.0) else "a difference"
    broken = tuple(_broken(samples, paired, ratio, enough))
    words = _words(verdict, ratio, paired, len(a), len(b), any(one.grave for one in broken))
    return Audit(samples.format, paired, _arm(before), _arm(after), ratio, verdict, words, broken)


def _arm(series: Series) -> Arm:
    return Arm(series.name, len(series.values), _median(series.values))


def _median(values: Sequence[float] | np.ndarray) -> float:
    """Of times, however large: the sum of the two in the middle may be no number any more."""
    ordered = sorted(map(float, values))
    low, high = ordered[(len(ordered) - 1) // 2], ordered[len(ordered) // 2]
    return low + (high - low) / 2


def _words(verdict: Verdict, ratio: Interval, paired: bool, n: int, m: int, grave: bool) -> str:
    if verdict == "too few to say":
        need = f"{LEAST_PAIRS} pairs" if paired else f"{LEAST_EACH} samples of each"
        have = f"{n} {'pair' if n == 1 else 'pairs'}" if paired else f"{n} and {m} samples"
        return f"too few to say: {have}; with fewer than {need} no 95 % interval that assumes nothing of the noise can exclude 1"
    bounds = f"the 95 % interval from {ratio.low:.4g} to {ratio.high:.4g}"
    if verdict == "noise":
        return f"noise: {bounds} includes 1, so these samples do not tell the two apart"
    way = "the candidate takes less" if ratio.median > 1 else "the candidate takes more"
    said = f"a difference: {bounds} excludes 1; {way}"
    return f"{said}. But do not believe it yet: a rule is broken that the interval rests on" if grave else said


def _broken(samples: Samples, paired: bool, ratio: Interval, enough: bool) -> list[Broken]:
    both = (samples.before, samples.after)
    a, b = (one.values for one in both)
    found = []
    if not enough:
        found.append(
            Broken("enough samples", f"there are {len(a)} and {len(b)}", "take at least ten of each, alternately", True)
        )
    if samples.order == "blocks":
        found.append(
            Broken(
                "interleaved",
                "all samples of one were taken before all of the other: whatever changed in between counts as the candidate's",
                "run the two in turn (A B, B A, A B ...) in one process",
            )
        )
    if samples.order == "A B A B" and len(a) > 1:
        found.append(
            Broken(
                "changing order",
                "the same one always ran first: what the first run leaves behind (caches, heat) always meets the second",
                "let the order change from round to round: A B, B A, A B ...",
            )
        )
    if len(a) != len(b):
        found.append(
            Broken(
                "equal counts",
                f"{len(a)} samples of the baseline, {len(b)} of the candidate: they cannot pair up, and one may have been cut short",
                "take as many of each, and leave none out",
            )
        )
    found += _of_units_and_copies(both, ratio)
    for one in both:
        found += _of_series(one, paired)
    if paired:
        found += _of_pairs(log_ratios(a, b))
    found += _of_statistics(both, ratio)
    return found


def _of_units_and_copies(both: tuple[Series, Series], ratio: Interval) -> list[Broken]:
    found = []
    a, b = (np.asarray(one.values) for one in both)
    if len(a) == len(b) >= 3 and all(len(np.unique(one)) > len(one) / 2 for one in (a, b)):
        quotients = np.log(a) - np.log(b)
        if np.ptp(quotients) < 1e-9:
            same = (
                "the two series are identical"
                if abs(quotients[0]) < 1e-9
                else "one series is the other times a constant"
            )
            found.append(
                Broken("two measurements", f"{same}: they were not measured apart", "measure the candidate", True)
            )
    thousands = math.log10(ratio.median) / 3
    if abs(thousands) > 0.5 and abs(thousands - round(thousands)) * 3 < 0.5:
        times = f"{10 ** (3 * abs(round(thousands))):,}"
        found.append(
            Broken("one unit", f"the two differ by about {times} times, as ms and s do", "write both in one unit", True)
        )
    return found


def _of_series(one: Series, paired: bool) -> list[Broken]:
    found = []
    values = np.asarray(one.values)
    n, median, name = len(values), _median(values), _short(one.name)
    if one.failed:
        found.append(
            Broken(
                "runs that succeed",
                f"{one.failed} of the {n} runs of {name} ended with an error",
                "mend it first",
                True,
            )
        )
    warm = _warming(np.log(values))
    if warm:
        slower = _median(values[:warm]) / _median(values[warm:])
        found.append(
            Broken(
                "warm-up",
                f"the first {'sample' if warm == 1 else f'{warm} samples'} of {name} took {slower:.2f} times as long as the rest",
                "run both until they get no faster, and count none of these runs",
            )
        )
    rest = _blocks(np.log(values[warm:]))
    drifts = trending(rest)
    if drifts:
        rises = "rise" if np.median(rest[len(rest) // 2 :]) > np.median(rest[: len(rest) // 2]) else "fall"
        found.append(
            Broken(
                "no drift",
                f"the samples of {name} {rises} through the run: the machine changed meanwhile (heat, clock rate, others)",
                "interleave the two, so that drift meets both alike",
                grave=not paired,
            )
        )
    elif not paired and _lasting(rest):
        found.append(
            Broken(
                "independent samples",
                f"neighbouring samples of {name} are alike (correlation {serial_correlation(rest):.2f}): there are fewer than they seem, "
                "and the interval is too narrow",
                "interleave the two, and repeat in fresh processes",
                True,
            )
        )
    found += _of_shape(values, median, name, warm)
    return found


def _of_shape(values: np.ndarray, median: float, name: str, warm: int) -> list[Broken]:
    """Rounded timers, two humps, outliers."""
    n = len(values)
    if n < 10:
        return []
    distinct = np.unique(values)
    if len(distinct) * 2 <= n:
        step = (
            f"in steps of about {float(np.diff(distinct).min()) / median:.2g} of the median"
            if len(distinct) > 1
            else "all alike"
        )
        return [
            Broken(
                "a fine timer",
                f"the {n} samples of {name} have {len(distinct)} different {'value' if len(distinct) == 1 else 'values'}, {step}",
                "time more work at once, or keep all digits (perf_counter_ns)",
            )
        ]
    logs = np.sort(np.log(values[warm:]))
    split = _humps(logs)
    if split:
        low, high = math.exp(np.median(logs[:split])), math.exp(np.median(logs[split:]))
        return [
            Broken(
                "one thing measured",
                f"the samples of {name} fall into two groups, around {low:.4g} and {high:.4g}: two things were measured",
                "find what switches between them (a cache, a core, a clock rate, a code path), and time each alone",
            )
        ]
    first, third = np.quantile(logs, [0.25, 0.75])
    far = int(np.sum(logs > third + 3 * (third - first)))
    if far > n / 1000:  # of tens of thousands, a few always do
        return [
            Broken(
                "a quiet machine",
                f"{far} of {n} samples of {name} lie far out, up to {float(np.exp(logs[-1])) / median:.3g} times the median",
                "report the median, which bears them; look at what else ran",
            )
        ]
    return []


def _of_pairs(logs: np.ndarray) -> list[Broken]:
    logs = _blocks(logs)
    if trending(logs):
        return [
            Broken(
                "no drift",
                "the ratio itself rises or falls over the pairs: it is not one number",
                "warm both up for longer; see which of the two changes",
                True,
            )
        ]
    if len(logs) >= 20 and serial_correlation(logs) >= NOISY_CORRELATION:
        return [
            Broken(
                "independent samples",
                f"neighbouring ratios are alike (correlation {serial_correlation(logs):.2f}), by more than the interval allows for",
                "repeat in fresh processes",
                True,
            )
        ]
    return []


def _of_statistics(both: Sequence[Series], ratio: Interval) -> list[Broken]:
    """A mean or a minimum in the place of the median, where names or the file's own summary say so."""
    found = []
    words = {
        "mean": "mean",
        "avg": "mean",
        "average": "mean",
        "min": "minimum",
        "minimum": "minimum",
        "best": "minimum",
    }
    named = {
        words[part]
        for one in both
        for part in one.name.lower().replace("_", " ").replace("-", " ").replace("(", " ").replace(")", " ").split()
        if part in words
    }
    do = "report the median of single runs, with its interval"
    for word in sorted(named):
        found.append(Broken("the median", f"by their names the values are of a {word} each, not single runs", do))
    for key, word in (("mean", "means"), ("min", "minima")):
        if all(key in one.stated for one in both):
            stated = both[0].stated[key] / both[1].stated[key]
            if not ratio.contains(stated):
                seen = f"the ratio of the {word} that the file states is {stated:.4g}, outside the interval of the median ratio"
                found.append(Broken("the median", seen, do))
    return found


def _warming(logs: np.ndarray) -> int:
    """How many of the first samples are slower than the rest by more than noise: 0, 1, or the first quarter."""
    n = len(logs)
    if n < 8:
        return 0
    rest = logs[1:]
    spread = 1.4826 * float(np.median(np.abs(rest - np.median(rest))))
    if n >= 12:
        k = min(n // 4, MOST_BLOCKS)
        first, later = logs[:k], logs[k:]
        slower = k * len(later) - int(np.searchsorted(np.sort(later), first, side="left").sum())
        if slower < critical(*sorted((k, len(later))), 0.99) and not trending(_blocks(later)):
            return k
    return int(logs[0] > rest.max() and logs[0] - np.median(rest) > 6 * spread)


def _lasting(logs: np.ndarray) -> bool:
    """Whether neighbours are alike by more than 1 in 200 independent series would be."""
    n = len(logs)
    return n >= 12 and serial_correlation(logs) > min(1 / n + 2.58 / math.sqrt(n) * (1 + 4 / n), 0.94)


def _humps(logs: np.ndarray) -> int:
    """Where sorted samples fall into two groups, each at least a fifth of them; 0 where they do not (Ashman's D, and a gap)."""
    n = len(logs)
    edge = max(n // 5, 3)
    if n < 12:
        return 0
    gaps = np.diff(logs)[edge - 1 : n - edge]
    split = edge + int(np.argmax(gaps))
    below, above = logs[:split], logs[split:]
    within = math.sqrt((float(below.var()) + float(above.var())) / 2)
    apart = float(above.mean() - below.mean())
    return split if apart > 6 * within and gaps.max() > 2 * within else 0


def _blocks(values: np.ndarray) -> np.ndarray:
    """The values in their order, or the medians of `MOST_BLOCKS` blocks where they are more."""
    if len(values) <= MOST_BLOCKS:
        return values
    size = len(values) // MOST_BLOCKS
    return np.asarray(np.median(values[: size * MOST_BLOCKS].reshape(MOST_BLOCKS, size), axis=1))


def _short(name: str) -> str:
    return repr(name if len(name) <= 60 else f"{name[:57]}...")
