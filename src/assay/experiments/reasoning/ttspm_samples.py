"""What the experiments on saturating test-time compute are evaluated from: samples of a bundled model, and accuracy at
every size.

Sums of one and two digits and single steps, each in three wordings, 24 samples of each judged question. The likeliest
answers and rounds of rethinking, which show the model its last answer and ask again, are drawn for this room (`draw`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np

from assay.experiments.reasoning.samples import Drawn, Kept, generator, sampling_of, shared
from assay.methods.core.reasoning.estimates import over_items, subsets
from assay.methods.core.reasoning.generator import Sampling
from assay.methods.core.reasoning.logs import Logged
from assay.methods.reasoning.ttspm import Chain, rethinking_rate
from assay.methods.reasoning.ttspm.logs import SETS
from assay.workloads.reasoning import WORDINGS, Kind, Part, Wording, right

MODEL, ROOM = "smollm2-135m", "ttspm"
TASKS: tuple[tuple[Kind, int], ...] = (("sum", 1), ("sum", 2), ("steps", 1))
"""Kinds and levels, all that the model gets right between one time in fifty and two in three on the pilot part."""
SIZES = (1, 2, 4, 8, 16, 24)
JUDGED, SAMPLES = 48, 24  # questions of each task to judge, and samples of each
LEARN = {("sum", 1): 24, ("sum", 2): 40, ("steps", 1): 40}  # questions to fit: sums of one digit are few
FEW = 8  # samples that predictions are made from
ROUNDS, RETHOUGHT = 8, 16  # rounds of rethinking, and questions that are rethought
Group = tuple[Kind, int, Wording]
Groups = dict[Group, list[Drawn]]


# ------------------------------------------------------------------------------------------------------------------- samples


def groups(part: Part, items: int, n: int) -> Groups:
    """`n` samples of `items` questions of each task (at most `LEARN` to fit), in each wording, the same questions in
    all."""
    most = LEARN if part == "learn" else dict.fromkeys(TASKS, items)
    return {
        (kind, level, wording): shared(kind, level, wording, part, n_items=min(items, most[kind, level]), n=n)
        for kind, level in TASKS
        for wording in WORDINGS
    }


def as_logged(drawn: Sequence[Drawn]) -> list[Logged]:
    """Samples in the layout of a log, as somebody would have them who ran an evaluation."""
    return [
        Logged(
            f"{one.item.kind} {one.item.question}", one.prompt, one.item.answer, tuple(s.text for s in one.samples),
            tuple(one.answers), tuple(one.right),
        )
        for one in drawn
    ]  # fmt: skip


def name_of(group: Group) -> str:
    return f"{group[0]}{group[1]} {group[2]}"


def by_question(table: Mapping[Group, np.ndarray]) -> np.ndarray:
    """Means over the wordings of each question, (questions, ...): of every task, one below the other."""
    return np.concatenate([np.mean([table[kind, level, w] for w in WORDINGS], axis=0) for kind, level in TASKS])


def resampled(n: int, statistic: Callable[[np.ndarray], float], *, draws: int = 1000) -> tuple[float, float]:
    """The 95 % interval of a statistic of the numbers of questions, which are resampled."""
    chance = np.random.default_rng(0)
    found = [statistic(chance.integers(0, n, n)) for _ in range(draws)]
    low, high = np.quantile(found, [0.025, 0.975])
    return float(low), float(high)


def mean_of(values: np.ndarray) -> dict[str, float]:
    """The mean over questions, with its interval."""
    return dict(zip(("median", "low", "high"), over_items(values.tolist()), strict=True))


# ------------------------------------------------------------------------------------------------- accuracy at every size


def most_likely(drawn: Sequence[Drawn], sizes: Sequence[int]) -> np.ndarray:
    """Accuracy, (items, sizes), of the sample with the largest mean log-probability: best of N with a judge that costs
    nothing."""
    found = np.empty((len(drawn), len(sizes)))
    for j, size in enumerate(sizes):
        sets = np.array(subsets(len(drawn[0].samples), size, SETS))
        for i, one in enumerate(drawn):
            scores = np.array([sample.mean_logprob for sample in one.samples])[sets]
            best = np.take_along_axis(sets, scores.argmax(1)[:, None], 1)[:, 0]
            found[i, j] = np.array(one.right)[best].mean()
    return found


def tokens_of(drawn: Sequence[Drawn], sizes: Sequence[int]) -> np.ndarray:
    """Tokens, (items, sizes): the prompt once, and what so many samples generate on average."""
    read = np.array([one.samples[0].spent.prompt for one in drawn], dtype=float)
    written = np.array([np.mean([sample.spent.completion for sample in one.samples]) for one in drawn])
    return np.array(read[:, None] + written[:, None] * np.array(sizes))


def greedy(found: Groups) -> dict[Group, np.ndarray]:
    """Whether the likeliest answer is right, of each item: one answer at temperature 0."""
    kept = generator(MODEL, ROOM)
    seen = {}
    for group, drawn in found.items():
        sampling = sampling_of(group[0], False, 0.0)
        answers = kept([one.prompt for one in drawn], sampling, n=1)
        seen[group] = np.array([right(one.item, s[0].text) for one, s in zip(drawn, answers, strict=True)], dtype=float)
    return seen


# --------------------------------------------------------------------------------------------------------------- rethinking

AGAIN = "Let me check that again.\n"


def rethought(found: Groups, items: int, rounds: int) -> dict[Group, tuple[list[list[bool]], float]]:
    """Whether each round's answer is right, (items, rounds), of the sums in plain wording, and all tokens of an item's
    rounds: a round sees the answer before it and no other, and reads its prompt anew."""
    kept = generator(MODEL, ROOM)
    seen = {}
    for group, drawn in found.items():
        if group[0] != "sum" or group[2] != "plain":
            continue
        asked = drawn[:items]
        sampling: Sampling = sampling_of("sum", False, 0.8)
        texts = [one.samples[0].text for one in asked]
        ok = [[right(one.item, text)] for one, text in zip(asked, texts, strict=True)]
        tokens = sum(one.samples[0].spent.tokens for one in asked)
        for number in range(1, rounds):
            prompts = [_again(one.prompt, text, group[2]) for one, text in zip(asked, texts, strict=True)]
            # another number each round: the same prompt would give the same sample again
            answers = [sample for (sample,) in kept(prompts, sampling, n=1, first=number)]
            texts = [answer.text for answer in answers]
            tokens += sum(answer.spent.tokens for answer in answers)
            for own, one, text in zip(ok, asked, texts, strict=True):
                own.append(right(one.item, text))
        seen[group] = ok, tokens / len(asked)
    return seen


def _again(prompt: str, answer: str, wording: Wording) -> str:
    """The prompt with its answer, and the question once more."""
    mark = {"plain": "\n", "question": "Question:", "task": "Input:"}[wording]
    at = prompt.rindex(mark) + (wording == "plain")
    return f"{prompt}{answer}\n{AGAIN}{prompt[at:]}"


def rethinking(found: Groups, items: int, rounds: int) -> dict[str, Any]:
    """What rethinking reaches beside what the two chains say, all fitted on the first half of the rounds, by group."""
    seen = {}
    for group, (ok, tokens) in rethought(found, items, rounds).items():
        half = [own[: rounds // 2] for own in ok]
        chain, absorbing = Chain.fit(half), rethinking_rate(half)
        samples = [one.right[:rounds] for one in found[group][:items]]
        seen[name_of(group)] = {
            "p_rethink": absorbing.p,
            "p_forget": chain.forget,
            "right in the last round": float(np.mean([own[-1] for own in ok])),
            "the chain with forgetting said": chain.predict(rounds),
            "ever right": float(np.mean([any(own) for own in ok])),
            "the paper's chain said": absorbing.predict(rounds),
            "ever right of as many independent samples": float(np.mean([any(own) for own in samples])),
            "tokens of the rounds": tokens,
            "tokens of as many independent samples": float(tokens_of(found[group][:items], [rounds]).mean()),
        }
    return seen


@cache
def draw() -> dict[str, Kept]:
    """All samples of this room that are not shared: the likeliest answers, and rounds of rethinking."""
    found = groups("judged", JUDGED, SAMPLES)
    greedy(found)
    rethought(found, RETHOUGHT, ROUNDS)
    return {MODEL: generator(MODEL, ROOM)}
