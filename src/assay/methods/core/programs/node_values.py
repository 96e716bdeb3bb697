"""JavaScript's values across the border of the sandbox, as JSON with marks: both ways, and read without running
anything.

null is None, a number is an int where it is a safe integer (5 and 5.0 are one number there) and a float otherwise, an
object a dict of its own enumerable properties, an array a list (a tuple may be given too), undefined is `UNDEFINED`;
`BigInt`, `Date`, `Map`, `Set` and `TypedArray` stand for theirs.
"""

from __future__ import annotations

import base64
import json
import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

from assay import checks

SAFE = 2**53 - 1
"""Above this, integers are no longer told apart as JavaScript's numbers."""
DEEPEST = 200
TYPED = {
    "Int8Array": "b", "Uint8Array": "B", "Uint8ClampedArray": "B", "Int16Array": "h", "Uint16Array": "H",
    "Int32Array": "i", "Uint32Array": "I", "Float32Array": "f", "Float64Array": "d", "BigInt64Array": "q",
    "BigUint64Array": "Q",
}  # fmt: skip


class Undefined(Enum):
    """What JavaScript calls undefined, which is not null (None)."""

    UNDEFINED = "undefined"

    def __repr__(self) -> str:
        return "UNDEFINED"


UNDEFINED = Undefined.UNDEFINED


class BigInt(int):
    """An integer that is a BigInt there: 5n is `BigInt(5)`, which equals 5 here as 5n == 5 does there."""

    def __repr__(self) -> str:
        return f"BigInt({int(self)})"


@dataclass(frozen=True)
class Date:
    """A Date: milliseconds since 1970 in UTC; None for an invalid one."""

    milliseconds: int | None


@dataclass(frozen=True)
class Map:
    """A Map, in the order of insertion. No dict: keys may be objects, and 1 and true are two keys there."""

    items: tuple[tuple[Any, Any], ...]


@dataclass(frozen=True)
class Set:
    """A Set, in the order of insertion. No set, for the same reasons as `Map`."""

    items: tuple[Any, ...]


@dataclass(frozen=True)
class TypedArray:
    """A typed array: its kind ("Float64Array", ...) and its bytes, so that every NaN stays what it is.

    Raises ValueError for another kind, or bytes that are no whole number of items.

    >>> TypedArray.of("Int16Array", [1, -2]).values
    [1, -2]
    """

    kind: str
    data: bytes

    def __post_init__(self) -> None:
        checks.choice("kind", self.kind, list(TYPED))
        if len(self.data) % struct.calcsize(TYPED[self.kind]):
            raise ValueError(f"data must be a whole number of items of {self.kind}, got {len(self.data)} bytes")

    @classmethod
    def of(cls, kind: str, values: Sequence[float]) -> TypedArray:
        """From numbers. Raises ValueError for numbers that do not fit."""
        checks.choice("kind", kind, list(TYPED))
        try:
            return cls(kind, struct.pack(f"<{len(values)}{TYPED[kind]}", *values))
        except (struct.error, OverflowError) as error:
            raise ValueError(f"values must fit into {kind}: {error}") from None

    @property
    def values(self) -> list[Any]:
        """The numbers."""
        each = TYPED[self.kind]
        return list(struct.unpack(f"<{len(self.data) // struct.calcsize(each)}{each}", self.data))


def encode(value: Any) -> str:
    """A value as JSON with marks. Raises ValueError for what is no plain value, and for an int above `SAFE` (say BigInt
    or float).

    >>> encode([1, -0.0, UNDEFINED])
    '[1,{"f":"-0.0"},{"u":0}]'
    """
    return json.dumps(_packed(value, set()), separators=(",", ":"))


def decode(text: str | bytes) -> Any:
    """The value of JSON with marks. Raises ValueError for other text."""
    try:
        return _unpacked(json.loads(text, parse_int=_number, parse_constant=_no_constant))
    except (ValueError, TypeError, KeyError, IndexError, OverflowError, RecursionError, struct.error) as error:
        raise ValueError(f"not a plain value: {error}") from None


def _number(text: str) -> int | float:
    found = float(text)
    return int(found) if abs(found) <= SAFE else found


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _packed(value: Any, above: set[int]) -> Any:
    if value is None or isinstance(value, (bool, str)):
        return value
    if value is UNDEFINED:
        return {"u": 0}
    if isinstance(value, BigInt):
        return {"i": hex(value)}
    if isinstance(value, int):
        if abs(value) > SAFE:
            raise ValueError(f"cases must hold plain values: {value:.3e} is no safe integer, say BigInt or float")
        return int(value)
    if isinstance(value, float):
        if math.isfinite(value) and (value != 0 or math.copysign(1, value) > 0):
            return float(value)
        return {"f": "NaN" if math.isnan(value) else "-0.0" if value == 0 else f"{'-' if value < 0 else ''}Infinity"}
    if isinstance(value, Date):
        return {"D": value.milliseconds}
    if isinstance(value, TypedArray):
        return {"y": [value.kind, base64.b64encode(value.data).decode()]}
    if id(value) in above or len(above) > DEEPEST:
        raise ValueError(f"cases must hold plain values, not cycles and nothing deeper than {DEEPEST}")
    above.add(id(value))
    try:
        return _packed_whole(value, above)
    finally:
        above.discard(id(value))


def _packed_whole(value: Any, above: set[int]) -> Any:
    if isinstance(value, (list, tuple)):
        return [_packed(item, above) for item in value]
    if isinstance(value, Map):
        return {"m": [[_packed_item(key, above), _packed_item(item, above)] for key, item in value.items]}
    if isinstance(value, Set):
        return {"s": [_packed_item(item, above) for item in value.items]}
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        if set(value) == {"__js__"}:
            if not isinstance(value["__js__"], str):
                raise ValueError(f"__js__ must be an expression, got {checks.shown(value['__js__'])}")
            return {"j": value["__js__"]}
        return {"o": [[key, _packed(item, above)] for key, item in value.items()]}
    raise ValueError(f"cases must hold plain values, got {checks.shown(value)}")


def _packed_item(value: Any, above: set[int]) -> Any:
    found = _packed(value, above)
    if isinstance(found, dict) and "j" in found:
        raise ValueError("__js__ must not stand in a Map or Set: write the whole of it as an expression")
    return found


def _unpacked(found: Any) -> Any:
    if isinstance(found, list):
        return [_unpacked(item) for item in found]
    if not isinstance(found, dict):
        return found
    ((mark, held),) = found.items()
    if mark == "o":
        return {_text(key): _unpacked(item) for key, item in held}
    if mark == "u":
        return UNDEFINED
    if mark == "f":
        return float(held)
    if mark == "i":
        return BigInt(held, 16)
    if mark == "D":
        return Date(None if held is None else int(held))
    if mark == "m":
        return Map(tuple((_unpacked(key), _unpacked(item)) for key, item in held))
    if mark == "s":
        return Set(tuple(_unpacked(item) for item in held))
    if mark == "y":
        return TypedArray(held[0], base64.b64decode(held[1], validate=True))
    raise ValueError(f"an unknown mark {mark!r}")


def _text(key: Any) -> str:
    if not isinstance(key, str):
        raise ValueError(f"a key must be text, got {checks.shown(key)}")
    return key
