"""Is an answer the expected one, for each type that a task may ask for? What comes out is right, wrong, or of another type.

All comparisons are symmetric. A comparator that accepts a wrong answer is worse than none: each of them is tested by changing answers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

from assay import checks

OutType = Literal["number", "string", "boolean", "array", "object", "geojson", "error_message"]
OUT_TYPES: tuple[OutType, ...] = ("number", "string", "boolean", "array", "object", "geojson", "error_message")
Finding = Literal["right", "wrong", "type"]
"""Right, wrong, or not of the type asked for (which is wrong too)."""
CLOSE = 1e-6
"""How far numbers may differ, absolutely: as numbers, in objects, and as coordinates of geometries."""
CLOSE_IN_ARRAYS = 5e-4
"""The same in arrays, where three decimals count: half of the third. (Rounding both would tell 0.0005 from 0.00049999999.)"""
Point = tuple[float, ...]
Part = tuple[str, Any]


def compared(out_type: OutType, expected: Any, got: Any) -> Finding:
    """Compare an answer with the expected one, by the type that the task asks for.

    - "number": within `CLOSE`; "string", "boolean", "error_message": the same.
    - "array": item by item in their order, numbers within `CLOSE_IN_ARRAYS`.
    - "object": the same keys in any order, lists of the same length, numbers within `CLOSE`.
    - "geojson": the same geometry (`same_geometry`), whatever carries it; properties do not count.

    A bool is no number, null and undefined are of no type. An error's message is compared here as the text that it is; that the program
    failed is told by how its run ended. Raises ValueError for another type, and where `expected` is not of it.

    >>> compared("number", 2, 2.0000001), compared("number", 2, "2"), compared("array", [1, 2], [2, 1])
    ('right', 'type', 'wrong')
    """
    checks.choice("out_type", out_type, OUT_TYPES)
    if not _is_of(out_type, expected):
        raise ValueError(f"expected must be of the type {out_type}, got {checks.shown(expected)}")
    if not _is_of(out_type, got):
        return "type"
    if out_type == "geojson":
        return "right" if same_geometry(expected, got) else "wrong"
    return "right" if _alike(expected, got, CLOSE_IN_ARRAYS if out_type == "array" else CLOSE) else "wrong"


def same_geometry(one: Any, other: Any) -> bool:
    """Whether two values of GeoJSON have the same geometry, coordinates within `CLOSE`.

    A feature, a collection, a multi-geometry of one part and the part itself are the same. Where a ring or a line begins, which way it
    runs, the order of parts, points repeated in a row and points on a straight line do not count. Not for geometries that cover the same
    place in other parts, such as two touching boxes and the box around both: these differ. Raises ValueError for what is no GeoJSON.

    >>> square = [[0, 0], [2, 0], [2, 2], [0, 2], [0, 0]]
    >>> turned = [[2, 2], [2, 0], [1, 0], [0, 0], [0, 2], [2, 2]]
    >>> same_geometry({"type": "Polygon", "coordinates": [square]}, {"type": "MultiPolygon", "coordinates": [[turned]]})
    True
    """
    return _paired(list(_parts(one)), list(_parts(other)), _same_part)


def _is_of(out_type: str, value: Any) -> bool:
    if out_type == "boolean":
        return isinstance(value, bool)
    if out_type == "number":
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if out_type in ("string", "error_message"):
        return isinstance(value, str)
    if out_type == "array":
        return isinstance(value, list)
    if out_type == "object":
        return isinstance(value, dict)
    try:
        list(_parts(value))
    except (ValueError, RecursionError):  # collections in collections without end, too
        return False
    return True


def _alike(one: Any, other: Any, close: float) -> bool:
    if isinstance(one, bool) or isinstance(other, bool):
        return one is other
    if isinstance(one, (int, float)) and isinstance(other, (int, float)):
        return _near(one, other, close)
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)):
        return len(one) == len(other) and all(_alike(a, b, close) for a, b in zip(one, other, strict=True))
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_alike(value, other[key], close) for key, value in one.items())
    return type(one) is type(other) and bool(one == other)


def _near(one: float, other: float, close: float) -> bool:
    if math.isfinite(one) and math.isfinite(other):
        return abs(one - other) <= close
    return one == other or (math.isnan(one) and math.isnan(other))


# ------------------------------------------------------------------------------------------------------------------------ geometry


def _parts(value: Any) -> Iterable[Part]:
    """The points, lines and polygons of a GeoJSON value, without points that are repeated in a row."""
    if not isinstance(value, dict):
        raise ValueError(f"GeoJSON must be an object, got {checks.shown(value)}")
    kind = value.get("type")
    if kind == "Feature":
        if value.get("geometry") is not None:
            yield from _parts(value["geometry"])
    elif kind in ("FeatureCollection", "GeometryCollection"):
        for part in _listed(value.get("features" if kind == "FeatureCollection" else "geometries")):
            yield from _parts(part)
    elif kind == "Point":
        yield "point", _point(value.get("coordinates"))
    elif kind == "LineString":
        yield "line", _line(value.get("coordinates"))
    elif kind == "Polygon":
        yield "polygon", _polygon(value.get("coordinates"))
    elif kind in ("MultiPoint", "MultiLineString", "MultiPolygon"):
        for part in _listed(value.get("coordinates")):
            yield from _parts({"type": kind.removeprefix("Multi"), "coordinates": part})
    else:
        raise ValueError(f"GeoJSON must have a known type, got {checks.shown(kind)}")


def _listed(value: Any) -> Sequence[Any]:
    if not isinstance(value, (list, tuple)):
        raise ValueError(f"GeoJSON must have a list here, got {checks.shown(value)}")
    return value


def _point(value: Any) -> Point:
    found = _listed(value)
    if not 2 <= len(found) <= 3 or not all(_is_of("number", x) and math.isfinite(x) for x in found):
        raise ValueError(f"a position must have two or three numbers, got {checks.shown(value)}")
    return tuple(map(float, found))


def _line(value: Any) -> list[Point]:
    points = [_point(point) for point in _listed(value)]
    if len(points) < 2:
        raise ValueError(f"a line must have two positions or more, got {len(points)}")
    return _once(points)


def _polygon(value: Any) -> list[list[Point]]:
    rings = []
    for ring in _listed(value):
        points = [_point(point) for point in _listed(ring)]
        if len(points) < 4 or not _same_point(points[0], points[-1]):
            raise ValueError("a ring must have four positions or more, the last that of the first")
        rings.append(_once(points[:-1], closed=True))
    if not rings:
        raise ValueError("a polygon must have a ring")
    return rings


def _once(points: Sequence[Point], *, closed: bool = False) -> list[Point]:
    """Without points that are those before them: of many small steps in a row some stay, however small each is."""
    kept = list(points[:1])
    for point in points:
        if not _same_point(point, kept[-1]):
            kept.append(point)
    while closed and len(kept) > 1 and _same_point(kept[-1], kept[0]):
        kept.pop()
    return kept


def _straightened(points: Sequence[Point], *, closed: bool) -> list[Point]:
    """Without points that lie on the straight line between their neighbours."""
    kept = list(points)
    turning = True
    while turning:
        turning = False
        for n in range(len(kept)) if closed else range(1, len(kept) - 1):
            if len(kept) > 2 and _between(kept[n - 1], kept[n], kept[(n + 1) % len(kept)]):
                del kept[n]
                turning = True
                break
    return kept


def _between(before: Point, point: Point, after: Point) -> bool:
    if not len(before) == len(point) == len(after):
        return False
    way = [b - a for a, b in zip(before, after, strict=True)]
    length = math.hypot(*way)
    if length <= CLOSE:
        return False
    along = sum((p - a) * w for p, a, w in zip(point, before, way, strict=True)) / length**2
    if not 0 < along < 1:
        return False
    foot = [a + along * w for a, w in zip(before, way, strict=True)]
    return math.hypot(*(p - f for p, f in zip(point, foot, strict=True))) <= CLOSE / 10


def _same_point(one: Point, other: Point) -> bool:
    return len(one) == len(other) and all(abs(a - b) <= CLOSE for a, b in zip(one, other, strict=True))


def _same_part(one: Part, other: Part) -> bool:
    if one[0] != other[0]:
        return False
    if one[0] == "point":
        return _same_point(one[1], other[1])
    if one[0] == "line":
        return _same_line(one[1], other[1])
    return _same_ring(one[1][0], other[1][0]) and _paired(one[1][1:], other[1][1:], _same_ring)


# Points are compared as they are first: where a fine curve begins would decide which of its points count as straight.


def _same_line(one: Sequence[Point], other: Sequence[Point]) -> bool:
    straight = (_straightened(points, closed=False) for points in (one, other))
    return _one_way(one, other) or _one_way(*straight)


def _one_way(one: Sequence[Point], other: Sequence[Point]) -> bool:
    ways = (other, other[::-1])
    return len(one) == len(other) and any(all(map(_same_point, one, way)) for way in ways)


def _same_ring(one: Sequence[Point], other: Sequence[Point]) -> bool:
    straight = (_straightened(points, closed=True) for points in (one, other))
    return _one_way_round(one, other) or _one_way_round(*straight)


def _one_way_round(one: Sequence[Point], other: Sequence[Point]) -> bool:
    if len(one) != len(other):
        return False
    ways = (other, other[::-1])
    return any(
        all(_same_point(point, way[(n + start) % len(way)]) for n, point in enumerate(one))
        for way in ways
        for start in range(len(way))
    )


def _paired(ones: Sequence[Any], others: Sequence[Any], same: Callable[[Any, Any], bool]) -> bool:
    """Whether each has one of the others for itself: a perfect matching, since "the same within a tolerance" is not transitive."""
    if len(ones) != len(others):
        return False
    fits = [[n for n, other in enumerate(others) if same(one, other)] for one in ones]
    taken: dict[int, int] = {}

    def place(one: int, seen: set[int]) -> bool:
        for other in sorted(fits[one], key=taken.__contains__):  # what is free first: many equal parts need no search
            if other not in seen:
                seen.add(other)
                if other not in taken or place(taken[other], seen):
                    taken[other] = one
                    return True
        return False

    return all(place(one, set()) for one in range(len(ones)))
