"""The machine's fingerprint and its calibration: stable, cached, attainable."""

from __future__ import annotations

import dataclasses
import json
import threading
import time

import pytest
import torch
from tests.tiny import calibration

from assay.measure import machine as module
from assay.measure.machine import calibrate, machine

RATES = {"float32": 1e11, "bfloat16": 4e11}
KNOWN = calibration(
    cache_bandwidth={1000: 5e11, 10_000: 6e11, 100_000: 1e11, 10**8: 4e10},
    fingerprint="abc",
)


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ASSAY_CACHE_DIR", str(tmp_path))
    return tmp_path


def test_machine_says_what_it_is():
    here = machine()
    assert here.cores >= 1
    assert here.threads == torch.get_num_threads()
    assert here.ram_bytes > 2**28
    assert here.cpu
    assert here.versions["torch"] == torch.__version__
    assert json.loads(json.dumps(here.as_dict()))["fingerprint"] == here.fingerprint


def test_fingerprint_is_the_hardware_alone(monkeypatch):
    before = machine().fingerprint
    monkeypatch.setattr(module, "_versions", lambda: {"torch": "9"})
    monkeypatch.setattr(module.platform, "release", lambda: "another kernel")
    monkeypatch.setattr(module, "load_average", lambda: 7.0)
    assert machine().fingerprint == before
    monkeypatch.setattr(module, "_cpu", lambda: ("another processor", []))
    other = machine().fingerprint
    assert other != before
    monkeypatch.setattr(module, "_gpu", lambda: "1 x a GPU")
    assert machine().fingerprint not in (before, other)


def test_simd_flags_are_read(monkeypatch):
    text = "model name\t: Some CPU\nflags\t\t: fpu avx2 avx512f amx_int8 fma hypervisor smep"
    monkeypatch.setattr(module, "_read", lambda path: text)
    assert module._cpu() == ("Some CPU", ["amx_int8", "avx2", "avx512f", "fma"])
    assert module._virtual()


def test_calibration_is_kept_and_attainable(own_cache, monkeypatch):
    monkeypatch.setattr(module.OthersWatch, "stop", lambda self: (0.0, False))
    first = calibrate(quick=True, device="cpu")
    assert set(first.peak_flops) >= {"float32", "bfloat16", "int8", "float64"}
    assert all(rate > 1e8 for rate in first.peak_flops.values())
    assert first.read_bandwidth > 1e8
    assert first.copy_bandwidth > 1e8
    file = next((own_cache / "calibration").glob("*.json"))
    file.write_text(json.dumps(dataclasses.replace(first, noisy=False).as_dict()))
    start = time.perf_counter()
    assert calibrate(device="cpu") == dataclasses.replace(first, noisy=False)
    assert time.perf_counter() - start < 1
    assert first.threads == torch.get_num_threads()


def test_measuring_again_keeps_the_better_figure(own_cache, monkeypatch):
    other = {"float32": 5e10, "bfloat16": 9e11}
    figures = iter([KNOWN, dataclasses.replace(KNOWN, peak_flops=other)])
    monkeypatch.setattr(module, "_measure", lambda *a, **k: next(figures))
    calibrate(device="cpu")
    again = calibrate(force=True, device="cpu")
    assert again.peak_flops == {"float32": 1e11, "bfloat16": 9e11}
    assert calibrate(device="cpu") == again


@pytest.mark.parametrize("first_noisy", [True, False])
def test_figures_of_an_idle_machine_are_not_mixed_with_noisy_ones(own_cache, monkeypatch, first_noisy):
    quiet = dataclasses.replace(KNOWN, peak_flops={"float32": 5e10})
    noisy = dataclasses.replace(KNOWN, noisy=True)
    figures = iter([noisy, quiet] if first_noisy else [quiet, noisy])
    monkeypatch.setattr(module, "_measure", lambda *a, **k: next(figures))
    calibrate(device="cpu")
    assert calibrate(force=True, device="cpu") == quiet


@pytest.mark.parametrize("busy", [[False], [True, False], [True, True, False], [True, True, True]])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_busy_machine_is_calibrated_up_to_three_times(monkeypatch, busy, device):
    """The first quiet try counts, and it alone; without one the best of all is kept and marked."""
    taken, told = [], []

    def rates(here, device, rounds, clock, say):
        taken.append(torch.get_num_threads())
        return dataclasses.replace(KNOWN, peak_flops={"float32": {1: 3e11, 2: 2e11, 3: 1e11, 4: 1e9}[len(taken)]})

    answers = iter(busy)
    monkeypatch.setattr(module, "_rates", rates)
    monkeypatch.setattr(module.OthersWatch, "stop", lambda self: (0.5, next(answers)))
    found = module._measure(machine(), device, 1, told.append)
    assert found.noisy is all(busy)
    assert len(taken) == len(busy) + (all(busy) and device == "cpu")
    assert found.peak_flops["float32"] == (3e11 if all(busy) else {1: 3e11, 2: 2e11, 3: 1e11}[len(busy)])
    again = [f"the machine is busy: calibrating again, try {n} of 3" for n in range(2, len(busy) + 1)]
    alone = ["the machine stays busy: calibrating once more, on one thread"] if all(busy) and device == "cpu" else []
    assert told == again + alone


def test_a_machine_that_stays_busy_leaves_no_good_figures_behind(own_cache, monkeypatch):
    """They are stored as noisy, and the next calibration on a quiet machine takes their place."""
    busy = True
    monkeypatch.setattr(module, "_rates", lambda *a: KNOWN)
    monkeypatch.setattr(module.OthersWatch, "stop", lambda self: (0.5, busy))
    monkeypatch.setattr(module, "load_average", lambda: 0.0)
    assert calibrate(device="cpu").noisy
    (file,) = (own_cache / "calibration").glob("*.json")
    assert json.loads(file.read_text())["noisy"] is True
    busy = False
    assert not calibrate(device="cpu").noisy
    assert json.loads(file.read_text())["noisy"] is False


def test_busy_machine_is_judged_by_one_thread(monkeypatch):
    threads = torch.get_num_threads()
    blocks = {module.CACHE_SIZES[0]: 1e11, 1 << 30: 5e10}
    one = dataclasses.replace(KNOWN, peak_flops={"float32": 9e10}, cache_bandwidth=blocks, read_bandwidth=5e10)
    all_threads = dataclasses.replace(KNOWN, cache_bandwidth=dict.fromkeys(blocks, 1e9))
    seen = []

    def rates(here, device, rounds, clock, say):
        seen.append(torch.get_num_threads())
        return all_threads if len(seen) <= 3 else one

    here = dataclasses.replace(machine(), threads=threads)
    monkeypatch.setattr(module, "_rates", rates)
    monkeypatch.setattr(module.OthersWatch, "stop", lambda self: (0.9, True))
    found = module._measure(here, "cpu", 1)
    assert seen == [threads] * 3 + [1]
    assert torch.get_num_threads() == threads
    assert found.noisy
    assert found.peak_flops["float32"] == max(1e11, threads * 9e10)
    assert found.read_bandwidth == 5e10
    assert found.cache_bandwidth == {module.CACHE_SIZES[0]: threads * 1e11, 1 << 30: 5e10}


@pytest.mark.parametrize(("load", "measures"), [(50.0, 1), (0.0, 2)])
def test_noisy_figures_are_taken_again_when_the_machine_is_idle(own_cache, monkeypatch, load, measures):
    taken = []
    monkeypatch.setattr(module, "load_average", lambda: load)
    monkeypatch.setattr(
        module, "_measure", lambda *a, **k: taken.append(1) or dataclasses.replace(KNOWN, noisy=len(taken) == 1)
    )
    calibrate(device="cpu")
    calibrate(device="cpu")
    calibrate(device="cpu")
    assert len(taken) == measures


def test_another_thread_count_is_another_calibration(own_cache, monkeypatch):
    taken = []
    monkeypatch.setattr(module, "_measure", lambda *a, **k: taken.append(1) or KNOWN)
    threads = torch.get_num_threads()
    try:
        calibrate(device="cpu")
        torch.set_num_threads(threads + 1)
        calibrate(device="cpu")
    finally:
        torch.set_num_threads(threads)
    assert len(taken) == 2


WRONG = {
    "peak_flops": [{}, [], {"float32": "fast"}, {"float32": float("nan")}, {"float32": -1}, {"float32": True}],
    "matmul_flops": [None, {"float32": 0}],
    "read_bandwidth": ["x", 0, float("inf"), None],
    "cache_bandwidth": [{"x": 1.0}, {"1": "y"}],
}


@pytest.mark.parametrize(
    "damage",
    ["", "{", "[]", '{"peak_flops": {}}', "[" * 10_000]
    + [json.dumps(KNOWN.as_dict() | {name: value}) for name, values in WRONG.items() for value in values],
)
def test_damaged_file_is_measured_again(own_cache, monkeypatch, damage):
    other = dataclasses.replace(KNOWN, noisy=True)  # what is not measured again is seen by this
    monkeypatch.setattr(module, "_measure", lambda *a, **k: other)
    calibrate(device="cpu")
    monkeypatch.setattr(module, "_measure", lambda *a, **k: KNOWN)
    file = next((own_cache / "calibration").glob("*.json"))
    file.write_text(damage)
    assert calibrate(device="cpu") == KNOWN
    assert json.loads(file.read_text())["fingerprint"] == "abc"


@pytest.mark.parametrize(
    ("working_set", "rate"),
    [
        (1, 6e11),
        (1000, 6e11),
        (9999, 6e11),
        (10_000, 6e11),
        (50_000, 6e11),
        (200_000, 1e11),
        (10**8, 4e10),
        (10**12, 4e10),
    ],
)
def test_bandwidth_never_rises_with_the_working_set(working_set, rate):
    assert KNOWN.bandwidth(working_set) == rate


def test_ridge_is_operations_per_byte():
    assert KNOWN.ridge("float32") == pytest.approx(1e11 / 4e10)


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="device"):
        calibrate(device="tpu")
    with pytest.raises(ValueError, match="dtype must be one of float32, bfloat16, got 'int3'"):
        KNOWN.peak("int3")


def test_a_calibration_says_what_it_does(own_cache, monkeypatch):
    told = []
    monkeypatch.setattr(module, "_products", lambda device: [("float32", 1, int)])
    monkeypatch.setattr(module, "_convolutions", lambda device: [])
    monkeypatch.setattr(module.OthersWatch, "stop", lambda self: (0.9, True))
    calibrate(quick=True, device="cpu", say=told.append)
    rounds = [f"calibrating the machine: round {n} of 2" for n in (1, 2)]
    again = [f"the machine is busy: calibrating again, try {n} of 3" for n in (2, 3)]
    alone = "the machine stays busy: calibrating once more, on one thread"
    assert told == [*rounds, again[0], *rounds, again[1], *rounds, alone, *rounds]
    monkeypatch.setattr(module, "load_average", lambda: 50.0)  # still busy: the figures stand
    told.clear()
    calibrate(device="cpu", say=told.append)
    assert told == []


def test_two_processes_do_not_calibrate_at_once(own_cache, monkeypatch):
    """The second says that it waits, and takes what the first has found."""
    started, told, results = threading.Event(), [], []

    def slow(*_, **__):
        started.set()
        time.sleep(1)
        return KNOWN

    monkeypatch.setattr(module, "_measure", slow)
    first = threading.Thread(target=lambda: results.append(calibrate(device="cpu")))
    first.start()
    assert started.wait(20)
    monkeypatch.setattr(module, "_measure", lambda *a, **k: pytest.fail("measured a second time"))
    assert calibrate(device="cpu", say=told.append) == KNOWN
    first.join()
    assert results == [KNOWN]
    assert told == ["another process is calibrating this machine: waiting for it"]


@pytest.mark.gpu
def test_cuda_calibration(own_cache):
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    found = calibrate(quick=True)
    assert found.device == "cuda"
    assert found.peak_flops["bfloat16"] > found.peak_flops["float64"]
    assert found.bandwidth(1) == found.memory_bandwidth


def test_products_that_a_processor_takes_long_for_are_not_tried():
    """A processor without instructions for a type would calibrate for minutes."""
    from assay.measure.machine import SHAPES, SLOW_SHAPES, _short_enough

    assert list(_short_enough(SHAPES, 1e12)) == list(SHAPES)
    assert list(_short_enough(SHAPES, 2.2e9)) == [(1024, 1024, 1024), (512, 2048, 512)]
    assert _short_enough(SHAPES, 1e8) == SLOW_SHAPES
