"""What ARCHITECTURE.md says is where it says: every `file:name` in it exists."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
PLACES = sorted(
    set(re.findall(r"`([\w/.<>-]+\.(?:py|cpp|h)):([\w.]+)`", (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")))
)


def names_of(file: Path) -> set[str]:
    """Functions, classes, methods and constants a file defines."""
    text = file.read_text(encoding="utf-8")
    if file.suffix != ".py":
        return set(re.findall(r"\b(\w+)\s*[({]", text))
    found: set[str] = set()
    for node in ast.parse(text).body:
        if isinstance(node, (*FUNCTIONS, ast.ClassDef)):
            found.add(node.name)
        if isinstance(node, ast.ClassDef):
            found |= {f"{node.name}.{part.name}" for part in node.body if isinstance(part, FUNCTIONS)}
        targets = (
            node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
        )
        found |= {target.id for target in targets if isinstance(target, ast.Name)}
    return found


def test_there_are_places():
    assert len(PLACES) > 20


@pytest.mark.parametrize(("file", "name"), PLACES)
def test_the_place_exists(file, name):
    path = next((base / file for base in (ROOT / "src" / "assay", ROOT) if (base / file).is_file()), None)
    assert path is not None, f"no file {file}"
    assert name in names_of(path), f"{file} does not define {name}"


def test_every_package_has_its_line():
    """The list of packages in ARCHITECTURE.md names each folder of the house."""
    text = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
    packages = [path.name for path in (ROOT / "src" / "assay").iterdir() if (path / "__init__.py").is_file()]
    cores = [f"core/{path.name}" for path in (ROOT / "src" / "assay" / "methods" / "core").iterdir() if path.is_dir()]
    for name in [*packages, *(core for core in cores if "__pycache__" not in core)]:
        assert f"{name}/" in text, f"ARCHITECTURE.md does not say what {name}/ is for"
