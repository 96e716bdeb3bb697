"""`assay serve --share-blocks`: several fine-tuned variants of one model behind one scheduler, each under its name."""

from __future__ import annotations

import copy
import gc
import shutil
import threading
import weakref

import pytest
import torch
from fastapi.testclient import TestClient
from transformers import AutoTokenizer, LlamaForCausalLM

from assay.cli.serve import _load
from assay.errors import InputError
from assay.methods.serving.blockllm import Engine as Together
from assay.methods.serving.blockllm import Factors, Zoo, read_adapter, write_adapter
from assay.server.app import create_app
from assay.server.models import Models
from assay.server.rows import Settings
from assay.server.scheduler import Stopped
from assay.server.zoo import Variants
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


def zoo_of(folders):
    zoo = Zoo()
    for name in ("base", "other"):
        zoo.add(name, LlamaForCausalLM.from_pretrained(folders / name).eval())
    zoo.add_adapter("lora", "base", read_adapter(folders / "lora"))
    return zoo


def variants_of(folders, **options):
    return Variants(zoo_of(folders), kv_gib=0.05, positions=512, max_running=8, **options)


class Told:
    """What a row was told, and when it began and ended."""

    def __init__(self):
        self.tokens, self.error, self.begun, self.ended = [], None, threading.Event(), threading.Event()

    def __call__(self, event):
        assert not self.ended.is_set(), "told after its end"
        self.tokens.extend(event.tokens)
        self.error = event.error
        self.begun.set()
        if event.finish or event.error:
            self.ended.set()


def test_all_there_is_in_memory_is_the_zoo(folders):
    """By the addresses of all tensors of all models, and of the one that runs."""
    found = Models(kv_gib=0.05)
    try:
        _load(
            found,
            [("base", str(folders / "base")), ("other", str(folders / "other"))],
            [("lora", str(folders / "lora"), "base")],
            share_blocks=True,
        )
        variants = found.engines()[0].scheduler.variants
        zoo, shared = variants.zoo, variants.backend.shared
        tensors = [t for e in found.engines() for t in (*e.model.parameters(), *e.model.buffers())]
        tensors += shared.tensors()
        held = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
        blocks = {t.untyped_storage().data_ptr() for block in zoo.blocks.values() for t in block.tensors.values()}
        others = {
            t.untyped_storage().data_ptr() for t in tensors if t.ndim == 1 and t.numel() <= 16
        }  # rotary frequencies
        assert sum(size for at, size in held.items() if at not in others) <= zoo.bytes
        assert held.keys() - others <= blocks
    finally:
        found.close()


def test_rows_of_all_models_share_steps(folders, expected):
    variants = variants_of(folders, start=False)
    told = {name: Told() for name in expected}
    for name, door in variants.doors().items():
        door.submit(PROMPT, Settings(max_tokens=6), told[name])
    while variants.scheduler.turn():
        pass
    assert variants.scheduler.stats().batch_sizes[3] >= 3
    for name, tokens in expected.items():
        assert told[name].tokens == tokens, name


def test_each_model_counts_its_own(folders):
    variants = variants_of(folders, start=False)
    doors = variants.doors()
    doors["base"].submit(PROMPT, Settings(max_tokens=3), Told())
    gone = doors["lora"].submit(PROMPT, Settings(max_tokens=400), Told())
    doors["lora"].submit(PROMPT[:2], Settings(max_tokens=400), Told())
    waiting = {name: door.stats().waiting for name, door in doors.items()}
    assert waiting == {"base": 1, "other": 0, "lora": 2}
    for _ in range(6):
        variants.scheduler.turn()
    gone.cancel()
    variants.scheduler.turn()
    told = {name: door.stats() for name, door in doors.items()}
    assert {n: (s.submitted, s.running, s.finished, s.cancelled) for n, s in told.items()} == {
        "base": (1, 0, 1, 0),
        "other": (0, 0, 0, 0),
        "lora": (2, 1, 0, 1),
    }
    whole = variants.scheduler.stats()
    for counted in ("submitted", "prompt_tokens", "generated_tokens", "finished", "cancelled", "running"):
        assert sum(getattr(one, counted) for one in told.values()) == getattr(whole, counted), counted
    assert told["base"].generated_tokens == 3
    assert told["base"].prompt_tokens == len(PROMPT)


def test_a_closed_door_ends_its_own_rows_and_the_last_one_the_scheduler(folders):
    variants = variants_of(folders)
    doors = variants.doors()
    one, other = Told(), Told()
    doors["base"].submit(PROMPT, Settings(max_tokens=400), one)
    doors["lora"].submit(PROMPT, Settings(max_tokens=60), other)
    assert one.begun.wait(20)
    assert other.begun.wait(20)
    doors["base"].stop()
    assert one.ended.is_set()  # its client is told, and does not wait for what never comes
    assert isinstance(one.error, Stopped)
    assert len(one.tokens) < 400
    with pytest.raises(Stopped):
        doors["base"].submit(PROMPT, Settings(max_tokens=4), Told())
    assert other.ended.wait(20)
    assert (len(other.tokens), other.error) == (60, None)
    assert set(variants.doors()) == {"other", "lora"}
    doors["other"].stop()
    doors["lora"].stop()
    assert variants.closed
    with pytest.raises(Stopped):
        variants.scheduler.submit(PROMPT, Settings(max_tokens=4), Told())
    with pytest.raises(Stopped):
        variants.join("late", lambda zoo: None)


def test_a_row_that_comes_while_its_door_is_closed_is_ended_too(folders, monkeypatch):
    variants = variants_of(folders)
    door, told, honest = variants.doors()["base"], Told(), variants.scheduler.submit
    closing = threading.Thread(target=door.stop)

    def late(*given):
        closing.start()
        closing.join(0.2)  # the door is closed here, or waits until the row is there
        return honest(*given)

    monkeypatch.setattr(variants.scheduler, "submit", late)
    door.submit(PROMPT, Settings(max_tokens=400), told)
    closing.join(20)
    assert told.ended.wait(5)
    assert isinstance(told.error, Stopped)
    for one in variants.doors().values():
        one.stop()


def test_models_come_and_go_between_the_passes_of_others(folders, expected):
    variants = variants_of(folders)
    zoo, doors = variants.zoo, variants.doors()
    long = Told()
    alone = Told()
    doors["base"].submit(PROMPT, Settings(max_tokens=120), alone)
    assert alone.ended.wait(30)
    doors["base"].submit(PROMPT, Settings(max_tokens=120), long)
    assert long.begun.wait(20)
    for name in ("one", "two", "three"):
        before, told = zoo.bytes, Told()
        door = variants.join(name, lambda zoo, name=name: zoo.add_adapter(name, "base", read_adapter(folders / "lora")))
        assert zoo.bytes == before  # the same factors
        door.submit(PROMPT, Settings(max_tokens=6), told)
        assert told.ended.wait(20)
        assert told.tokens == expected["lora"]
        door.stop()
        assert name not in zoo.chains
    doors["other"].submit(PROMPT, Settings(max_tokens=400), dropped := Told())
    assert dropped.begun.wait(20)
    doors["other"].stop()  # with a row under way
    assert isinstance(dropped.error, Stopped)
    assert long.ended.wait(30)
    assert (long.error, long.tokens) == (None, alone.tokens)
    with pytest.raises(ValueError, match="linear layers"):
        variants.join(
            "bad",
            lambda zoo: zoo.add_adapter(
                "bad", "base", {"model.norm": Factors(torch.zeros(1, 64), torch.zeros(64, 1), 1.0)}
            ),
        )
    assert set(zoo.chains) == {"base", "lora"} == set(variants.doors())
    for door in variants.doors().values():
        door.stop()


def test_variants_are_loaded_and_unloaded_while_it_runs(folders, expected, tmp_path):
    """Through the API: who comes joins the zoo, and the memory of who leaves is free."""
    found = Models(kv_gib=0.05, max_running=8)
    try:
        _load(found, [("base", str(folders / "base"))], [], share_blocks=True)
        variants = found.engines()[0].scheduler.variants
        client = TestClient(create_app(found, api_keys=["k"], allow_load=True), headers={"Authorization": "Bearer k"})
        small = variants.zoo.bytes
        for body in (
            {"model": "other", "source": str(folders / "other")},
            {"model": "lora", "adapter": str(folders / "lora"), "base": "base"},
        ):
            made = client.post("/v1/models/load", json=body)
            assert (made.status_code, made.json()["backend"]) == (200, "zoo"), made.text
        assert "3 models share their blocks" in client.get("/v1/models/base").json()["backend_reason"]
        assert variants.zoo.bytes < 1.7 * small
        tokenizer = found.engines()[0].tokenizer
        for name, tokens in expected.items():
            said, whole = asked(client, name), tokenizer.decode(tokens)
            assert whole.startswith(said) or said.startswith(whole), name
        write_tiny_llama(tmp_path / "wide", hidden=32)
        refused = client.post("/v1/models/load", json={"source": str(tmp_path / "wide")})
        assert (refused.status_code, "configuration" in refused.text) == (400, True), refused.text
        assert set(variants.zoo.chains) == {"base", "other", "lora"}
        block = variants.zoo.blocks[variants.zoo.chains["other"].blocks["layer 1"]]
        memory = weakref.ref(block.tensors["mlp.up_proj.weight"])
        engine = found.unload("other")
        engine.close()
        del engine, block
        gc.collect()
        assert memory() is None
        assert "2 models share their blocks" in client.get("/v1/models/base").json()["backend_reason"]
        assert client.post("/v1/completions", json={"model": "other", "prompt": PROMPT}).status_code == 404
        assert (
            client.post("/v1/models/load", json={"model": "other", "source": str(folders / "other")}).status_code == 200
        )
        said, whole = asked(client, "other"), tokenizer.decode(expected["other"])
        assert whole.startswith(said) or said.startswith(whole)
    finally:
        found.close()


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
        ([base, base], [], "name must be new"),
        ([], [], "at least one model"),
    ):
        with pytest.raises(InputError, match=match):
            found.load_shared(wanted, adapted)
        assert not len(found)
