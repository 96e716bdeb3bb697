"""What a policy's traces look like: how unequal their returns are, how often one is far above the mean, and what that
speaks for.

A trace has H steps and the bi-level reward: 1 at every step from that on at which it has reached a right answer, else
0. Its return J is H - t + 1 for the first success at step t and 0 without one, so that earlier is better, and J / H is
the accuracy averaged over all budgets up to H. J mixes being right with being brief: look at both (`budget_curve`).
"""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from assay import checks
from assay.methods.core.reasoning.logs import Logged, read_log

SHARP = 0.05
"""Anti-concentration below this counts as none (our choice; the paper asks for some constant)."""


def returns(first: Sequence[int | None], H: int) -> np.ndarray:
    """The return of each trace at horizon H from its step of first success (1 is the first; None for never); later
    ones count as never.

    Cutting traces to a smaller H is the same as annotating them anew with it.

    >>> returns([1, 4, None, 9], 8).tolist()
    [8.0, 5.0, 0.0, 0.0]
    """
    H = checks.whole("H", H, low=1)
    steps = [H + 1 if one is None else checks.whole("first", one, low=1) for one in first]
    return np.array([float(max(H - step + 1, 0)) for step in steps])


@dataclass(frozen=True)
class Heterogeneity:
    """The standard deviation of returns within a prompt: `median` and `mean` over prompts (the root of the mean
    variance) with the jackknife's standard error of the mean, and the `share` of prompts without any spread (all
    alike: never solved, say)."""

    median: float
    mean: float
    error: float
    flat: float


def _by_prompt(returns_by_prompt: Sequence[Sequence[float]], least: int) -> list[np.ndarray]:
    found = [np.array([checks.number("returns", one) for one in own]) for own in returns_by_prompt]
    if not found or min(map(len, found)) < least:
        raise ValueError(f"returns must hold at least {least} traces of each of at least one prompt, got fewer")
    return found


def heterogeneity(returns_by_prompt: Sequence[Sequence[float]]) -> Heterogeneity:
    """How unequal the traces of a prompt are: sigma(x) is the standard deviation of their returns (unbiased variance,
    n - 1).

    By the law of total variance this is the sum over steps of the variance of the action values
    (`stepwise_heterogeneity`), because a state is the prompt and all tokens so far. A prompt that was never solved has
    none: look at `flat`. Raises ValueError for fewer than two traces of a prompt.

    >>> found = heterogeneity([[0.0, 8.0], [4.0, 4.0]])
    >>> round(found.mean, 6), found.flat
    (4.0, 0.5)
    """
    variances = np.array([own.var(ddof=1) if np.ptp(own) > 0 else 0.0 for own in _by_prompt(returns_by_prompt, 2)])
    n, mean = len(variances), math.sqrt(variances.mean())
    left_out = np.sqrt(np.maximum(variances.sum() - variances, 0.0) / max(n - 1, 1))
    error = math.sqrt((n - 1) / n * ((left_out - left_out.mean()) ** 2).sum()) if n > 1 else math.inf
    return Heterogeneity(float(np.median(np.sqrt(variances))), mean, float(error), float((variances == 0).mean()))


def stepwise_heterogeneity(
    policy: Callable[[tuple[int, ...]], Sequence[float]], value: Callable[[tuple[int, ...]], float], H: int
) -> tuple[float, float]:
    """sigma^2 of a tabular policy in both ways: (the sum over steps of E[Var(Q | state)], the variance of the return).
    They are equal.

    `policy(prefix)` gives the chances of the next token, `value(trace)` the return of a whole trace of H tokens. All
    traces are enumerated, so it is for small vocabularies and horizons: a check, and an oracle for tests. Raises
    ValueError where chances do not add up to 1.

    >>> stepwise_heterogeneity(lambda prefix: [0.5, 0.5], lambda trace: float(sum(trace)), 2)
    (0.5, 0.5)
    """
    H = checks.whole("H", H, low=1)
    chances: dict[tuple[int, ...], list[float]] = {}
    reached: dict[tuple[int, ...], float] = {(): 1.0}
    for h in range(H):
        for prefix in [one for one in reached if len(one) == h]:
            chances[prefix] = [checks.number("policy", p, low=0, high=1) for p in policy(prefix)]
            if abs(math.fsum(chances[prefix]) - 1) > 1e-6:
                raise ValueError(f"policy must give chances that add up to 1, got {checks.shown(chances[prefix])}")
            for token, p in enumerate(chances[prefix]):
                reached[*prefix, token] = reached[prefix] * p
    worth = {trace: checks.number("value", value(trace)) for trace in reached if len(trace) == H}
    stepwise = 0.0
    for h in reversed(range(H)):
        for prefix in [one for one in reached if len(one) == h]:
            each = np.array([worth[*prefix, token] for token in range(len(chances[prefix]))])
            shares = np.array(chances[prefix])
            worth[prefix] = float(shares @ each)
            stepwise += reached[prefix] * float(shares @ (each - worth[prefix]) ** 2)
    whole = math.fsum(reached[t] * (worth[t] - worth[()]) ** 2 for t in reached if len(t) == H)
    return stepwise, whole


def anti_concentration(returns_by_prompt: Sequence[Sequence[float]], e: float = 1.0) -> float:
    """c(e): how often a trace's return is at least sqrt(e) standard deviations above its prompt's mean, the mean over
    prompts that have a spread.

    Non-increasing in `e`. Prompts whose traces are all alike are left out, for there is nothing above their mean; 0
    where all are.

    >>> anti_concentration([[0.0, 0.0, 0.0, 4.0], [1.0, 1.0, 1.0, 1.0]], 1.0)
    0.25
    """
    e = checks.number("e", e, low=0)
    shares = []
    for own in _by_prompt(returns_by_prompt, 2):
        if np.ptp(own) > 0:  # the deviation of equal ones is not always 0 in floating point
            shares.append(float((own >= own.mean() + own.std(ddof=1) * math.sqrt(e)).mean()))
    return float(np.mean(shares)) if shares else 0.0


def budget_curve(first: Sequence[int | None], budgets: Sequence[int]) -> list[tuple[int, float, float]]:
    """(budget, success, mean return) of traces that are cut to each budget, from their steps of first success.

    >>> budget_curve([1, 4, None, 9], [4, 16])
    [(4, 0.5, 1.25), (16, 0.75, 9.25)]
    """
    if not len(first):
        raise ValueError("first must hold at least one trace, got none")
    found = []
    for H in budgets:
        own = returns(first, H)
        found.append((int(H), float((own > 0).mean()), float(own.mean())))
    return found


@dataclass(frozen=True)
class Advice:
    """Which way the paper's rates speak for, and the two rates without their constants: orders of magnitude, never
    predictions."""

    way: Literal["verifier", "imitation"]
    imitation_rate: float
    verifier_rate: float
    why: str


def recommend(sigma: float, c: float, n: int, H: int) -> Advice:
    """The paper's rates for n prompts and horizon H: imitation stays sigma / sqrt(n) behind, a verifier H / n.

    A heuristic (our choice): rewards where sigma / sqrt(n) > H / n and the base policy has traces far above its mean
    (`c` at least `SHARP`). The rates are of the worst case and lack their constants: they say in which regime a model
    is, not what accuracy will be.

    >>> recommend(sigma=20.0, c=0.2, n=256, H=64).way, recommend(sigma=0.1, c=0.2, n=256, H=64).way
    ('verifier', 'imitation')
    """
    sigma, c = checks.number("sigma", sigma, low=0), checks.number("c", c, low=0, high=1)
    n, H = checks.whole("n", n, low=1), checks.whole("H", H, low=1)
    if sigma > H / 2 * math.sqrt(2):  # of two traces, the unbiased deviation of 0 and H
        raise ValueError(f"sigma must be at most H / sqrt(2), {H / math.sqrt(2):.4g}, got {sigma:.4g}")
    ours, theirs = sigma / math.sqrt(n), H / n
    if c < SHARP:
        return Advice("imitation", ours, theirs, f"traces far above the mean are rare ({c:.3g}): search finds little")
    if ours > theirs:
        return Advice(
            "verifier", ours, theirs, "traces are unequal, and enough prompts are there to learn from rewards"
        )
    why = "traces are alike" if sigma == 0 else "too few prompts for a verifier of traces this long"
    return Advice("imitation", ours, theirs, why)


# -------------------------------------------------------------------------------------------------------------------- logs


@dataclass(frozen=True)
class Diagnosis:
    """What logged samples show: `first` has each prompt's steps of success, `H` the horizon."""

    first: tuple[tuple[int | None, ...], ...]
    H: int
    heterogeneity: Heterogeneity
    anti_concentration: float

    def advice(self, prompts: int) -> Advice:
        """`recommend` for training on so many prompts."""
        return recommend(self.heterogeneity.mean, self.anti_concentration, prompts, self.H)

    def curve(self, budgets: Sequence[int]) -> list[tuple[int, float, float]]:
        """`budget_curve` of all traces."""
        return budget_curve([one for own in self.first for one in own], budgets)


def words(text: str) -> int:
    """How long a text is: its words, at least 1."""
    return max(len(text.split()), 1)


def fit(
    log: str | os.PathLike[str] | Sequence[Logged],
    *,
    H: int | None = None,
    e: float = 1.0,
    length: Callable[[str], int] = words,
) -> Diagnosis:
    """Diagnose a policy from its logged samples: `samples_*.jsonl` of the LM Evaluation Harness, or items that
    `read_log` gave.

    A right sample succeeds at its last step, whose number is `length` of its text (words; give a tokenizer's count for
    tokens), a wrong one never. `H` is the budget, by default the longest sample's length. Raises ValueError for an
    item with fewer than two samples.

    >>> items = [Logged("0", "", "7", ("so it is 7", "7", "8"), ("7", "7", "8"), (True, True, False))]
    >>> found = fit(items)
    >>> found.H, found.first, found.curve([1, 4])
    (4, ((4, 1, None),), [(1, 0.3333333333333333, 0.3333333333333333), (4, 0.6666666666666666, 1.6666666666666667)])
    """
    logged = read_log(log) if isinstance(log, str | os.PathLike) else list(log)
    if not logged:
        raise ValueError("log must hold at least one item, got none")
    lengths = [[checks.whole("length", length(text), low=1) for text in item.texts] for item in logged]
    first = tuple(
        tuple(at if ok else None for at, ok in zip(own, item.right, strict=True))
        for own, item in zip(lengths, logged, strict=True)
    )
    horizon = max(itertools.chain(*lengths)) if H is None else checks.whole("H", H, low=1)
    found = [returns(own, horizon).tolist() for own in first]
    return Diagnosis(first, horizon, heterogeneity(found), anti_concentration(found, e))
