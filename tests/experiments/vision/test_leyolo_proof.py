"""LeYOLO's experiments: accuracy that is lost, a rival that is as good, a blind network change the verdicts; the rival is YOLOv8n."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
import torch
from tests.properties.sabotage import PAYS, record_of, verdict_of
from torch import nn

from assay.evidence.types import Verdict
from assay.evidence.verdict import judge
from assay.experiments import experiments_of
from assay.experiments.rates import Rate
from assay.experiments.vision import leyolo as room
from assay.experiments.vision.rivals import macs, parameters
from assay.experiments.vision.scenes import Scored
from assay.measure.detection import average_precision
from assay.methods.vision.leyolo import LeYOLO
from assay.workloads.digit_scenes import digit_scenes

SAVED, AP = "leyolo/computation-reduction", "leyolo/ap-small"
POINTS = {
    SAVED: {"size": 64, "steps": 2, "classes": 1, "time_at": 64},
    AP: {"size": 64, "steps": 2, "classes": 1},
}
COUNTS = room.counts
FIGURES = {
    "leyolo": 0.6, "yolov8": 0.6, "narrow yolov8": 0.5, "random features": 0.2, "patches": 0.1, "floor": 0.03,
}  # fmt: skip


def scored(value: float) -> Scored:
    """Three seeds of sixty scenes with this mean."""
    apart = np.linspace(-0.02, 0.02, 60)
    rate = Rate(3e-3, (1e-3, 3e-3, 1e-2))
    return Scored(tuple(tuple(value + sign * apart) for sign in (1, -1, 0)), np.mean, rate)


@cache
def counts(size: int, classes: int) -> dict[str, dict[str, int]]:
    return COUNTS(tuple(room.ARMS), size, classes)


@pytest.fixture
def figures(monkeypatch):
    """Figures as given instead of trained; no times."""
    given = dict(FIGURES)
    monkeypatch.setattr(room, "shown", lambda arm, steps, size, classes: scored(given[arm]))
    monkeypatch.setattr(room, "floor", lambda size, classes: given["floor"])
    monkeypatch.setattr(room, "counts", lambda arms, size, classes: counts(size, classes))
    monkeypatch.setattr(room, "precision_at_half", lambda arm: arm.value)
    name, ms = f"{torch.get_num_threads()} threads", {"leyolo small": 2.0, "yolov8n": 3.0}
    monkeypatch.setattr(room, "times", lambda size: {name: {"ms": ms}})
    return given


def test_every_experiment_declares_what_decides():
    found = {each.claim: each for each in experiments_of("leyolo")}
    assert set(found) == {SAVED, AP}
    assert all(each.decides["small"]["steps"] == room.STEPS for each in found.values())
    assert all(each.measured_here for each in found.values())


def test_operations_saved_count_only_at_equal_accuracy(figures):
    honest = record_of(SAVED, POINTS[SAVED])
    assert judge(honest).verdict is Verdict.REPRODUCED
    assert honest.measured.median == pytest.approx(51.4, abs=0.3)
    assert list(honest.arms.values()) == pytest.approx([100 / 3])
    figures["leyolo"] = 0.52
    assert verdict_of(SAVED, POINTS[SAVED]) is Verdict.REFUTED
    figures |= {"leyolo": 0.6, "random features": 0.59}
    assert verdict_of(SAVED, POINTS[SAVED]) is Verdict.QUALITY_NOT_SHOWN
    figures |= {"random features": 0.2, "patches": 0.6}  # the network earns nothing
    assert verdict_of(SAVED, POINTS[SAVED]) is Verdict.UNDECIDED


def test_narrowing_the_rival_is_free_where_it_loses_no_accuracy(figures):
    figures["narrow yolov8"] = 0.59
    record = record_of(SAVED, POINTS[SAVED])
    assert record.free == pytest.approx(52.15, abs=0.05)
    assert judge(record).verdict is Verdict.DOES_NOT_PAY


def test_accuracy_must_beat_that_of_a_rival_of_as_many_operations(figures):
    assert verdict_of(AP, POINTS[AP]) in PAYS
    figures["leyolo"] = 0.45
    assert verdict_of(AP, POINTS[AP]) is Verdict.REFUTED
    figures |= {"leyolo": 0.6, "random features": 0.62}
    assert verdict_of(AP, POINTS[AP]) is Verdict.QUALITY_NOT_SHOWN


def test_arms_that_learnt_nothing_decide_nothing(figures):
    honest = record_of(AP, POINTS[AP])
    assert {(arm.floor, arm.floor_name) for arm in honest.trained.values()} == {(0.1, "the head on patches")}
    assert set(honest.trained) == {"leyolo", "narrow yolov8"}
    figures |= {"yolov8": 0.04, "leyolo": 0.05}
    assert verdict_of(SAVED, POINTS[SAVED]) is Verdict.UNDECIDED
    figures |= FIGURES | {"leyolo": 0.2, "patches": 0.15}  # worse than its rival, but it has hardly begun to learn
    assert verdict_of(AP, POINTS[AP]) is verdict_of(SAVED, POINTS[SAVED]) is Verdict.UNDECIDED
    figures |= FIGURES | {"floor": 0.55}  # boxes that look at no image do nearly as well
    assert verdict_of(SAVED, POINTS[SAVED]) is Verdict.UNDECIDED


def test_the_rival_is_yolov8n():
    with torch.device("meta"):
        model = room.yolov8()
    assert parameters(model) == 3_157_200
    assert macs(model, 640) == 4_371_456_000
    assert [node.module for node in model.graph.nodes].count("C2f") == 8
    with torch.no_grad():
        small = room.narrow_yolov8(3).eval()
        assert [branch[1].conv.out_channels for branch in small.head.box] == [
            min(64, branch[0].conv.in_channels) for branch in small.head.box
        ]
        assert [tuple(each.shape) for each in small(torch.zeros(1, 3, 32, 64))] == [
            (1, 67, 4, 8),
            (1, 67, 2, 4),
            (1, 67, 1, 2),
        ]


def test_a_c2f_block_joins_all_that_its_bottlenecks_gave():
    torch.manual_seed(0)
    block, x = room.C2f(6, 8, 2, True).double().eval(), torch.randn(1, 6, 5, 5, dtype=torch.float64)
    first, second = block.reduce(x)[:, :4], block.reduce(x)[:, 4:]
    third = second + block.blocks[0].second(block.blocks[0].first(second))
    fourth = third + block.blocks[1].second(block.blocks[1].first(third))
    assert torch.allclose(block(x), block.project(torch.cat([first, second, third, fourth], 1)))


def test_the_arms_are_what_they_say():
    found = counts(64, 1)
    assert 0.98 * found["macs"]["leyolo"] < found["macs"]["narrow yolov8"] <= found["macs"]["leyolo"]
    assert found["macs"]["leyolo"] == pytest.approx(0.486 * found["macs"]["yolov8"], rel=0.01)
    random = room.make("random features", 64)
    free = {name.split(".")[1] for name, p in random.named_parameters() if p.requires_grad}
    assert free == {str(len(random.layers) - 1)}
    assert room.make("patches", 64).strides == (8, 16, 32)
    assert room.make("leyolo", 64).head.label[0][-1].bias[0].item() == pytest.approx(np.log(5 / 64))


@torch.no_grad()
def test_what_is_found_is_held_against_what_is_there(monkeypatch):
    scenes = digit_scenes("choose", 3, size=64)
    model = room.make("patches", 64, 10).eval()
    most = max(len(scene.labels) for scene in scenes)
    boxes, scores = torch.zeros(3, most, 4), torch.zeros(3, most, 10)
    for at, scene in enumerate(scenes):
        boxes[at, : len(scene.labels)] = scene.boxes
        scores[at, torch.arange(len(scene.labels)), scene.labels] = 0.002  # little is sure after few steps
    monkeypatch.setattr(LeYOLO, "decode", lambda self, maps: (boxes, scores))
    assert average_precision(room.outcome(model, scenes)) == pytest.approx(1)
    monkeypatch.setattr(LeYOLO, "decode", lambda self, maps: (boxes, scores.roll(1, -1)))
    assert average_precision(room.outcome(model, scenes)) < 0.2
    one = room.make("patches", 64).eval()  # of one class: every digit is one
    monkeypatch.setattr(LeYOLO, "decode", lambda self, maps: (boxes, scores.amax(2, keepdim=True)))
    found = room.outcome(one, scenes)
    assert {label for each in found for label in each} == {0}
    assert average_precision(found) == pytest.approx(1)


@pytest.mark.parametrize("classes", [1, 10])
def test_the_floor_looks_at_no_image(monkeypatch, classes):
    given = {"train": digit_scenes("train", 3, size=64), "heldout": digit_scenes("heldout", 3, size=64)}
    monkeypatch.setattr(room, "scenes", lambda part, size: given[part])
    assert room.floor.__wrapped__(64, classes) < 0.3
    given["train"] = given["heldout"] = given["train"][:1]
    assert room.floor.__wrapped__(64, classes) == pytest.approx(1)


def test_a_blind_network_cannot_learn_the_scenes():
    """The loss falls where the network sees; where its convolutions see nothing, boxes stay without a place."""
    scenes = digit_scenes("train", 2, size=64)

    def after(model: nn.Module) -> float:
        optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
        for _ in range(12):
            optimizer.zero_grad()
            value = room.loss(model.train(), scenes)
            value.backward()
            optimizer.step()
        return value.item()

    torch.manual_seed(0)
    seeing, blind = room.make("patches", 64), room.make("patches", 64)
    nn.init.zeros_(blind.layers[0].conv.weight).requires_grad_(False)
    assert after(seeing) < 0.9 * after(blind)


@pytest.mark.slow
def test_times_of_both_networks_are_taken():
    found = room.times(32)
    assert "1 threads" in found
    assert all(set(each["ms"]) == {"leyolo small", "yolov8n"} for each in found.values())


@pytest.mark.slow
@pytest.mark.parametrize("arm", ["leyolo", "yolov8", "narrow yolov8"])
def test_every_arm_learns(arm):
    assert room.rate_score(arm, 1e-2) < 0.85
