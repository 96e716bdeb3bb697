"""Swin and Swin-MLP: published sizes, transformers' logits, other layouts of weights, any input size, and what a block may see."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from torch import nn

from assay.measure.cost import count_cost
from assay.methods.core.vision.registry import build
from assay.methods.core.vision.weights import load_weights
from assay.methods.core.vision.windows import resized_bias_table
from assay.methods.vision.swin import (
    CONFIGS,
    MLP_CONFIGS,
    WindowMlp,
    attention_macs,
    to_window,
)

PARAMETERS = {
    "swin_tiny_patch4_window7_224": 28_288_354,
    "swin_small_patch4_window7_224": 49_606_258,
    "swin_base_patch4_window7_224": 87_768_224,
    "swin_large_patch4_window7_224": 196_532_476,
    "swin_base_patch4_window12_384": 87_903_584,
    "swin_large_patch4_window12_384": 196_735_516,
    "swin_tiny_c24_patch4_window8_256": 28_306_432,
    "swin_mlp_tiny_c24_patch4_window8_256": 20_386_632,
    "swin_mlp_tiny_c12_patch4_window8_256": 21_152_072,
    "swin_mlp_tiny_c6_patch4_window8_256": 22_682_952,
    "swin_mlp_base_patch4_window7_224": 60_659_416,
}
GIGA_MACS = {  # as published, of multiply-accumulates with norms and the like
    "swin_tiny_patch4_window7_224": 4.5,
    "swin_small_patch4_window7_224": 8.7,
    "swin_base_patch4_window7_224": 15.4,
    "swin_large_patch4_window7_224": 34.5,
    "swin_base_patch4_window12_384": 47.1,
    "swin_large_patch4_window12_384": 103.9,
    "swin_tiny_c24_patch4_window8_256": 5.9,
    "swin_mlp_tiny_c24_patch4_window8_256": 4.0,
    "swin_mlp_tiny_c12_patch4_window8_256": 4.0,
    "swin_mlp_tiny_c6_patch4_window8_256": 4.0,
    "swin_mlp_base_patch4_window7_224": 10.4,
}
SWIN, MLP = "swin_tiny_patch4_window7_224", "swin_mlp_base_patch4_window7_224"
SMALL = {
    "num_classes": 5,
    "embed_dim": 8,
    "depths": (2, 2),
    "num_heads": (2, 4),
    "window_size": 4,
    "drop_path_rate": 0.0,
}


@functools.cache
def on_meta(name, **settings):
    with torch.device("meta"):
        return build(name, **settings).eval()


def tiny(name=SWIN, **settings):
    torch.manual_seed(0)
    model = build(name, **{**SMALL, **settings})
    for value in model.parameters():
        nn.init.normal_(value, std=0.2)
    return model.eval()


def images(*size, batch=2):
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(1))


# ------------------------------------------------------------------------------------------------------------ published sizes


def work(model, settings):
    """Multiply-accumulates of an image, from the formulas."""
    side, window = model.input_size // 4, settings.get("window_size", 7)
    total = side**2 * 48 * settings["embed_dim"]
    for width, depth, stage in zip(model.channels, settings["depths"], model.layers, strict=True):
        for place in range(depth):
            total += 8 * side**2 * width**2
            if isinstance(stage.blocks[0].attn, WindowMlp):
                windows = side // window + (place % 2 if side > window else 0)
                total += windows**2 * window**4 * width
            else:
                total += attention_macs(side, side, width, window)
        if stage.downsample is not None:
            side //= 2
            total += side**2 * 8 * width**2
    return total + model.num_features * 1000


@pytest.mark.parametrize("name", [*CONFIGS, *MLP_CONFIGS])
def test_parameters_and_work_are_the_published_ones(name):
    model = on_meta(name)
    assert sum(value.numel() for value in model.parameters()) == PARAMETERS[name]
    found = work(model, {**CONFIGS, **MLP_CONFIGS}[name])
    assert found / 1e9 == pytest.approx(GIGA_MACS[name], rel=0.013)
    if "tiny" in name and "c12" not in name and "c6" not in name:
        size = model.input_size
        assert count_cost(model, torch.empty(1, 3, size, size, device="meta")).macs == found
    if name == "swin_tiny_patch4_window7_224":
        assert found == 4_490_566_656


def test_work_is_linear_in_pixels():
    model = on_meta("swin_tiny_patch4_window7_224", num_classes=0, depths=(2, 2), num_heads=(3, 6))
    small, large = (count_cost(model, torch.empty(1, 3, size, size, device="meta")).macs for size in (224, 448))
    assert large == 4 * small
    everywhere = on_meta("swin_tiny_patch4_window7_224", num_classes=0, depths=(2,), num_heads=(3,), window_size=28)
    small, large = (count_cost(everywhere, torch.empty(1, 3, size, size, device="meta")).macs for size in (56, 112))
    assert large > 6 * small


def test_work_of_attention_is_equations_1_and_2():
    assert attention_macs(56, 56, 96) == 4 * 56**2 * 96**2 + 2 * 56**4 * 96
    assert attention_macs(56, 56, 96, 7) == 4 * 56**2 * 96**2 + 2 * 7**2 * 56**2 * 96
    with pytest.raises(ValueError, match="window must be a whole number at least 1, got 0"):
        attention_macs(56, 56, 96, 0)
    with pytest.raises(TypeError, match="height must be a whole number at least 1, got 5.5"):
        attention_macs(5.5, 56, 96)


# --------------------------------------------------------------------------------------------------------- transformers' Swin


def theirs(size, **settings):
    from transformers import SwinConfig, SwinForImageClassification

    torch.manual_seed(0)
    config = SwinConfig(
        image_size=size, embed_dim=8, depths=[2, 2], num_heads=[2, 4], window_size=4, num_labels=5, **settings
    )
    model = SwinForImageClassification(config).eval()
    for value in model.parameters():
        nn.init.normal_(value, std=0.2)
    return model


@pytest.mark.parametrize("size", [(32, 32), (64, 64), (71, 66)])
def test_logits_and_features_equal_those_of_transformers(size):
    other, model, x = theirs(size), tiny(), images(*size)
    assert load_weights(model, other.state_dict()) == "transformers"
    with torch.no_grad():
        expected = other(x, output_hidden_states=True)
        assert torch.allclose(model(x), expected.logits, atol=2e-5, rtol=1e-4)
        maps = list(model.feature_maps(x).values())
        assert torch.allclose(maps[-1], expected.reshaped_hidden_states[-1], atol=2e-5, rtol=1e-4)


def test_transformers_files_have_older_names(tmp_path):
    from safetensors.torch import load_file

    other = theirs((32, 32))
    other.save_pretrained(tmp_path)
    assert any(".attention.self.query." in key for key in load_file(tmp_path / "model.safetensors"))
    model = tiny()
    assert load_weights(model, tmp_path / "model.safetensors") == "transformers"
    with torch.no_grad():
        assert torch.allclose(model(images(32, 32)), other(images(32, 32)).logits, atol=2e-5, rtol=1e-4)


def test_a_part_of_query_key_and_value_is_refused():
    state = theirs((32, 32)).state_dict()
    del state["swin.encoder.layers.0.blocks.0.attention.k_proj.weight"]
    with pytest.raises(ValueError, match="no weights of this model.*as transformers, KeyError"):
        load_weights(tiny(), state)


# ---------------------------------------------------------------------------------------------------------------- other layouts


def test_official_layout_has_tables_that_follow_from_sizes():
    source, model = tiny(), tiny()
    state = dict(source.state_dict())
    for stage, block in ((0, 0), (0, 1), (1, 0), (1, 1)):
        state[f"layers.{stage}.blocks.{block}.attn.relative_position_index"] = torch.zeros(16, 16, dtype=torch.long)
    state["layers.0.blocks.1.attn_mask"] = torch.zeros(4, 16, 16)
    nn.init.zeros_(model.head.weight)
    assert load_weights(model, state) == "official"
    assert torch.equal(model(images(32, 32)), source(images(32, 32)))
    assert load_weights(model, source.state_dict()) == "assay"


def test_timm_layout_merges_at_the_start_of_a_stage():
    source, model = tiny(), tiny()
    state = {}
    for key, value in source.state_dict().items():
        key = key.replace("layers.0.downsample", "layers.1.downsample").replace("head.", "head.fc.")
        state[key] = value
    assert "layers.1.downsample.reduction.weight" in state
    nn.init.zeros_(model.head.weight)
    assert load_weights(model, state) == "timm"
    assert torch.equal(model(images(32, 32)), source(images(32, 32)))


def test_official_layout_of_swin_mlp():
    source, model = tiny(MLP), tiny(MLP)
    state = {key.replace(".attn.", "."): value for key, value in source.state_dict().items()}
    assert "layers.0.blocks.0.spatial_mlp.weight" in state
    assert load_weights(model, state) == "official"


def test_weights_of_another_model_are_refused_and_nothing_is_loaded():
    model, other = tiny(), tiny(embed_dim=16)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="no weights of this model.*shapes differ"):
        load_weights(model, other.state_dict())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_weights_for_larger_windows():
    model, larger = tiny(), tiny(window_size=6)
    state = model.state_dict()
    grown = to_window(state, 6)
    assert load_weights(larger, grown) == "assay"
    for key, value in larger.state_dict().items():
        table = key.endswith("relative_position_bias_table")
        assert value.shape[:1] == (121,) or not table
        assert torch.equal(value, resized_bias_table(state[key], 4, 6) if table else state[key])
    same = to_window(state, 4)
    assert all(torch.allclose(value, same[key], atol=1e-6) for key, value in state.items())


# -------------------------------------------------------------------------------------------------------------- what it may see


def reach(model, y, x, size=64):
    """The pixels that the gradient of a position of the first map reaches: bool (size, size)."""
    picture = images(size, size, batch=1).requires_grad_()
    (gradient,) = torch.autograd.grad(next(model.stages(picture))[1][0, :, y, x].sum(), picture)
    return gradient.abs().sum((0, 1)) > 0


def test_a_block_sees_its_window_and_the_next_one_its_neighbours():
    def box(top, below):
        found = torch.zeros(64, 64, dtype=torch.bool)
        found[4 * top : 4 * below, 4 * top : 4 * below] = True
        return found

    assert torch.equal(reach(tiny(shift_size=0), 4, 4), box(4, 8))
    assert torch.equal(reach(tiny(depths=(1, 1)), 4, 4), box(4, 8))
    assert torch.equal(reach(tiny(), 4, 4), box(0, 8))
    assert bool(reach(tiny(window_size=16), 4, 4).all())


def test_no_window_crosses_the_edge_of_the_picture():
    assert not bool(reach(tiny(), 0, 0)[32:].any())


# ----------------------------------------------------------------------------------------------------------- use as a backbone


@pytest.mark.parametrize("name", [SWIN, MLP])
@pytest.mark.parametrize("size", [(32, 32), (33, 47), (3, 5), (16, 64)])
def test_any_size_of_image(name, size):
    model, x = tiny(name), images(*size)
    with torch.no_grad():
        logits = model(x)
        one = torch.cat([model(x[:1]), model(x[1:])])
    assert logits.shape == (2, 5)
    assert torch.allclose(logits, one, atol=1e-5)  # a picture does not depend on those beside it
    maps = model.feature_maps(x)
    height, width = size
    for stride, found in maps.items():
        assert found.shape == (2, 2 * stride, -(-height // stride), -(-width // stride))


@pytest.mark.parametrize("name", [SWIN, MLP])
def test_memory_order_precision_and_gradients(name):
    model, x = tiny(name), images(36, 32)
    with torch.no_grad():
        expected = model(x)
        assert torch.allclose(model(x.contiguous(memory_format=torch.channels_last)), expected, atol=1e-5)
        half = copy.deepcopy(model).bfloat16()(x.bfloat16())
    assert (half.float() - expected).abs().max() < 0.1 * expected.abs().max()
    assert model(x[:0]).shape == (0, 5)
    model.train()
    model(x).square().mean().backward()
    assert all(value.grad is not None and bool(value.grad.any()) for value in model.parameters())


@pytest.mark.parametrize("name", [SWIN, MLP])
def test_export(name):
    model, x = tiny(name, depths=(2,), num_heads=(2,)), images(32, 36)
    exported = torch.export.export(model, (x,)).module()
    with torch.no_grad():
        assert torch.allclose(exported(x), model(x), atol=1e-5)


def test_features_only_runs_no_more_than_is_asked_for():
    model = build(
        "swin_tiny_patch4_window7_224", features_only=True, out_indices=(0, 1), embed_dim=8, num_heads=(1, 2, 4, 8)
    )
    assert model.feature_info.channels() == [8, 16]
    assert model.feature_info.reduction() == [4, 8]
    ran = []
    for stage in model.model.layers:
        stage.blocks.register_forward_hook(lambda module, given, out: ran.append(module))
        if stage.downsample is not None:
            stage.downsample.register_forward_hook(lambda module, given, out: ran.append(module))
    maps = model(images(56, 56))
    assert [tuple(found.shape) for found in maps] == [(2, 8, 14, 14), (2, 16, 7, 7)]
    layers = model.model.layers
    assert ran == [layers[0].blocks, layers[0].downsample, layers[1].blocks]


def test_the_head_pools_the_last_map():
    model, x = tiny(), images(64, 64)
    features = model.forward_features(x)
    assert features.shape == (2, 8, 8, 16)  # as timm has them: channels last
    assert torch.allclose(model.forward_head(features, pre_logits=True), features.mean((1, 2)))
    assert torch.equal(model.forward_head(features), model(x))
    model.reset_classifier(3)
    assert model(x).shape == (2, 3)
    model.reset_classifier(0)
    assert model(x).shape == (2, 16)


def test_paths_are_dropped_in_training_only():
    torch.manual_seed(0)
    model, x = tiny(drop_path_rate=0.5), images(32, 32)
    rates = [block.drop_path.rate for stage in model.layers for block in stage.blocks]
    assert rates == pytest.approx([0, 1 / 6, 1 / 3, 0.5])
    assert torch.equal(model(x), model(x))
    model.train()
    assert not torch.equal(model(x), model(x))


def test_published_rates_of_dropped_paths():
    rates = {name: settings["drop_path_rate"] for name, settings in (CONFIGS | MLP_CONFIGS).items()}
    assert [rates[f"swin_{size}_patch4_window7_224"] for size in ("tiny", "small", "base", "large")] == [
        0.2,
        0.3,
        0.5,
        0.2,
    ]
    model = on_meta("swin_small_patch4_window7_224")
    assert model.layers[-1].blocks[-1].drop_path.rate == 0.3
    assert {norm.eps for norm in model.modules() if isinstance(norm, nn.LayerNorm)} == {1e-5}


def test_settings_of_attention_reach_every_block():
    model = tiny(mask_padding=True, qkv_bias=False)
    layers = [block.attn for stage in model.layers for block in stage.blocks]
    assert all(layer.mask_padding and layer.qkv.bias is None for layer in layers)
    assert not any(block.attn.mask_padding for stage in tiny().layers for block in stage.blocks)
    with pytest.raises(TypeError, match="mask_padding must be True or False, got 1"):
        tiny(mask_padding=1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"shift_size": 4}, "shift_size must be a whole number at least 0 and at most 3, got 4"),
        ({"window_size": 0}, "window_size must be a whole number at least 1, got 0"),
        ({"num_heads": (2,)}, r"num_heads must have one entry a stage \(2\), got \(2,\)"),
        ({"num_heads": (3, 4)}, "width must be divisible by heads=3, got 8"),
        ({"depths": (2, 0)}, "depths must be a whole number at least 1, got 0"),
        ({"drop_path_rate": 1.0}, "drop_path_rate must be a finite number at least 0 and below 1, got 1.0"),
    ],
)
def test_bad_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        tiny(**settings)


def test_bad_images_are_named():
    with pytest.raises(ValueError, match=r"x must have shape \(batch, 3, height, width\), got \(2, 1, 8, 8\)"):
        tiny()(torch.zeros(2, 1, 8, 8))
    with pytest.raises(TypeError, match="x must hold torch.float32"):
        tiny()(torch.zeros(2, 3, 8, 8, dtype=torch.float64))


# -------------------------------------------------------------------------------------------------------------------- Swin-MLP


@pytest.mark.parametrize("shift", [0, 1, 2])
@pytest.mark.parametrize("size", [(8, 12), (4, 8), (6, 9)])
def test_mixing_in_windows_is_a_grouped_convolution_over_positions(shift, size):
    """The released form, written out: zeros all around, a window at a time, a head at a time, in float64."""
    torch.manual_seed(0)
    layer, x = WindowMlp(6, 4, 2, shift=shift).eval(), torch.randn(2, *size, 6)
    weight = layer.spatial_mlp.weight.double().view(2, 16, 16)
    bias = layer.spatial_mlp.bias.double().view(2, 16, 1)
    expected = torch.zeros(2, *size, 6, dtype=torch.float64)
    tops, lefts = (range(-(4 - shift) if shift and side > 4 else 0, side, 4) for side in size)
    for top in tops:
        for left in lefts:
            for head in range(2):
                window = torch.zeros(2, 16, 3, dtype=torch.float64)
                places = [(top + i // 4, left + i % 4) for i in range(16)]
                inside = [i for i, (y, z) in enumerate(places) if 0 <= y < size[0] and 0 <= z < size[1]]
                for i in inside:
                    window[:, i] = x[:, places[i][0], places[i][1], 3 * head : 3 * head + 3]
                mixed = weight[head] @ window + bias[head]
                for i in inside:
                    expected[:, places[i][0], places[i][1], 3 * head : 3 * head + 3] = mixed[:, i]
    assert (layer(x) - expected).abs().max() < 1e-5


def test_work_of_swin_mlp_depends_on_the_shift():
    plain, moved = (count_cost(WindowMlp(6, 4, 2, shift=shift), torch.zeros(1, 8, 12, 6)).macs for shift in (0, 2))
    assert plain == 8 * 12 * 16 * 6
    assert moved == (2 + 1) * (3 + 1) * 16 * 16 * 6
