"""What the layers of a model are given: their inputs, watched while calibration data runs through, and what is summed up of them.

Scores (Wanda), second-order rounding (GPTQ) and the search for scales (AWQ) all need figures of the inputs and never the inputs
themselves, so that these are summed up as they come: memory does not grow with the data.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from assay import checks
from assay.methods.core.layers.surgery import CONVOLUTIONS, linear_kinds


def run(model: nn.Module, batch: Any) -> Any:
    """`model` on one batch: a tensor, a tuple or list of arguments, or a mapping of keyword arguments."""
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*batch) if isinstance(batch, (tuple, list)) else model(batch)


def rows_of(layer: nn.Module, x: Tensor) -> Tensor:
    """The vectors that `layer`'s weight multiplies, (groups, rows, inputs of a group): tokens, or the patches of a convolution.

    One group but for grouped convolutions. Raises TypeError for a layer that is no linear layer or 2-D convolution.
    """
    kind: Any = layer
    if isinstance(layer, nn.Conv2d):
        if kind.padding_mode != "zeros" or isinstance(kind.padding, str):
            raise TypeError(f"layer must pad with a number of zeros, got {layer}")
        patches = F.unfold(x, kind.kernel_size, kind.dilation, kind.padding, kind.stride)  # (batch, c kh kw, places)
        return patches.transpose(1, 2).flatten(0, 1).unflatten(1, (kind.groups, -1)).transpose(0, 1)
    if isinstance(layer, linear_kinds()):
        return x.reshape(1, -1, x.shape[-1])
    raise TypeError(f"layer must be a linear layer or a 2-D convolution, got {type(layer).__name__}")


def watch(
    model: nn.Module, names: Iterable[str], batches: Iterable[Any], see: Callable[[str, nn.Module, Tensor], None]
) -> None:
    """Run `model` over `batches` (see `run`) in evaluation mode; `see(name, layer, x)` gets each input of the named layers.

    Raises ValueError for a name the model does not have, and for a layer that no batch reached.
    """
    known = dict(model.named_modules())
    wanted = list(names)
    for name in wanted:
        if name not in known:
            raise ValueError(f"names must be modules of {type(model).__name__}, got {name!r}")
    seen: set[str] = set()

    def hook(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def look(layer: nn.Module, args: tuple[Any, ...]) -> None:
            seen.add(name)
            see(name, layer, args[0].detach())

        return look

    training = {module: module.training for module in model.modules()}
    handles = [known[name].register_forward_pre_hook(hook(name)) for name in wanted]
    model.eval()
    try:
        with torch.no_grad():
            for batch in batches:
                run(model, batch)
    finally:
        for handle in handles:
            handle.remove()
        for module, mode in training.items():
            module.training = mode
    if missed := [name for name in wanted if name not in seen]:
        raise ValueError(f"batches must reach every layer, got none that reaches {missed[0]}")


def input_norms(model: nn.Module, names: Iterable[str], batches: Iterable[Any]) -> dict[str, Tensor]:
    """The L2 norm of every input over all tokens (or patches), in float64, shaped to multiply the layer's (out, in, ...) weight.

    (1, in) for linear layers; (1, c, kh, kw) for convolutions, and (out, c, kh, kw) for grouped ones.

    >>> model = nn.Sequential(nn.Linear(2, 3))
    >>> input_norms(model, ["0"], [torch.tensor([[3.0, 1.0], [4.0, 0.0]])])["0"]
    tensor([[5., 1.]], dtype=torch.float64)
    """
    squares: dict[str, Tensor] = {}

    def see(name: str, layer: nn.Module, x: Tensor) -> None:
        total = rows_of(layer, x).double().square().sum(1)  # (groups, inputs)
        squares[name] = squares[name] + total if name in squares else total

    watch(model, names, batches, see)
    found = {}
    for name, total in squares.items():
        layer: Any = model.get_submodule(name)
        norm = total.sqrt()
        if type(layer) in CONVOLUTIONS:
            per_output = norm if len(norm) == 1 else norm.repeat_interleave(layer.out_channels // layer.groups, 0)
            norm = per_output.unflatten(1, (layer.in_channels // layer.groups, *layer.kernel_size))
        found[name] = norm
    return found


def input_moments(model: nn.Module, names: Iterable[str], batches: Iterable[Any]) -> dict[str, Tensor]:
    """The second moment X^T X / rows of the inputs of linear layers, (in, in) in float64: the Hessian of half the squared output error.

    Raises TypeError for a convolution.
    """
    wanted = list(names)
    for name in wanted:
        layer = dict(model.named_modules()).get(name)
        if layer is not None and not isinstance(layer, linear_kinds()):
            raise TypeError(f"names must be linear layers, got {name!r}, a {type(layer).__name__}")
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}

    def see(name: str, layer: nn.Module, x: Tensor) -> None:
        rows = checks.tensor(f"the input of {name}", x, finite=True).reshape(-1, x.shape[-1]).double()
        sums[name] = sums[name] + rows.T @ rows if name in sums else rows.T @ rows
        counts[name] = counts.get(name, 0) + len(rows)

    watch(model, wanted, batches, see)
    return {name: total / counts[name] for name, total in sums.items()}
