"""Plain values across the border of the sandbox, as JSON with marks: what a program returns is read without running anything of it.

None, bool, int, float, str, bytes, list, tuple, dict, set, frozenset and complex, nested. This file is also put into the sandbox, so that
it imports the standard library only.
"""

from __future__ import annotations

import base64
import json
import math
from typing import Any

DEEPEST = 200
"""Nested deeper than this is no plain value: reading it would meet the limit of recursion."""


def encode(value: Any) -> bytes:
    """`value` as bytes. Raises TypeError for what is no plain value; subclasses become the type that they derive from.

    >>> decode(encode({"a": (1, 2.5, {3})}))
    {'a': (1, 2.5, {3})}
    """
    return json.dumps(_packed(value, 0), separators=(",", ":")).encode()


def decode(data: bytes) -> Any:
    """The value that `encode` wrote. Raises ValueError for other bytes."""
    try:
        return _unpacked(json.loads(data))
    except (ValueError, TypeError, KeyError, IndexError, RecursionError) as error:
        raise ValueError(f"not a plain value: {error}") from None


def _packed(value: Any, depth: int) -> Any:
    if depth > DEEPEST:
        raise TypeError(f"a value nested deeper than {DEEPEST} is not plain")
    if value is None or value is True or value is False:
        return value
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, int):
        number = int.__index__(value)
        return (
            number if abs(number) < 2**63 else {"i": hex(number)}
        )  # long ones as hexadecimal: decimal is quadratic, and limited
    if isinstance(value, float):
        return float.__float__(value) if math.isfinite(value) else {"f": repr(float.__float__(value))}
    if isinstance(value, complex):
        return {"c": [_packed(value.real, depth + 1), _packed(value.imag, depth + 1)]}
    if isinstance(value, list):
        return [_packed(item, depth + 1) for item in list.__iter__(value)]
    if isinstance(value, tuple):
        return {"t": [_packed(item, depth + 1) for item in tuple.__iter__(value)]}
    if isinstance(value, dict):
        return {"d": [[_packed(key, depth + 1), _packed(item, depth + 1)] for key, item in dict.items(value)]}
    if isinstance(value, set):
        return {"s": [_packed(item, depth + 1) for item in set.__iter__(value)]}
    if isinstance(value, frozenset):
        return {"z": [_packed(item, depth + 1) for item in frozenset.__iter__(value)]}
    if isinstance(value, bytes):
        return {"b": base64.b64encode(value).decode()}
    raise TypeError(f"a {type(value).__name__} is not a plain value")


def _unpacked(found: Any) -> Any:
    if isinstance(found, list):
        return [_unpacked(item) for item in found]
    if not isinstance(found, dict):
        return found
    ((mark, held),) = found.items()
    if mark == "t":
        return tuple(_unpacked(item) for item in held)
    if mark == "d":
        return {_unpacked(key): _unpacked(item) for key, item in held}
    if mark == "s":
        return {_unpacked(item) for item in held}
    if mark == "z":
        return frozenset(_unpacked(item) for item in held)
    if mark == "i":
        return int(held, 16)
    if mark == "f":
        return float(held)
    if mark == "c":
        return complex(*map(_unpacked, held))
    if mark == "b":
        return base64.b64decode(held, validate=True)
    raise ValueError(f"an unknown mark {mark!r}")
