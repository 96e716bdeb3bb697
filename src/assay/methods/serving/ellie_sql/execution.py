"""Running SQL that a model wrote: read-only, one SELECT, whitelisted functions, bounded steps, seconds, rows and bytes.

Four fences stand one behind the other: the file is opened read-only; an authorizer allows reading the database's own tables and
calling functions of a list, and nothing else (no ATTACH, no PRAGMA, no writing, no recursion, no schema tables); SQLite's own
limits bound the statement and each value; a progress handler ends what takes too long. Sorting and temporary results go through a page
cache of bounded size and from there to an unnamed temporary file.
"""

from __future__ import annotations

import sqlite3
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

from assay import checks

FUNCTIONS = frozenset(
    [
        "abs",
        "avg",
        "cast",
        "coalesce",
        "count",
        "ifnull",
        "iif",
        "instr",
        "length",
        "like",
        "lower",
        "ltrim",
        "max",
        "min",
        "nullif",
        "round",
        "rtrim",
        "substr",
        "substring",
        "sum",
        "total",
        "trim",
        "upper",
        "dense_rank",
        "rank",
        "row_number",
    ]
)
"""Functions that model-written SQL may call: none that reads a file, makes large values from small ones, or is random."""

Mode = Literal["set", "multiset", "ordered"]
MODES: tuple[Mode, ...] = ("set", "multiset", "ordered")
State = Literal["ok", "denied", "error", "steps", "time", "rows", "memory"]
_EVERY = 1000  # instructions of SQLite's machine between two looks at the clock


@dataclass(frozen=True)
class Limits:
    """What one query may use.

    `steps` bounds the instructions of SQLite's virtual machine (a thousand more at most), which is the same on every machine; `seconds`
    is the clock's bound behind it. `rows` and `result_bytes` bound what comes back, `value_bytes` any single value, `cache_kib` the
    pages held in memory. Together they bound the memory of a query to about the cache, the result and a few values; for a bound
    that the operating system holds, run the query in a child process.
    """

    steps: int = 50_000_000
    seconds: float = 5.0
    rows: int = 10_000
    result_bytes: int = 8 << 20
    value_bytes: int = 1 << 20
    sql_bytes: int = 20_000
    cache_kib: int = 4096

    def __post_init__(self) -> None:
        for name in ("steps", "rows", "result_bytes", "value_bytes", "sql_bytes", "cache_kib"):
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

    `tables` may narrow what can be read (None: every table and view but SQLite's own). Use it as a context manager, in one thread.
    Raises ValueError for a file that is not there or no database.

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
        if not self.path.is_file():
            raise ValueError(f"path must name a SQLite file, got {str(path)!r}")
        self._made = sqlite3.connect(f"{self.path.as_uri()}?mode=ro", uri=True)
        try:
            known = {
                name for (name,) in self._made.execute("SELECT name FROM sqlite_master WHERE type IN ('table', 'view')")
            }
        except sqlite3.DatabaseError as error:
            self._made.close()
            raise ValueError(f"path must name a SQLite file, got {str(path)!r}: {error}") from None
        own = {name for name in known if not name.lower().startswith(("sqlite_", "pragma_"))}
        if tables is not None and (strange := set(tables) - own):
            self._made.close()
            raise ValueError(f"tables must be among {sorted(own)}, got {sorted(strange)}")
        self.tables = frozenset(own if tables is None else tables)
        self._columns = {
            table: tuple(one[0] for one in self._made.execute(f'SELECT * FROM "{table}" LIMIT 0').description)
            for table in self.tables
        }
        self._deadline, self._left = 0.0, 0
        self._why: State = "error"
        self._prepare()

    def _prepare(self) -> None:
        made, limits = self._made, self.limits
        made.text_factory = lambda data: data.decode("utf-8", "replace")
        made.execute("PRAGMA query_only = 1")
        made.execute("PRAGMA trusted_schema = 0")
        made.execute("PRAGMA temp_store = 1")  # files, unlinked while they are open, not memory
        made.execute(f"PRAGMA cache_size = -{limits.cache_kib}")
        for which, most in (
            (sqlite3.SQLITE_LIMIT_LENGTH, limits.value_bytes),
            (sqlite3.SQLITE_LIMIT_SQL_LENGTH, limits.sql_bytes),
            (sqlite3.SQLITE_LIMIT_ATTACHED, 0),
            (sqlite3.SQLITE_LIMIT_EXPR_DEPTH, 100),
            (sqlite3.SQLITE_LIMIT_COMPOUND_SELECT, 20),
            (sqlite3.SQLITE_LIMIT_LIKE_PATTERN_LENGTH, 1000),
            (sqlite3.SQLITE_LIMIT_VARIABLE_NUMBER, 0),
            (sqlite3.SQLITE_LIMIT_WORKER_THREADS, 0),
        ):
            made.setlimit(which, most)
        made.set_authorizer(self._allowed)
        made.set_progress_handler(self._too_long, _EVERY)

    def _allowed(
        self, action: int, first: str | None, second: str | None, schema: str | None, inner: str | None
    ) -> int:
        fine = (
            action == sqlite3.SQLITE_SELECT
            or (action == sqlite3.SQLITE_READ and first in self.tables and schema in ("main", None))
            or (action == sqlite3.SQLITE_FUNCTION and (second or "").lower() in FUNCTIONS)
        )
        return sqlite3.SQLITE_OK if fine else sqlite3.SQLITE_DENY

    def _too_long(self) -> int:
        self._left -= _EVERY
        if self._left <= 0:
            self._why = "steps"
        elif time.monotonic() > self._deadline:
            self._why = "time"
        else:
            return 0
        return 1

    def run(self, sql: str) -> Executed:
        """Run one query. Never raises for what is wrong with the query: `Executed.state` says it. TypeError for what is no text."""
        if not isinstance(sql, str):
            raise TypeError(f"sql must be a string, got {checks.shown(sql)}")
        limits = self.limits
        self._deadline, self._left, self._why = time.monotonic() + limits.seconds, limits.steps, "error"
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
            return Executed(_state(error, self._why), error=str(error)[:300])
        return Executed("ok", tuple(rows))

    def holds(self, table: str, column: str, value: str) -> bool:
        """Whether a column has a value, upper and lower case taken as one. The names are checked against the schema, not quoted by hand.

        Raises ValueError for a table or column that is not there.
        """
        if table not in self.tables or column not in self.columns(table):
            raise ValueError(f"no column {table}.{column} here")
        quoted = value.replace("'", "''")
        found = self.run(f'SELECT 1 FROM "{table}" WHERE "{table}"."{column}" = \'{quoted}\' COLLATE NOCASE LIMIT 1')
        return bool(found.rows)

    def columns(self, table: str) -> tuple[str, ...]:
        """The columns of a table. Raises ValueError for a table that is not there."""
        if table not in self.tables:
            raise ValueError(f"no table {table!r} here")
        return self._columns[table]

    def close(self) -> None:
        """Close the file."""
        self._made.close()

    def __enter__(self) -> Database:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _state(error: BaseException, why: State) -> State:
    text = str(error)
    if "interrupted" in text and why in ("steps", "time"):
        return why
    if "not authorized" in text or "prohibited" in text or "authorizer" in text:
        return "denied"
    if "too big" in text or isinstance(error, MemoryError):
        return "memory"
    return "error"


def same_result(predicted: Executed, gold: Executed, *, mode: Mode = "set") -> bool:
    """Execution accuracy of one query: whether two results are equal. A query that failed equals nothing.

    "set", the paper's: order and repeated rows are ignored, so that a missing DISTINCT or ORDER BY passes; "multiset": repetitions count;
    "ordered": order counts too. Two empty results are equal in all modes. Numbers are compared to ten digits, which is what the
    order of a sum may change, and 1 equals 1.0.
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
    rows = [tuple(float(f"{v:.10g}") if isinstance(v, float) else v for v in row) for row in executed.rows]
    if mode == "set":
        return frozenset(rows)
    return frozenset(Counter(rows).items()) if mode == "multiset" else tuple(rows)
