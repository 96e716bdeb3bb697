"""Greenformers' experiments notice when the low-rank units, or Linformer's shortening, are broken."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tests.properties.sabotage import PAYS, record_of, verdict_of
from torch import nn

from assay.evidence.types import Verdict
from assay.experiments import experiments_of
from assay.experiments.layers import greenformers as room
from assay.measure.cost import count_cost
from assay.methods.core.layers.surgery import find
from assay.methods.layers.greenformers import CED, LED, UNITS, encoder

SCRATCH = {"steps": 80, "seeds": 3}
STEP = {"width": 64, "layers": 1, "rank": 0.5, "batch": 2, "tokens": 32, "small_width": 32, "small_layers": 1} | SCRATCH
SIZE = {"width": 32, "layers": 1, "rank": 0.5, "convert": False} | SCRATCH
BLOCK = {"d_model": 128, "ffn": 512, "rank": 25, "linformer_length": 32, "longest": 2048}


@pytest.fixture
def briefly(monkeypatch):
    """Networks trained for seconds are held to guessing, not to a bigram table, which takes them a minute to beat."""
    room.scratch_losses.cache_clear()
    monkeypatch.setattr(room, "bigram_loss", lambda: float(np.log(256)))
    yield
    room.scratch_losses.cache_clear()


def test_every_experiment_declares_what_decides():
    found = {each.claim: each for each in experiments_of("greenformers")}
    names = ("pretraining-cost", "led-ced-parameters", "lrt-linformer-crossover")
    assert set(found) == {f"greenformers/{name}" for name in names}
    assert found["greenformers/pretraining-cost"].decides["small"]["width"] == 768
    assert found["greenformers/pretraining-cost"].decides["full"]["layers"] == 12
    assert found["greenformers/lrt-linformer-crossover"].tolerance == 256


@pytest.mark.slow
@pytest.mark.parametrize(
    ("claim", "point"), [("greenformers/pretraining-cost", STEP), ("greenformers/led-ced-parameters", SIZE)]
)
def test_the_saving_needs_units_that_learn(monkeypatch, briefly, claim, point):
    honest = verdict_of(claim, point)
    assert honest != Verdict.DOES_NOT_PAY
    room.scratch_losses.cache_clear()
    for unit in (LED, CED):
        monkeypatch.setattr(unit, "forward", lambda self, x: self.decoder(0 * self.encoder(x)))
    assert verdict_of(claim, point) == Verdict.DOES_NOT_PAY


def test_a_factorisation_that_saves_nothing_refutes_the_size(monkeypatch):
    alike = {arm: [2.0, 2.1, 2.2] for arm in room.ARMS} | {"no layers": [3.2] * 3, "random factors": [2.9] * 3}
    monkeypatch.setattr(room, "scratch_losses", lambda *_: alike)
    monkeypatch.setattr(room, "bigram_loss", lambda: float(np.log(256)))
    assert verdict_of("greenformers/led-ced-parameters", SIZE | {"width": 64}) in PAYS
    monkeypatch.setattr(room, "factor_", lambda model, rank, seed=0: None)
    assert verdict_of("greenformers/led-ced-parameters", SIZE | {"width": 64}) not in PAYS


def by_macs(one, other, **_):
    """Times in proportion to the MACs that torch counts."""
    ratio = count_cost(one).macs / count_cost(other).macs
    return SimpleNamespace(speedup=SimpleNamespace(median=ratio, low=ratio, high=ratio))


def test_the_crossing_needs_linformers_shortening(monkeypatch):
    monkeypatch.setattr(room, "compare", by_macs)
    honest = record_of("greenformers/lrt-linformer-crossover", BLOCK)
    assert honest.details["crossed"]
    assert honest.measured.median == pytest.approx(honest.details["crossover_of_macs"], rel=0.15)
    assert verdict_of("greenformers/lrt-linformer-crossover", BLOCK) in PAYS
    monkeypatch.setattr(encoder, "linformer", lambda q, k, v, e_k, e_v, **_: F.scaled_dot_product_attention(q, k, v))
    assert verdict_of("greenformers/lrt-linformer-crossover", BLOCK) == Verdict.REFUTED


def test_every_arm_is_what_it_says():
    models = {arm: room.encoder(arm, 64, 1, 0) for arm in room.ARMS}
    units = {arm: find(model, UNITS) for arm, model in models.items()}
    assert {type(unit) for unit in units["low rank"].values()} == {LED, CED}
    assert len(units["low rank"]) == len(units["random factors"]) == 7
    assert not units["dense"]
    assert all(not unit.encoder.weight.requires_grad for unit in units["random factors"].values())
    assert not [m for m in models["no layers"].modules() if isinstance(m, nn.Conv1d | room.EncoderBlock)]
    ids = torch.randint(256, (2, 20))
    for model in models.values():
        assert model(ids).shape == (2, 20, 256)
    macs = {arm: room.cost(torch.nn.ModuleList([m.front, m.blocks])).macs for arm, m in models.items()}
    assert macs["low rank"] == pytest.approx(macs["dense"] / 2, rel=0.05)
    assert macs["narrow"] == pytest.approx(macs["low rank"], rel=0.1)


def test_a_bigram_table_is_a_floor_above_guessing():
    assert 2 < room.bigram_loss() < 3
