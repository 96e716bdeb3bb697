"""/v1/responses through OpenAI's own client: text in, text out, whole and as the documented events."""

from __future__ import annotations

import json

import openai
import pytest


@pytest.fixture
def respond(api):
    return lambda **given: api.responses.create(**{"model": "tiny", "input": "hi", "max_output_tokens": 30, **given})


def test_a_response(respond, say):
    steps = say("Hello there")
    made = respond(instructions="be kind", metadata={"a": "b"}, temperature=0)
    assert (made.object, made.status, made.output_text) == ("response", "completed", "Hello there")
    assert (made.instructions, made.metadata, made.max_output_tokens) == ("be kind", {"a": "b"}, 30)
    assert made.usage.output_tokens == steps
    assert made.usage.total_tokens == made.usage.input_tokens + steps
    assert made.usage.input_tokens_details.cached_tokens == 0
    (item,) = made.output
    assert (item.type, item.role, item.status, item.content[0].type) == (
        "message",
        "assistant",
        "completed",
        "output_text",
    )
    assert not made.store


def test_instructions_and_messages_are_turns(respond, tokenizer):
    items = [
        {"role": "user", "content": [{"type": "input_text", "text": "hi"}]},
        {"role": "assistant", "content": "yes"},
    ]
    turns = [{"role": "system", "content": "be kind"}, {"role": "user", "content": "hi"}]
    made = respond(input=items, instructions="be kind")
    ids = tokenizer.apply_chat_template(
        [*turns, {"role": "assistant", "content": "yes"}], add_generation_prompt=True, return_dict=False
    )
    assert made.usage.input_tokens == len(ids)


def test_an_answer_may_be_sent_back(respond, say):
    say("Hello there")
    first = respond()
    again = respond(input=[{"role": "user", "content": "hi"}, *first.output, {"role": "user", "content": "and?"}])
    assert again.output_text == "Hello there"


def test_a_response_that_is_cut_off(respond, say):
    say("Hello there", end=False)
    made = respond(max_output_tokens=2)
    assert (made.status, made.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    assert [event.type for event in respond(max_output_tokens=2, stream=True)][-1] == "response.incomplete"


def test_the_events_of_a_stream(respond, say):
    say("Hello there")
    events = list(respond(stream=True))
    kinds = [event.type for event in events]
    deltas = kinds.count("response.output_text.delta")
    assert kinds == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        *["response.output_text.delta"] * deltas,
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.completed",
    ]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == "Hello there"
    assert events[0].response.status == "in_progress"
    assert events[-1].response.output_text == events[-4].text == "Hello there"
    assert events[-1].response.usage.output_tokens > 0
    assert len({event.item_id for event in events if hasattr(event, "item_id")}) == 1
    assert events[0].response.id == events[-1].response.id


def test_the_clients_own_reader_of_streams(api, say):
    say("Hello there")
    with api.responses.stream(model="tiny", input="hi", max_output_tokens=30) as stream:
        for _ in stream:
            pass
        assert stream.get_final_response().output_text == "Hello there"


# one text only: a model that knows nothing would go on for ever inside a free string or number
SHORT = {"type": "object", "properties": {"a": {"enum": ["x"]}}, "required": ["a"], "additionalProperties": False}


def test_a_response_by_schema(respond):
    form = {"type": "json_schema", "name": "c", "schema": SHORT}
    made = respond(text={"format": form}, max_output_tokens=100)
    assert isinstance(json.loads(made.output_text), dict)
    assert made.text.format.name == "c"


def test_what_fails_on_its_way(respond, api, model, monkeypatch):
    monkeypatch.setattr(type(model), "forward", lambda *a, **k: 1 / 0)
    events = list(respond(stream=True))
    assert (events[-1].type, events[-1].response.status) == ("response.failed", "failed")
    assert events[-1].response.error.code == "server_error"
    assert "ZeroDivisionError" in events[-1].response.error.message
    with pytest.raises(openai.InternalServerError):
        respond()


@pytest.mark.parametrize(
    ("given", "param"),
    [
        ({"store": True}, "store"),
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"tools": [{"type": "web_search"}]}, "tools"),
        ({"background": True}, "background"),
    ],
)
def test_what_is_not_done_is_refused_by_name(respond, given, param):
    with pytest.raises(openai.BadRequestError) as caught:
        respond(**given)
    assert (caught.value.param, caught.value.code) == (param, "unsupported_parameter")
