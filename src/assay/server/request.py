"""Requests: what each endpoint takes, checked into an `Ask`.

The tables below are also what the OpenAPI document (`assay.server.schema`) says of the requests.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from assay import checks
from assay.methods.builtin.decode_loop.choosing import MOST_K
from assay.server import fields, messages
from assay.server.errors import ApiError
from assay.server.fields import Field, Fields
from assay.server.messages import Tool

MOST_STOPS = 4
STOP_CHARACTERS = 1_000
MOST_PROMPTS = 32
MOST_INPUTS = 256  # texts whose embeddings are asked for at once
MOST_ANSWERS = 128  # to all prompts of a request together, OpenAI's limit of n
MOST_TOP = 20  # best tokens told at each place
MOST_BIASES = 1_024
SCHEMA_CHARACTERS = 65_536
GREEDY_BELOW = 1e-5  # a temperature under which sampling is the most probable token, and dividing by it may overflow


@dataclass(frozen=True)
class Format:
    """The form an answer must have: JSON by `schema`, or any JSON object. `given` is the request's own description of it."""

    schema: Mapping[str, Any] | None
    given: Mapping[str, Any]


@dataclass(frozen=True)
class Ask:
    """A checked request: what to continue, how tokens are chosen, when to stop, and how to answer.

    `prompts` holds text or token ids, `n` answers each; in a chat there are `turns` instead. `new_tokens` is None if the
    request leaves it open, and 0 where only the prompt is echoed. Greedy when `temperature` is 0. `best_of` answers are made and
    the `n` best kept. `logprobs` says how many of the best tokens are told at each place, None for no log-probabilities at all.
    """

    prompts: list[str | list[int]] = field(default_factory=list)
    turns: list[dict[str, Any]] = field(default_factory=list)
    tools: tuple[Tool, ...] = ()
    forced: tuple[Tool, ...] = ()  # of which one must be called
    one_call: bool = False
    new_tokens: int | None = None
    min_tokens: int = 0
    ignore_eos: bool = False
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    stops: tuple[str, ...] = ()
    n: int = 1
    best_of: int = 1
    logprobs: int | None = None
    echo: bool = False
    format: Format | None = None
    stream: bool = False
    include_usage: bool = False
    told: Mapping[str, Any] = field(default_factory=dict)  # what an answer of /v1/responses repeats

    @property
    def chat(self) -> bool:
        """Whether this is a conversation, which goes through the model's template."""
        return bool(self.turns)


# ---- the fields -------------------------------------------------------------------------------------------------------------


def _stops(name: str, value: Any) -> tuple[str, ...]:
    values = [value] if isinstance(value, str) else value
    allowed = f"a string or a list of up to {MOST_STOPS}, each of 1 to {STOP_CHARACTERS} characters"
    if not isinstance(values, list):
        raise TypeError(f"{name} must be {allowed}, got {checks.shown(value)}")
    if len(values) > MOST_STOPS:
        raise ValueError(f"{name} must be {allowed}, got {len(values)}")
    for stop in values:
        if not 1 <= len(fields.text(name, stop)) <= STOP_CHARACTERS:
            raise ValueError(f"{name} must be {allowed}, got one of {len(stop)}")
    return tuple(values)


def _prompts(name: str, value: Any, most: int = MOST_PROMPTS) -> list[str | list[int]]:
    """The four forms of OpenAI's `prompt`: text, token ids, or a list of either."""
    allowed = f"a string, a list of token ids, or a list of up to {most} of these"
    if isinstance(value, str):
        value = [value]
    if not isinstance(value, list):
        raise TypeError(f"{name} must be {allowed}, got {checks.shown(value)}")
    if value and all(type(item) is int for item in value):
        value = [value]
    if not 1 <= len(value) <= most:
        raise ValueError(f"{name} must be {allowed}, got {len(value)}")
    for item in value:
        if isinstance(item, list):
            if not item:
                raise ValueError(f"{name} must not hold an empty list: the prompt has no tokens")
            if not all(type(token) is int for token in item):
                raise TypeError(f"{name} must be {allowed}, got {checks.shown(item)}")
        elif not isinstance(item, str):
            raise TypeError(f"{name} must be {allowed}, got {checks.shown(item)}")
        elif not fields.text(name, item):
            raise ValueError(f"{name} must not be empty")
    return list(value)


def _inputs(name: str, value: Any) -> list[str | list[int]]:
    return _prompts(name, value, MOST_INPUTS)


def _prompt_schema(most: int) -> dict[str, Any]:
    text = {"type": "string", "minLength": 1}
    ids = {"type": "array", "minItems": 1, "items": {"type": "integer", "minimum": 0}}
    several = {"type": "array", "minItems": 1, "maxItems": most, "items": {"anyOf": [text, ids]}}
    return {"anyOf": [text, ids, several]}


def _biases(name: str, value: Any) -> dict[int, float]:
    found = fields.an_object(name, value)
    if len(found) > MOST_BIASES:
        raise ValueError(f"{name} must have at most {MOST_BIASES} tokens, got {len(found)}")
    made = {}
    for token, bias in found.items():
        if not (token.isascii() and token.isdigit() and len(token) <= 9):
            raise ValueError(f"{name} must have token ids as its names, got {checks.shown(token)}")
        made[int(token)] = checks.number(f"{name}[{token}]", bias, low=-100, high=100)
    return made


_BIASES = {
    "type": "object",
    "maxProperties": MOST_BIASES,
    "propertyNames": {"pattern": "^[0-9]{1,9}$"},
    "additionalProperties": {"type": "number", "minimum": -100, "maximum": 100},
}


def _stream_options(name: str, value: Any) -> bool:
    options = fields.read(fields.an_object(name, value), STREAM_OPTIONS, within=f"{name}.")
    return bool(options["include_usage"])


STREAM_OPTIONS = {"include_usage": fields.flag(False), "include_obfuscation": fields.ignored()}


def _schema(name: str, value: Any) -> dict[str, Any]:
    found = fields.an_object(name, value)
    if len(json.dumps(found)) > SCHEMA_CHARACTERS:
        raise ValueError(f"{name} must have at most {SCHEMA_CHARACTERS} characters")
    return found


def _format(name: str, value: Any) -> Format | None:
    """`response_format` of a chat."""
    given = fields.an_object(name, value)
    kind = str(checks.choice(f"{name}.type", given.get("type"), ("text", "json_object", "json_schema")))
    if kind != "json_schema":
        fields.read(given, {"type": fields.one_of("text", kind)}, within=f"{name}.")
        return None if kind == "text" else Format(None, given)
    inner = fields.read(given, JSON_FORMAT, within=f"{name}.")["json_schema"]
    found = fields.read(inner, JSON_SCHEMA, within=f"{name}.json_schema.")
    return Format(found["schema"], given)


def _flat_format(name: str, value: Any) -> Format | None:
    """`text.format` of /v1/responses, where the schema is not nested."""
    given = fields.an_object(name, value)
    kind = str(checks.choice(f"{name}.type", given.get("type"), ("text", "json_object", "json_schema")))
    if kind != "json_schema":
        fields.read(given, {"type": fields.one_of("text", kind)}, within=f"{name}.")
        return None if kind == "text" else Format(None, given)
    found = fields.read(given, {"type": fields.one_of("text", kind), **JSON_SCHEMA}, within=f"{name}.")
    return Format(found["schema"], given)


JSON_SCHEMA = {
    "name": Field(fields.text, {"type": "string"}, required=True),
    "schema": Field(_schema, {"type": "object"}, required=True),
    "description": fields.string(None),
    "strict": Field(checks.flag, {"type": "boolean", "description": "an answer is always held to the schema"}),
}
JSON_FORMAT = {
    "type": fields.one_of("json_schema", "json_schema"),
    "json_schema": Field(fields.an_object, fields.schema_of(JSON_SCHEMA), required=True),
}


def _a_format(of_schema: Fields) -> dict[str, Any]:
    simple = {"type": Field(fields.text, {"enum": ["text", "json_object"]}, required=True)}
    typed = {**of_schema, "type": Field(fields.text, {"enum": ["json_schema"]}, required=True)}
    return {"anyOf": [fields.schema_of(simple), fields.schema_of(typed)]}


def _text_config(name: str, value: Any) -> Format | None:
    found: Format | None = fields.read(fields.an_object(name, value), TEXT_CONFIG, within=f"{name}.")["format"]
    return found


TEXT_CONFIG = {
    "format": Field(_flat_format, _a_format(JSON_SCHEMA)),
    "verbosity": fields.refused("medium"),
}


def _metadata(name: str, value: Any) -> dict[str, str]:
    found = fields.an_object(name, value)
    if len(found) > 16:
        raise ValueError(f"{name} must have at most 16 entries, got {len(found)}")
    return {fields.text(name, key): fields.text(f"{name}.{key[:64]}", item) for key, item in found.items()}


_METADATA = {"type": "object", "maxProperties": 16, "additionalProperties": {"type": "string"}}


def _top_k(name: str, value: Any) -> int:
    return max(0, checks.whole(name, value, low=-1, high=MOST_K))


_STOPS = {"type": "string", "minLength": 1, "maxLength": STOP_CHARACTERS}

SAMPLING: Fields = {
    "model": fields.string(
        "", schema={"type": "string", "description": "a name of /v1/models, 'auto', or '' for the first"}
    ),
    "temperature": fields.number(0.0, low=0, high=2),
    "top_p": fields.number(1.0, low=0, high=1),
    "stream": fields.flag(False),
    "user": fields.ignored(),
    "safety_identifier": fields.ignored(),
    "prompt_cache_key": fields.ignored(),
    "prompt_cache_retention": fields.ignored(),
    "service_tier": fields.ignored(),
}
_COMMON: Fields = SAMPLING | {
    "min_tokens": fields.whole(0, low=0),
    "ignore_eos": fields.flag(False),
    "top_k": Field(
        _top_k, {"type": "integer", "minimum": -1, "maximum": MOST_K, "description": "-1 and 0: all tokens"}, 0
    ),
    "seed": fields.whole(None, low=-(2**63), high=2**64 - 1),
    "logit_bias": Field(_biases, _BIASES, {}),
    "presence_penalty": fields.number(0.0, low=-2, high=2),
    "frequency_penalty": fields.number(0.0, low=-2, high=2),
    "stop": Field(_stops, {"anyOf": [_STOPS, {"type": "array", "maxItems": MOST_STOPS, "items": _STOPS}]}, ()),
    "n": fields.whole(1, low=1, high=MOST_ANSWERS),
    "stream_options": Field(_stream_options, fields.schema_of(STREAM_OPTIONS)),
    "metadata": fields.ignored(),
    "store": fields.ignored(),
    "min_p": fields.refused(0),
    "repetition_penalty": fields.refused(1),
}
COMPLETION: Fields = _COMMON | {
    "prompt": Field(_prompts, _prompt_schema(MOST_PROMPTS), required=True),
    "max_tokens": fields.whole(None, low=0),
    "best_of": fields.whole(None, low=1, high=MOST_ANSWERS),
    "logprobs": fields.whole(None, low=0, high=MOST_TOP),
    "echo": fields.flag(False),
    "suffix": fields.refused(""),
}
CHAT: Fields = _COMMON | {
    "messages": Field(messages.messages, messages.MESSAGES, required=True),
    "max_tokens": fields.whole(None, low=1),
    "max_completion_tokens": fields.whole(None, low=1),
    "logprobs": fields.flag(False),
    "top_logprobs": fields.whole(None, low=0, high=MOST_TOP),
    "response_format": Field(_format, _a_format(JSON_FORMAT)),
    "tools": Field(messages.tools, messages.TOOLS, ()),
    "tool_choice": Field(messages.tool_choice, messages.TOOL_CHOICE),
    "parallel_tool_calls": fields.flag(True),
    "audio": fields.refused(),
    "function_call": fields.refused("none", "auto"),
    "functions": fields.refused([]),
    "modalities": fields.refused(["text"]),
    "moderation": fields.refused(),
    "prediction": fields.refused(),
    "reasoning_effort": fields.refused(),
    "verbosity": fields.refused(),
    "web_search_options": fields.refused(),
}
RESPONSE: Fields = SAMPLING | {
    "input": Field(messages.response_input, messages.INPUT, required=True),
    "instructions": fields.string(None),
    "max_output_tokens": fields.whole(None, low=1),
    "text": Field(_text_config, fields.schema_of(TEXT_CONFIG)),
    "metadata": Field(_metadata, _METADATA, {}),
    "stream_options": Field(_stream_options, fields.schema_of(STREAM_OPTIONS)),
    "parallel_tool_calls": fields.ignored(),
    "background": fields.refused(False),
    "conversation": fields.refused(),
    "include": fields.refused([]),
    "max_tool_calls": fields.refused(),
    "previous_response_id": fields.refused(),
    "prompt": fields.refused(),
    "reasoning": fields.refused({}),
    "store": fields.refused(False),
    "tool_choice": fields.refused("none", "auto"),
    "tools": fields.refused([]),
    "top_logprobs": fields.refused(0),
    "truncation": fields.refused("disabled"),
}
EMBEDDING: Fields = {
    "model": SAMPLING["model"],
    "input": Field(_inputs, _prompt_schema(MOST_INPUTS), required=True),
    "encoding_format": fields.one_of("float", "float", "base64"),
    "dimensions": fields.refused(),
    "user": fields.ignored(),
}


# ---- what is asked ----------------------------------------------------------------------------------------------------------


def completion(document: Mapping[str, Any]) -> Ask:
    """What a request to /v1/completions asks. Raises ApiError, which names the field, for what cannot be done."""
    given = fields.read(document, COMPLETION)
    n, best_of = given["n"], given["best_of"] or given["n"]
    if best_of < n:
        raise ApiError(400, f"best_of must be at least n, {n}, got {best_of}", param="best_of")
    if best_of > n and given["stream"]:
        raise ApiError(400, "best_of above n does not go with stream: true", param="best_of")
    if best_of * len(given["prompt"]) > MOST_ANSWERS:
        message = f"a request may have {MOST_ANSWERS} answers, got {len(given['prompt'])} prompts with {best_of} each"
        raise ApiError(400, message, param="best_of" if best_of > n else "n")
    if given["max_tokens"] == 0 and not given["echo"]:
        raise ApiError(
            400, "max_tokens must be a whole number at least 1 unless echo is true, got 0", param="max_tokens"
        )
    return Ask(
        prompts=given["prompt"],
        new_tokens=given["max_tokens"],
        best_of=best_of,
        logprobs=given["logprobs"],
        echo=given["echo"],
        **_common(given),
    )


def chat(document: Mapping[str, Any]) -> Ask:
    """What a request to /v1/chat/completions asks."""
    given = fields.read(document, CHAT)
    new, newer = given["max_tokens"], given["max_completion_tokens"]
    if new is not None and newer is not None:
        raise ApiError(400, "give max_tokens or max_completion_tokens, not both", param="max_completion_tokens")
    top = given["top_logprobs"]
    if top and not given["logprobs"]:
        raise ApiError(400, "top_logprobs goes with logprobs: true only", param="top_logprobs")
    tools, forced = _tools(given["tools"], given["tool_choice"])
    wanted = given["response_format"]
    if forced and wanted:
        raise ApiError(400, "response_format does not go with a tool_choice that asks for a call", param="tool_choice")
    common = _common(given)
    if wanted or forced:
        _free_of(given, "response_format" if wanted else "tool_choice")
    return Ask(
        turns=given["messages"],
        tools=tools,
        forced=forced,
        one_call=not given["parallel_tool_calls"],
        new_tokens=newer if new is None else new,
        best_of=given["n"],
        logprobs=(top or 0) if given["logprobs"] else None,
        format=wanted,
        **common,
    )


def response(document: Mapping[str, Any]) -> Ask:
    """What a request to /v1/responses asks."""
    given = fields.read(document, RESPONSE)
    if given["stream_options"] is not None and not given["stream"]:
        raise ApiError(400, "stream_options goes with stream: true only", param="stream_options")
    instructions = given["instructions"]
    before = [] if instructions is None else [{"role": "system", "content": instructions}]
    names = ("instructions", "max_output_tokens", "metadata", "temperature", "top_p")
    return Ask(
        turns=[*before, *given["input"]],
        new_tokens=given["max_output_tokens"],
        format=given["text"],
        told={name: given[name] for name in names},
        stream=given["stream"],
        **_drawn(given),
    )


@dataclass(frozen=True)
class EmbeddingAsk:
    """A checked request for embeddings: texts or token ids, and whether the numbers are sent as base64."""

    inputs: list[str | list[int]]
    base64: bool


def embedding(document: Mapping[str, Any]) -> EmbeddingAsk:
    """What a request to /v1/embeddings asks."""
    given = fields.read(document, EMBEDDING)
    return EmbeddingAsk(given["input"], given["encoding_format"] == "base64")


def _common(given: Mapping[str, Any]) -> dict[str, Any]:
    usage = given["stream_options"]
    if usage is not None and not given["stream"]:
        raise ApiError(400, "stream_options goes with stream: true only", param="stream_options")
    same = (
        "min_tokens",
        "ignore_eos",
        "top_k",
        "seed",
        "logit_bias",
        "presence_penalty",
        "frequency_penalty",
        "n",
        "stream",
    )
    return {name: given[name] for name in same} | _drawn(given) | {"stops": given["stop"], "include_usage": bool(usage)}


def _drawn(given: Mapping[str, Any]) -> dict[str, Any]:
    greedy = given["temperature"] < GREEDY_BELOW or given["top_p"] == 0
    return {"temperature": 0.0 if greedy else given["temperature"], "top_p": given["top_p"]}


def _tools(known: tuple[Tool, ...], choice: str | tuple[str] | None) -> tuple[tuple[Tool, ...], tuple[Tool, ...]]:
    """The tools that the model is told of, and those of which it must call one."""
    if choice in ("none", None, "auto"):
        return (() if choice == "none" else known), ()
    forced = known if choice == "required" else tuple(tool for tool in known if tool.name == choice[0])
    if not forced:
        wanted = "a tool" if choice == "required" else checks.shown(choice[0])
        raise ApiError(400, f"tool_choice asks for {wanted}, which tools does not have", param="tool_choice")
    return known, forced


def _free_of(given: Mapping[str, Any], name: str) -> None:
    """Raise ApiError for what would have to go on after an answer that is complete in its form, and for what no such answer heeds."""
    for other in ("ignore_eos", "min_tokens", "top_k"):
        if given[other]:
            raise ApiError(400, f"{other} does not go with {name}", param=other)
