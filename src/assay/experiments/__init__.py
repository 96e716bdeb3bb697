"""Claim by claim: a method, a real workload and the baselines, as trials that are run and judged elsewhere.

An experiment is a function decorated with `@experiment`; it lives in `experiments/<family>/<slug>.py`. It gets one point of
its grid as keyword arguments and returns a `Trial` (two or three callables to be timed in pairs) or a `Figure` (something it
measured itself, not a time). Each point runs in a process of its own.
"""

from assay.experiments.core import Experiment, Figure, Quality, Trial, experiment, experiments_of

__all__ = ["Experiment", "Figure", "Quality", "Trial", "experiment", "experiments_of"]
