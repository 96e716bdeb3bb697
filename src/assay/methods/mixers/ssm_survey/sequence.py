"""The sequence mixers "mamba" (S6), "mamba2" (SSD) and "s4d"."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from assay.methods.core.mixers.protocol import Mixer, State, check_positive, left_conv, mixer, wide_dtype
from assay.methods.core.mixers.scan import (
    Backend,
    Discretisation,
    discretise,
    lti_advance,
    lti_convolution,
    lti_kernel,
    ssd,
)
from assay.methods.core.mixers.ssm import Dynamics, Float32Parameters, SelectiveSSM, log_uniform_steps


class _ConvState(Mixer):
    """What the two Mamba mixers share: a short convolution with its state, and forward as an advance from nothing."""

    in_proj: nn.Linear
    out_proj: nn.Linear
    conv_weight: nn.Parameter
    conv_bias: nn.Parameter
    layers: int

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """As torch's linear layers and convolutions begin, out_proj divided by the root of the number of layers, as released.

        The narrow weights usual in language models would make the product of three projections vanish.
        """
        self.in_proj.reset_parameters()
        self.out_proj.reset_parameters()
        self.out_proj.weight.div_(self.layers**0.5)
        bound = self.conv_weight.shape[1] ** -0.5
        nn.init.uniform_(self.conv_weight, -bound, bound)
        nn.init.uniform_(self.conv_bias, -bound, bound)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.advance(x, {}, mask)[0]

    def _convolved(self, u: Tensor, state: State) -> tuple[Tensor, Tensor]:
        before = state.get("conv")
        if before is None:
            before = u.new_zeros(len(u), self.conv_weight.shape[1] - 1, u.shape[2])
        y = F.silu(left_conv(u, self.conv_weight, self.conv_bias, before))
        return y, torch.cat([before, u], 1)[:, u.shape[1] :]

    def _empty(self, batch: int, ssm: tuple[int, ...], device: Any, dtype: torch.dtype | None) -> State:
        weight = self.conv_weight
        dtype, device = weight.dtype if dtype is None else dtype, weight.device if device is None else device
        conv = torch.zeros(batch, weight.shape[1] - 1, weight.shape[0], device=device, dtype=dtype)
        return {"conv": conv, "ssm": torch.zeros(batch, *ssm, device=device, dtype=wide_dtype(dtype))}


@mixer("mamba")
class Mamba(_ConvState):
    """The Mamba block: project to x and z, convolve x (causal, depthwise), SiLU, S6, times SiLU(z), project back.

    `expand` widens the inner channels, `conv` taps of the convolution, `states` numbers of state a channel; the rest as
    `SelectiveSSM`. Norm and residual belong to the model. The state is (conv - 1 + states) * expand * dim numbers at any length.
    Defaults and start are those of the released models. Raises ValueError for sizes below 1.

    >>> mixer = Mamba(32)
    >>> y, state = mixer.advance(torch.zeros(2, 10, 32), mixer.init_state(2))
    >>> y.shape, mixer.state_bytes(10) == mixer.state_bytes(10**6)
    (torch.Size([2, 10, 32]), True)
    """

    def __init__(
        self,
        dim: int,
        *,
        states: int = 16,
        expand: int = 2,
        conv: int = 4,
        dt_rank: int | None = None,
        backend: Backend = "auto",
        discretisation: Discretisation = "euler",
        layer: int = 0,
        layers: int = 1,
    ):
        super().__init__()
        check_positive(dim=dim, expand=expand, conv=conv, layers=layers)
        self.dim, self.layers, width = dim, layers, expand * dim
        self.in_proj = nn.Linear(dim, 2 * width, bias=False)
        self.conv_weight, self.conv_bias = nn.Parameter(torch.empty(width, conv)), nn.Parameter(torch.empty(width))
        dt_rank = -(-dim // 16) if dt_rank is None else dt_rank
        self.ssm = SelectiveSSM(width, states=states, dt_rank=dt_rank, backend=backend, discretisation=discretisation)
        self.out_proj = nn.Linear(width, dim, bias=False)
        self.reset_parameters()

    def init_state(self, batch: int, *, device: Any = None, dtype: torch.dtype | None = None) -> State:
        return self._empty(batch, (self.ssm.width, self.ssm.states), device, dtype)

    def advance(self, x: Tensor, state: State, mask: Tensor | None = None) -> tuple[Tensor, State]:
        u, z = self.in_proj(x if mask is None else x * mask[..., None]).chunk(2, -1)
        u, conv = self._convolved(u, state)
        y, h = self.ssm(u, state.get("ssm"), mask)
        out: Tensor = self.out_proj(y * F.silu(z))
        return out, {"conv": conv, "ssm": h}

    def flops(self, tokens: int) -> int:
        """FLOPs of `tokens` tokens, 2 a MAC and 9 for each state of the scan; activations left out."""
        width, taps = self.conv_weight.shape
        return 2 * tokens * (3 * self.dim * width + width * taps) + self.ssm.flops(tokens)


def mamba_parameters(dim: int, *, states: int = 16, expand: int = 2, conv: int = 4, dt_rank: int | None = None) -> int:
    """Parameters of `Mamba`: three projections of dim x width, the convolution, the S6 projections, A, D and dt_bias."""
    width, rank = expand * dim, -(-dim // 16) if dt_rank is None else dt_rank
    return 3 * dim * width + width * (conv + 1) + width * (rank + 2 * states) + rank * width + width * (states + 2)


def attention_flops(tokens: int, dim: int, *, causal: bool = True) -> tuple[int, int]:
    """FLOPs of the projections, 8 N d^2, and of the scores and values, 4 N^2 d (half if causal), of softmax attention."""
    return 8 * tokens * dim**2, 4 * tokens**2 * dim // (2 if causal else 1)


@mixer("mamba2")
class Mamba2(_ConvState):
    """The Mamba-2 block: one projection to z, x, B, C and dt; convolution and SiLU on x, B, C; SSD; gated RMS norm; projection.

    One decay for each head of `head_dim` channels; B and C of `states` numbers shared by the heads of each of `groups` groups.
    Defaults and initialisation are those of the released models, except for `chunk`, which changes no result (`our choice`: 64, for CPUs).
    Raises ValueError for sizes that do not divide.
    """

    def __init__(
        self,
        dim: int,
        *,
        states: int = 128,
        head_dim: int = 64,
        expand: int = 2,
        conv: int = 4,
        groups: int = 1,
        chunk: int = 64,
        layer: int = 0,
        layers: int = 1,
    ):
        super().__init__()
        check_positive(dim=dim, states=states, head_dim=head_dim, expand=expand, conv=conv)
        check_positive(groups=groups, chunk=chunk, layers=layers)
        width = expand * dim
        if width % head_dim or (width // head_dim) % groups:
            raise ValueError(f"head_dim must divide {width} channels and groups the heads, got {head_dim} and {groups}")
        self.dim, self.width, self.states, self.head_dim, self.groups = dim, width, states, head_dim, groups
        self.layers = layers
        self.heads, self.chunk = width // head_dim, chunk
        channels = width + 2 * groups * states
        self.in_proj = nn.Linear(dim, width + channels + self.heads, bias=False)
        self.conv_weight, self.conv_bias = (
            nn.Parameter(torch.empty(channels, conv)),
            nn.Parameter(torch.empty(channels)),
        )
        self.dynamics = Dynamics(self.heads)
        self.norm_weight = nn.Parameter(torch.empty(width))
        self.out_proj = nn.Linear(width, dim, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As torch's linear layers and convolutions begin; the weight of the norm is 1."""
        super().reset_parameters()
        nn.init.ones_(self.norm_weight)

    def init_state(self, batch: int, *, device: Any = None, dtype: torch.dtype | None = None) -> State:
        return self._empty(batch, (self.heads, self.head_dim, self.states), device, dtype)

    def advance(self, x: Tensor, state: State, mask: Tensor | None = None) -> tuple[Tensor, State]:
        channels = len(self.conv_weight)
        projected = self.in_proj(x if mask is None else x * mask[..., None])
        z, u, raw = projected.split([self.width, channels, self.heads], -1)
        u, conv = self._convolved(u, state)
        inner = self.groups * self.states
        v, B, C = u.to(self.dynamics.D.dtype).split([self.width, inner, inner], -1)
        v, B, C = (part.unflatten(-1, (n, -1)) for part, n in ((v, self.heads), (B, self.groups), (C, self.groups)))
        dt, A = self.dynamics.steps(raw, mask), -torch.exp(self.dynamics.A_log)
        y, h = ssd(v, dt, A, B, C, self.dynamics.D, state.get("ssm"), chunk=self.chunk)
        gated = y.flatten(2) * F.silu(z.to(y.dtype))
        normed = F.rms_norm(gated.unflatten(-1, (self.groups, -1)), (self.width // self.groups,), eps=1e-5).flatten(2)
        out: Tensor = self.out_proj((normed * self.norm_weight).to(x.dtype))
        return out, {"conv": conv, "ssm": h}


class _Diagonal(Float32Parameters):
    """S4D-Lin: A_n = -1/2 + i pi n, one half of conjugate pairs; C and D normal, log dt uniform between those of 1e-3 and 1e-1."""

    def __init__(self, channels: int, pairs: int):
        super().__init__()
        self.A_log = nn.Parameter(torch.empty(channels, pairs, dtype=torch.float32))
        self.A_imag = nn.Parameter(torch.empty(channels, pairs, dtype=torch.float32))
        self.C = nn.Parameter(torch.empty(channels, pairs, 2, dtype=torch.float32))
        self.D = nn.Parameter(torch.empty(channels, dtype=torch.float32))
        self.log_dt = nn.Parameter(torch.empty(channels, dtype=torch.float32))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        self.A_log.fill_(math.log(0.5))
        self.A_imag.copy_((math.pi * torch.arange(self.A_imag.shape[1])).expand_as(self.A_imag))
        self.C.normal_(std=0.5**0.5)
        self.D.normal_()
        self.log_dt.copy_(log_uniform_steps(len(self.log_dt)).log())

    def forward(self) -> tuple[Tensor, Tensor, Tensor]:
        """Ab, Bb (zero-order hold, B = 1) and C, complex (channels, pairs); C counts both of a pair."""
        A = torch.complex(-torch.exp(self.A_log), self.A_imag)
        decay, gain = discretise(A, torch.ones_like(A), torch.exp(self.log_dt)[:, None], "zoh")
        return decay, gain, 2 * torch.view_as_complex(self.C)


@mixer("s4d")
class S4D(Mixer):
    """A time-invariant diagonal state space model a channel, GELU, and a gated linear layer: convolution or recurrence.

    `states` numbers of state a channel, in states / 2 conjugate pairs. Raises ValueError unless that is even and positive.
    """

    def __init__(self, dim: int, *, states: int = 64, layer: int = 0, layers: int = 1):
        super().__init__()
        check_positive(dim=dim, states=states)
        if states % 2:
            raise ValueError(f"states must be even (conjugate pairs), got {states}")
        self.dim, self.states = dim, states
        self.out_proj = nn.Linear(dim, 2 * dim)
        self.dynamics = _Diagonal(dim, states // 2)

    def _out(self, y: Tensor, like: Tensor) -> Tensor:
        return F.glu(self.out_proj(F.gelu(y).to(like.dtype)), -1)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        u = (x if mask is None else x * mask[..., None]).to(wide_dtype(x.dtype))
        decay, gain, C = self.dynamics()
        kernel = lti_kernel(decay, gain, C, x.shape[1])
        return self._out(lti_convolution(u, kernel, self.dynamics.D), x)

    def init_state(self, batch: int, *, device: Any = None, dtype: torch.dtype | None = None) -> State:
        weight = self.out_proj.weight
        wide = torch.promote_types(wide_dtype(weight.dtype if dtype is None else dtype), torch.complex64)
        h = torch.zeros(
            batch, self.dim, self.states // 2, device=weight.device if device is None else device, dtype=wide
        )
        return {"ssm": h}

    def advance(self, x: Tensor, state: State, mask: Tensor | None = None) -> tuple[Tensor, State]:
        u = (x if mask is None else x * mask[..., None]).to(wide_dtype(x.dtype))
        decay, gain, C = self.dynamics()
        y, h = lti_advance(u, decay, gain, C, self.dynamics.D, state["ssm"])
        return self._out(y, x), {"ssm": h}
