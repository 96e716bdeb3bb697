"""A model proposes and repairs, through any `Generator`; all it reads and writes is booked."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence

from assay import checks
from assay.methods.core.reasoning.budget import Budget
from assay.methods.core.reasoning.generator import Generator, Sampling
from assay.methods.reasoning.dolphin.ideas import Idea
from assay.methods.reasoning.dolphin.literature import Document
from assay.methods.reasoning.dolphin.loop import Entry
from assay.methods.reasoning.dolphin.practice import Request

_BLOCK = re.compile(r"^```[^`\n]*\n(.*?)^```", re.DOTALL | re.MULTILINE)


class ModelProposer:
    """Asks a model for ideas, one JSON object a line, with the documents and the wins in the prompt. The wording is
    our choice.

    Lines that are no such object are passed over, so that fewer ideas than asked for may come. Tokens are booked as
    "plan".
    """

    def __init__(
        self, generator: Generator, task: str, documents: Sequence[Document] = (), *, sampling: Sampling | None = None,
        budget: Budget | None = None,
    ) -> None:  # fmt: skip
        self.generator, self.task, self.documents, self.budget = generator, task, tuple(documents), budget
        self.sampling = sampling or Sampling(temperature=0.8, max_new_tokens=1024)

    def __call__(self, wins: Sequence[Entry], count: int, loop: int) -> list[Idea]:
        """`count` ideas at most."""
        count, loop = checks.whole("count", count, low=1), checks.whole("loop", loop, low=1)
        prompt = self.prompt(wins, count)
        ((sample,),) = self.generator([prompt], self.sampling, seed=loop)
        if self.budget is not None:
            self.budget.book("plan", sample.spent)
        found = (_idea(line) for line in sample.text.splitlines())
        return [idea for idea in found if idea is not None][:count]

    def prompt(self, wins: Sequence[Entry], count: int) -> str:
        """What the model is asked."""
        lines = [f"Task: {self.task}", ""]
        if self.documents:
            lines += ["Known methods:", *(f"- {one.text}" for one in self.documents), ""]
        if wins:
            lines += [
                "Ideas that improved the result:",
                *(f"- {one.idea.text} (score {one.score:g})" for one in wins),
                "",
            ]
        form = '{"title": "...", "plan": "...", "summary": "..."}'
        return "\n".join([*lines, f"Propose {count} new ideas, one JSON object a line, like {form}:", ""])


class ModelRepair:
    """Asks a model for the repaired script, with what the request shows of the failure and the code around it. The
    wording is our choice.

    The last fenced block of the answer is the script, else the repair is none. Each round has a seed of its own, so that
    an answer that changes nothing is not drawn again. Tokens are booked as "solve".
    """

    def __init__(self, generator: Generator, *, sampling: Sampling | None = None, budget: Budget | None = None) -> None:
        self.generator, self.budget = generator, budget
        self.sampling = sampling or Sampling(temperature=0.2, max_new_tokens=2048)

    def __call__(self, request: Request) -> str | None:
        """The repaired source, or None."""
        prompt = (
            f"This script raises an error.\n\n```python\n{request.last.source.rstrip()}\n```\n\n{request.text}\n\n"
            "Write the whole repaired script in one fenced block.\n"
        )
        ((sample,),) = self.generator([prompt], self.sampling, seed=request.round)
        if self.budget is not None:
            self.budget.book("solve", sample.spent)
        blocks = _BLOCK.findall(sample.text)
        return blocks[-1] if blocks else None


def _idea(line: str) -> Idea | None:
    try:
        told = json.loads(line)
        return Idea(told["title"], told.get("plan", ""), told.get("summary", "")) if isinstance(told, dict) else None
    except (ValueError, TypeError, KeyError, RecursionError):
        return None
