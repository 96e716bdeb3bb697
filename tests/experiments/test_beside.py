"""Arms of fewer seeds are held against the baseline under the same ones."""

from __future__ import annotations

import pytest

from assay.experiments.beside import beside


def test_an_arm_of_fewer_seeds_is_held_against_the_baseline_under_the_same_ones():
    baseline = [2.0, 2.0, 2.0, 4.0, 4.0]
    assert beside([2.1, 2.1, 2.1], baseline) == pytest.approx(2.9)
    assert beside([2.1, 2.1, 2.1, 4.1, 4.1], baseline) == pytest.approx(2.9)
    assert beside(baseline, baseline) == pytest.approx(2.8)


@pytest.mark.parametrize(("arm", "got"), [([], 0), ([1.0, 1.0, 1.0], 3)])
def test_an_arm_has_seeds_of_the_baseline(arm, got):
    with pytest.raises(ValueError, match=f"arm must have 1 to 2 values, as many as the baseline at most, got {got}"):
        beside(arm, [1.0, 2.0])
