"""Rules for loops: what stays the same is taken out of them, and they end or index no more than they must."""

from __future__ import annotations

import ast
import importlib
from collections.abc import Iterator

from assay.methods.core.programs.rewriting.kinds import SEQUENCES, SIZED
from assay.methods.core.programs.rewriting.source import COMPREHENSIONS, Loop
from assay.methods.core.programs.rewriting.text import Change
from assay.methods.core.programs.rewriting.view import View, names_of, needs_value, repeated, without

HOISTED = ("len", "max", "min", "sum", "set", "tuple", "frozenset", "abs")


def sort_in_loop(view: View) -> Iterator[Change]:
    """`sorted(xs)` in a loop that changes nothing of xs is sorted once before it, where the loop only reads the result.

    What is sorted must be whole numbers or strings, or other numbers: those can always be compared.
    """
    yield from _taken_out(view, ("sorted",))


def invariant_call(view: View) -> Iterator[Change]:
    """A pure built-in function that a loop calls again and again with what stays the same is called once before it.

    It must not be able to raise; `max` and `min` of what may be empty are taken out of loops that run through it only.
    """
    yield from _taken_out(view, HOISTED)


def _taken_out(view: View, functions: tuple[str, ...]) -> Iterator[Change]:
    seen: set[tuple[int, str]] = set()
    for node in view.calls(*functions):
        called = view.source.called(node)
        if len(node.args) != 1 or isinstance(node.args[0], ast.Starred):
            continue
        given = node.args[0]
        keywords = all(one.arg == "reverse" and isinstance(one.value, ast.Constant) for one in node.keywords)
        if not isinstance(given, ast.Name) or (node.keywords and not (called == "sorted" and keywords)):
            continue
        scope = view.local(node, {given.id})
        loop = view.steady_loop(node, {given.id}, scope) if scope is not None else None
        if scope is None or loop is None or not _cannot_raise(view, called, given, loop):
            continue
        guard = called in ("max", "min")
        if called in ("sorted", "set") and not _only_read(view, node):
            continue
        text = view.source.text(node)
        if (id(loop), text) in seen:
            continue
        seen.add((id(loop), text))
        name = view.source.fresh(f"{given.id}_{called}")
        first = f"{name} = {text} if {given.id} else None" if guard else f"{name} = {text}"
        places = [
            one
            for one in view.source.walk(loop)
            if isinstance(one, ast.Call)
            and view.source.text(one) == text
            and view.local(one, {given.id}) is scope
            and (called not in ("sorted", "set") or _only_read(view, one))
            and (loop in view.source.loops(one, scope))
        ]
        changes = [view.source.before(loop, [first]), *(view.source.replaced(one, name) for one in places)]
        yield Change(tuple(changes), f"{text} is the same each time round the loop")


def _cannot_raise(view: View, called: str, given: ast.Name, loop: Loop) -> bool:
    kind = view.kind(given)
    sized = kind.name in SIZED or kind.text
    if called == "len":
        return sized
    if called in ("sorted", "max", "min"):
        ordered = kind.held.name in ("int", "str", "letter", "float", "number", "bool")
        through = (
            isinstance(loop, ast.For) and given.id in names_of(loop.iter) and _runs_through(view, loop.iter, given.id)
        )
        return sized and ordered and (called == "sorted" or (through and kind.name != "sized"))
    if called == "sum":
        return sized and kind.held.name in ("int", "bool", "float")
    if called in ("set", "frozenset"):
        return sized and kind.held.hashable
    if called == "tuple":
        return sized
    return kind.name in ("int", "float", "number")


def _runs_through(view: View, given: ast.expr, name: str) -> bool:
    if isinstance(given, ast.Name):
        return given.id == name
    if isinstance(given, ast.Call) and view.source.called(given) in (
        "enumerate",
        "range",
        "len",
        "list",
        "sorted",
        "set",
    ):
        return len(given.args) == 1 and _runs_through(view, given.args[0], name)
    return False


def _only_read(view: View, node: ast.Call) -> bool:
    """Whether what a call made is only looked at where it stands."""
    parent = view.source.parent[node]
    if isinstance(parent, ast.Subscript):
        return parent.value is node and isinstance(parent.ctx, ast.Load)
    if isinstance(parent, ast.Compare):
        return not any(isinstance(one, (ast.Is, ast.IsNot)) for one in parent.ops)
    if isinstance(parent, ast.For):
        return parent.iter is node
    if isinstance(parent, ast.comprehension):
        return parent.iter is node and not isinstance(view.source.parent[parent], ast.GeneratorExp)
    return isinstance(parent, ast.Call) and view.source.called(parent) in (
        "len",
        "sum",
        "min",
        "max",
        "list",
        "tuple",
        "set",
        "str",
        ".join",
    )


def range_len(view: View) -> Iterator[Change]:
    """`for i in range(len(xs))` runs through the values where i is only used as `xs[i]`, and through both where it is used besides.

    xs must be a list, tuple or string that the loop does not change.
    """
    for loop in view.source.walk(view.source.tree):
        if (
            not isinstance(loop, ast.For)
            or not isinstance(loop.target, ast.Name)
            or view.source.called(loop.iter) != "range"
        ):
            continue
        assert isinstance(loop.iter, ast.Call)
        length = loop.iter.args[0] if len(loop.iter.args) == 1 and not loop.iter.keywords else None
        if view.source.called(length) != "len" or not isinstance(over := length.args[0], ast.Name):  # type: ignore[union-attr]
            continue
        at = loop.target.id
        scope = view.local(loop, {over.id, at})
        if scope is None or isinstance(scope, ast.Module) or view.kind(over).name not in SEQUENCES or over.id == at:
            continue
        if not view.effects.unchanged(over.id, loop, scope) or view.source.captured(scope, at):
            continue
        within = [
            one for part in loop.body for one in view.source.walk(part) if isinstance(one, ast.Name) and one.id == at
        ]
        items = [one for one in within if _item(view, one, over.id)]
        if not items or any(not isinstance(one.ctx, ast.Load) for one in within) or loop.orelse:
            continue
        if any(isinstance(part, COMPREHENSIONS) and at in _targets(part) for part in view.source.walk(loop)):
            continue
        if any(map(view.late, items)):
            continue
        inside = set(within)
        elsewhere = [one for one in view.source.uses(scope, at) if one not in inside and one is not loop.target]
        leaks = any(needs_value(view, one) and not _bound_anew(view, one, at, loop) for one in elsewhere)
        name = view.source.fresh(f"{over.id}_item")
        only = len(items) == len(within) and not leaks
        head = (view.source.start(loop.target), view.source.end(loop.iter))
        text = f"{name} in {over.id}" if only else f"{at}, {name} in enumerate({over.id})"
        if not only and ("enumerate" in view.source.bound):
            continue
        places = [view.source.replaced(view.source.parent[one], name) for one in items]
        yield Change(
            ((*head, text), *places), f"the loop runs through {over.id} itself instead of looking up each place"
        )


def _item(view: View, use: ast.Name, over: str) -> bool:
    parent = view.source.parent[use]
    if not isinstance(parent, ast.Subscript) or parent.slice is not use or not isinstance(parent.ctx, ast.Load):
        return False
    return isinstance(parent.value, ast.Name) and parent.value.id == over


def _targets(node: ast.AST) -> set[str]:
    return {name for part in getattr(node, "generators", []) for name in names_of(part.target)}


def _bound_anew(view: View, use: ast.Name, name: str, loop: ast.For) -> bool:
    """Whether a mention outside of a loop lies in another loop or comprehension that binds the name."""
    if name in view.source.comprehension_names(use):
        return True
    child: ast.AST = use
    for one in view.source.ancestors(use):
        if isinstance(one, ast.For) and name in names_of(one.target) and child in one.body and one is not loop:
            return True
        child = one
    return False


def early_exit(view: View) -> Iterator[Change]:
    """A loop that only sets a flag ends when the flag is set.

    What it would still have looked at must not raise or change anything, and its variable must not be used behind it.
    """
    for function in view.functions():
        for loop in view.source.walk(function):
            if (
                not isinstance(loop, ast.For)
                or loop.orelse
                or len(loop.body) != 1
                or view.source.scope(loop) is not function
            ):
                continue
            test = loop.body[0]
            if (
                not isinstance(test, ast.If)
                or test.orelse
                or len(test.body) != 1
                or not isinstance(loop.target, (ast.Name, ast.Tuple))
            ):
                continue
            flag = test.body[0]
            if not isinstance(flag, ast.Assign) or len(flag.targets) != 1 or not isinstance(flag.targets[0], ast.Name):
                continue
            name = flag.targets[0].id
            kind = view.kind(loop.iter)
            again = kind.name in SIZED or kind.text or view.plain_iterator(loop.iter)
            if not isinstance(flag.value, ast.Constant) or not again or view.source.indent(flag) is None:
                continue
            if not view.effects.total(test.test) or not view.effects.quiet(test.test) or name in names_of(test.test):
                continue
            bound = names_of(loop.target)
            within = set(view.source.walk(loop))
            if any(
                use not in within and not _bound_anew(view, use, use.id, loop)
                for one in bound
                for use in view.source.uses(function, one)
            ):
                continue
            if any(view.source.captured(function, one) for one in (*bound, name)) or name in bound:
                continue
            yield Change((view.source.after(flag, ["break"]),), f"once {name} is set, nothing more can change")


FOLDS = {"sum": ("initial=0", ""), "max": ("max", " - 1"), "min": ("min", " - 1")}


def prefix_fold(view: View) -> Iterator[Change]:
    """`sum(xs[:i])`, where i runs over the places of xs, is looked up among sums made once; `max(xs[:i + 1])` and `min` likewise.

    For whole numbers, whose sums are exact (and strings, for max and min).
    """
    for node in view.calls(*FOLDS):
        called = view.source.called(node)
        given = node.args[0] if len(node.args) == 1 and not node.keywords else None
        if (
            not isinstance(given, ast.Subscript)
            or not isinstance(given.value, ast.Name)
            or not isinstance(given.slice, ast.Slice)
        ):
            continue
        over, cut = given.value, given.slice
        if cut.lower is not None or cut.step is not None or cut.upper is None:
            continue
        upper = cut.upper
        more = isinstance(upper, ast.BinOp) and isinstance(upper.op, ast.Add) and ast.unparse(upper.right) == "1"
        index = upper.left if isinstance(upper, ast.BinOp) and more else upper
        if not isinstance(index, ast.Name) or (called != "sum" and not more):
            continue
        kind, scope = view.kind(over), view.local(over, {over.id})
        if kind.name not in ("list", "tuple") or not (kind.held.name == "int" or (called != "sum" and kind.held.exact)):
            continue
        found = repeated(view, node, {over.id}, scope) if scope is not None else None
        line = view.source.can_import("itertools", "accumulate")
        if scope is None or found is None or line is None or not _places(view, index, over.id, scope):
            continue
        if called in ("max", "min") and called in view.source.bound:
            continue
        how, at = FOLDS[called][0], view.source.text(upper if called == "sum" else index)
        name = view.source.fresh(f"{over.id}_{called}s")
        changes = (
            view.source.before(found[0], [f"{name} = list(accumulate({over.id}, {how}))"]),
            view.source.replaced(node, f"{name}[{at}]"),
        )
        yield Change(changes, f"the {called} of every beginning of {over.id} is made once", line)


def _places(view: View, index: ast.Name, over: str, scope: ast.AST) -> bool:
    """Whether an index is the variable of a loop over the places of a list, and nothing else."""
    for around in view.source.ancestors(index):
        if around is scope:
            return False
        bound: list[tuple[ast.expr, ast.expr]] = []
        if isinstance(around, COMPREHENSIONS):
            bound = [(part.target, part.iter) for part in around.generators if index.id in names_of(part.target)]
        elif isinstance(around, ast.For) and index.id in names_of(around.target):
            bound = [(around.target, around.iter)]
            stores = [one for one in without(around, around.target) if isinstance(one, ast.Name) and one.id == index.id]
            if any(not isinstance(one.ctx, ast.Load) for one in stores):
                return False
        if bound:
            target, run = bound[-1]
            ranged = isinstance(target, ast.Name) and ast.unparse(run) == f"range(len({over}))"
            first = (
                isinstance(target, ast.Tuple) and isinstance(target.elts[0], ast.Name) and target.elts[0].id == index.id
            )
            numbered = first and len(target.elts) == 2 and ast.unparse(run) == f"enumerate({over})"  # type: ignore[attr-defined]
            once = [name for name in view.source.walk(target) if isinstance(name, ast.Name) and name.id == index.id]
            known = all(view.source.builtin(one.func) for one in view.source.walk(run) if isinstance(one, ast.Call))
            return len(bound) == len(once) == 1 and (ranged or numbered) and known
    return False


def global_in_loop(view: View) -> Iterator[Change]:
    """`math.sqrt` in a loop of a function is looked up once before the loop. For functions of the module math that are there."""
    for function in view.functions():
        seen: set[tuple[int, str]] = set()
        for node in view.source.walk(function):
            if (
                not isinstance(node, ast.Attribute)
                or not isinstance(node.value, ast.Name)
                or not isinstance(node.ctx, ast.Load)
            ):
                continue
            module = view.source.imports.get(node.value.id, ("", ""))
            loops = view.source.loops(node, function)
            if module != ("math", "") or not loops or view.source.scope(node) is not function:
                continue
            text = view.source.text(node)
            loop = loops[-1]
            if (
                (id(loop), text) in seen
                or view.source.indent(loop) is None
                or node.value.id in view.source.bindings(function)
            ):
                continue
            if not hasattr(importlib.import_module("math"), node.attr):
                continue
            seen.add((id(loop), text))
            name = view.source.fresh(node.attr)
            places = [
                one
                for one in view.source.walk(loop)
                if isinstance(one, ast.Attribute)
                and isinstance(one.ctx, ast.Load)
                and view.source.text(one) == text
                and view.source.scope(one) is function
            ]
            changes = [
                view.source.before(loop, [f"{name} = {text}"]),
                *(view.source.replaced(one, name) for one in places),
            ]
            yield Change(tuple(changes), f"{text} is looked up once instead of each time round the loop")
