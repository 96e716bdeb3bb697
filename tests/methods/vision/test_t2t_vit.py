"""T2T-ViT: soft splits are convolutions' windows, random features are a stable weighted mean, sizes and costs are the published ones."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from tests.tiny import tiny_model, token_ids
from torch import nn

from assay.measure.cost import count_cost
from assay.methods.core.vision.weights import load_weights
from assay.methods.vision import build
from assay.methods.vision.t2t_vit import (
    CONFIGS,
    SPLITS,
    RandomFeatureAttention,
    SoftSplit,
    T2TViT,
    TokenBlock,
    TokensToToken,
    orthogonal_rows,
    random_feature_attention,
    register_random_features,
    sinusoids,
)

TINY = {"embed_dim": 16, "depth": 2, "num_heads": 2, "token_dim": 8, "input_size": 32}
MILLIONS = {7: 4.3, 10: 5.9, 12: 6.9, 14: 21.5, 19: 39.2, 24: 64.1}  # the released table, 14 at 384 pixels has 21.7
GMACS = {7: 1.1, 10: 1.5, 12: 1.8, 14: 4.8, 19: 8.5, 24: 13.8}
COUNTED = {"t2t_vit_7": 1, "t2t_vit_14": 2, "t2t_vit_14_384": 1, "t2t_vit_t_19": 1, "t2t_vit_14_wide": 1}
GMACS_SOFTMAX = {14: 6.1, 19: 9.8, 24: 15.0}


def tiny(seed=0, **settings):
    torch.manual_seed(seed)
    return T2TViT(num_classes=5, in_chans=3, **{**TINY, **settings}).eval()


def shape_of(name, depth=None):
    found = {"mlp_ratio": 3.0, "tokens_type": "performer", "input_size": 224, **CONFIGS[name]}
    found["depth"] = depth or found["depth"]
    return tuple(found[key] for key in ("embed_dim", "depth", "mlp_ratio", "tokens_type", "input_size"))


def parameters_by_hand(name):
    """(with a gradient, without one)"""
    width, depth, ratio, kind, size = shape_of(name)
    hidden, c = int(ratio * width), 64
    layer = 4 * width**2 + width + 2 * width * hidden + hidden + width + 4 * width
    block = sum(2 * n + 3 * n * c + (3 * c if kind == "performer" else 0) for n in (147, 576))
    block += 2 * (c**2 + c + 2 * c + 2 * (c**2 + c))
    rest = 576 * width + width + width + 2 * width + 1000 * width + 1000
    fixed = ((size // 16) ** 2 + 1) * width + (2 * 32 * c if kind == "performer" else 0)
    return depth * layer + block + rest, fixed


def macs_by_hand(name, depth=None):
    width, depth, ratio, kind, size = shape_of(name, depth)
    hidden, c, m, last = int(ratio * width), 64, 32, (size // 16) ** 2
    total = last * 576 * width + 1000 * width
    for tokens, n in ((16 * last, 147), (4 * last, 576)):
        total += tokens * (n * 3 * c + 3 * c**2)
        total += tokens * (4 * c * m + m) if kind == "performer" else 2 * tokens**2 * c
    seen = last + 1
    return total + depth * (4 * seen * width**2 + 2 * seen**2 * width + 2 * seen * width * hidden)


# --- sizes and costs


@pytest.mark.parametrize("name", CONFIGS)
def test_parameters_and_macs_of_every_configuration(name, monkeypatch):
    """The operations are counted with one layer or two: all layers are alike."""
    monkeypatch.setattr(
        nn.init, "trunc_normal_", lambda tensor, **spread: tensor
    )  # there is nothing to fill on the meta device
    with torch.device("meta"):
        model = build(name)
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        assert (trained, sum(p.numel() for p in model.parameters()) - trained) == parameters_by_hand(name)
        if name in COUNTED:
            images = torch.zeros(1, 3, model.input_size, model.input_size)
            short = build(name, depth=COUNTED[name]).eval()
            assert count_cost(short, images).macs == macs_by_hand(name, COUNTED[name])


def test_the_published_numbers():
    for layers, millions in MILLIONS.items():
        assert round(sum(parameters_by_hand(f"t2t_vit_{layers}")) / 1e6, 1) == pytest.approx(millions, abs=0.11)
        assert round(macs_by_hand(f"t2t_vit_{layers}") / 1e9, 1) == pytest.approx(GMACS[layers], abs=0.11)
    for layers, macs in GMACS_SOFTMAX.items():
        assert round(macs_by_hand(f"t2t_vit_t_{layers}") / 1e9, 1) == pytest.approx(macs, abs=0.21)
    assert parameters_by_hand("t2t_vit_14") == (21_465_806, 21_545_550 - 21_465_806)
    assert macs_by_hand("t2t_vit_14") == pytest.approx(4.7835e9, rel=2e-5)
    assert round(sum(parameters_by_hand("t2t_vit_14_384")) / 1e6, 1) == 21.7


def test_random_features_cost_linearly_in_tokens_and_softmax_squarely():
    def macs(kind, size):
        with torch.device("meta"):
            module, images = TokensToToken(3, 384, kind), torch.zeros(1, 3, size, size)
        return count_cost(lambda: list(module.maps(images))).macs

    assert macs("performer", 448) == 4 * macs("performer", 224)
    softmax = {size: 2 * sum((size // stride) ** 4 * 64 for stride in (4, 8)) for size in (224, 448)}
    features = sum(n * (4 * 64 * 32 + 32) for n in (3136, 784))
    assert softmax[448] == 16 * softmax[224]
    assert macs("transformer", 448) - softmax[448] == 4 * (macs("transformer", 224) - softmax[224])
    assert macs("transformer", 224) - softmax[224] == macs("performer", 224) - features


# --- soft splits


@pytest.mark.parametrize(("kernel", "stride", "padding"), [*SPLITS, (4, 4, 0), (3, 1, 1), (5, 3, 0)])
@pytest.mark.parametrize("size", [(16, 16), (13, 22)])
def test_a_soft_split_is_an_unfold_and_with_a_linear_layer_a_convolution(kernel, stride, padding, size):
    split, x = SoftSplit(kernel, stride, padding).double(), torch.randn(2, 3, *size, dtype=torch.float64)
    tokens = split(x)
    assert torch.equal(tokens, F.unfold(x, kernel, padding=padding, stride=stride).transpose(1, 2))
    linear = nn.Linear(3 * kernel**2, 7).double()
    joined = split.fused(x, linear)
    assert joined.shape[2:] == split.grid(*size)
    torch.testing.assert_close(joined.flatten(2).transpose(1, 2), linear(tokens))


def test_the_papers_splits_give_a_fourth_an_eighth_and_a_sixteenth():
    for side in (224, 384, 64):
        sides = []
        height = side
        for split in SPLITS:
            height, _ = SoftSplit(*split).grid(height, height)
            sides.append(height)
        assert sides == [side // 4, side // 8, side // 16]


def test_maps_too_small_for_a_split_are_refused():
    with pytest.raises(ValueError, match="at least 3 x 3"):
        SoftSplit(7, 4, 2)(torch.zeros(1, 3, 8, 2))
    with pytest.raises(ValueError, match="kernel"):
        SoftSplit(0, 4, 2)


# --- random features


def by_formula(q, k, v, rows):
    """Straight from the formula, in float64, without any shift."""
    q, k, v, rows = (z.double() for z in (q, k, v, rows))

    def phi(z):
        return torch.exp(z @ rows.T - (z * z).sum(-1, keepdim=True) / 2) / math.sqrt(len(rows))

    weights = phi(q) @ phi(k).mT
    return weights @ v / (weights.sum(-1, keepdim=True) + 1e-8)


def test_random_features_are_the_formula_and_so_are_their_gradients():
    torch.manual_seed(0)
    q, k, v = (0.5 * torch.randn(3, 2, 17, 8, dtype=torch.float64)).unbind()
    rows = orthogonal_rows(4, 8, 2.0)
    torch.testing.assert_close(random_feature_attention(q, k, v, rows), by_formula(q, k, v, rows), rtol=1e-5, atol=1e-6)
    far = [10 * z for z in (q, k, v)]  # most denominators are below the epsilon
    expected = by_formula(*far, rows)
    assert (expected.abs() < 1e-3).any()
    torch.testing.assert_close(random_feature_attention(*far, rows, epsilon=1e-8), expected)
    found = random_feature_attention(q.float(), k.float(), v.float(), rows)
    torch.testing.assert_close(found, by_formula(q, k, v, rows).float(), rtol=1e-4, atol=1e-5)
    given = [z.clone().requires_grad_() for z in (q, k, v)]
    weight = torch.randn_like(v)
    ours = torch.autograd.grad((random_feature_attention(*given, rows) * weight).sum(), given)
    plain = torch.autograd.grad((by_formula(*given, rows) * weight).sum(), given)
    for a, b in zip(ours, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("scale", [1.0, 10.0, 100.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_outputs_stay_within_the_values_at_every_size_and_precision(scale, dtype):
    """Where the exponentials of the formula overflow or are all 0, too."""
    torch.manual_seed(0)
    q, k, v = ((scale * torch.randn(2, 40, 16)).to(dtype) for _ in range(3))
    out = random_feature_attention(q, k, v, orthogonal_rows(8, 16, 8**0.5))
    assert out.dtype == dtype
    assert out.isfinite().all()
    slack = 1e-2 * scale
    assert (out <= v.amax(-2, keepdim=True) + slack).all()
    assert (out >= v.amin(-2, keepdim=True) - slack).all()
    if scale == 100:
        lost = by_formula(q, k, v, orthogonal_rows(8, 16, 8**0.5))
        assert (lost.isnan() | (lost == 0)).any()


def test_autocast_does_not_touch_the_features():
    torch.manual_seed(0)
    q, k, v = (3 * torch.randn(2, 40, 16) for _ in range(3))
    attention = RandomFeatureAttention(16, 8)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(attention(q, k, v), random_feature_attention(q, k, v, attention.w))


def test_rows_are_orthogonal_of_one_length_and_never_change():
    rows = orthogonal_rows(20, 8, 3.0, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(rows[:8] @ rows[:8].T, 9 * torch.eye(8), atol=1e-4, rtol=0)
    torch.testing.assert_close(rows[16:] @ rows[16:].T, 9 * torch.eye(4), atol=1e-4, rtol=0)
    assert torch.equal(rows, orthogonal_rows(20, 8, 3.0, generator=torch.Generator().manual_seed(1)))
    attention = RandomFeatureAttention(8, 4)
    torch.testing.assert_close(attention.w.norm(dim=1), torch.full((4,), 2.0))
    assert not attention.w.requires_grad
    assert set(attention.state_dict()) == {"w"}
    before = attention.w.clone()
    assert attention.bfloat16().w.dtype == torch.float32
    assert torch.equal(attention.half().w, before)
    assert attention.double().w.dtype == torch.float64


def test_what_the_features_estimate():
    """Rows of length sqrt(dim): the kernel of softmax. Of length sqrt(dim / 2), as released: near a Gaussian."""
    torch.manual_seed(0)
    dim, draws = 8, 4000
    q, k = 0.3 * torch.randn(2, 60, dim)
    softmax, gaussian = (q * k).sum(-1).exp(), (-(q - k).square().sum(-1) / 4).exp()

    def mean_kernel(features, norm):
        square = torch.linalg.qr(torch.randn(draws, dim, dim))[0] * torch.sign(torch.randn(draws, 1, dim))
        rows = norm * square.mT[:, :features]
        phi_q, phi_k = ((z @ rows.mT - z.square().sum(-1, keepdim=True) / 2).exp() for z in (q, k))
        return (phi_q * phi_k).sum(-1).mean(0) / features

    def alike(a, b):
        return float(torch.corrcoef(torch.stack([a, b]))[0, 1])

    wide, released = mean_kernel(8, 8**0.5), mean_kernel(4, 4**0.5)
    assert alike(wide, softmax) > 0.97
    assert ((wide - softmax).abs() / softmax).mean() < 0.1  # rows of one length have lighter tails than Gaussian ones
    assert alike(released, gaussian) > 0.98
    assert alike(released, gaussian) > alike(released, softmax) + 0.2


def test_bad_input_is_named():
    q = torch.randn(2, 10, 8)
    rows = orthogonal_rows(4, 8, 2.0)
    with pytest.raises(ValueError, match="q must have shape"):
        random_feature_attention(q[..., :4], q, q, rows)
    with pytest.raises(TypeError, match="v must have the dtype of q"):
        random_feature_attention(q, q, q.double(), rows)
    with pytest.raises(ValueError, match="v must have as many rows as k"):
        random_feature_attention(q, q, q[:, :5], rows)
    with pytest.raises(ValueError, match="k must not be empty"):
        random_feature_attention(q, q[:, :0], q[:, :0], rows)
    with pytest.raises(ValueError, match="k must have the leading dimensions of q"):
        random_feature_attention(q, q[:1], q[:1], rows)
    with pytest.raises(ValueError, match="rows must have shape"):
        random_feature_attention(q, q, q, rows[0])
    with pytest.raises(ValueError, match="count"):
        orthogonal_rows(0, 8, 1.0)
    with pytest.raises(ValueError, match="linear must take 3 x 3 x 3 numbers"):
        SoftSplit(3, 2, 1).fused(torch.zeros(1, 3, 8, 8), nn.Linear(8, 4))
    with pytest.raises(ValueError, match="x must have 4 dimensions"):
        SoftSplit(3, 2, 1).fused(torch.zeros(3, 8, 8), nn.Linear(27, 4))
    with pytest.raises(ValueError, match="splits must be three"):
        tiny(splits=SPLITS[:2])
    for name, value in {"input_size": 15, "token_drop_rate": 1.0, "drop_path_rate": 1.0, "mlp_ratio": 0}.items():
        with pytest.raises(ValueError, match=name):
            tiny(**{name: value})
    with pytest.raises(ValueError, match="row_norm"):
        RandomFeatureAttention(8, 4, row_norm=0)
    with pytest.raises(ValueError, match="epsilon"):
        RandomFeatureAttention(8, 4, epsilon=-1e-8)
    with pytest.raises(ValueError, match="tokens_type"):
        tiny(tokens_type="hard")
    with pytest.raises(ValueError, match="embed_dim must be divisible"):
        tiny(num_heads=3)
    with pytest.raises(ValueError, match="x must have shape"):
        tiny()(torch.zeros(1, 1, 32, 32))
    with pytest.raises(ValueError, match="x must be at least"):
        tiny()(torch.zeros(1, 3, 32, 2))


# --- against an independent reading of the released checkpoints


def released_state(kind, *, width=16, c=8, depth=2, side=2, classes=5):
    """Random tensors with the keys and shapes of a released checkpoint."""
    torch.manual_seed(1)
    shapes: dict[str, tuple[int, ...]] = {"cls_token": (1, 1, width), "pos_embed": (1, side**2 + 1, width)}
    for place, n in (("1", 147), ("2", 9 * c)):
        at = f"tokens_to_token.attention{place}."
        shapes |= {
            at + "norm1.weight": (n,),
            at + "norm1.bias": (n,),
            at + "norm2.weight": (c,),
            at + "norm2.bias": (c,),
        }
        if kind == "performer":
            shapes |= {at + "kqv.weight": (3 * c, n), at + "kqv.bias": (3 * c,), at + "w": (c // 2, c)}
            names = {"proj": "proj", "mlp.0": "", "mlp.2": ""}
        else:
            shapes |= {at + "attn.qkv.weight": (3 * c, n)}
            names = {"attn.proj": "", "mlp.fc1": "", "mlp.fc2": ""}
        for name in names:
            shapes |= {f"{at}{name}.weight": (c, c), f"{at}{name}.bias": (c,)}
    shapes |= {"tokens_to_token.project.weight": (width, 9 * c), "tokens_to_token.project.bias": (width,)}
    for i in range(depth):
        at = f"blocks.{i}."
        for name in ("norm1", "norm2"):
            shapes |= {f"{at}{name}.weight": (width,), f"{at}{name}.bias": (width,)}
        shapes |= {at + "attn.qkv.weight": (3 * width, width)}
        shapes |= {at + "attn.proj.weight": (width, width), at + "attn.proj.bias": (width,)}
        shapes |= {at + "mlp.fc1.weight": (3 * width, width), at + "mlp.fc1.bias": (3 * width,)}
        shapes |= {at + "mlp.fc2.weight": (width, 3 * width), at + "mlp.fc2.bias": (width,)}
    shapes |= {"norm.weight": (width,), "norm.bias": (width,), "head.weight": (classes, width), "head.bias": (classes,)}
    return {key: 0.3 * torch.randn(shape) for key, shape in shapes.items()}


def released_forward(state, images, kind):
    """The released network from its own tensors, in float64, written plainly."""
    s = {key: tensor.double() for key, tensor in state.items()}

    def norm(x, at):
        return F.layer_norm(x, x.shape[-1:], s[at + ".weight"], s[at + ".bias"])

    def linear(x, at):
        return F.linear(x, s[at + ".weight"], s.get(at + ".bias"))

    def softmax(q, k, v, scale):
        return ((q @ k.mT) * scale).softmax(-1) @ v

    x = images.double()
    for place, split in (("1", SPLITS[0]), ("2", SPLITS[1])):
        at = f"tokens_to_token.attention{place}."
        tokens = F.unfold(x, split[0], stride=split[1], padding=split[2]).transpose(1, 2)
        given = norm(tokens, at + "norm1")
        if kind == "performer":
            k, q, v = linear(given, at + "kqv").chunk(3, -1)
            y = v + linear(by_formula(q, k, v, s[at + "w"]), at + "proj")
            y = y + linear(F.gelu(linear(norm(y, at + "norm2"), at + "mlp.0")), at + "mlp.2")
        else:
            q, k, v = linear(given, at + "attn.qkv").chunk(3, -1)
            y = v + linear(softmax(q, k, v, tokens.shape[-1] ** -0.5), at + "attn.proj")
            y = y + linear(F.gelu(linear(norm(y, at + "norm2"), at + "mlp.fc1")), at + "mlp.fc2")
        side = math.isqrt(y.shape[1])
        x = y.transpose(1, 2).reshape(len(y), -1, side, side)
    tokens = F.unfold(x, 3, stride=2, padding=1).transpose(1, 2)
    x = linear(tokens, "tokens_to_token.project")
    x = torch.cat([s["cls_token"].expand(len(x), -1, -1), x], 1) + s["pos_embed"]
    for i in range(2):
        at = f"blocks.{i}."
        heads = [
            z.unflatten(-1, (2, -1)).transpose(1, 2)
            for z in linear(norm(x, at + "norm1"), at + "attn.qkv").chunk(3, -1)
        ]
        mixed = softmax(*heads, heads[0].shape[-1] ** -0.5).transpose(1, 2).flatten(2)
        x = x + linear(mixed, at + "attn.proj")
        x = x + linear(F.gelu(linear(norm(x, at + "norm2"), at + "mlp.fc1")), at + "mlp.fc2")
    return linear(norm(x, "norm")[:, 0], "head")


@pytest.mark.parametrize("kind", ["performer", "transformer"])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_released_checkpoints_are_read_whole_and_give_the_same_logits(kind, prefix):
    state, images = released_state(kind), torch.randn(2, 3, 32, 32)
    model = tiny(tokens_type=kind)
    assert load_weights(model, {prefix + key: tensor for key, tensor in state.items()}) == "official"
    torch.testing.assert_close(
        model.double()(images.double()), released_forward(state, images, kind), rtol=1e-5, atol=1e-5
    )
    short = {key: tensor for key, tensor in state.items() if key != "norm.bias"}
    with pytest.raises(ValueError, match="norm.bias"):
        load_weights(model, short)


def test_the_fixed_positions_are_the_papers():
    table = sinusoids(5, 6)[0]
    for place in range(5):
        for i in range(6):
            angle = place / 10000 ** (2 * (i // 2) / 6)
            assert float(table[place, i]) == pytest.approx(math.cos(angle) if i % 2 else math.sin(angle), abs=1e-6)


# --- the model


def test_tables_have_no_gradient_and_are_in_the_state_dict():
    model = tiny()
    model(torch.randn(2, 3, 32, 32)).square().sum().backward()
    still = {name for name, p in model.named_parameters() if p.grad is None}
    assert still == {"pos_embed", "tokens_to_token.attention1.features.w", "tokens_to_token.attention2.features.w"}
    assert still <= set(model.state_dict())


@pytest.mark.parametrize("kind", ["performer", "transformer", "convolution", "patches"])
@pytest.mark.parametrize("size", [(32, 32), (33, 45)])
def test_every_kind_takes_other_sizes_and_gives_maps(kind, size):
    model = tiny(tokens_type=kind)
    images = torch.randn(2, 3, *size)
    maps = model.feature_maps(images)
    assert list(maps) == ([16] if kind == "patches" else [4, 8, 16])
    coarse = [size[0] // 16, size[1] // 16] if kind == "patches" else [math.ceil(side // 4 / 4) for side in size]
    assert list(maps[16].shape) == [2, 16, *coarse]
    if kind != "patches":
        assert list(maps[4].shape) == [2, 8, size[0] // 4, size[1] // 4]
    out = model(images)
    assert out.shape == (2, 5)
    torch.testing.assert_close(model(images[:1]), out[:1], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model(images.contiguous(memory_format=torch.channels_last)), out, rtol=1e-4, atol=1e-5)
    pooled = model.forward_head(model.forward_features(images), pre_logits=True)
    torch.testing.assert_close(model.head(pooled), out)
    assert model(images[:0]).shape == (0, 5)


def test_without_attention_and_soft_splits_the_tokens_are_plain_convolutions():
    images = torch.randn(2, 3, 32, 32)
    module = TokensToToken(3, 16, "convolution", token_dim=8)
    first, second, last = (
        (layer.weight.unflatten(1, (channels, k, k)), layer.bias)
        for layer, channels, k in ((module.soft_split0, 3, 7), (module.soft_split1, 8, 3), (module.project, 8, 3))
    )
    x = F.conv2d(images, *first, stride=4, padding=2)
    x = F.conv2d(F.conv2d(x, *second, stride=2, padding=1), *last, stride=2, padding=1)
    torch.testing.assert_close(list(module.maps(images))[-1], x)
    patches = TokensToToken(3, 16, "patches")
    torch.testing.assert_close(list(patches.maps(images))[0], patches.project(images))
    assert patches.project.stride == (16, 16)


def test_features_only_stops_where_nothing_more_is_asked_for():
    net = build("t2t_vit_7", features_only=True, out_indices=(0, 1), **{**TINY, "num_heads": 2})
    net.model.blocks = None  # never reached
    maps = net(torch.randn(1, 3, 32, 32))
    assert [list(each.shape) for each in maps] == [[1, 8, 8, 8], [1, 8, 4, 4]]
    assert (net.feature_info.channels(), net.feature_info.reduction()) == ([8, 8], [4, 8])


def test_bfloat16_is_near_float32():
    model, images = tiny(), torch.randn(4, 3, 32, 32)
    expected = model(images)
    half = copy.deepcopy(model).bfloat16()
    assert half.tokens_to_token.attention1.features.w.dtype == torch.float32
    assert (half(images.bfloat16()).float() - expected).abs().max() < 0.05 * expected.abs().max()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_models_are_made_under_another_default_dtype(dtype):
    torch.set_default_dtype(dtype)
    try:
        model = tiny()
    finally:
        torch.set_default_dtype(torch.float32)
    assert model.pos_embed.dtype == dtype
    assert model.tokens_to_token.attention1.features.w.dtype == torch.float32  # the directions are always that
    assert model(torch.randn(2, 3, 32, 32, dtype=dtype)).dtype == dtype


def test_dropout_and_drop_path_are_for_training_only():
    model, images = tiny(drop_path_rate=0.5), torch.randn(4, 3, 32, 32)
    assert torch.equal(model(images), model(images))
    model.train()
    assert not torch.equal(model(images), model(images))
    assert [block.drop_path.rate for block in model.blocks] == [0.0, 0.5]
    plain = TokenBlock(12, 8, "transformer", drop=0.5).train()
    tokens = torch.randn(1, 5, 12)
    assert torch.equal(plain(tokens), plain(tokens))


@pytest.mark.slow
def test_the_graph_can_be_exported():
    model, images = tiny(depth=1), torch.randn(1, 3, 32, 32)
    exported = torch.export.export(model, (images,)).module()
    torch.testing.assert_close(exported(images), model(images))


# --- in models of transformers


def vit():
    from transformers import ViTConfig, ViTModel

    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, image_size=32, patch_size=8,
        initializer_range=0.1,
    )  # fmt: skip
    return ViTModel(config, add_pooling_layer=False).eval()


def test_an_encoder_of_transformers_runs_on_random_features():
    model, images = vit(), torch.randn(2, 3, 32, 32)
    expected = model(images).last_hidden_state
    errors = []
    for features in (4, 2048):
        model.set_attn_implementation(register_random_features("assay_random_features_test", features=features))
        with torch.inference_mode():
            model(images)
        found = model(images).last_hidden_state  # trains with the directions that inference has drawn
        found.sum().backward()
        errors.append(float((found - expected).detach().norm() / expected.detach().norm()))
    assert 0 < errors[1] < 0.02
    assert errors[1] < errors[0]


def test_padded_batches_are_dense_and_causal_models_are_refused():
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    sizes = {
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "vocab_size": 97,
    }
    model, ids = BertModel(BertConfig(**sizes)).eval(), token_ids(2, 9)
    mask = torch.ones_like(ids)
    mask[0, 6:] = 0
    expected = model(ids, attention_mask=mask).last_hidden_state
    name = register_random_features("assay_random_features_test")
    model.set_attn_implementation(name)
    torch.testing.assert_close(model(ids, attention_mask=mask).last_hidden_state, expected)
    decoder = tiny_model()
    decoder.set_attn_implementation(name)
    with pytest.raises(ValueError, match="must be used in encoders"):
        decoder(token_ids(1, 9))
