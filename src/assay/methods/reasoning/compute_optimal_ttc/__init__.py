"""Compute-optimal test-time compute: a number of generations is spent as a question's difficulty asks.

Charlie Snell et al., "Scaling LLM Test-Time Compute Optimally can be More Effective than Scaling Model Parameters" (arXiv 2408.03314).

- `strategies`: what N generations may be spent on: `Strategy` (samples, beam search, lookahead, chains of revisions) and `attempt`.
- `reward`: the process verifier (`ProcessReward`), its labels from roll-outs (`monte_carlo`), and `Lookahead`.
- `policy`: `ComputeOptimalPolicy.fit(log, difficulty).predict(difficulty, n)`, from logged generations; `cross_validated`.
- `revision`: rows to train a revising model on.
- `exchange`: operations of a small model's many answers against a larger model's one.

When NOT to use it: where questions cannot be told apart beforehand for less than is saved, and before the cheap rivals were tried: a
majority vote that stops as soon as k samples agree needs no verifier and no difficulty.
"""

from assay.methods.reasoning.compute_optimal_ttc.exchange import inference_multiplier, matched_size
from assay.methods.reasoning.compute_optimal_ttc.policy import (
    ComputeOptimalPolicy,
    Outcome,
    cross_validated,
    difficulty_bins,
    mean_score,
    of_logs,
    outcomes,
    pass_rate,
)
from assay.methods.reasoning.compute_optimal_ttc.revision import Revision, edit_distance, revision_rows
from assay.methods.reasoning.compute_optimal_ttc.reward import Lookahead, ProcessReward, monte_carlo
from assay.methods.reasoning.compute_optimal_ttc.strategies import Attempts, PrefixKept, Strategy, attempt, revised

__all__ = [
    "Attempts",
    "ComputeOptimalPolicy",
    "Lookahead",
    "Outcome",
    "PrefixKept",
    "ProcessReward",
    "Revision",
    "Strategy",
    "attempt",
    "cross_validated",
    "difficulty_bins",
    "edit_distance",
    "inference_multiplier",
    "matched_size",
    "mean_score",
    "monte_carlo",
    "of_logs",
    "outcomes",
    "pass_rate",
    "revised",
    "revision_rows",
]
