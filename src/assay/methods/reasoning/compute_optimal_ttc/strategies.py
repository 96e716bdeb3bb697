"""How a number of generations is spent on one question: in parallel, by search, or in sequence; and what that costs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from assay import checks
from assay.methods.core.reasoning.budget import Budget
from assay.methods.core.reasoning.generator import Generator, Sample, Sampling
from assay.methods.core.reasoning.search import beam_search, judged
from assay.methods.core.reasoning.selectors import best_of_n, majority, weighted
from assay.methods.core.reasoning.trace import Trace, of_sample
from assay.methods.core.reasoning.verifier import Verifier
from assay.methods.reasoning.compute_optimal_ttc.reward import Lookahead

ATTEMPTS = 4
"""So many of the last attempts a revision sees, the paper's number."""

Again = Callable[[str, Sequence[str]], str]
"""The prompt for one more attempt: (the question's prompt, the texts of the last attempts, oldest first)."""
Find = Callable[[str, str], str]
"""The canonical answer that a text gives behind its prompt, "" for none: (prompt, text)."""
Method = Literal["parallel", "beam", "revise"]


@dataclass(frozen=True)
class Strategy:
    """A way to spend generations on a question.

    - "parallel": independent samples.
    - "beam": of all beams the best are kept after each step, and each is continued `width` times (the paper's M), `lookahead` greedy steps
      being rolled out to score one (0: none).
    - "revise": chains of `length` attempts, each of which sees up to four before it; several chains side by side are the paper's hybrid of
      sequential and parallel sampling.

    >>> Strategy("beam", width=4, lookahead=1).name, Strategy("revise", length=4).name, Strategy().name
    ('beam of 4, lookahead 1', 'chains of 4', 'parallel')
    """

    method: Method = "parallel"
    width: int = 4
    lookahead: int = 0
    length: int = 1

    def __post_init__(self) -> None:
        checks.choice("method", self.method, ("parallel", "beam", "revise"))
        checks.whole("width", self.width, low=1)
        checks.whole("lookahead", self.lookahead, low=0)
        checks.whole("length", self.length, low=1)

    @property
    def name(self) -> str:
        """Its name in a log."""
        if self.method == "beam":
            return f"beam of {self.width}" + f", lookahead {self.lookahead}" * (self.lookahead > 0)
        return f"chains of {self.length}" if self.method == "revise" else "parallel"

    def fits(self, n: int) -> bool:
        """Whether exactly `n` generations can be spent in this way."""
        n = checks.whole("n", n, low=1)
        if self.method == "beam":
            beams, rest = divmod(n, self.lookahead + 1)
            return not rest and beams > 0 and not beams % self.width
        return self.method == "parallel" or not n % self.length

    def chains(self, n: int) -> int:
        """So many traces stand side by side when `n` generations are spent: samples, beams or chains. A beam costs lookahead + 1.

        Raises ValueError for an `n` that does not fit.
        """
        if not self.fits(n):
            raise ValueError(f"n must be a number of generations that {self.name} can spend, got {n}")
        return n // {"parallel": 1, "beam": self.lookahead + 1, "revise": self.length}[self.method]


@dataclass(frozen=True)
class Attempts:
    """What a strategy gave for one question: the answer and the score of every finished attempt, and the chain it belongs to.

    `chains` are numbers from 0; in each chain attempts stand in the order they were made.
    """

    answers: tuple[str, ...]
    scores: tuple[float, ...]
    chains: tuple[int, ...]

    def __post_init__(self) -> None:
        if not len(self.answers) == len(self.scores) == len(self.chains):
            seen = f"{len(self.answers)}, {len(self.scores)} and {len(self.chains)}"
            raise ValueError(f"answers, scores and chains must be as many, got {seen}")

    def choose(self, how: Literal["weighted", "best", "majority", "chains", "last"] = "weighted") -> str:
        """The answer to give.

        - "weighted": that with the largest sum of scores (best-of-N weighted); "best": that of the best sample; "majority": the most
          frequent. All attempts count alike, whatever their chain.
        - "chains": in each chain the answer with the largest sum of scores first, then the same among those of the chains, each with the
          sum that it had in its own.
        - "last": the last attempt of each chain only, by "weighted".

        Equal ones: the first. "" is chosen only where nothing else was answered.

        >>> attempts = Attempts(("7", "8", "8", "9"), (0.9, 0.4, 0.4, 0.1), (0, 0, 1, 1))
        >>> [attempts.choose(how) for how in ("weighted", "best", "majority", "chains", "last")]
        ['7', '7', '8', '7', '8']
        """
        checks.choice("how", how, ("weighted", "best", "majority", "chains", "last"))
        if how == "majority":
            return majority(self.answers)
        if how == "best":
            answered = [i for i, answer in enumerate(self.answers) if answer] or list(range(len(self.answers)))
            return self.answers[answered[best_of_n([self.scores[i] for i in answered])]]
        if how == "weighted":
            return weighted(self.answers, self.scores)
        own = [[i for i, c in enumerate(self.chains) if c == chain] for chain in dict.fromkeys(self.chains)]
        if how == "last":
            ends = [members[-1] for members in own]
            return weighted([self.answers[i] for i in ends], [self.scores[i] for i in ends])
        winners, sums = [], []
        for members in own:
            scores = {i: self.scores[i] for i in members}
            winner = weighted([self.answers[i] for i in members], list(scores.values()))
            winners.append(winner)
            sums.append(sum(score for i, score in scores.items() if self.answers[i] == winner))
        return weighted(winners, sums)


def attempt(
    strategy: Strategy,
    n: int,
    prompt: str,
    generator: Generator,
    verifier: Verifier,
    sampling: Sampling,
    find: Find,
    *,
    again: Again | None = None,
    delimiter: str | int = "\n",
    rounds: int = 40,
    budget: Budget | None = None,
    seed: int = 0,
) -> Attempts:
    """Spend `n` generations on a question, as `strategy` says. Everything read, generated and judged is booked in `budget`.

    `generator`'s and `verifier`'s calls are all that is spent: a beam that was dropped and an attempt that was revised are in the budget
    too. `again` writes the prompt of a revision (needed for "revise"); `delimiter` ends a search's step, or is its number of tokens.
    A greedy run (temperature 0) gives the same with one generation whatever the strategy. Raises ValueError for an `n` that the strategy
    cannot spend.

    When NOT to use it: to try many budgets on logged samples, which need no model: `policy.outcomes`.
    """
    side = strategy.chains(n)
    if strategy.method == "beam":
        judge = verifier
        if strategy.lookahead:
            judge = Lookahead(generator, verifier, sampling, steps=strategy.lookahead, delimiter=delimiter, seed=seed)
        traces = beam_search(
            generator, judge, prompt, sampling, n=side, width=strategy.width, rounds=rounds, delimiter=delimiter,
            budget=budget, seed=seed,
        )  # fmt: skip
        chains = list(range(len(traces)))
        if strategy.lookahead:
            traces = judged(verifier, traces, budget=budget)
    elif strategy.method == "revise" and strategy.length > 1:
        if again is None:
            raise ValueError("again must be given for revisions, got None")
        traces, chains = revised(
            generator, verifier, prompt, sampling, again, chains=side, length=strategy.length, budget=budget, seed=seed
        )
    else:
        (samples,) = generator([prompt], sampling, n=side, seed=seed)
        book(budget, samples)
        traces = judged(verifier, [of_sample(prompt, sample) for sample in samples], budget=budget)
        chains = list(range(side))
    answers = tuple(find(prompt, trace.text) for trace in traces)
    return Attempts(answers, tuple(trace.score for trace in traces), tuple(chains))


def revised(
    generator: Generator,
    verifier: Verifier,
    prompt: str,
    sampling: Sampling,
    again: Again,
    *,
    chains: int,
    length: int,
    budget: Budget | None = None,
    seed: int = 0,
) -> tuple[list[Trace], list[int]]:
    """`chains` chains of `length` attempts, each behind up to four of its chain before it; the traces, scored, and their chains.

    First attempts are the first samples of the question itself. Traces stand chain by chain in the order they were made; their prompt is
    the question's, whatever stood between. An attempt is not told whether those before it were right: nobody knows that.
    """
    chains, length = checks.whole("chains", chains, low=1), checks.whole("length", length, low=1)
    (first,) = generator([prompt], sampling, n=chains, seed=seed)
    book(budget, first)
    made: list[list[Sample]] = [[sample] for sample in first]
    taken = {
        prompt: chains
    }  # so many samples of a prompt stand in chains: whoever asks it again, in any round, gets the next
    for _ in range(length - 1):
        asking: dict[str, list[int]] = {}
        for c, chain in enumerate(made):
            asking.setdefault(again(prompt, [sample.text for sample in chain[-ATTEMPTS:]]), []).append(c)
        for asked, members in asking.items():
            (samples,) = generator([asked], sampling, n=len(members), first=taken.get(asked, 0), seed=seed)
            taken[asked] = taken.get(asked, 0) + len(members)
            book(budget, samples)
            for c, sample in zip(members, samples, strict=True):
                made[c].append(sample)
    traces = [of_sample(prompt, sample) for chain in made for sample in chain]
    return judged(verifier, traces, budget=budget), [c for c, chain in enumerate(made) for _ in chain]


def book(budget: Budget | None, samples: Sequence[Sample]) -> None:
    """Book samples as solved for."""
    if budget is not None:
        for sample in samples:
            budget.book("solve", sample.spent)


class PrefixKept:
    """A generator whose server keeps prefixes: what it has read or written before is marked as cached when it stands in front again.

    A prompt that goes on from one seen before, or from one with its continuation, is charged for the rest only. Tokens are those that
    the samples say; what was seen is remembered as long as this object is. The samples are the inner generator's.
    """

    def __init__(self, generator: Generator) -> None:
        self.generator = generator
        self._seen: dict[str, int] = {}  # texts that stand in the cache, and their tokens

    @property
    def name(self) -> str:
        """The inner generator's."""
        return self.generator.name

    def __call__(
        self, prompts: Sequence[str], sampling: Sampling, *, n: int = 1, first: int = 0, seed: int = 0
    ) -> list[list[Sample]]:
        """As `Generator` has it."""
        found = self.generator(prompts, sampling, n=n, first=first, seed=seed)
        charged: list[list[Sample]] = []
        for prompt, samples in zip(prompts, found, strict=True):
            read = samples[0].spent.prompt
            known = max((tokens for text, tokens in self._seen.items() if prompt.startswith(text)), default=0)
            spent = replace(samples[0].spent, cached=min(known, read))
            charged.append([replace(samples[0], spent=spent), *samples[1:]])
            self._seen[prompt] = read
            for sample in samples:
                ends = sample.ended == "stop"  # its last token is not in the text
                self._seen[prompt + sample.text] = read + sample.spent.completion - ends
        return charged
