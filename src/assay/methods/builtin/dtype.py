"""bfloat16: half the bytes of float32, and on processors with bfloat16 dot products four times its speed.

It counts as free (`exact`): models are published in it and everybody can have it by one argument. Tables that a model computes
for itself (the rotary frequencies) stay in float32, as they do when transformers loads a model in bfloat16; a plain
`model.to(torch.bfloat16)` rounds them, and with them every position.

When NOT to use it: processors without bfloat16 arithmetic (before AVX-512 BF16, AMX, ARM v8.6), where it is slower than float32.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from assay.methods.transform import GOALS, Effect, Fit, TuneContext

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


class DType:
    """Casts the model's parameters. Configuration: `dtype` "bfloat16" (default) or "float32"."""

    name = "dtype"
    slot = "dtype"
    goals: frozenset[str] = frozenset(GOALS)
    exact = True

    def applies_to(self, model: nn.Module, context: TuneContext) -> Fit:
        dtypes = {parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()}
        if torch.float32 not in dtypes:
            return Fit(False, f"no float32 parameters, only {', '.join(sorted(map(str, dtypes))) or 'none'}")
        half = [Effect("linear", bytes=0.5, dtype="bfloat16"), Effect("attention", bytes=0.5, dtype="bfloat16")]
        return Fit(True, effects=(*half, Effect("other", bytes=0.5)))

    def configs(self, model: nn.Module, context: TuneContext) -> list[dict[str, Any]]:
        return [{"dtype": "bfloat16"}]

    def apply(self, model: nn.Module, config: Mapping[str, Any], context: TuneContext) -> nn.Module:
        name = config.get("dtype", "bfloat16")
        if name not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {name!r}")
        if unknown := set(config) - {"dtype"}:
            raise ValueError(f"unknown configuration {sorted(unknown)}; allowed: dtype")
        return cast(model, DTYPES[name])


def cast(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """`model.to(dtype)`, except for buffers that are not saved with the model: those it computes, and needs as they are."""
    computed = [
        (module, name, getattr(module, name))
        for module in model.modules()
        for name in module._non_persistent_buffers_set
        if getattr(module, name) is not None
    ]
    model = model.to(dtype)
    for module, name, buffer in computed:
        setattr(module, name, buffer)
    return model


transform = DType()
