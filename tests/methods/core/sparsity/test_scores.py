"""Scores against their definitions."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from assay.methods.core.layers.inputs import input_norms
from assay.methods.core.sparsity.scores import gradients, grouped, magnitude, movement, snip, taylor, wanda


def test_element_wise_scores():
    w, g = torch.randn(4, 6), torch.randn(4, 6)
    assert torch.equal(magnitude(w), w.abs())
    assert torch.equal(snip(w, g), (w * g).abs())
    assert torch.equal(movement(w, g), -w * g)
    assert torch.equal(taylor(w, [g]), (w * g).square())
    assert magnitude(w.bfloat16()).dtype == torch.float32  # ties of bfloat16 products do not arise
    assert magnitude(w.double()).dtype == torch.float64
    assert not magnitude(nn.Parameter(w)).requires_grad


def test_taylor_squares_the_sum_of_a_filter_in_each_batch():
    w, batches = torch.randn(3, 2, 3, 3), [torch.randn(3, 2, 3, 3) for _ in range(4)]
    expected = sum((w * g).sum((1, 2, 3)).square() for g in batches) / 4
    found = taylor(w, iter(batches), over=(1, 2, 3))
    assert found.shape == (3, 1, 1, 1)
    assert torch.allclose(found.flatten(), expected)
    with pytest.raises(ValueError, match="gradients must hold at least one tensor"):
        taylor(w, [])


def test_snip_is_the_change_of_the_loss_to_first_order():
    model = nn.Linear(6, 3).double()
    x, y = torch.randn(16, 6).double(), torch.randn(16, 3).double()

    def loss(model, batch):
        return (model(batch[0]) - batch[1]).square().mean()

    (found,) = gradients(model, {"weight": model.weight}, [(x, y)], loss)
    assert model.weight.grad is None
    base, step = loss(model, (x, y)).item(), 1e-6
    weight = model.weight.detach().clone()
    for i, j in ((0, 0), (2, 5)):
        with torch.no_grad():
            model.weight.copy_(weight)
            model.weight[i, j] *= 1 - step
        change = abs(loss(model, (x, y)).item() - base) / step
        assert change == pytest.approx(float(snip(weight, found["weight"])[i, j]), rel=1e-3)


def test_gradients_of_what_a_batch_does_not_use_are_zero_and_no_loss_is_nan():
    model = nn.ModuleDict({"a": nn.Linear(2, 1), "b": nn.Linear(2, 1)})
    weights = {"a": model["a"].weight, "b": model["b"].weight}
    found = next(gradients(model, weights, [torch.ones(1, 2)], lambda m, x: m["a"](x).sum()))
    assert found["a"].tolist() == [[1.0, 1.0]]
    assert found["b"].tolist() == [[0.0, 0.0]]
    with pytest.raises(ValueError, match="loss must be finite, got nan"):
        next(gradients(model, weights, [torch.ones(1, 2)], lambda m, x: m["a"](x).sum() * torch.nan))


def test_wanda_is_the_error_of_the_output_that_a_weight_leaves_behind():
    layer, x = nn.Linear(8, 3, bias=False), torch.randn(50, 8)
    found = wanda(layer.weight, input_norms(nn.Sequential(layer), ["0"], [x])["0"])
    for out, column in ((0, 0), (2, 7)):
        without = layer.weight.detach().clone()
        without[out, column] = 0
        assert float(found[out, column]) == pytest.approx(float((x @ (layer.weight - without).T).norm()), rel=1e-4)


def test_groups_are_ranked_by_their_norm():
    scores = torch.randn(6, 4, 3, 3)
    assert torch.allclose(grouped(scores, 0), scores.flatten(1).norm(dim=1))
    assert torch.allclose(grouped(scores, 1), scores.movedim(1, 0).flatten(1).norm(dim=1))
    assert torch.allclose(grouped(scores, 0, 2, "l1"), scores.reshape(3, -1).abs().sum(1), rtol=1e-5)
    assert torch.equal(grouped(scores, 0, 3, "max"), scores.reshape(2, -1).abs().amax(1))
    assert torch.allclose(grouped(scores, 0, 6, "sum"), scores.sum()[None], atol=1e-4)


def test_bad_arguments_are_named():
    w = torch.randn(4, 6)
    with pytest.raises(ValueError, match=r"gradient must have the shape of the weight, \(4, 6\), got \(6, 4\)"):
        snip(w, w.T)
    with pytest.raises(TypeError, match="weight must hold floating-point numbers, got torch.int64"):
        magnitude(torch.ones(2, dtype=torch.long))
    with pytest.raises(ValueError, match=r"norms must broadcast over the weight \(4, 6\), got \(4,\)"):
        wanda(w, torch.ones(4))
    with pytest.raises(ValueError, match="norms must be at least 0"):
        wanda(w, -torch.ones(6))
    with pytest.raises(ValueError, match="norms must be finite"):
        wanda(w, torch.full((6,), torch.nan))
    with pytest.raises(ValueError, match="size must divide the 4 places of axis 0, got 3"):
        grouped(w, 0, 3)
    with pytest.raises(ValueError, match="norm must be one of"):
        grouped(w, 0, 1, "l3")
