"""SimpleNet: counts of every published model, its head, its importer, folding, and the rules of design."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from assay.measure.cost import count_cost
from assay.methods.core.vision.folding import fold_batch_norm
from assay.methods.core.vision.running import layers_run
from assay.methods.core.vision.weights import load_weights
from assay.methods.vision import build
from assay.methods.vision.simplenet import (
    CIFAR_5M,
    CIFAR_310K,
    CONFIGS,
    IMAGENET_5M,
    STRIDES,
    SimpleNet,
    design_card,
    from_official,
)

# name: parameters, MACs of an image; CIFAR's for 10 classes at 32 pixels, ImageNet's for 1000 at 224
PUBLISHED = {
    "simplenet_cifar_310k": (312_362, 55_788_160),
    "simplenet_cifar_460k": (385_790, 73_189_864),
    "simplenet_cifar_5m": (5_498_378, 652_151_296),
    "simplenet_cifar_5m_extra_pool": (5_498_378, 631_507_456),
    "simplenetv1_small_m1_05": (1_506_792, 340_923_392),
    "simplenetv1_small_m2_05": (1_506_792, 427_627_520),
    "simplenetv1_small_m1_075": (3_287_272, 758_853_120),
    "simplenetv1_small_m2_075": (3_287_272, 953_937_408),
    "simplenetv1_5m_m1": (5_752_808, 1_341_761_536),
    "simplenetv1_5m_m2": (5_752_808, 1_688_578_048),
    "simplenetv1_9m_m1": (9_508_968, 2_774_249_984),
    "simplenetv1_9m_m2": (9_508_968, 3_554_587_136),
}
TINY = {"scale": 0.125, "num_classes": 5}


def tiny(name: str = "simplenetv1_5m_m2", **settings) -> SimpleNet:
    """Narrow, in eval mode, with norms as after training."""
    torch.manual_seed(0)
    model = build(name, **{**TINY, **settings})
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_var, 0.5, 2.0)
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.3)
    return model.eval()


def on_meta(name: str, size: int, **settings) -> tuple[int, int]:
    with torch.device("meta"):
        model = build(name, **settings).eval()
        macs = sum(layer.macs for layer in layers_run(model, torch.zeros(1, 3, size, size)))
    return sum(p.numel() for p in model.parameters()), macs


# --- counts


@pytest.mark.parametrize("name", CONFIGS)
def test_parameters_and_macs_of_every_published_model(name):
    cifar = "cifar" in name
    assert on_meta(name, 32 if cifar else 224, num_classes=10 if cifar else 1000) == PUBLISHED[name]


def test_the_stride_mode_changes_macs_and_no_parameter():
    counts = [PUBLISHED[f"simplenetv1_5m_m{mode}"] for mode in (1, 2)]
    counts += [on_meta("simplenetv1_5m_m1", 224, stride_mode=mode) for mode in (3, 4)]
    assert {parameters for parameters, _ in counts} == {5_752_808}
    macs = [macs for _, macs in counts]
    assert macs == sorted(set(macs))
    for mode in (1, 2, 3, 4):
        model = tiny(scale=0.02, stride_mode=mode)
        with torch.no_grad():
            assert model.forward_features(torch.zeros(1, 3, 224, 224)).shape[2:] == (7, 7)


def test_the_first_weights_for_cifar_had_a_pool_more():
    plain, extra = (tiny(f"simplenet_cifar_5m{kind}") for kind in ("", "_extra_pool"))
    assert [p.shape for p in plain.parameters()] == [p.shape for p in extra.parameters()]
    assert plain.strides == (1, 2, 4, 8, 16)
    assert extra.strides == (1, 2, 4, 8, 16, 32)


def test_weights_from_before_2023_want_padded_pointwise_layers():
    """Each 1x1 layer then makes the map two wider, so the last one is 11 x 11 instead of 7 x 7."""
    x = torch.zeros(1, 3, 224, 224)
    assert tiny(scale=0.02, pointwise_padding=1).forward_features(x).shape[2:] == (11, 11)
    assert tiny(scale=0.02).forward_features(x).shape[2:] == (7, 7)


# --- the network


@torch.no_grad()
def test_it_is_the_plain_stack_that_the_paper_writes():
    """Against functional calls along the plan, in double precision."""
    model = tiny("simplenet_cifar_310k", scale=0.25).double()
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    y, number = x, 0
    for entry in CIFAR_310K:
        if entry == "pool":
            y = F.max_pool2d(y, 2)
            continue
        conv, norm = model.features[number].conv, model.features[number].norm
        assert conv.kernel_size[0] == (entry[1] if isinstance(entry, tuple) else 3)
        y = F.conv2d(y, conv.weight, conv.bias, padding=conv.kernel_size[0] // 2)
        y = (y - norm.running_mean[:, None, None]) / torch.sqrt(norm.running_var[:, None, None] + 1e-5)
        y = torch.relu(y * norm.weight[:, None, None] + norm.bias[:, None, None])
        number += 1
    logits = y.flatten(2).max(2).values @ model.classifier.weight.T + model.classifier.bias
    assert torch.allclose(model(x), logits, rtol=1e-10)
    assert norm.momentum == 0.05
    assert number == 13


def test_the_head_takes_maxima_so_that_one_pixel_a_channel_learns():
    model = tiny()
    maps = torch.randn(2, model.num_features, 3, 4, requires_grad=True)
    model.forward_head(maps).sum().backward()
    assert ((maps.grad != 0).flatten(2).sum(2) == 1).all()
    assert torch.equal(model.forward_head(maps, pre_logits=True), maps.amax((2, 3)))


def test_dropout_at_rate_zero_is_nothing_and_above_it_is_of_whole_channels():
    x = torch.randn(2, 3, 64, 64)
    plain = tiny().train()
    zeros = tiny(drop_rates=dict.fromkeys(range(13), 0.0), drop_rate=0.0).train()
    assert [type(module) for module in plain.modules()] == [type(module) for module in zeros.modules()]
    state = torch.get_rng_state()
    assert torch.equal(plain(x), zeros(x))
    assert torch.equal(torch.get_rng_state(), state)  # not even a random number is drawn
    dropping = tiny(drop_rates={2: 0.5}, drop_rate=0.5).train()
    maps = dropping.features[:3](x)
    gone = (maps == 0).flatten(2).all(2)
    assert gone.any()
    assert not gone.all()
    assert (dropping.forward_head(torch.ones(4, 32, 2, 2), pre_logits=True) == 0).any()
    assert torch.equal(tiny(drop_rates={2: 0.5}, drop_rate=0.5)(x), tiny()(x))


@pytest.mark.parametrize("size", [(64, 64), (65, 97), (25, 40)])
def test_any_size_goes_through_alone_or_in_a_batch(size):
    model, x = tiny(), torch.randn(3, 3, *size)
    with torch.no_grad():
        logits = model(x)
        assert logits.shape == (3, 5)
        assert torch.isfinite(logits).all()
        assert torch.allclose(logits[1:2], model(x[1:2]), atol=1e-5)


@pytest.mark.parametrize("name", [name for name in CONFIGS if not name.endswith("075")])
def test_the_least_size_goes_through_and_a_smaller_one_is_refused(name):
    for padding in (0, 1):
        model = tiny(name, scale=0.05, pointwise_padding=padding)
        least = model.least_size
        with torch.no_grad():
            assert model(torch.zeros(1, 3, least, least + 1)).shape == (1, 5)
        for call in (model, model.feature_maps):
            with pytest.raises(ValueError, match=f"x must be at least {least} pixels a side"):
                call(torch.zeros(1, 3, least + 1, least - 1))
        if not padding:
            with pytest.raises(RuntimeError):
                model.features(torch.zeros(1, 3, least - 1, least - 1))


def test_maps_by_stride():
    for name, strides in (("simplenet_cifar_5m", (1, 2, 4, 8, 16)), ("simplenetv1_5m_m4", (2, 4, 8, 16, 32))):
        mode = {"stride_mode": 4} if name.endswith("m4") else {}
        name = name.replace("m4", "m1")
        maps = build(name, features_only=True, **{**TINY, **mode})
        x = torch.zeros(1, 3, 64, 96)
        found = maps.eval()(x)
        assert [tuple(each.shape[2:]) for each in found] == [(64 // s, 96 // s) for s in strides]
        assert [each.shape[1] for each in found] == maps.feature_info.channels()
        assert maps.feature_info.reduction() == list(strides)
    model = tiny()
    with torch.no_grad():
        x = torch.randn(1, 3, 64, 64)
        assert torch.equal(model.feature_maps(x)[32], model.forward_features(x))


def test_strides_come_where_the_mode_says():
    for mode, strides in {**STRIDES, 3: (2, 2, 1, 1, 2)}.items():
        model = tiny("simplenetv1_5m_m1", stride_mode=mode)
        assert [layer.conv.stride[0] for layer in model.layers] == [*strides, *[1] * (13 - len(strides))]


def test_gradients_reach_every_parameter_and_agree_with_differences():
    model = tiny("simplenet_cifar_310k", num_classes=3).double().train()
    x = torch.randn(4, 3, 16, 16, dtype=torch.float64, requires_grad=True)
    model(x).square().sum().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())
    assert sum(bool((p.grad != 0).any()) for p in model.parameters()) > 35
    direction = torch.randn_like(x)
    with torch.no_grad():
        up, down = (model(x + sign * 1e-7 * direction).square().sum() for sign in (1, -1))
    assert float((x.grad * direction).sum()) == pytest.approx(float((up - down) / 2e-7), rel=1e-3)


@torch.no_grad()
def test_channels_last_and_half_precision():
    model, x = tiny(), torch.randn(2, 3, 64, 64)
    expected = model(x)
    last = model.to(memory_format=torch.channels_last)(x.contiguous(memory_format=torch.channels_last))
    assert torch.allclose(last, expected, atol=1e-5)
    half = model.to(torch.bfloat16)(x.bfloat16())
    assert half.dtype == torch.bfloat16
    assert (half - expected).abs().max() < 0.1 * expected.abs().max()


def test_weights_start_within_xaviers_bound_for_relus():
    layer = build("simplenet_cifar_310k").layers[1].conv  # 64 to 32 channels
    bound = math.sqrt(2) * math.sqrt(6 / (9 * (64 + 32)))
    assert 0.99 * bound < layer.weight.abs().max() <= bound


def test_what_the_published_weights_want_of_images():
    assert tiny().default_cfg["crop_pct"] == 0.875


@pytest.mark.slow
@torch.no_grad()
def test_it_is_exported():
    model, x = tiny(), torch.randn(2, 3, 64, 64)
    exported = torch.export.export(model, (x,), strict=False)
    assert torch.allclose(exported.module()(x), model(x), atol=1e-6)


# --- folding and weights


@torch.no_grad()
def test_folding_takes_two_parameters_a_channel_and_all_norms():
    model, x = tiny(), torch.randn(2, 3, 64, 64)
    folded = fold_batch_norm(model, x)
    channels = sum(layer.conv.out_channels for layer in model.layers)
    assert folded.folded == (13, 13)
    count = [sum(p.numel() for p in each.parameters()) for each in (model, folded)]
    assert count[0] - count[1] == 2 * channels
    assert torch.allclose(folded(x), model(x), atol=1e-5)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in folded.modules())
    assert count_cost(folded, x).macs == count_cost(model, x).macs
    assert count_cost(folded, x).bytes < count_cost(model, x).bytes


def official_layers(plan, widths, drops: bool) -> nn.Sequential:
    """The released code's order of layers: pooling and dropout stand in the same sequence as the rest."""
    layers, width, number = [], 3, 0
    for place, entry in enumerate(plan):
        if entry == "pool":
            layers += [nn.MaxPool2d(2), nn.Dropout2d(0.0)]
            continue
        kernel = entry[1] if isinstance(entry, tuple) else 3
        out = widths[number]
        layers += [nn.Conv2d(width, out, kernel, padding=kernel // 2), nn.BatchNorm2d(out), nn.ReLU()]
        last = place + 1 == len(plan) or plan[place + 1] == "pool"
        if drops or not last:
            layers.append(nn.Dropout2d(0.0))
        width, number = out, number + 1
    return nn.Sequential(*layers)


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "plan", "drops"), [("simplenet_cifar_5m", CIFAR_5M, False), ("simplenetv1_5m_m1", IMAGENET_5M, True)]
)
def test_weights_of_the_released_code(name, plan, drops):
    model = tiny(name, **({"stride_mode": 0} if drops else {}))
    other = nn.Module()
    other.features = official_layers(plan, [layer.conv.out_channels for layer in model.layers], drops)
    other.classifier = nn.Linear(model.num_features, 5)
    for module in other.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_var, 0.5, 2.0)
    other.eval()
    state = other.state_dict()
    assert ("features.4.weight" in state) is True  # the second convolution, after a dropout
    assert load_weights(model, state) == "official"
    x = torch.randn(2, 3, 32, 32)
    assert torch.allclose(model(x), other.classifier(other.features(x).amax((2, 3))), atol=1e-5)
    assert set(from_official(state)) == set(model.state_dict())
    with pytest.raises(ValueError, match="shapes differ"):
        load_weights(tiny(name, num_classes=6), state)


# --- the rules of design


def test_the_models_for_cifar_keep_the_rules_and_those_for_imagenet_pay_for_speed_with_two():
    x = torch.zeros(1, 3, 32, 32)
    for name in ("simplenet_cifar_310k", "simplenet_cifar_460k", "simplenet_cifar_5m"):
        with torch.device("meta"):
            card = design_card(build(name, num_classes=10).eval(), torch.zeros(1, 3, 32, 32))
        assert card.broken == (), card.table()
    card = design_card(tiny(), torch.zeros(1, 3, 64, 64))
    assert card.broken == ("late down-sampling", "pooling, no strides")
    assert card.table().count("BROKEN") == 2
    assert len(card.rules) == card.table().count("\n") + 1 == 7
    assert sum(layer.macs for layer in card.layers) == count_cost(tiny(), torch.zeros(1, 3, 64, 64)).macs
    assert design_card(tiny("simplenet_cifar_5m"), x).broken == ()


def stack(*layers: nn.Module) -> nn.Sequential:
    return nn.Sequential(*layers).eval()


def convs(*widths: int, kernel: int = 3, **settings) -> list[nn.Module]:
    pairs = zip(widths, widths[1:], strict=False)
    return [nn.Conv2d(a, b, kernel, padding=kernel // 2, **settings) for a, b in pairs]


@pytest.mark.parametrize(
    ("model", "broken"),
    [
        (stack(*convs(3, 8, 8, 8, 8, 16, 16, 16)), ()),
        (stack(*convs(3, 8, 8, 8, 8, 17, 17, 17)), ("gradual growth",)),
        (stack(*convs(3, 8, 9, 10, 11, 12)), ("homogeneous groups",)),
        (
            stack(*convs(3, 8, 8, 8), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1), *convs(8, 8, 8, 8, 8)),
            ("1x1 convolutions late",),
        ),
        (stack(*convs(3, 8, 8), nn.AvgPool2d(2), *convs(8, 8, 8, 8)), ("late down-sampling",)),
        (stack(*convs(3, 8, 8, 8), nn.MaxPool2d(2), *convs(8, 8, 8, 8)), ()),
        (stack(*convs(3, 8, 8, 8, 8), nn.Conv2d(8, 8, 3, 2, 1), *convs(8, 8, 8)), ("pooling, no strides",)),
        (stack(*convs(3, 8, 8, 8, 8), nn.Flatten(), nn.Linear(8 * 16 * 16, 10)), ("balanced parameters",)),
        (stack(*convs(3, 8, 8, 8, 8), *convs(8, 8, 8, 8, kernel=5)), ("fast kernels",)),
        (stack(*convs(3, 8, 8, 8, 8), *convs(8, 8, 8, 8, groups=8)), ("fast kernels",)),
    ],
)
def test_each_rule_sees_what_breaks_it_and_nothing_else(model, broken):
    card = design_card(model, torch.zeros(1, 3, 16, 16))
    assert card.broken == broken, card.table()


def test_any_network_has_a_card():
    """A ResNet and a MobileNetV2 of transformers: branches, depthwise layers, functional pooling."""
    from transformers import MobileNetV2Config, MobileNetV2Model, ResNetConfig, ResNetModel

    x = torch.zeros(1, 3, 64, 64)
    resnet = ResNetModel(ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[2, 2], layer_type="basic")).eval()
    assert {"late down-sampling", "fast kernels"} <= set(design_card(resnet, x).broken)
    mobile = MobileNetV2Model(MobileNetV2Config(depth_multiplier=0.1, min_depth=4)).eval()
    assert {"homogeneous groups", "1x1 convolutions late", "fast kernels"} <= set(design_card(mobile, x).broken)


def test_gates_on_pooled_features_are_no_layers_of_the_stack():
    from assay.methods.core.vision.blocks import SqueezeExcite

    with_gates = stack(*convs(3, 8, 8, 8), SqueezeExcite(8, 2), *convs(8, 8, 8))
    assert design_card(with_gates, torch.zeros(1, 3, 16, 16)).broken == ()


# --- bad input


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: SimpleNet(()), ValueError, "plan must begin and end with a convolution"),
        (lambda: SimpleNet(("pool", 8)), ValueError, "plan must begin and end"),
        (lambda: SimpleNet((8, "pool")), ValueError, "plan must begin and end"),
        (lambda: SimpleNet((8, "pool", "pool", 8)), ValueError, "one pool at a time"),
        (lambda: SimpleNet((8, "stride")), TypeError, "channels of a plan's entry"),
        (lambda: SimpleNet((8, (8, 2))), ValueError, "kernel of a plan's entry must be odd"),
        (lambda: SimpleNet((0,)), ValueError, "channels of a plan's entry"),
        (lambda: SimpleNet((8,), scale=0.01), ValueError, "scale"),
        (lambda: SimpleNet((8,), scale=math.nan), ValueError, "scale must be"),
        (lambda: SimpleNet((8,), stride_mode=5), ValueError, "stride_mode must be one of"),
        (lambda: SimpleNet((8,), drop_rates={1: 0.1}), ValueError, "drop_rates"),
        (lambda: SimpleNet((8,), drop_rates={0: 1.0}), ValueError, r"drop_rates\[0\]"),
        (lambda: SimpleNet((8,), drop_rate=-0.1), ValueError, "drop_rate"),
        (lambda: SimpleNet((8,), pointwise_padding=2), ValueError, "pointwise_padding"),
        (lambda: design_card(nn.Linear(2, 2), torch.zeros(1, 2)), ValueError, "model must run a convolution"),
        (lambda: tiny()(torch.zeros(3, 64, 64)), ValueError, "^x must have shape"),
        (lambda: tiny()(torch.zeros(1, 3, 64, 64).double()), TypeError, "^x must hold"),
    ],
)
def test_bad_input_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call()
