"""What POLCA's experiment says if the policy is broken, or the world another one."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from tests.properties.sabotage import PAYS, record_of, verdict_of

from assay.evidence.types import Verdict
from assay.evidence.verdict import judge
from assay.experiments import experiments_of
from assay.experiments.serving import polca as room
from assay.methods.serving.polca import HIGH, LOW, Ladder, MeasuredPhases, Replay, Step, no_capping

CLAIM = "polca/more-servers"
POINT = {
    "world": "that of 2023, few arms",
    "response": room.MEASURED,
    "base": 20,
    "seconds": 700,
    "seeds": 4,
    "step": 1,
    "rounds": 1,
}
TWO = "two thresholds"
KNOWN: dict = {}
make, measured, shown = room._Trace.of, room.measured_phases, room._Trace.shown


def trace(workload, base, seed, spec, lengths):
    """Made once: no clock is lowered in the uncapped runs, so that they are the same whatever the response to one."""
    key = (workload, base, seed, spec.max_running)
    if key not in KNOWN:
        KNOWN[key] = make(workload, base, seed, spec, lengths)
    return replace(KNOWN[key], spec=spec, known={})


def phases(prompt, token):
    return MeasuredPhases((1, 2), *[(beta / 0.5 + 1 - beta, 1.0) for beta in (prompt, token)])


@pytest.fixture(autouse=True)
def machine(monkeypatch):
    """A device that waits for memory, whatever machine tests; lengths without a tokenizer; few arms."""
    monkeypatch.setattr(room, "measured_phases", lambda rounds: phases(0.6, 0.05))
    monkeypatch.setattr(room, "document_lengths", lambda: None)
    monkeypatch.setattr(room._Trace, "shown", lambda self, goodputs: {})
    monkeypatch.setattr(room, "MOST", 0.5)
    monkeypatch.setitem(room.WORLDS, POINT["world"], room.WORLDS[room.OF_2023])
    monkeypatch.setattr(room._Trace, "of", trace)


def test_the_policy_holds_on_a_device_that_waits_for_memory():
    record = record_of(CLAIM, POINT)
    assert judge(record).verdict is Verdict.REPRODUCED
    assert record.measured.low > record.free > 0
    assert record.arms[f"{TWO}{room.ONLY}"] >= record.measured.median
    assert record.quality.controls["deleted"] > 1
    assert record.quality.controls["random"] > 1
    assert record.quality.high <= 1
    # free is whichever carries more, trace by trace
    plain, limited = (record.details["added_percent"][name] for name in (room.NONE, room.LIMIT))
    assert record.free == pytest.approx(np.mean(np.maximum(plain, limited)))
    assert "power limit" in record.free_label


def test_answers_that_come_too_late_are_no_more_servers(monkeypatch):
    """The allowances count in the figure itself, without any brake."""
    monkeypatch.setattr(room, "gates_used", lambda result, reference: 1.1)
    found = record_of(CLAIM, {**POINT, "base": 8, "seconds": 240, "seeds": 2})
    assert found.measured.median == 0
    assert found.arms[f"{TWO}{room.ONLY}"] > 0
    assert judge(found).verdict is Verdict.REFUTED


def test_the_guard_speaks_of_the_row_of_the_figure(monkeypatch):
    """A fifth more servers within the allowances is a gain, though with the paper's 30 % answers would come too late."""
    most = {TWO: 20.0, f"{TWO}{room.ONLY}": 35.0, room.NONE: 10.0, room.LIMIT: 15.0}
    monkeypatch.setattr(room._Trace, "most", lambda self, name, step, kept=False: most[name])
    monkeypatch.setattr(
        room._Trace,
        "controls",
        lambda self, added, all_of_them: {
            TWO: added / 5 - 0.1 * self.seed,
            "deleted": 3.0,
            "random": 2.0,
            "rival": 1.5,
        },
    )
    found = record_of(CLAIM, {**POINT, "seconds": 60, "seeds": 2})
    assert found.details["used_at_30_percent"][TWO] == pytest.approx([1.2, 1.1])
    assert found.quality.candidate == pytest.approx(0.75)
    assert found.quality.high == 1.0  # by two traces alone it would be 1.4, but the search lets none pass 1
    assert judge(found).verdict is Verdict.DIRECTION_HOLDS


def test_every_run_is_made_once(monkeypatch):
    one = make(room.Workload(seconds=240.0, day=240.0), 6, 0, room.ServerSpec(), None)
    ran = []
    real = room.simulate_row

    def noting(requests, row, policy, **rest):
        ran.append((row.added, repr(policy), tuple(rest["groups"] or ())))
        return real(requests, row, policy, **rest)

    monkeypatch.setattr(room, "simulate_row", noting)
    for kept in (True, False):
        one.most(TWO, 1, kept=kept)
    one.controls(one.paper, all_of_them=True)
    said = shown(one, goodputs=True)
    assert 0 < said["joules_above_idle_over_uncapped"] < 1.5
    assert said["goodput_per_second"][TWO]["0 %"] > 0
    assert len(ran) == len(set(ran)) > 8


def test_how_long_a_row_is_looked_at_is_no_energy():
    row = room.RowSpec(4)
    requests = room.synthetic(room.Workload(seconds=60.0, day=60.0), row).requests
    short, long = (room.simulate_row(requests, row, no_capping(), seconds=seconds) for seconds in (0.0, 2000.0))
    assert long.joules > 1.5 * short.joules
    assert room.above_idle(long, 4) == pytest.approx(room.above_idle(short, 4))
    assert room.above_idle(short, 2) < room.above_idle(short, 4)


def broken(policy, monkeypatch):
    monkeypatch.setitem(room.POLICIES, TWO, policy)
    return verdict_of(CLAIM, POINT)


def test_without_thresholds_it_does_not(monkeypatch):
    assert broken(lambda base, added, spec: no_capping(), monkeypatch) not in PAYS


@pytest.mark.slow
def test_with_caps_at_random_times_it_does_not(monkeypatch):
    chance = np.random.default_rng(0)
    schedule = [(10.0 * n, int(level)) for n, level in enumerate(chance.integers(0, 4, 60))]
    assert broken(lambda base, added, spec: Replay(schedule), monkeypatch) not in PAYS


@pytest.mark.slow
def test_with_high_priority_capped_first_it_does_not(monkeypatch):
    swapped = Ladder([Step(0.8, {HIGH: 1275.0}), Step(0.89, {HIGH: 1110.0}), Step(0.89, {HIGH: 1110.0, LOW: 1305.0})])
    assert broken(lambda base, added, spec: swapped, monkeypatch) not in PAYS


@pytest.mark.slow
def test_on_the_recalled_hardware_the_allowances_decide(monkeypatch):
    """Its phases bear a lower clock so badly that as many servers as need no cap at all are better."""
    point = {**POINT, "response": room.RECALLED}
    honest = record_of(CLAIM, point)
    assert judge(honest).verdict is Verdict.DOES_NOT_PAY
    assert "is better" in judge(honest).reason
    assert honest.quality.high <= 1 < np.mean(honest.details["used_at_30_percent"][TWO])
    monkeypatch.setitem(room.POLICIES, TWO, lambda base, added, spec: no_capping())
    uncapped = record_of(CLAIM, point)
    assert uncapped.measured.median > honest.measured.high
    assert "no gain against" in judge(uncapped).reason


def test_phases_measured_on_a_busy_machine_are_refused(monkeypatch):
    busy = MeasuredPhases((1, 2), (1.0, 0.95), (1.0, 1.0))
    monkeypatch.setattr(room, "load_model", lambda name: SimpleNamespace(model=None))
    monkeypatch.setattr(room.torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(room, "measure_phases", lambda model, **settings: busy)
    with pytest.raises(RuntimeError, match="the machine is busy"):
        measured(5)
    monkeypatch.setattr(room, "measure_phases", lambda model, **settings: replace(busy, prompt_seconds=(1.0, 0.5)))
    assert measured(5).prompt_beta == 1.0


@pytest.mark.slow
@pytest.mark.parametrize("world", [world for world in room.WORLDS if world != room.OF_2023])
def test_in_a_world_that_rises_together_or_draws_more_it_does_not(world):
    assert verdict_of(CLAIM, {**POINT, "world": world}) not in PAYS


def test_a_turned_schedule_caps_as_long_at_another_time():
    levels = ((0.0, 0), (100.0, 1), (150.0, 3), (200.0, 0))
    turned = room.turned(levels, 400.0, 250.0)
    assert turned == [(0.0, 1), (0.0, 3), (50.0, 0), (250.0, 0), (350.0, 1)]
    assert Replay(turned).level(10.0, 0.0, 0, 0) == 3


def test_the_deciding_points_are_named():
    (found,) = experiments_of("polca")
    assert {scale: point["world"] for scale, point in found.decides.items()} == dict.fromkeys(
        ("smoke", "small", "full"), room.OF_2023
    )
