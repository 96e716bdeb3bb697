"""Several models behind one server: names, adapters, loading and unloading while it runs, and who chooses."""

from __future__ import annotations

import json
import shutil

import openai
import pytest
import torch
from clients import answer, eventually
from fastapi.testclient import TestClient

from assay.errors import InputError
from assay.methods.core import kernels
from assay.server.app import create_app
from assay.server.errors import ApiError
from assay.server.models import Models
from tiny import write_tiny_llama

GREEDY = {"prompt": "Hello", "max_tokens": 12, "ignore_eos": True}


@pytest.fixture
def models():
    held = Models()
    yield held
    held.close()


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("several")
    return [write_tiny_llama(root / name, seed=seed, tied=False) for name, seed in (("a", 1), ("b", 2))]


@pytest.fixture(scope="module")
def lora(tmp_path_factory, folders):
    return write_lora(tmp_path_factory.mktemp("lora") / "l", folders[0])


def write_lora(folder, base, *, seed=0, **changes):
    """A LoRA adapter as PEFT itself saves one, with weights that matter."""
    import peft
    from transformers import AutoModelForCausalLM

    config = peft.LoraConfig(
        **{"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM", **changes}
    )
    wrapped = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in wrapped.named_parameters():
            if "lora_" in name:
                weight.copy_(torch.randn(weight.shape, generator=generator) * 0.3)
    wrapped.save_pretrained(folder)
    return folder


def by_peft(base, folder, ids):
    """The logits of the model with its adapter, as PEFT computes them."""
    import peft
    from transformers import AutoModelForCausalLM

    wrapped = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder).eval()
    with torch.inference_mode():
        return wrapped(input_ids=torch.tensor([ids])).logits


def said(client, name):
    response = client.post("/v1/completions", json=GREEDY | {"model": name})
    assert response.status_code == 200, response.text
    assert response.json()["model"] == name
    return response.json()["choices"][0]["text"]


# ---- several


def test_two_models_in_one_process(models, folders):
    for folder in folders:
        models.load(folder.name, str(folder))
    client = TestClient(create_app(models))
    assert [card["id"] for card in client.get("/v1/models").json()["data"]] == ["a", "b"]
    assert said(client, "a") != said(client, "b")
    for unnamed in ({}, {"model": ""}, {"model": None}, {"model": "auto"}):
        made = client.post("/v1/completions", json=GREEDY | unnamed).json()
        assert (made["model"], made["choices"][0]["text"]) == ("a", said(client, "a"))
    prints = {client.get(f"/v1/models/{name}").json()["system_fingerprint"] for name in "ab"}
    assert len(prints) == 2


def test_a_router_chooses(models, folders):
    for folder in folders:
        models.load(folder.name, str(folder))
    seen = []
    models.router = lambda document: (seen.append(document), "b" if "long" in document["prompt"] else "a")[1]
    client = TestClient(create_app(models), raise_server_exceptions=False)
    for prompt, name in (("a long one", "b"), ("short", "a")):
        assert client.post("/v1/completions", json=GREEDY | {"model": "auto", "prompt": prompt}).json()["model"] == name
    assert seen[0]["prompt"] == "a long one"
    assert client.post("/v1/completions", json=GREEDY | {"model": "b"}).json()["model"] == "b"  # asked for by its name
    assert len(seen) == 2
    models.router = lambda document: "nobody"
    assert client.post("/v1/completions", json=GREEDY | {"model": "auto"}).status_code == 503


def test_a_model_that_is_not_here(client):
    response = client.post("/v1/completions", json={"prompt": "x", "model": "gpt-5" * 1000})
    error = response.json()["error"]
    assert (response.status_code, error["param"], error["code"]) == (404, "model", "model_not_found")
    assert len(error["message"]) < 300
    assert "'tiny'" in error["message"]
    for bad in (5, [], "\ud800"):
        data = json.dumps({"prompt": "x", "model": bad})
        response = client.post("/v1/completions", content=data, headers={"content-type": "application/json"})
        assert (response.status_code, response.json()["error"]["param"]) == (400, "model")


def test_names(models, folders):
    models.load("a", str(folders[0]))
    for name in ("a", "auto", "", " ", "\n"):
        with pytest.raises(InputError, match="name"):
            models.load(name, str(folders[1]))
    assert models.names() == ["a"]


def test_without_models_nothing_is_ready(models, folders):
    client = TestClient(create_app(models), raise_server_exceptions=False)
    models.loading = True
    assert client.get("/ready").json() == {"status": "loading"}
    response = client.post("/v1/completions", json=GREEDY)
    assert (response.status_code, response.json()["error"]["code"]) == (503, "loading")
    models.load("a", str(folders[0]))
    models.loading = False
    assert client.get("/ready").status_code == 200
    models.unload("a").close()
    assert client.get("/ready").status_code == 503
    assert client.post("/v1/completions", json=GREEDY).json()["error"]["code"] == "no_model"


# ---- adapters


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"use_rslora": True},
        {"alpha_pattern": {"q_proj": 32}, "rank_pattern": {"down_proj": 2}},
        {"target_modules": "all-linear"},
    ],
)
def test_an_adapter_is_what_peft_makes_of_it(tmp_path, models, folders, changes):
    base = folders[0]
    folder = write_lora(tmp_path / "l", base, **changes)
    models.load("a", str(base))
    plain = {name: tensor.clone() for name, tensor in models.engines()[0].model.state_dict().items()}
    engine = models.load_adapter("l", str(folder))
    ids = [5, 6, 7, 8, 9]
    with torch.inference_mode():
        found = engine.model(torch.tensor([ids])).logits
        bare = models.engines()[0].model(torch.tensor([ids])).logits
    assert torch.allclose(found, by_peft(base, folder, ids), atol=1e-4)
    assert not torch.allclose(found, bare, atol=1e-2)
    for name, tensor in models.engines()[0].model.state_dict().items():
        assert torch.equal(tensor, plain[name]), name


def test_an_adapter_of_conv1d(tmp_path, models):
    """GPT-2's weights lie the other way round."""
    from transformers import GPT2Config, GPT2LMHeadModel

    from tiny import tiny_tokenizer

    tokenizer = tiny_tokenizer()
    base = tmp_path / "gpt2"
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=len(tokenizer), n_embd=32, n_layer=1, n_head=2, n_positions=64, bos_token_id=1, eos_token_id=2
    )
    GPT2LMHeadModel(config).save_pretrained(base)
    tokenizer.save_pretrained(base)
    folder = write_lora(tmp_path / "l", base, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True)
    models.load("a", str(base))
    with torch.inference_mode():
        found = models.load_adapter("l", str(folder)).model(torch.tensor([[5, 6, 7]])).logits
    assert torch.allclose(found, by_peft(base, folder, [5, 6, 7]), atol=1e-4)


def test_an_adapter_costs_no_more_than_what_it_changes(models, folders, lora):
    base = models.load("a", str(folders[0]))
    adapted = models.load_adapter("l", str(lora))
    own = {id(weight) for weight in base.model.parameters()}
    new = [name for name, weight in adapted.model.named_parameters() if id(weight) not in own]
    assert sorted(new) == sorted(
        f"model.layers.{i}.{part}.weight" for i in range(2) for part in ("self_attn.q_proj", "mlp.down_proj")
    )


def test_an_adapter_is_served_beside_its_base(models, folders, lora):
    models.load("a", str(folders[0]))
    models.load_adapter("l", str(lora), "a")
    client = TestClient(create_app(models))
    assert said(client, "l") != said(client, "a")
    card = client.get("/v1/models/l").json()
    assert card["parent"] == "a"
    assert card["system_fingerprint"] != client.get("/v1/models/a").json()["system_fingerprint"]


def test_an_adapter_of_a_model_with_a_recipe(tmp_path, models, folders, lora):
    """The recipe is applied to the changed weights."""
    base = tmp_path / "tuned"
    shutil.copytree(folders[0], base)
    (base / "recipe.toml").write_text(RECIPE)
    models.load("t", str(base))
    models.load("a", str(folders[0]))
    tuned = models.load_adapter("tl", str(lora), "t")
    plain = models.load_adapter("l", str(lora), "a")
    assert tuned.model.lm_head.weight.dtype == torch.bfloat16
    with torch.inference_mode():
        ids = torch.tensor([[5, 6, 7]])
        assert torch.allclose(tuned.model(ids).logits.float(), plain.model(ids).logits, atol=0.1)
    assert tuned.fingerprint != models.engines()[0].fingerprint


def damaged(folder, lora, change):
    """A copy of the adapter with something changed: its settings, or its tensors."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(lora, folder)
    settings, tensors = (
        json.loads((folder / "adapter_config.json").read_text()),
        load_file(folder / "adapter_model.safetensors"),
    )
    change(settings, tensors)
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "adapter_model.safetensors")
    return folder


FIRST = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s, t: s.update(peft_type="IA3"), "peft_type"),
        (lambda s, t: s.update(use_dora=True), "use_dora"),
        (lambda s, t: s.update(bias="all"), "bias"),
        (lambda s, t: s.update(lora_bias=True), "lora_bias"),
        (lambda s, t: s.update(modules_to_save=["lm_head"]), "modules_to_save"),
        (lambda s, t: s.update(layer_replication=[[0, 2]]), "layer_replication"),
        (lambda s, t: s.update(init_lora_weights="pissa"), "pissa"),
        (lambda s, t: s.update(lora_alpha="8"), "lora_alpha"),
        (lambda s, t: s.update(lora_alpha=1e9), "lora_alpha"),
        (lambda s, t: s.pop("lora_alpha"), "lora_alpha"),
        (lambda s, t: s.update(alpha_pattern={"q_proj": "x"}), "alpha_pattern"),
        (lambda s, t: s.update(alpha_pattern={"(a+)+$": 1}), "alpha_pattern"),
        (lambda s, t: s.update(alpha_pattern=[1]), "alpha_pattern"),
        (lambda s, t: s.update(something_new=True), "something_new"),
        (lambda s, t: t.pop(f"{FIRST}.lora_A.weight"), "lora_B"),
        (lambda s, t: t.update({f"{FIRST}.lora_A.weight": torch.zeros(4, 63)}), "q_proj"),
        (lambda s, t: t.update({f"{FIRST}.lora_A.weight": torch.zeros(0, 64)}), "q_proj"),
        (lambda s, t: t.update({f"{FIRST}.lora_A.weight": torch.full((4, 64), torch.nan)}), "NaN"),
        (lambda s, t: t.update({"base_model.model.nowhere.lora_A.weight": torch.zeros(4, 64)}), "nowhere"),
        (
            lambda s, t: t.update(
                {f"base_model.model.model.embed_tokens.lora_{x}.weight": torch.zeros(4, 4) for x in "AB"}
            ),
            "Embedding",
        ),
        (
            lambda s, t: t.update({f"base_model.model.nowhere.lora_{x}.weight": torch.zeros(4, 4) for x in "AB"}),
            "no such layer",
        ),
        (lambda s, t: s.update(arrow_config={"top_k": 3}), "arrow_config"),
        (lambda s, t: s.update(init_lora_weights="something_new"), "something_new"),
        (
            lambda s, t: t.update({"base_model.model.model.embed_tokens.lora_embedding_A": torch.zeros(4, 64)}),
            "embedding_A",
        ),
    ],
    ids=range(24),
)
def test_a_bad_adapter_is_refused_and_changes_nothing(tmp_path, models, folders, lora, change, message):
    folder = damaged(tmp_path / "bad", lora, change)
    engine = models.load("a", str(folders[0]))
    before = engine.fingerprint
    with pytest.raises(InputError, match=message) as caught:
        models.load_adapter("l", str(folder))
    assert len(str(caught.value)) < 500
    assert models.names() == ["a"]
    from assay.server.engine import fingerprint

    assert fingerprint(engine.model) == before


def test_what_is_no_adapter_is_refused(tmp_path, models, folders, lora):
    models.load("a", str(folders[0]))
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    shutil.copy(lora / "adapter_config.json", pickled)
    (pickled / "adapter_model.bin").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    cut = tmp_path / "cut"
    shutil.copytree(lora, cut)
    data = (cut / "adapter_model.safetensors").read_bytes()
    (cut / "adapter_model.safetensors").write_bytes(data[: len(data) // 2])
    for folder, message in (
        (tmp_path, "adapter_config.json"),
        (pickled, "pickled"),
        (cut, "truncated"),
        (tmp_path / "no", "no such"),
    ):
        with pytest.raises(InputError, match=message):
            models.load_adapter("l", str(folder))
    with pytest.raises(InputError, match="'b'"):
        models.load_adapter("l", str(lora), "b")
    with pytest.raises(InputError, match="already"):
        models.load_adapter("a", str(lora))


# ---- while it runs


def test_loading_needs_a_key_and_leave(models, folders):
    with pytest.raises(ValueError, match="api_keys"):
        create_app(models, allow_load=True)
    models.load("a", str(folders[0]))
    closed = TestClient(create_app(models, api_keys=["k"]))
    assert closed.post("/v1/models/load", json={}, headers={"Authorization": "Bearer k"}).status_code == 405
    opened = TestClient(create_app(models, api_keys=["k"], allow_load=True))
    assert opened.post("/v1/models/load", json={"source": str(folders[1])}).status_code == 401


def test_loading_and_unloading_while_it_runs(models, folders, lora):
    models.load("a", str(folders[0]))
    client = TestClient(create_app(models, api_keys=["k"], allow_load=True), headers={"Authorization": "Bearer k"})
    made = client.post("/v1/models/load", json={"source": str(folders[1])})
    assert (made.status_code, made.json()["id"]) == (200, "b")
    assert (
        client.post("/v1/models/load", json={"adapter": str(lora), "base": "a", "model": "l"}).json()["parent"] == "a"
    )
    assert said(client, "b")
    assert said(client, "l") != said(client, "a")
    gone = client.post("/v1/models/unload", json={"model": "a"})
    assert (gone.status_code, "l" in gone.json()["error"]["message"]) == (409, True)
    for name in ("l", "a"):
        assert client.post("/v1/models/unload", json={"model": name}).json() == {
            "id": name,
            "object": "model",
            "deleted": True,
        }
    assert client.post("/v1/completions", json=GREEDY | {"model": "a"}).status_code == 404
    assert said(client, "b")
    for body, param in (
        ({}, "source"),
        ({"source": "x", "adapter": "y"}, "source"),
        ({"source": "x", "base": "b"}, "base"),
        ({"source": 5}, "source"),
        ({"path": "x"}, "path"),
    ):
        response = client.post("/v1/models/load", json=body)
        assert (response.status_code, response.json()["error"]["param"]) == (400, param)
    assert client.post("/v1/models/load", json={"source": "/no/such"}).status_code == 400
    assert client.post("/v1/models/load", json={"source": str(folders[1])}).status_code == 400  # the name is taken
    assert client.post("/v1/models/unload", json={"model": "nobody"}).status_code == 404
    assert [card["id"] for card in client.get("/v1/models").json()["data"]] == ["b"]


def test_what_runs_on_a_model_that_is_unloaded_ends_in_its_own_time(serving, app_of, model):
    model.delay = 0.01
    server = serving(app=app_of(api_keys=["k"], allow_load=True))
    key = ["Authorization: Bearer k"]
    running = server.send({"prompt": "x", "max_tokens": 60, "ignore_eos": True}, headers=key)
    assert eventually(lambda: model.forwards > 2)
    assert server.ask({"model": "tiny"}, path="/v1/models/unload", headers=key)[0] == 200
    assert server.ask({"prompt": "x"}, headers=key)[0] == 503
    status, made = answer(running)
    assert (status, made["usage"]["completion_tokens"]) == (200, 60)


def test_who_waits_for_a_model_that_was_unloaded_is_told_when_the_server_stops(serving, app_of, model):
    model.delay = 0.02
    server = serving(app=app_of(api_keys=["k"], allow_load=True))
    key = ["Authorization: Bearer k"]
    running = server.send({"prompt": "x", "max_tokens": 1500, "ignore_eos": True}, headers=key)
    assert eventually(lambda: model.forwards > 2)
    assert server.ask({"model": "tiny"}, path="/v1/models/unload", headers=key)[0] == 200
    server.app.state.server.stop()
    status, body = answer(running)
    assert (status, body["error"]["code"]) == (503, "stopping")


def test_a_model_may_be_unloaded_while_one_is_looked_for(models, folders):
    models.load("a", str(folders[0]))
    engine = models.engines()[0]
    models.router = lambda document: "" if models.unload("a") else ""
    assert models.routed({"model": "auto"})[0] is engine  # it was there when the request came
    engine.close()
    with pytest.raises(ApiError) as caught:
        models.routed({"model": "auto"})
    assert caught.value.status == 503


def test_the_client_sees_it_too(serving, app_of):
    server = serving(app=app_of(api_keys=["k"], allow_load=True))
    with openai.OpenAI(base_url=f"http://127.0.0.1:{server.port}/v1", api_key="k", max_retries=0) as client:
        assert client.models.retrieve("tiny").context_length == 2048
        with pytest.raises(openai.NotFoundError):
            client.models.retrieve("other")


def test_an_unknown_model_is_not_unloaded(models):
    with pytest.raises(ApiError):
        models.unload("x")


RECIPE = """
format = 1
goal = "decode"

[[steps]]
transform = "dtype"

[steps.config]
dtype = "bfloat16"
"""

LOOP = """
format = 1
goal = "decode"

[[steps]]
transform = "decode_loop"

[steps.config]
weights = "int8"

[[steps]]
transform = "speculation"

[steps.config]
ngram = 2
draft = 4
"""


@pytest.mark.skipif(not kernels.compiler(), reason="needs a C++ compiler")
def test_a_recipe_that_speculates_does_so_when_it_is_served(tmp_path, models, folders):
    for name, recipe in (("plain", LOOP[: LOOP.rindex("[[steps]]")]), ("guessing", LOOP)):
        shutil.copytree(folders[0], tmp_path / name)
        (tmp_path / name / "recipe.toml").write_text(recipe)
        models.load(name, str(tmp_path / name))
    client = TestClient(create_app(models))
    body = {"prompt": "one two three " * 8, "max_tokens": 60, "ignore_eos": True}
    made = [client.post("/v1/completions", json=body | {"model": name}).json() for name in ("plain", "guessing")]
    assert made[0]["choices"][0]["text"] == made[1]["choices"][0]["text"]
    plain, guessing = (engine.scheduler.stats() for engine in models.engines())
    assert plain.drafted_tokens == 0 < guessing.accepted_tokens
    assert guessing.steps < plain.steps == 59
    assert "a row alone is guessed for" in models.card("guessing")["backend_reason"]
