"""Sparse layers in models, and pruning while a model trains: zeros stay zeros, and the exported network is the masked one."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from tests.properties.architectures import build, output
from torch import nn
from torch.nn.utils import prune

from assay.methods.compression.fast_sparse_convnets import (
    GradualPruner,
    MobileNet,
    SparseConv1x1,
    SparseLinear,
    sparsify_,
    zeros,
)
from assay.methods.compression.fast_sparse_convnets import layers as method
from assay.methods.core.sparsity.masks import bake, masks_of, matrix, prunable, put_masks
from assay.methods.core.sparsity.projections import blocks, per_layer
from assay.methods.core.sparsity.schedules import Gradual, OneShot

TINY = {"blocks": ((16, 1), (32, 2), (32, 1)), "stem": (8, 2)}


def mobilenet(*, seed=0):
    """A tiny MobileNet with statistics in its norms."""
    torch.manual_seed(seed)
    model = MobileNet(5, **TINY)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(std=0.1)
                module.running_var.uniform_(0.5, 2.0)
                module.weight.uniform_(0.5, 1.5)
                module.bias.normal_(std=0.1)
    return model


def masked(density=0.2, block=1):
    model = mobilenet()
    scores = {name: model.get_submodule(name).weight.detach().abs() for name in model.pointwise()}
    if block == 1:
        return put_masks(model, per_layer(scores, density)).eval()
    return put_masks(model, {name: blocks(score, (block, 1), density) for name, score in scores.items()}).eval()


X = torch.randn(3, 3, 20, 20, generator=torch.Generator().manual_seed(9))


# ---- a model ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", [1, 2, 4])
def test_the_exported_network_is_the_masked_one(block):
    model = masked(block=block)
    with torch.no_grad():
        expected = model(X)
        found = sparsify_(model, block=block)
        assert list(found) == model.pointwise()
        assert all(share == pytest.approx(0.8, abs=0.02) for share in found.values())
        torch.testing.assert_close(model(X), expected, atol=1e-4, rtol=1e-4)
    for name in model.pointwise():
        layer = model.get_submodule(name)
        assert isinstance(layer, SparseConv1x1)
        assert (layer.low, layer.high, layer.matrix.block) == (0.0, 6.0, block)
        assert layer.matrix.stored <= 0.23 * layer.matrix.outputs * layer.matrix.inputs, "zeros must not be kept"
        parent = model.get_submodule(name.rpartition(".")[0])
        assert [type(child) for child in parent[4:]] == [nn.Identity, nn.Identity]
    assert not masks_of(model)


def test_masks_of_torch_and_plain_zeros_are_alike():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(8, 12, 1), nn.Conv2d(12, 4, 1), nn.Flatten(), nn.Linear(100, 6)).eval()
    with torch.no_grad():  # or the masked weight would have a history, and the model could not be copied
        for layer in (model[0], model[1], model[3]):
            prune.l1_unstructured(layer, "weight", amount=0.75)
    x = torch.randn(2, 8, 5, 5)
    baked = bake(copy.deepcopy(model))
    with torch.no_grad():
        expected = model(x)
        assert set(sparsify_(model)) == set(sparsify_(baked)) == {"0", "1", "3"}
        torch.testing.assert_close(model(x), expected, atol=1e-5, rtol=1e-5)
        assert torch.equal(model(x), baked(x))
    assert isinstance(model[3], SparseLinear)


@pytest.mark.parametrize("name", ["llama-tied", "mamba", "vit"])
def test_models_of_transformers_compute_as_their_masks_say_and_are_not_saved(name, tmp_path):
    model = build(name)
    layers = {key: layer for key, layer in prunable(model).items() if isinstance(layer, nn.Linear)}
    scores = {key: matrix(layer).detach().abs() for key, layer in layers.items()}
    put_masks(model, per_layer(scores, 0.2))
    with torch.no_grad():
        expected = output(model, name, 8)
        assert set(sparsify_(model)) == set(layers)
        torch.testing.assert_close(output(model, name, 8), expected, atol=1e-4, rtol=1e-4)
    with pytest.raises(ValueError, match="must not be saved with packed layers"):
        model.save_pretrained(tmp_path)


def test_only_what_has_enough_zeros_is_replaced():
    model = masked(0.5)
    with pytest.raises(ValueError, match="model must have a pointwise or linear layer with 70% zeros, got none"):
        sparsify_(model)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="block must be one of"):
        sparsify_(model, least=0.4, block=3)
    with pytest.raises(ValueError, match="evaluation mode"):
        sparsify_(model.train(), least=0.4)
    assert before.keys() == model.state_dict().keys()
    assert set(sparsify_(model.eval(), least=0.4, exclude=("blocks.1.*",))) == {"blocks.0.3", "blocks.2.3"}


def test_grouped_padded_and_larger_convolutions_are_left_alone():
    model = nn.Sequential(
        nn.Conv2d(4, 4, 1, groups=2), nn.Conv2d(4, 4, 1, padding=1), nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 1)
    )
    assert set(zeros(model)) == {"3"}


def test_a_module_in_several_places_is_not_taken_in():
    """A clamp shared by two convolutions would be gone behind the second, and a convolution used twice has two norms."""
    torch.manual_seed(0)
    clamp, conv, lone = nn.ReLU6(), nn.Conv2d(6, 6, 1), nn.Conv2d(6, 6, 1)
    norms = nn.BatchNorm2d(6), nn.BatchNorm2d(6)
    model = nn.Sequential(lone, clamp, nn.Conv2d(6, 6, 3), clamp, conv, norms[0], conv, norms[1]).eval()
    with torch.no_grad():
        for norm, mean in zip(norms, (-1.0, 1.0), strict=True):
            norm.running_mean.fill_(mean)
        for layer in (conv, lone):
            layer.weight[torch.rand_like(layer.weight) < 0.8] = 0
        x = torch.randn(2, 6, 7, 7) * 4
        expected = model(x)
        assert set(sparsify_(model, least=0.5)) == {"0", "4"}
        assert model[4] is model[6]
        assert model[1] is model[3] is clamp
        assert model[5] is norms[0]
        torch.testing.assert_close(model(x), expected, atol=1e-5, rtol=1e-5)


def test_a_sequence_that_calls_its_layers_in_a_way_of_its_own_keeps_them():
    """What stands behind a convolution in the list need not be what its outputs go through."""

    class Residual(nn.Sequential):
        def forward(self, x):
            return self[1](x) + self[0](x) + self[2](x)

    torch.manual_seed(0)
    model = nn.Sequential(Residual(nn.Conv2d(6, 6, 1), nn.BatchNorm2d(6), nn.ReLU())).eval()
    x = torch.randn(2, 6, 5, 5)
    with torch.no_grad():
        model[0][0].weight[torch.rand_like(model[0][0].weight) < 0.8] = 0
        model[0][1].running_mean.fill_(1.0)
        expected = model(x)
        assert set(sparsify_(model, least=0.5)) == {"0.0"}
        torch.testing.assert_close(model(x), expected, atol=1e-5, rtol=1e-5)
    assert [type(layer) for layer in model[0]] == [SparseConv1x1, nn.BatchNorm2d, nn.ReLU]


def test_strides_leave_pixels_out_and_a_lone_convolution_keeps_its_neighbours():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.act = nn.Conv2d(6, 8, 1, stride=(2, 3), bias=False), nn.ReLU()

        def forward(self, x):
            return self.act(self.conv(x) + 1)

    torch.manual_seed(0)
    model, x = Two().eval(), torch.randn(2, 6, 7, 9)
    with torch.no_grad():
        model.conv.weight[torch.rand_like(model.conv.weight) < 0.8] = 0
        expected = model(x)
        sparsify_(model, least=0.5)
        torch.testing.assert_close(model(x), expected, atol=1e-5, rtol=1e-5)
    assert model.conv.high == math.inf


def test_a_layer_whose_dense_product_is_faster_is_left_as_it_is(monkeypatch):
    model, asked = masked(), []

    def timed(x, matrix, bias):
        asked.append(tuple(x.shape))
        return ("dense" if len(asked) == 1 else "csr"), {}

    monkeypatch.setattr(method, "fastest", timed)
    found = sparsify_(model, batches=[X])
    assert asked == [(3, 8, 10, 10), (3, 16, 5, 5), (3, 32, 5, 5)]
    assert list(found) == model.pointwise()[1:]
    assert type(model.get_submodule(model.pointwise()[0])) is nn.Conv2d
    assert model.get_submodule(model.pointwise()[1]).backend == "csr"


# ---- a layer ---------------------------------------------------------------------------------------------------------------------


def test_a_linear_layer_takes_any_rows():
    torch.manual_seed(0)
    linear = nn.Linear(20, 12)
    with torch.no_grad():
        linear.weight[torch.rand_like(linear.weight) < 0.8] = 0
    layer = SparseLinear(linear.weight, linear.bias)
    for shape in ((20,), (7, 20), (2, 5, 20), (0, 20)):
        x = torch.randn(*shape)
        with torch.no_grad():
            torch.testing.assert_close(layer(x), linear(x), atol=1e-5, rtol=1e-5)
    assert torch.equal(layer.weight.detach() + 0, linear.weight.detach())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype):
    model = masked()
    sparsify_(model)
    layer = model.get_submodule(model.pointwise()[1])
    x = torch.randn(2, 16, 6, 6).to(dtype)
    expected = layer(x.float()).to(dtype)
    model.to(dtype)
    assert layer.values.dtype == layer.matrix.values.dtype == torch.float32
    assert layer.weight.dtype == dtype
    assert torch.equal(layer(x), expected)
    if dtype == torch.bfloat16:  # torch has not every convolution in float16 on a CPU
        with torch.no_grad():
            assert model(X.to(dtype)).dtype == dtype


def test_gradients_reach_the_inputs():
    weight = torch.randn(6, 8) * (torch.rand(6, 8) < 0.3)
    layer = SparseConv1x1(weight, torch.zeros(6), low=0.0)
    x = torch.randn(2, 8, 4, 4, requires_grad=True)
    (found,) = torch.autograd.grad(layer(x).square().sum(), x)
    (expected,) = torch.autograd.grad(nn.functional.conv2d(x, weight[:, :, None, None]).relu().square().sum(), x)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_states_load_with_another_number_of_weights_and_copies_are_apart():
    first, other = masked(0.2), masked(0.1)
    sparsify_(first)
    sparsify_(other)
    copied = copy.deepcopy(first)
    with torch.no_grad():
        before, wanted = first(X), other(X)
        assert not torch.allclose(before, wanted, atol=1e-3)
        first.load_state_dict(other.state_dict())
        assert torch.equal(first(X), wanted)
        assert torch.equal(copied(X), before)
        for parameter in other.buffers():
            parameter.zero_()
        assert torch.equal(first(X), wanted)


def test_a_state_that_leads_out_of_the_matrix_is_refused():
    layer = SparseConv1x1(torch.eye(4))
    state = layer.state_dict()
    state["steps"] = state["steps"] + 1000
    with pytest.raises(ValueError, match="steps must lead through the 4 channels"):
        layer.load_state_dict(state)
    with pytest.raises(ValueError, match="counts must be of 4 outputs, got 2"):
        layer.load_state_dict(SparseConv1x1(torch.eye(4)[:2]).state_dict())


def test_inputs_that_do_not_fit_are_refused():
    conv, linear = SparseConv1x1(torch.eye(4)), SparseLinear(torch.eye(4))
    with pytest.raises(ValueError, match=r"x must be \(batch, 4, height, width\)"):
        conv(torch.zeros(2, 4, 4))
    with pytest.raises(ValueError, match=r"x must be \(batch, 4, ...\)"):
        conv(torch.zeros(2, 5, 4, 4))
    with pytest.raises(TypeError, match="x must be float32, bfloat16 or float16"):
        conv(torch.zeros(2, 4, 4, 4, dtype=torch.int64))
    with pytest.raises(ValueError, match="x must have 4 features"):
        linear(torch.zeros(2, 5))


# ---- pruning while training ------------------------------------------------------------------------------------------------------


def test_the_schedule_of_the_paper():
    schedule = Gradual(final=0.9, initial=0.1, begin=20, every=5, updates=40)
    seen = [schedule.sparsity(step) for step in range(20, 240)]
    assert seen[0] == pytest.approx(0.1)
    assert schedule.sparsity(220) == schedule.sparsity(10_000) == pytest.approx(0.9)
    assert seen == sorted(seen)
    assert schedule.sparsity(120) == pytest.approx(0.1 + 0.8 * 7 / 8)


def trained(optimizer, pruner_of, steps=12):
    """A small net that trained while it was pruned, and the share of zeros after every step."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 16, 1), nn.ReLU(), nn.Conv2d(16, 8, 1))
    made = optimizer(model.parameters())
    pruner = pruner_of(model)
    pruner.attach(made)
    shares = []
    for _ in range(steps):
        made.zero_grad()
        model(torch.randn(4, 3, 5, 5)).square().mean().backward()
        made.step()
        shares.append({name: float((weight == 0).float().mean()) for name, weight in pruner.weights.items()})
    return model, made, pruner, shares


OPTIMIZERS = {
    "momentum and decay": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=0.1),
    "adam": lambda p: torch.optim.AdamW(p, 0.05, weight_decay=0.1),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_masked_weights_stay_zero_through_momentum_and_adam(name):
    schedule = Gradual(final=0.75, begin=2, every=2, updates=3)
    _, made, pruner, shares = trained(OPTIMIZERS[name], lambda m: GradualPruner(m, ["0", "2"], schedule))
    for layer in ("0", "2"):
        weight, mask = pruner.weights[layer], pruner.masks[layer]
        assert bool((weight[~mask] == 0).all())
        assert bool((weight[mask] != 0).all())
        state = [value for value in made.state[weight].values() if torch.is_tensor(value) and value.shape == mask.shape]
        assert state
        assert all(bool((value[~mask] == 0).all()) for value in state)
        assert mask.sum() == mask.numel() // 4
        seen = [share[layer] for share in shares]
        assert seen == sorted(seen)
        # after step k (from 0) stands the mask of step k + 1
        assert seen == pytest.approx([schedule.sparsity(k + 1) for k in range(12)], abs=1 / mask.numel())


def test_without_the_hook_momentum_brings_weights_back():
    """What the test above rests on: the same optimiser moves a weight that was only once set to zero."""
    _, made, pruner, _ = trained(
        OPTIMIZERS["momentum and decay"], lambda m: GradualPruner(m, ["0"], OneShot(0.5, at=1000)), steps=3
    )
    weight = pruner.weights["0"]
    with torch.no_grad():
        weight[0] = 0
    made.step()
    assert bool((weight[0] != 0).any())


@pytest.mark.parametrize("block", [2, 4])
def test_blocks_go_as_a_whole(block):
    _, _, pruner, _ = trained(
        OPTIMIZERS["adam"], lambda m: GradualPruner(m, ["2"], OneShot(0.5, at=3), block={"2": block}), steps=5
    )
    tiles = pruner.masks["2"].flatten(1).unflatten(0, (-1, block))
    assert bool((tiles.all(1) == tiles.any(1)).all())
    assert tiles.any(1).float().mean() == 0.5
    zero = (pruner.weights["2"].detach().flatten(1) == 0).unflatten(0, (-1, block))
    assert bool((zero.all(1) == zero.any(1)).all())


def test_a_global_threshold_leaves_layers_unlike_shares():
    _, _, pruner, _ = trained(
        OPTIMIZERS["adam"], lambda m: GradualPruner(m, ["0", "2"], OneShot(0.5, at=2), scope="global"), steps=4
    )
    kept = {name: int(mask.sum()) for name, mask in pruner.masks.items()}
    assert sum(kept.values()) == (3 * 16 + 16 * 8) // 2
    assert kept["0"] != 3 * 16 // 2


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_what_was_pruned_does_not_come_back_in_the_place_of_a_weight_that_is_zero(scope):
    """Ten weights, of which those that stay became 0 by themselves: all have the same magnitude as those that are gone."""
    model = nn.Sequential(nn.Linear(10, 1))
    with torch.no_grad():
        model[0].weight.copy_(torch.arange(1.0, 11.0))
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    pruner = GradualPruner(model, ["0"], Gradual(final=0.7, initial=0.4, begin=0, every=1, updates=1), scope=scope)
    pruner.attach(optimizer)
    assert pruner.masks["0"].flatten().tolist() == [False] * 4 + [True] * 6
    with torch.no_grad():
        model[0].weight.zero_()
    model[0].weight.grad = torch.zeros_like(model[0].weight)
    optimizer.step()
    assert pruner.masks["0"].flatten().tolist() == [False] * 4 + [True] * 3 + [False] * 3


def test_a_density_is_the_decimal_that_was_meant():
    """1 - 0.7 is a little more than 0.3 in binary, and would keep one weight too many."""
    model = nn.Sequential(nn.Linear(10, 1))
    pruner = GradualPruner(model, ["0"], OneShot(0.7))
    pruner.attach(torch.optim.SGD(model.parameters(), 0.1))
    assert int((model[0].weight == 0).sum()) == 7


def test_what_cannot_be_pruned_is_refused():
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU())
    schedule = OneShot(0.5)
    with pytest.raises(ValueError, match="names must hold at least one layer"):
        GradualPruner(model, [], schedule)
    with pytest.raises(ValueError, match="names must be plain linear layers or convolutions, got '1'"):
        GradualPruner(model, ["1"], schedule)
    with pytest.raises(ValueError, match="block must divide the 6 outputs of 0, got 4"):
        GradualPruner(model, ["0"], schedule, block=4)
    with pytest.raises(ValueError, match="block must be 1 with scope 'global'"):
        GradualPruner(model, ["0"], schedule, scope="global", block=2)
    with pytest.raises(ValueError, match="optimizer must have the weights of all named layers"):
        GradualPruner(model, ["0"], schedule).attach(torch.optim.SGD([model[0].bias], 0.1))
