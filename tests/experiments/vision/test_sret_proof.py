"""Slices that see nothing or never change, and uses that are not made, are noticed."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tests.properties.sabotage import PAYS, record_of, verdict_of

import assay.methods.vision.sret as method
from assay.evidence.types import Verdict
from assay.evidence.verdict import judge
from assay.experiments import experiments_of
from assay.experiments.rates import Rate
from assay.experiments.vision import sret as room
from assay.experiments.vision.training import Judged

POINT = {"model": "sret_t", "size": 64, "batch": 1, "steps": 1}
TINY = {"head_dim": 8, "heads": (1, 2, 4), "mlp_ratio": 2.0, "np_mlp_ratio": 1.0, "depths": (1, 1, 1)}


def share_seen(stage, tokens):
    """The share of the tokens of a stage's input that its first output depends on."""
    x = torch.randn(1, tokens, stage.blocks[0].norm1.weight.numel(), requires_grad=True)
    stage(x)[0, 0].square().sum().backward()
    return float(x.grad.abs().amax(-1).gt(0).float().mean())


def trainable_uses(model):
    """How often a block whose weights learn is run in a forward pass."""
    calls = []
    for block in model.modules():
        if isinstance(block, method.Block):
            block.register_forward_hook(lambda block, given, out: calls.append(next(block.parameters()).requires_grad))
    assert model(torch.randn(1, 1, 32, 32)).shape == (1, 12)
    return sum(calls)


@pytest.fixture
def untrained(monkeypatch):
    """Accuracies follow from what a network does: 30 points for seeing all tokens, 4 for each use of weights that learn.

    No time is taken, so that the network whose passes are timed is a small one.
    """

    def judged(make, rate, steps, *, size):
        torch.manual_seed(0)
        model = make().eval()
        score = 0.3 + 0.3 * share_seen(model.transformers[0], room.TOKENS[0]) + 0.04 * trainable_uses(model)
        return Judged(np.full((3, 12), score + 0.01 * (steps - 1)), rate)

    monkeypatch.setitem(room.CONFIGS, "sret_t", TINY)
    monkeypatch.setattr(room, "judged", judged)
    monkeypatch.setattr(room, "chosen", lambda name, arm: Rate(1e-3, (1e-3, 2e-3)))


def test_every_experiment_declares_what_decides():
    found = {each.claim: each for each in experiments_of("sret")}
    assert set(found) == {"sret/slicing-saving", "sret/recursion-gain"}
    point = found["sret/slicing-saving"].decides["small"]
    assert (point["model"], point["size"]) == ("sret_t", 224)


def test_slices_that_see_nothing_show_no_quality(monkeypatch, untrained):
    honest = record_of("sret/slicing-saving", POINT)
    assert judge(honest).verdict in PAYS
    assert honest.details["macs"]["sliced"] < honest.details["macs"]["whole"]
    assert room.RIVAL in honest.ratios
    assert honest.details["macs"][room.RIVAL] < honest.details["macs"]["whole"]
    monkeypatch.setattr(method, "_in_runs", lambda q, k, v, groups, scale: v)
    assert verdict_of("sret/slicing-saving", POINT) is Verdict.QUALITY_NOT_SHOWN


def test_slices_that_are_the_same_in_every_use_are_worse(monkeypatch, untrained):
    monkeypatch.setattr(method, "strided_order", lambda tokens, groups: torch.arange(tokens))
    assert verdict_of("sret/slicing-saving", POINT) is Verdict.DOES_NOT_PAY


def test_every_arm_has_a_rate_of_its_own(monkeypatch):
    """Searched for as many steps as it is judged with."""
    seen = []
    monkeypatch.setattr(room, "error_for_choice", lambda make, rate, steps, *, size: seen.append(steps) or 0.5)
    for arm in (room.LONGER, "once"):
        room.rate_score(arm, 1e-3)
    assert seen == [room.steps_of(room.LONGER, room.STEPS), room.STEPS]


def test_recursion_that_is_not_made_gains_nothing(monkeypatch, untrained):
    honest = record_of("sret/recursion-gain", {"steps": 1})
    assert judge(honest).verdict in PAYS
    assert honest.controls["random"] < honest.measured.low

    def once(self, x):
        for block in self.blocks:
            x = block(x)
        return x

    monkeypatch.setattr(method.Stage, "forward", once)
    assert verdict_of("sret/recursion-gain", {"steps": 1}) not in PAYS


def test_every_arm_is_what_it_is_called():
    models = {arm: room.make(arm).eval() for arm in room.SETTINGS}
    size = {arm: sum(p.numel() for p in model.parameters()) for arm, model in models.items()}
    learning = {arm: sum(p.numel() for p in model.parameters() if p.requires_grad) for arm, model in models.items()}
    assert size["sliced"] == size["whole"] == size["alone"]
    assert size["once"] == size[room.LONGER] == size["twice"] == learning["frozen"] < size["unshared"] == size["frozen"]
    uses = {arm: trainable_uses(model) for arm, model in models.items()}
    assert uses == {
        "sliced": 8, "whole": 8, "alone": 8, room.RIVAL: 7, "once": 4, "twice": 8, "frozen": 4, "unshared": 8, room.LONGER: 4,
    }  # fmt: skip
    images = torch.zeros(1, 1, 32, 32)
    macs = {arm: room._cost(model, images)["macs"] for arm, model in models.items()}
    assert macs["alone"] < macs["sliced"] < macs["whole"]
    assert macs[room.RIVAL] == pytest.approx(macs["sliced"], rel=0.25)
    assert macs["twice"] == macs["unshared"] == macs["frozen"]
    steps = {arm: room.steps_of(arm, 1000) for arm in models}
    assert macs["once"] * steps.pop(room.LONGER) == pytest.approx(1000 * macs["twice"], rel=1e-3)
    assert set(steps.values()) == {1000}
    whole, alone = (share_seen(models[arm].transformers[0], room.TOKENS[0]) for arm in ("sliced", "alone"))
    assert (whole, alone) == (1.0, pytest.approx(1 / 64))


@pytest.mark.slow
def test_networks_trained_for_a_moment_beat_those_that_see_nothing(monkeypatch):
    monkeypatch.setattr(room, "chosen", lambda name, arm: Rate(4e-3, (2e-3, 4e-3)))
    honest = record_of("sret/slicing-saving", {**POINT, "steps": 100})
    assert honest.quality.controls["deleted"] < honest.quality.candidate
