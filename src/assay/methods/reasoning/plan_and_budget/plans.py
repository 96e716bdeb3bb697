"""A plan: the parts of a question, what each is worth, and how hard the whole is; written by a model or made by a rule.

Both cost tokens, and both are booked as "plan". What a model writes is charged as it is; what a rule makes is charged as if it had been
written, for it stands in a prompt that would be shorter without it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from assay import checks
from assay.methods.core.reasoning.budget import Budget, Spent
from assay.methods.core.reasoning.generator import Generator, Sampling
from assay.methods.reasoning.plan_and_budget.budgets import LEVEL_TOKENS

DIRECT = "Directly solve the problem."
HARDEST = max(LEVEL_TOKENS)
_HINTED = re.compile(r"(?:^|\n)\s*\d+\.\s*((?:(?!\n\s*\d+\.).)*?)\s*\n\s*Hint:[ \t]*([^\n]*)", re.DOTALL)
_NUMBERED = re.compile(r"(?:^|\n)\s*\d+\.[ \t]*([^\n]+)(?:\n\s*Hint:[ \t]*([^\n]*))?")


@dataclass(frozen=True)
class Plan:
    """Sub-questions in the order they are answered, the credit of each (equal unless given), and the level of the whole (1 to 5).

    `hints` has a line for each part, "" for none. Raises ValueError without a part, for a part that is empty, for credits that are
    negative or all 0, and for lists of different lengths.

    >>> Plan(("What do the pens cost?", "What is paid in all?")).text
    '1. What do the pens cost?\\n2. What is paid in all?'
    """

    parts: tuple[str, ...]
    credits: tuple[float, ...] = ()
    level: int = HARDEST
    hints: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.parts or not all(isinstance(part, str) and part.strip() for part in self.parts):
            raise ValueError(f"parts must be texts that are not empty, got {checks.shown(self.parts)}")
        for name, given in (("credits", self.credits), ("hints", self.hints)):
            if given and len(given) != len(self.parts):
                raise ValueError(f"{name} must be as many as parts, {len(self.parts)}, got {len(given)}")
        if not self.credits:
            object.__setattr__(self, "credits", (1.0,) * len(self.parts))
        known = [checks.number("credits", credit, low=0) for credit in self.credits]
        if not any(known):
            raise ValueError(f"credits must not all be 0, got {checks.shown(self.credits)}")
        checks.whole("level", self.level, low=1, high=HARDEST)

    @property
    def lines(self) -> list[str]:
        """The parts with their numbers and hints, one a line."""
        hints = self.hints or ("",) * len(self.parts)
        return [
            f"{i}. {part}" + (f" Hint: {hint}" if hint else "")
            for i, (part, hint) in enumerate(zip(self.parts, hints, strict=True), 1)
        ]

    @property
    def text(self) -> str:
        """The plan as it stands in a prompt, without budgets."""
        return "\n".join(self.lines)


class Planner(Protocol):
    """Plans questions, all at once, and books what each took as "plan" in the question's own ledger."""

    def __call__(self, questions: Sequence[str], budgets: Sequence[Budget], *, seed: int = 0) -> list[Plan]: ...


def parse_plan(text: str, *, hints: bool = True) -> Plan:
    """The plan that a model wrote: "number. sub-question", up to a line "Hint: ...".

    Where nothing is found, one part, to solve the problem directly. Parts without a hint are left out, as in the released code; with
    `hints` False they count too (our choice for small models, which forget hints).

    >>> parse_plan("1. Price?\\nHint: multiply\\n2. In all?\\nHint: add").parts, parse_plan("It is 7.").parts
    (('Price?', 'In all?'), ('Directly solve the problem.',))
    """
    if not isinstance(text, str):
        raise TypeError(f"text must be text, got {checks.shown(text)}")
    pattern = _HINTED if checks.flag("hints", hints) else _NUMBERED
    found = [(part.strip(), hint.strip()) for part, hint in pattern.findall(text) if part.strip()]
    if not found:
        return Plan((DIRECT,))
    return Plan(tuple(part for part, _ in found), hints=tuple(hint for _, hint in found))


def parse_assessment(text: str, parts: int) -> tuple[int, tuple[float, ...]]:
    """The level of a problem and the credits of its parts from the JSON that a model wrote, prose around it ignored.

    What is missing or out of range falls back: the level to the hardest, the credits to equal ones (all of them, where one is missing).
    Credits need not sum to 100.

    >>> parse_assessment('{"problem": {"level": 2}, "1": {"credit": 30}, "2": {"credit": 70}}', 2)
    (2, (30.0, 70.0))
    >>> parse_assessment("I would say it is easy.", 2)
    (5, (1.0, 1.0))
    """
    parts = checks.whole("parts", parts, low=1)
    said = _first_object(text)
    level = _value(said, "problem", "level")
    known = [_value(said, str(i), "credit") for i in range(1, parts + 1)]
    values = tuple(float(credit) for credit in known if credit is not None and credit >= 0)
    return (
        int(level) if level is not None and level == int(level) and 1 <= level <= HARDEST else HARDEST,
        values if len(values) == parts and any(values) else (1.0,) * parts,
    )


def _first_object(text: str) -> Any:
    """The first JSON object in a text, {} where there is none."""
    decoder = json.JSONDecoder()
    at = text.find("{")
    while at >= 0:
        try:
            return decoder.raw_decode(text[at:])[0]
        except (json.JSONDecodeError, RecursionError):
            at = text.find("{", at + 1)
    return {}


def _value(said: Any, of: str, name: str) -> float | None:
    """The number under said[of][name]; None where it is none, or not finite."""
    value = said[of].get(name) if isinstance(said, dict) and isinstance(said.get(of), dict) else None
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e9:
        return None
    return value


@dataclass(frozen=True)
class RulePlanner:
    """Plans by a rule: `plan` makes one of a question, `count` says how many tokens texts take, which is what each is charged.

    `count` is a tokenizer's, or `prompt_tokens` where only a generator is at hand.

    >>> from assay.methods.core.reasoning.budget import Budget
    >>> ledger = Budget()
    >>> RulePlanner(lambda question: Plan(("Add.", "Say it.")), lambda texts: [len(texts[0].split())])(["2 + 3"], [ledger])[0].parts
    ('Add.', 'Say it.')
    >>> ledger.spent("plan").completion
    5
    """

    plan: Callable[[str], Plan]
    count: Callable[[Sequence[str]], list[int]]

    def __call__(self, questions: Sequence[str], budgets: Sequence[Budget], *, seed: int = 0) -> list[Plan]:
        """A plan for each question, booked as if it had been written."""
        plans = [self.plan(question) for question in questions]
        for tokens, budget in zip(self.count([plan.text for plan in plans]), budgets, strict=True):
            budget.book("plan", Spent(completion=tokens))
        return plans


def prompt_tokens(generator: Generator) -> Callable[[Sequence[str]], list[int]]:
    """Counts the tokens of texts by what a generator says it read of them, for a server whose tokenizer is not at hand.

    A token that the model puts in front of every prompt is counted too. Each count is a call for one token.
    """

    def count(texts: Sequence[str]) -> list[int]:
        drawn = generator(list(texts), Sampling(temperature=0, max_new_tokens=1)) if texts else []
        return [sample.spent.prompt for (sample,) in drawn]

    return count


PLANNING = (
    "Split the problem into {low} to {high} smaller questions that lead to its answer, fewer where it is easy. Do not solve it. "
    "Number the questions, and put a line with a short hint behind each.\n\n{shown}Problem: {question}"
)
ASSESSING = (
    "Judge how hard a problem is, from 1 (easiest) to 5 (hardest), by comparing it with these:\n{known}\n\nThe whole is worth 100 points: "
    "say how many each of its parts is worth. Write JSON only, like "
    '{{"problem": {{"level": 3}}, "1": {{"level": 2, "credit": 40}}, "2": {{"level": 4, "credit": 60}}}}\n\n'
    "Problem: {question}\nParts:\n{plan}"
)


@dataclass(frozen=True)
class ModelPlanner:
    """Plans by a model: one call that splits a question, one that judges the level and the parts' credits.

    `ask` makes a model's prompt of a request (its chat template). `example` is a solved split that is shown first, "" for none; `known`
    are (level, problem) pairs to compare with. The level is the model's own estimate: what a benchmark's label says is never read, which
    the released code does by default. `assess` False leaves the second call out: credits are equal and `level` is taken.

    When NOT to use it: with a model that cannot judge its own work; equal credits cost one call less.
    """

    generator: Generator
    ask: Callable[[str], str]
    sampling: Sampling = Sampling(0.1, 0.9, 256)
    example: str = ""
    known: tuple[tuple[int, str], ...] = ()
    assess: bool = True
    level: int = HARDEST
    hints: bool = True

    def __call__(self, questions: Sequence[str], budgets: Sequence[Budget], *, seed: int = 0) -> list[Plan]:
        """A plan for each question."""
        shown = f"{self.example}\n\n" if self.example else ""
        asked = [PLANNING.format(low=2, high=5, shown=shown, question=question) for question in questions]
        plans = [parse_plan(text, hints=self.hints) for text in self._said(asked, budgets, seed)]
        if not self.assess:
            return [Plan(plan.parts, level=self.level, hints=plan.hints) for plan in plans]
        known = "\n".join(f"Level {level}: {problem}" for level, problem in self.known)
        asked = [
            ASSESSING.format(known=known, question=question, plan=plan.text)
            for question, plan in zip(questions, plans, strict=True)
        ]
        judged = [
            parse_assessment(text, len(plan.parts))
            for plan, text in zip(plans, self._said(asked, budgets, seed), strict=True)
        ]
        return [Plan(plan.parts, given, level, plan.hints) for plan, (level, given) in zip(plans, judged, strict=True)]

    def _said(self, requests: Sequence[str], budgets: Sequence[Budget], seed: int) -> list[str]:
        if not requests:
            return []
        drawn = self.generator([self.ask(request) for request in requests], self.sampling, seed=seed)
        for (sample,), budget in zip(drawn, budgets, strict=True):
            budget.book("plan", sample.spent)
        return [sample.text for (sample,) in drawn]
