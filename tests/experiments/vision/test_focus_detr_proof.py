"""Focus-DETR's experiments notice when tokens are not chosen by the score, and when a random choice would do."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tests.properties.sabotage import PAYS, record_of, verdict_of
from torch import nn

from assay.evidence.types import Verdict
from assay.evidence.verdict import judge
from assay.experiments import experiments_of
from assay.experiments.rates import Rate
from assay.experiments.vision import focus_detr as room
from assay.experiments.vision.scenes import Scored, scenes
from assay.measure.cost import count_cost
from assay.measure.detection import Match
from assay.methods.vision.focus_detr import FocusEncoder
from assay.workloads.digit_scenes import digit_scenes

TASK = {"steps": 2, "seeds": 3}
TIMED = {"height": 64, "width": 96, "batch": 1, **TASK}
AP = {"focus": 0.45, "sparse": 0.42, "dense": 0.46, "shallow": 0.43, "random": 0.38, "norm": 0.4, "none": 0.3}


def seen(found, of=100):
    """A scene of `of` objects, of which `found` were found, and nothing else."""
    hits = np.ones((10, found), bool)
    return room.Seen({0: Match(np.linspace(1, 0.5, found), hits, ~hits, of)}, 0.8)


def chooses_by_score():
    """Whether the sparse encoder's tokens depend on the weights of its score."""
    torch.manual_seed(0)
    model, some = room.SceneDetector("focus").eval(), digit_scenes("choose", 1, size=room.SIDE)
    orders = []
    for _ in range(2):
        with torch.no_grad():
            model(room.pixels(some))
            orders.append(model.encoder.focused.order)
            for value in model.encoder.scorer.parameters():
                nn.init.normal_(value)
    return not torch.equal(*orders)


@pytest.fixture
def known(monkeypatch):
    """Detections as if trained; those of the sparse encoder are the norm's where it does not choose by its score."""
    given = dict(AP)

    def learned(arm, steps, seeds):
        value = given["norm" if arm == "focus" and not chooses_by_score() else arm]
        draws = np.random.default_rng(sum(map(ord, arm))).normal(100 * value, 0.5, (seeds, 20)).round().astype(int)
        return Scored(tuple(tuple(map(seen, row)) for row in draws), room.precision, Rate(3e-3, (1e-3, 3e-3, 1e-2)))

    monkeypatch.setattr(room, "learned", learned)
    monkeypatch.setattr("assay.experiments.vision.scenes.DRAWS", 20)
    monkeypatch.setattr(room, "floor", lambda: 0.01)
    return given


@pytest.fixture
def unscored(monkeypatch):
    def call():
        monkeypatch.setattr(FocusEncoder, "scores", lambda self, values, *rest: values.norm(dim=2))

    return call


def test_every_experiment_declares_what_decides():
    found = {each.claim: each for each in experiments_of("focus_detr")}
    assert set(found) == {"focus_detr/coco-ap", "focus_detr/encoder-speedup"}
    assert found["focus_detr/encoder-speedup"].decides["full"]["width"] == 1333


def test_the_gain_over_objectness_needs_the_score(known, unscored):
    honest = record_of("focus_detr/coco-ap", TASK)
    assert judge(honest).verdict is Verdict.REPRODUCED
    assert honest.measured.median == pytest.approx(45, abs=1)
    assert set(honest.trained) == {"focus", "sparse", "dense", "shallow", "norm"}
    unscored()
    assert verdict_of("focus_detr/coco-ap", TASK) is Verdict.REFUTED


def test_random_tokens_as_good_would_show_nothing(known):
    known["random"] = 0.46
    assert verdict_of("focus_detr/coco-ap", TASK) is Verdict.QUALITY_NOT_SHOWN


def test_an_arm_that_learned_nothing_decides_nothing(known, monkeypatch):
    monkeypatch.setattr(room, "floor", lambda: 0.4)
    assert verdict_of("focus_detr/coco-ap", TASK) is Verdict.UNDECIDED


def test_a_fast_encoder_has_to_be_as_precise(known, unscored):
    known["norm"] = 0.36
    honest = record_of("focus_detr/encoder-speedup", TIMED)
    assert judge(honest).verdict in PAYS
    assert honest.details["MACs"]["focus"] < honest.details["MACs"]["dense"]
    assert set(honest.trained) == {"focus", "dense", "shallow"}
    assert honest.quality.controls["rival"] == pytest.approx(43, abs=1)
    unscored()
    assert verdict_of("focus_detr/encoder-speedup", TIMED) is Verdict.DOES_NOT_PAY


def test_a_precision_that_random_tokens_reach_shows_nothing(known):
    known |= {"random": 0.45, "none": 0.45}
    assert verdict_of("focus_detr/encoder-speedup", TIMED) is Verdict.QUALITY_NOT_SHOWN


def test_both_sparse_encoders_do_the_same_work():
    some, work = room.pixels(digit_scenes("choose", 1, size=room.SIDE)), {}
    for arm in room.ARMS:
        torch.manual_seed(0)
        model = room.SceneDetector(arm).eval()
        work[arm] = count_cost(model, some).macs
        if arm == "none":
            backbone = work[arm]
    work = {arm: macs - backbone for arm, macs in work.items()}
    assert work["focus"] == room.focus_macs()
    assert 0.98 * work["focus"] < work["sparse"] <= work["focus"] < 0.75 * work["dense"]
    assert work["random"] == work["norm"] < work["focus"]
    assert work["shallow"] == work["dense"] / 3 < work["focus"]


def test_what_is_found_is_judged():
    some = digit_scenes("choose", 3, size=room.SIDE)
    model, (positive, boxes) = room.SceneDetector("norm").eval(), room.targets(some)
    logits = torch.where(positive, 5.0, -9.0)[..., None]
    for at, scene in enumerate(some):
        assert {tuple(box) for box in boxes[at, positive[at]].tolist()} == {tuple(box) for box in scene.boxes.tolist()}
    model.forward = lambda images: (logits, boxes)
    assert room.precision(room.outcome(model, some)) == pytest.approx(1)
    logits.neg_()
    assert room.precision(room.outcome(model, some)) < 0.5


def test_the_choice_is_judged_by_ranks():
    scores, positive = torch.rand(30, generator=torch.Generator().manual_seed(0)), torch.arange(30) % 4 == 0
    pairs = scores[positive][:, None] > scores[~positive]
    assert room.area_under_curve(scores, positive) == pytest.approx(pairs.double().mean().item())
    assert np.isnan(room.area_under_curve(scores, positive & False))


def test_every_arm_has_a_gradient_for_what_it_is_made_of():
    some = digit_scenes("train", 2, size=room.SIDE)
    for arm in room.ARMS:
        torch.manual_seed(0)
        model = room.SceneDetector(arm).train()
        room.loss(model, some).backward()
        without = {name for name, value in model.named_parameters() if value.grad is None}
        unused = (
            ("encoder.embed", "encoder.scorer") if arm in ("random", "norm") else ("levels",) if arm == "none" else ()
        )
        assert all(name.startswith(unused) for name in without), arm
        assert bool(without) == bool(unused)


def test_all_arms_begin_with_the_same_backbone_and_head():
    weights = {name: value for name, value in room.SceneDetector("none").state_dict().items() if name != "levels"}
    for arm in room.ARMS:
        torch.manual_seed(1)
        model = room.begun(arm, weights)
        fresh = {
            name for name, value in model.state_dict().items() if not torch.equal(value, weights.get(name, value + 1))
        }
        assert all(name.startswith(("encoder", "levels")) for name in fresh)
        assert bool(weights)
    with pytest.raises(RuntimeError, match="Unexpected key"):
        room.begun("focus", {"classfy.weight": torch.zeros(1)})


@pytest.mark.slow
def test_the_floor_is_low():
    assert room.floor() < 0.02
    assert len(scenes("heldout", room.SIDE)) == 60


@pytest.mark.slow
@pytest.mark.parametrize("arm", [arm for arm in room.ARMS if arm != "none"])
def test_every_arm_learns(arm):
    assert room.score(arm, 3e-3) < 0.9
