"""What can be done to an image classifier: each option says whether it fits a model, and applies itself.

`free` options are what anyone has from torch in ten lines; they make the free baseline. `exact` ones lose nothing but rounding. The order
of `OPTIONS` is the order in which a recipe applies them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from assay import checks
from assay.methods.core.vision import int8_conv, token_merging
from assay.methods.core.vision.folding import NORMS, fold_batch_norm

LEAST_SHARE = 0.5  # of the model's multiply-accumulates or weights: an option that reaches less does not fit


@dataclass(frozen=True)
class Option:
    """`why_not(model)` is "" where it fits; `apply(model, calibration, **settings)` changes it (calibration: batches of inputs).

    `module` is the one that does the work, "" where torch does it alone: when its code changes, what was measured with it is stale.
    """

    name: str
    words: str
    free: bool
    exact: bool
    why_not: Callable[[nn.Module], str]
    apply: Callable[..., nn.Module]
    module: str = ""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    values: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)  # worth trying, by setting

    def configs(self) -> list[dict[str, Any]]:
        """The settings worth trying."""
        if not self.values:
            return [{}]
        return [{name: value} for name, values in self.values.items() for value in values]

    def check(self, config: Mapping[str, Any]) -> None:
        """Raises ValueError for a setting it does not have, or a value that none could have."""
        for name, value in config.items():
            checks.choice("setting", name, list(self.defaults) or ["none"])
            checks.whole(name, value, low=1, high=1024)


def _no_norms(model: nn.Module) -> str:
    return "" if any(isinstance(module, NORMS) for module in model.modules()) else "it has no BatchNorm"


def _fold(model: nn.Module, calibration: list[Tensor]) -> nn.Module:
    return fold_batch_norm(model, calibration[0][:2].to(_dtype(model)))


def _has_float32(model: nn.Module) -> str:
    return "" if _dtype(model) == torch.float32 else f"its weights are {_dtype(model)}"


def _bfloat16(model: nn.Module, calibration: list[Tensor]) -> nn.Module:
    from assay.methods.builtin.dtype import cast

    return cast(model, torch.bfloat16)


def _no_convolutions(model: nn.Module) -> str:
    return (
        ""
        if any(isinstance(module, nn.Conv2d | int8_conv.Int8Conv2d) for module in model.modules())
        else "it has no convolutions"
    )


def _channels_last(model: nn.Module, calibration: list[Tensor]) -> nn.Module:
    return model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def _no_int8_convolutions(model: nn.Module) -> str:
    if reason := int8_conv.why_not():
        return reason
    layers = int8_conv.convolutions(model).values()
    share = sum(layer.weight.numel() for layer in layers) / max(sum(p.numel() for p in model.parameters()), 1)
    return "" if share >= LEAST_SHARE else f"convolutions hold {100 * share:.0f} % of its weights"


def _int8_convolutions(model: nn.Module, calibration: list[Tensor]) -> nn.Module:
    dtype = _dtype(model)
    return int8_conv.quantize_convolutions(model, [batch.to(dtype) for batch in calibration])


def _linears(model: nn.Module) -> dict[str, nn.Linear]:
    return {name: module for name, module in model.named_modules() if type(module) is nn.Linear}


def _few_linears(model: nn.Module) -> str:
    share = sum(layer.weight.numel() for layer in _linears(model).values()) / max(
        sum(p.numel() for p in model.parameters()), 1
    )
    return "" if share >= LEAST_SHARE else f"linear layers hold {100 * share:.0f} % of its weights"


def _int8_linears(model: nn.Module, calibration: list[Tensor]) -> nn.Module:
    from assay.methods.core.quantize.int8_linear import quantize_linears

    return quantize_linears(model)


def _compile(model: nn.Module, calibration: list[Tensor]) -> nn.Module:
    model.compile(dynamic=False)
    return model


def _cannot_compile(model: nn.Module) -> str:
    if " " in torch.__file__:  # torch's own compiler command does not quote its include paths
        return f"torch.compile builds no C++ when torch lies in a path with spaces: {torch.__file__}"
    if any(isinstance(module, int8_conv.Int8Conv2d) for module in model.modules()):
        return "its 8-bit convolutions are compiled already"
    return ""


def _dtype(model: nn.Module) -> torch.dtype:
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)


OPTIONS: dict[str, Option] = {
    option.name: option
    for option in (
        Option(
            "fold_batch_norm",
            "BatchNorm folded into the convolutions",
            True,
            True,
            _no_norms,
            _fold,
            "assay.methods.core.vision.folding",
        ),
        Option("bfloat16", "bfloat16", True, True, _has_float32, _bfloat16, "assay.methods.builtin.dtype"),
        Option(
            "int8_convolutions",
            "INT8 convolutions",
            False,
            False,
            _no_int8_convolutions,
            _int8_convolutions,
            "assay.methods.core.vision.int8_conv",
        ),
        Option(
            "int8_linears",
            "INT8 linear layers",
            False,
            False,
            _few_linears,
            _int8_linears,
            "assay.methods.core.quantize.int8_linear",
        ),
        Option(
            "merge_tokens",
            "{tokens} tokens merged after each block",
            False,
            False,
            token_merging.why_not,
            lambda model, calibration, tokens: token_merging.merge_tokens(model, tokens),
            "assay.methods.core.vision.token_merging",
            {"tokens": 8},
            {"tokens": (4, 8, 16)},
        ),  # fmt: skip
        Option("channels_last", "channels last", True, True, _no_convolutions, _channels_last),
        Option("compile", "torch.compile", True, True, _cannot_compile, _compile),
    )
}
