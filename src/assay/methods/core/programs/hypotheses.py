"""Are differences between success rates, times and scores real? Tests, intervals, effect sizes, and how many tasks a claim needs.

    binomial(72, 100, 0.6)                      # is the rate above 60 %?                     exact binomial test
    wilson(72, 100)                             # where does it lie?                          Wilson's interval
    mcnemar(first, second)                      # do two programs pass different tasks?       exact, on the same tasks
    independence([[20, 5], [12, 13]])           # does difficulty matter?                     chi-square, Fisher, Monte Carlo
    compare_groups(times), friedman(times)      # do times differ?                            apart, and on the same tasks
    equivalent_shares(first, second, 0.05)      # are they as good as equal?                  two one-sided tests
    tasks_for_share(0.6, 0.7)                   # how many tasks does this claim need?        power

Every test gives a `Finding`: its p-value, an effect size with its interval, and the name of the test that was taken. "No significant
difference" is no equality: `equivalent_shares` and `equivalent_means` test for that. Whoever asks several questions adjusts by `holm`.

A test counts tasks, each once. Several attempts at one task are not independent: give one of them, or each task's mean where a test
takes numbers. Needs scipy, which is loaded by the first test.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from statistics import NormalDist
from typing import Any, Literal

import numpy as np

from assay import checks
from assay.errors import MissingError
from assay.measure.stats import Interval

Alternative = Literal["greater", "less", "two-sided"]
ALTERNATIVES: tuple[Alternative, ...] = ("greater", "less", "two-sided")
ALPHA, POWER = 0.05, 0.8
LEAST_EXPECTED = 5.0
"""Cells that are expected to hold fewer make the chi-square approximation poor (Cochran's rule, in its strict form)."""
FEW = 20
"""Below so many rows Friedman's p-value is counted out by permutations; our choice."""
DRAWS = 9999
MOST_TASKS = 1_000_000


@dataclass(frozen=True)
class Finding:
    """What a test found.

    `method` is the test that was taken, `p` its p-value, `n` how many tasks (or values) it counted. `effect` is the size of what was found,
    in the measure that `measure` names; `low` and `high` bound it where there is such an interval, at 95 % unless the test says otherwise.
    """

    method: str
    p: float
    statistic: float
    n: int
    effect: float
    measure: str
    low: float | None = None
    high: float | None = None

    def significant(self, alpha: float = ALPHA) -> bool:
        """Whether p is at most `alpha`."""
        return self.p <= alpha


@dataclass(frozen=True)
class Pair:
    """Two of several groups compared after the test of all: `z` above 0 where the first has the higher ranks, `adjusted` by Holm."""

    first: str
    second: str
    z: float
    p: float
    adjusted: float


@dataclass(frozen=True)
class Comparison:
    """Groups compared: all at once, and by pairs. `normality` has the p-value of Shapiro and Wilk for each group, where that was asked."""

    overall: Finding
    pairs: tuple[Pair, ...]
    normality: Mapping[str, float]


# --------------------------------------------------------------------------------------------------------------- one success rate


def binomial(
    successes: int,
    n: int,
    p0: float,
    *,
    alternative: Alternative = "greater",
    method: Literal["exact", "normal"] = "exact",
) -> Finding:
    """Is the rate behind `successes` of `n` above (below, other than) `p0`? The tail of the binomial distribution.

    The exact p-value never errs more often than it says; "normal" is the approximation that papers often take, without a correction for
    continuity, and does. The effect is the rate, in Wilson's interval. `p0` is a convention: no value of it is chance for programs.

    When NOT to use it: for several attempts at the same tasks counted together. Raises ValueError for a `p0` outside of (0, 1).

    >>> round(binomial(60, 100, 0.5).p, 4), binomial(60, 100, 0.6).significant()
    (0.0284, False)
    """
    n = checks.whole("n", n, low=1)
    successes = checks.whole("successes", successes, low=0, high=n)
    p0 = checks.number("p0", p0, above=0, below=1)
    checks.choice("alternative", alternative, ALTERNATIVES)
    checks.choice("method", method, ("exact", "normal"))
    seen = wilson(successes, n)
    if method == "normal":
        z = (successes / n - p0) / math.sqrt(p0 * (1 - p0) / n)
        return Finding(
            "binomial, normal approximation", _tail(z, alternative), z, n, seen.median, "rate", seen.low, seen.high
        )
    p = float(_stats().binomtest(successes, n, p0, alternative=alternative).pvalue)
    return Finding("exact binomial", min(p, 1.0), float(successes), n, seen.median, "rate", seen.low, seen.high)


def wilson(successes: int, n: int, *, level: float = 0.95) -> Interval:
    """The rate, and Wilson's score interval for it (without a correction for continuity). It holds the rate and stays within 0 and 1.

    On average over rates it covers about as often as it says; at single ones, and with few tasks, it may fall short by a few points.
    Raises ValueError for no trials, or a level outside of (0, 1).

    >>> seen = wilson(8, 10)
    >>> round(seen.low, 3), round(seen.high, 3)
    (0.49, 0.943)
    """
    n = checks.whole("n", n, low=1)
    successes = checks.whole("successes", successes, low=0, high=n)
    z = NormalDist().inv_cdf(0.5 + checks.number("level", level, above=0, below=1) / 2)
    rate = successes / n
    middle = (rate + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(rate * (1 - rate) / n + z * z / (4 * n * n))
    low = 0.0 if successes == 0 else min(middle - half, rate)  # the formula's own ends, free of rounding
    high = 1.0 if successes == n else max(middle + half, rate)
    return Interval(rate, low, high, n)


# ------------------------------------------------------------------------------------------------------ two rates on the same tasks


def mcnemar(first: Sequence[bool], second: Sequence[bool], *, alternative: Alternative = "two-sided") -> Finding:
    """Do two programs differ in what they pass? Exact, of the tasks that one passes and the other does not; "greater" is for the first.

    The p-value depends on those tasks only. `statistic` is how many the first alone passes; the effect is the difference of the two
    rates, in Tango's score interval. Task by task: `first[i]` and `second[i]` are about the same task. Raises ValueError for other lengths.

    >>> finding = mcnemar([True] * 9 + [False], [True] * 2 + [False] * 8)
    >>> round(finding.p, 4), round(finding.effect, 2)
    (0.0156, 0.7)
    """
    checks.choice("alternative", alternative, ALTERNATIVES)
    b, c, n = _discordant(first, second)
    p = float(_stats().binomtest(b, b + c, 0.5, alternative=alternative).pvalue) if b + c else 1.0
    seen = paired_difference(first, second)
    return Finding("McNemar, exact", min(p, 1.0), float(b), n, seen.median, "difference of rates", seen.low, seen.high)


def paired_difference(first: Sequence[bool], second: Sequence[bool], *, level: float = 0.95) -> Interval:
    """The first rate less the second on the same tasks, in Tango's score interval (Statistics in Medicine 17, 1998).

    >>> seen = paired_difference([True, True, False, True] * 10, [True, False, False, True] * 10)
    >>> round(seen.median, 3), 0.1 < seen.low < 0.25 < seen.high < 0.45
    (0.25, True)
    """
    from scipy.optimize import brentq

    b, c, n = _discordant(first, second)
    z = NormalDist().inv_cdf(0.5 + checks.number("level", level, above=0, below=1) / 2)
    seen = (b - c) / n

    def end(sign: int) -> float:
        """Where the statistic falls to z on the way from what was seen to the end of all differences."""
        if seen == sign:
            return float(sign)
        far = sign * (1 - 1e-12)
        if sign * _tango(b, c, n, far) > -z:
            return float(sign)
        return float(brentq(lambda delta: sign * _tango(b, c, n, delta) + z, seen, far, xtol=1e-12))

    return Interval(seen, end(-1), end(1), n)


def equivalent_shares(first: Sequence[bool], second: Sequence[bool], margin: float) -> Finding:
    """Do the rates of two programs on the same tasks differ by less than `margin`? Two one-sided score tests (Tango), of which the worse
    counts.

    A small p says that they do: that is what "as good as" needs, which no large p of `mcnemar` shows. The interval is the one at 90 %,
    which lies within the margin where p is below 5 %. The margin is fixed before anybody looks.

    >>> same = [True, False] * 200
    >>> equivalent_shares(same, same, 0.05).p < 0.001, equivalent_shares(same[:20], same[:20], 0.05).p > 0.05
    (True, True)
    """
    margin = checks.number("margin", margin, above=0, below=1)
    b, c, n = _discordant(first, second)
    normal = NormalDist()
    p = max(1 - normal.cdf(_tango(b, c, n, -margin)), normal.cdf(_tango(b, c, n, margin)))
    seen = paired_difference(first, second, level=0.9)
    return Finding(
        "two one-sided score tests", p, seen.median, n, seen.median, "difference of rates", seen.low, seen.high
    )


def equivalent_means(differences: Sequence[float], margin: float) -> Finding:
    """Is the mean of paired differences nearer to 0 than `margin`? Two one-sided t-tests, of which the worse counts.

    For ratios of times give the logarithms' differences: a margin of 0.1 is then about 10 %. The interval is the one at 90 %. With few
    differences they must be about normal. Raises ValueError for fewer than two, or one that is not finite.

    >>> equivalent_means([0.01, -0.02, 0.0, 0.015, -0.01], 0.1).significant()
    True
    """
    values = _numbers("differences", differences, least=2)
    margin = checks.number("margin", margin, above=0)
    n, mean = len(values), float(values.mean())
    error = float(values.std(ddof=1)) / math.sqrt(n)
    if error == 0:
        p = 0.0 if abs(mean) < margin else 1.0
        return Finding("two one-sided t-tests", p, mean, n, mean, "mean difference", mean, mean)
    student = _stats().t(n - 1)
    p = float(max(student.sf((mean + margin) / error), student.cdf((mean - margin) / error)))
    half = float(student.ppf(0.95)) * error
    return Finding("two one-sided t-tests", p, mean, n, mean, "mean difference", mean - half, mean + half)


# -------------------------------------------------------------------------------------------------------------- rates by a factor


def independence(table: Sequence[Sequence[int]], *, seed: int = 0, draws: int = DRAWS) -> Finding:
    """Is the outcome independent of a factor? `table` has a row for each of its levels and a column for each outcome, in counts.

    Chi-square without a correction; where a cell is expected to hold fewer than 5, Fisher's exact test for two by two and a Monte Carlo
    p-value over tables of the same margins for others (`draws` of them, fixed by `seed`; at least 1 / (draws + 1)). The effect is Cramer's
    V, from 0 to 1. An outcome that nobody had is left out; where that leaves one, nothing differs, and p is 1.

    When NOT to use it: for rows about the same tasks (two models): take `mcnemar`. Raises ValueError for fewer than two rows or columns, a
    row of zeros, and counts below 0.

    >>> finding = independence([[18, 2], [4, 16]])
    >>> finding.method, finding.significant(), round(finding.effect, 2)
    ('chi-square', True, 0.7)
    """
    counts = np.array([[checks.whole("table", cell, low=0) for cell in row] for row in table]) if table else np.empty(0)
    if counts.ndim != 2 or min(counts.shape) < 2:
        raise ValueError(f"table must have at least 2 rows and 2 columns, got {checks.shown(table)}")
    if not counts.sum(axis=1).all():
        raise ValueError(f"table must have no row without a count, got {checks.shown(table)}")
    counts = counts[:, counts.sum(axis=0) > 0]
    n = int(counts.sum())
    if counts.shape[1] < 2:
        return Finding("none needed: one outcome only", 1.0, 0.0, n, 0.0, "Cramer's V")
    rows, columns = counts.sum(axis=1), counts.sum(axis=0)
    expected = np.outer(rows, columns) / n
    chi2 = float(((counts - expected) ** 2 / expected).sum())
    effect = min(math.sqrt(chi2 / (n * (min(counts.shape) - 1))), 1.0)
    if expected.min() >= LEAST_EXPECTED:
        p = float(_stats().chi2.sf(chi2, (counts.shape[0] - 1) * (counts.shape[1] - 1)))
        return Finding("chi-square", p, chi2, n, effect, "Cramer's V")
    if counts.shape == (2, 2):
        p = min(float(_stats().fisher_exact(counts)[1]), 1.0)
        return Finding("Fisher's exact", p, chi2, n, effect, "Cramer's V")
    drawn = _stats().random_table(rows, columns).rvs(checks.whole("draws", draws, low=99), random_state=seed)
    as_far = int((((drawn - expected) ** 2 / expected).sum(axis=(1, 2)) >= chi2 * (1 - 1e-9)).sum())
    return Finding("chi-square, Monte Carlo", (as_far + 1) / (draws + 1), chi2, n, effect, "Cramer's V")


# ------------------------------------------------------------------------------------------------------------- numbers by group


def compare_groups(groups: Mapping[str, Sequence[float]], *, alpha: float = ALPHA) -> Comparison:
    """Do independent groups of numbers differ? Shapiro and Wilk first; where a group is not normal (p <= alpha) Kruskal and Wallis, else
    one-way analysis of variance (our choice; papers often leave it open). Pairs by Dunn's test in either case.

    The effect is the share of the variance (of the ranks' variance) that the groups explain: eta squared, or epsilon squared = H / (n - 1).
    When NOT to use it: for numbers about the same tasks, where `friedman` finds more. Raises ValueError for fewer than two groups, fewer
    than three numbers in one, and one that is not finite.

    >>> found = compare_groups({"a": [1, 2, 3, 4, 50], "b": [11, 12, 13, 14, 60], "c": [21, 22, 23, 24, 70]})
    >>> found.overall.method, found.overall.n, len(found.pairs)
    ('Kruskal-Wallis', 15, 3)
    """
    values = _groups(groups, least=3)
    together = np.concatenate(list(values.values()))
    n = len(together)
    normality = {name: float(_stats().shapiro(each).pvalue) if np.ptp(each) else 0.0 for name, each in values.items()}
    if not np.ptp(together):
        return Comparison(Finding("Kruskal-Wallis", 1.0, 0.0, n, 0.0, "epsilon squared"), dunn(groups), normality)
    if min(normality.values()) <= checks.number("alpha", alpha, above=0, below=1):
        h, p = map(float, _stats().kruskal(*values.values()))
        overall = Finding("Kruskal-Wallis", p, h, n, h / (n - 1), "epsilon squared")
    else:
        f, p = map(float, _stats().f_oneway(*values.values()))
        between = sum(len(each) * (each.mean() - together.mean()) ** 2 for each in values.values())
        share = float(between / ((together - together.mean()) ** 2).sum())
        overall = Finding("one-way analysis of variance", p, f, n, share, "eta squared")
    return Comparison(overall, dunn(groups), normality)


def dunn(groups: Mapping[str, Sequence[float]]) -> tuple[Pair, ...]:
    """Dunn's test of all pairs of independent groups, by mean ranks with ties taken into account, two-sided, adjusted by Holm.

    >>> (pair,) = dunn({"slow": [5, 6, 7, 8], "fast": [1, 2, 3, 4]})
    >>> pair.z > 0, pair.p == pair.adjusted
    (True, True)
    """
    values = _groups(groups, least=1)
    together = np.concatenate(list(values.values()))
    n = len(together)
    ranks = np.asarray(_stats().rankdata(together))
    _, ties = np.unique(together, return_counts=True)
    spread = (n * (n + 1) - float((ties**3 - ties).sum()) / (n - 1)) / 12
    ends = np.cumsum([len(each) for each in values.values()])
    means = {
        name: float(ranks[end - len(each) : end].mean()) for (name, each), end in zip(values.items(), ends, strict=True)
    }
    errors = {(a, b): math.sqrt(spread * (1 / len(values[a]) + 1 / len(values[b]))) for a, b in combinations(values, 2)}
    return _pairs(means, errors)


def friedman(groups: Mapping[str, Sequence[float]], *, seed: int = 0, draws: int = DRAWS) -> Comparison:
    """Do groups of numbers about the same tasks differ? `groups[name][i]` is about task i. Friedman's test on the ranks within each task.

    Ties are taken into account. With 20 tasks or more p is that of chi-square, with fewer it is counted over `draws` permutations within
    tasks. The effect is Kendall's W, from 0 (no agreement about the order) to 1. Pairs by their mean ranks, two-sided, adjusted by Holm.
    Nothing changes when the numbers of one task go through a rising function: a slow task weighs no more than a fast one. For two groups
    it is a sign test. Raises ValueError for fewer than two groups, other lengths, fewer than two tasks, and numbers that are not finite.

    >>> found = friedman({"a": [1, 2, 3, 4, 5, 6], "b": [2, 3, 4, 5, 6, 7], "c": [3, 4, 5, 6, 7, 8]})
    >>> found.overall.effect, found.overall.significant()
    (1.0, True)
    """
    values = _groups(groups, least=2)
    if len({len(each) for each in values.values()}) > 1:
        given = {name: len(each) for name, each in values.items()}
        raise ValueError(f"groups must have one number for each task, got lengths {checks.shown(given)}")
    ranks = np.asarray(_stats().rankdata(np.stack(list(values.values()), axis=1), axis=1))
    n, k = ranks.shape
    off = ranks - (k + 1) / 2
    spread = float((off**2).sum())
    if not spread:
        error = dict.fromkeys(combinations(values, 2), 0.0)
        return Comparison(
            Finding("Friedman", 1.0, 0.0, n, 0.0, "Kendall's W"), _pairs(dict.fromkeys(values, 0.0), error), {}
        )
    chi2 = (k - 1) * float((off.sum(axis=0) ** 2).sum()) / spread
    if n >= FEW:
        p, method = float(_stats().chi2.sf(chi2, k - 1)), "Friedman"
    else:
        rng = np.random.default_rng(checks.whole("seed", seed, low=0))
        drawn = rng.permuted(np.broadcast_to(off, (checks.whole("draws", draws, low=99), n, k)), axis=2).sum(axis=1)
        as_far = int(((k - 1) * (drawn**2).sum(axis=1) / spread >= chi2 * (1 - 1e-9)).sum())
        p, method = (as_far + 1) / (draws + 1), "Friedman, by permutations"
    means = dict(zip(values, map(float, ranks.mean(axis=0)), strict=True))
    error = dict.fromkeys(combinations(values, 2), math.sqrt(2 * spread / (k - 1)) / n)
    return Comparison(Finding(method, p, chi2, n, chi2 / (n * (k - 1)), "Kendall's W"), _pairs(means, error), {})


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's adjustment, in the order given: all at most `alpha` together err at most that often, whatever they depend on.

    None is below its raw value, none above 1, and they keep their order. Raises ValueError for one outside of [0, 1].

    >>> holm([0.01, 0.04, 0.03])
    [0.03, 0.06, 0.06]
    """
    given = [checks.number("p_values", p, low=0, high=1) for p in p_values]
    found, most = [0.0] * len(given), 0.0
    for rank, at in enumerate(sorted(range(len(given)), key=given.__getitem__)):
        most = max(most, min((len(given) - rank) * given[at], 1.0))
        found[at] = most
    return found


# ----------------------------------------------------------------------------------------------------------- how many tasks


def power_of_share(n: int, p0: float, p1: float, *, alpha: float = ALPHA) -> float:
    """How often `n` tasks show that a rate of `p1` is above `p0` (below, where it is), by the exact one-sided test.

    >>> round(power_of_share(100, 0.7, 0.72), 2)  # a hundred tasks do not tell 72 % from 70 %
    0.11
    """
    n = checks.whole("n", n, low=1)
    p0, p1 = checks.number("p0", p0, above=0, below=1), checks.number("p1", p1, low=0, high=1)
    return float(_powers(np.array([n]), p0, p1, checks.number("alpha", alpha, above=0, below=1))[0])


def tasks_for_share(p0: float, p1: float, *, alpha: float = ALPHA, power: float = POWER) -> int:
    """The fewest tasks from which on a rate of `p1` is told from `p0` with probability `power`, by the exact one-sided test.

    The power of an exact test falls a little now and then as tasks are added; from this number on it stays above. Raises ValueError for
    equal rates, and where more than a million tasks were needed.

    >>> 140 < tasks_for_share(0.6, 0.7) < 165
    True
    """
    p0, p1 = checks.number("p0", p0, above=0, below=1), checks.number("p1", p1, low=0, high=1)
    alpha, power = checks.number("alpha", alpha, above=0, below=1), checks.number("power", power, above=0, below=1)
    if p0 == p1:
        raise ValueError(f"p1 must differ from p0, got {p1} for both")
    inverse = NormalDist().inv_cdf
    reach = inverse(1 - alpha) * math.sqrt(p0 * (1 - p0)) + max(inverse(power), 0.0) * math.sqrt(p1 * (1 - p1))
    about = (reach / (p1 - p0)) ** 2
    if about > MOST_TASKS:
        raise ValueError(f"p1 must be further from p0: {p0} and {p1} need more than {MOST_TASKS} tasks")
    below = np.arange(1, int(1.3 * about + 4 / abs(p1 - p0)) + 50)
    short = np.flatnonzero(_powers(below, p0, p1, alpha) < power)
    return int(below[short[-1]]) + 1 if len(short) else 1


def power_of_pairs(n: int, only_first: float, only_second: float, *, alpha: float = ALPHA) -> float:
    """How often `n` tasks show that two programs differ by `mcnemar` (two-sided), which each alone pass such shares of the tasks.

    >>> 0.7 < power_of_pairs(100, 0.2, 0.06) < 0.9
    True
    """
    n = checks.whole("n", n, low=1)
    first, second = _alone(only_first, only_second)
    alpha = checks.number("alpha", alpha, above=0, below=1)
    stats, total = _stats(), first + second
    m = np.arange(n + 1)
    if not total:
        return 0.0
    reject = np.asarray(
        stats.binom.ppf(alpha / 2, m, 0.5)
    )  # the most of either side that is still significant, or one more
    reject = np.where(stats.binom.cdf(reject, m, 0.5) <= alpha / 2, reject, reject - 1)
    within = stats.binom.cdf(reject, m, first / total) + stats.binom.cdf(reject, m, second / total)
    return float(min((stats.binom.pmf(m, n, min(total, 1.0)) * within).sum(), 1.0))


def tasks_for_pairs(only_first: float, only_second: float, *, alpha: float = ALPHA, power: float = POWER) -> int:
    """About the fewest tasks that tell two programs apart by `mcnemar` with probability `power`, which each alone pass such shares.

    The power rises with the tasks but for the smallest dents, so that one or two fewer may do as well. Raises ValueError for equal
    shares, and where more than 20000 tasks were needed.

    >>> 90 < tasks_for_pairs(0.2, 0.06) < 130
    True
    """
    first, second = _alone(only_first, only_second)
    power = checks.number("power", power, above=0, below=1)
    if first == second:
        raise ValueError(f"only_second must differ from only_first, got {second} for both")
    low, high = 0, 8
    while power_of_pairs(high, first, second, alpha=alpha) < power:
        low, high = high, 2 * high
        if high > 20_000:
            raise ValueError(f"only_second must be further from only_first: {first} and {second} need too many tasks")
    while high - low > 1:
        middle = (low + high) // 2
        enough = power_of_pairs(middle, first, second, alpha=alpha) >= power
        low, high = (low, middle) if enough else (middle, high)
    return high


# --------------------------------------------------------------------------------------------------------------------- inside


def _stats() -> Any:
    try:
        from scipy import stats
    except ImportError:
        raise MissingError("hypothesis tests need scipy: pip install scipy") from None
    return stats


def _tail(z: float, alternative: Alternative) -> float:
    normal = NormalDist()
    if alternative == "two-sided":
        return 2 * normal.cdf(-abs(z))
    return normal.cdf(-z if alternative == "greater" else z)


def _discordant(first: Sequence[bool], second: Sequence[bool]) -> tuple[int, int, int]:
    """How many tasks the first alone passes, the second alone, and how many there are."""
    if len(first) != len(second) or not len(first):
        raise ValueError(
            f"first and second must be about the same tasks, at least one, got {len(first)} and {len(second)}"
        )
    pairs = [(checks.flag("first", a), checks.flag("second", b)) for a, b in zip(first, second, strict=True)]
    return sum(a and not b for a, b in pairs), sum(b and not a for a, b in pairs), len(pairs)


def _tango(b: int, c: int, n: int, delta: float) -> float:
    """The score statistic of a paired difference of `delta`: of n tasks b are passed by the first alone, c by the second alone.

    The share that the second alone passes is estimated under the hypothesis, as the larger root of a quadratic equation.
    """
    linear = (2 * n - b + c) * delta - b - c
    root = math.sqrt(max(linear**2 + 8 * n * c * delta * (1 - delta), 0.0))
    second = max((root - linear) / (4 * n), 0.0)
    variance = n * (2 * second + delta * (1 - delta))
    gap = b - c - n * delta
    if variance <= 0:
        return 0.0 if gap == 0 else math.copysign(math.inf, gap)
    return gap / math.sqrt(variance)


def _numbers(name: str, values: Sequence[float], *, least: int) -> np.ndarray:
    found = np.array([checks.number(name, value) for value in values], dtype=np.float64)
    if len(found) < least:
        raise ValueError(f"{name} must hold at least {least} numbers, got {len(found)}")
    return found


def _groups(groups: Mapping[str, Sequence[float]], *, least: int) -> dict[str, np.ndarray]:
    if len(groups) < 2:
        raise ValueError(f"groups must be at least 2, got {len(groups)}")
    return {name: _numbers(f"groups[{name!r}]", values, least=least) for name, values in groups.items()}


def _pairs(means: Mapping[str, float], errors: Mapping[tuple[str, str], float]) -> tuple[Pair, ...]:
    z = {pair: (means[pair[0]] - means[pair[1]]) / error if error else 0.0 for pair, error in errors.items()}
    p = [_tail(each, "two-sided") for each in z.values()]
    return tuple(
        Pair(*pair, each, raw, adjusted) for (pair, each), raw, adjusted in zip(z.items(), p, holm(p), strict=True)
    )


def _powers(n: np.ndarray, p0: float, p1: float, alpha: float) -> np.ndarray:
    """The power of the exact one-sided test for each number of tasks."""
    if p1 < p0:
        p0, p1 = 1 - p0, 1 - p1
    binom = _stats().binom
    least = binom.isf(alpha, n, p0) + 1  # P(X >= least) <= alpha, and not for one fewer
    return np.asarray(binom.sf(least - 1, n, p1))


def _alone(first: float, second: float) -> tuple[float, float]:
    first, second = (
        checks.number("only_first", first, low=0, high=1),
        checks.number("only_second", second, low=0, high=1),
    )
    if first + second > 1:
        raise ValueError(f"only_first and only_second must be at most 1 together, got {first} and {second}")
    return first, second
