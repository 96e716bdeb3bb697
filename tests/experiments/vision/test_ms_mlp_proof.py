"""MS-MLP's experiments notice when nothing is shifted, when nothing is mixed, and when the fused form computes something else."""

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
from assay.experiments.vision import ms_mlp as room
from assay.experiments.vision.training import Judged
from assay.methods.vision import ms_mlp
from assay.workloads.pictures import PICTURES

TASK = {"steps": 12, "seeds": 3}
SPEED = {"embed_dim": 32, "size": 64, "batch": 1, **TASK}
ACCURACY = {"ms": 82.0, "swin": 80.0, "depthwise": 77.5, "random": 76.0, "shift only": 70.0, "mix only": 77.0}


def logits(arm):
    torch.manual_seed(0)
    model = room.network(arm).eval()
    for value in model.parameters():
        nn.init.normal_(value, std=0.2)
    return model(torch.randn(1, 1, 48, 48, generator=torch.Generator().manual_seed(0)))


@pytest.fixture
def known(monkeypatch):
    """Accuracies as if trained; that of MS-MLP is the one of mixing alone where the two networks compute the same."""

    def learned(arm, steps, seeds):
        stands_for = "mix only" if arm == "ms" and torch.equal(logits("ms"), logits("mix only")) else arm
        noise = np.random.default_rng(sum(map(ord, arm))).normal(0, 0.002, (seeds, len(PICTURES)))
        return Judged(ACCURACY[stands_for] / 100 + noise, Rate(3e-3, (1e-3, 3e-3, 1e-2)))

    monkeypatch.setattr(room, "learned", learned)


def test_an_arm_is_trained_as_itself_at_its_own_rate(monkeypatch):
    monkeypatch.setattr(room, "network", lambda arm: f"network of {arm}")
    monkeypatch.setattr(room, "chosen", lambda name, arm: (name, arm))
    monkeypatch.setattr(room, "judged", lambda make, rate, steps, seeds: (make(), rate, steps, seeds))
    for arm in room.ARMS:
        found = room.learned.__wrapped__(arm, 7, 3)
        assert found == (f"network of {arm}", ("ms_mlp/accuracy", arm), 7, (1, 2, 3))


@pytest.mark.parametrize("arm", room.ARMS)
def test_blocks_begin_open_enough_for_mixing_to_matter(arm):
    """From a layer scale of 1e-6 all arms would be one network for the first hundred steps."""
    torch.manual_seed(0)
    model = room.network(arm)
    for stage, side in zip(model.layers, (12, 6), strict=True):
        width = stage.blocks[0].norm1.weight.numel() if arm == "swin" else stage.blocks[0].gamma.numel()
        x = torch.randn(1, side, side, width) if arm == "swin" else torch.randn(1, width, side, side)
        for block in stage.blocks:
            assert (block(x) - x).std() > 3e-3


def test_every_experiment_declares_what_decides():
    found = {each.claim: each for each in experiments_of("ms_mlp")}
    assert set(found) == {"ms_mlp/imagenet-accuracy-base", "ms_mlp/faster-than-swin"}
    assert found["ms_mlp/faster-than-swin"].decides["small"]["embed_dim"] == 96


def test_the_accuracy_needs_shifts(known, monkeypatch):
    honest = record_of("ms_mlp/imagenet-accuracy-base", TASK)
    assert judge(honest).verdict == Verdict.REPRODUCED
    monkeypatch.setattr(ms_mlp, "shifted", lambda x, steps, dim, edge="cyclic": x)
    broken = record_of("ms_mlp/imagenet-accuracy-base", TASK)
    assert broken.measured.median == pytest.approx(77, abs=0.5)
    assert judge(broken).verdict == Verdict.REFUTED


@pytest.mark.parametrize("arm", ["random", "mix only"])
def test_groups_dealt_out_at_random_or_not_shifted_as_good_as_ours_would_show_nothing(known, monkeypatch, arm):
    monkeypatch.setitem(ACCURACY, arm, 83.0)
    assert verdict_of("ms_mlp/imagenet-accuracy-base", TASK) == Verdict.QUALITY_NOT_SHOWN


def test_being_faster_is_worth_nothing_where_accuracy_is_lost(known, monkeypatch):
    honest = record_of("ms_mlp/faster-than-swin", SPEED)
    assert judge(honest).verdict in PAYS
    controls = {"deleted": ACCURACY["mix only"], "random": ACCURACY["random"], "rival": ACCURACY["depthwise"]}
    assert honest.quality.controls == pytest.approx(controls, abs=0.4)
    monkeypatch.setattr(ms_mlp, "shifted", lambda x, steps, dim, edge="cyclic": x)
    assert verdict_of("ms_mlp/faster-than-swin", SPEED) == Verdict.DOES_NOT_PAY


def test_a_fused_form_that_computes_something_else_refutes(known, monkeypatch):
    real = ms_mlp.FusedMixShift.forward
    monkeypatch.setattr(ms_mlp.FusedMixShift, "forward", lambda self, x: real(self, x).roll(1, 3))
    assert verdict_of("ms_mlp/faster-than-swin", SPEED) == Verdict.REFUTED


def test_arms_that_mix_at_equal_cost():
    macs = {arm: room.work(arm) for arm in room.ARMS}
    assert macs["ms"] == macs["mix only"]
    assert macs["random"] == pytest.approx(macs["ms"], rel=0.02)
    assert macs["depthwise"] == pytest.approx(macs["ms"], rel=0.05)
    assert macs["swin"] == pytest.approx(macs["ms"], rel=0.1)
    assert macs["shift only"] < macs["ms"]


def test_what_each_arm_mixes():
    torch.manual_seed(0)
    ms, shift, mix = (room.mixing_of(arm, 32, (1, 3, 3, 5, 7)) for arm in ("ms", "shift only", "mix only"))
    assert (ms.kernels, ms.shifts) == ((1, 3, 3, 5, 7), (-2, -1, 0, 1, 2))
    assert (shift.kernels, shift.shifts) == ((1,) * 5, (-2, -1, 0, 1, 2))
    assert (mix.kernels, mix.shifts) == ((1, 3, 3, 5, 7), (0,) * 5)
    convnext = room.mixing_of("depthwise", 32, (1, 3, 3, 5, 7))
    assert (convnext.kernel_size, convnext.groups) == ((7, 7), 32)
    kernels = [stage.blocks[2].mix.kernels for stage in room.network("ms").layers]
    assert kernels == [(1, 3, 3, 5, 7), (1, 5, 5, 5, 7)]


def test_random_arms_differ_by_seed_and_keep_the_kernels():
    torch.manual_seed(0)
    first, second = (room.mixing_of("random", 32, (1, 3, 3, 5, 7)) for _ in range(2))
    for mix in (first, second):
        assert sorted(mix.kernels) == [1, 3, 3, 5, 7]
        assert sorted(mix.shifts) == [-2, -1, 0, 1, 2]
    assert (first.kernels, first.shifts) != (second.kernels, second.shifts)


@pytest.mark.slow
@pytest.mark.parametrize("arm", room.ARMS)
def test_every_arm_learns(arm):
    assert room.score(arm, 3e-3) < 0.75  # chance: 0.92
