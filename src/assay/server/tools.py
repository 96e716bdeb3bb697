"""Calls of tools in a model's answer: found in its text, in the forms that models are trained to write.

Known forms: `<tool_call>{"name": ..., "arguments": {...}}</tool_call>`, any number of them amid other text, and an answer that is
a bare JSON object of that kind, or a list of them ("parameters" may stand for "arguments"). What is in no known form, or names a
tool that the request does not have, is text.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from assay.server.messages import Tool

OPEN, CLOSE = "<tool_call>", "</tool_call>"


@dataclass(frozen=True)
class Call:
    """A call as the model made it: the tool's name, and its arguments as JSON."""

    id: str
    name: str
    arguments: str


class ToolReader:
    """Divides an answer that comes in pieces into text and calls, holding back what may be the beginning of a call."""

    def __init__(self, names: Collection[str]) -> None:
        self.names = names
        self.calls: list[Call] = []
        self._held = ""
        self._begun = self._bare = self._inside = self._spoken = False

    def add(self, text: str) -> str:
        """What is certain to be text and no call."""
        self._held += text
        if not self._begun:
            beginning = self._held.lstrip()
            if not beginning:
                return ""
            self._begun, self._bare = True, beginning[0] in "{["
        return "" if self._bare else self._shown(self._text())

    def rest(self) -> str:
        """What was held back and is text after all, when the answer is over."""
        held, self._held = self._held, ""
        if self._bare or self._inside:
            if calls := self._read(held):
                self.calls += calls
                return ""
            held = OPEN + held if self._inside else held
        return self._shown(held)

    def _text(self) -> str:
        said = ""
        while True:
            mark = CLOSE if self._inside else OPEN
            at = self._held.find(mark)
            if at < 0:
                break
            before, self._held = self._held[:at], self._held[at + len(mark) :]
            if not self._inside:
                said += before
            elif calls := self._read(before):
                self.calls += calls
            else:
                said += OPEN + before + CLOSE
            self._inside = not self._inside
        if self._inside:
            return said
        keep = max((n for n in range(1, len(OPEN)) if self._held.endswith(OPEN[:n])), default=0)
        said += self._held[: len(self._held) - keep]
        self._held = self._held[len(self._held) - keep :]
        return said

    def _shown(self, text: str) -> str:
        """`text`, unless it is only the space around calls."""
        if not text.strip() and (self.calls or self._inside) and not self._spoken:
            return ""
        self._spoken = self._spoken or bool(text.strip())
        return text

    def _read(self, text: str) -> list[Call]:
        """The calls in a JSON text; an empty list if it is anything but calls of known tools."""
        try:
            found = json.loads(text, parse_constant=_no_constant)
            return [self._call(item) for item in (found if isinstance(found, list) else [found])]
        except (ValueError, TypeError, KeyError, RecursionError):
            return []

    def _call(self, item: Any) -> Call:
        name, arguments = item["name"], item["arguments"] if "arguments" in item else item.get("parameters", {})
        if isinstance(arguments, str):
            arguments = json.loads(arguments, parse_constant=_no_constant)
        if name not in self.names or not isinstance(arguments, dict):
            raise ValueError("no call")
        told = json.dumps(arguments, ensure_ascii=False, allow_nan=False)  # 1e999 is read as infinity
        return Call(f"call_{uuid.uuid4().hex[:24]}", name, told)


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def names_tools(template: str) -> bool:
    """Whether a chat template can tell a model of tools."""
    return "tools" in template


def names_calls(template: str) -> bool:
    """Whether a chat template can show calls that were made, and what came of them."""
    return "tool" in template


def call_schema(tools: Sequence[Tool]) -> dict[str, Any]:
    """The JSON schema of a call of one of the `tools`, for an answer that must be one.

    The tools' own schemas are among its `$defs`, and what they refer to within themselves is found there.
    """
    calls = [
        {
            "type": "object",
            "properties": {
                "name": {"type": "string", "enum": [tool.name]},
                "arguments": {"$ref": f"#/$defs/{tool.name}"},
            },
            "required": ["name", "arguments"],
            "additionalProperties": False,
        }
        for tool in tools
    ]
    own = {tool.name: _within(tool.parameters, f"#/$defs/{tool.name}") for tool in tools}
    return {**(calls[0] if len(calls) == 1 else {"anyOf": calls}), "$defs": own}


def _within(schema: Any, place: str) -> Any:
    """A schema as part of another, at `place`: what it refers to within itself is looked for there."""
    if isinstance(schema, list):
        return [_within(one, place) for one in schema]
    if not isinstance(schema, Mapping):
        return schema
    moved: dict[str, Any] = {}
    for word, part in schema.items():
        if word in ("enum", "const", "default", "examples"):  # values, no schemas
            moved[word] = part
        elif word in ("properties", "$defs", "definitions") and isinstance(part, Mapping):  # schemas by any names
            moved[word] = {name: _within(one, place) for name, one in part.items()}
        elif word == "$ref" and isinstance(part, str) and part.startswith("#"):
            moved[word] = place + part[1:]
        else:
            moved[word] = _within(part, place)
    return moved
