"""Packing, the integer products, and the layer on top of them."""

from __future__ import annotations

import pytest
import torch
from tests.properties.apart import built_with
from torch import nn

from assay.measure.cost import count_cost
from assay.measure.machine import machine
from assay.methods.core import kernels
from assay.methods.core.layers.packed import (
    KINDS,
    PackedLinear,
    pack,
    packed_bytes,
    product,
    product_reference,
    quantize_tokens,
    unpack,
)
from assay.methods.core.quantize.formats import PER_BYTE

SHAPES = [(1, 1), (3, 4), (5, 63), (4, 64), (7, 65), (9, 256), (6, 320), (33, 517), (2, 1280)]


def some_codes(n, k, kind, seed=0):
    generator = torch.Generator().manual_seed(seed)
    if kind == "binary":
        return torch.randint(0, 2, (n, k), generator=generator, dtype=torch.int8) * 2 - 1
    return torch.randint(-1, 2, (n, k), generator=generator, dtype=torch.int8)


@pytest.fixture(params=["compiled", "torch"])
def both_paths(request, monkeypatch):
    """The compiled operators, and the torch path without them."""
    if request.param == "torch":
        monkeypatch.setenv("ASSAY_KERNELS", "0")
    elif kernels.compiler() is None:
        pytest.skip("no C++ compiler on this machine")
    kernels.load.cache_clear()
    yield request.param
    kernels.load.cache_clear()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_packing_round_trips_and_takes_the_bytes_of_the_formula(kind, shape):
    codes = some_codes(*shape, kind)
    packed = pack(codes, kind)
    assert torch.equal(unpack(packed, kind, shape[1]), codes)
    assert packed.numel() + 4 == packed_bytes(kind, *shape)
    assert packed.shape[1] == -(-shape[1] // PER_BYTE[kind])


def test_every_base_3_byte_is_told_apart():
    codes = torch.cartesian_prod(*[torch.arange(-1, 2)] * 5).to(torch.int8)
    packed = pack(codes, "base3")
    assert len(packed.unique()) == 243
    assert torch.equal(unpack(packed, "base3", 5), codes)


def test_bits_a_weight():
    assert packed_bytes("ternary", 1000, 1000, 0) * 8 / 1e6 == 2.0
    assert packed_bytes("base3", 1000, 1000, 0) * 8 / 1e6 == 1.6
    assert packed_bytes("binary", 1000, 1000, 0) * 8 / 1e6 == 1.0
    assert packed_bytes("binary", 10, 9, 10) == 10 * 2 + 40


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_products_are_exact_for_every_batch(kind, shape, both_paths):
    weight = some_codes(*shape, kind)
    packed = pack(weight, kind)
    for m in (1, 2, 3, 4, 5, 11):
        x = torch.randint(-128, 128, (m, shape[1]), dtype=torch.int8)
        found = product(x, packed, kind)
        assert found.dtype == torch.int32
        assert torch.equal(found, (x.long() @ weight.long().T).int())
        assert torch.equal(product_reference(x, packed, kind), found)
    strided = torch.randint(-128, 128, (shape[1], 3), dtype=torch.int8).T
    assert torch.equal(product(strided, packed, kind), (strided.long() @ weight.long().T).int())


def test_the_largest_sums_do_not_overflow(both_paths):
    for kind in KINDS:
        packed = pack(torch.ones(4, 4099, dtype=torch.int8), kind)
        for value in (-128, 127):
            for m in (1, 2):  # one row alone goes another way
                x = torch.full((m, 4099), value, dtype=torch.int8)
                assert (product(x, packed, kind) == value * 4099).all()


def test_token_codes():
    x = torch.tensor([[1.0, -2.0, 0.5, 2.0], [0, 0, 0, 0]])
    codes, step = quantize_tokens(x)
    assert codes.tolist() == [[64, -127, 32, 127], [0, 0, 0, 0]]  # 63.5 rounds to the even 64
    assert step[0].item() == pytest.approx(2 / 127)
    again, larger = quantize_tokens(4 * x)
    assert torch.equal(again, codes)
    assert larger[0] == 4 * step[0]
    assert (codes.float() * step - x).abs().max() <= step.max() / 2


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("norm", [None, 1e-8])
def test_the_layer_follows_its_formula(kind, norm, both_paths):
    torch.manual_seed(0)
    codes, scale, bias, gain = some_codes(37, 130, kind), torch.rand(37) + 0.1, torch.randn(37), torch.rand(130) + 0.5
    layer = PackedLinear.from_codes(
        codes, scale, kind, bias=bias, norm_weight=None if norm is None else gain, norm_eps=norm
    )
    x = torch.randn(2, 5, 130)
    normed = x if norm is None else x * (x.square().mean(-1, keepdim=True) + norm).rsqrt() * gain
    inputs, step = quantize_tokens(normed)
    expected = (inputs.double() @ codes.double().T) * step * scale + bias
    # where 127 x / max|x| lies within rounding of a half the code may be the neighbour
    torch.testing.assert_close(layer(x).double(), expected, rtol=1e-5, atol=2 * float(step.max() * scale.max()))
    assert (layer(x).double() - expected).abs().median() < 1e-5
    torch.testing.assert_close(layer.on_codes(inputs, step).double(), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(layer.codes(), codes)
    torch.testing.assert_close(layer.dequantize(), codes.float() * scale[:, None])
    assert layer(x.bfloat16()).dtype == torch.bfloat16
    assert layer(x.transpose(0, 1)).shape == (5, 2, 37)
    torch.testing.assert_close(layer(x.transpose(0, 1)), layer(x).transpose(0, 1))
    assert layer(x[:0]).shape == (0, 5, 37)


@pytest.mark.parametrize("kind", KINDS)
def test_a_shift_of_the_inputs_adds_a_term_of_rank_one(kind, both_paths):
    codes, scale = some_codes(19, 70, kind), torch.rand(19)
    layer = PackedLinear.from_codes(codes, scale, kind)
    inputs = torch.randint(0, 3, (4, 70), dtype=torch.int8)
    step, shift = torch.tensor(0.3), torch.tensor(-0.17)
    expected = (inputs.double() * 0.3 - 0.17) @ (codes.double() * scale.double()[:, None]).T
    torch.testing.assert_close(layer.on_codes(inputs, step, shift).double(), expected, rtol=1e-5, atol=1e-5)


def test_values_that_are_not_finite_show(both_paths):
    layer = PackedLinear.from_codes(some_codes(5, 40, "ternary"), torch.ones(1))
    x = torch.randn(2, 40)
    x[1, 3] = torch.nan
    y = layer(x)
    assert y[0].isfinite().all()
    assert not y[1].isfinite().any()


def test_scales_stay_in_float32_and_travel_in_the_state_dict():
    layer = PackedLinear.from_codes(some_codes(5, 40, "base3"), torch.rand(1), "base3", norm_eps=1e-8)
    x = torch.randn(3, 40)
    before = layer(x)
    layer.bfloat16()
    assert layer.scale.dtype == layer.norm_weight.dtype == torch.float32
    assert torch.equal(layer(x), before)
    other = PackedLinear(40, 5, "base3", scales="tensor", norm_eps=1e-8)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x), before)
    held = sum(t.numel() * t.element_size() for t in other.state_dict().values())
    assert held == packed_bytes("base3", 5, 40) + 40 * 4


def test_the_kernel_is_booked_as_a_linear_layer():
    if not kernels.load("lowbit"):
        pytest.skip("no C++ compiler on this machine")
    layer = nn.Sequential(PackedLinear.from_codes(some_codes(5, 40, "ternary"), torch.ones(5)))
    assert count_cost(layer, torch.randn(3, 40)).macs == 3 * 40 * 5


@pytest.mark.slow
@pytest.mark.parametrize("flags", ["-march=cascadelake", "-march=haswell", "-march=x86-64"])
def test_the_other_instruction_sets_give_the_same_integers(flags, tmp_path):
    if kernels.compiler() is None:
        pytest.skip("no C++ compiler on this machine")
    if flags == "-march=cascadelake" and "avx512_vnni" not in machine().flags:
        pytest.skip("this processor has no AVX-512 VNNI")
    check = f"""
import torch
assert kernels.load("lowbit")
from assay.methods.core.layers.packed import *
for kind in KINDS:
    for n, k in {SHAPES}:
        w = torch.randint(0, 2, (n, k), dtype=torch.int8) * 2 - 1
        if kind != "binary":
            w[torch.rand(n, k) < 0.3] = 0
        for m in (1, 6):
            x = torch.randint(-128, 128, (m, k), dtype=torch.int8)
            assert torch.equal(product(x, pack(w, kind), kind), (x.long() @ w.long().T).int()), (kind, n, k, m)
layer = PackedLinear.from_codes(w, torch.rand(n), kind, norm_eps=1e-8)
x = torch.randn(4, k)
assert (layer(x) - layer.reference(x)).abs().median() < 1e-4
f, c, h0 = torch.rand(2, 9, 70), torch.randn(2, 9, 70), torch.randn(2, 70)
h = torch.ops.assay.gated_scan(f, c, h0)
torch.testing.assert_close(h[:, 0], f[:, 0] * h0 + c[:, 0])
"""
    built_with(check, flags, cache=tmp_path)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: pack(torch.zeros(2, 3), "int4"), "kind"),
        (lambda: pack(torch.zeros(2, 3), "binary"), "-1 or 1"),
        (lambda: pack(torch.full((2, 3), 0.5), "ternary"), "-1, 0 or 1"),
        (lambda: pack(torch.full((2, 3), 2), "base3"), "-1, 0 or 1"),
        (lambda: pack(torch.zeros(3), "ternary"), "matrix"),
        (lambda: unpack(torch.zeros(2, 3, dtype=torch.uint8), "ternary", 13), "packed"),
        (lambda: product(torch.zeros(2, 3), torch.zeros(2, 1, dtype=torch.uint8), "ternary"), "int8"),
        (lambda: PackedLinear(4, 4, "quaternary"), "kind"),
        (lambda: PackedLinear(0, 4), "in_features"),
        (lambda: PackedLinear(4, 4)(torch.zeros(2, 5)), "last dimension"),
        (lambda: PackedLinear.from_codes(torch.zeros(4, 4), torch.ones(3)), "scale"),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_nothing_but_floating_numbers_is_computed_with():
    layer = PackedLinear.from_codes(torch.ones(2, 3, dtype=torch.int8), torch.ones(1))
    for wrong in (torch.ones(2, 3, dtype=torch.int64), torch.ones(2, 3) > 0, torch.ones(2, 3, dtype=torch.complex64)):
        with pytest.raises(TypeError, match="x must hold floating-point numbers"):
            layer(wrong)
        with pytest.raises(TypeError, match="x must hold floating-point numbers"):
            quantize_tokens(wrong)
    with pytest.raises(TypeError, match="codes must hold whole numbers"):
        pack(torch.ones(2, 3) > 0, "ternary")


def test_what_a_layer_is_made_of_must_fit_and_count():
    codes, scale = torch.ones(2, 3, dtype=torch.int8), torch.ones(1)
    for name, options in (
        ("bias must have shape", {"bias": torch.ones(3)}),
        ("bias must be finite", {"bias": torch.full((2,), torch.nan)}),
        ("norm_weight must have shape", {"norm_eps": 1e-6, "norm_weight": torch.ones(2)}),
        ("norm_weight must be left out", {"norm_weight": torch.full((3,), 5.0)}),
    ):
        with pytest.raises(ValueError, match=name):
            PackedLinear.from_codes(codes, scale, **options)
