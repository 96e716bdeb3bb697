"""A linear layer on codes of 4 or 8 bits in groups of any size, for weights of others that the panels of the kernels cannot hold exactly.

The kernels know groups of 32 inputs with float16 scales. Where a checkpoint's scales or zero points do not fit these to the last bit,
its layers are this one: plain torch, a few rows of the weight made dense at a time. It is right, and slow.

    >>> layer = GroupedLinear(torch.zeros(8, 2, dtype=torch.int32), torch.ones(8, 1), None, 16, 4)
    >>> layer(torch.ones(3, 16))[0, 0].item()
    -128.0
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from assay import checks
from assay.methods.core import kernels
from assay.methods.core.layers.stand_in import Casting, stand_in
from assay.methods.core.quantize.stored import WIDTHS, row_steps, unpack_words


class GroupedLinear(Casting, nn.Module):
    """y = x @ W^T + bias in the dtype of x, with W[n, k] = (code[n, k] - zero[n, g]) * scale[n, g], g the group of input k.

    `words` int32 (out, ceil(in * bits / 32)) holds the codes as `stored.pack_words` gives them, `scale` (out, groups) is of any
    floating type, `zero` uint8 (out, groups) or None, which stands for 2^(bits - 1). Raises TypeError or ValueError for other
    shapes and types.
    """

    words: Tensor
    scale: Tensor
    zero: Tensor | None

    def __init__(self, words: Tensor, scale: Tensor, zero: Tensor | None, in_features: int, bits: int) -> None:
        super().__init__()
        self.bits = checks.choice("bits", bits, WIDTHS)
        self.in_features = checks.whole("in_features", in_features, low=1)
        checks.tensor("words", words, shape=("out", -(-in_features * bits // 32)), dtype=torch.int32)
        self.out_features = len(words)
        checks.tensor("scale", scale, ndim=2, finite=True)
        if len(scale) != self.out_features or in_features % scale.shape[1]:
            raise ValueError(
                f"scale must have {self.out_features} rows of groups that divide {in_features} inputs, got {tuple(scale.shape)}"
            )
        if zero is not None:
            checks.tensor("zero", zero, shape=tuple(scale.shape), dtype=torch.uint8)
        self.register_buffer("words", words)
        self.register_buffer("scale", scale)
        self.register_buffer("zero", zero)
        self.bias: nn.Parameter | None = None
        self.dtype = scale.dtype

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> GroupedLinear:
        """Moves between devices like any module, but `model.to(bfloat16)` leaves the scales as they are."""
        scale = self.scale
        super()._apply(fn, recurse)
        self.scale = scale.to(self.words.device)
        self.follow(fn)
        return self

    @property
    def weight(self) -> Tensor:
        """The dense weight (out, in), made when its numbers are wanted; nothing learns by changing it."""
        return stand_in((self.out_features, self.in_features), self.dtype, self.words.device, self.dequantize)

    def dequantize(self) -> Tensor:
        """The float32 weights (out, in) this layer stands for."""
        return self._rows(0, self.out_features)

    def _rows(self, first: int, last: int) -> Tensor:
        codes = unpack_words(self.words[first:last], self.bits, self.in_features).float()
        zero: Any = 2.0 ** (self.bits - 1) if self.zero is None else self.zero[first:last, :, None].float()
        groups = codes.view(last - first, self.scale.shape[1], -1)
        return ((groups - zero) * self.scale[first:last, :, None].float()).view(codes.shape)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-1] != self.in_features:
            raise ValueError(f"x must have {self.in_features} values in its last dimension, got {tuple(x.shape)}")
        kernels.ran("grouped linear", "torch")
        steps = row_steps(self.out_features, self.in_features, 1)
        y = torch.cat([F.linear(x, self._rows(first, last).to(x.dtype)) for first, last in steps], -1)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bits={self.bits}, groups={self.scale.shape[1]}"
