"""Rules for containers that are built or emptied piece by piece: strings, lists, queues."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator

from assay.methods.core.programs.rewriting.text import Change
from assay.methods.core.programs.rewriting.view import View, appended, names_of, needs_value


def string_concatenation(view: View) -> Iterator[Change]:
    """`s += part` in a loop becomes a list of parts that is joined behind it.

    All parts must be strings, and the loop must not look at the string otherwise; nothing outside may see it half made.
    """
    for function in view.functions():
        for loop in view.source.walk(function):
            if not isinstance(loop, (ast.For, ast.While)) or view.source.scope(loop) is not function:
                continue
            if view.source.loops(loop, function) or view.source.indent(loop) is None or view.handled(loop, function):
                continue
            for name in sorted({name for one in view.source.walk(loop) if (name := _grows(one))}):
                statements = [one for one in view.source.walk(loop) if _grows(one) == name]
                inside = [one for one in view.source.walk(loop) if isinstance(one, ast.Name) and one.id == name]
                mentions = sum(2 if isinstance(one, ast.Assign) else 1 for one in statements)
                values = [_parts_of(one) for one in statements]
                before = [one for one in view.source.bindings(function).get(name, []) if one.node not in statements]
                if (
                    len(inside) != mentions
                    or not all(view.kind(value).text for parts in values for value in parts)
                    or not before
                ):
                    continue
                if not all(one.how == "value" and view.kind(one.value).text and not one.path for one in before):
                    continue
                if view.source.captured(function, name) or not view.source.bound_before(name, loop, function):
                    continue
                if any(view.source.indent(one) is None for one in statements if isinstance(one, ast.stmt)):
                    continue
                if any(isinstance(one, (ast.Yield, ast.YieldFrom)) for one in view.source.walk(loop)):
                    continue
                kept = view.source.fresh(f"{name}_parts")
                changes = [
                    view.source.before(loop, [f"{kept} = [{name}]"]),
                    view.source.after(loop, [f'{name} = "".join({kept})']),
                ]
                for one, added in zip(statements, values, strict=True):
                    text = view.source.text(added[0]) if len(added) == 1 else " + ".join(map(_summand(view), added))
                    changes.append(view.source.replaced(one, f"{kept}.append({text})"))
                yield Change(tuple(changes), f"{name} is put together once, instead of being copied for each part")


def _grows(node: ast.AST) -> str:
    """The name of a string or list that a statement puts something behind."""
    if isinstance(node, ast.AugAssign) and isinstance(node.op, ast.Add) and isinstance(node.target, ast.Name):
        return node.target.id
    if isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(target := node.targets[0], ast.Name):
        first, *rest = _summands(node.value)
        return target.id if rest and isinstance(first, ast.Name) and first.id == target.id else ""
    return ""


def _summands(node: ast.expr) -> list[ast.expr]:
    """a, b and c of `a + b + c`, which is added from the left."""
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return [*_summands(node.left), node.right]
    return [node]


def _summand(view: View) -> Callable[[ast.expr], str]:
    """How an expression is written beside a plus."""
    loose = (ast.BoolOp, ast.Compare, ast.IfExp, ast.Lambda, ast.NamedExpr, ast.BinOp, ast.UnaryOp)
    return lambda node: f"({view.source.text(node)})" if isinstance(node, loose) else view.source.text(node)


def _parts_of(node: ast.AST) -> list[ast.expr]:
    if isinstance(node, ast.AugAssign):
        return [node.value]
    return _summands(node.value)[1:] if isinstance(node, ast.Assign) else []


def list_concatenation(view: View) -> Iterator[Change]:
    """`a = a + [x]` and `a += [x]` become `a.append(x)`; `a = a + b` becomes `a.extend(b)`.

    The list must be the function's own, without another name that would see the change, and no loop may run through it meanwhile.
    """
    for function in view.functions():
        for node in view.source.walk(function):
            name = _grows(node)
            if not name or view.source.scope(node) is not function or name not in view.source.bindings(function):
                continue
            parts = _parts_of(node)
            if len(parts) != 1:
                continue
            value = parts[0]
            if isinstance(node, ast.AugAssign) and not (isinstance(value, ast.List) and len(value.elts) == 1):
                continue
            target = node.targets[0] if isinstance(node, ast.Assign) else node.target  # type: ignore[attr-defined]
            if view.kind(target).name != "list" or value is None or name in names_of(value):
                continue
            if not view.effects.private(function, name) or _run_through(view, node, name, function):
                continue
            if view.source.indent(node) is None or view.handled(node, function):  # type: ignore[arg-type]
                continue
            if isinstance(value, ast.List) and len(value.elts) == 1 and not isinstance(value.elts[0], ast.Starred):
                text = f"{name}.append({view.source.text(value.elts[0])})"
            elif view.kind(value).name == "list":
                text = f"{name}.extend({view.source.text(value)})"
            else:
                continue
            yield Change(
                (view.source.replaced(node, text),), f"{name} is made longer, instead of being copied each time"
            )


def _run_through(view: View, node: ast.AST, name: str, function: ast.FunctionDef) -> bool:
    """Whether a loop around a statement runs through the list that it changes."""
    return any(isinstance(loop, ast.For) and name in names_of(loop.iter) for loop in view.source.loops(node, function))


def pop_front(view: View) -> Iterator[Change]:
    """A list whose first value is taken out (`pop(0)`) or put in (`insert(0, x)`) in a loop becomes a deque.

    All that the function does with it must be what a deque does alike; where it returns it, it returns a list of it.
    """
    for function in view.functions():
        for name in view.source.bindings(function):
            uses = view.source.uses(function, name)
            front = [use for use in uses if _at_front(view, use)]
            if not any(view.source.loops(use, function) for use in front) or not view.effects.private(function, name):
                continue
            if view.kind(front[0]).name != "list":  # pop(0) of a dictionary is something else
                continue
            line = view.source.can_import("collections", "deque")
            changes: list[tuple[int, int, str]] | None = []
            for use in uses:
                one = _as_deque(view, use, function)
                changes = None if one is None or changes is None else changes + one
            if changes is None or line is None:
                continue
            yield Change(
                tuple(changes), f"a deque gives and takes {name}'s first value without moving all others", line
            )


def _at_front(view: View, use: ast.Name) -> bool:
    parent = view.source.parent[use]
    call = view.source.parent.get(parent)
    if not isinstance(parent, ast.Attribute) or not isinstance(call, ast.Call) or not call.args:
        return False
    zero = isinstance(call.args[0], ast.Constant) and call.args[0].value == 0 and type(call.args[0].value) is int
    return zero and (parent.attr, len(call.args)) in (("pop", 1), ("insert", 2))


def _as_deque(view: View, use: ast.Name, function: ast.FunctionDef) -> list[tuple[int, int, str]] | None:
    """What must be written where a list that becomes a deque is mentioned; None where a deque does something else."""
    source = view.source
    parent = source.parent[use]
    if isinstance(parent, ast.Assign) and use in parent.targets and len(parent.targets) == 1:
        return [source.replaced(parent.value, f"deque({source.text(parent.value)})")]
    if isinstance(parent, ast.AnnAssign) and parent.target is use and parent.value is not None:
        return [
            source.replaced(parent.annotation, "deque"),
            source.replaced(parent.value, f"deque({source.text(parent.value)})"),
        ]
    if isinstance(parent, ast.AugAssign) and parent.target is use and isinstance(parent.op, ast.Add):
        return (
            [] if view.kind(parent.value).name in ("list", "tuple", "range") or view.kind(parent.value).text else None
        )
    if isinstance(parent, ast.Return):
        return [source.replaced(use, f"list({use.id})")]
    if isinstance(parent, (ast.If, ast.While, ast.IfExp)) and parent.test is use:
        return []
    if isinstance(parent, ast.UnaryOp) and isinstance(parent.op, ast.Not):
        return []
    if isinstance(parent, ast.BoolOp):
        return []
    if isinstance(parent, ast.Compare):
        member = (
            len(parent.ops) == 1 and isinstance(parent.ops[0], (ast.In, ast.NotIn)) and parent.comparators[0] is use
        )
        return [] if member else None
    if isinstance(parent, ast.Call) and use in parent.args:
        return [] if source.called(parent) in ("len", "sum", "sorted", "list", "tuple", "set", "any", "all") else None
    if isinstance(parent, ast.For) and parent.iter is use:  # a deque that changes meanwhile raises
        return [] if view.effects.unchanged(use.id, parent, function) else None
    if isinstance(parent, ast.comprehension) and parent.iter is use:
        return [] if not _changes(view, source.statement(use), use.id) else None
    if isinstance(parent, ast.Subscript) and parent.value is use and not isinstance(parent.slice, ast.Slice):
        at = ast.unparse(parent.slice)
        return [] if at in ("0", "-1") and isinstance(parent.ctx, ast.Load) else None
    call = source.parent.get(parent)
    if (
        not isinstance(parent, ast.Attribute)
        or not isinstance(call, ast.Call)
        or call.func is not parent
        or call.keywords
    ):
        return None
    if _at_front(view, use):
        if parent.attr == "pop":
            return [source.replaced(call, f"{use.id}.popleft()")]
        return [source.replaced(call, f"{use.id}.appendleft({source.text(call.args[1])})")]
    given = len(call.args)
    alike = {"append": 1, "extend": 1, "clear": 0, "pop": 0, "reverse": 0, "remove": 1, "count": 1}
    return [] if alike.get(parent.attr) == given else None


def _changes(view: View, statement: ast.stmt, name: str) -> bool:
    return name in set(view.effects.changed(statement))


def append_loop(view: View) -> Iterator[Change]:
    """A loop that does nothing but append (or add) to a new list (or set) becomes a comprehension.

    Nothing in the loop may look at the list, and its variables must not be used behind it.
    """
    for function in view.functions():
        for loop in view.source.walk(function):
            if (
                not isinstance(loop, ast.For)
                or view.source.scope(loop) is not function
                or view.source.indent(loop) is None
            ):
                continue
            block = view.block(loop)
            at = block.index(loop)
            start = block[at - 1] if at else None
            if (
                not isinstance(start, (ast.Assign, ast.AnnAssign))
                or view.source.indent(start) is None
                or view.handled(loop, function)
            ):
                continue
            target = start.targets[0] if isinstance(start, ast.Assign) else start.target
            if not isinstance(target, ast.Name) or (isinstance(start, ast.Assign) and len(start.targets) != 1):
                continue
            value = start.value
            empty = ast.unparse(value) if value is not None else ""
            kind = {"[]": "append", "list()": "append", "set()": "add"}.get(empty)
            if kind is None or (empty != "[]" and not view.source.builtin(value.func)):  # type: ignore[union-attr]
                continue
            found = _comprehended(view, loop, target.id, kind)
            if found is None or view.source.captured(function, target.id):
                continue
            element, parts, bound = found
            if _seen_elsewhere(view, loop, bound, function):
                continue
            read = {one for one in names_of(loop) if one in view.source.bindings(function)} - bound - {target.id}
            if not all(
                view.source.bound_before(one, loop, function) for one in read
            ):  # what raises is another error in a comprehension
                continue
            brackets = "[]" if kind == "append" else "{}"
            left = view.source.text(target) + (
                f": {view.source.text(start.annotation)}" if isinstance(start, ast.AnnAssign) else ""
            )
            text = f"{left} = {brackets[0]}{element} {' '.join(parts)}{brackets[1]}"
            span = (view.source.start(start), view.source.end(loop), text)
            if b"#" in view.source.data[span[0] : span[1]] and _comments(view, span[0], span[1]):
                continue
            yield Change((span,), f"a comprehension makes {target.id} without looking up its method each time")


def _comprehended(view: View, loop: ast.For, name: str, method: str) -> tuple[str, list[str], set[str]] | None:
    parts: list[str] = []
    bound: set[str] = set()
    read: set[str] = set()  # by parts behind the first iterable, which a comprehension evaluates around itself
    node: ast.stmt = loop
    while True:
        if isinstance(node, ast.For) and not node.orelse and len(node.body) == 1 and _simple(node.target):
            mentioned = names_of(node.iter)
            parts.append(f"for {view.source.text(node.target)} in {view.source.operand(node.iter)}")
            read |= mentioned if bound else set()
            if _walrus(view, node.iter) or names_of(node.target) & (bound | read | {name}):
                return None
            bound |= names_of(node.target)
            node = node.body[0]
        elif isinstance(node, ast.If) and not node.orelse and len(node.body) == 1:
            mentioned = names_of(node.test)
            parts.append(f"if {view.source.operand(node.test)}")
            read |= mentioned
            if _walrus(view, node.test):
                return None
            node = node.body[0]
        else:
            value = appended(node, name, method)
            if value is None or name in names_of(value) or _walrus(view, value):
                return None
            return view.source.operand(value), parts, bound
        if name in mentioned:
            return None


def _simple(target: ast.expr) -> bool:
    return isinstance(target, ast.Name) or (
        isinstance(target, ast.Tuple) and all(isinstance(one, ast.Name) for one in target.elts)
    )


def _walrus(view: View, node: ast.AST) -> bool:
    """Whether an expression means something else within a comprehension, or may be evaluated later."""
    return any(
        isinstance(one, (ast.NamedExpr, ast.Yield, ast.YieldFrom, ast.Await, ast.Lambda))
        or (isinstance(one, ast.GeneratorExp) and not view.effects.passing(one))
        or (isinstance(one, ast.Name) and one.id in ("super", "__class__"))
        for one in ast.walk(node)
    )


def _seen_elsewhere(view: View, loop: ast.For, names: set[str], function: ast.FunctionDef) -> bool:
    """Whether variables of a loop are looked at outside of it, other than by loops and comprehensions that bind them anew."""
    within = set(view.source.walk(loop))
    for name in names:
        if any(one.how == "parameter" for one in view.source.bindings(function)[name]) or name in view.source.shared:
            return True
        for use in view.source.uses(function, name):
            if use in within:
                if view.source.scope(use) is not function:
                    return True
                continue
            if not needs_value(view, use) or name in view.source.comprehension_names(use):
                continue
            anew = any(
                isinstance(one, ast.For)
                and name in names_of(one.target)
                and use not in set(view.source.walk(one.iter))
                and use not in {part for other in one.orelse for part in view.source.walk(other)}
                for one in view.source.ancestors(use)
                if one is not function
            )
            if not anew or view.source.scope(use) is not function:
                return True
    return False


def _comments(view: View, start: int, end: int) -> bool:
    import io
    import tokenize

    for token in tokenize.generate_tokens(io.StringIO(view.source.program).readline):
        if token.type == tokenize.COMMENT:
            line = view.source.starts[token.start[0] - 1]
            at = line + len(token.line[: token.start[1]].encode())
            if start <= at < end:
                return True
    return False
