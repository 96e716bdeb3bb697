"""model="auto": a trained router behind the server, by its own clients; what routing takes is in usage, metrics and log."""

from __future__ import annotations

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
