"""Floating-point operations exchanged: more answers of a small model, or one of a larger one that had to be trained."""

from __future__ import annotations

import math

from assay import checks


def inference_multiplier(size: float, ratio: float) -> float:
    """How many times more a small model may compute at inference so that a model `size` times larger costs as much (section 7).

    Training takes 6 P D operations on D tokens, inference 2 P D (a MAC is two operations). `ratio` is the number of tokens ever generated
    over the number trained on, R. The larger model multiplies both; the small one spends all of it on inference:
    k = size + 3 (size - 1) / R. It falls with R to `size`; with size 1 it is 1. Raises ValueError for a size below 1, a ratio of 0 or less.

    >>> inference_multiplier(14, 22), inference_multiplier(1, 0.1), inference_multiplier(14, float("inf"))
    (15.772727272727273, 1.0, 14.0)
    """
    size, ratio = checks.number("size", size, low=1), _ratio(ratio)
    return size + 3 * (size - 1) / ratio


def matched_size(n: float, ratio: float) -> float:
    """How many times larger a model is whose single answers cost what `n` answers of the small one do, training counted: the inverse.

    (n R + 3) / (R + 3); `n` itself where nothing is trained any more (R infinite). Raises ValueError for an `n` below 1.

    >>> round(matched_size(inference_multiplier(14, 0.16), 0.16), 9)
    14.0
    """
    n, ratio = checks.number("n", n, low=1), _ratio(ratio)
    return n if math.isinf(ratio) else (n * ratio + 3) / (ratio + 3)


def _ratio(ratio: float) -> float:
    return ratio if ratio == math.inf else checks.number("ratio", ratio, above=0)
