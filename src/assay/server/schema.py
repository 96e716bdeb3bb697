"""The server's own OpenAPI document. Requests are described by the tables that they are checked by."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from assay.server import fields, request
from assay.server.fields import Field, Fields

LOAD: Fields = {
    "model": fields.string(None, schema={"type": "string", "description": "the name to serve it under"}),
    "source": fields.string(None, schema={"type": "string", "description": "MODEL_OR_DIR, on the server's machine"}),
    "adapter": fields.string(None, schema={"type": "string", "description": "a folder with a LoRA adapter"}),
    "base": fields.string(None, schema={"type": "string", "description": "the model the adapter is for"}),
}
UNLOAD: Fields = {"model": Field(fields.text, {"type": "string"}, required=True)}

Schema = dict[str, Any]


def document(*, keys: bool, allow_load: bool, root_path: str) -> Schema:
    """The OpenAPI document of a server with these options."""
    secured: Schema = {"security": [{"key": []}]} if keys else {}
    paths: dict[str, Schema] = {
        "/health": {"get": _get("Whether the server runs.", {"200": _ref("Status")}, told=())},
        "/ready": {"get": _get("Whether it takes requests.", {"200": _ref("Status"), "503": _ref("Status")}, told=())},
        "/metrics": {"get": _get("Counts for Prometheus.", {}, told=_SECURED if keys else ()) | secured},
        "/openapi.json": {
            "get": _get("This document.", {"200": {"type": "object"}}, told=_SECURED if keys else ()) | secured
        },
        "/v1/models": {"get": _get("All models.", {"200": _ref("ModelList")}, told=_SECURED if keys else ()) | secured},
        "/v1/models/{model}": {
            "get": _get("One model.", {"200": _ref("Model")}, told=("404", *(_SECURED if keys else ()))) | secured,
            "parameters": [
                {"name": "model", "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}
            ],
        },
    }
    paths["/metrics"]["get"]["responses"]["200"] = {
        "description": "metrics",
        "content": {"text/plain; version=0.0.4; charset=utf-8": {"schema": {"type": "string"}}},
    }
    for path, asked, answer, streamed in (
        ("completions", request.COMPLETION, "Completion", True),
        ("chat/completions", request.CHAT, "ChatCompletion", True),
        ("responses", request.RESPONSE, "Response", True),
        ("embeddings", request.EMBEDDING, "Embeddings", False),
    ):
        paths[f"/v1/{path}"] = {"post": _post(asked, _ref(answer), streamed, keys) | secured}
    if allow_load:
        paths["/v1/models/load"] = {"post": _post(LOAD, _ref("Model"), False, keys) | secured}
        paths["/v1/models/unload"] = {"post": _post(UNLOAD, _ref("Deleted"), False, keys) | secured}
    made: Schema = {
        "openapi": "3.1.0",
        "info": {"title": "assay", "version": "1", "description": "Models behind OpenAI's API."},
        "paths": paths,
        "components": {"schemas": SCHEMAS},
    }
    if keys:
        made["components"] = made["components"] | {"securitySchemes": {"key": {"type": "http", "scheme": "bearer"}}}
    if root_path:
        made["servers"] = [{"url": root_path}]
    return made


_SECURED = ("401",)
_ERRORS = {
    "400": "Not a request, or one that cannot be done; `param` names the field.",
    "401": "No API key of this server.",
    "404": "No such model.",
    "408": "The request did not arrive in time.",
    "409": "The model is needed by others.",
    "413": "The request is too long.",
    "503": "No room, still loading, or going down; Retry-After says when to come again.",
    "504": "The answer was not ready in time.",
}


def _ref(name: str) -> Schema:
    return {"$ref": f"#/components/schemas/{name}"}


def _json(schema: Schema, description: str) -> Schema:
    return {"description": description, "content": {"application/json": {"schema": schema}}}


def _get(summary: str, answers: Mapping[str, Schema], *, told: tuple[str, ...]) -> Schema:
    found = {status: _json(schema, summary) for status, schema in answers.items()}
    return {"summary": summary, "responses": found | {status: _json(_ref("Error"), _ERRORS[status]) for status in told}}


def _post(asked: Fields, answer: Schema, streamed: bool, keys: bool) -> Schema:
    ok = _json(answer, "the answer")
    if streamed:
        ok["content"]["text/event-stream"] = {"schema": _EVENT}
    errors = [status for status in _ERRORS if status != "401" or keys]
    return {
        "requestBody": {
            "required": True,
            "content": {"application/json": {"schema": fields.schema_of(asked)}},
        },
        "responses": {"200": ok} | {status: _json(_ref("Error"), _ERRORS[status]) for status in errors},
    }


def _object(required: Mapping[str, Schema], **optional: Schema) -> Schema:
    """An object with these properties and no others."""
    return {
        "type": "object",
        "properties": {**required, **optional},
        "required": list(required),
        "additionalProperties": False,
    }


def _or_null(schema: Schema) -> Schema:
    return {"anyOf": [schema, {"type": "null"}]}


def _list(items: Schema) -> Schema:
    return {"type": "array", "items": items}


def _word(*words: str) -> Schema:
    return {"type": "string", "enum": list(words)}


_TEXT: Schema = {"type": "string"}
_EVENT: Schema = {
    "type": "object",
    "description": "One event of the stream, if the request asks for one: its data is JSON as OpenAI documents it, or [DONE].",
    "properties": {"data": _TEXT, "event": _TEXT},
    "required": ["data"],
}
_COUNT: Schema = {"type": "integer", "minimum": 0}
_NUMBER: Schema = {"type": "number"}
_CACHED = _object({"cached_tokens": _COUNT})
_TOKEN = {"token": _TEXT, "bytes": _list(_COUNT), "logprob": _NUMBER}
_HEAD: dict[str, Schema] = {"id": _TEXT, "created": _COUNT, "model": _TEXT, "system_fingerprint": _TEXT}
_CALL = _object(
    {"id": _TEXT, "type": _word("function"), "function": _object({"name": _TEXT, "arguments": _TEXT})},
)
_PART = _object(
    {"type": _word("output_text"), "text": _TEXT, "annotations": _list({}), "logprobs": _list({})},
)
_MESSAGE = _object(
    {
        "id": _TEXT,
        "type": _word("message"),
        "role": _word("assistant"),
        "status": _word("in_progress", "completed", "incomplete"),
        "content": _list(_PART),
    }
)

SCHEMAS: dict[str, Schema] = {
    "Error": _object(
        {
            "error": _object(
                {
                    "message": _TEXT,
                    "type": _word("invalid_request_error", "server_error"),
                    "param": _or_null(_TEXT),
                    "code": _or_null(_TEXT),
                }
            )
        }
    ),
    "Status": _object({"status": _TEXT}),
    "Model": _object(
        {
            "id": _TEXT,
            "object": _word("model"),
            "created": _COUNT,
            "owned_by": _TEXT,
            "context_length": _COUNT,
            "parent": _or_null(_TEXT),
            "backend": _TEXT,
            "backend_reason": _TEXT,
            "embeddings": _TEXT,
            "system_fingerprint": _TEXT,
        }
    ),
    "ModelList": _object({"object": _word("list"), "data": _list(_ref("Model"))}),
    "Deleted": _object({"id": _TEXT, "object": _word("model"), "deleted": {"type": "boolean"}}),
    "Usage": _object(
        {
            "prompt_tokens": _COUNT,
            "completion_tokens": _COUNT,
            "total_tokens": _COUNT,
            "prompt_tokens_details": _CACHED,
        },
        router_tokens=_COUNT,
    ),
    "Completion": _object(
        {
            **_HEAD,
            "object": _word("text_completion"),
            "usage": _ref("Usage"),
            "choices": _list(
                _object(
                    {
                        "index": _COUNT,
                        "text": _TEXT,
                        "finish_reason": _word("stop", "length"),
                        "logprobs": _or_null(
                            _object(
                                {
                                    "tokens": _list(_TEXT),
                                    "token_logprobs": _list(_or_null(_NUMBER)),
                                    "top_logprobs": _or_null(
                                        _list(_or_null({"type": "object", "additionalProperties": _NUMBER}))
                                    ),
                                    "text_offset": _list(_COUNT),
                                }
                            )
                        ),
                    }
                )
            ),
        }
    ),
    "ChatCompletion": _object(
        {
            **_HEAD,
            "object": _word("chat.completion"),
            "usage": _ref("Usage"),
            "choices": _list(
                _object(
                    {
                        "index": _COUNT,
                        "finish_reason": _word("stop", "length", "tool_calls"),
                        "message": _object(
                            {"role": _word("assistant"), "content": _or_null(_TEXT)}, tool_calls=_list(_CALL)
                        ),
                        "logprobs": _or_null(
                            _object(
                                {
                                    "content": _list(_object({**_TOKEN, "top_logprobs": _list(_object(_TOKEN))})),
                                    "refusal": {"type": "null"},
                                }
                            )
                        ),
                    }
                )
            ),
        }
    ),
    "Response": _object(
        {
            "id": _TEXT,
            "object": _word("response"),
            "created_at": _COUNT,
            "status": _word("completed", "incomplete"),
            "error": {"type": "null"},
            "incomplete_details": _or_null(_object({"reason": _word("max_output_tokens")})),
            "instructions": _or_null(_TEXT),
            "max_output_tokens": _or_null(_COUNT),
            "metadata": {"type": "object", "additionalProperties": _TEXT},
            "model": _TEXT,
            "output": _list(_MESSAGE),
            "parallel_tool_calls": {"type": "boolean"},
            "previous_response_id": {"type": "null"},
            "reasoning": {"type": "object"},
            "store": {"type": "boolean"},
            "temperature": _NUMBER,
            "text": {"type": "object"},
            "tool_choice": _TEXT,
            "tools": _list({}),
            "top_p": _NUMBER,
            "truncation": _TEXT,
            "usage": _object(
                {
                    "input_tokens": _COUNT,
                    "input_tokens_details": _CACHED,
                    "output_tokens": _COUNT,
                    "output_tokens_details": _object({"reasoning_tokens": _COUNT}),
                    "total_tokens": _COUNT,
                },
                router_tokens=_COUNT,
            ),
            "user": {"type": "null"},
        }
    ),
    "Embeddings": _object(
        {
            "object": _word("list"),
            "model": _TEXT,
            "data": _list(
                _object(
                    {
                        "object": _word("embedding"),
                        "index": _COUNT,
                        "embedding": {"anyOf": [_list(_NUMBER), _TEXT]},
                    }
                )
            ),
            "usage": _object({"prompt_tokens": _COUNT, "total_tokens": _COUNT}),
        }
    ),
}
