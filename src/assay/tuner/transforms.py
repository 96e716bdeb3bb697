"""Finding transforms: every module under `assay.methods` that defines `transform`, and those that other packages provide.

A module is imported only if its text defines the name, so looking through the methods costs no imports. Other packages use the
entry-point group `assay.papers`: each entry point names a module with a `transform`.
"""

from __future__ import annotations

import ast
import difflib
import importlib
import pkgutil
from functools import cache
from importlib import metadata, util
from pathlib import Path

from assay.checks import shown
from assay.errors import InputError
from assay.methods.transform import SLOTS, Transform


@cache
def transforms() -> dict[str, Transform]:
    """Every transform by name, in slot order. Raises InputError when two claim the same name."""
    import assay.methods

    found: dict[str, Transform] = {}
    modules = [
        f"{family.name}.{module.name}"
        for family in pkgutil.iter_modules(assay.methods.__path__, "assay.methods.")
        if family.ispkg
        for module in pkgutil.iter_modules(
            [str(Path(p) / family.name.rsplit(".", 1)[1]) for p in assay.methods.__path__]
        )
        if _defines_transform(f"{family.name}.{module.name}")
    ]
    modules += [entry.value for entry in metadata.entry_points(group="assay.papers")]
    for name in modules:
        transform = getattr(importlib.import_module(name), "transform", None)
        if not isinstance(transform, Transform):
            raise InputError(
                f"{name}.transform is not a transform: it needs name, slot, goals, exact, applies_to, configs and apply"
            )
        if transform.name in found:
            raise InputError(f"two transforms are called {transform.name!r}; one of them is in {name}")
        found[transform.name] = transform
    return dict(sorted(found.items(), key=lambda item: (SLOTS.index(item[1].slot), item[0])))


def get_transform(name: str) -> Transform:
    """The transform of that name. Raises InputError that names the closest match and lists all of them."""
    known = transforms()
    if name not in known:
        near = difflib.get_close_matches(str(name), known, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise InputError(f"no transform is called {shown(name)}; {hint}there are: {', '.join(known)}")
    return known[name]


def is_paper(name: str) -> bool:
    """Whether a transform is a paper's method; assay's own (`methods.builtin`) are nobody's paper."""
    return not type(get_transform(name)).__module__.startswith("assay.methods.builtin.")


def _defines_transform(module: str) -> bool:
    spec = util.find_spec(module)
    if spec is None or spec.origin is None or not spec.origin.endswith(".py"):
        return False
    for node in ast.parse(Path(spec.origin).read_text(encoding="utf-8")).body:
        targets = (
            node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
        )
        if any(isinstance(target, ast.Name) and target.id == "transform" for target in targets):
            return True
    return False
