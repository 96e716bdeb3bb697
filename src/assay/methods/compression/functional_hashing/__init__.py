"""Unified functional hashing: identify a candidate by what it computes, and evaluate each function once.

After "Unified Functional Hashing in Automatic Machine Learning" (arXiv 2302.05433), which builds on the functional
equivalence cache of AutoML-Zero. A search meets the same function in many guises: dead code, renamed nodes, commuted sums.
`functional_hash` runs a candidate on a few fixed, cheap inputs with fixed seeds and hashes the outputs; `FunctionalCache`
keeps the fitness under that key, so that a function that was already evaluated costs one hash.

The cost per candidate is h + (1 - p) E instead of E, for hash cost h, hit rate p and evaluation cost E (`speedup`). It does not pay
if an evaluation is about as cheap as the probe, or if the search hardly ever meets a function twice.

Keys are evidence, not proof: two functions that agree on all probes share a key. Never base correctness on equal keys alone.
"""

from __future__ import annotations

from assay.methods.compression.functional_hashing.cache import (
    CacheReport,
    FunctionalCache,
    collision_bound,
    deduplicate,
    speedup,
)
from assay.methods.compression.functional_hashing.hashing import (
    Training,
    canonical_inputs,
    first_use_order,
    functional_hash,
    initialise,
    parameter_seed,
)

__all__ = [
    "CacheReport",
    "FunctionalCache",
    "Training",
    "canonical_inputs",
    "collision_bound",
    "deduplicate",
    "first_use_order",
    "functional_hash",
    "initialise",
    "parameter_seed",
    "speedup",
]
