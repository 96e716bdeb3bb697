"""For an operator: thresholds from a recorded trace, a recorder of this machine's draw, and what its phases are like."""

from __future__ import annotations

import itertools
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from tests.tiny import tiny_model

from assay.errors import InputError, MissingError
from assay.measure.energy import Counter
from assay.methods.serving.polca import (
    MeasuredPhases,
    PowerRecorder,
    PowerTrace,
    RowSpec,
    ServerSpec,
    Workload,
    calibrated_spec,
    measure_phases,
    no_capping,
    read_power_trace,
    rises,
    simulate_row,
    synthetic,
    thresholds,
    two_thresholds,
    violations,
)


def walk(seed, n=2000):
    chance = np.random.default_rng(seed)
    return PowerTrace(50_000 + 5_000 * np.sin(np.arange(n) / 200) + np.cumsum(chance.normal(0, 50, n)) % 3000, 2.0)


@pytest.mark.parametrize("seed", range(3))
def test_no_sample_below_the_second_threshold_passes_the_budget_before_a_cap_can_act(seed):
    trace = walk(seed)
    found = thresholds(trace, budget=60_000, delay=40, scale=1.1)
    assert 0 < found.t1 < found.t2 < 1
    assert violations(trace, found.t2, budget=60_000, delay=40, scale=1.1) == 0
    assert violations(trace, found.t1, budget=60_000, delay=40, scale=1.1) == 0
    # and it is the largest one that a rise of this size leaves
    risen = trace.watts * 1.1 / 60_000
    worst = int(np.argmax(rises(trace, 40)))
    moved = PowerTrace(trace.watts + (found.t2 + 0.002 - risen[worst]) * 60_000 / 1.1, 2.0)
    assert violations(moved, found.t2 + 0.003, budget=60_000, delay=40, scale=1.1) > 0
    assert found.policy() == two_thresholds(found.t1, found.t2)


def test_rises_by_hand():
    trace = PowerTrace(np.array([5.0, 1.0, 2.0, 9.0, 3.0, 4.0]), 10.0)
    assert rises(trace, 20).tolist() == [0.0, 8.0, 7.0, 0.0, 1.0, 0.0]
    assert rises(trace, 10).tolist() == [0.0, 1.0, 7.0, 0.0, 1.0, 0.0]
    assert rises(trace, 11).tolist() == rises(trace, 20).tolist()  # it ends between two samples: the later one counts
    found = thresholds(trace, budget=100, delay=20)
    assert found.t2 == pytest.approx(0.92)
    assert found.headroom == pytest.approx(100 / 9 - 1)
    assert found.sampling == 10.0
    with pytest.raises(ValueError, match="no threshold is safe"):
        thresholds(trace, budget=8, delay=20)
    for wrong in ({"budget": 0}, {"budget": 1e9, "delay": float("nan")}, {"budget": 1e9, "usual": 2}):
        with pytest.raises(ValueError, match="must be"):
            thresholds(trace, **wrong)
    with pytest.raises(ValueError, match="finite numbers"):
        PowerTrace(np.array([1.0, np.nan]), 1.0)


def test_a_trace_coarser_than_the_delay_still_shows_how_far_the_draw_rises():
    trace = PowerTrace(np.array([5.0, 1.0, 2.0, 9.0, 3.0, 4.0]), 60.0)
    found = thresholds(trace, budget=100)
    assert found.t2 == pytest.approx(0.93)
    assert found.t1 < found.t2
    assert violations(trace, found.t2, budget=100) == 0
    assert violations(trace, 1.0, budget=8) == 1


def test_thresholds_of_an_uncapped_row_keep_its_capped_twin_from_the_brake():
    """The use the calculator is for: record the row as it is, and let it cap itself with what the record says."""
    row = RowSpec(base=16, added=4, brake_mhz=None)
    requests = synthetic(Workload(seconds=600, day=600), row, seed=4).requests
    uncapped = simulate_row(requests, row, no_capping())
    budget = 0.98 * float(uncapped.watts.max())
    found = thresholds(PowerTrace(uncapped.watts, 2.0), budget=budget)
    braking = replace(row, budget_watts=budget, brake_mhz=288.0)
    assert simulate_row(requests, braking, no_capping()).brakes > 0
    capped = simulate_row(requests, braking, found.policy())
    assert capped.brakes == 0
    assert capped.seconds_above == 0
    assert capped.actions


def test_a_csv_is_read(tmp_path):
    file = tmp_path / "row.csv"
    rows = ["00,100", "02,110", "08.1,130", "10,90", "12,95"]
    file.write_text("Timestamp, Watts ,rack\n" + "".join(f"2026-01-01T00:00:{row},a\n" for row in rows))
    found = read_power_trace(file)
    assert found.interval == pytest.approx(2.0)
    assert found.watts.tolist() == [100, 110, 110, 110, 130, 90, 95]  # what is missing holds
    assert found.source == str(file)
    file.write_text("when,kw\n0,1\n60,2\n120,3\n")
    assert read_power_trace(file, time="when", power="kw").watts.tolist() == [1, 2, 3]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a,b\n1,2\n", "must have a column of time called seconds or timestamp or time; it has a, b"),
        ("seconds,b\n1,2\n", "must have a column of power called watts or power or power_w"),
        ("seconds,watts\n1,2\n", "two samples"),
        ("", "must have a column"),
        ("seconds,watts\n1,2\n1,3\n", "line 3: times must ascend"),
        ("seconds,watts\n1,2\n2,nan\n", "line 3: watts must be a finite number"),
        ("seconds,watts\n1,2\n2,-4\n", "line 3: watts must be"),
        ("seconds,watts\n1,2\nsoon,4\n", "line 3"),
        ("seconds,watts\n1,2\n2\n", "line 3"),
        ("seconds,watts\n1,2\n2,3\n3,4\n30,5\n", "line 5: 27 s without a sample, where 1 s are usual"),
    ],
)
def test_a_wrong_csv_is_refused_with_its_line(tmp_path, text, message):
    file = tmp_path / "row.csv"
    file.write_text(text)
    with pytest.raises(InputError, match=message) as caught:
        read_power_trace(file)
    assert str(file) in str(caught.value)
    with pytest.raises(InputError, match="cannot read"):
        read_power_trace(tmp_path / "none.csv")


def counter(watts, name="package-0", range_uj=0, clock=time.perf_counter):
    """A counter that counts `watts`."""
    begin = clock()
    return Counter(name, lambda: int(watts * (clock() - begin) * 1e6) % (range_uj or 1 << 62), range_uj)


class Clock:
    """A clock that moves by 10 ms when it is told to."""

    now = 0.0

    def perf_counter(self):
        return self.now

    def tick(self):
        self.now += 0.01
        return self.now


def recorded_until(recorder, readings):
    """Let the recorder's thread read so often."""
    begin = time.perf_counter()
    while len(recorder.seconds) < readings and not recorder.stopped and time.perf_counter() - begin < 20:
        time.sleep(0.002)


def test_the_recorder_records_and_its_file_is_read_again(tmp_path, monkeypatch):
    clock = Clock()
    monkeypatch.setattr("assay.methods.serving.polca.recorder.time", clock)
    first = counter(40, clock=clock.tick)  # time passes at each of its readings
    wrapping = counter(10, "gpu 0", range_uj=200_000, clock=clock.perf_counter)
    with PowerRecorder([first, wrapping], interval=0.01) as recorder:
        recorded_until(recorder, 30)
    assert recorder.missing == recorder.stopped == ""
    assert recorder.mean_watts == pytest.approx(50, rel=1e-3)
    trace = recorder.trace()
    assert trace.interval == 0.01
    assert len(trace.watts) >= 28
    assert trace.watts == pytest.approx(np.full(len(trace.watts), 50.0), rel=1e-3)
    recorder.write(tmp_path / "power.csv")
    again = read_power_trace(tmp_path / "power.csv")
    assert again.interval == pytest.approx(0.01)
    assert again.watts == pytest.approx(np.full(len(again.watts), 50.0), rel=1e-3)
    assert (tmp_path / "power.csv").read_text().startswith("seconds,watts,package-0,gpu 0")
    with recorder:  # once more, from the beginning
        recorded_until(recorder, 3)
    assert recorder.seconds[0] == 0
    assert recorder.seconds[-1] < 0.2


def test_what_is_left_of_the_last_interval_is_no_sample(tmp_path):
    """Leaving the block reads once more, some microseconds after the thread did."""
    recorder = PowerRecorder([counter(1)], interval=0.1)
    recorder.seconds, recorder.joules = [0.0, 0.1, 0.2, 0.20001], {"gpu": [0.0, 4.0, 8.0, 9.0]}
    recorder.write(tmp_path / "power.csv")
    assert read_power_trace(tmp_path / "power.csv").watts.tolist() == [40.0, 40.0]
    recorder.seconds[-1] = 0.28  # most of an interval is one
    recorder.write(tmp_path / "power.csv")
    assert (tmp_path / "power.csv").read_text().splitlines()[-1] == "0.280000,12.5,12.5"


def test_a_machine_without_counters_runs_the_work_and_says_why(monkeypatch, tmp_path):
    monkeypatch.setattr("assay.methods.serving.polca.recorder.available_counters", list)
    monkeypatch.setattr("assay.methods.serving.polca.recorder.why_not", lambda: "no energy counter here")
    done = []
    with PowerRecorder() as recorder:
        done.append(1)
    assert done == [1]
    assert recorder.mean_watts is None
    assert recorder.missing == "no energy counter here"
    for ask in (recorder.trace, lambda: recorder.write(tmp_path / "x.csv")):
        with pytest.raises(MissingError, match="no energy counter here"):
            ask()
    assert not (tmp_path / "x.csv").exists()


def test_a_counter_that_fails_ends_the_recording_and_not_the_work():
    readings = itertools.chain([0, 1_000_000, 2_000_000], iter(()))
    with PowerRecorder([Counter("gpu", lambda: next(readings))], interval=0.01) as recorder:
        recorded_until(recorder, 9)
    assert recorder.stopped.startswith("a counter failed after")
    assert recorder.joules["gpu"] == [0.0, 1.0, 2.0]
    assert recorder.mean_watts is not None
    with pytest.raises(ValueError, match="work's own"), PowerRecorder([counter(1)]):
        raise ValueError("work's own")
    with pytest.raises(ValueError, match="interval"):
        PowerRecorder(interval=0)


def test_phases_of_a_model_are_measured_and_threads_are_as_before(monkeypatch):
    asked = []
    monkeypatch.setattr(torch, "set_num_threads", asked.append)  # two threads on a busy machine wait for each other
    found = measure_phases(tiny_model(), threads=(2, 1, 2), prompt_tokens=12, new_tokens=2, rounds=2, counters=[])
    assert asked == [2, 1, 1, 2, 2, 1, torch.get_num_threads()]
    assert found.threads == (1, 2)
    assert found.clocks == (0.5, 1.0)
    assert min(*found.prompt_seconds, *found.token_seconds) > 0
    assert 0 <= found.prompt_beta <= 1
    assert found.idle_watts is None
    metered = measure_phases(tiny_model(), prompt_tokens=12, new_tokens=2, rounds=1, counters=[counter(30)])
    assert metered.prompt_watts > 0
    assert metered.idle_watts == pytest.approx(30, rel=0.2)


def test_phases_ask_for_two_numbers_of_threads():
    with pytest.raises(ValueError, match="two different numbers"):
        measure_phases(tiny_model(), threads=(2, 2))


def test_what_was_measured_takes_the_place_of_what_was_assumed():
    spec = ServerSpec()
    found = MeasuredPhases((1, 2), (2.0, 1.0), (1.2, 1.0))
    assert (found.prompt_beta, found.token_beta) == pytest.approx((1.0, 0.2))
    timed = calibrated_spec(found, spec)
    assert (timed.prompt.beta, timed.token.beta) == pytest.approx((1.0, 0.2))
    assert timed.provisioned == spec.provisioned
    metered = calibrated_spec(replace(found, idle_watts=20.0, prompt_watts=60.0, token_watts=45.0), spec)
    assert (metered.idle, metered.provisioned) == (20.0, 60.0)
    assert metered.watts("token", 5) == 45.0
    with pytest.raises(ValueError, match="idle_watts"):
        calibrated_spec(replace(found, idle_watts=70.0, prompt_watts=60.0, token_watts=45.0), spec)
