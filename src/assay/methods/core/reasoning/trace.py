"""A trace: what was written behind a prompt, step by step, and what each step was found to be worth."""

from __future__ import annotations

from dataclasses import dataclass

from assay.methods.core.reasoning.generator import Sample


@dataclass(frozen=True)
class Trace:
    """A prompt and the steps written behind it.

    `samples` are the steps as they were drawn; `scores` what the verifier said of each step, one a step where it was asked. A trace is
    `finished` when its model ended it, its limit was met, or it holds a final answer.
    """

    prompt: str
    steps: tuple[str, ...] = ()
    samples: tuple[Sample, ...] = ()
    scores: tuple[float, ...] = ()
    finished: bool = False

    @property
    def text(self) -> str:
        """What was written behind the prompt."""
        return "".join(self.steps)

    @property
    def score(self) -> float:
        """The value at the last step, 0 where none was judged."""
        return self.scores[-1] if self.scores else 0.0

    @property
    def completion(self) -> int:
        """Generated tokens."""
        return sum(sample.spent.completion for sample in self.samples)


def of_sample(prompt: str, sample: Sample) -> Trace:
    """A whole sample as a trace of one step.

    >>> from assay.methods.core.reasoning.budget import Spent
    >>> of_sample("2 + 3 =", Sample(" 5", (20,), (-0.5,), "stop", Spent(4, 1, calls=1))).completion
    1
    """
    return Trace(prompt, (sample.text,), (sample,), finished=True)
