"""VoVNet: blocks that join nothing, accuracy that is lost, and equal energy change the verdicts."""

from __future__ import annotations

from typing import ClassVar

import pytest
import torch
from tests.experiments.vision.given import judged
from tests.properties.sabotage import PAYS, record_of

from assay.errors import MissingError
from assay.evidence.types import Estimate, Verdict
from assay.evidence.verdict import judge
from assay.experiments import experiments_of
from assay.experiments.vision import rivals
from assay.experiments.vision import vovnet as room
from assay.methods.vision.vovnet import DenseBlock, OsaBlock

ACCURACY = {"osa": 0.6, "dense": 0.6, "last only": 0.5, "resnet": 0.58, "random features": 0.4, "pixels": 0.3}
SPEED = {"size": 64, "batch": 1, "steps": 20}


@pytest.fixture
def figures(monkeypatch):
    """Accuracies as given instead of trained, small networks instead of the published ones."""
    given = dict(ACCURACY)
    monkeypatch.setattr(room, "shown", lambda arm, steps: judged(given[arm]))

    def networks():
        torch.manual_seed(0)
        return {
            "vovnet": room.network(share=0.1),
            "dense blocks": room.network("dense", share=0.1),
            "densenet": room.densenet((1, 2, 2, 1), 8),
            "resnet": room.residual(0.1),
        }

    monkeypatch.setattr(room, "networks", networks)
    return given


def test_every_experiment_declares_what_decides():
    found = {each.claim: each for each in experiments_of("vovnet")}
    assert set(found) == {"vovnet/detector-speedup", "vovnet/energy", "vovnet/memory-access"}
    assert found["vovnet/detector-speedup"].decides["small"]["size"] == 224
    assert found["vovnet/energy"].needs == ("cuda",)
    assert found["vovnet/memory-access"].computed


def test_speed_without_accuracy_does_not_pay(figures):
    claim = "vovnet/detector-speedup"
    honest = record_of(claim, SPEED)
    assert judge(honest).verdict in PAYS
    elements = honest.details["elements by the paper's model"]
    assert elements["vovnet"] < elements["dense blocks"]
    folded = honest.details["norms folded, of how many"]
    assert tuple(folded.pop("densenet")) == (7, 17)  # the norms of what was joined stay: no convolution gave it
    assert all(done == norms > 0 for done, norms in folded.values())
    slower = Estimate(median=0.9, low=0.85, high=0.95)
    assert judge(honest.model_copy(update={"measured": slower})).verdict is Verdict.REFUTED
    figures["osa"] = 0.5
    assert judge(record_of(claim, SPEED)).verdict is Verdict.DOES_NOT_PAY
    figures |= {"osa": 0.6, "last only": 0.59}  # a chain that joins nothing does as well
    assert judge(record_of(claim, SPEED)).verdict is Verdict.QUALITY_NOT_SHOWN


def test_what_is_timed_are_the_published_networks():
    with torch.device("meta"):
        count = {name: rivals.parameters(model) for name, model in room.networks().items()}
    assert (count["vovnet"], count["densenet"], count["resnet"]) == (22_600_296, 20_013_928, 25_557_032)
    assert 0.95 * count["vovnet"] < count["dense blocks"] <= count["vovnet"]


@torch.no_grad()
def test_densenets_layer_joins_its_output_to_its_input():
    layer, x = room.DenseLayer(6, 4).eval(), torch.randn(2, 6, 5, 5)
    y = layer.conv2(torch.relu(layer.norm2(layer.conv1(torch.relu(layer.norm1(x))))))
    assert torch.equal(layer(x), torch.cat([x, y], 1))
    assert room.densenet((1, 2, 2, 1), 8).eval()(torch.zeros(2, 3, 64, 64)).shape == (2, 1000)


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
        kinds = {DenseBlock: "dense blocks", OsaBlock: "vovnet", room.DenseLayer: "densenet"}
        found = {name for module in model.modules() for kind, name in kinds.items() if isinstance(module, kind)}
        Meter.running = found.pop() if found else "resnet"
        return measured(model, x, images)

    monkeypatch.setattr(room, "joules_per_image", named)


def test_equal_energy_pays_nothing_and_less_does(gpu):
    claim, point = "vovnet/energy", {"size": 32, "batch": 2, "images": 4, "steps": 20}
    Meter.costs = {"densenet": 8.0, "vovnet": 4.0, "dense blocks": 5.0, "resnet": 6.0}
    honest = record_of(claim, point)
    assert judge(honest).verdict in PAYS
    joules = {name: [cost / 4] * 6 for name, cost in Meter.costs.items()}
    assert honest.details["joules an image"] == joules
    Meter.costs = {**Meter.costs, "densenet": 4.0}
    assert judge(record_of(claim, point)).verdict is Verdict.DOES_NOT_PAY
    Meter.costs = {**Meter.costs, "densenet": 8.0, "resnet": 3.0}
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
