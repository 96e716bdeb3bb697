"""Grids against the formats they stand for."""

from __future__ import annotations

import pytest
import torch

from assay.methods.core.quantize.formats import FORMATS
from assay.methods.core.quantize.grids import ROUNDABLE, grid_of, group_grid, output_error


@pytest.mark.parametrize("name", ROUNDABLE)
def test_rounding_to_nearest_is_what_the_format_packs(name):
    weight = torch.randn(70, 64)
    weight[3] = 0
    grid, form = grid_of(name), FORMATS[name]
    rounded = grid.round(weight)
    theirs = form.unpack(form.pack(weight), 70, 64)
    assert float((rounded.dense() != theirs).float().mean()) < 1e-3  # ties may go either way
    error, other = (float((x - weight).square().sum()) for x in (rounded.dense(), theirs))
    assert error == pytest.approx(other, rel=1e-4)
    assert bool((rounded.dense()[3] == 0).all())


@pytest.mark.parametrize("name", ROUNDABLE)
def test_packing_codes_rounds_nothing_again(name):
    weight = torch.randn(70, 64)
    grid, form = grid_of(name), FORMATS[name]
    scale, minimum = grid.fit(weight)
    # other codes than the nearest, as GPTQ chooses them; the largest of a row is not used
    codes = grid.codes(weight * 0.7, grid.spread(scale, 64), grid.spread(minimum, 64))
    rounded = type(grid.round(weight))(grid, codes, scale, minimum)
    parts = rounded.parts()
    assert {k: (v.shape, v.dtype) for k, v in parts.items()} == {
        k: (v.shape, v.dtype) for k, v in form.pack(weight).items()
    }
    assert torch.equal(form.unpack(parts, 70, 64), rounded.dense())


@pytest.mark.parametrize(
    "grid", [grid_of(name) for name in ROUNDABLE] + [group_grid(3, 16), group_grid(2, 64, asymmetric=False)]
)
def test_codes_are_the_nearest_values_and_values_are_fixed_points(grid):
    weight = torch.randn(6, 64)
    scale, minimum = (grid.spread(x, 64) for x in grid.fit(weight))
    codes = grid.codes(weight, scale, minimum)
    values = grid.values(codes, scale, minimum)
    assert torch.equal(grid.codes(values, scale, minimum), codes)
    low, high = (0, 255) if grid.levels is not None else (-127, 127) if grid.group is None else (0, 2**grid.bits - 1)
    every = torch.arange(low, high + 1, dtype=torch.int16)
    for i, j in ((0, 0), (2, 31), (5, 63)):
        possible = grid.values(every, scale[i, j], minimum[i, j])
        nearest = float((possible - weight[i, j].double()).abs().min())
        assert abs(float(values[i, j]) - float(weight[i, j])) == pytest.approx(nearest, abs=1e-12)


def test_rows_that_float16_scales_do_not_hold_get_a_power_of_two():
    weight = torch.randn(4, 32)
    weight[1] *= 1e-6
    weight[2] *= 1e7
    rounded = grid_of("int4").round(weight)
    relative = (rounded.dense() - weight).norm(dim=1) / weight.norm(dim=1)
    assert float(relative.max()) < 0.1
    assert rounded.gain is not None


def test_the_error_of_outputs_is_that_of_the_outputs():
    weight, x = torch.randn(5, 32), torch.randn(40, 32)
    other = grid_of("int4").round(weight).dense()
    expected = ((x @ (other - weight).T).double().square().sum() / 40).item()
    assert output_error(weight, other, (x.T @ x / 40).double()) == pytest.approx(expected, rel=1e-5)


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="format must be one of 'int4', .* got 'ternary'"):
        grid_of("ternary")
    with pytest.raises(ValueError, match="weight must have a multiple of 32 inputs for int4, got 40"):
        grid_of("int4").round(torch.randn(4, 40))
    with pytest.raises(ValueError, match="weight must be finite"):
        grid_of("w8a8").round(torch.full((2, 32), torch.nan))
    with pytest.raises(ValueError, match="bits must be a whole number at least 2 and at most 8"):
        group_grid(9, 32)
    with pytest.raises(ValueError, match="grid must be one of int4, .* to be packed, got groups of 16 in 3 bits"):
        group_grid(3, 16).round(torch.randn(2, 32)).parts()
