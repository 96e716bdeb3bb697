"""When a loss counts as shown to be small enough: the bad end of its interval must lie within the limit.

The rule, fixed before anything of the proof is seen:

- The proof has text of its own, which no step of the search saw. Its sample is the document: each window holds documents of its own,
  and the intervals are Student's t over the windows' differences (a percentile bootstrap of so few would be too narrow).
- A candidate *holds* if the bad end of its interval is at most the limit, it has *lost* if even the good end is above the
  limit, and is *undecided* otherwise. Where there are several paths, all must hold, and one that has lost is enough.
- There are two looks: after half of the documents and, if it is then undecided, after all of them. How many there are follows from
  the text and from the time that a document takes, never from what was found on it.
- If the best candidate does not hold, one more may be tried. Every look has its own share of the 2.5 % by which a candidate
  at the limit, or beyond it, may be accepted: `SPENT`, whose sum it is (Bonferroni's bound, so it needs no independence).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

from assay.measure.stats import Interval, student_t

ALPHA = 0.025  # of ever accepting a candidate whose true loss is at the limit
SPENT: tuple[tuple[float, ...], ...] = ((0.01, 0.01), (0.0025, 0.0025))  # by candidate, in order of trying, and look
LEAST_DOCUMENTS = 8  # of a look: with fewer, one odd document decides
MOST_DOCUMENTS = 32

Verdict = Literal["holds", "lost", "undecided"]


@dataclass(frozen=True)
class Look:
    """What one look found: the worst path's relative perplexity increase, with the interval that decides at this look."""

    documents: int
    path: str
    drop: float
    low: float
    high: float
    level: float  # of the interval, two-sided
    verdict: Verdict

    def document(self) -> dict[str, Any]:
        return asdict(self)


def looks(documents: int) -> list[int]:
    """After how many documents to look: half and all of them, or only all where a half is too few; none where all are.

    >>> looks(30), looks(12), looks(5)
    ([15, 30], [12], [])
    """
    if documents < LEAST_DOCUMENTS:
        return []
    return [documents // 2, documents] if documents >= 2 * LEAST_DOCUMENTS else [documents]


def shares(attempt: int, count: int) -> list[float]:
    """The one-sided error that each of `count` looks at the candidate number `attempt` (from 0) may make; none after the last.

    >>> shares(0, 2), shares(1, 1)
    ([0.01, 0.01], [0.005])
    """
    spent = SPENT[attempt]
    return list(spent) if count == len(spent) else [sum(spent)] * count


def mean_interval(values: Sequence[float], alpha: float) -> Interval:
    """Mean of independent values with Student's interval that each end misses with probability `alpha`.

    A single value says nothing about its error: minus and plus infinity. Values that are not finite: infinity throughout.
    """
    found = np.asarray(values, dtype=np.float64)
    if not len(found) or not np.isfinite(found).all():
        return Interval(math.inf, math.inf, math.inf, len(found))
    mean = float(found.mean())
    if len(found) == 1:
        return Interval(mean, -math.inf, math.inf, 1)
    half = student_t(1 - 2 * alpha, len(found) - 1) * float(found.std(ddof=1)) / math.sqrt(len(found))
    return Interval(mean, mean - half, mean + half, len(found))


def verdict_of(intervals: Sequence[Interval], limit: float) -> Verdict:
    """Of losses with their intervals: all must hold, and one that has lost is enough. NaN never holds."""
    if intervals and all(found.high <= limit for found in intervals):
        return "holds"
    if any(found.low > limit or math.isnan(found.median) for found in intervals):
        return "lost"
    return "undecided"


def look(differences: Mapping[str, Sequence[float]], alpha: float, limit: float) -> Look:
    """Judge what a look found: by path, each document's difference in nats per token, candidate minus untouched model."""
    found = {path: increase(mean_interval(values, alpha)) for path, values in differences.items()}
    worst = max(found, key=lambda path: found[path].high)
    drop = found[worst]
    verdict = verdict_of(list(found.values()), limit)
    return Look(drop.n, worst, drop.median, drop.low, drop.high, 1 - 2 * alpha, verdict)


def increase(nats: Interval) -> Interval:
    """Likelihood lost, in nats per token, as relative perplexity increase."""

    def relative(value: float) -> float:
        return math.expm1(value) if value < 700 else math.inf

    return Interval(relative(nats.median), relative(nats.low), relative(nats.high), nats.n)


def score_interval(baseline: Sequence[float], candidate: Sequence[float], alpha: float) -> Interval:
    """Mean score lost, baseline minus candidate, over paired prompts with scores in [0, 1]; each end misses with `alpha`.

    Scores of 0 and 1 get Tango's score interval of a paired difference (Statistics in Medicine 17, 1998), which stays honest where no
    prompt or nearly none differs: 100 prompts that all agree still leave room for a loss of 4 points. Other scores get Student's
    interval, but never a narrower one than if no prompt differed.
    Raises ValueError for no prompts, or lists that do not pair up.

    >>> found = score_interval([1.0] * 100, [1.0] * 100, 0.025)
    >>> found.median, round(found.high, 3)
    (0.0, 0.037)
    """
    before, after = np.asarray(baseline, dtype=np.float64), np.asarray(candidate, dtype=np.float64)
    if before.shape != after.shape or not len(before):
        raise ValueError(f"baseline and candidate must pair up, got {len(before)} and {len(after)} scores")
    n, lost = len(before), before - after
    if np.isin(before, (0.0, 1.0)).all() and np.isin(after, (0.0, 1.0)).all():
        low, high = _tango(int((lost > 0).sum()), int((lost < 0).sum()), n, alpha)
        return Interval(float(lost.mean()), low, high, n)
    found, none = mean_interval(lost.tolist(), alpha), _tango(0, 0, n, alpha)[1]
    return Interval(found.median, min(found.low, found.median - none), max(found.high, found.median + none), n)


def _tango(worse: int, better: int, n: int, alpha: float) -> tuple[float, float]:
    """The ends of Tango's interval of (worse - better) / n, by bisection on the score statistic."""
    from statistics import NormalDist

    z = NormalDist().inv_cdf(1 - alpha)

    def statistic(difference: float) -> float:
        """(estimate - difference) over its standard error under `difference`, with the constrained estimate of `better` / n."""
        b = -worse - better + (2 * n - worse + better) * difference
        c = -better * difference * (1 - difference)
        share = (math.sqrt(max(b * b - 8 * n * c, 0.0)) - b) / (4 * n)
        variance = n * (2 * share + difference * (1 - difference))
        distance = worse - better - n * difference
        return (
            distance / math.sqrt(variance) if variance > 0 else math.copysign(math.inf, distance) if distance else 0.0
        )

    def end(wanted: float, inside: float, outside: float) -> float:
        for _ in range(60):
            middle = (inside + outside) / 2
            if abs(statistic(middle)) < wanted:
                inside = middle
            else:
                outside = middle
        return outside

    estimate = (worse - better) / n
    return end(z, estimate, -1.0), end(z, estimate, 1.0)
