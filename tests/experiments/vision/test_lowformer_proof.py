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
    """Accuracies as given instead of trained, narrow networks instead of published and equal ones, nothing timed, counted or studied."""
    given = dict(ACCURACY)
    monkeypatch.setattr(room, "shown", lambda arm, steps: judged(given[arm]))
    monkeypatch.setattr(room, "study", lambda batch: {})
    monkeypatch.setattr(room, "timed", lambda made, size, batch: dict.fromkeys(made, int))
    monkeypatch.setattr(room, "counts", lambda made, size: {"macs of an image": dict.fromkeys(made, size)})

    def narrow(name, **settings):
        return build(name, **{"width": 8, "head": (96, 96), **settings})

    monkeypatch.setattr(room, "build", narrow)
    monkeypatch.setattr(room, "as_many", lambda make, model, size, of: make(of // 2))
    return given


def test_every_experiment_declares_what_decides():
    found = {each.claim: each for each in experiments_of("lowformer")}
    assert set(found) == set(POINTS)
    assert all(each.decides["small"]["size"] == 224 for each in found.values())


@pytest.mark.parametrize("claim", POINTS)
def test_speed_without_accuracy_does_not_pay(claim, figures):
    honest = record_of(claim, POINTS[claim])
    assert judge(honest).verdict in PAYS
    assert {CANDIDATE[claim], "resnet"} < set(honest.details["macs of an image"])
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


def test_networks_are_timed_and_counted_as_they_are():
    torch.manual_seed(0)
    made = {"one": torch.nn.Sequential(room.Conv(3, 4)), "two": torch.nn.Sequential(room.Conv(3, 8, stride=2))}
    outputs = {name: run() for name, run in room.timed(made, 8, 2).items()}
    assert {name: tuple(out.shape) for name, out in outputs.items()} == {"one": (2, 4, 8, 8), "two": (2, 8, 4, 4)}
    assert not any(out.requires_grad for out in outputs.values())
    assert room.counts(made, 8) == {
        "parameters": {"one": 108 + 8, "two": 216 + 16},
        "macs of an image": {"one": 64 * 108, "two": 16 * 216},
    }


def test_rivals_have_as_many_macs_as_they_may():
    """Those that are timed at widths that hardware likes: an odd width of ours must not make them slow."""

    def make(width):
        return torch.nn.Sequential(torch.nn.Conv2d(3, width, 1))

    assert room.width_as_many(make, lambda: make(21), 4) == 21
    assert room.width_as_many(make, lambda: make(21), 4, room.ALIGNED) == 16
    assert room.ALIGNED % 8 == 0


@pytest.mark.slow
def test_the_arms_are_what_they_say():
    with torch.device("meta"):
        models = {arm: make().eval() for arm, make in room.ARMS.items()}
        assert {model(torch.zeros(2, 1, 48, 48)).shape for model in models.values()} == {(2, rivals.CLASSES)}
    counts = {arm: rivals.macs(model, 48) for arm, model in models.items() if arm != "pixels"}
    for arm, as_many in (
        ("depthwise", "fused"),
        ("resnet", "fused"),
        ("mobilenetv3", "lowformer"),
        ("resnet, as lowformer", "lowformer"),
    ):
        assert 0.9 * counts[as_many] < counts[arm] <= counts[as_many], arm
    random = models["random lowformer"]
    assert not any(p.requires_grad for m in random.modules() if isinstance(m, torch.nn.Conv2d) for p in m.parameters())


@pytest.mark.slow
def test_the_study_orders_modules_on_this_machine():
    found = room.study(1)
    assert len(found["GMAC/s at equal MACs"]) == 7
    assert set(found["seconds of depthwise over fused, same widths"]) == {16, 32, 64, 128}
    assert -1 <= found["rank correlation of MACs with times"] <= 1
