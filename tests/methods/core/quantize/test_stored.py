"""Codes in rows, words and panels are the same numbers, and layers that are read from files compute with them."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from assay.methods.core.quantize.formats import pack_groups, pack_wide
from assay.methods.core.quantize.grouped_linear import GroupedLinear
from assay.methods.core.quantize.stored import (
    Groups,
    group_panels,
    pack_words,
    read_panels,
    unpack_words,
    wide_panels,
    zero_points,
)

SHAPES = [(70, 96), (33, 64), (128, 32), (1, 32)]


def drawn(high, *shape, seed=0):
    return torch.randint(0, high, shape, generator=torch.Generator().manual_seed(seed)).to(torch.uint8)


@pytest.mark.parametrize(("rows", "width"), [*SHAPES, (70, 30)])
def test_wide_panels_are_those_of_the_kernel(monkeypatch, rows, width):
    monkeypatch.setattr("assay.methods.core.quantize.stored.AT_ONCE", 64 * width)  # more than one step
    codes = (drawn(256, rows, width).to(torch.int16) - 128).to(torch.int8)
    packed, offset = wide_panels(lambda first, last: codes[first:last], rows, width)
    assert torch.equal(packed, pack_wide(codes))
    assert torch.equal(offset[:rows], codes.sum(1, dtype=torch.int32) * -128)
    assert not offset[rows:].any()


@pytest.mark.parametrize(("rows", "width"), SHAPES)
@pytest.mark.parametrize("bits", [4, 8])
def test_group_panels_are_those_of_the_kernels_and_come_back(monkeypatch, rows, width, bits):
    monkeypatch.setattr("assay.methods.core.quantize.stored.AT_ONCE", 32 * width)
    codes, scale, minimum = drawn(2**bits, rows, width), torch.randn(rows, width // 32).half(), None
    if bits == 4:
        minimum = torch.randn(rows, width // 32).half()
    whole = Groups(codes, scale, minimum)

    def read(first, last):
        return Groups(*(None if part is None else part[first:last] for part in whole))

    packed = group_panels(read, rows, width, bits)
    assert torch.equal(packed, pack_groups(codes, scale, -128 * scale if minimum is None else minimum, bits))
    again = read_panels(packed, rows, width, bits)
    assert torch.equal(again.codes, codes)
    assert torch.equal(again.scale, scale)
    assert (again.minimum is None) == (bits == 8)
    assert minimum is None or torch.equal(again.minimum, minimum)


def test_zero_points_are_exact_or_none():
    scale = torch.tensor([[0.5, 0.0, -0.25]]).half()
    assert zero_points(scale, torch.tensor([[-1.5, 0.0, 0.25 * 15]]).half()).tolist() == [[3, 8, 15]]
    assert zero_points(scale, torch.tensor([[-1.4, 0.0, 0.0]]).half()) is None  # no whole number of steps
    assert zero_points(scale, torch.tensor([[-8.0, 0.0, 0.0]]).half()) is None  # sixteen steps
    assert zero_points(scale, torch.tensor([[0.5, 0.0, 0.0]]).half()) is None  # minus one
    assert zero_points(scale, torch.tensor([[0.0, 1.0, 0.0]]).half()) is None  # a constant group that is not 0


@pytest.mark.parametrize(
    ("codes", "bits", "error", "says"),
    [
        (torch.zeros(2, 8), 4, TypeError, "codes must hold"),
        (torch.zeros(8, dtype=torch.uint8), 4, ValueError, "codes must have 2 dimensions"),
        (torch.zeros(2, 8, dtype=torch.uint8), 3, ValueError, "bits must be one of 4, 8"),
    ],
)
def test_words_refuse_what_they_cannot_hold(codes, bits, error, says):
    with pytest.raises(error, match=says):
        pack_words(codes, bits)


def test_words_that_are_not_as_long_as_the_codes_are_refused():
    with pytest.raises(ValueError, match=r"words must be int32 \(rows, 2\), got torch.int32 \(3, 1\)"):
        unpack_words(torch.zeros(3, 1, dtype=torch.int32), 4, 16)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("asymmetric", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_grouped_layer_is_the_dense_layer_it_stands_for(monkeypatch, bits, asymmetric, dtype):
    monkeypatch.setattr("assay.methods.core.quantize.stored.AT_ONCE", 100)  # a few rows at a time
    codes, scale, zero = (
        drawn(2**bits, 24, 48),
        torch.rand(24, 3),
        drawn(2**bits, 24, 3, seed=1) if asymmetric else None,
    )
    layer = GroupedLinear(pack_words(codes, bits), scale.to(dtype), zero, 48, bits)
    middle = torch.full((24, 3), 2.0 ** (bits - 1)) if zero is None else zero.float()
    dense = ((codes.view(24, 3, 16).float() - middle[..., None]) * scale.to(dtype).float()[..., None]).view(24, 48)
    assert torch.equal(layer.dequantize(), dense)
    x = torch.randn(2, 5, 48).to(dtype)
    torch.testing.assert_close(layer(x), F.linear(x, dense.to(dtype)), rtol=1e-5, atol=1e-3)  # sums in another order
    layer.to(torch.bfloat16)
    assert layer.scale.dtype == dtype
    assert layer.weight.dtype == torch.bfloat16
    assert layer.weight.shape == (24, 48)


@pytest.mark.parametrize(
    ("changes", "error", "says"),
    [
        ({"words": torch.zeros(8, 2)}, TypeError, "words must hold"),
        ({"words": torch.zeros(8, 3, dtype=torch.int32)}, ValueError, "words must have shape"),
        ({"scale": torch.ones(8, 3)}, ValueError, "scale must have 8 rows of groups that divide 16 inputs"),
        ({"scale": torch.ones(4, 1)}, ValueError, "scale must have 8 rows"),
        ({"scale": torch.full((8, 1), float("nan"))}, ValueError, "scale must be finite"),
        ({"zero": torch.ones(8, 1)}, TypeError, "zero must hold"),
        ({"bits": 5}, ValueError, "bits must be one of 4, 8"),
        ({"in_features": 0}, ValueError, "in_features must be"),
    ],
)
def test_a_grouped_layer_refuses_what_does_not_fit(changes, error, says):
    given = {
        "words": torch.zeros(8, 2, dtype=torch.int32),
        "scale": torch.ones(8, 1),
        "zero": None,
        "in_features": 16,
        "bits": 4,
    }
    with pytest.raises(error, match=says):
        GroupedLinear(**(given | changes))


def test_a_grouped_layer_refuses_inputs_of_another_width():
    layer = GroupedLinear(torch.zeros(8, 2, dtype=torch.int32), torch.ones(8, 1), None, 16, 4)
    with pytest.raises(ValueError, match=r"x must have 16 values in its last dimension, got \(3, 8\)"):
        layer(torch.ones(3, 8))
