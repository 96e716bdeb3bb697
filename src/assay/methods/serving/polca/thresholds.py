"""Thresholds for a recorded power trace: how far the draw rises before a cap can act."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from assay import checks
from assay.errors import InputError
from assay.methods.serving.polca.policy import Ladder, two_thresholds

TIMES = ("seconds", "timestamp", "time")
POWERS = ("watts", "power", "power_w")


@dataclass(frozen=True, eq=False)
class PowerTrace:
    """Watts at even times, `interval` seconds apart. A sensor that averages hides shorter peaks: keep the interval beside every figure."""

    watts: np.ndarray
    interval: float
    source: str = ""

    def __post_init__(self) -> None:
        checks.number("interval", self.interval, above=0)
        watts = np.asarray(self.watts, dtype=float)
        if watts.ndim != 1 or len(watts) < 2 or not (np.isfinite(watts) & (watts >= 0)).all():
            raise ValueError("watts must be two or more finite numbers of at least 0 in a row")
        object.__setattr__(self, "watts", watts)


def read_power_trace(
    path: Path | str, *, time: str | None = None, power: str | None = None, longest_gap: float = 5.0
) -> PowerTrace:
    """The power trace in a CSV file with a line of names: a column of times and one of watts, others are left alone.

    Times are seconds or ISO dates (`seconds`, `timestamp` or `time`, unless `time` names the column), ascending; watts are of the whole
    row (`watts`, `power` or `power_w`, unless `power` names it). The trace gets the median distance as its interval; where samples are
    missing, up to `longest_gap` intervals, the last one holds. Raises InputError with the file and the line for anything else.
    """
    file = Path(path).expanduser()
    checks.number("longest_gap", longest_gap, low=1)
    at: list[float] = []
    watts: list[float] = []
    lines: list[int] = []
    try:
        with file.open(encoding="utf-8-sig", newline="") as stream:
            for line, when, drawn in _rows(csv.DictReader(stream), file, time, power):
                if at and not when > at[-1]:
                    raise InputError(f"{file}, line {line}: times must ascend")
                at.append(when)
                watts.append(drawn)
                lines.append(line)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"cannot read {file}: {getattr(error, 'strerror', None) or error}") from None
    if len(at) < 2:
        raise InputError(f"{file} must have two samples at least")
    times = np.array(at) - at[0]
    interval = float(np.median(np.diff(times)))
    gaps = np.diff(times) > (longest_gap + 0.5) * interval
    if gaps.any():
        place = int(np.argmax(gaps))
        raise InputError(
            f"{file}, line {lines[place + 1]}: {times[place + 1] - times[place]:.6g} s without a sample, where {interval:.6g} s are "
            "usual; cut the file there, or allow a larger longest_gap"
        )
    even = np.arange(int(times[-1] / interval + 0.5) + 1) * interval
    held = np.searchsorted(times, even + interval / 2, side="right") - 1  # times jitter about the even ones
    return PowerTrace(np.array(watts)[np.clip(held, 0, len(watts) - 1)], interval, str(file))


def _rows(
    reader: csv.DictReader[str], file: Path, time: str | None, power: str | None
) -> Iterator[tuple[int, float, float]]:
    names = {(name or "").strip().lower(): name for name in reader.fieldnames or ()}
    columns = []
    for what, given, usual in (("time", time, TIMES), ("power", power, POWERS)):
        wanted = [given.strip().lower()] if given is not None else list(usual)
        found = next((names[name] for name in wanted if name in names), None)
        if found is None:
            raise InputError(
                f"{file} must have a column of {what} called {' or '.join(wanted)}; it has {', '.join(names)[:200] or 'none'}"
            )
        columns.append(found)
    for row in reader:
        try:
            yield reader.line_num, _moment(row[columns[0]]), checks.number("watts", float(row[columns[1]]), low=0)
        except (ValueError, TypeError, AttributeError, OverflowError) as error:
            raise InputError(f"{file}, line {reader.line_num}: {str(error)[:200]}") from None


def _moment(text: Any) -> float:
    try:
        return checks.number("time", float(text))
    except ValueError:
        found = datetime.fromisoformat(text.strip())
        return (found if found.tzinfo else found.replace(tzinfo=UTC)).timestamp()


@dataclass(frozen=True)
class Thresholds:
    """What `thresholds` found, all but seconds as shares of the budget. `sampling`: seconds between samples, which hide what is shorter."""

    t1: float
    t2: float
    peak: float
    largest_rise: float
    usual_rise: float
    delay: float
    sampling: float

    @property
    def headroom(self) -> float:
        """How much more could be drawn at the peak, as a share of it: 0.25 is a quarter more of such servers without any capping."""
        return 1 / self.peak - 1

    def policy(self) -> Ladder:
        """The paper's policy with these thresholds; its clocks are those of `two_thresholds`."""
        return two_thresholds(self.t1, self.t2)


def rises(trace: PowerTrace, delay: float) -> np.ndarray:
    """By how many watts the draw rises at most within `delay` seconds of each sample (0 where it only falls).

    Where the delay ends between two samples the later one counts too: nothing is known of what lies before it.
    """
    ahead = _samples(trace, delay)
    padded = np.concatenate([trace.watts, np.full(ahead, -np.inf)])
    highest = np.lib.stride_tricks.sliding_window_view(padded, ahead + 1).max(axis=1)
    return np.asarray(highest - trace.watts)


def thresholds(
    trace: PowerTrace, *, budget: float, delay: float = 40.0, scale: float = 1.0, usual: float = 0.99
) -> Thresholds:
    """The two thresholds for a row whose uncapped draw was recorded.

    T2 is 1 less the largest rise within `delay`, the time until a cap acts: from no sample at or below it does the draw pass the budget
    before a cap that is asked for there acts (`violations` is 0 on this trace by construction, and says nothing of another one). T1
    is lower by the `usual` quantile of the rises, so that the first cap mostly acts before T2 is reached (our choice).
    `scale` multiplies the draw: 1.3 for 30 % more servers, as if all rose together, which is the careful side.
    Raises ValueError where the draw rises so fast that no threshold above 0 is safe.

    >>> flat = PowerTrace(np.array([700.0, 720.0, 810.0, 800.0]), interval=40.0)
    >>> found = thresholds(flat, budget=1000.0)
    >>> round(found.t2, 3), found.peak
    (0.91, 0.81)
    """
    budget = checks.number("budget", budget, above=0)
    scale = checks.number("scale", scale, above=0) / budget
    usual = checks.number("usual", usual, low=0, high=1)
    found = rises(trace, delay) * scale
    largest, mostly = float(found.max()), float(np.quantile(found, usual))
    if not largest + mostly < 1:
        raise ValueError(
            f"no threshold is safe: within {delay:g} s the draw rises by {largest:.3g} of the budget, and mostly by {mostly:.3g}"
        )
    return Thresholds(
        1 - largest - mostly, 1 - largest, float(trace.watts.max()) * scale, largest, mostly, delay, trace.interval
    )


def violations(trace: PowerTrace, threshold: float, *, budget: float, delay: float = 40.0, scale: float = 1.0) -> int:
    """At how many samples at or below `threshold` (a share of the budget) the draw passes the budget within `delay` seconds."""
    drawn = trace.watts * checks.number("scale", scale, above=0) / checks.number("budget", budget, above=0)
    reached = drawn + rises(trace, delay) * scale / budget
    return int(((drawn <= checks.number("threshold", threshold)) & (reached > 1 + 1e-12)).sum())


def _samples(trace: PowerTrace, delay: float) -> int:
    """Samples until a delay is over: it ends at the last of them or before."""
    return math.ceil(checks.number("delay", delay, above=0) / trace.interval - 1e-9)
