"""Does learning from a verifier's rewards gain over imitating right traces, and more so the larger the budget?

Decoders trained here (`verifier_based_ttc_models`) answer a didactic problem within budgets of H steps. At each budget
imitation and policy gradients against a learned verifier start from one base policy, with the same contexts, as many
sampled traces and as many words of training, the verifier's included. Contexts that are judged are none of these;
seeds differ in everything, the secret table too. The budgets go from where the base policy is rarely
right to where it is right less than half the time: before, nobody is right, and after, everybody; that range is our
choice, and so how steep gaps are. What the models decide is on whose side they are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from assay.experiments.core import Figure, Operator, Trained, experiment
from assay.experiments.mixers.training import in_parallel, over_seeds
from assay.experiments.reasoning import compute_optimal_ttc_runs as sums
from assay.experiments.reasoning.samples import DIRECT
from assay.experiments.reasoning.verifier_based_ttc_models import (
    BASE,
    BEST,
    FULL,
    GRADIENT,
    IMITATION,
    MIXTURES,
    QUICKEST,
    RECIPE,
    SMOKE,
    TRUE,
    USELESS,
    VERIFIER,
    Recipe,
    mean_return,
    outcomes,
    searched_rate,
    success,
)
from assay.methods.core.reasoning.budget import Budget
from assay.methods.reasoning.compute_optimal_ttc import outcomes as voted
from assay.methods.reasoning.verifier_based_ttc import anti_concentration, heterogeneity, recommend, returns
from assay.workloads.reasoning import WORDINGS

SAMPLED = (1, 2, 4, 8, 16)
Seen = dict[str, Any]
RATED = {IMITATION: IMITATION, QUICKEST: QUICKEST, VERIFIER: GRADIENT}
"""The learning rate that each arm has."""


def gap(
    seen: Seen, arm: str, H: int, *, mixture: str = "unequal", of: Callable[[list[int], int], float] = success
) -> float:
    """What an arm is right more often than imitation at a budget, of one seed."""
    arms = seen[mixture][str(H)]
    return of(arms[arm], H) - of(arms[IMITATION], H)


def growth(seen: Seen, arm: str, budgets: Sequence[int], *, mixture: str = "unequal") -> float:
    """How much larger an arm's gap is at the largest budget than at the smallest, in points of accuracy.

    A gap below 0 at the smallest counts as none: an arm that only loses less with the budget does not gain over
    imitation.
    """
    return 100 * (gap(seen, arm, budgets[-1], mixture=mixture) - max(gap(seen, arm, budgets[0], mixture=mixture), 0.0))


def language_model(questions: int) -> dict[str, Any]:
    """What a real model's samples are like, by wording: SmolLM2-135M on short sums, nothing of it trained.

    The heterogeneity and anti-concentration of returns, in tokens of an answer, and what the rates speak for; and how
    often the vote of N samples is right, weighted by a verifier that was fitted on other questions, or by count alone.
    """
    found: dict[str, Any] = {}
    verifier = sums.fitted(sums.learn_sets(max(1, questions // 3)), Budget())
    judged = sums.judged_sets(questions, sums.SAMPLES)
    for wording in WORDINGS:
        own = [one for asked, one in judged if asked == wording]
        first = [
            [sample.spent.completion if ok else None for sample, ok in zip(one.samples, one.right, strict=True)]
            for one in own
        ]
        by_question = [returns(steps, DIRECT).tolist() for steps in first]
        sigma, c = heterogeneity(by_question), anti_concentration(by_question)
        right: dict[str, dict[int, list[float]]] = {}
        for one in own:
            attempts = sums.samples_run(one, verifier)
            for name, how in (("by the verifier", "weighted"), ("by count", "majority")):
                for each in voted("question", name, attempts, one.item.answer, SAMPLED, how=how):  # type: ignore[arg-type]
                    right.setdefault(name, {}).setdefault(each.n, []).append(each.accuracy)
        found[wording] = {
            "heterogeneity": asdict(sigma),
            "anti-concentration": c,
            "the rates speak for": recommend(sigma.mean, c, len(own), DIRECT).way,
            "right": {name: {str(n): float(np.mean(values)) for n, values in by.items()} for name, by in right.items()},
        }
    return found


@experiment(
    "verifier_based_ttc/verifier-beats-imitation",
    points={"smoke": [{"recipe": SMOKE}], "small": [{"recipe": RECIPE}], "full": [{"recipe": FULL}]},
    operator=Operator(
        "learning, from a base policy's traces, to be right within a budget",
        free="imitation of each context's quickest right trace only, with as many words of training",
    ),
    paper={
        "task": "MATH and s1's questions",
        "model": "Llama of 3B and 8B, s1 of 32B",
        "direction": "the gap grows with the budget",
    },
    departures={
        "task": "hidden patterns with experts of three strengths, after the paper's didactic problem: no model here solves the others",
        "model": "decoders of two layers trained here",
    },
    refuted_if=(
        "the whole interval of the gap's growth lies below 0 points, or the gap grows at least as much where the base policy's traces are "
        "all alike"
    ),
    refutes=lambda record: (
        record["measured"]["high"] < 0
        or record["measured"]["median"] > 0
        and record["details"]["growth over that of alike traces"]["high"] < 0
    ),
    measured_here="points that a verifier's gap over imitation grows by, from the smallest budget to the largest, on a didactic problem",
    minutes=60,
    memory_gib=8,
)
def verifier_beats_imitation(recipe: Recipe) -> Figure:
    """How much the gap in accuracy between the verifier's way and imitation grows from the smallest budget to the
    largest, in points.

    The interval is Student's t over seeds. The controls are growths too: the method deleted is the base policy, random
    a verifier whose scores are noise, the rival (and free) imitation of the quickest right traces, which uses the same
    rewards without a verifier. An arm says what the gap grows by where one strong expert makes all traces alike:
    theory wants none there, for no trace is far above their mean. An arm must beat the base policy, from which it
    starts, to count as trained. In the details: the bi-level return, in steps, whose gap grows with H by its very unit,
    so that it decides nothing; and what the samples of a real language model are like.
    """
    made = in_parallel(outcomes, [(dict(recipe), seed, name) for name in MIXTURES for seed in range(recipe["seeds"])])
    found: list[Seen] = [{**made[seed], **made[seed + recipe["seeds"]]} for seed in range(recipe["seeds"])]
    budgets = recipe["budgets"]
    low_and_high = [budgets[0], budgets[-1]]

    def growths(arm: str, mixture: str = "unequal") -> list[float]:
        return [growth(seen, arm, low_and_high, mixture=mixture) for seen in found]

    def mean(arm: str, mixture: str = "unequal") -> float:
        return float(np.mean(growths(arm, mixture)))

    def spread(values: Sequence[float]) -> dict[str, float]:
        interval = over_seeds(values)
        return {"median": interval.median, "low": interval.low, "high": interval.high}

    resolution = 100 / recipe["judged"] / len(found) ** 0.5
    ours = over_seeds(growths(VERIFIER), resolution=resolution)
    alike = growths(VERIFIER, "alike")
    arms = [arm for arm in found[0]["unequal"][str(budgets[0])] if arm != IMITATION]
    return Figure(
        ours.median,
        "points",
        ours.low,
        ours.high,
        baseline=0.0,
        free=mean(QUICKEST),
        controls={"deleted": mean(BASE), "random": mean(USELESS), "rival": mean(QUICKEST)},
        arms={
            "traces all alike": float(np.mean(alike)),
            "best of 4 traces by the verifier, four times the words": mean(BEST),
            "policy gradients on true rewards, which imitation has fewer of": mean(TRUE),
            **{
                f"gap at a budget of {H}": 100 * float(np.mean([gap(seen, VERIFIER, H) for seen in found]))
                for H in budgets
            },
        },
        trained={
            arm: Trained(
                [success(seen["unequal"][str(budgets[-1])][arm], budgets[-1]) for seen in found],
                float(np.mean([success(seen["unequal"][str(budgets[-1])][BASE], budgets[-1]) for seen in found])),
                "the base policy",
                searched_rate(rated).rate,
                searched_rate(rated).rates,
                higher_is_better=True,
            )
            for arm, rated in RATED.items()
        },
        details={
            "growth over that of alike traces": spread([a - b for a, b in zip(growths(VERIFIER), alike, strict=True)]),
            "gap by budget": {
                arm: {str(H): spread([100 * gap(seen, arm, H) for seen in found]) for H in budgets} for arm in arms
            },
            "gap in return by budget": {
                arm: {str(H): spread([gap(seen, arm, H, of=mean_return) for seen in found]) for H in budgets}
                for arm in arms
            },
            "accuracy": {
                mixture: {
                    H: {arm: [success(seen[mixture][H][arm], int(H)) for seen in found] for arm in found[0][mixture][H]}
                    for H in found[0][mixture]
                }
                for mixture in ("unequal", "alike")
            },
            "base policies": {name: [seen[f"{name}, base policy"] for seen in found] for name in ("unequal", "alike")},
            "SmolLM2-135M on sums": language_model(recipe["sums"]),
        },
    )
