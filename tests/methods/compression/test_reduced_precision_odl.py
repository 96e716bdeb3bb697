"""Sixteen-bit training: arithmetic rounded after every operation, layers under it, updates that stall, and the model of its cost."""

import copy
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from assay.methods.compression.reduced_precision_odl import (
    LayerShape,
    Microcontroller,
    NumericsPolicy,
    ReducedAdamW,
    ReducedSGD,
    emulate,
    fits,
    im2col,
    layer_shapes,
    matmul,
    matmul_reference,
    product_cycles,
    round_nearest,
    round_number,
    round_stochastic,
    training_macs,
    training_memory,
    training_step,
)

SIXTEEN = ("float16", "bfloat16")
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
WIDE = NumericsPolicy("float32")


def random(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def net():
    """Every kind of layer that is emulated: strided, depthwise and pointwise convolutions, a linear layer."""
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(2, 6, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(6, 6, 3, padding=1, groups=6), nn.ReLU()),
        *(nn.Conv2d(6, 4, 1), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 3 * 4, 5)),
    )


# Numbers ------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SIXTEEN)
def test_every_value_of_a_format_is_its_own_rounding_and_the_middles_go_to_the_even_one(name):
    values = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(DTYPES[name]).double()
    values = values[values.isfinite()].unique()
    assert torch.equal(round_nearest(values, name), values)
    middles = (values[1:] + values[:-1]) / 2  # exact in float64
    assert torch.equal(round_nearest(middles, name), middles.float().to(DTYPES[name]).double())  # torch's cast: to even


@pytest.mark.parametrize("name", DTYPES)
def test_one_number_is_rounded_as_many_are(name):
    numbers = torch.cat([random(200).double() * 10.0**e for e in (-41, -30, -8, -6, 0, 3, 5)])
    assert [round_number(x, name) for x in numbers.tolist()] == round_nearest(numbers, name).tolist()


def test_rounding_once_differs_from_a_cast_by_way_of_float32():
    x = 1 + 2.0**-11 + 2.0**-40  # just above the middle of two values of float16; float32 drops what is above
    assert torch.tensor([x], dtype=torch.float64).float().half().item() == 1.0
    assert round_number(x, "float16") == 1 + 2.0**-10
    assert round_nearest(torch.tensor([x], dtype=torch.float64), "float16").item() == 1 + 2.0**-10


def test_too_large_is_infinite_and_nan_stays():
    given = torch.tensor([65519.0, 65520.0, -1e9, math.inf, math.nan], dtype=torch.float64)
    found = round_nearest(given, "float16").tolist()
    assert found[:4] == [65504.0, math.inf, -math.inf, math.inf]
    assert math.isnan(found[4])


@pytest.mark.parametrize("name", SIXTEEN)
def test_stochastic_rounding_is_unbiased(name):
    draws = 40_000
    for x in (1.0003, -0.7171, 3e-3, 2.0**-24 * 0.3):
        given = torch.full((draws,), x, dtype=torch.float64)
        found = round_stochastic(given, name, torch.Generator().manual_seed(1)).double()
        below, above = found.min().item(), found.max().item()
        assert below < x < above
        assert len(found.unique()) == 2
        share = (x - below) / (above - below)
        error = (above - below) * math.sqrt(share * (1 - share) / draws)
        assert abs(found.mean().item() - x) < 5 * error
        nearest = round_nearest(given[:1], name).item()
        assert abs(nearest - x) > 5 * error  # the test would notice rounding to nearest


def test_stochastic_rounding_leaves_values_of_the_format_alone():
    values = torch.tensor([0.0, 1.0, -2.5, 2.0**-24, 65504.0])
    assert torch.equal(round_stochastic(values, "float16").float(), values)


# Products -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", DTYPES)
@pytest.mark.parametrize(("order", "fused"), itertools.product(("sequence", "pairs"), (False, True)))
def test_the_product_is_the_scalar_loop_that_rounds_after_every_operation(name, order, fused):
    policy = NumericsPolicy(name, order=order, fused=fused)
    for i, (n, k, m) in enumerate([(1, 1, 1), (2, 2, 3), (3, 7, 2), (4, 8, 5), (5, 33, 1), (1, 64, 3)]):
        a, b = random(n, k, seed=i, dtype=policy.dtype), random(k, m, seed=i + 50, dtype=policy.dtype)
        assert torch.equal(matmul(a, b, policy), matmul_reference(a, b, policy)), (n, k, m)


@pytest.mark.parametrize("name", SIXTEEN)
def test_orders_and_fusing_give_different_results(name):
    """What the tests above hold equal is not equal by itself."""
    a, b = random(6, 65, dtype=DTYPES[name]), random(65, 6, seed=1, dtype=DTYPES[name])
    found = [
        matmul(a, b, NumericsPolicy(name, order=order, fused=fused))
        for order in ("sequence", "pairs")
        for fused in (False, True)
    ] + [matmul(a, b, NumericsPolicy(name, accumulate="float32"))]
    assert all(not torch.equal(one, other) for one, other in itertools.combinations(found, 2))


@pytest.mark.parametrize("order", ["sequence", "pairs"])
@pytest.mark.parametrize("cores", [1, 2, 3, 8])
def test_the_result_does_not_depend_on_how_cores_share_the_outputs(order, cores):
    policy = NumericsPolicy("bfloat16", order=order)
    a, b = random(7, 19, dtype=torch.bfloat16), random(19, 9, seed=1, dtype=torch.bfloat16)
    whole = matmul(a, b, policy)
    rows, columns = -(-7 // cores), -(-9 // cores)
    assert torch.equal(torch.cat([matmul(part, b, policy) for part in a.split(rows)]), whole)
    assert torch.equal(torch.cat([matmul(a, part, policy) for part in b.split(columns, 1)], 1), whole)


def test_many_products_at_once_and_in_pieces_are_those_one_by_one(monkeypatch):
    policy = NumericsPolicy("float16")
    a, b = random(3, 2, 11, dtype=torch.float16), random(4, 1, 11, 5, seed=1, dtype=torch.float16)
    whole = matmul(a, b, policy)
    assert whole.shape == (4, 3, 2, 5)
    assert torch.equal(whole[2, 1], matmul(a[1], b[2, 0], policy))
    monkeypatch.setattr("assay.methods.compression.reduced_precision_odl.numerics._AT_ONCE", 250)
    assert torch.equal(matmul(a, b, policy), whole)


@pytest.mark.parametrize(("name", "last"), [("float16", 2048.0), ("bfloat16", 256.0)])
def test_a_sum_of_ones_saturates_and_pairs_double_it(name, last):
    ones = torch.ones(1, 8192, dtype=DTYPES[name])
    assert matmul(ones, ones.T, NumericsPolicy(name, order="sequence")).item() == last
    assert matmul(ones, ones.T, NumericsPolicy(name, order="pairs")).item() == 2 * last
    assert matmul(ones, ones.T, NumericsPolicy(name, accumulate="float32")).item() == 8192


def test_float32_is_torch_but_for_the_order_of_its_sums():
    a, b = random(9, 40), random(40, 7, seed=1)
    assert torch.equal(matmul(a, b, NumericsPolicy("float32", accumulate="float32")), a @ b)
    torch.testing.assert_close(matmul(a, b, WIDE), a @ b, rtol=1e-5, atol=1e-5)


# Layers -------------------------------------------------------------------------------------------------------------------------


def test_im2col_is_torchs_unfold():
    x = random(2, 3, 7, 6)
    found = im2col(x, (3, 2), (2, 1), (1, 1, 0, 0))
    assert torch.equal(found.flatten(1, 2), F.unfold(x, (3, 2), padding=(0, 1), stride=(2, 1)))


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(2, 4, 3, padding=1),
        nn.Conv2d(2, 4, 3, stride=2, padding=1),
        nn.Conv2d(2, 4, (3, 2), stride=(3, 2), padding=(2, 0), bias=False),
        nn.Conv2d(4, 4, 3, padding=1, groups=4),
        nn.Conv2d(4, 6, 1, groups=2),
        nn.Conv2d(2, 4, 1, stride=2),
        nn.Conv2d(2, 3, 2, padding=2),
    ],
    ids=str,
)
def test_gradients_by_im2col_are_those_of_autograd_in_float64(layer, batch):
    x = random(batch, layer.in_channels, 7, 6, seed=2)
    exact = copy.deepcopy(layer).double()
    wide = x.double().requires_grad_()
    expected = exact(wide)
    given = random(*expected.shape, seed=3)
    expected.backward(given.double())
    ours = emulate(nn.Sequential(copy.deepcopy(layer)), WIDE)
    narrow = x.clone().requires_grad_()
    out = ours(narrow)
    out.backward(given)
    pairs = [(out, expected), (narrow.grad, wide.grad)]
    pairs += [(p.grad, q.grad) for p, q in zip(ours.parameters(), exact.parameters(), strict=True)]
    for found, wanted in pairs:
        torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-5)


def test_a_whole_network_in_float32_is_torchs():
    plain, x = net(), random(2, 2, 6, 8)
    ours = emulate(copy.deepcopy(plain), WIDE)
    for model in (plain, ours):
        F.cross_entropy(model(x), torch.tensor([1, 4])).backward()
    torch.testing.assert_close(ours(x), plain(x), rtol=1e-5, atol=1e-6)
    for found, wanted in zip(ours.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(found.grad, wanted.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", SIXTEEN)
def test_a_networks_pass_is_the_products_of_the_scalar_loop(name):
    """Forward, all three gradients of a linear layer and a strided convolution, bit for bit."""
    policy = NumericsPolicy(name)
    model = emulate(nn.Sequential(nn.Conv2d(1, 3, 3, stride=2, padding=1), nn.Flatten(), nn.Linear(27, 4)), policy)
    x = random(1, 1, 5, 5, dtype=policy.dtype)
    kept = []
    model[1].register_full_backward_hook(lambda _, given, __: kept.append(given[0]))
    out = model(x)
    given = random(1, 4, seed=5, dtype=policy.dtype)
    out.backward(given)
    convolution, linear = model[0], model[2]
    columns = im2col(x, (3, 3), (2, 2), (1, 1, 1, 1))[0].flatten(0, 1)
    middle = matmul_reference(convolution.weight.detach().flatten(1), columns, policy)
    middle = middle + convolution.bias.detach()[:, None]
    flat = middle.reshape(1, -1)
    assert torch.equal(out.detach(), matmul_reference(flat, linear.weight.detach().T, policy) + linear.bias.detach())
    assert torch.equal(linear.weight.grad, matmul_reference(given.T, flat, policy))
    assert torch.equal(linear.bias.grad, given[0])
    back = matmul_reference(given, linear.weight.detach(), policy).reshape(3, 9)
    assert torch.equal(kept[0].reshape(3, 9), back)
    assert torch.equal(convolution.weight.grad.flatten(1), matmul_reference(back, columns.T, policy))
    ones = torch.ones(9, 1, dtype=policy.dtype)
    assert torch.equal(convolution.bias.grad[:, None], matmul_reference(back, ones, policy))


def test_everything_between_the_layers_is_in_the_format_too():
    model = emulate(net(), NumericsPolicy("bfloat16"))
    seen = []
    for module in model:
        module.register_forward_hook(lambda _, __, out: seen.append(out.dtype))
    model(random(1, 2, 6, 8))
    assert set(seen) == {torch.bfloat16}
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_layers_of_a_transformers_model_are_reached_and_its_residual_stream_stays_wide():
    from tests.tiny import tiny_model, token_ids

    model = tiny_model()
    plain = model(token_ids(length=8)).logits
    emulate(model.model.layers[1].mlp, NumericsPolicy("bfloat16", accumulate="float32"))
    found = model(token_ids(length=8)).logits
    assert found.dtype == torch.float32
    error = (found - plain).abs().max() / plain.abs().max()
    assert 0 < error < 0.05
    found.sum().backward()
    assert model.model.layers[1].mlp.down_proj.weight.grad.dtype == torch.bfloat16


def test_frozen_weights_stay_frozen_and_only_the_last_layers_learn():
    model = net()
    for parameter in model[:5].parameters():
        parameter.requires_grad_(False)
    emulate(model, NumericsPolicy())
    model(random(1, 2, 6, 8)).float().sum().backward()
    assert [p.grad is not None for p in model.parameters()] == [False] * 6 + [True, True]


@pytest.mark.parametrize(
    ("model", "match"),
    [
        (nn.Sequential(nn.ReLU()), "none"),
        (nn.Sequential(nn.Conv2d(1, 1, 3, dilation=2)), "dilation"),
        (nn.Sequential(nn.Conv2d(1, 1, 3, padding="same")), "padding"),
        (nn.Sequential(nn.Conv2d(1, 1, 3, padding=1, padding_mode="circular")), "zeros"),
        (nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2)), "1.weight"),
    ],
)
def test_a_model_that_cannot_be_emulated_is_refused_unchanged(model, match):
    before = [type(module) for module in model.modules()]
    with pytest.raises(ValueError, match=match):
        emulate(model, NumericsPolicy())
    assert [type(module) for module in model.modules()] == before


def test_tied_weights_are_refused():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[1].weight = model[0].weight
    with pytest.raises(ValueError, match="share"):
        emulate(model, NumericsPolicy())


# Updates ------------------------------------------------------------------------------------------------------------------------


def stepped(start, gradient, lr, policy, steps=1, **settings):
    weight = nn.Parameter(torch.full((1,), start, dtype=policy.dtype))
    optimiser = ReducedSGD([weight], lr=lr, policy=policy, **settings)
    for _ in range(steps):
        weight.grad = torch.full_like(weight, gradient)
        optimiser.step()
    return weight.item(), optimiser.stalled_share


@pytest.mark.parametrize(("name", "ulp"), [("float16", 2.0**-10), ("bfloat16", 2.0**-7)])
def test_an_update_under_half_an_ulp_is_lost(name, ulp):
    policy = NumericsPolicy(name)
    assert stepped(1.0, -1.0, ulp / 2, policy) == (1.0, 1.0)  # half-way, to the even one
    assert stepped(1.0, -1.0, ulp * 0.75, policy) == (1.0 + ulp, 0.0)
    assert stepped(1.0, 1.0, ulp / 4, policy) == (1.0, 1.0)  # below 1 the ulp is half as large
    assert stepped(1.0, 1.0, ulp * 0.375, policy) == (1.0 - ulp / 2, 0.0)
    assert stepped(1.0, -1.0, ulp / 4, policy, steps=100) == (1.0, 1.0)  # for ever


@pytest.mark.parametrize("name", SIXTEEN)
@pytest.mark.parametrize("update", ["kahan", "master"])
def test_small_updates_add_up_with_a_remainder_or_a_copy_in_float32(name, update):
    found, stalled = stepped(1.0, -1.0, 2.0**-13, NumericsPolicy(name, update=update), steps=1024)
    assert found == 1.125
    assert stalled == 0


def test_small_updates_add_up_on_average_with_stochastic_rounding():
    policy = NumericsPolicy("bfloat16", update="stochastic")
    weight = nn.Parameter(torch.ones(4000, dtype=torch.bfloat16))
    optimiser = ReducedSGD([weight], lr=2.0**-11, policy=policy, generator=torch.Generator().manual_seed(0))
    for _ in range(32):
        weight.grad = torch.full_like(weight, -1.0)
        optimiser.step()
    assert abs(weight.double().mean().item() - (1 + 32 * 2.0**-11)) < 0.002  # nearest would leave 1
    assert 0.8 < optimiser.stalled_share < 1


def test_the_rate_is_held_in_the_format():
    policy = NumericsPolicy("bfloat16")
    found, _ = stepped(0.0, -1.0, 0.1, policy)
    assert found == round_number(0.1, "bfloat16") != 0.1


@pytest.mark.parametrize("update", ["nearest", "stochastic", "kahan", "master"])
def test_in_float32_it_is_torchs_sgd(update):
    ours, theirs = (nn.Parameter(random(50)) for _ in range(2))
    policy = NumericsPolicy("float32", update=update, loss_scale=8.0)
    optimiser = ReducedSGD([ours], lr=0.1, policy=policy, weight_decay=0.01)
    reference = torch.optim.SGD([theirs], lr=0.1, weight_decay=0.01)
    for i in range(5):
        theirs.grad = random(50, seed=i)
        ours.grad = 8.0 * theirs.grad
        kept = ours.grad.clone()
        optimiser.step()
        reference.step()
        assert torch.equal(ours.grad, kept)  # the decay is not written into it
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_adamw_in_float32_is_torchs():
    for update in ("nearest", "stochastic", "kahan", "master"):
        ours, theirs = (nn.Parameter(random(50)) for _ in range(2))
        policy = NumericsPolicy("float32", update=update, loss_scale=4.0)
        optimiser = ReducedAdamW([ours], lr=0.01, policy=policy, weight_decay=0.1, betas=(0.8, 0.9))
        reference = torch.optim.AdamW([theirs], lr=0.01, weight_decay=0.1, betas=(0.8, 0.9))
        for i in range(5):
            theirs.grad = random(50, seed=i)
            ours.grad = 4.0 * theirs.grad
            optimiser.step()
            reference.step()
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_adamw_at_a_usual_rate_stalls_in_bfloat16_and_not_with_what_mends_it():
    """Weights of 1, a rate of 1e-3, gradients of one sign: 32 steps are 0.032 in exact numbers."""

    def after(update):
        policy = NumericsPolicy("bfloat16", update=update)
        weight = nn.Parameter(torch.ones(2000, dtype=torch.bfloat16))
        generator = torch.Generator().manual_seed(0)
        optimiser = ReducedAdamW([weight], lr=1e-3, policy=policy, weight_decay=0.0, generator=generator)
        for _ in range(32):
            weight.grad = torch.full_like(weight, 3.0)
            optimiser.step()
        return 1 - weight.double().mean().item(), optimiser.stalled_share

    assert after("nearest") == (0.0, 1.0)
    for update, stalled in (("stochastic", 0.9), ("kahan", 0.01), ("master", 0.0)):
        moved, share = after(update)
        assert moved == pytest.approx(0.032, abs=0.003), update
        assert share <= stalled, update


def test_a_loss_scale_saves_gradients_that_float16_would_lose():
    policy = NumericsPolicy("float16", accumulate="float32")
    scaled = NumericsPolicy("float16", accumulate="float32", loss_scale=1024.0)

    def weight_after(policy):
        model = emulate(nn.Sequential(nn.Linear(1, 1, bias=False)), policy)
        nn.init.zeros_(model[0].weight)
        optimiser = ReducedSGD(model.parameters(), lr=1024.0, policy=policy)
        (model(torch.ones(1, 1)).float().sum() * 1e-8 * policy.loss_scale).backward()
        optimiser.step()
        return model[0].weight.item()

    assert weight_after(policy) == 0
    assert weight_after(scaled) == pytest.approx(-1024e-8, rel=0.01)


def test_gradients_of_zero_are_not_counted_as_lost():
    weight = nn.Parameter(torch.ones(4, dtype=torch.float16))
    optimiser = ReducedSGD([weight], lr=1e-5, policy=NumericsPolicy())
    weight.grad = torch.tensor([0.0, 0.0, 1.0, 0.0], dtype=torch.float16)
    optimiser.step()
    assert optimiser.stalled_share == 1.0
    weight.grad = torch.tensor([0.0, 1000.0, 0.0, 0.0], dtype=torch.float16)
    optimiser.step()
    assert optimiser.stalled_share == 0.5


def test_a_small_rate_stalls_in_sixteen_bits_and_stochastic_rounding_goes_on_learning():
    """A linear classifier of real digits at a rate that is too small for bfloat16."""
    from assay.workloads.images import digits

    images, y = digits()
    x = images.flatten(1)

    def learned(policy):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 10))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(
                    torch.where(parameter < 0, -1.0, 1.0)
                )  # as far from zero as weights are in deep networks
        emulate(model, policy)
        optimiser = ReducedSGD(model.parameters(), lr=1e-3, policy=policy, generator=torch.Generator().manual_seed(0))
        start = F.cross_entropy(model(x).float(), y).item()
        for i in range(300):
            optimiser.zero_grad()
            F.cross_entropy(model(x[i : i + 1]).float(), y[i : i + 1]).backward()
            optimiser.step()
        return start - F.cross_entropy(model(x).float(), y).item(), optimiser.stalled_share

    wide, _ = learned(NumericsPolicy("float32", accumulate="float32"))
    nearest, stalled = learned(NumericsPolicy("bfloat16", accumulate="float32"))
    stochastic, _ = learned(NumericsPolicy("bfloat16", accumulate="float32", update="stochastic"))
    assert stalled > 0.9
    assert nearest < 0.2 * wide
    assert stochastic > 0.5 * wide


# Cost ---------------------------------------------------------------------------------------------------------------------------


def test_training_macs_are_three_times_the_forward_pass_but_for_the_first_layers_input_gradient():
    from torch.utils.flop_counter import FlopCounterMode

    # stride 1, where torch's own count of the input gradient has no zeros in it
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 4, 1), nn.Flatten(), nn.Linear(120, 5))
    x = random(1, 2, 6, 5)
    shapes = layer_shapes(model, x)
    with FlopCounterMode(display=False) as counter:
        model(x).sum().backward()
    assert 2 * training_macs(shapes) == counter.get_total_flops()
    forward = sum(shape.macs for shape in shapes)
    assert training_macs(shapes) == 3 * forward - shapes[0].macs
    assert layer_shapes(emulate(model, NumericsPolicy()), x) == shapes


def test_sixteen_bits_take_exactly_half_the_memory_and_a_master_copy_takes_it_back():
    shapes = layer_shapes(net(), random(1, 2, 6, 8))
    whole = training_memory(shapes, NumericsPolicy("float32"))
    for name in SIXTEEN:
        half = training_memory(shapes, NumericsPolicy(name))
        assert [2 * getattr(half, part) for part in vars(half)] == [getattr(whole, part) for part in vars(whole)]
    kahan, master = (training_memory(shapes, NumericsPolicy(update=update)) for update in ("kahan", "master"))
    assert kahan.weights == whole.weights
    assert master.weights == 1.5 * whole.weights


def test_whether_a_step_fits_is_decided_by_the_format():
    shapes = [LayerShape("conv", 16, 16, 1, 1, 256, 256)]
    need = training_memory(shapes, NumericsPolicy()).total
    chip = Microcontroller(fast_bytes=need)
    assert fits(shapes, NumericsPolicy(), chip)
    assert not fits(shapes, NumericsPolicy("float32"), chip)


def test_cycles_by_hand():
    """One core: rows 2, columns 4, ten terms in float32 are ten times 6 loads and 8 products, 8 stores, and what a tile costs."""
    one = Microcontroller(cores=1, units=1)
    assert product_cycles(2, 4, 10, 1, "float32", one) == (10 * 14 + 8 + 6, "sequence 2x4")
    # five times 6 loads and 8 double products, 8 additions of halves, 4 double stores
    assert product_cycles(2, 4, 10, 1, "float16", one) == (5 * 14 + 8 + 4 + 6, "pairs 2x4")


def test_a_product_over_one_term_keeps_its_outputs_in_the_vectors():
    cycles, name = product_cycles(16, 64, 1, 1, "float16", Microcontroller())
    assert name.startswith("sequence")
    assert cycles < product_cycles(16, 64, 1, 1, "float32", Microcontroller())[0]


def test_cores_share_the_work_and_their_units_bound_it():
    large = (64, 256, 288, 1, "float16")
    one, eight = (product_cycles(*large, Microcontroller(cores=cores, units=cores))[0] for cores in (1, 8))
    assert one / 8 <= eight <= 1.1 * one / 8
    shared = product_cycles(*large, Microcontroller(cores=8, units=4))[0]
    macs = 64 * 256 * 288
    assert shared > eight
    assert macs / shared <= 2 * 4  # two products an instruction, four units


@pytest.mark.parametrize("shape", [LayerShape("c", 16, 16, 1, 9, 256, 256), LayerShape("d", 64, 64, 64, 9, 125, 125)])
def test_sixteen_bits_save_less_than_half_of_a_step(shape):
    wide, narrow = (training_step([shape], name).cycles for name in ("float32", "float16"))
    assert 1 < wide / narrow < 2


def test_depthwise_layers_reach_fewer_macs_a_cycle():
    full = training_step([LayerShape("c", 64, 64, 1, 9, 125, 125)] * 2, "float16").macs_a_cycle
    depthwise = training_step([LayerShape("d", 64, 64, 64, 9, 125, 125)] * 2, "float16").macs_a_cycle
    assert depthwise < 0.5 * full


def test_time_and_energy_follow_from_the_clock_and_the_efficiency():
    shapes = [LayerShape("c", 8, 8, 1, 9, 64, 64)]
    fast = training_step(shapes, "float16", Microcontroller(hertz=2e8, watts=0.1))
    slow = training_step(shapes, "float16", Microcontroller(hertz=1e8, watts=0.1, efficiency=0.5))
    assert slow.seconds == pytest.approx(4 * fast.seconds)
    assert fast.joules == pytest.approx(0.1 * fast.cycles / 2e8)


# What is refused ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda: NumericsPolicy("float8"), ValueError, "format"),
        (lambda: NumericsPolicy(accumulate="double"), ValueError, "accumulate"),
        (lambda: NumericsPolicy(order="random"), ValueError, "order"),
        (lambda: NumericsPolicy(fused=1), TypeError, "fused"),
        (lambda: NumericsPolicy(update="none"), ValueError, "update"),
        (lambda: NumericsPolicy(loss_scale=math.nan), ValueError, "loss_scale"),
        (lambda: matmul(torch.ones(2, 2), torch.ones(2, 2), NumericsPolicy()), TypeError, "a must hold"),
        (lambda: matmul(torch.ones(2, 3).half(), torch.ones(2, 3).half(), NumericsPolicy()), ValueError, "b must have"),
        (lambda: matmul(torch.ones(2).half(), torch.ones(2, 3).half(), NumericsPolicy()), ValueError, "a must have"),
        (lambda: matmul(torch.ones(2, 0).half(), torch.ones(0, 3).half(), NumericsPolicy()), ValueError, "empty"),
        (lambda: matmul_reference(torch.ones(1, 1), torch.ones(1, 1), NumericsPolicy("float32", "float32")), ValueError, "policy"),
        (lambda: emulate(net(), "float16"), TypeError, "policy"),
        (lambda: emulate(net(), NumericsPolicy())(torch.ones(1, 3, 6, 8)), ValueError, "x must have"),
        (lambda: ReducedSGD([nn.Parameter(torch.ones(1))], lr=0.1, policy=NumericsPolicy()), TypeError, "params"),
        (lambda: ReducedSGD([nn.Parameter(torch.ones(1).half())], lr=0, policy=NumericsPolicy()), ValueError, "lr"),
        (lambda: ReducedSGD([nn.Parameter(torch.ones(1).half())], lr=math.nan, policy=NumericsPolicy()), ValueError, "lr"),
        (lambda: round_stochastic(torch.ones(1, dtype=torch.int64), "float16"), TypeError, "x must hold"),
        (lambda: round_nearest(torch.ones(1), "float16"), TypeError, "x must hold"),
        (lambda: round_number(1.0, "float64"), ValueError, "format"),
        (lambda: Microcontroller(cores=0), ValueError, "cores"),
        (lambda: Microcontroller(efficiency=1.5), ValueError, "efficiency"),
        (lambda: layer_shapes(net(), torch.ones(2, 2, 6, 8)), ValueError, "one sample"),
        (lambda: layer_shapes(nn.ReLU(), torch.ones(1, 2)), ValueError, "meet"),
        (lambda: training_step([LayerShape("c", 1, 1, 1, 1, 1, 1)], "int8"), ValueError, "format"),
    ],
)  # fmt: skip
def test_bad_input_is_refused_by_name(call, error, match):
    with pytest.raises(error, match=match):
        call()
