"""Kinds of values: what a type is to the rules."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Kind:
    """The name of a type; of containers what they hold, "?" where that is not known.

    Beside Python's own: "number" (int or float), "letter" (a string of length 1), "atom" (some hashable value that cannot change),
    "sized" (a container that can be run through again, no string), "iterator".
    """

    name: str = "?"
    item: Kind | None = None
    value: Kind | None = None
    parts: tuple[Kind, ...] = ()

    @property
    def held(self) -> Kind:
        """What it is made of when it is run through."""
        if self.name in ("str", "letter"):
            return LETTER
        if self.name in ("range", "bytes"):
            return INT
        return self.item or UNKNOWN

    @property
    def hashable(self) -> bool:
        """Whether `hash` certainly works, and agrees with `==`."""
        if self.name == "tuple":
            return all(one.hashable for one in self.parts) if self.parts else self.held.hashable
        return self.name in ATOMS

    @property
    def exact(self) -> bool:
        """Whether equal values cannot be told from each other, and any two are ordered: whole numbers, or strings."""
        if self.name == "tuple":
            return bool(self.parts) and all(one.exact for one in self.parts)
        return self.name in ("int", "str", "letter")

    @property
    def immutable(self) -> bool:
        return self.hashable

    @property
    def text(self) -> bool:
        return self.name in ("str", "letter")


UNKNOWN, INT, FLOAT, NUMBER, BOOL = Kind(), Kind("int"), Kind("float"), Kind("number"), Kind("bool")
STR, LETTER, NONE, ATOM, BYTES = Kind("str"), Kind("letter"), Kind("none"), Kind("atom"), Kind("bytes")
ATOMS = frozenset(("int", "float", "number", "bool", "complex", "str", "letter", "bytes", "none", "atom", "range"))
SEQUENCES = frozenset(("list", "tuple", "str", "letter", "range"))
"""What can be indexed from 0 and run through in the same order."""
SIZED = frozenset(("list", "tuple", "range", "set", "frozenset", "dict", "deque", "sized"))
"""Containers, no strings, that have a length and can be run through again and again."""
NUMBERS = frozenset(("int", "float", "number", "bool"))
OF_BUILTINS = {
    "len": INT, "ord": INT, "hash": INT, "id": INT, "int": INT, "float": FLOAT, "str": STR, "repr": STR, "chr": LETTER, "bin": STR,
    "hex": STR, "oct": STR, "bool": BOOL, "any": BOOL, "all": BOOL, "isinstance": BOOL, "range": Kind("range"), "format": STR,
    "callable": BOOL, "bytes": BYTES, "input": STR, "ascii": STR,
    "math.gcd": INT, "math.isqrt": INT, "math.floor": INT, "math.ceil": INT, "math.sqrt": FLOAT, "math.factorial": INT, "math.comb": INT,
    "math.log": FLOAT, "math.log2": FLOAT, "math.log10": FLOAT, "math.lcm": INT, "math.trunc": INT,
}  # fmt: skip
OF_METHODS = {
    **dict.fromkeys(
        (".lower", ".upper", ".strip", ".lstrip", ".rstrip", ".title", ".capitalize", ".swapcase", ".casefold"), STR
    ),
    **dict.fromkeys((".zfill", ".join", ".ljust", ".rjust", ".center", ".replace", ".translate", ".removeprefix"), STR),
    **dict.fromkeys(
        (".isalpha", ".isdigit", ".isupper", ".islower", ".isspace", ".isalnum", ".startswith", ".endswith"), BOOL
    ),
    **dict.fromkeys((".split", ".rsplit", ".splitlines"), Kind("list", STR)),
    **dict.fromkeys((".count", ".bit_length", ".find", ".rfind"), INT),
    ".encode": BYTES,
}
TEXT_METHODS = frozenset(
    ("lower", "upper", "strip", "lstrip", "rstrip", "split", "splitlines", "isalpha", "isdigit", "isupper", "islower", "isspace",
     "isalnum", "startswith", "endswith", "title", "capitalize", "swapcase", "casefold", "zfill", "encode", "isdecimal", "isnumeric",
     "isidentifier", "partition", "rpartition")
)  # fmt: skip
LIST_METHODS = frozenset(("append", "sort", "extend", "reverse"))
ANNOTATIONS = {
    "int": INT, "float": NUMBER, "str": STR, "bool": BOOL, "bytes": BYTES, "None": NONE, "complex": Kind("complex"), "range": Kind("range"),
}  # fmt: skip
CONTAINERS = {
    "list": "list", "List": "list", "set": "set", "Set": "set", "frozenset": "frozenset", "FrozenSet": "frozenset", "deque": "deque",
    "Deque": "deque", "Iterable": "iterator", "Iterator": "iterator", "Generator": "iterator", "Sequence": "?", "Collection": "sized",
}  # fmt: skip


def join(*kinds: Kind) -> Kind:
    """What a value is that is one of these."""
    found: Kind | None = None
    for kind in kinds:
        found = kind if found is None else _two(found, kind)
    return found or UNKNOWN


def _two(one: Kind, other: Kind) -> Kind:
    if one == other:
        return one
    names = {one.name, other.name}
    if names == {"str", "letter"}:
        return STR
    if names <= {"int", "float", "number"}:
        return NUMBER
    if one.name == other.name and one.name != "?":
        held = join(one.item, other.item) if one.item and other.item else one.item or other.item
        if one.name == "tuple" and one.parts and len(one.parts) == len(other.parts):
            parts = tuple(join(a, b) for a, b in zip(one.parts, other.parts, strict=True))
            return Kind("tuple", join(*parts), None, parts)
        value = join(one.value, other.value) if one.value and other.value else one.value or other.value
        return Kind(one.name, held, value)
    if one.hashable and other.hashable:
        return ATOM
    if names <= SIZED:
        empty = {kind.name for kind in (one, other) if kind.item is None and kind.name not in ("range", "sized")}
        known = [kind.held for kind in (one, other) if kind.name not in empty]
        return Kind("sized", join(*known) if known else None)
    return UNKNOWN


def of_values(values: Iterable[Any], depth: int = 0) -> Kind:
    """The kind of values that were seen: theirs, though others may come."""
    return join(*(_of_value(value, depth) for value in values))


def _of_value(value: Any, depth: int) -> Kind:
    kind = type(value)
    plain: dict[type, Kind] = {
        bool: BOOL,
        int: INT,
        float: FLOAT,
        str: STR,
        bytes: BYTES,
        complex: Kind("complex"),
        type(None): NONE,
    }
    if kind in plain:
        return plain[kind]
    if depth > 4:
        return UNKNOWN
    if kind in (list, set, frozenset):
        return Kind(kind.__name__, of_values(value, depth + 1) if value else None)
    if kind is tuple:
        parts = tuple(_of_value(one, depth + 1) for one in value)
        return Kind("tuple", join(*parts) if parts else None, None, parts)
    if kind is dict:
        held = (of_values(value, depth + 1), of_values(value.values(), depth + 1)) if value else (None, None)
        return Kind("dict", *held)
    return UNKNOWN
