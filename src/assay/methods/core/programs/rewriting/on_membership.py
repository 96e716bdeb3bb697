"""Rules for looking things up again and again: sets, counters and dictionaries in the place of lists."""

from __future__ import annotations

import ast
from collections.abc import Iterator

from assay.methods.core.programs.rewriting.source import Scope
from assay.methods.core.programs.rewriting.text import Change
from assay.methods.core.programs.rewriting.view import View, appended, comprehension, lies_in, names_of, repeated


def list_membership(view: View) -> Iterator[Change]:
    """A list that is looked through in a loop, and stays as it is meanwhile, is made a set before the loop.

    What it holds and what is looked for must be hashable; a set finds what a list finds then, NaN included.
    """
    seen: set[tuple[int, str]] = set()
    for node in _memberships(view):
        right = node.comparators[0]
        if not isinstance(right, ast.Name):
            continue
        kind = view.kind(right)
        scope = view.local(right, {right.id})
        if scope is None or kind.name not in ("list", "tuple", "sized", "deque") or not kind.held.hashable:
            continue
        found = repeated(view, node, {right.id}, scope)
        if found is None or (id(found[1]), right.id) in seen:
            continue
        place, region = found
        seen.add((id(region), right.id))
        alike = [
            other
            for other in _memberships(view)
            if isinstance(other.comparators[0], ast.Name)
            and other.comparators[0].id == right.id
            and view.local(other, {right.id}) is scope
            and lies_in(view, other, region)
            and view.kind(other.left).hashable
        ]
        if not view.kind(node.left).hashable:
            continue
        name = view.source.fresh(f"{right.id}_set")
        made = view.source.before(place, [f"{name} = set({right.id})"])
        changes = [view.source.replaced(other.comparators[0], name) for other in alike]
        yield Change((made, *changes), f"{right.id} is looked through again and again: a set answers at once")


def growing_membership(view: View) -> Iterator[Change]:
    """A list that only grows, by `append`, and is asked what it holds: a set beside it answers.

    The list must begin empty (or as a display) in the scope, have no other name, and lose nothing.
    """
    scopes: list[Scope] = [*view.functions(), view.source.tree]
    for function in scopes:
        for name, bindings in view.source.bindings(function).items():
            if (
                len(bindings) != 1
                or not isinstance(start := bindings[0].node, ast.Assign)
                or name in view.source.shared
            ):
                continue
            if not isinstance(start.value, ast.List) or len(start.targets) != 1 or view.source.indent(start) is None:
                continue
            uses = view.source.uses(function, name)
            asked = [
                node
                for node in _memberships(view)
                if isinstance(node.comparators[0], ast.Name)
                and node.comparators[0] in uses
                and view.local(node, {name}) is function
            ]
            if not any(view.source.loops(node, function) or comprehension(view, node) for node in asked):
                continue
            if not view.effects.private(function, name) or not view.kinds.of(asked[0].comparators[0]).held.hashable:
                continue
            if not all(view.kind(node.left).hashable for node in asked):
                continue
            added = _only_grows(view, uses, name)
            if not added or any(view.source.indent(one) is None for one in added):
                continue
            values = [appended(one, name) for one in added]
            if not all(isinstance(value, (ast.Name, ast.Constant)) or _plain(view, value) for value in values):
                continue
            known = view.source.fresh(f"{name}_set")
            display = [view.source.text(one) for one in start.value.elts]
            first = f"{known} = set({name})" if display else f"{known} = set()"
            changes = [view.source.after(start, [first])]
            for statement, value in zip(added, values, strict=True):
                assert value is not None
                changes.append(view.source.after(statement, [f"{known}.add({view.source.text(value)})"]))
            changes += [view.source.replaced(node.comparators[0], known) for node in asked]
            yield Change(
                tuple(changes), f"{name} grows and is looked through again and again: a set beside it answers at once"
            )


def _only_grows(view: View, uses: list[ast.Name], name: str) -> list[ast.stmt]:
    """The statements that append to a list; none where something else changes it."""
    found: list[ast.stmt] = []
    for use in uses:
        parent = view.source.parent[use]
        if isinstance(parent, ast.Attribute):
            statement = view.source.statement(use)
            if appended(statement, name) is not None and statement.value.func is parent:  # type: ignore[attr-defined]
                found.append(statement)
            elif parent.attr not in ("count", "index", "copy", "sort", "reverse"):
                return []
        elif (
            isinstance(parent, ast.Subscript)
            and not isinstance(parent.ctx, ast.Load)
            or isinstance(parent, ast.Call)
            and view.source.called(parent).split(".")[0] in ("heapq", "bisect")
        ):
            return []
    return found


def _plain(view: View, value: ast.expr | None) -> bool:
    """Whether an expression may be evaluated twice, and gives the same then."""
    return value is not None and view.effects.total(value) and view.kind(value).immutable


def count_in_loop(view: View) -> Iterator[Change]:
    """`xs.count(x)` again and again, of a list or string that stays as it is: a Counter made once.

    Of strings only single letters are counted like that. What is counted must be hashable.
    """
    seen: set[tuple[int, str]] = set()
    for node in view.source.walk(view.source.tree):
        if view.source.called(node) != ".count" or len(node.args) != 1 or node.keywords:  # type: ignore[attr-defined]
            continue
        assert isinstance(node, ast.Call)
        assert isinstance(node.func, ast.Attribute)
        owner = node.func.value
        if not isinstance(owner, ast.Name):
            continue
        scope = view.local(owner, {owner.id})
        if scope is None or not _counts(view, owner, node.args[0]):
            continue
        found = repeated(view, node, {owner.id}, scope)
        line = view.source.can_import("collections", "Counter")
        if found is None or line is None or (id(found[1]), owner.id) in seen:
            continue
        place, region = found
        seen.add((id(region), owner.id))
        name = view.source.fresh(f"{owner.id}_counts")
        changes = [view.source.before(place, [f"{name} = Counter({owner.id})"])]
        for other in view.source.walk(region):
            if (
                isinstance(other, ast.Call)
                and view.source.called(other) == ".count"
                and len(other.args) == 1
                and isinstance(other.func.value, ast.Name)  # type: ignore[attr-defined]
                and other.func.value.id == owner.id  # type: ignore[attr-defined]
                and view.local(other.func, {owner.id}) is scope
                and _counts(view, owner, other.args[0])
                and not any(
                    isinstance(one, ast.Call) and view.source.called(one) == ".count"
                    for one in view.source.walk(other.args[0])
                )
            ):
                text = view.source.text(other.args[0])
                changes.append(view.source.replaced(other, f"{name}[{text}]"))
        yield Change(
            tuple(changes), f"{owner.id} is counted through again and again: one Counter knows all counts", line
        )


def _counts(view: View, owner: ast.Name, wanted: ast.expr) -> bool:
    kind = view.kind(owner)
    if kind.text:
        return view.kind(wanted).name == "letter"
    return (
        kind.name in ("list", "tuple")
        and kind.held.hashable
        and view.kind(wanted).hashable
        and not isinstance(wanted, ast.Tuple)
    )


def nested_join(view: View) -> Iterator[Change]:
    """Two loops, one in the other, that look for pairs with equal keys: the inner one becomes a dictionary of its items by key.

    The inner loop must be no more than `if key(a) == key(b): ...` with keys that are whole numbers or strings (NaN differs from itself,
    but is found in a dictionary), its items must stay as they are, and its variable must not be used behind it.
    """
    for function in view.functions():
        for inner in view.source.walk(function):
            if (
                not isinstance(inner, ast.For)
                or inner.orelse
                or not isinstance(inner.target, ast.Name)
                or len(inner.body) != 1
            ):
                continue
            test, over = inner.body[0], inner.iter
            if (
                not isinstance(test, ast.If)
                or test.orelse
                or not isinstance(over, ast.Name)
                or view.source.scope(inner) is not function
            ):
                continue
            compared, *others = (
                test.test.values
                if isinstance(test.test, ast.BoolOp) and isinstance(test.test.op, ast.And)
                else [test.test]
            )
            if (
                not isinstance(compared, ast.Compare)
                or len(compared.ops) != 1
                or not isinstance(compared.ops[0], ast.Eq)
            ):
                continue
            name = inner.target.id
            sides = [compared.left, compared.comparators[0]]
            mine = [side for side in sides if names_of(side) == {name}]
            theirs = [side for side in sides if name not in names_of(side)]
            kind = view.kind(over)
            if len(mine) != 1 or len(theirs) != 1 or kind.name not in ("list", "tuple") or over.id == name:
                continue
            if not all(view.kind(side).exact and _key(view, side) for side in sides):
                continue
            loop = view.steady_loop(inner, {over.id}, function)
            names = names_of(theirs[0])
            place = loop if loop is not None and view.local(over, {over.id}) is function else None
            if place is None or view.source.indent(inner) is None or not names:
                continue
            if any(
                view.source.statement(use) is not inner and not lies_in(view, use, inner)
                for use in view.source.uses(function, name)
            ):
                continue
            if view.source.captured(function, name) or _rebinds(test, names | {name}):
                continue
            table = view.source.fresh(f"{over.id}_by_key")
            mine_text = view.source.text(mine[0])
            lines = [
                f"{table} = {{}}",
                f"for {name} in {over.id}:",
                f"    {table}.setdefault({mine_text}, []).append({name})",
            ]
            changes = [
                view.source.before(place, lines),
                view.source.replaced(over, f"{table}.get({view.source.text(theirs[0])}, ())"),
            ]
            if others:
                changes.append(view.source.replaced(test.test, " and ".join(view.source.within(one) for one in others)))
            yield Change(
                tuple(changes), f"pairs with equal keys are found by a dictionary instead of all pairs of {over.id}"
            )


def _key(view: View, side: ast.expr) -> bool:
    """Whether a key certainly can be taken, and stays as it is."""
    if isinstance(side, ast.Subscript) and isinstance(side.value, ast.Name) and isinstance(side.slice, ast.Constant):
        kind, at = view.kind(side.value), side.slice.value
        return bool(kind.parts) and type(at) is int and 0 <= at < len(kind.parts)
    names = [one for one in ast.walk(side) if isinstance(one, ast.Name) and not view.source.builtin(one)]
    return view.effects.total(side) and all(view.kind(one).immutable for one in names)


def _rebinds(node: ast.AST, names: set[str]) -> bool:
    return any(
        isinstance(one, ast.Name) and one.id in names and not isinstance(one.ctx, ast.Load) for one in ast.walk(node)
    )


def _memberships(view: View) -> list[ast.Compare]:
    return [
        node
        for node in view.source.walk(view.source.tree)
        if isinstance(node, ast.Compare) and len(node.ops) == 1 and isinstance(node.ops[0], (ast.In, ast.NotIn))
    ]
