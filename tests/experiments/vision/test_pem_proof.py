"""PEM's experiments notice when the prototypes are any pixels, or no better than those, and when the network is not lighter."""

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
from assay.experiments.vision import pem as room
from assay.experiments.vision.pem import Learned
from assay.experiments.vision.scenes import Scored
from assay.experiments.vision.scenes import pixels as scene_pixels
from assay.methods.vision.pem import attention
from assay.workloads.digit_scenes import digit_scenes

TASK = {"steps": 4, "seeds": 3}
LAYER = {"height": 4, "width": 8, "queries": 5, **TASK}
NETWORK = {"height": 64, "width": 64, **TASK}
QUALITY = {"prototypes": 0.67, "masked": 0.67, "random": 0.58, "pooled": 0.65, "none": 0.50}


@pytest.fixture
def known(monkeypatch):
    """Qualities as if trained; prototypes are as good as random pixels where what is chosen is not the nearest."""

    def learned(arm, steps, seeds):
        queries, pixels = torch.randn(1, 2, 7, 4), torch.randn(1, 2, 50, 4)
        nearest = attention.nearest_pixels_reference(queries, pixels)
        works = torch.equal(attention.nearest_pixels(queries, pixels, seen=None, chunk=None), nearest)
        value = QUALITY["random" if arm == "prototypes" and not works else arm]
        noise = np.random.default_rng(sum(map(ord, arm))).normal(0, 0.01, (seeds, 40))
        by_pq = Scored(
            tuple(map(tuple, (value + noise - noise.mean()).tolist())),
            lambda every: float(np.mean(every)),
            Rate(3e-3, (1e-3, 3e-3, 1e-2)),
        )
        return Learned(by_pq, by_pq)

    monkeypatch.setattr("assay.experiments.vision.scenes.DRAWS", 40)
    monkeypatch.setattr(room, "learned", learned)
    monkeypatch.setattr(room, "floor", lambda: 0.45)


@pytest.fixture
def any_pixels(monkeypatch):
    def call():
        def choose(queries, pixels, *, seen=None, chunk=None):
            return torch.randint(pixels.shape[2], queries.shape[:3])

        monkeypatch.setattr(attention, "nearest_pixels", choose)

    return call


class Light(nn.Conv2d):
    def __init__(self):
        super().__init__(3, 4, 3)

    def forward(self, images, auxiliary=None):
        return super().forward(images)


@pytest.fixture
def trunks(monkeypatch):
    """Trunks that were not trained."""

    @cache
    def trunk(steps):
        torch.manual_seed(0)
        calls.append(steps)
        return room.Trunk().eval()

    calls = []
    monkeypatch.setattr(room, "trunk", trunk)
    monkeypatch.setattr(room, "_MAPS", {})
    return calls


@pytest.fixture
def light(monkeypatch):
    """Networks that are made in no time."""
    monkeypatch.setattr(room, "mask2former", lambda num_labels=19: nn.Conv2d(3, 4, 3))
    monkeypatch.setattr(room, "build_pem", lambda name, **settings: Light())
    monkeypatch.setattr("assay.methods.vision.pem.apply_pem", lambda model: model)


def test_every_experiment_declares_what_decides():
    found = {each.claim: each for each in experiments_of("pem")}
    assert set(found) == {"pem/real-time-quality", "pem/computation", "pem/cross-attention-speedup", "pem/speedup"}
    layer = found["pem/cross-attention-speedup"].decides["full"]
    assert (layer["height"], layer["width"], layer["queries"]) == (64, 128, 100)
    assert found["pem/computation"].decides["small"] == {"height": 1024, "width": 2048}


def test_the_quality_is_that_of_the_nearest_pixels(known, any_pixels):
    assert verdict_of("pem/real-time-quality", TASK) == Verdict.REPRODUCED
    any_pixels()
    broken = record_of("pem/real-time-quality", TASK)
    assert judge(broken).verdict == Verdict.REFUTED
    assert broken.measured.median == pytest.approx(-9, abs=0.5)


@pytest.mark.parametrize("control", ["random", "none"])
def test_a_control_as_good_as_prototypes_would_show_nothing(known, monkeypatch, control):
    monkeypatch.setitem(QUALITY, control, 0.67)
    assert verdict_of("pem/real-time-quality", TASK) == Verdict.QUALITY_NOT_SHOWN
    assert verdict_of("pem/cross-attention-speedup", LAYER) == Verdict.QUALITY_NOT_SHOWN


def test_a_fast_layer_is_worth_it_only_as_good_as_masked_attention(known, any_pixels):
    assert verdict_of("pem/cross-attention-speedup", LAYER) in PAYS
    any_pixels()
    assert verdict_of("pem/cross-attention-speedup", LAYER) not in PAYS


def test_a_fast_network_is_worth_it_only_as_good(known, light, any_pixels):
    assert verdict_of("pem/speedup", NETWORK) in PAYS
    any_pixels()
    assert verdict_of("pem/speedup", NETWORK) not in PAYS


def test_arms_that_hardly_beat_the_texture_are_void(known, monkeypatch):
    for arm in QUALITY:
        monkeypatch.setitem(QUALITY, arm, 0.48)
    assert verdict_of("pem/real-time-quality", TASK) == Verdict.UNDECIDED


def test_masked_attention_is_run_as_mask2former_runs_it(known):
    trial = next(each for each in experiments_of("pem") if each.claim.endswith("cross-attention-speedup")).run(**LAYER)
    found = {"free": trial.free(), "prototypes": trial.candidate(), "at once": trial.arms["all similarities at once"]()}
    assert trial.baseline().shape == found["free"].shape == found["prototypes"].shape == (1, 5, 256)
    assert torch.equal(found["prototypes"], found["at once"])


def test_arms_differ_in_the_cross_attention_alone(trunks):
    some = digit_scenes("train", 2, size=64)
    same = {key for key in room.Queries("prototypes", 4).state_dict() if ".cross." not in key}
    for arm in room.ARMS:
        torch.manual_seed(0)
        model = room.Queries(arm, 4)
        assert {key for key in model.state_dict() if ".cross." not in key} == same
        room.loss(model, some).backward()
        reached = model.inputs[0].weight.grad
        assert (reached is not None and bool(reached.any())) == (arm != "none")
    tables = room.outcome(model.eval(), some)
    assert [table.shape for table in tables[0]] == [(2, 4), (2, 2)]
    assert trunks == [4]  # all stand on one


def test_maps_are_computed_once_and_are_those_of_the_trunk(trunks, monkeypatch):
    some = digit_scenes("choose", 3, size=64)
    room.maps_of(some[:2], 4)
    runs = []
    monkeypatch.setattr(room, "pixels", lambda new: (runs.append(len(new)), scene_pixels(new))[1])
    features, maps = room.maps_of(some[::-1], 4)
    room.maps_of(some, 4)
    assert runs == [1]
    with torch.no_grad():
        expected = room.trunk(4)(scene_pixels(some[::-1]))
    assert torch.allclose(features, expected[0], atol=1e-5)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(maps, expected[1], strict=True))
    assert [each.shape[2] for each in (features, *maps)] == [32, 4, 8, 16]


def test_the_trunk_is_trained_before_an_arm_sets_its_seed(monkeypatch):
    calls = []
    rate = Rate(1.0, (1.0, 2.0))
    monkeypatch.setattr(room, "trunk", lambda steps: calls.append(("trunk", steps)))
    monkeypatch.setattr(room, "chosen", lambda name, arm: rate)
    monkeypatch.setattr(room, "error_for_choice", lambda *given, **rest: calls.append("arm"))
    monkeypatch.setattr(room, "scored", lambda *given, **rest: (calls.append("arm"), Scored((), room.pq, rate))[1])
    room.score("masked", 1.0)
    room.learned.__wrapped__("masked", 7, 3)
    assert calls == [("trunk", room.LITTLE), "arm", ("trunk", 7), "arm"]


def test_a_trunk_learns_which_pixels_are_of_one_segment():
    some = digit_scenes("train", 2, size=64)
    torch.manual_seed(0)
    model = room.Trunk()
    optimizer, losses = torch.optim.AdamW(model.parameters(), 1e-2), []
    for _ in range(8):
        value = room.trunk_loss(model, some)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        losses.append(value.item())
    assert sum(losses[-2:]) < 0.8 * sum(losses[:2])
    assert all(each.grad is not None for each in model.parameters())


def test_one_class_of_digits():
    scene = digit_scenes("heldout", 1, size=64)[0]
    truth = torch.as_tensor(room.truth_of(scene))
    assert torch.equal(truth[..., 0] == room.DIGIT, scene.masks.any(0))
    assert torch.equal(truth[..., 1], scene.panoptic[..., 1])


def test_random_pixels_are_of_the_mask_and_pooled_ones_their_mean():
    pixels, queries, seen = torch.randn(1, 12, 8), torch.randn(1, 3, 8), torch.zeros(1, 3, 12, dtype=torch.bool)
    seen[0, 0, 4], seen[0, 1, 2:5], seen[0, 2] = True, True, True
    random = room.RandomPixels(8, 2).prototypes(queries, pixels, seen)
    assert torch.equal(random[0, 0], pixels[0, 4])
    assert any(torch.equal(random[0, 1, :4], pixels[0, i, :4]) for i in (2, 3, 4))
    pooled = room.PooledPixels(8, 2).prototypes(queries, pixels, seen)
    assert torch.allclose(pooled[0], torch.stack([pixels[0, 4], pixels[0, 2:5].mean(0), pixels[0].mean(0)]), atol=1e-6)


def test_all_texture_is_a_floor_below_a_half(monkeypatch):
    monkeypatch.setattr(room, "scenes", lambda part, size: digit_scenes(part, 6, size=size))
    assert 0.3 < room.floor.__wrapped__() < 0.5  # the texture whole, no digit


@pytest.mark.slow
def test_the_network_takes_less_than_half_of_mask2formers_work():
    record = record_of("pem/computation", {"height": 1024, "width": 2048})
    assert judge(record).verdict == Verdict.COMPUTED
    assert record.measured.median > 2
    counted = record.details["M parameters"]
    assert counted["Mask2Former"] == pytest.approx(44.0, abs=0.1)
    assert counted["PEM"] == pytest.approx(35.53, abs=0.01)


@pytest.mark.slow
@pytest.mark.parametrize("arm", ["prototypes", "masked", "pooled"])
def test_every_arm_learns(arm):
    assert room.score(arm, 3e-3) < 0.45
