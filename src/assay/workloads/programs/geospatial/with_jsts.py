"""Tasks with JSTS, which is there as `jsts`: plane geometry, given and returned as well-known text or GeoJSON."""

from __future__ import annotations

import math

from assay.workloads.programs.geospatial.task import (
    boolean,
    edge,
    geojson,
    geometry,
    number,
    object_,
    ring,
    string,
    task,
)  # fmt: skip

SQUARE = "POLYGON ((0 0, 4 0, 4 4, 0 4, 0 0))"
SHIFTED = "POLYGON ((2 1, 6 1, 6 3, 2 3, 2 1))"
BESIDE = "POLYGON ((4 0, 8 0, 8 4, 4 4, 4 0))"
INNER = "POLYGON ((1 1, 2 1, 2 2, 1 2, 1 1))"
IN_CORNER = "POLYGON ((0 0, 1 0, 1 1, 0 1, 0 0))"
FAR = "POLYGON ((10 10, 11 10, 11 11, 10 11, 10 10))"
READ = "const read = (text) => new jsts.io.WKTReader().read(text);\n"


def poly(*rings: object) -> dict[str, object]:
    return geometry("Polygon", list(rings))


TASKS = (
    task(
        "area", "jsts", "function areaOf(wkt)",
        "Return the area of a polygon in well-known text.",
        "return new jsts.io.WKTReader().read(wkt).getArea();",
        number(16, wkt=SQUARE),
        number(8, wkt="POLYGON ((0 0, 3 0, 3 3, 0 3, 0 0), (1 1, 2 1, 2 2, 1 2, 1 1))"),
        edge(number(0, wkt="LINESTRING (0 0, 5 5)")),
        edge(number(0, wkt="POLYGON EMPTY")),
    ),
    task(
        "relation", "jsts", "function relation(a, b)",
        "Return the DE-9IM matrix (nine characters) of two geometries in well-known text.",
        READ + "return read(a).relate(read(b)).toString();",
        string("212101212", a=SQUARE, b=SHIFTED),
        string("212FF1FF2", a=SQUARE, b=INNER),
        string("FF2F11212", a=SQUARE, b=BESIDE),
        string("0FFFFF212", a="POINT (1 1)", b=SQUARE),
    ),
    task(
        "touching", "jsts", "function touching(a, b)",
        "Tell whether two geometries in well-known text touch: their borders meet and their insides do not.",
        READ + "return read(a).touches(read(b));",
        boolean(True, a=SQUARE, b=BESIDE),
        boolean(False, a=SQUARE, b=SHIFTED),
        boolean(False, a=SQUARE, b=FAR),
        edge(boolean(True, a=SQUARE, b="POINT (4 4)")),
        by_two=READ + "return read(a).intersects(read(b)) && !read(a).relate(read(b), 'T********');",
    ),
    task(
        "strictly-inside", "jsts", "function strictlyInside(inner, outer)",
        "Tell whether a geometry lies wholly in the inside of another, without touching its border. Both are well-known text.",
        READ + "return read(inner).relate(read(outer), 'TFF*FF***');",
        boolean(True, inner=INNER, outer=SQUARE),
        boolean(False, inner=SQUARE, outer=INNER),
        boolean(False, inner=IN_CORNER, outer=SQUARE),
        boolean(False, inner=SHIFTED, outer=SQUARE),
    ),
    task(
        "covering", "jsts", "function covering(outer, inner)",
        "Tell whether no point of the second geometry lies outside of the first; borders lie inside. Both are well-known text.",
        READ + "return read(outer).covers(read(inner));",
        boolean(True, outer=SQUARE, inner=INNER),
        boolean(False, outer=INNER, inner=SQUARE),
        boolean(True, outer=SQUARE, inner=IN_CORNER),
        boolean(True, outer=SQUARE, inner="LINESTRING (0 0, 4 0)"),
        boolean(False, outer=SQUARE, inner=SHIFTED),
    ),
    task(
        "gap", "jsts", "function gap(a, b)",
        "Return the smallest distance between two geometries in well-known text.",
        READ + "return read(a).distance(read(b));",
        number(math.hypot(6, 6), a=SQUARE, b=FAR),
        number(0, a=SQUARE, b=SHIFTED),
        number(3, a="POINT (7 2)", b=SQUARE),
        number(1, a="POINT (1 1)", b="LINESTRING (0 0, 4 0)"),
    ),
    task(
        "shared", "jsts", "function shared(a, b)",
        "Return as GeoJSON what two geometries in well-known text have in common.",
        READ + "return new jsts.io.GeoJSONWriter().write(read(a).intersection(read(b)));",
        geojson(poly(ring(2, 1, 4, 3)), a=SQUARE, b=SHIFTED),
        geojson(geometry("LineString", [[4, 0], [4, 4]]), a=SQUARE, b=BESIDE),
        geojson(poly(ring(1, 1, 2, 2)), a=SQUARE, b=INNER),
        geojson(geometry("Point", [2, 2]), a="LINESTRING (0 0, 4 4)", b="LINESTRING (0 4, 4 0)"),
    ),
    task(
        "either-or", "jsts", "function eitherOr(a, b)",
        "Return the area that exactly one of two polygons in well-known text covers.",
        READ + "return read(a).symDifference(read(b)).getArea();",
        number(16, a=SQUARE, b=SHIFTED),
        number(15, a=SQUARE, b=INNER),
        number(17, a=SQUARE, b=FAR),
        by_sums=READ + "const one = read(a), other = read(b);\n"
        "return one.getArea() + other.getArea() - 2 * one.intersection(other).getArea();",
    ),
    task(
        "joined-area", "jsts", "function joinedArea(list)",
        "Return the area that polygons in well-known text cover together, overlaps counted once; 0 for an empty list.",
        READ + """
if (list.length === 0) return 0;
return list.map(read).reduce((one, other) => one.union(other)).getArea();
""",
        number(20, list=[SQUARE, SHIFTED]),
        number(17, list=[SQUARE, INNER, FAR]),
        number(16, list=[SQUARE]),
        edge(number(0, list=[])),
    ),
    task(
        "flat-buffer", "jsts", "function corridor(wkt, width)",
        "Return the area of a line's surroundings up to a distance on both sides, with flat ends that do not reach beyond the line.",
        READ + """
const flat = jsts.operation.buffer.BufferParameters.CAP_FLAT;
return read(wkt).buffer(width, 8, flat).getArea();
""",
        number(20, wkt="LINESTRING (0 0, 10 0)", width=1),
        number(12, wkt="LINESTRING (0 0, 0 3)", width=2),
        number(0.5 * 2 * 5, wkt="LINESTRING (0 0, 3 4)", width=0.5),
    ),
    task(
        "hull", "jsts", "function hullOf(positions)",
        "Return the convex hull of positions [x, y] as GeoJSON.",
        """
const factory = new jsts.geom.GeometryFactory();
const points = positions.map(([x, y]) => factory.createPoint(new jsts.geom.Coordinate(x, y)));
const hull = factory.createMultiPoint(points).convexHull();
return new jsts.io.GeoJSONWriter().write(hull);
""",
        geojson(poly(ring(0, 0, 4, 3)), positions=[(0, 0), (4, 0), (2, 1), (4, 3), (1, 2), (0, 3)]),
        geojson(geometry("LineString", [[0, 0], [4, 2]]), positions=[(0, 0), (2, 1), (4, 2)]),
        geojson(geometry("Point", [1, 5]), positions=[(1, 5)]),
    ),
    task(
        "valid", "jsts", "function isProper(wkt)",
        "Tell whether a geometry in well-known text is valid: its rings do not cross themselves or each other.",
        READ + "return read(wkt).isValid();",
        boolean(True, wkt=SQUARE),
        boolean(False, wkt="POLYGON ((0 0, 4 4, 4 0, 0 4, 0 0))"),
        boolean(False, wkt="POLYGON ((0 0, 4 0, 4 4, 0 4, 0 0), (3 3, 5 3, 5 5, 3 5, 3 3))"),
        boolean(True, wkt="POLYGON ((0 0, 4 0, 4 4, 0 4, 0 0), (1 1, 2 1, 2 2, 1 2, 1 1))"),
    ),
    task(
        "bounds", "jsts", "function bounds(wkt)",
        "Return the bounding box of a geometry in well-known text as an object with `width`, `height` and `centre` ([x, y]).",
        READ + """
const found = read(wkt).getEnvelopeInternal();
const centre = [(found.getMinX() + found.getMaxX()) / 2, (found.getMinY() + found.getMaxY()) / 2];
return { width: found.getWidth(), height: found.getHeight(), centre };
""",
        object_({"width": 4, "height": 2, "centre": [4, 2]}, wkt=SHIFTED),
        object_({"width": 3, "height": 7, "centre": [-0.5, 1.5]}, wkt="LINESTRING (-2 5, 1 -2)"),
    ),
    task(
        "thinned", "jsts", "function thinned(wkt, tolerance)",
        "Return a line without the points that Douglas and Peucker's method leaves out at a tolerance. Both lines are well-known text.",
        READ + """
const line = jsts.simplify.DouglasPeuckerSimplifier.simplify(read(wkt), tolerance);
return new jsts.io.WKTWriter().write(line);
""",
        string("LINESTRING (0 0, 4 0)", wkt="LINESTRING (0 0, 1 0.05, 2 -0.05, 4 0)", tolerance=0.1),
        string("LINESTRING (0 0, 2 1, 4 0)", wkt="LINESTRING (0 0, 1 0.52, 2 1, 4 0)", tolerance=0.1),
        string("LINESTRING (0 0, 2 1, 4 0)", wkt="LINESTRING (0 0, 2 1, 4 0)", tolerance=0.5),
    ),
)  # fmt: skip
