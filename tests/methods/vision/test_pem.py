"""PEM: prototypes against a reference from the formula, deformable convolution by hand, published sizes, the other layout of weights."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from assay.measure.cost import count_cost
from assay.methods.vision.pem import (
    CONFIGS,
    ContextModulation,
    DeformableConv,
    LossSettings,
    MaskedCrossAttention,
    Pem,
    PixelDecoder,
    Predictions,
    PrototypeCrossAttention,
    ResNet,
    Stdc,
    build_pem,
    deformable_conv2d,
    from_official,
    match_queries,
    nearest_pixels,
    nearest_pixels_reference,
    panoptic,
    semantic,
    set_loss,
)
from assay.methods.vision.pem.network import sine_positions
from assay.methods.vision.swin import Swin

PARAMETERS = {"pem_resnet50": 35_532_581, "pem_stdc1": 16_957_829, "pem_stdc2": 20_988_293}
GIGA_MACS = {"pem_resnet50": 237, "pem_stdc1": 92, "pem_stdc2": 118}  # published, at 1024 x 2048


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def shaken(module, std=0.3):
    """Random weights and running statistics, in evaluation mode."""
    generator = torch.Generator().manual_seed(0)
    for value in module.parameters():
        nn.init.normal_(value, std=std, generator=generator)
    for name, value in module.named_buffers():
        if name.endswith("running_mean"):
            value.normal_(std=0.5, generator=generator)
        elif name.endswith("running_var"):
            value.uniform_(0.5, 2, generator=generator)
    return module.eval()


def layer(width=16, heads=4, **settings):
    return shaken(PrototypeCrossAttention(width, heads, **settings))


def tiny(**settings):
    sizes = {
        "num_classes": 5,
        "conv_dim": 16,
        "mask_dim": 24,
        "width": 16,
        "heads": 4,
        "hidden": 32,
        "queries": 7,
        "layers": 4,
    }
    return shaken(Pem(ResNet((1, 1, 1, 1), width=4), **{**sizes, **settings}), std=0.15)


# ------------------------------------------------------------------------------------------------------------ published sizes


def on_meta(name):
    with torch.device("meta"):
        return build_pem(name, num_classes=19).eval()


@pytest.mark.parametrize("name", CONFIGS)
def test_parameters_are_the_published_ones(name):
    assert sum(value.numel() for value in on_meta(name).parameters()) == PARAMETERS[name]


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGS)
def test_work_is_the_published_one(name):
    model, images = on_meta(name), torch.empty(1, 3, 1024, 2048, device="meta")
    found = count_cost(model, images, auxiliary=True).macs
    assert found / 1e9 == pytest.approx(GIGA_MACS[name], rel=0.005)
    assert found - count_cost(model, images).macs > 0.05 * found  # earlier masks are made at their own size


def test_earlier_masks_are_made_at_their_own_size():
    model, images = tiny(), randn(1, 3, 64, 96)
    saved = count_cost(model, images, auxiliary=True).macs - count_cost(model, images).macs
    pixels = 4 * 16 * 24 - (2 * 3 + 4 * 6 + 8 * 12 + 2 * 3)  # of four masks, and what is made of them
    assert saved == 7 * (24 * pixels + 4 * 16 * 6)  # seven queries, on 24 features; and their classes


def test_parameters_of_a_layer():
    def count(module):
        return sum(value.numel() for value in module.parameters())

    assert count(PrototypeCrossAttention()) == 267_008
    assert count(MaskedCrossAttention()) == 263_680


@pytest.mark.parametrize("make", [PrototypeCrossAttention, MaskedCrossAttention])
def test_work_of_a_layer_is_the_formula(make):
    module, queries, x = make(16, 4), randn(1, 5, 16), randn(1, 16, 6, 9)
    assert count_cost(module.eval(), queries, x).macs == make.macs(54, 5, 16)
    assert MaskedCrossAttention.macs(8192, 100, 256) == 1_506_279_424
    assert PrototypeCrossAttention.macs(8192, 100, 256) == 785_121_280


# ----------------------------------------------------------------------------------------------------------------- prototypes


def reference(module, queries, x, seen=None, position=0.0, query_position=0.0, axis=1):
    """PEM's cross-attention from its formula, in float64, one query and head at a time."""
    w = {key: value.double() for key, value in module.state_dict().items()}
    x, asked = x.double() + position, queries.double() + query_position
    x = (x - w["norm.running_mean"][:, None, None]) / (w["norm.running_var"][:, None, None] + 1e-5).sqrt()
    x = x * w["norm.weight"][:, None, None] + w["norm.bias"][:, None, None]
    x = F.conv2d(x, w["local.weight"], w["local.bias"], padding=1, groups=x.shape[1]).flatten(2).mT
    m = x @ w["memory_proj.weight"].T + w["memory_proj.bias"]
    m = m / m.norm(dim=-1, keepdim=True)
    t = F.layer_norm(asked, asked.shape[-1:], w["query_norm.weight"], w["query_norm.bias"])
    t = t @ w["query_proj.weight"].T + w["query_proj.bias"]
    t = t / t.norm(dim=-1, keepdim=True)
    p, where = torch.zeros_like(t), torch.zeros(len(t), module.heads, t.shape[1], dtype=torch.long)
    width = t.shape[-1] // module.heads
    for image in range(len(t)):
        for head in range(module.heads):
            part = slice(head * width, (head + 1) * width)
            for query in range(t.shape[1]):
                scores = m[image, :, part] @ t[image, query, part]
                if seen is not None and seen[image, query].any():
                    scores[~seen[image, query].flatten()] = -torch.inf
                where[image, head, query] = best = int(scores.argmax())
                p[image, query, part] = m[image, best, part]
    u = (p * t) @ w["mix.weight"].T + w["mix.bias"]
    u = u / u.norm(dim=axis, keepdim=True)
    out = (u * w["alpha"] + p) @ w["out.weight"].T + w["out.bias"]
    return queries.double() + out, where


@pytest.mark.parametrize(("axis", "dim"), [("queries", 1), ("channels", 2)])
@pytest.mark.parametrize("masked", [False, True])
def test_a_layer_is_its_formula(axis, dim, masked):
    module, queries, x = layer(norm_axis=axis), randn(2, 5, 16), randn(2, 16, 4, 7, seed=1)
    seen = randn(2, 5, 4, 7, seed=2) > 0.8 if masked else None
    if masked:
        seen[0, 3] = False  # an empty mask
    position, query_position = randn(1, 16, 4, 7, seed=3), randn(1, 5, 16, seed=4)
    found = module(queries, x, seen=seen, position=position, query_position=query_position)
    expected, _ = reference(module, queries, x, seen, position.double(), query_position.double(), dim)
    assert torch.allclose(found.double(), expected, atol=1e-5)


def test_an_empty_mask_as_released():
    queries, x, seen = randn(2, 3, 16), randn(2, 16, 4, 4, seed=1), torch.ones(2, 3, 4, 4, dtype=torch.bool)
    seen[0, 1] = False  # one query of an image, and all of the other's
    seen[1] = False
    ours, theirs = layer(), layer(variant="as_released")
    assert torch.equal(ours.looking(seen.flatten(2)), torch.ones(2, 3, 16, dtype=torch.bool))
    looking = theirs.looking(seen.flatten(2))
    assert not looking[0, 1].any()
    assert bool(looking[1].all())
    assert nearest_pixels(randn(2, 4, 3, 4), randn(2, 4, 16, 4), seen=looking)[0, :, 1].tolist() == [0, 0, 0, 0]
    a, b = ours(queries, x, seen=seen), theirs(queries, x, seen=seen)
    assert torch.equal(a[1], b[1])
    assert not torch.equal(a[0], b[0])


@pytest.mark.parametrize("chunk", [1, 3, 16, 40, 100, None])
@pytest.mark.parametrize("masked", [False, True])
def test_chunks_find_what_all_at_once_find_and_the_first_of_equal_ones(chunk, masked):
    queries, pixels = randn(2, 3, 5, 4).round(), randn(2, 3, 40, 4, seed=1).round()  # many are equal
    seen = None
    if masked:
        seen = randn(2, 5, 40, seed=2) > 0
        seen[1, 2], seen[0, 0] = False, False
        seen[0, 0, 39] = True
    expected = nearest_pixels_reference(queries, pixels, seen=seen)
    found = nearest_pixels(queries, pixels, seen=seen, chunk=chunk)
    assert torch.equal(found, expected)
    scores = queries @ pixels.mT
    if not masked:
        ties = (scores == scores.max(-1, keepdim=True).values).sum(-1)
        assert bool((ties > 1).any())
        assert torch.equal(found, (scores == scores.max(-1, keepdim=True).values).int().argmax(-1))


def test_similarities_are_taken_in_float32():
    pixels = torch.zeros(1, 1, 300, 2, dtype=torch.bfloat16)
    pixels[..., 0] = 1
    pixels[0, 0, 200, 1] = 2**-6  # 1 + 2^-12 after the product: lost in eight bits
    queries = torch.tensor([[[[1.0, 2**-6]]]], dtype=torch.bfloat16)
    assert nearest_pixels(queries, pixels, chunk=64).item() == 200
    with torch.autocast("cpu", torch.bfloat16):
        assert nearest_pixels(queries.float(), pixels.float(), chunk=64).item() == 200


def test_only_selected_pixels_matter():
    module, queries, x = layer(), randn(1, 3, 16), randn(1, 16, 16, 16, seed=1)
    expected, where = reference(module, queries, x)
    touched = torch.zeros(16, 16, dtype=torch.bool)
    for place in where.unique().tolist():
        row, column = divmod(place, 16)
        touched[max(row - 1, 0) : row + 2, max(column - 1, 0) : column + 2] = True
    changed = x.clone()
    changed[:, :, ~touched] += 0.002 * randn(1, 16, int((~touched).sum()), seed=5)
    same, after = reference(module, queries, changed)
    assert torch.equal(where, after)  # none became selected
    assert int((~touched).sum()) > 20
    assert torch.equal(module(queries, changed), module(queries, x))
    first = int(where[0, 0, 0])
    changed[0, :, first // 16, first % 16] += 1
    assert not torch.allclose(module(queries, changed), module(queries, x), atol=1e-3)


def test_order_of_pixels_and_of_queries():
    module, queries, x = layer(), randn(2, 5, 16), randn(2, 16, 4, 6, seed=1)
    with torch.no_grad():
        module.local.weight.zero_()
        module.local.weight[:, :, 1, 1] = 1
    pixels, order = torch.randperm(24), torch.randperm(5)
    mixed = x.flatten(2)[..., pixels].view(x.shape)
    assert torch.allclose(module(queries, mixed), module(queries, x), atol=1e-6)
    assert torch.allclose(module(queries[:, order], x), module(queries, x)[:, order], atol=1e-6)


def test_a_map_of_one_pixel_is_the_prototype_of_all():
    module, x = layer(), randn(1, 16, 1, 1, seed=1)
    pixel = F.normalize(module.memory_proj(module.local(module.norm(x)).flatten(2).mT), dim=-1)
    found = module.prototypes(randn(1, 5, 16, seed=2), pixel, None)
    assert torch.equal(found, pixel.expand(1, 5, 16))


def test_queries_of_an_image_depend_on_one_another_only_by_the_published_norm():
    queries, x = randn(1, 5, 16), randn(1, 16, 4, 6, seed=1)
    other = queries.clone()
    other[0, 4] = randn(16, seed=9)
    for axis, same in (("queries", False), ("channels", True)):
        module = layer(norm_axis=axis)
        assert torch.allclose(module(queries, x)[0, :4], module(other, x)[0, :4], atol=1e-6) == same


def test_gradients_reach_pixels_and_queries_but_not_the_choice():
    module, queries, x = layer().train(), randn(2, 5, 16).requires_grad_(), randn(2, 16, 4, 6, seed=1).requires_grad_()
    module(queries, x).square().mean().backward()
    assert all(value.grad is not None and bool(value.grad.any()) for value in module.parameters())
    assert bool(queries.grad.any())
    assert bool(x.grad.any())
    assert not nearest_pixels(queries[:, None], x.flatten(2).mT[:, None]).requires_grad


def test_masked_attention_is_torchs():
    module, queries, x = shaken(MaskedCrossAttention(16, 4)), randn(2, 5, 16), randn(2, 16, 4, 6, seed=1)
    theirs = nn.MultiheadAttention(16, 4, batch_first=True)
    theirs.in_proj_weight.data = torch.cat([module.q.weight, module.k.weight, module.v.weight]).detach()
    theirs.in_proj_bias.data = torch.cat([module.q.bias, module.k.bias, module.v.bias]).detach()
    theirs.out_proj.load_state_dict(module.out.state_dict())
    seen = randn(2, 5, 4, 6, seed=2) > 0
    seen[0, 1] = False
    position, query_position = randn(1, 16, 4, 6, seed=3), randn(1, 5, 16, seed=4)
    hidden = ~(seen.flatten(2) | ~seen.flatten(2).any(-1, keepdim=True)).repeat_interleave(4, 0)
    pixels = x.flatten(2).mT
    asked = module.query_norm(queries) + query_position
    expected = queries + theirs(asked, pixels + position.flatten(2).mT, pixels, attn_mask=hidden)[0]
    found = module(queries, x, seen=seen, position=position, query_position=query_position)
    assert torch.allclose(found, expected, atol=1e-5)


# --------------------------------------------------------------------------------------------------------------- pixel decoder


def by_hand(x, offsets, modulation, weight):
    """A deformable convolution from its definition, pixel by pixel."""
    _, channels, height, width = x.shape
    out = torch.zeros(len(x), len(weight), height, width, dtype=x.dtype)

    def value(image, row, column):
        found = torch.zeros(channels, dtype=x.dtype)
        for y in (int(row // 1), int(row // 1) + 1):
            for z in (int(column // 1), int(column // 1) + 1):
                if 0 <= y < height and 0 <= z < width:
                    found += x[image, :, y, z] * (1 - abs(row - y)) * (1 - abs(column - z))
        return found

    for image in range(len(x)):
        for y in range(height):
            for z in range(width):
                for tap in range(9):
                    row = float(y + tap // 3 - 1 + offsets[image, 2 * tap, y, z])
                    column = float(z + tap % 3 - 1 + offsets[image, 2 * tap + 1, y, z])
                    seen = modulation[image, tap, y, z] * value(image, row, column)
                    out[image, :, y, z] += weight[:, :, tap // 3, tap % 3] @ seen
    return out


def test_deformable_convolution_is_its_definition():
    x, offsets, modulation = (
        randn(2, 3, 4, 5).double(),
        2 * randn(2, 18, 4, 5, seed=1).double(),
        randn(2, 9, 4, 5, seed=2).double(),
    )
    weight = randn(6, 3, 3, 3, seed=3).double()
    assert torch.allclose(deformable_conv2d(x, offsets, modulation, weight), by_hand(x, offsets, modulation, weight))


def test_a_new_deformable_convolution_is_half_an_ordinary_one():
    module, x = DeformableConv(4, 6), randn(2, 4, 7, 5)
    assert torch.allclose(module(x), 0.5 * F.conv2d(x, module.weight, padding=1), atol=1e-5)
    ones = torch.ones(2, 9, 7, 5)
    offsets = torch.zeros(2, 18, 7, 5)
    offsets[:, 1::2] = 1  # every tap one column further right
    moved = F.conv2d(F.pad(x, (0, 1)), module.weight, padding=1)[..., 1:]
    found = deformable_conv2d(x, offsets, ones, module.weight)
    assert torch.allclose(found[..., 1:], moved[..., 1:], atol=1e-5)


def test_places_stay_exact_in_half_precision():
    x = torch.zeros(1, 1, 1, 1030)
    x[..., 1025] = 1
    weight = torch.zeros(1, 1, 3, 3)
    weight[0, 0, 1, 1] = 1
    for dtype in (torch.float32, torch.bfloat16):
        found = deformable_conv2d(
            x.to(dtype),
            torch.zeros(1, 18, 1, 1030, dtype=dtype),
            torch.ones(1, 9, 1, 1030, dtype=dtype),
            weight.to(dtype),
        )
        assert torch.allclose(found.float(), x, atol=1e-2)


def test_the_gate_of_the_context_ends_in_two_sigmoids():
    x = 30 * randn(4, 8, 3, 5)
    module = shaken(ContextModulation(8), std=3.0)
    gate = module.gate(x)
    assert 0.5 <= gate.min().item() < 0.51
    assert 0.72 < gate.max().item() <= 0.7311
    assert torch.equal(module(x), x + x * gate)
    once = ContextModulation(8, sigmoids=1)
    once.load_state_dict(module.state_dict())
    assert torch.allclose(once.eval().gate(x).sigmoid(), gate)
    assert torch.allclose(module.gate(x), module.gate(x.mean((2, 3), keepdim=True)), atol=1e-6)  # of the mean alone


def test_the_pyramid_goes_from_coarse_to_fine():
    decoder = shaken(PixelDecoder((4, 6, 8, 10), width=12, mask_dim=20))
    maps = [randn(2, c, 33 // 2**i + (33 % 2**i > 0), 48 // 2**i, seed=i) for i, c in enumerate((4, 6, 8, 10))]
    features, found = decoder(maps)
    assert features.shape == (2, 20, 33, 48)
    assert [tuple(each.shape) for each in found] == [(2, 12, 5, 6), (2, 12, 9, 12), (2, 12, 17, 24)]
    changed = [maps[0] + 1, *maps[1:]]
    assert all(torch.equal(a, b) for a, b in zip(decoder(changed)[1], found, strict=True))
    changed = [*maps[:3], maps[3] + 1]
    assert not any(torch.allclose(a, b) for a, b in zip(decoder(changed)[1], found, strict=True))


def test_bilinear_weights_of_the_transposed_convolution():
    up = PixelDecoder((4, 4, 4, 4), width=8, mask_dim=8).steps[0].up
    line = torch.tensor([0.25, 0.75, 0.75, 0.25])
    assert torch.allclose(up.weight[:, 0], (line[:, None] * line).expand(8, 4, 4))


# ----------------------------------------------------------------------------------------------------------------- the network


def test_masks_made_small_are_the_same_as_masks_resized():
    model, x = tiny(), randn(2, 3, 64, 96)
    with torch.no_grad():
        fast, whole = model(x), model(x, auxiliary=True)
    assert fast.auxiliary == []
    assert len(whole.auxiliary) == 4
    assert torch.allclose(fast.class_logits, whole.class_logits, atol=1e-5)
    assert torch.allclose(fast.mask_logits, whole.mask_logits, atol=1e-4)
    assert fast.class_logits.shape == (2, 7, 6)
    assert fast.mask_logits.shape == (2, 7, 16, 24)


@pytest.mark.parametrize("size", [(64, 96), (33, 50), (47, 32)])
def test_any_size_of_image_alone_or_in_a_batch(size):
    model, x = tiny(), randn(2, 3, *size)
    with torch.no_grad():
        both, alone = model(x), model(x[1:])
        ordered = model(x.contiguous(memory_format=torch.channels_last))
    assert both.mask_logits.shape[2:] == (-(-size[0] // 4), -(-size[1] // 4))
    assert torch.allclose(both.mask_logits[1:], alone.mask_logits, atol=1e-4)
    assert torch.allclose(both.mask_logits, ordered.mask_logits, atol=1e-4)


def test_half_precision_and_gradients():
    model, x = tiny(), randn(2, 3, 64, 64)
    with torch.no_grad():
        half = copy.deepcopy(model).bfloat16()(x.bfloat16())
    assert half.mask_logits.dtype == torch.bfloat16
    assert bool(half.mask_logits.isfinite().all())
    model.train()
    found = model(x)
    assert len(found.auxiliary) == 4
    settings = LossSettings(points=32)
    set_loss(
        found,
        [torch.tensor([1, 2]), torch.tensor([0])],
        [randn(2, 64, 64) > 0, randn(1, 64, 64) > 0],
        settings=settings,
    ).backward()
    assert all(value.grad is not None and bool(value.grad.any()) for value in model.parameters())


@pytest.mark.slow
def test_export():
    model, x = tiny(layers=1), randn(1, 3, 64, 64)

    class Logits(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, x):
            found = self.model(x)
            return found.class_logits, found.mask_logits

    exported = torch.export.export(Logits().eval(), (x,)).module()
    with torch.no_grad():
        classes, masks = exported(x)
        found = model(x)
    assert torch.allclose(classes, found.class_logits, atol=1e-5)
    assert torch.allclose(masks, found.mask_logits, atol=1e-4)


def test_registered_backbones_serve_too():
    swin = Swin(num_classes=0, embed_dim=8, depths=(1, 1, 1, 1), num_heads=(1, 1, 1, 1))
    model = Pem(swin, num_classes=3, conv_dim=8, mask_dim=8, width=8, heads=2, hidden=8, queries=4, layers=3).eval()
    assert model(randn(1, 3, 64, 64)).mask_logits.shape == (1, 4, 16, 16)


def test_masked_attention_in_the_same_network():
    model = tiny(cross=MaskedCrossAttention)
    assert model(randn(1, 3, 64, 64)).class_logits.shape == (1, 7, 6)


def test_positions_are_transformers():
    from transformers.models.mask2former.modeling_mask2former import Mask2FormerSinePositionEmbedding

    x = torch.zeros(1, 32, 5, 9)
    theirs = Mask2FormerSinePositionEmbedding(16, normalize=True)(x.shape, x.device, x.dtype)
    assert torch.allclose(sine_positions(5, 9, 32, like=x), theirs, atol=1e-5)


def test_resnet_is_transformers():
    from transformers import ResNetBackbone, ResNetConfig

    config = ResNetConfig(
        embedding_size=8, hidden_sizes=[32, 64, 128, 256], depths=[1, 2, 1, 1], layer_type="bottleneck",
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )  # fmt: skip
    theirs, ours = shaken(ResNetBackbone(config), std=0.1), ResNet((1, 2, 1, 1), width=8).eval()
    ours.load_state_dict(dict(zip(ours.state_dict(), ordered_as_ours(theirs), strict=True)))
    x = randn(2, 3, 64, 80)
    with torch.no_grad():
        for found, expected in zip(ours(x), theirs(x).feature_maps, strict=True):
            assert torch.allclose(found, expected, atol=1e-4, rtol=1e-4)


def ordered_as_ours(theirs):
    """Tensors of transformers' ResNet in the order of ours: there the shortcut of a block comes first."""
    parts = {"embedder": [], "stages": {}}
    for key, value in theirs.state_dict().items():
        if "embedder" in key:
            parts["embedder"].append(value)
            continue
        _, _, stage, _, block, kind, *_ = key.split(".")
        parts["stages"].setdefault((int(stage), int(block)), {"layer": [], "shortcut": []})[kind].append(value)
    found = list(parts["embedder"])
    for _, each in sorted(parts["stages"].items()):
        found += each["layer"] + each["shortcut"]
    return found


# ---------------------------------------------------------------------------------------------------------- the released layout


class Released:
    """Keys and shapes as the released code has them, random values."""

    def __init__(self):
        self.state = {}
        self.generator = torch.Generator().manual_seed(0)

    def put(self, key, *shape):
        self.state[key] = torch.rand(shape, generator=self.generator) + 0.1

    def linear(self, key, out, given):
        self.put(f"{key}.weight", out, given)
        self.put(f"{key}.bias", out)

    def norm(self, key, width, batch=False):
        self.put(f"{key}.weight", width)
        self.put(f"{key}.bias", width)
        if batch:
            self.put(f"{key}.running_mean", width)
            self.put(f"{key}.running_var", width)
            self.state[f"{key}.num_batches_tracked"] = torch.tensor(3)

    def conv_bn(self, key, out, given, kernel, bn=".bn", conv=".conv", groups=1):
        self.put(f"{key}{conv}.weight", out, given // groups, kernel, kernel)
        self.norm(f"{key}{bn}", out, batch=True)


def released(backbone, channels, d=16, conv=16, mask=24, hidden=32, queries=7, classes=5, layers=4):
    r = Released()
    if backbone == "resnet":
        r.conv_bn("backbone.stem.conv1", 4, 3, 7, bn=".norm", conv="")
        given = 4
        for stage, out in enumerate(channels):
            key = f"backbone.res{stage + 2}.0"
            r.conv_bn(f"{key}.shortcut", out, given, 1, bn=".norm", conv="")
            for place, (a, b, kernel) in enumerate([(given, out // 4, 1), (out // 4, out // 4, 3), (out // 4, out, 1)]):
                r.conv_bn(f"{key}.conv{place + 1}", b, a, kernel, bn=".norm", conv="")
            given = out
    else:
        r.conv_bn("backbone.features.0", 4, 3, 3)
        r.conv_bn("backbone.features.1", 8, 4, 3)
        place, given = 2, 8
        for out in (32, 64, 128):
            for first in (True, False):
                key = f"backbone.features.{place}"
                widths = (given if first else out, out // 2, out // 4, out // 8, out // 8)
                for i in range(4):
                    r.conv_bn(f"{key}.conv_list.{i}", widths[i + 1], widths[i], 1 if i == 0 else 3)
                if first:
                    r.put(f"{key}.avd_layer.0.weight", out // 2, 1, 3, 3)
                    r.norm(f"{key}.avd_layer.1", out // 2, batch=True)
                place += 1
            given = out
        r.state["backbone.x2.0.conv.weight"] = r.state["backbone.features.0.conv.weight"]
        r.state["backbone.x32.1.conv_list.0.conv.weight"] = r.state["backbone.features.7.conv_list.0.conv.weight"]
    p = "sem_seg_head.pixel_decoder"
    for i, c in enumerate(channels):
        r.conv_bn(f"{p}.in_projections.{i}", conv, c, 1)
    r.conv_bn(f"{p}.conv_avg", conv, channels[-1], 1)
    for i in range(4):
        r.put(f"{p}.csm.{i}.mlp.0.mlp.0.weight", conv // 2, conv, 1, 1)
        r.norm(f"{p}.csm.{i}.mlp.0.mlp.1", conv // 2, batch=True)
        r.put(f"{p}.csm.{i}.mlp.0.mlp.3.weight", conv, conv // 2, 1, 1)
    for i in range(3):
        r.put(f"{p}.dcn.{i}.dcn_offset.weight", 27, conv, 3, 3)
        r.put(f"{p}.dcn.{i}.dcn_offset.bias", 27)
        r.put(f"{p}.dcn.{i}.dcn.weight", conv, conv, 3, 3)
        r.norm(f"{p}.dcn.{i}.dcn_bn", conv, batch=True)
        r.put(f"{p}.dcn.{i}.up_sample.weight", conv, conv, 4, 4)
        r.norm(f"{p}.dcn.{i}.up_bn", conv, batch=True)
    r.conv_bn(f"{p}.out", mask, conv, 1)
    p = "sem_seg_head.predictor"
    for i in range(layers):
        key = f"{p}.transformer_self_attention_layers.{i}"
        r.put(f"{key}.self_attn.in_proj_weight", 3 * d, d)
        r.put(f"{key}.self_attn.in_proj_bias", 3 * d)
        r.linear(f"{key}.self_attn.out_proj", d, d)
        r.norm(f"{key}.norm", d)
        key = f"{p}.transformer_cross_attention_layers.{i}"
        r.put(f"{key}.alpha", 1, 1, d)
        r.put(f"{key}.feature_proj.to_query_3x3.weight", d, 1, 3, 3)
        r.put(f"{key}.feature_proj.to_query_3x3.bias", d)
        r.norm(f"{key}.feature_proj.bn", d, batch=True)
        r.linear(f"{key}.feature_proj.out", d, d)
        r.norm(f"{key}.query_proj.0", d)
        r.linear(f"{key}.query_proj.1", d, d)
        r.linear(f"{key}.proj", d, d)
        r.linear(f"{key}.final", d, d)
        key = f"{p}.transformer_ffn_layers.{i}"
        r.linear(f"{key}.linear1", hidden, d)
        r.linear(f"{key}.linear2", d, hidden)
        r.norm(f"{key}.norm", d)
    r.norm(f"{p}.decoder_norm", d)
    r.put(f"{p}.query_feat.weight", queries, d)
    r.put(f"{p}.query_embed.weight", queries, d)
    r.put(f"{p}.level_embed.weight", 3, d)
    for i in range(3):
        r.put(f"{p}.input_proj.{i}.weight", d, conv, 1, 1)
        r.put(f"{p}.input_proj.{i}.bias", d)
    r.linear(f"{p}.class_embed", classes + 1, d)
    for i, (out, given) in enumerate([(d, d), (d, d), (mask, d)]):
        r.linear(f"{p}.mask_embed.layers.{i}", out, given)
    r.put("criterion.empty_weight", classes + 1)
    return r.state


@pytest.mark.parametrize("backbone", ["resnet", "stdc"])
def test_weights_in_the_released_layout(backbone):
    body = ResNet((1, 1, 1, 1), width=4) if backbone == "resnet" else Stdc((2, 2, 2), width=8)
    model = Pem(body, num_classes=5, conv_dim=16, mask_dim=24, width=16, heads=4, hidden=32, queries=7, layers=4)
    state = released(backbone, body.channels)
    ours = from_official(state)
    model.load_state_dict(ours)  # every key and every shape
    predictor, steps = "sem_seg_head.predictor.transformer_cross_attention_layers.1", "sem_seg_head.pixel_decoder.dcn.2"
    assert torch.equal(model.decoder.layers[1].cross.out.weight, state[f"{predictor}.final.weight"])
    assert torch.equal(model.decoder.layers[1].cross.mix.weight, state[f"{predictor}.proj.weight"])
    assert torch.equal(model.decoder.layers[1].cross.query_proj.weight, state[f"{predictor}.query_proj.1.weight"])
    assert torch.equal(model.pixel_decoder.steps[2].conv.weight, state[f"{steps}.dcn.weight"])
    assert torch.equal(model.pixel_decoder.steps[2].norm.weight, state[f"{steps}.dcn_bn.weight"])
    for level in range(4):  # the released ones are called from the coarsest map on, and the projections from the finest
        theirs = state[f"sem_seg_head.pixel_decoder.csm.{3 - level}.mlp.0.mlp.3.weight"]
        assert torch.equal(model.pixel_decoder.modulations[level].expand.weight, theirs)
        theirs = state[f"sem_seg_head.pixel_decoder.in_projections.{level}.conv.weight"]
        assert torch.equal(model.pixel_decoder.projections[level].conv.weight, theirs)
    assert torch.equal(model.decoder.mask_head[4].weight, state["sem_seg_head.predictor.mask_embed.layers.2.weight"])
    if backbone == "stdc":
        last = state["backbone.features.7.conv_list.3.bn.running_mean"]
        assert torch.equal(model.backbone.stages[3][1].convs[3].norm.running_mean, last)
        down = state["backbone.features.4.avd_layer.0.weight"]
        assert torch.equal(model.backbone.stages[2][0].down.conv.weight, down)
    else:
        assert torch.equal(model.backbone.stages[3][0].conv2.conv.weight, state["backbone.res5.0.conv2.weight"])


def test_weights_of_another_backbone_are_refused():
    with pytest.raises(
        ValueError, match=r"backbone must be a ResNet of detectron2 or STDC, got 'backbone\.patch_embed"
    ):
        from_official({"backbone.patch_embed.weight": torch.zeros(1)})


# ------------------------------------------------------------------------------------------------------------- maps and losses


def test_semantic_maps():
    found = Predictions(randn(2, 4, 6), 3 * randn(2, 4, 5, 7, seed=1))
    expected = torch.zeros(2, 5, 5, 7)
    for image in range(2):
        for query in range(4):
            chance = found.class_logits[image, query].softmax(0)
            for label in range(5):
                expected[image, label] += chance[label] * found.mask_logits[image, query].sigmoid()
    assert torch.allclose(semantic(found), expected, atol=1e-5)
    assert semantic(found, (10, 14)).shape == (2, 5, 10, 14)


def test_panoptic_maps():
    classes = torch.full((1, 6, 4), -9.0)
    for query, label in enumerate([0, 0, 1, 1, 3, 0]):
        classes[0, query, label] = 9.0
    classes[0, 5, 0] = -8.0  # its class is uncertain
    masks = torch.full((1, 6, 2, 6), -9.0)
    masks[0, 0, :, :2] = 5  # two things,
    masks[0, 1, :, 2] = 5
    masks[0, 2, 0, 3:5] = 5  # two queries of one stuff,
    masks[0, 3, 1, 3:5] = 5
    masks[0, 4, :, 5] = 9  # no object,
    masks[0, 5, :, 5] = 9  # and nothing certain
    found = panoptic(Predictions(classes, masks), things=[0])
    assert found[0, :, :, 0].tolist() == [[0, 0, 0, 1, 1, -1]] * 2
    assert found[0, :, :, 1].tolist() == [[1, 1, 2, 3, 3, 0]] * 2
    masks[0, 0, :, :4] = 4  # most of what it covers is won by others: 4 of 8 pixels are its own
    assert panoptic(Predictions(classes, masks), things=[0])[0, 0, 0].tolist() == [-1, 0]
    assert panoptic(Predictions(classes, masks), things=[0], overlap=0.5)[0, 0, 0].tolist() == [0, 1]
    assert panoptic(Predictions(classes, masks), things=[0], threshold=1.0).unique().tolist() == [-1, 0]


def test_the_loss_is_transformers():
    from transformers import Mask2FormerConfig
    from transformers.models.mask2former.modeling_mask2former import Mask2FormerLoss

    config = Mask2FormerConfig(num_labels=5, train_num_points=40)
    theirs = Mask2FormerLoss(config, {})
    found = Predictions(
        randn(2, 7, 6), randn(2, 7, 8, 8, seed=1), [Predictions(randn(2, 7, 6, seed=2), randn(2, 7, 8, 8, seed=3))]
    )
    labels = [torch.tensor([1, 4, 2]), torch.tensor([0])]
    masks = [randn(3, 32, 32, seed=4) > 0, randn(1, 32, 32, seed=5) > 0]
    torch.manual_seed(0)
    parts = theirs(
        found.mask_logits, found.class_logits, [mask.float() for mask in masks], labels,
        [{"masks_queries_logits": each.mask_logits, "class_queries_logits": each.class_logits} for each in found.auxiliary],
    )  # fmt: skip
    weights = {"loss_cross_entropy": 2.0, "loss_mask": 5.0, "loss_dice": 5.0}
    expected = sum(
        value * next(w for name, w in weights.items() if key.startswith(name)) for key, value in parts.items()
    )
    torch.manual_seed(0)
    assert torch.allclose(set_loss(found, labels, masks, settings=LossSettings(points=40)), expected, rtol=1e-4)


def test_objects_get_the_queries_that_are_theirs():
    masks = torch.zeros(3, 16, 16, dtype=torch.bool)
    for place in range(3):
        masks[place, :, 5 * place : 5 * place + 5] = True
    logits = torch.full((1, 5, 16, 16), -6.0)
    for query, place in ((4, 0), (0, 1), (2, 2)):
        logits[0, query][masks[place]] = 6.0
    classes = torch.zeros(1, 5, 4)
    ((queries, objects),) = match_queries(
        Predictions(classes, logits), [torch.tensor([0, 1, 2])], [masks.float()], settings=LossSettings(points=200)
    )
    assert dict(zip(objects.tolist(), queries.tolist(), strict=True)) == {0: 4, 1: 0, 2: 2}


def test_an_image_without_objects_and_more_objects_than_queries():
    found = Predictions(randn(2, 2, 4).requires_grad_(), randn(2, 2, 8, 8).requires_grad_())
    none = [torch.zeros(0, dtype=torch.long)] * 2
    loss = set_loss(found, none, [torch.zeros(0, 8, 8)] * 2, settings=LossSettings(points=16))
    loss.backward()
    assert torch.allclose(loss.detach(), 2 * F.cross_entropy(found.class_logits.flatten(0, 1), torch.full((4,), 3)))
    many = [torch.tensor([0, 1, 2]), none[0]]
    assert bool(
        set_loss(found, many, [torch.ones(3, 8, 8), torch.zeros(0, 8, 8)], settings=LossSettings(points=16)).isfinite()
    )


# ------------------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: PrototypeCrossAttention(10, 4), "width must be divisible by heads=4, got 10"),
        (lambda: PrototypeCrossAttention(8, 2, norm_axis="rows"), "norm_axis must be one of 'queries', 'channels', got 'rows'"),
        (lambda: PrototypeCrossAttention(8, 2, variant="mine"), "variant must be one of 'paper', 'as_released'"),
        (lambda: layer()(randn(1, 5, 16), randn(1, 8, 4, 4)), r"x must have shape \(1, 16, height, width\)"),
        (lambda: layer()(randn(1, 5, 16), randn(1, 16, 4, 4), seen=torch.ones(1, 5, 3, 4, dtype=torch.bool)), "seen must have shape"),
        (lambda: nearest_pixels(randn(1, 1, 2, 4), randn(1, 1, 3, 4), chunk=0), "chunk must be a whole number at least 1, got 0"),
        (lambda: ContextModulation(8, sigmoids=3), "sigmoids must be one of 1, 2, got 3"),
        (lambda: PixelDecoder((4, 4)), r"channels must be those of four maps, got \(4, 4\)"),
        (
            lambda: PixelDecoder((4,) * 4, width=8)([randn(2, 4, 20, 20), *[randn(2, 4, 5, 5)] * 3]),
            "maps must each be at least half as large as the next finer one",
        ),
        (lambda: tiny(width=18, heads=2), "width must be divisible by 4, for positions of sines, got 18"),
        (lambda: tiny(layers=0), "layers must be a whole number at least 1, got 0"),
        (lambda: build_pem("pem_r18", num_classes=2), "name must be one of 'pem_resnet50', 'pem_stdc1', 'pem_stdc2', got 'pem_r18'"),
        (lambda: tiny()(randn(1, 1, 32, 32)), r"images must have shape \(batch, 3, height, width\)"),
        (lambda: ResNet((1, 1)), r"depths must have one entry for each of four stages, got \(1, 1\)"),
        (lambda: Stdc((1,) * 4), "depths must have one entry for each of three stages"),
        (lambda: panoptic(Predictions(randn(1, 2, 3), randn(1, 2, 4, 4)), [0], threshold=2), "threshold must be a finite number"),
        (lambda: set_loss(Predictions(randn(1, 2, 3), randn(1, 2, 4, 4)), [], []), "labels and masks must have one entry"),
        (
            lambda: set_loss(Predictions(randn(1, 2, 3), randn(1, 2, 4, 4)), [torch.tensor([0])], [torch.ones(2, 4, 4)]),
            r"masks must have shape \(1, height, width\), got \(2, 4, 4\)",
        ),
    ],
)  # fmt: skip
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_backbone_of_other_strides_is_refused():
    body = ResNet((1, 1, 1, 1), width=4)
    body.strides = (4, 8, 16, 16)
    with pytest.raises(ValueError, match=r"backbone must have maps of four strides.*got \(4, 8, 16, 16\)"):
        Pem(body, num_classes=2)
