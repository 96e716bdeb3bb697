"""The fields of a request: each is checked, and described in the server's own OpenAPI document, by the same entry of a table.

A field that would change the answer but is not supported is refused by name, never ignored. Null means that a field was not
given, and is allowed for any that is not required, unknown ones included.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from assay import checks
from assay.server.errors import ApiError, printable, unsupported

T = TypeVar("T")


@dataclass(frozen=True)
class Field:
    """A field: `check(name, value)` gives what is made of its value, `default` stands for one that is not given.

    `check` raises TypeError or ValueError, which become a 400 that names the field, or an ApiError of its own.
    """

    check: Callable[[str, Any], Any]
    schema: Mapping[str, Any] = field(default_factory=dict)
    default: Any = None
    required: bool = False


Fields = dict[str, Field]


def number(default: float, *, low: float, high: float) -> Field:
    """A number in low..high."""
    schema = {"type": "number", "minimum": low, "maximum": high, "default": default}
    return Field(lambda name, value: checks.number(name, value, low=low, high=high), schema, default)


def whole(default: int | None, *, low: int, high: int | None = None) -> Field:
    """A whole number in low..high."""
    schema: dict[str, Any] = {"type": "integer", "minimum": low}
    if high is not None:
        schema["maximum"] = high
    return Field(lambda name, value: checks.whole(name, value, low=low, high=high), schema, default)


def flag(default: bool) -> Field:
    """True or False."""
    return Field(checks.flag, {"type": "boolean", "default": default}, default)


def string(default: str | None, *, schema: Mapping[str, Any] | None = None) -> Field:
    """A text."""
    return Field(text, schema or {"type": "string"}, default)


def one_of(default: str, *allowed: str) -> Field:
    """One of a few words."""
    schema = {"type": "string", "enum": list(allowed), "default": default}
    return Field(lambda name, value: checks.choice(name, value, allowed), schema, default)


def ignored() -> Field:
    """A field that changes nothing in the answer."""
    return Field(lambda name, value: None, {"description": "changes nothing here"})


def refused(*neutral: Any) -> Field:
    """A field that is not supported, with the values that ask for nothing."""

    def check(name: str, value: Any) -> None:
        if not any(isinstance(value, bool) == isinstance(none, bool) and value == none for none in neutral):
            raise unsupported(name, f"{checks.shown(name)} is not supported here")

    return Field(check, {"enum": [*neutral, None], "description": "not supported; these values ask for nothing"})


# ---- reading ----------------------------------------------------------------------------------------------------------------


def document(body: bytes) -> dict[str, Any]:
    """The JSON object in the body of a request. Raises ApiError 400 for anything else: doubled names, NaN and 1e999 are none."""

    def no_constant(name: str) -> None:
        raise ValueError(f"{name} is not JSON")

    def finite(digits: str) -> float:
        found = float(digits)
        if not math.isfinite(found):
            raise ValueError(f"{digits[:40]} is larger than any number here")
        return found

    def no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        made: dict[str, Any] = {}
        for name, value in pairs:
            if name in made:
                raise ValueError(f"{checks.shown(name)} is given twice")
            made[name] = value
        return made

    try:
        found = json.loads(
            body.decode(), parse_constant=no_constant, parse_float=finite, object_pairs_hook=no_duplicates
        )
    except UnicodeDecodeError as error:
        raise ApiError(400, f"the body is not UTF-8: {error.reason} at byte {error.start}") from None
    except ValueError as error:
        raise ApiError(400, f"the body is not JSON: {error}") from None
    except RecursionError:
        raise ApiError(400, "the body is nested too deeply") from None
    if not isinstance(found, dict):
        raise ApiError(400, f"the body must be a JSON object, got a {type(found).__name__}")
    return found


def read(given: Mapping[str, Any], fields: Fields, *, within: str = "") -> dict[str, Any]:
    """The checked values of all `fields` in a JSON object. Raises ApiError, which names the field, for any other.

    `within` is the place of the object in its request, for messages ("messages[0].").
    """
    values = {name: one.default for name, one in fields.items()}
    for name, value in given.items():
        if value is None:
            continue
        if name not in fields:
            where = f"{within[:-1]}: " if within else ""
            what = f"{where}{checks.shown(name)} is not a parameter {'here' if within else 'of this endpoint'}"
            raise unsupported(within + name, what)
        values[name] = checked(within + name, fields[name].check, value)
    for name, one in fields.items():
        if one.required and given.get(name) is None:
            checked(within + name, one.check, None)
            raise ApiError(400, f"{within}{name} is missing", param=within + name)
    return values


def checked(name: str, check: Callable[[str, Any], T], value: Any) -> T:
    """`check(name, value)`, its TypeError or ValueError as a 400 that names the field."""
    try:
        return check(name, value)
    except (TypeError, ValueError) as error:
        raise ApiError(400, str(error), param=printable(name)) from None
    except RecursionError:
        raise ApiError(400, f"{name} is nested too deeply", param=printable(name)) from None


def text(name: str, value: Any) -> str:
    """`value`, a string that can be sent. Raises TypeError for what is none, ValueError for half a surrogate pair in it."""
    if not isinstance(value, str):
        raise TypeError(f"{name} must be a string, got {checks.shown(value)}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{name} holds half a surrogate pair at character {error.start}") from None
    return value


def an_object(name: str, value: Any) -> dict[str, Any]:
    """`value`, a JSON object. Raises TypeError for anything else."""
    if not isinstance(value, dict):
        raise TypeError(f"{name} must be an object, got {checks.shown(value)}")
    return value


# ---- describing -------------------------------------------------------------------------------------------------------------


def schema_of(fields: Fields) -> dict[str, Any]:
    """The JSON schema of an object with these fields."""
    return {
        "type": "object",
        "properties": {
            name: dict(one.schema) if one.required else nullable(one.schema) for name, one in fields.items()
        },
        "required": [name for name, one in fields.items() if one.required],
        "additionalProperties": {"type": "null"},
    }


def nullable(schema: Mapping[str, Any]) -> dict[str, Any]:
    """`schema`, or null."""
    if "type" not in schema and "anyOf" not in schema:  # allows null already
        return dict(schema)
    return {"anyOf": [dict(schema), {"type": "null"}]}
