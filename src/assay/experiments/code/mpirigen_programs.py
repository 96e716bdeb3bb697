"""The programs that MPIrigen's experiments learn from and are judged on, and the list of Debian's.

`python -m assay.experiments.code.mpirigen_programs FOLDER` looks through unpacked source packages (FOLDER/package-version) for programs
that fit, and prints their hashes for `debian.json`: C, with a main that calls MPI_Init and MPI_Finalize, no longer than the paper allows.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

from assay.methods.code import mpirigen as room
from assay.methods.code.mpirigen import Stripped
from assay.workloads.programs import mpi

MOST = 2048
"""Tokens of C in a sample, its line numbers not counted."""
ALIKE = 0.5
"""Programs that share so much of their runs of four words are near-copies, and stay on one side. Our choice."""
JUDGED = 0.25
"""The share of Debian's programs that is judged (the paper: a tenth of many more). Our choice."""


@dataclass(frozen=True)
class Parts:
    """Programs to learn from and to judge on, with what the paper's model answered where that is known, and counts on the way."""

    learned: list[Stripped]
    judged: list[Stripped]
    answers: list[str] = field(default_factory=list)
    counts: dict[str, Any] = field(default_factory=dict)


@cache
def parts(corpus: str) -> Parts:
    """`released`: the authors' test programs, those without an answer to learn from; `debian`, `own`: split so that near-copies stay
    together. Raises MissingError where programs have to be fetched first."""
    if corpus == "released":
        return _released()
    texts = mpi.debian() if corpus == "debian" else mpi.own()
    found = [room.take_out(text) for text in texts.values()]
    learned, judged = split(found, JUDGED if corpus == "debian" else 0.5, seed=0)
    return Parts(learned, judged, counts={"programs": len(found), "round trips": round_trips(list(texts.values()))})


def _released() -> Parts:
    learned, judged, answers, unreadable = [], [], [], 0
    for one in mpi.released():
        found = Stripped(tuple(bare(one.code)), tuple(room.read(one.label)))
        if not found.calls or not readable(found.code):
            unreadable += 1
        elif one.answer:
            judged.append(found)
            answers.append(one.answer)
        else:
            learned.append(found)
    kept = without_copies(learned, judged)
    counts = {
        "left out, no C or no calls": unreadable,
        "left out, near-copies of judged programs": len(learned) - len(kept),
    }
    return Parts(kept, judged, answers, counts)


def without_copies(learned: Sequence[Stripped], judged: Sequence[Stripped]) -> list[Stripped]:
    """The learned programs that are near-copies of no judged one."""
    marks = [shingles(one) for one in judged]
    holders: dict[int, list[int]] = {}
    for at, mark in enumerate(marks):
        for each in mark:
            holders.setdefault(each, []).append(at)
    kept = []
    for one in learned:
        own = shingles(one)
        shared = Counter(at for each in own for at in holders.get(each, []))
        if not any(both >= ALIKE * (len(own) + len(marks[at]) - both) for at, both in shared.items()):
            kept.append(one)
    return kept


def bare(code: str) -> list[str]:
    """The lines of a numbered code, without their numbers."""
    return [re.sub(r"^\d+: ?", "", line).strip() for line in code.rstrip().splitlines()]


def readable(code: Sequence[str]) -> bool:
    """Whether every line is made of tokens of C."""
    try:
        for line in code:
            room.line_tokens(line)
    except ValueError:
        return False
    return True


def round_trips(texts: Sequence[str]) -> str:
    """Of how many programs the calls can be taken out and put back so that the same tokens stand there."""
    same = 0
    for text in texts:
        found = room.take_out(text)
        again = room.read(room.write(found.items))
        random.Random(0).shuffle(again)
        same += room.tokens(room.put_back(found.code, again)) == room.tokens(text)
    return f"{same} of {len(texts)}"


def split(found: Sequence[Stripped], share: float, *, seed: int) -> tuple[list[Stripped], list[Stripped]]:
    """Two parts, about `share` in the second; programs that are near-copies of each other, by a chain of such, lie in the same."""
    marks = [shingles(one) for one in found]
    group = list(range(len(found)))

    def root(at: int) -> int:
        while group[at] != at:
            at = group[at]
        return at

    for one in range(len(found)):
        for other in range(one):
            fewer, more = sorted((len(marks[one]), len(marks[other])))
            both = len(marks[one] & marks[other]) if fewer >= ALIKE * more else 0
            if both and both >= ALIKE * (len(marks[one]) + len(marks[other]) - both):
                group[root(one)] = root(other)
    members: dict[int, list[Stripped]] = {}
    for at, one_program in enumerate(found):
        members.setdefault(root(at), []).append(one_program)
    groups = list(members.values())
    random.Random(seed).shuffle(groups)
    first: list[Stripped] = []
    second: list[Stripped] = []
    for each in groups:
        (second if len(second) + len(each) <= share * len(found) else first).extend(each)
    return first, second


@lru_cache(maxsize=2**11)
def shingles(one: Stripped) -> frozenset[int]:
    """Runs of four words of a program with its calls, identifiers renamed; hashed."""
    names = room.naming(one.code, [item.text for item in one.items])
    words = [
        token.text
        for line in room.merged(one.code, one.items)
        if not line.startswith("#")
        for token in room.line_tokens(room.renamed(line, names))
    ]
    return frozenset(hash(tuple(words[at : at + 4])) for at in range(len(words) - 3))


def digest(found: Sequence[Stripped]) -> str:
    """A name for these programs."""
    return hashlib.sha256(repr([(one.code, one.items) for one in found]).encode()).hexdigest()[:16]


# ------------------------------------------------------------------------------------------------------------- the list of Debian's

NO_PROGRAM = re.compile(r"\b(?:class|template|namespace)\b|\bint\s+MPI_[A-Z]\w*\s*\(")


def fits(text: str) -> bool:
    """Whether a program is one of C whose main calls MPI_Init and MPI_Finalize, and is no longer than the paper allows."""
    if NO_PROGRAM.search(text) or not re.search(r"\bmain\s*\(", text):
        return False
    try:
        found = room.take_out(text)
    except ValueError:
        return False
    functions = {call.function for _, call in found.calls}
    if not {"MPI_Init", "MPI_Finalize"} <= functions:
        return False
    return sum(len(room.line_tokens(line)) for line in (*found.code, *(item.text for item in found.items))) <= MOST


def survey(folder: Path) -> list[dict[str, Any]]:
    """The packages below `folder`, each unpacked as package-version, with the programs that fit and their hashes; copies once."""
    known: set[str] = set()
    found = []
    for package in sorted(path for path in folder.iterdir() if path.is_dir()):
        files = {}
        for path in sorted(package.rglob("*.c")):
            data = path.read_bytes() if path.is_file() and not path.is_symlink() else b""
            name = hashlib.sha256(data).hexdigest()
            if b"MPI_Init" in data and name not in known and fits(data.decode("utf-8", "replace")):
                known.add(name)
                files[str(path.relative_to(package))] = name
        if files:
            found.append({"folder": package.name, "files": files})
    return found


if __name__ == "__main__":
    print(json.dumps(survey(Path(sys.argv[1])), indent=1))
