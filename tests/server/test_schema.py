"""The server against its own OpenAPI document: what it says it takes it takes, what it says it answers it answers, and never a 500."""

from __future__ import annotations

import json
from types import SimpleNamespace

import hypothesis
import jsonschema
import pytest
from tests.properties import scheduler_stand_in as stand_in

from assay.server import request
from assay.server.app import create_app
from assay.server.models import Models
from assay.server.schema import document


def resolved(name):
    """A schema of the document that stands by itself."""
    return {
        "$ref": f"#/components/schemas/{name}",
        "components": document(keys=False, allow_load=True, root_path="")["components"],
    }


def valid(schema, value):
    return not list(jsonschema.Draft202012Validator(schema).iter_errors(value))


def body_schema(path):
    paths = document(keys=False, allow_load=True, root_path="")["paths"]
    return paths[path]["post"]["requestBody"]["content"]["application/json"]["schema"]


# ---- by hand

TURNS = [{"role": "user", "content": "hi"}]
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
ASKED = {
    "/v1/completions": (
        "Completion",
        [
            {"prompt": "x"},
            {"prompt": ["x", [5]], "n": 2, "logprobs": 2, "echo": True},
            {"prompt": [5, 6], "stop": ["a", "b"], "logit_bias": {"5": -3}, "top_k": 4, "seed": 3, "temperature": 1},
            {"prompt": "x", "best_of": 3, "model": "", "suffix": None, "user": "me", "of_nobody": None},
        ],
    ),
    "/v1/chat/completions": (
        "ChatCompletion",
        [
            {"messages": TURNS},
            {"messages": TURNS, "logprobs": True, "top_logprobs": 2, "n": 2},
            {"messages": [{"role": "developer", "content": [{"type": "text", "text": "x"}]}, *TURNS], "tools": []},
            {"messages": TURNS, "response_format": {"type": "json_object"}, "tool_choice": "none", "tools": [TOOL]},
            {
                "messages": TURNS,
                "response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "boolean"}}},
            },
        ],
    ),
    "/v1/responses": (
        "Response",
        [
            {"input": "hi"},
            {"input": [{"role": "user", "content": [{"type": "input_text", "text": "hi"}]}], "instructions": "be kind"},
            {"input": "hi", "text": {"format": {"type": "json_object"}}, "metadata": {"a": "b"}, "store": False},
        ],
    ),
    "/v1/embeddings": ("Embeddings", [{"input": "x"}, {"input": [[5], "x"], "encoding_format": "base64"}]),
}


@pytest.mark.parametrize(
    ("path", "number"), [(path, i) for path, (_, bodies) in ASKED.items() for i in range(len(bodies))]
)
def test_requests_and_answers_are_as_described(client, path, number):
    name, bodies = ASKED[path]
    short = {"/v1/responses": {"max_output_tokens": 8}, "/v1/embeddings": {}}.get(path, {"max_tokens": 8})
    body = bodies[number] | short
    assert valid(body_schema(path), body)
    response = client.post(path, json=body)
    assert response.status_code == 200, response.text
    jsonschema.Draft202012Validator(resolved(name)).validate(response.json())


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {}),
        ("/v1/completions", {"prompt": ""}),
        ("/v1/completions", {"prompt": "x", "temperature": 3}),
        ("/v1/completions", {"prompt": "x", "max_tokens": True}),
        ("/v1/completions", {"prompt": "x", "echo": 1}),
        ("/v1/completions", {"prompt": "x", "tools": []}),
        ("/v1/completions", {"prompt": "x", "logit_bias": {"x": 1}}),
        ("/v1/completions", {"prompt": "x", "min_p": 0.5}),
        ("/v1/completions", {"prompt": [[]]}),
        ("/v1/chat/completions", {"messages": []}),
        ("/v1/chat/completions", {"messages": [{"role": "user"}]}),
        ("/v1/chat/completions", {"messages": [{"role": "tool", "content": "x"}]}),
        ("/v1/chat/completions", {"messages": TURNS, "response_format": {"type": "grammar"}}),
        ("/v1/chat/completions", {"messages": TURNS, "tools": [{"type": "function", "function": {"name": "a b"}}]}),
        ("/v1/chat/completions", {"messages": TURNS, "tool_choice": "any"}),
        ("/v1/responses", {"input": []}),
        ("/v1/responses", {"input": "x", "previous_response_id": "r"}),
        ("/v1/responses", {"input": "x", "store": True}),
        ("/v1/embeddings", {"input": "x", "dimensions": 3}),
        ("/v1/embeddings", {"input": "x", "encoding_format": "int8"}),
    ],
)
def test_what_the_document_forbids_is_refused(client, path, body):
    assert not valid(body_schema(path), body)
    response = client.post(path, json=body)
    assert response.status_code == 400
    jsonschema.Draft202012Validator(resolved("Error")).validate(response.json())


def test_the_document_is_whole(client):
    made = client.get("/openapi.json").json()
    assert made["openapi"].startswith("3.1")
    assert set(made["paths"]) == {
        "/health",
        "/ready",
        "/metrics",
        "/openapi.json",
        "/v1/models",
        "/v1/models/{model}",
        "/v1/completions",
        "/v1/chat/completions",
        "/v1/responses",
        "/v1/embeddings",
    }
    for fields in (request.COMPLETION, request.CHAT, request.RESPONSE, request.EMBEDDING):
        for name, one in fields.items():
            jsonschema.Draft202012Validator.check_schema(dict(one.schema))
            if not one.required and one.default is not None and "default" in one.schema:
                assert one.schema["default"] == one.default, name
    for name, path in (("Model", "/v1/models/tiny"), ("ModelList", "/v1/models"), ("Status", "/health")):
        jsonschema.Draft202012Validator(resolved(name)).validate(client.get(path).json())
    assert "securitySchemes" in document(keys=True, allow_load=False, root_path="")["components"]
    assert json.dumps(made)


# ---- by schemathesis


class Instant:
    """A scheduler that answers every prompt at once with two tokens, so that thousands of requests cost little."""

    def submit(self, ids, settings, on_event):
        tokens = (5, 6)[: settings.max_tokens]
        infos = [
            stand_in.TokenInfo(token, -1.0, ((token, -1.0),) * (settings.logprobs or 0)) for token in (*ids, *tokens)
        ]
        on_event(
            stand_in.Event(
                tokens=tokens,
                infos=() if settings.logprobs is None else tuple(infos[len(ids) :]),
                prompt_infos=(None, *infos[1 : len(ids)]) if settings.prompt_logprobs else None,
                finish="length",
            )
        )
        return SimpleNamespace(cancel=lambda: None)

    def stats(self):
        return stand_in.Stats()

    def stop(self, *, drain_s):
        pass


OPERATIONS = [
    (path, method, mode)
    for path, methods in document(keys=False, allow_load=False, root_path="")["paths"].items()
    for method in methods
    if method in ("get", "post")
    for mode in ("positive", "negative")
    if mode == "positive" or method == "post"  # else there is nothing in it that could be wrong
]


@pytest.mark.parametrize("examples", [8, pytest.param(400, marks=[pytest.mark.slow, pytest.mark.timeout(1200)])])
@pytest.mark.parametrize(("path", "method", "mode"), OPERATIONS, ids=str)
def test_what_is_made_of_the_document_gets_what_it_says(model, tokenizer, path, method, mode, examples):
    """No status, no shape and no 500 that the document does not know, for requests that fit it and for those that do not.

    That a request which fits is done is not asked here: the document cannot say that one field excludes another, or how many
    tokens a model knows.
    """
    import schemathesis
    from schemathesis.specs.openapi.checks import positive_data_acceptance

    models = Models()
    models.add("tiny", model, tokenizer, scheduler=Instant())
    app = create_app(models)
    operation = schemathesis.openapi.from_asgi("/openapi.json", app)[path][method.upper()]
    health = [
        hypothesis.HealthCheck.too_slow,
        hypothesis.HealthCheck.filter_too_much,
        hypothesis.HealthCheck.data_too_large,
    ]

    @hypothesis.seed(0)
    @hypothesis.settings(max_examples=examples, deadline=None, database=None, suppress_health_check=health)
    @hypothesis.given(case=operation.as_strategy(generation_mode=schemathesis.GenerationMode(mode)))
    def run(case):
        case.call_and_validate(excluded_checks=[positive_data_acceptance])

    run()
