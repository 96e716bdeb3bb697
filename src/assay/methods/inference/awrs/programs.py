"""Constraints that a language's own implementation decides: Python that parses, SQL that runs on a database.

Both ask the real parser whether the end of the text was reached without an error. The last word of a text may be the
beginning of a longer one, so it is tried with the endings that could make a difference (`wh` as `while`, `1e` as `1e0`, an open string
closed). Each check reads the whole text: these are the slow constraints that adaptive rejection is for.
"""

from __future__ import annotations

import ast
import codecs
import codeop
import keyword
import re
import sqlite3
import warnings
from collections.abc import Iterator

from assay import checks
from assay.methods.inference.awrs.constraints import Constraint

_INCOMPLETE: int = vars(codeop)["PyCF_ALLOW_INCOMPLETE_INPUT"]
LETTER = "é"  # stands for a character of which only the first bytes are there


def python() -> Constraint:
    """Programs that Python, the version that runs this, parses, with at least one statement.

    `prefix` may hold of a text without a completion in two places: inside a string that is still open (what an f-string holds, and
    whether escapes are right, is checked where it closes), and inside brackets that the parser reads without looking at what stands
    before them. A keyword directly behind a number (`1if`) is refused.

    >>> code = python()
    >>> code.prefix(b"def f(x):\\n  retu"), code.prefix(b"x = = "), code.complete(b"x = 1")
    (True, False, True)
    """
    return Python()


class Python:
    """See `python`."""

    def prefix(self, text: bytes) -> bool:
        source = _decoded(text)
        return source is not None and "\0" not in source and _python_begins(source)

    def complete(self, text: bytes) -> bool:
        try:
            with warnings.catch_warnings(action="ignore"):  # what Python only warns of parses, under `-W error` too
                return bool(ast.parse(text.decode()).body)
        except (SyntaxError, ValueError, MemoryError, RecursionError):
            return False


def _decoded(text: bytes) -> str | None:
    """`text` as characters, with a letter where the last one is not whole; None where it is no UTF-8."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    try:
        found = decoder.decode(text)
    except UnicodeDecodeError:
        return None
    return found + LETTER if decoder.getstate()[0] else found


_LEXEMES = re.compile(
    r"""(?P<closed>'''(?:\\.|[^\\])*?'''|\"\"\"(?:\\.|[^\\])*?\"\"\"|'(?!'')(?:\\.|[^'\\\n])*'|"(?!"")(?:\\.|[^"\\\n])*")"""
    r"""|(?P<comment>\#[^\n]*)|(?P<open>'''|\"\"\"|'|")""",
    re.DOTALL,
)
_STRING_PREFIX = re.compile(r"(?<!\w)(?:[rbuf]|rb|br|fr|rf)\Z", re.IGNORECASE)
_SIGN_ENDINGS = dict.fromkeys("/%@&|^<>=:", ("", "=")) | {
    "-": ("", ">", "=", "0"), "+": ("", "=", "0"), "*": ("", "=", "*"), ".": ("", ".", "..", "0"), "!": ("=",),
}  # fmt: skip
_KEYWORDS = sorted({*keyword.kwlist, *keyword.softkwlist} - {"_"})
_NUMBER = re.compile(r"(?<![\w.])(?:\d\w*\.?\w*|\.\d\w*)\Z")


def _python_begins(source: str) -> bool:
    """Whether some program begins with `source`."""
    for lexeme in _LEXEMES.finditer(source):
        if lexeme.lastgroup == "open":
            quote = lexeme.group()
            if len(quote) == 1 and re.search(r"(?<!\\)(?:\\\\)*\n", source[lexeme.end() :]):
                return False
            head = source[: lexeme.start()]
            prefix = _STRING_PREFIX.search(head)
            head = head[: prefix.start()] if prefix else head
            return _viable(head + ('b""' if prefix and "b" in prefix.group().lower() else '""'))
        if lexeme.lastgroup == "comment" and lexeme.end() == len(source):
            return _viable(source[: lexeme.start()] + "\n")
    line = source[source.rfind("\n") + 1 :]
    if not line.strip(" \t\f"):
        return _viable(source[: len(source) - len(line)])
    if source.endswith("\\"):
        return _viable(source[:-1])
    return any(_viable(source + ending) for ending in _python_endings(source))


def _python_endings(source: str) -> Iterator[str]:
    """What could still belong to the last word or sign of `source`, as far as it makes a difference."""
    word = re.search(r"\w+\Z", source)
    if word is None:
        yield from _SIGN_ENDINGS.get(source[-1], ("",))
        return
    found = word.group()
    yield ""
    if _NUMBER.search(source):
        yield "0"
        return
    if keyword.iskeyword(found):
        yield "_"
    for name in _KEYWORDS:
        if name.startswith(found) and name != found:
            yield name[len(found) :]
    if _STRING_PREFIX.fullmatch(found):
        yield '""'


def _viable(source: str) -> bool:
    """Whether Python's parser reads `source` to its end, its last word taken as whole: it then runs into what is appended."""
    try:
        with warnings.catch_warnings(action="ignore"):
            compile(source + " \\\n", "<text>", "exec", ast.PyCF_ONLY_AST | _INCOMPLETE, dont_inherit=True)
    except SyntaxError as error:
        return error.msg == "incomplete input"
    except (ValueError, MemoryError, RecursionError):
        return False
    return True


# ------------------------------------------------------------------------------------------------------------------- SQL


def sql(schema: str, *, steps: int = 1_000_000) -> Constraint:
    """One SQL query (SELECT, WITH or VALUES) that runs on a database in memory, which the statements of `schema` set up.

    `prefix` asks SQLite's parser, and knows tables and functions that are not there once their names are whole; other names are
    only resolved in `complete`, which runs the query for at most `steps` steps of SQLite's machine and a thousand rows. Nothing but
    reading is allowed, and no result is longer than a megabyte.

    Raises TypeError or ValueError for a schema that is no text or that SQLite refuses, and for a number of steps below 1.

    >>> query = sql("CREATE TABLE city (name TEXT, people INTEGER)")
    >>> query.prefix(b"SELECT name FR"), query.prefix(b"DROP"), query.complete(b"SELECT name FROM city")
    (True, False, True)
    """
    return Sql(schema, steps)


_SQL_LEXEMES = re.compile(
    r"""(?P<closed>'(?:[^']|'')*'|"(?:[^"]|"")*"|`(?:[^`]|``)*`|\[[^\]]*\]|/\*.*?\*/|--[^\n]*\n)"""
    r"""|(?P<comment>--[^\n]*|/\*.*)|(?P<open>['"`\[])""",
    re.DOTALL,
)
_SQL_WORDS = (
    "ALL", "AND", "AS", "ASC", "BETWEEN", "BY", "CASE", "CAST", "COLLATE", "CROSS", "CURRENT", "CURRENT_DATE",
    "CURRENT_TIME", "CURRENT_TIMESTAMP", "DESC", "DISTINCT", "ELSE", "END", "ESCAPE", "EXCEPT", "EXCLUDE", "EXISTS",
    "FILTER", "FIRST", "FOLLOWING", "FROM", "FULL", "GLOB", "GROUP", "GROUPS", "HAVING", "IN", "INDEXED", "INNER",
    "INTERSECT", "IS", "ISNULL", "JOIN", "LAST", "LEFT", "LIKE", "LIMIT", "MATCH", "MATERIALIZED", "NATURAL", "NOT",
    "NOTNULL", "NULL", "NULLS", "OFFSET", "ON", "OR", "ORDER", "OTHERS", "OUTER", "OVER", "PARTITION", "PRECEDING",
    "RANGE", "RECURSIVE", "REGEXP", "RIGHT", "ROW", "ROWS", "SELECT", "THEN", "TIES", "UNBOUNDED", "UNION", "USING",
    "VALUES", "WHEN", "WHERE", "WINDOW", "WITH",
)  # fmt: skip
_SQL_SIGN_ENDINGS = {"!": ("=",), "|": ("|",), ".": ("0",), "-": ("0", "-"), "+": ("0",), "/": ("* ",)}
_QUERIES = ("SELECT", "WITH", "VALUES")
_MENDS = {"'": "''", '"': '""', "`": "``", "[": "[a]"}
_READING = {getattr(sqlite3, name) for name in ("SQLITE_SELECT", "SQLITE_READ", "SQLITE_FUNCTION", "SQLITE_RECURSIVE")}
_HOPELESS = (
    "no such function", "wrong number of arguments", "not authorized", "Incorrect number of bindings",
    "You did not supply a value for binding",
)  # fmt: skip


class Sql:
    """See `sql`."""

    ROWS = 1000
    LONGEST = 1_000_000

    def __init__(self, schema: str, steps: int) -> None:
        if not isinstance(schema, str):
            raise TypeError(f"schema must be text, got {checks.shown(schema)}")
        self._steps = checks.whole("steps", steps, low=1)
        self._database = sqlite3.connect(":memory:", check_same_thread=False)
        try:
            self._database.executescript(schema)
        except (sqlite3.Error, sqlite3.Warning, ValueError) as error:
            raise ValueError(f"schema must be statements that SQLite runs: {error}") from None
        self._database.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, self.LONGEST)
        self._database.set_authorizer(
            lambda action, *_: sqlite3.SQLITE_OK if action in _READING else sqlite3.SQLITE_DENY
        )

    def prefix(self, text: bytes) -> bool:
        source = _decoded(text)
        if source is None or "\0" in source:
            return False
        first = re.match(r"\s*(\w*)", source)
        word = first.group(1).upper() if first else ""
        if first is not None and first.end() == len(source):
            return any(query.startswith(word) for query in _QUERIES)
        return word in _QUERIES and self._begins(source)

    def complete(self, text: bytes) -> bool:
        try:
            source = text.decode()
        except UnicodeDecodeError:
            return False
        first = re.match(r"\s*(\w*)", source)
        if first is None or first.group(1).upper() not in _QUERIES:
            return False
        self._database.set_progress_handler(lambda: 1, self._steps)
        try:
            self._database.execute(source).fetchmany(self.ROWS)
        except (sqlite3.Error, sqlite3.Warning, ValueError, OverflowError):
            return False
        finally:
            self._database.set_progress_handler(None, 0)
        return True

    def _begins(self, source: str) -> bool:
        for lexeme in _SQL_LEXEMES.finditer(source):
            if lexeme.lastgroup == "open":
                return self._viable(source[: lexeme.start()] + _MENDS[lexeme.group()])
            if lexeme.lastgroup == "comment":
                return self._viable(source[: lexeme.start()] + " ")
        return any(self._viable(source + ending) for ending in _sql_endings(source))

    def _viable(self, source: str) -> bool:
        """Whether SQLite's parser reads `source` to its end, its last word taken as whole."""
        try:
            self._database.execute(f"EXPLAIN {source}")
        except (sqlite3.Error, sqlite3.Warning, ValueError, OverflowError) as error:
            said = str(error)
            if said == "incomplete input":
                return True
            if "syntax error" in said or "unrecognized token" in said or "one statement" in said:
                return False
            if said.startswith("no such table"):  # unless it is the beginning of another's name
                return source.lower().endswith(re.split("[ .]", said)[-1].lower())
            return not said.startswith(_HOPELESS)
        return True


def _sql_endings(source: str) -> Iterator[str]:
    word = re.search(r"\w+\Z", source)
    yield ""
    if word is None:
        yield from _SQL_SIGN_ENDINGS.get(source[-1], ())
        return
    found = word.group().upper()
    if found[0].isdigit():
        yield "0"
        return
    yield "_"
    for name in _SQL_WORDS:
        if name.startswith(found) and name != found:
            yield name[len(found) :]
    if found == "X":
        yield "''"  # a blob
