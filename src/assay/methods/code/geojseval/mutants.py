"""Wrong programs made of right ones, one small fault each, of the kinds that people and models make with maps.

Cases that do not notice them are too weak; a comparator that does not is broken. A fault may change nothing that can be seen (a default
written out, both sides of something symmetric): such a mutant is as right as its program, and no case can tell.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from assay import checks

_TOKEN = re.compile(
    r"(?P<comment>//[^\n]*|/\*.*?\*/)"
    r"|(?P<string>\"(?:\\.|[^\"\\\n])*\"|'(?:\\.|[^'\\\n])*'|`(?:\\.|[^`\\])*`)"
    r"|(?P<number>\b\d+(?:\.\d+)?(?:e[+-]?\d+)?\b)"
    r"|(?P<name>[A-Za-z_$][\w$]*)"
    r"|(?P<sign>=>|===|!==|==|!=|<=|>=|&&|\|\||\?\?|\?\.|\*\*|\+\+|--|\+=|-=|\*=|/=|\.\.\.|[^\s\w])",
    flags=re.DOTALL,
)
PAIRS = {"(": ")", "[": "]", "{": "}"}
UNITS = {
    "kilometers": "miles", "meters": "kilometers", "miles": "kilometers", "degrees": "radians", "radians": "degrees",
    "km": "mi", "m": "km", "km2": "m2", "m2": "km2",
}  # fmt: skip
OTHERS = {
    "intersects": "touches", "touches": "intersects", "contains": "within", "within": "contains", "covers": "contains",
    "overlaps": "intersects", "disjoint": "intersects", "crosses": "touches", "intersection": "union",
    "union": "intersection", "symDifference": "union", "intersect": "union", "difference": "intersect",
    "booleanWithin": "booleanContains", "booleanContains": "booleanWithin", "booleanOverlap": "booleanIntersects",
    "bearing": "rhumbBearing", "centroid": "centerOfMass", "area": "length", "lat": "lng", "lng": "lat",
    "latitude": "longitude", "longitude": "latitude", "min": "max", "max": "min", "floor": "ceil", "ceil": "floor",
    "getSouthWest": "getNorthEast", "getNorthEast": "getSouthWest", "getWest": "getEast", "getEast": "getWest",
    "getNorth": "getSouth", "getSouth": "getNorth", "addLayer": "removeLayer", "getMinX": "getMaxX",
    "getArea": "getLength", "getLength": "getArea", "some": "every", "every": "some",
}  # fmt: skip
"""Names that are taken for each other. None of them is one that another stands for."""
SYMMETRIC = frozenset({"distance", "lineIntersect", "max", "midpoint", "min"})
"""Functions whose first two arguments may be swapped."""
SIGNS = {
    "<": "<=", ">": ">=", "<=": "<", ">=": ">", "===": "!==", "!==": "===", "+": "-", "-": "+", "*": "/", "/": "*",
    "&&": "||", "||": "&&",
}  # fmt: skip


@dataclass(frozen=True)
class Token:
    """A piece of a program: its kind ("string", "number", "name", "sign"), its text, and where it begins and ends."""

    kind: str
    text: str
    start: int
    end: int


@dataclass(frozen=True)
class Mutant:
    """A program with one fault: the rule that made it, the line (from 1), the whole program, and what stands there instead of what."""

    rule: str
    line: int
    program: str
    why: str

    @property
    def held_out(self) -> bool:
        """Half of all mutants, by a digest of what the fault is: those that cases may not be improved by."""
        return hashlib.sha256(f"{self.rule}/{self.why}/{self.program}".encode()).digest()[0] % 2 == 0


Edit = tuple[int, int, str]
"""From where to where, and what stands there afterwards."""


def tokens(program: str) -> list[Token]:
    """The pieces of a program without comments and spaces. It knows no regular expressions: `/` is a division.

    >>> [token.text for token in tokens("f(a, 'b') // c")]
    ['f', '(', 'a', ',', "'b'", ')']
    """
    found = [Token(str(match.lastgroup), match[0], *match.span()) for match in _TOKEN.finditer(program)]
    return [token for token in found if token.kind != "comment"]


def _closing(found: Sequence[Token], at: int) -> int:
    """The place of the bracket that closes the one at a place."""
    depth = 0
    for n in range(at, len(found)):
        if found[n].text in PAIRS:
            depth += 1
        elif found[n].text in PAIRS.values():
            depth -= 1
            if not depth:
                return n
    raise ValueError("program must have a closing bracket for every opening one")


def _items(found: Sequence[Token], at: int) -> list[tuple[int, int]]:
    """What stands between commas inside of the bracket at a place: the first and last token of each."""
    end, items, start, n = _closing(found, at), [], at + 1, at + 1
    while n < end:
        if found[n].text in PAIRS:
            n = _closing(found, n)
        elif found[n].text == ",":
            items.append((start, n - 1))
            start = n + 1
        n += 1
    if start < end:
        items.append((start, end - 1))
    return [item for item in items if item[0] <= item[1]]


def _text(program: str, found: Sequence[Token], item: tuple[int, int]) -> str:
    return program[found[item[0]].start : found[item[1]].end]


def _swapped(program: str, found: Sequence[Token], at: int) -> Edit | None:
    """The first two items of the bracket at a place in each other's."""
    items = _items(found, at)
    if len(items) < 2:
        return None
    one, other = _text(program, found, items[0]), _text(program, found, items[1])
    if one == other:
        return None
    between = program[found[items[0][1]].end : found[items[1][0]].start]
    return found[items[0][0]].start, found[items[1][1]].end, f"{other}{between}{one}"


def _is_call(found: Sequence[Token], at: int) -> bool:
    """Whether the bracket at a place holds the arguments of a call."""
    if found[at].text != "(" or at == 0:
        return False
    before = found[at - 1]
    if before.text in ("if", "for", "while", "switch", "function", "return", "catch"):
        return False
    declared = at > 1 and found[at - 2].text in ("function", "async")
    return not declared and (before.kind == "name" or before.text in (")", "]"))


def swapped_pair(program: str, found: Sequence[Token]) -> Iterator[Edit]:
    """[longitude, latitude] for [latitude, longitude], and the other way round: lists of two, also where one is taken apart."""
    for n, token in enumerate(found):
        indexed = n > 0 and (found[n - 1].kind in ("name", "string") or found[n - 1].text in (")", "]"))
        if indexed and found[n - 1].text in ("return", "const", "let", "of", "in"):
            indexed = False
        if token.text == "[" and not indexed and len(_items(found, n)) == 2:
            edit = _swapped(program, found, n)
            if edit is not None:
                yield edit


def swapped_arguments(program: str, found: Sequence[Token]) -> Iterator[Edit]:
    """The first two arguments of a call in each other's place."""
    for n in range(len(found)):
        if _is_call(found, n) and found[n - 1].text not in SYMMETRIC:
            edit = _swapped(program, found, n)
            if edit is not None:
                yield edit


def wrong_index(program: str, found: Sequence[Token]) -> Iterator[Edit]:
    """The longitude where the latitude is meant: x[0] for x[1]."""
    for before, token, after in zip(found, found[1:], found[2:], strict=False):
        if before.text == "[" and after.text == "]" and token.text in ("0", "1"):
            yield token.start, token.end, "1" if token.text == "0" else "0"


def off_by_one(program: str, found: Sequence[Token]) -> Iterator[Edit]:
    """A whole number that is one larger."""
    for token in found:
        if token.kind == "number" and token.text.isdigit():
            yield token.start, token.end, str(int(token.text) + 1)


def wrong_unit(program: str, found: Sequence[Token]) -> Iterator[Edit]:
    """Kilometres for miles, degrees for radians."""
    for token in found:
        if token.kind == "string" and token.text[1:-1] in UNITS:
            yield token.start + 1, token.end - 1, UNITS[token.text[1:-1]]


def missing_option(program: str, found: Sequence[Token]) -> Iterator[Edit]:
    """The last argument left out where it is an object of options; each option left out."""
    for n in range(len(found)):
        items = _items(found, n) if _is_call(found, n) else []
        if len(items) < 2 or found[items[-1][0]].text != "{":
            continue
        start, end = items[-1]
        yield found[items[-2][1]].end, found[end].end, ""
        options = _items(found, start)
        if len(options) > 1:
            for m, (first, last) in enumerate(options):
                if m + 1 < len(options):
                    yield found[first].start, found[options[m + 1][0]].start, ""
                else:
                    yield found[options[m - 1][1]].end, found[last].end, ""


def missing_argument(program: str, found: Sequence[Token]) -> Iterator[Edit]:
    """The last of several arguments left out, where it is no object."""
    for n in range(len(found)):
        items = _items(found, n) if _is_call(found, n) else []
        if len(items) > 1 and found[items[-1][0]].text != "{" and "=>" not in _text(program, found, items[-1]):
            yield found[items[-2][1]].end, found[items[-1][1]].end, ""


def other_sign(program: str, found: Sequence[Token]) -> Iterator[Edit]:
    """< for <=, + for -, && for ||."""
    for n, token in enumerate(found):
        binary = n > 0 and (found[n - 1].kind != "sign" or found[n - 1].text in (")", "]"))
        if token.kind == "sign" and token.text in SIGNS and binary and found[n - 1].text != "return":
            yield token.start, token.end, SIGNS[token.text]


def other_function(program: str, found: Sequence[Token]) -> Iterator[Edit]:
    """A function or property that is easily taken for the one that is meant."""
    for before, token in zip(found, found[1:], strict=False):
        if before.text == "." and token.text in OTHERS:
            yield token.start, token.end, OTHERS[token.text]


def not_negated(program: str, found: Sequence[Token]) -> Iterator[Edit]:
    """!x as x, true as false."""
    for token in found:
        if token.text == "!":
            yield token.start, token.end, ""
        elif token.text in ("true", "false"):
            yield token.start, token.end, "false" if token.text == "true" else "true"


def nothing_done(program: str, found: Sequence[Token]) -> Iterator[Edit]:
    """A statement of its own left out, and a return of nothing."""
    start = 0
    for n, token in enumerate(found):
        if token.text in ("{", "}"):
            start = n + 1
        elif token.text == ";":
            first = found[start] if start < n else token
            if first.text == "return" and start + 1 < n:
                yield found[start + 1].start, token.start, "undefined"
            elif first.text not in ("const", "let", "var", "for", "return", ";", ")") and found[start].start > 0:
                yield first.start, token.end, ""
            start = n + 1


RULES: dict[str, Callable[[str, Sequence[Token]], Iterator[Edit]]] = {
    rule.__name__.replace("_", " "): rule
    for rule in (
        swapped_pair, swapped_arguments, wrong_index, off_by_one, wrong_unit, missing_option, missing_argument, other_sign,
        other_function, not_negated, nothing_done,
    )
}  # fmt: skip
"""The kinds of faults, by name."""


def mutants(program: str, *, rules: Sequence[str] = tuple(RULES)) -> list[Mutant]:
    """All mutants of a program, in order of rules and places, without those of the same text.

    For programs of the project's own, plain and short: it looks at tokens and does not parse, so that some mutants are no programs (they
    are killed by a SyntaxError). Raises ValueError for an unknown rule and for brackets that do not fit.

    >>> [mutant.why for mutant in mutants("(p) => [p[1], p[0]]", rules=["swapped pair"])]
    ['(p) => [p[1], p[0]] -> (p) => [p[0], p[1]]']
    """
    found, seen, made = tokens(program), {program}, []
    for name in rules:
        for start, end, text in RULES[checks.choice("rules", name, list(RULES))](program, found):
            changed = program[:start] + text + program[end:]
            if changed in seen:
                continue
            seen.add(changed)
            line = program.count("\n", 0, start) + 1
            made.append(Mutant(name, line, changed, _why(program, start, end, text)))
    return made


def _why(program: str, start: int, end: int, text: str) -> str:
    """What was and what is, with what stands around it on its line."""
    low = max(program.rfind("\n", 0, start) + 1, start - 30)
    after = program.find("\n", end)
    high = min(len(program) if after < 0 else after, end + 10)
    was = " ".join(program[low:high].split())
    now = " ".join((program[low:start] + text + program[end:high]).split())
    return f"{was} -> {now}"
