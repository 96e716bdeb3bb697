"""Tuning the settings of an inference engine by measurement, and a report on how much they matter.

After "The Impact of Hyperparameters on Large Language Model Inference Performance" (arXiv 2408.01050), which finds that throughput
over batch size, number of devices and the like is irregular, with sharp peaks, and that the best setting changes with the
hardware. This room makes the finding usable:

- a typed space with conditions and constraints (`Space`), and a memory floor that rules settings out before they are tried;
- trials that may fail: an out-of-memory is remembered, and nothing that needs at least as much memory is tried again;
- `search` by grid, random, TPE (Optuna) or successive halving. The default is trial 0; no setting evaluated had a higher mean than
  the one chosen, and its gain is measured freshly after the choice, in turns with the default;
- a report: `landscape` (gap, local maxima that noise does not explain, sensitivity) and `transfer_matrix` between environments;
- an engine to tune: Hugging Face generation on given prompts (`HuggingFaceEngine`, `IsolatedEngine`).

Throughput is generated tokens per second of wall time, prompt and padding excluded. The setting that is best for throughput is not
the best for latency: give `limits` for that. Searching costs time, see `SearchResult.break_even_tokens`: for fewer tokens than that,
keep the default.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from assay.methods.core.generation.loop import check_settings, set_settings, why_not
from assay.methods.serving.inference_hyperparameters.engine import (
    HuggingFaceEngine,
    Infilling,
    IsolatedEngine,
    infilling_problems,
    measure_settings,
    mismatch_rate,
)
from assay.methods.serving.inference_hyperparameters.report import (
    Axis,
    Invariance,
    Landscape,
    landscape,
    local_maxima,
    relative_noise,
    transfer_matrix,
    workload_invariance,
)
from assay.methods.serving.inference_hyperparameters.searchers import (
    GridSearcher,
    RandomSearcher,
    Search,
    Searcher,
    TpeSearcher,
    search,
)
from assay.methods.serving.inference_hyperparameters.space import (
    Categorical,
    Constraint,
    Float,
    Int,
    Params,
    Space,
    divides,
    fits_memory,
    hugging_face_space,
    key_of,
    memory_floor,
    serving_engine_space,
)
from assay.methods.serving.inference_hyperparameters.trials import (
    Mean,
    Objective,
    Outcome,
    SearchResult,
    Trial,
    engine_settings,
    mean_of,
)
from assay.methods.transform import Effect, Fit, TuneContext, only

__all__ = [
    "Axis",
    "Categorical",
    "Constraint",
    "Float",
    "GridSearcher",
    "HuggingFaceEngine",
    "InferenceTuner",
    "Infilling",
    "Int",
    "Invariance",
    "IsolatedEngine",
    "Landscape",
    "Mean",
    "Objective",
    "Outcome",
    "Params",
    "RandomSearcher",
    "Search",
    "SearchResult",
    "Searcher",
    "Space",
    "TpeSearcher",
    "Trial",
    "TunedSettings",
    "divides",
    "engine_settings",
    "fits_memory",
    "hugging_face_space",
    "infilling_problems",
    "key_of",
    "landscape",
    "local_maxima",
    "mean_of",
    "measure_settings",
    "memory_floor",
    "mismatch_rate",
    "relative_noise",
    "search",
    "serving_engine_space",
    "transfer_matrix",
    "transform",
    "workload_invariance",
]


class InferenceTuner:
    """A search in the shape of a scikit-learn estimator: `fit(objective)`, then `best_params_`, `best_value_`, `landscape_`.

    The arguments are those of `search`. `result_` has the rest: trials, search cost, break-even tokens.
    """

    _names = ("space", "method", "trials", "seed", "confirm", "levels", "limits", "max_mismatch", "journal")

    def __init__(
        self,
        space: Space,
        *,
        method: Search = "tpe",
        trials: int = 30,
        seed: int = 0,
        confirm: int = 3,
        levels: int = 5,
        limits: Mapping[str, float] | None = None,
        max_mismatch: float = 0.0,
        journal: str | Path | None = None,
    ):
        self.space, self.method, self.trials, self.seed, self.confirm = space, method, trials, seed, confirm
        self.levels, self.limits, self.max_mismatch, self.journal = levels, limits, max_mismatch, journal

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """The arguments, by name."""
        return {name: getattr(self, name) for name in self._names}

    def set_params(self, **params: Any) -> InferenceTuner:
        """Change arguments. Raises ValueError for an unknown one."""
        if unknown := set(params) - set(self._names):
            raise ValueError(f"params must be among {', '.join(self._names)}, got {', '.join(sorted(unknown))}")
        for name, value in params.items():
            setattr(self, name, value)
        return self

    def fit(self, objective: Objective, y: None = None) -> InferenceTuner:
        """Search. Returns self."""
        arguments = self.get_params()
        self.result_ = search(arguments.pop("space"), objective, **arguments)
        self.best_params_ = self.result_.best_params
        self.best_value_ = self.result_.best
        self.landscape_ = landscape(self.space, self.result_.trials)
        return self


@dataclass(frozen=True)
class TunedSettings:
    """Batch size, order and threads, which `generate_batch` reads from `model.assay_settings`; the tuner measures which is best.

    Other batch shapes sum in another order: outputs are the same up to rounding, which counts as exact.
    """

    name: str = "inference_hyperparameters"
    slot: Literal["settings"] = "settings"
    goals: frozenset[str] = frozenset({"throughput"})
    exact: bool = True

    def applies_to(self, model: nn.Module, context: TuneContext) -> Fit:
        """To any decoder that generates more than one prompt."""
        if reason := why_not(model):
            return Fit(False, reason)
        if context.batch_size < 2:
            return Fit(False, "there is one prompt only, nothing to batch")
        # Our guess: against batches of 8 in order of arrival, half the padding, and weights read half as often.
        return Fit(True, effects=(Effect("linear", macs=0.55, bytes=0.5), Effect("attention", macs=0.55)))

    def configs(self, model: nn.Module, context: TuneContext) -> list[dict[str, Any]]:
        """Larger batches than the default of 8 where there are prompts for them, sorted, on all threads and on half of them."""
        threads = torch.get_num_threads()
        sizes = dict.fromkeys(min(size, context.batch_size) for size in (16, 32, 8))
        configs = [{"batch_size": size, "sort_by_length": True, "threads": threads} for size in sizes]
        if threads > 1:
            configs.append({**configs[0], "threads": threads // 2})
        return configs

    def check(self, config: Mapping[str, Any]) -> None:
        """Raises ValueError or TypeError naming the setting that is wrong."""
        check_settings(only(config, ("batch_size", "sort_by_length", "threads")))

    def apply(self, model: nn.Module, config: Mapping[str, Any], context: TuneContext) -> nn.Module:
        """Merge the configuration into the model's settings.

        Raises TypeError or ValueError, before anything is changed, for a configuration or a model it does not fit.
        """
        self.check(config)
        if reason := why_not(model):
            raise ValueError(f"inference_hyperparameters does not fit this model: {reason}")
        set_settings(model, **config)
        return model

    def describe(self, config: Mapping[str, Any]) -> str:
        order = "sorted " if config.get("sort_by_length") else ""
        size = f" of {config['batch_size']}" if "batch_size" in config else ""
        threads = config.get("threads")
        return f"{order}batches{size}" + (
            f" on {threads} thread{'s' if threads != 1 else ''}" if threads is not None else ""
        )


transform = TunedSettings()
