"""Optimisers of weights held in 16 bits, with four ways to round an update, and a count of the updates that are lost."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from assay import checks
from assay.methods.compression.reduced_precision_odl.numerics import NumericsPolicy, round_number, round_stochastic


class _Reduced(torch.optim.Optimizer):
    """What the two have in common: weights in a policy's format, its `update`, and the count."""

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        policy: NumericsPolicy,
        generator: torch.Generator | None,
        lr: float,
        weight_decay: float,
        **defaults: Any,
    ):
        checks.number("lr", lr, above=0)
        checks.number("weight_decay", weight_decay, low=0)
        held = list(params)
        for parameter in held:
            if parameter.dtype != policy.dtype:
                raise TypeError(f"params must be in {policy.format}, got {parameter.dtype}")
        super().__init__(held, {"lr": lr, "weight_decay": weight_decay, **defaults})
        self.policy, self.generator = policy, generator
        self._wanted = self._stalled = torch.zeros((), dtype=torch.int64)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of every parameter that has a gradient; returns what `closure` returns, if there is one."""
        loss: Any = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, parameter.grad, group)
        return loss

    def _update(self, weight: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        raise NotImplementedError

    def _source(self, weight: Tensor) -> Tensor:
        """The weights in the widest form that is kept: a float32 copy with "master"."""
        if self.policy.update == "master":
            master: Tensor = self.state[weight].setdefault("master", weight.detach().to(torch.float32, copy=True))
            return master
        return weight.detach()

    def _subtract(self, weight: Tensor, step: Tensor, wanted: Tensor) -> None:
        """Take `step` off the weights as the policy says; `wanted` marks the weights that ought to change."""
        policy, kept = self.policy, self.state[weight]
        if policy.update == "master":
            master = self._source(weight)
            changed = master - step
            same = changed == master
            master.copy_(changed)
        elif policy.update == "stochastic":
            changed = round_stochastic(weight.double() - step.double(), policy.format, self.generator)
            same = changed == weight
        elif policy.update == "nearest":
            changed = weight - step.to(policy.dtype)
            same = changed == weight
        else:
            lost = kept.setdefault("lost", torch.zeros_like(weight))
            forward = -step.to(policy.dtype) - lost
            changed = weight + forward
            left = (changed - weight) - forward
            same = (changed == weight) & (left == lost)
            lost.copy_(left)
        weight.copy_(changed)
        self._wanted = self._wanted + wanted.sum()
        self._stalled = self._stalled + (wanted & same).sum()

    @property
    def stalled_share(self) -> float:
        """The share of updates that were wanted and changed nothing of what is kept, since the beginning; 0 before the first."""
        wanted = int(self._wanted)
        return int(self._stalled) / wanted if wanted else 0.0


class ReducedSGD(_Reduced):
    """w -= lr (g + weight_decay w) under a policy's `update`; see `NumericsPolicy`. The paper's optimiser.

    `params` are in the policy's format, and their gradients belong to a loss multiplied by its `loss_scale`. For "nearest" and "kahan"
    the rate, divided by the scale, is rounded to the format too, as a device holds it, and every operation is done in it; "stochastic"
    and "master" compute the step in wider numbers. The gradients are not written to (the released code adds the weight decay to them).

    `stalled_share` is the share of updates with a gradient other than zero that changed nothing of what is kept. `generator` draws for
    "stochastic".

    Raises TypeError for parameters in another dtype, ValueError for a rate not above zero or a decay below it.

    >>> weight = nn.Parameter(torch.ones(1, dtype=torch.float16))
    >>> optimiser = ReducedSGD([weight], lr=1e-3, policy=NumericsPolicy())
    >>> weight.grad = torch.full_like(weight, 0.1)
    >>> optimiser.step()
    >>> weight.item(), optimiser.stalled_share
    (1.0, 1.0)
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        *,
        lr: float,
        policy: NumericsPolicy,
        weight_decay: float = 0.0,
        generator: torch.Generator | None = None,
    ):
        super().__init__(params, policy, generator, lr, weight_decay)

    def _update(self, weight: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        policy = self.policy
        rate = group["lr"] / policy.loss_scale
        decay = group["weight_decay"] * policy.loss_scale  # the gradient is as many times too large
        wanted = gradient != 0
        if policy.update in ("stochastic", "master"):
            wide = torch.float32 if policy.update == "master" else torch.float64
            gradient = gradient.to(wide)
            if decay:
                gradient = gradient + decay * self._source(weight).to(wide)
            self._subtract(weight, rate * gradient, wanted)
            return
        if decay:
            gradient = gradient + weight * round_number(decay, policy.format)
        self._subtract(weight, gradient * round_number(rate, policy.format), wanted)


class ReducedAdamW(_Reduced):
    """AdamW on weights held in a policy's format, for what is larger than a microcontroller's networks. Not of the paper.

    Moments are float32 and so is the step, which is rounded to the format ("nearest", "kahan") before it is taken off the weights, or
    taken off in wider numbers ("stochastic", "master"). With "bfloat16" and "stochastic" it does what torchao's AdamW does with
    `bf16_stochastic_round`. Its steps are about as large as the rate, whatever the gradients: in bfloat16 weights above
    512 rates stall.

    Arguments, `stalled_share` (of steps other than zero) and errors are as in `ReducedSGD`; `betas` and `eps` as in torch's.

    >>> weight = nn.Parameter(torch.ones(1, dtype=torch.bfloat16))
    >>> optimiser = ReducedAdamW([weight], lr=1e-4, policy=NumericsPolicy("bfloat16"))
    >>> weight.grad = torch.full_like(weight, 100.0)
    >>> optimiser.step()
    >>> weight.item(), optimiser.stalled_share
    (1.0, 1.0)
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        *,
        lr: float,
        policy: NumericsPolicy,
        weight_decay: float = 0.01,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        generator: torch.Generator | None = None,
    ):
        for beta in betas:
            checks.number("betas", beta, low=0, below=1)
        checks.number("eps", eps, above=0)
        super().__init__(params, policy, generator, lr, weight_decay, betas=betas, eps=eps)

    def _update(self, weight: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        kept, source = self.state[weight], self._source(weight).float()
        if "count" not in kept:
            kept.update(count=0, mean=torch.zeros_like(source), square=torch.zeros_like(source))
        kept["count"] += 1
        given, (first, second) = gradient.float() / self.policy.loss_scale, group["betas"]
        kept["mean"].lerp_(given, 1 - first)
        kept["square"].mul_(second).addcmul_(given, given, value=1 - second)
        mean = kept["mean"] / (1 - first ** kept["count"])
        square = kept["square"] / (1 - second ** kept["count"])
        step = group["lr"] * (mean / (square.sqrt() + group["eps"]) + group["weight_decay"] * source)
        self._subtract(weight, step, step != 0)
