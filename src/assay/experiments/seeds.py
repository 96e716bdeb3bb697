"""What a few seeds show: the mean of paired differences with its interval."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from assay.measure.stats import Interval, student_interval


def paired(ours: Sequence[float], theirs: Sequence[float]) -> Interval:
    """The mean of the differences, seed by seed, and its 95 % interval by Student's t (4.3 standard errors for three seeds).

    Raises ValueError for fewer than two pairs, and for lists of different lengths.

    >>> found = paired([3.0, 5.0, 7.0], [2.0, 3.0, 6.0])
    >>> round(found.median, 2), round(found.high - found.median, 2)
    (1.33, 1.43)
    """
    if len(ours) != len(theirs):
        raise ValueError(f"theirs must have as many values as ours ({len(ours)}), got {len(theirs)}")
    if len(ours) < 2:
        raise ValueError(f"seeds must be at least 2, got {len(ours)}")
    return student_interval(np.asarray(ours, dtype=np.float64) - np.asarray(theirs, dtype=np.float64))
