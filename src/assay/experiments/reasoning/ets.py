"""ETS: how much less does the cache of a tree search hold, how much faster is the search, and is the answer still right?

SmolLM2-135M works out small sums step by step, in three wordings, and a verifier fitted on other questions scores its steps. REBASE
and ETS search with as many trajectories. Trees are of real samples, drawn once (`ets_trees`). What the cache holds is counted in
tokens on all of them, and measured on a few that the model searches anew, with a trie of real keys and values: the bytes of all
tensors that are alive.

An expert's free way to hold less is REBASE with fewer trajectories, as few as lost no accuracy on the pilot part.
"""

from __future__ import annotations

import gc
import itertools
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
from torch import Tensor

from assay.experiments.core import Figure, Guard, Operator, Quality, Trial, experiment
from assay.experiments.reasoning import ets_trees as grove
from assay.experiments.reasoning.ets_trees import (
    BEAM,
    CHAINS,
    ETS,
    KV,
    NARROW,
    RANDOM,
    REBASE,
    WAYS,
    Task,
    Tree,
    grown,
    trees,
)
from assay.experiments.reasoning.samples import Kept
from assay.methods.core.reasoning import selectors
from assay.methods.core.reasoning.generator import Sampling
from assay.methods.reasoning.ets import TreeGenerator
from assay.workloads.models import model_folder
from assay.workloads.reasoning import Kind, Wording, prompt

MARGIN = 0.05  # of accuracy: what may be lost
DRAWS = 2000
WIDTHS = (8, 4)  # among which the free baseline's is chosen
PILOT = 12  # questions that choose it
PROCESS = 12  # questions that a process is ahead of the one before it


# ------------------------------------------------------------------------------------------------------------- figures


def accuracy(of: Sequence[Tree]) -> np.ndarray:
    """Whether the answer to each question is right, 1 or 0."""
    return np.array([float(tree.right) for tree in of])


def single(of: Sequence[Tree]) -> np.ndarray:
    """How often one chain is right, of each question."""
    return np.array([np.mean([answer == tree.item.answer for answer in tree.answers]) for tree in of])


def majority(of: Sequence[Tree]) -> np.ndarray:
    """Whether the most frequent answer is right, of each question."""
    return np.array([float(selectors.majority(tree.answers) == tree.item.answer) for tree in of])


def best(of: Sequence[Tree]) -> np.ndarray:
    """Whether the answer of the best-scored trace is right, of each question."""
    chosen = [tree.answers[selectors.best_of_n([trace.score for trace in tree.found.traces])] for tree in of]
    return np.array([float(answer == tree.item.answer) for answer, tree in zip(chosen, of, strict=True)])


def covered(of: Sequence[Tree]) -> np.ndarray:
    """Whether some answer is right, of each question."""
    return np.array([float(tree.item.answer in tree.answers) for tree in of])


def held(of: Sequence[Tree], asked: np.ndarray | float) -> np.ndarray:
    """Tokens that the cache holds on average over the rounds, of each question: the tree, and `asked` tokens of prompt."""
    return np.array([tree.found.tokens for tree in of]) + asked


def ratio(over: np.ndarray, under: np.ndarray) -> tuple[float, float, float]:
    """The ratio of the means over questions, with a bootstrap interval that resamples questions."""
    picked = np.random.default_rng(0).integers(0, len(over), (DRAWS, len(over)))
    drawn = over[picked].mean(1) / under[picked].mean(1)
    low, high = np.quantile(drawn, [0.025, 0.975])
    return float(over.mean() / under.mean()), float(low), float(high)


def difference(ours: np.ndarray, theirs: np.ndarray) -> tuple[float, float, float]:
    """The mean difference over questions, with a bootstrap interval that resamples questions."""
    gap = ours - theirs
    picked = np.random.default_rng(0).integers(0, len(gap), (DRAWS, len(gap)))
    low, high = np.quantile(gap[picked].mean(1), [0.025, 0.975])
    return float(gap.mean()), float(low), float(high)


def pilots(task: Task) -> dict[int, Task]:
    """Searches of the pilot part that choose the free baseline, by their number of trajectories."""
    pilot = replace(task, part="pilot", n_items=min(PILOT, task.n_items), lambda_c=0.0, lambda_s=0.0)
    return {width: replace(pilot, narrow=width) for width in (task.width, *WIDTHS) if width <= task.width}


def narrowest(task: Task) -> int:
    """The fewest trajectories of REBASE whose accuracy on the pilot part is at most `MARGIN` below that of all."""
    found = {width: accuracy(trees(NARROW, pilot)).mean() for width, pilot in pilots(task).items()}
    return min(width for width, right in found.items() if right >= found[task.width] - MARGIN)


@cache
def examples(task: Task, wording: Wording) -> str:
    """What all prompts of a wording begin with."""
    return os.path.commonprefix([prompt(item, wording, worked=True) for item in task.items])


def question_tokens(task: Task) -> np.ndarray:
    """Tokens of each question's prompt behind the examples that all of its wording share, which are held once for all."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_folder(grove.MODEL))

    def tokens(text: str) -> int:
        return len(tokenizer(text)["input_ids"])

    return np.array(
        [tokens(prompt(item, wording, worked=True)) - tokens(examples(task, wording)) for item, wording in task.asked]
    )


def quality_of(task: Task) -> Quality:
    """Accuracy against REBASE's, with the controls."""
    ours, theirs = accuracy(trees(ETS, task)), accuracy(trees(REBASE, task))
    gap, low, high = difference(ours, theirs)
    base, chains = float(theirs.mean()), trees(CHAINS, task)
    controls = {
        "deleted": single(chains), "random": accuracy(trees(RANDOM, task)), "rival": accuracy(trees(NARROW, task)),
        KV: accuracy(trees(KV, task)), BEAM: accuracy(trees(BEAM, task)), "best of N chains": best(chains),
        "majority of N chains": majority(chains),
    }  # fmt: skip
    rival = f"REBASE with {task.narrow} trajectories"
    return Quality(base + gap, base, base + low, base + high, {k: float(v.mean()) for k, v in controls.items()}, rival)


def shown(task: Task) -> dict[str, Any]:
    """What both records tell besides: accuracy by wording and against all tokens, ceilings, and what was kept."""
    found = {way: trees(way, task) for way in WAYS}

    def each(of: Callable[[Tree], float]) -> dict[str, float]:
        return {way: float(np.mean([of(tree) for tree in own])) for way, own in found.items()}

    def kept(tree: Tree) -> float:
        choices = [r.kept / r.unfinished for r in tree.found.rounds if r.kept]
        return float(np.mean(choices)) if choices else 1.0

    return {
        "accuracy by wording": {
            way: {w: float(np.mean([tree.right for tree in own if tree.wording == w])) for w in task.wordings}
            for way, own in found.items()
        },
        "all tokens of a search, generated and read": each(lambda tree: tree.worked),
        "tokens of the tree in the cache": each(lambda tree: tree.found.tokens),
        "most tokens of the tree in the cache": each(lambda tree: max(r.tokens for r in tree.found.rounds)),
        "share of leaves that go on": each(kept),
        "rounds": each(lambda tree: len(tree.found.rounds)),
        "some answer right": {way: float(covered(own).mean()) for way, own in found.items()},
        "best of N": {way: float(best(own).mean()) for way, own in found.items()},
        "one chain right": float(single(found[CHAINS]).mean()),
        "majority of N chains": float(majority(found[CHAINS]).mean()),
        "ETS less REBASE": difference(accuracy(found[ETS]), accuracy(found[REBASE])),
        "ETS less best of N chains": difference(accuracy(found[ETS]), best(found[CHAINS])),
        "questions": task.n_items,
        "narrow": task.narrow,
    }


# ------------------------------------------------------------------------------------------------------- what is really held


class Alive:
    """Bytes of the tensors that are alive after every pass of a model, besides those there were when it was made."""

    def __init__(self, model: Any) -> None:
        self._before = set(_storages())
        self._hook = model.register_forward_hook(self._look)
        self.seen: list[int] = []

    def _look(self, *_: Any) -> None:
        self.seen.append(sum(size for at, size in _storages().items() if at not in self._before))

    def close(self) -> None:
        self._hook.remove()


def _storages() -> dict[int, int]:
    """The size of each storage that a tensor lives in, by its address."""
    tensors = [x for x in gc.get_objects() if issubclass(type(x), Tensor)]
    return {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}


def measured(task: Task, n: int) -> dict[str, Any]:
    """What REBASE and ETS hold while the model searches `n` questions anew, the first of the first wording: by count of the trie, and as
    bytes of all tensors that are alive, the passes' own logits and the last steps' keys too. The examples lie in the trie before."""
    found: dict[str, Any] = {}
    source, first = grove.live(), task.wordings[0]
    picked = [k for k, (_, wording) in enumerate(task.asked) if wording == first][:n]
    for way in (REBASE, ETS):
        generator = TreeGenerator(source.model, source.tokenizer, name=source.name)
        watch, same = Alive(source.model), 0
        counted: list[int] = []
        hook = source.model.register_forward_hook(lambda *_, g=generator, c=counted: c.append(g.trie.nbytes))
        for k in picked:
            ready(generator, [examples(task, first)])
            tree, stored = grown(way, task, task.items[k], first, generator), trees(way, task)[k]
            same += [t.text for t in tree.found.traces] == [t.text for t in stored.found.traces]
        hook.remove()
        watch.close()
        config = source.model.config
        per_token = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 4
        found[way] = {
            "bytes alive, mean": float(np.mean(watch.seen)), "bytes alive, peak": float(max(watch.seen)),
            "bytes in the trie, mean": float(np.mean(counted)), "bytes in the trie, peak": float(max(counted)),
            "trie's bytes over its tokens'": generator.trie.nbytes / max(generator.trie.tokens * per_token, 1),
            "searches that repeat the stored one": same / len(picked),
        }  # fmt: skip
        del generator
    for what in ("bytes alive, mean", "bytes alive, peak", "bytes in the trie, mean", "bytes in the trie, peak"):
        found[f"{what}: REBASE over ETS"] = found[REBASE][what] / found[ETS][what]
    return found


def ready(generator: TreeGenerator, texts: Sequence[str]) -> None:
    """Hold these texts, which questions share, and nothing else."""
    generator.keep(texts)
    if not generator.trie.tokens:
        generator(texts, Sampling(0.0, max_new_tokens=1))


# ---------------------------------------------------------------------------------------------------------------- experiments

PAPER: dict[str, Any] = {
    "task": "MATH-500 and GSM8k", "model": "Llemma-34B and others, with process reward models", "width": 16, "lambda_c": 1.0,
    "lambda_s": 1.5, "temperature": 1.0, "embedding": "a BERT for mathematics",
}  # fmt: skip
DEPARTURES = {
    "task": "small sums worked out in lines, in three wordings: what a model that runs here solves now and then",
    "model": "SmolLM2-135M, and a logistic regression on cheap signs of each step, fitted on other questions",
    "temperature": "0.5: one chain is right in about 10 % of pilot questions, at 0.8 in 3 %",
    "embedding": "MiniLM, with the paper's cut",
}
HERE = "trees of SmolLM2-135M on sums of three numbers worked out in lines of ten tokens"
SEARCH = Operator(
    "a search over trees of reasoning steps",
    free="REBASE with as few trajectories as lose no accuracy on pilot questions",
)
GUARD = Guard("share of right answers", MARGIN, higher_is_better=True, relative=False)
REFUTED = "REBASE takes certainly less than ETS, or ETS is certainly less accurate than as many leaves at random"
TASK: dict[str, Any] = {"kind": "steps", "level": 2, "temperature": 0.5, "width": 16, "lambda_c": 1.0, "lambda_s": 1.5}
SMOKE = {**TASK, "width": 4, "n_items": 2, "wordings": ["plain"]}
SMALL = {**TASK, "n_items": 30, "wordings": ["plain", "question", "task"]}
FULL = {**TASK, "n_items": 240, "wordings": ["plain", "question", "task"]}


def task_of(
    kind: Kind,
    level: int,
    temperature: float,
    width: int,
    lambda_c: float,
    lambda_s: float,
    n_items: int,
    wordings: Sequence[Wording],
) -> Task:
    """The task of a point, its free baseline chosen."""
    task = Task(kind, level, temperature, width, lambda_c, lambda_s, width, n_items, tuple(wordings))
    return replace(task, narrow=narrowest(task))


def worse_than_random(record: Mapping[str, Any]) -> bool:
    """Whether ETS is certainly less accurate than as many leaves at random."""
    quality = record["quality"]
    return bool(quality["high"] < quality["controls"]["random"])


@experiment(
    "ets/kv-reduction",
    points={
        "smoke": [{**SMOKE, "searched": 1}],
        "small": [{**SMALL, "searched": 2}],
        "full": [{**FULL, "searched": 10}, {**FULL, "width": 64, "lambda_s": 1.4, "searched": 4}],
    },
    decides={"full": {**FULL, "searched": 10}},
    operator=SEARCH,
    guard=GUARD,
    paper=PAPER,
    departures=DEPARTURES,
    refuted_if=REFUTED,
    refutes=lambda record: record["measured"]["high"] < 1 or worse_than_random(record),
    measured_here=f"tokens in the cache, the examples left out that all questions share, of {HERE}",
    minutes=240,
)
def smaller_cache(searched: int, **point: Any) -> Figure:
    """Tokens that the cache holds with REBASE over those with ETS, on average over rounds and questions.

    A round counts the unfinished leaves and all that is above them, each token once, as the released code does before it prunes, and
    the question; examples that all prompts share are left out, with them it is less (details). Bytes of a few searches that the model
    does anew are in the details, counted by the trie and as all tensors alive. The free baseline and the other ways are in the same
    unit.
    """
    task = task_of(**point)
    asked = question_tokens(task)
    base = held(trees(REBASE, task), asked)
    value, low, high = ratio(base, held(trees(ETS, task), asked))

    def over(way: str, prompt_tokens: Any = asked) -> float:
        return ratio(held(trees(REBASE, task), prompt_tokens), held(trees(way, task), prompt_tokens))[0]

    whole = np.array([tree.budget.entries[0].spent.prompt for tree in trees(REBASE, task)])
    return Figure(
        value,
        "x",
        low=low,
        high=high,
        baseline=1.0,
        free=over(NARROW),
        arms={way: over(way) for way in (KV, BEAM, CHAINS, RANDOM)},
        quality=quality_of(task),
        details={
            **shown(task),
            "with the examples": ratio(held(trees(REBASE, task), whole), held(trees(ETS, task), whole)),
            "without any prompt, as released": ratio(held(trees(REBASE, task), 0), held(trees(ETS, task), 0)),
            "measured": measured(task, searched),
        },
    )


@experiment(
    "ets/throughput",
    points={
        "smoke": [{**SMOKE, "searched": 1}],
        "small": [{**SMALL, "searched": 1}],
        "full": [{**FULL, "searched": 4}, {**FULL, "width": 64, "lambda_s": 1.4, "searched": 2}],
    },
    decides={"full": {**FULL, "searched": 4}},
    operator=SEARCH,
    guard=GUARD,
    paper=PAPER,
    departures=DEPARTURES,
    refuted_if=REFUTED,
    refutes=lambda record: record["measured"]["high"] < 1 or worse_than_random(record),
    measured_here=f"seconds of a search, one question at a time on this processor, of {HERE}",
    minutes=240,
)
def faster_search(searched: int, **point: Any) -> Trial:
    """Searches of `searched` questions by the model itself: REBASE's time over ETS's, both with the cache as a trie.

    Every round takes the next questions, all ways the same ones, and every process begins with others, so that the interval over
    processes is one over questions too. Drawing, judging, embedding, the integer programme and pruning are all timed; the examples' keys
    and values are there already. Each token of a stretch that many rows share is read once for all of them. The cache limits nothing here,
    so that a gain must come from reading less; with as many samples a round the rest of the work is the same.
    """
    task, source = task_of(**point), grove.live()
    grove.verifier(task.kind, task.level, task.temperature)
    shared, start = [examples(task, wording) for wording in task.wordings], os.getpid() * PROCESS

    def run(way: str, a_round: int = 1) -> Callable[[], Any]:
        generator = TreeGenerator(source.model, source.tokenizer, name=source.name)
        calls = itertools.count()

        def once() -> list[int]:
            steps, at = 0, start + next(calls) // a_round * searched
            for k in range(at, at + searched):
                ready(generator, shared)
                item, wording = task.asked[k % task.n_items]
                tree = grown(way, task, item, wording, generator, embed=grove.meanings)
                steps += sum(r.drawn for r in tree.found.rounds)
            return [steps]

        return once

    return Trial(
        run(REBASE),
        run(ETS, 2),  # a round times the candidate against itself besides
        free=run(NARROW),
        arms={KV: run(KV)},
        quality=lambda: quality_of(task),
        details=lambda: shown(task),
    )


def draw() -> dict[str, Kept]:
    """Every sample that the experiments ask for at `small` and `smoke`."""
    for point in (SMALL, SMOKE):
        unchosen = Task(**{**point, "narrow": point["width"], "wordings": tuple(point["wordings"])})
        grove.ahead([(NARROW, pilot) for pilot in pilots(unchosen).values()])
        task = task_of(**point)
        grove.ahead([(way, task) for way in WAYS])
        shown(task)
    return {grove.MODEL: grove.steps()}
