"""`assay serve --share-blocks`: several fine-tuned variants of one model behind one scheduler, each under its name."""

from __future__ import annotations

import copy
import shutil
import threading

import pytest
import torch
from fastapi.testclient import TestClient
from transformers import AutoTokenizer, LlamaForCausalLM

from assay.cli.serve import _load
from assay.errors import InputError
from assay.methods.serving.blockllm import Engine as Together
from assay.methods.serving.blockllm import Factors, SharedModel, Zoo, read_adapter, write_adapter
from assay.server.app import create_app
from assay.server.models import Models
from assay.server.rows import Settings
from assay.server.scheduler import Scheduler, Stopped
from assay.server.zoo import Door, ZooBackend
from tiny import write_tiny_llama

PROMPT = [5, 6, 7, 8, 9]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A base, one with an upper layer of its own, and an adapter."""
    root = tmp_path_factory.mktemp("variants")
    base = write_tiny_llama(root / "base")
    model = LlamaForCausalLM.from_pretrained(base)
    other = copy.deepcopy(model)
    chance = torch.Generator().manual_seed(1)
    for weight in other.model.layers[1].parameters():
        weight.data += 0.2 * torch.randn(weight.shape, generator=chance)
    other.save_pretrained(root / "other")
    AutoTokenizer.from_pretrained(base).save_pretrained(root / "other")
    factors = {
        name: Factors(
            torch.randn(2, m.in_features, generator=chance), torch.randn(m.out_features, 2, generator=chance), 0.3
        )
        for name, m in model.named_modules()
        if name.endswith("up_proj")
    }
    write_adapter(root / "lora", factors)
    return root


@pytest.fixture(scope="module")
def models(folders):
    found = Models(kv_gib=0.05, max_running=8)
    _load(
        found,
        [("base", str(folders / "base")), ("other", str(folders / "other"))],
        [("lora", str(folders / "lora"), "base")],
        share_blocks=True,
    )
    yield found
    found.close()


@pytest.fixture(scope="module")
def expected(folders):
    """Greedy answers of each model alone, by transformers' own model."""
    zoo = Zoo()
    for name in ("base", "other"):
        zoo.add(name, LlamaForCausalLM.from_pretrained(folders / name).eval())
    zoo.add_adapter("lora", "base", read_adapter(folders / "lora"))
    return {name: Together(zoo.monolith(name)).generate([(name, PROMPT)], 6)[0] for name in zoo.chains}


def asked(client, name):
    request = {"model": name, "prompt": PROMPT, "max_tokens": 6, "temperature": 0}
    response = client.post("/v1/completions", json=request)
    assert response.status_code == 200, response.text
    return response.json()["choices"][0]["text"]


def test_the_field_model_picks_the_chain(models, expected):
    client = TestClient(create_app(models))
    tokenizer = models.engines()[0].tokenizer
    said = {name: asked(client, name) for name in ("base", "other", "lora")}
    assert len(set(said.values())) == 3
    for name, tokens in expected.items():
        whole = tokenizer.decode(tokens)
        assert whole.startswith(said[name]) or said[name].startswith(whole), name
    card = client.get("/v1/models/lora").json()
    assert (card["backend"], card["parent"]) == ("zoo", "base")
    assert "3 models share their blocks" in card["backend_reason"]
    prints = {client.get(f"/v1/models/{name}").json()["system_fingerprint"] for name in said}
    assert len(prints) == 3


def test_what_models_have_in_common_is_in_memory_once(models):
    one, other = (engine.model for engine in models.engines()[:2])
    assert one.model.layers[0].mlp.up_proj.weight.data_ptr() == other.model.layers[0].mlp.up_proj.weight.data_ptr()
    assert one.model.layers[1].mlp.up_proj.weight.data_ptr() != other.model.layers[1].mlp.up_proj.weight.data_ptr()
    shared = models.engines()[0].scheduler.backend.shared
    used = shared.model.model.layers[0].mlp.up_proj.variants[0].weight
    assert used.data_ptr() == one.model.layers[0].mlp.up_proj.weight.data_ptr()


def backend_of(folders):
    zoo = Zoo()
    for name in ("base", "other"):
        zoo.add(name, LlamaForCausalLM.from_pretrained(folders / name).eval())
    zoo.add_adapter("lora", "base", read_adapter(folders / "lora"))
    return ZooBackend(SharedModel(zoo), kv_gib=0.05, positions=512)


def test_rows_of_all_models_share_steps(folders, expected):
    scheduler = Scheduler(backend_of(folders), start=False, max_running=8)
    doors: set = set()
    told: dict = {name: [] for name in expected}
    for name, events in told.items():
        Door(scheduler, name, doors).submit(PROMPT, Settings(max_tokens=6), events.append)
    while scheduler.turn():
        pass
    assert scheduler.stats().batch_sizes[3] >= 3
    for name, tokens in expected.items():
        assert [token for event in told[name] for token in event.tokens] == tokens, name


def test_a_closed_door_ends_its_own_rows_and_the_last_one_the_scheduler(folders):
    scheduler = Scheduler(backend_of(folders), max_running=8)
    doors: set = set()
    one, other = (Door(scheduler, name, doors) for name in ("base", "lora"))
    ended = threading.Event()
    begun = threading.Event()
    tokens = []

    def tell(event):
        begun.set()
        tokens.extend(event.tokens)
        if event.finish:
            ended.set()

    one.submit(PROMPT, Settings(max_tokens=400), lambda event: None)
    other.submit(PROMPT, Settings(max_tokens=12), tell)
    assert begun.wait(20)
    one.stop()
    with pytest.raises(Stopped):
        one.submit(PROMPT, Settings(max_tokens=4), tell)
    assert ended.wait(20)
    assert len(tokens) == 12
    other.stop()
    with pytest.raises(Stopped):
        scheduler.submit(PROMPT, Settings(max_tokens=4), tell)
    assert not doors


def test_what_cannot_be_shared_is_refused_and_nothing_is_served(folders, tmp_path):
    write_tiny_llama(tmp_path / "wide", hidden=32)
    shutil.copytree(folders / "base", tmp_path / "tuned")
    (tmp_path / "tuned" / "recipe.toml").write_text("")
    base = ("base", str(folders / "base"))
    found = Models(kv_gib=0.05)
    for wanted, adapted, match in (
        ([base, ("wide", str(tmp_path / "wide"))], [], "configuration"),
        ([("tuned", str(tmp_path / "tuned"))], [], "recipe"),
        ([base], [("x", str(folders / "other"), "base")], "adapter_config"),
        ([base], [("x", str(folders / "lora"), "nobody")], "name must be one of base"),
    ):
        with pytest.raises(InputError, match=match):
            found.load_shared(wanted, adapted)
        assert not len(found)
