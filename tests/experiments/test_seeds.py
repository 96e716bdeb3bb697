"""The interval over seeds is Student's, never the smallest and the largest."""

from __future__ import annotations

import pytest

from assay.experiments.seeds import paired


def test_the_difference_of_pairs():
    found = paired([3.0, 5.0, 7.0], [2.0, 3.0, 6.0])
    assert found.median == pytest.approx(4 / 3)
    assert found.high - found.median == pytest.approx(4.303 * (1 / 3) ** 0.5 / 3**0.5, rel=1e-3)
    assert found.median - found.low == pytest.approx(found.high - found.median)
    assert found.n == 3


@pytest.mark.parametrize(("ours", "theirs", "words"), [([1.0], [2.0], "seeds"), ([1.0, 2.0], [1.0], "theirs")])
def test_what_has_no_interval(ours, theirs, words):
    with pytest.raises(ValueError, match=words):
        paired(ours, theirs)
