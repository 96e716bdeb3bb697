"""The experiments on binary and ternary BARTs notice when the levels of the weights are chosen at random."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.properties.sabotage import PAYS, verdict_of

from assay.evidence.types import Verdict
from assay.experiments import experiments_of
from assay.experiments.layers import binary_ternary_nlg as room
from assay.methods.layers import binary_ternary_nlg

SHAPE = {"vocabulary": 2000, "width": 128, "layers": 1}
CLAIMS = {
    "binary_ternary_nlg/size-ternary": SHAPE | room.TINY,
    "binary_ternary_nlg/size-binary": SHAPE | room.TINY,
    "binary_ternary_nlg/rouge-ternary": room.TINY,
}


@pytest.fixture
def briefly(monkeypatch):
    """Models trained for seconds are held to no floor: the best constant answer takes them longer to beat."""
    room.rouges.cache_clear()
    monkeypatch.setattr(room, "constant_rouge", lambda: -100.0)
    yield
    room.rouges.cache_clear()


def random_levels(weight: torch.Tensor, bits: int, method: str = "tbt") -> tuple[torch.Tensor, torch.Tensor]:
    """Levels that know nothing of the weights, with their scales."""
    levels = torch.randint(-1, 2, weight.shape) if bits == 2 else 2 * torch.randint(0, 2, weight.shape) - 1
    return levels.to(weight.dtype), weight.abs().mean(-1, keepdim=True)


def test_every_experiment_declares_what_decides():
    found = {each.claim: each for each in experiments_of("binary_ternary_nlg")}
    assert set(found) == set(CLAIMS)
    for claim in ("size-ternary", "size-binary"):
        each = found[f"binary_ternary_nlg/{claim}"]
        assert {name: each.decides["small"][name] for name in room.BART_BASE} == each.paper
        assert each.guard.margin > 0


@pytest.mark.slow
@pytest.mark.parametrize("claim", list(CLAIMS))
def test_every_claim_needs_levels_that_follow_the_weights(monkeypatch, briefly, claim):
    honest = verdict_of(claim, CLAIMS[claim])
    broken = Verdict.REFUTED if "rouge" in claim else Verdict.DOES_NOT_PAY
    assert honest != broken
    room.rouges.cache_clear()
    monkeypatch.setattr(binary_ternary_nlg, "weight_codes", random_levels)
    assert verdict_of(claim, CLAIMS[claim]) == broken


def test_the_size_needs_packed_weights(monkeypatch):
    """The students' R1 is given here; the bytes are measured."""
    given: dict[str, Any] = {"teacher": [98.0, 97.0, 96.0], "rounded": [10.0] * 3, "shuffled": [1.0] * 3}
    given |= {arm: [97.0, 96.0, 95.0] for arm in room.arms_of(2)}
    monkeypatch.setattr(room, "rouges", lambda *_: given)
    claim = "binary_ternary_nlg/size-ternary"
    assert verdict_of(claim, CLAIMS[claim]) in PAYS
    monkeypatch.setattr(room, "load_packed", lambda file: room.blank_bart(**SHAPE))
    assert verdict_of(claim, CLAIMS[claim]) not in PAYS


def test_the_parts_of_the_numbers_share_none():
    seen = [set(map(tuple, room.numbers(part)[0].tolist())) for part in room.PARTS]
    assert len(set.union(*seen)) == sum(map(len, seen)) == room.LARGEST


def test_shuffled_weights_have_as_many_of_each_level():
    torch.manual_seed(0)
    student = room.student_of(room.bart(32, 1, 0).eval(), 2)
    layer = student.model.encoder.layers[0].fc1
    before = layer.weight.detach().clone()
    room.shuffled_(student, 0)
    assert not torch.equal(layer.weight, before)
    torch.testing.assert_close(layer.weight.sort(1).values, before.sort(1).values)


def test_rouge_counts_words():
    assert room.rouge_1("three hundred two", "three hundred two") == 100
    assert room.rouge_1("three three", "three hundred") == 50
    assert room.rouge_1("", "three") == 0
    assert 0 < room.constant_rouge() < 60
    assert [room.in_words(n) for n in (0, 13, 40, 342)] == ["zero", "thirteen", "forty", "three hundred forty two"]
