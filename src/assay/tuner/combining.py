"""What can be combined with what in a recipe: all that the rules of recipes and of the search know before anything is measured.

A recipe holds at most one step a slot, in the order of `SLOTS`, and the search offers a transform for its goals only. So two of one slot
never meet, and two of different slots are tried together where they serve the same goal and both fit the model. Whether that pays
is for a run to say.

The transforms' own statements are read from their sources: importing them all takes seconds, and a page asks. Those that other
packages provide are not here.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import assay.methods
from assay.methods.transform import GOALS, SLOTS

STATED = ("name", "slot", "goals", "exact")


@dataclass(frozen=True)
class Part:
    """A transform as a part of recipes. `exact` and `goals` as in `Transform`; `paper` tells a paper's method from assay's own."""

    name: str
    slot: str
    goals: tuple[str, ...]
    exact: bool
    paper: bool


@cache
def parts() -> dict[str, Part]:
    """Every transform of assay's by name, in slot order. Raises ValueError for a source that states something else than plain values."""
    found = {}
    for family, file in _sources():
        stated = _stated(file)
        if stated is not None:
            goals = tuple(goal for goal in GOALS if goal in stated["goals"])
            found[stated["name"]] = Part(stated["name"], stated["slot"], goals, stated["exact"], family != "builtin")
    return dict(sorted(found.items(), key=lambda item: (SLOTS.index(item[1].slot), item[0])))


def instead_of(name: str) -> list[Part]:
    """The transforms that take the same place in a recipe, so that none of them is ever in one with `name`.

    >>> [part.name for part in instead_of("dtype")]
    []
    """
    own = parts()[name]
    return [part for part in parts().values() if part.slot == own.slot and part.name != name]


def beside(name: str) -> list[tuple[Part, tuple[str, ...]]]:
    """The transforms of other slots that serve a goal of `name`'s, in the order of a recipe, each with the goals both serve.

    >>> [(part.name, goals) for part, goals in beside("prepacking") if part.name == "fp8_vs_int8"]
    [('fp8_vs_int8', ('throughput',))]
    """
    own = parts()[name]
    others = [part for part in parts().values() if part.slot != own.slot]
    shared = [(part, tuple(goal for goal in own.goals if goal in part.goals)) for part in others]
    return [(part, goals) for part, goals in shared if goals]


def _sources() -> Iterator[tuple[str, Path]]:
    """The modules in which a transform may be, as `transforms` looks for them: the family and the file."""
    for folder in map(Path, assay.methods.__path__):
        for file in sorted([*folder.glob("*/*.py"), *folder.glob("*/*/__init__.py")]):
            family = file.relative_to(folder).parts[0]
            if family != "core":
                yield family, file


def _stated(file: Path) -> dict[str, Any] | None:
    """What the class of a module's `transform` states of itself; None where the module has no transform."""
    text = file.read_text(encoding="utf-8")
    if "\ntransform" not in text:  # parsing takes longer than looking
        return None
    body = ast.parse(text).body
    made = next((value for name, value in _assigned(body) if name == "transform"), None)
    if not isinstance(made, ast.Call) or not isinstance(made.func, ast.Name):
        return None
    own = next(node for node in body if isinstance(node, ast.ClassDef) and node.name == made.func.id)
    return {name: _plain(value) for name, value in _assigned(own.body) if name in STATED}


def _assigned(body: list[ast.stmt]) -> Iterator[tuple[str, ast.expr]]:
    for node in body:
        if isinstance(node, ast.Assign):
            yield from ((target.id, node.value) for target in node.targets if isinstance(target, ast.Name))
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.value is not None:
            yield node.target.id, node.value


def _plain(node: ast.expr) -> Any:
    """A constant, a set of them, or the goals less some. Raises ValueError for anything else."""
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "frozenset":
        return frozenset(_plain(node.args[0]))
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Sub):
        return _plain(node.left) - _plain(node.right)
    if isinstance(node, ast.Name) and node.id == "GOALS":
        return GOALS
    return ast.literal_eval(node)
