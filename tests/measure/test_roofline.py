"""The efficiency arithmetic, its bounds, and the waterline."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.tiny import calibration

from assay.measure.roofline import (
    H100_SXM_BF16,
    DeviceSpec,
    Layer,
    attainable_efficiency,
    attainable_network_efficiency,
    attainable_seconds,
    bound_share,
    device_of,
    efficiency,
    efficiency_gap,
    gap_point,
    intensity,
    lower_bound,
    network_efficiency,
    waterline,
)

DEVICE = DeviceSpec("d", peak=1e12, bandwidth=1e10)
CALIBRATION = calibration(peak_flops={"float32": 1e11})
sizes = st.floats(1.0, 1e15)


def test_efficiency_and_gap():
    assert efficiency(operations=2e9, seconds=0.01, peak=1e12) == pytest.approx(0.2)
    assert efficiency_gap(2e9, 0.01, 1e12) == pytest.approx(5)
    assert efficiency_gap(0, 0.01, 1e12) == math.inf


@given(st.lists(st.tuples(sizes, st.floats(1.0, 100.0)), min_size=1, max_size=20))
def test_network_efficiency_lies_between_its_layers(layers):
    peak = 1e12
    operations = [o for o, _ in layers]
    seconds = [o / peak * slower for o, slower in layers]
    each = [efficiency(o, s, peak) for o, s in zip(operations, seconds, strict=True)]
    found = network_efficiency(operations, seconds, peak)
    assert min(each) * (1 - 1e-9) <= found <= max(each) * (1 + 1e-9)
    harmonic = sum(operations) / sum(o / e for o, e in zip(operations, each, strict=True))
    assert found == pytest.approx(harmonic)


def test_network_efficiency_is_one_only_if_every_layer_is_at_peak():
    assert network_efficiency([1e12, 3e12], [1.0, 3.0], 1e12) == 1
    assert network_efficiency([1e12, 3e12], [1.0, 3.001], 1e12) < 1


@given(sizes, sizes)
def test_attainable_seconds_are_the_rooflines(operations, bytes_moved):
    reach = attainable_efficiency(intensity(operations, bytes_moved), DEVICE.ridge)
    assert 0 < reach <= 1
    assert attainable_seconds(operations, bytes_moved, DEVICE) == pytest.approx(operations / DEVICE.peak / reach)


def test_ridge_of_the_data_sheet():
    assert pytest.approx(295, abs=1) == H100_SXM_BF16.ridge
    assert attainable_efficiency(49.4, H100_SXM_BF16.ridge) < 0.2  # a layer-by-layer block, far under water
    assert attainable_efficiency(420, H100_SXM_BF16.ridge) == 1  # the same block fused


@given(st.lists(st.tuples(sizes, sizes), min_size=1, max_size=20))
def test_attainable_network_efficiency(layers):
    operations, bytes_moved = zip(*layers, strict=True)
    found = attainable_network_efficiency(operations, bytes_moved, DEVICE)
    each = [attainable_efficiency(intensity(o, b), DEVICE.ridge) for o, b in layers]
    assert min(each) * (1 - 1e-9) <= found <= max(each) * (1 + 1e-9)
    assert found == pytest.approx(sum(operations) / sum(o / e for o, e in zip(operations, each, strict=True)))


def test_waterline_bars():
    layers = [Layer("wide", 3e9, 1e7), Layer("no work", 0, 5e6), Layer("thin", 1e9, 1e9)]
    wide, thin = waterline(layers, DEVICE.ridge)
    assert (wide.name, wide.width, wide.height, wide.depth) == ("wide", 0.75, 300, 0)
    assert (thin.width, thin.height) == (0.25, 1)
    assert thin.depth == pytest.approx(0.99)
    assert waterline([], DEVICE.ridge) == []


def test_gap_plot_joins_ideal_and_measured():
    point = gap_point("net", accuracy=0.8, operations=1e9, seconds=0.004, peak=1e12)
    assert point.ideal_seconds == pytest.approx(0.001)
    assert point.gap == pytest.approx(1 / efficiency(1e9, 0.004, 1e12))


def test_lower_bound_is_the_longest_of_three():
    mib = 1 << 20
    assert lower_bound(5e10, 4, "float32", CALIBRATION) == pytest.approx(1.0)  # arithmetic: 1 MAC = 2 operations
    assert lower_bound(0, 400 * mib, "float32", CALIBRATION) == pytest.approx(400 * mib / 4e10)  # main memory
    assert lower_bound(0, mib, "float32", CALIBRATION, cold_bytes=0) == pytest.approx(mib / 2e11)  # a cache
    assert lower_bound(0, mib, "float32", CALIBRATION, cold_bytes=mib // 2) == pytest.approx(mib / 2 / 4e10)
    assert lower_bound(0, mib, "float32", CALIBRATION, cold_bytes=9 * mib) == pytest.approx(mib / 4e10)


@pytest.mark.parametrize(
    ("seconds", "share"), [(4.0, 0.25), (1.0, 1.0), (1 / 1.049, 1.049), (1 / 1.051, None), (0.1, None)]
)
def test_a_share_of_limits_that_were_beaten_is_void(seconds, share):
    assert bound_share(1.0, seconds) == (share if share is None else pytest.approx(share))
    assert bound_share(0, seconds) == 0


def test_device_of_a_calibrated_machine():
    device = device_of(CALIBRATION, "float32", sram_bytes=1 << 20)
    assert (device.peak, device.bandwidth, device.sram_bytes) == (1e11, 4e10, 1 << 20)
    assert device.ridge == CALIBRATION.ridge("float32") == 2.5


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: DeviceSpec("d", 0, 1), "peak"),
        (lambda: DeviceSpec("d", 1, -1), "bandwidth"),
        (lambda: DeviceSpec("d", 1, 1, -1), "sram_bytes"),
        (lambda: efficiency(1, 0, 1), "seconds"),
        (lambda: efficiency(1, 1, 0), "peak"),
        (lambda: network_efficiency([1], [1, 2], 1), "pair up"),
        (lambda: attainable_network_efficiency([1], [1, 2], DEVICE), "pair up"),
        (lambda: attainable_efficiency(1, 0), "ridge"),
        (lambda: waterline([], 0), "ridge"),
        (lambda: bound_share(1, 0), "seconds"),
        (lambda: bound_share(-1, 1), "attainable_seconds"),
        (lambda: bound_share(math.nan, 1), "attainable_seconds"),
        (lambda: gap_point("n", 1, 0, 1, 1), "operations"),
        (lambda: lower_bound(1, 1, "int3", CALIBRATION), "dtype"),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
