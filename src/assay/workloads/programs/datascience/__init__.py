"""A bank of data-science tasks: analytical questions, algorithms and plots, easy, medium and hard, each with programs that pass and fail.

    for task in load(kind="analytical"):
        print(task.prompt)                       # a function header with its docstring
        for arguments in task.cases():           # plain data; `harness.prepared` makes frames and arrays of it
            expected = task.expected(arguments)  # by a second way in plain Python, not by the solution

Every task is our own. It is about scikit-learn's bundled data sets or small made-up tables, and has a solution that is right and one or
two programs that somebody might write and that are wrong. `Task.fault` judges: values by value, figures by their artists. The files of the
bank are in cells: "# %% task" (what is asked, its cases, the answer), "# %% solution", "# %% wrong: why".

A program gets no data that it could remember the answer of: most cases are drawn from `seed`. Where scikit-learn, pandas or matplotlib
is not installed, `load(installed=True)` leaves out what needs it.
"""

from __future__ import annotations

import importlib.util
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal, get_args

from assay import checks
from assay.workloads.programs.datascience import harness
from assay.workloads.programs.datascience.judging import TOLERANCE, decoded, figure_fault, same, similarity

__all__ = ["KINDS", "LEVELS", "HARNESS", "Kind", "Level", "Task", "load", "similarity"]

Kind = Literal["analytical", "algorithm", "visualization"]
Level = Literal["easy", "medium", "hard"]
KINDS: tuple[Kind, ...] = get_args(Kind)
LEVELS: tuple[Level, ...] = get_args(Level)
HARNESS = Path(harness.__file__)
"""What runs a program where it is kept away from us: a file that imports nothing of assay."""
_BANK = Path(__file__).with_name("bank")
_MODULES = {"pandas": "pandas", "scikit-learn": "sklearn", "matplotlib": "matplotlib"}


@dataclass(frozen=True)
class Task:
    """What is asked, and what is right.

    `prompt` is a function header with a docstring, `entry_point` the function's name, `solution` a whole program that is right, `wrong`
    programs that are not, by what is wrong with them. `needs` are the packages beside numpy that the data or the solution need, by
    their names on PyPI; "pandas" and "matplotlib" a program may import only there.
    """

    id: str
    kind: Kind
    level: Level
    entry_point: str
    prompt: str
    solution: str
    wrong: Mapping[str, str]
    needs: tuple[str, ...]
    source: str = field(repr=False)  # of the cell that makes cases and answers

    def cases(self, seed: int = 0) -> list[list[Any]]:
        """The arguments of every call that is judged, as plain data, fixed by `seed`."""
        made = _names(self.source)["cases"](random.Random(f"{seed}/{self.id}"))
        return [list(arguments) for arguments in made]

    def expected(self, arguments: Sequence[Any]) -> Any:
        """What a right program returns, or what is drawn in each pair of axes of its figure."""
        found = _names(self.source)["answer"](*arguments)
        return found if self.kind == "visualization" else decoded(harness.plain(found))

    def fault(self, arguments: Sequence[Any], got: Any) -> str:
        """What is wrong with what a program gave, by way of `harness.run`; "" where it is right."""
        expected = self.expected(arguments)
        if self.kind != "visualization":
            fits = same(expected, decoded(got), _names(self.source).get("TOLERANCE", TOLERANCE))
            return "" if fits else f"{checks.shown(decoded(got))}, not {checks.shown(expected)}"
        if not isinstance(got, Mapping) or "axes" not in got:
            return "no figure"
        return figure_fault(expected, got["axes"])


def load(*, kind: Kind | None = None, level: Level | None = None, installed: bool = False) -> list[Task]:
    """The tasks of a kind and a level, of all without them, in the order of the bank; with `installed` those whose needs are there.

    Raises ValueError for another kind or level.

    >>> tasks = load()
    >>> len(tasks) > 60, len(load(kind="algorithm", level="hard"))
    (True, 8)
    """
    kinds = KINDS if kind is None else (checks.choice("kind", kind, KINDS),)
    levels = LEVELS if level is None else (checks.choice("level", level, LEVELS),)
    found = [task for one in kinds for other in levels for task in _file(one, other)]
    return [task for task in found if not installed or all(map(_installed, task.needs))]


@cache
def _installed(package: str) -> bool:
    return importlib.util.find_spec(_MODULES[package]) is not None


@cache
def _file(kind: Kind, level: Level) -> tuple[Task, ...]:
    text = (_BANK / f"{kind}_{level}.py").read_text(encoding="utf-8")
    imports = text.partition("# %% ")[0]  # the tables that the file's task cells use
    cells = [
        (head.strip(), body.strip() + "\n")
        for head, body in re.findall(r"^# %% (.*)\n((?:(?!# %% ).*\n?)*)", text, re.M)
    ]
    starts = [at for at, (head, _) in enumerate(cells) if head == "task"]
    return tuple(
        _task(kind, level, cells[a:b], imports) for a, b in zip(starts, [*starts[1:], len(cells)], strict=True)
    )


def _task(kind: Kind, level: Level, cells: Sequence[tuple[str, str]], imports: str = "") -> Task:
    (_, cell), (head, solution), *others = cells
    source = imports + cell
    names = _names(source)
    signature, text = names["SIGNATURE"], names["TEXT"].strip().replace("\n", "\n    ")
    entry_point = signature.removeprefix("def ").partition("(")[0]
    if head != "solution" or not all(other.startswith("wrong: ") for other, _ in others):
        raise ValueError(
            f"cells of {entry_point} must be task, solution, wrong: ..., got {[name for name, _ in cells]}"
        )
    return Task(
        id=f"{kind}/{level}/{entry_point}",
        kind=kind,
        level=level,
        entry_point=entry_point,
        prompt=f'{signature}:\n    """{text}"""\n',
        solution=solution,
        wrong={other.removeprefix("wrong: "): body for other, body in others},
        needs=_needs(kind, cell),
        source=source,
    )


def _needs(kind: Kind, cell: str) -> tuple[str, ...]:
    asked = {"pandas": "frame(" in cell, "scikit-learn": "bundled(" in cell}
    return tuple(name for name, yes in {**asked, "matplotlib": kind == "visualization"}.items() if yes)


@cache
def _names(source: str) -> dict[str, Any]:
    """What a cell of ours defines."""
    names: dict[str, Any] = {}
    exec(compile(source, "task", "exec"), names)
    return names
