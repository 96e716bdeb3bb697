"""Low-rank layers: errors, costs, conversion, what people plug them into."""

from __future__ import annotations

import copy
import math
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.tiny import tiny_model
from torch import nn
from transformers import (
    AlbertConfig,
    AlbertModel,
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForCausalLM,
)
from transformers.pytorch_utils import Conv1D

from assay.methods.core.layers.surgery import LayerCost, cost, merge
from assay.methods.layers.greenformers import (
    CED,
    LED,
    SOLVERS,
    EncoderBlock,
    LEDEmbedding,
    apply_low_rank,
    auto_fact,
    block_macs,
    break_even_rank,
    crossover_tokens,
    factor,
    linformer,
    training_cost,
    transform,
    use_linformer,
)
from assay.methods.transform import Transform, TuneContext


def bert(**changes) -> BertModel:
    torch.manual_seed(0)
    shape = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "vocab_size": 61,
    }
    return BertModel(BertConfig(**{**shape, "max_position_embeddings": 40, **changes})).eval()


def llama() -> LlamaForCausalLM:
    return tiny_model(hidden_size=32, intermediate_size=64, vocab_size=61, tie_word_embeddings=True)


def ids(n: int = 9, batch: int = 2, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 61, (batch, n), generator=torch.Generator().manual_seed(seed))


def correlated(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    """Inputs whose directions matter unequally, so that data-aware and plain SVD disagree."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=generator) * torch.logspace(0, -2, columns)
    return torch.randn(rows, columns, generator=generator) @ mix.T


# --------------------------------------------------------------------------------------------------------------- solvers

SHAPES = [(12, 20), (20, 12), (16, 16)]


@pytest.mark.parametrize("shape", SHAPES)
def test_svd_error_is_the_sum_of_dropped_squares_and_never_rises_with_rank(shape):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    s = torch.linalg.svdvals(weight.double())
    errors = []
    for rank in range(1, min(shape) + 1):
        d, e = factor(weight, rank)
        assert d.shape == (shape[0], rank)
        assert e.shape == (rank, shape[1])
        errors.append((weight - d @ e).double().square().sum())
        torch.testing.assert_close(errors[-1], s[rank:].square().sum(), atol=1e-4, rtol=1e-4)
    assert all(a >= b for a, b in zip(errors, errors[1:], strict=False))
    assert errors[-1] < 1e-8  # full rank: the dense layer to rounding


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 7))
def test_svd_is_minimal_among_rank_r_matrices(seed, rank):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(9, 8, generator=generator)
    d, e = factor(weight, rank)
    best = (weight - d @ e).norm()
    other_d = d + 0.1 * torch.randn(d.shape, generator=generator)
    other_e = torch.linalg.lstsq(other_d, weight).solution  # the best a rival column space can do
    assert best <= (weight - other_d @ other_e).norm() + 1e-5


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rank", [1, 4, 8])
def test_data_aware_output_error_is_never_above_plain_svd(shape, rank):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    x = correlated(200, shape[1])
    errors = []
    for solver in ("svd", "data_svd"):
        d, e = factor(weight, rank, solver, moment=x.T @ x)
        errors.append((x @ (weight - d @ e).T).norm())
    plain, aware = errors
    assert aware < plain * 0.999


def test_data_aware_error_is_the_least_possible():
    """Against the closed form: singular values of W C^(1/2)."""
    weight = torch.randn(10, 14, generator=torch.Generator().manual_seed(3)).double()
    x = correlated(300, 14).double()
    d, e = factor(weight, 4, "data_svd", moment=x.T @ x)
    s = torch.linalg.svdvals(x @ weight.T)
    torch.testing.assert_close((x @ (weight - d @ e).T).norm(), s[4:].square().sum().sqrt())


@pytest.mark.parametrize("solver", ["svd", "data_svd"])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_rank_r_weight_is_recovered(solver, shape):
    generator = torch.Generator().manual_seed(4)
    weight = torch.randn(shape[0], 3, generator=generator) @ torch.randn(3, shape[1], generator=generator)
    x = correlated(200, shape[1])
    d, e = factor(weight, 3, solver, moment=x.T @ x)
    torch.testing.assert_close(d @ e, weight, atol=1e-4, rtol=1e-3)


def test_data_aware_with_inputs_that_span_little():
    """Fewer inputs than dimensions: the second moment has no inverse, and none is needed."""
    weight = torch.randn(20, 16, generator=torch.Generator().manual_seed(5))
    x = correlated(5, 16)
    d, e = factor(weight, 5, "data_svd", moment=x.T @ x)
    torch.testing.assert_close(x @ (d @ e).T, x @ weight.T, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("solver", ["nmf", "snmf"])
def test_non_negative_factors_and_errors_that_fall(solver):
    weight = torch.rand(14, 10, generator=torch.Generator().manual_seed(6)) - (0.0 if solver == "nmf" else 0.5)
    errors = []
    for rounds in (1, 3, 10, 40):
        d, e = factor(weight, 4, solver, num_iter=rounds)
        assert (d >= 0).all()
        assert solver == "snmf" or (e >= 0).all()
        errors.append((weight - d @ e).norm())
    assert all(a >= b - 1e-6 for a, b in zip(errors, errors[1:], strict=False))
    assert errors[-1] < weight.norm() * 0.9


@pytest.mark.parametrize("solver", ["nmf", "snmf"])
def test_non_negative_solvers_approach_a_product_of_their_kind(solver):
    generator = torch.Generator().manual_seed(7)
    signed = torch.randn if solver == "snmf" else torch.rand
    weight = torch.rand(14, 2, generator=generator) @ signed(2, 10, generator=generator)
    d, e = factor(weight, 2, solver, num_iter=1000)
    assert (d @ e - weight).norm() < 0.02 * weight.norm()


def test_seeds_repeat():
    weight = torch.randn(8, 8)
    for solver in ("random", "nmf", "snmf"):
        assert torch.equal(factor(weight, 3, solver, seed=1)[0], factor(weight, 3, solver, seed=1)[0])
        assert not torch.equal(factor(weight, 3, solver, seed=1)[0], factor(weight, 3, solver, seed=2)[0])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rank": 9}, r"rank must lie in 1..6 for a \(6, 8\) weight, got 9"),
        ({"rank": 0}, "rank must lie in"),
        ({"rank": 2, "solver": "qr"}, "solver must be one of svd, data_svd, random, nmf, snmf, got 'qr'"),
        ({"rank": 2, "solver": "data_svd"}, "moment must be given"),
    ],
)
def test_factor_names_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        factor(torch.randn(6, 8), **arguments)


# ----------------------------------------------------------------------------------------------------------------- units


@pytest.mark.parametrize("leading", [(), (5,), (2, 5), (2, 3, 5)])
def test_led_takes_any_leading_dimensions_and_views(leading):
    led = LED(12, 7, 3)
    x = torch.randn(*leading, 12)
    assert led(x).shape == (*leading, 7)
    torch.testing.assert_close(
        led(x), nn.functional.linear(x, led.decoder.weight @ led.encoder.weight, led.decoder.bias)
    )
    if len(leading) == 2:  # a non-contiguous input
        flipped = torch.randn(5, 2, 12).transpose(0, 1)
        torch.testing.assert_close(led(flipped), led(flipped.contiguous()))


def test_break_even_ranks():
    assert break_even_rank(nn.Linear(768, 768)) == 384
    assert int(break_even_rank(nn.Linear(768, 3072))) == 614
    assert break_even_rank(Conv1D(3072, 768)) == break_even_rank(nn.Linear(768, 3072))
    conv = nn.Conv2d(16, 32, 3)
    assert break_even_rank(conv) == 16 * 9 * 32 / (16 * 9 + 32)
    assert break_even_rank(nn.Conv2d(16, 32, 3, groups=2)) == 2 * (8 * 9 * 16 / (8 * 9 + 16))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_cost_of_a_replaced_layer_is_r_times_i_plus_o(kind, bias):
    layer = nn.Linear(24, 16, bias=bias) if kind == "linear" else Conv1D(16, 24)
    bias = bias or kind == "conv1d"
    model = nn.Sequential(layer)
    report = apply_low_rank(model, rank=5)
    assert isinstance(model[0], LED)
    assert report.after == LayerCost(5 * (24 + 16) + 16 * bias, 5 * (24 + 16))
    assert report.layers[0].before == LayerCost(24 * 16 + 16 * bias, 24 * 16)
    assert report.layers[0].after == report.after == cost(model)


CONVOLUTIONS = [
    (nn.Conv1d(8, 12, 5, stride=2, padding=2), (2, 8, 21)),
    (nn.Conv2d(8, 12, 3, padding=1, padding_mode="reflect", bias=False), (2, 8, 9, 7)),
    (nn.Conv2d(8, 12, (3, 1), dilation=2, groups=2), (2, 8, 11, 7)),
    (nn.Conv3d(4, 12, 2), (1, 4, 5, 5, 5)),
]


@pytest.mark.parametrize(("conv", "shape"), CONVOLUTIONS)
def test_ced_at_full_rank_is_the_convolution(conv, shape):
    x = torch.randn(shape)
    model = nn.Sequential(copy.deepcopy(conv))
    full = min(conv.out_channels // conv.groups, math.prod(conv.weight.shape[1:])) * conv.groups
    pairs_rank = full - 0
    with pytest.MonkeyPatch.context() as patch:  # full rank saves nothing and would be skipped
        patch.setattr("assay.methods.layers.greenformers.convert.break_even_rank", lambda layer: 1e9)
        apply_low_rank(model, rank=pairs_rank)
    assert isinstance(model[0], CED)
    torch.testing.assert_close(model(x), conv(x), atol=1e-4, rtol=1e-4)
    merge(model)
    assert type(model[0]) is type(conv)
    torch.testing.assert_close(model(x), conv(x), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("conv", "shape"), CONVOLUTIONS)
def test_ced_costs_what_it_says_and_keeps_the_shape(conv, shape):
    model = nn.Sequential(copy.deepcopy(conv))
    before = cost(model)
    report = apply_low_rank(model, rank=0.5)
    rank, groups = report.layers[0].rank, conv.groups
    assert rank % groups == 0
    inputs = math.prod(conv.weight.shape[1:])
    macs = rank * inputs + conv.out_channels * rank // groups
    assert report.after == LayerCost(macs + (conv.out_channels if conv.bias is not None else 0), macs)
    assert report.after.macs < before.macs
    assert model(torch.randn(shape)).shape == conv(torch.randn(shape)).shape


def test_grouped_convolutions_are_factored_exactly():
    """Each group has rank 2, which is found again."""
    conv = nn.Conv2d(8, 12, 3, groups=2)
    with torch.no_grad():
        for chunk in conv.weight.chunk(2):
            chunk.copy_((torch.randn(6, 2) @ torch.randn(2, 36)).reshape(6, 4, 3, 3))
    model, x = nn.Sequential(copy.deepcopy(conv)), torch.randn(1, 8, 7, 7)
    report = apply_low_rank(model, rank=4)
    assert report.layers[0].error < 1e-5
    torch.testing.assert_close(model(x), conv(x), atol=1e-4, rtol=1e-4)


def test_ced_refuses_a_rank_that_is_no_multiple_of_the_groups():
    with pytest.raises(ValueError, match="multiple of the 2 groups, got 3"):
        CED.like(nn.Conv2d(8, 12, 3, groups=2), 3)
    for rank in (0, 2.5, True):
        with pytest.raises((ValueError, TypeError), match="rank must be a whole number"):
            LED(3, 3, rank)


# ------------------------------------------------------------------------------------------------------------ conversion


@pytest.mark.parametrize("solver", SOLVERS)
def test_every_solver_converts_a_bert(solver):
    model, reference = bert(), bert()
    calibration = [{"input_ids": ids()}] if solver == "data_svd" else None
    report = apply_low_rank(model, rank=0.5, solver=solver, calibration=calibration)
    assert model(ids()).last_hidden_state.shape == reference(ids()).last_hidden_state.shape
    assert {layer.rank for layer in report.layers} == {8, 10}  # int(0.5 * 16), int(0.5 * int(21.33))
    assert report.after == cost(model)
    assert report.before == cost(reference)
    assert report.after.macs < report.before.macs * 0.55
    assert f"{report.after.params:,}" in str(report)


@pytest.mark.parametrize("shape", SHAPES)
def test_reported_errors_are_true(shape):
    layer = nn.Linear(shape[1], shape[0])
    weight, x = layer.weight.detach().clone(), correlated(100, shape[1])
    model = nn.Sequential(copy.deepcopy(layer))
    report = apply_low_rank(model, rank=4)
    lost = weight - model[0].decoder.weight @ model[0].encoder.weight
    assert report.layers[0].error == pytest.approx((lost.norm() / weight.norm()).item(), rel=1e-3)
    model = nn.Sequential(copy.deepcopy(layer))
    report = apply_low_rank(model, rank=4, solver="data_svd", calibration=[x])
    lost = weight - model[0].decoder.weight @ model[0].encoder.weight
    assert report.layers[0].error == pytest.approx(((x @ lost.T).norm() / (x @ weight.T).norm()).item(), rel=1e-3)


def test_merging_back_gives_the_units_action():
    model = bert()
    apply_low_rank(model, rank=0.5)
    before = model(ids()).last_hidden_state
    merge(model)
    assert not any(isinstance(module, LED) for module in model.modules())
    torch.testing.assert_close(model(ids()).last_hidden_state, before, atol=1e-5, rtol=1e-4)
    assert cost(model) == cost(bert())


def test_skipped_layers_are_left_alone_and_say_why():
    model = bert()
    attention = model.encoder.layer[0].attention.self.query
    report = apply_low_rank(model, rank=16)
    assert model.encoder.layer[0].attention.self.query is attention
    reasons = {layer.name: (layer.rank, layer.reason) for layer in report.layers}
    assert reasons["encoder.layer.0.attention.self.query"] == (None, "rank 16 is not below the limit 16")
    assert reasons["encoder.layer.0.intermediate.dense"] == (16, "")
    assert apply_low_rank(bert(), rank=0.01).layers[0].reason == "rank 0"


def test_include_and_exclude():
    model = bert()
    report = apply_low_rank(model, rank=4, include=["encoder.layer.0.*"], exclude=["*.output.dense"])
    assert {layer.name for layer in report.layers} == {
        *(f"encoder.layer.0.attention.self.{name}" for name in ("query", "key", "value")),
        "encoder.layer.0.intermediate.dense",
    }


def test_applying_twice_does_nothing_twice():
    model = bert()
    apply_low_rank(model, rank=0.5)
    state = copy.deepcopy(model.state_dict())
    report = apply_low_rank(model, rank=0.2)
    assert report.layers == ()
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())


def test_the_bias_stays_the_same_parameter():
    model = bert()
    bias = model.pooler.dense.bias
    apply_low_rank(model, rank=0.5)
    assert model.pooler.dense.decoder.bias is bias


def test_gpt2_conv1d():
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=1, n_head=4, vocab_size=61, n_positions=40)).eval()
    reference = copy.deepcopy(model)
    report = apply_low_rank(model, energy=1 - 1e-9, include=["transformer.*"], solver="svd")
    assert all(layer.rank is None for layer in report.layers)  # full rank does not pay
    apply_low_rank(model, rank=0.6, solver="data_svd", calibration=[ids()], include=["transformer.*"])
    assert isinstance(model.transformer.h[0].mlp.c_fc, LED)
    x = ids()
    difference = (model(x).logits - reference(x).logits).norm() / reference(x).logits.norm()
    assert 0 < difference < 0.5


def test_shared_layers_are_factored_once():
    torch.manual_seed(0)
    shape = {"embedding_size": 16, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}
    model = AlbertModel(AlbertConfig(**shape, num_hidden_layers=3, vocab_size=61)).eval()
    report = apply_low_rank(model, rank=0.5)
    assert sum("ffn" in layer.name for layer in report.layers) == 2  # one group of layers runs three times
    assert model(ids()).last_hidden_state.shape == (2, 9, 32)


# ------------------------------------------------------------------------------------------------- ranks by energy, budget


def test_energy_keeps_the_fewest_directions_that_reach_it():
    model, x = nn.Sequential(nn.Linear(30, 20, bias=False)), correlated(200, 30)
    with torch.no_grad():
        model[0].weight.mul_(torch.logspace(0, -3, 30))
    weight = model[0].weight.detach().clone()
    report = apply_low_rank(model, energy=0.97)
    s = torch.linalg.svdvals(weight).square()
    kept = s.cumsum(0) / s.sum()
    rank = report.layers[0].rank
    assert kept[rank - 1] >= 0.97 > kept[rank - 2]
    assert report.layers[0].error == pytest.approx(math.sqrt(1 - kept[rank - 1].item()), rel=1e-2)
    model = nn.Sequential(nn.Linear(30, 20))
    report = apply_low_rank(model, energy=0.97, solver="data_svd", calibration=[x])
    assert report.layers[0].error <= math.sqrt(0.03)


@pytest.mark.parametrize("budget", [0.3, 0.6, 0.9])
def test_budget_is_kept_and_spent(budget):
    model = bert()
    layers = cost(model).macs
    report = apply_low_rank(model, budget=budget, solver="data_svd", calibration=[ids(), ids(seed=1)])
    assert report.after.macs <= budget * layers
    assert report.after.macs > 0.95 * budget * layers


def test_budget_goes_where_the_energy_is():
    """One layer is nearly of rank 2, one is not: the first gives up its parameters."""
    torch.manual_seed(0)
    poor, rich = nn.Linear(32, 32, bias=False), nn.Linear(32, 32, bias=False)
    with torch.no_grad():
        poor.weight.copy_(torch.randn(32, 2) @ torch.randn(2, 32) + 0.001 * torch.randn(32, 32))
    model = nn.Sequential(poor, rich)
    report = apply_low_rank(model, budget=0.7)
    first, second = report.layers
    assert first.rank is not None
    assert first.rank < 8
    assert second.rank is None or second.rank > 10
    even = nn.Sequential(copy.deepcopy(poor), copy.deepcopy(rich))
    uniform = apply_low_rank(even, rank=11)  # the same parameters
    assert max(layer.error for layer in report.layers) < max(layer.error for layer in uniform.layers)


def test_budget_that_cannot_be_kept():
    with pytest.raises(ValueError, match="budget must leave every layer at least rank 1, got 0.01"):
        apply_low_rank(bert(), budget=0.01)


# ----------------------------------------------------------------------------------------------------------- tied weights


def test_a_tied_head_is_left_alone_and_the_tie_holds():
    model = llama()
    report = apply_low_rank(model, rank=0.5)
    head = next(layer for layer in report.layers if layer.name == "lm_head")
    assert (head.rank, head.reason) == (None, "tied to model.embed_tokens.weight")
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_untied_head_keeps_the_embedding_and_counts_the_cost():
    model, reference = llama(), llama()
    report = apply_low_rank(model, rank=0.5, untie_head=True, include=["lm_head"])
    rank = report.layers[0].rank
    assert torch.equal(model.model.embed_tokens.weight, reference.model.embed_tokens.weight)
    assert report.after.params == report.before.params + rank * (61 + 32)
    assert report.after.macs == report.before.macs - 61 * 32 + rank * (61 + 32)
    assert not model.config.tie_word_embeddings
    model.tie_weights()
    assert isinstance(model.lm_head, LED)
    assert model.generate(ids(batch=1), max_new_tokens=3, do_sample=False, eos_token_id=None).shape == (1, 12)


@pytest.mark.parametrize("solver", ["svd", "data_svd"])
def test_a_tied_pair_is_factored_together(solver):
    model, reference = llama(), llama()
    report = apply_low_rank(
        model, rank=15, solver=solver, calibration=[ids()] if solver == "data_svd" else None, embeddings=True,
        include=["lm_head", "model.embed_tokens"],
    )  # fmt: skip
    embedding, head = model.model.embed_tokens, model.lm_head
    assert isinstance(embedding, LEDEmbedding)
    assert head.decoder.weight is embedding.codes.weight
    assert report.after.params == report.before.params - 61 * 32 + 15 * 61 + 2 * 15 * 32
    torch.testing.assert_close(embedding.merged().weight, head.merged().weight)
    difference = (head.merged().weight - reference.lm_head.weight).norm() / reference.lm_head.weight.norm()
    assert 0 < difference < 0.8
    torch.testing.assert_close(embedding(ids()), embedding.merged()(ids()))
    model.tie_weights()
    assert model(ids()).logits.shape == (2, 9, 61)


def test_embeddings_on_demand():
    model = bert()
    report = apply_low_rank(model, rank=0.5, embeddings=True, include=["embeddings.word_embeddings"])
    assert isinstance(model.embeddings.word_embeddings, LEDEmbedding)
    assert report.layers[0].rank == int(0.5 * int(61 * 32 / 93))
    merge(model)
    assert isinstance(model.embeddings.word_embeddings, nn.Embedding)


# ---------------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "exactly one of rank, energy and budget"),
        ({"rank": 3, "energy": 0.5}, "exactly one of rank, energy and budget"),
        ({"rank": 0}, "rank must be a finite number above 0"),
        ({"rank": 2.5}, "rank must be a whole number of at least 1 or a fraction"),
        ({"energy": 1.0}, "energy must be a finite number above 0 and below 1, got 1.0"),
        ({"budget": 0}, "budget must be a finite number above 0 and below 1, got 0"),
        ({"rank": 3, "solver": "qr"}, "solver must be one of"),
        ({"energy": 0.5, "solver": "nmf"}, "energy and budget need solver 'svd' or 'data_svd', got 'nmf'"),
        ({"rank": 3, "solver": "data_svd"}, "calibration must be given"),
        ({"rank": 3, "solver": "data_svd", "calibration": []}, "calibration must hold inputs"),
    ],
)
def test_bad_arguments_are_named_and_nothing_is_changed(arguments, message):
    model = bert()
    with pytest.raises(ValueError, match=message):
        apply_low_rank(model, **arguments)
    assert not any(isinstance(module, LED) for module in model.modules())


def test_calibration_must_reach_the_layers():
    model = nn.ModuleDict({"used": nn.Linear(8, 8), "unused": nn.Linear(8, 8)})
    model.forward = lambda x: model["used"](x)
    with pytest.raises(ValueError, match="calibration never reached layer 'unused'"):
        apply_low_rank(model, rank=2, solver="data_svd", calibration=[torch.randn(4, 8)])


def test_padding_does_not_calibrate():
    """The same moments from a padded batch as from the sentences alone."""
    padded, plain, careless = bert(), bert(), bert()
    row = ids(6, batch=1)
    batch = torch.cat([torch.cat([row, torch.zeros(1, 3, dtype=torch.long)], 1), ids(9, batch=1, seed=1)])
    mask = (torch.arange(9) < torch.tensor([[6], [9]])).long()
    only = {"include": ["encoder.layer.0.*"], "rank": 4, "solver": "data_svd"}
    apply_low_rank(padded, calibration=[{"input_ids": batch, "attention_mask": mask}], **only)
    apply_low_rank(plain, calibration=[{"input_ids": row}, {"input_ids": batch[1:]}], **only)
    apply_low_rank(careless, calibration=[{"input_ids": batch}], **only)

    def distance(model):
        units = [[m for m in net.encoder.modules() if isinstance(m, LED)] for net in (model, plain)]
        assert units[0]
        return max(
            float((a.merged().weight - b.merged().weight).norm() / b.merged().weight.norm())
            for a, b in zip(*units, strict=True)
        )

    assert distance(padded) < 0.01 < 0.1 < distance(careless)


# -------------------------------------------------------------------------------------------------- the official package's way


def test_auto_fact_limits_ranks_and_splits_as_released():
    model = nn.Sequential(nn.Linear(30, 20), nn.Linear(30, 4), nn.Linear(30, 20))
    u, _, v = torch.linalg.svd(model[0].weight.detach(), full_matrices=False)
    weight = u * 0.5 ** torch.arange(20) @ v  # a spectrum that falls, as the solver's random subspace wants it
    with torch.no_grad():
        model[0].weight.copy_(weight)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        out = auto_fact(model, rank=5, solver="svd", submodules=[model[0], model[1]])
    assert out is model
    assert isinstance(model[0], LED)
    assert isinstance(model[2], nn.Linear)
    assert isinstance(model[1], nn.Linear)  # limit int(120 / 34) = 3
    assert "rank 5 is not below its limit 3" in str(caught[0].message)
    d, e = model[0].decoder.weight, model[0].encoder.weight
    torch.testing.assert_close(d.T @ d, torch.eye(5), atol=1e-4, rtol=0)  # all of the scale lies in the encoder
    torch.testing.assert_close(e.norm(dim=1), torch.linalg.svdvals(weight)[:5], atol=1e-3, rtol=1e-3)


def test_auto_fact_convolution_limit_ignores_the_kernel():
    conv = nn.Conv2d(16, 16, 3)
    with pytest.warns(UserWarning, match="rank 8 is not below its limit 8"):
        assert auto_fact(conv, rank=8) is conv
    assert break_even_rank(conv) > 14
    unit = auto_fact(conv, rank=0.5)
    assert isinstance(unit, CED)
    assert unit.encoder.out_channels == 4


def test_auto_fact_single_layer_copy_and_refactoring():
    layer = nn.Linear(40, 40)
    unit = auto_fact(layer, rank=10, solver="svd", deepcopy=True)
    assert isinstance(unit, LED)
    assert isinstance(layer, nn.Linear)
    assert auto_fact(unit, rank=2) is unit
    assert not isinstance(unit.encoder, LED)
    auto_fact(unit, rank=2, fact_led_unit=True)
    assert isinstance(unit.encoder, LED)


@pytest.mark.parametrize("solver", ["random", "nmf", "snmf"])
def test_auto_fact_solvers(solver):
    unit = auto_fact(nn.Linear(20, 20), rank=0.5, solver=solver)
    assert (unit.rank, unit(torch.randn(3, 20)).shape) == (5, (3, 20))


def test_auto_fact_keeps_ties():
    model = llama()
    with pytest.warns(UserWarning, match="lm_head: its weight is tied"):
        auto_fact(model, rank=0.5, solver="svd")
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_auto_fact_names_bad_arguments():
    with pytest.raises(ValueError, match="rank must be"):
        auto_fact(nn.Linear(4, 4), rank=-1)
    with pytest.raises(ValueError, match="solver must be one of random, svd, nmf, snmf, got 'data_svd'"):
        auto_fact(nn.Linear(4, 4), rank=1, solver="data_svd")


# ---------------------------------------------------------------------------------------------------------------- plugs in


def test_state_dict_round_trip(tmp_path):
    from safetensors.torch import load_model, save_model

    model, other = bert(), bert()
    apply_low_rank(model, rank=0.5)
    apply_low_rank(other, rank=0.5, solver="random")
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(ids()).last_hidden_state, model(ids()).last_hidden_state)
    save_model(model, str(tmp_path / "model.safetensors"))
    apply_low_rank(third := bert(), rank=0.5, solver="random")
    load_model(third, str(tmp_path / "model.safetensors"))
    assert torch.equal(third(ids()).last_hidden_state, model(ids()).last_hidden_state)


def test_lora_on_top_through_peft():
    from peft import LoraConfig, get_peft_model

    model = llama()
    apply_low_rank(model, rank=0.5)
    before = model(ids()).logits
    tuned = get_peft_model(model, LoraConfig(r=2, target_modules=["encoder", "decoder"]))
    assert torch.equal(tuned(ids()).logits, before)  # LoRA starts at zero
    trainable = [name for name, parameter in tuned.named_parameters() if parameter.requires_grad]
    assert len(trainable) == 2 * 2 * 14  # A and B for both layers of 14 units
    tuned(ids(), labels=ids()).loss.backward()
    assert all(tuned.get_parameter(name).grad is not None for name in trainable)
    merged = tuned.merge_and_unload()
    torch.testing.assert_close(merged(ids()).logits, before)
    assert isinstance(merged.model.layers[0].mlp.up_proj, LED)


@pytest.mark.slow
@pytest.mark.slow
def test_torch_compile():
    model = bert()
    apply_low_rank(model, rank=0.5)
    expected = model(ids()).last_hidden_state
    compiled = torch.compile(model)
    torch.testing.assert_close(compiled(ids()).last_hidden_state, expected, atol=1e-5, rtol=1e-4)


def test_dynamic_quantisation_composes():
    """The units' layers are ordinary linear layers: a tool that replaces those finds them."""
    from assay.methods.core.layers.surgery import find, linear_kinds

    model = bert()
    apply_low_rank(model, rank=0.5)
    inner = find(model, linear_kinds())
    assert len(inner) == 2 * 13
    assert all(name.endswith((".encoder", ".decoder")) for name in inner)


# ----------------------------------------------------------------------------------------------------- LRT and Linformer


def test_linformer_with_identity_projections_is_softmax_attention():
    q, k, v = torch.randn(3, 2, 4, 10, 8).unbind(0)
    expected = nn.functional.scaled_dot_product_attention(q, k, v)
    torch.testing.assert_close(linformer(q, k, v, torch.eye(10), torch.eye(10)), expected)


def test_linformer_formula_and_padding():
    q, k, v = torch.randn(3, 2, 4, 10, 8).unbind(0)
    e_k, e_v = torch.randn(2, 12, 5).unbind(0)
    scores = q @ (e_k[:10].T @ k).transpose(-1, -2) / math.sqrt(8)
    torch.testing.assert_close(linformer(q, k, v, e_k, e_v), scores.softmax(-1) @ (e_v[:10].T @ v))
    mask = torch.ones(2, 10, dtype=torch.bool)
    mask[:, 7:] = False
    padded = linformer(q, k, v, e_k, e_v, key_mask=mask)
    torch.testing.assert_close(padded, linformer(q, k[:, :, :7], v[:, :, :7], e_k, e_v))
    with pytest.raises(ValueError, match="at most 9 tokens"):
        linformer(q, k, v, e_k[:9], e_v[:9])


def test_linformer_in_a_transformers_encoder():
    model, reference = bert(), bert()
    assert use_linformer(model, tokens=9, length=9) == 2
    assert model.config._attn_implementation == "assay_linformer"
    expected = reference(ids()).last_hidden_state
    torch.testing.assert_close(model(ids()).last_hidden_state, expected, atol=1e-5, rtol=1e-4)
    model = bert()
    use_linformer(model, tokens=9, length=4)
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[:, 6:] = 0
    out = model(ids(), attention_mask=mask).last_hidden_state[:, :6]
    torch.testing.assert_close(out, model(ids()[:, :6]).last_hidden_state, atol=1e-5, rtol=1e-4)
    model(ids()).last_hidden_state.sum().backward()
    assert model.encoder.layer[0].attention.self.linformer_e_k.grad is not None
    with pytest.raises(ValueError, match="must be a transformers encoder"):
        use_linformer(llama(), tokens=9, length=4)
    with pytest.raises(ValueError, match=r"length must lie in 1..tokens \(9\), got 10"):
        use_linformer(bert(), tokens=9, length=10)


@pytest.mark.parametrize("extra", [{}, {"rank": 3}, {"linformer_length": 4, "tokens": 10}])
def test_blocks_cost_what_the_formula_says(extra):
    block = EncoderBlock(16, 4, 40, **extra)
    assert block(torch.randn(2, 10, 16)).shape == (2, 10, 16)
    kwargs = {key: value for key, value in extra.items() if key != "tokens"}
    attended = extra.get("linformer_length", 10)
    attention = 2 * 10 * attended * 16 + (2 * 10 * attended * 16 if "tokens" in extra else 0)
    assert block_macs(10, 16, 40, **kwargs) == 10 * cost(block).macs + attention


def test_lrt_block_of_full_rank_svd_is_the_dense_block():
    torch.manual_seed(0)
    dense = EncoderBlock(16, 4, 40)
    x = torch.randn(2, 10, 16)
    expected = dense(x)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("assay.methods.layers.greenformers.convert.break_even_rank", lambda layer: 1e9)
        apply_low_rank(dense, rank=16)
    lrt = EncoderBlock(16, 4, 40, rank=16)
    lrt.load_state_dict(dense.state_dict())
    torch.testing.assert_close(lrt(x), expected, atol=1e-5, rtol=1e-4)


def test_lrt_learns_from_scratch():
    """Reverse a sequence of one-hot tokens: needs attention and both feed-forward matrices."""
    torch.manual_seed(0)
    x = torch.eye(8)[torch.randint(0, 8, (64, 6))]
    x = torch.cat([x, torch.eye(6).expand(64, 6, 6), torch.zeros(64, 6, 2)], -1)
    model = nn.Sequential(EncoderBlock(16, 4, 32, rank=8), EncoderBlock(16, 4, 32, rank=8), nn.Linear(16, 8))
    optimiser = torch.optim.Adam(model.parameters(), lr=5e-3)
    target = x[:, :, :8].flip(1).argmax(-1).flatten()
    losses = []
    for _ in range(60):
        loss = nn.functional.cross_entropy(model(x).flatten(0, 1), target)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


def test_blocks_name_bad_arguments():
    with pytest.raises(ValueError, match="d_model must be a multiple of heads, got 10 and 4"):
        EncoderBlock(10, 4, 8)
    with pytest.raises(ValueError, match="linformer_length and tokens go together"):
        EncoderBlock(8, 4, 8, tokens=4)


# -------------------------------------------------------------------------------------------------------------------- cost


def test_crossover_is_where_the_formulas_meet():
    tokens = crossover_tokens(64, 256, rank=16, linformer_length=32)
    below, above = int(tokens), int(tokens) + 1
    assert block_macs(below, 64, 256, rank=16) <= block_macs(below, 64, 256, linformer_length=32)
    assert block_macs(above, 64, 256, rank=16) >= block_macs(above, 64, 256, linformer_length=32)


def test_training_cost():
    dense = training_cost(85e6, 1e9, seconds_per_flop=1e-14, price_per_hour=2.0, kilowatts=0.3, co2_kg_per_kwh=0.4)
    assert dense.flops == 6 * 85e6 * 1e9
    assert dense.hours == pytest.approx(dense.flops * 1e-14 / 3600)
    assert dense.price == pytest.approx(2 * dense.hours)
    assert dense.co2_kg == pytest.approx(0.4 * dense.energy_kwh) == pytest.approx(0.4 * 0.3 * dense.hours)
    with pytest.raises(ValueError, match="price_per_hour must not be negative, got -1"):
        training_cost(1, 1, seconds_per_flop=1, price_per_hour=-1, kilowatts=1, co2_kg_per_kwh=1)


# ------------------------------------------------------------------------------------------------------------- transform


def test_transform():
    model = llama()
    context = TuneContext(goal="ttft", prompt_tokens=16, new_tokens=4, calibration=[ids(16, 1), ids(16, 1, seed=1)])
    assert isinstance(transform, Transform)
    assert (transform.slot, transform.exact) == ("structure", False)
    assert transform.goals == {"ttft", "decode", "memory", "throughput"}
    assert transform.applies_to(model, context).applies
    assert not transform.applies_to(nn.ReLU(), context).applies
    assert not transform.applies_to(model, TuneContext(goal="ttft", prompt_tokens=16, new_tokens=4)).applies
    config = transform.configs(model, context)[-1]
    before = cost(model)
    assert transform.apply(model, config, context) is model
    assert cost(model).macs < before.macs
    again = transform.apply(llama(), config, context)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    with pytest.raises(ValueError, match="budget must be a finite number"):
        transform.apply(llama(), {"budget": 2}, context)


@pytest.mark.slow
@pytest.mark.model
def test_a_real_model_survives_mild_factoring(smollm2):
    """SmolLM2's last layers at 80 % of their break-even rank: data-aware keeps its text, plain SVD loses more."""
    tokens = smollm2.tokenizer(__doc__ * 8, return_tensors="pt").input_ids[:, :96]
    calibration = smollm2.tokenizer(inspect_source() * 2, return_tensors="pt").input_ids[:, :512]
    kept = {"include": ["model.layers.2[0-3].mlp.*"], "rank": 0.8}
    losses = {}
    for solver in ("svd", "data_svd"):
        model = copy.deepcopy(smollm2.model)
        apply_low_rank(model, solver=solver, calibration=[calibration], **kept)
        with torch.no_grad():
            losses[solver] = model(tokens, labels=tokens).loss.item()
    with torch.no_grad():
        dense = smollm2.model(tokens, labels=tokens).loss.item()
    assert losses["data_svd"] < losses["svd"]
    assert losses["data_svd"] - dense < 1.0


def inspect_source() -> str:
    import inspect

    return inspect.getsource(copy)
