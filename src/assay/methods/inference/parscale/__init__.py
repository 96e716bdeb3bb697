"""ParScale: parallel streams of one model in the place of parameters (Parallel Scaling Law for Language Models, arXiv 2505.10475).

- `model`: `ParScaleForCausalLM`, a model of transformers around any decoder; training recipes and adapters.
- `streams`: its cache and attention.
- `released`: the checkpoints of the paper, read and written.
- `law`: `ParallelScalingLaw`, the law as a scikit-learn estimator, and `published`, the losses that the paper fitted it to.
- `cost`: bytes and seconds by a model of the machine.
"""

from __future__ import annotations

from typing import Any

from assay.methods.inference.parscale.model import (
    ParScaleConfig,
    ParScaleForCausalLM,
    fold_prefixes,
    load_adapter,
    prepare_training,
    save_adapter,
)
from assay.methods.inference.parscale.released import load_released, save_released
from assay.methods.inference.parscale.streams import StreamCache

__all__ = [
    "ParScaleConfig",
    "ParScaleForCausalLM",
    "ParallelScalingLaw",
    "StreamCache",
    "fold_prefixes",
    "load_adapter",
    "load_released",
    "prepare_training",
    "save_adapter",
    "save_released",
]


def __getattr__(name: str) -> Any:
    """`ParallelScalingLaw` when it is asked for: it needs scikit-learn, which the rest does not."""
    if name == "ParallelScalingLaw":
        from assay.methods.inference.parscale.law import ParallelScalingLaw

        return ParallelScalingLaw
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
