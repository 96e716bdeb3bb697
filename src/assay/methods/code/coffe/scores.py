"""efficient@k and speed-up: plain arithmetic on the costs of stress tests.

A cost is what a program spends on one stress test, in any unit that adds up (instructions, operations, seconds). `math.inf` stands where it
timed out or crashed; the paper's code has a huge number there, which only an infinity compares like in every unit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from assay import checks
from assay.methods.core.programs.estimates import coefficient_of_variation, pass_at_k, trimmed_mean

RUNS = 12
"""Runs of one test, of which the cheapest and the dearest are dropped."""
TOLERANCE = 1.01
"""Our choice: who costs no more than this times the best solution shares its rank (the second column)."""


@dataclass(frozen=True)
class Problem:
    """What was measured of one problem.

    `best` are the costs of the best known right solution, one a stress test. `samples` has one entry a sample: its costs on the same
    tests, or None where it failed a correctness test. Raises ValueError for rows of unequal length and costs that are no numbers from 0.
    """

    best: Sequence[float]
    samples: Sequence[Sequence[float] | None]

    def __post_init__(self) -> None:
        if len(self.best) == 0:
            raise ValueError("best must hold the cost of one stress test at least, got none")
        for cost in self.best:
            _cost("best", cost)
        for n, sample in enumerate(self.samples):
            if sample is None:
                continue
            if len(sample) != len(self.best):
                raise ValueError(f"samples[{n}] must have {len(self.best)} costs, one a stress test, got {len(sample)}")
            for cost in sample:
                _cost(f"samples[{n}]", cost)

    @property
    def usable(self) -> bool:
        """Whether the best solution itself ended on every test, at a cost that the meter sees: else nothing can be held against it."""
        return 0 < sum(self.best) < math.inf

    @property
    def right(self) -> list[Sequence[float]]:
        """The costs of the samples that passed the correctness tests."""
        return [sample for sample in self.samples if sample is not None]


@dataclass(frozen=True)
class Speedup:
    """How much cheaper right samples are than the best solutions, above 1 is cheaper; and whom that figure is silent about.

    `ratio_of_sums` is the paper's: one problem with heavy tests can decide it. `geometric_mean` counts every problem alike.
    Both speak of survivors only: `wrong` samples, those `cut` on some stress test, and `unseen` ones, whose cost the meter has as 0, are
    in neither.
    """

    ratio_of_sums: float | None
    geometric_mean: float | None
    problems: int
    samples: int
    wrong: int
    cut: int
    unseen: int = 0


@dataclass(frozen=True)
class Scores:
    """What one set of samples is worth. The three mappings are by k; `inconsistent` problems are in none of the figures."""

    efficient: Mapping[int, float]
    within_tolerance: Mapping[int, float]
    passed: Mapping[int, float]
    speedup: Speedup
    problems: int
    inconsistent: int


def cost_of_runs(runs: Sequence[float]) -> float:
    """The cost of one test from its repeated runs (12 in the paper): one smallest and one largest dropped, the mean of the rest.

    A run that was cut (infinity) is no outlier: it makes the cost infinite. Raises ValueError for fewer than three runs that ended.

    >>> cost_of_runs([5, 5, 5, 5, 5, 5, 5, 5, 5, 5, 1, 900])
    5.0
    """
    if math.inf in [_cost("runs", run) for run in runs]:
        return math.inf
    if len(runs) < 3:
        raise ValueError(f"runs must be 3 at least, one is dropped on each side, got {len(runs)}")
    return trimmed_mean(list(runs), drop=1)


def relative_deviation(tests: Sequence[Sequence[float]]) -> float:
    """How unstable a meter is: standard deviation (of a sample) over mean of the runs of each test, averaged over the tests.

    `tests` has the runs of one test in a row, two at least, which cost something.

    >>> relative_deviation([[9.0, 11.0], [10.0, 10.0]]) == 2**0.5 / 20
    True
    """
    if len(tests) == 0:
        raise ValueError("tests must hold the runs of one test at least, got none")
    return sum(map(coefficient_of_variation, tests)) / len(tests)


def best_solution(costs: Mapping[str, Sequence[float]]) -> str:
    """The name of the solution that spends the least on all stress tests together; of equals the first named.

    Give it right solutions only. Raises ValueError where none ended on all tests.

    >>> best_solution({"loop": [9.0, 90.0], "set": [10.0, 20.0]})
    'set'
    """
    if not costs:
        raise ValueError("costs must hold one solution at least")
    sums = {name: sum(_cost(f"costs[{name!r}]", cost) for cost in values) for name, values in costs.items()}
    name = min(sums, key=lambda one: sums[one])
    if not math.isfinite(sums[name]):
        raise ValueError("costs must hold a solution that ended on every stress test, got none")
    return name


def is_efficient(costs: Sequence[float], best: Sequence[float], *, tolerance: float | None = None) -> bool:
    """Whether a right sample is efficient: its stress tests together cost strictly less than those of the best known solution.

    With `tolerance` (1 at least) it may cost up to so many times as much: the strict rule calls whoever hands in the best solution itself
    inefficient.

    >>> is_efficient([4, 5], [5, 5]), is_efficient([5, 5], [5, 5]), is_efficient([5, 5], [5, 5], tolerance=1.01)
    (True, False, True)
    """
    if len(costs) != len(best):
        raise ValueError(f"costs must have {len(best)} entries, one a stress test, got {len(costs)}")
    spent, least = sum(_cost("costs", cost) for cost in costs), sum(_cost("best", cost) for cost in best)
    if tolerance is None:
        return spent < least
    return math.isfinite(spent) and spent <= checks.number("tolerance", tolerance, low=1) * least


def efficient_at_k(problems: Sequence[Problem], k: int = 1, *, tolerance: float | None = None) -> float:
    """The chance that one of k samples is right and efficient (`is_efficient`), averaged over the problems.

    Of a problem's n samples c are efficient; the estimate is 1 - C(n-c, k)/C(n, k), unbiased. Wrong samples and those that were cut stay
    in n. Problems whose best solution was cut are left out (`Scores.inconsistent` counts them). The paper reports k = 1 only.
    Raises ValueError for k above the samples of a problem: nothing is lowered silently.
    When NOT to use it: to rank models near the top, for the strict rule gives 0 to whoever ties with the best solution (give `tolerance`,
    or use a score with ranks); with costs that differ by chance from run to run by as much as programs differ.

    >>> round(efficient_at_k([Problem([10.0], [[9.0], [11.0], None])], k=2), 4)
    0.6667
    """
    return _mean_at_k(problems, k, lambda problem: _efficient(problem, tolerance))


def passed_at_k(problems: Sequence[Problem], k: int = 1) -> float:
    """pass@k of the same problems, never below `efficient_at_k`.

    >>> round(passed_at_k([Problem([10.0], [[9.0], [11.0], None])]), 4)
    0.6667
    """
    return _mean_at_k(problems, k, lambda problem: len(problem.right))


def speedup(problems: Sequence[Problem]) -> Speedup:
    """Cost of the best solutions over that of the right samples, as a ratio of sums (the paper's) and as a geometric mean.

    Samples that are wrong, were cut on a stress test or cost nothing are counted and left out, so that a model that solves only what it
    solves fast looks fast: read it beside efficient@k. A problem's samples are averaged first, so that each problem counts once (our
    choice; the paper has one sample). Both figures are None where nothing is left.

    >>> speedup([Problem([10.0], [[5.0]]), Problem([1000.0], [[2000.0], None])])
    Speedup(ratio_of_sums=0.5037406483790524, geometric_mean=1.0, problems=2, samples=2, wrong=1, cut=0, unseen=0)
    """
    reference = spent = logs = 0.0
    used = samples = wrong = cut = unseen = 0
    for problem in problems:
        if not problem.usable:
            continue
        ended = [sum(sample) for sample in problem.right if math.isfinite(sum(sample))]
        wrong += len(problem.samples) - len(problem.right)
        cut += len(problem.right) - len(ended)
        unseen += ended.count(0.0)
        ended = [total for total in ended if total > 0]
        if not ended:
            continue
        best = sum(problem.best)
        used, samples = used + 1, samples + len(ended)
        reference += best
        spent += sum(ended) / len(ended)
        logs += sum(math.log(best / each) for each in ended) / len(ended)
    if not used:
        return Speedup(None, None, 0, 0, wrong, cut, unseen)
    return Speedup(reference / spent, math.exp(logs / used), used, samples, wrong, cut, unseen)


def score(problems: Sequence[Problem], ks: Sequence[int] = (1,), *, tolerance: float = TOLERANCE) -> Scores:
    """efficient@k by the strict rule and within `tolerance`, pass@k, and speed-up, of one set of samples.

    >>> found = score([Problem([10.0, 10.0], [[9.0, 9.0], [10.0, 10.1], [30.0, 30.0], None])])
    >>> found.efficient[1], found.within_tolerance[1], found.passed[1]
    (0.25, 0.5, 0.75)
    """
    if not ks:
        raise ValueError("ks must not be empty")
    return Scores(
        {k: efficient_at_k(problems, k) for k in ks},
        {k: efficient_at_k(problems, k, tolerance=tolerance) for k in ks},
        {k: passed_at_k(problems, k) for k in ks},
        speedup(problems),
        sum(problem.usable for problem in problems),
        sum(not problem.usable for problem in problems),
    )


def _efficient(problem: Problem, tolerance: float | None) -> int:
    return sum(is_efficient(sample, problem.best, tolerance=tolerance) for sample in problem.right)


def _mean_at_k(problems: Sequence[Problem], k: int, count: Callable[[Problem], int]) -> float:
    checks.whole("k", k, low=1)
    usable = [problem for problem in problems if problem.usable]
    if not usable:
        raise ValueError("problems must hold one whose best solution ended on every stress test, got none")
    for problem in usable:
        if k > len(problem.samples):
            raise ValueError(f"k must be at most the {len(problem.samples)} samples of a problem, got {k}")
    return sum(pass_at_k(len(problem.samples), count(problem), k) for problem in usable) / len(usable)


def _cost(name: str, value: float) -> float:
    """A cost: a number from 0, or infinity."""
    if isinstance(value, float) and value == math.inf:
        return value
    return checks.number(name, value, low=0)
