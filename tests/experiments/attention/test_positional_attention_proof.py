"""Positional attention's experiment notices when positions do not choose what is mixed."""

import pytest
import torch
from tests.properties.sabotage import record_of, verdict_of

from assay.evidence.types import Verdict
from assay.experiments import experiments_of
from assay.experiments.attention import positional_attention as room
from assay.experiments.rates import Rate
from assay.methods.attention.positional_attention import task_data

CLAIM = "positional_attention/cumsum-ood"
POINT = {"task": "sum", "n": 4, "dim": 16, "samples": 2000, "steps": 120, "batch": 50, "seeds": 3}


@pytest.fixture(autouse=True)
def _one_rate(monkeypatch):
    """One that suits so small a network."""
    monkeypatch.setattr(room, "chosen", lambda name, arm: Rate(1e-2, (3e-3, 1e-2, 3e-2)))


def test_the_experiment_loads_and_its_deciding_point_is_the_papers():
    (found,) = experiments_of("positional_attention")
    assert found.decides["full"] == room.PAPER
    assert set(found.departures) == {"steps", "batch", "seeds", "rate", "schedule"}


@pytest.mark.slow
def test_random_routing_in_its_place_changes_the_verdict(monkeypatch):
    point = POINT | {
        "steps": 360
    }  # after 120 it still depends on the seeds whether positions do better than random routing
    honest = record_of(CLAIM, point)
    assert honest.refuted is False
    assert honest.measured.median < min(1, honest.controls["deleted"], honest.controls["random"])
    network = room.network
    monkeypatch.setattr(
        room, "network", lambda arm, *sizes: network("random routing" if arm == "position" else arm, *sizes)
    )
    assert verdict_of(CLAIM, point) is Verdict.REFUTED


def test_arms_that_were_not_trained_void_the_comparison():
    assert verdict_of(CLAIM, POINT | {"steps": 1}) is Verdict.UNDECIDED


def test_fixed_weights_are_what_they_say():
    torch.manual_seed(0)
    uniform, drawn = (room.Fixed(8, 5, uniform=uniform) for uniform in (True, False))
    torch.testing.assert_close(uniform.weights(5), torch.full((2, 5, 5), 0.2))
    assert float(drawn.weights().amax(-1).mean()) > 0.5
    with pytest.raises(ValueError, match="n must be 5"):
        drawn.weights(4)


def test_the_free_baseline_scales_with_its_input():
    torch.manual_seed(0)
    model = room.network(room.FREE, 4, 16)
    x = torch.randn(3, 4)
    torch.testing.assert_close(model(10 * x), 10 * model(x))
    torch.testing.assert_close(model(torch.zeros(1, 4)), torch.zeros(1, 4))


def test_trivial_guesses():
    x, y = task_data("sum", 1000, 4, seed=room.TEST)
    assert room.error(lambda values: values.cumsum(1), "sum", 4, 1) == 0
    alone = room.each_value_alone("sum", 4, 2000)
    assert 0 < alone < float((y - y.mean(0)).square().mean())
    assert room.error(room.linear_map("sum", 4, 2000, 0), "sum", 4, 10) < 1e-9
