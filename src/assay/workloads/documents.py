"""Documents to look things up in, and questions that need one of them or two: the classes of Python's standard library.

A document says of one class where it is defined, what it inherits from (object, where the source names nothing), and
how its documentation begins, read from the sources by `ast`; nothing is imported or run. Questions ask for what a class
inherits from ("base"), for what its base inherits from ("grand"), and for the module that defines its base ("module").
The last two need a second document, which the question does not name. `looked_up` is a program that answers a question
from given documents, and every question was answered by it from its own documents, and not without them.

Both change a little with the Python version. Questions belong to parts as those of `workloads.reasoning` do: "shown"
are for examples in prompts, "pilot" for choosing settings, "learn" for fitting, "judged" for figures.

>>> (asked,) = questions("grand", n=1, part="judged")
>>> known = documents()
>>> looked_up(asked.question, [known[i].text for i in asked.gold]) == asked.answer, len(asked.steps)
(True, 2)
"""

from __future__ import annotations

import ast
import builtins
import hashlib
import random
import re
import sys
import sysconfig
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal, get_args

from assay import checks
from assay.errors import MissingError

Task = Literal["base", "grand", "module"]
Part = Literal["shown", "pilot", "learn", "judged"]
TASKS: tuple[Task, ...] = get_args(Task)
PARTS: tuple[Part, ...] = get_args(Part)
WORDS = 5  # of a documentation's first sentence
SAME = (
    2  # questions of a task and a part that may have one answer: no answer is a good guess, and `object` is none at all
)
_SHARES = {"shown": 0.1, "pilot": 0.15, "learn": 0.3, "judged": 0.45}
_PACKAGES = (
    "asyncio", "collections", "concurrent", "email", "html", "http", "importlib", "json", "logging", "multiprocessing",
    "unittest", "urllib", "wsgiref", "xml", "xmlrpc",
)  # fmt: skip
_FACT = re.compile(r"(?P<module>[\w.]+) defines (?P<name>\w+), which inherits from (?P<base>[\w.]+?)\.(?: |$)")
_ASKS = {
    "base": "Which class does {} inherit from?",
    "grand": "Which class does the base class of {} inherit from?",
    "module": "Which module defines the base class of {}?",
}
_WHERE = "Which module defines {}?"


@dataclass(frozen=True)
class Document:
    """A class: "module defines Name, which inherits from base. How its documentation begins"."""

    module: str
    name: str
    base: str  # the last part of its name, "" for none or several
    origins: tuple[str, ...]  # modules that the source takes the base from, or packages that hand it on
    text: str

    def inherits(self, other: Document) -> bool:
        """Whether another document is about this class's base: it has its name, and is where the source says that it
        comes from.
        """
        return self.base == other.name and any(
            other.module == origin or other.module.startswith(f"{origin}.") for origin in self.origins
        )


@dataclass(frozen=True)
class Question:
    """A question with its answer, the questions of one document each that lead to it with theirs, and the documents
    that tell it.
    """

    task: Task
    question: str
    answer: str
    steps: tuple[tuple[str, str], ...]
    gold: tuple[int, ...]

    @property
    def part(self) -> Part:
        """The part that the question belongs to: by the class it names, so that no two parts ask about one class."""
        name = self.steps[0][0]
        at = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "big") / 2**64
        for part in PARTS[:-1]:
            if at < _SHARES[part]:
                return part
            at -= _SHARES[part]
        return PARTS[-1]


@cache
def documents() -> tuple[Document, ...]:
    """A document for each public class of the standard library, ordered by module and name.

    Raises MissingError where the library's sources are not there.
    """
    found = {(each.module, each.name): each for each in _classes()}
    if len(found) < 200:
        raise MissingError("the standard library's sources are not there; use a Python that comes with them")
    return tuple(found[key] for key in sorted(found))


def questions(task: Task, *, n: int, part: Part = "judged", seed: int = 0) -> list[Question]:
    """`n` questions of a task that belong to `part`, fixed by the seed; no more than `SAME` have one answer, and none
    `object`.

    Raises ValueError for an unknown task or part, and where there are not so many questions.
    """
    task, part = checks.choice("task", task, TASKS), checks.choice("part", part, PARTS)
    n, seed = checks.whole("n", n, low=1), checks.whole("seed", seed)
    pool = [each for each in _questions(task) if each.part == part]
    random.Random(f"{task} {part} {seed}").shuffle(pool)
    answers: Counter[str] = Counter()
    kept = []
    for each in pool:
        if answers[each.answer] < SAME:
            answers[each.answer] += 1
            kept.append(each)
    if n > len(kept):
        raise ValueError(f"n must be at most {len(kept)} for {task} in {part}, got {n}")
    return kept[:n]


def right(question: Question, text: str) -> bool:
    """Whether the first line of a continuation has the answer as a whole name (containment, which long answers
    flatter).

    >>> asked = questions("base", n=1)[0]
    >>> right(asked, f" {asked.answer}."), right(asked, f" {asked.answer}2"), right(asked, "")
    (True, False, False)
    """
    return question.answer in names(text)


def exact(question: Question, text: str) -> bool:
    """Whether the first line of a continuation is the answer and nothing else but a full stop."""
    return first_line(text).rstrip(".") == question.answer


def names(text: str) -> list[str]:
    """The names in the first line of a continuation, dotted ones whole and their last parts too.

    >>> names(" It is socketserver.TCPServer.")
    ['It', 'is', 'socketserver.TCPServer', 'TCPServer']
    """
    found = []
    for name in re.findall(r"\w+(?:\.\w+)*", first_line(text)):
        found += [name, name.split(".")[-1]] if "." in name else [name]
    return found


def first_line(text: str) -> str:
    """The first line that is not blank."""
    return next((line.strip() for line in text.splitlines() if line.strip()), "")


def looked_up(question: str, texts: Sequence[str]) -> str:
    """The answer to a question of any task from the texts of documents alone, by rule; "" where they do not tell it.

    Of several documents about one name the last counts, which is the best where they stand in reversed order of rank.
    """
    facts = {fact["name"]: fact for text in texts if (fact := _FACT.match(text))}
    for task, form in (*_ASKS.items(), ("where", _WHERE)):
        asked = re.fullmatch(re.escape(form).replace(r"\{\}", r"(\w+)"), question)
        if asked is None or (fact := facts.get(asked[1])) is None:
            continue
        base = fact["base"].split(".")[-1]
        if task in ("base", "where"):
            return base if task == "base" else fact["module"]
        if base in facts:
            return facts[base]["base"].split(".")[-1] if task == "grand" else facts[base]["module"]
    return ""


def follow_up(question: str, answers: Sequence[str]) -> str:
    """The question of one document that comes next, by rule, behind the answers to those before it; "" where none does.

    >>> follow_up("Which module defines the base class of Mozilla?", [])
    'Which class does Mozilla inherit from?'
    >>> follow_up("Which module defines the base class of Mozilla?", ["UnixBrowser"])
    'Which module defines UnixBrowser?'
    """
    for task, then in (("grand", _ASKS["base"]), ("module", _WHERE)):
        asked = re.fullmatch(re.escape(_ASKS[task]).replace(r"\{\}", r"(\w+)"), question)
        if asked is not None and len(answers) < 2:
            if not answers:
                return _ASKS["base"].format(asked[1])
            said = names(answers[0]) or ["nothing"]
            return then.format(said[0].split(".")[-1])
    return ""


# ----------------------------------------------------------------------------------------------------- from the sources


def _classes() -> Iterator[Document]:
    folder = Path(sysconfig.get_paths()["stdlib"])
    files = sorted(folder.glob("*.py")) + [
        file for name in _PACKAGES for file in sorted((folder / name).rglob("*.py")) if "test" not in file.parts
    ]
    for file in files:
        parts = file.relative_to(folder).with_suffix("").parts
        parts = parts[:-1] if parts[-1] == "__init__" else parts
        if not parts or parts[0] not in sys.stdlib_module_names or any(part.startswith("_") for part in parts):
            continue
        body = ast.parse(file.read_text(encoding="utf-8")).body
        package = parts if file.name == "__init__.py" else parts[:-1]
        imported = dict(pair for node in body for pair in _imported(node, package))
        for node in body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                yield _document(".".join(parts), node, imported)


def _imported(node: ast.stmt, package: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    """The names that a statement imports, each with the whole name of what it stands for."""
    if isinstance(node, ast.Import):
        for each in node.names:
            yield (each.asname, each.name) if each.asname else (each.name, each.name)
    elif isinstance(node, ast.ImportFrom):
        above = package[: len(package) - node.level + 1] if node.level else ()
        source = ".".join([*above, *([node.module] if node.module else [])])
        for each in node.names:
            yield each.asname or each.name, f"{source}.{each.name}"


def _document(module: str, node: ast.ClassDef, imported: dict[str, str]) -> Document:
    bases = [ast.unparse(base) for base in node.bases] or ["object"]
    written = bases[0] if len(bases) == 1 and re.fullmatch(r"[\w.]+", bases[0]) else ""
    before, _, base = written.rpartition(".")
    if before:
        origins: tuple[str, ...] = (imported[before],) if before in imported else ()
    else:
        origins = (imported[base].rpartition(".")[0],) if base in imported else (module,)
    told = re.split(r"(?<=[.:])\s", " ".join((ast.get_docstring(node) or "").split()))[0]
    begins = " ".join(told.split()[:WORDS])
    text = f"{module} defines {node.name}, which inherits from {' and '.join(bases)}."
    return Document(module, node.name, base, origins, f"{text} {begins}" if begins else text)


@cache
def _questions(task: Task) -> tuple[Question, ...]:
    """All questions of a task: about classes whose name, and whose base's name, one document has and the language
    itself has not.
    """
    known = documents()
    often = Counter(each.name for each in known)
    place = {each.name: i for i, each in enumerate(known) if often[each.name] == 1 and not hasattr(builtins, each.name)}
    found = []
    for i, each in enumerate(known):
        if each.name not in place or not each.base:
            continue
        steps = [(_ASKS["base"].format(each.name), each.base)]
        gold: tuple[int, ...] = (i,)
        if task != "base":
            if each.base not in place or not each.inherits(base := known[place[each.base]]):
                continue
            asks, answer = (_ASKS["base"], base.base) if task == "grand" else (_WHERE, base.module)
            if not answer or (task == "module" and base.module == each.module):
                continue
            steps.append((asks.format(each.base), answer))
            gold = (i, place[each.base])
        if steps[-1][1] == "object":
            continue
        asked = Question(task, _ASKS[task].format(each.name), steps[-1][1], tuple(steps), gold)
        texts = [known[i].text for i in gold]
        if looked_up(asked.question, texts) == asked.answer != looked_up(asked.question, texts[:-1]):
            found.append(asked)
    return tuple(found)
