"""What a rule looks at: a program with its kinds and effects, and the questions that several rules ask."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from assay.methods.core.programs.rewriting.effects import Effects
from assay.methods.core.programs.rewriting.inference import Kinds
from assay.methods.core.programs.rewriting.kinds import SIZED, Kind, of_values
from assay.methods.core.programs.rewriting.source import COMPREHENSIONS, FUNCTIONS, Loop, Scope, Source
from assay.methods.core.programs.rewriting.text import Change


class View:
    """A program as the rules see it."""

    def __init__(self, program: str, observed: Mapping[str, Sequence[Sequence[Any]]] | None = None) -> None:
        self.source = Source(program)
        self.kinds = Kinds(self.source, _given(self.source, observed or {}))
        self.effects = Effects(self.source, self.kinds)

    def kind(self, node: ast.expr | None) -> Kind:
        """What an expression can be."""
        return self.kinds.of(node)

    def calls(self, *names: str) -> Iterator[ast.Call]:
        """Calls of these built-in functions, in the order of the text."""
        found = [
            node
            for node in self.source.walk(self.source.tree)
            if isinstance(node, ast.Call) and self.source.called(node) in names
        ]
        yield from sorted(found, key=lambda node: (node.lineno, node.col_offset))

    def plain_iterator(self, node: ast.expr) -> bool:
        """Whether a node makes an iterator that runs nothing, over containers."""
        return (
            isinstance(node, ast.Call)
            and self.source.called(node) in ("enumerate", "zip", "reversed")
            and all(self.kind(one).name in SIZED or self.kind(one).text for one in node.args)
        )

    def functions(self) -> Iterator[ast.FunctionDef]:
        """The functions of a program."""
        for node in self.source.walk(self.source.tree):
            if isinstance(node, ast.FunctionDef):
                yield node

    def steady_loop(self, node: ast.AST, names: set[str], scope: Scope) -> Loop | None:
        """The outermost loop around a node in which these names of the scope keep what they hold; None where the innermost changes it."""
        found: Loop | None = None
        if self.late(node):
            return None
        for loop in self.source.loops(node, scope):
            if not all(self.effects.unchanged(name, loop, scope) for name in names):
                break
            if self.source.indent(loop) is None or not all(
                self.source.bound_before(name, loop, scope) for name in names
            ):
                break
            found = loop
        return found

    def late(self, node: ast.AST) -> bool:
        """Whether a node may be evaluated later than its statement: by a generator that is not used up where it is made."""
        return any(
            isinstance(one, ast.GeneratorExp) and not self.effects.passing(one) for one in self.source.ancestors(node)
        )

    def local(self, node: ast.AST, names: set[str]) -> Scope | None:
        """The function (or module) whose variables all these names are where a node mentions them; None where they are not of one."""
        scope = self.source.scope(node)
        if isinstance(scope, (ast.ClassDef, ast.Lambda, ast.AsyncFunctionDef)):
            return None
        if names & self.source.comprehension_names(node):
            return None
        known = self.source.bindings(scope)
        return scope if all(name in known and name not in self.source.shared for name in names) else None

    def handled(self, node: ast.AST, scope: Scope) -> bool:
        """Whether the scope itself may go on after an exception of a node."""
        for one in self.source.ancestors(node):
            if one is scope:
                return False
            if isinstance(one, (ast.Try, ast.TryStar, ast.With)):
                return True
        return False

    def block(self, statement: ast.stmt) -> list[ast.stmt]:
        """The statements among which one stands."""
        parent = self.source.parent[statement]
        for field in ("body", "orelse", "finalbody"):
            block = getattr(parent, field, None)
            if isinstance(block, list) and statement in block:
                return block
        return [statement]

    def not_empty(self, name: str, node: ast.AST, scope: Scope) -> bool:
        """Whether a container of the scope certainly holds something where a node runs: the node stands behind a test, or within one."""
        if not self.effects.unchanged(name, scope, scope) or "len" in self.source.bound:
            return False
        if len(self.source.bindings(scope)[name]) != 1:
            return False
        child = node
        for one in self.source.ancestors(node):
            if isinstance(one, (ast.If, ast.While)) and child in one.body and _says_full(one.test, name):
                return True
            if isinstance(one, ast.IfExp) and child is one.body and _says_full(one.test, name):
                return True
            for field in ("body", "orelse"):
                block = getattr(one, field, None)
                if isinstance(block, list) and child in block:
                    for before in block[: block.index(child)]:
                        leaves = isinstance(before, ast.If) and isinstance(
                            before.body[-1], (ast.Return, ast.Raise, ast.Continue, ast.Break)
                        )
                        if leaves and _says_empty(before.test, name):
                            return True
            if one is scope or isinstance(one, FUNCTIONS):
                return False
            child = one
        return False


def _says_full(test: ast.expr, name: str) -> bool:
    if isinstance(test, ast.Name):
        return test.id == name
    if isinstance(test, ast.BoolOp) and isinstance(test.op, ast.And):
        return any(_says_full(one, name) for one in test.values)
    return isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not) and _says_empty(test.operand, name)


def _says_empty(test: ast.expr, name: str) -> bool:
    if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
        return isinstance(test.operand, ast.Name) and test.operand.id == name
    if isinstance(test, ast.BoolOp) and isinstance(test.op, ast.Or):
        return any(_says_empty(one, name) for one in test.values)
    if isinstance(test, ast.Compare) and len(test.ops) == 1 and isinstance(test.left, ast.Call):
        call, right = test.left, test.comparators[0]
        if ast.unparse(call) == f"len({name})" and isinstance(right, ast.Constant) and type(right.value) is int:
            op = test.ops[0]
            return (isinstance(op, ast.Eq) and right.value == 0) or (
                isinstance(op, (ast.Lt, ast.LtE)) and right.value >= (1 if isinstance(op, ast.Lt) else 0)
            )
    return False


def without(node: ast.AST, skipped: ast.AST) -> Iterator[ast.AST]:
    """The nodes below one, but for those of a part."""
    for child in ast.iter_child_nodes(node):
        if child is not skipped:
            yield child
            yield from without(child, skipped)


def needs_value(view: View, use: ast.Name) -> bool:
    """Whether a mention of a name raises where the name has no value: it is read, deleted, or has something put behind it."""
    parent = view.source.parent[use]
    return not isinstance(use.ctx, ast.Store) or (isinstance(parent, ast.AugAssign) and parent.target is use)


def names_of(node: ast.AST) -> set[str]:
    """All names below a node."""
    return {one.id for one in ast.walk(node) if isinstance(one, ast.Name)}


def appended(statement: ast.stmt, name: str, method: str = "append") -> ast.expr | None:
    """What `name.append(...)` appends, where a statement is that and no more."""
    if (
        isinstance(statement, ast.Expr)
        and isinstance(call := statement.value, ast.Call)
        and isinstance(call.func, ast.Attribute)
    ):
        owner = call.func.value
        plain = len(call.args) == 1 and not call.keywords and not isinstance(call.args[0], ast.Starred)
        if call.func.attr == method and isinstance(owner, ast.Name) and owner.id == name and plain:
            return call.args[0]
    return None


def comprehension(view: View, node: ast.AST) -> ast.AST | None:
    """The outermost comprehension that evaluates a node again and again, within one statement and one function."""
    found: ast.AST | None = None
    child = node
    if view.late(node):
        return None
    for one in view.source.ancestors(node):
        if isinstance(one, (ast.stmt, ast.Lambda)):
            return None if isinstance(one, ast.Lambda) else found
        if isinstance(one, COMPREHENSIONS):
            first = one.generators[0]
            if not (child is first and any(node is part for part in view.source.walk(first.iter))):
                found = one
        child = one
    return found


def repeated(view: View, node: ast.AST, names: set[str], scope: Scope) -> tuple[ast.stmt, ast.AST] | None:
    """Where something can be made once that a node needs again and again: the statement before which, and the part in which it holds.

    None where it is needed once only, or where what it is made of changes.
    """
    loop = view.steady_loop(node, names, scope)
    if loop is not None:
        return loop, loop
    around = comprehension(view, node)
    if around is None:
        return None
    statement = view.source.statement(around)
    head = {
        ast.For: "iter",
        ast.If: "test",
        ast.Assign: "value",
        ast.Return: "value",
        ast.Expr: "value",
        ast.AugAssign: "value",
    }
    field = head.get(type(statement))
    if field is None or view.source.indent(statement) is None or view.source.scope(statement) is not scope:
        return None
    part = getattr(statement, field)
    if not lies_in(view, around, part):
        return None
    fixed = all(
        view.source.bound_before(name, statement, scope) and view.effects.unchanged(name, part, scope) for name in names
    )
    return (statement, around) if fixed else None


def lies_in(view: View, node: ast.AST, around: ast.AST) -> bool:
    """Whether a node is another or below it."""
    return node is around or any(one is around for one in view.source.ancestors(node))


def _given(source: Source, observed: Mapping[str, Sequence[Sequence[Any]]]) -> dict[str, dict[str, Kind]]:
    found: dict[str, dict[str, Kind]] = {}
    for node in source.tree.body:
        if isinstance(node, ast.FunctionDef) and observed.get(node.name):
            names = [one.arg for one in (*node.args.posonlyargs, *node.args.args)]
            rows = observed[node.name]
            columns = [[row[n] for row in rows if n < len(row)] for n in range(len(names))]
            found[node.name] = {name: of_values(column) for name, column in zip(names, columns, strict=True) if column}
    return found


Rule = Callable[[View], Iterator[Change]]
