"""What a way of spending compute is given: whom to ask, how, who judges, and where it is booked."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from assay import checks
from assay.methods.core.reasoning.answers import extract
from assay.methods.core.reasoning.budget import Budget, Purpose
from assay.methods.core.reasoning.generator import Generator, Sample, Sampling, seed_of
from assay.methods.core.reasoning.samples import with_prompt
from assay.methods.core.reasoning.search import expand, judged
from assay.methods.core.reasoning.trace import Trace, of_sample
from assay.methods.core.reasoning.verifier import Verifier


@dataclass(frozen=True)
class Asking:
    """One question put to a model, the same for every way.

    `answer_of` reads the answer of a text ("" for none), `finished` says whether steps hold a final answer; a step ends with `delimiter`.
    Everything that is generated, read or judged is booked in `budget`; where that has a limit, a way stops when it is reached and answers
    with what it has: the call that reached it is paid in full. `repeat` numbers independent runs: others of the samples that `seed` stands
    for.
    """

    prompt: str
    generator: Generator
    sampling: Sampling
    verifier: Verifier | None = None
    budget: Budget = field(default_factory=Budget)
    answer_of: Callable[[str], str] = extract
    finished: Callable[[str], bool] | None = None
    delimiter: str = "\n"
    seed: int = 0
    repeat: int = 0

    @property
    def _own_seed(self) -> int:
        """Of this repeat: no other seed's, and no other repeat's."""
        return seed_of("repeat", self.seed, self.repeat) if self.repeat else self.seed

    def samples(self, n: int, *, seed: int | None = None) -> list[Sample]:
        """`n` samples of the prompt, the numbers `repeat * n` and on; with a limit on the budget as many as it covers, at least one.

        The prompt is charged once: where samples are asked for one by one, because of a limit, it counts as kept for all but the first.
        """
        n = checks.whole("n", n, low=1)
        seed, first = self.seed if seed is None else seed, self.repeat * n
        if self.budget.tokens is None and self.budget.seconds is None:
            (found,) = self.generator([self.prompt], self.sampling, n=n, first=first, seed=seed)
            book(self.budget, "solve", found)
            return found
        found = []
        for number in range(first, first + n):
            if found and self.budget.over:
                break
            ((one,),) = self.generator([self.prompt], self.sampling, first=number, seed=seed)
            found.append(with_prompt(one, 0) if found else one)
            book(self.budget, "solve", found[-1:])
        return found

    def scores(self, samples: Sequence[Sample]) -> list[float]:
        """What the verifier says of whole samples."""
        return [trace.score for trace in self.judged([of_sample(self.prompt, sample) for sample in samples])]

    def judged(self, traces: Sequence[Trace]) -> list[Trace]:
        """Traces with the verifier's scores. Raises ValueError where there is no verifier."""
        if self.verifier is None:
            raise ValueError("verifier must be given for a way that compares by score, got None")
        return judged(self.verifier, traces, budget=self.budget)

    def grown(self, traces: Sequence[Trace], counts: Sequence[int]) -> list[list[Trace]]:
        """`counts` judged next steps of each trace, a step that says the same as a sibling left out."""
        drawn = expand(
            self.generator,
            traces,
            counts,
            self.sampling,
            delimiter=self.delimiter,
            finished=self.finished,
            budget=self.budget,
            seed=self._own_seed,
        )
        different = [list({trace.steps: trace for trace in reversed(own)}.values())[::-1] for own in drawn]
        scored = iter(self.judged([trace for own in different for trace in own]))
        return [[next(scored) for _ in own] for own in different]

    def once(self, prompt: str, purpose: Purpose, number: int) -> Sample:
        """One sample of another prompt, booked as `purpose`."""
        ((sample,),) = self.generator([prompt], self.sampling, first=number, seed=self._own_seed)
        book(self.budget, purpose, [sample])
        return sample


def book(budget: Budget, purpose: Purpose, samples: Sequence[Sample]) -> None:
    """Book samples, each as a call."""
    for sample in samples:
        budget.book(purpose, replace(sample.spent, calls=1))


@dataclass(frozen=True)
class Outcome:
    """What a way answers: the text chosen, and the answer in it ("" for none)."""

    text: str
    answer: str
