"""The experiments of fp8_vs_int8 notice a broken INT8."""

import pytest
import torch
from tests.properties.sabotage import PAYS, record_of, verdict_of

from assay.evidence.types import Verdict
from assay.experiments.compression import fp8_vs_int8 as room

SPEED = {"layer": "mlp.up_proj", "tokens": 64, "block": 1}


@pytest.mark.slow
def test_an_int8_with_wrong_ranges_is_noticed(monkeypatch):
    claim, point = "fp8_vs_int8/int8-not-worse-ptq", {"net": "digits"}
    honest = record_of(claim, point)
    assert max(honest.controls.values()) < honest.measured.low
    assert verdict_of(claim, point) is Verdict.REPRODUCED
    real = room.fake_quantize

    def broken(model, name, calibration, **settings):
        if name == "INT8":
            settings |= {"learn_ranges": True}
        changed = real(model, name, calibration, **settings)
        if name == "INT8":
            with torch.no_grad():
                for parameter in room.ranges(changed):
                    parameter *= 16
        return changed

    monkeypatch.setattr(room, "fake_quantize", broken)
    assert verdict_of(claim, point) not in PAYS


@pytest.mark.model
def test_a_layer_with_wrong_weights_is_noticed(smollm2_slice, monkeypatch):
    monkeypatch.setattr(room, "load_model", lambda name: smollm2_slice)
    assert verdict_of("fp8_vs_int8/int8-linear-speed", SPEED) in PAYS
    real = room.Int8Linear

    def rolled(weight, bias, **settings):
        return real(weight.roll(1, 0), bias, **settings)  # each output has its neighbour's weights

    monkeypatch.setattr(room, "Int8Linear", rolled)
    assert verdict_of("fp8_vs_int8/int8-linear-speed", SPEED) is Verdict.DOES_NOT_PAY
