"""Plain values across the border of the sandbox, as JSON with marks: what a program returns is read without running anything of it.

None, bool, int, float, str, bytes, list, tuple, dict, set, frozenset and complex, nested. This file is also put into the sandbox, so that
it imports the standard library only.
"""

from __future__ import annotations

import builtins
import json
from _json import encode_basestring_ascii, make_encoder
from base64 import b64decode
from binascii import b2a_base64
from math import isfinite
from typing import Any

globals()["__builtins__"] = dict(vars(builtins))  # of our own: in the sandbox a program could change everybody's
_WRITTEN = make_encoder(None, repr, encode_basestring_ascii, None, ":", ",", False, False, True)
DEEPEST = 200
"""Nested deeper than this is no plain value: reading it would meet the limit of recursion."""


def encode(value: Any) -> bytes:
    """`value` as bytes. Raises TypeError for what is no plain value; subclasses become the type that they derive from.

    Nothing of the value's own runs meanwhile, whatever it says that it is.

    >>> decode(encode({"a": (1, 2.5, {3})}))
    {'a': (1, 2.5, {3})}
    """
    return "".join(_WRITTEN(_packed(value, 0), 0)).encode()


def decode(data: bytes) -> Any:
    """The value that `encode` wrote. Raises ValueError for other bytes."""
    try:
        return _unpacked(json.loads(data))
    except (ValueError, TypeError, KeyError, IndexError, OverflowError, RecursionError) as error:
        raise ValueError(f"not a plain value: {error}") from None


def _packed(value: Any, depth: int) -> Any:
    if depth > DEEPEST:
        raise TypeError(f"a value nested deeper than {DEEPEST} is not plain")
    if value is None or value is True or value is False:
        return value
    kind = type(value)  # isinstance would ask the value too
    if issubclass(kind, str):
        return str.__str__(value)
    if issubclass(kind, int):
        number = int.__index__(value)
        return (
            number if abs(number) < 2**63 else {"i": hex(number)}
        )  # long ones as hexadecimal: decimal is quadratic, and limited
    if issubclass(kind, float):
        return float.__float__(value) if isfinite(value) else {"f": repr(float.__float__(value))}
    if issubclass(kind, complex):
        value = complex.__pos__(value)
        return {"c": [_packed(value.real, depth + 1), _packed(value.imag, depth + 1)]}
    if issubclass(kind, list):
        return [_packed(item, depth + 1) for item in list.__iter__(value)]
    if issubclass(kind, tuple):
        return {"t": [_packed(item, depth + 1) for item in tuple.__iter__(value)]}
    if issubclass(kind, dict):
        return {"d": [[_packed(key, depth + 1), _packed(item, depth + 1)] for key, item in dict.items(value)]}
    if issubclass(kind, set):
        return {"s": [_packed(item, depth + 1) for item in set.__iter__(value)]}
    if issubclass(kind, frozenset):
        return {"z": [_packed(item, depth + 1) for item in frozenset.__iter__(value)]}
    if issubclass(kind, bytes):
        return {"b": b2a_base64(value, newline=False).decode()}
    raise TypeError(f"a {kind.__name__} is not a plain value")


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
        return b64decode(held, validate=True)
    raise ValueError(f"an unknown mark {mark!r}")
