"""The arms of the experiments on Plan and Budget: a small chat model that is asked word problems without an example.

So asked, it thinks too long: it may find the product and go on until it is lost. Every arm is drawn once and cut: a limit of k tokens gives
the first k tokens of the same sample, since each sample has a random stream of its own.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from assay.experiments.reasoning.samples import Kept
from assay.methods.core.reasoning.answers import canonical
from assay.methods.core.reasoning.budget import Budget, Spent
from assay.methods.core.reasoning.generator import Generator, Sample, Sampling, TransformersGenerator, seed_of
from assay.methods.core.reasoning.samples import key_of
from assay.methods.core.reasoning.selectors import majority
from assay.methods.reasoning.plan_and_budget import (
    ModelPlanner,
    Plan,
    PlanAndBudget,
    Planner,
    RulePlanner,
    Schedule,
    prompt_tokens,
    request,
)
from assay.methods.reasoning.plan_and_budget.controller import BETWEEN, Mode
from assay.workloads.models import load_model
from assay.workloads.reasoning import WORDINGS, Item, Part, Wording, answer_of, items

MODEL, ROOM = "smollm2-135m", "plan_and_budget"
END = "<|im_end|>"
LIMIT, PART = 256, 96  # new tokens at most: of an answer without a budget, and of a part or a plan
SAMPLING = Sampling(0.1, 0.9, LIMIT, (END,))
PLANNING = Sampling(0.1, 0.9, PART, (BETWEEN, END))
GUESS = Sampling(0.8, 1.0, 6, (".", "\n", END))
GUESSES = 8
CAPS = (16, 24, 32, 48, 64, 96, 128, LIMIT)
TOTALS = (12, 24, 48, 96)
LEVEL = 1
"""Of the word problems: by the pilot part a third is right. Those of two steps are never solved without examples."""
EXAMPLE = (
    "Problem: Tom buys 3 hats for 5 dollars each and a scarf for 4 dollars. How many dollars does Tom pay?\n"
    "1. What do the 3 hats cost?\nHint: multiply.\n2. What do the hats and the scarf cost?\nHint: add."
)
WORDED: dict[Wording, str] = {
    "plain": "{}", "question": "Question: {}", "task": "Work out how much is paid.\nInput: {}",
}  # fmt: skip


def ask(text: str) -> str:
    """The model's chat template around what a user says."""
    return f"<|im_start|>user\n{text}{END}\n<|im_start|>assistant\n"


# ------------------------------------------------------------------------------------------------------------------- drawing


class Bare:
    """The model, loaded when it is first needed; its samples without log-probabilities, which nothing here reads."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._loaded: TransformersGenerator | None = None

    @property
    def loaded(self) -> TransformersGenerator:
        if self._loaded is None:
            found = load_model(self.name)
            self._loaded = TransformersGenerator(found.model, found.tokenizer, name=self.name)
        return self._loaded

    def __call__(
        self, prompts: Sequence[str], sampling: Sampling, *, n: int = 1, first: int = 0, seed: int = 0
    ) -> list[list[Sample]]:
        drawn = self.loaded(prompts, sampling, n=n, first=first, seed=seed)
        return [[replace(sample, logprobs=()) for sample in own] for own in drawn]


class Cutting(Kept):
    """Kept samples, of which a lower limit is cut out of the sample with the highest one instead of drawn again."""

    def __init__(self, name: str = MODEL, room: str = ROOM) -> None:
        self._bare = Bare(name)
        super().__init__(name, room, self._bare)

    def __call__(
        self, prompts: Sequence[str], sampling: Sampling, *, n: int = 1, first: int = 0, seed: int = 0
    ) -> list[list[Sample]]:
        top = {SAMPLING.stop: LIMIT, GUESS.stop: 0}.get(sampling.stop, PART if BETWEEN in sampling.stop else 0)
        if sampling.max_new_tokens < top:
            self._cut(prompts, sampling, top, range(first, first + n), seed)
        return super().__call__(prompts, sampling, n=n, first=first, seed=seed)

    def _cut(self, prompts: Sequence[str], sampling: Sampling, top: int, numbers: range, seed: int) -> None:
        keys = {text: [key_of(self.name, text, sampling, seed, number) for number in numbers] for text in prompts}
        missing = [text for text, own in keys.items() if not self.has(own)]
        if not missing:
            return
        whole = self.own(missing, replace(sampling, max_new_tokens=top), n=len(numbers), first=numbers.start, seed=seed)
        decode = self._bare.loaded.tokenizer.decode
        self.add(
            [
                (key, cut(replace(sample, spent=replace(sample.spent, prompt=own[0].spent.prompt)), sampling, decode))
                for text, own in zip(missing, whole, strict=True)
                for key, sample in zip(keys[text], own, strict=True)
            ]
        )


def cut(sample: Sample, sampling: Sampling, decode: Callable[[list[int]], str]) -> Sample:
    """What the sample would have been with the lower limit of `sampling`."""
    most = sampling.max_new_tokens
    if len(sample.tokens) <= most:
        return sample
    kept = sample.tokens[:most]
    seconds = sample.spent.seconds * most / len(sample.tokens)
    spent = Spent(sample.spent.prompt, most, 0, 1, seconds)
    return Sample(decode(list(kept)), kept, (), "length", spent)


# ----------------------------------------------------------------------------------------------------------------- questions


@dataclass(frozen=True)
class Asked:
    """An item and how it is put."""

    item: Item
    wording: Wording

    @property
    def text(self) -> str:
        return WORDED[self.wording].format(self.item.question)


def asked(part: Part, each: int) -> list[Asked]:
    """`each` questions a wording, no question in two wordings; whoever asks for more gets the same first."""
    drawn = items("story", level=LEVEL, n=each * len(WORDINGS), part=part)
    return [Asked(item, WORDINGS[i % len(WORDINGS)]) for i, item in enumerate(drawn)]


_STORY = re.compile(r"(\w+) buys (\d+ \w+) for")


def rule_plan(question: str) -> Plan:
    """The parts of a question about buying: what the things cost, and what is paid; most of the credit for the first (our choice)."""
    found = _STORY.search(question)
    if found is None:
        return Plan((question,), level=1)
    name, things = found.groups()
    return Plan((f"What do the {things} cost?", f"How many dollars does {name} pay?"), (80, 20), 1)


def planner(kind: str, generator: Generator) -> Planner:
    """The rule, charged as if it had been written, or the model's own plan; it cannot judge levels or credits, which are equal then."""
    if kind == "rule":
        return RulePlanner(rule_plan, prompt_tokens(generator))
    return ModelPlanner(generator, ask, PLANNING, EXAMPLE, assess=False, level=1, hints=False)


@dataclass(frozen=True)
class Random:
    """The plans of another planner with credits drawn at random, uniform over all splits."""

    planner: Planner

    def __call__(self, questions: Sequence[str], budgets: Sequence[Budget], *, seed: int = 0) -> list[Plan]:
        plans = self.planner(questions, budgets, seed=seed)
        return [
            replace(
                plan, credits=tuple(np.random.default_rng(seed_of(question)).dirichlet([1] * len(plan.parts)).tolist())
            )
            for question, plan in zip(questions, plans, strict=True)
        ]


# ---------------------------------------------------------------------------------------------------------------------- arms


@dataclass(frozen=True)
class Seen:
    """What an arm did, question by question: right or not; tokens with the plan; those of the answer alone; prompts too."""

    right: list[float]
    tokens: list[float]
    answer: list[float]
    every: list[float]
    details: Mapping[str, Any]

    @property
    def accuracy(self) -> float:
        return float(np.mean(self.right))

    @property
    def mean(self) -> float:
        return float(np.mean(self.tokens))


def answered(item: Item, said: Sequence[str]) -> str:
    """The answer of the last part that gives one; the numbers of lists are no answers."""
    for text in reversed(said):
        if found := answer_of(item, re.sub(r"(?m)^\s*\d\.\s", "", text + "\n")):
            return found
    return ""


def seen(rows: Sequence[Asked], said: Sequence[Sequence[str]], ledgers: Sequence[Budget], **details: Any) -> Seen:
    """Of every question's ledger and text."""
    return Seen(
        [float(answered(row.item, own) == row.item.answer) for row, own in zip(rows, said, strict=True)],
        [float(ledger.spent().completion) for ledger in ledgers],
        [float(ledger.spent("solve").completion) for ledger in ledgers],
        [float(ledger.spent().tokens) for ledger in ledgers],
        details,
    )


def thinking(generator: Generator, rows: Sequence[Asked], cap: int = LIMIT, total: int | None = None) -> Seen:
    """Step by step without a plan, with one cap for all, and with `total` a sentence that asks for fewer tokens."""
    drawn = generator([ask(request(row.text, total=total)) for row in rows], replace(SAMPLING, max_new_tokens=cap))
    ledgers = [Budget() for _ in rows]
    for (sample,), ledger in zip(drawn, ledgers, strict=True):
        ledger.book("solve", sample.spent)
    ended = float(np.mean([sample.ended == "stop" for (sample,) in drawn]))
    return seen(rows, [(sample.text,) for (sample,) in drawn], ledgers, ended=ended)


def stopping(generator: Generator, rows: Sequence[Asked]) -> Seen:
    """Stopped as soon as an answer is stated, or the last number is the same at two looks running; looks at the lengths in `CAPS`."""
    asks = [ask(request(row.text)) for row in rows]
    looks = [generator(asks, replace(SAMPLING, max_new_tokens=cap)) for cap in CAPS]
    ledgers, said = [Budget() for _ in rows], []
    for i, row in enumerate(rows):
        last = ""
        for look in looks:
            (sample,) = look[i]
            found = answered(row.item, (sample.text,))
            stated = re.search(r"answer is\D*\d+\D", sample.text)
            if stated or sample.ended == "stop" or (found and found == last):
                break
            last = found
        said.append((sample.text,))
        ledgers[i].book("solve", sample.spent)
    return seen(rows, said, ledgers)


def guessing(generator: Generator, rows: Sequence[Asked], tokens: float) -> Seen:
    """The majority of answers given at once, as many of them as take `tokens` in the mean, one at least and `GUESSES` at most."""
    drawn = generator([ask(request(row.text)) + "The answer is" for row in rows], GUESS, n=GUESSES)
    each = float(np.mean([sample.spent.completion for own in drawn for sample in own]))
    n = min(max(int(tokens / each), 1), GUESSES)
    ledgers = [Budget() for _ in rows]
    said = []
    for row, own, ledger in zip(rows, drawn, ledgers, strict=True):
        for sample in own[:n]:
            ledger.book("solve", sample.spent)
        said.append((majority([canonical(answered(row.item, (sample.text,))) for sample in own[:n]]),))
    return seen(rows, said, ledgers, answers=n)


class Unlimited(PlanAndBudget):
    """The plan without budgets: every part may take as much as any could."""

    def allot(self, plan: Plan) -> list[int]:
        return [PART] * len(plan.parts)


def planned(
    generator: Generator,
    rows: Sequence[Asked],
    plan: str,
    total: int | None,
    schedule: Schedule = "polynomial",
    *,
    weighted: bool = True,
    mode: Mode = "enforced",
    random: bool = False,
) -> Seen:
    """The method with `total` tokens for a question, all of one level; None for the plan without budgets."""
    own = planner(plan, generator)
    solver = (Unlimited if total is None else PlanAndBudget)(
        generator,
        Random(own) if random else own,
        ask,
        {1: total or 0},
        schedule,
        weighted,
        mode=mode,
        sampling=SAMPLING,
    )
    found = solver.solve([row.text for row in rows])
    parts = max(len(solved.plan.parts) for solved in found)
    return seen(
        rows,
        [solved.said for solved in found],
        [solved.budget for solved in found],
        parts=float(np.mean([len(solved.plan.parts) for solved in found])),
        used=[float(np.mean([(*solved.used, *[0] * parts)[i] for solved in found])) for i in range(parts)],
        allotted=[float(np.mean([(*solved.allotted, *[0] * parts)[i] for solved in found])) for i in range(parts)],
        full=float(
            np.mean(
                [
                    float(took >= given)
                    for solved in found
                    for took, given in zip(solved.used, solved.allotted, strict=bool(solved.used))
                ]
                or [0.0]
            )
        ),
    )
