"""A sparse matrix times dense pixels: how the weights are kept, and the product in its several ways."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, cast, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from assay import checks
from assay.measure.cost import register_macs
from assay.methods.core import kernels

Block = Literal[1, 2, 4]
Backend = Literal["strips", "csr", "dense"]
BLOCKS: tuple[Block, ...] = get_args(Block)
BACKENDS: tuple[Backend, ...] = get_args(Backend)
LANES = (8, 16)  # of an AVX2 and an AVX-512 register
MOST_WIDE = 4  # vectors of a strip
FEW_PIXELS = 32  # fewer of a picture, and the pictures of a batch are laid side by side

_ready: bool | None = None  # whether the compiled kernel serves; None until first asked


@dataclass(frozen=True)
class SparseMatrix:
    """A matrix (outputs, inputs) as the kernel reads it: of each block of outputs the places where any of them has a weight.

    `values` float32 (places, block); `steps` int32 (places,): from a place's input channel to the next place's, the last one back to the
    first; `counts` int32 (outputs / block,): how many places each block has; `first`: the channel of the first place. Steps count
    channels: the released code counts bytes, so that its list holds for one size of picture only (`our choice`).
    Raises TypeError or ValueError for parts that do not fit together or lead out of the matrix.
    """

    values: Tensor
    steps: Tensor
    counts: Tensor
    inputs: int
    first: int = 0

    def __post_init__(self) -> None:
        checks.tensor("values", self.values, ndim=2, dtype=torch.float32, finite=True, empty=True)
        checks.choice("the block (columns of values)", self.values.shape[1], BLOCKS)
        checks.tensor("steps", self.steps, shape=(len(self.values),), dtype=torch.int32, empty=True)
        checks.tensor("counts", self.counts, ndim=1, dtype=torch.int32)
        checks.whole("inputs", self.inputs, low=1)
        checks.whole("first", self.first, low=0, high=self.inputs - 1)
        counts = self.counts.long()
        if bool((counts < 0).any()) or int(counts.sum()) != len(self.values):
            raise ValueError(f"counts must be of the {len(self.values)} places, got a sum of {int(counts.sum())}")
        if len(self.values):
            visited = self.first + self.steps.long().cumsum(0)
            if bool((visited < 0).any()) or bool((visited >= self.inputs).any()) or int(visited[-1]) != self.first:
                raise ValueError(
                    f"steps must lead through the {self.inputs} channels and back to {self.first}, got others"
                )

    @property
    def block(self) -> int:
        """Outputs that share their places."""
        return self.values.shape[1]

    @property
    def outputs(self) -> int:
        """Rows of the matrix."""
        return self.counts.shape[0] * self.block

    @property
    def stored(self) -> int:
        """Weights that are kept and multiplied with: those that are not 0, and the zeros of places that a block keeps for another."""
        return self.values.numel()

    @property
    def bytes(self) -> int:
        """What values, steps and counts take: 4 bytes a weight, 4 a place and 4 a block."""
        return sum(part.numel() * part.element_size() for part in (self.values, self.steps, self.counts))

    def macs(self, pixels: int) -> int:
        """Multiply-accumulates of a product with so many pixels (1 MAC = 2 operations)."""
        return self.stored * checks.whole("pixels", pixels, low=0)

    def channels(self) -> Tensor:
        """The input channel of each place, int64 (places,)."""
        steps = self.steps.long()
        return self.first + steps.cumsum(0) - steps

    def dense(self) -> Tensor:
        """The matrix (outputs, inputs), zeros included."""
        whole = self.values.new_zeros(len(self.counts), self.inputs, self.block)
        groups = torch.arange(len(self.counts), device=self.counts.device).repeat_interleave(self.counts.long())
        whole[groups, self.channels()] = self.values
        return whole.transpose(1, 2).reshape(self.outputs, self.inputs)

    def csr(self) -> Tensor:
        """The same as torch's CSR matrix, with the zeros that blocks keep; int32 indices, which MKL takes as they are."""
        device, block = self.values.device, self.block
        groups = torch.arange(len(self.counts), device=device).repeat_interleave(self.counts.long())
        rows = (groups[:, None] * block + torch.arange(block, device=device)).flatten()
        order = rows.argsort(stable=True)  # from place by place to output by output
        starts = F.pad(self.counts.long().repeat_interleave(block).cumsum(0), (1, 0)).int()
        columns = self.channels().repeat_interleave(block)[order].int()
        size = (self.outputs, self.inputs)
        return torch.sparse_csr_tensor(starts, columns, self.values.flatten()[order], size)


def pack(weight: Tensor, block: Block = 1) -> SparseMatrix:
    """What is not 0 in `weight` (outputs, inputs), float32; a pointwise convolution's (outputs, inputs, 1, 1) too.

    With `block` 2 or 4, neighbouring outputs share their places, which loads each vector of pixels once for all of them; weights that are
    0 for one of them only are kept, so that any matrix can be packed, at a loss where it was not pruned in such blocks.
    Raises TypeError or ValueError for another dtype, a larger kernel, numbers that are not finite, and outputs that `block` does not
    divide.

    >>> packed = pack(torch.tensor([[0.0, 5.0, 0.0, 6.0], [7.0, 0.0, 0.0, 0.0]]))
    >>> packed.first, packed.steps.tolist(), packed.counts.tolist(), packed.bytes
    (1, [2, -3, 1], [2, 1], 32)
    """
    checks.choice("block", block, BLOCKS)
    checks.tensor("weight", weight, dtype=torch.float32, finite=True)
    if weight.ndim < 2 or math.prod(weight.shape[2:]) != 1:
        raise ValueError(f"weight must be (outputs, inputs), or that of a 1 x 1 convolution, got {tuple(weight.shape)}")
    matrix = weight.detach().flatten(1)
    outputs, inputs = matrix.shape
    if outputs % block:
        raise ValueError(f"block must divide the {outputs} outputs, got {block}")
    groups = matrix.view(outputs // block, block, inputs)
    used = (groups != 0).any(1)
    channels = used.nonzero()[:, 1]
    steps = (channels.roll(-1) - channels).int()
    values = groups.transpose(1, 2)[used].contiguous()
    return SparseMatrix(values, steps, used.sum(1).int(), inputs, int(channels[0]) if len(channels) else 0)


def sparse_product(
    x: Tensor,
    matrix: SparseMatrix,
    bias: Tensor | None = None,
    *,
    low: float = -math.inf,
    high: float = math.inf,
    backend: Backend | None = None,
    strip: int = 0,
    lanes: int = 0,
) -> Tensor:
    """clamp(W x + bias, low, high) for every pixel: x (batch, inputs, ...) to (batch, outputs, ...), float32, channels first.

    `backend` "strips" is the compiled kernel, "csr" torch's own product of a CSR matrix, "dense" a dense product; None takes the kernel
    where it can be had (a CPU with a compiler), else the dense product. The kernel's strips have `strip` pixels (0: chosen by the number
    of channels) in vectors of `lanes` (0: as wide as the processor's, 16 with AVX-512, else 8). Its results do not depend on the number of
    threads, which share out the strips of all pictures; pictures of fewer than 32 pixels are laid side by side first.
    It skips weights that are 0, so that an infinite input does not make NaN of the outputs it has no weight for; NaN passes the clamp.
    The kernel has no gradients: where x needs them None takes the dense product. Inputs that are not contiguous are copied.

    Raises TypeError or ValueError for another dtype, shapes that do not fit, an empty range, and "strips" where there is no kernel.

    >>> x = torch.ones(1, 4, 2, 2)
    >>> sparse_product(x, pack(torch.tensor([[0.0, 5.0, 0.0, 6.0]])), high=6.0).flatten()
    tensor([6., 6., 6., 6.])
    """
    flat = _checked(x, matrix, bias, low, high)
    checks.choice("backend", backend, (*BACKENDS, None))
    kernel = _serves(flat)
    if backend == "strips" and not kernel:
        raise ValueError("backend 'strips' needs a C++ compiler (g++) on x86-64, and x on the CPU without gradients")
    checks.choice("lanes", lanes, (0, *LANES))
    checks.whole("strip", strip, low=0)
    if strip and (not lanes or strip % lanes or strip > MOST_WIDE * lanes):
        raise ValueError(f"strip must be 1 to {MOST_WIDE} times lanes, which must be given with it, got {strip}")
    return multiply(x, flat, matrix, bias, low, high, backend, strip, lanes)


def multiply(
    x: Tensor,
    flat: Tensor,
    matrix: SparseMatrix,
    bias: Tensor | None,
    low: float,
    high: float,
    backend: Backend | None,
    strip: int = 0,
    lanes: int = 0,
) -> Tensor:
    """`sparse_product` of arguments that were checked before, `flat` being x as (batch, inputs, pixels): what layers call."""
    chosen = backend or ("strips" if _serves(flat) else "dense")
    kernels.ran("sparse product", "kernel" if chosen == "strips" else f"torch {chosen}")
    batch, inputs, pixels = flat.shape
    beside = batch > 1 and pixels < FEW_PIXELS
    rows = flat.transpose(0, 1).reshape(1, inputs, batch * pixels) if beside else flat
    rows = rows.contiguous()
    if not rows.numel():
        y = rows.new_empty(len(rows), matrix.outputs, rows.shape[2])
    elif chosen == "strips":
        y = cast(
            Tensor,
            torch.ops.assay.sparse_dense(
                rows, matrix.values, matrix.steps, matrix.counts, bias, matrix.first, low, high, strip, lanes
            ),
        )
    else:
        product = _csr_product(matrix.csr(), rows) if chosen == "csr" else matrix.dense() @ rows
        y = finish(product, bias, low, high).contiguous()
    if beside:
        y = y.view(matrix.outputs, batch, pixels).transpose(0, 1).contiguous()
    return y.view(batch, matrix.outputs, *x.shape[2:])


def reference(
    x: Tensor, matrix: SparseMatrix, bias: Tensor | None = None, *, low: float = -math.inf, high: float = math.inf
) -> Tensor:
    """The same by walking the lists, one place after another, in float64: the oracle of the tests. Slow.

    The pointer moves as the kernel's does, and must stand at its start in the end.
    """
    flat = _checked(x, matrix, bias, low, high).double()
    y = flat.new_zeros(len(flat), matrix.outputs, flat.shape[2])
    at, place = matrix.first, 0
    for group, count in enumerate(matrix.counts.tolist()):
        rows = slice(group * matrix.block, (group + 1) * matrix.block)
        for _ in range(count):
            y[:, rows] += matrix.values[place].double()[:, None] * flat[:, at, None]
            at += int(matrix.steps[place])
            place += 1
    if at != matrix.first:
        raise ValueError(f"steps must lead back to channel {matrix.first}, got to {at}")
    return finish(y, bias, low, high).to(x.dtype).view(len(flat), matrix.outputs, *x.shape[2:])


def finish(y: Tensor, bias: Tensor | None, low: float, high: float) -> Tensor:
    """Bias and clamp of outputs (batch, outputs, pixels)."""
    y = y if bias is None else y + bias[:, None]
    return y if low == -math.inf and high == math.inf else y.clamp(low, high)


def fastest(
    x: Tensor,
    matrix: SparseMatrix,
    bias: Tensor | None = None,
    *,
    low: float = -math.inf,
    high: float = math.inf,
    repeats: int = 5,
) -> tuple[Backend, dict[str, float]]:
    """Which way is the fastest for these inputs on this machine, and the seconds of each: the least of `repeats` runs, after a first.

    The dense and the CSR matrix are made beforehand. Sets no threads. Raises as `sparse_product`.
    """
    flat = _checked(x, matrix, bias, low, high)
    repeats = checks.whole("repeats", repeats, low=1)
    dense, csr = matrix.dense(), matrix.csr()
    ways: dict[Backend, Callable[[], Tensor]] = {
        "dense": lambda: finish(dense @ flat, bias, low, high),
        "csr": lambda: finish(_csr_product(csr, flat), bias, low, high),
    }
    if _serves(flat.detach()):
        ways["strips"] = lambda: sparse_product(x, matrix, bias, low=low, high=high, backend="strips")
    seconds: dict[str, float] = {}
    with torch.no_grad():
        for name, run in ways.items():
            run()
            taken = []
            for _ in range(repeats):
                start = time.perf_counter()
                run()
                taken.append(time.perf_counter() - start)
            seconds[name] = min(taken)
    return min(ways, key=lambda name: seconds[name]), seconds


def _csr_product(csr: Tensor, rows: Tensor) -> Tensor:
    """A CSR matrix times (batch, inputs, pixels), all pictures at once."""
    batch, inputs, pixels = rows.shape
    if batch == 1:
        return (csr @ rows[0])[None]
    found = csr @ rows.transpose(0, 1).reshape(inputs, batch * pixels)
    return found.view(-1, batch, pixels).transpose(0, 1)


def _checked(x: Tensor, matrix: SparseMatrix, bias: Tensor | None, low: float, high: float) -> Tensor:
    """x as (batch, inputs, pixels)."""
    checks.tensor("x", x, dtype=torch.float32, device=matrix.values.device, empty=True)
    if x.ndim < 2 or x.shape[1] != matrix.inputs:
        raise ValueError(f"x must be (batch, {matrix.inputs}, ...), got shape {tuple(x.shape)}")
    if bias is not None:
        checks.tensor("bias", bias, shape=(matrix.outputs,), dtype=torch.float32, device=x.device)
    if not low <= high:
        raise ValueError(f"low must be at most high, got {low} and {high}")
    return x.reshape(len(x), matrix.inputs, math.prod(x.shape[2:]))


def _macs(x: Tensor, values: Tensor, *_: Any, out: Tensor) -> int:
    return values.numel() * x.shape[0] * x.shape[2]


register_macs("assay::sparse_dense", _macs, "linear")


def _serves(x: Tensor) -> bool:
    """Whether the compiled kernel serves this input."""
    if _ready is None:
        _prepare()
    return bool(_ready) and x.device.type == "cpu" and not (torch.is_grad_enabled() and x.requires_grad)


def _prepare() -> None:
    global _ready
    _ready = kernels.load("sparse_dense")
    if _ready:
        torch.library.register_fake("assay::sparse_dense", _shape)


def _shape(x: Tensor, values: Tensor, steps: Tensor, counts: Tensor, *_: Any) -> Tensor:
    """Only the shape of the result, for torch.compile."""
    return x.new_empty(x.shape[0], counts.shape[0] * values.shape[1], x.shape[2])
