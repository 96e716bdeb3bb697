"""The parameters of completions and chats through OpenAI's own client: what is asked for is what comes."""

from __future__ import annotations

import json
import math

import openai
import pytest
import torch

TURNS = [{"role": "user", "content": "hi"}]
FREE = {"model": "tiny", "max_tokens": 8, "extra_body": {"ignore_eos": True}}


@pytest.fixture
def complete(api):
    return lambda **given: api.completions.create(**{**FREE, "prompt": "Hello", **given})


@pytest.fixture
def chat(api):
    return lambda **given: api.chat.completions.create(**{**FREE, "messages": TURNS, **given})


# ---- several answers


def test_several_answers(complete, chat):
    texts = [one.text for one in complete(n=3, temperature=1.5, seed=1).choices]
    assert len(set(texts)) == 3
    assert texts == [one.text for one in complete(n=3, temperature=1.5, seed=1).choices]
    made = chat(n=3, temperature=1.5, seed=1)
    assert [one.index for one in made.choices] == [0, 1, 2]
    assert len({one.message.content for one in made.choices}) == 3
    assert made.usage.completion_tokens == 24


def test_several_answers_in_a_stream(complete, chat):
    texts = ["", "", ""]
    for chunk in complete(n=3, temperature=1.5, seed=1, stream=True):
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == [one.text for one in complete(n=3, temperature=1.5, seed=1).choices]
    roles, ends = [], []
    for chunk in chat(n=2, stream=True, stream_options={"include_usage": True}):
        for one in chunk.choices:
            roles += [one.index] if one.delta.role else []
            ends += [one.index] if one.finish_reason else []
        last = chunk
    assert (sorted(roles), sorted(ends), last.choices) == ([0, 1], [0, 1], [])
    assert last.usage.completion_tokens == 16


def test_the_best_of_several(complete):
    """The answers kept are those of the highest mean log-probability, and all that were made are counted."""
    options = {"temperature": 1.5, "seed": 1, "logprobs": 0}
    every = complete(n=6, **options)
    best = complete(n=2, best_of=6, **options)
    means = {one.text: sum(one.logprobs.token_logprobs) / 8 for one in every.choices}
    ranked = sorted(means, key=lambda text: -means[text])
    assert [one.text for one in best.choices] == ranked[:2]
    assert [one.index for one in best.choices] == [0, 1]
    assert (best.usage.completion_tokens, best.usage.prompt_tokens) == (48, every.usage.prompt_tokens)
    unseen = complete(n=1, best_of=6, temperature=1.5, seed=1)
    assert (unseen.choices[0].text, unseen.choices[0].logprobs) == (ranked[0], None)


# ---- log-probabilities


def shares(model, ids):
    with torch.inference_mode():
        return model(torch.tensor([ids])).logits[0].float().log_softmax(-1)


def greedy(model, ids, count):
    """The tokens that the model finds most probable."""
    made = list(ids)
    for _ in range(count):
        made.append(int(shares(model, made)[-1].argmax()))
    return made[len(ids) :]


def test_log_probabilities_of_a_completion(complete, model, tokenizer):
    prompt = tokenizer("Hello")["input_ids"]
    new = greedy(model, prompt, 4)
    told = complete(logprobs=3, max_tokens=4).choices[0].logprobs
    expected = shares(model, prompt + new)[len(prompt) - 1 : -1]
    chosen = [float(row[token]) for row, token in zip(expected, new, strict=True)]
    assert told.token_logprobs == pytest.approx(chosen, abs=1e-4)
    for row, top in zip(expected, told.top_logprobs, strict=True):
        assert sorted(top.values(), reverse=True) == pytest.approx(row.topk(3).values.tolist(), abs=1e-4)
    assert told.text_offset[0] == 0
    assert told.text_offset == sorted(told.text_offset)


def test_log_probabilities_of_a_chat(chat, say):
    say("one two", end=False)
    made = chat(logprobs=True, top_logprobs=2, max_tokens=3)
    told = made.choices[0].logprobs.content
    assert "".join(one.token for one in told) == made.choices[0].message.content
    assert all(bytes(one.bytes).decode() == one.token for one in told)
    assert all(len(one.top_logprobs) == 2 and one.logprob == pytest.approx(0, abs=1e-6) for one in told)
    assert chat().choices[0].logprobs is None
    assert chat(logprobs=True).choices[0].logprobs.content[0].top_logprobs == []


def test_log_probabilities_in_a_stream(complete, chat):
    whole = complete(logprobs=1).choices[0].logprobs
    pieces = [chunk.choices[0].logprobs for chunk in complete(logprobs=1, stream=True)]
    assert sum((piece.tokens for piece in pieces), []) == whole.tokens
    assert sum((piece.text_offset for piece in pieces), []) == whole.text_offset
    told = [one for chunk in chat(logprobs=True, stream=True) for one in (chunk.choices[0].logprobs or _None()).content]
    assert len(told) == 8


class _None:
    content: list = []


def test_a_probability_of_nothing_is_a_number(api, say):
    say("one two")  # all other tokens: a logit of -1e9
    made = api.completions.create(model="tiny", prompt="x", max_tokens=1, logprobs=2)
    assert min(made.choices[0].logprobs.top_logprobs[0].values()) == -9999.0


# ---- the prompt repeated


def test_the_prompt_is_repeated(complete, tokenizer):
    plain = complete().choices[0].text
    assert complete(echo=True).choices[0].text == "Hello" + plain
    ids = tokenizer("Hello")["input_ids"]
    assert complete(echo=True, prompt=ids).choices[0].text == "Hello" + plain
    streamed = "".join(chunk.choices[0].text for chunk in complete(echo=True, stream=True))
    assert streamed == "Hello" + plain


def test_the_prompt_is_scored(complete, model, tokenizer):
    """As evaluation harnesses ask: the log-probability of every token of a text, the first one's unknown."""
    text = "statement and expression"
    ids = tokenizer(text)["input_ids"]
    expected = [float(row[token]) for row, token in zip(shares(model, ids), ids[1:], strict=False)]
    for options in ({"max_tokens": 0}, {"max_tokens": 1}, {"max_tokens": 2, "n": 2}):
        for one in complete(prompt=text, echo=True, logprobs=2, **options).choices:
            told = one.logprobs
            assert told.token_logprobs[0] is None
            assert told.token_logprobs[1 : len(ids)] == pytest.approx(expected, abs=1e-4)
            assert "".join(told.tokens[: len(ids)]) == text
            assert told.text_offset[: len(ids)] == [len("".join(told.tokens[:i])) for i in range(len(ids))]
            assert len(told.tokens) == len(ids) + options["max_tokens"]
    only = complete(prompt=text, echo=True, logprobs=2, max_tokens=0)
    assert (only.choices[0].text, only.usage.completion_tokens) == (text, 0)
    assert all(math.isfinite(value) for value in only.choices[0].logprobs.token_logprobs[1:])


# ---- which tokens


def test_tokens_may_be_favoured_and_forbidden(complete, model, tokenizer):
    (wanted,) = tokenizer("x")["input_ids"]
    assert complete(logit_bias={str(wanted): 100}).choices[0].text == "x" * 8
    (banned,) = greedy(model, tokenizer("Hello")["input_ids"], 1)
    first = [
        complete(max_tokens=1, logprobs=0, logit_bias=bias).choices[0].logprobs.tokens
        for bias in ({}, {str(banned): -100})
    ]
    assert first[0] != first[1]
    with pytest.raises(openai.BadRequestError) as caught:
        complete(logit_bias={"9999": 1})
    assert caught.value.param == "logit_bias"


def test_penalties(complete, tokenizer):
    (x,), (y,) = tokenizer("x")["input_ids"], tokenizer("y")["input_ids"]
    favoured = {str(x): 50, str(y): 49}
    assert complete(logit_bias=favoured).choices[0].text == "x" * 8
    present = complete(logit_bias=favoured, presence_penalty=2).choices[0].text
    assert set(present) == {"x", "y"}
    assert complete(logit_bias=favoured, frequency_penalty=2).choices[0].text.count("y") > 1


def test_the_most_probable_k(complete):
    greedy = complete().choices[0].text
    hot = {"temperature": 2.0, "seed": 3}
    assert complete(**hot).choices[0].text != greedy
    assert complete(**hot, extra_body={"ignore_eos": True, "top_k": 1}).choices[0].text == greedy


# ---- forms

COLOUR = {
    "type": "object",
    "properties": {"colour": {"enum": ["red", "green"]}, "sure": {"type": "boolean"}},
    "required": ["colour", "sure"],
    "additionalProperties": False,
}


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_by_schema(api, stream):
    form = {"type": "json_schema", "json_schema": {"name": "c", "schema": COLOUR, "strict": True}}
    made = api.chat.completions.create(
        model="tiny", messages=TURNS, max_tokens=200, response_format=form, temperature=1, stream=stream
    )
    if stream:
        text = "".join(chunk.choices[0].delta.content or "" for chunk in made)
    else:
        text = made.choices[0].message.content
        assert made.choices[0].finish_reason == "stop"
    assert json.loads(text)["colour"] in ("red", "green")
    assert set(json.loads(text)) == {"colour", "sure"}


def test_an_answer_that_is_json(api):
    made = api.chat.completions.create(
        model="tiny", messages=TURNS, max_tokens=60, response_format={"type": "json_object"}
    )
    choice = made.choices[0]
    assert choice.message.content.lstrip().startswith("{")
    assert choice.finish_reason == "length" or isinstance(json.loads(choice.message.content), dict)


def test_a_schema_that_cannot_be_held_to_is_refused(api):
    form = {"type": "json_schema", "json_schema": {"name": "c", "schema": {"type": "nothing of the kind"}}}
    with pytest.raises(openai.BadRequestError) as caught:
        api.chat.completions.create(model="tiny", messages=TURNS, response_format=form)
    assert caught.value.param == "response_format"


def test_a_form_that_cannot_be_met_is_no_failure_of_the_server(api, monkeypatch):
    from assay.methods.inference import awrs

    monkeypatch.setattr(awrs.Chooser, "__call__", lambda *given: 1 / 0)
    form = {"type": "json_schema", "json_schema": {"name": "c", "schema": COLOUR}}
    with pytest.raises(openai.BadRequestError) as caught:
        api.chat.completions.create(model="tiny", messages=TURNS, response_format=form)
    assert caught.value.code == "form_not_met"


# ---- tools

TEMPLATE = (
    "{% for tool in tools or [] %}{{ tool | tojson }}{% endfor %}"
    "{% for m in messages %}{{ m.role + m.content }}{% for c in m.tool_calls or [] %}{{ c | tojson }}{% endfor %}{% endfor %}"
)
TOOLS = [
    {
        "type": "function",
        "function": {"name": "paint", "parameters": COLOUR},
    }
]


@pytest.fixture
def tooled(serving):
    """A client of a server whose model's template knows tools."""
    server = serving()
    server.app.state.server.models.engines()[0]._reads_with.chat_template = TEMPLATE
    with openai.OpenAI(base_url=f"http://127.0.0.1:{server.port}/v1", api_key="none", max_retries=0) as client:
        yield lambda **given: client.chat.completions.create(
            **{"model": "tiny", "messages": TURNS, "max_tokens": 200, "tools": TOOLS, **given}
        )


SAID = 'Painting. <tool_call>{"name": "paint", "arguments": {"colour": "red", "sure": true}}</tool_call>'


def test_a_call(tooled, say):
    say(SAID)
    made = tooled().choices[0]
    assert (made.finish_reason, made.message.content) == ("tool_calls", "Painting. ")
    (call,) = made.message.tool_calls
    assert (call.type, call.function.name) == ("function", "paint")
    assert json.loads(call.function.arguments) == {"colour": "red", "sure": True}
    say(SAID.removeprefix("Painting. ") * 2)
    made = tooled().choices[0]
    assert (made.message.content, len(made.message.tool_calls)) == (None, 2)
    assert len(tooled(parallel_tool_calls=False).choices[0].message.tool_calls) == 1
    say("no call")
    made = tooled().choices[0]
    assert (made.finish_reason, made.message.content, made.message.tool_calls) == ("stop", "no call", None)
    say(SAID)
    assert tooled(tool_choice="none").choices[0].message.content == SAID


def test_calls_in_a_stream(tooled, say):
    say(SAID + SAID.removeprefix("Painting. "))
    text, calls, ends = "", [], []
    for chunk in tooled(stream=True):
        delta = chunk.choices[0].delta
        text += delta.content or ""
        calls += delta.tool_calls or []
        ends += [chunk.choices[0].finish_reason] if chunk.choices[0].finish_reason else []
    assert (text, ends) == ("Painting. ", ["tool_calls"])
    assert [(call.index, call.function.name) for call in calls] == [(0, "paint"), (1, "paint")]
    assert len({call.id for call in calls}) == 2


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "paint"}}])
def test_a_call_that_must_be(tooled, choice):
    made = tooled(tool_choice=choice, temperature=1).choices[0]
    assert made.finish_reason == "tool_calls"
    assert json.loads(made.message.tool_calls[0].function.arguments)["colour"] in ("red", "green")


def test_a_conversation_with_a_tool(tooled, say):
    say(SAID)
    call = tooled().choices[0].message
    say("done")
    turns = [*TURNS, call, {"role": "tool", "tool_call_id": call.tool_calls[0].id, "content": "painted"}]
    assert tooled(messages=turns).choices[0].message.content == "done"


def test_a_model_that_knows_no_tools_says_so(api):
    with pytest.raises(openai.BadRequestError) as caught:
        api.chat.completions.create(model="tiny", messages=TURNS, tools=TOOLS)
    assert (caught.value.param, caught.value.code) == ("tools", "unsupported_parameter")


# ---- what is told beside the text


def test_what_an_answer_says_of_itself(complete, chat, api):
    made = [complete(), chat(), *complete(stream=True), *chat(stream=True)]
    prints = {one.system_fingerprint for one in made}
    assert prints == {api.models.retrieve("tiny").system_fingerprint}
    assert made[0].usage.prompt_tokens_details.cached_tokens == 0


def test_cached_tokens_are_told(api, serving, monkeypatch):
    from tests.properties import scheduler_stand_in as stand_in

    original = stand_in.Scheduler._next

    def cached(self, row):
        import dataclasses

        return dataclasses.replace(original(self, row), cached_tokens=len(row.ids) - 1)

    monkeypatch.setattr(stand_in.Scheduler, "_next", cached)
    usage = api.completions.create(model="tiny", prompt=[[5, 6, 7], [5, 6]], n=2, max_tokens=2).usage
    assert (usage.prompt_tokens, usage.prompt_tokens_details.cached_tokens) == (5, 3)
