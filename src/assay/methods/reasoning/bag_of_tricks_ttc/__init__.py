"""Bag of Tricks for Inference-time Computation of LLM Reasoning (arXiv 2502.07191): ways of spending test-time compute, compared alike.

A proposer (prompt, temperature, top-p, how many) writes candidates and a verifier chooses; published gains of such methods are seldom
comparable, since each comes with its own prompts, temperatures and rewards, and counts candidates rather than tokens. Here all of them
are given the same `Asking` and are charged by one ledger, judging included; `grid` names settings, `run` tries them on questions, `chosen`
picks one, `at_tokens` compares at equal tokens. Paper and released code agree on the knobs' defaults: temperature 0.7, top-p 0.9, N = 32.

- `ways`: one sample, best of N, majority, weighted majority, self-refinement.
- `trees`: step-level best of N, beam search, MCTS, depth first.
- `judges`: self-evaluation, a verifier that remembers. The others are the shared ones (`assay.methods.core.reasoning.verifier`).
- `prefixes`: samples at many temperatures for little more than one.

When NOT to use it: to serve. It asks one question after the other.
"""

from assay.methods.reasoning.bag_of_tricks_ttc.asking import Asking, Outcome
from assay.methods.reasoning.bag_of_tricks_ttc.grid import (
    UNJUDGED,
    WAYS,
    Question,
    Row,
    Setting,
    at_tokens,
    chosen,
    grid,
    run,
)
from assay.methods.reasoning.bag_of_tricks_ttc.judges import Remembered, SelfEvaluation
from assay.methods.reasoning.bag_of_tricks_ttc.prefixes import SharedPrefixes
from assay.methods.reasoning.bag_of_tricks_ttc.trees import beam, depth_first, mcts, step_greedy
from assay.methods.reasoning.bag_of_tricks_ttc.ways import best_of_n, majority, one, self_refine, weighted_majority

__all__ = [
    "UNJUDGED", "WAYS", "Asking", "Outcome", "Question", "Remembered", "Row", "SelfEvaluation", "Setting",
    "SharedPrefixes", "at_tokens", "beam", "best_of_n", "chosen", "depth_first", "grid", "majority", "mcts", "one",
    "run", "self_refine", "step_greedy", "weighted_majority",
]  # fmt: skip
