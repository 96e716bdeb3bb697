"""Fast programs for slow ones that are known: the nearest of the bank's slow programs by its words, and the expert's program for its task.

It helps only where a function does one of the bank's tasks in other words; whoever takes a candidate tests it like any other.
"""

from __future__ import annotations

import ast
import io
import keyword
import tokenize
from collections import Counter
from collections.abc import Mapping
from functools import lru_cache

from assay.codebench.optimised import lines_of
from assay.methods.core.programs.rewriting.source import Source
from assay.workloads.programs.task import Task, bank

GRAM = 4
LEAST = 0.35
"""Likeness below which nothing is proposed. Our choice."""
CANDIDATES = 2


def words(program: str) -> Counter[tuple[str, ...]]:
    """Runs of four words of a program, names replaced by the order in which they first come; comments and layout left out."""
    names: dict[str, str] = {}
    found: list[str] = []
    try:
        for token in tokenize.generate_tokens(io.StringIO(program).readline):
            if token.type == tokenize.NAME and not keyword.iskeyword(token.string):
                known = token.string in _KEPT
                found.append(token.string if known else names.setdefault(token.string, f"n{len(names)}"))
            elif token.type in (tokenize.NAME, tokenize.OP, tokenize.NUMBER, tokenize.STRING):
                found.append(token.string)
    except (tokenize.TokenError, IndentationError):
        return Counter()
    return Counter(tuple(found[n : n + GRAM]) for n in range(len(found) - GRAM + 1))


_KEPT = frozenset(
    (
        "len",
        "range",
        "sorted",
        "sum",
        "min",
        "max",
        "append",
        "set",
        "enumerate",
        "zip",
        "count",
        "pop",
        "join",
        "split",
        "abs",
    )
)


def likeness(one: Counter[tuple[str, ...]], other: Counter[tuple[str, ...]]) -> float:
    """What two programs share of all that they have: 0 to 1."""
    return (one & other).total() / max((one | other).total(), 1)


@lru_cache(maxsize=1)
def _known() -> tuple[tuple[Task, Counter[tuple[str, ...]]], ...]:
    return tuple(
        (task, words(program))
        for task in bank().values()
        if "expert" in task.programs
        for name, program in task.programs.items()
        if name != "expert"
    )


def candidates(source: str, function: str) -> list[tuple[str, str]]:
    """Programs in which a function hands its work to an expert's, nearest first, each with a reason."""
    tree = ast.parse(source)
    node = next((one for one in tree.body if isinstance(one, ast.FunctionDef) and one.name == function), None)
    if node is None or any(isinstance(one, (ast.Yield, ast.YieldFrom)) for one in ast.walk(node)):
        return []
    mine = words(ast.get_source_segment(source, node) or "")
    best: dict[str, tuple[float, Task]] = {}
    for task, theirs in _known():
        found = likeness(mine, theirs)
        if found >= LEAST and found > best.get(task.id, (0.0, task))[0]:
            best[task.id] = (found, task)
    programs = []
    for found, task in sorted(best.values(), key=lambda one: -one[0])[:CANDIDATES]:
        new = _with_expert(source, node, task)
        if new is not None:
            programs.append((new, f"{function} resembles {task.id} ({found:.0%}): the expert's program for that task"))
    return programs


def _with_expert(source: str, node: ast.FunctionDef, task: Task) -> str | None:
    """The program with an expert's in it, under names that nobody else uses; None where arguments do not match."""
    arguments = node.args
    if arguments.vararg or arguments.kwarg or arguments.kwonlyargs:
        return None
    names = [one.arg for one in (*arguments.posonlyargs, *arguments.args)]
    expert = ast.parse(task.programs["expert"])
    theirs = next(
        (one for one in expert.body if isinstance(one, ast.FunctionDef) and one.name == task.entry_point), None
    )
    if theirs is None or len(theirs.args.args) != len(names):
        return None
    own = {one.name for one in expert.body if isinstance(one, (ast.FunctionDef, ast.ClassDef))}
    for part in expert.body:
        if isinstance(part, ast.Assign):
            own |= {one.id for one in ast.walk(part) if isinstance(one, ast.Name) and isinstance(one.ctx, ast.Store)}
    renamed = {name: f"_{node.name}_{name}".replace("__", "_") for name in own}
    imported = [one for one in expert.body if isinstance(one, (ast.Import, ast.ImportFrom))]
    known, wanted = _imports(ast.parse(source)), _imports(expert)
    new = {*renamed.values(), *(name for name, what in wanted.items() if known.get(name) != what)}
    if Source(source).identifiers & new:
        return None  # they mean something else there
    rest = [one for one in expert.body if one not in imported]
    body = [ast.unparse(_Renamed(renamed).visit(one)) for one in rest]
    start = node.body[1:] and isinstance(node.body[0], ast.Expr) and isinstance(node.body[0].value, ast.Constant)
    lines = lines_of(source)
    first = min([node.lineno, *(one.lineno for one in node.decorator_list)]) - 1
    head = "".join(lines[first : node.body[0].lineno - 1])
    if node.body[0].lineno == node.lineno:
        return None
    docstring = "".join(lines[node.body[0].lineno - 1 : node.body[0].end_lineno]) if start else ""
    indent = " " * node.body[0].col_offset
    call = f"{indent}return {renamed[task.entry_point]}({', '.join(names)})\n"
    before = "\n".join(ast.unparse(one) for one in imported)
    text = "\n\n\n".join(part for part in (before, *body) if part)
    program = "".join(lines[:first]) + text + "\n\n\n" + head + docstring + call + "".join(lines[node.end_lineno :])
    try:
        ast.parse(program)
    except SyntaxError:
        return None
    return program


def _imports(tree: ast.Module) -> dict[str, tuple[str | None, str]]:
    """What the imports at the top of a program bind: module and name."""
    return {
        alias.asname or alias.name: (getattr(one, "module", None), alias.name)
        for one in tree.body
        if isinstance(one, (ast.Import, ast.ImportFrom))
        for alias in one.names
    }


class _Renamed(ast.NodeTransformer):
    def __init__(self, names: Mapping[str, str]) -> None:
        self.names = names

    def visit_Name(self, node: ast.Name) -> ast.Name:
        node.id = self.names.get(node.id, node.id)
        return node

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.FunctionDef:
        node.name = self.names.get(node.name, node.name)
        self.generic_visit(node)
        return node
