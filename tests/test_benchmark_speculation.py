"""benchmarks/speculation.py: what it asks the model, and how it counts repetition."""

from __future__ import annotations

import pytest
from benchmarks.speculation import KINDS, repeated, texts


@pytest.mark.parametrize("kind", KINDS)
def test_prompts_of_a_kind_differ_and_are_the_same_each_time(kind):
    found = texts(kind, 4)
    assert len(set(found)) == 4
    assert found == texts(kind, 4)
    assert all(len(text) < 1700 for text in found)


def test_repeated_counts_runs_that_stood_before():
    assert repeated(list(range(20))) == 0
    assert repeated([1, 2] * 10) == pytest.approx(1 - 2 / 17)
    assert repeated([1]) == 0
