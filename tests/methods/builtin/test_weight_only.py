"""Weight-only quantisation: the search, the packing, the layer, the transform."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from assay.methods.builtin.weight_only import WeightOnlyLinear, transform
from assay.methods.core import kernels
from assay.methods.core.quantize.formats import FORMATS, PANEL_FORMATS
from assay.methods.core.quantize.groups import dequantize_groups, quantize_groups, quantize_inputs
from assay.methods.transform import Transform, TuneContext

CONTEXT = TuneContext(goal="decode", prompt_tokens=64, new_tokens=64)


@pytest.fixture(params=["compiled", "torch"])
def path(request, monkeypatch):
    """Both ways every operation can take."""
    if request.param == "torch":
        monkeypatch.setattr(kernels, "load", lambda name: False)
    elif not kernels.load("weight_only"):
        pytest.skip("no compiler")
    return request.param


# ---- quantise


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    bits=st.integers(2, 8),
    asymmetric=st.booleans(),
    group=st.sampled_from([8, 16, 32, 64]),
    scale=st.sampled_from([1e-3, 0.05, 1.0, 300.0]),
    shift=st.sampled_from([0.0, 1.0, -7.0]),
)
def test_error_is_at_most_that_of_plain_rounding(seed, bits, asymmetric, group, scale, shift):
    weight = (torch.randn(6, 2 * group, generator=torch.Generator().manual_seed(seed)) + shift) * scale
    codes, s, m = quantize_groups(weight, bits, group, asymmetric=asymmetric)
    assert codes.dtype == torch.uint8
    assert int(codes.max()) < 2**bits
    assert s.dtype == m.dtype == torch.float16
    assert s.shape == m.shape == (6, 2)
    groups = weight.view(-1, group)
    error = (dequantize_groups(codes, s, m) - weight).view(-1, group)
    if asymmetric:
        step = (groups.amax(1) - groups.amin(1)) / (2**bits - 1)
    else:
        step = groups.abs().amax(1) / (2 ** (bits - 1) - 1)
    # half a step a weight, and what float16 does to scale and minimum (11 bits, or 2^-25 near zero)
    rounding = groups.abs().amax(1) * 2**-10 + 2**bits * 2**-24
    assert bool((error.square().mean(1).sqrt() <= step / 2 + rounding).all())
    if bits == 8:
        assert bool((error.abs().amax(1) <= step * 0.6 + 2 * rounding).all())


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), part=st.booleans())
def test_weights_on_a_four_bit_grid_come_back(seed, part):
    generator = torch.Generator().manual_seed(seed)
    scale = (torch.rand(20, 3, 1, generator=generator) + 1e-2).half().float()
    minimum = torch.randn(20, 3, 1, generator=generator).half().float()
    codes = torch.randint(0, 16, (20, 3, 32), generator=generator)
    if part:  # some of the codes only
        first = torch.randint(0, 8, (20, 3, 1), generator=generator)
        codes = first + codes % torch.randint(2, 9, (20, 3, 1), generator=generator)
    else:  # what a quantiser that starts from minimum and maximum leaves
        codes[..., :2] = torch.tensor([0, 15])
    weight = (codes * scale + minimum).view(20, 96)
    found = dequantize_groups(*quantize_groups(weight, 4))
    if part:  # a group of bfloat16 values, there by chance, may stop at an error that bfloat16 would make
        error = (found - weight).view(20, 3, 32).abs().amax(2)
        assert float((error < 2e-6).float().mean()) > 0.9
        assert bool((error <= weight.view(20, 3, 32).abs().amax(2) * 2**-8).all())
    else:
        assert torch.equal(found, weight)


def test_weights_on_a_symmetric_eight_bit_grid_come_back_exactly(path):
    scale = torch.rand(8, 2, 1).half().float()
    codes = torch.randint(-127, 128, (8, 2, 32)).float()
    codes[..., 0] = 127
    weight = (codes * scale).view(8, 64)
    assert torch.equal(dequantize_groups(*quantize_groups(weight, 8, asymmetric=False)), weight)


def test_four_bit_grid_survives_bfloat16(path):
    scale, minimum = torch.rand(16, 2, 1).half().float() + 0.5, torch.randn(16, 2, 1).half().float()
    codes = torch.randint(0, 16, (16, 2, 32))
    codes[..., :2] = torch.tensor([0, 15])
    weight = (codes * scale + minimum).view(16, 64)
    found, s, m = quantize_groups(weight.bfloat16(), 4)
    assert torch.equal(found, codes.view(16, 64).to(torch.uint8))
    assert float((dequantize_groups(found, s, m) - weight).abs().max()) < 0.02 * float(weight.abs().max())


@pytest.mark.parametrize("asymmetric", [True, False])
@pytest.mark.parametrize("bits", [3, 4, 8])
def test_compiled_search_finds_what_torch_finds(bits, asymmetric, monkeypatch):
    if not kernels.load("weight_only"):
        pytest.skip("no compiler")
    torch.manual_seed(0)
    weight = torch.randn(40, 96) * torch.rand(40, 1).exp()
    compiled = dequantize_groups(*quantize_groups(weight, bits, asymmetric=asymmetric))
    monkeypatch.setattr(kernels, "load", lambda name: False)
    plain = dequantize_groups(*quantize_groups(weight, bits, asymmetric=asymmetric))
    a, b = (compiled - weight).square().mean(), (plain - weight).square().mean()
    assert abs(float(a / b) - 1) < 1e-3


def test_search_beats_plain_rounding(path):
    torch.manual_seed(0)
    weight = torch.randn(64, 256)
    groups = weight.view(-1, 32)
    low, high = groups.amin(1, keepdim=True), groups.amax(1, keepdim=True)
    plain = ((groups - low) / (high - low) * 15).round() * (high - low) / 15 + low
    found = dequantize_groups(*quantize_groups(weight, 4))
    assert float((found - weight).square().mean()) < 0.95 * float((plain - groups).square().mean())


def test_constant_and_zero_groups(path):
    weight = torch.tensor([[0.0] * 32 + [0.25] * 32, [-3.0] * 32 + [1e-9] * 32])
    for bits, asymmetric in ((4, True), (8, True), (8, False)):
        found = dequantize_groups(*quantize_groups(weight, bits, asymmetric=asymmetric))
        torch.testing.assert_close(found, weight, atol=1e-7, rtol=2e-3 if not asymmetric else 0)


@pytest.mark.parametrize(
    ("weight", "bits", "group", "message"),
    [
        (torch.zeros(4, 4, 32), 4, 32, "weight must have 2 dimensions"),
        (torch.zeros(4, 32), 9, 32, "bits must be a whole number at least 2 and at most 8"),
        (torch.zeros(4, 48), 4, 32, "group must divide the 48 inputs"),
        (torch.full((4, 32), torch.nan), 4, 32, "weight must be finite"),
        (torch.full((4, 32), 1e5), 4, 32, "weight must fit float16"),
    ],
)
def test_quantize_says_what_is_wrong(weight, bits, group, message):
    with pytest.raises(ValueError, match=message):
        quantize_groups(weight, bits, group)


# ---- packing


@pytest.mark.parametrize("kind", PANEL_FORMATS)
@pytest.mark.parametrize("outputs", [1, 32, 50, 96])
def test_packing_keeps_the_weights(kind, outputs):
    weight = torch.randn(outputs, 64)
    packed = FORMATS[kind].pack(weight)["packed"]
    assert packed.numel() == FORMATS[kind].bytes(outputs, 64)
    expected = {
        "fp32": lambda: weight,
        "bf16": lambda: weight.bfloat16().float(),
        "int8": lambda: dequantize_groups(*quantize_groups(weight, 8, asymmetric=False)),
        "int4": lambda: dequantize_groups(*quantize_groups(weight, 4)),
    }[kind]()
    torch.testing.assert_close(FORMATS[kind].unpack({"packed": packed}, outputs, 64), expected, rtol=1e-6, atol=0)


def test_bits_per_weight():
    assert FORMATS["int4"].bytes(64, 128) * 8 / (64 * 128) == 5.0
    assert FORMATS["int8"].bytes(64, 128) * 8 / (64 * 128) == 8.5


def test_pack_says_what_is_wrong():
    with pytest.raises(ValueError, match="int4 weights need a multiple of 32 inputs, got 48"):
        WeightOnlyLinear.from_linear(nn.Linear(48, 4), 4)
    with pytest.raises(ValueError, match="bf16 weights need a multiple of 2"):
        FORMATS["bf16"].check(3)


# ---- the layer


@pytest.mark.parametrize("rows", [1, 2, 5, 64, 65, 130])
@pytest.mark.parametrize("kind", PANEL_FORMATS)
def test_kernel_agrees_with_the_reference(kind, rows):
    if not kernels.load("weight_only"):
        pytest.skip("no compiler")
    torch.manual_seed(rows)
    weight, x = torch.randn(70, 96), torch.randn(rows, 96) * torch.rand(rows, 1).exp()
    packed = FORMATS[kind].pack(weight)["packed"]
    y = torch.ops.assay.weight_only_linear(x, packed, FORMATS[kind].id, 70)
    inputs = quantize_inputs(x) if kind.startswith("int") else x
    expected = inputs.double() @ FORMATS[kind].unpack({"packed": packed}, 70, 96).double().T
    tolerance = {"fp32": 1e-5, "bf16": 1e-4, "int8": 1e-5, "int4": 1e-5}[kind]
    torch.testing.assert_close(y.double(), expected, atol=tolerance * float(expected.abs().max()), rtol=0)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_layer_stays_close_to_the_linear_layer(bits, dtype, path):
    torch.manual_seed(0)
    linear = nn.Linear(128, 70)
    layer = WeightOnlyLinear.from_linear(linear, bits)
    x = torch.randn(2, 3, 128)
    y = layer(x.to(dtype)).detach()
    assert y.dtype == dtype
    assert y.shape == (2, 3, 70)
    expected = linear(x).detach()
    error = (y.float() - expected).square().mean().sqrt() / expected.square().mean().sqrt()
    assert float(error) < {4: 0.1, 8: 0.02}[bits]


def test_inputs_are_rounded_to_int8_in_groups():
    x = torch.randn(3, 64)
    x[0, :32] *= 1000  # a large group does not cost the other its precision
    error = (quantize_inputs(x) - x).abs()
    assert float(error[0, 32:].max()) <= float(x[0, 32:].abs().max()) / 254 * 1.001
    assert torch.equal(quantize_inputs(torch.zeros(1, 32)), torch.zeros(1, 32))


def test_gradients_reach_the_inputs():
    layer = WeightOnlyLinear.from_linear(nn.Linear(64, 8), 4)
    x = torch.randn(2, 64, requires_grad=True)
    layer(x).sum().backward()
    torch.testing.assert_close(x.grad, layer.dequantize().sum(0).expand(2, -1))
    with torch.no_grad():
        assert not layer(x).requires_grad


def test_state_dict_round_trip(path):
    torch.manual_seed(1)
    layer = WeightOnlyLinear.from_linear(nn.Linear(64, 40), 4)
    other = WeightOnlyLinear(64, 40, 4, bias=True)
    other.load_state_dict(layer.state_dict())
    x = torch.randn(5, 64)
    assert torch.equal(layer(x), other(x))
    assert torch.equal(copy.deepcopy(layer)(x), layer(x))
    assert layer.to(torch.bfloat16).packed.dtype == torch.uint8


def test_empty_batch(path):
    assert WeightOnlyLinear(64, 40, 8)(torch.empty(0, 64)).shape == (0, 40)


def test_layer_says_what_is_wrong():
    with pytest.raises(ValueError, match="bits must be one of 4, 8, got 3"):
        WeightOnlyLinear(64, 8, 3)
    with pytest.raises(ValueError, match="multiple of 32 inputs"):
        WeightOnlyLinear(60, 8, 4)
    with pytest.raises(ValueError, match="x must have 64 values"):
        WeightOnlyLinear(64, 8, 4)(torch.zeros(2, 32))
    with pytest.raises(ValueError, match="packed must be uint8"):
        WeightOnlyLinear.from_packed(torch.zeros(3, dtype=torch.uint8), 64, 8, 4)


# ---- the transform


class Tiny(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(50, 64)
        self.up, self.odd, self.down = nn.Linear(64, 96), nn.Linear(96, 50), nn.Linear(50, 64)
        self.lm_head = nn.Linear(64, 50, bias=False)
        self.lm_head.weight = self.embed.weight

    def get_input_embeddings(self):
        return self.embed

    def get_output_embeddings(self):
        return self.lm_head

    def forward(self, ids):
        return self.lm_head(self.down(self.odd(self.up(self.embed(ids)))))


def test_transform_replaces_what_fits():
    assert isinstance(transform, Transform)
    torch.manual_seed(0)
    model = Tiny()
    before = model(torch.arange(10)).detach()
    assert transform.applies_to(model, CONTEXT).applies == kernels.load("weight_only")
    config = transform.configs(model, CONTEXT)[0]
    assert config == {"bits": 4, "head_bits": 8}
    made = transform.apply(model, config, CONTEXT)
    kinds = [type(getattr(made, name)).__name__ for name in ("up", "odd", "down", "lm_head")]
    assert kinds == ["WeightOnlyLinear", "WeightOnlyLinear", "Linear", "WeightOnlyLinear"]
    assert (made.up.bits, made.lm_head.bits) == (4, 8)
    assert made.embed.weight.dtype == torch.float32
    after = made(torch.arange(10)).detach()
    assert float((after - before).square().mean() / before.square().mean()) < 0.05


def test_memory_goal_leaves_a_tied_head_alone():
    model = Tiny()
    config = transform.configs(model, TuneContext(goal="memory", prompt_tokens=8, new_tokens=8))[0]
    assert config["head_bits"] is None
    head = model.lm_head
    assert transform.apply(model, config, CONTEXT).lm_head is head


def test_transform_says_what_is_wrong():
    assert "no linear layer" in transform.applies_to(nn.Linear(3, 4), CONTEXT).reason
    with pytest.raises(ValueError, match="bits must be one of 4, 8"):
        transform.apply(Tiny(), {"bits": 5}, CONTEXT)
    with pytest.raises(ValueError, match="head_bits must be"):
        transform.apply(Tiny(), {"head_bits": 3}, CONTEXT)
    with pytest.raises(ValueError, match=r"unknown configuration \['group'\]"):
        transform.apply(Tiny(), {"group": 64}, CONTEXT)
    with pytest.raises(ValueError, match="no linear layer"):
        transform.apply(nn.Sequential(nn.Linear(3, 4)), {}, CONTEXT)


@pytest.mark.model
def test_bundled_model_comes_through_four_bits_unchanged(smollm2):
    layers = smollm2.model.model.layers
    for linear in (layers[0].self_attn.q_proj, layers[7].mlp.down_proj, layers[29].mlp.up_proj):
        assert torch.equal(
            FORMATS["int4"].unpack(FORMATS["int4"].pack(linear.weight), *linear.weight.shape), linear.weight
        )


@pytest.mark.slow
@pytest.mark.model
def test_perplexity_of_real_text_stays(smollm2):
    from assay.workloads.quality import window_nll
    from assay.workloads.text import heldout_windows

    windows = heldout_windows(smollm2.tokenizer, window=256, n=3)
    before = float(window_nll(smollm2.model, windows).mean())
    made = transform.apply(copy.deepcopy(smollm2.model), {"bits": 4, "head_bits": 8}, CONTEXT)
    after = float(window_nll(made, windows).mean())
    assert abs(after - before) < 0.01  # nats per token: 1 % of perplexity


@pytest.mark.parametrize("bits", [4, 8])
def test_rows_beyond_float16_scales_keep_their_weights(bits, path):
    torch.manual_seed(0)
    linear = nn.Linear(64, 40)
    with torch.no_grad():
        linear.weight[3] *= 1e-6
        linear.weight[7] *= 1e-30
        linear.weight[9] *= 1e7
        linear.bias.zero_()
        layer, x = WeightOnlyLinear.from_linear(linear, bits), torch.randn(5, 64)
        exact = linear(x).double()
        error = ((layer(x) - exact).norm(dim=0) / exact.norm(dim=0)).amax()
    assert float(error) < {4: 0.2, 8: 0.03}[bits]
    again = WeightOnlyLinear(64, 40, bits, bias=True)
    again.load_state_dict(layer.state_dict())
    assert torch.equal(again(x), layer(x))
    assert torch.equal(layer.to(torch.bfloat16).gain, again.gain)


def test_which_path_it_took_is_noted(path):
    before = kernels.paths()
    WeightOnlyLinear(64, 40, 8)(torch.randn(2, 64))
    name = f"weight-only linear: {'kernel' if path == 'compiled' else 'torch'}"
    assert kernels.paths()[name] == before.get(name, 0) + 1
