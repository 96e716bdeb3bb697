"""A program as text and as a syntax tree at once: where its nodes stand in the text, and how edits are put in.

Edits replace spans of the text, so that everything outside of them stays as it was written, comments and blanks included.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Change:
    """One edit of a rule: spans of the text (in bytes) with what stands there instead, and why."""

    replacements: tuple[tuple[int, int, str], ...]
    why: str
    imports: str = ""
    """A line that must stand at the head of the program, "" for none."""


class Text:
    """A parsed program. Raises ValueError for a text that is no Python."""

    def __init__(self, program: str) -> None:
        try:
            self.tree = ast.parse(program)
            self.data = program.encode()
            compile(program, "<program>", "exec", dont_inherit=True)
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            raise ValueError(f"program must be Python: {error}") from None
        self.program = program
        self.starts = [0, *(found.end() for found in re.finditer(rb"\r\n|\r|\n", self.data))]
        self.newline = "\r\n" if b"\r\n" in self.data else "\n"
        self.parent: dict[ast.AST, ast.AST] = {}
        self._order: list[ast.AST] = []
        self._span: dict[ast.AST, tuple[int, int]] = {}
        self._number(self.tree)

    def _number(self, root: ast.AST) -> None:
        """Put all nodes in the order of the text, so that those below one are a stretch of it."""
        waiting: list[tuple[ast.AST, bool]] = [(root, False)]
        while waiting:
            node, done = waiting.pop()
            if done:
                self._span[node] = (self._span[node][0], len(self._order))
                continue
            self._span[node] = (len(self._order), 0)
            self._order.append(node)
            children = [
                child for child in ast.iter_child_nodes(node) if not isinstance(child, (ast.expr_context, ast.operator))
            ]
            self.parent.update(dict.fromkeys(children, node))
            waiting.append((node, True))
            waiting += [(child, False) for child in reversed(children)]

    def walk(self, node: ast.AST) -> list[ast.AST]:
        """A node and all nodes below it, those that stand first first; of a node that is not the program's, as `ast.walk` has it."""
        if node not in self._span:
            return list(ast.walk(node))
        start, end = self._span[node]
        return self._order[start:end]

    # ------------------------------------------------------------------------------------------------------------------ text

    def start(self, node: ast.AST) -> int:
        """The offset of a node's first byte; that of its first decorator where it has one."""
        if decorators := getattr(node, "decorator_list", None):
            first = min(decorators, key=lambda one: (one.lineno, one.col_offset))
            line = self.starts[first.lineno - 1]
            return line + self.data[line:].index(b"@")
        return self.starts[node.lineno - 1] + node.col_offset  # type: ignore[attr-defined]

    def end(self, node: ast.AST) -> int:
        """The offset behind a node's last byte."""
        return self.starts[node.end_lineno - 1] + node.end_col_offset  # type: ignore[attr-defined]

    def text(self, node: ast.AST) -> str:
        """A node as it is written."""
        return self.data[self.start(node) : self.end(node)].decode()

    def within(self, node: ast.AST) -> str:
        """An expression as it is written, so that it can stand anywhere: in brackets unless it is one word."""
        text = self.text(node)
        simple = isinstance(node, (ast.Name, ast.Constant, ast.Attribute, ast.Subscript, ast.Call)) and "\n" not in text
        return text if simple else f"({text})"

    def operand(self, node: ast.AST) -> str:
        """An expression as it is written, so that it can stand between brackets beside others: as a part of a comprehension, say."""
        text = self.text(node)
        loose = isinstance(node, (ast.IfExp, ast.Lambda, ast.NamedExpr)) or (
            isinstance(node, ast.Tuple) and text[:1] != "("
        )
        return f"({text})" if loose else text

    def line_of(self, offset: int) -> int:
        """The number of the line, from 1, in which a byte stands."""
        low, high = 0, len(self.starts)
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.starts[middle] <= offset else (low, middle)
        return low + 1

    def indent(self, statement: ast.stmt) -> str | None:
        """The blanks before a statement that has its first line and what follows its last one to itself; None for others."""
        start, end = self.start(statement), self.end(statement)
        line = self.starts[self.line_of(start) - 1]
        before = self.data[line:start]
        rest = self.data[end : self._line_end(end)].strip()
        if before.strip() or (rest and not rest.startswith(b"#")) or self.data[start : start + 4] == b"elif":
            return None
        if line and self.data[:line].rstrip(b"\r\n").endswith(b"\\"):
            return None
        return before.decode()

    def _line_end(self, offset: int) -> int:
        number = self.line_of(offset)
        return len(self.data) if number >= len(self.starts) else self.starts[number]

    def before(self, statement: ast.stmt, lines: Sequence[str]) -> tuple[int, int, str]:
        """Put lines before a statement for which `indent` is known."""
        indent = self.indent(statement)
        at = self.starts[self.line_of(self.start(statement)) - 1]
        return at, at, "".join(f"{indent}{line}{self.newline}" for line in lines)

    def after(self, statement: ast.stmt, lines: Sequence[str]) -> tuple[int, int, str]:
        """Put lines behind a statement for which `indent` is known."""
        indent = self.indent(statement)
        at = self._line_end(self.end(statement))
        text = "".join(f"{indent}{line}{self.newline}" for line in lines)
        if at == len(self.data) and not self.data.endswith((b"\n", b"\r")):
            text = self.newline + text.removesuffix(self.newline)
        return at, at, text

    def replaced(self, node: ast.AST, text: str) -> tuple[int, int, str]:
        """Write something in the place of a node."""
        return self.start(node), self.end(node), text

    def applied(self, change: Change) -> str:
        """The program after a change. Spans must not overlap; those that begin alike are put in in their order."""
        parts: list[bytes] = []
        at = 0
        replacements = [*([self._import(change.imports)] if change.imports else []), *change.replacements]
        for start, end, text in sorted(replacements, key=lambda one: one[:2]):
            if start < at:
                raise ValueError("replacements must not overlap")
            parts += [self.data[at:start], text.encode()]
            at = end
        return b"".join([*parts, self.data[at:]]).decode()

    def _import(self, line: str) -> tuple[int, int, str]:
        at = 0
        for n, node in enumerate(self.tree.body):
            docstring = n == 0 and isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
            future = isinstance(node, ast.ImportFrom) and node.module == "__future__"
            if not (docstring and isinstance(node.value.value, str)) and not future:  # type: ignore[attr-defined]
                if at == 0:  # behind what is said about the whole file, before its first statement
                    at = self.starts[self.line_of(self.start(node)) - 1]
                break
            at = self._line_end(self.end(node))
        first = next((node for node in self.tree.body if self.start(node) >= at), None)
        blank = isinstance(first, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)) and not self.data[
            at:
        ].startswith((b"\n", b"\r"))
        return at, at, line + self.newline * (3 if blank else 1)
