"""The error theory against Monte Carlo, the advisor, whole-model quantisation, the cost model and the tuner's transform."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from tests.tiny import tiny_model
from torch import nn

from assay.methods.compression.fp8_vs_int8 import (
    PAPER_OVERHEAD,
    ErrorMoments,
    FakeQuantized,
    Gaussian,
    StudentT,
    Uniform,
    expected_error,
    expected_sqnr,
    fake_quantize,
    format_report,
    hardware_cost,
    hardware_table,
    product_error,
    ranges,
    transform,
)
from assay.methods.core.quantize.int8_linear import Int8Linear
from assay.methods.core.quantize.quantizers import EIGHT_BIT, FloatQuantizer, make_quantizer
from assay.methods.transform import Transform, TuneContext

FLOATS = ("E2", "E3", "E4", "E5")


def best_sqnr(distribution, steps: int = 16) -> dict[str, float]:
    return {name: expected_sqnr(make_quantizer(name), distribution, steps=steps)[0] for name in EIGHT_BIT}


def draw(distribution, n: int = 500_000) -> torch.Tensor:
    torch.manual_seed(0)
    if isinstance(distribution, Uniform):
        return (2 * torch.rand(n, dtype=torch.float64) - 1) * distribution.width
    if isinstance(distribution, Gaussian):
        return torch.randn(n, dtype=torch.float64) * distribution.sigma
    return (
        torch.distributions.StudentT(torch.tensor(distribution.nu, dtype=torch.float64)).sample((n,))
        * distribution.sigma
    )


# Theory ------------------------------------------------------------------------------------------------------------------


def test_gaussian_order_and_six_decibels_a_bit():
    found = best_sqnr(Gaussian(2.0))
    assert sorted(found, key=found.get, reverse=True) == ["E2", "INT8", "E3", "E4", "E5"]
    steps = [found[a] - found[b] for a, b in zip(FLOATS, FLOATS[1:], strict=False)]
    assert all(5.0 < step < 6.2 for step in steps)
    assert found["INT8"] == pytest.approx(40.5, abs=0.1)  # 255 levels; the known optimum of a uniform quantiser


def test_uniform_data_wants_integers():
    found = best_sqnr(Uniform(3.0))
    assert max(found, key=found.get) == "INT8"
    assert found["INT8"] == pytest.approx(20 * math.log10(254), abs=0.2)


def test_heavier_tails_want_more_exponent_bits():
    winners = [max(best, key=best.get) for best in (best_sqnr(StudentT(nu), steps=4) for nu in (30, 5, 3))]
    assert winners == ["E2", "E3", "E4"]
    heavy = best_sqnr(StudentT(3), steps=4)
    assert heavy["E4"] > heavy["E3"] > heavy["E2"] > heavy["INT8"]


@pytest.mark.parametrize("distribution", [Uniform(1.3), Gaussian(0.7), StudentT(9.0, 0.4)])
@pytest.mark.parametrize("name", EIGHT_BIT)
def test_analytic_error_is_the_monte_carlo_error(distribution, name):
    quantizer = make_quantizer(name).set_range(1.1)
    expected = expected_error(quantizer.grid(), distribution)
    x = draw(distribution)
    error = x - quantizer(x.float()).double()
    assert expected.signal == mean_of(x.square())
    assert expected.error == mean_of(error.square())
    assert expected.cross == mean_of(x * error)


def mean_of(samples: torch.Tensor):
    """The mean, up to five standard errors."""
    return pytest.approx(float(samples.mean()), abs=5 * float(samples.std()) / math.sqrt(len(samples)))


@pytest.mark.parametrize("names", [("INT8", "INT8"), ("E4", "INT8"), ("E2", "E5")])
def test_error_of_a_product(names):
    x, y = draw(Gaussian()).chunk(2)
    a, b = (make_quantizer(name).set_range(1.5) for name in names)
    moments = [expected_error(q.grid(), Gaussian()) for q in (a, b)]
    seen = mean_of((x * y - a(x.float()).double() * b(y.float()).double()).square())
    assert product_error(*moments) == seen
    assert (
        product_error(*(ErrorMoments(m.signal, m.error, 0.0) for m in moments)) != seen
    )  # clipping makes the errors signed


def test_student_t_approaches_the_gaussian():
    grid = make_quantizer("E3").set_range(4.0).grid()
    assert expected_error(grid, StudentT(1e5)).error == pytest.approx(expected_error(grid, Gaussian()).error, rel=1e-3)


def test_theory_names_bad_arguments():
    with pytest.raises(ValueError, match="nu must be above 2"):
        StudentT(2.0)
    with pytest.raises(ValueError, match="ascending"):
        expected_error(torch.tensor([1.0, 0.0]), Gaussian())


# Models ------------------------------------------------------------------------------------------------------------------


def conv_net(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, stride=2), nn.ReLU(), nn.Conv2d(8, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 4)
    )


def stripes(n: int = 256, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Small pictures of four kinds of stripes in noise, and their kind."""
    generator = torch.Generator().manual_seed(seed)
    kind = torch.randint(0, 4, (n,), generator=generator)
    at = torch.arange(10.0)
    waves = [torch.sin(at)[:, None], torch.sin(at)[None], torch.sin(at[:, None] + at), torch.sin(at[:, None] - at)]
    clean = torch.stack([wave.expand(10, 10) for wave in waves])[kind]
    return (clean + 0.7 * torch.randn(n, 10, 10, generator=generator))[:, None], kind


def test_report_picks_formats_by_their_tails():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 32))
    nn.init.normal_(model[0].weight)
    model[1].weight.data = draw(StudentT(3.0), 64 * 32).float().view(32, 64)
    report = format_report(model, [torch.rand(500, 64) * 2 - 1], per_channel=False)
    assert [row.layer for row in report.rows] == ["0", "0", "1", "1"]
    by_tensor = {(row.layer, row.kind): row for row in report.rows}
    assert by_tensor["0", "weight"].best == "E2"
    assert by_tensor["0", "activation"].best == "INT8"
    assert by_tensor["1", "weight"].best in ("E3", "E4")
    assert by_tensor["1", "weight"].kurtosis > 10 > 4 > by_tensor["0", "weight"].kurtosis
    assert report.share("INT8", "E2") == 0.75 or by_tensor["1", "activation"].best not in ("INT8", "E2")
    assert report.share("INT8", "E2", kind="weight") == 0.5
    assert str(report).count("\n") == 4


def test_report_takes_all_kinds_of_inputs_and_changes_nothing():
    model = conv_net()
    before = copy.deepcopy(model.state_dict())
    images, _ = stripes(8)
    report = format_report(model, [images, (images,), {"input": images}], formats=["INT8", "E4"], estimator="minmax")
    assert {row.layer for row in report.rows} == {"0", "2", "5"}
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("name", EIGHT_BIT)
@pytest.mark.parametrize("activations", ["tensor", "token", "none"])
def test_whole_model_quantised_after_training(name, activations):
    images, _ = stripes(64)
    model = conv_net()
    exact = model(images)
    quantised = fake_quantize(copy.deepcopy(model), name, [images], activations=activations)
    assert sum(isinstance(module, FakeQuantized) for module in quantised.modules()) == 3
    error = (quantised(images) - exact).norm() / exact.norm()
    assert 1e-6 < error.item() < {"INT8": 0.03, "E2": 0.03, "E3": 0.04, "E4": 0.08, "E5": 0.15}[name]
    first = quantised[0]
    weight = first.weight_quantizer(first.layer.weight)
    assert all(len(channel.unique()) <= 255 for channel in weight)
    grid = first.weight_quantizer.grid()
    assert torch.allclose((weight[0].flatten()[:, None] - grid[0]).abs().amin(1), torch.zeros(9), atol=1e-7)


def test_rounded_weights_follow_what_they_are_made_of():
    """Also through `.data`, which leaves no trace that a cache could go by, and where the parameter itself is exchanged."""
    images, _ = stripes(16)
    model = fake_quantize(conv_net(), "E3", [images])
    first = model[0]
    with torch.no_grad():
        kept, before = first.rounded_weight(), model(images)
        first.layer.weight *= 2
        assert not torch.equal(first.rounded_weight(), kept)
        first.weight_quantizer.set_range(first.weight_quantizer.high * 2)
        assert torch.equal(first.rounded_weight(), 2 * kept)
        first.layer.weight.data.mul_(0.5)
        first.weight_quantizer.high.data.mul_(0.5)
        assert torch.equal(first.rounded_weight(), kept)
        assert torch.equal(model(images), before)
        first.layer.weight = nn.Parameter(-first.layer.weight)
        assert torch.equal(first.rounded_weight(), -kept)
    assert first.rounded_weight().requires_grad


def test_unquantised_activations_leave_a_weight_only_model():
    images, _ = stripes(16)
    model = fake_quantize(conv_net(), "INT8", [], activations="none")
    assert torch.equal(model[0].inputs(images), images)


def test_formats_convert_into_each_other():
    images, _ = stripes(64)
    model = conv_net()
    exact = model(images)
    converted = fake_quantize(fake_quantize(copy.deepcopy(model), "E4", [images]), "INT8", [images])
    direct = fake_quantize(copy.deepcopy(model), "INT8", [images])
    assert torch.equal(converted(images), direct(images))
    assert not torch.equal(converted(images), exact)


def test_quantisation_aware_training_recovers_accuracy(monkeypatch):
    """Trained through E1M2-like coarse grids, which lose more than 8 bits do, so that there is something to recover."""
    import assay.methods.compression.fp8_vs_int8 as room

    def coarse(name, *, axis=None, symmetric=True):
        return FloatQuantizer(2, 0, axis=axis)

    monkeypatch.setattr(room, "make_quantizer", coarse)
    images, kinds = stripes(512)
    test_images, test_kinds = stripes(512, seed=1)
    model = conv_net()
    _train(model, model.parameters(), images, kinds, 80)
    quantised = fake_quantize(copy.deepcopy(model), "E2", [images], learn_ranges=True)
    learned = list(ranges(quantised))
    assert len(learned) == 6
    assert all(parameter.requires_grad for parameter in learned)
    before = nn.functional.cross_entropy(quantised(test_images), test_kinds)
    _train(quantised, quantised.parameters(), images, kinds, 30)
    after = nn.functional.cross_entropy(quantised(test_images), test_kinds)
    assert after.item() < 0.9 * before.item()


def _train(model, parameters, images, kinds, steps):
    optimizer = torch.optim.Adam(parameters, lr=5e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images), kinds).backward()
        optimizer.step()


def test_models_name_bad_arguments():
    with pytest.raises(ValueError, match="name"):
        fake_quantize(conv_net(), "FP8", [])
    with pytest.raises(ValueError, match="activations"):
        fake_quantize(conv_net(), "INT8", [], activations="row")
    with pytest.raises(ValueError, match="no linear or convolution"):
        format_report(nn.ReLU(), [torch.ones(1)])
    with pytest.raises(ValueError, match="at least one input"):
        fake_quantize(conv_net(), "INT8", [])


# Hardware ----------------------------------------------------------------------------------------------------------------


def test_hardware_model():
    table = hardware_table()
    assert [(row.name, row.accumulator) for row in table[:2]] == [("INT8", "integer"), ("E2", "fixed point")]
    assert len(table) == 9
    fixed = [hardware_cost(name, "fixed point").total for name in FLOATS]
    assert fixed == sorted(fixed)  # every exponent bit doubles the range the accumulator must cover
    multipliers = [hardware_cost(name, "float32").multiplier for name in FLOATS]
    assert multipliers == sorted(multipliers, reverse=True)
    assert hardware_cost("INT8", "integer").ratio == 1.0
    low, high = (1 + overhead for overhead in PAPER_OVERHEAD)
    for name in ("E4", "E5"):  # the model lands where the paper's synthesised designs do
        assert low < hardware_cost(name, "float32").ratio < high
    assert low < hardware_cost("E4", "fixed point").ratio < high
    with pytest.raises(ValueError, match="accumulator for INT8"):
        hardware_cost("INT8", "float32")
    with pytest.raises(ValueError, match="name"):
        hardware_cost("E6", "float32")


# The tuner ---------------------------------------------------------------------------------------------------------------


def tiny_llama(seed: int = 0):
    return tiny_model(seed=seed, vocab_size=96, initializer_range=0.02)


def context(goal="ttft", calibration=()):
    return TuneContext(goal, prompt_tokens=64, new_tokens=8, calibration=calibration)


def test_transform_is_one():
    assert isinstance(transform, Transform)
    assert (transform.name, transform.slot, transform.exact) == ("fp8_vs_int8", "linear", False)
    assert transform.goals == {"ttft", "throughput", "decode", "memory"}


def test_transform_fits_where_there_are_linears():
    fit = transform.applies_to(tiny_llama(), context())
    assert fit.applies
    effects = {effect.kind: effect for effect in fit.effects}
    assert (effects["linear"].macs, effects["linear"].bytes, effects["linear"].dtype) == (1.0, 0.25, "int8")
    assert effects["other"].bytes < 1
    assert transform.applies_to(tiny_llama().bfloat16(), context()).effects[0].bytes == 0.5
    assert not transform.applies_to(nn.ReLU(), context()).applies
    meta = transform.applies_to(nn.Sequential(nn.Linear(4, 4, device="meta")), context())
    assert not meta.applies
    assert "meta" in meta.reason


def test_transform_applies_its_configurations_repeatably():
    torch.manual_seed(1)
    ids = torch.randint(0, 96, (1, 40))
    reference = tiny_llama()(ids).logits
    for goal, calibration in (("ttft", (ids,)), ("decode", (ids,)), ("memory", ())):
        situation = context(goal, calibration)
        configs = transform.configs(tiny_llama(), situation)
        assert 1 <= len(configs) <= 5
        assert (configs[0]["smooth"] is not None) == bool(calibration)
        assert configs[0]["head"] == (goal == "decode")
        for config in configs:
            once, twice = (transform.apply(tiny_llama(), config, situation) for _ in range(2))
            logits = once(ids).logits
            assert torch.equal(logits, twice(ids).logits)
            error = (logits - reference).norm() / reference.norm()
            assert 0 < error.item() < 0.03
            assert any(isinstance(module, Int8Linear) for module in once.modules())
            assert isinstance(once.lm_head, Int8Linear) == config["head"]


def test_transform_names_bad_configurations():
    with pytest.raises(ValueError, match="unknown configuration"):
        transform.apply(tiny_llama(), {"bits": 4}, context())
    with pytest.raises(ValueError, match="calibration"):
        transform.apply(tiny_llama(), {"smooth": 0.5}, context())
    with pytest.raises(ValueError, match="smooth"):
        transform.apply(tiny_llama(), {"smooth": 2.0}, context())


# The experiment ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_on_a_well_behaved_network_the_two_formats_are_equal():
    from assay.experiments.compression.fp8_vs_int8 import int8_not_worse

    figure = int8_not_worse(net="digits")
    assert figure.unit == "x"
    assert figure.low <= figure.value <= figure.high
    assert figure.value == pytest.approx(1.0, abs=0.01)
    perplexity = figure.details["perplexity"]
    ratios = [e4 / int8 for e4, int8 in zip(perplexity["E4"], perplexity["INT8"], strict=True)]
    assert figure.value == pytest.approx(sum(ratios) / 3, abs=1e-6)
    assert figure.low > max(figure.controls.values())
    assert figure.details["activation: median kurtosis"] < 10
    assert figure.details["activation: INT8 beats E4"] == 1.0
    with pytest.raises(ValueError, match="net must be 'digits' or 'smollm2-135m', got 'gpt2'"):
        int8_not_worse(net="gpt2")
