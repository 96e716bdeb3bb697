"""What the tests of GeoJSEval share: small cases, and the libraries where they can be had."""

import os
from dataclasses import dataclass, field
from typing import Any

import pytest
from tests.tools import needs, needs_sandbox

from assay.errors import MissingError

SQUARE = [[0, 0], [2, 0], [2, 2], [0, 2], [0, 0]]
EXAMPLES = {
    "number": 2.5,
    "string": "north",
    "boolean": True,
    "array": [1, 2.5, "a", [3, {"b": 4}], None],
    "object": {"a": 1, "b": [1.5, {"c": "d"}], "e": None, "f": False},
    "geojson": {"type": "Polygon", "coordinates": [SQUARE, [[0.5, 0.5], [1, 0.5], [1, 1], [0.5, 0.5]]]},
    "error_message": "units is invalid",
}
"""An answer of each type."""


@dataclass(frozen=True)
class Given:
    """A case."""

    params: dict[str, Any]
    expected: Any
    out_type: str
    edge: bool = False
    looks: tuple[str, ...] = field(default=())


def libraries():
    """The folder of the libraries; the test is skipped where it cannot be had, and fails where every test was asked for."""
    needs("node")
    needs("npm")
    needs_sandbox()
    from assay.workloads.programs.geospatial.libraries import node_modules

    try:
        return node_modules()
    except MissingError as error:
        if os.environ.get("ASSAY_TEST_ALL"):  # every test was asked for
            raise
        pytest.skip(str(error))
