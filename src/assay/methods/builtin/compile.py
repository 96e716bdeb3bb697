"""torch.compile as a transform: a model's small operators are fused into loops compiled for this machine.

`region="blocks"` (default, our choice) compiles the parts of each repeated block that are not attention (norms, feed-forward)
separately. All blocks share these graphs, so a model of 30 layers compiles in seconds, whatever back end its attention uses and
however its cache grows. `region="model"` compiles the whole forward pass. That fuses more, but a deep language model takes minutes,
and the growing cache of a generation loop causes further compilations. Compilation happens in the first calls, separately for one
and for several tokens, and for one and for several sequences; the numbers themselves are dynamic, so other lengths do not compile
again.

Only `forward` is compiled: `generate`, saving and copying work as before, and a copy runs uncompiled until it is compiled too.
assay's own modules that already carry compiled kernels are left as they are.

When NOT to use it: short runs (compilation has to pay off), models that change their structure from call to call.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from assay import checks
from assay.methods.transform import GOALS, Effect, Fit, TuneContext, only

MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")
REGIONS = ("blocks", "model")


class Compile:
    """Configuration: `mode` (torch.compile's), `region` "blocks" or "model"."""

    name = "compile"
    slot = "compile"
    goals: frozenset[str] = frozenset(GOALS) - {"memory"}
    exact = True

    def applies_to(self, model: nn.Module, context: TuneContext) -> Fit:
        if " " in torch.__file__:  # torch's own compiler command does not quote its include paths
            return Fit(False, f"torch.compile builds no C++ when torch lies in a path with spaces: {torch.__file__}")
        if not parts(model):
            return Fit(False, "no repeated blocks with parts beside attention that torch could compile")
        return Fit(True, effects=(Effect("other", bytes=0.5),))

    def configs(self, model: nn.Module, context: TuneContext) -> list[dict[str, Any]]:
        return [{"mode": "default", "region": "blocks"}]

    def check(self, config: Mapping[str, Any]) -> None:
        """Raises ValueError or TypeError naming the setting that is wrong."""
        only(config, ("mode", "region"))
        checks.choice("mode", config.get("mode", "default"), MODES)
        checks.choice("region", config.get("region", "blocks"), REGIONS)

    def describe(self, config: Mapping[str, Any]) -> str:
        mode, region = config.get("mode", "default"), config.get("region", "blocks")
        what = "torch.compile" if region == "blocks" else "torch.compile of the whole model"
        return what if mode == "default" else f"{what} ({mode})"

    def apply(self, model: nn.Module, config: Mapping[str, Any], context: TuneContext) -> nn.Module:
        self.check(config)
        mode, region = config.get("mode", "default"), config.get("region", "blocks")
        chosen = parts(model) if region == "blocks" else [model]
        if not chosen:
            raise ValueError(
                "model has no repeated blocks with parts to compile; region='model' compiles it as a whole"
            )
        for module in chosen:
            module.compile(mode=mode, dynamic=True)
        return model


def parts(model: nn.Module) -> list[nn.Module]:
    """The parts that `region="blocks"` compiles: everything but attention in the blocks of the model's longest list of layers."""
    lists = [
        module for module in model.modules() if isinstance(module, (nn.ModuleList, nn.Sequential)) and len(module) > 1
    ]
    stacks = [layers for layers in lists if len({type(layer) for layer in layers}) == 1]
    if not stacks:
        return []
    blocks = max(stacks, key=len)
    return [
        child
        for block in blocks
        for name, child in block.named_children()
        if not ("att" in name and _has_children(child)) and any(True for _ in child.parameters()) and not _ours(child)
    ]


def _has_children(module: nn.Module) -> bool:
    """Norms have attention in their names too, but nothing inside."""
    return any(True for _ in module.children())


def _ours(module: nn.Module) -> bool:
    return any(type(inner).__module__.startswith("assay.") for inner in module.modules())


transform = Compile()
