"""VoVNet: blocks that join nothing, accuracy that is lost, and equal energy change the verdicts."""

from __future__ import annotations

from typing import ClassVar

import pytest
import torch
from tests.experiments.vision.given import judged
from tests.properties.sabotage import PAYS, record_of

from assay.errors import MissingError
from assay.evidence.types import Verdict
from assay.evidence.verdict import judge
from assay.experiments import experiments_of
from assay.experiments.vision import rivals
from assay.experiments.vision import vovnet as room
from assay.methods.vision.vovnet import DenseBlock, OsaBlock

ACCURACY = {"osa": 0.6, "dense": 0.6, "last only": 0.5, "resnet": 0.58, "random features": 0.4, "pixels": 0.3}
SPEED = {"size": 64, "batch": 1, "layers": 5, "steps": 20}


@pytest.fixture
def figures(monkeypatch):
    """Accuracies as given instead of trained, a narrow network instead of the published one."""
    given = dict(ACCURACY)
    monkeypatch.setattr(room, "shown", lambda arm, steps: judged(given[arm]))

    def networks(layers):
        return {
            "osa": room.network(share=0.25, layers=layers),
            "dense": room.network("dense", share=0.25, layers=layers),
            "resnet": room.residual(0.25),
        }

    monkeypatch.setattr(room, "networks", networks)
    return given


def test_every_experiment_declares_what_decides():
    found = {each.claim: each for each in experiments_of("vovnet")}
    assert set(found) == {"vovnet/detector-speedup", "vovnet/energy", "vovnet/memory-access"}
    assert found["vovnet/detector-speedup"].decides["small"]["layers"] == 5
    assert found["vovnet/energy"].needs == ("cuda",)
    assert found["vovnet/memory-access"].computed


def test_speed_without_accuracy_does_not_pay(figures):
    claim = "vovnet/detector-speedup"
    honest = record_of(claim, SPEED)
    assert judge(honest).verdict in PAYS
    elements = honest.details["elements by the paper's model"]
    assert elements["osa"] < elements["dense"]
    count = honest.details["parameters"]
    for rival in ("dense", "resnet"):
        assert 0.9 * count["osa"] < count[rival] <= count["osa"]
    figures["osa"] = 0.5
    assert judge(record_of(claim, SPEED)).verdict is Verdict.DOES_NOT_PAY
    figures |= {"osa": 0.6, "pixels": 0.6}
    assert judge(record_of(claim, SPEED)).verdict is Verdict.QUALITY_NOT_SHOWN


def test_a_slower_backbone_is_refuted(figures):
    from assay.evidence.types import Estimate

    record = record_of("vovnet/detector-speedup", SPEED)
    slower = Estimate(median=0.9, low=0.85, high=0.95)
    assert judge(record.model_copy(update={"measured": slower})).verdict is Verdict.REFUTED


class Meter:
    """Joules as given, by the network that ran last."""

    costs: ClassVar[dict[str, float]] = {}
    running = ""

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.joules = self.costs[Meter.running]


@pytest.fixture
def gpu(monkeypatch, figures):
    """No GPU, but everything that the experiment asks of one."""
    monkeypatch.setattr("assay.measure.energy.why_not", lambda: "")
    monkeypatch.setattr("assay.measure.energy.EnergyMeter", Meter)
    monkeypatch.setattr(torch.nn.Module, "cuda", lambda self: self)
    real = torch.randn
    monkeypatch.setattr(torch, "randn", lambda *shape, device=None: real(*shape))
    measured = room.joules_per_image

    def named(model, x, images):
        dense = any(isinstance(module, DenseBlock) for module in model.modules())
        osa = any(isinstance(module, OsaBlock) for module in model.modules())
        Meter.running = "dense" if dense else "osa" if osa else "resnet"
        return measured(model, x, images)

    monkeypatch.setattr(room, "joules_per_image", named)


def test_equal_energy_pays_nothing_and_less_does(gpu):
    claim, point = "vovnet/energy", {"size": 32, "batch": 2, "images": 4, "steps": 20}
    Meter.costs = {"dense": 8.0, "osa": 4.0, "resnet": 6.0}
    honest = record_of(claim, point)
    assert judge(honest).verdict in PAYS
    assert honest.details["joules an image"] == {"osa": [1.0] * 6, "dense": [2.0] * 6, "resnet": [1.5] * 6}
    Meter.costs = {"dense": 4.0, "osa": 4.0, "resnet": 6.0}
    assert judge(record_of(claim, point)).verdict is Verdict.DOES_NOT_PAY
    Meter.costs = {"dense": 8.0, "osa": 4.0, "resnet": 3.0}
    assert judge(record_of(claim, point)).verdict is Verdict.DOES_NOT_PAY  # the ResNet takes less


def test_without_a_counter_there_is_no_energy(monkeypatch):
    monkeypatch.setattr("assay.measure.energy.why_not", lambda: "no energy counter here")
    with pytest.raises(MissingError, match="no energy counter here"):
        room.energy(32, 2, 4, 20)


def test_the_memory_access_saved_is_arithmetic_near_the_papers_numbers():
    claim = "vovnet/memory-access"
    record = record_of(claim, {"width": 43, "layers": 5})
    assert judge(record).verdict is Verdict.COMPUTED
    elements = record.details["elements"]
    assert elements["dense"] / 1e6 == pytest.approx(3.7, abs=0.05)  # as the paper says
    assert elements["osa"] / 1e6 == pytest.approx(2.5, abs=0.15)
    wide = record_of(claim, {"width": 120, "layers": 5})
    assert wide.measured.median < 1 < record.measured.median


def test_the_arms_are_what_they_say():
    x = torch.zeros(2, 1, 48, 48)
    count = {}
    for arm, make in room.ARMS.items():
        model = make().eval()
        count[arm] = rivals.parameters(model)
        with torch.no_grad():
            assert model(x).shape == (2, rivals.CLASSES), arm
    for arm in ("dense", "last only", "resnet"):
        assert 0.85 * count["osa"] < count[arm] <= count["osa"], arm
    block = room.LastOnly(6, 4, 5, 3).eval()
    y = torch.randn(1, 6, 7, 7)
    chain = block.conv_mid[2](block.conv_mid[1](block.conv_mid[0](y)))
    assert torch.equal(block(y), block.conv_concat(chain))
