"""Compute-optimal test-time compute: how many times fewer generations the policy needs for the accuracy of best-of-N.

Every strategy is tried on questions of three kinds in three wordings, on samples of SmolLM2-135M (`compute_optimal_ttc_runs`). The policy
is chosen by the paper's two-fold cross-validation, on one half of the questions of a bin for the other half. What tells the difficulty, two
pilot samples judged by the verifier, is charged. Accuracy is compared over all questions, easy and hard, at every budget; the figure is the
ratio of generations where both are right equally often, nine tenths of the way from one sample to the best. Behind a pilot whose samples
are used again the policy is also a gate, which keeps them where the verifier is sure: votes that stop when it is stand beside it as rivals.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np

from assay.experiments.core import Figure, Operator, experiment
from assay.experiments.reasoning import compute_optimal_ttc_runs as runs
from assay.experiments.reasoning.compute_optimal_ttc_curves import Curve, averaged, curve, interval, resampled, saving
from assay.experiments.reasoning.compute_optimal_ttc_runs import CHAINS, LENGTH, MODEL, PARALLEL, ROOM, SAMPLES, draw
from assay.experiments.reasoning.compute_optimal_ttc_units import FEW, Unit, question_of, unit
from assay.experiments.reasoning.samples import generator
from assay.methods.core.reasoning.budget import Budget, Spent
from assay.methods.core.reasoning.verifier import Verifier
from assay.methods.reasoning.compute_optimal_ttc import (
    Attempts,
    ComputeOptimalPolicy,
    Outcome,
    cross_validated,
    inference_multiplier,
    matched_size,
    outcomes,
)
from assay.workloads.reasoning import WORDINGS

SPLITS = 4  # random halvings of the bins that the policy is averaged over
RATIOS = (0.16, 0.79, 22.0)
"""Tokens generated over tokens trained on, of the paper's comparison, as recalled."""

__all__ = ["draw", "generations_saved", "small_beats_large"]


def policy_curve(
    units: Sequence[Unit],
    difficulty: Mapping[str, float],
    bins: int,
    folds: int,
    pilot: Literal["outcomes", "behind", "apart"] = "outcomes",
) -> Curve:
    """The policy, cross-validated, over several random halvings; by default without a pilot's cost (see `Unit` for the others)."""
    log = [one for u in units for one in getattr(u, pilot)]
    groups = {u.name: u.question for u in units}
    found = [
        cross_validated(log, difficulty, bins=bins, folds=folds, groups=groups, seed=seed) for seed in range(SPLITS)
    ]
    return averaged([curve(units, each) for each in found])


def random_curve(units: Sequence[Unit]) -> Curve:
    """A strategy drawn at random for each question, of those that can spend the budget: the mean over all draws."""
    found = []
    for u in units:
        for n in sorted({one.n for one in u.outcomes}):
            tried = [one for one in u.outcomes if one.n == n]
            mean = [float(np.mean([getattr(one, name) for one in tried])) for name in ("accuracy", "tokens")]
            found.append(Outcome(u.name, "random", n, mean[0], mean[1]))
    return curve(units, found)


def curves_of(units: Sequence[Unit], bins: int, folds: int) -> dict[str, Curve]:
    """The policy, its baseline and everything that stands beside it."""
    predicted, oracle = {u.name: u.predicted for u in units}, {u.name: u.oracle for u in units}
    turned = [u.predicted for u in units]
    np.random.default_rng(1).shuffle(turned)
    shuffled = {u.name: value for u, value in zip(units, turned, strict=True)}

    def plain(outcomes_of: Callable[[Unit], Sequence[Outcome]], strategy: str = "") -> Curve:
        return curve(units, [one for u in units for one in outcomes_of(u) if strategy in ("", one.strategy)])

    most = max(one.n for one in units[0].majority)
    return {
        BASE: plain(lambda u: u.outcomes, PARALLEL.name),
        POLICY: policy_curve(units, predicted, bins, folds, "behind"),
        APART: policy_curve(units, predicted, bins, folds, "apart"),
        UNCHARGED: policy_curve(units, predicted, bins, folds),
        ORACLE: policy_curve(units, oracle, bins, folds),
        SHUFFLED: policy_curve(units, shuffled, bins, folds, "behind"),
        FIXED: policy_curve(units, predicted, 1, folds),
        RANDOM: random_curve(units),
        MAJORITY: plain(lambda u: u.majority),
        STOPPING: plain(lambda u: u.stopping),
        SURE: plain(lambda u: u.sure, f"sure of at most {most}"),
        SURE_OF_FEW: plain(lambda u: u.sure, f"sure of at most {FEW}"),
    }


BASE, POLICY, APART, UNCHARGED, ORACLE, SHUFFLED = (
    "best-of-N weighted", "the policy, pilot charged", "the policy, pilot charged and its samples not used again",
    "the policy, pilot not charged", "oracle difficulty by the judged samples, not charged",
    "difficulty of another question",
)  # fmt: skip
FIXED, RANDOM, MAJORITY, STOPPING, SURE, SURE_OF_FEW = (
    "one strategy for all, chosen on other questions", "a random strategy", "majority vote",
    "majority vote that stops when k agree", "weighted vote that stops when the verifier is sure",
    f"the same, after {FEW} samples at the latest",
)  # fmt: skip
RIVALS = (FIXED, MAJORITY, STOPPING, SURE, SURE_OF_FEW)


# ----------------------------------------------------------------------------------------------------------------- experiments

SPENDING = Operator(
    "generations for questions that are not equally hard",
    free="the best of a majority vote, votes that stop when k samples agree or the verifier is sure, and one strategy for all questions",
)
PAPER: dict[str, Any] = {
    "data": "MATH", "model": "PaLM 2-S*, fine-tuned to revise", "verifier": "a fine-tuned PRM", "bins": 5, "folds": 2, "n": 64,
    "pilot": 2048,
}  # fmt: skip
DEPARTURES = {
    "data": "sums of one and of two digits and sums or differences of small numbers, as many of each, in three wordings of the prompt: "
    "what SmolLM2-135M is right about in 0 to 60 % of its samples",
    "model": "SmolLM2-135M, not fine-tuned; the policy chooses among samples and searches. Chains of revisions, shown in the prompt by "
    "four examples, are drawn at full only and are in its details",
    "verifier": "logistic regression on the probabilities of the tokens and the length, fitted to 16 roll-outs from each step",
    "n": "16 at most at small, a step of a search being one token, taken at random from those of the samples that begin alike",
    "pilot": "2 samples of each question, charged, and among its samples where the policy chooses those: the paper takes 2048 and charges "
    "none",
}
POINTS: dict[str, list[dict[str, Any]]] = {
    "smoke": [{"items": 4, "samples": 24, "learn": 4, "revised": 0, "n": 8, "bins": 2, "folds": 2, "pilot": 2}],
    "small": [{"items": 48, "samples": 24, "learn": 16, "revised": 0, "n": 16, "bins": 5, "folds": 2, "pilot": 2}],
    "full": [{"items": 48, "samples": 80, "learn": 24, "revised": 48, "n": 64, "bins": 5, "folds": 2, "pilot": 2}],
}


@experiment(
    "compute_optimal_ttc/generations-saved",
    points=POINTS,
    operator=SPENDING,
    paper=PAPER,
    departures=DEPARTURES,
    refuted_if="the policy certainly needs more generations than best-of-N weighted for the same accuracy, pilot charged, or more tokens",
    refutes=lambda record: record["measured"]["high"] < 1 or record["details"]["in all tokens"][POLICY]["high"] < 1,
    measured_here="generations of SmolLM2-135M on short arithmetic at equal accuracy, nine tenths of the way from one sample to the best; "
    "the pilot is charged",
    minutes=600,
)
def generations_saved(
    items: int, samples: int, learn: int, revised: int, n: int, bins: int, folds: int, pilot: int
) -> Figure:
    """Generations of best-of-N weighted over those of the policy where both are right as often.

    That is nine tenths of the way from one sample to where best-of-N weighted is at its best, or the policy where it is less often right. A
    sample, a beam and a greedy roll-out of a lookahead are a generation each. The pilot's samples count; a policy that chooses samples
    behind them draws so many fewer. Controls: the difficulty deleted (one strategy for all questions, chosen by the same
    cross-validation), a random strategy for each question, and as the rival the better of two weighted votes that stop when the verifier
    is sure. The interval resamples questions with all their wordings; what was chosen for each stays. In the details: the same in tokens
    of all kinds (read and not kept, generated, judged), at other shares of the way, by wording, what the verifier's roll-outs took once,
    and revisions against as many samples.
    """
    ledger = Budget()
    verifier = runs.fitted(runs.learn_sets(learn), ledger)
    units = [unit(one, wording, verifier, pilot, n) for wording, one in runs.judged_sets(items, samples)]
    named = curves_of(units, bins, folds)
    draws = resampled(units)
    base = named[BASE]
    found = {name: interval(base, each, draws) for name, each in named.items() if name != BASE}
    tokens = {name: interval(base, each, draws, "tokens") for name, each in named.items() if name != BASE}
    here, alike = found[POLICY], np.full(len(units), 1 / len(units))
    return Figure(
        here["median"],
        "x",
        here["low"],
        here["high"],
        baseline=1.0,
        free=max(found[name]["median"] for name in RIVALS),
        controls={
            "deleted": found[FIXED]["median"],
            "random": found[RANDOM]["median"],
            "rival": max(found[name]["median"] for name in (SURE, SURE_OF_FEW)),
        },
        arms={name: found[name]["median"] for name in (APART, UNCHARGED, ORACLE, SHUFFLED, MAJORITY, STOPPING)},
        details={
            "in generations": found,
            "in all tokens": tokens,
            "at other shares of the way": {
                f"{share:g}": {name: saving(base, named[name], alike, reached=share) for name in (POLICY, *RIVALS)}
                for share in (0.8, 0.95, 1.0)
            },
            "accuracy": {name: _points(each) for name, each in named.items()},
            "points over best-of-N weighted at the most generations, pilot not counted": _gain(named, draws),
            "accuracy by strategy": _by_strategy(units),
            "by wording": {wording: _in_wording(units, named, wording) for wording in WORDINGS},
            "the policy's table": _table(units, bins),
            "roll-outs of the verifier": _rollouts(ledger.spent(), units, named),
            "the verifier puts right above wrong": _verifier(units),
            "revisions": _revisions(verifier, revised) if revised else {},
            "units": len(units),
        },
    )


def _points(each: Curve) -> list[dict[str, float]]:
    """A curve's points, over all units."""
    columns = {"generations": each.generations, "tokens": each.tokens, "right": each.right}
    return [{name: float(values[p].mean()) for name, values in columns.items()} for p in range(len(each.right))]


def _gain(named: Mapping[str, Curve], draws: Sequence[np.ndarray]) -> dict[str, float]:
    """Points of accuracy that the policy is above best-of-N weighted at the largest budget, the pilot not counted."""
    lost = 100 * (named[POLICY].right[-1] - named[BASE].right[-1])
    low, high = np.quantile([lost @ weights for weights in draws], [0.025, 0.975])
    return {"median": float(lost.mean()), "low": float(low), "high": float(high)}


def _by_strategy(units: Sequence[Unit]) -> dict[str, dict[str, float]]:
    found: dict[str, dict[str, list[float]]] = {}
    for one in (one for u in units for one in u.outcomes):
        found.setdefault(one.strategy, {}).setdefault(str(one.n), []).append(one.accuracy)
    return {name: {n: float(np.mean(values)) for n, values in own.items()} for name, own in found.items()}


def _in_wording(units: Sequence[Unit], named: Mapping[str, Curve], wording: str) -> dict[str, Any]:
    """The savings over the units of one wording, with the policy that was chosen over all of them."""
    inside = np.array([u.wording == wording for u in units])
    weights = inside / inside.sum()
    names = (POLICY, APART, *RIVALS, ORACLE)
    return {
        "one sample is right": float(named[BASE].right[0] @ weights),
        "in generations": {name: saving(named[BASE], named[name], weights) for name in names},
        "in all tokens": {name: saving(named[BASE], named[name], weights, "tokens") for name in names},
    }


def _table(units: Sequence[Unit], bins: int) -> dict[str, str]:
    """What the policy chooses for each bin, from the hardest, and budget, fitted to all questions: what a user would get."""
    policy = ComputeOptimalPolicy(bins=bins).fit(
        [one for u in units for one in u.behind], {u.name: u.predicted for u in units}
    )
    return {f"bin {b} of {bins}, {n}": name for (b, n), name in sorted(policy.table_.items())}


def _rollouts(spent: Spent, units: Sequence[Unit], named: Mapping[str, Curve]) -> dict[str, float]:
    """What the verifier's samples and their roll-outs took, once; and for how many questions it lasts until that is a tenth of it all."""
    each = float(named[POLICY].tokens[-1].mean())
    return {
        "tokens": float(spent.tokens),
        "generations": float(spent.calls),
        "tokens for each question here": spent.tokens / len(units),
        "questions until they are a tenth of all tokens": 9 * spent.tokens / each,
    }


def _verifier(units: Sequence[Unit]) -> dict[str, float]:
    """How often a right sample has a higher score than a wrong one: of the same question, and of all."""
    mixed = [u.samples for u in units if len({ok for _, ok in u.samples}) == 2]
    return {
        "of the same question": float(np.mean([_above(own) for own in mixed])) if mixed else 0.5,
        "of all questions": _above([one for u in units for one in u.samples]),
    }


def _revisions(verifier: Verifier, items: int) -> dict[str, Any]:
    """Chains of two attempts against as many samples, on the questions whose revisions were drawn; and their tokens at the most."""
    kept = generator(MODEL, ROOM)
    budgets = [LENGTH * side for side in (1, 2, CHAINS)]
    right: dict[str, dict[str, list[float]]] = {}
    tokens: dict[str, list[float]] = {"chains": [], "samples": []}
    moved: dict[tuple[bool, bool], int] = {}
    for wording, one in runs.judged_sets(items, SAMPLES):
        attempts, (run,) = runs.revised_runs(one, wording, verifier, kept)
        plain, target = runs.samples_run(one, verifier), one.item.answer
        for name, found, how in (
            ("chains, by chain", attempts, "chains"), ("chains, weighted", attempts, "weighted"),
            ("chains, majority", attempts, "majority"), ("samples, weighted", plain, "weighted"),
            ("samples, majority", plain, "majority"),
        ):  # fmt: skip
            for outcome in outcomes(question_of(one), name, found, target, budgets, how=how):  # type: ignore[arg-type]
                right.setdefault(name, {}).setdefault(str(outcome.n), []).append(outcome.accuracy)
        read, own = runs.tokens_of(one)
        tokens["chains"].append(run.tokens)
        tokens["samples"].append(read + float(own[: budgets[-1]].sum()))
        for first, second in zip(attempts.answers[::LENGTH], attempts.answers[1::LENGTH], strict=True):
            key = (first == target, second == target)
            moved[key] = moved.get(key, 0) + 1
    return {
        "accuracy": {name: {n: float(np.mean(values)) for n, values in own.items()} for name, own in right.items()},
        "tokens of eight": {name: float(np.mean(values)) for name, values in tokens.items()},
        "right that stay right": _share(moved, True),
        "wrong that become right": _share(moved, False),
        "units": len(tokens["chains"]),
    }


def _share(moved: Mapping[tuple[bool, bool], int], first: bool) -> float:
    """Of the first attempts that are right, or wrong, the share with a right one behind them."""
    both, not_ = moved.get((first, True), 0), moved.get((first, False), 0)
    return both / max(both + not_, 1)


def _above(scored: Sequence[tuple[float, bool]]) -> float:
    good = np.array([score for score, ok in scored if ok])
    bad = np.array([score for score, ok in scored if not ok])
    if not len(good) or not len(bad):
        return 0.5
    ordered = np.sort(bad)
    below, equal = np.searchsorted(ordered, good, "left"), np.searchsorted(ordered, good, "right")
    return float(((below + equal) / 2 / len(bad)).mean())


@experiment(
    "compute_optimal_ttc/small-beats-large",
    points={
        "smoke": [{"n": 256, "ratio": 0.16, "items": 4}],
        "small": [{"n": 256, "ratio": 0.16, "items": 48}],
        "full": [{"n": 256, "ratio": 0.16, "items": 48}],
    },
    operator=Operator("operations for right answers", free="the larger model, answering once"),
    paper={"data": "MATH", "model": "PaLM 2-S* and one about 14 times larger", "n": 256, "ratio": 0.16},
    departures={
        "data": "short arithmetic, for the small model's accuracy in the details",
        "model": "SmolLM2-135M, and no larger one: what a larger one would have to reach is in the details",
    },
    refuted_if="a larger model's single answers are right more often on questions of every difficulty at the operations of the small one's",
    computed="the size follows from the number of answers and the ratio of tokens by the exchange of operations; whether the small "
    "model is right more often was not measured, for no larger model is here",
    measured_here="the size whose single answers cost as much, training counted; nothing about who is right",
    minutes=600,
)
def small_beats_large(n: int, ratio: float, items: int) -> Figure:
    """How many times larger the model is whose single answers cost as many operations as `n` answers of the small one.

    Ratios are those of the paper's comparison, as recalled, and the least of them counts. In the details: the exchange both ways, and how
    often SmolLM2-135M is right with one answer and with 16: a larger model that is right more often than the latter would win, whatever the
    exchange says.
    """
    judged = runs.judged_sets(items, SAMPLES)
    right: dict[str, dict[str, float]] = {}
    for wording in WORDINGS:
        own = [one for asked, one in judged if asked == wording]
        ones = [Attempts(tuple(one.answers), (1.0,) * SAMPLES, tuple(range(SAMPLES))) for one in own]
        found = [
            outcomes(question_of(one), "majority", of, one.item.answer, (1, 16), how="majority")
            for one, of in zip(own, ones, strict=True)
        ]
        right[wording] = {
            "one answer": float(np.mean([first.accuracy for first, _ in found])),
            "majority of 16": float(np.mean([last.accuracy for _, last in found])),
        }
    return Figure(
        matched_size(n, ratio),
        "x",
        baseline=1.0,
        details={
            "size at equal operations": {
                f"R = {r:g}": {str(k): matched_size(k, r) for k in (4, 16, 64, 256)} for r in RATIOS
            },
            "answers for a model 14 times larger": {f"R = {r:g}": inference_multiplier(14, r) for r in RATIOS},
            "the small model is right": right,
        },
    )
