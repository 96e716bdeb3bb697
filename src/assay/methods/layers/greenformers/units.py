"""The layers that take the place of dense ones, their break-even rank, and going from a layer to its matrices and back."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from assay import checks
from assay.methods.core.layers.stand_in import stand_in
from assay.methods.core.layers.surgery import CONVOLUTIONS, linear_kinds

MOST = 2**31 - 1  # of a rank: more directions than any layer has


class LED(nn.Module):
    """Linear encoder-decoder: `encoder` (i -> rank, no bias), then `decoder` (rank -> o, with the bias). (..., i) -> (..., o).

    `weight` shows the dense layer's weight to models that look at it, and computes it for those that want its numbers.

    >>> unit = LED(64, 48, rank=8)
    >>> unit(torch.randn(2, 64)).shape, unit.weight.shape
    (torch.Size([2, 48]), torch.Size([48, 64]))
    """

    def __init__(self, in_features: int, out_features: int, rank: int, bias: bool = True, **options: Any) -> None:
        super().__init__()
        check_whole_rank(rank)
        self.in_features = checks.whole("in_features", in_features, low=1)
        self.out_features = checks.whole("out_features", out_features, low=1)
        self.rank = rank
        self.encoder = nn.Linear(in_features, rank, bias=False, **options)
        self.decoder = nn.Linear(rank, out_features, bias=bias, **options)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.decoder(self.encoder(x))
        return out

    @property
    def weight(self) -> Tensor:
        """D E, (o, i), with gradients to both."""
        d, e = self.decoder.weight, self.encoder.weight
        return stand_in((self.out_features, self.in_features), d.dtype, d.device, lambda: d @ e)

    @property
    def bias(self) -> Tensor | None:
        """The decoder's."""
        return self.decoder.bias

    def merged(self) -> nn.Linear:
        """The dense layer with the same action."""
        return linear_around(_product(self.decoder.weight, self.encoder.weight), self.decoder.bias)

    def extra_repr(self) -> str:
        return f"rank={self.rank}"


class CED(nn.Module):
    """Convolutional encoder-decoder: the convolution to `rank` channels, then one of size 1 to the outputs, with the bias.

    Stride, padding, dilation and groups are the first one's. The second is grouped as well (our choice): then a grouped
    convolution is factored exactly, group by group; `rank` is a multiple of the groups.
    """

    def __init__(self, encoder: nn.Module, decoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder
        self.decoder = decoder
        first: Any = encoder
        self.out_channels: int = decoder.out_channels  # type: ignore[assignment]
        for name in ("in_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode"):
            setattr(self, name, getattr(first, name))  # Whisper, say, asks its convolutions for their strides

    @property
    def weight(self) -> Tensor:
        """The kernel of the one convolution with the same action, with gradients to both."""
        d: Tensor = self.decoder.weight  # type: ignore[assignment]
        e: Tensor = self.encoder.weight  # type: ignore[assignment]
        groups: int = self.groups  # type: ignore[assignment]

        def dense() -> Tensor:
            pairs = zip(d.chunk(groups), e.chunk(groups), strict=True)
            return torch.cat([a.flatten(1) @ b.flatten(1) for a, b in pairs]).reshape(self.out_channels, *e.shape[1:])

        return stand_in((self.out_channels, *e.shape[1:]), e.dtype, e.device, dense)

    @property
    def bias(self) -> Tensor | None:
        """The decoder's."""
        found: Tensor | None = self.decoder.bias  # type: ignore[assignment]
        return found

    @classmethod
    def like(cls, conv: nn.Module, rank: int) -> CED:
        """A unit with fresh weights in the shape of `conv`. Raises ValueError when `rank` is not a multiple of its groups."""
        c: Any = conv
        check_whole_rank(rank)
        if rank % c.groups:
            raise ValueError(f"rank must be a multiple of the {c.groups} groups, got {rank}")
        options = {"device": c.weight.device, "dtype": c.weight.dtype}
        shape = {name: getattr(c, name) for name in ("stride", "padding", "dilation", "padding_mode")}
        encoder = type(c)(c.in_channels, rank, c.kernel_size, groups=c.groups, bias=False, **shape, **options)
        decoder = type(c)(rank, c.out_channels, 1, groups=c.groups, bias=c.bias is not None, **options)
        return cls(encoder, decoder).train(c.training)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.decoder(self.encoder(x))
        return out

    def merged(self) -> nn.Module:
        """The one convolution with the same action."""
        first: Any = self.encoder
        second: Any = self.decoder
        dense: nn.Module = copy.deepcopy(first)
        dense.out_channels = second.out_channels
        pairs = zip(second.weight.chunk(first.groups), first.weight.chunk(first.groups), strict=True)
        weight = torch.cat([_product(d.flatten(1), e.flatten(1)) for d, e in pairs])
        dense.weight = nn.Parameter(weight.reshape(second.out_channels, *first.weight.shape[1:]))
        dense.bias = second.bias
        return dense


class LEDEmbedding(nn.Module):
    """A factored embedding: `codes` (V, rank), then `decoder` (rank -> d). (...) int64 -> (..., d)."""

    def __init__(self, codes: nn.Embedding, decoder: nn.Linear) -> None:
        super().__init__()
        self.codes, self.decoder = codes, decoder
        self.num_embeddings, self.embedding_dim = codes.num_embeddings, decoder.out_features
        self.padding_idx = codes.padding_idx

    @property
    def rank(self) -> int:
        """Width of `codes`."""
        return self.codes.embedding_dim

    def forward(self, ids: Tensor) -> Tensor:
        out: Tensor = self.decoder(self.codes(ids))
        return out

    @property
    def weight(self) -> Tensor:
        """The table (V, d), with gradients to both."""
        codes, decoder = self.codes.weight, self.decoder.weight
        return stand_in((self.num_embeddings, self.embedding_dim), codes.dtype, codes.device, lambda: codes @ decoder.T)

    def merged(self) -> nn.Embedding:
        """The table with the same action."""
        weight = _product(self.codes.weight, self.decoder.weight.T)
        return table_around(weight, self.padding_idx)


UNITS: tuple[type[nn.Module], ...] = (LED, CED, LEDEmbedding)


def linear_around(weight: Tensor, bias: nn.Parameter | None = None) -> nn.Linear:
    """A linear layer around an existing weight (o, i), without initialising a fresh one first. The bias stays the same parameter."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight = nn.Parameter(weight.detach().contiguous())
    layer.bias = bias  # type: ignore[assignment]
    return layer


def table_around(weight: Tensor, padding_idx: int | None) -> nn.Embedding:
    """An embedding around an existing weight (V, d), without initialising a fresh one first."""
    table = nn.Embedding(len(weight), weight.shape[1], padding_idx=padding_idx, device="meta")
    table.weight = nn.Parameter(weight.detach().contiguous())
    return table


def _product(a: Tensor, b: Tensor) -> Tensor:
    return (a.detach().double() @ b.detach().double()).to(a.dtype)


def check_whole_rank(rank: int) -> None:
    """Raises TypeError or ValueError unless `rank` is an integer of at least 1."""
    checks.whole("rank", rank, low=1)


def break_even_rank(module: nn.Module) -> float:
    """The rank at which the factored layer has as many parameters as the dense one; below it there is a gain.

    i o / (i + o) for a linear layer; for a convolution the kernel counts, c K o / (c K + o) a group (c, o: channels in and out
    of a group, K: kernel entries), times the groups.
    """
    rows, columns, groups = matrix_shape(module)
    return groups * rows * columns / (rows + columns)


def matrix_shape(module: Any) -> tuple[int, int, int]:
    """(outputs, inputs, groups) of the matrix, or of each group's matrix."""
    if type(module) in CONVOLUTIONS:
        return module.out_channels // module.groups, math.prod(module.weight.shape[1:]), module.groups
    rows, columns = _matrix(module).shape
    return rows, columns, 1


def _matrix(module: Any) -> Tensor:
    """The weight as (outputs, inputs): transposed for Conv1D; an embedding is read as the head it could be."""
    weight: Tensor = module.weight
    return weight.T if type(module) is linear_kinds()[1] else weight


def weight_of(layer: Any) -> nn.Parameter:
    """The weight as it is stored, whatever it means."""
    weight: nn.Parameter = layer.weight
    return weight


def matrices_of(layer: Any) -> list[Tensor]:
    """The (outputs, inputs) matrix of a layer, one a group."""
    if type(layer) in CONVOLUTIONS:
        return [chunk.flatten(1) for chunk in layer.weight.chunk(layer.groups)]
    return [_matrix(layer)]


def check_rank(rank: float) -> None:
    """Raises TypeError or ValueError unless `rank` is a whole number of at least 1 or a fraction in (0, 1)."""
    given = checks.number("rank", rank, above=0)
    if given >= 1 and (given != int(given) or given > MOST):
        raise ValueError(f"rank must be a whole number of at least 1 or a fraction in (0, 1), got {rank!r}")


def unit_around(layer: Any, pairs: Sequence[tuple[Tensor, Tensor]]) -> nn.Module:
    """The unit that takes `layer`'s place, with factors (D, E), one pair a group. The bias stays the same parameter."""
    d, e = torch.cat([d for d, _ in pairs]), torch.cat([e for _, e in pairs])
    if type(layer) in CONVOLUTIONS:
        ced: Any = CED.like(layer, len(e))
        ced.encoder.weight.data = e.reshape(ced.encoder.weight.shape).contiguous()
        ced.decoder.weight.data = d.reshape(ced.decoder.weight.shape).contiguous()
        ced.decoder.bias = layer.bias
        unit: nn.Module = ced
        return unit
    if type(layer) is nn.Embedding:
        return LEDEmbedding(table_around(d, layer.padding_idx), linear_around(e.T))
    led = LED(e.shape[1], len(d), len(e), bias=False, device="meta")
    led.encoder, led.decoder = linear_around(e), linear_around(d, layer.bias)
    return led
