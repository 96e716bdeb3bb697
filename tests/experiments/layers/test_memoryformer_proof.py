"""MemoryFormer's experiment notices when the look-ups read random rows, and judges what was fitted on other inputs."""

from __future__ import annotations

import pytest
import torch
from tests.properties.sabotage import PAYS, record_of, verdict_of
from torch import nn

from assay.evidence.verdict import judge
from assay.experiments import experiments_of
from assay.experiments.layers import memoryformer as room
from assay.methods.layers import memoryformer

POINT = {"hidden_size": 64, "layers": 1, "steps": 100, "seeds": 3, "distilled": False, "bits": 8, "extra": 2}
CLAIM = "memoryformer/comparable-accuracy"


@pytest.fixture
def briefly(monkeypatch):
    """Networks trained for seconds are held to guessing, not to a bigram table, which takes them a minute to beat."""
    monkeypatch.setattr(room, "bigram_accuracy", lambda: 100 / 256)


def test_the_experiment_declares_what_decides():
    (found,) = experiments_of("memoryformer")
    for name in ("bits", "extra"):
        assert found.decides["small"][name] == found.paper[name]
    assert found.tolerance == 2.0


@pytest.mark.slow
def test_the_accuracy_needs_the_look_ups(monkeypatch, briefly):
    honest = record_of(CLAIM, POINT)
    assert (honest.unit, honest.baseline) == ("points", 0)
    assert judge(honest).verdict in PAYS
    monkeypatch.setattr(memoryformer, "_use_kernel", lambda *_: False)
    monkeypatch.setattr(memoryformer, "bucket_codes", lambda z: torch.randint(2 ** z.shape[-1], z.shape[:-1]))
    assert verdict_of(CLAIM, POINT) not in PAYS


def test_every_arm_is_what_it_says():
    torch.manual_seed(0)
    models = {arm: room.network(arm, 64, 1, 8, 2, 0) for arm in room.ARMS}
    macs = {arm: room.block_macs(model) for arm, model in models.items()}
    assert macs["memory"] == macs["random codes"] < macs["linear"] / 8
    assert macs["narrow"] == pytest.approx(macs["memory"], rel=0.25)
    ids = torch.randint(256, (1, 9))
    for arm, model in models.items():
        assert torch.equal(model(ids).logits, model(ids).logits) == (arm != "random codes")


def test_random_signs_keep_the_weights_and_change_the_rows():
    layer = memoryformer.MemoryLinear(64, 4)
    x = torch.randn(50, 64)
    rows, weights = layer.hash(x)
    other_rows, other_weights = layer.hash(*room.random_signs(layer, (x,)))
    torch.testing.assert_close(weights, other_weights)
    assert (rows != other_rows).float().mean() > 0.9


def test_a_distilled_layer_is_judged_on_inputs_it_was_not_fitted_to(monkeypatch):
    torch.manual_seed(0)
    linear = nn.Linear(64, 40)
    x, other = torch.randn(600, 64), torch.randn(200, 64)
    monkeypatch.setattr(room, "activations", lambda: {"a model": (linear, x, other)})
    found = room.distillation([8])["a model"]["8"]
    assert found["fitted"] < 0.9 * found["held_out"]


def test_a_bigram_table_is_a_floor_above_guessing():
    assert 25 < room.bigram_accuracy() < 50
