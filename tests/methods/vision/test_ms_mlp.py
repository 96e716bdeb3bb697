"""MS-MLP: published sizes, the operator against its formula, ConvNeXt as a special case, what a position sees, and the fused form."""

from __future__ import annotations

import copy
import functools
import itertools

import pytest
import torch
from torch import nn

from assay.measure.cost import count_cost
from assay.methods.core.vision.registry import build
from assay.methods.core.vision.weights import load_weights
from assay.methods.core.vision.windows import ShiftedWindowAttention
from assay.methods.vision.ms_mlp import (
    KERNELS,
    SHIFTS,
    FusedMixShift,
    MixShift,
    MixShiftBlock,
    MixShiftTokens,
    MsMlp,
    MsSwin,
    fuse_mixing,
    shifted,
)

SMALL = {"num_classes": 5, "embed_dim": 10, "depths": (1, 1, 2, 1), "drop_path_rate": 0.0}


@functools.cache
def on_meta(name, **settings):
    with torch.device("meta"):
        return build(name, **settings).eval()


def drawn(module):
    torch.manual_seed(0)
    for value in module.parameters():
        nn.init.normal_(value, std=0.3)
    return module.eval().requires_grad_(False)


def tiny(make=MsMlp, **settings):
    return drawn(make(**{**SMALL, **settings}))


def images(*size, batch=2):
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(1))


def by_formula(mix: MixShift, x: torch.Tensor) -> torch.Tensor:
    """Position by position, channel by channel, in float64: (B, C, H, W)."""
    batch, channels, height, width = x.shape
    out = torch.zeros(x.shape, dtype=torch.float64)
    channel = 0
    for group, size in enumerate(mix.groups):
        steps, reach = mix.shifts[group], mix.kernels[group] // 2
        for own in range(size):
            for convolutions, along in ((mix.dwconv_lr, 1), (mix.dwconv_td, 0)):
                weight = convolutions[group].weight[own, 0].double()
                out[:, channel] += convolutions[group].bias[own].double()
                for y, z, dy, dz in itertools.product(
                    range(height), range(width), range(-reach, reach + 1), range(-reach, reach + 1)
                ):
                    place = [y + dy, z + dz]
                    if not (0 <= place[0] < height and 0 <= place[1] < width):
                        continue  # zeros around what was shifted
                    place[along] -= steps
                    if mix.edge == "zero" and not 0 <= place[along] < (height, width)[along]:
                        continue
                    value = x[:, channel, place[0] % height, place[1] % width].double()
                    out[:, channel, y, z] += weight[dy + reach, dz + reach] * value
            channel += 1
    assert channel == channels
    return out


# ------------------------------------------------------------------------------------------------------------ published sizes


@pytest.mark.parametrize(
    ("name", "parameters", "macs", "dropped"),
    [
        ("ms_mlp_tiny", 28_656_232, 4_437_768_960, 0.1),
        ("ms_mlp_small", 50_303_752, 8_667_135_360, 0.4),
        ("ms_mlp_base", 88_696_792, 15_334_215_328, 0.5),
    ],
)
def test_parameters_work_and_dropped_paths(name, parameters, macs, dropped):
    """Parameters as the released configurations have them. (The released count of operations takes k for k^2: 4.9, 9.0, 16.1.)"""
    model = on_meta(name)
    assert sum(value.numel() for value in model.parameters()) == parameters
    assert model.layers[-1].blocks[-1].drop_path.rate == dropped
    found, side = 56**2 * 48 * model.channels[0] + model.num_features * 1000, 56
    for width, stage in zip(model.channels, model.layers, strict=True):
        for block in stage.blocks:
            squares = sum(size * kernel**2 for size, kernel in zip(block.mix.groups, block.mix.kernels, strict=True))
            found += side**2 * (2 * squares + 8 * width**2)
        side //= 2
        found += side**2 * 8 * width**2 if stage.downsample is not None else 0
    assert found == macs
    if name == "ms_mlp_tiny":
        assert count_cost(model, torch.empty(1, 3, 224, 224, device="meta")).macs == macs


def test_published_settings():
    model = on_meta("ms_mlp_tiny")
    mixes = [[block.mix for block in stage.blocks] for stage in model.layers]
    assert [len(stage) for stage in mixes] == [3, 3, 9, 3]
    assert [stage[0].kernels for stage in mixes] == [(1, 1, 3, 5, 7), (1, 3, 3, 5, 7), (1, 5, 5, 5, 7), (1, 7, 7, 7, 7)]
    assert all(mix.shifts == (-2, -1, 0, 1, 2) and mix.edge == "cyclic" for stage in mixes for mix in stage)
    assert mixes[0][0].groups == (20, 20, 20, 20, 16)
    assert {norm.eps for norm in model.modules() if isinstance(norm, nn.LayerNorm)} == {1e-6}
    for other in (
        on_meta("ms_mlp_tiny", edge="zero", depths=(1,)),
        on_meta("swin_ms_tiny", edge="zero", depths=(1,) * 4),
    ):
        assert {mix.edge for mix in other.modules() if isinstance(mix, MixShift)} == {"zero"}


def test_paths_are_dropped_in_training_only():
    block, x = drawn(MixShiftBlock(10, MixShift(10), drop_path=0.5)), torch.randn(64, 10, 3, 3)
    whole = block(x) - x
    kept = (block.train()(x) - x) / (2 * whole)
    assert {round(share, 2) for share in kept.flatten(1).median(1).values.tolist()} == {0.0, 1.0}
    assert torch.equal(block.eval()(x) - x, whole)


@pytest.mark.parametrize("channels", [96, 192, 384, 768, 128, 256, 512, 1024, 10, 14, 30])
def test_groups_are_those_of_chunk(channels):
    with torch.device("meta"):
        assert MixShift(channels).groups == tuple(len(part) for part in torch.zeros(channels).chunk(5))


def test_work_of_mixing():
    mix = MixShift(14, (1, 3, 3, 5, 7))
    assert mix.groups == (3, 3, 3, 3, 2)
    macs = count_cost(mix, torch.zeros(1, 14, 8, 9)).macs
    assert macs == 2 * 8 * 9 * (3 * 1 + 3 * 9 + 3 * 9 + 3 * 25 + 2 * 49)


# --------------------------------------------------------------------------------------------------------------- the operator


@pytest.mark.parametrize("edge", ["cyclic", "zero"])
@pytest.mark.parametrize("size", [(5, 6), (1, 1), (2, 3)])
def test_mixing_is_the_formula(edge, size):
    mix = drawn(MixShift(7, (1, 3, 5, 7), (-2, -1, 1, 2), edge=edge))
    x = torch.randn(1, 7, *size)
    assert (mix(x) - by_formula(mix, x)).abs().max() < 1e-5


@pytest.mark.parametrize("edge", ["cyclic", "zero"])
@pytest.mark.parametrize("steps", [-9, -4, -1, 0, 2, 4, 5])
def test_shifting(edge, steps):
    x = torch.arange(1, 9).view(2, 4)
    for dim, size in ((0, 2), (1, 4), (-1, 4)):
        found = shifted(x, steps, dim, edge)
        for i in range(size):
            source = i - steps
            inside = 0 <= source < size
            expected = (
                x.select(dim, source % size) if inside or edge == "cyclic" else torch.zeros_like(x.select(dim, 0))
            )
            assert torch.equal(found.select(dim, i), expected)


def test_without_shifts_and_with_kernels_of_one_a_block_is_an_mlp_on_each_pixel():
    block = drawn(MixShiftBlock(10, MixShift(10, (1,) * 5, (0,) * 5)))
    x = torch.randn(1, 10, 6, 5)
    alone = torch.cat([block(x[:, :, y : y + 1, z : z + 1]) for y in range(6) for z in range(5)], 3)
    assert torch.allclose(block(x).flatten(2), alone.flatten(2), atol=1e-5)


def test_without_shifts_and_one_branch_a_block_is_that_of_convnext():
    from transformers import ConvNextConfig
    from transformers.models.convnext.modeling_convnext import ConvNextLayer

    theirs = drawn(ConvNextLayer(ConvNextConfig(layer_scale_init_value=1e-6), dim=10))
    block = drawn(MixShiftBlock(10, MixShift(10, (7,) * 5, (0,) * 5)))
    for group, (across, down) in enumerate(zip(block.mix.dwconv_lr, block.mix.dwconv_td, strict=True)):
        nn.init.zeros_(down.weight)
        nn.init.zeros_(down.bias)
        across.weight.copy_(theirs.dwconv.weight[2 * group : 2 * group + 2])
        across.bias.copy_(theirs.dwconv.bias[2 * group : 2 * group + 2])
    block.norm.load_state_dict(theirs.layernorm.state_dict())
    block.pwconv1.load_state_dict(theirs.pwconv1.state_dict())
    block.pwconv2.load_state_dict(theirs.pwconv2.state_dict())
    block.gamma.copy_(theirs.layer_scale_parameter)
    x = torch.randn(2, 10, 9, 8)
    assert torch.allclose(block(x), theirs(x), atol=1e-5)


@pytest.mark.parametrize("edge", ["cyclic", "zero"])
def test_what_a_position_sees(edge):
    """Each branch of group g: a square of k_g around the position, cut at the border and then moved by the shift."""
    size, place = 11, (1, 5)
    mix = MixShift(5, (1, 1, 3, 5, 7), edge=edge)
    for value in mix.parameters():
        nn.init.ones_(value)
    x = torch.zeros(1, 5, size, size, requires_grad=True)
    for group, (kernel, steps) in enumerate(zip(mix.kernels, mix.shifts, strict=True)):
        (gradient,) = torch.autograd.grad(mix(x)[0, group, place[0], place[1]], x)
        expected = torch.zeros(5, size, size)
        around = range(-(kernel // 2), kernel // 2 + 1)
        for dy, dz in itertools.product(around, around):
            y, z = place[0] + dy, place[1] + dz
            if not 0 <= y < size:
                continue
            expected[group, y, (z - steps) % size] += 1  # along the width nothing reaches the border here
            if edge == "cyclic" or 0 <= y - steps < size:
                expected[group, (y - steps) % size, z] += 1
        assert torch.equal(gradient[0], expected)


def test_mixing_single_positions_commutes_with_cyclic_translation():
    x = torch.randn(1, 10, 7, 8)
    for kernels, same in (((1,) * 5, True), ((1, 1, 3, 5, 7), False)):
        mix = drawn(MixShift(10, kernels))
        ours, theirs = mix(x.roll((2, -3), (2, 3))), mix(x).roll((2, -3), (2, 3))
        assert torch.allclose(ours, theirs, atol=1e-5) is same
    zero = drawn(MixShift(10, (1,) * 5, edge="zero"))
    assert not torch.allclose(zero(x.roll(2, 2)), zero(x).roll(2, 2), atol=1e-3)
    inside = (slice(None), slice(None), slice(2, 5), slice(2, 6))
    cyclic = drawn(MixShift(10, (1,) * 5))
    assert torch.equal(zero(x)[inside], cyclic(x)[inside])


def test_at_first_a_block_is_all_but_the_identity():
    torch.manual_seed(0)
    block, x = MsMlp(**SMALL).layers[0].blocks[0], torch.randn(2, 10, 8, 8)
    assert torch.equal(block.gamma, torch.full((10,), 1e-6))
    assert 0 < (block(x) - x).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"channels": 8}, "channels must make 5 groups of .*, got 8, which makes 4"),
        ({"channels": 10, "kernels": (1, 2, 3, 5, 7)}, r"kernels must be odd, got \(1, 2, 3, 5, 7\)"),
        ({"channels": 10, "kernels": (1, 3)}, r"shifts must have one entry a kernel \(2\), got \(-2, -1, 0, 1, 2\)"),
        ({"channels": 10, "edge": "wrap"}, "edge must be one of 'cyclic', 'zero', got 'wrap'"),
        ({"channels": 10, "kernels": (0, 1, 3, 5, 7)}, "kernels must be a whole number at least 1, got 0"),
        ({"channels": 10, "kernels": (), "shifts": ()}, r"kernels must have at least one entry, got \(\)"),
    ],
)
def test_bad_settings_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        MixShift(**arguments)


def test_bad_settings_of_a_network_are_named():
    with pytest.raises(ValueError, match=r"kernels must have one tuple a stage \(4\), got \(\(1, 3\),\)"):
        tiny(kernels=((1, 3),))
    with pytest.raises(ValueError, match=r"depths must have at least one stage, got \(\)"):
        tiny(depths=())
    with pytest.raises(ValueError, match=r"num_heads must have one entry a stage \(2\), got \(1,\)"):
        tiny(MsSwin, depths=(1, 1), num_heads=(1,))
    with pytest.raises(ValueError, match=r"x must have shape \(batch, 3, height, width\), got \(2, 1, 8, 8\)"):
        tiny()(torch.zeros(2, 1, 8, 8))


# --------------------------------------------------------------------------------------------------------------- fused mixing


@pytest.mark.parametrize("edge", ["cyclic", "zero"])
@pytest.mark.parametrize("kernels", [*KERNELS, (1,) * 5, (7,) * 5, (7, 1, 5, 1, 3)])
def test_fused_mixing_gives_the_same(edge, kernels):
    mix = drawn(MixShift(14, kernels, edge=edge))
    fused = FusedMixShift(mix)
    for size in ((9, 12), (3, 2), (1, 1)):
        x = torch.randn(2, 14, *size)
        expected = mix(x)
        assert torch.allclose(fused(x), expected, atol=1e-5)
        assert torch.allclose(fused(x.contiguous(memory_format=torch.channels_last)), expected, atol=1e-5)
    odd = drawn(MixShift(7, (3, 3, 5), (2, 0, 0), edge=edge))
    x = torch.randn(1, 7, 6, 6)
    assert torch.allclose(FusedMixShift(odd)(x), odd(x), atol=1e-5)


def test_fused_mixing_makes_fewer_calls(monkeypatch):
    calls = []
    real = torch.conv2d
    monkeypatch.setattr(
        torch.nn.functional, "conv2d", lambda x, *rest, **named: calls.append(1) or real(x, *rest, **named)
    )
    mix = drawn(MixShift(14, KERNELS[3]))
    mix(torch.randn(1, 14, 9, 9))
    assert len(calls) == 10
    calls.clear()
    FusedMixShift(mix)(torch.randn(1, 14, 9, 9))
    assert len(calls) <= 2


@pytest.mark.parametrize("make", [MsMlp, MsSwin])
def test_a_fused_network_gives_the_same_and_the_network_stays(make):
    model, x = tiny(make, **({"num_heads": (1, 2, 4, 8), "window_size": 4} if make is MsSwin else {})), images(48, 40)
    expected = model(x)
    fused = fuse_mixing(model)
    assert torch.allclose(fused(x), expected, atol=1e-4)
    assert not any(isinstance(module, MixShift) for module in fused.modules())
    assert torch.equal(model(x), expected)
    half = copy.deepcopy(fused).bfloat16()
    assert (half(x.bfloat16()).float() - expected).abs().max() < 0.1 * expected.abs().max()


def test_the_operator_alone_and_one_that_is_used_twice_are_fused():
    mix, x = drawn(MixShift(10)), torch.randn(1, 10, 6, 5)
    alone = fuse_mixing(mix)
    assert type(alone) is FusedMixShift
    assert torch.allclose(alone(x), mix(x), atol=1e-5)
    twice = fuse_mixing(nn.Sequential(mix, nn.ReLU(), mix).eval())
    assert twice[0] is twice[2]
    assert type(twice[2]) is FusedMixShift
    assert torch.allclose(twice(x), mix(mix(x).relu()), atol=1e-4)


def test_only_a_network_that_mixes_and_does_not_train_is_fused():
    with pytest.raises(ValueError, match="model must be in eval mode"):
        fuse_mixing(tiny().train())
    with pytest.raises(ValueError, match="model must have a MixShift"):
        fuse_mixing(nn.Linear(2, 2).eval())


# ----------------------------------------------------------------------------------------------------------- use as a backbone


def test_official_layout():
    model = build("ms_mlp_tiny", **SMALL).eval()
    source = tiny()
    state = {key.replace(".mix.", "."): value for key, value in source.state_dict().items()}
    assert {
        "layers.0.blocks.0.dwconv_lr.4.weight",
        "layers.0.blocks.0.gamma",
        "layers.0.downsample.proj.bias",
    } < state.keys()
    assert load_weights(model, state) == "official"
    assert torch.equal(model(images(32, 32)), source(images(32, 32)))
    assert load_weights(model, source.state_dict()) == "assay"


@pytest.mark.parametrize("size", [(32, 32), (33, 47), (3, 5)])
def test_any_size_of_image(size):
    model, x = tiny(), images(*size)
    logits = model(x)
    assert logits.shape == (2, 5)
    assert torch.allclose(logits, torch.cat([model(x[:1]), model(x[1:])]), atol=1e-5)
    for stride, found in model.feature_maps(x).items():
        assert found.shape == (2, 10 * stride // 4, -(-size[0] // stride), -(-size[1] // stride))


def test_memory_order_precision_and_gradients():
    model, x = tiny(), images(36, 32)
    expected = model(x)
    assert torch.allclose(model(x.contiguous(memory_format=torch.channels_last)), expected, atol=1e-4)
    half = copy.deepcopy(model).bfloat16()(x.bfloat16())
    assert (half.float() - expected).abs().max() < 0.1 * expected.abs().max()
    assert model(x[:0]).shape == (0, 5)
    model.train().requires_grad_(True)
    model(x).square().mean().backward()
    assert all(value.grad is not None and bool(value.grad.any()) for value in model.parameters())


def test_export():
    model, x = tiny(depths=(2,)), images(36, 32)
    blocks = model.layers[0].blocks
    blocks[1].mix = FusedMixShift(blocks[1].mix)
    exported = torch.export.export(model, (x,)).module()
    assert torch.allclose(exported(x), model(x), atol=1e-4)


def test_features_only_runs_no_more_than_is_asked_for():
    model = build("ms_mlp_tiny", features_only=True, out_indices=(0, 1), embed_dim=10, depths=(1, 1, 1, 1)).eval()
    ran = []
    for stage in model.model.layers:
        stage.blocks.register_forward_hook(lambda module, given, out: ran.append(module))
    maps = model(images(32, 32))
    assert [tuple(found.shape) for found in maps] == [(2, 10, 8, 8), (2, 20, 4, 4)]
    assert model.feature_info.channels() == [10, 20]
    assert ran == [stage.blocks for stage in model.model.layers[:2]]


def test_the_head_norms_what_it_pooled():
    model, x = tiny(), images(64, 64)
    features = model.forward_features(x)
    assert features.shape == (2, 80, 2, 2)
    assert torch.allclose(model.forward_head(features, pre_logits=True), model.norm(features.mean((2, 3))))
    assert torch.equal(model.forward_head(features), model(x))
    model.reset_classifier(0)
    assert model(x).shape == (2, 80)


def test_in_swin_every_even_block_mixes_and_the_others_attend_in_shifted_windows():
    model = on_meta("swin_ms_tiny")
    for stage, layer in enumerate(model.layers):
        for place, block in enumerate(layer.blocks):
            if place % 2:
                assert type(block.attn) is ShiftedWindowAttention
                assert block.attn.shift == 3
            else:
                assert type(block.attn) is MixShiftTokens
                assert block.attn.kernels == KERNELS[stage]
                assert block.attn.shifts == SHIFTS
    swin = on_meta("swin_ms_tiny", depths=(1, 1, 1, 1))  # mixing alone
    other = on_meta("swin_ms_tiny", depths=(2, 2, 2, 2))
    attention = sum(4 * w**2 + 4 * w + 169 * h + 8 * w**2 + 9 * w for w, h in ((96, 3), (192, 6), (384, 12), (768, 24)))
    count = [sum(value.numel() for value in each.parameters()) for each in (swin, other)]
    assert count[1] - count[0] == attention


def test_mixing_of_tokens_is_that_of_maps():
    mix, tokens = drawn(MixShift(10)), drawn(MixShiftTokens(10))
    x = torch.randn(2, 10, 5, 8)
    assert torch.allclose(tokens(x.permute(0, 2, 3, 1)), mix(x).permute(0, 2, 3, 1), atol=1e-6)


def test_swin_with_mixing_works_on_any_size():
    model, x = tiny(MsSwin, depths=(2, 2), num_heads=(2, 4), window_size=4), images(30, 45)
    logits = model(x)
    assert logits.shape == (2, 5)
    assert torch.allclose(logits, torch.cat([model(x[:1]), model(x[1:])]), atol=1e-4)
