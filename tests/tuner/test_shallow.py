"""Few layers of a model: a copy that runs, in whole periods of what takes turns, and the given model left as it was."""

from __future__ import annotations

import pytest
import torch
from tests.properties.architectures import CAUSAL, build, inputs
from tests.tiny import tiny_model

from assay.tuner.shallow import shallow


@pytest.fixture(scope="module")
def deep():
    return tiny_model(hidden_size=16, num_hidden_layers=10, num_attention_heads=2, num_key_value_heads=1)


def test_the_first_layers_are_kept_and_the_model_is_left_alone(deep):
    ids = torch.arange(12)[None]
    before = deep(ids).logits
    few = shallow(deep)
    assert (few.kept, few.layers, few.stack) == (4, 10, "model.layers")
    assert few.factor == 2.5
    assert len(few.model.model.layers) == few.model.config.num_hidden_layers == 4
    assert len(deep.model.layers) == deep.config.num_hidden_layers == 10
    out = few.model.generate(ids, max_new_tokens=3, min_new_tokens=3, do_sample=False, pad_token_id=0)
    assert out.shape == (1, 15)
    with torch.no_grad():
        few.model.model.layers[0].self_attn.q_proj.weight.zero_()
    torch.testing.assert_close(deep(ids).logits, before)
    hidden = deep(ids, output_hidden_states=True).hidden_states[4]
    again = shallow(deep).model(ids, output_hidden_states=True).hidden_states
    torch.testing.assert_close(again[3], deep(ids, output_hidden_states=True).hidden_states[3])
    assert hidden.shape == again[-1].shape


def test_whole_periods_of_windowed_and_full_layers_are_kept():
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    kinds = (["sliding_attention"] * 5 + ["full_attention"]) * 3
    config = Gemma3TextConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=18,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        layer_types=kinds,
        sliding_window=8,
    )
    few = shallow(Gemma3ForCausalLM(config).eval())
    assert (few.kept, few.layers) == (6, 18)
    assert few.model.config.layer_types == kinds[:6]
    assert few.model(torch.arange(12)[None]).logits.shape == (1, 12, 64)


def test_a_model_that_cannot_be_cut_is_used_whole(deep):
    two = shallow(deep, keep=6)
    assert two.model is deep
    assert two.factor == 1.0
    plain = torch.nn.Linear(2, 2)
    assert shallow(plain).model is plain


@pytest.mark.parametrize("name", CAUSAL)
def test_every_causal_architecture_is_cut_to_something_that_runs_or_left_whole(name):
    model = build(name)
    few = shallow(model, keep=1)
    with torch.no_grad():
        few.model(**inputs(name))
    assert few.kept == few.layers or few.model is not model
