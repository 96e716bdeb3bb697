"""An artefact is written whole or not at all, holds the model as it was, and a damaged one is the user's error."""

from __future__ import annotations

import copy
import errno
import json
import os
import shutil
import struct

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from transformers import GenerationConfig

import assay
from assay.cli.main import main
from assay.errors import InputError
from assay.tuner.artefact import apply_to, load_tuned, read_calibration, write
from assay.tuner.names import CALIBRATION
from assay.tuner.recipe import Recipe, Step
from assay.workloads.models import load_model
from properties.architectures import build, output
from tiny import tiny_tokenizer, write_tiny_llama

LOW_RANK = Recipe(architecture="llama", steps=(Step(transform="greenformers", config={"budget": 0.8}),))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_tiny_llama(
        tmp_path_factory.mktemp("model") / "tiny", layers=1, hidden=32, heads=2, kv_heads=1, context=128
    )


@pytest.fixture
def artefact(model, tmp_path):
    """An artefact whose recipe calibrates when it is loaded."""
    loaded = load_model(model)
    ids = torch.randint(5, 500, (4, 40), generator=torch.Generator().manual_seed(0))
    write(tmp_path / "made", loaded.model, loaded.tokenizer, LOW_RANK, list(ids.split(1)), {"report.html": "<p>"})
    return tmp_path / "made"


def test_an_artefact_loads_with_its_calibration(artefact):
    assert [ids.shape for ids in read_calibration(artefact / CALIBRATION)] == [(1, 40)] * 4
    assert type(load_tuned(artefact).model.model.layers[0].mlp.up_proj).__name__ != "Linear"


def header(names, size):
    text = json.dumps(names).encode()
    return struct.pack("<Q", len(text)) + text + b"\0" * size


@pytest.mark.parametrize(
    ("tensors", "says"),
    [
        ({"input_ids": torch.zeros(4, 40)}, "whole numbers of 32 or 64 bits .I32, I64., got F32"),
        ({"input_ids": torch.full((4, 40), float("nan"))}, "got F32"),
        ({"input_ids": torch.zeros(4, 40, dtype=torch.bool)}, "got BOOL"),
        ({"input_ids": torch.zeros(4, 40, dtype=torch.uint8)}, "got U8"),
        ({"input_ids": torch.zeros(4, dtype=torch.int32)}, "must have the shape .texts, tokens."),
        ({"input_ids": torch.zeros(1, 4, 4, dtype=torch.int32)}, "must have the shape"),
        ({"input_ids": torch.zeros(0, 4, dtype=torch.int32)}, "must have the shape"),
        ({"input_ids": torch.zeros(4, 0, dtype=torch.int32)}, "must have the shape"),
        ({"ids": torch.zeros(4, 40, dtype=torch.int32)}, "must hold the tensor 'input_ids' and no other, got ids"),
        ({"input_ids": torch.zeros(2, 2, dtype=torch.int32), "x": torch.zeros(1)}, "and no other"),
        ({"input_ids": torch.full((4, 40), 512, dtype=torch.int32)}, "512 tokens and the model a vocabulary of 512"),
        ({"input_ids": torch.full((4, 40), 2**40)}, "a vocabulary of 512"),
        ({"input_ids": torch.full((4, 40), -1, dtype=torch.int32)}, "must not be negative, got -1"),
        (b"", "too few"),
        (b"nonsense nonsense nonsense", "safetensors"),
        (
            header({"input_ids": {"dtype": "I32", "shape": [10**6, 10**6], "data_offsets": [0, 4 * 10**12]}}, 16),
            "truncated",
        ),
        (header({}, 0), "holds no tensors"),
    ],
)
def test_a_damaged_calibration_file_is_named(artefact, tensors, says):
    if isinstance(tensors, bytes):
        (artefact / CALIBRATION).write_bytes(tensors)
    else:
        save_file(tensors, artefact / CALIBRATION)
    with pytest.raises(InputError, match=says):
        assay.load(artefact)


def test_a_huge_calibration_file_is_not_read(artefact):
    size = 4 * 5000 * 4000
    with open(artefact / CALIBRATION, "wb") as file:
        file.write(header({"input_ids": {"dtype": "I32", "shape": [5000, 4000], "data_offsets": [0, size]}}, 0))
        file.truncate(file.tell() + size)
    with pytest.raises(InputError, match="20,000,000 token ids are more than"):
        assay.load(artefact)


def test_a_recipe_without_what_it_needs_says_so(artefact):
    (artefact / CALIBRATION).unlink()
    with pytest.raises(InputError, match="greenformers does not fit this model: it needs calibration text"):
        assay.load(artefact)


# Writing ---------------------------------------------------------------------------------------------------------------


def full(*arguments, **options):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def full_in_safetensors(*arguments, **options):
    raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


@pytest.mark.parametrize(
    "place", ["transformers.modeling_utils.safe_save_file", "safetensors.torch.save_file", "pathlib.Path.write_text"]
)
@pytest.mark.parametrize("error", [full, full_in_safetensors])
def test_a_full_disk_leaves_nothing_and_is_one_line(model, tmp_path, monkeypatch, capsys, place, error):
    (tmp_path / "recipe.toml").write_text("")
    old = tmp_path / "out"
    shutil.copytree(model, old)
    (old / "recipe.toml").write_text("")
    before = {path.name: path.read_bytes() for path in old.iterdir()}
    monkeypatch.setattr(place, error)
    assert main(["apply", str(model), "--recipe", str(tmp_path / "recipe.toml"), "-o", str(old)]) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert said[-1].startswith(f"assay: the disk is full ({old}): make room there")
    assert not any("Traceback" in line or "bug" in line for line in said)
    assert {path.name: path.read_bytes() for path in old.iterdir()} == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "recipe.toml"]


@pytest.mark.parametrize(
    "wishes",
    [
        {"temperature": 0.5, "top_p": 0.9},  # transformers refuses to save it without do_sample
        {"repetition_penalty": 1.1},
        {"do_sample": True, "top_k": 5},
    ],
)
def test_the_models_own_wishes_for_generation_are_stored_as_they_are(model, tmp_path, wishes):
    loaded = load_model(model)
    loaded.model.generation_config = GenerationConfig(eos_token_id=2, **wishes)
    write(tmp_path / "out", loaded.model, loaded.tokenizer, Recipe(), [], {})
    stored = load_model(tmp_path / "out").model.generation_config
    assert {name: getattr(stored, name) for name in wishes} == wishes
    assert stored.eos_token_id == 2
    assert loaded.model.generation_config.to_diff_dict() == stored.to_diff_dict()


@pytest.mark.parametrize("name", ["llama-tied", "gpt2", "qwen2"])
@pytest.mark.parametrize("config", [None, {}, {"dtype": "bfloat16"}, {"dtype": "float32"}])
def test_tied_models_are_stored_tied_in_the_recipes_dtype(tmp_path, name, config):
    tied, tokenizer = build(name, vocab_size=512), tiny_tokenizer()
    steps = () if config is None else (Step(transform="dtype", config=config),)
    wanted = (
        (copy.deepcopy(tied).bfloat16() if config in ({}, {"dtype": "bfloat16"}) else tied)
        .get_output_embeddings()
        .weight
    )
    write(tmp_path / "out", tied, tokenizer, Recipe(steps=steps), [], {})
    found = assay.load(tmp_path / "out")
    assert torch.equal(found.get_output_embeddings().weight, wanted)
    assert found.get_output_embeddings().weight is found.get_input_embeddings().weight
    torch.testing.assert_close(output(found, name), output(tied, name))


# Replaying on another model --------------------------------------------------------------------------------------------


def test_apply_calibrates_with_the_models_own_text_inside_its_context(artefact, tmp_path):
    """The ids beside the recipe are another tokenizer's words, of any length."""
    save_file({"input_ids": torch.full((2, 4000), 7, dtype=torch.int32)}, artefact / CALIBRATION)
    other = write_tiny_llama(tmp_path / "other", layers=1, hidden=32, heads=2, kv_heads=1, vocab=400, context=64)
    done = apply_to(str(other), artefact / "recipe.toml", tmp_path / "out")
    assert done == LOW_RANK
    kept = read_calibration(tmp_path / "out" / CALIBRATION)
    assert {tuple(ids.shape) for ids in kept} == {(1, 64)}
    assert max(int(ids.max()) for ids in kept) < 400
    plain, tuned = load_model(other).model, assay.load(tmp_path / "out")
    assert type(tuned.model.layers[0].mlp.up_proj).__name__ != "Linear"
    assert torch.equal(load_model(tmp_path / "out").model.lm_head.weight, plain.lm_head.weight)


@pytest.mark.parametrize("tokens", [512, 10**6])
def test_apply_asks_for_no_lengths_since_it_measures_nothing(model, tmp_path, tokens):
    recipe = Recipe(goal="ttft", prompt_tokens=tokens, steps=(Step(transform="dtype", config={"dtype": "bfloat16"}),))
    recipe.save(tmp_path / "recipe.toml")
    assert main(["apply", str(model), "--recipe", str(tmp_path / "recipe.toml"), "-o", str(tmp_path / "out")]) == 0
    assert load_model(tmp_path / "out", dtype="auto").model.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (
            "[[steps]]\ntransform = 'dtype'\nconfig = {dtype = 'float3'}",
            "dtype must be one of 'bfloat16', 'float32', got 'float3'",
        ),
        ("architecture = 'gpt2'", "the recipe is for 'gpt2' models, this one is 'llama'"),
        ("[[steps]]\ntransform = 'dtipe'", "did you mean 'dtype'"),
        ("x = " + "[" * 10_000, "nested too deeply"),
    ],
)
def test_what_apply_refuses_is_one_line_and_names_no_option_of_tune(model, tmp_path, capsys, text, says):
    (tmp_path / "recipe.toml").write_text(text)
    assert main(["apply", str(model), "--recipe", str(tmp_path / "recipe.toml"), "-o", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert says in said
    assert "bug in assay" not in said
    assert not any(option in said for option in ("--goal", "--prompt-tokens", "--new-tokens", "--max-drop"))
    assert not (tmp_path / "out").exists()


def test_apply_says_what_it_did_in_words(model, tmp_path, capsys):
    Recipe(steps=(Step(transform="dtype", config={"dtype": "bfloat16"}),)).save(tmp_path / "recipe.toml")
    assert main(["apply", str(model), "--recipe", str(tmp_path / "recipe.toml"), "-o", str(tmp_path / "out")]) == 0
    assert capsys.readouterr().out.splitlines()[-2:] == [
        f"{tmp_path / 'out'}: bfloat16",
        "recipe   dtype(dtype=bfloat16)",
    ]


def test_a_vocabulary_smaller_than_the_tokenizers_is_refused_by_apply(tmp_path, capsys):
    folder = write_tiny_llama(tmp_path / "small", layers=1, hidden=32, heads=2, kv_heads=1)
    loaded = load_model(folder)
    loaded.model.resize_token_embeddings(300)
    loaded.model.save_pretrained(folder)
    (tmp_path / "recipe.toml").write_text("")
    assert main(["apply", str(folder), "--recipe", str(tmp_path / "recipe.toml"), "-o", str(tmp_path / "out")]) == 2
    assert "the tokenizer has 212 tokens beyond the model's embedding, ids 300 to 511" in capsys.readouterr().err
