"""The JSON side keeps to its own OpenAPI document, whatever is asked."""

from __future__ import annotations

import hypothesis
import pytest
from hypothesis import HealthCheck

PATHS = (
    "/api/papers",
    "/api/papers/{slug}",
    "/api/claims/{slug}/{what}",
    "/api/records",
    "/api/records/{id}",
    "/api/machines",
    "/api/compare",
    "/api/recipes",
    "/api/recipes/{id}",
)


def test_every_path_of_the_document_is_tried(app):
    assert set(app.openapi()["paths"]) == set(PATHS)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("mode", ["positive", "negative"])
def test_no_request_breaks_it(app, path, mode):
    import schemathesis

    operation = schemathesis.openapi.from_asgi("/api/openapi.json", app, headers={"Host": "localhost"})[path]["GET"]
    settings = hypothesis.settings(
        max_examples=6, deadline=None, suppress_health_check=list(HealthCheck), database=None
    )

    @settings
    @hypothesis.given(case=operation.as_strategy(generation_mode=schemathesis.GenerationMode(mode)))
    def try_one(case):
        answer = case.call(headers={"Host": "localhost"})
        assert answer.status_code < 500
        assert answer.headers["content-type"][0].startswith("application/json")
        if answer.status_code >= 400:
            assert isinstance(answer.json()["error"], str)

    try:
        try_one()
    except hypothesis.errors.Unsatisfiable:  # nothing can be wrong about an address without parameters
        assert mode == "negative"
