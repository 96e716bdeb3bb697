"""A subset of JSON Schema, read into what values may be: specs that refer to each other by number.

What no finite value satisfies is taken out, so that whatever is left can be completed.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

from assay import checks
from assay.methods.inference.awrs.regular import Characters, characters

TYPES = ("string", "number", "integer", "boolean", "null", "array", "object")
NOTES = {
    "title", "description", "default", "examples", "deprecated", "readOnly", "writeOnly", "$schema", "$id", "$comment", "$defs",
    "definitions",
}  # fmt: skip
KEYWORDS = {
    "string": ("minLength", "maxLength", "pattern"),
    "number": ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"),
    "array": ("items", "minItems", "maxItems"),
    "object": ("properties", "required", "additionalProperties"),
}
TAKEN = {"type", "enum", "const", "anyOf", "$ref"} | NOTES | {word for words in KEYWORDS.values() for word in words}


def specs_of(schema: Mapping[str, Any]) -> list[list[Spec]]:
    """What a value may be, for the whole schema first and then for each part of it. Errors: see `json_schema`."""
    if not isinstance(schema, Mapping):
        raise TypeError(f"schema must be a mapping, got {checks.shown(schema)}")
    try:
        return _Compiler(schema).compiled()
    except RecursionError:
        raise ValueError("schema must be nested less deeply: Python's stack ends before it does") from None


@dataclass(frozen=True)
class Words:
    """Values spelt in one way each, as a trie: children by byte of each node, and the nodes where a word ends."""

    children: tuple[Mapping[int, int], ...]
    ends: frozenset[int]

    @classmethod
    def of(cls, words: Iterable[bytes]) -> Words:
        children: list[dict[int, int]] = [{}]
        ends = set()
        for word in words:
            at = 0
            for byte in word:
                if byte not in children[at]:
                    children[at][byte] = len(children)
                    children.append({})
                at = children[at][byte]
            ends.add(at)
        return cls(tuple(children), frozenset(ends))


@dataclass(frozen=True)
class Text:
    """Strings of `least` to `most` characters, or of an automaton that counts them itself."""

    least: int = 0
    most: int | None = None
    chars: Characters | None = None


@dataclass(frozen=True)
class Number:
    """Numbers, whole or not, between bounds; `open_*` says that a bound itself is left out."""

    whole: bool
    low: Fraction | None = None
    high: Fraction | None = None
    open_low: bool = False
    open_high: bool = False

    @property
    def bounded(self) -> bool:
        return self.low is not None or self.high is not None

    @property
    def possible(self) -> bool:
        return self.reaches("") or self.reaches("-")

    def holds(self, text: str) -> bool:
        value = Fraction(text)
        above = self.low is None or value > self.low or (value == self.low and not self.open_low)
        below = self.high is None or value < self.high or (value == self.high and not self.open_high)
        return above and below

    def reaches(self, text: str) -> bool:
        """Whether some number within the bounds is spelt with `text` first, without exponent."""
        if text.startswith("-"):
            mirrored = Number(
                self.whole,
                None if self.high is None else -self.high,
                None if self.low is None else -self.low,
                self.open_high,
                self.open_low,
            )
            return mirrored._reaches(text[1:])
        return self._reaches(text)

    def _reaches(self, digits: str) -> bool:
        if not digits:
            zero = Fraction(0)
            if self.whole:
                return self._has_whole(zero, None)
            return self._meets(zero, None)
        whole, dot, part = digits.partition(".")
        if dot:
            low = Fraction(f"{whole}.{part}" if part else whole)
            return self._meets(low, low + Fraction(1, 10 ** len(part)))
        first, scale = int(whole), 1
        if first == 0:
            return self._has_whole(Fraction(0), Fraction(0)) if self.whole else self._meets(Fraction(0), Fraction(1))
        if self.high is None:
            return True
        while first * scale <= self.high:
            low, high = Fraction(first * scale), Fraction((first + 1) * scale)
            if self._has_whole(low, high - 1) if self.whole else self._meets(low, high):
                return True
            scale *= 10
        return False

    def _meets(self, start: Fraction, stop: Fraction | None) -> bool:
        """Whether start <= x < stop holds of some number within the bounds."""
        low, high = self.low, self.high
        if low is None or start > low or (start == low and not self.open_low):
            return high is None or start < high or (start == high and not self.open_high)
        if stop is not None and not low < stop:
            return False
        return high is None or low < high or (low == high and not self.open_low and not self.open_high)

    def _has_whole(self, start: Fraction, stop: Fraction | None) -> bool:
        """Whether start <= x <= stop holds of some whole number within the bounds."""
        least = start if self.low is None else max(start, self.low)
        most = self.high if stop is None else stop if self.high is None else min(stop, self.high)
        first = math.ceil(least)
        if self.open_low and self.low is not None and first <= self.low:
            first += 1
        if most is None:
            return True
        last = math.floor(most)
        if self.open_high and self.high is not None and last >= self.high:
            last -= 1
        return first <= last


@dataclass
class Array:
    """Lists of `least` to `most` items; each is what the node `item` may be."""

    item: int
    least: int = 0
    most: int | None = None


@dataclass
class Object:
    """`names` as JSON spells them between the quotes, the nodes of their values, and that of other keys (None: there are none)."""

    names: tuple[bytes, ...]
    nodes: list[int | None]
    required: frozenset[int]
    other: int | None


Spec = Words | Text | Number | Array | Object


@dataclass
class Node:
    """What a value may be: one of these specs, or what one of these nodes may be."""

    specs: list[Spec] = field(default_factory=list)
    nodes: list[int] = field(default_factory=list)


class _Compiler:
    """Reads a schema into nodes that refer to each other by number."""

    def __init__(self, schema: Mapping[str, Any]) -> None:
        self._schema = schema
        self._nodes: list[Node] = []
        self._by_place: dict[str, int] = {}
        self._anything: int | None = None

    def compiled(self) -> list[list[Spec]]:
        """The specs of every node; those of the whole are the first."""
        self._node(self._schema, "#")
        found = [self._flat(number) for number in range(len(self._nodes))]
        _without_the_impossible(found)
        if not found[0]:
            raise ValueError("schema must allow some value, got one that allows none")
        return found

    def _flat(self, number: int) -> list[Spec]:
        seen, todo, specs = {number}, [number], []
        for at in todo:  # grows as it is walked
            specs += self._nodes[at].specs
            fresh = [inner for inner in self._nodes[at].nodes if inner not in seen]
            seen.update(fresh)
            todo += fresh
        return specs

    def _node(self, schema: Any, place: str) -> int:
        if place in self._by_place:
            return self._by_place[place]
        number = self._by_place[place] = len(self._nodes)
        node = Node()
        self._nodes.append(node)
        if schema is True or schema == {}:
            node.nodes.append(self._any())
        elif isinstance(schema, Mapping):
            self._fill(node, schema, place)
        elif schema is not False:
            raise ValueError(f"schema at {place} must be an object or a truth value, got {checks.shown(schema)}")
        return number

    def _any(self) -> int:
        if self._anything is None:
            self._anything = number = len(self._nodes)
            self._nodes.append(Node())
            self._nodes[number].specs = [s for kind in TYPES if kind != "integer" for s in self._typed(kind, {}, "")]
        return self._anything

    def _fill(self, node: Node, schema: Mapping[str, Any], place: str) -> None:
        for word in schema:
            if word not in TAKEN:
                raise ValueError(f"schema at {place} has the keyword {checks.shown(word)}, which is not supported")
        for word in ("$ref", "anyOf"):
            if word not in schema:
                continue
            if beside := sorted(set(schema) - NOTES - {word}):
                raise ValueError(f"schema at {place} has {', '.join(beside)} beside {word}, which is not supported")
            if word == "$ref":
                node.nodes.append(self._referred(schema[word], place))
                return
            if not isinstance(schema[word], Sequence) or isinstance(schema[word], str) or not schema[word]:
                raise ValueError(f"anyOf at {place} must be a list of schemas, got {checks.shown(schema[word])}")
            node.nodes += [self._node(one, f"{place}/anyOf/{i}") for i, one in enumerate(schema[word])]
            return
        types = schema.get("type", TYPES)
        types = (types,) if isinstance(types, str) else tuple(types) if isinstance(types, Sequence) else (types,)
        if not types or any(kind not in TYPES for kind in types):
            raise ValueError(f"type at {place} must be among {', '.join(TYPES)}, got {checks.shown(schema['type'])}")
        if "enum" in schema or "const" in schema:
            node.specs.append(self._enumerated(schema, types, place))
            return
        for kind in types:
            if kind != "integer" or "number" not in types:
                node.specs += self._typed(kind, schema, place)

    def _referred(self, target: Any, place: str) -> int:
        parts = target.split("/") if isinstance(target, str) else []
        if parts == ["#"]:
            return self._node(self._schema, "#")
        if len(parts) < 3 or parts[0] != "#" or parts[1] not in ("$defs", "definitions"):
            raise ValueError(
                f"$ref at {place} must be '#', '#/$defs/...' or '#/definitions/...', got {checks.shown(target)}"
            )
        found: Any = self._schema
        for part in parts[1:]:
            name = part.replace("~1", "/").replace("~0", "~")
            if isinstance(found, Mapping) and name in found:
                found = found[name]
            elif isinstance(found, list) and name.isdecimal() and int(name) < len(found):
                found = found[int(name)]
            else:
                raise ValueError(f"$ref at {place} leads nowhere: {target!r}")
        return self._node(found, target)

    def _enumerated(self, schema: Mapping[str, Any], types: Sequence[str], place: str) -> Words:
        values = schema.get("enum", [schema.get("const")])
        if not isinstance(values, Sequence) or isinstance(values, str):
            raise ValueError(f"enum at {place} must be a list, got {checks.shown(values)}")
        if "enum" in schema and "const" in schema:
            values = [value for value in values if _same(value, schema["const"])]
        if beyond := sorted(set(schema) - NOTES - {"enum", "const", "type"}):
            raise ValueError(f"schema at {place} has {', '.join(beyond)} beside enum or const, which is not supported")
        fitting = [value for value in values if any(_is_of(value, kind) for kind in types)]
        try:
            return Words.of(json.dumps(value, ensure_ascii=False, allow_nan=False).encode() for value in fitting)
        except (TypeError, ValueError) as error:
            raise ValueError(f"enum or const at {place} must hold JSON values: {error}") from None

    def _typed(self, kind: str, schema: Mapping[str, Any], place: str) -> list[Spec]:
        """What the keywords for one type say."""

        def count(name: str) -> int | None:
            return None if name not in schema else checks.whole(f"{name} at {place}", schema[name], low=0)

        if kind == "null":
            return [Words.of([b"null"])]
        if kind == "boolean":
            return [Words.of([b"true", b"false"])]
        if kind == "string":
            least, most = count("minLength") or 0, count("maxLength")
            if "pattern" not in schema:
                return [Text(least, most)] if most is None or least <= most else []
            chars = characters(schema["pattern"], search=True, flags=re.ASCII, least=least, most=most)
            return [Text(chars=chars)]
        if kind in ("number", "integer"):
            return [number] if (number := _number(kind == "integer", schema, place)).possible else []
        if kind == "array":
            least, most = count("minItems") or 0, count("maxItems")
            item = self._node(schema["items"], f"{place}/items") if "items" in schema else self._any()
            return [Array(item, least, most)] if most is None or least <= most else []
        return [self._object(schema, place)]

    def _object(self, schema: Mapping[str, Any], place: str) -> Object:
        properties = schema.get("properties", {})
        required = schema.get("required", [])
        if not isinstance(properties, Mapping) or not all(isinstance(name, str) for name in properties):
            raise ValueError(f"properties at {place} must be an object, got {checks.shown(properties)}")
        if (
            not isinstance(required, Sequence)
            or isinstance(required, str)
            or not all(isinstance(n, str) for n in required)
        ):
            raise ValueError(f"required at {place} must be a list of names, got {checks.shown(required)}")
        others = schema.get("additionalProperties", True)
        other = self._any() if others is True else self._node(others, f"{place}/additionalProperties")
        names = list(dict.fromkeys([*properties, *required]))
        nodes: list[int | None] = [
            self._node(properties[name], f"{place}/properties/{_pointed(name)}") if name in properties else other
            for name in names
        ]
        try:
            spelt = tuple(json.dumps(name, ensure_ascii=False)[1:-1].encode() for name in names)
        except UnicodeEncodeError:
            raise ValueError(f"properties at {place} must have names that are Unicode text, got {names!r}") from None
        return Object(spelt, nodes, frozenset(names.index(name) for name in required), other)


def _pointed(name: str) -> str:
    """A name as a part of a JSON pointer, so that no two places look the same."""
    return name.replace("~", "~0").replace("/", "~1")


def _number(whole: bool, schema: Mapping[str, Any], place: str) -> Number:
    def bound(name: str) -> Fraction | None:
        if name not in schema:
            return None
        checks.number(f"{name} at {place}", schema[name])
        return Fraction(str(schema[name]))

    low, above, high, below = map(bound, ("minimum", "exclusiveMinimum", "maximum", "exclusiveMaximum"))
    open_low = above is not None and (low is None or above >= low)
    open_high = below is not None and (high is None or below <= high)
    return Number(whole, above if open_low else low, below if open_high else high, open_low, open_high)


def _is_of(value: Any, kind: str) -> bool:
    if isinstance(value, bool) or value is None:
        return kind == ("null" if value is None else "boolean")
    if isinstance(value, (int, float)):
        return kind == "number" or (kind == "integer" and (isinstance(value, int) or value.is_integer()))
    if isinstance(value, str):
        return kind == "string"
    return kind == ("object" if isinstance(value, Mapping) else "array")


def _same(a: Any, b: Any) -> bool:
    """Equality of JSON values: 1 is 1.0, and no truth value."""
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return a.keys() == b.keys() and all(_same(value, b[name]) for name, value in a.items())
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(map(_same, a, b))
    return isinstance(a, bool) == isinstance(b, bool) and bool(a == b)


def _without_the_impossible(found: list[list[Spec]]) -> None:
    """Take out what no finite value satisfies, an object that requires itself, say; what then cannot occur is marked so."""
    possible: set[int] = set()
    while True:
        more = {i for i, specs in enumerate(found) if any(_finite(spec, possible) for spec in specs)}
        if more == possible:
            break
        possible = more
    for specs in found:
        specs[:] = [spec for spec in specs if _finite(spec, possible)]
        for spec in specs:
            if isinstance(spec, Array) and spec.item not in possible:
                spec.most = 0
            if isinstance(spec, Object):
                spec.nodes = [node if node in possible else None for node in spec.nodes]
                spec.other = spec.other if spec.other in possible else None


def _finite(spec: Spec, possible: set[int]) -> bool:
    if isinstance(spec, Words):
        return bool(spec.ends)
    if isinstance(spec, Array):
        return spec.least == 0 or spec.item in possible
    if isinstance(spec, Object):
        return all(spec.nodes[name] in possible for name in spec.required)
    return True
