"""All ways of routing on the same questions: learnt from some, judged on others."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from assay.experiments.core import Quality, Trained
from assay.experiments.serving.ellie_sql.collecting import MINILM, READS, RETRIEVED, WIDTHS, Collected
from assay.experiments.serving.ellie_sql.questions import NEW_QUERIES
from assay.methods.serving.ellie_sql import (
    TIERS,
    CountRouter,
    PairwiseClassifier,
    PreferenceClassifier,
    TierRouter,
    by_chance,
    cascade_by_failure,
    nearest_neighbours,
    oracle,
    routed,
    tep,
    tuned_threshold,
)

STRENGTHS = (
    0.3,
    3.0,
    30.0,
    300.0,
)  # of the classifiers, the inverse of how much weights cost; searched where is learnt
MARGIN = 0.08  # of accuracy
MOST_LOST = 0.02  # that a threshold may lose where it is tuned
SEEDS = 3
SHARE = 0.8  # of the templates that each seed learns from
FOLDS = 3

CANDIDATE = "cascade on question and schema"
BY_COST, WORDS = "decided by cost", "without what retrieval says"
LENGTH, SHUFFLED = "length of the question only", "trained on shuffled results"
CHANCE = "the same shares by chance"
FAILURE, DOUBT = "try in turn until something is found", "try in turn until the model is sure"
NARROW, SILENT = "the advanced pipeline with fewer candidates", "the advanced pipeline without a model"
PREFERENCES = "preferences (DPO), linear"
Learner = Callable[[float], Any]


@dataclass(frozen=True)
class Arm:
    """What a way of routing did on each judged question, averaged over the seeds: right or wrong, and tokens with the router's own."""

    right: np.ndarray
    tokens: np.ndarray


class Study:
    """All ways of routing. Each seed learns from another draw of four fifths of the templates that are learnt from."""

    def __init__(self, seen: Collected) -> None:
        from threadpoolctl import threadpool_limits

        self.seen = seen
        with threadpool_limits(1):  # thousands of fits, each too small to be divided
            self._fit()

    def _fit(self) -> None:
        seen = self.seen
        self.learnt, self.judged = np.flatnonzero(~seen.judged), np.flatnonzero(seen.judged)
        self.results, self.tokens = seen.results[self.judged], seen.tokens[self.judged]
        self.scores: dict[str, list[float]] = {}
        self.strengths: list[float] = []
        self.thresholds: list[float] = []
        self.shares: np.ndarray = np.zeros(len(TIERS))
        self.candidate = self._trained(CANDIDATE, seen.words)
        self.fixed = {f"always {tier.name}": self._sent(t) for t, tier in enumerate(TIERS)}
        self.rivals = {
            FAILURE: Arm(*cascade_by_failure(seen.failed[self.judged], self.results, seen.retried[self.judged])),
            DOUBT: self._in_doubt(),
            NARROW: self._narrowed(),
            SILENT: Arm(seen.silent[self.judged], np.zeros(len(self.judged))),
            **{name: arm for name, arm in self.fixed.items() if name != f"always {TIERS[-1].name}"},
        }
        self.controls = {
            LENGTH: self._trained(LENGTH, seen.lengths),
            SHUFFLED: self._trained(SHUFFLED, seen.words, shuffled=True),
        }
        self.others = self._others()

    # -- arms

    def _drawn(self, seed: int) -> np.ndarray:
        """The rows that a seed learns from."""
        names = np.unique(self.seen.templates[self.learnt])
        kept = np.random.default_rng(seed).permutation(names)[: math.ceil(SHARE * len(names))]
        return self.learnt[np.isin(self.seen.templates[self.learnt], kept)]

    def _sent(self, tiers: Any, own: Any = 0.0) -> Arm:
        rows = np.arange(len(self.judged))
        return Arm(self.results[rows, tiers], self.tokens[rows, tiers] + own)

    def _trained(
        self,
        name: str,
        features: np.ndarray,
        *,
        how: str = "cascade",
        learner: Learner | None = None,
        shuffled: bool = False,
        own: np.ndarray | None = None,
    ) -> Arm:
        """A router whose strength and threshold are chosen on what it learns from, by queries kept out; `own` is what it reads."""
        seen, found = self.seen, []
        for seed in range(SEEDS):
            rows = self._drawn(seed)
            results = seen.results[rows]
            if shuffled:
                results = results[np.random.default_rng(seed).permutation(len(rows))]
            router, strength = tuned(features[rows], results, seen.tokens[rows], seen.queries[rows], how, learner)
            tiers = router.predict(features[self.judged])
            if name == CANDIDATE:
                self.strengths.append(strength)
                self.thresholds.append(router.threshold)
                self.shares += np.bincount(tiers, minlength=len(TIERS)) / len(tiers) / SEEDS
            found.append(self._sent(tiers, 0.0 if own is None else own[self.judged]))
            self.scores.setdefault(name, []).append(self.gained(found[-1]))
        return _mean(found)

    def _simple(self, router: Any, features: np.ndarray) -> Arm:
        """A router with nothing to be chosen."""
        from sklearn.base import clone

        found = []
        for seed in range(SEEDS):
            rows = self._drawn(seed)
            fitted = clone(router).fit(features[rows], self.seen.results[rows])
            found.append(self._sent(fitted.predict(features[self.judged])))
        return _mean(found)

    def _in_doubt(self) -> Arm:
        """Trying in turn while the model's margin is small; how small is tuned where routers learn, as their thresholds are."""
        seen, found = self.seen, []
        limits = [0.0, *np.quantile(seen.margins[self.learnt, :-1], np.linspace(0.05, 1, 20)).tolist(), math.inf]

        def tried(limit: float, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            doubt = seen.failed[rows] | (seen.margins[rows] < limit)
            return cascade_by_failure(doubt, seen.results[rows], seen.retried[rows])

        for seed in range(SEEDS):
            rows = self._drawn(seed)
            best = _cheapest([(*tried(limit, rows), limit) for limit in limits], seen.results[rows, -1])
            found.append(Arm(*tried(best, self.judged)))
        return _mean(found)

    def _narrowed(self) -> Arm:
        """The advanced pipeline with as few candidates as lose no more where routers learn than their thresholds may."""
        seen, found = self.seen, []
        results, tokens = (
            np.hstack(pair) for pair in zip(seen.narrow, (seen.results[:, -1:], seen.tokens[:, -1:]), strict=True)
        )
        for seed in range(SEEDS):
            rows = self._drawn(seed)
            choices = [(results[rows, n], tokens[rows, n], n) for n in range(len(WIDTHS) + 1)]
            best = int(_cheapest(choices, seen.results[rows, -1]))
            found.append(Arm(results[self.judged, best], tokens[self.judged, best]))
        return _mean(found)

    def _others(self) -> dict[str, Arm]:
        """Arms that decide nothing: the paper's other routers, ablations, and what no router can better."""
        seen = self.seen
        preferring: Learner = lambda strength: PreferenceClassifier(alpha=1e-3 / strength, tiers=len(TIERS))  # noqa: E731
        read = seen.read
        return {
            BY_COST: self._trained(BY_COST, seen.words, how="cost"),
            WORDS: self._trained(WORDS, seen.words[:, :-RETRIEVED]),
            "label classifier": self._trained("label classifier", seen.words, how="label"),
            "pairwise": self._trained(
                "pairwise", seen.words, how="label", learner=lambda strength: PairwiseClassifier(alpha=0.03 / strength)
            ),
            PREFERENCES: self._trained(PREFERENCES, seen.words, how="label", learner=preferring),
            **({MINILM: self._trained(MINILM, read[MINILM][0], own=read[MINILM][1])} if MINILM in read else {}),
            **(
                {READS: self._trained(READS, read[READS][0], how="label", learner=preferring, own=read[READS][1])}
                if READS in read
                else {}
            ),
            "the paper's cascade, at 0.5": self._simple(
                TierRouter(regression(float(np.median(self.strengths))), how="cascade"), seen.words
            ),
            "five nearest neighbours": self._simple(nearest_neighbours(min(5, len(self.learnt) // 2)), seen.counts),
            "table count": self._simple(CountRouter(), seen.counts),
            "oracle": self._sent(oracle(self.results)),
            "oracle, the hopeless to advanced": self._sent(oracle(self.results, hopeless="last")),
        }

    def arms(self) -> dict[str, Arm]:
        """All but the candidate and the baseline, by name."""
        shares = [float(one) for one in self.shares / self.shares.sum()]
        chance = by_chance(shares, self.results, self.tokens)
        expected = Arm(np.full(len(self.judged), chance.accuracy), np.full(len(self.judged), chance.cost))
        return {CHANCE: expected, **self.rivals, **self.controls, **self.others}

    # -- figures, of judged questions

    def saved(self, arm: Arm, rows: Any = slice(None)) -> float:
        """Per cent of the advanced pipeline's tokens."""
        return 100 * (1 - float(arm.tokens[rows].mean() / self.tokens[rows, -1].mean()))

    def elasticity(self, arm: Arm, rows: Any = slice(None)) -> float:
        """Over the advanced pipeline's; NaN where undefined, 0 where the advanced pipeline gains nothing."""
        basic, advanced = self.fixed[f"always {TIERS[0].name}"], self.fixed[f"always {TIERS[-1].name}"]
        base = float(basic.right[rows].mean()), float(basic.tokens[rows].mean())
        whole = tep(float(advanced.right[rows].mean()), float(advanced.tokens[rows].mean()), *base)
        own = tep(float(arm.right[rows].mean()), float(arm.tokens[rows].mean()), *base)
        return own / whole if whole > 0 or math.isnan(whole) else 0.0

    def rival_elasticity(self, arm: Arm) -> float:
        """A rival's elasticity; no less than the candidate's where it is as accurate with no more tokens, whatever the ratio says."""
        value, best = (_number(self.elasticity(one)) for one in (arm, self.candidate))
        no_worse = arm.right.mean() >= self.candidate.right.mean() and arm.tokens.mean() <= self.candidate.tokens.mean()
        return max(value, best) if no_worse else value

    def gained(self, arm: Arm) -> float:
        """How much better an arm routes than chance: its accuracy above that of the best mixture of single pipelines at its own tokens."""
        return float(arm.right.mean()) - self.chord(float(arm.tokens.mean()))

    def chord(self, tokens: float) -> float:
        """The accuracy that the best mixture of single pipelines by chance has at so many tokens."""
        results, costs = self.results.mean(0), self.tokens.mean(0)
        best = max((r for r, c in zip(results, costs, strict=True) if c <= tokens), default=0.0)
        for a in range(len(costs)):
            for b in range(len(costs)):
                if costs[a] < tokens < costs[b]:
                    share = (tokens - costs[a]) / (costs[b] - costs[a])
                    best = max(best, (1 - share) * results[a] + share * results[b])
        return float(best)

    def within(self, arm: Arm) -> bool:
        """Whether a rival keeps the accuracy, its mean alone: the candidate's whole interval has to."""
        return float(arm.right.mean()) >= float(self.results[:, -1].mean()) - MARGIN

    def interval(self, figure: Callable[[Any], float], undefined: list[int] | None = None) -> tuple[float, float]:
        """95 % over resampled queries, each with all its judged questions; the seeds are averaged, their own figures are in the details."""
        groups = self.seen.queries[self.judged]
        rows_of = [np.flatnonzero(groups == g) for g in np.unique(groups)]
        chance = np.random.default_rng(0)
        values = []
        for _ in range(1000):
            rows = np.concatenate([rows_of[g] for g in chance.integers(0, len(rows_of), len(rows_of))])
            values.append(figure(rows))
        fine = [value for value in values if not math.isnan(value)] or [0.0]
        if undefined is not None:
            undefined.append(sum(map(math.isnan, values)))
        low, high = np.quantile(fine, [0.025, 0.975])
        value = _number(figure(slice(None)))
        return float(min(low, value)), float(max(high, value))

    def quality(self) -> Quality:
        """The candidate's accuracy, paired with the advanced pipeline's."""
        baseline = float(self.results[:, -1].mean())
        lost = self.candidate.right - self.results[:, -1]
        low, high = self.interval(lambda rows: float(lost[rows].mean()))
        arms = self.arms()
        return Quality(
            float(self.candidate.right.mean()),
            baseline,
            baseline + low,
            baseline + high,
            controls={
                "deleted": float(self.results[:, 0].mean()),
                "random": float(arms[CHANCE].right.mean()),
                "rival": float(arms[FAILURE].right.mean()),
                **{
                    name: float(arms[name].right.mean())
                    for name in (DOUBT, NARROW, SILENT, LENGTH, SHUFFLED, f"always {TIERS[1].name}")
                },
            },
            rival=FAILURE,
        )

    def trained(self) -> dict[str, Trained]:
        """The candidate's accuracy above that of the best mixture of single pipelines by chance at its own tokens: chance is 0, and what
        the oracle gains is perfect."""
        strength = float(np.median(self.strengths))
        return {
            CANDIDATE: Trained(
                scores=self.scores[CANDIDATE],
                floor=0.0,
                floor_name="single pipelines mixed by chance",
                rate=strength,
                rates=STRENGTHS,
                higher_is_better=True,
                best=self.gained(self.others["oracle"]),
            )
        }

    def details(self) -> dict[str, Any]:
        """The pair (accuracy, tokens) of every arm, and what else a reader may ask."""
        arms = {CANDIDATE: self.candidate, **self.fixed, **self.arms()}
        new = np.isin([self.seen.asked[n].query for n in self.judged], [query.name for query in NEW_QUERIES])
        parts = {"queries learnt from in other wordings": ~new, "queries not learnt from": new}
        dearer = float(np.ptp(self.tokens.mean(0)[[0, -1]]))
        return {
            **self.seen.details,
            "accuracy_and_tokens": {
                name: [float(one.right.mean()), float(one.tokens.mean())] for name, one in arms.items()
            },
            "candidate_and_advanced_by_part": {
                name: [
                    [float(one.right[rows].mean()), float(one.tokens[rows].mean())]
                    for one in (self.candidate, self.fixed[f"always {TIERS[-1].name}"])
                ]
                for name, rows in parts.items()
                if rows.any()
            },
            "shares_of_tiers": dict(zip([tier.name for tier in TIERS], self.shares.tolist(), strict=True)),
            "strengths": self.strengths,
            "thresholds": self.thresholds,
            "gained_over_mixtures_by_chance": self.scores,
            "curve": self._curve(),
            "share_to_basic_from_which_a_router_that_reads_pays": {
                name: float(own[self.judged].mean()) / max(dearer, 1e-9) for name, (_, own) in self.seen.read.items()
            },
        }

    def _curve(self) -> list[list[float]]:
        """(threshold, accuracy, tokens) of the candidate's kind of router at fixed thresholds, of the first seed."""
        rows = self._drawn(0)
        router = TierRouter(regression(self.strengths[0]), how="cascade").fit(
            self.seen.words[rows], self.seen.results[rows]
        )
        probabilities = router.predict_proba(self.seen.words[self.judged])
        found = []
        for threshold in np.linspace(0, 1, 11):
            one = routed(router.decide(probabilities, float(threshold)), self.results, self.tokens)
            found.append([float(threshold), one.accuracy, one.cost])
        return found


def _mean(arms: list[Arm]) -> Arm:
    return Arm(np.mean([one.right for one in arms], axis=0), np.mean([one.tokens for one in arms], axis=0))


def _number(value: float) -> float:
    """An elasticity, 0 where it is undefined."""
    return 0.0 if math.isnan(value) else value


def _cheapest(choices: Sequence[tuple[np.ndarray, np.ndarray, float]], wanted: np.ndarray) -> float:
    """Of (right, tokens, setting) the setting with the fewest tokens that loses at most `MOST_LOST` of `wanted`; else the most accurate."""
    tried = []
    for right, tokens, setting in choices:
        enough = right.mean() >= wanted.mean() - MOST_LOST - 1e-12
        tried.append((enough, -tokens.mean() if enough else right.mean(), setting))
    return float(max(tried)[2])


def regression(strength: float) -> Any:
    """A logistic regression."""
    from sklearn.linear_model import LogisticRegression

    return LogisticRegression(C=strength, max_iter=1000)


def tuned(
    features: np.ndarray,
    results: np.ndarray,
    costs: np.ndarray,
    groups: np.ndarray,
    how: str = "cascade",
    learner: Learner | None = None,
) -> tuple[TierRouter, float]:
    """A fitted router: of all strengths and thresholds the ones that are cheapest without losing more than `MOST_LOST` of the advanced
    pipeline's accuracy, on `groups` kept out of learning."""
    from sklearn.base import clone
    from sklearn.model_selection import GroupKFold

    tried = []
    least = float(results[:, -1].mean()) - MOST_LOST
    folds = min(FOLDS, len(set(groups)))
    every = np.arange(len(results))
    for strength in STRENGTHS:
        router = TierRouter((learner or regression)(strength), how=how, costs=costs.mean(0).tolist())
        threshold = router.threshold
        if how == "label":
            tiers = np.zeros(len(results), dtype=int)
            for learn, keep in GroupKFold(folds).split(features, groups=groups):
                tiers[keep] = clone(router).fit(features[learn], results[learn]).predict(features[keep])
            accuracy, cost = float(results[every, tiers].mean()), float(costs[every, tiers].mean())
        else:
            threshold, curve = tuned_threshold(
                router, features, results, costs, groups=groups, most_lost=MOST_LOST, folds=folds
            )
            _, accuracy, cost = next(one for one in curve if one[0] == threshold)
        enough = accuracy >= least - 1e-12
        tried.append((enough, -cost if enough else accuracy, strength, threshold))
    _, _, strength, threshold = max(tried)
    router = TierRouter((learner or regression)(strength), how=how, threshold=threshold, costs=costs.mean(0).tolist())
    return router.fit(features, results), strength
