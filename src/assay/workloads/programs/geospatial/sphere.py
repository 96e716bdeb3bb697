"""Right answers on a sphere by plain formulas, so that no library is its own judge. Positions are (longitude, latitude) in degrees."""

from __future__ import annotations

import math
from collections.abc import Sequence

EARTH = 6_371_008.8
"""The mean radius in metres, of the IUGG, that Turf uses; Leaflet's is 6,371,000."""
Position = Sequence[float]


def distance(one: Position, other: Position, radius: float = EARTH) -> float:
    """Along the great circle, by the haversine formula, in the radius's unit.

    >>> round(distance((0, 0), (180, 0)) / EARTH, 6)
    3.141593
    """
    (x, y), (u, v) = (map(math.radians, position) for position in (one, other))
    half = math.sin((v - y) / 2) ** 2 + math.cos(y) * math.cos(v) * math.sin((u - x) / 2) ** 2
    return 2 * radius * math.asin(math.sqrt(half))


def length(line: Sequence[Position], radius: float = EARTH) -> float:
    """Of a line, piece by piece."""
    return math.fsum(distance(one, other, radius) for one, other in zip(line, line[1:], strict=False))


def bearing(one: Position, other: Position) -> float:
    """In which direction a great circle begins, in degrees from north, -180 to 180, east positive.

    >>> bearing((0, 0), (1, 0))
    90.0
    """
    (x, y), (u, v) = (map(math.radians, position) for position in (one, other))
    east = math.sin(u - x) * math.cos(v)
    north = math.cos(y) * math.sin(v) - math.sin(y) * math.cos(v) * math.cos(u - x)
    return math.degrees(math.atan2(east, north))


def destination(start: Position, metres: float, direction: float) -> list[float]:
    """Where one comes out."""
    x, y = map(math.radians, start)
    arc, towards = metres / EARTH, math.radians(direction)
    v = math.asin(math.sin(y) * math.cos(arc) + math.cos(y) * math.sin(arc) * math.cos(towards))
    east = math.sin(towards) * math.sin(arc) * math.cos(y)
    return [math.degrees(x + math.atan2(east, math.cos(arc) - math.sin(y) * math.sin(v))), math.degrees(v)]


def along(line: Sequence[Position], metres: float) -> list[float]:
    """The place on a line so many metres from its beginning."""
    for one, other in zip(line, line[1:], strict=False):
        piece = distance(one, other)
        if metres <= piece:
            return destination(one, metres, bearing(one, other))
        metres -= piece
    return list(line[-1])


def area(ring: Sequence[Position]) -> float:
    """Inside of a closed ring, in square metres, edges as Chamberlain and Duquette take them: exact for boxes of meridians and parallels.

    >>> round(area([(0, 0), (90, 0), (90, 90), (0, 90), (0, 0)]) / (4 * math.pi * EARTH**2), 6)  # an eighth of the globe
    0.125
    """
    points = [tuple(map(math.radians, position)) for position in ring[:-1]]
    turns = [(points[(n + 1) % len(points)][0] - points[n - 1][0]) * math.sin(points[n][1]) for n in range(len(points))]
    return abs(math.fsum(turns)) * EARTH**2 / 2


def mercator(position: Position) -> list[float]:
    """In metres of the Web's map (EPSG:3857).

    >>> mercator((180, 0))[0]
    20037508.342789244
    """
    x, y = map(math.radians, position)
    return [6_378_137.0 * x, 6_378_137.0 * math.log(math.tan(math.pi / 4 + y / 2))]
