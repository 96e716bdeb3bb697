"""The experiment of functional_hashing notices keys that are not the function's."""

import random

import pytest
from tests.properties.sabotage import PAYS, record_of, verdict_of

from assay.evidence.types import Verdict
from assay.experiments.compression import functional_hashing as room

CLAIM = "functional_hashing/evaluations-saved"
TREES = {"domain": "expression trees", "candidates": 3000}
NETWORKS = {"domain": "networks", "candidates": 30, "seeds": 2}


def test_on_trees_random_keys_of_equal_hit_rate_are_noticed(monkeypatch):
    assert verdict_of(CLAIM, TREES) in PAYS
    rng = random.Random(0)
    monkeypatch.setattr(room, "functional_hash", lambda *_: str(rng.randrange(1500)))
    assert verdict_of(CLAIM, TREES) is Verdict.DOES_NOT_PAY


def test_text_in_the_place_of_functions_saves_nothing_beyond_what_is_free(monkeypatch):
    def with_text(text, real=room.compiled):
        function = real(text)
        function.text = text
        return function

    monkeypatch.setattr(room, "compiled", with_text)
    monkeypatch.setattr(room, "functional_hash", lambda function, points: function.text)
    record = record_of(CLAIM, TREES)
    assert record.measured.median == pytest.approx(record.free)
    assert verdict_of(CLAIM, TREES) not in PAYS


def test_on_networks_wrong_keys_are_noticed(monkeypatch):
    monkeypatch.setattr(room, "letters_data", lambda windows, real=room.letters_data: real(2000))
    monkeypatch.setattr(
        room, "train_and_score", lambda genotype, data, held_out: len(set(room._living_text(genotype))) / 50
    )
    honest = record_of(CLAIM, NETWORKS)
    assert honest.quality.candidate > honest.quality.controls["random"]
    rng = random.Random(0)
    monkeypatch.setattr(room, "cell_key", lambda genotype, data: str(rng.randrange(8)))
    broken = record_of(CLAIM, NETWORKS)
    assert broken.quality.candidate < 0.9
    assert verdict_of(CLAIM, NETWORKS) not in PAYS
