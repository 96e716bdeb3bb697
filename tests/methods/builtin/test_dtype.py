"""The bfloat16 transform: the model transformers would have loaded in bfloat16, to the bit."""

from __future__ import annotations

import copy

import pytest
import torch
from tests.tiny import tiny_model
from transformers import LlamaForCausalLM

from assay.methods.builtin.dtype import transform
from assay.methods.transform import GOALS, Transform, TuneContext

CONTEXT = TuneContext(goal="decode", prompt_tokens=8, new_tokens=8)


@pytest.fixture
def model():
    return tiny_model(vocab_size=101, initializer_range=0.02)


def test_is_what_loading_in_bfloat16_gives(model, tmp_path):
    model.save_pretrained(tmp_path)
    loaded = LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    made = transform.apply(model, {"dtype": "bfloat16"}, CONTEXT)
    assert made is model
    assert {p.dtype for p in made.parameters()} == {torch.bfloat16}
    ids = torch.randint(0, 101, (2, 50))
    assert torch.equal(made(ids).logits, loaded(ids).logits)


def test_rotary_frequencies_keep_their_digits(model):
    before = model.model.rotary_emb.inv_freq.clone()
    plain = copy.deepcopy(model).to(torch.bfloat16)
    assert not torch.equal(plain.model.rotary_emb.inv_freq.float(), before)  # what this transform is careful about
    made = transform.apply(model, {}, CONTEXT)
    assert torch.equal(made.model.rotary_emb.inv_freq, before)
    assert torch.equal(made.model.rotary_emb.original_inv_freq, before)


def test_there_and_back(model):
    made = transform.apply(transform.apply(model, {}, CONTEXT), {"dtype": "float32"}, CONTEXT)
    assert {p.dtype for p in made.parameters()} == {torch.float32}


def test_protocol(model):
    assert isinstance(transform, Transform)
    assert transform.exact
    assert transform.goals == frozenset(GOALS)
    assert transform.configs(model, CONTEXT) == [{"dtype": "bfloat16"}]
    fit = transform.applies_to(model, CONTEXT)
    assert fit.applies
    assert {e.dtype for e in fit.effects if e.kind == "linear"} == {"bfloat16"}
    fit = transform.applies_to(model.to(torch.bfloat16), CONTEXT)
    assert (fit.applies, fit.reason) == (False, "no float32 or float16 parameters, only torch.bfloat16")
    assert "only none" in transform.applies_to(torch.nn.ReLU(), CONTEXT).reason


def test_says_what_is_wrong(model):
    with pytest.raises(ValueError, match="dtype must be one of 'bfloat16', 'float32', got 'float8'"):
        transform.apply(model, {"dtype": "float8"}, CONTEXT)
    with pytest.raises(ValueError, match=r"unknown configuration \['bits'\]"):
        transform.apply(model, {"bits": 8}, CONTEXT)


def test_every_architecture_runs_in_bfloat16_as_when_it_is_loaded_so():
    import torch
    from tests.properties.architectures import build, output

    from assay.methods.builtin.dtype import cast

    for name in ("m2m100", "gemma3", "llama"):
        model = build(name)
        exact = output(model, name, 8)
        seen = output(cast(model, torch.bfloat16), name, 8)
        assert float((seen - exact).norm() / exact.norm()) < 0.05
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32
