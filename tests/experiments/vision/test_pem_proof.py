"""PEM's experiments notice when the prototypes are any pixels, or no better than those, and when the network is not lighter."""

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
from assay.experiments.vision import pem as room
from assay.experiments.vision.pem import Learned
from assay.experiments.vision.scenes import Scored
from assay.methods.vision.pem import attention
from assay.workloads.digit_scenes import digit_scenes

TASK = {"steps": 4, "seeds": 3}
LAYER = {"height": 4, "width": 8, "queries": 5, **TASK}
NETWORK = {"height": 64, "width": 64, **TASK}
QUALITY = {"prototypes": 0.47, "masked": 0.47, "random": 0.38, "pooled": 0.45, "none": 0.30}


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

    monkeypatch.setattr(room, "learned", learned)
    monkeypatch.setattr(room, "floor", lambda: 0.08)


@pytest.fixture
def any_pixels(monkeypatch):
    def call():
        def choose(queries, pixels, *, seen=None, chunk=None):
            return torch.randint(pixels.shape[2], queries.shape[:3])

        monkeypatch.setattr(attention, "nearest_pixels", choose)

    return call


@pytest.fixture
def light(monkeypatch):
    """Networks that are made in no time."""
    monkeypatch.setattr(room, "mask2former", lambda num_labels=19: nn.Conv2d(3, 4, 3))
    monkeypatch.setattr(room, "build_pem", lambda name, **settings: room.network("prototypes"))
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
    monkeypatch.setitem(QUALITY, control, 0.47)
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
        monkeypatch.setitem(QUALITY, arm, 0.1)
    assert verdict_of("pem/real-time-quality", TASK) == Verdict.UNDECIDED


def test_masked_attention_is_run_as_mask2former_runs_it(known):
    trial = next(each for each in experiments_of("pem") if each.claim.endswith("cross-attention-speedup")).run(**LAYER)
    found = {"free": trial.free(), "prototypes": trial.candidate(), "at once": trial.arms["all similarities at once"]()}
    assert trial.baseline().shape == found["free"].shape == found["prototypes"].shape == (1, 5, 256)
    assert torch.equal(found["prototypes"], found["at once"])


def test_arms_differ_in_the_cross_attention_alone():
    scene = digit_scenes("train", 2, size=64)
    keys = {arm: {key for key in room.network(arm).state_dict() if ".cross." not in key} for arm in room.ARMS}
    assert all(each == keys["prototypes"] for each in keys.values())
    torch.manual_seed(0)
    for arm in room.ARMS:
        model = room.network(arm)
        room.loss(model, scene).backward()
        reached = model.decoder.inputs[0].weight.grad
        assert (reached is not None and bool(reached.any())) == (arm != "none")
        tables = room.outcome(model.eval(), scene)
        assert [table.shape for table in tables[0]] == [(11, 4), (11, 11)]


def test_random_pixels_are_of_the_mask_and_pooled_ones_their_mean():
    pixels, queries, seen = torch.randn(1, 12, 8), torch.randn(1, 3, 8), torch.zeros(1, 3, 12, dtype=torch.bool)
    seen[0, 0, 4], seen[0, 1, 2:5], seen[0, 2] = True, True, True
    random = room.RandomPixels(8, 2).prototypes(queries, pixels, seen)
    assert torch.equal(random[0, 0], pixels[0, 4])
    assert any(torch.equal(random[0, 1, :4], pixels[0, i, :4]) for i in (2, 3, 4))
    pooled = room.PooledPixels(8, 2).prototypes(queries, pixels, seen)
    assert torch.allclose(pooled[0], torch.stack([pixels[0, 4], pixels[0, 2:5].mean(0), pixels[0].mean(0)]), atol=1e-6)


def test_all_texture_is_a_floor_below_a_tenth():
    assert 0.05 < room.floor() < 0.1


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
    assert room.score(arm, 3e-3) < 0.8
