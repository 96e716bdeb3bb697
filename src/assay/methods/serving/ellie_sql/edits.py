"""SQL by editing a known example: its tables, columns and values become slots, which are filled from another question's schema.

An `Example` is a question with its SQL, written with full names as the schema spells them (`functions.lines`, no aliases; in double
quotes where SQL needs them). `abstracted` finds the slots: tables, key columns (which follow from the tables), other columns by their
kind, and those literals that the example's question names; all other text stays. `bindings` fills them with what schema linking found,
so that foreign keys join what they joined in the example.
"""

from __future__ import annotations

import itertools
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from assay import checks
from assay.methods.serving.ellie_sql.execution import identifier
from assay.methods.serving.ellie_sql.schema import Kind, Linked, Schema, masked, numbers, quoted

_NAME = r'(?:[^\W\d]\w*|"(?:[^"]|"")*")'
_PIECE = re.compile(rf"'(?:[^']|'')*'|{_NAME}\.{_NAME}|{_NAME}|\d+(?:\.\d+)?|\s+|.", re.DOTALL)
MOST_A_SLOT = 3  # columns tried for one slot, best fitting first
MOST_FILLINGS = 400  # of one skeleton tried, in the order they are found
MOST_ORDERS = 20_000  # of a question's tables
UNUSED = 0.5  # what a value or number of the question costs that the SQL leaves out; our choice, as are the next two
UNLINKED = 0.25  # a column or table that the question does not name
SIMILAR = 3.0  # what the likeness of the questions counts


@dataclass(frozen=True)
class Example:
    """A question with its SQL over a schema."""

    question: str
    sql: str
    schema: Schema
    linked: Linked


@dataclass(frozen=True)
class Table:
    """A slot for a table."""

    number: int


@dataclass(frozen=True)
class Key:
    """A slot for a key column of table `number`: its primary key, or the foreign key to table `to`."""

    number: int
    to: int | None = None


@dataclass(frozen=True)
class Other:
    """A slot for a column of table `table` that is no key."""

    table: int
    number: int
    kind: Kind


@dataclass(frozen=True)
class Literal:
    """A slot for a quoted text ("text") or a number; `of` is the column it is compared with, if it stands right behind one.

    `number` counts the texts in the order of the SQL; of a number it is the place in the question.
    """

    number: int
    kind: Kind
    of: Other | None = None


Slot = Table | Key | Other | Literal


@dataclass(frozen=True)
class Skeleton:
    """SQL with slots."""

    pieces: tuple[str | Slot, ...]
    tables: int

    def slots(self, kind: type[Slot]) -> list[Slot]:
        """The distinct slots of one sort, in their order."""
        return list(dict.fromkeys(piece for piece in self.pieces if isinstance(piece, kind)))

    def joins(self) -> set[tuple[int, int]]:
        """(child, parent) of the foreign keys that must be there."""
        return {(piece.number, piece.to) for piece in self.pieces if isinstance(piece, Key) and piece.to is not None}


def abstracted(example: Example) -> Skeleton:
    """The skeleton of an example.

    Raises ValueError for SQL that names a column without its table or by an alias, or has a foreign key to a table that it does not name.
    """
    schema = example.schema
    tables: dict[str, int] = {}
    others: dict[tuple[str, str], int] = {}
    texts, given = quoted(example.question), numbers(example.question)
    literals: dict[str, int] = {}
    pieces: list[str | Slot] = []
    found = [(piece, *_split(piece)) for piece in _PIECE.findall(example.sql)]
    for _, table, _ in found:  # tables first: a key may name one that comes later
        if table in schema.tables and table not in tables:
            tables[table] = len(tables)
    last: Other | None = None
    for piece, table, column in found:
        if table in tables and column is None:
            pieces.append(Table(tables[table]))
        elif table in tables and column is not None:
            if not schema.has(table, column):
                raise ValueError(f"sql names {piece}, which is no column")
            one = schema.column(table, column)
            if one.kind == "key":
                pieces.append(_key(schema, tables, table, column))
            else:
                number = others.setdefault((table, column), sum(t == table for t, _ in others))
                last = Other(tables[table], number, one.kind)
                pieces.append(last)
                continue
        elif piece[0] == "'" and piece[1:-1].replace("''", "'") in texts:
            pieces.append(Literal(literals.setdefault(piece, len(literals)), "text", last))
        elif piece[0].isdigit() and piece in given:
            used = {slot.number for slot in pieces if isinstance(slot, Literal) and slot.kind == "number"}
            places = [place for place, said in enumerate(given) if said == piece]
            pieces.append(Literal(next((one for one in places if one not in used), places[-1]), "number", last))
        else:
            if column is not None or any(schema.has(one, table) for one in tables):
                raise ValueError(f"sql must name columns with their tables, got {piece!r}")
            pieces.append(piece)
            if piece.isspace() or piece in ("=", ">", "<"):
                continue  # the column before a comparison is still the last one
        last = None
    return Skeleton(tuple(pieces), len(tables))


def _split(piece: str) -> tuple[str, str | None]:
    """A piece of SQL as the names of a table and a column, without their quotes; what is no pair has no column."""
    names = re.findall(_NAME, piece) if piece[0] == '"' or piece[0].isidentifier() else []
    if not names:
        return piece, None
    plain = [name[1:-1].replace('""', '"') if name[0] == '"' else name for name in names]
    return plain[0], plain[1] if len(plain) > 1 else None


def _key(schema: Schema, tables: Mapping[str, int], table: str, column: str) -> Key:
    if schema.primary[table] == column:
        return Key(tables[table])
    to, _ = schema.foreign[table, column]
    if to not in tables:
        raise ValueError(f"sql names {table}.{column} without the table {to} that it means")
    return Key(tables[table], tables[to])


@dataclass(frozen=True)
class Filling:
    """A skeleton filled for a question: the SQL, and how well what it names fits what the question says."""

    sql: str
    fit: float


def bindings(skeleton: Skeleton, linked: Linked, schema: Schema) -> list[Filling]:
    """Ways to fill a skeleton with the linked tables, best first; equal ones in the order they were found.

    Tables take different tables, joined by foreign keys where the example's are; columns take different ones of their kind, the best
    `MOST_A_SLOT` by the words of the question; a text goes where it is compared with a column that holds it; a number is the one at the
    same place of the question.
    Empty where the question has fewer texts or numbers than that takes, or no tables fit. Of a skeleton `MOST_FILLINGS` are tried.
    """
    fillings = itertools.islice(_fillings(skeleton, linked, schema), MOST_FILLINGS)
    found: dict[str, float] = {}
    for sql, fit in fillings:
        found[sql] = max(fit, found.get(sql, -math.inf))
    return sorted((Filling(sql, fit) for sql, fit in found.items()), key=lambda one: -one.fit)


def _fillings(skeleton: Skeleton, linked: Linked, schema: Schema) -> Iterator[tuple[str, float]]:
    """Every filling with how well it fits, in the order of the schema and the question."""
    texts, given = list(linked.values), list(linked.numbers)
    slots = [slot for slot in skeleton.slots(Literal) if isinstance(slot, Literal)]
    of_text = [slot for slot in slots if slot.kind == "text"]
    places = {slot.number for slot in slots if slot.kind == "number"}
    count = len({slot.number for slot in of_text})
    if count > len(texts) or max(places, default=-1) >= len(given):
        return
    unused = UNUSED * (len(texts) - count + len(given) - len(places))
    for tables in itertools.islice(itertools.permutations(linked.tables, skeleton.tables), MOST_ORDERS):
        if any(schema.between(tables[child], tables[parent]) is None for child, parent in skeleton.joins()):
            continue
        for columns in _columns(skeleton, tables, linked, schema):
            for chosen in _chosen(of_text, count, columns, texts, linked):
                sql = _filled(skeleton, tables, columns, chosen, given, schema)
                yield sql, _fit(tables, columns, linked) - unused


def _chosen(
    slots: Sequence[Literal], count: int, columns: Mapping[Other, str], texts: Sequence[str], linked: Linked
) -> Iterator[list[str]]:
    """Ways to put `count` different texts into their slots, each where a column that holds it stands before."""
    fitting = []
    for number in range(count):
        asked = [columns[slot.of] for slot in slots if slot.number == number and slot.of is not None]
        fitting.append([text for text in texts if all(column in linked.values[text] for column in asked)])
    for chosen in itertools.product(*fitting):
        if len(set(chosen)) == count:
            yield list(chosen)


def _columns(skeleton: Skeleton, tables: Sequence[str], linked: Linked, schema: Schema) -> Iterator[dict[Other, str]]:
    slots = [slot for slot in skeleton.slots(Other) if isinstance(slot, Other)]
    choices = []
    for slot in slots:
        fitting = [c for c in schema.tables[tables[slot.table]] if c.kind == slot.kind]
        held = {full for fulls in linked.values.values() for full in fulls}
        fitting.sort(key=lambda c: -(linked.scores.get(c.full, 0.0) + (c.full in held)))
        choices.append([c.full for c in fitting[:MOST_A_SLOT]])
    for chosen in itertools.product(*choices):
        if len(set(chosen)) == len(chosen):
            yield dict(zip(slots, chosen, strict=True))


def _filled(
    skeleton: Skeleton,
    tables: Sequence[str],
    columns: Mapping[Other, str],
    texts: Sequence[str],
    given: Sequence[str],
    schema: Schema,
) -> str:
    made = []
    for piece in skeleton.pieces:
        if isinstance(piece, str):
            made.append(piece)
        elif isinstance(piece, Table):
            made.append(identifier(tables[piece.number]))
        elif isinstance(piece, Key):
            table = tables[piece.number]
            column = schema.primary[table] if piece.to is None else schema.between(table, tables[piece.to])
            made.append(f"{identifier(table)}.{identifier(str(column))}")
        elif isinstance(piece, Other):
            made.append(columns[piece])
        elif piece.kind == "text":
            made.append("'" + texts[piece.number].replace("'", "''") + "'")
        else:
            made.append(given[piece.number])
    return "".join(made)


def _fit(tables: Sequence[str], columns: Mapping[Other, str], linked: Linked) -> float:
    """Words of the question that the named things share, less what is named without having been asked for."""
    held = {full for fulls in linked.values.values() for full in fulls}
    named = [linked.scores.get(one, 0.0) + (one in held) for one in (*tables, *columns.values())]
    asked = [c.full for c in linked.columns if linked.scores.get(c.full, 0.0) >= 1]
    missed = sum(full not in columns.values() for full in asked)
    return sum(score if score else -UNLINKED for score in named) - UNUSED * missed


@dataclass(frozen=True)
class Candidate:
    """SQL that may answer a question; `prior` is what its words and the likeness of its example say for it."""

    sql: str
    prior: float


@dataclass(frozen=True)
class Library:
    """Examples, and which of them ask alike: cosine of words and pairs of words, weighted by how rare they are, names left out.

    Raises ValueError for no examples, and what `abstracted` raises.
    """

    examples: Sequence[Example]
    skeletons: tuple[Skeleton, ...] = field(init=False)
    _known: tuple[dict[str, float], ...] = field(init=False, repr=False)
    _rare: dict[str, float] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if not self.examples:
            raise ValueError("examples must hold at least one, got none")
        counted = [Counter(_grams(masked(e.question, e.schema, e.linked))) for e in self.examples]
        seen = Counter(gram for one in counted for gram in one)
        rare = {gram: math.log((1 + len(counted)) / (1 + n)) + 1 for gram, n in seen.items()}
        object.__setattr__(self, "skeletons", tuple(map(abstracted, self.examples)))
        object.__setattr__(self, "_rare", rare)
        object.__setattr__(self, "_known", tuple(_unit(one, rare) for one in counted))

    def similar(self, linked: Linked, schema: Schema) -> list[tuple[float, Skeleton]]:
        """Distinct skeletons, that of the most similar example first, with the cosine."""
        asked = _unit(Counter(_grams(masked(linked.question, schema, linked))), self._rare)
        best: dict[Skeleton, float] = {}
        for known, skeleton in zip(self._known, self.skeletons, strict=True):
            cosine = sum(weight * known.get(gram, 0.0) for gram, weight in asked.items())
            best[skeleton] = max(cosine, best.get(skeleton, -1.0))
        return sorted(((cosine, skeleton) for skeleton, cosine in best.items()), key=lambda pair: -pair[0])

    def candidates(self, linked: Linked, schema: Schema, *, skeletons: int, most: int) -> list[Candidate]:
        """The `most` best fillings of the `skeletons` most similar skeletons that can be filled, best first."""
        checks.whole("skeletons", skeletons, low=1)
        checks.whole("most", most, low=1)
        found: dict[str, float] = {}
        used = 0
        for cosine, skeleton in self.similar(linked, schema):
            filled = bindings(skeleton, linked, schema)
            for one in filled:
                prior = SIMILAR * cosine + one.fit
                found[one.sql] = max(prior, found.get(one.sql, -math.inf))
            used += bool(filled)
            if used == skeletons:
                break
        return sorted((Candidate(sql, prior) for sql, prior in found.items()), key=lambda one: -one.prior)[:most]


def _grams(words: Sequence[str]) -> list[str]:
    return [*words, *(f"{a} {b}" for a, b in itertools.pairwise(words))]


def _unit(counts: Mapping[str, int], rare: Mapping[str, float]) -> dict[str, float]:
    weights = {gram: n * rare.get(gram, 0.0) for gram, n in counts.items()}
    norm = math.sqrt(sum(weight**2 for weight in weights.values())) or 1.0
    return {gram: weight / norm for gram, weight in weights.items()}
