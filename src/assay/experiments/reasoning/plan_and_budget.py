"""Plan and Budget: how many tokens does an answer take less, and what does it score by E3, with the plan charged?

A chat model of 135M parameters is asked word problems without an example, as the paper asks its models: it thinks too long, and may lose an
answer that it had. Budgets are enforced, part by part; what only telling them does stands beside it. All totals and caps are chosen by
one rule on other questions ("learn"): of those that are as accurate as thinking without a budget, less the margin, the one with the fewest
tokens, and the most accurate one where thinking without a budget is never right. The tokens of a plan count, whether the model wrote it or
a rule made it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np

from assay.experiments.core import Figure, Guard, Operator, Quality, experiment
from assay.experiments.reasoning.plan_and_budget_arms import (
    CAPS,
    GUESSES,
    LIMIT,
    MODEL,
    TOTALS,
    Asked,
    Cutting,
    Seen,
    asked,
    guessing,
    planned,
    stopping,
    thinking,
)
from assay.methods.core.reasoning.estimates import over_items
from assay.methods.reasoning.plan_and_budget import SCHEDULES, e3
from assay.workloads.reasoning import WORDINGS

MARGIN = 0.05  # of accuracy
TOLD = 48  # tokens that told budgets speak of: less than half of what the model takes unasked, by the pilot part
DELETED, RANDOM, RIVAL = "deleted", "random", "rival"
DRAWS = 2000


@cache
def generator() -> Cutting:
    """The samples, one object a process."""
    return Cutting()


# ------------------------------------------------------------------------------------------------------------------ figures


def chosen(options: Mapping[Any, Seen], accuracy: float) -> Any:
    """The option with the fewest tokens of those that are right as often as `accuracy`, else the most accurate one.

    Where `accuracy` is not above 0 anything would do: the most accurate one is taken then too. Where none is ever right it is the
    largest, so that nothing is saved at the floor by choice alone.
    """
    if not any(seen.accuracy for seen in options.values()):
        return max(options)
    enough = [key for key, seen in options.items() if seen.accuracy >= accuracy > 0]
    if enough:
        return min(enough, key=lambda key: options[key].mean)
    return max(options, key=lambda key: (options[key].accuracy, -options[key].mean))


def best_e3(options: Mapping[Any, Seen]) -> Any:
    """The option that scores best by E3, the one with the fewest tokens of equal ones."""
    return max(options, key=lambda key: (score(options[key]), -options[key].mean))


def score(seen: Seen) -> float:
    """E3 of an arm, with every generated token."""
    return e3(100 * seen.accuracy, seen.mean)


def resampled(figure: Callable[[np.ndarray], float], n: int) -> tuple[float, float, float]:
    """A figure of all questions, and the interval of it over questions that are drawn again."""
    draws = np.random.default_rng(0).integers(0, n, (DRAWS, n))
    low, high = np.quantile([figure(rows) for rows in draws], [0.025, 0.975])
    return figure(np.arange(n)), float(low), float(high)


def saved(ours: Sequence[float], theirs: Sequence[float]) -> tuple[float, float, float]:
    """Per cent of tokens less, of means, with its interval."""
    a, b = np.asarray(ours), np.asarray(theirs)
    return resampled(lambda rows: float(100 * (1 - a[rows].mean() / b[rows].mean())), len(a))


def gained(ours: Seen, theirs: Seen) -> tuple[float, float, float]:
    """Per cent of E3 more, with its interval; 0 where thinking is never right, for nothing can be said there.

    A draw of questions without a right answer counts as half of one, so that its share exists.
    """
    if not any(theirs.right):
        return 0.0, 0.0, 0.0
    right, base = np.asarray(ours.right), np.asarray(theirs.right)
    tokens, spent = np.asarray(ours.tokens), np.asarray(theirs.tokens)

    def figure(rows: np.ndarray) -> float:
        least = 0.5 / len(rows)
        ours_, theirs_ = right[rows].mean(), max(base[rows].mean(), least)
        return float(100 * (ours_**2 / tokens[rows].mean() / (theirs_**2 / spent[rows].mean()) - 1))

    return resampled(figure, len(right))


def at_equal(options: Mapping[int, Seen], tokens: float) -> Seen:
    """An option that takes exactly `tokens` in the mean: a coin between the two next to it, whose rightness and tokens are expected ones.

    Where all take more, or all less, the one that comes nearest.
    """
    ordered = sorted(options.values(), key=lambda seen: seen.mean)
    above = next((k for k, seen in enumerate(ordered) if seen.mean >= tokens), len(ordered) - 1)
    more, less = ordered[above], ordered[max(above - 1, 0)]
    if more.mean <= less.mean or tokens >= more.mean:
        return more
    share = (tokens - less.mean) / (more.mean - less.mean)

    def mixed(low: Sequence[float], high: Sequence[float]) -> list[float]:
        return [(1 - share) * a + share * b for a, b in zip(low, high, strict=True)]

    return Seen(
        mixed(less.right, more.right), mixed(less.tokens, more.tokens), mixed(less.answer, more.answer),
        mixed(less.every, more.every), {"share of the larger cap": share},
    )  # fmt: skip


# --------------------------------------------------------------------------------------------------------------------- arms


@cache
def measured(plan: str, schedule: Any, each: int, learn: int, every: bool) -> dict[str, Any]:
    """All arms on the judged questions, their totals and caps chosen on the learnt ones. `every` asks for schedules, told budgets, and
    the same with a rule's plan besides."""
    give = generator()
    judged, fitted = asked("judged", each), asked("learn", learn)
    caps = {cap: thinking(give, fitted, cap) for cap in CAPS}
    totals = {total: planned(give, fitted, plan, total, schedule) for total in TOTALS}
    target = caps[LIMIT].accuracy - MARGIN
    total, cap = chosen(totals, target), chosen(caps, target)
    ours = planned(give, judged, plan, total, schedule)
    judged_caps = {each_cap: thinking(give, judged, each_cap) for each_cap in CAPS}
    found: dict[str, Any] = {
        "rows": judged,
        "ours": ours,
        "baseline": judged_caps[LIMIT],
        "cap": judged_caps[cap],
        "best cap for E3": judged_caps[best_e3(caps)],
        DELETED: at_equal(judged_caps, ours.mean),
        RANDOM: planned(give, judged, plan, total, "constant", random=True),
        RIVAL: guessing(give, judged, ours.mean),
        "adaptive stop": stopping(give, judged),
        "plan without budgets": planned(give, judged, plan, None),
        "chosen": {"total": total, "cap": cap, "cap for E3": best_e3(caps)},
        "learn": {
            "caps": {str(key): [seen.accuracy, seen.mean] for key, seen in caps.items()},
            "totals": {str(key): [seen.accuracy, seen.mean] for key, seen in totals.items()},
        },
        "judged totals": {str(other): summary(planned(give, judged, plan, other, schedule)) for other in TOTALS},
    }
    arms = {"uniform split": planned(give, judged, plan, total, "constant", weighted=False)}
    if every:
        arms |= {f"{name} split": planned(give, judged, plan, total, name) for name in SCHEDULES if name != schedule}
        arms["budgets told, not enforced"] = planned(give, judged, plan, TOLD, schedule, mode="told")
        arms["fewer tokens told, no plan"] = thinking(give, judged, total=TOLD)
        if plan != "rule":
            arms["a rule's plan"] = measured("rule", schedule, each, learn, False)["ours"]
    return found | {"arms": arms}


def summary(seen: Seen) -> dict[str, float]:
    """An arm in a row of a table."""
    return {
        "accuracy": seen.accuracy,
        "tokens": seen.mean,
        "tokens of the answer": float(np.mean(seen.answer)),
        "tokens with prompts": float(np.mean(seen.every)),
        "E3": score(seen),
        **{name: value for name, value in seen.details.items() if isinstance(value, float | int)},
    }


def others(found: Mapping[str, Any]) -> dict[str, Seen]:
    """The arms beside the method and its baseline, by name."""
    return {
        **found["arms"],
        "one cap for all, chosen on other questions": found["cap"],
        "adaptive stop": found["adaptive stop"],
        "plan without budgets": found["plan without budgets"],
        "majority of answers at once": found[RIVAL],
    }


def by_wording(rows: Sequence[Asked], seen: Seen) -> dict[str, list[float]]:
    """Accuracy and tokens under each wording."""
    return {
        wording: [
            float(np.mean([values[i] for i, row in enumerate(rows) if row.wording == wording]))
            for values in (seen.right, seen.tokens)
        ]
        for wording in WORDINGS
    }


def details_of(found: Mapping[str, Any]) -> dict[str, Any]:
    """What both claims' records tell beside their figures."""
    ours, base = found["ours"], found["baseline"]
    over = [a - b for a, b in zip(ours.right, found[DELETED].right, strict=True)]
    return {
        "arms": {
            "the method": summary(ours),
            "no budget": summary(base),
            **{name: summary(seen) for name, seen in others(found).items()},
            "one cap for all at as many tokens": summary(found[DELETED]),
            "budgets split at random": summary(found[RANDOM]),
        },
        "tokens a part, allotted and used": [ours.details["allotted"], ours.details["used"]],
        "saved as the paper counts, without the plan (%)": saved(ours.answer, base.answer),
        "E3 gained as the paper counts, without the plan (%)": gained(replace(ours, tokens=ours.answer), base),
        "saved with every token that was read (%)": saved(ours.every, base.every),
        "saved over the plan without budgets (%)": saved(ours.tokens, found["plan without budgets"].tokens),
        "accuracy over one cap at equal tokens": dict(zip(("mean", "low", "high"), over_items(over), strict=True)),
        "by wording (accuracy, tokens)": {
            "the method": by_wording(found["rows"], ours), "no budget": by_wording(found["rows"], base),
        },
        "chosen on other questions": found["chosen"],
        "on other questions (accuracy, tokens)": found["learn"],
        "at other totals": found["judged totals"],
        "questions": len(found["rows"]),
    }  # fmt: skip


# -------------------------------------------------------------------------------------------------------------- experiments

THINKING = Operator(
    "answers to word problems, worked out in steps by a chat model",
    free="one limit on new tokens for all questions, chosen on other questions by the same rule",
)
PAPER: dict[str, Any] = {
    "data": "MATH-500, NaturalInstructions, TravelPlanner",
    "model": "DeepSeek-R1 distilled into Qwen-32B and Llama-70B, QwQ-32B, o4-mini",
    "plan": "model",
    "schedule": "polynomial",
    "enforced": False,
    "totals": "200 to 600 tokens by level",
    "charged": "tokens of the answer",
    "levels": "judged by a model, with credits",
}
DEPARTURES = {
    "data": "word problems of one product made from a template, asked without examples in three wordings: of harder ones this model "
    "solves next to none",
    "model": "SmolLM2-135M-Instruct at the paper's temperature 0.1 and top_p 0.9: what runs here",
    "enforced": "each part is stopped at its tokens, since a small model does not heed a number of words; told budgets stand beside it",
    "totals": f"one of {', '.join(map(str, TOTALS))}, chosen on other questions: the paper's are more than this model takes",
    "charged": "all generated tokens, those of the plan too; without them in the details",
    "levels": "all questions are of one level, and this model writes no JSON: its own plan has equal credits, a rule's has 80 and 20",
}
GUARD = Guard("share of right answers", MARGIN, higher_is_better=True, relative=False)
HERE = "generated tokens, the plan's included, of a 135M chat model on word problems of one product, no budget being 256 tokens"


def points(each: int, learn: int, *, every: bool = True) -> list[dict[str, Any]]:
    """The model's own plan, which decides, and a rule's."""
    return [
        {"plan": plan, "schedule": "polynomial", "each": each, "learn": learn, "every": every}
        for plan in ("model", "rule")
    ]


POINTS = {"smoke": points(2, 2, every=False)[1:], "small": points(10, 10), "full": points(60, 60)}
DECIDES = {scale: grid[0] for scale, grid in POINTS.items()}


@experiment(
    "plan_and_budget/token-reduction",
    points=POINTS,
    decides=DECIDES,
    operator=THINKING,
    guard=GUARD,
    paper=PAPER,
    departures=DEPARTURES,
    refuted_if="with its plan charged the method takes more tokens than thinking without a budget, or one cap for all that takes as many "
    "tokens is more often right, with the whole interval",
    refutes=lambda record: (
        record["measured"]["high"] < 0 or record["details"]["accuracy over one cap at equal tokens"]["high"] < 0
    ),
    measured_here=HERE,
    minutes=60,
)
def token_reduction(plan: str, schedule: str, each: int, learn: int, every: bool) -> Figure:
    """Tokens saved against thinking without a budget, of means over questions.

    The guard is the accuracy: against thinking without a budget, with controls that take as many tokens: the plan deleted (one cap for
    all), the same plan with budgets split at random, and the majority of answers given at once.
    """
    found = measured(plan, schedule, each, learn, every)
    ours, base = found["ours"], found["baseline"]
    value, low, high = saved(ours.tokens, base.tokens)
    lost = over_items([a - b for a, b in zip(ours.right, base.right, strict=True)])
    return Figure(
        value,
        "%",
        low=low,
        high=high,
        baseline=0.0,
        free=saved(found["cap"].tokens, base.tokens)[0],
        arms={name: saved(seen.tokens, base.tokens)[0] for name, seen in others(found).items()},
        quality=Quality(
            *(base.accuracy + lost[0], base.accuracy, base.accuracy + lost[1], base.accuracy + lost[2]),
            controls={name: found[name].accuracy for name in (DELETED, RANDOM, RIVAL)},
            rival=f"the majority of answers given at once, as many as take the same tokens, {GUESSES} at most",
        ),
        details=details_of(found),
    )


@experiment(
    "plan_and_budget/e3-gain",
    points=POINTS,
    decides=DECIDES,
    operator=THINKING,
    paper=PAPER,
    departures=DEPARTURES,
    refuted_if="E3 with the plan charged is below that of thinking without a budget, with the whole interval",
    measured_here=HERE.replace(
        "generated tokens, the plan's included,", "E3 over all generated tokens, the plan's included,"
    ),
    minutes=60,
)
def e3_gain(plan: str, schedule: str, each: int, learn: int, every: bool) -> Figure:
    """Gain in E3 = accuracy^2 / tokens against thinking without a budget, of means over questions.

    Its controls take as many tokens: one cap for all, the plan with budgets split at random, answers given at once. `free` is the cap that
    scores best by E3 on other questions.
    """
    found = measured(plan, schedule, each, learn, every)
    base = found["baseline"]
    value, low, high = gained(found["ours"], base)
    return Figure(
        value,
        "%",
        low=low,
        high=high,
        baseline=0.0,
        free=gained(found["best cap for E3"], base)[0],
        controls={name: gained(found[name], base)[0] for name in (DELETED, RANDOM, RIVAL)},
        arms={name: gained(seen, base)[0] for name, seen in others(found).items()},
        details=details_of(found),
    )


def draw() -> dict[str, Cutting]:
    """Draw what `small` asks for."""
    for point in POINTS["small"]:
        measured(**point)
    return {MODEL: generator()}
