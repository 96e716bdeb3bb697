"""`assay profile`: one run end to end on a tiny model, its outputs, and its errors."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace

import pytest
from tests.tiny import calibration, tiny_model

from assay.cli import profile as command
from assay.cli.main import main

CALIBRATION = calibration(noisy=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A llama of two layers with a tokenizer of bytes, as transformers saves it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    path = tmp_path_factory.mktemp("models") / "tiny <b>model"
    vocabulary = {token: i for i, token in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="a").save_pretrained(path)
    shape = {"vocab_size": len(vocabulary), "hidden_size": 32, "intermediate_size": 48, "max_position_embeddings": 64}
    tiny_model(**shape).save_pretrained(path)
    return path


@pytest.fixture(autouse=True)
def calibrated(monkeypatch):
    monkeypatch.setattr("assay.measure.machine.calibrate", lambda *a, **k: CALIBRATION)


def run(capsys, *arguments):
    code = main(["profile", *map(str, arguments)])
    out, err = capsys.readouterr()
    return code, out, err


def test_json_is_one_document_with_the_promised_parts(capsys, folder):
    code, out, _ = run(capsys, folder, "--prompt-tokens", 32, "--new-tokens", 4, "--json")
    assert code == 0
    document = json.loads(out)
    assert {"model", "machine", "calibration", "modules", "kinds", "phases", "runtime_model"} <= set(document)
    assert set(document["kinds"]) == {"linear", "attention", "other"}
    assert set(document["phases"]) == {"prefill", "decode"}
    up = next(row for row in document["modules"] if row["name"] == "model.layers.1.mlp.up_proj")
    assert up["macs"] == 32 * 32 * 48
    runtime = document["runtime_model"]
    assert runtime["prompt_tokens"] == [8, 32]
    assert math.isfinite(runtime["seconds_per_token"])
    assert {(c["prompt_tokens"], c["output_tokens"]) for c in runtime["predicted"]} == {
        (p, o) for p in (8, 32) for o in (1, 2, 4)
    }


@pytest.fixture
def cache(monkeypatch):
    """A cache that holds all of a tiny model's queries, keys and values: each is moved once."""
    from assay.methods.attention import attention_io

    device = attention_io.DeviceSheet("tiny core", 1 << 20, 1e9, 1e12, 1, 4)
    monkeypatch.setattr(attention_io, "this_machine", lambda: device)


def test_words_moved_by_attention(capsys, folder, tmp_path, cache):
    page = tmp_path / "p.html"
    arguments = [folder, "--prompt-tokens", 32, "--new-tokens", 2]
    code, out, _ = run(capsys, *arguments, "--json")
    assert code == 0
    words = 4 * 4 * 32 * 8  # queries, keys, values and output; heads; tokens; dimensions
    layer = {"words": words, "bytes": 4 * words, "regime": "large cache", "limited_by": "memory"}
    expected = {"prompt_tokens": 32, "device": "tiny core", "layers": [layer, layer], "reason": ""}
    assert json.loads(out)["words_moved"] == expected
    code, out, _ = run(capsys, *arguments, "--html", page)
    assert code == 0
    for text in (" ".join(out.split()), page.read_text()):
        assert "Words exact attention moves at 32 prompt tokens, best tiling on tiny core (modelled):" in text
        assert "layers 0 to 1: 4,096 words (0.02 MB) each, large cache, limited by memory" in text


def test_words_moved_where_the_bounds_say_nothing(monkeypatch, cache):
    from transformers import AutoModel, MambaConfig, MistralConfig

    sizes = {"vocab_size": 32, "hidden_size": 32, "num_hidden_layers": 1}
    mamba = AutoModel.from_config(MambaConfig(**sizes, state_size=4))
    moved = command.words_moved(mamba, 32)
    assert moved["layers"] == []
    assert command.words_lines(moved) == [f"no figures: {moved['reason']}"]
    assert "attention" in moved["reason"]
    mistral = AutoModel.from_config(
        MistralConfig(**sizes, intermediate_size=32, num_attention_heads=2, num_key_value_heads=1, sliding_window=8)
    )
    assert command.words_lines(command.words_moved(mistral, 32)) == ["layer 0: sliding window, not covered"]

    def unknown():
        raise OSError("no such cache")

    monkeypatch.setattr("assay.methods.attention.attention_io.this_machine", unknown)
    assert command.words_moved(mistral, 32)["reason"] == "no such cache"


def test_a_limit_known_under_another_name_is_kept(capsys, tmp_path, folder):
    import shutil

    from transformers import MptConfig, MptForCausalLM

    for file in folder.glob("tokenizer*"):
        shutil.copy(file, tmp_path)
    MptForCausalLM(MptConfig(d_model=16, n_heads=2, n_layers=1, vocab_size=256, max_seq_len=24)).save_pretrained(
        tmp_path
    )
    code, _, err = run(capsys, tmp_path, "--prompt-tokens", 30, "--new-tokens", 2)
    assert code == 2
    assert "need 32 positions, the model has 24" in err


def test_tables_page_and_plots(capsys, folder, tmp_path):
    page, picture = tmp_path / "new" / "p.html", tmp_path / "p.png"
    code, out, _ = run(capsys, folder, "--prompt-tokens", 16, "--new-tokens", 2, "--html", page, "--png", picture)
    assert code == 0
    for text in (
        "model.layers.*.mlp.down_proj",
        "all linear",
        "all attention",
        "Runtime model",
        "T_prompt(16)",
        "prefill",
        "decode",
    ):
        assert text in out
    assert "model.layers.0" not in out
    assert "busy when it was calibrated" in out
    html = page.read_text()
    assert html.count("<svg") == 4
    assert "tiny &lt;b&gt;model" in html
    assert "<b>" not in html
    assert "Runtime model" in html
    assert "http://" not in html.replace("http://www.w3.org", "").replace("http://purl.org", "").replace(
        "http://creativecommons.org", ""
    )
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_limits_that_were_beaten_are_said_to_be_void(capsys, folder, tmp_path, monkeypatch):
    low = calibration(read_bandwidth=1e3, copy_bandwidth=1e3, cache_bandwidth={1: 1e3})
    monkeypatch.setattr("assay.measure.machine.calibrate", lambda *a, **k: low)
    page = tmp_path / "p.html"
    code, out, _ = run(capsys, folder, "--prompt-tokens", 16, "--new-tokens", 1, "--html", page)
    assert code == 0
    for text in (out, page.read_text()):
        assert "Void: " in text
        assert "assay doctor --calibrate" in text
        assert "would allow" not in text
    assert " void" in out.split("Void: ")[0]


def test_operators_whose_macs_are_unknown_are_named(monkeypatch):
    measured = SimpleNamespace(noisy=False, calibration=calibration(), uncounted={"aten::_fft_r2c": 3, "my::op": 1})
    (note,) = command.notes(measured)
    assert note.startswith("MACs unknown of: aten::_fft_r2c (3 calls), my::op (1 calls).")
    measured.uncounted = {}
    assert command.notes(measured) == []


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--prompt-tokens", 0], "--prompt-tokens must be at least 1, got 0"),
        (["--new-tokens", -1], "--new-tokens must be at least 1, got -1"),
        (["--prompt-tokens", 63, "--new-tokens", 2], "need 65 positions, the model has 64"),
    ],
)
def test_bad_lengths_are_one_line(capsys, folder, arguments, says):
    code, out, err = run(capsys, folder, *arguments)
    assert code == 2
    *progress, last = err.strip().splitlines()
    assert says in last
    assert progress in ([], ["assay: counting what the model needs"])
    assert not out


def test_output_that_is_a_folder_is_refused_before_any_work(capsys, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(command, "examine", lambda *a: pytest.fail("worked"))
    for option in ("--html", "--png"):
        code, _, err = run(capsys, folder, option, tmp_path)
        assert code == 2
        assert option in err


def test_unknown_model_is_one_line(capsys, tmp_path):
    code, out, err = run(capsys, tmp_path / "nothing", "--json")
    assert code in (2, 3)
    assert json.loads(out)["exit_code"] == code
    assert "Traceback" not in err


def test_one_new_token_still_gives_a_time_per_token():
    assert command.grid(512, 1) == ([128, 512], [1, 2])
    assert command.grid(512, 16) == ([128, 512], [1, 8, 16])
    assert command.grid(1, 3) == ([1], [1, 2, 3])


@pytest.mark.slow
@pytest.mark.model
def test_bundled_model(capsys):
    code, out, _ = run(capsys, "smollm2-135m", "--prompt-tokens", 32, "--new-tokens", 2, "--json")
    assert code == 0
    document = json.loads(out)
    assert sum(row["params"] for row in document["modules"] if row["phase"] == "prefill") == 134_515_008
    assert document["kinds"]["linear"]["share"] > 0.3


# ---- what is foretold before loading ------------------------------------------------------------------------------------------


def nothing_is_loaded(monkeypatch):
    monkeypatch.setattr("assay.workloads.models.load_model", lambda *a, **k: pytest.fail("loaded"))


def test_what_was_foretold_stands_beside_what_was_measured(capsys, folder):
    arguments = [folder, "--prompt-tokens", 32, "--new-tokens", 4]
    code, out, _ = run(capsys, *arguments, "--json")
    assert code == 0
    found = json.loads(out)["forecast"]
    parameters = 2 * 256 * 32 + 2 * (4 * 32 * 32 - 2 * 16 * 32 + 3 * 32 * 48 + 2 * 32) + 32
    assert found["reason"] == ""
    assert found["format"] == "fp32"
    assert found["parameters"] == parameters
    assert found["weight_bytes"] == 4 * parameters
    assert found["cache_bytes"] == 2 * 2 * 2 * 8 * 35 * 4  # keys and values, layers, heads, dimensions, tokens, bytes
    assert found["fits"]
    assert 0 < found["least_prefill_seconds"] <= found["prefill_seconds"]
    seen = found["measured"]
    for name in ("prefill", "token"):
        assert seen[f"{name}_error"] == pytest.approx(found[f"{name}_seconds"] / seen[f"{name}_seconds"] - 1)


def test_lines_say_what_is_modelled_and_what_is_measured(capsys, folder, tmp_path):
    page = tmp_path / "p.html"
    code, out, _ = run(capsys, folder, "--prompt-tokens", 16, "--new-tokens", 2, "--html", page)
    assert code == 0
    assert out.startswith("Modelled before loading, in fp32: ")
    for text in (" ".join(out.split()), " ".join(page.read_text().split())):
        assert "it fits" in text
        assert "a prompt of 16 tokens: " in text
        assert text.count("the forecast was ") == 2


def test_an_estimate_loads_nothing(capsys, folder, monkeypatch, tmp_path):
    nothing_is_loaded(monkeypatch)
    code, out, _ = run(capsys, folder, "--prompt-tokens", 16, "--estimate")
    assert code == 0
    assert "it fits" in out
    assert "measured" not in out
    assert "Runtime model" not in out
    code, out, _ = run(capsys, folder, "--prompt-tokens", 16, "--estimate", "--json")
    assert code == 0
    document = json.loads(out)
    assert set(document) == {"model", "forecast"}
    assert "measured" not in document["forecast"]
    code, _, err = run(capsys, folder, "--estimate", "--html", tmp_path / "p.html")
    assert code == 2
    assert "nothing to draw" in err


def test_what_does_not_fit_is_not_loaded_unless_wished(capsys, folder, monkeypatch):
    monkeypatch.setattr(command, "available_bytes", lambda: 1e4)
    monkeypatch.setattr(
        "assay.methods.compression.resource_efficient_llm_survey.with_times", lambda *a, **k: pytest.fail("ran blocks")
    )
    with monkeypatch.context() as patch:
        nothing_is_loaded(patch)
        code, _, err = run(capsys, folder, "--prompt-tokens", 16)
        assert code == 3
        assert "does not fit: weights and cache take 0.00 GB" in err
        assert "--anyway" in err
        code, out, _ = run(capsys, folder, "--prompt-tokens", 16, "--estimate")
        assert code == 0
        assert "it does not fit" in out
        assert " ms" not in out
    code, out, _ = run(capsys, folder, "--prompt-tokens", 16, "--new-tokens", 2, "--anyway")
    assert code == 0
    assert "it does not fit" in out
    assert "Runtime model" in out


def test_why_nothing_is_foretold_is_said(capsys, folder, monkeypatch, tmp_path):
    import shutil

    copied = tmp_path / "tuned"
    shutil.copytree(folder, copied)
    (copied / "recipe.toml").write_text("")
    assert "a recipe belongs to the model" in command.foresee(str(copied), 8, 2, print)
    (copied / "recipe.toml").unlink()
    config = json.loads((copied / "config.json").read_text())
    (copied / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 90_000}))
    assert "asks for 90000 layers" in command.foresee(str(copied), 8, 2, print)
    (copied / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "fp8"}}))
    assert "weights are quantised" in command.foresee(str(copied), 8, 2, print)
    told = command.forecast_facts(command.foresee(str(copied), 8, 2, print))
    assert set(told) == {"reason"}
    assert command.forecast_lines(told) == [f"Nothing foretold: {told['reason']}"]
    assert command.held_against(told["reason"], None) == {}


def saved(kind, path, **changes):
    """A tiny model of another kind in a folder, without a tokenizer; the number of its parameters."""
    model = tiny_model(kind, **changes)
    model.save_pretrained(path)
    return sum(parameter.numel() for parameter in model.parameters())


def test_of_a_mixture_of_experts_the_memory_is_foretold(capsys, tmp_path, monkeypatch):
    parameters = saved("Mixtral", tmp_path, num_local_experts=4)
    nothing_is_loaded(monkeypatch)
    monkeypatch.setattr("assay.measure.machine.calibrate", lambda *a, **k: pytest.fail("calibrated"))
    code, out, _ = run(capsys, tmp_path, "--prompt-tokens", 16, "--new-tokens", 4, "--estimate", "--json")
    assert code == 0
    found = json.loads(out)["forecast"]
    assert (found["parameters"], found["weight_bytes"]) == (parameters, 4 * parameters)
    assert found["cache_bytes"] == 2 * 2 * 2 * 16 * 19 * 4  # keys and values, layers, heads, dimensions, tokens, bytes
    assert found["fits"]
    code, out, _ = run(capsys, tmp_path, "--prompt-tokens", 16, "--estimate")
    assert code == 0
    assert "it fits" in out
    assert "not foretold: activations and times of the model type 'mixtral'" in out
    assert " ms" not in out
    monkeypatch.setattr(command, "available_bytes", lambda: 1e4)
    code, _, err = run(capsys, tmp_path, "--prompt-tokens", 16)
    assert code == 3
    assert "does not fit" in err


def test_a_model_without_fused_attention_is_foretold(capsys, tmp_path, monkeypatch):
    saved("Gemma2", tmp_path, head_dim=16)
    nothing_is_loaded(monkeypatch)
    code, out, _ = run(capsys, tmp_path, "--prompt-tokens", 16, "--estimate")
    assert code == 0
    assert "a prompt of 16 tokens: " in out


def test_a_prompt_for_which_there_is_no_room_is_not_tried(capsys, folder, monkeypatch):
    """The weights and the cache alone would fit."""
    from assay.methods.compression import resource_efficient_llm_survey as survey

    config, format = command.stored(str(folder))
    told = survey.memory_forecast(survey.decoder_of(config), format, 32, 2, 0.0)
    monkeypatch.setattr(command, "available_bytes", lambda: told.weight_bytes + told.cache_bytes + 1)
    monkeypatch.setattr(survey, "with_times", lambda *a, **k: pytest.fail("ran blocks"))
    code, out, _ = run(capsys, folder, "--prompt-tokens", 32, "--new-tokens", 2, "--estimate")
    assert code == 0
    assert "it does not fit" in out


def test_a_busy_machine_is_said_to_be_one(folder, monkeypatch):
    from assay.methods.compression import resource_efficient_llm_survey as survey

    config, format = command.stored(str(folder))
    told = command.forecast_facts(survey.memory_forecast(survey.decoder_of(config), format, 8, 2, 1e9))
    assert "busy" not in " ".join(command.forecast_lines(told))
    assert "kept the machine busy" in " ".join(command.forecast_lines(told | {"noisy": True}))


def test_a_container_has_what_it_is_allowed(monkeypatch, tmp_path):
    def group(folder, limit, used, files):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "memory.max").write_text(f"{limit}\n")
        (folder / "memory.current").write_text(f"{used}\n")
        (folder / "memory.stat").write_text(f"anon 5\ninactive_file {files}\n")

    root = tmp_path / "cgroup"
    monkeypatch.setattr(command, "CGROUPS", root)
    monkeypatch.setattr(command, "own_cgroup", lambda: "a/b")
    free = command.available_bytes()
    assert free > 1e6
    group(root / "a" / "b", "max", 1000, 0)
    assert command.available_bytes() > 1e6
    group(root / "a", 5000, 4000, 300)
    assert command.available_bytes() == 1300
    group(root / "a" / "b", 900, 1000, 0)
    assert command.available_bytes() == 0
    group(tmp_path, 1, 1, 0)  # beyond the root: nobody's
    group(root / "a" / "b", "max", 1000, 0)
    assert command.available_bytes() == 1300


@pytest.mark.parametrize(("dtype", "format"), [("float32", "fp32"), ("bfloat16", "bf16"), ("float16", "fp16")])
def test_the_floats_are_those_that_loading_takes(tmp_path, dtype, format):
    import torch

    tiny_model(vocab_size=64, hidden_size=32).to(getattr(torch, dtype)).save_pretrained(tmp_path)
    config, found = command.stored(str(tmp_path))
    assert found == format
    assert config.model_type == "llama"


def test_a_gguf_file_is_counted_as_what_conversion_makes_of_it(tmp_path):
    from tests.tiny import write_gguf, write_tiny_llama

    from assay.methods.compression.resource_efficient_llm_survey import decoder_of
    from assay.workloads.models import load_model

    loaded = load_model(write_tiny_llama(tmp_path / "m"))
    config, format = command.stored(str(write_gguf(loaded, tmp_path / "m.gguf")))
    assert format == "fp32"
    assert decoder_of(config).parameters == sum(parameter.numel() for parameter in loaded.model.parameters())


def test_a_single_new_token_has_no_token_time():
    found = SimpleNamespace(prefill_seconds=2.0, token_seconds=0.5, new_tokens=1)
    measured = SimpleNamespace(seconds={"prefill": 1.0})
    assert command.held_against(found, measured) == {"prefill_seconds": 1.0, "prefill_error": 1.0}
    found.new_tokens, measured.seconds = 5, {"prefill": 4.0, "decode": 1.0}
    assert command.held_against(found, measured) == {
        "prefill_seconds": 4.0, "prefill_error": -0.5, "token_seconds": 0.25, "token_error": 1.0,
    }  # fmt: skip
