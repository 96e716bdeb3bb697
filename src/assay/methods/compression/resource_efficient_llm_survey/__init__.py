"""Resources of a language model, all of them, foretold and measured in the same fields.

After "Beyond Efficiency: A Systematic Survey of Resource-Efficient Large Language Models" (2024, arXiv 2401.00625), which orders methods
by the resource they save and the stage they act in, and asks for common metrics. The formulas are engineering identities in our own words:

- `decoder_of(config)` counts parameters, operations and bytes of a decoder (`Decoder`);
- `estimate`, `training_memory`, `network_bytes`: what serving and training take of each resource;
- `memory_forecast`, `with_times`: will it fit, and how fast, of a model that is not loaded (`assay profile` asks them);
- `other_forecast`: will it fit, of any other causal language model of transformers, counted on one that takes no memory;
- `ResourceReport`, `measure`, `markdown`, `compared`, `pareto`: one table, in which modelled and measured figures never mix;
- `Entry`, `entry_of`, `query`: the two-way order of methods.

Not for mixtures of experts, state-space models and encoders, whose blocks are not counted here: `decoder_of` refuses them, and of their
resources memory alone is foretold. Operations alone do not tell a time: utilisation has to be measured for each phase, or a few blocks run.
"""

from __future__ import annotations

from assay.methods.compression.resource_efficient_llm_survey.costs import (
    CARBON,
    KEPT,
    PUE,
    Range,
    TrainingMemory,
    activation_bytes,
    estimate,
    least_seconds,
    network_bytes,
    prompt_bytes,
    training_memory,
)
from assay.methods.compression.resource_efficient_llm_survey.decoder import (
    FORMATS,
    KINDS,
    Decoder,
    bits_to_bytes,
    decoder_of,
    element_bytes,
    matrix_bytes,
)
from assay.methods.compression.resource_efficient_llm_survey.empty import cache_growth, counted
from assay.methods.compression.resource_efficient_llm_survey.forecast import (
    Forecast,
    Probe,
    Timed,
    device_for,
    first_blocks,
    foretold,
    memory_forecast,
    other_forecast,
    probe,
    some_blocks,
    timed,
    with_other_parts,
    with_times,
)
from assay.methods.compression.resource_efficient_llm_survey.report import (
    MORE_IS_BETTER,
    UNITS,
    ResourceReport,
    Seen,
    compared,
    fidelity,
    markdown,
    measure,
    pareto,
)
from assay.methods.compression.resource_efficient_llm_survey.taxonomy import (
    RESOURCES,
    STAGES,
    Entry,
    entry_of,
    query,
)

__all__ = [
    "CARBON",
    "FORMATS",
    "KEPT",
    "KINDS",
    "MORE_IS_BETTER",
    "PUE",
    "RESOURCES",
    "STAGES",
    "UNITS",
    "Decoder",
    "Entry",
    "Forecast",
    "Probe",
    "Range",
    "ResourceReport",
    "Seen",
    "Timed",
    "TrainingMemory",
    "activation_bytes",
    "bits_to_bytes",
    "cache_growth",
    "compared",
    "counted",
    "decoder_of",
    "device_for",
    "element_bytes",
    "entry_of",
    "estimate",
    "fidelity",
    "first_blocks",
    "foretold",
    "least_seconds",
    "markdown",
    "matrix_bytes",
    "measure",
    "memory_forecast",
    "network_bytes",
    "other_forecast",
    "pareto",
    "probe",
    "prompt_bytes",
    "query",
    "some_blocks",
    "timed",
    "training_memory",
    "with_other_parts",
    "with_times",
]
