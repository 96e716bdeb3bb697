"""Idealized and denoised runtime: a two-part model of what one request costs, from a small grid of measurements.

After "Cheaply Evaluating Inference Efficiency Metrics for Autoregressive Transformer APIs" (NeurIPS 2023). A request with p prompt
tokens and o output tokens takes T(p, o) = overhead + T_prompt(p) + (o - 1) beta. `profile` measures a grid and fits it:

- idealized, on your own system: T_prompt(p) is the measured T(p, 1);
- denoised, for an API reached through a network and shared with others: the fastest of several runs represents a cell, and
  T_prompt(p) is the value at o = 1 of a line through the cells of p. `probe_endpoint` does this for an OpenAI-compatible server.

The profile costs the same however many requests it then prices: total runtime, dollars and energy of a workload are sums of
T(p_i, o_i) (`RuntimeModel.predict`, `dollars`, `joules`, `idealized_saving`, `denoised_saving`).

Not for engines whose time per token is not a function of the length (speculative decoding, chunked batching with other users'
requests, prompt caches); the reported errors show that. Long contexts need `slope="context"`.
Our choices, where the paper is silent, are marked as such below.
"""

from __future__ import annotations

from assay.methods.serving.idealized_runtime.endpoint import (
    EndpointProfile,
    ProbeError,
    Streamed,
    probe_endpoint,
    random_words,
)
from assay.methods.serving.idealized_runtime.model import (
    Errors,
    MethodName,
    Run,
    RuntimeModel,
    Slope,
    Variant,
    fastest,
    fit,
    non_decreasing,
)
from assay.methods.serving.idealized_runtime.prices import (
    add_runtimes,
    denoised_saving,
    dollars,
    flops_proxy,
    idealized_saving,
    joules,
    pareto_front,
    share_below,
)
from assay.methods.serving.idealized_runtime.profiling import (
    PAPER_OUTPUT_TOKENS,
    PAPER_PROMPT_TOKENS,
    middle_cells,
    profile,
    transformers_runner,
)

__all__ = [
    "EndpointProfile",
    "Errors",
    "MethodName",
    "PAPER_OUTPUT_TOKENS",
    "PAPER_PROMPT_TOKENS",
    "ProbeError",
    "Run",
    "RuntimeModel",
    "Slope",
    "Streamed",
    "Variant",
    "add_runtimes",
    "denoised_saving",
    "dollars",
    "fastest",
    "fit",
    "flops_proxy",
    "idealized_saving",
    "joules",
    "middle_cells",
    "non_decreasing",
    "pareto_front",
    "probe_endpoint",
    "profile",
    "random_words",
    "share_below",
    "transformers_runner",
]
