"""PIE's experiments notice when the keys behind an edit are rotated wrongly or not at all."""

import pytest
import torch
from tests.properties.sabotage import record_of, verdict_of

from assay.evidence.types import Verdict
from assay.evidence.verdict import PAYS, judge
from assay.experiments import experiments_of
from assay.experiments.attention import pie_positional_integrity as room
from assay.methods.attention import pie_positional_integrity as method

pytestmark = pytest.mark.model
OVERHEAD, LOSS = "pie_positional_integrity/kv-update-overhead", "pie_positional_integrity/exact-match-loss"
POINT = {"tokens": 256, "size": 30, "behind": 64, "kind": "define", "sites": 3}


def test_the_experiments_load_and_their_deciding_points_shift():
    found = {each.claim: each for each in experiments_of("pie_positional_integrity")}
    assert set(found) == {OVERHEAD, LOSS}
    for each in found.values():
        assert each.decides["small"]["kind"] == each.decides["full"]["kind"] == "define"
        assert each.decides["full"]["tokens"] == each.paper["tokens"]


def test_every_edit_moves_what_comes_after_it(smollm2):
    for kind in ("insert", "delete", "edit", "define", "rename"):
        for seed in range(2):
            start, stop, run = room.scene(smollm2.tokenizer, 300, 30, 64, kind, seed=seed)["at"]
            assert len(run) != stop - start


def wrongly(keys, delta, inv_freq, interleaved):
    """A rotation of the same cost by other positions."""
    if inv_freq is None:
        return keys
    return method.rotate_keys(keys, 3 * delta + 41, inv_freq, interleaved=interleaved)


def _break(monkeypatch):
    """What PIE repairs is rotated by other positions; the controls stay as they are."""
    repaired = room._repaired

    def broken(stale, at, **options):
        if not options.get("rotate", True):
            return repaired(stale, at, **options)
        with monkeypatch.context() as patch:
            patch.setattr(method, "_turned", wrongly)
            return repaired(stale, at, **options)

    monkeypatch.setattr(room, "_repaired", broken)


@pytest.mark.slow
def test_a_wrong_rotation_changes_the_verdict_on_the_overhead(monkeypatch):
    point = POINT | {"moved": 0}
    record = record_of(OVERHEAD, point)
    controls = record.quality.controls
    assert record.quality.candidate < 0.05 < min(controls["deleted"], controls["random"], controls["rival"])
    assert judge(record).verdict in PAYS
    _break(monkeypatch)
    assert verdict_of(OVERHEAD, point) not in PAYS


@pytest.mark.slow
def test_a_wrong_rotation_changes_the_verdict_on_the_loss(monkeypatch):
    assert verdict_of(LOSS, POINT) is Verdict.UNDECIDED  # three sites are too few
    _break(monkeypatch)
    assert verdict_of(LOSS, POINT) is Verdict.REFUTED


def test_completions_together_are_those_alone(smollm2_slice):
    model = smollm2_slice.model
    contexts = [room.EditableContext(model, ids) for ids in ([5, 6, 7, 8], [9, 10, 11, 12], [13, 14])]
    together = room.completions(contexts, 3)
    for context, found in zip(contexts, together, strict=True):
        assert found == context.complete(3, eos_token_id=-1).tolist()


def test_a_random_shift_moves_only_the_suffix(smollm2_slice):
    context = room.EditableContext(smollm2_slice.model, range(10, 30))
    moved = room._by_a_random_shift(context, 8, 0)
    for (k, v), (other, same) in zip(context.layers, moved.layers, strict=True):
        assert torch.equal(v, same)
        assert torch.equal(k[:, :, :-8], other[:, :, :-8])
        assert not torch.allclose(k[:, :, -8:], other[:, :, -8:])
        torch.testing.assert_close(k.norm(dim=-1), other.norm(dim=-1))
