"""Gradients past masks: each rule against its definition, and scores that learn."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from tests.tiny import tiny_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from assay.methods.core.sparsity.projections import global_, n_m
from assay.methods.core.sparsity.straight_through import (
    learn_scores,
    masked,
    reproject,
    settle_scores,
    straight_through,
)


def test_the_value_goes_forward_and_the_gradient_straight_through():
    x = torch.randn(3, 4, requires_grad=True)
    value = x.detach() > 0
    y = straight_through(x, value)
    assert y.dtype == x.dtype
    assert torch.equal(y, value.float())
    g = torch.randn(3, 4)
    y.backward(g)
    assert torch.equal(x.grad, g)
    value.zero_()
    assert bool(y.any())  # a copy


def test_hydra_scores_get_weight_times_gradient_times_sign_and_weights_the_masked_gradient():
    w, s = torch.randn(5, 6, requires_grad=True), torch.randn(5, 6, requires_grad=True)
    mask, g = s.detach().abs() > 0.5, torch.randn(5, 6)
    (w * straight_through(s.abs(), mask)).backward(g)
    by_hand = s.grad.clone(), w.grad.clone()
    w.grad = s.grad = None
    out = masked(w, s, mask)
    assert torch.equal(out, w * mask)
    out.backward(g)
    assert torch.equal(s.grad, by_hand[0])
    assert torch.equal(w.grad, by_hand[1])
    assert torch.allclose(s.grad, w.detach() * g * s.detach().sign())
    assert bool((s.grad[~mask] != 0).all())  # what is masked can come back


def test_a_rule_replaces_the_gradient_of_the_mask():
    gamma = 10.0

    def implicit(weight, mask, grad):
        return (weight - mask * grad / gamma) * grad

    w, s = torch.randn(4, 4, requires_grad=True), torch.randn(4, 4, requires_grad=True)
    mask, g = torch.rand(4, 4) > 0.5, torch.randn(4, 4)
    masked(w, s, mask, implicit).backward(g)
    assert torch.allclose(s.grad, (w.detach() - mask * g / gamma) * g * s.detach().sign())
    assert torch.equal(w.grad, mask * g)


def test_sparse_forward_with_a_dense_gradient():
    w = torch.randn(4, 8, requires_grad=True)
    mask, x = n_m(w.detach().abs(), 2, 4), torch.randn(3, 8)
    y = x @ straight_through(w, w * mask).T
    assert torch.equal(y, x @ (w * mask).T)
    y.sum().backward()
    assert torch.equal(w.grad, x.sum(0).expand(4, 8))


def test_masked_in_double_matches_autograd_of_the_product_for_the_weight():
    w = torch.randn(3, 3, dtype=torch.float64, requires_grad=True)
    s, mask = torch.randn(3, 3).double(), torch.rand(3, 3) > 0.5
    assert torch.autograd.gradcheck(lambda w: masked(w, s, mask), (w,))


def test_learned_scores_start_at_magnitude_follow_their_gradient_and_come_off():
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), Conv1D(4, 8))
    nn.init.normal_(model[2].weight, std=0.3)
    project = partial(global_, density=0.25)
    before = {name: p.detach().clone() for name, p in model.state_dict().items()}
    x = torch.randn(32, 6)
    scored = learn_scores(model, ["0", "2"], project)
    first = global_({"0": before["0.weight"].abs(), "2": before["2.weight"].T.abs().contiguous()}, 0.25)
    assert torch.equal(model[0].weight != 0, first["0"])
    assert torch.equal((model[2].weight != 0).T, first["2"])
    optimiser = torch.optim.SGD([unit.scores for unit in scored.values()], lr=1.0)
    losses = []
    for _ in range(20):
        optimiser.zero_grad()
        loss = (model(x) - x[:, :4]).square().mean()
        loss.backward()
        optimiser.step()
        reproject(model, scored, project)
        losses.append(loss.item())
        assert sum(int(unit.mask.sum()) for unit in scored.values()) == 20
    assert losses[-1] < losses[0]
    final = {name: model.get_submodule(name).weight.detach().clone() for name in scored}
    masks = settle_scores(model, scored)
    assert any(not torch.equal(masks[name], first[name]) for name in masks)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])  # only the scores learned
    assert type(model[0]) is nn.Linear
    assert torch.equal(model[0].weight * masks["0"], final["0"])
    assert torch.equal(model[2].weight * masks["2"].T, final["2"])


def test_layers_whose_weight_is_not_their_own_are_refused_before_anything_changes():
    model = tiny_model(tie_word_embeddings=True)
    kinds = [type(module) for module in model.modules()]
    project = partial(global_, density=0.5)
    with pytest.raises(ValueError, match="names must be layers whose weight is not tied, got 'lm_head'"):
        learn_scores(model, ["model.layers.0.mlp.up_proj", "lm_head"], project)
    with pytest.raises(ValueError, match="names must be layers with a weight of their own, got 'nowhere'"):
        learn_scores(model, ["nowhere"], project)
    with pytest.raises(ValueError, match=r"scores\['lm_head'\] must have the shape|scores must be of the named layers"):
        learn_scores(model, ["model.layers.0.mlp.up_proj"], project, scores={"lm_head": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"project must give a mask of shape \(96, 64\)"):
        learn_scores(model, ["model.layers.0.mlp.up_proj"], lambda s: {"x": torch.ones(1, dtype=torch.bool)})
    assert [type(module) for module in model.modules()] == kinds


def test_bad_shapes_are_named():
    w, m = torch.randn(2, 3), torch.ones(2, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"value must have the shape of x, \(2, 3\), got \(3, 2\)"):
        straight_through(w, w.T)
    with pytest.raises(ValueError, match=r"mask must have the shape of the weight, \(2, 3\), got \(2,\)"):
        masked(w, w, m[:, 0])
    with pytest.raises(TypeError, match="mask must hold bools"):
        masked(w, w, w)
