"""Skip paths that add nothing, or no more than random ones, are noticed; time is worth nothing without accuracy."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from tests.properties.sabotage import PAYS, record_of, verdict_of

import assay.methods.vision.res_vmamba as method
from assay.evidence.types import Verdict
from assay.evidence.verdict import judge
from assay.experiments import experiments_of
from assay.experiments.rates import Rate
from assay.experiments.vision import res_vmamba as room
from assay.experiments.vision.training import SEEDS, SIZE, Judged
from assay.workloads.pictures import PICTURES

HONEST = {
    "learned": 0.80, "none": 0.70, "frozen_random": 0.72, "redrawn": 0.68, "zeros": 0.74,
    "no scan": 0.50, "random order": 0.60, "attention": 0.76,
}  # fmt: skip
ACCURACY, TIME = "res_vmamba/cnfood-accuracy", "res_vmamba/time-over-vit"
TIMED = {"name": "res_vmamba_tiny", "size": 32, "batch": 1, "steps": 1}


@pytest.fixture
def scores(monkeypatch):
    """Accuracies by arm in the place of training; the same for every photograph and seed."""
    known = dict(HONEST)

    def shown(arm, steps):
        return Judged(np.full((len(SEEDS), len(PICTURES)), known[arm]), Rate(1e-2, (1e-3, 1e-2, 3e-2)))

    monkeypatch.setattr(room, "shown", shown)
    return known


def test_every_experiment_declares_what_decides():
    found = {each.claim: each for each in experiments_of("res_vmamba")}
    assert set(found) == {ACCURACY, TIME}
    assert found[ACCURACY].measured_here
    assert "learned" in found[ACCURACY].departures["residual"]


def test_skip_paths_without_a_gain_are_refuted_or_do_not_pay(scores):
    honest = record_of(ACCURACY, {"steps": 1})
    assert judge(honest).verdict in PAYS
    assert honest.measured.median == pytest.approx(80)
    assert honest.baseline == pytest.approx(70)
    assert honest.arms["projections drawn anew in every call, as released"] == pytest.approx(68)
    scores["redrawn"] = 0.1  # the release may fail to train: it decides nothing
    assert verdict_of(ACCURACY, {"steps": 1}) in PAYS
    scores["learned"] = 0.65
    assert verdict_of(ACCURACY, {"steps": 1}) is Verdict.REFUTED
    scores["learned"] = 0.72  # zeros for the new channels are better and cost nothing
    assert verdict_of(ACCURACY, {"steps": 1}) is Verdict.DOES_NOT_PAY
    scores.update(HONEST)
    scores["frozen_random"] = 0.82
    assert verdict_of(ACCURACY, {"steps": 1}) is Verdict.QUALITY_NOT_SHOWN
    scores.update(HONEST)
    scores["none"] = 0.1  # a baseline that was not trained proves nothing
    assert verdict_of(ACCURACY, {"steps": 1}) is Verdict.UNDECIDED


def test_speed_without_accuracy_does_not_pay(scores, monkeypatch):
    monkeypatch.setitem(room.WIDTHS, "res_vmamba_tiny", 64)
    monkeypatch.setattr(room, "build", lambda name: method.ResVMamba(embed_dim=8, depths=(1, 1)))
    honest = record_of(TIME, TIMED)
    assert judge(honest).verdict in PAYS
    counted = honest.details["parameters and MACs"]
    assert set(counted) == {"Res-VMamba", "vision transformer"}
    assert all(found["parameters"] > 0 and found["macs"] > 0 for found in counted.values())
    scores["learned"] = scores["no scan"]
    assert verdict_of(TIME, TIMED) is Verdict.DOES_NOT_PAY
    scores.update(HONEST)
    scores["random order"] = 0.79
    assert verdict_of(TIME, TIMED) is Verdict.QUALITY_NOT_SHOWN


@pytest.mark.parametrize("name", room.WIDTHS)
def test_the_networks_that_are_timed_have_about_as_many_parameters(name):
    with torch.device("meta"):
        ours, theirs = room.build(name), room.transformer(name, 224, "sdpa")
        assert theirs(torch.zeros(1, 3, 224, 224)).logits.shape == (1, 1000)
    sizes = [sum(value.numel() for value in model.parameters()) for model in (ours, theirs)]
    assert 0.9 < sizes[1] / sizes[0] < 1.12


def test_stored_scores_and_fused_attention_are_the_same_transformer(monkeypatch):
    monkeypatch.setitem(room.WIDTHS, "res_vmamba_tiny", 64)
    eager, fused = (room.transformer("res_vmamba_tiny", 32, attention) for attention in ("eager", "sdpa"))
    assert (eager.config._attn_implementation, fused.config._attn_implementation) == ("eager", "sdpa")
    fused.load_state_dict(eager.state_dict())
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(eager(x).logits, fused(x).logits, rtol=1e-3, atol=1e-4)


def test_every_arm_is_what_it_is_called():
    x, sizes, states = torch.randn(2, 1, SIZE, SIZE), {}, {}
    for arm in room.PATHS + room.OTHERS:
        torch.manual_seed(0)
        model = room.network(arm).eval()
        with torch.no_grad():
            first, second = model(x), model(x)
        assert first.shape == (2, 12)
        assert torch.equal(first, second) == (arm != "redrawn")
        sizes[arm] = sum(value.numel() for value in model.parameters() if value.requires_grad)
        states[arm] = model.state_dict().keys()
    assert states["none"] == states["redrawn"] == states["zeros"]
    assert sizes["none"] == sizes["redrawn"] == sizes["zeros"] == sizes["frozen_random"]
    assert sizes["learned"] == sizes["random order"] == sizes["none"] + 2 * 16 * 16 + 32 + 2 * 32 * 32 + 64
    assert sizes["no scan"] < sizes["learned"]
    assert sizes["attention"] == pytest.approx(sizes["learned"], rel=0.15)


def test_attention_begins_with_weights_that_fit_its_width():
    layers = [layer for layer in room.network("attention").model.modules() if isinstance(layer, torch.nn.Linear)]
    assert all(layer.weight.std() > 0.5 * layer.in_features**-0.5 for layer in layers)
    assert len(layers) == 3 * 6


def test_zeros_keep_the_pooled_map_and_add_nothing():
    x = torch.randn(1, 5, 4, 3)
    y = room.Zeros()(x)
    assert y.shape == (1, 3, 2, 6)
    assert torch.equal(y[0, 0, 0, :3], x[0, :2, :2].amax((0, 1)))
    assert not y[..., 3:].any()


def test_a_random_order_is_the_same_in_every_run_and_undone():
    torch.manual_seed(0)
    layer = room.Shuffled(room.NoScan())
    x = torch.randn(2, 9, 4)
    assert torch.equal(layer(x)[0], x)
    inner = method.SelectiveSSM(4, states=2)
    layer = room.Shuffled(inner)
    y = layer(x)[0]
    assert torch.equal(copy.deepcopy(layer)(x)[0], y)
    assert not torch.allclose(y, inner(x)[0])


@pytest.mark.slow
def test_training_notices_skip_paths_that_carry_nothing(monkeypatch):
    """Projections whose output is dropped: then learned paths are VMamba, and the claim cannot pay."""
    monkeypatch.setattr(method.Shortcut, "forward", lambda self, x: x.new_zeros(()))
    broken = record_of(ACCURACY, {"steps": room.STEPS})
    assert judge(broken).verdict not in PAYS
