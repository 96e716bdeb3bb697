"""Who proposes revisions: rules on the syntax tree, with the line to begin at chosen by the profile or otherwise, or a language model."""

from __future__ import annotations

import ast
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from assay import checks
from assay.methods.code.effi_code.loop import Request
from assay.methods.core.programs import rewriting

Order = Literal["profile", "random", "in order"]
ORDERS: tuple[Order, ...] = ("profile", "random", "in order")


@dataclass(frozen=True)
class Rules:
    """Proposes one edit at a time by the rules of `rewriting`, never one that was tried before.

    `order` says which place comes first: the one whose lines took most time by the profile, one of a line drawn at random among the lines
    that can be edited (by `seed`), or the first in the program. With "profile" and a request without one, the first in the program.
    `observed` are arguments that functions were called with, by name: where nothing in the program says what a parameter holds, rules go
    by these, so that the tests must cover what else it may be. Returns None where no rule applies any more. Raises ValueError for a
    program that does not parse.

    >>> slow = "def f(xs: list[int], n: int):\\n    return n == min(sorted(xs))"
    >>> Rules()(Request("", slow, None)).splitlines()[-1]
    '    return n == min(xs)'
    """

    order: Order = "profile"
    seed: int = 0
    rules: Sequence[str] = rewriting.RULES
    observed: rewriting.Observed | None = None

    def __post_init__(self) -> None:
        checks.choice("order", self.order, ORDERS)
        checks.whole("seed", self.seed)

    def __call__(self, request: Request) -> str | None:
        """The next revision."""
        tried = {step.program for step in request.tried}
        found = [
            edit for edit in rewriting.edits(request.program, rules=self.rules, observed=self.observed)
            if edit.program not in tried and edit.program != request.program
        ]  # fmt: skip
        if not found:
            return None
        if self.order == "random":
            rng = random.Random(f"{self.seed}/{len(request.tried)}/{request.program}")
            line = rng.choice(sorted({edit.line for edit in found}))
            return rng.choice([edit.program for edit in found if edit.line == line])
        profile = request.profile
        if self.order == "in order" or profile is None:
            return found[0].program
        return max(found, key=lambda edit: profile.seconds_of(edit.line, edit.end_line)).program


# ------------------------------------------------------------------------------------------------------------- a language model

Failure = Literal["", "no code", "syntax", "no entry point"]


@dataclass(frozen=True)
class Extracted:
    """The program in a model's reply, and what is wrong with its form: a reply can fail before anybody asks whether it is right."""

    program: str
    failure: Failure


def extracted(reply: str, entry_point: str) -> Extracted:
    """The program in a reply: the last fenced block that defines `entry_point`, else the last block, else the whole text if it
    defines a function.

    Report failures of form beside pass@1: a model that was tuned on one format and asked in another fails by them.

    >>> extracted("Sure:\\n```python\\ndef f(n):\\n    return n\\n```\\nDone.", "f").program
    'def f(n):\\n    return n\\n'
    >>> extracted("I cannot do that.", "f").failure, extracted("```\\ndef g(): pass\\n```", "f").failure
    ('no code', 'no entry point')
    """
    blocks = [
        body for body in re.findall(r"^```[^\n]*\n(.*?)^```", reply, flags=re.MULTILINE | re.DOTALL) if body.strip()
    ]
    if not blocks:
        if not _defined(reply):
            return Extracted("", "no code")
        blocks = [reply]
    best = next((body for body in reversed(blocks) if entry_point in (_defined(body) or ())), blocks[-1])
    names = _defined(best)
    if names is None:
        return Extracted(best, "syntax")
    return Extracted(best, "" if entry_point in names else "no entry point")


def _defined(text: str) -> set[str] | None:
    """Names of the functions that a text defines; None for what is no program."""
    try:
        body = ast.parse(text).body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None
    return {node.name for node in body if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))}


def prompt_of(request: Request) -> str:
    """What a language model is asked: the task, the program, its profile, and why the last revision was not kept.

    Our own wording. The released prompts are not copied.
    """
    parts = [
        "Make this Python program faster and let it hold less memory. It must return the same answers.",
        f"Task:\n{request.task.strip()}" if request.task.strip() else "",
        f"Program:\n```python\n{request.program.strip()}\n```",
    ]
    if request.profile is not None:
        parts.append(
            f"Where its time and memory go, line by line:\n```\n{request.profile.report(request.program)}\n```"
        )
    if request.tried and not request.tried[-1].kept:
        parts.append(f"Your last revision was not kept: {request.tried[-1].why}.")
    parts.append("Answer with the whole program in one ```python block.")
    return "\n\n".join(part for part in parts if part)


@dataclass(frozen=True)
class Writer:
    """Asks a language model: `complete` is from a prompt to a reply. A reply without a program ends the loop; one whose program is not
    Python, or lacks the entry point, goes on to be judged, and is wrong."""

    complete: Callable[[str], str]
    entry_point: str

    def __call__(self, request: Request) -> str | None:
        """The model's revision."""
        found = extracted(self.complete(prompt_of(request)), self.entry_point)
        return None if found.failure == "no code" else found.program
