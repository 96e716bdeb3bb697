"""Greenformers: low-rank layers in place of dense ones, and what they save (arXiv 2108.10808; layers from ICASSP 2020).

A linear layer y = x W^T + b with W (o, i) becomes a linear encoder-decoder (LED), y = (x E^T) D^T + b with E (r, i), D (o, r).
It has r (i + o) parameters and MACs per token instead of i o, a gain below the break-even rank i o / (i + o). Convolutions become
CED units. `apply_low_rank` converts a trained model; a Low-Rank Transformer (LRT) is a transformer built from LED units
(`EncoderBlock(rank=...)`), trained from scratch. Linformer, the thesis' other route, shortens the attention's sequence instead.

When NOT to use it: a trained language model at half its parameters is destroyed unless it is trained afterwards (look at the
report's errors, and at the quality); close to the break-even rank, two thin products run slower than one; in layers with little
work (small models at batch 1 on a GPU), launches cost more than MACs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from assay.methods.core.layers.linears import left_alone, share
from assay.methods.core.layers.surgery import find, linear_kinds, takes_token_ids
from assay.methods.layers.greenformers.convert import LayerReport, LowRankReport, apply_low_rank, check_size
from assay.methods.layers.greenformers.economics import TrainingCost, training_cost
from assay.methods.layers.greenformers.encoder import (
    EncoderBlock,
    block_macs,
    crossover_tokens,
    linformer,
    linformer_attention_forward,
    use_linformer,
)
from assay.methods.layers.greenformers.released import auto_fact
from assay.methods.layers.greenformers.solvers import SOLVERS, Solver, factor, input_moments, output_basis, truncate
from assay.methods.layers.greenformers.units import CED, LED, UNITS, LEDEmbedding, break_even_rank
from assay.methods.transform import LEAST_SHARE, Effect, Fit, TuneContext, only

__all__ = [
    "CED",
    "LED",
    "SOLVERS",
    "UNITS",
    "EncoderBlock",
    "LEDEmbedding",
    "LayerReport",
    "LowRank",
    "LowRankReport",
    "Solver",
    "TrainingCost",
    "apply_low_rank",
    "auto_fact",
    "block_macs",
    "break_even_rank",
    "crossover_tokens",
    "factor",
    "input_moments",
    "linformer",
    "linformer_attention_forward",
    "output_basis",
    "training_cost",
    "transform",
    "truncate",
    "use_linformer",
]


@dataclass(frozen=True)
class LowRank:
    """The tuner's handle: factor the linear layers with the data-aware solver, calibrated on the context's text.

    Configuration: exactly one of `rank`, `energy` and `budget` (see `apply_low_rank`). Fused experts are not reached.
    """

    name: str = "greenformers"
    slot: Literal["structure"] = "structure"
    goals: frozenset[str] = frozenset({"ttft", "decode", "memory", "throughput"})
    exact: bool = False

    def applies_to(self, model: nn.Module, context: TuneContext) -> Fit:
        found = find(model, linear_kinds(), closed=UNITS)
        if not found:
            return Fit(False, f"{type(model).__name__} has no dense linear layers")
        if not len(context.calibration):
            return Fit(False, "it needs calibration text")
        if not takes_token_ids(model):
            return Fit(False, f"it is calibrated on token ids, and a {type(model).__name__} needs other inputs")
        part, rest = share(model, found), left_alone(model, found)
        if not part >= LEAST_SHARE:
            return Fit(False, f"it reaches {part:.0%} of the weights only: {rest}", share=part, reached=rest)
        saved = 1 - 0.1 * part
        return Fit(True, effects=(Effect("linear", macs=saved, bytes=saved),), share=part, reached=rest)

    def configs(self, model: nn.Module, context: TuneContext) -> list[dict[str, Any]]:
        return [{"energy": 0.999}, {"energy": 0.99}, {"budget": 0.8}]

    def check(self, config: Mapping[str, Any]) -> None:
        """Raises ValueError or TypeError naming the setting that is wrong."""
        check_size(**only(config, ("rank", "energy", "budget")))

    def apply(self, model: nn.Module, config: Mapping[str, Any], context: TuneContext) -> nn.Module:
        """Raises TypeError or ValueError, before anything is changed, for a configuration or a model it does not fit."""
        self.check(config)
        if not takes_token_ids(model):
            raise ValueError(f"model must be one that is calibrated on token ids, got {type(model).__name__}")
        found = find(model, linear_kinds(), closed=UNITS)
        if found and not (part := share(model, found)) >= LEAST_SHARE:
            raise ValueError(
                f"model must let half of its weights be reached, got {part:.0%}: {left_alone(model, found)}"
            )
        apply_low_rank(model, solver="data_svd", calibration=context.calibration, **config)
        return model

    def describe(self, config: Mapping[str, Any]) -> str:
        for name, words in (("budget", "with a share of {} of the parameters"), ("energy", "keeping {} of the energy")):
            if name in config:
                return f"low-rank linears {words.format(config[name])}"
        return f"low-rank linears of rank {config['rank']}" if "rank" in config else "low-rank linears"


transform = LowRank()
