"""Calls of tools in a model's answer: found however the text is cut, and what is none stays text."""

from __future__ import annotations

import json

import pytest

from assay.methods.inference.awrs import json_schema
from assay.server.messages import Tool
from assay.server.tools import ToolReader, call_schema

CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'
ADD = ("add", {"a": 1})


def cut(text, size):
    """The text and the calls in an answer that comes in pieces."""
    reader = ToolReader({"add", "now"})
    said = "".join(reader.add(text[at : at + size]) for at in range(0, len(text), size)) + reader.rest()
    return said, [(call.name, json.loads(call.arguments)) for call in reader.calls]


@pytest.mark.parametrize("size", [1, 3, 7, 1000])
@pytest.mark.parametrize(
    ("text", "said", "calls"),
    [
        ("plain words", "plain words", []),
        ("", "", []),
        ("a < b <tool> and <tool_", "a < b <tool> and <tool_", []),
        (CALL, "", [ADD]),
        (f"I will add. {CALL}", "I will add. ", [ADD]),
        (f"{CALL}{CALL}", "", [ADD, ADD]),
        (f"x{CALL}y", "xy", [ADD]),
        (CALL.removesuffix("</tool_call>"), "", [ADD]),  # the end was a token without text
        ('{"name": "add", "arguments": {"a": 1}}', "", [ADD]),
        ('\n {"name": "add", "parameters": {"a": 1}}\n', "", [ADD]),
        ('{"name": "add", "arguments": "{\\"a\\": 1}"}', "", [ADD]),
        ('[{"name": "add", "arguments": {"a": 1}}, {"name": "now"}]', "", [ADD, ("now", {})]),
        ('{"name": "sub", "arguments": {}}', '{"name": "sub", "arguments": {}}', []),
        ('{"name": "add", "arguments": [1]}', '{"name": "add", "arguments": [1]}', []),
        ('{"name": "add", "arguments": {"a": NaN}}', '{"name": "add", "arguments": {"a": NaN}}', []),
        ('{"name": "add", "arguments": {"a": 1e999}}', '{"name": "add", "arguments": {"a": 1e999}}', []),
        ('{"name": ["add"]}', '{"name": ["add"]}', []),
        ('{"name": "add", "argu', '{"name": "add", "argu', []),  # cut off by the limit of tokens
        ("[1, 2]", "[1, 2]", []),
        ("{" * 2000, "{" * 2000, []),
        ("<tool_call>no JSON</tool_call> rest", "<tool_call>no JSON</tool_call> rest", []),
        ("<tool_call>", "<tool_call>", []),
    ],
)
def test_calls_are_found_however_the_text_is_cut(text, said, calls, size):
    assert cut(text, size) == (said, calls)


def test_text_is_given_as_soon_as_it_is_certain():
    reader = ToolReader({"add"})
    assert [reader.add(piece) for piece in ("Well", ", a <", "b>", " <tool_call", ">")] == [
        "Well",
        ", a ",
        "<b>",
        " ",
        "",
    ]


def test_ids_of_calls_are_their_own():
    reader = ToolReader({"add"})
    reader.add(CALL + CALL)
    assert len({call.id for call in reader.calls}) == 2


def test_the_schema_of_a_call_that_must_be():
    add, now = Tool("add", {"type": "object", "properties": {"a": {"type": "integer"}}}, {}), Tool("now", {}, {})
    one, both = call_schema([add]), call_schema([add, now])
    assert one["properties"]["name"]["enum"] == ["add"]
    assert one["$defs"]["add"] == add.parameters
    assert one["required"] == ["name", "arguments"]
    assert len(both["anyOf"]) == 2
    for call in ({"name": "add", "arguments": {"a": 3}}, {"name": "now", "arguments": {}}):
        assert json_schema(both).complete(json.dumps(call).encode())
        assert json_schema(one).complete(json.dumps(call).encode()) == (call["name"] == "add")
    assert not json_schema(both).complete(b'{"name": "add", "arguments": {"a": "x"}}')


def test_a_tools_schema_may_refer_to_parts_of_itself():
    """As Pydantic writes those of nested models."""
    point = {
        "type": "object",
        "properties": {"x": {"type": "integer"}},
        "required": ["x"],
        "additionalProperties": False,
    }
    tree = {
        "type": "object",
        "properties": {"to": {"$ref": "#/$defs/Point"}, "$ref": {"const": "#"}, "next": {"$ref": "#"}},
        "additionalProperties": False,
        "$defs": {"Point": point},
    }
    other = {"type": "object", "properties": {"to": {"$ref": "#/$defs/Point"}}, "$defs": {"Point": {"type": "string"}}}
    form = json_schema(call_schema([Tool("go", tree, {}), Tool("say.it-now", other, {})]))

    def fits(name, arguments):
        return form.complete(json.dumps({"name": name, "arguments": arguments}).encode())

    assert fits("go", {"to": {"x": 1}, "$ref": "#", "next": {"to": {"x": 2}}})
    assert fits("say.it-now", {"to": "there"})
    assert not fits("go", {"to": "there"})
    assert not fits("go", {"next": {"to": 1}})
    assert not fits("say.it-now", {"to": {"x": 1}})
