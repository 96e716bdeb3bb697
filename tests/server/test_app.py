"""The server as the real OpenAI client sees it, and what strangers and nonsense get."""

from __future__ import annotations

import json
import logging
import threading

import pytest
from clients import answer, eventually, read_until

TURNS = [{"role": "user", "content": "hi"}]


@pytest.fixture
def server(serving):
    return serving(api_keys=["other", "secret"])


@pytest.fixture
def api(server):
    import openai

    with openai.OpenAI(base_url=f"http://127.0.0.1:{server.port}/v1", api_key="secret", max_retries=0) as client:
        yield client


def error_of(response):
    """The error in a response, which must have OpenAI's shape."""
    body = response.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert body["error"]["message"]
    return body["error"]


# ---- the OpenAI client


def test_chats_and_completions_whole_and_streamed(api, say):
    steps = say("Hello there, world")
    whole = api.chat.completions.create(model="tiny", messages=TURNS, max_tokens=20)
    assert whole.object == "chat.completion"
    assert whole.choices[0].message.role == "assistant"
    assert (whole.choices[0].message.content, whole.choices[0].finish_reason) == ("Hello there, world", "stop")
    assert whole.usage.completion_tokens == steps
    assert whole.usage.total_tokens == whole.usage.prompt_tokens + steps

    say("Hello there, world")
    chunks = list(api.chat.completions.create(model="tiny", messages=TURNS, max_completion_tokens=20, stream=True))
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
    assert len({chunk.id for chunk in chunks}) == 1
    deltas = [chunk.choices[0].delta for chunk in chunks]
    assert [delta.role for delta in deltas] == ["assistant"] + [None] * (len(deltas) - 1)
    assert "".join(delta.content or "" for delta in deltas) == "Hello there, world"
    assert deltas[-1].content is None
    assert [chunk.choices[0].finish_reason for chunk in chunks] == [None] * (len(chunks) - 1) + ["stop"]
    assert all(chunk.usage is None for chunk in chunks)

    say("Hello there, world")
    text = api.completions.create(model="tiny", prompt="x", max_tokens=3)
    assert (text.object, text.choices[0].finish_reason) == ("text_completion", "length")
    say("Hello there, world")
    chunks = list(api.completions.create(model="tiny", prompt="x", max_tokens=20, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == "Hello there, world"


@pytest.mark.model
def test_a_real_model_says_what_generate_says(smollm2, models_of):
    from fastapi.testclient import TestClient

    from assay.server.app import create_app

    client = TestClient(create_app(models_of(smollm2.model, smollm2.tokenizer, "smollm2")))
    turns = [{"role": "user", "content": "Say hello in French, with accents."}]
    ids = smollm2.tokenizer.apply_chat_template(
        turns, add_generation_prompt=True, return_tensors="pt", return_dict=False
    )
    made = smollm2.model.generate(ids, attention_mask=ids * 0 + 1, max_new_tokens=6, do_sample=False, pad_token_id=0)
    expected = smollm2.tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True)
    answer = client.post("/v1/chat/completions", json={"messages": turns, "max_tokens": 6}).json()
    assert answer["choices"][0]["message"]["content"] == expected != ""
    assert answer["usage"]["prompt_tokens"] == ids.shape[1]


@pytest.mark.parametrize("chat", [True, False])
def test_usage_comes_last_if_it_is_asked_for(api, say, chat):
    steps = say("one two")
    options = {"model": "tiny", "max_tokens": 20, "stream": True, "stream_options": {"include_usage": True}}
    if chat:
        chunks = list(api.chat.completions.create(messages=TURNS, **options))
    else:
        chunks = list(api.completions.create(prompt=[5, 6, 7], **options))
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == steps
    assert chat or chunks[-1].usage.prompt_tokens == 3
    assert all(len(chunk.choices) == 1 and chunk.usage is None for chunk in chunks[:-1])


def test_several_prompts_are_answered(api, say):
    steps = say("a b c")
    made = api.completions.create(model="tiny", prompt=["x", "yy", "z"], max_tokens=20)
    assert [(one.index, one.text, one.finish_reason) for one in made.choices] == [
        (i, "a b c", "stop") for i in range(3)
    ]
    assert made.usage.completion_tokens == 3 * steps
    texts = ["", ""]
    for chunk in api.completions.create(model="tiny", prompt=[[5], [6, 7]], max_tokens=20, stream=True):
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == ["a b c", "a b c"]


def test_the_client_sees_openais_errors(api, server):
    import openai

    assert [model.id for model in api.models.list()] == ["tiny"]
    assert api.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError):
        api.models.retrieve("gpt/5")
    with pytest.raises(openai.NotFoundError) as caught:
        api.completions.create(model="gpt-5", prompt="x")
    assert (caught.value.code, caught.value.param) == ("model_not_found", "model")
    with pytest.raises(openai.BadRequestError) as caught:
        api.chat.completions.create(model="tiny", messages=TURNS, temperature=3)
    assert (caught.value.type, caught.value.param) == ("invalid_request_error", "temperature")
    with pytest.raises(openai.AuthenticationError) as caught:
        openai.OpenAI(base_url=api.base_url, api_key="wrong", max_retries=0).models.list()
    assert caught.value.code == "invalid_api_key"


def test_what_breaks_amid_a_stream_is_told_in_it(api, model, monkeypatch):
    import openai

    monkeypatch.setattr(type(model), "forward", lambda *a, **k: 1 / 0)
    with pytest.raises(openai.APIError, match="ZeroDivisionError"):
        list(api.completions.create(model="tiny", prompt="x", stream=True))
    with pytest.raises(openai.InternalServerError) as caught:
        api.completions.create(model="tiny", prompt="x")
    assert caught.value.body["type"] == "server_error"
    monkeypatch.undo()
    assert api.completions.create(model="tiny", prompt="x", max_tokens=1).choices


# ---- strangers


@pytest.mark.parametrize(
    "header", [(), ["Authorization: Bearer wrong"], ["Authorization: secret"], ["Authorization: Bearer sécret"]]
)
def test_a_stranger_is_refused_before_the_body_is_read(server, header):
    head = [
        "POST /v1/chat/completions HTTP/1.1",
        "Host: x",
        "Content-Type: application/json",
        "Content-Length: 9999999",
    ]
    connection = server.raw("\r\n".join([*head, *header, "", ""]).encode())  # and not a byte of the body
    got = read_until(connection, b'"invalid_api_key"}}')
    assert got.startswith(b"HTTP/1.1 401")
    assert b"www-authenticate: Bearer" in got


def test_two_keys_are_none(server):
    two = ["Authorization: Bearer secret", "Authorization: Bearer other"]
    assert server.ask({"prompt": "x"}, headers=two)[0] == 401
    for one in two:
        assert server.ask({"prompt": "x", "max_tokens": 1}, headers=[one])[0] == 200


def test_health_needs_no_key_and_everything_else_does(server):
    closed = ("/v1/models", "/v1/models/tiny", "/openapi.json", "/metrics")
    for path, status in (("/health", 200), ("/ready", 200), ("/docs", 404), *((path, 401) for path in closed)):
        assert answer(server.raw(f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode()))[0] == status


# ---- too much


def test_a_long_body_is_refused_by_its_announcement(serving):
    head = (
        "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 10485760\r\n\r\n"
    )
    status, body = answer(serving().raw(head.encode()))
    assert (status, body["error"]["code"]) == (413, "request_too_large")


def test_a_long_body_is_refused_while_it_is_read(serving, monkeypatch):
    from assay.server import app

    monkeypatch.setattr(app, "LEAST_BODY", 1000)
    monkeypatch.setattr(app, "BODY_PER_TOKEN", 0)
    head = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
    status, body = answer(serving().raw(head.encode() + (b"258\r\n" + b" " * 600 + b"\r\n") * 2))  # with no end
    assert (status, body["error"]["code"]) == (413, "request_too_large")


def test_a_body_that_does_not_come_is_not_waited_for(serving, monkeypatch):
    from assay.server import app

    monkeypatch.setattr(app, "BODY_SECONDS", 0.1)
    server = serving()
    head = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 5\r\n\r\n{"
    assert answer(server.raw(head.encode()))[0] == 408
    assert server.idle()


def test_a_prompt_of_ten_megabytes_and_one_of_one(serving, tokenizer):
    server = serving()
    status, body = server.ask({"prompt": "word " * 2_000_000})
    assert status == 413
    status, body = server.ask({"prompt": "word " * 100_000})
    assert (status, body["error"]["code"], body["error"]["param"]) == (400, "context_length_exceeded", "prompt")
    assert server.ask({"prompt": "x", "max_tokens": 1})[0] == 200


def test_health_answers_while_a_request_is_tokenised(serving, monkeypatch):
    server, go_on = serving(), threading.Event()
    engine = server.app.state.server.models.engines()[0]
    prepare = engine.prepare
    monkeypatch.setattr(engine, "prepare", lambda *given: go_on.wait(20) and prepare(*given))
    connection = server.send({"prompt": "x", "max_tokens": 1})
    assert eventually(lambda: server.app.state.server.asking == 1)
    assert answer(server.raw(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"))[0] == 200
    go_on.set()
    assert answer(connection)[0] == 200


def test_assays_own_probe_measures_it(serving):
    from assay.methods.serving.idealized_runtime import probe_endpoint

    server = serving()
    profile = probe_endpoint(
        f"http://127.0.0.1:{server.port}/v1",
        "tiny",
        prompt_tokens=[8, 64],
        output_tokens=[2, 24],
        repeats=2,
        overhead_seconds=0.0,
    )
    assert profile.dropped == 0  # every answer has the length that was asked for


# ---- nonsense


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/v1/responses", "/v1/embeddings"])
@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"\xff",
        b'"x"',
        b"[" * 100_000,
        b'{"prompt": "x", "temperature": NaN}',
        b'{"prompt": "x", "seed": 1e999}',
        b'{"prompt": "\\ud800", "messages": [{"role": "user", "content": "\\udfff"}]}',
        b'{"\\ud800": 1, "prompt": "x", "messages": [{"role": "user", "content": "x"}]}',
        b'{"prompt": "x", "stop": "' + b"x" * 1_000_000 + b'", "messages": [{"role": "user", "content": "x"}]}',
        b'{"prompt": "x", "prompt": "x", "messages": 1, "messages": 2}',
    ],
    ids=range(11),
)
def test_nonsense_is_a_400_of_openais_shape(client, path, body):
    response = client.post(path, content=body, headers={"Content-Type": "application/json"})
    assert response.status_code == 400
    assert error_of(response)["type"] == "invalid_request_error"


def test_a_body_must_say_that_it_is_json(client):
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data", ""):
        response = client.post("/v1/completions", content=b'{"prompt": "x"}', headers={"Content-Type": kind})
        assert response.status_code == 400
        assert "application/json" in error_of(response)["message"]
    kind = {"Content-Type": "Application/JSON; charset=utf-8"}
    assert client.post("/v1/completions", content=b'{"prompt": "x", "max_tokens": 1}', headers=kind).status_code == 200


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/", 404, "unknown_url"),
        ("GET", "/v1/embeddings", 405, "method_not_allowed"),
        ("POST", "/v1/models/load", 405, "method_not_allowed"),  # a GET would be for a model of this name
        ("GET", "/v1/completions/", 404, "unknown_url"),
        ("POST", "/v1/\udcff%ff%00", 404, "unknown_url"),
        ("GET", "/v1/completions", 405, "method_not_allowed"),
        ("DELETE", "/v1/models", 405, "method_not_allowed"),
        ("GET", "/v1/models/other", 404, "model_not_found"),
    ],
)
def test_other_paths_and_methods_have_the_shape_too(client, method, path, status, code):
    response = client.request(method, path.encode("utf-8", "replace").decode())
    assert response.status_code == status
    assert error_of(response)["code"] == code


def test_an_unforeseen_failure_has_the_shape_and_no_prompt_in_the_log(client, model, monkeypatch, caplog):
    def fails(*args, **kwargs):
        raise ValueError("the prompt was: my secret words")

    monkeypatch.setattr(type(model), "forward", fails)
    with caplog.at_level(logging.DEBUG):
        for stream in (False, True):
            response = client.post("/v1/completions", json={"prompt": "my secret words", "stream": stream})
            assert b"secret" not in response.content
    assert "answering failed with ValueError" in caplog.text
    assert "in fails" in caplog.text
    assert "secret words" not in caplog.text.replace('raise ValueError("the prompt was: my secret words")', "")


def test_nothing_of_a_prompt_or_an_answer_is_logged(serving, say, caplog, capfd):
    with caplog.at_level(logging.DEBUG):
        logging.getLogger("asyncio").setLevel(logging.INFO)
        server = serving()
        say("an answer in confidence")
        for body in (
            {"prompt": "a prompt in confidence"},
            {"prompt": "a prompt in confidence", "temperature": "x"},
            b"in confidence",
        ):
            server.ask(body)
    assert "confidence" not in caplog.text
    assert "confidence" not in "".join(capfd.readouterr())


def test_null_parameters_over_the_wire(client, say):
    say("one")
    body = dict.fromkeys(
        ["temperature", "top_p", "max_tokens", "stop", "stream", "seed", "n", "user", "model", "tools", "of_nobody"]
    )
    response = client.post("/v1/chat/completions", json=body | {"messages": TURNS})
    assert response.json()["choices"][0]["message"] == {"role": "assistant", "content": "one"}


def test_events_are_events(client, say):
    say("é\n\ntwo")
    response = client.post("/v1/completions", json={"prompt": "x", "max_tokens": 20, "stream": True})
    assert response.headers["content-type"].startswith("text/event-stream")
    events = response.text.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    assert all(event.startswith("data: ") and "\n" not in event for event in events[:-1])
    assert "".join(json.loads(event[6:])["choices"][0]["text"] for event in events[:-2]) == "é\n\ntwo"


def test_requests_at_the_same_time_do_not_mix(serving):
    server = serving()
    bodies = [{"prompt": f"{i} x", "max_tokens": 12, "temperature": 1, "seed": i} for i in range(6)]
    alone = [server.ask(body)[1]["choices"][0]["text"] for body in bodies]
    together = {}

    def go(i):
        together[i] = server.ask(bodies[i])[1]["choices"][0]["text"]

    threads = [threading.Thread(target=go, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert [together[i] for i in range(6)] == alone
    assert len(set(alone)) == 6
