"""The experiments of idealized_runtime notice when the runtime model is broken, or the machine is not linear."""

import dataclasses

import pytest
from tests.properties.sabotage import record_of, verdict_of

from assay.evidence.types import Verdict
from assay.experiments import experiments_of
from assay.experiments.serving import idealized_runtime as room

POINT = {"prompts": [1, 32, 64], "outputs": [1, 6, 16], "repeats": 3}


def runner_of(seconds):
    def runner(model, make_prompt=None):
        return lambda p, o: seconds(p, o) if make_prompt is None else seconds(p, o)

    return runner


def linear(p, o):
    linear.calls = getattr(linear, "calls", 0) + 1
    return (2e-3 + 1e-4 * p + 5e-3 * (o - 1)) * (1 + 1e-3 * (linear.calls % 3))


@pytest.fixture
def machine(monkeypatch):
    def install(seconds):
        monkeypatch.setattr(room, "transformers_runner", runner_of(seconds))

    return install


def test_a_linear_machine_is_found_linear_and_another_is_not(machine):
    machine(linear)
    assert verdict_of("idealized_runtime/linear-fit", POINT) is Verdict.REPRODUCED
    machine(lambda p, o: linear(p, o) * (5 if o == 6 else 1))  # one length of output takes five times as long
    assert verdict_of("idealized_runtime/linear-fit", POINT) is not Verdict.REPRODUCED


def test_the_slope_deleted_changes_the_verdict(machine, monkeypatch):
    machine(linear)
    real = room.profile

    def broken(*arguments, **options):
        model = real(*arguments, **options)
        return dataclasses.replace(model, fit=model.fit, r2=-0.3)

    monkeypatch.setattr(room, "profile", broken)
    monkeypatch.setattr(room, "fit", lambda runs, **options: dataclasses.replace(real_fit(runs, **options), r2=-0.3))
    assert verdict_of("idealized_runtime/linear-fit", POINT) is Verdict.REFUTED


real_fit = room.fit


def test_trivial_models_stand_beside_it(machine):
    machine(linear)
    record = record_of("idealized_runtime/linear-fit", POINT)
    assert record.measured.median > record.arms["the operations proxy"]
    assert record.measured.median > record.arms["the prompt's time alone"]


@pytest.mark.parametrize("claim", ["profiling-saving", "denoised-saving"])
def test_savings_are_arithmetic_and_follow_their_formula(machine, monkeypatch, claim):
    machine(linear)
    monkeypatch.setattr(room, "docstring_requests", lambda *_: [([1] * 20, 10)] * 50)
    point = {"sample": 3, **POINT}
    honest = record_of(f"idealized_runtime/{claim}", point)
    assert verdict_of(f"idealized_runtime/{claim}", point) is Verdict.COMPUTED
    monkeypatch.setattr(room, "docstring_requests", lambda *_: [([1] * 20, 10)] * 100)
    twice = record_of(f"idealized_runtime/{claim}", point)
    assert twice.measured.median > 1.3 * honest.measured.median  # it only scales with the number of requests


def test_the_deciding_points_are_named():
    for found in experiments_of("idealized_runtime"):
        assert set(found.decides) == {"smoke", "small", "full"}
