"""The conversation: who is asked, what an expert says, what was measured, and all of it kept as a transcript."""

from __future__ import annotations

import http.client
import json
import re
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from assay import checks
from assay.methods.code.llm_library_optimization.bench import Attempt, Bench
from assay.methods.code.llm_library_optimization.case import Candidate, Case, Origin
from assay.methods.code.llm_library_optimization.ledger import Ledger, table

Decision = Literal["accept", "reject", "hint"]
DECISIONS = ("accept", "reject", "hint")
FENCE = re.compile(r"^[ \t]*```[^\n]*\n(.*?)^[ \t]*```", re.DOTALL | re.MULTILINE)
ASK = "Answer with the whole program in one block of code."


@dataclass(frozen=True)
class Message:
    """A turn of a conversation."""

    role: Literal["system", "user", "assistant"]
    content: str


Model = Callable[[Sequence[Message]], str]
"""Answers a conversation: `Endpoint`, `Scripted`, or any function."""


@dataclass(frozen=True)
class Hint:
    """What an expert decides after a round, in their own words: to stop with what there is, to go on, or to go on with a hint."""

    decision: Decision
    says: str = ""
    reason: str = ""

    def __post_init__(self) -> None:
        checks.choice("decision", self.decision, DECISIONS)


class Scripted:
    """Stands for a model: gives the answers that it was given, in order, and "" when there are none left.

    >>> Scripted(["first"])([]), Scripted([])([])
    ('first', '')
    """

    def __init__(self, answers: Iterable[str]) -> None:
        self._left = iter(answers)

    def __call__(self, messages: Sequence[Message]) -> str:
        return next(self._left, "")


@dataclass(frozen=True)
class Endpoint:
    """A chat model behind any OpenAI-compatible address, which ends with /v1.

    Calling it raises OSError where nobody answers, and ValueError for an answer of another shape.
    """

    url: str
    model: str
    key: str = field(default="", repr=False)
    temperature: float = 0.0
    seconds: float = 300.0

    def __post_init__(self) -> None:
        if not self.url.startswith(("http://", "https://")):
            raise ValueError(f"url must begin with http:// or https://, got {self.url!r}")
        checks.number("temperature", self.temperature, low=0)
        checks.number("seconds", self.seconds, above=0)

    def __call__(self, messages: Sequence[Message]) -> str:
        asked = {"model": self.model, "temperature": self.temperature, "messages": [asdict(one) for one in messages]}
        request = urllib.request.Request(
            f"{self.url.rstrip('/')}/chat/completions",
            json.dumps(asked).encode(),
            {"Content-Type": "application/json", **({"Authorization": f"Bearer {self.key}"} if self.key else {})},
        )
        try:
            with urllib.request.urlopen(request, timeout=self.seconds) as answer:
                said = json.loads(answer.read())
        except urllib.error.HTTPError as error:
            words = error.read(500).decode("utf-8", "replace")
            raise OSError(f"{self.url} answers {error.code}: {words}") from None
        except http.client.HTTPException as error:
            raise OSError(f"{self.url} does not answer in full: {error!r}") from None
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{self.url} answers with something that is no JSON: {error}") from None
        try:
            return str(said["choices"][0]["message"]["content"] or "")
        except (KeyError, IndexError, TypeError):
            raise ValueError(f"{self.url} answers without a message: {checks.shown(said)}") from None


@dataclass
class Conversation:
    """What was said, what was tried, and what the expert decided after each round."""

    case: str
    messages: list[Message] = field(default_factory=list)
    attempts: list[Attempt] = field(default_factory=list)
    decisions: list[Hint] = field(default_factory=list)

    @property
    def best(self) -> Attempt | None:
        """The accepted attempt with the highest lower end on the kind that decides; None where none was accepted."""
        accepted = [one for one in self.attempts if one.accepted and one.compared is not None]
        return max(accepted, key=lambda one: one.compared.speedup.low, default=None)  # type: ignore[union-attr]

    def transcript(self) -> str:
        """The conversation as Markdown, every decision at its place."""
        parts = [f"# {self.case}"]
        rounds = iter(self.decisions)
        for message in self.messages:
            parts.append(f"## {message.role}\n\n{message.content}")
            if message.role == "assistant" and (decided := next(rounds, None)) is not None:
                reason = f" {decided.reason}" if decided.reason else ""
                parts.append(f"*The expert's decision: {decided.decision}.{reason}*")
        return "\n\n".join(parts) + "\n"


def read_script(path: Path | str) -> tuple[Scripted, list[Hint]]:
    """A conversation from JSON lines: {"answer": text of the model} and {"decision": ..., "says": ..., "reason": ...}, in their order.

    Raises ValueError for a line that is neither.
    """
    answers: list[str] = []
    hints: list[Hint] = []
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            if "answer" in row:
                answers.append(str(row["answer"]))
            else:
                hints.append(Hint(**row))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path}, line {number}, must hold an answer or a decision: {error}") from None
    return Scripted(answers), hints


def program_of(answer: str) -> str:
    """The program in an answer: its last block of code, "" where it has none."""
    found = FENCE.findall(answer)
    return str(found[-1]) if found else ""


def first_question(case: Case, facts: Any) -> str:
    """What a model is told first: the contract, the code as shipped, and what it is built with."""
    about = ", ".join(f"{name}: {value}" for name, value in facts.items())
    return (
        f"Make this faster without changing what it does.\nContract: {case.contract}\nBuilt with: {about}\n\n"
        f"```\n{case.reference.source.rstrip()}\n```\n\n{ASK}"
    )


def converse(
    bench: Bench,
    model: Model,
    *,
    rounds: int = 3,
    hints: Sequence[Hint] = (),
    origin: Origin = "model",
    ledger: Ledger | None = None,
    feed_back: bool = True,
) -> Conversation:
    """Ask, build, compare, time, tell what was measured, and ask again.

    After round r the expert's `hints[r]` is recorded; "accept" ends the conversation, "reject" makes the next candidate a child of
    the best one so far instead of the last one, and what a hint says goes into the next question. An answer without a program is
    told so and counts as a round. Every attempt goes into the ledger. `feed_back=False` withholds the measured table, which tells
    what it is worth. Raises ValueError for a model's programs on a backend that does not protect, and what the model raises.
    """
    checks.whole("rounds", rounds, low=1)
    if checks.choice("origin", origin, ("human", "model", "tool")) == "model" and not bench.backend.protected:
        raise ValueError("bench must have a backend in the sandbox where a model writes the programs")
    found = Conversation(bench.case.name)
    question, parent = first_question(bench.case, bench.backend.facts()), ""
    for number in range(rounds):
        found.messages.append(Message("user", question))
        answer = model(tuple(found.messages))
        found.messages.append(Message("assistant", answer))
        source = program_of(answer)
        told = "There was no block of code in the answer."
        if source.strip():
            attempt = bench.attempt(Candidate(f"round {number + 1}", source, origin, parent, question))
            found.attempts.append(attempt)
            if ledger is not None:
                ledger.add(attempt)
            told = table(found.attempts) if feed_back else f"It was {attempt.state}."
            parent = attempt.candidate.digest
        decided = hints[number] if number < len(hints) else None
        if decided is not None:
            found.decisions.append(decided)
            if decided.decision == "accept":
                break
            if decided.decision == "reject":
                parent = found.best.candidate.digest if found.best is not None else ""
        question = "\n\n".join(part for part in (told, decided.says if decided is not None else "", ASK) if part)
    return found
