"""Where evidence is kept: SQLite by default, PostgreSQL if `ASSAY_DATABASE_URL` is set; append-only, JSON lines in and out.

A row knows whether it was imported: whose a record is follows from how it came in, not from what it says of itself. Rows that are no
records come back as `Damaged` and stand in nobody's way. The store offers no way to change or remove a record, and triggers in the
database refuse both. If a record cannot be written (read-only database, full disk, lost server), it goes to a JSON-lines file beside
the database, and the error names that file; `assay evidence import FILE --mine` reads it back in.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import sys
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import filelock
import sqlalchemy as sa
from alembic import command
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import event
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.engine import URL, Connection, Engine, make_url
from sqlalchemy.exc import ArgumentError, DBAPIError, SQLAlchemyError
from sqlalchemy.pool import ConnectionPoolEntry

from assay.errors import AssayError, InputError, MissingError
from assay.evidence import tuned
from assay.evidence.reading import Damaged, Reading, read, read_file, read_run, run_line
from assay.evidence.record import Evidence
from assay.evidence.types import point_key
from assay.paths import atomic_file, data_dir

VERSION_TABLE = "assay_version"
FALLBACK = "evidence-unsaved.jsonl"
BUSY_SECONDS = 30  # how long a writer waits for another one

metadata = sa.MetaData()
table = sa.Table(
    "assay_evidence",
    metadata,
    sa.Column("seq", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), primary_key=True, autoincrement=True),
    sa.Column("id", sa.String(32), nullable=False, unique=True),
    sa.Column("claim", sa.Text(), nullable=False),
    sa.Column("slug", sa.Text(), nullable=False),
    sa.Column("scale", sa.Text(), nullable=False),
    sa.Column("status", sa.Text(), nullable=False),
    sa.Column("fingerprint", sa.Text(), nullable=False),
    sa.Column("record", sa.Text(), nullable=False),  # the whole record as JSON; the columns above only serve to find it
    sa.Column("imported", sa.Boolean(), nullable=False, server_default=sa.false()),  # it came from a file
    sa.Index("assay_evidence_slug", "slug"),
    sa.Index("assay_evidence_claim", "claim"),
)
tuned_table = sa.Table(
    "assay_tuned",
    metadata,
    sa.Column("seq", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), primary_key=True, autoincrement=True),
    sa.Column("id", sa.String(32), nullable=False, unique=True),
    sa.Column("fingerprint", sa.Text(), nullable=False),
    sa.Column("run", sa.Text(), nullable=False),  # the whole run of `assay tune` as JSON
    sa.Column("imported", sa.Boolean(), nullable=False, server_default=sa.false()),
)


class StoreError(AssayError):
    """The store cannot be opened, read or written. Exit code 2."""


@dataclass(frozen=True)
class Row:
    """A row as it stands, unchecked: its number, its id, its text, whether it was imported, and whether it is a "record" or a "run"."""

    seq: int
    id: str
    text: str
    imported: bool
    kind: str = "record"

    @property
    def where(self) -> str:
        """Where it stands, for messages."""
        return f"{'row' if self.kind == 'record' else 'run'} {self.seq} of the store, id {self.id[:12]}"

    def read(self) -> Evidence | Damaged:
        """The record in it, or why there is none."""
        return read(self.text, self.where)

    def read_run(self) -> tuned.TuneRun | Damaged:
        """The run of `assay tune` in it, or why there is none."""
        return read_run(self.text, self.where)


@dataclass(frozen=True)
class Imported:
    """How many records of a file were new."""

    added: int
    known: int  # were there already


def default_url() -> str:
    """`ASSAY_DATABASE_URL`, else the SQLite file in the data folder."""
    return os.environ.get("ASSAY_DATABASE_URL") or f"sqlite:///{data_dir() / 'evidence.db'}"


class Store:
    """The evidence store at `url` (default: `default_url()`), brought up to this version's schema when opened.

    Raises InputError for a URL that is neither SQLite nor PostgreSQL, for a file that is no database and for a database that a
    newer assay made; MissingError when the PostgreSQL driver is missing; StoreError when it cannot be opened.
    """

    def __init__(self, url: str | None = None) -> None:
        self._url = _checked_url(url or default_url())
        self.name = self._url.render_as_string(hide_password=True)
        self.path = Path(self._url.database) if self._is_sqlite and self._url.database else None
        self._engine = self._make_engine()
        try:
            with self._errors("open"):
                self._migrate()
        except BaseException:
            self._engine.dispose()
            raise

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._engine.dispose()

    # Writing

    def append(self, record: Evidence) -> bool:
        """Store a record permanently; False if it was there already.

        If the database does not take it, the record is appended to the fallback file and StoreError says where.
        """
        try:
            return self.add([record]).added == 1
        except AssayError as error:
            kept = keep_aside([record], self.fallback_paths())
            hint = f"the record is kept in {kept}; once this is solved: assay evidence import {kept} --mine"
            if kept is None:
                hint = "the record could be written nowhere else and is printed above as a line of JSON"
            raise StoreError(f"{error}; {hint}") from error

    def add(
        self, records: Iterable[Evidence], *, runs: Iterable[tuned.TuneRun] = (), imported: bool = False
    ) -> Imported:
        """Store records and runs of `assay tune`, all or none; existing ones are left alone, `imported` or not as they came in first."""
        insert = sqlite.insert if self._is_sqlite else postgresql.insert
        added = total = 0

        def put(into: sa.Table, row: dict[str, Any]) -> None:
            nonlocal added, total
            statement = insert(into).values(row).on_conflict_do_nothing(index_elements=["id"]).returning(into.c.seq)
            added += connection.execute(statement).scalar() is not None
            total += 1

        with self._errors("write to"), self._begin(write=True) as connection:
            for record in records:
                row = {
                    "id": record.id,
                    "claim": record.claim,
                    "slug": record.slug,
                    "scale": record.scale,
                    "status": record.status,
                    "fingerprint": record.fingerprint,
                    "record": record.to_json(),
                    "imported": imported,
                }
                put(table, row)
            for run in runs:
                row = {"id": run.id, "fingerprint": run.fingerprint, "run": run.to_json(), "imported": imported}
                put(tuned_table, row)
        return Imported(added, total - added)

    def add_runs(self, runs: Iterable[tuned.TuneRun], *, imported: bool = False) -> Imported:
        """Store runs of `assay tune` alone, as `add` does."""
        return self.add((), runs=runs, imported=imported)

    def check_writable(self) -> None:
        """Raise StoreError now rather than after an hour of measuring."""
        with self._errors("write to"), self._begin(write=True) as connection:
            if not self._is_sqlite:
                connection.execute(sa.text("LOCK TABLE assay_evidence IN ROW EXCLUSIVE MODE"))

    def fallback_paths(self) -> list[Path]:
        """Where a record goes if the database does not take it, in the order tried."""
        beside = self.path.parent if self.path else data_dir()
        return [beside / FALLBACK, Path(tempfile.gettempdir()) / f"assay-{os.environ.get('USER', 'user')}" / FALLBACK]

    # Reading

    def read(
        self,
        *,
        slug: str | None = None,
        claim: str | None = None,
        scale: str | None = None,
        status: str | None = None,
        fingerprint: str | None = None,
        imported: bool | None = None,
        last: int | None = None,
    ) -> Reading:
        """The records that fit, oldest first, and the damaged rows among them; with `last` only that many of the newest rows."""
        wanted = {"slug": slug, "claim": claim, "scale": scale, "status": status, "fingerprint": fingerprint}
        query = sa.select(table).order_by(table.c.seq.desc())
        for name, value in wanted.items():
            if value is not None:
                query = query.where(table.c[name] == str(value))
        if imported is not None:
            query = query.where(table.c.imported.is_(sa.true() if imported else sa.false()))
        if last is not None:
            query = query.limit(last)
        found = [(row, row.read()) for row in reversed(self._rows(query))]
        theirs = frozenset(one.id for row, one in found if row.imported and isinstance(one, Evidence))
        return replace(Reading.of(one for _, one in found), imported=theirs)

    def records(self, **wanted: Any) -> list[Evidence]:
        """The records that `read` finds, without the damaged ones."""
        return list(self.read(**wanted).records)

    def read_runs(self, *, last: int | None = None) -> Reading:
        """The runs of `assay tune`, oldest first, and the damaged rows among them; with `last` only that many of the newest rows."""
        found = reversed(self._run_rows(sa.select(tuned_table).order_by(tuned_table.c.seq.desc()).limit(last)))
        return Reading.of(row.read_run() for row in found)

    def runs(self) -> list[tuned.TuneRun]:
        """The runs of `assay tune` that `read_runs` finds, without what is damaged."""
        return list(self.read_runs().runs)

    def news(self, *, after: int = 0, runs_after: int = 0) -> list[Row]:
        """The rows behind the record `after` and the run `runs_after`, in one question: records first, each kind oldest first."""

        def rows(kind: str, of: sa.Table, text: str, behind: int) -> sa.Select[Any]:
            columns: tuple[Any, ...] = (
                sa.literal_column(f"'{kind}'").label("kind"),
                of.c.seq,
                of.c.id,
                of.c[text].label("text"),
                of.c.imported,
            )
            return sa.select(*columns).where(of.c.seq > behind)

        both = sa.union_all(
            rows("record", table, "record", after), rows("run", tuned_table, "run", runs_after)
        ).subquery()
        query = sa.select(both).order_by(both.c.kind, both.c.seq)
        with self._errors("read"), self._begin() as connection:
            return [
                Row(row.seq, row.id, _text(row.text), bool(row.imported), row.kind) for row in connection.execute(query)
            ]

    def find(self, id: str) -> Evidence | tuned.TuneRun | Damaged:
        """What stands in the row whose id is or begins with `id`: a record, or a run of `assay tune`.

        Raises InputError when there is none, or more than one.
        """
        found = [
            *self._rows(sa.select(table).where(table.c.id.startswith(id, autoescape=True)).limit(2)),
            *self._run_rows(sa.select(tuned_table).where(tuned_table.c.id.startswith(id, autoescape=True)).limit(2)),
        ]
        if not found or not id:
            raise InputError(f"no evidence with the id {id!r}; `assay evidence list` shows what is there")
        if len(found) > 1:
            raise InputError(f"more than one id begins with {id!r}; give more of it")
        return found[0].read() if found[0].kind == "record" else found[0].read_run()

    def get(self, id: str) -> Evidence:
        """The record that `find` finds. Raises InputError for a damaged one too, and for a run."""
        found = self.find(id)
        if isinstance(found, tuned.TuneRun):
            raise InputError(f"{id!r} is a run of `assay tune`, and no record")
        if isinstance(found, Damaged):
            raise InputError(str(found))
        return found

    def count(self) -> int:
        """How many records there are."""
        with self._errors("read"), self._begin() as connection:
            return int(connection.execute(sa.select(sa.func.count()).select_from(table)).scalar_one())

    # JSON lines

    def import_jsonl(self, path: Path | str, *, mine: bool = False) -> Imported:
        """Import the records and the runs of a JSON-lines file, all or none of them; known ones are left alone.

        They count as imported unless they are `mine` (a backup, or the fallback file). The `evidence.jsonl` of an artefact of
        `assay tune` is imported as the one run it is of. Raises InputError naming the line for anything that is not a record.
        """
        if _is_run(Path(path)):
            return self.add_runs([tuned.read(Path(path))], imported=not mine)
        found = read_file(path)
        return self.add(found.whole(), runs=found.runs, imported=not mine)

    # Inside

    def _rows(self, query: sa.Select[Any]) -> list[Row]:
        with self._errors("read"), self._begin() as connection:
            return [Row(row.seq, row.id, _text(row.record), bool(row.imported)) for row in connection.execute(query)]

    def _run_rows(self, query: sa.Select[Any]) -> list[Row]:
        with self._errors("read"), self._begin() as connection:
            return [
                Row(row.seq, row.id, _text(row.run), bool(row.imported), "run") for row in connection.execute(query)
            ]

    @property
    def _is_sqlite(self) -> bool:
        return self._url.get_backend_name() == "sqlite"

    def _make_engine(self) -> Engine:
        if not self._is_sqlite:
            try:
                return sa.create_engine(self._url, connect_args={"connect_timeout": 10}, pool_pre_ping=True)
            except ImportError:
                raise MissingError("PostgreSQL needs the driver psycopg: pip install 'assay[postgres]'") from None
        if self.path is not None:
            with _file_errors(self.name):
                self.path.parent.mkdir(parents=True, exist_ok=True)
        engine = sa.create_engine(self._url, connect_args={"timeout": BUSY_SECONDS})

        # SQLAlchemy says when a transaction begins, not the driver, so that a writer can take the lock at once
        # and wait for it, instead of failing when it turns from reader into writer.
        @event.listens_for(engine, "connect")
        def _connected(connection: Any, _: ConnectionPoolEntry) -> None:
            connection.isolation_level = None
            connection.text_factory = _text  # a damaged text is one damaged row, not a store that cannot be read

        @event.listens_for(engine, "begin")
        def _began(connection: Connection) -> None:
            write = connection.get_execution_options().get("assay_write", False)
            connection.exec_driver_sql("BEGIN IMMEDIATE" if write else "BEGIN")

        return engine

    @contextlib.contextmanager
    def _begin(self, write: bool = False) -> Iterator[Connection]:
        with self._engine.connect().execution_options(assay_write=write) as connection, connection.begin():
            if (
                write and not self._is_sqlite
            ):  # one writer at a time, as with SQLite: rows appear in the order of their numbers
                connection.execute(sa.text("SELECT pg_advisory_xact_lock(hashtext('assay_evidence'))"))
            yield connection

    def _migrate(self) -> None:
        script = _migrations()
        if self._is_current(script):
            return
        with self._migration_lock():
            if self._is_current(script):  # another process was faster
                return
            if self._is_sqlite:
                with contextlib.closing(self._engine.raw_connection()) as raw:
                    raw.execute("PRAGMA journal_mode=WAL")
            with self._begin(write=True) as connection:
                config = _configuration()
                config.attributes["connection"] = connection
                command.upgrade(config, "head")

    def _is_current(self, script: ScriptDirectory) -> bool:
        with self._begin() as connection:
            context = MigrationContext.configure(connection, opts={"version_table": VERSION_TABLE})
            current = context.get_current_revision()
        if current is not None and current not in {step.revision for step in script.walk_revisions()}:
            raise InputError(f"{self.name} was made by a newer assay (schema {current}): upgrade assay to use it")
        return current == script.get_current_head()

    @contextlib.contextmanager
    def _migration_lock(self) -> Iterator[None]:
        if self.path is None:
            yield
            return
        lock = self.path.with_name(self.path.name + ".lock")
        with _file_errors(self.name):
            held = filelock.FileLock(lock, timeout=BUSY_SECONDS * 2)
            held.acquire()
        try:
            yield
        finally:
            held.release()

    @contextlib.contextmanager
    def _errors(self, doing: str) -> Iterator[None]:
        """Turn database errors into one line."""
        try:
            yield
        except DBAPIError as error:
            cause = " ".join(str(error.orig).split())
            if "not a database" in cause or "malformed" in cause:
                raise InputError(f"{self.name} is not an SQLite database, or is damaged: {cause}") from error
            raise StoreError(f"cannot {doing} the evidence store {self.name}: {cause}") from error
        except SQLAlchemyError as error:
            raise StoreError(
                f"cannot {doing} the evidence store {self.name}: {' '.join(str(error).split())}"
            ) from error


def _configuration() -> Config:
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations").replace("%", "%%"))
    config.set_main_option("path_separator", "newline")
    return config


@functools.cache
def _migrations() -> ScriptDirectory:
    """Read once: it takes longer than asking a store for its version."""
    return ScriptDirectory.from_config(_configuration())


def _checked_url(text: str) -> URL:
    try:
        url = make_url(text)
    except ArgumentError:
        raise InputError(
            "ASSAY_DATABASE_URL must be a URL: sqlite:///FILE or postgresql://USER@HOST/DATABASE"
        ) from None
    backend = url.drivername.split("+")[0]
    if backend == "sqlite":
        if url.database in (None, "", ":memory:"):
            raise InputError(f"ASSAY_DATABASE_URL must name a file (sqlite:///FILE), got {text!r}")
        return url.set(drivername="sqlite")
    if backend in ("postgresql", "postgres"):
        return url.set(drivername="postgresql+psycopg")
    raise InputError(f"ASSAY_DATABASE_URL must begin with sqlite:// or postgresql://, got {url.drivername}://")


@contextlib.contextmanager
def _file_errors(name: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StoreError(f"cannot open the evidence store {name}: {error}") from error


def keep_aside(records: Iterable[Evidence], paths: Iterable[Path]) -> Path | None:
    """Append records to the first of `paths` that takes them, whole lines or nothing, and return it.

    When none does, the records are printed on stderr as a last resort, and None is returned.
    """
    text = "".join(record.to_json() + "\n" for record in records)
    for path in paths:
        with contextlib.suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            _append_whole(path, text.encode())
            return path
    print(text, end="", file=sys.stderr)
    return None


def _append_whole(path: Path, data: bytes) -> None:
    with filelock.FileLock(path.with_name(path.name + ".lock")), open(path, "ab", buffering=0) as file:
        size = file.seek(0, os.SEEK_END)
        try:
            written = 0
            while written < len(data):
                written += file.write(data[written:])
            os.fsync(file.fileno())
        except OSError:
            file.truncate(size)
            raise


def write_jsonl(records: Iterable[Evidence], path: Path | str, runs: Iterable[tuned.TuneRun] = ()) -> None:
    """Write records, and runs of `assay tune` after them, to a file, one line of JSON each, whole or not at all."""
    with atomic_file(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        file.writelines(record.to_json() + "\n" for record in records)
        file.writelines(run_line(run) + "\n" for run in runs)


def _is_run(path: Path) -> bool:
    """Whether a file begins as the evidence of an artefact does: with the summary of a run of `assay tune`."""
    try:
        with open(path, encoding="utf-8") as file:
            first = json.loads(file.readline())
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(first, dict) and first.get("kind") in tuned.FIRST


def merge_jsonl(records: Iterable[Evidence], path: Path | str) -> None:
    """Merge records into a file that may hold others: a point measured again replaces its old record, the rest and runs stay."""

    def point(record: Evidence) -> tuple[str, ...]:
        return record.claim, point_key(record.point), record.scale, record.fingerprint

    before = read_file(path) if Path(path).exists() else Reading()
    kept = {point(record): record for record in before.whole()}
    write_jsonl((kept | {point(record): record for record in records}).values(), path, before.runs)


def read_jsonl(path: Path | str) -> list[Evidence]:
    """The records of a file of JSON lines; blank lines are skipped. Raises InputError naming the file and the line that is damaged."""
    return read_file(path).whole()


def _text(value: Any) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)
