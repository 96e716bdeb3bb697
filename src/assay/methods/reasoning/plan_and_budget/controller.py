"""Plan, assess, allot, solve: the whole of the method over any `Generator`, a model here or a server.

Budgets are told, enforced, or both. *Told* is the paper's form: one completion, behind a prompt that lists the parts with "up to so many
words" each, which nothing holds a model to. *Enforced* is ours: the parts are solved one after the other, each in a completion that is
stopped at its tokens. What each part took stands in the result either way where it can be known.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

from assay import checks
from assay.methods.core.reasoning.budget import Budget
from assay.methods.core.reasoning.generator import Generator, Sampling
from assay.methods.reasoning.plan_and_budget.budgets import LEVEL_TOKENS, SCHEDULES, Schedule, allocate
from assay.methods.reasoning.plan_and_budget.plans import Plan, Planner

Mode = Literal["told", "enforced", "both"]
MODES: tuple[Mode, ...] = get_args(Mode)
STEPS = 'Reason step by step, and end with "The answer is" and the answer.'
PARTS = "You may follow these smaller questions, or do what works best:"
WORDS = "Think only a little about it, and use up to {budget} words."
GLOBAL = "Use fewer than {budget} tokens."
BETWEEN = "\n\n"  # parts of an answer


@dataclass(frozen=True)
class Solved:
    """An answer's text, the plan, the tokens that each part was allotted, those that it took, and the ledger of all of it.

    `said` is what the model wrote, part by part, without the sub-questions that were put between: look for the answer there, the last part
    first. Where budgets are only told it is one text and `used` is empty, for then no part has a beginning or an end.
    """

    question: str
    plan: Plan
    allotted: tuple[int, ...]
    used: tuple[int, ...]
    text: str
    said: tuple[str, ...]
    budget: Budget


def request(question: str, plan: Plan | None = None, allotted: Sequence[int] = (), total: int | None = None) -> str:
    """What a model is asked: step by step; with a plan its parts, each with its budget in words where `allotted` is given; and with
    `total` the one sentence about fewer tokens that stands for a global budget.

    >>> print(request("2 + 3?", Plan(("Add.", "Say it.")), [30, 10]).splitlines()[2])
    1. Add. Think only a little about it, and use up to 30 words.
    """
    lines = [question]
    if plan is not None:
        budgets = [f" {WORDS.format(budget=budget)}" for budget in allotted] or [""] * len(plan.parts)
        lines += [PARTS, *(line + budget for line, budget in zip(plan.lines, budgets, strict=True))]
    lines.append(STEPS if total is None else f"{STEPS} {GLOBAL.format(budget=total)}")
    return "\n".join(lines)


@dataclass(frozen=True)
class PlanAndBudget:
    """Answers questions by a plan whose parts have budgets.

    `planner` plans and says the level, `totals` the tokens of a level, `schedule` and the credits (left out unless `weighted`) share them
    out, with `least` for every part. `ask` makes the model's prompt of a request (its chat template). `sampling` is the paper's but for
    the limit of a told answer, which is the caller's.

    Raises ValueError for an unknown mode or schedule, and for a level that `totals` does not know.

    When NOT to use it: where the model's answers are short anyway: a plan costs tokens, and saves only what would be rambled.

    >>> from assay.methods.core.reasoning.budget import Spent
    >>> from assay.methods.core.reasoning.generator import Sample
    >>> from assay.methods.reasoning.plan_and_budget.plans import RulePlanner
    >>> def says_seven(prompts, sampling, *, n=1, first=0, seed=0):
    ...     return [[Sample(" 7", (7,), (), "stop", Spent(9, 1, calls=1))] for _ in prompts]
    >>> planner = RulePlanner(lambda question: Plan(("Add.", "Say it."), level=1), lambda texts: [len(text.split()) for text in texts])
    >>> solver = PlanAndBudget(says_seven, planner, ask=str, totals={1: 100})
    >>> (solved,) = solver.solve(["3 + 4?"])
    >>> solved.allotted, solved.used, solved.budget.spent().completion
    ((80, 20), (1, 1), 7)
    """

    generator: Generator
    planner: Planner
    ask: Callable[[str], str]
    totals: Mapping[int, int] | None = None
    schedule: Schedule = "polynomial"
    weighted: bool = True
    least: int = 0
    mode: Mode = "enforced"
    sampling: Sampling = Sampling(0.1, 0.9, 8192)

    def __post_init__(self) -> None:
        checks.choice("mode", self.mode, MODES)
        checks.choice("schedule", self.schedule, SCHEDULES)
        checks.flag("weighted", self.weighted)

    def allot(self, plan: Plan) -> list[int]:
        """The tokens of each part of a plan."""
        totals = LEVEL_TOKENS if self.totals is None else self.totals
        if plan.level not in totals:
            raise ValueError(f"totals must know level {plan.level}, got {sorted(totals)}")
        weights = plan.credits if self.weighted else (1.0,) * len(plan.parts)
        return allocate(weights, totals[plan.level], self.schedule, least=self.least)

    def solve(
        self, questions: Sequence[str], *, budgets: Sequence[Budget] | None = None, seed: int = 0
    ) -> list[Solved]:
        """Answer questions, all at once. `budgets` are their ledgers, new ones unless given."""
        ledgers = [Budget() for _ in questions] if budgets is None else list(budgets)
        if len(ledgers) != len(questions):
            raise ValueError(f"budgets must be as many as questions, {len(questions)}, got {len(ledgers)}")
        plans = self.planner(questions, ledgers, seed=seed)
        shares = [self.allot(plan) for plan in plans]
        told = self.mode != "enforced"
        prompts = [
            self.ask(request(question, plan, share) if told else request(question))
            for question, plan, share in zip(questions, plans, shares, strict=True)
        ]
        if self.mode == "told":
            drawn = self.generator(prompts, self.sampling, seed=seed) if prompts else []
            texts = []
            for (sample,), ledger in zip(drawn, ledgers, strict=True):
                ledger.book("solve", sample.spent)
                texts.append(sample.text)
            used: list[tuple[int, ...]] = [()] * len(texts)
            said: list[tuple[str, ...]] = [(text,) for text in texts]
        else:
            texts, said, used = self._in_parts(prompts, plans, shares, ledgers, seed)
        return [
            Solved(question, plan, tuple(share), took, text, own, ledger)
            for question, plan, share, took, text, own, ledger in zip(
                questions, plans, shares, used, texts, said, ledgers, strict=True
            )
        ]

    def _in_parts(
        self,
        prompts: Sequence[str],
        plans: Sequence[Plan],
        shares: Sequence[Sequence[int]],
        ledgers: Sequence[Budget],
        seed: int,
    ) -> tuple[list[str], list[tuple[str, ...]], list[tuple[int, ...]]]:
        """Part behind part: its sub-question is put there, and at most its tokens are written behind it."""
        texts, said = [""] * len(prompts), [[""] * len(plan.parts) for plan in plans]
        used = [[0] * len(plan.parts) for plan in plans]
        for part in range(max((len(plan.parts) for plan in plans), default=0)):
            by_limit: dict[int, list[int]] = {}
            for i, plan in enumerate(plans):
                if part < len(plan.parts):
                    texts[i] += (BETWEEN if part else "") + opening(plan, part)
                    if shares[i][part]:
                        by_limit.setdefault(shares[i][part], []).append(i)
            for limit, members in by_limit.items():
                drawn = self.generator(
                    [prompts[i] + texts[i] for i in members], part_sampling(self.sampling, part, limit), seed=seed
                )
                for i, (sample,) in zip(members, drawn, strict=True):
                    ledgers[i].book("solve", sample.spent)
                    said[i][part] = sample.text.rstrip()
                    texts[i] += said[i][part]
                    used[i][part] = sample.spent.completion
        return texts, [tuple(each) for each in said], [tuple(each) for each in used]


def opening(plan: Plan, part: int) -> str:
    """What is put in front of a part's answer: its number, its sub-question, and a word that says that it is answered now (our choice:
    behind a question alone, a small model goes on listing questions)."""
    return f"{part + 1}. {plan.parts[part]}\nAnswer:"


def part_sampling(sampling: Sampling, part: int, limit: int) -> Sampling:
    """How a part is drawn: until an empty line, the number of the next part, what ends an answer, or `limit` tokens.

    An end of the answer ends only its part: the plan is followed to its end (our choice; told budgets leave that to the model).
    """
    stops = (BETWEEN, f"\n{part + 2}.", *sampling.stop)
    return replace(sampling, max_new_tokens=limit, stop=tuple(dict.fromkeys(stops)))
