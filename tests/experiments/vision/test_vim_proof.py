"""A Vim that mixes nothing, or no better than one direction, is noticed; memory and time are judged against fused attention too."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from tests.properties.sabotage import PAYS, record_of, verdict_of

import assay.methods.vision.vim as method
from assay.evidence.types import Verdict
from assay.evidence.verdict import judge
from assay.experiments import experiments_of
from assay.experiments.rates import Rate
from assay.experiments.vision import vim as room
from assay.experiments.vision.training import SEEDS, SIZE, Judged
from assay.workloads.pictures import PICTURES

SPEED = {"size": 64, "batch": 1, "depth": 2, "beside": [32], "steps": 1}
MEMORY = {"size": 64, "batch": 1, "depth": 2, "beside": [32], "repeats": 2, "steps": 1}
HONEST = {
    "both ways": 0.80, "one way": 0.70, "turning": 0.74, "no scan": 0.50, "random order": 0.55, "attention": 0.78,
}  # fmt: skip


@pytest.fixture
def scores(monkeypatch):
    """Accuracies by arm in the place of training; the same for every photograph and seed."""
    known = dict(HONEST)

    def shown(arm, steps):
        return Judged(np.full((len(SEEDS), len(PICTURES)), known[arm]), Rate(1e-2, (1e-3, 1e-2, 3e-2)))

    monkeypatch.setattr(room, "shown", shown)
    return known


@pytest.fixture
def peaks(monkeypatch):
    """Bytes by arm in the place of child processes, in proportion to the area."""
    known = {"eager": 1000, "vim": 200, "sdpa": 400}

    class Peak:
        def __init__(self, extra_bytes):
            self.extra_bytes = extra_bytes

    def peak(target, call, **limits):
        return Peak(known[call["arm"]] * call["size"] ** 2)

    monkeypatch.setattr(room, "peak_memory_of_child", peak)
    return known


def test_every_experiment_declares_what_decides():
    found = {each.claim: each for each in experiments_of("vim")}
    assert set(found) == {"vim/speedup-1248", "vim/memory-1248", "vim/bidirectional-accuracy"}
    for claim in ("vim/speedup-1248", "vim/memory-1248"):
        for scale in ("small", "full"):
            assert found[claim].decides[scale]["size"] == found[claim].paper["size"] == 1248
        assert found[claim].operator is room.MIXING
        assert found[claim].guard is room.GUARD


def test_speed_without_accuracy_does_not_pay(scores):
    honest = record_of("vim/speedup-1248", SPEED)
    assert judge(honest).verdict in PAYS
    assert set(honest.details["exponents"]) == {"eager", "vim", "sdpa"}
    assert set(honest.details["seconds"]["vim"]) == {"32", "64"}
    scores["both ways"] = scores["no scan"]
    assert verdict_of("vim/speedup-1248", SPEED) is Verdict.DOES_NOT_PAY
    scores.update(HONEST)
    scores["random order"] = scores["both ways"]
    assert verdict_of("vim/speedup-1248", SPEED) is Verdict.QUALITY_NOT_SHOWN
    scores.update(HONEST)
    scores["attention"] = 0.1  # a rival that was not trained proves nothing
    assert verdict_of("vim/speedup-1248", SPEED) is Verdict.UNDECIDED


def test_memory_is_judged_against_both_kinds_of_attention(scores, peaks):
    honest = record_of("vim/memory-1248", MEMORY)
    assert judge(honest).verdict in PAYS
    assert honest.measured.median == pytest.approx(80)
    assert honest.free == pytest.approx(60)
    assert all(slope == pytest.approx(1) for arm in honest.details["exponents"].values() for slope in arm.values())
    peaks["sdpa"] = 100
    assert verdict_of("vim/memory-1248", MEMORY) is Verdict.DOES_NOT_PAY
    peaks["vim"] = 1200
    assert verdict_of("vim/memory-1248", MEMORY) is Verdict.REFUTED
    peaks.update(sdpa=400, vim=200)
    scores["both ways"] = scores["no scan"]
    assert verdict_of("vim/memory-1248", MEMORY) is Verdict.DOES_NOT_PAY


def test_a_second_direction_without_a_gain_is_refuted_or_does_not_pay(scores):
    claim = "vim/bidirectional-accuracy"
    honest = record_of(claim, {"steps": 1})
    assert judge(honest).verdict in PAYS
    assert honest.measured.median == pytest.approx(10)
    assert honest.free == pytest.approx(4)
    scores["both ways"] = 0.6
    assert verdict_of(claim, {"steps": 1}) is Verdict.REFUTED
    scores["both ways"] = 0.72  # one direction that turns is better at half the scans
    assert verdict_of(claim, {"steps": 1}) is Verdict.DOES_NOT_PAY
    scores.update(HONEST)
    scores["random order"] = 0.85
    assert verdict_of(claim, {"steps": 1}) is Verdict.QUALITY_NOT_SHOWN


def sees(model, x, place):
    """Whether the logits depend on one patch."""
    changed = x.clone()
    row, column = divmod(place, SIZE // 8)
    changed[..., 8 * row : 8 * row + 8, 8 * column : 8 * column + 8] += 1
    return not torch.equal(model(changed), model(x))


def test_every_arm_is_what_it_is_called():
    x, seen, sizes = torch.randn(1, 1, SIZE, SIZE), {}, {}
    for arm in room.ARMS:
        torch.manual_seed(0)
        model = room.network(arm).eval()
        with torch.no_grad():
            seen[arm] = [sees(model, x, place) for place in (0, 17, 18, 35)]
        sizes[arm] = sum(value.numel() for value in model.parameters())
    everything = [True] * 4
    assert seen["both ways"] == seen["turning"] == seen["random order"] == seen["attention"] == everything
    assert seen["one way"] == [True, True, False, False]  # the class token stands before patch 18
    assert seen["no scan"] == [False, True, True, False]  # the convolutions reach three patches a block
    assert sizes["both ways"] == sizes["random order"]
    assert sizes["one way"] == sizes["turning"]
    assert sizes["attention"] == pytest.approx(sizes["both ways"], rel=0.15)


def test_a_random_order_is_drawn_for_each_block_and_undone_after_it():
    torch.manual_seed(0)
    model = room.network("random order")
    orders = [layer.mixer.order for layer in model.layers]
    assert not torch.equal(orders[0], orders[1])
    x = torch.randn(2, 37, 32)
    layer = room.Reordered(torch.nn.Identity(), orders[0])
    assert torch.equal(layer(x), x)


def test_the_networks_that_are_timed_see_every_patch_and_have_the_published_sizes():
    x = room.picture(64, 2)
    assert float(x.mean()) == pytest.approx(0, abs=1e-4)
    for arm in ("vim", "eager", "sdpa"):
        assert room.extractor(arm, 64, 2)(x).shape == (2, 17, 192)
    eager, fused = (room.extractor(arm, 64, 4)(x) for arm in ("eager", "sdpa"))
    torch.testing.assert_close(eager, fused, rtol=1e-3, atol=1e-4)


def test_slopes_are_exponents_in_the_number_of_patches():
    found = room.slopes({100: 3.0, 200: 12.0, 400: 192.0})
    assert list(found) == ["100 to 200 pixels", "200 to 400 pixels"]
    assert list(found.values()) == pytest.approx([1.0, 2.0])
    assert math.isclose(room.slopes({200: 12.0, 100: 3.0})["100 to 200 pixels"], 1.0)


@pytest.mark.slow
def test_training_notices_a_second_direction_that_is_not_turned(monkeypatch):
    def unturned(self, x):
        u, z = self.in_proj(x).chunk(2, -1)
        y = self.ahead(u) if self.back is None else (self.ahead(u) + self.back(u)) / 2
        return self.out_proj(y * torch.nn.functional.silu(z))

    monkeypatch.setattr(method.BiMamba, "forward", unturned)
    broken = record_of("vim/bidirectional-accuracy", {"steps": room.STEPS})
    assert judge(broken).verdict not in PAYS
