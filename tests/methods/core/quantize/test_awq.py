"""AWQ: folding leaves the float model as it is, errors are at most those of rounding to nearest, and the search is the grid's best."""

from __future__ import annotations

import copy

import pytest
import torch
from tests.properties.architectures import build, inputs, output
from tests.tiny import tiny_model, token_ids
from torch import nn

from assay.methods.core.layers.inputs import input_moments
from assay.methods.core.quantize.awq import CLIPS, Fold, awq, clip, fold_scales, folds, search_scale
from assay.methods.core.quantize.gptq import matrix
from assay.methods.core.quantize.grids import grid_of, group_grid, output_error


def spiky(width: int) -> torch.Tensor:
    """Inputs of which a few are much larger, as in language models."""
    x = torch.randn(400, width)
    x[:, ::17] *= 20
    return x


def gained(model: nn.Module, spread: float = 1.0) -> nn.Module:
    """Norms that are no identity, and amplify some channels."""
    random = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for module in model.modules():
            if "Norm" in type(module).__name__:
                module.weight.copy_(torch.exp(spread * torch.randn(module.weight.shape, generator=random)))
    return model


def test_the_scale_is_the_best_of_the_grid_and_helps_inputs_that_are_large():
    x, weights, grid = spiky(64), [torch.randn(24, 64), torch.randn(8, 64)], group_grid(3, 32)
    moment, mean = (x.T @ x).double() / 400, x.abs().mean(0)
    scale, alpha = search_scale(weights, moment, mean, grid)

    def error(s):
        return sum(output_error(w, grid.round(w.double() * s).dense().double() / s, moment) for w in weights)

    assert 0 < alpha < 1
    assert error(scale) < 0.8 * error(torch.ones(64).double())
    for i in range(20):
        other = mean.double() ** (i / 20)
        assert error(scale) <= error(other / (other.max() * other.min()).sqrt()) * (1 + 1e-9)
    even = torch.ones(64)
    assert search_scale(weights, torch.eye(64).double(), even, grid)[1] == 0.0  # nothing to gain: left alone


def test_clipping_is_the_best_of_its_shares_for_each_group_and_never_worse():
    x, weight, grid = spiky(64), torch.randn(24, 64), group_grid(2, 32, asymmetric=False)
    weight[:, 3] *= 6  # outliers worth cutting
    moment = (x.T @ x).double() / 400
    found = clip(weight, moment, grid).dense()
    assert output_error(weight, found, moment) < output_error(weight, grid.round(weight).dense(), moment)
    diagonal = torch.block_diag(moment[:32, :32], moment[32:, 32:])  # groups apart: there each choice is the best one
    apart = clip(weight, diagonal, grid).dense()
    for row, start in ((0, 0), (7, 32), (23, 0)):
        part = slice(start, start + 32)
        limit = weight[row, part].abs().max()
        own = diagonal[part, part]
        errors = []
        for share in CLIPS:
            narrowed = weight.clone()
            narrowed[row, part] = weight[row, part].clamp(-limit * share, limit * share)
            errors.append(
                output_error(weight[row : row + 1, part], grid.round(narrowed).dense()[row : row + 1, part], own)
            )
        assert output_error(weight[row : row + 1, part], apart[row : row + 1, part], own) == pytest.approx(
            min(errors), rel=1e-5
        )


def test_no_row_gets_worse_where_the_errors_of_groups_add_up():
    weight, grid = torch.randn(100, 64), group_grid(2, 16)
    moment = torch.ones(64, 64).double() + 0.01 * torch.eye(64)  # all inputs move together
    found, nearest = clip(weight, moment, grid).dense(), grid.round(weight).dense()
    mine = [output_error(w[None], q[None], moment) for w, q in zip(weight, found, strict=True)]
    plain = [output_error(w[None], q[None], moment) for w, q in zip(weight, nearest, strict=True)]
    assert all(a <= b * (1 + 1e-9) for a, b in zip(mine, plain, strict=True))
    assert sum(mine) < 0.9 * sum(plain)


def test_folds_of_a_decoder_are_found_by_trying():
    model = gained(tiny_model(num_key_value_heads=4))
    prefix = "model.layers.0."
    found = folds(model, token_ids(2, 9))
    assert len(found) == 8
    assert Fold(f"{prefix}input_layernorm", tuple(f"{prefix}self_attn.{p}_proj" for p in "qkv")) in found
    assert Fold(f"{prefix}post_attention_layernorm", (f"{prefix}mlp.gate_proj", f"{prefix}mlp.up_proj")) in found
    assert Fold(f"{prefix}mlp.up_proj", (f"{prefix}mlp.down_proj",)) in found
    assert Fold(f"{prefix}self_attn.v_proj", (f"{prefix}self_attn.o_proj",)) in found
    grouped = folds(
        gained(tiny_model()), token_ids(2, 9)
    )  # two key-value heads: no value channel belongs to one output channel
    assert not any(fold.before.endswith("v_proj") for fold in grouped)


@pytest.mark.parametrize(("kind", "limit"), [("Llama", 1e-12), ("Gemma", 2e-5)])  # whose norms compute in float32
def test_folding_leaves_the_float_model_as_it_is(kind, limit):
    changes = {"head_dim": 16} if kind == "Gemma" else {}
    model, ids = (
        gained(tiny_model(kind, **changes), spread=2).double(),
        [token_ids(4, 40, seed=seed) for seed in range(2)],
    )
    before = copy.deepcopy(model)
    with torch.no_grad():
        expected = model(ids[0]).logits
        done = fold_scales(model, ids, format=group_grid(3, 32), steps=6)
        found = model(ids[0]).logits
    assert sum(step.alpha > 0 for step in done) >= 4
    assert float((found - expected).norm()) <= limit * float(expected.norm())
    for step in done:
        for name in step.fold.layers:
            changed = not torch.allclose(model.get_submodule(name).weight, before.get_submodule(name).weight)
            assert changed or step.alpha == 0 or name.endswith("v_proj")


def test_a_residual_stream_or_an_activation_in_between_is_not_folded():
    bert = build("bert")
    assert folds(bert, inputs("bert")) == []  # its norms feed the residual stream, its GELU passes no factor on
    opt = folds(build("opt"), inputs("opt"))
    assert any(fold.before.endswith("fc1") for fold in opt)  # ReLU does
    assert not any(fold.before.endswith("c_fc") for fold in folds(build("gpt2"), inputs("gpt2")))
    mixtral = folds(build("mixtral"), inputs("mixtral"))
    assert {fold.before.rsplit(".", 1)[-1] for fold in mixtral} == {
        "input_layernorm"
    }  # experts and routers take the other's output
    half = build("opt").to(torch.bfloat16)
    assert folds(half, inputs("opt")) == opt


def test_the_error_of_layers_is_at_most_that_of_rounding_to_nearest():
    model, ids = gained(tiny_model(num_key_value_heads=4, intermediate_size=128)), [token_ids(6, 60)]
    grid, whole = grid_of("int4"), copy.deepcopy(model)
    folded = copy.deepcopy(model)
    done = fold_scales(folded, ids, steps=6)
    rounded = awq(model, ids, steps=6)
    assert len(rounded) == 14
    moments = input_moments(whole, rounded, ids)
    scales = {layer: step.scale for step in done for layer in step.fold.layers}
    sums = {}
    for step in done:
        for layer in step.fold.layers:
            original = whole.get_submodule(layer).weight.detach().double()
            moment = moments[layer] / (scales[layer][:, None] * scales[layer])
            mine = output_error(folded.get_submodule(layer).weight, rounded[layer].dense(), moment)
            nearest = output_error(original, grid.round(original).dense(), moments[layer])
            rows = next((other.scale for other in done if other.fold.before == layer), None)
            if rows is None:  # those scaled along their outputs too have other units
                a, b = sums.get(step.fold, (0.0, 0.0))
                sums[step.fold] = a + mine, b + nearest
    assert len(sums) == 8
    whole_folds = {fold: pair for fold, pair in sums.items() if not any(o.fold.before in fold.layers for o in done)}
    assert all(mine <= nearest * 1.02 for mine, nearest in whole_folds.values())
    assert sum(mine for mine, _ in sums.values()) < sum(nearest for _, nearest in sums.values())
    for layer, result in rounded.items():
        assert torch.equal(model.get_submodule(layer).weight, result.dense())


def test_the_model_answers_closer_than_rounded_to_nearest():
    model, ids = gained(tiny_model(num_key_value_heads=4, intermediate_size=128)), [token_ids(6, 60)]
    grid = group_grid(3, 32)
    plain, found = copy.deepcopy(model), copy.deepcopy(model)
    rounded = awq(found, ids, format=grid, steps=6)
    with torch.no_grad():
        for layer in rounded:
            weight = plain.get_submodule(layer).weight
            weight.copy_(grid.round(weight).dense())
        held = token_ids(4, 60, seed=9)
        exact, near, better = (m(held).logits for m in (model, plain, found))
    assert float((better - exact).norm()) < float((near - exact).norm())


@pytest.mark.parametrize("name", ["opt", *(pytest.param(name, marks=pytest.mark.sweep) for name in ("gpt2", "phi3"))])
def test_other_architectures_keep_their_function_when_folded(name):
    model = gained(build(name))
    expected = output(model, name)
    done = fold_scales(model, [inputs(name)], steps=4)
    assert any(step.alpha > 0 for step in done)
    assert float((output(model, name) - expected).norm()) <= 1e-4 * float(expected.norm())
    assert all(torch.isfinite(matrix(layer)).all() for layer in model.modules() if isinstance(layer, nn.Linear))


def test_bad_arguments_are_refused_before_anything_changes():
    model = tiny_model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for options, message in (
        ({"format": "int3"}, "format must be one of"),
        ({"names": ["nothing"]}, "names must be linear layers of the model, got 'nothing'"),
        ({"steps": 0}, "steps must be a whole number at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            awq(model, [token_ids(1, 8)], **options)
    with pytest.raises(ValueError, match="batches must hold at least one batch"):
        awq(model, [])
    with pytest.raises(TypeError, match="clipping must be True or False"):
        awq(model, [token_ids(1, 8)], clipping=1)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
