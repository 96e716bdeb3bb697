"""The experiments of awrs notice tokens that are drawn in any order, a search of the whole vocabulary, and a weight without its factor."""

import dataclasses
import math
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tests.properties.sabotage import PAYS, record_of, verdict_of
from tests.tiny import tiny_model, tiny_tokenizer

from assay.evidence.types import Verdict
from assay.evidence.verdict import judge
from assay.experiments import experiments_of
from assay.experiments.inference import awrs as room
from assay.methods.inference.awrs import Draw, Rules, TokenBytes, functions

MODEL = {"model": room.MODEL}
SPEED = {"constraint": "regex", "prompt": "friendly", "answers": 1, "tokens": 3, "spots": 3, "draws": 300} | MODEL
COUNTS = SPEED | {"answers": 3}
BIAS = {"constraint": "python", "prompt": "both", "spots": 3, "draws": 300} | MODEL


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    tokenizer = tiny_tokenizer(400)
    model = tiny_model(vocab_size=len(tokenizer), initializer_range=0.2, max_position_embeddings=1024)
    model.lm_head.weight.data *= 3  # a model that is sure of something
    monkeypatch.setattr(room, "load_model", lambda name: SimpleNamespace(model=model, tokenizer=tokenizer))


def in_any_order(log_p, test, rng, **options):
    """As many evaluations or more, but the model is not asked which token is likely."""
    uniform = np.where(log_p > -np.inf, -math.log(np.isfinite(log_p).sum()), -np.inf)
    return DRAW(uniform, test, rng, **options)


def everything(log_p, test, rng, **options):
    return DRAW(log_p, test, rng, variant="masking")


def without_its_factor(log_p, test, rng, **options):
    found = DRAW(log_p, test, rng, **options)
    return dataclasses.replace(found, log_weight=-math.log(len(found.rejected) + 1))


def unasked(log_p, test, rng, **options):
    """The first token drawn, whatever the constraint would say."""
    return DRAW(log_p, lambda token: True, rng, **options)


def most_probable(log_p, test, rng, **options):
    """Tokens in decreasing order of probability instead of a random one: as few evaluations, and always the same token."""
    token = next(filter(test, (int(place) for place in np.argsort(-log_p))))
    return Draw(token, 0.0, 1)


DRAW = room.draw


def test_tokens_that_are_not_the_models_are_noticed(monkeypatch):
    assert verdict_of("awrs/speedup-masking", SPEED) in PAYS
    for broken in (in_any_order, unasked, most_probable):
        monkeypatch.setattr(room, "draw", broken)
        record = record_of("awrs/speedup-masking", SPEED)
        assert judge(record).verdict not in PAYS, broken
        assert record.quality.candidate > record.quality.baseline + record.quality.margin, broken


def test_the_rival_at_the_same_budget_is_told_from_the_method():
    quality = record_of("awrs/speedup-masking", SPEED).quality
    assert quality.controls["rival"] > quality.baseline + quality.margin > quality.high


@pytest.mark.parametrize("broken", [everything, in_any_order, unasked])
def test_evaluations_that_are_not_saved_are_noticed(monkeypatch, broken):
    assert verdict_of("awrs/evaluations", COUNTS) in PAYS
    monkeypatch.setattr(room, "draw", broken)
    assert verdict_of("awrs/evaluations", COUNTS) is Verdict.DOES_NOT_PAY


def without_a_weight(log_p, test, rng, **options):
    return dataclasses.replace(DRAW(log_p, test, rng, **options), log_weight=0.0)


@pytest.mark.parametrize("broken", [without_its_factor, without_a_weight])
def test_a_biased_weight_is_noticed(monkeypatch, broken):
    honest = record_of("awrs/weight-bias", BIAS)
    assert judge(honest).verdict is Verdict.REPRODUCED
    assert min(honest.controls.values()) > honest.measured.high
    monkeypatch.setattr(room, "draw", broken)
    assert verdict_of("awrs/weight-bias", BIAS) not in PAYS


def test_the_arms_choose_what_the_constraint_allows():
    here = room.setting("json", room.MODEL)
    begun = room.Answers(here, room.places(here, "json", "friendly", 2), 4)
    for i, path in enumerate(begun.paths):
        text = here.tokens.text(path)
        assert here.make().prefix(text)
        chosen = []
        arms = (partial(room.Drawn, variant="paper"), room.Masked, room.Replaced, room.Once)
        for make in arms:
            follower = make(here.rules(), 0)

            def choose(logits, made, follower=follower, chosen=chosen):
                chosen.append((made, follower(logits, made)))

            begun.run_one(i, choose)
        assert len(chosen) == len(arms) * len(path)
        for made, token in chosen:
            assert token in here.ends or here.make().prefix(here.tokens.text([*made, token]))
        assert begun.caches[i].get_seq_length() == len(begun.begun[i].ids) - 1  # put back as it was


def test_misplaced_probability():
    spot = room.Spot(np.log([0.4, 0.3, 0.2, 0.1]), np.array([True, True, False, False]), None)
    assert room.misplaced(spot, [0, 0, 0, 0, 1, 1, 1]) == pytest.approx(0)
    assert room.misplaced(spot, [0] * 7) == pytest.approx(3 / 7)
    assert room.misplaced(spot, [2] * 7) == pytest.approx(1)
    assert room.misplaced(spot, [None] * 7) == pytest.approx(1)


def test_draws_with_replacement_are_weighed_without_bias():
    """The free baseline is a fair one: E[w 1{x}] = p(x), and its repeated draws cost no evaluation."""
    p = np.array([0.5, 0.3, 0.15, 0.05])
    letters = TokenBytes.from_pieces([b"a", b"b", b"c", b"d", b""], special=[4])
    constraint = functions(lambda text: all(byte in b"bd" for byte in text), lambda text: False)
    mean, evaluations = np.zeros(4), []
    for seed in range(1500):
        follower = room.Replaced(Rules(constraint, letters, [4]), seed)
        token = follower(torch.tensor([*np.log(p), -math.inf]), [])
        mean[token] += math.exp(follower.log_weight) / 1500
        evaluations.append(follower.evaluations)
    assert np.abs(mean - [0, 0.3, 0, 0.05]).max() < 0.05
    assert max(evaluations) <= 4


def test_draws_with_replacement_end_in_a_mask(monkeypatch):
    monkeypatch.setattr(room, "MOST_DRAWS", 50)
    letters = TokenBytes.from_pieces([b"a", b"b", b""], special=[2])
    follower = room.Replaced(Rules(functions(lambda text: text == b"b", bool), letters, [2]), 0)
    assert follower(torch.tensor([0.0, -60.0, -math.inf]), []) == 1
    assert follower.log_weight == pytest.approx(-60)


def test_the_second_model_is_off_the_grid():
    first, second = (room.setting("json", model).model for model in (room.MODEL, room.MOVED))
    apart = (first.lm_head.weight - second.lm_head.weight).abs() / first.lm_head.weight.abs()
    assert 0 < float(apart.detach().median()) < 0.05
    for claim in ("speedup-masking", "evaluations", "weight-bias"):
        found = next(one for one in experiments_of("awrs") if one.claim == f"awrs/{claim}")
        assert any(point["model"] == room.MOVED for point in found.points["full"])
