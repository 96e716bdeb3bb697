"""LowFormer: Lowtention against plain attention, counts of every published model, the importer, and the study of execution times."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from assay.measure.cost import count_cost
from assay.methods.core.vision.folding import fold_batch_norm
from assay.methods.core.vision.weights import load_weights
from assay.methods.vision import build
from assay.methods.vision.lowformer import (
    CONFIGS,
    Case,
    FusedMBConv,
    LowFormer,
    LowFormerBlock,
    Lowtention,
    MBConv,
    bench_modules,
    equal_macs,
    from_official,
    fused_and_not,
    lowtention_heads,
    rank_correlation,
)

# parameters and MACs of an image of 224 pixels, 1000 classes
PUBLISHED = {
    "lowformer_b0": (14_100_472, 944_042_240),
    "lowformer_b1": (17_936_312, 1_410_980_096),
    "lowformer_b15": (33_982_028, 2_573_737_600),
    "lowformer_b3": (57_086_920, 6_098_685_440),
    "lowformer_e1": (18_896_268, 1_348_157_440),
    "lowformer_e2": (22_750_664, 3_789_335_040),
    "lowformer_e3": (41_316_808, 4_865_560_064),
}
TINY = {"width": 8, "head": (16, 24), "num_classes": 5}


def worn(model: nn.Module) -> nn.Module:
    """In eval mode, with norms as after training."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_var, 0.5, 2.0)
            nn.init.normal_(module.running_mean, std=0.1)
        if isinstance(module, nn.BatchNorm2d | nn.GroupNorm | nn.LayerNorm):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.3)
    return model.eval()


def tiny(name: str = "lowformer_b1", **settings) -> LowFormer:
    torch.manual_seed(0)
    return worn(build(name, **{**TINY, "depths": (1, 2, 1, 1, 1), **settings}))


# --- counts


@pytest.mark.parametrize("name", CONFIGS)
def test_parameters_and_macs_of_every_published_model(name):
    with torch.device("meta"):
        cost = count_cost(build(name).eval(), torch.zeros(1, 3, 224, 224))
    assert not cost.uncounted
    assert (cost.params, cost.macs) == PUBLISHED[name]


def test_figures_that_the_authors_print():
    """In millions of MACs, to their rounding; E3's printed 5350 does not follow from its released configuration."""
    printed = {"b0": 944, "b1": 1410, "b15": 2573, "b3": 6098, "e1": 1350, "e2": 3800}
    for name, figure in printed.items():
        assert PUBLISHED[f"lowformer_{name}"][1] / 1e6 == pytest.approx(figure, rel=0.01), name
    for name, millions in {"b0": 14.1, "b1": 17.9, "b15": 33.9, "b3": 57.1}.items():
        assert PUBLISHED[f"lowformer_{name}"][0] / 1e6 == pytest.approx(millions, abs=0.1), name


@pytest.mark.parametrize("channels", [64, 128, 512])
def test_a_fused_block_does_up_to_five_times_the_macs(channels):
    x, e = torch.zeros(1, channels, 4, 4), 4
    fused, plain = (count_cost(kind(channels, channels).eval(), x).macs for kind in (FusedMBConv, MBConv))
    assert fused == 16 * 10 * e * channels**2
    assert plain == 16 * (2 * e * channels**2 + 9 * e * channels)
    assert fused / plain == pytest.approx(10 * channels / (2 * channels + 9))
    assert fused / plain < 5


def test_heads_are_rounded_as_in_the_release():
    known = {
        64: (1, 32),
        128: (2, 32),
        160: (2, 40),
        256: (4, 32),
        320: (5, 32),
        512: (8, 32),
        50: (1, 25),
        61: (1, 30),
    }
    assert {channels: lowtention_heads(channels) for channels in known} == known


# --- Lowtention


@pytest.mark.parametrize("stride", [1, 2, 3, 4])
@pytest.mark.parametrize("size", [(8, 8), (7, 10), (5, 3), (1, 4)])
def test_any_size_comes_out_as_it_went_in(stride, size):
    layer = Lowtention(16, stride).eval()
    assert layer(torch.zeros(2, 16, *size)).shape == (2, 16, *size)


@torch.no_grad()
def test_with_deltas_for_its_convolutions_it_is_multi_head_attention():
    """Stride 1, all channels, the depthwise kernel and the transposed one empty but for their centres."""
    torch.manual_seed(0)
    heads, dim, channels = 3, 4, 12
    layer = Lowtention(channels, heads=heads, head_dim=dim).double().eval()
    layer.depthwise.weight.zero_()
    layer.depthwise.weight[:, :, 1, 1] = 1
    layer.norm.eps = 0.0
    centre = torch.randn(channels, channels, dtype=torch.float64)
    layer.project.weight.zero_()
    layer.project.weight[:, :, 1, 1] = centre
    x = torch.randn(2, channels, 5, 3, dtype=torch.float64)
    tokens = x.flatten(2).transpose(1, 2)
    theirs = nn.MultiheadAttention(channels, heads, batch_first=True, dtype=torch.float64)
    ours = layer.qkv.weight[:, :, 0, 0].view(heads, 3, dim, channels)  # each head's q, k and v together
    theirs.in_proj_weight.copy_(ours.transpose(0, 1).reshape(3 * channels, channels))
    theirs.in_proj_bias.zero_()
    theirs.out_proj.weight.copy_(centre.T)
    theirs.out_proj.bias.copy_(layer.project.bias)
    expected = theirs(tokens, tokens, tokens, need_weights=False)[0]
    assert torch.allclose(layer(x).flatten(2).transpose(1, 2), expected, atol=1e-12)


@torch.no_grad()
def test_lowtention_by_hand():
    """Stride 2 and an odd side, against softmax written out, in double precision."""
    torch.manual_seed(0)
    layer = worn(Lowtention(64, 2, heads=2, head_dim=5)).double()
    x = torch.randn(2, 64, 7, 6, dtype=torch.float64)
    norm = layer.norm
    y = F.conv2d(x, layer.depthwise.weight, stride=2, padding=2, groups=64)
    y = (y - norm.running_mean[:, None, None]) / torch.sqrt(norm.running_var[:, None, None] + norm.eps)
    y = F.conv2d(y * norm.weight[:, None, None] + norm.bias[:, None, None], layer.qkv.weight)
    heads = []
    for head in y.flatten(2).split(15, 1):
        q, k, v = (part.transpose(1, 2) for part in head.split(5, 1))
        heads.append((torch.softmax(q @ k.transpose(1, 2) / math.sqrt(5), -1) @ v).transpose(1, 2))
    joined = torch.cat(heads, 1).view(2, 10, 4, 3)
    out = F.conv_transpose2d(joined, layer.project.weight, layer.project.bias, stride=2, padding=1)
    assert layer.depthwise.kernel_size == (5, 5)
    assert torch.allclose(layer(x), out[:, :, :7, :6], atol=1e-12)


def test_macs_of_the_attention_itself_fall_with_the_fourth_power_of_the_stride():
    """Half of the resolution and half of the channels: a thirty-second of full attention."""

    def products(layer, x):
        kinds = (nn.Conv2d, nn.ConvTranspose2d)
        outside = sum(
            count.macs
            for count in count_cost(layer, x).modules
            if isinstance(dict(layer.named_modules()).get(count.name), kinds)
        )
        return count_cost(layer, x).macs - outside

    x = torch.zeros(1, 128, 8, 8)
    half = products(Lowtention(128, 2).eval(), x)
    assert half == 2 * (64 // 4) ** 2 * 64
    assert products(Lowtention(128, heads=4, head_dim=32).eval(), x) == 32 * half


@torch.no_grad()
def test_positions_see_each_other_and_pictures_do_not():
    torch.manual_seed(0)
    layer = worn(Lowtention(64, 2))
    x = torch.randn(2, 64, 16, 16)
    other = x.clone()
    other[0, :, 0, 0] += 5
    moved = (layer(other) - layer(x)).abs().amax(1)
    assert moved[0, -1, -1] > 0
    assert moved[1].max() == 0


# --- blocks and the network


def test_a_block_has_the_parts_that_its_settings_say():
    full = LowFormerBlock(64, stride=2)
    assert isinstance(full.attention_norm, nn.GroupNorm)
    assert isinstance(full.local, FusedMBConv)
    assert full.local.spatial_conv.conv.bias is not None
    no_mlp = LowFormerBlock(64, mlp=False)
    assert isinstance(no_mlp.attention_norm, nn.Identity)
    assert no_mlp.mlp is None
    assert no_mlp.attention is not None
    bare = LowFormerBlock(64, attention=False)
    assert bare.attention is None
    assert bare.mlp is None
    wide = LowFormerBlock(256)
    assert isinstance(wide.local, MBConv)
    assert [hasattr(part, "norm") for part in wide.local] == [False, False, True]


@torch.no_grad()
def test_a_block_adds_each_of_its_parts():
    torch.manual_seed(0)
    block = worn(LowFormerBlock(64, stride=2))
    x = torch.randn(2, 64, 7, 7)
    y = x + block.attention(F.group_norm(x, 1, block.attention_norm.weight, block.attention_norm.bias))
    z = y + block.mlp(y)
    assert torch.allclose(block(x), z + block.local(z), atol=1e-5)


@pytest.mark.parametrize("size", [(64, 64), (65, 97), (33, 40), (1, 1)])
def test_maps_of_any_size(size):
    maps = worn(build("lowformer_b1", features_only=True, **TINY))
    with torch.no_grad():
        found = maps(torch.zeros(1, 3, *size))
    assert maps.feature_info.reduction() == [2, 4, 8, 16, 32]
    assert [each.shape[1] for each in found] == maps.feature_info.channels() == [8, 16, 32, 64, 128]
    assert [tuple(each.shape[2:]) for each in found] == [
        tuple(-(-side // stride) for side in size) for stride in (2, 4, 8, 16, 32)
    ]


@torch.no_grad()
def test_forward_is_features_and_head_alone_or_in_a_batch():
    model, x = tiny(), torch.randn(3, 3, 64, 48)
    logits = model(x)
    features = model.feature_maps(x)[32]
    assert torch.equal(features, model.forward_features(x))
    pooled = model.forward_head(features, pre_logits=True)
    assert pooled.shape == (3, 24)
    assert torch.allclose(logits, model.head(pooled))
    assert torch.allclose(logits[:1], model(x[:1]), atol=1e-5)
    model.reset_classifier(2)
    assert model(x).shape == (3, 2)


@torch.no_grad()
def test_channels_last_half_precision_and_export():
    model, x = tiny(), torch.randn(2, 3, 64, 64)
    expected = model(x)
    last = model.to(memory_format=torch.channels_last)(x.contiguous(memory_format=torch.channels_last))
    assert torch.allclose(last, expected, atol=1e-4)
    exported = torch.export.export(model, (x,), strict=False).module()
    assert torch.allclose(exported(x), expected, atol=1e-4)
    half = model.to(torch.bfloat16)(x.bfloat16())
    assert half.dtype == torch.bfloat16
    assert (half - expected).abs().max() < 0.1 * expected.abs().max()


@torch.no_grad()
@pytest.mark.parametrize("name", ["lowformer_b1", "lowformer_e1", "lowformer_e3"])
def test_all_norms_of_batches_fold(name):
    model, x = tiny(name, width=16), torch.randn(1, 3, 64, 64)
    folded = fold_batch_norm(model, x)
    norms = sum(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    assert folded.folded == (norms, norms)
    assert torch.allclose(folded(x), model(x), atol=1e-4)


def test_gradients_reach_every_parameter():
    model = tiny(drop_rate=0.1, drop_path_rate=0.2).train()
    model(torch.randn(4, 3, 64, 64)).square().sum().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())


def test_lowtention_agrees_with_finite_differences():
    torch.manual_seed(0)
    layer = worn(Lowtention(4, 2, heads=2, head_dim=2)).double()
    x = torch.randn(1, 4, 5, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(layer, (x,))


# --- weights of the release


def released(key: str, attention: bool, mlp: bool) -> str:
    """Our key in the released code's words."""
    parts = key.split(".")
    if parts[0] == "head_conv":
        return ".".join(["head.op_list.0", *parts[1:]])
    if parts[0] == "head_hidden":
        return f"head.op_list.2.{('linear', 'norm')[int(parts[1])]}.{parts[2]}"
    if parts[0] == "head":
        return f"head.op_list.3.linear.{parts[1]}"
    if parts[0] == "stem":
        rest = parts[2:] if parts[1] == "0" else ["main", *parts[3:]]
        return ".".join(["backbone.input_stem.op_list", parts[1], *rest])
    prefix = f"backbone.stages.{parts[1]}.op_list.{parts[2]}"
    inside = {"depthwise": "conv_proj.0", "norm": "conv_proj.1", "qkv": "pwise.0", "project": "upsampling"}
    if parts[3] == "attention_norm":
        return f"{prefix}.total.0.0.main.0.{parts[4]}"
    if parts[3] == "attention":
        return f"{prefix}.total.0.{'0.main.1' if mlp else 'main'}.{inside[parts[4]]}.{parts[5]}"
    if parts[3] == "mlp":
        return f"{prefix}.total.0.1.main.{parts[4]}.{parts[5]}"
    if parts[3] == "local":
        return ".".join([prefix, "total.1.main", *parts[4:]])
    return ".".join([prefix, "main", *(parts[4:] if parts[3] == "block" else parts[3:])])


@torch.no_grad()
@pytest.mark.parametrize("name", ["lowformer_b3", "lowformer_e1", "lowformer_e3"])
def test_weights_of_the_released_code(name):
    attention, mlp = (CONFIGS[name].get(part, True) for part in ("attention", "mlp"))
    source = tiny(name, width=16)
    model = build(name, **{**TINY, "depths": (1, 2, 1, 1, 1), "width": 16}).eval()
    state = {released(key, attention, mlp): tensor for key, tensor in source.state_dict().items()}
    assert load_weights(model, state) == "official"
    x = torch.randn(1, 3, 64, 64)
    assert torch.equal(model(x), source(x))
    older = {key.replace("head.", "head.opseq.", 1): tensor for key, tensor in state.items() if key.startswith("head.")}
    kept = {key: tensor for key, tensor in state.items() if not key.startswith("head.")}
    assert load_weights(model, {**kept, **older}) == "official"
    with pytest.raises(ValueError, match="no weights of this model"):
        load_weights(tiny("lowformer_b1"), state)


def test_keys_as_they_are_released():
    tensor = torch.zeros(1)
    known = {
        "backbone.input_stem.op_list.0.conv.weight": "stem.0.conv.weight",
        "backbone.input_stem.op_list.1.main.spatial_conv.norm.bias": "stem.1.block.spatial_conv.norm.bias",
        "backbone.stages.0.op_list.0.main.point_conv.conv.weight": "levels.0.0.point_conv.conv.weight",
        "backbone.stages.1.op_list.2.main.point_conv.conv.weight": "levels.1.2.block.point_conv.conv.weight",
        "backbone.stages.2.op_list.1.total.0.0.main.0.weight": "levels.2.1.attention_norm.weight",
        "backbone.stages.2.op_list.1.total.0.0.main.1.conv_proj.0.weight": "levels.2.1.attention.depthwise.weight",
        "backbone.stages.2.op_list.1.total.0.0.main.1.pwise.0.weight": "levels.2.1.attention.qkv.weight",
        "backbone.stages.2.op_list.1.total.0.1.main.3.bias": "levels.2.1.mlp.3.bias",
        "backbone.stages.2.op_list.1.total.1.main.spatial_conv.conv.bias": "levels.2.1.local.spatial_conv.conv.bias",
        "backbone.stages.3.op_list.4.total.0.main.upsampling.bias": "levels.3.4.attention.project.bias",
        "head.op_list.2.norm.weight": "head_hidden.1.weight",
        "head.op_list.3.linear.bias": "head.bias",
    }
    assert list(from_official(dict.fromkeys(known, tensor))) == list(known.values())


# --- the study


def test_grids_of_equal_macs_do_equal_macs():
    grid = equal_macs(8, 8)
    assert [(case.channels, case.size) for case in grid] == [(8, 8), (16, 8), (32, 8), (64, 8), (16, 4), (32, 2)]
    for case in grid:
        x = torch.zeros(1, case.channels, case.size, case.size)
        assert count_cost(case.make(), x).macs == 9 * (8 * 8) ** 2, case.name
    assert [case.make().groups for case in grid] == [1, 4, 16, 64, 1, 1]
    assert grid[3].name.startswith("depthwise, 64")
    assert len({case.name for case in grid}) == len(grid)
    fused, plain = (count_cost(case.make(), torch.zeros(1, 8, 4, 4)).macs for case in fused_and_not(4, 8))
    assert fused > plain


def test_a_study_has_a_row_a_case_and_the_times_behind_it():
    torch.manual_seed(0)
    seen = []

    class Probe(nn.Module):
        def forward(self, x):
            seen.append((tuple(x.shape), x.dtype, x.is_contiguous(memory_format=torch.channels_last), self.training))
            return x

    grid = [Case("probe", Probe, 4, 6), Case("conv", lambda: nn.Conv2d(4, 8, 3, bias=False), 4, 6)]
    study = bench_modules(grid, batch=2, dtype=torch.bfloat16, rounds=4)
    assert set(seen) == {((2, 4, 6, 6), torch.bfloat16, True, False)}
    assert [row.name for row in study.rows] == ["probe", "conv"]
    assert [row.macs for row in study.rows] == [0, 2 * 16 * 8 * 36]
    assert study.rows[1].seconds == pytest.approx(float(np.median(study.timings.seconds["conv"])))
    assert study.rows[1].gmacs_per_second == pytest.approx(study.rows[1].macs / study.rows[1].seconds / 1e9)
    assert study.table().count("\n") == 3
    assert "batch 2, bfloat16, cpu" in study.table()
    ratio = study.speedup("conv", "probe")
    assert ratio.low <= ratio.median <= ratio.high


def test_rank_correlation():
    from scipy.stats import spearmanr

    generator = np.random.default_rng(0)
    a = generator.integers(0, 5, 20).tolist()  # with ties
    b = generator.random(20).tolist()
    assert rank_correlation(a, b) == pytest.approx(float(spearmanr(a, b).statistic))
    assert rank_correlation([1, 2, 3], [10, 20, 30]) == pytest.approx(1)
    assert rank_correlation([1, 2, 3], [3, 2, 1]) == pytest.approx(-1)


# --- bad input


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: Lowtention(64, 0), ValueError, "stride"),
        (lambda: Lowtention(1), ValueError, "channels"),
        (lambda: Lowtention(64, heads=0), ValueError, "heads"),
        (lambda: FusedMBConv(4, 4, expansion=0), ValueError, "expansion"),
        (
            lambda: build("lowformer_b1", depths=(0, 0, 1, 1, 1)),
            ValueError,
            "depths must have 5 entries, the second and third",
        ),
        (lambda: build("lowformer_b1", depths=(0, 1, 1)), ValueError, "depths must have 5"),
        (lambda: build("lowformer_b1", attention=0), TypeError, "attention"),
        (lambda: build("lowformer_b1", width=0), ValueError, "width"),
        (lambda: bench_modules([]), ValueError, "grid must hold at least one case"),
        (lambda: bench_modules(2 * [Case("a", nn.ReLU, 1, 1)]), ValueError, "a name of its own"),
        (lambda: bench_modules([Case("a", nn.ReLU, 1, 1)], batch=0), ValueError, "batch"),
        (lambda: equal_macs(6, 8), ValueError, "size must be a multiple of 4"),
        (lambda: equal_macs(8, 12), ValueError, "channels must be one of"),
        (lambda: rank_correlation([1], [1]), ValueError, "length of at least 2"),
        (lambda: rank_correlation([1, 1], [1, 2]), ValueError, "all equal"),
        (lambda: rank_correlation([1, float("nan")], [1, 2]), ValueError, "a and b must be finite"),
        (lambda: tiny()(torch.zeros(1, 1, 64, 64)), ValueError, "^x must have shape"),
    ],
)
def test_bad_input_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.skipif(torch.cuda.is_available(), reason="a machine without CUDA")
def test_a_device_that_is_not_there_is_refused():
    with pytest.raises(ValueError, match="device must be one of this machine's, got 'cuda'"):
        bench_modules([Case("a", nn.ReLU, 1, 1)], device="cuda")
