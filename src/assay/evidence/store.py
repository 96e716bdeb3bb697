"""Where evidence is kept: SQLite by default, PostgreSQL if `ASSAY_DATABASE_URL` is set; append-only, JSON lines in and out.

The store offers no way to change or remove a record, and triggers in the database refuse both. If a record cannot be written
(read-only database, full disk, lost server), it goes to a JSON-lines file beside the database, and the error names that file;
`assay evidence import` reads it back in.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
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
from assay.evidence.record import Evidence, parse
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
)


class StoreError(AssayError):
    """The store cannot be opened, read or written. Exit code 2."""


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
            hint = f"the record is kept in {kept}; once this is solved: assay evidence import {kept}"
            if kept is None:
                hint = "the record could be written nowhere else and is printed above as a line of JSON"
            raise StoreError(f"{error}; {hint}") from error

    def add(self, records: Iterable[Evidence]) -> Imported:
        """Store records, all or none of them; existing ones are left alone."""
        insert = sqlite.insert if self._is_sqlite else postgresql.insert
        added = total = 0
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
                }
                statement = (
                    insert(table).values(row).on_conflict_do_nothing(index_elements=["id"]).returning(table.c.seq)
                )
                added += connection.execute(statement).scalar() is not None
                total += 1
        return Imported(added, total - added)

    def add_runs(self, runs: Iterable[tuned.TuneRun]) -> Imported:
        """Store runs of `assay tune`, all or none of them; existing ones are left alone."""
        insert = sqlite.insert if self._is_sqlite else postgresql.insert
        added = total = 0
        with self._errors("write to"), self._begin(write=True) as connection:
            for run in runs:
                row = {"id": run.id, "fingerprint": run.fingerprint, "run": run.to_json()}
                statement = (
                    insert(tuned_table)
                    .values(row)
                    .on_conflict_do_nothing(index_elements=["id"])
                    .returning(tuned_table.c.seq)
                )
                added += connection.execute(statement).scalar() is not None
                total += 1
        return Imported(added, total - added)

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

    def records(
        self,
        *,
        slug: str | None = None,
        claim: str | None = None,
        scale: str | None = None,
        status: str | None = None,
        fingerprint: str | None = None,
        last: int | None = None,
    ) -> list[Evidence]:
        """The records that fit, oldest first; with `last` only that many of the newest."""
        wanted = {"slug": slug, "claim": claim, "scale": scale, "status": status, "fingerprint": fingerprint}
        query = sa.select(table.c.record).order_by(table.c.seq.desc())
        for name, value in wanted.items():
            if value is not None:
                query = query.where(table.c[name] == str(value))
        if last is not None:
            query = query.limit(last)
        with self._errors("read"), self._begin() as connection:
            found = list(connection.execute(query).scalars())
        return [parse(text, f"a record in {self.name}") for text in reversed(found)]

    def runs(self) -> list[tuned.TuneRun]:
        """The runs of `assay tune`, oldest first."""
        query = sa.select(tuned_table.c.run).order_by(tuned_table.c.seq)
        with self._errors("read"), self._begin() as connection:
            found = list(connection.execute(query).scalars())
        return [tuned.parse(text, f"a run in {self.name}") for text in found]

    def news(self, *, after: int = 0, runs_after: int = 0) -> list[tuple[str, int, str]]:
        """What came behind the record `after` and the run `runs_after`, in one question: "record" or "run", its number, its text.

        Records first, each kind oldest first, as text, unchecked.
        """
        records = sa.select(sa.literal_column("'record'").label("kind"), table.c.seq, table.c.record.label("text"))
        runs = sa.select(sa.literal_column("'run'").label("kind"), tuned_table.c.seq, tuned_table.c.run.label("text"))
        both = sa.union_all(records.where(table.c.seq > after), runs.where(tuned_table.c.seq > runs_after)).subquery()
        query = sa.select(both).order_by(both.c.kind, both.c.seq)
        with self._errors("read"), self._begin() as connection:
            return [(row.kind, row.seq, row.text) for row in connection.execute(query)]

    def get(self, id: str) -> Evidence:
        """The record whose id is or begins with `id`. Raises InputError when there is none, or more than one."""
        with self._errors("read"), self._begin() as connection:
            query = sa.select(table.c.id, table.c.record).where(table.c.id.startswith(id, autoescape=True)).limit(2)
            found = list(connection.execute(query))
        if not found or not id:
            raise InputError(f"no evidence with the id {id!r}; `assay evidence list` shows what is there")
        if len(found) > 1:
            raise InputError(f"more than one id begins with {id!r}; give more of it")
        return parse(found[0].record, f"record {found[0].id}")

    def count(self) -> int:
        """How many records there are."""
        with self._errors("read"), self._begin() as connection:
            return int(connection.execute(sa.select(sa.func.count()).select_from(table)).scalar_one())

    # JSON lines

    def export_jsonl(self, path: Path | str) -> int:
        """Write every record to `path`, oldest first, one a line; returns how many."""
        records = self.records()
        write_jsonl(records, path)
        return len(records)

    def import_jsonl(self, path: Path | str) -> Imported:
        """Import the records of a JSON-lines file, all or none of them; known ones are left alone.

        The `evidence.jsonl` of an artefact of `assay tune` is imported as the one run it is of. Raises InputError naming the line for
        anything that is not a record.
        """
        if _is_run(Path(path)):
            return self.add_runs([tuned.read(Path(path))])
        return self.add(read_jsonl(path))

    # Inside

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

        @event.listens_for(engine, "begin")
        def _began(connection: Connection) -> None:
            write = connection.get_execution_options().get("assay_write", False)
            connection.exec_driver_sql("BEGIN IMMEDIATE" if write else "BEGIN")

        return engine

    @contextlib.contextmanager
    def _begin(self, write: bool = False) -> Iterator[Connection]:
        with self._engine.connect().execution_options(assay_write=write) as connection, connection.begin():
            yield connection

    def _migrate(self) -> None:
        config = Config()
        config.set_main_option("script_location", str(Path(__file__).parent / "migrations").replace("%", "%%"))
        config.set_main_option("path_separator", "newline")
        script = ScriptDirectory.from_config(config)
        if self._is_current(script):
            return
        with self._migration_lock():
            if self._is_current(script):  # another process was faster
                return
            if self._is_sqlite:
                with contextlib.closing(self._engine.raw_connection()) as raw:
                    raw.execute("PRAGMA journal_mode=WAL")
            with self._begin(write=True) as connection:
                if not self._is_sqlite:
                    connection.execute(sa.text("SELECT pg_advisory_xact_lock(hashtext('assay_evidence'))"))
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


def write_jsonl(records: Iterable[Evidence], path: Path | str) -> None:
    """Write records to a file, one line of JSON each, whole or not at all."""
    with atomic_file(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        file.writelines(record.to_json() + "\n" for record in records)


def _is_run(path: Path) -> bool:
    """Whether a file begins as the evidence of an artefact does: with the summary of a run of `assay tune`."""
    try:
        with open(path, encoding="utf-8") as file:
            first = json.loads(file.readline())
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(first, dict) and first.get("kind") == "summary"


def merge_jsonl(records: Iterable[Evidence], path: Path | str) -> None:
    """Merge records into a file that may hold others: a point measured again replaces its old record, the rest stays."""

    def point(record: Evidence) -> tuple[str, ...]:
        return record.claim, point_key(record.point), record.scale, record.fingerprint

    kept = {point(record): record for record in (read_jsonl(path) if Path(path).exists() else [])}
    write_jsonl((kept | {point(record): record for record in records}).values(), path)


def read_jsonl(path: Path | str) -> list[Evidence]:
    """Read a file of JSON lines; blank lines are skipped. Raises InputError naming the file and the line that is no record."""
    try:
        lines = Path(path).read_bytes().split(b"\n")
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from None
    records = []
    for number, line in enumerate(lines, 1):
        try:
            text = line.decode("utf-8").strip()
        except UnicodeDecodeError:
            raise InputError(f"{path}, line {number}: not UTF-8 text") from None
        if text:
            records.append(parse(text, f"{path}, line {number}"))
    return records
