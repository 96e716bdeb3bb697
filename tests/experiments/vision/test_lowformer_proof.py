"""LowFormer: accuracy that is lost, rivals of more MACs, and slower networks change the verdicts."""

from __future__ import annotations

import pytest
import torch
from tests.experiments.vision.given import judged
from tests.properties.sabotage import PAYS, record_of

from assay.evidence.types import Estimate, Verdict
from assay.evidence.verdict import judge
from assay.experiments import experiments_of
from assay.experiments.vision import lowformer as room
from assay.experiments.vision import rivals
from assay.methods.vision import build

ACCURACY = {
    "fused": 0.6, "depthwise": 0.6, "resnet": 0.55, "lowformer": 0.6, "no attention": 0.57, "mobilenetv3": 0.6,
    "resnet, as lowformer": 0.55, "random features": 0.4, "random lowformer": 0.4, "pixels": 0.3,
}  # fmt: skip
POINTS = {
    "lowformer/fused-at-equal-macs": {"size": 64, "batch": 1, "width": 8, "steps": 20},
    "lowformer/backbone-speedup": {"size": 64, "batch": 1, "steps": 20},
}
CANDIDATE = {"lowformer/fused-at-equal-macs": "fused", "lowformer/backbone-speedup": "lowformer"}
RANDOM = {"lowformer/fused-at-equal-macs": "random features", "lowformer/backbone-speedup": "random lowformer"}


@pytest.fixture
def figures(monkeypatch):
    """Accuracies as given instead of trained, narrow networks instead of published and equal ones, no study."""
    given = dict(ACCURACY)
    monkeypatch.setattr(room, "shown", lambda arm, steps: judged(given[arm]))
    monkeypatch.setattr(room, "study", lambda batch: {})

    def narrow(name, **settings):
        return build(name, **{"width": 8, "head": (96, 96), **settings})

    monkeypatch.setattr(room, "build", narrow)
    monkeypatch.setattr(room, "as_many", lambda make, model, size: make(4))
    return given


def test_every_experiment_declares_what_decides():
    found = {each.claim: each for each in experiments_of("lowformer")}
    assert set(found) == set(POINTS)
    assert all(each.decides["small"]["size"] == 224 for each in found.values())


@pytest.mark.parametrize("claim", POINTS)
def test_speed_without_accuracy_does_not_pay(claim, figures):
    honest = record_of(claim, POINTS[claim])
    assert judge(honest).verdict in PAYS
    assert honest.details["macs of an image"][CANDIDATE[claim]] > 0
    figures[CANDIDATE[claim]] = 0.5
    assert judge(record_of(claim, POINTS[claim])).verdict is Verdict.DOES_NOT_PAY
    figures |= {CANDIDATE[claim]: 0.6, RANDOM[claim]: 0.6}
    assert judge(record_of(claim, POINTS[claim])).verdict is Verdict.QUALITY_NOT_SHOWN


@pytest.mark.parametrize("claim", POINTS)
def test_slower_networks_are_refuted(claim, figures):
    record = record_of(claim, POINTS[claim])
    slower = Estimate(median=0.9, low=0.85, high=0.95)
    assert judge(record.model_copy(update={"measured": slower})).verdict is Verdict.REFUTED
    ratios = {**record.ratios, "free": slower}
    assert judge(record.model_copy(update={"ratios": ratios})).verdict is Verdict.DOES_NOT_PAY


def test_the_published_mobilenetv3_has_its_published_counts():
    with torch.device("meta"):
        model = room.mobilenetv3()
    assert rivals.macs(model, 224) / 1e6 == pytest.approx(219, rel=0.03)
    assert rivals.parameters(model) / 1e6 == pytest.approx(5.4, rel=0.03)


def test_the_arms_are_what_they_say():
    x = torch.zeros(2, 1, 48, 48)
    for arm, make in room.ARMS.items():
        with torch.no_grad():
            assert make().eval()(x).shape == (2, rivals.CLASSES), arm
    counts = {arm: rivals.macs(room.ARMS[arm]().to("meta"), 48) for arm in ACCURACY if arm != "pixels"}
    for arm, as_many in (
        ("depthwise", "fused"),
        ("resnet", "fused"),
        ("mobilenetv3", "lowformer"),
        ("resnet, as lowformer", "lowformer"),
    ):
        assert 0.75 * counts[as_many] < counts[arm] <= counts[as_many], arm
    random = room.ARMS["random lowformer"]()
    assert not any(p.requires_grad for m in random.modules() if isinstance(m, torch.nn.Conv2d) for p in m.parameters())


@pytest.mark.slow
def test_the_study_orders_modules_on_this_machine():
    found = room.study(1)
    assert len(found["GMAC/s at equal MACs"]) == 7
    assert set(found["seconds of depthwise over fused, same widths"]) == {16, 32, 64, 128}
    assert -1 <= found["rank correlation of MACs with times"] <= 1
