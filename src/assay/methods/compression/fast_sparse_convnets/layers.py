"""Layers that keep and multiply only the weights a pruned layer has left, and putting them into a model."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from assay import checks
from assay.methods.compression.fast_sparse_convnets.folding import module_places, taken_in
from assay.methods.compression.fast_sparse_convnets.product import (
    BLOCKS,
    Backend,
    Block,
    SparseMatrix,
    fastest,
    multiply,
    pack,
)
from assay.methods.core.layers.inputs import watch
from assay.methods.core.layers.stand_in import Casting, stand_in
from assay.methods.core.layers.surgery import find, refuse_saving, swap, untie
from assay.methods.core.sparsity.masks import matrix_of

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


class _Sparse(Casting, nn.Module):
    """What the two layers share: the matrix as buffers, so that it moves, saves and loads with the model.

    Buffers: `values`, `steps`, `counts`, `first` (int64, one number) and `bias` (float32 or None); see `SparseMatrix`.
    `model.to(bfloat16)` leaves them as they are: bfloat16 and float16 inputs are computed in float32 and come back in their own dtype.
    """

    values: Tensor
    steps: Tensor
    counts: Tensor
    first: Tensor
    bias: Tensor | None

    def __init__(self, matrix: SparseMatrix, bias: Tensor | None, low: float, high: float, dtype: torch.dtype):
        super().__init__()
        if not low <= high:
            raise ValueError(f"low must be at most high, got {low} and {high}")
        if bias is not None:
            checks.tensor("bias", bias, shape=(matrix.outputs,), finite=True)
        self.low, self.high, self.dtype = float(low), float(high), dtype
        self.backend: Backend | None = None  # as in `sparse_product`
        for name in ("values", "steps", "counts", "first"):
            self.register_buffer(name, None)
        self._hold(matrix)
        self.register_buffer("bias", None if bias is None else bias.detach().float().clone())

    def _hold(self, matrix: SparseMatrix) -> None:
        self.matrix = matrix
        self.values, self.steps, self.counts = matrix.values, matrix.steps, matrix.counts
        self.first = torch.tensor(matrix.first, device=matrix.values.device)

    @property
    def weight(self) -> Tensor:
        """The dense weight, made when its numbers are wanted; nothing learns by changing it."""
        return stand_in(self._shape(), self.dtype, self.values.device, lambda: self.matrix.dense().view(self._shape()))

    def _shape(self) -> tuple[int, ...]:
        return (self.matrix.outputs, self.matrix.inputs)

    def _apply(self, fn: Any, recurse: bool = True) -> _Sparse:
        kept = {name: buffer for name, buffer in self._buffers.items() if buffer is not None}
        super()._apply(fn, recurse)
        device = self.values.device
        for name, buffer in kept.items():
            self._buffers[name] = buffer.to(device)
        self.matrix = SparseMatrix(self.values, self.steps, self.counts, self.matrix.inputs, self.matrix.first)
        self.follow(fn)
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Another number of weights may come than is here; raises ValueError for lists that lead out of the matrix."""
        found = {name: state_dict.get(f"{prefix}{name}") for name in ("values", "steps", "counts", "first")}
        if all(isinstance(part, Tensor) for part in found.values()):
            parts = {name: cast(Tensor, part).to(self.values.device) for name, part in found.items()}
            first = int(parts.pop("first"))
            matrix = SparseMatrix(inputs=self.matrix.inputs, first=first, **parts)
            if matrix.outputs != self.matrix.outputs:
                raise ValueError(f"{prefix}counts must be of {self.matrix.outputs} outputs, got {matrix.outputs}")
            values, steps, counts = matrix.values.clone(), matrix.steps.clone(), matrix.counts.clone()
            self._hold(SparseMatrix(values, steps, counts, matrix.inputs, first))
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _product(self, x: Tensor) -> Tensor:
        """x (batch, inputs, ...) to (batch, outputs, ...)."""
        if x.dtype not in FLOATS:
            raise TypeError(f"x must be float32, bfloat16 or float16, got {x.dtype}")
        if x.shape[1] != self.matrix.inputs:
            raise ValueError(f"x must be (batch, {self.matrix.inputs}, ...), got shape {tuple(x.shape)}")
        y = multiply(x, x.float().flatten(2), self.matrix, self.bias, self.low, self.high, self._way(x))
        return y.to(x.dtype)

    def _way(self, x: Tensor) -> Backend | None:
        if torch.is_grad_enabled() and x.requires_grad:
            return "dense"
        return (
            None if self.backend == "strips" or x.device.type != "cpu" else self.backend
        )  # None: strips where they can be

    def extra_repr(self) -> str:
        found = self.matrix
        kept = found.stored / (found.outputs * found.inputs)
        clamp = "" if (self.low, self.high) == (-math.inf, math.inf) else f", clamp=({self.low:g}, {self.high:g})"
        return f"{found.inputs}, {found.outputs}, kept={kept:.3g}, block={found.block}{clamp}"


class SparseConv1x1(_Sparse):
    """A 1 x 1 convolution of pruned weights, with bias and clamp: (batch, inputs, height, width) to (batch, outputs, ...).

    `weight` is (outputs, inputs, 1, 1) or (outputs, inputs); what is 0 in it is neither kept nor multiplied. A `stride` leaves pixels out
    first. The output is contiguous, channels first. Gradients reach the input, by the dense product; the weights learn nothing.
    Raises TypeError or ValueError as `pack`, and for inputs of another number of channels.

    >>> layer = SparseConv1x1(torch.eye(4)[:, :, None, None], low=0.0)
    >>> layer(torch.ones(2, 4, 3, 3)).shape, layer.matrix.stored
    (torch.Size([2, 4, 3, 3]), 4)
    """

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None = None,
        *,
        low: float = -math.inf,
        high: float = math.inf,
        block: Block = 1,
        stride: tuple[int, int] = (1, 1),
    ):
        super().__init__(pack(weight, block), bias, low, high, weight.dtype)
        self.stride = tuple(checks.whole("stride", step, low=1) for step in stride)

    def _shape(self) -> tuple[int, ...]:
        return (self.matrix.outputs, self.matrix.inputs, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim != 4:
            raise ValueError(f"x must be (batch, {self.matrix.inputs}, height, width), got shape {tuple(x.shape)}")
        down, across = self.stride
        return self._product(x if down == across == 1 else x[:, :, ::down, ::across])


class SparseLinear(_Sparse):
    """A linear layer of pruned weights, with bias and clamp: (..., inputs) to (..., outputs).

    Rows are turned into the pixels of one picture, which copies inputs and outputs: it pays with many rows.
    Raises TypeError or ValueError as `pack`, and for inputs of another number of features.

    >>> SparseLinear(torch.eye(4))(torch.ones(5, 3, 4)).shape
    torch.Size([5, 3, 4])
    """

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None = None,
        *,
        low: float = -math.inf,
        high: float = math.inf,
        block: Block = 1,
    ):
        super().__init__(pack(weight, block), bias, low, high, weight.dtype)

    @property
    def in_features(self) -> int:
        """Inputs."""
        return self.matrix.inputs

    @property
    def out_features(self) -> int:
        """Outputs."""
        return self.matrix.outputs

    def forward(self, x: Tensor) -> Tensor:
        if not x.ndim or x.shape[-1] != self.in_features:
            raise ValueError(f"x must have {self.in_features} features in its last dimension, got {tuple(x.shape)}")
        rows = x.reshape(-1, self.in_features)
        return self._product(rows.T[None])[0].T.reshape(*x.shape[:-1], self.out_features)


def sparsify_(
    model: nn.Module,
    *,
    least: float = 0.7,
    block: int | Mapping[str, int] = 1,
    include: tuple[str, ...] = ("*",),
    exclude: tuple[str, ...] = (),
    batches: Iterable[Any] | None = None,
) -> dict[str, float]:
    """Replace pruned layers by sparse ones, in place; returns the share of zeros of each that was replaced, by name.

    Reached are 1 x 1 convolutions (of one group, without padding) and linear layers of which at least `least` is 0, with masks of
    `torch.nn.utils.prune` on them or plain zeros; masks go with the layer. In an `nn.Sequential` a BatchNorm2d right after such a
    convolution is folded into it and a ReLU or ReLU6 into its clamp; both leave an `nn.Identity` in their place. The model must be in
    evaluation mode. `block` is 1, 2 or 4, the same for all or by name (1 for those not named). With `batches` (of inputs, see
    `core.layers.inputs.run`) each layer's ways are timed on the inputs it is given: a layer whose dense product is the fastest is left
    as it is, others take their fastest way. `save_pretrained` is refused afterwards: `from_pretrained` knows no sparse layers.

    When not to use it: for layers of less than some 70 % zeros, where a dense product is faster.
    Raises ValueError, before anything is changed, for a model in training mode, without such a layer, or outputs that the block of a
    layer does not divide, for a weight that is not finite or not float32, and for a layer that `batches` do not reach.
    """
    least = checks.number("least", least, low=0, high=1)
    if model.training:
        raise ValueError("model must be in evaluation mode, or its batch norms cannot be folded: call eval() first")
    chosen = {name: share for name, share in zeros(model, include=include, exclude=exclude).items() if share >= least}
    if not chosen:
        raise ValueError(f"model must have a pointwise or linear layer with {least:.0%} zeros, got none")
    sizes = _blocks(block, chosen)
    built = {name: _sparse(model, name, sizes[name]) for name in chosen}
    if batches is not None:
        built = _worth_it(model, built, batches)
    places, modules = module_places(model), dict[str, nn.Module]()
    for name, layer in built.items():
        modules[name], others = _with_neighbours(model, name, layer, places)
        modules |= others
    swap(model, modules)
    untie(model)
    if built:
        refuse_saving(model)
    return {name: chosen[name] for name in built}


def zeros(model: nn.Module, *, include: tuple[str, ...] = ("*",), exclude: tuple[str, ...] = ()) -> dict[str, float]:
    """The share of zeros, masks counted, of every layer that `sparsify_` could replace, by name.

    >>> model = nn.Sequential(nn.Conv2d(2, 4, 1), nn.Conv2d(4, 4, 3))
    >>> zeros(model)
    {'0': 0.0}
    """
    found = find(model, (nn.Conv2d, nn.Linear), include=include, exclude=exclude)
    return {
        name: float((matrix_of(model, name) == 0).double().mean())
        for name, layer in found.items()
        if isinstance(layer, nn.Linear) or _pointwise(layer)
    }


def _pointwise(layer: nn.Module) -> bool:
    conv = cast(Any, layer)
    return conv.kernel_size == (1, 1) and conv.groups == 1 and conv.padding in ((0, 0), "valid", "same")


def _blocks(block: int | Mapping[str, int], names: Iterable[str]) -> dict[str, Block]:
    found: dict[str, Block] = {}
    for name in names:
        size = block.get(name, 1) if isinstance(block, Mapping) else block
        found[name] = cast(Block, checks.choice("block", size, BLOCKS))
    return found


def _sparse(model: nn.Module, name: str, block: Block) -> _Sparse:
    """The layer for `name`, without its neighbours."""
    layer = cast(Any, model.get_submodule(name))
    weight = matrix_of(model, name).detach()
    if isinstance(layer, nn.Linear):
        return SparseLinear(weight, layer.bias, block=block)
    return SparseConv1x1(weight, layer.bias, block=block, stride=layer.stride)


def _worth_it(model: nn.Module, built: Mapping[str, _Sparse], batches: Iterable[Any]) -> dict[str, _Sparse]:
    """The layers that are faster than a dense product on the first inputs they are given, each set to its fastest way."""
    given: dict[str, Tensor] = {}

    def see(name: str, _: nn.Module, x: Tensor) -> None:
        given.setdefault(name, x)

    watch(model, list(built), batches, see)
    kept: dict[str, _Sparse] = {}
    for name, layer in built.items():
        x = given[name]
        if isinstance(layer, SparseConv1x1):
            x = x[:, :, :: layer.stride[0], :: layer.stride[1]]
        else:
            x = x.reshape(-1, layer.matrix.inputs).T[None]
        backend, _ = fastest(x, layer.matrix, layer.bias)
        if backend != "dense":
            layer.backend = backend
            kept[name] = layer
    return kept


def _with_neighbours(
    model: nn.Module, name: str, layer: _Sparse, places: Mapping[int, int]
) -> tuple[_Sparse, dict[str, nn.Module]]:
    """The layer with what follows a convolution taken in, and what is to stand in the place of that."""
    if not isinstance(layer, SparseConv1x1):
        return layer, {}
    weight, bias, low, high, others = taken_in(model, name, places)
    stride = cast(tuple[int, int], layer.stride)
    whole = SparseConv1x1(weight, bias, low=low, high=high, block=cast(Block, layer.matrix.block), stride=stride)
    whole.backend = layer.backend
    return whole, others
