"""GPTQ against rounding to nearest, against all codes of two columns, and against the definition by inverse Hessians."""

from __future__ import annotations

import copy

import pytest
import torch
from tests.properties.architectures import ARCHITECTURES, build, inputs, output
from tests.tiny import tiny_model, token_ids
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from assay.methods.builtin.weight_only import WeightOnlyLinear
from assay.methods.core.layers.inputs import input_moments
from assay.methods.core.quantize.awq import awq
from assay.methods.core.quantize.formats import FORMATS
from assay.methods.core.quantize.gptq import gptq, gptq_weight, matrix, stages
from assay.methods.core.quantize.grids import grid_of, group_grid, output_error


def correlated(width: int, rows: int = 512) -> torch.Tensor:
    x = torch.randn(rows, width) @ torch.randn(width, width)
    x = x * torch.logspace(-1, 1, width)
    return (x.T @ x / rows).double()


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize(
    "grid", [grid_of("int4"), grid_of("int8"), grid_of("w8a8"), grid_of("E4"), group_grid(3, 64), group_grid(2, 16)]
)
def test_the_error_of_outputs_is_below_that_of_rounding_to_nearest(grid, act_order):
    weight, moment = torch.randn(24, 192), correlated(192)
    found = gptq_weight(weight, moment, grid, act_order=act_order)
    nearest = output_error(weight, grid.round(weight).dense(), moment)
    # the inputs that matter most come last here: without their order little is left to make good
    assert output_error(weight, found.dense(), moment) < (0.5 if act_order else 1) * nearest
    # every value lies on the grid of its own scales
    spread = [grid.spread(x, 192) for x in (found.scale, found.minimum)]
    assert torch.equal(grid.codes(found.dense(), *spread), found.codes)


def test_inputs_that_are_not_correlated_leave_rounding_to_nearest():
    weight = torch.randn(8, 64)
    moment = torch.diag(torch.rand(64).double() + 0.1)
    for grid in (grid_of("w8a8"), grid_of("int4")):
        assert torch.equal(gptq_weight(weight, moment, grid).dense(), grid.round(weight).dense())
    dead = moment.clone()
    dead[5] = 0
    assert torch.equal(gptq_weight(weight, dead, grid_of("w8a8")).dense(), grid_of("w8a8").round(weight).dense())


def test_of_two_columns_the_second_is_the_best_of_all_codes():
    grid = grid_of("w8a8")  # a scale a row: fixed beforehand
    for _ in range(8):
        weight = torch.randn(3, 2)
        x = torch.randn(16, 2) @ torch.randn(2, 2)
        moment = (x.T @ x).double() / 16
        found = gptq_weight(weight, moment, grid, damping=0)
        scale, minimum = grid.fit(weight.double())
        for row in range(3):
            first = grid.codes(weight[row, :1].double(), scale[row], minimum[row])  # the first is rounded to nearest
            candidates = [torch.cat([first, torch.tensor([c], dtype=torch.int16)]) for c in range(-127, 128)]
            errors = [
                output_error(weight[row : row + 1], grid.values(c, scale[row], minimum[row])[None], moment)
                for c in candidates
            ]
            assert int(found.codes[row, 0]) == int(first)
            chosen = grid.values(found.codes[row], scale[row], minimum[row])[None]
            assert output_error(weight[row : row + 1], chosen, moment) == pytest.approx(
                min(errors), rel=1e-9, abs=1e-15
            )


def reference(weight, moment, grid, damping, order):
    """By definition: after each column the best change of all columns still free, from the inverse of their own moment. float64."""
    w = weight.double().clone()
    h = moment + damping * moment.diagonal().mean() * torch.eye(len(moment), dtype=torch.float64)
    scale, minimum = grid.fit(w)
    size = grid.group or w.shape[1]
    free = list(order)
    out = torch.zeros_like(w)
    while free:
        j = free[0]
        inverse = torch.linalg.inv(h[free][:, free])
        s, m = scale[:, j // size], minimum[:, j // size]
        out[:, j] = grid.values(grid.codes(w[:, j], s, m), s, m)
        error = (w[:, j] - out[:, j]) / inverse[0, 0]
        w[:, free] -= error[:, None] * inverse[0]
        free = free[1:]
    return out


@pytest.mark.parametrize(("name", "act_order"), [("w8a8", False), ("w8a8", True), ("int4", True)])
def test_columns_are_updated_as_the_inverse_of_what_is_left_says(name, act_order):
    weight, moment, grid = torch.randn(5, 160), correlated(160), grid_of(name)
    order = moment.diagonal().argsort(descending=True, stable=True) if act_order else torch.arange(160)
    found = gptq_weight(weight, moment, grid, damping=0.01, act_order=act_order)
    expected = reference(weight, moment, grid, 0.01, order.tolist())
    assert torch.allclose(found.dense().double(), expected, atol=1e-5)


def test_groups_get_their_scales_from_the_weights_as_corrected_by_then():
    weight, moment, grid = torch.randn(5, 64), correlated(64), grid_of("int4")
    found = gptq_weight(weight, moment, grid)
    first = grid.fit(weight.double())[0]
    assert torch.equal(found.scale[:, :1], first[:, :1])
    assert not torch.equal(found.scale[:, 1:], first[:, 1:])
    # by hand: round the first group, correct the second as a whole, fit it
    h = moment + 0.01 * moment.diagonal().mean() * torch.eye(64, dtype=torch.float64)
    error = weight[:, :32].double() - found.dense()[:, :32].double()
    corrected = weight[:, 32:].double() + error @ h[:32, 32:] @ torch.linalg.inv(h[32:, 32:])
    assert torch.allclose(found.scale[:, 1:], grid.fit(corrected)[0], rtol=1e-2)


@pytest.mark.parametrize("name", ["int4", "int8"])
def test_a_model_is_better_than_rounded_to_nearest_and_packs_without_a_change(name):
    model, ids = tiny_model(intermediate_size=96), [token_ids(4, 60, seed=seed) for seed in range(3)]
    plain, found = copy.deepcopy(model), copy.deepcopy(model)
    rounded = gptq(found, ids, format=name)
    assert len(rounded) == 14
    assert "lm_head" not in rounded
    with torch.no_grad():
        for layer in rounded:
            weight = plain.get_submodule(layer).weight
            weight.copy_(grid_of(name).round(weight).dense())
        held = token_ids(4, 60, seed=9)
        exact, near, better = (m(held).logits for m in (model, plain, found))
    if name == "int4":
        assert float((better - exact).norm()) < 0.9 * float((near - exact).norm())
    for layer, result in rounded.items():
        weight = found.get_submodule(layer).weight
        assert torch.equal(weight, result.dense())
        bits, (out, wide) = int(name[3:]), weight.shape
        packed = WeightOnlyLinear.from_packed(result.parts()["packed"], wide, out, bits, gain=result.gain)
        assert torch.equal(packed.dequantize(), result.dense())
        if bits == 4:
            again = WeightOnlyLinear.from_linear(found.get_submodule(layer), bits)
            assert torch.allclose(again.dequantize(), result.dense(), atol=1e-6)
        assert torch.equal(FORMATS[name].unpack(result.parts(), *weight.shape), result.dense())


def test_layers_see_the_rounded_ones_before_them():
    model, ids = tiny_model(), [token_ids(4, 40)]
    rest = [name for name in dict(model.named_modules()) if name.endswith("layers.1.self_attn.q_proj")]
    names = ["model.layers.0.mlp.down_proj", *rest]
    once, twice = copy.deepcopy(model), copy.deepcopy(model)
    gptq(once, ids, names=names, format=group_grid(2, 32), sequential=False)
    gptq(twice, ids, names=names, format=group_grid(2, 32))
    assert torch.equal(once.get_submodule(names[0]).weight, twice.get_submodule(names[0]).weight)
    assert not torch.equal(once.get_submodule(rest[0]).weight, twice.get_submodule(rest[0]).weight)
    # the second by hand, on the model with the first rounded
    hand = copy.deepcopy(model)
    hand.get_submodule(names[0]).weight.data = twice.get_submodule(names[0]).weight.data.clone()
    moment = input_moments(hand, rest, ids)[rest[0]]
    expected = gptq_weight(model.get_submodule(rest[0]).weight, moment, group_grid(2, 32)).dense()
    assert torch.equal(twice.get_submodule(rest[0]).weight, expected)
    assert [
        len(stage) for stage in stages(model, [n for n, m in model.named_modules() if isinstance(m, nn.Linear)])
    ] == [7, 7, 1]


def test_conv1d_is_turned_around_and_ties_are_left_alone():
    model = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=64, n_positions=32)).eval()
    before = copy.deepcopy(model)
    found = gptq(model, [token_ids(4, 30, vocab=64)], format="w8a8")
    assert set(found) == {
        f"transformer.h.0.{name}" for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    }
    for name, result in found.items():
        assert torch.equal(matrix(model.get_submodule(name)), result.dense())
    assert torch.equal(model.lm_head.weight, before.lm_head.weight)


SMALL = ("mixtral",)
EVERY = [name if name in SMALL else pytest.param(name, marks=pytest.mark.sweep) for name in ARCHITECTURES]


@pytest.mark.parametrize("method", [gptq, awq])
@pytest.mark.parametrize("name", EVERY)
def test_unrelated_architectures_stay_close_to_what_they_were(name, method):
    model = build(name)
    rounded = method(model, [inputs(name, 4)], format="w8a8")
    assert rounded
    for layer, result in rounded.items():
        assert torch.equal(matrix(model.get_submodule(layer)), result.dense())
    expected, found = output(build(name), name), output(model, name)
    assert float((found - expected).norm()) < 0.1 * float(expected.norm())


def test_bad_arguments_are_refused_before_anything_changes():
    model = tiny_model(tie_word_embeddings=True)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    ids = [token_ids(1, 8)]
    for options, message in (
        ({"format": "int3"}, "format must be one of"),
        ({"names": ["nothing"]}, "names must be linear layers of the model, got 'nothing'"),
        ({"names": ["lm_head"]}, "got 'lm_head', which shares"),
        ({"damping": -1}, "damping must be a finite number at least 0"),
        ({"damping": float("nan")}, "damping must be a finite number"),
        (
            {"format": group_grid(4, 48), "names": ["model.layers.0.mlp.up_proj"]},
            "multiple of 48 inputs for this grid, got 64",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            gptq(model, ids, **options)
    with pytest.raises(ValueError, match="batches must reach every layer"):
        gptq(model, [])
    with pytest.raises(ValueError, match=r"moment must have shape \(32, 32\)"):
        gptq_weight(torch.randn(2, 32), torch.eye(4).double(), grid_of("int4"))
    with pytest.raises(ValueError, match="damping must make the moment positive definite, got 0"):
        gptq_weight(torch.randn(2, 32), torch.ones(32, 32).double(), grid_of("int4"), damping=0)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_the_order_of_rows_does_not_matter_and_two_runs_agree():
    weight, moment = torch.randn(12, 64), correlated(64)
    one = gptq_weight(weight, moment, grid_of("int4")).dense()
    assert torch.equal(one, gptq_weight(weight, moment, grid_of("int4")).dense())
    assert torch.equal(one.flip(0), gptq_weight(weight.flip(0), moment, grid_of("int4")).dense())
