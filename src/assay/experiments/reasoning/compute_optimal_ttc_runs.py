"""What every strategy gives for every question, from the samples that the experiments share.

Searches are run on these samples: behind a prefix, the next token is that of a sample which begins with it, drawn at random, and none is
drawn again before all were (best-of-N draws none twice, either). So a search sees the model's own continuations as often as the model
wrote them, and nothing that it did not write in the samples of a question. The questions are those of three kinds together, so that some
are easy and some are hard.

Revisions need prompts of their own; `draw` draws those of a few questions, for a set of this room.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from assay.experiments.reasoning.samples import Drawn, Kept, generator, sampling_of, shared
from assay.methods.core.reasoning.budget import Budget, Spent
from assay.methods.core.reasoning.generator import Sample, Sampling, seed_of
from assay.methods.core.reasoning.trace import Trace, of_sample
from assay.methods.core.reasoning.verifier import Verifier
from assay.methods.reasoning.compute_optimal_ttc import (
    Attempts,
    PrefixKept,
    ProcessReward,
    Strategy,
    attempt,
    monte_carlo,
)
from assay.workloads.reasoning import WORDINGS, Item, Kind, Wording, answer_of, examples, prompt

MODEL, ROOM = "smollm2-135m", "compute_optimal_ttc"
POOL: tuple[tuple[Kind, int], ...] = (("sum", 1), ("sum", 2), ("steps", 1))
TEMPERATURE = 0.8
SAMPLES, LEARNT = 24, 16  # of a question, judged and learnt from
NS = (1, 2, 4, 8, 16, 32, 64)
PARALLEL = Strategy()
SEARCHES: tuple[tuple[Strategy, tuple[int, ...]], ...] = (
    (Strategy("beam", width=2), NS[1:]),
    (Strategy("beam", width=4), NS[2:]),
    (Strategy("beam", width=2, lookahead=1), NS[2:]),
)
CHAINS, LENGTH = 4, 2  # of the revisions that are drawn


# ------------------------------------------------------------------------------------------------------------------ searching


@dataclass(frozen=True)
class Piece:
    """A token of a sample, or several that are no digits: its text, and what it took."""

    text: str
    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]


def pieces(sample: Sample) -> list[Piece]:
    """A sample taken apart: the space in front of an answer, its digits, each a token of the model, and the rest in one.

    The rest holds what ends the sample, even where that is no text.
    """
    lead = re.match(r" ?\d*", sample.text)
    assert lead is not None  # it matches nothing at least
    single = len(lead[0]) if len(sample.tokens) > len(lead[0]) else 0
    found = [
        Piece(letter, (token,), (value,))
        for letter, token, value in zip(lead[0][:single], sample.tokens, sample.logprobs, strict=False)
    ]
    return [*found, Piece(sample.text[single:], sample.tokens[single:], sample.logprobs[single:])]


class Replay:
    """A generator over samples that are there already, by their prompts: it continues a prompt and a beginning as samples with this
    beginning went on, in a random order, from the start again when all were given; at temperature 0 as most of them did, by one step.

    Whole prompts get their samples in the order they were drawn. With `max_new_tokens` 1 a continuation is one piece, else all of the rest.
    """

    name = MODEL

    def __init__(self, samples: Mapping[str, Sequence[Sample]]) -> None:
        self.samples = dict(samples)
        self._parts = {text: [pieces(sample) for sample in own] for text, own in samples.items()}

    def __call__(
        self, prompts: Sequence[str], sampling: Sampling, *, n: int = 1, first: int = 0, seed: int = 0
    ) -> list[list[Sample]]:
        """As `Generator` has it. Raises LookupError for a prompt without samples that begin so."""
        return [self._of(text, sampling, range(first, first + n), seed) for text in prompts]

    def _of(self, text: str, sampling: Sampling, numbers: range, seed: int) -> list[Sample]:
        own = self.samples.get(text)
        if own is not None and sampling.temperature and sampling.max_new_tokens > 1 and numbers.stop <= len(own):
            spent = own[0].spent  # read once, whichever of them come first
            return [
                replace(s, spent=replace(s.spent, prompt=0 if k else spent.prompt))
                for k, s in enumerate(own[numbers.start : numbers.stop])
            ]
        base = next((known for known in self.samples if text.startswith(known)), None)
        begun = text[len(base) :] if base is not None else ""
        goes_on = [] if base is None else [rest for parts in self._parts[base] if (rest := _rest(parts, begun))]
        if base is None or not goes_on:
            raise LookupError(f"no sample begins with {text[-40:]!r}")
        read = self.samples[base][0].spent.prompt + len(begun)
        order = np.random.default_rng(seed_of(seed, text)).permutation(len(goes_on))
        found = []
        for k, number in enumerate(numbers):
            if sampling.temperature:
                rest = goes_on[order[number % len(order)]]
            else:
                most = Counter(rest[0].text for rest in goes_on).most_common(1)[0][0]
                rest = next(rest for rest in goes_on if rest[0].text == most)
            taken = rest[:1] if sampling.max_new_tokens == 1 else rest
            tokens = tuple(token for piece in taken for token in piece.tokens)
            ended = "stop" if len(taken) == len(rest) else "length"
            found.append(
                Sample(
                    "".join(piece.text for piece in taken),
                    tokens,
                    tuple(value for piece in taken for value in piece.logprobs),
                    ended,
                    Spent(0 if k else read, len(tokens), 0, 1),
                )  # fmt: skip
            )
        return found


def _rest(parts: Sequence[Piece], begun: str) -> list[Piece]:
    """What comes behind a beginning of whole pieces; nothing where the sample does not begin so, or ends there."""
    for at, piece in enumerate(parts):
        if not begun:
            return list(parts[at:])
        if not piece.text or not begun.startswith(piece.text):
            return []
        begun = begun[len(piece.text) :]
    return []


def features(trace: Trace, i: int) -> list[float]:
    """What the verifier sees: how sure the model was of its tokens, and whether the answer is as long as the numbers asked about.

    It does no arithmetic and sees no other sample.
    """
    logprobs = [value for sample in trace.samples[: i + 1] for value in sample.logprobs]
    text = "".join(trace.steps[: i + 1])
    lines = trace.prompt.rstrip().splitlines()
    asked = next((line for line in reversed(lines) if re.search(r"\d", line)), "")  # the lines above it are of examples
    longest = max(map(len, re.findall(r"\d+", asked)), default=0)
    digits = sum(letter.isdigit() for letter in text)
    ended = float(trace.finished and i == len(trace.steps) - 1)
    mean = sum(logprobs) / max(len(logprobs), 1)
    last = logprobs[-1] if logprobs else 0.0
    return [mean, min(logprobs, default=0.0), last, digits, longest - digits, longest, ended]


def steps_of(text: str, sample: Sample) -> Trace:
    """A sample as a trace with a step a piece."""
    parts = pieces(sample)
    samples = [Sample(p.text, p.tokens, p.logprobs, "length", Spent(0, len(p.tokens), 0, 1)) for p in parts]
    return Trace(text, tuple(p.text for p in parts), tuple(samples), finished=True)


def learn_sets(n: int) -> list[Drawn]:
    """`n` learning questions of each kind in each wording, with their samples."""
    return [
        one
        for kind, level in POOL
        for wording in WORDINGS
        for one in shared(kind, level, wording, "learn", n_items=n, n=LEARNT)
    ]


def _right(item: Item) -> Callable[[str, str], bool]:
    return lambda _, said: answer_of(item, said) == item.answer


def fitted(found: Sequence[Drawn], budget: Budget) -> ProcessReward:
    """The verifier, fitted to roll-outs from every step of the samples; both are charged, "verify" holds all of it."""
    traces, labels = [], []
    for one in found:
        walks = [steps_of(one.prompt, sample) for sample in one.samples]
        for sample in one.samples:
            budget.book("verify", sample.spent)
        sampling = sampling_of(one.item.kind, False, TEMPERATURE)
        labels += monte_carlo(
            PrefixKept(Replay({one.prompt: one.samples})), walks, sampling,
            _right(one.item), budget=budget,
        )  # fmt: skip
        traces += walks
    return ProcessReward(features).fit(traces, labels)


# ------------------------------------------------------------------------------------------------------------ what came of it


@dataclass(frozen=True)
class Run:
    """A strategy on a question: what came of it, and tokens in all: read and not kept from before, generated, judged."""

    strategy: str
    n: int
    attempts: Attempts
    tokens: int


def samples_run(one: Drawn, verifier: Verifier) -> Attempts:
    """All samples of a question with the verifier's scores."""
    scores, _ = verifier.score([of_sample(one.prompt, sample) for sample in one.samples])
    return Attempts(tuple(one.answers), tuple(own[-1] for own in scores), tuple(range(len(one.samples))))


def searched(one: Drawn, verifier: Verifier, most: int, budgets: int) -> list[Run]:
    """Every search of at most `budgets` generations among the first `most` samples of a question."""
    writer = Replay({one.prompt: one.samples[:most]})
    found = []
    for strategy, numbers in SEARCHES:
        for n in numbers:
            if n > budgets:
                continue
            ledger = Budget()
            attempts = attempt(
                strategy, n, one.prompt, PrefixKept(writer), verifier, sampling_of(one.item.kind, False, TEMPERATURE),
                lambda _, said: answer_of(one.item, said), delimiter=1, budget=ledger,
            )  # fmt: skip
            found.append(Run(strategy.name, n, attempts, ledger.spent().tokens))
    return found


# ----------------------------------------------------------------------------------------------------------------- revisions


def again(item: Item, wording: Wording) -> Callable[[str, Sequence[str]], str]:
    """The prompts of revisions: the same examples, each with a wrong attempt and the right answer, then the question with its attempts.

    What is wrong in the examples differs from the right answer by its last digit: the least edit, as the paper pairs them.
    """
    end = "\n" if item.kind == "sum" else "\n\n"
    stop = "" if item.kind == "sum" else "."
    head, asked = _split(item, wording)
    shown = []
    for example in examples(item.kind, item.level, 4):
        wrong = example.answer[:-1] + str((int(example.answer[-1]) + 3) % 10)
        question = _split(example, wording)[1]
        shown.append(f"{question} {wrong}{stop}{end}Check.{end}{question} {example.answer}{stop}{end}")

    def ask(_: str, attempts: Sequence[str]) -> str:
        tried = "".join(f"{asked}{text.rstrip()}{end}Check.{end}" for text in attempts)
        return head + "".join(shown) + tried + asked

    return ask


def _split(item: Item, wording: Wording) -> tuple[str, str]:
    """What stands in front of all questions, and the question as it is asked."""
    text = prompt(item, wording, shots=0)
    if wording != "task":
        return "", text
    head, mark, asked = text.partition("Input:")
    return head, mark + asked


def revised_runs(one: Drawn, wording: Wording, verifier: Verifier, kept: Kept) -> tuple[Attempts, list[Run]]:
    """`CHAINS` chains of `LENGTH` attempts on a question; and the whole of it as a run."""
    ledger = Budget()
    strategy = Strategy("revise", length=LENGTH)
    attempts = attempt(
        strategy, CHAINS * LENGTH, one.prompt, PrefixKept(kept), verifier,
        sampling_of(one.item.kind, False, TEMPERATURE), lambda _, said: answer_of(one.item, said),
        again=again(one.item, wording), budget=ledger,
    )  # fmt: skip
    return attempts, [Run(strategy.name, CHAINS * LENGTH, attempts, ledger.spent().tokens)]


def judged_sets(n: int, samples: int) -> list[tuple[Wording, Drawn]]:
    """`n` judged questions of each kind in each wording, each with so many samples."""
    return [
        (wording, one)
        for kind, level in POOL
        for wording in WORDINGS
        for one in shared(kind, level, wording, "judged", n_items=n, n=samples)
    ]


def draw() -> dict[str, Kept]:
    """The revisions of the first questions of each kind: what of the room's samples is not shared."""
    kept = generator(MODEL, ROOM)

    class Blank:
        """Drawing does not depend on scores."""

        def score(self, traces: Sequence[Trace]) -> tuple[list[list[float]], Spent]:
            return [[0.0] * len(trace.steps) for trace in traces], Spent()

    for wording, one in judged_sets(REVISED, SAMPLES):
        revised_runs(one, wording, Blank(), kept)
    return {MODEL: kept}


REVISED = 8
"""Judged questions of each kind whose revisions are drawn for the set."""


def tokens_of(one: Drawn) -> tuple[int, np.ndarray]:
    """The tokens of the prompt, and those that each sample generated."""
    return one.samples[0].spent.prompt, np.array([sample.spent.completion for sample in one.samples])
