"""Tasks with Turf, which is there as `turf`."""

from __future__ import annotations

from assay.workloads.programs.geospatial import sphere
from assay.workloads.programs.geospatial.task import (
    array,
    boolean,
    box,
    collection,
    edge,
    error,
    geojson,
    line,
    number,
    object_,
    point,
    polygon,
    ring,
    state,
    string,
    task,
)  # fmt: skip

BERLIN, PARIS, SYDNEY, QUITO = (13.405, 52.52), (2.3522, 48.8566), (151.2093, -33.8688), (-78.4678, -0.1807)
ROUTE = [(10.0, 50.0), (10.5, 50.2), (11.0, 50.1), (11.4, 49.8)]
L_SHAPE = [[0, 0], [4, 0], [4, 1], [1, 1], [1, 3], [0, 3], [0, 0]]
WITH_HOLE = polygon(ring(0, 0, 6, 6), ring(2, 2, 4, 4))
WALK = [(-3.0, 0.0), (0.0, 0.0), (0.0, 4.0)]

TASKS = (
    task(
        "distance-km", "turf", "function distanceKm(a, b)",
        "Return the great-circle distance in kilometres between two positions [longitude, latitude].",
        "return turf.distance(turf.point(a), turf.point(b), { units: 'kilometers' });",
        number(sphere.distance(BERLIN, PARIS) / 1000, a=BERLIN, b=PARIS),
        number(sphere.distance(SYDNEY, QUITO) / 1000, a=SYDNEY, b=QUITO),
        number(sphere.distance((179.5, 10), (-179.5, 10)) / 1000, a=(179.5, 10), b=(-179.5, 10)),
        edge(number(0, a=PARIS, b=PARIS)),
        error("coordinates must contain numbers", a=["east", "north"], b=PARIS),
        by_defaults="return turf.distance(turf.point(a), turf.point(b));",
    ),
    task(
        "distance-miles", "turf", "function distanceMiles(a, b)",
        "Return the great-circle distance in statute miles between two GeoJSON points, rounded to two decimals.",
        "return turf.round(turf.distance(a, b, { units: 'miles' }), 2);",
        number(round(sphere.distance(BERLIN, SYDNEY) / 1609.344, 2), a=point(*BERLIN), b=point(*SYDNEY)),
        number(round(sphere.distance(QUITO, PARIS) / 1609.344, 2), a=point(*QUITO), b=point(*PARIS)),
    ),
    task(
        "route-length", "turf", "function routeLength(positions)",
        "Return the length in metres of the route through the given positions [longitude, latitude], rounded to whole metres.",
        "return Math.round(turf.length(turf.lineString(positions), { units: 'meters' }));",
        number(round(sphere.length(ROUTE)), positions=ROUTE),
        number(round(sphere.length([BERLIN, PARIS, QUITO])), positions=[BERLIN, PARIS, QUITO]),
        edge(number(0, positions=[PARIS, PARIS])),
        error("coordinates must be an array of two or more positions", positions=[PARIS]),
        piece_by_piece="""
            let metres = 0;
            if (positions.length < 2) throw new Error("coordinates must be an array of two or more positions");
            for (let n = 1; n < positions.length; n++) metres += turf.distance(positions[n - 1], positions[n]) * 1000;
            return Math.round(metres);
        """,
    ),
    task(
        "area-km2", "turf", "function areaKm2(polygon)",
        "Return the area of a GeoJSON polygon in square kilometres, rounded to three decimals. Holes do not count.",
        "return Math.round(turf.area(polygon) / 1000) / 1000;",
        number(round(sphere.area(ring(10, 50, 10.2, 50.1)) / 1e6, 3), polygon=box(10, 50, 10.2, 50.1)),
        number(round(sphere.area(ring(-0.1, -0.1, 0.1, 0.2)) / 1e6, 3), polygon=box(-0.1, -0.1, 0.1, 0.2)),
        number(
            round((sphere.area(ring(0, 0, 0.6, 0.6)) - sphere.area(ring(0.2, 0.2, 0.4, 0.4))) / 1e6, 3),
            polygon=polygon(ring(0, 0, 0.6, 0.6), ring(0.2, 0.2, 0.4, 0.4)),
        ),
        with_round="return turf.round(turf.convertArea(turf.area(polygon), 'meters', 'kilometers'), 3);",
    ),
    task(
        "bearing-north", "turf", "function azimuth(from, to)",
        "Return the direction from one position [longitude, latitude] to another in degrees clockwise from north, from 0 up to 360.",
        "return turf.bearingToAzimuth(turf.bearing(from, to));",
        number(sphere.bearing(BERLIN, PARIS) % 360, **{"from": BERLIN, "to": PARIS}),
        number(sphere.bearing(PARIS, BERLIN) % 360, **{"from": PARIS, "to": BERLIN}),
        number(90, **{"from": (0, 0), "to": (5, 0)}),
        number(180, **{"from": (7, 10), "to": (7, -10)}),
        edge(number(0, **{"from": (7, -10), "to": (7, 10)})),
        by_hand="""
            const degrees = turf.bearing(turf.point(from), turf.point(to));
            return degrees < 0 ? degrees + 360 : degrees;
        """,
    ),
    task(
        "destination", "turf", "function destination(start, metres, degrees)",
        "Return as [longitude, latitude] where one is after so many metres from a position in a direction in degrees from north.",
        "return turf.getCoord(turf.destination(turf.point(start), metres, degrees, { units: 'meters' }));",
        array(sphere.destination(BERLIN, 150_000, 60), start=BERLIN, metres=150_000, degrees=60),
        array(sphere.destination(QUITO, 900_000, -135), start=QUITO, metres=900_000, degrees=-135),
        edge(array(SYDNEY, start=SYDNEY, metres=0, degrees=10)),
        in_kilometres="return turf.destination(start, metres / 1000, degrees).geometry.coordinates;",
    ),
    task(
        "midpoint", "turf", "function halfWay(a, b)",
        "Return the GeoJSON point half way between two GeoJSON points on the great circle.",
        "return turf.midpoint(a, b);",
        geojson(
            point(*sphere.destination(BERLIN, sphere.distance(BERLIN, QUITO) / 2, sphere.bearing(BERLIN, QUITO))),
            a=point(*BERLIN), b=point(*QUITO),
        ),
        geojson(point(5, 0), a=point(0, 0), b=point(10, 0)),
        by_bearing="return turf.destination(a, turf.distance(a, b) / 2, turf.bearing(a, b));",
    ),
    task(
        "along", "turf", "function milestone(positions, km)",
        "Return as [longitude, latitude] the place so many kilometres along the line through the positions.",
        "return turf.along(turf.lineString(positions), km, { units: 'kilometers' }).geometry.coordinates;",
        array(sphere.along(ROUTE, 60_000), positions=ROUTE, km=60),
        array(sphere.along(ROUTE, 15_000), positions=ROUTE, km=15),
        edge(array(ROUTE[-1], positions=ROUTE, km=5000)),
        edge(array(ROUTE[0], positions=ROUTE, km=0)),
    ),
    task(
        "bbox", "turf", "function extent(features)",
        "Return [west, south, east, north] of a GeoJSON feature collection.",
        "return turf.bbox(features);",
        array([-5, -2, 7, 9], features=collection(point(-5, 3), line((0, 9), (7, 1)), point(1, -2))),
        array([0, 0, 4, 3], features=collection(polygon(L_SHAPE))),
    ),
    task(
        "padded-bbox", "turf", "function paddedBox(features, degrees)",
        "Return, as a GeoJSON polygon, the bounding box of a feature collection made larger by so many degrees on each side.",
        """
            const [west, south, east, north] = turf.bbox(features);
            return turf.bboxPolygon([west - degrees, south - degrees, east + degrees, north + degrees]);
        """,
        geojson(box(-6, -3, 8, 10), features=collection(point(-5, 3), line((0, 9), (7, 1)), point(1, -2)), degrees=1),
        geojson(box(-0.5, 0.5, 2.5, 3.5), features=collection(point(0, 1), point(2, 3)), degrees=0.5),
    ),
    task(
        "centroid", "turf", "function middleOf(polygon)",
        "Return as [longitude, latitude] the mean of the corners of a GeoJSON polygon, each corner counted once.",
        "return turf.centroid(polygon).geometry.coordinates;",
        array([10 / 6, 8 / 6], polygon=polygon(L_SHAPE)),
        array([11, 50.5], polygon=box(10, 50, 12, 51)),
        by_hand="""
            const corners = polygon.geometry.coordinates[0].slice(1);
            return [0, 1].map((n) => corners.reduce((sum, corner) => sum + corner[n], 0) / corners.length);
        """,
    ),
    task(
        "centre-of-mass", "turf", "function balancePoint(polygon)",
        "Return the centre of mass of a GeoJSON polygon, taken as a flat figure, as a GeoJSON point.",
        "return turf.centerOfMass(polygon);",
        geojson(point((4 * 2 + 2 * 0.5) / 6, (4 * 0.5 + 2 * 2) / 6), polygon=polygon(L_SHAPE)),
        geojson(point(2, 1), polygon=box(0, 0, 4, 2)),
    ),
    task(
        "point-in-polygon", "turf", "function isInside(position, polygon)",
        "Tell whether a position [longitude, latitude] lies inside of a GeoJSON polygon; its border does not count as inside.",
        "return turf.booleanPointInPolygon(turf.point(position), polygon, { ignoreBoundary: true });",
        boolean(True, position=(1, 5), polygon=WITH_HOLE),
        boolean(False, position=(3, 3), polygon=WITH_HOLE),
        boolean(False, position=(7, 3), polygon=WITH_HOLE),
        edge(boolean(False, position=(0, 3), polygon=WITH_HOLE)),
        edge(boolean(False, position=(4, 3), polygon=WITH_HOLE)),
    ),
    task(
        "count-inside", "turf", "function countInside(points, polygon)",
        "Return how many points of a GeoJSON feature collection lie inside of a GeoJSON polygon.",
        "return turf.pointsWithinPolygon(points, polygon).features.length;",
        number(2, points=collection(point(1, 1), point(3, 3), point(5, 5), point(8, 1)), polygon=WITH_HOLE),
        number(0, points=collection(point(-1, 1), point(9, 9)), polygon=WITH_HOLE),
        one_by_one="return points.features.filter((each) => turf.booleanPointInPolygon(each, polygon)).length;",
    ),
    task(
        "nearest", "turf", "function nearestName(target, places)",
        "Return the property `name` of the GeoJSON point of a collection that is nearest to the position [longitude, latitude].",
        "return turf.nearestPoint(turf.point(target), places).properties.name;",
        string("paris", target=(4, 50), places=collection(point(*BERLIN, name="berlin"), point(*PARIS, name="paris"))),
        string("berlin", target=(12, 50), places=collection(point(*BERLIN, name="berlin"), point(*PARIS, name="paris"))),
        # nearer in degrees is not nearer on the ground: far north a degree of longitude is short
        string("east", target=(0, 80), places=collection(point(8, 80, name="east"), point(0, 77, name="south"))),
        string(
            "west", target=(179, 0), places=collection(point(175, 0, name="east"), point(-179, 0, name="west")),
        ),
    ),
    task(
        "buffer-contains", "turf", "function withinReach(centre, km, position)",
        """Tell whether a position [longitude, latitude] lies within so many kilometres of a centre. Build a buffer around the centre that
        is exact to one in a thousand.""",
        """
            const reach = turf.buffer(turf.point(centre), km, { steps: 32 });
            return turf.booleanPointInPolygon(turf.point(position), reach);
        """,
        boolean(True, centre=BERLIN, km=10, position=sphere.destination(BERLIN, 9_500, 45)),
        boolean(False, centre=BERLIN, km=10, position=sphere.destination(BERLIN, 10_500, 45)),
        boolean(True, centre=QUITO, km=10, position=sphere.destination(QUITO, 9_970, 360 / 64)),
        boolean(True, centre=SYDNEY, km=3, position=sphere.destination(SYDNEY, 2_900, 270)),
        boolean(False, centre=SYDNEY, km=3, position=sphere.destination(SYDNEY, 3_100, 0)),
        by_distance="return turf.distance(centre, position) <= km;",
    ),
    task(
        "simplify", "turf", "function simplified(positions, tolerance)",
        "Return the positions that Douglas and Peucker's method keeps of a line at a tolerance in degrees.",
        "return turf.simplify(turf.lineString(positions), { tolerance, highQuality: true }).geometry.coordinates;",
        array([(0, 0), (4, 0)], positions=[(0, 0), (1, 0.05), (2, -0.05), (3, 0.02), (4, 0)], tolerance=0.1),
        array(
            [(0, 0), (2, 1), (4, 0)], positions=[(0, 0), (1, 0.52), (2, 1), (3, 0.49), (4, 0)], tolerance=0.1
        ),
        array([(0, 0), (2, 1), (4, 0)], positions=[(0, 0), (2, 1), (4, 0)], tolerance=0.5),
        # two points near each other, of which the second lies further out
        array([(0, 0), (2.06, 0.02), (2, 2)], positions=[(0, 0), (2, 0), (2.06, 0.02), (2, 2)], tolerance=0.1),
    ),
    task(
        "union-boxes", "turf", "function merged(a, b)",
        "Return the union of two overlapping GeoJSON polygons.",
        "return turf.union(turf.featureCollection([a, b]));",
        geojson(
            polygon([[0, 0], [4, 0], [4, 1], [6, 1], [6, 3], [2, 3], [2, 2], [0, 2], [0, 0]]),
            a=box(0, 0, 4, 2), b=box(2, 1, 6, 3),
        ),
        geojson(box(0, 0, 4, 4), a=box(0, 0, 4, 4), b=box(1, 1, 2, 2)),
    ),
    task(
        "cut-out", "turf", "function cutOut(a, b)",
        "Return what is left of the first GeoJSON polygon without the second, or null where nothing is left.",
        "return turf.difference(turf.featureCollection([a, b]));",
        geojson(
            polygon([[0, 0], [4, 0], [4, 1], [2, 1], [2, 2], [0, 2], [0, 0]]), a=box(0, 0, 4, 2), b=box(2, 1, 6, 3)
        ),
        geojson(WITH_HOLE, a=box(0, 0, 6, 6), b=box(2, 2, 4, 4)),
        geojson(box(0, 0, 1, 1), a=box(0, 0, 1, 1), b=box(5, 5, 6, 6)),
    ),
    task(
        "shared-share", "turf", "function sharedShare(a, b)",
        "Return which share of the first GeoJSON polygon's area lies in the second too, from 0 to 1; 0 where they do not meet.",
        """
            const shared = turf.intersect(turf.featureCollection([a, b]));
            return shared === null ? 0 : turf.area(shared) / turf.area(a);
        """,
        number(
            sphere.area(ring(2, 1, 4, 2)) / sphere.area(ring(0, 0, 4, 2)), a=box(0, 0, 4, 2), b=box(2, 1, 6, 3)
        ),
        number(1, a=box(1, 1, 2, 2), b=box(0, 0, 4, 4)),
        number(0, a=box(0, 0, 1, 1), b=box(5, 5, 6, 6)),
    ),
    task(
        "crossings", "turf", "function crossings(a, b)",
        "Return how often two lines, each a list of positions, cross.",
        "return turf.lineIntersect(turf.lineString(a), turf.lineString(b)).features.length;",
        number(1, a=[(0, 0), (4, 4)], b=[(0, 4), (4, 0)]),
        number(3, a=[(0, 0), (6, 0)], b=[(1, -1), (1, 1), (3, -1), (5, 1)]),
        number(0, a=[(0, 0), (1, 0)], b=[(2, 1), (3, 1)]),
    ),
    task(
        "clockwise", "turf", "function isClockwise(ring)",
        "Tell whether a closed ring of positions runs clockwise.",
        "return turf.booleanClockwise(turf.lineString(ring));",
        boolean(False, ring=ring(0, 0, 2, 1)),
        boolean(True, ring=ring(0, 0, 2, 1)[::-1]),
        boolean(True, ring=L_SHAPE[::-1]),
        boolean(False, ring=ring(0, 0, 0.5, 0.5)),
        boolean(True, ring=[[0, 2], [2, 2], [2, 0], [0, 0], [0, 2]]),
        by_area="""
            let twice = 0;
            for (let n = 1; n < ring.length; n++) twice += (ring[n][0] - ring[n - 1][0]) * (ring[n][1] + ring[n - 1][1]);
            return twice > 0;
        """,
    ),
    task(
        "hull", "turf", "function outline(positions)",
        "Return the convex hull of a list of positions [longitude, latitude] as a GeoJSON polygon.",
        "return turf.convex(turf.multiPoint(positions));",
        geojson(box(0, 0, 4, 3), positions=[(0, 0), (4, 0), (2, 1), (4, 3), (1, 2), (0, 3)]),
        geojson(polygon([[0, 0], [5, 0], [2, 4], [0, 0]]), positions=[(2, 1), (0, 0), (5, 0), (2, 4), (3, 1)]),
    ),
    task(
        "flip", "turf", "function swapAxes(feature)",
        "Return a GeoJSON feature with longitude and latitude of every position swapped, without changing the one given.",
        "return turf.flip(feature, { mutate: false });",
        geojson(line((50, 10), (51, 12)), feature=line((10, 50), (12, 51))),
        state(
            {"result.geometry.coordinates": [[50, 10], [51, 12]], "given[0].geometry.coordinates": [[10, 50], [12, 51]]},
            feature=line((10, 50), (12, 51)),
        ),
        geojson(polygon([[y, x] for x, y in L_SHAPE]), feature=polygon(L_SHAPE)),
    ),
    task(
        "mercator", "turf", "function toWebMap(position)",
        "Return a position [longitude, latitude] in metres of the Web Mercator map (EPSG:3857), rounded to whole metres.",
        "return turf.toMercator(position).map(Math.round);",
        array([round(x) for x in sphere.mercator(BERLIN)], position=BERLIN),
        array([round(x) for x in sphere.mercator(SYDNEY)], position=SYDNEY),
        array([round(x) for x in sphere.mercator((-120.5, 35.25))], position=(-120.5, 35.25)),
    ),
    task(
        "vertices", "turf", "function corners(feature)",
        "Return how many different positions a GeoJSON feature has, a position that occurs twice counted once.",
        "return new Set(turf.coordAll(feature).map((position) => position.join())).size;",
        number(6, feature=polygon(L_SHAPE)),
        number(8, feature=WITH_HOLE),
        number(3, feature=line((0, 0), (1, 1), (0, 0), (2, 2))),
    ),
    task(
        "summary", "turf", "function summary(polygon)",
        """Return an object with the area of a GeoJSON polygon in whole square metres (`area`), the length of its border in whole metres
        (`border`) and the number of its holes (`holes`).""",
        """
            const border = turf.length(turf.polygonToLine(polygon), { units: 'meters' });
            return { area: Math.round(turf.area(polygon)), border: Math.round(border), holes: polygon.geometry.coordinates.length - 1 };
        """,
        object_(
            {
                "area": round(sphere.area(ring(10, 50, 10.1, 50.1))),
                "border": round(sphere.length(ring(10, 50, 10.1, 50.1))),
                "holes": 0,
            },
            polygon=box(10, 50, 10.1, 50.1),
        ),
        object_(
            {
                "area": round(sphere.area(ring(0, 0, 0.3, 0.3)) - sphere.area(ring(0.1, 0.1, 0.2, 0.2))),
                "border": round(sphere.length(ring(0, 0, 0.3, 0.3)) + sphere.length(ring(0.1, 0.1, 0.2, 0.2))),
                "holes": 1,
            },
            polygon=polygon(ring(0, 0, 0.3, 0.3), ring(0.1, 0.1, 0.2, 0.2)),
        ),
    ),
    task(
        "off-route", "turf", "function offRoute(position, positions)",
        "Return how many kilometres a position [longitude, latitude] is away from a line through positions, rounded to whole kilometres.",
        "return Math.round(turf.pointToLineDistance(turf.point(position), turf.lineString(positions)));",
        number(round(sphere.distance((0, 0), (0, 1)) / 1000), position=(1, 1), positions=WALK[:2] + [(5.0, 0.0)]),
        number(round(sphere.distance((0, 0), (2, 0)) / 1000), position=(2, 0), positions=WALK[1:]),
        number(0, position=(0, 2), positions=WALK),
    ),
    task(
        "labelled", "turf", "function labelled(position, name)",
        """Return a GeoJSON feature of a position [longitude, latitude] whose properties are its `name` and its `hemisphere`, 'north' from
        the equator on and 'south' below.""",
        "return turf.point(position, { name, hemisphere: position[1] >= 0 ? 'north' : 'south' });",
        object_(point(*BERLIN, name="Berlin", hemisphere="north"), position=list(BERLIN), name="Berlin"),
        object_(point(*SYDNEY, name="Sydney", hemisphere="south"), position=list(SYDNEY), name="Sydney"),
        edge(object_(point(-5, 0, name="line", hemisphere="north"), position=[-5, 0], name="line")),
        error("coordinates must be at least 2 numbers long", position=[5], name="short"),
        by_hand="""
            if (position.length < 2) throw new Error("coordinates must be at least 2 numbers long");
            const properties = { hemisphere: position[1] < 0 ? 'south' : 'north', name };
            return { type: 'Feature', geometry: { type: 'Point', coordinates: position }, properties };
        """,
    ),
)  # fmt: skip
