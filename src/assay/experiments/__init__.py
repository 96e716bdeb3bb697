"""Experiments, claim by claim: a method, a real workload and the baselines. `assay.evidence` runs and judges them.

An experiment is a function decorated with `@experiment`, in `experiments/<family>/<slug>.py`. It gets one point of its grid as
keyword arguments and returns a `Trial` (callables to be timed in pairs) or a `Figure` (something it measured itself, other than a
time). Each point runs in processes of its own. What is declared beside it, see `experiment`.
"""

from assay.experiments.core import (
    Experiment,
    Figure,
    Guard,
    Operator,
    Quality,
    Trained,
    Trial,
    experiment,
    experiments_of,
)

__all__ = ["Experiment", "Figure", "Guard", "Operator", "Quality", "Trained", "Trial", "experiment", "experiments_of"]
