"""Rules that put one expression in the place of another."""

from __future__ import annotations

import ast
from collections.abc import Iterator

from assay.methods.core.programs.rewriting.kinds import SEQUENCES, SIZED
from assay.methods.core.programs.rewriting.text import Change
from assay.methods.core.programs.rewriting.view import View, names_of

TAKE_ANY = ("sum", "min", "max", "any", "all", "set", "tuple", "list", "sorted", "frozenset")
"""Functions that run once through whatever iterable they are given."""


def keys_membership(view: View) -> Iterator[Change]:
    """`k in d.keys()` looks into the dictionary itself. Not where a class of the program has a `keys` of its own."""
    for _, left, right in _memberships(view):
        if view.source.called(right) == ".keys" and not right.args and "keys" not in view.source.methods:  # type: ignore[attr-defined]
            assert isinstance(right, ast.Call)
            assert isinstance(right.func, ast.Attribute)
            text = view.source.within(right.func.value)
            why = f"`in {text}` asks the dictionary itself"
            yield Change((view.source.replaced(right, text),), why)
        elif view.source.called(right) in ("list", "tuple", "sorted") and _one_argument(right):
            assert isinstance(right, ast.Call)
            kind = view.kind(right.args[0])
            plain = kind.name in ("range", "list", "tuple") or (
                kind.name in ("set", "frozenset", "dict") and view.kind(left).hashable
            )
            if plain and (view.source.called(right) != "sorted" or kind.held.exact):
                why = "membership needs no copy of what is looked through"
                yield Change((view.source.replaced(right, view.source.within(right.args[0])),), why)


def constant_membership(view: View) -> Iterator[Change]:
    """Membership in a list of four or more constants asks a set. The value that is looked for must be hashable: a list would raise."""
    for _, left, right in _memberships(view):
        if isinstance(right, (ast.List, ast.Tuple)) and len(right.elts) >= 4 and view.kind(left).hashable:
            values = [one.value for one in right.elts if isinstance(one, ast.Constant)]
            if len(values) == len(right.elts) and all(isinstance(one, (str, int, bytes, type(None))) for one in values):
                text = "{" + ", ".join(view.source.text(one) for one in right.elts) + "}"
                yield Change(
                    (view.source.replaced(right, text),), "a set of constants answers at once, a list is looked through"
                )


def first_of_sorted(view: View) -> Iterator[Change]:
    """`sorted(x)[0]` is `min(x)`, `[-1]` is `max(x)`: of whole numbers or strings, which are ordered and alike where equal, and where
    x is known to hold something (an empty one raises something else)."""
    for node in view.calls("sorted"):
        around = view.source.parent[node]
        at = around.slice if isinstance(around, ast.Subscript) and around.value is node else None
        if len(node.args) != 1 or node.keywords or at is None or isinstance(around.ctx, ast.Store):  # type: ignore[attr-defined]
            continue
        given = node.args[0]
        index = ast.unparse(at)
        scope = view.local(node, names_of(given)) if isinstance(given, ast.Name) else None
        if (
            index in ("0", "-1")
            and scope is not None
            and view.kind(given).held.exact
            and view.kind(given).name != "iterator"
        ):
            assert isinstance(given, ast.Name)
            if view.not_empty(given.id, node, scope):
                name = "min" if index == "0" else "max"
                if name not in view.source.bound:
                    text = f"{name}({view.source.text(given)})"
                    yield Change(
                        (view.source.replaced(around, text),), f"{name} looks at each value once instead of sorting all"
                    )


def double_copy(view: View) -> Iterator[Change]:
    """A list or an order made only to be run through once is not made: `min(sorted(x))`, `list(sorted(x))`, `set(list(x))`, `len(list(x))`.

    What is copied must be a container (an iterator's own exceptions would come at another time), orders are dropped for whole numbers
    and strings only, where equal values cannot be told from each other.
    """
    for node in view.calls(*TAKE_ANY, "len"):
        outer = view.source.called(node)
        if not node.args or (len(node.args) != 1 and outer != "sum") or isinstance(node.args[0], ast.Starred):
            continue
        inner = node.args[0]
        name = view.source.called(inner)
        if (
            isinstance(inner, ast.Call)
            and name in ("list", "tuple", "sorted")
            and _one_argument(inner, keywords=name == "sorted")
        ):
            kind, given = view.kind(inner.args[0]), view.source.text(inner.args[0])
            if isinstance(inner.args[0], ast.GeneratorExp):
                continue
            known = kind.name in SIZED or kind.text
            if name == "sorted":
                if outer == "list" and not node.keywords:
                    yield Change((view.source.replaced(node, view.source.text(inner)),), "sorted makes a list already")
                    continue
                plain = not inner.keywords or all(one.arg == "reverse" for one in inner.keywords)
                orders = outer in ("list", "tuple") or bool(node.keywords)  # the order decides between equal keys
                known = known and kind.held.exact and plain and not orders
            if outer in ("set", "frozenset"):  # the order in which a set gets its values decides the order that it has
                known = name != "sorted" and (kind.text or kind.name in ("list", "tuple", "range", "deque"))
            if outer == "list" and name == "list":
                known = True  # the outer one is dropped, nothing else changes
            if known:
                text = view.source.text(node.func) + "(" + given
                rest = [view.source.text(one) for one in node.args[1:]]
                rest += [f"{one.arg}={view.source.text(one.value)}" for one in node.keywords if one.arg]
                if len(rest) == len(node.args) - 1 + len(node.keywords):
                    whole = ", ".join([text, *rest]) + ")"
                    yield Change((view.source.replaced(node, whole),), f"{outer} needs no {name} of what it is given")


def list_argument(view: View) -> Iterator[Change]:
    """`any([...])` and `all([...])` stop at the first answer where they are given a generator. What is left out must raise and change
    nothing."""
    for node in view.calls("any", "all"):
        inner = node.args[0] if _one_argument(node) else None
        if not isinstance(inner, ast.ListComp) or any(part.is_async for part in inner.generators):
            continue
        parts = [inner.elt, *(one for part in inner.generators for one in part.ifs)]
        iterables = [part.iter for part in inner.generators]
        parts += iterables[1:]
        first, *others = map(view.kind, iterables)
        again = first.name in SIZED or first.text or view.plain_iterator(iterables[0])
        fine = again and all(kind.name in SIZED or kind.text for kind in others) and view.effects.quiet(iterables[0])
        if fine and all(map(view.effects.total, parts)):
            text = view.source.text(inner)[1:-1].strip()
            yield Change((view.source.replaced(inner, text),), f"{view.source.called(node)} stops at the first answer")


def generator_argument(view: View) -> Iterator[Change]:
    """`"".join(x for ...)`, `list(x for ...)`, `set(...)` and `tuple(...)` make their own list of it: a comprehension does that faster.

    Also `list(map(lambda x: ..., xs))` and `list(filter(lambda x: ..., xs))`. Not where StopIteration may come out of it: a generator
    makes RuntimeError of that, and `map` ends.
    """
    ends = any(len(node.args) == 1 for node in view.calls("next"))
    if ends or view.source.identifiers & {"StopIteration", "__next__"}:
        return
    for node in view.source.walk(view.source.tree):
        if not isinstance(node, ast.Call) or not _one_argument(node):
            continue
        called, inner = view.source.called(node), node.args[0]
        if isinstance(inner, ast.GeneratorExp):
            if any(part.is_async for part in inner.generators) or any(
                isinstance(one, ast.NamedExpr) for one in view.source.walk(inner)
            ):
                continue
            text = view.source.text(inner)[1:-1]  # in its own brackets, or in those of the call
            if called in ("list", "set"):
                brackets = "[]" if called == "list" else "{}"
                yield Change(
                    (view.source.replaced(node, brackets[0] + text.strip() + brackets[1]),),
                    "a comprehension needs no generator beside it",
                )
            elif called == "tuple" or (called == ".join" and view.kind(node.func.value).text):  # type: ignore[attr-defined]
                start = view.source.text(node.func)
                yield Change(
                    (view.source.replaced(node, f"{start}([{text.strip()}])"),),
                    "it makes a list of the generator anyway, and a comprehension is one already",
                )
        elif called == "list" and isinstance(inner, ast.Call) and view.source.called(inner) in ("map", "filter"):
            function = inner.args[0] if len(inner.args) == 2 and not inner.keywords else None
            if not isinstance(function, ast.Lambda) or len(inner.args) != 2 or isinstance(inner.args[1], ast.Starred):
                continue
            arguments = function.args
            single = len(arguments.args) == 1 and not (
                arguments.defaults or arguments.vararg or arguments.kwonlyargs or arguments.kwarg
            )
            if (
                not single
                or arguments.posonlyargs
                or any(
                    isinstance(one, (ast.Yield, ast.NamedExpr, ast.Lambda, ast.GeneratorExp))
                    for one in view.source.walk(function.body)
                )
            ):
                continue
            name, body, over = (
                arguments.args[0].arg,
                view.source.operand(function.body),
                view.source.operand(inner.args[1]),
            )
            if isinstance(view.source.scope(node), ast.ClassDef):
                continue
            text = (
                f"[{body} for {name} in {over}]"
                if view.source.called(inner) == "map"
                else f"[{name} for {name} in {over} if {body}]"
            )
            yield Change((view.source.replaced(node, text),), "a comprehension calls no function for each value")


def count_of_equals(view: View) -> Iterator[Change]:
    """`sum(1 for x in xs if x == k)` and `len([x for x in xs if x == k])` are `xs.count(k)`: of whole numbers and strings."""
    for node in view.calls("sum", "len"):
        inner = node.args[0] if _one_argument(node) else None
        if not isinstance(inner, (ast.ListComp, ast.GeneratorExp)) or len(inner.generators) != 1:
            continue
        if view.source.called(node) == "len" and isinstance(inner, ast.GeneratorExp):
            continue
        part = inner.generators[0]
        name = part.target.id if isinstance(part.target, ast.Name) else ""
        tests = list(part.ifs)
        if view.source.called(node) == "sum" and not tests and isinstance(inner.elt, ast.Compare):
            tests = [inner.elt]
        elif (
            view.source.called(node) == "sum"
            and not (isinstance(inner.elt, ast.Constant) and type(inner.elt.value) is int and inner.elt.value == 1)
            or view.source.called(node) == "len"
            and not isinstance(inner.elt, (ast.Name, ast.Constant))
        ):
            continue
        if (
            len(tests) != 1
            or part.is_async
            or not isinstance(test := tests[0], ast.Compare)
            or not isinstance(test.ops[0], ast.Eq)
        ):
            continue
        if len(test.ops) != 1:
            continue
        left, right = test.left, test.comparators[0]
        wanted = (
            right if isinstance(left, ast.Name) and left.id == name else left if ast.unparse(right) == name else None
        )
        kind = view.kind(part.iter)
        if wanted is None or not name or name in names_of(wanted) or not isinstance(wanted, (ast.Name, ast.Constant)):
            continue
        letters = kind.text and view.kind(wanted).name == "letter"
        if letters or (kind.name in ("list", "tuple") and kind.held.exact and view.kind(wanted).exact):
            text = f"{view.source.within(part.iter)}.count({view.source.text(wanted)})"
            yield Change((view.source.replaced(node, text),), "count does it without making anything")


def copied_iterable(view: View) -> Iterator[Change]:
    """`for x in list(xs)`, `xs[:]` and `xs[::-1]` run through xs itself, where the loop changes nothing of it."""
    for node in view.source.walk(view.source.tree):
        if not isinstance(node, ast.For):
            continue
        given = node.iter
        if view.source.called(given) in ("list", "tuple") and _one_argument(given):
            inner: ast.expr = given.args[0]  # type: ignore[attr-defined]
            backwards = False
        elif (
            isinstance(given, ast.Subscript)
            and isinstance(given.slice, ast.Slice)
            and given.slice.lower is given.slice.upper is None
        ):
            step = ast.unparse(given.slice.step) if given.slice.step else "1"
            inner, backwards = given.value, step == "-1"
            if step not in ("1", "-1"):
                continue
        else:
            continue
        kind = view.kind(inner)
        wanted = SEQUENCES if isinstance(given, ast.Subscript) else (*SIZED, "str", "letter")
        if (
            not isinstance(inner, ast.Name)
            or kind.name not in wanted
            or (kind.name == "sized")
            or "reversed" in view.source.bound
        ):
            continue
        scope = view.local(node, {inner.id})
        if scope is not None and view.effects.unchanged(inner.id, node, scope):
            text = f"reversed({inner.id})" if backwards else inner.id
            yield Change((view.source.replaced(given, text),), "the loop changes nothing of it, and needs no copy")


def _memberships(view: View) -> Iterator[tuple[ast.Compare, ast.expr, ast.expr]]:
    for node in view.source.walk(view.source.tree):
        if isinstance(node, ast.Compare) and len(node.ops) == 1 and isinstance(node.ops[0], (ast.In, ast.NotIn)):
            yield node, node.left, node.comparators[0]


def _one_argument(node: ast.AST, *, keywords: bool = False) -> bool:
    return (
        isinstance(node, ast.Call)
        and len(node.args) == 1
        and (keywords or not node.keywords)
        and not isinstance(node.args[0], ast.Starred)
    )
