"""Layers that train with N:M sparse weights: one mask for the forward pass, another for the gradient of the input.

    sparse_training(model, Pattern(2, 8))        layers in place, over the same parameters: any optimiser goes on as before
    ... train as usual ...
    settle(model)                                plain layers again, whose weights are the N:M ones of the forward pass

The parameters stay dense, and so do their gradients; what is sparse is what the two products with the weight see.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal, cast, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.grad import conv2d_input, conv2d_weight

from assay import checks
from assay.methods.core import kernels
from assay.methods.core.layers.surgery import CONVOLUTIONS, find, linear_kinds, output_layer, swap, untie
from assay.methods.core.sparsity.formats import SEMI_STRUCTURED
from assay.methods.core.sparsity.projections import SEARCHES, Search, check_n_m, transposable

Scheme = Literal["bdwp", "transposable", "sr_ste", "forward"]
SCHEMES: tuple[Scheme, ...] = get_args(Scheme)
BACKWARD_SPARSE: tuple[Scheme, ...] = ("bdwp", "transposable")
Backend = Literal["dense", "csr", "semi_structured"]
BACKENDS: tuple[Backend, ...] = get_args(Backend)
CLOSED = (
    nn.MultiheadAttention,
    nn.TransformerEncoderLayer,
)  # they read the weights of layers inside them, some of the time

Masks = tuple[Tensor, Tensor]
"""Of the forward and of the backward product, bool, in the shape of the weight; True stays."""


@dataclass(frozen=True)
class Pattern:
    """N:M, and which weight the gradient of the input is computed with.

    - "bdwp": the weight pruned along its outputs, the paper's method.
    - "transposable": one mask that is N:M both ways (arXiv 2102.08124), found by `search` (see `projections.transposable`).
    - "sr_ste": the weight of the forward pass, so that gx is exact for what was computed, by a dense product (arXiv 2102.04010).
    - "forward": the dense weight itself.

    `decay` times the weights that the forward mask drops is added to the gradient of the weight: SR-STE's term, with SR-STE's 2e-4 as
    the default (our choice; whether BDWP has it could not be verified). With `held` the masks change in `remake` only; otherwise they
    are made of the weight in every pass, as the paper does.
    """

    n: int = 2
    m: int = 8
    scheme: Scheme = "bdwp"
    decay: float = 2e-4
    search: Search = "greedy"
    held: bool = False

    def __post_init__(self) -> None:
        check_n_m(self.n, self.m)
        checks.choice("scheme", self.scheme, SCHEMES)
        checks.number("decay", self.decay, low=0)
        checks.choice("search", self.search, SEARCHES)
        checks.flag("held", self.held)


@dataclass(frozen=True)
class Geometry:
    """How a weight meets its input: as a matrix (`kernel` None), or as a convolution; and which code multiplies."""

    kernel: tuple[int, int] | None = None
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    backend: Backend = "dense"


# ---- masks -----------------------------------------------------------------------------------------------------------------------


def largest(scores: Tensor, n: int, m: int, axis: int) -> Tensor:
    """`projections.n_m` by m comparisons in place of a selection, and unchecked: the `n` largest of every `m` along `axis`, the first
    of equal ones.

    NaN beats nothing and is beaten by nothing: it stays, so that it is seen in the outputs.

    >>> largest(torch.tensor([[1.0, 4.0, 4.0, 4.0]]), 2, 4, axis=1)
    tensor([[False,  True,  True, False]])
    """
    last = scores.movedim(axis, -1)
    groups = last.reshape(-1, m)
    before = torch.zeros(
        groups.shape, dtype=torch.int32, device=scores.device
    )  # how many of its group rank before each
    for place in range(m):
        rival = groups[:, place : place + 1]
        before[:, :place] += rival > groups[:, :place]
        before[:, place + 1 :] += rival >= groups[:, place + 1 :]  # of equal ones the earlier ranks first
    return (before < n).view(last.shape).movedim(-1, axis).contiguous()


def masks_of(weight: Tensor, pattern: Pattern) -> Masks:
    """The two masks of a weight (out, in, ...): magnitudes along axis 1 for the forward product, along axis 0 for the backward one.

    The groups of a convolution are channels at one place of the kernel. "sr_ste" has the forward mask twice, "forward" drops nothing
    in the backward product, "transposable" has one mask for both.
    """
    scores = weight.detach().abs()
    if pattern.scheme == "transposable":
        both = transposable(scores, pattern.n, pattern.m, search=pattern.search)
        return both, both
    forward = largest(scores, pattern.n, pattern.m, 1)
    if pattern.scheme == "bdwp":
        return forward, largest(scores, pattern.n, pattern.m, 0)
    return forward, forward if pattern.scheme == "sr_ste" else torch.ones_like(forward)


# ---- the three products ----------------------------------------------------------------------------------------------------------


def compress(matrix: Tensor, backend: Backend) -> Tensor:
    """A matrix (o, k), N:M along k, in the form that `multiply` takes: as it is, in compressed rows, or for the 2:4 units."""
    if backend == "csr":
        return matrix.to_sparse_csr()
    if backend == "semi_structured":
        from torch.sparse import to_sparse_semi_structured

        return cast(Tensor, to_sparse_semi_structured(matrix.contiguous()))
    return matrix


def multiply(rows: Tensor, compressed: Tensor, backend: Backend) -> Tensor:
    """rows (r, k) times the transpose of a compressed (o, k): (r, o)."""
    if backend == "csr":
        return torch.sparse.mm(compressed, rows.T).T
    return F.linear(rows.contiguous(), compressed)


def forward_product(x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
    """y = x W^T + b of a linear layer, or the convolution, with the weight as it is given."""
    g = geometry
    if g.kernel is None:
        if g.backend == "dense":
            return F.linear(x, weight, bias)
        rows = multiply(x.reshape(-1, x.shape[-1]), compress(weight, g.backend), g.backend)
        y = rows.reshape(*x.shape[:-1], len(weight))
        return y if bias is None else y + bias
    if g.backend == "dense":
        return F.conv2d(x, weight, bias, g.stride, g.padding, g.dilation)
    patches = F.unfold(x, g.kernel, g.dilation, g.padding, g.stride)  # (batch, channels * kernel, places)
    patches = patches.unflatten(1, (x.shape[1], -1)).permute(0, 3, 2, 1)  # channels last: they make the groups
    rows = multiply(patches.reshape(-1, weight[0].numel()), compress(_matrix(weight), g.backend), g.backend)
    high, wide = _places(x.shape, g)
    y = rows.reshape(len(x), high, wide, len(weight)).permute(0, 3, 1, 2).contiguous()
    return y if bias is None else y + bias[:, None, None]


def input_gradient(gy: Tensor, weight: Tensor, shape: Sequence[int], geometry: Geometry) -> Tensor:
    """gx = gy W, of the `shape` of the input, with the weight as it is given."""
    g = geometry
    if g.kernel is None:
        if g.backend == "dense":
            return gy @ weight
        return multiply(gy.reshape(-1, gy.shape[-1]), compress(weight.T, g.backend), g.backend).reshape(*shape)
    if g.backend == "dense":
        return cast(Tensor, conv2d_input(list(shape), weight, gy, g.stride, g.padding, g.dilation))
    rows = gy.flatten(2).transpose(1, 2).reshape(-1, len(weight))
    patches = multiply(rows, compress(_matrix(weight).T, g.backend), g.backend)
    patches = patches.reshape(len(gy), math.prod(gy.shape[2:]), math.prod(g.kernel), shape[1])
    patches = patches.permute(0, 3, 2, 1).flatten(1, 2)  # the channels first again
    return F.fold(patches, (shape[2], shape[3]), g.kernel, g.dilation, g.padding, g.stride)


def weight_gradient(gy: Tensor, x: Tensor, shape: Sequence[int], geometry: Geometry) -> Tensor:
    """gW = gy^T x, of the `shape` of the weight: dense, whatever the pattern."""
    g = geometry
    if g.kernel is None:
        return gy.reshape(-1, gy.shape[-1]).T @ x.reshape(-1, x.shape[-1])
    return cast(Tensor, conv2d_weight(x, list(shape), gy, g.stride, g.padding, g.dilation))


def _matrix(weight: Tensor) -> Tensor:
    """A convolution's weight (out, in, height, width) as (out, height * width * in): the channels of a group are neighbours."""
    return weight.permute(0, 2, 3, 1).flatten(1)


def _places(shape: Sequence[int], g: Geometry) -> tuple[int, int]:
    """Height and width of a convolution's output."""
    assert g.kernel is not None
    high, wide = (
        (shape[2 + i] + 2 * g.padding[i] - g.dilation[i] * (g.kernel[i] - 1) - 1) // g.stride[i] + 1 for i in (0, 1)
    )
    return high, wide


class _Products(torch.autograd.Function):
    """The three products of a layer, the first with one mask, the second with another, the third with none."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        forward_mask: Tensor,
        backward_mask: Tensor,
        pattern: Pattern,
        geometry: Geometry,
    ) -> Tensor:
        ctx.save_for_backward(x, weight, forward_mask, backward_mask)
        ctx.pattern, ctx.geometry = pattern, geometry
        sparse = (weight * forward_mask).to(x.dtype)
        return forward_product(x, sparse, None if bias is None else bias.to(x.dtype), geometry)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, forward_mask, backward_mask = ctx.saved_tensors
        geometry: Geometry = ctx.geometry
        gx: Tensor | None = None
        gw: Tensor | None = None
        gb: Tensor | None = None
        if ctx.needs_input_grad[0]:
            sparse = (weight * backward_mask).to(gy.dtype)
            work = geometry if ctx.pattern.scheme in BACKWARD_SPARSE else replace(geometry, backend="dense")
            gx = input_gradient(gy, sparse, x.shape, work)
        if ctx.needs_input_grad[1]:
            gw = weight_gradient(gy, x, weight.shape, geometry).to(weight.dtype)
            if ctx.pattern.decay:
                gw = gw + ctx.pattern.decay * weight.masked_fill(forward_mask, 0)
        if ctx.needs_input_grad[2]:
            gb = gy.sum([0, 2, 3]) if geometry.kernel else gy.reshape(-1, gy.shape[-1]).sum(0)
            gb = gb.to(weight.dtype)
        return gx, gw, gb, None, None, None, None


# ---- layers ----------------------------------------------------------------------------------------------------------------------


class NMLinear(nn.Linear):
    """A linear layer that trains N:M, over the parameters of `layer`: (..., in) to (..., out), in the dtype of the input.

    Gradients are first derivatives only: a second backward pass through one is refused.

    Under autocast in autocast's dtype. The weight is pruned as it is kept, in float32 usually, and rounded afterwards: pruning rounded
    weights would make ties common. `backend` says who multiplies: "dense" with zeros in place of what is pruned, which saves
    nothing; "csr" by compressed rows, which leaves the work out and is slow (on a processor in float32 and float64 only);
    "semi_structured" by the 2:4 units of NVIDIA's GPUs (float16 and bfloat16 only, autocast say).
    """

    def __init__(self, layer: nn.Linear, pattern: Pattern, backend: Backend = "dense"):
        super().__init__(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
        _adopt(self, layer, pattern, backend, Geometry(backend=backend))

    def forward(self, input: Tensor) -> Tensor:
        return _run(self, input)

    def merged(self) -> nn.Linear:
        """A plain layer whose weight is the forward pass's: N:M along the inputs."""
        plain = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
        return cast(nn.Linear, _settled(plain, self))

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {_words(self)}"


class NMConv2d(nn.Conv2d):
    """A convolution that trains N:M along its channels; otherwise as `NMLinear`, for inputs (batch, in, height, width).

    Other backends than "dense" unfold the input into one row for each place of the output.
    """

    def __init__(self, layer: nn.Conv2d, pattern: Pattern, backend: Backend = "dense"):
        given: Any = layer
        super().__init__(
            given.in_channels, given.out_channels, given.kernel_size, given.stride, given.padding, given.dilation,
            given.groups, given.bias is not None, device="meta",
        )  # fmt: skip
        geometry = Geometry(given.kernel_size, given.stride, given.padding, given.dilation, backend)
        _adopt(self, layer, pattern, backend, geometry)

    def forward(self, input: Tensor) -> Tensor:
        return _run(self, input)

    def merged(self) -> nn.Conv2d:
        """A plain layer whose weight is the forward pass's: N:M along the channels it reads."""
        given: Any = self
        plain = nn.Conv2d(
            given.in_channels, given.out_channels, given.kernel_size, given.stride, given.padding, given.dilation,
            given.groups, given.bias is not None, device="meta",
        )  # fmt: skip
        return cast(nn.Conv2d, _settled(plain, self))

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {_words(self)}"


def _adopt(new: Any, layer: nn.Module, pattern: Pattern, backend: Backend, geometry: Geometry) -> None:
    """Make `new` a layer over the parameters of `layer`."""
    checks.choice("backend", backend, BACKENDS)
    if why := why_not(layer, pattern):
        raise ValueError(f"layer must fit {pattern.n}:{pattern.m}: {why}")
    if backend == "semi_structured":
        _check_semi_structured({"layer": layer}, pattern)
    new.weight, new.bias = layer.weight, layer.bias
    new.pattern, new.backend, new.geometry = pattern, backend, geometry
    new.dense_backward = False  # for `gradient_cosines`
    if pattern.held:
        forward, backward = masks_of(new.weight, pattern)
        new.register_buffer("forward_mask", forward.clone())
        new.register_buffer("backward_mask", backward.clone())
    new.train(layer.training)


def _now(layer: Any) -> Masks:
    """The masks a pass uses."""
    if layer.pattern.held:
        forward, backward = layer.forward_mask, layer.backward_mask
    else:
        forward, backward = masks_of(layer.weight, layer.pattern)
    return forward, torch.ones_like(backward) if layer.dense_backward else backward


def _run(layer: Any, x: Tensor) -> Tensor:
    if layer.geometry.kernel is None:
        checks.tensor("input", x, shape=("...", layer.in_features), empty=True)
    else:
        checks.tensor("input", x, shape=("batch", layer.in_channels, "height", "width"), empty=True)
    device = x.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        x = x.to(torch.get_autocast_dtype(device))
    if layer.backend == "semi_structured":  # of float32 the format takes 1:2, and drops the rest without a word
        checks.tensor("input of the backend 'semi_structured'", x, dtype=(torch.float16, torch.bfloat16), empty=True)
    elif layer.backend == "csr" and device == "cpu":
        checks.tensor("input of the backend 'csr'", x, dtype=(torch.float32, torch.float64), empty=True)
    kernels.ran("N:M products", layer.backend)
    forward, backward = _now(layer)
    geometry = replace(layer.geometry, backend="dense") if layer.dense_backward else layer.geometry
    return cast(Tensor, _Products.apply(x, layer.weight, layer.bias, forward, backward, layer.pattern, geometry))


def _settled(plain: nn.Module, layer: Any) -> nn.Module:
    with torch.no_grad():
        plain.register_parameter("weight", nn.Parameter(layer.weight * _now(layer)[0], layer.weight.requires_grad))
    plain.register_parameter("bias", layer.bias)
    return plain.train(layer.training)


def _words(layer: Any) -> str:
    pattern: Pattern = layer.pattern
    return f"{pattern.n}:{pattern.m} {pattern.scheme}, {layer.backend}"


# ---- models ----------------------------------------------------------------------------------------------------------------------


def sparse_training(
    model: nn.Module,
    pattern: Pattern | None = None,
    *,
    backend: Backend = "dense",
    include: Sequence[str] = ("*",),
    exclude: Sequence[str] = (),
    first: bool = False,
    head: bool = False,
) -> dict[str, nn.Module]:
    """Make linear layers and convolutions train N:M (2:8 BDWP unless `pattern` says otherwise), in place; returns them by name.

    Parameters stay the same objects under the same names, so that optimisers and checkpoints fit before and after (with `held`, the
    masks come into the state dict on top). Left dense are,
    without a word: the first layer unless `first` (a model with an embedding has that for its first layer), the classifier or output
    layer (else the last one) unless `head` (our choice, usual practice), what `include` and `exclude` leave out (patterns over
    names), and every layer that does not fit (`why_not`): channels no multiple of M, grouped convolutions, transformers' Conv1D, and
    what lies inside `nn.MultiheadAttention` and `nn.TransformerEncoderLayer`, which read weights without calling their layers.
    `core.sparsity.masks.reach` says which share of the weights that makes. `save_pretrained` is refused until `settle`: a model
    loaded again would be dense.

    Raises TypeError or ValueError, before anything is changed, for settings out of range, a model in which no layer fits, and for the
    backend "semi_structured" unless the pattern is 2:4 and the layers lie on an NVIDIA GPU with sides the format takes.

    >>> model = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 3))
    >>> sparse_training(model, Pattern(2, 4))
    {'2': NMLinear(in_features=16, out_features=8, bias=True, 2:4 bdwp, dense)}
    >>> model(torch.zeros(1, 4)).sum().backward()
    >>> settle(model)[2]
    Linear(in_features=16, out_features=8, bias=True)
    """
    pattern = Pattern() if pattern is None else pattern
    if not isinstance(pattern, Pattern):
        raise TypeError(f"pattern must be a Pattern, got {checks.shown(pattern)}")
    checks.choice("backend", backend, BACKENDS)
    every = find(model, (*linear_kinds(), *CONVOLUTIONS), closed=CLOSED)
    ends: list[nn.Module] = []
    if not checks.flag("first", first) and not any(isinstance(m, nn.Embedding) for m in model.modules()):
        ends += list(every.values())[:1]
    if not checks.flag("head", head):
        last = output_layer(model)
        ends += list(every.values())[-1:] if last is None else [last]
    found = find(model, (nn.Linear, nn.Conv2d), include=include, exclude=exclude, closed=CLOSED)
    chosen = {
        name: layer
        for name, layer in found.items()
        if not any(layer is end for end in ends) and not why_not(layer, pattern)
    }
    if not chosen:
        raise ValueError(
            f"model must have a layer that fits {pattern.n}:{pattern.m} beside the first and the last, got {len(found)} that do not"
        )
    if backend == "semi_structured":
        _check_semi_structured(chosen, pattern)
    layers: dict[str, nn.Module] = {}
    for name, layer in chosen.items():
        kind: Any = NMConv2d if isinstance(layer, nn.Conv2d) else NMLinear
        layers[name] = kind(layer, pattern, backend)
    swap(model, layers)
    if hasattr(model, "save_pretrained"):
        object.__setattr__(model, "save_pretrained", _refuse_saving)
    return layers


def why_not(layer: nn.Module, pattern: Pattern) -> str:
    """Why a layer cannot train N:M, in a few words; "" if it can.

    Both sides of the weight must be multiples of M: the inputs for the forward product, the outputs for the backward one.
    """
    kept: Any = layer._parameters.get("weight")
    kind: Any = layer
    if not isinstance(layer, (nn.Linear, nn.Conv2d)) or kept is None:
        return "it is no linear layer or 2-D convolution with a weight of its own"
    if isinstance(layer, nn.Conv2d) and (
        kind.groups != 1 or kind.padding_mode != "zeros" or isinstance(kind.padding, str)
    ):
        return "it is a grouped convolution, or pads with anything but a number of zeros"
    outputs, inputs = kept.shape[:2]
    if inputs % pattern.m or outputs % pattern.m:
        return f"its {inputs} inputs and {outputs} outputs are not both multiples of {pattern.m}"
    return ""


def _check_semi_structured(layers: Mapping[str, nn.Module], pattern: Pattern) -> None:
    if (pattern.n, pattern.m) != (2, 4):
        raise ValueError(f"backend 'semi_structured' must have the pattern 2:4, got {pattern.n}:{pattern.m}")
    side = max(SEMI_STRUCTURED[torch.bfloat16])  # W goes in along its inputs, W^T along its outputs
    for name, layer in layers.items():
        weight: Any = layer.weight
        if not weight.is_cuda or torch.cuda.get_device_capability(weight.device) < (8, 0):
            raise ValueError(
                f"backend 'semi_structured' must have its weights on a GPU with sparse tensor cores, got {name} on {weight.device}"
            )
        outputs, inputs = weight.flatten(1).shape
        if outputs % side or inputs % side:
            raise ValueError(
                f"backend 'semi_structured' must have sides that are multiples of {side}, got ({outputs}, {inputs}) in {name}"
            )


def nm_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The layers of a model that train N:M, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, (NMLinear, NMConv2d))}


def remake(model: nn.Module, choose: Callable[[Tensor, Pattern], Masks] | None = None) -> None:
    """New masks for all layers that hold theirs (`Pattern.held`), from `choose(weight, pattern)`, `masks_of` by default.

    Raises ValueError if no layer holds its masks.
    """
    layers: list[Any] = [layer for layer in nm_layers(model).values() if cast(Any, layer).pattern.held]
    if not layers:
        raise ValueError("model must have layers that hold their masks (Pattern.held), got none")
    for layer in layers:
        forward, backward = (choose or masks_of)(layer.weight, layer.pattern)
        layer.forward_mask.copy_(forward)
        layer.backward_mask.copy_(backward)


def settle(model: nn.Module) -> nn.Module:
    """Put plain layers in the place of those that train N:M, with the sparse weights of the forward pass; returns the model.

    It computes the same. A weight that an N:M layer shares with another layer is no longer shared: each has its own. At 2:4 the weights of
    linear layers fit torch's semi-structured tensors (`core.sparsity.formats`).
    """
    layers: dict[str, Any] = dict(nm_layers(model))
    swap(model, {name: layer.merged() for name, layer in layers.items()})
    untie(model)
    vars(model).pop("save_pretrained", None)
    return model


def _refuse_saving(*_: Any, **__: Any) -> None:
    raise ValueError(
        "model must not be saved while it trains N:M, for from_pretrained would load it dense: settle it first, or save its state dict"
    )


# ---- how far the gradients are off ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class GradientCosine:
    """Cosines between the input gradient of a layer and what it stands for, over one batch.

    - `dense`: with gy W, for the same gy: what this layer's backward mask alone does.
    - `exact`: with gy W_ff, for the same gy: the gradient of what the forward pass really computed.
    - `chain`: with the input gradient that arrives here when every layer multiplies by its dense weight in the backward pass: the
      errors of all later layers included.
    """

    dense: float
    exact: float
    chain: float


def gradient_cosines(model: nn.Module, loss: Callable[[], Tensor]) -> dict[str, GradientCosine]:
    """How far the input gradients of the N:M layers point the way the dense ones do, by layer; `.grad` is left alone.

    `loss()` runs the model and returns the loss; it is called twice, so that it should draw no random numbers: in training mode
    dropout would, and the running averages of norms would move. A layer that runs several times is judged by the last gradient it
    gets. Raises ValueError for a model without such layers, one whose N:M layers are all frozen, and a loss whose
    gradient does not reach one of them.
    """
    layers = nm_layers(model)
    if not layers:
        raise ValueError("model must have layers that train N:M, got none")
    if not any(cast(Any, layer).weight.requires_grad for layer in layers.values()):
        raise ValueError("model must have an N:M layer that is trained, got only frozen ones")
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    ours = _output_gradients(layers, loss, trained)
    with _dense_backward(layers):
        dense = _output_gradients(layers, loss, trained)
    found = {}
    for name, module in layers.items():
        layer: Any = module
        geometry = replace(layer.geometry, backend="dense")
        forward, backward = _now(layer)
        weight = layer.weight.detach()
        (gy, shape), (clean, _) = ours[name], dense[name]
        gx = input_gradient(gy, weight * backward, shape, geometry)
        found[name] = GradientCosine(
            dense=_cosine(gx, input_gradient(gy, weight, shape, geometry)),
            exact=_cosine(gx, input_gradient(gy, weight * forward, shape, geometry)),
            chain=_cosine(gx, input_gradient(clean, weight, shape, geometry)),
        )
    return found


def _cosine(a: Tensor, b: Tensor) -> float:
    return float(F.cosine_similarity(a.flatten().double(), b.flatten().double(), dim=0))


@contextmanager
def _dense_backward(layers: Mapping[str, nn.Module]) -> Iterator[None]:
    """Within, the layers multiply by their dense weight in the backward pass."""
    every: list[Any] = list(layers.values())
    for layer in every:
        layer.dense_backward = True
    try:
        yield
    finally:
        for layer in every:
            layer.dense_backward = False


def _output_gradients(
    layers: Mapping[str, nn.Module], loss: Callable[[], Tensor], trained: Sequence[Tensor]
) -> dict[str, tuple[Tensor, torch.Size]]:
    """The gradient of the loss by each layer's output, in the dtype of its weight, and the shape of its input."""
    seen: dict[str, tuple[Tensor, torch.Size]] = {}

    def watch(name: str) -> Callable[[Any, tuple[Any, ...], Tensor], None]:
        def look(layer: Any, args: tuple[Any, ...], output: Tensor) -> None:
            def keep(gradient: Tensor) -> None:
                seen[name] = (gradient.detach().to(layer.weight.dtype), args[0].shape)

            if output.requires_grad:
                output.register_hook(keep)

        return look

    handles = [layer.register_forward_hook(watch(name)) for name, layer in layers.items()]
    try:
        with torch.enable_grad():
            torch.autograd.grad(loss(), trained, allow_unused=True)
    finally:
        for handle in handles:
            handle.remove()
    if missed := [name for name in layers if name not in seen]:
        raise ValueError(f"loss must send a gradient to every N:M layer, got none that reaches {missed[0]}")
    return seen
