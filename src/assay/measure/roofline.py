"""How fast a network could be and how far off it is: efficiency, each layer's roofline, and the network's waterline.

The measuring part of "On the Efficiency of Convolutional Neural Networks" (Lavin, 2024): a layer's latency is its operations
divided by peak rate and computational efficiency, e = t* / t, and e is bounded by operational intensity over the device's
ridge. 1 MAC = 2 operations, everywhere. Bytes are counted once per tensor and operator, so the bound is that of main memory (a
"DRAM roofline"), and data that stays in a cache can beat it. `lower_bound` takes the caches into account and cannot be beaten.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from assay import checks
from assay.measure.machine import Calibration


def _positive(name: str, value: float) -> float:
    if not value > 0:
        raise ValueError(f"{name} must be positive, got {value}")
    return value


@dataclass(frozen=True)
class DeviceSpec:
    """What a device offers to one kind of kernel.

    `peak`: operations per second, the dense rate of the dtype and accumulation used. `bandwidth`: bytes per second of main memory.
    `sram_bytes`: on-chip memory in which one worker (core, SM) can hold a tile.

    >>> device = DeviceSpec("accelerator", peak=1e12, bandwidth=1e11)
    >>> device.ridge, attainable_efficiency(2.5, device.ridge)  # 2.5 operations per byte are a quarter of the ridge
    (10.0, 0.25)
    """

    name: str
    peak: float
    bandwidth: float
    sram_bytes: int = 0

    def __post_init__(self) -> None:
        for field in ("peak", "bandwidth"):
            _positive(field, getattr(self, field))
        if self.sram_bytes < 0:
            raise ValueError(f"sram_bytes must be at least 0, got {self.sram_bytes}")

    @property
    def ridge(self) -> float:
        """Operations per byte above which arithmetic is the limit."""
        return self.peak / self.bandwidth


H100_SXM_BF16 = DeviceSpec("NVIDIA H100 SXM, bfloat16 dense (data sheet)", 989e12, 3.35e12, 227 << 10)


def device_of(calibration: Calibration, dtype: str, *, sram_bytes: int = 0) -> DeviceSpec:
    """The calibrated machine as a device for kernels of `dtype`. Raises ValueError for a dtype without a calibrated peak."""
    name = f"{calibration.device} {calibration.fingerprint}, {dtype}"
    return DeviceSpec(name, calibration.peak(dtype), calibration.memory_bandwidth, sram_bytes)


def ideal_seconds(operations: float, peak: float) -> float:
    """t*: the time of `operations` at the peak rate."""
    return operations / _positive("peak", peak)


def efficiency(operations: float, seconds: float, peak: float) -> float:
    """Computational efficiency e = t* / t: the share of the peak rate that was reached."""
    return ideal_seconds(operations, peak) / _positive("seconds", seconds)


def efficiency_gap(operations: float, seconds: float, peak: float) -> float:
    """t / t* = 1 / e: how many times longer than at the peak rate. Infinite for work without operations."""
    ideal = ideal_seconds(operations, peak)
    return seconds / ideal if ideal > 0 else float("inf")


def network_efficiency(operations: Sequence[float], seconds: Sequence[float], peak: float) -> float:
    """e of a whole network, sum of operations / (peak * sum of times): the harmonic mean of the layers', weighted by operations.

    Raises ValueError if the two do not pair up or no time was spent.
    """
    if len(operations) != len(seconds):
        raise ValueError(f"operations and seconds must pair up, got {len(operations)} and {len(seconds)}")
    return efficiency(sum(operations), sum(seconds), peak)


def intensity(operations: float, bytes_moved: float) -> float:
    """Operational intensity: operations per byte moved; infinite if nothing is moved."""
    return operations / bytes_moved if bytes_moved > 0 else float("inf")


def attainable_efficiency(operational_intensity: float, ridge: float) -> float:
    """The roofline: min(1, I / r)."""
    return min(1.0, operational_intensity / _positive("ridge", ridge))


def attainable_seconds(operations: float, bytes_moved: float, device: DeviceSpec) -> float:
    """The least time main memory and arithmetic allow, whichever is longer: t* / min(1, I / r)."""
    return max(operations / device.peak, bytes_moved / device.bandwidth)


def attainable_network_efficiency(
    operations: Sequence[float], bytes_moved: Sequence[float], device: DeviceSpec
) -> float:
    """The network efficiency that is possible if each layer runs by itself: sum ops / sum (ops / min(1, I / r)).

    Raises ValueError if the two do not pair up.
    """
    if len(operations) != len(bytes_moved):
        raise ValueError(f"operations and bytes_moved must pair up, got {len(operations)} and {len(bytes_moved)}")
    total = sum(attainable_seconds(o, b, device) for o, b in zip(operations, bytes_moved, strict=True))
    return ideal_seconds(sum(operations), device.peak) / total if total > 0 else 1.0


BEATEN = 1.05
"""Work that is this much faster than the calibrated limits allow shows that they are too low."""


def bound_share(attainable_seconds: float, seconds: float) -> float | None:
    """Attainable over measured time: 1 is as fast as the machine can do this work. Of two times it may be a peak's or a roofline's.

    None (void) if the work was faster than it can be by more than 5 %: a bandwidth or a rate above the calibrated one was measured, so
    the calibration is too low (taken on a busy machine, or of another one) and no share of it says anything until it is taken again.
    Raises ValueError for seconds that are not positive or attainable_seconds that are negative.

    >>> bound_share(0.5, 1.0), bound_share(1.2, 1.0)
    (0.5, None)
    """
    attainable_seconds = checks.number("attainable_seconds", attainable_seconds, low=0)
    share = attainable_seconds / checks.number("seconds", seconds, above=0)
    return share if share <= BEATEN else None


def lower_bound(
    macs: float, bytes_moved: float, dtype: str, calibration: Calibration, *, cold_bytes: float | None = None
) -> float:
    """Seconds that no execution of this work on this machine can beat: our own tightening of the DRAM roofline.

    The longest of: the MACs at peak rate (two operations each); `cold_bytes` from main memory; all bytes from the fastest cache
    that holds that many. `cold_bytes` are those that cannot be in a cache when the work starts (the weights of a model larger
    than the last cache); None means all of them, which is the paper's roofline.
    """
    memory = bytes_moved / calibration.bandwidth(bytes_moved)
    cold = bytes_moved if cold_bytes is None else min(cold_bytes, bytes_moved)
    return max(2 * macs / calibration.peak(dtype), cold / calibration.memory_bandwidth, memory)


@dataclass(frozen=True)
class Layer:
    """A layer in an efficiency report. `seconds` None: not measured."""

    name: str
    operations: float
    bytes_moved: float
    seconds: float | None = None

    @property
    def intensity(self) -> float:
        """Operations per byte."""
        return intensity(self.operations, self.bytes_moved)


@dataclass(frozen=True)
class Bar:
    """One bar of a waterline: `width` is a share of all operations, `height` the intensity, `depth` what is lost under water.

    `depth` is 1 - min(1, intensity / ridge): 0 for a layer bound by arithmetic.
    """

    name: str
    width: float
    height: float
    attainable: float
    depth: float


def waterline(layers: Iterable[Layer], ridge: float) -> list[Bar]:
    """The bars of a sequence of kernels against the device's ridge, in order; layers without operations are left out.

    The paper's exact drawing is not published; ours: width is the share of operations, height the operational intensity (drawn
    on a log axis), the ridge is the water. A bar that ends under water is bound by memory.
    """
    _positive("ridge", ridge)
    working = [layer for layer in layers if layer.operations > 0]
    total = sum(layer.operations for layer in working)
    bars = []
    for layer in working:
        reach = attainable_efficiency(layer.intensity, ridge)
        bars.append(Bar(layer.name, layer.operations / total, layer.intensity, reach, 1 - reach))
    return bars


@dataclass(frozen=True)
class GapPoint:
    """One model of an efficiency-gap plot: accuracy against ideal and measured latency, which are joined by a line."""

    name: str
    accuracy: float
    ideal_seconds: float
    seconds: float

    @property
    def gap(self) -> float:
        """seconds / ideal_seconds = 1 / e: on a log axis the length of the line between the two."""
        return self.seconds / self.ideal_seconds


def gap_point(name: str, accuracy: float, operations: float, seconds: float, peak: float) -> GapPoint:
    """The two ends of a model's line in the efficiency-gap plot."""
    return GapPoint(
        name, accuracy, ideal_seconds(_positive("operations", operations), peak), _positive("seconds", seconds)
    )
