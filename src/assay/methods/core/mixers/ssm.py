"""The selective scan as a layer: the parameters of its dynamics, and S6 with its projections.

`Dynamics` holds A, D and the bias of the steps; `SelectiveSSM` derives steps, B and C from the token itself (S6, Mamba) and scans.
The scans are in `assay.methods.core.mixers.scan`, the orders in which images are scanned in `assay.methods.core.mixers.orders`.

    >>> y, state = SelectiveSSM(8, states=4)(torch.randn(2, 5, 8))
    >>> y.shape, state.shape
    (torch.Size([2, 5, 8]), torch.Size([2, 8, 4]))
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from assay import checks
from assay.methods.core.mixers.protocol import check_positive
from assay.methods.core.mixers.scan import Backend, Discretisation, scan_flops, selective_scan


class Float32Parameters(nn.Module):
    """Parameters of a system's dynamics: they stay float32 in a bfloat16 or float16 model and get no weight decay."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        def keep(x: Tensor) -> Tensor:
            found = fn(x)
            return x.to(found.device, torch.float32) if found.dtype in (torch.bfloat16, torch.float16) else found

        return super()._apply(keep, recurse)

    def optimizer_options(self) -> dict[str, dict[str, float]]:
        """Read by `training.parameter_groups`."""
        return {name: {"weight_decay": 0.0} for name, _ in self.named_parameters()}


def log_uniform_steps(count: int, low: float = 1e-3, high: float = 1e-1) -> Tensor:
    """Log-uniform step sizes."""
    return torch.exp(torch.empty(count).uniform_(math.log(low), math.log(high)))


class Dynamics(Float32Parameters):
    """A_log, D and dt_bias. A = -exp(A_log) is (channels, states), or (channels,) for `states` None (Mamba-2).

    A begins as -1, -2, ..., -states (Mamba-2: uniform in [-16, -1]), D as 1, softplus(dt_bias) log-uniform in [1e-3, 1e-1].
    """

    def __init__(self, channels: int, states: int | None = None):
        super().__init__()
        shape = (channels,) if states is None else (channels, states)
        self.A_log = nn.Parameter(torch.empty(shape, dtype=torch.float32))
        self.D = nn.Parameter(torch.empty(channels, dtype=torch.float32))
        self.dt_bias = nn.Parameter(torch.empty(channels, dtype=torch.float32))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Reset A, D and dt_bias as the class says; the steps are drawn again."""
        if self.A_log.ndim == 1:
            self.A_log.uniform_(1, 16).log_()
        else:
            self.A_log.copy_(torch.arange(1, self.A_log.shape[1] + 1).float().log().expand_as(self.A_log))
        self.D.fill_(1)
        step = log_uniform_steps(len(self.dt_bias))
        self.dt_bias.copy_(step + torch.log(-torch.expm1(-step)))  # the inverse of softplus

    def steps(self, raw: Tensor, mask: Tensor | None) -> Tensor:
        """softplus(raw + dt_bias), 0 on padding: (batch, tokens, channels), float32 at least."""
        dt = F.softplus(raw.to(self.dt_bias.dtype) + self.dt_bias)
        return dt if mask is None else dt * mask[..., None]


class SelectiveSSM(nn.Module):
    """S6 with its projections: dt (rank `dt_rank`, default width / 16), B and C of every token from the token itself.

    `width` channels, `states` numbers of state each. `forward(x, h, mask)` takes x (batch, tokens, width) after the state
    h (batch, width, states), None for none, and returns the outputs and the last state. Raises ValueError for sizes below 1 and
    shapes that do not fit, TypeError for tensors of whole or complex numbers.
    """

    def __init__(
        self,
        width: int,
        *,
        states: int = 16,
        dt_rank: int | None = None,
        backend: Backend = "auto",
        discretisation: Discretisation = "euler",
    ):
        super().__init__()
        self.dt_rank = -(-width // 16) if dt_rank is None else dt_rank
        check_positive(width=width, states=states, dt_rank=self.dt_rank)
        self.width, self.states = width, states
        self.backend: Backend = backend
        self.discretisation: Discretisation = discretisation
        self.x_proj = nn.Linear(width, self.dt_rank + 2 * states, bias=False)
        self.dt_weight = nn.Parameter(torch.empty(width, self.dt_rank))  # its bias is dynamics.dt_bias
        self.dynamics = Dynamics(width, states)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """dt_weight uniform within 1 / sqrt(dt_rank), which keeps the steps near their bias; x_proj as torch's linear layers."""
        self.x_proj.reset_parameters()
        nn.init.uniform_(self.dt_weight, -(self.dt_rank**-0.5), self.dt_rank**-0.5)

    def forward(self, x: Tensor, h: Tensor | None = None, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        checks.tensor("x", x, shape=("batch", "tokens", self.width), empty=True)
        low, B, C = self.x_proj(x).split([self.dt_rank, self.states, self.states], -1)
        dt = self.dynamics.steps(F.linear(low, self.dt_weight), mask)
        A, D = -torch.exp(self.dynamics.A_log), self.dynamics.D
        return selective_scan(x, dt, A, B, C, D, h, backend=self.backend, discretisation=self.discretisation)

    def flops(self, tokens: int) -> int:
        """FLOPs of `tokens` tokens: 2 a MAC of the projections, 9 for each state of the scan."""
        macs = self.width * (self.dt_rank + 2 * self.states) + self.dt_rank * self.width
        return 2 * tokens * macs + scan_flops(tokens, self.width, self.states)
