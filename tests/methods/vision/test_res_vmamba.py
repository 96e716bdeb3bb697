"""Res-VMamba: sizes as published, the four scans against a plain reference, and what the skip paths are and are not."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
import torch.nn.functional as F

from assay.measure.cost import count_cost
from assay.methods.core.mixers import ssm as ssm_module
from assay.methods.core.mixers.scan import scan_flops, selective_scan
from assay.methods.core.mixers.ssm import SelectiveSSM
from assay.methods.core.vision.weights import load_weights
from assay.methods.vision import build, list_models
from assay.methods.vision.res_vmamba import CONFIGS, SS2D, ResVMamba, Shortcut, VSSBlock, cross_merge, cross_scan

TINY = {"embed_dim": 8, "depths": (1, 2), "patch_size": 2, "states": 4, "num_classes": 5}
PARAMETERS = {"tiny": 22_893_448, "small": 44_417_416, "base": 76_254_056}


def tiny(**changes):
    torch.manual_seed(0)
    return ResVMamba(**{**TINY, **changes}).eval()


def stirred(model, seed=1):
    """All parameters away from where they begin, so that none has no effect."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in model.parameters():
            value.add_(0.1 * torch.randn(value.shape, generator=generator))
    return model


def no_scan(monkeypatch):
    """Projections and convolutions only, on any device."""
    monkeypatch.setattr(ssm_module, "selective_scan", lambda u, *rest, **options: (u, None))


# --- sizes and costs


def published(dim, depths, size=224):
    """Parameters, MACs of linear layers and convolutions, and operations of the scans (9 L E N + L E a direction), without skip paths."""
    side = size // 4
    parameters, macs, scans = (48 + 1) * dim + 2 * dim, side * side * 48 * dim, 0
    for stage, depth in enumerate(depths):
        width, rank, cells = 2 * dim, -(-dim // 16), side * side
        scan = width * (2 * rank + 2 * 16)
        dynamics = width * (16 + 2)
        parameters += depth * (2 * dim + 3 * dim * width + (9 + 1) * width + 4 * (scan + dynamics) + 2 * width)
        macs += depth * cells * (3 * dim * width + 9 * width + 4 * scan)
        scans += depth * 4 * (scan_flops(cells, width, 16) + cells * width)
        if stage < 3:
            side, dim = side // 2, 2 * dim
            parameters += (
                4 * dim + 2 * dim * dim
            )  # merging: a norm and a matrix from four times the old width to twice it
            macs += side * side * 2 * dim * dim
    return parameters + 2 * dim + (dim + 1) * 1000, macs + 1000 * dim, scans


def parameters(model):
    return sum(value.numel() for value in model.parameters())


@functools.cache
def counted(dim):
    """Both networks with one block a stage, and their costs; no weights are made."""
    with torch.device("meta"):
        models = [ResVMamba(embed_dim=dim, depths=(1, 1, 1, 1), residual=residual) for residual in ("none", "learned")]
        return models, [count_cost(model, torch.zeros(1, 3, 224, 224)) for model in models]


@pytest.mark.parametrize("size", ["tiny", "small", "base"])
def test_parameters_and_macs_of_the_published_sizes(size, monkeypatch):
    """Counted with one block a stage, of which the others are copies."""
    no_scan(monkeypatch)
    settings = CONFIGS[f"vssm_{size}"]
    assert settings == CONFIGS[f"res_vmamba_{size}"] | {"residual": "none"}
    dim, depths = settings["embed_dim"], settings["depths"]
    (plain, ours), costs = counted(dim)
    counts, macs = parameters(plain), costs[0].macs
    for stage, depth in enumerate(depths):
        block = f"layers.{stage}.blocks.0."
        counts += (depth - 1) * parameters(plain.layers[stage].blocks[0])
        macs += (depth - 1) * sum(row.macs for row in costs[0].modules if row.name.startswith(block))
    linear, scans = published(dim, depths)[1:]
    assert counts == published(dim, depths)[0] == PARAMETERS[size]
    assert macs == linear
    added = sum(2 * width * width + 2 * width for width in (dim, 2 * dim, 4 * dim))
    assert parameters(ours) - parameters(plain) == added
    assert costs[1].macs - costs[0].macs == sum(28**2 // 4**stage * 2 * (2**stage * dim) ** 2 for stage in range(3))
    if size == "tiny":
        assert added == 388_416
        assert round((linear + scans) / 1e9, 2) == 5.60


def test_the_smallest_published_size_is_whole():
    with torch.device("meta"):
        plain, ours = build("vssm_tiny"), build("res_vmamba_tiny")
    assert parameters(plain) == 22_893_448
    assert parameters(ours) == 22_893_448 + 388_416


def test_cost_is_linear_in_the_cells(monkeypatch):
    no_scan(monkeypatch)
    layer = SS2D(16)
    one, two = (count_cost(layer, torch.zeros(1, side, side, 16)).macs for side in (6, 12))
    assert two == 4 * one


# --- the scans


def test_scanned_and_merged_is_four_times_the_map():
    x = torch.randn(2, 3, 5, 4)
    sequences = cross_scan(x)
    assert torch.equal(sequences[:, 0], x.flatten(1, 2))
    assert torch.equal(sequences[:, 1], x.flatten(1, 2).flip(1))
    assert torch.equal(sequences[:, 2], x.transpose(1, 2).flatten(1, 2))
    assert torch.equal(sequences[:, 3], x.transpose(1, 2).flatten(1, 2).flip(1))
    torch.testing.assert_close(cross_merge(sequences, 3, 5), 4 * x)


def released_mixer(state, x, prefix=""):
    """The released SS2D in float64, in its own order of directions (rows, columns, and both backwards), one cell after the other."""
    part = {name[len(prefix) :]: value.double() for name, value in state.items() if name.startswith(prefix)}
    batch, height, width, _ = x.shape
    u, z = (x @ part["in_proj.weight"].T).chunk(2, -1)
    u = F.silu(
        F.conv2d(u.permute(0, 3, 1, 2), part["conv2d.weight"], part["conv2d.bias"], padding=1, groups=u.shape[-1])
    )
    ways = [u.flatten(2), u.transpose(2, 3).flatten(2)]
    ways += [way.flip(2) for way in ways]
    A = -part["A_logs"].exp().unflatten(0, (4, -1))
    states, outputs = A.shape[2], []
    for k, way in enumerate(ways):
        rank = part["dt_projs_weight"].shape[2]
        low, B, C = torch.split(part["x_proj_weight"][k] @ way, [rank, states, states], 1)
        dt = F.softplus(part["dt_projs_weight"][k] @ low + part["dt_projs_bias"][k][:, None])
        h, out = way.new_zeros(batch, way.shape[1], states), []
        for t in range(height * width):
            h = torch.exp(dt[:, :, t, None] * A[k]) * h + (dt * way)[:, :, t, None] * B[:, None, :, t]
            out.append((h * C[:, None, :, t]).sum(-1))
        outputs.append(torch.stack(out, -1) + part["Ds"].unflatten(0, (4, -1))[k][:, None] * way)
    rows, columns = outputs[0] + outputs[2].flip(2), outputs[1] + outputs[3].flip(2)
    y = rows.unflatten(2, (height, width)) + columns.unflatten(2, (width, height)).transpose(2, 3)
    y = F.layer_norm(y.permute(0, 2, 3, 1), (y.shape[1],), part["out_norm.weight"], part["out_norm.bias"])
    return (y * F.silu(z)) @ part["out_proj.weight"].T


def released_state(dim, depths, patch, classes, states, old=False):
    """Random weights in the released layout of VMamba: the newer names, or the older ones."""
    embed = ("patch_embed.proj", "patch_embed.norm") if old else ("patch_embed.0", "patch_embed.2")
    norm, mixer, head = ("ln_1", "self_attention", "") if old else ("norm", "op", "classifier.")
    shapes = {f"{embed[0]}.weight": (dim, 3, patch, patch), f"{embed[0]}.bias": (dim,)}
    shapes |= {f"{embed[1]}.{kind}": (dim,) for kind in ("weight", "bias")}
    for stage, depth in enumerate(depths):
        width, rank = 2 * dim, -(-dim // 16)
        for i in range(depth):
            block = f"layers.{stage}.blocks.{i}"
            shapes |= {f"{block}.{norm}.{kind}": (dim,) for kind in ("weight", "bias")}
            parts = {"in_proj.weight": (2 * width, dim), "conv2d.weight": (width, 1, 3, 3), "conv2d.bias": (width,)}
            parts |= {"x_proj_weight": (4, rank + 2 * states, width), "dt_projs_weight": (4, width, rank)}
            parts |= {"dt_projs_bias": (4, width), "A_logs": (4 * width, states), "Ds": (4 * width,)}
            parts |= {"out_norm.weight": (width,), "out_norm.bias": (width,), "out_proj.weight": (dim, width)}
            shapes |= {f"{block}.{mixer}.{name}": shape for name, shape in parts.items()}
        if stage < len(depths) - 1:
            merging = f"layers.{stage}.downsample"
            shapes |= {f"{merging}.norm.{kind}": (4 * dim,) for kind in ("weight", "bias")}
            shapes[f"{merging}.reduction.weight"] = (2 * dim, 4 * dim)
            dim *= 2
    shapes |= {f"{head}norm.weight": (dim,), f"{head}norm.bias": (dim,)}
    shapes |= {f"{head}head.weight": (classes, dim), f"{head}head.bias": (classes,)}
    generator = torch.Generator().manual_seed(3)
    return {name: 0.5 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def released_logits(state, images, depths, patch):
    """The released VMamba in float64."""
    part = {name: value.double() for name, value in state.items()}

    def normed(x, name):
        return F.layer_norm(x, x.shape[-1:], part[f"{name}.weight"], part[f"{name}.bias"])

    x = F.conv2d(images.double(), part["patch_embed.0.weight"], part["patch_embed.0.bias"], stride=patch)
    x = normed(x.permute(0, 2, 3, 1), "patch_embed.2")
    for stage, depth in enumerate(depths):
        for i in range(depth):
            block = f"layers.{stage}.blocks.{i}"
            x = x + released_mixer(part, normed(x, f"{block}.norm"), f"{block}.op.")
        if stage < len(depths) - 1:
            x = torch.cat([x[:, 0::2, 0::2], x[:, 1::2, 0::2], x[:, 0::2, 1::2], x[:, 1::2, 1::2]], -1)
            x = normed(x, f"layers.{stage}.downsample.norm") @ part[f"layers.{stage}.downsample.reduction.weight"].T
    return normed(x, "classifier.norm").mean((1, 2)) @ part["classifier.head.weight"].T + part["classifier.head.bias"]


def test_released_weights_give_the_released_logits():
    state, images = released_state(8, (1, 2), 2, 5, 4), torch.randn(2, 3, 12, 8)
    model = build("vssm_tiny", **TINY).eval()
    assert load_weights(model, state) == "official"
    expected = released_logits(state, images, (1, 2), 2)
    with torch.no_grad():
        torch.testing.assert_close(model(images).double(), expected, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(model.double()(images.double()), expected, rtol=1e-8, atol=1e-8)
    older = build("vssm_tiny", **TINY).eval()
    assert load_weights(older, released_state(8, (1, 2), 2, 5, 4, old=True)) == "official"
    renamed = older.double().state_dict()
    assert all(torch.equal(value, renamed[name]) for name, value in model.state_dict().items())


def test_weights_of_another_shape_or_without_skip_paths_are_refused():
    state = released_state(8, (1, 2), 2, 5, 4)
    with pytest.raises(ValueError, match=r"shortcuts\.0\.proj\.weight"):
        load_weights(build("res_vmamba_tiny", **TINY), state)
    assert load_weights(build("res_vmamba_tiny", **TINY, residual="redrawn"), state) == "official"
    state["layers.0.blocks.0.op.Ds"] = torch.zeros(4 * 17)
    with pytest.raises(ValueError, match=r"dynamics\.D"):
        load_weights(build("vssm_tiny", **TINY), state)


def test_without_decay_a_scan_is_a_running_sum():
    torch.manual_seed(0)
    u, dt = torch.randn(2, 20, 3), torch.rand(2, 20, 3)
    B, C, D = torch.randn(2, 20, 4), torch.randn(2, 20, 4), torch.randn(3)
    y, _ = selective_scan(u, dt, torch.zeros(3, 4), B, C, D)
    sums = ((dt * u)[..., None] * B[:, :, None]).cumsum(1)
    torch.testing.assert_close(y, (sums * C[:, :, None]).sum(-1) + D * u, rtol=1e-4, atol=1e-5)


def test_with_constant_inputs_a_scan_converges_geometrically():
    ones = torch.ones(1, 30, 1, dtype=torch.float64)
    y, _ = selective_scan(ones, 0.3 * ones, torch.tensor([[-1.0]]).double(), ones, ones)
    step = y[0, 1:, 0] - y[0, :-1, 0]
    torch.testing.assert_close(step[1:] / step[:-1], torch.full_like(step[1:], 0.3).neg().exp())


def test_a_map_turned_by_half_a_turn_turns_the_scans():
    """Where a direction shares its weights with its reverse, and the convolution is symmetric."""
    torch.manual_seed(0)
    layer = stirred(SS2D(8, states=4)).double()
    for ahead, back in ((0, 1), (2, 3)):
        layer.directions[back].load_state_dict(layer.directions[ahead].state_dict())
    x = torch.randn(2, 3, 5, 8, dtype=torch.float64)
    u = torch.randn(2, 3, 5, 16, dtype=torch.float64)
    torch.testing.assert_close(layer.scanned(u.flip(1, 2)), layer.scanned(u).flip(1, 2))
    assert not torch.allclose(layer(x.flip(1, 2)), layer(x).flip(1, 2))
    with torch.no_grad():
        layer.conv2d.weight.add_(layer.conv2d.weight.flip(2, 3))
    torch.testing.assert_close(layer(x.flip(1, 2)), layer(x).flip(1, 2))
    with torch.no_grad():
        layer.directions[1].dynamics.A_log.add_(1)
    assert not torch.allclose(layer.scanned(u.flip(1, 2)), layer.scanned(u).flip(1, 2))


def test_every_cell_sees_every_other():
    torch.manual_seed(0)
    layer, x = stirred(SS2D(8, states=4)), torch.randn(1, 4, 5, 8)
    changed = x.clone()
    changed[:, 1, 2] += 1
    with torch.no_grad():
        assert ((layer(changed) - layer(x)).abs().sum(-1) > 0).all()


@pytest.mark.parametrize("backend", ["auto", "chunked"])
def test_back_ends_agree(backend):
    torch.manual_seed(0)
    plain = stirred(SS2D(8, states=4, backend="sequential"))
    fast = SS2D(8, states=4, backend=backend)
    fast.load_state_dict(plain.state_dict())
    x = torch.randn(2, 9, 11, 8)
    with torch.no_grad():
        torch.testing.assert_close(fast(x), plain(x), rtol=1e-4, atol=1e-5)


# --- the skip paths


def test_without_skip_paths_it_is_vmamba():
    plain, learned = tiny(residual="none"), tiny()
    assert not any("shortcut" in name for name in plain.state_dict())
    learned.load_state_dict(plain.state_dict(), strict=False)
    x = torch.randn(2, 3, 16, 12)
    with torch.no_grad():
        assert not torch.allclose(learned(x), plain(x))
        for shortcut in learned.shortcuts:
            shortcut.proj.weight.zero_()
            shortcut.proj.bias.zero_()
        assert torch.equal(learned(x), plain(x))


def test_a_skip_path_is_a_projection_of_the_pooled_map():
    model, x = stirred(tiny()), torch.randn(2, 3, 16, 12)
    first = model.patch_embed(x)
    y = model.layers[0].blocks(first)
    pooled = torch.stack([first[:, i::2, j::2] for i in (0, 1) for j in (0, 1)]).amax(0)
    weight, bias = model.shortcuts[0].proj.weight[:, :, 0, 0], model.shortcuts[0].proj.bias
    second = model.layers[1].blocks(model.layers[0].downsample(y) + pooled @ weight.T + bias)
    torch.testing.assert_close(model.forward_features(x), model.norm(second), rtol=1e-4, atol=1e-5)
    before = model.feature_maps(x)  # in front of the skip paths
    torch.testing.assert_close(before[2], y.permute(0, 3, 1, 2))
    torch.testing.assert_close(before[4], second.permute(0, 3, 1, 2), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("residual", ["learned", "frozen_random", "none"])
def test_two_runs_of_one_model_are_equal_bit_for_bit(residual):
    model, x = tiny(residual=residual), torch.randn(2, 3, 16, 16)
    assert torch.equal(model(x), model(x))
    again = tiny(residual=residual)
    again.load_state_dict(model.state_dict())
    assert torch.equal(again(x), model(x))


def test_projections_drawn_anew_are_those_of_the_release():
    model, x = tiny(residual="redrawn"), torch.randn(2, 3, 16, 16)
    assert model.state_dict().keys() == tiny(residual="none").state_dict().keys()
    assert not torch.equal(model(x), model(x))
    path, given = Shortcut(64, "redrawn"), torch.ones(1, 2, 2, 64)
    torch.manual_seed(7)
    outs = torch.cat([path(given).flatten() for _ in range(100)])
    fresh = torch.cat([torch.nn.Conv2d(64, 128, 1)(given[:, :1, :1].permute(0, 3, 1, 2)).flatten() for _ in range(100)])
    assert outs.shape == fresh.shape
    assert float(outs.std()) == pytest.approx(float(fresh.detach().std()), rel=0.05)


def test_only_learned_projections_learn():
    for residual, learns in (("learned", True), ("frozen_random", False)):
        model = tiny(residual=residual).train()
        model(torch.randn(2, 3, 16, 16)).sum().backward()
        assert [shortcut.proj.weight.grad is not None for shortcut in model.shortcuts] == [learns]


# --- the model


@pytest.mark.parametrize(("height", "width"), [(16, 16), (13, 18), (5, 3)])
def test_other_sizes_of_image(height, width):
    model, x = stirred(tiny()), torch.randn(2, 3, height, width)
    maps = model.feature_maps(x)
    sizes = {2: (-(-height // 2), -(-width // 2)), 4: (-(-height // 4), -(-width // 4))}
    assert {stride: tuple(found.shape) for stride, found in maps.items()} == {
        stride: (2, 2 * stride * 2, *size) for stride, size in sizes.items()
    }
    assert model(x).isfinite().all()
    changed = x.clone()
    changed[:, :, -1, -1] += 1
    assert not torch.allclose(model(changed), model(x))


def test_it_is_a_backbone_like_others():
    assert set(CONFIGS) == {*list_models("res_vmamba_*"), *list_models("vssm_*")}
    maps = build("res_vmamba_tiny", **TINY, features_only=True, out_indices=[0])
    assert maps.feature_info.channels() == [8]
    assert maps.feature_info.reduction() == [2]
    maps.model.layers[1].blocks = None  # a stage after the last one asked for is not run
    assert [tuple(found.shape) for found in maps(torch.zeros(2, 3, 12, 8))] == [(2, 8, 6, 4)]
    model, x = tiny(), torch.randn(3, 3, 12, 16)
    together = model(x)
    assert torch.equal(model.forward_head(model.forward_features(x)), together)
    torch.testing.assert_close(torch.cat([model(one) for one in x.split(1)]), together)
    torch.testing.assert_close(model(x.contiguous(memory_format=torch.channels_last)), together)
    assert model(x[:0]).shape == (0, 5)
    model.reset_classifier(0)
    assert model(x).shape == (3, 16)


def test_it_begins_as_published():
    torch.manual_seed(0)
    model = ResVMamba(embed_dim=32, depths=(1, 1), num_classes=10)
    for module in model.modules():
        if isinstance(module, SelectiveSSM):
            steps = F.softplus(module.dynamics.dt_bias)
            assert steps.min() >= 0.999e-3
            assert steps.max() <= 0.1001
            assert (module.dynamics.D == 1).all()
            assert module.x_proj.weight.abs().max() <= module.width**-0.5  # torch's own, not of deviation 0.02
            assert module.dt_weight.abs().max() <= module.dt_rank**-0.5
    mixer = model.layers[1].blocks[0].op
    for layer in (mixer.in_proj, mixer.out_proj, model.layers[0].downsample.reduction, model.head):
        assert float(layer.weight.detach().std()) == pytest.approx(0.02, rel=0.1)


def test_drop_path_rises_to_its_rate():
    model = tiny(depths=(1, 2), drop_path_rate=0.3)
    rates = [block.drop_path.rate for layer in model.layers for block in layer.blocks]
    assert rates == pytest.approx([0.0, 0.15, 0.3])
    x = torch.randn(16, 2, 2, 8)
    block = VSSBlock(8, 0.5, states=4)
    added = block.op(block.norm(x))
    assert torch.equal(block.eval()(x), x + added)
    trained = block.train()(x)
    left_out = (trained == x).flatten(1).all(1)
    assert 0 < left_out.sum() < 16
    torch.testing.assert_close(trained[~left_out], (x + 2 * added)[~left_out])


def test_every_parameter_has_a_gradient_and_dynamics_get_no_decay():
    model = stirred(tiny()).train()
    F.cross_entropy(model(torch.randn(4, 3, 16, 16)), torch.arange(4)).backward()
    for name, value in model.named_parameters():
        assert value.grad is not None, name
        assert value.grad.isfinite().all(), name
        assert value.grad.abs().sum() > 0, name
    assert model.no_weight_decay() == {name for name, _ in model.named_parameters() if ".dynamics." in name}
    assert len(model.no_weight_decay()) == 3 * 4 * 3


def test_half_precision_keeps_the_dynamics_wide():
    model, x = stirred(tiny()), torch.randn(2, 3, 16, 16)
    expected = model(x)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = model(x)
    low = copy.deepcopy(model).bfloat16()
    found = low(x.bfloat16())
    assert found.dtype == torch.bfloat16
    kept = {name for name, value in low.named_parameters() if value.dtype == torch.float32}
    assert kept == low.no_weight_decay()
    for got in (mixed, found):
        assert (got.float() - expected).abs().max() < 0.05 * expected.abs().max()


@pytest.mark.slow
def test_the_model_exports():
    model, x = tiny(depths=(1, 1), backend="chunked"), torch.randn(1, 3, 4, 4)
    with torch.no_grad():
        exported = torch.export.export(model, (x,))
        torch.testing.assert_close(exported.module()(x), model(x))


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: SS2D(0), ValueError, "dim"),
        (lambda: SS2D(8, states=0), ValueError, "states"),
        (lambda: SS2D(8)(torch.zeros(2, 4, 8)), ValueError, "x must have shape"),
        (lambda: SS2D(8)(torch.zeros(2, 4, 4, 8, dtype=torch.int64)), TypeError, "x must hold"),
        (lambda: cross_scan(torch.zeros(2, 4, 8)), ValueError, "x must have 4 dimensions"),
        (lambda: tiny(depths=()), ValueError, "depths"),
        (lambda: tiny(depths=(1, 0)), ValueError, r"depths\[1\]"),
        (lambda: tiny(residual="frozen"), ValueError, "frozen_random"),
        (lambda: tiny()(torch.zeros(1, 4, 16, 16)), ValueError, "x must have shape"),
        (lambda: tiny()(torch.zeros(1, 3, 16, 16).half()), TypeError, "x must hold"),
    ],
)
def test_bad_input_is_named(make, error, message):
    with pytest.raises(error, match=message):
        make()
