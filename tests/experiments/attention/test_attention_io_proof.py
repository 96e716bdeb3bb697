"""The experiment on words moved notices when the tile is not chosen, when the formula is wrong, and when no attention comes out."""

import pytest
import torch
from tests.properties.sabotage import record_of

from assay.evidence.types import Verdict
from assay.evidence.verdict import judge
from assay.experiments import experiments_of
from assay.experiments.attention import attention_io as room
from assay.methods.attention.attention_io import Tile, Traffic, count

CLAIM = "attention_io/flash-optimal"
POINT = {"tokens": 1 << 13, "simulated": 160, "rounds": 1, "steps": 500}


@pytest.fixture(autouse=True)
def _without_the_model(monkeypatch):
    """Counts do not depend on values; nor is anything timed."""
    monkeypatch.setattr(room, "_captured", lambda tokens: tuple(torch.randn(3, 1, 9, tokens, 64)))
    monkeypatch.setattr(room, "_timings", lambda tokens, rounds: {})


def test_the_experiment_loads():
    (found,) = experiments_of("attention_io")
    assert found.computed
    assert found.decides["full"]["simulated"] == 4096


def test_the_exponent_is_arithmetic_and_right():
    record = record_of(CLAIM, POINT)
    assert judge(record).verdict is Verdict.COMPUTED
    assert record.measured.median == pytest.approx(record.paper_value, abs=record.tolerance)
    assert record.details["simulations"] > 0


def test_a_tile_that_is_not_chosen_gives_another_exponent(monkeypatch):
    monkeypatch.setattr(room, "best_tile", lambda algorithm, n, d, capacity: Tile(8, 8))
    record = record_of(CLAIM, POINT)
    assert abs(record.measured.median - record.paper_value) > record.tolerance


def test_a_wrong_formula_is_noticed(monkeypatch):
    def one_more(algorithm, n, d, tile, **options):
        right = count(algorithm, n, d, tile, **options)
        return Traffic(right.reads + 1, right.writes, right.peak)

    monkeypatch.setattr(room, "count", one_more)
    with pytest.raises(RuntimeError, match="counted"):
        record_of(CLAIM, POINT)


def test_words_that_compute_no_attention_are_noticed(monkeypatch):
    simulate = room.simulate

    def wrong(*args, **options):
        out, traffic = simulate(*args, **options)
        return out.roll(1, 0), traffic

    monkeypatch.setattr(room, "simulate", wrong)
    with pytest.raises(RuntimeError, match="does not compute attention"):
        record_of(CLAIM, POINT)


def test_nothing_simulated_is_no_proof():
    with pytest.raises(RuntimeError, match="no algorithm was simulated"):
        record_of(CLAIM, POINT | {"steps": 1})
