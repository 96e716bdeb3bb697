"""Layers shown alike, opened, counted; and weights that are shown without being there."""

from __future__ import annotations

import copy

import pytest
import torch
from tests.properties.architectures import build, output
from torch import nn

from assay.methods.builtin.weight_only import WeightOnlyLinear
from assay.methods.core.layers.linears import left_alone, linears, open_, put, settle, share
from assay.methods.core.layers.packed import PackedLinear
from assay.methods.core.layers.surgery import output_name, untie
from assay.methods.core.quantize.int8_linear import Int8Linear
from assay.methods.layers.greenformers import CED, LED


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "gpt2"])
def test_opening_changes_nothing_and_shares_the_memory(name):
    model = build(name)
    exact = output(model, name, 8)
    held = {p.untyped_storage().data_ptr() for p in model.parameters()}
    shown = list(linears(model))
    opened = open_(model)
    assert torch.equal(output(opened, name, 8), exact)
    assert list(linears(opened)) == shown
    weights = [layer.weight for layer in linears(opened).values()]
    assert {w.untyped_storage().data_ptr() for w in weights} <= held
    copied = copy.deepcopy(opened)
    assert torch.equal(output(copied, name, 8), exact)
    settle(opened)
    assert all(layer.weight.is_contiguous() for layer in linears(opened).values())
    assert torch.equal(output(opened, name, 8), exact)


def test_no_tokens_reach_the_experts():
    experts = open_(build("mixtral")).model.layers[0].mlp.experts
    none = torch.empty(0, 2, dtype=torch.int64)
    assert experts(torch.empty(0, 128), none, torch.empty(0, 2)).shape == (0, 128)


def test_shares_are_counted_from_shapes():
    model = build("gpt2")
    assert share(model, []) == 0
    assert share(model, [name for name in linears(model) if "attn" in name]) == (384 + 128) / (384 + 128 + 2 * 512)
    assert left_alone(model, linears(model)) == ""
    assert left_alone(model, []).startswith("8 linear layers (transformer.h.0.attn.c_attn ...) stay")
    assert output_name(build("biogpt")) == "output_projection"
    assert output_name(build("bert")) is None
    encoder = nn.TransformerEncoderLayer(64, 4, 96)
    assert share(encoder, linears(encoder)) == 2 * 64 * 96 / (2 * 64 * 96 + 4 * 64 * 64)
    assert "2 linear layers (self_attn" in left_alone(encoder, linears(encoder))


def test_put_reaches_every_place_of_a_module():
    shared = nn.Linear(3, 3)
    model = nn.Sequential(shared, nn.ReLU(), shared)
    other = nn.Linear(3, 3)
    put(model, "0", other)
    assert model[0] is model[2] is other


def test_ties_that_hold_stay():
    model = build("t5")
    before = dict(model.all_tied_weights_keys)
    untie(model)
    assert model.config.tie_word_embeddings
    assert set(before) - set(model.all_tied_weights_keys) == set()
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    untie(model)
    assert not model.config.tie_word_embeddings
    assert "lm_head.weight" not in model.all_tied_weights_keys
    assert "encoder.embed_tokens.weight" in model.all_tied_weights_keys


def _units():
    torch.manual_seed(0)
    codes = torch.randint(-1, 2, (48, 64))
    return {
        "led": LED(64, 48, 8, bias=False),
        "int8": Int8Linear(torch.randn(48, 64), rotation=16),
        "weight-only": WeightOnlyLinear.from_linear(nn.Linear(64, 48, bias=False), 8),
        "packed": PackedLinear.from_codes(codes, torch.ones(48)),
    }


@pytest.mark.parametrize("kind", ["led", "int8", "weight-only", "packed"])
@torch.no_grad()
def test_the_weight_that_is_shown(kind):
    unit = _units()[kind]
    x = torch.randn(5, 64)
    assert unit.weight.shape == (48, 64)
    assert unit.weight.dtype == torch.float32
    dense = unit.weight * 1
    assert type(dense) is torch.Tensor
    wanted = unit(x)
    assert float((x @ dense.T - wanted).norm() / wanted.norm()) < 0.02
    assert float((nn.functional.linear(x, unit.weight) - wanted).norm() / wanted.norm()) < 0.02
    assert copy.deepcopy(unit).to(torch.bfloat16).weight.dtype == torch.bfloat16
    with pytest.raises(TypeError, match="would change nothing"):
        unit.weight.data.mul_(2)
    with pytest.raises((AttributeError, KeyError)):
        unit.weight = nn.Parameter(torch.zeros(48, 64))
    assert torch.equal(copy.deepcopy(unit)(x), unit(x))


def test_looking_at_a_weight_computes_nothing(monkeypatch):
    unit = WeightOnlyLinear(64, 48, 8)
    monkeypatch.setattr(WeightOnlyLinear, "dequantize", lambda self: pytest.fail("made dense"))
    shown = unit.weight
    assert (shown.dtype, shown.device.type, tuple(shown.shape), shown.ndim) == (torch.float32, "cpu", (48, 64), 2)
    assert shown.numel() == 48 * 64


def test_convolutions_keep_what_models_ask_for():
    conv = nn.Conv1d(8, 12, 3, stride=2, padding=1)
    unit = CED.like(conv, 4)
    assert (unit.stride, unit.padding, unit.kernel_size, unit.in_channels, unit.out_channels) == (
        (2,),
        (1,),
        (3,),
        8,
        12,
    )
    x = torch.randn(2, 8, 20)
    same = nn.functional.conv1d(x, unit.weight, unit.bias, stride=2, padding=1)
    torch.testing.assert_close(unit(x), same)


def test_gradients_pass_through_the_weight_that_is_shown():
    unit = LED(6, 5, 2)
    unit.weight.square().sum().backward()
    assert unit.encoder.weight.grad.abs().sum() > 0
    assert unit.decoder.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_bit_linear_in_half_precision_stays_finite(dtype, fused):
    from assay.methods.mixers.matmul_free import BitLinear

    layer = BitLinear(64, 32, fused=fused).to(dtype)
    x = torch.zeros(4, 64, dtype=dtype)
    x[1], x[2] = 1e-6, 6e4
    x.requires_grad_()
    y = layer(x)
    y.float().sum().backward()
    assert y.isfinite().all()
    assert x.grad.isfinite().all()
