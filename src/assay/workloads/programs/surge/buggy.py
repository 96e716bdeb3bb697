"""BG: right programs with one thing broken; what is to be predicted is the error's text.

A mutation is made on the syntax tree of a program of the HumanEval bank, or on the text of a small C or JavaScript program. Some mutations
raise nothing on the input that is given: whoever runs the programs leaves those out.
"""

from __future__ import annotations

import ast
from collections.abc import Callable

from assay.workloads.programs.surge.source import NAMES, Language, Source
from assay.workloads.programs.task import bank

TASKS = (
    "HumanEval/1", "HumanEval/10", "HumanEval/20", "HumanEval/25", "HumanEval/26", "HumanEval/46", "HumanEval/64",
    "HumanEval/69", "HumanEval/88", "HumanEval/105", "HumanEval/110", "HumanEval/114",
)  # fmt: skip


class _First(ast.NodeTransformer):
    """Changes the first node that `change` has something for."""

    def __init__(self, change: Callable[[ast.AST], ast.AST | None]) -> None:
        self.change, self.done = change, False

    def visit(self, node: ast.AST) -> ast.AST:
        if not self.done and (new := self.change(node)) is not None:
            self.done = True
            return ast.copy_location(new, node)
        return self.generic_visit(node)


def _name(node: ast.AST) -> ast.AST | None:
    """A variable that is not there."""
    if isinstance(node, ast.Return) and isinstance(node.value, ast.Name):
        return ast.Return(ast.Name(node.value.id + "_", ast.Load()))
    return None


def _attribute(node: ast.AST) -> ast.AST | None:
    """A method that is not there."""
    if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
        return ast.Attribute(node.value, node.attr + "s", ast.Load())
    return None


def _kind(node: ast.AST) -> ast.AST | None:
    """A text where a number is added."""
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add | ast.Sub):
        return ast.BinOp(node.left, node.op, ast.Call(ast.Name("str", ast.Load()), [node.right], []))
    return None


def _zero(node: ast.AST) -> ast.AST | None:
    """A division by zero."""
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mod | ast.FloorDiv | ast.Div):
        return ast.BinOp(node.left, node.op, ast.Constant(0))
    return None


def _index(node: ast.AST) -> ast.AST | None:
    """A place beyond the end."""
    if isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Load) and not isinstance(node.slice, ast.Slice):
        return ast.Subscript(node.value, ast.BinOp(node.slice, ast.Add(), ast.Constant(1000)), ast.Load())
    return None


MUTATIONS = {"name": _name, "attribute": _attribute, "kind": _kind, "zero": _zero, "index": _index}


def mutated(program: str, kind: str) -> str | None:
    """The program with its first fitting place broken in that way, None where there is none.

    >>> print(mutated("def f(a):\\n    return a\\n", "name"))
    def f(a):
        return a_
    """
    change = _First(MUTATIONS[kind])
    tree = ast.fix_missing_locations(change.visit(ast.parse(program)))
    return ast.unparse(tree) if change.done else None


_C = """#include <stdio.h>

int main(void) {
    int total = 0;
    for (int i = 0; i < 5; i++) {
        total += i;
    }
    printf("%d\\n", total);
    return 0;
}
"""
_CPP = """#include <cstdio>

int main() {
    const int values[] = {1, 3, 2};
    int most = values[0];
    for (int value : values) {
        if (value > most) most = value;
    }
    std::printf("%d\\n", most);
}
"""
_NODE = """const values = [1, 3, 2];
let most = values[0];
for (const value of values) {
    if (value > most) most = value;
}
console.log(most.toFixed(1));
"""
_TEXTS: dict[str, tuple[Language, str, list[tuple[str, str]]]] = {
    "sum": ("c", _C, [("total += i;", "total += i"), ("int total = 0;", "int totals = 0;")]),
    "most in C++": ("cpp", _CPP, [("int most", "const int most"), ("std::printf", "std::prinf")]),
    "most in JavaScript": ("node", _NODE, [("let most", "const most"), ("toFixed(1)", "toFixd(1)")]),
    "nothing there": ("node", _NODE.replace("most", "top"), [("values[0]", "values[9].x"), ("of values", "of 7")]),
}


def made() -> list[Source]:
    """Two of five mutations of a program of each of twelve tasks, and eight of C, C++ and JavaScript programs."""
    tasks, found = bank(), []
    kinds = list(MUTATIONS)
    for at, name in enumerate(TASKS):
        task = tasks[name]
        given = ", ".join(map(repr, task.arguments(0, 3)))
        texts = {kind: mutated(task.programs["expert"], kind) for kind in kinds[at % 5 :] + kinds[: at % 5]}
        for kind in [kind for kind, text in texts.items() if text is not None][:2]:
            files = {"main.py": f"{texts[kind]}\n\nprint({task.entry_point}({given}))\n"}
            found.append(Source(f"BG/{name}/{kind}", "BG", kind, name, "python", files, given=given, wants="error"))
    for name, (language, text, changes) in _TEXTS.items():
        for number, (old, new) in enumerate(changes):
            files = {NAMES[language]: text.replace(old, new, 1)}
            found.append(Source(f"BG/{name}/{number}", "BG", "text", f"BG/{name}", language, files, wants="error"))
    return found
