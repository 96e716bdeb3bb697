"""ParScale's experiments notice streams that have learned nothing, and count what they say they count."""

from __future__ import annotations

import dataclasses
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tests.properties.sabotage import PAYS, record_of, verdict_of

from assay.evidence.types import Verdict
from assay.evidence.verdict import judge
from assay.experiments import experiments_of
from assay.experiments.inference import parscale as room
from assay.experiments.rates import Rate
from assay.methods.inference.parscale import cost as cost_module
from assay.methods.inference.parscale.cost import Shape
from assay.workloads.sequences import byte_windows

TINY = {"width": 32, "wider": 40, "widest": 48, "layers": 1, "length": 32, "steps": 80, "streams": 2, "prefix": 4}
RATE = Rate(1e-2, (5e-3, 1e-2, 2e-2))
LATENCY = {**room.LATENCY_POINT, "model": "tiny", "dtype": "float32", "streams": 2, "new": 2, "task": TINY}
TIMES = {"one stream": [1.0, 1.01, 0.99], "streams": [1.1, 1.12, 1.09], "larger": [1.8, 1.82, 1.79]}


@pytest.fixture(scope="module")
def honest():
    """The streams' losses, really trained."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(room, "chosen", lambda name, arm: RATE)
        return [room.arm_loss("streams", TINY, seed) for seed in room.SEEDS]


@pytest.fixture(scope="module")
def broken(honest):
    """The same models with prefixes that were drawn and not learned."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(room, "chosen", lambda name, arm: RATE)
        real = room.trained_model
        patch.setattr(room, "trained_model", lambda *args: room.with_random_prefixes(real(*args)))
        return [room.arm_loss("streams", TINY, seed) for seed in room.SEEDS]


def given(scores, honest, **changed):
    """Losses in which the streams' are real, and the other arms' are given by how far they lie from an honest streams' loss."""
    away = {
        "one stream": 0.02, "wider": 0.0, "widest": -0.03, "more steps": 0.005, "identical prefixes": 0.025, **changed,
    }  # fmt: skip
    best = [score["loss"] for score in honest]
    found = {arm: [{"loss": loss + gap} for loss in best] for arm, gap in away.items()} | {"streams": scores}
    return lambda arms, task: {arm: found[arm] for arm in arms}


@pytest.fixture
def easy(monkeypatch, honest):
    """No other arm is trained, and nothing is timed."""
    monkeypatch.setattr(room, "chosen", lambda name, arm: RATE)
    monkeypatch.setattr(room, "averaged_loss", lambda task: honest[0]["loss"])
    monkeypatch.setattr(room, "published_fits", dict)
    monkeypatch.setattr(room, "contestants", lambda *args: dict.fromkeys(TIMES))
    monkeypatch.setattr(room, "compare_many", lambda *args, **options: SimpleNamespace(seconds=TIMES))
    monkeypatch.setattr(room.language, "bigram_floor", lambda *args: 3.2)  # these models do not reach the real one
    return monkeypatch


def test_experiments_load():
    claims = {"parscale/memory-increase", "parscale/latency-increase", "parscale/parameter-equivalent"}
    assert {found.claim for found in experiments_of("parscale")} == claims


def test_streams_that_learned_nothing_are_worth_no_parameters(easy, honest, broken):
    easy.setattr(room, "losses_of", given(honest, honest))
    assert verdict_of("parscale/parameter-equivalent", TINY) in PAYS
    easy.setattr(room, "losses_of", given(broken, honest))
    assert verdict_of("parscale/parameter-equivalent", TINY) is Verdict.REFUTED


def test_more_steps_that_are_worth_more_are_noticed(easy, honest):
    easy.setattr(room, "losses_of", given(honest, honest, **{"more steps": -0.05}))
    assert verdict_of("parscale/parameter-equivalent", TINY) is Verdict.DOES_NOT_PAY


def test_prefixes_that_need_not_differ_show_nothing(easy, honest):
    easy.setattr(room, "losses_of", given(honest, honest, **{"identical prefixes": 0.0}))
    assert verdict_of("parscale/parameter-equivalent", TINY) is Verdict.QUALITY_NOT_SHOWN


def test_a_loss_that_is_not_the_larger_models_is_noticed(easy, honest, broken):
    easy.setattr(room, "losses_of", given(honest, honest, **{"identical prefixes": 0.05}))
    assert verdict_of("parscale/latency-increase", LATENCY) in PAYS
    easy.setattr(room, "losses_of", given(broken, honest, **{"identical prefixes": 0.05}))
    assert verdict_of("parscale/latency-increase", LATENCY) not in PAYS


def test_bytes_that_are_forgotten_change_the_figure(monkeypatch):
    point = {"streams": 8, "batch": 1, "prompt": 64, "new": 64}
    record = record_of("parscale/memory-increase", point)
    assert record.measured is not None
    real = cost_module.cost

    def without_streams(shape, *, streams=1, **options):
        return dataclasses.replace(real(shape, streams=streams, **options), cache=real(shape, **options).cache)

    monkeypatch.setattr(cost_module, "cost", without_streams)
    other = record_of("parscale/memory-increase", point)
    assert judge(other).verdict is Verdict.COMPUTED
    assert abs(math.log(other.measured.median / record.measured.median)) > math.log(1.25)


def test_the_ratio_of_increases():
    value, low, high = room.increase_ratio(TIMES)
    assert low <= value <= high
    assert value == pytest.approx(8.0)
    none = room.increase_ratio({**TIMES, "streams": TIMES["one stream"]})
    assert none[0] == pytest.approx(800.0)
    assert np.isfinite(none).all()


def test_what_is_timed_generates():
    models = room.contestants("tiny", "float32", 2)
    assert set(models) == {"one stream", "streams", "larger"}
    assert {room.answering(made, 2, 4, 3).shape for made in models.values()} == {(2, 7)}
    one, larger = (Shape.of(models[name].config).body for name in ("one stream", "larger"))
    assert larger / one == pytest.approx(room.PAPER_K * math.log(2) + 1, rel=0.05)


def test_equal_streams_are_one_stream():
    made = room.new_model("identical prefixes", TINY, 0).eval()
    with torch.no_grad():
        states = made.stream_states(byte_windows(16, 2)[0], use_cache=False).states
        torch.testing.assert_close(made.aggregator(states), states[0])
    other = room.new_model("streams", TINY, 0)
    assert torch.equal(other.base.lm_head.weight, made.base.lm_head.weight)
    assert not torch.equal(*other.prefixes()[0][0])


def test_a_loss_told_in_parameters():
    losses = {arm: [{"loss": value}] * 3 for arm, value in (("one stream", 2.0), ("wider", 1.9), ("widest", 1.8))}
    slope = room.worth(losses, TINY)
    assert slope > 0
    sizes = [room.body_parameters(TINY, arm) for arm in ("one stream", "widest")]
    assert (2.0 - 1.8) / slope == pytest.approx(math.log(sizes[1] / sizes[0]), rel=0.05)
    assert room.as_eight(math.log(1 + 0.39 * math.log(4)), 4) == pytest.approx(1 + 0.39 * math.log(8))
    with pytest.raises(ValueError, match="larger models"):
        room.worth({arm: [{"loss": 4 - value[0]["loss"]}] for arm, value in losses.items()}, TINY)


def test_averaged_predictions(monkeypatch):
    """The mean of two models' probabilities, by hand."""
    monkeypatch.setattr(room, "chosen", lambda name, arm: RATE)
    models = [room.new_model("one stream", TINY, seed).eval() for seed in (0, 1)]
    monkeypatch.setattr(room, "trained_model", lambda arm, task, seed: models[seed])
    inputs, targets = room.language.heldout(TINY["length"], room.WINDOWS)
    with torch.no_grad():
        mean = sum(made(inputs).logits.softmax(-1) for made in models) / 2
    wanted = -mean.gather(-1, targets[..., None]).log().mean()
    assert room.averaged_loss(TINY) == pytest.approx(float(wanted), rel=1e-5)
