"""The server speaks to the real OpenAI client, and keeps strangers and nonsense out."""

from __future__ import annotations

import threading

import pytest
from fastapi.testclient import TestClient

from assay.server.app import until_stop

pytestmark = pytest.mark.model


@pytest.fixture(scope="module")
def app(smollm2):
    from assay.server.app import create_app

    return create_app(smollm2.model, smollm2.tokenizer, name="smollm2-135m", api_key="secret")


@pytest.fixture(scope="module")
def client(app):
    return TestClient(app, headers={"Authorization": "Bearer secret"})


def test_completion_equals_generate(client, smollm2):
    ids = smollm2.tokenizer("The capital of France is", return_tensors="pt")["input_ids"]
    expected = smollm2.model.generate(
        ids, attention_mask=ids * 0 + 1, max_new_tokens=6, do_sample=False, pad_token_id=0
    )
    text = smollm2.tokenizer.decode(expected[0, ids.shape[1] :], skip_special_tokens=True)
    body = {"prompt": "The capital of France is", "max_tokens": 6}
    answer = client.post("/v1/completions", json=body).json()
    assert answer["choices"][0]["text"] == text
    assert answer["choices"][0]["finish_reason"] == "length"
    assert answer["usage"] == {"prompt_tokens": ids.shape[1], "completion_tokens": 6, "total_tokens": ids.shape[1] + 6}


def test_openai_client_streams_the_same_chat(app):
    import openai
    import uvicorn

    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="error"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        thread.join(0.05)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        api = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="secret")
        assert [m.id for m in api.models.list()] == ["smollm2-135m"]
        turns = [{"role": "user", "content": "Say hello."}]
        whole = api.chat.completions.create(model="m", messages=turns, max_tokens=8)
        pieces = api.chat.completions.create(model="m", messages=turns, max_tokens=8, stream=True)
        text = "".join(piece.choices[0].delta.content or "" for piece in pieces)
        assert text == whole.choices[0].message.content
        assert text.strip()
        with pytest.raises(openai.AuthenticationError):
            openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="wrong").models.list()
    finally:
        server.should_exit = True
        thread.join(10)


def test_sampling_with_a_seed_repeats(client):
    body = {"prompt": "Once upon a time", "max_tokens": 8, "temperature": 1.0, "seed": 7}
    first, second = (client.post("/v1/completions", json=body).json()["choices"][0]["text"] for _ in range(2))
    assert first == second


def test_a_stop_ends_the_answer_and_is_not_part_of_it(client):
    body = {"prompt": "The capital of France is", "max_tokens": 12}
    whole = client.post("/v1/completions", json=body).json()["choices"][0]["text"]
    stop = whole[8:11]
    answer = client.post("/v1/completions", json=body | {"stop": ["never said", stop]}).json()
    assert answer["choices"][0] == {
        "index": 0,
        "finish_reason": "stop",
        "logprobs": None,
        "text": whole[: whole.find(stop)],
    }
    assert answer["usage"]["completion_tokens"] < 12


@pytest.mark.parametrize("cuts", [(), (1,), (2, 3), (1, 2, 3, 4, 5, 6)])
@pytest.mark.parametrize(
    ("stops", "expected", "met"),
    [
        ([], "abcabd", False),
        (["abd"], "abc", True),
        (["bd", "c"], "ab", True),
        (["x"], "abcabd", False),
        (["bdx"], "abcabd", False),
    ],
)
def test_stops_are_found_however_the_text_is_cut(cuts, stops, expected, met):
    text, ends = "abcabd", (0, *cuts, 6)
    pieces = list(until_stop([text[a:b] for a, b in zip(ends, ends[1:], strict=False)], stops))
    assert "".join(piece for piece, _ in pieces) == expected
    assert any(found for _, found in pieces) == met


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        ("/v1/completions", {"prompt": ""}, 422),
        ("/v1/completions", {"prompt": "x", "max_tokens": 0}, 422),
        ("/v1/completions", {"prompt": "x", "max_tokens": 9000}, 400),
        ("/v1/completions", {"prompt": "x " * 9000, "max_tokens": 1}, 400),
        ("/v1/completions", {"prompt": "x", "temperature": -1}, 422),
        ("/v1/completions", {"prompt": "x", "stop": [""]}, 422),
        ("/v1/completions", {"prompt": "x", "frequency_penalty": 0.5}, 422),
        ("/v1/chat/completions", {"messages": []}, 422),
        ("/v1/chat/completions", {"messages": [{"role": "wizard", "content": "x"}]}, 422),
    ],
)
def test_nonsense_is_refused(client, path, body, status):
    assert client.post(path, json=body).status_code == status


def test_a_wrong_key_is_refused(app):
    assert TestClient(app).get("/v1/models").status_code == 401
    assert TestClient(app).get("/health").status_code == 200


def test_an_open_host_needs_a_key(monkeypatch):
    from assay.cli.serve import serve
    from assay.errors import InputError

    monkeypatch.delenv("ASSAY_API_KEY", raising=False)
    with pytest.raises(InputError, match="api-key"):
        serve("smollm2-135m", host="0.0.0.0")
    with pytest.raises(InputError, match="port"):
        serve("smollm2-135m", port=0)
