"""SimpleNet: a network that learns nothing, one that is slower, and a narrower VGG that is as good change the verdicts."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tests.experiments.vision.given import judged
from tests.properties.sabotage import PAYS, record_of

from assay.evidence.types import Verdict
from assay.evidence.verdict import judge
from assay.experiments import experiments_of
from assay.experiments.vision import rivals
from assay.experiments.vision import simplenet as room
from assay.experiments.vision.training import right_by_photograph, train
from assay.workloads.pictures import PICTURES

ACCURACY = {
    "simplenet": 0.62, "vgg": 0.6, "narrow vgg": 0.45, "resnet": 0.6, "mobilenet": 0.58, "random features": 0.4, "pixels": 0.3,
}  # fmt: skip
SPEED = {"size": 64, "batch": 1, "steps": 20}


@pytest.fixture
def figures(monkeypatch):
    """Accuracies as given instead of trained."""
    given = dict(ACCURACY)
    monkeypatch.setattr(room, "shown", lambda arm, steps: judged(given[arm]))
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
    assert honest.details["macs of an image"]["resnet"] > honest.details["macs of an image"]["simplenet"]
    assert honest.details["parameters"]["simplenet"] == 5_752_808
    assert honest.details["parameters"]["resnet"] == 11_689_512
    figures["simplenet"] = 0.5
    assert judge(record_of(claim, SPEED)).verdict is Verdict.DOES_NOT_PAY
    figures |= {"simplenet": 0.6, "random features": 0.59}
    assert judge(record_of(claim, SPEED)).verdict is Verdict.QUALITY_NOT_SHOWN


def test_a_slower_network_is_refuted_and_a_faster_rival_noticed(figures):
    """Times are granted in the kit; here they are not."""
    from assay.evidence.types import Estimate

    record = record_of("simplenet/throughput-5m", SPEED)
    slower = Estimate(median=0.8, low=0.7, high=0.9)
    assert judge(record.model_copy(update={"measured": slower})).verdict is Verdict.REFUTED
    ratios = {**record.ratios, "free": slower}
    assert judge(record.model_copy(update={"ratios": ratios})).verdict is Verdict.DOES_NOT_PAY


def test_fewer_parameters_count_for_nothing_where_accuracy_is_lost_or_a_narrower_vgg_keeps_it(figures):
    claim, point = "simplenet/fewer-parameters", {"steps": 20}
    honest = record_of(claim, point)
    assert judge(honest).verdict in PAYS
    assert honest.free == 1.0
    count = honest.details["parameters"]
    assert honest.measured.median == pytest.approx(count["vgg"] / count["simplenet"])
    assert 0.9 * count["simplenet"] < count["narrow vgg"] <= count["simplenet"]
    figures["narrow vgg"] = 0.59
    beaten = record_of(claim, point)
    assert beaten.free >= honest.measured.median
    assert judge(beaten).verdict is Verdict.DOES_NOT_PAY
    figures |= {"narrow vgg": 0.45, "simplenet": 0.3}
    assert judge(record_of(claim, point)).verdict is Verdict.REFUTED


def test_the_published_numbers_are_those_of_the_shapes(figures):
    record = record_of("simplenet/fewer-parameters", {"steps": 20})
    published = record.details["published, VGG16 over SimpleNet"]
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
