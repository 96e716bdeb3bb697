"""Depthwise convolutions channels first: torch's own, to rounding, for any size of plane."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from assay.measure.cost import count_cost
from assay.methods.compression.fast_sparse_convnets import DepthwiseConv3x3, MobileNet, channels_first_, depthwise
from assay.methods.core import kernels

needs_compiler = pytest.mark.skipif(kernels.compiler() is None, reason="no C++ compiler on this machine")


def parts(channels=6, *, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(channels, 1, 3, 3, generator=generator), torch.randn(channels, generator=generator)


@needs_compiler
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize(
    "size",
    [(1, 1), (1, 5), (2, 2), (4, 4), (5, 7), (7, 7), (8, 15), (14, 14), (15, 16), (16, 33), (3, 17), (6, 49), (31, 64)],
)
def test_it_is_torchs_convolution_for_any_plane(size, stride):
    (weight, bias), x = parts(), torch.randn(2, 6, *size, generator=torch.Generator().manual_seed(1))
    expected = nn.functional.conv2d(x.double(), weight.double(), bias.double(), stride, 1, 1, 6).clamp(-1, 2)
    before = kernels.paths().get("depthwise convolution: kernel", 0)
    found = DepthwiseConv3x3(weight, bias, stride=stride, low=-1.0, high=2.0)(x)
    assert kernels.paths()["depthwise convolution: kernel"] == before + 1
    torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=1e-5)
    plain = DepthwiseConv3x3(weight, stride=stride)(x.contiguous(memory_format=torch.channels_last))
    expected = nn.functional.conv2d(x.double(), weight.double(), None, stride, 1, 1, 6)
    torch.testing.assert_close(plain.double(), expected, atol=1e-5, rtol=1e-5)


def test_without_the_kernel_torch_computes_it(monkeypatch):
    monkeypatch.setattr(depthwise, "_ready", False)
    (weight, bias), x = parts(), torch.randn(2, 6, 5, 7)
    found = DepthwiseConv3x3(weight, bias, high=0.5)(x)
    torch.testing.assert_close(found, nn.functional.conv2d(x, weight, bias, 1, 1, 1, 6).clamp(max=0.5))


def test_gradients_reach_the_inputs():
    weight, bias = parts()
    x = torch.randn(1, 6, 5, 5, requires_grad=True)
    (found,) = torch.autograd.grad(DepthwiseConv3x3(weight, bias, low=0.0)(x).sum(), x)
    (expected,) = torch.autograd.grad(nn.functional.conv2d(x, weight, bias, 1, 1, 1, 6).relu().sum(), x)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@needs_compiler
def test_nan_stays_within_its_neighbourhood_and_passes_the_clamp():
    x = torch.zeros(1, 1, 6, 6)
    x[0, 0, 2, 3] = math.nan
    y = DepthwiseConv3x3(torch.ones(1, 1, 3, 3), low=0.0, high=6.0)(x)[0, 0]
    assert y.isnan().nonzero().tolist() == [[r, c] for r in (1, 2, 3) for c in (2, 3, 4)]


@needs_compiler
def test_the_number_of_threads_changes_no_bit():
    (weight, bias), before, found = parts(), torch.get_num_threads(), []
    x = torch.randn(3, 6, 9, 11)
    try:
        for threads in (1, 2, 4):
            torch.set_num_threads(threads)
            found.append(DepthwiseConv3x3(weight, bias)(x))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@needs_compiler
@pytest.mark.parametrize("stride", [1, 2])
def test_operations_and_shapes_are_known(stride):
    layer = DepthwiseConv3x3(*parts(), stride=stride)
    side = -(-7 // stride)
    assert count_cost(layer, torch.zeros(2, 6, 7, 7)).macs == 9 * 2 * 6 * side * side
    with FakeTensorMode(allow_non_fake_inputs=True):
        found = torch.ops.assay.depthwise(torch.empty(2, 6, 7, 7), layer.weight.flatten(1), None, stride, 0.0, 1.0)
    assert found.shape == (2, 6, side, side)


def test_a_network_keeps_its_outputs_and_its_state_travels():
    torch.manual_seed(0)
    model = MobileNet(5, blocks=((16, 1), (32, 2)), stem=(8, 2))
    x = torch.randn(4, 3, 18, 18)
    model(x)  # statistics
    model.eval()
    with torch.no_grad():
        expected = model(x)
        assert channels_first_(model) == ["blocks.0.0", "blocks.1.0"]
        assert [type(child) for child in model.blocks[0][:3]] == [DepthwiseConv3x3, nn.Identity, nn.Identity]
        assert model.blocks[0][0].high == 6.0
        torch.testing.assert_close(model(x), expected, atol=1e-4, rtol=1e-4)
        other = channels_first(MobileNet(5, blocks=((16, 1), (32, 2)), stem=(8, 2)))
        other.load_state_dict(model.state_dict())
        assert torch.equal(other(x), model(x))
        half = model.bfloat16()(x.bfloat16())
        assert half.dtype == torch.bfloat16
        torch.testing.assert_close(half.float(), expected, atol=0.1, rtol=0.1)


def channels_first(model):
    channels_first_(model.eval())
    return model


def test_other_convolutions_are_left_alone():
    convolutions = [
        nn.Conv2d(4, 4, 3, padding=1),
        nn.Conv2d(4, 8, 3, padding=1, groups=4),
        nn.Conv2d(4, 4, 5, padding=2, groups=4),
        nn.Conv2d(4, 4, 3, groups=4),
        nn.Conv2d(4, 4, 3, stride=3, padding=1, groups=4),
        nn.Conv2d(4, 4, 3, padding=1, groups=4, dilation=2),
        nn.Conv2d(4, 4, 3, padding=1, groups=4, padding_mode="reflect"),
    ]
    assert channels_first_(nn.Sequential(*convolutions).eval()) == []
    with pytest.raises(ValueError, match="evaluation mode"):
        channels_first_(nn.Sequential(*convolutions))


def test_what_does_not_fit_is_refused():
    weight, bias = parts()
    with pytest.raises(ValueError, match="weight must have shape"):
        DepthwiseConv3x3(torch.zeros(6, 2, 3, 3))
    with pytest.raises(ValueError, match="bias must have shape"):
        DepthwiseConv3x3(weight, bias[:5])
    with pytest.raises(ValueError, match="stride must be one of 1, 2, got 3"):
        DepthwiseConv3x3(weight, stride=3)
    with pytest.raises(ValueError, match="low must be at most high"):
        DepthwiseConv3x3(weight, low=1.0, high=0.0)
    with pytest.raises(ValueError, match=r"x must be \(batch, 6, height, width\)"):
        DepthwiseConv3x3(weight)(torch.zeros(1, 5, 4, 4))
    with pytest.raises(TypeError, match="x must be float32, bfloat16 or float16"):
        DepthwiseConv3x3(weight)(torch.zeros(1, 6, 4, 4, dtype=torch.float64))
