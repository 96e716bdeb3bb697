"""model="auto": a trained router behind the server, by its own clients; what routing takes is in usage, metrics and log."""

from __future__ import annotations

import json
import logging

import numpy as np
import openai
import pytest
from fastapi.testclient import TestClient

from assay.cli.serve import read_router
from assay.errors import InputError
from assay.methods.serving.ellie_sql import ModelRouter
from assay.server.app import create_app
from assay.server.models import Models
from tiny import write_tiny_llama

ASKED = [f"what is {n} plus {n}?" for n in range(20)] + [
    f"prove that the sum of {n} cubes is a square" for n in range(20)
]
BOTH = np.array([[1.0, 1.0]] * 20 + [[0.0, 1.0]] * 20)
EASY, DIFFICULT = "what is 30 plus 31?", "prove that the sum of 31 cubes is a square"
GREEDY = {"max_tokens": 3, "ignore_eos": True}


@pytest.fixture(scope="module")
def router_file(tmp_path_factory):
    file = tmp_path_factory.mktemp("router") / "router.json"
    ModelRouter.trained(["small", "large"], ASKED, BOTH, [1.0, 10.0], most_lost=0.0, strength=100.0).save(file)
    return file


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    at = tmp_path_factory.mktemp("auto")
    return {name: write_tiny_llama(at / name, seed=seed, context=256) for seed, name in enumerate(("small", "large"))}


@pytest.fixture
def models(folders, router_file):
    held = Models(router=read_router(router_file, ["small", "large"]))
    for name, folder in folders.items():
        held.load(name, str(folder))
    yield held
    held.close()


def test_each_question_goes_to_its_model(models):
    client = TestClient(create_app(models))
    for text, name in ((EASY, "small"), (DIFFICULT, "large")):
        for path, body in (
            ("completions", {"prompt": text}),
            ("chat/completions", {"messages": [{"role": "user", "content": text}]}),
        ):
            made = client.post(f"/v1/{path}", json={**GREEDY, **body, "model": "auto"}).json()
            assert made["model"] == name
            assert made["usage"]["router_tokens"] == 0
            direct = client.post(f"/v1/{path}", json={**GREEDY, **body, "model": name}).json()
            assert made["choices"] == direct["choices"]
            assert "router_tokens" not in direct["usage"]


def test_the_openai_client_gets_the_same(models, serving):
    server = serving(app=create_app(models))
    with openai.OpenAI(base_url=f"http://127.0.0.1:{server.port}/v1", api_key="k", max_retries=0) as client:
        for text, name in ((EASY, "small"), (DIFFICULT, "large")):
            assert client.completions.create(model="auto", prompt=text, max_tokens=2).model == name
            assert client.responses.create(model="auto", input=text, max_output_tokens=2).model == name


def test_the_router_s_own_cost_is_charged(models, caplog):
    models.router = lambda document: ("large", 11)
    client = TestClient(create_app(models))
    with caplog.at_level(logging.INFO, "assay.server.requests"):
        usage = client.post("/v1/completions", json={**GREEDY, "prompt": "x", "model": "auto"}).json()["usage"]
    assert usage["router_tokens"] == 11
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"] + 11
    said = caplog.records[-1].fields
    assert (said["model"], said["router_tokens"]) == ("large", 11)
    assert said["router_seconds"] >= 0
    usage = client.post("/v1/responses", json={"max_output_tokens": 2, "input": "x", "model": "auto"}).json()["usage"]
    assert usage["total_tokens"] == usage["input_tokens"] + usage["output_tokens"] + usage["router_tokens"]
    client.post("/v1/completions", json={**GREEDY, "prompt": "x", "model": "small"})
    counted = client.get("/metrics").text
    assert 'assay_routed_total{model="large"} 2' in counted
    assert 'assay_routed_total{model="small"}' not in counted
    assert "assay_router_tokens_total 22" in counted


def test_a_stream_of_several_answers_is_charged_once(models):
    models.router = lambda document: ("large", 11)
    client = TestClient(create_app(models))
    asked = {**GREEDY, "model": "auto", "n": 2, "stream": True, "stream_options": {"include_usage": True}}
    for path, body in (
        ("completions", {"prompt": ["x", "y"]}),
        ("chat/completions", {"messages": [{"role": "user", "content": "x"}]}),
    ):
        before = client.get("/metrics").text
        text = client.post(f"/v1/{path}", json={**asked, **body}).text
        events = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]
        (usage,) = [one["usage"] for one in events if one.get("usage")]
        assert {one["model"] for one in events} == {"large"}
        assert usage["router_tokens"] == 11
        assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"] + 11
        assert counted(client.get("/metrics").text) - counted(before) == 11
    with client.stream(
        "POST", "/v1/responses", json={"input": "x", "model": "auto", "stream": True, "max_output_tokens": 2}
    ) as made:
        last = [json.loads(line[6:]) for line in made.iter_lines() if line.startswith("data: {")][-1]
    assert last["response"]["usage"]["router_tokens"] == 11
    assert last["response"]["model"] == "large"


def counted(text):
    return int(next(line.split()[1] for line in text.splitlines() if line.startswith("assay_router_tokens_total ")))


def test_tools_go_with_the_request_to_the_model_that_was_chosen(models):
    (large,) = [engine for engine in models.engines() if engine.name == "large"]
    large._reads_with.chat_template = "{{ tools | tojson }}{% for turn in messages %}{{ turn.content }}{% endfor %}"
    client = TestClient(create_app(models))
    tool = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}
    asked = {"model": "auto", "tools": [tool], "max_tokens": 2}
    made = client.post("/v1/chat/completions", json={**asked, "messages": [{"role": "user", "content": DIFFICULT}]})
    assert made.status_code == 200
    assert made.json()["model"] == "large"
    assert made.json()["usage"]["router_tokens"] == 0
    refused = client.post("/v1/chat/completions", json={**asked, "messages": [{"role": "user", "content": EASY}]})
    assert refused.status_code == 400  # the small one knows no tools, and its client is told so
    assert "tools are not supported by this model" in refused.json()["error"]["message"]
    assert (
        'assay_routed_total{model="small"} 1' in client.get("/metrics").text
    )  # what was routed is counted all the same


def test_embeddings_under_one_name_come_from_one_model(models):
    """Vectors of two models cannot be compared: for them the router is not asked."""
    client = TestClient(create_app(models))
    made = [client.post("/v1/embeddings", json={"input": text, "model": "auto"}).json() for text in (EASY, DIFFICULT)]
    assert [one["model"] for one in made] == ["small", "small"]
    assert "assay_router_tokens_total 0" in client.get("/metrics").text
    assert "assay_routed_total{" not in client.get("/metrics").text


def test_a_model_that_the_router_chose_and_that_is_gone_is_no_mistake_of_the_client(models):
    client = TestClient(create_app(models), raise_server_exceptions=False)
    models.unload("large").close()
    refused = client.post("/v1/completions", json={**GREEDY, "prompt": DIFFICULT, "model": "auto"})
    assert refused.status_code == 503
    assert refused.headers["retry-after"] == "5"
    assert "'large', which is not loaded" in refused.json()["error"]["message"]
    models.loading = True
    assert "still loading" in client.post("/v1/completions", json={"prompt": DIFFICULT, "model": "auto"}).text
    assert client.post("/v1/completions", json={**GREEDY, "prompt": EASY, "model": "auto"}).status_code == 200
    assert client.post("/v1/completions", json={**GREEDY, "prompt": "x", "model": "large"}).status_code == 404


def test_a_request_that_is_refused_is_refused_behind_the_router_too(models):
    client = TestClient(create_app(models), raise_server_exceptions=False)
    for body in ({"prompt": 5}, {"prompt": None}, {"prompt": [[]]}, {"prompt": {"text": "x"}}):
        assert client.post("/v1/completions", json={**body, "model": "auto"}).status_code == 400
    assert client.post("/v1/chat/completions", json={"messages": [[]], "model": "auto"}).status_code == 400


def test_without_a_router_auto_is_the_first_model(models):
    models.router = None
    client = TestClient(create_app(models))
    made = client.post("/v1/completions", json={**GREEDY, "prompt": "x", "model": "auto"}).json()
    assert made["model"] == "small"
    assert "router_tokens" not in made["usage"]


def test_a_router_of_other_models_is_refused_before_anything_is_loaded(router_file, tmp_path):
    with pytest.raises(InputError, match="'large'"):
        read_router(router_file, ["small"])
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(InputError, match=r"other\.json"):
        read_router(tmp_path / "other.json", ["small"])
