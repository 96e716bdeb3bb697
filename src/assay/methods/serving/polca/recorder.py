"""The draw of this machine over time, around anything that runs: from RAPL's and NVML's energy counters, where they are."""

from __future__ import annotations

import csv
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from assay import checks
from assay.errors import MissingError
from assay.measure.energy import Counter, available_counters, why_not
from assay.methods.serving.polca.thresholds import PowerTrace
from assay.paths import atomic_file


class PowerRecorder:
    """Watts by counter between entering and leaving, sampled every `interval` seconds in a thread.

        with PowerRecorder() as recorder:
            work()
        recorder.mean_watts          # None: this machine has no counter that may be read, and `missing` says why
        recorder.write("power.csv")  # `thresholds.read_power_trace` reads it

    A sample is the mean over its interval, as the counters count energy: peaks shorter than `interval` are hidden, and so are those that
    the device itself averages away (0.1 to 1 s). RAPL and NVML count the whole package and board, other work on them included.
    A counter that fails while recording ends it, and `stopped` says so; what was sampled before stays.
    """

    def __init__(self, counters: Sequence[Counter] | None = None, *, interval: float = 0.1) -> None:
        self.interval = checks.number("interval", interval, low=0.001)
        self._counters = available_counters() if counters is None else list(counters)
        self.missing = "" if self._counters else why_not() or "no counter was given"
        self.stopped = ""
        self.seconds: list[float] = []
        """Times of the readings since entering; the first is 0."""
        self.joules: dict[str, list[float]] = {}
        """By counter: joules since entering, at each of them."""
        self._over = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> PowerRecorder:
        self.stopped = ""
        self.seconds, self.joules = [], {counter.name: [] for counter in self._counters}
        self._over.clear()
        if self._counters:
            self._start = time.perf_counter()
            self._last = [0] * len(self._counters)
            self._read()
            self._thread = threading.Thread(target=self._sample, name="power recorder", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._over.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
            if not self.stopped:
                self._read()

    def _sample(self) -> None:
        due = self._start + self.interval
        while not self._over.wait(max(due - time.perf_counter(), 0.0)):
            self._read()
            if self.stopped:
                return
            due = max(due + self.interval, time.perf_counter())

    def _read(self) -> None:
        try:
            found = [counter.read() for counter in self._counters]
        except Exception as error:  # whatever a driver raises must not end the work that is recorded
            self.stopped = f"a counter failed after {time.perf_counter() - self._start:.3g} s: {error}"
            return
        now = time.perf_counter()
        if not self.seconds:
            self._start = now
        for place, (counter, value) in enumerate(zip(self._counters, found, strict=True)):
            known = self.joules[counter.name]
            passed = value - self._last[place]
            if passed < 0:
                passed += counter.range_uj
            known.append(known[-1] + passed / 1e6 if known else 0.0)
            self._last[place] = value
        self.seconds.append(now - self._start)

    @property
    def mean_watts(self) -> float | None:
        """Of all counters together; None where nothing could be read."""
        if len(self.seconds) < 2:
            return None
        return sum(values[-1] for values in self.joules.values()) / self.seconds[-1]

    def trace(self) -> PowerTrace:
        """All counters together at even times, `interval` apart; energy between readings is spread evenly.

        Raises MissingError where nothing was recorded, and ValueError where it was shorter than two intervals.
        """
        if len(self.seconds) < 2:
            raise MissingError(self.missing or self.stopped or "nothing was recorded")
        edges = np.arange(int(self.seconds[-1] / self.interval + 1e-9) + 1) * self.interval
        if len(edges) < 3:
            raise ValueError(
                f"a trace must be at least two intervals of {self.interval:g} s long, got {self.seconds[-1]:.3g} s"
            )
        total = np.sum([np.interp(edges, self.seconds, values) for values in self.joules.values()], axis=0)
        return PowerTrace(np.diff(total) / self.interval, self.interval, ", ".join(self.joules))

    def write(self, path: Path | str) -> None:
        """A CSV file with `seconds` (of each interval's end), `watts` and each counter's watts. Raises MissingError as `trace` does.

        The last interval ends with the work, not after `interval`: where it has not even half of that it is left out.
        """
        if len(self.seconds) < 2:
            raise MissingError(self.missing or self.stopped or "nothing was recorded")
        gaps = np.maximum(np.diff(self.seconds), 1e-9)
        if len(gaps) > 1 and gaps[-1] < self.interval / 2:  # counters step: a few microseconds draw 0 W, or 100 kW
            gaps = gaps[:-1]
        watts = {name: np.diff(values)[: len(gaps)] / gaps for name, values in self.joules.items()}
        with atomic_file(Path(path)) as temporary, temporary.open("w", encoding="utf-8", newline="") as stream:
            writer = csv.writer(stream)
            writer.writerow(["seconds", "watts", *watts])
            for place, at in enumerate(self.seconds[1 : len(gaps) + 1]):
                drawn = [float(values[place]) for values in watts.values()]
                writer.writerow([f"{at:.6f}", f"{sum(drawn):.6g}", *(f"{one:.6g}" for one in drawn)])
