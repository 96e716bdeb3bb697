"""The experiments of prepacking notice prompts that see each other."""

from types import SimpleNamespace

import pytest
from tests.properties.sabotage import PAYS, verdict_of
from tests.tiny import tiny_model

from assay.evidence.types import Verdict
from assay.experiments.inference import prepacking as room
from assay.measure.memory import PeakMemory

PROMPTS = [[5, 9, 2, 7], [3], [8, 1, 4, 4, 6, 2, 9], [2, 2, 3], [7, 1], [6, 5, 4, 3, 2, 1]]
PEAKS = {"padded": 1200, "sorted": 1100, "alone": 900, "varlen": 500, "mask": 600}


@pytest.fixture
def small(monkeypatch):
    loaded = SimpleNamespace(model=tiny_model(), tokenizer=None)
    monkeypatch.setattr(room, "load_model", lambda name: loaded)
    monkeypatch.setattr(room, "mixed_prompts", lambda tokenizer, n, longest: PROMPTS[:n])
    monkeypatch.setattr(room, "peak_memory_of_child", lambda _, call: PeakMemory(10, 10 + PEAKS[call["arm"]]))
    return loaded


@pytest.mark.parametrize("claim", ["prefill-speedup-padded", "prefill-speedup-sorted", "prefill-peak-memory"])
def test_prompts_cut_at_random_places_are_noticed(small, monkeypatch, claim):
    point = {"prompts": 6, "batch": 3, "longest": 99} | ({"repeats": 2} if claim.endswith("memory") else {})
    claim = f"prepacking/{claim}"
    assert verdict_of(claim, point) in PAYS
    real = room.PrepackedPrefill.__call__

    def broken(self, prompts, **options):
        tokens = [token for prompt in prompts for token in prompt]
        lengths = [len(prompt) for prompt in prompts]
        shifted = [*tokens[1:], tokens[0]]  # every border lies one token off
        cut = [shifted[sum(lengths[:i]) : sum(lengths[: i + 1])] for i in range(len(lengths))]
        return real(self, cut, **options)

    monkeypatch.setattr(room.PrepackedPrefill, "__call__", broken)
    assert verdict_of(claim, point) is Verdict.DOES_NOT_PAY
