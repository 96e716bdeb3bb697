"""Small parts of image models, each against its formula."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from assay.methods.core.vision.backbone import map_to_tokens, resized_positions, tokens_to_map
from assay.methods.core.vision.blocks import (
    ConvNormAct,
    DropPath,
    LayerNorm2d,
    Mlp,
    SqueezeExcite,
    drop_path_rates,
    init_transformer,
)


def test_drop_path_leaves_out_whole_samples_and_keeps_the_mean():
    torch.manual_seed(0)
    drop, x = DropPath(0.25), torch.ones(4000, 3, 2, dtype=torch.float64)
    y = drop(x)
    assert set(y.unique().tolist()) == {0.0, 1 / 0.75}
    assert ((y == 0).all((1, 2)) | (y > 0).all((1, 2))).all()
    assert abs(float(y.mean()) - 1) < 0.03  # four deviations
    assert drop.eval()(x) is x
    assert DropPath(0.0)(x) is x
    assert DropPath(0.5)(torch.ones(2, 2, dtype=torch.bfloat16)).dtype == torch.bfloat16
    for rate in (1.0, -0.1, float("nan")):
        with pytest.raises(ValueError, match="rate must be"):
            DropPath(rate)


def test_rates_rise_over_all_blocks_of_all_stages():
    found = drop_path_rates(0.3, (1, 2, 1))
    assert [len(stage) for stage in found] == [1, 2, 1]
    assert sum(found, []) == pytest.approx([0.0, 0.1, 0.2, 0.3])
    assert drop_path_rates(0.5, (1,)) == [[0.0]]


def test_layer_norm_of_a_map_is_over_its_channels():
    torch.manual_seed(0)
    x = torch.randn(2, 5, 3, 4, dtype=torch.float64)
    norm = LayerNorm2d(5).double()
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    mean, variance = x.mean(1, keepdim=True), x.var(1, unbiased=False, keepdim=True)
    wanted = (x - mean) / (variance + 1e-6).sqrt() * norm.weight[:, None, None] + norm.bias[:, None, None]
    assert torch.allclose(norm(x), wanted)
    assert norm(x.contiguous(memory_format=torch.channels_last)).is_contiguous(memory_format=torch.channels_last)


def test_conv_norm_act_is_its_three_parts_and_padding_keeps_the_size():
    torch.manual_seed(0)
    block = ConvNormAct(4, 6, 3, groups=2).eval()
    block.norm.running_mean.normal_()
    block.norm.running_var.uniform_(0.5, 2)
    x = torch.randn(2, 4, 5, 7)
    y = F.conv2d(x, block.conv.weight, padding=1, groups=2)
    y = (y - block.norm.running_mean[:, None, None]) / (block.norm.running_var[:, None, None] + 1e-5).sqrt()
    assert torch.allclose(block(x), y.relu(), atol=1e-5)
    assert (ConvNormAct(4, 6, act=None).eval()(x) < 0).any()
    assert ConvNormAct(4, 6, 1, stride=2)(x).shape == (2, 6, 3, 4)


def test_squeeze_and_excite_weighs_channels_by_their_means():
    torch.manual_seed(0)
    block, x = SqueezeExcite(4, 2), torch.randn(3, 4, 5, 6)
    hidden = (x.mean((2, 3)) @ block.reduce.weight.flatten(1).T + block.reduce.bias).relu()
    gate = (hidden @ block.expand.weight.flatten(1).T + block.expand.bias).sigmoid()
    assert torch.allclose(block(x), x * gate[..., None, None], atol=1e-6)


def test_mlp_and_its_start():
    block = Mlp(4, 16, out=3)
    block.apply(init_transformer)
    assert float(block.fc1.weight.detach().std()) == pytest.approx(0.02, rel=0.5)
    assert block.fc2.bias.abs().max() == 0
    x = torch.randn(2, 5, 4)
    assert torch.allclose(block(x), F.gelu(x @ block.fc1.weight.T) @ block.fc2.weight.T, atol=1e-6)


def test_tokens_and_maps_are_views_of_each_other():
    tokens = torch.arange(24.0).view(1, 6, 4)
    found = tokens_to_map(tokens, 2, 3)
    assert found.shape == (1, 4, 2, 3)
    assert found[0, :, 1, 2].tolist() == tokens[0, 5].tolist()
    assert found.data_ptr() == tokens.data_ptr()
    assert torch.equal(map_to_tokens(found), tokens)


def test_positions_of_another_grid_are_interpolated():
    rows = torch.arange(4.0)[:, None].expand(4, 6)
    positions = torch.stack([rows, rows.flip(0)], -1).reshape(1, 24, 2)
    assert resized_positions(positions, (4, 6), (4, 6)) is positions
    found = resized_positions(positions, (8, 6), (4, 6)).view(8, 6, 2)
    assert found.shape == (8, 6, 2)
    assert (found[1:, :, 0] >= found[:-1, :, 0] - 1e-5).all()  # still a slope
    assert torch.allclose(found[..., 0] + found[..., 1], torch.full((8, 6), 3.0), atol=1e-5)
    assert resized_positions(positions.bfloat16(), (2, 3), (4, 6)).dtype == torch.bfloat16
