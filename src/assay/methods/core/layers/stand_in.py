"""The `weight` of a layer that keeps no dense weight: shape, dtype and device cost nothing, numbers are made only on demand.

Models inspect the weights of their layers besides calling them: T5 asks for the dtype of `wo.weight`, vision models for that of
their patch embedding, and `nn.TransformerEncoderLayer` passes `linear1.weight` to a fused kernel. A layer that replaces a dense
one therefore needs a `weight` too. Building the dense weight at every access would cost the very work that the layer saves.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

FREE: set[Any] = {  # questions that are answered without the numbers
    *(
        getattr(Tensor, name).__get__
        for name in ("dtype", "shape", "device", "layout", "ndim", "requires_grad", "is_meta")
    ),
    *(Tensor.size, Tensor.dim, Tensor.numel, Tensor.element_size, Tensor.is_floating_point, Tensor.__len__),
}


SAME: set[Any] = {Tensor.detach, *(getattr(Tensor, name).__get__ for name in ("data",))}  # still the weight


class StandIn(Tensor):
    """A tensor whose numbers come from `dense()` when an operation needs them; made by `stand_in`.

    Raises TypeError for operations that would write into it, since writing would change nothing.
    """

    dense: Callable[[], Tensor]

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in FREE:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        if func in SAME:
            return args[0]
        name = getattr(func, "__name__", "")
        if name in ("__setitem__", "__set__") or (name.endswith("_") and not name.endswith("__")):
            raise TypeError(
                f"this layer keeps its weight packed: {name} would change nothing; change the layer before it is packed"
            )
        plain = tree_map(lambda x: x.dense() if isinstance(x, StandIn) else x, (args, kwargs or {}))
        return func(*plain[0], **plain[1])


def stand_in(shape: Sequence[int], dtype: torch.dtype, device: torch.device, dense: Callable[[], Tensor]) -> Tensor:
    """A weight of that shape, dtype and device, whose numbers are those of `dense()`. Compiled code gets the numbers at once.

    Because it has a `__torch_function__`, `nn.TransformerEncoderLayer` does not take its fused path, which would bypass the layer.

    >>> weight = stand_in((2, 3), torch.float32, torch.device("cpu"), lambda: torch.ones(2, 3))
    >>> weight.shape, float((weight + 1).sum())
    (torch.Size([2, 3]), 12.0)
    """
    if torch.compiler.is_compiling():
        return dense().to(dtype)
    shown = torch.empty((), dtype=dtype, device=device).expand(tuple(shape)).as_subclass(StandIn)
    shown.dense = lambda: dense().to(dtype)
    return shown


class Casting:
    """For modules whose own tensors keep their dtype: `dtype` remembers what `model.to(...)` would have made of the weight."""

    dtype: torch.dtype

    def follow(self, change: Callable[[Tensor], Tensor]) -> None:
        """Take part in `_apply(change)`."""
        self.dtype = change(torch.empty(0, dtype=self.dtype)).dtype
