"""The thesis' networks and operators: counts in closed form, shifts that are depthwise convolutions, few bits, LiDAR."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from assay.measure.cost import count_cost
from assay.methods.compression import efficient_dnns as room
from assay.methods.compression.efficient_dnns import nets, squeezeseg
from assay.methods.compression.efficient_dnns.codesign import mixer
from assay.methods.compression.efficient_dnns.shift import _padded
from assay.methods.compression.efficient_dnns.squeezenext import DEPTHS
from assay.methods.core import kernels


def weights_of(model: nn.Module, *kinds: type[nn.Module]) -> int:
    """Parameters of convolutions (or of other kinds of layers) alone."""
    layers = [m for m in model.modules() if isinstance(m, kinds or (nn.Conv2d,))]
    return sum(p.numel() for layer in layers for p in layer.parameters())


def counted(model: nn.Module, *inputs: torch.Tensor) -> int:
    found = count_cost(model.eval(), *inputs)
    assert not found.uncounted
    return found.macs


# ---------------------------------------------------------------------------------------------------------------------- shift


def test_channels_are_dealt_evenly_and_the_rest_stays():
    groups = room.deal(29)
    assert [last - first for first, last, _, _ in groups] == [3, 3, 3, 3, 5, 3, 3, 3, 3]
    assert [(down, right) for *_, down, right in groups] == [(d, r) for d in (-1, 0, 1) for r in (-1, 0, 1)]
    assert [first for first, *_ in groups] == [0, *[last for _, last, *_ in groups][:-1]]
    assert room.deal(8) == ((0, 8, 0, 0),)
    assert len(room.deal(50, 5)) == 25


@pytest.mark.parametrize("size", [(6, 5), (1, 1), (1, 7), (2, 2)])
@pytest.mark.parametrize(("channels", "kernel"), [(29, 3), (50, 5), (4, 3)])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_shift_is_a_depthwise_convolution_with_one_hot_kernels(size, channels, kernel, layout):
    x = torch.randn(2, channels, *size).to(memory_format=layout)
    groups = room.deal(channels, kernel)
    expected = room.shift_reference(x, groups, kernel)
    out = room.shift(x, groups)
    assert torch.equal(out, expected)
    assert torch.equal(room.Shift2d(channels, kernel)(x), expected)
    if min(size) > 1:
        assert out.is_contiguous(memory_format=layout)


def test_the_centre_stays_and_energy_never_grows():
    x = torch.randn(3, 20, 5, 4)
    out = room.Shift2d(20)(x)
    first, last, *_ = next(group for group in room.deal(20) if group[2:] == (0, 0))
    assert torch.equal(out[:, first:last], x[:, first:last])
    assert not torch.equal(out, x)
    energy = [maps.square().sum((2, 3)) for maps in (out, x)]
    assert bool((energy[0] <= energy[1] + 1e-5).all())
    assert float(energy[0].sum()) < float(energy[1].sum())


def test_the_gradient_moves_back():
    x, grad = torch.randn(2, 18, 4, 5, requires_grad=True), torch.randn(2, 18, 4, 5)
    groups = room.deal(18)
    room.shift(x, groups).backward(grad)
    back = [(first, last, -down, -right) for first, last, down, right in groups]
    assert torch.equal(x.grad, room.shift(grad, back))
    small = torch.randn(1, 9, 2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda y: room.shift(y, room.deal(9)), small)
    assert torch.autograd.gradgradcheck(lambda y: room.shift(y, room.deal(9)) ** 2, small)


@pytest.mark.slow  # loading the compiler takes seconds
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_compiled_shift_is_the_same(dtype):
    layer = room.Shift2d(22)
    x = torch.randn(2, 22, 5, 1, dtype=dtype, requires_grad=True)
    out = torch.compile(layer, backend="aot_eager")(x)
    assert torch.equal(out, layer(x))
    grad = torch.randn_like(out)
    (compiled,) = torch.autograd.grad(out, x, grad)
    (eager,) = torch.autograd.grad(layer(x), x, grad)
    assert torch.equal(compiled, eager)


def test_a_shift_has_no_parameters_and_no_macs():
    layer = room.Shift2d(9)
    assert not list(layer.parameters())
    assert counted(layer, torch.randn(1, 9, 4, 4)) == 0
    before = kernels.paths().get("shift: slices", 0)
    layer(torch.randn(1, 9, 4, 4))
    assert kernels.paths()["shift: slices"] == before + 1


def test_bad_shifts_are_named():
    with pytest.raises(ValueError, match="kernel must be odd"):
        room.deal(9, 2)
    with pytest.raises(ValueError, match="x must have shape"):
        room.Shift2d(9)(torch.zeros(1, 8, 2, 2))
    with pytest.raises(TypeError, match="x must hold floating-point"):
        room.Shift2d(9)(torch.zeros(1, 9, 2, 2, dtype=torch.int64))


# ------------------------------------------------------------------------------------------------------------- counts of builders


@pytest.mark.parametrize(("inputs", "outputs", "stride", "expansion"), [(16, 16, 1, 9), (8, 32, 2, 3), (8, 16, 1, 1)])
def test_a_csc_block_has_the_parameters_of_its_formula(inputs, outputs, stride, expansion):
    block = room.CSC(inputs, outputs, stride, expansion=expansion)
    shortcut = 0 if (inputs, stride) == (outputs, 1) else inputs * outputs
    assert weights_of(block) == expansion * outputs * (inputs + outputs) + shortcut
    x = torch.randn(1, inputs, 8, 8)
    pixels = (8 // stride) ** 2
    assert counted(block, x) == expansion * outputs * (64 * inputs + pixels * outputs) + pixels * shortcut


def test_released_blocks_add_the_shortcut_before_the_last_relu():
    x = torch.randn(2, 8, 4, 4)
    paper = room.CSC(8, 8, expansion=2).eval()
    released = room.CSC(8, 8, expansion=2, variant="as_released").eval()
    released.load_state_dict(paper.state_dict())
    inner = paper.project(paper.shift(paper.expand(x)))
    assert torch.equal(paper(x), inner.relu() + x)
    assert torch.equal(released(x), (inner + x).relu())
    with pytest.raises(ValueError, match="variant must be one of"):
        room.CSC(8, 8, variant="released")


def residual_macs(block, side=32):
    """Of a residual network for 32-pixel images without its classifier; `block(inputs, outputs, pixels before, pixels after)`."""
    total, width = 27 * 16 * side**2, 16
    for stage, outputs in enumerate((16, 32, 64)):
        for i in range(3):
            before, after = (side // 2 ** max(stage - (not i), 0)) ** 2, (side // 2**stage) ** 2
            total += block(width, outputs, before, after)
            total += width * outputs * after if width != outputs else 0
            width = outputs
    return total


def test_residual_networks_have_the_macs_of_their_formulas():
    x = torch.randn(1, 3, 32, 32)

    def basic(inputs, outputs, before, after):
        return 9 * outputs * (inputs + outputs) * after

    assert counted(room.resnet20(), x) == residual_macs(basic) + 640

    for expansion in (1, 9):

        def csc(inputs, outputs, before, after, expansion=expansion):
            return expansion * outputs * (inputs * before + outputs * after)

        assert counted(room.shiftresnet20(expansion=expansion), x) == residual_macs(csc) + 640
    assert weights_of(room.resnet20()) == weights_of(room.shiftresnet20(expansion=9))  # 9 e C (C + C') both
    assert weights_of(room.shiftresnet20(expansion=3)) < 0.4 * weights_of(room.resnet20())


def squeezenext_block(inputs, outputs, strided):
    c = outputs
    shortcut = inputs * c if strided or inputs != c else 0
    return inputs * c // 2 + c * c // 8 + 3 * c * c // 8 + 3 * c * c // 4 + c * c // 2 + shortcut


@pytest.mark.parametrize("version", ["v1", "v5"])
def test_squeezenext_has_the_counts_of_its_formula(version):
    depths = DEPTHS[version]
    params, macs, inputs = 3 * 64 * 49, 3 * 64 * 49 * 111**2, 64
    for stage, (depth, outputs, side) in enumerate(zip(depths, (32, 64, 128, 256), (55, 28, 14, 7), strict=True)):
        for i in range(depth):
            block = squeezenext_block(inputs, outputs, stage > 0 and i == 0)
            params, macs, inputs = params + block, macs + block * side**2, outputs
    params, macs = params + 256 * 128, macs + 256 * 128 * 49
    model = room.squeezenext(depths)
    assert weights_of(model) == params
    assert counted(model, torch.randn(1, 3, 227, 227)) == macs + 128_000
    if version == "v1":  # the paper: 0.72 million
        assert sum(p.numel() for p in model.parameters()) == 718_280


def test_squeezenext_in_its_other_forms():
    block = room.SqueezeNextBlock(16, 16)
    sizes = [layer[0].kernel_size for layer in block.layers]
    assert sizes == [(1, 1), (1, 1), (3, 1), (1, 3), (1, 1)]
    flipped = [layer[0].kernel_size for layer in room.SqueezeNextBlock(16, 16, flip=True).layers]
    assert flipped == [(1, 1), (1, 1), (1, 3), (3, 1), (1, 1)]
    c = 16
    assert (
        weights_of(block) - weights_of(room.SqueezeNextBlock(c, c, groups=2)) == (3 * c * c // 8 + 3 * c * c // 4) // 2
    )
    wide = room.squeezenext_23(width=1.5, num_classes=7)
    assert wide.num_features == 192
    assert wide(torch.randn(1, 3, 65, 65)).shape == (1, 7)
    with pytest.raises(ValueError, match="multiple of 4"):
        room.SqueezeNextBlock(16, 18)
    with pytest.raises(ValueError, match="depths must be 4"):
        room.squeezenext((1, 2))


def test_caffe_rounds_the_pooled_size_up():
    features = room.squeezenext((1, 1, 1, 1)).features
    conv, pool = features[0], features[1]
    assert pool(conv(torch.zeros(1, 3, 230, 230))).shape[-1] == 56  # 112 pixels: torch alone would give 55
    assert conv(torch.zeros(1, 3, 227, 227)).shape[-1] == 111  # no padding


@pytest.mark.parametrize("mix", ["shift", "depthwise", "none", "average"])
def test_codesigned_networks_have_the_counts_of_their_formula(mix):
    depths, widths, last, side = (2, 3), (24, 48, 96), 64, 16
    extra = 9 if mix == "depthwise" else 0
    params = 24 + 24 * 24
    macs = params * side**2 + extra * 24 * side**2
    params += extra * 24
    for depth, inputs, outputs in zip(depths, widths, widths[1:], strict=False):
        half, before, after = outputs // 2, side**2, (side // 2) ** 2
        params += inputs * half + half * half + inputs * half + extra * (half + inputs)
        macs += before * inputs * half + after * (half * half + inputs * half) + after * extra * (half + inputs)
        for _ in range(depth - 1):
            params += 2 * half * half + extra * half
            macs += after * (2 * half * half + extra * half)
        side //= 2
    params, macs = params + 96 * last, macs + 96 * last * side**2 + last * 5
    model = room.dirac_net(depths, widths, last=last, mix=mix, pool_stem=False, num_classes=5, in_chans=1)
    assert weights_of(model) == params
    assert counted(model, torch.randn(1, 1, 16, 16)) == macs


def test_a_codesigned_network_only_has_the_operators_of_its_accelerator():
    model = room.dirac_net((1, 1, 1), (24, 48, 96, 192), num_classes=3)
    leaves = {type(m) for m in model.modules() if not list(m.children())}
    allowed = {nn.Conv2d, nn.BatchNorm2d, nn.ReLU, room.Shift2d, nn.MaxPool2d, nn.Identity, nn.Linear}
    assert leaves <= allowed
    assert {m.kernel_size for m in model.modules() if isinstance(m, nn.Conv2d)} == {(1, 1)}
    assert model.forward_features(torch.randn(1, 3, 64, 64)).shape == (1, 1024, 2, 2)


def test_a_unit_mixes_what_passes_with_what_does_not():
    unit = room.DiracUnit(8, 8).eval()
    x = torch.randn(2, 8, 4, 4)
    out = unit(x)
    assert torch.equal(out[:, ::2], x[:, :4])
    assert torch.equal(out[:, 1::2], unit.branch(x[:, 4:]))
    with pytest.raises(ValueError, match="outputs must be even"):
        room.DiracUnit(8, 16)
    with pytest.raises(ValueError, match="kind must be one of"):
        mixer("shuffle", 8)


def fire(inputs, squeeze, one, three):
    return inputs * squeeze + squeeze + squeeze * one + one + 9 * squeeze * three + three


def test_squeezeseg_has_the_counts_of_its_formula():
    expand = [
        (64, 16, 64),
        (128, 16, 64),
        (128, 32, 128),
        (256, 32, 128),
        (256, 48, 192),
        (384, 48, 192),
        (384, 64, 256),
    ]
    expand.append((512, 64, 256))
    up = [(512, 64, 128), (256, 32, 64), (128, 16, 32), (64, 16, 32)]
    params = 5 * 64 * 9 + 64 + 5 * 64 + 64 + 64 * 4 * 9 + 4
    params += sum(fire(inputs, squeeze, each, each) for inputs, squeeze, each in expand + up)
    params += sum(4 * squeeze**2 + squeeze for _, squeeze, _ in up)
    model = room.SqueezeSeg()
    assert sum(p.numel() for p in model.parameters()) == params + 2 * 16  # and both matrices of the CRF

    height, width = 4, 32
    macs = height * (5 * 64 * 9 * width // 2 + 5 * 64 * width + 64 * 4 * 9 * width)
    for (inputs, squeeze, each), shrunk in zip(expand, (4, 4, 8, 8, 16, 16, 16, 16), strict=True):
        macs += height * (width // shrunk) * squeeze * (inputs + each + 9 * each)
    for (inputs, squeeze, each), shrunk in zip(up, (16, 8, 4, 2), strict=True):
        narrow = height * (width // shrunk)
        macs += narrow * (inputs * squeeze + 4 * squeeze**2) + 2 * narrow * squeeze * 10 * each
    plain = room.SqueezeSeg(crf=False)
    assert counted(plain, torch.randn(1, 5, height, width), torch.ones(1, height, width, dtype=torch.bool)) == macs


# -------------------------------------------------------------------------------------------------------------------- few bits


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_few_bits_are_few_values_with_gradients_for_all(bits):
    weight = torch.randn(6, 40, 1, 1, requires_grad=True)
    out = room.FewBits(bits)(weight)
    assert max(len(row.unique()) for row in out.detach().flatten(1)) <= 2**bits
    assert max(len(row.unique()) for row in out.detach().flatten(1)) > 2 ** (bits - 1)
    out.sum().backward()
    assert torch.equal(weight.grad, torch.ones_like(weight))


def test_one_bit_keeps_signs_and_the_mean_magnitude():
    weight = torch.tensor([[1.0, -3.0, 2.0], [0.0, 0.0, 0.0]])
    assert room.FewBits(1)(weight).tolist() == [[2.0, -2.0, 2.0], [0.0, 0.0, 0.0]]


def test_more_bits_err_by_half_a_step_at_most():
    weight = torch.randn(5, 30)
    for bits in (2, 4, 8):
        step = weight.abs().amax(1, keepdim=True) / (2 ** (bits - 1) - 1)
        assert bool(((room.FewBits(bits)(weight) - weight).abs() <= step / 2 + 1e-6).all())


def test_a_rounded_relu_cuts_at_a_limit_that_learns():
    layer = room.RoundedReLU(2, limit=3.0)
    x = torch.tensor([-1.0, 0.4, 0.6, 2.4, 9.0], requires_grad=True)
    out = layer(x)
    assert out.tolist() == [0.0, 0.0, 1.0, 2.0, 3.0]
    out.sum().backward()
    assert x.grad.tolist() == [0.0, 1.0, 1.0, 1.0, 0.0]
    assert float(layer.limit.grad) == 1.0


def test_a_network_of_few_bits():
    torch.manual_seed(0)
    model = room.dirac_net((2,), (18, 36), last=18, pool_stem=False, num_classes=3)
    x = torch.randn(4, 3, 8, 8)
    before = model.eval()(x)
    assert room.with_bits(model) is model
    few = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    assert not hasattr(few[0], "parametrizations")
    assert all(len(m.weight[0].abs().unique()) == 1 for m in few[1:])
    assert not any(type(m) is nn.ReLU for m in model.modules())
    assert not torch.allclose(before, model(x))
    model.train()(x).sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    with pytest.raises(ValueError, match="few bits already"):
        room.with_bits(model)
    with pytest.raises(ValueError, match="1x1 convolutions"):
        room.with_bits(nn.Sequential(nn.Conv2d(3, 4, 3)))
    bare = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 1))
    with pytest.raises(ValueError, match="nn.ReLU modules"):
        room.with_bits(bare)
    assert len(room.with_bits(bare, activations=None)[1].weight[0].abs().unique()) == 1


# ----------------------------------------------------------------------------------------------------------------------- LiDAR


def test_the_spherical_image_keeps_the_nearest_point_of_a_direction():
    def at(azimuth, elevation, distance, intensity):
        a, e = math.radians(azimuth), math.radians(elevation)
        place = [distance * math.cos(e) * math.cos(a), distance * math.cos(e) * math.sin(a), distance * math.sin(e)]
        return [*place, intensity]

    rows = [at(0, -10, 9, 0.1), at(0, -10, 4, 0.2), at(0, -10, 6, 0.3), at(40, 1, 5, 0.4), at(-44.99, -24.7, 7, 0.5)]
    outside = [at(50, 0, 5, 1), at(0, 20, 5, 1), at(170, 0, 5, 1), [0.0, 0.0, 0.0, 1.0]]
    image, mask = room.spherical_image(torch.tensor(rows + outside, dtype=torch.float64))
    assert image.shape == (5, 64, 512)
    assert int(mask.sum()) == 3
    assert image[3, int(12 / 26.8 * 64), 256].item() == pytest.approx(0.2)
    assert image[4][mask].sort()[0].tolist() == pytest.approx([4, 5, 7])
    assert bool(mask[63, 511])  # right and low is the last corner
    assert image[3, 2, int(5 / 90 * 512)].item() == pytest.approx(0.4)  # left is the first column
    assert float(image[:, ~mask].abs().sum()) == 0
    empty, nothing = room.spherical_image(torch.zeros(0, 4))
    assert not bool(nothing.any())
    with pytest.raises(ValueError, match="finite"):
        room.spherical_image(torch.tensor([[float("nan"), 0, 0, 0]]))


def test_a_crf_without_weight_gives_the_unaries_back():
    torch.manual_seed(0)
    logits, places = torch.randn(2, 4, 6, 8), torch.randn(2, 3, 6, 8)
    mask = torch.rand(2, 6, 8) > 0.2
    crf = room.RecurrentCRF(4, coefficients=(0.0, 0.0))
    assert torch.equal(crf(logits, places, mask).softmax(1), logits.softmax(1))
    assert torch.equal(room.RecurrentCRF(4, iterations=0)(logits, places, mask), logits)


@torch.no_grad()
def test_a_crf_is_mean_field_by_its_definition():
    torch.manual_seed(0)
    classes, height, width = 3, 3, 6
    logits, places = torch.randn(1, classes, height, width), 0.02 * torch.randn(1, 3, height, width)
    mask = torch.rand(1, height, width) > 0.3
    places = places * mask[:, None]
    crf = room.RecurrentCRF(classes, iterations=2)
    crf.by_angle.copy_(torch.rand(classes, classes))
    crf.by_place.copy_(torch.rand(classes, classes))
    angular, spatial = (0.9, 0.9, 0.6), (0.015, 0.015, 0.01)
    found = logits.clone()
    for _ in range(2):
        q = found.softmax(1)
        sums = torch.zeros(2, classes, height, width)
        for r in range(height):
            for c in range(width):
                for down in (-1, 0, 1):
                    for right in (-2, -1, 0, 1, 2):
                        y, x = r + down, c + right
                        if (down, right) == (0, 0) or not (0 <= y < height and 0 <= x < width) or not mask[0, y, x]:
                            continue
                        apart = float((places[0, :, r, c] - places[0, :, y, x]).square().sum())
                        for k in range(classes):
                            near = math.exp(-(down**2 + right**2) / (2 * angular[k] ** 2))
                            sums[0, k, r, c] += near * q[0, k, y, x]
                            sums[1, k, r, c] += near * math.exp(-apart / (2 * spatial[k] ** 2)) * q[0, k, y, x]
        pull = torch.einsum("dc,chw->dhw", crf.by_angle, sums[0]) + torch.einsum("dc,chw->dhw", crf.by_place, sums[1])
        found = logits - pull[None]
    torch.testing.assert_close(crf(logits, places, mask), found, atol=1e-4, rtol=1e-4)


def test_a_crf_makes_a_lone_pixel_like_its_neighbours():
    logits = torch.zeros(1, 2, 5, 7)
    logits[:, 0] = 2.0
    logits[:, :, 2, 3] = torch.tensor([0.0, 0.3])
    crf = room.RecurrentCRF(2, coefficients=(0.2, 1.0))
    out = crf(logits, torch.zeros(1, 3, 5, 7), torch.ones(1, 5, 7, dtype=torch.bool))
    assert int(logits[0, :, 2, 3].argmax()) == 1
    assert int(out[0, :, 2, 3].argmax()) == 0
    far = torch.zeros(1, 3, 5, 7)
    far[:, :, 2, 3] = 10.0  # an object of its own
    apart = room.RecurrentCRF(2, coefficients=(0.0, 1.0))(logits, far, torch.ones(1, 5, 7, dtype=torch.bool))
    assert int(apart[0, :, 2, 3].argmax()) == 1


def test_squeezeseg_has_the_shapes_of_a_scan():
    torch.manual_seed(0)
    model = room.SqueezeSeg().eval()
    sizes = {}
    for name in ("pool", "fire3", "fire5", "fire9", "up10", "up13"):
        model.get_submodule(name).register_forward_hook(
            lambda _, __, out, name=name: sizes.__setitem__(name, out.shape)
        )
    points = torch.randn(4000, 4).abs() * torch.tensor([20.0, 6.0, -0.5, 1.0]) + torch.tensor([3.0, -5.0, 0.0, 0.0])
    image, mask = room.spherical_image(points)
    with torch.no_grad():
        out = model(image[None], mask[None])
    assert out.shape == (1, 4, 64, 512)
    assert {name: tuple(shape[1:]) for name, shape in sizes.items()} == {
        "pool": (256, 64, 32), "fire3": (128, 64, 128), "fire5": (256, 64, 64), "fire9": (512, 64, 32),
        "up10": (256, 64, 64), "up13": (64, 64, 512),
    }  # fmt: skip
    with pytest.raises(ValueError, match="that 16 divides"):
        model(torch.zeros(1, 5, 4, 40), torch.ones(1, 4, 40, dtype=torch.bool))
    loss = room.segmentation_loss(out, torch.zeros(1, 64, 512, dtype=torch.int64), mask[None])
    expected = nn.functional.cross_entropy(
        out[0].permute(1, 2, 0)[mask], torch.zeros(int(mask.sum()), dtype=torch.int64)
    )
    torch.testing.assert_close(loss, expected)
    assert float(room.segmentation_loss(out, torch.zeros(1, 64, 512).long(), torch.zeros_like(mask[None]))) == 0


def test_a_widening_convolution_starts_as_a_bilinear_one():
    layer = squeezeseg.FireDeconv(4, 2, 3, 3)
    ramp = torch.arange(6.0).expand(1, 2, 3, 6)
    wide = layer.widen(ramp)[0, 0, 0]
    assert wide.tolist()[1:-1] == pytest.approx([0.25, 0.75, 1.25, 1.75, 2.25, 2.75, 3.25, 3.75, 4.25, 4.75])


def street() -> torch.Tensor:
    """A sloping road with two cars of 300 points each, three metres apart, and a pole."""
    generator = torch.Generator().manual_seed(0)

    def uniform(n, low, high):
        return torch.rand(n, 3, generator=generator) * (torch.tensor(high) - torch.tensor(low)) + torch.tensor(low)

    road = uniform(3000, [0.0, -10.0, -0.05], [30.0, 10.0, 0.05])
    cars = [uniform(300, [8.0, y, 0.4], [12.0, y + 1.8, 1.8]) for y in (-3.0, 1.8)]
    pole = uniform(50, [20.0, 6.0, 0.4], [20.2, 6.2, 4.0])
    points = torch.cat([road, *cars, pole])
    points[:, 2] += 0.03 * points[:, 0]
    return points


def test_one_click_takes_one_object():
    points = street()
    floor = room.ground(points)
    assert float(floor[:3000].float().mean()) > 0.99
    assert not bool(floor[3000:].any())
    rest = points[~floor]
    car = room.one_click(rest, torch.tensor([10.0, -2.0]), radius=0.7)
    wanted = (rest[:, 1] < 0) & (rest[:, 0] > 7.9) & (rest[:, 0] < 12.1) & (rest[:, 2] > 0.5)
    assert bool(car[wanted].all())
    assert not bool(car[rest[:, 1] > 0].any())
    box = room.box_around(rest[car])
    assert (box.x, box.y) == pytest.approx((10.0, -2.1), abs=0.1)
    assert (box.length, box.width) == pytest.approx((4.0, 1.8), abs=0.2)
    nobody = room.one_click(rest, torch.tensor([-50.0, 0.0]))
    assert not bool(nobody.any())
    with pytest.raises(ValueError, match="click must be"):
        room.one_click(rest, torch.zeros(4))


def test_clusters_grow_as_dbscan_does():
    from sklearn.cluster import DBSCAN

    points = torch.randn(200, 3, generator=torch.Generator().manual_seed(1)) * torch.tensor([2.0, 2.0, 0.5])
    labels = torch.from_numpy(DBSCAN(eps=0.6, min_samples=4).fit(points.numpy()).labels_)
    for label in labels.unique().tolist():
        if label < 0:
            continue
        within = (torch.cdist(points, points) <= 0.6).sum(1) >= 4
        core = points[(labels == label) & within][0]
        found = room.one_click(points, core, radius=0.6, least=4, reach=100.0)
        assert bool(found[labels == label].all())
        assert not bool(found[(labels != label) & within].any())  # a border point may belong to two clusters


def test_a_box_finds_its_heading():
    turn = math.radians(30)
    flat = torch.tensor([[2.0, 1.0], [2.0, -1.0], [-2.0, 1.0], [-2.0, -1.0]])
    turned = flat @ torch.tensor([[math.cos(turn), math.sin(turn)], [-math.sin(turn), math.cos(turn)]])
    box = room.box_around(torch.cat([turned + torch.tensor([5.0, 7.0]), torch.zeros(4, 1)], 1))
    assert (box.x, box.y, box.length, box.width) == pytest.approx((5, 7, 4, 2), abs=1e-4)
    assert box.heading % math.pi == pytest.approx(turn, abs=1e-6)


def test_a_track_learns_the_velocity():
    track = room.Track(0.0, 0.0)
    for step in range(1, 20):
        expected = track.predict()
        track.update(0.5 * step, -0.2 * step)
    assert expected == pytest.approx((9.5, -3.8), abs=0.02)
    assert track.state[2:].tolist() == pytest.approx([5.0, -2.0], abs=0.1)


def test_aligned_features_are_no_distance_apart():
    torch.manual_seed(0)
    ours = torch.randn(400, 5, dtype=torch.float64, requires_grad=True)
    assert float(room.geodesic_distance(ours, ours.detach()).detach()) == pytest.approx(0, abs=1e-12)
    doubled = room.geodesic_distance(2 * ours, ours, floor=1e-12).detach()
    expected = 5 * math.log(4) ** 2 / 100  # log A - log B = log 4 on the diagonal
    assert float(doubled) == pytest.approx(expected, rel=1e-6)
    theirs = 0.5 * torch.randn(400, 5, dtype=torch.float64)
    before = room.geodesic_distance(ours, theirs)
    before.backward()
    with torch.no_grad():
        after = room.geodesic_distance(ours - 10 * ours.grad / ours.grad.norm(), theirs)
    assert float(after) < float(before.detach())
    with pytest.raises(ValueError, match="theirs must have shape"):
        room.geodesic_distance(ours, torch.randn(3, 4, dtype=torch.float64))


def test_recalibration_sets_one_norm_after_another():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 3, 1), nn.BatchNorm2d(3))
    model.train()
    batches = [3 + 2 * torch.randn(8, 2, 4, 4) for _ in range(5)]
    assert room.recalibrate(model, model, batches) == 2
    assert model.training
    model.eval()
    with torch.no_grad():
        first = torch.cat([model[:2](batch) for batch in batches])
        last = torch.cat([model(batch) for batch in batches])
    for maps in (first, last):  # also the second, whose inputs changed when the first was set
        torch.testing.assert_close(maps.mean((0, 2, 3)), torch.zeros(maps.shape[1]), atol=1e-4, rtol=0)
        torch.testing.assert_close(maps.var((0, 2, 3)), torch.ones(maps.shape[1]), atol=1e-3, rtol=0)
    with pytest.raises(ValueError, match="batches must hold"):
        room.recalibrate(model, model, [])
    with pytest.raises(ValueError, match="batch norm"):
        room.recalibrate(nn.Linear(2, 2), nn.Linear(2, 2), [torch.zeros(1, 2)])


def test_the_loss_of_intensities_is_least_for_the_truth():
    intensity = torch.tensor([[[0.05, 0.95]]])
    logits, offsets = torch.full((1, 10, 1, 2), -20.0), torch.zeros(1, 10, 1, 2)
    logits[0, 0, 0, 0] = logits[0, 9, 0, 1] = 20.0
    mask = torch.ones(1, 1, 2, dtype=torch.bool)
    assert float(room.intensity_loss(logits, offsets, intensity, mask)) == pytest.approx(0, abs=1e-4)
    assert float(room.intensity_loss(logits, offsets + 0.5, intensity, mask)) == pytest.approx(0.25, abs=1e-4)
    assert float(room.intensity_loss(logits.flip(1), offsets, intensity, mask)) > 10


def test_a_net_is_features_and_a_head():
    net = nets.Net([nn.Conv2d(3, 6, 1)], 6, 4)
    x = torch.randn(2, 3, 5, 5)
    assert torch.equal(net(x), net.forward_head(net.forward_features(x)))
    assert torch.allclose(net(x), net.head(net.features(x).mean((2, 3))))


# --------------------------------------------------------------------------------------------------------- what others may bring


def test_groups_that_leave_channels_out_are_refused():
    x = torch.randn(1, 4, 3, 3)
    for groups in (((0, 3, 0, 0),), ((0, 2, 0, 1), (3, 4, 0, 0)), ((0, 3, 0, 1), (2, 4, 0, 0)), ()):
        with pytest.raises(ValueError, match="must"):
            room.shift(x, groups)


def test_the_padded_form_is_the_same_shift():
    for size in ((5, 4), (1, 7), (2, 2)):
        x = torch.randn(2, 50, *size)
        for kernel in (3, 5, 7):
            groups = room.deal(50, kernel)
            assert torch.equal(_padded(x, groups), room.shift(x, groups))


def test_shifts_go_through_the_transforms_of_torch():
    layer, x, tangent = room.Shift2d(9), torch.randn(3, 2, 9, 4, 4), torch.randn(2, 9, 4, 4)
    groups = room.deal(9)
    assert torch.equal(torch.func.vmap(layer)(x), torch.stack([layer(each) for each in x]))
    out, moved = torch.func.jvp(layer, (x[0],), (tangent,))
    assert torch.equal(out, layer(x[0]))
    assert torch.equal(moved, room.shift_reference(tangent, groups))
    each = torch.func.vmap(torch.func.grad(lambda y: layer(y[None]).square().sum()))(x[0])
    whole = x[0].clone().requires_grad_()
    layer(whole).square().sum().backward()
    torch.testing.assert_close(each, whole.grad)


def test_few_bits_take_over_dtype_and_mode_and_refuse_before_they_change():
    model = room.dirac_net((2,), (18, 36), last=18, pool_stem=False, num_classes=3).eval().to(torch.bfloat16)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match="activations must be"):
        room.with_bits(model, activations=0)
    assert list(model.state_dict()) == list(before)
    room.with_bits(model)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert not any(m.training for m in model.modules())
    assert model(torch.randn(2, 3, 8, 8, dtype=torch.bfloat16)).dtype == torch.bfloat16
    again = room.with_bits(room.dirac_net((2,), (18, 36), last=18, pool_stem=False, num_classes=3)).eval()
    again.to(torch.bfloat16).load_state_dict(model.state_dict())
    x = torch.randn(2, 3, 8, 8, dtype=torch.bfloat16)
    assert torch.equal(again(x), model(x))


def test_features_with_fewer_rows_than_columns_have_finite_gradients():
    torch.manual_seed(0)
    ours = torch.randn(4, 12, requires_grad=True)  # rank 3 of 12: nine equal eigenvalues
    room.geodesic_distance(ours, torch.randn(50, 12)).backward()
    assert bool(torch.isfinite(ours.grad).all())
    assert float(ours.grad.abs().sum()) > 0
    theirs = torch.randn(9, 4, dtype=torch.float64)
    for rows in (6, 3):
        small = torch.randn(rows, 4, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(lambda x: room.geodesic_distance(x, theirs, floor=0.1), small)


def test_what_stands_at_unmeasured_pixels_is_not_read():
    torch.manual_seed(0)
    logits, places = torch.randn(1, 3, 4, 6), 0.02 * torch.randn(1, 3, 4, 6)
    mask = torch.rand(1, 4, 6) > 0.4
    broken = places.masked_fill(~mask[:, None], float("nan"))
    crf = room.RecurrentCRF(3)
    where = mask[:, None].expand_as(logits)
    assert torch.equal(crf(logits, broken, mask)[where], crf(logits, places, mask)[where])
    labels = torch.randint(3, (1, 4, 6))
    unknown = labels.masked_fill(~mask, 255)
    assert torch.equal(room.segmentation_loss(logits, unknown, mask), room.segmentation_loss(logits, labels, mask))
    heavy = torch.tensor([1.0, 5.0, 0.5])
    each = nn.functional.cross_entropy(logits, labels, weight=heavy, reduction="none")
    expected = each[mask].sum() / mask.sum()
    torch.testing.assert_close(room.segmentation_loss(logits, labels, mask, heavy), expected)


def test_a_norm_of_single_values_is_not_recalibrated():
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    with pytest.raises(ValueError, match="two values a channel"):
        room.recalibrate(model, model, [torch.zeros(1, 2)])
    assert bool(torch.isfinite(model[1].running_var).all())
