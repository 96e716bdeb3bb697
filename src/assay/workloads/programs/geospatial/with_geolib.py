"""Tasks with Geolib, which is there as `geolib`. Positions are objects with `latitude` and `longitude`."""

from __future__ import annotations

from assay.workloads.programs.geospatial import sphere
from assay.workloads.programs.geospatial.task import (
    array,
    boolean,
    error,
    number,
    object_,
    string,
    task,
)  # fmt: skip


def at(latitude: float, longitude: float, **more: object) -> dict[str, object]:
    return {"latitude": latitude, "longitude": longitude, **more}


SQUARE = [at(0, 0), at(0, 4), at(4, 4), at(4, 0)]
PLACES = [at(48.86, 2.35, name="Paris"), at(52.52, 13.41, name="Berlin"), at(-33.87, 151.21, name="Sydney")]

TASKS = (
    task(
        "inside", "geolib", "function isIn(place, corners)",
        "Tell whether a place lies inside of the polygon with these corners.",
        "return geolib.isPointInPolygon(place, corners);",
        boolean(True, place=at(1, 2), corners=SQUARE),
        boolean(False, place=at(5, 2), corners=SQUARE),
        boolean(False, place=at(2, -1), corners=SQUARE),
        boolean(False, place=at(3, 1.5), corners=[at(0, 0), at(0, 4), at(4, 4)]),
    ),
    task(
        "bounds", "geolib", "function box(places)",
        "Return an object with the `south`, `west`, `north` and `east` of a list of places.",
        """
            const found = geolib.getBounds(places);
            return { south: found.minLat, west: found.minLng, north: found.maxLat, east: found.maxLng };
        """,
        object_({"south": -33.87, "west": 2.35, "north": 52.52, "east": 151.21}, places=PLACES),
        object_({"south": 0, "west": -3, "north": 7, "east": 1}, places=[at(0, 1), at(7, -3)]),
    ),
    task(
        "by-distance", "geolib", "function byDistance(here, places)",
        "Return the names of places (property `name`) by their distance from here, the nearest first.",
        "return geolib.orderByDistance(here, places).map((place) => place.name);",
        array(["Paris", "Berlin", "Sydney"], here=at(45, 0), places=PLACES),
        array(["Sydney", "Berlin", "Paris"], here=at(0, 120), places=PLACES),
        array(["Berlin", "Paris", "Sydney"], here=at(50, 20), places=PLACES),
    ),
    task(
        "decimal", "geolib", "function decimal(text)",
        "Return degrees written as degrees, minutes and seconds as a decimal number, south and west negative, rounded to five decimals.",
        "return Math.round(geolib.toDecimal(text) * 1e5) / 1e5;",
        number(51.495, text="51° 29' 42\" N"),
        number(-0.10833, text="0° 06' 30\" W"),
        number(-33.86667, text="33° 52' 00\" S"),
    ),
    task(
        "convert", "geolib", "function walked(metres, unit)",
        "Return a distance in metres in another unit: 'km', 'mi' (statute miles) or 'cm'.",
        "return geolib.convertDistance(metres, unit);",
        number(1.5, metres=1500, unit="km"),
        number(2, metres=2 * 1609.344, unit="mi"),
        number(450, metres=4.5, unit="cm"),
        error("Invalid unit used for distance conversion.", metres=5, unit="parsec"),
    ),
    task(
        "way", "geolib", "function way(from, to)",
        "Return in which of the eight directions (N, NE, E, SE, S, SW, W, NW) a place lies from another.",
        """
            const degrees = geolib.getGreatCircleBearing(from, to);
            return ['N', 'NE', 'E', 'SE', 'S', 'SW', 'W', 'NW'][Math.round(degrees / 45) % 8];
        """,
        *(
            string(word, **{"from": at(10, 10), "to": at(10 + north, 10 + east)})
            for word, north, east in [
                ("N", 5, 0), ("NE", 5, 5), ("E", 0, 5), ("SE", -5, 5), ("S", -5, 0), ("SW", -5, -5), ("W", 0, -5), ("NW", 5, -5),
            ]
        ),
        *(
            string(word, **{"from": at(10, 10), "to": at(*sphere.destination((10, 10), 500_000, degrees)[::-1])})
            for word, degrees in [("N", 22.2), ("NE", 22.8), ("SW", 247.2), ("W", 247.8), ("NW", 337.2), ("N", 337.8)]
        ),
    ),
)  # fmt: skip
