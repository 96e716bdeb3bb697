"""Kernels as long as the sequence, learned tap by tap: the regularisers `squash` and `smooth`, and the weights they work on."""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from assay import checks
from assay.methods.core.mixers.protocol import check_positive, fast_length, wide_dtype

Domain = Literal["time", "frequency"]
Init = Literal["random", "double_exponential"]


def squash(k: Tensor, lam: float) -> Tensor:
    """sign(k) * max(|k| - lam, 0): exactly 0, and without gradient, where |k| <= lam; moved towards 0 by lam elsewhere.

    Raises ValueError for a lam that is negative or not finite, TypeError for whole or complex taps; lam = 0 changes nothing.

    >>> squash(torch.tensor([-0.5, 0.1, 0.2, 1.0]), 0.2).tolist()
    [-0.30000001192092896, 0.0, 0.0, 0.800000011920929]
    """
    lam = checks.number("lam", lam, low=0)
    checks.tensor("k", k, empty=True)
    return F.softshrink(k, lam) if lam else k


def smooth(k: Tensor, width: int, domain: Domain = "time") -> Tensor:
    """Kernels (channels, dim, taps) smoothed over `width` taps, or over `width` frequencies.

    "time" is the moving average, zeros beyond the ends. "frequency" filters the kernel's spectrum of length 2 * taps with weights
    exp(-(j - c)^2 / 2) around the centre c, of sum 1. That is the same as a window that falls with the lag, and done so.
    Raises ValueError for an even width or an unknown domain.
    """
    _check_smoothing(width, domain)
    checks.tensor("k", k, ndim=3, empty=True)
    if width == 1 or not k.numel():
        return k
    if domain == "time":
        return F.avg_pool1d(k, width, stride=1, padding=width // 2)
    return k * frequency_window(k.shape[-1], width).to(k)


def _check_smoothing(width: int, domain: str) -> None:
    if checks.whole("width", width, low=1) % 2 == 0:
        raise ValueError(f"width must be odd and at least 1, got {width}")
    checks.choice("domain", domain, get_args(Domain))


def frequency_window(taps: int, width: int) -> Tensor:
    """What filtering the spectrum of length 2 * taps does to tap t: sum over j of weight_j cos(pi t (j - c) / taps), float64."""
    _check_smoothing(width, "frequency")
    taps = checks.whole("taps", taps, low=1)
    offset = torch.arange(width, dtype=torch.float64) - width // 2
    weight = torch.exp(-0.5 * offset.square())
    angle = math.pi * torch.arange(taps, dtype=torch.float64)[:, None] * offset / taps
    return angle.cos() @ (weight / weight.sum())


class LongKernel(nn.Module):
    """`channels` kernels for each of `dim` inputs, `length` taps each, as they are used: smoothed, squashed, with dropout.

    `lam` the threshold (0.001 to 0.005 by task), `smooth_width` 1 for none, `dropout` of taps (0.2 to 0.3), `init` "random",
    0.002 N(0, 1), or "double_exponential", 0.02 N(0, 1) falling with the lag at a rate that rises with the input's index. `D`
    (channels, dim) is the weight of the input itself. The kernel has a learning rate of its own and no weight decay:
    `assay.experiments.mixers.training.parameter_groups` asks `optimizer_options`. Raises ValueError for impossible sizes.
    """

    def __init__(
        self,
        channels: int,
        dim: int,
        length: int,
        *,
        lam: float = 0.003,
        smooth_width: int = 1,
        smooth_domain: Domain = "time",
        dropout: float = 0.0,
        init: Init = "random",
        lr: float = 1e-3,
        skips: int | None = None,
    ):
        super().__init__()
        check_positive(channels=channels, dim=dim, length=length)
        checks.choice("init", init, get_args(Init))
        lam, dropout = checks.number("lam", lam, low=0), checks.number("dropout", dropout, low=0, below=1)
        lr = checks.number("lr", lr, above=0)
        _check_smoothing(smooth_width, smooth_domain)
        if smooth_width == 1 and smooth_domain != "time":
            raise ValueError(
                f"smooth_domain must be left out where smooth_width is 1: nothing is smoothed, got {smooth_domain!r}"
            )
        self.kernel = nn.Parameter(torch.empty(channels, dim, length))
        self.D = nn.Parameter(torch.empty(channels if skips is None else skips, dim))
        self.lam, self.smooth_width, self.init, self.lr = lam, smooth_width, init, lr
        self.smooth_domain: Domain = smooth_domain
        self.dropout = nn.Dropout(dropout)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """The start named by `init`; D is N(0, 1)."""
        nn.init.normal_(self.D)
        nn.init.normal_(self.kernel, std=0.002 if self.init == "random" else 0.02)
        if self.init == "double_exponential":
            _, dim, length = self.kernel.shape
            lag = torch.arange(length, device=self.kernel.device) / length
            rate = (dim / 2) ** (torch.arange(dim, device=self.kernel.device) / dim)
            self.kernel.mul_(torch.exp(-lag * rate[:, None]))

    def forward(self, taps: int | None = None) -> Tensor:
        """(channels, dim, taps): the first `taps` of the kernels, all when None; made anew from the weights at every call."""
        length = self.kernel.shape[-1]
        taps = length if taps is None else checks.whole("taps", taps, low=0, high=length)
        k: Tensor = self.kernel
        if self.smooth_width == 1:
            k = k[..., :taps]
        elif self.smooth_domain == "time":  # no further than the taps that are averaged into the last one
            k = smooth(k[..., : taps + self.smooth_width // 2], self.smooth_width)[..., :taps]
        else:
            k = k[..., :taps] * frequency_window(length, self.smooth_width)[:taps].to(k)
        out: Tensor = self.dropout(squash(k, self.lam))
        return out

    def continued(self, u: Tensor, tokens: int) -> Tensor:
        """The last `tokens` outputs of the causal `fft_conv` over u (batch, dim, seen): (batch, channels, dim, tokens).

        One token is a product with the kernel, seen MACs a channel (1 MAC = 2 FLOPs); more are one overlap-save block of
        seen + tokens - 1 places. The kernels are made anew each time, so that no step ever uses yesterday's weights.
        """
        seen, wide = u.shape[-1], wide_dtype(u.dtype)
        k = self(seen).to(wide)
        if tokens == 1:  # the sequence is turned round, not the kernels: there are more of those
            y = (u.to(wide).flip(-1).transpose(0, 1) @ k.permute(1, 2, 0)).permute(1, 2, 0)[..., None]
        else:
            n = fast_length(seen + tokens - 1)
            y = torch.fft.irfft(torch.fft.rfft(u.to(wide), n)[:, None] * torch.fft.rfft(k, n), n)[
                ..., seen - tokens : seen
            ]
        return y.to(u.dtype) + u[:, None, :, seen - tokens :] * self.D[..., None]

    def optimizer_options(self) -> dict[str, dict[str, float]]:
        """The kernel's own learning rate, and no weight decay; by parameter name, see `training.parameter_groups`."""
        return {"kernel": {"lr": self.lr, "weight_decay": 0.0}}
