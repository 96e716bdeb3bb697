"""The shared checker: what goes in, what is refused, and that every message names argument, range and value."""

from __future__ import annotations

import decimal
import fractions
import math

import numpy as np
import pytest
import torch

from assay import checks


@pytest.mark.parametrize(
    "value", [1, 1.0, np.float32(1), np.int64(1), torch.tensor(1.0), fractions.Fraction(1), np.array(1.0)]
)
def test_numbers_of_every_make_come_back_plain(value):
    found = checks.number("tau", value, low=0, high=1)
    assert type(found) is float
    assert found == 1.0


@pytest.mark.parametrize(
    "value", [True, np.True_, "1", None, 1j, [1], decimal.Decimal(1), np.zeros(2), torch.tensor(True)]
)
def test_what_is_no_number_is_a_type_error(value):
    with pytest.raises(TypeError, match="^tau must be a finite number above 0, got "):
        checks.number("tau", value, above=0)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, np.nan, 10**400, torch.tensor(math.nan)])
def test_nan_and_infinity_are_in_no_range(value):
    with pytest.raises(ValueError, match="^tau must be a finite number, got "):
        checks.number("tau", value)


def test_the_bounds_are_open_and_closed_as_named():
    assert checks.number("x", 0, low=0) == 0
    assert checks.number("x", 1, high=1) == 1
    for bounds in ({"above": 0}, {"below": 0}, {"low": 1e-9}, {"high": -1e-9}):
        with pytest.raises(ValueError, match=r"x must be a finite number .*, got 0"):
            checks.number("x", 0, **bounds)
    with pytest.raises(ValueError, match=r"^x must be a finite number above 0 and at most 1, got 2$"):
        checks.number("x", 2, above=0, high=1)


@pytest.mark.parametrize("value", [3, np.int8(3), torch.tensor(3), np.uint64(3), np.array(3)])
def test_whole_numbers_of_every_make(value):
    found = checks.whole("stride", value, low=1, high=3)
    assert type(found) is int
    assert found == 3


@pytest.mark.parametrize(
    "value", [3.0, True, np.True_, "3", None, np.float64(3), torch.tensor(3.0), torch.tensor(True)]
)
def test_what_is_not_whole_is_a_type_error(value):
    with pytest.raises(TypeError, match="^stride must be a whole number at least 1, got "):
        checks.whole("stride", value, low=1)


def test_whole_numbers_outside():
    with pytest.raises(ValueError, match=r"^stride must be a whole number at least 1 and at most 4, got 5$"):
        checks.whole("stride", 5, low=1, high=4)


def test_flags():
    assert checks.flag("causal", np.True_) is True
    assert checks.flag("causal", False) is False
    for value in (1, 0, "no", None, np.array(True).tolist() + 1):
        with pytest.raises(TypeError, match="^causal must be True or False, got "):
            checks.flag("causal", value)


def test_choices():
    assert checks.choice("order", "row", ("row", "column")) == "row"
    with pytest.raises(ValueError, match="^order must be one of 'row', 'column', got 'diagonal'$"):
        checks.choice("order", "diagonal", ("row", "column"))
    with pytest.raises(TypeError, match="got None"):
        checks.choice("order", None, ("row", "column"))
    with pytest.raises(TypeError, match="got True"):
        checks.choice("bits", True, ("1", "2"))
    with pytest.raises(ValueError, match="got True"):  # True is an int, and 1 == True, but it is not what is meant
        checks.choice("bits", True, (1, 2))


def test_tensors():
    x = torch.zeros(2, 3)
    assert checks.tensor("q", x, shape=("batch", 3)) is x
    assert checks.tensor("q", x, shape=("...", 3)) is x
    assert checks.tensor("q", torch.zeros(4, 2, 3), shape=("...", "n", 3)).ndim == 3
    refused = [
        (TypeError, "q must be a tensor, got list", [1.0], {}),
        (TypeError, "q must hold floating-point numbers, got torch.int64", torch.zeros(2, dtype=torch.int64), {}),
        (
            TypeError,
            "q must hold whole numbers, got torch.bool",
            torch.zeros(2, dtype=torch.bool),
            {"dtype": "integer"},
        ),
        (
            TypeError,
            "q must hold torch.float32 or torch.bfloat16, got torch.float64",
            x.double(),
            {"dtype": (torch.float32, torch.bfloat16)},
        ),
        (TypeError, "q must hold floating-point numbers, got torch.complex64", x.to(torch.complex64), {}),
        (ValueError, r"q must have shape \(batch, 4\), got \(2, 3\)", x, {"shape": ("batch", 4)}),
        (ValueError, r"q must have shape \(\.\.\., 4\), got \(2, 3\)", x, {"shape": ("...", 4)}),
        (ValueError, r"q must have 3 dimensions, got shape \(2, 3\)", x, {"ndim": 3}),
        (ValueError, r"q must not be empty, got shape \(0, 3\)", x[:0], {}),
        (ValueError, "q must be finite", x / 0, {"finite": True}),
        (ValueError, "q must lie on meta, got cpu", x, {"device": torch.device("meta")}),
    ]
    for error, message, value, options in refused:
        with pytest.raises(error, match=f"^{message}"):
            checks.tensor("q", value, **options)
    assert checks.tensor("q", x[:0], empty=True).numel() == 0


def test_tensors_that_go_together():
    x = torch.zeros(2)
    checks.together(q=x, k=x + 1, v=x)
    with pytest.raises(TypeError, match=r"^v must have the dtype of q, torch.float32, got torch.float64$"):
        checks.together(q=x, k=x, v=x.double())
    with pytest.raises(ValueError, match=r"^k must lie on the device of q, cpu, got meta$"):
        checks.together(q=x, k=x.to("meta"))


def test_a_long_value_is_cut_short():
    with pytest.raises(TypeError) as caught:
        checks.number("x", "a" * 10_000)
    assert len(str(caught.value)) < 200
