"""Small parts of image models."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from assay import checks

Activation = Callable[[], nn.Module]


class DropPath(nn.Module):
    """Leaves a residual branch out, per sample, with probability `rate` while training; what stays is scaled by 1 / (1 - rate).

    Huang et al., "Deep Networks with Stochastic Depth" (2016). Outside of training, and at rate 0, it is the identity.
    """

    def __init__(self, rate: float = 0.0) -> None:
        super().__init__()
        self.rate = checks.number("rate", rate, low=0, below=1)

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.rate == 0:
            return x
        kept = torch.rand((x.shape[0],) + (1,) * (x.ndim - 1), device=x.device) >= self.rate
        return x * kept.to(x.dtype) / (1 - self.rate)

    def extra_repr(self) -> str:
        return f"rate={self.rate}"


def drop_path_rates(rate: float, depths: tuple[int, ...]) -> list[list[float]]:
    """Rates that rise linearly from 0 at the first block to `rate` at the last, by stage."""
    count = sum(depths)
    flat = [rate * place / max(count - 1, 1) for place in range(count)]
    starts = [sum(depths[:stage]) for stage in range(len(depths))]
    return [flat[start : start + depth] for start, depth in zip(starts, depths, strict=True)]


class LayerNorm2d(nn.LayerNorm):
    """Layer norm over the channels of a map (B, C, H, W). Over channels-last memory nothing is copied."""

    def __init__(self, channels: int, eps: float = 1e-6) -> None:
        super().__init__(channels, eps=eps)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class ConvNormAct(nn.Sequential):
    """`conv` without bias, `norm` (BatchNorm), `act` (ReLU; nothing for None); padding keeps the size at stride 1."""

    def __init__(
        self, channels_in: int, channels_out: int, kernel: int = 3, *, stride: int = 1, groups: int = 1,
        act: Activation | None = nn.ReLU,
    ) -> None:  # fmt: skip
        super().__init__()
        self.conv = nn.Conv2d(channels_in, channels_out, kernel, stride, kernel // 2, groups=groups, bias=False)
        self.norm = nn.BatchNorm2d(channels_out)
        if act is not None:
            self.act = act()


class Mlp(nn.Module):
    """`fc1`, `act` (GELU), `fc2` on the last dimension."""

    def __init__(self, width: int, hidden: int, *, act: Activation = nn.GELU, out: int | None = None) -> None:
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(width, hidden), act(), nn.Linear(hidden, out or width)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.fc2(self.act(self.fc1(x)))
        return y


class PatchMerging(nn.Module):
    """Half the resolution, twice the channels: (B, H, W, C) to (B, ceil(H/2), ceil(W/2), 2C). Swin Transformer (2021), section 3.1.

    The four neighbours are joined in the order (row, column) = (0,0), (1,0), (0,1), (1,1), which the published weights want; then
    comes a norm over 4C and a linear layer without bias. Odd sizes are padded with zeros at the bottom and right.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4 * width)
        self.reduction = nn.Linear(4 * width, 2 * width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[1:3]
        if height % 2 or width % 2:
            x = F.pad(x, (0, 0, 0, width % 2, 0, height % 2))
        parts = [x[:, row::2, column::2] for column in (0, 1) for row in (0, 1)]
        y: Tensor = self.reduction(self.norm(torch.cat(parts, -1)))
        return y


class SqueezeExcite(nn.Module):
    """Channels weighted by a gate on their means: x * gate(expand(act(reduce(mean x)))), x (B, C, H, W). Hu et al. (2018)."""

    def __init__(self, channels: int, hidden: int, *, act: Activation = nn.ReLU, gate: Activation = nn.Sigmoid) -> None:
        super().__init__()
        self.reduce, self.act = nn.Conv2d(channels, hidden, 1), act()
        self.expand, self.gate = nn.Conv2d(hidden, channels, 1), gate()

    def forward(self, x: Tensor) -> Tensor:
        weights: Tensor = self.gate(self.expand(self.act(self.reduce(x.mean((2, 3), keepdim=True)))))
        return x * weights


def init_transformer(module: nn.Module) -> None:
    """Linear layers from a truncated normal of deviation 0.02, biases zero, layer norms 1 and 0. For `model.apply`."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.LayerNorm) and module.elementwise_affine:
        nn.init.ones_(module.weight)
        nn.init.zeros_(module.bias)
