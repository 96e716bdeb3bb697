"""Small problems with the programs that people hand in for them, one after the other: slow ones, faster ones, one that is wrong.

A bank is a folder of Python files, one a problem. A file holds `SIZES` (that of inputs for correctness, that of inputs for costs),
`generate(size, rng)`, which writes stdin, `SUBMISSIONS`, right programs as (author, what it does, program) in the order in which they
were handed in, and `WRONG`, a plausible program that is not right. A bank is the project's own and is trusted; samples never are.

The programs are made up, for these problems and by one hand, and so are authors and order: nobody's archive is behind them.
"""

from __future__ import annotations

import ast
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from assay.errors import InputError

CPP = Path(__file__).with_name("cpp")


@dataclass(frozen=True)
class Submitted:
    """A right program: who handed it in, what it does, and its text."""

    author: str
    about: str
    program: str


@dataclass(frozen=True)
class Problem:
    """What is asked, the right programs in the order in which they were handed in, a wrong one, and inputs.

    `sizes` are those of the levels: up to the first for correctness, the second for costs.
    """

    id: str
    title: str
    sizes: tuple[int, int]
    submissions: tuple[Submitted, ...]
    wrong: Submitted
    _generate: Callable[[int, random.Random], str] = field(repr=False, compare=False)

    def stdin(self, level: int, number: int = 0, seed: int = 0) -> str:
        """The input of case `number` of a level, the same for the same seed on any machine; those of level 0 have many sizes.

        Raises InputError for a level that there is not.
        """
        if level not in (0, 1):
            raise InputError(f"{self.id} has levels 0 and 1, got {level}")
        rng = random.Random(f"{seed}/{self.id}/{level}/{number}")
        return self._generate(self.sizes[1] if level else rng.randint(1, self.sizes[0]), rng)


@cache
def problems(folder: Path = CPP) -> dict[str, Problem]:
    """The problems of a folder by id, the names of their files, in order of them.

    >>> found = problems()
    >>> found["inversions"].submissions[0].author, len(found)
    ('ada', 36)
    """
    return {path.stem: _problem(path) for path in sorted(folder.glob("*.py"))}


def _problem(path: Path) -> Problem:
    text = path.read_text(encoding="utf-8")
    held: dict[str, Any] = {}
    exec(compile(text, str(path), "exec"), held)
    title = (ast.get_docstring(ast.parse(text)) or "").partition(": ")[2]
    about, wrong = held["WRONG"]
    given = tuple(Submitted(author, what, program.lstrip("\n")) for author, what, program in held["SUBMISSIONS"])
    return Problem(path.stem, title, held["SIZES"], given, Submitted("", about, wrong.lstrip("\n")), held["generate"])
