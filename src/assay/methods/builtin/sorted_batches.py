"""Sorted batches: group prompts of similar length, so that little of a batch is padding. Nothing is lost.

It is the strongest baseline for anything that packs or schedules prompts (the "length-ordered" baseline of arXiv 2404.09529).
When NOT to use it: prompts that must be answered in the order they arrive. All must be there before the first batch runs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from assay import checks
from assay.methods.core.generation.loop import set_settings, why_not
from assay.methods.transform import Effect, Fit, TuneContext, only


@dataclass(frozen=True)
class SortedBatches:
    """Sets `model.assay_settings`, which `generate_batch` reads. Configuration: `batch_size` (default: as it is set, 8)."""

    name: str = "sorted_batches"
    slot: Literal["batching"] = "batching"
    goals: frozenset[str] = frozenset({"throughput"})
    exact: bool = True

    def applies_to(self, model: nn.Module, context: TuneContext) -> Fit:
        if reason := why_not(model):
            return Fit(False, reason)
        # Our guess for prompts of mixed length: half of an arrival-order batch is padding, a tenth of a sorted one.
        return Fit(True, effects=(Effect("linear", macs=0.55), Effect("attention", macs=0.55)))

    def configs(self, model: nn.Module, context: TuneContext) -> list[dict[str, Any]]:
        return [{"batch_size": size} for size in dict.fromkeys([8, 16, 32, context.batch_size]) if size > 1]

    def check(self, config: Mapping[str, Any]) -> None:
        """Raises ValueError or TypeError naming the setting that is wrong."""
        if "batch_size" in only(config, ("batch_size",)):
            checks.whole("batch_size", config["batch_size"], low=1)

    def describe(self, config: Mapping[str, Any]) -> str:
        return f"sorted batches of {config['batch_size']}" if "batch_size" in config else "sorted batches"

    def apply(self, model: nn.Module, config: Mapping[str, Any], context: TuneContext) -> nn.Module:
        """Raises TypeError or ValueError, before anything is changed, for a configuration or a model it does not fit."""
        self.check(config)
        if reason := why_not(model):
            raise ValueError(f"sorted_batches does not fit this model: {reason}")
        set_settings(model, sort_by_length=True, prefill=None, **config)
        return model


transform = SortedBatches()
