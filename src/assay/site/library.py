"""Everything the pages show, read once: the catalogue, the shipped records, the store's, and the verdicts on them as of now.

A page asks the store one question (is there anything new?), however many records it holds; what is new is added to what is known.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

from assay import catalogue
from assay.catalogue import Claim, Paper
from assay.errors import AssayError
from assay.evidence import hashes, shipped, tuned
from assay.evidence.reading import Damaged
from assay.evidence.record import Evidence
from assay.evidence.store import Row, Store
from assay.evidence.tuned import Pair, StepRecord, TuneRun
from assay.evidence.types import Verdict
from assay.evidence.verdict import Summary, summaries

Origin = Literal["you", "authors", "others"]
ORIGINS: dict[Origin, str] = {
    "you": "measured on this machine",
    "authors": "measured by assay's authors",
    "others": "imported, or measured elsewhere",
}
PLANNED, CODE = "planned", "not measured"
WORDS = (*(verdict.value for verdict in Verdict), "stale", "failed")
"""What a claim's chip can say, besides that nothing was measured."""
WAIT = 2.0  # seconds that a page waits for another one that asks the store; then it shows what was known before


@dataclass(frozen=True)
class Seen:
    """A claim on one machine, as one origin measured it: origins are never mixed into one verdict."""

    summary: Summary
    origin: Origin

    @property
    def word(self) -> str:
        """The verdict, "stale", or "failed" whichever way it failed."""
        word = self.summary.word
        return word if word in WORDS else "failed"

    @property
    def record(self) -> Evidence:
        return self.summary.deciding


@dataclass(frozen=True)
class Tuned:
    """A run of `assay tune`: whose it is, and the transforms whose code has changed since."""

    run: TuneRun
    origin: Origin
    changed: frozenset[str]

    @property
    def pairs(self) -> tuple[Pair, ...]:
        """Every two methods in one of its measured recipes."""
        return tuned.pairs(self.run)

    def stale(self, steps: Iterable[StepRecord] | None = None) -> bool:
        """Whether the code of some steps (of the recipe that was found, unless told otherwise) has changed since they were measured."""
        return any(step.transform in self.changed for step in (self.run.steps if steps is None else steps))

    @property
    def word(self) -> str:
        """Of the recipe: "proven", "not proven", or "stale"."""
        return tuned.word_of(self.run, self.changed)


@dataclass(frozen=True)
class Library:
    """What was known at one moment. `seen` is by claim, `tuned` by id, the newest first; `mark` changes whenever anything else does."""

    seen: dict[str, tuple[Seen, ...]]
    records: dict[str, tuple[Evidence, Origin]]
    machines: dict[str, dict[str, Any]]
    here: str
    damaged: tuple[Damaged, ...] = ()
    trouble: str = ""  # why the store could not be read
    mark: str = ""
    status: dict[str, str] = field(default_factory=dict)
    tuned: dict[str, Tuned] = field(default_factory=dict)

    @property
    def papers(self) -> tuple[Paper, ...]:
        return catalogue.papers()

    def of(self, claim: Claim | str, machine: str = "") -> tuple[Seen, ...]:
        """What was seen of a claim, on one machine if that is given."""
        found = self.seen.get(claim if isinstance(claim, str) else claim.id, ())
        return tuple(seen for seen in found if machine in ("", seen.summary.fingerprint))

    def like(self, fingerprint: str) -> frozenset[str]:
        """The machines that do what this one does: all of its instruction sets, as many cores at least. Itself always."""
        mine = self.machines.get(fingerprint, {})
        wanted, least = flags(mine), cores(mine) or 0
        return frozenset(
            name
            for name, other in self.machines.items()
            if name == fingerprint or (wanted and wanted <= flags(other) and (cores(other) or 0) >= least)
        )


def flags(facts: dict[str, Any]) -> frozenset[str]:
    """The instruction sets of a machine; records from elsewhere may hold anything there."""
    found = facts.get("flags")
    return (
        frozenset(flag for flag in found if isinstance(flag, str)) if isinstance(found, list | tuple) else frozenset()
    )


def cores(facts: dict[str, Any]) -> int | None:
    """The logical cores of a machine, None where that is no number of cores."""
    found = facts.get("cores")
    return found if type(found) is int and 0 < found < 10**9 else None


class Shelf:
    """Keeps a `Library` up to date with the store; one for a server, used from several threads."""

    def __init__(
        self, url: str | None = None, *, here: str | None = None, machine: dict[str, Any] | None = None
    ) -> None:
        if here is None:
            from assay.measure.machine import machine as asked

            found = asked()
            here, machine = found.fingerprint, found.as_dict()
        self._url, self._here, self._machine = url, here, machine or {}
        self._lock = threading.Lock()
        self._store: Store | None = None
        self._file: tuple[int, int] | None = None  # which file the store is, by device and inode
        self._stale: dict[str, bool] = {}
        self._library: Library | None = None
        self._begin()

    def _begin(self) -> None:
        """Know the authors' records alone."""
        self._last = self._last_run = 0  # the store's rows up to which everything is known
        self._records: dict[str, tuple[Evidence, Origin]] = {}
        theirs = shipped.read()
        self._damaged = list(theirs.damaged)
        self._groups: dict[tuple[str, Origin], list[Evidence]] = {}
        self._seen: dict[tuple[str, Origin], list[Seen]] = {}
        self._machines: dict[str, dict[str, Any]] = {self._here: self._machine}
        self._tuned: dict[str, Tuned] = {}
        self._add(((record, "authors") for record in theirs.records), set())
        for run in shipped.runs():
            self._add_run(run, "authors")

    def library(self) -> Library:
        """What is known now; asks the store for what came since the last time.

        While another thread waits long for the store (somebody may have locked it), what was known before.
        """
        before = self._library
        if not self._lock.acquire(timeout=-1 if before is None else WAIT):
            assert before is not None
            return before
        try:
            changed: set[tuple[str, Origin]] = set()
            trouble = ""
            try:
                self._add(self._new(), changed)
            except AssayError as error:
                trouble = str(error)
            if self._library is None or changed or trouble != self._library.trouble:
                self._library = self._built(trouble)
            return self._library
        finally:
            self._lock.release()

    def close(self) -> None:
        with self._lock:
            if self._store is not None:
                self._store.close()
                self._store = None

    def _new(self) -> Iterable[tuple[Evidence, Origin]]:
        if self._store is not None and self._file != _file_of(self._store):  # removed, or another one put in its place
            self._store.close()
            self._store, self._library = None, None
            self._begin()
        if self._store is None:
            self._store = Store(self._url)
            self._file = _file_of(self._store)
        for row in self._store.news(after=self._last, runs_after=self._last_run):
            if row.kind == "run":
                self._last_run = row.seq
                self._take_run(row)
                continue
            self._last = row.seq
            found = row.read()
            if isinstance(found, Damaged):
                self._damaged.append(found)
                self._library = None
                continue
            yield found, self._origin(row, found.fingerprint)

    def _origin(self, row: Row, fingerprint: str) -> Origin:
        return "you" if not row.imported and fingerprint == self._here else "others"

    def _take_run(self, row: Row) -> None:
        run = row.read_run()
        if isinstance(run, Damaged):
            self._damaged.append(run)
        elif run.id in self._tuned:  # the authors' own, imported
            return
        else:
            self._add_run(run, self._origin(row, run.fingerprint))
        self._library = None

    def _add_run(self, run: TuneRun, origin: Origin) -> None:
        self._tuned[run.id] = Tuned(run, origin, tuned.changes(run))
        if not self._machines.get(run.fingerprint):
            self._machines[run.fingerprint] = dict(run.machine)

    def _add(self, new: Iterable[tuple[Evidence, Origin]], changed: set[tuple[str, Origin]]) -> None:
        for record, origin in new:
            if record.id in self._records:  # the authors' own records, imported
                continue
            self._records[record.id] = (record, origin)
            self._groups.setdefault((record.claim, origin), []).append(record)
            if not self._machines.get(record.fingerprint):  # the first record that says something of it
                self._machines[record.fingerprint] = dict(record.machine)
            changed.add((record.claim, origin))
        for claim, origin in changed:
            found = summaries(self._groups[claim, origin], is_stale=self._is_stale)
            self._seen[claim, origin] = [Seen(summary, origin) for summary in found]

    def _is_stale(self, record: Evidence) -> bool:
        if record.id not in self._stale:
            self._stale[record.id] = hashes.is_stale(record)
        return self._stale[record.id]

    def _built(self, trouble: str) -> Library:
        seen: dict[str, list[Seen]] = {}
        for (claim, _), found in self._seen.items():
            seen.setdefault(claim, []).extend(found)
        ordered = {claim: tuple(sorted(found, key=_first)) for claim, found in seen.items()}
        undecided = (None, Verdict.UNDECIDED, Verdict.NEEDS_HARDWARE)
        measured = {
            claim.split("/")[0]
            for claim, found in ordered.items()
            if any(s.summary.verdict not in undecided for s in found)
        }
        status = {
            paper.slug: "measured" if paper.status == "code" and paper.slug in measured else paper.status
            for paper in catalogue.papers()
        }
        newest = sorted(self._tuned.values(), key=lambda found: (found.run.created, found.run.id), reverse=True)
        counts = (len(self._records), self._last, len(self._tuned), self._last_run, len(self._damaged))
        return Library(
            ordered,
            dict(self._records),
            dict(self._machines),
            self._here,
            tuple(self._damaged),
            trouble,
            "-".join([*map(str, counts), f"{hash(trouble) & 0xFFFF:x}"]),
            status,
            {found.run.id: found for found in newest},
        )


def _file_of(store: Store) -> tuple[int, int] | None:
    """Which file a store is; None where it is no file, or a file that is gone."""
    try:
        found = None if store.path is None else store.path.stat()
    except OSError:
        return None
    return None if found is None else (found.st_dev, found.st_ino)


def _first(seen: Seen) -> tuple[bool, int, float]:
    """Decided ones before stale ones, one's own before the authors', the newest before older ones."""
    return (
        seen.summary.verdict is None,
        ("you", "authors", "others").index(seen.origin),
        -seen.record.created.timestamp(),
    )
