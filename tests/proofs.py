"""Which proofs have passed on exactly these sources, so that `make test` need not train all of them again.

A proof (`tests/experiments/*/test_*_proof.py`) trains what an experiment compares, breaks the method and asks whether the verdict falls.
What comes out is decided by its sources, so it is tried again when they have changed and left out while they are the same:
`proofs.json` holds for each proof a hash over all that it reads, written by `make test-proofs` when all of its tests have passed. That
command tries every proof; `make room` tries those of the room.

Read are: the test file, what it imports of assay and of the tests, however deep, the experiments whose claims it names, their claims
in the catalogue and their learning rates, the kernels' sources if there are kernels among that, and the pinned versions. As in
`assay.evidence.hashes`, docstrings, comments and layout do not count. Imports by a name that a program puts together are not seen, but
for experiments.
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

ROOT = Path(__file__).parents[1]
KNOWN = ROOT / "tests" / "proofs.json"
IMPORT = re.compile(
    r"^[ \t]*(?:from[ \t]+([\w.]+)[ \t]+import[ \t]+(\([^)]*\)|[^\n#]*)|import[ \t]+([\w., \t]+))", re.MULTILINE
)
CLAIM = re.compile(r"""["'](\w+)/""")


def proofs() -> list[Path]:
    """Every proof of the house."""
    return sorted((ROOT / "tests" / "experiments").glob("*/test_*_proof.py"))


def name_of(file: Path) -> str:
    return file.relative_to(ROOT).as_posix()


def known() -> dict[str, str]:
    """What `proofs.json` says: the hash with which each proof has passed."""
    found = json.loads(KNOWN.read_text(encoding="utf-8")) if KNOWN.exists() else {}
    return dict(found)


def unchanged() -> set[str]:
    """The names of the proofs that have passed on the sources as they are."""
    passed = known()
    return {name for file in proofs() if passed.get(name := name_of(file)) == hash_of(file)}


def keep(passed: Iterable[str], failed: Iterable[str]) -> None:
    """Write down which proofs have passed, and forget those that have failed or are no more."""
    there = {name_of(file): file for file in proofs()}
    found = {name: value for name, value in known().items() if name in there and name not in set(failed)}
    found |= {name: hash_of(there[name]) for name in passed if name in there}
    KNOWN.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def hash_of(proof: Path) -> str:
    """One hash over all that the proof reads."""
    from assay import catalogue
    from assay.evidence import hashes

    files, slugs = reads(proof)
    parts = [hashes.of_file(file) for file in files]
    parts += [json.dumps(asdict(catalogue.get(slug)), sort_keys=True, default=str) for slug in slugs]
    rates = json.loads((ROOT / "src/assay/experiments/rates.json").read_text(encoding="utf-8"))
    parts += [json.dumps({name: rate for name, rate in rates.items() if name.split("/")[0] in slugs}, sort_keys=True)]
    parts += [(ROOT / "constraints.txt").read_text(encoding="utf-8")]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def reads(proof: Path) -> tuple[list[Path], list[str]]:
    """The sources that a proof reads, itself among them, and the papers whose claims it names."""
    experiments: dict[str, list[Path]] = {}
    for file in (ROOT / "src/assay/experiments").glob("*/*"):
        experiments.setdefault(file.stem, []).extend(
            [file] if file.suffix == ".py" else sorted(file.rglob("*.py")) if file.is_dir() else []
        )
    named = set(CLAIM.findall(proof.read_text(encoding="utf-8")))
    slugs = sorted(slug for slug in named if slug in experiments)
    found: set[Path] = set()
    waiting = [proof, *(file for slug in slugs for file in experiments[slug])]
    while waiting:
        file = waiting.pop()
        if file not in found:
            found.add(file)
            if file != ROOT / "src/assay/__init__.py":  # which imports the whole house, by name and when asked
                waiting += _imported(file)
    kernels = ROOT / "src/assay/methods/core/kernels"
    if kernels / "__init__.py" in found:
        found |= {file for file in (kernels / "csrc").iterdir() if file.suffix in (".cpp", ".h")}
    return sorted(found), slugs


@functools.cache
def _imported(file: Path) -> tuple[Path, ...]:
    """The files of the modules that a source imports, with the packages above them, which are run first."""
    names = set()
    for base, taken, plain in IMPORT.findall(file.read_text(encoding="utf-8")):
        names |= {name.split()[0] for name in plain.split(",") if name.strip()}
        names |= {base} | {f"{base}.{name}" for name in re.findall(r"\w+", taken)}
    found = set()
    for name in names:
        parts = name.split(".")
        if parts[0] in ("assay", "tests"):
            found |= {_file(tuple(parts[:end])) for end in range(1, len(parts) + 1)}
    return tuple(sorted(path for path in found if path is not None))


@functools.cache
def _file(parts: tuple[str, ...]) -> Path | None:
    path = (ROOT / "src" if parts[0] == "assay" else ROOT).joinpath(*parts)
    file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    return file if file.is_file() else None
