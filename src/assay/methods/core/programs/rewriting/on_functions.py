"""Rules for whole functions."""

from __future__ import annotations

import ast
from collections.abc import Iterator

from assay.methods.core.programs.rewriting.kinds import ATOMS
from assay.methods.core.programs.rewriting.text import Change
from assay.methods.core.programs.rewriting.view import View

KEEPS_NAMES = ("print", "input", "next", "open")


def recursion_without_memo(view: View) -> Iterator[Change]:
    """A pure function that calls itself more than once is given `functools.lru_cache(maxsize=None, typed=True)`.

    Its arguments must be hashable and its values immutable, or two callers would share one list; it may read what never changes only.
    Not for methods, generators, and functions that are decorated already.
    """
    for function in view.functions():
        around = view.source.scope(function)
        if function.decorator_list or isinstance(around, ast.ClassDef):
            continue
        arguments = function.args
        if arguments.vararg or arguments.kwarg or not (arguments.args or arguments.posonlyargs):
            continue
        calls = [
            node
            for node in view.source.inside(function)
            if isinstance(node, ast.Call)
            and isinstance(node.func, ast.Name)
            and view.source.definition(node.func) is function
        ]
        if len(calls) < 2 or any(isinstance(node, (ast.Yield, ast.YieldFrom)) for node in view.source.inside(function)):
            continue
        if not view.effects.changes_nothing(function) or not all(map(view.effects.quiet, function.body)):
            continue
        parameters = [one.arg for one in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]
        kinds = [view.kinds.named(function, name) for name in parameters]
        if not all(kind is not None and kind.hashable for kind in kinds):
            continue
        if not _reads_what_stays(view, function) or not _gives_immutables(view, function):
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


def _reads_what_stays(view: View, function: ast.FunctionDef) -> bool:
    """Whether all names that a function reads are its own, functions, or values that never change."""
    own = view.source.bindings(function)
    for node in view.source.inside(function):
        if not isinstance(node, ast.Name) or not isinstance(node.ctx, ast.Load) or node.id in own:
            continue
        if node.id in view.source.comprehension_names(node) or view.source.builtin(node):
            continue
        if node.id in view.source.imports or view.source.definition(node) is not None:
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
