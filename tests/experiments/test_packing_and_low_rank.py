"""The parts of two experiments that can be wrong without showing: what each arm runs, and where curves cross."""

from __future__ import annotations

import numpy as np
import pytest

from assay.experiments.inference import prepacking
from assay.experiments.layers import greenformers

PROMPTS = [[1] * n for n in (3, 9, 1, 5, 4, 2, 7)]


def test_batches_keep_every_prompt():
    arrival = prepacking.batches(PROMPTS, 3)
    assert [[len(prompt) for prompt in group] for group in arrival] == [[3, 9, 1], [5, 4, 2], [7]]
    by_length = prepacking.batches(PROMPTS, 3, by_length=True)
    assert [[len(prompt) for prompt in group] for group in by_length] == [[9, 7, 5], [4, 3, 2], [1]]


def test_token_slots_of_each_arm():
    slots = prepacking.token_slots(PROMPTS, 3)
    assert slots["padded"] == 3 * 9 + 3 * 5 + 7
    assert slots["sorted"] == 3 * 9 + 3 * 4 + 1
    assert slots["packed"] == 2 * 9 + 3 * 5 + 7  # rows {9}, {3, 1}; {5}, {4}, {2}; {7}
    assert slots["rows"] == 2 + 3 + 1
    assert slots["flat"] == 31


@pytest.mark.parametrize(
    ("ratios", "expected"),
    [
        ([0.5, 0.5, 2.0, 4.0], 256 * np.sqrt(0.5)),
        ([0.5, 0.25, 0.5, 0.9], 512.0),  # never
        ([1.5, 2.0, 2.0, 3.0], 64.0),  # always
        ([0.5, 2.0, 0.5, 2.0], 512 / np.sqrt(2)),  # the last time it rises
    ],
)
def test_crossing(ratios, expected):
    assert greenformers.crossing([64, 128, 256, 512], ratios) == pytest.approx(expected)


@pytest.mark.model
def test_a_packed_prefill_of_real_prompts_is_exact(smollm2):
    prompts = [smollm2.tokenizer(text).input_ids for text in ("Return x.", "Open a file and read\nits lines.", "Yes")]
    prefill = prepacking.PrepackedPrefill(smollm2.model)
    assert prepacking.exactness(smollm2.model, prefill, prompts).candidate < 1e-4
