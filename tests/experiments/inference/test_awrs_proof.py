"""The experiments of awrs notice tokens that are drawn in any order, a search of the whole vocabulary, and a weight without its factor."""

import dataclasses
import math
from types import SimpleNamespace

import numpy as np
import pytest
from tests.properties.sabotage import PAYS, record_of, verdict_of
from tests.tiny import tiny_model, tiny_tokenizer

from assay.evidence.types import Verdict
from assay.evidence.verdict import judge
from assay.experiments.inference import awrs as room

SPEED = {"constraint": "regex", "prompt": "friendly", "answers": 1, "tokens": 3, "spots": 3, "draws": 300}
COUNTS = SPEED | {"answers": 3}
BIAS = {"constraint": "python", "prompt": "both", "spots": 3, "draws": 300}


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


DRAW = room.draw


def test_tokens_in_any_order_are_noticed(monkeypatch):
    assert verdict_of("awrs/speedup-masking", SPEED) in PAYS
    monkeypatch.setattr(room, "draw", in_any_order)
    assert verdict_of("awrs/speedup-masking", SPEED) is Verdict.DOES_NOT_PAY


@pytest.mark.parametrize("broken", [everything, in_any_order])
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
    here = room.setting("json")
    begun = room.Answers(here, room.places(here, "json", "friendly", 2), 4)
    for i, path in enumerate(begun.paths):
        text = here.tokens.text(path)
        assert here.make().prefix(text)
        chosen = []
        for make in (lambda rules: room.Drawn(rules, 0, "paper"), lambda rules: room.Masked(rules, 0)):
            follower = make(here.rules())

            def choose(logits, made, follower=follower, chosen=chosen):
                chosen.append((made, follower(logits, made)))

            begun.run_one(i, choose)
        assert len(chosen) == 2 * len(path)
        for made, token in chosen:
            assert token in here.ends or here.make().prefix(here.tokens.text([*made, token]))
        assert begun.caches[i].get_seq_length() == len(begun.begun[i].ids) - 1  # put back as it was


def test_misplaced_probability():
    spot = room.Spot(np.log([0.4, 0.3, 0.2, 0.1]), np.array([True, True, False, False]), None)
    assert room.misplaced(spot, [0, 0, 0, 0, 1, 1, 1]) == pytest.approx(0)
    assert room.misplaced(spot, [0] * 7) == pytest.approx(3 / 7)
    assert room.misplaced(spot, [2] * 7) == pytest.approx(1)
    assert room.misplaced(spot, [None] * 7) == pytest.approx(1)
