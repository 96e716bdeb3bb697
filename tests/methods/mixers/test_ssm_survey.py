from __future__ import annotations

import inspect
import math
from typing import get_args

import pytest
import torch
import torch.nn.functional as F
from tests.properties.mixers import check_mixer
from torch import nn

from assay.experiments.mixers.training import evaluate, parameter_groups, train
from assay.measure.cost import count_cost
from assay.methods.core import kernels
from assay.methods.core.mixers.model import MixerConfig, MixerForCausalLM
from assay.methods.core.mixers.orders import ORDERS, scan_order
from assay.methods.core.mixers.scan import Backend
from assay.methods.core.mixers.ssm import Dynamics, SelectiveSSM
from assay.methods.mixers.ssm_survey import (
    GRID_MIXERS,
    S4D,
    Block,
    Classifier,
    Encoder,
    FullAttention,
    Mamba,
    Mamba2,
    ScanMixer,
    UNet,
    WindowAttention,
    attention_flops,
    dice,
    dice_loss,
    hausdorff_distance,
    mamba_parameters,
    match_width,
    taxonomy,
)
from assay.workloads.sequences import batches_of, selective_copying


def parameters(module):
    return sum(p.numel() for p in module.parameters())


# ---------------------------------------------------------------------------------------------------------- sequence mixers


@pytest.mark.parametrize(
    ("make", "longest"),
    [
        (lambda: Mamba(12, states=4), 768),
        (lambda: Mamba(6, states=3, conv=1, discretisation="zoh", backend="associative"), 97),
        (lambda: Mamba2(16, states=5, head_dim=8, chunk=16), 768),
        (lambda: Mamba2(12, states=4, head_dim=4, groups=3, conv=2, chunk=97), 97),
        (lambda: S4D(12, states=6), 768),
    ],
    ids=["mamba", "mamba-zoh", "mamba2", "mamba2-groups", "s4d"],
)
def test_is_a_mixer(make, longest):
    check_mixer(make, longest=longest)


@pytest.mark.parametrize("backend", get_args(Backend))
def test_back_ends_of_the_mamba_block_agree(backend):
    if backend == "kernel" and not kernels.load("scan"):
        pytest.skip("no compiler")
    torch.manual_seed(0)
    mixer, reference = Mamba(24, backend=backend), Mamba(24, backend="sequential")
    reference.load_state_dict(mixer.state_dict())
    x = torch.randn(2, 300, 24)
    torch.testing.assert_close(mixer(x), reference(x), atol=1e-5, rtol=1e-4)


def test_long_sequences_of_s4d_go_through_the_fft_and_agree_with_the_recurrence():
    mixer = S4D(8, states=6).double()
    x = torch.randn(2, 300, 8, dtype=torch.float64)
    torch.testing.assert_close(mixer.chunked(x, chunk=50)[0], mixer(x), atol=1e-10, rtol=1e-10)
    y, h = x, mixer.init_state(2, dtype=x.dtype)
    steps = []
    for t in range(300):
        y, h = mixer.step(x[:, t], h)
        steps.append(y)
    torch.testing.assert_close(torch.stack(steps, 1), mixer(x), atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("make", [lambda: Mamba(12, states=4), lambda: Mamba2(16, states=4, head_dim=8)])
def test_a_row_of_padding_alone_is_harmless(make):
    torch.manual_seed(0)
    mixer = make()
    x, mask = torch.randn(2, 70, mixer.dim), torch.ones(2, 70, dtype=torch.bool)
    mask[1] = False
    y = mixer(x, mask)
    torch.testing.assert_close(y[:1], mixer(x[:1]))
    assert y.isfinite().all()
    _, state = mixer.advance(x, mixer.init_state(2), mask)
    assert not state["ssm"][1].any()
    assert not state["conv"][1].any()
    y.square().sum().backward()
    assert all(p.grad.isfinite().all() for p in mixer.parameters())


def test_mamba_begins_as_the_paper_says():
    mixer = Mamba(40)
    dynamics = mixer.ssm.dynamics
    assert mixer.ssm.width == 80
    assert mixer.ssm.dt_rank == 3  # a sixteenth of the model's width, rounded up
    torch.testing.assert_close(dynamics.A_log.exp(), torch.arange(1.0, 17).expand(80, 16))
    assert (dynamics.D == 1).all()
    step = F.softplus(dynamics.dt_bias)
    assert step.min() >= 0.999e-3
    assert step.max() <= 1.001e-1
    many = F.softplus(
        Dynamics(20000, 1).dt_bias.detach()
    ).log()  # log-uniform: mean and spread of a uniform of that width
    assert abs(float(many.mean()) - math.log(1e-2)) < 0.05
    assert abs(float(many.std()) - math.log(100) / 12**0.5) < 0.05
    assert mixer.ssm.dt_weight.abs().max() <= 3**-0.5
    heads = Mamba2(32, head_dim=8, states=4).dynamics
    assert heads.A_log.shape == (8,)
    assert (heads.A_log.exp() >= 1).all()
    assert (heads.A_log.exp() <= 16).all()


@pytest.mark.parametrize(("dim", "options"), [(40, {}), (32, {"states": 8, "expand": 3, "conv": 3, "dt_rank": 5})])
def test_parameters_and_flops_follow_the_formula(dim, options):
    mixer = Mamba(dim, **options)
    assert parameters(mixer) == mamba_parameters(dim, **options)
    assert mixer.flops(200) == 2 * mixer.flops(100)
    if kernels.load("scan"):
        costs = [count_cost(mixer, torch.randn(1, n, dim)) for n in (64, 128)]
        assert [cost.flops for cost in costs] == [mixer.flops(64), mixer.flops(128)]


def test_attention_grows_with_the_square_and_states_do_not_grow():
    projections, scores = zip(*(attention_flops(n, 64) for n in (1024, 2048)), strict=True)
    assert projections[1] == 2 * projections[0]
    assert scores[1] == 4 * scores[0]
    block = FullAttention(32, head_dim=8)
    for n in (8, 16):
        counted = count_cost(block, torch.randn(1, n, n, 32)).flops
        assert counted == sum(attention_flops(n * n, 32, causal=False)) + 2 * 9 * 32 * n * n
    mixer = Mamba(40)
    assert mixer.state_bytes(1) == mixer.state_bytes(100_000) == 80 * (3 + 16) * 4
    assert Mamba2(32, head_dim=8, states=4).state_bytes(7) == ((64 + 8) * 3 + 8 * 8 * 4) * 4
    assert S4D(16, states=8).state_bytes(10**6) == 16 * 4 * 8


@pytest.mark.parametrize("name", ["mamba", "mamba2", "s4d"])
def test_dynamics_stay_float32_without_weight_decay_and_survive_the_initialisation_of_models(name, tmp_path):
    torch.manual_seed(0)
    layers = [[name, {"states": 4} | ({"head_dim": 8} if name == "mamba2" else {})]] * 2
    model = MixerForCausalLM(MixerConfig(vocab_size=32, hidden_size=16, layers=layers)).eval()
    kept = [p for n, p in model.named_parameters() if ".dynamics." in n]
    assert len(kept) == 2 * (5 if name == "s4d" else 3)
    if name != "s4d":
        for n, p in model.named_parameters():
            if n.endswith("dt_bias"):
                assert (F.softplus(p) >= 0.999e-3).all()
                assert (F.softplus(p) <= 1.001e-1).all()
                assert p.std() > 0.1
    if (
        name == "mamba"
    ):  # not the narrow weights of language models, with which three projections in a row learn nothing
        ssm = model.blocks[1].mixer.ssm
        assert float(model.blocks[0].mixer.in_proj.weight.detach().std()) == pytest.approx((3 * 16) ** -0.5, rel=0.15)
        assert float(ssm.x_proj.weight.detach().std()) == pytest.approx((3 * 32) ** -0.5, rel=0.25)
        assert ssm.dt_weight.detach().abs().max() > 0.5
    groups = parameter_groups(model, lr=1e-3, weight_decay=0.1)
    undecayed = {id(p) for group in groups if group["weight_decay"] == 0 for p in group["params"]}
    assert all(id(p) in undecayed for p in kept)
    assert all(id(b.mixer.out_proj.weight) not in undecayed for b in model.blocks)
    values = [p.detach().clone() for p in kept]
    low = model.to(torch.bfloat16)
    assert all(p.dtype == torch.float32 and torch.equal(p, v) for p, v in zip(kept, values, strict=True))
    assert low.blocks[0].mixer.out_proj.weight.dtype == torch.bfloat16
    ids = torch.randint(1, 32, (2, 12))
    assert low(ids).logits.isfinite().all()
    low.save_pretrained(tmp_path)
    again = MixerForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert again.lm_head.weight.dtype == torch.bfloat16
    loaded = [p for n, p in again.named_parameters() if ".dynamics." in n]
    assert all(p.dtype == torch.float32 for p in loaded)
    assert all(torch.allclose(p, v, rtol=1e-2, atol=1e-3) for p, v in zip(loaded, values, strict=True))
    assert all(p.dtype == torch.float64 for p in model.double().parameters())


@pytest.mark.parametrize("layers", [["mamba", "mamba2"], ["s4d", "mamba"]])
def test_generates_with_padding_and_comes_back_from_disk(layers, tmp_path):
    torch.manual_seed(0)
    options = {"mamba": {"states": 4}, "mamba2": {"states": 4, "head_dim": 8}, "s4d": {"states": 8}}
    config = MixerConfig(vocab_size=32, hidden_size=16, layers=[[name, options[name]] for name in layers])
    made = MixerForCausalLM(config).eval()
    with torch.no_grad():
        for p in made.parameters():
            p.add_(0.05 * torch.randn_like(p))
    made.save_pretrained(tmp_path)
    model = MixerForCausalLM.from_pretrained(tmp_path).eval()
    for (n, p), q in zip(made.named_parameters(), model.parameters(), strict=True):
        assert torch.equal(p, q), n
    ids = torch.randint(1, 32, (2, 20))
    mask = torch.ones_like(ids)
    mask[1, :9] = 0
    out = model.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False, pad_token_id=0, eos_token_id=-1)
    alone = model.generate(ids[1:, 9:], max_new_tokens=6, do_sample=False, pad_token_id=0, eos_token_id=-1)
    assert torch.equal(out[1, 20:], alone[0, 11:])
    for t in range(20, 26):
        assert torch.equal(model(out[:1, :t]).logits[:, -1].argmax(-1), out[:1, t])


@pytest.mark.slow
def test_a_selective_model_learns_to_choose_what_a_time_invariant_one_cannot():
    accuracy = {}
    task = {"length": 32, "tokens": 2, "vocab": 8}
    for name, options in (("mamba", {"states": 16}), ("s4d", {"states": 32})):
        torch.manual_seed(0)
        layers = [[name, options]] * 2
        model = MixerForCausalLM(MixerConfig(vocab_size=8, hidden_size=32, layers=layers))
        train(model, batches_of(selective_copying, 32, **task), steps=400, lr=1e-2)
        accuracy[name] = float(evaluate(model, *selective_copying(64, seed=10**6, **task))["accuracy"].mean())
    assert accuracy["mamba"] > 0.95, accuracy
    assert accuracy["s4d"] < 0.85, accuracy


# -------------------------------------------------------------------------------------------------------------- grid mixers


@pytest.mark.parametrize("order", [name for name in ORDERS if name != "volume"])
@pytest.mark.parametrize("tied", [True, False])
def test_scan_mixer_is_the_sum_of_its_directions(order, tied):
    torch.manual_seed(0)
    mixer = ScanMixer(8, order=order, states=4, tied=tied).double()
    u = torch.randn(2, 35, 16, dtype=torch.float64)
    wanted = torch.zeros_like(u)
    for k, way in enumerate(scan_order(order, 5, 7)):
        y, _ = mixer.ssm[0 if tied else k](u[:, way])
        wanted[:, way] += y
    torch.testing.assert_close(mixer.scanned(u, 5, 7), wanted)
    assert len(mixer.ssm) == (1 if tied else len(scan_order(order, 5, 7)))


def test_tied_four_way_scan_turns_with_the_image_and_a_raster_does_not():
    torch.manual_seed(0)
    u = torch.randn(1, 6, 9, 16, dtype=torch.float64)

    def scanned(mixer, u):
        return mixer.scanned(u.flatten(1, 2), 6, 9).view(u.shape)

    for order, equivariant in (("cross", True), ("bidirectional", True), ("raster", False)):
        mixer = ScanMixer(8, order=order, states=4, tied=True).double()
        turned = scanned(mixer, u.rot90(2, (1, 2))).rot90(2, (1, 2))
        same = torch.allclose(turned, scanned(mixer, u), atol=1e-10)
        assert same == equivariant, order


@pytest.mark.parametrize(("order", "seen"), [("raster", 8 * 4 + 5), ("bidirectional", 64), ("cross", 64)])
def test_receptive_field_of_a_scan(order, seen):
    mixer = ScanMixer(4, order=order, states=2).double()
    u = torch.randn(1, 64, 8, dtype=torch.float64, requires_grad=True)
    (grad,) = torch.autograd.grad(mixer.scanned(u, 8, 8)[0, 8 * 4 + 4].sum(), u)
    assert int((grad.abs().sum(-1) > 0).sum()) == seen


def window_reference(mixer, x):
    """Each cell against the cells of its window, one by one."""
    batch, height, width, dim = x.shape
    placed = x + mixer.position(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    rows, columns = min(mixer.window, height), min(mixer.window, width)
    down, right = (mixer.shift if height > rows else 0), (mixer.shift if width > columns else 0)
    row, column = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")

    def window_of(i, shift, size, length):  # windows start at `shift`; what lies before it is the wrapped part
        return torch.where(i < shift, -1, (i - shift) // size)

    label = torch.stack([window_of(row, down, rows, height), window_of(column, right, columns, width)], -1).view(-1, 2)
    allowed = (label[:, None] == label[None]).all(-1)
    return mixer.proj(mixer._attend(placed.flatten(1, 2), allowed)).view(x.shape)


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("size", [(8, 8), (16, 8), (16, 24), (12, 20), (5, 3), (9, 17)])
def test_window_attention_sees_its_window_and_nothing_else(size, layer):
    torch.manual_seed(0)
    mixer = WindowAttention(16, window=8, head_dim=8, layer=layer).double()
    x = torch.randn(2, *size, 16, dtype=torch.float64)
    torch.testing.assert_close(mixer(x), window_reference(mixer, x))


def test_one_window_is_full_attention():
    mixer, full = WindowAttention(16, window=8, head_dim=8, layer=1), FullAttention(16, head_dim=8)
    full.load_state_dict(mixer.state_dict())
    x = torch.randn(2, 8, 6, 16)
    torch.testing.assert_close(mixer(x), full(x))
    assert FullAttention(96, head_dim=32).heads == 3
    assert FullAttention(20, head_dim=8).heads == 2
    assert FullAttention(8).heads == 1


# ------------------------------------------------------------------------------------------------------------------- models


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("mixer", list(GRID_MIXERS))
def test_the_u_shape_gives_a_logit_a_pixel_and_gradients_everywhere(mixer, groups):
    torch.manual_seed(0)
    model = UNet(2, 3, mixer=mixer, dim=8, depths=(1, 2, 1), patch=2, groups=groups)
    image = torch.randn(2, 2, 24, 32)
    logits = model(image)
    assert logits.shape == (2, 3, 24, 32)
    dice_loss(logits, (torch.randn(2, 3, 24, 32) > 0).float()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    with torch.no_grad():
        torch.testing.assert_close(model(image[1:]), logits[1:], atol=1e-5, rtol=1e-4)
        for dtype in (torch.float16, torch.bfloat16):
            low = model.to(dtype)(image.to(dtype))
            assert low.dtype == dtype
            assert (low.float() - logits).norm() < 0.1 * logits.norm()


GRID_OPTIONS = [
    ("attention", {}, "head_dim", 4),
    ("window", {}, "head_dim", 4),
    ("window", {}, "window", 2),
    ("s6", {}, "order", "raster"),
    ("s6", {"order": "window"}, "order_options", {"window": 2}),
    ("s6", {}, "states", 3),
    ("s6", {}, "expand", 3),
    ("s6", {}, "tied", True),
    ("s6", {}, "discretisation", "zoh"),
    ("s6", {}, "backend", "sequential"),
]


@pytest.mark.parametrize(("mixer", "base", "option", "value"), GRID_OPTIONS)
def test_an_option_of_a_grid_mixer_changes_it(mixer, base, option, value):
    def seen(**options):
        torch.manual_seed(0)
        made = GRID_MIXERS[mixer](8, **base, **options)
        torch.manual_seed(1)
        return [tuple(p.shape) for p in made.parameters()], made(torch.randn(1, 6, 5, 8)).detach()

    (shapes, y), (other_shapes, other) = seen(), seen(**{option: value})
    if option == "backend":
        torch.testing.assert_close(other, y, atol=1e-5, rtol=1e-4)
    else:
        assert other_shapes != shapes or not torch.equal(other, y)


def test_all_options_of_grid_mixers_are_tried():
    for name, kind in GRID_MIXERS.items():
        options = set(inspect.signature(kind.__init__).parameters) - {"self", "dim", "dims", "layer"}
        assert options == {option for mixer, _, option, _ in GRID_OPTIONS if mixer == name}


def test_groups_share_one_mixer():
    torch.manual_seed(0)
    block, x = Block(12, groups=3, states=2, order="raster"), torch.randn(2, 4, 5, 12)
    normed = block.norm(x)
    wanted = torch.cat([block.mixer(normed[..., i : i + 4]) for i in (0, 4, 8)], -1)
    torch.testing.assert_close(block(x), x + wanted)
    assert parameters(block) < parameters(Block(12, states=2, order="raster")) / 4
    unshared = Block(12, groups=1, states=2, order="raster")
    torch.testing.assert_close(unshared(x), x + unshared.mixer(unshared.norm(x)))


def test_features_classifier_and_the_form_of_vm_unet():
    encoder = Encoder(3, 8, (1, 1, 1), 4, mixer="conv")
    assert encoder.channels == [8, 16, 32]
    assert encoder.reduction == [4, 8, 16]
    features = encoder(torch.randn(1, 3, 32, 48))
    assert [tuple(f.shape) for f in features] == [(1, 8, 12, 8), (1, 4, 6, 16), (1, 2, 3, 32)]
    assert Classifier(3, 10, dim=8, depths=(1, 1), mixer="window")(torch.randn(2, 3, 32, 32)).shape == (2, 10)
    assert Classifier(3, 0, dim=8, depths=(1, 1), mixer="conv")(torch.randn(2, 3, 32, 32)).shape == (2, 16)
    with torch.device("meta"):
        model = UNet(3, 1)
    assert [len(stage) for stage in model.encoder.stages] == [2, 2, 2, 2]
    assert model.encoder.channels == [96, 192, 384, 768]
    assert [type(s[0].mixer) for s in model.stages] == [ScanMixer] * 3
    assert model.head.in_channels == 24


def test_expanding_and_merging_keep_cells_where_they_are():
    """An image that is constant but in one patch changes the logits around that patch only, when blocks do nothing."""
    torch.manual_seed(0)
    model = UNet(1, 1, mixer="conv", dim=8, depths=(0, 0), patch=2)
    image = torch.zeros(1, 1, 16, 16)
    other = image.clone()
    other[..., 4:8, 8:12] = torch.rand(4, 4)  # one cell of the last stage
    changed = (model(image) != model(other))[0, 0]
    assert changed[4:8, 8:12].any()
    changed[4:8, 8:12] = False
    assert not changed.any()


def test_widths_match_a_number_of_parameters():
    options = {"in_chans": 1, "num_classes": 1, "depths": (1, 1), "patch": 2}
    for mixer in GRID_MIXERS:
        dim = match_width(60_000, mixer=mixer, **options)
        counts = [parameters(UNet(dim=d, mixer=mixer, **options)) for d in (dim - 4, dim, dim + 4)]
        assert abs(counts[1] - 60_000) == min(abs(c - 60_000) for c in counts)
    with pytest.raises(ValueError, match="parameters"):
        match_width(10**9, most=16, mixer="conv", **options)


@pytest.mark.skipif(not kernels.load("scan"), reason="no compiler")
def test_flops_of_the_segmentation_model_are_linear_for_scans_and_not_for_attention():
    def flops(mixer, size):
        return count_cost(UNet(1, 1, mixer=mixer, dim=8, depths=(1, 1), patch=2), torch.randn(1, 1, size, size)).flops

    for mixer in ("conv", "s6", "window"):
        assert flops(mixer, 64) == 4 * flops(mixer, 32), mixer
    assert flops("attention", 64) > 5 * flops("attention", 32)


# ------------------------------------------------------------------------------------------------------------------ volumes


@pytest.mark.parametrize("mixer", list(GRID_MIXERS))
def test_volumes_are_segmented_and_classified(mixer):
    torch.manual_seed(0)
    model = UNet(2, 3, mixer=mixer, dim=8, depths=(1, 2, 1), patch=2, dims=3, groups=2)
    volume = torch.randn(2, 2, 8, 16, 24)
    logits = model(volume)
    assert logits.shape == (2, 3, 8, 16, 24)
    dice_loss(logits, (torch.randn(2, 3, 8, 16, 24) > 0).float()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert Classifier(2, 5, mixer=mixer, dim=8, depths=(1, 1), patch=2, dims=3)(volume).shape == (2, 5)


def test_a_volume_is_scanned_along_all_three_axes():
    torch.manual_seed(0)
    mixer = ScanMixer(8, states=4, dims=3).double()
    assert mixer.order == "volume"
    assert ScanMixer(8, states=4).order == "cross"
    u = torch.randn(2, 2 * 3 * 4, 16, dtype=torch.float64)
    order = scan_order("volume", 2, 3, 4)
    wanted = torch.zeros_like(u)
    for k, way in enumerate(order):
        wanted[:, way] += mixer.ssm[k](u[:, way])[0]
    torch.testing.assert_close(mixer.scanned(u, 2, 3, 4), wanted)
    assert len(mixer.ssm) == len(order) == 3


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("size", [(4, 4, 4), (8, 4, 12), (5, 3, 9)])
def test_windows_in_a_volume_see_their_cells_and_nothing_else(size, layer):
    torch.manual_seed(0)
    mixer = WindowAttention(8, window=4, head_dim=8, layer=layer, dims=3).double()
    x = torch.randn(2, *size, 8, dtype=torch.float64)
    placed = x + mixer.position(x.movedim(-1, 1)).movedim(1, -1)
    label = []
    for i, n in zip(torch.meshgrid(*(torch.arange(n) for n in size), indexing="ij"), size, strict=True):
        cells = min(4, n)
        shift = mixer.shift if n > cells else 0
        label.append(torch.where(i < shift, -1, (i - shift) // cells))
    label = torch.stack(label, -1).view(-1, 3)
    allowed = (label[:, None] == label[None]).all(-1)
    wanted = mixer.proj(mixer._attend(placed.flatten(1, 3), allowed)).view(x.shape)
    torch.testing.assert_close(mixer(x), wanted)


def test_a_volume_of_one_slice_is_an_image_to_a_scan():
    torch.manual_seed(0)
    image, volume = ScanMixer(4, order="raster", states=2), ScanMixer(4, order="raster", states=2, dims=3)
    u = torch.randn(1, 20, 8)
    volume.ssm.load_state_dict(image.ssm.state_dict())
    assert torch.equal(image.scanned(u, 4, 5), volume.scanned(u, 1, 4, 5))


def test_merging_and_expanding_keep_the_cells_of_a_volume_where_they_are():
    torch.manual_seed(0)
    model = UNet(1, 1, mixer="conv", dim=8, depths=(0, 0), patch=2, dims=3)
    volume = torch.zeros(1, 1, 8, 8, 16)
    other = volume.clone()
    other[..., 4:8, 0:4, 8:12] = torch.rand(4, 4, 4)
    changed = (model(volume) != model(other))[0, 0]
    assert changed[4:8, 0:4, 8:12].any()
    changed[4:8, 0:4, 8:12] = False
    assert not changed.any()


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("mixer", list(GRID_MIXERS))
def test_no_images_give_no_logits_and_odd_ones_are_refused(mixer, dims):
    options = {"mixer": mixer, "dim": 8, "depths": (1, 1), "patch": 2, "dims": dims}
    model, classifier = UNet(1, 2, **options), Classifier(1, 3, **options)
    sides = [8] * dims
    assert model(torch.zeros(0, 1, *sides)).shape == (0, 2, *sides)
    assert classifier(torch.zeros(0, 1, *sides)).shape == (0, 3)
    for wrong in (torch.int64, torch.uint8, torch.complex64):
        with pytest.raises(TypeError, match="image must hold floating-point numbers"):
            model(torch.zeros(1, 1, *sides).to(wrong))
    with pytest.raises(ValueError, match="divisible by 4"):
        model(torch.zeros(1, 1, *sides[:-1], 0))
    with pytest.raises(ValueError, match="image must have shape"):
        model(torch.zeros(1, 2, *sides))
    with pytest.raises(ValueError, match="image must have shape"):
        model(torch.zeros(1, 1, *sides, 8))


# ---------------------------------------------------------------------------------------------------------- released settings


def test_defaults_are_those_of_the_released_models():
    mixer = Mamba(64)
    ssm = mixer.ssm
    released = {"d_state": 16, "d_conv": 4, "expand": 2, "dt_rank": 4, "bias": False, "conv_bias": True}
    found = (ssm.states, mixer.conv_weight.shape[1], ssm.width // 64, ssm.dt_rank, mixer.in_proj.bias is not None)
    assert dict(zip(released, (*found, mixer.conv_bias is not None), strict=True)) == released
    assert mixer.out_proj.bias is None
    assert ssm.x_proj.bias is None
    newer = Mamba2(64)
    released = {"d_state": 128, "d_conv": 4, "expand": 2, "headdim": 64, "ngroups": 1, "bias": False, "conv_bias": True}
    found = (newer.states, newer.conv_weight.shape[1], newer.width // 64, newer.head_dim, newer.groups)
    assert (
        dict(zip(released, (*found, newer.in_proj.bias is not None, newer.conv_bias is not None), strict=True))
        == released
    )
    assert newer.dynamics.D.shape == (2,)  # one a head
    older = S4D(64)
    assert older.states == 64
    assert older.out_proj.bias is not None
    torch.manual_seed(0)
    start = S4D(2000, states=4).dynamics
    assert (start.A_log.exp() == 0.5).all()
    torch.testing.assert_close(start.A_imag[0], math.pi * torch.arange(2.0))
    for part in (start.D, 2**0.5 * start.C):  # complex C of variance 1
        assert float(part.detach().std()) == pytest.approx(1, rel=0.05)
    step = start.log_dt.exp()
    assert 0.999e-3 <= float(step.min()) < 2e-3
    assert 0.05 < float(step.max()) <= 1.001e-1


@pytest.mark.parametrize("kind", [Mamba, Mamba2])
def test_the_start_of_the_released_models(kind):
    """Convolutions as torch's; the last projection divided by the root of the number of layers."""
    torch.manual_seed(0)
    one, many = kind(64), kind(64, layer=3, layers=16)
    for taps in (one.conv_weight, one.conv_bias):
        assert taps.abs().max() <= 0.5
        assert float(taps.detach().std()) == pytest.approx(0.5 / 3**0.5, rel=0.15)
    ratio = float(one.out_proj.weight.detach().std() / many.out_proj.weight.detach().std())
    assert ratio == pytest.approx(4, rel=0.05)
    assert float(many.in_proj.weight.detach().std()) == pytest.approx(
        float(one.in_proj.weight.detach().std()), rel=0.05
    )


# ------------------------------------------------------------------------------------------------------------------ metrics


def test_dice():
    y = torch.zeros(3, 1, 4, 4)
    y[:2, :, :2] = 1
    found = dice(torch.roll(y, 1, 2), y)
    assert found[0, 0] == found[1, 0] == 0.5
    assert found[2, 0].isnan()
    assert (dice(y[:2], y[:2].bool()) == 1).all()
    assert dice(torch.zeros(1, 1, 4, 4), y[:1]) == 0
    sure = torch.where(y[:2] == 1, 50.0, -50.0)
    assert float(dice_loss(sure, y[:2])) == pytest.approx(0, abs=1e-4)
    assert float(dice_loss(-sure, y[:2])) == pytest.approx(1, abs=1e-4)
    assert float(dice_loss(torch.full_like(sure, -50), 0 * y[:2])) == pytest.approx(0, abs=1e-4)


def border_reference(mask):
    found = []
    for index in mask.nonzero().tolist():
        for axis in range(mask.ndim):
            for side in (-1, 1):
                near = [i + side * (a == axis) for a, i in enumerate(index)]
                if any(not 0 <= i < n for i, n in zip(near, mask.shape, strict=True)) or not mask[tuple(near)]:
                    found.append(tuple(index))
    return sorted(set(found))


@pytest.mark.parametrize("shape", [(12, 9), (5, 6, 4)])
@pytest.mark.parametrize("percentile", [95.0, 100.0])
def test_hausdorff_distance_by_brute_force(shape, percentile):
    generator = torch.Generator().manual_seed(0)
    masks = torch.rand(2, 2, 1, *shape, generator=generator) > 0.6
    spacing = [1.0, 0.5, 2.0][: len(shape)]
    found = hausdorff_distance(masks[0], masks[1], percentile=percentile, spacing=spacing)
    for image in range(2):
        a, b = (border_reference(mask[image, 0]) for mask in masks)
        distance = [
            [math.sqrt(sum((s * (i - j)) ** 2 for s, i, j in zip(spacing, p, q, strict=True))) for q in b] for p in a
        ]
        ways = [
            torch.tensor([min(row) for row in distance]),
            torch.tensor([min(c) for c in zip(*distance, strict=True)]),
        ]
        wanted = max(float(torch.quantile(way.double(), percentile / 100)) for way in ways)
        assert float(found[image, 0]) == pytest.approx(wanted)


def test_hausdorff_distance_of_moved_and_missing_masks():
    y = torch.zeros(1, 2, 20, 20)
    y[:, :, 5:10, 5:10] = 1
    moved = torch.roll(y, 3, 3)
    assert (hausdorff_distance(moved, y, percentile=100) == 3).all()
    assert (hausdorff_distance(y, y) == 0).all()
    y[:, 1] = 0
    found = hausdorff_distance(y, moved)
    assert found[0, 1].isinf()
    assert hausdorff_distance(y, y)[0, 1].isnan()


# ----------------------------------------------------------------------------------------------------------------- taxonomy


def test_every_row_of_the_taxonomy_builds():
    rows = taxonomy()
    assert len({row.method for row in rows}) == len({row.arxiv for row in rows}) == len(rows) >= 15
    for row in rows:
        assert row.design in ("pure", "hybrid")
        assert row.year in (2023, 2024)
        assert (row.builder.get("dims", 2) == 3) <= ("3d" in row.dimension)
        if row.order in ORDERS:
            assert row.builder["order"] == row.order
    with torch.device("meta"):
        for task, builder in {str(row.builder): (row.task, row.builder) for row in rows}.values():
            assert parameters((Classifier if task == "classification" else UNet)(**builder)) > 0
        light = UNet(**next(row for row in rows if row.method == "UltraLight VM-UNet").builder)
    assert parameters(light) < 500_000


def test_taxonomy_filters():
    volumes = taxonomy(task="segmentation", dimension="3d")
    assert {"U-Mamba", "SegMamba"} <= {row.method for row in volumes}
    assert all(row.task == "segmentation" and "3d" in row.dimension for row in volumes)
    assert {row.method for row in taxonomy(modality="mri", order="cross", task="registration")} == {"VMambaMorph"}
    assert taxonomy(task="anything") == []
    assert len(taxonomy(year=2024)) == len(taxonomy())
    with pytest.raises(ValueError, match="organs"):
        taxonomy(organs="brain")


# ------------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Mamba(16, states=0), "states"),
        (lambda: Mamba(16, conv=0), "conv"),
        (lambda: SelectiveSSM(16, dt_rank=0), "dt_rank"),
        (lambda: Mamba2(16, head_dim=5), "head_dim"),
        (lambda: Mamba2(16, head_dim=16, groups=4), "groups"),
        (lambda: S4D(16, states=5), "states must be even"),
        (lambda: ScanMixer(16, order="spiral"), "order must be one of"),
        (lambda: ScanMixer(16, order="volume"), "size"),
        (lambda: WindowAttention(16, window=0), "window"),
        (lambda: Block(16, mixer="pool"), "mixer must be one of"),
        (lambda: Block(16, groups=3), "groups must divide"),
        (lambda: UNet(dim=10, patch=4), "patch must divide"),
        (lambda: UNet(1, 1, dim=8, depths=(1, 1), patch=2, mixer="conv")(torch.ones(1, 1, 30, 32)), "divisible by 4"),
        (lambda: UNet(1, 0), "num_classes"),
        (lambda: UNet(1, 1, dims=4), "dims must be one of 2, 3"),
        (lambda: ScanMixer(16, order="cross", dims=3), "size"),
        (lambda: ScanMixer(16, order="raster", order_options={"window": 4}), "options of order"),
        (lambda: Block(8, mixer="conv")(torch.ones(1, 4, 8)), "x must have shape"),
        (lambda: match_width(0), "parameters"),
        (lambda: dice_loss(torch.ones(1, 1, 4), torch.ones(1, 1, 5)), "target must have shape"),
        (lambda: dice_loss(torch.ones(1, 1, 4), torch.ones(1, 1, 4), smooth=float("nan")), "smooth"),
        (lambda: hausdorff_distance(torch.ones(1, 1, 4), torch.ones(1, 1, 4), spacing=(float("nan"),)), "spacing"),
        (lambda: hausdorff_distance(torch.ones(1, 1, 4), torch.ones(1, 1, 4), percentile=float("nan")), "percentile"),
        (lambda: dice(torch.full((1, 1, 4), 0.5), torch.ones(1, 1, 4)), "threshold"),
        (lambda: dice(torch.ones(1, 1, 4), torch.ones(1, 4)), "one shape"),
        (lambda: hausdorff_distance(torch.ones(1, 1, 4, 4), torch.ones(1, 1, 4, 4), percentile=0), "percentile"),
        (lambda: hausdorff_distance(torch.ones(1, 1, 4, 4), torch.ones(1, 1, 4, 4), spacing=(1,)), "spacing"),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_selective_ssm_refuses_what_it_would_cast():
    ssm = SelectiveSSM(8, states=2)
    for wrong in (torch.int64, torch.complex64):
        with pytest.raises(TypeError, match="x must hold floating-point numbers"):
            ssm(torch.ones(1, 3, 8).to(wrong))
    with pytest.raises(ValueError, match="x must have shape"):
        ssm(torch.ones(1, 3, 7))
    y, h = ssm(torch.ones(2, 0, 8))
    assert y.shape == (2, 0, 8)
    assert torch.equal(h, torch.zeros(2, 8, 2))


def test_float32_parameters_keep_their_gradients_too():
    dynamics = Dynamics(4, 2)
    dynamics.A_log.sum().backward()
    dynamics.half()
    assert dynamics.A_log.dtype == dynamics.A_log.grad.dtype == torch.float32
    holder = nn.Sequential(nn.Linear(4, 4), dynamics).to(torch.bfloat16)
    assert holder[0].weight.dtype == torch.bfloat16
    assert holder[1].D.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_loss_counts_the_cells_of_large_images_in_half_precision(dtype):
    target = (torch.arange(90000).view(1, 1, 300, 300) % 3 == 0).to(dtype)
    logits = (4 * target - 2).to(dtype)
    torch.testing.assert_close(
        dice_loss(logits, target).double(), dice_loss(logits.double(), target.double()), rtol=1e-4, atol=0
    )
    with pytest.raises(ValueError, match=r"target must hold numbers in \[0, 1\]"):
        dice_loss(logits, 3 * target)
    with pytest.raises(ValueError, match="logits must be"):
        dice_loss(logits[0, 0], target[0, 0])
