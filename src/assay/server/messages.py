"""Messages of a chat: checked, and brought into the form that chat templates take."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from assay import checks
from assay.server import fields
from assay.server.errors import ApiError, printable
from assay.server.fields import Field

MOST_TOOLS = 128
NAME = r"^[a-zA-Z0-9_.-]{1,64}$"  # of a function
FINAL_ROLES = ("system", "developer", "user", "assistant", "tool")


@dataclass(frozen=True)
class Tool:
    """A function that the model may call: its name, the JSON schema of its arguments, and the object as templates take it."""

    name: str
    parameters: Mapping[str, Any]
    given: Mapping[str, Any]


# ---- chats ------------------------------------------------------------------------------------------------------------------


def messages(name: str, value: Any) -> list[dict[str, Any]]:
    """The turns of a chat as templates take them. Raises ApiError, which names the place, for what is none."""
    if not isinstance(value, list) or not value:
        raise ValueError(f"{name} must be a list of at least one message, got {checks.shown(value)}")
    return [_message(f"{name}[{i}]", message) for i, message in enumerate(value)]


def _message(where: str, value: Any) -> dict[str, Any]:
    """Role, content as one string, and what else there is: a name, calls, the call that is answered. A developer is the system."""
    if not isinstance(value, dict):
        raise ApiError(400, f"{where} must be an object, got {checks.shown(value)}", param=where)
    role = fields.checked(
        f"{where}.role", lambda name, given: checks.choice(name, given, FINAL_ROLES), value.get("role")
    )
    turn: dict[str, Any] = {"role": "system" if role == "developer" else role}
    calls = value.get("tool_calls") if role == "assistant" else None
    if calls not in (None, []):
        turn["tool_calls"] = fields.checked(f"{where}.tool_calls", _calls, calls)
    empty = value.get("content") is None and "tool_calls" in turn
    turn["content"] = "" if empty else content(f"{where}.content", value.get("content"), ("text",))
    known = {"role", "content", "name"} | ({"tool_calls"} if role == "assistant" else set())
    if role == "tool":
        known.add("tool_call_id")
        turn["tool_call_id"] = fields.checked(f"{where}.tool_call_id", fields.text, value.get("tool_call_id"))
    if value.get("name") is not None:
        turn["name"] = fields.checked(f"{where}.name", fields.text, value["name"])
    for name, extra in value.items():
        if name not in known and extra not in (None, []):
            place = f"{where}.{printable(name)}"
            raise ApiError(400, f"{where}: {checks.shown(name)} is not supported here", param=place)
    return turn


def _calls(where: str, value: Any) -> list[dict[str, Any]]:
    """Calls that an assistant made; their arguments become an object, which is what templates write out."""
    if not isinstance(value, list):
        raise TypeError(f"{where} must be a list of calls, got {checks.shown(value)}")
    return [_call(f"{where}[{i}]", call) for i, call in enumerate(value)]


def _call(where: str, value: Any) -> dict[str, Any]:
    call = fields.read(fields.checked(where, fields.an_object, value), CALL, within=f"{where}.")
    function = fields.read(call["function"], CALLED, within=f"{where}.function.")
    return {"id": call["id"], "type": "function", "function": function}


def _arguments(name: str, value: Any) -> dict[str, Any]:
    try:
        found = json.loads(fields.text(name, value))
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise ValueError(f"{name} must be a JSON object as a string, got {checks.shown(value)}")
    return found


CALL = {
    "id": Field(fields.text, {"type": "string"}, required=True),
    "type": fields.one_of("function", "function"),
    "function": Field(fields.an_object, {"type": "object"}, required=True),
}
CALLED = {
    "name": Field(fields.text, {"type": "string"}, required=True),
    "arguments": Field(_arguments, {"type": "string"}, required=True),
}


def content(where: str, value: Any, kinds: tuple[str, ...]) -> str:
    """Text, or a list of text parts of some `kinds`, each on its own line."""
    if not isinstance(value, list):
        return fields.checked(where, fields.text, value)
    if not value:
        raise ApiError(400, f"{where} must not be an empty list", param=where)
    texts = []
    for i, part in enumerate(value):
        place = f"{where}[{i}]"
        if not isinstance(part, dict) or part.get("type") not in kinds:
            kind = part.get("type") if isinstance(part, dict) else part
            allowed = " or ".join(repr(kind) for kind in kinds)
            raise ApiError(400, f"{place} must be a part of type {allowed}, got {checks.shown(kind)}", param=place)
        texts.append(fields.checked(f"{place}.text", fields.text, part.get("text")))
    return "\n".join(texts)


def _parts(*kinds: str) -> dict[str, Any]:
    part = {
        "type": "object",
        "properties": {"type": {"type": "string", "enum": list(kinds)}, "text": {"type": "string"}},
        "required": ["type", "text"],
    }
    return {"anyOf": [{"type": "string"}, {"type": "array", "minItems": 1, "items": part}]}


def _role(*roles: str, required: tuple[str, ...], **more: Any) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": {
            "role": {"type": "string", "enum": list(roles)},
            "content": _parts("text"),
            "name": {"type": ["string", "null"]},
            **more,
        },
        "required": ["role", *required],
        "additionalProperties": {"enum": [None, []]},
    }


_MADE_CALL = fields.schema_of(CALL | {"function": Field(fields.an_object, fields.schema_of(CALLED), required=True)})

MESSAGES: dict[str, Any] = {
    "type": "array",
    "minItems": 1,
    "items": {
        "anyOf": [
            _role("system", "developer", "user", required=("content",)),
            _role("assistant", required=("content",), tool_calls={"enum": [None, []]}),
            _role(
                "assistant",
                required=("tool_calls",),
                content={"anyOf": [*_parts("text")["anyOf"], {"type": "null"}]},
                tool_calls={"type": "array", "minItems": 1, "items": _MADE_CALL},
            ),
            _role("tool", required=("content", "tool_call_id"), tool_call_id={"type": "string"}),
        ]
    },
}

# ---- tools ------------------------------------------------------------------------------------------------------------------


def tools(name: str, value: Any) -> tuple[Tool, ...]:
    """The functions in a request's `tools`. Raises TypeError or ValueError for what is none, and for a name that comes twice."""
    if not isinstance(value, list):
        raise TypeError(f"{name} must be a list of tools, got {checks.shown(value)}")
    if len(value) > MOST_TOOLS:
        raise ValueError(f"{name} must be at most {MOST_TOOLS} tools, got {len(value)}")
    made = tuple(_tool(f"{name}[{i}]", tool) for i, tool in enumerate(value))
    if len({tool.name for tool in made}) < len(made):
        raise ValueError(f"{name} must be functions of different names")
    return made


def _tool(where: str, value: Any) -> Tool:
    tool = fields.read(fields.checked(where, fields.an_object, value), TOOL, within=f"{where}.")
    function = fields.read(tool["function"], FUNCTION, within=f"{where}.function.")
    parameters = function["parameters"] or {"type": "object", "properties": {}}
    shown = {"name": function["name"], "description": function["description"] or "", "parameters": parameters}
    return Tool(function["name"], parameters, {"type": "function", "function": shown})


def _function_name(name: str, value: Any) -> str:
    if not re.fullmatch(NAME, fields.text(name, value)) or value.endswith("\n"):
        raise ValueError(f"{name} must be 1 to 64 letters, digits and any of _ . -, got {checks.shown(value)}")
    return str(value)


TOOL = {
    "type": Field(lambda name, value: checks.choice(name, value, ("function",)), {"enum": ["function"]}, required=True),
    "function": Field(fields.an_object, {"type": "object"}, required=True),
}
FUNCTION = {
    "name": Field(_function_name, {"type": "string", "pattern": NAME}, required=True),
    "description": fields.string(None),
    "parameters": Field(fields.an_object, {"type": "object"}),
    "strict": Field(checks.flag, {"type": "boolean", "description": "changes nothing here"}),
}
TOOLS: dict[str, Any] = {
    "type": "array",
    "maxItems": MOST_TOOLS,
    "items": fields.schema_of(TOOL | {"function": Field(fields.an_object, fields.schema_of(FUNCTION), required=True)}),
}


def tool_choice(name: str, value: Any) -> str | tuple[str]:
    """ "none", "auto", "required", or the name of one function in a tuple."""
    if isinstance(value, str):
        return checks.choice(name, value, ("none", "auto", "required"))
    chosen = fields.read(fields.an_object(name, value), TOOL, within=f"{name}.")
    wanted = {"name": FUNCTION["name"]}
    return (str(fields.read(chosen["function"], wanted, within=f"{name}.function.")["name"]),)


TOOL_CHOICE: dict[str, Any] = {
    "anyOf": [
        {"type": "string", "enum": ["none", "auto", "required"]},
        fields.schema_of(
            TOOL | {"function": Field(fields.an_object, fields.schema_of({"name": FUNCTION["name"]}), required=True)}
        ),
    ]
}

# ---- the input of /v1/responses ----------------------------------------------------------------------------------------------


def response_input(name: str, value: Any) -> list[dict[str, Any]]:
    """A text, which a user says, or a list of messages, each with text parts; as turns for a template."""
    if isinstance(value, str):
        return [{"role": "user", "content": fields.text(name, value)}]
    if not isinstance(value, list) or not value:
        raise ValueError(f"{name} must be a string or a list of at least one message, got {checks.shown(value)}")
    return [_item(f"{name}[{i}]", item) for i, item in enumerate(value)]


def _item(where: str, value: Any) -> dict[str, Any]:
    item = fields.read(fields.checked(where, fields.an_object, value), ITEM, within=f"{where}.")
    role = "system" if item["role"] == "developer" else item["role"]
    return {"role": role, "content": content(f"{where}.content", item["content"], ("input_text", "output_text"))}


_ITEM_ROLES = ("system", "developer", "user", "assistant")
ITEM = {
    "type": fields.one_of("message", "message"),
    "role": Field(
        lambda name, value: checks.choice(name, value, _ITEM_ROLES), {"enum": list(_ITEM_ROLES)}, required=True
    ),
    "content": Field(lambda name, value: value, _parts("input_text", "output_text"), required=True),
    "id": fields.ignored(),  # of an answer that is sent back
    "status": fields.ignored(),
    "phase": fields.ignored(),
}
INPUT: dict[str, Any] = {
    "anyOf": [{"type": "string"}, {"type": "array", "minItems": 1, "items": fields.schema_of(ITEM)}]
}
