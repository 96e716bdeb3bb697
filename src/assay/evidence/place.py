"""Where a measurement is taken: the machine and the version of assay."""

from __future__ import annotations

import functools
import hashlib
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PACKAGE = Path(__file__).parents[1]


@dataclass(frozen=True)
class Place:
    """A machine with an installation of assay."""

    fingerprint: str
    machine: dict[str, Any]
    assay_version: str
    commit: str


@functools.cache
def here() -> Place:
    """This machine and this installation."""
    from assay.evidence.types import plain
    from assay.measure.machine import machine

    found = machine().as_dict()
    found.pop("load")  # of this moment; each record has its own
    return Place(found["fingerprint"], plain(found), found["versions"].get("assay", "unknown"), commit(PACKAGE))


def commit(package: Path) -> str:
    """The git commit of the assay checkout that `package` (the folder src/assay) is in; "" if it is in none.

    Ends in "-dirty-<hash>" if the package's files differ from that commit; the hash covers those files, so that two
    different changes are told apart.
    """

    def git(*arguments: str) -> str:
        call = ["git", "-C", str(package), *arguments]
        return subprocess.run(call, capture_output=True, text=True, check=True, timeout=60).stdout.strip()

    try:
        if not (Path(git("rev-parse", "--show-toplevel")) / "src" / "assay").samefile(package):
            return ""
        head = git("rev-parse", "HEAD")
        changed = git("status", "--porcelain", "--untracked-files=all", "--", str(package))
        return f"{head}-dirty-{_hash_of(package)}" if changed else head
    except (OSError, subprocess.SubprocessError):
        return ""


def _hash_of(package: Path) -> str:
    digest = hashlib.sha256()
    for file in sorted(package.rglob("*")):
        if file.suffix in (".py", ".toml", ".cpp", ".h") and file.is_file():
            digest.update(str(file.relative_to(package)).encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()[:8]


def lacking(needs: Iterable[str]) -> list[str]:
    """Those of an experiment's `needs` that this machine lacks: "cuda" is a GPU torch can use, anything else a CPU flag."""
    return [need for need in needs if not (_has_cuda() if need == "cuda" else need in here().machine["flags"])]


def _has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()
