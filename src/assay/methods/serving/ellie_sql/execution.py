"""Running SQL that a model wrote: read-only, one SELECT, whitelisted functions, bounded steps, seconds, rows and bytes.

Four fences stand one behind the other: the file is opened read-only; an authorizer allows reading the database's own tables and
calling functions of a list, and nothing else (no ATTACH, no PRAGMA, no writing, no recursion, no schema tables); SQLite's own
limits bound the statement, its columns and each value; a progress handler ends what takes too long or spills too much. Sorting and
temporary results go through a page cache of bounded size and from there to an unnamed temporary file.

No fence ends a single instruction of SQLite's machine: the sort behind an ORDER BY may run on for a second or so. For limits that the
operating system holds, run queries in a child process.
"""

from __future__ import annotations

import math
import os
import re
import sqlite3
import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

from assay import checks
from assay.methods.serving.ellie_sql.functions import FUNCTIONS, MOST_COPIES, copies, replaced

Mode = Literal["set", "multiset", "ordered"]
MODES: tuple[Mode, ...] = ("set", "multiset", "ordered")
State = Literal["ok", "denied", "error", "steps", "time", "rows", "memory", "disk"]
_EVERY = 500  # instructions of SQLite's machine between two looks at the clock
_LOOK = 0.01  # seconds between two looks at the temporary files
_SIMPLE = re.compile(r"[a-z_][a-z0-9_]*", re.IGNORECASE | re.ASCII)
_RESERVED = frozenset(
    [
        "add",
        "all",
        "alter",
        "and",
        "as",
        "asc",
        "between",
        "by",
        "case",
        "check",
        "collate",
        "commit",
        "constraint",
        "create",
        "cross",
        "current_date",
        "current_time",
        "current_timestamp",
        "default",
        "deferrable",
        "delete",
        "desc",
        "distinct",
        "drop",
        "else",
        "end",
        "escape",
        "except",
        "exists",
        "foreign",
        "from",
        "full",
        "group",
        "having",
        "if",
        "in",
        "index",
        "inner",
        "insert",
        "intersect",
        "into",
        "is",
        "isnull",
        "join",
        "key",
        "left",
        "like",
        "limit",
        "match",
        "natural",
        "not",
        "notnull",
        "null",
        "of",
        "offset",
        "on",
        "or",
        "order",
        "outer",
        "primary",
        "references",
        "right",
        "rollback",
        "select",
        "set",
        "table",
        "then",
        "to",
        "transaction",
        "trigger",
        "union",
        "unique",
        "update",
        "using",
        "values",
        "view",
        "when",
        "where",
        "with",
        "without",
    ]
)


def identifier(name: str) -> str:
    """A name of a table or column as it stands in SQL: quoted where it has to be.

    >>> identifier("lines"), identifier("order"), identifier("unit price"), identifier('a"b')
    ('lines', '"order"', '"unit price"', '"a""b"')
    """
    if _SIMPLE.fullmatch(name) and name.lower() not in _RESERVED:
        return name
    return '"' + name.replace('"', '""') + '"'


def opened(path: str | Path, *, seconds: float = 5.0) -> sqlite3.Connection:
    """A SQLite file opened so that nothing is written, neither it nor files beside it; `seconds` is how long a writer is waited for.

    A file in WAL mode that nobody has open is read as it stands; one that a program has open is read through that program's files.
    Raises ValueError for a file that is not there, and one whose write-ahead log was left behind by a program that died: it holds
    what reading would first have to put in its place.
    """
    found = Path(path).absolute()
    if not found.is_file():
        raise ValueError(f"path must name a SQLite file, got {str(path)!r}")
    try:
        with open(found, "rb") as file:
            in_wal = file.read(20)[18:20] == b"\x02\x02"
    except OSError as error:
        raise ValueError(f"path must name a SQLite file, {str(path)!r} cannot be read: {error.strerror}") from None
    mode = "mode=ro"
    if in_wal:
        log, index = (found.with_name(found.name + end) for end in ("-wal", "-shm"))
        held = log.is_file() and log.stat().st_size > 0
        if held and not index.is_file():
            raise ValueError(
                f"path must name a SQLite file that was closed, {str(path)!r} has a write-ahead log: open it once with sqlite3"
            )
        mode = "mode=ro" if index.is_file() and log.is_file() else "mode=ro&immutable=1"
    return sqlite3.connect(f"{found.as_uri()}?{mode}", uri=True, timeout=seconds)


@dataclass(frozen=True)
class Limits:
    """What one query may use.

    `steps` bounds the instructions of SQLite's virtual machine (`_EVERY` more at most), which is the same on every machine;
    `seconds` is the clock's bound behind it (a writer's lock is waited for as long besides). `rows` and `result_bytes` bound what
    comes back, `value_bytes` any single value, `columns` those of one row (never fewer than the widest table has), `cache_kib` the
    pages held in memory. Together they bound the memory of a query to about the cache, the result and two rows. `temp_bytes` bounds
    what spills to temporary files, on Linux only: it is looked at a hundred times a second.
    """

    steps: int = 50_000_000
    seconds: float = 5.0
    rows: int = 10_000
    result_bytes: int = 8 << 20
    value_bytes: int = 1 << 20
    columns: int = 100
    sql_bytes: int = 20_000
    cache_kib: int = 4096
    temp_bytes: int = 256 << 20

    def __post_init__(self) -> None:
        for name in ("steps", "rows", "result_bytes", "value_bytes", "columns", "sql_bytes", "cache_kib", "temp_bytes"):
            checks.whole(name, getattr(self, name), low=1)
        checks.number("seconds", self.seconds, above=0)


@dataclass(frozen=True)
class Executed:
    """What came of a query: its rows, or why there are none."""

    state: State
    rows: tuple[tuple[Any, ...], ...] = ()
    error: str = ""

    @property
    def ok(self) -> bool:
        """Whether it ran to its end."""
        return self.state == "ok"

    @property
    def empty(self) -> bool:
        """Whether it failed or found nothing: what an execution-guided pipeline repairs."""
        return not self.ok or not self.rows


class Database:
    """A SQLite file for queries nobody has looked at.

    `tables` may narrow what can be read (None: every table and view but SQLite's own, and but views that do not work). Use it as a
    context manager, in the thread that made it.
    Raises ValueError for a file that is not there or no database, RuntimeError for a query in another thread or after `close`.

    >>> import tempfile, pathlib
    >>> folder = tempfile.TemporaryDirectory()
    >>> path = pathlib.Path(folder.name) / "toy.db"
    >>> made = sqlite3.connect(path)
    >>> _ = made.executescript("CREATE TABLE t(a); INSERT INTO t VALUES (1), (2)")
    >>> made.close()
    >>> with Database(path) as database:
    ...     database.run("SELECT SUM(a) FROM t").rows, database.run("DROP TABLE t").state
    (((3,),), 'denied')
    >>> folder.cleanup()
    """

    def __init__(self, path: str | Path, *, limits: Limits | None = None, tables: Sequence[str] | None = None) -> None:
        self.path, self.limits = Path(path).absolute(), limits or Limits()
        self._made = opened(path, seconds=self.limits.seconds)
        try:
            self._columns = _readable(self._made)
            if tables is not None and (strange := set(tables) - set(self._columns)):
                raise ValueError(f"tables must be among {sorted(self._columns)}, got {sorted(strange)}")
            self.tables = frozenset(self._columns if tables is None else tables)
            self._prepare()
        except sqlite3.DatabaseError as error:
            self._made.close()
            raise ValueError(f"path must name a SQLite file, got {str(path)!r}: {error}") from None
        except BaseException:
            self._made.close()
            raise
        self._thread: int | None = threading.get_ident()
        self._deadline, self._left, self._next_look, self._spilled = 0.0, 0, 0.0, 0
        self._why: State = "error"
        self._raised: BaseException | None = None

    def _prepare(self) -> None:
        made, limits = self._made, self.limits
        made.text_factory = lambda data: data.decode("utf-8", "replace")
        made.execute("PRAGMA query_only = 1")
        made.execute("PRAGMA temp_store = 1")  # files, unlinked while they are open, not memory
        made.execute(f"PRAGMA cache_size = -{limits.cache_kib}")
        widest = max(map(len, self._columns.values()), default=1)
        for which, most in (
            (sqlite3.SQLITE_LIMIT_LENGTH, limits.value_bytes),
            (sqlite3.SQLITE_LIMIT_SQL_LENGTH, limits.sql_bytes),
            (sqlite3.SQLITE_LIMIT_COLUMN, max(limits.columns, widest)),
            (sqlite3.SQLITE_LIMIT_ATTACHED, 0),
            (sqlite3.SQLITE_LIMIT_EXPR_DEPTH, 100),
            (sqlite3.SQLITE_LIMIT_COMPOUND_SELECT, 20),
            (sqlite3.SQLITE_LIMIT_VARIABLE_NUMBER, 0),
            (sqlite3.SQLITE_LIMIT_WORKER_THREADS, 0),
        ):
            made.setlimit(which, most)
        for (name, count), function in replaced(self._look).items():
            made.create_function(name, count, function, deterministic=True)
        made.set_authorizer(self._allowed)
        made.set_progress_handler(self._too_long, _EVERY)

    # SQLite calls these three, and swallows what they raise: a Ctrl-C must not get lost

    def _allowed(
        self, action: int, first: str | None, second: str | None, schema: str | None, inner: str | None
    ) -> int:
        try:
            fine = (
                action == sqlite3.SQLITE_SELECT
                or (action == sqlite3.SQLITE_READ and first in self.tables and schema in ("main", None))
                or (action == sqlite3.SQLITE_FUNCTION and (second or "").lower() in FUNCTIONS)
            )
            return sqlite3.SQLITE_OK if fine else sqlite3.SQLITE_DENY
        except BaseException as error:
            self._raised = error
            return sqlite3.SQLITE_DENY

    def _too_long(self) -> int:
        try:
            now = time.monotonic()
            self._left -= _EVERY
            if self._left <= 0:
                self._why = "steps"
            elif now > self._deadline:
                self._why = "time"
            elif now > self._next_look:
                self._next_look = now + _LOOK
                if _spilled() - self._spilled > self.limits.temp_bytes:
                    self._why = "disk"
            return int(self._why != "error")
        except BaseException as error:
            self._raised = error
            return 1

    def _look(self) -> None:
        try:
            late = time.monotonic() > self._deadline
        except BaseException as error:
            self._raised = error
            raise
        if late:
            self._why = "time"
            raise TimeoutError

    def run(self, sql: str) -> Executed:
        """Run one query. Never raises for what is wrong with the query: `Executed.state` says it. TypeError for what is no text."""
        if not isinstance(sql, str):
            raise TypeError(f"sql must be a string, got {checks.shown(sql)}")
        if self._thread != threading.get_ident():
            closed = self._thread is None
            raise RuntimeError("the database is closed" if closed else "a Database may be used by one thread only")
        limits, now = self.limits, time.monotonic()
        self._deadline, self._left, self._why, self._raised = now + limits.seconds, limits.steps, "error", None
        self._next_look, self._spilled = now + _LOOK, _spilled()
        if copies(sql[: limits.sql_bytes]) > MOST_COPIES:
            return Executed("memory", error=f"more than {MOST_COPIES} copies of common table expressions")
        rows: list[tuple[Any, ...]] = []
        size = 0
        try:
            cursor = self._made.execute(sql)
            try:
                if cursor.description is None:
                    return Executed("error", error="no query")
                for row in cursor:
                    size += sum(len(value) if isinstance(value, str | bytes) else 8 for value in row)
                    rows.append(row)
                    if len(rows) > limits.rows:
                        return Executed("rows", error=f"more than {limits.rows} rows")
                    if size > limits.result_bytes:
                        return Executed("memory", error=f"more than {limits.result_bytes} bytes of result")
            finally:
                cursor.close()
        except (sqlite3.Error, sqlite3.Warning, UnicodeEncodeError, ValueError, OverflowError, MemoryError) as error:
            if self._raised is not None:
                raise self._raised from None
            return Executed(_state(error, self._why), error=str(error)[:300])
        return Executed("ok", tuple(rows))

    def holds(self, table: str, column: str, value: str) -> bool:
        """Whether a column has a value, upper and lower case of ASCII letters taken as one.

        False too where looking takes too long. Raises ValueError for a table or column that is not there.
        """
        if table not in self.tables or column not in self.columns(table):
            raise ValueError(f"no column {table}.{column} here")
        quoted = value.replace("'", "''")
        full = f"{identifier(table)}.{identifier(column)}"
        found = self.run(f"SELECT 1 FROM {identifier(table)} WHERE {full} = '{quoted}' COLLATE NOCASE LIMIT 1")
        return bool(found.rows)

    def columns(self, table: str) -> tuple[str, ...]:
        """The columns of a table. Raises ValueError for a table that is not there."""
        if table not in self.tables:
            raise ValueError(f"no table {table!r} here")
        return self._columns[table]

    def close(self) -> None:
        """Close the file."""
        self._made.close()
        self._thread = None

    def __enter__(self) -> Database:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _readable(made: sqlite3.Connection) -> dict[str, tuple[str, ...]]:
    """The columns of each table and view but SQLite's own; without views that do not work."""
    names = [name for (name,) in made.execute("SELECT name FROM sqlite_master WHERE type IN ('table', 'view')")]
    found = {}
    for name in names:
        if not name.lower().startswith("sqlite_"):
            try:
                listed = made.execute(f"SELECT * FROM {identifier(name)} LIMIT 0").description
            except sqlite3.OperationalError:
                continue
            found[name] = tuple(one[0] for one in listed)
    return found


def _spilled() -> int:
    """The bytes of this process's temporary files of SQLite; 0 where the system does not say."""
    total = 0
    try:
        for name in os.listdir("/proc/self/fd"):
            try:
                if "/etilqs_" in os.readlink(f"/proc/self/fd/{name}"):
                    total += os.stat(f"/proc/self/fd/{name}").st_size
            except OSError:
                continue  # closed meanwhile
    except OSError:
        return 0
    return total


def _state(error: BaseException, why: State) -> State:
    text = str(error)
    if why in ("steps", "time", "disk"):
        return why
    if "not authorized" in text or "prohibited" in text or "authorizer" in text:
        return "denied"
    if "too big" in text or isinstance(error, MemoryError):
        return "memory"
    if "is full" in text:
        return "disk"
    return "error"


def same_result(predicted: Executed, gold: Executed, *, mode: Mode = "set") -> bool:
    """Execution accuracy of one query: whether two results are equal. A query that failed equals nothing.

    "set", the paper's: order and repeated rows are ignored, so that a missing DISTINCT or ORDER BY passes; "multiset": repetitions count;
    "ordered": order counts too. Two empty results are equal in all modes. Two numbers of SQLite's REAL are compared to
    ten digits, since the order of a sum may change the last ones, two INTEGERs exactly; 1 equals 1.0.
    Raises ValueError for another mode, or a `gold` that failed itself.

    >>> a, b = Executed("ok", ((1,), (2,), (2,))), Executed("ok", ((2,), (1,)))
    >>> [same_result(a, b, mode=mode) for mode in MODES]
    [True, False, False]
    """
    checks.choice("mode", mode, MODES)
    if not gold.ok:
        raise ValueError(f"gold must have run, got {gold.state}: {gold.error}")
    return predicted.ok and result_key(predicted, mode) == result_key(gold, mode)


def result_key(executed: Executed, mode: Mode = "set") -> Any:
    """Something hashable that two results share exactly if they are equal in a mode."""
    rows = [tuple(_rounded(v) if isinstance(v, float) else v for v in row) for row in executed.rows]
    if mode == "set":
        return frozenset(rows)
    return frozenset(Counter(rows).items()) if mode == "multiset" else tuple(rows)


def _rounded(value: float) -> float:
    if not math.isfinite(value):
        return value
    nearest = float(round(value))
    return nearest if abs(value - nearest) <= 1e-10 * abs(value) else float(f"{value:.10g}")
