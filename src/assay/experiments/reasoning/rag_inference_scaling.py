"""RAG inference scaling on the classes of the standard library: what does a budget of tokens buy, and does a fitted
model spend it well?

Questions of three tasks (one needs one document, two need a second that the question does not name) are asked at every
allocation of a grid: documents, demonstrations, rounds. What is chosen or fitted (the allocation of a budget, standard
RAG's number of documents, the allocation model) is chosen on questions of the part "learn" and judged on others. A
budget covers all tokens, read and written, summed over calls. Which documents are retrieved is decided by BM25; the
reader is a small language model, asked in three wordings, or a rule, which reads perfectly.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from assay.experiments.core import Figure, Guard, Operator, Quality, experiment
from assay.experiments.reasoning.rag_inference_scaling_runs import (
    BARE,
    GRID,
    MODEL,
    NOTHING,
    ONE_CALL,
    ROUNDS,
    RULE,
    VOTE,
    VOTES,
    Seen,
    kept,
    recalls,
    seen,
)
from assay.experiments.reasoning.samples import Kept
from assay.methods.reasoning.rag_inference_scaling import (
    Allocation,
    AllocationModel,
    feasible,
    informativeness,
    optimum,
)
from assay.methods.reasoning.rag_inference_scaling.allocation import determination, rows_of
from assay.workloads.documents import Task
from assay.workloads.reasoning import WORDINGS

BUDGETS = (64, 128, 256, 512, 1024, 2048)
"""Of all tokens of an answer. The last decides; the model of allocations is fitted on what the first ones up to `KNOWN`
allow.
"""
KNOWN = 512
SMALL = (1e-3, 1e-2, 1e-1)
"""What is added to the numbers of an allocation before their logarithm: the paper gives no amount."""
SIZES: dict[str, dict[str, int]] = {
    "smoke": {"learn": 6, "judged": 12},
    "small": {"learn": 18, "judged": 36},
    "full": {"learn": 24, "judged": 48},
}
BY_RULE = {"learn": 14, "judged": 20}  # nearly all questions of the task that has fewest
POINTS = {
    "smoke": [{"reader": RULE, **SIZES["smoke"]}],
    "small": [{"reader": MODEL, **SIZES["small"]}, {"reader": RULE, **BY_RULE}],
    "full": [{"reader": MODEL, **SIZES["full"]}, {"reader": RULE, **BY_RULE}],
}
DECIDES = {scale: points[0] for scale, points in POINTS.items()}
PAPER = {
    "reader": "Gemini 1.5 Flash",
    "tasks": "Bamboogle, HotpotQA, MuSiQue, 2WikiMultiHopQA",
    "retriever": "Gecko embeddings",
    "documents": "up to 1,000, of at most 1,024 tokens",
    "demonstrations": "up to 256",
    "rounds": "up to 5",
    "budget": "input tokens, 16 thousand to 5 million",
}
DEPARTURES = {
    "reader": "SmolLM2-135M, greedy; a second point has a rule that reads perfectly in its place",
    "tasks": "two about the classes of the standard library, checked by a program, a third of each in each of three wordings",
    "retriever": "BM25, whose ranks are the same everywhere; what MiniLM finds is in the details of the rule's point",
    "documents": "0 to 8 of at most 10 words, as the reader is slow",
    "demonstrations": "0, 1 or 3; those of one-step questions answer at once",
    "rounds": "at most 2 calls; follow-ups are asked by a rule that knows how such questions are built, in the model's stead, which "
    "seldom asks a second; nothing is decoded under constraints",
    "budget": "all tokens, 64 to 2,048; the figures with only the read ones charged stand in the details",
}
RAG = Operator(
    "answering a question from documents",
    free="the best of the bare question, standard RAG and examples alone, chosen on other questions at equal tokens",
)


# -------------------------------------------------------------------------------------------------------- what it shows

Parts = Mapping[str, Mapping[Task, Seen]]
Choice = Callable[[Task, float], Allocation]
"""Which allocation a way takes for a task within a budget."""
STANDARD = [each for each in GRID if each.documents and not each.shots and each.iterations == 1]
EXAMPLES = [each for each in GRID if each.shots and not each.documents]


def means(of: Mapping[Allocation, np.ndarray], allowed: Sequence[Allocation] = GRID) -> dict[Allocation, float]:
    """The mean over questions at each allocation."""
    return {allocation: float(of[allocation].mean()) for allocation in allowed}


def lengths(
    parts: Parts, task: Task, allowed: Sequence[Allocation] = GRID, *, charged: str = "tokens"
) -> dict[Allocation, float]:
    """What an answer of the task takes at each allocation, on the questions of the part "learn"."""
    return means(getattr(parts["learn"][task], charged), allowed)


def best_of(parts: Parts, allowed: Sequence[Allocation], *, charged: str = "tokens", part: str = "learn") -> Choice:
    """The allocation that is right most often on the questions of a part, of those that fit; the bare question where
    none does.
    """

    def choose(task: Task, budget: float) -> Allocation:
        own = [NOTHING, *allowed]
        return optimum(means(parts[part][task].right, own), lengths(parts, task, own, charged=charged), budget)

    return choose


def most_documents(parts: Parts) -> Choice:
    """As many documents as fit, without demonstrations."""

    def choose(task: Task, budget: float) -> Allocation:
        return max(feasible(lengths(parts, task, [NOTHING, *STANDARD]), budget))

    return choose


def rights(parts: Parts, choose: Choice, budget: float) -> np.ndarray:
    """Of all judged questions, whether the answer is right at the chosen allocations."""
    return np.concatenate([parts["judged"][task].right[choose(task, budget)] for task in parts["judged"]])


def by_chance(parts: Parts, budget: float) -> np.ndarray:
    """The same of an allocation drawn from all that fit, in expectation."""
    return np.concatenate(
        [
            np.mean([parts["judged"][task].right[each] for each in feasible(lengths(parts, task), budget)], axis=0)
            for task in parts["judged"]
        ]
    )


def fitted(parts: Parts, budget: float, **settings: Any) -> AllocationModel:
    """The allocation model of what the part "learn" gave within a budget, all tasks together; of the amounts in `SMALL`
    that keep its logarithms finite, the one that fits there best.
    """
    rows, accuracies = [], []
    for task, own in parts["learn"].items():
        known = feasible(lengths(parts, task), budget)
        rows += rows_of(known, informativeness(means(own.right)))
        accuracies += [float(own.right[each].mean()) for each in known]
    models = [AllocationModel(small=small, **settings).fit(rows, accuracies) for small in SMALL]
    return max(models, key=lambda model: explained(np.array(accuracies), model.predict(rows)))


def explained(seen_there: np.ndarray, predicted: np.ndarray) -> float:
    """R^2; 0 where all accuracies are equal and no model can say more than their mean."""
    return determination(seen_there, predicted) if np.ptp(seen_there) > 0 else 0.0


def by_model(parts: Parts, model: AllocationModel) -> Choice:
    """The allocation of which the model expects most."""

    def choose(task: Task, budget: float) -> Allocation:
        return model.best(lengths(parts, task), budget, informativeness(means(parts["learn"][task].right)))

    return choose


def one_for_all(parts: Parts, budget: float) -> Choice:
    """The one allocation that is best over all tasks within a budget, kept at every other."""
    known = set.intersection(*(set(feasible(lengths(parts, task), budget)) for task in parts["learn"]))
    score = {each: float(np.mean([own.right[each].mean() for own in parts["learn"].values()])) for each in known}
    best = max(sorted(known), key=lambda each: score[each])
    return lambda task, budget: best


def resampled(parts: Parts, random: np.random.Generator) -> Parts:
    """The judged questions drawn anew with replacement, each task's apart."""

    def again(own: Seen) -> Seen:
        drawn = random.integers(0, len(own.right[NOTHING]), len(own.right[NOTHING]))
        return replace(own, right={allocation: values[drawn] for allocation, values in own.right.items()})

    return {"learn": parts["learn"], "judged": {task: again(own) for task, own in parts["judged"].items()}}


def gain(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Per cent more right answers; half a question is added to both counts, so that there is a ratio where one of them
    is 0.
    """
    return float(100 * ((ours.sum() + 0.5) / (theirs.sum() + 0.5) - 1))


def gain_interval(ours: np.ndarray, theirs: np.ndarray, sizes: Sequence[int]) -> tuple[float, float]:
    """Its 95 % bootstrap interval, questions resampled within their tasks."""
    random = np.random.default_rng(0)
    starts = np.cumsum([0, *sizes[:-1]])
    drawn = np.concatenate(
        [start + random.integers(0, size, (2000, size)) for start, size in zip(starts, sizes, strict=True)], axis=1
    )
    found = [gain(ours[own], theirs[own]) for own in drawn]
    low, high = np.quantile(found, [0.025, 0.975])
    return float(low), float(high)


# -------------------------------------------------------------------------------------------------------- gain over RAG


@experiment(
    "rag_inference_scaling/gain-over-rag",
    points=POINTS,
    decides=DECIDES,
    operator=RAG,
    paper=PAPER,
    departures=DEPARTURES,
    refuted_if="the whole interval of the gain over standard RAG at the largest budget lies below 0 %",
    measured_here="right answers (containment) about classes of the standard library, in three wordings, at up to 2,048 tokens",
    minutes=90,
)
def gain_over_rag(reader: str, learn: int, judged: int) -> Figure:
    """Per cent more right answers than standard RAG at the largest budget, each with the allocation that was best on
    other questions.

    Standard RAG may choose its number of documents; DRAG and IterDRAG all three numbers, task by task as the paper
    does. Controls at the same budget: demonstrations without their documents (the method deleted: what the form of an
    answer is worth by itself), a random allocation, and the majority of samples of standard RAG. The interval resamples
    questions. Half a question is added to both counts. Arms: as many documents as fit, one kind of call
    alone, the allocation model, the best in hindsight.
    """
    parts = seen(reader, learn, judged)
    budget = BUDGETS[-1]
    ways = ways_of(parts)
    got = {name: rights(parts, choose, budget) for name, choose in ways.items()}
    got |= {"random": by_chance(parts, budget), **beside(parts, budget)}
    standard = got["standard RAG"]
    over = {name: gain(values, standard) for name, values in got.items()}
    low, high = gain_interval(got["chosen"], standard, [judged] * len(parts["judged"]))
    free = max(
        ("bare question", "standard RAG", "examples only"), key=lambda name: rights_of_learn(parts, ways[name], budget)
    )
    return Figure(
        over["chosen"],
        "%",
        low,
        high,
        baseline=0.0,
        free=over[free],
        controls={
            "deleted": over["demonstrations without documents"],
            "random": over["random"],
            "rival": over["majority of standard RAG"],
        },
        arms={
            name: over[name] for name in ("most documents", "one call", "rounds", "allocation model", "in hindsight")
        },
        details={
            "free": free,
            "right": {name: float(values.mean()) for name, values in got.items()},
            "right by task": {
                task: {name: float(own.right[choose(task, budget)].mean()) for name, choose in ways.items()}
                for task, own in parts["judged"].items()
            },
            "right by wording": by_wording(parts, ways, budget) if reader != RULE else "the rule reads one",
            "right by budget": curve(parts, "tokens"),
            "right by budget, only read tokens charged": curve(parts, "read"),
            "chosen": {task: shown(ways["chosen"](task, budget)) for task in parts["judged"]},
            "allocations": {task: table(own) for task, own in parts["judged"].items()},
            "votes": {
                "samples": VOTES,
                "tokens": float(np.mean([vote_tokens(own) for own in parts["judged"].values()])),
            },
            "recall by retriever": recalls(judged) if reader == RULE else "see the point of the rule",
        },
    )


def ways_of(parts: Parts) -> dict[str, Choice]:
    """The ways to spend a budget that are compared."""
    return {
        "chosen": best_of(parts, GRID),
        "standard RAG": best_of(parts, STANDARD),
        "examples only": best_of(parts, EXAMPLES),
        "bare question": lambda task, budget: NOTHING,
        "most documents": most_documents(parts),
        "one call": best_of(parts, ONE_CALL),
        "rounds": best_of(parts, ROUNDS),
        "allocation model": by_model(parts, fitted(parts, KNOWN)),
        "in hindsight": best_of(parts, GRID, part="judged"),
    }


def beside(parts: Parts, budget: float) -> dict[str, np.ndarray]:
    """What is no allocation of the grid: demonstrations without documents (the best of them and of standard RAG on
    "learn"), and the majority of samples of standard RAG, which is its one sample where the budget has no room.
    """
    bare, votes = [], []
    standard = best_of(parts, STANDARD)
    for task, own in parts["judged"].items():
        learnt = parts["learn"][task]
        assert own.bare is not None
        assert own.votes is not None
        assert learnt.bare is not None
        found = {standard(task, budget): (learnt, own)}
        found |= {each: (learnt.bare, own.bare) for each in BARE if learnt.bare.tokens[each].mean() <= budget}
        best = max(found, key=lambda each: found[each][0].right[each].mean())
        bare.append(found[best][1].right[best])
        votes.append(own.votes.right[VOTE] if vote_tokens(learnt) <= budget else own.right[standard(task, budget)])
    return {"demonstrations without documents": np.concatenate(bare), "majority of standard RAG": np.concatenate(votes)}


def vote_tokens(own: Seen) -> float:
    """What the majority took, an answer."""
    assert own.votes is not None
    return float(own.votes.tokens[VOTE].mean())


def rights_of_learn(parts: Parts, choose: Choice, budget: float) -> float:
    """How often a way is right on the questions that it was chosen on."""
    return float(np.mean([own.right[choose(task, budget)].mean() for task, own in parts["learn"].items()]))


def by_wording(parts: Parts, ways: Mapping[str, Choice], budget: float) -> dict[str, dict[str, float]]:
    """The share that is right of the questions in each wording, with what was chosen over all of them."""
    return {
        wording: {
            name: float(
                np.concatenate(
                    [own.right[choose(task, budget)][k :: len(WORDINGS)] for task, own in parts["judged"].items()]
                ).mean()
            )
            for name, choose in ways.items()
        }
        for k, wording in enumerate(WORDINGS)
    }


def curve(parts: Parts, charged: str) -> dict[str, dict[str, float]]:
    """The share that is right at each budget, by what is charged."""
    ways = {
        "chosen": best_of(parts, GRID, charged=charged),
        "standard RAG": best_of(parts, STANDARD, charged=charged),
        "in hindsight": best_of(parts, GRID, charged=charged, part="judged"),
    }
    return {
        str(budget): {name: float(rights(parts, choose, budget).mean()) for name, choose in ways.items()}
        for budget in BUDGETS
    }


def shown(allocation: Allocation) -> str:
    """An allocation in a few words."""
    return f"{allocation.documents} documents, {allocation.shots} demonstrations, {allocation.iterations} calls"


def table(own: Seen) -> dict[str, dict[str, float]]:
    """What was seen at each allocation, on average."""
    return {
        shown(allocation): {
            "right": float(own.right[allocation].mean()),
            "exact": float(own.exact[allocation].mean()),
            "read": float(own.read[allocation].mean()),
            "tokens": float(own.tokens[allocation].mean()),
            "all documents there": float(own.covered[allocation].mean()),
        }
        for allocation in GRID
    }


# ----------------------------------------------------------------------------------------------------- allocation model


@experiment(
    "rag_inference_scaling/allocation-fit",
    points=POINTS,
    decides=DECIDES,
    operator=RAG,
    paper=PAPER,
    departures=DEPARTURES,
    guard=Guard(
        "share of right answers at the allocations that the model chooses for larger budgets than it was fitted on",
        0.1,
        higher_is_better=True,
    ),
    refuted_if="the whole interval of the coefficient lies below 0: worse than one accuracy for all allocations",
    refutes=lambda record: record["measured"]["high"] < 0,
    measured_here="of accuracies, on questions that the model was not fitted on, all tasks and allocations together",
    minutes=90,
)
def allocation_fit(reader: str, learn: int, judged: int) -> Figure:
    """The coefficient of determination of the fitted model on other questions, over all tasks and allocations of the
    grid.

    Fitted on the part "learn", within a quarter of the largest budget; its interval resamples the judged questions. The
    guard is what its choices are worth at the larger budgets, against the best allocation in hindsight, which favours
    the latter. Controls: as many documents as fit (the method deleted), a random allocation, and one allocation for all
    tasks, the best within the budgets of the fit (the rival). Arms are coefficients too: without informativeness (b),
    with log(1 + theta), fitted within all budgets, one accuracy a task, and the accuracies of "learn" themselves. The
    noise of so few questions bounds all of them.
    """
    parts = seen(reader, learn, judged)
    model = fitted(parts, KNOWN)
    larger = [budget for budget in BUDGETS if budget > KNOWN]
    random = np.random.default_rng(0)
    drawn = [resampled(parts, random) for _ in range(300)]
    value = coefficient(parts, model)
    ends = np.quantile([value, *(coefficient(each, model) for each in drawn)], [0.025, 0.975])
    choices = {
        "chosen": by_model(parts, model),
        "deleted": most_documents(parts),
        "rival": one_for_all(parts, KNOWN),
        "the best on the questions of the fit": best_of(parts, GRID),
    }
    got = {name: worth(parts, choose, larger) for name, choose in choices.items()}
    got["random"] = np.mean([by_chance(parts, budget) for budget in larger], axis=0)
    best = worth(parts, best_of(parts, GRID, part="judged"), larger)
    low, high = mean_interval(got["chosen"] - best, [judged] * len(parts["judged"]))
    return Figure(
        value,
        "",
        min(float(ends[0]), value),  # resampling adds noise, so that the interval leans low
        max(float(ends[1]), value),
        quality=Quality(
            float(got["chosen"].mean()),
            float(best.mean()),
            float(best.mean()) + low,
            float(best.mean()) + high,
            controls={name: float(got[name].mean()) for name in got if name != "chosen"},
            rival="one allocation for all tasks",
        ),
        arms=coefficients(parts),
        details={
            "a": model.a_.tolist(),
            "b": model.b_.tolist(),
            "c": model.c_,
            "added before the logarithm": model.small,
            "identified": model.identified_,
            "informativeness": {task: informativeness(means(own.right)) for task, own in parts["learn"].items()},
            "on the questions of the fit": coefficient({"judged": parts["learn"], "learn": parts["learn"]}, model),
            "chosen": {
                str(budget): {task: shown(choices["chosen"](task, budget)) for task in parts["judged"]}
                for budget in BUDGETS
            },
            "regret by budget": {
                str(budget): {
                    name: float(
                        (rights(parts, best_of(parts, GRID, part="judged"), budget) - rights(parts, way, budget)).mean()
                    )
                    for name, way in choices.items()
                }
                for budget in BUDGETS
            },
            "fitted within": KNOWN,
        },
    )


def worth(parts: Parts, choose: Choice, budgets: Sequence[float]) -> np.ndarray:
    """How often each judged question is answered right, over several budgets."""
    return np.mean([rights(parts, choose, budget) for budget in budgets], axis=0)


def mean_interval(values: np.ndarray, sizes: Sequence[int]) -> tuple[float, float]:
    """The 95 % bootstrap interval of a mean, questions resampled within their tasks."""
    random = np.random.default_rng(0)
    starts = np.cumsum([0, *sizes[:-1]])
    drawn = np.concatenate(
        [start + random.integers(0, size, (2000, size)) for start, size in zip(starts, sizes, strict=True)], axis=1
    )
    low, high = np.quantile(values[drawn].mean(1), [0.025, 0.975])
    return float(low), float(high)


def observed(parts: Parts, part: str) -> np.ndarray:
    """The accuracy of every task at every allocation."""
    return np.array([own.right[each].mean() for own in parts[part].values() for each in GRID])


def coefficient(parts: Parts, model: AllocationModel) -> float:
    """R^2 of a model's accuracies on the judged questions."""
    rows = [
        row for task in parts["judged"] for row in rows_of(GRID, informativeness(means(parts["learn"][task].right)))
    ]
    return explained(observed(parts, "judged"), model.predict(rows))


def coefficients(parts: Parts) -> dict[str, float]:
    """R^2 of the model's variants, and of what needs no model."""
    seen_there, learnt = observed(parts, "judged"), observed(parts, "learn")
    of_task = np.repeat(
        [np.mean([own.right[each].mean() for each in GRID]) for own in parts["learn"].values()], len(GRID)
    )
    return {
        "without informativeness": coefficient(parts, fitted(parts, KNOWN, informed=False)),
        "log(1 + theta)": coefficient(parts, fitted(parts, KNOWN, shift="log1p")),
        "fitted on all budgets": coefficient(parts, fitted(parts, BUDGETS[-1])),
        "one accuracy a task": explained(seen_there, of_task),
        "the accuracies of the fit": explained(seen_there, learnt),
    }


def draw() -> dict[str, Kept]:
    """Everything that `small` asks of the model."""
    seen(**DECIDES["small"])
    return {MODEL: kept()}
