"""State space models for (medical) images, after the survey arXiv 2406.03430: one block, exchangeable mixers, equal accounting.

The survey orders Mamba-style models for segmentation, classification, registration and reconstruction. What it shares is here:
the sequence mixers "mamba" (S6), "mamba2" (SSD) and "s4d"; a vision block whose mixer is a convolution, window attention, full
attention or a selective scan in any scan order; a U-shaped segmentation model and a classifier built of that block; Dice and HD95;
and the survey's table as data (`taxonomy`). The scans themselves are in `assay.methods.core.mixers.scan`.

    model = UNet(1, 1, mixer="s6", order="cross", dim=96)                        # the form of VM-UNet
    rival = UNet(1, 1, mixer="window", dim=match_width(300_000, in_chans=1, mixer="window"))  # 0.3 M

Papers differ in the discretisation of B, in whether directions share parameters and in how directions are merged: here `discretisation`
("euler" as Mamba), `tied` (False as VMamba), always a sum. `our choice`: attention mixers get positions from a depthwise 3 x 3
convolution; light models (UltraLight VM-UNet) share one mixer among `groups` of channels. 1 MAC = 2 FLOPs.

When NOT to use it: small images and short sequences, where convolution or attention is as good and faster; the survey itself
gives no common numbers, and those of its papers cannot be compared (other splits, other preprocessing).
"""

from __future__ import annotations

import functools
import math
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from assay.methods.core.mixers.protocol import Mixer, State, left_conv, mixer
from assay.methods.core.mixers.scan import (
    Backend,
    Discretisation,
    Dynamics,
    Float32Parameters,
    SelectiveSSM,
    check_positive,
    discretise,
    log_uniform_steps,
    lti_advance,
    lti_convolution,
    lti_kernel,
    scan,
    scan_order,
    ssd,
    unscan,
    wide_dtype,
)

# ---------------------------------------------------------------------------------------------------------- sequence mixers


class _ConvState(Mixer):
    """What the two Mamba mixers share: a short convolution with its state, and forward as an advance from nothing."""

    in_proj: nn.Linear
    out_proj: nn.Linear
    conv_weight: nn.Parameter
    conv_bias: nn.Parameter

    def reset_parameters(self) -> None:
        """Everything as torch's linear layers and convolutions begin, as the official code has it.

        The narrow weights usual in language models would make the product of three projections vanish.
        """
        self.in_proj.reset_parameters()
        self.out_proj.reset_parameters()
        nn.init.uniform_(self.conv_weight, -(self.conv_weight.shape[1] ** -0.5), self.conv_weight.shape[1] ** -0.5)
        nn.init.zeros_(self.conv_bias)

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
        check_positive(dim=dim, expand=expand, conv=conv)
        self.dim, width = dim, expand * dim
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
    Raises ValueError for sizes that do not divide.
    """

    def __init__(
        self,
        dim: int,
        *,
        states: int = 64,
        head_dim: int = 64,
        expand: int = 2,
        conv: int = 4,
        groups: int = 1,
        chunk: int = 64,
        layer: int = 0,
        layers: int = 1,
    ):
        super().__init__()
        check_positive(dim=dim, states=states, head_dim=head_dim, expand=expand, conv=conv, groups=groups, chunk=chunk)
        width = expand * dim
        if width % head_dim or (width // head_dim) % groups:
            raise ValueError(f"head_dim must divide {width} channels and groups the heads, got {head_dim} and {groups}")
        self.dim, self.width, self.states, self.head_dim, self.groups = dim, width, states, head_dim, groups
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
    """S4D-Lin: A_n = -1/2 + i pi n, one half of conjugate pairs; C normal, D 1, log dt uniform between those of 1e-3 and 1e-1."""

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
        self.D.fill_(1)
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


# -------------------------------------------------------------------------------------------------------------- grid mixers

GRID_MIXERS: dict[str, Any] = {}


def grid_mixer(name: str, mlp_ratio: float) -> Callable[[Any], Any]:
    """Class decorator: what mixes a grid (batch, height, width, dim), built as `cls(dim, layer=index in its stage, **options)`.

    `mlp_ratio` is the width of the MLP behind it that a block gives it by default, 0 for none.
    """

    def register(cls: Any) -> Any:
        cls.mlp_ratio = mlp_ratio
        GRID_MIXERS[name] = cls
        return cls

    return register


def _channels_first(layer: nn.Module, x: Tensor) -> Tensor:
    y: Tensor = layer(x.permute(0, 3, 1, 2))
    return y.permute(0, 2, 3, 1)


@grid_mixer("conv", 0.0)
class ConvMixer(nn.Module):
    """Two 3 x 3 convolutions with a GELU between them: the U-Net's."""

    def __init__(self, dim: int, *, layer: int = 0):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(dim, dim, 3, padding=1), nn.Conv2d(dim, dim, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return _channels_first(self.conv2, F.gelu(_channels_first(self.conv1, x)))


@grid_mixer("attention", 4.0)
class FullAttention(nn.Module):
    """Softmax attention among all cells; heads of about `head_dim` channels, positions from a depthwise convolution."""

    def __init__(self, dim: int, *, head_dim: int = 32, layer: int = 0):
        super().__init__()
        check_positive(dim=dim, head_dim=head_dim)
        self.heads = next(n for n in range(max(1, dim // head_dim), 0, -1) if dim % n == 0)
        self.position = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        placed = x + _channels_first(self.position, x)
        y: Tensor = self.proj(self._attend(placed.flatten(1, 2), None))
        return y.view(x.shape)

    def _attend(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """(batch, tokens, dim); `mask` (batch, 1, tokens, tokens) or None."""
        q, k, v = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)


@grid_mixer("window", 4.0)
class WindowAttention(FullAttention):
    """Attention within windows of `window` x `window` cells, shifted by half a window in every other layer of a stage.

    Cells that the shift brings together from opposite edges do not see each other. A grid that windows do not fill is padded,
    and padding is not seen; a grid smaller than a window is one window.
    """

    def __init__(self, dim: int, *, window: int = 8, head_dim: int = 32, layer: int = 0):
        super().__init__(dim, head_dim=head_dim)
        check_positive(window=window)
        self.window, self.shift = window, window // 2 if layer % 2 else 0

    def forward(self, x: Tensor) -> Tensor:
        batch, height, width, dim = x.shape
        rows, columns = min(self.window, height), min(self.window, width)
        down, right = (self.shift if height > rows else 0), (self.shift if width > columns else 0)
        below, beside = -height % rows, -width % columns
        placed = F.pad(x + _channels_first(self.position, x), (0, 0, 0, beside, 0, below)).roll((-down, -right), (1, 2))
        mask = None
        if down or right or below or beside:  # -1 for padding, else a number for each side of the seam
            part = torch.zeros(height, width, dtype=torch.int64, device=x.device)
            part[:down] += 1
            part[:, :right] += 2
            part = F.pad(part, (0, beside, 0, below), value=-1).roll((-down, -right), (0, 1))
            labels = _windows(part[None, ..., None], rows, columns)[..., 0]
            same = labels[:, :, None] == labels[:, None, :]  # padding sees padding, so that no row is empty
            mask = same.repeat(batch, 1, 1)[:, None]
        y: Tensor = self.proj(self._attend(_windows(placed, rows, columns), mask))
        y = y.view(batch, (height + below) // rows, (width + beside) // columns, rows, columns, dim)
        y = y.transpose(2, 3).reshape(batch, height + below, width + beside, dim)
        return y.roll((down, right), (1, 2))[:, :height, :width]


def _windows(x: Tensor, rows: int, columns: int) -> Tensor:
    """(batch, height, width, dim) to (batch * windows, rows * columns, dim)."""
    x = x.unflatten(2, (-1, columns)).unflatten(1, (-1, rows))
    return x.transpose(2, 3).flatten(3, 4).flatten(0, 2)


@grid_mixer("s6", 0.0)
class ScanMixer(nn.Module):
    """Selective scans along the directions of a scan order, summed: the mixer of a visual state space block.

    Project to x and z, depthwise 3 x 3 convolution and SiLU on x, S6 along each direction of `order` (see `scan.ORDERS`;
    `order_options` such as {"window": 4}), sum, layer norm, times SiLU(z), project back. `tied` directions share their S6.
    """

    def __init__(
        self,
        dim: int,
        *,
        order: str = "cross",
        order_options: Mapping[str, int] | None = None,
        states: int = 16,
        expand: int = 2,
        tied: bool = False,
        backend: Backend = "auto",
        discretisation: Discretisation = "euler",
        layer: int = 0,
    ):
        super().__init__()
        check_positive(dim=dim, expand=expand)
        self.order, self.order_options = order, dict(order_options or {})
        directions = len(scan_order(order, 2, 2, **self.order_options))
        width = expand * dim
        self.in_proj, self.out_proj = nn.Linear(dim, 2 * width, bias=False), nn.Linear(width, dim, bias=False)
        self.conv = nn.Conv2d(width, width, 3, padding=1, groups=width)
        options: dict[str, Any] = {"states": states, "dt_rank": -(-dim // 16), "backend": backend}
        self.ssm = nn.ModuleList(
            SelectiveSSM(width, discretisation=discretisation, **options) for _ in range(1 if tied else directions)
        )
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        u, z = self.in_proj(x).chunk(2, -1)
        u = F.silu(_channels_first(self.conv, u))
        y = self.scanned(u.flatten(1, 2), *x.shape[1:3]).view(u.shape)
        out: Tensor = self.out_proj(self.norm(y) * F.silu(z))
        return out

    def scanned(self, u: Tensor, height: int, width: int) -> Tensor:
        """The scans alone: (batch, cells, width) to the sum over the directions, back in row-major order."""
        order = scan_order(self.order, height, width, **self.order_options)
        sequences = scan(u, order)
        if len(self.ssm) == 1:
            y = self.ssm[0](sequences.flatten(0, 1))[0].view(sequences.shape)
        else:
            y = torch.stack([ssm(sequences[:, k])[0] for k, ssm in enumerate(self.ssm)], 1)
        return unscan(y, order).sum(1)


# ------------------------------------------------------------------------------------------------------------------- models


class Block(nn.Module):
    """Pre-norm residual block on a grid: x + mixer(norm(x)), then an MLP of `mlp_ratio` (None: the mixer's own) if not 0.

    With `groups` the channels are cut into that many, and one mixer of dim / groups channels serves all.
    """

    def __init__(
        self,
        dim: int,
        *,
        mixer: str = "s6",
        mlp_ratio: float | None = None,
        groups: int = 1,
        layer: int = 0,
        **options: Any,
    ):
        super().__init__()
        if mixer not in GRID_MIXERS:
            raise ValueError(f"mixer must be one of {', '.join(GRID_MIXERS)}, got {mixer!r}")
        if groups < 1 or dim % groups:
            raise ValueError(f"groups must divide dim ({dim}), got {groups}")
        self.groups = groups
        self.norm = nn.LayerNorm(dim)
        self.mixer = GRID_MIXERS[mixer](dim // groups, layer=layer, **options)
        hidden = int(dim * (self.mixer.mlp_ratio if mlp_ratio is None else mlp_ratio))
        self.mlp = None
        if hidden:
            self.mlp = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim))

    def forward(self, x: Tensor) -> Tensor:
        folded = self.norm(x).unflatten(-1, (self.groups, -1)).movedim(3, 1).flatten(0, 1)
        mixed = self.mixer(folded).unflatten(0, (-1, self.groups)).movedim(1, 3).flatten(-2)
        x = x + mixed
        return x if self.mlp is None else x + cast(Tensor, self.mlp(x))


class Encoder(nn.Module):
    """Patches, then stages of blocks; between stages 2 x 2 cells merge into one of twice the channels.

    `channels` and `reduction` say what the features are: forward gives one (batch, height / reduction, width / reduction,
    channels) a stage. Images whose sides the last reduction does not divide raise ValueError.
    """

    def __init__(self, in_chans: int, dim: int, depths: Sequence[int], patch: int, **options: Any):
        super().__init__()
        check_positive(in_chans=in_chans, dim=dim, patch=patch, stages=len(depths))
        self.channels = [dim * 2**i for i in range(len(depths))]
        self.reduction = [patch * 2**i for i in range(len(depths))]
        self.embed, self.norm = nn.Conv2d(in_chans, dim, patch, patch), nn.LayerNorm(dim)
        self.stages = nn.ModuleList(_stage(c, n, **options) for c, n in zip(self.channels, depths, strict=True))
        self.merges = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(4 * c), nn.Linear(4 * c, 2 * c, bias=False)) for c in self.channels[:-1]
        )

    def forward(self, image: Tensor) -> list[Tensor]:
        if image.ndim != 4 or image.shape[2] % self.reduction[-1] or image.shape[3] % self.reduction[-1]:
            raise ValueError(
                f"image must be (batch, channels, height, width) with sides divisible by {self.reduction[-1]}, "
                f"got {tuple(image.shape)}"
            )
        x, features = self.norm(_channels_last(self.embed(image))), []
        for i, stage in enumerate(self.stages):
            x = stage(x)
            features.append(x)
            if i < len(self.merges):
                cells = x.unflatten(2, (-1, 2)).unflatten(1, (-1, 2)).transpose(2, 3).flatten(3)
                x = self.merges[i](cells)
        return features


class UNet(nn.Module):
    """U-shaped segmentation of images (batch, in_chans, height, width) to logits (batch, num_classes, height, width).

    The `Encoder`, a mirrored decoder that expands cells (half the channels) and adds the encoder's features, a last expansion
    by `patch` and a 1 x 1 head. `depths` blocks a stage; the decoder mirrors all but the last. Further options go to `Block`
    and its mixer. Defaults are VM-UNet's, whose last decoder stage is shallower. Raises ValueError for sizes that do not divide.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1,
        *,
        dim: int = 96,
        depths: Sequence[int] = (2, 2, 2, 2),
        patch: int = 4,
        **options: Any,
    ):
        super().__init__()
        check_positive(num_classes=num_classes)
        if dim % patch:
            raise ValueError(f"patch must divide dim, got {patch} and {dim}")
        self.encoder = Encoder(in_chans, dim, depths, patch, **options)
        self.patch = patch
        channels = self.encoder.channels
        self.expand = nn.ModuleList(nn.Linear(c, 2 * c, bias=False) for c in reversed(channels[1:]))
        self.norms = nn.ModuleList(nn.LayerNorm(c // 2) for c in reversed(channels[1:]))
        mirrored = zip(reversed(channels[:-1]), reversed(list(depths)[:-1]), strict=True)
        self.stages = nn.ModuleList(_stage(c, n, **options) for c, n in mirrored)
        self.final = nn.Linear(dim, patch * dim, bias=False)
        self.final_norm, self.head = nn.LayerNorm(dim // patch), nn.Conv2d(dim // patch, num_classes, 1)

    def forward(self, image: Tensor) -> Tensor:
        *skips, x = self.encoder(image)
        for expand, norm, stage, skip in zip(self.expand, self.norms, self.stages, reversed(skips), strict=True):
            x = stage(norm(_spread(expand(x), 2)) + skip)
        x = self.final_norm(_spread(self.final(x), self.patch))
        logits: Tensor = self.head(x.permute(0, 3, 1, 2))
        return logits


class Classifier(nn.Module):
    """The `Encoder`, the mean over the cells of its last stage, and a linear head: images to logits (batch, num_classes)."""

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        *,
        dim: int = 96,
        depths: Sequence[int] = (2, 2, 2, 2),
        patch: int = 4,
        **options: Any,
    ):
        super().__init__()
        self.encoder = Encoder(in_chans, dim, depths, patch, **options)
        self.norm = nn.LayerNorm(self.encoder.channels[-1])
        self.head = nn.Linear(self.encoder.channels[-1], num_classes) if num_classes else nn.Identity()

    def forward(self, image: Tensor) -> Tensor:
        y: Tensor = self.head(self.norm(self.encoder(image)[-1].mean((1, 2))))
        return y


def _stage(dim: int, depth: int, **options: Any) -> nn.Sequential:
    return nn.Sequential(*(Block(dim, layer=i, **options) for i in range(depth)))


def _channels_last(x: Tensor) -> Tensor:
    return x.permute(0, 2, 3, 1)


def _spread(x: Tensor, factor: int) -> Tensor:
    """Each cell to factor x factor cells of channels / factor^2."""
    return _channels_last(F.pixel_shuffle(x.permute(0, 3, 1, 2), factor))


def match_width(parameters: int, *, step: int = 4, most: int = 1024, **options: Any) -> int:
    """The `dim` (a multiple of `step`) whose `UNet` has the number of parameters nearest to `parameters`; options as there.

    Raises ValueError when `most` is too narrow for that many.
    """
    best, least = step, math.inf
    for dim in range(step, most + 1, step):
        with torch.device("meta"):
            count = sum(p.numel() for p in UNet(dim=dim, **options).parameters())
        if abs(count - parameters) < least:
            best, least = dim, abs(count - parameters)
        if count >= parameters:
            return best
    raise ValueError(f"parameters must be reachable with dim up to {most}, got {parameters}")


# ---------------------------------------------------------------------------------------------------------- loss and metrics


def dice_loss(logits: Tensor, target: Tensor, *, smooth: float = 1e-5) -> Tensor:
    """1 - soft Dice of sigmoid(logits) against target, both (batch, channels, ...), mean over batch and channels."""
    probability, target = torch.sigmoid(logits).flatten(2), target.to(logits.dtype).flatten(2)
    overlap = (probability * target).sum(-1)
    return 1 - ((2 * overlap + smooth) / (probability.sum(-1) + target.sum(-1) + smooth)).mean()


def dice(y_pred: Tensor, y: Tensor) -> Tensor:
    """2 |P & T| / (|P| + |T|) for each image and channel of binary masks (batch, channels, ...); NaN where the target is empty."""
    y_pred, y = _masks(y_pred, y)
    sizes = y_pred.flatten(2).sum(-1) + y.flatten(2).sum(-1)
    overlap = 2 * (y_pred & y).flatten(2).sum(-1)
    return torch.where(y.flatten(2).any(-1), overlap / sizes, torch.nan)


def hausdorff_distance(
    y_pred: Tensor, y: Tensor, *, percentile: float = 95.0, spacing: Sequence[float] | None = None
) -> Tensor:
    """The percentile (100: Hausdorff) of the distances between the borders, the larger of both directions: (batch, channels).

    Masks (batch, channels, ...) of any number of dimensions; `spacing` is the size of a cell in each (default 1, cells).
    NaN where both masks are empty, infinity where one is. Raises ValueError for arguments that do not fit.
    """
    y_pred, y = _masks(y_pred, y)
    if not 0 < percentile <= 100:
        raise ValueError(f"percentile must lie in (0, 100], got {percentile}")
    spacing = [1.0] * (y.ndim - 2) if spacing is None else list(spacing)
    if len(spacing) != y.ndim - 2 or min(spacing) <= 0:
        raise ValueError(f"spacing must be {y.ndim - 2} positive numbers, got {spacing}")
    unit = torch.tensor(spacing, dtype=torch.float64, device=y.device)
    found = torch.full(y.shape[:2], torch.nan, dtype=torch.float64, device=y.device)
    for image in range(len(y)):
        for channel in range(y.shape[1]):
            a, b = (_border(mask[image, channel]).nonzero() * unit for mask in (y_pred, y))
            if len(a) and len(b):
                distance = torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")
                ways = [torch.quantile(distance.amin(side), percentile / 100) for side in (0, 1)]
                found[image, channel] = torch.stack(ways).max()
            elif len(a) or len(b):
                found[image, channel] = torch.inf
    return found


def _masks(y_pred: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    if y_pred.shape != y.shape or y.ndim < 3:
        raise ValueError(
            f"y_pred and y must be of one shape (batch, channels, ...), got {tuple(y_pred.shape)}, {tuple(y.shape)}"
        )
    for name, mask in (("y_pred", y_pred), ("y", y)):
        if mask.dtype != torch.bool and ((mask != 0) & (mask != 1)).any():
            raise ValueError(f"{name} must hold 0 and 1 only: threshold or one-hot it first")
    return y_pred.bool(), y.bool()


def _border(mask: Tensor) -> Tensor:
    """Cells with a neighbour (along an axis) outside the mask or outside the image."""
    inner = mask.clone()
    for axis in range(mask.ndim):
        padded = F.pad(mask, (0, 0) * (mask.ndim - 1 - axis) + (1, 1))
        inner &= padded.narrow(axis, 0, mask.shape[axis]) & padded.narrow(axis, 2, mask.shape[axis])
    return mask & ~inner


# ----------------------------------------------------------------------------------------------------------------- taxonomy


@dataclass(frozen=True)
class Entry:
    """One model of the survey's field. `builder` holds the options of `UNet` (or `Classifier`) that come nearest to it."""

    method: str
    arxiv: str
    task: str  # segmentation, classification, registration, reconstruction, restoration, synthesis, backbone
    modality: tuple[str, ...]
    dimension: tuple[str, ...]  # 2d, 3d, video
    design: Literal["pure", "hybrid"]
    order: str  # a name in `scan.ORDERS`, or in words
    code: bool
    builder: Mapping[str, Any]

    @property
    def year(self) -> int:
        """Year of its first arXiv version."""
        return 2000 + int(self.arxiv[:2])


@functools.cache
def _entries() -> tuple[Entry, ...]:
    text = (resources.files(__package__) / "taxonomy.toml").read_text()
    rows: list[dict[str, Any]] = tomllib.loads(text)["model"]
    lists = ("modality", "dimension")
    return tuple(Entry(**{**row, **{name: tuple(row[name]) for name in lists}}) for row in rows)


def taxonomy(**filters: Any) -> list[Entry]:
    """The rows whose fields equal all filters (`modality="mri"`: contain it), such as task="segmentation", dimension="3d".

    Raises ValueError for a field that rows do not have.
    """
    fields = (*Entry.__dataclass_fields__, "year")
    if unknown := set(filters) - set(fields):
        raise ValueError(f"filters must be among {', '.join(fields)}, got {', '.join(sorted(unknown))}")

    def fits(row: Entry) -> bool:
        found = {name: getattr(row, name) for name in filters}
        return all(want in found[k] if isinstance(found[k], tuple) else found[k] == want for k, want in filters.items())

    return [row for row in _entries() if fits(row)]
