"""KAT's experiments notice when the rational functions are broken."""

from __future__ import annotations

import pytest
import torch
from tests.properties.sabotage import PAYS, record_of, verdict_of

from assay.evidence.types import Verdict
from assay.evidence.verdict import judge
from assay.experiments import experiments_of
from assay.experiments.layers import kat as room
from assay.methods.layers import kat

DIGITS = {"hidden": 64, "batch": 128, "epochs": 10, "train": 3000, "seeds": 3}
TILES = {"width": 64, "depth": 1, "patch": 8, "train": 1024, "epochs": 6, "seeds": 3}


def test_every_experiment_declares_what_decides():
    found = {each.claim: each for each in experiments_of("kat")}
    assert set(found) == {"kat/mnist-time", "kat/imagenet-accuracy-base"}
    assert found["kat/mnist-time"].decides["small"]["hidden"] == found["kat/mnist-time"].paper["hidden"] == 128
    assert found["kat/mnist-time"].decides["small"]["batch"] == 128


def test_the_time_is_a_bound_and_not_a_speed_up():
    record = record_of("kat/mnist-time", DIGITS | {"epochs": 1, "train": 320})
    assert record.unit == "x"
    assert not record.higher_is_better
    assert record.measured.median == pytest.approx(1 / record.ratios["baseline"].median)


@pytest.mark.slow
def test_the_time_needs_a_function_that_learns(monkeypatch):
    honest = record_of("kat/mnist-time", DIGITS)
    assert judge(honest).verdict in (*PAYS, Verdict.UNDECIDED)
    assert honest.quality.controls["deleted"] < honest.quality.baseline - 0.1
    monkeypatch.setattr(kat, "rational", lambda x, a, b, *, denominator: x + 0 * a.sum() + 0 * b.sum())
    assert verdict_of("kat/mnist-time", DIGITS) == Verdict.DOES_NOT_PAY


@pytest.mark.slow
def test_the_accuracy_needs_rational_functions(monkeypatch):
    """Networks trained for seconds are held to no floor: the nearest class mean takes them longer to beat."""
    monkeypatch.setattr(room, "nearest_mean", lambda split: 0.0)
    assert verdict_of("kat/imagenet-accuracy-base", TILES) != Verdict.REFUTED
    monkeypatch.setattr(
        kat, "rational", lambda x, a, b, *, denominator: torch.randn_like(x) + 0 * a.sum() + 0 * b.sum()
    )
    assert verdict_of("kat/imagenet-accuracy-base", TILES) == Verdict.REFUTED


def test_mlps_without_an_activation_are_a_linear_function():
    block = room.transformer("none", 64, 1, 8, 0).blocks[0].mlp
    x, y = torch.randn(2, 5, 64).unbind()
    torch.testing.assert_close(block(x) + block(y), block(x + y) + block(torch.zeros(5, 64)), atol=1e-5, rtol=1e-4)
