"""Prompts with accepted answers, from a user's JSON-lines file: what `--eval` judges a model on.

An answer counts if the first line of what the model generates, apart from blank ones before it, is one of the accepted answers:
both are compared without regard to case, with white space at the ends dropped and every run of it within counted as one space.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from assay import checks
from assay.errors import InputError
from assay.workloads.text import encode
from assay.workloads.workload import BadLine, numbered_lines, read_object, refuse, text_of

ROOM = 8  # tokens generated beyond the longest accepted answer: a model may begin with a blank line; our choice


@dataclass(frozen=True)
class Question:
    """A prompt as token ids, and the answers that are accepted."""

    prompt: list[int]
    answers: tuple[str, ...]


@dataclass(frozen=True)
class Questions:
    """A file's questions in their order, and how many tokens to generate for each: enough for the longest accepted answer."""

    name: str
    questions: list[Question]
    new_tokens: int


def read_questions(path: Path | str, tokenizer: Any, *, context: int) -> Questions:
    """Read a JSON-lines file of {"prompt": str, "answers": [str, ...]}, one object a line; blank lines are skipped.

    An answer is a single line of text that is not blank. A prompt and the tokens that are generated must fit into the model's
    `context`. Raises InputError that names every bad line (at most 20) by its number and what is wrong with it; also for a file that is
    missing or has no prompts. The whole file is refused when one line is bad. ValueError and TypeError for a bad context.
    """
    context = checks.whole("context", context, low=1)
    found, numbers, bad, new = [], [], [], ROOM
    for number, line in numbered_lines(Path(path), "eval"):
        try:
            prompt, answers = _parse(line)
        except BadLine as error:
            bad.append(f"line {number}: {error}")
            continue
        longest = tokenizer(list(answers), add_special_tokens=False, verbose=False)["input_ids"]
        new = max(new, ROOM + max(map(len, longest)))
        found.append(Question(encode(tokenizer, prompt), answers))
        numbers.append(number)
    for number, question in zip(numbers, found, strict=True):
        if len(question.prompt) + new > context:
            bad.append(
                f"line {number}: too long: a prompt of {len(question.prompt)} tokens and {new} to generate, but the model's "
                f"context is {context}"
            )
    refuse(path, bad)
    if not found:
        raise InputError(f'{path}: empty; expected one {{"prompt": "...", "answers": ["..."]}} a line')
    return Questions(Path(path).name, found, new)


def is_accepted(generated: str, answers: Collection[str]) -> bool:
    """Whether the first line of `generated` that is not blank is one of `answers`, both normalised.

    >>> is_accepted("\\n  The  Nile.\\nIt flows", ["the nile."]), is_accepted("Nile", ["the nile"])
    (True, False)
    """
    lines = (normalised(line) for line in generated.splitlines())
    first = next((line for line in lines if line), "")
    return first in {normalised(answer) for answer in answers}


def normalised(text: str) -> str:
    """`text` without regard to case, ends stripped, white space within as single spaces."""
    return " ".join(text.casefold().split())


def _parse(raw: bytes) -> tuple[str, tuple[str, ...]]:
    record = read_object(raw, ("prompt", "answers"))
    for key in ("prompt", "answers"):
        if key not in record:
            raise BadLine(f"{key} {'is' if key == 'prompt' else 'are'} missing")
    prompt, answers = text_of("prompt", record["prompt"]), record["answers"]
    if not prompt.strip():
        raise BadLine("prompt is empty")
    if not isinstance(answers, list) or not answers:
        raise BadLine('answers must be a list of at least one string, such as ["Paris"]')
    for number, answer in enumerate(answers, 1):
        answer = text_of(f"answer {number}", answer)
        if not answer.strip():
            raise BadLine(f"answer {number} is empty")
        if len(answer.strip().splitlines()) > 1:
            raise BadLine(f"answer {number} has several lines; only the first line of what is generated is compared")
    return prompt, tuple(answers)
