"""Energy, where the hardware measures it: RAPL (processor packages and DRAM) and NVML (GPUs). Never estimated from power ratings.

    with EnergyMeter() as meter:
        work()
    meter.joules        # None: not available on this machine

The counters cover the whole package or board, so the figure includes idle power and any other work on the machine.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

POWERCAP = Path("/sys/class/powercap")


@dataclass(frozen=True)
class Counter:
    """One counter: `read` returns microjoules since some moment, wrapping to 0 after `range_uj` (0: it never wraps)."""

    name: str
    read: Callable[[], int]
    range_uj: int = 0


class EnergyMeter:
    """Joules by counter between entering and leaving, summed in `joules`; None if no counter can be read.

    `by_counter` names them: "package-0", "dram", "gpu 0: ...". `seconds` is the wall time. A RAPL counter wraps after about
    an hour at full power, so longer work must be metered in parts.
    """

    def __init__(self, counters: list[Counter] | None = None) -> None:
        self._counters = available_counters() if counters is None else counters
        self.by_counter: dict[str, float] = {}
        self.seconds = 0.0

    def __enter__(self) -> EnergyMeter:
        self._begin = [counter.read() for counter in self._counters]
        self._start = time.perf_counter()
        return self

    def __exit__(self, *exception: object) -> None:
        ends = [counter.read() for counter in self._counters]
        self.seconds = time.perf_counter() - self._start
        for counter, begin, end in zip(self._counters, self._begin, ends, strict=True):
            if end < begin:
                end += counter.range_uj
            self.by_counter[counter.name] = (end - begin) / 1e6

    @property
    def joules(self) -> float | None:
        """The sum over all counters; None if there are none."""
        return sum(self.by_counter.values()) if self.by_counter else None


def available_counters(powercap: Path = POWERCAP) -> list[Counter]:
    """The counters this process may read; empty in most virtual machines and, for RAPL, without permission to read them."""
    return [*_rapl(powercap), *_nvml()]


def why_not(powercap: Path = POWERCAP) -> str:
    """Why energy cannot be measured here, in one line that says what to do; "" if it can. Takes milliseconds."""
    if available_counters(powercap):
        return ""
    zones = list(powercap.glob("intel-rapl:*/energy_uj"))
    if zones:
        return f"energy counters are there, but not readable for this user: sudo chmod a+r {powercap}/intel-rapl:*/energy_uj"
    return "no energy counter here: neither RAPL (hidden in most virtual machines) nor an NVIDIA GPU that counts"


def _rapl(powercap: Path) -> list[Counter]:
    """Packages and their DRAM. A package already includes its cores and graphics, so those are not listed."""
    found = []
    for zone in sorted(powercap.glob("intel-rapl:*")):
        try:
            name = (zone / "name").read_text().strip()
            if not name.startswith(("package", "dram")):
                continue
            int((zone / "energy_uj").read_text())
            limit = int((zone / "max_energy_range_uj").read_text())
        except (OSError, ValueError):
            continue  # not readable for us: not available
        label = f"{name} of {zone.name.split(':')[1]}" if name.startswith("dram") else name
        found.append(Counter(label, lambda zone=zone: int((zone / "energy_uj").read_text()), limit))  # type: ignore[misc]
    return found


def _nvml() -> list[Counter]:
    """Every NVIDIA GPU whose driver has an energy counter (Volta and later)."""
    try:
        import pynvml
    except ImportError:
        return []
    found: list[Counter] = []
    with contextlib.suppress(pynvml.NVMLError):
        pynvml.nvmlInit()
        for index in range(pynvml.nvmlDeviceGetCount()):
            handle = pynvml.nvmlDeviceGetHandleByIndex(index)
            pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
            name = pynvml.nvmlDeviceGetName(handle)
            found.append(Counter(f"gpu {index}: {name}", _millijoules(pynvml, handle)))
    return found


def _millijoules(nvml: Any, handle: Any) -> Callable[[], int]:
    return lambda: nvml.nvmlDeviceGetTotalEnergyConsumption(handle) * 1000
