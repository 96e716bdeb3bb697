"""The records that travel with assay: what its authors measured, one file a paper, and the machines once for all of them.

In a checkout they are `evidence/claims/<slug>.jsonl` and `evidence/machines.json`; in an installed package `evidence/shipped/` of it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from assay.errors import InputError
from assay.evidence import hashes, tuned
from assay.evidence.reading import Reading, read_file
from assay.evidence.record import Evidence, changed
from assay.evidence.types import Verdict, point_key
from assay.evidence.verdict import summaries
from assay.paths import atomic_file

PACKAGE = Path(__file__).parents[1]


def folder() -> Path:
    """Where the shipped evidence lies: inside the package, or in the checkout it is part of."""
    inside = Path(__file__).parent / "shipped"
    return inside if inside.is_dir() else PACKAGE.parents[1] / "evidence"


def read(slug: str | None = None, where: Path | None = None) -> Reading:
    """The shipped records of a paper, or of all, and the lines of their files that are damaged; nothing when there are none.

    Raises InputError for a file that cannot be read, and for a damaged `machines.json`.
    """
    where = where or folder()
    machines = _machines(where)
    files = sorted((where / "claims").glob("*.jsonl")) if slug is None else [where / "claims" / f"{slug}.jsonl"]
    found = [read_file(file) for file in files if file.is_file()]
    return Reading(
        tuple(changed(r, machine=machines.get(r.fingerprint, {})) for one in found for r in one.records),
        tuple(damaged for one in found for damaged in one.damaged),
    )


def records(slug: str | None = None, where: Path | None = None) -> list[Evidence]:
    """The records that `read` finds, without what is damaged."""
    return list(read(slug, where).records)


def runs(where: Path | None = None) -> list[tuned.TuneRun]:
    """The authors' runs of `assay tune` (`make demo`): files `demo*.jsonl`. Raises InputError for a file that is damaged."""
    return [tuned.read(file) for file in sorted((where or folder()).glob("demo*.jsonl"))]


def status(slug: str, code: str) -> str:
    """`measured` when a fresh record of the paper decides something, else `code`, what the catalogue knows."""
    undecided = (None, Verdict.UNDECIDED, Verdict.NEEDS_HARDWARE)
    decided = code == "code" and any(s.verdict not in undecided for s in summaries(records(slug)))
    return "measured" if decided else code


def add(new: Iterable[Evidence], where: Path) -> None:
    """Add records to a folder of evidence, a file a paper; each file is written whole or not at all.

    Of a point measured on a machine before, stale and failed records give way; fresh ones stay, so that runs which disagree show.
    Raises InputError for a file with a damaged line, which would be lost.
    """
    by_slug: dict[str, list[Evidence]] = {}
    for record in new:
        by_slug.setdefault(record.slug, []).append(record)
    machines = _machines(where)
    for slug, mine in by_slug.items():
        again = {(r.claim, point_key(r.point), r.scale, r.fingerprint) for r in mine}
        ids = {r.id for r in mine}
        kept = [
            old
            for old in read(slug, where).whole()
            if old.id not in ids
            and (
                (old.claim, point_key(old.point), old.scale, old.fingerprint) not in again
                or (old.status == "ok" and not hashes.is_stale(old))
            )
        ]
        ordered = sorted([*kept, *mine], key=lambda r: (r.claim, r.fingerprint, r.scale, r.index, r.created))
        machines |= {r.fingerprint: r.machine for r in mine}
        _write(where / "claims" / f"{slug}.jsonl", "".join(r.to_json(machine=False) + "\n" for r in ordered))
    _write(where / "machines.json", json.dumps(dict(sorted(machines.items())), indent=1, sort_keys=True) + "\n")


def _machines(where: Path) -> dict[str, Any]:
    file = where / "machines.json"
    try:
        found = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    except ValueError as error:
        raise InputError(f"{file}: not JSON ({error})") from None
    if not isinstance(found, dict):
        raise InputError(f"{file}: must be a JSON object, got {type(found).__name__}")
    for name, machine in found.items():
        if not isinstance(machine, dict):
            raise InputError(f"{file}: {name!r} must be a JSON object, got {type(machine).__name__}")
    return found


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
