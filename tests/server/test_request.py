"""Requests: what is understood, and that everything else is refused by the name of its field."""

from __future__ import annotations

import json

import pytest

from assay.server import fields, request
from assay.server.errors import ApiError
from assay.server.request import MOST_ANSWERS, MOST_PROMPTS, STOP_CHARACTERS, Ask

TURNS = [{"role": "user", "content": "hi"}]


def ask(**fields):
    return completion({"prompt": "x"} | fields)


def chat(**fields):
    return request.chat(fields_of({"messages": TURNS} | fields))


def completion(body):
    return request.completion(fields_of(body))


def fields_of(body):
    return fields.document(body if isinstance(body, bytes) else json.dumps(body).encode())


def refused(body, *, reader=request.completion):
    with pytest.raises(ApiError) as caught:
        reader(fields_of(body))
    json.dumps(caught.value.body(), ensure_ascii=False).encode()  # nothing in it that cannot be sent
    return caught.value


def test_null_means_not_given():
    names = (
        "model max_tokens min_tokens ignore_eos temperature top_p seed stop stream stream_options n logprobs user tools "
        "logit_bias echo best_of suffix frequency_penalty presence_penalty"
    )
    assert ask(**dict.fromkeys(names.split())) == ask() == Ask(prompts=["x"])
    assert chat(**dict.fromkeys(["max_completion_tokens", *names.split()])) == chat()


def test_what_asks_for_nothing_more_is_accepted():
    none = {"n": 1, "best_of": 1, "echo": False, "frequency_penalty": 0, "presence_penalty": 0.0, "logit_bias": {}}
    assert ask(**none, suffix="", top_k=0, min_p=0.0, repetition_penalty=1) == ask(top_k=-1) == ask()
    more = {"tools": [], "tool_choice": "auto", "response_format": {"type": "text"}, "logprobs": False}
    assert chat(**more, user="me", store=True, metadata={"a": "b"}) == chat()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("min_p", 0.1),
        ("min_p", False),
        ("repetition_penalty", 1.1),
        ("response_format", {"type": "json_object"}),  # belongs to chats
        ("suffix", "x"),
        ("tools", [{"type": "function"}]),
        ("max_token", 5),
        ("max_completion_tokens", 5),  # belongs to chats
        ("\ud800", 1),
    ],
)
def test_what_is_not_done_is_refused_by_name(field, value):
    error = refused({"prompt": "x", field: value})
    assert error.status == 400
    assert error.param == field.encode("ascii", "backslashreplace").decode()
    assert error.code == "unsupported_parameter"


BAD_VALUES = [
    ("temperature", -0.1),
    ("temperature", 2.1),
    ("temperature", "0.5"),
    ("temperature", True),
    ("temperature", 10**400),
    ("top_p", -1),
    ("top_p", 1.1),
    ("top_p", []),
    ("seed", -(2**63) - 1),
    ("seed", 2**64),
    ("seed", 10**400),
    ("seed", 1.0),
    ("max_tokens", 0),
    ("max_tokens", -5),
    ("max_tokens", 2.5),
    ("max_tokens", "5"),
    ("max_tokens", True),
    ("min_tokens", -1),
    ("ignore_eos", "yes"),
    ("stream", 1),
    ("stream", "true"),
    ("model", 5),
    ("model", "\udfff"),
    ("n", 0),
    ("n", MOST_ANSWERS + 1),
    ("n", True),
    ("best_of", 0),
    ("best_of", MOST_ANSWERS + 1),
    ("logprobs", -1),
    ("logprobs", 21),
    ("logprobs", True),
    ("echo", 1),
    ("top_k", -2),
    ("top_k", 1.5),
    ("top_k", 2**31),
    ("top_k", 10**400),
    ("presence_penalty", 2.1),
    ("frequency_penalty", -2.1),
    ("frequency_penalty", "1"),
    ("logit_bias", []),
    ("logit_bias", {"x": 1}),
    ("logit_bias", {"-1": 1}),
    ("logit_bias", {"1.5": 1}),
    ("logit_bias", {"9" * 10: 1}),
    ("logit_bias", {"٣": 1}),
    ("logit_bias", {"5": 101}),
    ("logit_bias", {"5": "1"}),
    ("logit_bias", {str(token): 1 for token in range(1025)}),
    ("stop", ""),
    ("stop", ["a", ""]),
    ("stop", ["a"] * 5),
    ("stop", "x" * (STOP_CHARACTERS + 1)),
    ("stop", "x" * 10**6),
    ("stop", {"a": 1}),
    ("stop", [1]),
    ("stop", "\ud800"),
    ("stream_options", {"include_usage": True}),  # without stream
    ("prompt", None),
    ("prompt", ""),
    ("prompt", []),
    ("prompt", ["a", ""]),
    ("prompt", ["a"] * (MOST_PROMPTS + 1)),
    ("prompt", 5),
    ("prompt", [True, False]),
    ("prompt", [1.5]),
    ("prompt", [[1, "a"]]),
    ("prompt", [1, "a"]),
    ("prompt", [[1], []]),
    ("prompt", {"a": "b"}),
    ("prompt", "half \ud83d"),
    ("prompt", ["fine", "\udc00"]),
]


@pytest.mark.parametrize(("field", "value"), BAD_VALUES)
def test_a_bad_value_is_refused_by_the_name_of_its_field(field, value):
    error = refused({"prompt": "x"} | {field: value})
    assert (error.status, error.param) == (400, field)
    assert field in error.message
    assert len(error.message) < 500


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"\xff\xfe",
        b'{"prompt": "\xff"}',
        b"{",
        b"null",
        b"[1]",
        b'"prompt"',
        b'{"prompt": "x", "temperature": NaN}',
        b'{"prompt": "x", "temperature": Infinity}',
        b'{"prompt": "x", "temperature": -Infinity}',
        b'{"prompt": "x", "temperature": 1e400}',
        b'{"prompt": "x", "top_p": -1e400}',
        b'{"prompt": "x", "metadata": {"a": [1e999]}}',
        b'{"prompt": "x", "prompt": "y"}',
        b'{"prompt": "x", "metadata": {"a": 1, "a": 2}}',
        b'{"prompt": "x", "seed": ' + b"9" * 6000 + b"}",
        b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'{"prompt": ' + b"[" * 900 + b"]" * 900 + b"}",
        b'{"prompt": "x", "stop": ' + b'{"a":' * 900 + b"1" + b"}" * 900 + b"}",
        b"[" * 500_000,
        b"\xef\xbb\xbf{}",
    ],
    ids=range(21),
)
def test_what_is_no_request_is_refused(body):
    assert refused(body).status == 400


@pytest.mark.parametrize("temperature", [0, 0.0, 1e-300, 5e-324, 9e-6])
def test_a_temperature_near_nothing_is_greedy(temperature):
    assert ask(temperature=temperature).temperature == 0
    assert ask(temperature=1e-4).temperature == 1e-4
    assert ask(temperature=1, top_p=0).temperature == 0


def test_the_forms_of_a_prompt():
    assert ask(prompt="a").prompts == ["a"]
    assert ask(prompt=["a", "b"]).prompts == ["a", "b"]
    assert ask(prompt=[1, 2]).prompts == [[1, 2]]
    assert ask(prompt=[[1, 2], [3]]).prompts == [[1, 2], [3]]


def test_messages_and_their_parts():
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    turns = [{"role": "developer", "content": "be kind"}, {"role": "user", "content": parts, "name": "Ann"}]
    empty = {"role": "assistant", "content": "", "tool_calls": None, "refusal": None, "annotations": []}
    assert chat(messages=[*turns, empty]).turns == [
        {"role": "system", "content": "be kind"},
        {"role": "user", "content": "one\ntwo", "name": "Ann"},
        {"role": "assistant", "content": ""},
    ]


@pytest.mark.parametrize(
    ("messages", "param"),
    [
        (None, "messages"),
        ([], "messages"),
        ("hi", "messages"),
        (["hi"], "messages[0]"),
        ([{"content": "x"}], "messages[0].role"),
        ([{"role": "wizard", "content": "x"}], "messages[0].role"),
        ([{"role": "tool", "content": "x"}], "messages[0].tool_call_id"),
        ([{"role": "user", "content": "x", "tool_call_id": "c"}], "messages[0].tool_call_id"),
        ([{"role": "user", "content": "x", "tool_calls": [{}]}], "messages[0].tool_calls"),
        ([{"role": ["user"], "content": "x"}], "messages[0].role"),
        ([*TURNS, {"role": "assistant", "content": None}], "messages[1].content"),
        ([{"role": "user"}], "messages[0].content"),
        ([{"role": "user", "content": 5}], "messages[0].content"),
        ([{"role": "user", "content": []}], "messages[0].content"),
        ([{"role": "user", "content": "\ud800"}], "messages[0].content"),
        ([{"role": "user", "content": ["x"]}], "messages[0].content[0]"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}], "messages[0].content[0]"),
        ([{"role": "user", "content": [{"type": "text"}]}], "messages[0].content[0].text"),
        ([{"role": "user", "content": [{"type": "text", "text": "\ud800"}]}], "messages[0].content[0].text"),
        ([{"role": "assistant", "content": "x", "tool_calls": {}}], "messages[0].tool_calls"),
        ([{"role": "assistant", "content": "x", "tool_calls": [{}]}], "messages[0].tool_calls[0].id"),
        ([{"role": "assistant", "tool_calls": [{"id": "c", "function": 5}]}], "messages[0].tool_calls[0].function"),
        (
            [{"role": "assistant", "tool_calls": [{"id": "c", "function": {"name": "f", "arguments": "[1]"}}]}],
            "messages[0].tool_calls[0].function.arguments",
        ),
        (
            [{"role": "assistant", "tool_calls": [{"id": "c", "function": {"name": "f", "arguments": {}}}]}],
            "messages[0].tool_calls[0].function.arguments",
        ),
    ],
)
def test_a_bad_message_is_refused_by_its_place(messages, param):
    error = refused({"messages": messages}, reader=request.chat)
    assert (error.status, error.param) == (400, param)


def test_a_chat_has_one_limit():
    assert chat(max_tokens=5).new_tokens == chat(max_completion_tokens=5).new_tokens == 5
    error = refused({"messages": TURNS, "max_tokens": 5, "max_completion_tokens": 5}, reader=request.chat)
    assert error.param == "max_completion_tokens"


def test_stream_options():
    assert ask(stream=True, stream_options={"include_usage": True}).include_usage
    assert not ask(stream=True, stream_options={"include_usage": None}).include_usage
    assert not ask(stream=True, stream_options={"include_obfuscation": False}).include_usage
    assert (
        refused({"prompt": "x", "stream": True, "stream_options": {"include": True}}).param == "stream_options.include"
    )
    assert refused({"prompt": "x", "stream": True, "stream_options": 5}).param == "stream_options"
    wrong = refused({"prompt": "x", "stream": True, "stream_options": {"include_usage": 1}})
    assert wrong.param == "stream_options.include_usage"


# ---- how many answers


def test_how_many_answers_and_what_is_told_of_them():
    assert (ask(n=3).n, ask(n=3).best_of) == (3, 3)
    assert (ask(n=2, best_of=5).n, ask(n=2, best_of=5).best_of) == (2, 5)
    assert refused({"prompt": "x", "n": 3, "best_of": 2}).param == "best_of"
    assert refused({"prompt": "x", "best_of": 2, "stream": True}).param == "best_of"
    assert refused({"prompt": ["x"] * 32, "n": 5}).param == "n"
    assert refused({"prompt": ["x"] * 32, "best_of": 5}).param == "best_of"
    assert ask(prompt=["x"] * 32, n=4).best_of == 4
    assert (ask(logprobs=0).logprobs, ask(logprobs=5).logprobs, ask().logprobs) == (0, 5, None)
    assert (chat(logprobs=True).logprobs, chat(logprobs=True, top_logprobs=4).logprobs) == (0, 4)
    assert refused({"messages": TURNS, "top_logprobs": 2}, reader=request.chat).param == "top_logprobs"
    assert ask(max_tokens=0, echo=True).new_tokens == 0
    assert refused({"prompt": "x", "max_tokens": 0}).param == "max_tokens"
    assert ask(logit_bias={"5": -100, "6": 1.5}).logit_bias == {5: -100.0, 6: 1.5}


# ---- forms and tools

SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}


def test_the_form_of_an_answer():
    assert chat(response_format={"type": "text"}).format is None
    assert chat(response_format={"type": "json_object"}).format.schema is None
    given = {"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA, "strict": True, "description": "d"}}
    assert chat(response_format=given).format.schema == SCHEMA
    flat = {"format": {"type": "json_schema", "name": "n", "schema": SCHEMA}}
    assert request.response({"input": "x", "text": flat}).format.schema == SCHEMA


@pytest.mark.parametrize(
    ("wanted", "param"),
    [
        ("json", "response_format"),
        ({}, "response_format"),
        ({"type": "grammar"}, "response_format"),
        ({"type": "text", "more": 1}, "response_format.more"),
        ({"type": "json_schema"}, "response_format.json_schema"),
        ({"type": "json_schema", "json_schema": {"schema": SCHEMA}}, "response_format.json_schema.name"),
        ({"type": "json_schema", "json_schema": {"name": "n"}}, "response_format.json_schema.schema"),
        ({"type": "json_schema", "json_schema": {"name": "n", "schema": True}}, "response_format.json_schema.schema"),
        (
            {"type": "json_schema", "json_schema": {"name": "n", "schema": {"enum": ["x" * 70_000]}}},
            "response_format.json_schema.schema",
        ),
    ],
)
def test_a_bad_form_is_refused_by_its_place(wanted, param):
    error = refused({"messages": TURNS, "response_format": wanted}, reader=request.chat)
    assert (error.status, error.param) == (400, param)
    assert len(error.message) < 500


def test_what_does_not_go_with_a_form():
    form = {"messages": TURNS, "response_format": {"type": "json_object"}}
    assert refused(form | {"ignore_eos": True}, reader=request.chat).param == "ignore_eos"
    assert refused(form | {"min_tokens": 3}, reader=request.chat).param == "min_tokens"
    assert refused(form | {"top_k": 5}, reader=request.chat).param == "top_k"
    assert refused(form | {"tools": TOOLS, "tool_choice": "required"}, reader=request.chat).param == "tool_choice"


TOOLS = [
    {"type": "function", "function": {"name": "add", "description": "adds", "parameters": SCHEMA}},
    {"type": "function", "function": {"name": "now"}},
]


def test_tools_and_the_choice_of_them():
    assert [tool.name for tool in chat(tools=TOOLS).tools] == ["add", "now"]
    assert chat(tools=TOOLS).tools[1].parameters == {"type": "object", "properties": {}}
    assert chat(tools=TOOLS).forced == chat(tools=TOOLS, tool_choice="auto").forced == ()
    assert chat(tools=TOOLS, tool_choice="none").tools == ()
    assert [tool.name for tool in chat(tools=TOOLS, tool_choice="required").forced] == ["add", "now"]
    one = {"type": "function", "function": {"name": "now"}}
    assert [tool.name for tool in chat(tools=TOOLS, tool_choice=one).forced] == ["now"]
    assert chat(tools=TOOLS, parallel_tool_calls=False).one_call


@pytest.mark.parametrize(
    ("given", "param"),
    [
        ({"tools": {}}, "tools"),
        ({"tools": [5]}, "tools[0]"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"tools": [{"type": "function"}]}, "tools[0].function"),
        ({"tools": [{"type": "function", "function": {}}]}, "tools[0].function.name"),
        ({"tools": [{"type": "function", "function": {"name": "two words"}}]}, "tools[0].function.name"),
        ({"tools": [{"type": "function", "function": {"name": "a\n"}}]}, "tools[0].function.name"),
        (
            {"tools": [{"type": "function", "function": {"name": "a", "parameters": []}}]},
            "tools[0].function.parameters",
        ),
        ({"tools": TOOLS * 2}, "tools"),
        ({"tools": TOOLS * 65}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": "any"}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "sub"}}}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": {"type": "function"}}, "tool_choice.function"),
    ],
)
def test_bad_tools_are_refused_by_their_place(given, param):
    assert refused({"messages": TURNS} | given, reader=request.chat).param == param


def test_calls_and_their_answers():
    call = {"id": "c", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
    turns = [*TURNS, {"role": "assistant", "content": None, "tool_calls": [call]}]
    turns += [{"role": "tool", "tool_call_id": "c", "content": "2"}]
    assert chat(messages=turns).turns[1:] == [
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"id": "c", "type": "function", "function": {"name": "add", "arguments": {"a": 1}}}],
        },
        {"role": "tool", "content": "2", "tool_call_id": "c"},
    ]


# ---- the other endpoints


def test_what_a_response_asks():
    made = request.response({"input": "hi", "instructions": "be kind", "max_output_tokens": 5, "metadata": {"a": "b"}})
    assert made.turns == [{"role": "system", "content": "be kind"}, {"role": "user", "content": "hi"}]
    assert (made.new_tokens, made.told["metadata"], made.n) == (5, {"a": "b"}, 1)
    items = [
        {"role": "developer", "content": "be kind"},
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "hi"}]},
        {
            "id": "msg_1",
            "type": "message",
            "role": "assistant",
            "status": "completed",
            "content": [{"type": "output_text", "text": "hello", "annotations": []}],
        },
    ]
    assert request.response({"input": items}).turns == [
        {"role": "system", "content": "be kind"},
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "hello"},
    ]


@pytest.mark.parametrize(
    ("given", "param"),
    [
        ({"input": None}, "input"),
        ({"input": []}, "input"),
        ({"input": 5}, "input"),
        ({"input": ["x"]}, "input[0]"),
        ({"input": [{"content": "x"}]}, "input[0].role"),
        ({"input": [{"role": "user"}]}, "input[0].content"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input[0].content[0]"),
        ({"input": [{"type": "function_call_output", "role": "user", "content": "x"}]}, "input[0].type"),
        ({"store": True}, "store"),
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"conversation": "c"}, "conversation"),
        ({"background": True}, "background"),
        ({"tools": [{"type": "web_search"}]}, "tools"),
        ({"truncation": "auto"}, "truncation"),
        ({"include": ["x"]}, "include"),
        ({"reasoning": {"effort": "low"}}, "reasoning"),
        ({"text": {"format": {"type": "json_schema", "name": "n"}}}, "text.format.schema"),
        ({"text": {"verbosity": "low"}}, "text.verbosity"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"metadata": {"a": 1}}, "metadata.a"),
        ({"max_tokens": 5}, "max_tokens"),
        ({"seed": 5}, "seed"),
    ],
)
def test_a_response_refuses_by_name(given, param):
    error = refused({"input": "x"} | given, reader=request.response)
    assert (error.status, error.param) in ((400, param), (400, param.partition(".")[0]))


def test_what_embeddings_are_asked():
    made = request.embedding({"input": ["a", [5]], "encoding_format": "base64", "user": "me"})
    assert (made.inputs, made.base64) == (["a", [5]], True)
    assert not request.embedding({"input": "a"}).base64
    assert request.embedding({"input": ["a"] * 256}).inputs == ["a"] * 256
    for given, param in (
        ({"input": ["a"] * 257}, "input"),
        ({"input": ""}, "input"),
        ({"input": "a", "dimensions": 8}, "dimensions"),
        ({"input": "a", "encoding_format": "int8"}, "encoding_format"),
    ):
        assert refused(given, reader=request.embedding).param == param
