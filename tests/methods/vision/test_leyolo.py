"""LeYOLO: counts of every published model, against a network written from the released layout, decoding, files, folding, export."""

from __future__ import annotations

import copy
import math
from functools import cache

import pytest
import torch
import torch.nn.functional as F
import yaml
from torch import Tensor, nn

from assay.measure.cost import count_cost
from assay.methods.core.vision.folding import fold_batch_norm
from assay.methods.core.vision.weights import load_weights
from assay.methods.vision.leyolo import (
    BINS,
    SIZES,
    ConvNorm,
    Graph,
    InvertedBottleneck,
    LeYOLO,
    Node,
    deployed,
    export_onnx,
    from_official,
    graph_of,
    leyolo,
    losses,
    published,
    read_graph,
    select,
)

# name, wiring: parameters, and MACs at 640 pixels (Large at 768), 80 classes
PUBLISHED = {
    ("nano", "intended"): (1_120_480, 1_231_910_400),
    ("nano", "as_released"): (1_120_480, 1_231_910_400),
    ("small", "intended"): (1_917_440, 2_130_188_800),
    ("small", "as_released"): (1_917_440, 2_130_188_800),
    ("medium", "intended"): (2_388_920, 2_794_124_800),
    ("medium", "as_released"): (2_402_744, 2_638_041_600),
    ("large", "intended"): (2_388_920, 4_023_539_712),
    ("large", "as_released"): (2_402_744, 3_798_779_904),
}
GFLOP = {
    ("nano", 320): 0.66, ("nano", 480): 1.47, ("small", 480): 2.53, ("small", 640): 4.51, ("medium", 640): 5.80,
    ("large", 768): 8.40,
}  # fmt: skip


def tiny() -> LeYOLO:
    """Nano, narrow, in eval mode, with norms as after training. A copy: built once."""
    return copy.deepcopy(_tiny())


@cache
def _tiny() -> nn.Module:
    torch.manual_seed(0)
    return lived(leyolo("nano", width=0.2, num_classes=5))


def lived(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_var, 0.5, 2.0)
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.weight, 0.8, 1.6)
            nn.init.normal_(module.bias, std=0.3)
    return model.eval()


@cache
def costs(name: str, wiring: str) -> tuple[int, int, int, int]:
    """Parameters, and of 64 x 64 pixels MACs, those of all layers (the idle ones too), elements that leave norms of blocks."""
    normed = 0

    def count(module, given, out):
        nonlocal normed
        normed += out.numel()

    model, x = leyolo(name, wiring=wiring).eval(), torch.zeros(1, 3, 64, 64)
    for node, layer in zip(model.graph.nodes, model.layers, strict=True):
        for module in layer.modules():
            if isinstance(module, nn.BatchNorm2d) and node.module in ("mn_conv", "MobileNetV3_BLOCK"):
                module.register_forward_hook(count)
    ran = count_cost(model, x)
    assert not ran.uncounted
    every = ran.macs
    if len(model.runs) < len(model.layers):
        model.runs, normed = list(range(len(model.layers))), 0
        every = count_cost(model, x).macs
    return sum(p.numel() for p in model.parameters()), ran.macs, every, normed


# --- counts


@pytest.mark.parametrize(("name", "wiring"), PUBLISHED)
def test_parameters_and_macs_of_every_published_model(name, wiring):
    same = "medium" if name == "large" else name  # the same graph
    assert published(same, wiring=wiring) == published(name, wiring=wiring)
    parameters, macs, _, _ = costs(same, wiring if same == "medium" else "intended")
    assert published("small") == published("small", wiring="as_released")
    assert (parameters, macs * (SIZES[name][2] // 64) ** 2) == PUBLISHED[name, wiring]


@pytest.mark.parametrize(("name", "size"), GFLOP)
def test_the_published_operations_count_norms_and_idle_blocks(name, size):
    """The released code folds the norms of the head and the pooled pyramid, so that its counter sees those of the blocks."""

    def gflop(wiring: str) -> float:
        _, _, every, normed = costs("medium" if name == "large" else name, wiring)
        return (2 * every + 8 * normed) * (size / 64) ** 2 / 1e9

    wirings = ("as_released", "intended") if name in ("medium", "large") else ("intended",)
    released, *intended = map(gflop, wirings)
    assert released == pytest.approx(GFLOP[name, size], rel=0.011)
    assert all(abs(each - GFLOP[name, size]) > 2 * abs(released - GFLOP[name, size]) for each in intended)


def test_operations_follow_the_pixels_exactly():
    _, macs, every, _ = costs("nano", "intended")
    assert macs == every
    assert 2 * macs * 25 / 1e9 == pytest.approx(0.6159552, abs=1e-9)  # of convolutions, at 320 pixels
    model = leyolo("nano").eval()
    assert sum(p.numel() for p in model.parameters() if not p.requires_grad) == BINS
    assert count_cost(model, torch.zeros(1, 3, 160, 96)).macs * 64 * 64 == macs * 160 * 96


def test_the_released_medium_does_not_run_what_no_head_reads():
    """It reads P3 before two blocks, P4 after the first of four, P5 from a join: four blocks serve nothing."""
    model, ran = leyolo("medium", wiring="as_released", width=0.2, num_classes=2).eval(), []
    for number, layer in enumerate(model.layers):
        layer.register_forward_hook(lambda *_, number=number: ran.append(number))
    model(torch.zeros(1, 3, 64, 64))
    assert model.reads[-1] == [27, 32, 37]
    assert sorted(set(range(43)) - set(ran)) == [38, 39, 40, 41]
    assert model.channels == (8, 16, 48)
    intended = published("medium")
    assert intended.nodes[-1].sources == (29, 35, 41)
    assert intended.nodes[:-1] == published("medium", wiring="as_released").nodes[:-1]
    assert published("large") == intended


def test_widths_round_up_and_the_cap_comes_first():
    graph = published("small")
    assert [graph.channels(c) for c in (16, 32, 64, 96, 128, 576, 600)] == [24, 48, 88, 128, 176, 768, 768]
    assert Graph((), depth=1 / 3).times(6) == 2
    assert Graph((), depth=0.1).times(3) == 1
    assert Graph((), depth=5).times(1) == 1


# --- against a network written from the released layout


def official_state(graph: Graph) -> dict[str, Tensor]:
    """A random state dict as the released code has it, in float64, from the rows alone."""
    state: dict[str, Tensor] = {}
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    def conv(key, given, out, kernel=1, groups=1, bias=True):
        state[f"{key}.weight"] = normal(out, given // groups, kernel, kernel) * (2 * groups / given / kernel**2) ** 0.5
        if bias:
            state[f"{key}.bias"] = normal(out)

    def norm(key, channels):
        state[f"{key}.weight"], state[f"{key}.bias"] = 1 + normal(channels) / 4, normal(channels) / 4
        state[f"{key}.running_mean"], state[f"{key}.running_var"] = normal(channels), 0.5 + normal(channels).square()
        state[f"{key}.num_batches_tracked"] = torch.tensor(7)

    def both(key, given, out, kernel=1, groups=1, name="c", bias=True):
        conv(f"{key}.{name}", given, out, kernel, groups, bias)
        norm(f"{key}.bn", out)

    channels: list[int] = []
    for number, node in enumerate(graph.nodes):
        key, args = f"model.{number}", node.args
        given = [channels[at] if number else 3 for at in node.sources]
        out = given[0]
        if node.module == "mn_conv":
            out = graph.channels(args[0])
            both(key, given[0], out, args[1])
        elif node.module == "MobileNetV3_BLOCK":
            out, inner = graph.channels(args[0]), given[0] if args[2] is None else graph.channels(args[2])
            if args[6]:
                both(f"{key}.layers.0", given[0], inner)
            both(f"{key}.layers.{int(args[6])}", inner, inner, args[1], inner)
            conv(f"{key}.layers.{1 + args[6]}", inner, out)
            norm(f"{key}.layers.{2 + args[6]}", out)
        elif node.module == "SPPF":
            out = graph.channels(args[0])
            both(f"{key}.cv1", given[0], given[0] // 2, name="conv", bias=False)
            both(f"{key}.cv2", given[0] // 2 * 4, out, name="conv", bias=False)
        elif node.module == "Concat":
            out = sum(given)
        elif node.module == "Detect":
            widths = max(16, given[0] // 4, 64), max(given[0], min(graph.num_classes, 100))
            for branch, width, last in zip(("cv2", "cv3"), widths, (64, graph.num_classes), strict=True):
                for level, each in enumerate(given):
                    here = f"{key}.{branch}.{level}"
                    both(f"{here}.0", each, width, name="conv", bias=False)
                    both(f"{here}.1", width, width, 3, width, name="conv", bias=False)
                    both(f"{here}.2", width, width, 3, width, name="conv", bias=False)
                    conv(f"{here}.3", width, last)
            state[f"{key}.dfl.conv.weight"] = torch.arange(16, dtype=torch.float64).view(1, 16, 1, 1)
        channels.append(out)
    return state


def official_forward(graph: Graph, state: dict[str, Tensor], x: Tensor) -> list[Tensor]:
    """The released network by functional calls."""

    def norm(x, key):
        mean, var = state[f"{key}.running_mean"], state[f"{key}.running_var"]
        scale = state[f"{key}.weight"] / (var + 1e-3).sqrt()
        return x * scale[:, None, None] + (state[f"{key}.bias"] - mean * scale)[:, None, None]

    def conv(x, key, stride=1, depthwise=False):
        weight = state[f"{key}.weight"]
        padding = 0 if weight.shape[-1] == stride else weight.shape[-1] // 2
        groups = x.shape[1] if depthwise else 1
        return F.conv2d(x, weight, state.get(f"{key}.bias"), stride, padding, groups=groups)

    def both(x, key, stride=1, depthwise=False, name="c"):
        return F.silu(norm(conv(x, f"{key}.{name}", stride, depthwise), f"{key}.bn"))

    maps: list[Tensor] = []
    for number, node in enumerate(graph.nodes):
        key, args = f"model.{number}", node.args
        given = [maps[at] if number else x for at in node.sources]
        y = given[0]
        if node.module == "mn_conv":
            y = both(y, key, args[2])
        elif node.module == "MobileNetV3_BLOCK":
            if args[6]:
                y = both(y, f"{key}.layers.0")
            y = both(y, f"{key}.layers.{int(args[6])}", args[5], True)
            y = norm(conv(y, f"{key}.layers.{1 + args[6]}"), f"{key}.layers.{2 + args[6]}")
            y = given[0] + y if given[0].shape == y.shape else y
        elif node.module == "SPPF":
            parts = [both(y, f"{key}.cv1", name="conv")]
            for side in (5, 9, 13):
                parts.append(F.max_pool2d(parts[0], side, 1, side // 2))
            y = both(torch.cat(parts, 1), f"{key}.cv2", name="conv")
        elif node.module == "nn.Upsample":
            y = y.repeat_interleave(2, 2).repeat_interleave(2, 3)
        elif node.module == "Concat":
            y = torch.cat(given, 1)
        else:
            found = []
            for level, each in enumerate(given):
                outs = []
                for branch in ("cv2", "cv3"):
                    here = f"{key}.{branch}.{level}"
                    z = both(each, f"{here}.0", name="conv")
                    z = both(both(z, f"{here}.1", 1, True, "conv"), f"{here}.2", 1, True, "conv")
                    outs.append(conv(z, f"{here}.3"))
                found.append(torch.cat(outs, 1))
            return found
        maps.append(y)
    raise AssertionError


@torch.no_grad()
@pytest.mark.parametrize(("name", "wiring"), [("nano", "intended"), ("medium", "as_released")])
def test_it_is_the_released_network_with_the_released_weights(name, wiring):
    graph = published(name, num_classes=3, wiring=wiring, width=0.2)
    state = official_state(graph)
    model = LeYOLO(graph).double().eval()
    assert load_weights(model, state) == "official"  # every key, every shape
    x = torch.rand(2, 3, 64, 96, dtype=torch.float64)
    for ours, theirs in zip(model(x), official_forward(graph, state, x), strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-9, atol=1e-9)
    assert sum(p.numel() for p in model.parameters()) == sum(
        v.numel() for k, v in state.items() if "running" not in k and "batches" not in k
    )


def test_strange_keys_are_named():
    for key in ("backbone.0.weight", "model.x.weight", "model.3", "model.3.layers.0"):
        with pytest.raises(ValueError, match=rf"must have keys model\.NUMBER\.NAME, got '{key}'"):
            from_official({key: torch.zeros(1)})


# --- blocks


@torch.no_grad()
def test_blocks_without_their_branch_are_the_identity():
    model = tiny()
    blocks = [m for m in model.modules() if isinstance(m, InvertedBottleneck)]
    same = [block for block in blocks if block.residual]
    assert len(same) == 1 + 4 + 3 + 2 + 2 + 2 + 2
    for block in same:
        nn.init.zeros_(block.project.norm.weight)
        nn.init.zeros_(block.project.norm.bias)
        x = torch.randn(2, getattr(block.expand, "conv", block.depthwise.conv).in_channels, 7, 6)
        assert torch.equal(block(x), x)
    for block in blocks:
        stride, fits = block.depthwise.conv.stride[0], block.project.conv.out_channels
        given = getattr(block.expand, "conv", block.depthwise.conv).in_channels
        assert block.residual == (stride == 1 and fits == given)


def test_kernels_and_expansions_follow_the_design():
    """3x3 down to a stride of 8, 5x5 behind; expansion of 3 in the stages of 32 and 64, of 6 in that of 96 from its first block on."""
    layers = leyolo("nano").layers
    kernels = [layer.depthwise.conv.kernel_size[0] for layer in layers[2:14]]
    assert kernels == [3] * 3 + [5] * 9
    inner = [layer.depthwise.conv.in_channels for layer in layers[2:14]]
    assert inner == [16, 96, 96, 96, 192, 192, 192, 192, 576, 576, 576, 576]


def test_a_pointwise_layer_that_widens_nothing_is_left_out():
    model = leyolo("nano")
    assert isinstance(model.layers[2].expand, nn.Identity)
    assert isinstance(model.layers[22].expand, nn.Identity)
    assert model.layers[22].depthwise.conv.in_channels == 64 + 32
    assert sum(isinstance(m.expand, nn.Identity) for m in model.modules() if isinstance(m, InvertedBottleneck)) == 2
    with pytest.raises(ValueError, match="expansion must be the 8 channels that come in"):
        InvertedBottleneck(8, 8, 3, 16, pointwise=False)
    with pytest.raises(ValueError, match="kernel must be odd, got 4"):
        InvertedBottleneck(8, 8, 4, 16)


# --- decoding


def test_maps_and_their_cells():
    model = tiny()
    with torch.no_grad():
        maps = model(torch.zeros(2, 3, 96, 64))
        boxes, scores = model.decode(maps)
    assert [tuple(each.shape) for each in maps] == [(2, 69, 12, 8), (2, 69, 6, 4), (2, 69, 3, 2)]
    assert boxes.shape == (2, 96 + 24 + 6, 4)
    assert scores.shape == (2, 126, 5)
    large = [torch.zeros(1, 69, 640 // stride, 640 // stride) for stride in (8, 16, 32)]
    assert model.decode(large)[0].shape == (1, 8400, 4)
    points, strides = model.cells(maps)
    assert points[:2].tolist() == [[4, 4], [12, 4]]
    assert points[96 + 4].tolist() == [8, 24]
    assert points[-1].tolist() == [48, 80]
    assert strides[:, 0].tolist() == [8] * 96 + [16] * 24 + [32] * 6
    assert model.feature_maps(torch.zeros(1, 3, 64, 64)).keys() == {8, 16, 32}


@pytest.mark.parametrize("bin_", [0, 3, 15])
def test_a_certain_bin_is_a_distance_of_so_many_strides(bin_):
    model = tiny()
    maps = [torch.zeros(1, 69, side, side) for side in (8, 4, 2)]
    for each in maps:
        each[:, :64].unflatten(1, (4, 16))[:, :, bin_] = 1e4
    boxes, scores = model.decode(maps)
    points, strides = model.cells(maps)
    expected = torch.cat([points - bin_ * strides, points + bin_ * strides], 1)
    assert torch.allclose(boxes[0], expected, atol=1e-3)
    assert torch.equal(scores, torch.full_like(scores, 0.5))


def test_distances_stay_within_fifteen_strides():
    model = tiny()
    maps = [torch.randn(2, 69, side, side) * 5 for side in (8, 4, 2)]
    boxes, _ = model.decode(maps)
    points, strides = model.cells(maps)
    reach = torch.cat([points - boxes[..., :2], boxes[..., 2:] - points], -1) / strides
    assert ((reach >= -1e-5) & (reach <= 15 + 1e-5)).all()
    by_hand = maps[0][1, :64, 2, 3].view(4, 16).softmax(1) @ torch.arange(16.0)
    assert torch.allclose(reach[1, 2 * 8 + 3], by_hand, atol=1e-4)


def test_decoding_is_float32_whatever_the_maps_are():
    model = tiny().to(torch.bfloat16)
    maps = [torch.randn(1, 69, side, side) for side in (8, 4, 2)]
    low = [each.bfloat16() for each in maps]
    for one, other in zip(model.decode(low), tiny().decode([each.float() for each in low]), strict=True):
        assert one.dtype == torch.float32
        assert torch.equal(one, other)


def planted(model: LeYOLO, size: tuple[int, int], cells) -> list[Tensor]:
    """Maps that say nothing but: at (level, row, column) a box of so many strides to each side, of a class, with a logit."""
    maps = [torch.zeros(1, 64 + model.num_classes, size[0] // s, size[1] // s) for s in model.strides]
    for each in maps:
        each[:, 64:] = -20
    for (level, row, column), reach, label, logit in cells:
        for side, bin_ in enumerate(reach):
            maps[level][0, 16 * side + bin_, row, column] = 100
        maps[level][0, 64 + label, row, column] = logit
    return maps


def test_what_is_found_loses_what_overlaps_it_by_class_and_ends_at_the_edge(monkeypatch):
    model = tiny()
    cells = [
        ((0, 2, 2), (1, 1, 1, 1), 3, 2.0),  # 12..28
        ((0, 2, 3), (2, 1, 0, 1), 3, 1.0),  # the same box from the next cell
        ((1, 1, 1), (1, 1, 1, 1), 4, 1.5),  # another class
        ((2, 1, 1), (1, 1, 15, 15), 0, 0.5),  # goes over the edge
        ((2, 0, 0), (1, 1, 1, 1), 0, -4.0),  # too weak
    ]
    monkeypatch.setattr(model, "forward", lambda x: planted(model, (64, 64), cells))
    (found,) = model.detect(torch.zeros(1, 3, 50, 60))
    assert found.labels.tolist() == [3, 4, 0]
    assert found.boxes.round().tolist() == [[12, 12, 28, 28], [8, 8, 40, 40], [16, 16, 60, 50]]
    assert torch.allclose(found.scores, torch.tensor([2.0, 1.5, 0.5]).sigmoid())
    assert len(model.detect(torch.zeros(1, 3, 50, 60), threshold=0.01)[0].labels) == 4
    assert len(model.detect(torch.zeros(1, 3, 50, 60), overlap=1.0)[0].labels) == 4
    assert model.detect(torch.zeros(1, 3, 50, 60), most=1)[0].labels.tolist() == [3]


@torch.no_grad()
@pytest.mark.parametrize("size", [(1, 33), (50, 70), (64, 64)])
def test_images_of_any_size_are_filled_up_with_grey(size):
    model, images = tiny(), torch.rand(2, 3, *size)
    found = model.detect(images, threshold=0.0)
    height, width = (-(-side // 32) * 32 for side in size)
    filled = torch.full((2, 3, height, width), 114 / 255)
    filled[:, :, : size[0], : size[1]] = images
    boxes, scores = model.decode(model(filled))
    edge = torch.tensor([size[1], size[0], size[1], size[0]])
    for image, one in enumerate(found):
        expected = select(torch.minimum(boxes[image].clamp(min=0), edge), scores[image], threshold=0.0)
        assert torch.equal(one.boxes, expected.boxes)
        assert (one.scores.diff() <= 0).all()
        assert len(one.labels) <= 300


@pytest.mark.parametrize(("classes", "channels"), [(1, 1), (200, 4)])
def test_one_class_in_grey_and_two_hundred_in_more_than_colour(classes, channels):
    torch.manual_seed(0)
    model, images = leyolo("nano", width=0.15, num_classes=classes, in_chans=channels), torch.rand(1, channels, 64, 96)
    last = losses(model, model(images), [torch.tensor([[8.0, 8, 40, 48]])], [torch.tensor([classes - 1])])
    last.total.backward()
    biases = torch.stack([branch[-1].bias.grad for branch in model.head.label])
    assert (biases != 0).all()
    assert (biases.argmin(1) == classes - 1).any()  # the one to learn
    (found,) = model.eval().detect(images[..., :33, :47], threshold=0.0, overlap=1.0, most=3)
    assert found.boxes.shape == (3, 4)
    assert 0 <= int(found.labels.min()) <= int(found.labels.max()) < classes
    with pytest.raises(
        ValueError, match=rf"images must have shape \(batch, {channels}, height, width\), got \(1, 3, 33, 47\)"
    ):
        model.detect(torch.rand(1, 3, 33, 47))


def test_nothing_is_found_where_nothing_is_sure():
    found = select(torch.zeros(4, 4), torch.zeros(4, 3), threshold=0.5)
    assert found.boxes.shape == (0, 4)
    assert found.labels.shape == found.scores.shape == (0,)


# --- using it


@torch.no_grad()
def test_images_do_not_see_each_other():
    model, x = tiny(), torch.rand(3, 3, 64, 32)
    for together, alone in zip(model(x), model(x[1:2]), strict=True):
        assert torch.allclose(together[1:2], alone, atol=1e-5)


@torch.no_grad()
def test_channels_last_and_half_precision():
    model, x = tiny(), torch.rand(2, 3, 64, 64)
    expected = model(x)
    last = model.to(memory_format=torch.channels_last)(x.contiguous(memory_format=torch.channels_last))
    half = model.to(torch.bfloat16)(x.bfloat16())
    for one, other, full in zip(last, half, expected, strict=True):
        assert torch.allclose(one, full, atol=1e-4)
        assert other.dtype == torch.bfloat16
        assert (other - full).abs().max() < 0.1 * full.abs().max()


def test_gradients_reach_all_that_a_head_reads():
    model = leyolo("medium", width=0.15, num_classes=2, wiring="as_released")
    x = torch.rand(2, 3, 64, 64)
    sum(each.square().sum() for each in model(x)).backward()
    got = {name for name, p in model.named_parameters() if p.grad is not None and bool((p.grad != 0).any())}
    idle = {name for name, _ in model.named_parameters() if name.split(".")[1] in ("38", "39", "40", "41")}
    biased = {  # a bias before a norm does nothing: the norm takes the mean away
        f"{name}.conv.bias" for name, m in model.named_modules() if hasattr(m, "norm") and m.conv.bias is not None
    }
    names = {name for name, _ in model.named_parameters()}
    assert names - got - biased == idle - biased | {"layers.42.bins"}
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


@torch.no_grad()
def test_every_norm_is_folded_and_the_outputs_stay():
    model, x = tiny(), torch.rand(1, 3, 64, 64)
    folded = fold_batch_norm(model, x)
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert folded.folded == (len(norms), len(norms))
    assert not any(isinstance(m, nn.BatchNorm2d) for m in folded.modules())
    for one, other in zip(folded(x), model(x), strict=True):
        assert torch.allclose(one, other, atol=1e-4)
    assert count_cost(folded, x).macs == count_cost(model, x).macs
    whole = deployed(model, x)
    for one, other in zip(whole(x), model.decode(model(x)), strict=True):
        assert torch.allclose(one, other, atol=1e-3)


def test_what_the_released_code_folds_leaves_its_published_count():
    """Norms of the head and the pooled pyramid: each takes two parameters a channel away and adds a bias."""
    model = leyolo("nano")
    channels = sum(
        m.num_features for at in (14, 35) for m in model.layers[at].modules() if isinstance(m, nn.BatchNorm2d)
    )
    assert sum(p.numel() for p in model.parameters()) - channels == 1_119_040


@torch.no_grad()
def test_it_is_exported():
    """Every kind of layer that a published graph has; the whole of one is in the slow test below."""
    nodes = (
        Node("mn_conv", (8, 3, 2, "SI")), Node("InvertedBottleneck", (8, 3, 16, True, "SI", 2, True)), Node("SPPF", (8, 5)),
        Node("nn.Upsample", (None, 2, "nearest")), Node("Concat", (1,), (-1, 0)), Node("Detect", ("nc",), (4, 2)),
    )  # fmt: skip
    torch.manual_seed(0)
    model, x = deployed(lived(LeYOLO(Graph(nodes, 3))), torch.rand(1, 3, 16, 16)), torch.rand(2, 3, 16, 16)
    exported = torch.export.export(model, (x,), strict=False)
    for one, other in zip(exported.module()(x), model(x), strict=True):
        assert torch.allclose(one, other, atol=1e-4)


@pytest.mark.slow
def test_an_onnx_file_says_the_same_in_any_batch(tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    model, path = tiny(), tmp_path / "leyolo.onnx"
    export_onnx(model, path, torch.rand(1, 3, 64, 96))
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    for batch in (1, 3):
        x = torch.rand(batch, 3, 64, 96)
        boxes, scores = session.run(["boxes", "scores"], {"images": x.numpy()})
        with torch.no_grad():
            expected = model.decode(model(x))
        assert torch.allclose(torch.from_numpy(boxes), expected[0], atol=1e-2)
        assert torch.allclose(torch.from_numpy(scores), expected[1], atol=1e-4)


def test_what_is_expected_at_first():
    model = leyolo("nano", width=0.25, num_classes=4)
    for stride, box, label in zip(model.strides, model.head.box, model.head.label, strict=True):
        assert (box[-1].bias == 1).all()
        assert label[-1].bias.tolist() == pytest.approx([math.log(5 / 4 / (640 / stride) ** 2)] * 4, rel=1e-6)
    model.head.set_prior(64, objects=2)
    cells = torch.tensor([(64 / stride) ** 2 for stride in model.strides])
    expected = torch.tensor([float(branch[-1].bias.detach().exp().sum()) for branch in model.head.label]) * cells
    assert torch.allclose(expected, torch.full((3,), 2.0))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda m: m(torch.zeros(1, 3, 48, 64)), ValueError, "x must have sides that are multiples of 32, got"),
        (lambda m: m(torch.zeros(1, 4, 64, 64)), ValueError, "x must have shape"),
        (lambda m: m(torch.zeros(1, 3, 64, 64).double()), TypeError, "x must hold torch.float32"),
        (lambda m: m(torch.zeros(0, 3, 64, 64)), ValueError, "x must not be empty"),
        (lambda m: m.decode([torch.zeros(1, 69, 2, 2)]), ValueError, "maps: their number must be"),
        (lambda m: m.decode([torch.zeros(1, 68, 2, 2)] * 3), ValueError, "a map must have shape"),
        (lambda m: m.detect(torch.zeros(1, 3, 40, 40), threshold=2), ValueError, "threshold must be"),
        (lambda m: m.detect(torch.zeros(1, 3, 40, 40), most=0), ValueError, "most must be"),
        (lambda m: m.detect(torch.zeros(1, 3, 40, 40), overlap=math.nan), ValueError, "overlap must be"),
        (lambda m: m.train().detect(torch.zeros(1, 3, 40, 40)), ValueError, "model must be in eval mode"),
        (lambda m: m.head.set_prior(0), ValueError, "size must be"),
        (lambda m: deployed(m.train(), torch.zeros(1, 3, 64, 64)), ValueError, "model must be in eval mode"),
        (lambda m: leyolo("tiny"), ValueError, "name must be one of 'nano', 'small'"),
        (lambda m: leyolo("medium", wiring="other"), ValueError, "wiring must be one of"),
        (lambda m: leyolo("nano", num_classes=0), ValueError, "num_classes must be"),
        (lambda m: leyolo("nano", width=0), ValueError, "width must be"),
    ],
)
def test_bad_input_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call(tiny())


# --- files


@pytest.mark.parametrize(("name", "wiring"), [("nano", "intended"), ("medium", "as_released")])
def test_a_graph_is_its_file(name, wiring, tmp_path):
    graph = published(name, num_classes=7, wiring=wiring)
    (tmp_path / "a.yaml").write_text(yaml.safe_dump(graph.as_mapping()))
    assert read_graph(tmp_path / "a.yaml") == graph


MINE = """
nc: 4  # classes
scales:
  n: [0.33, 0.25, 128]
  m: [1.0, 0.5, 128]
backbone:
  - [-1, 1, Conv, [64, 3, 2]]
  - [-1, 3, mn_conv, [64, 3, 1, "RE"]]
  - [0, 1, MobileNetV3_BLOCK, [256, 5, None, False, "HS", 2]]
head:
  - [-1, 1, nn.Upsample, [None, 2, "nearest"]]
  - [[-1, 1], 1, Concat, [1]]
  - [[4, 2], 1, Detect, [nc]]
"""


def test_a_file_of_the_family(tmp_path):
    (tmp_path / "mine.yaml").write_text(MINE)
    model = LeYOLO(read_graph(tmp_path / "mine.yaml"))
    assert (model.num_classes, model.strides, model.channels, model.multiple) == (4, (2, 4), (48, 32), 4)
    assert isinstance(model.layers[1].act, nn.ReLU6)  # 3 * 0.33 is one
    assert model.layers[0].conv.bias is None
    assert model.layers[2].depthwise.conv.in_channels == 16  # the expansion None is what comes in
    larger = LeYOLO(read_graph(tmp_path / "mine.yaml", scale="m"))
    assert [type(layer) for layer in larger.layers[1]] == [ConvNorm] * 3
    assert larger.channels == (96, 64)
    assert [tuple(each.shape) for each in larger(torch.zeros(1, 3, 8, 8))] == [(1, 68, 4, 4), (1, 68, 2, 2)]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("nc: 4", "nc: !!python/object/apply:os.system ['true']", "is no YAML that can be read as data"),
        ("nc: 4", 'nc: !!int ""', "is no YAML that can be read as data"),
        ("nc: 4", 'nc: !!bool "x"', "is no YAML that can be read as data"),
        ("nc: 4", 'nc: !!timestamp "x"', "is no YAML that can be read as data"),
        ("nc: 4", "nc: " + "9" * 5000, "mine.yaml: is no YAML that can be read as data"),
        ("nc: 4", "nc: &a 4\nother: *a", "must not refer to other parts of itself"),
        ("nc: 4", "nc: " + "[" * 9000, "nor nest deeper than 16"),
        ("nc: 4", "nc: 0", "nc must be"),
        ("nc: 4", "nc: 4\nactivation: nn.ReLU()", "must not have activation"),
        ("nc: 4", "classes: 4", "must be a mapping with nc, backbone and head"),
        ("Conv, [64", "os.system, [64", r"layer 0 \('os.system'\): module must be one of"),
        ("[-1, 1, Conv", "[7, 1, Conv", r"layer 0 .*must read layers before it, got 7"),
        ("[[4, 2], 1, Detect", "[[4, 5], 1, Detect", r"layer 5 .*must read layers before it, got 5"),
        ("[[4, 2], 1, Detect", "[[], 1, Detect", r"layer 5 .*must read a layer"),
        ("[[-1, 1], 1, Concat", "[[-1, 2], 1, Concat", r"layer 4 .*maps of one stride, got strides \[2, 4\]"),
        ("[0, 1, MobileNet", "[[0, 1], 1, MobileNet", r"layer 2 .*must read one layer"),
        ('Detect, [nc]]', 'SPPF, [64]]', "layer 5 .*must read one layer"),
        ("[0, 1, Mob", "[0, 65, Mob", r"backbone\[2\]: repeats must be"),
        ("[256, 5,", "[99999999, 5,", r"layer 2 .*channels must be"),
        ("[64, 3, 2]", "[64, 4, 2]", r"layer 0 .*kernel must be odd or the stride, 2, for maps of a whole size, got 4"),
        ("[64, 3, 2]", "[64, 2, 1]", r"layer 0 .*kernel must be odd or the stride, 1"),
        ("[256, 5,", "[256, 4,", r"layer 2 .*kernel must be odd"),
        ("[256, 5,", "[256, 5.0,", r"layer 2 .*kernel must be a whole number"),
        ('"HS"', '"__import__"', r"layer 2 .*activation must be one of"),
        ('"nearest"', '"bilinear"', r"layer 3 .*'nearest'"),
        ("[nc]", "[80]", "layer 5 .*must have the argument nc"),
        ("[64, 3, 2]", "[64, [3], 2]", r"backbone\[0\]: arguments must be plain values"),
        ("[64, 3, 2]", "[]", "layer 0 .*must have 1 to 4 arguments"),
        ("[-1, 1, Conv, [64, 3, 2]]", "[-1, 1, Conv]", r"backbone\[0\] must be \[from, repeats, module, args\]"),
        ("[0.33, 0.25, 128]", "[0.33, 0.25]", r"a scale must be \[depth, width, most channels\]"),
        ("[0.33, 0.25, 128]", "[0.33, .nan, 128]", "width must be"),
        ("head:\n", "head:\n  - [0, 1, Detect, [nc]]\n", "layer 3 .*the last layer, and no other, must be a head"),
    ],
)  # fmt: skip
def test_a_bad_file_is_refused_where_it_is_bad(old, new, message, tmp_path):
    assert MINE.count(old) == 1
    path = tmp_path / "mine.yaml"
    path.write_text(MINE.replace(old, new))
    with pytest.raises((ValueError, TypeError), match=message):
        LeYOLO(read_graph(path))


def test_files_beyond_the_limits_are_refused(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(MINE + "#" * 2**18)
    with pytest.raises(ValueError, match="must have at most 262144 bytes"):
        read_graph(path)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="is no YAML"):
        read_graph(path)
    rows = [[-1, 1, "mn_conv", [8]]] * 513
    with pytest.raises(ValueError, match="must be a list of at most 512 rows"):
        graph_of({"nc": 1, "backbone": rows, "head": []})
    rows = [[-1, 1, "mn_conv", [16384, 1, 1]]] * 6 + [[-1, 1, "Detect", ["nc"]]]
    with pytest.raises(ValueError, match=r"at most 1073741824 parameters, got 1\d{9}"):
        LeYOLO(graph_of({"nc": 1, "backbone": rows, "head": []}))
    for row, message in (
        ([-1, 64, "mn_conv", [8, 3, 1]], r"layer 1 .*at most 1024 layers with their repeats, got 2048 so far"),
        ([-1, 2, "mn_conv", [8, 3, 2]], r"layer 0 .*a stride of at most 4096, got 1 \* 2\*\*32"),
        ([-1, 1, "SPPF", [8, 4]], r"layer 0 .*kernel must be odd, got 4"),
    ):
        graph = graph_of(
            {"nc": 1, "scales": {"n": [16, 1, 8]}, "backbone": [row] * 2, "head": [[-1, 1, "Detect", ["nc"]]]}
        )
        with pytest.raises(ValueError, match=message):
            LeYOLO(graph)
    with pytest.raises(ValueError, match="SPPF must read at least 2 channels"):
        LeYOLO(Graph((Node("SPPF", (8,)), Node("Detect")), 1), in_chans=1)
    with pytest.raises(ValueError, match="1 to 512 layers"):
        LeYOLO(Graph(()))
    (tmp_path / "b.yaml").write_text(MINE)
    with pytest.raises(ValueError, match="scale must be one of 'n', 'm'"):
        read_graph(tmp_path / "b.yaml", scale="x")


def test_more_modules_come_by_a_larger_table():
    from assay.methods.vision.leyolo import MODULES, Made, in_a_row

    def swap(place):
        return in_a_row(place, place.one, 1, lambda channels: nn.ChannelShuffle(2))

    graph = Graph((Node("mn_conv", (8, 3, 2, "SI")), Node("Swap"), Node("Detect")), 2)
    with pytest.raises(ValueError, match=r"layer 1 \('Swap'\): module must be one of"):
        LeYOLO(graph)
    model = LeYOLO(graph, modules={**MODULES, "Swap": swap})
    assert isinstance(model.layers[1], nn.ChannelShuffle)
    assert Made(nn.Identity(), 1, 1).stride == 1


def test_a_step_down_the_gradient_helps():
    torch.manual_seed(0)
    model = leyolo("nano", width=0.15, num_classes=3)
    x, boxes, labels = torch.rand(2, 3, 64, 64), torch.tensor([[8.0, 8, 40, 48]]), torch.tensor([1])

    def total() -> Tensor:
        return losses(model, model(x), [boxes, boxes[:0]], [labels, labels[:0]]).total

    before = total()
    before.backward()
    with torch.no_grad():
        for value in model.parameters():
            if value.grad is not None:
                value -= 1e-3 * value.grad / value.grad.norm().clamp(min=1e-6)
    assert total() < before
