"""Configurable foundation models: a language model seen as bricks, of which an input needs only some.

After "Configurable Foundation Models: Building LLMs from a Modular Perspective" (arXiv 2409.02877). The paper is a survey with
measurements; this is what of it can be used.

Looking at the bricks that a model has by itself, the neurons of its MLPs:

    with masking(model, 0.7, "output"):                    the 70 % weakest neurons of every token and layer are zero
        model(ids)
    found = mean_activations(model, passages)              what each neuron did on each passage
    scorer = FunctionalityScorer().fit(found, labels)      how well it tells one function from the others
    with mask_neurons(model, scorer.specialists_["code"]): a function's neurons are zero

Using them: `partition` (groups of neurons), `to_bricks` (MLPs that compute only the groups a router picks), `for_task` (groups
chosen once), `editing` (train some neurons only), `grow` (more neurons, the same function).

Bricks that are added later: `BrickStore` (named, with keys; LoRA adapters through peft), `average`, `arithmetic`, `regression_mean`
(merging), `Stitched` (one after the other).

When not to use it: masking by what the neurons of a token do needs the very activations it would save, so it shows what could be
saved and saves nothing. Only `to_bricks` and real removal (`core.sparsity.removal`) save work.
"""

from __future__ import annotations

from assay.methods.compression.configurable_bricks.functionality import (
    FunctionalityScorer,
    LayerScores,
    average_precision,
    overlap,
)
from assay.methods.compression.configurable_bricks.groups import (
    BrickMlp,
    by_oracle,
    by_router,
    by_task,
    for_task,
    partition,
    to_bricks,
)
from assay.methods.compression.configurable_bricks.neurons import (
    below,
    mask_neurons,
    masking,
    mean_activations,
    mlps,
    part,
)
from assay.methods.compression.configurable_bricks.store import (
    Brick,
    BrickStore,
    Stitched,
    arithmetic,
    average,
    fit_interface,
    lora_brick,
    put_lora,
    regression_mean,
)
from assay.methods.compression.configurable_bricks.updating import editing, grow

__all__ = [
    "Brick",
    "BrickMlp",
    "BrickStore",
    "FunctionalityScorer",
    "LayerScores",
    "Stitched",
    "arithmetic",
    "average",
    "average_precision",
    "below",
    "by_oracle",
    "by_router",
    "by_task",
    "editing",
    "fit_interface",
    "for_task",
    "grow",
    "lora_brick",
    "mask_neurons",
    "masking",
    "mean_activations",
    "mlps",
    "overlap",
    "part",
    "partition",
    "put_lora",
    "regression_mean",
    "to_bricks",
]
