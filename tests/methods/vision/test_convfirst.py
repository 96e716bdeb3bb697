"""ConvFirst: the intensity formulas, the planner, and tiled execution that equals layer by layer."""

from __future__ import annotations

import copy
import json
import pickle
from dataclasses import replace
from datetime import UTC, datetime

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.tiny import calibration
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from assay.catalogue import get_claim
from assay.evidence.record import Evidence
from assay.evidence.types import Estimate
from assay.evidence.verdict import judge
from assay.measure.cost import count_cost
from assay.measure.roofline import H100_SXM_BF16, DeviceSpec
from assay.methods.core import kernels
from assay.methods.vision.convfirst import (
    ConvFirst,
    ConvNet,
    ConvNeXt,
    DepthFirst,
    EfficiencyReport,
    FusedMBConv,
    MBConv,
    PackedLinear,
    block_intensity,
    block_macs_per_pixel,
    block_traffic_per_pixel,
    conv_intensity,
    efficiency_report,
    fold,
    fuse_blocks,
    grouped_conv_intensity,
    plan_tile,
    tile_plan,
)
from assay.methods.vision.convfirst.fusing import _by_pixel, _spans

BLOCKS = [ConvFirst, MBConv, FusedMBConv, ConvNeXt]
CHIP = DeviceSpec("chip", peak=1e12, bandwidth=1e10, sram_bytes=1 << 20)


def trained(block: nn.Module, seed: int = 0) -> nn.Module:
    """Norms and scales as after training: statistics and biases that are not zero and one."""
    torch.manual_seed(seed)
    for module in block.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, std=0.3)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
        if isinstance(module, nn.BatchNorm2d | nn.LayerNorm):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.5)
    if isinstance(block, ConvNeXt):
        nn.init.uniform_(block.scale, 0.5, 1.5)
    return block.eval()


def close(a, b, tolerance=2e-5):
    return (a - b).abs().max() <= tolerance * b.abs().max()


# --- the formulas


def test_intensities_of_half_precision():
    assert grouped_conv_intensity(3, 1) == 4.5
    assert grouped_conv_intensity(3, 8) == 36
    assert conv_intensity(64, 96) == 64 * 96 / 160
    assert conv_intensity(64, 96, 3) == 9 * 64 * 96 / 160
    assert conv_intensity(64, 96, element_bytes=4) == 64 * 96 / 160 / 2


def test_intensities_are_those_counted():
    """Against operators run and counted, without the weights the formulas leave out."""
    x = torch.randn(1, 64, 32, 32)
    for layer, expected in [
        (nn.Conv2d(64, 64, 3, groups=8, padding=1, bias=False), grouped_conv_intensity(3, 8, element_bytes=4)),
        (nn.Conv2d(64, 96, 1, bias=False), conv_intensity(64, 96, element_bytes=4)),
        (nn.Conv2d(64, 96, 3, padding=1, bias=False), conv_intensity(64, 96, 3, element_bytes=4)),
    ]:
        cost = count_cost(layer, x)
        assert cost.flops / (cost.bytes - cost.weight_bytes) == pytest.approx(expected)


def test_block_of_64_channels():
    assert block_intensity(64, 6, fused=True) == 420
    assert block_intensity(64, 6, fused=False) == pytest.approx(49.4, abs=0.05)
    assert block_traffic_per_pixel(64, 6, fused=False) / block_traffic_per_pixel(64, 6, fused=True) == 8.5


@given(st.integers(1, 512), st.integers(1, 8), st.integers(1, 3).map(lambda n: 2 * n + 1), st.sampled_from([1, 8, 16]))
def test_block_formulas(channels, expand, kernel, group):
    fused = block_intensity(channels, expand, kernel, group, fused=True)
    assert fused == pytest.approx(kernel**2 * group / 2 + expand * channels)
    ratio = block_traffic_per_pixel(channels, expand, fused=False) / block_traffic_per_pixel(
        channels, expand, fused=True
    )
    assert ratio == (5 + 2 * expand) / 2
    assert block_intensity(channels, expand, kernel, group, fused=False) == pytest.approx(fused / ratio)


def test_fused_intensity_grows_linearly_and_unfused_saturates():
    fused = [block_intensity(64, e, fused=True) for e in (1, 2, 3)]
    assert fused[2] - fused[1] == fused[1] - fused[0] == 64
    fused = [block_intensity(c, 6, fused=True) for c in (64, 128, 192)]
    assert fused[2] - fused[1] == fused[1] - fused[0] == 6 * 64
    # in the expansion: towards C, whatever e
    assert block_intensity(64, 10_000, fused=False) < 64
    assert block_intensity(64, 10_000, fused=False) > 63


def test_parameters_and_macs_of_the_block():
    for channels, expand in ((64, 6), (32, 4), (128, 1)):
        block = ConvFirst(channels, expand).eval()
        parameters = 9 * 8 * channels + 2 * channels + 2 * expand * channels**2 + 2 * expand * channels + 2 * channels
        assert sum(p.numel() for p in block.parameters()) == parameters
        macs = block_macs_per_pixel(channels, expand)
        assert macs == 72 * channels + 2 * expand * channels**2
        assert count_cost(block, torch.randn(2, channels, 5, 7)).macs == 70 * macs
    assert sum(p.numel() for p in ConvFirst(64, 6).parameters()) == 54_784


# --- tiled execution


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("tile", [3, 8, 64])
@pytest.mark.parametrize("kernel", [3, 5])
def test_tiled_equals_layer_by_layer(block, tile, kernel):
    layer = trained(block(16, expand=3, kernel=kernel))
    x = torch.randn(2, 16, 11, 13)
    with torch.inference_mode():
        expected = layer(x)
        found = fuse_blocks(layer, tile=tile)(x)
    assert found.shape == x.shape
    assert close(found, expected)


@pytest.mark.parametrize("tile", [16, 32, 64])
def test_tiling_itself_changes_no_bit(tile):
    """The same kernels on the whole image as one tile: every pixel is computed alike, so only their shapes could differ."""
    block = trained(ConvFirst(64, 6))
    x = torch.randn(1, 64, 128, 128).contiguous(memory_format=torch.channels_last)
    with torch.inference_mode():
        whole, tiled = fuse_blocks(block, tile=128)(x), fuse_blocks(block, tile=tile)(x)
    assert close(tiled, whole, 1e-6)
    assert (tiled == whole).float().mean() > 0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("act", ["none", "swish", "gelu"])
def test_packed_linear_is_the_plain_one(act, dtype, monkeypatch):
    torch.manual_seed(0)
    weight, bias, x = torch.randn(24, 16, dtype=dtype), torch.randn(24, dtype=dtype), torch.randn(50, 16, dtype=dtype)
    layer = PackedLinear(weight, bias, act)
    after = {"none": lambda y: y, "swish": F.silu, "gelu": F.gelu}[act]
    expected = after(F.linear(x.double(), weight.double(), bias.double()))
    tolerance = {torch.float32: 1e-6, torch.bfloat16: 1e-2, torch.float64: 1e-12}[dtype]
    with torch.inference_mode():
        assert close(layer(x).double(), expected, tolerance)
        assert layer(x[:0]).shape == (0, 24)
        assert count_cost(layer, x).macs == 50 * 16 * 24
        monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
        assert close(layer(x).double(), expected, tolerance)


def test_packed_linear_follows_its_weights_and_can_be_copied():
    layer, x = PackedLinear(torch.eye(8), None), torch.randn(3, 8)
    with torch.no_grad():
        assert close(layer(x), x)
        layer.weight.mul_(2)
        assert close(layer(x), 2 * x)
        assert close(copy.deepcopy(layer)(x), 2 * x)
        layer.load_state_dict({"weight": 3 * torch.eye(8)})
        assert close(layer(x), 3 * x)
        again = pickle.loads(pickle.dumps(layer))
        assert close(again(x), 3 * x)
        assert close(layer.double()(x.double()), 3 * x.double())


def test_tiles_are_as_few_as_allowed_and_alike():
    spans = list(_spans(100, 64, 1))
    assert [(s.start, s.stop) for s, _, _ in spans] == [(0, 50), (50, 100)]
    assert [(s.start, s.stop) for _, s, _ in spans] == [(0, 51), (49, 100)]
    assert [pad for _, _, pad in spans] == [(1, 0), (0, 1)]
    assert [(s.start, s.stop) for s, _, _ in _spans(7, 3, 1)] == [(0, 3), (3, 6), (6, 7)]


def test_memory_formats_are_kept():
    fused = fuse_blocks(trained(ConvFirst(16, 2)), tile=4)
    x = torch.randn(1, 16, 9, 9)
    with torch.inference_mode():
        plain, last = fused(x), fused(x.contiguous(memory_format=torch.channels_last))
    assert plain.is_contiguous()
    assert last.is_contiguous(memory_format=torch.channels_last)
    assert close(plain, last)


def test_halo_outside_the_image_is_zero_after_the_activation():
    """Were it the activation of a zero input, a bias would leak in at the border."""
    block = trained(MBConv(8, expand=2))
    nn.init.constant_(block.norm1.bias, 3.0)
    x = torch.randn(1, 8, 8, 8)
    with torch.inference_mode():
        expected = block(x)
        fused = fuse_blocks(block, tile=4)
        widened = _by_pixel(fused.before, F.pad(x, (1, 1, 1, 1)).contiguous(memory_format=torch.channels_last))
        convolved = F.conv2d(widened, fused.conv.weight, fused.conv.bias, groups=fused.conv.groups)
        wrong = _by_pixel(fused.after, convolved) + x
        assert close(fused(x), expected)
    inner = (slice(None), slice(None), slice(1, -1), slice(1, -1))
    assert close(wrong[inner], expected[inner])
    assert not close(wrong, expected, 1e-2)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 12), st.integers(1, 12), st.integers(2, 15), st.sampled_from(BLOCKS), st.integers(0, 99))
def test_any_size_and_tile(height, width, tile, block, seed):
    layer = trained(block(8, expand=2, kernel=3), seed)
    x = torch.randn(1, 8, height, width)
    with torch.inference_mode():
        assert close(fuse_blocks(copy.deepcopy(layer), tile=tile)(x), layer(x))


class Live(TorchDispatchMode):
    """The most bytes of storage that were alive at once, of those made inside."""

    def __init__(self, given):
        super().__init__()
        self.peak, self.known, self.given = 0, {}, given.untyped_storage()._cdata

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_iter(out):
            if isinstance(tensor, torch.Tensor) and tensor.layout == torch.strided:  # a packed weight has no storage
                storage = tensor.untyped_storage()
                if storage._cdata != self.given:
                    self.known.setdefault(storage._cdata, (StorageWeakRef(storage), storage.nbytes()))
        self.known = {key: (ref, size) for key, (ref, size) in self.known.items() if not ref.expired()}
        self.peak = max(self.peak, sum(size for _, size in self.known.values()))
        return out


@pytest.mark.parametrize("block", [ConvFirst, MBConv, ConvNeXt])
def test_extra_memory_depends_on_neither_the_image_nor_the_batch(block):
    def extra(model, size, batch=1):
        x = torch.randn(batch, 16, size, size).contiguous(memory_format=torch.channels_last)
        with torch.no_grad():
            model(x)
            with Live(x) as live:
                model(x)
        return live.peak - x.nbytes  # less the output

    layer = trained(block(16, expand=4))
    plain = {size: extra(layer, size) for size in (48, 96)}
    fused = fuse_blocks(layer, tile=8)
    tiled = {size: extra(fused, size) for size in (48, 96)}
    assert tiled[48] == tiled[96] == extra(fused, 48, batch=8) < plain[48] / 3
    assert plain[96] > 3 * plain[48]


@pytest.mark.parametrize("block", [ConvFirst, MBConv, FusedMBConv, ConvNeXt])
@pytest.mark.parametrize("size", [8, 56])
def test_tiles_of_a_batch_fit_the_chip(block, size):
    """116 KiB were planned and 3,720 used at batch 32, when a tile spanned all images."""
    chip = DeviceSpec("chip", 1e12, 1e10, 256 << 10)
    fused = fuse_blocks(trained(block(16, expand=4)), device=chip)
    x = torch.randn(32, 16, size, size).contiguous(memory_format=torch.channels_last)
    weights = sum(p.nbytes for p in fused.parameters())
    with torch.no_grad(), Live(x) as live:
        fused(x)
    together = fused.images_together(x)
    assert (
        live.peak - x.nbytes - weights <= 1.5 * chip.sram_bytes
    )  # the planner's workspace, and what an operator holds beside it
    assert together > 1 if size == 8 else together <= 4  # small images share a tile's memory: each alone would waste it


def test_a_block_follows_weights_changed_in_any_way():
    """In place, through `.data`, by assignment, by loading: the packed weights are those of the call."""
    block = trained(ConvFirst(8, 2))
    fused, x = fuse_blocks(block, tile=4), torch.randn(1, 8, 8, 8)
    expand = next(module for module in fused.modules() if isinstance(module, PackedLinear))

    def close_to_plain():
        with torch.no_grad():
            rows = F.conv2d(x, fused.conv.weight, fused.conv.bias, padding=1, groups=fused.conv.groups).permute(
                0, 2, 3, 1
            )
            for stage in fused.after:
                rows = F.linear(rows, stage.weight, stage.bias)
                rows = F.silu(rows) if stage.act == "swish" else rows
            return close(fused(x), x + rows.permute(0, 3, 1, 2))

    assert close_to_plain()
    before = expand.weight.detach().clone()
    expand.weight.data.copy_(2 * before)
    assert close_to_plain()
    expand.weight.data = 3 * before
    assert close_to_plain()
    expand.weight = nn.Parameter(4 * before, requires_grad=False)
    assert close_to_plain()
    fused.conv.weight.data.mul_(2)
    assert close_to_plain()


@pytest.mark.parametrize("shape", [(0, 8, 8, 8), (2, 8, 0, 8), (2, 8, 8, 0)])
def test_nothing_in_nothing_out(shape):
    fused = fuse_blocks(trained(ConvFirst(8, 2)), tile=4)
    with torch.no_grad():
        assert fused(torch.randn(shape)).shape == shape


def test_inputs_of_another_kind_are_refused():
    fused = fuse_blocks(trained(ConvFirst(8, 2)), tile=4)
    with torch.no_grad():
        for x in (torch.randn(1, 8, 4, 4).double(), torch.ones(1, 8, 4, 4, dtype=torch.int64), None):
            with pytest.raises(TypeError, match="^x must "):
                fused(x)
        for shape in ((8, 4, 4), (1, 4, 4, 4)):
            with pytest.raises(ValueError, match="^x must have shape"):
                fused(torch.randn(shape))
    for bad in (8.0, True, "8"):
        with pytest.raises(TypeError, match="^channels must be a whole number"):
            ConvNeXt(bad)


def test_network_is_fused_in_place_and_gives_the_same_logits():
    net = trained(ConvNet(lambda c: ConvFirst(c, 4), channels=(16, 32), depths=(2, 1), classes=10))
    x = torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        expected = net(x)
        same = fuse_blocks(net, tile=8)
        assert same is net
        assert close(net(x), expected, 1e-4)
    assert sum(isinstance(module, DepthFirst) for module in net.modules()) == 3
    assert not any(isinstance(module, ConvFirst) for module in net.modules())


def test_convnext_of_transformers():
    from transformers import ConvNextConfig, ConvNextForImageClassification

    torch.manual_seed(0)
    config = ConvNextConfig(hidden_sizes=[16, 32], depths=[1, 2], num_stages=2, layer_scale_init_value=0.7)
    model = ConvNextForImageClassification(config).eval()
    pixels = torch.randn(1, 3, 64, 48)
    with torch.inference_mode():
        expected = model(pixel_values=pixels).logits
        found = fuse_blocks(model, tile=8)(pixel_values=pixels).logits
    assert close(found, expected, 1e-4)
    assert sum(isinstance(module, DepthFirst) for module in model.modules()) == 3


def test_saved_work_is_really_not_redone():
    """MACs of the tiled block: exactly those of layer by layer for ConvFirst, with the halo's for MBConv."""
    x = torch.randn(1, 16, 32, 32)
    for block, more in ((ConvFirst, False), (MBConv, True)):
        layer = trained(block(16, expand=2, group_width=8))
        before = count_cost(layer, x).macs
        after = count_cost(fuse_blocks(layer, tile=8), x).macs
        assert after == before if not more else before < after < before * 1.6


def test_auto_tile_fits_the_chip():
    layer = trained(ConvFirst(64, 6))
    small, large = (fuse_blocks(layer, device=DeviceSpec("d", 1e12, 1e10, size)).tile for size in (200 << 10, 64 << 20))
    assert small == 8
    assert large > small
    plan = tile_plan(large, 64, 6, CHIP, element_bytes=4)
    assert plan.workspace_bytes <= 64 << 20
    assert fuse_blocks(layer, device=DeviceSpec("tiny", 1e12, 1e10, 1)).tile == 8  # the smallest spills least


def test_fused_block_refuses_to_train():
    fused = fuse_blocks(trained(ConvFirst(8, 2)), tile=4)
    with pytest.raises(RuntimeError, match="inference"):
        fused(torch.randn(1, 8, 4, 4))


# --- the planner


def test_plan_figures_by_hand():
    plan = tile_plan(16, 64, 6, CHIP)
    assert plan.halo == (18 / 16) ** 2
    assert plan.recompute == 1
    assert plan.workspace_bytes == 2 * (18 * 18 * 64 + 256 * 64 + 256 * (64 + 384))
    operations = 2 * (72 * 64 + 2 * 6 * 64**2)
    assert plan.intensity == pytest.approx(operations / (2 * 64 * (1 + plan.halo)))
    assert plan.attainable == 1  # ridge 100


def test_halo_free_limit_is_the_fused_intensity():
    assert tile_plan(10**6, 64, 6, CHIP).intensity == pytest.approx(block_intensity(64, 6, fused=True), rel=1e-4)


def test_mbconv_redoes_its_expansion_on_the_halo():
    plan = tile_plan(8, 64, 4, CHIP, block="mbconv", group_width=1)
    once = 64 * 256
    assert plan.recompute == pytest.approx((once * (10 / 8) ** 2 + 9 * 256 + once) / (2 * once + 9 * 256))
    assert plan.attainable <= 1 / plan.recompute + 1e-9
    assert tile_plan(8, 64, 4, CHIP).recompute == 1


def test_best_tile_grows_with_the_memory_until_nothing_is_gained():
    narrow = DeviceSpec("narrow", peak=1e12, bandwidth=2.6e9, sram_bytes=0)  # a ridge of 385: halos matter
    tiles = [
        plan_tile(64, 6, DeviceSpec("d", narrow.peak, narrow.bandwidth, size)).tile
        for size in (1 << 18, 1 << 20, 1 << 24)
    ]
    assert tiles[0] < tiles[1] < tiles[2]
    mbconv = [
        plan_tile(64, 4, DeviceSpec("d", 1e12, 1e12, size), block="mbconv").recompute for size in (1 << 20, 1 << 24)
    ]
    assert mbconv[1] < mbconv[0]  # memory is no limit, what is redone is


def test_slices_shrink_the_workspace():
    whole, sliced = tile_plan(16, 64, 6, CHIP), tile_plan(16, 64, 6, CHIP, slice_channels=64)
    assert sliced.workspace_bytes == whole.workspace_bytes - 2 * 256 * 320
    assert sliced.intensity == whole.intensity
    with pytest.raises(ValueError, match="sram_bytes"):
        plan_tile(256, 6, H100_SXM_BF16, tiles=(16,))
    assert plan_tile(128, 4, H100_SXM_BF16, tiles=(8, 16), slice_channels=32).workspace_bytes <= 227 << 10


# --- the report


def test_report_counts_and_bounds():
    net = ConvNet(lambda c: ConvFirst(c, 4), channels=(16, 32), depths=(1, 1), classes=10).eval()
    x = torch.randn(1, 3, 64, 64)
    report = efficiency_report(net, x, H100_SXM_BF16)
    assert sum(layer.operations for layer in report.layers) == count_cost(net, x).flops
    assert 0 < report.attainable < 1
    assert report.measured is None
    assert sum(bar.width for bar in report.bars()) == pytest.approx(1)
    assert report.table().count("\n") == len(report.layers)
    assert report.svg().startswith("<svg")


def test_report_with_times():
    report = efficiency_report(nn.Conv2d(8, 8, 3).eval(), torch.randn(1, 8, 32, 32), CHIP, measure=True)
    assert report.measured > 0
    beaten = EfficiencyReport([replace(report.layers[0], seconds=1e-12)], CHIP)  # faster than the chip can be
    assert beaten.measured is None
    assert beaten.table().endswith(" void")
    assert report.layers[0].seconds > 0


# --- the experiments


def verdict_on(claim_id, figure):
    """What the written rule says of a figure."""
    claim = get_claim(claim_id)
    record = Evidence(
        claim=claim_id,
        slug="convfirst",
        point={},
        scale="smoke",
        status="ok",
        kind="figure",
        metric=claim.metric,
        paper_value=claim.value,
        paper_unit=claim.unit,
        higher_is_better=claim.higher_is_better,
        form=claim.form,
        measured=Estimate(median=figure.value, low=figure.value, high=figure.value),
        unit=figure.unit,
        baseline=figure.baseline,
        fingerprint="f",
        machine={},
        assay_version="0",
        seed=0,
        command="",
        seconds=1.0,
        created=datetime.now(UTC),
    )
    return judge(record).verdict.value


@pytest.mark.parametrize(("rate", "share"), [(1e30, 0.0), (1.0, 1.0)])
def test_bound_is_beaten_only_by_a_machine_faster_than_its_calibration(monkeypatch, rate, share):
    from assay.experiments.vision.convfirst import roofline_lower_bound

    rates = {
        "peak_flops": {"float32": rate},
        "read_bandwidth": rate,
        "copy_bandwidth": rate,
        "cache_bandwidth": {1: rate},
    }
    limits = calibration(**rates, threads=1)
    monkeypatch.setattr("assay.measure.profile.calibrate", lambda **_: limits)
    figure = roofline_lower_bound("convfirst", 32)
    assert (figure.value, figure.details["beaten_plain_roofline"]) == (share, share)
    assert figure.details["modules"] > 30
    assert verdict_on("convfirst/roofline-lower-bound", figure) == ("refuted here" if share else "reproduced")
    with pytest.raises(ValueError, match="net"):
        roofline_lower_bound("resnet", 32)


def test_fusion_trial_compares_equal_work_and_keeps_the_output(monkeypatch):
    from assay.experiments.vision.convfirst import block_fusion_speedup

    monkeypatch.setattr(torch, "compile", lambda model: model)
    trial = block_fusion_speedup(64, 32, 2)
    assert trial.candidate().shape == trial.baseline().shape == (2, 64, 32, 32)
    assert close(trial.candidate(), trial.free())
    quality = trial.quality()
    assert quality.candidate < 1e-5 < 1e-2 < min(quality.controls.values())
    details = trial.details()
    assert details["macs"]["convfirst"] == pytest.approx(details["macs"]["convnext"], rel=0.1)
    assert details["intensity"]["fused"] == pytest.approx(6.5 * details["intensity"]["layer by layer"])
    json.dumps(details)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ConvFirst(12), "channels must be a multiple"),
        (lambda: ConvFirst(8, 0), "expand"),
        (lambda: ConvFirst(8, kernel=4), "kernel"),
        (lambda: MBConv(8, group_width=5), "channels must be a multiple"),
        (lambda: FusedMBConv(0), "channels"),
        (lambda: ConvNeXt(8, kernel=2), "kernel"),
        (lambda: ConvNet(ConvFirst, [8], [1, 2]), "pair up"),
        (lambda: fuse_blocks(ConvFirst(8).train()), "eval"),
        (lambda: fuse_blocks(nn.Linear(2, 2).eval()), "fusable"),
        (lambda: fuse_blocks(ConvFirst(8).eval(), tile=0), "tile"),
        (lambda: fold(nn.Conv2d(1, 1, 1), nn.BatchNorm2d(1).train()), "eval"),
        (lambda: tile_plan(8, 8, 4, CHIP, block="resnet"), "block"),
        (lambda: tile_plan(8, 8, 4, CHIP, slice_channels=33), "slice_channels"),
        (lambda: tile_plan(8, 8, 4, CHIP, block="mbconv", slice_channels=8), "slice_channels"),
        (lambda: plan_tile(64, 6, DeviceSpec("d", 1, 1, 10)), "sram_bytes"),
        (lambda: grouped_conv_intensity(0, 8), "kernel"),
        (lambda: block_intensity(0, 8, fused=True), "channels"),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# --- blocks that were changed, and two features at once


def changed(block: nn.Module, how: str) -> nn.Module:
    """`block` computing something else than its class does."""
    if how == "activation":
        block.act = nn.ReLU()
    elif how == "approximate activation":
        block.act = nn.GELU(approximate="tanh")
    elif how == "norm":
        setattr(block, "norm" if isinstance(block, ConvNeXt) else "norm1", nn.Identity())
    elif how == "dilation":
        block.conv.dilation = block.conv.padding = (2, 2)
    elif how == "padding":
        old = block.conv
        block.conv = nn.Conv2d(8, old.out_channels, 3, padding=1, groups=old.groups, padding_mode="circular")
    elif how == "hook":
        block.register_forward_hook(lambda module, inputs, output: 2 * output)
    else:
        block.conv.register_forward_pre_hook(lambda module, inputs: (2 * inputs[0],))
    return block


@torch.no_grad()
@pytest.mark.parametrize(
    "how", ["activation", "approximate activation", "norm", "dilation", "padding", "hook", "hook of a part"]
)
@pytest.mark.parametrize("block", [ConvFirst, FusedMBConv, ConvNeXt])
def test_a_changed_block_stays_as_it_is(block, how):
    model = nn.Sequential(changed(trained(block(8, 2, 3)), how), trained(block(8, 2, 3))).eval()
    x = torch.randn(2, 8, 9, 9)
    expected = model(x)
    assert close(fuse_blocks(model, tile=4)(x), expected)
    assert [type(part) for part in model] == [block, DepthFirst]


@torch.no_grad()
def test_a_block_in_two_places_is_fused_in_both():
    block = trained(ConvFirst(8, 2))
    model = nn.Sequential(block, nn.Sequential(nn.ReLU(), block)).eval()
    x = torch.randn(2, 8, 9, 9)
    expected = model(x)
    assert close(fuse_blocks(model, tile=4)(x), expected)
    assert isinstance(model[0], DepthFirst)
    assert model[0] is model[1][1]


@pytest.mark.skipif(
    kernels.compiler() is None or " " in torch.__file__,
    reason="inductor needs a C++ compiler and a path without spaces",
)
@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fused_blocks_are_compiled_and_follow_their_weights(dtype):
    torch.compiler.reset()
    block = fuse_blocks(trained(ConvFirst(8, 2)).to(dtype), tile=4)
    x = torch.randn(8, 8, 6, 6, dtype=dtype).contiguous(memory_format=torch.channels_last)
    compiled, tolerance = torch.compile(block), 2e-5 if dtype == torch.float32 else 0.03
    for _ in range(2):
        assert close(compiled(x), block(x), tolerance)
        for parameter in block.parameters():
            parameter.mul_(1.5)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: plan_tile(8, 2, CHIP, tiles=()), ValueError, "tiles must hold at least one size"),
        (lambda: plan_tile(8, None, CHIP), TypeError, "expand must be a whole number"),
        (lambda: plan_tile(8, 2, CHIP, slice_channels=True), TypeError, "slice_channels must be a whole number"),
        (lambda: plan_tile(8, 2, CHIP, slice_channels=2.5), TypeError, "slice_channels must be a whole number"),
        (lambda: ConvNeXt(8, layer_scale=float("nan")), ValueError, "layer_scale must be a finite number"),
        (lambda: ConvNet(ConvFirst, (8,), (-1,)), ValueError, "depths must be a whole number at least 0, got -1"),
        (lambda: ConvNet(ConvFirst, (8.0,), (1,)), TypeError, "channels must be a whole number at least 1, got 8.0"),
    ],
)
def test_numbers_of_the_wrong_kind_are_named(call, error, message):
    with pytest.raises(error, match=message):
        call()
