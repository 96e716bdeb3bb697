"""Rules for whole functions."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Sequence

from assay.methods.core.programs.rewriting.effects import PURE_MODULES
from assay.methods.core.programs.rewriting.kinds import ATOMS, Kind
from assay.methods.core.programs.rewriting.source import COMPREHENSIONS
from assay.methods.core.programs.rewriting.text import Change
from assay.methods.core.programs.rewriting.view import View

KEEPS_NAMES = ("print", "input", "next", "open")
STAYING = PURE_MODULES | {"functools", "collections", "heapq", "bisect"}
"""Modules whose names always mean the same."""


def recursion_without_memo(view: View) -> Iterator[Change]:
    """A pure function that calls itself more than once on one way through it is given `functools.lru_cache(maxsize=None, typed=True)`.

    Its arguments must be equal only where they are the same (0.0 equals -0.0; numbers that nothing says to be floats are taken to be
    whole) and its values immutable, or two callers would share one list; it may read what never changes only. Not for methods,
    generators, functions that are decorated already, and programs that raise the limit of recursion: kept answers need more of the stack.
    """
    if "setrecursionlimit" in view.source.identifiers:
        return
    for function in view.functions():
        around = view.source.scope(function)
        if function.decorator_list or isinstance(around, ast.ClassDef):
            continue
        arguments = function.args
        if arguments.vararg or arguments.kwarg or not (arguments.args or arguments.posonlyargs):
            continue
        inside = view.source.inside(function)
        own = [node for node in inside if isinstance(node, ast.Name) and node.id == function.name]
        if not own or any(isinstance(node, (ast.Yield, ast.YieldFrom)) for node in inside):
            continue
        if _calls(view, function.body, function) < 2:
            continue
        if not view.effects.changes_nothing(function) or not all(map(view.effects.quiet, function.body)):
            continue
        parameters = (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)
        if not all(_distinct(view.kinds.named(function, one.arg), one) for one in parameters):
            continue
        if not _reads_what_stays(view, function, set()) or not _gives_immutables(view, function):
            continue
        line = view.source.can_import("functools", "lru_cache")
        start = view.source.start(function)
        first = view.source.starts[function.lineno - 1]
        indent = view.source.data[first:start].decode()
        if line is None or indent.strip():
            continue
        text = f"{indent}@lru_cache(maxsize=None, typed=True){view.source.newline}"
        yield Change(
            ((first, first, text),), f"{function.name} is asked the same again and again: its answers are kept", line
        )


def _calls(view: View, part: Sequence[ast.AST], function: ast.FunctionDef) -> int:
    """How often a part of a function calls it at most on one way through it; in a loop at least twice."""
    found = 0
    for n, node in enumerate(part):
        if isinstance(node, (ast.If, ast.IfExp)):
            arms = [one if isinstance(one, list) else [one] for one in (node.body, node.orelse)]
            rest = _calls(view, part[n + 1 :], function)
            leaves = [bool(arm) and isinstance(arm[-1], (ast.Return, ast.Raise)) for arm in arms]
            ways = [_calls(view, arm, function) + (0 if left else rest) for arm, left in zip(arms, leaves, strict=True)]
            return found + _calls(view, [node.test], function) + max(ways)
        inside = _calls(view, list(ast.iter_child_nodes(node)), function)
        found += inside * (2 if isinstance(node, (ast.For, ast.While, *COMPREHENSIONS)) else 1)
        called = node.func if isinstance(node, ast.Call) else None
        found += isinstance(called, ast.Name) and view.source.definition(called) is function
    return found


def _distinct(kind: Kind | None, parameter: ast.arg) -> bool:
    """Whether two arguments are equal only where nobody could tell them from each other, their types aside."""
    if kind is None or kind.name == "number":
        return kind is not None and parameter.annotation is None
    if kind.name == "tuple":
        return kind.exact
    return kind.exact or kind.name in ("bool", "none", "bytes", "range")


def _reads_what_stays(view: View, function: ast.FunctionDef, seen: set[ast.FunctionDef]) -> bool:
    """Whether all names that a function reads, and those that it calls, are its own, functions, or values that never change."""
    seen.add(function)
    own = view.source.bindings(function)
    for node in view.source.inside(function):
        if not isinstance(node, ast.Name) or not isinstance(node.ctx, ast.Load) or node.id in own:
            continue
        if node.id in view.source.comprehension_names(node) or view.source.builtin(node):
            continue
        if node.id in view.source.imports:
            if view.source.imports[node.id][0] not in STAYING:
                return False
            continue
        if (definition := view.source.definition(node)) is not None:
            if definition not in seen and not _reads_what_stays(view, definition, seen):
                return False
            continue
        home = view.source.home(node)
        if home is None or isinstance(home, ast.ClassDef) or node.id in view.source.shared:
            return False
        bindings = view.source.bindings(home)[node.id]
        kind = view.kinds.named(home, node.id)
        if len(bindings) != 1 or kind is None or not kind.immutable or view.source.loops(bindings[0].node, home):
            return False
    return all(view.source.called(node) not in KEEPS_NAMES for node in view.source.inside(function))


def _gives_immutables(view: View, function: ast.FunctionDef) -> bool:
    """Whether a function returns numbers, strings and the like, if its own calls do."""
    values = [node.value for node in view.source.inside(function) if isinstance(node, ast.Return)]
    return bool(values) and all(value is None or _immutable(view, value, function) for value in values)


def _immutable(view: View, value: ast.expr, function: ast.FunctionDef) -> bool:
    if view.kind(value).name in ATOMS or view.kind(value).hashable:
        return True
    if isinstance(value, ast.Call):
        if isinstance(value.func, ast.Name) and view.source.definition(value.func) is function:
            return True
        if view.source.called(value) in ("max", "min"):
            return len(value.args) > 1 and all(_immutable(view, one, function) for one in value.args)
        return False
    if isinstance(value, ast.BinOp):
        return _immutable(view, value.left, function) and _immutable(view, value.right, function)
    if isinstance(value, ast.BoolOp):
        return all(_immutable(view, one, function) for one in value.values)
    if isinstance(value, ast.IfExp):
        return _immutable(view, value.body, function) and _immutable(view, value.orelse, function)
    if isinstance(value, ast.Compare):
        return all(_immutable(view, one, function) for one in (value.left, *value.comparators))
    if isinstance(value, ast.Name):
        bindings = view.source.bindings(function).get(value.id, [])
        return bool(bindings) and all(
            one.how in ("value", "augmented")
            and not one.path
            and one.value is not None
            and _not_through(one.value, value.id)
            and _immutable(view, one.value, function)
            for one in bindings
        )
    return False


def _not_through(value: ast.expr, name: str) -> bool:
    return not any(isinstance(one, ast.Name) and one.id == name for one in ast.walk(value))
