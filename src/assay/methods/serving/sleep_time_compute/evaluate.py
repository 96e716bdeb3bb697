"""An agent judged on stateful problems: how often it is right, for how many tokens of sleeping and of answering."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from assay import checks
from assay.methods.serving.sleep_time_compute.agent import SleepError, SleepTimeAgent
from assay.methods.serving.sleep_time_compute.ledger import PAPER_T, amortised_cost
from assay.methods.serving.sleep_time_compute.prompts import Variant
from assay.methods.serving.sleep_time_compute.stateful import grade, split

REMOVED = "(The question was removed.)"


@dataclass(frozen=True)
class Problem:
    """A context, a question about it, and the right answer, whose last number counts."""

    context: str
    question: str
    answer: str

    @classmethod
    def of(cls, text: str, answer: str, *, variant: Variant = "paper") -> Problem:
        """An ordinary problem made stateful by `split`, which see for what is raised."""
        return cls(*split(text, variant=variant), answer)


@dataclass(frozen=True)
class Score:
    """Which problems were answered right, and the tokens generated: `test_tokens` a problem, `sleep_tokens` for each context."""

    right: tuple[bool, ...]
    test_tokens: float
    sleep_tokens: float
    contexts: int
    failed_sleeps: int

    @property
    def accuracy(self) -> float:
        """The share of right answers."""
        return sum(self.right) / len(self.right)

    def cost(self, *, t: float = PAPER_T) -> float:
        """Mean cost of a problem by the paper's formula, its share of the sleeps included."""
        return amortised_cost(self.sleep_tokens * self.contexts, self.test_tokens, len(self.right), t=t)


def evaluate(
    agent: SleepTimeAgent,
    problems: Sequence[Problem],
    *,
    sleep: bool = True,
    budget: int | None = None,
    without_question: bool = False,
    variant: Variant = "paper",
) -> Score:
    """Sleep over every context once (unless `sleep` is false), then answer every problem; of the agent's ledger, what this took.

    A context whose sleep fails is answered without a memory. `without_question` is the paper's control: whoever is right without the
    question needs none, so that the contexts give the answers away. `variant` is the grader's. Nobody else may use the agent meanwhile.
    Raises ValueError for no problems, and what the agent raises.
    """
    if not problems:
        raise ValueError("problems must hold at least one, got none")
    checks.flag("sleep", sleep), checks.flag("without_question", without_question)
    slept_before, spent_before = agent.ledger.total("sleep").completion, agent.ledger.total("test").completion
    contexts, failed = list(dict.fromkeys(problem.context for problem in problems)), 0
    for context in contexts if sleep else ():
        try:
            agent.prepare(context)
        except SleepError:
            failed += 1
    right = tuple(
        grade(
            agent.answer(
                REMOVED if without_question else problem.question, problem.context, budget=budget, memory=sleep
            ).text,
            problem.answer,
            variant=variant,
        )
        for problem in problems
    )
    slept = agent.ledger.total("sleep").completion - slept_before
    spent = agent.ledger.total("test").completion - spent_before
    return Score(right, spent / len(problems), slept / len(contexts), len(contexts), failed)
