"""Several attempts a task: a logistic regression with a task's own difficulty as a random effect.

Attempts at one task are alike, so that counting them as so many tasks finds differences that are none. Here every task shifts the
log-odds of all models by a normal number of its own, which is integrated out over a grid that is finer the more attempts a task has.
By maximum likelihood, with scipy.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from assay import checks
from assay.errors import MissingError
from assay.methods.core.programs.hypotheses import Finding

FAR = 8.0  # in standard deviations: where the grid ends
WIDEST = 8.0  # of the standard deviation over tasks, in log-odds; beyond it nothing changes


@dataclass(frozen=True)
class Mixed:
    """`log_odds` of every model at a task of middling difficulty, `spread` the standard deviation of tasks in log-odds, `rates` the share
    that each model passes over all tasks, and the test that all models are equal (likelihood ratio)."""

    log_odds: Mapping[str, float]
    rates: Mapping[str, float]
    spread: float
    finding: Finding


def mixed_logistic(passed: Mapping[str, Mapping[str, tuple[int, int]]]) -> Mixed:
    """Models compared over all their attempts. `passed[model][task]` is how many attempts passed, and of how many.

    When NOT to use it: for one attempt a task, where difficulty and chance cannot be told apart well, and with fewer than about twenty
    tasks. Raises ValueError for fewer than two models, for one that never or always passes (its log-odds are infinite), and for counts
    that are none.

    >>> counts = {"a": {f"t{i}": (i % 5, 5) for i in range(30)}, "b": {f"t{i}": (min(i % 5 + 1, 5), 5) for i in range(30)}}
    >>> found = mixed_logistic(counts)
    >>> found.log_odds["b"] > found.log_odds["a"], found.finding.significant(), found.spread > 0.5
    (True, True, True)
    """
    try:
        from scipy.optimize import minimize
        from scipy.stats import chi2
    except ImportError:
        raise MissingError("the mixed model needs scipy: pip install scipy") from None
    if len(passed) < 2:
        raise ValueError(f"passed must hold at least 2 models, got {len(passed)}")
    models, tasks = list(passed), sorted({task for own in passed.values() for task in own})
    wins, tries = np.zeros((2, len(tasks), len(models)))
    for at, model in enumerate(models):
        for task, (won, of) in passed[model].items():
            of = checks.whole("passed", of, low=0)
            wins[tasks.index(task), at] = checks.whole("passed", won, low=0, high=of)
            tries[tasks.index(task), at] = of
    for at, model in enumerate(models):
        if not 0 < wins[:, at].sum() < tries[:, at].sum():
            raise ValueError(f"passed must hold a success and a failure of every model, got neither both of {model!r}")
    nodes, weights = _grid(float(tries.sum(axis=1).max()))

    def minus_log_likelihood(parameters: np.ndarray) -> float:
        *odds, log_spread = parameters
        return -_log_likelihood(np.resize(odds, len(models)), np.exp(log_spread), wins, tries, nodes, weights)

    share = wins.sum(axis=0) / tries.sum(axis=0)
    start = np.log(share / (1 - share))
    bounds = [(-30.0, 30.0)] * len(models) + [(-6.0, float(np.log(WIDEST)))]
    full = minimize(minus_log_likelihood, [*start, 0.0], method="L-BFGS-B", bounds=bounds)
    equal = minimize(minus_log_likelihood, [start.mean(), 0.0], method="L-BFGS-B", bounds=bounds[-2:])
    ratio = max(2 * float(equal.fun - full.fun), 0.0)
    odds, spread = full.x[:-1], float(np.exp(full.x[-1]))
    rates = (np.exp(weights) / (1 + np.exp(-(odds[:, None] + spread * nodes)))).sum(axis=1)
    gap = float(odds.max() - odds.min())
    finding = Finding(
        "mixed logistic regression, likelihood ratio", float(chi2.sf(ratio, len(models) - 1)), ratio, len(tasks), gap,
        "largest difference of log-odds",
    )  # fmt: skip
    return Mixed(
        dict(zip(models, map(float, odds), strict=True)),
        dict(zip(models, map(float, rates), strict=True)),
        spread,
        finding,
    )


def _grid(attempts: float) -> tuple[np.ndarray, np.ndarray]:
    """Difficulties in standard deviations, and the logarithms of their weights.

    So many attempts leave no more than 2 / sqrt(attempts) of log-odds open about a task, the step is at most as wide at the widest spread.
    """
    step = 2 / (WIDEST * np.sqrt(max(attempts, 16.0)))
    nodes = np.arange(-FAR, FAR + step / 2, step)
    weights = -(nodes**2) / 2
    return nodes, weights - np.log(np.exp(weights).sum())


def _log_likelihood(
    odds: np.ndarray, spread: float, wins: np.ndarray, tries: np.ndarray, nodes: np.ndarray, weights: np.ndarray
) -> float:
    """The sum over tasks of the logarithm of the mean, over difficulties, of the chance of what they gave."""
    at = odds[:, None] + spread * nodes  # models, nodes
    each = wins @ -np.logaddexp(0, -at) + (tries - wins) @ -np.logaddexp(0, at) + weights
    most = each.max(axis=1, keepdims=True)
    return float((most[:, 0] + np.log(np.exp(each - most).sum(axis=1))).sum())
