"""Accuracies that are given instead of trained, for the proofs of image models."""

from __future__ import annotations

import numpy as np

from assay.experiments.rates import Rate
from assay.experiments.vision.training import Judged
from assay.workloads.pictures import PICTURES


def judged(accuracy: float) -> Judged:
    """Three seeds with this accuracy, each photograph a little apart from the mean."""
    apart = np.linspace(-0.02, 0.02, len(PICTURES))
    return Judged(accuracy + np.stack([apart, -apart, 0 * apart]), Rate(0.01, (0.003, 0.01, 0.03)))
