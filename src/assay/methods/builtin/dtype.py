"""bfloat16: half the bytes of float32, and four times its speed on processors with bfloat16 dot products.

It counts as `exact`: models are published in it, and anyone can have it with one argument. Tables that a model computes for
itself get the dtype they have when transformers loads the model in bfloat16: the rotary frequencies stay in float32. A plain
`model.to(torch.bfloat16)` rounds them, and every position with them.

When NOT to use it: processors without bfloat16 arithmetic (before AVX-512 BF16, AMX, ARM v8.6), where it is slower than float32.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from assay import checks
from assay.methods.transform import GOALS, Effect, Fit, TuneContext, only

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


class DType:
    """Casts the model's parameters. Configuration: `dtype` "bfloat16" (default) or "float32"."""

    name = "dtype"
    slot = "dtype"
    goals: frozenset[str] = frozenset(GOALS)
    exact = True

    def applies_to(self, model: nn.Module, context: TuneContext) -> Fit:
        dtypes = {parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()}
        if not dtypes & {torch.float32, torch.float16}:
            return Fit(False, f"no float32 or float16 parameters, only {', '.join(sorted(map(str, dtypes))) or 'none'}")
        half = [Effect("linear", bytes=0.5, dtype="bfloat16"), Effect("attention", bytes=0.5, dtype="bfloat16")]
        return Fit(True, effects=(*half, Effect("other", bytes=0.5)))

    def configs(self, model: nn.Module, context: TuneContext) -> list[dict[str, Any]]:
        return [{"dtype": "bfloat16"}]

    def check(self, config: Mapping[str, Any]) -> None:
        """Raises ValueError or TypeError naming the setting that is wrong."""
        only(config, ("dtype",))
        dtype_of(config)

    def apply(self, model: nn.Module, config: Mapping[str, Any], context: TuneContext) -> nn.Module:
        self.check(config)
        return cast(model, DTYPES[dtype_of(config)])

    def describe(self, config: Mapping[str, Any]) -> str:
        return dtype_of(config)


def dtype_of(config: Mapping[str, Any]) -> str:
    """The name of the dtype a configuration asks for, "bfloat16" where it names none. Raises ValueError or TypeError.

    >>> dtype_of({}), dtype_of({"dtype": "float32"})
    ('bfloat16', 'float32')
    """
    name: str = checks.choice("dtype", config.get("dtype", "bfloat16"), list(DTYPES))
    return name


def cast(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """`model.to(dtype)`, except for buffers that are not saved with the model: those it computes, as transformers would load them.

    Rotary frequencies stay in float32, a table of positions that is added to the embeddings goes along. Models that are not
    transformers' keep all such buffers as they are.
    """
    wanted = _computed(model, dtype)
    kept = []
    for path, module in model.named_modules():
        for name in module._non_persistent_buffers_set:
            buffer = getattr(module, name)
            if buffer is not None:
                target = wanted.get(f"{path}.{name}", buffer.dtype)
                kept.append((module, name, buffer.to(target) if buffer.is_floating_point() else buffer))
    model = model.to(dtype)
    for module, name, buffer in kept:
        setattr(module, name, buffer)
    return model


def _computed(model: nn.Module, dtype: torch.dtype) -> dict[str, torch.dtype]:
    """The dtypes of the buffers of a model of this class created in `dtype`, as loading would; takes no memory."""
    config = getattr(model, "config", None)
    if config is None:
        return {}
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device("meta"):
            twin = type(model)(copy.deepcopy(config))
    except (TypeError, RuntimeError, NotImplementedError):  # a class that is made in another way
        return {}
    finally:
        torch.set_default_dtype(before)
    return {name: buffer.dtype for name, buffer in twin.named_buffers()}


transform = DType()
