"""Swin's experiments notice when the windows are not shifted, or when the mask of the shift is left out."""

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
from assay.experiments.vision import swin as room
from assay.experiments.vision.training import Judged
from assay.methods.core.vision import windows
from assay.methods.core.vision.windows import ShiftedWindowAttention
from assay.workloads.pictures import PICTURES

TASK = {"steps": 12, "seeds": 3}
LAYER = {"side": 14, "channels": 32, "heads": 1, "window": 7, "batch": 1, **TASK}
NETWORK = {"embed_dim": 24, "depths": [2, 2], "size": 112, "batch": 1}
ACCURACY = {"shift": 80.0, "none": 76.0, "random": 70.0, "grid": 75.0, "global": 80.5}


@pytest.fixture
def known(monkeypatch):
    """Accuracies as if trained; that of shifted windows is the one of unshifted ones where the two networks compute the same."""

    def learned(arm, steps, seeds):
        outputs = []
        for name in ("shift", "none"):
            torch.manual_seed(0)
            model = room.network(name).eval()
            for value in model.parameters():
                nn.init.normal_(value, std=0.2)
            outputs.append(model(torch.randn(1, 1, 48, 48, generator=torch.Generator().manual_seed(0))))
        value = ACCURACY["none" if arm == "shift" and torch.equal(*outputs) else arm] / 100
        noise = np.random.default_rng(sum(map(ord, arm))).normal(0, 0.002, (seeds, len(PICTURES)))
        return Judged(value + noise, Rate(3e-3, (1e-3, 3e-3, 1e-2)))

    monkeypatch.setattr(room, "learned", learned)


@pytest.fixture
def unshifted(monkeypatch):
    def call():
        real = ShiftedWindowAttention.along
        monkeypatch.setattr(
            ShiftedWindowAttention, "along", lambda self, side: (real(self, side)[0], 0, real(self, side)[2])
        )

    return call


def test_an_arm_is_trained_as_itself_at_its_own_rate(monkeypatch):
    monkeypatch.setattr(room, "network", lambda arm: f"network of {arm}")
    monkeypatch.setattr(room, "chosen", lambda name, arm: (name, arm))
    monkeypatch.setattr(room, "judged", lambda make, rate, steps, seeds: (make(), rate, steps, seeds))
    for arm in room.ARMS:
        found = room.learned.__wrapped__(arm, 7, 3)
        assert found == (f"network of {arm}", ("swin/accuracy", arm), 7, (1, 2, 3))


def test_every_experiment_declares_what_decides():
    found = {each.claim: each for each in experiments_of("swin")}
    assert set(found) == {"swin/shift-accuracy", "swin/cyclic-shift-speedup", "swin/window-attention-speedup"}
    layer = found["swin/window-attention-speedup"].decides
    assert all(layer[scale]["side"] == 56 and layer[scale]["window"] == 7 for scale in ("small", "full"))
    assert found["swin/cyclic-shift-speedup"].decides["small"]["depths"] == [2, 2, 6, 2]


def test_the_gain_in_accuracy_needs_a_shift(known, unshifted):
    assert verdict_of("swin/shift-accuracy", TASK) == Verdict.REPRODUCED
    unshifted()
    broken = record_of("swin/shift-accuracy", TASK)
    assert judge(broken).verdict not in PAYS
    assert broken.measured.median == pytest.approx(0, abs=0.2)


def test_windows_are_worth_their_speed_only_as_accurate_as_the_whole_map(known, unshifted):
    assert verdict_of("swin/window-attention-speedup", LAYER) in PAYS
    unshifted()
    assert verdict_of("swin/window-attention-speedup", LAYER) == Verdict.DOES_NOT_PAY


def test_random_positions_as_good_as_windows_would_show_nothing(known, monkeypatch):
    monkeypatch.setitem(ACCURACY, "random", 81.0)
    assert verdict_of("swin/shift-accuracy", TASK) == Verdict.QUALITY_NOT_SHOWN
    assert verdict_of("swin/window-attention-speedup", LAYER) == Verdict.QUALITY_NOT_SHOWN


def test_what_a_position_sees_in_the_blocks_of_each_arm():
    """Of the first stage, at row 4 and column 7: the window of even blocks, and what the odd ones have in its place."""

    def seen(arm, place):
        torch.manual_seed(0)
        x = torch.randn(1, 12, 12, room.WIDTH, requires_grad=True)
        attention = room.network(arm).layers[0].blocks[place].attn
        (gradient,) = torch.autograd.grad(attention(x)[0, 4, 7].sum(), x)
        return [tuple(place) for place in (gradient.abs().sum(-1)[0] > 0).nonzero().tolist()]

    def box(rows, columns):
        return [(y, z) for y in rows for z in columns]

    window, moved = box((3, 4, 5), (6, 7, 8)), box((4, 5, 6), (7, 8, 9))
    assert all(seen(arm, 0) == window for arm in room.ARMS if arm != "global")
    assert seen("global", 0) == seen("global", 1) == box(range(12), range(12))
    assert seen("none", 1) == window
    assert seen("shift", 1) == moved
    assert seen("grid", 1) == box((0, 4, 8), (3, 7, 11))
    random = seen("random", 1)
    assert len(random) == 9
    assert len({y for y, z in random}) > 3
    assert random == seen("random", 1)


def test_the_cyclic_shift_needs_its_mask(monkeypatch):
    honest = record_of("swin/cyclic-shift-speedup", NETWORK)
    assert judge(honest).verdict in PAYS
    assert honest.quality.candidate < 1e-4 < 0.01 < min(honest.quality.controls.values())
    real = windows.shift_mask
    monkeypatch.setattr(windows, "shift_mask", lambda *sizes: torch.zeros_like(real(*sizes)))
    assert verdict_of("swin/cyclic-shift-speedup", NETWORK) == Verdict.DOES_NOT_PAY


def test_both_sides_of_the_speed_of_windows_are_whole_layers():
    trial = room.window_attention_speedup(**LAYER)
    torch.manual_seed(0)
    x = room.first_map(1, 14, 32)
    windows = ShiftedWindowAttention(32, 7, 1, shift=3)
    whole = ShiftedWindowAttention(32, 14, 1)
    weights = windows.state_dict() | {"relative_position_bias_table": torch.zeros(27**2, 1)}
    whole.load_state_dict(weights)
    with torch.inference_mode():
        assert torch.allclose(trial.baseline(), whole(x).flatten(1, 2), atol=1e-5)
        assert torch.equal(trial.candidate(), windows(x))


def test_padded_windows_are_more_and_give_the_same():
    torch.manual_seed(0)
    padded, cyclic = (make(8, 4, 2, shift=2).eval() for make in (room.PaddedShift, ShiftedWindowAttention))
    padded.load_state_dict(cyclic.state_dict())
    x, seen = torch.randn(2, 8, 12, 8), []
    padded.qkv.register_forward_hook(lambda module, given, out: seen.append(len(out)))
    cyclic.qkv.register_forward_hook(lambda module, given, out: seen.append(len(out)))
    assert torch.allclose(padded(x), cyclic(x), atol=1e-5)
    assert seen == [2 * 3 * 4, 2 * 2 * 3]


def test_scattered_positions_are_those_of_a_grid_or_random_ones():
    grid = room._grid_order(6, 6, 3).view(4, 9)
    assert grid[0].tolist() == [0, 2, 4, 12, 14, 16, 24, 26, 28]
    random = room._random_order(6, 6, 3)
    assert sorted(random.tolist()) == list(range(36)) != random.tolist()
    torch.manual_seed(0)
    layer, x = room.Scattered(8, 3, 2, random=False).eval(), torch.randn(1, 6, 6, 8, requires_grad=True)
    (gradient,) = torch.autograd.grad(layer(x)[0, 0, 0].sum(), x)
    assert (gradient.abs().sum(-1)[0] > 0).nonzero().tolist() == [[y, z] for y in (0, 2, 4) for z in (0, 2, 4)]


@pytest.mark.slow
@pytest.mark.parametrize("arm", room.ARMS)
def test_every_arm_learns(arm):
    assert room.score(arm, 3e-3) < 0.75  # chance: 0.92
