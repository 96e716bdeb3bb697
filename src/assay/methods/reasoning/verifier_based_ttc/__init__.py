"""Imitate successful long traces, or learn from rewards? (Setlur et al., ICML 2025, arXiv 2502.12118)

    found = fit("results/samples_gsm8k_2026-01-01.jsonl")      # samples that were logged: nothing is generated
    found.heterogeneity                                        # how unequal the traces of one prompt are
    found.anti_concentration                                   # how often one is far above their mean
    found.advice(prompts=500)                                  # which of the two the paper's rates speak for

- `diagnostics`: returns of traces, heterogeneity, anti-concentration, success at cut budgets, and the advice; as numpy
  functions and for logs.
- `reweighting`: the best distribution over traces near the base: within a chi-square or a KL ball, and best-of-N.
- `training`: the two ways in plain torch: imitation of right traces; a verifier, and policy gradients against it with
  a KL penalty.
- `planted`: the didactic problem, a hidden pattern that a trace has to contain, and experts of several strengths.
"""

from assay.methods.reasoning.verifier_based_ttc.diagnostics import (
    Advice,
    Diagnosis,
    Heterogeneity,
    anti_concentration,
    budget_curve,
    fit,
    heterogeneity,
    recommend,
    returns,
    stepwise_heterogeneity,
)
from assay.methods.reasoning.verifier_based_ttc.planted import Planted
from assay.methods.reasoning.verifier_based_ttc.reweighting import best_of_n_weights, reweighted
from assay.methods.reasoning.verifier_based_ttc.training import fit_verifier, imitate, policy_gradient

__all__ = [
    "Advice", "Diagnosis", "Heterogeneity", "Planted", "anti_concentration", "best_of_n_weights", "budget_curve", "fit",
    "fit_verifier", "heterogeneity", "imitate", "policy_gradient", "recommend", "returns", "reweighted", "stepwise_heterogeneity",
]  # fmt: skip
