"""torch.compile as a transform: same results, shared graphs, generate keeps working."""

from __future__ import annotations

import copy
import shutil

import pytest
import torch
from tests.tiny import tiny_model
from torch import nn

from assay.methods.builtin import weight_only
from assay.methods.builtin.compile import parts, transform
from assay.methods.transform import Transform, TuneContext

CONTEXT = TuneContext(goal="ttft", prompt_tokens=8, new_tokens=8)
BUILDS = shutil.which("g++") is not None and " " not in torch.__file__
needs_compiler = pytest.mark.skipif(not BUILDS, reason="inductor needs a C++ compiler and a path without spaces")


@pytest.fixture
def model():
    return tiny_model(num_hidden_layers=3, vocab_size=101, initializer_range=0.2)


@pytest.fixture(autouse=True)
def _fresh_graphs():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def test_parts_are_norms_and_feed_forward(model):
    chosen = parts(model)
    assert len(chosen) == 9
    assert {type(part).__name__ for part in chosen} == {"LlamaRMSNorm", "LlamaMLP"}


def test_modules_with_kernels_of_their_own_are_left_alone(model):
    quantised = weight_only.transform.apply(model, {"bits": 4}, CONTEXT)
    assert {type(part).__name__ for part in parts(quantised)} == {"LlamaRMSNorm"}


@needs_compiler
def test_generate_gives_the_same_tokens_and_blocks_share_their_graphs(model):
    from torch._dynamo.utils import counters

    ids = torch.randint(1, 101, (1, 9))
    expected = model.generate(ids, max_new_tokens=6, do_sample=False)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    counters.clear()
    made = transform.apply(model, transform.configs(model, CONTEXT)[0], CONTEXT)
    assert made is model
    assert torch.equal(made.generate(ids, max_new_tokens=6, do_sample=False), expected)
    # a norm and a feed-forward, each for many rows and for one, whatever the number of layers
    assert 0 < counters["stats"]["unique_graphs"] <= 4
    longer = torch.randint(1, 101, (1, 31))
    with torch.no_grad():
        torch.testing.assert_close(made(longer).logits, copy.deepcopy(made)(longer).logits, atol=1e-4, rtol=1e-4)
    assert counters["stats"]["unique_graphs"] <= 4
    assert set(made.state_dict()) == set(state)


@needs_compiler
@pytest.mark.slow
@pytest.mark.slow
def test_whole_model(model):
    ids = torch.randint(1, 101, (1, 9))
    expected = model.generate(ids, max_new_tokens=6, do_sample=False)
    made = transform.apply(model, {"region": "model"}, CONTEXT)
    assert torch.equal(made.generate(ids, max_new_tokens=6, do_sample=False), expected)


def test_protocol(model):
    assert isinstance(transform, Transform)
    assert transform.exact
    assert transform.applies_to(model, CONTEXT).applies == (" " not in torch.__file__)
    assert not transform.applies_to(nn.Linear(3, 3), CONTEXT).applies
    assert transform.configs(model, CONTEXT)[0] == {"mode": "default", "region": "blocks"}


def test_says_what_is_wrong(model):
    with pytest.raises(ValueError, match="mode must be one of 'default'"):
        transform.apply(model, {"mode": "fastest"}, CONTEXT)
    with pytest.raises(ValueError, match="region must be one of 'blocks', 'model', got 'layer'"):
        transform.apply(model, {"region": "layer"}, CONTEXT)
    with pytest.raises(ValueError, match=r"unknown configuration \['backend'\]"):
        transform.apply(model, {"backend": "x"}, CONTEXT)
    with pytest.raises(ValueError, match="no repeated blocks"):
        transform.apply(nn.Linear(3, 3), {}, CONTEXT)


def test_a_path_with_spaces_is_a_reason(model, monkeypatch):
    monkeypatch.setattr(torch, "__file__", "/home/a b/torch/__init__.py")
    assert "spaces" in transform.applies_to(model, CONTEXT).reason
