"""Effi-Code: training data of programs that were profiled and rewritten until they were both right and cheap, and how gains are told.

    bench = Bench(workers, "f", tests, costly, compare)                        # right or wrong, and the cost
    loop = SelfOptimize(Rules(), LineProfiler(workers, "f", calls), rounds=5)  # or Writer(complete, "f"): a language model
    loop(program, bench).program                                               # never dearer than it was, and right

After arXiv 2410.10209. `curate` is the data procedure with its filters, `apart_from` keeps an evaluation's tasks out of it, `write_chat`
writes what trainers read. `et_mu_tmu` are the three overheads of a sampled memory-time curve (`memory_curve`), `normalised` holds them
against a reference, `compared` is the rule of tasks that both models solve. A model is tuned on the data by any trainer: the paper's
settings are in `TRAINING`.

Programs run in the sandbox only, and profiles are taken in runs of their own. When NOT to use it: for programs without tests, and for a
figure of how good the loop is from the costs that the loop chose by (measure anew, on other inputs).
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from assay.methods.code.effi_code.data import (
    ALIKE,
    LEAST_GAIN,
    Curated,
    Item,
    Reason,
    Source,
    Split,
    apart_from,
    chat,
    curate,
    deterministic,
    risky,
    similarity,
    write_chat,
)
from assay.methods.code.effi_code.generators import ORDERS, Extracted, Order, Rules, Writer, extracted, prompt_of
from assay.methods.code.effi_code.loop import (
    ROUNDS,
    Bench,
    Evaluate,
    Evaluated,
    Generator,
    Optimised,
    Request,
    SelfOptimize,
    Step,
)
from assay.methods.code.effi_code.metrics import (
    Compared,
    Normalised,
    Overhead,
    compared,
    et_mu_tmu,
    geometric,
    normalised,
)
from assay.methods.code.effi_code.profiling import (
    Curve,
    LineCost,
    LineProfiler,
    Profile,
    ProfileError,
    Profiler,
    memory_curve,
)

TRAINING: Mapping[str, Any] = MappingProxyType(
    {
        "learning_rate": 5e-6,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0.03,  # of all steps
        "num_train_epochs": 4,
        "max_length": 2048,
        "per_device_train_batch_size": 8,
        "gradient_accumulation_steps": 2,
        "bf16": True,
    }
)
"""How the paper tunes models of about 7 billion weights on its data, all weights, by the names that trl's SFTConfig and transformers have
for them. Nothing was tuned with them here: search the learning rate of your model."""

__all__ = [
    "ALIKE",
    "Bench",
    "Compared",
    "Curated",
    "Curve",
    "Evaluate",
    "Evaluated",
    "Extracted",
    "Generator",
    "Item",
    "LEAST_GAIN",
    "LineCost",
    "LineProfiler",
    "Normalised",
    "ORDERS",
    "Optimised",
    "Order",
    "Overhead",
    "Profile",
    "ProfileError",
    "Profiler",
    "ROUNDS",
    "Reason",
    "Request",
    "Rules",
    "SelfOptimize",
    "Source",
    "Split",
    "Step",
    "TRAINING",
    "Writer",
    "apart_from",
    "chat",
    "compared",
    "curate",
    "deterministic",
    "et_mu_tmu",
    "extracted",
    "geometric",
    "memory_curve",
    "normalised",
    "prompt_of",
    "risky",
    "similarity",
    "write_chat",
]
