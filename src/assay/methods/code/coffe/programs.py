"""Program texts: asserts put in and read out, and how texts are run.

Nothing here executes a program. Whoever calls gives a `Run`, which is a sandbox in all but tests of our own texts.
"""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from assay import checks

Args = tuple[Any, ...]


class Ended(Protocol):
    """How one call ended: `state` is "returned" or the reason why there is no `value`."""

    @property
    def state(self) -> str: ...
    @property
    def value(self) -> Any: ...


Run = Callable[[str, str, Sequence[Args]], Sequence[Ended]]
"""`run(program, entry_point, cases)`: the program's function called with the arguments of every case, each call on its own."""


NOT_PYTHON = (SyntaxError, ValueError, MemoryError, RecursionError)
"""What `ast.parse` raises for texts that are none, those with zeros in them and those nested too deeply included."""


class Unusable(ValueError):
    """A text that a writer of contracts or inputs gave is none; the text says why. It costs a call and nothing else."""


def through(workers: Any) -> Run:
    """A `Run` of the sandboxed processes of `assay.methods.core.programs.workers`."""
    return lambda program, entry_point, cases: [row[0] for row in workers.run(program, entry_point, list(cases))]


# ------------------------------------------------------------------------------------------------------------------- asserts


def parameters(program: str, entry_point: str) -> tuple[str, ...]:
    """The names of the positional parameters of a function of the program.

    >>> parameters("def add(x: int, y: int = 0): return x + y", "add")
    ('x', 'y')
    """
    arguments = _function(_parsed(program), entry_point).args
    return tuple(one.arg for one in (*arguments.posonlyargs, *arguments.args))


def asserts(program: str) -> Counter[str]:
    """The conditions of all asserts of a program, as Python writes them (spaces and quotes of the text do not matter)."""
    return Counter(_text(node.test) for node in ast.walk(_parsed(program)) if isinstance(node, ast.Assert))


def with_contract(program: str, entry_point: str, assertion: str) -> str:
    """The program with one more assert at the head of its function, behind the docstring and the asserts that stand there already.

    Comments are lost, for the text is written anew: contracts filter inputs, costs are measured on the program itself.
    Raises Unusable for anything but one assert statement.

    >>> print(with_contract("def half(n):\\n    return n / 2  # exact", "half", "assert n >= 0"))
    def half(n):
        assert n >= 0
        return n / 2
    """
    try:
        statements = ast.parse(assertion.strip()).body
    except NOT_PYTHON as error:
        raise Unusable(f"no Python: {checks.shown(assertion)}") from error
    if len(statements) != 1 or not isinstance(statements[0], ast.Assert):
        raise Unusable(f"not one assert: {checks.shown(assertion)}")
    tree = _parsed(program)
    body = _function(tree, entry_point).body
    at = 0
    while at < len(body) and (isinstance(body[at], ast.Assert) or at == 0 and _is_text(body[at])):
        at += 1
    body.insert(at, statements[0])
    return _text(ast.fix_missing_locations(tree))


def _text(node: ast.AST) -> str:
    try:
        return ast.unparse(node)
    except RecursionError as error:
        raise Unusable("an expression is nested too deeply") from error


def _parsed(program: str) -> ast.Module:
    try:
        return ast.parse(program)
    except NOT_PYTHON as error:
        raise ValueError(f"program must be Python, got {checks.shown(program)}") from error


def _function(tree: ast.Module, entry_point: str) -> ast.FunctionDef:
    found = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == entry_point]
    if not found:
        raise ValueError(f"program must define {entry_point}() at its top level")
    return found[-1]  # the one that stays


def _is_text(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


# -------------------------------------------------------------------------------------------------------------- texts that are run

_CHECKED = """
def {name}():
    check({entry_point})
    return True
"""
_FILE = """
def main(stdin, _source={source!r}):
    import contextlib, io, sys
    before, out = sys.stdin, io.TextIOWrapper(io.BytesIO(), "utf-8", write_through=True)
    sys.stdin = io.TextIOWrapper(io.BytesIO(stdin.encode()), "utf-8")
    try:
        with contextlib.redirect_stdout(out):
            exec(compile(_source, "main.py", "exec"), {{"__name__": "__main__"}})
    except SystemExit as end:
        if end.code not in (None, 0):
            raise
    finally:
        sys.stdin = before
    return out.buffer.getvalue().decode()
"""


def passing(run: Run, test: str, entry_point: str) -> Callable[[str], bool]:
    """A predicate on program texts: does the test's `check(candidate)` pass?"""

    def passes(program: str) -> bool:
        text = f"{program}\n{test}\n{_CHECKED.format(name='_checked', entry_point=entry_point)}"
        (ended,) = run(text, "_checked", [()])
        return ended.state == "returned"

    return passes


def as_function(program: str) -> str:
    """A program that reads stdin as one with a function `main(stdin)` that returns what it prints: file-level problems.

    It may read and write the buffers of `sys.stdin` and `sys.stdout`, and end by `exit()`; another code than 0 is raised.

    >>> scope = {}
    >>> exec(as_function("print(int(input()) * 2)"), scope)
    >>> scope["main"]("21")
    '42\\n'
    """
    return _FILE.format(source=program)
