"""Sparse weights in memory: N:M (values and places), bitmasks, and the semi-structured 2:4 tensors of torch and torchao.

    >>> weight = torch.tensor([[0.0, 5.0, 0.0, 6.0]])
    >>> packed = pack_n_m(weight, 2, 4)
    >>> packed.values, packed.bits, bool((packed.dense() == weight).all())
    (tensor([[5., 6.]]), 17, True)

All are exact: what is unpacked is what was packed. Which weights stay is the business of `projections`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from assay import checks
from assay.methods.core.sparsity.projections import check_n_m, follows, top

SEMI_STRUCTURED = {
    torch.float16: (32, 64),
    torch.bfloat16: (32, 64),
    torch.int8: (32, 128),
}  # least rows and columns, and multiples


@dataclass(frozen=True)
class PackedNM:
    """An N:M matrix: `values` (out, in n / m), and of each value its place in its group, as bits.

    A place takes ceil(log2 m) bits; `places` are all of them in a row, least significant bit first, filled up to a byte.
    """

    values: Tensor
    places: Tensor  # uint8
    n: int
    m: int

    @property
    def bits(self) -> float:
        """Bits a dense weight: n / m (bits of a value + ceil(log2 m)). 1:1 is dense and has no places."""
        found = (self.values.element_size() * 8 + _place_bits(self.m)) * self.n / self.m
        return int(found) if found == int(found) else found

    @property
    def bytes(self) -> int:
        """What values and places take."""
        return self.values.numel() * self.values.element_size() + self.places.numel()

    def dense(self) -> Tensor:
        """The matrix (out, in), zeros included."""
        rows, kept = self.values.shape
        places = _unpack_bits(self.places, self.values.numel(), _place_bits(self.m)).view(rows, -1, self.n)
        whole = torch.zeros(rows, kept // self.n, self.m, dtype=self.values.dtype, device=self.values.device)
        whole.scatter_(2, places.to(whole.device), self.values.view(rows, -1, self.n))
        return whole.flatten(1)


def pack_n_m(weight: Tensor, n: int, m: int) -> PackedNM:
    """A matrix (out, in) with at most `n` weights other than 0 in each `m` of a row. Raises ValueError for one that has more.

    Groups with fewer are filled up with zeros, the first ones.
    """
    n, m = check_n_m(n, m)
    w = checks.tensor("weight", weight, ndim=2, finite=True).detach()
    if not follows(w, n, m):
        raise ValueError(f"weight must be {n}:{m} along its inputs, got a group with more, or {w.shape[1]} inputs")
    groups = w.reshape(-1, m)
    kept = top((groups != 0).float(), n)
    places = kept.nonzero()[:, 1].view(-1, n)
    values = groups.gather(1, places).view(len(w), -1)
    return PackedNM(values, _pack_bits(places.flatten(), _place_bits(m)).to(w.device), n, m)


@dataclass(frozen=True)
class PackedBitmask:
    """A sparse matrix as compressed-tensors' "sparse-bitmask" has it: the values in order, a bit a weight, where each row begins.

    `bitmask` is uint8 (out, ceil(in / 8)), least significant bit first; `row_offsets` int64 (out,).
    """

    values: Tensor
    bitmask: Tensor
    row_offsets: Tensor
    shape: tuple[int, int]

    @property
    def bytes(self) -> int:
        """What values, bits and offsets take."""
        return sum(x.numel() * x.element_size() for x in (self.values, self.bitmask, self.row_offsets))

    def dense(self) -> Tensor:
        """The matrix (out, in), zeros included."""
        bits = np.unpackbits(self.bitmask.cpu().numpy(), axis=1, count=self.shape[1], bitorder="little")
        mask = torch.from_numpy(bits).bool().to(self.values.device)
        whole = torch.zeros(self.shape, dtype=self.values.dtype, device=self.values.device)
        whole[mask] = self.values
        return whole


def pack_bitmask(weight: Tensor) -> PackedBitmask:
    """Any matrix (out, in): smaller than the dense one as soon as more than a bit a weight (and 8 bytes a row) is saved."""
    w = checks.tensor("weight", weight, ndim=2, finite=True).detach()
    mask = w != 0
    bits = torch.from_numpy(np.packbits(mask.cpu().numpy(), axis=1, bitorder="little")).to(w.device)
    counts = mask.sum(1)
    return PackedBitmask(w[mask], bits, counts.cumsum(0) - counts, (w.shape[0], w.shape[1]))


def why_not_semi_structured(weight: Tensor) -> str:
    """Why torch's semi-structured layout does not take a matrix (out, in); "" if it does.

    It takes float16, bfloat16 and int8 of 2:4 along the inputs, with outputs and inputs in multiples of 32 and 64 (int8: 128). float32 has
    1:2 there, which is another pattern.
    """
    w = checks.tensor("weight", weight, ndim=2, dtype="any").detach()
    if w.dtype not in SEMI_STRUCTURED:
        return f"it takes {', '.join(map(str, SEMI_STRUCTURED))}, not {w.dtype}"
    rows, columns = SEMI_STRUCTURED[w.dtype]
    if w.shape[0] % rows or w.shape[1] % columns:
        return f"its sides must be multiples of {rows} and {columns}, not {tuple(w.shape)}"
    return "" if follows(w, 2, 4) else "more than 2 of 4 neighbouring inputs are not 0"


def semi_structured_layout(weight: Tensor) -> tuple[Tensor, Tensor]:
    """The values (out, in / 2) and metadata of a 2:4 matrix in the layout CUTLASS reads, made on any device, by torch's own code.

    Raises ValueError for a matrix the layout does not take (`why_not_semi_structured`).
    """
    from torch.sparse._semi_structured_conversions import sparse_semi_structured_from_dense_cutlass

    if why := why_not_semi_structured(weight):
        raise ValueError(f"weight must fit the semi-structured layout: {why}")
    values, meta = sparse_semi_structured_from_dense_cutlass(weight.detach().contiguous())
    return values, meta


def put_semi_structured(model: nn.Module, names: Iterable[str]) -> nn.Module:
    """Give the named linear layers torch's semi-structured weights, in place; returns the model.

    These are the tensors that torchao's `sparsify_(model, semi_sparse_weight())` puts in; they compute on an NVIDIA GPU that has sparse
    tensor cores and nowhere else, without gradients to the weight. `masks.bake` masked weights first.
    Raises ValueError, before anything is changed, for a layer that does not fit or a weight that is not on such a GPU.
    """
    from torch.sparse import to_sparse_semi_structured

    known = dict(model.named_modules())
    layers: dict[str, Any] = {}
    for name in names:
        layer: Any = known.get(name)
        if type(layer) is not nn.Linear or "weight" not in layer._parameters:
            raise ValueError(f"names must be plain linear layers, got {name!r}")
        if why := why_not_semi_structured(layer.weight):
            raise ValueError(f"the weight of {name} must fit the semi-structured layout: {why}")
        if not layer.weight.is_cuda or torch.cuda.get_device_capability(layer.weight.device) < (8, 0):
            raise ValueError(
                f"the weight of {name} must lie on a GPU with sparse tensor cores, got {layer.weight.device}; "
                "`semi_structured_layout` gives its layout on any device"
            )
        layers[name] = layer
    for layer in layers.values():
        sparse = to_sparse_semi_structured(layer.weight.detach().contiguous())
        layer.weight = nn.Parameter(sparse, requires_grad=False)
    return model


def _place_bits(m: int) -> int:
    return (m - 1).bit_length()


def _pack_bits(numbers: Tensor, width: int) -> Tensor:
    shifts = torch.arange(width)
    bits = (numbers.cpu()[:, None] >> shifts) & 1
    return torch.from_numpy(np.packbits(bits.to(torch.uint8).numpy().ravel(), bitorder="little"))


def _unpack_bits(packed: Tensor, count: int, width: int) -> Tensor:
    bits = np.unpackbits(packed.cpu().numpy(), count=count * width, bitorder="little")
    planes = torch.from_numpy(bits).view(count, width).long()
    return (planes << torch.arange(width)).sum(1)
