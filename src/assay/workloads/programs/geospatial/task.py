"""What a task of the bank is, and the short words that its files are written in."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from assay.errors import InputError

Library = Literal["turf", "jsts", "leaflet", "geolib", "none"]
LIBRARIES: tuple[Library, ...] = ("turf", "jsts", "leaflet", "geolib")
"""Those of the tasks on maps; "none" are the plain tasks beside them."""
OutType = Literal["number", "string", "boolean", "array", "object", "geojson", "error_message"]
_HEADER = re.compile(r"function (\w+)\(([\w, ]*)\)$")


@dataclass(frozen=True)
class Case:
    """Arguments by the names of parameters, the right answer, and its type.

    An argument `{"__js__": "page.map()"}` is an expression, evaluated beside the program. `edge` marks cases at the border of what is
    asked, where failing with a message may be right. With `looks` the answer is what those expressions say of the returned `result`.
    """

    params: Mapping[str, Any]
    expected: Any
    out_type: OutType
    edge: bool = False
    looks: tuple[str, ...] = ()


@dataclass(frozen=True)
class Task:
    """A function to be written: what it shall do, its first line, right programs ("reference" first), and cases.

    Expected answers are no library's: they follow from formulas (`sphere`), from plane geometry that can be seen, or from what the task
    says; only the texts of errors are the libraries' own.
    """

    id: str
    library: Library
    about: str
    header: str
    programs: Mapping[str, str]
    cases: tuple[Case, ...]

    @cached_property
    def entry_point(self) -> str:
        """The function's name."""
        return self._signature[0]

    @cached_property
    def parameters(self) -> tuple[str, ...]:
        """The names of its parameters in their order."""
        return tuple(name for name in self._signature[1].split(", ") if name)

    @cached_property
    def _signature(self) -> tuple[str, str]:
        if (found := _HEADER.match(self.header)) is None:
            raise InputError(f"{self.id}: the header must be a function's first line, got {self.header!r}")
        return found[1], found[2]

    @property
    def prompt(self) -> str:
        """What a model is given: the description as a comment, and the first line with its brace."""
        return f"/**\n * {self.about}\n */\n{self.header} {{"


def task(name: str, library: Library, header: str, about: str, body: str, *cases: Case, **variants: str) -> Task:
    """A task from the bodies of its right programs."""
    programs = {"reference": body, **variants}
    whole = {title.replace("_", " "): f"{header} {{\n{_indented(text)}}}\n" for title, text in programs.items()}
    return Task(f"{library}/{name}", library, " ".join(about.split()), header, whole, cases)


def _indented(body: str) -> str:
    lines = body.strip("\n").splitlines()
    least = min((len(line) - len(line.lstrip()) for line in lines if line.strip()), default=0)
    return "".join(f"  {line[least:]}\n" for line in lines)


def number(expected: float, **params: Any) -> Case:
    """A case whose answer is a number; the next ones are those of other types."""
    return Case(params, expected, "number")


def string(expected: str, **params: Any) -> Case:
    return Case(params, expected, "string")


def boolean(expected: bool, **params: Any) -> Case:
    return Case(params, expected, "boolean")


def array(expected: Sequence[Any], **params: Any) -> Case:
    return Case(params, list(expected), "array")


def object_(expected: Mapping[str, Any], **params: Any) -> Case:
    return Case(params, dict(expected), "object")


def geojson(expected: Mapping[str, Any], **params: Any) -> Case:
    return Case(params, expected, "geojson")


def error(message: str, **params: Any) -> Case:
    """An edge case whose right answer is to fail with that message."""
    return Case(params, message, "error_message", edge=True)


def edge(case: Case) -> Case:
    """The same case as one at the border."""
    return Case(case.params, case.expected, case.out_type, True, case.looks)


def state(seen: Mapping[str, Any], **params: Any) -> Case:
    """A case whose answer is the state of what is returned: expressions with `result` and `given`, the arguments, and what they say."""
    return Case(params, dict(seen), "object", looks=tuple(seen))


def js(expression: str) -> dict[str, str]:
    """An argument that is an expression."""
    return {"__js__": expression}


def point(x: float, y: float, **properties: Any) -> dict[str, Any]:
    return feature({"type": "Point", "coordinates": [x, y]}, **properties)


def line(*positions: Sequence[float]) -> dict[str, Any]:
    return feature({"type": "LineString", "coordinates": [list(position) for position in positions]})


def polygon(*rings: Sequence[Sequence[float]]) -> dict[str, Any]:
    return feature({"type": "Polygon", "coordinates": [[list(position) for position in ring] for ring in rings]})


def box(west: float, south: float, east: float, north: float) -> dict[str, Any]:
    return polygon(ring(west, south, east, north))


def ring(west: float, south: float, east: float, north: float) -> list[list[float]]:
    return [[west, south], [east, south], [east, north], [west, north], [west, south]]


def feature(geometry: Mapping[str, Any], **properties: Any) -> dict[str, Any]:
    return {"type": "Feature", "properties": properties, "geometry": dict(geometry)}


def collection(*features: Mapping[str, Any]) -> dict[str, Any]:
    return {"type": "FeatureCollection", "features": list(features)}


def geometry(kind: str, coordinates: Any) -> dict[str, Any]:
    return {"type": kind, "coordinates": coordinates}
