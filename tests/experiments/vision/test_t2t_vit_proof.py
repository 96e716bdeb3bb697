"""Windows that are no neighbourhoods, and attention that attends to nothing, are noticed; costs are counted, not believed."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tests.properties.sabotage import PAYS, record_of, verdict_of

import assay.methods.vision.t2t_vit as method
from assay.evidence.types import Verdict
from assay.evidence.verdict import judge
from assay.experiments import experiments_of
from assay.experiments.rates import Rate
from assay.experiments.vision import t2t_vit as room
from assay.experiments.vision.training import Judged

POINT = {"size": 32, "batch": 1, "steps": 1}


def is_local(model):
    """Whether a pixel reaches the tokens around its own place, and more than one of them."""
    split = model.tokens_to_token.splits[0]
    image = torch.zeros(1, 1, 32, 32)
    image[0, 0, 21, 25] = 1
    reached = split(image)[0].any(1).view(*split.grid(32, 32))
    return bool(reached[10, 12] and reached.sum() > 1)


def attends(model):
    """Whether a token of the first token block depends on another one."""
    block = getattr(model.tokens_to_token, "attention1", None)
    if block is None:
        return False
    tokens = torch.randn(1, 6, block.norm1.weight.numel())
    other = tokens.clone()
    other[:, 5] += torch.randn(tokens.shape[2])
    with torch.no_grad():
        return not torch.equal(block(tokens)[:, 0], block(other)[:, 0])


@pytest.fixture
def untrained(monkeypatch):
    """Accuracies follow from what a network can do: 10 points for depth, 20 for neighbourhoods, 5 for attention among tokens."""

    def judged(make, rate, steps, *, size):
        torch.manual_seed(0)
        model = make().eval()
        kind, score = model.tokens_to_token.kind, 0.5 + 0.1 * (len(model.blocks) > 2)
        if kind == "convolution":
            score += 0.18
        elif kind != "patches":
            score += 0.2 * is_local(model) + 0.05 * attends(model)
        return Judged(np.full((3, 12), score), rate)

    monkeypatch.setattr(room, "judged", judged)
    monkeypatch.setattr(room, "chosen", lambda name, arm: Rate(1e-3, (1e-3, 2e-3)))


def test_every_experiment_declares_what_decides():
    found = {each.claim: each for each in experiments_of("t2t_vit")}
    assert set(found) == {"t2t_vit/scratch-gain", "t2t_vit/half-the-cost", "t2t_vit/token-module-speedup"}
    assert found["t2t_vit/token-module-speedup"].decides["small"]["size"] == 224
    assert found["t2t_vit/half-the-cost"].decides["small"]["model"] == "t2t_vit_14"


def test_tokens_of_pixels_from_anywhere_gain_nothing(monkeypatch, untrained):
    honest = record_of("t2t_vit/scratch-gain", {"steps": 1})
    assert judge(honest).verdict in PAYS
    assert honest.controls["random"] < honest.measured.low
    assert set(honest.trained) == {"t2t", "vit", "patches", "convolution"}  # a random control may learn nothing
    monkeypatch.setattr(method.SoftSplit, "forward", scattered_split)
    assert verdict_of("t2t_vit/scratch-gain", {"steps": 1}) not in PAYS


def scattered_split(split, x):
    """Straight from the definition, of pixels from anywhere."""
    return F.unfold(room.scattered(x), split.kernel, padding=split.padding, stride=split.stride).transpose(1, 2)


def test_the_costs_are_counted():
    honest = record_of("t2t_vit/half-the-cost", {"model": "t2t_vit_14"})
    assert judge(honest).verdict is Verdict.COMPUTED
    assert 2.0 < honest.measured.median < 2.3  # 48.6 M over 21.5 M parameters, 10.1 G over 4.8 G
    assert honest.details["vit_s"]["parameters"] / 1e6 == pytest.approx(48.6, abs=0.2)
    assert honest.details["vit_s"]["macs"] / 1e9 == pytest.approx(10.1, abs=0.25)  # as the paper rounds it
    settings = {**room.CONFIGS["t2t_vit_7"], "depth": 1}
    more = {"depth": {"depth": 2}, "mlp_ratio": {"mlp_ratio": 3.0}, "tokens_type": {"tokens_type": "transformer"}}
    small, *larger = (room._published({**settings, **each}) for each in ({}, *more.values()))
    assert all(small["macs"] < each["macs"] for each in larger)
    assert all(small["parameters"] < each["parameters"] for each in larger[:2])


def test_attention_to_nothing_costs_accuracy(monkeypatch, untrained):
    honest = verdict_of("t2t_vit/token-module-speedup", POINT)
    assert honest in PAYS
    monkeypatch.setattr(method, "random_feature_attention", lambda q, k, v, rows, **more: v)
    assert verdict_of("t2t_vit/token-module-speedup", POINT) is Verdict.DOES_NOT_PAY


@pytest.mark.parametrize("arm", room.ARMS)
def test_every_arm_is_what_it_is_called(arm):
    torch.manual_seed(0)
    model = room.make(arm).eval()
    assert model(torch.randn(2, 1, 32, 32)).shape == (2, 12)
    assert attends(model) == (arm in ("t2t", "softmax", "scattered"))
    if arm in ("t2t", "softmax", "values only", "scattered"):
        assert is_local(model) == (arm != "scattered")
    same = room.make("t2t")
    if arm in ("scattered", "values only"):
        counts = [sum(p.numel() for p in each.parameters() if p.requires_grad) for each in (model, same)]
        assert counts[0] == counts[1]
    for layer in model.modules():  # all arms see the picture as strongly
        if isinstance(layer, torch.nn.Linear | torch.nn.Conv2d):
            assert float(layer.weight.detach().std()) * layer.weight[0].numel() ** 0.5 == pytest.approx(1, abs=0.25)
    if arm == "vit":
        costs = [room._cost(room.make(name)) for name in ("vit", "t2t")]
        assert all(2 <= costs[0][what] / costs[1][what] < 3 for what in ("parameters", "macs"))


@pytest.mark.slow
def test_networks_trained_for_a_moment_are_told_apart(monkeypatch):
    monkeypatch.setattr(room, "chosen", lambda name, arm: Rate(4e-3, (2e-3, 4e-3)))
    honest = record_of("t2t_vit/scratch-gain", {"steps": 100})
    assert honest.controls["random"] < honest.measured.median
