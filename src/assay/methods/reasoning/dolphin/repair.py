"""A repairer by rules, one candidate a round: what the exception says, tried at the lines that the traceback and the
code around it name.

It stands in for a model where there is none, and shows what the code around a failure is worth to the same rules. All
rules are our choice.
"""

from __future__ import annotations

import ast
import builtins
import difflib
import re
import sys
from collections.abc import Callable, Iterator, Sequence

from assay.methods.reasoning.dolphin.practice import Attempt, Request
from assay.methods.reasoning.dolphin.tracebacks import Failure, Part, kept_lines, tree_of

ALIASES = {"np": "numpy", "pd": "pandas", "plt": "matplotlib.pyplot", "nn": "torch.nn", "F": "torch.nn.functional"}
"""Names under which modules are commonly imported."""
_QUOTED = re.compile(r"'([^']+)'")
_DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)


Lines = Callable[[Attempt, Sequence[Part]], Sequence[int]]
"""Where a wrong value may have been made, likeliest first, by a failure and the code around its frames."""


class RuleRepair:
    """Gives the first candidate that was not tried yet, built on the last source whose traceback differs from that of
    the one before.

    Without the structure the lines that it may change are those that the traceback names, the innermost first. With it
    also those on which the names of that line are made, and other calls of its function; names of the function come
    before all others of the file then. `lines` looks elsewhere instead.

    When NOT to use it: for faults that are no slip of a name, an argument, a shape or a type. It knows of nothing else.
    """

    def __init__(self, *, lines: Lines | None = None) -> None:
        self.lines = suspects if lines is None else lines

    def __call__(self, request: Request) -> str | None:
        """The repaired source, None where no rule has anything left."""
        base = request.attempts[0]
        for attempt in request.attempts[1:]:
            if _sign(attempt) not in (None, _sign(base)):
                base = attempt
        tried = {attempt.source for attempt in request.attempts}
        parts = Request((base,), request.structure).parts
        found = candidates(base, parts, self.lines)
        return next((one for one in found if one not in tried and tree_of(one) is not None), None)


def candidates(attempt: Attempt, parts: Sequence[Part], lines: Lines | None = None) -> Iterator[str]:
    """Sources with one change each, the likeliest first. `parts` is the code around the frames, empty for nothing
    known of it; wrong values are looked for at `lines`, by default `suspects`."""
    tree = tree_of(attempt.source)
    if tree is None:
        return
    failure = next((one for one in reversed(attempt.failures) if one.frames), None)
    if failure is None:
        return
    script = _Script(attempt.source, tree)
    line = failure.frames[-1].line
    if failure.kind in ("NameError", "UnboundLocalError"):
        yield from _missing_name(script, failure, line, parts)
    elif failure.kind == "AttributeError":
        yield from _missing_attribute(script, failure, line)
    elif failure.kind == "KeyError":
        yield from _renamed(script, line, failure.message.strip("'\""), script.texts, ast.Constant)
    elif failure.kind == "TypeError" and "argument" in failure.message:
        yield from _wrong_arguments(script, failure, line, parts)
    else:
        callers = {frame.line for frame in failure.frames} | {at for part in parts for _, at in part.called_at}
        for at in (suspects if lines is None else lines)(attempt, parts):
            yield from _wrong_value(script, at, calls_only=at != line and at in callers)


class _Script:
    """A source, its lines and its tree, and changes of a node's text."""

    def __init__(self, source: str, tree: ast.Module) -> None:
        self.source, self.tree = source, tree
        self.lines = kept_lines(source)
        self.names = [n.id for n in ast.walk(self.tree) if isinstance(n, ast.Name)]
        self.names += [n.arg for n in ast.walk(self.tree) if isinstance(n, ast.arg)]
        self.names += [n.name for n in ast.walk(self.tree) if isinstance(n, _DEFINITIONS)]
        self.names += [
            a.asname or a.name
            for n in ast.walk(self.tree)
            if isinstance(n, ast.Import | ast.ImportFrom)
            for a in n.names
        ]
        self.attributes = [n.attr for n in ast.walk(self.tree) if isinstance(n, ast.Attribute)]
        self.texts = [n.value for n in ast.walk(self.tree) if isinstance(n, ast.Constant) and isinstance(n.value, str)]

    def at(self, line: int, kind: type[ast.AST] | tuple[type[ast.AST], ...]) -> list[ast.expr]:
        """The expressions of a kind that begin and end on a line, in order; not those of an f-string, of which Python
        before 3.12 does not say where they stand."""
        inside = {id(n) for text in ast.walk(self.tree) if isinstance(text, ast.JoinedStr) for n in ast.walk(text)}
        found = [
            n for n in ast.walk(self.tree)
            if isinstance(n, kind) and isinstance(n, ast.expr) and n.lineno == line == n.end_lineno and
            id(n) not in inside
        ]  # fmt: skip
        return sorted(found, key=lambda n: n.col_offset)

    def text(self, node: ast.expr) -> str:
        """The node as it is written."""
        return ast.get_source_segment(self.source, node) or ""

    def operand(self, node: ast.expr) -> str:
        """The same, in parentheses unless it binds as tightly as a name: those around it are not part of a node."""
        text = self.text(node)
        return text if isinstance(node, ast.Name | ast.Attribute | ast.Call | ast.Subscript) else f"({text})"

    def with_text(self, node: ast.expr, text: str) -> str:
        """The source with another text in the node's place."""
        at = self.lines[node.lineno - 1].encode()
        changed = at[: node.col_offset] + text.encode() + at[node.end_col_offset :]
        return "".join([*self.lines[: node.lineno - 1], changed.decode(), *self.lines[node.lineno :]])


def _missing_name(script: _Script, failure: Failure, line: int, parts: Sequence[Part]) -> Iterator[str]:
    name = next(iter(_QUOTED.findall(failure.message)), "")
    module = ALIASES.get(name, name if name in sys.stdlib_module_names else "")
    if module:
        text = f"import {module}\n" if module == name else f"import {module} as {name}\n"
        first = next((n for n in script.tree.body if not _docstring_or_future(n)), script.tree.body[0])
        at = min([first.lineno, *(n.lineno for n in getattr(first, "decorator_list", ()))]) - 1
        yield "".join([*script.lines[:at], text, *script.lines[at:]])
    near: list[str] = []
    if parts:
        inside = parts[0]
        near = [
            n.id for n in ast.walk(script.tree) if isinstance(n, ast.Name) and inside.first <= n.lineno <= inside.last
        ]
        near += [
            n.arg for n in ast.walk(script.tree) if isinstance(n, ast.arg) and inside.first <= n.lineno <= inside.last
        ]
    yield from _renamed(script, line, name, [one for one in near if one != name], ast.Name)
    yield from _renamed(script, line, name, [one for one in (*script.names, *dir(builtins)) if one != name], ast.Name)


def _docstring_or_future(node: ast.stmt) -> bool:
    text = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
    return text or (isinstance(node, ast.ImportFrom) and node.module == "__future__")


def _missing_attribute(script: _Script, failure: Failure, line: int) -> Iterator[str]:
    quoted = _QUOTED.findall(failure.message)
    name = quoted[1] if len(quoted) > 1 else ""
    known = list(script.attributes)
    owner = sys.modules.get(quoted[0]) if failure.message.startswith("module") and quoted else None
    known += dir(owner) if owner is not None else []
    yield from _renamed(script, line, name, [one for one in known if one != name], ast.Attribute)


def _renamed(script: _Script, line: int, old: str, names: Sequence[str], kind: type[ast.expr]) -> Iterator[str]:
    """A name, an attribute or a text on a line in the spelling of names that look like it."""
    for new in difflib.get_close_matches(old, list(dict.fromkeys(names)), n=3, cutoff=0.5):
        for node in script.at(line, kind):
            if isinstance(node, ast.Name) and node.id == old:
                yield script.with_text(node, new)
            elif isinstance(node, ast.Attribute) and node.attr == old:
                yield script.with_text(node, re.sub(r"\w+$", new, script.text(node)))
            elif isinstance(node, ast.Constant) and node.value == old:
                yield script.with_text(node, repr(new))


def _wrong_arguments(script: _Script, failure: Failure, line: int, parts: Sequence[Part]) -> Iterator[str]:
    quoted = _QUOTED.findall(failure.message)
    for node in script.at(line, ast.Call):
        assert isinstance(node, ast.Call)
        if "missing" in failure.message:
            for name in quoted:
                known = next((one for one in script.names if one == name), None)
                likely = difflib.get_close_matches(name, script.names, n=1, cutoff=0.6)
                for value in dict.fromkeys([*([known] if known else []), *likely]):
                    yield script.with_text(
                        node, _call(script, node, [*map(script.text, node.args), value], node.keywords)
                    )
        elif "unexpected keyword" in failure.message:
            signatures = " ".join(part.signature for part in parts)
            wrong = quoted[-1] if quoted else ""
            given = [k for k in node.keywords if k.arg == wrong]
            for new in (
                difflib.get_close_matches(wrong, re.findall(r"\w+", signatures), n=2, cutoff=0.5) if given else []
            ):
                value = ast.keyword(new, given[0].value)
                kept = [value if k is given[0] else k for k in node.keywords]
                yield script.with_text(node, _call(script, node, list(map(script.text, node.args)), kept))
            if given:
                kept = [k for k in node.keywords if k is not given[0]]
                yield script.with_text(node, _call(script, node, list(map(script.text, node.args)), kept))
        elif "positional" in failure.message and node.args:
            yield script.with_text(node, _call(script, node, list(map(script.text, node.args[:-1])), node.keywords))
    yield from _wrong_value(script, line, calls_only=False)


def _call(script: _Script, node: ast.Call, arguments: Sequence[str], keywords: Sequence[ast.keyword]) -> str:
    named = [f"{k.arg}={ast.unparse(k.value)}" if k.arg else f"**{ast.unparse(k.value)}" for k in keywords]
    return f"{script.operand(node.func)}({', '.join([*arguments, *named])})"


def named_lines(attempt: Attempt) -> list[int]:
    """The lines that the traceback names, the innermost first."""
    failure = next((one for one in reversed(attempt.failures) if one.frames), None)
    return list(dict.fromkeys(frame.line for frame in reversed(failure.frames))) if failure is not None else []


def suspects(attempt: Attempt, parts: Sequence[Part]) -> list[int]:
    """The lines that the traceback names; with the code around them behind the innermost first those where its names
    were made and, last, the other calls of its function and whatever else in the file has such a name."""
    line, *callers = named_lines(attempt)
    tree = tree_of(attempt.source) if parts else None
    if tree is None:
        return [line, *callers]
    wanted = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name) and n.lineno == line}
    made = [
        n.lineno for n in ast.walk(tree)
        if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store) and n.id in wanted and n.lineno != line
    ]  # fmt: skip
    near = sorted((at for at in made if parts[0].first <= at < line), reverse=True)
    return list(dict.fromkeys([line, *near, *callers, *(at for _, at in parts[0].called_at), *made]))


def _wrong_value(script: _Script, line: int, *, calls_only: bool) -> Iterator[str]:
    """Numbers that were texts, matrices that lie the wrong way, arguments in the wrong order."""
    for node in () if calls_only else script.at(line, ast.Constant):
        assert isinstance(node, ast.Constant)
        if isinstance(node.value, str) and re.fullmatch(r"-?\d+(\.\d*)?", node.value):
            yield script.with_text(node, node.value)
    for node in () if calls_only else script.at(line, ast.BinOp):
        assert isinstance(node, ast.BinOp)
        if isinstance(node.op, ast.MatMult):
            left, right = script.operand(node.left), script.operand(node.right)
            yield script.with_text(node, f"{left} @ {_turned(right)}")
            yield script.with_text(node, f"{_turned(left)} @ {right}")
    for node in script.at(line, ast.Call):
        assert isinstance(node, ast.Call)
        given = list(map(script.text, node.args))
        for i in range(len(given) - 1):
            swapped = [*given[:i], given[i + 1], given[i], *given[i + 2 :]]
            yield script.with_text(node, _call(script, node, swapped, node.keywords))


def _turned(text: str) -> str:
    return text.removesuffix(".T") if text.endswith(".T") else f"{text}.T"


def _sign(attempt: Attempt) -> tuple[str, str] | None:
    """By what two failures are told apart."""
    return (attempt.failures[-1].kind, attempt.failures[-1].message) if attempt.failures else None
