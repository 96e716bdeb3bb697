"""Lint, types and tests of one paper and of what imports it: `make room SLUG=xattention`."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import grimp

ROOT = Path(__file__).parents[1]


def modules_of(slug: str, graph: grimp.ImportGraph) -> set[str]:
    """The paper's modules, its experiments, and what imports the paper at first hand."""
    parts = {name: name.split(".") for name in graph.modules}
    room = {name for name, at in parts.items() if at[1:2] == ["methods"] and at[2:3] != ["core"] and at[3:4] == [slug]}
    experiments = {name for name, at in parts.items() if at[1:2] == ["experiments"] and at[3:4] == [slug]}
    return room | experiments | {user for name in room for user in graph.find_modules_that_directly_import(name)}


def file_of(module: str) -> Path:
    path = ROOT / "src" / Path(*module.split("."))
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def names_in(source: str) -> set[str]:
    """Every module a test imports, in whichever way, also in code that stands in it as text."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and "assay." in node.value:
            words = "".join(letter if letter.isalnum() or letter in "._" else " " for letter in node.value).split()
            found |= {".".join(word.split(".")[:end]) for word in words for end in range(2, 6)}
    return found


def tests_of(modules: set[str]) -> list[Path]:
    """The test files that name one of the modules."""
    tests = sorted((ROOT / "tests").rglob("test_*.py"))
    return [path for path in tests if names_in(path.read_text(encoding="utf-8")) & modules]


def main(slug: str) -> int:
    modules = modules_of(slug, grimp.build_graph("assay"))
    if not modules:
        print(f"no paper with code is called {slug!r}; `assay papers --status code` lists them")
        return 2
    sources, tests = sorted(str(file_of(name)) for name in modules), [str(path) for path in tests_of(modules)]
    python = sys.executable
    steps = [
        [python, "-m", "ruff", "check", *sources, *tests],
        [python, "-m", "ruff", "format", "--check", *sources, *tests],
        [python, "-m", "mypy", *sources],
        [str(Path(python).with_name("lint-imports"))],
    ]
    if tests:
        chosen = ["-m", "not slow and not sweep and not gpu", "--room-times"]
        steps.append([python, "-m", "pytest", *chosen, *tests])
    for step in steps:
        if code := subprocess.run(step, cwd=ROOT).returncode:
            return code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1] if len(sys.argv) > 1 else ""))
