"""Items: a program with what it prints, the three prompts, parts that are learned from and judged, and a task as lm-eval has them."""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from assay import checks
from assay.methods.code.surge.extract import MARKER
from assay.methods.code.surge.scores import COUNTS, score

Form = Literal["zero-shot", "chain of thought", "3-shot"]
FORMS: tuple[Form, ...] = get_args(Form)
SHOTS = 3
TITLES = {"python": "Python", "c": "C", "cpp": "C++", "node": "JavaScript", "sql": "SQL", "formal": "Proof"}
STOP = ("\n```", "\n\n\n")
"""Where a continuation of `doc_to_text` in the forms without steps ends: the answer stands in a block that the prompt opens."""


@dataclass(frozen=True)
class Item:
    """A program and its truth: what it prints, or the text of the error that it ends with, by real execution.

    `component` is one of `COUNTS`, `family` what its scorer goes by, `group` the program that items of it have in common. `files` are texts
    by name. `given` is what the program works on, as text; `seconds` is the wall time of one run.
    """

    id: str
    component: str
    family: str
    group: str
    language: str
    files: Mapping[str, str] = field(hash=False)
    command: str
    truth: str
    stdin: str = ""
    given: str = ""
    seconds: float = 0.0

    def __post_init__(self) -> None:
        checks.choice("component", self.component, list(COUNTS))
        checks.choice("language", self.language, list(TITLES))
        if not self.files:
            raise ValueError(f"files of {self.id} must hold one text at least, got none")
        if not self.truth.strip():
            raise ValueError(f"truth of {self.id} must not be empty, got {self.truth!r}")

    @property
    def code(self) -> str:
        """The text of all files; where there are several, each under its name."""
        if len(self.files) == 1:
            return next(iter(self.files.values())).rstrip()
        return "\n\n".join(f"[{name}]\n{text.rstrip()}" for name, text in self.files.items())


# ----------------------------------------------------------------------------------------------------------------------- prompts


def _question(item: Item) -> str:
    asked = f"{TITLES[item.language]}, run by `{item.command}`:\n```\n{item.code}\n```\n"
    return f"{asked}Input:\n```\n{item.stdin.rstrip()}\n```\n" if item.stdin else asked


def _answer(truth: str) -> str:
    return f"{MARKER}\n```\n{truth}\n```\n"


def prompt(item: Item, form: Form = "zero-shot", shots: Sequence[Item] = ()) -> str:
    """What a model is asked, in our own words; "3-shot" puts three answered items before it.

    The paper's third form shows worked-out steps too; ours shows answers alone, for nothing but a person or a large model could write the
    steps. Raises ValueError for shots that are not three, for some in another form, and for one that is the item's own program.

    >>> item = Item("a", "ML", "python", "a", "python", {"main.py": "print(2 + 2)"}, "python main.py", "4")
    >>> prompt(item).endswith("Output:\\n```\\n")
    True
    """
    checks.choice("form", form, list(FORMS))
    wanted = SHOTS if form == "3-shot" else 0
    if len(shots) != wanted:
        raise ValueError(f"shots must be {wanted} items for {form}, got {len(shots)}")
    if any(shot.group == item.group for shot in shots):
        raise ValueError(f"shots must be of other programs than {item.group}, got {[shot.id for shot in shots]}")
    if form == "chain of thought":
        return (
            f"What does this print? Follow it step by step, then write {MARKER} and the exact text in a block.\n\n"
            f"{_question(item)}"
        )
    shown = "".join(f"{_question(shot)}{_answer(shot.truth)}\n" for shot in shots)
    return f"What does each program print, to the letter?\n\n{shown}{_question(item)}{MARKER}\n```\n"


# ------------------------------------------------------------------------------------------------------------------- two parts


def split(items: Sequence[Item]) -> tuple[list[Item], list[Item]]:
    """The learned and the judged part: whole groups in turn, within each component, in an order that hashing gives.

    A group that is in several components goes where the first of them put it, so that no judged program was ever learned from. Our choice.
    """
    place: dict[str, bool] = {}
    for component in dict.fromkeys(item.component for item in items):
        groups = {item.group for item in items if item.component == component}
        judged = True
        for group in sorted(groups, key=lambda name: (zlib.crc32(name.encode()), name)):
            if group not in place:
                place[group] = judged
                judged = not judged
    return [item for item in items if not place[item.group]], [item for item in items if place[item.group]]


def shots_for(item: Item, learned: Sequence[Item]) -> list[Item]:
    """Three learned items of other groups, the shortest of its component and language first, then of its component, then any.

    Raises ValueError where there are not three.
    """

    def order(other: Item) -> tuple[bool, bool, int, str]:
        alike = other.component == item.component
        return not alike, not (alike and other.language == item.language), len(_question(other)), other.id

    found: dict[str, Item] = {}
    for other in sorted(learned, key=order):
        if other.group != item.group:
            found.setdefault(other.group, other)
    if len(found) < SHOTS:
        raise ValueError(f"learned must hold {SHOTS} groups beside {item.group}, got {len(found)}")
    return list(found.values())[:SHOTS]


# ------------------------------------------------------------------------------------------------- files, and a task of a harness


def write(path: str | os.PathLike[str], items: Iterable[Item]) -> None:
    """Items as JSON lines."""
    Path(path).write_text("".join(json.dumps(as_doc(item)) + "\n" for item in items), encoding="utf-8")


def read(path: str | os.PathLike[str]) -> list[Item]:
    """Items from JSON lines. Raises ValueError, naming the line, for what is no item, and for an id that stands twice."""
    found: dict[str, Item] = {}
    with Path(path).open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            where = f"{path}, line {number}"
            try:
                item = of_doc(json.loads(line))
            except (ValueError, TypeError) as error:
                raise ValueError(f"{where}: no item: {error}") from None
            if item.id in found:
                raise ValueError(f"{where}: the id {item.id!r} stands twice")
            found[item.id] = item
    return list(found.values())


def as_doc(item: Item) -> dict[str, Any]:
    """An item as plain data, a `doc` of lm-eval."""
    return asdict(item)


def of_doc(doc: Mapping[str, Any]) -> Item:
    """The item of a doc. Raises ValueError or TypeError for a field too many, too few, or of another type."""
    if not isinstance(doc, Mapping):
        raise TypeError(f"doc must be a mapping, got {checks.shown(doc)}")
    for name, value in doc.items():
        if name == "files":
            if not isinstance(value, Mapping) or not all(isinstance(text, str) for text in value.values()):
                raise TypeError(f"files must be texts by name, got {checks.shown(value)}")
        elif name == "seconds":
            checks.number("seconds", value, low=0)
        elif not isinstance(value, str):
            raise TypeError(f"{name} must be a text, got {checks.shown(value)}")
    return Item(**doc)


def doc_to_text(doc: Mapping[str, Any]) -> str:
    """The zero-shot prompt of a doc, as a task of lm-eval names it (`generate_until`, until `STOP`)."""
    return prompt(of_doc(doc))


def process_results(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """What a task of lm-eval gets for one doc and the texts of its request: the score, and whether the answer could not be read.

    >>> item = Item("a", "ML", "python", "a", "python", {"main.py": "print(2 + 2)"}, "python main.py", "4")
    >>> process_results(as_doc(item), ["4\\n"])
    {'score': 1.0, 'unparsable': 0.0}
    """
    if len(results) != 1:
        raise ValueError(f"results must hold one text, got {len(results)}")
    item = of_doc(doc)
    found = score(item, continued(results[0]))
    return {"score": found.value, "unparsable": float(found.state == "unparsable")}


def continued(text: str) -> str:
    """A whole answer, from what a model wrote after a prompt that ends in an open block."""
    return f"{MARKER}\n```\n{text.split('```', 1)[0].rstrip()}\n```\n"
