"""Gradual magnitude pruning while a model trains, as a hook on its optimiser."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor, nn

from assay import checks
from assay.methods.compression.fast_sparse_convnets.product import BLOCKS, Block
from assay.methods.core.layers.surgery import CONVOLUTIONS
from assay.methods.core.sparsity.projections import blocks, global_, per_layer
from assay.methods.core.sparsity.schedules import Schedule

Scope = Literal["layer", "global"]
DECIMALS = 12  # of a density: 1 - 0.7 is 0.3, not 0.30000000000000004


class GradualPruner:
    """Zeroes the smallest weights of the named layers while they train, ever more of them, as `schedule` says.

        pruner = GradualPruner(model, names, Gradual(final=0.9, begin=100, every=10, updates=50))
        handle = pruner.attach(optimizer)     ... train as always ...     handle.remove()

    Before the step that a schedule calls due, the masks are made anew from the magnitudes; after every step of the optimiser, masked
    weights and their state (momentum, Adam's moments) are set to 0 again, so that nothing that moves them brings them back. Weights are
    plain parameters with zeros in them, and a weight that was zeroed has no magnitude left: it does not return (`our choice`).

    `scope` "layer" prunes every layer alike (the paper's), "global" ranks all weights together. `block` 2 or 4 prunes whole blocks of as
    many neighbouring outputs that share an input, by their L2 norm: a number, or one by layer (1 for those not named); per layer only.
    Raises ValueError for no layers, a name that is no linear layer or convolution, blocks that do not divide the outputs, and blocks
    with scope "global".
    """

    def __init__(
        self,
        model: nn.Module,
        names: Sequence[str],
        schedule: Schedule,
        *,
        scope: Scope = "layer",
        block: int | Mapping[str, int] = 1,
    ):
        checks.choice("scope", scope, get_args(Scope))
        known = dict(model.named_modules())
        if not names:
            raise ValueError("names must hold at least one layer, got none")
        self.weights: dict[str, nn.Parameter] = {}
        self.blocks: dict[str, Block] = {}
        for name in names:
            layer = known.get(name)
            if type(layer) not in (nn.Linear, *CONVOLUTIONS) or "weight" not in cast(nn.Module, layer)._parameters:
                raise ValueError(f"names must be plain linear layers or convolutions, got {name!r}")
            self.weights[name] = cast(nn.Parameter, cast(Any, layer).weight)
            size = block.get(name, 1) if isinstance(block, Mapping) else block
            self.blocks[name] = cast(Block, checks.choice("block", size, BLOCKS))
            if len(self.weights[name]) % size:
                raise ValueError(f"block must divide the {len(self.weights[name])} outputs of {name}, got {size}")
        if scope == "global" and max(self.blocks.values()) > 1:
            raise ValueError("block must be 1 with scope 'global', whose ranks are of single weights")
        self.scope: Scope = scope
        self.schedule, self.step = schedule, 0
        self.masks = {name: torch.ones_like(weight, dtype=torch.bool) for name, weight in self.weights.items()}

    def attach(self, optimizer: torch.optim.Optimizer) -> Any:
        """Prune from now on, after every step of `optimizer`, which counts from 0; returns a handle to `remove`.

        Raises ValueError for an optimiser that does not have all the weights.
        """
        owned = {id(p) for group in optimizer.param_groups for p in group["params"]}
        if missing := [name for name, weight in self.weights.items() if id(weight) not in owned]:
            raise ValueError(f"optimizer must have the weights of all named layers, got none of {missing[0]!r}")
        if self.schedule.due(self.step):
            self._renew()
        self._zero(optimizer)

        def after(*_: Any) -> None:
            self.step += 1
            if self.schedule.due(self.step):
                self._renew()
            self._zero(optimizer)

        return optimizer.register_step_post_hook(after)

    def _renew(self) -> None:
        density = round(1 - self.schedule.sparsity(self.step), DECIMALS)
        scores = {  # below all that are left, those of weight 0 too
            name: weight.detach().abs().masked_fill(~self.masks[name], 0 if self.blocks[name] > 1 else -1)
            for name, weight in self.weights.items()
        }
        if self.scope == "global":
            self.masks = global_(scores, density)
            return
        for name, score in scores.items():
            if self.blocks[name] > 1:
                self.masks[name] = blocks(score, (self.blocks[name], 1), density)
            else:
                self.masks[name] = per_layer({name: score}, density)[name]

    @torch.no_grad()
    def _zero(self, optimizer: torch.optim.Optimizer) -> None:
        for name, weight in self.weights.items():
            gone = ~self.masks[name]
            weight.masked_fill_(gone, 0)
            for value in optimizer.state.get(weight, {}).values():
                if isinstance(value, Tensor) and value.shape == gone.shape:
                    value.masked_fill_(gone, 0)
