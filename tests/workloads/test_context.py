"""The context of a model, under whatever name and in whatever part of its configuration it says so."""

from __future__ import annotations

import json

import pytest
import torch
import transformers

from assay.errors import InputError
from assay.workloads.context import context_length, stored_context
from properties.architectures import CAUSAL, build

ENDS = {"gpt2": 128, "opt": 128, "biogpt": 128}  # tables of learned positions: one token more is an error of torch


@pytest.mark.parametrize("name", CAUSAL)
def test_every_model_runs_at_its_context(name):
    model, limit = build(name), ENDS.get(name, None if name == "mamba" else 256)
    assert context_length(model) == context_length(model.config) == limit
    if limit is None:
        return
    with torch.no_grad():
        assert model(torch.full((1, limit), 5)).logits.shape[1] == limit
        if name in ENDS:
            with pytest.raises(IndexError):
                model(torch.full((1, limit + 1), 5))


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (transformers.GPTNeoConfig(max_position_embeddings=77), 77),
        (transformers.MptConfig(max_seq_len=78), 78),
        (transformers.CTRLConfig(n_positions=79), 79),
        (transformers.BloomConfig(), None),
        (transformers.Gemma3Config(text_config={"max_position_embeddings": 80}), 80),
        (transformers.LlavaConfig(text_config={"model_type": "llama", "max_position_embeddings": 81}), 81),
        (transformers.LlamaConfig(max_position_embeddings=82), 82),
        (transformers.Mamba2Config(), None),
    ],
)
def test_the_name_a_family_uses(config, expected):
    assert context_length(config) == expected


def test_rows_kept_free_in_the_table_of_positions_do_not_count():
    shape = {
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "vocab_size": 50,
    }
    config = transformers.RobertaConfig(**shape, max_position_embeddings=20, pad_token_id=1, is_decoder=True)
    model = transformers.RobertaForCausalLM(config).eval()
    limit = context_length(model)
    assert limit == 18
    with torch.no_grad():
        model(torch.full((1, limit), 5))
        with pytest.raises((IndexError, RuntimeError), match="out of"):
            model(torch.full((1, limit + 1), 5))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (json.dumps({"n_positions": 40}), 40),
        (json.dumps({"text_config": {"max_position_embeddings": 41}}), 41),
        (json.dumps({"max_position_embeddings": "many"}), None),
        (json.dumps({"max_position_embeddings": True}), None),
        (json.dumps({"max_position_embeddings": -1}), None),
        ("{", None),
        ("[1]", None),
        ("\xff", None),
        ("[" * 100_000, None),
        ('{"max_position_embeddings": ' + "9" * 6000 + "}", None),
        (None, None),
    ],
)
def test_the_context_of_a_model_not_loaded(tmp_path, text, expected):
    if text is not None:
        (tmp_path / "config.json").write_text(text, encoding="latin-1")
    assert stored_context(tmp_path) == expected


def test_a_model_that_is_not_there_is_named():
    with pytest.raises(InputError, match="no model './nowhere'"):
        stored_context("./nowhere")
