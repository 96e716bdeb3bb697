"""Arms that were trained under fewer seeds, as they stand beside a baseline of more."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def beside(arm: Sequence[float], baseline: Sequence[float]) -> float:
    """The mean of an arm that was trained under the first seeds of the baseline only, as it would stand beside the baseline's own mean.

    It is the baseline's mean over all its seeds plus the arm's mean difference from it over the seeds of both, so that a seed that is
    hard for every arm does not count for some of them alone. Raises ValueError for an arm of no seeds, or of more than the baseline.

    >>> round(beside([2.1, 2.3], [2.0, 2.2, 3.0]), 6)
    2.5
    """
    if not 1 <= len(arm) <= len(baseline):
        raise ValueError(f"arm must have 1 to {len(baseline)} values, as many as the baseline at most, got {len(arm)}")
    shared = np.asarray(arm, dtype=np.float64) - np.asarray(baseline[: len(arm)], dtype=np.float64)
    return float(np.mean(np.asarray(baseline, dtype=np.float64)) + shared.mean())
