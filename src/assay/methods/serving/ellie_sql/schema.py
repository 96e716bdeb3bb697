"""A database's schema, and the part of it that a question is about (schema linking, which all tiers share).

Linking is by words: it costs no tokens. A real system asks a language model here; whoever does must count those tokens in every
tier and in none of the router's savings.
"""

from __future__ import annotations

import re
import sqlite3
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from assay.methods.serving.ellie_sql.execution import Database, identifier, opened

Kind = Literal["key", "number", "text"]
NUMBERS = {
    word: n
    for n, word in enumerate(
        ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"]
    )
}
_QUOTED = re.compile(r'"([^"]+)"')
MOST_VALUES = 16  # quoted texts of a question that are looked up
_OWN_WORDS = (
    "\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af"  # each letter of these scripts counts as a word: they write no spaces
)
_WORD = re.compile(rf"[{_OWN_WORDS}]|[^\W\d_{_OWN_WORDS}]+|\d+(?:\.\d+)?")


@dataclass(frozen=True)
class Column:
    """A column; `kind` "key" is a primary or foreign key, "number" and "text" go by its declared type."""

    table: str
    name: str
    kind: Kind

    @property
    def full(self) -> str:
        """`table.column`, as it stands in SQL."""
        return f"{identifier(self.table)}.{identifier(self.name)}"


@dataclass(frozen=True)
class Schema:
    """Tables with their columns, the primary key of each, and foreign keys as (child table, column) -> (parent table, column)."""

    tables: Mapping[str, tuple[Column, ...]]
    primary: Mapping[str, str]
    foreign: Mapping[tuple[str, str], tuple[str, str]]

    def column(self, table: str, name: str) -> Column:
        """A column by its names. Raises KeyError without one."""
        return (
            next(one for one in self.tables[table] if one.name == name)
            if self.has(table, name)
            else _missing(table, name)
        )

    def has(self, table: str, name: str) -> bool:
        """Whether there is such a column."""
        return any(one.name == name for one in self.tables.get(table, ()))

    def between(self, child: str, parent: str) -> str | None:
        """The column of `child` that names a row of `parent`; None where there is none. Of several the first."""
        return next((c for (table, c), (to, _) in self.foreign.items() if (table, to) == (child, parent)), None)

    def neighbours(self, table: str) -> set[str]:
        """Tables joined to one by a foreign key, either way."""
        pairs = [(child, parent) for (child, _), (parent, _) in self.foreign.items()]
        return {b for a, b in pairs if a == table} | {a for a, b in pairs if b == table}


def _missing(table: str, name: str) -> Column:
    raise KeyError(f"no column {table}.{name}")


def read_schema(path: str | Path) -> Schema:
    """The schema of a SQLite file, opened read-only (see `execution.opened`).

    Foreign keys that name no column of their parent mean its primary key. Raises ValueError for a file that is no database.
    """
    made = opened(path)
    try:
        listed = made.execute("SELECT name FROM sqlite_master WHERE type = 'table' ORDER BY rowid")
        names = [name for (name,) in listed if not name.lower().startswith("sqlite_")]
        rows = {name: made.execute(f"PRAGMA table_info({identifier(name)})").fetchall() for name in names}
        keys = {name: made.execute(f"PRAGMA foreign_key_list({identifier(name)})").fetchall() for name in names}
    except sqlite3.DatabaseError as error:
        raise ValueError(f"path must name a SQLite file, got {str(path)!r}: {error}") from None
    finally:
        made.close()
    primary = {name: next((r[1] for r in rows[name] if r[5] == 1), "rowid") for name in names}
    spelt = {name.lower(): name for name in names}  # a key may name its parent in another case
    foreign = {}
    for name in names:
        for row in keys[name]:
            parent = spelt.get(row[2].lower(), row[2])
            column = next((r[1] for r in rows.get(parent, ()) if r[1].lower() == str(row[4]).lower()), row[4])
            foreign[name, row[3]] = (parent, column or primary.get(parent, "rowid"))
    tables = {name: tuple(Column(name, r[1], _kind(r, (name, r[1]) in foreign)) for r in rows[name]) for name in names}
    return Schema(tables, primary, foreign)


def _kind(row: tuple[int, str, str, int, object, int], foreign: bool) -> Kind:
    if foreign or row[5]:
        return "key"
    return "text" if any(word in row[2].upper() for word in ("CHAR", "TEXT", "CLOB")) else "number"


@dataclass(frozen=True)
class Linked:
    """What of a schema a question is about.

    `tables` in the schema's order; `columns` that stay, keys included; `scores` how well a table's ("functions") or column's
    ("functions.lines") words fit the question, 0 to 1; `values` the quoted texts with the columns that hold them; `numbers` as they are
    written, in their order.
    """

    question: str
    tables: tuple[str, ...]
    columns: tuple[Column, ...]
    scores: Mapping[str, float] = field(default_factory=dict)
    values: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    numbers: tuple[str, ...] = ()

    def text(self) -> str:
        """The pruned schema as the router and the prompts read it: "table: column, column" by line."""
        by_table = {table: [c.name for c in self.columns if c.table == table] for table in self.tables}
        return "\n".join(f"{table}: {', '.join(columns)}" for table, columns in by_table.items())


def link(question: str, schema: Schema, database: Database) -> Linked:
    """The tables and columns that a question names, directly or by a quoted value, with what is needed to join them.

    A table is linked if a word of its name, or of one of its columns, or a value of its is in the question; the tables on the
    shortest ways of foreign keys between linked ones come along. Where nothing is named, everything stays. Of a linked table
    its keys stay, its first text column (what its rows are called), and the columns that are named or hold a value. Of quoted texts
    the first `MOST_VALUES` are looked up.
    """
    said = set(stems(_QUOTED.sub(" ", question)))
    texts = tuple(dict.fromkeys(_QUOTED.findall(question)))[:MOST_VALUES]
    scores = {table: _overlap(table, said) for table in schema.tables}
    holding: dict[str, tuple[str, ...]] = {}
    for value in texts:
        holding[value] = tuple(
            c.full
            for cs in schema.tables.values()
            for c in cs
            if c.kind == "text" and database.holds(c.table, c.name, value)
        )
    held = {full for fulls in holding.values() for full in fulls}
    for columns in schema.tables.values():
        scores |= {c.full: _overlap(c.name, said) for c in columns if c.kind != "key"}
    named = [
        t
        for t in schema.tables
        if scores[t] or any(scores.get(c.full, 0) >= 1 or c.full in held for c in schema.tables[t])
    ]
    tables = _joined(named or list(schema.tables), schema)
    kept = []
    for table in tables:
        first = next((c for c in schema.tables[table] if c.kind == "text"), None)
        kept += [
            c
            for c in schema.tables[table]
            if c.kind == "key" or c == first or scores.get(c.full, 0) > 0 or c.full in held
        ]
    return Linked(question, tuple(tables), tuple(kept), scores, holding, tuple(numbers(question)))


def _joined(named: list[str], schema: Schema) -> list[str]:
    """`named` with the tables on the shortest ways between the first and each other; in the schema's order."""
    if not named:
        return []
    found = set(named)
    start = named[0]
    before: dict[str, str] = {start: ""}
    waiting = deque([start])
    while waiting:
        table = waiting.popleft()
        for other in sorted(schema.neighbours(table) - set(before)):
            before[other] = table
            waiting.append(other)
    for table in named:
        while before.get(table):
            table = before[table]
            found.add(table)
    return [table for table in schema.tables if table in found]


def words(text: str) -> list[str]:
    """Lower-case words and numbers of any script.

    >>> words("Größe_in_mm > 2.5"), words("長さ")
    (['größe', 'in', 'mm', '2.5'], ['長', 'さ'])
    """
    return _WORD.findall(text.lower().replace("_", " "))


def stems(text: str) -> list[str]:
    """Words without the endings of the plural, and without single letters."""
    return [stem(word) for word in words(text) if len(word) > 1 or not word.isascii()]


def stem(word: str) -> str:
    """A word without its plural.

    >>> stem("classes"), stem("categories"), stem("lines"), stem("species"), stem("diagnoses")
    ('class', 'category', 'line', 'species', 'diagnosis')
    """
    if word == "species":
        return word
    if word.endswith("ies") and len(word) > 4:
        return word[:-3] + "y"
    if word.endswith(("oses", "yses")):
        return word[:-2] + "is"
    if word.endswith(("sses", "xes")):
        return word[:-2]
    return word[:-1] if word.endswith("s") and not word.endswith(("ss", "us", "is")) and len(word) > 3 else word


def numbers(text: str) -> list[str]:
    """The numbers of a question outside its quotes, as digits, in their order; "three" is 3.

    >>> numbers('three functions of more than 2.5 lines in "base64"')
    ['3', '2.5']
    """
    found = re.findall(r"[0-9]+(?:\.[0-9]+)?|[a-z]+", _QUOTED.sub(" ", text.lower()))
    return [str(NUMBERS.get(one, one)) for one in found if one[0].isdigit() or one in NUMBERS]


def quoted(text: str) -> list[str]:
    """The quoted texts of a question."""
    return _QUOTED.findall(text)


def masked(question: str, schema: Schema, linked: Linked) -> list[str]:
    """A question's words with what is its database's own taken out: names of columns and tables, values and numbers become marks.

    What is left is how the question asks, which is alike for questions about different tables.
    """
    tables = {s for t in schema.tables for s in stems(t)}
    columns = {s for t in linked.tables for c in schema.tables[t] if c.kind != "key" for s in stems(c.name)}
    made = []
    for word in words(_QUOTED.sub(" valuemark ", question)):
        root = stem(word)
        if word == "valuemark":
            made.append("<value>")
        elif word[0].isdigit() or word in NUMBERS:
            made.append("<number>")
        elif root in tables:
            made.append("<table>")
        elif root in columns:
            made.append("<column>")
        else:
            made.append(word)
    return [word for n, word in enumerate(made) if n == 0 or word != made[n - 1] or not word.startswith("<")]


def _overlap(name: str, said: Iterable[str]) -> float:
    """The share of a name's words that are said."""
    own = stems(name)
    known = set(said)
    return sum(one in known for one in own) / len(own) if own else 0.0
