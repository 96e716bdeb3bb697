"""The layers of an image model in the order they run, with the sizes they ran at: what rules and costs of whole networks are read from."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Ran:
    """One call of a convolution or a linear layer. `macs` and `params` are its own, `macs` over the whole batch."""

    name: str
    module: nn.Conv2d | nn.Linear
    given: tuple[int, ...]  # the shape of its input
    gave: tuple[int, ...]

    @property
    def kernel(self) -> int:
        """The longer side of the kernel; 1 for a linear layer."""
        return max(self.module.kernel_size) if isinstance(self.module, nn.Conv2d) else 1

    @property
    def params(self) -> int:
        return sum(parameter.numel() for parameter in self.module.parameters())

    @property
    def macs(self) -> int:
        return math.prod(self.gave) * self.module.weight[0].numel()


def layers_run(model: nn.Module, example: Tensor) -> list[Ran]:
    """Every call of a Conv2d or a Linear in one run of `model` on `example`, in order. A layer that is called twice is there twice.

    The run is in eval mode, so that the running means of a model in training stay as they are; every module gets its own mode back.

    >>> [(ran.name, ran.gave, ran.macs) for ran in layers_run(nn.Sequential(nn.Conv2d(3, 4, 3)), torch.zeros(1, 3, 8, 8))]
    [('0', (1, 4, 6, 6), 3888)]
    """
    found: list[Ran] = []
    hooks = []

    def after(name: str) -> Any:
        def hook(module: Any, given: tuple[Tensor, ...], out: Tensor) -> None:
            found.append(Ran(name, module, tuple(given[0].shape), tuple(out.shape)))

        return hook

    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            hooks.append(module.register_forward_hook(after(name)))
    modes = {module: module.training for module in model.modules()}
    try:
        with torch.no_grad():
            model.eval()(example)
    finally:
        for module, mode in modes.items():
            module.training = mode
        for hook in hooks:
            hook.remove()
    return found
