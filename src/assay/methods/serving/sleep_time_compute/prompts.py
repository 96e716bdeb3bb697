"""What the two phases are told: the sleeper its task and its tools, the answerer how long it may think.

The words are our own. What is told in which place is the paper's (`variant="paper"`), or that of the released runner
(`"as_released"`), which puts the memory before everything else and joins context and question without a space.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from assay import checks
from assay.methods.serving.sleep_time_compute.chat import Message

Variant = Literal["paper", "as_released"]
VARIANTS: tuple[Variant, ...] = ("paper", "as_released")
MEMORY_LIMIT = 5000
"""Characters that a block of memory holds at most."""
RETHINK, FINISH = "rethink_memory", "finish_rethinking_memory"

TOOLS: tuple[dict[str, Any], ...] = (
    {
        "type": "function",
        "function": {
            "name": RETHINK,
            "description": f"Replace the memory by a new text of at most {MEMORY_LIMIT} characters. Call it again to add or correct.",
            "parameters": {
                "type": "object",
                "properties": {"new_memory": {"type": "string", "description": "the whole new memory"}},
                "required": ["new_memory"],
            },
        },
    },
    {
        "type": "function",
        "function": {
            "name": FINISH,
            "description": "Say that the memory is complete and checked.",
            "parameters": {"type": "object", "properties": {}},
        },
    },
)

SLEEPER = (
    "You are given a situation, and nobody asks anything yet. Think ahead: which questions may come, which quantities, "
    f"conclusions and answers will be needed? Work them out step by step and keep the results with {RETHINK}, which replaces "
    "what you kept before. Whoever answers later sees the situation and your memory, so write down all that is useful and "
    f"nothing that is wrong. Check your calculations, correct the memory as often as needed, then call {FINISH}."
)
PLAIN_SLEEPER = (
    "You are given a situation, and nobody asks anything yet. Think ahead: which questions may come, which quantities, "
    "conclusions and answers will be needed? Work them out step by step and write down all results: whoever answers later sees "
    "the situation and what you write."
)
"""The sleeper's task for a model without tools."""
ANSWERER = (
    "You answer a question about a situation. If there is a memory, it was worked out beforehand about the same situation: use "
    "it, and do not work out again what it holds. "
)
BUDGETS = (
    "Answer in one sentence that gives the answer and nothing else.",
    "Give at most one sentence of reasoning, then the answer.",
    "Reason in a few short steps, then give the answer.",
    "Reason step by step and write down every calculation, then give the answer.",
    "Reason step by step, write down every calculation and check every number in it, then give the answer.",
)
"""How long the answerer may think, from the least to the most: five levels, as in the paper."""


class Prompts(Protocol):
    """What an agent says in the two phases; whoever has another model may say it in other words.

    `version` names what is said to the sleeper: memories made with another version are not used.
    """

    @property
    def version(self) -> str: ...

    def sleep(self, context: str) -> list[Message]:
        """The messages that a sleep begins with. There is no question yet."""
        ...

    def test(self, context: str, blocks: Sequence[str], question: str, budget: int) -> list[Message]:
        """The messages for one question; without blocks of memory they are those of the baseline, to the letter."""
        ...


@dataclass(frozen=True)
class Words:
    """The room's own prompts. Raises ValueError for another variant.

    What does not depend on the question stands before it, so that a server which keeps prefixes reads it once.
    """

    variant: Variant = "paper"
    sleeper: str = SLEEPER
    answerer: str = ANSWERER
    budgets: tuple[str, ...] = BUDGETS

    def __post_init__(self) -> None:
        checks.choice("variant", self.variant, VARIANTS)
        if not self.budgets:
            raise ValueError("budgets must hold at least one level, got none")

    @property
    def version(self) -> str:
        """A digest of what the sleeper is told."""
        told = json.dumps([self.variant, self.sleeper, TOOLS], sort_keys=True)
        return hashlib.sha256(told.encode()).hexdigest()[:16]

    def sleep(self, context: str) -> list[Message]:
        """What the sleeper is told: its task, and the context."""
        return [{"role": "system", "content": self.sleeper}, {"role": "user", "content": f"New situation: {context}"}]

    def test(self, context: str, blocks: Sequence[str], question: str, budget: int) -> list[Message]:
        """What the answerer is told. Raises ValueError for a budget that is no level."""
        level = self.budgets[checks.whole("budget", budget, low=0, high=len(self.budgets) - 1)]
        system = self.answerer + level
        memory = "".join(f"\n\nMemory:\n{block}" for block in blocks)
        if self.variant == "as_released":
            return [
                {"role": "system", "content": system + (memory or "\n\nMemory:\n[empty]")},
                {"role": "user", "content": context + question},
            ]
        told = f"Situation:\n{context}{memory}\n\nQuestion:\n{question}"
        return [{"role": "system", "content": system}, {"role": "user", "content": told}]
