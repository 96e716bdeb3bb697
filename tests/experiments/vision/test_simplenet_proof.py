"""SimpleNet: a network that learns nothing, one that is slower, and a bare VGG that is as good change the verdicts."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tests.experiments.vision.given import judged
from tests.properties.sabotage import PAYS, record_of
from torch import nn

from assay.evidence.types import Estimate, Verdict
from assay.evidence.verdict import judge
from assay.experiments import experiments_of
from assay.experiments.vision import rivals
from assay.experiments.vision import simplenet as room
from assay.experiments.vision.training import right_by_photograph, train
from assay.measure.cost import count_cost
from assay.workloads.pictures import PICTURES

ACCURACY = {
    "simplenet": 0.62, "vgg": 0.6, "bare vgg": 0.45, "resnet": 0.6, "mobilenet": 0.58, "random features": 0.4, "pixels": 0.3,
}  # fmt: skip
SPEED = {"size": 64, "batch": 1, "steps": 20}


@pytest.fixture
def figures(monkeypatch):
    """Accuracies as given instead of trained, narrow networks instead of the published ones."""
    given = dict(ACCURACY)
    monkeypatch.setattr(room, "shown", lambda arm, steps: judged(given[arm]))

    def networks():
        torch.manual_seed(0)
        return {
            "simplenet": room.build(room.SIMPLENET, scale=0.1),
            "simplenet, later strides (m2)": room.build("simplenetv1_5m_m2", scale=0.1),
            "resnet": rivals.resnet((8, 16, 24, 32), (1, 1, 1, 1)),
            "mobilenet": rivals.mobilenet(0.1),
        }

    monkeypatch.setattr(room, "networks", networks)
    return given


def test_every_experiment_declares_what_decides():
    found = {each.claim: each for each in experiments_of("simplenet")}
    assert set(found) == {"simplenet/throughput-5m", "simplenet/fewer-parameters"}
    decides = found["simplenet/throughput-5m"].decides["small"]
    assert (decides["size"], decides["steps"]) == (224, room.STEPS)
    assert all(each.guard.margin == rivals.MARGIN for each in found.values())


def test_speed_without_accuracy_does_not_pay(figures):
    claim = "simplenet/throughput-5m"
    honest = record_of(claim, SPEED)
    assert judge(honest).verdict in PAYS
    for name, (folded, norms) in honest.details["norms folded, of how many"].items():
        assert folded == norms > 0, name  # none is slower because of a norm that was left
    figures["simplenet"] = 0.5
    assert judge(record_of(claim, SPEED)).verdict is Verdict.DOES_NOT_PAY
    figures |= {"simplenet": 0.6, "random features": 0.59}
    assert judge(record_of(claim, SPEED)).verdict is Verdict.QUALITY_NOT_SHOWN

    slower = Estimate(median=0.8, low=0.7, high=0.9)  # times are granted in the kit; here they are not
    assert judge(honest.model_copy(update={"measured": slower})).verdict is Verdict.REFUTED
    ratios = {**honest.ratios, "free": slower}
    assert judge(honest.model_copy(update={"ratios": ratios})).verdict is Verdict.DOES_NOT_PAY


def test_what_is_timed_are_the_published_networks():
    with torch.device("meta"):
        made = room.networks()
        x = torch.zeros(1, 3, 224, 224)
        macs = {name: count_cost(made[name].eval(), x).macs for name in ("simplenet", "resnet", "mobilenet")}
    count = {name: rivals.parameters(model) for name, model in made.items()}
    assert (count["simplenet"], count["resnet"], count["mobilenet"]) == (5_752_808, 11_689_512, 3_504_872)
    assert macs["resnet"] > macs["simplenet"] > 4 * macs["mobilenet"]
    assert not made["mobilenet"].model.config.tf_padding  # an operator of its own before every convolution


def test_fewer_parameters_count_for_nothing_where_accuracy_is_lost_or_a_bare_vgg_keeps_it(figures):
    claim, point = "simplenet/fewer-parameters", {"steps": 20}
    honest = record_of(claim, point)
    assert judge(honest).verdict in PAYS
    assert honest.free == 1.0
    count = honest.details["parameters"]
    assert honest.measured.median == pytest.approx(count["vgg"] / count["simplenet"])
    assert 0.9 * count["simplenet"] < count["bare vgg"] <= count["simplenet"]
    assert sum(isinstance(module, nn.Linear) for module in room.bare_vgg().modules()) == 1
    figures["bare vgg"] = 0.59
    beaten = record_of(claim, point)
    assert beaten.free >= honest.measured.median
    assert judge(beaten).verdict is Verdict.DOES_NOT_PAY
    figures |= {"bare vgg": 0.45, "simplenet": 0.3}
    assert judge(record_of(claim, point)).verdict is Verdict.REFUTED
    published = honest.details["published, VGG16 over SimpleNet"]
    assert published["parameters"] == pytest.approx(25.2, abs=0.05)
    assert (
        published["operations at 32 pixels each"]
        < 1
        < published["operations as the paper compares them (224 pixels and 32)"]
    )
    with torch.device("meta"):
        vgg = room.vgg16()
        assert rivals.parameters(vgg) == 138_357_544 - 4224 + 2 * 4224  # batch norms for biases


def test_the_controls_are_what_they_say():
    state = torch.get_rng_state()
    assert room._bare_width.__wrapped__() == room._bare_width()
    assert torch.equal(torch.get_rng_state(), state)  # so that a seed means the same weights, searched already or not
    random = room.ARMS["random features"]()
    learned = {name.split(".")[-2] for name, p in random.named_parameters() if p.requires_grad}
    assert learned == {"norm", "classifier"}
    x = torch.zeros(2, 1, 48, 48)
    for arm, make in room.ARMS.items():
        with torch.no_grad():
            assert make().eval()(x).shape == (2, len(PICTURES)), arm


@pytest.mark.slow
def test_a_network_that_is_trained_beats_its_own_random_features():
    scores = {
        arm: float(np.mean(right_by_photograph(train(room.ARMS[arm], 0.01, 150, 1))))
        for arm in ("simplenet", "random features", "pixels")
    }
    assert scores["simplenet"] > max(scores["random features"], scores["pixels"]) + rivals.MARGIN / 100
