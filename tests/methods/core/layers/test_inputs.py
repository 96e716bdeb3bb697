"""Figures of what layers are given, against the inputs themselves."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers.pytorch_utils import Conv1D

from assay.methods.core.layers.inputs import input_moments, input_norms, rows_of, run, watch


def test_norms_and_moments_are_those_of_all_inputs_together():
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), Conv1D(3, 5))
    batches = [torch.randn(2, 4, 6), torch.randn(7, 6)]
    first = torch.cat([x.reshape(-1, 6) for x in batches])
    second = torch.cat([model[1](model[0](x)).reshape(-1, 5) for x in batches]).double()
    norms = input_norms(model, ["0", "2"], batches)
    assert torch.allclose(norms["0"], first.double().norm(dim=0)[None])
    assert torch.allclose(norms["2"], second.norm(dim=0)[None])
    moments = input_moments(model, ["2"], batches)
    assert torch.allclose(moments["2"], second.T @ second / len(second))
    assert moments["2"].dtype == torch.float64


@pytest.mark.parametrize("groups", [1, 2])
def test_the_norms_of_a_convolution_are_those_of_its_patches(groups):
    conv = nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=groups)
    x = torch.randn(3, 4, 8, 8)
    norms = input_norms(nn.Sequential(conv), ["0"], [x])["0"]
    weight = torch.broadcast_to(norms, conv.weight.shape)
    # by definition: the root of the summed squares of what each kernel entry multiplies
    for out in (0, 5):
        for channel in range(4 // groups):
            one = torch.zeros_like(conv.weight)
            one[out, channel, 0, 2] = 1.0
            seen = F.conv2d(x, one, None, 2, 1, groups=groups)[:, out]
            assert float(weight[out, channel, 0, 2]) == pytest.approx(float(seen.double().norm()), rel=1e-5)
    rows = rows_of(conv, x)
    assert rows.shape == (groups, 3 * 16, 4 // groups * 9)


def test_a_batch_may_be_a_tensor_arguments_or_a_mapping():
    model = nn.Bilinear(2, 3, 4)
    x, y = torch.randn(5, 2), torch.randn(5, 3)
    assert torch.equal(run(model, (x, y)), model(x, y))
    assert torch.equal(run(model, {"input2": y, "input1": x}), model(x, y))
    assert torch.equal(run(nn.ReLU(), x), x.relu())


def test_the_model_runs_in_evaluation_mode_and_is_left_as_it_was():
    model = nn.Sequential(nn.Dropout(0.5), nn.Linear(4, 4), nn.BatchNorm1d(4))
    model[2].eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    x = torch.randn(8, 4)
    assert torch.allclose(input_norms(model, ["1"], [x])["1"][0], x.double().norm(dim=0))
    assert [m.training for m in (model, model[0], model[1], model[2])] == [True, True, True, False]
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_what_does_not_fit_is_refused():
    model = nn.Sequential(nn.Linear(4, 4), nn.Conv2d(1, 1, 1))
    with pytest.raises(ValueError, match="names must be modules of Sequential, got '7'"):
        watch(model, ["7"], [], lambda *_: None)
    with pytest.raises(ValueError, match="batches must reach every layer, got none that reaches 0"):
        input_norms(model, ["0"], [])
    with pytest.raises(TypeError, match="names must be linear layers, got '1', a Conv2d"):
        input_moments(model, ["1"], [])
    with pytest.raises(ValueError, match="the input of 0 must be finite"):
        input_moments(nn.Sequential(nn.Linear(4, 4)), ["0"], [torch.full((1, 4), torch.nan)])
    with pytest.raises(TypeError, match="layer must be a linear layer or a 2-D convolution, got Embedding"):
        rows_of(nn.Embedding(2, 2), torch.zeros(1, 2))
    with pytest.raises(TypeError, match="layer must pad with a number of zeros"):
        rows_of(nn.Conv2d(1, 1, 3, padding=1, padding_mode="reflect"), torch.zeros(1, 1, 4, 4))
