"""What the readers of RAG inference scaling say: every question at every allocation, by a small language model or by a
rule.

The model is asked in three wordings, each of them for a third of a task's questions; the rule needs one. Its samples
are read from a file where they are in one. The documents differ a little with the version of Python: what is in no file
is drawn when it is asked for, which takes half an hour, and kept.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from typing import Any

import numpy as np

from assay.catalogue.search import embed, embedded, model_folder
from assay.experiments.reasoning.samples import Kept
from assay.methods.core.reasoning.budget import Spent
from assay.methods.core.reasoning.generator import Generator, Sample, Sampling
from assay.methods.core.reasoning.prefix import PrefixGenerator
from assay.methods.core.reasoning.selectors import majority
from assay.methods.reasoning.rag_inference_scaling import (
    Allocation,
    Answered,
    Bm25,
    Example,
    Prompts,
    Reader,
    Retriever,
    Vectors,
    drag,
    iter_drag,
)
from assay.methods.reasoning.rag_inference_scaling.reading import FINAL, FOLLOW, INTERMEDIATE
from assay.workloads.documents import (
    TASKS,
    Question,
    Task,
    documents,
    exact,
    first_line,
    follow_up,
    looked_up,
    names,
    questions,
    right,
)
from assay.workloads.models import load_model
from assay.workloads.reasoning import WORDINGS, Wording

ROOM, MODEL, RULE = "rag_inference_scaling", "smollm2-135m", "rule"
NOTHING = Allocation(0)
ONE_CALL = [Allocation(k, m) for m in (0, 1, 3) for k in (0, 1, 2, 4)] + [Allocation(8)]
ROUNDS = [Allocation(2, 1, 2), Allocation(4, 3, 2)]
BARE = [Allocation(2, 3), Allocation(4, 3)]  # with demonstrations that have no documents
GRID = [*ONE_CALL, *ROUNDS]
ASKED: dict[str, tuple[Task, ...]] = {MODEL: ("base", "grand"), RULE: TASKS}
CUT = 10  # words of a document that are read; retrieval sees the whole
WORDED: dict[Wording, Prompts] = {
    "plain": Prompts(document="", question=""),
    "question": Prompts(document="- "),
    "task": Prompts("Fact: ", "Input: ", "Output:", "Answer each question from the facts above it.\n\n"),
}
READ_BY_RULE: Wording = "question"
VOTES, VOTE, VOTE_TEMPERATURE = 16, Allocation(2), 0.8
"""Samples of the majority vote: with what they write, about as many tokens as demonstrations take; and what each reads."""
NEW_TOKENS = 40  # of a sample at most: without examples it writes sentences


@dataclass(frozen=True)
class Seen:
    """What the questions of one task and part gave, a row an allocation: right and exact answers, tokens read, tokens
    in all, whether all documents that are needed were read. Questions in one wording stand `WORDINGS` apart.
    """

    right: Mapping[Allocation, np.ndarray]
    exact: Mapping[Allocation, np.ndarray]
    read: Mapping[Allocation, np.ndarray]
    tokens: Mapping[Allocation, np.ndarray]
    covered: Mapping[Allocation, np.ndarray]
    bare: Seen | None = None  # demonstrations without documents
    votes: Seen | None = None  # the majority of samples of standard RAG


class ByRule:
    """A reader that looks names up in the documents of its prompt, and asks the next question where the examples do. A
    word is a token.
    """

    name = "by rule"

    def __call__(
        self, prompts: Sequence[str], sampling: Sampling, *, n: int = 1, first: int = 0, seed: int = 0
    ) -> list[list[Sample]]:
        said = [self._said(prompt) for prompt in prompts]
        return [[one, *[replace(one, spent=replace(one.spent, prompt=0))] * (n - 1)] for one in said]

    def _said(self, prompt: str) -> Sample:
        *shown, last = prompt.split("\n\n")
        lines = last.split("\n")
        texts = [line.removeprefix("- ") for line in lines if line.startswith("- ")]
        asked = next(line for line in lines if line.startswith("Question: ")).removeprefix("Question: ")
        answers = [line.removeprefix(INTERMEDIATE).strip() for line in lines if line.startswith(INTERMEDIATE)]
        asks = [line.partition(FOLLOW)[2].strip() for line in lines if FOLLOW in line]
        in_rounds = any(FOLLOW in block for block in shown)
        text = f" {looked_up(asked, texts)}"
        if asks and not last.endswith(FINAL):
            found = looked_up(asks[-1], texts)
            after = follow_up(asked, [*answers[:-1], found]) if found else ""
            text = f" {found}\n{FOLLOW} {after}" if after else f" {found}\n{FINAL} {found}"
        elif asks:
            text = f" {looked_up(asks[-1], texts)}"
        elif in_rounds and (after := follow_up(asked, [])):
            text = f" {FOLLOW} {after}"
        return Sample(
            text, (0,) * len(text.split()), (), "stop", Spent(len(prompt.split()), len(text.split()), calls=1)
        )


class _Model:
    """The bundled model, loaded when the first sample is drawn; examples that prompts share are read once."""

    name = MODEL

    @cached_property
    def _loaded(self) -> PrefixGenerator:
        loaded = load_model(MODEL)
        return PrefixGenerator(loaded.model, loaded.tokenizer, name=MODEL)

    def __call__(
        self, prompts: Sequence[str], sampling: Sampling, *, n: int = 1, first: int = 0, seed: int = 0
    ) -> list[list[Sample]]:
        return self._loaded(prompts, sampling, n=n, first=first, seed=seed)


@cache
def kept() -> Kept:
    """The model's samples."""
    return Kept(MODEL, ROOM, _Model())  # the plain one would read the examples for every prompt


@cache
def found_by() -> Retriever:
    """Who finds documents."""
    return Bm25([each.text for each in documents()])


def reader_of(name: str, task: Task, wording: Wording = READ_BY_RULE) -> Reader:
    """The reader of a task; examples are questions of the part "shown"."""
    shown = [Example(each.question, each.answer, each.steps) for each in questions(task, n=3, part="shown")]
    generator: Generator = ByRule() if name == RULE else kept()
    return Reader([each.text for each in documents()], found_by(), generator, shown, WORDED[wording], CUT, NEW_TOKENS)


def answered(reader: Reader, asked: Sequence[Question], allocation: Allocation) -> list[Answered]:
    """The questions' answers at one allocation. Follow-ups are asked by rule: the model writes them well, but seldom
    the second.
    """
    texts = [each.question for each in asked]
    if allocation.iterations == 1:
        return drag(reader, texts, allocation)
    return iter_drag(reader, texts, allocation, follow_up=follow_up)


@cache
def seen(reader: str, learn: int, judged: int) -> dict[str, dict[Task, Seen]]:
    """What a reader does with the questions of both parts, at every allocation."""
    found: dict[str, dict[Task, Seen]] = {"learn": {}, "judged": {}}
    for task in ASKED[reader]:
        parts = {"learn": questions(task, n=learn, part="learn"), "judged": questions(task, n=judged, part="judged")}
        answers: list[dict[Allocation, dict[Place, Answered]]] = [{}, {}, {}]
        for wording, places in in_wordings(reader, {part: len(own) for part, own in parts.items()}).items():
            by = reader_of(reader, task, wording)
            asked = [parts[part][i] for part, i in places]  # read together: they share their examples
            for way, allowed, own in zip((answered, bare, voted), (GRID, BARE, [VOTE]), answers, strict=True):
                for allocation in allowed:
                    said = way(by, asked, allocation)
                    own.setdefault(allocation, {}).update(zip(places, said, strict=True))
        for part, asked in parts.items():
            at, without, votes = (
                _seen(asked, {each: [said[part, i] for i in range(len(asked))] for each, said in own.items()})
                for own in answers
            )
            found[part][task] = replace(at, bare=without, votes=votes)
    return found


Place = tuple[str, int]
"""A part, and the number of a question in it."""


def in_wordings(reader: str, sizes: Mapping[str, int]) -> dict[Wording, list[Place]]:
    """The questions of parts of these sizes by the wording they are asked in: those of each part in turn."""
    if reader == RULE:
        return {READ_BY_RULE: [(part, i) for part, size in sizes.items() for i in range(size)]}
    return {
        wording: [(part, i) for part, size in sizes.items() for i in range(k, size, len(WORDINGS))]
        for k, wording in enumerate(WORDINGS)
    }


def _seen(asked: Sequence[Question], at: Mapping[Allocation, Sequence[Answered]]) -> Seen:
    def each(what: Callable[[Question, Answered], float]) -> dict[Allocation, np.ndarray]:
        return {
            allocation: np.array([what(q, a) for q, a in zip(asked, said, strict=True)], dtype=float)
            for allocation, said in at.items()
        }

    return Seen(
        each(lambda q, a: right(q, a.text)),
        each(lambda q, a: exact(q, a.text)),
        each(lambda q, a: a.length),
        each(lambda q, a: a.tokens),
        each(lambda q, a: set(q.gold) <= set(a.documents)),
    )


def bare(reader: Reader, asked: Sequence[Question], allocation: Allocation) -> list[Answered]:
    """The same with demonstrations that have no documents."""
    return drag(reader, [each.question for each in asked], allocation, bare=True)


def voted(reader: Reader, asked: Sequence[Question], allocation: Allocation) -> list[Answered]:
    """The most frequent answer of some samples of standard RAG, in the words of the first that gives it, which are then
    judged like any other's: a sample's vote is the last name of its first line that the question does not name.
    """
    sampler = Sampling(VOTE_TEMPERATURE, 1.0, reader.new_tokens, ("\n",))
    drawn: list[list[Sample]] = []

    def many(prompts: Sequence[str], sampling: Sampling, **_: Any) -> list[list[Sample]]:
        drawn.extend(reader.generator(prompts, sampler, n=VOTES))
        return drawn

    said = drag(replace(reader, generator=Recorded(many)), [each.question for each in asked], allocation)
    found = []
    for one, samples in zip(said, drawn, strict=True):
        votes = [vote_of(one.question, sample.text) for sample in samples]
        first = samples[votes.index(majority(votes))]
        found.append(replace(one, text=first_line(first.text), samples=tuple(samples)))
    return found


def vote_of(question: str, text: str) -> str:
    """What a sample votes for, "" for nothing: names with a capital letter go before other words.

    >>> vote_of("Which class does Flag inherit from?", " Flag inherits from Enum, as Flag does.")
    'Enum'
    """
    said = [name for name in names(text) if name not in names(question)]
    return ([name for name in said if name != name.lower()] or said or [""])[-1]


@dataclass(frozen=True)
class Recorded:
    """A function as a generator."""

    call: Callable[..., list[list[Sample]]]
    name: str = "recorded"

    def __call__(
        self, prompts: Sequence[str], sampling: Sampling, *, n: int = 1, first: int = 0, seed: int = 0
    ) -> list[list[Sample]]:
        return self.call(prompts, sampling)


def recalls(judged: int) -> dict[str, dict[str, list[float]]]:
    """Of the single questions behind all judged ones, the share whose document is among the first 1, 2, 4 and 8, by
    task and retriever.
    """
    found: dict[str, dict[str, list[float]]] = {}
    for name, retriever in (("BM25", found_by()), ("MiniLM", by_meaning())):
        if retriever is None:
            continue
        found[name] = {}
        for task in TASKS:
            pairs = [
                (step[0], gold)
                for each in questions(task, n=judged, part="judged")
                for step, gold in zip(each.steps, each.gold, strict=True)
            ]
            ranked = retriever([question for question, _ in pairs], 8)
            found[name][task] = [
                float(np.mean([gold in own[:k] for (_, gold), own in zip(pairs, ranked, strict=True)]))
                for k in (1, 2, 4, 8)
            ]
    return found


def by_meaning() -> Retriever | None:
    """Documents by MiniLM's vectors, which are kept once made; None where the model's package is not installed."""
    folder = model_folder()
    if folder is None:
        return None
    return Vectors(embedded(folder, [each.text for each in documents()]), lambda texts: embed(folder, texts))
