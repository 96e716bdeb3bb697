"""Fails on a package that must not be in the dependency tree, an undeclared dependency, or a test file that asserts nothing.

Run by `make test`.
"""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from importlib import metadata
from pathlib import Path

FORBIDDEN = ("torchvision", "torchaudio", "timm")
CUDA_PREFIXES = ("nvidia-", "cuda-", "cupy")


def offenders(names: list[str]) -> list[str]:
    """The installed distributions that may not be there, sorted."""
    low = {name.lower().replace("_", "-") for name in names}
    return sorted(n for n in low if n in FORBIDDEN or n.startswith(CUDA_PREFIXES))


ROOT = Path(__file__).resolve().parents[1]
OPTIONAL = {
    "pynvml",
    "lm_eval",
    "openvino",
    "openvino_genai",
    "xllamacpp",
}  # used when the user happens to have it, never installed by us


def undeclared() -> list[str]:
    """Imports in src that are neither the standard library, nor ours, nor a dependency pyproject.toml names."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = [
        *project["dependencies"],
        *(name for extra in project["optional-dependencies"].values() for name in extra),
    ]
    declared = {re.split(r"[\[<>=~! ;]", text)[0].lower().replace("_", "-") for text in wanted}
    origin = metadata.packages_distributions()
    found = set()
    for file in (ROOT / "src").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and node.module and not node.level else []
            for root in {name.split(".")[0] for name in names} - set(sys.stdlib_module_names) - {"assay"} - OPTIONAL:
                owners = {name.lower().replace("_", "-") for name in origin.get(root, [root])}
                if not owners & declared:
                    found.add(f"{root} ({file.relative_to(ROOT)})")
    return sorted(found)


def without_assertions() -> list[str]:
    """Test files that neither assert nor expect an error."""
    found = []
    for file in sorted((ROOT / "tests").rglob("test_*.py")):
        text = file.read_text(encoding="utf-8")
        checks = any(isinstance(node, ast.Assert) for node in ast.walk(ast.parse(text)))
        if not checks and "pytest.raises" not in text and "assert_close" not in text:
            found.append(str(file.relative_to(ROOT)))
    return found


if __name__ == "__main__":
    found = offenders([d.metadata["Name"] for d in metadata.distributions() if d.metadata["Name"]])
    build = metadata.version("torch")
    if found or "cu1" in build:
        sys.exit(f"these may not be in the environment: {', '.join(found) or 'torch ' + build}")
    if missing := undeclared():
        sys.exit(f"these imports are not declared in pyproject.toml: {', '.join(missing)}")
    if empty := without_assertions():
        sys.exit(f"these test files assert nothing: {', '.join(empty)}")
    print(f"environment: torch {build}, no CUDA packages, no torchvision/torchaudio/timm")
