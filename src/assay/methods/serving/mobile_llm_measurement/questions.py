"""A task with known answers that a small model can do: which of a few modules of the standard library is a docstring from?

The paper's application makes text of a phone's sensors and asks where its user is; its recordings are not here. What is kept of it is the
form: some examples, a short text, and an answer of one word out of a few, which may also be none of them (a parse failure).
"""

from __future__ import annotations

import ast
import functools
import random
import re
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from assay import checks

MODULES = ("statistics", "tarfile", "threading", "turtle")
LONGEST, SHORTEST = 90, 40  # characters of a text
WORD = re.compile(r"\W*([A-Za-z_][\w.]*)")


@dataclass(frozen=True)
class Question:
    """A prompt, the right answer, and the answers that there are; `text` is what the question is about."""

    prompt: str
    label: str
    choices: tuple[str, ...]
    text: str = ""


@dataclass(frozen=True)
class Scores:
    """Shares of right answers and of answers that are none of the choices, the mean F1 over the labels asked for, and which were right."""

    accuracy: float
    parse_failures: float
    f1: float
    right: tuple[bool, ...]


def parsed(text: str, choices: Sequence[str]) -> str | None:
    """The choice that the first word of an answer names, whatever its case; None, a parse failure, where it names none.

    >>> parsed(" Turtle.\\nText: ...", ("turtle", "tarfile")), parsed("I think turtle", ("turtle", "tarfile")), parsed("", ("turtle",))
    ('turtle', None, None)
    """
    found = WORD.match(text.lstrip())
    if found is None:
        return None
    word = found[1].rstrip(".").lower()
    return next((choice for choice in choices if choice.lower() == word), None)


def scored(questions: Sequence[Question], texts: Sequence[str]) -> Scores:
    """How good answers are. Raises ValueError where there are none, or not one to each question."""
    if not questions or len(questions) != len(texts):
        raise ValueError(
            f"texts must hold an answer to each of at least one question, got {len(texts)} to {len(questions)}"
        )
    answers = [parsed(text, question.choices) for question, text in zip(questions, texts, strict=True)]
    labels = [question.label for question in questions]
    right = tuple(answer == label for answer, label in zip(answers, labels, strict=True))
    f1 = []
    for name in sorted(set(labels)):
        hits = sum(answer == label == name for answer, label in zip(answers, labels, strict=True))
        f1.append(2 * hits / (answers.count(name) + labels.count(name)))
    return Scores(sum(right) / len(right), answers.count(None) / len(answers), sum(f1) / len(f1), right)


def module_questions(
    count: int, *, modules: Sequence[str] = MODULES, examples: int = 3, longest: int = LONGEST, seed: int = 0
) -> list[Question]:
    """`count` questions, the modules in turn, each behind the same `examples` solved ones a module.

    Texts are docstrings of public classes and functions, on one line, cut to `longest` characters, less those that name one of the
    modules; no text occurs twice, and none of the examples is asked. Half of a module's texts are those of seed 0, to choose a prompt's
    form on; the other seeds draw from the other half. Raises ValueError where a module's source is not here or has too few docstrings.
    """
    count, examples = checks.whole("count", count, low=1), checks.whole("examples", examples, low=1)
    longest, seed = checks.whole("longest", longest, low=SHORTEST), checks.whole("seed", seed, low=0)
    names = tuple(modules)
    if len(set(names)) < 2 or len(set(names)) != len(names):
        raise ValueError(f"modules must be at least two different ones, got {checks.shown(names)}")
    wanted = examples + -(-count // len(names))
    chosen: dict[str, list[str]] = {}
    taken: set[str] = set()
    for name in names:
        texts = [text for text in _texts(name, longest) if not _names(text, names) and text not in taken]
        taken |= set(texts)
        random.Random(f"{name} 0").shuffle(texts)
        half = len(texts) // 2
        texts = texts[half:] if seed else texts[:half]
        if len(texts) < wanted:
            raise ValueError(
                f"half of {name} has {len(texts)} docstrings that will do, {wanted} are needed: ask for fewer"
            )
        if seed:
            random.Random(f"{name} {seed}").shuffle(texts)
        chosen[name] = texts[:wanted]
    shown = [_solved(chosen[name][number], name) for number in range(examples) for name in names]
    random.Random(f"examples {seed}").shuffle(shown)  # a small model says what it was shown last
    head = f"Each text is from one of {', '.join(names[:-1])} and {names[-1]}.\n\n" + "".join(shown)
    asked = [(name, text) for number in range(examples, wanted) for name in names for text in [chosen[name][number]]]
    return [Question(f"{head}Text: {text}\nModule:", name, names, text) for name, text in asked[:count]]


def without_text(question: Question) -> Question:
    """The same question with nothing to answer from: its text is left out. What is still right then is no merit of the model's."""
    return Question(
        question.prompt.replace(f"Text: {question.text}\n", "Text: ...\n"), question.label, question.choices
    )


def by_shared_words(questions: Sequence[Question]) -> list[str]:
    """The cheapest rival: the module of the example that shares the largest part of its words with the text. No model."""
    found = []
    for question in questions:
        shown = re.findall(r"Text: (.*)\nModule: (\S+)", question.prompt)
        words = _words(question.text)
        best = max(shown, key=lambda one: len(words & _words(one[0])) / max(len(words | _words(one[0])), 1))
        found.append(best[1])
    return found


def _words(text: str) -> set[str]:
    return set(re.findall(r"[a-z]+", text.lower()))


def _solved(text: str, name: str) -> str:
    return f"Text: {text}\nModule: {name}\n\n"


def _names(text: str, modules: Sequence[str]) -> bool:
    return any(name.lower() in text.lower() for name in modules)


@functools.cache
def _texts(name: str, longest: int) -> tuple[str, ...]:
    """Distinct docstrings of a module of the standard library, read from its source, which is not run."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    if not re.fullmatch(r"[A-Za-z_]\w*", name):
        raise ValueError(f"modules must be names of modules, got {checks.shown(name)}")
    files = [file for file in (folder / f"{name}.py", folder / name / "__init__.py") if file.is_file()]
    if not files:
        raise ValueError(
            f"modules must be top-level modules of the standard library with a source in {folder}, got {name!r}"
        )
    lines = (" ".join(text.split()) for text in _docstrings(ast.parse(files[0].read_text(encoding="utf-8"))))
    return tuple(dict.fromkeys(line[:longest].rstrip() for line in lines if len(line) >= SHORTEST))


def _docstrings(node: ast.AST) -> Iterator[str]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and not child.name.startswith("_"):
            if text := ast.get_docstring(child):
                yield text
            if isinstance(child, ast.ClassDef):
                yield from _docstrings(child)
