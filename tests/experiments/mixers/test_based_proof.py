"""BASED's experiments notice when its attention recalls nothing; and the rivals generate what the attention model generates."""

from __future__ import annotations

import pytest
import torch
from tests.properties.sabotage import PAYS, verdict_of

from assay.evidence.types import Verdict
from assay.experiments import experiments_of
from assay.experiments.mixers import based as room
from assay.methods.mixers import based as method
from assay.workloads.sequences import byte_windows

TINY = {"pairs": 2, "length": 8, "vocab": 8, "width": 16, "steps": 170}
SPEED = {"context": 32, "batch": 2, "tokens": 2, "width": 64, "layers": 4, "task": TINY}
OTHERS = {"attention": 1.0, "elu linear attention": 0.7, "convolutions only": 0.4}  # what they recall, given


@pytest.fixture(scope="module")
def honest():
    return [room.recall_score("based", seed, TINY) for seed in room.SEEDS]


@pytest.fixture(scope="module")
def broken():
    """Trained with the keys of the linear attention and of the window at random tokens: once, and told as every seed's."""
    made = room.recall_model

    def at_random(*args):
        model = made(*args)
        room.hand_out_at_random(model)
        return model

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(room, "recall_model", at_random)
        return [room.recall_score("based", room.SEEDS[0], TINY)] * len(room.SEEDS)


def given(scores):
    """Scores in which BASED was really trained, and the others' are given."""
    found = {arm: [{"accuracy": value, "random": value}] * len(room.SEEDS) for arm, value in OTHERS.items()}
    return lambda arms, task, many=(): {arm: {**found, "based": scores}[arm] for arm in arms}


def test_experiments_load():
    assert {e.claim for e in experiments_of("based")} == {"based/generation-throughput", "based/recall-gain"}


@pytest.mark.slow
def test_random_recall_is_noticed(monkeypatch, honest, broken):
    point = {**TINY, "arms": ["based", "elu linear attention"]}
    monkeypatch.setattr(room, "recall_scores", given(honest))
    assert verdict_of("based/recall-gain", point) in PAYS
    monkeypatch.setattr(room, "recall_scores", given(broken))
    assert verdict_of("based/recall-gain", point) not in PAYS


def test_fast_generation_that_recalls_nothing_is_noticed(monkeypatch, honest, broken):
    monkeypatch.setattr(room, "recall_scores", given(honest))
    assert verdict_of("based/generation-throughput", SPEED) in PAYS
    monkeypatch.setattr(room, "recall_scores", given(broken))
    assert verdict_of("based/generation-throughput", SPEED) not in PAYS


def test_a_rival_at_its_floor_voids_the_comparison(monkeypatch, honest):
    monkeypatch.setitem(OTHERS, "elu linear attention", 0.51)
    monkeypatch.setattr(room, "recall_scores", given(honest))
    found = verdict_of("based/recall-gain", {**TINY, "arms": ["based", "elu linear attention"]})
    assert found is Verdict.UNDECIDED


def test_random_keys_leave_the_shape_and_the_first_token():
    torch.manual_seed(0)
    layer = method.TaylorAttention(16, heads=2, feature_dim=4)
    x = torch.randn(2, 9, 16)
    exact = layer(x)
    room.hand_out_at_random(layer)
    found = layer(x)
    assert found.shape == exact.shape
    assert found.isfinite().all()
    assert (found - exact).abs().max() > 1e-3


def test_the_compiled_loop_continues_as_the_attention_model_does():
    """Its weights, its cache and its rotary positions are those of the baseline: the exact baseline computes the same thing."""
    torch.manual_seed(0)
    model = room.language_model("attention", 64, 2)
    for parameter in model.parameters():  # wide enough for greedy choices without ties
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    ids = byte_windows(48, 2)[0]
    states = room.longer(room.prefilled(model, ids).states, 48, 48, 8)
    decoder = room.Decoder(room.as_llama(model, 64), weights="fp32", cache="float32")
    pool, sequences = room.loop_pages(decoder, states, 48, 8)
    expected = room.generate_from(model, room.StateCache([dict(state) for state in states]), ids[:, -1:], 6)
    found = decoder.run(pool, sequences, ids[:, -1].tolist(), 6)[0]
    assert found.tolist() == expected.tolist()


def test_a_longer_context_repeats_what_was_read():
    states = [
        {
            "k": torch.arange(5.0).view(1, 1, 5, 1),
            "v": torch.arange(5.0).view(1, 1, 5, 1),
            "there": torch.ones(1, 5, dtype=torch.bool),
            "seen": torch.tensor([5]),
        }
    ]
    (found,) = room.longer(states, 4, 10, 3)
    assert found["k"][0, 0, :10, 0].tolist() == [0, 1, 2, 3, 0, 1, 2, 3, 0, 1]
    assert found["k"].shape[2] == 13
    assert found["there"].shape == (1, 10)
    assert int(found["seen"][0]) == 10
