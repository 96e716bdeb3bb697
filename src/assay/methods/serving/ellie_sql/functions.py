"""What SQLite itself does not bound: the functions that take too long for one row, and queries that grow while they are read.

SQLite looks at the clock between rows, never inside a function or between the functions of one row. `LIKE`, `instr` and the
trimming functions with two arguments take time by the product of their arguments' lengths there: one row can take hours. Those below
take time by the sum (`like`: by the length of the text for each wildcard-free part of the pattern), and look at the clock themselves.

A common table expression is copied for every mention of its name, those in its copies too, before anything is looked at: thirty of
them, each naming the one before twice, fill the memory with a billion (`copies` counts them beforehand).
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Iterable
from typing import Any

FUNCTIONS = frozenset(
    [
        "abs",
        "avg",
        "cast",
        "coalesce",
        "count",
        "date",
        "datetime",
        "dense_rank",
        "ifnull",
        "iif",
        "instr",
        "julianday",
        "length",
        "like",
        "lower",
        "ltrim",
        "max",
        "min",
        "nullif",
        "rank",
        "round",
        "row_number",
        "rtrim",
        "strftime",
        "substr",
        "substring",
        "sum",
        "time",
        "total",
        "trim",
        "upper",
    ]
)
"""Functions that model-written SQL may call: none that reads a file, makes large values from small ones, or is random."""

MOST_PATTERN = 200  # characters of a LIKE pattern; a part of it without % may take time by its length times the text's
MOST_COPIES = 1000  # of common table expressions in one query
_TOKEN = re.compile(
    r"""'(?:[^']|'')*'|"(?:[^"]|"")*"|`(?:[^`]|``)*`|\[[^\]]*\]|--[^\n]*|/\*.*?(?:\*/|\Z)|[^\W\d]\w*|\d[\w.]*|\s+|.""",
    re.DOTALL,
)
_LOWER = {code: code + 32 for code in range(ord("A"), ord("Z") + 1)}  # as SQLite: only ASCII letters have a case


def like(pattern: Any, text: Any, escape: Any = None) -> int | None:
    """SQLite's `text LIKE pattern ESCAPE escape`: % is any text, _ any character, ASCII letters match in both cases; NULL for NULL.
    A blob is like nothing, as in SQLite where it is built so.

    Raises ValueError for an escape that is not one character, and a pattern of more than `MOST_PATTERN`.

    >>> like("a_c%", "ABCdef"), like("50!%", "50%", "!"), like("%b", "abc"), like("%", None)
    (1, 1, 0, None)
    """
    if pattern is None or text is None:
        return None
    if isinstance(pattern, bytes) or isinstance(text, bytes):
        return 0
    wanted, escaping = as_text(pattern), None if escape is None else as_text(escape)
    if escaping is not None and len(escaping) != 1:
        raise ValueError("ESCAPE expression must be a single character")
    if len(wanted) > MOST_PATTERN:
        raise ValueError(f"a LIKE pattern may have {MOST_PATTERN} characters, got {len(wanted)}")
    parts = _parts(wanted, escaping)
    inside = as_text(text).translate(_LOWER)
    (first, least), *others = parts
    if not others:
        return int(len(inside) == least and first.match(inside) is not None)
    last, width = others.pop()
    at, end = least, len(inside) - width
    if end < at or first.match(inside) is None or last.match(inside, end) is None:
        return 0
    for part, _ in others:  # the leftmost place is as good as any
        found = part.search(inside, at, end)
        if found is None:
            return 0
        at = found.end()
    return 1


@functools.lru_cache(maxsize=256)
def _parts(pattern: str, escape: str | None) -> list[tuple[re.Pattern[str], int]]:
    """What stands between the % of a pattern, each with its length."""
    parts: list[list[str]] = [[]]
    letters = iter(pattern)
    for letter in letters:
        if letter == escape:
            following = next(letters, None)
            parts[-1].append("(?!)" if following is None else re.escape(following.translate(_LOWER)))
        elif letter == "%":
            parts.append([])
        else:
            parts[-1].append("." if letter == "_" else re.escape(letter.translate(_LOWER)))
    return [(re.compile("".join(part), re.DOTALL), len(part)) for part in parts]


def instr(text: Any, wanted: Any) -> int | None:
    """Where `wanted` first stands in `text`, from 1; 0 for nowhere, NULL for NULL. Bytes are counted where both are blobs."""
    if text is None or wanted is None:
        return None
    if isinstance(text, bytes) and isinstance(wanted, bytes):
        return text.find(wanted) + 1
    return as_text(text).find(as_text(wanted)) + 1


def _trimmed(text: Any, letters: Any, left: bool, right: bool) -> str | None:
    if text is None or letters is None:
        return None
    given, known = as_text(text), set(as_text(letters))
    start, end = 0, len(given)
    while left and start < end and given[start] in known:
        start += 1
    while right and start < end and given[end - 1] in known:
        end -= 1
    return given[start:end]


def as_text(value: Any) -> str:
    """A value as SQLite turns it into text."""
    if isinstance(value, str):
        return value
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    if isinstance(value, float) and math.isfinite(value):
        digits, e, power = f"{value:.15g}".partition("e")
        return digits + ("" if "." in digits else ".0") + e + power
    return str(value).title() if isinstance(value, float) else str(value)


def replaced(look: Callable[[], None]) -> dict[tuple[str, int], Callable[..., Any]]:
    """The functions to put in place of SQLite's, by name and number of arguments. `look` is called first and may raise."""

    def watched(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*given: Any) -> Any:
            look()
            return function(*given)

        return call

    return {
        ("like", 2): watched(like),
        ("like", 3): watched(like),
        ("instr", 2): watched(instr),
        ("trim", 2): watched(lambda text, letters: _trimmed(text, letters, True, True)),
        ("ltrim", 2): watched(lambda text, letters: _trimmed(text, letters, True, False)),
        ("rtrim", 2): watched(lambda text, letters: _trimmed(text, letters, False, True)),
    }


def copies(sql: str) -> int:
    """How many copies of common table expressions SQLite makes at most to read a query; counting ends behind `MOST_COPIES`.

    >>> copies("WITH a AS (SELECT 1 AS x), b AS (SELECT a.x FROM a, a AS again) SELECT x FROM b")
    3
    """
    tokens = [one for one in _TOKEN.findall(sql) if not one.isspace() and not one.startswith(("--", "/*"))]
    names = [one[1:-1].lower() if one[0] in '"`[' and len(one) > 1 else one.lower() for one in tokens]
    opening: list[int] = []
    pairs = {}
    for place, token in enumerate(tokens):
        if token == "(":
            opening.append(place)
        elif token == ")" and opening:
            pairs[opening.pop()] = place
    closing = {end: start for start, end in pairs.items()}
    bodies: dict[str, list[range]] = {}
    definitions = set()
    for place, word in enumerate(names):
        after = place + 1
        while word == "as" and after < len(names) and names[after] in ("not", "materialized"):
            after += 1
        if word == "as" and after in pairs:  # name (columns) AS (body)
            before = closing.get(place - 1, place) - 1
            bodies.setdefault(names[before], []).append(range(after, pairs[after]))
            definitions.add(before)
    if sum(map(len, bodies.values())) > MOST_COPIES // 10:
        return MOST_COPIES + 1
    known: dict[str, int] = {}

    def counted(places: Iterable[int], inside: frozenset[str]) -> int:
        total = 0
        for place in places:
            name = names[place]
            if name in bodies and name not in inside and tokens[place + 1 : place + 2] not in (["."], ["("]):
                if name not in known:
                    known[name] = 1 + sum(counted(body, inside | {name}) for body in bodies[name])
                total += known[name]
            if total > MOST_COPIES:
                return MOST_COPIES + 1
        return total

    within = {place for ranges in bodies.values() for body in ranges for place in body}
    return counted([place for place in range(len(names)) if place not in within | definitions], frozenset())
