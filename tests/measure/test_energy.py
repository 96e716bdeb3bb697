"""Energy counters: read where they are, `None` where they are not, never guessed."""

from __future__ import annotations

import sys
import types

import pytest

from assay.measure import energy
from assay.measure.energy import Counter, EnergyMeter, available_counters, why_not


@pytest.fixture
def powercap(tmp_path):
    """Two packages, one with DRAM and cores below it, as the kernel lays them out."""
    for zone, name, microjoules in [
        ("intel-rapl:0", "package-0", 1_000_000),
        ("intel-rapl:0:0", "core", 5),
        ("intel-rapl:0:1", "dram", 500_000),
        ("intel-rapl:1", "package-1", 900),
    ]:
        folder = tmp_path / zone
        folder.mkdir()
        (folder / "name").write_text(f"{name}\n")
        (folder / "energy_uj").write_text(f"{microjoules}\n")
        (folder / "max_energy_range_uj").write_text("2000000\n")
    return tmp_path


def test_packages_and_dram_are_added_and_cores_are_not_counted_twice(powercap):
    meter = EnergyMeter(available_counters(powercap))
    with meter:
        (powercap / "intel-rapl:0/energy_uj").write_text("1500000")
        (powercap / "intel-rapl:0:0/energy_uj").write_text("400000")
        (powercap / "intel-rapl:0:1/energy_uj").write_text("750000")
    rapl = {name: joules for name, joules in meter.by_counter.items() if not name.startswith("gpu")}
    assert rapl == {"package-0": 0.5, "dram of 0": 0.25, "package-1": 0.0}
    assert meter.seconds > 0


def test_counter_that_wraps(powercap):
    counters = [c for c in available_counters(powercap) if c.name == "package-0"]
    with EnergyMeter(counters) as meter:
        (powercap / "intel-rapl:0/energy_uj").write_text("250000")
    assert meter.joules == pytest.approx(1.25)  # 2 J range: 1 J to the end, 0.25 J after it


def test_no_counter_is_none_not_zero(tmp_path):
    with EnergyMeter([]) as meter:
        pass
    assert meter.joules is None
    assert [c for c in available_counters(tmp_path) if not c.name.startswith("gpu")] == []


def test_unreadable_counter_is_not_available(powercap):
    (powercap / "intel-rapl:0/energy_uj").unlink()
    (powercap / "intel-rapl:1/max_energy_range_uj").write_text("what")
    assert [c.name for c in available_counters(powercap) if not c.name.startswith("gpu")] == ["dram of 0"]


def test_real_work_on_this_machine_is_none_or_positive():
    with EnergyMeter() as meter:
        sum(range(3_000_000))
    assert meter.joules is None or meter.joules >= 0


def fake_nvml(fails=False):
    class NVMLError(Exception):
        pass

    energy = iter(range(1000, 10_000, 250))  # millijoules

    def total(handle):
        if fails:
            raise NVMLError
        return next(energy)

    return types.SimpleNamespace(
        NVMLError=NVMLError,
        nvmlInit=lambda: None,
        nvmlDeviceGetCount=lambda: 1,
        nvmlDeviceGetHandleByIndex=lambda index: index,
        nvmlDeviceGetName=lambda handle: "Some GPU",
        nvmlDeviceGetTotalEnergyConsumption=total,
    )


def test_gpu_energy(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "pynvml", fake_nvml())
    with EnergyMeter(available_counters(tmp_path)) as meter:
        pass
    assert meter.by_counter == {"gpu 0: Some GPU": pytest.approx(0.25)}


def test_gpu_without_counter(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "pynvml", fake_nvml(fails=True))
    assert available_counters(tmp_path) == []


def test_own_counters():
    ticks = iter([10, 2_000_010])
    with EnergyMeter([Counter("meter", lambda: next(ticks))]) as meter:
        pass
    assert meter.joules == 2.0


def test_why_there_is_no_counter_and_what_to_do(powercap, tmp_path, monkeypatch):
    monkeypatch.setattr(energy, "_nvml", list)
    assert why_not(powercap) == ""
    for file in powercap.glob("*/energy_uj"):
        file.write_text("not for you")
    assert "not readable for this user: sudo chmod a+r" in why_not(powercap)
    assert "no energy counter here" in why_not(tmp_path / "nothing")
    monkeypatch.setattr(energy, "_nvml", lambda: [Counter("gpu 0: a GPU", lambda: 1)])
    assert why_not(tmp_path / "nothing") == ""
