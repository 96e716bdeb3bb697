"""Vim: sizes as published, one direction against transformers' Mamba, the whole against a plain reference, and what linear cost means."""

from __future__ import annotations

import inspect
import math

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from assay.measure.cost import count_cost
from assay.methods.core.mixers import ssm as ssm_module
from assay.methods.core.mixers.scan import scan_flops, selective_scan
from assay.methods.core.vision.backbone import resized_positions
from assay.methods.core.vision.weights import load_weights
from assay.methods.vision import build, list_models
from assay.methods.vision.vim import CONFIGS, BiMamba, Direction, Vim

TINY = {"embed_dim": 16, "depth": 2, "patch_size": 4, "img_size": 20, "num_classes": 5}
PARAMETERS = {
    "vim_tiny_patch16_224": 7_148_008,
    "vim_tiny_patch16_stride8_224": 7_148_008 + (729 - 196) * 192,
    "vim_small_patch16_224": 25_796_584,
    "vim_small_patch16_stride8_224": 25_796_584 + (729 - 196) * 384,
    "vim_base_patch16_224": 97_598_440,
}


def tiny(**changes):
    torch.manual_seed(0)
    return Vim(**{**TINY, **changes}).eval()


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


def counted(name, depth):
    """Parameters and MACs of a published size at another depth; no weights are made."""
    with torch.device("meta"):
        model = build(name, depth=depth)
        return parameters(model), count_cost(model, torch.zeros(1, 3, 224, 224)).macs


def parameters(model):
    return sum(value.numel() for value in model.parameters())


@pytest.mark.parametrize("name", CONFIGS)
def test_parameters_and_macs_of_the_published_sizes(name, monkeypatch):
    no_scan(monkeypatch)
    (one, macs), (two, more) = counted(name, 1), counted(name, 2)  # all blocks are alike
    assert one + 23 * (two - one) == PARAMETERS[name]
    dim, patches = CONFIGS[name]["embed_dim"], 729 if "stride8" in name else 196
    width, rank, states, tokens = 2 * dim, -(-dim // 16), 16, patches + 1
    direction = width * (4 + 1) + 2 * width * rank + width * 2 * states + width * (states + 2)
    assert two - one == dim + 3 * dim * width + 2 * direction
    assert PARAMETERS[name] - 24 * (two - one) == (3 * 256 + 1) * dim + 2 * dim + tokens * dim + (dim + 1) * 1000
    of_direction = width * 4 + 2 * width * rank + width * 2 * states
    linear = patches * 768 * dim + tokens * 24 * (3 * dim * width + 2 * of_direction) + 1000 * dim
    assert macs + 23 * (more - macs) == linear
    if name == "vim_tiny_patch16_224":
        scans = 48 * (scan_flops(tokens, width, states) + tokens * width)
        assert round(linear / 1e9, 3) == 1.293
        assert round((linear + scans) / 1e9, 3) == 1.819


def test_the_smallest_published_size_is_whole():
    with torch.device("meta"):
        model = build("vim_tiny_patch16_224")
    assert len(model.layers) == 24
    assert parameters(model) == 7_148_008
    assert inspect.signature(Vim).parameters["depth"].default == 24  # of all sizes


def test_block_macs_are_linear_in_the_tokens_where_attention_quadruples(monkeypatch):
    no_scan(monkeypatch)
    layer, attention = BiMamba(32), torch.nn.MultiheadAttention(32, 2, batch_first=True)
    one, two = (torch.zeros(1, length, 32) for length in (50, 100))
    assert count_cost(layer, two).macs == 2 * count_cost(layer, one).macs
    scores = [count_cost(lambda x=x: attention(x, x, x)).macs - x.shape[1] * 4 * 32 * 32 for x in (one, two)]
    assert scores[1] == 4 * scores[0] > 0


class Largest(TorchDispatchMode):
    """The most elements that one tensor had."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        sizes = [leaf.untyped_storage().nbytes() for leaf in tree_iter(out) if isinstance(leaf, torch.Tensor)]
        self.elements = max([self.elements, *(size // 4 for size in sizes)])
        return out


@pytest.mark.parametrize("backend", ["auto", "chunked"])
def test_no_tensor_grows_with_the_square_of_the_tokens(backend):
    layer, seen = BiMamba(16, backend=backend), []
    for length in (512, 1024, 2048):
        with torch.no_grad(), Largest() as largest:
            layer(torch.zeros(1, length, 16))
        seen.append(largest.elements)
    assert seen[2] < 2048**2 / 8
    assert seen[2] <= 2.01 * seen[1] <= 2.01 * 2.01 * seen[0]


# --- what it computes


def test_one_direction_is_the_mamba_of_transformers():
    from transformers import MambaConfig
    from transformers.models.mamba.modeling_mamba import MambaMixer

    torch.manual_seed(0)
    config = MambaConfig(hidden_size=24, num_hidden_layers=1, state_size=8, time_step_rank=2, use_bias=False)
    ahead, back = (stirred(MambaMixer(config, layer_idx=0), seed).eval() for seed in (1, 2))
    back.in_proj, back.out_proj = ahead.in_proj, ahead.out_proj
    layer = BiMamba(24, states=8).eval()

    def copied(direction, oracle):
        direction.conv1d.load_state_dict(oracle.conv1d.state_dict())
        direction.ssm.x_proj.load_state_dict(oracle.x_proj.state_dict())
        with torch.no_grad():
            direction.ssm.dt_weight.copy_(oracle.dt_proj.weight)
            direction.ssm.dynamics.dt_bias.copy_(oracle.dt_proj.bias)
            direction.ssm.dynamics.A_log.copy_(oracle.A_log)
            direction.ssm.dynamics.D.copy_(oracle.D)

    copied(layer.ahead, ahead)
    copied(layer.back, back)
    layer.in_proj, layer.out_proj = ahead.in_proj, ahead.out_proj
    x = torch.randn(2, 29, 24)
    with torch.no_grad():
        expected = (ahead(x) + back(x.flip(1)).flip(1)) / 2
        torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-5)
        layer.halve = False
        torch.testing.assert_close(layer(x), 2 * expected, rtol=1e-4, atol=1e-5)
        layer.back = None
        torch.testing.assert_close(layer(x), ahead(x), rtol=1e-4, atol=1e-5)


def released_state(dim, depth, tokens, patch, classes, states=16):
    """Random weights in the released layout."""
    width, rank = 2 * dim, -(-dim // 16)
    shapes = {"cls_token": (1, 1, dim), "pos_embed": (1, tokens + 1, dim), "norm_f.weight": (dim,)}
    shapes |= {"patch_embed.proj.weight": (dim, 3, patch, patch), "patch_embed.proj.bias": (dim,)}
    shapes |= {"head.weight": (classes, dim), "head.bias": (classes,)}
    for i in range(depth):
        mixer = {"in_proj.weight": (2 * width, dim), "out_proj.weight": (dim, width), "A_b_log": (width, states)}
        mixer |= {"A_log": (width, states)}
        for way in ("", "_b"):
            mixer |= {f"D{way}": (width,), f"conv1d{way}.weight": (width, 1, 4), f"conv1d{way}.bias": (width,)}
            mixer |= {f"x_proj{way}.weight": (rank + 2 * states, width)}
            mixer |= {f"dt_proj{way}.weight": (width, rank), f"dt_proj{way}.bias": (width,)}
        shapes |= {f"layers.{i}.mixer.{name}": shape for name, shape in mixer.items()}
        shapes[f"layers.{i}.norm.weight"] = (dim,)
    generator = torch.Generator().manual_seed(3)
    return {name: 0.5 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def released_logits(state, images, depth, halve=True):
    """The released model, step by step in float64: deferred residual, flipped x and z, one token after the other."""
    state = {name: value.double() for name, value in state.items()}
    patch = state["patch_embed.proj.weight"].shape[-1]
    x = F.conv2d(images.double(), state["patch_embed.proj.weight"], state["patch_embed.proj.bias"], stride=patch)
    x = x.flatten(2).transpose(1, 2)
    middle = x.shape[1] // 2
    x = torch.cat([x[:, :middle], state["cls_token"].expand(len(x), -1, -1), x[:, middle:]], 1) + state["pos_embed"]

    def normed(x, weight):
        return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight

    def scanned(x, z, part, way, A_log):
        taps, bias = part(f"conv1d{way}.weight"), part(f"conv1d{way}.bias")
        x = F.silu(F.conv1d(F.pad(x.transpose(1, 2), (3, 0)), taps, bias, groups=len(bias)).transpose(1, 2))
        rank, states = part(f"dt_proj{way}.weight").shape[1], A_log.shape[1]
        low, B, C = (x @ part(f"x_proj{way}.weight").T).split([rank, states, states], -1)
        dt = F.softplus(low @ part(f"dt_proj{way}.weight").T + part(f"dt_proj{way}.bias"))
        h, out = x.new_zeros(*x[:, 0].shape, states), []
        for t in range(x.shape[1]):
            h = torch.exp(-dt[:, t, :, None] * A_log.exp()) * h + (dt * x)[:, t, :, None] * B[:, t, None]
            out.append((h * C[:, t, None]).sum(-1))
        return (torch.stack(out, 1) + x * part(f"D{way}")) * F.silu(z)

    hidden, residual = x, None
    for i in range(depth):

        def part(name, i=i):
            return state[f"layers.{i}.mixer.{name}"]

        residual = hidden if residual is None else residual + hidden
        u, z = (normed(residual, state[f"layers.{i}.norm.weight"]) @ part("in_proj.weight").T).chunk(2, -1)
        y = scanned(u, z, part, "", part("A_log"))
        y = y + scanned(u.flip(1), z.flip(1), part, "_b", part("A_b_log")).flip(1)
        hidden = (y / 2 if halve else y) @ part("out_proj.weight").T
    features = normed(residual + hidden, state["norm_f.weight"])[:, middle]
    return features @ state["head.weight"].T + state["head.bias"]


@pytest.mark.parametrize("halve", [True, False])
def test_released_weights_give_the_released_logits(halve):
    state, images = released_state(16, 2, 25, 4, 5), torch.randn(2, 3, 20, 20)
    model = tiny(halve=halve)
    assert load_weights(model, state) == "official"
    with torch.no_grad():
        found, expected = model(images), released_logits(state, images, 2, halve)
        torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-3 * expected.abs().max().item())
        torch.testing.assert_close(model.double()(images.double()), expected, rtol=1e-8, atol=1e-8)
    del state["layers.1.mixer.D_b"]
    with pytest.raises(ValueError, match=r"back\.ssm\.dynamics\.D"):
        load_weights(model, state)


def test_our_own_weights_load_as_they_are():
    model, other = stirred(tiny()), tiny()
    assert load_weights(other, model.state_dict()) == "assay"
    x = torch.randn(1, 3, 20, 20)
    assert torch.equal(model(x), other(x))


def test_one_direction_is_causal_and_both_see_everything():
    torch.manual_seed(0)
    layer, x = stirred(BiMamba(8, states=4)), torch.randn(1, 12, 8)
    changed = x.clone()
    changed[:, 7] += 1
    with torch.no_grad():
        moved = (layer(changed) - layer(x)).abs().amax((0, 2)) > 0
        assert moved.all()
        layer.back = None
        moved = (layer(changed) - layer(x)).abs().amax((0, 2)) > 0
        assert moved.tolist() == [False] * 7 + [True] * 5


def test_reversed_tokens_and_swapped_directions_reverse_the_output():
    torch.manual_seed(0)
    layer, x = stirred(BiMamba(8, states=4)).double(), torch.randn(2, 11, 8, dtype=torch.float64)
    y = layer(x)
    assert not torch.allclose(layer(x.flip(1)), y.flip(1))
    layer.ahead, layer.back = layer.back, layer.ahead
    torch.testing.assert_close(layer(x.flip(1)), y.flip(1))


@pytest.mark.parametrize("backend", ["auto", "chunked", "associative"])
@pytest.mark.parametrize("shift", [0.0, 40.0])
def test_back_ends_agree_where_chunks_do_not_fit_and_decays_vanish(backend, shift):
    torch.manual_seed(0)
    plain = stirred(BiMamba(8, states=4, backend="sequential"))
    with torch.no_grad():
        for direction in (plain.ahead, plain.back):
            direction.ssm.dynamics.dt_bias.add_(shift)  # 40: exp(dt A) is 0
    fast = BiMamba(8, states=4, backend=backend)
    fast.load_state_dict(plain.state_dict())
    x = torch.randn(2, 301, 8)
    with torch.no_grad():
        torch.testing.assert_close(fast(x), plain(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", ["auto", "chunked", "sequential"])
def test_two_halves_with_the_state_handed_over_are_one_scan(backend):
    torch.manual_seed(0)
    ssm, x = Direction(8, states=4, dt_rank=1, backend=backend).ssm, torch.randn(2, 33, 8)
    with torch.no_grad():
        whole, last = ssm(x)
        first, state = ssm(x[:, :14])
        second, end = ssm(x[:, 14:], state)
    torch.testing.assert_close(torch.cat([first, second], 1), whole)
    torch.testing.assert_close(end, last)


def test_a_constant_input_without_decay_is_a_running_sum():
    steps = torch.full((1, 6, 2), 0.5)
    ones = torch.ones(1, 6, 3)
    y, _ = selective_scan(torch.ones(1, 6, 2), steps, torch.zeros(2, 3), ones, ones)
    torch.testing.assert_close(y[0, :, 0], 1.5 * torch.arange(1.0, 7))


# --- the model


def test_the_class_token_stands_in_the_middle():
    model = tiny(depth=1)
    with torch.no_grad():
        model.cls_token.fill_(100.0)
        model.pos_embed.zero_()
        model.layers = torch.nn.ModuleList()
        tokens = model.forward_features(torch.zeros(1, 3, 20, 20))
    assert tokens.shape == (1, 26, 16)
    assert tokens.abs().sum(-1)[0].nonzero().flatten().tolist() == [12]
    features = model.forward_head(tokens, pre_logits=True)
    assert torch.equal(features, tokens[:, 12])
    assert torch.equal(model.forward_head(tokens), model.head(features))
    with torch.device("meta"):
        large = build("vim_tiny_patch16_224", depth=1)
    assert large.pos_embed.shape == (1, 197, 192)
    assert large.forward_features(torch.zeros(1, 3, 224, 224, device="meta")).shape[1] // 2 == 98


@pytest.mark.parametrize(("height", "width", "grid"), [(20, 20, (5, 5)), (21, 30, (6, 8)), (3, 17, (1, 5))])
def test_other_sizes_of_image(height, width, grid):
    model = stirred(tiny())
    x = torch.randn(2, 3, height, width)
    ((stride, found),) = model.feature_maps(x).items()
    assert (stride, tuple(found.shape)) == (4, (2, 16, *grid))
    tokens, middle = model.forward_features(x), grid[0] * grid[1] // 2
    assert torch.equal(found.flatten(2).mT, torch.cat([tokens[:, :middle], tokens[:, middle + 1 :]], 1))
    placed = model.positions(grid)
    count, old = grid[0] * grid[1], torch.cat([model.pos_embed[:, :12], model.pos_embed[:, 13:]], 1)
    assert placed.shape == (1, count + 1, 16)
    assert torch.equal(placed[:, count // 2], model.pos_embed[:, 12])
    kept = torch.cat([placed[:, : count // 2], placed[:, count // 2 + 1 :]], 1)
    assert torch.equal(kept, resized_positions(old, grid, (5, 5)))
    padded = F.pad(x, (0, 4 * grid[1] - width, 0, 4 * grid[0] - height))
    assert torch.equal(model(x), model(padded))  # every pixel is seen, and nothing else
    changed = x.clone()
    changed[:, :, -1, -1] += 1
    assert not torch.allclose(model(changed), model(x))


def test_patches_may_overlap():
    model = tiny(patch_size=8, stride=4, img_size=24)
    assert model.grid == (5, 5)
    assert model.feature_maps(torch.zeros(1, 3, 24, 24))[4].shape == (1, 16, 5, 5)


def test_it_is_a_backbone_like_others():
    assert set(list_models("vim_*")) == set(CONFIGS)
    maps = build("vim_tiny_patch16_224", embed_dim=16, depth=1, img_size=32, features_only=True)
    assert maps.feature_info.channels() == [16]
    assert maps.feature_info.reduction() == [16]
    assert [tuple(found.shape) for found in maps(torch.zeros(2, 3, 48, 32))] == [(2, 16, 3, 2)]
    model = tiny()
    x = torch.randn(3, 3, 20, 20)
    together = model(x)
    torch.testing.assert_close(torch.cat([model(one) for one in x.split(1)]), together)
    torch.testing.assert_close(model(x.contiguous(memory_format=torch.channels_last)), together)
    assert model(x[:0]).shape == (0, 5)
    model.reset_classifier(0)
    assert model(x).shape == (3, 16)
    assert model.default_cfg["input_size"] == (3, 20, 20)


def test_it_begins_as_published():
    torch.manual_seed(0)
    model = Vim(embed_dim=64, depth=4, patch_size=16, img_size=64)
    for layer in model.layers:
        for direction in (layer.mixer.ahead, layer.mixer.back):
            dynamics = direction.ssm.dynamics
            steps = F.softplus(dynamics.dt_bias)
            assert steps.min() >= 0.999e-3
            assert steps.max() <= 0.1001
            assert steps.std() > 0.01
            torch.testing.assert_close(dynamics.A_log.exp(), torch.arange(1.0, 17).expand(128, 16))
            assert (dynamics.D == 1).all()
            assert direction.ssm.dt_weight.abs().max() <= 4**-0.5
        bound = (128 * 4) ** -0.5  # Kaiming-uniform over the square root of the depth
        assert bound / 1.05 < layer.mixer.out_proj.weight.abs().max() <= bound
    assert float(model.patch_embed.proj.weight.detach().std()) == pytest.approx((3 * 256) ** -0.5, rel=0.03)
    assert float(model.pos_embed.detach().std()) == pytest.approx(0.02, rel=0.1)
    assert not model.patch_embed.proj.bias.any()


def test_drop_path_rises_to_its_rate_and_rests_in_use():
    model = tiny(depth=3, drop_path_rate=0.3)
    assert [layer.drop_path.rate for layer in model.layers] == pytest.approx([0.0, 0.15, 0.3])
    assert [name for name, settings in CONFIGS.items() if "drop_path_rate" in settings] == ["vim_small_patch16_224"]
    plain = tiny(depth=3)
    plain.load_state_dict(model.state_dict())
    x = torch.randn(8, 3, 20, 20)
    assert torch.equal(model(x), plain(x))
    assert not torch.equal(model.train()(x), plain(x))


def test_every_parameter_has_a_gradient_and_dynamics_get_no_decay():
    model = stirred(tiny()).train()
    F.cross_entropy(model(torch.randn(4, 3, 20, 20)), torch.arange(4)).backward()
    for name, value in model.named_parameters():
        assert value.grad is not None, name
        assert value.grad.isfinite().all(), name
        assert value.grad.abs().sum() > 0, name
    names = model.no_weight_decay()
    assert {"pos_embed", "cls_token", "layers.0.mixer.back.ssm.dynamics.A_log"} <= names
    assert not any("proj" in name or "conv" in name for name in names)


def test_half_precision_keeps_dynamics_and_residual_wide():
    model, seen = stirred(tiny()), []
    x = torch.randn(2, 3, 20, 20)
    expected = model(x)
    model.layers[1].register_forward_pre_hook(lambda module, given: seen.append(given[0].dtype))
    with torch.autocast("cpu", torch.bfloat16):
        mixed = model(x)
    low = model.bfloat16()
    found = low(x.bfloat16())
    assert seen == [torch.float32, torch.float32]
    assert found.dtype == torch.bfloat16
    kept = {name for name, value in low.named_parameters() if value.dtype == torch.float32}
    assert kept == {name for name, _ in low.named_parameters() if ".dynamics." in name}
    for got in (mixed, found):
        assert (got.float() - expected).abs().max() < 0.05 * expected.abs().max()


@pytest.mark.slow
def test_the_model_exports():
    model, x = tiny(depth=1, img_size=8, backend="chunked"), torch.randn(1, 3, 8, 8)
    with torch.no_grad():
        exported = torch.export.export(model, (x,))
        torch.testing.assert_close(exported.module()(x), model(x))


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: BiMamba(0), ValueError, "dim"),
        (lambda: BiMamba(8, states=0), ValueError, "states"),
        (lambda: BiMamba(8, halve=1), TypeError, "halve"),
        (lambda: BiMamba(8)(torch.zeros(2, 4, 9)), ValueError, "x must have shape"),
        (lambda: BiMamba(8)(torch.zeros(2, 4, 8, dtype=torch.int64)), TypeError, "x must hold"),
        (lambda: tiny(depth=0), ValueError, "depth"),
        (lambda: tiny(stride=0), ValueError, "stride"),
        (lambda: tiny(drop_path_rate=1.0), ValueError, "rate"),
        (lambda: tiny(backend="quick")(torch.zeros(1, 3, 20, 20)), ValueError, "backend"),
        (lambda: tiny()(torch.zeros(1, 4, 20, 20)), ValueError, "x must have shape"),
        (lambda: tiny()(torch.zeros(1, 3, 20, 20).half()), TypeError, "x must hold"),
        (lambda: build("vim_tiny_patch16_225"), ValueError, "vim_tiny_patch16_224"),
    ],
)
def test_bad_input_is_named(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_no_tokens_give_none():
    x = torch.zeros(2, 0, 8)
    assert BiMamba(8)(x).shape == x.shape
    assert math.prod(BiMamba(8)(x[:0]).shape) == 0
