"""What every way to spend gives for a question in one wording: strategies without and behind a pilot, votes, and votes that stop early.

They stop when samples agree, or when the verifier is sure.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from assay.experiments.reasoning import compute_optimal_ttc_runs as runs
from assay.experiments.reasoning.compute_optimal_ttc_runs import NS, PARALLEL
from assay.experiments.reasoning.samples import Drawn
from assay.methods.core.reasoning.estimates import subsets
from assay.methods.core.reasoning.verifier import Verifier
from assay.methods.reasoning.compute_optimal_ttc import Attempts, Outcome, mean_score, outcomes, pass_rate
from assay.workloads.reasoning import Wording

ORDERS = 64  # sets, or orders, of the samples that an outcome is averaged over
AGREE = (1, 2, 3, 4, 5, 6, 8)
SURE = (0.1, 0.2, 0.35, 0.5, 0.7, 0.9, 1.2, 1.6, 2.4, 4.0)
"""Sums of the verifier's scores at which a weighted vote stops."""
FEW = 4  # samples at most of one that gives up early


@dataclass(frozen=True)
class Counted(Outcome):
    """An outcome that took another number of generations than `n`: `used`, a mean where it depends on what was drawn."""

    used: float = 0.0


@dataclass(frozen=True)
class Unit:
    """A question in one wording: what every strategy gives for it, and what was seen of it beforehand.

    `outcomes` are those without a pilot, `behind` those behind one, which is charged and whose samples are used again, `apart` those with a
    pilot that only tells the difficulty. `majority`, `stopping` and `sure` are the rivals': outcomes of a majority vote at each budget, of
    one that stops when so many agree, and of weighted votes that stop when the verifier's scores of an answer add up to so much.
    """

    name: str
    question: str
    wording: Wording
    outcomes: list[Outcome]
    behind: list[Outcome]
    apart: list[Outcome]
    majority: list[Outcome]
    stopping: list[Outcome]
    sure: list[Outcome]
    predicted: float
    oracle: float
    samples: list[tuple[float, bool]]  # score, and whether it is right


def unit(one: Drawn, wording: Wording, verifier: Verifier, pilot: int, most: int) -> Unit:
    """Every strategy on a question. The last `pilot` samples say how hard it is; all the others are made of those before them.

    Behind a pilot a search costs the pilot besides; independent samples take the pilot's among theirs, since they are of the same kind. The
    oracle's difficulty is of the samples that are judged: what it gains over the predicted one is flattered by that.
    """
    name = f"{wording}: {question_of(one)}"
    target, budgets, left = one.item.answer, [n for n in NS if n <= most], len(one.samples) - pilot
    everything = runs.samples_run(one, verifier)
    own = Attempts(everything.answers[:left], everything.scores[:left], everything.chains[:left])
    read, tokens = runs.tokens_of(one)
    spent = list(tokens[:left].astype(float))

    def of(strategy: str, how: Literal["weighted", "majority"]) -> list[Outcome]:
        return outcomes(name, strategy, own, target, budgets, how=how, tokens=spent, prompt_tokens=read)

    searches = [
        Outcome(name, run.strategy, run.n, float(run.attempts.choose() == target), float(run.tokens))
        for run in runs.searched(one, verifier, left, most)
    ]
    alone, spent_before = [*of(PARALLEL.name, "weighted"), *searches], float(tokens[left:].sum())
    apart: list[Outcome] = [
        Counted(name, each.strategy, each.n, each.accuracy, each.tokens + spent_before, each.n + pilot)
        for each in alone
        if each.n >= pilot
    ]
    return Unit(
        name,
        question_of(one),
        wording,
        alone,
        [
            *_joined(name, everything, left, target, [n for n in budgets if n >= pilot], read, tokens.tolist()),
            *(each for each in apart if each.strategy != PARALLEL.name),
        ],
        apart,
        of("majority", "majority"),
        _stopping(name, own, target, read, spent, most),
        [*_sure(name, own, target, read, spent, most), *_sure(name, own, target, read, spent, FEW)],
        mean_score(everything.scores[left:]),
        pass_rate([answer == target for answer in own.answers]),
        [(score, answer == target) for score, answer in zip(everything.scores, everything.answers, strict=True)],
    )


def question_of(one: Drawn) -> str:
    """The question, which is the same in all wordings."""
    return f"{one.item.kind} {one.item.level}: {one.item.question}"


def _joined(
    name: str,
    everything: Attempts,
    left: int,
    target: str,
    budgets: Sequence[int],
    read: float,
    tokens: Sequence[float],
) -> list[Outcome]:
    """Best-of-N weighted of the samples behind the first `left`, the pilot's, and as many of those as there is budget for."""
    pilot = list(range(left, len(everything.answers)))
    found: list[Outcome] = []
    for n in budgets:
        more = n - len(pilot)
        rights, spent = [], []
        for chosen in subsets(left, more, ORDERS) if more else [[]]:
            places = [*pilot, *chosen]
            part = Attempts(
                tuple(everything.answers[i] for i in places),
                tuple(everything.scores[i] for i in places),
                tuple(range(len(places))),
            )
            rights.append(part.choose() == target)
            spent.append(sum(tokens[i] for i in places))
        found.append(Counted(name, PARALLEL.name, n, float(np.mean(rights)), read + float(np.mean(spent)), float(n)))
    return found


def _stopping(name: str, own: Attempts, target: str, read: float, tokens: Sequence[float], most: int) -> list[Outcome]:
    """A majority vote that stops as soon as k samples agree, or after `most`: the mean over orders of the samples. `n` is k."""
    found: list[Outcome] = []
    orders = _orders(own, most)
    for k in AGREE:
        seen = [stopped([own.answers[i] for i in order], k) for order in orders]
        found.append(_early(name, "early stop", k, seen, orders, target, read, tokens))
    return found


def _sure(name: str, own: Attempts, target: str, read: float, tokens: Sequence[float], most: int) -> list[Outcome]:
    """A weighted vote that stops as soon as an answer's scores add up to one of `SURE`, or after `most`. `n` is the number of that sum."""
    found: list[Outcome] = []
    orders = _orders(own, most)
    for number, enough in enumerate(SURE, 1):
        seen = [stopped([own.answers[i] for i in order], enough, [own.scores[i] for i in order]) for order in orders]
        found.append(_early(name, f"sure of at most {most}", number, seen, orders, target, read, tokens))
    return found


def _orders(own: Attempts, most: int) -> list[list[int]]:
    chance = np.random.default_rng(0)
    return [chance.permutation(len(own.answers))[:most].tolist() for _ in range(ORDERS)]


def _early(
    name: str,
    strategy: str,
    number: int,
    seen: Sequence[tuple[str, int]],
    orders: Sequence[Sequence[int]],
    target: str,
    read: float,
    tokens: Sequence[float],
) -> Outcome:
    """The mean over orders of the answers that a vote gave, and of the samples that it took."""
    spent = [sum(tokens[i] for i in order[:n]) for order, (_, n) in zip(orders, seen, strict=True)]
    right, used = float(np.mean([said == target for said, _ in seen])), float(np.mean([n for _, n in seen]))
    return Counted(name, strategy, number, right, read + float(np.mean(spent)), used)


def stopped(answers: Sequence[str], enough: float, weights: Sequence[float] | None = None) -> tuple[str, int]:
    """The answer as soon as its samples weigh `enough` (1 each without `weights`), and how many samples that took; that of the largest
    weight of all where none comes to it.

    >>> stopped(["7", "8", "7", "7"], 2), stopped(["7", "8", "9"], 2), stopped(["7", "8", "7"], 0.8, [0.3, 0.9, 0.3])
    (('7', 3), ('7', 3), ('8', 2))
    """
    sums: dict[str, float] = {}
    for n, answer in enumerate(answers, 1):
        if not answer:
            continue
        sums[answer] = sums.get(answer, 0.0) + (1.0 if weights is None else weights[n - 1])
        if sums[answer] >= enough:
            return answer, n
    return max(sums, key=lambda answer: sums[answer]) if sums else "", len(answers)
