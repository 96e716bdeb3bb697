"""C programs with MPI: a small bank of assay's own, and others' that the user fetches, known here by their hashes.

    own()                                   26 textbook programs, made up by one hand; each prints the same lines on every run
    debian()                                programs of Debian's source packages, as far as they are in the folder
    released()                              the test programs of MPIrigen's authors, and what their model answered

Nobody else's program is shipped. `debian.json` names packages, versions, licences and the hashes of the files; `commands()` says how to
fetch them. What is not exactly as it was is not read, so that the same programs are measured everywhere.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from assay.errors import InputError, MissingError
from assay.paths import cache_dir, expanded
from assay.workloads.programs.mpi.arrow import text_columns

HERE = Path(__file__).parent
VARIABLE = "ASSAY_MPI_SOURCES"
RELEASED = {
    "data/test/test/data-00000-of-00001.arrow": "70a9c059500b1b9a0af3bd5a7d1489b48053bf4aef421fb3bcff11750e39a280",
    "MonoCoder/final_results/MPI-rigen/bpe_1000_examples.jsonl": "2cb4aa69c93d5602aefea7389e0d2107b257aba89c916eaab6cd94760db0cb82",
}
"""Files of the authors' repository, which names no licence, and their hashes."""
REPOSITORY = "https://github.com/Scientific-Computing-Lab-NRCN/MPI-rigen"
ENOUGH = 0.9
"""The share of Debian's listed programs that must be there: a package may have left the archive."""


@dataclass(frozen=True)
class Answered:
    """A test program of the authors: its numbered code, the calls it was stripped of, and their model's answer ("" where none is kept)."""

    name: str
    code: str
    label: str
    answer: str


@cache
def own() -> dict[str, str]:
    """The bank's programs by name, in order of names.

    >>> len(own()), "MPI_Reduce" in own()["pi_integral"]
    (26, True)
    """
    return {path.stem: path.read_text(encoding="utf-8") for path in sorted((HERE / "bank").glob("*.c"))}


def listed() -> list[dict[str, Any]]:
    """The packages of `debian.json`: name, version, licence, and files as {path: sha256}."""
    found: list[dict[str, Any]] = json.loads((HERE / "debian.json").read_text(encoding="utf-8"))
    return found


def folder() -> Path:
    """Where fetched programs are looked for: `ASSAY_MPI_SOURCES`, or mpi-programs in the cache folder."""
    given = os.environ.get(VARIABLE)
    return expanded(given, VARIABLE) if given else cache_dir() / "mpi-programs"


def commands() -> str:
    """How to fetch everything, for a shell."""
    packages = " ".join(f"{each['package']}={each['version']}" for each in listed())
    return f"mkdir -p {folder()} && cd {folder()} && apt-get source {packages}; git clone --depth 1 {REPOSITORY}"


def debian(where: Path | None = None) -> dict[str, str]:
    """The listed programs by "package/file", wherever they lie below `where` (default `folder()`), found by name and hash.

    Raises MissingError where fewer than nine tenths of them are there, InputError for a folder that is none.
    """
    wanted = {
        (Path(path).name, digest): f"{each['package']}/{path}"
        for each in listed()
        for path, digest in each["files"].items()
    }
    found = {}
    for path in _files(where or folder(), {name for name, _ in wanted}):
        data = path.read_bytes()
        if name := wanted.get((path.name, hashlib.sha256(data).hexdigest())):
            found[name] = data.decode("utf-8", "replace")
    if len(found) < ENOUGH * len(wanted):
        raise MissingError(
            f"of {len(wanted)} programs of Debian's sources {len(found)} are there; fetch them: {commands()}"
        )
    return dict(sorted(found.items()))


def released(where: Path | None = None) -> list[Answered]:
    """The authors' 1,323 test programs in their order, the first 1,000 with what their model answered.

    Raises MissingError where a file is not there or is another than it was, InputError for a folder that is none.
    """
    at = where or folder()
    data = {}
    for name, digest in RELEASED.items():
        for path in _files(at, {Path(name).name}):
            if str(path).endswith(name) and hashlib.sha256(path.read_bytes()).hexdigest() == digest:
                data[name] = path.read_bytes()
        if name not in data:
            raise MissingError(f"{name} of the authors' repository is not below {at}; fetch it: {commands()}")
    table, answers = data.values()
    columns = text_columns(table)
    said = [json.loads(line) for line in answers.decode("utf-8").splitlines()]
    end = "<|endoftext|>"
    found = []
    for at_row, (name, code, label, *_) in enumerate(zip(*columns, strict=True)):
        answer = ""
        if at_row < len(said):
            asked = said[at_row]["label"].replace(end, "")
            if not "".join(label.split()).endswith("".join(asked.split())):
                raise InputError(f"answer {at_row} is to another program than {name}")
            label = asked  # spaced in places as the tokenizer left it, which the released scorer sees
            answer = "(" + said[at_row]["pred"].removeprefix(end)  # its first bracket is cut off
        found.append(Answered(name, code, label, answer))
    return found


def _files(where: Path, names: set[str]) -> Iterator[Path]:
    if not where.exists():
        return
    if not where.is_dir():
        raise InputError(f"{VARIABLE} must name a folder, got {where}")
    for root, folders, files in os.walk(where):
        folders.sort()
        for name in sorted(names.intersection(files)):
            yield Path(root, name)
