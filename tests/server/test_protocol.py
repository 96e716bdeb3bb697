"""Requests: what is understood, and that everything else is refused by the name of its field."""

from __future__ import annotations

import json

import pytest

from assay.server.protocol import MOST_PROMPTS, STOP_CHARACTERS, ApiError, Ask, read

TURNS = [{"role": "user", "content": "hi"}]


def ask(**fields):
    return read(json.dumps({"prompt": "x"} | fields).encode(), chat=False, served="tiny")


def chat(**fields):
    return read(json.dumps({"messages": TURNS} | fields).encode(), chat=True, served="tiny")


def refused(body, *, is_chat=False):
    with pytest.raises(ApiError) as caught:
        read(body if isinstance(body, bytes) else json.dumps(body).encode(), chat=is_chat, served="tiny")
    json.dumps(caught.value.body(), ensure_ascii=False).encode()  # nothing in it that cannot be sent
    return caught.value


def test_null_means_not_given():
    names = (
        "model max_tokens min_tokens ignore_eos temperature top_p seed stop stream stream_options n logprobs user tools "
        "logit_bias echo best_of suffix frequency_penalty presence_penalty"
    )
    assert ask(**dict.fromkeys(names.split())) == ask() == Ask(chat=False, prompts=["x"])
    assert chat(**dict.fromkeys(["max_completion_tokens", *names.split()])) == chat()


def test_what_asks_for_nothing_more_is_accepted():
    assert ask(n=1, best_of=1, echo=False, frequency_penalty=0, presence_penalty=0.0, logit_bias={}, suffix="") == ask()
    more = {"tools": [], "tool_choice": "auto", "response_format": {"type": "text"}, "logprobs": False}
    assert chat(**more, user="me", store=True, metadata={"a": "b"}) == chat()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("best_of", 2),
        ("echo", True),
        ("frequency_penalty", 0.5),
        ("logit_bias", {"50256": -100}),
        ("logprobs", 0),  # of OpenAI's completions: the log-probability of the token itself
        ("logprobs", True),
        ("n", 2),
        ("response_format", {"type": "json_object"}),
        ("suffix", "x"),
        ("tools", [{"type": "function"}]),
        ("top_k", 20),
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
        b'{"prompt": "x", "prompt": "y"}',
        b'{"prompt": "x", "metadata": {"a": 1, "a": 2}}',
        b'{"prompt": "x", "seed": ' + b"9" * 6000 + b"}",
        b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'{"prompt": ' + b"[" * 900 + b"]" * 900 + b"}",
        b'{"prompt": "x", "stop": ' + b'{"a":' * 900 + b"1" + b"}" * 900 + b"}",
        b"[" * 500_000,
        b"\xef\xbb\xbf{}",
    ],
    ids=range(20),
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


def test_the_model_is_the_one_served_or_not_named():
    for model in ("", "tiny"):
        assert ask(model=model) == ask()
    error = refused({"prompt": "x", "model": "gpt-5" * 1000})
    assert (error.status, error.param, error.code) == (404, "model", "model_not_found")
    assert len(error.message) < 300


def test_messages_and_their_parts():
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    turns = [{"role": "developer", "content": "be kind"}, {"role": "user", "content": parts, "name": "Ann"}]
    empty = {"role": "assistant", "content": "", "tool_calls": None, "refusal": None, "annotations": []}
    assert chat(messages=[*turns, empty]).messages == [
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
        ([{"role": "tool", "content": "x"}], "messages[0].role"),
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
        ([{"role": "assistant", "content": "x", "tool_calls": [{}]}], "messages[0].tool_calls"),
    ],
)
def test_a_bad_message_is_refused_by_its_place(messages, param):
    error = refused({"messages": messages}, is_chat=True)
    assert (error.status, error.param) == (400, param)


def test_a_chat_has_one_limit():
    assert chat(max_tokens=5).new_tokens == chat(max_completion_tokens=5).new_tokens == 5
    error = refused({"messages": TURNS, "max_tokens": 5, "max_completion_tokens": 5}, is_chat=True)
    assert error.param == "max_completion_tokens"


def test_stream_options():
    assert ask(stream=True, stream_options={"include_usage": True}).include_usage
    assert not ask(stream=True, stream_options={"include_usage": None}).include_usage
    assert not ask(stream=True, stream_options={"include_obfuscation": False}).include_usage
    assert refused({"prompt": "x", "stream": True, "stream_options": {"include": True}}).param == "stream_options"
    wrong = refused({"prompt": "x", "stream": True, "stream_options": {"include_usage": 1}})
    assert wrong.param == "stream_options.include_usage"
