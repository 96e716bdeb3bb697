"""BiP: the upper gradient against its definition, exact masks, steps against a reference written out, and where the results go."""

from __future__ import annotations

import copy
import warnings
from concurrent.futures import ThreadPoolExecutor
from decimal import Decimal

import pytest
import torch
import torch.nn.functional as F
from tests.properties.architectures import build, inputs, output
from tests.tiny import tiny_model, token_ids
from torch import nn
from torch.func import functional_call
from torch.nn.utils import parametrize, prune

from assay.methods.compression.bip import BilevelPruner, compact, masks_for, upper_gradient
from assay.methods.core.sparsity.masks import bake, masks_of
from assay.methods.core.sparsity.straight_through import straight_through

LAYERS = ["0", "3", "7", "9"]
WEIGHTS = 6 * 9 + 8 * 6 * 9 + 12 * 32 + 4 * 12  # of `net`


def net() -> nn.Sequential:
    return nn.Sequential(
        *(nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU()),
        *(nn.Conv2d(6, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten()),
        *(nn.Linear(32, 12), nn.ReLU(), nn.Linear(12, 4)),
    )


def batches(n: int, size: int = 8) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [(torch.randn(size, 1, 6, 6), torch.randint(4, (size,))) for _ in range(n)]


def loss(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def plain(**settings):
    """Settings without momentum and decay, so that one step is its gradient."""
    return {"momentum": 0.0, "weight_decay": 0.0, **settings}


def weight_of(model: nn.Module, name: str) -> torch.Tensor:
    """The whole weight behind the mask that is learned."""
    return model.get_submodule(name).parametrizations.weight.original


# ------------------------------------------------------------------------------------------------- the gradient of the upper problem


def quadratic(n: int = 6):
    """The loss (z - c)^T A (z - c) / 2 in double precision: its gradient, and the exact weights under a mask and gamma."""
    root = torch.randn(n, n, dtype=torch.float64)
    curvature, centre = root @ root.T / n + torch.eye(n).double(), torch.randn(n).double() + 2

    def gradient(z):
        return curvature @ (z - centre)

    def best(mask, gamma):
        masked = mask[:, None] * curvature
        return torch.linalg.solve(masked * mask + gamma * torch.eye(n).double(), masked @ centre)

    def value(mask, gamma):
        away = mask * best(mask, gamma) - centre
        return float(away @ curvature @ away / 2)

    return gradient, best, value


def test_on_a_quadratic_the_formula_is_the_derivative_up_to_one_over_gamma():
    gradient, best, value = quadratic()
    mask = torch.rand(6).double() + 0.5

    def error(gamma):
        weight = best(mask, gamma)
        found = upper_gradient(weight, mask, gradient(mask * weight), inverse_gamma=1 / gamma)
        step = 1e-4
        ends = [(value(mask + step * e, gamma), value(mask - step * e, gamma)) for e in torch.eye(6).double()]
        true = torch.tensor([(up - down) / (2 * step) for up, down in ends]).double()
        return float((found - true).norm() / true.norm())

    near, far = error(100.0), error(1000.0)
    assert near < 0.5
    assert far < near / 5  # the next order of 1 / gamma
    assert far > near / 20


def test_at_an_optimum_of_the_lower_problem_kept_weights_have_twice_theta_g():
    gradient, best, _ = quadratic()
    mask, gamma = torch.tensor([1.0, 0, 1, 1, 0, 1]).double(), 50.0
    weight = best(mask, gamma)
    g = gradient(mask * weight)
    torch.testing.assert_close(weight, -mask * g / gamma)
    found = upper_gradient(weight, mask, g, inverse_gamma=1 / gamma)
    torch.testing.assert_close(found[mask == 1], (2 * weight * g)[mask == 1])


def test_without_the_implicit_term_scores_get_hydras_gradient():
    model = net().eval()
    scored = copy.deepcopy(model)
    batch = batches(1)[0]
    pruner = BilevelPruner(scored, loss, density=0.3, mask_rate=1.0, inverse_gamma=0.0, **plain())
    with torch.no_grad():
        for unit in pruner.scored.values():
            unit.scores.mul_(torch.where(torch.rand_like(unit.scores) < 0.5, -1.0, 1.0))  # the signs count
    before = {name: unit.scores.detach().clone() for name, unit in pruner.scored.items()}
    masks = {name: unit.mask.clone() for name, unit in pruner.scored.items()}
    leaves = {name: scores.clone().requires_grad_() for name, scores in before.items()}
    weights = {
        f"{name}.weight": model.get_submodule(name).weight.detach() * straight_through(leaves[name].abs(), masks[name])
        for name in LAYERS
    }
    F.cross_entropy(functional_call(model, weights, (batch[0],)), batch[1]).backward()
    pruner.upper(batch)
    for name in LAYERS:
        torch.testing.assert_close(before[name] - pruner.scored[name].scores.detach(), leaves[name].grad)


def test_a_step_is_the_one_written_out():
    """Both halves of a step by hand: the weights on one batch, then the scores on the other by the gradient of m * theta."""
    model, (upper, lower), inverse_gamma = net().eval(), batches(2), 0.7
    by_hand = {name: p.detach().clone() for name, p in model.named_parameters()}
    pruner = BilevelPruner(
        model, loss, density=0.3, rate=0.1, mask_rate=0.5, momentum=0.0, weight_decay=0.01, inverse_gamma=inverse_gamma
    )
    masks = {name: unit.mask.clone() for name, unit in pruner.scored.items()}
    scores = {name: unit.scores.detach().clone() for name, unit in pruner.scored.items()}
    bare = net().eval()

    def masked_gradients(batch):
        given = {
            name: (p * masks[name[:-7]] if name.endswith(".weight") and name[:-7] in masks else p).requires_grad_()
            for name, p in ((name, p.clone()) for name, p in by_hand.items())
        }
        value = F.cross_entropy(functional_call(bare, given, (batch[0],)), batch[1])
        return value, dict(zip(given, torch.autograd.grad(value, list(given.values())), strict=True))

    below, grads = masked_gradients(lower)
    for name, p in by_hand.items():
        kept = masks.get(name.removesuffix(".weight"), torch.ones(()))
        by_hand[name] = p - 0.1 * (kept * grads[name] + 0.01 * p)
    above, grads = masked_gradients(upper)
    losses = pruner.step(upper, lower)
    assert losses == pytest.approx((above.item(), below.item()), rel=1e-5)
    for name in LAYERS:
        weight, g = by_hand[f"{name}.weight"], grads[f"{name}.weight"]
        torch.testing.assert_close(weight_of(model, name), weight)
        d = (weight - inverse_gamma * masks[name] * g) * g * scores[name].sign()
        torch.testing.assert_close(pruner.scored[name].scores.detach(), scores[name] - 0.5 * d)
        torch.testing.assert_close(model.get_submodule(name).bias.detach(), by_hand[f"{name}.bias"])
    expected = masks_for({name: unit.scores.detach().abs() for name, unit in pruner.scored.items()}, 0.3)
    assert all(torch.equal(unit.mask, expected[name]) for name, unit in pruner.scored.items())


def test_as_released_the_scores_gradient_stands_for_the_weights():
    model, batch, steps = net().eval(), batches(1)[0], {}
    for variant, inverse_gamma in (("paper", 0.0), ("as_released", 3.0), ("paper", 3.0)):
        pruner = BilevelPruner(
            copy.deepcopy(model),
            loss,
            density=0.3,
            mask_rate=1.0,
            variant=variant,
            inverse_gamma=inverse_gamma,
            **plain(),
        )
        before = pruner.scored["7"].scores.detach().clone()
        pruner.upper(batch)
        steps[variant, inverse_gamma] = before - pruner.scored["7"].scores.detach()
    h = steps["paper", 0.0]
    torch.testing.assert_close(steps["as_released", 3.0], h - 3 * h.square(), atol=1e-6, rtol=1e-4)
    assert not torch.allclose(steps["as_released", 3.0], steps["paper", 3.0], atol=1e-6)


# ---------------------------------------------------------------------------------------------------------------------------- masks


def test_with_everything_kept_it_is_dense_sgd_bit_for_bit():
    model = net().train()
    dense = copy.deepcopy(model)
    optimizer = torch.optim.SGD(dense.parameters(), 0.1, momentum=0.9, weight_decay=1e-4)
    pruner = BilevelPruner(model, loss, density=1.0, mask_rate=10.0)
    for upper, lower in zip(batches(4), batches(4), strict=True):
        pruner.step(upper, lower)
        optimizer.zero_grad()
        loss(dense, lower).backward()
        optimizer.step()
        assert all(bool(unit.mask.all()) for unit in pruner.scored.values())
    pruner.finish()
    bake(model)
    for name, parameter in dense.named_parameters():
        assert torch.equal(parameter, model.get_parameter(name)), name


@pytest.mark.parametrize("density", [0.9, 0.5, 0.2, 0.1, 0.05, 0.02, 0.001])
def test_exactly_as_many_zeros_as_said_after_every_step(density):
    gone = int((1 - Decimal(str(density))) * WEIGHTS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the smallest densities empty layers
        pruner = BilevelPruner(net(), loss, density=density, mask_rate=30.0)
        for upper, lower in zip(batches(3), batches(3), strict=True):
            assert sum(int((~unit.mask).sum()) for unit in pruner.scored.values()) == gone
            pruner.step(upper, lower)
    assert sum(int((~mask).sum()) for mask in pruner.finish().values()) == gone


def test_the_count_is_exact_among_ties():
    scores = {"a": torch.ones(7, 5), "b": torch.ones(3, 4, 2, 2)}
    for density in (0.9, 0.3, 0.07):
        masks = masks_for(scores, density)
        assert sum(int((~mask).sum()) for mask in masks.values()) == int((1 - Decimal(str(density))) * 83)
        filters = masks_for(scores, density, "filters")
        for name, rows in (("a", 7), ("b", 3)):
            alive = filters[name].flatten(1)
            assert torch.equal(alive.any(1), alive.all(1))
            assert int((~alive.any(1)).sum()) == int((1 - Decimal(str(density))) * rows)


@pytest.mark.parametrize("density", [0.75, 0.5, 0.3])
def test_of_each_layer_the_same_share_of_filters_goes(density):
    pruner = BilevelPruner(net(), loss, density=density, granularity="filters", mask_rate=30.0)
    for upper, lower in zip(batches(3), batches(3), strict=True):
        pruner.step(upper, lower)
    masks = pruner.finish()
    assert list(masks) == ["0", "3", "7"]  # the outputs of the last layer are the answer
    for mask in masks.values():
        rows = mask.flatten(1)
        assert torch.equal(rows.any(1), rows.all(1))
        assert int((~rows.any(1)).sum()) == int((1 - Decimal(str(density))) * len(mask))


def test_filters_are_ranked_by_their_l2_norm():
    scores = {"a": torch.tensor([[3.0, 0.0], [2.0, 2.0], [2.2, 2.2]])}
    assert masks_for(scores, 0.6, "filters")["a"].any(1).tolist() == [True, False, True]
    turned = {"a": scores["a"].T.contiguous()}
    assert masks_for(turned, 0.6, "channels")["a"].any(0).tolist() == [True, False, True]


@pytest.mark.parametrize("density", [0.5, 0.1, 0.03])
def test_the_first_mask_is_that_of_global_magnitude_pruning(density):
    model = net()
    other = copy.deepcopy(model)
    parameters = [(other.get_submodule(name), "weight") for name in LAYERS]
    prune.global_unstructured(parameters, prune.L1Unstructured, amount=int((1 - Decimal(str(density))) * WEIGHTS))
    pruner = BilevelPruner(model, loss, density=density)
    for name in LAYERS:
        assert torch.equal(pruner.scored[name].mask, other.get_submodule(name).weight_mask.bool()), name


def test_pruned_weights_only_decay_and_can_come_back():
    model = net()
    pruner = BilevelPruner(model, loss, density=0.2, rate=0.1, mask_rate=3.0, momentum=0.0, weight_decay=0.01)
    first = {name: unit.mask.clone() for name, unit in pruner.scored.items()}
    before = {name: weight_of(model, name).detach().clone() for name in LAYERS}
    pruner.lower(batches(1)[0])
    for name, mask in first.items():
        torch.testing.assert_close(weight_of(model, name)[~mask], before[name][~mask] * (1 - 0.1 * 0.01))
        moved = weight_of(model, name)[mask] - before[name][mask] * (1 - 0.1 * 0.01)
        assert float(moved.detach().norm()) > 0
    scores = pruner.scored["7"].scores.detach().clone()
    pruner.upper(batches(1)[0])
    gone = ~first["7"]
    assert bool((pruner.scored["7"].scores.detach() != scores)[gone].any())  # d = theta g where m = 0
    for upper, lower in zip(batches(20), batches(20), strict=True):
        pruner.step(upper, lower)
    assert any(bool((unit.mask & ~first[name]).any()) for name, unit in pruner.scored.items())


def test_a_sparse_net_learns():
    """What it learns is which side of a picture is lighter, left or right, and top or bottom."""

    def draw(n):
        pictures = [x for x, _ in batches(n, 32)]
        return [(x, 2 * (x[..., :3].sum((1, 2, 3)) > 0) + (x[..., :3, :].sum((1, 2, 3)) > 0).long()) for x in pictures]

    model, held_out = net(), draw(4)
    pruner = BilevelPruner(model, loss, density=0.3, rate=0.05)
    start = sum(float(loss(model, batch).detach()) for batch in held_out)
    for upper, lower in zip(draw(80), draw(80), strict=True):
        pruner.step(upper, lower)
    assert sum(float(loss(model, batch).detach()) for batch in held_out) < 0.8 * start


# ------------------------------------------------------------------------------------------------------------- where the result goes


def test_the_masks_are_those_of_torchs_pruning_and_the_baked_model_is_plain():
    model, x = net(), torch.randn(5, 1, 6, 6)
    pruner = BilevelPruner(model, loss, density=0.3)
    assert all(parametrize.is_parametrized(model.get_submodule(name), "weight") for name in LAYERS)
    pruner.step(*batches(2))
    learned = model.eval()(x).detach()
    masks = pruner.finish()
    assert not any(parametrize.is_parametrized(module) for module in model.modules())
    assert prune.is_pruned(model)
    assert all(torch.equal(mask, masks[name]) for name, mask in masks_of(model).items())
    assert torch.equal(model(x), learned)
    fresh = net().eval()
    for name in LAYERS:
        prune.remove(model.get_submodule(name), "weight")
        assert torch.equal(model.get_submodule(name).weight != 0, masks[name])
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh(x), learned)


@pytest.mark.parametrize(("granularity", "layers"), [("filters", ["0", "3", "7"]), ("channels", ["3", "7", "9"])])
def test_pruned_filters_and_channels_are_really_taken_out(granularity, layers):
    model, x = net().train(), torch.randn(5, 1, 6, 6)
    pruner = BilevelPruner(model, loss, density=0.5, granularity=granularity)
    assert list(pruner.scored) == layers
    for upper, lower in zip(batches(5), batches(5), strict=True):
        pruner.step(upper, lower)
    pruner.finish()
    masked = model.eval()(x).detach()
    saved = compact(model, x, granularity=granularity)
    torch.testing.assert_close(model(x), masked, atol=1e-5, rtol=1e-4)
    assert [model[i].weight.shape[0] for i in (0, 3, 7, 9)] == [3, 4, 6, 4]
    assert [model[i].weight.shape[1] for i in (0, 3, 7, 9)] == [1, 3, 16, 6]
    assert saved.after.macs < 0.4 * saved.before.macs


def test_a_language_model_of_transformers_is_pruned_and_its_head_stays_dense(tmp_path):
    model, ids = tiny_model().train(), [token_ids(2, 12, seed=seed) for seed in range(4)]
    pruner = BilevelPruner(model, lambda model, x: model(x, labels=x).loss, density=0.1)
    assert len(pruner.scored) == 2 * 7
    assert "lm_head" not in pruner.scored
    for i in range(2):
        pruner.step(ids[i], ids[2 + i])
    masks = pruner.finish()
    wanted = model.eval()(ids[0]).logits.detach()
    bake(model).save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert torch.equal(again(ids[0]).logits, wanted)
    kept = sum(int((again.get_submodule(name).weight != 0).sum()) for name in masks)
    assert kept == sum(int(mask.sum()) for mask in masks.values())


def test_schedules_of_torch_go_on_both_optimisers():
    pruner = BilevelPruner(net(), loss, density=0.3, rate=0.2, mask_rate=0.4)
    optimizers = (pruner.lower_optimizer, pruner.upper_optimizer)
    schedules = [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 2) for optimizer in optimizers]
    pruner.step(*batches(2))
    for schedule in schedules:
        schedule.step()
    assert [optimizer.param_groups[0]["lr"] for optimizer in optimizers] == pytest.approx([0.1, 0.2])


def test_scores_can_decay_and_weights_do_not_with_them():
    settings = {"mask_rate": 1.0, "momentum": 0.0, "weight_decay": 0.0, "mask_weight_decay": 0.1}
    model = net()
    pruner = BilevelPruner(model, lambda model, batch: 0 * loss(model, batch), density=0.3, **settings)
    before = pruner.scored["0"].scores.detach().clone()
    pruner.step(*batches(2))
    torch.testing.assert_close(pruner.scored["0"].scores.detach(), 0.9 * before)
    assert torch.equal(weight_of(model, "0"), before)  # scores began as the weights


# ------------------------------------------------------------------------------------------------------------------------ refusals


def test_an_emptied_layer_is_warned_of_once():
    model = net()
    with torch.no_grad():
        model[9].weight.mul_(1e-6)
    with pytest.warns(UserWarning, match="no weight of '9' is left at density 0.1"):
        pruner = BilevelPruner(model, loss, density=0.1, mask_rate=1e-6)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pruner.upper(batches(1)[0])


def test_bad_arguments_are_refused_before_anything_changes():
    model = net()
    before = {name: p.clone() for name, p in model.state_dict().items()}
    for changes, message in (
        ({"density": 0.0}, "density must be"),
        ({"density": float("nan")}, "density must be"),
        ({"density": "0.1"}, "density must be"),
        ({"granularity": "heads"}, "granularity must be one of"),
        ({"variant": "other"}, "variant must be one of"),
        ({"inverse_gamma": -1.0}, "inverse_gamma must be"),
        ({"rate": 0.0}, "rate must be"),
        ({"mask_rate": float("inf")}, "mask_rate must be"),
        ({"momentum": 1.0}, "momentum must be"),
        ({"names": "0"}, "names must be a sequence"),
        ({"names": ["absent"]}, "absent"),
        ({"names": []}, "names must be at least one layer"),
        ({"names": 5}, "names must be a sequence"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            BilevelPruner(model, loss, **{"density": 0.5, **changes})
    with pytest.raises(TypeError, match="loss must be a function"):
        BilevelPruner(model, 3, density=0.5)
    with pytest.raises(ValueError, match="must have filters that can be pruned"):
        BilevelPruner(tiny_model(), loss, density=0.5, granularity="filters")
    with pytest.raises(ValueError, match="a frozen one"):
        BilevelPruner(copy.deepcopy(model).requires_grad_(False), loss, density=0.5)
    tied = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    tied[1].weight = tied[0].weight
    with pytest.raises(ValueError, match="tied"):
        BilevelPruner(tied, loss, density=0.5)
    assert not any(parametrize.is_parametrized(module) for module in model.modules())
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())


def test_steps_refuse_one_batch_for_both_a_loss_that_is_not_finite_and_a_pruner_that_is_done():
    pruner = BilevelPruner(net(), loss, density=0.5)
    batch, other = batches(2)
    with pytest.raises(ValueError, match="batch_upper must be another batch"):
        pruner.step(batch, batch)
    before = pruner.scored["0"].scores.detach().clone()
    for half in (pruner.upper, pruner.lower):
        with pytest.raises(ValueError, match="loss must be finite, got nan"):
            half((batch[0] * float("nan"), batch[1]))
    assert torch.equal(pruner.scored["0"].scores.detach(), before)
    assert all(unit.scores.requires_grad for unit in pruner.scored.values())
    wrong = BilevelPruner(net(), lambda model, batch: model(batch[0]), density=0.5)
    with pytest.raises(TypeError, match="loss must return a tensor of one number"):
        wrong.lower(batch)
    pruner.finish()
    for call in (lambda: pruner.step(batch, other), pruner.finish):
        with pytest.raises(ValueError, match="must not be used after finish"):
            call()


@pytest.mark.parametrize("name", ["1", "absent", ""])
def test_layers_whose_masks_could_not_be_put_on_in_the_end_are_refused_at_the_start(name):
    model = net()
    with pytest.raises(
        ValueError, match=f"names must be linear layers or convolutions that the model calls, got '{name}'"
    ):
        BilevelPruner(model, loss, density=0.5, names=["0", name])
    assert not any(parametrize.is_parametrized(module) for module in model.modules())


def test_gradients_that_are_not_finite_change_nothing():
    model, batch = net(), batches(1)[0]
    pruner = BilevelPruner(
        model, lambda model, batch: (0 * model(batch[0])).sum().sqrt(), density=0.5
    )  # 0, but its slope is not
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for half in (pruner.lower, pruner.upper):
        with pytest.raises(ValueError, match="gradients of the loss must be finite, got some of norm nan"):
            half(batch)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_a_loss_without_gradients_is_refused():
    pruner = BilevelPruner(net(), lambda model, batch: model(batch[0]).sum().detach(), density=0.5)
    for half in (pruner.lower, pruner.upper):
        with pytest.raises(ValueError, match="loss must come from the model with gradients"):
            half(batches(1)[0])


def test_two_models_are_pruned_at_once_in_two_threads():
    def pruned(seed):
        generator = torch.Generator().manual_seed(seed)
        model = copy.deepcopy(start)
        pruner = BilevelPruner(model, loss, density=0.3, mask_rate=10.0)
        for _ in range(6):
            upper, lower = ((torch.randn(8, 1, 6, 6, generator=generator), labels) for _ in range(2))
            pruner.step(upper, lower)
        return pruner.finish()

    start, labels = net(), torch.arange(8) % 4
    alone = [pruned(seed) for seed in (0, 1)]
    with ThreadPoolExecutor(2) as pool:
        together = list(pool.map(pruned, (0, 1)))
    for found, wanted in zip(together, alone, strict=True):
        assert all(torch.equal(found[name], wanted[name]) for name in LAYERS)
    assert any(not torch.equal(alone[0][name], alone[1][name]) for name in LAYERS)


@pytest.mark.parametrize("name", ["gpt2", "mamba", "whisper"])
def test_models_of_other_architectures_are_pruned_to_the_same_share(name):
    """Weights that lie (in, out), layers that are read and not called, an encoder beside a decoder."""
    model = build(name).train()

    def size(model, seed):
        return model(**inputs(name, tokens=8, seed=seed))[0].square().mean()

    pruner = BilevelPruner(model, size, density=0.3, rate=1e-3, mask_rate=10.0)
    pruner.step(1, 2)
    learned = output(model.eval(), name, tokens=8)
    masks = pruner.finish()
    total = sum(mask.numel() for mask in masks.values())
    assert sum(int((~mask).sum()) for mask in masks.values()) == int((1 - Decimal("0.3")) * total)
    assert torch.equal(output(bake(model), name, tokens=8), learned)


def test_where_nothing_is_pruned_nothing_is_taken_out():
    model, x = net().eval(), torch.randn(3, 1, 6, 6)
    BilevelPruner(model, loss, density=1.0, granularity="filters").finish()
    wanted = model(x).detach()
    saved = compact(model, x)
    assert saved.before == saved.after
    assert torch.equal(model(x), wanted)


def test_the_gradient_and_the_masks_check_their_arguments():
    x = torch.ones(2, 3)
    with pytest.raises(ValueError, match="gradient must have the shape of the weight"):
        upper_gradient(x, x, x.T)
    with pytest.raises(ValueError, match="inverse_gamma must be"):
        upper_gradient(x, x, x, inverse_gamma=float("nan"))
    with pytest.raises(TypeError, match="weight must be a tensor"):
        upper_gradient([1.0], x, x)
    with pytest.raises(ValueError, match="granularity must be one of"):
        masks_for({"a": x}, 0.5, "blocks")
    with pytest.raises(ValueError, match="NaN"):
        masks_for({"a": x * float("nan")}, 0.5)
    with pytest.raises(ValueError, match="granularity must be one of"):
        compact(net(), torch.randn(2, 1, 6, 6), granularity="weights")


def test_filters_behind_padding_are_refused_because_their_constants_differ_at_borders():
    model = nn.Sequential(
        *(
            nn.Conv2d(1, 4, 3),
            nn.BatchNorm2d(4),
            nn.ReLU(),
            nn.Conv2d(4, 3, 3, padding=1),
            nn.Flatten(),
            nn.Linear(48, 4),
        )
    )
    nn.init.ones_(model[1].bias)
    pruner = BilevelPruner(model, loss, density=0.5, granularity="filters")
    pruner.step(*batches(2))
    pruner.finish()
    with pytest.raises(ValueError, match="padding makes borders differ"):
        compact(model.eval(), torch.randn(3, 1, 6, 6))
