from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from assay.methods.core import kernels
from assay.methods.layers.kat import (
    GroupRational,
    KATMlp,
    Mlp,
    VisionTransformer,
    convert,
    fitted,
    kat_tiny_patch16_224,
    rational,
    rational_reference,
    variance_preserving_,
)

FORMS = ("sum_of_abs", "abs_of_sum")


@pytest.fixture(params=["kernel", "torch"])
def path(request, monkeypatch):
    if request.param == "torch":
        monkeypatch.setattr("assay.methods.layers.kat._use_kernel", lambda x: False)
    else:
        assert kernels.load("rational")
    return request.param


def coefficients(groups, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(groups, 6, generator=generator, dtype=dtype)
    return a, torch.randn(groups, 4, generator=generator, dtype=dtype)


@pytest.mark.parametrize("form", FORMS)
def test_both_paths_compute_the_definition(path, form):
    a, b = coefficients(3)
    x = 3 * torch.randn(2, 5, 12, dtype=torch.float64)
    torch.testing.assert_close(rational(x, a, b, denominator=form), rational_reference(x, a, b, form))
    strided = x.transpose(0, 1)
    torch.testing.assert_close(rational(strided, a, b, denominator=form), rational_reference(strided, a, b, form))
    assert rational(x[:0], a, b).shape == (0, 5, 12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("rows", "groups", "width"), [(1, 1, 3), (37, 3, 12), (50, 2, 16), (33, 2, 40), (70, 3, 32)])
@pytest.mark.parametrize("shared", ["none", "a", "b"])
def test_kernel_equals_torch_wherever_groups_and_vectors_end(rows, groups, width, form, dtype, shared):
    a, b = coefficients(groups, dtype=dtype)
    a, b = a[:1] if shared == "a" else a, b[:1] if shared == "b" else b
    x, grad = torch.randn(2, rows, groups * width, generator=torch.Generator().manual_seed(rows), dtype=dtype)
    x[0, 0] = 0.0
    tolerance = {"rtol": 1e-9, "atol": 1e-10} if dtype == torch.float64 else {"rtol": 1e-4, "atol": 2e-4}
    assert kernels.load("rational")
    found = torch.ops.assay.rational(x, a, b, form == "abs_of_sum")
    torch.testing.assert_close(found, rational_reference(x, a, b, form), **tolerance)
    gradients = torch.ops.assay.rational_backward(grad, x, a, b, form == "abs_of_sum")
    inputs = [t.double().requires_grad_() for t in (x, a, b)]
    wanted = torch.autograd.grad(rational_reference(*inputs, form), inputs, grad.double())
    for one, two in zip(gradients, wanted, strict=True):
        scale = float(two.abs().max())
        torch.testing.assert_close(one.double() / scale, two / scale, **tolerance)
    again = torch.ops.assay.rational_backward(grad, x, a, b, form == "abs_of_sum")
    assert all(torch.equal(one, two) for one, two in zip(gradients, again, strict=True)), (
        "the same threads, the same bits"
    )


@pytest.mark.parametrize("form", FORMS)
def test_one_row_for_all_groups_is_that_row_repeated(path, form):
    a, b = coefficients(4)
    x = torch.randn(5, 12, dtype=torch.float64)
    for one, many in (((a[:1], b), (a[:1].expand(4, 6), b)), ((a, b[:1]), (a, b[:1].expand(4, 4)))):
        leaves = [t.clone().requires_grad_() for t in (x, *one)]
        repeated = [t.clone().requires_grad_() for t in (x, *many)]
        y, z = rational(*leaves, denominator=form), rational(*repeated, denominator=form)
        torch.testing.assert_close(y, z)
        for p, q in zip(torch.autograd.grad(y.sum(), leaves), torch.autograd.grad(z.sum(), repeated), strict=True):
            torch.testing.assert_close(p, q.sum_to_size(p.shape))


@pytest.mark.parametrize("form", FORMS)
def test_gradients_of_inputs_and_coefficients(path, form):
    torch.manual_seed(1)
    a, b = coefficients(2)
    x = torch.randn(3, 4, 6, dtype=torch.float64)
    inputs = [t.requires_grad_() for t in (x, a, b)]
    assert torch.autograd.gradcheck(lambda x, a, b: rational(x, a, b, denominator=form), inputs)
    # the group reduction is the expanded version's gradient, summed over the channels of the group
    wide_a, wide_b = (t.detach().repeat_interleave(3, 0).requires_grad_() for t in (a, b))
    grad = torch.randn(3, 4, 6, dtype=torch.float64)
    grouped = torch.autograd.grad(rational(x, a, b, denominator=form), (a, b), grad)
    expanded = torch.autograd.grad(rational(x, wide_a, wide_b, denominator=form), (wide_a, wide_b), grad)
    for one, many in zip(grouped, expanded, strict=True):
        torch.testing.assert_close(one, many.unflatten(0, (2, 3)).sum(1))


@pytest.mark.parametrize("form", FORMS)
def test_identity_is_the_identity_everywhere(path, form):
    act = GroupRational(4, "identity", form)
    x = torch.cat([torch.tensor([0.0, -0.0, 20.0, -20.0, 1e4]), torch.randn(11)]).view(1, 16)
    assert torch.equal(act(x), x)
    assert torch.equal(act(x.bfloat16()), x.bfloat16())


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("name", "target"), [("gelu", F.gelu), ("swish", F.silu)])
def test_fits_hold_under_the_form_they_are_used_with(form, name, target):
    x = torch.linspace(-3, 3, 4001)[:, None].expand(-1, 8)
    off = (GroupRational(8, name, form)(x) - target(x)).abs().max()
    assert off < 0.02
    other = next(f for f in FORMS if f != form)
    a, b = fitted(name, form)
    crossed = rational(x[:, :1].double(), torch.tensor([a]).double(), torch.tensor([b]).double(), denominator=other)
    assert (crossed - target(x[:, :1].double())).abs().max() > off, (
        "coefficients of one form are not those of the other"
    )


@pytest.mark.parametrize("form", FORMS)
def test_denominators_have_no_pole(form):
    generator = torch.Generator().manual_seed(0)
    x = torch.linspace(-50, 50, 2001, dtype=torch.float64)[:, None]
    for seed in range(20):
        a, b = coefficients(1, seed)
        p = sum(a[:, i] * x**i for i in range(6))
        y = rational(x, a, b * 3, denominator=form)
        assert (y.abs() <= p.abs() + 1e-12).all()
    big = torch.randn(100, 8, generator=generator) * 1e3
    assert GroupRational(8, "swish", form)(big).isfinite().all()


def test_a_groups_coefficients_move_its_channels_only():
    act = GroupRational(4, "swish")
    x = torch.randn(5, 16)
    before = act(x)
    with torch.no_grad():
        act.coefficients[2] += 0.5
    moved = (act(x) != before).any(0)
    assert moved.nonzero().flatten().tolist() == [8, 9, 10, 11]


def test_parameters_and_sharing():
    assert sum(p.numel() for p in GroupRational(8).parameters()) == 6 + 4 * 8
    assert sum(p.numel() for p in GroupRational(8, shared="denominator").parameters()) == 6 * 8 + 4
    torch.manual_seed(0)
    sizes = {"img_size": 32, "embed_dim": 48, "num_heads": 3, "depth": 3, "num_classes": 10}
    count = {m: sum(p.numel() for p in VisionTransformer(mlp=m, **sizes).parameters()) for m in ("kat", "gelu")}
    assert count["kat"] - count["gelu"] == 3 * 2 * (6 + 4 * 8)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["identity", "gelu", "swish"])
def test_the_gain_keeps_the_variance(name, form):
    torch.manual_seed(0)
    act, linear = GroupRational(8, name, form), nn.Linear(512, 512)
    variance_preserving_(linear, act)
    y = linear(act(F.layer_norm(torch.randn(2000, 512), (512,))))
    assert y.var().item() == pytest.approx(1.0, abs=0.06)
    assert act.gain() == pytest.approx({"identity": 1.0, "gelu": 2.36, "swish": 2.8}[name], rel=0.05)


def test_as_released_overwrites_the_weights():
    torch.manual_seed(0)
    paper, released = (KATMlp(256, 512, variant=variant) for variant in ("paper", "as_released"))
    assert paper.fc1.weight.std().item() == pytest.approx(256**-0.5, rel=0.02)
    assert paper.fc2.weight.std().item() == pytest.approx((2.8 / 512) ** 0.5, rel=0.05)
    for linear in (released.fc1, released.fc2):
        assert linear.weight.std().item() == pytest.approx(0.02, rel=0.02)
        assert linear.bias.abs().max() == 0
    sizes = {
        "img_size": 8,
        "patch_size": 4,
        "in_chans": 1,
        "num_classes": 3,
        "embed_dim": 24,
        "num_heads": 3,
        "depth": 1,
    }
    assert VisionTransformer(**sizes, variant="as_released").blocks[0].mlp.variant == "as_released"


def test_zero_denominators_stay_zero_unless_noise_breaks_the_tie():
    x = torch.randn(7, 16)
    still, moving = GroupRational(8, "identity"), GroupRational(8, "identity", noise=0.01)
    for act in (still, moving):
        act(x).square().sum().backward()
    assert still.coefficients.grad.abs().max() == 0
    assert moving.coefficients.grad.abs().max() > 0


def test_bfloat16_is_computed_in_float32():
    act = GroupRational(8, "gelu")
    x = torch.randn(50, 64).bfloat16()
    assert torch.equal(act(x), act(x.float()).bfloat16())


def test_converted_vit_computes_what_it_did():
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(0)
    config = ViTConfig(
        image_size=32,
        patch_size=8,
        hidden_size=48,
        num_hidden_layers=3,
        num_attention_heads=3,
        intermediate_size=96,
        num_labels=7,
    )
    model = ViTForImageClassification(config).eval()
    images = torch.randn(4, 3, 32, 32)
    before = model(images).logits
    parameters = sum(p.numel() for p in model.parameters())
    names = convert(model)
    assert len(names) == 6
    assert sum(p.numel() for p in model.parameters()) - parameters == 3 * 2 * (6 + 4 * 8)
    after = model(images).logits
    assert (after - before).abs().max() < 0.02
    assert not torch.equal(after, before)
    model(images).logits.sum().backward()
    assert all(p.grad is not None for n, p in model.named_parameters() if "numerator" in n)


def test_own_vit_converts_too_and_only_what_is_asked():
    torch.manual_seed(0)
    model = VisionTransformer(
        img_size=8, patch_size=4, in_chans=1, num_classes=10, embed_dim=24, num_heads=3, depth=2, mlp="gelu"
    )
    images = torch.rand(3, 1, 8, 8)
    before = model(images)
    twin = copy.deepcopy(model)
    assert len(convert(model)) == 4
    assert (model(images) - before).abs().max() < 0.05
    assert len(convert(twin, include=["blocks.1.*"])) == 2
    assert isinstance(twin.blocks[0].mlp.act, nn.GELU)
    with pytest.raises(ValueError, match="no GELU"):
        convert(nn.Linear(3, 3))


def test_builders():
    assert kat_tiny_patch16_224(num_classes=0, depth=1)(torch.randn(1, 3, 224, 224)).shape == (1, 192)
    tiny = kat_tiny_patch16_224()
    millions = sum(p.numel() for p in tiny.parameters()) / 1e6
    assert millions == pytest.approx(5.7, abs=0.05)
    assert len(tiny.blocks) == 12
    assert tiny.blocks[0].mlp.act1.init == "identity"


def test_trains_and_learns_the_shape():
    torch.manual_seed(0)
    block = KATMlp(16, 64)
    plain = Mlp(16, 64)
    assert sum(p.numel() for p in block.parameters()) == sum(p.numel() for p in plain.parameters()) + 2 * 38
    x = torch.randn(256, 16)
    y = torch.sin(2 * x)
    optimizer = torch.optim.Adam(block.parameters(), 3e-3)
    losses = []
    for _ in range(150):
        loss = (block(x) - y).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    assert block.act1.coefficients.abs().max() == 0, "as the paper's init leaves it"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: GroupRational(0), "num_groups"),
        (lambda: GroupRational(8, "relu"), "init"),
        (lambda: GroupRational(8, "gelu", "safe"), "denominator"),
        (lambda: GroupRational(8, shared="both"), "shared"),
        (lambda: GroupRational(8)(torch.randn(2, 12)), "num_groups"),
        (lambda: rational(torch.randn(2, 4), torch.randn(2, 5), torch.randn(2, 4)), "a must have shape"),
        (lambda: rational(torch.randn(2, 6), torch.randn(2, 6), torch.randn(3, 4)), "a and b"),
        (lambda: VisionTransformer(img_size=30, patch_size=16), "patch_size"),
        (lambda: VisionTransformer(mlp="relu"), "mlp"),
        (lambda: KATMlp(8, 16, variant="official"), "variant"),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
    with pytest.raises(TypeError, match="x must hold floating-point numbers, got torch.int64"):
        GroupRational(2)(torch.arange(4))


def test_converts_what_transformers_calls_gelu_and_follows_device_and_dtype():
    from tests.properties.architectures import build, output

    for name in ("gemma3", "biogpt", "gpt2", "vit", "bert"):
        model = build(name)
        exact = output(model, name, 8)
        assert convert(model)
        assert float((output(model, name, 8) - exact).norm() / exact.norm()) < 0.05
        half = build(name).to(torch.bfloat16)
        convert(half)
        assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
        far = build(name).to("meta")
        convert(far)
        assert {p.device.type for p in far.parameters()} == {"meta"}


def test_the_fused_path_of_torch_does_not_pass_it_by():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, activation=nn.GELU()).eval()
    x = torch.randn(2, 5, 32)
    with torch.no_grad():
        before = layer(x)
        convert(layer)
        close = layer(x)
        assert 0 < float((close - before).abs().max()) < 0.02
        layer.activation.numerator.zero_()
        assert not torch.allclose(layer(x), close)


@pytest.mark.parametrize(
    ("options", "kind"),
    [({"num_groups": 7}, ValueError), ({"num_groups": 2.0}, TypeError), ({"init": "gelu"}, ValueError)],
)
def test_conversion_refuses_before_it_changes(options, kind):
    model = nn.Sequential(nn.Sequential(), nn.TransformerEncoderLayer(32, 4, 64, activation=nn.GELU()))
    before = [type(m) for m in model.modules()]
    with pytest.raises(kind, match=next(iter(options))):
        convert(model, **options)
    assert [type(m) for m in model.modules()] == before


@pytest.mark.parametrize("denominator", ["sum_of_abs", "abs_of_sum"])
def test_far_out_it_is_finite_where_the_kernel_is(denominator):
    a, b = (torch.tensor(c)[None] for c in fitted("swish", denominator))
    x = torch.tensor([[6e7, -6e7, 1e7, 3e3]]).T.contiguous()
    wanted = rational_reference(x.double(), a.double(), b.double(), denominator)
    found = rational_reference(x, a, b, denominator)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=0)
    torch.testing.assert_close(rational(x, a, b, denominator=denominator), found, rtol=1e-4, atol=0)
    x.requires_grad_()
    rational_reference(x, a, b, denominator).sum().backward()
    assert x.grad.isfinite().all()


LARGE = (1e6, 1e7, 6e7, 1e10, -1e20, 1e37)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize(("groups", "width"), [(1, 16), (3, 5), (2, 32)])
def test_large_numbers_are_not_lost_in_their_powers(form, compiled, groups, width, monkeypatch):
    """Values and gradients against float64, where the fifth power of 10^37 is a number."""
    if not compiled:
        monkeypatch.setattr(kernels, "load", lambda name: False)
    torch.manual_seed(0)
    a, b = torch.rand(groups, 6) + 0.5, torch.rand(groups, 4) + 0.5
    x = torch.randn(len(LARGE) + 2, groups * width)
    for row, size in enumerate(LARGE):
        x[row, row] = size
    tensors = [t.requires_grad_() for t in (x, a, b)]
    exact = [t.detach().double().requires_grad_() for t in tensors]
    y, wanted = rational(*tensors, denominator=form), rational(*exact, denominator=form)
    torch.testing.assert_close(y.double(), wanted, rtol=2e-5, atol=1e-6)
    up = torch.where(x.detach().abs() > 1e5, x.detach().abs() ** -1.0, 1.0)  # so that gradients of a stay numbers
    for found, true in zip(
        torch.autograd.grad(y, tensors, up), torch.autograd.grad(wanted, exact, up.double()), strict=True
    ):
        torch.testing.assert_close(found.double(), true, rtol=1e-4, atol=1e-4)


def test_gradients_of_gradients_are_refused_not_wrong():
    x = torch.randn(2, 6, requires_grad=True)
    y = rational(x, torch.randn(2, 6), torch.randn(2, 4))
    (slope,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="twice"):
        slope.sum().backward()


def test_sizes_and_options_that_do_nothing_are_refused():
    small = {"img_size": 8, "patch_size": 4, "embed_dim": 16, "depth": 1, "num_heads": 2, "num_classes": 3}
    for change in ({"patch_size": 0}, {"num_classes": -1}, {"mlp_ratio": 0.0}, {"mlp_ratio": float("nan")}):
        with pytest.raises(ValueError, match=next(iter(change))):
            VisionTransformer(**{**small, **change})
    for change in ({"img_size": 8.0}, {"depth": True}):
        with pytest.raises(TypeError, match=next(iter(change))):
            VisionTransformer(**{**small, **change})
    with pytest.raises(ValueError, match="options must be left out"):
        VisionTransformer(**small, mlp="gelu", num_groups=4)
    with pytest.raises(ValueError, match="x must have shape"):
        VisionTransformer(**small)(torch.randn(2, 3, 4, 16))  # as many patches, of another image
    for dim, hidden in ((10, 16), (16, 10)):
        with pytest.raises(ValueError, match="num_groups"):
            KATMlp(dim, hidden)
    with pytest.raises(ValueError, match="a must lie on meta"):
        rational(torch.ones(2, 6, device="meta"), torch.ones(1, 6), torch.ones(1, 4))
    assert rational(torch.ones(3, 0), torch.ones(1, 6), torch.ones(1, 4)).shape == (3, 0)
