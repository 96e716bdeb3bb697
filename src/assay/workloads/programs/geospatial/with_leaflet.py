"""Tasks with Leaflet, which is there as `L`. A map is 512 by 512 pixels; what is asked is the state of what is returned."""

from __future__ import annotations

import math

from assay.workloads.programs.geospatial import sphere
from assay.workloads.programs.geospatial.task import (
    array,
    box,
    collection,
    edge,
    js,
    line,
    number,
    point,
    state,
    task,
)  # fmt: skip

MAP = js("page.map()")
NEAR = js("page.map({ center: [50, 10], zoom: 6 })")
LEAFLET_EARTH = 6_371_000
WITH_TWO = js("[[1, 2], [3, 4]].reduce((map, at) => { L.marker(at).addTo(map); return map; }, page.map())")
WITH_CIRCLE = js(
    "[L.circle([1, 2], { radius: 5 }), L.marker([3, 4])].reduce((map, each) => map.addLayer(each), page.map())"
)

TASKS = (
    task(
        "marker", "leaflet", "function addMarker(map, position)",
        "Add a draggable marker at a position [longitude, latitude] to a Leaflet map and return the marker.",
        "return L.marker([position[1], position[0]], { draggable: true }).addTo(map);",
        state(
            {"result.getLatLng().lat": 52.52, "result.getLatLng().lng": 13.405, "result.options.draggable": True,
             "given[0].hasLayer(result)": True},
            map=MAP, position=[13.405, 52.52],
        ),
        state({"result.getLatLng().lat": -33.5, "given[0].hasLayer(result)": True}, map=NEAR, position=[151, -33.5]),
        by_names="""
            const marker = new L.Marker(L.latLng(position[1], position[0]), { draggable: true });
            map.addLayer(marker);
            return marker;
        """,
    ),
    task(
        "circle", "leaflet", "function addCircle(map, lat, lng, km, colour)",
        "Add a circle around a place with a radius in kilometres and a colour to a Leaflet map and return it. It is not filled.",
        "return L.circle([lat, lng], { radius: km * 1000, color: colour, fill: false }).addTo(map);",
        state(
            {"result.getRadius()": 2500, "result.options.color": "red", "result.options.fill": False,
             "result.getLatLng().lat": 10, "result.getLatLng().lng": 20, "given[0].hasLayer(result)": True},
            map=MAP, lat=10, lng=20, km=2.5, colour="red",
        ),
        state({"result.getRadius()": 100, "result.options.color": "#00f"}, map=MAP, lat=0, lng=0, km=0.1, colour="#00f"),
    ),
    task(
        "line-bounds", "leaflet", "function lineBounds(positions)",
        "Return [south, west, north, east] of a Leaflet polyline through positions [longitude, latitude].",
        """
            const bounds = L.polyline(positions.map(([lng, lat]) => [lat, lng])).getBounds();
            return [bounds.getSouth(), bounds.getWest(), bounds.getNorth(), bounds.getEast()];
        """,
        array([-2, -5, 9, 7], positions=[(-5, 3), (0, 9), (7, -2)]),
        array([50, 10, 52, 12], positions=[(10, 52), (12, 50)]),
        by_hand="""
            const of = (n) => positions.map((position) => position[n]);
            return [Math.min(...of(1)), Math.min(...of(0)), Math.max(...of(1)), Math.max(...of(0))];
        """,
    ),
    task(
        "features", "leaflet", "function addPoints(map, features)",
        """Add the points of a GeoJSON feature collection to a Leaflet map as circle markers of radius 6, others left out, and return the
        layer that holds them.""",
        """
            const filter = (feature) => feature.geometry.type === 'Point';
            return L.geoJSON(features, { filter, pointToLayer: (feature, at) => L.circleMarker(at, { radius: 6 }) }).addTo(map);
        """,
        state(
            {"result.getLayers().length": 2, "result.getLayers().map((each) => each.getLatLng().lng)": [1, 5],
             "result.getLayers().every((each) => each instanceof L.CircleMarker && each.getRadius() === 6)": True,
             "given[0].hasLayer(result)": True},
            map=MAP, features=collection(point(1, 2), line((0, 0), (1, 1)), point(5, 6), box(0, 0, 1, 1)),
        ),
        edge(state({"result.getLayers().length": 0, "given[0].hasLayer(result)": True}, map=MAP, features=collection())),
    ),
    task(
        "fit", "leaflet", "function fitTo(map, south, west, north, east)",
        "Show a box on a Leaflet map as large as it fits, but never nearer than zoom 10, and return the map.",
        "return map.fitBounds([[south, west], [north, east]], { maxZoom: 10, animate: false });",
        # 512 pixels show 512 / 256 / 2**zoom of the globe's 360 degrees: 11 degrees need 6 (11.25 degrees), 50 need 3, and
        # a hundredth would allow 16
        state({"result.getZoom()": 6, "Math.round(result.getCenter().lng * 10) / 10": 10.5}, map=MAP, south=-2, west=5, north=2, east=16),
        state(
            {"result.getZoom()": 3, "Math.round(result.getCenter().lng)": -75}, map=MAP, south=-1, west=-100, north=1, east=-50
        ),
        state(
            {"result.getZoom()": 10, "Math.round(result.getCenter().lng * 100) / 100": 20, "Math.round(result.getCenter().lat)": 40},
            map=MAP, south=39.995, west=19.995, north=40.005, east=20.005,
        ),
    ),
    task(
        "group", "leaflet", "function visibleGroup(map, positions, least)",
        """Make a Leaflet layer group with a marker for each position [latitude, longitude]; add it to the map only where it has at least
        `least` markers. Return the group.""",
        """
            const group = L.layerGroup(positions.map((position) => L.marker(position)));
            if (positions.length >= least) group.addTo(map);
            return group;
        """,
        state(
            {"result.getLayers().length": 2, "given[0].hasLayer(result)": True, "result.getLayers()[0].getLatLng().lat": 1},
            map=MAP, positions=[[1, 2], [3, 4]], least=2,
        ),
        state({"result.getLayers().length": 1, "given[0].hasLayer(result)": False}, map=MAP, positions=[[1, 2]], least=2),
        edge(state({"result.getLayers().length": 0, "given[0].hasLayer(result)": True}, map=MAP, positions=[], least=0)),
    ),
    task(
        "tiles", "leaflet", "function addTiles(map, url, zIndex)",
        "Add a tile layer with a URL template, a z-index and an opacity of one half to a Leaflet map, for zooms up to 17, and return it.",
        "return L.tileLayer(url, { opacity: 0.5, zIndex, maxZoom: 17 }).addTo(map);",
        state(
            {"result.options.zIndex": 7, "result.options.opacity": 0.5, "result.options.maxZoom": 17, "given[0].hasLayer(result)": True,
             "result._url": "tiles/{z}/{x}/{y}.png", "given[0].getMaxZoom()": 17},
            map=MAP, url="tiles/{z}/{x}/{y}.png", zIndex=7,
        ),
        by_setters="return L.tileLayer(url, { maxZoom: 17 }).setOpacity(0.5).setZIndex(zIndex).addTo(map);",
    ),
    task(
        "popup", "leaflet", "function describe(map, position, name, people)",
        """Add a marker at [latitude, longitude] to a Leaflet map with a popup 'NAME: PEOPLE' that is open, and a permanent tooltip with the
        name. Return the marker.""",
        """
            const marker = L.marker(position).addTo(map);
            marker.bindTooltip(name, { permanent: true });
            return marker.bindPopup(`${name}: ${people}`).openPopup();
        """,
        state(
            {"result.getPopup().getContent()": "Quito: 2700000", "result.isPopupOpen()": True, "given[0].hasLayer(result)": True,
             "result.getTooltip().getContent()": "Quito", "result.getTooltip().options.permanent": True,
             "result.getLatLng().lat": -0.18},
            map=MAP, position=[-0.18, -78.47], name="Quito", people=2700000,
        ),
    ),
    task(
        "map-distance", "leaflet", "function kilometres(map, a, b)",
        "Return the distance in kilometres between two positions [latitude, longitude] as a Leaflet map measures it.",
        "return map.distance(a, b) / 1000;",
        number(sphere.distance((13.405, 52.52), (2.3522, 48.8566), LEAFLET_EARTH) / 1000, map=MAP, a=[52.52, 13.405], b=[48.8566, 2.3522]),
        number(sphere.distance((0, 0), (90, 0), LEAFLET_EARTH) / 1000, map=MAP, a=[0, 0], b=[0, 90]),
        by_points="return L.latLng(a).distanceTo(L.latLng(b)) / 1000;",
    ),
    task(
        "pixel", "leaflet", "function pixelOf(map, lat, lng)",
        "Return where on a Leaflet map a place lies, as [x, y] in whole pixels from the upper left corner.",
        """
            const found = map.latLngToContainerPoint([lat, lng]);
            return [Math.round(found.x), Math.round(found.y)];
        """,
        array([256, 256], map=js("page.map({ center: [0, 0], zoom: 2 })"), lat=0, lng=0),
        array([256 + 128, 256], map=js("page.map({ center: [0, 0], zoom: 2 })"), lat=0, lng=45),
        array(
            [256, 256 - round(256 * math.log(math.tan(math.pi / 4 + math.radians(15) / 2)) / math.pi / 2)],
            map=js("page.map({ center: [0, 0], zoom: 0 })"), lat=15, lng=0,
        ),
    ),
    task(
        "clear", "leaflet", "function clearMarkers(map)",
        "Remove all markers from a Leaflet map, other layers stay, and return how many were removed.",
        """
            const markers = [];
            map.eachLayer((layer) => { if (layer instanceof L.Marker) markers.push(layer); });
            for (const marker of markers) map.removeLayer(marker);
            return markers.length;
        """,
        number(2, map=WITH_TWO),
        number(1, map=WITH_CIRCLE),
        state(
            # a circle has a layer of its own that draws it
            {"result": 1, "Object.values(given[0]._layers).map((each) => each instanceof L.Circle)": [True, False]},
            map=WITH_CIRCLE,
        ),
        edge(number(0, map=MAP)),
    ),
)  # fmt: skip
