"""`assay export`: what is written reads back with the same numbers, by others and by us; what a format cannot say is refused by name."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from assay.cli.main import main
from assay.errors import InputError
from assay.tuner import packed
from assay.tuner.artefact import load_tuned, write
from assay.tuner.export import export, round_to
from assay.tuner.recipe import Recipe, Step
from assay.workloads.models import load_model
from properties.architectures import build, output
from tiny import tiny_tokenizer


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """Folders of plain models, made when they are asked for."""
    root, made = tmp_path_factory.mktemp("plain"), {}

    def folder(name):
        if name not in made:
            made[name] = root / name
            build(name, vocab_size=512).save_pretrained(made[name])
            tiny_tokenizer().save_pretrained(made[name])
        return made[name]

    return folder


@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma3"])
@pytest.mark.parametrize("weights", ["w8a8", "w8a16", "w4a16"])
def test_compressed_tensors_is_read_by_transformers_and_by_assay(plain, tmp_path, name, weights):
    done = export(plain(name), "compressed-tensors", tmp_path / "out", weights=weights)
    assert done.bytes == sum(file.stat().st_size for file in (tmp_path / "out").iterdir())
    assert not (tmp_path / "out" / packed.PACKED).exists()
    rounded = round_to(load_model(plain(name), dtype="auto").model, weights)
    assert torch.equal(output(load_tuned(tmp_path / "out").model, name), output(rounded, name))
    pytest.importorskip("compressed_tensors")
    from transformers import AutoModelForCausalLM

    found = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    assert float((output(found, name) - output(rounded, name)).norm() / output(rounded, name).norm()) < 0.05
    for one in packed.held(rounded):
        whole = one.layer.dequantize() if one.norm is None else one.layer.dequantize() / one.layer.multiplier
        for layer, first, rows in one.parts:
            weight = found.get_submodule(layer).weight
            torch.testing.assert_close(weight, whole[first : first + rows], rtol=3e-7, atol=0)


@pytest.mark.parametrize("name", ["llama", "llama-tied", "mistral", "qwen2", "gemma3"])
@pytest.mark.parametrize(("weights", "kind"), [("w8a16", "Q8_0"), ("w4a16", "Q4_0"), ("w4a16-asymmetric", "Q4_1")])
def test_gguf_reads_back_with_equal_numbers(plain, tmp_path, monkeypatch, name, weights, kind):
    import gguf

    monkeypatch.setenv("ASSAY_CACHE_DIR", str(tmp_path / "cache"))
    file = tmp_path / "model.gguf"
    export(plain(name), "gguf", file, weights=weights)
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}
    assert stored["blk.0.attn_q.weight"].tensor_type.name == kind
    assert stored["blk.1.ffn_down.weight"].tensor_type.name == kind
    rounded = round_to(load_model(plain(name), dtype="auto").model, weights)
    again = load_model(file)
    for one in packed.held(rounded):
        assert torch.equal(again.model.get_submodule(one.path).weight, one.layer.dequantize()), one.path
    text = "The quick brown fox: 12345,\n  it's x['a']."
    assert again.tokenizer(text).input_ids == tiny_tokenizer()(text).input_ids
    assert float((output(again.model, name) - output(rounded, name)).norm() / output(rounded, name).norm()) < 0.05


@pytest.mark.parametrize(("weights", "inputs"), [("w8a8", True), ("w8a16", False)])
def test_torchaos_layout_holds_the_same_numbers(plain, tmp_path, weights, inputs):
    """Names, types and metadata as torchao 0.18 writes them itself; where it is installed, transformers reads the folder through it."""
    from safetensors import safe_open

    export(plain("qwen2"), "torchao", tmp_path / "out", weights=weights)
    rounded = round_to(load_model(plain("qwen2"), dtype="auto").model, weights)
    with safe_open(tmp_path / "out" / "model.safetensors", framework="pt") as file:
        described = {key: value for key, value in file.metadata().items() if key not in ("format", "tensor_names")}
        assert sorted(json.loads(file.metadata()["tensor_names"])) == sorted(described)
        for one in packed.held(rounded):
            whole = one.layer.dequantize() if one.norm is None else one.layer.dequantize() / one.layer.multiplier
            for layer, first, rows in one.parts:
                entry = json.loads(described[f"{layer}.weight"])
                assert entry["_type"] == "Int8Tensor"
                assert (entry["_data"]["act_quant_kwargs"] is not None) is inputs
                codes, scale = (file.get_tensor(f"{layer}._weight_{part}") for part in ("qdata", "scale"))
                dense = codes.float() * scale.repeat_interleave(entry["_data"]["block_size"][1], 1)
                torch.testing.assert_close(dense, whole[first : first + rows], rtol=3e-7, atol=0)
    pytest.importorskip("torchao")
    from transformers import AutoModelForCausalLM

    found = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    wanted = output(rounded, "qwen2")
    assert float((output(found, "qwen2") - wanted).norm() / wanted.norm()) < 0.05


def test_torchaos_four_bits_are_refused(plain, tmp_path):
    with pytest.raises(InputError, match="its 4-bit layouts are made for its GPU kernels"):
        export(plain("llama"), "torchao", tmp_path / "out", weights="w4a16")
    assert list(tmp_path.iterdir()) == []


# Refusals, and the command -----------------------------------------------------------------------------------------------------


def artefact(folder, name, *steps):
    write(folder, build(name, vocab_size=512), tiny_tokenizer(), Recipe(steps=steps), [], {})
    return folder


WIDE = Step(transform="fp8_vs_int8", config={"rotation": 1, "smooth": None})
TURNED = Step(transform="fp8_vs_int8", config={"rotation": 16, "smooth": None})
FOUR = Step(transform="weight_only", config={"bits": 4, "head_bits": None})


@pytest.mark.parametrize(
    ("step", "to", "says"),
    [
        (
            TURNED,
            "compressed-tensors",
            "compressed-tensors cannot hold this model: it knows no rotation of a layer's inputs",
        ),
        (FOUR, "compressed-tensors", "it knows no minimum of a group that is not a whole number of its steps"),
        (WIDE, "gguf", "GGUF's Q8_0 has float16 scales of groups of 32"),
        (TURNED, "torchao", "torchao cannot hold this model: it knows no rotation of a layer's inputs"),
        (FOUR, "torchao", "torchao cannot hold this model: it knows no minimum of a group"),
        (WIDE, "mlx", "--to must be one of compressed-tensors, gguf, torchao, onnx, got 'mlx'"),
        (WIDE, "onnx", "language models in the other formats, got --to onnx"),
    ],
)
def test_what_a_format_cannot_hold_is_refused_by_name_and_nothing_is_written(tmp_path, capsys, step, to, says):
    artefact(tmp_path / "in", "llama", step)
    assert main(["export", str(tmp_path / "in"), "--to", to, "-o", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert says in said[-1]
    assert not any("Traceback" in line for line in said)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({}, "its weights are not packed; say with --weights how they are to be: w8a8, w8a16, w4a16, w4a16-asymmetric"),
        ({"weights": "w2"}, "--weights must be one of w8a8, w8a16, w4a16, w4a16-asymmetric, got 'w2'"),
        ({"weights": "w4a16-asymmetric"}, "compressed-tensors cannot hold this model: it knows no minimum"),
    ],
)
def test_a_plain_model_needs_a_kind_that_the_format_knows(plain, tmp_path, options, says):
    with pytest.raises(InputError, match=says):
        export(plain("llama"), "compressed-tensors", tmp_path / "out", **options)
    assert list(tmp_path.iterdir()) == []


def test_other_places_and_packed_weights_are_left_alone(plain, tmp_path):
    artefact(tmp_path / "in", "llama", WIDE)
    with pytest.raises(InputError, match="its weights are packed already; leave --weights out"):
        export(tmp_path / "in", "compressed-tensors", tmp_path / "out", weights="w8a8")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("mine")
    with pytest.raises(InputError, match="is there already; name another place"):
        export(tmp_path / "in", "compressed-tensors", tmp_path / "full")


def test_a_recipe_that_changes_the_structure_is_in_no_other_format(plain, tmp_path):
    shutil.copytree(plain("llama"), tmp_path / "in")
    Recipe(steps=(Step(transform="greenformers", config={"rank": 8}),)).save(tmp_path / "in" / "recipe.toml")
    with pytest.raises(InputError, match="its recipe changes the model's layers"):
        export(tmp_path / "in", "compressed-tensors", tmp_path / "out", weights="w8a8")


@pytest.mark.parametrize(
    ("name", "config", "says"),
    [
        (
            "gpt2",
            {},
            "'gpt2' models are not written as GGUF here; those written: llama, mistral, qwen2, qwen3, gemma3_text",
        ),
        ("llama", {"hidden_act": "gelu"}, "GGUF does not hold hidden_act = gelu of this model"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
            "rotary positions of type 'dynamic'",
        ),
    ],
)
def test_gguf_refuses_what_its_file_would_lose(tmp_path, name, config, says):
    build(name, vocab_size=512, **config).save_pretrained(tmp_path / "in")
    tiny_tokenizer().save_pretrained(tmp_path / "in")
    with pytest.raises(InputError, match=says):
        export(tmp_path / "in", "gguf", tmp_path / "out.gguf", weights="w8a16")
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_the_command_says_what_it_wrote_and_what_stays_behind(tmp_path, capsys):
    sorted_ = Step(transform="sorted_batches", config={})
    artefact(tmp_path / "in", "llama", WIDE, sorted_)
    assert main(["export", str(tmp_path / "in"), "--to", "compressed-tensors", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["path"] == str(tmp_path / "in-compressed-tensors")
    assert found["left"] == [sorted_.words()]
    assert found["bytes"] > 0
    assert load_tuned(tmp_path / "in-compressed-tensors").model is not None
