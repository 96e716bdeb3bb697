"""Reading records that may come from anywhere: each text is a record that can be judged, or it is damaged and says why.

The one guard of every reader: the store, files of JSON lines and the shipped evidence read through it, and with them the commands, the
pages and the digest. Behind it no number of a record can break a verdict, a remark or a picture.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from datetime import UTC
from pathlib import Path

from assay.checks import shown
from assay.errors import InputError
from assay.evidence import tuned
from assay.evidence.record import Evidence, parse
from assay.evidence.verdict import judge, remarks


@dataclass(frozen=True)
class Damaged:
    """A text that is no record, or of which no verdict can be computed: where it stands, why, and the text as it is."""

    where: str
    why: str
    text: str = field(default="", repr=False)

    def __str__(self) -> str:
        return f"{self.where}: {self.why}"


@dataclass(frozen=True)
class Reading:
    """What was read. `imported` are the ids of the records that somebody else may have made (the store knows)."""

    records: tuple[Evidence, ...] = ()
    damaged: tuple[Damaged, ...] = ()
    imported: frozenset[str] = frozenset()
    runs: tuple[tuned.TuneRun, ...] = ()

    @staticmethod
    def of(found: Iterable[Evidence | tuned.TuneRun | Damaged]) -> Reading:
        """Records, runs of `assay tune` and damaged texts, each in their order."""
        records: list[Evidence] = []
        runs: list[tuned.TuneRun] = []
        damaged: list[Damaged] = []
        for one in found:
            if isinstance(one, Damaged):
                damaged.append(one)
            elif isinstance(one, tuned.TuneRun):
                runs.append(one)
            else:
                records.append(one)
        return Reading(tuple(records), tuple(damaged), runs=tuple(runs))

    def whole(self) -> list[Evidence]:
        """The records, for who would lose the rest by writing them. Raises InputError for the first damaged text."""
        if self.damaged:
            raise InputError(str(self.damaged[0]))
        return list(self.records)


def read(text: str, where: str) -> Evidence | Damaged:
    """The record in a text that stands at `where`, or why there is none.

    >>> print(read('{"claim": 3}', "line 7"))
    line 7: claim: Input should be a valid string
    """
    try:
        record = parse(text, where)
    except InputError as error:
        return Damaged(where, str(error).removeprefix(f"{where}: "), text)
    why = misfit(record)
    return Damaged(where, why, text) if why else record


def misfit(record: Evidence) -> str:
    """Why a well-formed record cannot be judged or shown, "" if it can.

    Its machine's fingerprint becomes a part of addresses and of names of files; of some numbers (a negative factor, a bound of 1e308)
    no verdict can be computed.
    """
    if why := _misnamed(record.fingerprint):
        return why
    try:
        if record.status == "ok":
            judge(record)
        remarks(record)
        record.created.astimezone(UTC)  # the first and the last day may lie outside of the calendar elsewhere
    except (TypeError, ValueError, ArithmeticError, AssertionError) as error:
        return f"no verdict can be computed from its numbers ({shown(str(error))})"
    return ""


def read_run(text: str, where: str) -> tuned.TuneRun | Damaged:
    """The run of `assay tune` in a text that stands at `where`, or why there is none."""
    try:
        run = tuned.parse(text, where)
    except InputError as error:
        return Damaged(where, str(error).removeprefix(f"{where}: "), text)
    why = _misnamed(run.fingerprint)
    return Damaged(where, why, text) if why else run


RUN = re.compile(r'\s*\{\s*"run"\s*:')
"""How a line begins that holds a run of `assay tune`, and no record: `{"run": {...}}`, as `run_line` writes it."""


def run_line(run: tuned.TuneRun) -> str:
    """A run as a line of a file that holds records too."""
    return f'{{"run":{run.to_json()}}}'


def read_line(text: str, where: str) -> Evidence | tuned.TuneRun | Damaged:
    """The record or the run in a line of a file, or why there is none."""
    if not RUN.match(text):
        return read(text, where)
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        return Damaged(where, f"not JSON ({shown(str(error))})", text)
    if set(found) != {"run"}:
        return Damaged(where, "a line with a run of `assay tune` holds nothing else", text)
    inner = read_run(json.dumps(found["run"]), where)
    return Damaged(where, inner.why, text) if isinstance(inner, Damaged) else inner


def _misnamed(fingerprint: str) -> str:
    if re.fullmatch(r"[A-Za-z0-9_-]{1,64}", fingerprint):
        return ""
    return f"fingerprint must be 1 to 64 letters, digits, '-' and '_', got {shown(fingerprint)}"


def read_file(path: Path | str) -> Reading:
    """A file of JSON lines, records and runs of `assay tune`; blank lines are skipped. Raises InputError for one that cannot be read."""
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from None
    return Reading.of(_lines(content, path))


def _lines(content: bytes, path: Path | str) -> Iterator[Evidence | tuned.TuneRun | Damaged]:
    for number, line in enumerate(content.split(b"\n"), 1):
        where = f"{path}, line {number}"
        try:
            text = line.decode("utf-8").strip()
        except UnicodeDecodeError:
            yield Damaged(where, "not UTF-8 text", line.decode("utf-8", "replace"))
            continue
        if text:
            yield read_line(text, where)
