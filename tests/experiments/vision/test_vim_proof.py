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

SPEED = {"size": 32, "batch": 1, "depth": 2, "beside": [16], "steps": 1}
MEMORY = {"size": 64, "batch": 1, "depth": 2, "beside": [32], "repeats": 2, "steps": 1}
HONEST = {
    "both ways": 0.80, "one way": 0.70, "turning": 0.74, "twice ahead": 0.71, "random second": 0.75, "no scan": 0.50, "random order": 0.55,
    "attention": 0.78,
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


def test_speed_without_accuracy_does_not_pay(scores, monkeypatch):
    monkeypatch.setattr(room, "WIDTH", 48)
    monkeypatch.setattr(room, "fastest", lambda run: 1.0)
    honest = record_of("vim/speedup-1248", SPEED)
    assert judge(honest).verdict in PAYS
    assert set(honest.details["exponents"]) == {"eager", "vim", "sdpa"}
    assert set(honest.details["seconds"]["vim"]) == {"16", "32"}
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
    for control in ("twice ahead", "random second"):  # then it is not the other direction that gains
        scores.update(HONEST)
        scores[control] = 0.85
        assert verdict_of(claim, {"steps": 1}) is Verdict.QUALITY_NOT_SHOWN
    scores.update(HONEST)
    scores["no scan"] = scores["random order"] = 0.85  # says nothing about directions
    assert verdict_of(claim, {"steps": 1}) in PAYS
    scores["one way"] = 0.1  # a rival that was not trained proves nothing
    assert verdict_of(claim, {"steps": 1}) is Verdict.UNDECIDED


@pytest.fixture(scope="module")
def networks():
    """Each arm's network as it begins."""
    found = {}
    for arm in room.ARMS:
        torch.manual_seed(0)
        found[arm] = room.network(arm).eval()
    return found


def shaken(x, place):
    """The image with one patch changed."""
    changed = x.clone()
    row, column = divmod(place, SIZE // 8)
    changed[..., 8 * row : 8 * row + 8, 8 * column : 8 * column + 8] += 1
    return changed


@torch.no_grad()
def test_every_arm_is_what_it_is_called(networks):
    x, seen = torch.randn(1, 1, SIZE, SIZE), {}
    for arm, network in networks.items():
        if arm != "attention":
            before, after = (network.model.feature_maps(image)[8].flatten(2) for image in (x, shaken(x, 17)))
            seen[arm] = (before != after).any(1)[0].tolist()
    assert seen["both ways"] == seen["turning"] == seen["random order"] == [True] * 36
    assert seen["one way"] == seen["twice ahead"] == [False] * 17 + [True] * 19
    assert any(seen["random second"][:17])
    reached = range(8, 26)  # three tokens a block to either side, the class token among them
    assert seen["no scan"] == [place in reached for place in range(36)]


@torch.no_grad()
def test_every_arm_is_read_from_all_its_patches_and_the_sizes_are_fair(networks):
    x = torch.randn(1, 1, SIZE, SIZE)
    for network in networks.values():
        logits = network(x)
        assert logits.shape == (1, 12)
        assert not any(torch.equal(network(shaken(x, place)), logits) for place in (0, 17, 35))
    sizes = {arm: sum(value.numel() for value in network.parameters()) for arm, network in networks.items()}
    assert sizes["both ways"] == sizes["twice ahead"] == sizes["random second"] == sizes["random order"]
    assert sizes["one way"] == sizes["turning"] < sizes["both ways"]
    assert sizes["attention"] == pytest.approx(sizes["both ways"], rel=0.15)


def test_attention_begins_with_weights_that_fit_its_width(networks):
    layers = [layer for layer in networks["attention"].model.modules() if isinstance(layer, torch.nn.Linear)]
    assert all(layer.weight.std() > 0.5 * layer.in_features**-0.5 for layer in layers)
    assert len(layers) == 3 * 6


def test_a_second_scan_that_is_turned_twice_is_a_second_scan_ahead(networks):
    mixer, x = networks["twice ahead"].model.layers[0].mixer, torch.randn(2, 37, 32)
    u, z = mixer.in_proj(x).chunk(2, -1)
    expected = mixer.out_proj((mixer.ahead(u) + mixer.back.mixer(u)) / 2 * torch.nn.functional.silu(z))
    torch.testing.assert_close(mixer(x), expected)


def test_a_random_order_is_drawn_for_each_block_and_undone_after_it():
    torch.manual_seed(0)
    model = room.network("random order")
    orders = [layer.mixer.order for layer in model.model.layers]
    assert not torch.equal(orders[0], orders[1])
    x = torch.randn(2, 37, 32)
    layer = room.Reordered(torch.nn.Identity(), orders[0])
    assert torch.equal(layer(x), x)


def test_the_networks_that_are_timed_see_every_patch_and_have_the_published_sizes():
    x = room.picture(32, 2)
    assert float(x.mean()) == pytest.approx(0, abs=1e-4)
    for arm in ("vim", "eager", "sdpa"):
        assert room.extractor(arm, 32, 2)(x).shape == (2, 5, 192)
    eager, fused = (room.extractor(arm, 32, 4)(x) for arm in ("eager", "sdpa"))
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
