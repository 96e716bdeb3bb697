"""JSON read byte by byte under a subset of JSON Schema, with an answer to "can this still become valid?" after each byte.

A state is the set of stacks that the text read so far allows, one for each way to read it (`anyOf`, enumerations), of frames: the
arrays and objects that are open and the value that is being read. Two spellings are left out on purpose (our choice), since a model
could go on with them for ever, or since they make a key ambiguous: white space before and behind the whole value and more than
`MOST_SPACE` bytes of it in one place, and escapes in keys that JSON does not require. All values can still be spelt.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from assay.methods.inference.awrs.constraints import Automaton, Constraint
from assay.methods.inference.awrs.regular import LAST, SURROGATES, Characters, utf8_span
from assay.methods.inference.awrs.schemas import Array, Number, Object, Spec, Text, Words, specs_of

MOST_SPACE = 40
SPACE, DIGITS, QUOTE, BACKSLASH = b" \t\n\r", b"0123456789", 0x22, 0x5C
ESCAPES = dict(zip(b'"\\/bfnrt', b'"\\/\b\f\n\r\t', strict=True))
KEY_ESCAPES = tuple(json.dumps(chr(code))[1:-1].encode() for code in (*range(0x20), QUOTE, BACKSLASH))

Stack = tuple[Any, ...]  # (frame, stack below), or () where the value is read


def json_schema(schema: Mapping[str, Any]) -> Constraint:
    """JSON texts that are valid under `schema`: every complete text is, and every valid value has a spelling that is accepted.

    Taken from JSON Schema: `type` (one or several), `properties`, `required`, `additionalProperties`, `items`, `minItems`,
    `maxItems`, `minLength`, `maxLength`, `pattern` (in Python's syntax under `re.ASCII`: \\d and \\w are ECMAScript's, \\s knows the
    spaces of ASCII only; what `regex` cannot do is refused),
    `minimum`, `maximum`, `exclusiveMinimum`, `exclusiveMaximum`, `enum`, `const`, `anyOf`, `$ref` to `#`, `#/$defs/...` and
    `#/definitions/...`, and what only describes (`title`, `default` ...). As in JSON Schema, a keyword says nothing about values of
    other types. Any other keyword is refused by name, and so are keywords beside `anyOf` and `$ref`.

    Spelling (our choice): integers without fraction or exponent; numbers with bounds without exponent; the values of `enum` and `const`
    as `json.dumps(value, ensure_ascii=False)` writes them; keys in any order, no property twice; no white space around the whole, and
    at most 40 bytes of it in one place.

    Raises TypeError for what is no mapping, and ValueError, with the place in the schema, for keywords that are not taken, values a
    keyword cannot have (TypeError where their type is wrong), references that lead nowhere, and schemas that no value satisfies.

    When NOT to use it: for schemas beyond this subset (`oneOf`, `format`, `patternProperties` ...), and for languages with a compiled
    grammar at hand, whose masks are cheaper.

    >>> person = json_schema({"type": "object", "properties": {"age": {"type": "integer", "minimum": 0}}, "required": ["age"]})
    >>> person.prefix(b'{"age": 4'), person.prefix(b'{"age": -4'), person.complete(b'{"age": 4}')
    (True, False, True)
    """
    return Json(specs_of(schema))


def json_object() -> Constraint:
    """Any JSON object.

    >>> json_object().complete(b'{"a": [1, null]}'), json_object().prefix(b"[")
    (True, False)
    """
    return json_schema({"type": "object"})


class Json(Automaton):
    """Frames are tuples that begin with their kind; a spec is named by its number.

    ("value", node), ("word", spec, place in the trie), ("text", spec, state, count, pending), ("number", spec, text),
    ("array", spec, count, phase, space), ("object", spec, seen, phase, space, node), ("key", spec, seen, raw, pending).
    """

    def __init__(self, nodes: list[list[Spec]]) -> None:
        super().__init__(frozenset({(("value", 0), ())}))
        self._specs = [spec for specs in nodes for spec in specs]
        numbers = iter(range(len(self._specs)))
        self._nodes = [[next(numbers) for _ in specs] for specs in nodes]

    def take(self, state: frozenset[Stack], byte: int) -> frozenset[Stack] | None:
        return frozenset(after for stack in state for after in self._read(stack, byte)) or None

    def is_final(self, state: frozenset[Stack]) -> bool:
        return any(not stack or (not stack[1] and self._is_number(stack[0])) for stack in state)

    def _read(self, stack: Stack, byte: int) -> Iterator[Stack]:
        """The stacks behind a byte."""
        if not stack:
            return
        frame, below = stack
        kind = frame[0]
        if kind == "value":
            yield from self._begin(frame[1], byte, below)
        elif kind == "word":
            yield from self._word(frame[1], frame[2], byte, below)
        elif kind == "text":
            yield from self._text(frame, byte, below)
        elif kind == "number":
            after = self._digit(frame[1], frame[2], byte)
            if after is not None:
                yield ("number", frame[1], after), below
            if self._is_number(frame):
                yield from self._read(below, byte)
        elif kind == "array":
            yield from self._array(frame, byte, below)
        elif kind == "object":
            yield from self._object(frame, byte, below)
        else:
            yield from self._key(frame, byte, below)

    def _begin(self, node: int, byte: int, below: Stack) -> Iterator[Stack]:
        """The first byte of a value, behind which the frame `below` goes on."""
        for number in self._nodes[node]:
            spec = self._specs[number]
            if isinstance(spec, Words):
                yield from self._word(number, 0, byte, below)
            elif isinstance(spec, Text):
                if byte == QUOTE:
                    yield ("text", number, Characters.start, 0, b""), below
            elif isinstance(spec, Number):
                after = self._digit(number, "", byte)
                if after is not None:
                    yield ("number", number, after), below
            elif isinstance(spec, Array):
                if byte == ord("["):
                    yield ("array", number, 0, "open", 0), below
            elif byte == ord("{"):
                yield ("object", number, frozenset(), "open", 0, None), below

    def _word(self, number: int, place: int, byte: int, below: Stack) -> Iterator[Stack]:
        words: Any = self._specs[number]
        after = words.children[place].get(byte)
        if after is None:
            return
        if after in words.ends:
            yield below
        if words.children[after]:
            yield ("word", number, after), below

    def _text(self, frame: tuple[Any, ...], byte: int, below: Stack) -> Iterator[Stack]:
        _, number, at, count, pending = frame
        spec: Any = self._specs[number]
        if byte == QUOTE and not pending:
            if spec.chars.accepts(at) if spec.chars else count >= spec.least:
                yield below
            return
        pending += bytes((byte,))
        spelt = spelt_in_json(pending)
        if spelt is None or (spec.most is not None and count >= spec.most):
            return
        spans, whole = spelt
        if not whole:
            if not spec.chars or any(spec.chars.any_of(at, low, high) for low, high in spans):
                yield ("text", number, at, count, pending), below
            return
        after = spec.chars.step(at, spans[0][0]) if spec.chars else at
        if after is not None:
            cap = spec.least if spec.most is None else spec.most
            yield ("text", number, after, min(count + 1, cap), b""), below

    def _digit(self, number: int, text: str, byte: int) -> str | None:
        """The text of a number behind one more byte, shortened to what matters; None where it is none within the bounds."""
        spec: Any = self._specs[number]
        shape = _shape(text)
        after = _NUMBER.get(shape, {}).get(byte)
        if after is None or (after in ".fe+x" and spec.whole) or (after in "e+x" and spec.bounded):
            return None
        if not spec.bounded:
            return after
        text += chr(byte)
        return text if spec.reaches(text) else None

    def _is_number(self, frame: tuple[Any, ...]) -> bool:
        if frame[0] != "number" or _shape(frame[2]) not in ("0", "1", "f", "x"):
            return False
        spec: Any = self._specs[frame[1]]
        return not spec.bounded or spec.holds(frame[2])

    def _array(self, frame: tuple[Any, ...], byte: int, below: Stack) -> Iterator[Stack]:
        _, number, count, phase, space = frame
        spec: Any = self._specs[number]
        if byte in SPACE:
            if space < MOST_SPACE:
                yield ("array", number, count, phase, space + 1), below
            return
        more = spec.most is None or count < spec.most
        if phase == "next":
            if byte == ord(",") and more:
                yield ("array", number, count, "item", 0), below
            if byte == ord("]") and count >= spec.least:
                yield below
            return
        if byte == ord("]") and phase == "open":
            if spec.least == 0:
                yield below
        elif more:
            cap = spec.least if spec.most is None else spec.most
            yield from self._begin(spec.item, byte, (("array", number, min(count + 1, cap), "next", 0), below))

    def _object(self, frame: tuple[Any, ...], byte: int, below: Stack) -> Iterator[Stack]:
        _, number, seen, phase, space, node = frame
        spec: Any = self._specs[number]
        if byte in SPACE:
            if space < MOST_SPACE:
                yield ("object", number, seen, phase, space + 1, node), below
        elif phase == "colon":
            if byte == ord(":"):
                yield ("object", number, seen, "value", 0, node), below
        elif phase == "value":
            yield from self._begin(node, byte, (("object", number, seen, "next", 0, None), below))
        elif byte == QUOTE and phase in ("open", "key"):
            if self._more_keys(spec, seen):
                yield ("key", number, seen, b"", b"" if spec.other is not None else None), below
        elif byte == ord(",") and phase == "next":
            if self._more_keys(spec, seen):
                yield ("object", number, seen, "key", 0, None), below
        elif byte == ord("}") and phase in ("open", "next") and spec.required <= seen:
            yield below

    def _more_keys(self, spec: Object, seen: frozenset[int]) -> bool:
        left = (node for name, node in enumerate(spec.nodes) if name not in seen)
        return spec.other is not None or any(node is not None for node in left)

    def _key(self, frame: tuple[Any, ...], byte: int, below: Stack) -> Iterator[Stack]:
        """`raw` is the key so far, None once it is none of the names; `pending` what is open of a character, None if it must be a name."""
        _, number, seen, raw, pending = frame
        spec: Any = self._specs[number]
        escaping = raw is not None and _escapes(raw) or bool(pending)
        if byte == QUOTE and not escaping:
            if raw in spec.names:
                name = spec.names.index(raw)
                if name not in seen and spec.nodes[name] is not None:
                    yield ("object", number, seen | {name}, "colon", 0, spec.nodes[name]), below
            elif pending is not None:
                yield ("object", number, seen, "colon", 0, spec.other), below
            return
        if raw is not None:
            raw += bytes((byte,))
            if not any(name.startswith(raw) for name in spec.names):
                raw = None
        if pending is not None:
            pending += bytes((byte,))
            if pending[0] == BACKSLASH:
                fits = any(escape.startswith(pending) for escape in KEY_ESCAPES)
                pending = None if not fits else b"" if pending in KEY_ESCAPES else pending
            else:
                spelt = spelt_in_json(pending)
                pending = None if spelt is None else b"" if spelt[1] else pending
        possible = raw is not None and any(
            name.startswith(raw) and node is not None
            for i, (name, node) in enumerate(zip(spec.names, spec.nodes, strict=True))
            if i not in seen
        )
        if possible or pending is not None:
            yield ("key", number, seen, raw, pending), below


def _escapes(raw: bytes) -> bool:
    """Whether a backslash at the end waits for what it escapes."""
    return (len(raw) - len(raw.rstrip(b"\\"))) % 2 == 1


def _next_shapes() -> dict[str, dict[int, str]]:
    """A number's shapes: "-" sign, "0" zero, "1" digits, "." point, "f" fraction, "e" exponent, "+" its sign, "x" its digits."""
    zero, rest = DIGITS[:1], DIGITS[1:]
    begin = dict.fromkeys(zero, "0") | dict.fromkeys(rest, "1")
    more = dict.fromkeys(b".", ".") | dict.fromkeys(b"eE", "e")
    exponent = dict.fromkeys(DIGITS, "x")
    return {
        "": begin | {ord("-"): "-"},
        "-": begin,
        "0": more,
        "1": more | dict.fromkeys(DIGITS, "1"),
        ".": dict.fromkeys(DIGITS, "f"),
        "f": dict.fromkeys(DIGITS, "f") | dict.fromkeys(b"eE", "e"),
        "e": exponent | dict.fromkeys(b"+-", "+"),
        "+": exponent,
        "x": exponent,
    }


_NUMBER = _next_shapes()


def _shape(text: str) -> str:
    """The shape of a number's text (of numbers without bounds, the text is the shape)."""
    if text in _NUMBER:
        return text
    digits = text.removeprefix("-")
    if "." in digits:
        return "." if digits.endswith(".") else "f"
    return "0" if digits == "0" else "1"


def spelt_in_json(piece: bytes) -> tuple[list[tuple[int, int]], bool] | None:
    """The characters that `piece`, inside a JSON string, may become, as spans of code points, and whether it is a whole one.

    >>> spelt_in_json(b"a"), spelt_in_json(b"\\\\n"), spelt_in_json(b"\\\\u00e"), spelt_in_json(b"\\n")
    (([(97, 97)], True), ([(10, 10)], True), ([(224, 239)], False), None)
    """
    if piece[0] != BACKSLASH:
        found = utf8_span(piece)
        if found is None or piece[0] < 0x20 or piece[0] == QUOTE:
            return None
        return [found[:2]], found[2]
    if len(piece) == 1:
        return [(0, LAST)], False
    if piece[1] != ord("u"):
        return ([(ESCAPES[piece[1]],) * 2], True) if len(piece) == 2 and piece[1] in ESCAPES else None
    first = _hex_span(piece[2:6])
    if first is None:
        return None
    low, high = first
    leading, trailing = (0xD800, 0xDBFF), (0xDC00, 0xDFFF)
    if len(piece) < 6:
        spans = [(low, min(high, SURROGATES[0] - 1)), (max(low, SURROGATES[1] + 1), high)]
        if low <= leading[1] and high >= leading[0]:
            upper = (max(low, leading[0]), min(high, leading[1]))
            spans.append((_joined(upper[0], trailing[0]), _joined(upper[1], trailing[1])))
        spans = [span for span in spans if span[0] <= span[1]]
        return (spans, False) if spans else None
    if not SURROGATES[0] <= low <= SURROGATES[1]:
        return ([(low, low)], True) if len(piece) == 6 else None
    if low > leading[1]:
        return None
    if not b"\\u".startswith(piece[6:8]):
        return None
    second = _hex_span(piece[8:])
    if second is None:
        return None
    start, stop = max(second[0], trailing[0]), min(second[1], trailing[1])
    return ([(_joined(low, start), _joined(low, stop))], len(piece) == 12) if start <= stop else None


def _hex_span(digits: bytes) -> tuple[int, int] | None:
    """The numbers of four hexadecimal digits that begin so; None for what is no digit, and for more than four."""
    if len(digits) > 4 or any(byte not in b"0123456789abcdefABCDEF" for byte in digits):
        return None
    low = int(digits or b"0", 16) << 4 * (4 - len(digits))
    return low, low + (1 << 4 * (4 - len(digits))) - 1


def _joined(first: int, second: int) -> int:
    """The character of a pair of surrogates."""
    return 0x10000 + ((first - 0xD800) << 10) + (second - 0xDC00)
