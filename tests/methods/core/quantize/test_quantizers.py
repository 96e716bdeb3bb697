"""The quantisers against brute force, against torch's own float8 types, and against themselves."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from assay.methods.core.quantize.quantizers import (
    EIGHT_BIT,
    FloatQuantizer,
    LearnedFloatQuantizer,
    UniformQuantizer,
    kurtosis,
    make_quantizer,
    round_ste,
    sqnr,
)

EXPONENTS = range(8)


def float8(exponent: int, high: float = 3.7, **options) -> FloatQuantizer:
    return FloatQuantizer(exponent, 7 - exponent, **options).set_range(high)


def nearest(x: torch.Tensor, grid: torch.Tensor) -> torch.Tensor:
    """Brute force: the distance to the nearest grid value, in float64."""
    return (x.double()[:, None] - grid.double()).abs().amin(1)


def sample(high: float = 3.7, n: int = 4000) -> torch.Tensor:
    """Values over many octaves, both signs, zero, and some beyond the range."""
    x = torch.randn(n, generator=torch.Generator().manual_seed(0)) * torch.logspace(-6, 0.4, n) * high
    return torch.cat([x, torch.tensor([0.0, -0.0, high, -high, 1.5 * high])])


@pytest.mark.parametrize("exponent", EXPONENTS)
def test_eight_bits_are_255_distinct_values(exponent):
    grid = float8(exponent).grid()
    assert len(grid) == len(grid.unique()) == 255
    assert torch.equal(grid, grid.sort().values)
    assert grid[-1] == pytest.approx(3.7)
    assert torch.equal(grid, -grid.flip(0))


@pytest.mark.parametrize("exponent", EXPONENTS)
def test_rounding_is_idempotent_odd_monotone_and_the_identity_on_the_grid(exponent):
    quantizer = float8(exponent)
    x = sample().sort().values
    y = quantizer(x)
    assert torch.equal(quantizer(y), y)
    assert torch.equal(quantizer(-x), -y)
    assert bool((y.diff() >= 0).all())
    assert torch.equal(quantizer(quantizer.grid()), quantizer.grid())


@pytest.mark.parametrize("exponent", EXPONENTS)
@pytest.mark.parametrize("high", [1e-5, 0.73, 448.0])
def test_rounding_finds_the_nearest_grid_point(exponent, high):
    quantizer = float8(exponent, high)
    x = sample(high).clamp(-high, high)
    error = (quantizer(x).double() - x.double()).abs()
    assert torch.allclose(error, nearest(x, quantizer.grid()), rtol=0, atol=1e-6 * high)
    grid = quantizer.grid().double()
    away = (quantizer(x).double()[:, None] - grid).abs().amin(1)
    assert float(away.max()) <= 1e-7 * high  # every output is on the grid


def test_ties_go_to_the_even_multiple_of_the_step():
    quantizer = float8(4, 240.0)  # bias 8: normal values from 2^-7, 8 steps a binade
    assert float(quantizer.bias) == 8.0
    ties = torch.tensor([1 + 1 / 16, 1 + 3 / 16, 8.5, 9.5, -1 - 1 / 16, 16 - 0.5])
    assert quantizer(ties).tolist() == [1.0, 1.25, 8.0, 10.0, -1.0, 16.0]  # in steps: 8, 10, 8, 10, -8, 16
    assert quantizer(torch.tensor([240.0, 1000.0, 236.0])).tolist() == [
        240.0,
        240.0,
        240.0,
    ]  # rounds up, not beyond the range


def test_no_exponent_bits_are_the_uniform_grid():
    x = sample()
    uniform = UniformQuantizer(8).set_range(3.7)
    assert torch.allclose(float8(0)(x), uniform(x), rtol=0, atol=1e-6)
    assert torch.allclose(float8(0).grid(), uniform.grid(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("exponent", EXPONENTS)
def test_scaling_the_range_scales_the_result(exponent):
    x = sample()
    assert torch.equal(float8(exponent, 4 * 3.7)(4 * x), 4 * float8(exponent)(x))
    grid = float8(exponent).grid()
    a = 1.37
    assert torch.allclose(float8(exponent, a * 3.7)(a * grid), a * grid, rtol=1e-6)


@given(st.floats(-500, 500, width=32))
def test_variants_are_torch_float8_at_their_own_range(value):
    x = torch.tensor([value])
    e4 = FloatQuantizer(4, 3, variant="ocp").set_range(448.0)
    e5 = FloatQuantizer(5, 2, variant="ocp").set_range(57344.0)
    assert torch.equal(e4(x), x.clamp(-448, 448).to(torch.float8_e4m3fn).float())
    assert torch.equal(e5(x), x.to(torch.float8_e5m2).float())


def test_variants_differ_and_are_not_mixed():
    sizes = {v: len(FloatQuantizer(4, 3, variant=v).set_range(1.0).grid()) for v in ("all-finite", "ocp", "ieee")}
    assert sizes == {"all-finite": 255, "ocp": 253, "ieee": 239}
    assert float(FloatQuantizer(4, 3, variant="ocp").set_range(448.0).bias) == 7.0
    assert float(FloatQuantizer(5, 2, variant="ieee").set_range(57344.0).bias) == 15.0
    assert len(FloatQuantizer(2, 1, variant="ocp").set_range(6.0).grid()) == 15
    assert FloatQuantizer(2, 1, variant="ocp").set_range(6.0).grid()[7:].tolist() == [0, 0.5, 1, 1.5, 2, 3, 4, 6]


def test_unsigned_grids_start_at_zero():
    quantizer = FloatQuantizer(4, 4, signed=False).set_range(2.0)
    assert len(quantizer.grid()) == 256
    assert quantizer(torch.tensor([-1.0, 0.0, 2.0, 3.0])).tolist() == [0.0, 0.0, 2.0, 2.0]
    assert UniformQuantizer(8, signed=False).set_range(255.0)(torch.tensor([-3.0, 7.4, 300.0])).tolist() == [0, 7, 255]


def test_uniform_symmetric_and_asymmetric():
    symmetric = UniformQuantizer(8).set_range(127.0)
    assert symmetric.grid().tolist() == list(range(-127, 128))
    assert symmetric(torch.tensor([-200.0, 0.4, 2.5, 126.7])).tolist() == [-127.0, 0.0, 2.0, 127.0]
    asymmetric = UniformQuantizer(8, symmetric=False).set_range(1.0, low=-0.25)
    grid = asymmetric.grid()
    assert len(grid) == 256
    assert 0.0 in grid.tolist()
    x = torch.linspace(-0.3, 1.1, 997)
    assert torch.allclose(asymmetric(x), grid[(x[:, None] - grid).abs().argmin(1)], atol=1e-6)
    assert float(asymmetric(torch.zeros(1))) == 0.0


@pytest.mark.parametrize("name", EIGHT_BIT)
def test_zeros_and_padding_stay_exact(name):
    quantizer = make_quantizer(name).calibrate(torch.zeros(8))
    assert torch.equal(quantizer(torch.zeros(3)), torch.zeros(3))


@pytest.mark.parametrize("name", EIGHT_BIT)
def test_per_channel_is_every_channel_alone(name):
    x = torch.randn(5, 300) * torch.logspace(-3, 2, 5)[:, None]
    together = make_quantizer(name, axis=0).calibrate(x, "mse")
    assert together.high.shape == (5, 1)
    assert together.grid().shape[0] == 5
    for row, quantised in zip(x, together(x), strict=True):
        assert torch.allclose(make_quantizer(name).calibrate(row, "mse")(row), quantised, rtol=1e-5, atol=0)


def test_range_estimators():
    x = torch.randn(100_000, generator=torch.Generator().manual_seed(1))
    x[0] = 80.0
    assert float(UniformQuantizer().calibrate(x).high) == 80.0
    assert float(UniformQuantizer().calibrate(x, "percentile", percentile=99.0).high) == pytest.approx(2.576, abs=0.05)
    error = {e: sqnr(x, UniformQuantizer().calibrate(x, e)(x)) for e in ("minmax", "percentile", "mse")}
    assert error["mse"] >= max(error["minmax"], error["percentile"])
    two = UniformQuantizer(symmetric=False).calibrate(x.clamp(-1, 3))
    assert float(two.low) == -1.0
    assert float(two.high) == 3.0
    positive = UniformQuantizer(symmetric=False).calibrate(x.abs() + 1)
    assert float(positive.low) == 0.0  # zero stays representable


@pytest.mark.parametrize("name", ["E3", "E4", "E5"])
def test_line_search_is_fine_enough_for_the_ripples_of_floats(name):
    x = torch.randn(20_000, generator=torch.Generator().manual_seed(2))
    quantizer = make_quantizer(name)
    found = sqnr(x, quantizer.calibrate(x, "mse")(x))
    peak = float(x.abs().max())
    fine = max(sqnr(x, quantizer.set_range(peak * 2.0 ** (-i / 300))(x)) for i in range(1200))
    octave = max(sqnr(x, quantizer.set_range(peak * 2.0**-i)(x)) for i in range(4))
    assert fine - 0.1 < found <= fine + 0.01
    assert found >= octave


@pytest.mark.parametrize(
    "make", [lambda: UniformQuantizer(4), lambda: FloatQuantizer(3, 4), lambda: FloatQuantizer(2, 1)]
)
@pytest.mark.parametrize("start", [0.3, 30.0])
def test_gradient_moves_the_range_to_lower_error(make, start):
    x = torch.randn(4000, generator=torch.Generator().manual_seed(3))
    quantizer = make().set_range(start).learn_range()
    error = (quantizer(x) - x).square().mean()
    error.backward()
    step = 0.02 * start
    with torch.no_grad():
        quantizer.high -= step * quantizer.high.grad.sign()
        assert float((quantizer(x) - x).square().mean()) < float(error)
    assert (quantizer.high.grad < 0) == (start < 1)  # too small a range grows, too large a range shrinks


def test_training_the_range_arrives_near_the_line_search():
    x = torch.randn(20_000, generator=torch.Generator().manual_seed(4))
    quantizer = UniformQuantizer(4).set_range(8.0).learn_range()
    optimizer = torch.optim.Adam(quantizer.parameters(), lr=0.1)
    for _ in range(150):
        optimizer.zero_grad()
        (quantizer(x) - x).square().mean().backward()
        optimizer.step()
    assert quantizer.high.item() == pytest.approx(float(UniformQuantizer(4).calibrate(x, "mse").high), rel=0.1)


def test_straight_through_gradients():
    x = torch.tensor([0.2, 0.9, -5.0], requires_grad=True)
    float8(4, 1.0)(x).sum().backward()
    assert x.grad.tolist() == [1.0, 1.0, 0.0]  # identity inside the range, nothing beyond
    y = torch.tensor([0.5, 1.5, 2.4], requires_grad=True)
    rounded = round_ste(y)
    rounded.sum().backward()
    assert rounded.tolist() == [0.0, 2.0, 2.0]
    assert y.grad.tolist() == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("mantissa", range(1, 8))
def test_learned_format_equals_the_fixed_one(mantissa):
    learned = LearnedFloatQuantizer(mantissa).set_range(2.5)
    x = sample(2.5)
    assert torch.equal(learned(x), FloatQuantizer(7 - mantissa, mantissa).set_range(2.5)(x))
    assert learned.settled().mantissa == mantissa


def test_mantissa_is_learned_with_the_range():
    x = torch.randn(20_000, generator=torch.Generator().manual_seed(5))
    quantizer = LearnedFloatQuantizer(2.6).calibrate(x).learn_range()
    before = sqnr(x, quantizer(x).detach())
    optimizer = torch.optim.Adam(quantizer.parameters(), lr=0.05)
    for _ in range(120):
        optimizer.zero_grad()
        ((quantizer(x) - x).square().mean() * 1e3).backward()
        optimizer.step()
    after = sqnr(x, quantizer(x).detach())
    assert quantizer.settled().mantissa in (4, 5, 6)  # few exponent bits suit a Gaussian
    assert after > before + 6


def test_outlier_measures():
    x = torch.randn(200_000, generator=torch.Generator().manual_seed(6))
    assert kurtosis(x) == pytest.approx(3.0, abs=0.1)
    assert kurtosis(torch.rand(200_000) - 0.5) == pytest.approx(1.8, abs=0.05)
    assert kurtosis(torch.cat([x, torch.full((20,), 100.0)])) > 100
    assert sqnr(x, x) == float("inf")
    assert sqnr(x, 0.9 * x) == pytest.approx(20.0, abs=1e-3)


def test_state_dict_and_dtypes():
    quantizer = make_quantizer("E4", axis=0).calibrate(torch.randn(3, 50))
    fresh = make_quantizer("E4", axis=0)
    fresh.load_state_dict(quantizer.state_dict())
    x = torch.randn(3, 9)
    assert torch.equal(fresh(x), quantizer(x))
    assert quantizer(x.bfloat16()).dtype == torch.bfloat16


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="no range yet"):
        UniformQuantizer()(torch.ones(2))
    with pytest.raises(ValueError, match="bits"):
        UniformQuantizer(1)
    with pytest.raises(ValueError, match="signed=False"):
        UniformQuantizer(symmetric=False, signed=False)
    with pytest.raises(ValueError, match="exponent"):
        FloatQuantizer(9, 3)
    with pytest.raises(ValueError, match="ocp"):
        FloatQuantizer(3, 4, variant="ocp")
    with pytest.raises(ValueError, match="variant"):
        FloatQuantizer(4, 3, variant="fn")
    with pytest.raises(ValueError, match="ieee"):
        FloatQuantizer(1, 6, variant="ieee")
    with pytest.raises(ValueError, match="high must be above 0"):
        UniformQuantizer().set_range(-1.0)
    with pytest.raises(ValueError, match="finite"):
        UniformQuantizer().set_range(float("inf"))
    with pytest.raises(ValueError, match="low must be given"):
        UniformQuantizer(symmetric=False).set_range(1.0)
    with pytest.raises(ValueError, match="low must not be given"):
        UniformQuantizer().set_range(1.0, low=-1.0)
    with pytest.raises(ValueError, match="high must be above low"):
        UniformQuantizer(symmetric=False).set_range(1.0, low=2.0)
    with pytest.raises(ValueError, match="estimator"):
        UniformQuantizer().calibrate(torch.ones(2), "max")
    with pytest.raises(ValueError, match="percentile"):
        UniformQuantizer().calibrate(torch.ones(2), "percentile", percentile=0.999)
    with pytest.raises(ValueError, match="finite"):
        UniformQuantizer().calibrate(torch.tensor([1.0, float("nan")]))
    with pytest.raises(ValueError, match="x must not be empty"):
        UniformQuantizer().calibrate(torch.empty(0))
    with pytest.raises(ValueError, match="mantissa"):
        LearnedFloatQuantizer(0.5)
    with pytest.raises(ValueError, match="name"):
        make_quantizer("E1")


@pytest.mark.parametrize("name", EIGHT_BIT)
@pytest.mark.parametrize("largest", [1e-37, 1e-44, 3e38])
def test_tiny_and_huge_channels_stay_numbers(name, largest):
    x = torch.stack([torch.linspace(-1, 1, 9), torch.linspace(-1, 1, 9) * largest])
    quantizer = make_quantizer(name, axis=0).calibrate(x)
    found = quantizer(x)
    assert found.isfinite().all()
    assert quantizer.grid().isfinite().all()
    assert ((found - x).abs() <= 0.13 * x.abs().amax(1, keepdim=True)).all()
    assert torch.equal(found[0], make_quantizer(name).calibrate(x[0])(x[0]))


class Watched(UniformQuantizer):
    """Keeps every range it is tried with, and the squared error there."""

    def quantize(self, x, high, low=None):
        found = super().quantize(x, high, low)
        self.tried = [*getattr(self, "tried", []), (float(high), float((found - x).square().mean()))]
        return found


@pytest.mark.parametrize(("octaves", "steps"), [(1, 4), (3, 4), (3, 2), (2, 1)])
def test_the_search_tries_so_many_ranges_an_octave_over_so_many_octaves(octaves, steps):
    quantizer = Watched(8)
    quantizer.calibrate(torch.linspace(-1, 1, 1000), "mse", octaves=octaves, steps=steps)
    ranges = [high for high, _ in quantizer.tried]
    assert ranges == pytest.approx([2.0 ** (-i / steps) for i in range(octaves * steps)])
    assert float(quantizer.high) == 1.0


@pytest.mark.parametrize("octaves", [3, 4, 8])
def test_the_search_goes_on_below_its_octaves_until_the_best_range_lies_an_octave_higher(octaves):
    x = torch.randn(100_000, generator=torch.Generator().manual_seed(7))
    x[0] = 2.0**7  # an outlier that no grid of least squared error reaches for
    quantizer = Watched(4)
    quantizer.calibrate(x, "mse", octaves=octaves, steps=4)
    errors = [error for _, error in quantizer.tried]
    best = errors.index(min(errors))
    assert 4 * 5 <= best < 4 * 6  # between 5 and 6 octaves below the outlier
    assert len(errors) == max(4 * octaves, best + 4)
    everywhere = UniformQuantizer(4).calibrate(x, "mse", octaves=20, steps=4)
    assert float(quantizer.high) == float(everywhere.high) == quantizer.tried[best][0]


def test_the_search_shrinks_both_ends_of_a_range_and_leaves_a_channel_of_zeros_alone():
    x = torch.randn(100_000, generator=torch.Generator().manual_seed(8)).clamp(-4, 4)
    x[0] = -8.0
    wide = UniformQuantizer(4, symmetric=False).calibrate(x)
    tight = UniformQuantizer(4, symmetric=False).calibrate(x, "mse")
    factor = float(tight.high / wide.high)
    assert 0.2 < factor < 0.9
    assert float(tight.low / wide.low) == pytest.approx(factor)
    zeros = UniformQuantizer(8, axis=0).calibrate(torch.stack([torch.zeros(50), x[1:51]]), "mse")
    assert float(zeros.high[0]) == 1.0


def test_the_search_goes_down_forty_octaves_at_most():
    UniformQuantizer(8).calibrate(torch.ones(2), "mse", octaves=40, steps=1)
    with pytest.raises(ValueError, match="octaves must be a whole number at least 1 and at most 40, got 41"):
        UniformQuantizer(8).calibrate(torch.ones(2), "mse", octaves=41, steps=1)


@pytest.mark.parametrize("bits", [True, 8.0, "8"])
def test_bits_of_another_kind_are_refused(bits):
    with pytest.raises(TypeError, match="bits must be a whole number"):
        UniformQuantizer(bits)
