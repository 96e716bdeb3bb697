"""Lint, types and tests of one paper and of what imports it: `make room SLUG=xattention`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import grimp

ROOT = Path(__file__).parents[1]


def files_of(slug: str) -> list[Path]:
    """Sources and tests that carry the paper's name, module or package."""
    found = [ROOT / "src" / "assay" / part for part in ("methods", "experiments")]
    sources = [path for part in found for path in part.glob(f"*/{slug}*") if path.stem == slug or path.suffix == ".py"]
    return sources + sorted((ROOT / "tests").rglob(f"test_{slug}*.py"))


def tests_of(slug: str) -> list[Path]:
    """The room's tests, and every other test file that names a module which imports the room."""
    graph = grimp.build_graph("assay")
    rooms = {name for name in graph.modules if name.startswith("assay.methods.") and name.split(".")[3:4] == [slug]}
    users = {user for room in rooms for user in graph.find_downstream_modules(room)} | rooms
    own = [path for path in files_of(slug) if path.name.startswith("test_")]
    others = [
        path
        for path in sorted((ROOT / "tests").rglob("test_*.py"))
        if path not in own and any(user in path.read_text(encoding="utf-8") for user in users)
    ]
    return own + others


def main(slug: str) -> int:
    sources = files_of(slug)
    if not sources:
        print(f"no file is called {slug}; `assay papers --status works` lists the papers with code")
        return 2
    python = sys.executable
    names = [str(path) for path in sources]
    steps = [
        [python, "-m", "ruff", "check", *names],
        [python, "-m", "ruff", "format", "--check", *names],
        [python, "-m", "mypy", *[name for name in names if "/src/" in name]],
        [str(Path(python).with_name("lint-imports"))],
        [python, "-m", "pytest", "-m", "not slow and not gpu", "--room-times", *map(str, tests_of(slug))],
    ]
    for step in steps:
        if code := subprocess.run(step, cwd=ROOT).returncode:
            return code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1] if len(sys.argv) > 1 else ""))
