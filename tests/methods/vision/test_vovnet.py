"""VoVNet: counts of every published model, one-shot aggregation, both layouts of weights, and the model of memory access."""

from __future__ import annotations

import math
import random

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from assay.measure.cost import count_cost
from assay.methods.core.vision.folding import fold_batch_norm
from assay.methods.core.vision.running import layers_run
from assay.methods.core.vision.weights import load_weights
from assay.methods.vision import build
from assay.methods.vision.vovnet import (
    CONFIGS,
    DenseBlock,
    EffectiveSE,
    OsaBlock,
    VoVNet,
    computation_efficiency,
    conv_macs,
    energy_per_image,
    from_official,
    from_timm,
    inner_inputs,
    least_memory_access_cost,
    memory_access,
    memory_access_cost,
)

# parameters and MACs of an image of 224 pixels, 1000 classes
PUBLISHED = {
    "vovnet39a": (22_600_296, 7_072_227_328),
    "vovnet57a": (36_640_296, 8_930_144_256),
    "vovnet27_slim": (3_525_736, 2_176_695_296),
    "vovnet39": (22_600_296, 7_072_227_328),
    "vovnet57": (36_640_296, 8_930_144_256),
    "ese_vovnet19b_slim_dw": (1_897_752, 398_071_376),
    "ese_vovnet19b_dw": (6_543_080, 1_333_489_824),
    "ese_vovnet19b_slim": (3_166_136, 1_680_214_784),
    "ese_vovnet19b": (11_205_416, 4_121_937_920),
    "ese_vovnet39b": (24_568_936, 7_074_193_408),
    "ese_vovnet57b": (38_608_936, 8_932_110_336),
    "ese_vovnet99b": (63_199_272, 16_488_214_528),
}
TINY = {"stem": (4, 4, 8), "widths": (4, 6, 8, 8), "channels": (8, 12, 16, 20), "num_classes": 5}


def tiny(name: str = "ese_vovnet39b", **settings) -> VoVNet:
    """Narrow, in eval mode, with norms as after training."""
    torch.manual_seed(0)
    return worn(build(name, **{**TINY, **settings}))


def worn(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_var, 0.5, 2.0)
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.3)
    return model.eval()


# --- counts


@pytest.mark.parametrize("name", CONFIGS)
def test_parameters_and_macs_of_every_published_model(name):
    with torch.device("meta"):
        model = build(name).eval()
        macs = sum(layer.macs for layer in layers_run(model, torch.zeros(1, 3, 224, 224)))
    assert (sum(p.numel() for p in model.parameters()), macs) == PUBLISHED[name]


def test_counts_without_a_head_and_with_gates_everywhere():
    def count(name, **settings):
        with torch.device("meta"):
            return sum(p.numel() for p in build(name, **settings).parameters())

    assert count("vovnet39a", num_classes=0) == 21_575_296
    gates = 768**2 + 768 + 1024**2 + 1024  # of the first modules of the last two stages
    assert count("ese_vovnet39b", ese="every") - PUBLISHED["ese_vovnet39b"][0] == gates


# --- blocks


@torch.no_grad()
def test_one_shot_aggregation_by_hand():
    """Against functional calls, in double precision: a chain, and one 1x1 convolution of all."""
    torch.manual_seed(0)
    block = worn(OsaBlock(6, 4, 6, 3, identity=True, ese=True)).double()
    x = torch.randn(2, 6, 7, 5, dtype=torch.float64)

    def layer(y, module, padding):
        norm = module.norm
        y = F.conv2d(y, module.conv.weight, padding=padding)
        y = (y - norm.running_mean[:, None, None]) / torch.sqrt(norm.running_var[:, None, None] + 1e-5)
        return torch.relu(y * norm.weight[:, None, None] + norm.bias[:, None, None])

    outputs = [x]
    for module in block.conv_mid:
        outputs.append(layer(outputs[-1], module, 1))
    y = layer(torch.cat(outputs, 1), block.conv_concat, 0)
    weight, bias = block.attn.fc.weight[:, :, 0, 0], block.attn.fc.bias
    gate = ((y.mean((2, 3)) @ weight.T + bias + 3).clamp(0, 6) / 6)[:, :, None, None]
    assert torch.allclose(block(x), y * gate + x, rtol=1e-10)


@torch.no_grad()
@pytest.mark.parametrize("kept", ["input", "first"])
def test_aggregation_weights_choose_what_is_read(kept):
    """With the weights of y_2 to y_n zero the block is a convolution and a 1x1; with all but the input's, a 1x1 layer."""
    torch.manual_seed(0)
    block = worn(OsaBlock(6, 4, 5, 3))
    weight = block.conv_concat.conv.weight
    keep = slice(0, 6) if kept == "input" else slice(6, 10)
    only = torch.zeros_like(weight)
    only[:, keep] = weight[:, keep]
    block.conv_concat.conv.weight.copy_(only)
    x = torch.randn(2, 6, 7, 5)
    y = x if kept == "input" else block.conv_mid[0](x)
    y = F.conv2d(y, only[:, keep])
    assert torch.allclose(block(x), torch.relu(block.conv_concat.norm(y)), atol=1e-5)


@torch.no_grad()
def test_dense_aggregation_reads_all_before_it():
    torch.manual_seed(0)
    block = worn(DenseBlock(6, 4, 5, 3))
    x = torch.randn(2, 6, 7, 5)
    outputs = [x]
    for layer in block.conv_mid:
        outputs.append(layer(torch.cat(outputs, 1)))
    assert torch.allclose(block(x), block.conv_concat(torch.cat(outputs, 1)), atol=1e-6)
    assert [layer.conv.in_channels for layer in block.conv_mid] == [6, 10, 14]


@torch.no_grad()
def test_the_depthwise_chain_is_reduced_first_and_the_input_itself_is_joined():
    torch.manual_seed(0)
    block = worn(OsaBlock(6, 4, 5, 3, depthwise=True))
    x = torch.randn(2, 6, 7, 5)
    y = block.conv_reduction(x)
    outputs = [x]
    for layer in block.conv_mid:
        y = layer(y)
        outputs.append(y)
    assert torch.allclose(block(x), block.conv_concat(torch.cat(outputs, 1)), atol=1e-6)
    assert block.conv_concat.conv.in_channels == 6 + 3 * 4
    assert OsaBlock(4, 4, 5, 3, depthwise=True).conv_reduction is None


def test_the_gate_is_open_at_three_and_shut_at_minus_three():
    gate = EffectiveSE(3)
    nn.init.zeros_(gate.fc.weight)
    x = torch.randn(2, 3, 4, 4)
    for bias, share in ((3.0, 1.0), (0.0, 0.5), (-3.0, 0.0)):
        nn.init.constant_(gate.fc.bias, bias)
        assert torch.allclose(gate(x), share * x)


def test_a_zero_path_is_the_identity_where_there_is_one():
    block = worn(OsaBlock(6, 4, 6, 2, identity=True))
    nn.init.zeros_(block.conv_concat.norm.weight)
    nn.init.zeros_(block.conv_concat.norm.bias)
    x = torch.randn(2, 6, 5, 5)
    assert torch.equal(block(x), x)
    with pytest.raises(ValueError, match="channels_out must equal channels_in 6 for an identity, got 8"):
        OsaBlock(6, 4, 8, identity=True)


# --- the network


def test_the_names_differ_in_identities_and_gates():
    def parts(name, **settings):
        blocks = [module for module in tiny(name, **settings).modules() if isinstance(module, OsaBlock)]
        return [block.identity for block in blocks], [block.attn is not None for block in blocks]

    assert parts("vovnet39a") == ([False] * 6, [False] * 6)
    assert parts("vovnet39") == ([False, False, False, True, False, True], [False] * 6)
    assert parts("ese_vovnet39b") == ([False, False, False, True, False, True], [True, True, False, True, False, True])
    assert parts("ese_vovnet39b", ese="every")[1] == [True] * 6


@pytest.mark.parametrize("size", [(64, 64), (65, 97), (57, 29), (225, 31)])
def test_maps_of_any_size(size):
    maps = worn(build("vovnet39a", features_only=True, **TINY))
    found = maps(torch.zeros(1, 3, *size))
    assert maps.feature_info.reduction() == [2, 4, 8, 16, 32]
    assert [each.shape[1] for each in found] == maps.feature_info.channels() == [4, 8, 12, 16, 20]
    sides = [[(side + 1) // 2] for side in size]
    for side in sides:
        side.append((side[0] + 1) // 2)
        for _ in range(3):
            side.append(math.ceil((side[-1] - 1) / 2))  # a 3x3 pool of stride 2 in ceil mode
    assert [tuple(each.shape[2:]) for each in found] == list(zip(*sides, strict=True))


def test_images_that_nothing_would_be_left_of_are_refused():
    model = tiny()
    with torch.no_grad():
        assert model(torch.zeros(1, 3, 29, 30)).shape == (1, 5)
    with pytest.raises(ValueError, match="x must be at least 29 pixels a side"):
        model(torch.zeros(1, 3, 28, 64))
    with pytest.raises(RuntimeError):
        model.forward_features(torch.zeros(1, 3, 28, 64))


@torch.no_grad()
def test_forward_is_features_and_head_alone_or_in_a_batch():
    model, x = tiny(), torch.randn(3, 3, 64, 48)
    logits = model(x)
    features = model.feature_maps(x)[32]
    assert torch.equal(features, model.forward_features(x))
    assert torch.allclose(logits, model.head.fc(features.mean((2, 3))), atol=1e-6)
    assert torch.allclose(logits[:1], model(x[:1]), atol=1e-5)
    model.reset_classifier(2)
    assert model(x).shape == (3, 2)


@torch.no_grad()
@pytest.mark.parametrize("name", ["vovnet39", "ese_vovnet19b_dw"])
def test_channels_last_and_half_precision(name):
    model, x = tiny(name), torch.randn(2, 3, 64, 64)
    expected = model(x)
    last = model.to(memory_format=torch.channels_last)(x.contiguous(memory_format=torch.channels_last))
    assert torch.allclose(last, expected, atol=1e-4)
    half = model.to(torch.bfloat16)(x.bfloat16())
    assert half.dtype == torch.bfloat16
    assert (half - expected).abs().max() < 0.1 * expected.abs().max()


def test_weights_start_as_kaiming_has_them():
    block = (
        VoVNet(stem=(8, 8, 64), widths=(64,) * 4, channels=(8,) * 4, depths=(1,) * 4, ese="last").levels[0].blocks[0]
    )
    assert float(block.conv_mid[1].conv.weight.detach().std()) == pytest.approx(math.sqrt(2 / (9 * 64)), rel=0.03)
    assert not block.attn.fc.bias.any()


def test_what_the_published_weights_want_of_images():
    assert tiny().default_cfg["crop_pct"] == 0.875


@pytest.mark.slow
@torch.no_grad()
def test_it_is_exported():
    model, x = tiny("ese_vovnet19b"), torch.randn(2, 3, 64, 64)
    exported = torch.export.export(model, (x,), strict=False).module()
    assert torch.allclose(exported(x), model(x), atol=1e-5)


@torch.no_grad()
def test_all_norms_fold():
    for name in ("ese_vovnet39b", "ese_vovnet19b_dw"):
        model, x = tiny(name), torch.randn(1, 3, 64, 64)
        folded = fold_batch_norm(model, x)
        norms = sum(isinstance(module, nn.BatchNorm2d) for module in model.modules())
        assert folded.folded == (norms, norms)
        assert torch.allclose(folded(x), model(x), atol=1e-4)


def test_gradients_reach_every_parameter():
    model = tiny(drop_rate=0.1, drop_path_rate=0.2).train()
    model(torch.randn(4, 3, 64, 64)).square().sum().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())
    rates = [module.drop_path.rate for module in model.modules() if isinstance(module, OsaBlock)]
    assert rates == pytest.approx([0, 0.04, 0.08, 0.12, 0.16, 0.2])


# --- weights in other layouts


def timms(key: str) -> str:
    return key.replace("levels.", "stages.").replace(".norm.", ".bn.")


def authors(key: str, depthwise: bool) -> str:
    """Our key in the authors' words."""
    parts = key.split(".")
    leaf = {"conv": "conv", "norm": "norm", "conv_dw": "dw_conv3x3", "conv_pw": "pw_conv1x1"}
    if parts[0] == "head":
        return f"classifier.{parts[2]}"
    if parts[0] == "stem":
        separable = depthwise and parts[1] != "0" and parts[2] == "norm"
        return f"stem.stem_{int(parts[1]) + 1}/{'pw_norm' if separable else leaf[parts[2]]}.{parts[3]}"
    stage, block = int(parts[1]) + 2, int(parts[3]) + 1
    module = f"OSA{stage}_{block}"
    prefix = f"stage{stage}.{module}"
    if parts[4] == "attn":
        return f"{prefix}.ese.fc.{parts[6]}"
    if parts[4] == "conv_concat":
        return f"{prefix}.concat.{module}_concat/{leaf[parts[5]]}.{parts[6]}"
    if parts[4] == "conv_reduction":
        return f"{prefix}.conv_reduction.{module}_reduction_0/{leaf[parts[5]]}.{parts[6]}"
    name = "pw_norm" if depthwise and parts[6] == "norm" else leaf[parts[6]]
    return f"{prefix}.layers.{parts[5]}.{module}_{parts[5]}/{name}.{parts[7]}"


@torch.no_grad()
@pytest.mark.parametrize("name", ["vovnet39", "ese_vovnet99b", "ese_vovnet19b_dw"])
def test_weights_of_timm_and_of_the_authors(name):
    depthwise = name.endswith("dw")
    settings = {"stem": (4, 4, 4)} if depthwise else {}
    source, model = tiny(name, **settings), build(name, **{**TINY, **settings}).eval()
    x = torch.randn(1, 3, 64, 64)
    state = source.state_dict()
    for layout, state_there in (
        ("timm", {timms(key): tensor for key, tensor in state.items()}),
        ("official", {authors(key, depthwise): tensor for key, tensor in state.items()}),
    ):
        for parameter in model.parameters():
            parameter.zero_()
        assert load_weights(model, state_there) == layout
        assert torch.equal(model(x), source(x))
    with pytest.raises(ValueError, match="these are no weights of this model"):
        load_weights(tiny("vovnet57"), {timms(key): tensor for key, tensor in state.items()})


def test_keys_as_they_are_released():
    """Keys as those codes write them."""
    tensor = torch.zeros(1)
    assert list(from_timm({"stages.1.blocks.0.conv_mid.2.bn.running_var": tensor})) == [
        "levels.1.blocks.0.conv_mid.2.norm.running_var"
    ]
    released = {
        "stem.stem_3/norm.weight": "stem.2.norm.weight",
        "stem.stem_2/pw_conv1x1.weight": "stem.1.conv_pw.weight",
        "stage5.OSA5_2.layers.4.OSA5_2_4/conv.weight": "levels.3.blocks.1.conv_mid.4.conv.weight",
        "stage4.OSA4_1.layers.0.OSA4_1_0/dw_conv3x3.weight": "levels.2.blocks.0.conv_mid.0.conv_dw.weight",
        "stage4.OSA4_1.conv_reduction.OSA4_1_reduction_0/conv.weight": "levels.2.blocks.0.conv_reduction.conv.weight",
        "stage3.OSA3_1.concat.OSA3_1_concat/norm.bias": "levels.1.blocks.0.conv_concat.norm.bias",
        "stage2.OSA2_1.ese.fc.bias": "levels.0.blocks.0.attn.fc.bias",
        "classifier.weight": "head.fc.weight",
    }
    assert list(from_official(dict.fromkeys(released, tensor))) == list(released.values())


# --- the cost of memory access


def test_the_bound_holds_and_is_met_just_by_as_many_inputs_as_outputs():
    draw = random.Random(0)
    for _ in range(300):
        height, width, kernel = draw.randint(1, 64), draw.randint(1, 64), draw.choice((1, 3, 5))
        given, out = draw.randint(1, 256), draw.randint(1, 256)
        for outputs in (given, out):
            cost = memory_access_cost(height, width, given, outputs, kernel)
            least = least_memory_access_cost(conv_macs(height, width, given, outputs, kernel), height, width, kernel)
            assert cost == least if given == outputs else cost > least


def test_costs_by_hand():
    assert conv_macs(7, 5, 2, 3, 3) == 7 * 5 * 9 * 2 * 3
    assert memory_access_cost(7, 5, 2, 3, 3) == 35 * 5 + 54
    assert least_memory_access_cost(100, 5, 5) == 2 * math.sqrt(2500) + 4
    assert computation_efficiency(5e9, 2.0) == 5e9
    assert energy_per_image(12.0, 4) == 3.0


def test_inputs_of_inner_layers_grow_linearly_in_one_and_quadratically_in_the_other():
    for given, width, layers in ((1, 1, 1), (128, 64, 1), (128, 64, 5), (7, 20, 12), (256, 3, 20)):
        chain = [given] + [width] * (layers - 1)
        dense = [given + width * layer for layer in range(layers)]
        assert inner_inputs(given, width, layers, dense=False) == sum(chain)
        assert inner_inputs(given, width, layers, dense=True) == sum(dense)


def test_inner_layers_of_osa_sit_on_the_bound_and_those_of_a_dense_block_do_not():
    x = torch.zeros(2, 16, 8, 8)
    osa = memory_access(OsaBlock(16, 8, 16, 4).eval(), x)
    dense = memory_access(DenseBlock(16, 8, 16, 4).eval(), x)
    assert [cost.elements == cost.least for cost in osa] == [False, True, True, True, False]
    assert not any(cost.elements == cost.least for cost in dense)
    assert all(cost.elements >= cost.least for cost in osa + dense)


def test_costs_of_a_network_are_those_of_its_layers_whatever_the_batch():
    model = tiny("vovnet39a")
    one, three = (memory_access(model, torch.zeros(batch, 3, 64, 64)) for batch in (1, 3))
    assert one == three
    assert sum(cost.macs for cost in one) == count_cost(model, torch.zeros(1, 3, 64, 64)).macs - 20 * 5
    first = one[0]  # of stride 2: its input is larger than its output
    assert first.elements == 3 * 64 * 64 + 4 * 32 * 32 + 4 * 27
    long = nn.Sequential(nn.Conv2d(4, 4, (1, 7), padding=(0, 3)))
    (found,) = memory_access(long, torch.zeros(2, 4, 5, 6))
    assert found.elements == found.least == 30 * 8 + 7 * 16
    block = {cost.name: cost for cost in one}["levels.0.blocks.0.conv_mid.1.conv"]
    assert block.elements == memory_access_cost(16, 16, 4, 4, 3)


def test_dense_blocks_at_equal_parameters_move_more_the_more_layers_they_have():
    """56 x 56, 64 channels in and 128 out: the paper's argument, by its own model."""
    ratios = []
    for layers, width, dense_width in ((5, 40, 20), (12, 40, 14)):
        with torch.device("meta"):
            osa, dense = OsaBlock(64, width, 128, layers).eval(), DenseBlock(64, dense_width, 128, layers).eval()
            counts = [sum(p.numel() for p in block.parameters()) for block in (dense, osa)]
            x = torch.zeros(1, 64, 56, 56)
            costs = [sum(cost.elements for cost in memory_access(block, x)) for block in (dense, osa)]
        assert counts[0] == pytest.approx(counts[1], rel=0.05)
        ratios.append(costs[0] / costs[1])
    assert ratios[0] > 1.1
    assert ratios[1] > 1.3


# --- bad input


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: OsaBlock(0, 4, 4), ValueError, "channels_in"),
        (lambda: OsaBlock(4, 4, 4, 0), ValueError, "layers"),
        (lambda: DenseBlock(4, 4.0, 4), TypeError, "width"),
        (lambda: build("vovnet39a", widths=(1, 2, 3)), ValueError, "stem must have 3 widths"),
        (lambda: build("vovnet39a", stem=(8, 0, 8)), ValueError, "a width of stem"),
        (lambda: conv_macs(1, 1, 0, 1), ValueError, "channels_in"),
        (lambda: memory_access(tiny(), torch.zeros(0, 3, 64, 64)), ValueError, "example"),
        (lambda: build("vovnet39a", ese="some"), ValueError, "ese must be one of"),
        (lambda: build("vovnet39a", identity=1), TypeError, "identity"),
        (lambda: build("vovnet39a", depths=(1, 0, 1, 1)), ValueError, "depths"),
        (lambda: build("vovnet39a", drop_path_rate=1.0), ValueError, "drop_path_rate"),
        (lambda: memory_access_cost(0, 1, 1, 1), ValueError, "height"),
        (lambda: memory_access_cost(1, 1, 1, 1, True), TypeError, "kernel"),
        (lambda: least_memory_access_cost(-1, 1, 1), ValueError, "macs"),
        (lambda: inner_inputs(1, 1, 0, dense=True), ValueError, "layers"),
        (lambda: computation_efficiency(1.0, 0.0), ValueError, "seconds"),
        (lambda: energy_per_image(math.inf, 1), ValueError, "joules"),
        (lambda: tiny()(torch.zeros(1, 1, 64, 64)), ValueError, "^x must have shape"),
    ],
)
def test_bad_input_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call()
